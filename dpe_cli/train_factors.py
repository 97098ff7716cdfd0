"""Fits the factors of some weights in closed form: `dpe train --set stage=factors`. No network is trained.

On prepared clips the weights' own motion codes are set beside what landmarks measure (`measures.py`). Only differences
to a clip's mean are compared, which cancels identity. A measure c is read as C z (ridge regression); held-out people
say how well (R2).

Codes taught by `motion_space` have factors by construction; a measure then reads the coordinates of its factor alone.
For other weights z = S V' code, of the expression head's singular values: what moves the picture counts, what the head
ignores does not. Their factors are oblique projectors, W C' inv(C W C') taken by rows of C, with the covariance W of
codes inside clips, and the rest is uncorrelated with all that is measured.

What codes tell is not what pictures show: generators answer less to some coordinates than to others. So a slider is not
taken from C but from the answer J of the pictures, measured by our landmark network on people that were fitted: the
likeliest change of the code, W J' inv(J W J'), that moves one measure and none of the others. Held-out people are then
shown steps of each slider, and it counts how much of what was asked comes out (shown, an R2 too).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpe_cli.crop import cut
from dpe_cli.dataset import face_at, split_of
from dpe_cli.engine import Engine
from dpe_cli.errors import InputError
from dpe_cli.face import crop_box
from dpe_cli.factors import FORMAT, NAMES, coordinate_projectors, fit_of, follows_space, write_fit
from dpe_cli.landmark_net import NetworkLandmarker
from dpe_cli.measures import MEASURES, TABLE, measures_of, measures_of_faces

PER_CLIP = 6  # frames, evenly spread
RIDGE = 1e-3  # of the codes' variance
DEAD = 1e-3  # of the largest singular value: what the head makes less of is not looked at
PROBED = 16  # people whose pictures are looked at
PROBE = 3.0  # standard deviations of the code along a principal axis, each way: answers are near linear that far
ASKED = (-2.0, -1.0, 1.0, 2.0)  # standard deviations of a measure that sliders are tried with
LOOSE = 0.03  # of the answers' mean square: a measure that hardly answers cannot be held still at any price
LEAST_MOVED = 0.05  # of what was asked: less is no slider, and would be blown up
# What may move along: everything else that is measured is held.
ALONG = {"smile": ("mouth_width",), "mouth_width": ("smile",)}


@dataclass(frozen=True)
class Samples:
    """Frames of prepared clips with their codes and measures."""

    codes: np.ndarray  # (N, K) float64
    measures: np.ndarray  # (N, M), columns of TABLE
    clip: np.ndarray  # (N,) int
    crops: np.ndarray  # (clips, S, S, 3) uint8, the first frame of each
    people: list[str]  # whose face each clip shows

    def within(self, values: np.ndarray) -> np.ndarray:
        """Differences to the clip's mean, (N, ...)."""
        counts = np.bincount(self.clip)
        sums = np.zeros((len(counts), values.shape[1]))
        np.add.at(sums, self.clip, values)
        return values - (sums / counts[:, None])[self.clip]


def gather(
    data: Path, held_out: bool, engine: Engine, template: np.ndarray, per_clip: int = PER_CLIP,
    progress: Callable[[Iterable, int | None, str], Iterator] = lambda items, total, what: iter(items),
) -> Samples:  # fmt: skip
    """Codes and measures of one split, framed as the tool frames faces. Raises InputError where there is no clip."""
    paths = split_of(data, held_out)
    if not paths:
        split = "test" if held_out else "train"
        raise InputError(f"{data}: no prepared clips to {split} on", f"prepare some: dpe prepare VIDEOS -o {data}")
    codes, measures, clip, first = [], [], [], []
    for number, (path, _) in enumerate(progress(paths, len(paths), "held-out clips" if held_out else "clips")):
        with np.load(path) as file:
            points, blendshapes = file["points"], file["blendshapes"]
        chosen = np.unique(np.linspace(0, len(points) - 1, per_clip).round().astype(int))
        frames = np.load(path.with_suffix(".npy"), mmap_mode="r")
        crops = np.stack([cut(np.asarray(frames[i]), crop_box(face_at(points[i])), engine.size)[0] for i in chosen])
        codes.append(engine.motion_codes(crops))
        measures.append(measures_of(points[chosen], blendshapes[chosen], template))
        clip += [number] * len(chosen)
        first.append(crops[0])
    return Samples(
        np.concatenate(codes).astype(np.float64), np.concatenate(measures), np.array(clip), np.stack(first),
        [identity for _, identity in paths],
    )  # fmt: skip


# Factors: what codes tell


