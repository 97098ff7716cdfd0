"""Raw videos to a dataset: shots, tracked faces, fixed square crops, and what is measured on each frame.

A dataset is a folder. Every clip in it is two files, read without decoding: `NAME.npy` (N, 256, 256, 3) uint8 RGB and
`NAME.npz` with

    points (N, 478, 3) float32, pixels of the crop; blendshapes (N, 52) float32 in [0, 1]
    times (N,) float64, seconds in the source; box (4,) float64: x0, y0, x1, y1 of the crop in the source's frame
    rotation (N, 3, 3) float32 of the head; with a motion space, scale (N,) pixels and translation (N, 3) pixels too
    embedding (N, K) float32 unit vectors of the person, with a recognition network only
    sound (M,) int16, 16000 samples a second, one channel, and sound_start, seconds in the source at which it begins: a
    second before the clip, to a second after it; only where the video has sound, or a sound file of its name beside it

`index.csv` lists the clips with identity and split, `rejected.csv` what was left out and why. `journal.jsonl` has a
line for each finished source: a run that was interrupted goes on after the last one.

As in VoxCeleb's preprocessing, one square per clip stays where it is and the face moves inside it; unlike there it
holds the `face.crop_box` of every frame, from which training cuts its pictures.
"""

import contextlib
import csv
import io
import json
import math
import os
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, TypeVar

import cv2
import numpy as np

from dpe_cli.crop import cut
from dpe_cli.dataset import CROP, INDEX, INDEX_COLUMNS, is_held_out
from dpe_cli.detectors import RESEARCH_ONLY, ArcFace, quiet_stderr
from dpe_cli.errors import DeviceError, DPEError, FaceError, InputError, OutputError
from dpe_cli.face import Box, FaceDetector, crop_box, make_detector
from dpe_cli.landmark_net import NetworkLandmarker
from dpe_cli.landmarks import FaceShape, Landmarker, five_points
from dpe_cli.limits import Limits, limits, set_limits
from dpe_cli.motion_space import MotionSpace, normalise
from dpe_cli.people import track_faces
from dpe_cli.shots import mark_shots
from dpe_cli.speech import RATE, Samples
from dpe_cli.video import Frame, decode_image, probe, read_frames

