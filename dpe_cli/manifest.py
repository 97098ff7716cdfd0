"""The list of a batch: its rows, the names of its outputs, and which rows are whose.

JSON lines, one object a clip, or CSV with a line of names. `id`, and whatever options `dpe edit` has, by their long
names; `cost`, if given, stands in place of what the clip's length and size say.
"""

import csv
import io
import json
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dpe_cli.errors import InputError, ManifestError
from dpe_cli.limits import TEXT_BYTES, check_file

FIELDS = ("id", "stem", "parent", "driving", "mode", "line")  # of an output template
SHOWN = 20  # problems told at once

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One clip."""

    line: int  # in the file, from 1
    id: str
    options: dict[str, Any]  # of edit, by their long names; text, numbers, booleans or lists of them
    cost: float | None = None


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a list; `index` counts from 1."""

    index: int
    count: int
    origin: str  # whence it is known, for people

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def read_manifest(path: Path) -> list[Row]:
    """All rows. Raises InputError if it cannot be read, ManifestError with everything that is wrong in it."""
    check_file(path, TEXT_BYTES)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "name a list of clips") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}", "write it as JSON lines or CSV in UTF-8") from error
    problems: list[str] = []
    raw = read_csv(text, problems) if path.suffix.lower() == ".csv" else read_json_lines(text, problems)
    rows = [row for line, values in raw if (row := as_row(line, values, problems))]
    seen: dict[str, int] = {}
    for row in rows:
        if row.id in seen:
            problems.append(f"line {row.line}: the id {row.id} is that of line {seen[row.id]}")
        seen.setdefault(row.id, row.line)
    refuse(path, problems)
    if not rows:
        raise ManifestError(f"{path} lists no clip", "write one JSON object a line, or CSV with a line of names")
    return rows


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raises ManifestError if there are problems."""
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n".join(problems[:SHOWN])
        raise ManifestError(f"{path} cannot be run:\n{listed}{more}", "mend the list; nothing was started")


def read_json_lines(text: str, problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; lines that are empty or begin with # count for nothing."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold its other line breaks
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: no JSON ({error})")
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            problems.append(f"line {number}: no JSON object")
    return rows


def read_csv(text: str, problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and rows; an empty cell is a value that is not given."""
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            problems.append("line 1: every column needs a name of its own")
            return []
        for values in reader:
            if None in values or None in values.values():
                problems.append(f"line {reader.line_num}: not as many cells as the first line has names")
                continue
            rows.append((reader.line_num, {name: cell for name, cell in values.items() if cell.strip()}))
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: no CSV ({error})")
    return rows


def as_row(line: int, values: Mapping[str, Any], problems: list[str]) -> Row | None:
    """A row, None if it is wrong."""
    before = len(problems)
    options: dict[str, Any] = {}
    for written, value in values.items():
        name = written.strip().replace("_", "-")
        if name in options:
            problems.append(f"line {line}: {name} is there twice")
        if value is not None:
            options[name] = value
    identity, cost = options.pop("id", str(line)), options.pop("cost", None)
    if not isinstance(identity, str | int) or not str(identity).strip() or "\n" in str(identity):
        problems.append(f"line {line}: id must be text on one line")
    if cost is not None:
        try:
            cost = float(cost)
            if not 0 <= cost < float("inf"):
                raise ValueError
        except (TypeError, ValueError):
            problems.append(f"line {line}: cost must be a number from 0")
    for name, value in options.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            problems.append(f"line {line}: {name} must be text, a number, true, false or a list of them")
        elif any(isinstance(part, str) and "\0" in part for part in parts):
            problems.append(f"line {line}: {name} holds a null character")
    return Row(line, str(identity), options, cost) if len(problems) == before else None


# Names of outputs


def check_template(template: str) -> None:
    """Raises ManifestError unless it holds plain names of FIELDS only, and tells clips apart."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for text in (template, os.path.dirname(template)):
            fill(text, **dict.fromkeys(FIELDS, "x") | {"line": 1})
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        problem = f"{template} is no template of names ({error})"
        raise ManifestError(problem, f"use {{{'}, {'.join(FIELDS)}}}") from error
    if not names:
        raise ManifestError(f"{template} gives every clip the same name", f"use {{{'}, {'.join(FIELDS)}}}")


def fill(template: str, **fields: Any) -> str:
    """The template with its fields in place; `{line:04d}` works, `{id.x}` does not. Raises ValueError."""
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None and name not in FIELDS:
            raise ValueError(f"there is no field {name}")
    return template.format(**fields)


# Shards


def parse_shard(text: str) -> Shard:
    """Of "2/8". Raises ManifestError."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ManifestError(f"{text} is no shard", "write I/N, I from 1 to N, for instance 2/8")
    return Shard(int(index), int(count), "--shard")


def shard_of_scheduler(environment: Mapping[str, str]) -> Shard | None:
    """The shard that a SLURM array or a Kubernetes Indexed Job gave this process. Raises ManifestError."""
    try:
        if index := environment.get("SLURM_ARRAY_TASK_ID"):
            count, first = int(environment["SLURM_ARRAY_TASK_COUNT"]), int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
            number, rest = divmod(int(index) - first, step)
            if rest or not 0 <= number < count:
                raise ValueError
            return Shard(number + 1, count, "SLURM_ARRAY_TASK_ID")
        if index := environment.get("JOB_COMPLETION_INDEX"):
            count = int(environment["JOB_COMPLETIONS"])
            if not 0 <= int(index) < count:
                raise ValueError
            return Shard(int(index) + 1, count, "JOB_COMPLETION_INDEX")
    except KeyError as error:
        problem = f"this is one of several tasks, but {error.args[0]} does not say of how many"
        raise ManifestError(problem, f"set {error.args[0]}, or give --shard I/N (1/1: everything)") from error
    except (ValueError, ZeroDivisionError) as error:
        raise ManifestError(
            "the numbers of this array of tasks have gaps or make no sense", "give --shard I/N"
        ) from error
    return None


def divide(items: Iterable[T], costs: Iterable[float], ids: Iterable[str], count: int) -> list[list[T]]:
    """Parts of about the same cost, each with its most expensive items first; the same on every machine.

    Greedy: each item, the most expensive first, goes to the part that has least. Ids break ties, so the order of the
    list does not matter.
    """
    parts: list[list[T]] = [[] for _ in range(count)]
    loads = [0.0] * count
    ordered = sorted(zip(costs, ids, items, strict=True), key=lambda one: (-one[0], one[1]))
    for cost, _, item in ordered:
        least = min(range(count), key=lambda part: (loads[part], len(parts[part]), part))
        parts[least].append(item)
        loads[least] += cost
    return parts
