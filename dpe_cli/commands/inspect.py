"""dpe inspect."""

import json
from pathlib import Path

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FILE, FOLDER, check_named
from dpe_cli.commands.options import FPS, detector_options, shared_options
from dpe_cli.commands.progress import print_table, progress_for
from dpe_cli.commands.provenance import reads

NAMES = ("factors.csv", "factors.svg", "sliders.png")


@click.command(cls=Command)
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=FOLDER, help="Folder to write to.  [default: VIDEO_factors beside the video]")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option("--face", default="largest", show_default=True, metavar="WHICH", help="As for edit.")
@click.option("--fps", **FPS)
@click.option("--sheet/--no-sheet", default=True, show_default=True, help="Also draw the sheet of sliders.")
@click.option("--json", "as_json", is_flag=True, help="Print the sliders as JSON instead of a table.")
@detector_options
@shared_options
def inspect(
    video: Path, output: Path | None, overwrite: bool, face: str, fps: str | None, sheet: bool, as_json: bool,
    detector: str, face_models: Path | None, weights: str | None, device: str, precision: str, backend: str,
    batch_size: int | None, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measure what a face does, and show what `dpe edit --set` would do to it.

    Writes factors.csv and factors.svg, the measures over time, and sliders.png, the face with each slider at -2 to +2
    standard deviations. Lists the sliders with their units, their range and how well held-out people bear them out.
    VIDEO may be a picture.

    \b
    dpe inspect examples/out/source.mp4 -o factors
    """
    from dpe_cli.errors import OutputError
    from dpe_cli.factors import Factors
    from dpe_cli.motion_space import MotionSpace
    from dpe_cli.request import EditSettings, check_output
    from dpe_cli.video import probe
    from dpe_cli.weights import folder
    from dpe_cli.writer import write_image

    rate = EditSettings(fps=fps).rate
    info = probe(video, rate)
    if not output:
        check_named(click.get_current_context(), video)
    output = output or video.with_name(f"{video.stem}_factors")
    for name in NAMES if sheet else NAMES[:2]:
        if output.is_dir():
            check_output(output / name, [path for _, path in reads(click.get_current_context())], overwrite)
    factors = Factors.load(weights)
    if sheet:
        factors.check_fitted()

    from dpe_cli.engine import Engine
    from dpe_cli.face import make_detector
    from dpe_cli.inspection import follow_face, slider_sheet, write_course
    from dpe_cli.landmark_net import NetworkLandmarker

    template, finder = MotionSpace.load(folder() / "motion-space.json").template, make_detector(detector, face_models)
    engine = Engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
    course = follow_face(video, finder, NetworkLandmarker(), template, engine.size, face, progress_for(quiet), rate)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_course(course, output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror})", "name another folder") from error
    if sheet:
        write_image(output / NAMES[2], slider_sheet(course.crop, engine, factors), marked=True)
    rows = [
        {
            "slider": name, "unit": slider.unit, "from": round(slider.low, 3), "to": round(slider.high, 3),
            "R2": round(slider.r2, 2), "shown": round(slider.shown, 2),
            "available": "no" if slider.why_not_shown else "+= only" if slider.why_not else "yes",
        }
        for name, slider in factors.sliders.items()
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps({"video": str(video), "frames": info.n_frames, "output": str(output), "sliders": rows}))
        return
    if rows and not quiet:
        print_table("Sliders", rows, stderr=True)
    tell_result(output, output)
