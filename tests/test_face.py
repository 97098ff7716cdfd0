"""Tracking and smoothing. People are painted squares of one colour each; a stand-in detector finds their colours."""

import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from dpe_cli.errors import FaceError, InputError
from dpe_cli.face import Box, Detection, crop_box, face_size, settle, smooth_boxes, track_faces
from dpe_cli.video import Frame

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# Eyes, nose and corners of the mouth in a square head, as shares of its side.
FEATURES = np.array([[0.25, 0.35], [0.75, 0.35], [0.5, 0.55], [0.3, 0.8], [0.7, 0.8]])


def face_at(x: float, y: float, side: float, score: float = 0.9) -> Detection:
    """A frontal face whose head is a square of this side around x, y."""
    box = Box.square(x, y, side)
    return Detection(box, FEATURES * side + (box.x0, box.y0), score)


class PaintedFaces:
    """Finds squares of pure colours; remembers the shapes of the pictures it was given."""

    name = "painted"

    def __init__(self):
        self.shapes: list[tuple[int, int]] = []

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        self.shapes.append(rgb.shape[:2])
        found = []
        for colour in (RED, GREEN, BLUE):
            rows, columns = np.nonzero((np.abs(rgb.astype(int) - colour) < 40).all(-1))
            if len(rows) > 60:
                width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
                if max(width, height) < 1.3 * min(width, height):  # a hidden one is not a face
                    x, y = columns.min() + width / 2, rows.min() + height / 2
                    found.append(face_at(x, y, max(width, height), len(rows) / rgb.size))
        return sorted(found, key=lambda face: -face.score)


class Acquaintance(PaintedFaces):
    """Knows people by their colour."""

    def embed(self, rgb: np.ndarray, face: Detection) -> np.ndarray:
        x, y = (int(value) for value in face.box.centre)
        return rgb[y, x] / np.linalg.norm(rgb[y, x].astype(float))


def paint(index: int, people: dict[tuple[int, int, int], tuple[float, float, float]], shade: int = 90, fps: int = 25):
    """A 480 x 640 frame; people: colour -> x, y, side. Later ones stand in front."""
    rgb = np.full((480, 640, 3), shade, np.uint8)
    for colour, (x, y, side) in people.items():
        x0, y0, x1, y1 = (round(max(v, 0)) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2))
        rgb[y0:y1, x0:x1] = colour
    return Frame(index, Fraction(index, fps), rgb)


def centres(tracked: Iterable[tuple[Frame, Detection | None]]) -> list[tuple[int, int] | None]:
    return [None if face is None else tuple(round(v) for v in face.box.centre) for _, face in tracked]


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


# Choosing and following


def test_every_frame_comes_out_once_and_in_order():
    frames = [paint(i, {RED: (100 + i, 200, 80)} if i % 3 else {}) for i in range(20)]
    tracked = list(track_faces(iter(frames), PaintedFaces()))
    assert [frame for frame, _ in tracked] == frames
    assert [face is None for _, face in tracked] == [i % 3 == 0 for i in range(20)]


@pytest.mark.parametrize(
    ("choose", "x"),
    [("largest", 500), ("left", 100), ("right", 500), ("center", 330), ("0", 100), ("1", 330), ("2", 500)],
)
def test_a_person_is_chosen_by_size_or_place(choose: str, x: int):
    people = {RED: (330, 150, 60), GREEN: (500, 240, 120), BLUE: (100, 200, 80)}
    assert centres(track_faces([paint(i, people) for i in range(3)], PaintedFaces(), choose)) == [
        (x, y) for x_, y in ((330, 150), (500, 240), (100, 200)) if x_ == x for _ in range(3)
    ]


def test_tracking_is_lazy():
    def frames():
        yield paint(0, {RED: (100, 200, 80)})
        raise AssertionError("a second frame was asked for")

    frame, face = next(track_faces(frames(), PaintedFaces()))
    assert frame.index == 0 and face is not None


def test_a_known_face_is_searched_in_a_small_region():
    detector = PaintedFaces()
    list(track_faces([paint(i, {RED: (100 + 5 * i, 200, 150)}) for i in range(10)], detector))
    assert detector.shapes == [(480, 640)] + [(224, 224)] * 10


def test_the_place_of_a_face_found_in_a_region_is_that_of_the_frame():
    for x, y, side in ((320, 240, 60), (320, 240, 200), (40, 50, 80), (590, 430, 80)):
        frames = [paint(i, {RED: (x + i, y, side)}) for i in range(5)]
        for i, (_, face) in enumerate(track_faces(frames, PaintedFaces())):
            assert face.box.centre == pytest.approx((x + i, y), abs=0.02 * side)
            assert face.box.width == pytest.approx(side, rel=0.05)


def test_a_still_face_is_searched_in_the_same_region_each_time():
    """A region that went with each detection would be sampled differently and make the points tremble."""

    class Trembling(PaintedFaces):
        def detect(self, rgb: np.ndarray) -> list[Detection]:
            pictures.append(rgb)
            wobble = 1.5 * (-1) ** len(pictures)
            return [
                Detection(Box.square(*face.box.centre, face.box.width + wobble), face.points + wobble, face.score)
                for face in super().detect(rgb)
            ]

    pictures: list[np.ndarray] = []
    list(track_faces([paint(i, {RED: (300, 200, 100)}) for i in range(10)], Trembling()))
    assert all(np.array_equal(picture, pictures[1]) for picture in pictures[2:])


