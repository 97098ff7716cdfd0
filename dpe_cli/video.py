"""Video in. With `container.py` below it and `writer.py` above it the only place that knows ffmpeg, PyAV and BGR.

Time. `Frame.time` is an exact Fraction of seconds. In containers whose zero means something (MP4, MOV, Matroska, AVI)
it is the frame's presentation time as it stands in the file, so a source that starts at 0.5 s gives an output that
starts at 0.5 s. MPEG streams count from an arbitrary clock; there zero is the start of the first track.

Pixels. `Frame.rgb` is what networks see and edits change. A frame that was read `exact` also has its file's own planes
(`Frame.original`); these are written, with the changed pixels of `rgb` put in: what was not edited is not converted.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, product
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from dpe_cli.container import (
    check_jump,
    check_whole,
    clock_zero,
    decoded,
    holds_image,
    is_sequence,
    opened,
    rotation,
    side_data,
    sound_streams,
    turn,
    video_stream,
)
from dpe_cli.encoding import Mastering
from dpe_cli.errors import InputError
from dpe_cli.limits import check_file, check_seconds, limits
from dpe_cli.planes import CHROMA, Layout, Original, frame_of, layout_of, oriented, planes_of
from dpe_cli.tracks import unknown_sound

UNSPECIFIED = 2  # of ITU-T H.273, for primaries, transfer and matrix
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}  # H.273 -> swscale
SAME_MATRIX = {6: 5, 10: 9}  # equal numbers under another name, for PyAV
# The default of swscale is faster (1080p: 4 against 9 ms of CPU) but darkens every picture by 1 to 2 levels of 255.
EXACT = 2 | 0x40000 | 0x2000  # bilinear, accurate rounding, full chroma: numbers, as PyAV 17 has no names for them
LIMITED_WHITE = 65283  # what swscale makes of 235 of 255, or 940 of 1023, in 16 bits
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
    info, start, end = probe(path, fps), to_seconds(start), to_seconds(end)
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


def to_seconds(value: float | None) -> Fraction | None:
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
    matrix = matrix_of(info.colour.matrix, info.width, info.height)
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


def matrix_of(tag: int, width: int, height: int) -> int:
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
