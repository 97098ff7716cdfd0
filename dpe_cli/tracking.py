"""All faces of a video as tracks: one face in one shot, under one number.

Numbers count from 1 in the order in which faces come, those of one frame from left to right, and are the same in every
run over the same frames with the same detector.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from dpe_cli.face import Box, Detection, FaceDetector, face_size
from dpe_cli.identity import Identity
from dpe_cli.shots import mark_shots
from dpe_cli.video import Frame

REGION_SCALE = 2.0  # the part of the frame searched for a known face, in face boxes
REGION_SIZE = 224  # pixels at most: a region is shrunk to this before it is searched
REGION_DRIFT = 0.1  # of its side: it stays until the face has gone so far, so that a still face is seen alike each time
MIN_FACE = 16.0  # pixels: a smaller face has no expression to edit
NEAR = 0.6  # how far a face may be from where it was, see `distance`
NEAR_PER_SECOND = 0.5  # what is added to NEAR for each second out of sight
FORGET_SECONDS = 1.0  # out of sight for longer, a track is over
DISCOVER_SECONDS = 0.2  # the whole frame is searched this often for further faces, and whenever a known one is missing
GLANCE_SIZE = 320  # pixels: while all known faces are there, most of these searches are made on a frame shrunk to this
THOROUGH_SECONDS = 1.0  # as often one is not: faces of less than a twentieth of the frame need it
ONE_FACE = 0.35  # boxes with more than this in common, of their union, are one face, as for the detectors
SIGN_SECONDS = 0.5  # between two looks at who a face is, after the first
FIRST_LOOKS = 3  # in as many frames, for a first one may be blurred
SIGNATURES = 8  # of a track, at most
UNLIKE = 1.0  # what looking like somebody else adds to a distance
NEVER = 1e6  # the distance of what does not belong together
DOUBTS = 3  # looks in a row that see somebody else end a track: it crossed a cut that nobody saw


@dataclass(eq=False)
class Track:
    """One face through a shot."""

    number: int
    face: Detection  # as seen last
    seen_at: float  # seconds
    region: Box | None = None  # searched last
    signatures: list[np.ndarray] = field(default_factory=list)
    signed_at: float = float("-inf")
    doubts: int = 0


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame and its faces, each with the number of its track, left to right."""

    frame: Frame
    faces: list[Detection]
    new_shot: bool
    signatures: dict[int, list[np.ndarray]]  # of the faces so far, by track; the lists grow


def track_all(frames: Iterable[Frame], detector: FaceDetector, identity: Identity) -> Iterator[Seen]:
    """Each frame with its faces; holds as many frames as `mark_shots`. Faces below MIN_FACE are left out."""
    tracker = Tracker(detector, identity)
    for frame, new_shot in mark_shots(frames):
        if new_shot:
            tracker.live = []
        faces = tracker.see(frame.rgb8, float(frame.time))
        yield Seen(frame, faces, new_shot, {track.number: track.signatures for track in tracker.live})


