"""Video in, video out: the only place, with `container.py` below it, that knows ffmpeg, PyAV and BGR.

Time. `Frame.time` is an exact Fraction of seconds. In containers whose zero means something (MP4, MOV, Matroska, AVI)
it is the frame's presentation time as it stands in the file, so a source that starts at 0.5 s gives an output that
starts at 0.5 s. MPEG streams count from an arbitrary clock; there zero is the start of the first track.

Writing. Frames go as raw pictures with their times (a NUT stream made by PyAV) through a pipe into the ffmpeg program,
which encodes them and copies the sound from its file. MP4 and MOV then hold each time exactly; Matroska counts in
whole milliseconds, so there a time is within half a millisecond.
"""

import contextlib
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import cv2
import ffmpeg
import imageio_ffmpeg
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from dpe_cli.container import (
    COPIED,
    LEAD,
    Sound,
    check_whole,
    clock_zero,
    cut_sound,
    decoded,
    holds_image,
    opened,
    rotation,
    sound_streams,
    track_codecs,
    turn,
    video_stream,
)
from dpe_cli.container import audio_codecs as audio_codecs  # also from here
from dpe_cli.errors import InputError, OutputError

UNSPECIFIED = 2  # of ITU-T H.273, for primaries, transfer and matrix
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}  # H.273 -> swscale
SAME_MATRIX = {6: 5, 10: 9}  # equal numbers under another name, for PyAV
# The default of swscale is faster (1080p: 4 against 9 ms of CPU) but darkens every picture by 1 to 2 levels of 255.
EXACT = 2 | 0x40000 | 0x2000  # bilinear, accurate rounding, full chroma: numbers, as PyAV 17 has no names for them
FULL_RANGE = 2  # of ffmpeg: 0 unspecified, 1 limited (tv), 2 full (pc)


@dataclass(frozen=True)
class Frame:
    """One picture of a video."""

    index: int  # from 0, within what was read
    time: Fraction  # seconds; see the top of this file
    rgb: np.ndarray  # (H, W, 3) uint8 RGB, upright


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
    duration: float = 0.0  # seconds, the container's claim
    time_base: Fraction = Fraction(1, 90000)  # 1/n seconds, a whole fraction of the file's own: holds each time exactly
    has_audio: bool = False
    is_image: bool = False
    pix_fmt: str = ""
    codec: str = ""
    colour: Colour = field(default_factory=Colour)
    rotation: int = 0  # degrees clockwise that make it upright: 0, 90, 180, 270
    sample_aspect_ratio: Fraction = Fraction(1)  # width / height of one pixel of the upright picture


@dataclass(frozen=True)
class WriteResult:
    """What was written, and what the user should know about it."""

    frames: int
    path: Path
    notes: tuple[str, ...] = ()


def ffmpeg_exe() -> str:
    """The ffmpeg program: what DPE_FFMPEG names (5.1 or newer), else the one of imageio-ffmpeg. Raises InputError."""
    if named := os.environ.get("DPE_FFMPEG"):
        return named
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise InputError("no ffmpeg program was found", "reinstall imageio-ffmpeg or set DPE_FFMPEG") from error


# Reading


def probe(path: Path) -> VideoInfo:
    """What is in `path`; decodes one picture, so that what is not decodable is known here.

    Raises InputError if the file is missing, is no video or picture, or is cut short.
    """
    path = Path(path)
    with opened(path) as container:
        stream = video_stream(container, path)
        if holds_image(container):
            height, width = read_image(path).shape[:2]
            return VideoInfo(path, width, height, Fraction(25), 1, is_image=True, codec=stream.codec_context.name)
        check_whole(container, path)
        frame = next(decoded(container, stream, path), None)
        if frame is None:
            raise InputError(f"{path} holds no picture that can be decoded", "check that a player can show it")
        return _info(path, container, stream, frame)


def _info(path: Path, container: InputContainer, stream: VideoStream, frame: av.VideoFrame) -> VideoInfo:
    fps = stream.average_rate or stream.guessed_rate or Fraction(25)
    span = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, av.time_base)
    aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)  # 0 means unknown
    turned, _, _ = turn(frame)
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    levels = FULL_RANGE if frame.format.name.startswith("yuvj") else int(frame.color_range)
    tags = Colour(levels, int(frame.color_primaries), int(frame.color_trc), int(frame.colorspace))
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
        colour=Colour() if frame.format.is_rgb else tags,
        rotation=rotation(frame),
        sample_aspect_ratio=1 / aspect if turned else aspect,
    )


