"""Putting an edited crop back so that it does not show: mask, colour match, detail, and a score of the seam.

Nothing here looks ahead or keeps frames; a track of faces leaves a few numbers behind. Colours are reckoned in 8-bit
levels, whatever the frame holds, and as they are encoded: the transfer curve is nearly a power, so a gain of the light
is a gain here too.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dpe_cli.colours import colour_difference
from dpe_cli.crop import crop_matrix, cut, gaussian_mask, levels, paste_back, resample, times
from dpe_cli.detail import EASED, eased, keep_detail, to_levels, with_outside
from dpe_cli.errors import UsageError
from dpe_cli.face import Box, FaceDetector, Measured, connected
from dpe_cli.grain import CALM_MASK, with_grain
from dpe_cli.landmarks import Landmarker
from dpe_cli.masks import POINTS_SECONDS, REACH, Landmarks, MaskMaker, Steady
from dpe_cli.plugs import Enhancer, FaceParser

COLOUR_SECONDS = 0.3  # long against the noise of one frame's colours, short against a change of the light

SECTORS = 16  # of the seam, by angle
SAMPLES = 1024  # places looked at on each side of the seam: the same cost at any resolution
INNER, OUTER = (0.85, 0.99), (0.01, 0.15)  # values of the mask that make the two sides of the seam
NOISE = 3.0  # levels squared over three channels: gradients below it are not seen

WHOLE = 4 / 256  # share of a square's side that is left out at its border

# Enhancers of faces are trained in FFHQ's frame: eyes at 0.47 of its height, 0.235 of its width apart. Its side and top
# in sides of our crop:
FFHQ_SIDE, FFHQ_TOP = 1.15, -0.17


@dataclass(frozen=True, slots=True)
class Seam:
    """How much an edit shows along the edge of its mask; 0 and 0 and 1 where it changes nothing.

    `colour`: root mean square over sixteen sectors of what the edit adds to the colour step from one side of the edge
    to the other, percent of full scale. `gradient`: mean over the sectors of how far the edit moves the ratio of
    gradient energies of the two sides, as a natural logarithm (0.7: one side lost half). `sharpness`: gradient energy
    of the edited face over the source's.
    """

    colour: float
    gradient: float
    sharpness: float

    @property
    def score(self) -> float:
        """The seam score: the sum of both steps."""
        return self.colour + self.gradient

    def rounded(self) -> dict[str, float]:
        """As the report names it."""
        numbers = {"seam": self.score, "colour_step": self.colour, "gradient_step": self.gradient}
        return {name: round(value, 3) for name, value in {**numbers, "sharpness": self.sharpness}.items()}


@dataclass(frozen=True)
class Pasted:
    """A frame with its edit, and how well it sits; None where none of the mask's edge lies in the frame."""

    rgb: np.ndarray
    seam: Seam | None


@dataclass(frozen=True)
class Placed:
    """A face that only has to be put into its frame, which depends on no other: see `Paster.place`, `paste_back`."""

    rgb: np.ndarray
    picture: np.ndarray  # (S, S, 3) float32 levels
    crop: np.ndarray
    mask: np.ndarray
    to_crop: np.ndarray
    where: np.ndarray | None
    edge: "Edge"
    detail: bool

    def pasted(self) -> Pasted:
        """The frame with the face in it."""
        picture, kept, carried = self.picture, None, None
        if self.detail:
            picture, kept, carried = keep_detail(picture, self.crop, self.where)
        result = paste_back(self.rgb, picture, self.mask, self.to_crop, self.crop, kept, carried)
        if self.detail:
            lacking = self.mask * np.clip(1 - kept - (0 if carried is None else carried.share), 0, 1)
            result = with_grain(result, self.rgb, self.crop, lacking, kept * (self.mask > CALM_MASK), self.to_crop)
        return Pasted(result, self.edge.seam(self.rgb, result, self.to_crop))