def solve(codes: np.ndarray, measures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C (r, k) and W C' inv(C W C') (k, r) of codes (N, k) and measures (N, r), both differences within clips."""
    covariance = codes.T @ codes / len(codes)
    loaded = covariance + RIDGE * np.diag(np.diag(covariance)) + 1e-12 * np.eye(len(covariance))
    read = np.linalg.solve(loaded, codes.T @ measures / len(codes)).T
    axis = loaded @ read.T
    return read, axis @ np.linalg.pinv(read @ axis)


@dataclass(frozen=True)
class Fitted:
    """Projectors by factor, None for those that pick coordinates; reads (M, K), rows of TABLE."""

    projectors: dict[str, np.ndarray] | None
    read: np.ndarray


def fit_coordinates(codes: np.ndarray, measures: np.ndarray) -> Fitted:
    """Of codes that follow `motion_space`; both are differences within clips."""
    owner = {name: np.flatnonzero(np.diag(matrix)) for name, matrix in coordinate_projectors().items()}
    owner["emotion"] = np.concatenate([owner["mouth"], owner["blink"], owner["brows"]])
    read = np.zeros((len(TABLE), codes.shape[1]))
    for place, measure in enumerate(TABLE):
        own = owner[measure.factor]
        read[place, own] = solve(codes[:, own], measures[:, [place]])[0][0]
    return Fitted(None, read)


def fit_projectors(codes: np.ndarray, measures: np.ndarray, head: np.ndarray) -> Fitted:
    """Of any codes; head: (L, K), what the expression head does to a code, less its constant part."""
    _, singular, rows = np.linalg.svd(head.astype(np.float64), full_matrices=False)
    alive = singular > DEAD * singular[0]
    forward, back = rows[alive].T * singular[alive], rows[alive] / singular[alive, None]  # code to z (K, k), z to code
    count = len(MEASURES)
    read, axis = solve(codes @ forward, measures[:, :count])
    read, axis = read @ forward.T, back.T @ axis
    projectors = {}
    for factor in NAMES[:-1]:
        own = [place for place, measure in enumerate(MEASURES) if measure.factor == factor]
        projectors[factor] = axis[:, own] @ read[own]
    projectors["rest"] = np.eye(codes.shape[1]) - sum(projectors.values())
    emotions, _ = solve(codes @ forward, measures[:, count:])
    return Fitted(projectors, np.vstack([read, emotions @ forward.T]))


def explained(truth: np.ndarray, read: np.ndarray) -> np.ndarray:
    """R2 of each column, differences within clips. (N, M) twice -> (M,)"""
    return 1 - ((truth - read) ** 2).sum(0) / np.maximum((truth**2).sum(0), 1e-12)


def neutral_code(samples: Samples, sigma: np.ndarray) -> np.ndarray:
    """The mean code of each clip's frame that is nearest to a face at rest. (K,)"""
    count = len(MEASURES)
    rest = np.array([measure.neutral for measure in MEASURES])
    away = (np.abs(samples.measures[:, :count] - rest) / sigma[:count]).sum(1)
    best = [np.flatnonzero(samples.clip == clip)[away[samples.clip == clip].argmin()] for clip in set(samples.clip)]
    return samples.codes[best].mean(0)


# Sliders: what pictures show


def portraits(samples: Samples, count: int = PROBED) -> np.ndarray:
    """A crop of each of some people, (P, S, S, 3) uint8."""
    _, first = np.unique(samples.people, return_index=True)
    return samples.crops[first[np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]]


def answers(
    crops: np.ndarray, covariance: np.ndarray, engine: Engine, landmarks: NetworkLandmarker, template: np.ndarray,
    progress: Callable[[Iterable, int | None, str], Iterator],
) -> np.ndarray:  # fmt: skip
    """J: how much pictures' measures change with a code, (M, K), means over people."""
    own = engine.motion_codes(crops).astype(np.float64)
    size, rows = np.linalg.eigh(covariance)
    axes = [(row, PROBE * np.sqrt(one)) for row, one in zip(rows.T, size, strict=True) if one > 1e-6 * size[-1]]
    result = np.zeros((len(TABLE), len(covariance)))
    for row, step in progress(axes, len(axes), "directions"):
        seen = [
            measures_of_faces(landmarks.detect_batch(engine.edit(crops, moved.astype(np.float32), None)), template)
            for moved in (own - step * row, own + step * row)
        ]
        result += np.nan_to_num(np.nanmean(seen[1] - seen[0], axis=0))[:, None] * row / (2 * step)
    return result


