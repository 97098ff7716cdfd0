"""The matte network: its shape, its file, its training, and the background that it lets stand still."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_clips

from dpe_cli import weights
from dpe_cli.crop import cut
from dpe_cli.dataset import CROP, is_held_out
from dpe_cli.engine import Engine
from dpe_cli.errors import WeightsError
from dpe_cli.face import crop_box, make_detector
from dpe_cli.main import cli
from dpe_cli.matte import Matte, flow_with_still, load_net, standing, with_still
from dpe_cli.mesh import centres
from dpe_cli.models import MatteConfig, MatteNet, RetouchConfig
from dpe_cli.models.retouch import Retouch
from dpe_cli.motion_space import COORDINATES, MotionSpace
from dpe_cli.train_landmarks import load_labelled
from dpe_cli.train_matte import HALF, MatteSampler, MatteTraining, compare, labels_of, learn, moved, train_matte

SMALL = MatteConfig(channels=(8, 8, 16), blocks=(1, 1, 1))
SHIPPED = weights.folder() / "matte.safetensors"
SPACE = MotionSpace.load(weights.folder() / "motion-space.json")


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def left_half(rgb: np.ndarray) -> np.ndarray:
    """A teacher to whom the left half of a picture is the person."""
    return np.repeat((np.arange(rgb.shape[1]) < rgb.shape[1] // 2)[None], len(rgb), 0).astype(np.float32)


def disc(x: float, radius: float = 30) -> torch.Tensor:
    """A person seen as a disc in the middle's height: (1, 128, 128) float32"""
    picture = cv2.circle(np.zeros((HALF, HALF), np.float32), (round(x), HALF // 2), round(radius), 1.0, -1)
    return torch.from_numpy(picture)[None]


def here() -> torch.Tensor:
    """Where pixels come from that stay in place: (1, 256, 256, 2) in [-1, 1]"""
    return torch.from_numpy(centres(CROP, CROP) / CROP * 2 - 1).float()[None]


# The network


@pytest.mark.parametrize("config", [SMALL, MatteConfig()])
def test_a_matte_has_half_the_pictures_side(config: MatteConfig):
    assert MatteNet(config)(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 32, 48)


@pytest.mark.parametrize("wrong", [{"channels": (8, 8)}, {"channels": (), "blocks": ()}, {"blocks": (1, 0, 1, 1)}])
def test_sizes_that_do_not_fit_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="channels and blocks"):
        MatteConfig(**wrong)


def test_a_saved_network_answers_the_same(tmp_path: Path):
    net, path = MatteNet(SMALL).eval(), tmp_path / "matte.safetensors"
    weights.save(path, net.state_dict(), SMALL)
    crops = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    found = Matte(path).persons(crops)
    assert found.shape == (3, 32, 32) and found.dtype == np.float32 and 0 <= found.min() <= found.max() <= 1
    with torch.inference_mode():
        wanted = net(torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1).sigmoid()[:, 0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert "all there and finite" in weights.verify(path)


def test_the_wrong_network_is_one_clear_line(tmp_path: Path):
    weights.save(tmp_path / "retouch.safetensors", Retouch(RetouchConfig()).state_dict(), RetouchConfig())
    weights.save(tmp_path / "matte.safetensors", MatteNet(SMALL).state_dict(), SMALL)
    with pytest.raises(WeightsError, match=r"retouch.safetensors is no matte network; leave it away"):
        load_net(tmp_path / "retouch.safetensors")
    with pytest.raises(WeightsError, match=r"matte.safetensors tells persons from what is behind them and cannot edit"):
        weights.load(tmp_path / "matte.safetensors")


def test_the_shipped_network_is_the_registered_one():
    assert weights.digest(SHIPPED) == weights.MATTE_SHA256, "write its sha256sum into weights.py"
    assert SHIPPED.stat().st_size < 2e6
    held_out = json.loads(weights.load_matte().metadata["held_out"])
    assert held_out["iou"] > 0.9


# What stands still


def test_what_a_head_leaves_or_covers_does_not_stand_still():
    """A head 20 pixels of its matte to the right of where it was."""
    (still,) = standing(disc(50), here() - torch.tensor([40 / 128, 0]))  # at 50 of 128, radius 30; then at 70
    row = still[64]
    assert still.shape == (HALF, HALF) and still.min() >= 0 and still.max() <= 1
    assert row[:14].min() > 0.99 and row[106:].min() > 0.99 and still[:25].min() > 0.99
    assert row[20:99].max() < 0.01  # where it was, and where it is now


def test_background_alone_stands_still_whole_and_a_person_not_at_all():
    assert (standing(torch.zeros(1, HALF, HALF), here()) == 1).all()
    assert (standing(torch.ones(1, HALF, HALF), here()) < 1e-6).all()
    with torch.autocast("cpu", torch.bfloat16):  # as the networks may compute
        assert standing(disc(50).bfloat16(), here()).dtype == torch.float32


def test_what_stands_still_is_the_crops_own():
    random = np.random.default_rng(0)
    drawn, crop = random.integers(0, 256, (2, 64, 64, 3), np.uint8)
    still = np.zeros((32, 32), np.float32)
    still[:, :10], still[:, 10:20] = 1, 0.5
    found = with_still(drawn, crop, still)
    np.testing.assert_array_equal(found[:, :18], crop[:, :18])
    np.testing.assert_array_equal(found[:, 42:], drawn[:, 42:])
    np.testing.assert_allclose(found[:, 22:38], (drawn[:, 22:38].astype(float) + crop[:, 22:38]) / 2, atol=0.51)


def test_a_flow_leaves_in_place_what_stands_still():
    places = centres(32, 64).astype(np.float32)
    still = np.zeros((64, 64), np.float32)
    still[:, :32] = 1
    found = flow_with_still(places + 5, still, 64)
    np.testing.assert_allclose(found[:, :16], places[:, :16], atol=1e-4)
    np.testing.assert_allclose(found[:, 16:], places[:, 16:] + 5, atol=1e-4)


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """The astronaut of scikit-image, framed as the tool frames faces: (1, 256, 256, 3) uint8."""
    picture = pytest.importorskip("skimage.data").astronaut()
    return cut(picture, crop_box(make_detector().detect(picture)[0]), CROP)[0][None]


def test_the_shipped_network_sees_a_portrait(portrait: np.ndarray):
    (matte,) = Matte().persons(portrait)
    face = Engine(device="cpu").faces(portrait)[0].points[:, :2].round().astype(int) // 2
    assert matte[face[:, 1], face[:, 0]].mean() > 0.98
    assert matte[50:65, 1:8].max() < 0.1 and 0.4 < matte.mean() < 0.9


def test_behind_a_head_that_turns_the_background_stands_still(portrait: np.ndarray):
    engine = Engine(device="cpu")
    turned = engine.motion_codes(portrait)
    turned[:, COORDINATES["turn"].start] += 1  # 15 degrees
    beside = np.s_[104:126, 2:12]
    (found,), (where,) = engine.edit(portrait, None, turned), engine.carried(portrait, None, turned)
    np.testing.assert_array_equal(found[beside], portrait[0][beside])
    np.testing.assert_allclose(where[52:63, 1:5, :2], centres(128, CROP)[52:63, 1:5], atol=0.05)
    assert np.abs(found.astype(int) - portrait[0]).mean() > 3  # the head moves

    bent = Engine(device="cpu")
    bent.matte.persons = lambda crops: np.ones((len(crops), HALF, HALF), np.float32)
    assert np.abs(bent.edit(portrait, None, turned)[0][beside].astype(int) - portrait[0][beside]).mean() > 0.5


def test_a_crop_is_looked_at_once(portrait: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    engine, seen = Engine(device="cpu", batch_size=2), []
    asked = Matte.persons
    monkeypatch.setattr(Matte, "persons", lambda self, crops: seen.append(len(crops)) or asked(self, crops))
    poses = engine.motion_codes(portrait).repeat(4, 0) + np.float32([[0], [0.3], [0.6], [0.9]]) * (np.arange(20) == 0)
    engine.edit(portrait.repeat(4, 0), None, poses)
    assert seen == [1]
    engine.edit(portrait, poses[1:2], None)
    assert seen == [1]  # an expression leaves the head where it is
    assert engine.description["matte"] == weights.MATTE_SHA256 and Engine(retouch=False).matte is None


# Training


def test_a_matte_moves_with_its_picture():
    picture = np.zeros((CROP, CROP, 3), np.uint8)
    cv2.circle(picture, (90, 120), 40, (255, 255, 255), -1)
    matte = cv2.resize(picture[..., 0], (HALF, HALF), interpolation=cv2.INTER_AREA)
    matrix = np.array([[-0.9, 0.2, 250.0], [0.2, 0.9, 5.0]])  # mirrored, turned, scaled
    found, wanted = moved(matte, matrix, HALF), cv2.resize(moved(picture, matrix, CROP)[..., 0], (HALF, HALF))
    assert np.abs(found.astype(int) - wanted).mean() < 1 and 1000 < (found > 128).sum() < 1600


def test_training_learns_what_its_teacher_says(prepared: Path, tmp_path: Path):
    clips = load_labelled(prepared, False, CROP, 4)
    labels = [labels_of(clip, left_half) for clip in clips]
    assert labels[0].shape == (3, HALF, HALF) and set(np.unique(labels[0])) == {0, 255}
    sampler = MatteSampler(clips, labels, SPACE.template, 0)
    sampler.spoiler.placement = lambda box, flip: np.eye(2, 3)  # else left may be right
    curve = tmp_path / "curve.jsonl"
    config = MatteTraining(steps=100, batch=4, lr=5e-3, ema=0.9)
    trainer = learn(sampler, MatteNet(SMALL), config, curve, lambda line: None)
    first, last = (json.loads(line)["loss"] for line in curve.read_text().splitlines())
    assert last < 0.5 * first
    framed = compare(trainer.averaged(), clips, labels)
    assert 0 <= framed["iou"] <= 1 and framed["error"] < compare(MatteNet(SMALL), clips, labels)["error"]


def test_a_run_writes_weights_and_numbers(tmp_path: Path):
    lines, prepared = [], tmp_path / "data"
    prepared.mkdir()
    write_clips(
        prepared, [next(f"id{i}" for i in range(99) if is_held_out(f"id{i}") == held) for held in (True, False)]
    )
    config = MatteTraining(steps=2, batch=2)
    path = train_matte(prepared, tmp_path / "run", config, SPACE, left_half, MatteNet(SMALL), lines.append)
    assert path == tmp_path / "run/matte.safetensors" and load_net(path).config == SMALL
    assert "frames labelled" in lines[0] and {"iou", "error"} == json.loads(lines[-1]).keys()
    assert {"training", "steps", "held_out"} <= weights.load_matte(path).metadata.keys()


def test_the_command_wants_its_teacher(prepared: Path, tmp_path: Path):
    command = ["train", "--set", "stage=matte", "--data", str(prepared), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2 and "name its selfie_segmentation.tflite with --segmenter" in result.output
    pytest.importorskip("mediapipe")
    result = CliRunner().invoke(cli, [*command, "--segmenter", str(tmp_path / "none.tflite")])
    assert result.exit_code == 3 and "none.tflite" in result.output
    result = CliRunner().invoke(cli, [*command, "--config", str(two_phases(tmp_path))])
    assert result.exit_code == 2 and "a run of its own" in result.output


def two_phases(folder: Path) -> Path:
    """A recipe that wants more of a run than it can be."""
    path = folder / "two.toml"
    path.write_text("[[phase]]\nname = 'a'\nstage = 'matte'\n[[phase]]\nname = 'b'\nstage = 'codes'\n")
    return path
