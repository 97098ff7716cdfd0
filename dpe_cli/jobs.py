"""Jobs to edited frames: a source frame and what is asked of it go in, the frame with its edit comes out.

What depends on the frames before, reading, lending, following of colours, is done in order by the thread that asks for
frames; networks and the pixels of a frame go to threads of their own.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from operator import methodcaller
from typing import Any, Protocol, TypeVar

import numpy as np

from dpe_cli.control import Mixing, mixed
from dpe_cli.crop import cut
from dpe_cli.face import Box
from dpe_cli.lending import Lending
from dpe_cli.motion import Jitter
from dpe_cli.paste import Pasted, Paster, Seam, alone
from dpe_cli.pipeline import abreast, ended
from dpe_cli.report import PSNR_CEILING, FrameFate, Report
from dpe_cli.video import Frame

UNIT = 32  # frames: batches begin anew at each multiple, so that a part of a video gives the frames of the whole
NO_MASK = "nothing of the face found to paste back"
FINISHERS = max(1, min(4, (os.cpu_count() or 1) // 4))  # threads that paste: where cores are few, all are busy already

T = TypeVar("T")


class Engine(Protocol):
    """What an edit needs of the networks: uint8 in, uint8 out. N crops of S by S pixels, K numbers a code."""

    size: int
    batch_size: int  # crops at once that suit the device
    description: dict[str, Any]

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 -> (N, K) float32"""

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        """(N, S, S, 3) uint8, (N, K) float32 or None twice -> (N, S, S, 3) uint8

        One that measures landmarks (`lending_of`) has `read` too, and is given what that tells as a fourth argument;
        `carried`, which says of the three others how their faces were bent; and `turns`, of what was read and a pose.
        """

    def forget(self) -> None:
        """Lets go of what earlier crops left: from here on results depend on what comes alone."""

    def lanes(self) -> "contextlib.AbstractContextManager[Sequence[Engine]]":
        """Engines that may edit side by side, each in a thread; one alone is this one."""

    def shifts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, K) float32 -> what expression and pose add to a latent, (N, L) float32 twice; for motion files"""


@dataclass(frozen=True)
class Job:
    """One source frame and what is to be done with it: codes (K,), both None for a frame that is passed."""

    frame: Frame
    box: Box | None
    moment: float  # seconds since the first source frame, also the time in the driving
    reason: str | None = None  # why there is no edit, or whence the box
    expression: np.ndarray | None = None
    pose: np.ndarray | None = None
    mixing: Mixing | None = None  # what a control wants of the expression; `expression` then counts for nothing
    neutral: tuple[np.ndarray | None, np.ndarray | None] = (None, None)  # what they are relative to; None: absolute
    strength: float = 1.0
    score: float | None = None
    sampled: bool = False  # its self-reconstruction is measured
    track: int | None = None
    edit: int = 0  # which of the edits of this pass
    onto: np.ndarray | None = None  # the frame with the earlier edits; None: the source's
    shot: int = 0  # counted in this part of the source
    halo: bool = False  # outside the part that is made: done only for what it leaves to the frames after it

    @property
    def edited(self) -> bool:
        return self.expression is not None or self.pose is not None or self.mixing is not None


@dataclass(frozen=True)
class Work:
    """A batch of jobs, ready for the networks."""

    jobs: list[Job]
    crops: list[tuple[np.ndarray, np.ndarray] | None]  # of `cut`, None without a box
    chosen: list[int]  # jobs that are edited
    wanted: tuple = ()  # arguments of `Engine.edit` for them
    check: tuple = ()  # for those that are to be rebuilt with their own codes, which measures the networks


@dataclass(frozen=True)
class Drawn:
    """What a lane made of a batch."""

    rebuilt: list[float]  # PSNR of those of `check`
    faces: Sequence[np.ndarray] = ()  # edited crops of the `chosen`
    maps: Sequence[np.ndarray | None] = ()  # of `Engine.carried`
    turns: Sequence[float | None] = ()  # of `Engine.turns`


@dataclass(frozen=True)
class Part:
    """One frame of which only the pixels are left to be made, which depends on no other frame."""

    job: Job
    turn: float | None  # of `Engine.turns`
    make: Callable[[], Pasted]


def run_jobs(
    jobs: Iterable[Job], engine: Engine, paster: Paster | None, report: Report, crop_size: int | None = None
) -> Iterator[tuple[Job, Frame]]:
    """Edits in batches, in order, one frame out for each frame in; leaves each frame's fate in the report.

    Without a `paster` a frame is the crop alone, of `crop_size` pixels a side or as it is drawn. Networks round
    differently in batches of another size, so which frames share a batch follows from their numbers, wherever the jobs
    begin at a multiple of UNIT.
    """
    jitter = Jitter()
    with contextlib.ExitStack() as stack:  # the threads end before the lanes, whose end is felt by all of torch
        lanes = stack.enter_context(engine.lanes())
        drawers = [drawer(lane, engine) for lane in lanes]
        done = stack.enter_context(ended(abreast(prepared(jobs, engine), drawers)))
        finishers = [methodcaller("make")] * FINISHERS
        for part, made in stack.enter_context(ended(abreast(parts(done, paster, report, crop_size), finishers))):
            job = part.job
            frame = replace(job.frame, rgb=made.rgb, original=job.frame.original if paster else None)
            trembling = jitter_of(job, frame.rgb8, paster is not None, jitter)
            if not job.halo:
                report.frames.append(replace(fate_of(job, made.seam), jitter=trembling, turn=part.turn))
            yield job, frame


def parts(
    done: Iterable[tuple[Work, Drawn]], paster: Paster | None, report: Report, crop_size: int | None
) -> Iterator[Part]:
    """Frames of which only pixels are left to be made, out of edited crops: see `run_jobs` and `drawer`."""
    for work, drawn in done:
        each = (drawn.faces, drawn.maps, drawn.turns)
        faces, maps, turns = (dict(zip(work.chosen, of, strict=True)) for of in each)
        checked = zip((job for job in work.jobs if job.sampled and job.edited), drawn.rebuilt, strict=True)
        report.self_reconstruction += [(job.frame.index, quality) for job, quality in checked if not job.halo]
        for number, job in enumerate(work.jobs):
            rgb = job.frame.rgb if job.onto is None else job.onto
            if paster is None:
                own = work.crops[number][0]
                made = partial(alone, rgb, job.box, own, faces.get(number, own), maps.get(number), crop_size)
            elif number in faces:
                seen = float(job.frame.time), job.track, maps[number]
                placed = paster.place(rgb, job.box, work.crops[number][0], faces[number], *seen)
                made = placed.pasted
                if not placed.mask.any():  # the frame stays the source's, and the report says so
                    job, turns[number] = replace(job, expression=None, pose=None, mixing=None, reason=NO_MASK), None
            else:
                made = partial(Pasted, rgb, None)
            yield Part(job, turns.get(number), made)


def lending_of(engine: Engine) -> Lending | None:
    """What opens a source's eyes and mouth, None for an engine that measures no landmarks."""
    measured = getattr(engine, "measured", None)
    return Lending(engine.motion_codes, measured.face) if measured else None


