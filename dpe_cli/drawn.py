"""Clips that are drawn for the benchmark, and where the faces in them are."""

from fractions import Fraction
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from dpe_cli.face import Box, Detection, FaceDetector
from dpe_cli.video import Frame, VideoInfo
from dpe_cli.writer import write_video

FPS = Fraction(25)


def drawn(size: tuple[int, int], phase: float, faces: int = 1) -> np.ndarray:
    """Heads side by side before a wall, (H, W, 3) uint8; `phase` counts how often they have swayed and spoken."""
    width, height = size
    across, down = np.linspace(0, 1, width, dtype=np.float32), np.linspace(0, 1, height, dtype=np.float32)[:, None]
    wall = 90 + 40 * np.sin(9 * across) * np.cos(7 * down) + 12 * np.sin(170 * across + 90 * down)
    rgb = np.stack([wall - 40, wall, wall + 30], -1).clip(0, 255).astype(np.uint8)
    angle = 2 * np.pi * phase
    sway, y, unit = width * 0.01 * np.sin(angle), height * 0.5, height * 0.16
    parts = [  # x, y, half width, half height in units, colour
        (0, 0, 1.0, 1.35, (224, 172, 140)),
        (-0.4, -0.3, 0.17, 0.08, (250, 240, 235)),
        (0.4, -0.3, 0.17, 0.08, (250, 240, 235)),
        (-0.4, -0.3, 0.08, 0.08, (60, 40, 30)),
        (0.4, -0.3, 0.08, 0.08, (60, 40, 30)),
        (0, 0.15, 0.12, 0.22, (205, 150, 120)),
        (0, 0.68, 0.35, 0.08 + 0.1 * np.sin(2 * angle) ** 2, (150, 50, 50)),
    ]
    places = [width * (number + 0.5) / faces + sway for number in range(faces)]
    for x, (right, below, wide, tall, colour) in product(places, parts):
        centre = round(x + right * unit), round(y + below * unit)
        cv2.ellipse(rgb, centre, (round(wide * unit), round(tall * unit)), 0, 0, 360, colour, -1, cv2.LINE_AA)
    return rgb


def draw_clip(path: Path, size: tuple[int, int], frames: int, phase: float = 0.0, faces: int = 1) -> Path:
    """Writes a drawn clip of one sway in two seconds."""
    pictures = (Frame(n, n / FPS, drawn(size, phase + float(n / FPS) / 2, faces)) for n in range(frames))
    write_video(pictures, VideoInfo(path, *size, FPS, frames), path, preset="ultrafast")
    return path


class DrawnFaces:
    """Takes the time of a detector, and finds what `drawn` has drawn whatever the detector makes of it."""

    def __init__(self, detector: FaceDetector):
        self.detector, self.name = detector, detector.name

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        self.detector.detect(rgb)
        step = max(1, min(rgb.shape[:2]) // 90)
        small = rgb[::step, ::step].astype(np.int16)
        skin = small[..., 0] > small[..., 2] + 30  # redder than blue: not the wall
        edges = np.flatnonzero(np.diff(np.pad(skin.any(0).astype(int), 1)))  # where heads begin and end, in turn
        found = []
        for left, right in edges.reshape(-1, 2):
            rows, columns = np.nonzero(skin[:, left:right])
            found.append(face_at(rows * step, (columns + left) * step, step))
        return found


def face_at(rows: np.ndarray, columns: np.ndarray, step: int) -> Detection:
    """The head whose pixels these are, of squares of `step` pixels."""
    x, y = (columns.min() + columns.max() + step) / 2, (rows.min() + rows.max() + step) / 2
    unit = (columns.max() + step - columns.min()) / 2
    points = np.array([[-0.4, -0.3], [0.4, -0.3], [0, 0.2], [-0.3, 0.68], [0.3, 0.68]]) * unit + [x, y]
    return Detection(Box(x - unit, y - 1.35 * unit, x + unit, y + 1.35 * unit), points, 1.0)
