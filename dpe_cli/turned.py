"""A source's face as its landmarks show it in another pose: what a turned head is repaired by, see `models/retouch.py`.

The mesh over the landmarks carries the source's pixels to where they are to be. What the source hides of the far cheek
is taken from the near one, mirrored.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from dpe_cli.landmarks import FaceShape
from dpe_cli.mesh import Mesh, dense_map, warp
from dpe_cli.motion_space import POSE_DIM, POSE_SCALE, MotionSpace, mirror_permutation
from dpe_cli.parts import Posed
from dpe_cli.retouch import outlined

SOFT = 1.5  # sigma of the edge between the picture's own cheek and the mirrored one, pixels of the flows


@dataclass(frozen=True)
class Guide:
    """picture: (S, S, 3) uint8; cover: (S, S) uint8, 255 where the source shows the face, 128 mirrored, 64 unseen."""

    picture: np.ndarray
    cover: np.ndarray


class Turner:
    """Makes guides. basis: (14, 478, 3) of `Retouch`."""

    def __init__(self, space: MotionSpace, basis: np.ndarray):
        self.space, self.basis = space, basis
        self.mesh, self.mirror = Mesh(space.template), mirror_permutation(space.template)

    def __call__(self, crop: np.ndarray, face: FaceShape, asked: np.ndarray) -> Guide:
        """crop: (S, S, 3) uint8, the source's; face: its landmarks; asked: the motion code (20,) that it is to have."""
        size = float(len(crop))
        before, shaped = outlined(face, asked[POSE_DIM:], self.space, self.basis)
        after = posed_as(shaped, asked[:POSE_DIM], size)
        place = self.mesh.locate(after, size)
        pictures, shown = [], []
        for origin, handed in ((before.points, 1), (before.points[self.mirror], -1)):
            pictures.append(warp(crop, dense_map(place, after, origin, size), size))
            shown.append(self.mesh.facing(place, after, origin * [handed, 1, 1]))
        face, own, other = shown[0] > 0, shown[0] == 1, shown[1] == 1
        borrowed = cv2.GaussianBlur((face & ~own & other).astype(np.float32), (0, 0), SOFT)
        cover = np.where(own, 255, np.where(other, 128, 64)) * face
        sides = crop.shape[1::-1]
        share = cv2.resize(borrowed, sides, interpolation=cv2.INTER_LINEAR)[..., None]
        picture = pictures[0] + share * (pictures[1].astype(np.float32) - pictures[0])
        cover = cv2.resize(cover.astype(np.uint8), sides, interpolation=cv2.INTER_LINEAR)
        return Guide(np.rint(picture).astype(np.uint8), cover)


def posed_as(face: Posed, pose: np.ndarray, size: float) -> np.ndarray:
    """The points of a face (478, 3) with the pose coordinates (6,) of a motion code, in a crop of a size in pixels."""
    *angles, scale, x, y = pose * POSE_SCALE
    rotation = Rotation.from_euler("YXZ", angles, degrees=True).as_matrix()
    place = (np.array([x, y]) + 0.5) * size
    return 2.0**scale * size / 3 * face.shape @ rotation.T + [*place, face.translation[2]]