def prepared(jobs: Iterable[Job], engine: Engine) -> Iterator[Work]:
    """Jobs in batches, after all that depends on what was before them: crops are read, eyes and mouths lent."""
    lending = lending_of(engine)
    for batch in batched_in_units(jobs, engine.batch_size):
        if batch[0].frame.index % UNIT == 0:
            engine.forget()
        crops = [None if job.box is None else cut(job.frame.rgb, job.box, engine.size) for job in batch]
        chosen = [number for number, job in enumerate(batch) if job.edited]
        asked = ()
        if chosen:
            stack = np.stack([crops[number][0] for number in chosen])
            asked = ask([batch[number] for number in chosen], stack, engine, lending)
        yield Work(batch, crops, chosen, *asked)


def ask(jobs: list[Job], crops: np.ndarray, engine: Engine, lending: Lending | None) -> tuple[tuple, tuple]:
    """What (N, S, S, 3) uint8 source crops are to become, and how they are checked: see `Work`."""
    expression = None if jobs[0].expression is None else np.stack([job.expression for job in jobs])
    pose = None if jobs[0].pose is None else np.stack([job.pose for job in jobs])
    sampled = np.array([job.sampled for job in jobs])
    strength, neutral = np.array([job.strength for job in jobs], np.float32), jobs[0].neutral
    absolute = all(base is None for base in neutral)
    mixings = [job.mixing for job in jobs if job.mixing is not None]  # all of them or none
    own = None if absolute and (strength == 1).all() and not mixings else engine.motion_codes(crops)

    def arguments(crops: np.ndarray, *codes: np.ndarray | None) -> tuple:
        return (crops, *codes, engine.read(crops)) if lending else (crops, *codes)

    check = ()
    if sampled.any():
        own_sampled = own[sampled] if own is not None else engine.motion_codes(crops[sampled])
        roles = [None if codes is None else own_sampled for codes in (mixings or expression, pose)]
        check = arguments(crops[sampled], *roles)
    pairs = zip((expression, pose), neutral, strict=True)
    expression, pose = (towards(own, codes, strength, base) for codes, base in pairs)
    expression = mixed(own, mixings) if mixings else expression
    if lending and expression is not None:
        times, whose = [float(job.frame.time) for job in jobs], [(job.track, job.shot) for job in jobs]
        crops = lending(crops, expression, times, whose)
    return arguments(crops, expression, pose), check


