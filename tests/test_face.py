"""Crop boxes and their smoothing."""

import math
from collections.abc import Iterable
from fractions import Fraction

import cv2
import numpy as np
import pytest
from painted import FEATURES, face_at

from dpe_cli.face import Box, Detection, crop_box, face_size, settle, smooth_boxes
from dpe_cli.video import Frame

# Crop boxes


def test_a_crop_box_is_square_and_follows_place_and_size():
    one, other = crop_box(face_at(100, 80, 50)), crop_box(face_at(300, 280, 100))
    assert one.width == pytest.approx(one.height) and other.width == pytest.approx(2 * one.width)
    assert other.centre[0] == pytest.approx(300) and one.centre[0] == pytest.approx(100)
    assert other.centre[1] - 280 == pytest.approx(2 * (one.centre[1] - 80))


@pytest.mark.parametrize("degrees", [-180, -90, -30, 10, 45, 120])
def test_the_size_of_a_crop_box_does_not_change_with_a_tilt(degrees: float):
    face = face_at(200, 200, 80)
    turn = cv2.getRotationMatrix2D((200, 200), degrees, 1)
    tilted = Detection(face.box, face.points @ turn[:, :2].T + turn[:, 2], 0.9)
    assert crop_box(tilted).width == pytest.approx(crop_box(face).width)
    middle = turn @ [*crop_box(face).centre, 1]
    assert crop_box(tilted).centre == pytest.approx(tuple(middle))


@pytest.mark.parametrize(("yaw", "most"), [(15, 0.02), (30, 0.04), (45, 0.08), (60, 0.12)])
def test_the_size_of_a_crop_box_hardly_changes_when_the_head_turns(yaw: float, most: float):
    """Eye distance 1, eyes to mouth 1.05, nose 0.5 before the eyes: the eyes alone would lose 3, 13, 29 and 50 %."""
    head = np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.55, 0.5], [-0.4, 1.05, 0.1], [0.4, 1.05, 0.1]]) * 100
    angle = math.radians(yaw)
    turned = np.stack([head[:, 0] * math.cos(angle) + head[:, 2] * math.sin(angle), head[:, 1]], 1)
    assert abs(face_size(turned) / face_size(head[:, :2]) - 1) < most


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.full((5, 2), np.nan), FEATURES * 4000])
def test_points_that_cannot_be_a_face_leave_the_detectors_box(points: np.ndarray):
    box = crop_box(Detection(Box(100, 100, 180, 200), points, 0.6))
    assert box.centre == (140, 150)
    assert 130 < box.width < 220


# Smoothing


def boxes_of(places: np.ndarray, radius: int, times: Iterable[Fraction] | None = None) -> np.ndarray:
    """Smooths faces at (N, 3) x, y, side of the head; NaN is no face. (N, 3) centre x, y and side of the boxes"""
    times = times or [Fraction(i, 25) for i in range(len(places))]
    picture = np.zeros((2, 2, 3), np.uint8)
    frames = [Frame(i, time, picture) for i, time in enumerate(times)]
    faces = [None if np.isnan(place).any() else face_at(*place) for place in places]
    out = list(smooth_boxes(zip(frames, faces, strict=True), radius))
    assert [frame for frame, _ in out] == frames
    assert all(box is None or box.width == pytest.approx(box.height) for _, box in out)
    return np.array([(np.nan,) * 3 if box is None else (*box.centre, box.width) for _, box in out])


def raw(places: np.ndarray) -> np.ndarray:
    """The boxes before smoothing."""
    return boxes_of(places, 0)


def still(count: int, side: float = 110) -> np.ndarray:
    return np.tile([320.0, 240.0, side], (count, 1))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 11, 12, 40])
@pytest.mark.parametrize("radius", [0, 1, 5])
def test_smoothing_keeps_count_order_and_a_still_box(count: int, radius: int):
    places = still(count)
    assert np.allclose(boxes_of(places, radius).reshape(-1, 3), [[*crop_box(face_at(*p)).centre, crop_box(face_at(*p)).width] for p in places] or np.empty((0, 3)))  # fmt: skip  # noqa: E501


def test_a_radius_of_nothing_gives_the_boxes_as_they_are():
    places = still(20) + np.random.default_rng(0).normal(0, 5, (20, 3))
    for place, box in zip(places, boxes_of(places, 0), strict=True):
        expected = crop_box(face_at(*place))
        assert box == pytest.approx([*expected.centre, expected.width])


def test_boxes_are_smoothed_by_time_not_by_number():
    """Two frames a second and more before the others do not pull at them."""
    times, x = [0, 1, 2, 2.04, 2.08, 2.12, 2.16, 2.20], [300, 300, 320, 320, 320, 320, 320, 320]
    run = np.array([[time, place, 240, 200] for time, place in zip(times, x, strict=True)], float)
    assert settle(run, 4, 5, None).smooth[0] == pytest.approx(320, abs=0.01)


