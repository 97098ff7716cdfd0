"""Fine-grained control of an edit: whom each factor of the expression follows, how strongly, what measures are set to.

A Control is what the user asks for; bound to the factors of some weights it says for every frame what to do (Mixing),
and `mixed` makes the codes of a batch of frames: first factors are taken over, then sliders are set.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpe_cli.errors import InputError
from dpe_cli.factors import JOINT, NAMES, TRIED, Factors, parts
from dpe_cli.limits import TEXT_BYTES, check_file
from dpe_cli.measures import TABLE
from dpe_cli.motion import STRONGEST, Curve, read_curve

SOURCE, DRIVING, NEUTRAL = "source", "driving", "neutral"
POSE = "pose"  # its strength is set with those of the factors
MAIN = {"mouth": "mouth_open", "eyes": "blink", "brows": "brow_raise"}  # the slider that a bare value of a factor sets
PAIR = ("gaze_x", "gaze_y")  # gaze=10:-5
CURVES = ("strength_curves", "slider_curves")
BEYOND = 0.25  # of its range: so far past what was fitted a slider goes


@dataclass(frozen=True)
class Control:
    """What is asked of the expression, factor by factor. All but `factors` is plain and goes into the report.

    origins: factor of NAMES -> source, driving, neutral (a face at rest), or the path of a driving of its own; one that
    is missing follows the driving. strengths: factor -> 0 to 3, in place of the edit's; `pose` too. sliders: measure or
    emotion -> value in its unit; steps: what is added to it. The curves are keyframes of strengths and sliders.
    """

    origins: Mapping[str, Any] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    sliders: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    strength_curves: Mapping[str, Curve] = field(default_factory=dict)
    slider_curves: Mapping[str, Curve] = field(default_factory=dict)
    factors: Factors | None = None  # of the weights that edit

    @property
    def paths(self) -> tuple[Path, ...]:
        """Drivings of single factors, different ones."""
        return tuple(dict.fromkeys(origin for origin in self.origins.values() if isinstance(origin, Path)))

    @property
    def follows_driving(self) -> bool:
        """Whether any factor follows the driving of the whole expression."""
        return any(self.origins.get(name, DRIVING) == DRIVING for name in NAMES)

    def to_dict(self) -> dict[str, Any]:
        """All but the factors, ready for JSON; `from_dict` makes it anew. Drivings by their full names."""
        origins = {name: {"path": str(one.absolute())} if isinstance(one, Path) else one
                   for name, one in self.origins.items()}  # fmt: skip
        curves = {kind: {name: asdict(curve) for name, curve in getattr(self, kind).items()} for kind in CURVES}
        numbers = {kind: dict(getattr(self, kind)) for kind in ("strengths", "sliders", "steps")}
        return {"origins": origins, **numbers, **curves}

    @classmethod
    def from_dict(cls, words: Mapping[str, Any]) -> "Control":
        """What `to_dict` gave. Raises KeyError, TypeError, AttributeError for something else."""
        origins = {name: Path(one["path"]) if isinstance(one, dict) else one for name, one in words["origins"].items()}
        curves = {kind: {name: Curve(**{**curve, **{one: tuple(curve[one]) for one in ("times", "values")}})
                         for name, curve in words[kind].items()} for kind in CURVES}  # fmt: skip
        return cls(origins, words["strengths"], words["sliders"], words["steps"], **curves)

    def bound(self, description: Mapping[str, Any]) -> tuple["Control", list[str]]:
        """This control for the weights of an engine, and remarks on what is not known of them.

        Raises WeightsError where nothing was fitted to these weights that is needed, InputError for what they cannot
        do.
        """
        factors, remarks = Factors.load(description), []
        for name in self.slider_names:
            slider = factors.slider(name)
            room = BEYOND * (slider.high - slider.low)
            low, high = slider.low - room, slider.high + room
            for value in self.values_of(name):
                if not low <= value <= high:
                    problem = f"{name} = {value:g} is out of the reach of these weights"
                    raise InputError(problem, f"give it {low:.2g} to {high:.2g} ({slider.unit})")
            remarks.append(f"{name} goes at most {TRIED * slider.sigma:.2g} away from what each frame shows")
        for name, step in self.steps.items():
            slider = factors.slider(name, by_step=True)
            reach = TRIED * slider.sigma
            if not abs(step) <= reach:  # nan is none
                raise InputError(f"{name}+={step:g} is a step too far", f"give it at most {reach:.2g} ({slider.unit})")
        if NEUTRAL in self.origins.values():
            factors.check_fitted()
        alone = [name for name in NAMES if self.singled_out(name)]
        if alone and not factors.sliders:
            remarks.append("how well codes tell factors apart is not known: no factors are fitted to these weights")
        for name in alone:
            told = {one: slider.why_not_told for one, slider in factors.sliders.items() if slider.factor == name}
            reasons = "; ".join(f"{one}: {why}" for one, why in told.items() if why)
            if told and all(told.values()):
                usable = {slider.factor for slider in factors.sliders.values() if not slider.why_not_told} & set(NAMES)
                problem = f"{name} cannot be controlled with these weights ({reasons})"
                raise InputError(problem, f"leave it out; available: {', '.join(sorted(usable)) or 'none'}")
            if reasons:
                remarks.append(f"these weights tell {name} in part only ({reasons})")
        return replace(self, factors=factors), remarks

    @property
    def slider_names(self) -> list[str]:
        """The sliders that are asked for, constant or by keyframes."""
        return list(dict.fromkeys([*self.sliders, *self.slider_curves]))

    def values_of(self, name: str) -> Sequence[float]:
        """Every value that is asked of a slider."""
        return self.slider_curves[name].values if name in self.slider_curves else (self.sliders[name],)

    def singled_out(self, name: str) -> bool:
        """Whether a factor is asked for by itself, other than to keep the source's."""
        origin = self.origins.get(name)
        if origin == SOURCE or name == "rest":
            return False
        asked = name in self.strength_curves or self.strengths.get(name, 0) > 0
        return asked or isinstance(origin, Path) or (origin == DRIVING and SOURCE in self.origins.values())

    def at(self, time: float, strength: float, codes: Mapping[Any, tuple[np.ndarray, np.ndarray | None]]) -> "Mixing":
        """What is wanted of the frame at `time` seconds of the source.

        strength: the edit's own. codes: driving, by DRIVING or its path -> code (K,), and the code it is relative to
        or None; without DRIVING there is none for the whole expression.
        """
        changes = {}
        for name in NAMES:
            origin = self.origins.get(name, DRIVING)
            if origin == NEUTRAL:
                code, base = self.factors.rest.astype(np.float32), None
                if name == "rest":
                    continue  # what is not measured has no state of rest
            elif origin in codes:
                code, base = codes[origin]
            else:
                continue
            curve = self.strength_curves.get(name)
            share = curve.at(time) if curve else self.strengths.get(name, strength)
            changes[name] = (code, base, share)
        values = {name: self.slider_curves[name].at(time) if name in self.slider_curves else self.sliders[name]
                  for name in self.slider_names}  # fmt: skip
        return Mixing(self.factors, changes, values, self.steps)

    def pose_strength(self, time: float, strength: float) -> float:
        """The strength of the pose at `time` seconds of the source; `strength` where none is asked for by itself."""
        curve = self.strength_curves.get(POSE)
        return curve.at(time) if curve else self.strengths.get(POSE, strength)


