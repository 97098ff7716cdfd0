"""The landmark network: its shapes and gradients, its samples, its file, and how near it comes to MediaPipe."""

import csv
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dpe_cli import weights
from dpe_cli.dataset import is_held_out
from dpe_cli.errors import InputError, WeightsError
from dpe_cli.face import Box, Detection, make_detector
from dpe_cli.landmark_net import NetworkLandmarker, expression_network, framing, load_net, to_pixels
from dpe_cli.landmarks import BLENDSHAPES, RIGID, Landmarker, head_angles, mouth_opening
from dpe_cli.main import cli
from dpe_cli.models import DPE, DPEConfig, LandmarkConfig, LandmarkNet
from dpe_cli.motion_space import MotionSpace, normalise
from dpe_cli.train_landmarks import (
    CropSampler,
    LabelledClip,
    LandmarkTrainer,
    LandmarkTraining,
    area_under_curve,
    at_size,
    correlation,
    expression_codes,
    face_model,
    load_labelled,
    train_landmarks,
)
from dpe_cli.video import read_frames

SMALL = LandmarkConfig(size=32, channels=(8, 8, 8, 16), blocks=(0, 0, 1, 0), features=32, components=5)
SHIPPED = weights.folder() / "landmarks.safetensors"
ERROR_BOUND = 0.05  # of the outer eye corners' distance
shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="the landmark network is not in this checkout")


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def template() -> np.ndarray:
    """The mean face that comes with the tool."""
    return MotionSpace.load(weights.folder() / "motion-space.json").template


def with_face(net: LandmarkNet) -> LandmarkNet:
    """The network with a face model: the mean face and arbitrary deformations."""
    net.mean.copy_(torch.from_numpy(template()))
    net.basis.normal_(0, 0.01)
    return net


