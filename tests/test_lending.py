"""Shut eyes and mouths of a source: opened with what these showed a moment before; else eyes are left shut."""

import contextlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from dpe_cli import weights
from dpe_cli.face import Box
from dpe_cli.jobs import Job, run_jobs
from dpe_cli.landmarks import EYES, LIPS_OUTER, FaceShape
from dpe_cli.lending import (
    AJAR,
    BACK,
    GAZE,
    LIDS,
    MOUTH,
    SHUT,
    SHUTTEST,
    TIGHTEST,
    TURN,
    TURNED,
    Lending,
    drawable,
    mouth_of,
    possible,
    where_seen,
)
from dpe_cli.motion_space import MOTION_DIM, MotionSpace
from dpe_cli.regions import region_mask, transplant
from dpe_cli.report import Report
from dpe_cli.video import Frame

SIZE = 256
POINTS = MotionSpace.load(weights.folder() / "motion-space.json").template * 85 + [128, 128, 0]
FACE = FaceShape(POINTS, np.zeros(52))


def hidden(*parts: list[int], visibility: float = 0.6) -> FaceShape:
    """The face with something before some of its parts."""
    seen = np.full(478, 0.95, np.float32)
    seen[np.concatenate(parts)] = visibility
    return replace(FACE, visibility=seen)


def test_of_parts_that_something_hides_little_is_asked():
    own, asked = np.zeros((3, MOTION_DIM)), np.ones((3, MOTION_DIM))
    found = where_seen(asked, own, [hidden(LIPS_OUTER), hidden(*EYES, visibility=0.3), None])
    others = np.delete(np.arange(MOTION_DIM), np.r_[MOUTH])
    np.testing.assert_allclose(found[0, MOUTH], 0.25, atol=1e-6)
    assert (found[0, others] == 1).all() and (found[2] == 1).all()
    assert (found[1, LIDS] == 0).all() and (found[1, GAZE] == 0).all() and (found[1, MOUTH] == 1).all()


def test_eyes_that_are_shut_stay_so_and_open_ones_may_close():
    own, asked = np.zeros((4, MOTION_DIM)), np.ones((4, MOTION_DIM))
    own[:, LIDS] = [[SHUT - 0.5] * 2, [(SHUT + AJAR) / 2] * 2, [AJAR + 0.1] * 2, [0.5] * 2]
    asked[3, LIDS] = -2  # a blink
    found = drawable(asked, own)
    np.testing.assert_allclose(found[0, LIDS], SHUT - 0.5)
    np.testing.assert_allclose(found[1, LIDS], (own[1, LIDS] + asked[1, LIDS]) / 2)
    np.testing.assert_array_equal(found[2:], asked[2:])
    others = np.delete(np.arange(MOTION_DIM), range(LIDS.start, LIDS.stop))
    np.testing.assert_array_equal(found[:, others], asked[:, others])


def code(lids: float, turn: float = 0.0) -> np.ndarray:
    """(20,)"""
    result = np.zeros(MOTION_DIM)
    result[LIDS], result[TURN] = lids, turn
    return result


def plain(shade: int, light: int = 120) -> np.ndarray:
    """A picture whose eyes, mouth and corner have a shade."""
    result = np.full((SIZE, SIZE, 3), light, np.uint8)
    for part in (*EYES, LIPS_OUTER):
        x0, y0, x1, y1 = np.r_[POINTS[part, :2].min(0), POINTS[part, :2].max(0)].astype(int)
        result[y0 - 1 : y1 + 2, x0 - 1 : x1 + 2] = shade
    result[0, 0] = shade
    return result


def opened(lids: list[float], asked: list[float], times: list[float], turns=(0, 0), whose=(0, 0), look=FACE):
    """The shade of the second picture's eyes, 200, after a first one of 50; and what its corner has."""
    codes = dict(zip((50, 200), (code(*each) for each in zip(lids, turns, strict=True)), strict=True))
    eyes = Lending(lambda crops: np.stack([codes[crop[0, 0, 0]] for crop in crops]), lambda crop: look)
    wanted = np.stack([code(each) for each in asked])
    crops = np.stack([plain(50), plain(200)])
    found = eyes(crops[:1], wanted[:1], times[:1], whose[:1])
    np.testing.assert_array_equal(found[0], crops[0])
    found = eyes(crops[1:], wanted[1:], times[1:], whose[1:])[0]
    np.testing.assert_array_equal(crops[1], plain(200))  # the source's frames are not ours
    return tuple(found[round(POINTS[159, 1]), round(POINTS[159, 0])]), tuple(found[0, 0])


