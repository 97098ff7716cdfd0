"""Turned heads, put right once the generators have drawn them: see `models/retouch.py`.

The mesh over the landmarks carries the source's pixels to where they are to be: a guide. What the source hides of the
far cheek is taken from the near one, mirrored. A network says where the guide is better than what was drawn, and what
else is to be changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from dpe_cli.landmarks import FaceShape
from dpe_cli.mesh import AWAY, Mesh, dense_map, warp
from dpe_cli.motion_space import COORDINATES, POSE_DIM, POSE_SCALE, MotionSpace, mirror_permutation
from dpe_cli.parts import Posed
from dpe_cli.retouch import Retoucher, asked_for, outlined

REACH, EDGE = 0.08, 0.03  # how far around the face a head is put right, and the sigma of the soft edge: crop sides
SMALL = 64  # side of the picture in which this is found, pixels
SOFT = 1.5  # sigma of the edge between the picture's own cheek and the mirrored one, pixels of the flows


@dataclass(frozen=True)
class Guide:
    """picture: (S, S, 3) uint8; cover: (S, S) uint8, 255 where the source shows the face, 128 mirrored, 64 unseen."""

    picture: np.ndarray
    cover: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Where the head is put right: the face and a rim around it, softly. (S, S) float32 in [0, 1]"""
        small = cv2.resize(self.cover, (SMALL, SMALL), interpolation=cv2.INTER_AREA)
        reach = 2 * round(REACH * SMALL) + 1
        grown = cv2.dilate(np.float32(small > 0), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
        soft = cv2.GaussianBlur(grown, (0, 0), EDGE * SMALL, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(soft, self.cover.shape[::-1], interpolation=cv2.INTER_LINEAR)


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
        shown = self.mesh.facing(place, after, before.points)
        mirrored = before.points[self.mirror]
        other = self.mesh.facing(place, after, mirrored * [-1, 1, 1]) == 1
        borrowed = (shown == AWAY) & other
        picture, sides = warp(crop, dense_map(place, after, before.points, size), size), crop.shape[1::-1]
        if borrowed.any():
            share = cv2.resize(cv2.GaussianBlur(borrowed.astype(np.float32), (0, 0), SOFT), sides)[..., None]
            near = warp(crop, dense_map(place, after, mirrored, size), size)
            picture = np.rint(picture + share * (near.astype(np.float32) - picture)).astype(np.uint8)
        cover = np.select([shown == 1, borrowed, shown == AWAY], [255, 128, 64]).astype(np.uint8)
        return Guide(picture, cv2.resize(cover, sides))


def posed_as(face: Posed, pose: np.ndarray, size: float) -> np.ndarray:
    """The points of a face (478, 3) with the pose coordinates (6,) of a motion code, in a crop of a size in pixels."""
    *angles, scale, x, y = pose * POSE_SCALE
    rotation = Rotation.from_euler("YXZ", angles, degrees=True).as_matrix()
    place = (np.array([x, y]) + 0.5) * size
    return 2.0**scale * size / 3 * face.shape @ rotation.T + [*place, face.translation[2]]


class HeadRetoucher:
    """Retouches crops whose heads are turned, with the network of a `Retoucher` that has one."""

    def __init__(self, retoucher: Retoucher):
        self.turner, self.device = Turner(retoucher.space, retoucher.basis), retoucher.device
        self.net = retoucher.nets.head

    def __call__(
        self, crops: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        asked: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Drawn crops, retouched; as they are where there is no face, and where the head is to stay.

        crops, drawn: (N, S, S, 3) uint8, the source's and what the generators made of it; faces: those of the source's
        crops; own, asked: (N, 20), the motion that they have and the one they are to have. -> (N, S, S, 3) uint8
        """
        strengths = [asked_for(change) for change in (asked - own)[:, COORDINATES["turn"]]]
        pairs = enumerate(zip(faces, strengths, strict=True))
        rows = [row for row, (face, strength) in pairs if face is not None and strength]
        result = drawn.copy()
        if rows:
            guides = [self.turner(crops[row], faces[row], asked[row]) for row in rows]
            added = self.added(crops[rows], drawn[rows], guides)
            shares = [strengths[row] * guide.share for row, guide in zip(rows, guides, strict=True)]
            added *= np.stack(shares)[..., None]
            result[rows] = np.rint(np.clip(drawn[rows] + added, 0, 255))
        return result

    @torch.inference_mode()
    def added(self, crops: np.ndarray, drawn: np.ndarray, guides: Sequence[Guide]) -> np.ndarray:
        """What the network adds to drawn crops, in levels. -> (N, S, S, 3) float32"""
        seen = np.stack([np.dstack([guide.picture, guide.cover]) for guide in guides])
        source, made, guided = (
            torch.from_numpy(one).to(self.device).permute(0, 3, 1, 2).float() / 255 for one in (crops, drawn, seen)
        )
        added = self.net(source * 2 - 1, made * 2 - 1, guided)
        return np.ascontiguousarray((added.float() * 127.5).permute(0, 2, 3, 1).cpu().numpy())
