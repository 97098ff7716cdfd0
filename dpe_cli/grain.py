"""The grain of a source, as of film or of a camera in the dark, where an edit has drawn a face anew."""

import cv2
import numpy as np

from dpe_cli.crop import DEPTHS, levels, resample, times

CALM, CALM_MASK = 24 / 256, 0.9  # side, in sides of a crop, of the part whose grain is taken; where it may lie
NOWHERE = 1e6  # levels squared, where it may not
GRAIN_SIGMA, GRAIN = 2.0, 2.0  # pixels of the frame: what is finer; levels (RMS) up to which it is compression's noise


def with_grain(
    result: np.ndarray, rgb: np.ndarray, crop: np.ndarray, lacking: np.ndarray, kept: np.ndarray, to_crop: np.ndarray
) -> np.ndarray:
    """A frame with an edit, and with the source's grain where that has drawn a face anew: else it is smooth there.

    Grain is what the calmest part of what was kept has of high frequencies; nothing is added where these are few.
    result, rgb: (H, W, 3) with the edit and without; crop: (S, S, 3) uint8 of the latter; lacking, kept: (S, S) in
    [0, 1], where grain is to be, and where the frame's own detail still is. -> `result`, changed
    """
    if not lacking.max() > 0.02:
        return result
    small, known = (cv2.resize(one, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for one in (crop, kept))
    side = round(CALM * len(small))
    rough = cv2.cvtColor(
        cv2.subtract(small, cv2.GaussianBlur(small, (0, 0), side / 6), dtype=cv2.CV_32F), cv2.COLOR_RGB2GRAY
    )
    rough = np.where(known > 0.99, np.square(rough), NOWHERE)
    rough = cv2.boxFilter(rough, -1, (side, side), borderType=cv2.BORDER_CONSTANT)
    half = side // 2
    inside = rough[half : len(small) - half, half : len(small) - half]
    if inside.min() > NOWHERE / side**2 / 2:
        return result
    middle = 2 * np.add(np.unravel_index(inside.argmin(), inside.shape), half)[::-1] + 0.5
    scale, shift = np.diag(to_crop[:, :2]), to_crop[:, 2]
    (left, top), (right, bottom) = (np.rint((middle + way * side - shift) / scale).astype(int) for way in (-1, 1))
    limits = np.array(rgb.shape[1::-1])
    if min(left, top) < 0 or right > limits[0] or bottom > limits[1] or min(right - left, bottom - top) < 8:
        return result
    unit = np.float32(levels(rgb))
    part = rgb[top:bottom, left:right].astype(np.float32) / unit
    grain = part - cv2.GaussianBlur(part, (0, 0), GRAIN_SIGMA)
    strength = float(np.sqrt(np.mean(grain**2)))
    if strength <= GRAIN:
        return result
    grain *= np.sqrt(1 - (GRAIN / strength) ** 2)
    rows, columns = (np.flatnonzero((lacking > 1 / 512).any(axis))[[0, -1]] for axis in (1, 0))
    corners = [np.array([columns[0], rows[0]]) - 1, np.array([columns[1], rows[1]]) + 1]
    left, top = np.maximum(np.floor((corners[0] - shift) / scale).astype(int), 0)
    right, bottom = np.minimum(np.ceil((corners[1] - shift) / scale).astype(int), limits)
    if right <= left or bottom <= top:
        return result
    grain = np.vstack(
        [np.hstack([grain, grain[:, ::-1]]), np.hstack([grain[::-1], grain[::-1, ::-1]])]
    )  # without seams
    repeats = -(-np.array([bottom - top, right - left]) // grain.shape[:2])
    grain = np.tile(grain, (*repeats, 1))[: bottom - top, : right - left]
    to_part = np.column_stack([np.diag(1 / scale), -shift / scale - (left, top)])
    share = resample(lacking.astype(np.float32), to_part, right - left, bottom - top, cv2.BORDER_CONSTANT)
    part = result[top:bottom, left:right]
    part[:] = cv2.add(part, times(grain, share * unit), dtype=DEPTHS[rgb.dtype.name])
    return result