MARGIN = 1.1  # side of the square over the reach of all crop boxes: room for what training shifts and zooms at random
SPREAD = 1.8  # a face that reaches over so many of its own (smallest) crop boxes begins a new clip
GAP_SECONDS = 0.5  # out of sight for longer, it does too
MIN_FRAMES = 10  # with a face, in a clip
SAME_PERSON = 0.5  # mean cosine between the clips of two groups: above it one person; see `cluster`
LMDB_RATE = Fraction(25)  # frames a second of VoxCeleb, which that layout does not say
LMDB_FRAMES = 500  # of a video, at most; as the official loader
VIDEOS = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".m4v", ".ts", ".wmv", ".flv"}
SOUNDS = (".wav", ".flac", ".opus", ".ogg", ".m4a", ".mp3")  # of files beside a video that has no sound
SOUND_MARGIN = 1.0  # seconds of sound kept before and after a clip
OFFSET_RATE = 25  # frames a second in which a listing counts how late a sound is
JOURNAL, REJECTED = "journal.jsonl", "rejected.csv"
T = TypeVar("T")


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the content of a dataset; a folder is prepared with one of these."""

    landmarker: Path | None  # MediaPipe's face_landmarker.task; None: our own network
    identity: Path | None = None  # recognition network (.onnx) or a pack with one
    space: Path | None = None  # motion-space.json
    detector: str = "auto"
    face_models: Path | None = None
    fps: float = 12.5  # at most: every k-th frame is kept
    max_frames: int = 128  # longer tracks are divided evenly
    min_side: int = 128  # of the crop in the source, pixels
    min_sharpness: float = 15.0  # see `sharpness`; the softest of 600 hand-picked clips of faces has 21

    def facts(self) -> dict[str, Any]:
        """As the journal keeps them: files by their names, so that a dataset can be moved."""
        return {name: value.name if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Source:
    """One video, or one video of an LMDB."""

    path: Path  # absolute
    name: str  # begins the names of its clips
    identity: str | None = None  # None: not known
    split: str | None = None  # "train" or "test"; None: not given
    cropped: bool = False  # a square crop of one face already, if it is square
    key: str | None = None  # of a video in an LMDB
    sound_late: float = 0.0  # seconds by which the sound lags behind the picture

    @property
    def id(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}:{self.key}"


@dataclass(frozen=True)
class Piece:
    """A clip to be: the frames from `first` to `last`, both included, of one square."""

    first: int
    last: int
    start: float  # seconds
    end: float
    box: Box


@dataclass
class Outcome:
    """What became of a source: rows of the index, less what only the whole dataset decides, and of rejected.csv."""

    source: str
    clips: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, reason: str, start: float | None = None, end: float | None = None) -> None:
        """Notes why a source, or the part of it between two times (seconds), is left out."""
        times = {name: None if time is None else round(time, 3) for name, time in (("start", start), ("end", end))}
        self.rejected.append({"source": self.source, **times, "reason": reason})


class LandmarkModel(Protocol):
    """Finds the landmarks of the one face in a picture, as `landmarks.Landmarker` does."""

    def detect(self, rgb: np.ndarray) -> FaceShape | None: ...

    def close(self) -> None: ...


@dataclass
class Tools:
    """The networks that a worker holds."""

    detector: FaceDetector
    landmarker: LandmarkModel
    recogniser: ArcFace | None = None
    template: np.ndarray | None = None  # (478, 3) mean face of a motion space


def make_tools(settings: PrepareSettings) -> Tools:
    """Loads the networks that the settings name. Raises InputError or WeightsError where one is missing."""
    detector = make_detector(settings.detector, settings.face_models)
    if settings.landmarker is None:
        landmarker = NetworkLandmarker(detector=detector)
    else:
        with quiet_stderr():  # MediaPipe's C++ is talkative, also at the first picture
            landmarker = Landmarker(settings.landmarker)
            landmarker.detect(np.zeros((64, 64, 3), np.uint8))
    recogniser = ArcFace.load(settings.identity, threads=1) if settings.identity else None
    template = MotionSpace.load(settings.space).template if settings.space else None
    return Tools(detector, landmarker, recogniser, template)


# The whole


@dataclass(frozen=True)
class Summary:
    """What is in a dataset after a run."""

    index: Path
    clips: int
    people: int
    test_people: int
    frames: int
    rejected: int
    done_before: int  # sources


def prepare(
    inputs: Iterable[Path],
    output: Path,
    settings: PrepareSettings,
    *,
    workers: int = 1,
    progress: Callable[[Iterable[T], int, str], Iterator[T]] = lambda items, total, what: iter(items),
    say: Callable[[str], None] = lambda line: None,
    make_tools: Callable[[PrepareSettings], Tools] = make_tools,
) -> Summary:
    """Makes or continues the dataset in `output`.

    inputs: videos, folders of videos, CSV files (column `clip`, a path beside the file; if known `identity_cluster`,
    and `av_offset_frames`, how late the sound is in frames of 1/25 s) or folders with such an index.csv, LMDB folders
    in the layout of DPE's and LIA's training sets. With more than one worker `make_tools` must be a function that can
    be imported. What is found and left out is told by `say`.

    Raises:
        InputError: an input is missing or holds nothing; the folder was prepared with other settings.
        FaceError: not one clip in the dataset. OutputError, WeightsError, DeviceError.
    """
    sources = find_sources(inputs)
    tools = make_tools(settings)
    if tools.detector.name.startswith("insightface") or tools.recogniser is not None:
        say(f"{RESEARCH_ONLY}; a dataset made with them may be too")
    if tools.recogniser is None:
        how = "as the input gives them, else one identity per source file"
        say(f"no recognition network: no identity embeddings are stored, identities {how}")
    journal = Journal(output, settings)
    todo = [source for source in distinct(sources, journal.outcomes) if source.id not in journal.outcomes]
    try:
        for outcome in progress(run(todo, output, settings, tools, make_tools, workers), len(todo), "preparing"):
            journal.add(outcome)
            explain(outcome, say)
    finally:
        tools.landmarker.close()
        clear(output)
        summary = write_index(output, journal.outcomes.values(), len(sources) - len(todo))
    if not summary.clips:
        raise FaceError(f"{output}: not one clip could be made", f"see {output / REJECTED} for the reasons")
    return summary


def explain(outcome: Outcome, say: Callable[[str], None]) -> None:
    """One line for each clip left out."""
    for row in outcome.rejected:
        span = "" if row["start"] is None else f" {row['start']:.1f}-{row['end']:.1f} s"
        say(f"{row['source']}{span}: left out, {row['reason']}")


def run(
    sources: list[Source], folder: Path, settings: PrepareSettings, tools: Tools,
    make_tools: Callable[[PrepareSettings], Tools], workers: int,
) -> Iterator[Outcome]:  # fmt: skip
    """Prepares the sources here, or in several processes and then in any order."""
    if workers == 1 or len(sources) < 2:
        for source in sources:
            yield prepare_source(source, folder, settings, tools)
        return
    # Started anew, not forked: the networks' threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (make_tools, settings, limits()))
    try:
        waiting = [pool.submit(work, source, folder, settings) for source in sources]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool as error:
        raise DeviceError(
            "a worker process died, perhaps for want of memory", "start again with fewer --workers: it goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_tools: Tools | None = None  # of a worker process


def start_worker(make_tools: Callable[[PrepareSettings], Tools], settings: PrepareSettings, allowed: Limits) -> None:
    """Loads the networks once for all that a process will do. Ctrl-C ends it at once and quietly."""
    global _tools
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cv2.setNumThreads(1)
    set_limits(allowed)
    _tools = make_tools(settings)
    Finalize(None, _tools.landmarker.close, exitpriority=0)  # MediaPipe's needs threads, which end before atexit


def work(source: Source, folder: Path, settings: PrepareSettings) -> Outcome:
    """`prepare_source` in a worker process."""
    return prepare_source(source, folder, settings, _tools)


# What there is to prepare


def find_sources(inputs: Iterable[Path]) -> list[Source]:
    """All videos that the inputs hold, each once. Raises InputError for an input that is missing or holds none."""
    found: dict[str, Source] = {}
    for path in inputs:
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path} does not exist", "check the name")
        sources = list(sources_in(path.resolve()))
        if not sources:
            raise InputError(f"{path} holds no videos", f"give files or folders of {', '.join(sorted(VIDEOS))}")
        for source in sources:
            found.setdefault(source.id, source)
    return list(found.values())


def sources_in(path: Path) -> Iterator[Source]:
    """The videos of one input."""
    if path.suffix.lower() == ".csv":
        yield from read_listing(path)
    elif path.is_file():
        yield Source(path, path.stem)
    elif (path / "data.mdb").is_file():
        yield from lmdb_sources(path, path.parent)
    elif (path / str(CROP) / "data.mdb").is_file():
        yield from lmdb_sources(path / str(CROP), path)
    elif (path / "index.csv").is_file() and "clip" in columns(path / "index.csv"):
        yield from read_listing(path / "index.csv")
    else:
        for video in sorted(path.rglob("*")):
            if video.suffix.lower() in VIDEOS and video.is_file():
                yield Source(video, flat_name(video.relative_to(path)))


def flat_name(path: Path) -> str:
    return path.with_suffix("").as_posix().replace("/", "_")


@contextlib.contextmanager
def opened_listing(path: Path) -> Iterator[TextIO]:
    """A CSV file to read, with or without the mark that spreadsheets begin theirs with. Raises InputError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}", "save it as CSV in UTF-8") from error


