"""The motion track: interpolation in time, and what comes after the driving's end."""

from fractions import Fraction

import numpy as np
import pytest

from dpe_cli.motion import MotionTrack

NTSC = Fraction(30000, 1001)


def ramp(count: int, fps: float | Fraction = 10, **settings) -> MotionTrack:
    """`count` codes of two numbers, the first of which is the frame's number."""
    times = np.array([float(index / Fraction(fps)) for index in range(count)])
    return MotionTrack(times, np.stack([np.arange(count), -np.arange(count)], 1), **settings)


def numbers(track: MotionTrack, times: list[float], end: str) -> list[float | None]:
    """The first number of the code at each time."""
    codes = [track.at(time, end) for time in times]
    return [None if code is None else float(code[0]) for code in codes]


@pytest.mark.parametrize("end", ["hold", "loop", "pingpong", "trim"])
@pytest.mark.parametrize("fps", [10, 24, Fraction(24000, 1001), NTSC, 60])
def test_a_driving_of_the_same_rate_gives_its_own_codes_exactly(fps, end: str):
    track = ramp(50, fps)
    for index in range(50):
        np.testing.assert_array_equal(track.at(float(index / Fraction(fps)), end), track.codes[index])


def test_between_two_frames_the_code_is_interpolated_in_time():
    track = ramp(4)
    np.testing.assert_allclose(track.at(0.125), [1.25, -1.25], rtol=1e-6)
    assert track.at(0.125).dtype == np.float32
    np.testing.assert_allclose(numbers(track, [0.05, 0.1, 0.275], "trim"), [0.5, 1, 2.75], rtol=1e-6)


def test_uneven_frames_are_interpolated_by_their_own_times():
    track = MotionTrack(np.array([0, 0.1, 0.5]), np.array([[0.0], [1], [5]]))
    np.testing.assert_allclose(numbers(track, [0.05, 0.3, 0.4], "hold"), [0.5, 3, 4], rtol=1e-6)


def test_hold_keeps_the_last_code():
    assert numbers(ramp(4), [0.3, 0.31, 5], "hold") == [3, 3, 3]


def test_trim_ends_when_the_last_frame_has_been_shown():
    assert numbers(ramp(4), [0.3, 0.35, 0.4, 0.5], "trim") == [3, 3, None, None]


def test_loop_shows_the_last_frame_as_long_as_the_others():
    times = [index / 10 for index in range(10)]
    assert numbers(ramp(4), times, "loop") == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert ramp(4).duration == pytest.approx(0.4)
    assert numbers(ramp(4), [0.35], "loop") == [3]  # still the last one: it does not fade into the first


def test_pingpong_shows_the_turning_frames_once():
    times = [index / 10 for index in range(14)]
    assert numbers(ramp(4), times, "pingpong") == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]


@pytest.mark.parametrize(("end", "period"), [("loop", 7), ("pingpong", 12)])
def test_repeats_do_not_drift_at_broken_frame_rates(end: str, period: int):
    track = ramp(7, NTSC)
    order = [*range(7), *range(5, 0, -1)][:period]
    for index in range(0, 200_000, 997):
        code = track.at(float(index / NTSC), end)
        np.testing.assert_array_equal(code, track.codes[order[index % period]])


def test_two_frames_are_enough_to_go_to_and_fro():
    assert numbers(ramp(2), [0, 0.1, 0.2, 0.3, 0.4], "pingpong") == [0, 1, 0, 1, 0]
    assert numbers(ramp(2), [0, 0.1, 0.2, 0.3, 0.4], "loop") == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("end", ["hold", "loop", "pingpong", "trim"])
def test_a_still_gives_its_one_code_for_ever(end: str):
    track = ramp(1)
    assert [float(track.at(time, end)[0]) for time in (0, 0.5, 1000)] == [0, 0, 0]


def test_a_driving_of_another_rate_is_matched_by_time():
    track = ramp(26, 25)  # one second and a frame
    source_times = [index / 30 for index in range(31)]
    np.testing.assert_allclose(numbers(track, source_times, "trim"), [25 * time for time in source_times], atol=1e-5)


def test_frames_without_a_face_keep_the_drivings_timing():
    track = MotionTrack(np.array([0.1, 0.2, 0.3, 0.6]), np.array([[1.0], [2], [3], [6]]), last_time=0.8)
    assert track.frame_time == pytest.approx(0.1)  # the hole from 0.3 to 0.6 does not count
    assert track.duration == pytest.approx(0.9)
    np.testing.assert_allclose(numbers(track, [0, 0.1, 0.2, 0.4, 0.7, 0.8], "loop"), [1, 1, 2, 4, 6, 6], rtol=1e-6)
    assert numbers(track, [0.9], "loop") == [1]
    assert numbers(track, [0.85, 0.9], "trim") == [6, None]
    np.testing.assert_allclose(numbers(track, [1.0, 1.2, 1.4, 1.6], "pingpong"), [6, 4, 2, 1], rtol=1e-6)


def test_wrong_tracks_and_ends_are_refused():
    for times, codes in (([], np.zeros((0, 2))), ([0, 1], np.zeros((3, 2))), ([0], np.zeros(1)), ([0, 0], np.eye(2))):
        with pytest.raises(ValueError):
            MotionTrack(np.array(times, float), codes)
    with pytest.raises(ValueError, match="before the last code"):
        ramp(4, last_time=0.1)
    with pytest.raises(ValueError, match="bounce"):
        ramp(4).at(0, "bounce")
