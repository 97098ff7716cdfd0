"""How well checkpoints edit people they were not trained on: numbers over the protocols of `protocols.py`."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import dpe_cli
from dpe_cli import metrics
from dpe_cli.dataset import CROP, Clip
from dpe_cli.errors import InputError
from dpe_cli.extractors import Extractors
from dpe_cli.jobs import psnr
from dpe_cli.landmarks import align, eye_openings, five_points, mouth_opening, rotation_between
from dpe_cli.protocols import (
    NOISE,
    SHORTEST,
    STILL_FRAMES,
    CopyDriving,
    CopySource,
    Plan,
    Scene,
    System,
    choose_pairs,
    make_scene,
)

SPLIT = "held-out identities"
SHOWN = 2  # pairs of each protocol and mode that are shown as pictures


# What is measured


@dataclass(frozen=True)
class Metric:
    """One number: what it means, and where it means something."""

    key: str
    title: str
    scale: str
    better: str  # higher, lower, or "1"
    needs: tuple[str, ...] = ()  # names of fields of Extractors
    where: Callable[[str, str], bool] = lambda protocol, mode: True
    elsewhere: str = ""  # why it is not measured for another protocol or mode


def _has_truth(protocol: str, mode: str) -> bool:
    return protocol == "same" and mode == "both"


def _moves_face(protocol: str, mode: str) -> bool:
    return mode != "pose"


def _keeps_head(protocol: str, mode: str) -> bool:
    return mode == "exp"


_TRUTH = {"where": _has_truth, "elsewhere": "no true picture"}
_FACE = {"needs": ("landmarks",), "where": _moves_face, "elsewhere": "the expression stays"}
METRICS = (
    Metric("csim", "CSIM", "cosine of face embeddings, result and source", "higher", ("landmarks", "identity")),
    Metric(
        "identity_drift", "identity drift", "degrees between the embeddings, worst frame", "lower",
        ("landmarks", "identity"),
    ),
    Metric("psnr", "PSNR", "dB against the driving frame; 99: identical", "higher", **_TRUTH),
    Metric("ssim", "SSIM", "-1 to 1 against the driving frame, window of 11, RGB", "higher", **_TRUTH),
    Metric("lpips", "LPIPS", "from 0, against the driving frame", "lower", ("lpips",), **_TRUTH),
    Metric(
        "aed", "AED", "mean difference of 52 blendshapes in [0, 1] to whose expression is wanted "
        "(the paper: 3DMM coefficients, another scale)", "lower", ("landmarks",),
    ),
    Metric(
        "apd", "APD", "mean difference of yaw, pitch, roll in degrees to whose pose is wanted "
        "(the paper: 3DMM coefficients, another scale)", "lower", ("landmarks",),
    ),
    Metric("mouth_correlation", "mouth correlation", "Pearson, mouth opening with the driving's", "higher", **_FACE),
    Metric("eye_correlation", "eye correlation", "Pearson, eye opening with the driving's", "higher", **_FACE),
    Metric("mouth_range", "mouth range", "spread of the opening over the driving's", "1", **_FACE),
    Metric("eye_range", "eye range", "spread of the opening over the driving's", "1", **_FACE),
    Metric(
        "head_drift", "head drift", "degrees between the head rotations of result and source", "lower", ("landmarks",),
        _keeps_head, "the head turns",
    ),
    *(
        Metric(
            f"{axis}_correlation", f"{axis} correlation", f"Pearson with the driving's, to {metrics.FRONTAL:g} degrees",
            "higher", ("landmarks",), lambda protocol, mode: mode != "exp", "the head stays",
        )
        for axis in metrics.AXES
    ),
    Metric(
        "jitter", "jitter", f"landmarks' RMS in % of the eye distance, {STILL_FRAMES} frames of a still source and a "
        f"still driving with noise of {NOISE:g}/255", "lower", ("landmarks",),
    ),
    Metric("flicker", "flicker", "pixels' standard deviation in levels of 255, the same still frames", "lower"),
    Metric("self_psnr", "self-reconstruction", "PSNR in dB, source driven by itself; 99: identical", "higher"),
    Metric(
        "seam_step", "seam step", "levels of 255 along the mask's inner edge, result against source", "lower",
        where=lambda protocol, mode: protocol == "video", elsewhere="nothing is pasted",
    ),
    Metric("faces_found", "faces found", "share of the frames", "higher", ("landmarks",)),
)  # fmt: skip

_OPTIONS = {"landmarks": "--landmarker", "identity": "--identity", "lpips": "--lpips"}


def why_not(metric: Metric, protocol: str, mode: str, extractors: Extractors) -> str | None:
    """The reason for which a number cannot be had, None where it can."""
    if not metric.where(protocol, mode):
        return metric.elsewhere
    missing = [_OPTIONS[name] for name in metric.needs if getattr(extractors, name) is None]
    return f"not given: {', '.join(missing)}" if missing else None


# What is seen in them


@dataclass(frozen=True)
class Look:
    """Measures of N pictures; NaN where no face was found."""

    points: np.ndarray  # (N, 478, 3) pixels
    expression: np.ndarray  # (N, 52) blendshapes
    rotation: np.ndarray  # (N, 3, 3) of the head
    identity: np.ndarray | None  # (N, K) unit vectors

    @property
    def mouth(self) -> np.ndarray:
        """(N,) inner-lip gap over the distance of the outer eye corners"""
        return mouth_opening(self.points)

    @property
    def eyes(self) -> np.ndarray:
        """(N,) lid gap over eye width, mean of both eyes"""
        return eye_openings(self.points).mean(-1)

    @property
    def found(self) -> np.ndarray:
        """(N,) bool: whether there is a face"""
        return np.isfinite(self.points[:, 0, 0])


def look(pictures: np.ndarray, extractors: Extractors, template: np.ndarray) -> Look | None:
    """Measures the faces in (N, H, W, 3) uint8 pictures; None without landmarks. template: mean face (478, 3)"""
    if extractors.landmarks is None:
        return None
    faces = [extractors.landmarks.detect(picture) for picture in pictures]

    def gather(values: list[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
        return np.stack([np.full(shape, np.nan) if value is None else value for value in values])

    identity = None
    if extractors.identity is not None:
        vectors = [
            None if face is None else extractors.identity.embed(picture, five_points(face.points))
            for picture, face in zip(pictures, faces, strict=True)
        ]
        width = next((vector.shape for vector in vectors if vector is not None), (1,))
        identity = gather(vectors, width)
    return Look(
        gather([face and face.points for face in faces], (478, 3)),
        gather([face and face.blendshapes for face in faces], (52,)),
        gather([face and align(face.points, template)[1] for face in faces], (3, 3)),
        identity,
    )


def score_look(result: Look, source: Look, driving: Look, mode: str) -> dict[str, float]:
    """All numbers of one pair that need landmarks or identity."""
    wanted_expression = source if mode == "pose" else driving
    wanted_pose = source if mode == "exp" else driving
    numbers = {
        "aed": mean(metrics.expression_distance(result.expression, wanted_expression.expression)),
        "apd": mean(metrics.pose_distance(result.rotation, wanted_pose.rotation)),
        "mouth_correlation": metrics.correlation(result.mouth, driving.mouth),
        "eye_correlation": metrics.correlation(result.eyes, driving.eyes),
        "mouth_range": metrics.spread_ratio(result.mouth, driving.mouth),
        "eye_range": metrics.spread_ratio(result.eyes, driving.eyes),
        "head_drift": mean(rotation_between(result.rotation, source.rotation)),
        "faces_found": float(result.found.mean()),
    }
    for axis, value in metrics.turn_correlations(result.rotation, driving.rotation).items():
        numbers[f"{axis}_correlation"] = value
    if result.identity is not None:
        angles = metrics.angle(result.identity, source.identity)
        numbers["csim"] = mean(metrics.cosine(result.identity, source.identity))
        numbers["identity_drift"] = float(np.nanmax(angles)) if np.isfinite(angles).any() else float("nan")
    return numbers


def score_pictures(
    result: np.ndarray, scene: Scene, source: np.ndarray, driving: np.ndarray, protocol: str, mode: str,
    extractors: Extractors,
) -> dict[str, float]:  # fmt: skip
    """All numbers of one pair that need no landmarks. result, source, driving: (N, H, W, 3) uint8"""
    numbers = {}
    if _has_truth(protocol, mode):
        numbers["psnr"] = mean([psnr(a, b) for a, b in zip(result, driving, strict=True)])
        numbers["ssim"] = mean([metrics.ssim(a, b) for a, b in zip(result, driving, strict=True)])
        if extractors.lpips is not None:
            numbers["lpips"] = mean(extractors.lpips.distance(result, driving))
    if scene.pasted:
        places = zip(result, source, scene.masks(), strict=True)
        numbers["seam_step"] = mean([metrics.seam_step(*place) for place in places])
    return numbers


def score_still(
    system: System, scene: Scene, mode: str, extractors: Extractors, template: np.ndarray, random: np.random.Generator
) -> dict[str, float]:
    """Tremble where nothing moves, and how well a system redraws a source that drives itself."""
    shots = scene.still(random).result(system, mode)
    first = scene.source.first(1)
    numbers = {
        "flicker": metrics.flicker(shots),
        "self_psnr": psnr(Scene(first, first).result(system, mode)[0], first.crops(CROP)[0]),
    }
    seen = look(shots, extractors, template)
    if seen is not None:
        numbers["jitter"] = metrics.jitter(seen.points)
    return numbers


def mean(values: Iterable[float]) -> float:
    """Mean of those that are numbers; NaN without any."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


