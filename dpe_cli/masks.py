"""Which part of a crop its edit replaces: soft masks, (S, S) float32 in [0, 1], nothing on the outermost pixels.

Points are x, y in pixels of the crop, whole numbers at pixel centres.
"""

from collections.abc import Callable, Hashable

import cv2
import numpy as np

from dpe_cli.crop import FEATHER, MARGIN, gaussian_mask
from dpe_cli.errors import InputError, UsageError
from dpe_cli.face import CROP_SCALE, CROP_SHIFT, face_size

# (S, S, 3) uint8 -> (N, 2 or 3) points of the most prominent face, five as in `face.Detection` or a dense set; or None
Landmarks = Callable[[np.ndarray], np.ndarray | None]
Parser = Callable[[np.ndarray], np.ndarray]  # (S, S, 3) uint8 -> (S, S) uint8, labels of FACE_LABELS' numbering

MASKS = ("gaussian", "ellipse", "landmarks", "parsing")
FACE_HEIGHT = 0.7  # of the crop's side, forehead to chin: see `face.crop_box`
OVAL = (0.37, 0.42)  # half axes of a face in our crops, shares of the side
SHARP = 5.0  # percent: the feather of a parsed mask, whose outline is the face's own

# What of CelebAMask-HQ's 19 classes (BiSeNet's usual ones) shows the edit: skin, brows, eyes, glasses, ears, earrings,
# nose, mouth, lips, neck, necklace, hair. Background, clothes and hats stay in front, and so do hands and microphones,
# which these networks call background. The neck is in because a chin that drops covers it, and it never covers a face.
FACE_LABELS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17)

POINTS_SECONDS = 0.1  # long against the trembling of landmarks, short against a turn of the head
FORGET_SECONDS = 0.5  # after a longer gap there is nothing to follow on from
REACH = 5.0  # times its lag: what a `Steady` value still knows of; older measures would weigh less than a hundredth