def columns(path: Path) -> list[str]:
    """The first line of a CSV file. Raises InputError."""
    with opened_listing(path) as file:
        return next(csv.reader(file), [])


def read_listing(path: Path) -> Iterator[Source]:
    """Clips that a CSV file lists. Raises InputError if it has no column `clip`, or a row says no clip or no number."""
    if "clip" not in columns(path):
        raise InputError(f"{path} has no column clip", "name the column with the videos' paths so")
    with opened_listing(path) as file:
        reader = csv.DictReader(file)
        rows = [(reader.line_num, row) for row in reader]
    for line, row in rows:
        if not row["clip"]:
            raise InputError(f"{path}, line {line}: no clip is named", "name one, or remove the line")
        late = row.get("av_offset_frames") or "0"
        try:
            seconds = float(late) / OFFSET_RATE
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds):
            raise InputError(f"{path}, line {line}: av_offset_frames {late} is no number", "write for instance -2")
        name, identity = flat_name(Path(row["clip"].lstrip("/"))), row.get("identity_cluster") or None
        yield Source(path.parent / row["clip"], name, identity, cropped=True, sound_late=seconds)


def lmdb_sources(path: Path, root: Path) -> Iterator[Source]:
    """Videos of an LMDB: those of train_list.txt and test_list.txt in `root`, else all."""
    lists = {split: root / f"{split}_list.txt" for split in ("train", "test")}
    names = {
        name: split
        for split, file in lists.items()
        if file.is_file()
        for name in file.read_text(encoding="utf-8").split()
    }
    if not names:
        with opened_lmdb(path) as database, database.begin() as transaction:
            keys = (bytes(key).decode() for key in transaction.cursor().iternext(values=False))
            names = dict.fromkeys(key.removesuffix("-length") for key in keys if key.endswith("-length"))
    for name, split in names.items():
        yield Source(path, name.replace("/", "_"), name.split("#")[0], split, cropped=True, key=name)


