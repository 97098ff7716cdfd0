"""`dpe prepare` and `dpe train`: datasets, and networks taught by them."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.ends import STOP_META, STOP_RESUMED, STOP_WORDS
from dpe_cli.commands.entry import STOPPED
from dpe_cli.commands.inputs import FILE, FOLDER, Finite
from dpe_cli.commands.options import checked_device, detector_options
from dpe_cli.commands.progress import progress_for, speaker

if TYPE_CHECKING:
    from dpe_cli.recipe import Phase

ON_CPU = ("reader", "retouch", "matte", "audio", "pose")  # stages of the training that know no other device
WHOLE = ("landmarks", "reader", "retouch", "matte", "factors", "banks", "audio", "pose")  # stages that keep no state
STOPPED_WHOLE = "Stopped: this stage keeps no state to go on from, the next run begins anew"


@click.command(cls=Command)
@click.argument("videos", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the dataset; an existing one is continued.")
@click.option("--landmarker", type=FILE, help="MediaPipe's face_landmarker.task.  [default: our own network]")
@click.option("--identity", type=FILE, help="Recognition network (.onnx), or an insightface pack with one.")
@click.option("--space", type=FILE, help="motion-space.json: also store size and place of the head.")
@detector_options
@click.option(
    "--fps",
    type=Finite(min=0, min_open=True),
    default=12.5,
    show_default=True,
    help="Frames kept a second, about: every k-th is.",
)
@click.option(
    "--max-frames",
    type=click.IntRange(min=10),
    default=128,
    show_default=True,
    help="Frames of a clip; longer ones are divided.",
)
@click.option(
    "--min-side",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Least side of a crop in the video, pixels.",
)
@click.option(
    "--min-sharpness",
    type=Finite(min=0),
    default=15.0,
    show_default=True,
    help="Least variance of the Laplacian on the face.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: half the CPU cores]")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a bug.")
def prepare(
    videos: tuple[Path, ...], output: Path, workers: int | None, quiet: bool, verbose: bool, **settings: Any
) -> None:  # fmt: skip
    """Make a dataset to train on: shots, tracked faces, square crops of 256 pixels, landmarks, identities.

    VIDEOS are videos, folders of videos, CSV files (column clip, identity_cluster if known) of square face clips,
    or folders with an LMDB in the layout of the authors' training sets. Each clip left out is told with the reason. An
    interrupted run goes on when it is started again. Prints the path of the dataset's index.csv.

    \b
    dpe prepare talks/ interview.mp4 -o dataset
    """
    from dpe_cli.journal import PrepareSettings
    from dpe_cli.prepare import prepare as run

    say = speaker(quiet)

    started = time.monotonic()
    # Half: the networks in each use two threads.
    workers = workers or max(1, (os.cpu_count() or 1) // 2)
    progress = progress_for(quiet, "videos")
    done = run(videos, output, PrepareSettings(**settings), workers=workers, progress=progress, say=say)
    say(
        f"{done.clips} clips ({done.frames} frames) of {done.people} people, {done.test_people} of them to test on; "
        f"{done.rejected} left out; {time.monotonic() - started:.1f} s"
    )
    click.echo(done.index)


@click.command(cls=Command)
@click.option("--config", "recipe", type=FILE, help="Recipe: a TOML file with settings and phases.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a setting; PHASE.NAME=VALUE in one."
)
@click.option("--budget", type=Finite(min=0, min_open=True), metavar="MINUTES", help="Of all phases together.")
@click.option("--data", type=FOLDER, required=True, help="Folder of prepared clips.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the run.")
@click.option("--init", type=FILE, help="Weights to start from; those of half the size are grown by one level.")
@click.option("--space", type=FILE, help="motion-space.json of the weights to start from.")
@click.option("--perceptual", type=FILE, help="VGG16 or VGG19 features (safetensors, torchvision's names).")
@click.option("--expression", type=FILE, help="Network for L_E (TorchScript).  [default: our landmark network]")
@click.option(
    "--landmarker",
    type=FILE,
    help="MediaPipe's face_landmarker.task: judges sliders' pictures in stages factors, banks.",
)
@click.option("--lpips", type=FOLDER, help="Folder of LPIPS's weights, for perceptual_weight in stage retouch.")
@click.option("--segmenter", type=FILE, help="MediaPipe's selfie_segmentation.tflite: teaches stage matte.")
@click.option("--speech", type=FOLDER, help="Clips prepared with sound, for stage banks.  [default: those of --data]")
@click.option("--device", default="cpu", show_default=True, callback=checked_device, help="auto, cpu, cuda or cuda:N.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in the output folder; exactly on a CPU.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only errors.")
def train(
    recipe: Path | None, changes: tuple[str, ...], budget: float | None, data: Path, output: Path, init: Path | None,
    space: Path | None, perceptual: Path | None, expression: Path | None, landmarker: Path | None,
    lpips: Path | None, segmenter: Path | None, speech: Path | None, device: str, resume: bool, quiet: bool,
) -> None:  # fmt: skip
    """Train the networks on clips that `dpe prepare` made. Several processes or machines: start it with torchrun.

    Prints the path of the weights. Exit code 75: a SIGTERM came, the state is saved, go on with --resume.

    \b
    dpe train --data prepared -o run --set stage=codes --set size=64 --set minutes=30
    """
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.recipe import read_recipe
    from dpe_cli.train import Inputs
    from dpe_cli.train import train as run

    say = speaker(quiet)

    phases = read_recipe(recipe, changes, budget)
    if device != "cpu" and phases[0].stage in ON_CPU:
        say(f"stage {phases[0].stage} learns on the CPU: --device {device} is left aside")
    whole = {phase.stage for phase in phases} & set(WHOLE)
    if whole and resume:
        raise click.UsageError(f"--resume cannot go with stage {min(whole)}, which keeps no state: leave it out")
    click.get_current_context().meta[STOP_META] = STOPPED_WHOLE if whole else f"{STOP_WORDS}; {STOP_RESUMED}"
    if any(phase.stage == "landmarks" for phase in phases):
        click.echo(train_landmark_network(phases, data, output, init, space, device, say))
        return
    if any(phase.stage == "reader" for phase in phases):
        click.echo(train_reading(phases, data, output, init, space, say))
        return
    if any(phase.stage == "retouch" for phase in phases):
        click.echo(train_retouching(phases, data, output, init, space, lpips, say))
        return
    if any(phase.stage == "matte" for phase in phases):
        click.echo(train_matting(phases, data, output, init, space, segmenter, say))
        return
    if any(phase.stage in ("factors", "banks") for phase in phases):
        click.echo(fit_factors(phases, data, output, init, space, landmarker, speech, device, quiet))
        return
    if any(phase.stage in ("audio", "pose") for phase in phases):
        click.echo(train_speech_networks(phases, data, output, init, space, say))
        return
    chosen = MotionSpace.load(space) if space else None
    features = None
    if any(phase.expression_weight for phase in phases):
        from dpe_cli.landmark_net import expression_network

        features = expression_network(expression)
    inputs = Inputs(data, output, init, chosen, perceptual, features, device, resume)
    result = run(inputs, phases, say, lambda progress: say(progress.line()))
    click.echo(result.weights)
    if not result.finished:
        raise click.exceptions.Exit(STOPPED)


def train_landmark_network(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, space: Path | None, device: str,
    say: Callable[[str], None],
) -> Path:  # fmt: skip
    """`dpe train --set stage=landmarks`: a run of one phase, with the settings that it knows."""
    if len(phases) > 1:
        raise click.UsageError("the landmark network is trained in a run of its own, of one phase")

    from dpe_cli.factors import SPACE
    from dpe_cli.landmark_net import load_net
    from dpe_cli.models import LandmarkConfig
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.train_landmarks import LandmarkTraining, at_size, train_landmarks
    from dpe_cli.weights import folder

    (phase,) = phases
    settings = {name: getattr(phase, name) for name in ("minutes", "batch", "lr", "ema", "threads", "seed")}
    net = at_size(load_net(init), LandmarkConfig().size) if init else None
    coordinates = MotionSpace.load(space or folder() / SPACE)
    return train_landmarks(data, output, LandmarkTraining(**settings), net, device, say, coordinates)


def train_reading(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, space: Path | None, say: Callable[[str], None]
) -> Path:
    """`dpe train --set stage=reader`: one phase, for the tool's own landmark network; --init goes on from a file."""
    if len(phases) > 1:
        raise click.UsageError("the reading networks are trained in a run of their own, of one phase")

    from dpe_cli.factors import SPACE
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.reader import load_nets
    from dpe_cli.train_reader import ReaderTraining, train_reader
    from dpe_cli.weights import folder

    (phase,) = phases
    names = ("minutes", "steps", "batch", "lr", "ema", "motion_weight", "threads", "seed")
    settings = ReaderTraining(**{name: getattr(phase, name) for name in names})
    coordinates = MotionSpace.load(space or folder() / SPACE)
    return train_reader(data, output, settings, coordinates, load_nets(init) if init else None, say)


