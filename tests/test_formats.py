"""Codecs, depth, HDR, alpha, image sequences, pipes: what an output holds, and what is refused in one line."""

import contextlib
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import run_ffmpeg
from test_edit import DETECTOR, ENGINE, clip, picture
from test_speech import babble, write_wave
from test_video import assert_same_sound, assert_same_timing, packets, true_times

from dpe_cli import writer
from dpe_cli.commands import options
from dpe_cli.container import files_of, frame_rate, is_sequence, spooled
from dpe_cli.dub import DubSettings, check_dub
from dpe_cli.edit import edit_video
from dpe_cli.encoding import NVENC_PRESETS, PRESETS, nvenc_works
from dpe_cli.errors import InputError, OutputError
from dpe_cli.face import Box, Detection
from dpe_cli.request import Driving, EditSettings, check_request
from dpe_cli.video import Colour, probe, read_frames, read_image
from dpe_cli.writer import write_image, write_video

Clip = Callable[..., Path]
HDR10 = "hdr10=1:master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1):max-cll=1000,400"


def exact(source: Path, output: Path, fps: Fraction | None = None, **options) -> list[str]:
    """A copy by planes; gives what was said."""
    frames, info = read_frames(source, exact=True, fps=fps), probe(source, fps)
    return list(write_video(frames, info, output, audio=source if info.has_audio else None, **options).notes)


def tiny(make_clip: Clip, pix_fmt: str = "yuv420p", name: str = "source.mkv", **options) -> Path:
    options = {"size": (64, 48), "seconds": 0.2, "audio": False, "video_codec": "ffv1", **options}
    return make_clip(name, pix_fmt=pix_fmt, **options)


# Codecs


@pytest.mark.parametrize(
    ("pix_fmt", "name", "codec", "held"),
    [
        ("yuv420p", "o.mp4", None, ("h264", "yuv420p")),
        ("yuv420p", "o.mov", "hevc", ("hevc", "yuv420p")),
        ("yuv420p10le", "o.mp4", None, ("hevc", "yuv420p10le")),
        ("yuv420p10le", "o.mkv", "h264", ("h264", "yuv420p10le")),
        ("yuv422p10le", "o.mov", "prores", ("prores", "yuv422p10le")),
        ("yuv420p", "o.mov", "prores", ("prores", "yuv422p10le")),
        ("yuv444p10le", "o.mov", "prores", ("prores", "yuv444p12le")),
        ("yuv444p12le", "o.mkv", "hevc", ("hevc", "yuv444p12le")),
        ("yuv422p", "o.mp4", None, ("h264", "yuv422p")),
        ("yuv411p", "o.mp4", None, ("h264", "yuv422p")),
        ("gbrp10le", "o.mp4", None, ("hevc", "yuv420p10le")),
        ("yuv420p10le", "o.mov", "png", ("png", "rgb48be")),
        ("yuv420p", "o.mkv", None, ("ffv1", "yuv420p")),  # the source's codec
    ],
)
def test_each_codec_keeps_what_it_can(make_clip: Clip, tmp_path: Path, pix_fmt: str, name: str, codec, held):
    source = tiny(make_clip, pix_fmt, matrix="bt709")
    quality = {"crf": 1, "preset": "ultrafast"} if held[0] in ("h264", "hevc") else {}
    exact(source, tmp_path / name, codec=codec, nvenc=False if quality else None, **quality)
    info = probe(tmp_path / name)
    assert (info.codec, info.pix_fmt) == held
    before = probe(source).colour
    assert info.colour in (before, replace(before, range=1)) or held[0] == "png"
    for before, after in zip(read_frames(source), read_frames(tmp_path / name), strict=True):
        difference = np.abs(before.rgb.astype(int) - after.rgb).mean()
        same = held[1] in (pix_fmt, "rgb48be") and held[0] != "prores"  # else chroma was resampled
        assert difference < (0.6 if same else 3 if held[0] == "prores" else 16)


