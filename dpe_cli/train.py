"""A training run: phases over prepared clips, with saved states, curves and pictures of people it never saw.

The folder of a run:
  weights.safetensors     moving average of the weights, fp16: what `dpe edit --weights` takes
  best.safetensors        the same where the phase's held-out number was best
  state-PHASE-STEP.pt     everything that --resume needs; the newest ones
  curve.jsonl, held_out.jsonl, curves.png, grid.png, motion-space.json, recipe.json; events for TensorBoard

A sample depends on its number and the seed alone, and every process takes its share of each step's numbers: neither
workers nor interruptions change what is learnt.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpe_cli.dataset import CROP, Clip, load_clips, load_frames
from dpe_cli.device import describe_device, is_out_of_memory
from dpe_cli.errors import DeviceError, InputError, OutputError, WeightsError
from dpe_cli.initialise import (
    amplify,
    dim_teeth,
    grow,
    initialise,
    see_through,
    show_inside,
    show_teeth,
    subtract_own,
    to_image,
    warm_up,
)
from dpe_cli.matte import load_net
from dpe_cli.mesh import Mesh
from dpe_cli.models import DPE, DPEConfig, PerceptualLoss
from dpe_cli.models.discriminator import GROUP
from dpe_cli.motion_space import MotionSpace
from dpe_cli.processes import join_processes, share_networks, shared_clock, shared_stop
from dpe_cli.recipe import Phase, as_table
from dpe_cli.samples import batches, held_out_batches
from dpe_cli.trainer import Trainer, weighted_l1
from dpe_cli.weights import load, save

LOG_STEPS = 20
SHOWN = 12  # samples of held-out people in the grid


@dataclass
class Progress:
    """What a run says of itself every few steps."""

    phase: str
    step: int
    share: float  # of the phase that is gone, 0 to 1
    minutes: float
    rate: float  # steps a second
    waiting: float  # share of the time in which the networks waited for data
    use: float  # operations a second over what the device does in products of matrices; 0: not known
    terms: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """For instance: codes: step 340, 12 %, 3.1 it/s, 20 min left, code 0.2014, grad 2.3"""
        left = self.minutes * (1 - self.share) / self.share if self.share else 0
        terms = ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items())
        head = f"{self.phase}: step {self.step}, {self.share:.0%}, {self.rate:.2f} it/s, {left:.0f} min left"
        use = f", {self.use:.0%} of the matrix rate" if self.use else ""
        return f"{head}, {self.waiting:.0%} waiting{use}, {terms}"


@contextlib.contextmanager
def memory_errors(device: str, phase: Phase) -> Iterator[None]:
    """Memory that a phase has used up becomes a DeviceError, which says what to make smaller."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"the memory of {describe_device(torch.device(device))} is too small for phase {phase.name}"
        remedy = f"begin anew with a batch below {phase.batch}: --set {phase.name}.batch=N"
        raise DeviceError(problem, remedy) from error


