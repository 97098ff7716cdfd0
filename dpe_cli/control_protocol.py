"""How well factors can be controlled one by one, on people that neither training nor the fit has seen.

Everything is measured in the pictures by a landmark network, in units of each measure's spread inside clips (sigma).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from dpe_cli.control import Control, mixed
from dpe_cli.dataset import Clip
from dpe_cli.errors import InputError
from dpe_cli.extractors import Extractors
from dpe_cli.factors import NAMES, Factors
from dpe_cli.jobs import Engine
from dpe_cli.landmarks import FaceShape, five_points, head_angles, rotation_between
from dpe_cli.measures import MEASURES, TABLE, measures_of_faces
from dpe_cli.pipeline import Progress, silent
from dpe_cli.protocols import spread, take

STEPS = np.linspace(-2, 2, 11)  # sigma
SWAPPED = ("mouth_open", "blink", "gaze_y", "yaw")  # whose mouth, whose eyes, whose pose
ROLES = ("mouth", "eyes", "pose", "source")
FEWEST = 4  # people, and frames of a swap
ABOUT = (0.75, 1.25)  # sigma between two real frames that are about one apart
STILL = 3.0  # degrees between their heads, at most


@dataclass(frozen=True)
class Sweep:
    """What a slider does to people: all at STEPS."""

    values: np.ndarray  # (P, S, M) measures over sigma
    turn: np.ndarray  # (P, S) degrees between the heads, against step 0
    csim: np.ndarray | None  # (P, S) likeness to the source


def evaluate_control(
    clips: list[Clip], engine: Engine, factors: Factors, extractors: Extractors, template: np.ndarray,
    people: int = 12, frames: int = 12, seed: int = 0, progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """All numbers, ready for JSON. clips: of held-out people; template: the mean face (478, 3).

    Raises WeightsError without a fit, InputError with too few people.
    """
    factors.check_fitted()
    random = np.random.default_rng(seed)
    chosen = one_of_each(clips, people, random)
    crops = np.concatenate([take(clip, np.array([len(clip) // 2])).crops(engine.size) for clip in chosen])
    own = engine.motion_codes(crops)
    known = [embedded(crop, extractors.landmarks.detect(crop), extractors) for crop in crops]
    sweeps = {
        name: sweep(name, crops, own, known, engine, factors, extractors, template)
        for name in progress([measure.name for measure in MEASURES], len(MEASURES), "sliders")
    }
    lines = {name: summary(name, one, factors) for name, one in sweeps.items()}
    if extractors.identity:
        for name, lost in real_loss(clips, frames, engine.size, factors, extractors, template, progress).items():
            lines[name]["csim_real"] = lost
    return {
        "people": len(crops),
        "endpoints": endpoints(crops, own, engine, factors),
        "sliders": lines,
        "cross_talk": cross_talk(sweeps),
        "swap": swap(chosen, engine, factors, extractors, template, frames, progress),
    }


def one_of_each(clips: list[Clip], people: int, random: np.random.Generator) -> list[Clip]:
    """A clip of each of some people. Raises InputError for fewer than four."""
    by_name: dict[str, list[Clip]] = {}
    for clip in clips:
        by_name.setdefault(clip.identity, []).append(clip)
    names = random.permutation(sorted(by_name))[:people]
    if len(names) < FEWEST:
        raise InputError(f"control is measured on four people or more, there are {len(names)}", "prepare more clips")
    return [by_name[name][random.integers(len(by_name[name]))] for name in names]


def endpoints(crops: np.ndarray, own: np.ndarray, engine: Engine, factors: Factors) -> dict[str, float]:
    """Largest differences of factors mixed at strengths 1 and 0 to the full transfer and the self-reconstruction."""
    driving = np.roll(own, 1, axis=0)
    result = {}
    for name, strength, wanted in (("all_one", 1.0, driving), ("all_zero", 0.0, own)):
        changes = {factor: (driving, np.full(len(own), strength)) for factor in NAMES}
        codes = factors.mix(own, changes)
        pictures = [engine.edit(crops, each, None).astype(int) for each in (codes, wanted)]
        result[f"{name}_codes"] = float(np.abs(codes - wanted).max())
        result[f"{name}_levels"] = float(np.abs(pictures[0] - pictures[1]).max())
    return result


# Sliders


def sweep(
    name: str, crops: np.ndarray, own: np.ndarray, known: Sequence[np.ndarray | None], engine: Engine, factors: Factors,
    extractors: Extractors, template: np.ndarray,
) -> Sweep:  # fmt: skip
    """A slider at all steps, added to what each person does. known: the sources' embeddings."""
    slider, sigma = factors.sliders[name], sigmas(factors)
    faces: list[list[FaceShape | None]] = []
    csim = [] if extractors.identity else None
    for step in STEPS:
        codes = own.astype(np.float64) + step * slider.sigma * slider.axis
        pictures = engine.edit(crops, codes.astype(np.float32), None)
        faces.append([extractors.landmarks.detect(picture) for picture in pictures])
        if csim is not None:
            made = [embedded(*both, extractors) for both in zip(pictures, faces[-1], strict=True)]
            csim.append([np.nan if a is None or b is None else float(a @ b) for a, b in zip(made, known, strict=True)])
    values = np.stack([measures_of_faces(row, template) for row in faces], 1) / sigma
    turn = np.array([[turned(faces[len(STEPS) // 2][p], row[p]) for row in faces] for p in range(len(crops))])
    return Sweep(values, turn, None if csim is None else np.array(csim).T)


def real_loss(
    clips: Sequence[Clip], frames: int, size: int, factors: Factors, extractors: Extractors, template: np.ndarray,
    progress: Progress = silent,
) -> dict[str, float]:  # fmt: skip
    """What real footage loses of the cosine, by measure: the floor of what a slider may cost.

    Means over pairs of frames of one clip that are about one sigma apart in the measure and hardly in pose; NaN where
    there are none.
    """
    apart, turn, lost = [], [], []
    for clip in progress(clips, len(clips), "real frames"):
        crops = take(clip, spread(0, len(clip) - 1, min(frames, len(clip)))).crops(size)
        faces = [extractors.landmarks.detect(crop) for crop in crops]
        known = [embedded(*both, extractors) for both in zip(crops, faces, strict=True)]
        values = measures_of_faces(faces, template) / sigmas(factors)
        for one, other in combinations([place for place, face in enumerate(faces) if face is not None], 2):
            apart.append(np.abs(values[one] - values[other]))
            turn.append(turned(faces[one], faces[other]))
            lost.append(1 - float(known[one] @ known[other]))
    near, lost = np.array(turn) <= STILL, np.array(lost)
    found = {}
    for place, measure in enumerate(MEASURES):
        chosen = near & [ABOUT[0] <= row[place] <= ABOUT[1] for row in apart]
        found[measure.name] = float(lost[chosen].mean()) if chosen.any() else float("nan")
    return found


def sigmas(factors: Factors) -> np.ndarray:
    """Of each measure, in the order of TABLE."""
    return np.array([factors.sliders[measure.name].sigma for measure in TABLE])


def turned(before: FaceShape | None, after: FaceShape | None) -> float:
    """Degrees between two heads, NaN if either was not found."""
    if before is None or after is None:
        return float("nan")
    return float(rotation_between(before.rotation, after.rotation))


def embedded(picture: np.ndarray, face: FaceShape | None, extractors: Extractors) -> np.ndarray | None:
    """Whose face it is, a unit vector; None without a face or a recognition network."""
    if face is None or extractors.identity is None:
        return None
    return extractors.identity.embed(picture, five_points(face.points))


def at(values: np.ndarray, step: float) -> np.ndarray:
    """Values (P, S, ...) at a step between STEPS, linear."""
    place = float(np.interp(step, STEPS, np.arange(len(STEPS))))
    low = min(int(place), len(STEPS) - 2)
    return values[:, low] + (place - low) * (values[:, low + 1] - values[:, low])


def summary(name: str, one: Sweep, factors: Factors) -> dict[str, Any]:
    """A slider's line: monotony, what one sigma gives, and what it costs."""
    column = [measure.name for measure in TABLE].index(name)
    course = one.values[:, :, column]
    rank = np.array([spearman(row) for row in course])
    middle = len(STEPS) // 2
    result = {
        "available": "no" if factors.sliders[name].why_not_shown else "+=" if factors.sliders[name].why_not else "yes",
        "spearman_mean": float(np.nanmean(rank)),
        "spearman_least": float(np.nanmin(rank)),
        "shown": float(np.nanmean(at(course, 1) - at(course, -1)) / 2),
        "head_degrees": float(np.nanmean([at(one.turn, 1), at(one.turn, -1)])),
        "faces_lost": int(np.isnan(course).sum()),
    }
    if one.csim is not None:
        drop = one.csim[:, middle] - np.minimum(at(one.csim, 1), at(one.csim, -1))
        result["csim_own"] = float(np.nanmean(one.csim[:, middle]))
        result["csim_drop"] = float(np.nanmean(drop))
    return result


def spearman(row: np.ndarray) -> float:
    """Rank correlation of values with their steps, 0 where nothing changes; NaN with a value missing."""
    if np.isnan(row).any():
        return float("nan")
    ranks = rankdata(row)
    return float(np.corrcoef(ranks, np.arange(len(row)))[0, 1]) if np.ptp(ranks) else 0.0


def cross_talk(sweeps: dict[str, Sweep]) -> dict[str, dict[str, float]]:
    """|change of a measure| over |change of the slider's own|, both in sigma, one sigma each way, means over people."""
    names = [measure.name for measure in MEASURES]
    matrix = {}
    for name in names:
        one = sweeps[name].values[:, :, : len(names)]
        moved = np.nanmean(np.abs(at(one, 1) - at(one, -1)), axis=0) / 2
        own = max(moved[names.index(name)], 1e-9)
        matrix[name] = {other: float(value / own) for other, value in zip(names, moved, strict=True)}
    return matrix


def by_factor(matrix: dict[str, dict[str, float]], usable: Sequence[str]) -> dict[str, dict[str, float]]:
    """The matrix from factor to factor: the largest of a factor's measures, means over the usable sliders that move it.

    A factor without a usable slider has no row.
    """
    owner = {measure.name: measure.factor for measure in MEASURES}
    found = {}
    controlled = [factor for factor in NAMES if factor in owner.values()]
    for factor in controlled:
        rows = [row for name, row in matrix.items() if owner[name] == factor and name in usable]
        if rows:
            found[factor] = {
                other: 1.0
                if other == factor
                else float(np.mean([max(row[name] for name in row if owner[name] == other) for row in rows]))
                for other in controlled
            }
    return found


# Swap


def swap(
    clips: Sequence[Clip], engine: Engine, factors: Factors, extractors: Extractors, template: np.ndarray,
    frames: int, progress: Progress = silent,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mouth of A, eyes of B, pose of C on S: each measure's correlation with each of the four, inside clips, pooled."""
    control = Control({"mouth": "mouth", "blink": "eyes", "gaze": "eyes"}, factors=factors)
    pooled: dict[tuple[str, str], list[np.ndarray]] = {}
    count = min(frames, *(len(clip) for clip in clips))
    if count < FEWEST:
        raise InputError(f"a swap is measured on {FEWEST} frames or more", "prepare longer clips")
    for place in progress(range(len(clips)), len(clips), "swaps"):
        four = [clips[(place + step) % len(clips)] for step in range(4)]
        crops = {
            role: take(clip, spread(0, len(clip) - 1, count)).crops(engine.size)
            for role, clip in zip(ROLES, four, strict=True)
        }
        codes = {role: engine.motion_codes(pictures) for role, pictures in crops.items()}
        mixings = [
            control.at(0.0, 1.0, {role: (codes[role][n], None) for role in ("mouth", "eyes")}) for n in range(count)
        ]
        made = engine.edit(crops["source"], mixed(codes["source"], mixings), codes["pose"])
        seen = {role: observed(pictures, extractors, template) for role, pictures in [*crops.items(), ("made", made)]}
        for column, name in enumerate(SWAPPED):
            for role in ROLES:
                both = np.stack([seen["made"][:, column], seen[role][:, column]])
                both = both[:, np.isfinite(both).all(0)]
                pooled.setdefault((name, role), []).append(both - both.mean(1, keepdims=True))
    result: dict[str, dict[str, float]] = {}
    for (name, role), parts in pooled.items():
        result.setdefault(name, {})[role] = float(np.corrcoef(np.concatenate(parts, 1))[0, 1])
    return result


def observed(pictures: np.ndarray, extractors: Extractors, template: np.ndarray) -> np.ndarray:
    """The measures of SWAPPED. (N, S, S, 3) uint8 -> (N, 4), NaN without a face"""
    faces = [extractors.landmarks.detect(picture) for picture in pictures]
    names = [measure.name for measure in TABLE]
    yaw = [np.nan if face is None else head_angles(face.rotation)[0] for face in faces]
    values = measures_of_faces(faces, template)
    return np.column_stack([*(values[:, names.index(name)] for name in SWAPPED[:-1]), yaw])


# For people


def tables(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The result as titles and rows."""

    def rows(matrix: dict[str, dict[str, Any]], first: str) -> list[dict[str, Any]]:
        return [{first: name} | {key: shown(value) for key, value in row.items()} for name, row in matrix.items()]

    def shown(value: Any) -> Any:
        return round(value, 3) if isinstance(value, float) else str(value)

    usable = [name for name, line in result["sliders"].items() if line["available"] != "no"]
    factors = by_factor(result["cross_talk"], usable)
    ends = {name: f"{value:g}" for name, value in result["endpoints"].items()}
    return [
        ("Endpoints: largest differences of codes and of levels", [ends]),
        (f"Sliders, {result['people']} people", rows(result["sliders"], "slider")),
        ("Cross-talk of one sigma: rows move, columns answer", rows(result["cross_talk"], "slider")),
        (
            "Cross-talk from factor to factor, sliders that can be used",
            rows(factors, "factor"),
        ),
        ("Swap: correlation with whose mouth, eyes, pose, source", rows(result["swap"], "measure")),
    ]
