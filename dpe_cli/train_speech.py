"""Training of the speech networks on prepared clips with sound: AudioExpNet and SyncNet, then PoseVAE.

Targets are the measured motion coordinates of the clips at 25 frames a second, so no picture is looked at and a run is
minutes on a CPU. Data are few: the sound is varied (loudness, tone, length of the vocal tract, noise, masks), and what
is learnt of the mouth is its difference from the same person's closed mouth.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.dataset import split_of
from dpe_cli.errors import InputError
from dpe_cli.landmarks import LIPS_INNER, LIPS_OUTER, mouth_opening
from dpe_cli.models import SpeechConfig, SpeechNets
from dpe_cli.motion_space import COORDINATES, POSE_DIM, MotionSpace, normalise
from dpe_cli.speech import FLOOR, GRID, HOP, RATE, REACH, WINDOW, measure, mel_columns
from dpe_cli.trainer import follow
from dpe_cli.weights import save

MOUTH, LIDS = COORDINATES["mouth"], COORDINATES["lids"]
CLOSED = 0.1  # share of a clip's frames, those with the smallest opening, that tell its closed mouth
PAD = 160  # mel columns of a clip before its first frame and after its last
SHORTEST = 40  # motion frames of a clip
TEMPO = 0.08  # spread of the logarithm of the tempo in training
KNOWN = 20  # motion frames that tell a person's usual mouth, least
LIPS = [*LIPS_OUTER, *LIPS_INNER]


@dataclass(frozen=True)
class SpeechTraining:
    """Everything that a run depends on; written beside its weights."""

    minutes: float = 10.0
    steps: int = 0  # instead of minutes
    batch: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.02
    ema: float = 0.998
    frames: int = 50  # of a sample, a multiple of five
    mouth_weight: float = 0.3
    velocity_weight: float = 0.5
    opening_weight: float = 0.5
    lips_weight: float = 3.0
    sync_weight: float = 0.1
    kl_weight: float = 0.002
    known: float = 0.85  # share of the samples in which the person's usual mouth is known
    silence: float = 0.06  # share of the samples that are noise without speech, with a closed mouth
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Talk:
    """A prepared clip with speech, n motion frames at 25 a second."""

    name: str
    identity: str
    path: Path  # of its .npz
    rows: np.ndarray  # (n,) the prepared frame nearest to each motion frame
    mel: np.ndarray  # (3.2 n + 2 PAD, 80); frame i lies at column PAD + 3.2 i
    mouth: np.ndarray  # (n, 8) from the closed mouth
    closed: np.ndarray  # (8,) the closed mouth itself
    pose: np.ndarray  # (n, 6) from the clip's median
    lids: np.ndarray  # (n, 2)
    opening: np.ndarray  # (n,) of the mouth, over the distance of the outer eye corners
    lips: np.ndarray  # (n, 40, 3) outer and inner lips in the head's frame

    def __len__(self) -> int:
        return len(self.mouth)

    @cached_property
    def closed_lips(self) -> np.ndarray:
        """Lip points of the closed mouth, (40, 3)."""
        return self.lips[np.argsort(self.opening)[: max(1, round(CLOSED * len(self)))]].mean(0)


def load_talks(folder: Path, space: MotionSpace, held_out: bool) -> list[Talk]:
    """The clips of one split that have sound. Raises InputError where none has."""
    talks = []
    for path, identity in split_of(folder, held_out):
        with np.load(path) as data:
            if "sound" not in data or (data["times"][-1] - data["times"][0]) * GRID < SHORTEST:
                continue
            talks.append(read_talk(path, identity, dict(data), space))
    if not talks:
        raise InputError(
            f"{folder}: no prepared clips with sound to {'test' if held_out else 'train'} on",
            f"prepare talking faces at 25 frames a second: dpe prepare VIDEOS --fps 25 -o {folder}",
        )
    return talks


def read_talk(path: Path, identity: str, data: dict[str, np.ndarray], space: MotionSpace) -> Talk:
    """A clip on the grid of 25 frames a second. data: what `dpe prepare` stored."""
    shapes, scale, rotation, translation = normalise(data["points"], space.template)
    pose = space.pose(scale, rotation, translation[:, :2], 256)
    codes = np.concatenate([pose, space.expression(shapes, data["blendshapes"])], 1)
    times, grid = data["times"], np.arange(data["times"][0], data["times"][-1], 1 / GRID)
    grid = grid[: len(grid) // 5 * 5]

    def on_grid(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(len(values), -1)
        columns = [np.interp(grid, times, column) for column in flat.T]
        return np.stack(columns, 1).reshape(len(grid), *values.shape[1:]).astype(np.float32)

    codes, opening = on_grid(codes), on_grid(mouth_opening(data["points"]))
    count = max(1, round(CLOSED * len(grid)))
    closed = codes[np.argsort(opening)[:count], MOUTH].mean(0)
    mel = columns_of(data, grid[0], len(grid) * 16 // 5)
    rows = np.abs(times[None] - grid[:, None]).argmin(1)
    median = np.median(codes[:, :POSE_DIM], 0)
    return Talk(
        path.stem, identity, path, rows, mel, codes[:, MOUTH] - closed, closed, codes[:, :POSE_DIM] - median,
        codes[:, LIDS], opening,
        on_grid(shapes[:, LIPS]),
    )  # fmt: skip


def columns_of(data: dict[str, np.ndarray], first: float, count: int) -> np.ndarray:
    """Mel columns of a prepared clip's sound, speech at its usual level: `count` of them, 80 a second, and PAD more
    before and after. Column PAD lies at `first` seconds. -> (count + 2 PAD, 80)"""
    samples = data["sound"].astype(np.float32) / 32768
    gain = measure([samples]).gain
    begin = round((first - float(data["sound_start"])) * RATE) - PAD * HOP - WINDOW // 2 - 1
    end = begin + (count + 2 * PAD - 1) * HOP + WINDOW + 1
    window = np.zeros(end - begin, np.float32)
    inside = samples[max(begin, 0) : max(end, 0)]
    window[max(-begin, 0) :][: len(inside)] = gain * inside
    return mel_columns(window)


# Samples


class Sampler:
    """Draws stretches of clips, each person as often as another, and varies their sound."""

    def __init__(self, talks: list[Talk], config: SpeechConfig, settings: SpeechTraining):
        self.talks, self.config, self.settings = talks, config, settings
        self.people = sorted({talk.identity for talk in talks})
        self.of = {person: [talk for talk in talks if talk.identity == person] for person in self.people}
        self.mean_mouth = np.concatenate([talk.mouth for talk in talks]).mean(0)
        self.mean_spread = np.mean([talk.mouth.std(0) for talk in talks], 0)
        self.random = np.random.default_rng(settings.seed)

    def batch(self, frames: int, reach: int) -> dict[str, Tensor]:
        """mel (B, 80, 3.2 (frames + 2 reach) + 16), mouth (B, frames, 8), lips from the closed ones (B, frames, 40, 2),
        closed and usual mouth and its spread (B, 8), pose (B, frames, 6), style (B,)."""
        rows = [self.sample(frames, reach) for _ in range(self.settings.batch)]
        return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}

    def sample(self, frames: int, reach: int) -> dict[str, np.ndarray]:
        """One row of a batch."""
        random = self.random
        person = int(random.integers(len(self.people)))
        talks = [talk for talk in self.of[self.people[person]] if len(talk) >= frames]
        talks = talks or [talk for talk in self.talks if len(talk) >= frames]
        talk = talks[random.integers(len(talks))]
        start = int(random.integers((len(talk) - frames) // 5 + 1)) * 5
        mel, mouth, lips = self.at_tempo(talk, start, frames, reach)
        usual, spread = self.mean_mouth, self.mean_spread
        told = self.reference(talk, start, start + frames)
        if len(told) >= KNOWN and random.random() < self.settings.known:
            usual, spread = np.median(told, 0), told.std(0)
        if random.random() < self.settings.silence:  # nobody speaks: the mouth is closed
            mel, mouth, lips = self.noise(mel.shape[1]), np.zeros_like(mouth), np.zeros_like(lips)
        return {
            "mel": self.vary(mel), "mouth": mouth, "lips": lips, "closed": talk.closed,
            "usual": usual.astype(np.float32), "spread": spread.astype(np.float32),
            "pose": talk.pose[start : start + frames],
            "style": np.int64(person % self.config.styles),
        }  # fmt: skip

    def at_tempo(self, talk: Talk, start: int, frames: int, reach: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A stretch spoken faster or slower: mel (80, C), mouth (frames, 8), lips from the closed ones (frames, 40, 2),
        linear between columns and frames."""
        tempo = float(np.clip(np.exp(self.random.normal(0, TEMPO)), 0.85, 1.18))
        middle = start + (frames - 1) / 2
        if min(middle, len(talk) - 1 - middle) < tempo * (frames - 1) / 2:
            tempo = 1.0
        times = middle + (np.arange(frames) + start - middle) * tempo
        columns = start - reach + (np.arange((frames + 2 * reach) * 16 // 5 + 16) - 8) / 3.2
        columns = PAD + 3.2 * (middle + (columns - middle) * tempo)
        lips = (talk.lips - talk.closed_lips)[..., :2]
        return between(talk.mel, columns).T, between(talk.mouth, times), between(lips, times)

    def reference(self, talk: Talk, start: int, end: int) -> np.ndarray:
        """Mouths that tell how a person speaks: of another clip, or of this one before `start` or after `end`, for in
        use they are never those that are sought. (N, 8)"""
        random = self.random
        others = self.of[talk.identity]
        other = others[random.integers(len(others))]
        mouths = other.mouth if other is not talk else max(talk.mouth[:start], talk.mouth[end:], key=len)
        long = int(random.integers(KNOWN, 5 * KNOWN))
        begin = int(random.integers(max(1, len(mouths) - long + 1)))
        return mouths[begin : begin + long]

    def noise(self, columns: int) -> np.ndarray:
        """What a room sounds like without speech. (80, columns)"""
        tone = np.cumsum(self.random.normal(0, 0.12, 80))
        level = self.random.uniform(-4.5, -1.0)
        return (level + tone[:, None] + self.random.normal(0, 0.35, (80, columns))).astype(np.float32)

    def vary(self, mel: np.ndarray) -> np.ndarray:
        """Another loudness, tone, vocal tract and room; bands and moments masked. (80, C) -> (80, C)"""
        random = self.random
        decibel = 2 * REACH / -FLOOR  # of a column's unit
        place = np.arange(80) * np.exp(random.normal(0, 0.05)) + random.normal(0, 1.0)
        below = np.clip(place.astype(int), 0, 78)
        share = np.clip(place - below, 0, 1)[:, None].astype(np.float32)
        mel = mel[below] * (1 - share) + mel[below + 1] * share
        tilt = np.linspace(-1, 1, 80)[:, None]
        mel = mel + decibel * (random.normal(0, 2.5) + random.normal(0, 3) * tilt + random.normal(0, 3) * (tilt**2))
        if random.random() < 0.5:
            mel = np.logaddexp(8 * mel, 8 * (self.noise(mel.shape[1]) - 0.8)) / 8
        for _ in range(2):
            low, wide = int(random.integers(80)), int(random.integers(12))
            mel[low : low + wide] = mel.mean()
            at, long = int(random.integers(mel.shape[1])), int(random.integers(8))
            mel[:, at : at + long] = mel.mean()
        return np.clip(mel, -REACH, REACH).astype(np.float32)


def between(series: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values of (N, ...) at fractional places inside it, linear between two. -> (len(places), ...) float32"""
    before = np.minimum(np.floor(places + 1e-6).astype(int), len(series) - 2)
    share = (places - before).reshape(-1, *[1] * (series.ndim - 1))
    return (series[before] * (1 - share) + series[before + 1] * share).astype(np.float32)


def stretch_of(talk: Talk, start: int, frames: int, reach: int) -> np.ndarray:
    """Mel columns that a network with this reach hears for motion frames from `start`, a multiple of 5. (80, C)"""
    first = PAD + (start - reach) * 16 // 5 - 8
    return talk.mel[first : first + (frames + 2 * reach) * 16 // 5 + 16].T


def whole(talk: Talk, reach: int) -> Tensor:
    """Everything that is heard of a clip. (1, 80, C)"""
    return torch.from_numpy(stretch_of(talk, 0, len(talk), reach).copy())[None]


# AudioExpNet and SyncNet


def audio_loss(
    nets: SpeechNets, batch: dict[str, Tensor], spread: Tensor, settings: SpeechTraining
) -> dict[str, Tensor]:
    """Named terms, already weighted: coordinates in units of their spread within clips."""
    found = nets.expression.each(batch["mel"], batch["closed"], batch["usual"], batch["spread"]).float()
    wanted, reading = batch["mouth"], nets.lips[..., :2]
    opening = (found - wanted) @ nets.aperture
    velocity = (found.diff(dim=-2) - wanted.diff(dim=-2)) / spread
    lips = torch.tensordot(found, reading, 1) - batch["lips"]
    usual = torch.tensordot(nets.mean_mouth, reading, 1) - batch["lips"]
    reach = nets.config.reach * 16 // 5
    heard = nets.sync.hear(batch["mel"][..., reach:-reach])
    seen = nets.sync.watch(wanted)
    return {
        "mouth": ((found - wanted) / spread).square().mean() * settings.mouth_weight,
        "lips": lips.norm(dim=-1).mean() / usual.norm(dim=-1).mean() * settings.lips_weight,
        "velocity": velocity.square().mean() * settings.velocity_weight,
        "opening": opening.square().mean() / (wanted @ nets.aperture).var().clamp_min(1e-6) * settings.opening_weight,
        "sync": contrast(heard, seen, nets.sync.scale.exp()) * settings.sync_weight,
    }


def contrast(heard: Tensor, seen: Tensor, scale: Tensor) -> Tensor:
    """Which moment of which clip belongs to which: cross entropy both ways. Two (B, n, 64) unit vectors."""
    some = slice(None, None, 6)  # neighbours are the same moment
    heard, seen = (vectors[:, some].flatten(0, 1) for vectors in (heard, seen))
    likeness = scale.clamp(max=30) * heard @ seen.T
    right = torch.arange(len(heard))
    return (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2


# PoseVAE


def pose_loss(nets: SpeechNets, batch: dict[str, Tensor], settings: SpeechTraining) -> dict[str, Tensor]:
    """Named terms, already weighted: poses in units of their spread within clips."""
    net, wanted = nets.pose, batch["pose"][:, : nets.config.window] / nets.pose_scale
    heard = net.hear(batch["mel"])
    mean, log_variance = net.encode(wanted, heard, batch["style"])
    latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    found = net.decode(latent, heard, batch["style"])
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
    return {
        "pose": (found - wanted).square().mean(),
        "velocity": (found.diff(dim=1) - wanted.diff(dim=1)).square().mean() * 20 * settings.velocity_weight,
        "kl": kl * settings.kl_weight,
    }


# A run


def measure_people(nets: SpeechNets, talks: list[Talk]) -> Tensor:
    """Fills in what the networks know of people, by linear regression inside clips; gives the coordinates' spread."""
    mouth = np.concatenate([talk.mouth - talk.mouth.mean(0) for talk in talks])

    def by_coordinate(values: list[np.ndarray]) -> np.ndarray:
        moved = np.concatenate([value - value.mean(0) for value in values])
        return np.linalg.lstsq(mouth, moved.reshape(len(moved), -1), rcond=None)[0].reshape(8, *moved.shape[1:])

    aperture = by_coordinate([talk.opening for talk in talks])
    shut = float(np.mean([np.sort(t.opening)[: max(1, round(CLOSED * len(t)))].mean() for t in talks]))
    zero = float(np.mean([(t.opening - (t.mouth + t.closed) @ aperture).mean() for t in talks]))
    lids = [np.quantile(talk.lids, [0.01, 0.5], axis=0) for talk in talks]
    pose = np.concatenate([talk.pose - talk.pose.mean(0) for talk in talks])
    known = {
        "aperture": aperture, "closed": np.array([zero, shut]),
        "mean_mouth": np.concatenate([talk.mouth for talk in talks]).mean(0),
        "mean_spread": np.mean([talk.mouth.std(0) for talk in talks], 0),
        "lips": by_coordinate([talk.lips for talk in talks]),
        "blink": np.mean([low - middle for low, middle in lids], 0), "pose_scale": np.maximum(pose.std(0), 0.05),
    }  # fmt: skip
    for name, value in known.items():
        getattr(nets, name).copy_(torch.from_numpy(np.asarray(value, np.float32)))
    return torch.from_numpy(mouth.std(0)).clamp_min(0.05)


def train_speech(
    stage: str, data: Path, output: Path, space: MotionSpace, settings: SpeechTraining, nets: SpeechNets | None = None,
    talk: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """A run of stage `audio` or `pose`; writes `speech.safetensors` (moving average, fp16) and `speech.jsonl`.

    nets: to go on from; stage `pose` without them leaves the mouth untrained. Raises InputError without sound.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    talks = load_talks(data, space, held_out=False)
    nets = (nets or SpeechNets(SpeechConfig())).train()
    spread = measure_people(nets, talks)
    sampler = Sampler(talks, nets.config, settings)
    people, seconds = len(sampler.people), sum(map(len, talks)) / GRID
    talk(f"{len(talks)} clips of {people} people, {seconds:.0f} seconds of speech")
    learning = nets.pose if stage == "pose" else torch.nn.ModuleList([nets.expression, nets.sync])
    optimiser = torch.optim.AdamW(learning.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    average = {key: value.detach().clone() for key, value in nets.state_dict().items()}
    started, step, gone, terms = time.monotonic(), 0, 0.0, []
    while gone < 1:
        rate = min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (1 + np.cos(np.pi * gone)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * rate
        if stage == "pose":
            length = -(-nets.config.window // 5) * 5
            losses = pose_loss(nets, sampler.batch(length, 0), settings)
        else:
            batch = sampler.batch(settings.frames, nets.config.reach)
            with torch.autocast("cpu", torch.bfloat16):
                losses = audio_loss(nets, batch, spread, settings)
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimiser.step()
        step += 1
        follow(average, nets, settings.ema, step)
        terms.append({key: float(value.detach()) for key, value in losses.items()})
        minutes = (time.monotonic() - started) / 60
        gone = step / settings.steps if settings.steps else minutes / settings.minutes
        if step % 100 == 0:
            means = {key: round(float(np.mean([term[key] for term in terms])), 5) for key in terms[0]}
            line = json.dumps({"stage": stage, "step": step, "minutes": round(minutes, 2), **means})
            terms.clear()
            talk(line)
            with (output / "speech.jsonl").open("a") as file:
                file.write(line + "\n")
    path = output / "speech.safetensors"
    about = {"stage": stage, "training": asdict(settings), "steps": step, "clips": len(talks), "people": people}
    save(path, average, nets.config, about, half=True)
    return path
