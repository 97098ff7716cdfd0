"""The commands: they parse, call and print, and decide nothing about video.

The result's path (or JSON) goes to stdout, all talk to stderr. Exit codes: 0 done, 2 usage, 3 input, 4 no usable face,
5 weights, 6 device or memory, 7 output, 10 quality, 1 unexpected, 130 interrupted. Heavy imports are inside the
commands, so that --help answers at once.
"""

import functools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli import __version__
from dpe_cli.errors import DPEError, QualityError

if TYPE_CHECKING:
    from dpe_cli.edit import Driving, Edit, Edits
    from dpe_cli.recipe import Phase

MODES = ("exp", "pose", "both")
PROTOCOLS = ("same", "cross", "video")  # of eval
SIZES = ("360p", "1080p", "2160p")  # of benchmark
INTERRUPTED = 130
STOPPED = 75  # by SIGTERM; can be resumed
OUT_OF_MEMORY = 6
EDIT_KEYS = ("face", "driving", "exp-driving", "pose-driving", "mode", "strength")
TABLE_WIDTH = 120  # where there is no terminal
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


WEIGHTS = {"metavar": "PATH|NAME", "help": "Checkpoint: our .safetensors, an official .pt, or a name."}


def shared_options(function: Callable) -> Callable:
    """Options of commands that run one checkpoint: --weights and `machine_options`."""
    return click.option("--weights", **WEIGHTS)(machine_options(function))


def detector_options(function: Callable) -> Callable:
    """Options of every command that looks for faces: --detector, --face-models."""
    function = click.option("--face-models", type=FILE, help="Folder or file of the detector's models.")(function)
    choices = "auto, centerface, insightface, yunet or mediapipe."
    return click.option("--detector", default="auto", show_default=True, help=choices)(function)