class Tracker:
    """The faces of one shot after another.

    A known face is looked for around its last place. Where a face could be that of two tracks, or a track could go on
    with two faces, as when people cross, and where a face comes back, it also has to look like the person.
    """

    def __init__(self, detector: FaceDetector, identity: Identity):
        self.detector, self.identity = detector, identity
        self.live: list[Track] = []
        self.count = 0
        # times of the frame before, of the last search everywhere, and of the last one that was no glance
        self.last = self.discovered = self.searched = float("-inf")

    def see(self, rgb: np.ndarray, now: float) -> list[Detection]:
        """The faces of the next frame."""
        self.live = [track for track in self.live if now - track.seen_at <= FORGET_SECONDS]
        faces = self.around_the_known(rgb)
        found = self.match(rgb, faces, now)
        missing = len(found) < len(self.live) or not self.live
        if missing or now - self.discovered >= DISCOVER_SECONDS - 1e-6:
            thorough = missing or now - self.searched >= THOROUGH_SECONDS - 1e-6
            self.discovered, self.searched = now, now if thorough else self.searched
            further = [self.refine(rgb, face) for face in self.everywhere(rgb, faces, thorough)]
            faces = distinct(faces + further)
            found = self.match(rgb, faces, now) if further else found
            if len(found) < min(len(self.live), len(faces)):  # somebody went and somebody came: perhaps all changed
                found = self.match(rgb, faces, now, wary=True)
        for track, face in found.items():
            track.face, track.seen_at = replace(face, track=track.number), now
        matched = {id(face) for face in found.values()}
        for face in sorted(faces, key=lambda face: face.box.centre[0]):
            if id(face) not in matched and large_enough(face):
                self.begin(face, now)
        self.look_who_it_is(rgb, now)
        self.last = now
        return sorted((track.face for track in self.live if track.seen_at == now), key=lambda face: face.box.centre[0])

    def begin(self, face: Detection, now: float) -> None:
        """A new track."""
        self.count += 1
        self.live.append(Track(self.count, replace(face, track=self.count), now))

    def around_the_known(self, rgb: np.ndarray) -> list[Detection]:
        """Faces in the parts of the frame where the known ones should be, each as it is seen best."""
        seen: list[tuple[float, Detection]] = []
        for track in self.live:
            track.region = region_around(track.face.box, track.region)
            there = detect_in(rgb, self.detector, track.region)
            # half a face at the edge of the region would look like a smaller one
            seen += [(distance(face, track.face), face) for face in there if within(face.box, track.region)]
        return distinct([face for _, face in sorted(seen, key=lambda pair: pair[0])])

    def everywhere(self, rgb: np.ndarray, known: list[Detection], thorough: bool) -> list[Detection]:
        """Faces of the whole frame that are not among the known ones; the smallest only if `thorough`."""
        faces = filter(large_enough, self.detector.detect(rgb) if thorough else glance(rgb, self.detector))
        return [face for face in faces if all(overlap(face.box, other.box) < ONE_FACE for other in known)]

    def refine(self, rgb: np.ndarray, face: Detection) -> Detection:
        """The face seen from near, as it is from then on: what a detector makes of a face depends on its size there."""
        there = detect_in(rgb, self.detector, region_around(face.box, None))
        nearest = min(there, key=lambda other: distance(other, face), default=face)
        return nearest if distance(nearest, face) < NEAR else face

    def match(self, rgb: np.ndarray, faces: list[Detection], now: float, wary: bool = False) -> dict[Track, Detection]:
        """Which face continues which track: by place and size, and by looks where these could be wrong or if `wary`."""
        if not faces or not self.live:
            return {}
        reach = np.array([NEAR + NEAR_PER_SECOND * (now - track.seen_at) for track in self.live])
        cost = np.array([[distance(face, track.face) for face in faces] for track in self.live])
        near = cost < reach[:, None]
        back = near & np.array([[track.seen_at < self.last] for track in self.live])
        rivals = near & ((near.sum(0) > 1) | (near.sum(1, keepdims=True) > 1))
        signatures: dict[int, np.ndarray] = {}
        for row, column in np.argwhere(near if wary else back | rivals):
            if not self.live[row].signatures:
                continue
            if column not in signatures:
                signatures[column] = self.identity.sign(rgb, faces[column])
            likeness = self.identity.likeness(signatures[column], self.live[row].signatures)
            cost[row, column] += UNLIKE * (1 - min(likeness, 1.0))
            near[row, column] = likeness > 0
        pairs = cheapest_pairs(np.where(near, cost, NEVER))
        return {self.live[row]: faces[column] for row, column in pairs if near[row, column]}

    def look_who_it_is(self, rgb: np.ndarray, now: float) -> None:
        """Takes signatures of faces that no other one touches; ends tracks that have become somebody else."""
        here = [track for track in self.live if track.seen_at == now]
        for track in here:
            early = len(track.signatures) < FIRST_LOOKS
            due = early or track.doubts or now - track.signed_at >= SIGN_SECONDS - 1e-6
            if not due or any(overlap(track.face.box, other.face.box) for other in here if other is not track):
                continue
            signature, track.signed_at = self.identity.sign(rgb, track.face), now
            if track.signatures and self.identity.likeness(signature, track.signatures) <= 0:
                track.doubts += 1
                if track.doubts == DOUBTS:
                    self.live.remove(track)
                    self.begin(track.face, now)
                continue
            track.doubts = 0
            if len(track.signatures) < SIGNATURES:
                track.signatures.append(signature)


