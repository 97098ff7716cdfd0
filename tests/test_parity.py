"""Equality with the official networks, on stand-in weights: their outputs were stored, they themselves are not here.

The tolerances are those of the vectors' README: what a change in the order of arithmetic may do, and an order of
magnitude less than what the smallest mistake does. Levels inside the networks are compared on their own scale.
"""

import functools
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpe_cli.models import DPE, Discriminator, Generator, InferenceDPE
from dpe_cli.models.checkpoint import discriminator_state, key_table, to_official, translate
from dpe_cli.models.decoder import ToFlow, ToRGB
from dpe_cli.models.layers import Blur, EqualLinear, ModulatedConv2d, ResBlock, activate, upsample

IMAGE_MAX, IMAGE_MEAN, IMAGE_999 = 5e-4, 5e-6, 5e-5
LEVEL_MAX = 2e-4  # of the level's standard deviation
PICTURE_LEVEL_MAX = 5e-4  # of the same, for flows and pictures, which add up over the levels


@functools.cache
def load_reference(folder: Path) -> SimpleNamespace:
    """The stand-in weights in our networks, and what they make of the stored pictures."""
    spec = importlib.util.spec_from_file_location("make_weights", folder / "make_weights.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    official = {key: torch.from_numpy(value) for key, value in maker.generator_state().items()}
    shapes = {key: tuple(value.shape) for key, value in official.items()}
    config, state = translate({"gen": official})
    model = DPE(config)
    model.load_state_dict(state, strict=True)
    model.eval()
    discriminator = Discriminator(config.size, config.channels)
    weights = {key: torch.from_numpy(value) for key, value in maker.discriminator_state().items()}
    discriminator.load_state_dict(discriminator_state({"dis": weights}), strict=True)
    discriminator.eval()
    source, driving = map(torch.from_numpy, maker.inputs())
    return SimpleNamespace(shapes=shapes, model=model, discriminator=discriminator, source=source, driving=driving)


def keep_levels(generator: Generator, kept: dict) -> list:
    """Hooks that put what each sub-module with stored vectors returns into `kept`, by its name."""

    def hook(name: str):
        def keep(_part, _inputs, out) -> None:
            kept[name] = out

        return keep

    wanted = re.compile(r"conv1|(convs|to_flows|to_rgbs)\.\d+")
    return [
        part.register_forward_hook(hook(name)) for name, part in generator.named_modules() if wanted.fullmatch(name)
    ]


@functools.cache
@torch.no_grad()  # not inference mode: what it makes is used in a training step below
def run(folder: Path) -> SimpleNamespace:
    """Every transfer once, with all that the stored vectors look at."""
    reference = load_reference(folder)
    model = reference.model
    source, driving = model.encode(reference.source), model.encode(reference.driving)
    code = model.motion_code(driving.latent)
    levels = {"exp": {}, "pose": {}}
    hooks = keep_levels(model.expression_generator, levels["exp"]) + keep_levels(model.pose_generator, levels["pose"])
    expression = model.transfer_expression(source, code)
    pose = model.transfer_pose(source, code)
    for hook in hooks:
        hook.remove()
    between = model.encode(expression)
    both = model.transfer_pose(between, code)
    return SimpleNamespace(
        model=model, source=source, driving=driving, between=between, code=code, levels=levels,
        images={"exp": expression, "pose": pose, "both": both},
    )  # fmt: skip


@pytest.fixture
def reference(shared) -> SimpleNamespace:
    return load_reference(shared("reference/parity"))


@pytest.fixture
def result(shared) -> SimpleNamespace:
    return run(shared("reference/parity"))


def stored(shared, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(shared(f"reference/parity/{name}.npz")))


def samples(x: Tensor) -> np.ndarray:
    """The 64 values that the vectors keep of the first picture's feature map."""
    flat = x[0].flatten().numpy()
    return flat[np.linspace(0, flat.size - 1, 64).astype(int)]


def statistics(x: Tensor) -> np.ndarray:
    x = x.double()
    return np.array([x.mean(), x.std(unbiased=False), x.abs().mean()])


def same_level(name: str, x: Tensor, vectors: dict[str, np.ndarray]) -> None:
    """Samples and statistics of a feature map agree, on the scale of its own spread."""
    wanted = vectors[f"{name}_stats"]
    assert np.abs(statistics(x) - wanted).max() < LEVEL_MAX * wanted[1], name
    assert np.abs(samples(x) - vectors[f"{name}_samples"]).max() < LEVEL_MAX * wanted[1], name


def same_picture(name: str, x: Tensor, wanted: np.ndarray) -> None:
    """The first of a batch of flows or pictures, of which the vectors keep at most 64 x 64 pixels."""
    step = max(1, x.shape[-1] // 64)
    assert np.abs(x[0, :, ::step, ::step].numpy() - wanted).max() < PICTURE_LEVEL_MAX * wanted.std(), name


@pytest.mark.parametrize("stage", ["exp", "pose", "both"])
def test_the_edited_pictures_are_the_official_ones(result, shared, stage: str):
    error = np.abs(result.images[stage].numpy() - stored(shared, "outputs")[stage])
    assert error.max() <= IMAGE_MAX
    assert error.mean() <= IMAGE_MEAN
    assert np.quantile(error, 0.999) <= IMAGE_999


@torch.inference_mode()
def test_channels_last_gives_the_official_picture(result, reference, shared):
    wanted = stored(shared, "outputs")["exp"][:1]
    image = reference.source[:1].contiguous(memory_format=torch.channels_last)
    error = np.abs(result.model.transfer_expression(result.model.encode(image), result.code[:1]).numpy() - wanted)
    assert error.max() <= IMAGE_MAX
    assert error.mean() <= IMAGE_MEAN


@torch.inference_mode()
def test_the_form_for_use_gives_the_official_pictures(reference, shared):
    model = InferenceDPE(reference.model, winograd=True)
    source, driving = (
        model.encode(picture[:1].contiguous(memory_format=torch.channels_last))
        for picture in (reference.source, reference.driving)
    )
    code = model.motion_code(driving.latent)
    stage = (source.latent + model.expression_shift(code)).numpy()
    np.testing.assert_allclose(stage, stored(shared, "latents")["latent_stage_exp"][:1], rtol=1e-4, atol=1e-5)
    images = {"exp": model.transfer_expression(source, code), "pose": model.transfer_pose(source, code)}
    images["both"] = model.transfer_pose(model.encode(images["exp"]), code)
    for name, wanted in stored(shared, "outputs").items():
        error = np.abs(images[name].numpy() - wanted[:1])
        assert error.max() <= IMAGE_MAX, name
        assert error.mean() <= IMAGE_MEAN, name
        assert np.quantile(error, 0.999) <= IMAGE_999, name


@torch.inference_mode()
def test_transfer_both_takes_the_same_path(result, shared):
    one = result.source._replace(latent=result.source.latent[:1], features=[f[:1] for f in result.source.features])
    image = result.model.transfer_both(one, result.code[:1], result.code[:1]).numpy()
    assert np.abs(image - stored(shared, "outputs")["both"][:1]).max() <= IMAGE_MAX


@torch.inference_mode()
def test_latents_codes_and_shifts_are_the_official_ones(result, shared):
    model, source, code = result.model, result.source, result.code
    own = model.motion_code(source.latent)
    ours = {
        "wa": source.latent,
        "wa_t": result.driving.latent,
        "alpha_D": code,
        "alpha_S": own,
        "Q": model.motion_basis.basis(),
        "directions_D": model.motion_basis(code),
        "directions_S": model.motion_basis(own),
        "mlp_pose_D": model.expression_shift(code),
        "mlp_pose_S": model.expression_shift(own),
        "mlp_exp_D": model.pose_shift(code),
        "mlp_exp_S": model.pose_shift(own),
        "latent_stage_exp": source.latent + model.expression_shift(code),
        "latent_stage_pose": source.latent + model.pose_shift(code),
        "both_wa1": result.between.latent,
        "both_latent2": result.between.latent + model.pose_shift(code),
    }
    wanted = stored(shared, "latents")
    assert ours.keys() == wanted.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_level_of_the_encoder_is_the_official_one(result, shared):
    vectors = stored(shared, "encoder")
    for name, encoded in (("source", result.source), ("driving", result.driving), ("both_second_pass", result.between)):
        assert [f.shape[-1] for f in encoded.features] == [8, 16, 32, 64, 128, 256]
        for feature in encoded.features:
            same_level(f"{name}_{feature.shape[-1]}", feature, vectors)
    np.testing.assert_allclose(result.source.features[0][0], vectors["source_8_full_sample0"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["exp", "pose"])
def test_every_level_of_the_generators_is_the_official_one(result, shared, stage: str):
    vectors, levels = stored(shared, f"decoder_stage_{stage}"), result.levels[stage]
    assert len(levels) == 1 + 12 + 6 + 6
    for name, out in levels.items():
        if name.startswith("to_flows"):
            warped, blend, raw = out
            same_level(f"{name}_warp", warped, vectors)
            same_level(f"{name}_blend", blend, vectors)
            same_picture(name, raw, vectors[f"{name}_raw_sample0"])
        elif name.startswith("to_rgbs"):
            same_picture(name, out, vectors[f"{name}_sample0"])
        else:
            same_level(name, out, vectors)


@torch.inference_mode()
def test_the_discriminator_is_the_official_one(reference, shared):
    discriminator = reference.discriminator
    wanted = stored(shared, "discriminator")
    inputs = {
        "source": reference.source,
        "driving": reference.driving,
        "out_both": torch.from_numpy(stored(shared, "outputs")["both"]),
        "source_batch1": reference.source[:1],
        "source_driving_batch4": torch.cat([reference.source, reference.driving]),
    }
    for name, images in inputs.items():
        np.testing.assert_allclose(discriminator(images).numpy(), wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_gradients_of_a_training_step_are_the_official_ones(reference, shared):
    """The released step without its VGG terms: both orders of the two edits, the middle pair, both self pairs, the GAN.

    A slip in a backward pass that no picture shows, an operand overwritten in place say, would show here.
    """
    wanted = json.loads(shared("reference/parity/train_step.json").read_text())["no_vgg"]
    model, a, b = reference.model, reference.source, reference.driving
    expressed = functools.partial(checkpoint, model.transfer_expression, use_reentrant=False)  # half the memory
    posed = functools.partial(checkpoint, model.transfer_pose, use_reentrant=False)
    of_a, of_b = model.encode(a), model.encode(b)
    code_a, code_b = model.motion_code(of_a.latent), model.motion_code(of_b.latent)
    first_a, first_b = expressed(of_a, code_b), posed(of_b, code_a)
    last_a, last_b = posed(model.encode(first_a), code_b), expressed(model.encode(first_b), code_a)
    selves = expressed(of_a, code_a), posed(of_a, code_a)
    l1 = 2 * F.l1_loss(last_a, b) + 2 * F.l1_loss(last_b, a) + F.l1_loss(first_a, first_b)
    rec = sum(F.l1_loss(image, a) for image in selves)
    gan = sum(F.softplus(-reference.discriminator(image)).mean() for image in (last_a, last_b))
    for name, loss in (("l1_loss", l1), ("rec_loss", rec), ("gan_g_loss", gan)):
        assert loss.item() == pytest.approx(wanted[name], rel=1e-4), name
    names = key_table(len(model.config.resolutions))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(l1 + rec + gan, [parameters[names[key]] for key in wanted["grad_norms"]])
    for key, gradient in zip(wanted["grad_norms"], gradients, strict=True):
        assert gradient.norm().item() == pytest.approx(wanted["grad_norms"][key], rel=1e-3), key


def test_the_release_s_names_and_shapes_can_be_written_too(reference):
    official = to_official(reference.model.state_dict())
    assert {key: tuple(value.shape) for key, value in official.items()} == reference.shapes


# Single layers, with the small vectors of ops.npz.


@pytest.fixture
def ops(shared) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in stored(shared, "ops").items()}


def filled(layer: torch.nn.Module, **parameters: Tensor) -> torch.nn.Module:
    """The layer with these parameters; "__" stands for the dot in a name."""
    shapes = layer.state_dict()
    state = {name.replace("__", "."): value for name, value in parameters.items()}
    layer.load_state_dict({name: value.reshape(shapes[name].shape) for name, value in state.items()}, strict=True)
    return layer.eval().requires_grad_(False)


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_blurs_and_doubling(ops):
    close(Blur(4, padding=2)(ops["x"]), ops["blur_pad22"])
    close(Blur(4, padding=1)(ops["x"]), ops["blur_pad11"])
    close(Blur(4, padding=1, total=4.0)(ops["x"]), ops["blur_pad11_x4"])
    close(Blur(4, padding=1, stride=2)(ops["x"]), ops["blur_pad11"][..., ::2, ::2])
    close(upsample(ops["x"]), ops["upsample2"])


@pytest.mark.parametrize(
    ("name", "kernel", "up", "demodulate"),
    [("mod_plain3", 3, False, True), ("mod_up3", 3, True, True), ("mod_flow1", 1, False, False)],
)
def test_modulated_convolutions(ops, name: str, kernel: int, up: bool, demodulate: bool):
    layer = filled(
        ModulatedConv2d(4, 6, kernel, 10, up, demodulate),
        weight=ops[f"{name}_weight"], modulation__weight=ops[f"{name}_modw"], modulation__bias=ops[f"{name}_modb"],
    )  # fmt: skip
    close(layer(ops["x"], ops["style"]), ops[f"{name}_out"])


def test_flow_level_with_and_without_one_below(ops):
    layer = filled(
        ToFlow(4, 10, 8), bias=ops["toflow_b"], conv__weight=ops["toflow_w"],
        conv__modulation__weight=ops["toflow_modw"], conv__modulation__bias=ops["toflow_modb"],
    )  # fmt: skip
    for below, name in ((ops["toflow_skip"], "toflow"), (None, "toflow_noskip")):
        warped, blend, raw = layer(ops["x"], ops["style"], ops["toflow_feat"], below)
        close(warped, ops[f"{name}_warp"])
        close(blend, ops[f"{name}_blend"])
        close(raw, ops[f"{name}_raw"])


def test_picture_level_with_and_without_one_below(ops):
    layer = filled(ToRGB(4), weight=ops["torgb_w"], activation_bias=ops["torgb_actbias"], bias=ops["torgb_bias"])
    close(layer(ops["x"]), ops["torgb_noskip"])
    close(layer(ops["x"], ops["torgb_skip_in"]), ops["torgb_skip"])


def test_residual_block(ops):
    layer = filled(
        ResBlock(4, 6),
        conv1__weight=ops["resblock_conv1.0.weight"], conv1__bias=ops["resblock_conv1.1.bias"],
        conv2__weight=ops["resblock_conv2.1.weight"], conv2__bias=ops["resblock_conv2.2.bias"],
        skip__weight=ops["resblock_skip.1.weight"],
    )  # fmt: skip
    close(layer(ops["x"]), ops["resblock_out"])


def test_activated_linear_layer(ops):
    layer = filled(EqualLinear(10, 5), weight=ops["eqlin_w"], bias=ops["eqlin_b"])
    close(activate(layer(ops["style"])) * 2**0.5, ops["eqlin_act_out"])
