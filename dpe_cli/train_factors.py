"""Fits the factors of some weights: `dpe train --set stage=factors`, or banks. The weights themselves learn nothing.

On prepared clips the weights' own motion codes are set beside what landmarks measure (`measures.py`). Only differences
to a clip's mean are compared, which cancels identity. A measure c is read as C z (ridge regression); held-out people
say how well (R2).

Stage banks: pictures with a part of another frame, sound and time tell factors apart, see `train_banks`. Stage factors
needs none of these.
Codes taught by `motion_space` then have factors by construction; a measure reads the coordinates of its factor alone.
For other weights z = S V' code, of the expression head's singular values: what moves the picture counts, what the head
ignores does not. Their factors are oblique projectors, W C' inv(C W C') taken by rows of C, with the covariance W of
codes inside clips, and the rest is uncorrelated with all that is measured.

What codes tell is not what pictures show: generators answer less to some coordinates than to others. So a slider is not
taken from C but from the answer J of the pictures, measured by landmarks on people that were fitted: the
likeliest change of the code that moves one measure, and neither the others nor the head of any of them (least squares
over people: a head that turns left in one and right in another has turned). Answers are not linear: open lids do not
open, they only close. So each slider is tried on the same people at the steps that it is for, J is put right along it
(Broyden's update), the slider is taken anew, and given the length at which one sigma shows best as one. Held-out people
are then shown steps of each slider, and it counts how much of what was asked comes out (shown, an R2 too). The judge of
all this is our landmark network, or MediaPipe's, which has no part in an edit.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpe_cli.crop import cut
from dpe_cli.dataset import face_at, split_of
from dpe_cli.engine import Engine
from dpe_cli.errors import InputError
from dpe_cli.face import Box, crop_box
from dpe_cli.factors import FORMAT, NAMES, coordinate_projectors, fit_of, follows_space, write_fit
from dpe_cli.landmark_net import NetworkLandmarker
from dpe_cli.landmarks import Landmarker, head_angles
from dpe_cli.measures import MEASURES, TABLE, measures_of, measures_of_faces
from dpe_cli.motion_space import normalise
from dpe_cli.regions import transplant
from dpe_cli.train_banks import (
    PARTS,
    Part,
    Transplants,
    centred,
    choose_pair,
    fit_banks,
    has_sound,
    held_still,
    lasts,
    likeliest,
    moments_told,
    part_lids,
    read_of_sound,
    ridge,
    sound_about,
    told_by_sound,
)

PER_CLIP = 6  # frames, evenly spread
SPOKEN = 24  # frames of a clip with sound
RIDGE = 1e-3  # of the codes' variance
DEAD = 1e-3  # of the largest singular value: what the head makes less of is not looked at
PROBED = 16  # people whose pictures are looked at
CALIBRATED = 48  # people by whose pictures the length of a slider is set: they differ in how far they go
PROBE = 2.0  # standard deviations of the code along a principal axis, each way
CALIBRATIONS = 2  # times that a slider's length is put right
ASKED = (-2.0, -1.0, 1.0, 2.0)  # standard deviations of a measure that sliders are tried with
LOOSE = 0.02  # what a standard deviation of the code costs, against one of a measure, squared
LEAST_MOVED = 0.2  # of what was asked: less is no slider, and would be blown up
# What may move along: everything else that is measured is held. Landmarks see an iris go down where lids close.
ALONG = {"smile": ("mouth_width",), "mouth_width": ("smile",), "blink": ("gaze_y",)}
ANGLES = 3  # rows of an answer after the measures: yaw, pitch, roll in degrees
DEGREE = 0.3  # sigma of a measure that a degree of the head counts like: with 1, others' measures paid for the head

Progress = Callable[[Iterable, int | None, str], Iterator]


@dataclass(frozen=True)
class Samples:
    """Frames of prepared clips with their codes and measures."""

    codes: np.ndarray  # (N, K) float64
    measures: np.ndarray  # (N, M), columns of TABLE
    clip: np.ndarray  # (N,) int
    crops: np.ndarray  # (clips, S, S, 3) uint8, the first frame of each
    people: list[str]  # whose face each clip shows
    turn: np.ndarray  # (N, 3) yaw, pitch, roll of the head, degrees
    transplants: Mapping[str, Transplants]  # by part; empty where none were asked for
    sound: np.ndarray | None = None  # (N, F) what is heard about each frame

    def within(self, values: np.ndarray) -> np.ndarray:
        """Differences to the clip's mean, (N, ...)."""
        return centred(values, self.clip)

    @property
    def person(self) -> np.ndarray:
        """A number of whose face each frame shows, (N,) int."""
        return np.unique(self.people, return_inverse=True)[1][self.clip]

    @property
    def window(self) -> np.ndarray:
        """Which half of which clip each frame lies in, (N,) int; frames of a clip lie together."""
        first = np.searchsorted(self.clip, self.clip)
        return 2 * self.clip + (np.arange(len(self.clip)) - first >= np.bincount(self.clip)[self.clip] / 2)


