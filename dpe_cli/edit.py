"""The main path: from a source, a driving and an engine to an edited video.

Every stage is an iterator; nobody keeps the video. Held at once are a batch of source frames, the window of
`smooth_boxes`, the few frames that wait before and after the networks (`ahead`), 20 numbers for each driving frame, a
line of the report for each source frame and, for a preview, one second of small driving frames.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import tee
from pathlib import Path
from typing import Any, TypeVar

from dpe_cli.container import bytes_of, is_sequence
from dpe_cli.control import DRIVING
from dpe_cli.drivings import read_drivers, smoothing_radius
from dpe_cli.errors import FaceError, InputError, QualityError
from dpe_cli.face import Box, Detection, FaceDetector, crop_box, smooth_boxes
from dpe_cli.jobs import Engine, Job, run_jobs
from dpe_cli.motion_file import Driver, is_motion_file
from dpe_cli.paste import Paster, make_paster
from dpe_cli.people import TRACK, Picked, follow
from dpe_cli.pipeline import Progress, ahead, ended, silent, unheard
from dpe_cli.preview import DriverView, PushedVideo, side_by_side
from dpe_cli.regions import RegionMasks, network_landmarks
from dpe_cli.report import PixelHash, Report
from dpe_cli.request import (
    PASTING,
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
from dpe_cli.tracks import unknown_sound_of
from dpe_cli.video import Frame, VideoInfo, read_frames, seconds_of
from dpe_cli.writer import lost, write_image, write_video

SAMPLE_SECONDS = 2.0  # between two measurements of the self-reconstruction
NO_FACE, HELD, OTHERS = "no face", "no face, last box held", "only other faces"
NO_STRENGTH = "strength 0"

T = TypeVar("T")


@dataclass(frozen=True)
class Sight:
    """What tracking says of a source frame, beside the box."""

    score: float | None = None  # of the detection
    track: int | None = None
    others: bool = False  # faces are there, but not the chosen one
    new_shot: bool = False


def edit_video(
    source: Path,
    driving: Driving | Edits,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings | None = None,
    *,
    preview: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Report:
    """Gives the face in `source` the expression, the pose or both of `driving` and writes `output`.

    With Edits instead of a Driving several people are edited in the one pass, each by its own driving; the face and the
    strength of `settings` then mean nothing. Every edit works on the source's pixels.

    Raises InputError, FaceError, WeightsError, OutputError, and for a seam above the limit QualityError, which carries
    the report; what `engine` raises passes through. `output` appears when it is whole.
    """
    settings, started = settings or EditSettings(), time.monotonic()
    edits = edits_of(driving, settings)
    source_info, driver_infos = check_request(source, edits, output, settings, preview)
    settings = without_idle(settings, source_info, driver_infos, output, say)
    report = start_report(source_info, driver_infos, edits, detector, settings)
    remark = report.remarking(say)
    settings = bind_control(edits, settings, engine, remark)
    paste = decide_paste(edits, settings, remark)
    pasters = [paster_for(settings, engine, detector) if paste else None for _ in edits.each]
    first_time, first_boxes = find_faces(source, detector, settings, edits)
    drivers = read_drivers(driver_infos, edits, engine, detector, settings, progress, remark)
    report.inputs["driving"] = [describe_driver(driver) for driver in drivers]
    followed = ahead(follow_source(source, detector, settings, edits, remark))  # reads and looks while it edits
    read = dict(zip(edits.paths, drivers, strict=True))
    edited: Iterator[tuple[Job, Frame]] | None = None
    for number, (edit, picked) in enumerate(zip(edits.each, tee(followed, len(edits.each)), strict=True)):
        sights: dict[int, Sight] = {}
        chosen = replace(settings, face=edit.face, strength=edit.strength)
        boxed = source_boxes(source_info, drivers, picked, number, sights, settings.smooth)
        own = {path: read[path] for path in edit.driving.paths}
        jobs = plan_jobs(boxed, own, edit.driving, chosen, sights, None if paste else first_boxes[number])
        jobs = stack_jobs(jobs, number, sights, edited, report)
        edited = run_jobs(jobs, engine, pasters[number], report, settings.crop_size)
    pixels = PixelHash()
    edited = pixels.passing(refuse_seams(edited, settings.seam_limit, report))
    if is_still(source_info, driver_infos):
        written = write_stills(edited, output, preview, drivers, settings)
        for note in [] if paste else lost(source_info):
            remark(note)
    else:
        edited = progress(ahead(edited), expected_frames(source_info, drivers, settings), f"editing {source.name}")
        target = plan_target(source_info, drivers, settings, first_time, remark)
        with ended(followed), ended(edited):
            written = write_clips(edited, target, output, preview, drivers, settings, remark)
    report.sort_frames(written)
    report.output = {"path": str(output), "preview": preview and str(preview), "frames": written}
    report.output["pixels_sha256"] = pixels.hexdigest()
    report.engine = dict(engine.description)  # at the end: it may have fallen back to another precision
    report.seconds = time.monotonic() - started
    for finding in report.findings():
        remark(finding)
    return report


def paster_for(settings: EditSettings, engine: Engine, detector: FaceDetector) -> Paster:
    """What pastes the faces back as the settings say."""
    paster = make_paster(engine.size, detector, **{name: getattr(settings, name) for name in PASTING})
    if settings.region != "all":
        paster.masks = RegionMasks(paster.masks, settings.region, network_landmarks())
    return paster


def start_report(
    source: VideoInfo, drivers: list[VideoInfo], edits: Edits, detector: FaceDetector, settings: EditSettings
) -> Report:
    """A report that knows what goes in."""
    inputs = {"source": describe(source), "driving": [describe(info) for info in drivers]}
    chosen = {"mode": edits.mode, **asdict(settings)}
    if len(edits.each) > 1:
        chosen["edits"] = [{"mode": edit.driving.mode, **asdict(edit)} for edit in edits.each]
    return Report(settings=chosen, inputs=inputs, detector=detector.name)


def describe(info: VideoInfo) -> dict[str, Any]:
    """What the report says of an input."""
    return {
        "path": str(info.path),
        "bytes": bytes_of(info.path),
        "width": info.width,
        "height": info.height,
        "fps": None if info.is_image else str(info.fps),
        "frames": info.n_frames,
        "audio": info.has_audio,
    }


def describe_driver(driver: Driver) -> dict[str, Any]:
    """The same of a driving that has been read, with the time of its neutral frame in seconds."""
    neutral = None if driver.neutral is None else float(driver.times[0]) + driver.track.times[driver.neutral]
    return {**describe(driver.info), "neutral_frame": neutral and round(float(neutral), 6)}


# Source: frames, boxes, jobs


def follow_source(
    source: Path,
    detector: FaceDetector,
    settings: EditSettings,
    edits: Edits,
    remark: Callable[[str], None] = unheard,
) -> Iterator[Picked]:
    """Source frames, counted from the start of the span, with the face of each edit.

    Tracks have their numbers from the start of the file: where one is chosen, all of it is tracked up to the span.
    """
    chosen = [edit.face for edit in edits.each]
    whole = settings.start is not None and any(choose.startswith(TRACK) for choose in chosen)
    start, skipped = None if whole else settings.start, 0
    frames = read_frames(source, start, settings.end, fps=settings.rate, exact=True)
    for seen, faces in follow(frames, detector, chosen, remark):
        if whole and float(seen.frame.time) < settings.start:
            skipped += 1
            continue
        yield replace(seen, frame=replace(seen.frame, index=seen.frame.index - skipped)), faces


def find_faces(
    source: Path, detector: FaceDetector, settings: EditSettings, edits: Edits
) -> tuple[Fraction, list[Box]]:
    """Time of the first frame, and each edit's crop box where its face is seen first: fails early. Raises FaceError."""
    first, boxes = None, [None] * len(edits.each)
    for seen, faces in follow_source(source, detector, settings, edits):
        first = seen.frame.time if first is None else first
        boxes = [box or (face and crop_box(face)) for box, face in zip(boxes, faces, strict=True)]
        if all(boxes):
            return first, boxes
    if first is None:
        raise InputError(f"{source} has no frames in the span asked for", "check --start and --end")
    raise FaceError(f"no face was found in {source}", "use a source with a visible face, another --face or --detector")


