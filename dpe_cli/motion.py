"""Motion codes over time: what the driving does at any moment of the source, how strongly, and how calm the result is.

Codes are smoothed by a Savitzky-Golay filter, taken by time instead of by frame number, so that it holds for variable
frame rates: each code is the value at its own time of the parabola that fits the codes around it best. It looks both
ways and therefore does not lag. SMOOTH_SECONDS is measured, on codes of our default weights: against raw codes the
tremble of a still face in a noisy clip is 0.55 and 91 to 99 % of the mouth's range stays; 0.13 s gives 0.38 and 82 to
99 %. A One-Euro filter (cutoff 4 Hz, beta 3) gives 0.45, keeps 83 to 99 % and lags by 16 to 22 ms.
"""

import csv
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dpe_cli.errors import InputError
from dpe_cli.limits import TEXT_BYTES, check_file
from dpe_cli.motion_space import COORDINATES, LARGER, POSE_SCALE, STRAY, seen_in

ENDS = ("hold", "loop", "pingpong", "trim")
SAME_TIME = 1e-6  # seconds; closer than this, two times are one: containers round, floats too
SMOOTH_SECONDS = 0.09  # each way, at smoothness 1: five codes at 24 to 30 frames a second, eleven at 60
STRONGEST = 3.0  # a strength; past it faces fall apart
STILL_SOURCE = 1.0  # of 255: what noise and compression change in pixels that stand still
STILL_CODE = 0.02  # of a code's length: what they change in the code of a still face, 0.011 at noise of 5 of 255
REST_SECONDS = 3.0  # sigma of the mean place of a head that sways: who walks, or is followed by the camera, does not
JUMP = 0.5, 0.3  # the same of a crop from one frame to the next that shows another shot
GAP = 1.5  # times the usual step between frames: a longer one may be a hole in the track


@dataclass(frozen=True, eq=False)
class MotionTrack:
    """Motion codes of a driving at the frames where it has a face; one code alone is a still, which never ends.

    times: (N,) seconds from the driving's first frame, rising. codes: (N, K) float32.
    last_time: of the driving's last frame, with or without a face; by default the last of `times`.
    Raises ValueError when these do not fit together.
    """

    times: np.ndarray
    codes: np.ndarray
    last_time: float | None = None

    def __post_init__(self) -> None:
        times, codes = np.asarray(self.times, np.float64), np.asarray(self.codes, np.float32)
        if times.ndim != 1 or codes.ndim != 2 or len(times) != len(codes) or not len(times):
            raise ValueError(f"times {times.shape} and codes {codes.shape} are not (N,) and (N, K) with N from 1")
        if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
            raise ValueError("the times of a motion track must rise")
        last = float(times[-1] if self.last_time is None else self.last_time)
        if last < times[-1]:
            raise ValueError(f"the last frame, at {last} s, comes before the last code, at {times[-1]} s")
        for name, value in (("times", times), ("codes", codes), ("last_time", last)):
            object.__setattr__(self, name, value)

    @cached_property
    def frame_time(self) -> float:
        """How long a frame is shown, seconds: the mean step between codes, holes left out. 0 for a still."""
        steps = np.diff(self.times)
        return float(steps[steps <= GAP * np.median(steps)].mean()) if len(steps) else 0.0

    @property
    def duration(self) -> float:
        """Seconds from the first frame until the last one has been shown."""
        return self.last_time + self.frame_time

    def at(self, t: float, end: str = "hold") -> np.ndarray | None:
        """The motion code (K,) at `t` seconds from the driving's first frame, linear between the neighbours in time.

        Where the driving is over, `end` decides. hold: its last code. loop: from the start again. pingpong: backwards
        and forwards, the frames at which it turns shown once. trim: None.
        """
        if end not in ENDS:
            raise ValueError(f"{end} is not one of {', '.join(ENDS)}")
        if len(self.times) == 1:
            return self.codes[0]
        if end == "trim" and t >= self.duration - SAME_TIME:
            return None
        if end == "loop":
            t = wrapped(t, self.duration)
        if end == "pingpong":
            t = wrapped(t, 2 * self.last_time)
            t = min(t, 2 * self.last_time - t)
        return self.between(t)

    def between(self, t: float) -> np.ndarray:
        """The code at a time inside the track; before its first and after its last code that one."""
        after = int(np.searchsorted(self.times, t - SAME_TIME))  # the first code that is not earlier
        if after == len(self.times):
            return self.codes[-1]
        if after == 0 or self.times[after] - t <= SAME_TIME:
            return self.codes[after]
        start, stop = self.times[after - 1], self.times[after]
        share = np.float32((t - start) / (stop - start))
        return self.codes[after - 1] + share * (self.codes[after] - self.codes[after - 1])