def machine_options(function: Callable) -> Callable:
    """Options of every command that runs the networks: --device, --precision, --batch-size, -q, -v."""
    options = [
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
@click.option("-d", "--driving", type=FILE, help="Video, still or motion file whose expression or pose is transferred.")
@click.option("--exp-driving", type=FILE, help="Driving of the expression alone.")
@click.option("--pose-driving", type=FILE, help="Driving of the pose alone; with --exp-driving: two drivers.")
@click.option("-m", "--mode", type=click.Choice(MODES), help="What --driving gives.  [default: exp]")
@click.option("-o", "--output", type=FILE, help="Where to write.  [default: SOURCE_MODE.mp4 beside the source]")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option("--strength", type=click.FloatRange(0, 3), default=1.0, show_default=True, metavar="F")
@click.option("--curve", type=FILE, help="CSV of keyframes, seconds,strength; in place of --strength.")
@click.option(
    "--motion",
    type=click.Choice(["absolute", "relative"]),
    default="absolute",
    show_default=True,
    help="Take over the driving's motion, or add its change against its neutral frame to the source's.",
)
@click.option(
    "--neutral-frame", **SECONDS, help="Neutral frame of the driving, for relative motion.  [default: found by itself]"
)
@click.option(
    "--smooth",
    type=click.FloatRange(0, 3),
    default=1.0,
    show_default=True,
    metavar="F",
    help="Smoothing over time of face boxes and driving motion, times the usual; 0 is none.",
)
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
    "--mask",
    type=click.Choice(["gaussian", "ellipse", "landmarks", "parsing"]),
    default="gaussian",
    show_default=True,
    help="What is pasted back: the crop's square, an oval, the face's own oval, or what is face and hair.",
)
@click.option(
    "--feather",
    type=click.FloatRange(1, 50),
    metavar="PERCENT",
    help="Width of the mask's soft edge, of the face's height.  [default: 16; parsing 5]",
)
@click.option(
    "--colour-match/--no-colour-match",
    default=True,
    show_default=True,
    help="Take the edit to the source's colours, by what they are along the mask's edge.",
)
@click.option(
    "--detail/--no-detail", default=True, show_default=True, help="Keep the source's detail where nothing moved."
)
@click.option("--parsing", type=FILE, help="ONNX file of a face parsing network (BiSeNet), for --mask parsing.")
@click.option("--landmarker", type=FILE, help="MediaPipe's face_landmarker.task, for --mask landmarks.")
@click.option("--enhancer", type=FILE, help="ONNX file of a face enhancer (GFPGAN, CodeFormer) run on the edited face.")
@click.option(
    "--fail-if",
    "seam_limit",
    callback=lambda ctx, param, value: seam_limit(value),
    metavar="'seam>X'",
    help="Refuse the result, with exit code 10, if a frame's seam score is above X.",
)
@click.option(
    "--face",
    default="largest",
    show_default=True,
    metavar="WHICH",
    help="largest, left, right, center, a number from 0 (left to right), track:NUMBER of `dpe faces`, or a picture.",
)
@click.option(
    "--edit",
    "several",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="One of several edits in one pass; repeat it. Keys: face, driving, mode, strength, exp-driving, pose-driving.",
)
@click.option("--driving-face", default="largest", show_default=True, metavar="WHICH", help="The same for the driving.")
@detector_options
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
    several: tuple[str, ...],
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
    dpe edit -s two.mp4 --edit face=left,driving=smile.mp4 --edit face=right,driving=frown.mp4,strength=0.5
    """
    if several:
        if driving or exp_driving or pose_driving or mode:
            raise click.UsageError("--edit names its own drivers and mode: leave --driving and --mode out")
        drivers = choose_edits(several, settings["face"], settings["strength"])
    else:
        drivers = choose_driving(driving, exp_driving, pose_driving, mode)
    if as_json and str(output) == "-":
        raise click.UsageError("--json and the video cannot both go to standard output")
    if settings["end"] is not None and settings["end"] <= (settings["start"] or 0):
        raise click.UsageError("--end must be after --start")
    if settings["neutral_frame"] is not None and settings["motion"] != "relative":
        raise click.UsageError("--neutral-frame needs --motion relative")
    if settings["curve"] and given("strength"):
        raise click.UsageError("--curve stands in place of --strength: give one of them")

    from dpe_cli.container import PIPE, spooled
    from dpe_cli.edit import EditSettings, check_request, default_output, edit_video
    from dpe_cli.motion import read_curve

    settings["curve"] = settings["curve"] and read_curve(settings["curve"])
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
    try:
        done = edit_video(
            source, drivers, output, engine, finder, chosen, preview=preview, progress=progress_for(quiet), say=say
        )
    except QualityError as error:
        if report:
            error.report.write(report)
        raise
    if report:
        done.write(report)
    say(closing_words(done.summary()))
    if output != PIPE:
        click.echo(json.dumps(done.summary(), indent=1, default=str) if as_json else output)


@cli.command()
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Motion file to write: NAME.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--face", "driving_face", default="largest", show_default=True, metavar="WHICH", help="As for edit.")
@detector_options
@shared_options
def extract(
    video: Path, output: Path, overwrite: bool, driving_face: str, detector: str, face_models: Path | None,
    weights: str | None, device: str, precision: str, batch_size: int | None, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Write the motion of the face in a video to a file that edit takes as its driving.

    Editing by the file gives the same frames as editing by the video, without the video.

    \b
    dpe extract examples/out/driving.mp4 -o motion.safetensors
    """
    from dpe_cli.edit import EditSettings, check_output, extract_motion

    check_output(output, [video], overwrite)

    from dpe_cli.engine import Engine
    from dpe_cli.face import make_detector

    engine = Engine(weights, device=device, precision=precision, batch_size=batch_size)
    finder = make_detector(detector, face_models)
    chosen = EditSettings(driving_face=driving_face, overwrite=overwrite)
    extract_motion(video, output, engine, finder, chosen, progress_for(quiet))
    click.echo(output)


@cli.command()
@click.argument("report", type=FILE)
@click.option("-o", "--output", type=FILE, help="Where to write.  [default: REPORT.html beside the report]")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
def report(report: Path, output: Path | None, overwrite: bool) -> None:
    """Make a page of the report of an edit: plots over time, and the worst frames as pictures.

    \b
    dpe report report.json -o page.html
    """
    from dpe_cli.page import write_page

    output = output or report.with_suffix(".html")
    write_page(report, output, overwrite)
    click.echo(output)


