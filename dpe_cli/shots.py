"""Where one shot ends and the next begins, in a stream of frames.

Seen on small pictures only. A cut is a frame before which nothing looks like what comes after; so a flash, after which
the picture is as it was, is none. Fast pans are told by shifting the whole picture, light by its correlation. In the
middle of a dissolve or a fade, the picture is the mean of what was and what comes, which no motion makes it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import cv2
import numpy as np

from dpe_cli.video import Frame

AROUND = 6  # frames looked at each way, so many full frames are held
FLASH = 3  # frames: a picture that comes back after so many was never gone
SMALL = 48, 27  # width, height of the pictures compared
SHIFT = 14, 5  # of these pixels, across and down, a fast pan moves the picture between two frames

# Mean difference of two pictures, of 1; correlation; correlation after the best shift: less, more and more than these
# is one shot. On both sides of 80 cuts between talking heads framed alike: 0.10 and more, 0.65 and less, 0.80 and less.
# Neighbours in one shot: 0.08 and less; in pans, shakes and flashes more, but then the others tell.
DIFFERENT, UNLIKE, ELSEWHERE = 0.09, 0.7, 0.82
# A dissolve: distance of its middle from the mean of its ends, as a share of their distance; their least distance;
# their highest correlation, more than that of a cut because half of a slow dissolve lies outside of what is looked at.
MIXED, APART, MIXED_UNLIKE = 0.25, 0.07, 0.8
FLAT = 0.02  # standard deviation: less is noise
BLACK = 0.08  # of 1: the bars of a letterbox are darker
LONGEST = 24  # frames: within so many after a dissolve was found it may still go on


def mark_shots(frames: Iterable[Frame]) -> Iterator[tuple[Frame, bool]]:
    """Each frame and whether a new shot begins with it, which the first does not. Holds AROUND frames."""
    source = iter(frames)
    held = deque(islice(source, AROUND + 1))  # the current frame and those ahead
    small = deque([shrunk(frame.rgb8) for frame in held])  # theirs, after at most AROUND of those before
    before = 0  # how many of `small` lie before the current one
    since = 0  # frames of the current shot before this one
    settled = AROUND  # frames after which a dissolve may come: what went before is then out of sight
    while held:
        pictures = list(small)
        cut = since > 0 and is_cut(pictures, before, since)
        dissolve = not cut and since > settled and is_dissolve(pictures, before)
        since += 1
        if cut or dissolve:
            since, settled = 1, LONGEST if dissolve else AROUND
        yield held.popleft(), cut or dissolve
        before += 1
        if before > AROUND:
            small.popleft()
            before -= 1
        for frame in islice(source, 1):
            held.append(frame)
            small.append(shrunk(frame.rgb8))


def shrunk(rgb: np.ndarray) -> np.ndarray:
    """(27, 48, 3) float32 in [0, 1] of a frame."""
    step = max(1, min(rgb.shape[:2]) // 128)  # enough pixels: all of them cost as much as finding a face
    small = np.ascontiguousarray(rgb[::step, ::step])
    return cv2.resize(small, SMALL, interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def is_cut(pictures: list[np.ndarray], at: int, since: int) -> bool:
    """Whether none of the last pictures of the shot, `since` frames long, looks like one of the next from `at` on."""
    before = pictures[max(0, at - min(since, FLASH + 1)) : at][::-1]  # neighbours first: they are mostly alike
    return not any(alike(one, other) for other in pictures[at : at + FLASH + 1] for one in before)


def is_dissolve(pictures: list[np.ndarray], at: int) -> bool:
    """Whether the picture at `at` is in the middle of a gradual change from one shot to another."""
    for around in (AROUND // 2, AROUND):
        if around <= at < len(pictures) - around:
            last, before, here, after = without_bars(*(pictures[at + step] for step in (-1, -around, 0, around)))
            apart = difference(before, after)
            mixed = difference(here, (before + after) / 2) < MIXED * apart
            still = correlation(last, here) > UNLIKE  # no pan over clouds, which looks mixed too
            if mixed and still and apart > APART and correlation(before, after) < MIXED_UNLIKE:
                return True
    return False


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures may be of one shot."""
    if difference(one, other) < DIFFERENT / 2:
        return True
    one, other = without_bars(one, other)
    return (
        difference(one, other) < DIFFERENT
        or correlation(one, other) > UNLIKE
        or min(best_shift(one, other), best_shift(other, one)) > ELSEWHERE
    )


def without_bars(*pictures: np.ndarray) -> list[np.ndarray]:
    """The pictures less what is black in all of them at the edges, where any two agree; as large as before."""
    lit = np.max([picture.max(2) for picture in pictures], axis=0) > BLACK
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    if lit.all() or not len(rows):
        return list(pictures)
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return [cv2.resize(picture[part], SMALL, interpolation=cv2.INTER_AREA) for picture in pictures]


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference."""
    return float(np.abs(one - other).mean())


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of all values of two pictures, each colour less its mean. 1: the same in another light; 0 where one is flat."""
    one, other = one - one.mean((0, 1)), other - other.mean((0, 1))
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum() + 1e-9))


def best_shift(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of the middle of `other` with where in `one` it fits best; 0 where that is not the same."""
    middle = other[SHIFT[1] : -SHIFT[1], SHIFT[0] : -SHIFT[0]]
    if (middle - middle.mean((0, 1))).std() < FLAT:
        return 0.0  # it would fit anywhere
    _, best, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(one, middle, cv2.TM_CCOEFF_NORMED))
    there = one[y : y + middle.shape[0], x : x + middle.shape[1]]
    same = difference(there, middle) < 1.5 * DIFFERENT  # more: a pan does not stop at whole pixels
    return float(best) if same else 0.0
