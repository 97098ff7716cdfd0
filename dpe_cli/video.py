"""Video in, video out: the only place, with `container.py` below it, that knows ffmpeg, PyAV and BGR.

Time. `Frame.time` is an exact Fraction of seconds. In containers whose zero means something (MP4, MOV, Matroska, AVI)
it is the frame's presentation time as it stands in the file, so a source that starts at 0.5 s gives an output that
starts at 0.5 s. MPEG streams count from an arbitrary clock; there zero is the start of the first track.

Pixels. `Frame.rgb` is what networks see and edits change. A frame that was read `exact` also has its file's own planes
(`Frame.original`); these are written, with the changed pixels of `rgb` put in: what was not edited is not converted.

Writing. Frames go as raw pictures with their times (a NUT stream made by PyAV) through a pipe into the ffmpeg program,
which encodes them and copies all other tracks from their file. MP4 and MOV then hold each time exactly; Matroska counts
in whole milliseconds, so there a time is within half a millisecond.
"""

import contextlib
import errno
import math
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, product
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import av
import cv2
import ffmpeg
import imageio_ffmpeg
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from dpe_cli.container import (
    PIPE,
    check_jump,
    check_whole,
    clock_zero,
    decoded,
    files_of,
    holds_image,
    input_options,
    is_sequence,
    opened,
    pattern,
    picture_numbers,
    rotation,
    side_data,
    sound_streams,
    turn,
    video_stream,
)
from dpe_cli.encoding import Encoding, Mastering, Wish, check_encoding, container_of, plan_encoding
from dpe_cli.errors import InputError, OutputError
from dpe_cli.limits import check_file, check_seconds, hidden_folder, limits, scratch
from dpe_cli.marks import mark_file, marked_picture, marked_tags
from dpe_cli.planes import CHROMA, Layout, Original, frame_of, layout_of, oriented, planes_of
from dpe_cli.tracks import LEAD, Carried, Track, carried, sound_tracks, unknown_sound
from dpe_cli.tracks import audio_codecs as audio_codecs  # also from here

UNSPECIFIED = 2  # of ITU-T H.273, for primaries, transfer and matrix
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}  # H.273 -> swscale
SAME_MATRIX = {6: 5, 10: 9}  # equal numbers under another name, for PyAV
# The default of swscale is faster (1080p: 4 against 9 ms of CPU) but darkens every picture by 1 to 2 levels of 255.
EXACT = 2 | 0x40000 | 0x2000  # bilinear, accurate rounding, full chroma: numbers, as PyAV 17 has no names for them
LIMITED_WHITE = 65283  # what swscale makes of 235 of 255, or 940 of 1023, in 16 bits
T = TypeVar("T")
LOG_BYTES = 1 << 16
FASTEST = 1000  # frames a second that are likely a rate and no clock

LIMITED_RANGE, FULL_RANGE = 1, 2  # of ffmpeg: 0 unspecified, 1 limited (tv), 2 full (pc)


@dataclass(frozen=True)
class Frame:
    """One picture of a video."""

    index: int  # from 0, within what was read
    time: Fraction  # seconds; see the top of this file
    rgb: np.ndarray  # (H, W, 3) RGB, upright: uint8, or uint16 from 0 to 65535 where the file was read exactly
    original: Original | None = None  # what is written where `rgb` was not changed; None: all of `rgb` is new

    @property
    def rgb8(self) -> np.ndarray:
        """(H, W, 3) uint8, for the eyes of networks."""
        return self.rgb if self.rgb.dtype == np.uint8 else cv2.convertScaleAbs(self.rgb, alpha=255 / 65535)


@dataclass(frozen=True)
class Colour:
    """Colour tags as they stand in the file: `range` by ffmpeg's numbers, the others by those of ITU-T H.273."""

    range: int = 0
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    matrix: int = UNSPECIFIED


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself. Sizes are those of the upright picture."""

    path: Path
    width: int
    height: int
    fps: Fraction  # average, exact: 30000/1001
    n_frames: int  # the container's claim: good for a progress bar, not for a loop
    duration: float = 0.0  # seconds, the container's claim, 0 where it makes none: see `seconds_of`
    time_base: Fraction = Fraction(1, 90000)  # 1/n seconds, a whole fraction of the file's own: holds each time exactly
    has_audio: bool = False
    is_image: bool = False
    pix_fmt: str = ""
    codec: str = ""
    colour: Colour = field(default_factory=Colour)
    rotation: int = 0  # degrees clockwise that make it upright: 0, 90, 180, 270
    sample_aspect_ratio: Fraction = Fraction(1)  # width / height of one pixel of the upright picture
    start: Fraction = Fraction(0)  # time of the first frame
    layout: Layout | None = None  # of the upright planes that an exact reading gives; None: it gives RGB
    mastering: Mastering = field(default_factory=Mastering)
    notes: tuple[str, ...] = ()  # what cannot be carried over
    of_all_tracks: bool = False  # `duration` is that of the longest track, as Matroska knows no other

    @property
    def written_layout(self) -> Layout:
        """What a writer gets of this source."""
        return self.layout or Layout("gbr")


@dataclass(frozen=True)
class WriteResult:
    """What was written, and what the user should know about it."""

    frames: int
    path: Path
    notes: tuple[str, ...] = ()


class Name(str):
    """A file's name for ffmpeg-python, which asks each word for its UTF-8: names may be no text."""

    def __str__(self) -> str:
        return ascii(self)


def ffmpeg_exe() -> str:
    """The ffmpeg program: what DPE_FFMPEG names (5.1 or newer), else the one of imageio-ffmpeg. Raises InputError."""
    if named := os.environ.get("DPE_FFMPEG"):
        return named
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise InputError("no ffmpeg program was found", "reinstall imageio-ffmpeg or set DPE_FFMPEG") from error


# Reading


