"""What a source does not show of itself: shut eyes and shut mouths that are to be open.

Behind shut lids there is no eye in the picture and behind shut lips there are no teeth; warping what is in front of
them aside smears it. In a video the same eyes and the same mouth were open a moment before, so their pixels are put in
the place of the shut ones, and the networks edit that crop. Where there is no such moment, the eyes stay shut
(`drawable`) and the networks paint a plain inside of a mouth.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpe_cli.landmarks import FaceShape
from dpe_cli.motion_space import COORDINATES
from dpe_cli.regions import PARTS, transplant

LIDS, GAZE, TURN, MOUTH = (COORDINATES[name] for name in ("lids", "gaze", "turn", "mouth"))
SHUT, AJAR = -1.6, -0.9  # of the lids' coordinates: blendshape eyeBlink at 0.45 and 0.25
WIDER = 0.5  # of the lids' coordinates: what the asked eyes are more open than the source's, or these are left as is
HALF = 0.8  # of the lids' coordinates: so much less than a moment before, eyes are on their way to be shut
OPENING = np.array([-0.0734, -0.0308])  # of a mouth, by its first two coordinates
# Of 2800 codes of 40 people none had a mouth or lids more shut than these.
SHUTTEST, TIGHTEST = -0.031, -2.7
PARTED = 0.04  # of a mouth's opening: what the asked one is more open than the source's, a lent one by half of it, and
# at most less than the asked one: what has to open further is painted over, and teeth painted over teeth are smears
INSIDE_SHOWN = 0.5  # share of the asked opening from which the source's own mouth shows enough of its inside
LATELY = 0.3  # seconds: what it showed in half of them counts too, or the inside would come and go from frame to frame
BACK = 2.0  # seconds for which moments are remembered; a blink lasts 0.1 to 0.4, a pause between words longer
LIT = 40.0  # levels: what was lit so much otherwise, as by a flash, is not shown
TURNED = 0.6  # of the coordinates of the head's turn, 6 to 9 degrees: parts of another view do not fit

HIDDEN, SEEN = 0.5, 0.9  # visibility of a part's outline, mean: below it something stands before it; above it nothing

Look = Callable[[np.ndarray], FaceShape | None]  # a crop (S, S, 3) uint8 to its landmarks in pixels, or None


def drawable(asked: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The codes asked for, less what cannot be drawn: eyes that the source keeps shut are not opened.

    Closing is not limited. asked, own: (N, 20) measured codes. -> (N, 20)
    """
    open_by = np.clip((own[:, LIDS] - SHUT) / (AJAR - SHUT), 0, 1)
    open_by = open_by * open_by * (3 - 2 * open_by)  # smooth in time
    result = asked.copy()
    result[:, LIDS] -= (1 - open_by) * np.maximum(asked[:, LIDS] - own[:, LIDS], 0)
    return result


def possible(asked: np.ndarray) -> np.ndarray:
    """The codes asked for, less what no face does: lips and lids that are more than shut, and would cross and tear.

    Such codes come of strengths above 1. Others are given back as they are. asked: (N, 20) measured codes -> (N, 20)
    """
    mouths = np.array([mouth_of(code) for code in asked])
    result = asked.copy()
    lacking = np.maximum(SHUTTEST - mouths, 0)[:, None]
    result[:, MOUTH][:, :2] += (lacking * OPENING / (OPENING @ OPENING)).astype(asked.dtype)
    result[:, LIDS] = np.maximum(result[:, LIDS], TIGHTEST)
    return result


def in_sight(face: FaceShape, region: str) -> float:
    """How much of the eyes or the lips is in sight, 0 where a hand or a microphone is before them, to 1."""
    if face.visibility is None:
        return 1.0
    outline = face.visibility[np.concatenate(PARTS[region])].mean()
    return float(np.clip((outline - HIDDEN) / (SEEN - HIDDEN), 0, 1))


def where_seen(asked: np.ndarray, own: np.ndarray, faces: Sequence[FaceShape | None]) -> np.ndarray:
    """The codes asked for, less what is asked of parts that something hides: it would be bent, and painted over.

    asked, own: (N, 20) measured codes; faces: of the crops that have the own ones. -> (N, 20)
    """
    result = asked.copy()
    for row, face in enumerate(faces):
        for region, parts in (("lips", [MOUTH]), ("eyes", [LIDS, GAZE])):
            share = 1.0 if face is None else in_sight(face, region)
            for part in parts if share < 1 else ():
                result[row, part] = own[row, part] + share * (asked[row, part] - own[row, part])
    return result


def mouth_of(code: np.ndarray) -> float:
    """A mouth's opening as its code tells it: inner-lip gap over the distance of the outer eye corners.

    Least squares on clips that were trained on; on others it explains 0.92 of the variance. code: (20,) measured.
    """
    return float(0.104 + OPENING @ code[MOUTH][:2])


