"""What commands tell while they work: progress, remarks, tables, the last line."""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from dpe_cli.commands.inputs import as_known

TABLE_WIDTH = 120  # where there is no terminal
LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal
MACHINE_SECONDS = 1.0  # between two lines for a program
PROGRESS = ("auto", "bar", "plain", "json", "openjd", "none")
PROGRESS_META = "dpe.progress"  # the choice, in the `meta` that all contexts of a run share


def progress_option(function: Callable) -> Callable:
    """--progress, which `progress_for` looks at."""

    def keep(ctx: click.Context, param: click.Parameter, value: str) -> None:
        ctx.meta[PROGRESS_META] = value

    return click.option(
        "--progress", type=click.Choice(PROGRESS), default="auto", show_default=True, expose_value=False, callback=keep,
        help="How to tell how far it is; auto is a bar on a terminal, else plain lines.",
    )(function)  # fmt: skip


def check_standard_output(ctx: click.Context) -> None:
    """Raises click.UsageError for text that would go where the video goes."""
    said = ["--json"] if ctx.params["as_json"] else []
    said += ["--progress openjd"] if ctx.meta.get(PROGRESS_META) == "openjd" else []
    if said and str(ctx.params["output"]) == "-":
        raise click.UsageError(f"{said[0]} and the video cannot both go to standard output")


def speaker(quiet: bool) -> Callable[[str], None]:
    """What remarks are said with: lines on stderr, or nothing."""
    ctx = click.get_current_context(silent=True)  # here, for it is of this thread
    return (lambda message: None) if quiet else (lambda message: click.echo(as_known(ctx, message), err=True))


def print_table(title: str, rows: list[dict[str, Any]], stderr: bool = False) -> None:
    """Rows of the same keys, on stdout or stderr."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for key, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(key.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    stream = sys.stderr if stderr else sys.stdout
    Console(stderr=stderr, width=None if stream.isatty() else TABLE_WIDTH).print(table)


def progress_kind(quiet: bool) -> str:
    """The --progress of the current command, settled: bar, plain, json, openjd or none."""
    ctx = click.get_current_context(silent=True)
    kind = ctx.meta.get(PROGRESS_META, "auto") if ctx else "auto"
    if quiet:
        return "none"
    return ("bar" if sys.stderr.isatty() else "plain") if kind == "auto" else kind


def progress_for(quiet: bool, unit: str = "frames") -> Callable[[Iterable, int | None, str], Iterator]:
    """The progress that was asked for by --progress or -q; `unit` is what the items are called."""
    kinds = {"bar": progress_bar, "plain": progress_lines, "json": progress_json, "openjd": progress_openjd}
    kind = progress_kind(quiet)
    return functools.partial(kinds[kind], unit=unit) if kind in kinds else lambda items, total, what: iter(items)


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


def progress_json(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and writes a JSON object a second, and one at the end, each on a line of stderr."""
    started = time.monotonic()

    def tell(count: int, total: int | None) -> None:
        seconds = time.monotonic() - started
        rate = count / max(seconds, 1e-6)
        line = {"what": what, "unit": unit, "done": count, "total": total}
        click.echo(json.dumps({**line, "seconds": round(seconds, 2), "per_second": round(rate, 3)}), err=True)

    yield from told(items, total, tell)


def progress_openjd(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and tells a worker of Open Job Description, which reads standard output, how far they are."""
    click.echo(f"openjd_status: {what}")

    def tell(count: int, total: int | None) -> None:
        if total:
            click.echo(f"openjd_progress: {min(100.0, 100 * count / total):.1f}")

    yield from told(items, total, tell)


def told(items: Iterable, total: int | None, tell: Callable[[int, int | None], None]) -> Iterator:
    """Passes the items on and calls `tell` with their number once a second, and with all of them at the end."""
    last, count = time.monotonic(), 0
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= MACHINE_SECONDS:
            tell(count, total)
            last = time.monotonic()
    tell(count, count)


def progress_line(what: str, count: int, total: int | None, seconds: float, unit: str = "frames") -> str:
    """For instance: editing talk.mp4: 40 of 120 frames, 8.1 frames/s, 10 s left"""
    rate = count / max(seconds, 1e-6)
    done = f"{count} of {total} {unit}" if total else f"{count} {unit}"
    left = f", {max(total - count, 0) / rate:.0f} s left" if total and rate else ""
    return f"{what}: {done}, {pace(rate, unit)}{left}"


def pace(rate: float, unit: str) -> str:
    """A rate in items a second, told by the minute where it is slow."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"


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
