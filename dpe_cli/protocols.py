"""The protocols of evaluation: which pictures are edited by which, and what edits them.

* same: the first frame of a clip is the source, other frames of that clip are the driving, in the crop of the first: as
  a camera sees them that stands still, but for heads that leave its crop. In mode both the driving frame is what should
  come out, so pictures can be compared.
* cross: frames of one person, evenly spread over a clip, driven one for one by such frames of another person.
* video: consecutive frames of one person driven by another's and pasted back into their frames, boxes smoothed, as
  `dpe edit` does it. Expression only: a moved head does not fit its old frame.

Copy-source and copy-driving need no weights: they are the floor and the ceiling of each number. In protocol same,
copy-driving's CSIM is what two real frames of one person reach.
"""

import itertools
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import cv2
import numpy as np

from dpe_cli.crop import cut, gaussian_mask, paste_back
from dpe_cli.dataset import CROP, Clip, face_at, kept_near
from dpe_cli.errors import InputError
from dpe_cli.face import SMOOTH_SECONDS, Box, crop_box, smooth_boxes
from dpe_cli.jobs import Engine, lending_of
from dpe_cli.motion_space import LIMIT, seen_in
from dpe_cli.video import Frame

PROTOCOLS, MODES = ("same", "cross", "video"), ("exp", "pose", "both")
FPS = Fraction(25, 2)  # of prepared clips
SHORTEST = 4  # frames: fewer show no motion
STILL_FRAMES, NOISE = 8, 2.0  # a still shot to look for tremble in: frames, camera noise in levels of 255


@dataclass(frozen=True)
class Plan:
    """What to evaluate; the seed decides which people meet."""

    protocols: tuple[str, ...] = PROTOCOLS
    modes: tuple[str, ...] = MODES
    pairs: int = 10
    frames: int = 14
    seed: int = 0

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Protocol and mode of each table. Raises InputError if none is left."""
        cases = [(p, m) for p in PROTOCOLS for m in MODES if p in self.protocols and m in self.modes]
        cases = [(protocol, mode) for protocol, mode in cases if protocol != "video" or mode == "exp"]
        if not cases:
            raise InputError("video portrait editing pastes back expressions only", "add --mode exp")
        return cases


# What is compared


class System(Protocol):
    """Something that edits: a checkpoint or a baseline."""

    name: str
    size: int  # side of its crops in pixels
    description: dict[str, Any]

    def edit(self, source: "Footage", driving: "Footage", mode: str) -> np.ndarray:
        """N frames twice; exp, pose or both -> crops (N, S, S, 3) uint8"""


class CopySource:
    """Changes nothing."""

    name, size = "copy-source", CROP
    description = {"baseline": "the source as it is"}  # noqa: RUF012

    def edit(self, source: "Footage", driving: "Footage", mode: str) -> np.ndarray:
        """The source."""
        return source.crops(self.size)


class CopyDriving:
    """Shows the driving person."""

    name, size = "copy-driving", CROP
    description = {"baseline": "the driving in place of the source"}  # noqa: RUF012

    def edit(self, source: "Footage", driving: "Footage", mode: str) -> np.ndarray:
        """The driving."""
        return driving.crops(self.size)


class Networks:
    """A checkpoint."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.size = engine, name, engine.size

    @property
    def description(self) -> dict[str, Any]:
        """Weights, device, precision."""
        return dict(self.engine.description)

    def edit(self, source: "Footage", driving: "Footage", mode: str) -> np.ndarray:
        """The source with the driving's motion, at full strength, as in a video."""
        crops, lending = source.crops(self.size), lending_of(self.engine)
        codes = self.engine.motion_codes(driving.faces(self.size) if lending else driving.crops(self.size))
        codes = driving.as_shown(codes) if lending else codes
        if lending and mode != "pose":
            crops = lending(crops, codes, source.times, [0] * len(crops))
        return self.engine.edit(crops, None if mode == "pose" else codes, None if mode == "exp" else codes)


def systems_of(engines: Iterable[Engine], names: Iterable[str]) -> list[System]:
    """The two baselines and the checkpoints, whose names are made different where they are not."""
    names = list(names)
    for number, name in enumerate(names):
        names[number] = name if name not in names[:number] else f"{name} ({number + 1})"
    return [CopySource(), CopyDriving(), *map(Networks, engines, names)]


# Which pictures


