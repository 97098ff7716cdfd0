"""dpe batch."""

import contextlib
import difflib
import functools
import io
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import dpe_cli
from dpe_cli.commands import layers
from dpe_cli.commands.edit import Host, asked_for, edit
from dpe_cli.commands.shared import (
    FILE,
    INTERRUPTED,
    OUT_OF_MEMORY,
    STOPPED,
    TABLE_WIDTH,
    Command,
    Failure,
    progress_kind,
    progress_option,
)
from dpe_cli.errors import DPEError

if TYPE_CHECKING:
    from dpe_cli.batch import Event, Item, Outcome, Tell
    from dpe_cli.edit import Driving, Edits, EditSettings
    from dpe_cli.manifest import Row, Shard

SOME_FAILED = 8
NOT_FOR_ROWS = ("json", "quiet", "verbose", "config", "progress", "help")
NOT_IN_THE_KEY = (  # what makes no other frames
    "output", "overwrite", "preview", "report", "as_json", "quiet", "verbose", "batch_size", "device", "weights",
)  # fmt: skip
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
ROWS_SHOWN = 30  # of the table at the end; beyond that only failures


class Stopped(BaseException):
    """SIGTERM came."""


@click.command(cls=Command)
@click.argument("manifest", type=FILE)
@click.argument("edit_options", metavar="[-- OPTIONS OF EDIT]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--output-template",
    metavar="TEXT",
    help="Name of the outputs of rows that have none: {id}, {stem}, {parent} of the source, {driving}, {mode}, {line}.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Leave out clips whose output was made by a batch of the same inputs, settings and weights.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes, each with its own networks.  [default: 1]")
