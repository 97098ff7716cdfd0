"""Motion codes over time: what the driving does at any moment of the source."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

ENDS = ("hold", "loop", "pingpong", "trim")
SAME_TIME = 1e-6  # seconds; closer than this, two times are one: containers round, floats too
GAP = 1.5  # times the usual step between frames: a longer one is a hole in the track


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