# The whole


@dataclass(frozen=True)
class Strip:
    """Pictures of one pair: a row for each moment, a column for each name."""

    protocol: str
    mode: str
    title: str
    columns: list[str]
    rows: list[list[np.ndarray]]


@dataclass(frozen=True)
class Trial:
    """What one system did with one pair in one protocol and mode."""

    protocol: str
    mode: str
    pair: int
    system: str
    names: tuple[str, str]  # source clip, driving clip
    frames: int
    numbers: dict[str, float]
    mouths: dict[str, np.ndarray]  # openings over time, of the first pair only
    pictures: dict[str, list[np.ndarray]]  # column -> a picture for each moment, of the first SHOWN pairs only


def trials(
    clips: list[Clip], systems: list[System], extractors: Extractors, template: np.ndarray, plan: Plan
) -> Iterator[Trial]:
    """Everything that is to be done, one system on one pair at a time."""
    for protocol in dict.fromkeys(protocol for protocol, _ in plan.cases):
        for number, pair in enumerate(choose_pairs(clips, protocol, plan.pairs, plan.seed)):
            scene = make_scene(protocol, *pair, plan.frames)
            driving = scene.driving.crops(CROP)
            source = scene.source.frames if scene.pasted else scene.source.crops(CROP)
            of_source, of_driving = (look(pictures, extractors, template) for pictures in (source, driving))
            moments = telling_moments(of_driving, len(driving))
            for mode, system in itertools.product([m for p, m in plan.cases if p == protocol], systems):
                result = scene.result(system, mode)
                random = np.random.default_rng(plan.seed)  # the same noise for every system
                numbers = score_pictures(result, scene, source, driving, protocol, mode, extractors)
                numbers |= score_still(system, scene, mode, extractors, template, random)
                mouths = {}
                if of_source is not None:
                    of_result = look(result, extractors, template)
                    numbers |= score_look(of_result, of_source, of_driving, mode)
                    if number == 0:
                        mouths = {"source": of_source.mouth, "driving": of_driving.mouth, system.name: of_result.mouth}
                pictures = {}
                if number < SHOWN:
                    columns = {"source": source, "driving": driving, system.name: result}
                    pictures = {name: [shots[i] for i in moments] for name, shots in columns.items()}
                names = (scene.source.name, scene.driving.name)
                yield Trial(protocol, mode, number, system.name, names, len(result), numbers, mouths, pictures)


