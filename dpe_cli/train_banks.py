"""Factor banks by PD-FGC's progressive signals (arXiv 2211.14506) in DPE's expression space.

What a driving shares with an edit is told by pictures in which one part of the face is another frame's: X shows frame a
with b's mouth (PD-FGC has such an anchor for the eyes, EDTalk for the mouth). A bank is B a(code): a few directions B
of the expression and as many linear heads a. Of frames a, b and X, which has b's part, and X' with another part, it
is asked for

    B a(b - a) = X - a     what goes over to X is what the part is: X is reconstructed, from a as from b
    a(X - b) = 0           the code of the part is the donor's, whoever the host is
    a(X' - a) = 0          another part that changes hands does not count

Codes and expression shifts are affine in each other, so this is linear least squares on codes (those that the
expression head looks at, whitened by their covariance inside clips): no steps, no rate, no seed. Banks are fitted in
the paper's order, mouth, eyes, brows, each on what the ones before it leave. A direction that comes over by less than
half is left out.

In the end all heads are solved for together, so that banks are orthogonal to each other's heads: what one bank adds the
others do not read, and it reads itself in full (least squares alone would shrink it, as codes are noisy). Directions
that are orthogonal in the shifts themselves, one QR over all banks as EDTalk has it, were tried and told eyes and brows
apart worse than no fit. The rest is the complement: all banks at strength one are the full transfer.

That is what codes say. The generator, which is not trained, judges last (`held_still`): a bank is changed by the least
that lets pictures show all of a driving's own measures and none of the others'.

Inside the eyes' bank linear read-outs of the lids' opening and of the irises part blink from gaze.

Lips are what sound tells of the mouth's bank. The paper learns them by contrast: sound and mouth of one moment go
together, of different moments they do not. With linear read-outs of both, that is canonical correlation inside clips,
whose means stand for the wrong moments. The likeliest change of the codes with these heads are the lips; what is left
of the mouth is uncorrelated with them.

Emotion is what is left then (the paper's self-reconstruction gives it that), uncorrelated with lips (its
decorrelation), and slow (its averages over a window). What is left of the mouth becomes mood, a part of emotion, if
more of it than of the lips stays for a window of half a clip; else the mouth stays whole. Choosing the directions that
last longest, in place of all or none, was tried: our clips have a few seconds, and what they chose told held-out
people's emotions worse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpe_cli.landmarks import rotation_between
from dpe_cli.speech import COLUMNS
from dpe_cli.train_speech import PAD, columns_of


@dataclass(frozen=True)
class Part:
    """What is transplanted: a region of `regions`, less another; and the names of its measures."""

    region: str
    spared: str | None
    measures: tuple[str, ...]


PARTS = {
    "mouth": Part("lower", None, ("mouth_open", "mouth_width", "smile")),
    "eyes": Part("eyes", None, ("blink", "gaze_x", "gaze_y")),
    "brows": Part("upper", "eyes", ("brow_raise",)),
}  # in the order of the fit
RIDGE = 0.03  # of the codes' mean square
LOOSE = 0.03  # of the answers' mean square
HEARD = 16  # mel columns each way of a frame, of 80 a second
SOUND_RIDGE = 0.3  # of the mean square of what is heard
FOLDS = 5  # of people, who are read by what was learnt on the others
TOLD = 0.05  # of a head's variance, at least: what sound tells of people it does not know
FOLLOWED = 0.5  # of a direction, at least: what comes over with the part
TURN = 4.0  # degrees between two heads up to which a part fits the other face; each more counts like 0.15 sigma less


@dataclass(frozen=True)
class Transplants:
    """Motion codes of P pictures with a part of another frame of the same clip."""

    host: np.ndarray  # (P, K)
    donor: np.ndarray  # (P, K)
    mixed: np.ndarray  # (P, K)


def choose_pair(measures: np.ndarray, rotations: np.ndarray, sigma: np.ndarray) -> tuple[int, int]:
    """Host and donor among the frames of a clip: far apart in a part's measures, near in pose.

    measures: (N, M) of the part; rotations: (N, 3, 3); sigma: (M,) their spread. N is two or more.
    """
    apart = (np.abs(measures[:, None] - measures) / sigma).mean(-1)
    turn = rotation_between(rotations[:, None], rotations)
    score = apart - 0.15 * np.maximum(turn - TURN, 0)
    np.fill_diagonal(score, -np.inf)
    host, donor = np.unravel_index(score.argmax(), score.shape)
    return int(host), int(donor)


def fit_banks(
    codes: np.ndarray, transplants: Mapping[str, Transplants], alive: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Projectors (K, K) by part of PARTS.

    codes: (N, K), differences within clips; transplants: by part, all of PARTS; alive: (R, K) orthonormal rows, the
    directions of a code that the expression head looks at, by default all.
    """
    alive = np.eye(codes.shape[1]) if alive is None else alive
    covariance = alive @ (codes.T @ codes / len(codes)) @ alive.T
    spread = np.linalg.cholesky(covariance + np.diag(1e-3 * np.diag(covariance) + 1e-12))
    whiten = np.linalg.inv(spread) @ alive
    spread = alive.T @ spread
    size = len(alive)
    white = {name: [rows @ whiten.T for rows in (one.host, one.donor, one.mixed)] for name, one in transplants.items()}
    done, directions, heads = np.zeros((size, size)), {}, []
    for name in PARTS:
        host, donor, mixed = white[name]
        asked = [(donor - host, mixed - host), (mixed - host, mixed - host), (mixed - donor, 0 * host)]
        asked += [(x - a, 0 * a) for other, (a, _, x) in white.items() if other != name]
        given, wanted = (np.concatenate(rows) for rows in zip(*asked, strict=True))
        square = given.T @ given / len(given)
        square += RIDGE * np.trace(square) / size * np.eye(size)
        bank = np.linalg.solve(square, given.T @ wanted / len(given)).T @ (np.eye(size) - done)
        left, followed, _ = np.linalg.svd(bank)
        own = left[:, : max(1, (followed >= FOLLOWED).sum())]
        head = own.T @ bank
        done = done + own @ np.linalg.solve(head @ own, head)
        directions[name] = own
        heads.append(head)
    together, joint = np.hstack(list(directions.values())), np.vstack(heads)
    joint = np.linalg.solve(joint @ together, joint)
    banks, first = {}, 0
    for name, own in directions.items():
        banks[name] = spread @ own @ joint[first : first + own.shape[1]] @ whiten
        first += own.shape[1]
    return banks