def read_frames(path: Path, start: float | None = None, end: float | None = None) -> Iterator[Frame]:
    """The frames with start <= time < end (seconds, as in `Frame.time`), one at a time; a still gives one at 0.

    Upright and 8 bits a channel, whatever the file holds: 10-bit sources are rounded for now. Times rise strictly:
    a missing one is reckoned from the rate, one that repeats is moved on by a millisecond. Raises InputError.
    """
    info, start, end = probe(path), _seconds(start), _seconds(end)
    if info.is_image:
        yield Frame(0, Fraction(0), read_image(path))
        return
    to_rgb, index, turned = VideoReformatter(), 0, None
    for time, frame in _timed(info, start):
        turned = turned or turn(frame)  # asked once: PyAV holds a frame that was asked until garbage is collected
        if end is not None and time >= end:
            return
        if start is None or time >= start:
            yield Frame(index, time, _upright_rgb(frame, info, turned, to_rgb))
            index += 1


def _seconds(value: float | None) -> Fraction | None:
    """What was meant by a float of seconds: 0.04 is 1/25, not a hair more."""
    return None if value is None else Fraction(value).limit_denominator(1_000_000)


def _timed(info: VideoInfo, start: Fraction | None) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decoded frames with times, from the last key frame before `start`, or from the first where seeking fails."""
    for seek in (True, False) if start else (False,):
        with opened(info.path) as container:
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
            last = None
            for frame in chain([first], frames):
                stamp = frame.pts
                if numbered:
                    stamp = None if None in (frame.dts, first.dts) else frame.dts - first.dts
                last = _after(last, None if stamp is None else stamp * stream.time_base - zero, info)
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


def _upright_rgb(
    frame: av.VideoFrame, info: VideoInfo, turn: tuple[bool, bool, bool], to_rgb: VideoReformatter
) -> np.ndarray:
    """(H, W, 3) uint8 of the size that `info` says, even where a stream changes its size midway."""
    turned, mirrored, upside_down = turn
    matrix = _matrix(info.colour.matrix, info.width, info.height)
    rgb = to_rgb.reformat(
        frame,
        width=info.height if turned else info.width,
        height=info.width if turned else info.height,
        format="rgb24",
        interpolation=EXACT,
        src_colorspace=Colorspace(SAME_MATRIX.get(matrix, matrix)),
        src_color_range=ColorRange.JPEG if info.colour.range == FULL_RANGE else ColorRange.MPEG,
    ).to_ndarray()
    rgb = rgb.transpose(1, 0, 2) if turned else rgb
    return np.ascontiguousarray(rgb[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _matrix(tag: int, width: int, height: int) -> int:
    """The H.273 number of the YUV matrix; an unspecified one is guessed from the size, as players do."""
    return tag if tag in MATRICES else 1 if width >= 1280 or height > 576 else 6


def _fine(time_base: Fraction) -> Fraction:
    """1/n with n >= 10000, of which `time_base` is a whole multiple: leaves room for times between its own."""
    return Fraction(1, time_base.denominator * math.ceil(Fraction(10000, time_base.denominator)))


def read_image(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, turned upright by its EXIF tag, transparency dropped. Raises InputError."""
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "check the name") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as a picture", "give a PNG or JPEG file") from error
    return decode_image(data, str(path))


