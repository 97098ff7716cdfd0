"""The source's own pixels inside of an edited face, carried there by the mesh over its landmarks.

The generators' flows are soft: they bend a face about right, and what they show of it is a little blurred. The
landmarks, moved by the motion codes, say more exactly where a point of the skin goes, and they know the head's depth,
so a turned mesh hides what has to be hidden. What the source hides of the far cheek is taken from the near one,
mirrored. Inside of the face this is shown; hair, neck and background stay as the generators drew them where a head
moves, and as they are in the source where it does not, with soft edges between. Not part of the paper.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from dpe_cli.face import ramp
from dpe_cli.landmarks import EYES, FACE_OVAL, LIPS_OUTER, FaceShape
from dpe_cli.lending import opens
from dpe_cli.mesh import AWAY, FLOW_SIZE, Mesh, centres, dense_map, polygon, warp
from dpe_cli.motion_space import COORDINATES, POSE_DIM, POSE_SCALE, MotionSpace, mirror_permutation, rotation_of
from dpe_cli.parts import EYE, Posed
from dpe_cli.retouch import asked_for, outlined

# Of masks, which are of the size of the flows, in pixels: holes that are closed, how far from the face's outline and
# from what nobody shows the mesh is shown, the sigma of the edge there, and of the edge of what is mirrored.
HOLE, INSIDE, EDGE, SEAM = 2, 3, 2.0, 1.5
NEAR = 3, 8  # of a face that speaks, from its outline: from the first on less, from the second nothing is drawn anew
WIDER = 6  # how much further what is mirrored goes: beside what a cheek hides its outline shows the background
PART = 0.01, 0.05  # of the face, what a turn hides: from the first on what is mirrored is shown a little, then wholly
REACH = 24  # and past the outline, onto temple, ear and hair, of heads of which
MUCH = 0.05, 0.12  # as much is hidden, as shares of the face: from the first on a little, from the second wholly;
FRONTAL, ASKANCE = (12.0, 25.0), 0.05  # of those that look aside, by so many degrees, more has to be, by so much;
SEEN = 0.45, 0.7  # and of which the near side shows that as large, over its size in the result: where a head turns away
# from the front neither side shows it
SPECK = 10  # places: smaller parts are chance
LIGHT = 0.04  # sigma, in crop sides, of what tells how both sides of a face are lit, and how far that is followed
GAIN = 0.25, 4.0
TOLD = 0.02, 0.06  # share of the crop that both sides have to show: followed not at all, and wholly
AROUND = 0.08  # sigma, in crop sides, of the skin that is seen around, to which by so many levels nearer
LIKELIER = 0.0, 15.0  # the other side has to be: from the first on a little, from the second wholly
PERSON, RIM = 0.8, 6  # of a matte what is the person for sure, and pixels of the crop at its edge that may not be
NODDING = slice(0, 2)  # yaw and pitch
MOVING = slice(COORDINATES["size"].start, POSE_DIM)  # size and place
HEEDED, MOST = 0.75, 1.0  # share of what they miss that is asked for on top, and the most of that, 15 and 12 degrees:
# all of it would add a fourth to the trembling of still heads
ASIDE = 30.0, 45.0  # degrees of yaw that are asked for: from the first on less of it, from the second nothing, since
# what landmarks tell of such a picture is not to be relied on
BLINKING = 0.4  # change of lids or gaze from which eyes are left to the generators, wholly at twice that


# Crops (N, S, S, 3) uint8, and of each one from where in a picture each place of it was carried: (R, R, 3), x and y as
# `mesh.dense_map` tells them, and what share of that is shown; None where nothing was carried.
Shown = tuple[np.ndarray, list[np.ndarray | None]]


class MeshWarp:
    """Puts carried faces into drawn crops. basis: (14, 478, 3) of `Retouch`, how landmarks move with the expression."""

    def __init__(self, space: MotionSpace, basis: np.ndarray):
        self.space, self.basis = space, basis
        self.mesh, self.mirror = Mesh(space.template), mirror_permutation(space.template)

    def expressed(
        self, crops: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        asked: np.ndarray,
    ) -> Shown:  # fmt: skip
        """Drawn crops whose faces are the source's, with another expression; as drawn where there is no face.

        What is not near a face, before or after, is the crop's own: the generator's flow is smooth, and moves collars
        and what is behind heads along with a mouth.

        crops, drawn: (N, S, S, 3) uint8, before and after the expression generator; faces: of the crops; own, asked:
        codes (N, 20) that they have and are to have.
        """
        result, maps = drawn.copy(), [None] * len(drawn)
        for row, face in enumerate(faces):
            strength = asked_for((asked - own)[row, POSE_DIM:])
            if face is not None and strength:
                before, after = outlined(face, asked[row, POSE_DIM:], self.space, self.basis)
                carried, share, where = self.carried(crops[row], before.points, after.points)
                share = share * (1 - self.left(before.points, after.points, own[row], asked[row], len(share)))
                maps[row] = mapped(where, strength * share)
                near = near_to(before.points, after.points, len(share))
                result[row] = mixed(mixed(crops[row], drawn[row], near, 1.0), carried, share, strength)
        return result, maps

    @staticmethod
    def left(before: np.ndarray, after: np.ndarray, own: np.ndarray, asked: np.ndarray, size: int) -> np.ndarray:
        """Where the generators know better: a mouth that opens, lids and irises that move far: a mesh only stretches.

        before, after: (478, 3) pixels of the crop; own, asked: (20,) codes. -> (S, S) float32 in [0, 1]
        """
        wider = opens(own, asked)
        eyes = (np.abs(asked - own)[POSE_DIM:][EYE.codes].max() - BLINKING) / BLINKING
        result = np.zeros((FLOW_SIZE, FLOW_SIZE), np.float32)
        for share, parts in ((wider, [LIPS_OUTER]), (eyes, EYES)):
            for part in parts if share > 0 else ():
                shape = np.maximum(*(polygon(points, part, size, FLOW_SIZE) for points in (before, after)))
                grown = cv2.dilate(shape, disc(2 * INSIDE)).astype(np.float32) / 255
                result = np.maximum(result, min(share, 1.0) * cv2.GaussianBlur(grown, (0, 0), EDGE))
        return cv2.resize(result, (size, size))

    def turned(
        self, pictures: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        pose: np.ndarray, expression: np.ndarray | None = None, persons: np.ndarray | None = None,
    ) -> Shown:  # fmt: skip
        """Drawn crops whose faces are the pictures', turned; as drawn where there is no face, or no head moves.

        pictures, drawn: (N, S, S, 3) uint8, before and after the pose generator; faces: of the source's crops; own,
        pose: (N, 20), the source's codes, and those whose pose is asked for; expression: (N, 20), those whose
        expression the pictures have, None for the source's; persons: (N, S/2, S/2) in [0, 1], mattes of the pictures,
        None where they are not known. Places are of `pictures`.
        """
        result, maps = drawn.copy(), [None] * len(drawn)
        for row, face in enumerate(faces):
            strength = max(asked_for((pose - own)[row, part]) for part in (COORDINATES["turn"], MOVING))
            if face is not None and strength:
                code = own[row] if expression is None else expression[row]
                seen, shaped = outlined(face, code[POSE_DIM:], self.space, self.basis)
                before = seen if expression is None else shaped
                after = posed_as(before, pose[row, :POSE_DIM], float(len(drawn[row])))
                matte = None if persons is None else persons[row]
                yaw = abs(float(pose[row, 0])) * POSE_SCALE[0]
                carried, share, where = self.carried(pictures[row], before.points, after, yaw, matte)
                maps[row] = mapped(where, strength * share)
                result[row] = mixed(drawn[row], carried, share, strength)
        return result, maps

    def looked_at(
        self, pictures: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        pose: np.ndarray, expression: np.ndarray | None, look: Callable[[np.ndarray, np.ndarray], np.ndarray],
        persons: np.ndarray | None = None,
    ) -> Shown:  # fmt: skip
        """`turned`, and turned heads are looked at: what they miss of yaw and pitch is asked for on top, once.

        Not where a head is to look far aside: see ASIDE.

        look: tells the codes of pictures (n, S, S, 3) uint8, where it sees no face what they were to have (n, 20).
        """
        result, maps = self.turned(pictures, drawn, faces, own, pose, expression, persons)
        heeded = HEEDED * (1 - ramp(np.abs(pose[:, :1]) * POSE_SCALE[0], *ASIDE))
        rows = np.flatnonzero((result != drawn).any((1, 2, 3)) & (heeded[:, 0] > 0))
        if len(rows):
            more = pose.copy()
            missed = (pose[rows] - look(result[rows], pose[rows]))[:, NODDING]
            more[rows, NODDING] += np.clip(heeded[rows] * missed, -MOST, MOST)
            chosen = [None if one is None else one[rows] for one in (pictures, drawn, own, more, expression, persons)]
            result[rows], further = self.turned(*chosen[:2], [faces[row] for row in rows], *chosen[2:])
            for row, where in zip(rows, further, strict=True):
                maps[row] = where
        return result, maps

    def carried(
        self, picture: np.ndarray, before: np.ndarray, after: np.ndarray, yaw: float | None = None,
        matte: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """A picture (S, S, 3) uint8 whose face has other landmarks, where that is to be shown, and the map of it.

        before, after: (478, 3) pixels of the crop; yaw: degrees by which a head that turns is then to look aside, None
        where the expression moves; matte: of the person (R, R) in [0, 1], for faces whose far side is borrowed.
        -> (S, S, 3) uint8, (S, S) float32 in [0, 1], and of `mesh.dense_map` (R, R, 2)
        """
        size, sides = float(len(picture)), picture.shape[1::-1]
        place, mirrored = self.mesh.locate(after, size), before[self.mirror]
        flipped = mirrored * [-1, 1, 1]
        shown = self.mesh.facing(place, after, before)
        lent = self.mesh.facing(place, after, flipped) == 1
        on_face, borrowed, part, worth = shown != 0, (shown == AWAY) & lent, 1.0, 0.0
        turns = yaw is not None
        if turns:
            hidden = touching(borrowed, ~on_face)
            part = ramp(hidden.sum() / max(on_face.sum(), 1), *PART)
            least, whole = np.add(MUCH, ASKANCE * ramp(yaw, *FRONTAL))
            further = ramp(hidden.sum() / max(on_face.sum(), 1), least, whole)
            if further:
                sizes = self.mesh.ratios(after, flipped)[place.index[hidden.ravel()]]
                worth = further * ramp(np.median(sizes), *SEEN)
            borrowed |= (cv2.dilate(hidden.astype(np.uint8), disc(WIDER)) > 0) & lent
        where = dense_map(place, after, before, size)
        # Landmarks of a profile stray past its outline, and then noses are striped by what lies behind.
        spread = picture if matte is None or not borrowed.any() else without_background(picture, matte)
        face, share = warp(spread, where, size), inner((shown == 1) | borrowed)
        if borrowed.any():
            back, from_near = dense_map(place, after, mirrored, size), borrowed
            if worth:
                back, around = beyond(back, borrowed, on_face, size)
                from_near = borrowed | (around > 0)
                further = inner((shown == 1) | from_near) * np.where(on_face, 1, around).astype(np.float32)
                share += worth * (further - share)
            mirror = cv2.resize(cv2.GaussianBlur(from_near.astype(np.float32), (0, 0), SEAM), sides)
            near = warp(picture, back, size)
            if spread is not picture:
                near = mixed(near, warp(spread, back, size), cv2.resize(on_face.astype(np.float32), sides), 1.0)
            near = lit_as(face, near, (shown == 1) & lent & ~borrowed) if turns else near
            if turns and part < 1:
                mirror *= cv2.resize(np.maximum(part, likelier(face, near, shown == 1)).astype(np.float32), sides)
            face = mixed(face, near, mirror, 1.0)
        return face, cv2.resize(share, sides), where


def near_to(before: np.ndarray, after: np.ndarray, size: int) -> np.ndarray:
    """How near places are to a face, as it was or as it is. (478, 3) pixels of the crop twice -> (S, S) float32"""
    face = np.maximum(*(polygon(points, FACE_OVAL, size, FLOW_SIZE) for points in (before, after)))
    distance = cv2.distanceTransform((face == 0).astype(np.uint8), cv2.DIST_L2, 5)
    return cv2.resize(ramp(distance, *NEAR[::-1]).astype(np.float32), (size, size))


def lit_as(face: np.ndarray, mirrored: np.ndarray, both: np.ndarray) -> np.ndarray:
    """A mirrored face in the light of the side that it is to stand for, by places that both show.

    face, mirrored: (S, S, 3) uint8; both: (R, R) bool. -> (S, S, 3) uint8
    """
    both = cv2.erode(both.astype(np.uint8), disc(1)) > 0  # its edge is seen at a slant, or is hair
    trust = ramp(both.mean(), *TOLD)
    if not trust:
        return mirrored
    sigma, share = LIGHT * len(face), cv2.resize(both.astype(np.float32), face.shape[1::-1])[..., None]
    sums = [cv2.GaussianBlur(share * picture, (0, 0), sigma) for picture in (face, mirrored)]
    gain = np.clip((sums[0] + 1e-3) / (sums[1] + 1e-3), *GAIN)  # 1 far from all that both show, and in black
    gain = 1 + trust * (gain - 1)
    return np.clip(np.rint(mirrored * gain), 0, 255).astype(np.uint8)


def likelier(face: np.ndarray, near: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """How much sooner the mirrored side than the face's own, stretched, looks like the skin around that is seen.

    Where little is hidden both may be right: beside a cheek its own rim may be hair, the other side in the shade.
    face, near: (S, S, 3) uint8; seen: (R, R) bool. -> (R, R) float32 in [0, 1]
    """
    share, sigma = inner(seen), AROUND * len(seen)
    own, other = (
        cv2.resize(one, seen.shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) for one in (face, near)
    )
    skin = cv2.GaussianBlur(share[..., None] * own, (0, 0), sigma) + 1e-3
    skin /= cv2.GaussianBlur(share, (0, 0), sigma)[..., None] + 1e-5
    missed = [np.abs(cv2.GaussianBlur(one, (0, 0), EDGE / 2) - skin).mean(-1) for one in (own, other)]
    return ramp(cv2.GaussianBlur(missed[0] - missed[1], (0, 0), EDGE / 2), *LIKELIER).astype(np.float32)


def beyond(where: np.ndarray, borrowed: np.ndarray, face: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """A mirrored map that goes on past the outline of a face, and how much of that is to be shown there.

    What a turned head hides is not its cheek alone: behind it are temple, ear and hair, and what the generator makes of
    them is drawn out of the little that was seen. where: (R, R, 2) of `mesh.dense_map`; borrowed, face: (R, R) bool,
    what is taken from the near side, and the face. Past the outline the map is that of the nearest place inside, moved
    on by the affine map that fits best what is borrowed. -> the map, and (R, R) float32 in [0, 1], 0 inside
    """
    nearest, distance = nearest_of(face)
    here = centres(len(where), size)
    coordinates = np.dstack([here, np.ones(here.shape[:2])])
    affine = np.linalg.lstsq(coordinates[borrowed], where[borrowed], rcond=None)[0]
    moved = coordinates @ affine
    result = (where.reshape(-1, 2)[nearest] + moved - moved.reshape(-1, 2)[nearest]).astype(np.float32)
    side = cv2.GaussianBlur(borrowed.ravel()[nearest].astype(np.float32), (0, 0), INSIDE)
    room = np.minimum(result, size - result).min(-1) / size  # what lies outside of the crop cannot be shown
    around = side * ramp(distance, REACH, REACH / 2) * ramp(room, 0, 0.03)
    return result, np.where(face | (side < 0.02), 0, around).astype(np.float32)


def nearest_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each place the number of the nearest one in a mask (H, W) bool that is not empty, itself inside; how far.

    -> (H, W) int, as in `mask.ravel()`, and (H, W) float32
    """
    outside = (~mask).astype(np.uint8)
    distance, label = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    inside, numbered = np.flatnonzero(mask), np.zeros(label.max() + 1, int)
    numbered[label.ravel()[inside]] = inside
    return numbered[label], distance