def drawer(lane: Engine, engine: Engine) -> Callable[[Work], Drawn]:
    """What a lane of an engine does with a batch.

    A lane that is not the engine itself begins anew at each multiple of UNIT, as that does in `prepared`.
    """
    unit = None

    def draw(work: Work) -> Drawn:
        nonlocal unit
        unit, before = work.jobs[0].frame.index // UNIT, unit
        if lane is not engine and unit != before:
            lane.forget()
        rebuilt = zip(lane.edit(*work.check), work.check[0], strict=True) if work.check else ()
        quality = [psnr(*pair) for pair in rebuilt]
        if not work.wanted:
            return Drawn(quality)
        faces = lane.edit(*work.wanted)
        if not lending_of(lane):
            return Drawn(quality, faces, [None] * len(faces), [None] * len(faces))
        _, _, pose, told = work.wanted
        return Drawn(quality, faces, lane.carried(*work.wanted[:3]), lane.turns(told, pose))

    return draw


def towards(
    own: np.ndarray | None, driving: np.ndarray | None, strength: np.ndarray, neutral: np.ndarray | None = None
) -> np.ndarray | None:
    """Motion codes (N, K) between the source's own (strength (N,) 0) and the driving's (1), or past it.

    The decoder replaces the motion that the source latent holds, so keeping it means sending the frame's own code. With
    a neutral code (K,) the motion is relative: what the driving differs from it by is added to the source's own.
    """
    if own is None or driving is None:
        return driving
    share = strength[:, None]
    if neutral is not None:
        return own + share * (driving - neutral)
    return np.where(share == 1, driving, own + share * (driving - own))  # all of it is exact, whatever the batch


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB, at most PSNR_CEILING."""
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return PSNR_CEILING if error == 0 else min(PSNR_CEILING, float(10 * np.log10(255**2 / error)))


def fate_of(job: Job, seam: Seam | None) -> FrameFate:
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
        strength=job.strength if job.edited else None,
        track=job.track,
        edit=job.edit,
        **({} if seam is None else seam.rounded()),
    )


def jitter_of(job: Job, result: np.ndarray, pasted: bool, jitter: Jitter) -> float | None:
    """This frame's jitter, see there. `result` is the whole frame if `pasted`, else the crop."""
    if not job.edited:
        return jitter.forget()
    top, bottom, left, right = (max(0, round(edge)) for edge in (job.box.y0, job.box.y1, job.box.x0, job.box.x1))
    codes = [code for code in (job.expression, job.pose) if code is not None]
    codes += job.mixing.codes if job.mixing else []
    return jitter.step(job.frame.rgb8, (slice(top, bottom), slice(left, right)), result, pasted, codes, job.strength)


def batched_in_units(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Lists of at most `size` jobs, none of which goes past a multiple of UNIT."""
    batch: list[Job] = []
    for job in jobs:
        batch.append(job)
        if len(batch) == size or (job.frame.index + 1) % UNIT == 0:
            yield batch
            batch = []
    if batch:
        yield batch


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (itertools.batched comes with Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
