"""dpe dub."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.edit import Host
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FILE, SECONDS, Finite, check_named, check_stays
from dpe_cli.commands.options import detector_options, encoding_options, report_options, shared_options
from dpe_cli.commands.progress import check_standard_output, closing_words, progress_option, speaker
from dpe_cli.commands.provenance import begin_record, ingredients, provenance_options, reads, repeated, sidecar_of
from dpe_cli.commands.segments import edit_segment, segment_options

if TYPE_CHECKING:
    from dpe_cli.dub import DubSettings
    from dpe_cli.report import Report

STYLES = 46  # of the speech networks, which --help must not load


@click.command(cls=Command)
@click.argument("plan", type=FILE, required=False)
@click.option("-s", "--source", type=FILE, help="Video, or still image, of the person who is to speak.")
@click.option("-a", "--audio", type=FILE, help="The speech: any file with sound.")
@click.option("-o", "--output", type=FILE, help="Where to write.  [default: SOURCE_dub.mp4 beside the source]")
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
    type=Finite(0, 3),
    default=1.0,
    show_default=True,
    metavar="F",
    help="Times the mouth's movement.",
)
@click.option("--mix", type=Finite(min=0), metavar="GAIN", help="Mix the source's own sound in, at this gain.")
@click.option(
    "--pose",
    default="",
    metavar="WHICH",
    help="Of a still: keep, generate, or a video or motion file whose head it follows.  [default: generate]",
)
@click.option(
    "--pose-style", type=click.IntRange(0, STYLES - 1), default=0, show_default=True, help="Manner of its head."
)
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
@click.option("--smooth", type=Finite(0, 3), default=1.0, show_default=True, metavar="F", help="Of face boxes.")
@click.option("--face", default="largest", show_default=True, metavar="WHICH", help="Who speaks, as in dpe edit.")
@detector_options
@click.option("--start", **SECONDS, help="Begin at this second of the source; the speech goes on as it would have.")
@click.option("--end", **SECONDS, help="End at this second of the source.")
@encoding_options
@segment_options
@report_options
@provenance_options
@progress_option
@shared_options
@click.pass_context
def dub(
    ctx: click.Context, plan: Path | None, source: Path | None, audio: Path | None, output: Path | None, resume: bool,
    segment: int | None, detector: str, face_models: Path | None, report: Path | None, as_json: bool,
    from_file: Path | None, consent: Path | None, weights: str | None, device: str, precision: str, backend: str,
    batch_size: int | None, quiet: bool, verbose: bool,
    **_: Any,
) -> "Report":  # fmt: skip
    """Make the person in a video, or in a picture, say what is in a sound file.

    In a video only the mouth follows; head and upper face stay its own. A picture becomes a talking head. The speech
    becomes the sound of the result. Default weights are small: read weights/README.md on what to expect.

    \b
    dpe dub --source talk.mp4 --audio speech.wav -o dubbed.mp4
    dpe dub --source portrait.jpg --audio speech.wav -o talking.mp4
    dpe dub --segment 3 talk.plan.json
    """
    if plan or segment is not None:
        return edit_segment(plan, segment, weights, device, backend, detector, face_models, quiet)
    if from_file:
        return repeated(ctx)
    if resume:
        check_stays(ctx, "--resume")
    check_standard_output(ctx)
    output, settings = asked_for(ctx)

    from dpe_cli.container import PIPE
    from dpe_cli.dub import check_dub, dub_video
    from dpe_cli.provenance import read_consent

    read_consent(consent)
    others = {"reads": [path for _, path in reads(ctx)], "sidecar": sidecar_of(ctx, output)}
    if resume:
        from dpe_cli.resume import dub_resumable, finished

        again = replace(settings.edit, overwrite=settings.edit.overwrite or finished(output) is not None)
        check_dub(source, audio, output, replace(settings, edit=again), report, **others)
    else:
        check_dub(source, audio, output, settings, report, **others)
    record = begin_record(ctx, output, lambda: ingredients(ctx))
    say = speaker(quiet)
    host = ctx.ensure_object(Host)
    engine = host.engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
    finder = host.detector(detector, face_models)
    if verbose:
        say(f"networks: {engine.description}; faces: {finder.name}; {settings}")
    common = {"progress": host.progress(quiet), "say": say}
    if resume:
        done = dub_resumable(
            source, audio, output, engine, finder, settings, report_path=report,
            seal=record.seal, finish=lambda done: record.finish(done, say), **common,
        )  # fmt: skip
    else:
        done = record.keep(
            lambda part: dub_video(source, audio, part, engine, finder, settings, **common),
            settings.edit.overwrite, report, say,
        )  # fmt: skip
    say(closing_words(done.summary()))
    if output != PIPE:
        tell_result(json.dumps(done.summary(), indent=1, default=str) if as_json else output, output)
    return done


def asked_for(ctx: click.Context) -> "tuple[Path, DubSettings]":
    """The output and the settings that the options mean.

    Raises click.UsageError where they contradict each other, OutputError where the output needs a name.
    """
    params = ctx.params
    for name, flag in (("source", "-s"), ("audio", "-a")):
        if not params[name]:
            raise click.UsageError(f"Missing option '{flag}' / '--{name}'.")
    if params["end"] is not None and params["end"] <= (params["start"] or 0):
        raise click.UsageError("--end must be after --start")
    if params["still"] and params["pose"] not in ("", "keep"):
        raise click.UsageError("--still keeps the pose: leave --pose out")

    from dpe_cli.dub import DubSettings
    from dpe_cli.request import EditSettings, check_gives_name

    shared, own = (
        {field.name: params[field.name] for field in fields(kind) if field.name in params}
        for kind in (EditSettings, DubSettings)
    )
    shared.pop("audio")  # here it is the speech
    source = params["source"]
    if not params["output"]:
        check_named(ctx, source)
        check_gives_name(source)
    return params["output"] or source.with_name(f"{source.stem}_dub.mp4"), DubSettings(
        **own, edit=EditSettings(**shared)
    )