def train_retouching(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, space: Path | None, lpips: Path | None,
    say: Callable[[str], None],
) -> Path:  # fmt: skip
    """`dpe train --set stage=retouch`: one phase, for the tool's own generators; --init goes on from a file."""
    if len(phases) > 1:
        raise click.UsageError("the retouching networks are trained in a run of their own, of one phase")

    from dpe_cli.factors import SPACE
    from dpe_cli.train_retouch import RetouchTraining, train_retouch
    from dpe_cli.weights import folder

    (phase,) = phases
    if phase.perceptual_weight and not lpips:
        raise click.UsageError(
            "perceptual_weight of stage retouch weighs LPIPS: name the folder of its weights with --lpips"
        )
    names = (
        "minutes", "batch", "lr", "ema", "inside_share", "perceptual_weight", "gan_weight", "eye_share", "open_share",
        "part", "begun_share", "threads", "seed",
    )  # fmt: skip
    settings = RetouchTraining(**{name: getattr(phase, name) for name in names})
    return train_retouch(data, output, settings, space or folder() / SPACE, start=init, lpips=lpips, talk=say)


def train_matting(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, space: Path | None, segmenter: Path | None,
    say: Callable[[str], None],
) -> Path:  # fmt: skip
    """`dpe train --set stage=matte`: one phase, taught by --segmenter; --init goes on from a file."""
    if len(phases) > 1:
        raise click.UsageError("the matte network is trained in a run of its own, of one phase")
    if segmenter is None:
        raise click.UsageError(
            "stage matte learns from MediaPipe: name its selfie_segmentation.tflite with --segmenter"
        )

    from dpe_cli.factors import SPACE
    from dpe_cli.matte import load_net
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.train_matte import MatteTraining, Segmenter, train_matte
    from dpe_cli.weights import folder

    (phase,) = phases
    names = ("minutes", "steps", "batch", "lr", "ema", "threads", "seed")
    settings = MatteTraining(**{name: getattr(phase, name) for name in names})
    coordinates, segment = MotionSpace.load(space or folder() / SPACE), Segmenter(segmenter)
    try:
        return train_matte(data, output, settings, coordinates, segment, load_net(init) if init else None, say)
    finally:
        segment.close()