def probe(path: Path, fps: Fraction | None = None) -> VideoInfo:
    """What is in `path`; decodes one picture, so that what is not decodable is known here.

    `fps` is the rate of an image sequence, else it means nothing. Raises InputError if the file is missing, is no video
    or picture, is cut short, or has colours that cannot be edited.
    """
    path = Path(path)
    with opened(path, fps) as container:
        stream = video_stream(container, path)
        if holds_image(container):
            still = _read_still(path)
            height, width = still.rgb.shape[:2]
            codec, layout = stream.codec_context.name, still.original and still.original.layout
            return VideoInfo(path, width, height, Fraction(25), 1, is_image=True, codec=codec, layout=layout)
        if not is_sequence(path):
            check_whole(container, path)
        frame = next(decoded(container, stream, path), None)
        if frame is None:
            raise InputError(f"{path} holds no picture that can be decoded", "check that a player can show it")
        return _info(path, container, stream, frame)


def _info(path: Path, container: InputContainer, stream: VideoStream, frame: av.VideoFrame) -> VideoInfo:
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    # raw DV says the ticks of its clock for the first of the two
    fps = next((rate for rate in rates if rate <= FASTEST), rates[0] if rates else Fraction(25))
    span = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, av.time_base)
    aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)  # 0 means unknown
    check_seconds(path, float(span))
    side = turn(frame)
    width, height = (frame.height, frame.width) if side[0] else (frame.width, frame.height)
    stamp = None if container.format.name == "avi" else frame.pts
    mastering, dynamic = _mastering(frame)
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        fps=Fraction(fps),
        n_frames=stream.frames or math.ceil(span * fps),
        duration=float(span),
        time_base=_fine(stream.time_base),
        has_audio=bool(sound_streams(container)),
        pix_fmt=frame.format.name,
        codec=stream.codec_context.name,
        colour=_colour(path, frame),
        rotation=rotation(frame),
        sample_aspect_ratio=1 / aspect if side[0] else aspect,
        start=Fraction(0) if stamp is None else stamp * stream.time_base - clock_zero(container),
        layout=_upright_layout(frame, side),
        mastering=mastering,
        notes=dynamic + _left_out(frame) + unknown_sound(container, path),
        of_all_tracks=not stream.duration,
    )


def _colour(path: Path, frame: av.VideoFrame) -> Colour:
    """The tags of a picture; range and matrix are of no meaning for RGB."""
    primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
    if frame.format.is_rgb or frame.format.has_palette:
        return Colour(0, primaries, transfer, UNSPECIFIED)
    matrix = int(frame.colorspace)
    if matrix not in MATRICES and matrix not in (0, UNSPECIFIED, 3):
        raise InputError(f"{path} has the colour matrix {matrix} of H.273", "convert it to bt709 or bt2020nc")
    levels = FULL_RANGE if frame.format.name.startswith("yuvj") else int(frame.color_range)
    return Colour(levels, primaries, transfer, matrix if matrix in MATRICES else UNSPECIFIED)


def _upright_layout(frame: av.VideoFrame, side: tuple[bool, bool, bool]) -> Layout | None:
    """The layout of the planes that can be carried into the output; None for those that RGB must stand for.

    Alpha counts only if something in the first picture is transparent: many programs write it always.
    """
    layout = layout_of(frame.format.name)
    if layout is None:
        return None
    if layout.alpha and _opaque(frame, layout):
        layout = replace(layout, alpha=False)
    swapped, mirrored, _ = side
    if swapped:
        layout = replace(layout, across=layout.down, down=layout.across)
    elif mirrored and layout.across > 1:  # chroma lies on the left pixel of two; no tag says: on the right
        return None
    known = (layout.across, layout.down) in CHROMA and layout_of(layout.name) == layout
    return layout if known else None


def _opaque(frame: av.VideoFrame, layout: Layout) -> bool:
    """Whether nothing in a picture is transparent."""
    alpha = _coded_planes(frame, layout, (frame.width, frame.height))[-1]
    return int(alpha.min()) == (1 << layout.bits) - 1


def _reordered(frame: av.VideoFrame, layout: Layout, size: tuple[int, int]) -> av.VideoFrame:
    """The same samples in another order; range and matrix are named so that nothing is converted."""
    same = {"src_color_range": ColorRange.MPEG, "dst_color_range": ColorRange.MPEG}
    same |= {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU709}
    return frame.reformat(width=size[0], height=size[1], format=layout.name, interpolation=EXACT, **same)


def _mastering(frame: av.VideoFrame) -> tuple[Mastering, tuple[str, ...]]:
    """Static HDR metadata, and a note of that which changes with the picture."""
    display, light, dynamic = (), None, []
    for data in side_data(frame):
        kind = data.type.name
        if kind == "MASTERING_DISPLAY_METADATA":
            numbers = np.frombuffer(bytes(data), np.int32)
            values = [Fraction(int(top), int(bottom)) for top, bottom in numbers[:20].reshape(10, 2) if bottom]
            if len(values) == 10 and numbers[20:22].all():
                display = tuple(round(value * (50000 if at < 8 else 10000)) for at, value in enumerate(values))
        elif kind == "CONTENT_LIGHT_LEVEL":
            light = tuple(np.frombuffer(bytes(data), np.uint32)[:2].tolist())
        elif kind.startswith(("DOVI", "DYNAMIC_HDR")):
            dynamic.append(kind.split("_")[0].replace("DOVI", "Dolby Vision").replace("DYNAMIC", "HDR10+"))
    notes = tuple(f"the {kind} metadata is left out; the HDR picture under it is kept" for kind in sorted({*dynamic}))
    return Mastering(display, light), notes


def _left_out(frame: av.VideoFrame) -> tuple[str, ...]:
    """Notes of what a picture has beside its pixels that the output will not have."""
    notes = []
    if frame.interlaced_frame:
        notes.append("interlaced fields are edited as one picture and written as progressive; deinterlace before")
    if any(data.type.name == "A53_CC" for data in side_data(frame)):
        notes.append("captions inside the pictures (CEA-608/708) are left out; take them to a subtitle file before")
    return tuple(notes)


