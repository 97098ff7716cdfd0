"""Choosing people and following them. They are painted squares; a stand-in detector finds their colours."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from painted import BLUE, GREEN, RED, Acquaintance, PaintedFaces, centres, paint

from dpe_cli.errors import FaceError, InputError
from dpe_cli.face import Box, Detection, FaceDetector, make_detector
from dpe_cli.people import SETTLED, follow, track_faces
from dpe_cli.shots import AROUND
from dpe_cli.tracking import cheapest_pairs
from dpe_cli.video import Frame

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


def test_tracking_looks_no_further_than_the_shot_detector():
    def frames():
        yield from (paint(i, {RED: (100, 200, 80)}) for i in range(1 + AROUND))
        raise AssertionError("a further frame was asked for")

    frame, face = next(track_faces(frames(), PaintedFaces()))
    assert frame.index == 0 and face is not None


def test_a_known_face_is_searched_in_a_small_region_and_the_frame_five_times_a_second():
    detector = PaintedFaces()
    list(track_faces([paint(i, {RED: (100 + 5 * i, 200, 150)}) for i in range(26)], detector))
    whole, glance, near = (480, 640), (240, 320), (224, 224)
    first, further = [whole, near] + [near] * 4, [near, glance] + [near] * 4
    assert detector.shapes == first + 4 * further + [near, whole]  # once a second in full


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
            if len(rgb) == len(rgb[0]):  # a region, no frame
                pictures.append(rgb)
            wobble = 1.5 * (-1) ** len(pictures)
            return [
                Detection(Box.square(*face.box.centre, face.box.width + wobble), face.points + wobble, face.score)
                for face in super().detect(rgb)
            ]

    pictures: list[np.ndarray] = []
    list(track_faces([paint(i, {RED: (300, 200, 100)}) for i in range(10)], Trembling()))
    assert len(pictures) == 10 and all(np.array_equal(picture, pictures[1]) for picture in pictures[2:])


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


def test_somebody_else_is_never_taken_for_the_lost_person():
    frames = [paint(i, {RED: (150, 200, 90)} if i < SETTLED else {GREEN: (500, 200, 90)}) for i in range(60)]
    assert centres(track_faces(frames, PaintedFaces())) == [(150, 200)] * SETTLED + [None] * (60 - SETTLED)


def test_a_first_choice_that_hardly_lasted_is_made_again():
    """It may have been a stain on the wall."""
    frames = [paint(i, {RED: (150, 200, 90)} if i < 3 else {GREEN: (500, 200, 90)}) for i in range(60)]
    seen = centres(track_faces(frames, PaintedFaces()))
    assert seen[:3] == [(150, 200)] * 3 and seen[-20:] == [(500, 200)] * 20


@pytest.mark.parametrize(("detector", "light"), [(PaintedFaces, 0), (Acquaintance, 60)], ids=["colours", "network"])
def test_a_person_is_found_again_after_a_cut_smaller_and_elsewhere(detector: type, light: int):
    """And after a shot of the other alone; the largest, which it was first, is now somebody else."""
    one = [paint(i, {RED: (150, 200, 90), GREEN: (400, 200, 60)}, shade=60) for i in range(15)]
    two = [paint(i, {GREEN: (300, 200, 160)}, shade=60 + light) for i in range(15, 25)]
    three = [paint(i, {GREEN: (500, 300, 160), RED: (100, 100, 50)}, shade=60 + 2 * light) for i in range(25, 35)]
    wanted = [(150, 200)] * 15 + [None] * 10 + [(100, 100)] * 10
    assert centres(track_faces(one + two + three, detector())) == wanted


def test_finding_somebody_by_colours_is_told_once_and_by_a_network_not():
    frames = [paint(i, {RED: (150 + 300 * (i >= 15), 200, 90)}, shade=60 + 90 * (i >= 15)) for i in range(30)]
    for detector, remarks in ((PaintedFaces(), 1), (Acquaintance(), 0)):
        heard: list[str] = []
        list(follow(frames, detector, ["largest"], heard.append))
        assert len(heard) == remarks and all("painted has no recognition network" in message for message in heard)


def test_two_people_are_followed_in_one_pass():
    frames = [paint(i, {RED: (100 + 4 * i, 200, 80), GREEN: (500 - 4 * i, 200, 80)}) for i in range(20)]
    both = [faces for _, faces in follow(frames, PaintedFaces(), ["left", "right"])]
    alone = [[face for _, face in track_faces(frames, PaintedFaces(), choose)] for choose in ("left", "right")]
    assert [[face.box for face in faces] for faces in both] == [
        [one.box, two.box] for one, two in zip(*alone, strict=True)
    ]


@pytest.mark.parametrize("detector", [PaintedFaces, Acquaintance], ids=["by colours", "by a network"])
@pytest.mark.parametrize("speed", [11, 25])
def test_two_people_who_cross_do_not_change_places(detector: type, speed: int):
    """Of one size, at one height: each hides the other for a while; who is in front has no gap at all."""
    count = 460 // speed
    frames = [paint(i, {RED: (100 + speed * i, 200, 90), GREEN: (540 - speed * i, 200, 90)}) for i in range(count)]
    for choose, place in (("left", lambda i: 100 + speed * i), ("right", lambda i: 540 - speed * i)):
        seen = centres(track_faces(frames, detector(), choose))
        assert all(spot is None or abs(spot[0] - place(i)) < 25 for i, spot in enumerate(seen))
        gaps = [spot is None for spot in seen]
        assert not any(gaps[:3]) and not any(gaps[-3:])
        assert choose == "left" or not any(gaps)


def test_the_first_frame_with_enough_faces_decides_a_number():
    """Further faces are looked for five times a second."""
    alone, two = {RED: (100, 200, 80)}, {RED: (100, 200, 80), GREEN: (400, 200, 80)}
    frames = [paint(i, alone if i < 4 else two) for i in range(8)]
    assert centres(track_faces(frames, PaintedFaces(), "1")) == [None] * 5 + [(400, 200)] * 3


def test_a_track_is_chosen_by_its_number_and_its_person_followed():
    one = [paint(i, {RED: (150, 200, 90), GREEN: (400, 200, 60)}, shade=60) for i in range(5)]
    two = [paint(i, {GREEN: (500, 300, 160), RED: (100, 100, 50)}, shade=180) for i in range(5, 10)]
    assert centres(track_faces(one + two, Acquaintance(), "track:2")) == [(400, 200)] * 5 + [(500, 300)] * 5
    assert centres(track_faces(one + two, Acquaintance(), "track:3")) == [None] * 5 + [(100, 100)] * 5
    with pytest.raises(FaceError, match="chosen by track:9"):
        list(track_faces(one, PaintedFaces(), "track:9"))


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
    frames = [paint(i, {RED: (500, 240, 120)} if i < 3 else crowd) for i in range(8)]
    seen = centres(track_faces(frames, Acquaintance(), str(reference)))
    assert seen == [None] * 5 + [(100, 200)] * 3


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


@pytest.mark.parametrize("choose", ["biggest", "-1", "", "1.5", "nowhere/her.jpg", "track3"])
def test_a_choice_that_means_nothing_says_what_can_be_chosen(choose: str):
    with pytest.raises(InputError, match="use largest, left, right, center, a number"):
        track_faces([], PaintedFaces(), choose)


@pytest.mark.parametrize("choose", ["track:", "track:0", "track:red"])
def test_a_track_without_a_number_says_where_to_find_one(choose: str):
    with pytest.raises(InputError, match="as `dpe faces` lists them"):
        track_faces([], PaintedFaces(), choose)


# Real faces


def head(picture: np.ndarray, x0: int, y0: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(200, 160, 3) uint8 of a picture's part and where in it the head is, (200, 160) bool."""
    part = cv2.resize(picture[y0 : y0 + height, x0 : x0 + width], (160, 200))
    rows, columns = np.mgrid[0:200, 0:160]
    return part, ((columns - 80) / 78) ** 2 + ((rows - 100) / 98) ** 2 < 1