def test_hevc_says_nothing_of_the_machine(make_clip: Clip, tmp_path: Path):
    """Of its processor and threads, as segments are joined by whose headers are equal."""
    exact(tiny(make_clip, "yuv420p"), tmp_path / "o.mp4", codec="hevc", nvenc=False, preset="ultrafast")
    assert b"cpuid" not in (tmp_path / "o.mp4").read_bytes()


@pytest.mark.parametrize("size", [(321, 241), (90, 160), (64, 46), (3840, 2160)])
@pytest.mark.parametrize("name", ["o.mp4", "o.mov"])
def test_every_size_is_written(make_clip: Clip, tmp_path: Path, size: tuple[int, int], name: str):
    frames = 1 if size[0] > 1000 else 4
    source = tiny(make_clip, size=size, seconds=frames / 25, fps=25)
    codec = {"codec": "prores"} if name == "o.mov" else {"preset": "ultrafast"}
    notes = exact(source, tmp_path / name, **codec)
    info = probe(tmp_path / name)
    assert (info.width, info.height) == size and len(true_times(tmp_path / name)) == frames
    assert any("odd" in note for note in notes) == (size[0] % 2 == 1 and name == "o.mp4")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("o.mp4", {"codec": "prores"}, r"cannot hold prores; name one that ends in \.mov or \.mkv"),
        ("o.mov", {"codec": "ffv1"}, r"\.mkv"),
        ("o_%04d.png", {"codec": "h264"}, r"\.mp4"),
        ("-", {"codec": "h264"}, "a pipe holds raw"),
        ("o_%04d.exr", {}, r"out_%06d\.png"),
        ("o.webm", {}, r"\.mkv"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(
    make_clip: Clip, tmp_path: Path, name: str, options: dict, said: str
):
    source = tiny(make_clip)
    output = Path(name) if name == "-" else tmp_path / name
    with pytest.raises(OutputError, match=said) as caught:
        check_request(source, Driving(expression=source), output, EditSettings(**options))
    assert caught.value.exit_code == 7
    with pytest.raises(OutputError, match=said):
        exact(source, output, **options)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for ffmpeg")
def test_nvenc_is_used_where_it_works(make_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program that stands in for an ffmpeg with a graphics card: it keeps the command and encodes by x264."""
    program, real = tmp_path / "ffmpeg", subprocess.list2cmdline([os.environ.get("DPE_FFMPEG") or ffmpeg()])
    swap = "s/h264_nvenc/libx264/; s/^p[0-9]$/ultrafast/"
    script = (
        f'#!/bin/sh\necho "$@" >> {tmp_path}/said\nfor a do shift; set -- "$@" "$(echo "$a" | sed "{swap}")"; done\n'
    )
    program.write_text(f'{script}exec {real} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    source = tiny(make_clip)
    assert not nvenc_works(ffmpeg(), "nonsense_nvenc", "yuv420p", (64, 48))
    monkeypatch.setenv("DPE_FFMPEG", str(program))
    notes = exact(source, tmp_path / "o.mp4", crf=21, preset="slow")
    said = (tmp_path / "said").read_text()
    assert "encoded by h264_nvenc" in notes[0] and "-cq 21" in said and "-preset p7" in said and "-rc vbr" in said
    assert "hevc_nvenc" not in said and "-crf" not in said
    exact(source, tmp_path / "o2.mp4", nvenc=False)
    assert "-crf 17" in (tmp_path / "said").read_text()
    assert_same_timing(source, tmp_path / "o.mp4", Fraction(1, 2000))


def test_presets_of_nvenc_are_for_it_alone(make_clip: Clip, tmp_path: Path):
    assert options.PRESETS == PRESETS + NVENC_PRESETS
    with pytest.raises(OutputError, match="p4 is a preset of NVENC"):
        exact(tiny(make_clip), tmp_path / "o.mp4", preset="p4", nvenc=False)
    exact(tiny(make_clip), tmp_path / "o.mp4", preset="placebo", nvenc=False)


def test_nvenc_that_is_not_there_is_said(make_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpe_cli.encoding.nvenc_works", lambda *_: False)
    with pytest.raises(OutputError, match="leave --nvenc out"):
        exact(tiny(make_clip), tmp_path / "o.mp4", nvenc=True)


def ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


# HDR and alpha


@pytest.fixture
def hdr(tmp_path: Path) -> Path:
    """PQ with static metadata, ten bits."""
    path = tmp_path / "hdr.mp4"
    tags = "setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084"
    run_ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:d=0.2", "-vf", f"format=yuv420p10le,{tags}", "-c:v", "libx265",
               "-preset", "ultrafast", "-x265-params", f"log-level=error:{HDR10}", path)  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("name", "codec"), [("o.mp4", None), ("o.mkv", None), ("o.mov", "prores"), ("o.mkv", "ffv1"), ("o.mkv", "h264")]
)
def test_hdr_survives(hdr: Path, tmp_path: Path, name: str, codec: str | None):
    notes = exact(hdr, tmp_path / name, codec=codec)
    before, after = probe(hdr), probe(tmp_path / name)
    assert after.colour == before.colour == Colour(1, 9, 16, 9)
    assert before.mastering.display[:2] == (34000, 16000) and before.mastering.light == (1000, 400)
    kept = after.mastering == before.mastering
    assert kept == (codec is None) and any("mastering" in note for note in notes) == (not kept)


def test_interlaced_pictures_are_said_to_become_progressive(tmp_path: Path):
    path = tmp_path / "fields.mkv"
    run_ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:d=0.4", "-vf", "tinterlace=interleave_top", "-c:v", "mpeg2video",
               "-flags", "+ilme+ildct", path)  # fmt: skip
    assert any("interlaced" in note for note in exact(path, tmp_path / "o.mkv"))


def test_captions_inside_the_pictures_are_said_to_be_lost(tmp_path: Path):
    plain, path = tmp_path / "plain.m2v", tmp_path / "captions.m2v"
    run_ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:d=0.2", "-c:v", "mpeg2video", plain)
    first_slice, captions = b"\0\0\1\1", b"\0\0\1\xb2GA94\3\x41\xff\xfc\x94\x20\xff"  # ATSC A/53 part 4
    path.write_bytes(plain.read_bytes().replace(first_slice, captions + first_slice))
    assert not any("captions" in note for note in exact(plain, tmp_path / "plain.mkv"))
    assert any("captions" in note for note in exact(path, tmp_path / "o.mkv"))


@pytest.mark.parametrize("name", ["-", "o_%03d.png"])
def test_hdr_is_refused_where_there_is_no_tag_for_it(hdr: Path, tmp_path: Path, name: str):
    output = Path(name) if name == "-" else tmp_path / name
    with pytest.raises(InputError, match="PQ HDR.*; write an .mp4") as caught:
        exact(hdr, output)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("pix_fmt", "name", "codec", "held"),
    [
        ("yuva444p10le", "o.mov", None, "yuva444p12le"),
        ("yuva420p", "o.mkv", None, "yuva420p"),
        ("bgra", "o_%03d.png", None, "rgba"),
        ("yuva444p10le", "o_%03d.png", None, "rgba64be"),
    ],
)
def test_alpha_survives(make_clip: Clip, tmp_path: Path, pix_fmt: str, name: str, codec: str | None, held: str):
    source = tiny(make_clip, pix_fmt, alpha=True)
    exact(source, tmp_path / name, codec=codec)
    info = probe(tmp_path / name)
    assert info.pix_fmt == held and info.layout.alpha
    before, after = (
        next(read_frames(source, exact=True)).original,
        next(read_frames(tmp_path / name, exact=True)).original,
    )
    shares = [one.planes[-1] / ((1 << one.layout.bits) - 1) for one in (before, after)]
    assert np.abs(shares[0] - shares[1]).max() < 0.002 and 0.3 < shares[0].min() < 0.4


@pytest.mark.parametrize(("name", "codec"), [("o.mp4", None), ("o.mov", "hevc"), ("o.mkv", "h264")])
def test_alpha_is_refused_where_it_would_be_lost(make_clip: Clip, tmp_path: Path, name: str, codec: str | None):
    source = tiny(make_clip, "yuva420p", alpha=True)
    with pytest.raises(InputError, match="transparency.*; write .mov with --codec prores") as caught:
        check_request(source, Driving(expression=source), tmp_path / name, EditSettings(codec=codec))
    assert caught.value.exit_code == 3
    with pytest.raises(InputError, match="transparency"):
        exact(source, tmp_path / name, codec=codec)
    assert not list(tmp_path.glob("o.*")) and not list(tmp_path.glob(".dpe*"))


CLEAR = "format=gbrap,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a=85,format=yuva420p"
PQ = "format=yuv420p10le,setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084"


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (CLEAR, "the transparency of s.mkv is not in these pictures"),
        ("format=yuv420p10le", "s.mkv has 10 bits a channel, these pictures have 8"),
        (PQ, "s.mkv has 10 bits a channel, these pictures have 8, which show bands in PQ HDR"),
        ("format=yuv420p", None),
    ],
)
def test_what_a_crop_has_not_is_said_and_refuses_nothing(tmp_path: Path, filters: str, words: str | None):
    source, driving, said = tmp_path / "s.mkv", clip(tmp_path / "d.mp4", [True]), []
    run_ffmpeg("-i", clip(tmp_path / "s.mp4", [True] * 2), "-vf", filters, "-c:v", "ffv1", source)
    for driven, settings in (
        (Driving(driving), EditSettings(paste=False, codec="h264")), (Driving(pose=driving), EditSettings())
    ):  # fmt: skip
        output = tmp_path / f"{len(said)}-{driven.mode}.mp4"
        edit_video(source, driven, output, ENGINE, DETECTOR, settings, say=said.append)
        info = probe(output)
        assert (info.codec, info.pix_fmt) == ("h264", "yuv420p")
    assert [line for line in said if "s.mkv" in line] == ([words] * 2 if words else [])


def test_what_the_crop_of_a_still_has_not_is_said(tmp_path: Path):
    write_image(tmp_path / "s.png", picture().astype(np.uint16) * 257, np.full((120, 160), 9999, np.uint16))
    write_image(tmp_path / "d.png", picture(colour=(90, 160, 0)))
    said: list[str] = []
    edit_video(tmp_path / "s.png", Driving(pose=tmp_path / "d.png"), tmp_path / "o.png", ENGINE, DETECTOR,
               say=said.append)  # fmt: skip
    assert [line for line in said if line.startswith(("the transparency of s.png", "s.png has 16 bits"))] == said[-2:]


def test_the_crop_of_a_dub_needs_no_place_for_transparency(tmp_path: Path):
    write_image(tmp_path / "s.png", picture(), np.full((120, 160), 40, np.uint8))
    speech = write_wave(tmp_path / "a.wav", babble(1.0))
    check_dub(tmp_path / "s.png", speech, tmp_path / "o.mp4", DubSettings())
    with pytest.raises(InputError, match="transparency"):
        check_dub(tmp_path / "s.png", speech, tmp_path / "o.mp4", DubSettings(still=True))


def test_alpha_that_says_nothing_is_no_alpha(make_clip: Clip, tmp_path: Path):
    source = tiny(make_clip, "yuva420p")
    assert (
        exact(source, tmp_path / "o.mp4", preset="ultrafast") == [] and probe(tmp_path / "o.mp4").pix_fmt == "yuv420p"
    )


def test_alpha_that_comes_later_is_not_lost_without_a_word(make_clip: Clip, tmp_path: Path):
    fading = "format=gbrap,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='if(lt(N,3),255,99)'"
    source = tmp_path / "fading.mkv"
    run_ffmpeg("-i", tiny(make_clip, "gbrp10le"), "-vf", f"{fading},format=yuva420p", "-c:v", "ffv1", source)
    with pytest.raises(InputError, match="transparent at its frame 3"):
        exact(source, tmp_path / "o.mp4")
    assert not (tmp_path / "o.mp4").exists()


def test_full_range_does_not_go_into_ffv1_unseen(make_clip: Clip, tmp_path: Path):
    source = make_clip(levels="pc", matrix="bt709", seconds=0.1)
    with pytest.raises(InputError, match="full range.*--codec h264 --crf 0"):
        exact(source, tmp_path / "o.mkv", codec="ffv1")
    exact(source, tmp_path / "o.mp4", crf=0, preset="ultrafast")
    exact(source, tmp_path / "o.mov", codec="prores")
    for before, same, near in zip(*map(read_frames, (source, tmp_path / "o.mp4", tmp_path / "o.mov")), strict=True):
        assert np.array_equal(before.rgb, same.rgb) and np.abs(before.rgb.astype(int) - near.rgb).mean() < 2
    assert probe(tmp_path / "o.mp4").colour.range == 2 and probe(tmp_path / "o.mov").colour.range == 1


# Stills


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_still_keeps_its_depth_and_its_alpha(tmp_path: Path, depth: type):
    factor = np.iinfo(depth).max // 255
    rgb, alpha = picture().astype(depth) * factor, np.full((120, 160), 40 * factor, depth)
    write_image(tmp_path / "s.png", rgb, alpha)
    write_image(tmp_path / "d.png", picture(colour=(90, 160, 0)))
    edit_video(tmp_path / "s.png", Driving(expression=tmp_path / "d.png"), tmp_path / "o.png", ENGINE, DETECTOR)
    frame = next(read_frames(tmp_path / "o.png", exact=True))
    assert frame.rgb.dtype == depth and np.array_equal(frame.original.planes[-1], alpha)
    assert np.array_equal(frame.rgb[:5], rgb[:5]) and not np.array_equal(frame.rgb, rgb)
    assert np.abs(read_image(tmp_path / "o.png").astype(int) - frame.rgb8).max() <= (depth == np.uint16)
    with pytest.raises(InputError, match="transparency"):
        edit_video(tmp_path / "s.png", Driving(expression=clip(tmp_path / "d.mp4", [True] * 2)), tmp_path / "o.mp4",
                   ENGINE, DETECTOR)  # fmt: skip


def test_a_still_is_refused_where_its_alpha_would_be_lost_before_the_work(tmp_path: Path):
    write_image(tmp_path / "s.png", picture(), np.full((120, 160), 40, np.uint8))
    write_image(tmp_path / "d.png", picture(colour=(90, 160, 0)))
    driving, output = Driving(expression=tmp_path / "d.png"), tmp_path / "o.jpg"
    with pytest.raises(OutputError, match="transparency"):
        check_request(tmp_path / "s.png", driving, output, EditSettings())
    edit_video(tmp_path / "s.png", driving, output, ENGINE, DETECTOR, EditSettings(paste=False))  # the crop has none
    assert output.exists()


# Image sequences


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Makes numbered pictures of a face before a grey room."""

    def make(name: str = "in_%04d.png", first: int = 1001, count: int = 5, depth: type = np.uint8) -> Path:
        (tmp_path / "50% %d").mkdir(exist_ok=True)
        for index in range(count):
            rgb = picture(shade=60 + 10 * index).astype(depth) * (np.iinfo(depth).max // 255)
            write_image(tmp_path / "50% %d" / (name % (first + index)), rgb)
        return tmp_path / "50% %d" / name

    return make


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_sequence_is_edited_into_a_sequence(pictures, tmp_path: Path, depth: type):
    source, output = pictures(depth=depth), tmp_path / "out_%05d.png"
    driving = clip(tmp_path / "d.mp4", [True] * 5)
    settings = EditSettings(fps="23.976")
    report = edit_video(source, Driving(expression=driving), output, ENGINE, DETECTOR, settings)
    assert [file.name for file in files_of(output)] == [f"out_0{1001 + n}.png" for n in range(5)]
    assert report.output["frames"] == 5 and report.frames[1].time == round(1001 / 24000, 6)
    fps = Fraction(24000, 1001)
    before, after = read_frames(source, fps=fps, exact=True), read_frames(output, fps=fps, exact=True)
    for one, two in zip(before, after, strict=True):
        assert one.rgb.dtype == two.rgb.dtype == depth and one.time == two.time
        assert np.array_equal(one.rgb[:5], two.rgb[:5]) and not np.array_equal(one.rgb, two.rgb)


def test_a_sequence_becomes_a_video_of_the_rate_asked_for(pictures, tmp_path: Path):
    source = pictures()
    exact(source, tmp_path / "o.mov", fps=Fraction(30000, 1001), preset="ultrafast")
    assert true_times(tmp_path / "o.mov") == [Fraction(1001 * n, 30000) for n in range(5)]
    frames = read_frames(source, 0.08, fps=Fraction(25))
    write_video(frames, probe(source, Fraction(25)), tmp_path / "o_%d.png", start=0.08)
    assert [file.name for file in files_of(tmp_path / "o_%d.png")] == ["o_1003.png", "o_1004.png", "o_1005.png"]
    sought = list(read_frames(source, 0.08, fps=Fraction(25)))
    assert [frame.time for frame in sought] == [Fraction(n, 25) for n in (2, 3, 4)] and sought[0].rgb[0, 0, 0] == 80


def test_a_video_becomes_a_sequence_and_says_what_is_lost(make_clip: Clip, tmp_path: Path):
    source = make_clip(vfr=True, size=(64, 48))
    notes = exact(source, tmp_path / "o_%d.png")
    assert len(files_of(tmp_path / "o_%d.png")) == len(true_times(source)) and (tmp_path / "o_1.png").exists()
    assert any("sound" in note for note in notes) and any("equally long" in note for note in notes)
    first = next(read_frames(source))
    assert np.array_equal(read_image(tmp_path / "o_1.png"), first.rgb)


def test_sequences_replace_and_are_kept_as_a_whole(pictures, tmp_path: Path):
    source = pictures()
    output = tmp_path / "o_%04d.png"
    for number in (1001, 1042):
        write_image(tmp_path / f"o_{number}.png", picture())
    with pytest.raises(OutputError, match="o_1001.png exists; .*--overwrite"):
        exact(source, output)
    assert len(files_of(output)) == 2
    exact(source, output, overwrite=True)
    assert len(files_of(output)) == 5
    for settings in (EditSettings(), EditSettings(overwrite=True)):
        with pytest.raises(OutputError, match="also an input"):
            check_request(source, Driving(expression=source), source, settings)


def test_a_span_replaces_its_own_pictures_alone(pictures, tmp_path: Path):
    source, output = pictures(), tmp_path / "o_%04d.png"
    exact(source, output)
    before = {file.name: file.read_bytes() for file in files_of(output)}
    frames = [replace(frame, rgb=frame.rgb // 2, original=None) for frame in read_frames(source, 0.08, 0.16)]
    write_video(frames, probe(source), output, start=0.08, end=0.16, overwrite=True)
    after = {file.name: file.read_bytes() for file in files_of(output)}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["o_1003.png", "o_1004.png"]


def test_a_sequence_is_written_into_a_folder_with_a_colon(make_clip: Clip, tmp_path: Path, monkeypatch):
    source, output = tiny(make_clip), Path("a:b") / "s_%03d.png"
    monkeypatch.chdir(tmp_path)
    output.parent.mkdir()
    exact(source, output)
    assert len(files_of(output)) == 6 == len(list(read_frames(output)))


@pytest.mark.parametrize("name", ["s_%6d.png", "50%_s_%04d.png", "100%%s%d%.png", "a%*[1]_%04d.png"])
def test_any_name_of_a_sequence_is_read_and_written(make_clip: Clip, tmp_path: Path, name: str):
    (tmp_path / "again").mkdir()
    source, output, again = tiny(make_clip), tmp_path / name, tmp_path / "again" / name
    exact(source, output)
    digits = int((re.search(r"%0?(\d*)d", name)[1]) or 1)
    expected = [name.replace(re.search(r"%\d*d", name)[0], str(n).zfill(digits)) for n in range(1, 7)]
    assert [file.name for file in files_of(output)] == expected
    exact(output, again)
    for one, two in zip(files_of(output), files_of(again), strict=True):
        assert one.name == two.name and np.array_equal(read_image(one), read_image(two))


def test_an_output_that_ffmpeg_wrote_elsewhere_is_no_success(make_clip: Clip, tmp_path: Path, monkeypatch):
    source = tiny(make_clip)
    monkeypatch.setattr(writer, "encode", lambda *_: (6, True))
    for name in ("o_%d.png", "o.mp4"):
        with pytest.raises(OutputError, match="nothing was written"):
            exact(source, tmp_path / name)


def test_what_is_wrong_with_a_sequence_is_said(pictures, tmp_path: Path):
    source = pictures()
    (source.parent / "in_1003.png").unlink()
    with pytest.raises(InputError, match="in_1003.png is missing"):
        probe(source)
    with pytest.raises(InputError, match="no picture is named like"):
        probe(tmp_path / "none_%03d.png")
    with pytest.raises(InputError, match="16-bit PNG"):
        probe(tmp_path / "light_%03d.exr")
    assert not is_sequence(tmp_path / "50%.png") and not is_sequence(tmp_path / "a %d.mp4")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("25", "25"), ("29.97", "30000/1001"), ("23.976", "24000/1001"), ("59.94", "60000/1001"), ("12.5", "12.5")],
)
def test_a_rate_is_what_is_meant(text: str, rate: str):
    assert frame_rate(text) == frame_rate(rate) == Fraction(rate)
    for wrong in ("0", "fast", "1/0", "-5"):
        with pytest.raises(InputError, match="no frame rate"):
            frame_rate(wrong)


# Pipes


def piped(code: str, data: bytes | None = None) -> bytes:
    """Standard output of a program that uses the library."""
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize(("pipe", "pix_fmt"), [("nut", "yuv420p"), ("nut", "yuva444p10le"), ("y4m", "yuv422p10le")])
def test_a_pipe_holds_the_same_pictures(make_clip: Clip, tmp_path: Path, pipe: str, pix_fmt: str):
    source = tiny(make_clip, pix_fmt, "source.mkv", fps=25, audio=pipe == "nut", alpha=pix_fmt.startswith("yuva"))
    code = f"""
from pathlib import Path
from dpe_cli.video import probe, read_frames
from dpe_cli.writer import write_video
source = Path({str(source)!r})
audio = source if {pipe == "nut"} else None
write_video(read_frames(source, exact=True), probe(source), Path("-"), audio=audio, pipe={pipe!r})
"""
    received = tmp_path / "received"
    received.write_bytes(piped(code))
    assert probe(received).pix_fmt == pix_fmt
    for one, two in zip(read_frames(source, exact=True), read_frames(received, exact=True), strict=True):
        assert one.time == two.time
        assert all(np.array_equal(a, b) for a, b in zip(one.original.planes, two.original.planes, strict=True))
    if pipe == "nut":
        early, expected = [packets(source)[0]], packets(source)[1:]
        assert early[0][0] < 0 and [content for _, content in packets(received)] == [content for _, content in expected]
        assert all(abs(float(a - b)) < 0.001 for (a, _), (b, _) in zip(packets(received), expected, strict=True))


def test_standard_input_is_read_as_a_file(make_clip: Clip, tmp_path: Path):
    source = tmp_path / "s.y4m"
    run_ffmpeg("-i", tiny(make_clip), "-f", "yuv4mpegpipe", source)
    with source.open("rb") as file, spooled(Path("-"), file) as path:
        kept = path
        assert [frame.time for frame in read_frames(path)] == [frame.time for frame in read_frames(source)]
    assert not kept.exists()
    with spooled(source, None) as path:
        assert path == source


def test_alpha_does_not_go_into_y4m(make_clip: Clip):
    with pytest.raises(InputError, match="y4m cannot hold"):
        exact(tiny(make_clip, "yuva420p", alpha=True), Path("-"), pipe="y4m")


# Time and memory


class Unchanged:
    """An engine that gives back what it gets, for tests of everything else."""

    size, batch_size, description = 32, 16, {"weights": "none"}

    def lanes(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext([self])

    def forget(self) -> None:
        pass

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        return np.zeros((len(crops), 2), np.float32)

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        return crops


class Everywhere:
    """A detector that sees the same face in every picture."""

    name = "everywhere"

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        side, (height, width) = rgb.shape[0] / 3, rgb.shape[:2]
        box = Box(width / 2 - side / 2, height / 2 - side / 2, width / 2 + side / 2, height / 2 + side / 2)
        shares = np.array([(-0.2, -0.15), (0.2, -0.15), (0, 0.05), (-0.15, 0.25), (0.15, 0.25)])
        return [Detection(box, shares * side + box.centre, 0.9)]


@pytest.mark.slow
def test_an_hour_ends_where_its_source_ends(make_clip: Clip, tmp_path: Path):
    source = make_clip("hour.mov", seconds=3600, size=(64, 48), tracks=2, more=("-g", "300"))
    driving = make_clip("driving.mp4", seconds=0.2, size=(64, 48), audio=False)
    times = true_times(source)
    assert len(times) == 107892 and times[-1] == Fraction(107891 * 1001, 30000)
    edit_video(
        source,
        Driving(expression=driving),
        tmp_path / "o.mov",
        Unchanged(),
        Everywhere(),
        EditSettings(preset="ultrafast"),
    )
    assert true_times(tmp_path / "o.mov") == times
    assert abs(probe(tmp_path / "o.mov").duration - probe(source).duration) < 1001 / 30000
    for track in (0, 1):
        assert_same_sound(source, tmp_path / "o.mov", track)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak so")
def test_memory_does_not_grow_with_the_length(make_clip: Clip, tmp_path: Path):
    """Peak memory of the whole edit, and of ffmpeg beside it, at 10 s, 2 min and 10 min of 640x360.

    The report keeps a line a frame, about 400 bytes. The networks' libraries are loaded, as they are in every edit; the
    peak is that from then on, as loading them has a high one of its own.
    """
    driving = make_clip("driving.mp4", seconds=0.5, size=(64, 48), audio=False)
    peaks = {}
    for seconds in (10, 120, 600):
        source = make_clip(f"{seconds}.mp4", seconds=seconds, size=(640, 360), fps=25)
        peaks[seconds] = peaks_of(
            "import dpe_cli.engine; from test_formats import *",
            f"settings = EditSettings(preset='ultrafast'); driving = Driving(expression=Path({str(driving)!r}))",
            f"arguments = (driving, Path({str(tmp_path / f'{seconds}-o.mp4')!r}), Unchanged(), Everywhere(), settings)",
            f"edit_video(Path({str(source)!r}), *arguments)",
        )
        (tmp_path / f"{seconds}-o.mp4").unlink()
    assert_constant(peaks)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak so")
def test_memory_does_not_grow_with_the_length_of_a_speech(make_clip: Clip, tmp_path: Path):
    """The same of a dub, at 1 min and 10 min of speech over a clip that is repeated; the speech networks are ours."""
    source = make_clip("talk.mp4", seconds=3, size=(320, 240), fps=10, audio=False)
    peaks = {}
    for seconds in (60, 600):
        audio = write_wave(tmp_path / f"{seconds}.wav", babble(seconds))
        peaks[seconds] = peaks_of(
            "import test_dub; from test_formats import *; from dpe_cli import dub",
            "dub.NetworkLandmarker = test_dub.FixedLandmarks; engine = test_dub.CodeEngine()",
            "settings = dub.DubSettings(audio_end='loop', edit=EditSettings(preset='ultrafast'))",
            f"arguments = (Path({str(audio)!r}), Path({str(tmp_path / f'{seconds}-o.mp4')!r}))",
            f"dub.dub_video(Path({str(source)!r}), *arguments, engine, Everywhere(), settings)",
        )
    assert_constant(peaks)


def peaks_of(*lines: str) -> list[float]:
    """Peak MiB, from the imports in the first line on, of a process of these lines and of the ffmpeg beside it."""
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
{lines[0]}
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
{chr(10).join(lines[1:])}
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    return [int(number) / 1024 for number in piped(code).split()]


def assert_constant(peaks: dict[int, list[float]]) -> None:
    """That peaks, by the length in seconds, hardly differ."""
    print("peak MiB of the process and of ffmpeg:", peaks)
    for number in (0, 1):
        least, most = min(peak[number] for peak in peaks.values()), max(peak[number] for peak in peaks.values())
        assert most / least < 1.05, peaks
