"""What an edit or a dub will take, before it is made: frames, faces, memory, disk and time; or why it would fail.

What can fail is asked in the order of an edit and by the same functions, so the failures are the same. Time and memory
come from a trial: a few frames go through every stage, into a file that is thrown away.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpe_cli.container import PIPE, bytes_of
from dpe_cli.crop import cut
from dpe_cli.drivings import motion_of, prepare_driver, smoothing_radius
from dpe_cli.dub import DubSettings, check_dub, decide, edits_for, shown_frames
from dpe_cli.edit import Sight, clock, find_faces, follow_source, paster_for
from dpe_cli.errors import FaceError, OutputError
from dpe_cli.face import Box, FaceDetector, crop_box
from dpe_cli.jobs import Engine, Job, run_jobs
from dpe_cli.limits import scratch
from dpe_cli.motion import MotionTrack
from dpe_cli.motion_file import Driver, is_motion_file
from dpe_cli.paste import Paster
from dpe_cli.people import track_faces
from dpe_cli.pipeline import ahead, ended, silent, unheard
from dpe_cli.report import Report, peak_memory
from dpe_cli.request import (
    VIDEO_SUFFIXES,
    Driving,
    Edit,
    Edits,
    EditSettings,
    bind_control,
    check_request,
    decide_paste,
    edits_of,
    is_still,
    without_idle,
)
from dpe_cli.video import Frame, VideoInfo, frame_times, read_frames
from dpe_cli.writer import write_video

TRIAL = 24  # frames
COPIES = 3  # of the output: beside it, while it is made in segments and joined

T = TypeVar("T")


def forecast(
    source: Path,
    driving: Driving | Edits,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings,
    say: Callable[[str], None] = unheard,
) -> dict[str, Any]:
    """What the edit would take, ready for JSON; None for what cannot be known.

    Raises what `edit_video` would raise, as far as it can be known without the driving's motion: InputError, FaceError,
    WeightsError, OutputError also where the disk is too small.
    """
    edits = edits_of(driving, settings)
    source_info, driver_infos = check_request(source, edits, output, settings)
    settings = without_idle(settings, source_info, driver_infos, output, say)
    bind_control(edits, settings, engine, say)  # what the weights cannot do is known here
    paste = decide_paste(edits, settings, say)
    paster = paster_for(settings, engine, detector) if paste else None
    first_time, boxes = find_faces(source, detector, settings, edits)
    if settings.on_no_face == "fail":
        check_every_frame(source, detector, settings, edits)
    drivers = [look_at_driver(info, engine, detector, settings) for info in driver_infos]
    for driver in drivers:
        prepare_driver(driver, settings, unheard)
    times = output_times(source_info, drivers, settings, first_time)
    trial = try_frames(source, source_info, edits, engine, detector, settings, paster, output)
    return foreseen(source_info, boxes, drivers, len(times), len(edits.each), trial, output, engine, detector)


def forecast_dub(
    source: Path,
    audio: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: DubSettings,
    say: Callable[[str], None] = unheard,
) -> dict[str, Any]:
    """The same for a dub. Raises what `dub_video` would raise."""
    info = check_dub(source, audio, output, settings)
    dub = decide(info, audio, engine, detector, settings, Report(), silent, say)
    edit, paster = dub.settings.edit, dub.paster(engine, detector)
    first_time, boxes = find_faces(source, detector, edit, edits_for(source, edit))
    times = output_times(info, [], edit, first_time)

    def turn(again: bool) -> Iterator[tuple[Frame, None, Sight]]:
        return ((Frame(index, moment, None), None, Sight()) for index, moment in enumerate(times))

    frames = sum(1 for _ in shown_frames(turn, info, dub.lengths, {}))
    moved = Edits((Edit(Driving(source, source if dub.settings.head_moves else None), edit.face),))
    trial = try_frames(source, dub.target(info).info, moved, engine, detector, edit, paster, output)
    return foreseen(info, boxes, list(dub.drivers.values()), frames, 1, trial, output, engine, detector)


def foreseen(
    info: VideoInfo, boxes: list[Box], drivers: list[Driver], frames: int, edits: int, trial: dict[str, float],
    output: Path, engine: Engine, detector: FaceDetector,
) -> dict[str, Any]:  # fmt: skip
    """What a trial says of so many frames with so many edits each. Raises OutputError where the disk is too small."""
    read = sum(len(driver.times) for driver in drivers if not is_motion_file(driver.info.path))
    seconds = frames * trial["seconds"] * edits + read * trial["reading"]
    needed = round(trial["bytes"] * frames)
    free = None if output == PIPE else shutil.disk_usage(output.parent).free
    if free is not None and needed > free:
        raise OutputError(
            f"{output} will have about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free", "free some space"
        )
    return {
        "frames": frames,
        "driving_frames": read,
        "size": f"{info.width}x{info.height}",
        "face_pixels": [round(box.width) for box in boxes],
        "seconds": round(seconds, 2),
        "frames_per_second": round(1 / trial["seconds"], 2),
        "memory_mib": trial["memory"],
        "output_bytes": needed,
        "resumable_bytes": COPIES * needed,
        "free_bytes": free,
        "device": engine.description.get("device"),
        "weights": engine.description.get("weights"),
        "detector": detector.name,
        "output": str(output),
    }


def check_every_frame(source: Path, detector: FaceDetector, settings: EditSettings, edits: Edits) -> None:
    """Raises FaceError where a frame lacks a face, which --on-no-face fail would not allow."""
    for seen, faces in follow_source(source, detector, settings, edits):
        if None in faces:
            raise FaceError(
                f"no face in frame {seen.frame.index} ({float(seen.frame.time):.3f} s)",
                "use --on-no-face pass or hold",
            )


def look_at_driver(info: VideoInfo, engine: Engine, detector: FaceDetector, settings: EditSettings) -> Driver:
    """A driver whose times are known but not its motion, which stands still. Raises FaceError, as reading it would."""
    if is_motion_file(info.path):
        return motion_of(info.path, engine)
    frames = read_frames(info.path, fps=settings.rate)
    if all(face is None for _, face in track_faces(frames, detector, settings.driving_face)):
        raise FaceError(f"no face was found in {info.path}", "use a driving with a visible face, or another --detector")
    times = [Fraction(0)] if info.is_image else frame_times(info.path, settings.rate)
    moments = np.array([float(moment - times[0]) for moment in times])
    return Driver(info, times, MotionTrack(moments, np.zeros((len(times), 1), np.float32)))


def output_times(info: VideoInfo, drivers: list[Driver], settings: EditSettings, first: Fraction) -> list[Fraction]:
    """The times of the frames that come out."""
    if info.is_image:
        return [Fraction(0)] if is_still(info, [driver.info for driver in drivers]) else clock(drivers).times
    times = [time for time in frame_times(info.path, settings.rate) if time >= first]
    if settings.end is not None:
        times = [time for time in times if time < Fraction(settings.end).limit_denominator(1_000_000)]
    if settings.driving_end == "trim":
        shown = [driver.track for driver in drivers]
        times = [time for time in times if all(track.at(float(time - first), "trim") is not None for track in shown)]
    return times


def try_frames(
    source: Path,
    info: VideoInfo,
    edits: Edits,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings,
    paster: Paster | None,
    output: Path,
) -> dict[str, float]:
    """Seconds for a frame of an edit and of a driving, bytes for a frame, and the memory in MiB that all would take."""

    def seen(count: int) -> Iterator[tuple[Frame, Box]]:
        return ahead(islice(with_a_face(source, detector, settings, edits), count))

    def crops_of(frames: Iterable[tuple[Frame, Box]]) -> np.ndarray:
        return np.stack([cut(frame.rgb, box, engine.size)[0] for frame, box in frames])

    def roles(codes: np.ndarray) -> list[np.ndarray | None]:
        return [None if edits.mode == other else codes[::-1] for other in ("pose", "exp")]

    first = list(seen(min(engine.batch_size, TRIAL)))
    crops = crops_of(first)
    engine.edit(crops, *roles(engine.motion_codes(crops)))  # not timed: the first batch is slow
    engine.forget()
    reading, codes = timed(lambda: engine.motion_codes(crops_of(seen(TRIAL))))
    engine.forget()
    asked = [[None] * len(codes) if role is None else role for role in roles(codes)]
    jobs = (
        Job(frame, box, float(frame.time), expression=expression, pose=pose)
        for (frame, box), expression, pose in zip(seen(TRIAL), *asked, strict=True)
    )
    edited = ahead(run_jobs(jobs, engine, paster, Report(), settings.crop_size))
    with ended(edited), scratch(output) as folder:
        trial = folder / (output.name if output.suffix.lower() in VIDEO_SUFFIXES else "trial_%06d.png")
        frames = (frame for _, frame in edited)
        editing, _ = timed(lambda: write_video(frames, info, trial, start=0.0, **asdict(settings.wish)))
        size = bytes_of(trial)
    waiting = 2 * smoothing_radius(info, settings.smooth) * first[0][0].rgb.nbytes  # for the smoothing of boxes
    return {
        "seconds": editing / len(codes),
        "reading": reading / len(codes),
        "bytes": size / len(codes),
        "memory": round((peak_memory() or 0) + waiting / 2**20),
    }


def with_a_face(
    source: Path, detector: FaceDetector, settings: EditSettings, edits: Edits
) -> Iterator[tuple[Frame, Box]]:
    """The source's frames that have a face to edit, with its crop box."""
    for seen, faces in follow_source(source, detector, settings, edits):
        face = next((face for face in faces if face is not None), None)
        if face is not None:
            yield seen.frame, crop_box(face)


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a function took, and its result."""
    started = time.monotonic()
    result = function()
    return time.monotonic() - started, result