@torch.inference_mode()
def evaluate(
    model: DPE, samples: list[dict[str, Tensor]], device: str | torch.device = "cpu", measured: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """Numbers and a picture grid on people that training never saw. samples: of `held_out_batches`.

    measured: pictures are made with measured codes, as such an edit is; what is said of codes is the encoder's.
    Returns: weighted L1 of the expression result and of both against their targets, the same for copying the source;
    smooth L1 and, for each motion coordinate, correlation of the predicted with the measured codes. The grid's columns:
    S, D, S' (expression), its target, S'' (both), D' (pose of S), D'' (both), the expression flow as colours, its mask.
    """
    rows, errors, codes = [], [], []
    for sample in samples:
        batch = {k: v.to(device) for k, v in sample.items()}
        source, target, driving = (to_image(batch[k]) for k in ("source", "target", "driving"))
        of_source, of_driving = model.encode(source), model.encode(driving)
        own, code = model.motion_code(of_source.latent), model.motion_code(of_driving.latent)
        asked = code
        if measured:
            asked = own + batch["driving_code"] - batch["source_code"]
        result = model.render_expression(of_source.latent + model.expression_shift(asked), of_source.features)
        both = model.transfer_pose(model.encode(result.image), asked)
        pairs = ((result.image, target), (source, target), (both, driving), (source, driving))
        errors.append([float(weighted_l1(a, b, batch["weight"])) * len(source) for a, b in pairs])
        codes.append(np.stack([code.cpu().numpy(), sample["driving_code"].numpy()], 1))
        if len(rows) < SHOWN:
            turned = model.transfer_pose(of_driving, own)
            back = model.transfer_expression(model.encode(turned), own)
            flow, mask = torch.tanh(result.flows[-1][:, :2]) * 4, torch.sigmoid(result.flows[-1][:, 2:]) * 2 - 1
            shown = [source, driving, result.image, target, both, turned, back]
            shown += [torch.cat([flow, torch.zeros_like(mask)], 1), mask.expand_as(source)]
            rows += torch.cat([x.float() for x in shown], 3)
    codes = np.concatenate(codes)
    correlation = [float(np.corrcoef(codes[:, 0, k], codes[:, 1, k])[0, 1]) for k in range(codes.shape[2])]
    names = ("exp", "exp_copy", "both", "both_copy")
    numbers = {name: round(float(v), 5) for name, v in zip(names, np.sum(errors, 0) / len(codes), strict=True)}
    gap = torch.from_numpy(codes[:, 0]), torch.from_numpy(codes[:, 1])
    numbers["code_error"] = round(float(torch.nn.functional.smooth_l1_loss(*gap)), 5)
    numbers["code_correlation"] = [round(c, 3) for c in correlation]
    grid = torch.cat(rows[:SHOWN], 1).clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return numbers, grid


@dataclass
class Inputs:
    """What a run is given, beside its recipe. Paths of networks may be None where no phase uses them."""

    data: Path
    output: Path
    init: Path | None = None
    space: MotionSpace | None = None
    perceptual: Path | None = None
    expression: nn.Module | None = None
    device: str = "cpu"
    resume: bool = False


@dataclass
class Result:
    weights: Path
    finished: bool  # False: a SIGTERM came; --resume goes on


class Clips:
    """The clips of both splits in one size at a time."""

    def __init__(self, data: Path, space: MotionSpace | None):
        self.data, self.space, self.size = data, space, 0
        self.training: list[Clip] = []
        self.held_out: list[Clip] = []

    def at(self, size: int) -> "Clips":
        """The same clips with frames of that size: what was measured on them is read once."""
        if not self.size:
            self.training, self.space = load_clips(self.data, self.space, held_out=False, size=size)
            with contextlib.suppress(InputError):
                self.held_out, _ = load_clips(self.data, self.space, held_out=True, size=size)
            self.mesh = Mesh(self.space.template)
        elif size != self.size:
            for clip in self.training + self.held_out:
                clip.frames = load_frames(self.data, clip.name, size)
        self.size = size
        return self


def train(
    inputs: Inputs,
    phases: list[Phase],
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Runs the phases one after the other, each from the moving average of the one before.

    Raises:
        InputError: nothing to train on, a phase that cannot run: see `check_phases`. OutputError: the folder holds a
            run and `resume` is not set. WeightsError: a wrong `init` or `perceptual`. DeviceError: the device is not
            there, or its memory is too small.
    """
    import cv2

    cv2.setNumThreads(1)  # its threads do not survive the fork of the workers: these would wait for ever
    device = join_processes(inputs.device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    alone = rank == 0
    saved = newest_state(inputs.output)
    if saved and not inputs.resume:
        raise OutputError(f"{inputs.output} holds a run already", "name another folder, or add --resume")
    if inputs.resume and not saved:
        raise InputError(f"{inputs.output} holds no state to go on from", "start without --resume")
    state = torch.load(saved, map_location="cpu", weights_only=True) if saved else None
    if state and [dict(p) for p in state["phases"]] != [dict(p) for p in as_table(phases)]:
        raise InputError(f"{saved} is of another recipe", "resume with the recipe it was started with")
    model = load(inputs.init).networks() if inputs.init and not state else None
    begun = DPEConfig.from_json(state["config"]) if state else model.config if model else None
    left = phases[state["phase"] if state else 0 :]
    check_phases(left, inputs, world, begun)
    perceptual = perceptual_networks(left, inputs.perceptual)
    inputs.output.mkdir(parents=True, exist_ok=True)
    clips = Clips(inputs.data, inputs.space).at(left[0].size)
    if alone:
        (inputs.output / "motion-space.json").write_text(clips.space.to_json())
        (inputs.output / "recipe.json").write_text(json.dumps(as_table(phases), indent=1))
    with stop_signal() as stop, Journal(inputs.output, alone, say) as journal:
        for number, phase in enumerate(phases):
            if state and number < state["phase"]:
                continue
            with memory_errors(device, phase):
                torch.manual_seed(phase.seed)
                torch.set_num_threads(phase.threads)
                clips.at(phase.size)
                going_on = state is not None and number == state["phase"]
                if going_on:
                    model = DPE(DPEConfig.from_json(state["config"]))
                else:
                    model = begin_phase(model, phase, clips, say, device)
                    share_networks(model)
                people = len({clip.identity for clip in clips.training})
                held_out = f"{len(clips.held_out)} clips held out"
                say(f"{phase.name} ({phase.stage}): {len(clips.training)} clips of {people} people; {held_out}")
                looks = perceptual[phase.perceptual_blocks] if phase.perceptual_weight else None
                networks = looks, inputs.expression, device, matte_network(phase)
                trainer = Trainer(model, phase, *networks)
                run = _PhaseRun(number, phases, trainer, clips, inputs.output, journal, alone)
                if going_on:
                    trainer.load_state_dict(state["trainer"])
                    run.minutes, run.best = state["minutes"], state["best"]
                    torch.set_rng_state(state["random"])
                if not run.go(stop, show):
                    return Result(run.weights, False)
                model = trainer.averaged().cpu()
        journal.draw_curves()
    return Result(run.weights, True)


def check_phases(phases: list[Phase], inputs: Inputs, world: int, begun: DPEConfig | None) -> None:
    """Raises InputError for what would stop a run in one of its phases, maybe long after it began.

    world: processes; begun: of the networks that the first phase starts from, None where it makes them.
    """
    size, teeth = begun.size if begun else phases[0].size, begun is not None
    for phase in phases:
        share, what = phase.batch // world, f"phase {phase.name}"
        teeth = teeth or phase.show_teeth
        if phase.dim_teeth and not teeth:
            raise InputError(f"{what} has no teeth to dim", "set show_teeth in it, or in a phase before")
        if phase.batch % world:
            raise InputError(f"{world} processes cannot share a batch of {phase.batch}", "choose a multiple")
        if phase.stage in ("cycle", "refine") and phase.gan_weight and 2 * share > GROUP and 2 * share % GROUP:
            problem = f"{what}: the discriminator takes no odd batch of {share} for each process"
            raise InputError(problem, "choose one that is even, or leave gan_weight out")
        if phase.size > CROP:
            raise InputError(f"{what} has size {phase.size}, prepared clips have {CROP}", f"use {CROP} or less")
        if phase.size not in (size, size * 2):
            problem = f"{what} has size {phase.size}, the networks have {size}"
            raise InputError(problem, "go on with the same size or with twice the size")
        if phase.expression_weight and inputs.expression is None:
            raise InputError(f"{what} has no expression network", "name one with --expression FILE")
        if phase.perceptual_weight and inputs.perceptual is None:
            raise InputError(f"{what} has no perceptual network", "name VGG features with --perceptual FILE")
        size = phase.size


def begin_phase(model: DPE | None, phase: Phase, clips: Clips, say: Callable[[str], None], device: str) -> DPE:
    """The networks that a phase starts with, on the CPU as `model` is, grown where its pictures are twice as large.

    device: where the new level is warmed up; what else is done to networks is little, and mixes them with constants.
    """
    if model is None:
        model = DPE(DPEConfig.compact(phase.size))
        initialise(model, copy=phase.copy_start)
    elif model.config.size * 2 == phase.size:
        small, model = model.eval(), grow(model)
        with batches(clips.training, clips.mesh, phase, codes_only=True, device=device) as loader:
            pictures = ({"source": batch["source"].to(device)} for batch in loader)
            error = warm_up(model.to(device), small.to(device), pictures, phase.warm_up)
        say(f"warm-up of the new level: mean square error {error:.4f}")
        model.cpu()
    with torch.no_grad():
        if phase.copy_start:
            see_through(model)
        if phase.show_inside:
            show_inside(model)
        if phase.show_teeth:
            with batches(clips.training, clips.mesh, phase, codes_only=True) as loader:
                show_teeth(model, to_image(next(loader)["source"]))
        if phase.dim_teeth:
            try:
                dim_teeth(model, torch.tensor(phase.teeth_shares()))
            except ValueError as error:  # of networks that were begun elsewhere it is known only now
                problem = f"phase {phase.name}: {error}"
                raise InputError(problem, "set show_teeth in it, or in a phase before") from error
        if phase.subtract_own:
            subtract_own(model)
        if phase.subtract_own_pose:
            subtract_own(model, "pose")
        if phase.gains:
            for part in ("expression", "pose"):
                amplify(model, part, torch.tensor(phase.gain_values()))
    return model


def perceptual_networks(phases: list[Phase], file: Path | None) -> dict[int, nn.Module]:
    """The perceptual losses that phases ask for, by how many blocks they look at. Raises WeightsError."""
    depths = {phase.perceptual_blocks for phase in phases if phase.perceptual_weight}
    if not depths:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(file))
        return {blocks: PerceptualLoss(state, blocks) for blocks in depths}
    except (OSError, SafetensorError, KeyError) as error:
        remedy = "name VGG16 or VGG19 as safetensors, with torchvision's names"
        raise WeightsError(f"{file} holds no VGG features: {error}", remedy) from error


def matte_network(phase: Phase) -> nn.Module | None:
    """What tells persons from their background, where a phase asks for it: the tool's own."""
    return load_net().eval().requires_grad_(False) if phase.still_background else None


def newest_state(folder: Path) -> Path | None:
    """The state to go on from."""
    states = sorted(folder.glob("state-*.pt"), key=lambda path: tuple(map(int, path.stem.split("-")[1:])))
    return states[-1] if states else None


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of ending the process."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class Journal:
    """Curves of a run: lines of JSON, TensorBoard's events where tensorboard is installed, a picture at the end."""

    def __init__(self, folder: Path, active: bool, say: Callable[[str], None]):
        self.folder, self.active, self.writer, self.total = folder, active, None, 0
        if active:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder))
            except ImportError:
                say("no curves for TensorBoard: pip install 'dpe-cli[train]'")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def note(self, file: str, values: dict[str, Any], step: int) -> None:
        """One line of numbers."""
        with (self.folder / file).open("a") as lines:
            lines.write(json.dumps(values) + "\n")
        if self.writer:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{values.get('phase')}/{name}", value, step)

    def picture(self, grid: np.ndarray, step: int) -> None:
        """The grid of held-out people, (H, W, 3) uint8."""
        import cv2

        cv2.imwrite(str(self.folder / "grid.png"), grid[..., ::-1])
        if self.writer:
            self.writer.add_image("held out", grid, step, dataformats="HWC")

    def draw_curves(self) -> None:
        """curves.png, a panel for each term of the loss, where matplotlib is installed."""
        curve = self.folder / "curve.jsonl"
        if not self.active or not curve.exists():
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line in curve.read_text().splitlines()]
        names = [name for name in dict.fromkeys(k for line in lines for k in line) if name not in ("phase", "step")]
        figure = Figure(figsize=(12, 2.2 * ((len(names) + 3) // 4)), layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot((len(names) + 3) // 4, 4, place)
            axes.set_title(name, fontsize=9)
            for phase in dict.fromkeys(line["phase"] for line in lines):
                points = [(i, line[name]) for i, line in enumerate(lines) if line["phase"] == phase and name in line]
                if points:
                    axes.plot(*zip(*points, strict=True), label=phase)
            axes.legend(fontsize=6)
        figure.savefig(self.folder / "curves.png", dpi=90)


class _PhaseRun:
    """The loop of one phase."""

    def __init__(
        self, number: int, phases: list[Phase], trainer: Trainer, clips: Clips, folder: Path, journal: Journal,
        alone: bool,
    ):  # fmt: skip
        self.number, self.phases, self.phase, self.trainer, self.clips = number, phases, phases[number], trainer, clips
        self.folder, self.journal, self.alone = folder, journal, alone
        self.weights = folder / "weights.safetensors"
        self.minutes, self.best = 0.0, float("inf")
        self.samples: list[dict[str, Tensor]] = []  # of held-out people

    def go(self, stop: threading.Event, show: Callable[[Progress], None]) -> bool:
        """Trains to the end of the phase; False where a SIGTERM ended it before."""
        start, device = self.trainer.step_number, str(self.trainer.device)
        with batches(self.clips.training, self.clips.mesh, self.phase, start, device=device) as loader:
            return self.steps(loader, stop, show)

    def steps(
        self, loader: Iterator[dict[str, Tensor]], stop: threading.Event, show: Callable[[Progress], None]
    ) -> bool:
        """The loop of `go`."""
        phase, trainer = self.phase, self.trainer
        began, before, saved = time.monotonic(), self.minutes, self.minutes
        waited, terms, operations, limit = 0.0, [], 0, matrix_rate(trainer.device)
        lap = time.monotonic()
        while (share := self.share()) < 1:
            asked = time.monotonic()
            batch = {k: v.to(trainer.device, non_blocking=True) for k, v in next(loader).items()}
            waited += time.monotonic() - asked
            counter = FlopCounterMode(display=False) if not operations and not phase.compile else None
            with counter or contextlib.nullcontext():
                terms.append(trainer.step(batch, share))
            operations = counter.get_total_flops() if counter else operations
            self.minutes = shared_clock(before + (time.monotonic() - began) / 60)
            if trainer.step_number % LOG_STEPS == 0:
                if self.alone:
                    seconds, lap = time.monotonic() - lap, time.monotonic()
                    mean = {k: float(np.mean([float(t[k]) for t in terms if k in t])) for k in terms[-1]}
                    rate = len(terms) / seconds
                    pace = {"rate": rate, "waiting": waited / seconds, "use": operations * rate / limit}
                    show(Progress(phase.name, trainer.step_number, share, self.minutes, **pace, terms=mean))
                    line = {"phase": phase.name, "step": trainer.step_number, "minutes": self.minutes, **mean, **pace}
                    self.journal.note("curve.jsonl", {k: significant(v) for k, v in line.items()}, trainer.step_number)
                waited = 0.0
                terms.clear()
            stopped = shared_stop(stop)
            due = trainer.step_number % phase.save_steps == 0 if phase.save_steps else False
            due = due or (not phase.save_steps and self.minutes - saved > phase.save_every)
            if self.alone and (due or stopped):
                saved = self.minutes
                self.save()
            if stopped:
                return False
        if self.alone:
            self.save()
        return True

    def share(self) -> float:
        """How much of the phase is gone, 0 to 1."""
        if self.phase.steps:
            return self.trainer.step_number / self.phase.steps
        return self.minutes / self.phase.minutes

    def save(self) -> None:
        """State, averaged weights, numbers and a picture of held-out people."""
        trainer, step = self.trainer, self.trainer.step_number
        model = trainer.averaged()
        numbers: dict[str, Any] = {"phase": self.phase.name, "step": step, "minutes": round(self.minutes, 2)}
        best = False
        if self.clips.held_out:
            phase = self.phase
            if not self.samples:
                of = self.clips.held_out, self.clips.mesh, phase.samples, phase.still_camera
                self.samples = held_out_batches(*of)
            found, grid = evaluate(model, self.samples, trainer.device, phase.measured and phase.stage != "cycle")
            numbers |= found
            self.journal.picture(grid, step)
            self.journal.note("held_out.jsonl", numbers, step)
            number = found[{"codes": "code_error", "posing": "both"}.get(phase.stage, "exp")]
            best, self.best = number < self.best, min(number, self.best)
        about = {"trained": json.dumps(asdict(self.phase)), "held_out": json.dumps(numbers)}
        for path in (self.weights, self.folder / "best.safetensors")[: 1 + best]:
            save(path, model.state_dict(), model.config, about, half=True)
        state = {
            "phases": as_table(self.phases), "phase": self.number, "minutes": self.minutes, "best": self.best,
            "config": trainer.model.config.to_json(), "random": torch.get_rng_state(), "trainer": trainer.state_dict(),
        }  # fmt: skip
        path = self.folder / f"state-{self.number}-{step}.pt"
        whole = path.with_suffix(".part")
        torch.save(state, whole)
        os.replace(whole, path)
        while len(states := list(self.folder.glob("state-*.pt"))) > max(1, self.phase.keep):
            min(states, key=lambda one: tuple(map(int, one.stem.split("-")[1:]))).unlink()


def matrix_rate(device: torch.device, seconds: float = 0.2) -> float:
    """Operations a second of this process in products of large matrices of 16-bit numbers, measured."""
    one = torch.randn(1024 if device.type == "cpu" else 8192, 1024, device=device, dtype=torch.bfloat16)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    one @ one.T
    wait()
    began, count = time.monotonic(), 0
    while (gone := time.monotonic() - began) < seconds:
        one @ one.T
        wait()
        count += 1
    return 2 * len(one) ** 2 * one.shape[1] * count / gone


def significant(value: Any) -> Any:
    """A float with four significant digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
