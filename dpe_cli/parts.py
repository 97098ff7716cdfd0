"""Parts of a face, cut out level and at one scale: the mouth, and both eyes, the right one mirrored.

A patch follows the head and not the expression: its place comes from the head's rotation, size and position, so lips
and lids move in it. Outlines are landmarks drawn as masks; where an edit wants them is told by motion codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from dpe_cli.landmarks import EYES, LIPS_INNER, LIPS_OUTER
from dpe_cli.motion_space import COORDINATES, POSE_DIM, normalise

UNIT = 96.0  # pixels of a patch for one unit of the mean face, the distance of the outer eye corners
FINE = 4  # bits below the pixel in which outlines are drawn
REACH, EDGE = 0.09, 0.022  # how far around its outlines a part is painted, and the sigma of the soft edge: units
RING = ((469, 470, 471, 472), (474, 475, 476, 477))  # of the irises, by EYES


@dataclass(frozen=True)
class Part:
    """Where a patch lies on the mean face, and which outlines count: the inner ones, and the others.

    An iris is drawn as a disc (`disc`), all else as a polygon. codes: which expression coordinates move the part.
    """

    name: str  # of the network that paints it
    codes: slice
    anchor: tuple[float, float, float]  # of the patch's middle, in the mean face's frame
    width: int  # pixels
    height: int
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    disc: bool = False
    mirrored: bool = False


_LIPS, _LIDS, _GAZE = (COORDINATES[name] for name in ("mouth", "lids", "gaze"))
MOUTH = Part(
    "mouth",
    slice(_LIPS.start - POSE_DIM, _LIPS.stop - POSE_DIM),
    (0.0, 0.50, -0.17),
    80,
    88,
    tuple(LIPS_INNER),
    tuple(LIPS_OUTER),
)
_SEEING = slice(_LIDS.start - POSE_DIM, _GAZE.stop - POSE_DIM)
EYE = Part("eyes", _SEEING, (-0.356, -0.345, 0.123), 64, 48, tuple(EYES[0]), RING[0], disc=True)
OTHER_EYE = replace(EYE, anchor=(0.356, -0.345, 0.123), inner=tuple(EYES[1]), outer=RING[1], mirrored=True)
BOTH_EYES = (EYE, OTHER_EYE)
PARTS = (MOUTH, *BOTH_EYES)


@dataclass(frozen=True)
class Posed:
    """A face and its head: points (478, 3) and their scale and translation in pixels of a crop, rotation (3, 3)."""

    points: np.ndarray
    scale: float
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def shape(self) -> np.ndarray:
        """The points in the head's frame, in units of the mean face. (478, 3)"""
        return (self.points - self.translation) @ self.rotation / self.scale

    def moved(self, change: np.ndarray) -> "Posed":
        """With another shape: `change` (478, 3) in the head's frame."""
        return replace(self, points=self.points + self.scale * change @ self.rotation.T)


def posed(points: np.ndarray, template: np.ndarray) -> Posed:
    """Finds the head of a face's landmarks (478, 3), pixels."""
    _, scale, rotation, translation = normalise(points[None], template)
    return Posed(points, float(scale[0]), rotation[0], translation[0])


def to_patch(face: Posed, part: Part) -> np.ndarray:
    """(2, 3): positions in the crop, counted from pixel edges, to positions in the patch."""
    middle = (face.scale * face.rotation @ np.array(part.anchor) + face.translation)[:2]
    roll = np.arctan2(face.rotation[1, 0], face.rotation[0, 0])
    turn = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]]) * (UNIT / face.scale)
    turn = np.diag([-1.0 if part.mirrored else 1.0, 1.0]) @ turn
    return np.c_[turn, np.array([part.width, part.height]) / 2 - turn @ middle]


def of_centres(matrix: np.ndarray) -> np.ndarray:
    """The same matrix for OpenCV, which counts from pixel centres."""
    half = np.array([0.5, 0.5])
    return np.c_[matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ half - half]


