"""An edit or a dub in segments, made one by one as a plan says (`segment_plan.py`), and joined.

A segment needs nothing of the others. What pastes the faces back remembers some seconds (`Paster.memory`); a segment
therefore begins its work that much earlier, and at a multiple of jobs.UNIT, for batches. Its frames are then those of
the whole edit, bit for bit, on the same kind of machine.

Beside the plan's files lie, for segment 3: FILE.0003.mp4 and its part of the report, FILE.0003.json, which says that
both are whole, and by which a later run knows that it may replace them.
"""

import contextlib
import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import islice, tee
from pathlib import Path

import numpy as np

from dpe_cli.dub import networks_used
from dpe_cli.edit import Sight, Target, refuse_seams, stack_jobs
from dpe_cli.errors import InputError, OutputError, WeightsError
from dpe_cli.face import FaceDetector
from dpe_cli.jobs import UNIT, Engine, Job, lending_of, run_jobs
from dpe_cli.lending import BACK
from dpe_cli.paste import Paster
from dpe_cli.pipeline import Progress, ahead, ended, silent, unheard
from dpe_cli.report import PixelHash, Report, write_text
from dpe_cli.request import bind_control
from dpe_cli.segment_plan import Plan, report_from
from dpe_cli.video import Frame, read_frames
from dpe_cli.writer import join_video, workplace, write_video

WITHIN = Fraction(1, 2000)  # seconds, half of the least step between two frames


def check_segment(plan: Plan, segment: int) -> None:
    """Raises InputError unless there is such a segment."""
    if not 0 <= segment < plan.segments:
        raise InputError(f"there is no segment {segment} in {plan.path}", f"name one from 0 to {plan.segments - 1}")


def edit_segments(
    plan: Plan,
    first: int,
    last: int,
    engine: Engine,
    detector: FaceDetector,
    progress: Progress = silent,
) -> Report:
    """Makes the segments from `first` to `last`, one file each; gives the record of the last one.

    Raises InputError for a source or a plan that has changed, WeightsError for other weights than the plan's,
    OutputError where somebody else's file has the name of a segment.
    """
    check_segment(plan, first)
    check_segment(plan, last)
    for segment in range(first, last + 1):
        check_replaceable(plan, segment)
    wanted, there = plan.asked.get("sha256"), engine.description.get("sha256")
    if wanted != there:
        raise WeightsError(
            f"{plan.path} was made for weights with the sha256 {wanted}, these have {there}", "plan anew"
        )
    if detector.name != plan.report.detector:
        raise InputError(
            f"{plan.path} was made with the detector {plan.report.detector}, not {detector.name}", "use --detector"
        )
    if plan.dub and plan.dub.networks != networks_used():
        raise WeightsError(f"{plan.path} was made for other networks of speech and landmarks", "plan anew")
    bound = bind_control(plan.edits, plan.settings, engine, unheard)  # the plan's report has its remarks
    plan = replace(plan, settings=bound)
    target, report = plan.written_as(), Report()
    edited = edited_span(plan, target, plan.borders[first], plan.borders[last + 1], engine, detector, report)
    which = f"segment {first}" if first == last else f"segments {first} to {last}"
    total = plan.borders[last + 1] - plan.borders[first]
    doing = "dubbing" if plan.dub else "editing"
    edited = progress(ahead(edited), total, f"{doing} {plan.source.name}, {which}")
    record = Report()
    with ended(edited):
        for segment in range(first, last + 1):
            begin, end = plan.borders[segment], plan.borders[segment + 1]
            started = time.monotonic()
            pixels = PixelHash()
            frames = (frame for _, frame in pixels.passing(islice(edited, end - begin)))
            video = plan.video_of(segment)
            with workplace(video) as folder:
                part = folder / video.name
                # `start` makes it begin at 0: a container may hold its own beginning less exactly than steps
                written = write_video(frames, target.info, part, start=0.0, **asdict(plan.settings.wish))
                if written.frames != end - begin:
                    raise InputError(f"{plan.source} is not the file that was planned for", "plan anew")
                record = Report(
                    engine=dict(engine.description),
                    output={
                        "path": str(video),
                        "plan": plan.key,
                        "frames": end - begin,
                        "bytes": part.stat().st_size,
                        "pixels": pixels.digests.hex(),
                    },
                    frames=[fate for fate in report.frames if begin <= fate.index < end],
                    self_reconstruction=[pair for pair in report.self_reconstruction if begin <= pair[0] < end],
                    notes=list(written.notes),
                    seconds=time.monotonic() - started,
                )
                # in this order: a segment never lies there without a record, by which `check_replaceable` knows it
                video.unlink(missing_ok=True)
                write_record(plan.record_of(segment), record)
                os.replace(part, video)
            # in place, for the networks' thread goes on adding to it
            del report.frames[
                : next((n for n, fate in enumerate(report.frames) if fate.index >= end), len(report.frames))
            ]
    return record


