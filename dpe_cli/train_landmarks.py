"""Training of the landmark network: MediaPipe's labels on prepared clips, the pictures spoilt in every way.

A prepared clip is what `dpe prepare` writes. A sample is one frame cut out as the tool cuts faces, but turned,
scaled and shifted far more; some samples are no faces, which teaches the confidence.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from dpe_cli.crop import cut
from dpe_cli.dataset import CROP, split_of
from dpe_cli.device import choose_device
from dpe_cli.errors import InputError
from dpe_cli.face import Box
from dpe_cli.landmark_net import framing, to_pixels
from dpe_cli.landmarks import (
    BLENDSHAPES,
    CORNERS,
    EYES,
    IRIS_CENTRES,
    LIDS,
    LIPS_INNER,
    LIPS_OUTER,
    align,
    eye_openings,
    head_angles,
    mouth_opening,
    rotation_between,
)
from dpe_cli.models import LandmarkNet, Landmarks
from dpe_cli.motion_space import (
    BLINK_SHARE,
    BROW_BLENDSHAPES,
    BROW_HEIGHTS,
    GROUPS,
    LIMIT,
    MOUTH_BLENDSHAPES,
    MOUTH_GAPS,
    MOUTH_OFFSETS,
    MotionSpace,
    mean_face,
    mirror_blendshapes,
    mirror_permutation,
    normalise,
)
from dpe_cli.pipeline import ahead
from dpe_cli.trainer import follow
from dpe_cli.weights import save

STORED = 1.25  # side at which frames wait in memory, over the network's: a crop cut at its usual place fits it about
IRISES = list(range(468, 478))
BROWS = [70, 63, 105, 66, 107, 55, 65, 52, 53, 46, 336, 296, 334, 293, 300, 285, 295, 282, 283, 276]
# Pairs whose distance is an expression: inner lips, lids, mouth corners.
GAPS = [(13, 14), (82, 87), (312, 317), (61, 291), (78, 308), *(pair for lids in LIDS for pair in lids)]


@dataclass(frozen=True)
class LandmarkTraining:
    """Everything that a run depends on; written beside its weights."""

    minutes: float = 60.0
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01
    ema: float = 0.998
    stride: int = 2  # every second frame of a clip: neighbours are alike
    negatives: float = 0.1  # share of samples that are no faces
    depth_weight: float = 0.4  # of z against x and y: MediaPipe guesses it too
    gap_weight: float = 1.0
    shape_weight: float = 2.0
    blendshape_weight: float = 0.5
    code_weight: float = 0.5  # of the motion coordinates that follow from all this, where a motion space is given
    turn_weight: float = 1.0  # of the head's rotation by itself; points tell it too, with every other error
    wild: float = 0.35  # share of the faces that are turned, scaled and shifted far
    visibility_weight: float = 0.03
    confidence_weight: float = 0.05
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class LabelledClip:
    """Frames of one clip with their labels."""

    frames: np.ndarray  # (N, S, S, 3) uint8
    points: np.ndarray  # (N, 478, 3) pixels of a CROP crop
    blendshapes: np.ndarray  # (N, 52)
    identity: str
    name: str


def load_labelled(folder: Path, held_out: bool, size: int, stride: int = 1) -> list[LabelledClip]:
    """Reads the prepared clips of one split, frames shrunk to `size`. Raises InputError if there is none."""
    clips = []
    for path, identity in split_of(Path(folder), held_out):
        with np.load(path) as data:
            points, blendshapes = data["points"][::stride], data["blendshapes"][::stride]
        frames = np.load(path.with_suffix(".npy"), mmap_mode="r")[::stride]
        if size < frames.shape[1]:
            frames = np.stack([cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in frames])
        clips.append(LabelledClip(frames, points, blendshapes, identity, path.stem))
    if not clips:
        raise InputError(f"{folder}: no prepared clips", f"prepare some: dpe prepare VIDEOS -o {folder}")
    return clips


def face_model(clips: list[LabelledClip], components: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean face (478, 3), by which poses are measured, and principal components of faces in the head's frame.

    The basis (components, 1434) has rows as long as one standard deviation.
    """
    points = np.concatenate([clip.points[::4] for clip in clips])
    mean = mean_face(points[::10])
    shapes = normalise(points, mean)[0]
    shapes = np.concatenate([shapes, shapes[:, mirror_permutation(mean)] * [-1, 1, 1]])
    flat = (shapes - mean).reshape(len(shapes), -1)
    variance, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
    order = np.argsort(variance)[::-1][:components]
    return mean, (vectors[:, order] * np.sqrt(np.maximum(variance[order], 0))).T


