"""The main path: from a source, a driving and an engine to an edited video.

Every stage is an iterator; nobody keeps the video. Held at once are a batch of source frames, the window of
`smooth_boxes`, the few frames that wait before and after the networks (`ahead`), 20 numbers for each driving frame, a
line of the report for each source frame and, for a preview, one second of small driving frames.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import tee
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dpe_cli.container import PIPE, bytes_of, files_of, frame_rate, is_sequence
from dpe_cli.control import DRIVING, Control
from dpe_cli.crop import cut
from dpe_cli.encoding import Wish
from dpe_cli.errors import FaceError, InputError, OutputError, QualityError, UsageError
from dpe_cli.face import SMOOTH_SECONDS, Box, Detection, FaceDetector, crop_box, smooth_boxes
from dpe_cli.jobs import Engine, Job, batched, run_jobs
from dpe_cli.motion import SMOOTH_SECONDS as CODE_SECONDS
from dpe_cli.motion import Curve, MotionTrack, most_neutral, nearest_code, smoothed, swayed
from dpe_cli.motion_file import Driver, is_motion_file, probe_driving, read_motion, write_motion
from dpe_cli.paste import Paster, make_paster
from dpe_cli.people import TRACK, Picked, follow, track_faces
from dpe_cli.pipeline import ahead, ended
from dpe_cli.preview import DriverView, PushedVideo, side_by_side
from dpe_cli.regions import RegionMasks, network_landmarks
from dpe_cli.report import PixelHash, Report
from dpe_cli.tracks import audio_codecs
from dpe_cli.video import Frame, VideoInfo, probe, read_frames, seconds_of
from dpe_cli.writer import check_image, check_writable, write_image, write_video

AUDIO = ("auto", "source", "driving", "none")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
SAMPLE_SECONDS = 2.0  # between two measurements of the self-reconstruction
NO_FACE, HELD, OTHERS = "no face", "no face, last box held", "only other faces"
NO_STRENGTH = "strength 0"
PASTING = {"mask": "--mask", "feather": "--feather", "colour_match": "--no-colour-match", "detail": "--no-detail",
           "parsing": "--parsing", "landmarker": "--landmarker", "enhancer": "--enhancer"}  # fmt: skip

T = TypeVar("T")


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
    """Whose expression and whose pose are transferred; None keeps the source's own.

    controlled: a Control (`EditSettings.control`) edits the expression too, with or without a driving; `factors` are
    the drivings of its single factors.
    """

    expression: Path | None = None
    pose: Path | None = None
    factors: tuple[Path, ...] = ()
    controlled: bool = False

    def __post_init__(self) -> None:
        if self.expression is None and self.pose is None and not self.controlled:
            raise InputError("there is no driving video", "give one for the expression, the pose or both")

    @property
    def mode(self) -> str:
        if self.expression is None and not self.controlled:
            return "pose"
        return "exp" if self.pose is None else "both"

    @property
    def paths(self) -> list[Path]:
        """The different files, the expression's first; none where a Control alone edits."""
        wanted = (self.expression, *self.factors, self.pose)
        return list(dict.fromkeys(path for path in wanted if path is not None))


@dataclass(frozen=True)
class Edit:
    """One of the edits of a pass: who is edited, by which driving and how strongly."""

    driving: Driving
    face: str = "largest"  # one of people.CHOICES
    strength: float = 1.0  # 0 = the source's own motion, 1 = the driving's


@dataclass(frozen=True)
class Edits:
    """All edits of one pass, in the order in which they are pasted: where two overlap, the later one is on top."""

    each: tuple[Edit, ...]

    @property
    def mode(self) -> str:
        """Of all; `both` where they differ."""
        modes = {edit.driving.mode for edit in self.each}
        return modes.pop() if len(modes) == 1 else "both"

    @property
    def paths(self) -> list[Path]:
        """The different driving files, in order."""
        return list(dict.fromkeys(path for edit in self.each for path in edit.driving.paths))


