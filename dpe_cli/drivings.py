"""Drivings: from pixels to motion codes over time, ready to be followed; and motion files made of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from dpe_cli.crop import cut
from dpe_cli.errors import FaceError, InputError, OutputError
from dpe_cli.face import SMOOTH_SECONDS, FaceDetector, smooth_boxes
from dpe_cli.jobs import Engine, batched
from dpe_cli.motion import SMOOTH_SECONDS as CODE_SECONDS
from dpe_cli.motion import MotionTrack, most_neutral, nearest_code, smoothed, swayed
from dpe_cli.motion_file import Driver, is_motion_file, read_motion, write_motion
from dpe_cli.people import track_faces
from dpe_cli.pipeline import Progress, ahead, silent
from dpe_cli.request import Edits, EditSettings, check_output
from dpe_cli.video import Frame, VideoInfo, probe, read_frames


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
