"""The motion track: interpolation, what comes after the driving's end, smoothing, neutral frames, strength, jitter."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_edit import DETECTOR, ENGINE, ColourEngine, driver, picture

from dpe_cli.crop import cut
from dpe_cli.drivings import prepare_driver
from dpe_cli.edit import paster_for, plan_jobs
from dpe_cli.errors import InputError
from dpe_cli.face import Box
from dpe_cli.jobs import Job, run_jobs
from dpe_cli.motion import Curve, Jitter, MotionTrack, most_neutral, nearest_code, read_curve, smoothed, swayed
from dpe_cli.motion_space import COORDINATES, LARGER, MOTION_DIM, POSE_SCALE, STRAY
from dpe_cli.report import Report
from dpe_cli.request import Driving, EditSettings
from dpe_cli.video import Frame

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


# Smoothing


@pytest.mark.parametrize(("fps", "reach"), [(24, 2), (25, 2), (NTSC, 2), (60, 5)])
def test_at_even_times_the_filter_is_savitzky_and_golays(fps, reach: int):
    from scipy.signal import savgol_filter

    codes = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    times = np.array([float(n / Fraction(fps)) for n in range(40)])
    ours, theirs = smoothed(MotionTrack(times, codes), 0.09).codes, savgol_filter(codes, 2 * reach + 1, 2, axis=0)
    np.testing.assert_allclose(ours[reach:-reach], theirs[reach:-reach], atol=1e-6)
    assert np.abs(ours - codes).mean() > 0.1


def test_motion_is_neither_delayed_nor_bent_at_uneven_times():
    times = np.cumsum(np.random.default_rng(1).choice([0.01, 0.02, 0.04], 60))
    parabola = np.stack([times, 3 * times**2 - times, np.ones(60)], 1)
    np.testing.assert_allclose(smoothed(MotionTrack(times, parabola), 0.09).codes, parabola, atol=1e-5)


def test_tremble_is_halved_and_a_mouth_that_speaks_is_kept():
    times = np.arange(250) / 25
    noise = np.random.default_rng(2).normal(0, 0.1, (250, 4))
    tremble = np.diff(smoothed(MotionTrack(times, noise), 0.09).codes, axis=0).std() / np.diff(noise, axis=0).std()
    speech = np.sin(2 * np.pi * 4 * times)[:, None]  # four syllables a second
    kept = smoothed(MotionTrack(times, speech), 0.09).codes.std() / speech.std()
    assert tremble < 0.6 and kept > 0.85


def test_a_still_driving_stays_exactly_still():
    codes = np.tile(np.random.default_rng(3).normal(size=20).astype(np.float32), (30, 1))
    np.testing.assert_array_equal(smoothed(MotionTrack(np.arange(30) / 29.97, codes), 0.3).codes, codes)


def test_nothing_is_smoothed_across_a_hole_and_nothing_at_0():
    times = np.concatenate([np.arange(10), np.arange(20, 30)]) / 25
    codes = np.repeat([[0.0], [100.0]], 10, axis=0)
    holed = MotionTrack(times, codes, last_time=2)
    np.testing.assert_allclose(smoothed(holed, 0.5).codes, codes, atol=1e-4)
    assert smoothed(holed, 0.5).last_time == 2
    assert smoothed(ramp(9), 0) is not None and smoothed(holed, 0) is holed
    assert len(smoothed(ramp(1), 0.09).codes) == 1


# Heads that move in their frame


def sway_of(
    x: np.ndarray, sides: np.ndarray | float = 100.0, times: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Place along x, in sides, and octaves of size that a head gets whose crops, 100 pixels or so, lie at these x."""
    half = np.broadcast_to(sides, x.shape) / 2
    times = np.arange(len(x)) / 25 if times is None else times
    track = MotionTrack(times, np.zeros((len(x), MOTION_DIM), np.float32))
    after = swayed(track, np.stack([x - half, 50 - half, x + half, 50 + half], 1))
    raw = (after.codes - track.codes) * np.pad(POSE_SCALE, (0, MOTION_DIM - len(POSE_SCALE)))
    rest = np.delete(raw, [3, 4], axis=1)
    np.testing.assert_allclose(rest, 0, atol=1e-6)
    return raw[:, COORDINATES["place"].start], raw[:, COORDINATES["size"].start]


