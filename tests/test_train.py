"""The training steps on a tiny network and synthetic samples."""

import copy
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from simulated_gpu import simulated_gpu

from dpe_cli.dataset import is_held_out, load_clips
from dpe_cli.errors import DeviceError, DPEError, InputError, OutputError, UsageError, WeightsError
from dpe_cli.initialise import (
    INSIDE,
    TEETH,
    amplify,
    dim_teeth,
    grow,
    initialise,
    separate,
    show_inside,
    show_teeth,
    subtract_own,
    to_image,
)
from dpe_cli.main import cli
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.motion_space import POSE_DIM, normalise
from dpe_cli.processes import join_processes
from dpe_cli.recipe import Phase, read_recipe
from dpe_cli.samples import batches, held_out_batches
from dpe_cli.train import LOG_STEPS, SHOWN, Clips, Inputs, _PhaseRun, begin_phase, evaluate, matrix_rate, train
from dpe_cli.trainer import LANDMARKS, Trainer, beyond, flow_loss, weighted_l1, windows
from dpe_cli.weights import folder, load

TINY = {4: 8, 8: 8, 16: 8, 32: 8, 64: 8}


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    plain = random.integers(0, 255, (4, 3, 1, 1), np.uint8).repeat(32, 2).repeat(32, 3)
    pictures = {"source": plain, "target": plain, "driving": plain}
    codes = {k: random.normal(0, 1, (4, 20)).astype(np.float32) for k in ("source_code", "driving_code")}
    codes |= {k: np.zeros((4, LANDMARKS), np.float32) for k in ("source_points", "driving_points")}
    line = (np.arange(64) + 0.5) / 32 - 1
    where = np.broadcast_to(np.stack(np.meshgrid(line, line)), (4, 2, 64, 64)).astype(np.float32)
    rest = {
        "exp_flow": where, "pose_flow": where,
        "exp_valid": np.ones((4, 64, 64), np.float32), "pose_valid": np.ones((4, 64, 64), np.float32),
        "weight": np.ones((4, 32, 32), np.float32), "pose_weight": np.ones((4, 32, 32), np.float32),
    }  # fmt: skip
    return {k: torch.from_numpy(np.array(v)) for k, v in (pictures | codes | rest).items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DPE(DPEConfig(32, TINY, latent_dim=32))
    initialise(model)
    return model


def test_guided_steps_learn_a_batch_by_heart(model, batch):
    trainer = Trainer(model, Phase(lr=4e-3))
    first = trainer.step(batch, 0)
    for _ in range(40):
        last = trainer.step(batch, 0)
    assert last["exp"] < 0.7 * first["exp"]
    assert last["exp_flow"] < first["exp_flow"]


def test_a_cycle_step_updates_networks_and_discriminator(model, batch):
    trainer = Trainer(model, Phase(stage="cycle", gan_weight=0.1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    terms = trainer.step(batch, 0)
    assert {"end", "middle", "self", "gan", "d"} <= set(terms)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.startswith("pose_generator") for k in changed)
    assert any(k.startswith("encoder") for k in changed)


def test_the_discriminator_learns_in_its_own_turn(model, batch):
    trainer = Trainer(model, Phase(stage="cycle", gan_weight=0.1))
    trainer.cycle(batch)[0].total.backward()
    assert all(p.grad is None for p in trainer.discriminator.parameters())
    assert any(p.grad is not None for p in model.pose_generator.parameters())
    before = [p.detach().clone() for p in trainer.discriminator.parameters()]
    for _ in range(2):
        trainer.step(batch, 0)
    assert not any(torch.equal(p, old) for p, old in zip(trainer.discriminator.parameters(), before, strict=True))


def test_the_middle_pair_does_not_update_the_pose_generator(model, batch):
    """Asymmetric back-propagation: a loss on (S', D') alone leaves no gradient in the pose branch."""
    trainer = Trainer(model, Phase(stage="cycle", guide=0, code_weight=0))
    picked = []

    def only_middle(name, value, weight=1.0):
        if name == "middle":
            picked.append(value)

    original = trainer.cycle.__globals__["Losses"].add
    trainer.cycle.__globals__["Losses"].add = lambda self, *args: only_middle(*args)
    try:
        trainer.cycle(batch)
    finally:
        trainer.cycle.__globals__["Losses"].add = original
    picked[0].backward()
    assert all(p.grad is None for p in model.pose_generator.parameters())
    assert all(p.grad is None for p in model.pose_head.parameters())
    assert any(p.grad is not None for p in model.expression_generator.parameters())


def test_separated_heads_ignore_each_other_s_coordinates(model):
    with torch.no_grad():
        for head in (model.expression_head, model.pose_head):
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter))
    separate(model)
    code, other = torch.randn(1, 20), torch.randn(1, 20)
    pose_changed = torch.cat([other[:, :POSE_DIM], code[:, POSE_DIM:]], 1)
    expression_changed = torch.cat([code[:, :POSE_DIM], other[:, POSE_DIM:]], 1)
    torch.testing.assert_close(model.expression_shift(code), model.expression_shift(pose_changed), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.pose_shift(code), model.pose_shift(expression_changed), atol=1e-4, rtol=1e-4)
    assert (model.expression_shift(code) - model.expression_shift(expression_changed)).abs().max() > 1e-2


