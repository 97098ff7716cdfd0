"""The networks as they are used against those that were trained: the same pictures but for the rounding."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.models import DPE, DPEConfig, InferenceDPE, inference
from dpe_cli.models.inference import (
    Convolution,
    PixelConvolution,
    UpConvolution,
    WinogradConvolution,
    sample_grid,
    sample_rows,
)
from dpe_cli.models.layers import Blur
from dpe_cli.weights import load

IMAGE_MAX, IMAGE_MEAN = 5e-4, 5e-6


@pytest.fixture(scope="module")
def networks() -> DPE:
    """Compact networks for 64 x 64 with random weights, biases and all: nothing that is zero or one hides a slip."""
    torch.manual_seed(0)
    model = DPE(DPEConfig.compact(64)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pictures(count: int, size: int = 64, seed: int = 1) -> Tensor:
    """Smooth pictures in [-1, 1], channels last."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size, mode="bilinear").contiguous(memory_format=torch.channels_last)


def three_edits(model: DPE | InferenceDPE, source: Tensor, driving: Tensor) -> dict[str, Tensor]:
    encoded, code = model.encode(source), model.motion_code(model.encode(driving).latent)
    return {
        "code": code,
        "exp": model.transfer_expression(encoded, code),
        "pose": model.transfer_pose(encoded, code),
        "both": model.transfer_pose(model.encode(model.transfer_expression(encoded, code)), code.flip(0)),
    }


def assert_same_pictures(ours: Tensor, wanted: Tensor, name: str) -> None:
    error = (ours - wanted).abs()
    assert error.max() <= IMAGE_MAX, name
    assert error.mean() <= IMAGE_MEAN, name


@pytest.mark.parametrize("winograd", [False, True], ids=["direct", "winograd"])
@torch.inference_mode()
def test_the_form_for_use_draws_what_the_trained_form_draws(networks: DPE, winograd: bool):
    model = InferenceDPE(networks, winograd)
    assert any(isinstance(part, WinogradConvolution) for part in model.modules()) == winograd
    source, driving = pictures(2), pictures(2, seed=2)
    found, wanted = three_edits(model, source, driving), three_edits(networks, source, driving)
    assert wanted["exp"].std() > 0.1  # something is drawn
    torch.testing.assert_close(found.pop("code"), wanted.pop("code"), rtol=1e-4, atol=1e-5)
    for name, picture in wanted.items():
        assert_same_pictures(found[name], picture, name)


@torch.inference_mode()
def test_pictures_that_go_one_by_one_are_those_of_the_batch(networks: DPE, monkeypatch: pytest.MonkeyPatch):
    source, driving = pictures(3), pictures(3, seed=2)
    wanted = three_edits(InferenceDPE(networks, winograd=True), source, driving)
    monkeypatch.setattr(inference, "ALONE", 32**2 * networks.config.channels[32])
    apart = InferenceDPE(networks, winograd=True)
    assert (apart.encoder.alone, apart.pose_generator.together) == (2, 2)  # 64 and 32 alone, 8 and 16 together
    for name, found in three_edits(apart, source, driving).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4)
    assert InferenceDPE(networks).encoder.alone == 0


@torch.inference_mode()
def test_encoded_pictures_are_the_same(networks: DPE):
    ours, wanted = InferenceDPE(networks, winograd=True).encode(pictures(2)), networks.encode(pictures(2))
    torch.testing.assert_close(ours.latent, wanted.latent, rtol=1e-4, atol=1e-5)
    for found, feature in zip(ours.features, wanted.features, strict=True):
        assert found.shape == feature.shape
        assert (found - feature).abs().max() < 1e-4 * feature.std()


@torch.inference_mode()
def test_the_trained_networks_stay_as_they_are(networks: DPE):
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    model = InferenceDPE(networks)
    for value in model.buffers():
        if value.is_floating_point():
            value.zero_()
    assert all(torch.equal(before[name], value) for name, value in networks.state_dict().items())


@torch.inference_mode()
def test_the_default_weights_draw_the_same():
    loaded = load(None)
    trained = DPE(loaded.config).eval()
    trained.load_state_dict(loaded.state)
    model = InferenceDPE(trained, winograd=True)
    source, driving = pictures(1, 256), pictures(1, 256, seed=2)
    encoded, code = trained.encode(source), trained.motion_code(trained.encode(driving).latent)
    found = model.transfer_expression(model.encode(source), model.motion_code(model.encode(driving).latent))
    assert_same_pictures(found, trained.transfer_expression(encoded, code), "exp")


# Its parts


@pytest.mark.parametrize("tile", [4, 6])
@pytest.mark.parametrize("size", [(16, 16), (18, 13), (4, 40), (64, 36), (50, 3)], ids=str)
@pytest.mark.parametrize("styled", [False, True], ids=["plain", "styled"])
@torch.inference_mode()
def test_minimal_filtering_is_a_convolution(tile: int, size: tuple[int, int], styled: bool, monkeypatch):
    monkeypatch.setattr(inference, "BAND", 20)  # several bands, the last one shorter
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(7, 5, 3, 3), torch.randn(7)
    more = (torch.randn(2, 5), torch.rand(2, 7) + 0.5) if styled else ()
    wanted = Convolution(weight, bias, padding=1)(x, *more)
    found = WinogradConvolution(weight, bias, tile)(x, *more)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Large tiles round more, and by how much is the processor's: up to 1.3e-4 has been seen.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 if tile == 4 else 4e-4)


@torch.inference_mode()
def test_bands_of_pixels_are_a_convolution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inference, "ROWS", 50)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 9, 11), torch.randn(7, 3, 1, 1), torch.randn(7)
    found = PixelConvolution(weight, bias)(x)
    torch.testing.assert_close(found, Convolution(weight, bias)(x), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_a_picture_grows_alone_as_in_a_batch():
    torch.manual_seed(0)
    grow = UpConvolution(torch.randn(7, 5, 3, 3), torch.randn(7), Blur(7, padding=1, total=4.0))
    x, style, demodulation = torch.randn(2, 5, 6, 8), torch.randn(2, 5), torch.rand(2, 7) + 0.5
    together = grow(x, style, demodulation)
    for number in range(2):
        one = slice(number, number + 1)
        alone = grow(x[one], style[one], demodulation[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_samples_of_rows_are_those_of_a_grid():
    torch.manual_seed(0)
    features = torch.randn(3, 6, 9, 12).contiguous(memory_format=torch.channels_last)
    where = torch.rand(3, 8, 10, 2) * 3 - 1.5  # a part lies outside
    where[0, 0, 0] = torch.tensor([-1.0, 1.0])
    weight = torch.rand(3, 1, 8, 10)
    wanted = sample_grid(features, where, weight)
    assert (wanted == 0).any()
    torch.testing.assert_close(sample_rows(features, where, weight), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_stays_behind_when_the_networks_move_to_a_device(networks: DPE, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inference, "in_float32", lambda x: nullcontext())  # autocast does not know this device
    model = InferenceDPE(networks).to("meta")  # it computes nothing, but refuses tensors of the CPU among its own
    edits = three_edits(model, torch.empty(2, 3, 64, 64, device="meta"), torch.empty(2, 3, 64, 64, device="meta"))
    assert edits["both"].shape == (2, 3, 64, 64)
    assert all(edit.device.type == "meta" for edit in edits.values())
    with pytest.raises(RuntimeError, match="device"):
        model.encode(torch.empty(2, 3, 64, 64))