@click.option("--gpus", metavar="N,N,...", help="One process for each of these GPUs, in place of --workers.")
@click.option("--shard", metavar="I/N", help="Only the I-th of N parts.  [default: by SLURM or Kubernetes, else 1/1]")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Further tries of a clip whose worker died or that ended with exit code 1 or 6.",
)
@click.option(
    "--results", type=FILE, help="JSON lines, one for each clip.  [default: MANIFEST.results.jsonl beside it]"
)
@click.option(
    "--claim-timeout",
    type=click.FloatRange(min=1),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="After this silence another machine's clip is taken over.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or actors of a Ray cluster (RAY_ADDRESS, else one on this machine).",
)
@click.option("--gpus-per-actor", type=click.FloatRange(min=0), default=0, show_default=True, help="For --engine ray.")
@click.option("--print-commands", is_flag=True, help="Run nothing; print one `dpe edit` a line.")
@progress_option
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table, only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Let the edits talk; show tracebacks of bugs.")
@click.pass_context
def batch(
    ctx: click.Context,
    manifest: Path,
    edit_options: tuple[str, ...],
    output_template: str | None,
    overwrite: bool,
    skip_existing: bool,
    workers: int | None,
    gpus: str | None,
    shard: str | None,
    fail_fast: bool,
    retries: int,
    results: Path | None,
    claim_timeout: float,
    engine: str,
    gpus_per_actor: float,
    print_commands: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Edit many clips, listed in a file, with networks that are loaded once for each process.

    MANIFEST is JSON lines or CSV. A row has an id and any options of `dpe edit` by their long names (source, driving,
    mode, output, ...); what stands after -- holds for all rows. Files are named as on the command line, from the
    current folder. All rows are checked before the first is run. Prints the path of the results file. Exit code 8:
    some clips failed, which are listed there.

    \b
    dpe batch clips.jsonl --output-template 'out/{id}_{mode}.mp4' --skip-existing -- --codec prores
    """
    from dpe_cli.batch import ProcessPool, counted, run_batch, stop_by_sigterm, write_results
    from dpe_cli.manifest import check_template, parse_shard, read_manifest, shard_of_scheduler

    say = (lambda message: None) if quiet else (lambda message: click.echo(message, err=True))
    if workers and gpus:
        raise click.UsageError("--gpus starts one worker for each: leave --workers out")
    if any(option.startswith("--config") for option in edit_options):
        raise click.UsageError("give --config to dpe batch itself: what it says of edit holds for all rows")
    devices = gpu_names(gpus)
    if output_template:
        check_template(output_template)
    part = parse_shard(shard) if shard else shard_of_scheduler(os.environ)
    common = [*(["--overwrite"] if overwrite else []), *edit_options]
    plan = Planner(ctx, manifest, common, output_template, skip_existing)
    clips = plan.clips(read_manifest(manifest), part)
    if part:
        say(f"shard {part} (from {part.origin}): {len(clips)} clips")
    for clip in clips:
        if clip.problem:
            say(f"{clip.row.id}: {clip.problem.message}")
    sound = [clip for clip in clips if clip.problem is None]
    if print_commands:
        print_all(ctx, sound)
        raise click.exceptions.Exit(SOME_FAILED if len(sound) < len(clips) else 0)

    results = results or results_file(manifest, part)
    talk = ["--verbose"] if verbose else ["--quiet"]
    items = [clip.item(skip_existing, claim_timeout, talk) for clip in sound]
    outcomes = [clip.failure() for clip in clips if clip.problem]
    write_results(results, outcomes)
    if not (fail_fast and outcomes):
        make = functools.partial(make_worker, devices)
        slots = min(len(devices) or workers or 1, max(len(items), 1))
        pool = ray_pool(make, slots, gpus_per_actor) if engine == "ray" else ProcessPool(make, slots)

        def keep(outcome: "Outcome") -> None:
            outcomes.append(outcome)
            write_results(results, outcomes)

        stop_by_sigterm(Stopped)
        try:
            with display(progress_kind(quiet), items, keep) as listener:
                run_batch(items, pool, listener, retries, fail_fast)
        except (Stopped, KeyboardInterrupt) as error:
            say(f"Stopped after {len(outcomes)} of {len(clips)} clips; to go on, start it again with --skip-existing")
            raise click.exceptions.Exit(STOPPED if isinstance(error, Stopped) else INTERRUPTED) from None
    if not quiet:
        show_outcomes(outcomes)
        say(", ".join(f"{number} {status}" for status, number in counted(outcomes).items()) or "nothing to do")
    click.echo(results)
    if any(outcome.status not in ("done", "skipped") for outcome in outcomes):
        raise click.exceptions.Exit(SOME_FAILED)


def gpu_names(text: str | None) -> list[str]:
    """`0,2` -> cuda:0, cuda:2. Raises click.UsageError."""
    numbers = text.split(",") if text else []
    if not all(number.strip().isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise click.UsageError(f"--gpus {text}: give different numbers with commas between them, for instance 0,1")
    return [f"cuda:{number.strip()}" for number in numbers]


def results_file(manifest: Path, shard: "Shard | None") -> Path:
    """`clips.results.jsonl` beside `clips.jsonl`; every shard has its own."""
    part = f".{shard.index}-of-{shard.count}" if shard and shard.count > 1 else ""
    return manifest.with_name(f"{manifest.stem}{part}.results.jsonl")


# Rows to edits


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
            if not context.params["output"] and self.template:
                context.params["output"] = Path(self.named(row, context.params))
        except click.ClickException as error:
            if len(problems) == before:
                problems.append(f"line {row.line}: {error.format_message()}")
        return clip, context

    def named(self, row: "Row", params: dict[str, Any]) -> str:
        """The output by the template."""
        from dpe_cli.manifest import fill

        source, drivers = params["source"], [params[name] for name in ("driving", "exp_driving", "pose_driving")]
        driving = next((path.stem for path in drivers if path), "")
        mode = params["mode"] or ("both" if drivers[1] and drivers[2] else "pose" if drivers[2] else "exp")
        return fill(
            self.template, id=row.id, stem=source.stem, parent=str(source.parent), driving=driving, mode=mode,
            line=row.line,
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


def inputs_of(context: click.Context) -> dict[str, Path]:
    """The files that an edit reads, weights left out, by what they are to it."""
    from dpe_cli.commands.edit import choose_edits

    params = context.params
    inputs = {name: value for name, value in params.items() if isinstance(value, Path) and name not in NOT_IN_THE_KEY}
    for name in ("audio", "face", "driving_face"):  # words, or files
        if "." in params[name] and Path(params[name]).is_file():
            inputs[name] = Path(params[name])
    if params["several"]:
        for number, path in enumerate(choose_edits(params["several"], "largest", 1.0).paths):
            inputs[f"driving {number}"] = path
    return inputs


def print_all(ctx: click.Context, clips: list[Clip]) -> None:
    """One command a line, for OpenCue, GNU parallel, xargs."""
    named = [layer.file for layer in layers.files_read(ctx) if layer.file != layers.FOLDER_FILE]
    for clip in clips:
        line = shlex.join(["dpe", "edit", *(f"--config={file}" for file in named), *clip.arguments])
        if "\n" in line or "\r" in line:
            raise click.UsageError(f"{clip.row.id}: a name with a line break cannot be printed as one command a line")
        click.echo(line)


# The worker


@dataclass(frozen=True)
class Work:
    """What a worker needs to do one clip."""

    arguments: list[str]  # of `dpe edit`
    defaults: dict[str, Any]  # what files of settings say
    folder: str  # that file names start from
    output: Path
    skip: bool  # a matching done-marker is enough
    mark: str | None  # of the done-marker when the batch began: another one means that another machine did it since
    timeout: float  # of claims


class Lost(Exception):
    """Our claim was taken over."""


class WorkerHost(Host):
    """Keeps the networks, and passes the progress of the edit in hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.tell: Tell = lambda done, total, what: None
        self.claim: Any = None

    def progress(self, quiet: bool) -> Callable[[Iterable, int | None, str], Iterator]:
        def passed_on(items: Iterable, total: int | None, what: str) -> Iterator:
            for count, item in enumerate(items, 1):
                if self.claim.lost.is_set():
                    raise Lost
                self.tell(count, total, what)
                yield item

        return passed_on


class EditWorker:
    """Does one edit after the other in this process; `device` is in place of what the edits ask for."""

    def __init__(self, device: str | None = None, host: WorkerHost | None = None):
        self.device, self.host = device, host or WorkerHost()

    def __call__(self, item: "Item", tell: "Tell") -> "Outcome":
        """Never raises but for KeyboardInterrupt."""
        from dpe_cli.batch import Outcome

        started, work = time.monotonic(), item.payload
        self.host.tell = tell
        known = {"id": item.id, "output": str(work.output), "worker": self.device or f"process {os.getpid()}"}
        try:
            status, facts = self.attempt(work)
            code, reason = 0, facts.pop("reason", None)
        except Lost:
            status, code, reason, facts = "busy", 0, "another machine took it over", {}
        except click.ClickException as error:
            status, code, reason, facts = "failed", error.exit_code, error.format_message(), {}
            if isinstance(error.__cause__, Lost):
                status, code = "busy", 0
        except click.exceptions.Exit as error:
            status, code, reason, facts = "stopped", error.exit_code, "stopped", {}
        except DPEError as error:
            status, code, reason, facts = "failed", error.exit_code, str(error), {}
        except MemoryError:
            status, code, reason, facts = "failed", OUT_OF_MEMORY, "the memory is used up", {}
        except Exception as error:
            if "--verbose" in work.arguments:
                traceback.print_exc()
            status, code, reason, facts = "failed", 1, f"unexpected {type(error).__name__}: {error}", {}
        seconds = time.monotonic() - started
        return Outcome(status=status, exit_code=code, reason=reason, seconds=seconds, **{**known, **facts})

    def attempt(self, work: Work) -> tuple[str, dict[str, Any]]:
        """Status and facts for the outcome. Raises what the edit raises."""
        from dpe_cli.ledger import claimed

        os.chdir(work.folder)
        arguments = [*work.arguments, *([f"--device={self.device}"] if self.device else [])]
        made_of = ingredients(self.context(arguments, work))
        if done := self.made(work, made_of["key"]):
            return "skipped", done
        with claimed(work.output, work.timeout) as claim:
            if claim is None:
                return "busy", {"reason": "another machine works on it"}
            if done := self.made(work, made_of["key"]):  # between the look and the claim
                return "skipped", done
            if claim.taken_over:  # whose owner may have died after writing the output
                arguments.append("--overwrite")
            return "done", self.edit(arguments, work, claim, made_of)

    def context(self, arguments: list[str], work: Work) -> click.Context:
        """The parsed options of the edit."""
        return edit.make_context("edit", list(arguments), default_map=dict(work.defaults), obj=self.host)

    def made(self, work: Work, key: str) -> dict[str, Any] | None:
        """Facts of an output that is there already, made of the same, if that is enough."""
        from dpe_cli.ledger import read_marker

        marker = read_marker(work.output)
        if not marker or marker.get("key") != key or not (work.skip or marker.get("mark") != work.mark):
            return None
        return {"frames": marker.get("frames"), "reason": "it is there, made of the same inputs, settings and weights"}

    def edit(self, arguments: list[str], work: Work, claim: Any, made_of: dict[str, Any]) -> dict[str, Any]:
        """Runs the edit and marks its output as done."""
        from dpe_cli.ledger import write_marker

        self.host.claim = claim
        unheard = io.StringIO()  # what an edit says has its place in the results
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(unheard))
            if "--verbose" not in arguments:
                stack.enter_context(contextlib.redirect_stderr(unheard))
            context = stack.enter_context(self.context(arguments, work))
            report = edit.invoke(context)
        frames = report.counts()["frames"]
        facts = {"engine": report.engine, "detector": report.detector, "frames": frames, "seconds": report.seconds}
        write_marker(work.output, {"dpe": dpe_cli.__version__, "command": ["edit", *arguments], **made_of, **facts})
        return {"frames": frames}


