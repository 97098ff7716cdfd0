"""What an edit is judged by, as plain formulas on arrays; which network measured the arrays is not known here.

Pictures are (H, W, 3) uint8. NaN stands for "not measured" (no face in that picture) and never counts.
"""

import cv2
import numpy as np

from dpe_cli.landmarks import head_angles

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels: Wang and others, 2004
STILL = 1e-6  # a spread below this is none: what does not move correlates with nothing
AXES = ("yaw", "pitch", "roll")
FRONTAL = 25.0  # degrees: heads turned farther are another task
TURNED = 1.0  # degrees of standard deviation: less is the tremble of landmarks


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two pictures (Wang and others, 2004), mean over pixels and colours; 1 for equal ones."""
    edge, size = SSIM_WINDOW // 2, (SSIM_WINDOW, SSIM_WINDOW)
    a, b = a.astype(np.float64), b.astype(np.float64)

    def local_mean(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, size, SSIM_SIGMA)[edge:-edge, edge:-edge]

    mean_a, mean_b = local_mean(a), local_mean(b)
    variances = local_mean(a * a) - mean_a**2 + local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + first) * (2 * covariance + second)
    return float((likeness / ((mean_a**2 + mean_b**2 + first) * (variances + second))).mean())


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two series (N,); NaN for fewer than 3 common values or where one does not move."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3 or min(a.std(), b.std()) < STILL:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spread_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviation of one series (N,) over the other's; NaN where the other does not move."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3 or b[known].std() < STILL:
        return float("nan")
    return float(a[known].std() / b[known].std())


def turn_correlations(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Pearson correlation of yaw, pitch and roll, where the wanted ones are within FRONTAL. (N, 3, 3) twice

    NaN for an axis that is hardly turned about, by TURNED degrees of standard deviation.
    """
    found, wanted = head_angles(found), head_angles(wanted)
    result = {}
    for place, axis in enumerate(AXES):
        one, two = found[:, place], np.where(np.abs(wanted[:, place]) <= FRONTAL, wanted[:, place], np.nan)
        turned = np.isfinite(two).any() and np.nanstd(two) >= TURNED
        result[axis] = correlation(one, two) if turned else float("nan")
    return result


def expression_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of expression coefficients. (N, K) twice -> (N,)"""
    return np.abs(a - b).mean(-1)


def pose_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of yaw, pitch and roll in degrees, of head rotations. (N, 3, 3) twice -> (N,)"""
    return np.abs(head_angles(a) - head_angles(b)).mean(-1)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of unit vectors, such as face embeddings. (N, K) twice -> (N,)"""
    return np.einsum("nk,nk->n", a, b)


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between unit vectors. (N, K) twice -> (N,); by the chord, for a cosine of nearly 1 is too coarse"""
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))


def jitter(points: np.ndarray) -> float:
    """How far landmarks tremble about their mean place, root mean square in percent of the eye distance.

    points: (N, 478, 3) of a face that should be still.
    """
    points = points[np.isfinite(points[:, 0, 0])]
    if len(points) < 3:
        return float("nan")
    eyes = np.linalg.norm(points[:, 33, :2] - points[:, 263, :2], axis=-1).mean()
    return float(100 * np.sqrt((points[..., :2].var(0)).sum(-1).mean()) / eyes)


def flicker(pictures: np.ndarray) -> float:
    """Standard deviation over time of the pixels, mean, in levels of 255. (N, H, W, 3) of what should be still"""
    return float(pictures.std(0, dtype=np.float32).mean())


def seam_step(result: np.ndarray, source: np.ndarray, alpha: np.ndarray) -> float:
    """Step of colour that a soft mask has to hide, in levels of 255: 0 where the pasted face continues its frame.

    The difference of the two frames, blurred so that grain does not count, on the line where the mask `alpha` (H, W)
    in [0, 1] just becomes full. Outside the mask the frames are equal, so that difference is the step.
    """
    inside = (alpha > 0.85) & (alpha < 0.99)
    if not inside.any():
        return float("nan")
    sigma = 0.01 * np.sqrt((alpha > 0).sum())  # a hundredth of the pasted square's side
    difference = cv2.GaussianBlur(result.astype(np.float32) - source, (0, 0), max(sigma, 0.5))
    return float(np.abs(difference[inside]).mean())


# Of motion that speech drives: series over time, one value a motion frame


def best_lag(found: np.ndarray, wanted: np.ndarray, reach: int = 10) -> int:
    """Frames by which `found` (N,) comes later than `wanted` (N,) where the two correlate best; negative: earlier.

    `reach` where they never correlate. Short series are moved only so far that a correlation has its 3 values.
    """
    furthest = max(0, min(reach, len(found) - 3))
    lags = range(-furthest, furthest + 1)
    scores = [correlation(found[max(0, lag) :][: len(found) - abs(lag)], wanted[max(0, -lag) :]
              [: len(wanted) - abs(lag)]) for lag in lags]  # fmt: skip
    return int(lags[int(np.nanargmax(scores))]) if np.isfinite(scores).any() else reach


def sync_offset(heard: np.ndarray, seen: np.ndarray, reach: int = 15) -> tuple[int, float]:
    """SyncNet's offset and confidence of unit vectors of sound and mouth, (N, K) each.

    The offset, frames by which the mouth comes late, is where the mean cosine is largest; the confidence is how far
    that lies above the median over all offsets.
    """
    reach = min(reach, len(heard) - 5)
    lags = range(-reach, reach + 1)
    scores = [float((heard[max(0, -lag) :][: len(heard) - abs(lag)] * seen[max(0, lag) :][: len(seen) - abs(lag)])
              .sum(-1).mean()) for lag in lags]  # fmt: skip
    return lags[int(np.argmax(scores))], float(np.max(scores) - np.median(scores))


def beats(values: np.ndarray) -> np.ndarray:
    """Numbers of the frames at which a series (N,), smoothed over three, has a peak above its mean."""
    smooth = np.convolve(values, [0.25, 0.5, 0.25], "same")
    middle = smooth[1:-1]
    return 1 + np.flatnonzero((middle > smooth[:-2]) & (middle >= smooth[2:]) & (middle > smooth.mean()))


def beat_alignment(moved: np.ndarray, heard: np.ndarray, sigma: float = 3.0) -> float:
    """How near the beats of a motion are to those of the sound: mean of exp(-d^2 / (2 sigma^2)), d in frames."""
    if not len(moved) or not len(heard):
        return float("nan")
    distance = np.abs(moved[:, None] - heard[None]).min(1)
    return float(np.exp(-(distance**2) / (2 * sigma**2)).mean())
