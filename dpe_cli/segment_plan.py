"""The plan of an edit or a dub in segments, and its files.

A plan holds all that is decided before the networks see the source: who is where in each frame (smoothed boxes, tracks,
cuts) and the driving's motion; of a dub the person's closed mouth and the loudness of the speech, which is heard again.

It is two files. FILE.json (schema dpe-plan/1): the request, the segments' borders, the beginning of the report.
FILE.safetensors, for N frames, E edits, D drivers: `ticks` (N,) int64, times in `time_base`; `shown` (N,) int64, the
number of the source's frame that is shown then, whose own time is that of the same number; `cuts` (N,) uint8;
`boxes` (E, N, 4) float64, pixels, not a number without a face; `scores` (E, N) float64; `tracks` (E, N) int64, 0 for
none; `others` (E, N) uint8; for driver d its smoothed codes `codesD` (M, K) float32 at `timesD` (M,) float64 seconds;
of a dub `closed`, `usual` and `spread` (8,) float32, see `speech_motion.Person`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

import dpe_cli
from dpe_cli.container import bytes_of, files_of
from dpe_cli.control import Control
from dpe_cli.dub import Dub, DubSettings
from dpe_cli.dub import Plan as Lengths
from dpe_cli.edit import Sight, Target, paster_for, plan_jobs
from dpe_cli.errors import InputError, OutputError
from dpe_cli.face import Box, FaceDetector
from dpe_cli.jobs import Engine, Job
from dpe_cli.limits import TEXT_BYTES, check_file, write_at_once
from dpe_cli.motion import Curve, MotionTrack
from dpe_cli.motion_file import Driver
from dpe_cli.paste import Paster
from dpe_cli.report import FrameFate, Report, write_text
from dpe_cli.request import AUDIO, Driving, Edit, Edits, EditSettings, files_read
from dpe_cli.speech import Loudness
from dpe_cli.speech_motion import Person
from dpe_cli.video import Frame, VideoInfo, probe

SCHEMA = "dpe-plan/1"
TABLE = ".safetensors"
ASKED = ("weights", "sha256", "precision", "backend", "batch_size", "detector", "face_models", "made_of")


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

    @property
    def files(self) -> list[Path]:
        """All that it reads, and its own: what joins it replaces none of them."""
        asked = [Path(self.asked[name]) for name in ("weights", "face_models") if self.asked[name]]
        told = (self.asked["made_of"] or {"inputs": {}})["inputs"].values()  # more than the settings know: a curve
        heard = [self.dub.audio, *self.dub.settings.files] if self.dub else []
        read = [*files_read(self.source, self.edits, self.settings), *heard, *asked]
        own = [file for segment in range(self.segments) for file in (self.video_of(segment), self.record_of(segment))]
        return [*read, *(Path(facts["path"]) for facts in told), self.path, self.path.with_suffix(TABLE), *own]

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


# Its files


def check_names(path: Path, output: Path, files: Iterable[Path]) -> None:
    """Raises OutputError where a segment of a plan at `path`, or what lies beside it, would be one of these files.

    The names of all segments count, however many there will be.
    """
    own = re.compile(rf"{re.escape(path.stem)}\.\d{{4,}}({re.escape(output.suffix.lower())}|\.json)")
    for file in (one for given in files for one in (given, *files_of(given))):
        for name in (file.absolute(), file.resolve()):
            if own.fullmatch(name.name) and name.parent.resolve() == path.parent.resolve():
                raise OutputError(f"{file} has the name of a segment of {path}", "give the plan another name by --plan")


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
    table = plan.path.with_suffix(TABLE)
    try:
        written = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
        words["table"] = hashlib.sha256(written).hexdigest()
        write_at_once(table, written)
        write_text(plan.path, json.dumps(words, indent=1, default=path_text, allow_nan=False) + "\n")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{plan.path} cannot be written ({error})", "check the folder and the disk") from error


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
    for file in (path, path.with_suffix(TABLE)):
        check_file(file, TEXT_BYTES)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(words, dict) or words.get("schema") != SCHEMA:
            raise InputError(f"{path} is no plan of this dpe", "make one with: dpe plan ... --split N")
        table = path.with_suffix(TABLE).read_bytes()
        if hashlib.sha256(table).hexdigest() != words["table"]:
            raise InputError(f"{path.with_suffix(TABLE)} is not the table of {path.name}", "plan anew")
        return plan_from(path, words, load(table))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path.with_suffix(TABLE)} is missing", "plan anew") from error
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
    told = asked["made_of"] or {"inputs": {}}
    named = isinstance(told, dict) and isinstance(told.get("inputs"), dict) and told["inputs"].values()
    files = [facts.get("path") if isinstance(facts, dict) else None for facts in named or ()]
    if named is False or not all(isinstance(file, str) for file in files):
        raise ValueError("what it is made of is wrong")
    if not all(isinstance(asked[name], str | None) for name in ("weights", "face_models")):
        raise ValueError("what it asks for is wrong")
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
