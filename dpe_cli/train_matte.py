"""Training of the matte network on prepared clips, with MediaPipe's selfie segmentation as the teacher.

Frames are labelled once, when a run begins; samples are cut from them around the face as the tool cuts, nearly, and
spoilt by light, cameras and codecs, which the labels are not.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.crop import cut
from dpe_cli.dataset import CROP
from dpe_cli.errors import InputError
from dpe_cli.landmark_net import framing
from dpe_cli.models import MatteNet
from dpe_cli.motion_space import MotionSpace
from dpe_cli.pipeline import ahead
from dpe_cli.reader import to_input
from dpe_cli.train_landmarks import CropSampler, LabelledClip, LandmarkTraining, load_labelled
from dpe_cli.trainer import follow, take_steps
from dpe_cli.weights import save

Segment = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 -> (H, W) float in [0, 1]
HALF = CROP // 2  # side of what the network answers


@dataclass(frozen=True)
class MatteTraining:
    """Everything that a run depends on; written beside its weights."""

    minutes: float = 20.0
    steps: int = 0  # instead of minutes
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.02
    ema: float = 0.998
    stride: int = 4  # frames of a clip from one that is labelled to the next
    seed: int = 0
    threads: int = 1


class Segmenter:
    """MediaPipe's selfie segmentation on single pictures. Raises InputError without mediapipe or the model's file."""

    def __init__(self, model: Path):
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise InputError("mediapipe is not installed", "pip install 'dpe-cli[train]'") from error
        if not Path(model).is_file():
            raise InputError(f"{model}: no such segmentation model", "name MediaPipe's selfie_segmentation.tflite")
        self._mediapipe = mediapipe
        options = vision.ImageSegmenterOptions(
            base_options=BaseOptions(model_asset_path=str(model)), output_confidence_masks=True
        )
        self._segmenter = vision.ImageSegmenter.create_from_options(options)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """How much of each pixel is a person. (H, W, 3) uint8 -> (H, W) float32 in [0, 1]"""
        image = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(rgb))
        return self._segmenter.segment(image).confidence_masks[-1].numpy_view().reshape(rgb.shape[:2]).copy()

    def close(self) -> None:
        """Frees the model."""
        self._segmenter.close()


def labels_of(clip: LabelledClip, segment: Segment) -> np.ndarray:
    """The teacher's mattes of a clip's frames: (N, 128, 128) uint8"""
    mattes = [segment(np.asarray(frame)) for frame in clip.frames]
    small = [cv2.resize(matte, (HALF, HALF), interpolation=cv2.INTER_AREA) for matte in mattes]
    return np.rint(np.stack(small) * 255).astype(np.uint8)


class MatteSampler:
    """Endless spoilt crops with their mattes."""

    def __init__(self, clips: list[LabelledClip], labels: list[np.ndarray], template: np.ndarray, seed: int):
        self.spoiler = CropSampler(clips, template, CROP, LandmarkTraining(seed=seed))
        self.random = np.random.default_rng(seed + 2)
        people: dict[str, list[tuple[LabelledClip, np.ndarray]]] = {}
        for clip, label in zip(clips, labels, strict=True):
            people.setdefault(clip.identity, []).append((clip, label))
        self.people = list(people.values())

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """(256, 256, 3) uint8 and its matte (128, 128) uint8; people are equally likely."""
        person = self.people[self.random.integers(len(self.people))]
        clip, labels = person[self.random.integers(len(person))]
        index = int(self.random.integers(len(labels)))
        matrix = self.spoiler.placement(framing(clip.points[index]), bool(self.random.random() < 0.5))
        picture = moved(np.asarray(clip.frames[index]), matrix, CROP)
        return self.spoiler.spoil(picture), moved(labels[index], matrix, HALF)

    def batch(self, count: int) -> dict[str, Tensor]:
        """pictures (count, 256, 256, 3) and mattes (count, 128, 128), uint8"""
        pictures, mattes = zip(*(self.sample() for _ in range(count)), strict=True)
        return {"pictures": torch.from_numpy(np.stack(pictures)), "mattes": torch.from_numpy(np.stack(mattes))}


def moved(frame: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """A frame, or its matte, sampled as the tool cuts crops: its edges go on where it ends.

    matrix: (2, 3) from pixels of the frame at CROP to those of the sample at CROP, counted from edges. -> (size, size)
    """
    scale, half = size / CROP, np.array([0.5, 0.5])  # OpenCV counts from pixel centres
    linear = matrix[:, :2] * (scale * CROP / frame.shape[0])
    affine = np.c_[linear, matrix[:, 2] * scale + linear @ half - half]
    return cv2.warpAffine(frame, affine, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class MatteTrainer:
    """Network, optimiser and moving average of one run."""

    def __init__(self, net: MatteNet, config: MatteTraining):
        self.config, self.net = config, net.to(memory_format=torch.channels_last).train()
        self.average = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.step_number = 0

    def step(self, batch: dict[str, Tensor], progress: float) -> dict[str, float]:
        """One update, and its loss: cross entropy with the teacher's soft matte.

        `progress` in [0, 1] is the share of the run that is gone; the rate falls as a cosine.
        """
        rate = min(1.0, (self.step_number + 1) / 50) * (0.01 + 0.99 * (1 + np.cos(np.pi * progress)) / 2)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * rate
        with torch.autocast("cpu", torch.bfloat16):
            found = self.net(to_input(batch["pictures"]))[:, 0]
        loss = F.binary_cross_entropy_with_logits(found.float(), batch["mattes"].float() / 255)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.step_number += 1
        follow(self.average, self.net, self.config.ema, self.step_number)
        return {"loss": float(loss.detach())}

    def averaged(self) -> MatteNet:
        """A copy of the network with the moving average of the weights."""
        net = MatteNet(self.net.config)
        net.load_state_dict(self.average)
        return net.eval()

    def save(self, path: Path, held_out: dict | None = None) -> Path:
        """Writes the moving average in 16 bits, with what is known of it."""
        about = {"training": asdict(self.config), "steps": self.step_number, "held_out": held_out}
        save(path, self.averaged().state_dict(), self.net.config, about, half=True)
        return path


@torch.inference_mode()
def compare(net: MatteNet, clips: list[LabelledClip], labels: list[np.ndarray]) -> dict[str, float]:
    """How mattes of clips, framed as the tool frames faces, go with the teacher's.

    iou: intersection over union of what is above one half, mean of the frames; error: mean absolute difference.
    """
    overlaps, errors = [], []
    for clip, mattes in zip(clips, labels, strict=True):
        for frame, points, matte in zip(clip.frames, clip.points, mattes, strict=True):
            box = framing(points)
            crop = cut(np.asarray(frame), box, CROP)[0]
            large = cv2.resize(matte, (CROP, CROP), interpolation=cv2.INTER_LINEAR)
            wanted = cv2.resize(cut(np.dstack([large] * 3), box, CROP)[0][..., 0], (HALF, HALF)) / 255.0
            found = net(to_input(torch.from_numpy(crop[None])))[0, 0].sigmoid().numpy()
            both, any_ = (found > 0.5) & (wanted > 0.5), (found > 0.5) | (wanted > 0.5)
            overlaps.append(both.sum() / max(any_.sum(), 1))
            errors.append(np.abs(found - wanted).mean())
    return {"iou": round(float(np.mean(overlaps)), 4), "error": round(float(np.mean(errors)), 4)}


def batches(sampler: MatteSampler, count: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches."""
    while True:
        yield sampler.batch(count)


