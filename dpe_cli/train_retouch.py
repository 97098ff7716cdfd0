"""Training of the retouching networks: what the generators draw of a mouth and of eyes, put right piece by piece.

A sample is a pair of frames of one clip (`dataset.Sampler`): the source S, what the finished generators make of it with
the driving frame's expression, and T, the driving's face bent into the source's pose. All three are cut into patches
once (the pool); the patches are small, so that a core learns from dozens a second. Outlines are drawn from what the
landmark network sees in S and from the motion codes, as in an edit.
"""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.dataset import CROP, TURNED, Clip, Sampler, load_clips, turns
from dpe_cli.engine import Engine
from dpe_cli.errors import InputError
from dpe_cli.extractors import Lpips
from dpe_cli.mesh import Mesh
from dpe_cli.models import LPIPS, PatchDiscriminator, RetouchConfig, RetouchNet
from dpe_cli.motion_space import POSE_DIM, MotionSpace
from dpe_cli.parts import PARTS, Patch
from dpe_cli.retouch import outlined
from dpe_cli.trainer import follow, weighted_l1
from dpe_cli.weights import load_retouch, save

BACKWARDS = 0.4  # share of the pairs whose frames change places: mouths and eyes that shut
AJAR = 0.3  # of the pairs in which a mouth opens: it may be any frame that opens further, not a shut one alone
BATCH = 4  # crops that are drawn at once: as many as the engine takes on a CPU, so that it encodes them once
CHANNELS = 14  # of a stored patch: source, drawn, wanted (RGB each), outlines before and after (2 each), share
HELD_OUT = 300  # samples of people who were not trained on
RIDGE = 1e-2  # of the fit of shapes to codes, per sample
FEATURES = 0.5  # weight of the adversary's features, each map over its mean size
BALANCE_STEPS = 10  # between two looks at how the adversary's gradient compares with that of all else
MOST_SAY = 20.0  # of that comparison
JUDGED = 8  # pixels to one judgement of the adversary
NOTED = 3.0  # minutes between two looks at held-out people


@dataclass(frozen=True)
class RetouchTraining:
    """Everything that a run depends on."""

    minutes: float = 50.0  # of the networks; the pool comes before
    pool: int = 9000  # pairs of frames
    eye_share: float = 0.35  # of them are chosen for lids and gaze
    open_share: float = 0.3  # for a mouth that opens
    batch: int = 16
    lr: float = 6e-4
    ema: float = 0.998
    plain: float = 0.12  # share of the time before the adversary counts; it learns from the beginning
    picture_weight: float = 10.0
    inside_share: float = 1.0  # of a pixel's weight in it, inside of the inner outlines: what is made up may differ
    perceptual_weight: float = 0.0  # of LPIPS, of patches at twice their size
    gan_weight: float = 0.5  # of the adversary: of the gradient of all else at the last layer
    judge_lr: float = 2.0  # of the adversary, of lr
    part: str = ""  # mouth or eyes: the other network stays what it was
    begun_share: float = 0.0  # of the weights gone on from, in those that are written: a mean of both errs less
    threads: int = 1
    seed: int = 0


# Shapes that go with codes


def shape_basis(clips: list[Clip]) -> np.ndarray:
    """How landmarks move, in the head's frame, with each expression coordinate: least squares within clips.

    -> (14, 478, 3) float32
    """
    codes = np.concatenate([clip.expression - clip.expression.mean(0) for clip in clips])
    shapes = np.concatenate([clip.shapes - clip.shapes.mean(0) for clip in clips]).reshape(len(codes), -1)
    gram = codes.T @ codes + RIDGE * len(codes) * np.eye(codes.shape[1])
    return np.linalg.solve(gram, codes.T @ shapes).reshape(-1, *clips[0].shapes.shape[1:]).astype(np.float32)


# The pool


@dataclass(frozen=True)
class PoolJob:
    """A part of the pool, for a process of its own."""

    data: Path
    files: dict[str, Path]  # by the network's name
    basis: np.ndarray
    weights: Path | None
    space: Path
    count: int
    held_out: bool
    seed: int
    eye_share: float
    open_share: float


class Pairs(Sampler):
    """Pairs for mouths and eyes that open, shut and look elsewhere."""

    def pick(self) -> tuple[Clip, int, int]:
        while True:
            clip, s, d = super().pick()
            if self.random.random() < self.open_share * AJAR:
                d = self.opened(clip, s := int(self.random.integers(len(clip))))
            if turns(clip, s)[d] <= TURNED:  # beyond, T does not show the driving's own mouth and eyes
                return (clip, d, s) if self.random.random() < BACKWARDS else (clip, s, d)


