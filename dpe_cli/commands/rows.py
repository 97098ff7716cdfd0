"""From the rows of a list to edits: arguments, outputs, and what would fail before it begins."""

import contextlib
import difflib
import functools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands import dub as dubbing
from dpe_cli.commands import layers
from dpe_cli.commands.dub import dub
from dpe_cli.commands.edit import asked_for, edit, read_request
from dpe_cli.commands.ends import Failure
from dpe_cli.commands.options import LIMITS
from dpe_cli.commands.provenance import reads, sidecar_of
from dpe_cli.commands.worker import Work
from dpe_cli.errors import DPEError

if TYPE_CHECKING:
    from dpe_cli.batch import Item, Outcome
    from dpe_cli.manifest import Row, Shard
    from dpe_cli.request import Driving, Edits, EditSettings

# a list does not decide what its own files may do
NOT_FOR_ROWS = (
    "json", "quiet", "verbose", "config", "progress", "segment", "from", "sidecar", "no-sidecar", "help", *LIMITS,
)  # fmt: skip
DRIVES = ("driving", "exp-driving", "pose-driving", "edit", "set", "neutralize", "mouth", "eyes", "gaze", "brows",
          "emotion", "curve", "mouth-driving", "eyes-driving", "emotion-driving")  # fmt: skip
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass
class Clip:
    """A row as an edit or a dub: its arguments, or the problem that keeps it from being run."""

    row: "Row"
    command: click.Command
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
        arguments = [*self.arguments, *talk]
        work = Work(self.command.name, arguments, self.defaults, os.getcwd(), self.output, skip, mark, timeout)
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
        self.defaults = {command.name: layers.values_for(ctx, command) for command in (edit, dub)}
        self.read = [manifest, *(layer.file for layer in layers.files_read(ctx))]  # for all clips
        self.files = {path.resolve() for path in self.read}  # that are read or written, by their real names
        self.folders: set[Path] = set()  # of outputs by the template

    def clips(self, rows: list["Row"], shard: "Shard | None") -> list[Clip]:
        """All edits of a shard, the most expensive first; those that cannot be run say why.

        What is wrong with the list itself is found in all rows, whichever the shard. Raises ManifestError.
        """
        from dpe_cli.manifest import divide, refuse

        problems: list[str] = []
        made = [self.clip(row, problems) for row in rows]
        refuse(self.manifest, problems)
        for folder in self.folders:
            with contextlib.suppress(OSError):  # `check` will tell that it is not there
                folder.mkdir(parents=True, exist_ok=True)
        clips, contexts = [clip for clip, _ in made], {clip.row.id: context for clip, context in made}
        count, index = (shard.count, shard.index - 1) if shard else (1, 0)
        early = all(clip.row.cost is not None for clip in clips)  # then the others' files need not be looked at
        if early:
            clips = divide(clips, (clip.row.cost for clip in clips), (clip.row.id for clip in clips), count)[index]
        for clip in clips:
            self.check(clip, contexts[clip.row.id], problems)
        refuse(self.manifest, [*problems, *collisions(clips, contexts)])
        for clip in clips:
            context = contexts[clip.row.id]
            read = (path for _, path in reads(context))
            self.files |= {path.resolve() for path in (*read, *outputs_of(clip, context))}
        if early:
            return clips
        return divide(clips, (clip.cost for clip in clips), (clip.row.id for clip in clips), count)[index]

    def clip(self, row: "Row", problems: list[str]) -> tuple[Clip, click.Context | None]:
        """An edit and its parsed options; problems with them are added to the list."""
        before = len(problems)
        command = command_of({*row.options, *named_in(self.common)})
        defaults = self.defaults[command.name]
        arguments = [*self.common, *row_arguments(row, command, problems)]
        clip, context = Clip(row, command, arguments, defaults, cost=row.cost or 0.0), None
        try:
            context = command.make_context(command.name, list(arguments), default_map=dict(defaults))
            for name in ("source", "output"):
                if str(context.params[name]) == "-":
                    raise click.UsageError(f"--{name} cannot be a pipe")
            if not context.params["source"]:
                raise click.UsageError("Missing option '-s' / '--source'.")
            if not context.params["output"] and self.template:
                with context, contextlib.suppress(DPEError):  # which `check` will tell
                    context.params["output"] = Path(self.named(row, context))
        except click.ClickException as error:
            if len(problems) == before:
                problems.append(f"line {row.line}: {error.format_message()}")
        return clip, context

    def named(self, row: "Row", context: click.Context) -> str:
        """The output by the template."""
        from dpe_cli.manifest import fill

        source = context.params["source"]
        if context.command is dub:
            mode, driving = "dub", context.params["audio"].stem
        else:
            drivers, _ = read_request(context)
            mode, driving = drivers.mode, drivers.paths[0].stem if drivers.paths else ""
        filled = functools.partial(
            fill, id=row.id, stem=source.stem, parent=str(source.parent), driving=driving, mode=mode, line=row.line
        )
        output = filled(self.template)
        if ".." in Path(row.id).parts and output != filled(self.template, id="x"):
            raise click.UsageError(f"the id {row.id} leads out of the folders of --output-template")
        if source.parent.is_dir():  # not that of a source that is not there
            self.folders.add(Path(output).parent)  # an id has perhaps folders of its own
        return output

    def check(self, clip: Clip, context: click.Context, problems: list[str]) -> None:
        """Finds out what would make the clip fail at once, what it costs, and its output.

        Options that contradict each other are a problem of the list, files that are not right one of the clip.
        """
        from dpe_cli.provenance import read_consent

        try:
            with context:
                look = look_at_dub if clip.command is dub else look_at_edit
                clip.output, cost, early_check = look(context, self.read)
            clip.arguments.append(f"--output={clip.output}")
            if clip.row.cost is None:  # before anything that depends on what other shards have done meanwhile
                clip.cost = cost()
            early_check(self.skip)
            read_consent(context.params["consent"])
        except DPEError as error:
            clip.problem = Failure(str(error), error.exit_code)
        except click.ClickException as error:
            problems.append(f"line {clip.row.line}: {error.format_message()}")


