"""The numbers of an evaluation for people: tables on a terminal, and one HTML page that needs nothing beside it."""

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from dpe_cli.errors import OutputError
from dpe_cli.evaluate import SPLIT, Strip
from dpe_cli.report import write_text

if TYPE_CHECKING:
    from rich.table import Table

Summary = dict[str, Any]  # what `evaluate.evaluate` gives
JSON_NAME, PAGE_NAME = "eval.json", "eval.html"
TILE = 160  # pixels, side of a picture in a strip
ARROWS = {"higher": "↑", "lower": "↓", "1": "→ 1"}
COLOURS = ("#888888", "#c06000", "#1060c0", "#108040", "#a01060", "#6040c0")  # the baselines' come first
ROW, LEFT, WIDTH = 15, 190, 720  # of a plot, pixels

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .6em 0 1.2em }
th, td { text-align: left; padding: .2em .6em; border-bottom: 1px solid #ddd; vertical-align: top }
.scale, small { color: #666; font-size: 85% }
figure { margin: 1em 0 } figure img { width: 100%; image-rendering: auto }
.names { display: grid; text-align: center; font-size: 85% }
svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #333 }
"""


def write(folder: Path, summary: Summary, strips: list[Strip]) -> Path:
    """Writes eval.json and eval.html into an existing folder; gives the page's path. Raises OutputError."""
    try:
        write_text(folder / JSON_NAME, json.dumps(summary, indent=1, default=str, allow_nan=False) + "\n")
        write_text(folder / PAGE_NAME, page(summary, strips))
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror}", "choose another folder with -o") from error
    return folder / PAGE_NAME


def show(value: float | None) -> str:
    """A number with about three digits, "-" for none."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"


def heading(table: dict[str, Any]) -> str:
    """For instance: cross, exp: 4 pairs of 8 frames, held-out identities"""
    lengths = sorted({pair["frames"] for pair in table["pairs"]})
    frames = " to ".join(str(n) for n in dict.fromkeys((lengths[0], lengths[-1])))
    return f"{table['protocol']}, {table['mode']}: {len(table['pairs'])} pairs of {frames} frames, {table['split']}"


def measured_by(metric: dict[str, Any]) -> str:
    """For instance: from 0, against the driving frame; LPIPS 0.1, alexnet"""
    return f"{metric['scale']}; {metric['extractor'] or 'not measured'}"


def reason(cells: Iterable[dict[str, Any]]) -> str:
    """Why systems have no value, nothing where all have one."""
    return "; ".join(dict.fromkeys(cell["reason"] for cell in cells if cell["value"] is None))


def cell_text(cell: dict[str, Any]) -> tuple[str, str]:
    """The mean over the pairs, and their standard deviation behind ± where there are several."""
    return show(cell["value"]), f"±{show(cell['deviation'])}" if cell.get("pairs", 0) > 1 else ""


def terminal_tables(summary: Summary) -> "list[Table]":
    """A rich table for each protocol and mode, and one that says what each number is and what measures it."""
    from rich.table import Table

    def table_of(title: str) -> Table:
        return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)

    tables = []
    for one in summary["tables"]:
        table = table_of(heading(one))
        table.add_column("number", no_wrap=True)
        for name in summary["systems"]:
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("", style="dim", ratio=1)
        for key, metric in summary["metrics"].items():
            cells = [one["values"][key][name] for name in summary["systems"]]
            shown = [" ".join(filter(None, cell_text(cell))) for cell in cells]
            table.add_row(f"{metric['title']} {ARROWS[metric['better']]}", *shown, reason(cells))
        tables.append(table)
    legend = table_of(f"The numbers, over {summary['clips']} clips of {summary['identities']} people ({SPLIT})")
    for name in ("number", "scale", "measured by"):
        legend.add_column(name, overflow="fold")
    for metric in summary["metrics"].values():
        legend.add_row(metric["title"], metric["scale"], metric["extractor"] or "-")
    return [*tables, legend]


# The page


def page(summary: Summary, strips: list[Strip]) -> str:
    """All of it as one self-contained HTML document."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>dpe eval</title>",
        f"<style>{STYLE}</style><h1>dpe eval</h1>",
        f"<p>{summary['clips']} clips of {summary['identities']} people, {escape(summary['split'])}: training never "
        f"saw them. Pictures are compared at {summary['picture_size']} pixels. Each number is the mean over the pairs, "
        "behind ± their standard deviation. copy-source and copy-driving edit nothing: they are the floor and the "
        "ceiling. ↑ more is better, ↓ less, → 1 nearer to 1.</p>",
        systems_table(summary),
    ]
    for table in summary["tables"]:
        parts += [f"<h2>{escape(heading(table))}</h2>", numbers_table(summary, table), mouth_plot(table)]
        here = [s for s in strips if (s.protocol, s.mode) == (table["protocol"], table["mode"])]
        parts += [figure(strip) for strip in here]
    parts.append("<h2>Every pair</h2><p>A dot for each pair, a bar at their mean.</p>")
    parts += [dot_plot(summary, key) for key in summary["metrics"]]
    return "\n".join(part for part in parts if part) + "</html>\n"


