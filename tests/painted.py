"""People as painted squares of one colour each, and a stand-in detector that finds their colours."""

from collections.abc import Iterable
from fractions import Fraction

import cv2
import numpy as np

from dpe_cli.face import Box, Detection
from dpe_cli.video import Frame

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# Eyes, nose and corners of the mouth in a square head, as shares of its side.
FEATURES = np.array([[0.25, 0.35], [0.75, 0.35], [0.5, 0.55], [0.3, 0.8], [0.7, 0.8]])


def face_at(x: float, y: float, side: float, score: float = 0.9) -> Detection:
    """A frontal face whose head is a square of this side around x, y."""
    box = Box.square(x, y, side)
    return Detection(box, FEATURES * side + (box.x0, box.y0), score)


class PaintedFaces:
    """Finds squares of pure colours; remembers the shapes of the pictures it was given."""

    name = "painted"

    def __init__(self):
        self.shapes: list[tuple[int, int]] = []

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        self.shapes.append(rgb.shape[:2])
        found = []
        for colour in (RED, GREEN, BLUE):
            low, high = (tuple(int(value) for value in np.clip(np.add(colour, d), 0, 255)) for d in (-39, 39))
            rows, columns = np.nonzero(cv2.inRange(rgb, low, high))
            if len(rows) > 60:
                width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
                if max(width, height) < 1.3 * min(width, height):  # a hidden one is not a face
                    x, y = columns.min() + width / 2, rows.min() + height / 2
                    found.append(face_at(x, y, max(width, height), len(rows) / rgb.size))
        return sorted(found, key=lambda face: -face.score)


class Acquaintance(PaintedFaces):
    """Knows people by their colour."""

    def embed(self, rgb: np.ndarray, face: Detection) -> np.ndarray:
        x, y = (int(value) for value in face.box.centre)
        return rgb[y, x] / np.linalg.norm(rgb[y, x].astype(float))


def paint(index: int, people: dict[tuple[int, int, int], tuple[float, float, float]], shade: int = 90, fps: int = 25):
    """A 480 x 640 frame; people: colour -> x, y, side. Later ones stand in front."""
    rgb = np.full((480, 640, 3), shade, np.uint8)
    for colour, (x, y, side) in people.items():
        x0, y0, x1, y1 = (round(max(v, 0)) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2))
        rgb[y0:y1, x0:x1] = colour
    return Frame(index, Fraction(index, fps), rgb)


def centres(tracked: Iterable[tuple[Frame, Detection | None]]) -> list[tuple[int, int] | None]:
    return [None if face is None else tuple(round(v) for v in face.box.centre) for _, face in tracked]
