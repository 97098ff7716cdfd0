"""Detail of the source's own pixels, where an edit leaves them in place or only bends them.

What a network draws of the source is a little blurred. What it means is in the low frequencies: where these say that
something stayed, or went along with a known flow, the high ones are the source's.
"""

from functools import lru_cache

import cv2
import numpy as np

from dpe_cli.crop import Carried, times
from dpe_cli.face import ramp
from dpe_cli.mesh import bent, centres, places_of, warp

CHANGE_BLUR = 2 / 256  # sigma, share of the side: below it lies detail, above it motion
STAYED, MOVED = 3.0, 10.0  # levels of smoothed difference: up to the first all detail stays the source's, from the
# second none of it
FITS, MISSES = 12.0, 40.0  # the same of detail that goes along with a bent face, against the bent source,
MOVES = 0.5  # and by how many pixels of the crop that has to go to count wholly
SMOOTH = 1 / 16  # sigma, in crop sides, of the smooth part of a flow,
UNEVEN = 0.5, 1.5  # and by how many pixels of the crop a flow leaves it: from the first on a little, from the second
# wholly it is taken instead
AT_EDGE = 8 / 256  # share of the side: a flow's places that near to the crop's edge pile up there,
PILED = 0.08, 0.14  # from so far into the crop a little, wholly
ALIKE = 8  # places along the border within which they are dealt with alike
ONWARDS = 4  # places of the flow from there to where it is followed again
EASED = 0.25  # shares of the side: around a crop, within which what moves comes to rest,
JOINED = 0.1  # and within its border, where the frame, bent, goes over into what was drawn


def keep_detail(
    face: np.ndarray, crop: np.ndarray, where: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, Carried | None]:
    """`face` (S, S, 3) float32 levels with the crop's own detail where the edit moved nothing, and where that is.

    The second, (S, S) float32 in [0, 1], is how much of the detail that is too fine for the crop can stay in the frame.
    A network blurs what it leaves in place: there only its low frequencies say what it meant to change. The third is
    what goes along with the face instead, where `where` tells how it was bent: see `carry_detail`.
    """
    difference, smooth, kept = compared(face, crop, STAYED, MOVED)
    carried = None if where is None else carry_detail(face, crop, where, kept)
    kept = kept if carried is None else kept * (1 - carried.share)
    return face + times(smooth - difference, kept), kept, carried