def read_frames(
    path: Path,
    start: float | None = None,
    end: float | None = None,
    *,
    fps: Fraction | None = None,
    exact: bool = False,
) -> Iterator[Frame]:
    """The frames with start <= time < end (seconds, as in `Frame.time`), one at a time; a still gives one at 0.

    Upright; `fps` is the rate of an image sequence. 8 bits a channel, whatever the file holds; with `exact` 16 where it
    holds more than 8, and the file's own planes. Times rise strictly: a missing one is reckoned from the rate, one
    that repeats is moved on by a millisecond. Raises InputError, also for times that jump back.
    """
    info, start, end = probe(path, fps), _seconds(start), _seconds(end)
    if info.is_image:
        still = _read_still(path)
        yield still if exact else Frame(0, still.time, still.rgb8)
        return
    reader, index, side = VideoReformatter(), 0, None
    for time, frame in _timed(info, start, fps):
        side = side or turn(frame)  # asked once: PyAV holds a frame that was asked until garbage is collected
        if end is not None and time >= end:
            return
        if start is None or time >= start:
            yield _upright(index, time, frame, info, side, reader, exact)
            index += 1


def frame_times(path: Path, fps: Fraction | None = None) -> list[Fraction]:
    """The times of all frames of a video, rising, by its packets: nothing is decoded. Raises InputError.

    Where packets have no times, as in AVI, these are reckoned from the rate.
    """
    info = probe(path, fps)
    with opened(path, fps) as container:
        stream = video_stream(container, path)
        zero = clock_zero(container)
        numbered = container.format.name == "avi"
        stamps = [None if numbered else packet.pts for packet in container.demux(stream) if packet.size]
    if None in stamps:
        return [number / info.fps for number in range(len(stamps))]
    return sorted(stamp * stream.time_base - zero for stamp in stamps)


def seconds_of(info: VideoInfo) -> float:
    """Seconds from a video's first frame to the end of its last: the container's claim, or, where there is none for the
    pictures alone, by the packets. Raises InputError."""
    if info.is_image or (info.duration and not info.of_all_tracks):
        return info.duration
    times = frame_times(info.path, info.fps)
    return float(times[-1] - times[0] + 1 / info.fps)


def _seconds(value: float | None) -> Fraction | None:
    """What was meant by a float of seconds: 0.04 is 1/25, not a hair more."""
    return None if value is None else Fraction(value).limit_denominator(1_000_000)


def _timed(info: VideoInfo, start: Fraction | None, fps: Fraction | None) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decoded frames with times, from the last key frame before `start`, or from the first where seeking fails."""
    for seek in (True, False) if start else (False,):
        with opened(info.path, fps) as container:
            stream = video_stream(container, info.path)
            stream.thread_type = "AUTO"
            zero = clock_zero(container)
            numbered = container.format.name == "avi"  # it knows no times, only the order of decoding
            if seek and not numbered:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(math.floor((start + zero) / stream.time_base), stream=stream)
            frames = decoded(container, stream, info.path)
            first = next(frames, None)
            if first is None or (seek and (numbered or not _lands(first, stream, start + zero))):
                continue
            said = last = None
            for frame in chain([first], frames):
                stamp = frame.pts
                if numbered:
                    stamp = None if None in (frame.dts, first.dts) else frame.dts - first.dts
                time = None if stamp is None else stamp * stream.time_base - zero
                if None not in (said, time):
                    check_jump(info.path, said, time)
                said, last = time, _after(last, time, info)
                check_seconds(info.path, float(last - info.start))  # whatever the container claims
                yield last, frame
            return


def _lands(first: av.VideoFrame, stream: VideoStream, start: Fraction) -> bool:
    """Whether seeking ended at a picture that is early enough and refers to none that was skipped."""
    return first.key_frame and first.pts is not None and first.pts * stream.time_base <= start


def _after(last: Fraction | None, time: Fraction | None, info: VideoInfo) -> Fraction:
    """The time of the frame that follows `last` and says `time` itself, if that is known and later."""
    if last is None:
        return Fraction(0) if time is None else time
    if time is None:
        return last + max(1, round(1 / info.fps / info.time_base)) * info.time_base
    return time if time > last else last + math.ceil(Fraction(1, 1000) / info.time_base) * info.time_base


def _upright(
    index: int,
    time: Fraction,
    frame: av.VideoFrame,
    info: VideoInfo,
    side: tuple[bool, bool, bool],
    reader: VideoReformatter,
    exact: bool,
) -> Frame:
    """A frame of the size that `info` says, even where a stream changes its size midway.

    RGB is made of the bare planes: what else a decoder knows, as where between the pixels chroma lies, another codec
    would not hold, and equal planes shall be equal pictures.
    """
    size = (info.height, info.width) if side[0] else (info.width, info.height)
    layout, planes = layout_of(info.pix_fmt), ()
    if layout is not None:
        planes = _coded_planes(frame, layout, size)
        frame = frame_of(planes, layout)
    matrix = _matrix(info.colour.matrix, info.width, info.height)
    full_range = info.colour.range == FULL_RANGE
    deep = exact and info.layout is not None and info.layout.bits > 8
    if deep and layout.family == "yuv" and layout.down > 1:
        # swscale makes wrong colours of the way from 4:2:0 with more than 8 bits to RGB with 16
        frame = _reordered(frame, replace(layout, across=1, down=1), size)
    picture = reader.reformat(
        frame,
        width=size[0],
        height=size[1],
        format="rgb48le" if deep else "rgb24",
        interpolation=EXACT,
        src_colorspace=Colorspace(SAME_MATRIX.get(matrix, matrix)),
        src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
    )
    rgb = oriented(picture.to_ndarray(), side)
    if deep and layout.family != "gbr":  # of these swscale makes a white that is a little less than 65535
        full = ((1 << layout.bits) - 1) << (16 - layout.bits)
        rgb = cv2.multiply(rgb, np.full(4, 65535 / (full if full_range or layout.family == "gray" else LIMITED_WHITE)))
    if not exact or info.layout is None:
        return Frame(index, time, rgb)
    if layout.alpha and not info.layout.alpha:
        if int(planes[-1].min()) < (1 << layout.bits) - 1:
            raise InputError(
                f"{info.path} becomes transparent at its frame {index}", "begin with a frame that shows it, by --start"
            )
        planes = planes[:-1]
    planes = tuple(oriented(plane, side) for plane in planes)
    return Frame(index, time, rgb, Original(rgb, info.layout, planes, matrix, full_range))


def _coded_planes(frame: av.VideoFrame, layout: Layout, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The planes as they lie in the file, in the order of `layout` and in the first frame's `size` (width, height)."""
    name = frame.format.name.replace("yuvj", "yuv")  # full range, which is no matter of order
    if (name, frame.width, frame.height) != (layout.name, *size):
        frame = _reordered(frame, layout, size)
    return planes_of(frame, layout)