def opens(own: np.ndarray, asked: np.ndarray) -> float:
    """How surely a mouth is to be more open than it is, 0 to 1: what is inside of it is not seen then. (20,) twice"""
    return float(np.clip((mouth_of(asked) - mouth_of(own) - PARTED) / PARTED, 0, 1))


@dataclass
class Moment:
    """A moment of a video."""

    time: float
    crop: np.ndarray  # (S, S, 3) uint8
    code: np.ndarray  # (20,) measured
    asked: np.ndarray  # (20,) that it was to have
    seen: tuple[FaceShape | None] | None = None  # its landmarks, once they have been looked for

    @cached_property
    def light(self) -> np.ndarray:
        """(3,) levels, of the middle of its crop."""
        size = len(self.crop)
        return np.median(self.crop[size // 4 : -size // 4 : 4, size // 4 : -size // 4 : 4], (0, 1))

    @cached_property
    def shown(self) -> float:
        """The mouth's opening over the one that was asked for."""
        return mouth_of(self.code) / max(mouth_of(self.asked), 1e-3)

    def face(self, look: Look) -> FaceShape | None:
        """Its landmarks: a blink asks for them in each of its frames."""
        if self.seen is None:
            self.seen = (look(self.crop),)
        return self.seen[0]


class Lending:
    """Gives crops of a video, in the order of time, the eyes and the mouth of a moment before in which they were open.

    A result depends on the BACK seconds before a crop alone.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], look: Look):
        """read: crops (N, S, S, 3) uint8 to their measured codes (N, 20)."""
        self.read, self.look = read, look
        self.moments: dict[Hashable, list[Moment]] = {}  # of the last BACK seconds, oldest first

    def __call__(
        self, crops: np.ndarray, asked: np.ndarray, times: Sequence[float], whose: Sequence[Hashable]
    ) -> np.ndarray:
        """The crops, some with other eyes or another mouth.

        crops: (N, S, S, 3) uint8; asked: the codes that they are to have, (N, 20); times: seconds; whose: what is
        different for another face or another shot. -> (N, S, S, 3) uint8
        """
        result = list(crops)
        for row, (crop, code, time, who) in enumerate(zip(crops, self.read(crops), times, whose, strict=True)):
            recent = {one: [moment for moment in of if time - moment.time <= BACK] for one, of in self.moments.items()}
            self.moments = {one: of for one, of in recent.items() if of}
            now, before = Moment(time, crop.copy(), code, asked[row]), self.moments.setdefault(who, [])
            fitting = [one for one in before if np.abs(code - one.code)[TURN].max() <= TURNED]
            fitting = [one for one in fitting if np.abs(now.light - one.light).max() <= LIT]
            lately = [one.shown for one in (*before, now) if time - one.time <= LATELY]
            shown = min(now.shown, float(np.median(lately)))
            for region, lender in (
                ("eyes", open_eyes(code, asked[row], fitting)),
                ("lips", open_mouth(code, asked[row], fitting, shown)),
            ):
                if lender is not None:
                    result[row] = self.lent(result[row], now, lender, region)
            before.append(now)
        return np.stack(result)

    def lent(self, crop: np.ndarray, now: Moment, lender: Moment, region: str) -> np.ndarray:
        """A crop with a region of another moment; itself where that is not seen in one of them."""
        faces = now.face(self.look), lender.face(self.look)
        if any(face is None or in_sight(face, region) < 1 for face in faces):
            return crop
        here, there = (face.points for face in faces)
        return transplant(crop, lender.crop, here, there, region, lit=True)


def open_eyes(code: np.ndarray, asked: np.ndarray, moments: Sequence[Moment]) -> Moment | None:
    """The last of some moments that had the eyes nearly as open as any, for a face (20,) that is asked to open them.

    None where it is not asked for, or where these are hardly more open.
    """
    moments = [one for one in moments if one.code[LIDS].min() >= AJAR]
    widest = max((one.code[LIDS].min() for one in moments), default=-np.inf)
    if asked[LIDS].mean() <= code[LIDS].mean() + WIDER or code[LIDS].min() >= min(widest - HALF, 0):
        return None
    return next((one for one in reversed(moments) if one.code[LIDS].min() > widest - HALF / 2), None)


def open_mouth(code: np.ndarray, asked: np.ndarray, moments: Sequence[Moment], shown: float) -> Moment | None:
    """Of some moments the one whose mouth is most nearly as open as a face (20,) is asked to be.

    shown: what it showed of the opening asked for, lately. None where that is enough, or where these are less open by
    more than PARTED, or so open that its own is nearer to what is asked for: mouths are closed less well than opened.
    """
    own, wanted = mouth_of(code), mouth_of(asked)
    if wanted <= own + PARTED or shown >= INSIDE_SHOWN:
        return None
    least = max(own + PARTED / 2, wanted - PARTED)
    fitting = [one for one in moments if least < mouth_of(one.code) < 2 * wanted - own]
    return min(fitting, key=lambda one: abs(mouth_of(one.code) - wanted), default=None)
