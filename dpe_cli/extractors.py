"""The networks that evaluation measures with, each from the user's file and behind a small interface.

None of them has part in an edit. Landmarks are `landmarks.Landmarker`, or whatever else fits `Landmarks`; identity is
`detectors.ArcFace`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dpe_cli.errors import WeightsError
from dpe_cli.landmarks import FaceShape

LPIPS_BATCH = 8
LPIPS_NETWORKS = {"alex": "alexnet", "vgg": "vgg16"}  # the name in the weights of LPIPS, that in the features


class Landmarks(Protocol):
    """Dense landmarks and blendshapes of the face in a picture."""

    name: str

    def detect(self, rgb: np.ndarray) -> FaceShape | None:
        """Of an (H, W, 3) uint8 picture; None where no face is found."""

    def close(self) -> None:
        """Frees the model."""


class Identity(Protocol):
    """Tells people apart."""

    name: str

    def embed(self, rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Unit vector (K,) of the face at five points (5, 2) of an (H, W, 3) uint8 picture."""


class PictureDistance(Protocol):
    """How different two pictures look."""

    name: str

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 twice -> (N,) float, 0 for equal ones"""


@dataclass(frozen=True)
class Extractors:
    """What there is to measure with; None where the user named no model."""

    landmarks: Landmarks | None = None
    identity: Identity | None = None
    lpips: PictureDistance | None = None


class Lpips:
    """LPIPS 0.1 from a folder with the classifier's features and the published layer weights (safetensors).

    network: alex or vgg. Raises WeightsError if the folder does not hold them.
    """

    def __init__(self, folder: Path, network: str = "alex", device: str = "cpu"):
        from safetensors.torch import load_file

        from dpe_cli.device import choose_device
        from dpe_cli.models import LPIPS

        states = []
        for pattern in (f"{LPIPS_NETWORKS[network]}_features*.safetensors", f"lpips_v0.1_{network}_lin.safetensors"):
            found = sorted(folder.glob(pattern))
            if not found:
                raise WeightsError(f"{folder} holds no {pattern}", "name the folder of LPIPS's weights with --lpips")
            states.append(load_file(str(found[0])))
        self.device = choose_device(device)
        self.network = LPIPS(*states).eval().to(self.device)
        self.name = f"LPIPS 0.1, {LPIPS_NETWORKS[network]}"

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 twice -> (N,) float"""
        import torch

        from dpe_cli.engine import to_tensor

        with torch.inference_mode():
            parts = [
                self.network(*(to_tensor(pictures[start : start + LPIPS_BATCH], self.device) for pictures in (a, b)))
                for start in range(0, len(a), LPIPS_BATCH)
            ]
            return torch.cat(parts).cpu().numpy()
