"""Factors of the expression code: mouth, blink, gaze, brows, mood and the rest, each edited on its own.

A factor is a projector P (K, K) on motion codes; all of them sum to the identity. With m the strength and d the
driving of a factor (PD-FGC's control, in the code space of DPE):

    code = own + sum over factors of  m * P (d - own)

so strengths of 1 with one driving are the full transfer, strengths of 0 the source's self-reconstruction, exactly.
Weights that were trained with `motion_space` have factors by construction: their projectors pick coordinates. For
others, the released ones among them, projectors are fitted in closed form by `fit_factors`, and stored beside the
weights with their sha256.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dpe_cli.errors import InputError, OutputError, WeightsError
from dpe_cli.motion_space import GROUPS, MOTION_DIM, POSE_DIM
from dpe_cli.weights import digest, find, is_ours

NAMES = ("mouth", "blink", "gaze", "brows", "mood", "rest")  # mood: what changes slowly; only `train_banks` finds it
# Names that stand for several.
JOINT = {"eyes": ("blink", "gaze"), "emotion": ("brows", "mood", "rest"), "all": NAMES}
FORMAT = "dpe-factors/1"
SPACE = "motion-space.json"  # lies beside weights whose codes were taught by it
LEAST_R2 = 0.5  # on held-out people: what codes tell less of, or pictures show less of, is no control
TRIED = 2.0  # standard deviations of a measure: sliders were tried so far from what a face does, and go no farther
REFIT = "fit them: dpe train --set stage=factors --init WEIGHTS --data PREPARED -o FOLDER_OF_THE_WEIGHTS"
_GROUP_OF = {"mouth": "mouth", "blink": "lids", "gaze": "gaze", "brows": "brows", "mood": None, "rest": "rest"}

Change = tuple[np.ndarray, np.ndarray]  # codes (N, K), strengths (N,)


def parts(name: str) -> tuple[str, ...]:
    """The factors that a name stands for: eyes is blink and gaze. Raises ValueError for a name that is none."""
    if name in NAMES:
        return (name,)
    if name not in JOINT:
        raise ValueError(f"{name} is no factor; there are {', '.join((*NAMES, *JOINT))}")
    return JOINT[name]


@dataclass(frozen=True, eq=False)
class Slider:
    """A measure of the face that can be set: `read` tells it of a code, `axis` changes it and nothing else measured.

    `answer` is what pictures of an edit show of a change of the code. low, high: what 99 % of the frames lay between
    that it was fitted on.
    """

    factor: str
    unit: str
    neutral: float  # its value in a face at rest
    r2: float  # between code and measure, within clips of held-out people
    shown: float  # R2 between steps along `axis` and what pictures of held-out people show of them
    sigma: float  # within clips
    low: float
    high: float
    bias: float
    read: np.ndarray  # (K,)
    answer: np.ndarray  # (K,)
    axis: np.ndarray  # (K,) for one unit

    def __post_init__(self) -> None:
        for name in ("read", "answer", "axis"):
            object.__setattr__(self, name, np.array(getattr(self, name), np.float64))

    @property
    def why_not(self) -> str | None:
        """Why it cannot be set to a value, None where it can: that needs the value it has, too."""
        return self.why_not_shown or self.why_not_told

    @property
    def why_not_shown(self) -> str | None:
        """Why nothing can be added to it, None where it can."""
        if not self.shown >= LEAST_R2:
            return f"pictures of held-out people follow it with R2 {self.shown:.2f}, {LEAST_R2:g} is needed"
        # an emotion is a mean: pictures may show one of its parts for all of them, codes then do not tell it
        return self.why_not_told if self.factor == "emotion" else None

    @property
    def why_not_told(self) -> str | None:
        """Why it cannot be taken from codes, None where it can."""
        if not self.r2 >= LEAST_R2:
            return f"codes of held-out people tell it with R2 {self.r2:.2f}, {LEAST_R2:g} is needed"
        return None

    def value_in(self, codes: np.ndarray) -> np.ndarray:
        """The measure as codes tell it. (N, K) -> (N,)"""
        return codes @ self.read + self.bias


@dataclass(frozen=True, eq=False)
class Factors:
    """What the motion codes of some weights are made of.

    projectors: name of NAMES -> (K, K) float64, summing to the identity. sliders and neutral (K,), the code of a face
    at rest, are there where they were fitted to these very weights.
    """

    projectors: Mapping[str, np.ndarray]
    sha256: str = ""  # of the weights
    path: Path | None = field(default=None)  # of the weights
    sliders: Mapping[str, Slider] = field(default_factory=dict)
    rest: np.ndarray | None = None

    @classmethod
    def load(cls, weights: Mapping[str, Any] | str | Path | None = None) -> "Factors":
        """The factors of weights: an `Engine.description`, a path or a name; by default of the tool's own weights.

        Raises WeightsError where there are none for these weights.
        """
        described = isinstance(weights, Mapping)
        path = Path(weights["weights"]) if described else find(weights)
        sha256 = weights["sha256"] if described else digest(path)
        file = fit_of(path)
        fit = read_fit(file) if file.is_file() else None
        if fit is not None and fit["weights_sha256"] == sha256:
            return cls.of_fit(fit, path)
        if follows_space(path):
            return cls(coordinate_projectors(), sha256, path)
        problem = f"{file} was fitted to other weights" if fit else f"{path.name} has no fitted factors"
        raise WeightsError(problem, REFIT)

    @classmethod
    def of_fit(cls, fit: Mapping[str, Any], path: Path | None = None) -> "Factors":
        """What `read_fit` gave."""
        projectors = coordinate_projectors()
        if fit["projectors"]:
            stored = {name: np.array(matrix, np.float64) for name, matrix in fit["projectors"].items()}
            whole = np.eye(len(stored["mouth"]))
            stored = {name: stored.get(name, 0 * whole) for name in NAMES[:-1]}  # older fits have no mood
            projectors = stored | {"rest": whole - sum(stored.values())}  # exactly: the file holds 7 digits
        sliders = {name: Slider(**values) for name, values in fit["sliders"].items()}
        return cls(projectors, fit["weights_sha256"], path, sliders, np.array(fit["neutral"], np.float64))

    @property
    def dim(self) -> int:
        """K, numbers in a code."""
        return len(self.projectors["rest"])

    def projector(self, name: str) -> np.ndarray:
        """(K, K) float64 of a factor, or of several that have a name together. Raises ValueError for another name."""
        return sum(self.projectors[part] for part in parts(name))

    def mix(self, own: np.ndarray, changes: Mapping[str, Change]) -> np.ndarray:
        """Codes (N, K) float32: the source's own, with some factors taken from elsewhere.

        own: (N, K). changes: factor -> codes (N, K) and strengths (N,), 0 the own and 1 the given; a factor that is
        not named stays the own. Exact at the ends: the sum is taken in float64, codes are float32.
        """
        result = own.astype(np.float64)
        for name, (codes, strength) in changes.items():
            moved = (codes.astype(np.float64) - own) @ self.projector(name).T
            result = result + np.asarray(strength, np.float64)[:, None] * moved
        return result.astype(np.float32)

    def slider(self, name: str, by_step: bool = False) -> Slider:
        """A slider that can be used, to set its measure or, `by_step`, to add to it.

        Raises InputError for one that does not exist or cannot be had with these weights, WeightsError where none was
        fitted to them.
        """
        self.check_fitted()
        if name not in self.sliders:
            raise InputError(f"there is no slider {name}", f"use one of {', '.join(self.sliders)}")
        slider = self.sliders[name]
        why = slider.why_not_shown if by_step else slider.why_not
        if why:
            usable = [f"{other}=" for other, one in self.sliders.items() if not one.why_not]
            usable += [f"{other}+=" for other, one in self.sliders.items() if not one.why_not_shown]
            problem = f"{name} is not available with these weights ({why})"
            raise InputError(problem, f"leave it out; available: {', '.join(usable) or 'none'}")
        return slider

    def check_fitted(self) -> None:
        """Raises WeightsError unless there is a fit for these very weights."""
        if self.rest is None:
            where = fit_of(self.path) if self.path else "these weights' fit"
            state = "was fitted to other weights" if self.path and where.is_file() else "does not exist"
            raise WeightsError(f"there are no sliders and no face at rest: {where} {state}", REFIT)

    def set(
        self, codes: np.ndarray, values: Mapping[str, np.ndarray], steps: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Codes in which measures have given values, or steps added; what else is measured of a face stays.

        A measure is moved by at most TRIED standard deviations: farther away faces fall apart.

        codes: (N, K); values, steps: slider -> (N,) in its unit. Emotions, which move several factors, come first, so
        that a measure has the last word. -> (N, K) float32. Raises as `slider` does.
        """
        result = codes.astype(np.float64)
        asked = [(self.slider(name), np.asarray(value, np.float64), False) for name, value in values.items()]
        asked += [(self.slider(name, True), np.asarray(step, np.float64), True) for name, step in (steps or {}).items()]
        for emotions in (True, False):
            group = [one for one in asked if (one[0].factor == "emotion") == emotions]
            if group:
                wanted = [number if by_step else number - one.value_in(result) for one, number, by_step in group]
                limits = [TRIED * one.sigma for one, _, _ in group]
                moves = [np.clip(move, -limit, limit) for move, limit in zip(wanted, limits, strict=True)]
                axes = np.stack([one.axis for one, _, _ in group])
                # what each slider does to the others' measures is made up for
                answers = np.stack([one.answer for one, _, _ in group]) @ axes.T
                result = result + np.column_stack(moves) @ np.linalg.pinv(answers).T @ axes
        return result.astype(np.float32)