def test_shut_eyes_get_those_of_the_moment_before():
    assert opened([0, SHUT], [0, 0], [0, 0.2]) == ((50, 50, 50), (200, 200, 200))


def test_half_shut_eyes_are_no_open_ones():
    codes = np.stack([code(lids) for lids in (0.8, 0.7, AJAR + 0.2, SHUT)])
    crops = np.stack([plain(shade) for shade in (50, 60, 70, 200)])
    eyes = Lending(lambda crops: codes, lambda crop: FACE)
    found = eyes(crops, np.stack([code(0.8)] * 4), [0, 0.04, 0.08, 0.12], [0] * 4)
    seen = [int(crop[round(POINTS[159, 1]), round(POINTS[159, 0]), 0]) for crop in found]
    assert seen == [50, 60, 60, 60]  # neither left as they are nor given to the shut ones


@pytest.mark.parametrize(
    "other",
    [
        {"lids": [0, AJAR + 0.1]},  # not shut
        {"lids": [SHUT, SHUT]},  # never open
        {"lids": [SHUT, SHUT - 2]},
        {"asked": [0, SHUT + 0.1]},  # to be shut as they are
        {"times": [0, BACK + 0.1]},
        {"turns": [0, TURNED + 0.1]},
        {"whose": [0, 1]},
        {"look": None},
        {"look": hidden(*EYES)},
    ],
)
def test_eyes_are_left_where_none_fit_or_none_are_asked_for(other):
    asked = {"lids": [0, SHUT], "asked": [0, 0], "times": [0, 0.2]} | other
    assert opened(**asked) == ((200, 200, 200), (200, 200, 200))


def speaking(opening: float) -> np.ndarray:
    """(20,) with open eyes and a mouth as open as that."""
    result = code(0.0)
    result[MOUTH.start] = (0.104 - opening) / 0.0734
    assert mouth_of(result) == pytest.approx(opening)
    return result


def test_lips_and_lids_are_not_more_than_shut():
    codes = np.stack([speaking(opening) for opening in (0.2, 0.0, -0.02, -0.4)]).astype(np.float32)
    codes[1, LIDS] = -2.5, -6
    found = possible(codes)
    np.testing.assert_array_equal(found[[0, 2]], codes[[0, 2]])  # faces do so
    assert found[1, LIDS].tolist() == pytest.approx([-2.5, TIGHTEST])
    assert mouth_of(found[3]) == pytest.approx(SHUTTEST, abs=1e-5)
    others = np.delete(np.arange(MOTION_DIM), [MOUTH.start, MOUTH.start + 1, LIDS.start, LIDS.start + 1])
    np.testing.assert_array_equal(found[:, others], codes[:, others])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("mouths", "asked", "lent"),
    [
        ([0.3, 0.2, 0.0], 0.22, 60),  # the one that is most nearly so open
        ([0.37, 0.2, 0.0], 0.4, 50),
        ([0.3, 0.2, 0.0], 0.4, 200),  # would have to open further, and be painted over
        ([0.3, 0.2, 0.15], 0.22, 200),  # shows its own inside
        ([0.3, 0.2, 0.0], 0.03, 200),  # is to be shut, nearly
        ([0.02, 0.03, 0.0], 0.3, 200),  # never open
        ([0.3, 0.25, 0.0], 0.1, 200),  # farther from what is asked than the shut one
    ],
)
def test_a_shut_mouth_gets_the_one_of_a_moment_before(mouths, asked, lent):
    codes = np.stack([speaking(opening) for opening in mouths])
    crops = np.stack([plain(shade) for shade in (50, 60, 200)])
    lending = Lending(lambda crops: codes, lambda crop: FACE)
    wanted = np.stack([*codes[:2], speaking(asked)])
    found = lending(crops, wanted, [0, 0.04, 0.08], [0] * 3)
    np.testing.assert_array_equal(found[:2], crops[:2])
    lips, eye = np.round(POINTS[13]).astype(int), np.round(POINTS[159]).astype(int)
    assert found[2, lips[1], lips[0], 0] == lent
    assert found[2, eye[1], eye[0], 0] == 200


def test_what_a_mouth_showed_lately_counts_too():
    """Else teeth would come and go where a source that speaks is near the border."""
    openings = [0.25, 0.09, 0.08, 0.11, 0.09]  # of 0.2 that are asked for; the fourth alone shows enough
    codes = np.stack([speaking(opening) for opening in openings])
    crops = np.stack([plain(shade) for shade in (50, 200, 210, 220, 230)])
    found = Lending(lambda crops: codes, lambda crop: FACE)(
        crops, np.stack([speaking(0.2)] * 5), [0, 0.4, 0.44, 0.48, 0.52], [0] * 5
    )
    lips = np.round(POINTS[13, :2]).astype(int)
    assert found[1:, lips[1], lips[0], 0].tolist() == [50] * 4