def test_a_larger_face_passing_by_does_not_take_the_place():
    """Green walks from the right to the left, behind red for some frames."""
    frames = [paint(i, {GREEN: (620 - 12 * i, 220, 160), RED: (200 + i, 200, 100)}) for i in range(50)]
    assert centres(track_faces(frames, PaintedFaces(), "left")) == [(200 + i, 200) for i in range(50)]


def test_a_face_hidden_by_a_larger_one_is_lost_and_found_again():
    """Green passes in front of red."""
    frames = [paint(i, {RED: (200, 200, 90), GREEN: (560 - 16 * i, 220, 150)}) for i in range(45)]
    seen = centres(track_faces(frames, PaintedFaces(), "left"))
    assert {None if place is None else abs(place[0] - 200) < 10 for place in seen} == {
        True,
        None,
    }  # cut while half hidden
    assert seen[:10] == [(200, 200)] * 10 and seen[-8:] == [(200, 200)] * 8


def test_a_face_that_went_on_moving_in_a_gap_is_found_again():
    frames = [paint(i, {} if 10 <= i < 20 else {RED: (200 + 2 * i, 200, 90)}) for i in range(30)]
    seen = centres(track_faces(frames, PaintedFaces()))
    assert [place is None for place in seen] == [10 <= i < 20 for i in range(30)]


def test_somebody_else_is_not_taken_for_the_lost_person_at_once_but_in_the_end():
    frames = [paint(i, {RED: (150, 200, 90)} if i < 5 else {GREEN: (500, 200, 90)}) for i in range(45)]
    seen = centres(track_faces(frames, PaintedFaces()))
    assert seen[:5] == [(150, 200)] * 5
    assert seen[5:28] == [None] * 23
    assert seen[-12:] == [(500, 200)] * 12


def test_after_a_cut_the_person_is_chosen_again_at_once():
    before = [paint(i, {RED: (150, 200, 90), GREEN: (400, 200, 60)}, shade=60) for i in range(5)]
    after = [paint(i, {GREEN: (500, 300, 160), RED: (100, 100, 50)}, shade=180) for i in range(5, 10)]
    assert centres(track_faces(before + after, PaintedFaces())) == [(150, 200)] * 5 + [(500, 300)] * 5


def test_the_first_frame_with_enough_faces_decides_a_number():
    alone, two = {RED: (100, 200, 80)}, {RED: (100, 200, 80), GREEN: (400, 200, 80)}
    frames = [paint(i, alone if i < 4 else two) for i in range(8)]
    assert centres(track_faces(frames, PaintedFaces(), "1")) == [None] * 4 + [(400, 200)] * 4


def test_a_number_that_never_comes_says_how_many_faces_there_were():
    frames = [paint(i, {RED: (100, 200, 80), GREEN: (400, 200, 80)}) for i in range(4)]
    with pytest.raises(FaceError, match="at most 2 in a frame, is the one chosen by 5"):
        list(track_faces(frames, PaintedFaces(), "5"))


def test_without_any_face_there_is_none_and_no_error():
    assert centres(track_faces([paint(i, {}) for i in range(3)], PaintedFaces(), "2")) == [None] * 3


def test_faces_too_small_to_edit_are_not_chosen():
    frames = [paint(i, {RED: (100, 200, 12), GREEN: (300, 200, 40)}) for i in range(2)]
    assert centres(track_faces(frames, PaintedFaces(), "left")) == [(300, 200)] * 2


def save(path: Path, frame: Frame) -> Path:
    cv2.imwrite(str(path), frame.rgb[..., ::-1])
    return path


def test_a_person_is_chosen_by_a_picture(tmp_path: Path):
    reference = save(tmp_path / "her.png", paint(0, {BLUE: (320, 240, 200)}))
    crowd = {RED: (500, 240, 120), BLUE: (100, 200, 80)}
    frames = [paint(i, {RED: (500, 240, 120)} if i < 3 else crowd) for i in range(6)]
    seen = centres(track_faces(frames, Acquaintance(), str(reference)))
    assert seen == [None] * 3 + [(100, 200)] * 3


def test_a_picture_of_somebody_absent_says_so(tmp_path: Path):
    reference = save(tmp_path / "her.png", paint(0, {BLUE: (320, 240, 200)}))
    with pytest.raises(FaceError, match=r"chosen by .*her\.png"):
        list(track_faces([paint(0, {RED: (500, 240, 120)})], Acquaintance(), str(reference)))


def test_a_picture_without_a_face_says_so(tmp_path: Path):
    reference = save(tmp_path / "wall.png", paint(0, {}))
    with pytest.raises(FaceError, match=r"no face was found in .*wall\.png"):
        track_faces([], Acquaintance(), str(reference))


def test_a_picture_needs_a_detector_that_knows_people(tmp_path: Path):
    reference = save(tmp_path / "her.png", paint(0, {BLUE: (320, 240, 200)}))
    with pytest.raises(FaceError, match=r"painted cannot tell .*her\.png; name an insightface pack with --face-models"):
        track_faces([], PaintedFaces(), str(reference))


@pytest.mark.parametrize("choose", ["biggest", "-1", "", "1.5", "nowhere/her.jpg"])
def test_a_choice_that_means_nothing_says_what_can_be_chosen(choose: str):
    with pytest.raises(InputError, match="use largest, left, right, center, a number"):
        track_faces([], PaintedFaces(), choose)


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
