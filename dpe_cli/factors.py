"""Factors of the expression code: mouth, blink, gaze, brows and the rest, each edited on its own.

A factor is a projector P (K, K) on motion codes; all of them sum to the identity. With m the strength and d the
driving of a factor (PD-FGC's control, in the code space of DPE):

    code = own + sum over factors of  m * P (d - own)

so strengths of 1 with one driving are the full transfer, strengths of 0 the source's self-reconstruction, exactly.
Weights that were trained with `motion_space` have factors by construction: their projectors pick coordinates. For
others, the released ones among them, projectors are fitted in closed form by `fit_factors`, and stored beside the
weights with their sha256.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpe_cli.errors import WeightsError
from dpe_cli.motion_space import GROUPS, MOTION_DIM, POSE_DIM
from dpe_cli.weights import digest, find, is_ours

NAMES = ("mouth", "blink", "gaze", "brows", "rest")
JOINT = {"eyes": ("blink", "gaze"), "emotion": ("brows", "rest"), "all": NAMES}  # names that stand for several
FORMAT = "dpe-factors/1"
SPACE = "motion-space.json"  # lies beside weights whose codes were taught by it
_GROUP_OF = {"mouth": "mouth", "blink": "lids", "gaze": "gaze", "brows": "brows"}

Change = tuple[np.ndarray, np.ndarray]  # codes (N, K), strengths (N,)


def parts(name: str) -> tuple[str, ...]:
    """The factors that a name stands for: eyes is blink and gaze. Raises ValueError for a name that is none."""
    if name in NAMES:
        return (name,)
    if name not in JOINT:
        raise ValueError(f"{name} is no factor; there are {', '.join((*NAMES, *JOINT))}")
    return JOINT[name]


@dataclass(frozen=True, eq=False)
class Factors:
    """What the motion codes of some weights are made of.

    projectors: name of NAMES -> (K, K) float64, summing to the identity.
    """

    projectors: Mapping[str, np.ndarray]
    sha256: str = ""  # of the weights
    path: Path | None = field(default=None)  # of the weights

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
        if is_ours(path) and (path.parent / SPACE).is_file():
            return cls(coordinate_projectors(), sha256, path)
        problem = f"{file} was fitted to other weights" if fit else f"{path.name} has no fitted factors"
        raise WeightsError(problem, "fit them: dpe train --set stage=factors --init WEIGHTS --data PREPARED -o RUN")

    @classmethod
    def of_fit(cls, fit: Mapping[str, Any], path: Path | None = None) -> "Factors":
        """What `read_fit` gave."""
        stored = fit["projectors"]
        projectors = {name: np.array(stored[name], np.float64) for name in NAMES} if stored else coordinate_projectors()
        return cls(projectors, fit["weights_sha256"], path)

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


def coordinate_projectors() -> dict[str, np.ndarray]:
    """Of codes that follow `motion_space`: each factor is some coordinates, the rest those of the pose."""
    owner = np.array(["rest"] * POSE_DIM + [group for group, count in GROUPS.items() for _ in range(count)])
    assert len(owner) == MOTION_DIM
    return {name: np.diag((owner == _GROUP_OF.get(name, "rest")).astype(np.float64)) for name in NAMES}


def fit_of(weights: Path) -> Path:
    """Where the fitted factors of weights lie: compact.safetensors has compact.factors.json beside it."""
    return weights.with_name(f"{weights.stem}.factors.json")


def read_fit(path: Path) -> dict[str, Any]:
    """What was fitted. Raises WeightsError for a file that is no fit."""
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
        if fit["format"] != FORMAT:
            raise ValueError(f"its format is {fit['format']}, not {FORMAT}")
        return fit
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} holds no fitted factors ({error})", "delete it and fit them anew") from error