def gather(
    data: Path, held_out: bool, engine: Engine, template: np.ndarray, per_clip: int,
    progress: Progress = lambda items, total, what: iter(items), parts: Mapping[str, Part] = {}, heard: bool = False,
) -> Samples | None:  # fmt: skip
    """Codes and measures of one split, framed as the tool frames faces, and codes of transplants of the given parts.

    heard: only of clips that have sound, with it; None where none has. Raises InputError where there is no clip.
    """
    paths = split_of(data, held_out)
    if heard:
        paths = [(path, identity) for path, identity in paths if has_sound(path)]
        if not paths:
            return None
    if not paths:
        split = "test" if held_out else "train"
        raise InputError(f"{data}: no prepared clips to {split} on", f"prepare some: dpe prepare VIDEOS -o {data}")
    looks = [Look.of(path, template, per_clip, heard) for path, _ in paths]
    clip = np.repeat(np.arange(len(looks)), [len(look.points) for look in looks])
    measures = np.concatenate([look.measures for look in looks])
    sigma = measures.std(0) + 1e-9
    codes, first, swapped = [], [], {name: [] for name in parts}
    for look in progress(looks, len(looks), f"{'held-out ' * held_out}clips{' with sound' * heard}"):
        frames = np.load(look.path.with_suffix(".npy"), mmap_mode="r")[look.chosen]
        crops = [cut(frame, box, engine.size)[0] for frame, box in zip(frames, look.boxes, strict=True)]
        pairs = {} if len(frames) < 2 else {name: look.pair(part, sigma) for name, part in parts.items()}
        for name, (host, donor) in pairs.items():
            part, both = parts[name], (frames[host], frames[donor], look.points[host], look.points[donor])
            picture = transplant(*both, part.region, part.spared)
            crops.append(cut(picture, look.boxes[host], engine.size)[0])
        found = engine.motion_codes(np.stack(crops)).astype(np.float64)
        codes.append(found[: len(frames)])
        first.append(crops[0])
        for (name, (host, donor)), mixed in zip(pairs.items(), found[len(frames) :], strict=True):
            swapped[name].append((found[host], found[donor], mixed))
    transplants = {name: Transplants(*map(np.stack, zip(*rows, strict=True))) for name, rows in swapped.items()}
    turn = head_angles(np.concatenate([look.rotations for look in looks]))
    sound = np.concatenate([look.sound for look in looks]) if heard else None
    people = [identity for _, identity in paths]
    return Samples(np.concatenate(codes), measures, clip, np.stack(first), people, turn, transplants, sound)