def source_boxes(
    info: VideoInfo, drivers: list[Driver], followed: Iterable[Picked], number: int, sights: dict[int, Sight],
    smooth: float = 1.0,
) -> Iterator[tuple[Frame, Box | None]]:  # fmt: skip
    """Source frames with the smoothed boxes of one edit; a still is repeated at the driving's times. Fills `sights`."""
    boxed = smooth_boxes(remember_sights(followed, number, sights), smoothing_radius(info, smooth))
    return repeat_still(next(iter(boxed)), clock(drivers), sights) if info.is_image and drivers else iter(boxed)


def remember_sights(
    followed: Iterable[Picked], number: int, sights: dict[int, Sight]
) -> Iterator[tuple[Frame, Detection | None]]:
    """One edit's faces; notes on the way, by frame number, what a box does not carry."""
    for seen, faces in followed:
        face = faces[number]
        if face is None:
            sights[seen.frame.index] = Sight(others=bool(seen.faces), new_shot=seen.new_shot)
        else:
            sights[seen.frame.index] = Sight(float(face.score), face.track, new_shot=seen.new_shot)
        yield seen.frame, face


def clock(drivers: list[Driver]) -> Driver:
    """The driver that gives a talking portrait its timing: the first video, the expression's before the pose's."""
    return next((driver for driver in drivers if not driver.info.is_image), drivers[0])


