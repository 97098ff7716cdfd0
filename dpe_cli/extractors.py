"""The networks that evaluation measures with, each from the user's file and behind a small interface.

None of them has part in an edit. Landmarks are `landmarks.Landmarker`, or whatever else fits `Landmarks`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from dpe_cli.detectors import onnx_session
from dpe_cli.errors import WeightsError
from dpe_cli.landmarks import FaceShape

# Where ArcFace networks expect eyes, nose and mouth corners in their 112 x 112 input (Deng and others, CVPR 2019).
ARCFACE_SIZE = 112
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
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


class ArcFace:
    """A face recognition network in ONNX that takes ArcFace's aligned 112 x 112 crops.

    Raises WeightsError unless `model` is one, or a folder that holds one.
    """

    def __init__(self, model: Path):
        candidates = sorted(model.rglob("*.onnx")) if model.is_dir() else [model]
        for path in candidates:
            session = self.open(path)
            if session is not None:
                self.session, self.name = session, path.name
                self.raw = scales_itself(path)
                return
        raise WeightsError(f"{model} holds no face recognition network", "name one (ONNX, 112 x 112) with --identity")

    @staticmethod
    def open(path: Path) -> Any:
        """The session of a network with the right input and a single output, else None."""
        if not path.is_file():
            return None
        try:
            session = onnx_session(str(path))
        except Exception as error:  # onnxruntime has a dozen for it
            raise WeightsError(f"{path} cannot be read as a model", "get the file anew") from error
        shape = session.get_inputs()[0].shape
        fits = len(session.get_outputs()) == 1 and list(shape[1:]) == [3, ARCFACE_SIZE, ARCFACE_SIZE]
        return session if fits else None

    def embed(self, rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Unit vector (K,) of the face at five points (5, 2): eyes, nose, mouth corners, left first in the picture."""
        aligned = cv2.warpAffine(rgb, similarity(points, ARCFACE_POINTS), (ARCFACE_SIZE, ARCFACE_SIZE))
        levels = aligned.astype(np.float32)
        batch = (levels if self.raw else (levels - 127.5) / 127.5).transpose(2, 0, 1)[None]
        vector = self.session.run(None, {self.session.get_inputs()[0].name: batch})[0].ravel()
        return vector / max(float(np.linalg.norm(vector)), 1e-12)


def scales_itself(model: Path) -> bool:
    """Whether a network begins by bringing levels of 0 to 255 to its own scale, as those that came from MXNet do."""
    import onnx

    return onnx.load(str(model)).graph.node[0].op_type in ("Sub", "Mul", "Div")


def similarity(origin: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix that scales, turns and shifts points (N, 2) onto others, by least squares."""
    a, b = origin @ [1, 1j], target @ [1, 1j]  # as complex numbers, scale and turn are one factor
    factor = np.vdot(a - a.mean(), b - b.mean()) / np.vdot(a - a.mean(), a - a.mean())
    shift = b.mean() - factor * a.mean()
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])


class Lpips:
    """LPIPS 0.1 from a folder with the classifier's features and the published layer weights (safetensors).

    network: alex or vgg. Raises WeightsError if the folder does not hold them.
    """

    def __init__(self, folder: Path, network: str = "alex", device: str = "cpu"):
        from safetensors.torch import load_file

        from dpe_cli.engine import choose_device
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
