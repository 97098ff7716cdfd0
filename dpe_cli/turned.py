"""Heads that turn, put right once the generators have drawn them.

The pose generator's flows bend a face softly and turn it less far than asked. The landmarks know the head's depth:
their mesh, turned, carries the very pixels of the face to where they are to be. What the source hides of the far cheek
is taken from the near one, mirrored. Inside of the face this is what is shown; hair, neck and background stay as drawn,
with a soft edge between. Not part of the paper.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from dpe_cli.landmarks import FaceShape
from dpe_cli.mesh import AWAY, Mesh, dense_map, warp
from dpe_cli.motion_space import COORDINATES, POSE_DIM, POSE_SCALE, MotionSpace, mirror_permutation
from dpe_cli.parts import Posed
from dpe_cli.retouch import asked_for, outlined

# Of masks, which are of the size of the flows, in pixels: holes that are closed, how far from the face's outline and
# from what nobody shows the mesh is shown, the sigma of the edge there, and of the edge of what is mirrored.
HOLE, INSIDE, EDGE, SEAM = 2, 3, 2.0, 1.5


class Turner:
    """Turns faces of crops. basis: (14, 478, 3) of `Retouch`, how landmarks move with the expression."""

    def __init__(self, space: MotionSpace, basis: np.ndarray):
        self.space, self.basis = space, basis
        self.mesh, self.mirror = Mesh(space.template), mirror_permutation(space.template)

    def __call__(
        self, pictures: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        pose: np.ndarray, expression: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Drawn crops whose faces are the pictures', turned; as drawn where there is no face, and where no head turns.

        pictures, drawn: (N, S, S, 3) uint8, before and after the pose generator; faces: of the source's crops; own,
        pose: (N, 20), the source's codes, and those whose pose is asked for; expression: (N, 20), those whose
        expression the pictures have, None for the source's. -> (N, S, S, 3) uint8
        """
        result = drawn.copy()
        for row, face in enumerate(faces):
            strength = asked_for((pose - own)[row, COORDINATES["turn"]])
            if face is None or not strength:
                continue
            code = own[row] if expression is None else expression[row]
            before, shaped = outlined(face, code[POSE_DIM:], self.space, self.basis)
            turned, share = self.turn(pictures[row], before if expression is None else shaped, pose[row, :POSE_DIM])
            mixed = drawn[row] + strength * share[..., None] * (turned.astype(np.float32) - drawn[row])
            result[row] = np.rint(mixed)
        return result

    def turn(self, picture: np.ndarray, face: Posed, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A face with the pose coordinates (6,) of a motion code: the picture, and where it is to be shown.

        picture: (S, S, 3) uint8, in which the face is. -> (S, S, 3) uint8, (S, S) float32 in [0, 1]
        """
        size, sides = float(len(picture)), picture.shape[1::-1]
        after, mirrored = posed_as(face, pose, size), face.points[self.mirror]
        place = self.mesh.locate(after, size)
        shown = self.mesh.facing(place, after, face.points)
        borrowed = (shown == AWAY) & (self.mesh.facing(place, after, mirrored * [-1, 1, 1]) == 1)
        turned = warp(picture, dense_map(place, after, face.points, size), size)
        if borrowed.any():
            other = warp(picture, dense_map(place, after, mirrored, size), size)
            share = cv2.resize(cv2.GaussianBlur(borrowed.astype(np.float32), (0, 0), SEAM), sides)[..., None]
            turned = np.rint(turned + share * (other.astype(np.float32) - turned)).astype(np.uint8)
        return turned, cv2.resize(inner((shown == 1) | borrowed), sides)


def inner(known: np.ndarray) -> np.ndarray:
    """The inside of a mask (R, R) bool, softly. -> (R, R) float32 in [0, 1]"""
    closed = cv2.morphologyEx(known.astype(np.uint8), cv2.MORPH_CLOSE, disc(HOLE))
    eroded = cv2.erode(closed, disc(INSIDE), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return cv2.GaussianBlur(eroded.astype(np.float32), (0, 0), EDGE, borderType=cv2.BORDER_CONSTANT)


def disc(radius: int) -> np.ndarray:
    """For OpenCV's morphology."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def posed_as(face: Posed, pose: np.ndarray, size: float) -> np.ndarray:
    """The points of a face (478, 3) with the pose coordinates (6,) of a motion code, in a crop of a size in pixels."""
    *angles, scale, x, y = pose * POSE_SCALE
    rotation = Rotation.from_euler("YXZ", angles, degrees=True).as_matrix()
    place = (np.array([x, y]) + 0.5) * size
    return 2.0**scale * size / 3 * face.shape @ rotation.T + [*place, face.translation[2]]
