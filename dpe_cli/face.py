"""Faces in a stream of frames: finding them, following one person, and square crop boxes that do not tremble.

Boxes and points are float pixels of the full frame; pixel i covers [i, i + 1), so a frame is Box(0, 0, width, height).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np

from dpe_cli.errors import FaceError, InputError
from dpe_cli.video import Frame, read_image

SMOOTH_SECONDS = 0.2  # each way: long against detector noise, short against a turn of the head

# Side of a crop in face sizes (`face_size`), and the crop's centre below the eyes in sides. Measured: see `crop_box`.
CROP_SCALE = 2.6
CROP_SHIFT = 0.13
NOSE_DEPTH = 0.55  # how far the nose stands before the eyes, in eye distances: tells a turned face from a small one

REGION_SCALE = 2.0  # the part of the frame searched for a known face, in face boxes
REGION_SIZE = 224  # pixels at most: a region is shrunk to this before it is searched
REGION_DRIFT = 0.1  # of its side: it stays until the face has gone so far, so that a still face is seen alike each time
MIN_FACE = 16.0  # pixels: a smaller face has no expression to edit
NEAR = 0.6  # how far a face may be from where it was, see `distance`
NEAR_PER_SECOND = 0.5  # what is added to NEAR for each second out of sight
FORGET_SECONDS = 1.0  # out of sight for longer, the face is chosen anew
CUT_DIFFERENCE = 0.1  # mean difference of two frames, of 1, that makes a cut between shots
SAME_PERSON = 0.4  # cosine of two face embeddings: above it, one person

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


# One person through the frames


def track_faces(
    frames: Iterable[Frame], detector: FaceDetector, choose: str = "largest"
) -> Iterator[tuple[Frame, Detection | None]]:
    """Each frame with the chosen person's face, None where it is not seen.

    `choose` decides at the first frame with a usable face, after a cut and after FORGET_SECONDS out of sight: largest,
    left, right, center, a number from 0 (from left to right) or the path of a picture of the person. Between these the
    face is followed by where it is, so a larger one passing by does not take its place.

    Raises at once InputError for a `choose` that means nothing, FaceError if it needs a face pack that is not there;
    at the end FaceError if faces were seen and none was ever the chosen one.
    """
    return Follower(detector, make_choice(choose, detector), choose).follow(frames)


Choice = Callable[[np.ndarray, list[Detection]], Detection | None]


def make_choice(choose: str, detector: FaceDetector) -> Choice:
    """A function that picks one of the faces of a picture, or None if the wanted one is not among them."""
    if choose == "largest":
        return lambda rgb, faces: max(faces, key=lambda face: face.box.width * face.box.height)
    if choose == "left":
        return lambda rgb, faces: min(faces, key=lambda face: face.box.centre[0])
    if choose == "right":
        return lambda rgb, faces: max(faces, key=lambda face: face.box.centre[0])
    if choose == "center":
        return lambda rgb, faces: min(faces, key=lambda face: abs(face.box.centre[0] - rgb.shape[1] / 2))
    if choose.isdecimal():
        number = int(choose)
        ordered = lambda faces: sorted(faces, key=lambda face: face.box.centre[0])  # noqa: E731
        return lambda rgb, faces: ordered(faces)[number] if number < len(faces) else None
    return choose_by_picture(Path(choose), detector)


def choose_by_picture(reference: Path, detector: FaceDetector) -> Choice:
    """Picks the face that looks like the one in a picture."""
    if not reference.is_file():
        raise InputError(
            f"no face can be chosen by {reference}",
            "use largest, left, right, center, a number from 0, or the path of a picture of the person",
        )
    if not isinstance(detector, FaceRecogniser):
        raise FaceError(
            f"{detector.name} cannot tell whether a face is the one in {reference}",
            "name an insightface pack with --face-models, or choose by largest, left, right, center or a number",
        )
    picture = read_image(reference)
    faces = detector.detect(picture)
    if not faces:
        raise FaceError(f"no face was found in {reference}", "use a picture that shows the person's face")
    wanted = detector.embed(picture, make_choice("largest", detector)(picture, faces))

    def pick(rgb: np.ndarray, faces: list[Detection]) -> Detection | None:
        alike = [float(detector.embed(rgb, face) @ wanted) for face in faces]
        return faces[int(np.argmax(alike))] if max(alike) > SAME_PERSON else None

    return pick


class Follower:
    """Follows one face; remembers where it was last."""

    def __init__(self, detector: FaceDetector, choice: Choice, choose: str):
        self.detector, self.choice, self.choose = detector, choice, choose
        self.last: Detection | None = None
        self.region: Box | None = None  # searched last
        self.seen_at = 0.0
        self.thumbnail: np.ndarray | None = None
        self.found, self.most_faces = False, 0

    def follow(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detection | None]]:
        """One for one, in order."""
        for frame in frames:
            now = float(frame.time)
            rgb = frame.rgb8
            if self.is_new_shot(rgb) or now - self.seen_at > FORGET_SECONDS:
                self.last = None
            face = self.look(rgb, now)
            if face is not None:
                self.last, self.seen_at, self.found = face, now, True
            yield frame, face
        if self.most_faces and not self.found:
            raise FaceError(
                f"none of the faces seen, at most {self.most_faces} in a frame, is the one chosen by {self.choose}",
                "choose by largest, left, right, center, a number from 0, or a clearer picture",
            )

    def is_new_shot(self, rgb: np.ndarray) -> bool:
        """Whether this frame looks nothing like the one before."""
        before = self.thumbnail
        step = max(1, min(rgb.shape[:2]) // 64)  # enough pixels; all of them cost as much as finding the face
        small = np.ascontiguousarray(rgb[::step, ::step])
        self.thumbnail = cv2.resize(small, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        return before is not None and float(np.abs(self.thumbnail - before).mean()) > CUT_DIFFERENCE

    def look(self, rgb: np.ndarray, now: float) -> Detection | None:
        """The face in this frame: near its last place first, then in the whole frame."""
        if self.last is not None:
            reach = NEAR + NEAR_PER_SECOND * (now - self.seen_at)
            face = self.look_around(rgb, self.last, reach)
            if face is not None:
                return face
        faces = self.usable(rgb)
        if self.last is not None:
            face = nearest(faces, self.last, reach)
        else:
            self.most_faces = max(self.most_faces, len(faces))
            face = self.choice(rgb, faces) if faces else None
        # seen from near, as it is from now on: a detector's idea of a face depends on how large it sees it
        return face and (self.look_around(rgb, face, NEAR) or face)

    def look_around(self, rgb: np.ndarray, known: Detection, reach: float) -> Detection | None:
        """The known face in the part of the frame where it should be."""
        self.region = region_around(known.box, self.region)
        return nearest(detect_in(rgb, self.detector, self.region), known, reach)

    def usable(self, rgb: np.ndarray) -> list[Detection]:
        faces = self.detector.detect(rgb)
        return [face for face in faces if max(face.box.width, face.box.height) >= MIN_FACE]


def distance(face: Detection, last: Detection) -> float:
    """How far a face is from where it was, in face sizes, plus how much it grew or shrank (0.7 for a factor of 2)."""
    size, before = face_size(face.points), max(face_size(last.points), 1e-6)
    moved = float(np.hypot(*(face.points - last.points).mean(0))) / before
    return moved + abs(float(np.log(max(size, 1e-6) / before)))


def nearest(faces: list[Detection], last: Detection, reach: float) -> Detection | None:
    """The face that is where the last one was, if one is."""
    face = min(faces, key=lambda face: distance(face, last), default=None)
    return face if face is not None and distance(face, last) < reach else None


def region_around(box: Box, before: Box | None) -> Box:
    """The square to search for a face that was in `box`: the one searched before if it still serves. Whole pixels."""
    side = max(REGION_SCALE * max(box.width, box.height), 3 * MIN_FACE)
    if before is not None:
        drift = max(abs(new - old) for new, old in zip(box.centre, before.centre, strict=True))
        if drift < REGION_DRIFT * side and 0.85 < before.width / side < 1.18:
            return before
    x0, y0 = (round(centre - side / 2) for centre in box.centre)
    return Box(x0, y0, x0 + round(side), y0 + round(side))


def detect_in(rgb: np.ndarray, detector: FaceDetector, region: Box) -> list[Detection]:
    """Faces in a square of the frame, black outside it, shrunk to REGION_SIZE: fast, and fine for small faces."""
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = (int(value) for value in (region.x0, region.y0, region.x1, region.y1))
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if right - left < MIN_FACE or bottom - top < MIN_FACE:
        return []
    around = (top - y0, y1 - bottom, left - x0, x1 - right)
    picture = cv2.copyMakeBorder(rgb[top:bottom, left:right], *around, cv2.BORDER_CONSTANT)
    if x1 - x0 > REGION_SIZE:
        picture = cv2.resize(picture, (REGION_SIZE, REGION_SIZE), interpolation=cv2.INTER_AREA)
    return [moved(face, (x1 - x0) / picture.shape[0], x0, y0) for face in detector.detect(picture)]


def moved(face: Detection, scale: float, x: float, y: float) -> Detection:
    """A detection in a part of the frame, told in the frame: scaled, then shifted."""
    box = Box(face.box.x0 * scale + x, face.box.y0 * scale + y, face.box.x1 * scale + x, face.box.y1 * scale + y)
    return Detection(box, face.points * scale + (x, y), face.score)


# Boxes that do not tremble


def smooth_boxes(tracked: Iterable[tuple[Frame, Detection | None]], radius: int) -> Iterator[tuple[Frame, Box | None]]:
    """Each frame with a smoothed crop box, None where there is no face.

    Looks `radius` frames each way, so it keeps radius + 1 frames and 2 * radius + 1 boxes, however long the video. A
    box is the value at its own time of a straight line through its neighbours, with Gaussian weights: no lag behind a
    face that moves evenly, at the ends and at any frame rate, and single wrong boxes do not count. A still face has a
    still box. Gaps and jumps (cuts) end a run of boxes; nothing is smoothed across them.
    """
    source = iter(tracked)
    frames: deque[Frame] = deque()  # the current one and those ahead
    window: deque[np.ndarray | None] = deque()  # `radius` each way: time, centre x, centre y, side
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


def measure(frame: Frame, face: Detection | None) -> np.ndarray | None:
    """(4,) time in seconds, centre x and y, side of the crop box in pixels."""
    if face is None:
        return None
    box = crop_box(face)
    return np.array([float(frame.time), *box.centre, box.width])


def run_around(window: deque[np.ndarray | None], place: int) -> tuple[np.ndarray | None, int]:
    """The unbroken run of boxes (N, 4) around the one at `place`, and its place in the run; None, 0 without a box."""
    if window[place] is None:
        return None, 0
    start = stop = place
    while start > 0 and connected(window[start - 1], window[start]):
        start -= 1
    while stop + 1 < len(window) and connected(window[stop], window[stop + 1]):
        stop += 1
    return np.stack([window[i] for i in range(start, stop + 1)]), place - start


def connected(before: np.ndarray | None, after: np.ndarray | None) -> bool:
    """Whether a face can have gone from one box to the next without a cut."""
    if before is None or after is None:
        return False
    small, large = sorted((before[3], after[3]))
    return np.abs(after[1:3] - before[1:3]).max() < JUMP * large and large < GROWTH * small


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
    weights = np.exp(-0.5 * ((np.arange(len(run)) - here) / max(radius / 2, 0.5)) ** 2)
    weights /= weights.sum()
    times = run[:, 0] - run[here, 0]
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


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high`, smooth between."""
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return share * share * (3 - 2 * share)
