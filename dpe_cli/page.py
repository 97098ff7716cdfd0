"""A report as one HTML page that needs no network: what was done, plots over time, the worst frames as pictures.

The pictures are read from the files that the report names, one frame each; nothing is kept but those shown.
"""

import base64
import json
from collections.abc import Callable
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dpe_cli.crop import levels
from dpe_cli.errors import DPEError, InputError, OutputError
from dpe_cli.limits import TEXT_BYTES, check_file
from dpe_cli.report import write_text
from dpe_cli.video import Frame, probe, read_frames

WORST = 6  # frames shown
APART = 0.5  # seconds between two of them: neighbours look alike
PICTURE_HEIGHT = 320  # pixels
AROUND = 0.15  # of the crop's side, shown on each side of it
WIDTH, HEIGHT, LEFT, BOTTOM = 900, 160, 48, 22  # of a plot, and of its margins, in pixels
COLUMNS = 1500  # points of a line at most: more cannot be seen

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
svg { width: 100%; height: auto; background: #fafafa; } svg text { font: 11px system-ui, sans-serif; fill: #666; }
figure { margin: 1rem 0; } figure img { max-width: 49%; } figcaption { color: #666; } .note { color: #a40; }
"""


def write_page(report: Path, output: Path, overwrite: bool = False) -> None:
    """Makes the page of a report that `dpe edit --report` wrote. Raises InputError, OutputError."""
    if output.exists() and report.exists() and output.samefile(report):
        raise OutputError(f"{output} is also an input", "choose another output")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists", "choose another output or add --overwrite")
    read = read_report(report)
    try:
        text = page(read)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, cv2.error) as error:
        raise InputError(f"{report} is no whole report", "name a file that dpe edit --report wrote") from error
    try:
        write_text(output, text)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}", "choose another output") from error


def read_report(path: Path) -> dict[str, Any]:
    """A report as it was written. Raises InputError if it is none."""
    check_file(path, TEXT_BYTES)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["counts"], [frame["fate"] for frame in report["frames"]]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "name a file that dpe edit --report wrote") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no report of an edit", "name a file that dpe edit --report wrote") from error
    return report


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    title = escape(Path(report["output"].get("path", "edit")).name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dpe: {title}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n{summary(report)}\n"
        f"<h2>Over time</h2>\n{plots(report['frames'])}\n"
        f"<h2>Worst frames</h2>\n{worst_frames(report)}\n</body></html>\n"
    )


def summary(report: dict[str, Any]) -> str:
    """A table of what was done."""
    counts, inputs, seam = report["counts"], report.get("inputs", {}), report.get("seam")
    reasons = "".join(f", {number} x {reason}" for reason, number in counts.get("reasons", {}).items())
    driving = ", ".join(str(each.get("path")) for each in inputs.get("driving", []))
    rows = {
        "Source": inputs.get("source", {}).get("path"),
        "Driving": driving,
        "Output": report["output"].get("path"),
        "Frames": f"{counts['frames']}: {counts['edited']} edited, {counts['passed']} passed{reasons}",
        "Seam score": seam and f"mean {seam['mean']}, worst {seam['worst']} in frame {seam['worst_frame']}",
        "Sharpness": seam and f"{seam['sharpness']} of the source's gradient energy",
        "Time": f"{report.get('seconds')} s, {report.get('frames_per_second')} frames/s",
        "Weights": report.get("engine", {}).get("weights"),
        "Detector": report.get("detector"),
        "Settings": ", ".join(f"{name} {value}" for name, value in report.get("settings", {}).items()),
        "Remarks": "; ".join(report.get("notes", [])),
    }
    cells = (f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items() if value)
    return f"<table>{''.join(cells)}</table>"


# Plots


def plots(frames: list[dict[str, Any]]) -> str:
    """What is plotted, of each edit by itself: a report has a line for each edit of a frame."""
    edits: dict[int, list[dict[str, Any]]] = {}
    for frame in frames:
        edits.setdefault(frame.get("edit", 0), []).append(frame)
    lines = [
        (name + (f", edit {number + 1}" if len(edits) > 1 else ""), unit, own, measured(own))
        for name, unit, measured in (
            ("Confidence of the face detector", "", lambda own: [frame.get("score") for frame in own]),
            ("Seam score", "", lambda own: [frame.get("seam") for frame in own]),
            ("Jitter of the crop box", "% of its side", jitter),
            ("Turn that is asked of the head", "degrees", lambda own: [frame.get("turn") for frame in own]),
        )
        for number, own in sorted((edits or {0: []}).items())
    ]
    return "".join(plot(*line) for line in lines)


def jitter(frames: list[dict[str, Any]]) -> list[float | None]:
    """How far each box's centre is from the middle between its neighbours', percent of its side.

    0 for a still or an evenly moving face; None where a neighbour has no box or belongs to another track.
    """
    values: list[float | None] = [None] * len(frames)
    for n in range(1, len(frames) - 1):
        three = frames[n - 1 : n + 2]
        if all(each.get("box") for each in three) and len({each.get("track") for each in three}) == 1:
            boxes = np.array([each["box"] for each in three])
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            side = boxes[1, 2] - boxes[1, 0]
            values[n] = float(100 * np.hypot(*(centres[1] - (centres[0] + centres[2]) / 2)) / side)
    return values


def plot(name: str, unit: str, frames: list[dict[str, Any]], values: list[float | None]) -> str:
    """One line over time as inline SVG; where frames were passed the ground is grey."""
    known = [value for value in values if value is not None]
    title = f"<h3>{escape(name)}{f' ({escape(unit)})' if unit else ''}</h3>"
    if not known:
        return f'{title}<p class="note">not measured in this edit</p>'
    times = [float(frame["time"]) for frame in frames]
    first, span = times[0], max(times[-1] - times[0], 1e-9)
    top = max(known) or 1.0
    x = [LEFT + (time - first) / span * (WIDTH - LEFT - 8) for time in times]
    y = [None if value is None else 8 + (1 - value / top) * (HEIGHT - BOTTOM - 8) for value in values]
    passed = "".join(
        f'<rect x="{a:.1f}" y="8" width="{max(b - a, 1):.1f}" height="{HEIGHT - BOTTOM - 8}" fill="#e4e4e4"/>'
        for a, b in spans([frame["fate"] == "passed" for frame in frames], x)
    )
    lines = "".join(
        f'<polyline fill="none" stroke="#1667b7" points="{points}"/>' for points in polylines(x, y, values) if points
    )
    ground = HEIGHT - BOTTOM
    labels = (
        f'<text x="{LEFT - 6}" y="14" text-anchor="end">{top:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{ground}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{times[0]:.2f} s</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{times[-1]:.2f} s</text>'
    )
    axis = f'<path d="M{LEFT} 8V{ground}H{WIDTH - 8}" fill="none" stroke="#999"/>'
    return f'{title}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{passed}{axis}{lines}{labels}</svg>'


def spans(marked: list[bool], x: list[float]) -> list[tuple[float, float]]:
    """From where to where frames are marked, in the plot."""
    found: list[tuple[float, float]] = []
    for n, mark in enumerate(marked):
        end = x[min(n + 1, len(x) - 1)]
        if mark and n and marked[n - 1]:
            found[-1] = found[-1][0], end
        elif mark:
            found.append((x[n], end))
    return found


def polylines(x: list[float], y: list[float | None], values: list[float | None]) -> list[str]:
    """The points of each unbroken part of a line; of long ones the highest value in each column only."""
    step = -(-len(x) // COLUMNS)
    parts, points = [], []
    for start in range(0, len(x), step):
        here = [n for n in range(start, min(start + step, len(x))) if values[n] is not None]
        if here:
            best = max(here, key=lambda n: values[n])
            points.append(f"{x[best]:.1f},{y[best]:.1f}")
        elif points:
            parts.append(points)
            points = []
    # a lone point would not be drawn: a line of no length with round ends is
    return [" ".join(part if len(part) > 1 else part * 2) for part in [*parts, points]]


# Pictures


def worst_frames(report: dict[str, Any]) -> str:
    """Source and output of the frames with the highest seam score.

    Where nothing was pasted back, of those whose heads turn the most, else of those with the least confidence.
    """
    edited = [frame for frame in report["frames"] if frame["fate"] == "edited"]
    by = next((name for name in ("seam", "turn") if any(frame.get(name) is not None for frame in edited)), None)
    # a held box has no confidence at all
    badness: Callable = (lambda f: f.get(by) or 0) if by else (lambda f: -(f.get("score") or 0))
    chosen: list[dict[str, Any]] = []
    for frame in sorted(edited, key=badness, reverse=True):
        if len(chosen) < WORST and all(abs(frame["time"] - other["time"]) >= APART for other in chosen):
            chosen.append(frame)
    if not chosen:
        return "<p>No frame was edited.</p>"
    whole = report["inputs"]["source"]
    rate = whole.get("fps") and Fraction(whole["fps"])  # that numbered pictures were read with
    first = report["frames"][0]["time"]
    figures = []
    for frame in chosen:
        since = None if whole.get("fps") is None else frame["time"]  # a still source has one time
        pictures = [
            picture(whole["path"], rate, since, None, frame["box"], None),
            picture(
                report["output"]["path"],
                rate,
                None,
                frame["time"] - first,
                frame["box"],
                (whole["width"], whole["height"]),
            ),
        ]
        words = f"frame {frame['index']}, {frame['time']:.3f} s, source and output"
        words += "".join(
            f", {label} {frame[name]}"
            for label, name in (("seam", "seam"), ("sharpness", "sharpness"), ("turn", "turn"), ("confidence", "score"))
            if frame.get(name) is not None
        )
        figures.append(f"<figure>{''.join(pictures)}<figcaption>{escape(words)}</figcaption></figure>")
    return "\n".join(figures)


def picture(
    path: str, rate: Fraction | None, time: float | None, since: float | None, box: list[float] | None,
    size: tuple[int, int] | None,
) -> str:  # fmt: skip
    """A frame as an <img> that holds its own bytes, or a note why there is none.

    `time` in the file's own seconds, or `since` its first frame; numbered pictures have a `rate`. Shows the
    surroundings of `box`, if the frame is of `size`: otherwise it is the crop itself.
    """
    try:
        rgb = frame_at(Path(path), rate, time, since)
    except DPEError as error:
        return f'<p class="note">no picture: {escape(str(error))}</p>'
    rgb = rgb if rgb.dtype == np.uint8 else cv2.convertScaleAbs(rgb, alpha=1 / levels(rgb))
    if box and size in (None, rgb.shape[1::-1]):
        around = AROUND * (box[2] - box[0])
        left, top = (max(0, int(value - around)) for value in box[:2])
        rgb = rgb[top : int(box[3] + around), left : int(box[2] + around)]
    scale = PICTURE_HEIGHT / rgb.shape[0]
    small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}">'


def frame_at(path: Path, rate: Fraction | None, time: float | None, since: float | None) -> np.ndarray:
    """The frame nearest to a time, (H, W, 3) RGB; see `picture`. Raises InputError if the file is gone or has none."""
    info = probe(path, rate)
    if info.is_image or (time is None and since is None):
        return next(read_frames(path, fps=rate)).rgb8
    moment = Fraction(time) if since is None else next(read_frames(path, fps=rate)).time + Fraction(since)
    reach = Fraction(1, 2) / info.fps
    near: list[Frame] = list(read_frames(path, float(max(moment - reach, 0)), float(moment + reach), fps=rate))
    if not near:
        raise InputError(f"{path} has no frame at {float(moment):.3f} s", "it is not the file that the report is about")
    return min(near, key=lambda frame: abs(frame.time - moment)).rgb8
