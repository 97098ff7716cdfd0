"""Video in, video out: times, sound, colours, sizes, and nothing left behind when it goes wrong."""

import gc
import os
import stat
import struct
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from conftest import largest_file, run_ffmpeg

from dpe_cli.encoding import Mastering, Wish, plan_encoding
from dpe_cli.errors import InputError, OutputError
from dpe_cli.muxer import encode_command, ffmpeg_exe
from dpe_cli.planes import Layout
from dpe_cli.tracks import Carried, Track, audio_codecs
from dpe_cli.video import Colour, Frame, VideoInfo, probe, read_frames, read_image, seconds_of
from dpe_cli.writer import WriteResult, write_image, write_video

Clip = Callable[..., Path]
Packet = tuple[Fraction, bytes]  # seconds, content
VIDEOS = ["v00.mpg", "v01.mp4", "v02.mp4", "v03.mp4", "v04.mp4", "v05.mp4"]


def true_times(path: Path) -> list[Fraction]:
    """Presentation times of the video as PyAV gives them, without any help of ours."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.pts * stream.time_base for frame in container.decode(stream)]


def packets(path: Path, track: int = 0) -> list[Packet]:
    """Times and contents of the packets of a sound track."""
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(audio=track) if packet.size]
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in found]


def copy_video(source: Path, output: Path, **options) -> WriteResult:
    """Every frame of the source through reader and writer, with its sound, as fast as can be."""
    frames = read_frames(source, options.get("start"), options.get("end"))
    options = {"audio": source, "preset": "ultrafast", **options}
    return write_video(frames, probe(source), output, **options)


def still_frames(count: int = 3, size: tuple[int, int] = (64, 48)) -> Iterator[Frame]:
    """Grey frames at 25 a second, `size` is (width, height)."""
    for index in range(count):
        yield Frame(index, Fraction(index, 25), np.full((size[1], size[0], 3), 60 + index % 100, np.uint8))


def still_info(path: Path) -> VideoInfo:
    return VideoInfo(path, 64, 48, Fraction(25), 3)


def assert_same_timing(source: Path, output: Path, tolerance: Fraction = Fraction(0)) -> None:
    times, expected = true_times(output), true_times(source)
    assert len(times) == len(expected)
    assert max(abs(one - other) for one, other in zip(times, expected, strict=True)) <= tolerance


def assert_same_sound(source: Path, output: Path, track: int = 0, tolerance: float = 1e-9) -> None:
    ours, theirs = packets(output, track), packets(source, track)
    assert [content for _, content in ours] == [content for _, content in theirs]
    assert max(abs(float(one - other)) for (one, _), (other, _) in zip(ours, theirs, strict=True)) <= tolerance


# Times


@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("fps", ["30000/1001", 25, "24000/1001", 12])
def test_constant_rate_keeps_every_time_and_packet(make_clip: Clip, tmp_path: Path, fps: str | int, container: str):
    source = make_clip(fps=fps)
    result = copy_video(source, tmp_path / f"out.{container}")
    assert result.frames == len(true_times(source)) and result.notes == ()
    assert probe(source).fps == Fraction(fps) == probe(result.path).fps
    assert_same_timing(source, result.path)
    assert_same_sound(source, result.path)


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv", "vfr.mov"])
def test_variable_rate_keeps_every_time(make_clip: Clip, tmp_path: Path, name: str):
    source = make_clip(name, seconds=2, vfr=True)
    steps = {round(float(later - earlier), 2) for earlier, later in pairwise(true_times(source))}
    assert len(steps) >= 3
    copy_video(source, tmp_path / "out.mp4")
    assert_same_timing(source, tmp_path / "out.mp4")
    assert_same_sound(source, tmp_path / "out.mp4", tolerance=0.001 if name.endswith("mkv") else 1e-9)


@pytest.mark.parametrize("name", ["late.mp4", "late.mov", "late.mkv"])
def test_a_start_that_is_not_zero_is_kept(make_clip: Clip, tmp_path: Path, name: str):
    source = make_clip(name, start=1.5)
    assert true_times(source)[0] > 1.4
    copy_video(source, tmp_path / "out.mp4")
    assert_same_timing(source, tmp_path / "out.mp4")
    assert_same_sound(source, tmp_path / "out.mp4", tolerance=0.001 if name.endswith("mkv") else 1e-9)


def test_video_that_begins_after_its_sound_stays_so(make_clip: Clip, tmp_path: Path):
    picture, sound = make_clip("picture.mp4", audio=False), make_clip("sound.mp4", seconds=2)
    source = tmp_path / "source.mp4"
    run_ffmpeg("-itsoffset", 0.4, "-i", picture, "-i", sound, "-map", "0:v", "-map", "1:a", "-c", "copy", source)
    assert float(true_times(source)[0]) == pytest.approx(0.4, abs=0.1)
    copy_video(source, tmp_path / "out.mp4")
    assert_same_timing(source, tmp_path / "out.mp4")
    assert_same_sound(source, tmp_path / "out.mp4")


@pytest.mark.parametrize("name", ["stream.ts", "stream.mpg"])
def test_a_stream_with_an_arbitrary_clock_counts_from_its_first_track(make_clip: Clip, tmp_path: Path, name: str):
    codecs = {} if name == "stream.ts" else {"video_codec": "mpeg2video", "audio_codec": "mp2", "fps": 25}
    source = make_clip(name, start=100, **codecs)
    copy_video(source, tmp_path / "out.mp4")
    with av.open(str(source)) as container:
        zero = min(stream.start_time * stream.time_base for stream in container.streams)
    assert zero > 99
    assert true_times(tmp_path / "out.mp4") == [time - zero for time in true_times(source)]
    ours, theirs = packets(tmp_path / "out.mp4"), packets(source)
    assert len(ours) == len(theirs)
    for (time, content), (expected, original) in zip(ours, theirs, strict=True):
        assert abs(float(time - expected + zero)) < 1 / 44100
        assert original.endswith(content)  # a transport stream has a head of its own before each AAC packet


def test_matroska_keeps_times_to_half_a_millisecond(make_clip: Clip, tmp_path: Path):
    source = make_clip()
    copy_video(source, tmp_path / "out.mkv")
    assert_same_timing(source, tmp_path / "out.mkv", tolerance=Fraction(1, 2000))
    assert_same_sound(source, tmp_path / "out.mkv", tolerance=0.0005)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_without_times_is_reckoned_from_the_order(make_clip: Clip, codec: str):
    source = make_clip("old.avi", fps=25, video_codec=codec, audio_codec="mp2", more=("-bf", "2"))
    frames = list(read_frames(source))
    assert [frame.time for frame in frames] == [Fraction(index, 25) for index in range(25)]
    sought = list(read_frames(source, start=0.4))
    assert len(sought) == 15 and np.array_equal(sought[0].rgb, frames[10].rgb)


def test_raw_dv_has_the_rate_of_its_pictures(tmp_path: Path):
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=720x576:r=25:d=0.2", "-pix_fmt", "yuv420p", tmp_path / "s.dv")
    assert probe(tmp_path / "s.dv").fps == 25
    copy_video(tmp_path / "s.dv", tmp_path / "out.mp4", audio=None)
    assert probe(tmp_path / "out.mp4").duration == pytest.approx(0.2)


def test_times_that_repeat_are_moved_on(make_clip: Clip, tmp_path: Path):
    clip = make_clip("plain.mkv", fps=25, audio=False, video_codec="mpeg4", more=("-bf", "0"))
    twice = tmp_path / "twice.mkv"
    with av.open(str(clip)) as source, av.open(str(twice), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.pts = packet.dts = 40 * (index // 5 * 5) if index % 5 == 1 else packet.pts  # ms
            packet.stream = stream
            target.mux(packet)
    assert len(set(true_times(twice))) == 20
    times = [frame.time for frame in read_frames(twice)]
    assert len(times) == 25 and all(earlier < later for earlier, later in pairwise(times))
    assert times[:3] == [0, Fraction(1, 1000), Fraction(80, 1000)]
    copy_video(twice, tmp_path / "out.mp4")
    assert true_times(tmp_path / "out.mp4") == times


def test_times_that_jump_back_are_refused(make_clip: Clip, tmp_path: Path):
    part, both = make_clip("part.ts", seconds=2, fps=25), tmp_path / "both.ts"
    both.write_bytes(part.read_bytes() * 2)
    with pytest.raises(InputError, match=r"both.ts jump back by \d.\d s at \d.\d s; remux"):
        list(read_frames(both))
    with pytest.raises(InputError, match=r"both.ts jump back .*; remux"):
        copy_video(both, tmp_path / "out.mp4")  # its sound is looked at first
    run_ffmpeg("-i", both, "-c", "copy", tmp_path / "remuxed.mp4")
    times = [frame.time for frame in read_frames(tmp_path / "remuxed.mp4")]
    assert len(times) == 100 and times[-1] == pytest.approx(99 / 25, abs=0.1)


def test_the_last_frame_lasts_as_long_as_in_the_source(make_clip: Clip, tmp_path: Path):
    source = make_clip(seconds=2, audio=False)
    copy_video(source, tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").duration == pytest.approx(probe(source).duration, abs=0.001)


@pytest.mark.parametrize("start", [0, 0.5])
def test_a_recording_that_does_not_say_its_length_is_measured(make_clip: Clip, tmp_path: Path, start: float):
    command = [ffmpeg_exe(), "-v", "error", "-i", make_clip(fps=25, start=start), "-c", "copy", "-f", "matroska"]
    piped = tmp_path / "piped.mkv"
    piped.write_bytes(subprocess.run([*map(str, command), "pipe:1"], capture_output=True, check=True).stdout)
    assert probe(piped).duration == 0
    assert seconds_of(probe(piped)) == pytest.approx(1)


def test_sound_that_goes_on_does_not_make_the_pictures_longer(make_clip: Clip, tmp_path: Path):
    longer = tmp_path / "longer.mkv"
    run_ffmpeg("-i", make_clip(fps=25), "-i", make_clip("tone.mp4", seconds=3), "-map", "0:v", "-map", "1:a",
               "-c", "copy", longer)  # fmt: skip
    assert seconds_of(probe(longer)) == pytest.approx(1)


# Spans


def test_a_span_begins_at_zero_and_cuts_the_sound(make_clip: Clip, tmp_path: Path):
    source = make_clip(seconds=4, more=("-g", "10"))
    copy_video(source, tmp_path / "out.mp4", start=1.01, end=2.5)
    wanted = [time for time in true_times(source) if 1.01 <= time < 2.5]
    assert true_times(tmp_path / "out.mp4") == [time - wanted[0] for time in wanted]
    inside = [
        (time - wanted[0], content)
        for time, content in packets(source)
        if wanted[0] - Fraction(1024, 44100) < time < 2.5
    ]
    found = packets(tmp_path / "out.mp4")
    assert [content for _, content in found] == [content for _, content in inside]
    assert all(abs(float(one - other)) < 1 / 44100 for (one, _), (other, _) in zip(found, inside, strict=True))


@pytest.mark.parametrize("name", ["span.mkv", "span.ts", "span.mov"])
def test_a_span_of_other_containers_keeps_sound_and_picture_together(make_clip: Clip, tmp_path: Path, name: str):
    source = make_clip(name, seconds=3, start=2 if name != "span.ts" else 50)
    first = next(read_frames(source)).time
    start = float(first) + 1
    frames = list(read_frames(source, start))
    assert frames[0].index == 0 and 0 <= frames[0].time - start < 0.04
    copy_video(source, tmp_path / f"out.{name.split('.')[1].replace('ts', 'mp4')}", start=start)
    (output,) = tmp_path.glob("out.*")
    assert true_times(output)[0] == 0 and len(true_times(output)) == len(frames)
    assert packets(output)[-1][1] == packets(source)[-1][1][-len(packets(output)[-1][1]) :]
    gap = packets(output)[-1][0] - true_times(output)[-1]
    assert float(gap) == pytest.approx(float(packets(source)[-1][0] - true_times(source)[-1]), abs=0.0011)


def test_an_end_alone_moves_nothing(make_clip: Clip, tmp_path: Path):
    source = make_clip(seconds=2, start=0.5)
    copy_video(source, tmp_path / "out.mp4", end=1.5)
    assert true_times(tmp_path / "out.mp4") == [time for time in true_times(source) if time < 1.5]
    assert packets(tmp_path / "out.mp4") == [packet for packet in packets(source) if packet[0] < 1.5]


@pytest.mark.parametrize("start", [0.0, 0.37, 1.0, 1.99])
def test_seeking_finds_the_same_frames_as_reading_on(make_clip: Clip, start: float):
    source = make_clip("open.mp4", seconds=2, more=("-g", "12", "-x264-params", "open-gop=1:bframes=3"))
    everything = [frame for frame in read_frames(source) if frame.time >= start]
    sought = list(read_frames(source, start))
    assert [frame.time for frame in sought] == [frame.time for frame in everything]
    assert all(np.array_equal(one.rgb, other.rgb) for one, other in zip(sought, everything, strict=True))


def test_a_float_of_seconds_means_its_decimals(make_clip: Clip):
    source = make_clip(fps=25)
    assert [next(read_frames(source, index / 25)).time for index in range(1, 20)] == [
        Fraction(i, 25) for i in range(1, 20)
    ]
    assert [len(list(read_frames(source, end=index / 25))) for index in range(1, 20)] == list(range(1, 20))


def test_a_span_without_frames_is_said(make_clip: Clip, tmp_path: Path):
    with pytest.raises(InputError, match="--start"):
        copy_video(make_clip(), tmp_path / "out.mp4", start=50)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".dpe*"))


# Sound


def test_all_sound_tracks_are_kept(make_clip: Clip, tmp_path: Path):
    source = make_clip(tracks=3)
    copy_video(source, tmp_path / "out.mp4")
    for track in range(3):
        assert_same_sound(source, tmp_path / "out.mp4", track)
    assert len({packets(source, track)[5][1] for track in range(3)}) == 3


def test_a_clip_without_sound_stays_silent(make_clip: Clip, tmp_path: Path):
    source = make_clip(audio=False)
    assert not probe(source).has_audio and audio_codecs(source) == ()
    copy_video(source, tmp_path / "out.mp4")
    assert not probe(tmp_path / "out.mp4").has_audio
    assert_same_timing(source, tmp_path / "out.mp4")


def test_sound_is_left_out_on_request(make_clip: Clip, tmp_path: Path):
    copy_video(make_clip(), tmp_path / "out.mp4", audio=None)
    assert audio_codecs(tmp_path / "out.mp4") == ()


def test_sound_longer_than_the_picture_is_not_cut(make_clip: Clip, tmp_path: Path):
    picture, sound = make_clip("picture.mp4", seconds=0.5), make_clip("sound.mp4", seconds=3)
    copy_video(picture, tmp_path / "out.mp4", audio=sound)
    assert_same_sound(sound, tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("aac", "a.m4a"),
        ("aac", "a.aac"),
        ("libmp3lame", "a.mp3"),
        ("libopus", "a.ogg"),
        ("flac", "a.flac"),
        ("alac", "a.m4a"),
    ],
)
@pytest.mark.parametrize("start", [None, 0.5])
def test_compressed_sound_of_another_file_is_copied(
    make_clip: Clip, tmp_path: Path, codec: str, name: str, start: float | None
):
    sound = tmp_path / name
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=2:sample_rate=48000", "-c:a", codec, sound)
    source = make_clip(seconds=1.5)
    result = copy_video(source, tmp_path / "out.mp4", audio=sound, start=start)
    assert result.notes == ()
    ours, theirs = packets(tmp_path / "out.mp4"), packets(sound)
    assert [content for _, content in ours] == [
        content[-len(ours[index][1]) :] for index, (_, content) in enumerate(theirs)
    ]
    assert float(ours[-1][0]) == pytest.approx(float(theirs[-1][0]), abs=0.001)  # it begins with the output


def test_sound_that_does_not_fit_is_encoded_and_said(make_clip: Clip, tmp_path: Path):
    sound = tmp_path / "voice.wav"
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=1", sound)
    source = make_clip()
    result = copy_video(source, tmp_path / "out.mp4", audio=sound)
    assert audio_codecs(tmp_path / "out.mp4") == ("aac",) and "voice.wav" in result.notes[0]
    assert_same_timing(source, tmp_path / "out.mp4")
    assert copy_video(source, tmp_path / "out.mkv", audio=sound).notes == ()
    assert b"".join(content for _, content in packets(tmp_path / "out.mkv")) == b"".join(
        content for _, content in packets(sound)
    )


def test_sound_of_another_file_is_cut_to_the_length_of_the_span(make_clip: Clip, tmp_path: Path):
    source, sound = make_clip(seconds=3), make_clip("sound.mp4", seconds=3)
    copy_video(source, tmp_path / "out.mp4", audio=sound, start=1, end=2)
    found = packets(tmp_path / "out.mp4")
    length = Fraction(2) - next(read_frames(source, 1)).time
    wanted = [content for time, content in packets(sound) if time < length]
    assert [content for _, content in found] == wanted


def test_a_file_without_sound_is_no_sound(make_clip: Clip, tmp_path: Path):
    source, silent = make_clip(), make_clip("silent.mp4", audio=False)
    with pytest.raises(InputError, match=r"silent\.mp4"):
        copy_video(source, tmp_path / "out.mp4", audio=silent)
    with pytest.raises(InputError, match=r"nothing\.wav"):
        copy_video(source, tmp_path / "out.mp4", audio=tmp_path / "nothing.wav")


# Sizes, rotation, colours


@pytest.mark.parametrize(
    ("size", "pixels"), [((321, 241), "yuv444p"), ((320, 241), "yuv444p"), ((322, 242), "yuv420p")]
)
def test_the_size_is_kept(make_clip: Clip, tmp_path: Path, size: tuple[int, int], pixels: str):
    source = make_clip(size=size, pix_fmt="yuv444p")
    result = copy_video(source, tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height) == size and info.pix_fmt == pixels
    assert bool(result.notes) == (pixels == "yuv444p")
    assert_same_timing(source, tmp_path / "out.mp4")


@pytest.mark.parametrize(("rotation", "clockwise"), [(90, 270), (180, 180), (270, 90)])
def test_rotation_is_applied_and_not_carried_on(make_clip: Clip, tmp_path: Path, rotation: int, clockwise: int):
    source = make_clip(rotation=rotation, size=(64, 48))
    info, frame = probe(source), next(read_frames(source))
    assert info.rotation == clockwise
    assert (
        (info.width, info.height)
        == (frame.rgb.shape[1], frame.rgb.shape[0])
        == ((64, 48) if rotation == 180 else (48, 64))
    )
    flat = next(read_frames(tmp_path / "clip_upright.mp4")).rgb
    assert np.array_equal(frame.rgb, np.rot90(flat, rotation // 90))
    copy_video(source, tmp_path / "out.mp4")
    output = probe(tmp_path / "out.mp4")
    assert output.rotation == 0 and (output.width, output.height) == (info.width, info.height)


def test_a_mirrored_picture_is_shown_as_players_show_it(make_clip: Clip, tmp_path: Path):
    flat, mirrored = make_clip(), tmp_path / "mirrored.mp4"
    run_ffmpeg("-display_hflip", "-i", flat, "-c", "copy", mirrored)
    assert np.array_equal(next(read_frames(mirrored)).rgb, next(read_frames(flat)).rgb[:, ::-1])


def test_pixels_that_are_not_square_stay_so(make_clip: Clip, tmp_path: Path):
    source = make_clip(more=("-aspect", "16:9"))
    assert probe(source).sample_aspect_ratio == Fraction(4, 3)
    copy_video(source, tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.parametrize("colour", [(200, 40, 90), (20, 180, 230), (128, 128, 128), (240, 240, 20)])
@pytest.mark.parametrize(
    ("matrix", "levels"), [("bt709", "tv"), ("smpte170m", "tv"), ("bt709", "pc"), ("smpte170m", "pc"), (None, "tv")]
)
def test_colours_and_their_tags_survive(
    make_clip: Clip, tmp_path: Path, colour: tuple, matrix: str | None, levels: str
):
    source = make_clip(seconds=0.2, audio=False, colour=colour, matrix=matrix, levels=levels)
    read = next(read_frames(source)).rgb
    assert np.abs(read.astype(int) - colour).max() <= 3
    copy_video(source, tmp_path / "out.mp4")
    assert np.abs(next(read_frames(tmp_path / "out.mp4")).rgb.astype(int) - read).max() <= 3
    assert probe(tmp_path / "out.mp4").colour == probe(source).colour
    if matrix:
        number = {"bt709": 1, "smpte170m": 6}[matrix]
        assert probe(source).colour == Colour({"tv": 1, "pc": 2}[levels], number, number, number)


def test_a_picture_without_yuv_is_read_exactly(make_clip: Clip, tmp_path: Path):
    source = make_clip("rgb.mkv", seconds=0.2, video_codec="ffv1", pix_fmt="gbrp", colour=(200, 40, 90))
    assert (next(read_frames(source)).rgb == (200, 40, 90)).all()
    copy_video(source, tmp_path / "out.mp4")
    assert np.abs(next(read_frames(tmp_path / "out.mp4")).rgb.astype(int) - (200, 40, 90)).max() <= 3


def test_a_crop_without_tags_is_read_with_its_own_colours(tmp_path: Path):
    """Players guess the matrix from the size, and a crop is small."""
    colour = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    info = VideoInfo(tmp_path, 1920, 1080, Fraction(25), 1)
    write_video([Frame(0, Fraction(0), colour)], info, tmp_path / "out.mp4")
    assert np.abs(next(read_frames(tmp_path / "out.mp4")).rgb.astype(int) - colour).max() <= 3


def test_ten_bits_are_read_as_eight(make_clip: Clip):
    frame = next(read_frames(make_clip(pix_fmt="yuv420p10le", colour=(200, 40, 90))))
    assert frame.rgb.dtype == np.uint8 and np.abs(frame.rgb.astype(int) - (200, 40, 90)).max() <= 3


# Pictures


@pytest.mark.parametrize("name", ["face.png", "face.jpg", "käse 50%.png"])
def test_a_still_is_a_clip_of_one_frame(tmp_path: Path, name: str):
    path = tmp_path / name
    rgb = np.zeros((41, 61, 3), np.uint8)
    rgb[:, :30], rgb[:, 30:] = (200, 40, 90), (20, 180, 30)
    write_image(path, rgb)
    info, frames = probe(path), list(read_frames(path))
    assert info.is_image and (info.width, info.height, info.n_frames) == (61, 41, 1) and not info.has_audio
    assert len(frames) == 1 and frames[0].time == 0
    assert np.array_equal(frames[0].rgb, read_image(path))
    middle = frames[0].rgb[20, 10].astype(int)
    assert np.abs(middle - (200, 40, 90)).max() <= (0 if path.suffix == ".png" else 6)
    assert list(tmp_path.iterdir()) == [path]


def tell_lying(png: Path) -> None:
    """Adds the EXIF tag of a picture that wants a quarter turn clockwise."""
    data = png.read_bytes()
    tag = b"eXIfMM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x112, 3, 1, 6, 0, 0)
    chunk = struct.pack(">I", len(tag) - 4) + tag + struct.pack(">I", zlib.crc32(tag))
    png.write_bytes(data[:33] + chunk + data[33:])


def test_numbered_pictures_with_exif_are_read_upright(tmp_path: Path):
    lying = np.random.default_rng(0).integers(0, 255, (41, 61, 3), np.uint8)
    for number in range(3):
        write_image(tmp_path / f"p_{number}.png", lying)
        tell_lying(tmp_path / f"p_{number}.png")
    info, frames = probe(tmp_path / "p_%d.png"), list(read_frames(tmp_path / "p_%d.png", exact=True))
    assert (info.width, info.height) == (41, 61) and len(frames) == 3
    assert all(np.array_equal(frame.rgb, np.rot90(lying, -1)) for frame in frames)


@pytest.mark.parametrize("depth, alpha", [(np.uint8, False), (np.uint8, True), (np.uint16, False), (np.uint16, True)])
def test_a_still_is_turned_upright_whatever_it_holds(tmp_path: Path, depth: type, alpha: bool):
    lying = np.random.default_rng(0).integers(0, np.iinfo(depth).max, (41, 61, 4)).astype(depth)
    write_image(tmp_path / "a.png", lying[..., :3], lying[..., 3] if alpha else None)
    tell_lying(tmp_path / "a.png")
    info, (frame,) = probe(tmp_path / "a.png"), read_frames(tmp_path / "a.png", exact=True)
    upright = np.rot90(lying, -1)
    assert (info.width, info.height) == (41, 61) and np.array_equal(frame.rgb, upright[..., :3])
    assert not alpha or np.array_equal(frame.original.planes[-1], upright[..., 3])


def test_floating_point_pictures_are_refused(tmp_path: Path):
    for channels in (3, 4):
        cv2.imwrite(str(tmp_path / "f.tiff"), np.ones((8, 8, channels), np.float32))
        with pytest.raises(InputError, match="floating-point"):
            probe(tmp_path / "f.tiff")


def test_a_picture_is_written_only_where_it_fits(tmp_path: Path):
    rgb = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(OutputError, match=r"\.png"):
        write_image(tmp_path / "face.mp4", rgb)
    with pytest.raises(OutputError, match="does not exist"):
        write_image(tmp_path / "nowhere" / "face.png", rgb)


# What is wrong with an input


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov", "cut.mkv", "cut.avi", "head.mp4"])
def test_a_file_that_is_cut_short_is_named(make_clip: Clip, tmp_path: Path, name: str):
    codecs = {"video_codec": "mpeg4", "audio_codec": "mp2"} if name.endswith("avi") else {}
    front = ("-movflags", "+faststart") if name == "head.mp4" else ()
    path = make_clip(name, more=front, **codecs)
    assert probe(path).width == 320
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(InputError) as caught:
        list(read_frames(path))
    assert str(path) in str(caught.value) and ";" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_video_is_named(make_clip: Clip, tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 20)
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.wav")
    (tmp_path / "folder").mkdir()
    for name in ("empty.mp4", "text.mp4", "half.png", "sound.wav", "folder", "missing.mp4"):
        with pytest.raises(InputError, match=name) as caught:
            probe(tmp_path / name)
        assert caught.value.exit_code == 3 and ";" in str(caught.value)
    for name in ("text.mp4", "missing.png"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)


@pytest.mark.skipif(os.name == "nt", reason="such names are not allowed there")
def test_a_name_that_looks_like_an_address_is_a_file(make_clip: Clip, tmp_path: Path):
    source = make_clip("a:b %03d.mp4")
    copy_video(source, tmp_path / "c:d %d.mp4")
    assert_same_timing(source, tmp_path / "c:d %d.mp4")


# What is wrong with an output


def test_an_output_that_exists_is_not_touched(make_clip: Clip, tmp_path: Path):
    source, output = make_clip(), tmp_path / "out.mp4"
    output.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        copy_video(source, output)
    assert output.read_text() == "mine"
    copy_video(source, output, overwrite=True)
    assert_same_timing(source, output)


@pytest.mark.parametrize(
    ("name", "said"), [("out.webm", r"\.mkv"), ("out", r"\.mp4"), ("nowhere/out.mp4", "does not exist")]
)
def test_an_output_that_cannot_be_is_refused_before_any_frame(tmp_path: Path, name: str, said: str):
    def frames() -> Iterator[Frame]:
        yield from still_frames(1)
        pytest.fail("a second frame was asked for")

    with pytest.raises(OutputError, match=said):
        write_video(frames(), still_info(tmp_path), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, GeneratorExit, BrokenPipeError])
@pytest.mark.parametrize("after", [0, 1, 40])
def test_a_failure_in_the_frames_leaves_nothing_behind(tmp_path: Path, failure: type[BaseException], after: int):
    def frames() -> Iterator[Frame]:
        yield from still_frames(after)
        raise failure

    with pytest.raises(failure):
        write_video(frames(), still_info(tmp_path), tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


def test_frames_that_change_their_size_are_refused(tmp_path: Path):
    frames = [*still_frames(1), Frame(1, Fraction(1, 25), np.zeros((50, 64, 3), np.uint8))]
    with pytest.raises(ValueError, match="frame 1"):
        write_video(frames, still_info(tmp_path), tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


def test_what_ffmpeg_says_is_passed_on(tmp_path: Path):
    with pytest.raises(OutputError, match="nonsense"):
        write_video(still_frames(), still_info(tmp_path), tmp_path / "out.mp4", preset="nonsense")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for ffmpeg")
@pytest.mark.parametrize("reads", ["head -c 100000 >/dev/null", "cat >/dev/null", ":"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str):
    program, folder = tmp_path / "ffmpeg", tmp_path / "out"
    program.write_text(f"#!/bin/sh\n{reads}\necho 'av_write_frame(): No space left on device' >&2\nexit 228\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    folder.mkdir()
    monkeypatch.setenv("DPE_FFMPEG", str(program))
    with pytest.raises(OutputError, match="No space left on device; free some space") as caught:
        write_video(still_frames(200), still_info(tmp_path), folder / "out.mp4")
    assert caught.value.exit_code == 7 and not list(folder.iterdir())


def test_a_limit_of_a_files_size_is_told(tmp_path: Path):
    """ffmpeg is ended by a signal, and says nothing."""
    with largest_file(4096), pytest.raises(OutputError, match="out.mkv: File too large; allow larger files"):
        write_video(still_frames(200), still_info(tmp_path), tmp_path / "out.mkv", codec="ffv1")
    assert not list(tmp_path.iterdir())


def test_a_missing_ffmpeg_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPE_FFMPEG", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="DPE_FFMPEG"):
        write_video(still_frames(), still_info(tmp_path), tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="sends a signal as a terminal does")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path):
    code = f"""
