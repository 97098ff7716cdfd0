"""Colours of two pictures of a face, compared where they should be equal."""

import cv2
import numpy as np

STATISTICS = 64  # side of the small crops whose colours are compared: detail is not colour
MAX_GAIN, MAX_SHIFT = 1.4, 40.0  # a larger difference (levels) is not one of colour: something stands in the way
ROUNDS, MISFIT = 4, 8.0  # of fitting colours, and the levels by which a place may miss the fit and still count half
FLAT = 2.0  # levels: contrast below this, noise and rounding, says nothing about a gain


def colour_difference(face: np.ndarray, crop: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Gain and shift (2, 3) float32 that take the colours of `face` to those of `crop`: levels * gain + shift.

    Both (S, S, 3) uint8, compared where the mask (S, S) fades out and the two should be equal: spread and mean of each
    channel. Places that fit badly count less, for there something moved. Exactly 1 and 0 where nothing differs.
    """
    ring = cv2.resize(mask * (1 - mask), (STATISTICS, STATISTICS), interpolation=cv2.INTER_AREA)
    gain, shift = np.ones(3, np.float32), np.zeros(3, np.float32)
    there = ring > 0.01
    if not there.any():
        return np.stack([gain, shift])
    edited, source = (
        cv2.resize(picture, (STATISTICS, STATISTICS), interpolation=cv2.INTER_AREA)[there].astype(np.float32)
        for picture in (face, crop)
    )
    weights = ring[there]
    for _ in range(ROUNDS):
        (mean, spread), (goal, aim) = (mean_and_spread(colours, weights) for colours in (edited, source))
        gain = np.clip(aim / spread, 1 / MAX_GAIN, MAX_GAIN)
        shift = mean + np.clip(goal - mean, -MAX_SHIFT, MAX_SHIFT) - gain * mean
        misfit = np.abs(edited * gain + shift - source).max(1)
        weights = ring[there] / (1 + (misfit / MISFIT) ** 2)
    return np.stack([gain, shift]).astype(np.float32)


def mean_and_spread(colours: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of colours (N, 3)."""
    share = weights / weights.sum()
    mean = share @ colours
    return mean, np.sqrt(share @ (colours - mean) ** 2 + np.float32(FLAT**2))
