"""Shut eyes of a source that are to be open: what can be done about them.

Behind shut lids there is no eye in the picture, and warping the lids aside smears them over it. In a video the same
eyes were open a moment before, so their pixels are put in the place of the shut ones, and the networks edit that crop.
Where there is no such moment, the eyes stay shut (`drawable`).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dpe_cli.motion_space import COORDINATES
from dpe_cli.regions import transplant

LIDS, TURN = COORDINATES["lids"], COORDINATES["turn"]
SHUT, AJAR = -1.6, -0.9  # of the lids' coordinates: blendshape eyeBlink at 0.45 and 0.25
WIDER = 0.5  # of the lids' coordinates: what the asked eyes are more open than the source's, or these are left as is
HALF = 0.8  # of the lids' coordinates: so much less than a moment before, eyes are on their way to be shut
BACK = 1.0  # seconds for which open eyes are remembered; a blink lasts 0.1 to 0.4
TURNED = 0.6  # of the coordinates of the head's turn, 6 to 9 degrees: eyes of another view do not fit

Look = Callable[[np.ndarray], np.ndarray | None]  # a crop (S, S, 3) uint8 to its landmarks (478, 3) in pixels, or None


def drawable(asked: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The codes asked for, less what cannot be drawn: eyes that the source keeps shut are not opened.

    Closing is not limited. asked, own: (N, 20) measured codes. -> (N, 20)
    """
    open_by = np.clip((own[:, LIDS] - SHUT) / (AJAR - SHUT), 0, 1)
    open_by = open_by * open_by * (3 - 2 * open_by)  # smooth in time
    result = asked.copy()
    result[:, LIDS] -= (1 - open_by) * np.maximum(asked[:, LIDS] - own[:, LIDS], 0)
    return result


@dataclass(frozen=True)
class Moment:
    """When somebody's eyes were open."""

    time: float
    crop: np.ndarray  # (S, S, 3) uint8
    code: np.ndarray  # (20,) measured


class OpenEyes:
    """Gives crops of a video, in the order of time, the eyes of the last moment in which they were open.

    A result depends on the BACK seconds before a crop alone.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], look: Look):
        """read: crops (N, S, S, 3) uint8 to their measured codes (N, 20)."""
        self.read, self.look = read, look
        self.open: dict[Hashable, list[Moment]] = {}  # of the last BACK seconds, oldest first

    def __call__(
        self, crops: np.ndarray, asked: np.ndarray, times: Sequence[float], whose: Sequence[Hashable]
    ) -> np.ndarray:
        """The crops, some with other eyes.

        crops: (N, S, S, 3) uint8; asked: the codes that they are to have, (N, 20); times: seconds; whose: what is
        different for another face or another shot. -> (N, S, S, 3) uint8
        """
        result = list(crops)
        for row, (crop, code, time, who) in enumerate(zip(crops, self.read(crops), times, whose, strict=True)):
            recent = {one: [moment for moment in of if time - moment.time <= BACK] for one, of in self.open.items()}
            self.open = {one: of for one, of in recent.items() if of}
            if asked[row, LIDS].mean() > code[LIDS].mean() + WIDER:
                result[row] = self.opened(crop, code, self.open.get(who, []))
            if code[LIDS].min() >= AJAR:
                self.open.setdefault(who, []).append(Moment(time, crop.copy(), code))
        return np.stack(result)

    def opened(self, crop: np.ndarray, code: np.ndarray, moments: list[Moment]) -> np.ndarray:
        """A crop with the eyes of the last of some moments that had them nearly as open as any.

        Itself where these are hardly more open, seen from elsewhere or not found.
        """
        widest = max((moment.code[LIDS].min() for moment in moments), default=-np.inf)
        if code[LIDS].min() >= min(widest - HALF, 0) or not moments:
            return crop
        moment = next(one for one in reversed(moments) if one.code[LIDS].min() > widest - HALF / 2)
        if np.abs(code - moment.code)[TURN].max() > TURNED:
            return crop
        here, there = self.look(crop), self.look(moment.crop)
        if here is None or there is None:
            return crop
        return transplant(crop, moment.crop, here, there, "eyes")
