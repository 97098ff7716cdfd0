"""Training of the reading networks: patches of prepared clips with MediaPipe's coordinates.

Each frame is cut out once as the tool frames faces, the landmark network looks at it, and the patches wait in memory.
The networks learn to tell the coordinates from patches alone. How much their word counts beside the landmark network's
is found on people who are left out of the training (LEFT_OUT); that one has been trained on them, so it is rather less
than they deserve.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.crop import cut
from dpe_cli.dataset import CROP
from dpe_cli.errors import InputError
from dpe_cli.landmark_net import NetworkLandmarker, framing
from dpe_cli.measured import read_codes
from dpe_cli.models import ReaderNets
from dpe_cli.motion_space import (
    COORDINATES,
    POSE_DIM,
    MotionSpace,
    mirror_blendshapes,
    mirror_permutation,
    normalise,
)
from dpe_cli.parts import BOTH_EYES, MOUTH, posed
from dpe_cli.pipeline import ahead
from dpe_cli.reader import patches_of, to_input
from dpe_cli.train_landmarks import CropSampler, LabelledClip, LandmarkTraining, correlation, load_labelled
from dpe_cli.trainer import follow, take_steps
from dpe_cli.weights import save

MOVES = 0.2  # a coordinate moves in a clip from this standard deviation on; its usual spread is 1
TOGETHER = 4  # frames of one clip in a batch
LEFT_OUT = 10  # one in so many people of the training split decides the shares


@dataclass(frozen=True)
class ReaderTraining:
    """Everything that a run depends on; written beside its weights."""

    minutes: float = 20.0
    steps: int = 0  # instead of minutes
    batch: int = 64  # frames, TOGETHER of each clip
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema: float = 0.998
    motion_weight: float = 1.0  # of what changes within a clip, beside the coordinates themselves
    spoilt: float = 0.5  # share of the crops that are spoilt before the landmark network looks
    stride: int = 1  # frames of a clip from one to the next
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Looks:
    """Crops after the first look at them. Codes are motion coordinates, the expression's only where they are wanted."""

    mouths: np.ndarray  # (N, 88, 80, 3) uint8
    eyes: np.ndarray  # (N, 2, 48, 64, 3) uint8, the second mirrored
    codes: np.ndarray  # (N, 20): the first look's
    wanted: np.ndarray  # (N, 20): MediaPipe's; the pose is the first look's
    mirrored: np.ndarray  # (N, 2, 20): both of the mirrored crop
    clips: np.ndarray  # (N,) int
    people: np.ndarray  # (N,) str

    def of(self, chosen: np.ndarray) -> "Looks":
        """Some of them, by number or mask."""
        return Looks(*(getattr(self, field.name)[chosen] for field in fields(self)))


def take_looks(
    clips: list[LabelledClip], space: MotionSpace, landmarks: NetworkLandmarker, config: ReaderTraining | None,
    talk: Callable[[str], None] = lambda line: None,
) -> Looks:  # fmt: skip
    """Lets the landmark network look at every frame, framed as the tool frames faces.

    config: frames are a little off at random and spoilt, as training wants them; None: as the tool has them.
    Raises InputError where it sees no face at all.
    """
    spoilt = config.spoilt if config else 0.0
    sampler = CropSampler(clips, space.template, CROP, LandmarkTraining(wild=0, seed=config.seed if config else 0))
    parts = []
    for number, clip in enumerate(clips):
        pairs = zip(clip.frames, clip.points, strict=True)
        crops = [crop_of(sampler, frame, points, config is not None, spoilt) for frame, points in pairs]
        parts.append(look_at(crops, clip, number, space, landmarks))
        if number % 50 == 49:
            talk(f"looked at {number + 1} of {len(clips)} clips")
    seen = [part for part in parts if part is not None]
    if not seen:
        raise InputError("the landmark network sees no face in any clip", "prepare clips that show faces")
    return Looks(*(np.concatenate([getattr(part, field.name) for part in seen]) for field in fields(Looks)))


