"""What a file holds beside its pictures: sound, subtitles, chapters, timecode, languages, dispositions, tags."""

import errno
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from conftest import run_ffmpeg
from test_video import assert_same_sound, assert_same_timing, copy_video, packets, true_times

from dpe_cli import tracks
from dpe_cli.edit import sound_of
from dpe_cli.errors import OutputError
from dpe_cli.motion import MotionTrack
from dpe_cli.motion_file import Driver
from dpe_cli.tracks import moved_timecode
from dpe_cli.video import VideoInfo, probe
from dpe_cli.writer import write_image

Clip = Callable[..., Path]
CHAPTERS = """;FFMETADATA1
title=A clip; with signs = and #
[CHAPTER]
TIMEBASE=1/1000
START=0
END=800
title=One
[CHAPTER]
TIMEBASE=1/1000
START=800
END=2000
title=Two
"""
TEXTS = """1
00:00:00,200 --> 00:00:00,600
Hello

2
00:00:00,900 --> 00:00:01,700
World
"""


@pytest.fixture
def rich(make_clip: Clip, tmp_path: Path) -> Callable[..., Path]:
    """Makes two seconds of video with two sound tracks, subtitles, chapters, a timecode, languages and titles."""

    def make(name: str = "rich.mov", timecode: str = "01:00:59;20", text: str = "mov_text") -> Path:
        plain, path = make_clip("plain.mov", seconds=2, tracks=2), tmp_path / name
        (tmp_path / "chapters.txt").write_text(CHAPTERS.replace("clip;", "clip\\;").replace("= and #", "\\= and \\#"))
        (tmp_path / "texts.srt").write_text(TEXTS)
        inputs = ["-i", plain, "-i", tmp_path / "texts.srt", "-f", "ffmetadata", "-i", tmp_path / "chapters.txt"]
        tags = ["-metadata:s:v", "language=fra", "-metadata:s:a:0", "language=ger", "-metadata:s:a:1", "language=eng"]
        tags += ["-metadata:s:s:0", "language=spa", "-metadata:s:a:1", "title=Comments", "-timecode", timecode]
        tags += ["-disposition:a:0", "0", "-disposition:a:1", "default+comment", "-disposition:s:0", "default+forced"]
        maps = ["-map", "0:v", "-map", "0:a", "-map", "1:s", "-map_metadata", 2, "-map_chapters", 2]
        run_ffmpeg(*inputs, *maps, "-c", "copy", "-c:s", text, *tags, path)
        return path

    return make


def copied(source: Path, output: Path, **options) -> Path:
    copy_video(source, output, tracks=source, **options)
    return output


def texts(path: Path) -> list[tuple[float, float, str]]:
    """Begin, end and words of the first subtitles."""
    with av.open(str(path)) as container:
        stream = container.streams.subtitles[0]
        timed = stream.codec_context.name == "mov_text"
        found = []
        for packet in container.demux(stream):
            words = bytes(packet)[2:] if timed else bytes(packet)
            words = words.decode().split("\x00")[0].strip()
            if words:
                begin = float(packet.pts * packet.time_base)
                found.append((round(begin, 3), round(begin + float(packet.duration * packet.time_base), 3), words))
        return found


def chapters(path: Path) -> list[tuple[float, float, str]]:
    """Begin, end and title."""
    with av.open(str(path)) as container:
        return [
            (float(one["start"] * one["time_base"]), float(one["end"] * one["time_base"]), one["metadata"]["title"])
            for one in container.chapters()
        ]


def described(path: Path) -> list[tuple[str, str | None, str]]:
    """Kind, language and disposition of the tracks, without the timecode's."""
    with av.open(str(path)) as container:
        return [
            (stream.type, stream.metadata.get("language"), str(stream.disposition))
            for stream in container.streams
            if stream.type != "data"
        ]


def timecode(path: Path) -> str | None:
    with av.open(str(path)) as container:
        tags = {**container.metadata, **container.streams.video[0].metadata}
        return {key.lower(): value for key, value in tags.items()}.get("timecode")