def _matrix(tag: int, width: int, height: int) -> int:
    """The H.273 number of the YUV matrix; an unspecified one is guessed from the size, as players do."""
    return tag if tag in MATRICES else 1 if width >= 1280 or height > 576 else 6


def _fine(time_base: Fraction) -> Fraction:
    """1/n with n >= 10000, of which `time_base` is a whole multiple: leaves room for times between its own."""
    return Fraction(1, time_base.denominator * math.ceil(Fraction(10000, time_base.denominator)))


def read_image(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, turned upright by its EXIF tag, transparency dropped. Raises InputError."""
    return cv2.cvtColor(_decoded_image(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _read_still(path: Path) -> Frame:
    """A picture as a frame; with its original where that has more than 8 bits, or something transparent in it."""
    raw = _decoded_image(path, cv2.IMREAD_UNCHANGED)
    if raw.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path} holds floating-point numbers", "convert it to 16-bit PNG first")
    transparent = raw.ndim == 3 and raw.shape[2] == 4 and int(raw[..., 3].min()) < np.iinfo(raw.dtype).max
    if raw.dtype == np.uint8 and not transparent:
        return Frame(0, Fraction(0), read_image(path))
    raw = raw if raw.ndim == 3 else np.repeat(raw[..., None], 3, axis=2)
    upright = _decoded_image(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    raw = _turned_like(upright, raw)
    bgr = raw[..., :3]
    blue, green, red = cv2.split(bgr)
    planes = (green, blue, red, *([np.ascontiguousarray(raw[..., 3])] if transparent else []))
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    layout = Layout("gbr", 8 * raw.dtype.itemsize, transparent)
    return Frame(0, Fraction(0), rgb, Original(rgb, layout, planes))


def _turned_like(upright: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3 or 4) as OpenCV has turned its colours (H, W, 3) by the EXIF tag, which it does without alpha
    alone."""
    ways = product((False, True), repeat=3)
    way = next((way for way in ways if np.array_equal(oriented(raw[..., :3], way), upright)), None)
    return raw if way is None else oriented(raw, way)  # None: colours that were multiplied by their alpha


def _decoded_image(path: Path, way: int) -> np.ndarray:
    """What OpenCV makes of a picture's file. Raises InputError."""
    check_file(path)
    if path.exists():
        _check_picture(path)
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "check the name") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as a picture", "give a PNG or JPEG file") from error
    return _decoded(data, str(path), way)


def _check_picture(path: Path) -> None:
    """Raises InputError for a picture that is no picture, or larger than allowed: before OpenCV makes room for it."""
    with opened(path) as container:
        context = video_stream(container, path).codec_context
        if not context.width * context.height:  # ffmpeg leaves it open where there are too many pixels
            raise InputError(
                f"{path} cannot be read as a picture of at most {limits().pixels} pixels",
                "give a whole PNG or JPEG file, or raise --max-pixels",
            )