@dataclass(frozen=True)
class EditSettings:
    """How to edit. Times in seconds of the source; `audio` is auto, source, driving, none or the path of a file."""

    strength: float = 1.0  # 0 = the source's own motion, 1 = the driving's
    curve: Curve | None = None  # keyframes of the strength, in its place; where it is 0, frames are left untouched
    control: Control | None = None  # of the expression, factor by factor; for a Driving that is `controlled`
    region: str = "all"  # or one of regions.PARTS: what of the face is pasted back
    motion: str = "absolute"  # the driving's own motion, or relative: its change against its neutral frame
    neutral_frame: float | None = None  # seconds in the driving; None: chosen by `most_neutral`
    sway: bool = True  # heads that are moved go along with the driving's in its frame; else they only turn
    smooth: float = 1.0  # times the usual smoothing of the source's boxes and the driving's codes; 0 = none
    driving_end: str = "pingpong"  # hold, loop, pingpong, trim
    on_no_face: str = "pass"  # pass, hold, fail
    face: str = "largest"
    driving_face: str = "largest"
    audio: str = "auto"
    start: float | None = None
    end: float | None = None
    paste: bool | None = None  # None: pasted back for an expression, the crop otherwise
    crop_size: int | None = None  # side in pixels of a crop that is not pasted back; None: as it is drawn
    mask: str = "gaussian"  # one of masks.MASKS
    feather: float | None = None  # width of the mask's soft edge, percent of the face's height; None: the mask's own
    colour_match: bool = True
    detail: bool = True
    parsing: Path | None = None  # model files: face parsing, MediaPipe's landmarks, face enhancement
    landmarker: Path | None = None
    enhancer: Path | None = None
    seam_limit: float | None = None  # a higher seam score in any frame refuses the result
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
    settings = without_idle(settings, source_info, driver_infos, say)
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


# What is asked for, and whether it can be done


def edits_of(driving: Driving | Edits, settings: EditSettings) -> Edits:
    """One driving as the only edit of its pass."""
    return driving if isinstance(driving, Edits) else Edits((Edit(driving, settings.face, settings.strength),))


