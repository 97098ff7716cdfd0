"""What is measured on a face to control it: each measure has a unit, a factor of the code and a neutral value.

Measures are taken on the 478 landmarks in the head's own frame, so that the pose does not count, and on blendshapes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dpe_cli.landmarks import BLENDSHAPES, FaceShape, eye_openings, gaze, mouth_opening
from dpe_cli.motion_space import normalise

OPEN, CLOSED = 0.28, 0.08  # lid gap over eye width: median of people's open eyes, and what landmarks say of shut ones
EYE_RADIUS = 0.4  # of an eyeball, in eye widths: 12 mm of 30 mm
AHEAD = -0.08  # iris above the line of the eye's corners, eye widths, of a look ahead: the median of people


@dataclass(frozen=True)
class Measure:
    """One number that can be read off a face."""

    name: str
    factor: str  # one of factors.NAMES; of an emotion: emotion
    unit: str
    neutral: float  # of a face at rest


MEASURES = (
    Measure("mouth_open", "mouth", "lip gap over outer eye corners' distance", 0.01),
    Measure("mouth_width", "mouth", "mouth over outer eye corners' distance", 0.55),
    Measure("smile", "mouth", "0 to 1, blendshapes", 0.0),
    Measure("blink", "blink", "0 open as usual, 1 closed", 0.0),
    Measure("gaze_x", "gaze", "degrees to the picture's right", 0.0),
    Measure("gaze_y", "gaze", "degrees up, against the head", 0.0),
    Measure("brow_raise", "brows", "-1 lowered to 1 raised", 0.0),
)

# Emotions as the facial action units that show them (Ekman's EMFACS), each unit by its blendshapes; those that
# MediaPipe's model never gives (cheekSquint, noseSneer) are left out. The mean of the units counts.
EMOTIONS = {
    "happy": (("mouthSmileLeft", "mouthSmileRight"), ("eyeSquintLeft", "eyeSquintRight")),  # 12, 6
    "surprised": (("browInnerUp",), ("browOuterUpLeft", "browOuterUpRight"), ("eyeWideLeft", "eyeWideRight"),
                  ("jawOpen",)),  # 1, 2, 5, 26
    "sad": (("browInnerUp",), ("mouthFrownLeft", "mouthFrownRight")),  # 1, 15
    "angry": (("browDownLeft", "browDownRight"), ("eyeSquintLeft", "eyeSquintRight"),
              ("mouthPressLeft", "mouthPressRight")),  # 4, 7, 24
}  # fmt: skip
TABLE = (*MEASURES, *(Measure(name, "emotion", "0 to 1, its action units", 0.0) for name in EMOTIONS))


def scores(blendshapes: np.ndarray, *names: str) -> np.ndarray:
    """Mean of some blendshapes. (..., 52) -> (...)"""
    return blendshapes[..., [BLENDSHAPES.index(name) for name in names]].mean(-1)


def measures_of(points: np.ndarray, blendshapes: np.ndarray, template: np.ndarray) -> np.ndarray:
    """All measures, in the order of TABLE. (N, 478, 3), (N, 52), mean face (478, 3) -> (N, M) float64"""
    shape = normalise(points, template)[0]
    eyes = np.linalg.norm(shape[:, 33] - shape[:, 263], axis=-1)
    iris = gaze(shape)
    raised = scores(blendshapes, "browInnerUp", "browOuterUpLeft", "browOuterUpRight")
    values = {
        "mouth_open": mouth_opening(shape),
        "mouth_width": np.linalg.norm(shape[:, 61] - shape[:, 291], axis=-1) / eyes,
        "smile": scores(blendshapes, "mouthSmileLeft", "mouthSmileRight"),
        "blink": (OPEN - eye_openings(shape).mean(-1)) / (OPEN - CLOSED),
        "gaze_x": np.degrees(iris[:, 0] / EYE_RADIUS),
        "gaze_y": np.degrees((AHEAD - iris[:, 1]) / EYE_RADIUS),
        "brow_raise": raised - scores(blendshapes, "browDownLeft", "browDownRight"),
    }
    for name, units in EMOTIONS.items():
        values[name] = np.mean([scores(blendshapes, *unit) for unit in units], axis=0)
    return np.stack([values[measure.name] for measure in TABLE], -1).astype(np.float64)


def measures_of_faces(faces: Iterable[FaceShape | None], template: np.ndarray) -> np.ndarray:
    """The same of what a landmarker found: (N, M), NaN where there was no face."""
    faces = list(faces)
    result = np.full((len(faces), len(TABLE)), np.nan)
    there = [place for place, face in enumerate(faces) if face is not None]
    if there:
        points = np.stack([faces[place].points for place in there])
        result[there] = measures_of(points, np.stack([faces[place].blendshapes for place in there]), template)
    return result