def without_background(picture: np.ndarray, matte: np.ndarray) -> np.ndarray:
    """A picture (S, S, 3) uint8 in whose background the person's colours go on. matte: (R, R) in [0, 1]"""
    large = cv2.resize(matte, picture.shape[1::-1])
    person = cv2.erode((large > PERSON).astype(np.uint8), disc(RIM)) > 0
    if not person.any():
        return picture
    colours = cv2.GaussianBlur(picture.reshape(-1, 3)[nearest_of(person)[0]], (0, 0), EDGE)
    return mixed(picture, colours, cv2.GaussianBlur((~person).astype(np.float32), (0, 0), EDGE / 2), 1.0)


def touching(mask: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """The parts of a mask (R, R) bool that lie at the edge of another."""
    _, parts, about, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    edge = cv2.dilate(outside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    large = about[:, cv2.CC_STAT_AREA] >= SPECK
    return mask & large[parts] & np.isin(parts, parts[mask & edge])


def mapped(where: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A map (R, R, 2) and the share (S, S) of what it carries that is shown. -> (R, R, 3) float32"""
    small = cv2.resize(share, where.shape[1::-1], interpolation=cv2.INTER_AREA)
    return np.dstack([where, small]).astype(np.float32)


def through(first: np.ndarray | None, then: np.ndarray | None, size: int) -> np.ndarray | None:
    """The map of what was carried by one of `Shown` and then by another, in crops of a size; None moves nothing.

    Outside of the crop the first goes on as it is at its border.
    """
    if first is None or then is None:
        return then if first is None else first
    half = size / len(first) / 2
    places = then[..., :2] * np.float32(len(first) / size) - 0.5
    result = cv2.remap(first, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    result[..., :2] += then[..., :2] - np.clip(then[..., :2], half, size - half)
    result[..., 2] *= then[..., 2]
    return result


def over(carried: np.ndarray | None, flow: np.ndarray) -> np.ndarray:
    """The map of what was carried (R, R, 3), and where nothing was that of a flow (R, R, 2); all of it is shown."""
    share = 0 if carried is None else carried[..., 2:]
    places = flow if carried is None else flow + share * (carried[..., :2] - flow)
    return np.dstack([places, np.ones(flow.shape[:2], np.float32)])


def mixed(drawn: np.ndarray, face: np.ndarray, share: np.ndarray, strength: float) -> np.ndarray:
    """A drawn crop (S, S, 3) uint8 with a share (S, S) of a face. -> (S, S, 3) uint8"""
    return np.rint(drawn + strength * share[..., None] * (face.astype(np.float32) - drawn)).astype(np.uint8)


def inner(known: np.ndarray) -> np.ndarray:
    """The inside of a mask (R, R) bool, softly. -> (R, R) float32 in [0, 1]"""
    closed = cv2.morphologyEx(known.astype(np.uint8), cv2.MORPH_CLOSE, disc(HOLE))
    eroded = cv2.erode(closed, disc(INSIDE), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return cv2.GaussianBlur(eroded.astype(np.float32), (0, 0), EDGE, borderType=cv2.BORDER_CONSTANT)


def disc(radius: int) -> np.ndarray:
    """For OpenCV's morphology."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def posed_as(face: Posed, pose: np.ndarray, size: float) -> np.ndarray:
    """The points of a face (478, 3) with the pose coordinates (6,) of a motion code, in a crop of a size in pixels."""
    *_, scale, x, y = pose * POSE_SCALE
    rotation = rotation_of(pose).as_matrix()
    place = (np.array([x, y]) + 0.5) * size
    return 2.0**scale * size / 3 * face.shape @ rotation.T + [*place, face.translation[2]]
