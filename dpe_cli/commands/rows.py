"""From the rows of a list to edits: arguments, outputs, and what would fail before it begins."""

import difflib
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands import layers
from dpe_cli.commands.edit import asked_for, drivers_of, edit
from dpe_cli.commands.shared import Failure
from dpe_cli.commands.worker import Work, inputs_of
from dpe_cli.errors import DPEError

if TYPE_CHECKING:
    from dpe_cli.batch import Item, Outcome
    from dpe_cli.edit import Driving, Edits, EditSettings
    from dpe_cli.manifest import Row, Shard

NOT_FOR_ROWS = ("json", "quiet", "verbose", "config", "progress", "segment", "help")
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass
class Clip:
    """A row as an edit: its arguments, or the problem that keeps it from being run."""

    row: "Row"
    arguments: list[str]
    defaults: dict[str, Any]
    output: Path | None = None
    cost: float = 0.0
    problem: Failure | None = None

    def item(self, skip: bool, timeout: float, talk: list[str]) -> "Item":
        """For a worker, wherever it runs."""
        from dpe_cli.batch import Item
        from dpe_cli.ledger import read_marker

        mark = (read_marker(self.output) or {}).get("mark")
        work = Work([*self.arguments, *talk], self.defaults, os.getcwd(), self.output, skip, mark, timeout)
        return Item(self.row.id, work, self.cost)

    def failure(self) -> "Outcome":
        """Of a clip with a problem."""
        from dpe_cli.batch import Outcome

        output = str(self.output) if self.output else None
        return Outcome(self.row.id, "failed", self.problem.exit_code, self.problem.message, output=output)


class Planner:
    """Makes edits of rows: `common` are arguments of all, `template` names outputs."""

    def __init__(self, ctx: click.Context, manifest: Path, common: list[str], template: str | None, skip: bool):
        self.manifest, self.common, self.template, self.skip = manifest, common, template, skip
        self.defaults = layers.values_for(ctx, edit)
        self.options = {
            name.lstrip("-"): option
            for option in edit.params
            for name in option.opts + option.secondary_opts
            if name.startswith("--") and name.lstrip("-") not in NOT_FOR_ROWS
        }

    def clips(self, rows: list["Row"], shard: "Shard | None") -> list[Clip]:
        """All edits of a shard, the most expensive first; those that cannot be run say why.

        What is wrong with the list itself is found in all rows, whichever the shard. Raises ManifestError.
        """
        from dpe_cli.manifest import divide, refuse

        problems: list[str] = []
        made = [self.clip(row, problems) for row in rows]
        refuse(self.manifest, problems)
        clips, contexts = [clip for clip, _ in made], {clip.row.id: context for clip, context in made}
        count, index = (shard.count, shard.index - 1) if shard else (1, 0)
        early = all(clip.row.cost is not None for clip in clips)  # then the others' files need not be looked at
        if early:
            clips = divide(clips, (clip.row.cost for clip in clips), (clip.row.id for clip in clips), count)[index]
        for clip in clips:
            self.check(clip, contexts[clip.row.id], problems)
        refuse(self.manifest, [*problems, *collisions(clips, contexts)])
        if early:
            return clips
        return divide(clips, (clip.cost for clip in clips), (clip.row.id for clip in clips), count)[index]

    def clip(self, row: "Row", problems: list[str]) -> tuple[Clip, click.Context | None]:
        """An edit and its parsed options; problems with them are added to the list."""
        before = len(problems)
        arguments = [*self.common, *row_arguments(row, self.options, problems)]
        clip, context = Clip(row, arguments, self.defaults, cost=row.cost or 0.0), None
        try:
            context = edit.make_context("edit", list(arguments), default_map=dict(self.defaults))
            for name in ("source", "output"):
                if str(context.params[name]) == "-":
                    raise click.UsageError(f"--{name} cannot be a pipe")
            drivers_of(context.params)
            if not context.params["output"] and self.template:
                context.params["output"] = Path(self.named(row, context.params))
        except click.ClickException as error:
            if len(problems) == before:
                problems.append(f"line {row.line}: {error.format_message()}")
        return clip, context

    def named(self, row: "Row", params: dict[str, Any]) -> str:
        """The output by the template."""
        from dpe_cli.manifest import fill

        source, drivers = params["source"], drivers_of(params)
        return fill(
            self.template, id=row.id, stem=source.stem, parent=str(source.parent), driving=drivers.paths[0].stem,
            mode=drivers.mode, line=row.line,
        )  # fmt: skip

    def check(self, clip: Clip, context: click.Context, problems: list[str]) -> None:
        """Finds out what would make the edit fail at once, what it costs, and its output.

        Options that contradict each other are a problem of the list, files that are not right one of the clip.
        """
        try:
            with context:
                drivers, clip.output, chosen = asked_for(context)
            clip.arguments.append(f"--output={clip.output}")
            if clip.row.cost is None:  # before anything that depends on what other shards have done meanwhile
                clip.cost = cost_of(context.params["source"], drivers, chosen)
            early_check(context, drivers, clip.output, replace(chosen, overwrite=chosen.overwrite or self.skip))
        except DPEError as error:
            clip.problem = Failure(str(error), error.exit_code)
        except click.ClickException as error:
            problems.append(f"line {clip.row.line}: {error.format_message()}")


