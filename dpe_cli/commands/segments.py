"""dpe join, and --resume and --segment of dpe edit and dpe dub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands import layers
from dpe_cli.commands.command import Command
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FETCHED, FILE
from dpe_cli.commands.options import given, limit_options, report_options
from dpe_cli.commands.progress import closing_words, progress_for, speaker
from dpe_cli.commands.provenance import begin_record, reads, sidecar_of, signing_options
from dpe_cli.errors import InputError, QualityError

if TYPE_CHECKING:
    from dpe_cli.report import Report

OF_THE_MACHINE = ("plan", "segment", "weights", "device", "backend", "detector", "face_models", "quiet", "verbose")


def segment_options(function: Callable) -> Callable:
    """--resume and --segment; the command takes an argument `plan` too."""
    function = click.option(
        "--segment", type=click.IntRange(0), metavar="K", help="Make segment K, from 0, of a PLAN of `dpe plan`."
    )(function)  # fmt: skip
    return click.option(
        "--resume", is_flag=True, help="Go on where an earlier run of this command, with --resume, was stopped."
    )(function)  # fmt: skip


def edit_segment(
    path: Path | None, segment: int | None, weights: str | None, device: str, backend: str, detector: str,
    face_models: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Makes one segment of a plan and prints its path.

    Raises click.UsageError for options that the plan decides, InputError for the plan of another command.
    """
    ctx = click.get_current_context()
    command = ctx.command.name
    if path is None or segment is None:
        raise click.UsageError(f"a segment needs its number and its plan: dpe {command} --segment 3 talk.plan.json")
    if path in ctx.meta.get(FETCHED, ()):
        raise click.UsageError("segments lie beside their plan: download it, and the .safetensors beside it")
    decided = [param for param in ctx.command.params if param.name not in OF_THE_MACHINE and given(ctx, param.name)]
    decided = [param for param in decided if param.expose_value]  # limits and --progress are the process's
    if decided:
        raise click.UsageError(f"the plan has decided --{layers.long_name(decided[0])}: leave it out")

    from dpe_cli.provenance import check_planned_consent
    from dpe_cli.segment_plan import read_plan
    from dpe_cli.segments import check_segment, edit_segments

    plan = read_plan(path)
    if plan.command != command:
        raise InputError(f"{path} is of a dpe {plan.command}", f"make it with: dpe {plan.command} --segment")
    check_segment(plan, segment)
    check_planned_consent(plan.asked["made_of"], path)
    asked = plan.asked

    from dpe_cli.engine import Engine
    from dpe_cli.face import make_detector

    engine = Engine(
        weights or asked["weights"],
        device=device,
        precision=asked["precision"],
        batch_size=asked["batch_size"],
        backend=backend if given(ctx, "backend") else asked["backend"] or "auto",
    )
    models = face_models or (asked["face_models"] and Path(asked["face_models"]))
    finder = make_detector(detector if given(ctx, "detector") else asked["detector"], models)
    done = edit_segments(plan, segment, segment, engine, finder, progress_for(quiet))
    tell_result(done.output["path"], done.output["path"])


@click.command(cls=Command)
@click.argument("plan", type=FILE)
@click.option("-o", "--output", type=FILE, help="Where to write, in the plan's format.  [default: as planned]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@report_options
@signing_options
@limit_options
@click.option("-q", "--quiet", is_flag=True, help="No remarks, only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a bug.")
@click.pass_context
def join(
    ctx: click.Context, plan: Path, output: Path | None, overwrite: bool, report: Path | None, as_json: bool,
    quiet: bool, verbose: bool, **_: Any,
) -> None:  # fmt: skip
    """Join the segments of a plan: their packets are copied, sound and all else comes from the source.

    \b
    dpe join talk.plan.json
    """
    from dpe_cli.provenance import check_planned_consent
    from dpe_cli.request import check_outputs
    from dpe_cli.segment_plan import read_plan
    from dpe_cli.segments import join_plan

    read = read_plan(plan)
    check_planned_consent(read.asked["made_of"], plan)
    output = output or read.output
    if output.suffix.lower() != read.output.suffix.lower():
        raise click.UsageError(f"the segments are {read.output.suffix}: name such an output, or plan anew")
    inputs = [*read.files, *(path for _, path in reads(ctx))]
    check_outputs([output, report] if report else [output], inputs, overwrite, sidecar_of(ctx, output))
    record = begin_record(ctx, output, lambda: read.asked["made_of"])

    def ready(part: Path, whole: "Report") -> None:
        record.seal(part)
        if report:
            whole.write(report)

    say = speaker(quiet)
    try:
        done = join_plan(read, output, overwrite=overwrite, ready=ready, say=say)
    except QualityError as error:
        if report:
            error.report.write(report)
        raise
    record.finish(done, say)
    say(closing_words(done.summary()))
    tell_result(json.dumps(done.summary(), indent=1, default=str) if as_json else output, output)
