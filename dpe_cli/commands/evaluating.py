"""`dpe eval`: how good checkpoints are, on people who were not trained on."""

import functools
from pathlib import Path
from typing import Any

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.inputs import FILE, FOLDER
from dpe_cli.commands.options import MODES, WEIGHTS, given, machine_options
from dpe_cli.commands.progress import print_table, progress_for

PROTOCOLS = ("same", "cross", "video")  # of eval
CONTROL, DUB = "control", "dub"  # two more, by name only
UNREAD = {CONTROL: ("modes", "lpips", "lpips_network"), DUB: ("modes", "lpips", "lpips_network", "identity", "seed")}


@click.command("eval", cls=Command)
@click.option("--data", type=FOLDER, required=True, help="Folder of prepared clips; only held-out people are used.")
@click.option("--weights", multiple=True, **{**WEIGHTS, "help": WEIGHTS["help"] + " Several: side by side."})
@click.option(
    "--protocol", "protocols", type=click.Choice((*PROTOCOLS, CONTROL, DUB)), multiple=True,
    help="[default: the first three]",
)  # fmt: skip
@click.option("-m", "--mode", "modes", type=click.Choice(MODES), multiple=True, help="[default: all three]")
@click.option("--pairs", type=click.IntRange(1), default=10, show_default=True, help="Of source and driving clip.")
@click.option("--frames", type=click.IntRange(3), default=14, show_default=True, help="Of each pair.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which people meet.")
@click.option(
    "--landmarker", type=FILE, help="MediaPipe's face_landmarker.task.  [default: our own network, distilled from it]"
)
@click.option("--identity", type=FILE, help="Face recognition network (ONNX), or its folder: CSIM, identity drift.")
@click.option("--lpips", type=FOLDER, help="Folder of LPIPS's weights.")
@click.option("--lpips-network", type=click.Choice(["alex", "vgg"]), default="alex", show_default=True)
@click.option("--space", type=FILE, help="motion-space.json, for the mean face.  [default: the shipped one]")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder for eval.json and eval.html.")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@machine_options
def evaluate_command(
    data: Path, weights: tuple[str, ...], protocols: tuple[str, ...], modes: tuple[str, ...], pairs: int, frames: int,
    seed: int, landmarker: Path | None, identity: Path | None, lpips: Path | None, lpips_network: str,
    space: Path | None, output: Path, overwrite: bool, device: str, precision: str, backend: str,
    batch_size: int | None, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measure checkpoints on people they were not trained on, beside two baselines that need no weights.

    Protocols: same (one person), cross (driven by another person), video (the same, pasted back into the frames). Two
    more are runs of their own: control (factors and sliders one by one, on as many people as --pairs says, written to
    control.json) and dub (the speech networks on clips that were prepared with their sound, written to dub.json).

    \b
    dpe eval --data prepared -o scores
    """
    from dpe_cli.detectors import ArcFace
    from dpe_cli.evaluate import evaluate
    from dpe_cli.extractors import Extractors, Lpips
    from dpe_cli.landmark_net import NetworkLandmarker
    from dpe_cli.landmarks import Landmarker
    from dpe_cli.protocols import Plan, systems_of
    from dpe_cli.request import check_output
    from dpe_cli.scoreboard import JSON_NAME, PAGE_NAME, terminal_tables, write

    machine = {"device": device, "precision": precision, "backend": backend, "batch_size": batch_size}
    if CONTROL in protocols or DUB in protocols:
        if len(protocols) > 1 or len(weights) > 1:
            raise click.UsageError(f"{protocols[0]} is measured in a run of its own, on one checkpoint")
        refuse_unread(UNREAD[protocols[0]], f"--protocol {protocols[0]}")
        chosen = pairs, frames, landmarker, space, output, overwrite, quiet
        measure = evaluate_speech if DUB in protocols else functools.partial(evaluate_factors, seed, identity)
        measure(data, weights[0] if weights else None, machine, *chosen)
        return
    plan = Plan(protocols or PROTOCOLS, modes or MODES, pairs, frames, seed)
    plan.cases  # noqa: B018 - fails here, before anything is loaded, if nothing is left to do
    output.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, PAGE_NAME):
        check_output(output / name, [], overwrite)

    from dpe_cli.dataset import CROP, load_clips
    from dpe_cli.engine import Engine
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.weights import folder

    space = space or folder() / "motion-space.json"
    extractors = Extractors(
        Landmarker(landmarker) if landmarker else NetworkLandmarker(),
        ArcFace.load(identity) if identity else None,
        Lpips(lpips, lpips_network, device) if lpips else None,
    )
    engines = [Engine(one, **machine) for one in weights or (None,)]
    systems = systems_of(engines, [Path(engine.description["weights"]).stem for engine in engines])
    clips, motion = load_clips(data, MotionSpace.load(space), held_out=True, size=CROP)
    try:
        summary, strips = evaluate(clips, systems, extractors, motion.template, plan, progress_for(quiet, "edits"))
    finally:
        if extractors.landmarks:
            extractors.landmarks.close()  # at the interpreter's end MediaPipe would complain
    summary["data"] = str(data)
    if not quiet:
        from rich.console import Console

        console = Console(stderr=True)
        for table in terminal_tables(summary):
            console.print(table)
    click.echo(write(output, summary, strips))


def refuse_unread(names: tuple[str, ...], where: str) -> None:
    """Raises click.UsageError where the command line names options that mean nothing there."""
    ctx = click.get_current_context()
    named = [param.opts[-1] for param in ctx.command.params if param.name in names and given(ctx, param.name)]
    if named:
        raise click.UsageError(f"{', '.join(named)} cannot go with {where}: leave it out")


def evaluate_factors(
    seed: int, identity: Path | None, data: Path, weights: str | None, machine: dict[str, Any], people: int,
    frames: int, landmarker: Path | None, space: Path | None, output: Path, overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    """`dpe eval --protocol control`."""
    import json

    from dpe_cli.control_protocol import evaluate_control, tables
    from dpe_cli.dataset import CROP, load_clips
    from dpe_cli.detectors import ArcFace
    from dpe_cli.engine import Engine
    from dpe_cli.extractors import Extractors
    from dpe_cli.factors import Factors
    from dpe_cli.landmark_net import NetworkLandmarker
    from dpe_cli.landmarks import Landmarker
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.report import write_text
    from dpe_cli.request import check_output
    from dpe_cli.weights import folder

    output.mkdir(parents=True, exist_ok=True)
    path = output / "control.json"
    check_output(path, [], overwrite)
    motion = MotionSpace.load(space or folder() / "motion-space.json")
    engine = Engine(weights, **machine)
    factors = Factors.load(engine.description)
    landmarks = Landmarker(landmarker) if landmarker else NetworkLandmarker()
    extractors = Extractors(landmarks, ArcFace.load(identity) if identity else None, None)
    clips, _ = load_clips(data, motion, held_out=True, size=CROP)
    try:
        progress = progress_for(quiet, "steps")
        result = evaluate_control(clips, engine, factors, extractors, motion.template, people, frames, seed, progress)
    finally:
        landmarks.close()
    result |= {"data": str(data), "engine": engine.description, "landmarks": landmarks.name}
    write_text(path, json.dumps(result, indent=1) + "\n")
    if not quiet:
        for title, rows in tables(result):
            print_table(title, rows, stderr=True)
    click.echo(path)


def evaluate_speech(
    data: Path, weights: str | None, machine: dict[str, Any], drawn: int, frames: int, landmarker: Path | None,
    space: Path | None, output: Path, overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    """`dpe eval --protocol dub`: numbers to dub.json, its tables to a terminal's stderr."""
    import json

    from dpe_cli.engine import Engine
    from dpe_cli.evaluate_dub import evaluate_dub
    from dpe_cli.landmark_net import NetworkLandmarker
    from dpe_cli.landmarks import Landmarker
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.report import write_text
    from dpe_cli.request import check_output
    from dpe_cli.speech_motion import load_nets
    from dpe_cli.train_speech import load_talks
    from dpe_cli.weights import folder

    output.mkdir(parents=True, exist_ok=True)
    path = output / "dub.json"
    check_output(path, [], overwrite)
    talks = load_talks(data, MotionSpace.load(space or folder() / "motion-space.json"), held_out=True)
    engine = Engine(weights, **machine)
    landmarks = Landmarker(landmarker) if landmarker else NetworkLandmarker()
    summary = evaluate_dub(load_nets(), talks, engine, landmarks, drawn, frames, progress_for(quiet, "clips"))
    write_text(path, json.dumps(summary, indent=1) + "\n")
    if not quiet:
        for system, numbers in summary["mouth"].items():
            click.echo(f"{system}: " + ", ".join(f"{name} {value}" for name, value in numbers.items()), err=True)
        for name in ("heads", "drawn"):
            click.echo(f"{name}: {summary.get(name)}", err=True)
    click.echo(path)