def command_of(named: set[str]) -> click.Command:
    """What these options ask for: dub where there is sound and nothing that drives, else edit."""
    return dub if "audio" in named and not named.intersection(DRIVES) else edit


def named_in(arguments: Iterable[str]) -> Iterator[str]:
    """The long names of the options among arguments of an edit or a dub: `driving` of -d FILE and --driving=FILE."""
    options = [option for command in (edit, dub) for option in command.params]
    long = {name: layers.long_name(option) for option in options for name in option.opts if not name.startswith("--")}
    for argument in arguments:
        if argument.startswith("--"):
            yield argument[2:].partition("=")[0]
        elif argument[:2] in long:
            yield long[argument[:2]]


def row_arguments(row: "Row", command: click.Command, problems: list[str]) -> list[str]:
    """A row as arguments of its command; what does not fit is added to the problems."""
    options = {
        name.lstrip("-"): option
        for option in command.params
        for name in option.opts + option.secondary_opts
        if name.startswith("--") and name.lstrip("-") not in NOT_FOR_ROWS
    }
    arguments = []
    for name, value in row.options.items():
        option = options.get(name)
        if name in NOT_FOR_ROWS:
            problems.append(f"line {row.line}: a list may not set {name}")
        elif option is None:
            close = difflib.get_close_matches(name, options, 1)
            problems.append(
                f"line {row.line}: {command.name} has no option {name}" + (f"; is it {close[0]}?" if close else "")
            )
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


Look = tuple[Path, Callable[[], float], Callable[[bool], object]]  # output, cost, check; given whether it may exist