def test_a_head_that_sways_in_its_frame_does_so_in_its_codes():
    wave = np.sin(2 * np.pi * np.arange(250) / 50)  # 2 s
    place, size = sway_of(200 + 4 * wave)
    np.testing.assert_allclose(place[50:200], 0.04 * wave[50:200], atol=4e-3)
    np.testing.assert_allclose(size, 0, atol=1e-6)
    _, size = sway_of(np.full(250, 200.0), 100 * 2 ** (0.1 * wave))
    np.testing.assert_allclose(size[50:200], 0.1 * wave[50:200], atol=0.01)


def test_a_variable_rate_is_no_row_of_holes_for_a_head_that_sways():
    """Steps of 20 and 70 ms: the longer ones are 3.5 times the usual, and yet no longer than what is smoothed over."""
    times = np.concatenate([[0], np.tile([0.02, 0.02, 0.07], 80)]).cumsum()
    place, _ = sway_of(200 + 4 * np.sin(np.pi * times), times=times)
    inside = slice(50, 200)
    np.testing.assert_allclose(place[inside], 0.04 * np.sin(np.pi * times[inside]), atol=4e-3)
    torn, _ = sway_of(200 + 4 * np.sin(np.pi * times), times=2 * times)  # 140 ms: these are holes
    assert np.abs(torn).max() < 0.01


def test_a_head_sways_within_limits():
    place, _ = sway_of(200 + 80 * np.sign(np.sin(np.arange(250) / 8)).cumsum() / 25)
    assert 0.9 * STRAY < np.abs(place).max() <= STRAY + 1e-6
    _, size = sway_of(np.full(250, 200.0), 100 * 2 ** (0.8 * np.sin(np.arange(250) / 8)))
    assert 0.9 * LARGER < np.abs(size).max() <= LARGER + 1e-6


def test_who_walks_does_not_sway_and_a_cut_moves_nobody():
    place, _ = sway_of(200 + 2.0 * np.arange(750))  # half a side a second
    np.testing.assert_allclose(place[250:500], 0, atol=1e-3)
    place, size = sway_of(np.repeat([200.0, 500.0], 100), np.repeat([100.0, 220.0], 100))
    np.testing.assert_allclose(place, 0, atol=1e-6)
    np.testing.assert_allclose(size, 0, atol=1e-6)


def test_a_still_does_not_sway():
    still = MotionTrack(np.zeros(1), np.ones((1, MOTION_DIM), np.float32))
    assert swayed(still, np.array([[0.0, 0, 9, 9]])) is still


# Relative motion


def talk(seed: int = 4) -> MotionTrack:
    """Begins and ends in a grimace; at rest, but for noise, in frames 30 to 49; talks elsewhere."""
    random = np.random.default_rng(seed)
    codes = 3 * np.sin(np.arange(100)[:, None] * [0.9, 1.1, 1.3, 0.7]) * [1, 1, 0.02, 10] + 2
    codes[30:60] = [0.5, -0.5, 0.1, 4]
    codes[:5] = codes[-5:] = [9, 9, 0.3, 90]  # still too, and far away
    return MotionTrack(np.arange(100) / 25, codes + random.normal(0, 0.01, codes.shape) * [1, 1, 0.02, 10])


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_neutral_frame_is_one_at_rest_whatever_the_units(scale: float, seed: int):
    track = talk(seed)
    assert 30 <= most_neutral(replace(track, codes=track.codes * np.float32(scale))) < 60


