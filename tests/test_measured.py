"""Motion codes told by landmarks: what they are, when the encoder's count, what an edit makes of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dpe_cli import weights
from dpe_cli.engine import Engine
from dpe_cli.errors import InputError
from dpe_cli.landmarks import FaceShape
from dpe_cli.measured import SURE, MeasuredCodes
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.motion_space import MOTION_DIM, POSE_DIM, MotionSpace

SHIPPED = weights.folder() / "compact.safetensors"
SIZE = 64


class Found:
    """A landmark network that always sees the same faces."""

    def __init__(self, faces: list[FaceShape | None]):
        self.faces = faces

    def detect_batch(self, pictures: np.ndarray) -> list[FaceShape | None]:
        return self.faces[: len(pictures)]


@pytest.fixture
def measured() -> MeasuredCodes:
    """Sees a mean face of 80 pixels in the middle of 256, then nothing, then a face half as sure as need be."""
    codes = MeasuredCodes(SHIPPED)
    codes.look_closer = lambda crops, faces, found: found  # there are no eyes to look at
    points = (codes.space.template * 80 + [128, 128, 0]).astype(np.float32)
    doubted = FaceShape(points, np.zeros(52, np.float32), confidence=(0.5 + SURE) / 2)
    codes.landmarks = Found([FaceShape(points, np.zeros(52, np.float32)), None, doubted])
    return codes


def test_codes_are_the_coordinates_of_the_landmarks(measured: MeasuredCodes):
    crops, read = np.zeros((3, 256, 256, 3), np.uint8), np.ones((3, MOTION_DIM), np.float32)
    asked = []

    def encoder(rows: list[int]) -> np.ndarray:
        asked.extend(rows)
        return read[rows]

    (sure, blind, doubted), faces = measured.measure(crops, encoder)
    assert asked == [1, 2]  # the encoder costs more than all else
    assert faces == measured.landmarks.faces
    space = MotionSpace.load(SHIPPED.parent / "motion-space.json")
    np.testing.assert_allclose(sure[POSE_DIM:], space.expression(space.template[None], np.zeros((1, 52)))[0], atol=1e-4)
    np.testing.assert_allclose(sure[[0, 1, 2, 4, 5]], 0, atol=1e-4)
    np.testing.assert_array_equal(blind, read[1])
    np.testing.assert_allclose(doubted, (sure + read[2]) / 2, atol=1e-5)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Random weights whose codes landmarks tell otherwise than the encoder: by one in every coordinate."""
    config = DPEConfig.compact(SIZE)
    torch.manual_seed(0)
    weights.save(tmp_path / "random.safetensors", DPE(config).state_dict(), config)
    networks = Engine(tmp_path / "random.safetensors", device="cpu")

    class Other:
        def measure(self, crops: np.ndarray, encoder: Callable) -> tuple[np.ndarray, list[None]]:
            return encoder(list(range(len(crops)))) + 1, [None] * len(crops)

    networks.measured = Other()
    return networks


@pytest.mark.parametrize("mode", ["exp", "pose", "both"])
def test_an_edit_goes_as_far_as_from_the_source_s_measured_code_to_the_driving_s(engine: Engine, mode: str):
    pictures = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    plain = Engine(engine.loaded.path, device="cpu")
    own, read = engine.motion_codes(pictures), plain.motion_codes(pictures)
    np.testing.assert_allclose(own, read + 1)
    for step in (0.0, 0.5):
        asked = [(one + step if mode in (part, "both") else None) for one, part in ((own, "exp"), (own, "pose"))]
        as_read = [None if one is None else one - 1 for one in asked]
        found, wanted = engine.edit(pictures, *asked), plain.edit(pictures, *as_read)
        assert np.abs(found.astype(int) - wanted).max() <= 1


def test_weights_whose_codes_have_no_known_meaning_are_read_by_the_encoder(tmp_path: Path):
    config = DPEConfig.compact(SIZE)
    weights.save(tmp_path / "random.safetensors", DPE(config).state_dict(), config)
    assert Engine(tmp_path / "random.safetensors", device="cpu").description["codes"] == "encoder"
    assert Engine(device="cpu").description["codes"] == "landmarks"
    assert Engine(device="cpu", measure=False).description["codes"] == "encoder"


@pytest.mark.parametrize("text", ["", "{}", '{"template": [[0, 0, 0]], "mean": {}, "basis": {}}', None])
def test_a_motion_space_that_is_none_is_one_clear_line(tmp_path: Path, text: str | None):
    path = tmp_path / "motion-space.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"motion-space.json is no motion space.*; take"):
        MotionSpace.load(path)
