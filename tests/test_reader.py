"""The reading networks: their shapes and beginning, their file, their samples, what they do to an edit's codes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpe_cli import weights
from dpe_cli.dataset import CROP, is_held_out
from dpe_cli.errors import InputError, WeightsError
from dpe_cli.landmark_net import framing
from dpe_cli.landmarks import FaceShape
from dpe_cli.measured import MeasuredCodes
from dpe_cli.models import LandmarkConfig, LandmarkNet, ReaderConfig, ReaderNets
from dpe_cli.models.reader import COORDINATES as READ
from dpe_cli.models.reader import EYE_PATCH, GROUPS, MOUTH_PATCH
from dpe_cli.motion_space import COORDINATES, MOTION_DIM, MotionSpace
from dpe_cli.parts import BOTH_EYES, EYE, MOUTH, OTHER_EYE, posed
from dpe_cli.reader import Reader, load_nets, patches_of, to_input
from dpe_cli.train_landmarks import LabelledClip
from dpe_cli.train_reader import (
    TOGETHER,
    Looks,
    PatchSampler,
    ReaderTrainer,
    ReaderTraining,
    columns_of,
    learn,
    reader_loss,
    take_looks,
    train_reader,
)

SMALL = ReaderConfig(GROUPS, channels=(8, 8, 8), blocks=(0, 0, 1), features=16, dropout=0.0)
LANDMARKS = LandmarkConfig(size=32, channels=(8, 8, 8, 16), blocks=(0, 0, 1, 0), features=32, components=5)
SHIPPED = weights.folder() / "reader.safetensors"
shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="the reading networks are not in this checkout")


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def space() -> MotionSpace:
    return MotionSpace.load(weights.folder() / "motion-space.json")


def trained_a_bit(config: ReaderConfig) -> ReaderNets:
    """Networks whose word alone counts."""
    nets = ReaderNets(config).eval().requires_grad_(False)
    nets.share.fill_(1)
    return nets


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mouths, eyes and codes of `count` crops."""
    return torch.rand(count, 3, *MOUTH_PATCH), torch.rand(count, 2, 3, *EYE_PATCH), torch.randn(count, MOTION_DIM)


@pytest.fixture
def looks() -> Looks:
    """Four clips of three people in which brightness tells lids and mouth, of which the first look knows little."""
    random, clips = np.random.default_rng(0), np.repeat(np.arange(4), 12)
    state = random.uniform(-1, 1, 48).astype(np.float32)
    flat = (128 + 100 * state).astype(np.uint8)[:, None, None, None]
    mouths, eyes = (np.broadcast_to(flat, (48, *size, 3)).copy() for size in (MOUTH_PATCH, EYE_PATCH))
    wanted = np.zeros((48, MOTION_DIM), np.float32)
    wanted[:, columns_of(("lids", "mouth"))] = state[:, None]
    codes = wanted + random.normal(0, 1, wanted.shape).astype(np.float32)
    people = np.array(["a", "a", "b", "c"])[clips]
    return Looks(mouths, np.stack([eyes, eyes], 1), codes, wanted, np.stack([codes, wanted], 1), clips, people)


# The networks


def test_what_the_networks_take_for_granted_is_so():
    assert all(READ[group] == COORDINATES[group] for group in ("mouth", "lids", "gaze"))
    assert READ["turn"] == slice(0, 2) and COORDINATES["turn"].start == 0  # yaw and pitch
    assert (MOUTH.height, MOUTH.width) == MOUTH_PATCH and (EYE.height, EYE.width) == EYE_PATCH
    assert OTHER_EYE.mirrored and OTHER_EYE.anchor[0] == -EYE.anchor[0] > 0  # the picture's left eye is the first


@pytest.mark.parametrize("groups", [("lids",), ("gaze", "lids"), ("mouth",), ("mouth", "lids", "gaze")])
def test_they_begin_as_no_change_and_then_change_only_their_groups(groups: tuple[str, ...]):
    config = replace(SMALL, groups=groups)
    mouths, eyes, codes = pictures(3)
    torch.testing.assert_close(ReaderNets(config).eval()(mouths, eyes, codes), codes, rtol=0, atol=0)
    changed = (trained_a_bit(config)(mouths, eyes, codes) - codes).abs().amax(0) > 0
    assert changed.nonzero().flatten().tolist() == sorted(columns_of(groups))


