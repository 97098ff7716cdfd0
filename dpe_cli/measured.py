"""Motion codes that are measured: what the landmark network sees of a face, in the coordinates of `motion_space`.

Our weights learnt their 20 coordinates from landmarks, on few people, so of a new face the landmark network tells them
better than the encoder, which has to know everything else of a picture too. The reading networks look closer at the
eyes and mend what it says. The paper's networks stay as they are: a code's meaning is the same, whoever reads it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dpe_cli.factors import SPACE
from dpe_cli.landmark_net import CONFIDENT, NetworkLandmarker
from dpe_cli.landmarks import FaceShape
from dpe_cli.motion_space import MOTION_DIM, MotionSpace, normalise
from dpe_cli.reader import Reader

SURE = 0.8  # confidence from which landmarks alone count; from CONFIDENT on they count more and more


class MeasuredCodes:
    """Reads motion coordinates of crops by the landmark network.

    weights: of the DPE networks; their motion-space.json beside them says what the coordinates mean.
    Raises WeightsError where the landmark network or the reading networks are missing.
    """

    def __init__(self, weights: Path, device: str = "cpu"):
        self.landmarks = NetworkLandmarker(device=device, passes=1)
        self.space = MotionSpace.load(weights.parent / SPACE)
        self.reader = Reader(device=device)

    def measure(
        self, crops: np.ndarray, encoder: Callable[[list[int]], np.ndarray]
    ) -> tuple[np.ndarray, list[FaceShape | None]]:
        """Crops (N, S, S, 3) uint8 -> codes (N, 20) float32, and the faces found

        encoder: what the encoder reads of some rows, (n, 20). Its word counts where the landmark network doubts that
        there is a face; only of those is it asked.
        """
        faces = self.landmarks.detect_batch(crops)
        seen = [row for row, face in enumerate(faces) if face is not None]
        codes, trust = np.zeros((len(crops), MOTION_DIM), np.float32), np.zeros((len(crops), 1), np.float32)
        if seen:
            found = self.read([faces[row] for row in seen], crops.shape[1])
            codes[seen] = self.look_closer(crops[seen], [faces[row] for row in seen], found)
            trust[seen, 0] = [(faces[row].confidence - CONFIDENT) / (SURE - CONFIDENT) for row in seen]
        doubted = np.flatnonzero(trust < 1).tolist()
        if doubted:
            read, share = encoder(doubted), trust[doubted].clip(0, 1)
            codes[doubted] = read + share * (codes[doubted] - read)
        return codes, faces

    def face(self, crop: np.ndarray) -> FaceShape | None:
        """Landmarks of a crop (S, S, 3) uint8 in its pixels, None without a face."""
        return self.landmarks.detect(crop)

    def read(self, faces: Sequence[FaceShape], size: int) -> np.ndarray:
        """The coordinates of faces found in crops of a size in pixels. -> (N, 20) float32"""
        return read_codes(faces, size, self.space)

    def look_closer(self, crops: Sequence[np.ndarray], faces: Sequence[FaceShape], codes: np.ndarray) -> np.ndarray:
        """What the reading networks make of coordinates that `read` found in these faces. -> (N, 20) float32"""
        return self.reader.mend(crops, [face.points for face in faces], codes, self.space.template)


def read_codes(faces: Sequence[FaceShape], size: int, space: MotionSpace) -> np.ndarray:
    """Motion coordinates of faces found in crops of a size in pixels. -> (N, 20) float32"""
    points, blendshapes = (np.stack([getattr(face, name) for face in faces]) for name in ("points", "blendshapes"))
    shape, scale, rotation, centre = normalise(points, space.template)
    pose = MotionSpace.pose(scale, rotation, centre[:, :2], size)
    return np.concatenate([pose, space.expression(shape, blendshapes)], 1)