@dataclass(frozen=True)
class Look:
    """The frames of a clip that are looked at."""

    path: Path
    chosen: np.ndarray  # (N,) places in the clip
    points: np.ndarray  # (N, 478, 3)
    measures: np.ndarray  # (N, M)
    rotations: np.ndarray  # (N, 3, 3) of the head
    sound: np.ndarray | None = None  # (N, F)

    @classmethod
    def of(cls, path: Path, template: np.ndarray, count: int, heard: bool = False) -> "Look":
        """`count` frames of a prepared clip, evenly spread."""
        with np.load(path) as file:
            points, blendshapes = file["points"], file["blendshapes"]
            told = {name: file[name] for name in ("times", "sound", "sound_start")} if heard else {}
        chosen = np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))
        points = points[chosen]
        measures = measures_of(points, blendshapes[chosen], template)
        sound = sound_about(told, told["times"][chosen]) if heard else None
        return cls(path, chosen, points, measures, normalise(points, template)[2], sound)

    @property
    def boxes(self) -> list[Box]:
        """The crop of each face."""
        return [crop_box(face_at(points)) for points in self.points]

    def pair(self, part: Part, sigma: np.ndarray) -> tuple[int, int]:
        """Host and donor of a part. sigma: (M,)"""
        own = [place for place, measure in enumerate(TABLE) if measure.name in part.measures]
        return choose_pair(self.measures[:, own], self.rotations, sigma[own])


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


