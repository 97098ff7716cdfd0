"""What a file holds beside its pictures, and how it gets into the output: sound, subtitles, chapters, timecode, tags.

Everything is copied by packets where the container has a place for it, converted where it has one for the content, and
named in a note where it has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition, Stream

from dpe_cli.container import check_jump, check_space, clock_zero, opened, sound_streams
from dpe_cli.errors import InputError
from dpe_cli.limits import check_seconds

# Sound that is copied into these containers. PCM in MP4 would be legal, but most players stay silent.
COMPRESSED = {"aac", "mp3", "mp3float", "mp2", "mp2float", "ac3", "eac3", "alac"}
PCM = {"pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le", "pcm_f64le"}
SOUND = {
    ".mp4": COMPRESSED | {"opus", "vorbis", "flac"},
    ".mov": COMPRESSED | PCM - {"pcm_u8"},
    ".mkv": COMPRESSED | PCM | {"opus", "vorbis", "flac", "dca", "dts", "truehd"},
    ".nut": COMPRESSED - {"alac"} | PCM | {"opus", "vorbis", "flac"},
}
TEXT = {"subrip", "text", "mov_text", "webvtt", "ass", "ssa"}
SUBTITLES = {
    ".mp4": {"mov_text", "dvd_subtitle"},
    ".mov": {"mov_text", "eia_608"},
    ".mkv": {"subrip", "webvtt", "ass", "ssa", "hdmv_pgs_subtitle", "dvd_subtitle", "dvb_subtitle"},
}
AS_TEXT = {".mp4": "mov_text", ".mov": "mov_text", ".mkv": "subrip"}  # what other text becomes
# ISO 639-2 has two codes for some languages, and MOV as ffmpeg writes it knows one of them
MOV_LANGUAGES = {"deu": "ger", "nld": "dut", "zho": "chi", "ces": "cze", "ell": "gre", "fas": "per", "isl": "ice"}
MOV_LANGUAGES |= {"ron": "rum", "slk": "slo"}
STREAM_TAGS = ("language", "title", "handler_name")
OWN_TAGS = {"encoder", "major_brand", "minor_version", "compatible_brands", "timecode"}  # of a file, not of its content
TAG = 1000  # characters
LATEST = 100 * 3600  # seconds into a file at which its sound may begin; later ones are damage
LEAD = 10  # seconds added inside NUT, which knows no negative time, and taken off again by ffmpeg


@dataclass(frozen=True)
class Track:
    """A track on its way into the output: where it lies, and "copy" or the codec that it is encoded with."""

    path: Path
    kind: str  # a, s, t: sound, subtitles, attachment
    number: int  # among those of its kind in `path`
    codec: str = "copy"
    tags: dict[str, str] = field(default_factory=dict)
    disposition: str = "0"

    @property
    def lead(self) -> int:
        """Seconds to take off its times."""
        return LEAD if self.path.suffix == ".nut" else 0


@dataclass(frozen=True)
class Carried:
    """What a source gives the output beside pictures and sound."""

    tracks: tuple[Track, ...] = ()
    chapters: tuple[dict[str, Any], ...] = ()  # as PyAV has them
    tags: dict[str, str] = field(default_factory=dict)  # of the file
    video_tags: dict[str, str] = field(default_factory=dict)
    video_disposition: str = "default"
    notes: tuple[str, ...] = ()


def audio_codecs(path: Path) -> tuple[str, ...]:
    """The codecs of the sound tracks of a file, () if it has none. Raises InputError if it cannot be read."""
    with opened(path, sound=True) as container:
        return tuple(stream.codec_context.name for stream in sound_streams(container))


def unknown_sound(container: av.container.InputContainer, path: Path) -> tuple[str, ...]:
    """A note of the sound tracks that cannot be copied, as nothing is known of their codec."""
    unknown = len(container.streams.audio) - len(sound_streams(container))
    return (f"sound tracks of {path.name} in a codec unknown here are left out: {unknown}",) if unknown else ()


def unknown_sound_of(path: Path) -> tuple[str, ...]:
    """The same of a file. Raises InputError if it cannot be read."""
    with opened(path) as container:
        return unknown_sound(container, path)


def sound_seconds(path: Path) -> float:
    """How long a file with sound says that it is, 0 where it does not say. Raises InputError if it cannot be read."""
    with opened(path, sound=True) as container:
        return (container.duration or 0) / av.time_base


def read_sound(path: Path, rate: int) -> Iterator[np.ndarray]:
    """The first sound track as blocks (N,) of float32 samples in [-1, 1], mixed to one channel, `rate` a second.

    Sample 0 is at time 0 as `video.Frame.time` counts it: a track that begins later begins with silence. Raises
    InputError for a file that holds no sound or is damaged.
    """
    with opened(path, sound=True) as container:
        streams = sound_streams(container)
        if not streams:
            raise InputError(f"{path} holds no sound", "name a file with speech in it")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        skip = None  # samples before time 0
        try:
            check_seconds(path, (container.duration or 0) / av.time_base)
            for frame in container.decode(streams[0]):
                if skip is None:
                    first = (frame.pts or 0) * frame.time_base - clock_zero(container)
                    if abs(first) > LATEST:
                        raise InputError(f"the sound of {path} begins at {float(first):.0f} s", "convert it to .wav")
                    skip = round(-first * rate)
                    if skip < 0:
                        yield np.zeros(-skip, np.float32)
                frame.pts = None  # a hole in the times of a damaged file is not filled
                for part in resampler.resample(frame):
                    block = part.to_ndarray()[0]
                    gone = min(max(skip, 0), len(block))
                    skip -= gone
                    if gone < len(block):
                        yield block[gone:]
            for part in resampler.resample(None):
                yield part.to_ndarray()[0]
        except av.FFmpegError as error:
            raise InputError(f"the sound of {path} is damaged: {error.strerror}", "convert it to .wav") from error


def sound_tracks(audio: Path, suffix: str, folder: Path, offset: Fraction, limit: Fraction | None) -> list[Track]:
    """The sound tracks of `audio` for a container, `offset` earlier, up to `limit`; AAC where a codec does not fit."""
    with opened(audio) as source:
        streams = sound_streams(source)
        codecs = ["copy" if stream.codec_context.name in SOUND[suffix] else "aac" for stream in streams]
        looks = [(_tags(stream, suffix), _disposition(stream)) for stream in streams]
    early = {"negative": suffix in (".mp4", ".mov"), "drop": suffix == ".nut"}
    path = cut_sound(audio, folder, offset, limit, **early) if codecs else audio
    return [Track(path, "a", number, codec, *looks[number]) for number, codec in enumerate(codecs)]


def cut_sound(
    audio: Path, folder: Path, offset: Fraction, limit: Fraction | None, negative: bool, drop: bool = False
) -> Path:
    """A file with the sound at the right times: `audio` itself, or its packets in NUT, LEAD - `offset` later.

    Packets that end before 0 are cut if the head is (`offset` > 0), packets that begin at `limit` or later always. One
    that begins before 0 stays if `negative`: MP4 tells players to skip so much, Matroska would move all the rest. With
    `drop` it goes even if nothing else is cut: NUT would move all, and Matroska then knows what to do.
    Raises InputError, OutputError.
    """
    with opened(audio) as source:
        cut_head, offset = offset > 0, offset + clock_zero(source)
        tracks = sound_streams(source)
        if not offset and limit is None and not drop and len(tracks) == len(source.streams.audio):
            return audio
        # NUT keeps times exactly but has no name for ALAC; Matroska has, counts in milliseconds and from 0
        nut = all(track.codec_context.name != "alac" for track in tracks)
        last: dict[int, Fraction] = {}  # the time before, of each track
        path, lead, negative = folder / ("sound.nut" if nut else "sound.mkv"), LEAD * nut, negative and nut
        try:
            with av.open(f"file:{path}", "w") as target:
                copies = {track.index: target.add_stream_from_template(track) for track in tracks}
                for packet in source.demux(tracks):
                    if packet.pts is None:  # also the empty packet at the end
                        continue
                    time = packet.pts * packet.time_base - offset
                    check_jump(audio, last.get(packet.stream_index, time), time)
                    last[packet.stream_index] = time
                    before = cut_head and time + (packet.duration or 0) * packet.time_base <= 0
                    if before or (time < 0 and not negative) or (limit is not None and time >= limit):
                        continue
                    moved = round((lead - offset) / packet.time_base)
                    packet.dts = packet.pts = packet.pts + moved  # in sound the two are one
                    packet.stream = copies[packet.stream_index]
                    target.mux(packet)
        except av.FFmpegError as error:
            check_space(error, "the sound")
            raise InputError(
                f"the sound of {audio} cannot be copied: {error.strerror}", "convert it to .m4a"
            ) from error
    return path


def carried(
    path: Path, suffix: str, folder: Path, offset: Fraction, limit: Fraction | None, timecode_frames: int, fps: Fraction
) -> Carried:
    """What `path` gives a container beside pictures and sound, `offset` earlier and up to `limit` (seconds).

    The timecode is that of the frame `timecode_frames` after the first. Raises InputError, OutputError.
    """
    with opened(path) as source:
        offset += clock_zero(source)
        covers = Disposition.attached_pic
        videos = [stream for stream in source.streams.video if not stream.disposition & covers]
        tags = _tags(videos[0], suffix)
        metadata = [stream.metadata for stream in (videos[0], *source.streams.data)] + [source.metadata]
        codes = [value for found in metadata for key, value in found.items() if key.lower() == "timecode"]
        if codes:
            tags["timecode"] = moved_timecode(codes[0], timecode_frames, fps)
        tracks, notes = _subtitles(path, list(source.streams.subtitles), suffix)
        if offset or limit is not None:
            tracks = _cut_subtitles(source, tracks, folder, offset, limit)
        if suffix == ".mkv":
            tracks += [Track(path, "t", number) for number, _ in enumerate(source.streams.attachments)]
        if len(videos) > 1:
            notes.append(f"{path.name} has {len(videos)} video tracks: only the first is in the output")
        if any(stream.disposition & covers for stream in source.streams.video):
            notes.append(f"the cover of {path.name} is left out")
        # the timecode's track is written anew, and chapters of MP4 have one of their own
        chapters = {"bin_data"} if source.chapters() else set()
        data = [one for one in source.streams.data if "timecode" not in one.metadata and one.name not in chapters]
        if data:
            notes.append(f"the data tracks of {path.name}, as of sensors, are left out: {len(data)}")
        return Carried(
            tuple(tracks),
            tuple(_chapters(source.chapters(), offset, limit)),
            {key: value for key, value in source.metadata.items() if key.lower() not in OWN_TAGS},
            tags,
            _disposition(videos[0]),
            tuple(notes),
        )


def _subtitles(path: Path, streams: list[Stream], suffix: str) -> tuple[list[Track], list[str]]:
    """The subtitles that a container can hold, and what is to be said of the others."""
    tracks, notes = [], []
    for number, stream in enumerate(streams):
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
        if codec in SUBTITLES.get(suffix, ()):
            way = "copy"
        elif codec in TEXT and suffix in AS_TEXT:
            way = AS_TEXT[suffix]
            if codec in ("ass", "ssa"):
                notes.append(f"the {codec} subtitles of {path.name} lose their style in {suffix}; .mkv would keep it")
        else:
            notes.append(f"the {codec} subtitles of {path.name} do not fit into the output and are left out")
            continue
        tracks.append(Track(path, "s", number, way, _tags(stream, suffix), _disposition(stream)))
    return tracks, notes


def _cut_subtitles(
    source: av.container.InputContainer, tracks: list[Track], folder: Path, offset: Fraction, limit: Fraction | None
) -> list[Track]:
    """The same tracks in a file of their own, moved and cut. A text that begins before 0 begins at 0."""
    if not tracks:
        return []
    streams = [source.streams.subtitles[track.number] for track in tracks]
    timed_text = streams[0].codec_context.name == "mov_text"  # Matroska has no name for it, MP4 hardly another
    path = folder / ("subtitles.mp4" if timed_text else "subtitles.mkv")
    try:
        with av.open(f"file:{path}", "w") as target:
            copies = {stream.index: target.add_stream_from_template(stream) for stream in streams}
            for packet in source.demux(streams):
                if packet.pts is None:
                    continue
                base = packet.time_base
                begin = packet.pts * base - offset
                finish = begin + (packet.duration or 0) * base
                finish = finish if limit is None else min(finish, limit)
                if (finish <= 0 and begin < 0) or (limit is not None and begin >= limit):
                    continue
                packet.dts = packet.pts = round(max(begin, Fraction(0)) / base)
                packet.duration = round((finish - max(begin, Fraction(0))) / base)
                packet.stream = copies[packet.stream_index]
                target.mux(packet)
    except av.FFmpegError as error:
        check_space(error, "the subtitles")
        raise InputError(f"the subtitles of {source.name} cannot be copied: {error.strerror}", "remove them") from error
    return [Track(path, "s", number, track.codec, track.tags, track.disposition) for number, track in enumerate(tracks)]


def _chapters(chapters: list[dict[str, Any]], offset: Fraction, limit: Fraction | None) -> list[dict[str, Any]]:
    """Chapters moved and cut, in the form that PyAV takes. Their times are LEAD later, as all in NUT."""
    moved = []
    for chapter in chapters:
        base = Fraction(chapter["time_base"])
        begin, finish = (max(chapter[edge] * base - offset, Fraction(0)) for edge in ("start", "end"))
        finish = finish if limit is None else min(finish, limit)
        if finish > begin:
            times = {"start": round((begin + LEAD) / base), "end": round((finish + LEAD) / base)}
            moved.append({**chapter, "id": len(moved), **times})
    return moved


def _tags(stream: Stream, suffix: str) -> dict[str, str]:
    """Language, title and name of a track, as far as it has them."""
    # cut short: they become arguments of a program, which have a longest length
    tags = {key.lower(): value[:TAG] for key, value in stream.metadata.items() if key.lower() in STREAM_TAGS}
    if suffix == ".mov" and tags.get("language") in MOV_LANGUAGES:
        tags["language"] = MOV_LANGUAGES[tags["language"]]
    return tags


def _disposition(stream: Stream) -> str:
    """What a track is for, in the words of ffmpeg: default+forced."""
    return "+".join(one.name.lower() for one in Disposition if stream.disposition & one) or "0"


def moved_timecode(code: str, frames: int, fps: Fraction) -> str:
    """An SMPTE timecode so many frames later, 01:00:00;00 in drop-frame counting. One that is none stays as it is."""
    parts = code.replace(";", ":").replace(".", ":").split(":")
    rate = round(fps)
    if not frames or len(parts) != 4 or not all(part.isdecimal() for part in parts):
        return code
    hours, minutes, seconds, frame = map(int, parts)
    drop = round(rate / 15) if ";" in code or "." in code else 0  # numbers left out in nine of ten minutes
    total = 60 * hours + minutes
    count = (60 * total + seconds) * rate + frame - drop * (total - total // 10) + frames
    per_ten = 600 * rate - 9 * drop
    tens, rest = divmod(count % (144 * per_ten), per_ten)
    if drop and rest >= 60 * rate:
        rest += drop * (1 + (rest - 60 * rate) // (60 * rate - drop))
    count = tens * 600 * rate + rest
    seconds, frame = divmod(count, rate)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{';' if drop else ':'}{frame:02}"