def telling_moments(driving: Look | None, count: int) -> list[int]:
    """Two frames to show: where the driving's mouth is most closed and most open, else the first and the last."""
    if driving is None or not driving.found.any():
        return [0, count - 1]
    return sorted({int(np.nanargmin(driving.mouth)), int(np.nanargmax(driving.mouth))})


def evaluate(
    clips: list[Clip],
    systems: list[System],
    extractors: Extractors,
    template: np.ndarray,
    plan: Plan,
    progress: Callable[[Iterable, int | None, str], Iterator] = lambda items, total, what: iter(items),
) -> tuple[dict[str, Any], list[Strip]]:
    """The numbers, ready for JSON, and pictures to look at.

    clips: of held-out people. template: mean face (478, 3) against which heads are turned.
    Raises InputError where the clips are too few or too short.
    """
    clips = [clip for clip in clips if len(clip) >= SHORTEST]
    counts = {protocol: len(choose_pairs(clips, protocol, plan.pairs, plan.seed)) for protocol, _ in plan.cases}
    if not all(counts.values()):
        raise InputError(f"no clip of a held-out person has {SHORTEST} frames or more", "prepare more clips")
    total = sum(counts[protocol] for protocol, _ in plan.cases) * len(systems)
    done = list(progress(trials(clips, systems, extractors, template, plan), total, "evaluating"))
    tables = [
        summarise([t for t in done if (t.protocol, t.mode) == case], *case, systems, extractors) for case in plan.cases
    ]
    summary = {
        "dpe": dpe_cli.__version__,
        "plan": asdict(plan),
        "split": SPLIT,
        "clips": len(clips),
        "identities": len({clip.identity for clip in clips}),
        "picture_size": CROP,
        "systems": {system.name: system.description for system in systems},
        "metrics": {
            metric.key: {
                "title": metric.title,
                "scale": metric.scale,
                "better": metric.better,
                "extractor": extractor_of(metric, extractors),
            }
            for metric in METRICS
        },
        "tables": tables,
    }
    return summary, [strip for case in plan.cases for strip in strips_of(done, *case)]


