"""The landmark network at work: landmarks of pictures in the form of `landmarks.Landmarker`, without MediaPipe.

Points are MediaPipe's, so all that is measured on them (`landmarks.mouth_opening`, `motion_space.normalise`, ...) works
on both. The network sees a crop; a detector finds where to cut it, or the picture is a crop of a face already.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dpe_cli.crop import cut
from dpe_cli.dataset import face_at
from dpe_cli.errors import InputError
from dpe_cli.face import Box, FaceDetector, crop_box
from dpe_cli.landmarks import BROWS, EYES, LIPS_INNER, LIPS_OUTER, FaceShape
from dpe_cli.models import LandmarkNet, Landmarks
from dpe_cli.weights import LANDMARKS, load_landmarks

CONFIDENT = 0.5  # below it, a crop counts as no face


def load_net(weights: str | Path = LANDMARKS, device: str = "cpu") -> LandmarkNet:
    """The landmark network, fixed: its weights take no gradients, its input may. Raises WeightsError."""
    return load_landmarks(weights).networks().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def framing(points: np.ndarray) -> Box:
    """The crop that the tool would cut around a face with these landmarks (478, >=2); same pixels."""
    return crop_box(face_at(points))


def to_pixels(points: np.ndarray, box: Box) -> np.ndarray:
    """Points (478, 3) with -1 and 1 at a crop's edges, in pixels of the picture that the crop was cut from."""
    half = box.width / 2
    return (points * half + [*box.centre, 0]).astype(np.float32)


class NetworkLandmarker:
    """Landmarks by the network of ours, with the interface of `landmarks.Landmarker`.

    detector: finds the face in whole pictures, the largest counts; None takes each picture for a crop of a face.
    passes: 2 looks again at the crop that the first look's points ask for, which is how training framed its faces.
    Rotations are against the network's mean face, as `motion_space.normalise` measures them; MediaPipe's own have
    another zero. Raises WeightsError for weights that are missing, damaged or of another network.
    """

    name = "landmark network"

    def __init__(
        self,
        weights: str | Path = LANDMARKS,
        detector: FaceDetector | None = None,
        passes: int = 2,
        device: str = "cpu",
    ):
        self.net = load_net(weights, device)
        self.detector, self.passes, self.device = detector, passes, device

    def detect(self, rgb: np.ndarray) -> FaceShape | None:
        """The largest face of an (H, W, 3) uint8 RGB picture, or None."""
        return self.detect_batch([rgb])[0]

    def detect_batch(self, pictures: Sequence[np.ndarray]) -> list[FaceShape | None]:
        """The same for several pictures, which need not be of one size: the network sees them at once."""
        boxes = [self.locate(picture) for picture in pictures]
        found: list[FaceShape | None] = [None] * len(pictures)
        for _ in range(self.passes):
            places = [place for place, box in enumerate(boxes) if box is not None]
            if not places:
                break
            result = self.look([pictures[place] for place in places], [boxes[place] for place in places])
            for row, place in enumerate(places):
                found[place] = self.face(result, row, boxes[place])
                boxes[place] = None if found[place] is None else framing(found[place].points)
        return found

    def locate(self, rgb: np.ndarray) -> Box | None:
        """Where to look first: the crop around the largest face, or the picture's middle square without a detector."""
        if self.detector is None:
            height, width = rgb.shape[:2]
            return Box.square(width / 2, height / 2, min(height, width))
        faces = self.detector.detect(rgb)
        return crop_box(max(faces, key=lambda face: face.box.width * face.box.height)) if faces else None

    @torch.inference_mode()
    def look(self, pictures: Sequence[np.ndarray], boxes: Sequence[Box]) -> Landmarks:
        """What the network says of one crop of each picture; arrays in place of tensors."""
        crops = [cut(picture, box, self.net.config.size)[0] for picture, box in zip(pictures, boxes, strict=True)]
        image = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return Landmarks(*(value.cpu().numpy() for value in self.net(image)))

    @staticmethod
    def face(result: Landmarks, row: int, box: Box) -> FaceShape | None:
        """One crop's face in pixels of its picture; None if the network doubts that there is one."""
        if result.confidence[row] < CONFIDENT:
            return None
        return FaceShape(
            to_pixels(result.points[row], box),
            result.blendshapes[row],
            result.rotation[row],
            result.visibility[row],
            float(result.confidence[row]),
        )

    def close(self) -> None:
        """Nothing to free; `Landmarker` has it."""


class ExpressionFeatures(nn.Module):
    """What the paper's expression loss L_E compares (section 3.3), by our network in place of EMOCA's features.

    Crops (B, 3, S, S) in [-1, 1], framed as the tool frames them, to (B, F): lips, lids, brows and irises in the head's
    own frame, so that the pose does not count, and the blendshapes. Differentiable in the crops.
    """

    POINT_WEIGHT = 5.0  # a blendshape goes from 0 to 1, lips open by a fifth of the eyes' distance

    def __init__(self, net: LandmarkNet):
        super().__init__()
        self.net = net
        self.points = sorted({*LIPS_OUTER, *LIPS_INNER, *EYES[0], *EYES[1], *BROWS, *range(468, 478)})

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        seen = self.net(image)
        return torch.cat([self.POINT_WEIGHT * seen.shape[:, self.points].flatten(1), seen.blendshapes], 1)


class ForeignFeatures(nn.Module):
    """An expression network of the user's, a TorchScript file: (B, 3, 224, 224) RGB in [0, 1] to (B, F).

    Raises InputError for a file that is none.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is old, and what such networks come in
                self.net = torch.jit.load(str(path), map_location="cpu").eval()
            for parameter in self.net.parameters():
                parameter.requires_grad_(False)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{path} is no TorchScript network", "export yours with torch.jit.trace") from error

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(image.float(), size=(224, 224), mode="bilinear", align_corners=False)
        return self.net((small.clamp(-1, 1) + 1) / 2)


def expression_network(path: Path | None) -> nn.Module:
    """The network for L_E: that of a TorchScript file, by default ours."""
    return ForeignFeatures(path) if path else ExpressionFeatures(load_net())