def opened_lmdb(path: Path) -> Any:
    """An LMDB environment, to be closed. Raises InputError."""
    try:
        import lmdb
    except ImportError as error:
        raise InputError(f"{path} is an LMDB and the package lmdb is missing", "pip install 'dpe-cli[lmdb]'") from error
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path} cannot be opened as an LMDB: {error}", "check that it is whole") from error


def distinct(sources: list[Source], done: dict[str, Outcome]) -> list[Source]:
    """The sources, with longer names where two of different folders would give their clips the same."""
    taken = {row["stem"]: id for id, outcome in done.items() for row in outcome.clips}
    named = []
    for source in sources:
        if taken.setdefault(source.name, source.id) != source.id:
            source = replace(source, name=f"{source.name}_{zlib.crc32(source.id.encode()):08x}")
            taken[source.name] = source.id
        named.append(source)
    return named


# One source


def prepare_source(source: Source, folder: Path, settings: PrepareSettings, tools: Tools) -> Outcome:
    """Writes the clips of one source into `folder`. What cannot be read is rejected; only OutputError is raised."""
    outcome = Outcome(source.id)
    try:
        rate, step, pieces = plan(source, settings, tools, outcome)
        sound = open_sound(source)
        for number, (piece, times, crops) in enumerate(cut_pieces(frames_of(source, step), pieces)):
            name = f"{source.name}_{number:03}"
            heard = cut_sound(sound, times, source.sound_late) if sound else {}
            made = make_clip(folder, name, piece, times, crops, settings, tools, heard)
            if isinstance(made, str):
                outcome.reject(made, piece.start, piece.end)
                continue
            given = {"stem": source.name, "identity": source.identity, "split": source.split, "source": source.id}
            outcome.clips.append({"name": name, **given, "fps": round(float(rate / step), 4), **made})
    except OutputError:
        raise
    except DPEError as error:
        outcome.reject(f"unreadable: {error}")
    return outcome