def train_matte(
    data: Path, output: Path, config: MatteTraining, space: MotionSpace, segment: Segment,
    net: MatteNet | None = None, talk: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Trains for `config.minutes` or `steps`; writes `matte.safetensors` (moving average, fp16) and `matte.jsonl`.

    segment: the teacher; net: go on from its weights. Returns the weights' path. Raises InputError when there is
    nothing to train on.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    output.mkdir(parents=True, exist_ok=True)
    clips = load_labelled(data, False, CROP, config.stride)
    labels = [labels_of(clip, segment) for clip in clips]
    talk(f"{len(clips)} clips, {sum(map(len, labels))} frames labelled")
    sampler = MatteSampler(clips, labels, space.template, config.seed)
    trainer = learn(sampler, net or MatteNet(), config, output / "matte.jsonl", talk)
    held_out = load_labelled(data, True, CROP, 2 * config.stride)
    numbers = compare(trainer.averaged(), held_out, [labels_of(clip, segment) for clip in held_out])
    talk(json.dumps(numbers))
    cv2.setNumThreads(-1)
    return trainer.save(output / "matte.safetensors", numbers)


def learn(
    sampler: MatteSampler, net: MatteNet, config: MatteTraining, curve: Path, talk: Callable[[str], None]
) -> MatteTrainer:
    """The training itself."""
    trainer = MatteTrainer(net, config)
    take_steps(trainer, ahead(batches(sampler, config.batch)), curve, talk)
    return trainer
