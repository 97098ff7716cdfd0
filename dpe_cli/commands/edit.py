"""dpe edit."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.shared import FILE, MODES, SECONDS, Command, detector_options, given, progress_for, shared_options
from dpe_cli.errors import QualityError

if TYPE_CHECKING:
    from dpe_cli.edit import Driving, Edit, Edits

EDIT_KEYS = ("face", "driving", "exp-driving", "pose-driving", "mode", "strength")


@click.command(cls=Command)
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
    backend: str,
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
    engine = Engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
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
