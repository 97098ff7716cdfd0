"""Control of single factors: what is asked for, what becomes of codes, of pixels, and of what cannot be had."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import synthetic_face
from test_edit import DETECTOR, ENGINE, ColourDetector, ColourEngine, clip, picture

from dpe_cli.commands import control as commands
from dpe_cli.control import Control, mixed, parse_choice, parse_sliders, parse_strength, read_curves
from dpe_cli.edit import edit_video
from dpe_cli.errors import InputError, WeightsError
from dpe_cli.factors import NAMES, Factors, Slider
from dpe_cli.main import cli
from dpe_cli.motion import Curve
from dpe_cli.regions import PARTS, RegionMasks, region_mask
from dpe_cli.request import Driving, EditSettings
from dpe_cli.video import read_image
from dpe_cli.writer import write_image


def slider(factor: str, place: int, r2: float = 0.9, **more: float) -> Slider:
    """Of stand-in codes: one unit is 100 levels of a colour."""
    read, axis = np.zeros(3), np.zeros(3)
    read[place], axis[place] = 0.01, 100
    ends = {"low": 0.0, "high": 2.0, "shown": 0.9, "bias": 0.0, "sigma": 1.0} | more
    return Slider(factor, "hundred levels", 0.0, r2, read=read, answer=read, axis=axis, **ends)


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> Factors:
    """Factors of the stand-in engine's codes, colours: red is the mouth, green the eyes' blink, blue their gaze."""
    projectors = {name: np.zeros((3, 3)) for name in NAMES}
    for place, name in enumerate(("mouth", "blink", "gaze")):
        projectors[name][place, place] = 1
    sliders = {
        "mouth_open": slider("mouth", 0), "smile": slider("mouth", 0, r2=0.4), "blink": slider("blink", 1),
        "gaze_x": slider("gaze", 2, r2=0.1), "gaze_y": slider("gaze", 2, r2=0.2, shown=0.1),
        "happy": slider("emotion", 1),
    }  # fmt: skip
    made = Factors(projectors, "0", Path("stand-in"), sliders, np.array([11.0, 12, 13]))
    monkeypatch.setattr(Factors, "load", classmethod(lambda cls, weights=None: made))
    return made


# What users write


def test_a_strength_is_a_number_or_one_for_each_factor():
    assert parse_strength("0.8") == (0.8, {})
    assert parse_strength("mouth=1.2,eyes=0.5") == (None, {"mouth": 1.2, "blink": 0.5, "gaze": 0.5})
    assert parse_strength("0.3,pose=1,eyes=0,gaze=2") == (0.3, {"pose": 1.0, "blink": 0.0, "gaze": 2.0})


@pytest.mark.parametrize("text", ["", "4", "nan", "-1", "mouth", "nose=1", "mouth=", "mouth=4"])
def test_a_wrong_strength_is_refused(text: str):
    with pytest.raises(ValueError):
        parse_strength(text)


def test_sliders_are_names_with_values_and_gaze_has_two():
    found = parse_sliders("mouth_open=0.3,blink=1,gaze=10:-5,smile+=-0.2")
    assert found == ({"mouth_open": 0.3, "blink": 1.0, "gaze_x": 10.0, "gaze_y": -5.0}, {"smile": -0.2})
    assert parse_sliders("gaze+=:4") == ({}, {"gaze_y": 4.0})


@pytest.mark.parametrize("text", ["mouth_open", "ear=1", "gaze=4", "smile=much", "smile=1,smile+=1"])
def test_wrong_sliders_are_refused(text: str):
    with pytest.raises(ValueError):
        parse_sliders(text)


def test_a_choice_is_an_origin_or_a_value():
    assert parse_choice("mouth", "source") == ("source", {})
    assert parse_choice("eyes", "0.5") == (None, {"blink": 0.5})
    assert parse_choice("emotion", "happy:0.6") == (None, {"happy": 0.6})
    with pytest.raises(ValueError, match="dpe dub"):
        parse_choice("mouth", "audio")
    with pytest.raises(ValueError, match="sound says nothing of gaze"):
        parse_choice("gaze", "audio")
    with pytest.raises(ValueError, match="EMOTION:VALUE"):
        parse_choice("emotion", "bored:1")


def test_curves_have_two_columns_or_three(tmp_path: Path):
    path = tmp_path / "curve.csv"
    path.write_text("time,strength\n0,0\n1,1\n")
    assert read_curves(path) == Curve((0.0, 1.0), (0.0, 1.0))
    path.write_text("time,factor,value\n0,eyes,0\n1,eyes,1\n0,gaze_x,-10\n\n2,gaze_x,10\n")
    strengths, sliders = read_curves(path)
    assert set(strengths) == {"blink", "gaze"} and strengths["blink"].at(0.5) == 0.5
    assert sliders["gaze_x"].at(0.5) == -5


def test_blink_is_a_slider_where_the_eyes_follow_nothing(talk: Path, monkeypatch: pytest.MonkeyPatch):
    seen, path = {}, talk.with_name("curve.csv")
    path.write_text("0,blink,0\n1,blink,1\n")

    def remember(source, driving, output, engine, detector, settings, **more):
        seen.update(strengths=list(settings.control.strength_curves), sliders=list(settings.control.slider_curves))
        raise InputError("stop", "here")

    monkeypatch.setattr("dpe_cli.edit.edit_video", remember)
    for options, slider in (
        ([], True),
        (["-d", talk], False),
        (["-d", talk, "--mode", "pose"], True),
        (["-d", talk, "--eyes", "source"], True),
        (["--eyes-driving", talk], False),
        (["--mouth-driving", talk], True),
        (["--neutralize"], False),
    ):
        run("edit", "-s", talk, "--curve", path, *options, "-o", talk.with_name("o.mp4"))
        assert seen == {"strengths": [] if slider else ["blink"], "sliders": ["blink"] if slider else []}, options


@pytest.mark.parametrize("line", ["0,ear,1", "0,mouth,4", "0,mouth", "x,mouth,1"])
def test_a_wrong_curve_is_told(tmp_path: Path, line: str):
    path = tmp_path / "curve.csv"
    path.write_text(f"0,blink,1\n{line}\n")
    with pytest.raises(InputError, match="is no curve"):
        read_curves(path)


# Codes


OWN = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
A, B = np.array([100, 110, 120], np.float32), np.array([50, 60, 70], np.float32)


def codes(control: Control, factors: Factors, strength: float = 1.0, **given) -> np.ndarray:
    control = replace(control, factors=factors)
    return mixed(OWN, [control.at(time, strength, given) for time in (0.0, 1.0)])


def test_each_factor_follows_its_own_driver(factors: Factors):
    control = Control({"mouth": "a", "blink": "source", "gaze": "driving"}, {"gaze": 0.5})
    made = codes(control, factors, a=(A, None), driving=(B, None))
    assert made.tolist() == [[100, 2, (3 + 70) / 2], [100, 5, (6 + 70) / 2]]


def test_without_requests_everything_follows_the_driving_and_nothing_without_one(factors: Factors):
    assert np.array_equal(codes(Control(), factors, driving=(A, None)), [A, A])
    assert np.array_equal(codes(Control(), factors, 0.0, driving=(A, None)), OWN)
    assert np.array_equal(codes(Control(), factors), OWN)


def test_relative_motion_adds_the_drivings_change(factors: Factors):
    made = codes(Control({"mouth": "driving", "blink": "source", "gaze": "source"}), factors, driving=(A, B))
    assert made.tolist() == [[51, 2, 3], [54, 5, 6]]


def test_neutral_takes_factors_to_a_face_at_rest(factors: Factors):
    made = codes(Control(dict.fromkeys(NAMES[:-1], "neutral") | {"rest": "source"}), factors)
    assert made.tolist() == [[11, 12, 13]] * 2


def test_a_slider_sets_its_measure_after_factors_and_an_emotion_before_it(factors: Factors):
    control = Control({"mouth": "driving"}, {}, {"mouth_open": 0.3, "blink": 0.5, "happy": 1.0})
    assert np.allclose(codes(control, factors, driving=(A, None)), [[30, 50, 120], [30, 50, 120]])


def test_a_step_is_added_to_what_is_there_and_needs_no_reading(factors: Factors):
    control = Control(steps={"smile": 0.1}).bound({})[0]
    assert np.allclose(mixed(OWN, [control.at(0.0, 1.0, {})] * 2), OWN + [10, 0, 0])
    with pytest.raises(InputError, match=r"available: .*mouth_open=, blink=.*smile\+="):
        Control(steps={"gaze_y": 0.1}).bound({})
    with pytest.raises(InputError, match="a step too far"):
        Control(steps={"smile": 5.0}).bound({})
    with pytest.raises(InputError, match="a step too far"):
        Control(steps={"mouth_open": float("nan")}).bound({})


def test_a_slider_goes_no_farther_than_it_was_tried(factors: Factors):
    control, remarks = Control(sliders={"mouth_open": 2.4}).bound({})
    assert remarks == ["mouth_open goes at most 2 away from what each frame shows"]
    assert np.allclose(mixed(OWN, [control.at(0.0, 1.0, {})] * 2), OWN + [200, 0, 0])


def test_keyframes_move_strengths_and_sliders(factors: Factors):
    curves = {"mouth": Curve((0.0, 1.0), (0.0, 1.0))}, {"blink": Curve((0.0, 1.0), (0.1, 0.2), -np.inf, np.inf)}
    control = Control({"gaze": "source"}, {}, {}, {}, *curves)
    assert np.allclose(codes(control, factors, driving=(A, None)), [[1, 10, 3], [100, 20, 6]])


# What cannot be had


def test_what_the_weights_do_not_tell_is_refused(factors: Factors):
    with pytest.raises(InputError, match=r"smile is not available with these weights \(codes .* R2 0.40.*blink"):
        Control(sliders={"smile": 0.5}).bound({})
    with pytest.raises(InputError, match="pictures of held-out people follow it with R2 0.10"):
        Control(sliders={"gaze_y": 0.5}).bound({})
    with pytest.raises(InputError, match="gaze cannot be controlled"):
        Control({"gaze": Path("a")}).bound({})
    with pytest.raises(InputError, match="gaze cannot be controlled"):
        Control(strengths={"gaze": 1.2}).bound({})
    with pytest.raises(InputError, match="out of the reach"):
        Control(sliders={"mouth_open": 9.0}).bound({})


def test_keeping_the_sources_own_is_always_possible_and_what_is_told_in_part_is_remarked(factors: Factors):
    assert Control({"gaze": "source"}, {"gaze": 0.0}).bound({})[1] == []
    _, remarks = Control({"mouth": Path("a")}).bound({})
    assert len(remarks) == 1 and "mouth in part only (mouth_width" not in remarks[0] and "smile" in remarks[0]


def test_without_a_fit_factors_go_on_with_a_remark_and_sliders_are_refused(factors: Factors, monkeypatch):
    bare = Factors(factors.projectors)
    monkeypatch.setattr(Factors, "load", classmethod(lambda cls, weights=None: bare))
    assert "not known" in Control({"mouth": Path("a")}).bound({})[1][0]
    for control in (Control(sliders={"blink": 1.0}), Control({"mouth": "neutral"})):
        with pytest.raises(WeightsError, match="stage=factors"):
            control.bound({})


# Whole edits


def still(path: Path, colour: tuple[int, int, int]) -> Path:
    write_image(path, picture(colour=colour))
    return path


def code_drawn(path: Path, source: Path) -> np.ndarray:
    """The colour that the stand-in engine painted over the upper half of the face."""
    changed = (read_image(path) != read_image(source)).any(-1)
    assert changed.any()
    return read_image(path)[48, 80].astype(int)


def test_a_mouth_and_eyes_of_different_drivers_on_a_still(tmp_path: Path, factors: Factors):
    source = still(tmp_path / "s.png", (20, 220, 30))
    a, b = still(tmp_path / "a.png", (90, 180, 60)), still(tmp_path / "b.png", (10, 200, 100))
    driving = Driving(factors=(a, b), controlled=True)
    settings = EditSettings(control=Control({"mouth": a, "blink": b, "gaze": "source"}), detail=False)
    settings = replace(settings, colour_match=False)
    edit_video(source, driving, tmp_path / "out.png", ENGINE, DETECTOR, settings)
    assert np.abs(code_drawn(tmp_path / "out.png", source) - [90, 200, 30]).max() <= 1


def test_sliders_need_no_driving_on_a_video_and_on_a_still(tmp_path: Path, factors: Factors):
    source, talk = still(tmp_path / "s.png", (20, 220, 30)), clip(tmp_path / "talk.mp4", [True] * 3)
    settings = EditSettings(control=Control(sliders={"mouth_open": 1.0}), detail=False, colour_match=False)
    driving = Driving(controlled=True)
    assert driving.mode == "exp" and driving.paths == []
    edit_video(source, driving, tmp_path / "out.png", ENGINE, DETECTOR, settings)
    assert np.abs(code_drawn(tmp_path / "out.png", source) - [100, 220, 30]).max() <= 1
    report = edit_video(talk, driving, tmp_path / "out.mp4", ENGINE, DETECTOR, settings)
    assert report.counts()["edited"] == 3
    assert report.write(tmp_path / "report.json") is None


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: Factors) -> Path:
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda weights, **options: ColourEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda name, models: ColourDetector())
    return clip(tmp_path / "talk.mp4", [True] * 3)


def test_the_command_edits_without_a_driving(talk: Path):
    done = run("edit", "-s", talk, "--set", "mouth_open=1", "--neutralize", "-o", talk.with_name("out.mp4"))
    assert done.exit_code == 0, done.output
    assert "3 frames edited" in done.stderr


@pytest.mark.parametrize("strength", ["", ",strength=0.2"])
def test_keyframes_and_the_strength_of_an_edit_are_two_things(talk: Path, strength: str):
    talk.with_name("curve.csv").write_text("0,1\n1,0.5\n")
    edit = f"driving={talk}{strength}"
    done = run(
        "edit", "-s", talk, "--edit", edit, "--curve", talk.with_name("curve.csv"), "-o", talk.with_name("o.mp4")
    )
    assert done.exit_code == (2 if strength else 0), done.stderr
    assert ("--curve stands in place of an --edit's strength" in done.stderr) is bool(strength)


def test_a_driving_that_nothing_follows_is_remarked(talk: Path):
    def told(*options: str) -> bool:
        done = run("edit", "-s", talk, *options, "-o", talk.with_name("o.mp4"), "--overwrite")
        assert done.exit_code == 0, done.stderr
        return "nothing of the face follows talk.mp4" in done.stderr

    assert told("-d", str(talk), "--neutralize")
    assert not told("-d", str(talk), "--mode", "both", "--neutralize")  # the pose does
    assert not told("-d", str(talk), "--mouth", "neutral") and not told("--neutralize")


@pytest.mark.parametrize(("options", "remarked"), [(["--set", "mouth_open=1"], True), (["--neutralize"], False)])
def test_a_strength_without_use_is_remarked(talk: Path, options: list[str], remarked: bool):
    done = run("edit", "-s", talk, *options, "--strength", "0.5", "-o", talk.with_name("o.mp4"))
    assert done.exit_code == 0 and ("the strength has no use" in done.stderr) is remarked


@pytest.mark.parametrize("command", ["edit", "plan"])
def test_a_control_that_is_not_available_ends_with_one_line(talk: Path, command: str):
    done = run(command, "-s", talk, "--set", "smile=0.5")
    assert done.exit_code == 3 and "smile is not available" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not talk.with_name("talk_exp.mp4").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mouth", "audio"], "speech drives the mouth in dpe dub"),
        (["--mouth", "driving"], "give --driving"),
        (["--strength", "mouth=1"], "nothing to follow"),
        (["--strength", "mouth=0.5", "--set", "blink+=0.2"], "mouth has a strength but nothing to follow"),
        (["--strength", "eyes=0.5", "--mouth-driving", "a.mp4"], "blink has a strength but nothing to follow"),
        (["--strength", "pose=1"], "nothing to follow"),
        (["-d", "a.mp4", "--strength", "pose=1"], "the pose has a strength but nothing to follow"),
        (["--neutralize", "--strength", "pose=1"], "the pose has a strength but nothing to follow"),
        (["--set", "mouth_open"], "not NAME=VALUE"),
        (["--set", "mouth_open=abc"], "--set: mouth_open=abc: abc is no number"),
        (["--set", "gaze=a:3"], "--set: gaze=a:3: a is no number"),
        (["--strength", "mouth=much"], "--strength: mouth=much: much is no number"),
        (["--mouth", "source", "--mouth-driving", "a.mp4"], "say two things"),
        (["--mouth", "0.2", "--set", "mouth_open+=0.1"], "mouth_open is both set and added to"),
        (["--set", "blink=0.2", "--set", "blink+=0.1"], "blink is both set and added to"),
        (["--edit", "driving=a.mp4", "--neutralize"], "--edit takes no factors"),
        ([], "give --driving"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_contradicts_itself_is_a_mistake_of_usage(talk: Path, options: list[str], words: str):
    done = run("edit", "-s", talk, *options)
    assert done.exit_code == 2 and words in done.stderr


@pytest.mark.parametrize("strength", ["all=0.5", "emotion=0.5,mouth=1", "0.5,eyes=1"])
def test_a_joint_strength_is_at_work_where_one_of_its_factors_is(talk: Path, strength: str):
    done = run("edit", "-s", talk, "--neutralize", "--strength", strength, "-o", talk.with_name("o.mp4"))
    assert done.exit_code != 2, done.stderr  # 3 where these weights tell gaze too little


def test_naming_what_follows_the_driving_leaves_the_rest_alone(talk: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def remember(source, driving, output, engine, detector, settings, **more):
        seen.update(control=settings.control, driving=driving)
        raise InputError("stop", "here")

    monkeypatch.setattr("dpe_cli.edit.edit_video", remember)
    run("edit", "-s", talk, "-d", talk, "--mouth", "driving", "-o", talk.with_name("o.mp4"))
    assert seen["control"].origins == dict.fromkeys(NAMES, "source") | {"mouth": "driving"}
    run("edit", "-s", talk, "-d", talk, "--eyes", "source", "--strength", "0.5,mouth=2", "-o", talk.with_name("o.mp4"))
    assert seen["control"].origins == {"blink": "source", "gaze": "source"}
    assert seen["control"].strengths == {"mouth": 2.0} and seen["driving"].controlled
    run("edit", "-s", talk, "-d", talk, "--strength", "0.5", "-o", talk.with_name("o.mp4"))
    assert seen["control"] is None and not seen["driving"].controlled


# The pixel guard


def face_points(size: int = 128) -> np.ndarray:
    """Landmarks of a synthetic face, its parts where faces have them, in pixels of a crop."""
    points = synthetic_face()[:, :2] * 45 + [64, 60]
    random = np.random.default_rng(3)
    from dpe_cli.landmarks import EYES, FACE_OVAL, LIPS_OUTER

    around = np.linspace(0, 2 * np.pi, len(FACE_OVAL), endpoint=False) - np.pi / 2
    points[FACE_OVAL] = np.stack([64 + 40 * np.cos(around), 64 + 52 * np.sin(around)], -1)
    points[LIPS_OUTER] = [64, 92] + random.uniform(-1, 1, (len(LIPS_OUTER), 2)) * [14, 4]
    for eye, x in zip(EYES, (48, 80), strict=True):
        points[eye] = [x, 50] + random.uniform(-1, 1, (len(eye), 2)) * [5, 3]
    points[[33, 263]] = [[40, 50], [88, 50]]
    points[[195, 2]] = [[64, 60], [64, 78]]
    return points


@pytest.mark.parametrize(
    ("region", "inside", "outside"),
    [
        ("lips", [(92, 64)], [(50, 48), (110, 64), (70, 64)]),
        ("eyes", [(50, 48), (50, 80)], [(92, 64), (50, 64), (30, 64)]),
        ("upper", [(30, 64), (50, 48)], [(92, 64), (70, 64)]),
        ("lower", [(92, 64), (108, 64)], [(50, 48), (66, 64)]),
    ],
)
def test_a_region_covers_its_part_of_the_face(region: str, inside: list, outside: list):
    mask = region_mask(face_points(), region, 128)
    assert all(mask[place] > 0.9 for place in inside)
    assert all(mask[place] < 0.2 for place in outside)


def test_outside_of_the_region_nothing_is_pasted_and_without_landmarks_nothing_at_all():
    whole, crop = np.ones((128, 128), np.float32), np.zeros((128, 128, 3), np.uint8)
    masks = RegionMasks(lambda *_: whole, "lips", lambda picture: face_points())
    assert np.array_equal(masks(crop, crop, 0.0), region_mask(face_points().astype(np.float32), "lips", 128))
    blind = RegionMasks(lambda *_: whole, "lips", lambda picture: None)
    assert not blind(crop, crop, 0.0).any()


def test_a_mouth_that_opens_stays_whole():
    shut, opened = face_points(), face_points()
    opened[17] = [64, 110]
    pictures = {0: shut, 255: opened}
    masks = RegionMasks(lambda *_: np.ones((128, 128), np.float32), "lips", lambda p: pictures[int(p[0, 0, 0])])
    crop = np.zeros((128, 128, 3), np.uint8)
    assert masks(crop, crop, 0.0)[109, 64] < 0.5 < masks(crop, crop + 255, 1.0)[109, 64]


def test_the_commands_regions_are_those_there_are():
    assert set(commands.REGIONS) == {"all", *PARTS}


def test_a_region_needs_a_frame_to_be_pasted_into(tmp_path: Path, factors: Factors):
    talk = clip(tmp_path / "talk.mp4", [True] * 2)
    with pytest.raises(InputError, match="no region"):
        edit_video(talk, Driving(talk), tmp_path / "o.mp4", ENGINE, DETECTOR, EditSettings(region="lips", paste=False))


def test_a_control_survives_its_dict():
    curve = Curve((0.0, 1.0), (-20.0, 30.0), -90, 90)
    control = Control({"mouth": Path("/a.mp4"), "blink": "source"}, {"mouth": 0.5}, {"smile": 1.0}, {"blink": 0.1},
                      {}, {"gaze_x": curve})  # fmt: skip
    assert Control.from_dict(json.loads(json.dumps(control.to_dict()))) == control