@dataclass(frozen=True)
class Footage:
    """Frames of one person and where the tool would cut them."""

    name: str
    frames: np.ndarray  # (N, 256, 256, 3) uint8
    boxes: list[Box]
    times: np.ndarray  # (N,) seconds
    shown: list[Box] | None = None  # what of each frame is shown, where that does not follow the face

    def crops(self, size: int) -> np.ndarray:
        """What is shown: (N, size, size, 3) uint8"""
        boxes = zip(self.frames, self.shown or self.boxes, strict=True)
        return np.stack([cut(frame, box, size)[0] for frame, box in boxes])

    def faces(self, size: int) -> np.ndarray:
        """Crops that follow the face, by which codes are measured: (N, size, size, 3) uint8"""
        return replace(self, shown=None).crops(size)

    def as_shown(self, codes: np.ndarray) -> np.ndarray:
        """Codes (N, K) of `faces` as they are in `crops`."""
        if self.shown is None:
            return codes
        boxes, shown = (np.array([astuple(box) for box in each]) for each in (self.boxes, self.shown))
        return np.clip(seen_in(codes, boxes, shown), -LIMIT, LIMIT).astype(np.float32)

    def first(self, count: int) -> "Footage":
        """Its first frames."""
        shown = self.shown and self.shown[:count]
        return Footage(self.name, self.frames[:count], self.boxes[:count], self.times[:count], shown)

    def still(self, random: np.random.Generator) -> "Footage":
        """The first frame again and again, as a camera on a tripod would see it: with noise."""
        noise = random.normal(0, NOISE, (STILL_FRAMES, *self.frames.shape[1:]))
        noisy = np.clip(np.rint(self.frames[0] + noise), 0, 255).astype(np.uint8)
        return Footage(self.name, noisy, self.boxes[:1] * STILL_FRAMES, np.arange(STILL_FRAMES) / float(FPS))


def take(clip: Clip, indices: np.ndarray, smooth: bool = False) -> Footage:
    """These frames of a clip, framed as the tool frames faces; `smooth` as it does in a video."""
    frames, times = np.stack([np.asarray(clip.frames[i]) for i in indices]), indices / float(FPS)
    faces = [face_at(clip.points[i]) for i in indices]
    if not smooth:
        return Footage(clip.name, frames, [crop_box(face) for face in faces], times)
    timed = [(Frame(n, n / FPS, frame), face) for n, (frame, face) in enumerate(zip(frames, faces, strict=True))]
    boxed = smooth_boxes(timed, max(1, round(float(FPS) * SMOOTH_SECONDS)))
    return Footage(clip.name, frames, [box for _, box in boxed], times)


@dataclass(frozen=True)
class Scene:
    """One source and one driving, N frames each, to be edited one for one."""

    source: Footage
    driving: Footage
    pasted: bool = False

    def result(self, system: System, mode: str) -> np.ndarray:
        """What a system makes of it: crops (N, 256, 256, 3), or whole frames where it is pasted."""
        faces = system.edit(self.source, self.driving, mode)
        if self.pasted:
            return self.paste(faces)
        return np.stack([cv2.resize(face, (CROP, CROP), interpolation=cv2.INTER_CUBIC) for face in faces])

    def paste(self, faces: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) faces back in their frames."""
        size = faces.shape[1]
        mask = gaussian_mask(size)
        places = zip(self.source.frames, faces, self.source.boxes, strict=True)
        return np.stack([paste_back(frame, face, mask, cut(frame, box, size)[1]) for frame, face, box in places])

    def masks(self) -> np.ndarray:
        """What share of each pixel is pasted: (N, H, W) float in [0, 1]"""
        black = Scene(replace(self.source, frames=np.zeros_like(self.source.frames)), self.driving)
        white = np.full((len(self.source.frames), CROP, CROP, 3), 255, np.uint8)
        return black.paste(white)[..., 0] / 255

    def still(self, random: np.random.Generator) -> "Scene":
        """A still source and a still driving, cropped."""
        return Scene(self.source.still(random), self.driving.still(random))


def choose_pairs(clips: list[Clip], protocol: str, count: int, seed: int) -> list[tuple[Clip, Clip]]:
    """At most `count` different pairs of source and driving clip; the seed alone decides which.

    In protocol same a clip is its own driving, elsewhere the two show different people. Raises InputError where there
    are fewer than two people.
    """
    people: dict[str, list[Clip]] = {}
    for clip in clips:
        people.setdefault(clip.identity, []).append(clip)
    random = np.random.default_rng(seed)
    order = [people[name] for name in random.permutation(sorted(people))]
    if protocol == "same":
        rounds = itertools.zip_longest(*order)  # everybody's first clip, then everybody's second
        return [(clip, clip) for row in rounds for clip in row if clip is not None][:count]
    number = len(order)
    if number < 2:
        raise InputError(f"protocol {protocol} needs two held-out people, there is {number}", "prepare more clips")
    pairs = []
    for i in range(min(count, number * (number - 1))):
        source, driving = order[i % number], order[(i + 1 + i // number) % number]
        pairs.append((source[i % len(source)], driving[i % len(driving)]))
    return pairs


def make_scene(protocol: str, source: Clip, driving: Clip, frames: int) -> Scene:
    """The frames of a pair that a protocol looks at, at most `frames`, fewer where a clip is shorter."""
    if protocol == "same":
        count = min(frames, len(source) - 1)
        first, others = (take(source, which) for which in (np.zeros(count, int), spread(1, len(source) - 1, count)))
        return Scene(first, replace(others, shown=[kept_near(first.boxes[0], box) for box in others.boxes]))
    count = min(frames, len(source), len(driving))
    if protocol == "cross":
        return Scene(*(take(clip, spread(0, len(clip) - 1, count)) for clip in (source, driving)))
    middle = [(len(clip) - count) // 2 + np.arange(count) for clip in (source, driving)]
    return Scene(take(source, middle[0], smooth=True), take(driving, middle[1], smooth=True), pasted=True)


def spread(first: int, last: int, count: int) -> np.ndarray:
    """`count` whole numbers evenly from the first to the last."""
    return np.linspace(first, last, count).round().astype(int)
