"""Media files as containers: opening them, image sequences and pipes too, their clock and their display matrix."""

import contextlib
import errno
import http.client
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.stream import VideoStream

from dpe_cli.errors import InputError, OutputError
from dpe_cli.limits import (
    ANYWHERE,
    DEVICES,
    LOCAL,
    REFERRING,
    check_file,
    check_pixels,
    is_playlist,
    limits,
    scratch,
)

NO_ROOM = {  # why a disk takes no more -> what helps
    getattr(errno, "EDQUOT", errno.ENOSPC): "free some space of your quota on that disk",  # Windows has none
    errno.ENOSPC: "free some space on that disk",
    errno.EFBIG: "allow larger files (ulimit -f), or write to another disk",
    errno.EIO: "check that disk, or write to another",
    errno.EROFS: "write to another disk",
}
PIPE = Path("-")  # standard input or output
NUMBER = re.compile(r"%0?(\d*)d")  # the frame number in the name of an image sequence
SEQUENCES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dpx", ".exr")
# PyAV's degrees counter-clockwise to what `turn` says
TURNS = {-90: (True, True, False), 90: (True, False, True), -180: (False, True, True), 180: (False, True, True)}
SEQUENCE_RATE = Fraction(25)  # frames a second, where nobody says


def is_sequence(path: Path) -> bool:
    """Whether the name stands for numbered pictures, as frame_%06d.png does."""
    # os.path, for which a name that is too long for any file is no failure
    return len(NUMBER.findall(path.name)) == 1 and path.suffix.lower() in SEQUENCES and not os.path.isfile(path)