def look_at(
    crops: list[np.ndarray], clip: LabelledClip, number: int, space: MotionSpace, landmarks: NetworkLandmarker
) -> Looks | None:
    """The looks at a clip's crops; None where no face is seen."""
    faces = [face for start in range(0, len(crops), 32) for face in landmarks.detect_batch(crops[start : start + 32])]
    seen = [row for row, face in enumerate(faces) if face is not None]
    if not seen:
        return None
    found, count = [faces[row] for row in seen], len(seen)
    heads = [(crops[row], posed(face.points, space.template)) for row, face in zip(seen, found, strict=True)]
    mouths, eyes = (np.stack([patches_of(*head, parts) for head in heads]) for parts in ([MOUTH], BOTH_EYES))
    points, said = (np.stack([getattr(face, name) for face in found]) for name in ("points", "blendshapes"))
    told, known = ((points, said), (clip.points[seen], clip.blendshapes[seen]))  # by the network, by MediaPipe
    codes, mirror = read_codes(found, CROP, space), mirror_permutation(space.template)
    wanted, mirrored = codes.copy(), np.stack([codes, codes], 1)
    for place, (face, scores) in enumerate((told, known)):
        shapes = normalise(face, space.template)[0]
        mirrored[:, place, POSE_DIM:] = space.expression(shapes[:, mirror] * [-1, 1, 1], mirror_blendshapes(scores))
    wanted[:, POSE_DIM:] = space.expression(shapes, scores)  # the last, MediaPipe's
    mirrored[:, :, [0, 2, 4]] *= -1  # yaw, roll, place
    return Looks(
        mouths[:, 0], eyes, codes, wanted, mirrored, np.full(count, number), np.full(count, clip.identity, object)
    )


def crop_of(sampler: CropSampler, frame: np.ndarray, points: np.ndarray, off: bool, spoilt: float) -> np.ndarray:
    """A frame's crop: the tool's, or one that is a little `off` and perhaps spoilt. (CROP, CROP, 3) uint8"""
    if not off:
        return cut(np.asarray(frame), framing(points), CROP)[0]
    crop = sampler.cut(np.asarray(frame), sampler.placement(framing(points), False))
    return sampler.spoil(crop) if sampler.random.random() < spoilt else crop


# --- samples -------------------------------------------------------------------------------------------------------


