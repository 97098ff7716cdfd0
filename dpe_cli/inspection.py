"""What a face does, in the measures that can be controlled: over time as a table and a plot, and a sheet of sliders."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from dpe_cli.crop import cut
from dpe_cli.errors import FaceError
from dpe_cli.extractors import Landmarks
from dpe_cli.face import FaceDetector, crop_box
from dpe_cli.factors import Factors
from dpe_cli.jobs import Engine
from dpe_cli.landmarks import head_angles
from dpe_cli.measures import MEASURES, TABLE, measures_of_faces
from dpe_cli.page import polylines
from dpe_cli.people import track_faces
from dpe_cli.pipeline import Progress, silent
from dpe_cli.report import write_text
from dpe_cli.video import probe, read_frames

ANGLES = ("yaw", "pitch", "roll")  # of the head, degrees
COLUMNS = (*(measure.name for measure in TABLE), *ANGLES)
BATCH = 16  # crops looked at together
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # standard deviations, columns of the sheet
CELL, LABEL, HEAD = 160, 170, 24  # pixels
INK, FAINT, PAPER = (30, 30, 30), (170, 60, 40), 250
WIDTH, HEIGHT, LEFT = 900, 90, 110  # of a line's plot, and its left margin


@dataclass(frozen=True)
class Course:
    """The measures of one face over time."""

    times: np.ndarray  # (N,) seconds
    values: np.ndarray  # (N, COLUMNS), NaN without a face
    crop: np.ndarray  # (S, S, 3) uint8, the frame most at rest

    def table(self) -> str:
        """As CSV, a line for each frame: its time, and the measures or nothing."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["time", *COLUMNS])
        for time, row in zip(self.times, self.values, strict=True):
            writer.writerow([f"{time:.6g}", *("" if np.isnan(value) else f"{value:.5g}" for value in row)])
        return text.getvalue()

    def plot(self) -> str:
        """As SVG, a line for each measure, between the least and the largest value that it has."""
        rows = []
        span = max(float(self.times[-1] - self.times[0]), 1e-9)
        x = [LEFT + float(time - self.times[0]) / span * (WIDTH - LEFT - 10) for time in self.times]
        units = {measure.name: measure.unit for measure in TABLE}
        for number, (name, values) in enumerate(zip(COLUMNS, self.values.T, strict=True)):
            top, low, high = number * HEIGHT, *extent(values)
            y = [top + 22 + (high - value) / (high - low) * (HEIGHT - 34) for value in values]
            known = [None if np.isnan(value) else float(value) for value in values]
            lines = polylines(x, y, known)
            rows.append(
                f'<text x="4" y="{top + 14}">{name}: {escape(units.get(name, "degrees, head"))}</text>'
                f'<text x="{LEFT - 6}" y="{top + 28}" text-anchor="end">{high:.3g}</text>'
                f'<text x="{LEFT - 6}" y="{top + HEIGHT - 10}" text-anchor="end">{low:.3g}</text>'
                f'<path d="M{LEFT} {top + 20}V{top + HEIGHT - 10}H{WIDTH - 8}" fill="none" stroke="#999"/>'
                + "".join(f'<polyline fill="none" stroke="#1667b7" points="{line}"/>' for line in lines if line)
            )
        bottom = len(COLUMNS) * HEIGHT + 16
        ends = f'<text x="{LEFT}" y="{bottom - 6}">{self.times[0]:.2f} s</text>'
        ends += f'<text x="{WIDTH - 8}" y="{bottom - 6}" text-anchor="end">{self.times[-1]:.2f} s</text>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" height="{bottom}"'
            ' stroke-linecap="round" font-family="sans-serif" font-size="11">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(rows)}{ends}</svg>\n'
        )


def extent(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest of values that are not all NaN, never the same."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def follow_face(
    source: Path, detector: FaceDetector, landmarks: Landmarks, template: np.ndarray, size: int,
    choose: str = "largest", progress: Progress = silent, fps: Fraction | None = None,
) -> Course:  # fmt: skip
    """Measures one face of a video or a picture, frame by frame; crops of `size` pixels.

    template: the mean face; fps: the rate of an image sequence.
    Holds a few numbers for each frame. Raises InputError, FaceError where there is no face.
    """
    info = probe(source, fps)
    times, rows, best = [], [], (np.inf, None)
    rest = np.array([measure.neutral for measure in MEASURES])
    tracked = track_faces(read_frames(source, fps=fps), detector, choose)
    frames = progress(tracked, info.n_frames, f"reading {source.name}")
    for batch in batches(frames):
        crops = [None if face is None else cut(frame.rgb, crop_box(face), size)[0] for frame, face in batch]
        faces = [None if crop is None else landmarks.detect(crop) for crop in crops]
        turned = [head_angles(face.rotation) if face is not None else np.full(3, np.nan) for face in faces]
        values = np.column_stack([measures_of_faces(faces, template), turned])
        for (frame, _), crop, row in zip(batch, crops, values, strict=True):
            times.append(float(frame.time))
            rows.append(row)
            away = np.abs((row[: len(rest)] - rest) * [4, 4, 2, 1, 0.03, 0.03, 1]).sum()
            if away < best[0]:
                best = away, crop
    if best[1] is None:
        raise FaceError(f"no face was found in {source}", "use a source with a visible face, or another --detector")
    return Course(np.array(times), np.stack(rows), best[1])


def batches(items: Iterable) -> Iterator[list]:
    """Lists of BATCH items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def slider_sheet(crop: np.ndarray, engine: Engine, factors: Factors) -> np.ndarray:
    """A row for each slider: the face with STEPS of the slider's standard deviation added. (H, W, 3) uint8 RGB

    crop: (S, S, 3) uint8. Sliders that are not available are shown too, and marked. Raises WeightsError without a fit.
    """
    factors.check_fitted()
    own = engine.motion_codes(crop[None]).astype(np.float64)
    head = np.full((HEAD, LABEL + CELL * len(STEPS), 3), PAPER, np.uint8)
    for column, step in enumerate(STEPS):
        write(head, f"{step:+g} sigma" if step else "own", (LABEL + CELL * column + 50, 16), INK)
    rows = [head]
    for name, slider in factors.sliders.items():
        codes = own + np.array(STEPS)[:, None] * slider.sigma * slider.axis
        pictures = engine.edit(np.repeat(crop[None], len(STEPS), 0), codes.astype(np.float32), None)
        label = np.full((CELL, LABEL, 3), PAPER, np.uint8)
        facts = [f"sigma {slider.sigma:.3g}", f"R2 {slider.r2:.2f}, shown {slider.shown:.2f}"]
        for line, text in enumerate([name, *facts, *(["not available"] if slider.why_not_shown else [])]):
            write(label, text, (6, 40 + 20 * line), FAINT if slider.why_not_shown else INK)
        small = [cv2.resize(picture, (CELL, CELL), interpolation=cv2.INTER_AREA) for picture in pictures]
        rows.append(np.hstack([label, *small]))
    return np.vstack(rows)


def write(picture: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    """Small words on a picture."""
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)


def write_course(course: Course, folder: Path) -> None:
    """factors.csv and factors.svg. Raises OSError."""
    write_text(folder / "factors.csv", course.table())
    write_text(folder / "factors.svg", course.plot())
