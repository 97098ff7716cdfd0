"""Faces in frames: finding them, and square crop boxes around them that do not tremble.

Boxes and points are float pixels of the full frame; pixel i covers [i, i + 1), so a frame is Box(0, 0, width, height).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dpe_cli.video import Frame

SMOOTH_SECONDS = 0.2  # each way: long against detector noise, short against a turn of the head

# Side of a crop in face sizes (`face_size`), and the crop's centre below the eyes in sides. Measured: see `crop_box`.
CROP_SCALE = 2.6
CROP_SHIFT = 0.13
NOSE_DEPTH = 0.55  # how far the nose stands before the eyes, in eye distances: tells a turned face from a small one

# Of the side: a box that wants to move less than the first stays, more than the second goes freely. What CenterFace
# gives trembles (standard deviation) by 0.2 % in its centre and 0.9 % in its side while a face moves, by 0.1 % while
# it is still.
STILL_CENTRE, STILL_SIDE = (0.006, 0.012), (0.02, 0.04)
CATCH_UP = 0.15  # of the gap left by staying, closed at each frame of going
GO_ON = 0.8  # of its freedom a box keeps in the next frame: motion neither stutters nor stops short of the last frame
JUMP, GROWTH = 0.5, 1.4  # of the side, and its ratio: more between two frames is a cut, not a motion


@dataclass(frozen=True)
class Box:
    """x0, y0 inclusive, x1, y1 exclusive; float pixels of the full frame; may reach outside it."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def square(cls, x: float, y: float, side: float) -> "Box":
        """The square of this side around a point."""
        x, y, side = float(x), float(y), float(side)  # of numpy's, which print and pickle worse
        return cls(x - side / 2, y - side / 2, x + side / 2, y + side / 2)

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2


@dataclass(frozen=True, eq=False)
class Detection:
    """A face: what a detector says of it. Pixels of the full frame."""

    box: Box
    points: np.ndarray  # (5, 2) float: left eye, right eye, nose, left and right mouth corner, as seen in the picture
    score: float  # in [0, 1]
    track: int = 0  # number of the track it belongs to, from 1; 0 before it is tracked


class FaceDetector(Protocol):
    """Finds faces in one picture."""

    name: str

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        """Faces of an (H, W, 3) uint8 picture, best first."""


@runtime_checkable
class FaceRecogniser(Protocol):
    """A detector that also tells people apart."""

    def embed(self, rgb: np.ndarray, face: Detection) -> np.ndarray:
        """Unit vector (K,) of a person: the cosine of two is high for one person."""


def make_detector(name: str = "auto", models: Path | None = None) -> FaceDetector:
    """A detector by name: centerface, insightface, yunet, mediapipe; `models` is its folder or file.

    auto is what `models` holds; without `models` insightface if one of its packs is installed, else centerface.
    Raises WeightsError if its model is missing, InputError if its name or package is.
    """
    from dpe_cli import detectors  # imports this module, and onnxruntime

    return detectors.make(name, models)


# Crop boxes


def face_size(points: np.ndarray) -> float:
    """Size of a face in pixels from its (5, 2) points, whichever way it is turned or tilted.

    The eyes come together when the head turns, and the nose leaves their middle: both make up the eye distance. The way
    from eyes to mouth, which a turn leaves alone, is the other half.
    """
    left_eye, right_eye, nose, left_mouth, right_mouth = np.asarray(points, float)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    across = right_eye - left_eye
    apart = float(np.hypot(*across))
    turned = float((nose - eyes) @ across) / max(apart, 1e-6) / NOSE_DEPTH
    return float(np.sqrt(apart**2 + turned**2 + np.sum((mouth - eyes) ** 2)))


def crop_box(face: Detection) -> Box:
    """Square box around a face, forehead to chin; from the detector's box if the points cannot be a face's.

    Training frames its faces by this very function. The face's own height is about 0.7 of the side: tighter than the
    crops of VoxCeleb's preprocessing, so that more of the few pixels are mouth and eyes.
    """
    points = np.asarray(face.points, float)
    size = face_size(points) if np.isfinite(points).all() else 0.0
    extent = max(face.box.width, face.box.height)
    if not 0.3 * extent < size < 3 * extent:
        return Box.square(*face.box.centre, 1.4 * extent)
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    side = CROP_SCALE * size
    down = (mouth - eyes) / max(float(np.hypot(*(mouth - eyes))), 1e-6)
    return Box.square(*(eyes + CROP_SHIFT * side * down), side)


# Boxes that do not tremble