def decode_image(data: np.ndarray, name: str) -> np.ndarray:
    """The same from the bytes of the file, (N,) uint8; `name` is for the complaint."""
    try:
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise InputError(f"{name} cannot be read as a picture", "give a PNG or JPEG file") from error
    if bgr is None:
        raise InputError(f"{name} cannot be read as a picture", "give a whole PNG or JPEG file")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def write_image(path: Path, rgb: np.ndarray) -> None:
    """Writes (H, W, 3) uint8 RGB as PNG or JPEG, as the name says; replaces what is there. Raises OutputError."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise OutputError(f"{path} cannot hold a picture", "name a .png or .jpg")
    options = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    with _workplace(path) as folder:
        try:
            (folder / path.name).write_bytes(data)
            os.replace(folder / path.name, path)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", "free some space or name another"
            ) from error


# Writing


def write_video(
    frames: Iterable[Frame],
    info: VideoInfo,
    output: Path,
    *,
    audio: Path | None = None,
    start: float | None = None,
    end: float | None = None,
    overwrite: bool = False,
    crf: int = 17,
    preset: str = "medium",
) -> WriteResult:
    """Writes `frames`, all of one size, each at its own time, with all sound tracks of `audio`, packets unchanged.

    `info` gives the exactness of time, the colour tags and the shape of a pixel. `start` and `end` are those that the
    frames were read with: sound of `info.path` is cut to the same span, to the packet; with `start` the output begins
    with its first frame at 0, and sound of another file begins with the output and is cut to its length. Without
    `end` sound is never cut at its end. Sound that the container cannot hold is encoded as AAC, which the notes say.
    Odd sizes are kept by writing 4:4:4: H.264 with 4:2:0 has only even ones.
    The file appears under its name when it is whole. Raises OutputError, InputError and whatever `frames` raises.
    """
    output = Path(output)
    _check_output(output, overwrite)
    suffix = output.suffix.lower()
    codecs = track_codecs(audio, suffix) if audio else ()
    if audio and not codecs and not _same_file(audio, info.path):
        raise InputError(f"{audio} holds no sound", "name another file or leave the sound out")
    with _workplace(output) as folder:
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            raise InputError(f"{info.path} has no frames in the span asked for", "check --start and --end")
        shift = first.time if start is not None or first.time < 0 else Fraction(0)
        sound = None
        if codecs:
            offset = shift if start is None or _same_file(audio, info.path) else Fraction(0)
            limit = None if end is None else _seconds(end) - shift
            sound = Sound(cut_sound(audio, folder, offset, limit, negative=suffix != ".mkv"), codecs)
        size = first.rgb.shape[1], first.rgb.shape[0]
        part = folder / f"part{suffix}"
        command = encode_command(info, size, part, sound, crf, preset)
        count = _encode(chain([first], frames), command, info, shift, output)
        _check_output(output, overwrite)
        os.replace(part, output)
    return WriteResult(count, output, tuple(_notes(size, audio, codecs, output)))


def encode_command(
    info: VideoInfo, size: tuple[int, int], output: Path, sound: Sound | None, crf: int, preset: str
) -> list[str]:
    """The ffmpeg command that reads rgb24 of `size` (width, height) as NUT from standard input and writes `output`."""
    odd = size[0] % 2 or size[1] % 2
    matrix = _matrix(info.colour.matrix, *size)
    tag = info.colour.matrix if info.colour.matrix in (UNSPECIFIED, matrix) else matrix
    picture = (
        # the probe sizes: ffmpeg shall not hoard pictures to guess a frame rate
        ffmpeg.input("pipe:0", f="nut", probesize=32, analyzeduration=0, fpsprobesize=0, itsoffset=-LEAD)
        .filter(
            "scale",
            out_color_matrix=MATRICES[matrix],
            out_range="pc" if info.colour.range == FULL_RANGE else "tv",
            flags="bicubic+accurate_rnd+full_chroma_int",
        )
        .filter("format", "yuv444p" if odd else "yuv420p")
        .filter(
            "setparams",
            range=info.colour.range,
            color_primaries=info.colour.primaries,
            color_trc=info.colour.transfer,
            colorspace=tag,
        )
        .filter("setsar", str(info.sample_aspect_ratio))
    )
    options: dict[str, Any] = {
        "c:v": "libx264",
        "crf": crf,
        "preset": preset,
        "fps_mode": "passthrough",  # each frame keeps its time, none is dropped or doubled
        "enc_time_base": f"{info.time_base.numerator}:{info.time_base.denominator}",
        "map_chapters": -1,
    }
    if output.suffix in (".mp4", ".mov"):
        options["movflags"] = "+faststart"
    streams = [picture]
    if sound:
        lead = {"itsoffset": -LEAD} if sound.path.suffix == ".nut" else {}
        source = ffmpeg.input(f"file:{sound.path}", **lead)
        for track, codec in enumerate(sound.codecs):
            streams.append(source[f"a:{track}"])
            options[f"c:a:{track}"] = codec
            if codec != "copy":
                options[f"b:a:{track}"] = "192k"
    written = ffmpeg.output(*streams, f"file:{output}", **options).overwrite_output()
    return written.global_args("-copyts", "-v", "error").compile(cmd=ffmpeg_exe())


class Pipe:
    """The standard input of ffmpeg, for PyAV to write to. Never raises; `broken` says that nobody reads any more."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.broken = False

    def write(self, data: bytes) -> int:
        if not self.broken:
            try:
                self.file.write(data)
            except OSError:
                self.broken = True
        return len(data)


