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

import math
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np

from dpe_cli.crop import cut
from dpe_cli.dataset import CROP
from dpe_cli.detectors import RESEARCH_ONLY, ArcFace, quiet_stderr
from dpe_cli.errors import DeviceError, DPEError, FaceError, OutputError
from dpe_cli.face import Box, FaceDetector, crop_box, make_detector
from dpe_cli.journal import REJECTED, Journal, Outcome, PrepareSettings, Summary, clear, write_index, write_whole
from dpe_cli.landmark_net import NetworkLandmarker
from dpe_cli.landmarks import FaceShape, Landmarker, five_points
from dpe_cli.limits import Limits, limits, set_limits
from dpe_cli.listing import LMDB_RATE, Source, find_sources, frames_of, read_lmdb_start
from dpe_cli.motion_space import MotionSpace, normalise
from dpe_cli.people import track_faces
from dpe_cli.shots import mark_shots
from dpe_cli.speech import RATE, Samples
from dpe_cli.video import Frame, probe, read_frames

MARGIN = 1.1  # side of the square over the reach of all crop boxes: room for what training shifts and zooms at random
SPREAD = 1.8  # a face that reaches over so many of its own (smallest) crop boxes begins a new clip
GAP_SECONDS = 0.5  # out of sight for longer, it does too
MIN_FRAMES = 10  # with a face, in a clip
SOUNDS = (".wav", ".flac", ".opus", ".ogg", ".m4a", ".mp3")  # of files beside a video that has no sound
SOUND_MARGIN = 1.0  # seconds of sound kept before and after a clip
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A clip to be: the frames from `first` to `last`, both included, of one square."""

    first: int
    last: int
    start: float  # seconds
    end: float
    box: Box


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
