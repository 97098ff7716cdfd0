"""Networks of the user's that help to paste back: face parsing and face enhancement, ONNX files named by their path.

They run in onnxruntime on the CPU. Pictures go in as (1, 3, H, W) float32 RGB; a file with a fixed size gets that size.
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dpe_cli.detectors import onnx_session
from dpe_cli.errors import WeightsError

PLUG_SIZE = 512  # of a file that takes any size: what these networks are trained with
PARSING_CLASSES = 19
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which BiSeNet is trained
FIDELITY = 0.7  # what CodeFormer's second input is given: 1 stays nearest to the picture, 0 invents most


class PictureNetwork:
    """A network from an ONNX file that takes one picture. `option` names the command's option, for messages."""

    def __init__(self, path: Path, option: str):
        if not Path(path).is_file():
            raise WeightsError(f"{path}: no such file", f"name an ONNX file with {option}")
        self.path, self.option = path, option
        try:
            self.session = onnx_session(str(path))
        except Exception as error:  # onnxruntime's own kinds of error have no common ancestor
            raise self.unfit("cannot be read as an ONNX network") from error
        inputs = self.session.get_inputs()
        pictures = [each for each in inputs if len(each.shape) == 4]
        if not pictures or pictures[0].type != "tensor(float)":
            raise self.unfit("takes no float32 picture")
        self.picture = pictures[0].name
        self.more = {each.name: each.type for each in inputs if each.name != self.picture}
        side = pictures[0].shape[2]
        self.size = side if isinstance(side, int) else PLUG_SIZE

    def run(self, picture: np.ndarray) -> np.ndarray:
        """(size, size, 3) float32, already of the range the network wants -> (C, H, W), its first output."""
        feed: dict[str, Any] = {self.picture: np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32)}
        for name, kind in self.more.items():
            feed[name] = np.array([FIDELITY], np.float64 if kind == "tensor(double)" else np.float32)
        try:
            output = self.session.run(None, feed)[0]
        except Exception as error:
            raise self.unfit("does not run on one picture") from error
        return output.reshape(output.shape[-3:])

    def unfit(self, why: str) -> WeightsError:
        """The error for a file that is not what the option wants."""
        return WeightsError(f"{self.path} {why}", f"name another ONNX file with {self.option}")


class FaceParser:
    """Face parsing of the BiSeNet kind: 19 scores a pixel, classes as in CelebAMask-HQ. Raises WeightsError."""

    def __init__(self, path: Path):
        self.network = PictureNetwork(path, "--parsing")

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        """(S, S, 3) uint8 -> (S, S) uint8, the class of each pixel."""
        side = self.network.size
        picture = cv2.resize(crop, (side, side), interpolation=cv2.INTER_LINEAR)
        scores = self.network.run((picture / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION))
        if len(scores) != PARSING_CLASSES:
            raise self.network.unfit(f"gives {len(scores)} scores a pixel, not {PARSING_CLASSES}")
        labels = scores.argmax(0).astype(np.uint8)
        return cv2.resize(labels, crop.shape[1::-1], interpolation=cv2.INTER_NEAREST)


class Enhancer:
    """Face enhancement of the GFPGAN or CodeFormer kind: a picture in [-1, 1] in and out. Raises WeightsError."""

    def __init__(self, path: Path):
        self.network = PictureNetwork(path, "--enhancer")
        self.size = self.network.size

    def __call__(self, face: np.ndarray) -> np.ndarray:
        """(size, size, 3) uint8 -> the same shape and type, enhanced."""
        better = self.network.run(face / np.float32(127.5) - 1)
        if better.shape != (3, self.size, self.size):
            raise self.network.unfit(f"gives {better.shape}, not a picture of {self.size} by {self.size}")
        return np.rint((better.transpose(1, 2, 0).clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