@pytest.fixture(scope="module")
def crossing() -> list[Frame]:
    """The astronaut walks to the right behind somebody of insightface's group photograph; 640 x 320, 33 frames."""
    astronaut = pytest.importorskip("skimage.data").astronaut()
    path = Path(find_spec("insightface").origin).parent / "data/images/t1.jpg"
    group = cv2.imread(str(path))[..., ::-1]
    heads = head(astronaut, 140, 20, 168, 210), head(group, 430, 240, 176, 220)
    room = np.linspace(70, 150, 640).astype(np.uint8)[None, :, None] + np.zeros((320, 1, 3), np.uint8)
    frames = []
    for index in range(33):
        rgb = room.copy()
        for (part, mask), x in zip(heads, (20 + 14 * index, 460 - 14 * index), strict=True):
            rgb[60:260, x : x + 160][mask] = part[mask]
        frames.append(Frame(index, Fraction(index, 25), rgb))
    return frames


def walked(frames: list[Frame], detector: FaceDetector) -> None:
    """Both are followed to the end, never in the other's place."""
    left, right = zip(*(faces for _, faces in follow(frames, detector, ["left", "right"])), strict=True)
    for faces, place in ((left, lambda i: 100 + 14 * i), (right, lambda i: 540 - 14 * i)):
        for index, face in enumerate(faces):
            assert face is None or abs(face.box.centre[0] - place(index)) < 30, index
        assert None not in faces[:8] and None not in faces[-8:]
    assert None not in right  # in front all the time


def test_two_real_people_who_cross_are_told_apart_by_a_network(shared: Callable[[str], Path], crossing: list[Frame]):
    walked(crossing, make_detector("insightface", shared("models/insightface/models/scrfd500m_mbf")))


def test_two_real_people_who_cross_are_told_apart_by_colours(crossing: list[Frame]):
    walked(crossing, make_detector("centerface"))


def test_a_real_person_is_found_again_after_a_cut_by_a_network(shared: Callable[[str], Path], crossing: list[Frame]):
    """The people change places over the cut, and the picture its light and size."""
    detector = make_detector("insightface", shared("models/insightface/models/scrfd500m_mbf"))
    start = [replace(crossing[0], index=i, time=Fraction(i, 25)) for i in range(3)]
    other = np.ascontiguousarray((crossing[32].rgb[40:280, 10:] * 0.55).astype(np.uint8))
    later = cv2.resize(other, (640, 320))
    end = [Frame(i, Fraction(i, 25), later) for i in range(3, 7)]
    both = follow(start + end, detector, ["track:1", "track:2"])
    places = [[face.box.centre[0] for face in faces] for _, faces in both]
    assert all(left < 320 < right for left, right in places[:3])
    assert all(left > 320 > right for left, right in places[3:])


def test_faces_go_with_the_tracks_that_cost_least_together():
    assert cheapest_pairs(np.array([[0.4, 0.2, 0.9]])) == [(0, 1)]
    assert cheapest_pairs(np.array([[0.4], [0.2]])) == [(1, 0)]
    assert cheapest_pairs(np.array([[0.1, 0.2], [0.2, 0.9]])) == [(0, 1), (1, 0)]  # not the least of all