def test_flow_loss_is_zero_for_the_flow_it_asks_for():
    line = (torch.arange(64) + 0.5) / 32 - 1
    where = torch.stack(torch.meshgrid(line, line, indexing="xy"))[None]
    size = 32
    centres = (torch.arange(size) + 0.5) / size * 2 - 1
    wanted = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))
    line = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"))
    raw = torch.cat([torch.atanh(wanted - grid), torch.zeros(1, size, size)])[None]
    assert flow_loss([raw], where, torch.ones(1, 64, 64)) < 1e-5
    assert flow_loss([raw + 0.1], where, torch.ones(1, 64, 64)) > 0.5


def test_weighted_l1_counts_what_weighs():
    image, target = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    image[..., :4, :4] = 1
    weight = torch.ones(1, 16, 16)
    plain = weighted_l1(image, target, weight)
    weight[..., :4, :4] = 6
    assert weighted_l1(image, target, weight) == pytest.approx(6 * float(plain), rel=1e-5)


def test_a_grown_network_keeps_every_level_it_had(model):
    grown = grow(model)
    assert grown.config.size == 64
    old, new = model.state_dict(), grown.state_dict()
    for name in ("motion_mlp.0.weight", "pose_generator.to_flows.2.conv.weight"):
        assert torch.equal(old[name], new[name])
    assert torch.equal(old["encoder.convs.1.conv1.weight"], new["encoder.convs.2.conv1.weight"])
    assert grown.encode(torch.zeros(1, 3, 64, 64)).latent.shape == (1, 32)


def test_a_fresh_network_shows_the_source(model):
    """The start of `see_through`: no flow, so a smooth picture comes out nearly as it went in."""
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 1.6 - 0.8, size=32, mode="bilinear")
    with torch.no_grad():
        shown = model.transfer_expression(model.encode(smooth), torch.zeros(1, 20))
    assert (shown - smooth)[..., 4:-4, 4:-4].abs().mean() < 0.1


def redrawn(model, picture):
    """What the expression generator makes of pictures without an edit, less their borders."""
    encoded = model.encode(picture)
    return model.render_expression(encoded.latent, encoded.features).image[..., 4:-4, 4:-4]


def test_a_mouth_has_a_colour_inside_and_the_rest_stays(model):
    picture, generator = torch.rand(2, 3, 32, 32) * 2 - 1, model.expression_generator
    with torch.no_grad():
        model.encoder.convs[0].weight[7] *= 1e-3  # hardly answers to colours: is chosen
        model.encoder.convs[0].bias[7] = -0.1
        before = redrawn(model, picture)
        show_inside(model)
        torch.testing.assert_close(redrawn(model, picture), before, atol=0.02, rtol=0)
        generator.to_flows[-1].bias[2] = -50
        inside = redrawn(model, picture)
    wanted = torch.tensor(INSIDE).view(3, 1, 1).expand_as(inside)
    torch.testing.assert_close(inside, wanted, atol=0.02, rtol=0)


def test_teeth_show_where_both_masks_are_shut_and_the_rest_stays(model):
    picture, generator = torch.rand(2, 3, 32, 32) * 2 - 1, model.expression_generator
    with torch.no_grad():
        model.encoder.convs[1].conv2.weight[5] *= 1e-3  # hardly varies: is chosen
        model.encoder.convs[1].skip.weight[5] *= 1e-3
        generator.to_flows[-2].bias[2] = 2.75  # nearly open, as in trained networks
        generator.to_flows[-1].bias[2] = 0.25
        show_inside(model)
        before = redrawn(model, picture)
        show_teeth(model, picture)
        torch.testing.assert_close(redrawn(model, picture), before, atol=0.03, rtol=0)
        generator.to_flows[-2].bias[2] = -50
        teeth = redrawn(model, picture)
    torch.testing.assert_close(teeth, torch.tensor(TEETH).view(3, 1, 1).expand_as(teeth), atol=0.15, rtol=0)
    with torch.no_grad():
        dim_teeth(model, torch.tensor([0.5, 0.25, 0.0]))
        dimmed = redrawn(model, picture) - torch.tensor(INSIDE).view(3, 1, 1)
        share = (dimmed / (teeth - torch.tensor(INSIDE).view(3, 1, 1))).mean((0, 2, 3))
        torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.0]), atol=0.03, rtol=0)
        generator.to_flows[-2].bias[2] = 2.75
        torch.testing.assert_close(redrawn(model, picture), before, atol=0.03, rtol=0)


def test_teeth_that_were_never_shown_cannot_be_dimmed(model):
    with pytest.raises(InputError, match="phase train: there are no teeth to dim; set show_teeth"):
        begin_phase(model, Phase(size=32, dim_teeth="0.5,0.4,0.4"), None, print, "cpu")


def test_the_second_mask_learns_where_teeth_are(model, batch):
    seen, bright = torch.ones(4, 64, 64), torch.zeros(4, 64, 64)
    seen[:, 24:40, 24:40], bright[:, 24:32, 24:40] = 0, 0.9
    batch = batch | {"seen": seen, "bright": bright}
    trainer = Trainer(model, Phase(stage="expression", unseen_weight=0.1, teeth_weight=2.0, lr=1e-2, flow_weight=0))
    for _ in range(60):
        trainer.step(batch, 0)
    with torch.no_grad():
        encoded = model.encode(to_image(batch["source"]))
        mask = trainer.express(encoded, batch["driving_code"]).flows[-2][:, 2].sigmoid()
    assert mask[:, 6:8, 6:10].mean() < mask[:, 0].mean() - 0.1


def test_flows_that_leave_the_picture_are_told():
    right = torch.zeros(1, 3, 8, 8)
    assert beyond([right]) == 0
    right[:, 0] = 0.3
    last, before = np.tanh(0.3), np.tanh(0.3) - 2 / 7  # the last two columns of eight look outside, by so much
    assert float(beyond([right])) == pytest.approx((last + before) / 8 / 2, rel=1e-4)


