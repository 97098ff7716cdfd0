"""The commands: they parse, call and print, and decide nothing about video.

The result's path (or JSON) goes to stdout, all talk to stderr. Exit codes: 0 done, 2 usage, 3 input, 4 no usable face,
5 weights, 6 device or memory, 7 output, 1 unexpected, 130 interrupted. Heavy imports are inside the commands, so that
--help answers at once.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli import __version__
from dpe_cli.errors import DPEError

if TYPE_CHECKING:
    from dpe_cli.edit import Driving

MODES = ("exp", "pose", "both")
INTERRUPTED = 130
OUT_OF_MEMORY = 6
LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal
FILE = click.Path(path_type=Path)  # a missing input is our error 3, not click's 2
SECONDS = {"type": click.FloatRange(min=0), "metavar": "SECONDS"}
FOLDER = click.Path(path_type=Path, file_okay=False)


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class Command(click.Command):
    """A command whose failures become one line and the right exit code; -v adds the traceback of a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except DPEError as error:
            raise Failure(str(error), error.exit_code) from error
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing was left half-written", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except MemoryError as error:
            raise Failure("the memory is used up; use a smaller --batch-size", OUT_OF_MEMORY) from error
        except Exception as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            what = f"unexpected {type(error).__name__}: {error}"
            raise Failure(what if ctx.params.get("verbose") else f"{what}; run with -v for the traceback", 1) from error


class Cli(click.Group):
    """The group of our commands."""

    command_class = Command
    group_class = type