class PatchSampler:
    """Endless batches of patches with first and wanted codes; TOGETHER frames of a clip follow each other."""

    def __init__(self, looks: Looks, config: ReaderTraining):
        self.looks, self.config = looks, config
        self.random = np.random.default_rng(config.seed + 1)
        self.rows = {clip: np.flatnonzero(looks.clips == clip) for clip in np.unique(looks.clips)}
        self.people: dict[str, list[int]] = {}
        for clip, rows in self.rows.items():
            self.people.setdefault(looks.people[rows[0]], []).append(clip)
        self.noise = self.random.normal(0, 1, (160, 160, 3)).astype(np.float32)

    def rows_of_a_clip(self) -> np.ndarray:
        """TOGETHER frames of one clip: people are equally likely, however many clips they have."""
        clips = list(self.people.values())[self.random.integers(len(self.people))]
        return self.random.choice(self.rows[clips[self.random.integers(len(clips))]], TOGETHER)

    def batch(self) -> dict[str, Tensor]:
        """mouths (B, 88, 80, 3) and eyes (B, 2, 48, 64, 3) uint8, codes and wanted (B, 20)"""
        groups = [self.group() for _ in range(max(1, self.config.batch // TOGETHER))]
        parts = (torch.from_numpy(np.concatenate(part)) for part in zip(*groups, strict=True))
        return dict(zip(("mouths", "eyes", "codes", "wanted"), parts, strict=True))

    def group(self) -> tuple[np.ndarray, ...]:
        """Frames of one clip, mirrored or not, their patches spoilt."""
        rows, flip = self.rows_of_a_clip(), self.random.random() < 0.5
        mouths, eyes = self.looks.mouths[rows], self.looks.eyes[rows]
        codes, wanted = self.looks.codes[rows], self.looks.wanted[rows]
        if flip:
            mouths, eyes = mouths[:, :, ::-1], eyes[:, ::-1]
            codes, wanted = self.looks.mirrored[rows].swapaxes(0, 1)
        mouths = np.stack([self.spoil(one) for one in mouths])
        eyes = np.stack([[self.spoil(one) for one in both] for both in eyes])
        return mouths, eyes, codes, wanted

    def spoil(self, patch: np.ndarray) -> np.ndarray:
        """Place, light, cameras and codecs. (H, W, 3) uint8 -> the same"""
        random, (height, width) = self.random, patch.shape[:2]
        angle, scale = np.radians(random.normal(0, 2)), np.exp(random.normal(0, 0.03))
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = np.array([width, height]) / 2
        affine = np.c_[turn, middle + random.uniform(-2, 2, 2) - turn @ middle]
        patch = cv2.warpAffine(
            np.ascontiguousarray(patch),
            affine,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if random.random() < 0.8:
            gain = np.exp(random.normal(0, 0.2)) * np.exp(random.normal(0, 0.08, 3))
            levels = (np.arange(256)[:, None] / 255) ** np.exp(random.normal(0, 0.3))
            levels = (levels * gain + random.normal(0, 0.05)) * 255
            patch = cv2.LUT(patch, np.clip(levels, 0, 255).astype(np.uint8)[None])
        if random.random() < 0.1:
            patch = np.repeat(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
        if random.random() < 0.25:
            patch = cv2.GaussianBlur(patch, (0, 0), random.uniform(0.4, 2.0))
        if random.random() < 0.3:
            top, left = random.integers(0, 160 - height), random.integers(0, 160 - width)
            grain = self.noise[top : top + height, left : left + width] * random.uniform(2, 14)
            patch = np.clip(patch + grain, 0, 255).astype(np.uint8)
        if random.random() < 0.2:
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(20, 90))]
            patch = cv2.imdecode(cv2.imencode(".jpg", patch, quality)[1], cv2.IMREAD_COLOR)
        if random.random() < 0.2:  # a strand of hair, glasses' glare: something that is no expression
            size = (random.uniform(0.1, 0.35, 2) * [height, width]).astype(int)
            top, left = random.integers(0, height - size[0]), random.integers(0, width - size[1])
            patch[top : top + size[0], left : left + size[1]] = random.integers(0, 256, 3)
        return patch


# --- training ------------------------------------------------------------------------------------------------------


def reader_loss(found: Tensor, wanted: Tensor, config: ReaderTraining) -> dict[str, Tensor]:
    """Named terms, already weighted: codes, and what changes within a clip. found, wanted: (B, F), see PatchSampler"""
    error = found - wanted
    within = error.unflatten(0, (-1, TOGETHER))
    within = (within - within.mean(1, keepdim=True)).flatten(0, 1) * (TOGETHER / (TOGETHER - 1)) ** 0.5
    codes, motion = (F.smooth_l1_loss(one, torch.zeros_like(one), beta=0.5) for one in (error, within))
    return {"codes": codes, "motion": motion * config.motion_weight}


class ReaderTrainer:
    """Networks, optimiser and moving average of one run."""

    def __init__(self, nets: ReaderNets, config: ReaderTraining):
        self.config, self.nets = config, nets.to(memory_format=torch.channels_last).train()
        self.average = {key: value.detach().clone() for key, value in nets.state_dict().items()}
        self.optimiser = torch.optim.AdamW(nets.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.columns = columns_of(nets.config.groups)
        self.step_number = 0

    def step(self, batch: dict[str, Tensor], progress: float) -> dict[str, float]:
        """One update, of one member; they take turns, and see other batches.

        `progress` in [0, 1] is the share of the run that is gone; the rate falls as a cosine.
        """
        member = self.nets.members[self.step_number % len(self.nets.members)]
        rate = min(1.0, (self.step_number + 1) / 50) * (0.01 + 0.99 * (1 + np.cos(np.pi * progress)) / 2)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * rate
        with torch.autocast("cpu", torch.bfloat16):
            found = member(to_input(batch["mouths"]), to_input(batch["eyes"]), batch["codes"])
        terms = reader_loss(found[:, self.columns], batch["wanted"][:, self.columns], self.config)
        self.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimiser.step()
        self.step_number += 1
        follow(self.average, self.nets, self.config.ema, self.step_number)
        return {key: float(value.detach()) for key, value in terms.items()}

    def averaged(self) -> ReaderNets:
        """A copy of the networks with the moving average of the weights."""
        nets = ReaderNets(self.nets.config)
        nets.load_state_dict(self.average)
        return nets.eval()

    def weigh(self, looks: Looks) -> None:
        """Finds how much the patches' word counts on people who have not been trained on."""
        shares = best_shares(reread(self.averaged(), looks), looks, self.nets.config.groups)
        self.average["share"].copy_(torch.from_numpy(shares))
        self.nets.share.copy_(torch.from_numpy(shares))

    def compare(self, looks: Looks) -> dict[str, dict]:
        """`within_clips` of the first look, of the patches alone and of what comes of both."""
        nets = self.averaged()
        read, share = reread(nets, looks), nets.share.numpy()
        mixed = looks.codes + share * (read - looks.codes)
        every = {"first look": looks.codes, "patches": read, "reader": mixed}
        return {name: within_clips(codes, looks) for name, codes in every.items()}

    def save(self, path: Path, held_out: dict | None = None) -> Path:
        """Writes the moving average in 16 bits, with what is known of it."""
        about = {"training": asdict(self.config), "steps": self.step_number, "held_out": held_out}
        save(path, self.averaged().state_dict(), self.nets.config, about, half=True)
        return path


def columns_of(groups: tuple[str, ...]) -> list[int]:
    """The motion coordinates of groups."""
    return [column for group in groups for column in range(COORDINATES[group].start, COORDINATES[group].stop)]


@torch.inference_mode()
def reread(nets: ReaderNets, looks: Looks) -> np.ndarray:
    """What the patches of all looks tell. -> (N, 20)"""
    nets.eval()
    codes = []
    for rows in np.array_split(np.arange(len(looks.codes)), 1 + len(looks.codes) // 64):
        mouths, eyes, first = (torch.from_numpy(part[rows]) for part in (looks.mouths, looks.eyes, looks.codes))
        codes.append(nets.read(to_input(mouths), to_input(eyes), first).numpy())
    return np.concatenate(codes)


def best_shares(read: np.ndarray, looks: Looks, groups: tuple[str, ...]) -> np.ndarray:
    """For each coordinate, how much of what the patches tell goes best with MediaPipe's inside clips. -> (20,)"""
    steps = np.linspace(0, 1, 21)
    mixes = [within_clips(looks.codes + share * (read - looks.codes), looks) for share in steps]
    shares = np.zeros(read.shape[1], np.float32)
    for group in groups:
        for number, column in enumerate(columns_of((group,))):
            found = np.array([mix[f"{group} {number + 1}"]["correlation"] for mix in mixes])
            if np.isfinite(found).all():
                shares[column] = steps[found.argmax()]
        if group == "lids":  # the two eyes are alike
            shares[columns_of((group,))] = shares[columns_of((group,))].mean()
    return shares


def is_left_out(identity: str) -> bool:
    """Whether a person of the training split decides the shares: a hash decides."""
    return zlib.crc32(f"reader {identity}".encode()) % LEFT_OUT == 0


def within_clips(found: np.ndarray, looks: Looks) -> dict[str, dict[str, float]]:
    """How codes (N, 20) go with MediaPipe's, by coordinate of the expression.

    correlation: inside a clip, mean over the clips in which the coordinate moves (MOVES); rms: of the error inside
    clips; slope: of what is found over what is wanted, there; absolute: rms of the whole error.
    """
    numbers, clips = {}, np.unique(looks.clips)
    for group in ("mouth", "lids", "gaze"):
        for number, column in enumerate(columns_of((group,))):
            pairs = [(found[looks.clips == clip, column], looks.wanted[looks.clips == clip, column]) for clip in clips]
            moves = [correlation(*pair, MOVES) if pair[0].std() > 1e-6 else 0.0 for pair in pairs]
            centred = [np.concatenate([one[side] - one[side].mean() for one in pairs]) for side in (0, 1)]
            error = found[:, column] - looks.wanted[:, column]
            numbers[f"{group} {number + 1}"] = {
                "correlation": round(float(np.nanmean(moves)), 4) if np.isfinite(moves).any() else float("nan"),
                "rms": round(float(np.sqrt(np.mean((centred[0] - centred[1]) ** 2))), 4),
                "slope": round(float(centred[0] @ centred[1] / max(centred[1] @ centred[1], 1e-9)), 4),
                "absolute": round(float(np.sqrt(np.mean(error**2))), 4),
            }
    return numbers


def batches(sampler: PatchSampler) -> Iterator[dict[str, Tensor]]:
    """Endless batches."""
    while True:
        yield sampler.batch()


def train_reader(
    data: Path, output: Path, config: ReaderTraining, space: MotionSpace, nets: ReaderNets | None = None,
    talk: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Trains for `config.minutes` or `steps`; writes `reader.safetensors` (moving average, fp16) and `reader.jsonl`.

    nets: go on from their weights. Returns the weights' path. Raises InputError when there is nothing to train on.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    output.mkdir(parents=True, exist_ok=True)
    landmarks = NetworkLandmarker(passes=1)
    if nets is None:
        nets = ReaderNets()
        nets.start_from(landmarks.net)
    looks = take_looks(load_labelled(data, False, CROP, config.stride), space, landmarks, config, talk)
    talk(f"{len(np.unique(looks.clips))} clips of {len(np.unique(looks.people))} people, {len(looks.codes)} frames")
    left_out = np.array([is_left_out(person) for person in looks.people])
    trainer = learn(looks.of(~left_out), nets, config, output / "reader.jsonl", talk)
    if left_out.any():
        trainer.weigh(looks.of(left_out))
    held_out = take_looks(load_labelled(data, True, CROP, 2), space, landmarks, None)
    numbers = trainer.compare(held_out)
    talk(json.dumps(numbers))
    cv2.setNumThreads(-1)
    return trainer.save(output / "reader.safetensors", numbers)


def learn(
    looks: Looks, nets: ReaderNets, config: ReaderTraining, curve: Path, talk: Callable[[str], None]
) -> ReaderTrainer:
    """The training itself, on looks in memory."""
    trainer = ReaderTrainer(nets, config)
    take_steps(trainer, ahead(batches(PatchSampler(looks, config))), curve, talk)
    return trainer