def compared(face: np.ndarray, crop: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was added to a crop (S, S, 3), the smooth part of that, and where (S, S) it is little.

    That is 1 up to the level `low`, 0 from `high` on.
    """
    size, sigma = len(crop), CHANGE_BLUR * len(crop)
    difference = cv2.subtract(face, crop, dtype=cv2.CV_32F)
    smooth = cv2.GaussianBlur(difference, (0, 0), sigma)
    red, green, blue = cv2.split(np.abs(cv2.resize(smooth, (size // 2, size // 2), interpolation=cv2.INTER_AREA)))
    change = cv2.GaussianBlur(cv2.max(cv2.max(red, green), blue), (0, 0), sigma)  # of twice the reach: half the size
    return difference, smooth, cv2.resize(np.clip((high - change) / (high - low), 0, 1), (size, size))


def carry_detail(face: np.ndarray, crop: np.ndarray, where: np.ndarray, kept: np.ndarray) -> Carried:
    """The detail that goes along with a face that is the crop's own, bent.

    face: (S, S, 3) float32 levels; where: (R, R, 3), from where in the crop each place of the face comes, pixels, and
    the share of that in what is shown; kept: (S, S), where detail could stay. What was painted over is not the crop's
    own, and what can stay where it is and hardly moves need not go.
    """
    size = len(crop)
    places, share = places_of(where, size, size), cv2.resize(where[..., 2], (size, size))
    moved = np.minimum(cv2.magnitude(*cv2.split(places - still(size))) / MOVES, 1)
    fitting = share * compared(face, bent(crop, places), FITS, MISSES)[-1]
    return Carried(fitting * (1 - (1 - moved) * kept), places)


def with_what_stays(drawn: np.ndarray, crop: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """A drawn picture (S, S, 3) uint8 with the high frequencies of its crop where nothing moved: see `keep_detail`."""
    return to_levels(keep_detail(drawn.astype(np.float32), crop, where)[0])


def with_what_flows(drawn: np.ndarray, crop: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """A drawn picture with the high frequencies of its crop where it fits the crop, bent.

    drawn, crop: (S, S, 3) uint8; flow: (R, R, 2), from where in the crop each place comes, pixels. -> (S, S, 3) uint8
    """
    face = drawn.astype(np.float32)
    difference, smooth, share = compared(face, warp(crop, flow, len(crop)), FITS, MISSES)
    return to_levels(face + times(smooth - difference, share))


def evened(
    drawn: np.ndarray, crop: np.ndarray, flow: np.ndarray, inside: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A drawn picture whose crop is bent by the smooth part of its flow where that is uneven, and the flow so changed.

    The generator's flow is not sure of itself in hair and on shoulders, and wavers from place to place: strands become
    waves, ears flames. Of faces it is surer. drawn, crop: (S, S, 3) uint8; flow: (R, R, 2), from where in the crop each
    place comes, pixels; inside: (R, R) uint8, 255 where in the crop the face is.
    """
    size, count = len(crop), len(flow)
    moved = flow - centres(count, size).astype(np.float32)
    away = cv2.GaussianBlur(moved, (0, 0), SMOOTH * count) - moved
    uneven = cv2.GaussianBlur(cv2.magnitude(*cv2.split(away)), (0, 0), SMOOTH * count / 2)
    share = ramp(uneven, *UNEVEN).astype(np.float32)
    if inside is not None:
        bent_face = cv2.remap(inside, places_of(flow, count, size), None, cv2.INTER_LINEAR)
        share *= 1 - cv2.GaussianBlur(bent_face, (0, 0), SMOOTH * count / 4).astype(np.float32) / 255
    if not share.any():
        return drawn, flow
    flow = flow + share[..., None] * away
    shown = cv2.resize(share, (size, size))
    return blended(drawn, warp(crop, flow, size), shown), flow


def stretched(drawn: np.ndarray, crop: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A drawn picture that shows what its crop has beside a head that leaves the border, and not the mere border.

    Such a head asks for what lies outside. Flows that find nothing there pile up at the edge, to and fro, which looks
    like the grain of wood: what lies between edge and head is stretched over that place instead.
    drawn, crop: (S, S, 3) uint8; flow: (R, R, 2), from where in the crop each place comes, pixels. -> the picture, and
    the flow that goes on past the border there, as a frame can show it that has more than the crop
    """
    size = len(crop)
    stretch, share = unpiled(flow, size, onwards=False)
    if not share.any():
        return drawn, flow
    shown = cv2.resize(np.ascontiguousarray(share), (size, size))
    return blended(drawn, warp(crop, stretch, size), shown), unpiled(flow, size, onwards=True)[0]


def unpiled(flow: np.ndarray, size: int, onwards: bool) -> tuple[np.ndarray, np.ndarray]:
    """A flow (R, R, 2) that does not pile up at any edge, and where (R, R) it has changed: see `from_the_left`."""
    share = np.zeros(flow.shape[:2], np.float32)
    for _ in range(4):  # each border in turn comes to lie on the left
        flow, of_this = from_the_left(np.ascontiguousarray(flow), size, onwards)
        flow = np.rot90(np.dstack([flow, np.maximum(share, of_this)]))
        share, flow = flow[..., 2], np.dstack([flow[..., 1], size - flow[..., 0]])
    return flow, share


def from_the_left(flow: np.ndarray, size: int, onwards: bool) -> tuple[np.ndarray, np.ndarray]:
    """A flow (R, R, 2) that does not pile up at the left edge, and where (R, R) it has changed, in [0, 1].

    onwards: it goes on past the edge; else what lies before it is stretched.
    """
    count = len(flow)
    near = flow[..., 0] < AT_EDGE * size
    piled = np.where(near.all(1), count, near.argmin(1)).astype(np.float32)[:, None]  # places, row by row
    piled = cv2.GaussianBlur(cv2.dilate(piled, np.ones((2 * ALIKE + 1, 1), np.uint8)), (0, 0), ALIKE)
    weight = ramp(piled / count, *PILED)
    if not weight.any():
        return flow, np.zeros((count, count), np.float32)
    here = centres(count, size).astype(np.float32)
    end = np.minimum(piled + ONWARDS, count - 1)
    column = np.arange(count, dtype=np.float32)
    rows = np.arange(count, dtype=np.float32)[:, None]
    there = cv2.remap(flow - here, end, rows, cv2.INTER_LINEAR)  # by how much, where it is followed again
    moved = cv2.GaussianBlur(there, (0, 0), ALIKE)  # or hair would be waves
    along = np.ones_like(end) if onwards else np.minimum((column + 0.5) / end, 1)
    fades = np.clip(1 - (column - end) / (2 * ONWARDS), 0, 1)[..., None] * (moved - there)
    change = np.where((column < end)[..., None], here + along[..., None] * moved - flow, fades)
    return flow + weight[..., None] * change, weight * np.clip((end - column) / ONWARDS, 0, 1)


def with_outside(face: np.ndarray, larger: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A bent crop (S, S, 3) uint8 with what lies outside of its crop where that is asked for.

    larger: (L, L, 3) uint8, in the middle of which lies the crop; where: (R, R, >=2), from where in the crop each place
    comes. -> (S, S, 3) uint8
    """
    size = len(face)
    places = places_of(where, size, size)
    outside = np.abs(places - (size - 1) / 2).max(2) - (size - 1) / 2
    share = cv2.GaussianBlur(ramp(outside, 0, 2).astype(np.float32), (0, 0), 2)
    return blended(face, bent(larger, places + np.float32((len(larger) - size) // 2)), share) if share.any() else face


def eased(face: np.ndarray, larger: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A crop that is bent everywhere, as it can be pasted back: with what is around it, which comes to rest there.

    So neck, shoulders and background bend between a head that moves and a frame that does not. face: (S, S, 3) uint8;
    larger: (L, L, 3) uint8, in the middle of which lies what it was drawn from; where: (R, R, 3), from where in that
    each place comes. -> face and where of the size of `larger`
    """
    size, count = len(face), len(larger)
    around = (count - size) // 2
    away = cv2.copyMakeBorder(places_of(where, size, size) - still(size), *[around] * 4, cv2.BORDER_REPLICATE)
    border = np.minimum(np.arange(count), np.arange(count)[::-1]).astype(np.float32)
    border = np.minimum(border[:, None], border)
    # As a straight line: by a curve, which is steeper, what moves far would fold over itself.
    places = still(count) + np.minimum(border / around, 1)[..., None] * away
    drawn = ramp(border - around, 0, JOINED * size).astype(np.float32)  # further out the frame itself is bent
    held = cv2.copyMakeBorder(with_outside(face, larger, where), *[around] * 4, cv2.BORDER_REPLICATE)
    result = blended(bent(larger, places), held, drawn)
    small = cv2.resize(places + np.float32(0.5), (count // 2, count // 2), interpolation=cv2.INTER_AREA)
    return result, np.dstack([small, np.ones(small.shape[:2], np.float32)])


def blended(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A picture (S, S, 3) uint8 with a share (S, S) of another. -> (S, S, 3) uint8"""
    return to_levels(times(one.astype(np.float32), 1 - share) + times(other.astype(np.float32), share))


def to_levels(face: np.ndarray) -> np.ndarray:
    """float32 levels -> uint8"""
    return np.rint(face).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=2)
def still(size: int) -> np.ndarray:
    """The places of a picture that nothing moves in: (size, size, 2) float32, not to be written to."""
    return (centres(size, size) - 0.5).astype(np.float32)