def ingredients(context: click.Context) -> dict[str, Any]:
    """What an output is made of, and the key of it all. Raises DPEError for a file that is not there."""
    from dpe_cli.errors import InputError
    from dpe_cli.ledger import digest_of, key_of
    from dpe_cli.weights import find

    weights = find(context.params["weights"])
    try:
        inputs = {role: {"path": str(path), "sha256": digest_of(path)} for role, path in inputs_of(context).items()}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", "check the name") from error
    left_out = {*NOT_IN_THE_KEY, *inputs}
    settings = {name: value for name, value in context.params.items() if name not in left_out}
    hashes = [f"{role} {facts['sha256']}" for role, facts in inputs.items()]
    weights_hash = digest_of(weights)
    return {
        "key": key_of(settings, hashes, weights_hash, dpe_cli.__version__),
        "inputs": inputs,
        "weights": {"path": str(weights), "sha256": weights_hash},
        "settings": settings,
    }


def make_worker(devices: list[str], slot: int) -> EditWorker:
    """The worker of a slot, made in its own process."""
    return EditWorker(devices[slot] if devices else None)


def ray_pool(make: Callable, slots: int, gpus: float) -> Any:
    """Actors. Raises click.UsageError without the package."""
    try:
        from dpe_cli.ray_pool import RayPool
    except ModuleNotFoundError as error:
        raise click.UsageError("--engine ray needs a package: pip install 'dpe-cli[ray]'") from error
    return RayPool(make, slots, gpus)