def slider_axes(answer: np.ndarray, covariance: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Changes of the code (K, M), each for one unit of its measure in pictures."""
    names = [measure.name for measure in TABLE]
    told = answer / sigma[:, None]
    axes = []
    for place, measure in enumerate(TABLE):
        if measure.factor == "emotion":
            held = [names.index(other.name) for other in MEASURES if other.factor == "gaze"]
        else:
            kept = (other.name for other in MEASURES if other.name not in (measure.name, *ALONG.get(measure.name, ())))
            held = [names.index(name) for name in kept]
        rows = told[[place, *held]]
        strength = rows @ covariance @ rows.T
        loose = LOOSE * np.trace(strength) / len(strength)
        axis = covariance @ rows.T @ np.linalg.inv(strength + (loose + 1e-12) * np.eye(len(strength)))[:, 0]
        moved = float(told[place] @ axis)  # less than asked, by LOOSE
        axes.append(axis / (max(moved, LEAST_MOVED) * sigma[place]))
    return np.column_stack(axes)


def shown_of(
    crops: np.ndarray, axes: np.ndarray, sigma: np.ndarray, ends: tuple[np.ndarray, np.ndarray], engine: Engine,
    landmarks: NetworkLandmarker, template: np.ndarray, progress: Callable[[Iterable, int | None, str], Iterator],
) -> np.ndarray:  # fmt: skip
    """Of each slider the R2 between what is asked of it and what pictures show. (M,)

    ASKED, but no more than takes a face to the ends (M,) of what faces do: who does not smile cannot smile less.
    """
    own = engine.motion_codes(crops).astype(np.float64)
    still = measures_of_faces(landmarks.detect_batch(engine.edit(crops, own.astype(np.float32), None)), template)
    result = []
    for place in progress(range(len(sigma)), len(sigma), "sliders"):
        wanted, missed = 0.0, 0.0
        low, high = (end[place] for end in ends)
        for step in ASKED:
            goal = still[:, place] + step * sigma[place]
            asked = np.nan_to_num(np.clip(goal, np.minimum(low, still[:, place]), np.maximum(high, still[:, place])))
            asked = asked - np.nan_to_num(still[:, place])
            codes = own + asked[:, None] * axes[:, place]
            faces = landmarks.detect_batch(engine.edit(crops, codes.astype(np.float32), None))
            change = np.nan_to_num((measures_of_faces(faces, template) - still)[:, place])  # a face that is lost: none
            wanted, missed = wanted + (asked**2).sum(), missed + ((change - asked) ** 2).sum()
        result.append(1 - missed / max(wanted, 1e-12))
    return np.array(result)


def fit_factors(
    data: Path, output: Path, engine: Engine, template: np.ndarray, per_clip: int = PER_CLIP,
    progress: Callable[[Iterable, int | None, str], Iterator] = lambda items, total, what: iter(items),
) -> Path:  # fmt: skip
    """Fits the factors of an engine's weights on prepared clips and writes them to the folder `output`.

    Its name there is that of the weights with .factors.json for its ending; beside the weights the tool finds it.
    Raises InputError without clips of either split.
    """
    train, test = (gather(data, held_out, engine, template, per_clip, progress) for held_out in (False, True))
    codes, measures = train.within(train.codes), train.within(train.measures)
    weights = Path(engine.description["weights"])
    if follows_space(weights):
        fitted = fit_coordinates(codes, measures)
    else:
        unit = np.eye(codes.shape[1], dtype=np.float32)
        head = (engine.shifts(unit)[0] - engine.shifts(0 * unit)[0]).T
        fitted = fit_projectors(codes, measures, head)
    r2 = explained(test.within(test.measures), test.within(test.codes) @ fitted.read.T)
    bias = (train.measures - train.codes @ fitted.read.T).mean(0)
    sigma = measures.std(0)
    low, high = np.percentile(train.measures, [0.5, 99.5], axis=0)
    covariance, landmarks = codes.T @ codes / len(codes), NetworkLandmarker()
    answer = answers(portraits(train), covariance, engine, landmarks, template, progress)
    axes = slider_axes(answer, covariance, sigma)
    shown = shown_of(portraits(test), axes, sigma, (low, high), engine, landmarks, template, progress)
    path = output / fit_of(weights).name
    output.mkdir(parents=True, exist_ok=True)
    write_fit(
        path,
        {
            "format": FORMAT,
            "weights": weights.name,
            "weights_sha256": engine.description["sha256"],
            "people": {"fitted": len(set(train.people)), "held_out": len(set(test.people))},
            "frames": {"fitted": len(train.codes), "held_out": len(test.codes)},
            "projectors": fitted.projectors and {name: matrix.tolist() for name, matrix in fitted.projectors.items()},
            "neutral": neutral_code(train, sigma).tolist(),
            "sliders": {
                measure.name: {
                    "factor": measure.factor,
                    "unit": measure.unit,
                    "neutral": measure.neutral,
                    "r2": float(r2[place]),
                    "shown": float(shown[place]),
                    "sigma": float(sigma[place]),
                    "low": float(low[place]),
                    "high": float(high[place]),
                    "bias": float(bias[place]),
                    "read": fitted.read[place].tolist(),
                    "answer": answer[place].tolist(),
                    "axis": axes[:, place].tolist(),
                }
                for place, measure in enumerate(TABLE)
            },
        },
    )
    return path