def make_pool(job: PoolJob) -> None:
    """Draws pairs and writes their patches: (N, height, width, CHANNELS) uint8 arrays, of the eyes twice as many."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    space = MotionSpace.load(job.space)
    clips, _ = load_clips(job.data, space, job.held_out, CROP)
    pairs = Pairs(clips, Mesh(space.template), job.seed, eye_share=job.eye_share, open_share=job.open_share)
    engine = unpainted(Engine(job.weights, device="cpu"), job.basis)
    parts = [part for part in PARTS if part.name in job.files]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in job.files}
    count = 0
    while count < job.count:
        samples = [pairs.sample() for _ in range(BATCH)]
        source, wanted = (np.stack([s[key].transpose(1, 2, 0) for s in samples]) for key in ("source", "target"))
        asked = np.stack([sample["driving_code"] for sample in samples])
        drawn = engine.edit(source, asked, None)
        for row, face in enumerate(engine.faces(source)):
            if face is None:
                continue
            count += 1
            before, after = outlined(face, asked[row, POSE_DIM:], space, job.basis)
            for part in parts:
                patch = Patch.cut((source[row], drawn[row], wanted[row]), before, after, part)
                where = np.rint(patch.share * 255).astype(np.uint8)[..., None]
                rows[part.name].append(np.concatenate([*patch.pictures, patch.outlines.transpose(1, 2, 0), where], -1))
    for name, path in job.files.items():
        np.save(path, np.stack(rows[name]))


def unpainted(engine: Engine, basis: np.ndarray) -> Engine:
    """The engine as it draws, faces by the mesh with this basis of shapes, before mouth and eyes are painted over."""
    engine.mesh.basis = basis
    engine.retoucher.looked_at = lambda crops, drawn, *_: drawn
    return engine


def tensors(patches: np.ndarray) -> dict[str, Tensor]:
    """Stored patches (B, height, width, CHANNELS) as the networks take them: pictures in [-1, 1], masks in [0, 1]."""
    planes = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    source, drawn, wanted, lines, where = planes.split((3, 3, 3, 4, 1), 1)
    return {
        "source": source * 2 - 1,
        "drawn": drawn * 2 - 1,
        "wanted": wanted * 2 - 1,
        "outlines": lines,
        "share": where,
    }


# Training


class RetouchTrainer:
    """One network, its adversary and its moving average. looks: LPIPS, where it counts."""

    def __init__(self, net: RetouchNet, config: RetouchTraining, looks: LPIPS | None = None):
        self.net, self.config, self.looks = net.to(memory_format=torch.channels_last), config, looks
        self.adversary = PatchDiscriminator().to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.5, 0.99))
        self.other = torch.optim.Adam(self.adversary.parameters(), lr=config.lr, betas=(0.0, 0.99))
        self.average = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.say: float | None = None  # what makes the adversary's gradient as large as that of all else
        self.step_number = 0

    def step(self, batch: dict[str, Tensor], progress: float) -> dict[str, float]:
        """One update of both; `progress` in [0, 1] is the share of the run that is gone. -> the terms of the loss"""
        config = self.config
        falling = min(1.0, (self.step_number + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for optimiser, times in ((self.optimiser, 1.0), (self.other, config.judge_lr)):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * falling * times
        source, lines, wanted = batch["source"], batch["outlines"], batch["wanted"]
        painted = paint(self.net, batch)
        # Only what is painted counts; divided by what that is on average, so that the terms keep their size.
        inside = torch.maximum(lines[:, 0], lines[:, 2])
        counts = batch["share"][:, 0] / 0.3 * (1 - (1 - config.inside_share) * inside)
        terms = {"picture": weighted_l1(painted, wanted, counts) * config.picture_weight}
        real = batch["drawn"] + batch["share"] * (wanted - batch["drawn"])  # around it nothing tells them apart
        if self.looks is not None:
            terms["perceptual"] = self.looks(twice(painted), twice(real)).mean() * config.perceptual_weight
        here = F.avg_pool2d(batch["share"], JUDGED)  # what is painted is judged, not what lies around it
        if config.gan_weight and progress >= config.plain:
            self.adversary.requires_grad_(False)
            judged, seen = self.adversary(painted, source, lines)
            with torch.no_grad():
                _, known = self.adversary(real, source, lines)
            alike = [F.l1_loss(one, two) / (two.abs().mean() + 1e-4) for one, two in zip(seen, known, strict=True)]
            terms["features"] = FEATURES * sum(alike) / len(alike)
            against = -weighted_mean(judged, here)
            terms["adversary"] = against * config.gan_weight * self.balance(against, sum(terms.values()))
        self.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
        self.optimiser.step()
        if config.gan_weight:
            self.adversary.requires_grad_(True)
            good, bad = (self.adversary(one, source, lines)[0] for one in (real, painted.detach()))
            loss = weighted_mean(F.relu(1 - good), here) + weighted_mean(F.relu(1 + bad), here)
            self.other.zero_grad(set_to_none=True)
            loss.backward()
            self.other.step()
            terms["judge"] = loss
        self.step_number += 1
        follow(self.average, self.net, config.ema, self.step_number)
        return {name: float(value.detach()) for name, value in terms.items()}

    def balance(self, against: Tensor, others: Tensor) -> float:
        """The factor by which the adversary's gradient at the last layer is as large as that of the other terms.

        Followed slowly, as in VQGAN (Esser and others, 2021). Without it the adversary is next to nothing, or all.
        """
        if self.say is None or self.step_number % BALANCE_STEPS == 0:
            last = self.net.leave[1].weight
            sizes = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (others, against)]
            found = float((sizes[0] / (sizes[1] + 1e-8)).clamp(max=MOST_SAY))
            self.say = found if self.say is None else 0.9 * self.say + 0.1 * found
        return self.say

    def averaged(self) -> RetouchNet:
        """A copy of the network with the moving average of its weights."""
        net = RetouchNet(self.net.config)
        net.load_state_dict(self.average)
        return net.to(memory_format=torch.channels_last).eval()


def paint(net: RetouchNet, batch: dict[str, Tensor]) -> Tensor:
    """The drawn patches as the network retouches them. (B, 3, H, W) in about [-1, 1]"""
    return batch["drawn"] + batch["share"] * net(batch["source"], batch["drawn"], batch["outlines"])


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """(B, 1, H, W) twice -> scalar"""
    return (values * weights).sum() / weights.sum()


def twice(patches: Tensor) -> Tensor:
    """Patches (B, 3, H, W) at twice their size, in [-1, 1]: LPIPS begins with strides of four pixels."""
    return F.interpolate(patches.clamp(-1, 1), scale_factor=2, mode="bilinear", align_corners=False)


@torch.inference_mode()
def evaluate(net: RetouchNet, patches: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Mean difference to the wanted patch where it is painted, in levels, drawn and retouched; and a picture of some.

    Columns of the picture: source, drawn, retouched, wanted; four of them beside each other.
    """
    errors, pictures = [], []
    for start in range(0, len(patches), 32):
        batch = tensors(patches[start : start + 32])
        painted = paint(net, batch).clamp(-1, 1)
        weight = batch["share"] / batch["share"].sum((1, 2, 3), keepdim=True)
        errors.append(
            [((one - batch["wanted"]).abs() * weight).sum((1, 2, 3)) * 127.5 / 3 for one in (batch["drawn"], painted)]
        )
        if start < 96:
            shown = torch.cat([batch["source"], batch["drawn"], painted, batch["wanted"]], 3)
            pictures.append(shown.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy())
    shown = np.concatenate(pictures)
    shown = shown[: len(shown) // 4 * 4].reshape(4, -1, *shown.shape[1:])
    grid = np.concatenate([np.concatenate(list(column)) for column in shown], 1)
    drawn, painted = (torch.cat(values).mean().item() for values in zip(*errors, strict=True))
    return {"drawn": round(drawn, 3), "retouched": round(painted, 3)}, grid


def train_part(
    name: str, files: tuple[Path, ...], held_out: Path, output: Path, config: RetouchTraining,
    start: dict[str, Tensor] | None, lpips: Path | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Trains one of the two networks in this process; gives its averaged weights. Writes curve, picture and weights."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    random = np.random.default_rng(config.seed)
    pool, test = [np.load(path, mmap_mode="r") for path in files], np.load(held_out)
    net = RetouchNet()
    if start:
        net.load_state_dict(start)
    looks = Lpips(lpips).network.requires_grad_(False) if lpips and config.perceptual_weight else None
    trainer = RetouchTrainer(net, config, looks)
    began, noted, terms = time.monotonic(), 0.0, []
    while (gone := (time.monotonic() - began) / 60) < config.minutes:
        part = pool[random.integers(len(pool))]
        patches = np.stack([part[row] for row in random.integers(0, len(part), config.batch)])
        terms.append(trainer.step(tensors(varied(patches, random)), gone / config.minutes))
        if gone - noted > NOTED:
            noted = gone
            names = dict.fromkeys(key for term in terms for key in term)
            means = {key: round(float(np.mean([term[key] for term in terms if key in term])), 4) for key in names}
            numbers, grid = evaluate(trainer.averaged(), test)
            line = {"step": trainer.step_number, "minutes": round(gone, 2), **means, **numbers}
            terms.clear()
            with (output / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            cv2.imwrite(str(output / f"{name}.png"), grid[..., ::-1])
            torch.save(trainer.average, output / f"{name}.pt")
    return trainer.average


def varied(patches: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Patches with other light and colours, the same in all three pictures of one; some mirrored."""
    result = patches.copy()
    levels = np.arange(256)[:, None] / 255
    for row in range(len(result)):
        if random.random() < 0.5 and patches.shape[1] > patches.shape[2]:  # mouths; eyes have an inner corner
            result[row] = result[row, :, ::-1]
        gain = np.exp(random.normal(0, 0.12)) * np.exp(random.normal(0, 0.05, 3))
        table = np.clip(levels ** np.exp(random.normal(0, 0.15)) * gain * 255, 0, 255).astype(np.uint8)
        pictures = result[row, ..., :9].reshape(*result.shape[1:3], 3, 3)
        for channel in range(3):
            pictures[..., channel] = table[pictures[..., channel], channel]
        result[row, ..., :9] = pictures.reshape(*result.shape[1:3], 9)
    return result


def train_retouch(
    data: Path, output: Path, config: RetouchTraining, space: Path, weights: Path | None = None,
    start: Path | None = None, lpips: Path | None = None, talk: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Makes the pool, trains both networks side by side, a process each, and writes `retouch.safetensors`.

    weights: of the generators whose drawings are retouched, by default the tool's own. start: goes on from these
    networks. lpips: folder of its weights, for `perceptual_weight`. A pool that lies in `output` already is used again.
    Raises InputError when there is nothing to train on, WeightsError where the folder does not hold LPIPS.
    """
    output.mkdir(parents=True, exist_ok=True)
    known = split(load_retouch(start).state) if start else {}
    names = dict.fromkeys(part.name for part in PARTS if config.part in ("", part.name))
    if config.part and not (names and start):
        raise InputError(f"{config.part} alone cannot be trained", "set part to mouth or eyes, and give --init")
    clips, _ = load_clips(data, MotionSpace.load(space), False, CROP)
    basis = shape_basis(clips)
    del clips
    files = {(name, k): output / f"pool-{name}-{k}.npy" for name in names for k in range(3)}  # the last: held out
    jobs = [
        PoolJob(data, {name: files[name, k] for name in names}, basis, weights, space,
                HELD_OUT if k == 2 else config.pool // 2, k == 2, config.seed + k, config.eye_share, config.open_share)
        for k in range(3)
        if not all(files[name, k].exists() for name in names)
    ]  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for job in [processes.submit(make_pool, job) for job in jobs]:
            job.result()
        talk(f"{len(np.load(files[next(iter(names)), 0], mmap_mode='r')) * 2} patches")
        runs = {
            name: processes.submit(
                train_part,
                name,
                (files[name, 0], files[name, 1]),
                files[name, 2],
                output,
                config,
                known.get(name),
                lpips,
            )
            for name in names
        }
        trained = {name: run.result() for name, run in runs.items()}
    share = config.begun_share if start else 0.0
    states = known | {name: blended(known.get(name), state, share) for name, state in trained.items()}
    path = output / "retouch.safetensors"
    save_retouch(path, states, basis)
    return path


def blended(begun: dict[str, Tensor] | None, trained: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The mean of two states of a network, the first one's weight being `share`."""
    if not share:
        return trained
    return {key: torch.lerp(value.float(), begun[key].float(), share) for key, value in trained.items()}


def split(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each network of a file."""
    names = dict.fromkeys(part.name for part in PARTS)
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        for name in names
    }


def save_retouch(path: Path, states: dict[str, dict[str, Tensor]], basis: np.ndarray) -> None:
    """Writes both networks and the basis, in 16 bits."""
    state = {f"{name}.{key}": value for name, part in states.items() for key, value in part.items()}
    save(path, state | {"basis": torch.from_numpy(basis)}, RetouchConfig(), half=True)