def held_still(
    banks: Mapping[str, np.ndarray], answer: Mapping[str, np.ndarray], covariance: np.ndarray
) -> dict[str, np.ndarray]:
    """Banks (K, K) by part that move what pictures show of their part, in full, and of the others nothing.

    answer: (K,) by measure of PARTS, how much pictures change with a code, in standard deviations of the measure;
    covariance: (K, K) of codes, in whose metric the change is the least. What pictures hardly show is not held.
    """
    owner = {measure: name for name, part in PARTS.items() for measure in part.measures}
    rows = np.stack([answer[measure] for measure in owner])
    strength = rows @ covariance @ rows.T
    loose = LOOSE * np.trace(strength) / len(strength) + 1e-12
    back = covariance @ rows.T @ np.linalg.inv(strength + loose * np.eye(len(strength)))
    own = {name: np.array([owner[measure] == name for measure in owner])[:, None] for name in banks}
    return {name: bank + back @ (own[name] * rows - rows @ bank) for name, bank in banks.items()}


def part_lids(codes: np.ndarray, seen: np.ndarray, bank: np.ndarray) -> dict[str, np.ndarray]:
    """The eyes' bank (K, K) as blink, which moves the lids' opening and not the irises, and gaze, what is left of it.

    codes: (N, K), what it takes of them; seen: (N, 3), opening and where the irises are; all differences within clips.
    """
    whiten = whitening(codes)
    read = seen.T @ codes @ whiten.T @ whiten / len(codes)
    axes = codes.T @ (codes @ read.T) / len(codes)
    axes = axes @ np.linalg.pinv(read @ axes)  # the likeliest change that moves one reading and no other
    blink = np.outer(axes[:, 0], read[0]) @ bank
    return {"blink": blink, "gaze": bank - blink}


# Lips: what sound tells of the mouth


def has_sound(path: Path) -> bool:
    """Whether a prepared clip has its sound."""
    with np.load(path) as file:
        return {"times", "sound"} <= set(file)