@cli.command()
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=FILE, help="Also write a sheet (.png or .jpg) with a picture of each track.")
@click.option("--overwrite", is_flag=True, help="Replace an existing sheet.")
@detector_options
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table, only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a bug.")
def faces(
    video: Path,
    output: Path | None,
    overwrite: bool,
    detector: str,
    face_models: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """List the faces of a video: each track with its person, times, size and confidence.

    A track is one face in one shot. `dpe edit --face track:NUMBER` edits the person of a track from there on, if both
    are run with the same detector.

    \b
    dpe faces talk.mp4 -o faces.png
    """
    from dpe_cli.edit import check_output
    from dpe_cli.face import make_detector
    from dpe_cli.roster import list_faces
    from dpe_cli.video import probe, read_frames, write_image

    if output:
        if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise click.UsageError(f"{output} cannot hold a sheet: name a .png or .jpg")
        check_output(output, [video], overwrite)
    info, finder = probe(video), make_detector(detector, face_models)
    frames = progress_for(quiet)(read_frames(video), info.n_frames, f"reading {video.name}")
    roster = list_faces(frames, finder)
    if output:
        write_image(output, roster.sheet())
    if not quiet:
        show_roster(roster.to_dict(), finder.name)
    if as_json:
        click.echo(json.dumps({"video": str(video), "detector": finder.name, **roster.to_dict()}, indent=1))
    elif output:
        click.echo(output)


@cli.command()
@click.option(
    "--size", "sizes", multiple=True, type=click.Choice(SIZES), help="Only this size; repeatable.  [default: all]"
)
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(MODES), default=["exp"], show_default=True, help="Repeatable."
)
@click.option(
    "--source", "sources", multiple=True, type=click.Choice(["video", "still"]), default=["video"], show_default=True,
    help="What is edited; repeatable.",
)  # fmt: skip
@click.option("--frames", type=click.IntRange(min=8), default=50, show_default=True, help="Length of the drawn clips.")
@click.option("--detector", default="auto", show_default=True, help="As in edit.")
@click.option("--face-models", type=FILE, help="As in edit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@shared_options
def benchmark(
    sizes: tuple[str, ...], modes: tuple[str, ...], sources: tuple[str, ...], frames: int, as_json: bool, quiet: bool,
    verbose: bool, **choice: Any,
) -> None:  # fmt: skip
    """Measure how fast this machine edits, on clips that are drawn for it.

    Each stage alone in milliseconds a frame; the networks, with their shares of the machine's own rate of matrix
    products and of its memory; whole runs with wall time, CPU time and peak memory.

    \b
    dpe benchmark --size 1080p --frames 25
    """
    from dpe_cli.benchmark import Choice
    from dpe_cli.benchmark import benchmark as measure

    say = (lambda message: None) if quiet else (lambda message: click.echo(f"measuring {message}", err=True))
    result = measure(Choice(**choice), sizes or SIZES, modes, sources, frames, say)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    machine = result["machine"]
    click.echo(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {machine['device']}")
    click.echo(f"{machine['matrix_gflops']} GFLOP/s in matrix products, {machine['memory_gb_per_s']} GB/s in copies")
    click.echo(f"{result['engine']['weights']}, {result['engine']['precision']}; faces: {result['detector']}")
    for title, rows in (
        ("Networks, a frame", result["networks"]),
        ("Other stages, milliseconds a frame", result["stages"]),
        ("Whole runs", result["runs"]),
    ):
        print_table(title, rows)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of the same keys, on stdout."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for key, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(key.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


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
@click.argument("videos", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the dataset; an existing one is continued.")
@click.option("--landmarker", type=FILE, help="MediaPipe's face_landmarker.task.  [default: our own network]")
@click.option("--identity", type=FILE, help="Recognition network (.onnx), or an insightface pack with one.")
@click.option("--space", type=FILE, help="motion-space.json: also store size and place of the head.")
@detector_options
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
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
    type=click.FloatRange(min=0),
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

    VIDEOS are videos, folders of videos, CSV files (column clip, and identity_cluster if known) of square face clips,
    or folders with an LMDB in the layout of the authors' training sets. Each clip left out is told with the reason. An
    interrupted run goes on when it is started again. Prints the path of the dataset's index.csv.

    \b
    dpe prepare talks/ interview.mp4 -o dataset
    """
    from dpe_cli.prepare import PrepareSettings
    from dpe_cli.prepare import prepare as run

    def say(message: str) -> None:
        if not quiet:
            click.echo(message, err=True)

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


@cli.command()
@click.option("--config", "recipe", type=FILE, help="Recipe: a TOML file with settings and phases.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a setting; PHASE.NAME=VALUE in one."
)
@click.option(
    "--budget", type=click.FloatRange(min=0, min_open=True), metavar="MINUTES", help="Of all phases together."
)
@click.option("--data", type=FOLDER, required=True, help="Folder of prepared clips.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the run.")
@click.option("--init", type=FILE, help="Weights to start from; those of half the size are grown by one level.")
@click.option("--space", type=FILE, help="motion-space.json of the weights to start from.")
@click.option("--perceptual", type=FILE, help="VGG16 or VGG19 features (safetensors, torchvision's names).")
@click.option("--expression", type=FILE, help="Network for L_E (TorchScript).  [default: our landmark network]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in the output folder, exactly.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only errors.")
def train(
    recipe: Path | None, changes: tuple[str, ...], budget: float | None, data: Path, output: Path, init: Path | None,
    space: Path | None, perceptual: Path | None, expression: Path | None, device: str, resume: bool, quiet: bool,
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

    def say(message: str) -> None:
        if not quiet:
            click.echo(message, err=True)

    phases = read_recipe(recipe, changes, budget)
    if any(phase.stage == "landmarks" for phase in phases):
        click.echo(train_landmark_network(phases, data, output, init, device, say))
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


@cli.command("eval")
@click.option("--data", type=FOLDER, required=True, help="Folder of prepared clips; only held-out people are used.")
@click.option("--weights", multiple=True, **{**WEIGHTS, "help": WEIGHTS["help"] + " Several: side by side."})
@click.option("--protocol", "protocols", type=click.Choice(PROTOCOLS), multiple=True, help="[default: all three]")
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
    space: Path | None, output: Path, overwrite: bool, device: str, precision: str, batch_size: int | None,
    quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measure checkpoints on people they were not trained on, beside two baselines that need no weights.

    Protocols: same (one person), cross (driven by another person), video (the same, pasted back into the frames).

    \b
    dpe eval --data prepared -o scores
    """
    from dpe_cli.edit import check_output
    from dpe_cli.errors import InputError
    from dpe_cli.evaluate import evaluate
    from dpe_cli.extractors import ArcFace, Extractors, Lpips
    from dpe_cli.landmark_net import NetworkLandmarker
    from dpe_cli.landmarks import Landmarker
    from dpe_cli.protocols import Plan, systems_of
    from dpe_cli.scoreboard import JSON_NAME, PAGE_NAME, terminal_tables, write

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
    if not space.is_file():
        raise InputError(f"{space}: no such motion space", "name a motion-space.json with --space")
    extractors = Extractors(
        Landmarker(landmarker) if landmarker else NetworkLandmarker(),
        ArcFace(identity) if identity else None,
        Lpips(lpips, lpips_network, device) if lpips else None,
    )
    engines = [Engine(one, device=device, precision=precision, batch_size=batch_size) for one in weights or (None,)]
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


def train_landmark_network(
    phases: list["Phase"], data: Path, output: Path, init: Path | None, device: str, say: Callable[[str], None]
) -> Path:
    """`dpe train --set stage=landmarks`: a run of one phase, with the settings that it knows."""
    if len(phases) > 1:
        raise click.UsageError("the landmark network is trained in a run of its own, of one phase")

    from dpe_cli.landmark_net import load_net
    from dpe_cli.train_landmarks import LandmarkTraining, train_landmarks

    (phase,) = phases
    settings = {name: getattr(phase, name) for name in ("minutes", "batch", "lr", "ema", "threads", "seed")}
    net = load_net(init).requires_grad_(True) if init else None
    return train_landmarks(data, output, LandmarkTraining(**settings), net, device, say)


# What the options of edit mean


def given(option: str) -> bool:
    """Whether the user named an option of the current command."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not click.core.ParameterSource.DEFAULT


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


def seam_limit(text: str | None) -> float | None:
    """The X of --fail-if 'seam>X'."""
    if text is None:
        return None
    name, _, number = text.replace(" ", "").partition(">")
    try:
        limit = float(number)
    except ValueError:
        limit = -1.0
    if name != "seam" or not limit >= 0:
        raise click.BadParameter("it is 'seam>X', X a number from 0, in quotes: > means something to a shell")
    return limit


def choose_edits(several: Iterable[str], face: str, strength: float) -> "Edits":
    """All of `--edit`; `face` and `strength` are for those that name none. Raises click.UsageError."""
    from dpe_cli.edit import Edits

    return Edits(tuple(parse_edit(text, face, strength) for text in several))


def parse_edit(text: str, face: str, strength: float) -> "Edit":
    """One `--edit face=REF,driving=FILE,mode=exp,strength=1`; values may hold commas. Raises click.UsageError."""
    pairs = [part.partition("=") for part in re.split(rf",(?=(?:{'|'.join(EDIT_KEYS)})=)", text)]
    given = {key: value for key, _, value in pairs}
    wrong = [key for key, _, value in pairs if key not in EDIT_KEYS or not value]
    if wrong or len(given) < len(pairs):
        what = f"{wrong[0]!r} is not KEY=VALUE" if wrong else "a key comes twice"
        raise click.UsageError(f"--edit {text}: {what}; the keys are {', '.join(EDIT_KEYS)}")
    try:
        strength = click.FloatRange(0, 3).convert(given.get("strength", strength), None, None)
        mode = given.get("mode") and click.Choice(MODES).convert(given["mode"], None, None)
        files = [Path(given[key]) if key in given else None for key in ("driving", "exp-driving", "pose-driving")]
        driving = choose_driving(*files, mode)
    except click.UsageError as error:
        raise click.UsageError(f"--edit {text}: {error.message.replace('--', '')}") from None

    from dpe_cli.edit import Edit

    return Edit(driving, given.get("face", face), strength)


def show_roster(roster: dict[str, Any], detector: str) -> None:
    """The tracks as a table on stderr, and how they were told apart."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("track", "person", "shot", "from", "to", "frames", "size", "confidence"):
        table.add_column(name, justify="right")
    for track in roster["tracks"]:
        times = (f"{track[end]:.2f} s" for end in ("start", "end"))
        means = f"{track['size']:.0f} px", f"{track['confidence']:.2f}"
        counts = (str(track[name]) for name in ("person", "shot"))
        table.add_row(f"track:{track['track']}", *counts, *times, str(track["frames"]), *means)
    console = Console(stderr=True)
    console.print(table)
    by = "the recognition network" if roster["recognition_network"] else "colours alone, which is a guess"
    short = roster["short_tracks_left_out"]
    words = f"{len(roster['cuts'])} cuts; faces by {detector}, persons by {by}"
    console.print(words + (f"; {short} tracks of one or two frames left out" if short else ""), highlight=False)


def closing_words(summary: dict[str, Any]) -> str:
    """The last line for a person: what was done, how fast."""
    counts, quality = summary["counts"], summary["self_reconstruction"]
    words = [f"{counts['edited']} frames edited, {counts['passed']} passed"]
    words += [f"{number} x {reason}" for reason, number in counts["reasons"].items()]
    words.append(f"{summary['seconds']:.1f} s ({summary['frames_per_second']} frames/s)")
    if quality:
        words.append(f"self-reconstruction {quality['psnr_db']} dB")
    if seam := summary["seam"]:
        words.append(f"seam {seam['mean']} (worst {seam['worst']} in frame {seam['worst_frame']})")
    return ", ".join(words)


# Progress


def progress_for(quiet: bool, unit: str = "frames") -> Callable[[Iterable, int | None, str], Iterator]:
    """Nothing, a bar on a terminal, or lines in a log; `unit` is what the items are called."""
    if quiet:
        return lambda items, total, what: iter(items)
    return functools.partial(progress_bar if sys.stderr.isatty() else progress_lines, unit=unit)


def progress_bar(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on under a bar with their number, how many a second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, rate="")
        for count, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=count, rate=pace(count / max(time.monotonic() - started, 1e-6), unit))


def progress_lines(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and writes a line every five seconds and at each tenth of the way."""
    started = last = time.monotonic()
    count = shown = 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS or (total and count - shown >= total / 10 and now - last >= 1):
            click.echo(progress_line(what, count, total, now - started, unit), err=True)
            last, shown = now, count
    click.echo(progress_line(what, count, count, time.monotonic() - started, unit), err=True)


def progress_line(what: str, count: int, total: int | None, seconds: float, unit: str = "frames") -> str:
    """For instance: editing talk.mp4: 40 of 120 frames, 8.1 frames/s, 10 s left"""
    rate = count / max(seconds, 1e-6)
    done = f"{count} of {total} {unit}" if total else f"{count} {unit}"
    left = f", {max(total - count, 0) / rate:.0f} s left" if total and rate else ""
    return f"{what}: {done}, {pace(rate, unit)}{left}"


def pace(rate: float, unit: str) -> str:
    """A rate in items a second, told by the minute where it is slow."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"