def repeat_still(
    still: tuple[Frame, Box | None], driver: Driver, sights: dict[int, Sight]
) -> Iterator[tuple[Frame, Box | None]]:
    """The source still at every time of the driving."""
    frame, box = still
    sight = sights.pop(frame.index)
    for index, moment in enumerate(driver.times):
        sights[index] = sight
        yield replace(frame, index=index, time=moment), box


def plan_jobs(
    boxed: Iterable[tuple[Frame, Box | None]],
    drivers: dict[Path, Driver],
    driving: Driving,
    settings: EditSettings,
    sights: dict[int, Sight],
    first_box: Box | None,
) -> Iterator[Job]:
    """Matches frames with motion codes by time and decides what becomes of frames without a face.

    A crop needs a box at every frame: without a face it is the last one of the shot, before the first face of a shot
    `first_box`, which is None where faces are pasted back.
    Ends early where --driving-end trim runs out of driving. Raises FaceError for --on-no-face fail.
    """
    origin, last, sample_at = None, None, 0.0
    roles = [drivers.get(path) for path in (driving.expression, driving.pose)]
    neutral = tuple(None if driver is None else driver.neutral_code for driver in roles)
    for frame, box in boxed:
        origin = frame.time if origin is None else origin
        moment = float(frame.time - origin)
        codes = {path: driver.track.at(moment, settings.driving_end) for path, driver in drivers.items()}
        if any(code is None for code in codes.values()):
            return
        sight = sights.get(frame.index, Sight())
        score, last = sight.score, None if sight.new_shot else last
        if box is None and settings.on_no_face == "fail":
            raise FaceError(
                f"no face in frame {frame.index} ({float(frame.time):.3f} s)", "use --on-no-face pass or hold"
            )
        held = box or last or first_box
        strength = settings.curve.at(float(frame.time)) if settings.curve else settings.strength
        if settings.curve and strength == 0:
            yield Job(frame, first_box and held, moment, NO_STRENGTH)
            last = held if box else last
            continue
        if box is None and (settings.on_no_face == "pass" or last is None):
            yield Job(frame, first_box and held, moment, NO_FACE)
            continue
        expression, pose = codes.get(driving.expression), codes.get(driving.pose)
        sampled = moment >= sample_at
        sample_at = moment + SAMPLE_SECONDS if sampled else sample_at
        why, mixing = None if box else HELD, None
        if driving.controlled:
            control, time = settings.control, float(frame.time)
            follows = {path: (code, drivers[path].neutral_code) for path, code in codes.items()}
            whole = {} if driving.expression is None else {DRIVING: follows[driving.expression]}
            mixing = control.at(time, strength, follows | whole)
            strength = control.pose_strength(time, strength)
        yield Job(frame, held, moment, why, expression, pose, mixing, neutral, strength, score, sampled)
        last = held


