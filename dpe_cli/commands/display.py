"""How a batch tells how far it is: as a table, as lines, for programs; and what became of it."""

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.progress import TABLE_WIDTH

if TYPE_CHECKING:
    from dpe_cli.batch import Event, Item, Outcome

ROWS_SHOWN = 30  # of the table at the end; beyond that only failures


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
