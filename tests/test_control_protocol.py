"""The measurement of single factors, on stand-ins whose cross-talk, monotony and swaps are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from dpe_cli import control_protocol
from dpe_cli.control_protocol import STEPS, Sweep, at, by_factor, cross_talk, evaluate_control, spearman, tables
from dpe_cli.errors import InputError, WeightsError
from dpe_cli.extractors import Extractors
from dpe_cli.factors import NAMES, Factors, Slider
from dpe_cli.measures import MEASURES, TABLE

K = len(TABLE)
COUNT = len(MEASURES)


def made_factors(fitted: bool = True) -> Factors:
    """A coordinate for each measure; what is left is the rest."""
    owners = [measure.factor if measure.factor in NAMES else "rest" for measure in TABLE]
    projectors = {name: np.diag([float(owner == name) for owner in owners]) for name in NAMES}
    unit = np.eye(K)
    sliders = {
        one.name: Slider(one.factor, one.unit, 0.0, 0.9, 0.9, 1.0, -9.0, 9.0, 0.0, unit[n], unit[n], unit[n])
        for n, one in enumerate(TABLE)
    }
    return Factors(projectors, sliders=sliders, rest=np.zeros(K)) if fitted else Factors(projectors)


class CodeEngine:
    """A picture is a row of numbers, its measures; the pose is one more."""

    size = 1

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        return crops[:, :K].astype(np.float32)

    def edit(self, crops: np.ndarray, expression: np.ndarray, pose: np.ndarray | None) -> np.ndarray:
        turned = crops[:, K:] if pose is None else pose[:, :1]
        return np.concatenate([expression, turned], 1)


class Seeing:
    """Sees a face in a row of numbers; its head turns by the pose's number of degrees."""

    name = "seeing"

    def detect(self, picture: np.ndarray) -> SimpleNamespace:
        angle = np.radians(float(picture[-1]))
        rotation = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        return SimpleNamespace(values=picture[:K].astype(float), rotation=rotation, points=np.zeros((478, 3)))


@pytest.fixture
def stand_ins(monkeypatch):
    """Clips of numbers in place of pictures."""
    random = np.random.default_rng(0)

    class Numbers(SimpleNamespace):
        def __len__(self):
            return len(self.rows)

    clips = [Numbers(rows=random.normal(0, 1, (12, K + 1)), identity=f"id{n}") for n in range(6)]
    monkeypatch.setattr(
        control_protocol, "take", lambda clip, chosen: SimpleNamespace(crops=lambda size: clip.rows[chosen])
    )
    monkeypatch.setattr(
        control_protocol, "measures_of_faces", lambda faces, template: np.stack([face.values for face in faces])
    )
    return clips


def test_perfect_control_is_seen_as_such(stand_ins):
    result = evaluate_control(stand_ins, CodeEngine(), made_factors(), Extractors(Seeing(), None, None), None, 5, 12)
    assert result["people"] == 5
    assert result["endpoints"]["all_one_codes"] == 0 and result["endpoints"]["all_zero_levels"] == 0
    for line in result["sliders"].values():
        assert line["spearman_least"] == pytest.approx(1) and line["shown"] == pytest.approx(1, abs=1e-5)
        assert line["head_degrees"] == pytest.approx(0, abs=1e-3) and "csim_drop" not in line
    for name, row in result["cross_talk"].items():
        assert all(value == pytest.approx(float(other == name), abs=1e-5) for other, value in row.items())
    assert result["swap"]["mouth_open"]["mouth"] == pytest.approx(1, abs=1e-3)
    assert result["swap"]["blink"]["eyes"] == pytest.approx(1, abs=1e-3)
    assert abs(result["swap"]["mouth_open"]["eyes"]) < 0.6
    assert [title for title, rows in tables(result) if not rows] == []


def test_cross_talk_and_disorder_are_seen():
    values = np.zeros((2, len(STEPS), K))
    values[:, :, 0] = STEPS  # mouth_open follows
    values[:, :, 3] = -0.5 * STEPS  # and blinks with it
    sweeps = {measure.name: Sweep(values.copy(), np.zeros((2, len(STEPS))), None) for measure in TABLE}
    assert cross_talk(sweeps)["mouth_open"]["blink"] == pytest.approx(0.5)
    assert cross_talk(sweeps)["mouth_open"]["smile"] == 0
    matrix = {one.name: {other.name: float(one is other) for other in MEASURES} for one in MEASURES}
    matrix["blink"]["smile"], matrix["blink"]["mouth_open"] = 0.3, 0.1
    found = by_factor(matrix, ["mouth_open", "blink"])
    assert found["blink"] == {"mouth": 0.3, "blink": 1.0, "gaze": 0.0, "brows": 0.0}
    assert list(found) == ["mouth", "blink"]
    assert spearman(np.array([1.0, 2, 3])) == pytest.approx(1) and spearman(np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.ones(3)) == 0
    assert np.isnan(spearman(np.array([1.0, np.nan, 3])))


class Recognising:
    """People are told apart by the first measure alone: one sigma of it turns their vector by 0.1."""

    def embed(self, picture: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.array([np.cos(0.1 * picture[0]), np.sin(0.1 * picture[0])])


def test_what_real_frames_lose_is_the_floor_of_what_sliders_may(stand_ins, monkeypatch):
    monkeypatch.setattr(control_protocol, "five_points", lambda points: points)
    for clip in stand_ins:
        clip.rows[:, 0] = np.arange(12)  # a sigma from frame to frame
        clip.rows[:, 1] = np.repeat([0.0, 9.0], 6)  # no two frames are one apart
        clip.rows[6:, K] = 30  # there the head is turned
    found = control_protocol.real_loss(
        stand_ins, 12, 1, made_factors(), Extractors(Seeing(), Recognising(), None), None
    )
    assert found["mouth_open"] == pytest.approx(1 - np.cos(0.1))
    assert np.isnan(found["mouth_width"])
    made = evaluate_control(
        stand_ins, CodeEngine(), made_factors(), Extractors(Seeing(), Recognising(), None), None, 5, 12
    )
    assert made["sliders"]["mouth_open"]["csim_real"] == found["mouth_open"]


def test_a_sigma_lies_between_steps():
    assert at(np.tile(STEPS, (1, 1)), 1.0)[0] == pytest.approx(1)
    assert at(np.tile(STEPS, (1, 1)), 2.0)[0] == pytest.approx(2)


def test_too_few_people_and_weights_without_a_fit_are_refused(stand_ins):
    extractors = Extractors(Seeing(), None, None)
    with pytest.raises(InputError, match="four people"):
        evaluate_control(stand_ins[:3], CodeEngine(), made_factors(), extractors, None)
    with pytest.raises(WeightsError):
        evaluate_control(stand_ins, CodeEngine(), made_factors(fitted=False), extractors, None)