def extractor_of(metric: Metric, extractors: Extractors) -> str | None:
    """What a number is measured with, None where that is not there."""
    parts = [getattr(extractors, name) for name in metric.needs]
    if None in parts:
        return None
    return " + ".join(part.name for part in parts) or "pixels"


def summarise(
    done: list[Trial], protocol: str, mode: str, systems: list[System], extractors: Extractors
) -> dict[str, Any]:
    """One protocol in one mode: for each metric and system the mean over pairs, or the reason why there is none."""
    values: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        reason = why_not(metric, protocol, mode, extractors)
        values[metric.key] = {
            system.name: {"value": None, "reason": reason}
            if reason
            else over_pairs([t.numbers.get(metric.key, np.nan) for t in done if t.system == system.name])
            for system in systems
        }
    first = [t for t in done if t.system == systems[0].name]
    mouths = {name: track for trial in done if trial.pair == 0 for name, track in trial.mouths.items()}
    return {
        "protocol": protocol,
        "mode": mode,
        "split": SPLIT,
        "pairs": [{"source": t.names[0], "driving": t.names[1], "frames": t.frames} for t in first],
        "values": values,
        "mouth_openings": {
            name: [round(float(v), 5) if np.isfinite(v) else None for v in track] for name, track in mouths.items()
        },
    }


def over_pairs(numbers: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over the pairs in which something was measured."""
    known = [number for number in numbers if np.isfinite(number)]
    each = [round(float(number), 6) if np.isfinite(number) else None for number in numbers]
    if not known:
        return {"value": None, "reason": "no face, or none that moves", "each": each}
    return {
        "value": round(float(np.mean(known)), 6),
        "deviation": round(float(np.std(known)), 6),
        "pairs": len(known),
        "each": each,
    }


def strips_of(done: list[Trial], protocol: str, mode: str) -> Iterator[Strip]:
    """The pictures of one protocol in one mode: source, driving, and each checkpoint's result."""
    shown = [t for t in done if (t.protocol, t.mode) == (protocol, mode) and t.pictures]
    for pair in sorted({trial.pair for trial in shown}):
        here = [trial for trial in shown if trial.pair == pair]
        columns = {name: rows for trial in here for name, rows in trial.pictures.items()}
        columns = {name: rows for name, rows in columns.items() if name not in (CopySource.name, CopyDriving.name)}
        title = "source {}, driving {}".format(*here[0].names)
        yield Strip(protocol, mode, title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)])