class Paster:
    """Pastes edited crops back. One for a whole run: it follows colours through time, by track."""

    def __init__(
        self, masks: MaskMaker, colour_match: bool = True, detail: bool = True, enhancer: Enhancer | None = None
    ):
        self.masks, self.colour_match, self.detail, self.enhancer = masks, colour_match, detail, enhancer
        self.colours = Steady(COLOUR_SECONDS)
        self.boxes: dict[Hashable, Measured] = {}
        self.edge: tuple[np.ndarray, Edge] | None = None

    @property
    def memory(self) -> float:
        """Seconds: nothing older counts for how a face is pasted back.

        Colours are compared along the mask, which follows points, and again after an enhancer: one memory on the other.
        """
        return REACH * (POINTS_SECONDS + COLOUR_SECONDS * (1 if self.enhancer is None else 2))

    def paste(self, *face: Any) -> Pasted:
        """`place`, and all that is left to do."""
        return self.place(*face).pasted()

    def place(
        self, rgb: np.ndarray, box: Box, crop: np.ndarray, face: np.ndarray, time: float, track: Hashable = 0,
        where: np.ndarray | None = None,
    ) -> Placed:  # fmt: skip
        """For a new frame (H, W, 3) uint8 or uint16 with `face`, the edit of `crop`, in the place of `box`.

        `crop` (S, S, 3) uint8 is what `cut` gave for this frame and box; `time` in seconds; `track` tells faces apart
        where there are several; `where`: what `Engine.carried` says of the face. Where nothing differs from the crop,
        and outside the mask, every bit is kept. A crop that is bent everywhere, as for a head that turns, comes to rest
        at its border, unless a mask was asked for that ends at the face.
        """
        self.mind_jumps(box, time, track)
        to_crop = crop_matrix(box, len(crop))
        mask = self.masks(crop, face, time, track)
        if bent_everywhere(where) and getattr(self.masks, "way", None) == "gaussian":
            crop, to_crop = surroundings(rgb, box, crop)
            (face, where), mask = eased(face, crop, where), whole_square(len(crop))
        if self.enhancer is not None:
            matched = self.matched(face, crop, mask, time, track)
            crop, face, mask, to_crop = self.enhanced(rgb, box, crop, matched, mask, to_crop)
            track, where = ("enhanced", track), None
        picture = self.matched(face, crop, mask, time, track)
        return Placed(rgb, picture, crop, mask, to_crop, where, self.edge_of(mask), self.detail)

    def matched(self, face: np.ndarray, crop: np.ndarray, mask: np.ndarray, time: float, track: Hashable) -> np.ndarray:
        """`face` as float32 levels, in the source's colours if that is wanted."""
        if not self.colour_match:
            return face.astype(np.float32)
        gain, shift = self.colours(track, time, colour_difference(face, crop, mask))
        return face * gain + shift

    def enhanced(
        self, rgb: np.ndarray, box: Box, crop: np.ndarray, face: np.ndarray, mask: np.ndarray, to_crop: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Source crop, edit, mask and matrix in the enhancer's frame and size, after the enhancer."""
        side, size = FFHQ_SIDE * box.width, self.enhancer.size
        left, top = box.centre[0] - side / 2, box.y0 + FFHQ_TOP * box.height
        larger, to_larger = cut(rgb, Box(left, top, left + side, top + side), size)
        scale = np.diag(to_crop[:, :2]) / np.diag(to_larger[:, :2])
        across = np.column_stack([np.diag(scale), to_crop[:, 2] - scale * to_larger[:, 2]])  # enhancer's frame to crop
        back = np.column_stack([np.diag(1 / scale), -across[:, 2] / scale])
        face, kept, _ = keep_detail(face, crop) if self.detail else (face, None, None)
        whole = self.enhancer(paste_back(larger, face, mask, across, crop, kept))
        return larger, whole, resample(mask, back, size, size, cv2.BORDER_CONSTANT), to_larger

    def mind_jumps(self, box: Box, time: float, track: Hashable) -> None:
        """Forgets the colours of a track whose box jumps: that is a cut between shots."""
        here = Measured(np.array([time, *box.centre, box.width]), 0)  # told apart by the key already
        if not connected(self.boxes.get(track), here):
            for key in (track, ("enhanced", track)):
                self.colours.forget(key)
        self.boxes[track] = here

    def edge_of(self, mask: np.ndarray) -> "Edge":
        """The edge of this mask; that of a mask which stays the same is looked for once."""
        if self.edge is None or self.edge[0] is not mask:
            self.edge = mask, Edge(mask)
        return self.edge[1]


@lru_cache(maxsize=2)
def whole_square(size: int) -> np.ndarray:
    """The mask of all of a square, (size, size) float32, not to be written to."""
    return gaussian_mask(size, WHOLE / 2, WHOLE)


def bent_everywhere(where: np.ndarray | None) -> bool:
    """Whether the map of `Engine.carried` is that of a head that moves."""
    return where is not None and where[..., 2].min() == 1


def surroundings(rgb: np.ndarray, box: Box, crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A crop with what is around it in its frame, and the matrix from the frame to that."""
    size, around = len(crop), round(EASED * len(crop))
    wide, high = (around / size * side for side in (box.width, box.height))
    larger, to_larger = cut(rgb, Box(box.x0 - wide, box.y0 - high, box.x1 + wide, box.y1 + high), size + 2 * around)
    larger[around:-around, around:-around] = crop  # which may have been lent an eye
    return larger, to_larger


def alone(
    rgb: np.ndarray, box: Box, crop: np.ndarray, face: np.ndarray, where: np.ndarray | None, size: int | None
) -> Pasted:
    """The edit of a crop in place of a frame: as it was drawn, or of a size, see `enlarged`.

    What a head that moves asks for outside of its crop is the frame's.
    """
    if bent_everywhere(where) and (np.abs(where[..., :2] - len(crop) / 2) > (len(crop) - 1) / 2).any():
        face = with_outside(face, surroundings(rgb, box, crop)[0], where)
    return Pasted(face if size is None else enlarged(rgb, box, crop, face, where, size), None)


def enlarged(
    rgb: np.ndarray, box: Box, crop: np.ndarray, face: np.ndarray, where: np.ndarray | None, size: int
) -> np.ndarray:
    """`face`, the edit of `crop`, with the detail that the frame has and a crop of its size has not.

    Arguments as of `Paster.place`; size: of the result's side. -> (size, size, 3) uint8
    """
    larger, _ = cut(rgb, box, size)
    to_larger = crop_matrix(Box(0, 0, len(crop), len(crop)), size)
    picture, kept, carried = keep_detail(face.astype(np.float32), crop, where)
    result = resample(picture - times(crop.astype(np.float32), kept), to_larger, size, size)
    result += times(larger.astype(np.float32), resample(kept, to_larger, size, size, cubic=True))
    if carried is not None:
        carried.add(result, larger, crop, to_larger, (0, 0))
    return to_levels(result)


# The seam


class Edge:
    """Where the edge of a mask (S, S) runs: places on both sides of it, by sector, and places inside."""

    def __init__(self, mask: np.ndarray):
        self.inner, self.outer = (some_places(mask, *between) for between in (INNER, OUTER))
        self.body = some_places(mask, 0.5, 1.01)
        everything = np.concatenate([self.inner, self.outer])
        around = everything - np.array(mask.shape[::-1]) / 2
        sectors = ((np.arctan2(around[:, 1], around[:, 0]) / (2 * np.pi) + 0.5) * SECTORS).astype(int) % SECTORS
        # both sides' sectors in one count: first the inner ones, then the outer ones
        self.bins = sectors + np.repeat([0, SECTORS], [len(self.inner), len(self.outer)])
        self.sides = everything

    def seam(self, source: np.ndarray, result: np.ndarray, to_crop: np.ndarray) -> Seam | None:
        """Compares two frames (H, W, 3) pixel by pixel at the edge's places."""
        places, inside = to_frame(self.sides, to_crop, source.shape)
        own, own_energy = look(source, places)
        new, new_energy = look(result, places)
        bins = self.bins[inside]
        counts = np.bincount(bins, minlength=2 * SECTORS)
        seen = np.minimum(counts[:SECTORS], counts[SECTORS:]) > 0
        if not seen.any():
            return None

        def step(values: np.ndarray) -> np.ndarray:
            """Mean on the inner side of each sector that is seen, then on the outer side. (2, sectors)"""
            return (np.bincount(bins, values, 2 * SECTORS) / np.maximum(counts, 1)).reshape(2, -1)[:, seen]

        added = [np.subtract(*step(values)) for values in (new - own).T]
        energies = [np.log(step(energy) + NOISE) for energy in (own_energy, new_energy)]
        ratios = [inner - outer for inner, outer in energies]
        body, _ = to_frame(self.body, to_crop, source.shape)
        own_body, new_body = (look(picture, body)[1].sum() + NOISE for picture in (source, result))
        return Seam(
            colour=float(np.sqrt(np.mean(np.square(added)))) / 2.55,
            gradient=float(np.abs(ratios[1] - ratios[0]).mean()),
            sharpness=float(new_body / own_body),
        )


def some_places(mask: np.ndarray, low: float, high: float) -> np.ndarray:
    """At most SAMPLES places (N, 2) x, y where the mask lies between, spread evenly."""
    rows, columns = np.nonzero((mask > low) & (mask < high))
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).astype(int)
    return np.column_stack([columns[chosen], rows[chosen]])


def to_frame(places: np.ndarray, to_crop: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Places of a crop as whole pixels of the frame, and which of them lie in it with both their neighbours."""
    pixels = np.rint((places - to_crop[:, 2]) / np.diag(to_crop[:, :2])).astype(int)
    inside = ((pixels >= 0) & (pixels < np.array(shape[1::-1]) - 1)).all(1)
    return pixels[inside], inside


def look(rgb: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (N, 3) in levels at these pixels, and the gradient energy (N,) there: squares of forward differences."""
    x, y = pixels.T
    unit = np.float32(levels(rgb))
    here, right, below = (rgb[rows, columns] / unit for rows, columns in ((y, x), (y, x + 1), (y + 1, x)))
    return here, ((right - here) ** 2 + (below - here) ** 2).sum(1)


# From options


def make_paster(
    size: int,
    detector: FaceDetector,
    mask: str = "gaussian",
    feather: float | None = None,
    colour_match: bool = True,
    detail: bool = True,
    parsing: Path | None = None,
    landmarker: Path | None = None,
    enhancer: Path | None = None,
) -> Paster:
    """A paster for crops of `size` pixels; `parsing`, `landmarker` and `enhancer` are the paths of model files.

    Raises InputError for models that are missing or have no use with this mask, WeightsError for wrong ones.
    """
    for option, given, way in (("--parsing", parsing, "parsing"), ("--landmarker", landmarker, "landmarks")):
        if given and mask != way:
            raise UsageError(f"{option} has no use with --mask {mask}", f"add --mask {way} or leave {option} out")
    landmarks = find_landmarks(detector, landmarker) if mask == "landmarks" else None
    masks = MaskMaker(mask, size, feather, landmarks, FaceParser(parsing) if parsing else None)
    return Paster(masks, colour_match, detail, Enhancer(enhancer) if enhancer else None)


def find_landmarks(detector: FaceDetector, model: Path | None) -> Landmarks:
    """The detector's five points, or MediaPipe's 478 from its model file."""
    if model is None:

        def five(crop: np.ndarray) -> np.ndarray | None:
            faces = detector.detect(crop)
            return faces[0].points if faces else None

        return five
    landmarker = Landmarker(model)

    def dense(crop: np.ndarray) -> np.ndarray | None:
        shape = landmarker.detect(crop)
        return None if shape is None else shape.points

    return dense