@dataclass(frozen=True)
class Mixing:
    """What is wanted of the expression of one frame."""

    factors: Factors
    changes: Mapping[str, tuple[np.ndarray, np.ndarray | None, float]]  # factor -> code (K,), relative to, strength
    values: Mapping[str, float]  # slider -> value
    steps: Mapping[str, float]  # slider -> what is added

    @property
    def codes(self) -> list[np.ndarray]:
        """All that the expression follows, for whoever asks whether it stands still."""
        wanted = np.array([*(share for _, _, share in self.changes.values()), *self.values.values()])
        return [*(code for code, _, _ in self.changes.values()), wanted]


def mixed(own: np.ndarray, wishes: Sequence[Mixing]) -> np.ndarray:
    """The codes of N frames as they are wanted. own: (N, K), the source's. -> (N, K) float32"""
    factors, changes = wishes[0].factors, {}
    for name in wishes[0].changes:
        each = [wish.changes[name] for wish in wishes]
        codes = np.stack([code for code, _, _ in each]).astype(np.float64)
        if each[0][1] is not None:  # relative: the driving's change is added to the source's own
            codes = own + codes - np.stack([base for _, base, _ in each])
        changes[name] = (codes, np.array([share for _, _, share in each]))
    result = factors.mix(own, changes)
    first = wishes[0]
    if first.values or first.steps:
        values = {name: np.array([wish.values[name] for wish in wishes]) for name in first.values}
        steps = {name: np.full(len(wishes), step) for name, step in first.steps.items()}
        result = factors.set(result, values, steps)
    return result


# From what users write