def picture_numbers(path: Path) -> list[int]:
    """The numbers of the pictures of a sequence that exist, rising."""
    before, after = NUMBER.split(path.name)[::2]
    name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    found = [name.fullmatch(file.name) for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return sorted(int(match[1]) for match in found if match and numbered(path, int(match[1])).name == match[0])


def numbered(path: Path, number: int) -> Path:
    """One picture of a sequence, by the number in its name; ffmpeg too takes %6d for %06d."""
    return path.with_name(NUMBER.sub(lambda found: str(number).zfill(int(found[1] or 0)), path.name))


def pattern(path: Path) -> str:
    """The name of a sequence for ffmpeg, to which each other % in it would mean something too."""
    before, after = (part.replace("%", "%%") for part in NUMBER.split(path.name)[::2])
    return f"{str(path.parent).replace('%', '%%')}/{before}{NUMBER.search(path.name)[0]}{after}"


def files_of(path: Path) -> list[Path]:
    """The files that a path stands for, as far as they exist: one, none, or the pictures of a sequence."""
    if is_sequence(path):
        return [numbered(path, number) for number in picture_numbers(path)]
    return [path] if path.exists() else []


def bytes_of(path: Path) -> int:
    """How large the files are that a path stands for, together; 0 where there are none."""
    return sum(file.stat().st_size for file in files_of(path))


def frame_rate(text: str) -> Fraction:
    """Frames a second from 25, 30000/1001 or 29.97, which means 30000/1001. Raises InputError."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise InputError(f"{text} is no frame rate", "write it as 25, 29.97 or 30000/1001")
    ntsc = Fraction(round(rate * 1001 / 1000) * 1000, 1001)
    return ntsc if rate.denominator > 1 and abs(rate - ntsc) < Fraction(1, 200) else rate


JUMP = 1  # seconds back in time that are no slip of a writer
FETCH_SECONDS = 30.0  # of silence on the network


@contextlib.contextmanager
def spooled(path: Path, standard_input: BinaryIO | None, output: Path = PIPE) -> Iterator[Path]:
    """`path`, or for `-` a temporary file of what comes in: an edit reads its source more than once.

    `standard_input` is None where it is closed. Raises InputError, OutputError if there is no place for it.
    """
    if path != PIPE:
        yield path
        return
    if standard_input is None:
        raise InputError("standard input is closed", "send the source there, or name a file")
    with scratch(output) as folder:
        file, most = folder / "standard-input", limits().size
        try:
            with file.open("wb") as target:
                while block := standard_input.read(1 << 20):
                    target.write(block)
                    if most is not None and target.tell() > most:
                        raise InputError(f"standard input has more than the {most >> 20} MB of --max-size", "raise it")
        except OSError as error:
            raise InputError(
                f"standard input cannot be kept in {folder}: {error.strerror}", "name a larger disk with --temp"
            ) from error
        yield file


@contextlib.contextmanager
def fetched(address: str) -> Iterator[Path]:
    """A temporary file, in --temp or the current folder, with what an http address gives. Raises InputError."""
    most, name = limits().size, Path(urllib.parse.urlsplit(address).path).name or "fetched"
    with scratch(Path(name)) as folder:
        file = folder / name
        try:
            with urllib.request.urlopen(address, timeout=FETCH_SECONDS) as answer, file.open("wb") as target:
                while block := answer.read(1 << 20):
                    target.write(block)
                    if most is not None and target.tell() > most:
                        raise InputError(f"{address} has more than the {most >> 20} MB of --max-size", "raise it")
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            raise InputError(f"{address} cannot be fetched: {error}", "check the address, or download it") from error
        yield file


def input_options() -> dict[str, str]:
    """What ffmpeg is told of every input: which protocols it may use, and which formats are none that name files."""
    if limits().network:
        return {"protocol_whitelist": ANYWHERE}
    known = {name for names in av.formats_available for name in names.split(",")}
    return {"protocol_whitelist": LOCAL, "format_whitelist": ",".join(sorted(known - REFERRING - DEVICES))}


def pixel_option() -> dict[str, str]:
    """What decoders are told: a little more than the limit, as they count whole blocks; `check_pixels` is exact."""
    return {"max_pixels": str(limits().pixels * 5 // 4 + (1 << 16))}


@contextlib.contextmanager
def opened(path: Path, fps: Fraction | None = None, sound: bool = False) -> Iterator[InputContainer]:
    """An open file, or sequence of pictures of `fps` a second, within the limits. Raises InputError.

    sound: its sound is wanted, which is what the error says.
    """
    name, form, options = f"file:{path}", None, {"pattern_type": "none"}  # an existing name stands for itself alone
    if is_sequence(path):
        options = _sequence_options(path, fps or SEQUENCE_RATE)
        name, form = pattern(path.absolute()), "image2"
    else:
        check_file(path)
        if not path.exists():
            raise InputError(f"{path} does not exist", "check the name")
    options |= {**pixel_option(), **input_options()}
    try:
        container = av.open(name, format=form, options=options, metadata_errors="replace")
    except PermissionError as error:
        raise InputError(f"{path} may not be read", "check its permissions") from error
    except (av.FFmpegError, OSError) as error:
        check_memory(error)
        if is_playlist(path):
            remedy = "name the video itself, or trust it with --allow-network"
            raise InputError(f"{path} is no video but names other files", remedy) from error
        what, show = ("sound", "play") if sound else ("a video", "show")
        raise InputError(
            f"{path} cannot be opened as {what}", f"check that it is whole and a player can {show} it"
        ) from error
    with container:
        yield container


def _sequence_options(path: Path, fps: Fraction) -> dict[str, str]:
    """How ffmpeg is told to read a sequence; it would stop at a gap without a word, so that is looked for here."""
    if path.suffix.lower() == ".exr":
        raise InputError(f"{path} holds linear light in floating point", "convert it to 16-bit PNG first")
    numbers = picture_numbers(path)
    if not numbers:
        raise InputError(f"no picture is named like {path}", "check the name and the number of digits")
    if numbers[-1] - numbers[0] + 1 != len(numbers):
        gap = next(one + 1 for one, two in pairwise(numbers) if two > one + 1)
        raise InputError(f"{numbered(path, gap)} is missing in the sequence", "render it or fill the gap")
    return {"framerate": str(fps), "start_number": str(numbers[0]), "start_number_range": "1"}


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first track that is a video and not a cover, or InputError."""
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams or streams[0].codec_context is None:
        raise InputError(f"{path} holds no video that can be decoded", "name a file that a player shows as a video")
    context = streams[0].codec_context
    check_pixels(path, context.width, context.height)
    context.options = pixel_option()  # a stream may say another size than its container
    return streams[0]


def sound_streams(container: InputContainer) -> list[av.AudioStream]:
    """The sound tracks of a codec that is known."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def holds_image(container: InputContainer) -> bool:
    """Whether the file is a still picture."""
    return (container.format.name == "image2" and not is_sequence(Path(container.name.removeprefix("file:")))) or (
        container.format.name.endswith("_pipe")
    )


def clock_zero(container: InputContainer) -> Fraction:
    """Seconds that are taken off every time: the start of the first track where the container's clock is arbitrary."""
    if not container.format.flags & av.format.Flags.ts_discont.value:
        return Fraction(0)
    starts = [stream.start_time * stream.time_base for stream in container.streams if stream.start_time is not None]
    return min(starts, default=Fraction(0))


def check_memory(error: OSError) -> None:
    """Raises MemoryError if that is what ffmpeg's error means: the file is not to blame."""
    if error.errno == errno.ENOMEM:
        raise MemoryError from error


def check_space(error: OSError, what: str) -> None:
    """Raises OutputError if ffmpeg's error, met while `what` was written, means that a disk takes no more."""
    if remedy := NO_ROOM.get(error.errno):
        raise OutputError(f"{what} cannot be written: {error.strerror}", remedy) from error


def no_room(words: str) -> str | None:
    """The remedy where words of ffmpeg's mean that a disk takes no more, else None: no input is to blame then."""
    found = (remedy for number, remedy in NO_ROOM.items() if os.strerror(number) in words)
    return next(found, None)


def check_jump(path: Path, before: Fraction, time: Fraction) -> None:
    """Raises InputError where a time (seconds) lies so far before the one before it that the file is of two."""
    if before - time > JUMP:
        raise InputError(
            f"the times of {path} jump back by {float(before - time):.1f} s at {float(before):.1f} s",
            "remux it first, as by: ffmpeg -i IN -c copy OUT.mp4",
        )


def decoded(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    """Decoded pictures. Rubbish before the first is passed over (recordings begin so); after it, InputError."""
    seen = 0
    try:
        for packet in container.demux(stream):
            try:
                pictures = packet.decode()
            except av.FFmpegError as error:
                check_memory(error)
                if seen:
                    raise
                continue
            for picture in pictures:
                seen += 1
                yield picture
    except av.FFmpegError as error:
        check_memory(error)
        raise InputError(f"{path} is damaged after its frame {seen}", "repair it or give --end before that") from error


def check_whole(container: InputContainer, path: Path) -> None:
    """Raises InputError if the file is shorter than it says: MP4 in its index, AVI and Matroska in their head."""
    entries = chain.from_iterable(stream.index_entries for stream in container.streams.video)
    said = max((entry.pos + entry.size for entry in entries), default=0)
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        said = max(said, 8 + int.from_bytes(head[4:8], "little"))
    at = head.find(b"\x18\x53\x80\x67") + 4  # the Segment, which is all the rest of a Matroska file
    if head[:4] == b"\x1a\x45\xdf\xa3" and at >= 4:
        length = 9 - head[at].bit_length()
        size = int.from_bytes(head[at : at + length], "big") & (1 << 7 * length) - 1
        said = max(said, at + length + size if size != (1 << 7 * length) - 1 else 0)  # all ones: unknown
    if said > (size := path.stat().st_size):
        raise InputError(f"{path} is cut short: {size} of {said} bytes", "copy or download it again")


def side_data(frame: av.VideoFrame) -> list[SideData]:
    """What a picture has beside its pixels; nothing where PyAV does not know a kind of it, as it does not know EXIF."""
    try:
        return list(frame.side_data)
    except ValueError:
        return []


def turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How the display matrix makes a picture upright: swap rows and columns, then mirror, then turn upside down."""
    data = next((data for data in side_data(frame) if data.type.name == "DISPLAYMATRIX"), None)
    if data is None:  # or it is not shown, beside EXIF
        return TURNS.get(frame.rotation, (False, False, False))
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    turned = abs(b) > abs(a)
    return (True, c < 0, b < 0) if turned else (False, a < 0, d < 0)


def rotation(frame: av.VideoFrame) -> int:
    """Degrees clockwise that make a picture upright."""
    turned, mirrored, upside_down = turn(frame)
    if turned:
        return 90 if mirrored else 270
    return 180 if mirrored and upside_down else 0