def stack_jobs(
    jobs: Iterable[Job],
    number: int,
    sights: dict[int, Sight],
    below: Iterator[tuple[Job, Frame]] | None,
    report: Report,
) -> Iterator[Job]:
    """The jobs of one edit, told whose face it is and what the earlier edits, `below`, made of the frame.

    Notes cuts in the report, once.
    """
    shot = 0
    for job in jobs:
        done = next(below, None) if below else None
        if below and done is None:
            return
        sight = sights.pop(job.frame.index, Sight())
        if sight.new_shot and not number and not job.halo:
            report.cuts.append(round(float(job.frame.time), 6))
        reason = OTHERS if job.reason == NO_FACE and sight.others else job.reason
        shot += sight.new_shot
        yield replace(job, reason=reason, track=sight.track, shot=shot, edit=number, onto=done and done[1].rgb)


# Edited frames to files


def refuse_seams(edited: Iterator[T], limit: float | None, report: Report) -> Iterator[T]:
    """Passes everything on; raises QualityError after the last if a seam is above the limit, so that all are known."""
    yield from edited
    worst = report.worst_seam()
    if limit is not None and worst is not None and worst.seam > limit:
        above = sum(frame.seam is not None and frame.seam > limit for frame in report.frames)
        raise QualityError(
            f"the seam of {above} frames is above {limit:g}, the worst {worst.seam} in frame {worst.index}",
            "look at --report, try another --mask or --feather, or allow a higher seam",
            report,
        )


@dataclass(frozen=True)
class Target:
    """What a video is written with, beside its frames."""

    info: VideoInfo
    audio: Path | None
    start: float | None
    end: float | None
    still: bool = False  # the source is one picture


def plan_target(
    source: VideoInfo,
    drivers: list[Driver],
    settings: EditSettings,
    first_time: Fraction,
    remark: Callable[[str], None],
) -> Target:
    """The source's properties, with the driving's timing for a still source.

    Sound from elsewhere begins and ends with the pictures, so the output then begins at 0. Trimming trims the sound.
    """
    audio = sound_of(source, drivers, settings.audio, remark)
    if source.is_image:
        timing, times = clock(drivers).info, clock(drivers).times
        info = replace(source, fps=timing.fps, time_base=timing.time_base, duration=timing.duration, is_image=False)
        ends = trimmed_ends(drivers, settings, times[0]) if audio else []
        if audio and not (timing.path.exists() and audio.samefile(timing.path)):
            ends.append(float(times[-1] + 1 / timing.fps))
        return Target(info, audio, None, min(ends, default=None), still=True)
    start, ends = settings.start, trimmed_ends(drivers, settings, first_time)
    ends += [] if settings.end is None else [settings.end]
    if audio and not (source.path.exists() and audio.samefile(source.path)):
        start = float(first_time) if start is None else start
        ends.append(float(source.start) + seconds_of(source))
    return Target(source, audio, start, min(ends, default=None))