def decode_image(data: np.ndarray, name: str) -> np.ndarray:
    """`read_image` from the bytes of the file, (N,) uint8; `name` is for the complaint."""
    return cv2.cvtColor(_decoded(data, name, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _decoded(data: np.ndarray, name: str, way: int) -> np.ndarray:
    """What OpenCV makes of a picture's bytes. Raises InputError."""
    try:
        bgr = cv2.imdecode(data, way)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        raise InputError(f"{name} cannot be read as a picture", "give a PNG or JPEG file") from error
    if bgr is None:
        raise InputError(f"{name} cannot be read as a picture", "give a whole PNG or JPEG file")
    return bgr


def write_image(path: Path, rgb: np.ndarray, alpha: np.ndarray | None = None, *, marked: bool = False) -> None:
    """Writes (H, W, 3) uint8 or uint16 RGB, and (H, W) alpha, as PNG or JPEG, as the name says; replaces what is there.

    JPEG has 8 bits and no alpha. `marked`: as an edited picture, see `dpe_cli.marks`. Raises OutputError.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise OutputError(f"{path} cannot hold a picture", "name a .png or .jpg")
    check_image(path, Layout("gbr", 8 * rgb.dtype.itemsize, alpha is not None))
    options = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    planes = cv2.split(rgb[..., ::-1]) + (() if alpha is None else (alpha,))
    _, data = cv2.imencode(path.suffix, cv2.merge(planes), options)
    data = marked_picture(data.tobytes()) if marked else data.tobytes()
    with workplace(path) as folder:
        try:
            (folder / path.name).write_bytes(data)
            os.replace(folder / path.name, path)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", "free some space or name another"
            ) from error


def check_image(path: Path, layout: Layout | None) -> None:
    """Raises OutputError for a picture of this layout, None for a plain one, that `path` cannot hold."""
    if path.suffix.lower() != ".png" and layout is not None and (layout.alpha or layout.bits > 8):
        raise OutputError(f"{path} cannot hold the source's transparency or its 16 bits", "name a .png")


# Writing


def check_writable(info: VideoInfo, output: Path, wish: Wish) -> None:
    """Finds out, before any work is done, whether `output` can hold such pictures. Raises InputError, OutputError."""
    check_encoding(info.written_layout, info.codec, output, wish, info.colour.transfer, info.colour.range == FULL_RANGE)


def write_video(
    frames: Iterable[Frame],
    info: VideoInfo,
    output: Path,
    *,
    audio: Path | None = None,
    tracks: Path | None = None,
    start: float | None = None,
    end: float | None = None,
    overwrite: bool = False,
    codec: str | None = None,
    crf: int | None = None,
    preset: str | None = None,
    nvenc: bool | None = None,
    pipe: str = "nut",
    marked: bool = False,
) -> WriteResult:
    """Writes `frames`, all of one size, each at its own time, with all sound tracks of `audio`, packets unchanged.

    `tracks` is the file whose subtitles, chapters, timecode, dispositions and tags the output gets.
    `info` gives the exactness of time, the colour tags and the shape of a pixel. `start` and `end` are those that the
    frames were read with: sound of `info.path` is cut to the same span, to the packet; with `start` the output begins
    with its first frame at 0, and sound of another file begins with the output and is cut to its length. Without
    `end` sound is never cut at its end. Sound that the container cannot hold is encoded as AAC, which the notes say.
    Frames with an original are written in its format where the codec has it, see `dpe_cli.encoding`.
    `marked`: as an edited video, see `dpe_cli.marks`.

    `output` is an .mp4, .mov or .mkv, or pictures like out_%06d.png, numbered from 1 or as those of `info.path`, or
    `-` for standard output. Files appear under their names when all is whole. Raises OutputError, InputError and
    whatever `frames` raises.
    """
    output, wish = Path(output), Wish(codec, crf, preset, nvenc, pipe)
    container = container_of(output, wish.pipe)
    _check_output(output, overwrite)
    with workplace(output) as folder:
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            raise InputError(f"{info.path} has no frames in the span asked for", "check --start and --end")
        shift = first.time if start is not None or first.time < 0 else Fraction(0)
        limit = None if end is None else _seconds(end) - shift
        sound, notes = _sound(audio, info, container, folder, start, shift, limit)
        rest = _carried(tracks, info, container, folder, first.time, shift, limit)
        rest = replace(rest, tags=marked_tags(rest.tags)) if marked else rest
        layout = _layout_of_frame(first)
        size = first.rgb.shape[1], first.rgb.shape[0]
        full = info.colour.range == FULL_RANGE
        codec = check_encoding(layout, info.codec, output, wish, info.colour.transfer, full)
        if codec == "png" and layout.family != "gbr":  # the pixels that a reader of the source would have made
            layout = Layout("gbr", 8 if layout.bits == 8 else 16, layout.alpha)
        encoding = plan_encoding(codec, layout, size, container, wish, ffmpeg_exe(), info.mastering)
        if info.written_layout.alpha and not layout.alpha:
            notes.append(f"the transparency of {info.path.name} is not in these pictures")
        part, first_number = _part(output, folder, info, first)
        command = encode_command(info, layout, size, part, container, encoding, sound, rest, first_number)
        count, steady = _encode(chain([first], frames), command, info, layout, rest, shift, output)
        if container in ("sequence", "y4m") and not steady:
            notes.append("the source's frames are not equally long; numbered or raw pictures cannot say so")
        if output != PIPE:
            if marked:
                _mark(part)
            _check_output(output, overwrite)
            _publish(part, output, whole=start is None and end is None)
    return WriteResult(count, output, (*info.notes, *encoding.notes, *rest.notes, *notes))


def write_speech(
    path: Path, speech: Path, begin: float, seconds: float, repeat: float | None, own: tuple[Path, float, float] | None
) -> None:
    """Writes a WAV file of `seconds`: the sound of `speech` from `begin` on, silence after its end or the same again
    after `repeat` seconds; `own` is a file whose sound is mixed in, the second where that begins, its gain. Raises
    InputError, OutputError.
    """
    if repeat is not None:  # of exactly that length, which ffmpeg reckons otherwise
        once = path.with_name(f"once-{path.name}")
        write_speech(once, speech, 0.0, repeat, None, None)
        speech = once

    def part(file: Path, begin: float, gain: float, **options: Any) -> Any:
        with opened(file, sound=True) as container:  # times are those of `read_sound`, whatever the file begins with
            zero = clock_zero(container)
        heard = ffmpeg.input(Name(f"file:{file}"), itsoffset=f"{float(-zero):.6f}", **options, **input_options()).audio
        heard = heard.filter("aresample", 48000, first_pts=0, **{"async": 1})
        heard = heard.filter("atrim", start=begin, end=begin + seconds).filter("asetpts", "PTS-STARTPTS")
        return heard.filter("volume", gain).filter("apad", whole_dur=seconds)

    parts = [part(speech, begin, 1.0, **({} if repeat is None else {"stream_loop": -1}))]
    if own is not None:
        parts.append(part(*own, stream_loop=0))  # with an option of its own: ffmpeg-python takes equal inputs for one
    heard = ffmpeg.filter(parts, "amix", inputs=2, normalize=0) if own is not None else parts[0]
    written = ffmpeg.output(heard, Name(f"file:{path}"), acodec="pcm_s16le", ac=2, t=seconds)
    written = written.global_args("-copyts", "-v", "error")
    done = subprocess.run(written.compile(cmd=ffmpeg_exe()), capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        log = done.stderr.decode(errors="replace")
        if "No space left" in log:
            raise _failure(log, path)
        words = (log.splitlines() or ["it gave no reason"])[0]
        raise InputError(f"the sound of {speech} cannot be cut or mixed: {words}", "convert it to .wav")


def _sound(
    audio: Path | None,
    info: VideoInfo,
    container: str,
    folder: Path,
    start: float | None,
    shift: Fraction,
    limit: Fraction | None,
) -> tuple[list[Track], list[str]]:
    """The sound tracks for the output, and what the user should know of them."""
    if audio is None:
        return [], []
    own = _same_file(audio, info.path)
    offset = shift if start is None or own else Fraction(0)
    suffix = ".nut" if container == "nut" else container
    if container in ("sequence", "y4m"):
        return [], [f"the sound of {audio.name} is left out: there is no place for it"] if audio_codecs(audio) else []
    tracks = sound_tracks(audio, suffix, folder, offset, limit)
    if not tracks and not own:
        raise InputError(f"{audio} holds no sound", "name another file or leave the sound out")
    notes = []
    if not own:  # of its own the source has said so
        with opened(audio) as file:
            notes += unknown_sound(file, audio)
    if any(track.codec != "copy" for track in tracks):
        notes.append(f"the sound of {audio.name} does not fit into {suffix} and was encoded as AAC; .mkv would hold it")
    return tracks, notes


def _carried(
    tracks: Path | None,
    info: VideoInfo,
    container: str,
    folder: Path,
    first: Fraction,
    shift: Fraction,
    limit: Fraction | None,
) -> Carried:
    """What `tracks` gives the output beside pictures and sound."""
    if tracks is None or is_sequence(tracks):
        return Carried()
    frames = round((first - info.start) * info.fps)
    return carried(tracks, container, folder, shift, limit, frames, info.fps)


def _layout_of_frame(frame: Frame) -> Layout:
    """The layout of what is written for a frame."""
    return frame.original.layout if frame.original else Layout("gbr", 8 * frame.rgb.dtype.itemsize)


def _part(output: Path, folder: Path, info: VideoInfo, first: Frame) -> tuple[Path, int]:
    """Where to write until all is whole, and the number of the first picture of a sequence."""
    if output == PIPE:
        return output, 0
    number = 1
    if is_sequence(info.path):
        number = picture_numbers(info.path)[0] + round((first.time - info.start) * info.fps)
    return folder / (output.name if is_sequence(output) else f"part{output.suffix.lower()}"), number


def _mark(part: Path) -> None:
    """Puts the mark of an edit into what is whole. Raises OutputError."""
    try:
        for file in files_of(part):
            mark_file(file)
    except OSError as error:
        raise OutputError(f"{part.name} cannot be written: {error.strerror}", "free some space on that disk") from error


def _publish(part: Path, output: Path, whole: bool = True) -> None:
    """Moves what is whole to its name. Raises OutputError if there is nothing.

    Pictures of an older and longer sequence go if this is the `whole` of its source: beside a span they are the rest.
    """
    written = files_of(part)
    if not written:
        raise OutputError(f"nothing was written for {output}", "name another output")
    for file in written:
        os.replace(file, output.with_name(file.name) if is_sequence(output) else output)
    if whole and is_sequence(output):
        names = {file.name for file in written}
        for file in files_of(output):
            if file.name not in names:
                file.unlink()


def encode_command(
    info: VideoInfo,
    layout: Layout,
    size: tuple[int, int],
    output: Path,
    container: str,
    encoding: Encoding,
    sound: list[Track],
    rest: Carried,
    first_number: int = 1,
) -> list[str]:
    """The ffmpeg command that reads pictures of `layout` and `size` as NUT from standard input and writes `output`."""
    matrix = _matrix(info.colour.matrix, *size)  # of a crop, as its readers will guess
    tag = info.colour.matrix if info.colour.matrix in (UNSPECIFIED, matrix) else matrix
    levels = "pc" if info.colour.range == FULL_RANGE else "tv"
    # the probe sizes: ffmpeg shall not hoard pictures to guess a frame rate
    picture = ffmpeg.input("pipe:0", f="nut", probesize=32, analyzeduration=0, fpsprobesize=0, itsoffset=-LEAD)
    if encoding.pix_fmt != layout.name:
        conversion: dict[str, Any] = {"flags": "bicubic+accurate_rnd+full_chroma_int"}
        if layout.family == "gray":  # swscale knows no grey of limited range
            conversion["in_range"] = "tv" if info.colour.range == LIMITED_RANGE else "pc"
        elif layout.family == "yuv":
            conversion |= {"in_color_matrix": MATRICES[matrix], "in_range": levels}
        if not encoding.rgb:
            conversion |= {"out_color_matrix": MATRICES[matrix], "out_range": "tv" if encoding.limited else levels}
        picture = picture.filter("scale", **conversion)
    picture = (
        picture.filter("format", encoding.pix_fmt)
        .filter(
            "setparams",
            range=_written_range(info, encoding),
            color_primaries=info.colour.primaries,
            color_trc=info.colour.transfer,
            colorspace=0 if encoding.rgb else tag,
        )
        .filter("setsar", str(info.sample_aspect_ratio))
    )
    if container == "y4m":  # it has no times but a rate
        picture = picture.filter("settb", f"{1 / info.fps}").filter("setpts", "N")
    options: dict[str, Any] = {
        **encoding.options,
        "fps_mode": "passthrough",  # each frame keeps its time, none is dropped or doubled
        # of the pictures alone: sound that is encoded too would be told to lie up to half a step off
        "enc_time_base:v": str(1 / info.fps if container == "y4m" else info.time_base).replace("/", ":"),
    }
    if container == "sequence":
        options |= {"f": "image2", "start_number": first_number}
    elif container in ("nut", "y4m"):
        options["f"] = {"nut": "nut", "y4m": "yuv4mpegpipe"}[container]
    if info.rotation in (90, 270) and layout.across > 1 and layout == info.layout:
        # chroma that lay on the left pixel of two lies, after a quarter turn, on the upper or the lower
        options["chroma_sample_location"] = "top" if info.rotation == 90 else "bottom"
    return _output_command(picture, "pipe:0", options, output, container, sound, rest)


def _output_command(
    picture: Any,
    pictures: str,
    options: dict[str, Any],
    output: Path,
    container: str,
    sound: list[Track],
    rest: Carried,
) -> list[str]:
    """The command for a stream of ffmpeg-python whose input is `pictures`: with all that is copied into the output."""
    options = {**options, "disposition:v:0": rest.video_disposition}
    tags = {"v:0": rest.video_tags}
    if container in (".mp4", ".mov"):
        options["movflags"] = "+faststart"
    streams = [picture]
    count = {"a": 0, "s": 0, "t": 0}
    for track in [*sound, *rest.tracks]:
        early = {"itsoffset": -track.lead} if track.lead else {}
        source = ffmpeg.input(Name(f"file:{track.path}"), **early, **input_options())
        streams.append(source[f"{track.kind}:{track.number}"])
        place = f"{track.kind}:{count[track.kind]}"
        count[track.kind] += 1
        options[f"c:{place}"] = track.codec
        if track.codec == "aac":
            options[f"b:{place}"] = "192k"
        if track.kind != "t":
            tags[place] = track.tags
            options[f"disposition:{place}"] = track.disposition
    target = "pipe:1" if output == PIPE else f"file:{output}"
    if container == "sequence":
        target = pattern(output.absolute())  # image2 takes what stands before a colon for a protocol
    written = ffmpeg.output(*streams, Name(target), **options).overwrite_output().global_args("-copyts", "-v", "error")
    command = written.compile(cmd=ffmpeg_exe())
    # what ffmpeg-python has no way to say: options that repeat, and the number of an input. With the pictures come the
    # chapters.
    first = str([command[at + 1] for at, word in enumerate(command) if word == "-i"].index(pictures))
    more = ["-map_chapters", first, "-map_metadata", first]
    for place, named in tags.items():
        more += chain.from_iterable((f"-metadata:s:{place}", f"{key}={value}") for key, value in named.items())
    at = command.index(target)
    return [*command[:at], *more, *command[at:]]


def _written_range(info: VideoInfo, encoding: Encoding) -> int:
    """The tag of the range, by ffmpeg's numbers; where it says what the codec cannot hold, ffmpeg would convert."""
    if encoding.rgb:
        return FULL_RANGE
    if encoding.limited and info.colour.range == FULL_RANGE:
        return LIMITED_RANGE if encoding.codec == "prores" else 0
    return info.colour.range


class Pipe:
    """The standard input of ffmpeg, for PyAV to write to. Never raises; `broken` says that nobody reads any more."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.broken = False
        self.interrupt: BaseException | None = None  # a signal that came while it wrote: PyAV would lose it

    def write(self, data: bytes) -> int:
        if not self.broken:
            try:
                self.file.write(data)
            except OSError:
                self.broken = True
            except BaseException as interrupt:
                self.broken, self.interrupt = True, interrupt
        return len(data)


def _encode(
    frames: Iterable[Frame],
    command: list[str],
    info: VideoInfo,
    layout: Layout,
    rest: Carried,
    shift: Fraction,
    output: Path,
) -> tuple[int, bool]:
    """Runs ffmpeg on the frames; gives their number and whether they are equally long. Raises OutputError."""
    return _run(command, lambda pipe: _feed(frames, pipe, info, layout, rest, shift), output)


def _run(command: list[str], feed: Callable[["Pipe"], T], output: Path) -> T:
    """Runs ffmpeg on what `feed` writes into its standard input; gives what `feed` returns. Raises OutputError."""
    stdout = None if output == PIPE else subprocess.DEVNULL
    try:  # a session of its own: Ctrl-C is for us, who then stop it
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise OutputError(f"{command[0]} does not run: {error.strerror}", "check DPE_FFMPEG") from error
    log = bytearray()
    listener = threading.Thread(target=_listen, args=(process.stderr, log), daemon=True, name="ffmpeg's words")
    listener.start()
    pipe = Pipe(process.stdin)
    try:
        fed = feed(pipe)
        if pipe.interrupt:
            raise pipe.interrupt
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        listener.join()
        process.stderr.close()
    if process.returncode or pipe.broken:
        raise _failure(log.decode(errors="replace"), output)
    return fed


def _listen(stderr: BinaryIO, log: bytearray) -> None:
    """Takes what ffmpeg says, so that it never waits, and keeps the beginning: it may say much of a hostile file."""
    while block := stderr.read(1 << 12):
        if len(log) < LOG_BYTES:
            log.extend(block)


def _feed(
    frames: Iterable[Frame], pipe: Pipe, info: VideoInfo, layout: Layout, rest: Carried, shift: Fraction
) -> tuple[int, bool]:
    """Writes frames as NUT with chapters and tags; stops where nobody reads any more. Gives what `_encode` does."""
    # without an index and the points to seek to, of which NUT would keep one for each frame until the end
    lean = {"write_index": "0", "syncpoints": "none", "strict": "experimental"}
    container = av.open(pipe, "w", format="nut", container_options=lean)
    container.metadata.update(rest.tags)
    container.set_chapters(list(rest.chapters))
    stream, count, first, steady = None, 0, None, True
    try:
        for frame in frames:
            if stream is None:
                stream = container.add_stream("rawvideo", rate=info.fps)  # the last frame lasts 1 / rate
                stream.height, stream.width = frame.rgb.shape[:2]
                stream.pix_fmt = layout.name
                stream.time_base = stream.codec_context.time_base = info.time_base
                first = frame.time
            elif frame.rgb.shape != (stream.height, stream.width, 3):
                raise ValueError(
                    f"frame {frame.index} is {frame.rgb.shape}, the first was {stream.height, stream.width, 3}"
                )
            picture = frame_of(_planes(frame, layout), layout)
            picture.pts = round((frame.time - shift + LEAD) / info.time_base)
            picture.time_base = info.time_base
            container.mux(stream.encode(picture))
            if pipe.broken:
                return count, steady
            steady = steady and abs((frame.time - first) * info.fps - count) < Fraction(1, 2)
            count += 1
        container.mux(stream.encode())
    except BaseException:
        pipe.broken = True  # closing must not wait for ffmpeg
        raise
    finally:
        container.close()
    return count, steady


def _planes(frame: Frame, layout: Layout) -> tuple[np.ndarray, ...]:
    """The planes to be written for a frame: its original's where these have the layout, else its RGB."""
    if frame.original and frame.original.layout == layout:
        return frame.original.edited(frame.rgb)
    red, green, blue = cv2.split(frame.rgb)
    if not layout.alpha:
        return green, blue, red
    alpha, bits = frame.original.planes[-1], frame.original.layout.bits
    return green, blue, red, alpha if bits == 8 else (alpha << (16 - bits)) | (alpha >> (2 * bits - 16))


def _failure(log: str, output: Path) -> OutputError:
    """What to tell of ffmpeg's own words."""
    if output == PIPE and "Broken pipe" in log:
        return OutputError("standard output was closed before the end of the video", "let its reader read on")
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it gave no reason"]
    full = next((line for line in lines if "No space left" in line), None)
    remedy = "free some space on that disk" if full else "check that folder and, if it is set, DPE_FFMPEG"
    return OutputError(f"ffmpeg could not write {output}: {full or lines[0]}", remedy)


def _check_output(output: Path, overwrite: bool) -> None:
    if output != PIPE and (existing := files_of(output)) and not (overwrite and existing[0].is_file()):
        raise OutputError(f"{existing[0]} exists", "choose another output or add --overwrite")


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` for what is not yet whole, removed whatever happens. Raises OutputError.

    On the disk of `output`, whatever --temp says: what is whole takes its name in one step.
    """
    with scratch(output) if output == PIPE else hidden_folder(output.parent) as folder:
        yield folder


@contextlib.contextmanager
def sealed(output: Path, seal: Callable[[Path], None] | None, overwrite: bool) -> Iterator[Path]:
    """Where to write an output that `seal` is to change before it appears; `output` itself without one.

    Raises OutputError.
    """
    if seal is None:
        yield output
        return
    with workplace(output) as folder:
        part = folder / output.name
        yield part
        seal(part)
        _check_output(output, overwrite)
        _publish(part, output)


# Joining parts


def join_video(
    parts: Sequence[Path],
    times: Sequence[Fraction],
    info: VideoInfo,
    output: Path,
    folder: Path,
    *,
    audio: Path | None = None,
    tracks: Path | None = None,
    start: float | None = None,
    end: float | None = None,
    overwrite: bool = False,
    ready: Callable[[Path], None] = lambda part: None,
) -> WriteResult:
    """The edited video that `write_video` would have written of all frames at once, of parts that it wrote one by one.

    `parts` were written with `start`, so that each begins at 0; `times` are those of all frames, in order. Their
    packets are copied, not encoded again; sound and all else come from `audio` and `tracks` as in `write_video`.
    `folder`, on the same disk as `output`, takes what is not yet whole, twice the size of the video;
    `ready` gets the whole file before that takes its name.
    Raises InputError for parts that do not belong together, OutputError.
    """
    container = container_of(output)
    if container not in (".mp4", ".mov", ".mkv"):
        raise OutputError(f"{output} cannot be joined of parts", "name an .mp4, .mov or .mkv")
    shift = times[0] if start is not None or times[0] < 0 else Fraction(0)
    limit = None if end is None else _seconds(end) - shift
    sound, notes = _sound(audio, info, container, folder, start, shift, limit)
    rest = _carried(tracks, info, container, folder, times[0], shift, limit)
    rest = replace(rest, tags=marked_tags(rest.tags))
    joined, part = folder / f"joined{container}", folder / f"part{container}"
    shown = _concatenate(parts, [round((time - shift) / info.time_base) for time in times], info, joined, rest)
    picture = ffmpeg.input(Name(f"file:{joined}"))["v:0"]
    options = {"c:v": "copy"} | ({"r:v": str(info.fps)} if container == ".mkv" else {})  # MP4 would count time in it
    if shown and container == ".mkv":  # PyAV has no way to say it there
        options["aspect"] = f"{shown.numerator}:{shown.denominator}"
    command = _output_command(picture, f"file:{joined}", options, part, container, sound, rest)
    _run(command, lambda pipe: None, output)
    joined.unlink()
    _mark(part)
    ready(part)
    _check_output(output, overwrite)
    _publish(part, output)
    return WriteResult(len(times), output, (*info.notes, *rest.notes, *notes))


def _concatenate(
    parts: Sequence[Path], ticks: list[int], info: VideoInfo, output: Path, rest: Carried
) -> Fraction | None:
    """Writes the packets of all parts, each shown at its tick of the time base, with chapters and tags.

    Gives width / height of the pictures as they are shown, None where pixels are square.

    The times of decoding are those of one encoding: the sorted times of showing, later by as many frames as pictures
    wait at most for others.
    """
    orders = [_order(path) for path in parts]
    if sum(len(ranks) for ranks, _ in orders) != len(ticks):
        raise InputError("the segments do not hold the planned frames", "make them anew with: dpe edit --segment")
    late = min(max(late for _, late in orders), len(ticks) - 1)
    lead = ticks[late] - ticks[0]
    length = round(1 / info.fps / info.time_base)
    base, number, settings, shape = 0, 0, None, Fraction(1)
    try:
        with av.open(f"file:{output}", "w") as target:
            for path, (ranks, _) in zip(parts, orders, strict=True):
                with av.open(f"file:{path}", options=input_options()) as source:
                    (stream,) = source.streams.video
                    if number == 0:
                        settings, copy = stream.codec_context.extradata, target.add_stream_from_template(stream)
                        copy.time_base = info.time_base
                        # what a template forgets, and some streams know by their container alone
                        shape = Fraction(stream.sample_aspect_ratio or 1)
                        copy.codec_context.sample_aspect_ratio = shape
                        if output.suffix != ".mkv":
                            copy.codec_context.codec_tag = stream.codec_context.codec_tag
                        target.metadata.update(rest.tags)
                        led = [{**each, **_without_lead(each)} for each in rest.chapters]
                        target.set_chapters(led)
                    elif stream.codec_context.extradata != settings:
                        raise InputError(
                            f"{path.name} was encoded otherwise than {parts[0].name}",
                            "make all segments with the same dpe and the same ffmpeg",
                        )
                    for packet in source.demux(stream):
                        if packet.pts is None:  # the empty one at the end
                            continue
                        packet.time_base = info.time_base
                        packet.pts = ticks[base + ranks[packet.pts]]
                        packet.dts = ticks[number - late] if number >= late else ticks[number] - lead
                        packet.duration = length
                        packet.stream = copy
                        target.mux(packet)
                        number += 1
                base += len(ranks)
    except av.FFmpegError as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = "free some space on that disk" if full else "make the segments anew"
        raise OutputError(f"the segments cannot be joined: {error.strerror}", remedy) from error
    return None if shape == 1 else shape * copy.codec_context.width / copy.codec_context.height


def _order(path: Path) -> tuple[dict[int, int], int]:
    """For each time of showing in a part its place among them, and for how many pictures one waits at most."""
    shown, before = [], 0
    try:
        with av.open(f"file:{path}", options=input_options()) as source:
            for packet in source.demux(video=0):
                if packet.pts is not None:
                    before += packet.dts is None or packet.dts < 0
                    shown.append(packet.pts)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} is missing or damaged", "make this segment anew") from error
    ranks = {pts: rank for rank, pts in enumerate(sorted(shown))}
    return ranks, max(before, max((number - ranks[pts] for number, pts in enumerate(shown)), default=0))


def _without_lead(chapter: dict[str, Any]) -> dict[str, int]:
    """The times of a chapter for a file that is not NUT."""
    lead = round(LEAD / Fraction(chapter["time_base"]))
    return {edge: chapter[edge] - lead for edge in ("start", "end")}


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
