"""The main path: from a source, a driving and an engine to an edited video.

Every stage is an iterator; nobody keeps the video. Held at once are a batch of source frames, the window of
`smooth_boxes`, 20 numbers for each driving frame, a line of the report for each source frame and, for a preview, one
second of small driving frames.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dpe_cli.container import PIPE, files_of, frame_rate, is_sequence
from dpe_cli.crop import cut, gaussian_mask, paste_back
from dpe_cli.encoding import Wish
from dpe_cli.errors import FaceError, InputError, OutputError
from dpe_cli.face import SMOOTH_SECONDS, Box, Detection, FaceDetector, crop_box, smooth_boxes, track_faces
from dpe_cli.motion import MotionTrack
from dpe_cli.preview import DriverView, PushedVideo, side_by_side
from dpe_cli.report import PSNR_CEILING, FrameFate, Report
from dpe_cli.video import (
    Frame,
    VideoInfo,
    audio_codecs,
    check_writable,
    probe,
    read_frames,
    write_image,
    write_video,
)

AUDIO = ("auto", "source", "driving", "none")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
SAMPLE_SECONDS = 2.0  # between two measurements of the self-reconstruction
NO_FACE, HELD = "no face", "no face, last box held"

T = TypeVar("T")


class Engine(Protocol):
    """What this file needs of the networks: uint8 in, uint8 out. N crops of S by S pixels, K numbers a code."""

    size: int
    batch_size: int  # crops at once that suit the device
    description: dict[str, Any]

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 -> (N, K) float32"""

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        """(N, S, S, 3) uint8, (N, K) float32 or None twice -> (N, S, S, 3) uint8"""


class Progress(Protocol):
    """Passes `items` on and shows how far they are; `total` is a guess or None, `what` names the work."""

    def __call__(self, items: Iterable[T], total: int | None, what: str) -> Iterator[T]: ...