def parse_strength(text: str) -> tuple[float | None, dict[str, float]]:
    """ "0.8", "mouth=1.2,eyes=0.5", or "0.8,mouth=1.2": the plain number, and each factor's. Raises ValueError."""
    plain, each = None, {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        strength = number_of(value if equals else name, item)
        if not 0 <= strength <= STRONGEST:
            raise ValueError(f"{item} is not between 0 and {STRONGEST:g}")
        if not equals:
            plain = strength
        else:
            each |= dict.fromkeys([POSE] if name == POSE else parts(name), strength)
    return plain, each


def parse_sliders(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """ "mouth_open=0.3,gaze=10:-5,blink+=0.2" -> slider -> value, and slider -> what is added. Raises ValueError."""
    values: dict[str, float] = {}
    steps: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item} is not NAME=VALUE or NAME+=STEP")
        if name.endswith("+"):
            steps |= slider_values(name[:-1].strip(), value)
        else:
            values |= slider_values(name.strip(), value)
    if values.keys() & steps.keys():
        raise ValueError(f"{min(values.keys() & steps.keys())} is both set and added to")
    return values, steps


def slider_values(name: str, text: str) -> dict[str, float]:
    """One slider, or gaze with its two. Raises ValueError."""
    known = [measure.name for measure in TABLE]
    if name == "gaze":
        across, colon, up = text.partition(":")
        if not colon:
            raise ValueError(f"gaze={text}: give it degrees to the right and up, gaze=10:-5")
        both = zip(PAIR, (across, up), strict=True)
        return {one: number_of(value, f"gaze={text}") for one, value in both if value}
    if name not in known:
        raise ValueError(f"{name} is no slider; there are gaze, {', '.join(known)}")
    return {name: number_of(text, f"{name}={text}")}


def number_of(text: str, said: str) -> float:
    """The number that the user wrote in `said`. Raises ValueError."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{said}: {text or 'nothing'} is no number") from None


def parse_choice(name: str, text: str) -> tuple[str | None, dict[str, float]]:
    """What an option like --mouth asks for: an origin (source, driving, neutral) or values of sliders.

    Raises ValueError.
    """
    if text in (SOURCE, DRIVING, NEUTRAL):
        return text, {}
    if text == "audio":
        raise ValueError("speech drives the mouth in dpe dub" if name == "mouth" else f"sound says nothing of {name}")
    if name == "gaze":
        return None, slider_values(name, text)
    if name == "emotion":
        which, colon, value = text.partition(":")
        emotions = [measure.name for measure in TABLE if measure.factor == "emotion"]
        if which not in emotions or not colon:
            raise ValueError(f"{text} is not source, driving, neutral or EMOTION:VALUE ({', '.join(emotions)})")
        return None, slider_values(which, value)
    try:
        return None, {MAIN[name]: float(text)}
    except ValueError:
        raise ValueError(f"{text} is not source, driving, neutral or a value of {MAIN[name]}") from None


def read_curves(path: Path, lids_follow: bool = True) -> Curve | tuple[dict[str, Curve], dict[str, Curve]]:
    """Keyframes: of the strength, from lines "seconds,strength"; or of factors' strengths and of sliders.

    Those come from lines "seconds,factor,value", in which gaze is gaze_x and gaze_y on lines of their own. blink,
    which is both, is a strength where the lids follow something. Raises InputError.
    """
    check_file(path, TEXT_BYTES)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error):
        return read_curve(path)  # which says what is wrong
    if max((len(row) for row in rows), default=0) < 3:
        return read_curve(path)
    if not any(character.isdigit() for character in rows[0][0]):
        rows = rows[1:]
    points: dict[str, list[tuple[float, float]]] = {}
    try:
        for row in rows:
            if len(row) != 3:
                raise ValueError(f"a line has {len(row)} columns instead of 3: {','.join(row)}")
            points.setdefault(row[1].strip(), []).append((float(row[0]), float(row[2])))
        strengths: dict[str, Curve] = {}
        sliders: dict[str, Curve] = {}
        for name, keys in points.items():
            times, values = zip(*keys, strict=True)
            if name in (POSE, *NAMES, *JOINT) and (lids_follow or name != MAIN["eyes"]):
                curve = Curve(times, values)
                strengths |= dict.fromkeys([POSE] if name == POSE else parts(name), curve)
            else:
                slider_values(name, "0")  # raises for a name that is none
                sliders[name] = Curve(times, values, -np.inf, np.inf)
        return strengths, sliders
    except ValueError as error:
        raise InputError(f"{path} is no curve: {error}", "give it lines of seconds,factor,value") from error
