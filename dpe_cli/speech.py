"""What the networks hear of speech: 16 kHz samples, log-mel columns, and how loud speech is in them.

The constants are those of Wav2Lip and SadTalker. Everything is local in time, but for one number, the loudness of the
speech, which is measured once over the whole sound: a part of a sound gives exactly the columns that the whole gives.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from dpe_cli.tracks import read_sound

RATE = 16000  # samples a second
HOP, WINDOW = 200, 800  # samples: 80 columns a second, of 50 ms each
COLUMNS = RATE // HOP  # a second
BANDS, LOWEST, HIGHEST = 80, 55.0, 7600.0  # mel bands, Hz
EMPHASIS = 0.97
REFERENCE, FLOOR, REACH = 20.0, -100.0, 4.0  # dB, dB; columns lie in [-REACH, REACH]
GRID = 25  # motion frames a second
LEVEL_WINDOW = 1600  # samples: 100 ms, over which loudness is measured
QUIETEST = -60.0  # dB of full scale: below it nothing is speech
WANTED_LEVEL = -20.0  # dB: speech is brought to it before the columns are made
MOST_GAIN = 40.0  # dB


@cache
def mel_filters() -> np.ndarray:
    """Triangular filters on Slaney's mel scale, each of area one. (BANDS, WINDOW // 2 + 1) float32"""

    def to_mel(hertz: np.ndarray) -> np.ndarray:  # linear up to 1000 Hz, logarithmic above
        return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4))

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    edges = to_hertz(np.linspace(*to_mel(np.array([LOWEST, HIGHEST])), BANDS + 2))
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    heights = 2 / (edges[2:] - edges[:-2])
    return (np.maximum(0, np.minimum(rising, falling)) * heights[:, None]).astype(np.float32)


def mel_columns(samples: np.ndarray) -> np.ndarray:
    """Log-mel columns of samples (N,) in [-1, 1]: column i is centred on sample WINDOW // 2 + 1 + i * HOP.

    -> (1 + (N - WINDOW - 1) // HOP, BANDS) float32 in [-REACH, REACH]; the first sample only serves the emphasis.
    """
    emphasised = samples[1:] - np.float32(EMPHASIS) * samples[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(emphasised, WINDOW)[::HOP]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
    spectra = np.abs(np.fft.rfft(frames * hann)).astype(np.float32)
    # Sparse, as the filters are: on some processors the rounding of a dense product depends on the number of columns.
    loudness = (csr_array(mel_filters()) @ spectra.T).T
    decibels = 20 * np.log10(np.maximum(loudness, 10 ** (FLOOR / 20))) - REFERENCE
    return np.clip(2 * REACH * (decibels - FLOOR) / -FLOOR - REACH, -REACH, REACH).astype(np.float32)


def frame_levels(samples: np.ndarray, count: int) -> np.ndarray:
    """Loudness around each of `count` motion frames, dB of full scale. (count,)

    samples: LEVEL_WINDOW of them around the first frame, then RATE // GRID more for each further one.
    """
    windows = np.lib.stride_tricks.sliding_window_view(samples, LEVEL_WINDOW)[:: RATE // GRID][:count]
    return 10 * np.log10(np.maximum(np.mean(windows.astype(np.float64) ** 2, axis=1), 1e-10))


@dataclass
class Samples:
    """A sound read forwards, in constant memory; before its start and after its end it is silent."""

    blocks: Iterator[np.ndarray]
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    start: int = 0  # number of the first kept sample
    over: bool = False

    @classmethod
    def of(cls, path: Path) -> "Samples":
        """Of a file with sound in it. Raises InputError, with the first samples."""
        return cls(read_sound(path, RATE))

    def window(self, first: int, last: int) -> np.ndarray:
        """Samples first <= n < last, (last - first,) float32. `first` may never be less than in the call before."""
        parts, end = [self.kept], self.start + len(self.kept)
        while end < last and not self.over:
            block = next(self.blocks, None)
            if block is None:
                self.over = True
            else:
                end += len(block)
                if end <= first:  # skipped as a whole
                    parts, self.start = [], end
                else:
                    parts.append(block)
        kept = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        drop = min(max(0, first - self.start), len(kept))
        self.kept, self.start = kept[drop:], self.start + drop
        result = np.zeros(last - first, np.float32)
        found = self.kept[: max(0, last - self.start)]
        if self.start < last:
            result[self.start - first :][: len(found)] = found
        return result


@dataclass(frozen=True)
class Loudness:
    """Of a whole sound: how long it is and how loud the speech in it."""

    seconds: float
    level: float  # dB of full scale, mean of the frames with speech; QUIETEST where there is none

    @property
    def gain(self) -> float:
        """What samples are multiplied by so that speech has its usual level."""
        return 10 ** (min(WANTED_LEVEL - self.level, MOST_GAIN) / 20)


def measure(blocks: Iterable[np.ndarray]) -> Loudness:
    """Loudness of a sound given as blocks of samples at RATE; constant memory."""
    counts, sums, total, rest = np.zeros(120, int), np.zeros(120), 0, np.zeros(LEVEL_WINDOW // 2, np.float32)
    step = RATE // GRID
    for block in blocks:
        total += len(block)
        rest = np.concatenate([rest, block])
        number = (len(rest) - LEVEL_WINDOW) // step + 1
        if number > 0:
            found = frame_levels(rest, number)
            bins = np.clip(found + 100, 0, 119).astype(int)
            counts += np.bincount(bins, minlength=120)
            sums += np.bincount(bins, found, 120)
            rest = rest[number * step :]
    heard = np.where(np.arange(120) >= QUIETEST + 100, counts, 0)
    if not heard.sum():
        return Loudness(total / RATE, QUIETEST)
    loud = int(np.searchsorted(np.cumsum(heard), 0.95 * heard.sum()))
    active = slice(max(loud - 25, int(QUIETEST) + 100), None)
    return Loudness(total / RATE, float(sums[active].sum() / counts[active].sum()))


# Whether somebody speaks

OPENS, STAYS = -20.0, -30.0  # dB against speech: a frame above the first opens the gate, above the second keeps it open
NEAR = 4  # frames each way in which the opening one must lie
SOFT = 2  # frames each way over which the gate is smoothed
GATE_HALO = NEAR + SOFT


def gate(levels: np.ndarray, speech: float) -> np.ndarray:
    """1 where somebody speaks, 0 where nobody does. levels: (N + 2 * GATE_HALO,) dB, `speech` the usual one -> (N,)

    Hysteresis that is local in time: a frame is open that is above STAYS and has one above OPENS near it.
    """
    around = np.lib.stride_tricks.sliding_window_view(levels, 2 * NEAR + 1)
    opened = (around.max(1) > speech + OPENS) & (levels[NEAR:-NEAR] > speech + STAYS)
    weights = np.hanning(2 * SOFT + 3)[1:-1]
    return np.lib.stride_tricks.sliding_window_view(opened.astype(float), 2 * SOFT + 1) @ (weights / weights.sum())
