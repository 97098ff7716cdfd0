"""What speech makes a face do, at any moment: the mouth by AudioExpNet, the head by PoseVAE, blinks by chance.

All is reckoned on a grid of 25 motion frames a second, in blocks that begin at fixed frames and see a fixed window of
sound, and all chance is drawn by block: whoever asks from the middle on gets the same numbers, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpe_cli.errors import InputError
from dpe_cli.models import SpeechNets
from dpe_cli.motion_space import POSE_DIM
from dpe_cli.speech import (
    GATE_HALO,
    GRID,
    HOP,
    LEVEL_WINDOW,
    RATE,
    WINDOW,
    Loudness,
    Samples,
    frame_levels,
    gate,
    measure,
    mel_columns,
)
from dpe_cli.tracks import read_sound
from dpe_cli.weights import SPEECH, load_speech

BLOCK = 100  # motion frames, a multiple of five
EDGE = 5  # further frames on each side of a block, for the smoothing
SMOOTHING = np.array([0.2, 0.6, 0.2])  # of the mouth over three frames: a Gaussian of sigma 0.67
POSE_STEP = 20  # motion frames between the beginnings of two pose windows, a multiple of five
BLINK_SECONDS = 3.2  # a blink somewhere in each stretch of this length
BLINK = (0.0, 0.5, 0.9, 1.0, 0.9, 0.5, 0.0)  # how far lids are shut, motion frame by motion frame
CLOSED = 0.15  # share of a source's frames, those with the smallest opening, that tell its closed mouth
SPEAKS = 0.02  # spread of the opening over the eyes' distance, above which a source counts as speaking
GENERATE = "generate"


def load_nets(weights: str | Path = SPEECH) -> SpeechNets:
    """The speech networks, fixed. Raises WeightsError."""
    return load_speech(weights).networks().eval().requires_grad_(False)


def read_loudness(path: Path) -> Loudness:
    """Length and loudness of the speech in a file. Raises InputError."""
    loudness = measure(read_sound(path, RATE))
    if not loudness.seconds:
        raise InputError(f"{path} holds no sound", "name a file with speech in it")
    return loudness


def columns_for(samples: Samples, gain: float, frame: int, frames: int) -> torch.Tensor:
    """Mel columns for motion frames from `frame`, margins of the networks' front end included. (1, 80, C)"""
    first = (frame * 16 // 5 - 8) * HOP - WINDOW // 2 - 1
    count = frames * 16 // 5 + 16
    heard = samples.window(first, first + (count - 1) * HOP + WINDOW + 1)
    return torch.from_numpy(mel_columns(heard * np.float32(gain)).T.copy())[None]


@dataclass(frozen=True)
class Person:
    """What speech has to know of a face: its closed mouth, how far from that it usually is in speech, and how far it
    spreads about that. (8,) each"""

    closed: np.ndarray
    usual: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray, nets: SpeechNets) -> "Person":
        """By motion codes (N, 20) of some frames.

        Closed is the mean of those that are open least; where even these are open, they are closed along the way that
        opens mouths. Usual is the median, and spread the standard deviation, where the mouth moves as in speech, else
        both are those of all people.
        """
        mouths = codes[:, POSE_DIM : POSE_DIM + nets.config.mouth].astype(np.float64)
        aperture, (zero, shut) = nets.aperture.double().numpy(), nets.closed.double().tolist()
        opening = mouths @ aperture + zero
        least = np.argsort(opening, kind="stable")[: max(1, round(CLOSED * len(mouths)))]
        excess = max(0.0, float(opening[least].mean()) - shut)
        closed = mouths[least].mean(0) - aperture * excess / (aperture @ aperture)
        speaks = len(mouths) > 1 and opening.std() > SPEAKS
        usual = np.median(mouths, 0) - closed if speaks else nets.mean_mouth.numpy()
        spread = mouths.std(0) if speaks else nets.mean_spread.numpy()
        return cls(*(known.astype(np.float32) for known in (closed, usual, spread)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As AudioExpNet takes them, (1, 8) each."""
        return tuple(torch.from_numpy(known)[None] for known in (self.closed, self.usual, self.spread))


def hear(path: Path, loudness: Loudness) -> Callable[[int, int], torch.Tensor]:
    """`columns_for` of a file; frames may not go back."""
    samples = Samples.of(path)
    return lambda frame, frames: columns_for(samples, loudness.gain, frame, frames)


class Grid:
    """Values on the motion grid, made block by block as time goes on; `make(block)` gives (size, K)."""

    def __init__(self, make: Callable[[int], np.ndarray], size: int = BLOCK):
        self.make, self.size = make, size
        self.blocks: dict[int, np.ndarray] = {}

    def at(self, seconds: float) -> np.ndarray:
        """The value (K,) at a time that is not earlier than the one before, linear between two motion frames."""
        place = seconds * GRID
        before = int(np.floor(place + 1e-6))
        share = max(0.0, place - before)
        value = self.frame(before)
        return value if share < 1e-6 else value + np.float32(share) * (self.frame(before + 1) - value)

    def frame(self, number: int) -> np.ndarray:
        """The value (K,) of a motion frame."""
        block = number // self.size
        if block not in self.blocks:
            self.blocks = {old: values for old, values in self.blocks.items() if old == block - 1}
            self.blocks[block] = self.make(block)
        return self.blocks[block][number % self.size]


class SpeechMotion:
    """The mouth of whoever speaks what is in a file: (9,) at each time, eight coordinates from the closed mouth, and
    how far the gate is open, in [0, 1]. Times may not go back. After the speech, and before it, the mouth is closed.

    person: whose mouth it is. loop: speech begins anew where it ends.
    """

    def __init__(self, path: Path, nets: SpeechNets, loudness: Loudness, person: "Person", loop: bool = False):
        self.path, self.nets, self.loudness, self.loop = path, nets, loudness, loop
        self.person = person.tensors()
        self.turn = 0
        self.begin()

    def begin(self) -> None:
        """From the start of the file again."""
        self.hear, self.levels = hear(self.path, self.loudness), Samples.of(self.path)
        self.grid = Grid(self.block)

    def at(self, seconds: float) -> np.ndarray:
        """(9,) float32, see the class."""
        if self.loop:
            turn, seconds = divmod(seconds, self.loudness.seconds)
            if turn != self.turn:
                self.turn = turn
                self.begin()
        return self.grid.at(seconds)

    @torch.inference_mode()
    def block(self, number: int) -> np.ndarray:
        """The motion frames of one block, (BLOCK, 9)."""
        reach, first = self.nets.config.reach, number * BLOCK
        mel = self.hear(first - EDGE - reach, BLOCK + 2 * (EDGE + reach))
        mouth = self.nets.expression(mel, *self.person)[0].numpy()
        windows = np.lib.stride_tricks.sliding_window_view(mouth[EDGE - 1 : EDGE + BLOCK + 1], 3, axis=0)
        count = BLOCK + 2 * GATE_HALO
        step = RATE // GRID
        start = (first - GATE_HALO) * step - LEVEL_WINDOW // 2
        heard = self.levels.window(start, start + (count - 1) * step + LEVEL_WINDOW)
        opened = gate(frame_levels(heard, count), self.loudness.level)
        return np.concatenate([windows @ SMOOTHING, opened[:, None]], 1).astype(np.float32)


class PoseMotion:
    """A head that moves as one that speaks does: (6,) at each time, pose coordinates from the usual pose.

    Windows overlap and are cross-faded; what is drawn for each by chance changes slowly from one to the next.
    """

    def __init__(self, hear: Callable[[int, int], torch.Tensor], nets: SpeechNets, style: int, seed: int = 0):
        """hear: number of the first motion frame and how many -> mel columns, as `columns_for` gives them."""
        self.hear, self.nets, self.style, self.seed = hear, nets, style, seed
        window = nets.config.window
        ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(window - POSE_STEP) + 0.5) / (window - POSE_STEP))
        self.fade = np.concatenate([ramp, np.ones(2 * POSE_STEP - window), ramp[::-1]]).astype(np.float32)
        self.windows: dict[int, np.ndarray] = {}
        self.grid = Grid(self.block, POSE_STEP)

    def at(self, seconds: float) -> np.ndarray:
        """(6,) float32; times may not go back."""
        return self.grid.at(seconds)

    def block(self, number: int) -> np.ndarray:
        """POSE_STEP motion frames: the end of the window before, cross-faded into this one."""
        before, here = self.window(number - 1), self.window(number)
        self.windows = {number: here}
        result = here[:POSE_STEP] * self.fade[:POSE_STEP, None]
        overlap = len(before) - POSE_STEP
        result[:overlap] += before[POSE_STEP:] * self.fade[POSE_STEP:, None]
        return result

    @torch.inference_mode()
    def window(self, number: int) -> np.ndarray:
        """What the network makes of one window, (window, 6)."""
        if number in self.windows:
            return self.windows[number]
        length = -(-self.nets.config.window // 5) * 5
        mel = self.hear(number * POSE_STEP, length)
        drawn = np.mean([self.chance(number + near) for near in (-1, 0, 1)], 0) * np.sqrt(3)
        latent = torch.from_numpy(drawn.astype(np.float32))[None]
        pose = self.nets.pose.decode(latent, self.nets.pose.hear(mel), torch.tensor([self.style]))
        return (pose[0] * self.nets.pose_scale).numpy()

    def chance(self, number: int) -> np.ndarray:
        """What is drawn for a window, (latent,) of unit spread."""
        return np.random.default_rng((self.seed, 1, number + 2)).normal(size=self.nets.config.latent)


def blink_at(seconds: float, seed: int = 0) -> float:
    """How far the lids are shut by a blink at this time, in [0, 1]."""
    stretch = int(seconds // BLINK_SECONDS)
    length = (len(BLINK) - 1) / GRID
    start = np.random.default_rng((seed, 2, stretch)).uniform(0.3, BLINK_SECONDS - length)
    return float(np.interp((seconds - stretch * BLINK_SECONDS - start) * GRID, np.arange(len(BLINK)), BLINK, 0, 0))