def test_what_was_said_before_counts_for_what_is_not_seen():
    nets, (mouths, eyes, codes) = trained_a_bit(SMALL), pictures(2)
    other = codes.clone()
    other[:, 6:18] += 1
    torch.testing.assert_close(nets.read(mouths, eyes, other)[:, 6:18], nets.read(mouths, eyes, codes)[:, 6:18])
    nets.share.fill_(0.25)
    torch.testing.assert_close(
        (nets(mouths, eyes, other) - nets(mouths, eyes, codes))[:, 6:18].mean(), torch.tensor(0.75)
    )


def test_training_starts_from_what_the_landmark_network_sees():
    nets, net = ReaderNets(SMALL), LandmarkNet(LANDMARKS).eval()
    nets.start_from(net)
    image, trunk = torch.rand(1, 3, 32, 32), net.trunk[: len(nets.members[0].trunk)]
    for member in nets.train().members:
        torch.testing.assert_close(member.look(image), trunk(image))  # fixed normalisation
    with pytest.raises(ValueError, match="has other sizes"):
        ReaderNets(replace(SMALL, channels=(8, 8, 4))).start_from(net)


def test_the_mean_of_the_members_counts_and_they_learn_in_turn(looks: Looks):
    nets, (mouths, eyes, codes) = trained_a_bit(SMALL), pictures(2)
    one, two = (member(mouths, eyes, codes) for member in nets.members)
    assert (one - two).abs().max() > 1e-3
    torch.testing.assert_close(nets.read(mouths, eyes, codes), (one + two) / 2)
    trainer = ReaderTrainer(ReaderNets(SMALL), ReaderTraining(batch=8))
    before = [[value.clone() for value in member.parameters()] for member in trainer.nets.members]

    def moved() -> list[bool]:
        now = [list(member.parameters()) for member in trainer.nets.members]
        pairs = (zip(*both, strict=True) for both in zip(before, now, strict=True))
        return [any(not torch.equal(old, new) for old, new in pair) for pair in pairs]

    batch = PatchSampler(looks, trainer.config).batch()
    trainer.step(batch, 0.0)
    assert moved() == [True, False]
    trainer.step(batch, 0.0)
    assert moved() == [True, True]
    with pytest.raises(ValueError, match="at least one"):
        ReaderConfig(members=0)


def test_the_mirrored_face_has_mirrored_eyes():
    nets, (mouths, eyes, codes) = trained_a_bit(SMALL), pictures(2)
    found = nets(mouths, eyes, codes)
    mirrored = codes.clone()
    mirrored[:, [0, 16]] *= -1
    mirrored[:, [14, 15]] = codes[:, [15, 14]]
    again = nets(mouths, eyes.flip(1), mirrored)
    torch.testing.assert_close(again[:, [14, 15]], found[:, [15, 14]])
    torch.testing.assert_close(again[:, 16:18], found[:, 16:18] * torch.tensor([-1.0, 1]))


@pytest.mark.parametrize("changes", [{"groups": ()}, {"groups": ("brows",)}, {"blocks": (1, 1)}])
def test_configurations_that_do_not_fit_are_refused(changes: dict):
    with pytest.raises(ValueError, match="reading network"):
        ReaderConfig(**changes)
    with pytest.raises(ValueError, match="not a configuration"):
        ReaderConfig.from_json('{"colour": 1}')
    assert ReaderConfig.from_json(SMALL.to_json()) == SMALL


# Their file


def test_saved_networks_answer_the_same_and_twice(tmp_path: Path):
    nets, crop = trained_a_bit(SMALL), np.random.default_rng(0).integers(0, 256, (CROP, CROP, 3), np.uint8)
    weights.save(tmp_path / "reader.safetensors", nets.state_dict(), SMALL, {"note": "x"})
    template = MotionSpace.load(weights.folder() / "motion-space.json").template
    points, codes = template * 90 + [128, 128, 0], np.zeros((1, MOTION_DIM), np.float32)
    reader = Reader(tmp_path / "reader.safetensors")
    found = reader.mend([crop], [points], codes, template)
    assert found.dtype == np.float32 and np.array_equal(found, reader.mend([crop], [points], codes, template))
    head = posed(points, template)
    cut_out = patches_of(crop, head, [MOUTH])[0], patches_of(crop, head, BOTH_EYES)
    mouth, eyes = (to_input(torch.from_numpy(part))[None] for part in cut_out)
    np.testing.assert_allclose(found, nets(mouth, eyes, torch.from_numpy(codes)).detach().numpy(), atol=1e-5)
    assert "all there and finite" in weights.verify(tmp_path / "reader.safetensors")


