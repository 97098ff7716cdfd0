"""Speech drives the face: SadTalker's idea in DPE's motion space.

In a video only the mouth's coordinates of the motion code are replaced, frame by frame, and only the lower face is
pasted back: head, eyes and everything above the cheeks stay the source's own. A still picture becomes a talking head,
with a generated pose and blinks. Stages are iterators as in `edit.py`; nobody keeps the video or the sound.

A `Dub` holds what is decided before the first frame is made. Everything after it is local in time, so that parts of a
dub can be made alone (`segments.py`).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dpe_cli.container import files_of
from dpe_cli.crop import cut, gaussian_mask
from dpe_cli.drivings import read_driver, smoothing_radius, with_sway
from dpe_cli.edit import (
    NO_FACE,
    Sight,
    Target,
    describe,
    find_faces,
    follow_source,
    paster_for,
    remember_sights,
    stack_jobs,
    write_clips,
)
from dpe_cli.errors import FaceError, InputError, UsageError, WeightsError
from dpe_cli.face import Box, FaceDetector, ramp, smooth_boxes
from dpe_cli.factors import Factors, coordinate_projectors, follows_space
from dpe_cli.jobs import UNIT, Engine, Job, batched, batched_in_units, run_jobs
from dpe_cli.landmark_net import NetworkLandmarker
from dpe_cli.limits import scratch
from dpe_cli.masks import POINTS_SECONDS, Landmarks, Steady
from dpe_cli.models import SpeechNets
from dpe_cli.motion_file import Driver, probe_driving
from dpe_cli.motion_space import COORDINATES, POSE_DIM
from dpe_cli.paste import Paster
from dpe_cli.people import Picked
from dpe_cli.pipeline import Progress, ahead, ended, silent, unheard
from dpe_cli.report import PixelHash, Report
from dpe_cli.request import Driving, Edit, Edits, EditSettings, check_outputs, without_rate
from dpe_cli.speech import GRID, Loudness
from dpe_cli.speech_motion import (
    GENERATE,
    Person,
    PoseMotion,
    SpeechMotion,
    blink_at,
    hear,
    load_nets,
    read_loudness,
)
from dpe_cli.tracks import audio_codecs
from dpe_cli.video import Frame, VideoInfo, probe, seconds_of
from dpe_cli.weights import LANDMARKS, SPEECH, digest, find
from dpe_cli.writer import check_writable, write_speech

AUDIO_ENDS = ("trim", "pad", "loop", "error")
KEEP, AUTO, OFF = "keep", "auto", "off"
POSES, BLINKS = (KEEP, GENERATE), (AUTO, OFF)  # words of --pose and --blink; anything else is a file
REFERENCE = 100  # frames with a face, from the source's start, that tell the person's closed mouth
LIDS = COORDINATES["lids"]
LOWER_LIDS = ([144, 145, 153], [380, 374, 373])  # of MediaPipe's points; the picture's left eye first
LIPS_MIDDLE = [13, 14]
BEGINS, FULL = 0.25, 0.6  # of the way from the lower lids to the mouth: the mask is nothing, and everything


@dataclass(frozen=True)
class DubSettings:
    """How to dub; `edit` has what dubbing shares with editing: the face, the span, encoding, paste-back."""

    audio_end: str = "trim"  # one of AUDIO_ENDS
    expression_scale: float = 1.0  # multiplies what the mouth moves
    pose: str = ""  # keep, generate, or the path of a video or motion file; "": generate for stills, keep for videos
    pose_style: int = 0
    blink: str = ""  # auto, off, or the path of a video or motion file; "": auto for stills, off for videos
    still: bool = False  # a still's head does not move, and the face goes back into the full picture
    mix: float | None = None  # gain of the source's own sound; None: it is not heard
    seed: int = 0
    edit: EditSettings = EditSettings()  # noqa: RUF009 - frozen

    @property
    def files(self) -> list[Path]:
        """What the head and the lids of a still follow."""
        asked = (self.pose, POSES), (self.blink, BLINKS)
        return [Path(one) for one, words in asked if one and one not in words]

    @property
    def head_moves(self) -> bool:
        """The pose is not the source's own; of `settled` settings."""
        return self.pose != KEEP

    @property
    def crop_only(self) -> bool:
        """A moved head does not fit into its picture."""
        return self.head_moves and self.edit.paste is not True