class Steady:
    """Values that follow what is measured with a lag of `seconds` (a first-order low-pass), one for each track.

    Causal, and independent of batches. Begins with the measures of the last REACH * `seconds`: nothing older counts, so
    memory does not grow, and a part of a video gets the values that it has in the whole.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.seen: dict[Hashable, list[tuple[float, np.ndarray]]] = {}  # by track: times and measures

    def __call__(self, track: Hashable, time: float, measured: np.ndarray) -> np.ndarray:
        """The smoothed value at `time` seconds; begins anew after a gap, or when values change their shape."""
        seen = self.seen.get(track, [])
        if seen and not (0 <= time - seen[-1][0] <= FORGET_SECONDS and seen[-1][1].shape == measured.shape):
            seen = []
        seen = [*(one for one in seen if time - one[0] < REACH * self.seconds), (time, measured)]
        self.seen[track] = seen
        return self.value(track)

    def value(self, track: Hashable) -> np.ndarray:
        """The smoothed value at the last time of a track."""
        times = np.array([time for time, _ in self.seen[track]])
        weights = np.exp((times - times[-1]) / self.seconds)
        weights[1:] *= -np.expm1(-np.diff(times) / self.seconds)  # the first stands for all that was before it
        # in float64, so that equal measures give exactly themselves
        measures = np.stack([measured for _, measured in self.seen[track]])
        return np.tensordot(weights, measures, 1).astype(measures.dtype)

    def forget(self, track: Hashable) -> None:
        """Begins anew with the next value of this track."""
        self.seen.pop(track, None)


class MaskMaker:
    """Makes a crop's mask in one of the ways of MASKS.

    gaussian: the crop's square, as in the paper; ellipse: an upright oval; landmarks: the face's own oval, of the
    source and of the edit, so that a chin that drops stays whole; parsing: what a face parsing network calls face,
    skin or hair.

    `feather` is the width of the soft edge in percent of the face's height, 1 to 50; None is each mask's own: 16, for
    parsing 5. Raises InputError if the way wants `landmarks` or a `parser` that is not there.
    """

    def __init__(
        self,
        way: str = "gaussian",
        size: int = 256,
        feather: float | None = None,
        landmarks: Landmarks | None = None,
        parser: Parser | None = None,
    ):
        if way == "landmarks" and landmarks is None:
            raise InputError("--mask landmarks has nothing to find landmarks with", "use --mask ellipse")
        if way == "parsing" and parser is None:
            raise UsageError("--mask parsing needs a face parsing network", "name its ONNX file with --parsing")
        feather = SHARP if feather is None and way == "parsing" else feather
        # a soft edge is four sigmas wide
        sigma = FEATHER if feather is None else feather / 100 * FACE_HEIGHT / 4
        self.way, self.size, self.blur = way, size, sigma * size
        self.landmarks, self.parser = landmarks, parser
        self.steady = Steady(POINTS_SECONDS)
        self.window = gaussian_mask(size, 2 / 256, 6 / 256)  # takes the other masks to nothing at the border
        self.still = None
        if way == "gaussian":
            self.still = gaussian_mask(size, sigma, MARGIN * sigma / FEATHER)
        elif way == "ellipse":
            self.still = self.soft(oval(size, (np.array([size, size]) - 1) / 2, size, 0))

    def __call__(self, crop: np.ndarray, face: np.ndarray, time: float, track: Hashable = 0) -> np.ndarray:
        """The mask for a source crop and its edit, both (S, S, 3) uint8; the same array where it never changes."""
        if self.still is not None:
            return self.still
        if self.way == "parsing":
            kept = np.isin(self.parser(crop), FACE_LABELS).astype(np.uint8)
            # the edge fades out before it reaches what is in front
            around = 2 * int(np.ceil(3 * self.blur)) + 1
            return self.soft(cv2.erode(kept, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (around, around))))
        shape = np.zeros((self.size, self.size), np.uint8)
        for which, picture in (("source", crop), ("edit", face)):
            points = self.landmarks(picture)
            if points is not None:
                points = self.steady((which, track), time, np.asarray(points, np.float32)[:, :2])
                shape |= outline(points, self.size)
        return self.soft(shape if shape.any() else oval(self.size, (np.array([self.size] * 2) - 1) / 2, self.size, 0))

    def soft(self, shape: np.ndarray) -> np.ndarray:
        """A shape (S, S) of 0 and 1 with a soft edge and nothing at the border."""
        blurred = cv2.GaussianBlur(shape.astype(np.float32), (0, 0), self.blur, borderType=cv2.BORDER_REPLICATE)
        return np.where(blurred < 1 / 512, 0, np.minimum(blurred, 1) * self.window)


def oval(size: int, centre: np.ndarray, side: float, degrees: float) -> np.ndarray:
    """The ellipse of a face in a crop (size, size) of 0 and 1; `side` is what the face's own crop would measure."""
    shape, parts = np.zeros((size, size), np.uint8), 16  # parts of a pixel, for cv2
    axes = [round(axis * side * parts) for axis in OVAL]
    middle = [round(float(place) * parts) for place in centre]
    return cv2.ellipse(shape, middle, axes, degrees, 0, 360, 1, -1, cv2.LINE_8, 4)


def outline(points: np.ndarray, size: int) -> np.ndarray:
    """The face with these points (N, 2): an ellipse through five, else their convex hull. (size, size) of 0 and 1"""
    if len(points) != 5:
        hull = cv2.convexHull(np.rint(points).astype(np.int32))
        return cv2.fillConvexPoly(np.zeros((size, size), np.uint8), hull, 1)
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    down = (mouth - eyes) / max(float(np.hypot(*(mouth - eyes))), 1e-6)
    side = CROP_SCALE * face_size(points)
    return oval(size, eyes + CROP_SHIFT * side * down, side, float(np.degrees(np.arctan2(-down[0], down[1]))))
