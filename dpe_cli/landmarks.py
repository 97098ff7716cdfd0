"""Dense face landmarks (MediaPipe's 478 points and 52 blendshapes) and what is measured on them.

Needed by training and evaluation only; `pip install dpe-cli[train]` brings MediaPipe, the model file is the user's.
Coordinates: x, y in pixels of the picture, z in the same unit, growing away from the camera.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpe_cli.errors import InputError

BLENDSHAPES = (
    "_neutral", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight",
    "cheekPuff", "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft",
    "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight",
    "eyeLookUpLeft", "eyeLookUpRight", "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight",
    "jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose", "mouthDimpleLeft", "mouthDimpleRight",
    "mouthFrownLeft", "mouthFrownRight", "mouthFunnel", "mouthLeft", "mouthLowerDownLeft",
    "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker", "mouthRight", "mouthRollLower",
    "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft", "mouthSmileRight",
    "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight", "noseSneerLeft",
    "noseSneerRight",
)  # fmt: skip

# Points that hardly move with the expression: forehead, temples, nose, eye corners, cheekbones.
RIGID = [10, 338, 297, 332, 284, 251, 389, 356, 454, 234, 127, 162, 21, 54, 103, 67, 109, 151, 9, 8, 168, 6, 197, 195,
         5, 4, 1, 33, 133, 362, 263, 116, 345, 123, 352, 48, 278]  # fmt: skip
FACE_OVAL = [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176,
             149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109]  # fmt: skip
LIPS_OUTER = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185]
LIPS_INNER = [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191]
# Left and right as seen in the picture: the first is on the picture's left.
EYES = ([33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246],
        [362, 382, 381, 380, 374, 373, 390, 249, 263, 466, 388, 387, 386, 385, 384, 398])  # fmt: skip
BROWS = [70, 63, 105, 66, 107, 55, 65, 52, 53, 46, 300, 293, 334, 296, 336, 285, 295, 282, 283, 276]
LIDS = (((160, 144), (159, 145), (158, 153)), ((385, 380), (386, 374), (387, 373)))
CORNERS = ((33, 133), (362, 263))
IRIS_CENTRES = (468, 473)


@dataclass(frozen=True)
class FaceShape:
    points: np.ndarray  # (478, 3) float32, pixels
    blendshapes: np.ndarray  # (52,) float32 in [0, 1], in the order of BLENDSHAPES
    rotation: np.ndarray | None = None  # (3, 3) of the head, as `head_angles` takes it; None: the model has none
    visibility: np.ndarray | None = None  # (478,) float32 in [0, 1]; None where the model does not tell
    confidence: float = 1.0  # in [0, 1]: that this is a face


class Landmarker:
    """MediaPipe's FaceLandmarker on single pictures.

    Raises:
        InputError: mediapipe is not installed or the model file is missing.
    """

    name = "MediaPipe FaceLandmarker"

    def __init__(self, model: Path):
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise InputError("mediapipe is not installed", "pip install 'dpe-cli[train]'") from error
        if not Path(model).is_file():
            raise InputError(f"{model}: no such landmark model", "name MediaPipe's face_landmarker.task")
        self._mediapipe = mediapipe
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)),
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
            num_faces=1,
            min_face_detection_confidence=0.3,
        )
        self._landmarker = vision.FaceLandmarker.create_from_options(options)

    def detect(self, rgb: np.ndarray) -> FaceShape | None:
        """The most prominent face of an (H, W, 3) uint8 RGB picture, or None."""
        height, width = rgb.shape[:2]
        image = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(rgb))
        result = self._landmarker.detect(image)
        if not result.face_landmarks:
            return None
        points = np.array([[p.x * width, p.y * height, p.z * width] for p in result.face_landmarks[0]], np.float32)
        blendshapes = np.array([b.score for b in result.face_blendshapes[0]], np.float32)
        matrix = np.asarray(result.facial_transformation_matrixes[0])[:3, :3]  # y upwards, z towards the camera
        rotation = matrix / np.cbrt(np.linalg.det(matrix)) * np.outer([1, -1, -1], [1, -1, -1])
        return FaceShape(points, blendshapes, rotation.astype(np.float32))

    def detect_batch(self, pictures: Iterable[np.ndarray]) -> list[FaceShape | None]:
        """The same for several pictures, one by one."""
        return [self.detect(picture) for picture in pictures]

    def close(self) -> None:
        """Frees the model."""
        self._landmarker.close()


def align(points: np.ndarray, template: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Similarity that takes a template face to a measured one: points ~ scale * template @ rotation.T + translation.

    Only the points in RIGID decide (Umeyama's least squares). points, template: (478, 3).
    Returns scale, rotation (3, 3), translation (3,).
    """
    target, model = points[RIGID].astype(np.float64), template[RIGID].astype(np.float64)
    target_mean, model_mean = target.mean(0), model.mean(0)
    covariance = (target - target_mean).T @ (model - model_mean)
    u, singular, vt = np.linalg.svd(covariance)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * sign) @ vt
    scale = float((singular * sign).sum() / ((model - model_mean) ** 2).sum())
    return scale, rotation, target_mean - scale * rotation @ model_mean


def head_angles(rotation: np.ndarray) -> np.ndarray:
    """Yaw, pitch and roll in degrees of rotation matrices (..., 3, 3) -> (..., 3); zero for a frontal face."""
    yaw = np.arctan2(rotation[..., 0, 2], rotation[..., 2, 2])
    pitch = np.arcsin(np.clip(-rotation[..., 1, 2], -1, 1))
    roll = np.arctan2(rotation[..., 1, 0], rotation[..., 1, 1])
    return np.degrees(np.stack([yaw, pitch, roll], -1))


def rotation_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees of the one turn that takes one head rotation to the other. (..., 3, 3) twice, broadcast -> (...)"""
    cosine = (np.einsum("...ij,...ij->...", a, b) - 1) / 2
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def five_points(points: np.ndarray) -> np.ndarray:
    """Eyes, nose and mouth corners as face detectors give them, left first in the picture. (478, >=2) -> (5, 2)"""
    eyes = [points[list(corners), :2].mean(0) for corners in CORNERS]
    return np.stack([*eyes, *points[[4, 61, 291], :2]])


def _distance(points: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.linalg.norm(points[..., a, :] - points[..., b, :], axis=-1)


def mouth_opening(points: np.ndarray) -> np.ndarray:
    """Gap between the inner lips over the distance of the outer eye corners. (..., 478, 3) -> (...)."""
    return _distance(points, 13, 14) / _distance(points, 33, 263)


def eye_openings(points: np.ndarray) -> np.ndarray:
    """Lid gap over eye width for both eyes, picture's left first. (..., 478, 3) -> (..., 2)."""
    return np.stack(
        [
            np.mean([_distance(points, a, b) for a, b in lids], axis=0) / _distance(points, *corners)
            for lids, corners in zip(LIDS, CORNERS, strict=True)
        ],
        -1,
    )


def gaze(points: np.ndarray) -> np.ndarray:
    """Iris centre relative to the eye's middle, in eye widths, mean of both eyes. (..., 478, 3) -> (..., 2) as x, y."""
    offsets = []
    for iris, (a, b) in zip(IRIS_CENTRES, CORNERS, strict=True):
        middle = (points[..., a, :2] + points[..., b, :2]) / 2
        offsets.append((points[..., iris, :2] - middle) / _distance(points, a, b)[..., None])
    return np.mean(offsets, axis=0)