def wrapped(t: float, period: float) -> float:
    """`t` modulo a period, where a hair less than the period counts as its start."""
    rest = t % period
    return 0.0 if period - rest <= SAME_TIME else rest


# Smoothing


def smoothed(track: MotionTrack, seconds: float) -> MotionTrack:
    """The track through the filter described above, which sees `seconds` each way; 0 gives the track itself.

    Nothing is smoothed across a hole. A still driving stays exactly still. Fewer than four codes in reach stay as they
    are, for a parabola goes through any three.
    """
    if seconds <= 0 or len(track.times) < 2:
        return track
    codes, starts = track.codes.astype(np.float64), np.flatnonzero(after_holes(track.times)) + 1
    runs = zip(np.split(track.times, starts), np.split(codes, starts), strict=True)
    return replace(track, codes=np.concatenate([savitzky_golay(times, values, seconds) for times, values in runs]))


def after_holes(times: np.ndarray) -> np.ndarray:
    """Of each time but the first, whether the track has a hole before it. (N,) -> (N - 1,) bool

    Frames of a variable rate may be far apart for their clip, and yet no farther than what is smoothed over.
    """
    steps = np.diff(times)
    return steps > max(GAP * np.median(steps), SMOOTH_SECONDS)


def savitzky_golay(times: np.ndarray, values: np.ndarray, seconds: float) -> np.ndarray:
    """Savitzky-Golay filter of order 2 for uneven times. (N,) s, (N, K) float64 -> (N, K)"""
    starts = np.searchsorted(times, times - seconds - SAME_TIME)
    stops = np.searchsorted(times, times + seconds + SAME_TIME)
    result = np.empty_like(values)
    for here, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        powers = np.vander((times[start:stop] - times[here]) / seconds, min(3, stop - start), increasing=True)
        result[here] = np.linalg.pinv(powers)[0] @ values[start:stop]  # the parabola's value at time 0
    return result


# Heads that move in their frame


def swayed(track: MotionTrack, boxes: np.ndarray) -> MotionTrack:
    """The track with the movement of the head in its frame, which crops that follow the face leave out.

    boxes: (N, 4) x0, y0, x1, y1, the crops that gave the codes, which are of `motion_space`. Place and size of the head
    are told in the crop at its mean place of some seconds around, within limits. A still stays as it is.
    """
    if len(track.times) < 2:
        return track
    codes = track.codes.astype(np.float64)
    moved = seen_in(codes, boxes, resting(track.times, boxes)) - codes
    for name, most in (("place", STRAY), ("size", LARGER)):
        part = COORDINATES[name]
        most = most / POSE_SCALE[part]
        codes[:, part] += most * np.tanh(moved[:, part] / most)
    return replace(track, codes=codes)


