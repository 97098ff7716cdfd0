"""The networks without any weights: shapes, invariances, configurations and the names in checkpoints."""

from dataclasses import replace

import pytest
import torch

from dpe_cli.models import DPE, Discriminator, DPEConfig
from dpe_cli.models.checkpoint import (
    Unfilled,
    config_from_state,
    detect_layout,
    discriminator_state,
    lia_backbone,
    to_official,
    translate,
    unwrap,
)
from dpe_cli.models.decoder import ToFlow
from dpe_cli.models.layers import blur_kernel

TINY = DPEConfig(16, {4: 6, 8: 5, 16: 4}, latent_dim=12, motion_dim=3)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def pictures(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


@pytest.fixture
def tiny() -> DPE:
    return DPE(TINY).eval()


@pytest.fixture
def official(tiny: DPE) -> dict[str, torch.Tensor]:
    """The tiny networks in the names, shapes and wrapping-free form of the released checkpoint."""
    return to_official(tiny.state_dict())


@torch.inference_mode()
def test_the_compact_networks_have_the_promised_shapes_at_64():
    model = DPE(DPEConfig.compact(64)).eval()
    source = model.encode(pictures(2, 64))
    code = model.motion_code(source.latent)
    rendered = model.render_expression(source.latent + model.expression_shift(code), source.features)
    assert source.latent.shape == (2, 256)
    assert code.shape == (2, 20)
    assert model.pose_shift(code).shape == (2, 256)
    channels = model.config.channels
    assert [tuple(f.shape) for f in source.features] == [(2, channels[r], r, r) for r in (8, 16, 32, 64)]
    assert [tuple(f.shape) for f in rendered.flows] == [(2, 3, r, r) for r in (8, 16, 32, 64)]
    assert rendered.image.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_every_size_has_features_up_to_its_own(size: int):
    config = DPEConfig(size, {2**power: 4 for power in range(2, 10)}, latent_dim=8, motion_dim=2)
    with torch.inference_mode():
        model = DPE(config).eval()
        source = model.encode(pictures(1, size))
        assert model.transfer_pose(source, model.motion_code(source.latent)).shape == (1, 3, size, size)
        assert Discriminator(size, config.channels)(pictures(2, size)).shape == (2, 1)
    assert [f.shape[-1] for f in source.features] == config.resolutions


@torch.inference_mode()
def test_both_is_expression_then_pose_of_the_unclamped_picture(tiny: DPE):
    source = tiny.encode(pictures(2, 16) * 3)
    first, second = torch.randn(2, 2, 3)
    between = tiny.transfer_expression(source, first)
    assert between.abs().max() > 1  # or the test could not tell
    expected = tiny.transfer_pose(tiny.encode(between), second)
    assert torch.equal(tiny.transfer_both(source, first, second), expected)


@torch.inference_mode()
def test_expression_and_pose_have_networks_of_their_own(tiny: DPE):
    source, code = tiny.encode(pictures(1, 16)), torch.randn(1, 3)
    expression, pose = tiny.transfer_expression(source, code), tiny.transfer_pose(source, code)
    for part in (*tiny.pose_head.parameters(), *tiny.pose_generator.parameters()):
        part.zero_()
    assert torch.equal(tiny.transfer_expression(source, code), expression)
    assert not torch.equal(tiny.transfer_pose(source, code), pose)


@torch.inference_mode()
def test_a_picture_comes_out_the_same_alone_and_in_a_batch(tiny: DPE):
    images, codes = pictures(3, 16), torch.randn(3, 3)
    together = tiny.transfer_both(tiny.encode(images), codes, codes.flip(0))
    for i in range(3):
        alone = tiny.transfer_both(tiny.encode(images[i : i + 1]), codes[i : i + 1], codes.flip(0)[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_channels_last_changes_rounding_only(tiny: DPE):
    images, codes = pictures(2, 16), torch.randn(2, 3)
    expected = tiny.transfer_both(tiny.encode(images), codes, codes)
    last = tiny.to(memory_format=torch.channels_last)
    result = last.transfer_both(last.encode(images.contiguous(memory_format=torch.channels_last)), codes, codes)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_trains_every_parameter_and_renders_in_float32(tiny: DPE):
    with torch.autocast("cpu", torch.bfloat16):
        source = tiny.encode(pictures(2, 16))
        code = tiny.motion_code(source.latent)
        image = tiny.transfer_both(source, code, code)
        flows = tiny.render_pose(source.latent, source.features).flows
    image.square().mean().backward()
    assert {image.dtype, source.latent.dtype, code.dtype, *(flow.dtype for flow in flows)} == {torch.float32}
    assert [name for name, part in tiny.named_parameters() if part.grad is None or not part.grad.isfinite().all()] == []


def test_the_motion_basis_is_orthonormal(tiny: DPE):
    basis = tiny.motion_basis.basis()
    torch.testing.assert_close(basis.T @ basis, torch.eye(3))


def test_the_discriminator_refuses_batches_that_do_not_split_into_fours():
    with pytest.raises(ValueError, match="a batch of 6"):
        Discriminator(16, TINY.channels)(pictures(6, 16))


def test_presets_have_the_sizes_they_are_known_for():
    with torch.device("meta"):
        full, compact = (sum(p.numel() for p in DPE(c).parameters()) for c in (DPEConfig.full(), DPEConfig.compact()))
    assert full == 69_101_798 - 3110  # the released ones less what is never used
    assert compact * 2 < 48 * 2**20  # bytes in half precision


@pytest.mark.parametrize("config", [DPEConfig.full(), DPEConfig.compact(), DPEConfig.compact(64), TINY])
def test_a_configuration_survives_json(config: DPEConfig):
    assert DPEConfig.from_json(config.to_json()) == config
    assert DPEConfig(**config.to_dict()) == config


@pytest.mark.parametrize("text", ["", "[]", "3", '{"sides": 4}', '{"size": 100}', '{"channels": {"4": 1}}'])
def test_other_json_is_no_configuration(text: str):
    with pytest.raises(ValueError):
        DPEConfig.from_json(text)


@pytest.mark.parametrize(("edge", "shown"), [(True, 7.0), (False, 0.0)])
@torch.no_grad()
def test_flows_that_leave_a_picture_show_its_edge_or_nothing(edge: bool, shown: float):
    layer = ToFlow(4, 10, 8, edge)
    layer.conv.weight.zero_()
    layer.bias.copy_(torch.tensor([5.0, 0.0, 50.0]))  # half a picture to the right, the mask open
    feature = torch.arange(8.0).expand(1, 4, 8, 8)
    warped = layer(torch.zeros(1, 4, 8, 8), torch.zeros(1, 10), feature)[0]
    torch.testing.assert_close(warped[0, 0, 3, 5:], torch.full((3,), shown))
    assert 2.5 < warped[0, 0, 3, 0] < 4.5


@pytest.mark.parametrize("config", [DPEConfig.full(), DPEConfig.compact(128), TINY])
def test_the_configuration_can_be_told_from_a_state(config: DPEConfig):
    with torch.device("meta"):
        assert config_from_state(DPE(config).state_dict()) == replace(config, border="zeros")  # no weight depends on it


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"gen": state, "dis": {}, "args": object()},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"gen": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["flat", "training checkpoint", "state_dict", "module.", "both"],
)
def test_released_names_come_back_as_ours_in_any_wrapping(tiny: DPE, official: dict, wrap):
    config, state = translate(wrap(official))
    assert config == TINY
    DPE(config).load_state_dict(state, strict=True)
    assert all(torch.equal(state[key], value) for key, value in tiny.state_dict().items())


def test_our_own_checkpoints_pass_unchanged(tiny: DPE):
    config, state = translate(tiny.state_dict())
    assert config == TINY
    assert state.keys() == tiny.state_dict().keys()


def test_the_swapped_names_of_the_release_are_undone(tiny: DPE, official: dict):
    assert torch.equal(official["mlp_pose.0.weight"], tiny.expression_head[0].weight)
    assert torch.equal(official["dec_pose.convs.1.conv.weight"][0], tiny.expression_generator.convs[1].conv.weight)
    assert torch.equal(official["mlp_exp.0.weight"], tiny.pose_head[0].weight)
    assert torch.equal(official["dec_exp.convs.1.conv.weight"][0], tiny.pose_generator.convs[1].conv.weight)


def test_released_tensors_that_nothing_reads_may_be_absent(official: dict):
    unused = ("to_rgb1", "noise.weight", ".kernel")
    translate({key: value for key, value in official.items() if not any(name in key for name in unused)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("mlp.2.bias"), r"truncated: 1 tensors are missing \(mlp.2.bias\)"),
        (lambda s: s.pop("dir.weight"), "truncated"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("enc.")], "no encoder"),
        (lambda s: s.update({"dec_pose.extra": torch.zeros(1)}), r"does not know \(dec_pose.extra\)"),
        (lambda s: s.update({"mlp.0.weight": torch.zeros(3, 3)}), "wrong shape"),
        (lambda s: s.update({"enc.net_app.convs.3.weight": torch.zeros(2)}), "sizes cannot be told"),
        (lambda s: s.update({"enc.net_app.convs.1.skip.0.kernel": torch.ones(4, 4) / 16}), "another blur"),
        (lambda s: (s.clear(), s.update({"features.0.weight": torch.zeros(1)})), "another network's"),
        (lambda s: s.clear(), "is empty"),
        (lambda s: s.update({"epoch": 3}), "epoch is not a tensor"),
    ],
)
def test_a_wrong_checkpoint_is_told_in_one_line(official: dict, change, words: str):
    change(official)
    with pytest.raises(ValueError, match=words) as raised:
        translate(official)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_a_checkpoint_that_is_no_dictionary_is_refused():
    with pytest.raises(ValueError, match="holds a list"):
        translate([1, 2])


