"""Media files as containers: opening them, their clock, their display matrix, and copying their sound by packets."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from dpe_cli.errors import InputError

# Sound that is copied into these containers. PCM in MP4 would be legal, but most players stay silent.
COMPRESSED = {"aac", "mp3", "mp3float", "mp2", "mp2float", "ac3", "eac3", "alac"}
PCM = {"pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le", "pcm_f64le"}
COPIED = {
    ".mp4": COMPRESSED | {"opus", "vorbis", "flac"},
    ".mov": COMPRESSED | PCM - {"pcm_u8"},
    ".mkv": COMPRESSED | PCM | {"opus", "vorbis", "flac", "dca", "dts", "truehd"},
}
LEAD = 10  # seconds added inside NUT, which knows no negative time, and taken off again by ffmpeg


@dataclass(frozen=True)
class Sound:
    """A file with sound, and for each of its tracks "copy" or the codec that it is encoded with."""

    path: Path
    codecs: tuple[str, ...]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """An open file, or InputError."""
    if not path.exists():
        raise InputError(f"{path} does not exist", "check the name")
    if not path.is_file():
        raise InputError(f"{path} is not a file", "name a video or a picture")
    try:
        container = av.open(f"file:{path}", metadata_errors="replace")
    except PermissionError as error:
        raise InputError(f"{path} may not be read", "check its permissions") from error
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{path} cannot be opened as a video", "check that it is whole and a player can show it"
        ) from error
    with container:
        yield container


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first track that is a video and not a cover, or InputError."""
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams or streams[0].codec_context is None:
        raise InputError(f"{path} holds no video that can be decoded", "name a file that a player shows as a video")
    return streams[0]


def sound_streams(container: InputContainer) -> list[av.AudioStream]:
    """The sound tracks of a codec that is known."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def holds_image(container: InputContainer) -> bool:
    """Whether the file is a still picture."""
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def clock_zero(container: InputContainer) -> Fraction:
    """Seconds that are taken off every time: the start of the first track where the container's clock is arbitrary."""
    if not container.format.flags & av.format.Flags.ts_discont.value:
        return Fraction(0)
    starts = [stream.start_time * stream.time_base for stream in container.streams if stream.start_time is not None]
    return min(starts, default=Fraction(0))


def decoded(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    """Decoded pictures. Rubbish before the first is passed over (recordings begin so); after it, InputError."""
    seen = 0
    try:
        for packet in container.demux(stream):
            try:
                pictures = packet.decode()
            except av.FFmpegError:
                if seen:
                    raise
                continue
            for picture in pictures:
                seen += 1
                yield picture
    except av.FFmpegError as error:
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


def turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How the display matrix makes a picture upright: swap rows and columns, then mirror, then turn upside down."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    turned = abs(b) > abs(a)
    return (True, c < 0, b < 0) if turned else (False, a < 0, d < 0)


def rotation(frame: av.VideoFrame) -> int:
    """Degrees clockwise that make a picture upright."""
    turned, mirrored, upside_down = turn(frame)
    if turned:
        return 90 if mirrored else 270
    return 180 if mirrored and upside_down else 0


def audio_codecs(path: Path) -> tuple[str, ...]:
    """The codecs of the sound tracks of a file, () if it has none. Raises InputError if it cannot be read."""
    with opened(path) as container:
        return tuple(stream.codec_context.name for stream in sound_streams(container))


def track_codecs(audio: Path, suffix: str) -> tuple[str, ...]:
    """How each track of `audio` gets into a container: "copy", or "aac" where its own codec does not fit."""
    return tuple("copy" if codec in COPIED[suffix] else "aac" for codec in audio_codecs(audio))


def cut_sound(audio: Path, folder: Path, offset: Fraction, limit: Fraction | None, negative: bool) -> Path:
    """A file with the sound at the right times: `audio` itself, or its packets in NUT, LEAD - `offset` later.

    Packets that end before 0 are cut if the head is (`offset` > 0), packets that begin at `limit` or later always. One
    that begins before 0 stays if `negative`: MP4 tells players to skip so much, Matroska would move all the rest.
    Raises InputError.
    """
    with opened(audio) as source:
        cut_head, offset = offset > 0, offset + clock_zero(source)
        tracks = sound_streams(source)
        if not offset and limit is None and len(tracks) == len(source.streams.audio):
            return audio
        # NUT keeps times exactly but has no name for ALAC; Matroska has, counts in milliseconds and from 0
        nut = all(track.codec_context.name != "alac" for track in tracks)
        path, lead, negative = folder / ("sound.nut" if nut else "sound.mkv"), LEAD * nut, negative and nut
        try:
            with av.open(f"file:{path}", "w") as target:
                copies = {track.index: target.add_stream_from_template(track) for track in tracks}
                for track in tracks:
                    copies[track.index].metadata.update(track.metadata)
                for packet in source.demux(tracks):
                    if packet.pts is None:  # also the empty packet at the end
                        continue
                    time = packet.pts * packet.time_base - offset
                    before = cut_head and time + (packet.duration or 0) * packet.time_base <= 0
                    if before or (time < 0 and not negative) or (limit is not None and time >= limit):
                        continue
                    moved = round((lead - offset) / packet.time_base)
                    packet.dts = packet.pts = packet.pts + moved  # in sound the two are one
                    packet.stream = copies[packet.stream_index]
                    target.mux(packet)
        except av.FFmpegError as error:
            raise InputError(
                f"the sound of {audio} cannot be copied: {error.strerror}", "convert it to .m4a"
            ) from error
    return path