def follows_space(weights: Path) -> bool:
    """Whether the codes of weights were taught by `motion_space`, so that each coordinate has its factor."""
    return is_ours(weights) and (weights.parent / SPACE).is_file()


def coordinate_projectors() -> dict[str, np.ndarray]:
    """Of codes that follow `motion_space`: each factor is some coordinates, the rest those of the pose."""
    owner = np.array(["rest"] * POSE_DIM + [group for group, count in GROUPS.items() for _ in range(count)])
    assert len(owner) == MOTION_DIM
    return {name: np.diag((owner == _GROUP_OF[name]).astype(np.float64)) for name in NAMES}


def fit_of(weights: Path) -> Path:
    """Where the fitted factors of weights lie: compact.safetensors has compact.factors.json beside it."""
    return weights.with_name(f"{weights.stem}.factors.json")


def read_fit(path: Path) -> dict[str, Any]:
    """What was fitted. Raises WeightsError for a file that is no fit."""
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
        if fit["format"] != FORMAT:
            raise ValueError(f"its format is {fit['format']}, not {FORMAT}")
        missing = {"weights_sha256", "projectors", "neutral", "sliders"} - set(fit)
        wanted = {one.name for one in fields(Slider)}
        if missing or any(set(slider) != wanted for slider in fit["sliders"].values()):
            raise ValueError("it lacks some of its parts")
        return fit
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} holds no fitted factors ({error})", "delete it and fit them anew") from error


def write_fit(path: Path, fit: Mapping[str, Any]) -> None:
    """Writes a fit, its numbers to 7 digits, whole or not at all. Raises OutputError."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError("a fit holds finite numbers")
            return float(f"{value:.7g}")
        return value

    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(json.dumps(plain(fit)) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror})", "check the folder") from error
    finally:
        partial.unlink(missing_ok=True)