# How it is shown


class Display:
    """Keeps the outcomes and shows nothing."""

    def __init__(self, items: list["Item"], keep: Callable[["Outcome"], None]):
        self.keep, self.count, self.finished_count = keep, len(items), 0
        self.costs = {item.id: item.cost for item in items}
        self.done_cost, self.started = 0.0, time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def began(self, slot: int, item: "Item") -> None:
        pass

    def heard(self, event: "Event") -> None:
        pass

    def finished(self, slot: int | None, outcome: "Outcome") -> None:
        self.keep(outcome)
        self.finished_count += 1
        self.done_cost += self.costs[outcome.id]
        self.show(outcome)

    def show(self, outcome: "Outcome") -> None:
        """One more clip is settled."""

    @property
    def percent(self) -> float:
        """How far the batch is, by cost."""
        total = sum(self.costs.values())
        return 100 * self.done_cost / total if total else 100 * self.finished_count / max(self.count, 1)


class Lines(Display):
    """A line for each clip, for people."""

    def show(self, outcome: "Outcome") -> None:
        click.echo(f"{self.finished_count} of {self.count}: {outcome.id} {words(outcome)}", err=True)


class JsonLines(Display):
    """A JSON object for each clip, on stderr."""

    def show(self, outcome: "Outcome") -> None:
        facts = {"done": self.finished_count, "total": self.count, "percent": round(self.percent, 2), "unit": "clips"}
        click.echo(json.dumps({**facts, "clip": json.loads(outcome.line())}), err=True)


