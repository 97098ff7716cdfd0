"""What is asked of an edit, and whether it can be done: who follows whom, the settings, and checks before any work."""

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from dpe_cli.container import PIPE, files_of, frame_rate, is_sequence
from dpe_cli.control import Control
from dpe_cli.encoding import Wish
from dpe_cli.errors import InputError, OutputError, UsageError
from dpe_cli.jobs import Engine
from dpe_cli.motion import Curve
from dpe_cli.motion_file import probe_driving
from dpe_cli.tracks import audio_codecs
from dpe_cli.video import VideoInfo, probe
from dpe_cli.writer import check_image, check_writable

AUDIO = ("auto", "source", "driving", "none")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
PASTING = {"mask": "--mask", "feather": "--feather", "colour_match": "--no-colour-match", "detail": "--no-detail",
           "parsing": "--parsing", "landmarker": "--landmarker", "enhancer": "--enhancer"}  # fmt: skip


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


# What is asked for, and whether it can be done


# Whether it can be done


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
    *,
    reads: Iterable[Path] = (),
    sidecar: Path | None = None,
) -> tuple[VideoInfo, list[VideoInfo]]:
    """Finds out early what would fail late; gives the probed source and drivers. Raises InputError, OutputError.

    `reads` are further files that the run reads, `sidecar` is the one of the output.
    """
    edits, outputs = edits_of(driving, settings), [path for path in (output, preview, report) if path]
    if settings.audio not in AUDIO and not audio_codecs(Path(settings.audio)):
        raise InputError(f"{settings.audio} holds no sound", "give --audio another file")
    check_outputs(outputs, [*files_read(source, edits, settings), *reads], settings.overwrite, sidecar)
    source_info = probe(source, settings.rate)
    driver_infos = [probe_driving(path, settings.rate) for path in driving.paths]
    if is_still(source_info, driver_infos):
        for path in (output, preview):
            if path and path.suffix.lower() not in IMAGE_SUFFIXES:
                raise OutputError(
                    f"{path} cannot hold a picture, which is what a still makes of a still",
                    f"name a file that ends in one of {' '.join(IMAGE_SUFFIXES)}",
                )
        if pastes(edits, settings):
            check_image(output, source_info.layout)
    else:
        check_writable(source_info, output, settings.wish, crop=not pastes(edits, settings))
        if preview and preview.suffix.lower() not in VIDEO_SUFFIXES:
            raise OutputError(
                f"{preview} cannot hold a video", f"name a file that ends in one of {' '.join(VIDEO_SUFFIXES)}"
            )
    return source_info, driver_infos


def files_read(source: Path, edits: Edits, settings: EditSettings) -> list[Path]:
    """The files that an edit reads."""
    models = (settings.parsing, settings.landmarker, settings.enhancer)
    sound = () if settings.audio in AUDIO else (Path(settings.audio),)
    faces = [Path(edit.face) for edit in edits.each] + [Path(settings.driving_face)]
    return [
        source,
        *edits.paths,
        *(model for model in models if model),
        *sound,
        *(f for f in faces if os.path.isfile(f)),
    ]


def check_outputs(outputs: list[Path], inputs: Iterable[Path], overwrite: bool, sidecar: Path | None = None) -> None:
    """Raises OutputError if one of the files of a run cannot or must not be written, or two are the same.

    The first output is the result, whose `sidecar` is replaced with it.
    """
    inputs = list(inputs)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise OutputError(
            f"{outputs[0]} is asked for twice", "give the result, the preview and the report different names"
        )
    for path in outputs:
        check_output(path, inputs, overwrite)
        if sidecar and path.resolve() == sidecar.resolve():
            raise OutputError(f"{path} is where the sidecar of {outputs[0]} goes", "choose another name")
    if sidecar and is_among(sidecar, inputs):
        raise OutputError(f"{sidecar}, where the sidecar goes, is an input", "choose another output")


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
    if is_among(path, inputs):
        raise OutputError(f"{path} is also an input", "choose another output")
    if not overwrite:
        raise OutputError(f"{path} exists", "choose another output or add --overwrite")


def is_among(path: Path, others: Iterable[Path]) -> bool:
    """Whether a file that `path` stands for is one of `others`, by whatever name."""
    mine = identities(path)
    return bool(mine) and any(mine & identities(other) for other in others)


def identities(path: Path) -> set[tuple[int, int]]:
    """What tells the files apart that a path stands for; nothing for those that nobody can look at."""
    with contextlib.suppress(OSError):
        return {(file.stat().st_dev, file.stat().st_ino) for file in files_of(path)}
    return set()


def without_idle(
    settings: EditSettings, source: VideoInfo, drivers: list[VideoInfo], output: Path, say: Callable[[str], None]
) -> EditSettings:
    """The settings less what means nothing for these files, which is said: a span of a still, a rate of a video, the
    encoding of a picture, the format of a pipe."""
    if is_still(source, drivers):
        settings = without_encoding(settings, output, say)
    if settings.pipe != EditSettings.pipe and output != PIPE:
        say(f"--pipe is the format of standard output, and {output} is a file: it means nothing")
        settings = replace(settings, pipe=EditSettings.pipe)
    return without_span(without_rate(settings, [source, *drivers], say), source, say)


def without_encoding(settings: EditSettings, output: Path, say: Callable[[str], None]) -> EditSettings:
    """A picture has no encoding to choose: what was chosen means nothing, which is said; else the same settings."""
    options = {"codec": "--codec", "crf": "--crf", "preset": "--preset", "nvenc": "--[no-]nvenc"}
    chosen = {name: option for name, option in options.items() if getattr(settings, name) is not None}
    if not chosen:
        return settings
    say(f"{output} is a picture, and only videos have {', '.join(chosen.values())}: that means nothing")
    return replace(settings, **dict.fromkeys(chosen))


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


def check_gives_name(source: Path) -> None:
    """Raises OutputError for a source that no output can be named after."""
    if source == PIPE or is_sequence(source):
        raise OutputError(f"{source} gives the output no name", "name it with --output")


def default_output(source: Path, driving: Driving | Edits) -> Path:
    """`talk.mp4` edited in mode exp becomes `talk_exp.mp4` beside it; a still edited by a still `portrait_exp.png`."""
    check_gives_name(source)
    still = is_still(probe(source), [probe_driving(path) for path in driving.paths])
    return source.with_name(f"{source.stem}_{driving.mode}{'.png' if still else '.mp4'}")
