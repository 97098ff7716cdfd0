"""Regions of a face, drawn from its landmarks.

The pixel guard: whatever an edit does, only the lips, the eyes, the upper or the lower face are pasted back. There the
landmarks of the source crop and of the edited one count, so that lips that part stay whole.
"""

from collections.abc import Hashable

import cv2
import numpy as np

from dpe_cli.colours import colour_difference
from dpe_cli.landmarks import EYES, FACE_OVAL, LIPS_OUTER, RIGID
from dpe_cli.masks import POINTS_SECONDS, Landmarks, MaskMaker, Steady

PARTS = {"lips": [LIPS_OUTER], "eyes": list(EYES), "upper": [FACE_OVAL], "lower": [FACE_OVAL]}
REACH = {"lips": 0.16, "eyes": 0.16, "upper": 0.12, "lower": 0.12}  # around the landmarks, eye distances
EDGE = 0.04  # sigma of the soft edge, eye distances
RING = 6 / 256  # share of the side: how far around a region its light is looked at
NOSE = {"upper": 195, "lower": 2}  # where the face is halved: on the nose's bridge, under the nose


class RegionMasks:
    """Masks times a region, with the interface of `MaskMaker`.

    landmarks: the 478 points of the face in a crop (S, S, 3), or None. Without them nothing of that frame is pasted.
    """

    def __init__(self, masks: MaskMaker, region: str, landmarks: Landmarks):
        if region not in PARTS:
            raise ValueError(f"{region} is not one of {', '.join(PARTS)}")
        self.masks, self.region, self.landmarks = masks, region, landmarks
        self.steady = Steady(POINTS_SECONDS)

    def __call__(self, crop: np.ndarray, face: np.ndarray, time: float, track: Hashable = 0) -> np.ndarray:
        """The mask of a crop and its edit, both (S, S, 3) uint8. (S, S) float32 in [0, 1]"""
        allowed = np.zeros(crop.shape[:2], np.float32)
        for which, picture in (("source", crop), ("edit", face)):
            points = self.landmarks(picture)
            if points is not None:
                points = self.steady((which, track), time, np.asarray(points, np.float32)[:, :2])
                allowed = np.maximum(allowed, region_mask(points, self.region, len(crop)))
        return self.masks(crop, face, time, track) * allowed


def region_mask(points: np.ndarray, region: str, size: int) -> np.ndarray:
    """A region of the face with these points (478, >=2), pixels of a crop. (size, size) float32 in [0, 1]"""
    unit = float(np.linalg.norm(points[33, :2] - points[263, :2]))
    shape = np.zeros((size, size), np.uint8)
    for part in PARTS[region]:
        hull = cv2.convexHull(np.rint(points[part, :2]).astype(np.int32))
        cv2.fillConvexPoly(shape, hull, 1)
    reach = max(1, round(REACH[region] * unit))
    shape = cv2.dilate(shape, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)))
    if region in NOSE:
        shape &= half(points, region, size)
    soft = cv2.GaussianBlur(shape.astype(np.float32), (0, 0), max(EDGE * unit, 0.5))
    return np.where(soft < 1 / 512, 0, soft).astype(np.float32)


def half(points: np.ndarray, region: str, size: int) -> np.ndarray:
    """The side of the line across the nose on which the upper or the lower face lies. (size, size) uint8, 0 and 1"""
    down = points[152, :2] - points[10, :2]  # from the forehead to the chin
    rows, columns = np.mgrid[:size, :size]
    below = (columns - points[NOSE[region], 0]) * down[0] + (rows - points[NOSE[region], 1]) * down[1] > 0
    return (below if region == "lower" else ~below).astype(np.uint8)


def transplant(
    host: np.ndarray, donor: np.ndarray, host_points: np.ndarray, donor_points: np.ndarray, region: str,
    spared: str | None = None, lit: bool = False,
) -> np.ndarray:  # fmt: skip
    """The host's picture with a region of the donor's face, less another, moved to its place, with a soft edge.

    A similarity moves it. lit: it gets the host's light, see `lit_as_around`. (S, S, 3) uint8 twice, (478, >=2) pixels
    twice -> (S, S, 3) uint8
    """
    similarity, _ = cv2.estimateAffinePartial2D(
        donor_points[RIGID, :2].astype(np.float32), host_points[RIGID, :2].astype(np.float32), method=cv2.LMEDS
    )
    if similarity is None:
        return host.copy()
    points = donor_points[:, :2] @ similarity[:, :2].T + similarity[:, 2]
    centres = similarity.copy()  # a pixel's centre is at +0.5 in the points' coordinates, at +0 in OpenCV's
    centres[:, 2] += similarity[:, :2] @ [0.5, 0.5] - 0.5
    size = len(host)
    moved = cv2.warpAffine(donor, centres, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    share = np.maximum(region_mask(host_points, region, size), region_mask(points, region, size))
    if spared:
        share = share * (1 - region_mask(host_points, spared, size))
    moved = lit_as_around(moved, host, share) if lit else moved.astype(np.float32)
    return np.round(host + share[..., None] * (moved - host)).clip(0, 255).astype(np.uint8)


def lit_as_around(picture: np.ndarray, host: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A picture in the host's light, by what both show around a region, (S, S) in [0, 1].

    Else a mouth of another moment glows in the light of that one. (S, S, 3) uint8 twice -> (S, S, 3) float32
    """
    width, sigma = 2 * round(RING * len(host)) + 1, RING * len(host) / 2
    grown = cv2.dilate(share, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    gain, shift = colour_difference(picture, host, cv2.GaussianBlur(grown, (0, 0), sigma))
    return picture * gain + shift


def network_landmarks() -> Landmarks:
    """Landmarks of crops by the network of ours. Raises WeightsError."""
    from dpe_cli.landmark_net import NetworkLandmarker  # torch: only when a region is asked for

    landmarker = NetworkLandmarker()

    def dense(crop: np.ndarray) -> np.ndarray | None:
        face = landmarker.detect(crop)
        return None if face is None else face.points

    return dense
