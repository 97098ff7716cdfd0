"""What the 20 motion coordinates of our own weights mean: a supervised basis for DPE's motion code.

The paper lets the 20 coordinates find their meaning from reconstruction alone, over millions of pairs. Our weights are
trained with far less, so each coordinate is given a measured meaning: 6 of head pose, 8 of the mouth, 2 of the lids,
2 of gaze, 2 of the brows. The networks are the paper's; only the target of `motion_code` is ours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from dpe_cli.errors import InputError
from dpe_cli.landmarks import BLENDSHAPES, align, eye_openings, gaze, head_angles, rotation_between

GROUPS = {"mouth": 8, "lids": 2, "gaze": 2, "brows": 2}  # expression coordinates, in this order after the pose
POSE_DIM = 6  # yaw, pitch, roll (degrees), log2 of the face's size over the crop's, centre x and y (crop sides)
MOTION_DIM = POSE_DIM + sum(GROUPS.values())
# Where each part of the pose and each group lies among the 20 coordinates.
COORDINATES = {"turn": slice(0, 3), "size": slice(3, 4), "place": slice(4, POSE_DIM)}
for _group, _count in GROUPS.items():
    _first = max(part.stop for part in COORDINATES.values())
    COORDINATES[_group] = slice(_first, _first + _count)
POSE_SCALE = np.array([15.0, 12.0, 10.0, 0.25, 0.06, 0.06])  # divisors that bring each to about unit spread
STRAY, LARGER = 0.15, 0.3  # how far a head is moved in its crop at most, in sides, and how much larger made, in octaves
LIMIT = 4.0  # standardised coordinates are clipped here: landmark failures give wild values

# What the coordinates are made of, by MediaPipe's point numbers.
MOUTH_GAPS = ((13, 14), (82, 87), (312, 317), (78, 308), (61, 291))
MOUTH_OFFSETS = (  # one point against another, and along which axis
    (61, 0, 1), (291, 0, 1), (13, 2, 1), (14, 2, 1), (152, 2, 1), (13, 2, 2), (14, 2, 2),
)  # fmt: skip
BLINK_SHARE = 0.15  # of the blendshape eyeBlink, taken off the lids' opening
BROW_HEIGHTS = ((105, 33), (334, 263), (107, 133), (336, 362))
MOUTH_BLENDSHAPES = [i for i, name in enumerate(BLENDSHAPES) if name.startswith(("jaw", "mouth"))]
BROW_BLENDSHAPES = [i for i, name in enumerate(BLENDSHAPES) if name.startswith("brow")]


def mirror_blendshapes(scores: np.ndarray) -> np.ndarray:
    """Scores of the mirrored face. (..., 52) -> (..., 52)"""
    swapped = [
        BLENDSHAPES.index(name.replace("Left", "#").replace("Right", "Left").replace("#", "Right"))
        for name in BLENDSHAPES
    ]
    return scores[..., swapped]


def mean_face(points: np.ndarray, rounds: int = 5) -> np.ndarray:
    """Symmetric mean shape of many faces (N, 478, 3): centred, outer eye corners one unit apart. -> (478, 3)"""
    template = points[0] - points[0].mean(0)
    for _ in range(rounds):
        shapes = []
        for face in points:
            scale, rotation, translation = align(face, template)
            shapes.append((face - translation) @ rotation / scale)
        template = np.mean(shapes, axis=0)
        mirror = mirror_permutation(template)
        template = (template + template[mirror] * [-1, 1, 1]) / 2
        template -= template.mean(0)
        template /= np.linalg.norm(template[33] - template[263])
    return template


def rotation_of(pose: np.ndarray) -> Rotation:
    """The head's rotation of pose coordinates or whole motion codes (..., >=3)."""
    return Rotation.from_euler("YXZ", pose[..., :3] * POSE_SCALE[:3], degrees=True)


def turn_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees from one head to another, of motion codes (N, K) twice. -> (N,)"""
    return rotation_between(rotation_of(a).as_matrix(), rotation_of(b).as_matrix())


def seen_in(codes: np.ndarray, boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Codes of heads seen in crops as they would be in other crops of the same picture: size and place differ.

    codes: (N, K) float. boxes, others: (N, 4) x0, y0, x1, y1 of squares, pixels. -> (N, K) float64
    """
    result, scale = codes.astype(np.float64), POSE_SCALE[COORDINATES["place"]]
    side, other = (crops[:, 2:3] - crops[:, :1] for crops in (boxes, others))
    middle = boxes[:, :2] + (result[:, COORDINATES["place"]] * scale + 0.5) * side
    result[:, COORDINATES["place"]] = ((middle - others[:, :2]) / other - 0.5) / scale
    result[:, COORDINATES["size"]] += np.log2(side / other) / POSE_SCALE[COORDINATES["size"]]
    return result


def mirror_permutation(template: np.ndarray) -> np.ndarray:
    """Index of each point's mirror image, by the nearest point of the mirrored mean shape. (478,) int"""
    centred = template - template.mean(0)
    distance = np.linalg.norm(centred[:, None] - (centred * [-1, 1, 1])[None], axis=-1)
    return distance.argmin(1)


