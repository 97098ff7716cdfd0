"""Cutting a square crop out of a frame and putting it back: plane geometry.

A 2 x 3 matrix takes positions (x, y), whole numbers at pixel centres as in OpenCV, from one picture to another and is
named by its direction. A box counts from pixel edges, half a pixel before (see `face.Box`).
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dpe_cli.face import Box

# The mask of a crop, as shares of its side. The paper's code erodes the whole square by 50 of 256 pixels and blurs it
# with a Gaussian of sigma 15.5: gaussian_mask(256, 15.5 / 256, 50 / 256). In our tighter crops that would fade out on
# the chin, at about 218 of 256, so ours reaches farther: 0.99 there.
MARGIN = 18 / 256
FEATHER = 7 / 256

BAND = 64  # rows pasted at once: what is reckoned on the way stays in the processor's cache
DEPTHS = {"uint8": cv2.CV_8U, "uint16": cv2.CV_16U}


def cut(rgb: np.ndarray, box: Box, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The square of a frame, uint8 or uint16, as a (size, size, 3) uint8 crop, and `to_crop`, (2, 3) float64.

    `to_crop` goes from frame to crop.

    Exact below the pixel, without aliasing; what lies outside the frame repeats its edge. The frame is uint8 or uint16
    of full range; the networks take 8 bits.
    """
    to_crop = crop_matrix(box, size)
    crop = resample(rgb, to_crop, size, size)
    return (crop if crop.dtype == np.uint8 else cv2.convertScaleAbs(crop, alpha=1 / levels(rgb))), to_crop


def crop_matrix(box: Box, size: int) -> np.ndarray:
    """`to_crop`, (2, 3) float64, of this square and a crop of this size."""
    across, down = size / box.width, size / box.height
    return np.array([[across, 0, (0.5 - box.x0) * across - 0.5], [0, down, (0.5 - box.y0) * down - 0.5]])


def levels(rgb: np.ndarray) -> float:
    """How much of a picture's own unit is one of the 255 levels of 8 bits: 1 for uint8, 257 for uint16."""
    return np.iinfo(rgb.dtype).max / 255


def gaussian_mask(size: int = 256, feather: float = FEATHER, margin: float = MARGIN) -> np.ndarray:
    """(size, size) float32 in [0, 1]: the square less `margin` on each side, blurred by a Gaussian of sigma `feather`.

    Both are shares of `size`. 1 in the middle, exactly 0 on the outermost pixels.
    """
    edge = round(margin * size)
    mask = np.zeros((size, size), np.float32)
    mask[edge : size - edge, edge : size - edge] = 1
    mask = cv2.GaussianBlur(mask, (0, 0), feather * size, borderType=cv2.BORDER_CONSTANT)
    lowest = max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max())
    return np.clip((mask - lowest) / (mask.max() - lowest), 0, 1)


def paste_back(
    rgb: np.ndarray,
    face: np.ndarray,
    mask: np.ndarray,
    to_crop: np.ndarray,
    crop: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    carried: "Carried | None" = None,
) -> np.ndarray:
    """A new frame with `face` blended in by `mask` (S, S) in [0, 1]; where that is 0 every bit is kept.

    The frame is uint8 or uint16, `face` (S, S, 3) uint8 or float32 in 8-bit levels, `to_crop` as `cut` gives it. With
    the source's own `crop` and `kept` (S, S) in [0, 1], that share of the frame's detail that is too fine for a crop
    is left in place; what is `carried` goes along with the face. Works on the crop's part of the frame only, and
    resamples the face once.
    """
    result = rgb.copy()
    size = np.array(face.shape[1::-1])
    scale, shift = np.diag(to_crop[:, :2]), to_crop[:, 2]
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if not len(rows):
        return result
    # A mask spreads by less than a pixel of the crop when it is resampled
    first, last = np.array([columns[0], rows[0]]) - 1, np.array([columns[-1], rows[-1]]) + 1
    low = np.floor((np.maximum(first, -0.5) - shift) / scale).astype(int)
    high = np.ceil((np.minimum(last, size - 0.5) - shift) / scale).astype(int) + 1
    left, top = np.maximum(low, 0)
    right, bottom = np.minimum(high, rgb.shape[1::-1])
    if right <= left or bottom <= top:
        return result
    unit = levels(rgb)
    face = face.astype(np.float32)
    # face + kept * (own - crop), all seen in the frame: the product before resampling saves the slowest step. What is
    # kept is resampled as the product is, or the difference would draw lines where it ends.
    fine = crop is not None and kept is not None
    face = face - times(crop.astype(np.float32), kept) if fine else face
    for row in range(top, bottom, BAND):
        part = result[row : min(row + BAND, bottom), left:right]
        to_part = np.column_stack([np.diag(1 / scale), -shift / scale - (left, row)])
        height, width = part.shape[:2]
        own = part.astype(np.float32) / np.float32(unit)
        step = resample(face, to_part, width, height)
        step -= times(own, 1 - resample(kept, to_part, width, height, cubic=True)) if fine else own
        if carried is not None:
            carried.add(step, rgb, crop, to_part, (left, row))
        alpha = resample(mask, to_part, width, height, cv2.BORDER_CONSTANT)
        part[:] = cv2.add(part, times(step, alpha * np.float32(unit)), dtype=DEPTHS[rgb.dtype.name])  # saturates
    return result


