"""An edit or a dub in segments: on many machines, or one after the other so that a killed run goes on where it was.

The second keeps its plan and its segments in a hidden folder beside the output, `work_folder`, until that is whole.

A plan holds all that is decided before the networks see the source: who is where in each frame (smoothed boxes, tracks,
cuts) and the driving's motion; of a dub the person's closed mouth and the loudness of the speech, which is heard again.
So a segment needs nothing of the others. What pastes the faces back remembers some seconds (`Paster.memory`); a segment
therefore begins its work that much earlier, and at a multiple of jobs.UNIT, for batches. Its frames are then those of
the whole edit, bit for bit, on the same kind of machine.

A plan is two files. FILE.json (schema dpe-plan/1): the request, the segments' borders, the beginning of the report.
FILE.safetensors, for N frames, E edits, D drivers: `ticks` (N,) int64, times in `time_base`; `shown` (N,) int64, the
number of the source's frame that is shown then, whose own time is that of the same number; `cuts` (N,) uint8;
`boxes` (E, N, 4) float64, pixels, not a number without a face; `scores` (E, N) float64; `tracks` (E, N) int64, 0 for
none; `others` (E, N) uint8; for driver d its smoothed codes `codesD` (M, K) float32 at `timesD` (M,) float64 seconds;
of a dub `closed`, `usual` and `spread` (8,) float32, see `speech_motion.Person`.
Beside them, for segment 3: FILE.0003.mp4 and its part of the report, FILE.0003.json, which says that both are whole.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import partial
from itertools import islice, tee
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

import dpe_cli
from dpe_cli.container import PIPE, bytes_of, files_of
from dpe_cli.control import Control
from dpe_cli.dub import (
    Dub,
    DubSettings,
    Seen,
    check_dub,
    decide,
    edits_for,
    networks_used,
    seen_source,
    shown_frames,
)
from dpe_cli.dub import Plan as Lengths
from dpe_cli.edit import (
    AUDIO,
    VIDEO_SUFFIXES,
    Driving,
    Edit,
    Edits,
    EditSettings,
    Progress,
    Sight,
    Target,
    bind_control,
    check_request,
    decide_paste,
    describe_driver,
    edits_of,
    find_faces,
    follow_source,
    is_still,
    paster_for,
    plan_jobs,
    plan_target,
    read_drivers,
    refuse_seams,
    silent,
    source_boxes,
    stack_jobs,
    start_report,
    unheard,
    without_idle,
)
from dpe_cli.errors import InputError, OutputError, WeightsError
from dpe_cli.face import Box, FaceDetector
from dpe_cli.jobs import UNIT, Engine, Job, lending_of, run_jobs
from dpe_cli.lending import BACK
from dpe_cli.limits import TEXT_BYTES, check_file, partial_of
from dpe_cli.motion import Curve, MotionTrack
from dpe_cli.motion_file import Driver
from dpe_cli.paste import Paster
from dpe_cli.pipeline import ahead, ended
from dpe_cli.report import FrameFate, PixelHash, Report, write_text
from dpe_cli.speech import Loudness
from dpe_cli.speech_motion import Person
from dpe_cli.video import Frame, VideoInfo, ffmpeg_exe, join_video, probe, read_frames, workplace, write_video

SCHEMA = "dpe-plan/1"
SEGMENT_SECONDS = 10.0  # of a run that can be resumed: what a kill costs at most
NEAR_CUT = 0.25  # of a segment's length: a cut between shots that is so near to a border becomes the border
LEAST_FRAMES = 2  # of a segment: two key frames in a row could be taken for one picture
ASKED = ("weights", "sha256", "precision", "backend", "batch_size", "detector", "face_models", "made_of")
WITHIN = Fraction(1, 2000)  # seconds, half of the least step between two frames


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is decided of an edit; see the top of this file. E edits, N frames."""

    path: Path  # of its JSON
    source: Path
    output: Path
    edits: Edits
    settings: EditSettings
    dub: Dub | None  # None: an edit
    asked: dict[str, Any]  # ASKED of the networks and the detector, None where nothing was; made_of: for the sidecar
    paste: bool
    first_boxes: tuple[Box, ...]  # of each edit: where its face is seen first
    target: dict[str, Any]  # audio, start, end, still, and for a still the driving's fps, time_base and duration
    source_bytes: int
    borders: tuple[int, ...]  # segment k has the frames borders[k] to borders[k + 1], that one not included
    report: Report  # its beginning: settings, inputs, notes
    times: tuple[Fraction, ...]  # of the frames
    shown: np.ndarray
    cuts: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    tracks: np.ndarray
    others: np.ndarray
    drivers: dict[Path, Driver]
    key: str  # says which plan a segment is of: a hash of the request for a run that is resumed, else random

    @property
    def command(self) -> str:
        """What makes its segments."""
        return "dub" if self.dub else "edit"

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self.borders) - 1

    @property
    def frames(self) -> int:
        """How many the output gets."""
        return self.borders[-1]

    def summary(self) -> dict[str, Any]:
        """What a scheduler needs, ready for JSON: the segments with their frames and seconds of the source."""
        each = [
            {"segment": number, "frames": int(frames), "start": float(self.times[begin])}
            for number, (begin, frames) in enumerate(zip(self.borders, np.diff(self.borders), strict=False))
        ]
        return {"plan": str(self.path), "output": str(self.output), "frames": self.frames, "segments": each}

    def video_of(self, segment: int) -> Path:
        """Where a segment's pictures go."""
        return self.path.with_name(f"{self.path.stem}.{segment:04}{self.output.suffix.lower()}")

    def record_of(self, segment: int) -> Path:
        """Where its part of the report goes, when it is whole."""
        return self.path.with_name(f"{self.path.stem}.{segment:04}.json")

    def written_as(self) -> Target:
        """What the frames are written with. Raises InputError for a source that is not the planned one."""
        info, target = probe(self.source, self.settings.rate), dict(self.target)
        if bytes_of(self.source) != self.source_bytes:
            raise InputError(f"{self.source} is not the file that was planned for", "plan anew")
        if self.dub and [file.stat().st_size for file in files_of(self.dub.audio)] != [self.dub.audio_bytes]:
            raise InputError(f"{self.dub.audio} is not the file that was planned for", "plan anew")
        if target["still"]:
            timing = {name: Fraction(target[name]) for name in ("fps", "time_base")}
            info = replace(info, **timing, duration=float(target["duration"]), is_image=False)
        audio = target["audio"] and Path(target["audio"])
        return Target(info, audio, target["start"], target["end"], target["still"])

    def boxed(self, edit: int, sights: dict[int, Sight]) -> Iterator[tuple[Frame, Box | None]]:
        """All frames, without pictures, with the boxes of one edit; fills `sights`."""
        for index, moment in enumerate(self.times):
            score, track = float(self.scores[edit, index]), int(self.tracks[edit, index])
            others, new_shot = bool(self.others[edit, index]), bool(self.cuts[index])
            sights[index] = Sight(None if math.isnan(score) else score, track or None, others, new_shot)
            box = self.boxes[edit, index]
            yield Frame(index, moment, None), None if np.isnan(box).any() else Box(*box.tolist())

    def jobs(self, edit: int, sights: dict[int, Sight]) -> Iterator[Job]:
        """What is to be done with all frames in one edit; without pictures."""
        if self.dub:
            return self.dub.jobs(self.boxed(edit, sights), sights)
        chosen = self.edits.each[edit]
        settings = replace(self.settings, face=chosen.face, strength=chosen.strength)
        own = {path: self.drivers[path] for path in chosen.driving.paths}
        first = None if self.paste else self.first_boxes[edit]
        return plan_jobs(self.boxed(edit, sights), own, chosen.driving, settings, sights, first)

    def paster(self, engine: Engine, detector: FaceDetector) -> Paster | None:
        """What pastes the faces back, None where only the crop is written."""
        if self.dub:
            return self.dub.paster(engine, detector)
        return paster_for(self.settings, engine, detector) if self.paste else None


