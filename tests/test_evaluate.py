"""The protocols and the command, with a stand-in that edits perfectly and one that reads faces from brightness."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import synthetic_face, turned, write_clips
from test_edit import ColourEngine

from dpe_cli.crop import cut
from dpe_cli.dataset import is_held_out, load_clips
from dpe_cli.errors import InputError
from dpe_cli.evaluate import METRICS, evaluate
from dpe_cli.extractors import Extractors
from dpe_cli.landmarks import FaceShape
from dpe_cli.main import cli
from dpe_cli.motion_space import POSE_SCALE, MotionSpace
from dpe_cli.protocols import Plan, choose_pairs, make_scene, systems_of
from dpe_cli.weights import folder

HELD_OUT = [name for name in (f"id{number:04}" for number in range(200)) if is_held_out(name)][:4]


class BrightnessLandmarks:
    """The brightness above a picture's middle is the mouth's opening, that below it the yaw; black has no face."""

    name = "stand-in for landmarks"

    def __init__(self, model: Path | None = None):
        self.closed = False

    def detect(self, rgb: np.ndarray) -> FaceShape | None:
        above, below = float(rgb[104, 128].mean()), float(rgb[160, 128].mean())
        if above < 5:
            return None
        face = synthetic_face()
        face[14, 1] += above / 500
        points = 60 * face @ turned(yaw=below / 10).T + [128, 128, 0]
        return FaceShape(points.astype(np.float32), np.full(52, above / 255, np.float32))

    def close(self) -> None:
        self.closed = True


class ShadeIdentity:
    """A person is the way the colours mix."""

    name = "stand-in for identity"

    def embed(self, rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
        vector = rgb[104, 128].astype(float) + 1
        return vector / np.linalg.norm(vector)


class MeanDifference:
    """How different pictures are: the mean difference of their levels."""

    name = "stand-in for LPIPS"

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a.astype(float) - b).mean((1, 2, 3))


EVERYTHING = Extractors(BrightnessLandmarks(), ShadeIdentity(), MeanDifference())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared clips of four held-out people and of one who is not."""
    path = tmp_path / "data"
    path.mkdir()
    write_clips(path, [*HELD_OUT, "id0000"])
    assert not is_held_out("id0000")
    return path


@pytest.fixture
def clips(data: Path):
    return load_clips(data, MotionSpace.load(folder() / "motion-space.json"), held_out=True, size=256)


def judged(clips, extractors: Extractors = EVERYTHING, **plan) -> tuple[dict, list]:
    found, space = clips
    systems = systems_of([ColourEngine()], ["network"])
    return evaluate(found, systems, extractors, space.template, Plan(**{"pairs": 2, "frames": 6, **plan}))


def number(summary: dict, protocol: str, mode: str, metric: str, system: str) -> float | None:
    (table,) = [t for t in summary["tables"] if (t["protocol"], t["mode"]) == (protocol, mode)]
    return table["values"][metric][system]["value"]


