"""Pixels: what was not edited is the source's, bit for bit, at every depth and in every format."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from test_edit import DETECTOR, ENGINE, clip

from dpe_cli.edit import edit_video
from dpe_cli.planes import layout_of
from dpe_cli.request import Driving, EditSettings
from dpe_cli.video import probe, read_frames
from dpe_cli.writer import write_video

Clip = Callable[..., Path]
FORMATS = ["yuv420p", "yuv420p10le", "yuv422p", "yuv422p10le", "yuv444p", "yuv444p12le", "gray", "gray10le", "bgr0"]
FORMATS += ["gbrp10le", "yuva420p", "yuva444p10le", "bgra", "yuv411p", "yuv410p"]


def raw(path: Path) -> list[list[np.ndarray]]:
    """The planes of all frames as PyAV gives them, without any help of ours."""
    with av.open(str(path)) as container:
        found = []
        for frame in container.decode(video=0):
            kind = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
            rows = [np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes]
            found.append([plane.copy() for plane in rows])
        return found


def lossless(make_clip: Clip, pix_fmt: str, name: str = "source.mkv", **options) -> Path:
    options = {"size": (64, 48), "seconds": 0.2, "audio": False, "video_codec": "ffv1", **options}
    return make_clip(name, pix_fmt=pix_fmt, **options)


@pytest.mark.parametrize("pix_fmt", FORMATS)
@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_unchanged_frames_are_written_as_they_are(make_clip: Clip, tmp_path: Path, pix_fmt: str, size: tuple[int, int]):
    alpha = pix_fmt == "bgra" or pix_fmt.startswith("yuva")
    source = lossless(make_clip, pix_fmt, size=size, alpha=alpha)
    write_video(read_frames(source, exact=True), probe(source), tmp_path / "out.mkv", codec="ffv1")
    before, after = raw(source), raw(tmp_path / "out.mkv")
    assert probe(tmp_path / "out.mkv").pix_fmt == probe(source).pix_fmt == pix_fmt
    assert len(before) == len(after) and len({plane.tobytes() for frame in before for plane in frame}) > 3
    for one, two in zip(before, after, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p10le", "yuv444p", "bgr0", "gbrp10le", "gray"])
def test_only_the_edited_ellipse_changes(make_clip: Clip, tmp_path: Path, pix_fmt: str):
    source = lossless(make_clip, pix_fmt, matrix="bt709")
    mask = np.zeros((48, 64), np.float32)
    cv2.ellipse(mask, (31, 20), (17, 11), 20, 0, 360, 1, -1)
    colour = np.array([180, 60, 200] if "gray" not in pix_fmt else [120, 120, 120])
    frames = list(read_frames(source, exact=True))
    peak = np.iinfo(frames[0].rgb.dtype).max
    assert peak == (65535 if "10" in pix_fmt else 255)
    painted = np.where(mask[..., None] > 0, colour * (peak // 255), [0]).astype(frames[0].rgb.dtype)
    edited = [replace(frame, rgb=np.where(mask[..., None] > 0, painted, frame.rgb)) for frame in frames]
    write_video(edited, probe(source), tmp_path / "out.mkv", codec="ffv1")
    outside, inner = mask == 0, cv2.erode(mask, np.ones((9, 9))) > 0
    for before, after in zip(frames, read_frames(tmp_path / "out.mkv", exact=True), strict=True):
        assert np.array_equal(before.rgb[outside], after.rgb[outside])
        assert np.abs(after.rgb8[inner].astype(int) - colour).max() <= 2
    for one, two in zip(raw(source), raw(tmp_path / "out.mkv"), strict=True):
        if pix_fmt != "bgr0":  # whose one plane holds four samples a pixel
            assert np.array_equal(one[0][outside], two[0][outside]) and not np.array_equal(one[0], two[0])


@pytest.mark.parametrize("pix_fmt", ["yuv422p10le", "yuv420p10le", "gray10le"])
def test_ten_bits_of_a_change_are_kept(make_clip: Clip, tmp_path: Path, pix_fmt: str):
    """A ramp of 1024 greys is painted in: with 8 bits it would have 256 steps."""
    source = lossless(make_clip, pix_fmt, size=(1024, 8), matrix="bt709", colour=(9, 9, 9))
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16)[None, :, None].repeat(8, 0).repeat(3, 2)
    frames = [replace(frame, rgb=ramp) for frame in read_frames(source, exact=True)]
    write_video(frames, probe(source), tmp_path / "out.mkv", codec="ffv1")
    luma = raw(tmp_path / "out.mkv")[0][0][0].astype(int)
    low, high = (0, 1023) if pix_fmt == "gray10le" else (64, 940)
    assert luma[0] == low and luma[-1] == high and len(set(luma.tolist())) == high - low + 1
    after = next(read_frames(tmp_path / "out.mkv", exact=True)).rgb
    assert np.abs(after.astype(int) - ramp).max() < 65535 / 1000


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("levels", ["tv", "pc"])
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
def test_both_depths_and_ways_have_the_same_colours(make_clip: Clip, pix_fmt: str, levels: str, matrix: str):
    colour, deep = np.array((52, 201, 30)), "10" in pix_fmt
    options = {"pix_fmt": pix_fmt, "matrix": matrix, "levels": levels, "colour": tuple(colour.tolist())}
    source = make_clip(seconds=0.1, audio=False, **options)
    exact, plain = next(read_frames(source, exact=True)), next(read_frames(source))
    assert np.abs(plain.rgb.astype(int) - colour).max() <= 2 and np.abs(exact.rgb8.astype(int) - colour).max() <= 2
    painted = np.broadcast_to(colour * (257 if deep else 1), exact.rgb.shape).astype(exact.rgb.dtype)
    after = replace(exact.original, rgb=np.zeros_like(painted)).edited(painted)
    for one, two in zip(exact.original.planes, after, strict=True):
        assert abs(int(one[0, 0]) - int(two[0, 0])) <= (4 if deep else 1) and (two == two[0, 0]).all()


def test_colour_reaches_to_the_edge_of_the_picture(make_clip: Clip, tmp_path: Path):
    source = lossless(make_clip, "yuv420p", size=(63, 47))
    frames = [replace(frame, rgb=np.full_like(frame.rgb, (200, 40, 90))) for frame in read_frames(source, exact=True)]
    write_video(frames, probe(source), tmp_path / "out.mkv", codec="ffv1")
    assert np.abs(next(read_frames(tmp_path / "out.mkv")).rgb.astype(int) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize("turned", [90, 270, 180])
def test_turned_pictures_keep_their_planes_where_tags_can_say_so(make_clip: Clip, tmp_path: Path, turned: int):
    source = make_clip("phone.mp4", rotation=turned, size=(64, 48), seconds=0.2, audio=False, more=("-crf", "0"))
    assert (probe(source).layout is None) == (turned == 180)
    write_video(read_frames(source, exact=True), probe(source), tmp_path / "out.mkv", codec="ffv1")
    assert probe(tmp_path / "out.mkv").rotation == 0
    for before, after in zip(raw(source), raw(tmp_path / "out.mkv"), strict=True):
        if turned != 180:
            assert all(np.array_equal(np.rot90(a, turned // 90), b) for a, b in zip(before, after, strict=True))
    before, after = next(read_frames(source)), next(read_frames(tmp_path / "out.mkv"))
    assert np.abs(before.rgb.astype(int) - after.rgb).max() <= 3 * (turned == 180)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("yuvj420p", "yuv420p"),
        ("nv12", "yuv420p"),
        ("p010le", "yuv420p10le"),
        ("yuyv422", "yuv422p"),
        ("rgb24", "gbrp"),
        ("rgba", "gbrap"),
        ("rgb48be", "gbrp16le"),
        ("pal8", "gbrap"),
        ("gray10le", "gray10le"),
        ("gbrpf32le", None),
        ("yuv440p10le", None),
    ],
)
def test_every_packing_has_its_planes(name: str, layout: str | None):
    assert (layout_of(name) and layout_of(name).name) == layout


@pytest.mark.parametrize("pix_fmt", ["nv12", "yuyv422", "rgb24", "bgra", "rgb48le"])
def test_packed_samples_are_only_put_in_order(make_clip: Clip, tmp_path: Path, pix_fmt: str):
    source = lossless(make_clip, pix_fmt, "raw.nut", video_codec="rawvideo", levels="pc")
    write_video(read_frames(source, exact=True), probe(source), tmp_path / "out.mkv", codec="ffv1")
    with av.open(str(source)) as one, av.open(str(tmp_path / "out.mkv")) as two:
        for before, after in zip(one.decode(video=0), two.decode(video=0), strict=True):
            first, second = before.planes[0], after.planes[0]
            if pix_fmt == "nv12":
                luma, ours = (np.frombuffer(p, np.uint8).reshape(48, -1)[:, :64] for p in (first, second))
                assert np.array_equal(luma, ours)
            elif pix_fmt == "yuyv422":
                luma = np.frombuffer(first, np.uint8).reshape(48, -1)[:, :128:2]
                assert np.array_equal(luma, np.frombuffer(second, np.uint8).reshape(48, -1)[:, :64])
            elif pix_fmt in ("rgb24", "bgra"):
                assert np.array_equal(before.to_ndarray(format="rgb24"), after.to_ndarray(format="rgb24"))
            else:
                assert np.array_equal(before.to_ndarray(format="rgb48le"), after.to_ndarray(format="rgb48le"))


# The whole way


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p10le", "yuva444p10le"])
def test_an_edit_changes_nothing_outside_the_mask(make_clip: Clip, tmp_path: Path, pix_fmt: str):
    """Lossless, at 8 and at 10 bit: the greatest difference outside the mask is 0."""
    driving = clip(tmp_path / "d.mp4", [True] * 5)
    face = "between(X,60,99)*between(Y,40,79)"
    painted = ":".join(f"{c}='if({face},{v},{c}(X,Y)/2)'" for c, v in zip("rgb", (20, 220, 30), strict=True))
    noise = f"noise=alls=20:allf=t,format=gbrp,geq={painted}"
    options = {"size": (160, 120), "fps": 25, "colour": (120, 120, 120), "filters": (noise,)}
    source = lossless(make_clip, pix_fmt, alpha=pix_fmt.startswith("yuva"), **options)
    report = edit_video(
        source, Driving(expression=driving), tmp_path / "o.mkv", ENGINE, DETECTOR, EditSettings(codec="ffv1")
    )
    assert report.counts()["edited"] == 5 and probe(tmp_path / "o.mkv").pix_fmt == pix_fmt
    left, top, right, bottom = (round(edge) for edge in report.frames[0].box)
    outside = np.ones((120, 160), bool)
    outside[top:bottom, left:right] = False
    for before, after in zip(read_frames(source, exact=True), read_frames(tmp_path / "o.mkv", exact=True), strict=True):
        assert np.abs(before.rgb.astype(int) - after.rgb)[outside].max() == 0
        assert np.abs(before.rgb.astype(int) - after.rgb)[~outside].max() > 1000 * (before.rgb.dtype == np.uint16)
        for index, (one, two) in enumerate(zip(before.original.planes, after.original.planes, strict=True)):
            step = 160 // one.shape[1], 120 // one.shape[0]
            away = outside[:: step[1], :: step[0]] & outside[step[1] - 1 :: step[1], step[0] - 1 :: step[0]]
            assert np.array_equal(one[away], two[away]) and (index == 3) == np.array_equal(one, two)
