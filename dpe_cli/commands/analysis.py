"""Commands that look at a video, a report or a machine: dpe extract, faces, report, doctor, benchmark."""

import json
from pathlib import Path
from typing import Any

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FILE
from dpe_cli.commands.options import FPS, MODES, detector_options, shared_options
from dpe_cli.commands.progress import print_table, progress_for
from dpe_cli.commands.provenance import reads

SIZES = ("360p", "1080p", "2160p")  # of benchmark


@click.command(cls=Command)
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Motion file to write: NAME.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--face", "driving_face", default="largest", show_default=True, metavar="WHICH", help="As for edit.")
@click.option("--fps", **FPS)
@detector_options
@shared_options
def extract(
    video: Path, output: Path, overwrite: bool, driving_face: str, fps: str | None, detector: str,
    face_models: Path | None, weights: str | None, device: str, precision: str, backend: str, batch_size: int | None,
    quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Write the motion of the face in a video to a file that edit takes as its driving.

    Editing by the file gives the same frames as editing by the video, without the video.

    \b
    dpe extract examples/out/driving.mp4 -o motion.safetensors
    """
    from dpe_cli.drivings import extract_motion
    from dpe_cli.request import EditSettings, check_output
    from dpe_cli.video import probe

    chosen = EditSettings(driving_face=driving_face, overwrite=overwrite, fps=fps)
    check_output(output, [path for _, path in reads(click.get_current_context())], overwrite)
    probe(video, chosen.rate)  # what is wrong with either is known before the networks are loaded

    from dpe_cli.engine import Engine
    from dpe_cli.face import make_detector

    engine = Engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
    finder = make_detector(detector, face_models)
    extract_motion(video, output, engine, finder, chosen, progress_for(quiet))
    tell_result(output, output)


@click.command(cls=Command)
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
    tell_result(output, output)


@click.command(cls=Command)
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=FILE, help="Also write a sheet (.png or .jpg) with a picture of each track.")
@click.option("--overwrite", is_flag=True, help="Replace an existing sheet.")
@click.option("--fps", **FPS)
@detector_options
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table, only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a bug.")
def faces(
    video: Path,
    output: Path | None,
    overwrite: bool,
    fps: str | None,
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
    from dpe_cli.face import make_detector
    from dpe_cli.request import EditSettings, check_output
    from dpe_cli.roster import list_faces
    from dpe_cli.video import probe, read_frames
    from dpe_cli.writer import write_image

    if output:
        if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise click.UsageError(f"{output} cannot hold a sheet: name a .png or .jpg")
        check_output(output, [path for _, path in reads(click.get_current_context())], overwrite)
    rate = EditSettings(fps=fps).rate
    info, finder = probe(video, rate), make_detector(detector, face_models)
    frames = progress_for(quiet)(read_frames(video, fps=rate), info.n_frames, f"reading {video.name}")
    roster = list_faces(frames, finder)
    if output:
        write_image(output, roster.sheet())
    if not quiet:
        show_roster(roster.to_dict(), finder.name)
    if as_json:
        click.echo(json.dumps({"video": str(video), "detector": finder.name, **roster.to_dict()}, indent=1))
    elif output:
        tell_result(output, output)


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


@click.command(cls=Command)
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


@click.command(cls=Command)
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
@click.option("--compare", is_flag=True, help="Also torch, onnx and openvino, in fp32 and int8, with their PSNR.")
@click.option("--growth", is_flag=True, help="Also time and memory by frames, size and faces: many minutes.")
@click.option("--full", is_flag=True, help="Also networks at the paper's width, beside their straightforward form.")
@click.option("--detector", default="auto", show_default=True, help="As in edit.")
@click.option("--face-models", type=FILE, help="As in edit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@shared_options
def benchmark(
    sizes: tuple[str, ...], modes: tuple[str, ...], sources: tuple[str, ...], frames: int, compare: bool, growth: bool,
    full: bool, as_json: bool, quiet: bool, verbose: bool, **choice: Any,
) -> None:  # fmt: skip
    """Measure how fast this machine edits, on clips that are drawn for it.

    Each stage alone in milliseconds a frame; the networks, with their shares of the machine's own rate of matrix
    products and of its memory; whole runs with wall time, CPU time and peak memory. --growth adds runs of 100, 1000 and
    5000 frames, of all sizes, and with 1, 2 and 4 faces edited, and says what one more of each takes.

    \b
    dpe benchmark --size 1080p --frames 25
    """
    from dpe_cli.benchmark import Choice
    from dpe_cli.benchmark import benchmark as measure

    say = (lambda message: None) if quiet else (lambda message: click.echo(f"measuring {message}", err=True))
    result = measure(Choice(**choice), sizes or SIZES, modes, sources, frames, say, compare, growth, full)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    machine = result["machine"]
    click.echo(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {machine['device']}")
    rate = f"{machine['matrix_gflops']} GFLOP/s in matrix products of {machine['matrix_precision']}"
    click.echo(f"{rate}, {machine['memory_gb_per_s']} GB/s in copies")
    click.echo(f"{result['engine']['weights']}, {result['engine']['precision']}; faces: {result['detector']}")
    for title, rows in (
        ("Networks, a frame", result["networks"]),
        ("Networks at the paper's width, a frame", result.get("full_networks")),
        ("Other stages, milliseconds a frame", result["stages"]),
        ("Whole runs", result["runs"]),
        ("The start, seconds", [result["start"]]),
        ("Runtimes", result.get("runtimes")),
        ("Growth with the frames", growth and result["growth"]["frames"]),
        ("Growth with the size and the faces", growth and result["growth"]["sizes_and_faces"]),
        ("What one more takes", growth and result["growth"]["constants"]),
    ):
        if rows:
            print_table(title, rows)
