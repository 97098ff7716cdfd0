"""dpe dub."""

import json
from pathlib import Path
from typing import Any

import click

from dpe_cli.commands.shared import (
    FILE,
    SECONDS,
    Command,
    closing_words,
    detector_options,
    progress_for,
    progress_option,
    shared_options,
)


@click.command(cls=Command)
@click.option("-s", "--source", type=FILE, required=True, help="Video, or still image, of the person who is to speak.")
@click.option("-a", "--audio", type=FILE, required=True, help="The speech: any file with sound.")
@click.option("-o", "--output", type=FILE, required=True, help="Where to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option(
    "--audio-end",
    type=click.Choice(["trim", "pad", "loop", "error"]),
    default="trim",
    show_default=True,
    help="Speech and video differ in length: end with the shorter; silence or last frame after it; repeat it; stop.",
)
@click.option(
    "--expression-scale",
    type=click.FloatRange(0, 3),
    default=1.0,
    show_default=True,
    metavar="F",
    help="Times the mouth's movement.",
)
@click.option(
    "--mix", type=click.FloatRange(min=0), metavar="GAIN", help="Mix the source's own sound in, at this gain."
)
@click.option(
    "--pose",
    default="",
    metavar="WHICH",
    help="Of a still: keep, generate, or a video or motion file whose head it follows.  [default: generate]",
)
@click.option("--pose-style", type=click.IntRange(min=0), default=0, show_default=True, help="Manner of its head.")
@click.option(
    "--blink",
    default="",
    metavar="WHICH",
    help="Of a still: auto, off, or a video or motion file whose lids it follows.  [default: auto]",
)
@click.option("--still", is_flag=True, help="The still's head does not move; the whole picture is written.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides pose and blinks.")
@click.option(
    "--paste/--no-paste", default=None, help="Of a still: force a moving head into its picture.  [default: the crop]"
)
@click.option(
    "--smooth", type=click.FloatRange(0, 3), default=1.0, show_default=True, metavar="F", help="Of face boxes."
)
@click.option("--face", default="largest", show_default=True, metavar="WHICH", help="Who speaks, as in dpe edit.")
@detector_options
@click.option("--start", **SECONDS, help="Begin at this second of the source; the speech goes on as it would have.")
@click.option("--end", **SECONDS, help="End at this second of the source.")
@click.option("--codec", type=click.Choice(["h264", "hevc", "prores", "ffv1", "png"]), help="As in dpe edit.")
@click.option("--crf", type=click.IntRange(0, 51), help="Quality, as in dpe edit.")
@click.option("--preset", metavar="NAME", help="Speed of h264 and hevc.")
@click.option("--fps", metavar="RATE", help="Rate of image sequences like in_%06d.png.  [default: 25]")
@click.option("--report", type=FILE, help="Also write a JSON report with each frame's fate.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, less the list of frames, instead of the path.")
@progress_option
@shared_options
def dub(
    source: Path, audio: Path, output: Path, audio_end: str, expression_scale: float, mix: float | None, pose: str,
    pose_style: int, blink: str, still: bool, seed: int, detector: str, face_models: Path | None, report: Path | None,
    as_json: bool, weights: str | None, device: str, precision: str, backend: str, batch_size: int | None,
    quiet: bool, verbose: bool, **shared: Any,
) -> None:  # fmt: skip
    """Make the person in a video, or in a picture, say what is in a sound file.

    In a video only the mouth follows; head and upper face stay its own. A picture becomes a talking head. The speech
    becomes the sound of the result. Default weights are small: read weights/README.md on what to expect.

    \b
    dpe dub --source talk.mp4 --audio speech.wav -o dubbed.mp4
    dpe dub --source portrait.jpg --audio speech.wav -o talking.mp4
    """
    if shared["end"] is not None and shared["end"] <= (shared["start"] or 0):
        raise click.UsageError("--end must be after --start")
    if still and pose not in ("", "keep"):
        raise click.UsageError("--still keeps the pose: leave --pose out")

    from dpe_cli.dub import DubSettings, check_dub, dub_video
    from dpe_cli.edit import EditSettings

    settings = DubSettings(
        audio_end, expression_scale, pose, pose_style, blink, still, mix, seed, EditSettings(**shared)
    )
    check_dub(source, audio, output, settings)

    from dpe_cli.engine import Engine
    from dpe_cli.face import make_detector

    say = (lambda message: None) if quiet else (lambda message: click.echo(message, err=True))
    engine = Engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
    finder = make_detector(detector, face_models)
    if verbose:
        say(f"networks: {engine.description}; faces: {finder.name}; {settings}")
    done = dub_video(source, audio, output, engine, finder, settings, progress=progress_for(quiet), say=say)
    if report:
        done.write(report)
    say(closing_words(done.summary()))
    click.echo(json.dumps(done.summary(), indent=1, default=str) if as_json else output)
