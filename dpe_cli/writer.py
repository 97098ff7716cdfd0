"""Video out: pictures and sound to files that appear when they are whole, and parts joined to one file.

The time and the pixels of frames are those of `video.py`.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import cv2
import ffmpeg
import numpy as np

from dpe_cli.container import (
    NO_ROOM,
    PIPE,
    clock_zero,
    files_of,
    input_options,
    is_sequence,
    no_room,
    opened,
    picture_numbers,
)
from dpe_cli.encoding import HDR, Wish, check_encoding, container_of, plan_encoding
from dpe_cli.errors import InputError, OutputError
from dpe_cli.limits import hidden_folder, scratch
from dpe_cli.marks import mark_file, marked_picture, marked_tags
from dpe_cli.muxer import Name, encode, encode_command, failure, ffmpeg_exe, output_command, run_ffmpeg, words_of
from dpe_cli.planes import Layout
from dpe_cli.tracks import LEAD, Carried, Track, audio_codecs, carried, sound_tracks, unknown_sound_of
from dpe_cli.video import FULL_RANGE, Frame, VideoInfo, to_seconds

CROP = Layout("gbr")  # of pictures that are no frames of their source


@dataclass(frozen=True)
class WriteResult:
    """What was written, and what the user should know about it."""

    frames: int
    path: Path
    notes: tuple[str, ...] = ()


# Pictures


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


# Videos


def check_writable(info: VideoInfo, output: Path, wish: Wish, crop: bool = False) -> None:
    """Finds out, before any work is done, whether `output` can hold such pictures. Raises InputError, OutputError.

    crop: these are not the source's frames, and have neither its transparency nor its depth.
    """
    layout, full_range = CROP if crop else info.written_layout, info.colour.range == FULL_RANGE
    check_encoding(layout, info.codec, output, wish, info.colour.transfer, full_range)


def lost(info: VideoInfo, layout: Layout = CROP) -> list[str]:
    """What pictures of a layout lack of their source, for the user."""
    own, notes = info.written_layout, []
    if own.alpha and not layout.alpha:
        notes.append(f"the transparency of {info.path.name} is not in these pictures")
    if own.bits > layout.bits:
        hdr = HDR.get(info.colour.transfer)
        bands = f", which show bands in {hdr} HDR" if hdr else ""
        notes.append(f"{info.path.name} has {own.bits} bits a channel, these pictures have {layout.bits}{bands}")
    return notes


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
    whole: bool | None = None,
) -> WriteResult:
    """Writes `frames`, all of one size, each at its own time, with all sound tracks of `audio`, packets unchanged.

    `tracks` is the file whose subtitles, chapters, timecode, dispositions and tags the output gets.
    `info` gives the exactness of time, the colour tags and the shape of a pixel. `start` and `end` are those that the
    frames were read with: sound of `info.path` is cut to the same span, to the packet; with `start` the output begins
    with its first frame at 0, and sound of another file begins with the output and is cut to its length. Without
    `end` sound is never cut at its end. Sound that the container cannot hold is encoded as AAC, which the notes say.
    Frames with an original are written in its format where the codec has it, see `dpe_cli.encoding`.
    `marked`: as an edited video, see `dpe_cli.marks`. `whole`: these are all pictures that are wanted of a sequence, so
    that those of an older and longer one go; None: they are without `start` and `end`.

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
        limit = None if end is None else to_seconds(end) - shift
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
        notes += lost(info, layout)
        part, first_number = _part(output, folder, info, first)
        command = encode_command(info, layout, size, part, container, encoding, sound, rest, first_number)
        count, steady = encode(chain([first], frames), command, info, layout, rest, shift, output)
        if container in ("sequence", "y4m") and not steady:
            notes.append("the source's frames are not equally long; numbered or raw pictures cannot say so")
        if output != PIPE:
            if marked:
                _mark(part)
            _check_output(output, overwrite)
            _publish(part, output, whole=(start is None and end is None) if whole is None else whole)
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
        log = words_of(done.stderr, done.returncode)
        if no_room(log):
            raise failure(log, path)
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
        notes += unknown_sound_of(audio)
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

    Pictures of an older and longer sequence go if this is the `whole`: beside a span they are the rest.
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


def _check_output(output: Path, overwrite: bool) -> None:
    if output != PIPE and (existing := files_of(output)) and not (overwrite and existing[0].is_file()):
        raise OutputError(f"{existing[0]} exists", "choose another output or add --overwrite")


# What is not yet whole


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
    limit = None if end is None else to_seconds(end) - shift
    sound, notes = _sound(audio, info, container, folder, start, shift, limit)
    rest = _carried(tracks, info, container, folder, times[0], shift, limit)
    rest = replace(rest, tags=marked_tags(rest.tags))
    joined, part = folder / f"joined{container}", folder / f"part{container}"
    shown = _concatenate(parts, [round((time - shift) / info.time_base) for time in times], info, joined, rest)
    picture = ffmpeg.input(Name(f"file:{joined}"))["v:0"]
    options = {"c:v": "copy"} | ({"r:v": str(info.fps)} if container == ".mkv" else {})  # MP4 would count time in it
    if shown and container == ".mkv":  # PyAV has no way to say it there
        options["aspect"] = f"{shown.numerator}:{shown.denominator}"
    command = output_command(picture, f"file:{joined}", options, part, container, sound, rest)
    run_ffmpeg(command, lambda pipe: None, output)
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
        remedy = NO_ROOM.get(error.errno, "make the segments anew")
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