def test_the_neutral_frame_can_be_named_by_its_time():
    assert [nearest_code(talk(), time) for time in (0, 0.05, 3.96, 4.0)] == [0, 1, 99, 99]
    assert most_neutral(ramp(1)) == most_neutral(ramp(2)) == 0
    for time in (-0.1, 4.1):
        with pytest.raises(ValueError, match=r"not in a driving of 4\.000 s"):
            nearest_code(talk(), time)


def frames(count: int = 4, fps: int = 25, seed: int = 0) -> Iterator[tuple[Frame, Box]]:
    """Source frames of one noisy picture, from 0 s on, each with the same face."""
    noise = np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    for n in range(count):
        yield Frame(n, Fraction(n, fps), noise), Box(50, 30, 110, 90)


def edited(codes: list[list[float]], source=None, **settings) -> tuple[list[tuple[Job, Frame]], Report]:
    """The frames of a whole edit without files, in its mode exp, and its report."""
    chosen, report = EditSettings(**{"smooth": 0, **settings}), Report()
    drivers = {Path("d"): prepare_driver(driver(codes), chosen, report.notes.append)}
    jobs = plan_jobs(source or frames(), drivers, Driving(Path("d")), chosen, {}, None)
    placed = paster_for(chosen, ENGINE, DETECTOR) if chosen.paste is not False else None
    return list(run_jobs(jobs, ColourEngine(3), placed, report)), report


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_relative_motion_adds_the_change_against_the_neutral_frame(strength: float, monkeypatch: pytest.MonkeyPatch):
    codes, sent = [[10, 0, 0], [40, 5, 0], [20, 0, 0], [0, 0, 60]], []
    paint = ColourEngine.edit
    spy = lambda self, crops, expression, pose: sent.extend(expression) or paint(self, crops, expression, pose)  # noqa: E731
    monkeypatch.setattr(ColourEngine, "edit", spy)
    done, report = edited(codes, motion="relative", neutral_frame=0.08, strength=strength)
    own = ENGINE.motion_codes(cut(done[0][0].frame.rgb, Box(50, 30, 110, 90), 64)[0][None])[0]
    np.testing.assert_allclose(sent[1:], own + strength * (np.array(codes) - codes[2]), rtol=1e-5)  # 0 is the sample
    assert report.notes == ["the neutral frame of driver is at 0.080 s"]


def test_a_driving_at_rest_leaves_the_sources_own_expression_to_relative_motion():
    done, _ = edited([[50, 60, 70]] * 4, motion="relative")
    own, _ = edited([[0, 0, 0]] * 4, strength=0.0)
    for (_, relative), (_, untouched) in zip(done, own, strict=True):
        np.testing.assert_array_equal(relative.rgb, untouched.rgb)


def test_relative_motion_needs_motion_and_a_time_within_it():
    with pytest.raises(InputError, match="use --motion absolute"):
        edited([[1, 2, 3]], motion="relative")
    with pytest.raises(InputError, match="check --neutral-frame"):
        edited([[1, 2, 3]] * 3, motion="relative", neutral_frame=9)


# Strength over time


def test_a_curve_is_linear_between_its_keyframes_and_held_outside():
    curve = Curve((1, 2, 4), (0, 1, 0.5))
    assert [curve.at(time) for time in (0, 1, 1.5, 2, 3, 4, 9)] == [0, 0, 0.5, 1, 0.75, 0.5, 0.5]