def cheapest_pairs(cost: np.ndarray) -> list[tuple[int, int]]:
    """Rows and columns that together cost least, none of them twice. (R, C), both at least 1"""
    if 1 in cost.shape:
        return [tuple(int(place) for place in np.unravel_index(cost.argmin(), cost.shape))]

    from scipy.optimize import linear_sum_assignment  # takes half a second, and most videos have one face

    rows, columns = linear_sum_assignment(cost)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def large_enough(face: Detection) -> bool:
    return max(face.box.width, face.box.height) >= MIN_FACE


def overlap(one: Box, other: Box) -> float:
    """What two boxes have in common, of their union: 0 to 1."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    common = max(width, 0.0) * max(height, 0.0)
    return common / (one.width * one.height + other.width * other.height - common) if common else 0.0


def within(box: Box, region: Box) -> bool:
    return region.x0 < box.x0 and region.y0 < box.y0 and box.x1 < region.x1 and box.y1 < region.y1


def distinct(faces: list[Detection]) -> list[Detection]:
    """The faces without those that are an earlier one again."""
    kept: list[Detection] = []
    for face in faces:
        if all(overlap(face.box, other.box) < ONE_FACE for other in kept):
            kept.append(face)
    return kept


def distance(face: Detection, last: Detection) -> float:
    """How far a face is from where it was, in face sizes, plus how much it grew or shrank (0.7 for a factor of 2)."""
    size, before = face_size(face.points), max(face_size(last.points), 1e-6)
    moved = float(np.hypot(*(face.points - last.points).mean(0))) / before
    return moved + abs(float(np.log(max(size, 1e-6) / before)))


def region_around(box: Box, before: Box | None) -> Box:
    """The square to search for a face that was in `box`: the one searched before if it still serves. Whole pixels."""
    side = max(REGION_SCALE * max(box.width, box.height), 3 * MIN_FACE)
    if before is not None:
        drift = max(abs(new - old) for new, old in zip(box.centre, before.centre, strict=True))
        if drift < REGION_DRIFT * side and 0.85 < before.width / side < 1.18:
            return before
    x0, y0 = (round(centre - side / 2) for centre in box.centre)
    return Box(x0, y0, x0 + round(side), y0 + round(side))


def detect_in(rgb: np.ndarray, detector: FaceDetector, region: Box) -> list[Detection]:
    """Faces in a square of the frame, black outside it, shrunk to REGION_SIZE: fast, and fine for small faces."""
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = (int(value) for value in (region.x0, region.y0, region.x1, region.y1))
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if right - left < MIN_FACE or bottom - top < MIN_FACE:
        return []
    around = (top - y0, y1 - bottom, left - x0, x1 - right)
    picture = cv2.copyMakeBorder(rgb[top:bottom, left:right], *around, cv2.BORDER_CONSTANT)
    if x1 - x0 > REGION_SIZE:
        picture = cv2.resize(picture, (REGION_SIZE, REGION_SIZE), interpolation=cv2.INTER_AREA)
    return [moved(face, (x1 - x0) / picture.shape[0], x0, y0) for face in detector.detect(picture)]


def glance(rgb: np.ndarray, detector: FaceDetector) -> list[Detection]:
    """Faces of a frame shrunk to GLANCE_SIZE: a quarter of the work, without those that are small in it."""
    scale = max(rgb.shape[:2]) / GLANCE_SIZE
    if scale <= 1:
        return detector.detect(rgb)
    size = [max(1, round(length / scale)) for length in rgb.shape[1::-1]]
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    return [moved(face, scale, 0, 0) for face in detector.detect(small)]


def moved(face: Detection, scale: float, x: float, y: float) -> Detection:
    """A detection in a part of the frame, told in the frame: scaled, then shifted."""
    box = Box(face.box.x0 * scale + x, face.box.y0 * scale + y, face.box.x1 * scale + x, face.box.y1 * scale + y)
    return Detection(box, face.points * scale + (x, y), face.score)