def plan(
    source: Source, settings: PrepareSettings, tools: Tools, outcome: Outcome
) -> tuple[Fraction, int, list[Piece]]:
    """Frame rate, which frames are kept (each step-th) and the pieces to cut. Notes what is left out in `outcome`."""
    if source.key is None:
        info = probe(source.path)
        rate, count, width, height = info.fps, info.n_frames, info.width, info.height
        if source.cropped and not count:  # the container does not know
            count = sum(1 for _ in read_frames(source.path))
    else:
        first, count = read_lmdb_start(source)
        rate, (height, width) = LMDB_RATE, first.shape[:2]
    step = max(1, round(float(rate) / settings.fps))
    if source.cropped and width == height:
        whole = Piece(0, count - 1, 0.0, count / float(rate), Box(0, 0, width, height))
        tracks = [whole]
    else:
        tracks = find_tracks(frames_of(source, step), tools.detector, (width, height), outcome)
    pieces = []
    for track in tracks:
        kept = (track.last - track.first) // step + 1
        if track.box.width < settings.min_side:
            least = f"least {settings.min_side}"
            outcome.reject(f"too small: its crop is {track.box.width:.0f} pixels wide, {least}", track.start, track.end)
        elif kept < MIN_FRAMES:
            outcome.reject(f"too short: {kept} frames, least {MIN_FRAMES}", track.start, track.end)
        else:
            pieces += divide(track, step, kept, settings.max_frames)
    return rate, step, pieces


def divide(track: Piece, step: int, count: int, most: int) -> list[Piece]:
    """A track of `count` kept frames in as few equal pieces of at most `most` as will do."""
    parts = math.ceil(count / most)
    bounds = [track.first + step * (count * part // parts) for part in range(parts)] + [track.last + 1]
    seconds = (track.end - track.start) / (track.last + 1 - track.first)
    times = [track.start + seconds * (bound - track.first) for bound in bounds]
    return [Piece(bounds[i], bounds[i + 1] - 1, times[i], times[i + 1], track.box) for i in range(parts)]


def frames_of(source: Source, step: int) -> Iterator[Frame]:
    """Each step-th frame of a source. Raises InputError."""
    frames = read_frames(source.path) if source.key is None else read_lmdb(source, step)
    return (frame for frame in frames if frame.index % step == 0)


def read_lmdb_start(source: Source) -> tuple[np.ndarray, int]:
    """The first frame, (H, W, 3) uint8 RGB, of a video in an LMDB, and how many it has."""
    with opened_lmdb(source.path) as database, database.begin() as transaction:
        length = transaction.get(f"{source.key}-length".encode())
        if length is None:
            raise InputError(f"{source.key} is not in the LMDB", "check the lists beside it")
    return next(read_lmdb(source, 1)).rgb, min(int(length), LMDB_FRAMES)


def read_lmdb(source: Source, step: int) -> Iterator[Frame]:
    """Each step-th frame of a video in an LMDB."""
    with opened_lmdb(source.path) as database, database.begin() as transaction:
        length = min(int(transaction.get(f"{source.key}-length".encode())), LMDB_FRAMES)
        for index in range(0, length, step):
            data = transaction.get(f"{source.key}-{index:07}".encode())
            if data is None:
                raise InputError(f"frame {index} is missing", "make the LMDB anew")
            rgb = decode_image(np.frombuffer(data, np.uint8), f"frame {index} of {source.key}")
            yield Frame(index, index / LMDB_RATE, rgb)


def cut_pieces(frames: Iterable[Frame], pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray, np.ndarray]]:
    """Each piece with its times (N,) in seconds and crops (N, 256, 256, 3); holds the crops of one piece."""
    places = iter(pieces)
    piece = next(places, None)
    times, crops = [], []
    for frame in frames:
        if piece is not None and frame.index > piece.last:
            yield piece, np.array(times), np.array(crops)
            piece, times, crops = next(places, None), [], []
        if piece is None:
            return
        if frame.index >= piece.first:
            times.append(float(frame.time))
            crops.append(cut(frame.rgb, piece.box, CROP)[0])
    if piece is not None:
        yield piece, np.array(times), np.array(crops)


def open_sound(source: Source) -> Samples | None:
    """The sound of a video, or of a sound file beside it with its name; None without either."""
    if source.key is not None:
        return None
    beside = [source.path.with_suffix(suffix) for suffix in SOUNDS]
    paths = [source.path] if probe(source.path).has_audio else [path for path in beside if path.is_file()]
    return Samples.of(paths[0]) if paths else None


def cut_sound(sound: Samples, times: np.ndarray, late: float) -> dict[str, np.ndarray]:
    """`sound` and `sound_start` of a clip with frames at `times`, as the module's docstring has them; forwards only."""
    start, end = float(times[0]) - SOUND_MARGIN, float(times[-1]) + SOUND_MARGIN
    samples = sound.window(round((start + late) * RATE), round((end + late) * RATE))
    return {"sound": np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16), "sound_start": np.float64(start)}