def test_a_curve_is_read_from_csv(tmp_path: Path):
    path = tmp_path / "curve.csv"
    for text in ("time,value\n0,0\n1.5, 2\n", "\ufeff0,0\r\n\r\n1.5,2", "0,0\n1.5,2"):
        path.write_text(text, encoding="utf-8")
        assert read_curve(path) == Curve((0.0, 1.5), (0.0, 2.0))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no keyframes"), ("time,value\n", "no keyframes"), ("0,1\n0,2\n", "must rise"), ("nan,1\n", "must rise"),
        ("0,4\n", "between 0 and 3"), ("0,nan\n", "between 0 and 3"), ("0,1\n1,high\n", "high"),
        ("0;1\n", "line 1 has 1"), ("0,1\n1,1,1\n", "line 2 has 3"), (b"\xff\xfe0", "no curve"),
    ],
)  # fmt: skip
def test_a_wrong_curve_is_told_in_one_line(tmp_path: Path, text: str | bytes, why: str):
    path = tmp_path / "curve.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=why):
        read_curve(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_curve(tmp_path / "none.csv")


def test_frames_where_the_curve_is_zero_are_the_sources_and_the_others_follow_it():
    curve = Curve((0.0, 0.08, 0.16, 0.24), (0, 0, 1, 1))
    done, report = edited([[200, 0, 0]], source=frames(8), curve=curve)
    untouched = [np.array_equal(job.frame.rgb, frame.rgb) for job, frame in done]
    assert untouched == [True] * 3 + [False] * 5
    assert [fate.reason for fate in report.frames] == ["strength 0"] * 3 + [None] * 5
    assert [fate.strength for fate in report.frames] == [None] * 3 + [pytest.approx(0.5)] + [1.0] * 4
    own = ENGINE.motion_codes(cut(done[0][0].frame.rgb, Box(50, 30, 110, 90), 64)[0][None])[0]
    halfway, full = (done[number][1].rgb[45, 80].astype(float) for number in (3, 4))
    assert full[0] == pytest.approx(200, abs=2) and halfway[0] == pytest.approx((200 + own[0]) / 2, abs=2)


def test_a_curve_of_one_is_the_same_as_strength_one_whatever_the_batches():
    codes = [[200.3, 0.7, 9], [10, 20, 30], [99, 0, 99], [5, 5, 5]]
    plain, _ = edited(codes, colour_match=False)  # which remembers colours from frame to frame
    curved, _ = edited(codes, colour_match=False, curve=Curve((0.0, 0.04, 0.08, 0.12), (1, 0.3, 1, 1)))
    same = [np.array_equal(a.rgb, b.rgb) for (_, a), (_, b) in zip(plain, curved, strict=True)]
    assert same == [True, False, True, True]


# Jitter


@pytest.mark.parametrize("paste", [True, False])
def test_a_still_source_with_a_still_driver_gives_a_still_output(paste: bool):
    done, report = edited([[200, 100, 0]] * 6, source=frames(6), smooth=1.0, paste=paste)
    assert all(np.array_equal(frame.rgb, done[0][1].rgb) for _, frame in done)
    assert [fate.jitter for fate in report.frames] == [None] + [0.0] * 5
    assert report.summary()["jitter"] == {"mean": 0.0, "largest": 0.0, "frames": 5}


def test_jitter_is_the_change_that_nothing_asked_for():
    face, place = picture(), (slice(40, 80), slice(60, 100))
    worse = face.copy()
    worse[40:80, 60:80] += 4  # half of the face, by 4
    code, jitter = [np.array([3.0, 4.0])], Jitter()
    assert jitter.step(face, place, face, True, code, 1.0) is None  # the first
    assert jitter.step(face, place, worse, True, code, 1.0) == 2.0
    assert jitter.step(face, place, worse[40:80, 60:100], False, code, 0.5) is None  # another strength
    assert jitter.step(face, place, face[40:80, 60:100], False, code, 0.5) == 2.0
    assert jitter.step(face, place, face[40:80, 60:100], False, [code[0] * 1.1], 0.5) is None  # another code
    assert jitter.step(worse, place, face[40:80, 60:100], False, [code[0] * 1.1], 0.5) is None  # another source
    jitter.forget()
    assert jitter.step(worse, place, face[40:80, 60:100], False, [code[0] * 1.1], 0.5) is None


def test_a_report_without_still_moments_has_no_jitter():
    codes = [[200, 100, 0], [0, 100, 200], [200, 100, 0], [0, 100, 200]]
    assert edited(codes)[1].summary()["jitter"] is None