def shared_options(function: Callable) -> Callable:
    """Options of every command that runs the networks: --weights, --device, --precision, --batch-size, -q, -v."""
    options = [
        click.option(
            "--weights", metavar="PATH|NAME", help="Checkpoint: our .safetensors, an official .pt, or a name."
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            default="auto",
            show_default=True,
            help="Number format of the networks.",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), help="Frames at once.  [default: by device]"),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only errors."),
        click.option("-v", "--verbose", is_flag=True, help="Say more; show the traceback of a bug."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dpe")
def cli() -> None:
    """Edit the expression and the pose of a person in a video.

    \b
    dpe edit --source talk.mp4 --driving smile.mp4 -o talk-smiling.mp4
    """


@cli.command()
@click.option("-s", "--source", type=FILE, required=True, help="Video, or still image, of the person to edit.")
@click.option("-d", "--driving", type=FILE, help="Video or still image whose expression or pose is transferred.")
@click.option("--exp-driving", type=FILE, help="Driving of the expression alone.")
@click.option("--pose-driving", type=FILE, help="Driving of the pose alone; with --exp-driving: two drivers.")
@click.option("-m", "--mode", type=click.Choice(MODES), help="What --driving gives.  [default: exp]")
@click.option("-o", "--output", type=FILE, help="Where to write.  [default: SOURCE_MODE.mp4 beside the source]")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option("--strength", type=click.FloatRange(0, 3), default=1.0, show_default=True, metavar="F")
@click.option(
    "--driving-end",
    type=click.Choice(["hold", "loop", "pingpong", "trim"]),
    default="pingpong",
    show_default=True,
    help="When the driving is shorter than the source.",
)
@click.option(
    "--on-no-face",
    type=click.Choice(["pass", "hold", "fail"]),
    default="pass",
    show_default=True,
    help="A source frame without a face: leave it untouched, edit at the last box, or stop.",
)
@click.option(
    "--paste/--no-paste",
    default=None,
    help="Put the face back into the full frame, or write the crop.  [default: paste for exp, crop for pose and both]",
)
@click.option(
    "--face",
    default="largest",
    show_default=True,
    metavar="WHICH",
    help="largest, left, right, center, a number from 0 (left to right), or a picture of the person.",
)
@click.option("--driving-face", default="largest", show_default=True, metavar="WHICH", help="The same for the driving.")
@click.option(
    "--detector", default="auto", show_default=True, help="auto, centerface, insightface, yunet or mediapipe."
)
@click.option("--face-models", type=FILE, help="Folder or file of the detector's models.")
@click.option(
    "--audio",
    default="auto",
    metavar="WHICH",
    help="source, driving, none or a file.  [default: source; driving where the source is a still]",
)
@click.option("--start", **SECONDS, help="Begin at this second of the source.")
@click.option("--end", **SECONDS, help="End at this second of the source.")
@click.option(
    "--codec",
    type=click.Choice(["h264", "hevc", "prores", "ffv1", "png"]),
    help="Of the output.  [default: h264; hevc for more than 8 bits; prores, ffv1 for such sources and for alpha]",
)
@click.option("--crf", type=click.IntRange(0, 51), help="Quality of h264 and hevc, less is better.  [default: 17, 18]")
@click.option("--preset", metavar="NAME", help="Speed of h264 and hevc, ultrafast to veryslow.  [default: medium]")
@click.option("--nvenc/--no-nvenc", default=None, help="Encode on the graphics card.  [default: where it can]")
@click.option("--fps", metavar="RATE", help="Rate of image sequences like in_%06d.png.  [default: 25]")
@click.option(
    "--pipe",
    type=click.Choice(["nut", "y4m"]),
    default="nut",
    show_default=True,
    help="What is written to standard output with -o -.",
)
@click.option("--preview", type=FILE, help="Also write source | driving | result side by side.")
@click.option("--report", type=FILE, help="Also write a JSON report with each frame's fate.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, less the list of frames, instead of the path.")
@shared_options
def edit(
    source: Path,
    driving: Path | None,
    exp_driving: Path | None,
    pose_driving: Path | None,
    mode: str | None,
    output: Path | None,
    preview: Path | None,
    report: Path | None,
    as_json: bool,
    weights: str | None,
    device: str,
    precision: str,
    detector: str,
    face_models: Path | None,
    batch_size: int | None,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Give the face in a source the expression, the pose or both of a driving video.

    Strength 0 keeps the source's own motion, 1 takes the driving's.

    \b
    dpe edit --source examples/out/source.mp4 --driving examples/out/driving.mp4 -o edited.mp4
    """
    drivers = choose_driving(driving, exp_driving, pose_driving, mode)
    if as_json and str(output) == "-":
        raise click.UsageError("--json and the video cannot both go to standard output")
    if settings["end"] is not None and settings["end"] <= (settings["start"] or 0):
        raise click.UsageError("--end must be after --start")

    from dpe_cli.container import PIPE, spooled
    from dpe_cli.edit import EditSettings, check_request, default_output, edit_video

    chosen = EditSettings(**settings)
    output = output or default_output(source, drivers)
    source = click.get_current_context().with_resource(spooled(source, sys.stdin.buffer))
    check_request(source, drivers, output, chosen, preview, report)

    from dpe_cli.detectors import RESEARCH_ONLY
    from dpe_cli.engine import Engine  # torch takes seconds to import, so what can fail has failed before
    from dpe_cli.face import make_detector

    say = (lambda message: None) if quiet else (lambda message: click.echo(message, err=True))
    engine = Engine(weights, device=device, precision=precision, batch_size=batch_size)
    finder = make_detector(detector, face_models)
    if finder.name.startswith("insightface"):
        say(f"{finder.name}: {RESEARCH_ONLY}")
    if verbose:
        say(f"networks: {engine.description}; faces: {finder.name}; {drivers}; {chosen}")
    done = edit_video(
        source, drivers, output, engine, finder, chosen, preview=preview, progress=progress_for(quiet), say=say
    )
    if report:
        done.write(report)
    say(closing_words(done.summary()))
    if output != PIPE:
        click.echo(json.dumps(done.summary(), indent=1, default=str) if as_json else output)


@cli.group(cls=Cli)
def weights() -> None:
    """Checkpoints: which there are, what is in them, whether they are whole.

    \b
    dpe weights list
    """


@weights.command("list")
def list_weights() -> None:
    """List the checkpoints that have a name, with their licences.

    \b
    dpe weights list
    """
    from dpe_cli.weights import list_checkpoints

    for checkpoint, path in list_checkpoints():
        click.echo(f"{checkpoint.name:<10} {path or 'not on this machine'}")
        click.echo(f"{'':<10} {checkpoint.purpose}; licence: {checkpoint.licence}; {checkpoint.page}")


@weights.command("info")
@click.argument("weights", metavar="[NAME|PATH]", required=False)
def weights_info(weights: str | None) -> None:
    """Print what a checkpoint holds, as JSON: sizes, sha256, how it was made.

    \b
    dpe weights info compact
    """
    from dpe_cli.weights import info

    click.echo(json.dumps(info(weights), indent=1, default=str))


@weights.command("verify")
@click.argument("weights", metavar="[NAME|PATH]...", nargs=-1)
def verify_weights(weights: tuple[str, ...]) -> None:
    """Check that checkpoints are whole and what they say they are.

    \b
    dpe weights verify compact
    """
    from dpe_cli.weights import verify

    for name in weights or (None,):
        click.echo(verify(name))


@weights.command("fetch")
@click.argument("name")
def fetch_weights(name: str) -> None:
    """Download a face model pack with insightface's own downloader, after printing its licence.

    \b
    dpe weights fetch buffalo_s
    """
    from dpe_cli.weights import fetch

    click.echo(fetch(name, lambda message: click.echo(message, err=True)))


@cli.command()
def doctor() -> None:
    """Look at what dpe needs on this machine: what works, what is missing, how to mend it.

    Exit code 1 if an edit could not run.

    \b
    dpe doctor
    """
    from dpe_cli.doctor import examine, healthy

    checks = examine()
    for check in checks:
        click.echo(f"{'ok' if check.ok else 'FAILS':<6} {check.name}: {check.detail}")
        if check.remedy:
            click.echo(f"{'':<6} -> {check.remedy}")
    if not healthy(checks):
        raise click.exceptions.Exit(1)


@cli.command()
@click.option("--data", type=FOLDER, required=True, help="Folder of prepared clips.")
@click.option("--clips", type=FILE, help="CSV (columns clip, identity_cluster) of videos to prepare into --data first.")
@click.option("--landmarker", type=FILE, help="MediaPipe's face_landmarker.task, to prepare clips with.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the run.")
@click.option("--init", type=FILE, help="Weights to start from; those of half the size are grown by one level.")
@click.option("--subtract-own", is_flag=True, help="Begin with an expression head that subtracts the source's own.")
@click.option("--size", type=click.IntRange(16), default=256, show_default=True, help="Side of the crops in pixels.")
@click.option("--space", type=FILE, help="motion-space.json of the weights to start from.")
@click.option("--perceptual", type=FILE, help="VGG16 or VGG19 features (safetensors, torchvision's names).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="A setting of the training, e.g. lr=0.003.")
def train(
    data: Path, clips: Path | None, landmarker: Path | None, output: Path, init: Path | None, subtract_own: bool,
    size: int, space: Path | None, perceptual: Path | None, device: str, changes: tuple[str, ...],
) -> None:  # fmt: skip
    """Train the networks on prepared clips. Several processes: start it with torchrun.

    \b
    dpe train --data prepared --clips faces/index.csv --landmarker face_landmarker.task -o run --set minutes=30
    """
    from dpe_cli.dataset import prepare
    from dpe_cli.initialise import start
    from dpe_cli.models import DPEConfig
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.train import configure
    from dpe_cli.train import train as run

    def say(message: str) -> None:
        click.echo(message, err=True)

    if clips:
        if landmarker is None:
            raise click.UsageError("--clips needs --landmarker")
        prepare(clips, landmarker, data, say)
    model, small = start(init, DPEConfig.compact(size), subtract=subtract_own)
    chosen = MotionSpace.load(space) if space else None
    click.echo(run(data, output, model, configure(changes), chosen, perceptual, small, device, say))


# What the options of edit mean


def choose_driving(both: Path | None, expression: Path | None, pose: Path | None, mode: str | None) -> "Driving":
    """What the four options mean together. Raises click.UsageError where they contradict each other."""
    if both and (expression or pose):
        raise click.UsageError("--driving cannot go with --exp-driving or --pose-driving")
    if not (both or expression or pose):
        raise click.UsageError("give --driving, --exp-driving or --pose-driving")
    if both:
        mode = mode or "exp"
        expression, pose = (None if mode == "pose" else both), (None if mode == "exp" else both)
    given = "both" if expression and pose else "exp" if expression else "pose"
    if mode and mode != given:
        raise click.UsageError(f"--mode {mode} does not go with the drivers given: they make it {given}")

    from dpe_cli.edit import Driving

    return Driving(expression, pose)


def closing_words(summary: dict[str, Any]) -> str:
    """The last line for a person: what was done, how fast."""
    counts, quality = summary["counts"], summary["self_reconstruction"]
    words = [f"{counts['edited']} frames edited, {counts['passed']} passed"]
    words += [f"{number} x {reason}" for reason, number in counts["reasons"].items()]
    words.append(f"{summary['seconds']:.1f} s ({summary['frames_per_second']} frames/s)")
    if quality:
        words.append(f"self-reconstruction {quality['psnr_db']} dB")
    return ", ".join(words)


# Progress


def progress_for(quiet: bool) -> Callable[[Iterable, int | None, str], Iterator]:
    """Nothing, a bar on a terminal, or lines in a log."""
    if quiet:
        return lambda items, total, what: iter(items)
    return progress_bar if sys.stderr.isatty() else progress_lines


def progress_bar(items: Iterable, total: int | None, what: str) -> Iterator:
    """Passes the items on under a bar with frames, frames a second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} frames/s")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, rate=0.0)
        for count, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=count, rate=count / max(time.monotonic() - started, 1e-6))


def progress_lines(items: Iterable, total: int | None, what: str) -> Iterator:
    """Passes the items on and writes a line every five seconds and at each tenth of the way."""
    started = last = time.monotonic()
    count = shown = 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS or (total and count - shown >= total / 10 and now - last >= 1):
            click.echo(progress_line(what, count, total, now - started), err=True)
            last, shown = now, count
    click.echo(progress_line(what, count, count, time.monotonic() - started), err=True)


def progress_line(what: str, count: int, total: int | None, seconds: float) -> str:
    """For instance: editing talk.mp4: 40 of 120 frames, 8.1 frames/s, 10 s left"""
    rate = count / max(seconds, 1e-6)
    frames = f"{count} of {total} frames" if total else f"{count} frames"
    left = f", {max(total - count, 0) / rate:.0f} s left" if total and rate else ""
    return f"{what}: {frames}, {rate:.1f} frames/s{left}"
