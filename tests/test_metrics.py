"""The formulas of the evaluation, against answers known beforehand."""

import numpy as np
import pytest
from conftest import synthetic_face, turned

from dpe_cli import metrics
from dpe_cli.jobs import psnr
from dpe_cli.landmarks import rotation_between


def picture(seed: int = 0) -> np.ndarray:
    """(64, 64, 3) uint8, soft enough for a shift by one pixel to leave some likeness."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def test_psnr_of_a_known_error():
    grey = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(grey, grey + np.uint8(10)) == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)


def test_ssim_is_one_for_equal_pictures_and_less_for_shifted_ones():
    one = picture()
    assert metrics.ssim(one, one) == pytest.approx(1)
    assert 0.1 < metrics.ssim(one, np.roll(one, 1, 1)) < 0.95
    assert metrics.ssim(one, picture(1)) < 0.3


def test_ssim_is_the_one_of_scikit_image():
    reference = pytest.importorskip("skimage.metrics").structural_similarity
    a, b = picture(), np.roll(picture(), 2, 0)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert metrics.ssim(a, b) == pytest.approx(reference(a, b, channel_axis=2, **settings), abs=2e-3)


def test_correlation_ignores_what_was_not_measured():
    a = np.array([1.0, 2, np.nan, 4, 5])
    assert metrics.correlation(a, 3 * a + 1) == pytest.approx(1)
    assert metrics.correlation(a, -a) == pytest.approx(-1)
    assert metrics.correlation(np.array([0.0, 1, 0, -1]), np.array([1.0, 0, -1, 0])) == pytest.approx(0)
    assert metrics.spread_ratio(a, 4 * a) == pytest.approx(0.25)


def test_nothing_correlates_with_what_stands_still():
    moving = np.arange(5.0)
    assert np.isnan(metrics.correlation(moving, np.full(5, 0.3)))
    assert np.isnan(metrics.correlation(moving[:2], moving[:2]))
    assert np.isnan(metrics.spread_ratio(moving, np.full(5, 0.3)))
    assert metrics.spread_ratio(np.full(5, 0.3), moving) == 0


@pytest.mark.parametrize("angles", [(7, 0, 0), (0, -7, 0), (0, 0, 7)])
def test_rotations_differ_by_the_turn_between_them(angles):
    start = np.stack([turned(20, 10, 5), np.full((3, 3), np.nan)])
    degrees = rotation_between(start @ turned(*angles), start)
    assert degrees[0] == pytest.approx(7)
    assert np.isnan(degrees[1])


def test_pose_and_expression_distances_are_mean_absolute_differences():
    assert metrics.pose_distance(turned(6)[None], turned(0, 3)[None]) == pytest.approx([3])
    assert metrics.expression_distance(np.array([[0, 1.0]]), np.array([[0.5, 0]])) == pytest.approx([0.75])


def test_vectors_alike_have_cosine_one_and_no_angle_between_them():
    a, b = np.eye(3)[:1], np.array([[np.cos(0.5), np.sin(0.5), 0]])
    assert metrics.angle(a, a) == 0
    assert metrics.angle(a, b) == pytest.approx(np.degrees([0.5]))
    assert metrics.cosine(a, b) == pytest.approx([np.cos(0.5)])


def test_jitter_is_the_way_from_the_mean_place_over_the_eye_distance():
    still = np.stack([100 * synthetic_face()] * 4)  # the eyes are 100 pixels apart
    assert metrics.jitter(still) == 0
    trembling = still + np.array([1, -1, 1, -1])[:, None, None] * [2, 0, 0]
    assert metrics.jitter(trembling) == pytest.approx(2)
    assert np.isnan(metrics.jitter(np.full((4, 478, 3), np.nan)))


def test_flicker_is_the_deviation_of_the_pixels():
    assert metrics.flicker(np.stack([picture()] * 3)) == 0
    assert metrics.flicker(np.array([90, 110], np.uint8)[:, None, None, None]) == pytest.approx(10)


def test_the_seam_step_is_that_of_the_colours_along_the_mask():
    source, alpha = np.full((80, 80, 3), 100, np.uint8), np.zeros((80, 80))
    for n, level in enumerate((0.3, 0.6, 0.9, 1.0)):
        alpha[10 + n : 70 - n, 10 + n : 70 - n] = level
    assert metrics.seam_step(source, source, alpha) == 0
    brighter = np.rint(source + 12 * alpha[..., None]).astype(np.uint8)
    assert metrics.seam_step(brighter, source, alpha) == pytest.approx(10.8, abs=1)
    inner = source.copy()
    inner[30:50, 30:50] = 250  # an edit that ends before the seam
    assert metrics.seam_step(inner, source, alpha) == pytest.approx(0, abs=0.1)


def test_turn_correlations_count_frontal_heads_that_turn():
    yaws = np.linspace(-40, 40, 33)
    wanted = np.stack([turned(yaw, 0, 0) for yaw in yaws])
    follows = np.where(np.abs(yaws) <= metrics.FRONTAL, yaws / 2, 0)  # half of the way, and lost beyond
    found = np.stack([turned(yaw, 3, 0) for yaw in follows])
    result = metrics.turn_correlations(found, wanted)
    assert result["yaw"] == pytest.approx(1, abs=1e-3)
    assert np.isnan(result["pitch"]) and np.isnan(result["roll"])
    assert metrics.turn_correlations(found[::-1], wanted)["yaw"] == pytest.approx(-1, abs=1e-3)