def test_a_still_face_under_detector_noise_gets_a_still_box():
    """Each point trembles by 0.5 px around a head of 110 px, as CenterFace's do; the box moves less than 0.25 px."""
    rng = np.random.default_rng(1)
    faces = [
        Detection(face.box, face.points + rng.normal(0, 0.5, (5, 2)), 0.9) for face in [face_at(320, 240, 110)] * 300
    ]
    frames = [Frame(i, Fraction(i, 25), np.zeros((2, 2, 3), np.uint8)) for i in range(300)]
    boxes = [box for _, box in smooth_boxes(zip(frames, faces, strict=True), 5)]
    corners = np.array([(box.x0, box.y0, box.x1, box.y1) for box in boxes])
    rough = np.array([crop_box(face).width for face in faces])
    assert rough.std() > 0.7  # what there was to be rid of
    assert np.ptp(corners, axis=0).max() < 0.25


@pytest.mark.parametrize("radius", [3, 5, 8])
@pytest.mark.parametrize("speed", [(2, 0, 0), (-3, 1.5, 0), (20, -10, 0), (6, 6, 6)])
def test_a_face_that_moves_evenly_is_followed_without_lag(radius: int, speed: tuple[float, float, float]):
    """Exactly, once it is under way: the first and the last frames too."""
    places = still(40) + np.arange(40)[:, None] * speed
    assert np.allclose(boxes_of(places, radius), raw(places), atol=1e-6)


def test_a_slow_face_is_followed_within_a_hundredth_of_the_box():
    places = still(300) + np.arange(300)[:, None] * (0.1, 0.05, 0)
    lag = boxes_of(places, 5) - raw(places)
    assert np.abs(lag).max() < 0.01 * raw(places)[0, 2]


def test_there_is_no_lag_at_a_variable_frame_rate():
    gaps = np.random.default_rng(2).choice([1, 2, 3, 5], 80)
    times = [Fraction(int(t), 50) for t in np.cumsum(gaps)]
    places = still(80) + np.array([[100 * float(t), 30 * float(t), 0] for t in times])
    assert np.allclose(boxes_of(places, 5, times), raw(places), atol=1e-6)


def test_smoothing_takes_most_of_the_tremble_from_a_moving_face():
    steady = still(200) + np.arange(200)[:, None] * (3, 1, 0)
    noise = np.random.default_rng(3).normal(0, (1, 1, 0.5), (200, 3))
    boxes = boxes_of(steady + noise, 5)
    jerk = lambda track: np.diff(track, 2, axis=0).std(0)  # noqa: E731
    assert (jerk(boxes)[:2] < 0.15 * jerk(raw(steady + noise))[:2]).all()
    assert np.abs(boxes - raw(steady))[:, :2].mean() < 0.6


def test_one_wrong_box_moves_nothing():
    places = still(40)
    places[20] += (12, -9, 8)
    assert np.ptp(boxes_of(places, 5), axis=0).max() < 0.25


def test_a_face_starts_to_move_without_a_jerk():
    """At rest, then moving: no step of the box is larger than the face's own."""
    places = still(80)
    places[30:, 0] += np.arange(50) * 1.5
    steps = np.diff(boxes_of(places, 5)[:, 0])
    assert steps.min() > -0.01 and steps.max() < 1.5 * 1.3
    assert np.abs(boxes_of(places, 5) - raw(places)).max() < 4


def test_gaps_stay_gaps_and_nothing_is_smoothed_across_them():
    places = still(30)
    places[15:, 0] += 40
    places[13:16] = np.nan
    boxes = boxes_of(places, 5)
    assert np.isnan(boxes[13:16]).all()
    assert np.allclose(boxes[:13], raw(places)[:13]) and np.allclose(boxes[16:], raw(places)[16:])


@pytest.mark.parametrize("change", [(300, 0, 0), (0, -250, 0), (0, 0, 70)])
def test_nothing_is_smoothed_across_a_cut(change: tuple[float, float, float]):
    places = still(30)
    places[15:] += change
    assert np.allclose(boxes_of(places, 5), raw(places))


def test_smoothing_looks_no_further_than_its_radius():
    """So it holds radius + 1 frames, however long the video."""
    asked = 0

    def faces():
        nonlocal asked
        for i in range(1000):
            asked += 1
            yield Frame(i, Fraction(i, 25), np.zeros((2, 2, 3), np.uint8)), face_at(100 + i, 100, 50)

    for given, _ in enumerate(smooth_boxes(faces(), 7)):
        assert asked <= given + 8
    assert asked == 1000