def sound_about(clip: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
    """What is heard 0.2 s before and after each of N moments: log-mel spectra in 20 bands and steps of 0.05 s, less the
    mean spectrum of a second each way, which is the voice and the room. (N, F)"""
    columns = columns_of(clip, times[0], int(np.ceil((times[-1] - times[0]) * COLUMNS)) + 1)
    places = PAD + np.round((times - times[0]) * COLUMNS).astype(int)
    rows = []
    for place in places:
        near = columns[place - HEARD : place + HEARD].reshape(HEARD // 2, 4, -1, 4).mean((1, 3))
        usual = columns[place - COLUMNS : place + COLUMNS].mean(0).reshape(-1, 4).mean(1)
        rows.append((near - usual).ravel())
    return np.array(rows, np.float64)


def read_of_sound(sound: np.ndarray, codes: np.ndarray, person: np.ndarray) -> np.ndarray:
    """What sound says of codes, by ridge regression on the other people. (N, F), (N, K), (N,) int -> (N, K)"""
    found, folds = np.zeros_like(codes), person % FOLDS
    for fold in range(FOLDS):
        known, asked = sound[folds != fold], sound[folds == fold]
        found[folds == fold] = asked @ ridge(known, codes[folds != fold])
    return found


def ridge(sound: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(F, K) that reads codes (N, K) from what is heard (N, F)."""
    square = sound.T @ sound
    square += (SOUND_RIDGE * np.trace(square) / len(square) + 1e-12) * np.eye(len(square))
    return np.linalg.solve(square, sound.T @ codes)


def told_by_sound(codes: np.ndarray, heard: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Heads (k, K) of what sound tells of the mouth: PD-FGC's contrast of the right moment with wrong ones.

    codes: (N, K), what the mouth's bank takes; heard: (N, K), what was read of them from the sound, by a reader that
    did not know the person; both are differences within clips, which takes out the mean over all moments of a clip, the
    wrong ones. clip: (N,) int. A head counts of whose variance sound tells TOLD or more at the right moment, and more
    than of any at a wrong one, half a clip away. k may be 0.
    """
    whiten = whitening(codes)
    right, wrong = (whiten @ one.T @ codes @ whiten.T / len(codes) for one in (heard, heard[half_away(clip)]))
    told, directions = np.linalg.eigh((right + right.T) / 2)
    chance = np.linalg.eigvalsh((wrong + wrong.T) / 2)[-1]
    return directions[:, told >= max(chance, TOLD)].T[::-1] @ whiten


def moments_told(codes: np.ndarray, heard: np.ndarray, clip: np.ndarray) -> tuple[float, float, float]:
    """How heads go with what sound says of them: correlation at the right moment, the same half a clip away, and the
    share of all wrong moments of a clip, in whole frames, that go with it less than the right one (chance: 0.5).

    codes, heard: (N, k), of unit variance, differences within clips.
    """
    right, wrong = (float((codes * one).sum() / np.sqrt((codes**2).sum() * (one**2).sum() + 1e-12))
                    for one in (heard, heard[half_away(clip)]))  # fmt: skip
    won = []
    for one in np.unique(clip):
        seen, told = codes[clip == one], heard[clip == one]
        scores = [float((seen * np.roll(told, step, axis=0)).sum()) for step in range(len(seen))]
        won += [score < scores[0] for score in scores[1:]]
    return right, wrong, float(np.mean(won)) if won else 0.5


def half_away(clip: np.ndarray) -> np.ndarray:
    """For each row that which lies half a clip later, or earlier; rows of a clip lie together. (N,) int"""
    places = np.arange(len(clip))
    return np.concatenate([np.roll(places[clip == one], np.count_nonzero(clip == one) // 2) for one in np.unique(clip)])


# Mood: what lasts


def lasts(codes: np.ndarray, window: np.ndarray, person: np.ndarray, turn: np.ndarray) -> float:
    """Share of what codes (N, K) change by from window to window of a person that stays within a window."""
    inside, across = apart(codes, window, person, turn)
    return float(1 - np.trace(inside) / max(np.trace(across), 1e-12))


def apart(codes: np.ndarray, window: np.ndarray, person: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared differences (K, K) of two frames of one window, and of two windows of one person.

    window, person: (N,) int. turn: (N, 3), the head's angles, which last too: what goes with them is taken out. People
    count by their frames; identity cancels.
    """
    own, turn = centred(codes, person), centred(turn, person)
    free = own - turn @ np.linalg.lstsq(turn, own, rcond=None)[0]
    inside, across, count = np.zeros((codes.shape[1],) * 2), np.zeros((codes.shape[1],) * 2), 0
    for one in np.unique(person):
        rows = np.flatnonzero(person == one)
        first, second = np.triu_indices(len(rows), 1)
        change = free[rows[first]] - free[rows[second]]
        same = window[rows[first]] == window[rows[second]]
        if 0 < same.sum() < len(same):
            inside += len(rows) * change[same].T @ change[same] / same.sum()
            across += len(rows) * change[~same].T @ change[~same] / (~same).sum()
            count += len(rows)
    return inside / max(count, 1), across / max(count, 1)


def centred(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Differences to the group's mean. (N, C), (N,) int -> (N, C)"""
    counts = np.bincount(group)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, group, values)
    return values - (sums / np.maximum(counts, 1)[:, None])[group]


def whitening(codes: np.ndarray) -> np.ndarray:
    """(K, K) that brings codes (N, K) to unit covariance, those that hardly vary to less."""
    covariance = codes.T @ codes / len(codes)
    loaded = covariance + RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.inv(np.linalg.cholesky(loaded))


def likeliest(codes: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Projector (K, K) on the likeliest change with what heads (k, K) read; what it leaves does not go with them."""
    axes = codes.T @ (codes @ heads.T) / len(codes)
    return axes @ np.linalg.pinv(heads @ axes) @ heads