# Making a plan


def make_plan(
    path: Path,
    source: Path,
    driving: Driving | Edits,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings,
    *,
    count: int | None = None,
    seconds: float | None = None,
    asked: dict[str, Any] | None = None,
    key: str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Plan:
    """Follows the faces through the source, reads the driving, and writes the plan of `count` segments, or of segments
    of `seconds`, to `path`.

    `asked` is kept for those who make the segments. Raises what `edit_video` raises before its networks run.
    """
    edits = edits_of(driving, settings)
    source_info, driver_infos = check_request(source, edits, output, settings)
    check_container(output)
    if is_still(source_info, driver_infos):
        raise InputError("a still edited by a still is one picture, which has no segments", "leave that out")
    settings = without_idle(settings, source_info, driver_infos, say)
    report = start_report(source_info, driver_infos, edits, detector, settings)
    remark = report.remarking(say)
    started = time.monotonic()
    bound = bind_control(edits, settings, engine, remark)  # what the weights cannot do is known now
    paste = decide_paste(edits, settings, remark)
    paster_for(settings, engine, detector)  # what it lacks is known now
    first_time, first_boxes = find_faces(source, detector, settings, edits)
    drivers = read_drivers(driver_infos, edits, engine, detector, settings, progress, remark)
    report.inputs["driving"] = [describe_driver(driver) for driver in drivers]
    target = plan_target(source_info, drivers, settings, first_time, remark)
    followed = follow_source(source, detector, settings, edits, remark)
    followed = progress(followed, source_info.n_frames or None, f"looking for faces in {source.name}")
    sights: list[dict[int, Sight]] = [{} for _ in edits.each]
    each = [
        source_boxes(source_info, drivers, picked, number, sights[number], settings.smooth)
        for number, picked in enumerate(tee(followed, len(edits.each)))
    ]
    table = read_table(each, sights)
    numbers = np.arange(len(table["times"]))
    plan = unwritten(
        path, source, output, engine, edits, settings, target, report, asked, key,
        shown=0 * numbers if target.still else numbers,
        dub=None,
        paste=paste,
        first_boxes=tuple(first_boxes),
        drivers=dict(zip(edits.paths, drivers, strict=True)),
        **table,
    )  # fmt: skip
    frames = min(sum(1 for _ in replace(plan, settings=bound).jobs(number, {})) for number in range(len(edits.each)))
    report.seconds = time.monotonic() - started
    return written_plan(plan, frames, target.info, count, seconds)


def make_dub_plan(
    path: Path,
    source: Path,
    audio: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: DubSettings,
    *,
    count: int | None = None,
    seconds: float | None = None,
    asked: dict[str, Any] | None = None,
    key: str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Plan:
    """The same for a dub: follows the face and hears the speech. Raises what `dub_video` raises early."""
    started, report = time.monotonic(), Report()
    info = check_dub(source, audio, output, settings)
    check_container(output)
    remark = report.remarking(say)
    dub = decide(info, audio, engine, detector, settings, report, progress, remark)
    dub.paster(engine, detector)  # what it lacks is known now
    edit, edits = dub.settings.edit, edits_for(source, dub.settings.edit)
    followed = follow_source(source, detector, edit, edits, remark)
    followed = progress(followed, info.n_frames or None, f"looking for faces in {source.name}")
    seen = (
        (replace(frame, rgb=None, original=None), box, sight) for frame, box, sight in seen_source(followed, info, edit)
    )
    first_turn: list[Seen] = []

    def turn(again: bool) -> Iterator[Seen]:
        return iter(first_turn) if again else kept(seen, first_turn)

    sights: dict[int, Sight] = {}
    table = read_table([shown_frames(turn, info, dub.lengths, sights)], [sights])
    frames, once = len(table["times"]), len(first_turn)
    if not frames:
        raise InputError(f"{source} has no frames in the span asked for", "check --start and --end")
    numbers = np.arange(frames)
    target = dub.target(info)
    plan = unwritten(
        path, source, output, engine, edits, edit, target, report, asked, key,
        shown=numbers % once if dub.lengths.more_frames == "loop" else np.minimum(numbers, once - 1),
        dub=replace(dub, audio=audio.absolute()),
        paste=not dub.settings.crop_only,
        first_boxes=(),
        drivers=dub.drivers,
        **table,
    )  # fmt: skip
    report.seconds = time.monotonic() - started
    return written_plan(plan, frames, target.info, count, seconds)


def kept(items: Iterable[T], into: list[T]) -> Iterator[T]:
    """Passes the items on and keeps them."""
    for item in items:
        into.append(item)
        yield item


def unwritten(
    path: Path, source: Path, output: Path, engine: Engine, edits: Edits, settings: EditSettings, target: Target,
    report: Report, asked: dict[str, Any] | None, key: str | None, **decided: Any,
) -> Plan:  # fmt: skip
    """A plan that is not yet parted into segments."""
    timing = {name: str(getattr(target.info, name)) for name in ("fps", "time_base", "duration")}
    audio = target.audio and str(target.audio.absolute())
    return Plan(
        path=path,
        source=source.absolute(),
        output=output.absolute(),
        edits=edits,
        settings=settings,
        asked={**(asked or {}), "sha256": engine.description.get("sha256")},
        target={"audio": audio, "start": target.start, "end": target.end, "still": target.still, **timing},
        source_bytes=bytes_of(source),
        borders=(),
        report=report,
        key=key or os.urandom(16).hex(),
        **decided,
    )


def written_plan(plan: Plan, frames: int, info: VideoInfo, count: int | None, seconds: float | None) -> Plan:
    """The plan with the borders of `count` segments, or of segments of `seconds`, written. Raises OutputError."""
    length = float(plan.times[frames - 1] - plan.times[0] + 1 / info.fps)
    count = count or max(1, round(length / (seconds or SEGMENT_SECONDS)))
    plan = replace(plan, borders=borders_of(plan.times[:frames], np.flatnonzero(plan.cuts).tolist(), count))
    write_plan(plan)
    return plan


def check_container(output: Path) -> None:
    """Raises OutputError for an output that cannot be joined of segments."""
    if output == PIPE or output.suffix.lower() not in VIDEO_SUFFIXES:
        raise OutputError(
            f"{output} cannot be made in segments", f"name a file that ends in {' or '.join(VIDEO_SUFFIXES)}"
        )


def read_table(each: list[Iterator[tuple[Frame, Box | None]]], sights: list[dict[int, Sight]]) -> dict[str, Any]:
    """What tracking says of each frame, edit by edit, as `Plan` keeps it."""
    times: list[Fraction] = []
    rows: list[list[tuple[tuple[float, ...], float, int, bool]]] = [[] for _ in each]
    cuts: list[bool] = []
    for boxed in zip(*each, strict=True):
        times.append(boxed[0][0].time)
        for number, (frame, box) in enumerate(boxed):
            sight = sights[number].pop(frame.index)
            corners = (math.nan,) * 4 if box is None else (box.x0, box.y0, box.x1, box.y1)
            score = math.nan if sight.score is None else sight.score
            rows[number].append((corners, score, sight.track or 0, sight.others))
        cuts.append(sight.new_shot)
    boxes, scores, tracks, others = (
        np.array([[row[column] for row in edit] for edit in rows], kind)
        for column, kind in enumerate((np.float64, np.float64, np.int64, np.uint8))
    )
    named = {"boxes": boxes, "scores": scores, "tracks": tracks, "others": others}
    return {"times": tuple(times), "cuts": np.array(cuts, np.uint8), **named}


def borders_of(times: Sequence[Fraction], cuts: Iterable[int], count: int) -> tuple[int, ...]:
    """Borders of `count` segments of nearly equal length in time, at cuts between shots where these are near.

    There are fewer where there are not enough frames.
    """
    frames = len(times)
    count = max(1, min(count, frames // LEAST_FRAMES))
    span, borders = (times[-1] - times[0]) / count, [0]
    for number in range(1, count):
        wish = times[0] + span * number
        near = [cut for cut in cuts if cut < frames and abs(times[cut] - wish) <= NEAR_CUT * span]
        border = min(near, key=lambda cut: abs(times[cut] - wish)) if near else bisect_left(times, wish)
        least, most = borders[-1] + LEAST_FRAMES, frames - LEAST_FRAMES * (count - number)
        borders.append(min(max(border, least), most))
    return (*borders, frames)


# A plan's files


def write_plan(plan: Plan) -> None:
    """Writes both files, the JSON last. Raises OutputError."""
    base = Fraction(1, math.lcm(*(moment.denominator for moment in plan.times)))
    tensors = {"ticks": np.array([int(moment / base) for moment in plan.times], np.int64)}
    tensors |= {name: getattr(plan, name) for name in ("shown", "cuts", "boxes", "scores", "tracks", "others")}
    drivers = []
    for number, (path, driver) in enumerate(plan.drivers.items()):
        tensors |= {f"times{number}": driver.track.times, f"codes{number}": driver.track.codes}
        drivers.append({"path": path_text(path), "last_time": driver.track.last_time, "neutral": driver.neutral})
    settings = {**asdict(replace(plan.settings, control=None)), "audio": audio_of(plan.settings)}
    settings["control"] = plan.settings.control and plan.settings.control.to_dict()
    words = {
        "schema": SCHEMA,
        "dpe": dpe_cli.__version__,
        "source": str(plan.source),
        "output": str(plan.output),
        "edits": [asdict(edit) for edit in plan.edits.each],
        "settings": settings,
        "dub": plan.dub and dub_words(plan.dub, tensors),
        "asked": plan.asked,
        "paste": plan.paste,
        "first_boxes": [asdict(box) for box in plan.first_boxes],
        "target": plan.target,
        "source_bytes": plan.source_bytes,
        "borders": plan.borders,
        "seconds": [float(plan.times[border]) for border in plan.borders[:-1]],  # where segments begin, for people
        "drivers": drivers,
        "time_base": str(base),
        "report": asdict(plan.report),
        "key": plan.key,
    }
    table = plan.path.with_suffix(".safetensors")
    partial = partial_of(table)
    try:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial)
        words["table"] = hashlib.sha256(partial.read_bytes()).hexdigest()
        os.replace(partial, table)
        write_text(plan.path, json.dumps(words, indent=1, default=path_text, allow_nan=False) + "\n")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{plan.path} cannot be written ({error})", "check the folder and the disk") from error
    finally:
        partial.unlink(missing_ok=True)


def dub_words(dub: Dub, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the JSON says of a dub, less what it has in common with edits; the person goes to the tensors."""
    tensors |= asdict(dub.person)
    settings = {**asdict(dub.settings), "edit": None}
    followed = [name for name in ("pose", "blink") if Path(settings[name]) in dub.drivers]
    settings |= {name: path_text(Path(settings[name])) for name in followed}
    words = {name: getattr(dub, name) for name in ("audio", "audio_bytes", "still", "networks")}
    return {**words, "settings": settings, "lengths": asdict(dub.lengths), "loudness": asdict(dub.loudness)}


def dub_from(
    words: dict[str, Any], tensors: dict[str, np.ndarray], edit: EditSettings, drivers: dict[Path, Driver]
) -> Dub:
    """The same back. Raises KeyError, TypeError, ValueError where it is damaged."""
    parts = {
        "audio": Path(words["audio"]),
        "settings": DubSettings(**{field.name: words["settings"][field.name] for field in fields(DubSettings)}),
        "lengths": Lengths(**words["lengths"]),
        "loudness": Loudness(**words["loudness"]),
        "person": Person(*(tensors[part.name] for part in fields(Person))),
        "drivers": drivers,
    }
    parts["settings"] = replace(parts["settings"], edit=edit)
    dub = Dub(**{name: words[name] for name in ("audio_bytes", "still", "networks")}, **parts)
    for checked in (dub, dub.settings, dub.lengths, dub.loudness):
        check_types(checked)
    if len({known.shape for known in asdict(dub.person).values()}) > 1 or dub.person.closed.ndim != 1:
        raise ValueError("its person is wrong")
    return dub


def path_text(value: Any) -> str:
    """Files of models and drivings by their full names, as segments may be made in another folder."""
    return str(value.absolute()) if isinstance(value, Path) else str(value)


def audio_of(settings: EditSettings) -> str:
    """The choice of sound, a file by its full name."""
    return settings.audio if settings.audio in AUDIO else str(Path(settings.audio).absolute())


def read_plan(path: Path) -> Plan:
    """Raises InputError for a file that is missing, damaged or no plan."""
    path = Path(path).absolute()
    for file in (path, path.with_suffix(".safetensors")):
        check_file(file, TEXT_BYTES)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(words, dict) or words.get("schema") != SCHEMA:
            raise InputError(f"{path} is no plan of this dpe", "make one with: dpe plan ... --split N")
        table = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(table).hexdigest() != words["table"]:
            raise InputError(f"{path.with_suffix('.safetensors')} is not the table of {path.name}", "plan anew")
        return plan_from(path, words, load(table))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path.with_suffix('.safetensors')} is missing", "plan anew") from error
    except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
            RecursionError) as error:  # fmt: skip
        raise InputError(f"{path} is damaged ({str(error)[:80]})", "plan anew") from error


def plan_from(path: Path, words: dict[str, Any], tensors: dict[str, np.ndarray]) -> Plan:
    """A plan of its files. Raises KeyError, TypeError, ValueError where they are damaged."""
    curve, models = words["settings"]["curve"], ("parsing", "landmarker", "enhancer")
    settings = {**words["settings"], "curve": curve and Curve(tuple(curve["times"]), tuple(curve["values"]))}
    settings |= {name: settings[name] and Path(settings[name]) for name in models}
    settings["control"] = settings["control"] and Control.from_dict(settings["control"])
    edits = []
    for edit in words["edits"]:
        driving = edit["driving"]
        whole = {role: driving[role] and Path(driving[role]) for role in ("expression", "pose")}
        own = tuple(Path(file) for file in driving["factors"])
        edits.append(
            Edit(Driving(**whole, factors=own, controlled=driving["controlled"]), edit["face"], edit["strength"])
        )
    target = {
        name: words["target"][name] for name in ("audio", "start", "end", "still", "fps", "time_base", "duration")
    }
    numbers = [Fraction(target["fps"]), Fraction(target["time_base"]), Fraction(target["duration"])]
    base = Fraction(words["time_base"])
    if min(*numbers[:2], base) <= 0:
        raise ValueError("its times are not positive")
    times = tuple(int(tick) * base for tick in tensors["ticks"])
    count, borders = len(edits), tuple(int(border) for border in words["borders"])
    shapes = {"shown": (len(times),), "cuts": (len(times),), "boxes": (count, len(times), 4)}
    shapes |= {name: (count, len(times)) for name in ("scores", "tracks", "others")}
    if any(tensors[name].shape != shape for name, shape in shapes.items()):
        raise ValueError("its tables do not fit together")
    shown = tensors["shown"]
    if len(shown) and not (shown.min() >= 0 and (shown <= np.arange(len(shown))).all()):
        raise ValueError("it shows frames before their time")
    if borders[0] != 0 or list(borders) != sorted(set(borders)) or borders[-1] > len(times):
        raise ValueError("the borders of its segments do not rise")
    drivers: dict[Path, Driver] = {}
    for number, driver in enumerate(words["drivers"]):
        track = MotionTrack(tensors[f"times{number}"], tensors[f"codes{number}"], driver["last_time"])
        info = VideoInfo(Path(driver["path"]), 0, 0, Fraction(25), len(track.times))
        drivers[info.path] = Driver(info, [], track, neutral=driver["neutral"])
    own = words["dub"] and dub_from(words["dub"], tensors, EditSettings(**settings), drivers)
    if set(drivers) != set(own.settings.files if own else Edits(tuple(edits)).paths):
        raise ValueError("its drivings are not those of its edits")
    asked = {name: words["asked"].get(name) for name in ASKED}
    if not isinstance(asked["made_of"], dict | None):
        raise ValueError("what it is made of is wrong")
    plan = Plan(
        path=path,
        source=Path(words["source"]),
        output=Path(words["output"]),
        edits=Edits(tuple(edits)),
        settings=EditSettings(**settings),
        dub=own,
        asked=asked,
        paste=bool(words["paste"]),
        first_boxes=tuple(Box(**box) for box in words["first_boxes"]),
        target=target,
        source_bytes=words["source_bytes"],
        borders=borders,
        report=report_from(words["report"]),
        times=times,
        drivers=drivers,
        key=words["key"],
        **{name: tensors[name] for name in shapes},
    )
    for checked in (plan, plan.settings, plan.report, *edits, *plan.first_boxes):
        check_types(checked)
    return plan


def check_types(record: Any) -> None:
    """Raises ValueError where a field of a dataclass does not hold what it should; the items of lists are not seen."""
    for name, hint in get_type_hints(type(record)).items():
        kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])]
        value = getattr(record, name)
        if Any not in kinds and not isinstance(value, tuple(kinds)) and not (float in kinds and type(value) is int):
            raise ValueError(f"{name} is wrong")


def report_from(words: dict[str, Any]) -> Report:
    """A report, or a part of one, of its JSON."""
    known = {field.name for field in fields(Report)}
    report = Report(**{name: value for name, value in words.items() if name in known})
    report.frames = [FrameFate(**{**frame, "box": frame["box"] and tuple(frame["box"])}) for frame in report.frames]
    report.self_reconstruction = [(int(index), float(value)) for index, value in report.self_reconstruction]
    return report


# Making segments


def check_segment(plan: Plan, segment: int) -> None:
    """Raises InputError unless there is such a segment."""
    if not 0 <= segment < plan.segments:
        raise InputError(f"there is no segment {segment} in {plan.path}", f"name one from 0 to {plan.segments - 1}")


def edit_segments(
    plan: Plan,
    first: int,
    last: int,
    engine: Engine,
    detector: FaceDetector,
    progress: Progress = silent,
) -> Report:
    """Makes the segments from `first` to `last`, one file each; gives the record of the last one.

    Raises InputError for a source or a plan that has changed, WeightsError for other weights than the plan's.
    """
    check_segment(plan, first)
    check_segment(plan, last)
    wanted, there = plan.asked.get("sha256"), engine.description.get("sha256")
    if wanted != there:
        raise WeightsError(
            f"{plan.path} was made for weights with the sha256 {wanted}, these have {there}", "plan anew"
        )
    if detector.name != plan.report.detector:
        raise InputError(
            f"{plan.path} was made with the detector {plan.report.detector}, not {detector.name}", "use --detector"
        )
    if plan.dub and plan.dub.networks != networks_used():
        raise WeightsError(f"{plan.path} was made for other networks of speech and landmarks", "plan anew")
    bound = bind_control(plan.edits, plan.settings, engine, unheard)  # the plan's report has its remarks
    plan = replace(plan, settings=bound)
    target, report = plan.written_as(), Report()
    edited = edited_span(plan, target, plan.borders[first], plan.borders[last + 1], engine, detector, report)
    which = f"segment {first}" if first == last else f"segments {first} to {last}"
    total = plan.borders[last + 1] - plan.borders[first]
    doing = "dubbing" if plan.dub else "editing"
    edited = progress(ahead(edited), total, f"{doing} {plan.source.name}, {which}")
    record = Report()
    with ended(edited):
        for segment in range(first, last + 1):
            begin, end = plan.borders[segment], plan.borders[segment + 1]
            started = time.monotonic()
            pixels = PixelHash()
            frames = (frame for _, frame in pixels.passing(islice(edited, end - begin)))
            video = plan.video_of(segment)
            plan.record_of(segment).unlink(missing_ok=True)
            # `start` makes it begin at 0: a container may hold its own beginning less exactly than steps
            written = write_video(frames, target.info, video, start=0.0, overwrite=True, **asdict(plan.settings.wish))
            if written.frames != end - begin:
                raise InputError(f"{plan.source} is not the file that was planned for", "plan anew")
            record = Report(
                engine=dict(engine.description),
                output={
                    "path": str(video),
                    "plan": plan.key,
                    "frames": end - begin,
                    "bytes": video.stat().st_size,
                    "pixels": pixels.digests.hex(),
                },
                frames=[fate for fate in report.frames if begin <= fate.index < end],
                self_reconstruction=[pair for pair in report.self_reconstruction if begin <= pair[0] < end],
                notes=list(written.notes),
                seconds=time.monotonic() - started,
            )
            # in place, for the networks' thread goes on adding to it
            del report.frames[
                : next((n for n, fate in enumerate(report.frames) if fate.index >= end), len(report.frames))
            ]
            write_record(plan.record_of(segment), record)
    return record


def edited_span(
    plan: Plan, target: Target, begin: int, end: int, engine: Engine, detector: FaceDetector, report: Report
) -> Iterator[tuple[Job, Frame]]:
    """The edited frames from number `begin` to `end`, that one not included, as the whole edit makes them."""
    pasters = [plan.paster(engine, detector) for _ in plan.edits.each]
    lends = lending_of(engine) is not None and bool(plan.dub or plan.edits.mode != "pose")
    start, stop = first_needed(plan.times, begin, memory_of(pasters, lends)), min(-(-end // UNIT) * UNIT, plan.frames)
    pictures = ahead(planned_frames(plan, target, start, stop))
    edited: Iterator[tuple[Job, Frame]] | None = None
    for number, own in enumerate(tee(pictures, len(plan.edits.each))):
        sights: dict[int, Sight] = {}
        jobs = with_pictures(plan.jobs(number, sights), own, sights, begin, end)
        jobs = plan.dub.spoken(jobs, engine) if plan.dub else jobs
        jobs = stack_jobs(jobs, number, sights, edited, report)
        edited = run_jobs(jobs, engine, pasters[number], report, plan.settings.crop_size)
    for job, frame in edited:
        if job.frame.index >= end:
            return
        if not job.halo:
            yield job, frame


def memory_of(pasters: Iterable[Paster | None], lends: bool) -> float:
    """Seconds: nothing older counts for a frame.

    What a face looked like that was pasted back earlier counts, and for that what was lent to it.
    """
    return max(0.0 if paster is None else paster.memory for paster in pasters) + (BACK if lends else 0.0)


def first_needed(times: Sequence[Fraction], begin: int, memory: float) -> int:
    """Where work begins for what is to be right from frame `begin` on.

    Jitter looks at one frame before that, pasting and lending at `memory` seconds before each, and batches begin at
    multiples of UNIT.
    """
    if begin == 0:
        return 0
    reach = times[begin - 1] - Fraction(memory) - WITHIN
    return bisect_left(times, reach) // UNIT * UNIT


def planned_frames(plan: Plan, target: Target, start: int, stop: int) -> Iterator[Frame]:
    """The source's frames from number `start` to `stop`. Raises InputError where they have other times than planned."""
    frames, frame, last = iter(()), None, None
    for index in range(start, stop):
        wanted = int(plan.shown[index])
        if wanted != last:
            if last is None or wanted != last + 1:  # the first of this part, or of another turn
                begin = plan.settings.start if wanted == 0 else plan.times[wanted] - WITHIN
                frames = read_frames(plan.source, begin, plan.settings.end, fps=plan.settings.rate, exact=True)
            frame, last = next(frames, None), wanted
        if frame is None or not (target.still or frame.time == plan.times[wanted]):
            raise InputError(
                f"frame {wanted} of {plan.source}, at {float(plan.times[wanted]):.3f} s, is not found there again",
                f"plan anew, or {plan.command} it in one piece",
            )
        yield replace(frame, index=index, time=plan.times[index])


def with_pictures(
    jobs: Iterable[Job], frames: Iterator[Frame], sights: dict[int, Sight], begin: int, end: int
) -> Iterator[Job]:
    """The jobs that there are frames for, with these; those outside the part from `begin` to `end` are its halo."""
    jobs = iter(jobs)
    for frame in frames:
        for job in jobs:
            if job.frame.index == frame.index:
                yield replace(job, frame=frame, halo=not begin <= frame.index < end)
                break
            sights.pop(job.frame.index)


def write_record(path: Path, record: Report) -> None:
    """Writes a part of a report, which says that its segment is whole. Raises OutputError."""
    try:
        write_text(path, json.dumps(asdict(record), default=str, allow_nan=False))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", "check the folder and the disk") from error


def read_record(plan: Plan, segment: int) -> Report | None:
    """The record of a segment that is whole, None for one that is not there or damaged."""
    try:
        record = report_from(json.loads(plan.record_of(segment).read_text(encoding="utf-8")))
        whole = record.output["bytes"] == plan.video_of(segment).stat().st_size
        whole = whole and len(bytes.fromhex(record.output["pixels"])) == 32 * record.output["frames"]
        return record if whole and record.output["plan"] == plan.key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Joining


def join_plan(
    plan: Plan,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    folder: Path | None = None,
    ready: Callable[[Path, Report], None] = lambda part, report: None,
    say: Callable[[str], None] = unheard,
) -> Report:
    """Joins all segments of a plan to its output. The report is the one of the whole edit.

    `ready` gets the whole file and the report before the output takes its name. `folder`: see `join_video`.
    Raises InputError for segments that are missing, OutputError, QualityError for a seam above the limit.
    """
    started, output = time.monotonic(), output or plan.output
    records = [read_record(plan, segment) for segment in range(plan.segments)]
    missing = [str(segment) for segment, record in enumerate(records) if record is None]
    if missing:
        raise InputError(
            f"of {plan.segments} segments these are not whole: {', '.join(missing)}",
            f"make each with: dpe {plan.command} --segment {missing[0]} {plan.path}",
        )
    report = merged(plan, records)
    for _ in refuse_seams(iter(()), plan.settings.seam_limit, report):
        pass  # there is nothing to pass on: it only looks
    target = plan.written_as()
    pixels = PixelHash(b"".join(bytes.fromhex(record.output["pixels"]) for record in records))
    report.output = {"path": str(output), "preview": None, "frames": plan.frames, "pixels_sha256": pixels.hexdigest()}
    report.seconds += time.monotonic() - started
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(workplace(output))
        written = join_video(
            [plan.video_of(segment) for segment in range(plan.segments)],
            plan.times[: plan.frames],
            target.info,
            output,
            folder,
            audio=plan.dub.sound(plan.source, folder) if plan.dub else target.audio,
            tracks=None if target.still else plan.source,
            start=target.start,
            end=target.end,
            overwrite=overwrite,
            ready=lambda part: ready(part, report),
        )
    for note in written.notes:
        if note not in report.notes:
            report.notes.append(note)
            say(note)
    for finding in report.findings():
        report.notes.append(finding)
        say(finding)
    return report


def merged(plan: Plan, records: list[Report]) -> Report:
    """One report of the plan's beginning and those of all segments."""
    report = replace(plan.report, frames=[], self_reconstruction=[], notes=list(plan.report.notes))
    for record in records:
        report.frames += record.frames
        report.self_reconstruction += record.self_reconstruction
        report.notes += [note for note in record.notes if note not in report.notes]
        report.seconds += record.seconds
    report.engine = records[-1].engine
    report.cuts = [round(float(plan.times[cut]), 6) for cut in np.flatnonzero(plan.cuts[: plan.frames])]
    report.sort_frames(plan.frames)
    made_by = {(r.engine.get("device"), r.engine.get("precision"), r.engine.get("batch_size")) for r in records}
    if len(made_by) > 1:
        ways = "; ".join(", ".join(map(str, way)) for way in sorted(made_by, key=str))
        report.notes.append(f"the segments were made in different ways ({ways}): their rounding may differ")
    return report


# Going on where a run was killed


def edit_resumable(
    source: Path,
    driving: Driving | Edits,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings | None = None,
    *,
    report_path: Path | None = None,
    seconds: float | None = None,
    seal: Callable[[Path], None] = lambda part: None,
    finish: Callable[[Report], None] = lambda report: None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Report:
    """`edit_video` that goes on where an earlier run of the same request was killed; the frames are the same.

    What a kill costs is at most a segment of `seconds`, by default SEGMENT_SECONDS, and what came before the first one.
    A run of another request (other files, settings, weights) beside the same output is given up, which `say` is told.
    The report is written before the output appears. `seal` may change the whole file before that takes its name,
    `finish` is called when it has it, also in the run after the one that was killed in between.
    Raises OutputError if another run is at work on this output.
    """
    settings = settings or EditSettings()
    edits = edits_of(driving, settings)
    request = (source, edits, output)
    inputs, words = edit_inputs(source, edits, settings), [asdict(edits), chosen(settings), seconds]
    return resumed(
        output, inputs, words, partial(check_request, *request, settings),
        lambda path, key: make_plan(
            path, *request, engine, detector, settings, seconds=seconds, key=key, progress=progress, say=say
        ),
        engine, detector, overwrite=settings.overwrite, report_path=report_path, seal=seal, finish=finish,
        progress=progress, say=say,
    )  # fmt: skip


def dub_resumable(
    source: Path,
    audio: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: DubSettings | None = None,
    *,
    report_path: Path | None = None,
    seconds: float | None = None,
    seal: Callable[[Path], None] = lambda part: None,
    finish: Callable[[Report], None] = lambda report: None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Report:
    """`dub_video` that goes on where an earlier run was killed, as `edit_resumable` does."""
    settings = settings or DubSettings()
    edit, edits, request = settings.edit, edits_for(source, settings.edit), (source, audio, output)
    inputs = [*edit_inputs(source, edits, edit), audio, *settings.files]
    words = [{**asdict(settings), "edit": None}, networks_used(), asdict(edits), chosen(edit), seconds]
    return resumed(
        output, inputs, words, partial(check_dub, *request, settings),
        lambda path, key: make_dub_plan(
            path, *request, engine, detector, settings, seconds=seconds, key=key, progress=progress, say=say
        ),
        engine, detector, overwrite=edit.overwrite, report_path=report_path, seal=seal, finish=finish,
        progress=progress, say=say,
    )  # fmt: skip


def resumed(
    output: Path, inputs: list[Path], words: list[Any], check: Callable[[], object],
    make: Callable[[Path, str], Plan], engine: Engine, detector: FaceDetector, *, overwrite: bool,
    report_path: Path | None, seal: Callable[[Path], None], finish: Callable[[Report], None], progress: Progress,
    say: Callable[[str], None],
) -> Report:  # fmt: skip
    """Makes what is still to be made of a request, which `inputs` and `words` tell from others, in segments.

    `check` fails early, `make` writes the plan with this key to this path.
    """
    started, folder = time.monotonic(), work_folder(output)
    check_container(output)
    check_folder(output)
    with locked(folder, output):
        key = request_key(inputs, [*words, str(output.absolute()), engine.description, detector.name])
        if done := finished(output, key):
            finish(done)
            clear_away(folder)
            return done
        check()
        plan = resumed_plan(folder, key, say) or make(folder / "plan.json", key)
        todo = next((number for number in range(plan.segments) if read_record(plan, number) is None), plan.segments)
        if todo:
            say(f"{todo} of {plan.segments} segments are there already")
        if todo < plan.segments:
            edit_segments(plan, todo, plan.segments - 1, engine, detector, progress)

        def ready(part: Path, report: Report) -> None:
            seal(part)
            report.seconds = time.monotonic() - started
            if report_path:
                report.write(report_path)
            write_text(folder / FINISHED, json.dumps({**identity_of(part), "key": key, "report": asdict(report)}))

        (folder / ".join").mkdir()
        report = join_plan(plan, overwrite=overwrite, folder=folder / ".join", ready=ready, say=say)
        finish(report)
        clear_away(folder)
    return report


FINISHED = "finished.json"
LOCK = "lock"


def clear_away(folder: Path) -> None:
    """Removes the work folder; what says that all is done goes last, as this can be killed too."""
    for left in folder.iterdir():
        if left.name not in (LOCK, FINISHED):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(folder)


def work_folder(output: Path) -> Path:
    """Where a run that can be resumed keeps what it has done."""
    return output.absolute().with_name(f".{output.name}.dpe")


def identity_of(path: Path) -> dict[str, int]:
    """What a file keeps when it is renamed."""
    status = path.stat()
    return {"inode": status.st_ino, "bytes": status.st_size, "changed": status.st_mtime_ns}


def finished(output: Path, key: str | None = None) -> Report | None:
    """The report of a run that was killed after its output got its name. `key`: of this request only."""
    try:
        words = json.loads((work_folder(output) / FINISHED).read_text(encoding="utf-8"))
        same = key in (None, words["key"]) and all(words[name] == is_ for name, is_ in identity_of(output).items())
        return report_from(words["report"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resumed_plan(folder: Path, key: str, say: Callable[[str], None]) -> Plan | None:
    """The plan of the run that was killed, if it was for the same request; else the folder is emptied."""
    for left in folder.glob(".*"):  # half-written
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    (folder / FINISHED).unlink(missing_ok=True)
    there = folder / "plan.json"
    if there.exists():
        with contextlib.suppress(InputError):
            plan = read_plan(there)
            if plan.key == key:
                return plan
        say("the files, the settings or the weights have changed since the run that is to be resumed: it begins anew")
    for left in folder.iterdir():
        if left.name != LOCK:
            left.unlink()
    return None


def edit_inputs(source: Path, edits: Edits, settings: EditSettings) -> list[Path]:
    """The files that an edit reads."""
    models = (settings.parsing, settings.landmarker, settings.enhancer)
    sound = () if settings.audio in AUDIO else (Path(settings.audio),)
    faces = [Path(edit.face) for edit in edits.each] + [Path(settings.driving_face)]
    return [source, *edits.paths, *(model for model in models if model), *sound, *(f for f in faces if f.is_file())]


def chosen(settings: EditSettings) -> dict[str, Any]:
    """The settings that the frames depend on."""
    return {name: value for name, value in asdict(settings).items() if name not in ("overwrite", "seam_limit")}


def request_key(inputs: Iterable[Path], words: Iterable[Any]) -> str:
    """A hash of all that the frames depend on. Files count by name, size and time of change."""
    files = [
        (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for i in inputs for file in files_of(i)
    ]
    words = [dpe_cli.__version__, files, *words, ffmpeg_exe(), SCHEMA]
    return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()


def check_folder(output: Path) -> None:
    """Raises OutputError where no folder can be made beside the output."""
    if not output.parent.is_dir():
        raise OutputError(f"the folder {output.parent} does not exist", "make it or name another")


@contextlib.contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """The folder, made and held by this process alone; a lock ends with its process. Raises OutputError."""
    try:
        import fcntl
    except ImportError:  # Windows: there nobody prevents two runs
        folder.mkdir(exist_ok=True)
        yield
        return
    while True:
        try:
            folder.mkdir(exist_ok=True)
            file = (folder / LOCK).open("w")
        except FileNotFoundError:
            continue  # another run has just ended and removed it
        except OSError as error:
            raise OutputError(f"{folder} cannot be made: {error.strerror}", "name another output") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another run is at work on {output}", "wait for it, or name another") from None
            if (folder / LOCK).exists() and (folder / LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # nothing was done yet
                        if [left.name for left in folder.iterdir()] == [LOCK]:
                            shutil.rmtree(folder)
                return
