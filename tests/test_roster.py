"""The list of faces. People are painted squares."""

import numpy as np
import pytest
from painted import GREEN, RED, Acquaintance, PaintedFaces, paint

from dpe_cli.errors import FaceError
from dpe_cli.people import track_faces
from dpe_cli.roster import CAPTION, THUMBNAIL, list_faces
from dpe_cli.video import Frame


def film() -> list[Frame]:
    """Red and green, green alone, nobody, both the other way round; and a blink of red in the empty room."""
    one = [paint(i, {RED: (150, 200, 90), GREEN: (400, 200, 60)}, shade=40) for i in range(10)]
    two = [paint(i, {GREEN: (300, 200, 160)}, shade=110) for i in range(10, 20)]
    three = [paint(i, {RED: (300, 200, 100)} if i == 25 else {}, shade=180) for i in range(20, 30)]
    four = [paint(i, {GREEN: (100, 100, 60), RED: (500, 300, 120)}, shade=250) for i in range(30, 40)]
    return one + two + three + four


def test_tracks_are_listed_with_times_sizes_and_persons():
    roster = list_faces(film(), Acquaintance())
    assert roster.frames == 40 and roster.cuts == [0.4, 0.8, 1.2] and roster.recognised and roster.left_out == 1
    lines = [(t.track, t.person, t.shot, t.start, t.end, t.frames, round(t.size)) for t in roster.tracks]
    assert lines == [
        (1, 1, 1, 0.0, 0.36, 10, 90),
        (2, 2, 1, 0.0, 0.36, 10, 60),
        (3, 2, 2, 0.4, 0.76, 10, 160),
        (5, 2, 4, 1.2, 1.56, 10, 60),
        (6, 1, 4, 1.2, 1.56, 10, 120),
    ]
    assert all(0 < track.confidence < 1 for track in roster.tracks)


@pytest.mark.parametrize("frames", [1, 2])
def test_the_faces_of_a_picture_are_listed(frames: int):
    roster = list_faces(film()[:frames], Acquaintance())
    assert [track.frames for track in roster.tracks] == [frames, frames] and not roster.left_out
    assert roster.sheet().shape == (THUMBNAIL + CAPTION, 2 * THUMBNAIL, 3)


def test_the_list_is_the_same_each_time():
    assert list_faces(film(), PaintedFaces()).to_dict() == list_faces(film(), PaintedFaces()).to_dict()


def test_a_number_of_the_list_chooses_that_track():
    for track in list_faces(film(), Acquaintance()).tracks:
        followed = track_faces(film(), Acquaintance(), f"track:{track.track}")
        numbers = [face.track if face else None for _, face in followed]
        assert numbers.count(track.track) == track.frames
        assert numbers.index(track.track) == round(track.start * 25)


def test_two_who_are_seen_together_are_two_however_alike_they_look():
    class Twins(Acquaintance):
        def embed(self, rgb, face):
            return np.array([1.0, 0.0])

    frames = [paint(i, {RED: (150, 200, 90), GREEN: (400, 200, 90)}) for i in range(5)]
    assert [track.person for track in list_faces(frames, Twins()).tracks] == [1, 2]


def test_the_sheet_shows_each_track():
    roster = list_faces(film(), Acquaintance())
    sheet = roster.sheet()
    assert sheet.shape == (THUMBNAIL + CAPTION, 5 * THUMBNAIL, 3)
    for column, track in enumerate(roster.tracks):
        middle = sheet[THUMBNAIL // 2, column * THUMBNAIL + THUMBNAIL // 2]
        assert tuple(middle) == (RED if track.person == 1 else GREEN)
        assert sheet[THUMBNAIL:, column * THUMBNAIL : (column + 1) * THUMBNAIL].min() < 100  # the caption


def test_a_sheet_of_nobody_is_refused():
    roster = list_faces([paint(i, {}) for i in range(3)], PaintedFaces())
    assert roster.tracks == []
    with pytest.raises(FaceError, match="no face to show"):
        roster.sheet()