def fit_factors(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, space: Path | None, landmarker: Path | None,
    speech: Path | None, device: str, quiet: bool,
) -> Path:  # fmt: skip
    """`dpe train --set stage=factors`, or banks: fits the factors of the weights --init, by default the tool's own."""
    if len(phases) > 1:
        raise click.UsageError("factors are fitted in a run of its own, of one phase")

    from dpe_cli.engine import Engine
    from dpe_cli.factors import Factors, read_fit
    from dpe_cli.landmark_net import NetworkLandmarker
    from dpe_cli.landmarks import Landmarker
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.train_factors import fit_factors
    from dpe_cli.weights import folder

    space = space or folder() / "motion-space.json"
    template = MotionSpace.load(space).template
    banks = phases[0].stage == "banks"
    engine, progress = Engine(init, device=device), progress_for(quiet, "clips")
    landmarks = Landmarker(landmarker) if landmarker else NetworkLandmarker()
    try:
        path = fit_factors(data, output, engine, template, landmarks, banks, speech, progress)
    finally:
        landmarks.close()
    if not quiet:
        fit = read_fit(path)
        sound = fit["banks"] and fit["banks"]["sound"]
        if banks and not sound:
            click.echo("lips: no clip has sound that tells of the mouth, so that it stays one factor", err=True)
        elif banks:
            click.echo(
                f"lips, held-out people: {sound['right']:.2f} with their sound, {sound['wrong']:.2f} with another "
                f"moment's, which is told from it in {sound['won']:.0%} of the cases",
                err=True,
            )
        for name, slider in Factors.of_fit(fit).sliders.items():
            verdict = slider.why_not_shown or ("+= only: " + slider.why_not if slider.why_not else "available")
            click.echo(f"{name:<12} R2 {slider.r2:5.2f}, shown {slider.shown:5.2f}: {verdict}", err=True)
    return path


def train_speech_networks(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, space: Path | None, say: Callable[[str], None]
) -> Path:
    """`dpe train --set stage=audio`, or pose: a run of one phase, with the settings that it knows."""
    if len(phases) > 1:
        raise click.UsageError("the speech networks are trained in runs of their own, of one phase")

    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.speech_motion import load_nets
    from dpe_cli.train_speech import SpeechTraining, train_speech
    from dpe_cli.weights import folder

    (phase,) = phases
    settings = {name: getattr(phase, name) for name in ("minutes", "steps", "batch", "lr", "ema", "threads", "seed")}
    nets = load_nets(init).requires_grad_(True) if init else None
    motion = MotionSpace.load(space or folder() / "motion-space.json")
    return train_speech(phase.stage, data, output, motion, SpeechTraining(**settings), nets, say)
