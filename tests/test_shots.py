"""Cuts, and what only looks like one, in clips made of the pictures that come with scikit-image."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import cv2
import numpy as np
import pytest

from dpe_cli.shots import AROUND, mark_shots
from dpe_cli.video import Frame

NAMES = ("astronaut", "coffee", "rocket", "chelsea")


@pytest.fixture(scope="module")
def scenes() -> list[list[np.ndarray]]:
    """Four shots of 40 frames, 180 x 320: pictures under a camera that drifts and a sensor with noise."""
    data, noise = pytest.importorskip("skimage.data"), np.random.default_rng(0)

    def shot(name: str) -> Iterator[np.ndarray]:
        picture = cv2.resize(getattr(data, name)(), (480, 320))
        for step in range(40):
            part = picture[step : step + 180, step : step + 320].astype(np.int16)
            yield np.clip(part + noise.integers(-3, 4, part.shape), 0, 255).astype(np.uint8)

    return [list(shot(name)) for name in NAMES]


def cuts(pictures: list[np.ndarray]) -> list[int]:
    frames = [Frame(i, Fraction(i, 25), picture) for i, picture in enumerate(pictures)]
    marked = list(mark_shots(frames))
    assert [frame for frame, _ in marked] == frames
    return [frame.index for frame, new in marked if new]


def mix(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    return cv2.addWeighted(one, 1 - share, other, share, 0)


@pytest.mark.parametrize("first", range(4))
def test_a_cut_is_found_at_its_frame(scenes: list[list[np.ndarray]], first: int):
    one, other = scenes[first], scenes[first - 1]
    assert cuts(one[:15] + other[:15]) == [15]
    assert cuts(one[:3] + other[:15]) == [3]
    assert cuts(one[:15] + other[:2]) == [15]
    assert cuts(one[:10] + other[:8] + one[20:30]) == [10, 18]


def test_cuts_to_and_from_a_plain_card_are_found(scenes: list[list[np.ndarray]]):
    card = [np.full_like(scenes[0][0], 230)] * 12
    for pictures in scenes:
        assert cuts(pictures[:12] + card + pictures[12:24]) == [12, 24]


@pytest.mark.parametrize("length", [3, 6, 12, 18])
def test_a_dissolve_is_one_cut_near_its_middle(scenes: list[list[np.ndarray]], length: int):
    for one, other in pairwise(scenes):
        between = [mix(one[12 + i], other[i], (i + 1) / (length + 1)) for i in range(length)]
        (found,) = cuts(one[:12] + between + other[length : length + 12])
        assert 12 <= found <= 12 + length


@pytest.mark.parametrize("length", [6, 12])
def test_a_fade_through_black_is_cut_on_its_way(scenes: list[list[np.ndarray]], length: int):
    for one, other in pairwise(scenes):
        black = np.zeros_like(one[0])
        out = [mix(one[12 + i], black, (i + 1) / length) for i in range(length)]
        back = [mix(black, other[i], (i + 1) / length) for i in range(length)]
        found = cuts(one[:12] + out + back + other[length : length + 12])
        assert found and all(12 <= frame <= 12 + 2 * length for frame in found)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("white", [0.5, 1.0])
def test_a_flash_is_no_cut(scenes: list[list[np.ndarray]], length: int, white: float):
    for pictures in scenes:
        lit = [mix(picture, np.full_like(picture, 255), white) for picture in pictures[15 : 15 + length]]
        assert cuts(pictures[:15] + lit + pictures[15 + length :]) == []


def test_a_lamp_that_goes_out_is_no_cut(scenes: list[list[np.ndarray]]):
    for pictures in scenes:
        assert cuts(pictures[:20] + [mix(picture, np.zeros_like(picture), 0.5) for picture in pictures[20:]]) == []


@pytest.mark.parametrize("share", [0.05, 0.15, 0.25])
def test_a_fast_pan_is_no_cut(share: float):
    """By a share of the picture's width at each frame."""
    data = pytest.importorskip("skimage.data")
    for name in NAMES:
        wide = cv2.resize(getattr(data, name)(), (1800, 360))
        step = int(share * 320)
        assert cuts([wide[90:270, x : x + 320] for x in range(0, 1800 - 320, step)]) == []


def test_a_zoom_is_no_cut(scenes: list[list[np.ndarray]]):
    for pictures in scenes:
        turns = [cv2.getRotationMatrix2D((160, 90), 0, 1 + 0.03 * step) for step in range(40)]
        zoomed = zip(pictures, turns, strict=True)
        assert cuts([cv2.warpAffine(picture, turn, (320, 180)) for picture, turn in zoomed]) == []


@pytest.mark.parametrize("count", [0, 1, AROUND, 2 * AROUND + 1, 30])
def test_every_frame_comes_out_once_whatever_the_length(scenes: list[list[np.ndarray]], count: int):
    assert cuts(scenes[0][:count]) == []


def test_no_more_frames_are_held_than_are_looked_at():
    asked = 0

    def frames() -> Iterator[Frame]:
        nonlocal asked
        for index in range(300):
            asked += 1
            yield Frame(index, Fraction(index, 25), np.full((36, 64, 3), 90, np.uint8))

    for frame, _ in mark_shots(frames()):
        assert asked <= frame.index + 1 + AROUND