def make_clip(
    folder: Path, name: str, piece: Piece, times: np.ndarray, crops: np.ndarray, settings: PrepareSettings,
    tools: Tools, heard: dict[str, np.ndarray],
) -> dict[str, Any] | str:  # fmt: skip
    """Measures and writes one clip. Returns its part of the index's row, or why it is left out."""
    found = [tools.landmarker.detect(crop) for crop in crops]
    keep = [i for i, face in enumerate(found) if face is not None]
    faces = [found[i] for i in keep]
    if not faces:
        return "no face"
    if len(faces) < MIN_FRAMES:
        return f"too short: {len(faces)} frames with a face of {len(found)}, least {MIN_FRAMES}"
    crops, times = crops[keep], times[keep]
    some = range(0, len(faces), max(1, len(faces) // 8))
    sharp = float(np.median([sharpness(crops[i], faces[i].points) for i in some]))
    if sharp < settings.min_sharpness:
        return f"too blurred: sharpness {sharp:.1f}, least {settings.min_sharpness:g}"
    points = np.stack([face.points for face in faces])
    box = piece.box
    data = {
        "points": points,
        "blendshapes": np.stack([face.blendshapes for face in faces]),
        "times": times,
        "box": np.array([box.x0, box.y0, box.x1, box.y1], float),
        **head_pose(faces, points, tools.template),
        **heard,
    }
    if tools.recogniser is not None:
        embed = tools.recogniser.embed
        data["embedding"] = np.stack([embed(crop, five_points(p)) for crop, p in zip(crops, points, strict=True)])
    write_whole(folder / f"{name}.npy", lambda file: np.save(file, crops))
    write_whole(folder / f"{name}.npz", lambda file: np.savez(file, **data))
    about = {"frames": len(faces), "start": round(float(times[0]), 3), "end": round(float(times[-1]), 3)}
    return {**about, "side": round(box.width), "sharpness": round(sharp, 1)}


def head_pose(faces: list[FaceShape], points: np.ndarray, template: np.ndarray | None) -> dict[str, np.ndarray]:
    """rotation, and with a template scale and translation, as the module's docstring has them."""
    if template is not None:
        _, scale, rotation, translation = normalise(points, template)
        pose = {"rotation": rotation, "scale": scale, "translation": translation}
        return {name: value.astype(np.float32) for name, value in pose.items()}
    rotations = [face.rotation for face in faces]
    return {} if any(r is None for r in rotations) else {"rotation": np.stack(rotations).astype(np.float32)}


def sharpness(rgb: np.ndarray, points: np.ndarray) -> float:
    """Variance of the Laplacian of the grey face in a 256 crop: below 15 there are no pores, lashes or teeth."""
    low = np.clip(points[:, :2].min(0), 0, CROP - 16).astype(int)
    high = np.clip(points[:, :2].max(0), low + 16, CROP).astype(int)
    grey = cv2.cvtColor(np.ascontiguousarray(rgb[low[1] : high[1], low[0] : high[0]]), cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def write_whole(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """A file that appears under its name when it is whole. Raises OutputError."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            save(file)
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "free some space or name another") from error


def clear(folder: Path) -> None:
    """Removes what an interruption left half-written."""
    for part in folder.glob(".*.part"):
        part.unlink()


# Shots and tracks


def find_tracks(
    frames: Iterable[Frame], detector: FaceDetector, size: tuple[int, int], outcome: Outcome
) -> list[Piece]:
    """Stretches of frames in which the largest face of a shot stays in sight and about its place, with their squares.

    Shots without a face are noted in `outcome`. `size`: width and height of the frames.
    """
    tracks: list[Piece] = []
    for frames_of_shot in shots(frames):
        seen = [(frame.index, float(frame.time), face) for frame, face in track_faces(frames_of_shot, detector)]
        found = [(index, time, crop_box(face)) for index, time, face in seen if face is not None]
        if not found:
            outcome.reject("no face", seen[0][1], seen[-1][1])
        for run in steady(found):
            box = square_around([box for _, _, box in run], size)
            tracks.append(Piece(run[0][0], run[-1][0], run[0][1], run[-1][1], box))
    return tracks


def shots(frames: Iterable[Frame]) -> Iterator[Iterator[Frame]]:
    """The frames of each shot. A shot must be used up before the next is asked for."""

    def numbered() -> Iterator[tuple[int, Frame]]:
        shot = 0
        for frame, is_new in mark_shots(frames):
            shot += is_new
            yield shot, frame

    for _, shot in groupby(numbered(), lambda pair: pair[0]):
        yield (frame for _, frame in shot)


Seen = tuple[int, float, Box]  # frame number, seconds, crop box


def steady(found: list[Seen]) -> Iterator[list[Seen]]:
    """Runs without long gaps in which the boxes together reach no farther than SPREAD times the smallest of them."""
    run: list[Seen] = []
    reach, smallest = np.zeros(4), 0.0  # of the run: all its boxes together, as x0, y0, -x1, -y1, and the least side
    for index, time, box in found:
        edges = np.array([box.x0, box.y0, -box.x1, -box.y1])
        if run:
            joined, least = np.minimum(reach, edges), min(smallest, box.width)
            spread = (-joined[2:] - joined[:2]).max() / least
            if time - run[-1][1] > GAP_SECONDS or spread > SPREAD:
                yield run
                run = []
            else:
                reach, smallest = joined, least
        if not run:
            reach, smallest = edges, box.width
        run.append((index, time, box))
    if run:
        yield run


def square_around(boxes: list[Box], size: tuple[int, int]) -> Box:
    """A square that holds the boxes with a margin, moved into the frame (width, height) where it fits in."""
    edges = np.array([(box.x0, box.y0, box.x1, box.y1) for box in boxes])
    low, high = edges[:, :2].min(0), edges[:, 2:].max(0)
    side = MARGIN * float((high - low).max())
    middle = (low + high) / 2
    inside = np.clip(middle, side / 2, np.array(size) - side / 2)
    return Box.square(*np.where(side <= np.array(size), inside, middle), side)


# Journal and index


class Journal:
    """The finished sources of a dataset; a line is added when all clips of a source are there."""

    def __init__(self, folder: Path, settings: PrepareSettings):
        """Opens or begins the dataset in `folder`.

        Raises InputError if it was made with other settings or by something else, OutputError.
        """
        self.path = folder / JOURNAL
        self.outcomes: dict[str, Outcome] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            if self.path.exists():
                self.read(settings)
                return
            if any(folder.glob("*.npz")):
                raise InputError(f"{folder} holds clips without a {JOURNAL}", "name another folder")
            write_whole(self.path, lambda file: file.write(line_of(settings.facts())))
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}", "name another folder") from error

    def read(self, settings: PrepareSettings) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):  # the last one was cut short
            write_whole(self.path, lambda file: file.writelines(whole))
        then, now = json.loads(whole[0]), settings.facts()
        other = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        if other:
            raise InputError(
                f"{self.path.parent} was prepared with other settings ({'; '.join(other)})",
                "use the same, or another folder",
            )
        outcomes = [Outcome(**json.loads(line)) for line in whole[1:]]
        self.outcomes = {outcome.source: outcome for outcome in outcomes}

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.source] = outcome
        try:
            with self.path.open("ab") as file:
                file.write(line_of(asdict(outcome)))
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}", "free some space") from error


def line_of(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def write_index(folder: Path, outcomes: Iterable[Outcome], done_before: int) -> Summary:
    """Decides identities and splits over all clips and writes index.csv and rejected.csv."""
    outcomes = list(outcomes)
    rows = sorted((row for outcome in outcomes for row in outcome.clips), key=lambda row: row["name"])
    rows = name_people(folder, rows)
    splits = split_people(rows)
    rows = [{**row, "split": splits[row["identity"]]} for row in rows]
    rejected = [row for outcome in outcomes for row in outcome.rejected]
    write_table(folder / INDEX, INDEX_COLUMNS, rows)
    write_table(folder / REJECTED, ["source", "start", "end", "reason"], rejected)
    frames, test = sum(row["frames"] for row in rows), list(splits.values()).count("test")
    return Summary(folder / INDEX, len(rows), len(splits), test, frames, len(rejected), done_before)


def write_table(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def name_people(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with an identity each: the given one, else the cluster of the embeddings, else the source file's name.

    A cluster is called by its first clip, so that its name, and with it its split, rarely changes when clips are added.
    """
    unknown = [row for row in rows if row["identity"] is None]
    means = [mean_embedding(folder / f"{row['name']}.npz") for row in unknown]
    if unknown and all(mean is not None for mean in means):
        labels = cluster(np.stack(means))
        first = {label: row["name"] for label, row in reversed(list(zip(labels, unknown, strict=True)))}
        names = {row["name"]: first[label] for label, row in zip(labels, unknown, strict=True)}
    else:
        names = {row["name"]: row["stem"] for row in unknown}
    return [{**row, "identity": row["identity"] or names[row["name"]]} for row in rows]


def mean_embedding(path: Path) -> np.ndarray | None:
    """Unit vector (K,) of a clip's person, or None if none is stored."""
    with np.load(path) as data:
        if "embedding" not in data:
            return None
        mean = data["embedding"].mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-6)


def cluster(embeddings: np.ndarray) -> list[int]:
    """Numbers of the people that unit vectors (N, K) belong to: average linkage of cosines, cut at SAME_PERSON.

    With MobileFaceNet on 599 clips of 472 people labelled by others (5 to 10 % wrong): 482 clusters, 84 % of the pairs
    of one person are found, 80 % of the pairs found are of one. Takes 8 N^2 bytes.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(embeddings) < 2:
        return [1] * len(embeddings)
    return fcluster(linkage(embeddings, "average", "cosine"), 1 - SAME_PERSON, "distance").tolist()


def split_people(rows: list[dict[str, Any]]) -> dict[str, str]:
    """ "train" or "test" for each identity: as the input says, else by `is_held_out`.

    An identity that the input has in both goes to train. Where chance gives one of the two splits to nobody, the first
    identity by its hash goes there, so that a small dataset has both; not where the input says it all.
    """
    given: dict[str, set[str | None]] = {}
    for row in rows:
        given.setdefault(row["identity"], set()).add(row["split"])
    splits = {}
    for identity, said in given.items():
        own = "test" if is_held_out(identity) else "train"
        splits[identity] = own if said == {None} else "test" if said == {"test"} else "train"
    free = sorted((i for i, said in given.items() if said == {None}), key=lambda i: zlib.crc32(i.encode()))
    for split in ("train", "test"):
        if free and len(splits) > 1 and split not in splits.values():
            splits[free[0]] = split
    return splits