def silent(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """A library neither prints nor draws: the default progress."""
    yield from items


def unheard(message: str) -> None:
    """The default for remarks, which the report keeps in any case."""


@dataclass(frozen=True)
class Driving:
    """Whose expression and whose pose are transferred; None keeps the source's own."""

    expression: Path | None = None
    pose: Path | None = None

    def __post_init__(self) -> None:
        if self.expression is None and self.pose is None:
            raise InputError("there is no driving video", "give one for the expression, the pose or both")

    @property
    def mode(self) -> str:
        return "pose" if self.expression is None else "exp" if self.pose is None else "both"

    @property
    def paths(self) -> list[Path]:
        """One or two different files, the expression's first."""
        return list(dict.fromkeys(path for path in (self.expression, self.pose) if path is not None))


@dataclass(frozen=True)
class EditSettings:
    """How to edit. Times in seconds of the source; `audio` is auto, source, driving, none or the path of a file."""

    strength: float = 1.0  # 0 = the source's own motion, 1 = the driving's
    driving_end: str = "pingpong"  # hold, loop, pingpong, trim
    on_no_face: str = "pass"  # pass, hold, fail
    face: str = "largest"
    driving_face: str = "largest"
    audio: str = "auto"
    start: float | None = None
    end: float | None = None
    paste: bool | None = None  # None: pasted back for an expression, the crop otherwise
    overwrite: bool = False
    codec: str | None = None  # h264, hevc, prores, ffv1, png; None: by source and container
    crf: int | None = None
    preset: str | None = None
    nvenc: bool | None = None  # None: where there is one
    pipe: str = "nut"  # or y4m: what standard output gets
    fps: str | None = None  # of image sequences; None: 25

    @property
    def rate(self) -> Fraction | None:
        """`fps` as a number. Raises InputError."""
        return frame_rate(self.fps) if self.fps else None

    @property
    def wish(self) -> Wish:
        """What is asked of the encoding."""
        return Wish(self.codec, self.crf, self.preset, self.nvenc, self.pipe)


@dataclass(frozen=True)
class Driver:
    """A driving file, read: its pixels are gone, its motion stays."""

    info: VideoInfo
    times: list[Fraction]  # of all its frames, seconds
    track: MotionTrack  # of its frames with a face


@dataclass(frozen=True)
class Job:
    """One source frame and what is to be done with it: codes (K,), both None for a frame that is passed."""

    frame: Frame
    box: Box | None
    moment: float  # seconds since the first source frame, also the time in the driving
    reason: str | None = None  # why there is no edit, or whence the box
    expression: np.ndarray | None = None
    pose: np.ndarray | None = None
    score: float | None = None
    sampled: bool = False  # its self-reconstruction is measured

    @property
    def edited(self) -> bool:
        return self.expression is not None or self.pose is not None


def edit_video(
    source: Path,
    driving: Driving,
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

    Raises InputError, FaceError, OutputError; what `engine` raises passes through. `output` appears when it is whole.
    """
    settings, started = settings or EditSettings(), time.monotonic()
    source_info, driver_infos = check_request(source, driving, output, settings, preview)
    settings = without_span(settings) if source_info.is_image else settings
    report = start_report(source_info, driver_infos, driving, detector, settings)

    def remark(message: str) -> None:
        report.notes.append(message)
        say(message)

    paste = decide_paste(driving.mode, settings, remark)
    first_time, first_box = find_face(source, detector, settings)
    drivers = [read_driver(info, engine, detector, settings, progress) for info in driver_infos]
    scores: dict[int, float] = {}
    boxed = source_boxes(source_info, drivers, detector, settings, scores)
    roles = dict(zip(driving.paths, drivers, strict=True))
    jobs = plan_jobs(boxed, roles, driving, settings, scores, None if paste else first_box)
    edited = run_jobs(jobs, engine, settings.strength, paste, report)
    if is_still(source_info, driver_infos):
        written = write_stills(edited, output, preview, drivers, settings)
    else:
        edited = progress(edited, expected_frames(source_info, drivers, settings), f"editing {source.name}")
        target = plan_target(source_info, drivers, settings, first_time, remark)
        written = write_clips(edited, target, output, preview, drivers, settings, remark)
    report.output = {"path": str(output), "preview": preview and str(preview), "frames": written}
    report.engine = dict(engine.description)  # at the end: it may have fallen back to another precision
    report.seconds = time.monotonic() - started
    if not report.counts()["edited"]:
        remark("no frame was edited")
    return report


# What is asked for, and whether it can be done


def check_request(
    source: Path,
    driving: Driving,
    output: Path,
    settings: EditSettings,
    preview: Path | None = None,
    report: Path | None = None,
) -> tuple[VideoInfo, list[VideoInfo]]:
    """Finds out early what would fail late; gives the probed source and drivers. Raises InputError, OutputError."""
    inputs, outputs = [source, *driving.paths], [path for path in (output, preview, report) if path]
    if settings.audio not in AUDIO:
        inputs.append(Path(settings.audio))
        if not audio_codecs(inputs[-1]):
            raise InputError(f"{settings.audio} holds no sound", "give --audio another file")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise OutputError(f"{output} is asked for twice", "give the result, the preview and the report different names")
    for path in outputs:
        check_output(path, inputs, settings.overwrite)
    source_info, *driver_infos = [probe(path, settings.rate) for path in (source, *driving.paths)]
    if is_still(source_info, driver_infos):
        for path in (output, preview):
            if path and path.suffix.lower() not in IMAGE_SUFFIXES:
                raise OutputError(
                    f"{path} cannot hold a picture, which is what a still makes of a still",
                    f"name a file that ends in one of {' '.join(IMAGE_SUFFIXES)}",
                )
    else:
        check_writable(source_info, output, settings.wish)
        if preview and preview.suffix.lower() not in VIDEO_SUFFIXES:
            raise OutputError(
                f"{preview} cannot hold a video", f"name a file that ends in one of {' '.join(VIDEO_SUFFIXES)}"
            )
    return source_info, driver_infos


def check_output(path: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raises OutputError if `path` cannot or must not be written."""
    if path == PIPE:
        return
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", "make it or name another")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"nothing can be written in {path.parent}", "name another folder")
    existing = files_of(path)
    if not existing:
        return
    taken = {(file.stat().st_dev, file.stat().st_ino) for other in inputs for file in files_of(other)}
    if any((file.stat().st_dev, file.stat().st_ino) in taken for file in existing):
        raise OutputError(f"{path} is also an input", "choose another output")
    if not overwrite:
        raise OutputError(f"{path} exists", "choose another output or add --overwrite")


def without_span(settings: EditSettings) -> EditSettings:
    """A still source has no time of its own: --start and --end mean nothing."""
    return replace(settings, start=None, end=None)


def is_still(source: VideoInfo, drivers: Iterable[VideoInfo]) -> bool:
    """Whether the result is one picture."""
    return source.is_image and all(driver.is_image for driver in drivers)


def decide_paste(mode: str, settings: EditSettings, remark: Callable[[str], None]) -> bool:
    """Whether the edited face goes back into the full frame; a moved head does so only by order, and with a warning."""
    if mode == "exp":
        return settings.paste is not False
    if settings.paste:
        remark("a pose is pasted back: the head moves but the neck and the background stay, expect a visible seam")
    else:
        remark("a moved head does not fit into its frame: only the crop is written; --paste forces it in")
    return bool(settings.paste)


def start_report(
    source: VideoInfo, drivers: list[VideoInfo], driving: Driving, detector: FaceDetector, settings: EditSettings
) -> Report:
    """A report that knows what goes in."""
    inputs = {"source": describe(source), "driving": [describe(info) for info in drivers]}
    chosen = {"mode": driving.mode, **asdict(settings)}
    return Report(settings=chosen, inputs=inputs, detector=detector.name)


def describe(info: VideoInfo) -> dict[str, Any]:
    """What the report says of an input."""
    return {
        "path": str(info.path),
        "bytes": sum(file.stat().st_size for file in files_of(info.path)),
        "width": info.width,
        "height": info.height,
        "fps": None if info.is_image else str(info.fps),
        "frames": info.n_frames,
        "audio": info.has_audio,
    }


# Driving: pixels to motion


def read_driver(
    info: VideoInfo, engine: Engine, detector: FaceDetector, settings: EditSettings, progress: Progress
) -> Driver:
    """Motion codes of the face in a driving video or still. Raises FaceError if there is none."""
    times: list[Fraction] = []

    def frames() -> Iterator[Frame]:
        for frame in progress(read_frames(info.path, fps=settings.rate), info.n_frames, f"reading {info.path.name}"):
            times.append(frame.time)
            yield frame

    boxed = smooth_boxes(track_faces(frames(), detector, settings.driving_face), smoothing_radius(info))
    crops = ((frame.time, cut(frame.rgb, box, engine.size)[0]) for frame, box in boxed if box is not None)
    moments: list[float] = []
    codes: list[np.ndarray] = []
    for batch in batched(crops, engine.batch_size):
        moments += [float(moment - times[0]) for moment, _ in batch]
        codes.append(engine.motion_codes(np.stack([crop for _, crop in batch])))
    if not codes:
        raise FaceError(f"no face was found in {info.path}", "use a driving with a visible face, or another --detector")
    track = MotionTrack(np.array(moments), np.concatenate(codes), float(times[-1] - times[0]))
    return Driver(info, times, track)


def smoothing_radius(info: VideoInfo) -> int:
    """Frames each way that smooth a box."""
    return 0 if info.is_image else max(1, round(float(info.fps) * SMOOTH_SECONDS))


# Source: frames, boxes, jobs


def find_face(source: Path, detector: FaceDetector, settings: EditSettings) -> tuple[Fraction, Box]:
    """Time of the first frame, and the crop box in the first with the chosen face: fails early. Raises FaceError."""
    first = None
    frames = read_frames(source, settings.start, settings.end, fps=settings.rate)
    for frame, detection in track_faces(frames, detector, settings.face):
        first = frame.time if first is None else first
        if detection is not None:
            return first, crop_box(detection)
    if first is None:
        raise InputError(f"{source} has no frames in the span asked for", "check --start and --end")
    raise FaceError(f"no face was found in {source}", "use a source with a visible face, another --face or --detector")


def source_boxes(
    info: VideoInfo, drivers: list[Driver], detector: FaceDetector, settings: EditSettings, scores: dict[int, float]
) -> Iterator[tuple[Frame, Box | None]]:
    """Source frames with their smoothed boxes; a still is repeated at the driving's times. Fills `scores`."""
    frames = read_frames(info.path, settings.start, settings.end, fps=settings.rate, exact=True)
    tracked = remember_scores(track_faces(frames, detector, settings.face), scores)
    boxed = smooth_boxes(tracked, smoothing_radius(info))
    return repeat_still(next(iter(boxed)), clock(drivers), scores) if info.is_image else iter(boxed)


def remember_scores(
    tracked: Iterable[tuple[Frame, Detection | None]], scores: dict[int, float]
) -> Iterator[tuple[Frame, Detection | None]]:
    """Notes each detection's score by frame number on the way: a box does not carry it."""
    for frame, detection in tracked:
        if detection is not None:
            scores[frame.index] = float(detection.score)
        yield frame, detection


def clock(drivers: list[Driver]) -> Driver:
    """The driver that gives a talking portrait its timing: the first video, the expression's before the pose's."""
    return next((driver for driver in drivers if not driver.info.is_image), drivers[0])


def repeat_still(
    still: tuple[Frame, Box | None], driver: Driver, scores: dict[int, float]
) -> Iterator[tuple[Frame, Box | None]]:
    """The source still at every time of the driving."""
    frame, box = still
    score = scores.pop(frame.index, None)
    for index, moment in enumerate(driver.times):
        if score is not None:
            scores[index] = score
        yield replace(frame, index=index, time=moment), box


def plan_jobs(
    boxed: Iterable[tuple[Frame, Box | None]],
    drivers: dict[Path, Driver],
    driving: Driving,
    settings: EditSettings,
    scores: dict[int, float],
    first_box: Box | None,
) -> Iterator[Job]:
    """Matches frames with motion codes by time and decides what becomes of frames without a face.

    A crop needs a box at every frame: without a face it is the last one, before the first face `first_box`, which is
    None where faces are pasted back.
    Ends early where --driving-end trim runs out of driving. Raises FaceError for --on-no-face fail.
    """
    origin, last, sample_at = None, None, 0.0
    for frame, box in boxed:
        origin = frame.time if origin is None else origin
        moment = float(frame.time - origin)
        codes = {path: driver.track.at(moment, settings.driving_end) for path, driver in drivers.items()}
        if any(code is None for code in codes.values()):
            return
        score = scores.pop(frame.index, None)
        if box is None and settings.on_no_face == "fail":
            raise FaceError(
                f"no face in frame {frame.index} ({float(frame.time):.3f} s)", "use --on-no-face pass or hold"
            )
        held = box or last or first_box
        if box is None and (settings.on_no_face == "pass" or last is None):
            yield Job(frame, first_box and held, moment, NO_FACE)
            continue
        expression, pose = codes.get(driving.expression), codes.get(driving.pose)
        sampled = moment >= sample_at
        sample_at = moment + SAMPLE_SECONDS if sampled else sample_at
        yield Job(frame, held, moment, None if box else HELD, expression, pose, score, sampled)
        last = held


# Jobs to edited frames


def run_jobs(
    jobs: Iterable[Job], engine: Engine, strength: float, paste: bool, report: Report
) -> Iterator[tuple[Job, Frame]]:
    """Edits in batches, in order, one frame out for each frame in; leaves each frame's fate in the report."""
    mask = gaussian_mask(engine.size)
    for batch in batched(jobs, engine.batch_size):
        crops = [None if job.box is None else cut(job.frame.rgb, job.box, engine.size) for job in batch]
        chosen = [number for number, job in enumerate(batch) if job.edited]
        faces: dict[int, np.ndarray] = {}
        if chosen:
            stack = np.stack([crops[number][0] for number in chosen])
            edited = edit_crops([batch[number] for number in chosen], stack, engine, strength, report)
            faces = dict(zip(chosen, edited, strict=True))
        for number, job in enumerate(batch):
            frame = job.frame
            if not paste:
                frame = replace(frame, rgb=faces.get(number, crops[number][0]), original=None)
            elif number in faces:
                frame = replace(frame, rgb=paste_back(frame.rgb, faces[number], mask, crops[number][1]))
            report.frames.append(fate_of(job, strength))
            yield job, frame


def edit_crops(jobs: list[Job], crops: np.ndarray, engine: Engine, strength: float, report: Report) -> np.ndarray:
    """(N, S, S, 3) uint8 source crops to edited ones of the same shape; measures the sampled ones on the way."""
    expression = None if jobs[0].expression is None else np.stack([job.expression for job in jobs])
    pose = None if jobs[0].pose is None else np.stack([job.pose for job in jobs])
    sampled = np.array([job.sampled for job in jobs])
    own = engine.motion_codes(crops) if strength != 1 else None
    if sampled.any():
        own_sampled = own[sampled] if own is not None else engine.motion_codes(crops[sampled])
        roles = [None if codes is None else own_sampled for codes in (expression, pose)]
        rebuilt = engine.edit(crops[sampled], *roles)
        report.self_reconstruction += [psnr(a, b) for a, b in zip(rebuilt, crops[sampled], strict=True)]
    return engine.edit(crops, towards(own, expression, strength), towards(own, pose, strength))


def towards(own: np.ndarray | None, driving: np.ndarray | None, strength: float) -> np.ndarray | None:
    """Motion codes (N, K) between the source's own (strength 0) and the driving's (1), or past it.

    The decoder replaces the motion that the source latent holds, so keeping it means sending the frame's own code.
    """
    return driving if own is None or driving is None else own + np.float32(strength) * (driving - own)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB, at most PSNR_CEILING."""
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return PSNR_CEILING if error == 0 else min(PSNR_CEILING, float(10 * np.log10(255**2 / error)))


def fate_of(job: Job, strength: float) -> FrameFate:
    """The report's line for a frame."""
    box, score = job.box, job.score
    corners = None if box is None else tuple(round(float(value), 2) for value in (box.x0, box.y0, box.x1, box.y1))
    return FrameFate(
        index=job.frame.index,
        time=round(float(job.frame.time), 6),
        fate="edited" if job.edited else "passed",
        reason=job.reason,
        box=corners,
        score=None if score is None else round(score, 4),
        strength=strength if job.edited else None,
    )


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (itertools.batched comes with Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


# Edited frames to files


def default_output(source: Path, driving: Driving) -> Path:
    """`talk.mp4` edited in mode exp becomes `talk_exp.mp4` beside it; a still edited by a still `portrait_exp.png`."""
    if source == PIPE or is_sequence(source):
        raise OutputError(f"{source} gives the output no name", "name it with --output")
    still = is_still(probe(source), [probe(path) for path in driving.paths])
    return source.with_name(f"{source.stem}_{driving.mode}{'.png' if still else '.mp4'}")


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
        timing = clock(drivers).info
        info = replace(source, fps=timing.fps, time_base=timing.time_base, duration=timing.duration, is_image=False)
        return Target(info, audio, None, None, still=True)
    start, ends = settings.start, [settings.end]
    if settings.driving_end == "trim":
        ends += [float(first_time) + driver.track.duration for driver in drivers if len(driver.track.times) > 1]
    if audio and not (source.path.exists() and audio.samefile(source.path)):
        start = float(first_time) if start is None else start
        ends.append(float(first_time) + source.duration)
    return Target(source, audio, start, min((moment for moment in ends if moment is not None), default=None))


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
    write_image(output, frame.rgb, original.planes[-1] if original and original.layout.alpha else None)
    if preview:
        write_image(preview, side_by_side(job.frame.rgb8, frame.rgb8, job.moment, views_of(drivers, settings)))
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
    """Each driver's pictures, matched in time as its motion is; one whose motion is a single code holds."""
    ends = [settings.driving_end if len(driver.track.times) > 1 else "hold" for driver in drivers]
    rate = settings.rate
    return [DriverView(driver.info, driver.times, end, rate) for driver, end in zip(drivers, ends, strict=True)]


def push_previews(
    edited: Iterable[tuple[Job, Frame]], preview: PushedVideo, views: list[DriverView]
) -> Iterator[Frame]:
    """Passes the edited frames on and gives each, beside its source and driving, to the preview."""
    for job, frame in edited:
        both = side_by_side(job.frame.rgb8, frame.rgb8, job.moment, views)
        preview.push(replace(frame, rgb=both, original=None))
        yield frame