def test_pairs_are_different_people_and_the_seed_decides(clips):
    found, _ = clips
    pairs = choose_pairs(found, "cross", 100, 3)
    assert len(pairs) == 4 * 3
    assert len({(a.name, b.name) for a, b in pairs}) == 12
    assert all(a.identity != b.identity for a, b in pairs)
    names = [[(a.name, b.name) for a, b in choose_pairs(found, "cross", 3, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert all(a is b for a, b in choose_pairs(found, "same", 100, 0))
    with pytest.raises(InputError, match="two held-out people"):
        choose_pairs(found[:1], "cross", 1, 0)


def test_each_protocol_looks_at_its_own_frames(clips):
    one, other = clips[0][:2]
    same, cross, video = (make_scene(p, one, other, 5) for p in ("same", "cross", "video"))
    shades = [[int(frame[0, 0, 0]) // 20 for frame in scene.driving.frames] for scene in (same, cross, video)]
    assert shades == [[1, 4, 6, 8, 11], [0, 3, 6, 8, 11], [3, 4, 5, 6, 7]]
    assert {int(frame[0, 0, 0]) for frame in same.source.frames} == {0}
    assert [scene.pasted for scene in (same, cross, video)] == [False, False, True]
    assert len(make_scene("cross", one, other, 50).driving.frames) == len(other)


def test_one_person_is_seen_as_a_camera_on_a_tripod_sees_them(clips):
    moving = copy.copy(clips[0][0])
    moving.points = moving.points + np.linspace(0, 12, len(moving))[:, None, None] * [1, 0, 0]
    scene = make_scene("same", moving, moving, 5)
    first, seen = scene.source.boxes[0], scene.driving
    assert [box.centre for box in seen.shown] == [first.centre] * 5 and seen.boxes[-1].centre[0] > first.centre[0] + 10
    np.testing.assert_array_equal(seen.crops(64)[4], cut(seen.frames[4], seen.shown[4], 64)[0])
    codes = seen.as_shown(np.zeros((5, 20), np.float32))
    moved = (seen.boxes[-1].centre[0] - first.centre[0]) / seen.shown[4].width
    assert codes[-1, 4] * POSE_SCALE[4] == pytest.approx(moved, abs=1e-5)
    assert scene.source.as_shown(codes) is codes


def test_faces_are_framed_as_the_tool_frames_them(clips):
    from dpe_cli.dataset import Sampler
    from dpe_cli.mesh import Mesh

    found, space = clips
    scene = make_scene("cross", found[0], found[1], 5)
    _, scale, _, centre = Sampler(found, Mesh(space.template), 0, augment=False)._framing(found[0].points[0])
    assert scene.source.boxes[0].width == pytest.approx(256 / scale)
    assert scene.source.boxes[0].centre == pytest.approx(tuple(centre))


def test_the_baselines_are_floor_and_ceiling(clips):
    summary, _ = judged(clips)
    for protocol, mode in (("same", "exp"), ("cross", "exp"), ("cross", "both"), ("video", "exp")):
        assert number(summary, protocol, mode, "self_psnr", "copy-source") == 99
        assert number(summary, protocol, mode, "mouth_correlation", "copy-driving") == pytest.approx(1, abs=1e-3)
        assert number(summary, protocol, mode, "aed", "copy-driving") == pytest.approx(0, abs=2e-3)
    assert number(summary, "cross", "exp", "head_drift", "copy-source") == pytest.approx(0, abs=1e-5)
    assert number(summary, "cross", "exp", "csim", "copy-source") == pytest.approx(1)
    assert number(summary, "cross", "pose", "aed", "copy-source") == 0
    assert number(summary, "cross", "pose", "apd", "copy-driving") == 0
    assert number(summary, "same", "both", "psnr", "copy-driving") == 99
    assert number(summary, "same", "both", "ssim", "copy-driving") == pytest.approx(1)
    assert number(summary, "same", "both", "lpips", "copy-driving") == 0
    assert number(summary, "same", "both", "psnr", "copy-source") < 20
    assert number(summary, "video", "exp", "seam_step", "copy-source") == pytest.approx(0, abs=0.01)


def test_a_perfect_edit_moves_the_mouth_and_nothing_else(clips):
    summary, _ = judged(clips, protocols=("cross", "video"))
    for protocol in ("cross", "video"):
        assert number(summary, protocol, "exp", "mouth_correlation", "network") == pytest.approx(1, abs=1e-3)
        assert number(summary, protocol, "exp", "mouth_range", "network") == pytest.approx(1, abs=0.02)
        assert number(summary, protocol, "exp", "head_drift", "network") == pytest.approx(0, abs=0.05)
    assert number(summary, "cross", "pose", "apd", "network") == pytest.approx(0, abs=0.02)
    assert number(summary, "cross", "pose", "aed", "network") == 0


def test_a_still_face_trembles_with_the_noise_alone(clips):
    summary, _ = judged(clips, protocols=("same",), modes=("exp",), pairs=1)
    assert number(summary, "same", "exp", "flicker", "copy-source") > 0
    assert number(summary, "same", "exp", "flicker", "network") < number(
        summary, "same", "exp", "flicker", "copy-source"
    )


def test_what_cannot_be_measured_says_why(clips):
    summary, _ = judged(clips, Extractors(), protocols=("same",))
    table = summary["tables"][0]["values"]
    assert table["csim"]["network"] == {"value": None, "reason": "not given: --landmarker, --identity"}
    assert table["psnr"]["network"] == {"value": None, "reason": "no true picture"}
    assert all(
        cell["value"] is not None or cell["reason"]
        for one in summary["tables"]
        for row in one["values"].values()
        for cell in row.values()
    )
    assert summary["metrics"]["csim"]["extractor"] is None
    assert set(table) == {metric.key for metric in METRICS}


def test_a_face_that_is_lost_lowers_the_share_found_and_stops_nothing(clips):
    class Blackout(ColourEngine):
        def edit(self, crops, expression, pose):
            return np.zeros_like(crops)

    found, space = clips
    plan = Plan(("cross",), ("exp",), pairs=1, frames=4)
    summary, _ = evaluate(found, systems_of([Blackout()], ["black"]), EVERYTHING, space.template, plan)
    assert number(summary, "cross", "exp", "faces_found", "black") == 0
    assert number(summary, "cross", "exp", "mouth_correlation", "black") is None


def test_pictures_show_source_driving_and_result(clips):
    _, strips = judged(clips, protocols=("cross",), modes=("exp",), pairs=3)
    assert len(strips) == 2
    assert strips[0].columns == ["source", "driving", "network"]
    assert all(picture.shape == (256, 256, 3) for row in strips[0].rows for picture in row)


# The command


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda weights, **options: ColourEngine())
    monkeypatch.setattr("dpe_cli.landmarks.Landmarker", BrightnessLandmarks)


def run(data: Path, *more: str | Path) -> Result:
    command = ["eval", "--data", data, "--pairs", 1, "--frames", 4, "-o", data.parent / "scores", *more]
    return CliRunner().invoke(cli, [str(part) for part in command])


def test_the_command_writes_numbers_and_a_page(data: Path, stand_ins: None):
    done = run(data, "--landmarker", "model.task", "--weights", "a", "--weights", "b")
    scores = data.parent / "scores"
    assert (done.exit_code, done.stdout) == (0, f"{scores / 'eval.html'}\n"), done.stderr
    assert "cross, exp: 1 pairs of 4 frames, held-out identities" in done.stderr
    summary = json.loads((scores / "eval.json").read_text())
    assert list(summary["systems"]) == ["copy-source", "copy-driving", "stand-in", "stand-in (2)"]
    assert (summary["split"], summary["clips"]) == ("held-out identities", 4)
    assert len(summary["tables"]) == 7
    assert number(summary, "cross", "exp", "mouth_correlation", "stand-in (2)") == pytest.approx(1, abs=1e-3)
    page = (scores / "eval.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "<svg" in page and "stand-in (2)" in page and "not given: --landmarker, --identity" not in page
    assert "not given: --identity" in page
    assert "http" not in page
    assert {path.name for path in scores.iterdir()} == {"eval.json", "eval.html"}


def test_scores_are_kept_unless_told(data: Path, stand_ins: None):
    chosen = ("--protocol", "cross", "--mode", "exp", "-q")
    assert run(data, *chosen).exit_code == 0
    again = run(data, *chosen)
    assert again.exit_code == 7 and "eval.json exists" in again.stderr
    assert run(data, *chosen, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "protocol, option",
    [("dub", "--mode=exp"), ("dub", "--identity=x.onnx"), ("dub", "--seed=1"), ("control", "--lpips=x")],
)
def test_an_option_that_a_protocol_does_not_read_is_refused(data: Path, protocol: str, option: str):
    done = run(data, "--protocol", protocol, option)
    assert done.exit_code == 2 and f"{option.partition('=')[0]} cannot go with --protocol {protocol}" in done.stderr


def test_a_pose_in_a_video_is_refused_in_words(data: Path, stand_ins: None):
    done = run(data, "--protocol", "video", "--mode", "pose")
    assert done.exit_code == 3 and "expressions only" in done.stderr


def test_people_that_were_trained_on_are_never_used(data: Path, stand_ins: None):
    for path in data.iterdir():
        if path.stem != "4":  # the clip of id0000
            path.unlink()
    done = run(data)
    assert done.exit_code == 3 and "no prepared clips" in done.stderr