def _encode(frames: Iterable[Frame], command: list[str], info: VideoInfo, shift: Fraction, output: Path) -> int:
    """Runs ffmpeg on the frames; gives their number. Raises OutputError with ffmpeg's own words."""
    with tempfile.TemporaryFile() as log:  # a file, not a pipe: ffmpeg may say much before anybody listens
        try:  # a session of its own: Ctrl-C is for us, who then stop it
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise OutputError(f"{command[0]} does not run: {error.strerror}", "check DPE_FFMPEG") from error
        pipe = Pipe(process.stdin)
        try:
            count = _feed(frames, pipe, info, shift)
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
        if process.returncode or pipe.broken:
            log.seek(0)
            raise _failure(log.read().decode(errors="replace"), output)
    return count


def _feed(frames: Iterable[Frame], pipe: Pipe, info: VideoInfo, shift: Fraction) -> int:
    """Writes frames as NUT; stops where nobody reads any more."""
    container = av.open(pipe, "w", format="nut")
    stream, count = None, 0
    try:
        for frame in frames:
            if stream is None:
                stream = container.add_stream("rawvideo", rate=info.fps)  # the last frame lasts 1 / rate
                stream.height, stream.width = frame.rgb.shape[:2]
                stream.pix_fmt = "rgb24"
                stream.time_base = stream.codec_context.time_base = info.time_base
            elif frame.rgb.shape != (stream.height, stream.width, 3):
                raise ValueError(
                    f"frame {frame.index} is {frame.rgb.shape}, the first was {stream.height, stream.width, 3}"
                )
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.rgb), format="rgb24")
            picture.pts = round((frame.time - shift + LEAD) / info.time_base)
            picture.time_base = info.time_base
            container.mux(stream.encode(picture))
            if pipe.broken:
                return count
            count += 1
        container.mux(stream.encode())
    except BaseException:
        pipe.broken = True  # closing must not wait for ffmpeg
        raise
    finally:
        container.close()
    return count


def _failure(log: str, output: Path) -> OutputError:
    """What to tell of ffmpeg's own words."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it gave no reason"]
    full = next((line for line in lines if "No space left" in line), None)
    remedy = "free some space on that disk" if full else "check that folder and, if it is set, DPE_FFMPEG"
    return OutputError(f"ffmpeg could not write {output}: {full or lines[0]}", remedy)


def _notes(size: tuple[int, int], audio: Path | None, codecs: tuple[str, ...], output: Path) -> Iterator[str]:
    """What the user should know of the output."""
    if size[0] % 2 or size[1] % 2:
        yield f"{size[0]}x{size[1]} is odd: {output.name} is H.264 4:4:4, which some players cannot show"
    if "aac" in codecs:
        yield f"the sound of {audio.name} does not fit into {output.suffix} and was encoded as AAC; .mkv would hold it"


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() not in COPIED:
        raise OutputError(f"{output} cannot hold the video", "name an .mp4, .mov or .mkv")
    if output.exists() and not (overwrite and output.is_file()):
        raise OutputError(f"{output} exists", "choose another output or add --overwrite")


@contextlib.contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` for what is not yet whole, removed whatever happens. Raises OutputError."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".dpe-", dir=output.parent)
    except FileNotFoundError as error:
        raise OutputError(f"the folder {output.parent} does not exist", "make it or name another") from error
    except OSError as error:
        raise OutputError(
            f"nothing can be written in {output.parent}: {error.strerror}", "name another folder"
        ) from error
    with folder as name:
        yield Path(name)


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