def smooth_boxes(tracked: Iterable[tuple[Frame, Detection | None]], radius: int) -> Iterator[tuple[Frame, Box | None]]:
    """Each frame with a smoothed crop box, None where there is no face.

    Looks `radius` frames each way, so it keeps radius + 1 frames and 2 * radius + 1 boxes, however long the video. A
    box is the value at its own time of a straight line through its neighbours, with Gaussian weights: no lag behind a
    face that moves evenly, at the ends and at any frame rate, and single wrong boxes do not count. A still face has a
    still box. Gaps, jumps and the ends of tracks end a run of boxes; nothing is smoothed across them. Radius 0 smooths
    nothing.
    """
    source = iter(tracked)
    if radius == 0:
        yield from ((frame, None if face is None else crop_box(face)) for frame, face in source)
        return
    frames: deque[Frame] = deque()  # the current one and those ahead
    window: deque[Measured | None] = deque()  # `radius` each way
    place, last = 0, None  # of the current one in the window; what became of the one before
    for frame, face in islice(source, radius + 1):
        frames.append(frame)
        window.append(measure(frame, face))
    while frames:
        run, here = run_around(window, place)
        last = None if run is None else settle(run, here, radius, last if here else None)
        yield frames.popleft(), None if last is None else Box.square(*last.given)
        if place == radius:
            window.popleft()
        else:
            place += 1
        for frame, face in islice(source, 1):
            frames.append(frame)
            window.append(measure(frame, face))


class Measured(NamedTuple):
    """A crop box before smoothing, and whose it is."""

    values: np.ndarray  # (4,) time in seconds, centre x and y, side in pixels
    track: int


def measure(frame: Frame, face: Detection | None) -> Measured | None:
    """The crop box of a face."""
    if face is None:
        return None
    box = crop_box(face)
    return Measured(np.array([float(frame.time), *box.centre, box.width]), face.track)


def run_around(window: deque[Measured | None], place: int) -> tuple[np.ndarray | None, int]:
    """The unbroken run of boxes (N, 4) around the one at `place`, and its place in the run; None, 0 without a box."""
    if window[place] is None:
        return None, 0
    start = stop = place
    while start > 0 and connected(window[start - 1], window[start]):
        start -= 1
    while stop + 1 < len(window) and connected(window[stop], window[stop + 1]):
        stop += 1
    return np.stack([window[i].values for i in range(start, stop + 1)]), place - start


def connected(before: Measured | None, after: Measured | None) -> bool:
    """Whether a face can have gone from one box to the next without a cut."""
    if before is None or after is None or before.track != after.track:
        return False
    small, large = sorted((before.values[3], after.values[3]))
    return np.abs(after.values[1:3] - before.values[1:3]).max() < JUMP * large and large < GROWTH * small


@dataclass(frozen=True)
class Settled:
    """Centre x, y and side (3,) of a box: as the smoothing wants it, as it is given, and how free it is, 0 to 1."""

    smooth: np.ndarray
    given: np.ndarray
    free: np.ndarray


def settle(run: np.ndarray, here: int, radius: int, last: Settled | None) -> Settled:
    """The box at `here` of a run (N, 4) of measured ones. `last` is the one before, None at the start of a run.

    The given box stays while the face is still; else it goes as far as the smooth one does and closes the gap between
    the two within a few frames, so that it starts without a jerk and does not lag.
    """
    values = without_outliers(run)[:, 1:]
    times = run[:, 0] - run[here, 0]
    step = float(np.median(np.diff(times))) if len(run) > 1 else 1.0  # by time: frame rates may vary
    weights = np.exp(-0.5 * (times / step / max(radius / 2, 0.5)) ** 2)
    weights /= weights.sum()
    middle, mean = weights @ times, weights @ values
    spread = weights @ (times - middle) ** 2
    slope = (weights * (times - middle)) @ values / spread if spread > 0 else np.zeros(3)
    smooth = mean - slope * middle  # the line at time 0
    before = mean if last is None else last.given
    wish = np.maximum(np.abs(smooth - before), np.abs(slope) * (times[-1] - times[0])) / smooth[2]
    free = np.array([ramp(wish[:2].max(), *STILL_CENTRE)] * 2 + [ramp(wish[2], *STILL_SIDE)])
    if last is None:
        return Settled(smooth, mean + free * (smooth - mean), free)
    free = np.maximum(free, GO_ON * last.free)
    return Settled(smooth, before + free * (smooth - last.smooth + CATCH_UP * (last.smooth - before)), free)


def without_outliers(run: np.ndarray) -> np.ndarray:
    """A run (N, 4) of boxes without single wrong ones; an even motion is left as it is.

    Medians of three neighbours; at the ends of the value, its neighbour and where the two neighbours lead.
    """
    clean = run.copy()
    clean[1:-1, 1:] = np.median([run[:-2, 1:], run[1:-1, 1:], run[2:, 1:]], axis=0)
    if len(run) > 3:
        for end, near, far in ((0, 1, 2), (-1, -2, -3)):
            ahead = (run[end, 0] - run[near, 0]) / max(abs(run[near, 0] - run[far, 0]), 1e-6)
            led = clean[near] + abs(ahead) * (clean[near] - clean[far])
            clean[end, 1:] = np.median([run[end], clean[near], led], axis=0)[1:]
    return clean


def ramp(value: np.ndarray | float, low: float, high: float) -> np.ndarray | float:
    """0 up to `low`, 1 from `high`, smooth between."""
    share = np.clip((value - low) / (high - low), 0, 1)
    return share * share * (3 - 2 * share)