def test_lia_gives_encoder_and_motion_only(tiny: DPE, official: dict):
    renames = {"mlp.": "enc.fc.", "dir.": "dec.direction.", "dec_pose.": "dec.", "enc.": "enc."}
    lia = {
        new + key.removeprefix(old): value
        for key, value in official.items()
        for old, new in renames.items()
        if key.startswith(old)
    }
    assert detect_layout(lia) == "lia"
    with pytest.raises(ValueError, match="LIA's checkpoint"):
        translate({"gen": lia})
    state = lia_backbone({"gen": lia})
    assert {key.split(".")[0] for key in state} == {"encoder", "motion_mlp", "motion_basis"}
    missing, unexpected = DPE(TINY).load_state_dict(state, strict=False)
    assert unexpected == []
    assert {key.split(".")[0] for key in missing} == {
        "expression_head", "pose_head", "expression_generator", "pose_generator",
    }  # fmt: skip
    assert torch.equal(state["motion_mlp.4.weight"], tiny.motion_mlp[4].weight)


def test_unwrapping_finds_the_discriminator_of_a_training_checkpoint():
    kernel = {f"convs.1.{part}.0.kernel": blur_kernel() for part in ("conv2", "skip")}
    assert unwrap({"gen": {}, "dis": kernel}, "dis").keys() == kernel.keys()
    with pytest.raises(ValueError, match="truncated"):
        discriminator_state({"dis": kernel})


def test_networks_whose_weights_are_loaded_draw_none():
    before, filled = torch.get_rng_state(), DPE(TINY).state_dict()
    after = torch.get_rng_state()
    with Unfilled():
        bare = DPE(TINY)
    assert not torch.equal(before, after) and torch.equal(torch.get_rng_state(), after)
    bare.load_state_dict(filled)
    image = pictures(1, 16)
    wanted = DPE(TINY)
    wanted.load_state_dict(filled)
    torch.testing.assert_close(bare.encode(image).latent, wanted.encode(image).latent, rtol=0, atol=0)