def test_the_wrong_network_is_one_clear_line(tmp_path: Path):
    weights.save(tmp_path / "net.safetensors", LandmarkNet(LANDMARKS).state_dict(), LANDMARKS)
    weights.save(tmp_path / "reader.safetensors", ReaderNets(SMALL).state_dict(), SMALL)
    with pytest.raises(WeightsError, match=r"net.safetensors is no reading network; leave it away") as error:
        load_nets(tmp_path / "net.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match=r"reader.safetensors measures eyes and mouths and cannot edit faces; "):
        weights.load(tmp_path / "reader.safetensors")
    with pytest.raises(WeightsError, match=r"reader.safetensors is no landmark network"):
        weights.load_landmarks(tmp_path / "reader.safetensors")


@shipped
def test_the_shipped_networks_are_the_registered_ones():
    assert weights.digest(SHIPPED) == weights.READER_SHA256, "write its sha256sum into weights.py"
    assert SHIPPED.stat().st_size < 3e6
    assert {"training", "held_out"} <= weights.load_reader().metadata.keys()


# In an edit


def test_codes_are_mended(space: MotionSpace):
    measured = MeasuredCodes(weights.folder() / "compact.safetensors")
    points = (space.template * 90 + [128, 128, 0]).astype(np.float32)
    faces, crops = [FaceShape(points, np.zeros(52, np.float32))], np.zeros((1, CROP, CROP, 3), np.uint8)
    codes = measured.read(faces, CROP)

    class Sees:
        def mend(self, crops: np.ndarray, points: list, codes: np.ndarray, template: np.ndarray) -> np.ndarray:
            assert len(crops) == len(points) == len(codes) == 1 and template is space.template
            return codes + 1

    measured.reader, space = Sees(), measured.space
    np.testing.assert_allclose(measured.look_closer(crops, faces, codes), codes + 1)


def test_patches_show_the_parts(space: MotionSpace):
    points = space.template * 90 + [128, 128, 0]
    crop = np.zeros((CROP, CROP, 3), np.uint8)
    for part, colour in ((EYE.inner, 100), (OTHER_EYE.inner, 200), (MOUTH.inner, 250)):
        x, y = points[list(part), :2].mean(0).round().astype(int)
        crop[y - 2 : y + 3, x - 2 : x + 3] = colour
    head = posed(points, space.template)
    (mouth,), eyes = (patches_of(crop, head, parts) for parts in ([MOUTH], BOTH_EYES))
    assert mouth.max() > 240 and abs(int(eyes[0].max()) - 100) < 10 and abs(int(eyes[1].max()) - 200) < 10


# Training


def test_batches_hold_frames_of_a_clip_together(looks: Looks):
    config = ReaderTraining(batch=8 * TOGETHER)
    batch = PatchSampler(looks, config).batch()
    assert batch["mouths"].shape == (32, *MOUTH_PATCH, 3) and batch["eyes"].shape == (32, 2, *EYE_PATCH, 3)
    rows = [np.abs(looks.wanted[:, 14] - float(value)).argmin() for value in batch["wanted"][:, 14]]
    clips = looks.clips[rows].reshape(-1, TOGETHER)
    assert (clips == clips[:, :1]).all() and len(set(clips[:, 0])) > 2
    same = PatchSampler(looks, config).batch()
    assert all(value.equal(same[name]) for name, value in batch.items())


def test_only_differences_count_in_the_second_term():
    wanted = torch.randn(2 * TOGETHER, 3)
    terms = reader_loss(wanted + torch.randn(2, 1, 3).expand(2, TOGETHER, 3).flatten(0, 1), wanted, ReaderTraining())
    assert terms["codes"] > 0.1 and terms["motion"] < 1e-10


def test_a_few_steps_read_what_is_seen(looks: Looks, tmp_path: Path):
    config = ReaderTraining(steps=120, batch=16, lr=5e-3, ema=0.5)
    trainer = learn(looks, ReaderNets(SMALL), config, tmp_path / "curve.jsonl", lambda line: None)
    trainer.weigh(looks)
    found = trainer.compare(looks)
    assert found["patches"]["lids 1"]["correlation"] > 0.8 > found["first look"]["lids 1"]["correlation"]
    assert found["reader"]["lids 1"]["rms"] < 0.7 * found["first look"]["lids 1"]["rms"]
    shares = trainer.averaged().share
    assert shares[columns_of(("lids", "mouth"))].mean() > 0.5
    assert not shares[:6].any() and not shares[16:].any()  # what does not move, or is not read
    assert "motion" in (tmp_path / "curve.jsonl").read_text()


class Told:
    """Stands in for the landmark network on crops without framing noise: knows the faces of the frames, in order."""

    def __init__(self, clip: LabelledClip, blind: bool = False):
        boxes = [framing(points) for points in clip.points]
        faces = [(p - [box.x0, box.y0, 0]) * (CROP / box.width) for p, box in zip(clip.points, boxes, strict=True)]
        scores = np.zeros(52, np.float32)
        self.faces = [None if blind else FaceShape(face.astype(np.float32), scores) for face in faces]

    def detect_batch(self, pictures: list[np.ndarray]) -> list[FaceShape | None]:
        return self.faces[: len(pictures)]


def test_looks_hold_codes_and_labels_and_both_mirrored(space: MotionSpace):
    random = np.random.default_rng(0)
    shapes = space.template + random.normal(0, 0.01, (5, 478, 3))
    points = (shapes * 80 + [128, 128, 0]).astype(np.float32)
    frames = random.integers(0, 256, (5, CROP, CROP, 3), np.uint8)
    clip = LabelledClip(frames, points, np.zeros((5, 52), np.float32), "someone", "drawn")
    looks = take_looks([clip], space, Told(clip), None)
    assert looks.mouths.shape == (5, *MOUTH_PATCH, 3) and looks.eyes.shape == (5, 2, *EYE_PATCH, 3)
    np.testing.assert_allclose(looks.codes, looks.wanted, atol=0.01)  # who told is right
    np.testing.assert_allclose(looks.mirrored[:, 0], looks.mirrored[:, 1], atol=0.01)
    np.testing.assert_allclose(looks.mirrored[:, 0, 17], looks.codes[:, 17], atol=0.01)  # up stays up
    assert set(looks.people) == {"someone"} and len(looks.of(looks.clips == 1).codes) == 0
    with pytest.raises(InputError, match="sees no face in any clip; prepare"):
        take_looks([clip], space, Told(clip, blind=True), None)


def test_a_run_writes_weights_and_numbers(tmp_path: Path, space: MotionSpace, monkeypatch: pytest.MonkeyPatch):
    random, data, lines = np.random.default_rng(0), tmp_path / "data", []
    data.mkdir()
    held, seen = (next(f"id{i}" for i in range(99) if is_held_out(f"id{i}") == wanted) for wanted in (True, False))
    for identity in (held, seen):
        points = ((space.template + random.normal(0, 0.01, (6, 478, 3))) * 80 + [128, 128, 0]).astype(np.float32)
        np.save(data / f"{identity}.npy", random.integers(0, 256, (6, CROP, CROP, 3), np.uint8))
        np.savez(data / f"{identity}.npz", points=points, blendshapes=np.zeros((6, 52), np.float32), identity=identity)

    class AlwaysTheSame:
        net = LandmarkNet(LANDMARKS)

        def __init__(self, passes: int):
            self.face = FaceShape((space.template * 90 + [128, 128, 0]).astype(np.float32), np.zeros(52, np.float32))

        def detect_batch(self, pictures: list[np.ndarray]) -> list[FaceShape | None]:
            return [self.face] * len(pictures)

    monkeypatch.setattr("dpe_cli.train_reader.NetworkLandmarker", AlwaysTheSame)
    settings = ReaderTraining(steps=2, batch=8)
    path = train_reader(data, tmp_path / "run", settings, space, ReaderNets(SMALL), lines.append)
    assert load_nets(path).config == SMALL and "1 clips of 1 people, 6 frames" in lines[0]
    assert "lids 1" in weights.info(path)["metadata"]["held_out"]
