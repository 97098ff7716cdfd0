"""`dpe eval --protocol dub`: how well the speech networks move mouths and heads of people they were not trained on.

Numbers are on motion: coordinates, and lip points that follow from them linearly, against the measured ones of each
clip. Of every clip the first half tells what the person's mouth usually does, and LMD is of the second half. Of some
clips the first frame is made to speak, and the opening is measured in the pictures.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dpe_cli import metrics
from dpe_cli.crop import cut
from dpe_cli.jobs import Engine, batched
from dpe_cli.landmark_net import framing
from dpe_cli.landmarks import mouth_opening
from dpe_cli.models import SpeechNets
from dpe_cli.motion_space import POSE_DIM, POSE_SCALE
from dpe_cli.speech import GRID
from dpe_cli.speech_motion import Person, PoseMotion
from dpe_cli.train_speech import PAD, Talk, whole

SYSTEMS = ("dub", "constant mean", "own mean", "shuffled speech", "true motion")
STYLES = 4  # of heads, that are compared for diversity


@dataclass(frozen=True)
class Judged:
    """One clip under one system; lags in motion frames, LMD in percent of the outer eye corners' distance."""

    lag: float
    within_one: float  # 1 where the lag is at most one frame
    correlation: float  # of the mouth's opening with the true one
    range: float  # its spread over the true one's
    lmd: float
    sync_offset: float
    sync_within_one: float
    sync_confidence: float