def check_request(
    source: Path,
    driving: Driving | Edits,
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
    check_outputs(outputs, inputs, settings.overwrite)
    source_info = probe(source, settings.rate)
    driver_infos = [probe_driving(path, settings.rate) for path in driving.paths]
    if is_still(source_info, driver_infos):
        for path in (output, preview):
            if path and path.suffix.lower() not in IMAGE_SUFFIXES:
                raise OutputError(
                    f"{path} cannot hold a picture, which is what a still makes of a still",
                    f"name a file that ends in one of {' '.join(IMAGE_SUFFIXES)}",
                )
        if pastes(edits_of(driving, settings), settings):
            check_image(output, source_info.layout)
    else:
        check_writable(source_info, output, settings.wish)
        if preview and preview.suffix.lower() not in VIDEO_SUFFIXES:
            raise OutputError(
                f"{preview} cannot hold a video", f"name a file that ends in one of {' '.join(VIDEO_SUFFIXES)}"
            )
    return source_info, driver_infos


def check_outputs(outputs: list[Path], inputs: list[Path], overwrite: bool) -> None:
    """Raises OutputError if one of the files of a run cannot or must not be written, or two are the same."""
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise OutputError(
            f"{outputs[0]} is asked for twice", "give the result, the preview and the report different names"
        )
    for path in outputs:
        check_output(path, inputs, overwrite)


def check_output(path: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raises OutputError if `path` cannot or must not be written."""
    if path == PIPE:
        return
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", "make it or name another")
    try:
        folder = path.is_dir()
    except OSError as error:  # a name that is too long for any file
        raise OutputError(f"{path} cannot be written: {error.strerror}", "name another") from error
    if folder:
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


def without_idle(
    settings: EditSettings, source: VideoInfo, drivers: Iterable[VideoInfo], say: Callable[[str], None]
) -> EditSettings:
    """The settings less what means nothing for these files, which is said: a span of a still, a rate of a video."""
    return without_span(without_rate(settings, [source, *drivers], say), source, say)


def without_rate(settings: EditSettings, inputs: Iterable[VideoInfo], say: Callable[[str], None]) -> EditSettings:
    """Only image sequences have no rate of their own; else --fps means nothing, which is said."""
    if settings.fps is None or any(is_sequence(info.path) for info in inputs):
        return settings
    say("--fps is the rate of image sequences, and none is read: it means nothing")
    return replace(settings, fps=None)


def without_span(settings: EditSettings, source: VideoInfo, say: Callable[[str], None]) -> EditSettings:
    """A still source has no time of its own: --start and --end mean nothing, which is said; else the same settings."""
    if not source.is_image or (settings.start, settings.end) == (None, None):
        return settings
    say(f"{source.path} is a picture, which has no time of its own: --start and --end mean nothing")
    return replace(settings, start=None, end=None)


def is_still(source: VideoInfo, drivers: Iterable[VideoInfo]) -> bool:
    """Whether the result is one picture."""
    return source.is_image and all(driver.is_image for driver in drivers)


def bind_control(edits: Edits, settings: EditSettings, engine: Engine, remark: Callable[[str], None]) -> EditSettings:
    """The settings with their control bound to the factors of the engine's weights; says what has nothing to do.

    Raises WeightsError, InputError for what these cannot do.
    """
    if settings.control is None:
        return settings
    control, remarks = settings.control.bound(engine.description)
    for message in remarks:
        remark(message)
    for edit in edits.each:
        driving = edit.driving
        if edit.strength != 1 and not driving.paths and not control.origins:
            remark("the strength has no use: nothing is followed, and measures are set as a whole")
        if driving.expression not in (None, driving.pose) and not control.follows_driving:
            remark(
                f"nothing of the face follows {driving.expression.name}: mouth, eyes and brows were all told otherwise"
            )
    return replace(settings, control=control)


def pastes(edits: Edits, settings: EditSettings) -> bool:
    """Whether the edited face goes back into the full frame."""
    several = len(edits.each) > 1
    return bool(settings.paste) or several or (edits.mode == "exp" and settings.paste is not False)


def decide_paste(edits: Edits, settings: EditSettings, remark: Callable[[str], None]) -> bool:
    """`pastes`, once that makes sense; a moved head goes back only by order, and with a warning.

    Several edits always do. Raises UsageError where the crop is asked for all the same, for what a crop has not (a
    seam, a region, any of PASTING), for the region of a moved head, and for the size of a crop where there is none.
    """
    if len(edits.each) > 1 and settings.paste is False:
        raise UsageError("several edits do not fit into one crop", "leave --no-paste out, or make one edit a run")
    paste = pastes(edits, settings)
    if settings.seam_limit is not None and not paste:
        raise UsageError("a crop that is not pasted back has no seam to fail for", "add --paste or leave --fail-if out")
    if settings.region != "all" and edits.mode != "exp":  # the rest of the face would stay where the head was
        raise UsageError("a region of a head that moves does not fit its face", "leave --region or the pose out")
    if settings.region != "all" and not paste:
        raise UsageError("a crop that is not pasted back has no region", "add --paste or leave --region out")
    for name, option in PASTING.items():
        if not paste and getattr(settings, name) != getattr(EditSettings, name):
            raise UsageError(
                f"{option} has no use for a crop that is not pasted back", f"add --paste or leave {option} out"
            )
    if settings.crop_size is not None and paste:
        raise UsageError("a face that is pasted back has no size of its own", "add --no-paste or leave --crop-size out")
    if edits.mode == "exp":
        return paste
    if paste:
        remark("a pose is pasted back: neck and background bend between the head and the frame, look at the seam")
    else:
        remark("a moved head does not fit into its frame: only the crop is written; --paste bends what is around it")
    return paste


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


# Driving: pixels to motion


def read_drivers(
    infos: Iterable[VideoInfo], edits: Edits, engine: Engine, detector: FaceDetector, settings: EditSettings,
    progress: Progress, remark: Callable[[str], None],
) -> list[Driver]:  # fmt: skip
    """The drivings of a pass, ready to be followed. Raises InputError, FaceError, WeightsError."""
    drivers = [read_driver(info, engine, detector, settings, progress) for info in infos]
    posing = {edit.driving.pose for edit in edits.each}
    for number, path in enumerate(edits.paths):
        if path in posing:
            drivers[number] = with_sway(drivers[number], engine, settings)
    return [prepare_driver(driver, settings, remark) for driver in drivers]


def with_sway(driver: Driver, engine: Engine, settings: EditSettings) -> Driver:
    """A driver with the movement of the head in its frame; as it is where codes do not tell size and place."""
    known = settings.sway and engine.description.get("codes") == "landmarks"
    return replace(driver, track=swayed(driver.track, driver.boxes)) if known else driver


def read_driver(
    info: VideoInfo, engine: Engine, detector: FaceDetector, settings: EditSettings, progress: Progress
) -> Driver:
    """Motion codes of the face in a driving video or still, or those of a motion file; not smoothed.

    Raises FaceError if there is none, InputError and WeightsError for a motion file that does not fit.
    """
    if is_motion_file(info.path):
        return motion_of(info.path, engine)
    times: list[Fraction] = []

    def frames() -> Iterator[Frame]:
        for frame in progress(read_frames(info.path, fps=settings.rate), info.n_frames, f"reading {info.path.name}"):
            times.append(frame.time)
            yield frame

    boxed = smooth_boxes(track_faces(frames(), detector, settings.driving_face), smoothing_radius(info))
    crops = ((frame.time, box, cut(frame.rgb, box, engine.size)[0]) for frame, box in boxed if box is not None)
    moments: list[float] = []
    boxes: list[tuple[float, ...]] = []
    codes: list[np.ndarray] = []
    for batch in batched(ahead(crops), engine.batch_size):
        moments += [float(moment - times[0]) for moment, _, _ in batch]
        boxes += [(box.x0, box.y0, box.x1, box.y1) for _, box, _ in batch]
        codes.append(engine.motion_codes(np.stack([crop for _, _, crop in batch])))
    if not codes:
        raise FaceError(f"no face was found in {info.path}", "use a driving with a visible face, or another --detector")
    track = MotionTrack(np.array(moments), np.concatenate(codes), float(times[-1] - times[0]))
    return Driver(info, times, track, np.array(boxes))


def motion_of(path: Path, engine: Engine) -> Driver:
    """The driving that a motion file holds. Raises InputError and WeightsError for one that does not fit."""
    none = np.zeros((0, engine.size, engine.size, 3), np.uint8)
    return read_motion(path, engine.description["sha256"], engine.motion_codes(none).shape[1])


def smoothing_radius(info: VideoInfo, smooth: float = 1.0) -> int:
    """Frames each way that smooth a box."""
    return 0 if info.is_image or smooth == 0 else max(1, round(float(info.fps) * SMOOTH_SECONDS * smooth))


def prepare_driver(driver: Driver, settings: EditSettings, remark: Callable[[str], None]) -> Driver:
    """The driver with its codes smoothed and, for relative motion, its neutral frame.

    Raises InputError where relative motion has nothing to go by.
    """
    driver = replace(driver, track=smoothed(driver.track, CODE_SECONDS * settings.smooth))
    if settings.motion == "absolute":
        return driver
    path, first, asked = driver.info.path, float(driver.times[0]), settings.neutral_frame
    if len(driver.track.times) == 1:
        raise InputError(f"{path} shows one moment, which has no relative motion", "use --motion absolute")
    try:
        neutral = most_neutral(driver.track) if asked is None else nearest_code(driver.track, asked - first)
    except ValueError as error:
        raise InputError(f"{path} has no such neutral frame: {error}", "check --neutral-frame") from error
    remark(f"the neutral frame of {path.name} is at {first + driver.track.times[neutral]:.3f} s")
    return replace(driver, neutral=neutral)


def extract_motion(
    video: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings | None = None,
    progress: Progress = silent,
) -> None:
    """Writes the motion of the face in a video or still to `output`, a motion file (`motion_file.py`).

    Of `settings` the driving's face, the rate of image sequences and overwrite count. Editing by the file gives the
    frames that editing by the video gives. Raises InputError, FaceError, OutputError.
    """
    settings = settings or EditSettings()
    check_output(output, [video], settings.overwrite)
    if not is_motion_file(output):
        raise OutputError(f"{output} cannot hold motion", "name a file that ends in .safetensors")
    driver = read_driver(probe(video, settings.rate), engine, detector, settings, progress)
    write_motion(output, driver, *engine.shifts(driver.track.codes), engine.description)


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


def default_output(source: Path, driving: Driving | Edits) -> Path:
    """`talk.mp4` edited in mode exp becomes `talk_exp.mp4` beside it; a still edited by a still `portrait_exp.png`."""
    if source == PIPE or is_sequence(source):
        raise OutputError(f"{source} gives the output no name", "name it with --output")
    still = is_still(probe(source), [probe_driving(path) for path in driving.paths])
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
    options["marked"] = True
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