def systems_table(summary: Summary) -> str:
    """What was compared."""
    rows = [
        f"<tr><th>{escape(name)}<td>{escape(', '.join(f'{k}: {v}' for k, v in about.items()))}"
        for name, about in summary["systems"].items()
    ]
    return f"<table>{''.join(rows)}</table>"


def numbers_table(summary: Summary, table: dict[str, Any]) -> str:
    """One protocol in one mode."""
    names = list(summary["systems"])
    rows = ["<tr><th>number" + "".join(f"<th>{escape(name)}" for name in names) + "<th>scale; measured by"]
    for key, metric in summary["metrics"].items():
        cells = [table["values"][key][name] for name in names]
        row = f"<tr><th>{escape(metric['title'])} {ARROWS[metric['better']]}"
        for cell in cells:
            value, spread = cell_text(cell)
            row += f"<td>{value} <small>{spread}</small>"
        why = reason(cells)
        rows.append(f"{row}<td class=scale>{escape(measured_by(metric))}" + (f"<br>- : {escape(why)}" if why else ""))
    return f"<table>{''.join(rows)}</table>"


def figure(strip: Strip) -> str:
    """The pictures of one pair as one inline PNG, their names above."""
    tiles = [
        np.hstack([cv2.resize(picture, (TILE, TILE), interpolation=cv2.INTER_AREA) for picture in row])
        for row in strip.rows
    ]
    _, png = cv2.imencode(".png", np.vstack(tiles)[..., ::-1])
    names = "".join(f"<span>{escape(name)}</span>" for name in strip.columns)
    width = TILE * len(strip.columns)
    return (
        f'<figure style="max-width:{width}px"><figcaption><small>{escape(strip.title)}</small></figcaption>'
        f'<div class=names style="grid-template-columns:repeat({len(strip.columns)},1fr)">{names}</div>'
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(png.tobytes()).decode()}"></figure>'
    )


def dot_plot(summary: Summary, key: str) -> str:
    """One number over all protocols, modes and systems, as SVG; nothing where nobody has it."""
    metric, rows = summary["metrics"][key], []
    for table in summary["tables"]:
        for number, (name, cell) in enumerate(table["values"][key].items()):
            if cell["value"] is not None:
                label = f"{table['protocol']}, {table['mode']}: {name}"
                rows.append((label, colour(number), cell["value"], [v for v in cell["each"] if v is not None]))
    if not rows:
        return ""
    values = [value for *_, each in rows for value in each]
    low, high = min(values), max(values)
    place = lambda value: LEFT + (WIDTH - LEFT - 20) * (value - low) / ((high - low) or 1) + 5  # noqa: E731
    height, marks = ROW * len(rows) + 20, []
    for number, (label, tint, centre, each) in enumerate(rows):
        y = ROW * number + 10
        marks.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        marks += [f'<circle cx="{place(v):.1f}" cy="{y}" r="2.5" fill="{tint}" opacity="0.45"/>' for v in each]
        marks.append(f'<rect x="{place(centre) - 1:.1f}" y="{y - 6}" width="2" height="12" fill="{tint}"/>')
    marks.append(f'<text x="{LEFT}" y="{height - 2}">{show(low)}</text>')
    marks.append(f'<text x="{WIDTH - 10}" y="{height - 2}" text-anchor="end">{show(high)}</text>')
    title = f"{metric['title']} {ARROWS[metric['better']]} ({measured_by(metric)})"
    return f"<h3>{escape(title)}</h3>{svg(height, marks)}"


def mouth_plot(table: dict[str, Any]) -> str:
    """Mouth opening over the frames of the first pair, driving against results; nothing without landmarks."""
    tracks = {name: t for name, t in table["mouth_openings"].items() if name not in ("copy-source", "copy-driving")}
    values = [value for track in tracks.values() for value in track if value is not None]
    if not values:
        return ""
    low, high, height, lines = min(values), max(values), 150, []
    for number, (name, track) in enumerate(tracks.items()):
        step = (WIDTH - LEFT - 20) / max(len(track) - 1, 1)
        corners = [
            f"{LEFT + step * i:.1f},{height - 15 - (height - 30) * (value - low) / ((high - low) or 1):.1f}"
            for i, value in enumerate(track)
            if value is not None
        ]
        tint = colour(number)
        lines.append(f'<polyline points="{" ".join(corners)}" fill="none" stroke="{tint}" stroke-width="1.8"/>')
        lines.append(f'<text x="8" y="{20 + ROW * number}" style="fill:{tint}">{escape(name)}</text>')
    lines.append(f'<text x="{LEFT - 8}" y="{height - 12}" text-anchor="end">{show(low)}</text>')
    lines.append(f'<text x="{LEFT - 8}" y="20" text-anchor="end">{show(high)}</text>')
    return f"<p><small>Mouth opening over the frames of the first pair</small></p>{svg(height, lines)}"


def svg(height: int, marks: list[str]) -> str:
    """A drawing WIDTH pixels wide."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">{"".join(marks)}</svg>'


def colour(number: int) -> str:
    """The colour of the system, or track, of that number."""
    return COLOURS[number % len(COLOURS)]