def evaluate_dub(
    nets: SpeechNets, talks: list[Talk], engine: Engine | None = None, landmarks: Any = None, drawn: int = 0,
    frames: int = 50,
    progress: Callable[[Iterable, int | None, str], Iterator] = lambda items, total, what: iter(items),
) -> dict[str, Any]:  # fmt: skip
    """Mean numbers of each system, ready for JSON. talks: of held-out people.

    The systems: ours; the mean of all training clips; the mean of the clip's own first half; ours, hearing another
    clip; and the clip's own coordinates, which is what a perfect network would give.
    """
    speech = [predicted(nets, talk, talk) for talk in progress(talks, len(talks), "hearing")]
    mean = nets.mean_mouth.numpy()
    table: dict[str, dict[str, float]] = {}
    each: dict[str, list[dict[str, Any]]] = {}
    for system in SYSTEMS:
        rows = []
        for number, talk in enumerate(talks):
            count = len(talk)
            other = talks[(number + len(talks) // 2) % len(talks)]
            mouth = {
                "dub": lambda: speech[number],  # noqa: B023 - called at once
                "constant mean": lambda: np.repeat(mean[None], count, 0),  # noqa: B023
                "own mean": lambda: np.repeat(usual_of(talk)[None], count, 0),  # noqa: B023
                "shuffled speech": lambda: np.resize(predicted(nets, other, talk), (count, len(mean))),  # noqa: B023
                "true motion": lambda: talk.mouth,  # noqa: B023
            }[system]()
            rows.append(asdict(judge(nets, talk, mouth)))
        table[system] = {key: average(row[key] for row in rows) for key in rows[0]}
        each[system] = [{"clip": talk.name, **row} for talk, row in zip(talks, rows, strict=True)]
    summary = {
        "clips": len(talks), "identities": len({talk.identity for talk in talks}),
        "seconds": round(sum(map(len, talks)) / GRID, 1), "mouth": table, "heads": heads(nets, talks), "each": each,
    }  # fmt: skip
    if engine is not None and drawn:
        pairs = list(zip(talks, speech, strict=True))[:drawn]
        found = [draw(engine, landmarks, *pair, frames) for pair in progress(pairs, len(pairs), "drawing")]
        summary["drawn"] = {key: average(row[key] for row in found) for key in found[0]}
    return summary


def average(values: Iterable[float]) -> float | None:
    """Mean of those that are numbers, rounded; None without any."""
    known = [value for value in values if np.isfinite(value)]
    return round(float(np.mean(known)), 4) if known else None


# Mouths


def usual_of(talk: Talk) -> np.ndarray:
    """What the first half of a clip says of the person's mouth in speech. (8,)"""
    return np.median(talk.mouth[: len(talk) // 2], 0)


@torch.inference_mode()
def predicted(nets: SpeechNets, heard: Talk, seen: Talk) -> np.ndarray:
    """The mouth of the person in one clip, saying what is said in another. (n, 8)"""
    spread = seen.mouth[: len(seen) // 2].std(0)
    person = Person(seen.closed, usual_of(seen), spread)
    return nets.expression(whole(heard, nets.config.reach), *person.tensors())[0].numpy()


@torch.inference_mode()
def judge(nets: SpeechNets, talk: Talk, mouth: np.ndarray) -> Judged:
    """The numbers of one clip. mouth: (n, 8) from the closed mouth."""
    opening = mouth @ nets.aperture.numpy()
    lag = metrics.best_lag(opening, talk.opening) if opening.std() > metrics.STILL else float("nan")
    sound = nets.sync.hear(whole(talk, 0))[0].numpy()
    motion = nets.sync.watch(torch.from_numpy(mouth.astype(np.float32))[None])[0].numpy()
    offset, confidence = metrics.sync_offset(sound, motion)
    half = len(talk) // 2
    return Judged(
        lag, float(abs(lag) <= 1) if np.isfinite(lag) else float("nan"), metrics.correlation(opening, talk.opening),
        metrics.spread_ratio(opening, talk.opening), float(landmark_distance(nets, talk, mouth)[half:].mean()),
        offset, float(abs(offset) <= 1), confidence,
    )  # fmt: skip


def landmark_distance(nets: SpeechNets, talk: Talk, mouth: np.ndarray) -> np.ndarray:
    """Mean distance of lip points seen from the front, percent of the outer eye corners' distance. (n,)"""
    lips = talk.closed_lips + np.tensordot(mouth, nets.lips.numpy(), 1)
    return 100 * np.linalg.norm((lips - talk.lips)[..., :2], axis=-1).mean(1)


# Heads


def heads(nets: SpeechNets, talks: list[Talk]) -> dict[str, Any]:
    """Generated head motion beside the true one: spread in degrees, diversity, its nearness to speech's beats."""
    made = [[head(nets, talk, style) for style in range(STYLES)] for talk in talks]
    true = [talk.pose for talk in talks]
    sounds = [metrics.beats(rises(talk)) for talk in talks]

    def spread(poses: list[np.ndarray]) -> list[float]:
        return np.round(np.mean([pose.std(0)[:3] * POSE_SCALE[:3] for pose in poses], 0), 2).tolist()

    def aligned(poses: list[np.ndarray], heard: list[np.ndarray]) -> float | None:
        return average(metrics.beat_alignment(metrics.beats(speed(p)), h) for p, h in zip(poses, heard, strict=True))

    pairs = [(a, b) for styles in made for number, a in enumerate(styles) for b in styles[:number]]
    first = [styles[0] for styles in made]
    return {
        "yaw_pitch_roll_spread_degrees": {"generated": spread(first), "true": spread(true)},
        "speed_degrees_a_frame": {name: average(speed(p).mean() for p in poses)
                                  for name, poses in (("generated", first), ("true", true))},
        "diversity_degrees": average(np.abs((a - b)[:, :3] * POSE_SCALE[:3]).mean() for a, b in pairs),
        "beat_alignment": {
            "generated": aligned(first, sounds), "true": aligned(true, sounds),
            "generated, shuffled speech": aligned(first, shifted(sounds, talks)),
        },
    }  # fmt: skip


def head(nets: SpeechNets, talk: Talk, style: int) -> np.ndarray:
    """A generated head for a clip's speech. (n, 6)"""

    def hear(frame: int, frames: int) -> torch.Tensor:
        first = PAD + frame * 16 // 5 - 8
        columns = np.full((frames * 16 // 5 + 16, talk.mel.shape[1]), -4, np.float32)
        inside = talk.mel[max(first, 0) : first + len(columns)]
        columns[max(-first, 0) :][: len(inside)] = inside
        return torch.from_numpy(columns.T.copy())[None]

    motion = PoseMotion(hear, nets, style, seed=style)
    return np.stack([motion.at(frame / GRID) for frame in range(len(talk))])


def speed(pose: np.ndarray) -> np.ndarray:
    """How fast a head turns, degrees a frame. (n, 6) -> (n,)"""
    return np.linalg.norm(np.gradient(pose[:, :3] * POSE_SCALE[:3], axis=0), axis=1)


def rises(talk: Talk) -> np.ndarray:
    """How fast the speech becomes louder, at each motion frame. (n,)"""
    level = np.convolve(talk.mel.mean(1), np.ones(6) / 6, "same")
    frames = PAD + np.arange(len(talk)) * 3.2
    level = np.interp(frames, np.arange(len(level)), level)
    return np.maximum(np.gradient(level), 0)


def shifted(sounds: list[np.ndarray], talks: list[Talk]) -> list[np.ndarray]:
    """Each clip with the beats of another, as far as it lasts."""
    half = len(sounds) // 2
    return [beat[beat < len(talk)] for beat, talk in zip(sounds[half:] + sounds[:half], talks, strict=True)]


# Pictures


def draw(engine: Engine, landmarks: Any, talk: Talk, mouth: np.ndarray, frames: int) -> dict[str, float]:
    """What is seen of the mouth's opening in `frames` pictures that the engine drew, all of the clip's first frame: in
    later ones the true mouth could be seen."""
    first = np.load(talk.path.with_suffix(".npy"), mmap_mode="r")[talk.rows[0]]
    with np.load(talk.path) as data:
        box = framing(data["points"][talk.rows[0]])
    crop = cut(np.asarray(first), box, engine.size)[0][None]
    codes = np.repeat(engine.motion_codes(crop), min(frames, len(talk)), 0)
    codes[:, POSE_DIM : POSE_DIM + mouth.shape[1]] = talk.closed + mouth[: len(codes)]
    pictures = (
        picture
        for batch in batched(codes, engine.batch_size)
        for picture in engine.edit(np.repeat(crop, len(batch), 0), np.stack(batch), None)
    )
    faces = [landmarks.detect(picture) for picture in pictures]
    seen = np.array([np.nan if face is None else mouth_opening(face.points) for face in faces])
    true = talk.opening[: len(seen)]
    return {
        "correlation": metrics.correlation(seen, true),
        "range": metrics.spread_ratio(seen, true),
        "within_one": float(abs(metrics.best_lag(seen, true)) <= 1),
    }
