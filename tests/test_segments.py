"""Edits in segments: the frames are those of one run, whoever makes them, in whatever order, and after any kill."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_edit import SKIN, ColourDetector, ColourEngine, clip

from dpe_cli.edit import Driving, Edits, EditSettings, edit_video
from dpe_cli.motion import Curve
from dpe_cli.segments import (
    edit_segments,
    join_plan,
    make_plan,
    read_plan,
)
from dpe_cli.video import Frame, VideoInfo, read_frames, write_video

FPS = Fraction(25)
LOSSLESS = {"codec": "ffv1"}


class MoodyEngine(ColourEngine):
    """Its results depend on the size of a batch and on what came before, as those of real networks do."""

    def __init__(self, batch_size: int = 4):
        super().__init__(batch_size)
        self.description |= {"sha256": "ab" * 32}
        self.forget()

    def forget(self) -> None:
        self.mood = 0

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        edited = super().edit(crops, expression, pose)
        edited[:, 8:56, 8:56] += np.uint8((self.mood + len(crops)) % 8)
        self.mood = (3 * self.mood + int(crops[-1, 0, 0, 0])) % 64
        return edited


def moving(
    path: Path, count: int, fps: Fraction = FPS, vfr: bool = False, cuts: tuple[int, ...] = (), hidden: range = range(0)
):
    """A green face that wanders and changes its colours; at `cuts` it jumps and the room changes; `hidden`: no face."""
    noise = np.random.default_rng(0)

    def frames():
        for n in range(count):
            shot = sum(n >= cut for cut in cuts)
            rgb = np.full((120, 160, 3), 60 + 60 * shot % 180, np.uint8)
            rgb[::2, 40 * shot : 40 * shot + 30] = 250 - 80 * shot
            x, y = 20 + 50 * (shot % 2) + n % 40 // 4, 30 + 5 * (shot % 3) + n % 7
            if n not in hidden:
                rgb[y : y + 40, x : x + 40] = np.add(SKIN, noise.integers(-15, 15, 3))
            at = Fraction(n) / fps if not vfr else (n + Fraction(n % 3, 4)) / fps
            yield Frame(n, Fraction(1, 2) + at, rgb)

    write_video(
        frames(), VideoInfo(path, 160, 120, fps, count, time_base=1 / (fps * 1000)), path, crf=1, preset="ultrafast"
    )
    return path


def driving(path: Path) -> Path:
    return clip(path, [True] * 9, fps=Fraction(12))


def pixels(path: Path) -> list[tuple[Fraction, bytes]]:
    return [(frame.time, frame.rgb.tobytes()) for frame in read_frames(path, exact=True)]


def in_segments(
    folder: Path, source: Path, drivers: Driving | Edits, count: int, settings: dict[str, Any], name: str = "parts.mkv"
) -> tuple[Path, Any]:
    """An edit in `count` segments, each by an engine of its own, the last one first; and its report."""
    plan = make_plan(
        folder / "plan.json", source, drivers, folder / name, MoodyEngine(), ColourDetector(),
        EditSettings(**settings), count=count,
    )  # fmt: skip
    for segment in reversed(range(plan.segments)):
        edit_segments(read_plan(plan.path), segment, segment, MoodyEngine(), ColourDetector())
    report = join_plan(read_plan(plan.path), overwrite=True)
    return folder / name, report


CASES = {
    "plain": ({}, {}, {}),
    "cuts and gaps": ({"cuts": (37, 70), "hidden": range(50, 60)}, {}, {}),
    "variable rate": ({"vfr": True}, {}, {"strength": 0.7}),
    "held": ({"hidden": range(40, 55)}, {}, {"on_no_face": "hold", "mask": "landmarks"}),
    "curve": ({}, {}, {"curve": Curve((1.0, 2.0, 3.0), (0.0, 1.0, 0.0))}),
    "span": ({"vfr": True}, {}, {"start": 1.1, "end": 3.3}),
    "trim": ({}, {}, {"driving_end": "trim"}),
    "relative": ({}, {}, {"motion": "relative"}),
    "crop": ({"hidden": range(0, 20)}, {"mode": "both"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_segments_give_the_frames_and_the_report_of_one_run(tmp_path: Path, case: str):
    clip_options, who, settings = CASES[case]
    source, smile = moving(tmp_path / "s.mp4", 100, **clip_options), driving(tmp_path / "d.mp4")
    drivers = Driving(smile, smile if who.get("mode") == "both" else None)
    settings = {**LOSSLESS, **settings}
    whole = tmp_path / "whole.mkv"
    wanted = edit_video(source, drivers, whole, MoodyEngine(), ColourDetector(), EditSettings(**settings))
    parts, found = in_segments(tmp_path, source, drivers, 5, settings)
    assert pixels(parts) == pixels(whole)
    assert found.frames == wanted.frames and found.cuts == wanted.cuts and found.notes == wanted.notes
    assert sorted(found.self_reconstruction) == wanted.self_reconstruction
    assert found.summary()["counts"] == wanted.summary()["counts"]