def resting(times: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Mean square of squares (N, 4) over REST_SECONDS around each of their times, within its shot."""
    side = boxes[:, 2] - boxes[:, 0]
    middles = np.c_[(boxes[:, :2] + boxes[:, 2:]) / 2, np.log2(side)]
    step = np.abs(np.diff(middles, axis=0))
    new = (step[:, :2].max(1) > JUMP[0] * side[1:]) | (step[:, 2] > JUMP[1]) | after_holes(times)
    starts = np.flatnonzero(np.r_[True, new])
    mean = np.empty_like(middles)
    for start, stop in zip(starts, np.r_[starts[1:], len(times)], strict=True):
        here = times[start:stop]
        lows, highs = (np.searchsorted(here, here + sign * 3 * REST_SECONDS) for sign in (-1, 1))
        for row, (low, high) in enumerate(zip(lows, highs, strict=True)):
            weights = np.exp(-0.5 * ((here[low:high] - here[row]) / REST_SECONDS) ** 2)
            mean[start + row] = weights @ middles[start + low : start + high] / weights.sum()
    half = 2.0 ** mean[:, 2:] / 2
    return np.c_[mean[:, :2] - half, mean[:, :2] + half]


# Relative motion


def most_neutral(track: MotionTrack) -> int:
    """Number of the code of the driving's most neutral frame: the middle of its calm half.

    A face moves away from rest and comes back, and stays at rest longer than elsewhere. So of the half of the codes
    that change least around their time, the one is taken that is nearest to that half's median. Coordinates count in
    units of their own spread and need no meaning, so this serves any weights.
    """
    spread = track.codes.std(0)
    floor = 0.25 * np.median(spread)  # a coordinate that hardly moves is noise, not to be blown up
    codes = track.codes / np.maximum(spread, floor if floor > 0 else 1)
    if len(codes) < 3:
        return 0
    speed = np.linalg.norm(np.gradient(codes, track.times, axis=0), axis=1)
    calm = np.flatnonzero(speed <= np.median(speed))
    return int(calm[np.linalg.norm(codes[calm] - np.median(codes[calm], 0), axis=1).argmin()])


def nearest_code(track: MotionTrack, t: float) -> int:
    """Number of the code nearest to `t` seconds from the driving's first frame. Raises ValueError outside it."""
    if not -SAME_TIME <= t <= track.duration + SAME_TIME:
        raise ValueError(f"{t:.3f} s is not in a driving of {track.duration:.3f} s")
    return int(np.abs(track.times - t).argmin())


# Strength over time


@dataclass(frozen=True)
class Curve:
    """Keyframes, of the strength unless told otherwise: linear between them, held before the first and after the last.

    times: seconds of the source, rising. values: low to high, by default 0 (source) to STRONGEST. Raises ValueError
    when they are not.
    """

    times: tuple[float, ...]
    values: tuple[float, ...]
    low: float = 0.0
    high: float = STRONGEST

    def __post_init__(self) -> None:
        if not self.times or len(self.times) != len(self.values):
            raise ValueError(f"{len(self.times)} times and {len(self.values)} values make no keyframes")
        if not np.isfinite(self.times).all() or (np.diff(self.times) <= 0).any():
            raise ValueError("the times must rise")
        if not all(self.low <= value <= self.high for value in self.values):
            raise ValueError(f"the values must lie between {self.low:g} and {self.high:g}")

    def at(self, t: float) -> float:
        """The value at `t` seconds of the source; exactly 0 between two keyframes of 0."""
        return float(np.interp(t, self.times, self.values))


def read_curve(path: Path) -> Curve:
    """A CSV file of lines "seconds,strength"; a first line of words is skipped. Raises InputError."""
    check_file(path, TEXT_BYTES)
    points = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or (number == 1 and not any(character.isdigit() for character in "".join(row))):
                    continue
                if len(row) != 2:
                    raise ValueError(f"line {number} has {len(row)} columns instead of 2")
                points.append((float(row[0]), float(row[1])))
        return Curve(tuple(time for time, _ in points), tuple(value for _, value in points))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "give --curve a CSV file") from error
    except (ValueError, csv.Error) as error:  # text that is not UTF-8 is a ValueError too
        raise InputError(f"{path} is no curve: {error}", "give it lines of seconds,strength (0 to 3)") from error


# How calm the result is


class Jitter:
    """How much the edited face changes from frame to frame where nothing should change it.

    That is where its part of the source changes by at most STILL_SOURCE, the driving's codes by STILL_CODE and the
    strength not at all: what is left comes from noise, trembling boxes and the networks. In units of 1/255.
    """

    def __init__(self) -> None:
        self.last: tuple[np.ndarray, np.ndarray, list[np.ndarray], float] | None = None

    def step(
        self, source: np.ndarray, place: tuple[slice, slice], result: np.ndarray, pasted: bool,
        codes: list[np.ndarray], strength: float,
    ) -> float | None:  # fmt: skip
        """Mean absolute change of the face since the frame before; None if that was not edited, or had to differ.

        source: full frame (H, W, 3) uint8; `place` is the face in it. result: the frame with the face pasted back, or
        the edited crop alone. codes: (K,) each, the driving's.
        """
        before, self.last = self.last, (source, result, codes, strength)
        if before is None or strength != before[3] or change(source[place], before[0][place]) > STILL_SOURCE:
            return None
        for new, old in zip(codes, before[2], strict=True):
            if np.linalg.norm(new - old) > STILL_CODE * np.linalg.norm(new):
                return None
        return change(result[place], before[1][place]) if pasted else change(result, before[1])

    def forget(self) -> None:
        """This frame is not edited: the next has none to be compared with."""
        self.last = None


def change(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two uint8 pictures, to 3 decimals; of every n-th pixel of large ones."""
    if not a.size:
        return 0.0
    step = max(1, min(a.shape[:2]) // 256)
    return round(float(np.abs(a[::step, ::step].astype(np.int16) - b[::step, ::step]).mean()), 3)
