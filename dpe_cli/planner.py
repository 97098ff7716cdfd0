"""Plans edits and dubs in segments: follows the faces, reads the driving or hears the speech, and draws the borders."""

import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import tee
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpe_cli.container import PIPE, bytes_of
from dpe_cli.drivings import read_drivers
from dpe_cli.dub import DubSettings, Seen, check_dub, decide, edits_for, seen_source, shown_frames
from dpe_cli.edit import (
    Sight,
    Target,
    describe_driver,
    find_faces,
    follow_source,
    paster_for,
    plan_target,
    source_boxes,
    start_report,
)
from dpe_cli.errors import InputError, OutputError
from dpe_cli.face import Box, FaceDetector
from dpe_cli.jobs import Engine
from dpe_cli.pipeline import Progress, silent, unheard
from dpe_cli.report import Report
from dpe_cli.request import (
    VIDEO_SUFFIXES,
    Driving,
    Edits,
    EditSettings,
    bind_control,
    check_request,
    decide_paste,
    edits_of,
    is_still,
    without_idle,
)
from dpe_cli.segment_plan import Plan, write_plan
from dpe_cli.video import Frame, VideoInfo

SEGMENT_SECONDS = 10.0  # of a run that can be resumed: what a kill costs at most
NEAR_CUT = 0.25  # of a segment's length: a cut between shots that is so near to a border becomes the border
LEAST_FRAMES = 2  # of a segment: two key frames in a row could be taken for one picture


T = TypeVar("T")


