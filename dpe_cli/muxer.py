"""The ffmpeg program at work: its commands, frames through a pipe into it, and what it says when it fails.

Frames go as raw pictures with their times (a NUT stream made by PyAV) into the program, which encodes them and copies
all other tracks from their file. MP4 and MOV then hold each time exactly; Matroska counts in whole milliseconds, so
there a time is within half a millisecond.
"""

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import av
import cv2
import ffmpeg
import imageio_ffmpeg
import numpy as np

from dpe_cli.container import PIPE, input_options, no_room, pattern
from dpe_cli.encoding import Encoding
from dpe_cli.errors import InputError, OutputError
from dpe_cli.planes import Layout, frame_of
from dpe_cli.tracks import LEAD, Carried, Track
from dpe_cli.video import FULL_RANGE, LIMITED_RANGE, MATRICES, UNSPECIFIED, Frame, VideoInfo, matrix_of

T = TypeVar("T")
LOG_BYTES = 1 << 16
TOO_LARGE = -getattr(signal, "SIGXFSZ", 1 << 16)  # the end of a program that writes more than `ulimit -f` allows


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
    matrix = matrix_of(info.colour.matrix, *size)  # of a crop, as its readers will guess
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
    return output_command(picture, "pipe:0", options, output, container, sound, rest)


def output_command(
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


def encode(
    frames: Iterable[Frame],
    command: list[str],
    info: VideoInfo,
    layout: Layout,
    rest: Carried,
    shift: Fraction,
    output: Path,
) -> tuple[int, bool]:
    """Runs ffmpeg on the frames; gives their number and whether they are equally long. Raises OutputError."""
    return run_ffmpeg(command, lambda pipe: _feed(frames, pipe, info, layout, rest, shift), output)


def run_ffmpeg(command: list[str], feed: Callable[["Pipe"], T], output: Path) -> T:
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
        raise failure(words_of(log, process.returncode), output)
    return fed


def words_of(log: bytes, code: int) -> str:
    """What ffmpeg said; where it was ended for a file that grew too large, what the system says of that."""
    return os.strerror(errno.EFBIG) if code == TOO_LARGE else log.decode(errors="replace")


def _listen(stderr: BinaryIO, log: bytearray) -> None:
    """Takes what ffmpeg says, so that it never waits, and keeps the beginning: it may say much of a hostile file."""
    while block := stderr.read(1 << 12):
        if len(log) < LOG_BYTES:
            log.extend(block)


def _feed(
    frames: Iterable[Frame], pipe: Pipe, info: VideoInfo, layout: Layout, rest: Carried, shift: Fraction
) -> tuple[int, bool]:
    """Writes frames as NUT with chapters and tags; stops where nobody reads any more. Gives what `encode` does."""
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


def failure(log: str, output: Path) -> OutputError:
    """What to tell of ffmpeg's own words."""
    if output == PIPE and "Broken pipe" in log:
        return OutputError("standard output was closed before the end of the video", "let its reader read on")
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it gave no reason"]
    full = next((line for line in lines if no_room(line)), None)
    remedy = no_room(full) if full else "check that folder and, if it is set, DPE_FFMPEG"
    return OutputError(f"ffmpeg could not write {output}: {full or lines[0]}", remedy)