@pytest.mark.parametrize("light", [110, 90, 200])
def test_what_is_lent_has_the_light_of_its_moment(light):
    """A flash is not lent at all: there is no telling what it hid."""
    codes, moments = np.stack([speaking(0.3), speaking(0.0)]), [plain(light - 70, light), plain(200)]
    lending = Lending(lambda crops: codes, lambda crop: FACE)
    found = lending(np.stack(moments), np.stack([speaking(0.3)] * 2), [0, 0.1], [0] * 2)[1]
    lips = np.round(POINTS[13, :2]).astype(int)
    beside = lips + [0, -30]
    assert abs(int(found[lips[1], lips[0], 0]) - (200 if light == 200 else 50)) <= 2
    assert abs(int(found[beside[1], beside[0], 0]) - 120) <= 2


def test_what_is_transplanted_moves_with_the_face():
    donor, host = np.full((2, SIZE, SIZE, 3), 200, np.uint8)
    eye = tuple(np.round(POINTS[159, 1::-1]).astype(int))
    donor[eye[0] - 2 : eye[0] + 3, eye[1] - 2 : eye[1] + 3] = 0
    moved = transplant(host, donor, POINTS + [20, -10, 0], POINTS, "eyes")
    dark = np.argwhere(moved[..., 0] < 100).mean(0)
    np.testing.assert_allclose(dark, np.add(eye, [-10, 20]), atol=1)
    outside = region_mask(POINTS + [20, -10, 0], "eyes", SIZE) == 0
    assert (moved[outside] == 200).all()


class Measuring:
    """An engine that sees landmarks: a crop's shade says whether the eyes are open, below 100 they are."""

    size, batch_size = SIZE, 2

    def __init__(self):
        self.measured, self.seen = self, []

    def lanes(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext([self])

    def forget(self) -> None:
        pass

    def face(self, crop: np.ndarray) -> FaceShape:
        return FACE

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        return np.stack([code(0.0 if crop[0, 0, 0] < 100 else SHUT) for crop in crops]).astype(np.float32)

    def read(self, crops: np.ndarray) -> list[None]:
        return [None] * len(crops)

    def carried(self, crops: np.ndarray, *codes: np.ndarray | None) -> list[None]:
        return [None] * len(crops)

    def turns(self, told: list, pose: np.ndarray | None) -> list[float | None]:
        return [None] * len(told) if pose is None else [15.0 * abs(yaw) for yaw in pose[:, 0].tolist()]

    def edit(self, crops: np.ndarray, expression: np.ndarray, pose: np.ndarray | None, told: list) -> np.ndarray:
        assert len(told) == len(crops)
        self.seen += [int(crop[round(POINTS[159, 1]), round(POINTS[159, 0]), 0]) for crop in crops]
        return crops


@pytest.mark.parametrize(("cut", "eyes"), [(None, [50, 50, 50, 60, 60]), (2, [50, 50, 220, 60, 60])])
def test_an_edit_opens_blinks_of_a_shot(cut, eyes):
    engine, box = Measuring(), Box(0, 0, SIZE, SIZE)
    shades = [50, 210, 220, 60, 230]
    jobs = [
        Job(Frame(n, Fraction(n, 25), plain(shade)), box, n / 25, expression=code(0.0).astype(np.float32), track=1)
        for n, shade in enumerate(shades)
    ]
    jobs = [replace(job, shot=int(cut is not None and n >= cut)) for n, job in enumerate(jobs)]
    list(run_jobs(jobs, engine, None, Report()))
    assert engine.seen == eyes


def test_a_head_that_is_turned_far_is_told():
    box, report = Box(0, 0, SIZE, SIZE), Report()
    poses = [np.eye(1, 20, 0, dtype=np.float32)[0] * yaw for yaw in (1, 2, 3, -4)]
    jobs = [Job(Frame(n, Fraction(n, 25), plain(60)), box, n / 25, pose=pose) for n, pose in enumerate(poses)]
    list(run_jobs(jobs, Measuring(), None, report))
    assert [frame.turn for frame in report.frames] == [15, 30, 45, 60]
    (finding,) = report.findings()
    assert "more than 30 degrees" in finding and "2 frames, the most 60 degrees in frame 3" in finding
    report.frames = report.frames[:2]
    assert report.findings() == []