import signal, os
from fractions import Fraction
from pathlib import Path
import numpy as np
from dpe_cli.video import Frame, VideoInfo
from dpe_cli.writer import write_video
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
def frames():
    for index in range(1000):
        if index == 60:
            os.killpg(0, signal.SIGINT)  # to all of the group, ffmpeg too
        yield Frame(index, Fraction(index, 25), np.zeros((240, 320, 3), np.uint8))
folder = Path({str(tmp_path)!r})
write_video(frames(), VideoInfo(folder, 320, 240, Fraction(25), 3), folder / "out.mp4")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, check=False
    )
    assert "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


# How it is done


def test_the_command_is_a_list_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPE_FFMPEG", "/opt/ffmpeg")
    info = replace(still_info(tmp_path), time_base=Fraction(1, 30000), colour=Colour(1, 1, 1, 1))
    sound = [Track(tmp_path / "a.mp4", "a", 0, tags={"language": "deu"}), Track(tmp_path / "a.mp4", "a", 1, "aac")]
    encoding = plan_encoding("h264", Layout("gbr"), (64, 48), ".mp4", Wish(), ffmpeg_exe(), Mastering())
    command = encode_command(info, Layout("gbr"), (64, 48), tmp_path / "out.mp4", ".mp4", encoding, sound, Carried())
    said = " ".join(command)
    assert command[0] == ffmpeg_exe() == "/opt/ffmpeg"
    assert "-copyts" in command and "-fps_mode passthrough" in said and "-enc_time_base:v 1:30000" in said
    assert "-c:a:0 copy" in said and "-c:a:1 aac" in said and "-crf 17" in said and "+faststart" in said
    assert "-shortest" not in command and "out_color_matrix=bt709" in said and "yuv420p" in said
    assert "-metadata:s:a:0 language=deu" in said and command.index("language=deu") < command.index("-y")