@dataclass(frozen=True)
class Carried:
    """Detail of a frame, too fine for a crop, that moves with what moves in the crop.

    share: (S, S) float32 in [0, 1], of each of the result's pixels how much of it is shown; where: (S, S, 2) float32,
    x and y of where it comes from in the crop, whole numbers at pixel centres.
    """

    share: np.ndarray
    where: np.ndarray

    def add(
        self, step: np.ndarray, rgb: np.ndarray, crop: np.ndarray, to_part: np.ndarray, corner: tuple[int, int]
    ) -> None:
        """Adds it to `step` (h, w, 3) float32, levels, of a part of the frame `rgb` that begins at `corner` (x, y).

        crop: the source's, of which the frame's detail is what it lacks. to_part: (2, 3), from crop to part.
        """
        size = step.shape[1::-1]
        share = cv2.warpAffine(self.share, to_part, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        columns = np.flatnonzero(share.any(0))
        if not len(columns):
            return
        inside = slice(columns[0], columns[-1] + 1)
        shifted = to_part - [[0, 0, inside.start], [0, 0, 0]]
        size = (inside.stop - inside.start, len(step))
        where = cv2.warpAffine(self.where, shifted, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        x, y = cv2.split(where)
        (across, down), (left, top) = np.diag(to_part[:, :2]).tolist(), (to_part[:, 2] + corner).tolist()
        whole = cv2.remap(rgb, x * across + left, y * down + top, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        coarse = cv2.remap(crop, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        fine = cv2.addWeighted(whole, 1 / levels(rgb), coarse, -1, 0, dtype=cv2.CV_32F)
        step[:, inside] += times(fine, share[:, inside].copy())


def times(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A float picture (H, W, 3) times a mask (H, W): a third of numpy's time for it."""
    return cv2.multiply(picture, cv2.merge([mask, mask, mask]))


def resample(
    picture: np.ndarray, to_output: np.ndarray, width: int, height: int, border: int = cv2.BORDER_REPLICATE,
    cubic: bool | None = None,
) -> np.ndarray:  # fmt: skip
    """A picture (H, W[, C]) seen through a matrix that scales and shifts, without aliasing. (height, width[, C])

    Whole factors of shrinking are averages of blocks, the rest a small blur; pixels between are cubic for pictures and,
    unless `cubic` says otherwise, linear, which does not overshoot, for masks (H, W).
    """
    scale, shift = np.diag(to_output[:, :2]), to_output[:, 2]
    factor = max(1, int(1 / scale.max() + 1e-6))
    blur = 0.5 * np.sqrt(max((1 / scale.max() / factor) ** 2 - 1, 0))
    margin = (4 + int(np.ceil(3 * blur))) * factor
    low = np.floor((-0.5 - shift) / scale).astype(int) - margin
    high = np.ceil((np.array([width, height]) - 0.5 - shift) / scale).astype(int) + margin
    limits = np.array(picture.shape[1::-1])
    low, high = np.clip(low, 0, limits - 1), np.clip(high, 1, limits)
    high = np.maximum(high, low + 1)
    part = picture[low[1] : high[1], low[0] : high[0]]
    if factor > 1:
        short = -(high - low) % factor
        part = cv2.copyMakeBorder(part, 0, int(short[1]), 0, int(short[0]), cv2.BORDER_REPLICATE)
        part = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    if blur > 0.1:
        part = cv2.GaussianBlur(part, (0, 0), blur, borderType=border)
    # centre x of the part lies at low + (x + 0.5) * factor - 0.5 of the picture
    origin = low + (factor - 1) / 2
    matrix = np.column_stack([np.diag(scale * factor), scale * origin + shift])
    way = cv2.INTER_CUBIC if (picture.ndim == 3 if cubic is None else cubic) else cv2.INTER_LINEAR
    return cv2.warpAffine(part, matrix, (width, height), flags=way, borderMode=border)