@pytest.mark.parametrize("part", ["expression", "pose"])
def test_a_head_that_subtracts_leaves_the_difference_of_the_motions(model, part):
    subtract_own(model, part)
    latent, code = torch.randn(3, 32), torch.randn(3, 20)
    shift = model.expression_shift(code) if part == "expression" else model.pose_shift(code)
    with torch.no_grad():
        change = model.motion_code(latent + shift) - model.motion_code(latent)
    wanted = -code
    wanted[:, POSE_DIM:] *= part == "expression"
    wanted[:, :POSE_DIM] *= part == "pose"
    torch.testing.assert_close(change, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("part", ["expression", "pose"])
def test_an_amplified_network_overdoes_the_difference_to_its_own_code(model, batch, part):
    gains = torch.tensor(Phase(gains="mouth=1.4,lids=2.5,turn=1.3,place=0.1").gain_values())
    encoded, code = model.encode(to_image(batch["source"])), torch.randn(len(batch["source"]), 20)
    trainer = Trainer(model, Phase())
    edit = trainer.express if part == "expression" else trainer.turn
    with torch.no_grad():
        own = model.motion_code(encoded.latent)
        wanted, plain = edit(encoded, own + gains * (code - own)), edit(encoded, code)
        amplify(model, part, gains)
        found = edit(encoded, code)
    torch.testing.assert_close(found.flows[-1], wanted.flows[-1], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.image, wanted.image, atol=2e-3, rtol=1e-3)
    assert (plain.image - wanted.image).abs().max() > 0.01


@pytest.mark.parametrize("stage", ["guided", "flows", "expression"])
def test_with_measured_codes_the_generators_see_the_true_difference(model, batch, stage):
    subtract_own(model)
    batch = batch | {"driving_code": batch["source_code"].clone()}  # whatever the encoder reads, nothing is to move
    seen = []
    for measured in (False, True):
        trainer = Trainer(model, Phase(stage=stage, measured=measured))
        with torch.no_grad():
            encoded = model.encode(to_image(batch["source"]))
            given = trainer.given(encoded.latent, batch["source_code"], batch["driving_code"])
            own = model.motion_code(encoded.latent)
        seen.append(float((given - own)[:, POSE_DIM:].abs().max()))
        terms = trainer.step(batch, 0)
        assert torch.isfinite(terms["exp_flow"])
    assert seen[1] < 1e-5 < seen[0]


class AllAlike(torch.nn.Module):
    """A matte to which a picture is a person everywhere, or nowhere."""

    def __init__(self, logit: float):
        super().__init__()
        self.logit = logit

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return torch.full((len(picture), 1, *(side // 2 for side in picture.shape[-2:])), self.logit)


def test_what_stands_still_behind_a_head_is_not_learnt(model, batch):
    batch = batch | {"driving": 255 - batch["target"]}
    phase = Phase(stage="posing", flow_weight=0, still_background=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = Trainer(copy.deepcopy(model), phase, matte=AllAlike(30.0)).step(batch, 0)
    wanted = Trainer(copy.deepcopy(model), phase).step(batch, 0)
    torch.testing.assert_close(found, wanted)
    assert found["grad"] > 0  # nothing but person: all of it is drawn
    terms = Trainer(model, phase, matte=AllAlike(-30.0)).step(batch, 0)
    assert terms["grad"] == 0
    torch.testing.assert_close(dict(model.state_dict()), before)
    stays = weighted_l1(to_image(batch["target"]), to_image(batch["driving"]), batch["pose_weight"])
    torch.testing.assert_close(terms["pose"], stays)  # nothing but background


@pytest.mark.parametrize(("stage", "learning"), [("expression", "expression"), ("posing", "pose")])
def test_a_stage_of_one_generator_leaves_the_rest_as_it_is(model, batch, stage, learning):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Trainer(model, Phase(stage=stage)).step(batch, 0)
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.allclose(v, before[k], atol=1e-6)}
    assert changed == {f"{learning}_generator", f"{learning}_head"}


def test_masks_learn_where_the_source_shows_nothing(model, batch):
    seen = torch.ones(4, 64, 64)
    seen[:, 24:40, 24:40] = 0
    batch = batch | {"seen": seen}
    trainer = Trainer(model, Phase(stage="expression", unseen_weight=0.5, lr=1e-2, flow_weight=0))
    first = trainer.step(batch, 0)["mask"]
    for _ in range(30):
        last = trainer.step(batch, 0)["mask"]
    assert last < 0.8 * first
    with torch.no_grad():
        encoded = model.encode(to_image(batch["source"]))
        mask = trainer.express(encoded, batch["driving_code"]).flows[-1][:, 2].sigmoid()
    assert mask[:, 13:19, 13:19].mean() < mask[:, :4].mean() - 0.1


def test_gains_are_checked():
    with pytest.raises(InputError, match="three numbers"):
        Phase(dim_teeth="0.5,dark,0.4")
    with pytest.raises(InputError, match="lids"):
        Phase(gains="eyes=2")
    with pytest.raises(InputError, match="above 0"):
        Phase(gains="lids=0")


def test_the_average_follows_the_networks(model, batch):
    trainer = Trainer(model, Phase(lr=1e-2))
    for _ in range(5):
        trainer.step(batch, 0)
    averaged = trainer.averaged()
    name = "encoder.convs.0.weight"
    assert not torch.equal(averaged.state_dict()[name], model.state_dict()[name])
    torch.testing.assert_close(averaged.state_dict()[name], model.state_dict()[name], atol=0.2, rtol=0)


def test_the_command_prepares_clips_and_trains_on_them(shared, tmp_path):
    """Two real clips, a few seconds: weights that load, a curve, a picture of people it was not trained on."""
    pytest.importorskip("mediapipe")
    landmarker = shared("models/mediapipe/face_landmarker.task")
    videos = [shared(f"faces/train/part0/{name}.mp4") for name in ("0002", "0004")]
    known = next(f"id{n}" for n in range(100) if not is_held_out(f"id{n}"))
    unknown = next(f"id{n}" for n in range(100) if is_held_out(f"id{n}"))
    index = tmp_path / "index.csv"
    index.write_text(f"clip,identity_cluster\n{videos[0]},{known}\n{videos[1]},{unknown}\nnothing.mp4,{known}\n")
    arguments = ["prepare", index, "-o", tmp_path / "data", "--landmarker", landmarker, "--workers", "1"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "nothing.mp4: left out" in result.stderr
    arguments = ["train", "--data", tmp_path / "data", "-o", tmp_path / "run", "--set", "size=32"]
    arguments += ["--set", "minutes=0.05", "--set", "batch=4", "--set", "workers=0"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "run" / "weights.safetensors").config.size == 32
    assert (tmp_path / "run" / "held_out.jsonl").read_text().count("code_correlation") >= 1
    assert (tmp_path / "run" / "grid.png").stat().st_size > 1000


def test_a_recipe_has_phases_with_common_settings_and_changes(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('batch = 8\n[[phase]]\nname = "a"\nstage = "codes"\n[[phase]]\nname = "b"\nsize = 512\nbatch = 4\n')
    one, two = read_recipe(file, ["lr=0.5", "b.copy_start=true"])
    assert (one.stage, one.batch, one.size, one.lr, one.copy_start) == ("codes", 8, 256, 0.5, False)
    assert (two.stage, two.batch, two.size, two.lr, two.copy_start) == ("guided", 4, 512, 0.5, True)


def test_a_budget_is_shared_by_the_phases(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("[[phase]]\nminutes = 30\n[[phase]]\nminutes = 10\n[[phase]]\nsteps = 5")
    assert [phase.minutes for phase in read_recipe(file, budget=4)][:2] == [3, 1]


@pytest.mark.smoke
def test_smoke_a_short_run_learns_what_it_is_shown(prepared, tmp_path, tiny):
    """Discs at the corners of eyes and mouth that turn and open: codes and pictures get closer in a minute."""
    settings = SMALL | {"batch": 12, "lr": 5e-3, "landmark_weight": 5.0, "workers": 1}
    phases = [Phase(**settings, name="codes", stage="codes", steps=160), Phase(**settings, name="all", steps=80)]
    train(Inputs(prepared, tmp_path / "run"), phases)
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    codes, everything = ([line for line in curve if line["phase"] == name] for name in ("codes", "all"))
    assert codes[-1]["code"] < 0.9 * codes[0]["code"]  # half of it is noise here
    assert codes[-1]["landmarks"] < 0.5 * codes[0]["landmarks"]
    assert everything[-1]["exp_flow"] < 0.5 * everything[0]["exp_flow"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        ("", ["speed=3"], "speed = 3"),
        ("", ["batch=1.5"], "batch = 1.5"),
        ("", ["stage=best"], "best is no stage"),
        ("", ["c.lr=1"], "no phase c"),
        ("[[phase]", [], "no TOML file"),
        ("[phase]\nsize = 64", [], r"recipe.toml: phase is no list of phases; write \[\[phase\]\]"),
        ("phase = [3]", [], "phase is no list of phases"),
        ("batch = inf", [], "batch = inf"),
        ("", ["batch=0"], "phase train: batch = 0 is out of range; give 1 or more"),
        ("", ["steps=-1"], "steps = -1"),
        ("", ["minutes=nan"], "minutes = nan"),
        ("", ["minutes=0"], "neither minutes nor steps"),
        ("", ["size=100"], "size = 100 fits no networks; use one of 8, 16"),
        ("", ["threads=0"], "threads = 0"),
        ("", ["workers=-1"], "workers = -1"),
        ("", ["samples=0"], "samples = 0"),
        ("", ["eye_share=2"], "eye_share = 2.0 is out of range; give 0 to 1"),
        ("batch = 0", ["size=64"], "phase train: batch = 0"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(tmp_path, text, changes, problem):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=problem) as failure:
        read_recipe(tmp_path / "recipe.toml", changes)
    assert failure.type is (InputError if text else UsageError)  # the file is at fault, or what was typed


def test_a_budget_of_phases_without_minutes_is_one_clear_line(tmp_path):
    (tmp_path / "recipe.toml").write_text("minutes = 0\n[[phase]]\n[[phase]]\n")
    with pytest.raises(InputError, match="neither minutes nor steps"):
        read_recipe(tmp_path / "recipe.toml", budget=5)


@pytest.mark.parametrize("name", ["recipe.toml", "gpu.toml", "retouch.toml"])
def test_our_own_recipes_are_within_the_ranges(name):
    assert read_recipe(Path(__file__).parent.parent / "weights" / name)


def test_the_gpu_s_flows_begin_with_the_encoder_that_learnt_the_codes(prepared, tmp_path, tiny, monkeypatch):
    short = [f"{name}={value}" for name, value in (SMALL | {"steps": 2}).items()]
    phases = read_recipe(Path(__file__).parent.parent / "weights" / "gpu.toml", short)[:2]
    begun, go = [], _PhaseRun.go

    def remembered(run, *arguments):
        begun.append(copy.deepcopy(run.trainer.model.state_dict()))
        return go(run, *arguments)

    monkeypatch.setattr(_PhaseRun, "go", remembered)
    train(Inputs(prepared, tmp_path / "run"), phases)
    learnt = torch.load(tmp_path / "run" / "state-0-2.pt", weights_only=True)["trainer"]["average"]
    assert all(torch.equal(begun[1][name], learnt[name]) for name in learnt if name.startswith("encoder"))


@pytest.mark.parametrize("stage", ["audio", "pose", "landmarks", "reader", "retouch", "matte", "factors", "banks"])
def test_a_stage_that_keeps_no_state_cannot_be_resumed_and_says_so(tmp_path, monkeypatch, stage):
    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    for name in (
        "train_speech_networks",
        "train_landmark_network",
        "train_reading",
        "train_retouching",
        "train_matting",
        "fit_factors",
    ):
        monkeypatch.setattr(f"dpe_cli.commands.training.{name}", terminated)
    command = ["train", "--data", str(tmp_path), "-o", str(tmp_path / "run"), "--set", f"stage={stage}"]
    refused = CliRunner().invoke(cli, [*command, "--resume"])
    assert refused.exit_code == 2 and f"--resume cannot go with stage {stage}" in refused.stderr
    stopped = CliRunner().invoke(cli, command)
    assert stopped.exit_code == 75 and "begins anew" in stopped.stderr and "--resume" not in stopped.stderr


SMALL = {"size": 32, "batch": 4, "workers": 0, "minutes": 1e9}


@pytest.fixture
def tiny(monkeypatch):
    """Runs begin with tiny networks."""
    monkeypatch.setattr(DPEConfig, "compact", lambda size: DPEConfig(size, TINY, latent_dim=32))


def same_weights(one, two) -> bool:
    one, two = load(one).state, load(two).state
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stage", ["codes", "flows", "cycle"])
def test_a_resumed_run_equals_an_uninterrupted_one(prepared, tmp_path, tiny, stage):
    """N steps = k steps + SIGTERM + resume + N - k steps, bit for bit, over the border of two phases too."""
    settings = {**SMALL, "stage": stage, "gan_weight": 0.1 * (stage == "cycle")}
    later = settings | {"steps": 25, "seed": 1, "workers": 1}
    phases = [Phase(**settings, name="a", steps=3), Phase(**later, name="b")]
    whole = train(Inputs(prepared, tmp_path / "whole"), phases)
    parts = Inputs(prepared, tmp_path / "parts")

    def interrupt(progress):  # as a scheduler does: every process of the job, the makers of samples too
        for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
            os.kill(process, signal.SIGTERM)

    cut = train(parts, phases, show=interrupt)  # told to at step 20 of phase b
    assert not cut.finished
    assert sorted(path.name for path in parts.output.glob("state-*.pt")) == ["state-0-3.pt", "state-1-20.pt"]
    parts.resume = True
    assert train(parts, phases).finished
    assert same_weights(whole.weights, cut.weights)


def test_samples_that_the_shared_memory_cannot_hold_are_refused(prepared, tmp_path, tiny, monkeypatch):
    free = 2**18  # less than two batches of four pictures of 32 x 32
    monkeypatch.setattr("dpe_cli.samples.SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    phase = Phase(**SMALL, steps=1)
    with pytest.raises(InputError, match=r"samples need \d+ MiB .* 0 MiB are free; .*--ipc=host, or set fewer"):
        train(Inputs(prepared, tmp_path / "run"), [replace(phase, workers=1)])
    train(Inputs(prepared, tmp_path / "alone"), [phase])
    free = 2**30
    train(Inputs(prepared, tmp_path / "room"), [replace(phase, workers=1)])


@pytest.mark.parametrize("place", ["warm_up", "show_teeth", "Trainer.step"])
def test_an_error_while_training_leaves_no_process_behind(prepared, tmp_path, tiny, monkeypatch, place):
    """The makers of samples heed no signal: whoever waits for them at the exit would wait for ever."""

    def broken(*arguments):
        next((one for one in arguments if isinstance(one, Iterator)), None)
        raise RuntimeError("it broke")

    monkeypatch.setattr(f"dpe_cli.train.{place}", broken)
    first = Phase(**SMALL, stage="codes", steps=1)
    second = Phase(**SMALL | {"workers": 1, "size": 64}, show_teeth=True, warm_up=1, steps=1)
    with pytest.raises(RuntimeError, match="it broke") as caught:
        train(Inputs(prepared, tmp_path / "run"), [second] if place == "Trainer.step" else [first, second])
    left = multiprocessing.active_children()  # while the traceback in `caught` holds the loop
    for child in left:
        child.kill()
    assert caught.traceback and not left


def test_a_run_is_not_overwritten_and_not_resumed_with_another_recipe(prepared, tmp_path, tiny):
    phases = [Phase(**SMALL, stage="codes", steps=1)]
    train(Inputs(prepared, tmp_path / "run"), phases)
    with pytest.raises(OutputError, match="add --resume"):
        train(Inputs(prepared, tmp_path / "run"), phases)
    with pytest.raises(InputError, match="another recipe"):
        train(Inputs(prepared, tmp_path / "run", resume=True), [Phase(**SMALL, stage="codes", steps=2)])
    with pytest.raises(InputError, match="no state"):
        train(Inputs(prepared, tmp_path / "other", resume=True), phases)


def test_held_out_samples_are_made_once_and_measured_together(prepared, tmp_path, tiny, monkeypatch, model):
    unknown = next(f"id{n}" for n in range(100) if is_held_out(f"id{n}"))
    np.savez(prepared / "0.npz", **{**np.load(prepared / "0.npz"), "identity": unknown})
    made = []
    monkeypatch.setattr("dpe_cli.train.held_out_batches", lambda *of: made.append(of) or held_out_batches(*of))
    train(Inputs(prepared, tmp_path / "run"), [Phase(**SMALL, stage="codes", steps=3, save_steps=1, samples=14)])
    assert len(made) == 1 and len((tmp_path / "run" / "held_out.jsonl").read_text().splitlines()) == 4
    together, grid = evaluate(model.eval(), held_out_batches(*made[0]))
    monkeypatch.setattr("dpe_cli.samples.MEASURED", 1)
    alone, same = evaluate(model, held_out_batches(*made[0]))
    assert grid.shape == same.shape == (SHOWN * 32, 9 * 32, 3) and np.abs(grid.astype(int) - same).max() <= 1
    for name, value in together.items():
        assert value == pytest.approx(alone[name], abs=2e-3), name


def test_a_phase_of_twice_the_size_grows_the_networks(prepared, tmp_path, tiny):
    unknown = next(f"id{n}" for n in range(100) if is_held_out(f"id{n}"))
    np.savez(prepared / "0.npz", **{**np.load(prepared / "0.npz"), "identity": unknown})
    small, large = SMALL | {"stage": "codes", "steps": 1}, SMALL | {"stage": "guided", "steps": 2, "size": 64}
    result = train(Inputs(prepared, tmp_path / "run"), [Phase(**small), Phase(**large, name="b", warm_up=2)])
    assert load(result.weights).config.size == 64
    curves = tmp_path / "run" / "held_out.jsonl"
    assert [json.loads(line)["phase"] for line in curves.read_text().splitlines()] == ["train", "b"]
    with pytest.raises(InputError, match="size 256"):
        train(Inputs(prepared, tmp_path / "bad"), [Phase(**small), Phase(**large | {"size": 256})])


@pytest.mark.parametrize(
    ("later", "given", "error", "problem"),
    [
        ({"size": 128}, {}, InputError, "size 128, the networks have 32; go on"),
        ({"size": 64}, {"init": folder() / "compact.safetensors"}, InputError, "size 32, the networks have 256"),
        ({"perceptual_weight": 1}, {}, InputError, "phase late has no perceptual network"),
        ({"perceptual_weight": 1}, {"perceptual": Path(__file__)}, WeightsError, "test_train.py holds no VGG features"),
        ({"perceptual_weight": 1}, {"perceptual": folder() / "compact.safetensors"}, WeightsError, "no VGG features"),
        ({"expression_weight": 1}, {}, InputError, "phase late has no expression network"),
        ({"gan_weight": 1, "batch": 7}, {}, InputError, "phase late: the discriminator takes no odd batch of 7"),
        ({"dim_teeth": "0.5,0.4,0.4"}, {}, InputError, "phase late has no teeth to dim; set show_teeth"),
    ],
)
def test_what_would_stop_a_late_phase_stops_the_run_before_it_begins(tmp_path, later, given, error, problem):
    phases = [Phase(**SMALL, stage="codes"), Phase(**SMALL | {"stage": "cycle", "name": "late"} | later)]
    with pytest.raises(error, match=problem):
        train(Inputs(tmp_path / "nothing to train on", tmp_path / "run", **given), phases)
    assert not (tmp_path / "run").exists()


def test_pictures_larger_than_prepared_ones_are_refused(tmp_path):
    with pytest.raises(InputError, match="size 512, prepared clips have 256"):
        train(Inputs(tmp_path / "nothing", tmp_path / "run"), [Phase(size=256), Phase(size=512)])


def test_gpu_training_asks_for_its_networks_before_it_prepares(tmp_path):
    for vgg in ("", tmp_path / "none.safetensors", tmp_path):
        command = ["make", "gpu-train", "RUN=echo dpe", "CLIPS=talks", f"VGG={vgg}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
        assert done.returncode and "VGG=" in done.stderr and "dpe prepare" not in done.stdout


def no_warm_up(model, small, batches, steps):
    """What `warm_up` computes, on the device, but for the gradients: the simulated GPU has none."""
    with torch.no_grad():
        image = to_image(next(batches)["source"])
        small.encode(torch.nn.functional.avg_pool2d(image, 2))
        return float(model.encode(image).latent.mean().cpu())


@pytest.mark.parametrize(
    "begins",
    [
        {"copy_start": True},
        {"show_inside": True},
        {"show_inside": True, "show_teeth": True, "dim_teeth": "0.5,0.25,0.2"},
        {"subtract_own": True, "subtract_own_pose": True},
        {"gains": "mouth=1.4,turn=1.3"},
        {"size": 64, "warm_up": 1},
    ],
    ids=lambda begins: next(iter(begins)),
)
def test_a_phase_begins_on_a_gpu_as_on_a_cpu(prepared, tmp_path, tiny, monkeypatch, begins):
    """With what the phase before left there."""
    monkeypatch.setattr("dpe_cli.train.warm_up", no_warm_up)
    size, begun = begins.get("size", 32), []
    pictures = torch.randint(255, (2, 3, size, size), dtype=torch.uint8)
    monkeypatch.setattr("dpe_cli.train.batches", lambda *_, **__: nullcontext(iter([{"source": pictures}])))

    def go(run, stop, show):
        begun.append(run.trainer.averaged().cpu().state_dict())
        return True

    monkeypatch.setattr(_PhaseRun, "go", go)
    phases = [Phase(**SMALL, stage="codes"), Phase(**SMALL | begins, name="b")]
    train(Inputs(prepared, tmp_path / "cpu"), phases)
    with simulated_gpu() as device:
        train(Inputs(prepared, tmp_path / "gpu", device=str(device)), phases)
    for one, two in zip(begun[:2], begun[2:], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert begun[0].keys() != begun[1].keys() or any(not torch.equal(begun[0][k], begun[1][k]) for k in begun[0])


def test_stage_two_leaves_the_encoder_and_the_pose_generator_as_they_are(model, batch):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Trainer(model, Phase(stage="refine")).step(batch, 0)
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"motion_mlp", "expression_head", "pose_head", "expression_generator"}


def test_codes_alone_leave_the_channels_that_carry_the_colours(model, batch):
    before = model.encoder.convs[0].weight.detach().clone()
    Trainer(model, Phase(stage="codes")).step(batch, 0)
    after = model.encoder.convs[0].weight
    assert torch.equal(after[:6], before[:6])
    assert not torch.equal(after[6:], before[6:])


def test_flows_alone_move_only_the_generators_and_their_heads(model, batch):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    terms = Trainer(model, Phase(stage="flows")).step(batch, 0)
    assert {"exp_flow", "pose_flow"} < set(terms)
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"expression_head", "pose_head", "expression_generator", "pose_generator"}


def test_the_expression_loss_sees_both_intermediate_pictures(model, batch):
    seen = []

    class Network(torch.nn.Module):
        def forward(self, picture):
            seen.append(picture)
            return picture.mean((2, 3))

    terms = Trainer(model, Phase(stage="cycle", expression_weight=20), expression=Network()).step(batch, 0)
    assert len(seen) == 3  # D, S', D'
    assert [picture.requires_grad for picture in seen] == [False, True, True]
    assert terms["expression"] > 0


def test_the_perceptual_loss_finds_its_windows_once_for_all_pictures(model, batch, monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, picture, target):
            assert picture.shape == target.shape == (4, 3, 8, 8)
            return (picture - target).abs().mean()

    found = []
    monkeypatch.setattr("dpe_cli.trainer.windows", lambda *given: found.append(windows(*given)) or found[-1])
    for name, top in (("weight", 4), ("pose_weight", 20)):
        batch[name][:, top : top + 8, top : top + 8] = 5
    phase = Phase(stage="cycle", perceptual_weight=1, perceptual_size=8)
    assert Trainer(model, phase, Network()).step(batch, 0)["vgg"] > 0
    assert [parts[0][2].start for parts in found] == [3, 19]


def test_a_run_that_diverges_stops(model, batch):
    trainer = Trainer(model, Phase())
    batch["source_code"][:] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DPEError, match="finite"):
        for _ in range(100):
            trainer.step(batch, 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_of_another_device_goes_on_as_is_fast_on_this_one(model, batch, fused):
    there, here = Trainer(copy.deepcopy(model), Phase()), Trainer(model, Phase())
    for trainer, one in ((there, not fused), (here, fused)):
        trainer.optimiser = torch.optim.Adam(trainer.parameters, fused=one)
    there.step(batch, 0)
    here.load_state_dict(there.state_dict())
    assert here.optimiser.param_groups[0]["fused"] == fused
    here.step(batch, 0)
    assert here.optimiser.param_groups[0]["fused"] == fused and here.step_number == 2


def test_clips_of_another_size_are_the_same_clips(prepared, monkeypatch):
    read = []
    monkeypatch.setattr("dpe_cli.dataset.normalise", lambda *given: read.append(1) or normalise(*given))
    clips = Clips(prepared, None).at(32)
    count = len(read)
    found, wanted = clips.at(64).training, load_clips(prepared, clips.space, held_out=False, size=64)[0]
    assert len(read) == count + len(wanted) and clips.at(256).training[0].frames.shape[1] == 256
    clips.at(64)
    for one, two in zip(found, wanted, strict=True):
        assert np.array_equal(one.frames, two.frames) and np.array_equal(one.mirrored, two.mirrored)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_batches_for_a_gpu_take_memory_of_one(prepared, tmp_path, monkeypatch, device):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "dpe_cli.samples.DataLoader", lambda *_, **options: iter(asked.append(options["pin_memory"]) or [])
    )
    clips = Clips(prepared, None).at(32)
    with batches(clips.training, clips.mesh, Phase(**SMALL), device=device):
        assert asked == [device == "cuda"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_leaves_the_discriminator_as_it_is(model, batch, monkeypatch, bad):
    trainer = Trainer(model, Phase(stage="cycle", gan_weight=0.1))
    trainer.step(batch, 0)
    before = copy.deepcopy(trainer.discriminator.state_dict())
    with monkeypatch.context() as broken:
        turn = trainer.turn
        broken.setattr(trainer, "turn", lambda *given: turn(*given)._replace(image=turn(*given).image * bad))
        assert "d" not in trainer.step(batch, 0)
        fakes = torch.full((8, 3, 32, 32), bad)
        assert not trainer.update_discriminator(fakes, to_image(batch["source"].repeat(2, 1, 1, 1)))[1]
    assert all(torch.equal(v, before[k]) for k, v in trainer.discriminator.state_dict().items())
    assert trainer.skipped == 1
    assert trainer.step(batch, 0)["d"].isfinite() and trainer.skipped == 0


SHARED = Phase(**SMALL, stage="cycle", steps=4, lr=1e-4)


def process(rank: int, port: int, data, output, phases: list[Phase], ends: bool = True) -> None:
    """One of the two processes of a run; started anew, so without the fixtures.

    ends: phases are gone through; else each writes what it begins with into the folder of the data, and that is all.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    DPEConfig.compact = lambda size: DPEConfig(size, TINY, latent_dim=32)

    def begun(run, stop, show):
        torch.save(run.trainer.model.state_dict(), data / f"{run.number}-{rank}.pt")
        return True

    if not ends:
        _PhaseRun.go = begun
    train(Inputs(data, output), phases)


def two_processes(*arguments) -> None:
    """Runs `process` twice, side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, *arguments), nprocs=2)


def test_a_process_that_reports_nothing_keeps_nothing(prepared, tmp_path, tiny, monkeypatch):
    go, step, kept, most = _PhaseRun.go, Trainer.step, [], []

    def silent(run, *arguments):
        run.alone = False
        return go(run, *arguments)

    def remembered(*arguments):
        terms = step(*arguments)
        kept.append(weakref.ref(terms["code"]))
        most.append(sum(term() is not None for term in kept))
        return terms

    monkeypatch.setattr(_PhaseRun, "go", silent)
    monkeypatch.setattr(Trainer, "step", remembered)
    train(Inputs(prepared, tmp_path / "run"), [Phase(**SMALL, stage="codes", steps=2 * LOG_STEPS + 1)])
    assert max(most) == LOG_STEPS


def test_two_processes_learn_what_one_learns(prepared, tmp_path, tiny):
    """Same global batch: equal but for the order of sums in 16 bits, which can turn a gradient near zero."""
    train(Inputs(prepared, tmp_path / "one"), [SHARED])
    two_processes(prepared, tmp_path / "two", [SHARED])
    one, two = (
        torch.load(tmp_path / name / "state-0-4.pt", weights_only=True)["trainer"]["model"] for name in ("one", "two")
    )
    differences = torch.cat([(one[name] - two[name]).flatten().abs() for name in one])
    assert differences.max() <= 2 * SHARED.steps * SHARED.lr  # a step of Adam moves a weight by lr
    assert differences.mean() < 0.05 * SHARED.steps * SHARED.lr


def test_two_processes_begin_each_phase_alike(prepared, tmp_path):
    """Each warms a new level up, and finds where teeth go, on samples of its own."""
    phases = [Phase(**SMALL, stage="codes"), Phase(**SMALL | {"size": 64}, warm_up=2), Phase(**SMALL | {"size": 64})]
    phases[2] = replace(phases[2], show_inside=True, show_teeth=True)
    two_processes(prepared, tmp_path / "run", phases, False)
    for number in range(len(phases)):
        one, two = (torch.load(prepared / f"{number}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one), number


@pytest.mark.parametrize(
    ("device", "own", "backend"),
    [("cpu", "cpu", "gloo"), ("cuda", "cuda:1", "cpu:gloo,cuda:nccl"), ("cuda:0", "cuda:1", "cpu:gloo,cuda:nccl")],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, device, own, backend):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    assert join_processes(device) == own
    assert chosen == ([own] if own != "cpu" else []) + [backend]


@pytest.mark.parametrize("stage", ["codes", "landmarks"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_clips_are_read(tmp_path, monkeypatch, stage, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["train", "--data", str(tmp_path / "none"), "-o", str(tmp_path / "run"), "--device", device]
    result = CliRunner().invoke(cli, [*command, "--set", f"stage={stage}"])
    assert result.exit_code == (2 if device == "gpu" else DeviceError.exit_code) and device in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_best_device_to_train_on_is_a_gpu_else_the_cpu(monkeypatch):
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert join_processes("auto") == device


@pytest.mark.parametrize("place", ["Trainer", "Trainer.step"])
def test_memory_that_is_too_small_for_a_phase_says_what_to_lower(prepared, tmp_path, tiny, monkeypatch, place):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(f"dpe_cli.train.{place}", full)
    with pytest.raises(DeviceError, match="cpu is too small for phase train; .* below 4: --set train.batch=N"):
        train(Inputs(prepared, tmp_path / "run"), [Phase(**SMALL, stage="codes", steps=2)])


def test_the_rate_of_a_gpu_is_that_of_the_one_in_use(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *devices: waited.append(devices))
    with simulated_gpu() as device:
        assert matrix_rate(device, seconds=0.01) > 0
    assert set(waited) == {(device,)}


@pytest.mark.parametrize("stage", ["reader", "retouch", "matte", "audio", "pose"])
def test_a_stage_that_knows_no_gpu_says_so(tmp_path, stage):
    arguments = ["train", "--data", str(tmp_path), "-o", str(tmp_path / "run"), "--set", f"stage={stage}"]
    arguments += ["--segmenter", str(tmp_path / "none.tflite")]
    for device, said in (("cuda", True), ("cpu", False)):
        result = CliRunner().invoke(cli, [*arguments, "--device", device])
        remark = f"stage {stage} learns on the CPU: --device {device} is left aside"
        assert result.exit_code == InputError.exit_code and (remark in result.stderr) == said


def test_the_paper_s_recipe_is_a_recipe():
    one, two = read_recipe(Path(__file__).parent.parent / "examples" / "paper.toml")
    assert (one.stage, one.steps, two.stage, two.steps) == ("cycle", 100_000, "refine", 50_000)
    assert one.perceptual_weight == one.expression_weight == 20