@pytest.mark.parametrize("name", ["out.mov", "out.mp4", "out.mkv"])
def test_all_tracks_chapters_timecode_and_tags_are_carried_over(rich, tmp_path: Path, name: str):
    source = rich()
    assert len(packets(source, 1)) > 50 and timecode(source) == "01:00:59;20"
    output = copied(source, tmp_path / name)
    tolerance = 0.0006 if name == "out.mkv" else 1e-9
    for track in (0, 1):
        assert_same_sound(source, output, track, tolerance)
    assert_same_timing(source, output, Fraction(tolerance).limit_denominator(2000))
    assert texts(output) == texts(source) == [(0.2, 0.6, "Hello"), (0.9, 1.7, "World")]
    assert chapters(output) == chapters(source) == [(0.0, 0.8, "One"), (0.8, 2.0, "Two")]
    assert timecode(output) == "01:00:59;20"
    assert described(output) == described(source)
    with av.open(str(output)) as container:
        assert container.metadata.get("title") == "A clip; with signs = and #"


@pytest.mark.parametrize("name", ["out.mov", "out.mkv"])
def test_a_span_moves_and_cuts_them_all(rich, tmp_path: Path, name: str):
    source = rich()
    output = copied(source, tmp_path / name, start=0.4, end=1.5)
    first = next(time for time in true_times(source) if time >= Fraction(2, 5))
    shift = float(first)
    (one, two) = texts(output)
    assert one[0] == 0 and one[1] == pytest.approx(0.6 - shift, abs=0.002) and one[2] == "Hello"
    assert two[:2] == pytest.approx((0.9 - shift, 1.5 - shift), abs=0.002) and two[2] == "World"
    assert [round(edge, 3) for chapter in chapters(output) for edge in chapter[:2]] == pytest.approx(
        [0, 0.8 - shift, 0.8 - shift, 1.5 - shift], abs=0.0011
    )
    frames = round(first * Fraction(30000, 1001))
    assert frames == 12 and timecode(output) == "01:01:00;04"  # past the two numbers that drop-frame leaves out
    assert described(output) == described(source)


def test_subtitles_of_matroska_become_timed_text_in_mp4(rich, tmp_path: Path):
    source = rich("rich.mkv", text="subrip")
    output = copied(source, tmp_path / "out.mp4")
    assert texts(output) == [(0.2, 0.6, "Hello"), (0.9, 1.7, "World")]
    with av.open(str(output)) as container:
        assert container.streams.subtitles[0].codec_context.name == "mov_text"
    back = copied(source, tmp_path / "out.mkv", start=0.1)
    assert [text for *_, text in texts(back)] == ["Hello", "World"] and timecode(back) == "01:00:59;23"


def test_what_loses_its_style_or_has_no_place_is_said(rich, tmp_path: Path):
    source = rich("rich.mkv", text="ass")
    notes = copy_video(source, tmp_path / "out.mp4", tracks=source).notes
    assert len(notes) == 1 and "ass subtitles" in notes[0] and ".mkv" in notes[0]
    notes = copy_video(source, tmp_path / "out_%03d.png", tracks=source, preset=None).notes
    assert any("subtitles" in note for note in notes) and any("sound" in note for note in notes)


def test_sound_of_an_unknown_codec_is_said_to_be_left_out(make_clip: Clip, tmp_path: Path):
    source, output = make_clip(tracks=2), tmp_path / "out.mp4"
    data = source.read_bytes()
    at = data.rindex(b"mp4a")
    data = data[:at] + data[at:].replace(b"mp4a", b"apac").replace(b"esds", b"free")  # as telephones write beside AAC
    source.write_bytes(data)
    notes = copy_video(source, output, tracks=source).notes
    assert notes == ("sound tracks of clip.mp4 in a codec unknown here are left out: 1",)
    assert_same_sound(source, output)
    other = make_clip("other.mp4")
    assert copy_video(other, tmp_path / "dubbed.mp4", audio=source, tracks=other).notes == notes
    source.write_bytes(data.replace(b"mp4a", b"apac").replace(b"esds", b"free"))
    portrait, driving, said = VideoInfo(tmp_path / "s.png", 64, 48, Fraction(25), 1, is_image=True), probe(source), []
    drivers = [Driver(driving, [Fraction(0)], MotionTrack([0.0], [[0.0]]))]
    assert sound_of(portrait, drivers, "auto", said.append) is None  # a portrait has the sound of its driving
    assert said == ["sound tracks of clip.mp4 in a codec unknown here are left out: 2"]