def row_arguments(row: "Row", options: dict[str, click.Parameter], problems: list[str]) -> list[str]:
    """A row as arguments of `dpe edit`; what does not fit is added to the problems."""
    arguments = []
    for name, value in row.options.items():
        option = options.get(name)
        if option is None:
            close = difflib.get_close_matches(name, options, 1)
            problems.append(f"line {row.line}: edit has no option {name}" + (f"; is it {close[0]}?" if close else ""))
        elif option.is_flag:
            chosen = value if isinstance(value, bool) else WORDS.get(str(value).strip().lower())
            if chosen is None:
                problems.append(f"line {row.line}: {name} must be true or false, not {value}")
            elif f"--{name}" in option.secondary_opts:
                problems.append(f"line {row.line}: write {layers.long_name(option)}: false in place of {name}")
            elif chosen:
                arguments.append(f"--{name}")
            elif option.secondary_opts:
                arguments.append(max(option.secondary_opts, key=len))
        elif isinstance(value, bool) or (isinstance(value, list) and not option.multiple):
            problems.append(f"line {row.line}: {name} takes one value, not {json.dumps(value)}")
        else:
            arguments += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return arguments


def early_check(context: click.Context, drivers: "Driving | Edits", output: Path, settings: "EditSettings") -> None:
    """Raises what an edit would fail with before it begins."""
    from dpe_cli.edit import check_request

    params = context.params
    check_request(params["source"], drivers, output, settings, params["preview"], params["report"])


def cost_of(source: Path, drivers: "Driving | Edits", settings: "EditSettings") -> float:
    """Pixels of all frames: of the source, for a still source of its longest driving. Raises InputError."""
    from dpe_cli.motion_file import probe_driving
    from dpe_cli.video import probe

    info = timed = probe(source, settings.rate)
    if info.is_image:
        timed = max((probe_driving(path, settings.rate) for path in drivers.paths), key=lambda one: one.n_frames)
    share = 1.0
    if not info.is_image and info.duration and (settings.start or settings.end):
        end = min(settings.end or info.duration, info.duration)
        share = max(0.0, end - (settings.start or 0)) / info.duration
    return float(max(timed.n_frames, 1) * share * info.width * info.height)


def collisions(clips: Iterable[Clip], contexts: dict[str, click.Context]) -> Iterator[str]:
    """Outputs that two rows would write, or one would write while another reads it."""
    writers: dict[Path, Row] = {}
    for clip in clips:
        params = contexts[clip.row.id].params
        for path in (clip.output, params["preview"], params["report"]):
            if path is None:
                continue
            other = writers.setdefault(path.resolve(), clip.row)
            if other is not clip.row:
                yield f"line {clip.row.line}: {path} is also written by line {other.line}"
    for clip in clips:
        for role, path in inputs_of(contexts[clip.row.id]).items():
            other = writers.get(path.resolve())
            if other and other is not clip.row:
                yield f"line {clip.row.line}: {path}, its {role}, is written by line {other.line}: run that one first"


def print_all(ctx: click.Context, clips: list[Clip]) -> None:
    """One command a line, for OpenCue, GNU parallel, xargs."""
    named = [layer.file for layer in layers.files_read(ctx) if layer.file != layers.FOLDER_FILE]
    for clip in clips:
        line = shlex.join(["dpe", "edit", *(f"--config={file}" for file in named), *clip.arguments])
        if "\n" in line or "\r" in line:
            raise click.UsageError(f"{clip.row.id}: a name with a line break cannot be printed as one command a line")
        click.echo(line)