def test_no_frame_is_kept(make_clip: Clip, tmp_path: Path):
    source, alive, most = make_clip(seconds=3), weakref.WeakSet(), 0

    def watched() -> Iterator[Frame]:
        nonlocal most
        for frame in read_frames(source):
            gc.collect(0)
            most = max(most, len(alive))
            pixels = frame.rgb.view(Pixels)
            alive.add(pixels)
            yield replace(frame, rgb=pixels)

    assert write_video(watched(), probe(source), tmp_path / "out.mp4", preset="ultrafast").frames == 90
    assert most <= 3


def test_reading_takes_no_memory(make_clip: Clip):
    """PyAV can hold frames that Python does not see, so the whole process is measured, in one of its own."""
    source = make_clip(seconds=16, fps=25, audio=False)
    code = f"""
from pathlib import Path
from dpe_cli.video import read_frames
def pages():
    return int(open("/proc/self/statm").read().split()[1])
for frame in read_frames(Path({str(source)!r})):
    if frame.index == 50:
        early = pages()
print((pages() - early) * 4096 // frame.rgb.nbytes)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells it so")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30  # pictures, of 350


class Pixels(np.ndarray):
    """An array that can be counted while it lives."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


# Real footage


@pytest.mark.parametrize("name", VIDEOS)
def test_real_footage_keeps_times_and_sound(shared: Callable[[str], Path], tmp_path: Path, name: str):
    source = shared(f"videos/{name}")
    result = copy_video(source, tmp_path / "out.mp4", crf=40)
    assert result.notes == () and result.frames == probe(source).n_frames
    assert_same_timing(source, tmp_path / "out.mp4")
    assert_same_sound(source, tmp_path / "out.mp4", tolerance=0.5 / 44100 if name.endswith("mpg") else 0)
    assert (probe(tmp_path / "out.mp4").width, probe(tmp_path / "out.mp4").height) == (
        probe(source).width,
        probe(source).height,
    )