def dub_video(
    source: Path,
    audio: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: DubSettings | None = None,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Report:
    """Makes the face in `source`, a video or a still, say what is in `audio`, and writes `output` with that sound.

    Raises InputError, FaceError, OutputError, and WeightsError for weights whose motion codes speech does not know;
    what `engine` raises passes through. `output` appears when it is whole.
    """
    settings, started = settings or DubSettings(), time.monotonic()
    info, report = check_dub(source, audio, output, settings), Report()
    remark = report.remarking(say)
    dub = decide(info, audio, engine, detector, settings, report, progress, remark)
    paster, edit = dub.paster(engine, detector), dub.settings.edit
    sights: dict[int, Sight] = {}

    def turn(again: bool) -> Iterator[Seen]:
        followed = follow_source(source, detector, edit, edits_for(source, edit), unheard if again else remark)
        return seen_source(ahead(followed), info, edit)

    shown = shown_frames(turn, info, dub.lengths, sights)
    jobs = stack_jobs(dub.spoken(dub.jobs(shown, sights), engine), 0, sights, None, report)
    pixels = PixelHash()
    edited = pixels.passing(run_jobs(jobs, engine, paster, report, edit.crop_size))
    edited = progress(ahead(edited), dub.lengths.frames(info), f"dubbing {source.name}")
    with ended(shown), ended(edited), scratch(output) as folder:
        target = replace(dub.target(info), audio=dub.sound(source, folder))
        written = write_clips(edited, target, output, None, [], edit, remark)
    report.sort_frames(written)
    report.output = {"path": str(output), "preview": None, "frames": written, "pixels_sha256": pixels.hexdigest()}
    report.engine = dict(engine.description)
    report.seconds = time.monotonic() - started
    for finding in report.findings():
        remark(finding)
    return report


# What is asked for, and whether it can be done


def check_dub(
    source: Path, audio: Path, output: Path, settings: DubSettings, report: Path | None = None, *,
    reads: Iterable[Path] = (), sidecar: Path | None = None,
) -> VideoInfo:  # fmt: skip
    """Finds out early what would fail late; gives the probed source. Raises InputError, OutputError.

    `reads` are further files that the run reads, `sidecar` is the one of the output.
    """
    outputs = [output, report] if report else [output]
    own = [source, audio, *settings.files]
    check_outputs(outputs, [*own, *reads], settings.edit.overwrite, sidecar)
    info = probe(source, settings.edit.rate)
    if not audio_codecs(audio):
        raise InputError(f"{audio} holds no sound", "name a file with speech in it")
    for option, given, words in (("--pose", settings.pose, POSES), ("--blink", settings.blink, BLINKS)):
        if given and given not in words:
            if not files_of(Path(given)):
                remedy = f"give {option} {', '.join(words)}, or a video or motion file"
                raise InputError(f"{given} does not exist", remedy)
            probe_driving(Path(given))
    if settings.mix is not None and not info.has_audio:
        raise InputError(f"{source} has no sound to mix in", "leave --mix out")
    if not info.is_image and (settings.still or settings.pose not in ("", KEEP) or settings.blink not in ("", OFF)):
        raise UsageError(
            f"{source} is a video, whose own head and eyes stay", "leave --pose, --blink and --still to pictures"
        )
    if not info.is_image and (settings.pose_style or settings.seed):
        raise UsageError(
            f"{source} is a video, whose own head and eyes stay", "leave --pose-style and --seed to pictures"
        )
    if info.is_image and (settings.edit.start, settings.edit.end) != (None, None):
        raise UsageError(f"{source} is a picture, which has no time of its own", "leave --start and --end out")
    if settings.edit.paste is False and not settled(settings, info).head_moves:
        raise UsageError(
            f"the head of {source} does not move, so that the whole picture is written", "leave --no-paste out"
        )
    if settings.edit.crop_size is not None and not settled(settings, info).crop_only:
        raise UsageError("a face that is pasted back has no size of its own", "leave --crop-size out")
    crop = settled(settings, info).crop_only
    check_writable(replace(info, is_image=False), output, settings.edit.wish, crop)
    return info


def settled(settings: DubSettings, info: VideoInfo) -> DubSettings:
    """The settings with what depends on the source filled in."""
    if not info.is_image:
        return replace(settings, pose=KEEP, blink=OFF)
    pose = KEEP if settings.still else settings.pose or GENERATE
    edit = replace(settings.edit, start=None, end=None)  # a picture has no time of its own
    return replace(settings, pose=pose, blink=settings.blink or AUTO, edit=edit)


def mouth_factors(engine: Engine) -> Factors:
    """The coordinates that speech was learnt in, whatever factors were fitted. Raises WeightsError for other codes."""
    if not follows_space(Path(engine.description["weights"])):
        raise WeightsError(
            f"speech does not know the motion codes of {engine.description['weights']}",
            "use weights whose codes were taught by motion-space.json, as the default ones",
        )
    return Factors(coordinate_projectors())


@dataclass(frozen=True)
class Plan:
    """What is made of two lengths. Times in seconds of the source; speech begins with the source's first frame."""

    first: float  # time of the source's first frame
    begin: float  # of the part that is written
    end: float | None  # None: with the last frame
    loop_speech: bool = False
    more_frames: str = ""  # what follows the source's last frame: "", hold or loop

    def target(self, info: VideoInfo) -> VideoInfo:
        """How the output is written."""
        if not info.is_image:
            return info
        rate = Fraction(GRID)
        return replace(info, fps=rate, time_base=Fraction(1, 90000), duration=self.end - self.begin, is_image=False)

    def frames(self, info: VideoInfo) -> int | None:
        """How many frames will come, for the progress only."""
        rate = GRID if info.is_image else float(info.fps)
        return None if self.end is None else max(1, round((self.end - self.begin) * rate))


def plan_length(info: VideoInfo, loudness: Loudness, settings: DubSettings) -> Plan:
    """What happens where speech and source are not equally long. Raises InputError for audio_end `error`."""
    if info.is_image:
        return Plan(0.0, 0.0, loudness.seconds)
    first, wanted = float(info.start), settings.edit.end
    begin = first if settings.edit.start is None else max(first, settings.edit.start)
    seconds = seconds_of(info)
    over, spoken = first + seconds, first + loudness.seconds
    way = settings.audio_end
    if way == "error" and abs(over - spoken) > 1 / GRID + 1 / float(info.fps):
        raise InputError(
            f"the speech is {loudness.seconds:.2f} s long, the source {seconds:.2f} s",
            "cut one of them, or choose --audio-end trim, pad or loop",
        )
    end = min(over, spoken) if way == "trim" else max(over, spoken)
    end = end if wanted is None else min(end, wanted)
    if end <= begin:
        raise InputError(f"nothing is left of the span asked for: the speech ends at {spoken:.2f} s", "check --start")
    longer = way in ("pad", "loop") and end > over
    return Plan(first, begin, end, way == "loop", ("hold" if way == "pad" else "loop") if longer else "")


def edits_for(source: Path, settings: EditSettings) -> Edits:
    """A dub as the only edit of its pass."""
    return Edits((Edit(Driving(source), settings.face),))


def networks_used() -> dict[str, str]:
    """The sha256 of our own networks that a dub's frames depend on, by name. Raises WeightsError."""
    return {name: digest(find(name)) for name in (SPEECH, LANDMARKS)}


@dataclass(frozen=True, eq=False)
class Dub:
    """All that is decided of a dub before its frames are made."""

    audio: Path
    audio_bytes: int
    settings: DubSettings  # `settled`
    still: bool  # the source is a picture
    lengths: Plan
    loudness: Loudness
    person: Person
    drivers: dict[Path, Driver]  # of `settings.files`
    networks: dict[str, str]  # `networks_used`

    def jobs(self, shown: Iterator[tuple[Frame, Box | None]], sights: dict[int, Sight]) -> Iterator[Job]:
        """What is to be done with the frames, less the motion codes, for which `spoken` looks at the pictures."""
        for frame, box in shown:
            moment = float(frame.time) - self.lengths.first
            yield Job(frame, box, moment, None if box else NO_FACE, score=sights[frame.index].score)

    def spoken(self, jobs: Iterator[Job], engine: Engine) -> Iterator[Job]:
        """The jobs with the motion that the speech gives; they may begin anywhere. Raises WeightsError."""
        nets, factors = load_nets(), mouth_factors(engine)
        speech = SpeechMotion(self.audio, nets, self.loudness, self.person, self.lengths.loop_speech)
        return speak(
            jobs, engine, factors, speech, self.person.closed, self.settings.expression_scale, self.extras(nets)
        )

    def extras(self, nets: SpeechNets) -> "Extras":
        """Pose and blinks of a still as the settings say; a video has none of its own."""
        settings, pose, blink = self.settings, None, None
        if settings.pose == GENERATE:
            pose = PoseMotion(hear(self.audio, self.loudness), nets, settings.pose_style, settings.seed).at
        elif settings.pose != KEEP:
            followed = self.drivers[Path(settings.pose)].track
            pose = lambda t: (followed.at(t, "pingpong") - followed.codes[0])[:POSE_DIM]  # noqa: E731
        if settings.blink == AUTO:
            shut = nets.blink.numpy()
            blink = lambda t: blink_at(t, settings.seed) * shut  # noqa: E731
        elif settings.blink != OFF:
            watched = self.drivers[Path(settings.blink)].track
            usual = np.median(watched.codes, 0)
            blink = lambda t: (watched.at(t, "pingpong") - usual)[LIDS]  # noqa: E731
        return Extras(pose, blink)

    def paster(self, engine: Engine, detector: FaceDetector) -> Paster | None:
        """Pastes the lower face of a video, the whole face of a still; None where only the crop is written."""
        if self.settings.crop_only:
            return None
        if self.still:
            return paster_for(self.settings.edit, engine, detector)
        network = NetworkLandmarker()

        def dense(crop: np.ndarray) -> np.ndarray | None:
            shape = network.detect(crop)
            return None if shape is None else shape.points

        return Paster(LowerFace(dense, engine.size), self.settings.edit.colour_match, self.settings.edit.detail)

    def target(self, info: VideoInfo) -> Target:
        """How the output is written, without its sound."""
        return Target(
            self.lengths.target(info), None, None if self.still else self.lengths.begin, self.lengths.end, self.still
        )

    def sound(self, source: Path, folder: Path) -> Path:
        """The sound of the output: the speech's own packets where nothing is cut off its head, repeated, mixed in or
        wanted after it, else a file that is made in `folder`."""
        lengths, mix = self.lengths, self.settings.mix
        spoken = lengths.first + self.loudness.seconds
        silence = self.settings.audio_end == "pad" and lengths.end > spoken + 1 / GRID
        if lengths.begin == lengths.first and not (lengths.loop_speech or silence) and mix is None:
            return self.audio
        own = None if mix is None else (source, lengths.begin, mix)
        path = folder / "speech.wav"
        seconds = lengths.end - lengths.begin
        repeat = self.loudness.seconds if lengths.loop_speech else None
        write_speech(path, self.audio, lengths.begin - lengths.first, seconds, repeat, own)
        return path


def decide(
    info: VideoInfo, audio: Path, engine: Engine, detector: FaceDetector, settings: DubSettings, report: Report,
    progress: Progress, remark: Callable[[str], None],
) -> Dub:  # fmt: skip
    """Hears the speech and looks at the person; begins the report. Raises InputError, FaceError, WeightsError."""
    settings = settled(settings, info)
    settings = replace(settings, edit=without_rate(settings.edit, [info], remark))
    nets, source = load_nets(), info.path
    mouth_factors(engine)  # what the weights cannot do is known now
    if not 0 <= settings.pose_style < nets.config.styles:
        raise UsageError(
            f"there is no pose style {settings.pose_style}", f"give one from 0 to {nets.config.styles - 1}"
        )
    loudness = read_loudness(audio)
    lengths = plan_length(info, loudness, settings)
    if (tracks := len(audio_codecs(audio))) > 1:
        remark(f"{audio.name} has {tracks} sound tracks: the face says what is in the first")
    report.settings, report.detector = {"mode": "dub", **asdict(settings)}, detector.name
    speech = {"path": str(audio), **asdict(loudness)}
    report.inputs = {"source": describe(info), "driving": [], "speech": speech}
    edits = edits_for(source, settings.edit)
    find_faces(source, detector, settings.edit, edits)  # fails early
    person = Person.of(reference_codes(source, info, engine, detector, settings, edits), nets)
    drivers = {
        path: read_driver(probe_driving(path), engine, detector, settings.edit, progress) for path in settings.files
    }
    if (followed := Path(settings.pose)) in drivers:
        drivers[followed] = with_sway(drivers[followed], engine, settings.edit)
    size = audio.stat().st_size
    dub = Dub(audio, size, settings, info.is_image, lengths, loudness, person, drivers, networks_used())
    if dub.settings.crop_only:
        remark("a moved head does not fit into its picture: only the crop is written; --still or --paste keep it whole")
    return dub


# The person


def reference_codes(
    source: Path, info: VideoInfo, engine: Engine, detector: FaceDetector, settings: DubSettings, edits: Edits
) -> np.ndarray:
    """Motion codes (N, K) of the first frames that show the face, always from the source's start: every part of a video
    that is dubbed alone has the same closed mouth."""
    whole = replace(settings.edit, start=None, end=None)
    picked = islice(follow_source(source, detector, whole, edits), 4 * REFERENCE)
    boxed = smooth_boxes(remember_sights(picked, 0, {}), smoothing_radius(info))
    crops = (cut(frame.rgb8, box, engine.size)[0] for frame, box in boxed if box is not None)
    codes = [engine.motion_codes(np.stack(batch)) for batch in batched(islice(crops, REFERENCE), engine.batch_size)]
    if not codes:
        raise FaceError(f"no face was found at the start of {source}", "cut the source so that it begins with the face")
    return np.concatenate(codes)


@dataclass(frozen=True)
class Extras:
    """What is added to a still's own motion at each time; None: nothing."""

    pose: Callable[[float], np.ndarray] | None  # (6,)
    blink: Callable[[float], np.ndarray] | None  # (2,) of the lids


# Frames and their motion


Seen = tuple[Frame, Box | None, Sight]


def seen_source(picked: Iterable[Picked], info: VideoInfo, settings: EditSettings) -> Iterator[Seen]:
    """The source's frames with smoothed boxes and what tracking says of them."""
    sights: dict[int, Sight] = {}
    boxed = smooth_boxes(remember_sights(picked, 0, sights), smoothing_radius(info, settings.smooth))
    return ((frame, box, sights.pop(frame.index)) for frame, box in boxed)


def shown_frames(
    turn: Callable[[bool], Iterator[Seen]], info: VideoInfo, lengths: Plan, sights: dict[int, Sight]
) -> Iterator[tuple[Frame, Box | None]]:
    """The frames of the output with their boxes; fills `sights`.

    A picture at every time of the motion grid, as long as the speech lasts; a video's frames at their own times, and
    what follows them where the speech is longer. `turn` goes through the source, the first time or again.
    """
    if info.is_image:
        frame, box, sight = next(turn(False))
        for index in range(max(1, int(np.ceil(lengths.end * GRID - 1e-6)))):
            sights[index] = sight
            yield replace(frame, index=index, time=Fraction(index, GRID)), box
        return
    index, moved, step, again = -1, Fraction(0), 1 / info.fps, False
    while True:
        stamp = None
        for frame, box, sight in turn(again):
            stamp = frame.time + moved
            if float(stamp) >= lengths.end - 1e-6:
                return
            index += 1
            sights[index] = sight
            yield replace(frame, index=index, time=stamp), box
        if not lengths.more_frames or stamp is None:
            return
        if lengths.more_frames == "hold":
            while float(stamp + step) < lengths.end - 1e-6:
                index, stamp = index + 1, stamp + step
                sights[index] = replace(sight, new_shot=False)
                yield replace(frame, index=index, time=stamp), box
            return
        again, moved = True, stamp + step - Fraction(lengths.begin).limit_denominator(1_000_000)


def speak(
    jobs: Iterator[Job], engine: Engine, factors: Factors, speech: SpeechMotion, base: np.ndarray, scale: float,
    extras: Extras,
) -> Iterator[Job]:  # fmt: skip
    """What is to be done with each frame: its own motion code with another mouth; of a still other lids and pose."""
    for batch in batched_in_units(jobs, engine.batch_size):
        if batch[0].frame.index % UNIT == 0:
            engine.forget()
        seen = [job for job in batch if job.box is not None]
        codes: Iterator[tuple[np.ndarray, np.ndarray | None]] = iter(())
        if seen:
            # cut as `run_jobs` will: the engine remembers what it has encoded
            own = engine.motion_codes(np.stack([cut(job.frame.rgb, job.box, engine.size)[0] for job in seen]))
            codes = mouthed(own, [job.moment for job in seen], factors, speech, base, scale, extras)
        for job in batch:
            if job.box is None:
                yield job
            else:
                expression, pose = next(codes)
                yield replace(job, expression=expression, pose=pose)


def mouthed(
    own: np.ndarray, times: list[float], factors: Factors, speech: SpeechMotion, base: np.ndarray, scale: float,
    extras: Extras,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:  # fmt: skip
    """Expression codes (K,) and, where the head moves, pose codes. own: (N, K); what is not moved stays exactly."""
    said = np.stack([speech.at(moment) for moment in times])
    wanted = own.copy()
    wanted[:, POSE_DIM : POSE_DIM + len(base)] = base + scale * said[:, -1:] * said[:, :-1]
    mixed = factors.mix(own, {"mouth": (wanted, np.ones(len(own)))})
    for row, moment in enumerate(times):
        pose = None
        if extras.blink is not None:
            mixed[row, LIDS] += extras.blink(moment)
        if extras.pose is not None:
            pose = own[row].copy()
            pose[:POSE_DIM] += extras.pose(moment)
        yield mixed[row], pose


# Paste-back


class LowerFace:
    """Masks of the lower face, below the eyes, of a crop and its edit: (S, S) float32, exactly 0 above its soft border.

    `landmarks` gives MediaPipe's points; where it sees none, the mask is nothing and the frame stays the source's.
    """

    def __init__(self, landmarks: Landmarks, size: int):
        self.landmarks, self.size = landmarks, size
        self.steady = Steady(POINTS_SECONDS)
        self.window = gaussian_mask(size, 2 / 256, 6 / 256)
        self.x, self.y = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32))

    def __call__(self, crop: np.ndarray, face: np.ndarray, time: float, track: Any = 0) -> np.ndarray:
        """The mask for a source crop and its edit, both (S, S, 3) uint8; `time` in seconds."""
        shape = np.zeros((self.size, self.size), np.uint8)
        own = None
        for which, picture in (("source", crop), ("edit", face)):
            points = self.landmarks(picture)
            if points is not None:
                points = self.steady((which, track), time, np.asarray(points, np.float32)[:, :2])
                own = points if which == "source" else own
                cv2.fillConvexPoly(shape, cv2.convexHull(np.rint(points).astype(np.int32)), 1)
        if own is None:
            return np.zeros((self.size, self.size), np.float32)
        soft = cv2.GaussianBlur(shape.astype(np.float32), (0, 0), 0.025 * self.size)
        mask = soft * self.below_the_eyes(own) * self.window
        return np.where(mask < 1 / 512, 0, mask).astype(np.float32)

    def below_the_eyes(self, points: np.ndarray) -> np.ndarray:
        """From 0, well below the lower lids, to 1 at the height of the nose; whatever way the head leans."""
        left, right = (points[lid].mean(0) for lid in LOWER_LIDS)
        along = (right - left) / max(float(np.linalg.norm(right - left)), 1e-6)
        down = np.array([-along[1], along[0]])
        lowest = max(float((points[lid] @ down).max()) for lid in LOWER_LIDS)
        reach = max(float(points[LIPS_MIDDLE].mean(0) @ down) - lowest, 1.0)
        share = (self.x * down[0] + self.y * down[1] - lowest) / reach
        return ramp(share, BEGINS, FULL)
