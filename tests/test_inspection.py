"""dpe inspect: measures over time and the sheet of sliders."""

import csv
import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import synthetic_face
from test_control import slider
from test_edit import ENGINE, ColourDetector, clip

from dpe_cli.errors import FaceError, WeightsError
from dpe_cli.factors import Factors
from dpe_cli.inspection import CELL, COLUMNS, HEAD, LABEL, STEPS, Course, follow_face, slider_sheet
from dpe_cli.landmarks import FaceShape
from dpe_cli.video import read_frames
from dpe_cli.writer import write_image


class Brightness:
    """A mouth that is the wider open the brighter the picture's corner."""

    def detect(self, rgb: np.ndarray) -> FaceShape:
        points = synthetic_face()
        points[14, 1] += rgb[0, 0, 0] / 1000
        return FaceShape(points.astype(np.float32), np.zeros(52, np.float32), np.eye(3, dtype=np.float32))


def course(values: list[float]) -> Course:
    table = np.tile(np.array(values)[:, None], len(COLUMNS))
    return Course(np.arange(len(values)) / 25, table, np.zeros((64, 64, 3), np.uint8))


def test_a_video_is_measured_frame_by_frame_and_without_a_face_nothing_is(tmp_path: Path):
    talk = clip(tmp_path / "talk.mp4", [True, False, True])
    found = follow_face(talk, ColourDetector(), Brightness(), synthetic_face(), 64)
    mouth = found.values[:, COLUMNS.index("mouth_open")]
    assert np.isnan(found.values[1]).all() and np.isfinite(found.values[[0, 2]]).all()
    assert mouth[2] > mouth[0]
    assert found.crop.shape == (64, 64, 3)
    rows = list(csv.DictReader(io.StringIO(found.table())))
    for number, frame in enumerate(read_frames(talk)):
        write_image(tmp_path / f"talk_{number}.png", frame.rgb)
    numbered = follow_face(
        tmp_path / "talk_%d.png", ColourDetector(), Brightness(), synthetic_face(), 64, fps=Fraction(5)
    )
    assert numbered.times.tolist() == pytest.approx([0, 0.2, 0.4])
    assert len(rows) == 3 and rows[1]["mouth_open"] == "" and float(rows[2]["time"]) == pytest.approx(0.08)
    assert float(rows[0]["mouth_open"]) == pytest.approx(mouth[0], rel=1e-3)


def test_a_video_without_any_face_is_refused(tmp_path: Path):
    with pytest.raises(FaceError):
        follow_face(clip(tmp_path / "e.mp4", [False] * 2), ColourDetector(), Brightness(), synthetic_face(), 64)


def test_the_plot_has_a_line_for_each_measure_that_breaks_without_a_face():
    import xml.etree.ElementTree as ET

    tree = ET.fromstring(course([0.0, 1.0, 2.0, float("nan"), 1.0, 0.0]).plot())
    lines = [element for element in tree.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 * len(COLUMNS)
    first = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    assert len(first) == 3 and first[0][1] > first[1][1] > first[2][1]  # y grows downwards


def test_the_sheet_moves_each_slider_from_minus_two_to_two_sigma():
    sliders = {"mouth_open": slider("mouth", 0, sigma=0.2), "smile": slider("mouth", 1, r2=0.1)}
    factors = Factors({"rest": np.eye(3)}, sliders=sliders, rest=np.zeros(3))
    crop = np.full((64, 64, 3), 100, np.uint8)
    sheet = slider_sheet(crop, ENGINE, factors)
    assert sheet.shape == (HEAD + 2 * CELL, LABEL + len(STEPS) * CELL, 3)
    cells = [sheet[HEAD + 40, LABEL + CELL * n + 80].astype(int) for n in range(len(STEPS))]
    assert [cell[0] for cell in cells] == [60, 80, 100, 120, 140]  # sigma is 20 levels
    assert all(cell[1] == 100 for cell in cells)
    with pytest.raises(WeightsError):
        slider_sheet(crop, ENGINE, Factors({"rest": np.eye(3)}))