def _features(shape: np.ndarray, blendshapes: np.ndarray) -> dict[str, np.ndarray]:
    """Raw measures on faces in the head's own frame. shape (N, 478, 3), blendshapes (N, 52) -> group -> (N, F)."""

    def gap(a: int, b: int) -> np.ndarray:
        return np.linalg.norm(shape[:, a] - shape[:, b], axis=-1)

    middle = (shape[:, 61] + shape[:, 291]) / 2
    mouth = [gap(*pair) for pair in MOUTH_GAPS]
    mouth += [shape[:, a, axis] - shape[:, b, axis] for a, b, axis in MOUTH_OFFSETS]
    mouth = np.stack([*mouth, middle[:, 0]], -1)
    brows = np.stack([shape[:, a, 1] - shape[:, b, 1] for a, b in BROW_HEIGHTS], -1)
    blink = blendshapes[:, [BLENDSHAPES.index("eyeBlinkLeft"), BLENDSHAPES.index("eyeBlinkRight")]]
    opening = eye_openings(shape)  # picture's left first, which is the person's right
    return {
        "mouth": np.concatenate([mouth, blendshapes[:, MOUTH_BLENDSHAPES]], -1),
        "lids": opening - BLINK_SHARE * blink[:, ::-1],
        "gaze": gaze(shape),
        "brows": np.concatenate([brows, blendshapes[:, BROW_BLENDSHAPES]], -1),
    }


@dataclass(frozen=True)
class MotionSpace:
    """Landmarks to the 20 motion coordinates, and back to a posed face."""

    template: np.ndarray  # (478, 3) mean face
    mean: dict[str, np.ndarray]  # group -> (F,)
    basis: dict[str, np.ndarray]  # group -> (F, coordinates)

    @classmethod
    def fit(cls, clips: list[tuple[np.ndarray, np.ndarray]], template: np.ndarray) -> "MotionSpace":
        """Principal components, inside each group, of what changes within a clip (identity cancels there).

        clips: (points (N, 478, 3), blendshapes (N, 52)) of each clip.
        """
        raw = [_features(normalise(points, template)[0], scores) for points, scores in clips]
        mean, basis = {}, {}
        for group, count in GROUPS.items():
            values = np.concatenate([clip[group] for clip in raw])
            within = np.concatenate([clip[group] - clip[group].mean(0) for clip in raw])
            spread = within.std(0)
            # A score that hardly ever fires would be blown up by standardising: it weighs by what it does.
            weight = 1 / np.maximum(spread, 0.25 * np.median(spread))
            _, _, rows = np.linalg.svd(within * weight, full_matrices=False)
            axes = (weight[:, None] * rows[:count].T) if group in ("mouth", "brows") else np.diag(weight)
            mean[group] = values.mean(0)
            basis[group] = axes / ((values - mean[group]) @ axes).std(0)
        return cls(template, mean, basis)

    def expression(self, shape: np.ndarray, blendshapes: np.ndarray) -> np.ndarray:
        """Expression coordinates of pose-normalised faces. (N, 478, 3), (N, 52) -> (N, 14)"""
        raw = _features(shape, blendshapes)
        parts = [(raw[group] - self.mean[group]) @ self.basis[group] for group in GROUPS]
        return np.clip(np.concatenate(parts, -1), -LIMIT, LIMIT).astype(np.float32)

    @staticmethod
    def pose(scale: np.ndarray, rotation: np.ndarray, centre: np.ndarray, size: int) -> np.ndarray:
        """Pose coordinates. scale (N,) in pixels, rotation (N, 3, 3), centre (N, 2) pixels of a crop -> (N, 6)"""
        raw = np.concatenate(
            [head_angles(rotation), np.log2(scale / size * 3)[:, None], centre / size - 0.5], -1
        )  # the outer eye corners are about a third of our crops apart
        return np.clip(raw / POSE_SCALE, -LIMIT, LIMIT).astype(np.float32)

    def to_json(self) -> str:
        """Everything, rounded to 6 digits."""

        def plain(values: np.ndarray) -> list:
            return np.round(values, 6).tolist()

        return json.dumps(
            {
                "template": plain(self.template),
                "mean": {k: plain(v) for k, v in self.mean.items()},
                "basis": {k: plain(v) for k, v in self.basis.items()},
            }
        )

    @classmethod
    def load(cls, path: Path) -> "MotionSpace":
        """Reads what `to_json` wrote. Raises InputError for a file that is missing or something else."""
        try:
            data = json.loads(Path(path).read_text())
            mean, basis = (
                {group: np.array(data[part][group], float) for group in GROUPS} for part in ("mean", "basis")
            )
            template = np.array(data["template"], float)
            if template.shape != (478, 3) or any(basis[group].shape[1:] != (count,) for group, count in GROUPS.items()):
                raise ValueError("its shapes are wrong")
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{path} is no motion space: {type(error).__name__} {error}"
            raise InputError(problem, "take the motion-space.json that was written beside the weights") from error
        return cls(template, mean, basis)


def normalise(points: np.ndarray, template: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Takes the head pose out of faces (N, 478, 3).

    Returns shapes in the head's frame (N, 478, 3), scales (N,), rotations (N, 3, 3), translations (N, 3).
    """
    fits = [align(face, template) for face in points]
    scale = np.array([f[0] for f in fits])
    rotation = np.stack([f[1] for f in fits])
    translation = np.stack([f[2] for f in fits])
    centred = (points - translation[:, None]) / scale[:, None, None]
    shapes = np.einsum("nij,nkj->nki", rotation.transpose(0, 2, 1), centred)
    return shapes, scale, rotation, translation