def look_at_edit(context: click.Context, read: list[Path]) -> Look:
    """What a row of an edit comes to; `read` are files that it may not replace. Raises click.UsageError, InputError."""
    from dpe_cli.request import check_request

    params, (drivers, output, chosen) = context.params, asked_for(context)

    def early_check(again: bool) -> None:
        settings = replace(chosen, overwrite=chosen.overwrite or again)
        check_request(
            params["source"], drivers, output, settings, params["preview"], params["report"],
            reads=[*read, *(path for _, path in reads(context))], sidecar=sidecar_of(context, output),
        )  # fmt: skip

    return output, lambda: cost_of(params["source"], drivers, chosen), early_check


def look_at_dub(context: click.Context, read: list[Path]) -> Look:
    """The same of a dub."""
    from dpe_cli.dub import check_dub

    source, audio, report = (context.params[name] for name in ("source", "audio", "report"))
    output, settings = dubbing.asked_for(context)

    def early_check(again: bool) -> None:
        chosen = replace(settings.edit, overwrite=settings.edit.overwrite or again)
        check_dub(
            source, audio, output, replace(settings, edit=chosen), report,
            reads=[*read, *(path for _, path in reads(context))], sidecar=sidecar_of(context, output),
        )  # fmt: skip

    return output, lambda: dub_cost(source, audio), early_check


def dub_cost(source: Path, audio: Path) -> float:
    """Pixels of all frames of a dub. Raises InputError."""
    from dpe_cli.speech import GRID
    from dpe_cli.tracks import sound_seconds
    from dpe_cli.video import probe

    info = probe(source)
    frames = sound_seconds(audio) * GRID if info.is_image else info.n_frames
    return float(max(frames, 1) * info.width * info.height)


def cost_of(source: Path, drivers: "Driving | Edits", settings: "EditSettings") -> float:
    """Pixels of all frames: of the source, for a still source of its longest driving. Raises InputError."""
    from dpe_cli.motion_file import probe_driving
    from dpe_cli.video import probe

    info = timed = probe(source, settings.rate)
    if info.is_image:
        each = (probe_driving(path, settings.rate) for path in drivers.paths)
        timed = max(each, key=lambda one: one.n_frames, default=info)
    share = 1.0
    if not info.is_image and info.duration and (settings.start or settings.end):
        end = min(settings.end or info.duration, info.duration)
        share = max(0.0, end - (settings.start or 0)) / info.duration
    return float(max(timed.n_frames, 1) * share * info.width * info.height)


def outputs_of(clip: Clip, context: click.Context) -> list[Path]:
    """The files that a clip writes, the sidecar last."""
    sidecar = clip.output and sidecar_of(context, clip.output)
    return [path for path in (clip.output, context.params.get("preview"), context.params["report"], sidecar) if path]


def collisions(clips: Iterable[Clip], contexts: dict[str, click.Context]) -> Iterator[str]:
    """Outputs that two rows would write, or one would write while another reads it."""
    writers: dict[Path, Row] = {}
    sidecars: set[Path] = set()
    for clip in clips:
        context = contexts[clip.row.id]
        sidecar = clip.output and sidecar_of(context, clip.output)
        for path in outputs_of(clip, context):
            other = writers.setdefault(path.resolve(), clip.row)
            if other is not clip.row and not (path == sidecar and path.resolve() in sidecars):  # as the outputs are
                yield f"line {clip.row.line}: {path} is also written by line {other.line}"
        sidecars |= {sidecar.resolve()} if sidecar else set()
    for clip in clips:
        for role, path in reads(contexts[clip.row.id]):
            other = writers.get(path.resolve())
            if other and other is not clip.row:
                yield f"line {clip.row.line}: {path}, its {role}, is written by line {other.line}: run that one first"


def print_all(ctx: click.Context, clips: list[Clip]) -> None:
    """One command a line, for OpenCue, GNU parallel, xargs."""
    named = [layer.file for layer in layers.files_read(ctx) if layer.file != layers.FOLDER_FILE]
    for clip in clips:
        line = shlex.join(["dpe", clip.command.name, *(f"--config={file}" for file in named), *clip.arguments])
        if "\n" in line or "\r" in line:
            raise click.UsageError(f"{clip.row.id}: a name with a line break cannot be printed as one command a line")
        click.echo(line)