def cut_patch(crop: np.ndarray, matrix: np.ndarray, part: Part) -> np.ndarray:
    """The patch of a crop (S, S, 3) uint8. -> (height, width, 3) uint8"""
    size = (part.width, part.height)
    return cv2.warpAffine(crop, of_centres(matrix), size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def outlines(points: np.ndarray, matrix: np.ndarray, part: Part) -> np.ndarray:
    """The inner and the other outline as masks. points: (478, >=2) in the crop -> (2, height, width) uint8, 0 to 255"""
    masks = np.zeros((2, part.height, part.width), np.uint8)
    inner, outer = (points[list(ids), :2] @ matrix[:, :2].T + matrix[:, 2] - 0.5 for ids in (part.inner, part.outer))
    fill(masks[0], inner)
    if part.disc:
        middle = outer.mean(0)
        radius = np.linalg.norm(outer - middle, axis=1).mean()
        fixed = np.rint(middle * 2**FINE).astype(int).tolist()
        cv2.circle(masks[1], fixed, round(radius * 2**FINE), 255, cv2.FILLED, cv2.LINE_AA, FINE)
    else:
        fill(masks[1], outer)
    return masks


def fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Draws a polygon (N, 2), pixel centres."""
    cv2.fillPoly(mask, [np.rint(points * 2**FINE).astype(np.int32)], 255, cv2.LINE_AA, FINE)


@dataclass(frozen=True)
class Patch:
    """A part of some pictures of a face, with the outlines that it has and is to have."""

    part: Part
    matrix: np.ndarray  # (2, 3) of `to_patch`
    pictures: tuple[np.ndarray, ...]  # (height, width, 3) uint8 each
    before: np.ndarray  # (2, height, width) of `outlines`
    after: np.ndarray

    @classmethod
    def cut(cls, pictures: Sequence[np.ndarray], before: Posed, after: Posed, part: Part) -> "Patch":
        """pictures: crops (S, S, 3) uint8 in which the head is where `before` says."""
        matrix = to_patch(before, part)
        patches = tuple(cut_patch(picture, matrix, part) for picture in pictures)
        return cls(part, matrix, patches, *(outlines(face.points, matrix, part) for face in (before, after)))

    @property
    def outlines(self) -> np.ndarray:
        """All of them. (4, height, width) uint8"""
        return np.concatenate([self.before, self.after])

    @property
    def share(self) -> np.ndarray:
        """Where it is painted: around all outlines, softly, nothing on the border. (height, width) float32 in [0, 1]"""
        both = np.maximum(self.before, self.after)
        shape = both[0] if self.part.disc else both.max(0)  # an iris under its lids is not seen
        reach, edge = 2 * round(REACH * UNIT) + 1, round(3 * EDGE * UNIT) + 1
        grown = cv2.dilate(shape, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))).astype(np.float32) / 255
        grown[:edge] = grown[-edge:] = grown[:, :edge] = grown[:, -edge:] = 0
        soft = cv2.GaussianBlur(grown, (0, 0), EDGE * UNIT, borderType=cv2.BORDER_CONSTANT)
        return np.where(soft < 1 / 512, 0, soft).astype(np.float32)

    @property
    def inside(self) -> np.ndarray:
        """What its inner outlines hold, softly. (height, width) float32 in [0, 1]"""
        both = np.maximum(self.before[0], self.after[0]).astype(np.float32) / 255
        return cv2.GaussianBlur(both, (0, 0), EDGE / 2 * UNIT)


def put_back(crop: np.ndarray, change: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A crop (S, S, 3) uint8 to which a patch's change (height, width, 3) float32, in levels, is added."""
    size = crop.shape[1::-1]
    back = cv2.warpAffine(change, of_centres(cv2.invertAffineTransform(matrix)), size, flags=cv2.INTER_LINEAR)
    return cv2.add(crop, back, dtype=cv2.CV_8U)
