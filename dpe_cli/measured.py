"""Motion codes that are measured: what the landmark network sees of a face, in the coordinates of `motion_space`.

Our weights learnt their 20 coordinates from landmarks, on few people, so of a new face the landmark network tells them
better than the encoder, which has to know everything else of a picture too. The paper's networks stay as they are: a
code's meaning is the same, whoever reads it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpe_cli.factors import SPACE
from dpe_cli.landmark_net import CONFIDENT, NetworkLandmarker
from dpe_cli.landmarks import FaceShape
from dpe_cli.motion_space import COORDINATES, MotionSpace, normalise

LIDS = COORDINATES["lids"]
SHUT, AJAR = -1.6, -0.9  # of the lids' coordinates: blendshape eyeBlink at 0.45 and 0.25
SURE = 0.8  # confidence from which landmarks alone count; from CONFIDENT on they count more and more


class MeasuredCodes:
    """Reads motion coordinates of crops by the landmark network.

    weights: of the DPE networks; their motion-space.json beside them says what the coordinates mean.
    Raises WeightsError where the landmark network is missing.
    """

    def __init__(self, weights: Path, device: str = "cpu"):
        self.landmarks = NetworkLandmarker(device=device, passes=1)
        self.space = MotionSpace.load(weights.parent / SPACE)

    def improve(self, crops: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 and what the encoder reads of them (N, 20) -> (N, 20) float32

        Where the landmark network doubts that there is a face, the encoder's word counts.
        """
        faces = self.landmarks.detect_batch(crops)
        seen = [row for row, face in enumerate(faces) if face is not None]
        if not seen:
            return codes
        found = self.read([faces[row] for row in seen], crops.shape[1])
        trust = [(faces[row].confidence - CONFIDENT) / (SURE - CONFIDENT) for row in seen]
        trust = np.clip(trust, 0, 1)[:, None].astype(np.float32)
        result = codes.copy()
        result[seen] += trust * (found - codes[seen])
        return result

    def read(self, faces: Sequence[FaceShape], size: int) -> np.ndarray:
        """The coordinates of faces found in crops of a size in pixels. -> (N, 20) float32"""
        points, blendshapes = (np.stack([getattr(face, name) for face in faces]) for name in ("points", "blendshapes"))
        shape, scale, rotation, centre = normalise(points, self.space.template)
        pose = MotionSpace.pose(scale, rotation, centre[:, :2], size)
        return np.concatenate([pose, self.space.expression(shape, blendshapes)], 1)


def drawable(asked: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The codes asked for, less what cannot be drawn: eyes that the source keeps shut are not opened.

    There is no iris in the picture, and warping the lids aside smears them over the eye. Closing is not limited.
    asked, own: (N, 20) measured codes. -> (N, 20)
    """
    open_by = np.clip((own[:, LIDS] - SHUT) / (AJAR - SHUT), 0, 1)
    open_by = open_by * open_by * (3 - 2 * open_by)  # smooth in time
    result = asked.copy()
    result[:, LIDS] -= (1 - open_by) * np.maximum(asked[:, LIDS] - own[:, LIDS], 0)
    return result