def make_plan(
    path: Path,
    source: Path,
    driving: Driving | Edits,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings,
    *,
    count: int | None = None,
    seconds: float | None = None,
    asked: dict[str, Any] | None = None,
    key: str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Plan:
    """Follows the faces through the source, reads the driving, and writes the plan of `count` segments, or of segments
    of `seconds`, to `path`.

    `asked` is kept for those who make the segments. Raises what `edit_video` raises before its networks run.
    """
    edits = edits_of(driving, settings)
    source_info, driver_infos = check_request(source, edits, output, settings)
    check_container(output)
    if is_still(source_info, driver_infos):
        raise InputError("a still edited by a still is one picture, which has no segments", "leave that out")
    settings = without_idle(settings, source_info, driver_infos, output, say)
    report = start_report(source_info, driver_infos, edits, detector, settings)
    remark = report.remarking(say)
    started = time.monotonic()
    bound = bind_control(edits, settings, engine, remark)  # what the weights cannot do is known now
    paste = decide_paste(edits, settings, remark)
    paster_for(settings, engine, detector)  # what it lacks is known now
    first_time, first_boxes = find_faces(source, detector, settings, edits)
    drivers = read_drivers(driver_infos, edits, engine, detector, settings, progress, remark)
    report.inputs["driving"] = [describe_driver(driver) for driver in drivers]
    target = plan_target(source_info, drivers, settings, first_time, remark)
    followed = follow_source(source, detector, settings, edits, remark)
    followed = progress(followed, source_info.n_frames or None, f"looking for faces in {source.name}")
    sights: list[dict[int, Sight]] = [{} for _ in edits.each]
    each = [
        source_boxes(source_info, drivers, picked, number, sights[number], settings.smooth)
        for number, picked in enumerate(tee(followed, len(edits.each)))
    ]
    table = read_table(each, sights)
    numbers = np.arange(len(table["times"]))
    plan = unwritten(
        path, source, output, engine, edits, settings, target, report, asked, key,
        shown=0 * numbers if target.still else numbers,
        dub=None,
        paste=paste,
        first_boxes=tuple(first_boxes),
        drivers=dict(zip(edits.paths, drivers, strict=True)),
        **table,
    )  # fmt: skip
    frames = min(sum(1 for _ in replace(plan, settings=bound).jobs(number, {})) for number in range(len(edits.each)))
    report.seconds = time.monotonic() - started
    return written_plan(plan, frames, target.info, count, seconds)


def make_dub_plan(
    path: Path,
    source: Path,
    audio: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: DubSettings,
    *,
    count: int | None = None,
    seconds: float | None = None,
    asked: dict[str, Any] | None = None,
    key: str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Plan:
    """The same for a dub: follows the face and hears the speech. Raises what `dub_video` raises early."""
    started, report = time.monotonic(), Report()
    info = check_dub(source, audio, output, settings)
    check_container(output)
    remark = report.remarking(say)
    dub = decide(info, audio, engine, detector, settings, report, progress, remark)
    dub.paster(engine, detector)  # what it lacks is known now
    edit, edits = dub.settings.edit, edits_for(source, dub.settings.edit)
    followed = follow_source(source, detector, edit, edits, remark)
    followed = progress(followed, info.n_frames or None, f"looking for faces in {source.name}")
    seen = (
        (replace(frame, rgb=None, original=None), box, sight) for frame, box, sight in seen_source(followed, info, edit)
    )
    first_turn: list[Seen] = []

    def turn(again: bool) -> Iterator[Seen]:
        return iter(first_turn) if again else kept(seen, first_turn)

    sights: dict[int, Sight] = {}
    table = read_table([shown_frames(turn, info, dub.lengths, sights)], [sights])
    frames, once = len(table["times"]), len(first_turn)
    if not frames:
        raise InputError(f"{source} has no frames in the span asked for", "check --start and --end")
    numbers = np.arange(frames)
    target = dub.target(info)
    plan = unwritten(
        path, source, output, engine, edits, edit, target, report, asked, key,
        shown=numbers % once if dub.lengths.more_frames == "loop" else np.minimum(numbers, once - 1),
        dub=replace(dub, audio=audio.absolute()),
        paste=not dub.settings.crop_only,
        first_boxes=(),
        drivers=dub.drivers,
        **table,
    )  # fmt: skip
    report.seconds = time.monotonic() - started
    return written_plan(plan, frames, target.info, count, seconds)


def kept(items: Iterable[T], into: list[T]) -> Iterator[T]:
    """Passes the items on and keeps them."""
    for item in items:
        into.append(item)
        yield item


def unwritten(
    path: Path, source: Path, output: Path, engine: Engine, edits: Edits, settings: EditSettings, target: Target,
    report: Report, asked: dict[str, Any] | None, key: str | None, **decided: Any,
) -> Plan:  # fmt: skip
    """A plan that is not yet parted into segments."""
    timing = {name: str(getattr(target.info, name)) for name in ("fps", "time_base", "duration")}
    audio = target.audio and str(target.audio.absolute())
    return Plan(
        path=path,
        source=source.absolute(),
        output=output.absolute(),
        edits=edits,
        settings=settings,
        asked={**(asked or {}), "sha256": engine.description.get("sha256")},
        target={"audio": audio, "start": target.start, "end": target.end, "still": target.still, **timing},
        source_bytes=bytes_of(source),
        borders=(),
        report=report,
        key=key or os.urandom(16).hex(),
        **decided,
    )


def written_plan(plan: Plan, frames: int, info: VideoInfo, count: int | None, seconds: float | None) -> Plan:
    """The plan with the borders of `count` segments, or of segments of `seconds`, written. Raises OutputError."""
    length = float(plan.times[frames - 1] - plan.times[0] + 1 / info.fps)
    count = count or max(1, round(length / (seconds or SEGMENT_SECONDS)))
    plan = replace(plan, borders=borders_of(plan.times[:frames], np.flatnonzero(plan.cuts).tolist(), count))
    write_plan(plan)
    return plan


def check_container(output: Path) -> None:
    """Raises OutputError for an output that cannot be joined of segments."""
    if output == PIPE or output.suffix.lower() not in VIDEO_SUFFIXES:
        raise OutputError(
            f"{output} cannot be made in segments", f"name a file that ends in {' or '.join(VIDEO_SUFFIXES)}"
        )


def read_table(each: list[Iterator[tuple[Frame, Box | None]]], sights: list[dict[int, Sight]]) -> dict[str, Any]:
    """What tracking says of each frame, edit by edit, as `Plan` keeps it."""
    times: list[Fraction] = []
    rows: list[list[tuple[tuple[float, ...], float, int, bool]]] = [[] for _ in each]
    cuts: list[bool] = []
    for boxed in zip(*each, strict=True):
        times.append(boxed[0][0].time)
        for number, (frame, box) in enumerate(boxed):
            sight = sights[number].pop(frame.index)
            corners = (math.nan,) * 4 if box is None else (box.x0, box.y0, box.x1, box.y1)
            score = math.nan if sight.score is None else sight.score
            rows[number].append((corners, score, sight.track or 0, sight.others))
        cuts.append(sight.new_shot)
    boxes, scores, tracks, others = (
        np.array([[row[column] for row in edit] for edit in rows], kind)
        for column, kind in enumerate((np.float64, np.float64, np.int64, np.uint8))
    )
    named = {"boxes": boxes, "scores": scores, "tracks": tracks, "others": others}
    return {"times": tuple(times), "cuts": np.array(cuts, np.uint8), **named}


def borders_of(times: Sequence[Fraction], cuts: Iterable[int], count: int) -> tuple[int, ...]:
    """Borders of `count` segments of nearly equal length in time, at cuts between shots where these are near.

    There are fewer where there are not enough frames.
    """
    frames = len(times)
    count = max(1, min(count, frames // LEAST_FRAMES))
    span, borders = (times[-1] - times[0]) / count, [0]
    for number in range(1, count):
        wish = times[0] + span * number
        near = [cut for cut in cuts if cut < frames and abs(times[cut] - wish) <= NEAR_CUT * span]
        border = min(near, key=lambda cut: abs(times[cut] - wish)) if near else bisect_left(times, wish)
        least, most = borders[-1] + LEAST_FRAMES, frames - LEAST_FRAMES * (count - number)
        borders.append(min(max(border, least), most))
    return (*borders, frames)