def check_replaceable(plan: Plan, segment: int) -> None:
    """Raises OutputError where a segment would take the place of what is none, of this plan or an older one there."""
    video, record = plan.video_of(segment), plan.record_of(segment)
    there = [file for file in (video, record) if os.path.lexists(file)]
    if not there:
        return
    try:
        made = json.loads(record.read_text(encoding="utf-8"))["output"]
        whole = not video.exists() or video.stat().st_size == made["bytes"]
        known = Path(made["path"]).stem == video.stem and (made["plan"] == plan.key or whole)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise OutputError(
            f"{there[0]} is no segment of {plan.path}", "move it away, or give the plan another name by dpe plan --plan"
        )


def edited_span(
    plan: Plan, target: Target, begin: int, end: int, engine: Engine, detector: FaceDetector, report: Report
) -> Iterator[tuple[Job, Frame]]:
    """The edited frames from number `begin` to `end`, that one not included, as the whole edit makes them."""
    pasters = [plan.paster(engine, detector) for _ in plan.edits.each]
    lends = lending_of(engine) is not None and bool(plan.dub or plan.edits.mode != "pose")
    start, stop = first_needed(plan.times, begin, memory_of(pasters, lends)), min(-(-end // UNIT) * UNIT, plan.frames)
    pictures = ahead(planned_frames(plan, target, start, stop))
    edited: Iterator[tuple[Job, Frame]] | None = None
    for number, own in enumerate(tee(pictures, len(plan.edits.each))):
        sights: dict[int, Sight] = {}
        jobs = with_pictures(plan.jobs(number, sights), own, sights, begin, end)
        jobs = plan.dub.spoken(jobs, engine) if plan.dub else jobs
        jobs = stack_jobs(jobs, number, sights, edited, report)
        edited = run_jobs(jobs, engine, pasters[number], report, plan.settings.crop_size)
    for job, frame in edited:
        if job.frame.index >= end:
            return
        if not job.halo:
            yield job, frame


def memory_of(pasters: Iterable[Paster | None], lends: bool) -> float:
    """Seconds: nothing older counts for a frame.

    What a face looked like that was pasted back earlier counts, and for that what was lent to it.
    """
    return max(0.0 if paster is None else paster.memory for paster in pasters) + (BACK if lends else 0.0)


def first_needed(times: Sequence[Fraction], begin: int, memory: float) -> int:
    """Where work begins for what is to be right from frame `begin` on.

    Jitter looks at one frame before that, pasting and lending at `memory` seconds before each, and batches begin at
    multiples of UNIT.
    """
    if begin == 0:
        return 0
    reach = times[begin - 1] - Fraction(memory) - WITHIN
    return bisect_left(times, reach) // UNIT * UNIT


def planned_frames(plan: Plan, target: Target, start: int, stop: int) -> Iterator[Frame]:
    """The source's frames from number `start` to `stop`. Raises InputError where they have other times than planned."""
    frames, frame, last = iter(()), None, None
    for index in range(start, stop):
        wanted = int(plan.shown[index])
        if wanted != last:
            if last is None or wanted != last + 1:  # the first of this part, or of another turn
                begin = plan.settings.start if wanted == 0 else plan.times[wanted] - WITHIN
                frames = read_frames(plan.source, begin, plan.settings.end, fps=plan.settings.rate, exact=True)
            frame, last = next(frames, None), wanted
        if frame is None or not (target.still or frame.time == plan.times[wanted]):
            raise InputError(
                f"frame {wanted} of {plan.source}, at {float(plan.times[wanted]):.3f} s, is not found there again",
                f"plan anew, or {plan.command} it in one piece",
            )
        yield replace(frame, index=index, time=plan.times[index])


def with_pictures(
    jobs: Iterable[Job], frames: Iterator[Frame], sights: dict[int, Sight], begin: int, end: int
) -> Iterator[Job]:
    """The jobs that there are frames for, with these; those outside the part from `begin` to `end` are its halo."""
    jobs = iter(jobs)
    for frame in frames:
        for job in jobs:
            if job.frame.index == frame.index:
                yield replace(job, frame=frame, halo=not begin <= frame.index < end)
                break
            sights.pop(job.frame.index)


def write_record(path: Path, record: Report) -> None:
    """Writes a part of a report, which says that its segment is whole. Raises OutputError."""
    try:
        write_text(path, json.dumps(asdict(record), default=str, allow_nan=False))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", "check the folder and the disk") from error


def read_record(plan: Plan, segment: int) -> Report | None:
    """The record of a segment that is whole, None for one that is not there or damaged."""
    try:
        record = report_from(json.loads(plan.record_of(segment).read_text(encoding="utf-8")))
        whole = record.output["bytes"] == plan.video_of(segment).stat().st_size
        whole = whole and len(bytes.fromhex(record.output["pixels"])) == 32 * record.output["frames"]
        return record if whole and record.output["plan"] == plan.key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Joining


def join_plan(
    plan: Plan,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    folder: Path | None = None,
    ready: Callable[[Path, Report], None] = lambda part, report: None,
    say: Callable[[str], None] = unheard,
) -> Report:
    """Joins all segments of a plan to its output. The report is the one of the whole edit.

    `ready` gets the whole file and the report before the output takes its name. `folder`: see `join_video`.
    Raises InputError for segments that are missing, OutputError, QualityError for a seam above the limit.
    """
    started, output = time.monotonic(), output or plan.output
    records = [read_record(plan, segment) for segment in range(plan.segments)]
    missing = [str(segment) for segment, record in enumerate(records) if record is None]
    if missing:
        raise InputError(
            f"of {plan.segments} segments these are not whole: {', '.join(missing)}",
            f"make each with: dpe {plan.command} --segment {missing[0]} {plan.path}",
        )
    report = merged(plan, records)
    check_seams(report, plan.settings.seam_limit)
    target = plan.written_as()
    pixels = PixelHash(b"".join(bytes.fromhex(record.output["pixels"]) for record in records))
    report.output = {"path": str(output), "preview": None, "frames": plan.frames, "pixels_sha256": pixels.hexdigest()}
    report.seconds += time.monotonic() - started
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(workplace(output))
        written = join_video(
            [plan.video_of(segment) for segment in range(plan.segments)],
            plan.times[: plan.frames],
            target.info,
            output,
            folder,
            audio=plan.dub.sound(plan.source, folder) if plan.dub else target.audio,
            tracks=None if target.still else plan.source,
            start=target.start,
            end=target.end,
            overwrite=overwrite,
            ready=lambda part: ready(part, report),
        )
    for note in written.notes:
        if note not in report.notes:
            report.notes.append(note)
            say(note)
    for finding in report.findings():
        report.notes.append(finding)
        say(finding)
    return report


def check_seams(report: Report, limit: float | None) -> None:
    """Raises QualityError for a seam above the limit."""
    for _ in refuse_seams(iter(()), limit, report):
        pass  # there is nothing to pass on: it only looks


def merged(plan: Plan, records: list[Report]) -> Report:
    """One report of the plan's beginning and those of all segments."""
    report = replace(plan.report, frames=[], self_reconstruction=[], notes=list(plan.report.notes))
    for record in records:
        report.frames += record.frames
        report.self_reconstruction += record.self_reconstruction
        report.notes += [note for note in record.notes if note not in report.notes]
        report.seconds += record.seconds
    report.engine = records[-1].engine
    report.cuts = [round(float(plan.times[cut]), 6) for cut in np.flatnonzero(plan.cuts[: plan.frames])]
    report.sort_frames(plan.frames)
    made_by = {(r.engine.get("device"), r.engine.get("precision"), r.engine.get("batch_size")) for r in records}
    if len(made_by) > 1:
        ways = "; ".join(", ".join(map(str, way)) for way in sorted(made_by, key=str))
        report.notes.append(f"the segments were made in different ways ({ways}): their rounding may differ")
    return report