def test_covers_and_data_are_said_to_be_left_out(rich, tmp_path: Path):
    write_image(tmp_path / "cover.png", np.zeros((48, 64, 3), np.uint8))
    source, maps = tmp_path / "cover.mp4", ["-map", "0:v", "-map", 1, "-disposition:v:1", "attached_pic"]
    run_ffmpeg("-i", rich(), "-i", tmp_path / "cover.png", *maps, "-c", "copy", source)
    notes = copy_video(source, tmp_path / "out.mp4", tracks=source).notes
    assert notes == ("the cover of cover.mp4 is left out",)
    source = rich("rich.mov")
    assert copy_video(source, tmp_path / "kept.mp4", tracks=source).notes == ()  # its chapters and its timecode
    source.write_bytes(source.read_bytes().replace(b"tmcd", b"mebx"))  # the timecode's track becomes one of a sensor
    notes = copy_video(source, tmp_path / "data.mp4", tracks=source).notes
    assert notes == ("the data tracks of rich.mov, as of sensors, are left out: 1",)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space of your quota"),
        (errno.EFBIG, "allow larger files"), (errno.EIO, "check that disk"), (errno.EROFS, "write to another disk"),
    ],
)  # fmt: skip
def test_a_full_disk_is_not_the_fault_of_the_sound(
    make_clip: Clip, rich, tmp_path: Path, monkeypatch, number: int, remedy: str
):
    plain, subtitled = make_clip(seconds=0.5), rich()

    def full(*_) -> None:
        raise av.FFmpegError(number, os.strerror(number))

    stand_in = SimpleNamespace(**{**vars(av), "open": full})
    monkeypatch.setattr(tracks, "av", stand_in)
    for source, options in ((plain, {}), (subtitled, {"audio": None, "tracks": subtitled})):
        with pytest.raises(OutputError, match=f"{os.strerror(number)}; {remedy}"):
            copy_video(source, tmp_path / "out.mp4", start=0.1, **options)


def test_fonts_are_kept_with_the_subtitles_that_want_them(rich, tmp_path: Path):
    (tmp_path / "font.ttf").write_bytes(b"letters")
    source, font = tmp_path / "fonts.mkv", ["-attach", tmp_path / "font.ttf", "-metadata:s:t", "mimetype=font/ttf"]
    run_ffmpeg("-i", rich("rich.mkv", text="ass"), "-map", "0", "-c", "copy", *font, source)
    output = copied(source, tmp_path / "out.mkv")
    with av.open(str(output)) as container:
        assert [one.name for one in container.streams.attachments] == ["font.ttf"]
        assert container.streams.subtitles[0].codec_context.codec.canonical_name == "ass"


def test_a_language_keeps_its_name_in_mov(rich, tmp_path: Path):
    source = tmp_path / "german.mp4"
    run_ffmpeg("-i", rich(), "-map", "0:v", "-map", "0:a", "-c", "copy", "-metadata:s:a:0", "language=deu", source)
    assert [language for _, language, _ in described(copied(source, tmp_path / "out.mov"))] == ["fra", "ger", "eng"]


def test_nothing_is_carried_unasked(rich, tmp_path: Path):
    source = rich()
    copy_video(source, tmp_path / "out.mp4", audio=None)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"] and not container.chapters()


@pytest.mark.parametrize(
    ("code", "frames", "fps", "later"),
    [
        ("01:00:59;29", 1, "30000/1001", "01:01:00;02"),
        ("01:09:59;29", 1, "30000/1001", "01:10:00;00"),
        ("00:00:00;00", 107892, "30000/1001", "01:00:00;00"),
        ("00:00:59;59", 1, "60000/1001", "00:01:00;04"),
        ("00:00:59:23", 1, "24000/1001", "00:01:00:00"),
        ("23:59:59:24", 1, "25", "00:00:00:00"),
        ("nonsense", 5, "25", "nonsense"),
    ],
)
def test_a_timecode_counts_on(code: str, frames: int, fps: str, later: str):
    assert moved_timecode(code, frames, Fraction(fps)) == later


@pytest.mark.parametrize("fps", ["24000/1001", "25", "30000/1001", "50", "60000/1001"])
def test_five_rates_with_two_sound_tracks_keep_every_time_and_packet(make_clip: Clip, tmp_path: Path, fps: str):
    source = make_clip(fps=fps, tracks=2, size=(160, 120))
    output = copied(source, tmp_path / "out.mp4")
    assert probe(output).fps == Fraction(fps)
    assert_same_timing(source, output)
    for track in (0, 1):
        assert_same_sound(source, output, track)
