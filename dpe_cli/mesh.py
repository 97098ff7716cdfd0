"""A mesh over the landmarks of a face: which triangle a pixel lies in, where it comes from in another picture."""

from typing import NamedTuple

import cv2
import numpy as np
from scipy.spatial import Delaunay

from dpe_cli.landmarks import EYES

FLOW_SIZE = 128  # resolution of the dense flows: at half of it, closing lids are gone
AWAY = 0.25  # weight of what the other picture does not show: a little, or nothing says what to draw there


def _border_anchors(size: float) -> np.ndarray:
    """Points around the picture that never move, so that displacements fall off towards the border. (28, 2)"""
    steps = np.linspace(-0.02, 1.02, 8) * size
    low, high = np.full(8, steps[0]), np.full(8, steps[-1])
    ring = [np.c_[steps, low], np.c_[steps, high], np.c_[low, steps][1:-1], np.c_[high, steps][1:-1]]
    return np.concatenate(ring)


class Place(NamedTuple):
    """Where in a mesh the pixels of a picture lie, R*R of them."""

    index: np.ndarray  # (R*R,) triangle
    nodes: np.ndarray  # (R*R, 3) its corners
    weights: np.ndarray  # (R*R, 3) barycentric


class Mesh:
    """Triangles over the landmarks and a ring of border anchors; draws which triangle each pixel of a face lies in."""

    def __init__(self, template: np.ndarray):
        side = 3.2  # the crops are about three times as wide as the outer eye corners are apart
        nodes = np.concatenate([template[:, :2], _border_anchors(side) - side / 2])
        self.template = template
        self.triangles = Delaunay(nodes).simplices.astype(np.int32)
        ring = (self.triangles >= len(template)).any(1)
        self.triangles = np.concatenate([self.triangles[ring], self.triangles[~ring]])
        self.ring = int(ring.sum())

    def locate(self, points: np.ndarray, size: float, resolution: int = FLOW_SIZE) -> Place:
        """Triangle and barycentric weights of each pixel's centre, nearest surface on top.

        points: (478, 3) of the face in pixels of a `size` crop.
        """
        nodes = np.concatenate([points[:, :2], _border_anchors(size)])
        depth = points[:, 2][self.triangles[self.ring :]].mean(1)
        order = np.concatenate([np.arange(self.ring), self.ring + np.argsort(-depth)])  # far ones first
        fixed = np.round((nodes * (resolution / size) - 0.5) * 256).astype(np.int32)
        index = np.zeros((resolution, resolution), np.int32)
        for number, corners in zip(order.tolist(), fixed[self.triangles[order]], strict=True):
            cv2.fillConvexPoly(index, corners, number, shift=8)
        triangles = self.triangles[index.ravel()]
        grid = centres(resolution, size).reshape(-1, 2)
        a, b, c = (nodes[triangles[:, k]] for k in range(3))
        one, two, rest = b - a, c - a, grid - a
        area = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]
        area = np.where(np.abs(area) < 1e-6, 1e-6, area)
        v = (rest[:, 0] * two[:, 1] - rest[:, 1] * two[:, 0]) / area
        w = (one[:, 0] * rest[:, 1] - one[:, 1] * rest[:, 0]) / area
        # A pixel on an edge may lie a little outside of the triangle drawn there, far outside of it if that is thin.
        weights = np.clip(np.stack([1 - v - w, v, w], 1), 0, 1)
        return Place(index.ravel(), triangles, weights / weights.sum(1, keepdims=True))

    def facing(self, place: Place, drawn: np.ndarray, other: np.ndarray) -> np.ndarray:
        """1 where another picture of a face shows what is drawn in this one, AWAY where it is turned away, 0 off it.

        place: what `locate` says of this picture; drawn, other: (478, >=2) the points in both. -> (R, R) float32
        """
        # Nearly edge on, a few pixels of the other picture would be drawn out to many.
        seen = np.where(self.ratios(drawn, other) > 0.3, 1, AWAY)
        seen[: self.ring] = 0
        side = round(len(place.index) ** 0.5)
        return seen[place.index].reshape(side, side).astype(np.float32)

    def ratios(self, drawn: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The area of each triangle in another picture over that in this one, negative from behind. (triangles,)"""
        here, there = (_areas(points, self.triangles) for points in (drawn, other))
        return np.sign(here) * there / np.maximum(np.abs(here), 1e-6)


def _areas(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Twice the areas of triangles (N, 3) of points, negative for those that are seen from behind. (N,)"""
    nodes = np.concatenate([points[:, :2], np.zeros((28, 2))])
    one, two = (nodes[triangles[:, k]] - nodes[triangles[:, 0]] for k in (1, 2))
    return one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]


def dense_map(
    place: Place,
    target: np.ndarray,
    origin: np.ndarray,
    size: float,
    resolution: int = FLOW_SIZE,
) -> np.ndarray:
    """Where each pixel of the target picture comes from: piecewise linear between landmarks, still at the border.

    place: what `Mesh.locate` says of the target's points; target, origin: (478, >=2) the same points in both pictures.
    Returns (resolution, resolution, 2): x, y in the origin, pixels of a `size` crop, for each centre of a target pixel.
    """
    shift = np.concatenate([origin[:, :2] - target[:, :2], np.zeros((28, 2))])
    moved = np.einsum("nk,nkc->nc", place.weights, shift[place.nodes])
    moved = moved.astype(np.float32).reshape(resolution, resolution, 2)
    # Triangles that fold over where the head turns away give single wild pixels. Eyes are spared: a median of their few
    # pixels keeps a fifth of what lids move.
    eyes = np.maximum(*(polygon(target, eye, size, resolution) for eye in EYES))
    eyes = cv2.dilate(eyes, np.ones((3, 3), np.uint8))[..., None] > 0
    moved = np.where(eyes, moved, cv2.medianBlur(moved, 5))
    return (centres(resolution, size) + moved).astype(np.float32)


def centres(resolution: int, size: float) -> np.ndarray:
    """The dense map that moves nothing: (resolution, resolution, 2) pixels of a `size` crop."""
    along = (np.arange(resolution) + 0.5) * size / resolution
    return np.stack(np.meshgrid(along, along), -1)


def places_of(where: np.ndarray, side: int, size: float) -> np.ndarray:
    """Places of a dense map (R, R, >=2) of a `size` crop as OpenCV wants them: (side, side, 2), pixels from 0 on."""
    xy = np.ascontiguousarray(where[..., :2])
    return cv2.resize(xy, (side, side), interpolation=cv2.INTER_LINEAR) * (side / size) - 0.5


def bent(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) whose pixels come from other places (H', W', 2). -> (H', W', 3)"""
    return cv2.remap(image, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def warp(image: np.ndarray, where: np.ndarray, size: float) -> np.ndarray:
    """Samples an (H, W, 3) picture by a dense map in pixels of a `size` crop."""
    return bent(image, places_of(where, image.shape[0], size))


def polygon(points: np.ndarray, indices: list[int], size: float, resolution: int) -> np.ndarray:
    """The inside of some points of a face, 255. -> (R, R) uint8"""
    mask = np.zeros((resolution, resolution), np.uint8)
    cv2.fillPoly(mask, [np.round(points[indices, :2] * (resolution / size)).astype(np.int32)], 255)
    return mask
