"""dpe plan."""

import json
from pathlib import Path
from typing import Any

import click

from dpe_cli.commands import dub as dubbing
from dpe_cli.commands import edit as editing
from dpe_cli.commands import layers
from dpe_cli.commands.command import Command
from dpe_cli.commands.dub import dub
from dpe_cli.commands.edit import edit
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FILE, Finite, check_stays, from_pipe
from dpe_cli.commands.options import given
from dpe_cli.commands.progress import print_table, progress_for, speaker
from dpe_cli.commands.provenance import ingredients, reads, sidecar_of
from dpe_cli.commands.rows import command_of

NOT_FOR_PLANS = (
    "plan", "audio", "resume", "segment", "preview", "report", "from_file", "sidecar", "c2pa_cert", "c2pa_key",
)  # fmt: skip
ITS_OWN = ("split", "every", "path", "audio")
OPTIONS = {param.name: param for param in edit.params + dub.params} | {param.name: param for param in edit.params}


@click.command(cls=Command, params=[param for name, param in OPTIONS.items() if name not in NOT_FOR_PLANS])
@click.option("-a", "--audio", default="auto", metavar="WHICH", help="The speech of a dub; the sound of an edit.")
@click.option("--split", type=click.IntRange(1), metavar="N", help="Write a plan of N segments for as many machines.")
@click.option("--every", type=Finite(1), metavar="SECONDS", help="The same, by the length of a segment.")
@click.option("--plan", "path", type=FILE, help="Where that plan goes.  [default: OUTPUT.plan.json beside the output]")
def plan(
    source: Path | None,
    split: int | None,
    every: float | None,
    path: Path | None,
    as_json: bool,
    weights: str | None,
    device: str,
    precision: str,
    backend: str,
    detector: str,
    face_models: Path | None,
    batch_size: int | None,
    consent: Path | None,
    quiet: bool,
    verbose: bool,
    **_: Any,
) -> None:
    """Look ahead: what an edit or a dub with these options would take, or why it would fail, with its exit code.

    Takes the options of edit or, with --audio and nothing that drives, of dub. With --split it also follows the faces
    and reads the driving, once, and writes a plan for `dpe edit --segment K PLAN` or `dpe dub --segment K PLAN`, K from
    0, and `dpe join PLAN`.

    \b
    dpe plan -s talk.mp4 -d smile.mp4 -o out.mp4
    dpe plan -s talk.mp4 -d smile.mp4 -o out.mp4 --split 8
    dpe plan -s talk.mp4 -a speech.wav -o out.mp4 --split 8
    """
    if split and every:
        raise click.UsageError("--split and --every say the same: give one of them")
    if path and not (split or every):
        raise click.UsageError("--plan needs --split or --every")

    from dpe_cli.container import PIPE
    from dpe_cli.provenance import read_consent
    from dpe_cli.request import check_outputs
    from dpe_cli.segment_plan import TABLE, check_names

    read_consent(consent)
    ctx = click.get_current_context()
    planned = of_command(ctx)
    if planned.command is dub:
        from dpe_cli.dub import check_dub as check

        (output, chosen), what = dubbing.asked_for(planned), planned.params["audio"]
        overwrite = chosen.edit.overwrite
    else:
        from dpe_cli.request import check_request as check

        what, output, chosen = editing.asked_for(ctx)
        overwrite = chosen.overwrite
    others = {"reads": [path for _, path in reads(ctx)], "sidecar": sidecar_of(ctx, output)}
    if split or every:
        if source == PIPE:
            raise click.UsageError("a plan is for files, not for standard input")
        check_stays(ctx, "a plan")
        path = path or output.with_suffix(".plan.json")
        if path.suffix != ".json":
            raise click.UsageError("--plan must end in .json")
        check_outputs([output, path, path.with_suffix(TABLE)], others["reads"], overwrite, others["sidecar"])
        check_names(path, output, [*others["reads"], output])
    if planned.command is edit:
        source = from_pipe(ctx, source, output)
    check(source, what, output, chosen, **others)

    from dpe_cli.engine import Engine
    from dpe_cli.face import make_detector

    say = speaker(quiet)
    engine = Engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
    finder = make_detector(detector, face_models)
    if split or every:
        from dpe_cli.planner import make_dub_plan, make_plan

        make = make_dub_plan if planned.command is dub else make_plan
        files = {"weights": weights, "face_models": face_models}  # by full names, where they are files
        asked = {name: str(Path(file).absolute()) if file and Path(file).exists() else file
                 for name, file in files.items()}  # fmt: skip
        asked |= {"made_of": ingredients(planned)}
        asked |= {"precision": precision, "backend": backend, "batch_size": batch_size, "detector": detector}
        made = make(
            path, source, what, output, engine, finder, chosen,
            count=split, seconds=every, asked=asked, progress=progress_for(quiet), say=say,
        )  # fmt: skip
        first = f"dpe {made.command} --segment 0 {path}"
        say(f"{made.segments} segments: {first} to {made.segments - 1}, then dpe join {path}")
        tell_result(json.dumps(made.summary(), indent=1) if as_json else path, path)
        return

    from dpe_cli.plan import forecast, forecast_dub

    look_ahead = forecast_dub if planned.command is dub else forecast
    seen = look_ahead(source, what, output, engine, finder, chosen, say)
    if as_json:
        click.echo(json.dumps(seen, indent=1, default=str))
    else:
        print_table(f"{source.name} to {output.name}", [{"": name.replace("_", " "), "planned": shown(name, value)}
                                                        for name, value in seen.items()])  # fmt: skip


def of_command(ctx: click.Context) -> click.Context:
    """The options as those of the command that they ask for. Raises click.UsageError for one that it does not have."""
    default = click.core.ParameterSource.DEFAULT
    named = [param for param in ctx.command.params if ctx.get_parameter_source(param.name) not in (default, None)]
    command = command_of({layers.long_name(param) for param in named})
    own = [param.name for param in command.params]
    for param in named:
        if given(ctx, param.name) and param.name not in (*own, *ITS_OWN):
            raise click.UsageError(f"dpe {command.name} has no option --{layers.long_name(param)}")
    planned = click.Context(command, parent=ctx)  # for what came from the network is known there
    planned.params = {param.name: ctx.params.get(param.name) for param in command.params if param.expose_value}
    if command is dub:
        speech = next(param for param in dub.params if param.name == "audio")
        planned.params["audio"] = speech.type_cast_value(ctx, ctx.params["audio"])
    return planned


def shown(name: str, value: Any) -> str:
    """A value of a forecast for people."""
    if value is None:
        return "not known"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.1f} GB"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
