"""Fits the factors of some weights in closed form: `dpe train --set stage=factors`. No network is trained.

On prepared clips the weights' own motion codes are set beside what landmarks measure (`measures.py`). Only differences
to a clip's mean are compared, which cancels identity. A measure c is read as C z (ridge regression), a slider is the
likeliest change of the code, by its covariance W inside clips, that gives one unit of its measure and none of the
others of its factor: W C' inv(C W C').

Codes taught by `motion_space` have factors by construction; a measure then reads the coordinates of its factor alone.
For other weights z = S V' code, of the expression head's singular values: what moves the picture counts, what the head
ignores does not. Their factors are oblique projectors, W C' inv(C W C') taken by rows of C, and the rest is
uncorrelated with all that is measured.

Held-out people say how well each measure is read (R2). What the generator makes of a slider is looked at on people
that were fitted: the share of a step that our landmark network finds in the picture (gain).
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
from dpe_cli.factors import FORMAT, NAMES, Factors, coordinate_projectors, fit_of, follows_space, write_fit
from dpe_cli.landmark_net import NetworkLandmarker
from dpe_cli.measures import MEASURES, TABLE, measures_of, measures_of_faces

PER_CLIP = 6  # frames, evenly spread
RIDGE = 1e-3  # of the codes' variance
DEAD = 1e-3  # of the largest singular value: what the head makes less of is not looked at
GAIN_PEOPLE, GAIN_STEP = 24, 1.0  # of the people fitted on; step in standard deviations
LEAST_GAIN, MOST_GAIN = 0.5, 1.5  # a slider is not corrected by more: past the codes that were seen faces fall apart


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


# The fit


def solve(codes: np.ndarray, measures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C (r, k) and W C' inv(C W C') (k, r) of codes (N, k) and measures (N, r), both differences within clips."""
    covariance = codes.T @ codes / len(codes)
    loaded = covariance + RIDGE * np.diag(np.diag(covariance)) + 1e-12 * np.eye(len(covariance))
    read = np.linalg.solve(loaded, codes.T @ measures / len(codes)).T
    axis = loaded @ read.T
    return read, axis @ np.linalg.pinv(read @ axis)


@dataclass(frozen=True)
class Fitted:
    """Reads and axes in code space; columns of TABLE."""

    projectors: dict[str, np.ndarray] | None  # None: coordinates
    read: np.ndarray  # (M, K)
    axis: np.ndarray  # (K, M)


def fit_coordinates(codes: np.ndarray, measures: np.ndarray) -> Fitted:
    """Of codes that follow `motion_space`; both are differences within clips."""
    owner = {name: np.flatnonzero(np.diag(matrix)) for name, matrix in coordinate_projectors().items()}
    shown = np.concatenate([owner["mouth"], owner["blink"], owner["brows"]])  # what an emotion may move
    read, axis = np.zeros((len(TABLE), codes.shape[1])), np.zeros((codes.shape[1], len(TABLE)))
    for factor in NAMES[:-1]:
        columns = [place for place, measure in enumerate(TABLE) if measure.factor == factor]
        read[np.ix_(columns, owner[factor])], axis[np.ix_(owner[factor], columns)] = solve(
            codes[:, owner[factor]], measures[:, columns]
        )
    for column in range(len(MEASURES), len(TABLE)):
        read[[column], shown[:, None].T], axis[shown[:, None], [column]] = solve(codes[:, shown], measures[:, [column]])
    return Fitted(None, read, axis)


def fit_projectors(codes: np.ndarray, measures: np.ndarray, head: np.ndarray) -> Fitted:
    """Of any codes; head: (L, K), what the expression head does to a code, less its constant part."""
    _, singular, rows = np.linalg.svd(head.astype(np.float64), full_matrices=False)
    alive = singular > DEAD * singular[0]
    forward, back = rows[alive].T * singular[alive], rows[alive] / singular[alive, None]  # code to z (K, k), z to code
    seen, count = codes @ forward, len(MEASURES)
    read, axis = solve(seen, measures[:, :count])
    read, axis = read @ forward.T, back.T @ axis
    projectors = {}
    for factor in NAMES[:-1]:
        own = [place for place, measure in enumerate(MEASURES) if measure.factor == factor]
        projectors[factor] = axis[:, own] @ read[own]
    projectors["rest"] = np.eye(codes.shape[1]) - sum(projectors.values())
    still = [place for place, measure in enumerate(MEASURES) if measure.factor == "gaze"]
    for column in range(count, len(TABLE)):
        one_read, one_axis = solve(seen, measures[:, [column, *still]])  # an emotion does not turn the eyes
        read = np.vstack([read, one_read[:1] @ forward.T])
        axis = np.column_stack([axis, back.T @ one_axis[:, 0]])
    return Fitted(projectors, read, axis)


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


def rendered_gains(
    samples: Samples, factors: Factors, engine: Engine, landmarks: NetworkLandmarker, template: np.ndarray
) -> np.ndarray:
    """How much of a slider's step the picture shows: median over people, a standard deviation each way. (M,)"""
    _, first = np.unique(samples.people, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(GAIN_PEOPLE, len(first))).astype(int)]
    crops = samples.crops[chosen]
    own = engine.motion_codes(crops).astype(np.float64)
    gains = []
    for column, slider in enumerate(factors.sliders.values()):
        step = GAIN_STEP * slider.sigma
        seen = []
        for sign in (-1, 1):
            pictures = engine.edit(crops, (own + sign * step * slider.axis).astype(np.float32), None)
            seen.append(measures_of_faces(landmarks.detect_batch(pictures), template)[:, column])
        gains.append(np.nanmedian(seen[1] - seen[0]) / (2 * step))
    return np.array(gains)


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
    fit = {
        "format": FORMAT,
        "weights": weights.name,
        "weights_sha256": engine.description["sha256"],
        "people": {"fitted": len(set(train.people)), "held_out": len(set(test.people))},
        "frames": {"fitted": len(train.codes), "held_out": len(test.codes)},
        "projectors": fitted.projectors and {name: matrix.tolist() for name, matrix in fitted.projectors.items()},
        "neutral": neutral_code(train, sigma).tolist(),
        "sliders": {
            measure.name: {
                "factor": measure.factor, "unit": measure.unit, "neutral": measure.neutral, "r2": float(r2[place]),
                "gain": 1.0, "sigma": float(sigma[place]), "low": float(low[place]), "high": float(high[place]),
                "bias": float(bias[place]), "read": fitted.read[place].tolist(), "axis": fitted.axis[:, place].tolist(),
            }
            for place, measure in enumerate(TABLE)
        },
    }  # fmt: skip
    gains = rendered_gains(train, Factors.of_fit(fit), engine, NetworkLandmarker(), template)
    for slider, gain in zip(fit["sliders"].values(), gains, strict=True):
        slider["gain"] = float(gain)
        share = float(np.clip(gain, LEAST_GAIN, MOST_GAIN))
        slider["axis"] = [value / share for value in slider["axis"]]
    output.mkdir(parents=True, exist_ok=True)
    path = output / fit_of(weights).name
    write_fit(path, fit)
    return path