def posed_face(shape: np.ndarray, degrees: tuple[float, float, float], scale: float, middle: float) -> np.ndarray:
    """A face (478, 3) turned by yaw, pitch and roll, in pixels around (middle, middle)."""
    yaw, pitch, roll = np.radians(degrees)
    about_y = [[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]]
    about_x = [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]]
    about_z = [[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]
    rotation = np.array(about_y) @ np.array(about_x) @ np.array(about_z)
    return (scale * shape @ rotation.T + [middle, middle, 0]).astype(np.float32)


@pytest.fixture
def clip() -> LabelledClip:
    """A drawn face: eyes white, mouth red and opening, skin flesh, moved from frame to frame."""
    random, frames, faces = np.random.default_rng(0), [], []
    shape = template()
    for number in range(12):
        one = shape.copy()
        one[[14, 87, 317, 17, 84, 314, 152], 1] += 0.02 * number
        points = posed_face(one, tuple(random.normal(0, 8, 3)), 76 * random.uniform(0.95, 1.05), 128)
        frame = np.full((256, 256, 3), 90, np.uint8)
        cv2.fillConvexPoly(frame, cv2.convexHull(points[:, :2].astype(np.int32)), (200, 150, 120))
        for x, y in points[[33, 263, 468, 473], :2]:
            cv2.circle(frame, (int(x), int(y)), 6, (255, 255, 255), -1)
        cv2.line(frame, *(tuple(map(int, points[i, :2])) for i in (13, 14)), (200, 0, 0), 12)
        frames.append(frame)
        faces.append(points)
    scores = random.uniform(0, 1, (12, 52)).astype(np.float32)
    return LabelledClip(np.stack(frames), np.stack(faces), scores, "someone", "drawn")


def prepared(clip: LabelledClip, folder: Path, identity: str) -> None:
    """Writes a clip as `dpe prepare` does."""
    np.save(folder / f"{identity}.npy", clip.frames)
    np.savez(folder / f"{identity}.npz", points=clip.points, blendshapes=clip.blendshapes, identity=identity)


# The network


def test_shapes_and_ranges():
    net = LandmarkNet(SMALL).eval()
    net.mean.normal_()
    net.basis.normal_()
    found = net(torch.rand(3, 3, 32, 32) * 2 - 1)
    assert found.points.shape == found.shape.shape == (3, 478, 3)
    assert found.blendshapes.shape == (3, 52) and found.visibility.shape == (3, 478)
    assert found.scale.shape == found.confidence.shape == (3,)
    for value in (found.blendshapes, found.visibility, found.confidence):
        assert ((value >= 0) & (value <= 1)).all()
    torch.testing.assert_close(found.rotation @ found.rotation.mT, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(found.rotation), torch.ones(3))
    again = found.scale[:, None, None] * found.shape @ found.rotation.mT + found.translation[:, None]
    torch.testing.assert_close(found.points, again)


def test_crops_of_another_size_are_averaged_to_the_network_s():
    net = LandmarkNet(SMALL).eval()
    net.mean.normal_()
    small = torch.rand(2, 3, 32, 32) * 2 - 1
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(net(large).points, net(small).points)


def test_gradients_reach_the_pixels_and_not_the_fixed_weights(tmp_path: Path):
    net = LandmarkNet(SMALL)
    net.basis.normal_()
    weights.save(tmp_path / "net.safetensors", net.state_dict(), SMALL)
    fixed = load_net(tmp_path / "net.safetensors")
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    found = fixed(image)
    for value in (found.points, found.shape, found.rotation, found.blendshapes, found.confidence):
        (gradient,) = torch.autograd.grad(value.square().sum(), image, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in fixed.parameters())


@pytest.mark.parametrize("changes", [{"size": 100}, {"channels": (8, 8)}])
def test_sizes_that_do_not_fit_are_refused(changes: dict):
    with pytest.raises(ValueError, match="multiple of 32"):
        LandmarkConfig(**changes)


# Its file


def test_codes_with_gradients_are_the_motion_coordinates():
    space, random = MotionSpace.load(weights.folder() / "motion-space.json"), np.random.default_rng(0)
    shape = space.template + random.normal(0, 0.02, (4, 478, 3))
    scores = random.uniform(0, 1, (4, 52))
    points = torch.tensor(shape, dtype=torch.float32, requires_grad=True)
    found = expression_codes(points, torch.tensor(scores, dtype=torch.float32), space)
    np.testing.assert_allclose(found.detach().numpy(), space.expression(shape, scores), atol=1e-4)
    found.sum().backward()
    assert points.grad.abs().sum() > 0


def test_a_network_keeps_what_it_knows_at_another_size():
    net = with_face(LandmarkNet(SMALL)).eval()
    larger = at_size(net, 64).eval()
    assert larger.config.size == 64 and at_size(net, 32).gather.weight.equal(net.gather.weight)
    flat = torch.full((1, 3, 64, 64), 0.3)  # looks the same at every size
    same = [net(flat[..., :32, :32]).shape, larger(flat).shape]
    assert (same[0] - same[1]).abs().max() < 0.3 * (same[0] - torch.from_numpy(template())).abs().max()


def test_a_saved_network_answers_the_same(tmp_path: Path):
    net = LandmarkNet(SMALL).eval()
    net.mean.normal_()
    weights.save(tmp_path / "net.safetensors", net.state_dict(), SMALL, {"note": "x"})
    loaded = load_net(tmp_path / "net.safetensors")
    image = torch.rand(1, 3, 32, 32)
    assert loaded.config == SMALL
    torch.testing.assert_close(loaded(image).points, net(image).points)
    assert weights.info(tmp_path / "net.safetensors")["config"]["components"] == 5
    assert "all there and finite" in weights.verify(tmp_path / "net.safetensors")


def test_many_steps_do_not_spoil_a_file_of_16_bits(tmp_path: Path):
    state = LandmarkNet(SMALL).state_dict()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    state |= {key: torch.tensor(1_000_000) for key in counters}
    weights.save(tmp_path / "net.safetensors", state, SMALL, half=True)
    assert counters and weights.load_landmarks(tmp_path / "net.safetensors").state[counters[0]] == 1_000_000


def test_the_wrong_network_is_one_clear_line(tmp_path: Path):
    config = DPEConfig(16, {4: 4, 8: 4, 16: 4}, latent_dim=20)
    weights.save(tmp_path / "dpe.safetensors", DPE(config).state_dict(), config)
    weights.save(tmp_path / "net.safetensors", LandmarkNet(SMALL).state_dict(), SMALL)
    with pytest.raises(WeightsError, match=r"dpe.safetensors is no landmark network; leave it away") as error:
        load_net(tmp_path / "dpe.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match=r"net.safetensors is a landmark network, .* cannot edit them; "):
        weights.load(tmp_path / "net.safetensors")
    (tmp_path / "text.safetensors").write_text("no network")
    with pytest.raises(WeightsError, match=r"text.safetensors is not a checkpoint; "):
        load_net(tmp_path / "text.safetensors")
    state = LandmarkNet(SMALL).state_dict()
    del state["basis"]
    with pytest.raises(ValueError, match=r"1 tensors are missing \(basis\)"):
        weights.save(tmp_path / "short.safetensors", state, SMALL)


@shipped
def test_the_shipped_network_is_the_registered_one():
    assert weights.digest(SHIPPED) == weights.LANDMARKS_SHA256, "write its sha256sum into weights.py"
    assert 1e6 < SHIPPED.stat().st_size < 4e6
    metadata = weights.load_landmarks().metadata
    assert {"training", "held_out"} <= metadata.keys()
    done = CliRunner().invoke(cli, ["weights", "verify", "landmarks"])
    assert done.exit_code == 0 and "landmarks as released" in done.output


# Its samples


@pytest.mark.parametrize("flip", [False, True])
def test_labels_stay_on_the_picture(clip: LabelledClip, flip: bool):
    sampler = CropSampler([clip], template(), 128, LandmarkTraining())
    matrix = sampler.placement(framing(clip.points[0]), flip)
    image = sampler.cut(clip.frames[0], matrix)
    eyes = clip.points[0][[33, 263], :2] @ matrix[:, :2].T + matrix[:, 2]
    for x, y in eyes:
        assert image[int(y), int(x)].min() > 220  # the white dots that were drawn there
    assert (eyes[0, 0] > eyes[1, 0]) == flip or abs(eyes[0, 0] - eyes[1, 0]) < 20


def test_a_mirrored_sample_is_a_face_with_left_and_right_exchanged(clip: LabelledClip):
    sampler = CropSampler([clip], template(), 128, LandmarkTraining(negatives=0))
    for _ in range(20):
        sample = sampler.sample()
        points, shape = sample["points"], sample["shape"]
        # Whichever way it was turned over: the labels are the posed shape, and no reflection of it.
        shapes, scale, rotation, _ = normalise(points[None].astype(float), template())
        assert np.abs(shapes[0][RIGID] - shape[RIGID]).max() < 0.03
        assert abs(scale[0] / sample["scale"] - 1) < 0.02 and np.linalg.det(rotation[0]) > 0.99
        assert abs(head_angles(rotation[0])[2]) < 75
        np.testing.assert_allclose(rotation[0], sample["rotation"], atol=0.03)


def test_samples_without_a_face_say_so(clip: LabelledClip):
    sampler = CropSampler([clip], template(), 64, LandmarkTraining(negatives=1))
    batch = sampler.batch(40)
    assert batch["image"].shape == (40, 3, 64, 64) and batch["image"].dtype == torch.uint8
    assert batch["face"].sum() == 0 and batch["visible"].sum() == 0 and batch["known"].all()
    assert CropSampler([clip], template(), 64, LandmarkTraining(negatives=0)).batch(40)["face"].mean() > 0.8


def test_the_face_model_holds_its_faces(clip: LabelledClip):
    mean, basis = face_model([clip], 8)
    assert mean.shape == (478, 3) and basis.shape == (8, 1434)
    assert abs(np.linalg.norm(mean[33] - mean[263]) - 1) < 1e-6
    shapes = (normalise(clip.points[:4], mean)[0] - mean).reshape(4, -1)
    axes = basis / np.maximum(np.linalg.norm(basis, axis=1, keepdims=True), 1e-9)
    assert np.abs(shapes - shapes @ axes.T @ axes).max() < 0.1 * np.abs(shapes).max()
    deviations = np.linalg.norm(basis, axis=1)
    assert (np.diff(deviations) <= 1e-9).all() and deviations[0] > 0.05  # the mouth that opens


# Training


def test_a_few_steps_learn_a_face(clip: LabelledClip):
    net = with_face(LandmarkNet(LandmarkConfig(size=64, channels=(16, 24, 32, 48), blocks=(0, 0, 0, 0))))
    config = LandmarkTraining(ema=0.8)
    trainer, batch = LandmarkTrainer(net, config), CropSampler([clip], template(), 64, config).batch(8)
    losses = [trainer.step(batch, 0)["points"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_writes_weights_and_numbers(clip: LabelledClip, tmp_path: Path):
    held, seen = (next(f"id{i}" for i in range(99) if is_held_out(f"id{i}") == wanted) for wanted in (True, False))
    data, lines = tmp_path / "data", []
    data.mkdir()
    for identity in (held, seen):
        prepared(clip, data, identity)
    config = LandmarkTraining(minutes=0.01, batch=4)
    path = train_landmarks(data, tmp_path / "run", config, with_face(LandmarkNet(SMALL)), talk=lines.append)
    held_out = weights.info(path)["metadata"]["held_out"]
    assert "error_lips" in held_out and "1 clips of 1 people" in lines[0]
    assert [one.identity for one in load_labelled(data, held_out=True, size=64)] == [held]


def test_the_measures_of_evaluation():
    assert area_under_curve(np.array([2.0, 3]), np.array([0.0, 1])) == 1
    assert area_under_curve(np.array([0.0, 3]), np.array([1.0, 1])) == 0.5
    assert correlation(np.arange(5.0), np.arange(5.0) * 2, 0.1) == pytest.approx(1)
    assert np.isnan(correlation(np.arange(5.0), np.ones(5), 0.1))


# In place of MediaPipe


def test_points_come_back_in_the_picture_s_pixels():
    box = Box(10, 20, 110, 120)
    points = to_pixels(np.array([[-1.0, -1, 0], [1, 1, 0.5], [0, 0, 0]]), box)
    np.testing.assert_allclose(points, [[10, 20, 0], [110, 120, 25], [60, 70, 0]])


@shipped
def test_no_face_is_none():
    class Blind:
        name = "blind"

        def detect(self, rgb: np.ndarray) -> list[Detection]:
            return []

    grey = np.full((200, 300, 3), 127, np.uint8)
    assert NetworkLandmarker(detector=Blind()).detect(grey) is None
    assert NetworkLandmarker().detect_batch([grey, grey[:64, :64]]) == [None, None]


@shipped
def test_near_mediapipe_on_people_never_seen(shared):
    index = shared("faces/index.csv")
    model = shared("models/mediapipe/face_landmarker.task")
    pytest.importorskip("mediapipe")
    with index.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if is_held_out(row["identity_cluster"])]
    landmarker, network = Landmarker(model), NetworkLandmarker(detector=make_detector("centerface"))
    labels, pictures = [], []
    for row in rows[:: max(1, len(rows) // 4)][:4]:
        for frame in read_frames(index.parent / row["clip"]):
            if frame.index % 25 == 0 and frame.index < 100:
                face = landmarker.detect(frame.rgb)
                if face is not None:
                    labels.append(face)
                    pictures.append(frame.rgb)
    landmarker.close()
    found = network.detect_batch(pictures)
    assert len(labels) >= 8 and sum(face is None for face in found) <= len(labels) // 10
    pairs = [(face, label) for face, label in zip(found, labels, strict=True) if face is not None]
    error = [
        np.linalg.norm((face.points - label.points)[:, :2], axis=1).mean()
        / np.linalg.norm((label.points[33] - label.points[263])[:2])
        for face, label in pairs
    ]
    assert np.mean(error) < ERROR_BOUND
    openings = np.array([[mouth_opening(face.points), mouth_opening(label.points)] for face, label in pairs])
    assert np.corrcoef(openings.T)[0, 1] > 0.8
    jaw = BLENDSHAPES.index("jawOpen")
    assert (
        np.corrcoef([[face.blendshapes[jaw], label.blendshapes[jaw]] for face, label in pairs], rowvar=False)[0, 1]
        > 0.7
    )


def test_the_features_of_the_expression_loss_see_the_mouth_and_can_be_learnt_from(tmp_path):
    features = expression_network(None)
    image = torch.zeros(2, 3, 64, 64, requires_grad=True)
    seen = features(image)
    assert seen.shape == (2, 3 * len(features.points) + 52)
    seen.sum().backward()
    assert image.grad.abs().max() > 0
    assert not any(p.requires_grad for p in features.parameters())


def test_a_foreign_expression_network_is_a_torchscript_file(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"text")
    with pytest.raises(InputError, match="no TorchScript"):
        expression_network(tmp_path / "no.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 224, 224))
        script.save(str(tmp_path / "yes.pt"))
    assert expression_network(tmp_path / "yes.pt")(torch.ones(2, 3, 32, 32)).shape == (2, 3 * 224 * 224)