def trimmed_ends(drivers: list[Driver], settings: EditSettings, first: Fraction) -> list[float]:
    """Where --driving-end trim lets each driving end pictures that begin at `first`, in seconds as that is."""
    if settings.driving_end != "trim":
        return []
    return [float(first) + driver.track.duration for driver in drivers if len(driver.track.times) > 1]


def expected_frames(source: VideoInfo, drivers: list[Driver], settings: EditSettings) -> int | None:
    """How many frames will come, for the progress only."""
    if source.is_image:
        return len(clock(drivers).times)
    end = min(source.duration, settings.end or source.duration)
    return min(source.n_frames, max(0, round((end - (settings.start or 0)) * float(source.fps)))) or None


def sound_of(source: VideoInfo, drivers: list[Driver], audio: str, remark: Callable[[str], None]) -> Path | None:
    """The file whose sound the output gets. `auto` is the source's, for a talking portrait the driving's."""
    which = audio if audio != "auto" else "driving" if source.is_image else "source"
    if which == "none":
        return None
    if which not in ("source", "driving"):
        return Path(which)
    info = source if which == "source" else clock(drivers).info
    other = info.is_image or is_motion_file(info.path) or is_sequence(info.path)  # than a video
    if which == "driving" and not (info.has_audio or other):  # a source says so itself
        for note in unknown_sound_of(info.path):
            remark(note)
    if not info.has_audio and audio != "auto":
        remark(f"{info.path} has no sound: the output is silent")
    return info.path if info.has_audio else None


def write_stills(
    edited: Iterator[tuple[Job, Frame]],
    output: Path,
    preview: Path | None,
    drivers: list[Driver],
    settings: EditSettings,
) -> int:
    """Writes the one picture, and its preview."""
    ((job, frame),) = edited
    original = frame.original
    write_image(output, frame.rgb, original.planes[-1] if original and original.layout.alpha else None, marked=True)
    if preview:
        both = side_by_side(job.frame.rgb8, frame.rgb8, job.moment, views_of(drivers, settings))
        write_image(preview, both, marked=True)
    return 1


def write_clips(
    edited: Iterator[tuple[Job, Frame]],
    target: Target,
    output: Path,
    preview: Path | None,
    drivers: list[Driver],
    settings: EditSettings,
    remark: Callable[[str], None],
) -> int:
    """Writes the video and, in the same pass, its preview; gives the number of frames."""
    options = {"audio": target.audio, "start": target.start, "end": target.end, "overwrite": settings.overwrite}
    options |= {"marked": True, "whole": settings.start is None and settings.end is None}
    frames = (frame for _, frame in edited)
    with contextlib.ExitStack() as stack:
        if preview:
            square = replace(target.info, sample_aspect_ratio=Fraction(1))
            pushed = stack.enter_context(PushedVideo(square, preview, {**options, "codec": "h264"}))
            frames = push_previews(edited, pushed, views_of(drivers, settings))
        tracks = None if target.still else target.info.path
        written = write_video(frames, target.info, output, tracks=tracks, **options, **asdict(settings.wish))
    for note in written.notes:
        remark(note)
    return written.frames


def views_of(drivers: list[Driver], settings: EditSettings) -> list[DriverView]:
    """Each driver's pictures, matched in time as its motion is; one whose motion is a single code holds.

    A motion file has no pictures.
    """
    shown = [driver for driver in drivers if not is_motion_file(driver.info.path)]
    ends = [settings.driving_end if len(driver.track.times) > 1 else "hold" for driver in shown]
    return [DriverView(driver.info, driver.times, end, settings.rate) for driver, end in zip(shown, ends, strict=True)]


def push_previews(
    edited: Iterable[tuple[Job, Frame]], preview: PushedVideo, views: list[DriverView]
) -> Iterator[Frame]:
    """Passes the edited frames on and gives each, beside its source and driving, to the preview."""
    for job, frame in edited:
        both = side_by_side(job.frame.rgb8, frame.rgb8, job.moment, views)
        preview.push(replace(frame, rgb=both, original=None))
        yield frame