def looked_at(head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a head (L, K) does not ignore of a code: singular values (k,), orthonormal rows (k, K)."""
    _, singular, rows = np.linalg.svd(head.astype(np.float64), full_matrices=False)
    alive = singular > DEAD * singular[0]
    return singular[alive], rows[alive]


def fit_projectors(codes: np.ndarray, measures: np.ndarray, head: np.ndarray) -> Fitted:
    """Of any codes; head: (L, K), what the expression head does to a code, less its constant part."""
    singular, rows = looked_at(head)
    forward, back = rows.T * singular, rows / singular[:, None]  # code to z (K, k), z to code
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


@dataclass(frozen=True)
class Parts:
    """Banks as they were found."""

    banks: dict[str, np.ndarray]  # (K, K) by factor, without the rest
    heads: np.ndarray  # (k, K), what sound tells of the mouth; none without sound

    @property
    def named(self) -> dict[str, np.ndarray]:
        """The banks, brows and mood together, which are emotion, and the rest."""
        rest = np.eye(len(self.banks["mouth"])) - sum(self.banks.values())
        return self.banks | {"brows and mood": self.banks["brows"] + self.banks["mood"], "rest": rest}


def fit_parts(
    train: Samples, spoken: Samples | None, alive: np.ndarray, answer: np.ndarray, covariance: np.ndarray
) -> Parts:
    """Banks in the paper's order: parts that change hands, then lips by sound, then emotion by what lasts.

    spoken: frames with sound; without, or where sound tells nothing, the mouth stays whole and there is no mood.
    alive: (R, K) of the expression head; answer: (M, K), how much pictures change, in sigma.
    """
    codes = train.within(train.codes)
    told = {measure.name: answer[place] for place, measure in enumerate(MEASURES)}
    banks = held_still(fit_banks(codes, train.transplants, alive), told, covariance)
    seen = [place for place, measure in enumerate(TABLE) if measure.name in PARTS["eyes"].measures]
    eyes, mouth = banks.pop("eyes"), banks["mouth"]
    banks |= part_lids(codes @ eyes.T, train.within(train.measures)[:, seen], eyes)
    heads = mouth[:0] if spoken is None else heads_of_sound(spoken, mouth)
    lips = likeliest(codes @ mouth.T, heads) @ mouth if len(heads) else mouth
    stay, go = (lasts(train.codes @ bank.T, train.window, train.person, train.turn) for bank in (mouth - lips, lips))
    if not stay > go:
        lips = mouth  # what sound does not tell comes and goes as lips do: it is no emotion
    return Parts(banks | {"mouth": lips, "mood": mouth - lips}, heads @ mouth)


def heads_of_sound(spoken: Samples, mouth: np.ndarray) -> np.ndarray:
    """What sound tells of the mouth's bank: heads (k, K) on what it takes of codes."""
    codes = spoken.within(spoken.codes) @ mouth.T
    heard = read_of_sound(spoken.within(spoken.sound), codes, spoken.person)
    return told_by_sound(codes, heard, spoken.clip)


def measured_parts(
    parts: Parts, train: Samples, test: Samples, spoken: Samples | None, asked: Samples | None
) -> dict[str, Any]:
    """What banks hold of held-out people. spoken, asked: frames with sound, fitted and held out.

    told: R2 of each measure, inside clips, as a reader of the whole code reads it from one bank alone; lasts: what of a
    bank stays for half a clip; sound: how lips go with it, as `moments_told` has it.
    """
    codes, truth = test.within(test.codes), test.within(test.measures)
    read, _ = solve(train.within(train.codes), train.within(train.measures))
    told, stays = {}, {}
    for name, bank in parts.named.items():
        shares = explained(truth, codes @ bank.T @ read.T)
        told[name] = dict(zip((one.name for one in TABLE), shares.tolist(), strict=True))
        stays[name] = lasts(test.codes @ bank.T, test.window, test.person, test.turn)
    result = {"told": told, "lasts": stays, "sound": None}
    if spoken and asked and len(parts.heads):
        right, wrong, won = moments_told(
            asked.within(asked.codes) @ parts.heads.T,
            asked.within(asked.sound) @ ridge(spoken.within(spoken.sound), spoken.within(spoken.codes) @ parts.heads.T),
            asked.clip,
        )
        people = {"fitted": len(set(spoken.people)), "held_out": len(set(asked.people))}
        result["sound"] = {"people": people, "heads": len(parts.heads), "right": right, "wrong": wrong, "won": won}
    return result


def read_banks(codes: np.ndarray, measures: np.ndarray, banks: Mapping[str, np.ndarray]) -> Fitted:
    """Of codes with banks: (K, K) by factor, without the rest. A measure reads the bank of its factor alone; the
    mouth's also mood, which may have taken a part of it."""
    owner = {**banks, "mouth": banks["mouth"] + banks["mood"]}
    owner["emotion"] = owner["mouth"] + banks["blink"] + banks["brows"]
    read = np.zeros((len(TABLE), codes.shape[1]))
    for place, measure in enumerate(TABLE):
        own = owner[measure.factor]
        read[place] = solve(codes @ own.T, measures[:, [place]])[0][0] @ own
    return Fitted({**banks, "rest": np.eye(codes.shape[1]) - sum(banks.values())}, read)


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


@dataclass(frozen=True)
class Judge:
    """People whose edited pictures are looked at."""

    crops: np.ndarray  # (P, S, S, 3) uint8
    engine: Engine
    landmarks: Landmarker | NetworkLandmarker
    template: np.ndarray
    progress: Progress

    @functools.cached_property
    def own(self) -> np.ndarray:
        """The people's codes, (P, K) float64."""
        return self.engine.motion_codes(self.crops).astype(np.float64)

    @functools.cached_property
    def still(self) -> np.ndarray:
        """What is seen of them unedited (but reconstructed)."""
        return self.seen(self.own)

    def seen(self, codes: np.ndarray) -> np.ndarray:
        """Measures and head angles of the people with other codes. (P, K) -> (P, M + 3), NaN without a face"""
        faces = self.landmarks.detect_batch(self.engine.edit(self.crops, codes.astype(np.float32), None))
        angles = [np.full(ANGLES, np.nan) if face is None else head_angles(face.rotation) for face in faces]
        return np.column_stack([measures_of_faces(faces, self.template), np.array(angles)])


def answers(judge: Judge, covariance: np.ndarray) -> np.ndarray:
    """J: how much each person's picture changes with a code, its measures and head angles. (P, M + 3, K)"""
    size, rows = np.linalg.eigh(covariance)
    axes = [(row, PROBE * np.sqrt(one)) for row, one in zip(rows.T, size, strict=True) if one > 1e-6 * size[-1]]
    result = np.zeros((len(judge.own), len(TABLE) + ANGLES, len(covariance)))
    for row, step in judge.progress(axes, len(axes), "directions"):
        seen = [judge.seen(moved) for moved in (judge.own - step * row, judge.own + step * row)]
        result += np.nan_to_num(seen[1] - seen[0])[..., None] * row / (2 * step)
    return result


def slider_axis(place: int, answer: np.ndarray, covariance: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The change of the code (K,) for one unit of a measure of TABLE in pictures; the rest and the head stay.

    Least squares over people: what stays in the mean and moves in each of them does not stay. answer: (P, M + 3, K), as
    `answers` has it; sigma: (M,).
    """
    names, measure = [measure.name for measure in TABLE], TABLE[place]
    if measure.factor == "emotion":
        held = [names.index(other.name) for other in MEASURES if other.factor == "gaze"]
    else:
        kept = (other.name for other in MEASURES if other.name not in (measure.name, *ALONG.get(measure.name, ())))
        held = [names.index(name) for name in kept]
    chosen = [place, *held]
    rows = np.concatenate([answer[:, chosen] / sigma[chosen, None], DEGREE * answer[:, len(TABLE) :]], axis=1)
    size, directions = np.linalg.eigh(covariance)
    spread = directions * np.sqrt(np.maximum(size, 0))
    rows = rows @ spread  # of a code in standard deviations
    own = rows[:, 0].mean(0)
    square = np.einsum("prk,prl->kl", rows, rows) / len(rows)
    axis = np.linalg.solve(square + LOOSE * np.eye(len(square)), own)
    moved = float(own @ axis)  # less than asked, by LOOSE
    return spread @ axis / (max(moved, LEAST_MOVED) * sigma[place])


def tried(
    judge: Judge, place: int, axis: np.ndarray, sigma: np.ndarray, ends: tuple[np.ndarray, np.ndarray],
    steps: tuple[float, ...] = ASKED,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What a slider is asked for (S, P), in its unit, and all that pictures then show more than before (S, P, M + 3).

    `steps` in sigma, but no more than takes a face to the ends (M,) of what faces do: who does not smile cannot smile
    less. A face that is lost shows nothing.
    """
    still = np.nan_to_num(judge.still[:, place])
    low, high = np.minimum(ends[0][place], still), np.maximum(ends[1][place], still)
    asked = np.stack([np.clip(still + step * sigma[place], low, high) - still for step in steps])
    change = np.stack([judge.seen(judge.own + each[:, None] * axis) for each in asked]) - judge.still
    return asked, np.nan_to_num(change)


def put_right(
    answer: np.ndarray, covariance: np.ndarray, axis: np.ndarray, asked: np.ndarray, change: np.ndarray
) -> np.ndarray:
    """Answers (P, M + 3, K) made true along an axis that was tried: Broyden's update, in the metric of the codes."""
    weight = np.maximum((asked**2).sum(0), 1e-12)[:, None]
    seen = np.where(weight > 1e-9, (asked[..., None] * change).sum(0) / weight, answer @ axis)
    force = np.linalg.pinv(covariance, hermitian=True) @ axis
    return answer + (seen - answer @ axis)[..., None] * force / max(axis @ force, 1e-12)


def calibrated(
    judge: Judge, place: int, axis: np.ndarray, sigma: np.ndarray, ends: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """A slider's axis (K,), made as long as brings pictures nearest to one sigma that is asked for, both ways.

    That is what is mostly asked for; `put_right` goes by longer steps too. Nearest in the mean square over people, who
    answer to one step differently, from not at all to twice: where they agree, all that is asked for comes; where they
    do not, it is less, since a length that is right on average goes too far for half of them.
    """
    for _ in range(CALIBRATIONS):
        asked, change = tried(judge, place, axis, sigma, ends, (-1.0, 1.0))
        shown = change[..., place]
        axis = axis * np.clip((asked * shown).sum() / max((shown**2).sum(), 1e-12), 0.5, 2.0)
    return axis


def told_one(answer: np.ndarray, covariance: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The answer (K,) of a measure that says one unit for its axis, otherwise what it was."""
    force = np.linalg.pinv(covariance, hermitian=True) @ axis
    return answer + (1 - answer @ axis) * force / max(axis @ force, 1e-12)


def fit_factors(
    data: Path, output: Path, engine: Engine, template: np.ndarray, landmarks: Landmarker | NetworkLandmarker,
    banks: bool = False, speech: Path | None = None, progress: Progress = lambda items, total, what: iter(items),
) -> Path:  # fmt: skip
    """Fits the factors of an engine's weights on prepared clips and writes them to the folder `output`.

    Its name there is that of the weights with .factors.json for its ending; beside the weights the tool finds it.
    landmarks: who judges pictures. banks: by `train_banks`, else in closed form; speech: prepared clips with sound for
    them, by default those of `data` that have it. Raises InputError without clips of either split.
    """
    train = gather(data, False, engine, template, PER_CLIP, progress, PARTS if banks else {})
    test = gather(data, True, engine, template, PER_CLIP, progress)
    codes, measures = train.within(train.codes), train.within(train.measures)
    weights = Path(engine.description["weights"])
    unit = np.eye(codes.shape[1], dtype=np.float32)
    head = (engine.shifts(unit)[0] - engine.shifts(0 * unit)[0]).T
    _, alive = looked_at(head)
    covariance = alive.T @ alive @ (codes.T @ codes / len(codes)) @ alive.T @ alive  # what pictures can answer to
    sigma = measures.std(0)
    ends = tuple(np.percentile(train.measures, [0.5, 99.5], axis=0))
    looked = (portraits(train), portraits(train, CALIBRATED), portraits(test))
    fitting, many, judge = (Judge(crops, engine, landmarks, template, progress) for crops in looked)
    answer, measured = answers(fitting, covariance), None
    if banks:
        spoken = gather(speech or data, False, engine, template, SPOKEN, progress, heard=True)
        shown = answer[:, : len(TABLE)].mean(0) / sigma[:, None]
        found = fit_parts(train, spoken, alive, shown, covariance)
        fitted = read_banks(codes, measures, found.banks)
        asked = spoken and gather(speech or data, True, engine, template, SPOKEN, progress, heard=True)
        measured = measured_parts(found, train, test, spoken, asked)
    elif follows_space(weights):
        fitted = fit_coordinates(codes, measures)
    else:
        fitted = fit_projectors(codes, measures, head)
    r2 = explained(test.within(test.measures), test.within(test.codes) @ fitted.read.T)
    bias = (train.measures - train.codes @ fitted.read.T).mean(0)
    lines = {}
    for place, measure in enumerate(progress(TABLE, len(TABLE), "sliders")):
        axis = slider_axis(place, answer, covariance, sigma)
        own = put_right(answer, covariance, axis, *tried(fitting, place, axis, sigma, ends))
        axis = calibrated(many, place, slider_axis(place, own, covariance, sigma), sigma, ends)
        asked, change = tried(judge, place, axis, sigma, ends)
        lines[measure.name] = {
            "factor": measure.factor,
            "unit": measure.unit,
            "neutral": measure.neutral,
            "r2": float(r2[place]),
            "shown": float(explained(asked.ravel(), change[..., place].ravel())),
            "sigma": float(sigma[place]),
            "low": float(ends[0][place]),
            "high": float(ends[1][place]),
            "bias": float(bias[place]),
            "read": fitted.read[place].tolist(),
            "answer": told_one(own[:, place].mean(0), covariance, axis).tolist(),
            "axis": axis.tolist(),
        }
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
            "sliders": lines,
            "banks": measured,
        },
    )
    return path
