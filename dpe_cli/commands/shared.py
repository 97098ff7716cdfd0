"""What commands have in common: failures as one line and an exit code, options, progress, tables."""

import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from dpe_cli.errors import DPEError

MODES = ("exp", "pose", "both")
INTERRUPTED = 130
STOPPED = 75  # by SIGTERM; can be resumed
OUT_OF_MEMORY = 6
TABLE_WIDTH = 120  # where there is no terminal
LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal
FILE = click.Path(path_type=Path)  # a missing input is our error 3, not click's 2
FOLDER = click.Path(path_type=Path, file_okay=False)
SECONDS = {"type": click.FloatRange(min=0), "metavar": "SECONDS"}
WEIGHTS = {"metavar": "PATH|NAME", "help": "Checkpoint: our .safetensors, an official .pt, or a name."}


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class Command(click.Command):
    """A command whose failures become one line and the right exit code; -v adds the traceback of a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except DPEError as error:
            raise Failure(str(error), error.exit_code) from error
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing was left half-written", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except MemoryError as error:
            raise Failure("the memory is used up; use a smaller --batch-size", OUT_OF_MEMORY) from error
        except Exception as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            what = f"unexpected {type(error).__name__}: {error}"
            raise Failure(what if ctx.params.get("verbose") else f"{what}; run with -v for the traceback", 1) from error


class Cli(click.Group):
    """The group of our commands."""

    command_class = Command
    group_class = type


def shared_options(function: Callable) -> Callable:
    """Options of commands that run one checkpoint: --weights and `machine_options`."""
    return click.option("--weights", **WEIGHTS)(machine_options(function))


def detector_options(function: Callable) -> Callable:
    """Options of every command that looks for faces: --detector, --face-models."""
    function = click.option("--face-models", type=FILE, help="Folder or file of the detector's models.")(function)
    choices = "auto, centerface, insightface, yunet or mediapipe."
    return click.option("--detector", default="auto", show_default=True, help=choices)(function)


def machine_options(function: Callable) -> Callable:
    """Options of every command that runs the networks: --device, --precision, --backend, --batch-size, -q, -v."""
    options = [
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
            default="auto",
            show_default=True,
            help="Number format of the networks; int8 is for CPUs and not exact.",
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "torch", "compile", "onnx", "openvino"]),
            default="auto",
            show_default=True,
            help="What runs the networks.",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), help="Frames at once.  [default: by device]"),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only errors."),
        click.option("-v", "--verbose", is_flag=True, help="Say more; show the traceback of a bug."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def given(option: str) -> bool:
    """Whether the user named an option of the current command."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not click.core.ParameterSource.DEFAULT


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of the same keys, on stdout."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for key, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(key.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def progress_for(quiet: bool, unit: str = "frames") -> Callable[[Iterable, int | None, str], Iterator]:
    """Nothing, a bar on a terminal, or lines in a log; `unit` is what the items are called."""
    if quiet:
        return lambda items, total, what: iter(items)
    return functools.partial(progress_bar if sys.stderr.isatty() else progress_lines, unit=unit)


def progress_bar(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on under a bar with their number, how many a second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, rate="")
        for count, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=count, rate=pace(count / max(time.monotonic() - started, 1e-6), unit))


def progress_lines(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and writes a line every five seconds and at each tenth of the way."""
    started = last = time.monotonic()
    count = shown = 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS or (total and count - shown >= total / 10 and now - last >= 1):
            click.echo(progress_line(what, count, total, now - started, unit), err=True)
            last, shown = now, count
    click.echo(progress_line(what, count, count, time.monotonic() - started, unit), err=True)


def progress_line(what: str, count: int, total: int | None, seconds: float, unit: str = "frames") -> str:
    """For instance: editing talk.mp4: 40 of 120 frames, 8.1 frames/s, 10 s left"""
    rate = count / max(seconds, 1e-6)
    done = f"{count} of {total} {unit}" if total else f"{count} {unit}"
    left = f", {max(total - count, 0) / rate:.0f} s left" if total and rate else ""
    return f"{what}: {done}, {pace(rate, unit)}{left}"


def pace(rate: float, unit: str) -> str:
    """A rate in items a second, told by the minute where it is slow."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"