def point_weights() -> np.ndarray:
    """(478,) mean 1: lips, lids, irises and brows are few of the points and most of the expression."""
    weights = np.ones(478)
    weights[[*LIPS_OUTER, *LIPS_INNER]] = 5
    weights[[*EYES[0], *EYES[1]]] = 5
    weights[IRISES] = 5
    weights[BROWS] = 3
    return weights / weights.mean()


# --- samples -------------------------------------------------------------------------------------------------------


class CropSampler:
    """Endless spoilt crops with their labels.

    A sample: image (S, S, 3) uint8; points (478, 3) with -1 and 1 at the crop's edges; shape (478, 3) in the head's
    frame; scale () of the face, in the unit of the points; rotation (3, 3) of the head; blendshapes (52,); visible
    (478,) and face (), 0 or 1; known (): whether `face` counts (a half-hidden face is neither). Samples that are no
    face have zeros in place of labels.
    """

    def __init__(self, clips: list[LabelledClip], template: np.ndarray, size: int, config: LandmarkTraining):
        self.size, self.negatives, self.wild = size, config.negatives, config.wild
        self.random = np.random.default_rng(config.seed + 1)
        self.mirror = mirror_permutation(template)
        self.noise = self.random.normal(0, 1, (2 * size, 2 * size, 3)).astype(np.float32)
        people: dict[str, list] = {}
        for clip in clips:
            shapes, scales, rotations, _ = normalise(clip.points, template)
            people.setdefault(clip.identity, []).append((clip, shapes.astype(np.float32), scales, rotations))
        self.people = list(people.values())

    def pick(self) -> tuple[LabelledClip, np.ndarray, np.ndarray, np.ndarray, int]:
        """A frame: people are equally likely, however many clips they have."""
        person = self.people[self.random.integers(len(self.people))]
        clip, *measured = person[self.random.integers(len(person))]
        return clip, *measured, int(self.random.integers(len(clip.points)))

    def batch(self, count: int) -> dict[str, Tensor]:
        """`count` samples; the pictures as (count, 3, S, S) uint8, channels last."""
        samples = [self.sample() for _ in range(count)]
        stacked = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
        stacked["image"] = stacked["image"].permute(0, 3, 1, 2)
        return stacked

    def sample(self) -> dict[str, np.ndarray]:
        if self.random.random() < self.negatives:
            return self.no_face()
        clip, shapes, scales, rotations, index = self.pick()
        points, shape, scores = clip.points[index], shapes[index], clip.blendshapes[index]
        matrix = self.placement(framing(points), flip := self.random.random() < 0.5)
        linear = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
        turn = np.eye(3)
        turn[:2, :2] = matrix[:, :2] / linear  # the mirror included
        rotation = turn @ rotations[index] @ np.diag([-1.0 if flip else 1.0, 1, 1])
        moved = np.concatenate([points[:, :2] @ matrix[:, :2].T + matrix[:, 2], points[:, 2:] * linear], 1)
        if flip:
            moved, shape = moved[self.mirror], shape[self.mirror] * np.float32([-1, 1, 1])
            scores = mirror_blendshapes(scores)
        image = self.cut(clip.frames[index], matrix)
        image, covered = self.cover(image)
        inside = ((moved[:, :2] >= 0) & (moved[:, :2] < self.size)).all(1)
        seen = np.clip(moved[:, :2], 0, self.size - 1).astype(int)
        visible = inside & ~covered[seen[:, 1], seen[:, 0]]
        share = visible.mean()
        half = self.size / 2
        return {
            "image": self.spoil(image),
            "points": ((moved - [half, half, 0]) / half).astype(np.float32),
            "shape": shape,
            "scale": np.float32(scales[index] * linear / half),
            "rotation": rotation.astype(np.float32),
            "blendshapes": scores.astype(np.float32),
            "visible": visible.astype(np.float32),
            "face": np.float32(share > 0.5),
            "known": np.float32(not 0.35 < share < 0.6),
        }

    def placement(self, box: Box, flip: bool) -> np.ndarray:
        """(2, 3) CROP pixels to sample pixels, both counted from edges: the tool's crop, turned, scaled, shifted."""
        random = self.random
        wild = random.random() < self.wild  # the others are as the tool frames them, nearly
        angle = np.radians(random.uniform(-30, 30) if wild else random.normal(0, 3))
        scale = np.exp(random.uniform(-0.25, 0.25) if wild else random.normal(0, 0.04))
        shift = random.uniform(-0.12, 0.12, 2) if wild else random.normal(0, 0.02, 2)
        scale *= self.size / box.width
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = scale * turn @ np.diag([-1.0 if flip else 1.0, 1.0])
        return np.c_[linear, (0.5 + shift) * self.size - linear @ box.centre]

    def cut(self, frame: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Samples a frame of any size by a matrix from CROP pixels (from edges)."""
        linear = matrix[:, :2] * (CROP / frame.shape[0])
        half = np.array([0.5, 0.5])  # OpenCV counts from pixel centres
        affine = np.c_[linear, matrix[:, 2] + linear @ half - half]
        border = (cv2.BORDER_REPLICATE, cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT)[self.random.integers(3)]
        return cv2.warpAffine(
            frame, affine, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=border,
            borderValue=self.random.integers(0, 256, 3).tolist(),
        )  # fmt: skip

    def cover(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sometimes hides a part behind a blob of one colour or of another picture; the mask says where."""
        random, size = self.random, self.size
        mask = np.zeros((size, size), np.uint8)
        if random.random() > 0.3:
            return image, mask.astype(bool)
        centre = random.uniform(0.05, 0.95, 2) * size
        reach = random.uniform(0.07, 0.28, 2) * size
        corners = int(random.integers(4, 9))
        around = np.sort(random.uniform(0, 2 * np.pi, corners))
        if random.random() < 0.5:
            around = np.linspace(0, 2 * np.pi, 24)  # an ellipse
        outline = centre + reach * np.stack([np.cos(around), np.sin(around)], 1)
        cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
        covered = mask.astype(bool)
        if random.random() < 0.4:
            over = np.broadcast_to(random.integers(0, 256, 3).astype(np.uint8), image.shape)
        else:
            clip, *_, index = self.pick()
            side = int(clip.frames.shape[1] * random.uniform(0.2, 0.5))
            limit = clip.frames.shape[1] - side
            top, left = random.integers(0, limit, 2)
            patch = clip.frames[index][top : top + side, left : left + side]
            over = cv2.resize(patch, (size, size), interpolation=cv2.INTER_LINEAR)
        return np.where(covered[..., None], over, image), covered

    def no_face(self) -> dict[str, np.ndarray]:
        """A crop that shows no usable face: a patch beside the face or a part of it, a shuffled one, nothing."""
        random, size = self.random, self.size
        clip, *_, index = self.pick()
        frame = clip.frames[index]
        kind = random.random()
        if kind < 0.65:
            image = self.patch(frame, clip.points[index] * (frame.shape[0] / CROP))
        elif kind < 0.85:
            tile = size // int(random.choice([2, 4, 4, 8]))
            image = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
            tiles = image.reshape(size // tile, tile, size // tile, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
            tiles = tiles[random.permutation(len(tiles))].reshape(size // tile, size // tile, tile, tile, 3)
            image = np.ascontiguousarray(tiles.swapaxes(1, 2).reshape(size, size, 3))
        else:
            cells = int(random.choice([1, 2, 4, 8, 16, 32]))
            image = cv2.resize(random.integers(0, 256, (cells, cells, 3)).astype(np.uint8), (size, size))
        zeros = {
            "points": (478, 3),
            "shape": (478, 3),
            "scale": (),
            "rotation": (3, 3),
            "blendshapes": (52,),
            "visible": (478,),
            "face": (),
        }
        labels = {key: np.zeros(shape, np.float32) for key, shape in zeros.items()}
        return {"image": self.spoil(image), **labels, "known": np.float32(1)}

    def patch(self, frame: np.ndarray, points: np.ndarray) -> np.ndarray:
        """A square of a frame that holds at most a quarter of the face, or is far smaller than it."""
        low, high = points[:, :2].min(0), points[:, :2].max(0)
        limit = frame.shape[0]
        for _ in range(20):
            side = int(self.random.integers(limit // 8, limit // 2))
            corner = self.random.integers(0, limit - side + 1, 2)
            inside = ((points[:, :2] >= corner) & (points[:, :2] < corner + side)).all(1).mean()
            if inside < 0.1 or (inside < 0.25 and side < 0.35 * (high - low).max()):
                break
        else:
            side, corner = limit // 8, np.zeros(2, int)
        patch = frame[corner[1] : corner[1] + side, corner[0] : corner[0] + side]
        turned = np.rot90(patch, self.random.integers(4))
        return cv2.resize(turned, (self.size, self.size), interpolation=cv2.INTER_LINEAR)

    def spoil(self, image: np.ndarray) -> np.ndarray:
        """Light, cameras and codecs: colour, shade, blur, lost detail, grain, block edges. (S, S, 3) uint8"""
        random, size = self.random, self.size
        if random.random() < 0.8:
            gain = np.exp(random.normal(0, 0.22)) * np.exp(random.normal(0, 0.07, 3))
            levels = (np.arange(256)[:, None] / 255) ** np.exp(random.normal(0, 0.25))
            lift = random.normal(0, 0.05)
            image = cv2.LUT(image, np.clip((levels * gain + lift) * 255, 0, 255).astype(np.uint8)[None])
        if random.random() < 0.12:
            image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
        if random.random() < 0.2:  # light from one side
            across, down = random.normal(0, 0.35, 2)
            line = np.linspace(-1, 1, size, dtype=np.float32)
            shade = np.clip(1 + across * line[None] + down * line[:, None], 0.15, 1.8)
            image = np.clip(image * shade[..., None], 0, 255).astype(np.uint8)
        if random.random() < 0.2:
            if random.random() < 0.5:
                image = cv2.GaussianBlur(image, (0, 0), random.uniform(0.4, 2.2))
            else:  # the camera or the head moved
                length = int(random.integers(3, 10))
                angle = random.uniform(0, np.pi)
                kernel = np.zeros((length, length), np.float32)
                middle, reach = (length - 1) / 2, (length - 1) / 2 * np.array([np.cos(angle), np.sin(angle)])
                ends = [tuple(np.round(middle + sign * reach).astype(int).tolist()) for sign in (-1, 1)]
                cv2.line(kernel, *ends, 1.0)
                image = cv2.filter2D(image, -1, kernel / kernel.sum())
        if random.random() < 0.25:
            small = int(size / random.uniform(1.3, 5))
            way = int(random.choice([cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_NEAREST]))
            image = cv2.resize(image, (small, small), interpolation=way)
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        if random.random() < 0.3:
            top, left = random.integers(0, size, 2)
            grain = self.noise[top : top + size, left : left + size] * random.uniform(2, 18)
            image = np.clip(image + grain, 0, 255).astype(np.uint8)
        if random.random() < 0.3:
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(12, 90))]
            image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
        return image


# --- training ------------------------------------------------------------------------------------------------------


def to_input(image: Tensor) -> Tensor:
    """uint8 pictures (B, 3, S, S) to the network's [-1, 1]."""
    return image.float().div(127.5).sub(1)


def gaps(points: Tensor) -> Tensor:
    """Distances of GAPS. (B, 478, 3) -> (B, len(GAPS))"""
    one, two = (points[:, list(side)] for side in zip(*GAPS, strict=True))
    return (one - two).square().sum(-1).add(1e-8).sqrt()


def expression_codes(shape: Tensor, blendshapes: Tensor, space: MotionSpace) -> Tensor:
    """`MotionSpace.expression` with gradients. (B, 478, 3) in the head's frame, (B, 52) -> (B, 14)"""

    def gap(a: int, b: int) -> Tensor:
        return (shape[:, a] - shape[:, b]).square().sum(-1).add(1e-10).sqrt()

    def apart(a: int, b: int, axis: int) -> Tensor:
        return shape[:, a, axis] - shape[:, b, axis]

    widths = [gap(*corners) for corners in CORNERS]
    closed = [blendshapes[:, BLENDSHAPES.index(name)] for name in ("eyeBlinkRight", "eyeBlinkLeft")]
    lids = [
        sum(gap(*pair) for pair in pairs) / len(pairs) / width - BLINK_SHARE * shut
        for pairs, width, shut in zip(LIDS, widths, closed, strict=True)
    ]
    looks = [
        (shape[:, iris, :2] - (shape[:, a, :2] + shape[:, b, :2]) / 2) / width[:, None]
        for iris, (a, b), width in zip(IRIS_CENTRES, CORNERS, widths, strict=True)
    ]
    middle = (shape[:, 61, 0] + shape[:, 291, 0]) / 2
    mouth = [*(gap(*pair) for pair in MOUTH_GAPS), *(apart(*one) for one in MOUTH_OFFSETS), middle]
    brows = [apart(*pair, 1) for pair in BROW_HEIGHTS]
    raw = {
        "mouth": torch.cat([torch.stack(mouth, 1), blendshapes[:, MOUTH_BLENDSHAPES]], 1),
        "lids": torch.stack(lids, 1),
        "gaze": sum(looks) / 2,
        "brows": torch.cat([torch.stack(brows, 1), blendshapes[:, BROW_BLENDSHAPES]], 1),
    }
    parts = [(raw[g] - raw[g].new_tensor(space.mean[g])) @ raw[g].new_tensor(space.basis[g]) for g in GROUPS]
    return torch.cat(parts, 1).clamp(-LIMIT, LIMIT)


def landmark_loss(
    found: Landmarks, batch: dict[str, Tensor], config: LandmarkTraining, space: MotionSpace | None = None
) -> dict[str, Tensor]:
    """Named terms, already weighted; lengths are shares of the face's scale (the outer eye corners' distance)."""
    weights = torch.from_numpy(point_weights()).float().to(found.points.device)
    axes = torch.tensor([1.0, 1.0, config.depth_weight], device=found.points.device)
    face = (batch["scale"] > 0).float()
    size = batch["scale"].clamp_min(1e-3)[:, None]
    count = face.sum().clamp_min(1)

    def over_faces(value: Tensor) -> Tensor:
        return (value.flatten(1).mean(1) * face).sum() / count

    posed = ((found.points - batch["points"]) / size[..., None]).abs() * axes * weights[:, None]
    shape = (found.shape - batch["shape"]).abs() * axes * weights[:, None]
    codes = {}
    if space is not None and config.code_weight:
        seen, wanted = (expression_codes(one["shape"], one["blendshapes"], space) for one in (found._asdict(), batch))
        codes["codes"] = over_faces(F.smooth_l1_loss(seen, wanted, reduction="none")) * config.code_weight
    turned = F.smooth_l1_loss(found.rotation, batch["rotation"], reduction="none", beta=0.05)
    return codes | {
        "turn": over_faces(turned) * 9 * config.turn_weight,
        "points": over_faces(posed),
        "shape": over_faces(shape) * config.shape_weight,
        "gaps": over_faces((gaps(found.shape) - gaps(batch["shape"])).abs()) * config.gap_weight,
        "blendshapes": over_faces((found.blendshapes - batch["blendshapes"]).abs()) * config.blendshape_weight,
        "visibility": over_faces(F.binary_cross_entropy(found.visibility, batch["visible"], reduction="none"))
        * config.visibility_weight,
        "confidence": (
            F.binary_cross_entropy(found.confidence, batch["face"], reduction="none") * batch["known"]
        ).mean()
        * config.confidence_weight,
    }


class LandmarkTrainer:
    """Network, optimiser and moving average of one run."""

    def __init__(
        self, net: LandmarkNet, config: LandmarkTraining, device: str = "cpu", space: MotionSpace | None = None
    ):
        self.config, self.device, self.space = config, torch.device(device), space
        self.net = net.to(self.device, memory_format=torch.channels_last).train()
        self.average = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.step_number = 0

    def step(self, batch: dict[str, Tensor], progress: float) -> dict[str, float]:
        """One update. `progress` in [0, 1] is the share of the run's time that is gone; the rate falls as a cosine."""
        config = self.config
        rate = min(1.0, (self.step_number + 1) / 100) * (0.005 + 0.995 * (1 + np.cos(np.pi * progress)) / 2)
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * rate
        batch = {key: value.to(self.device) for key, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.net(to_input(batch["image"]))
        terms = landmark_loss(found, batch, config, self.space)
        self.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        length = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 2.0)
        if length.isfinite():
            self.optimiser.step()
        self.step_number += 1
        follow(self.average, self.net, config.ema, self.step_number)
        return {key: float(value.detach()) for key, value in terms.items()} | {"grad": float(length)}

    def averaged(self) -> LandmarkNet:
        """A copy of the network with the moving average of the weights."""
        net = LandmarkNet(self.net.config)
        net.load_state_dict(self.average)
        return net.eval()

    def save(self, path: Path, held_out: dict[str, float] | None = None) -> None:
        """Writes the moving average in 16 bits, with what is known of it."""
        about = {"training": asdict(self.config), "steps": self.step_number, "held_out": held_out}
        save(path, self.averaged().state_dict(), self.net.config, about, half=True)


PARTS = {"all": list(range(478)), "lips": [*LIPS_OUTER, *LIPS_INNER], "eyes": [*EYES[0], *EYES[1]], "irises": IRISES}


def evaluate(net: LandmarkNet, clips: list[LabelledClip], stride: int = 2) -> dict[str, float]:
    """The network against MediaPipe on clips, framed as the tool frames faces.

    error_*: mean distance of points in the picture in percent of the outer eye corners' distance there, of all points
    and of parts; *_correlation: of openings over the frames of a clip, mean and median of the clips that move at all;
    rotation_degrees: mean angle between head rotations, yaw_, pitch_, roll_degrees: mean absolute differences;
    blendshape_error: mean absolute difference; confidence_auc: of faces, framed as training frames them, against crops
    without a usable face, visibility_auc: of points under synthetic covers; confident: share of faces above 0.5.
    """
    net.eval()
    mean = net.mean.double().cpu().numpy()
    errors = {part: [] for part in PARTS}
    mouth, eyes, turns, turns_by_axis, scores, confident = [], [], [], [], [], []
    for clip in clips:
        labels, found, boxes = clip.points[::stride], [], []
        for frame, points in zip(clip.frames[::stride], labels, strict=True):
            boxes.append(framing(points))
            found.append(cut(np.asarray(frame), boxes[-1], net.config.size)[0])
        result = read(net, np.stack(found))
        points = np.stack([to_pixels(one, box) for one, box in zip(result.points, boxes, strict=True)])
        apart = np.linalg.norm(labels[:, 33, :2] - labels[:, 263, :2], axis=-1)
        distance = np.linalg.norm((points - labels)[..., :2], axis=-1) / apart[:, None] * 100
        for part, indices in PARTS.items():
            errors[part].append(distance[:, indices].mean(1))
        mouth.append(correlation(mouth_opening(points), mouth_opening(labels), 0.01))
        eyes.append(correlation(eye_openings(points).mean(1), eye_openings(labels).mean(1), 0.01))
        for i, label in enumerate(labels):
            rotation = align(label, mean)[1]
            turns.append(float(rotation_between(result.rotation[i], rotation)))
            turns_by_axis.append(np.abs(head_angles(result.rotation[i]) - head_angles(rotation)))
        scores.append(np.abs(result.blendshapes - clip.blendshapes[::stride]).mean(1))
        confident.append(result.confidence > 0.5)
    numbers = {f"error_{part}": np.concatenate(values).mean() for part, values in errors.items()}
    for name, values in {"mouth": mouth, "eye": eyes}.items():
        if np.isfinite(values).any():
            numbers |= {f"{name}_correlation": np.nanmean(values), f"{name}_correlation_median": np.nanmedian(values)}
    axes = zip(("yaw_degrees", "pitch_degrees", "roll_degrees"), np.mean(turns_by_axis, 0), strict=True)
    numbers |= {"rotation_degrees": np.mean(turns), **dict(axes)}
    numbers |= {"blendshape_error": np.concatenate(scores).mean(), "confident": np.concatenate(confident).mean()}
    sampler = CropSampler(clips, mean, net.config.size, LandmarkTraining(negatives=0.4, seed=7))
    batch = sampler.batch(min(1000, 5 * len(turns)))
    result = read(net, batch["image"].permute(0, 2, 3, 1).numpy())
    face, known = batch["face"].numpy() > 0, batch["known"].numpy() > 0
    numbers["confidence_auc"] = area_under_curve(result.confidence[known & face], result.confidence[known & ~face])
    visible = batch["visible"].numpy()[batch["scale"].numpy() > 0] > 0
    guessed = result.visibility[batch["scale"].numpy() > 0]
    numbers["visibility_auc"] = area_under_curve(guessed[visible], guessed[~visible])
    return {key: round(float(value), 4) for key, value in numbers.items()}


@torch.inference_mode()
def read(net: LandmarkNet, crops: np.ndarray) -> Landmarks:
    """What the network says of crops (N, S, S, 3) uint8; arrays in place of tensors."""
    parts = [
        net(to_input(torch.from_numpy(part).permute(0, 3, 1, 2)))
        for part in np.array_split(crops, 1 + len(crops) // 64)
    ]
    return Landmarks(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))


def correlation(found: np.ndarray, wanted: np.ndarray, least: float) -> float:
    """Of two series; not a number where what is wanted moves by less than `least` (standard deviation)."""
    return float(np.corrcoef(found, wanted)[0, 1]) if wanted.std() > least else float("nan")


def area_under_curve(high: np.ndarray, low: np.ndarray) -> float:
    """Probability that a value of the first kind is larger than one of the second (ROC AUC)."""
    ranks = rankdata(np.concatenate([high, low]))[: len(high)]
    return float((ranks.mean() - (len(high) + 1) / 2) / len(low))


def batches(sampler: CropSampler, count: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches of `count` samples."""
    while True:
        yield sampler.batch(count)


def at_size(net: LandmarkNet, size: int) -> LandmarkNet:
    """The same network for crops of another size: what read a small map reads the same map, drawn larger or smaller."""
    config = replace(net.config, size=size)
    state, other = net.state_dict(), LandmarkNet(config)
    sides = net.config.size // 32, size // 32
    weight = state["gather.weight"].unflatten(1, (-1, sides[0], sides[0]))
    weight = F.interpolate(weight, size=(sides[1], sides[1]), mode="bilinear") * (sides[0] / sides[1]) ** 2
    other.load_state_dict(state | {"gather.weight": weight.flatten(1)})
    return other


def train_landmarks(
    data: Path, output: Path, config: LandmarkTraining, net: LandmarkNet | None = None, device: str = "cpu",
    talk: Callable[[str], None] = lambda line: None, space: MotionSpace | None = None,
) -> Path:  # fmt: skip
    """Trains for `config.minutes`; writes `landmarks.safetensors` (moving average, fp16) and `landmarks.jsonl`.

    `net` goes on from its weights and keeps its face model; one that has none gets the training split's. space: its
    coordinates count too. Returns the weights' path. Raises InputError when there is nothing to train on, DeviceError.
    """
    device = str(choose_device(device))
    cv2.setNumThreads(1)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    output.mkdir(parents=True, exist_ok=True)
    net = net or LandmarkNet()
    clips = load_labelled(data, False, round(net.config.size * STORED), config.stride)
    if not net.basis.any():
        mean, basis = face_model(clips, net.config.components)
        net.mean.copy_(torch.from_numpy(mean))
        net.basis.copy_(torch.from_numpy(basis))
    sampler = CropSampler(clips, net.mean.double().numpy(), net.config.size, config)
    trainer = LandmarkTrainer(net, config, device, space)
    talk(f"{len(clips)} clips of {len(sampler.people)} people, {sum(len(c.points) for c in clips)} frames")
    weights, curve = output / "landmarks.safetensors", output / "landmarks.jsonl"
    started, saved, terms = time.monotonic(), 0.0, []
    for batch in ahead(batches(sampler, config.batch)):
        gone = (time.monotonic() - started) / 60
        if gone >= config.minutes:
            break
        terms.append(trainer.step(batch, gone / config.minutes))
        if trainer.step_number % 50 == 0:
            means = {key: round(float(np.mean([term[key] for term in terms])), 5) for key in terms[0]}
            line = json.dumps({"step": trainer.step_number, "minutes": round(gone, 2), **means})
            terms.clear()
            talk(line)
            with curve.open("a") as file:
                file.write(line + "\n")
        if gone - saved > 3:
            saved = gone
            trainer.save(weights)
    held_out = evaluate(trainer.averaged(), load_labelled(data, held_out=True, size=CROP))
    talk(json.dumps(held_out))
    trainer.save(weights, held_out)
    cv2.setNumThreads(-1)
    return weights