class OpenJd(Display):
    """What a worker of Open Job Description reads on standard output."""

    def began(self, slot: int, item: "Item") -> None:
        click.echo(f"openjd_status: editing {item.id}")

    def show(self, outcome: "Outcome") -> None:
        click.echo(f"openjd_progress: {self.percent:.1f}")
        if outcome.status == "failed":
            click.echo(f"openjd_status: {outcome.id} {words(outcome)}")


class Table(Display):
    """A table on the terminal: the batch, and what each worker does."""

    def __enter__(self) -> "Display":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
        self.bars = Progress(*columns, TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(),
                             console=Console(stderr=True))  # fmt: skip
        self.whole = self.bars.add_task("batch", total=max(sum(self.costs.values()), 1), note=f"0 of {self.count}")
        self.slots: dict[int, Any] = {}
        self.failures = 0
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def began(self, slot: int, item: "Item") -> None:
        if slot not in self.slots:
            self.slots[slot] = self.bars.add_task("", total=None, note="")
        self.bars.reset(self.slots[slot], description=f"  {item.id}", total=None, note="starting")

    def heard(self, event: "Event") -> None:
        if event.slot in self.slots:
            note = f"{event.what}: {event.done}" + (f" of {event.total}" if event.total else "")
            self.bars.update(self.slots[event.slot], completed=event.done, total=event.total, note=note)

    def show(self, outcome: "Outcome") -> None:
        if outcome.status == "failed":
            self.failures += 1
            self.bars.console.print(f"{outcome.id} {words(outcome)}", markup=False, highlight=False)
        note = f"{self.finished_count} of {self.count}" + (f", {self.failures} failed" if self.failures else "")
        self.bars.update(self.whole, completed=self.done_cost, note=note)


def display(kind: str, items: list["Item"], keep: Callable[["Outcome"], None]) -> Display:
    """By the kind of progress."""
    kinds = {"bar": Table, "plain": Lines, "json": JsonLines, "openjd": OpenJd, "none": Display}
    return kinds[kind](items, keep)


def words(outcome: "Outcome") -> str:
    """For instance: done: 120 frames, 4.1 s; failed (3): talk.mp4 does not exist"""
    if outcome.status == "done":
        return f"done: {outcome.frames} frames, {outcome.seconds:.1f} s"
    code = f" ({outcome.exit_code})" if outcome.exit_code else ""
    return f"{outcome.status}{code}: {outcome.reason}"


def show_outcomes(outcomes: list["Outcome"]) -> None:
    """A table on stderr: every clip, or where they are many those that failed."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = (
        outcomes if len(outcomes) <= ROWS_SHOWN else [one for one in outcomes if one.status in ("failed", "stopped")]
    )
    if not shown:
        return
    table = RichTable(box=SIMPLE)
    for name, side in (("clip", "left"), ("status", "left"), ("code", "right"), ("frames", "right"), ("s", "right")):
        table.add_column(name, justify=side)
    table.add_column("reason")
    for one in shown:
        frames = "" if one.frames is None else str(one.frames)
        cells = (one.id, one.status, str(one.exit_code), frames, f"{one.seconds:.1f}", one.reason or "")
        table.add_row(*map(Text, cells))
    Console(stderr=True, width=None if sys.stderr.isatty() else TABLE_WIDTH).print(table)
