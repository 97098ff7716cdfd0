"""Prepared clips and the training samples made of them.

A prepared clip is two files that `prepare.py` makes and describes: `NAME.npy`, the frames of one fixed square crop, and
`NAME.npz`, what was measured on them. `index.csv` says whose face it is and to which split it belongs.

A sample holds a source S and a driving frame D of one clip, and what the paper has no target for: the intermediate
image T (expression of D in the pose of S). T is D's face warped over S by the landmarks; inside one clip that is the
same person in the same light, so T also shows the driving frame's own mouth interior. From the same landmarks come
dense flows S <- T and T <- D (inverse warps) that teach the generators' flow fields directly.
"""

import contextlib
import csv
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from dpe_cli.errors import InputError
from dpe_cli.face import Box, Detection, crop_box
from dpe_cli.landmarks import (
    EYES,
    FACE_OVAL,
    LIPS_INNER,
    LIPS_OUTER,
    five_points,
    head_angles,
    mouth_opening,
    rotation_between,
)
from dpe_cli.mesh import FLOW_SIZE, Mesh, dense_map, polygon, warp
from dpe_cli.motion_space import (
    COORDINATES,
    LARGER,
    POSE_DIM,
    STRAY,
    MotionSpace,
    mean_face,
    mirror_blendshapes,
    mirror_permutation,
    normalise,
)

HELD_OUT = 0.1  # share of the identities that training never sees
# of the 14 expression coordinates
LIDS_AND_GAZE = slice(COORDINATES["lids"].start - POSE_DIM, COORDINATES["gaze"].stop - POSE_DIM)
CROP = 256  # side of the prepared crops, pixels
INDEX = "index.csv"
VIRTUAL = np.array([14.0, 8.0, 7.0])  # spread of virtual turns: yaw, pitch, roll in degrees
VIRTUAL_LIMIT = np.array([40.0, 25.0, 30.0])  # of the angles that they lead to
WIDE = 0.2  # opening of a mouth that counts as 1
HIDDEN, SHOWN = 0.25, 0.7  # shares of an opening that the source has where its inside is unseen and where it is seen
DARK, BRIGHT = 34.0, 171.0  # levels of the inside of a mouth and of teeth: see `initialise.INSIDE`, `TEETH`
TURNED = 10.0  # degrees from which T shows the source's face, bent: the driving's would have to be turned too far
# split: train or test; fps: frames kept a second; start, end: seconds in the source; side: of the crop there, pixels
INDEX_COLUMNS = ["name", "identity", "split", "frames", "fps", "start", "end", "side", "sharpness", "source"]


def is_held_out(identity: str) -> bool:
    """Whether an identity belongs to the test split: a hash decides, so that every machine agrees."""
    return zlib.crc32(identity.encode()) % 1000 < HELD_OUT * 1000


def split_of(folder: Path, held_out: bool) -> list[tuple[Path, str]]:
    """The clips' .npz files of one split and whose faces they show, by name.

    Without an index the identity in each file decides, by `is_held_out`. Raises InputError where that is missing too.
    """
    if (folder / INDEX).is_file():
        with (folder / INDEX).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if (row["split"] == "test") == held_out]
        return [(folder / f"{row['name']}.npz", row["identity"]) for row in rows]
    clips = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as data:
            if "identity" not in data:
                raise InputError(f"{folder} has no {INDEX}: its preparation was broken off", "run dpe prepare again")
            identity = str(data["identity"])
        if is_held_out(identity) == held_out:
            clips.append((path, identity))
    return clips


@dataclass(frozen=True)
class Head:
    """How a head is posed in a picture."""

    scale: float  # pixels
    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,)

    def pose(self, shape: np.ndarray) -> np.ndarray:
        """Points of a shape in the head's frame, in the picture. (478, 3) -> (478, 3)"""
        return self.scale * shape @ self.rotation.T + self.translation


@dataclass
class Clip:
    """One prepared clip with everything that is computed once."""

    frames: np.ndarray  # (N, H, W, 3) uint8, memory-mapped or resized
    points: np.ndarray  # (N, 478, 3) pixels of a 256 crop
    shapes: np.ndarray  # (N, 478, 3) in the head's frame
    scale: np.ndarray  # (N,)
    rotation: np.ndarray  # (N, 3, 3)
    translation: np.ndarray  # (N, 3)
    expression: np.ndarray  # (N, 14)
    mirrored: np.ndarray  # (N, 14) of the mirrored face
    identity: str
    name: str

    def __len__(self) -> int:
        return len(self.points)

    def head(self, index: int) -> Head:
        """The head's pose in one frame."""
        return Head(self.scale[index], self.rotation[index], self.translation[index])

    @cached_property
    def opening(self) -> np.ndarray:
        """How far the mouth is open, in units of a wide opening. (N,)"""
        return mouth_opening(self.shapes) / WIDE


def load_clips(folder: Path, space: MotionSpace | None, held_out: bool, size: int) -> tuple[list[Clip], MotionSpace]:
    """Reads the prepared clips of one split; fits the motion space on them when none is given.

    Raises:
        InputError: no prepared clip of this split in the folder.
    """
    raw = []
    for path, identity in split_of(Path(folder), held_out):
        with np.load(path) as data:
            raw.append((path, data["points"], data["blendshapes"], identity))
    if not raw:
        split = "test" if held_out else "train"
        raise InputError(f"{folder}: no prepared clips to {split} on", f"prepare some: dpe prepare VIDEOS -o {folder}")
    if space is None:
        template = mean_face(np.concatenate([points[::40] for _, points, _, _ in raw]))
        space = MotionSpace.fit([(points[::3], scores[::3]) for _, points, scores, _ in raw], template)
    allow_open_files()
    mirror = mirror_permutation(space.template)
    return [_clip(*item, space, mirror, size) for item in raw], space


def _clip(
    path: Path, points: np.ndarray, scores: np.ndarray, identity: str, space: MotionSpace, mirror: np.ndarray, size: int
) -> Clip:
    shapes, scale, rotation, translation = normalise(points, space.template)
    mirrored = shapes[:, mirror] * [-1, 1, 1]
    return Clip(
        load_frames(path.parent, path.stem, size), points, shapes, scale, rotation, translation,
        space.expression(shapes, scores), space.expression(mirrored, mirror_blendshapes(scores)), identity, path.stem,
    )  # fmt: skip


def load_frames(folder: Path, name: str, size: int) -> np.ndarray:
    """The frames of a prepared clip. (N, size, size, 3) uint8, left in their file where they have that size"""
    frames = np.load(folder / f"{name}.npy", mmap_mode="r")
    if size < frames.shape[1]:
        frames = np.stack([cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in frames])
    return frames


def allow_open_files() -> None:
    """Lifts the limit of open files as far as this process may: frames that are left in their files keep these open."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def face_at(points: np.ndarray) -> Detection:
    """What a face detector would say of a face with these landmarks. points: (478, >=2) pixels"""
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    return Detection(Box(*low, *high), five_points(points), 1.0)


def region_weights(points: np.ndarray, size: float, resolution: int) -> np.ndarray:
    """Loss weights: mouth and eyes are 3 % of the pixels and most of the message. (R, R) float32 >= 1"""
    fine = np.zeros((resolution, resolution), np.uint8)
    for part in (LIPS_OUTER, *EYES):
        fine = np.maximum(fine, polygon(points, part, size, resolution))
    reach = max(3, resolution // 16) | 1
    fine = cv2.blur(cv2.dilate(fine, np.ones((reach, reach), np.uint8)), (reach, reach))
    face = cv2.blur(polygon(points, FACE_OVAL, size, resolution), (reach, reach))
    return (1 + 1.5 * face.astype(np.float32) / 255 + 5 * fine.astype(np.float32) / 255).astype(np.float32)


# A crop: an angle (radians), a scale and a shift (pixels) about a point, and that point (pixels).
Framing = tuple[float, float, np.ndarray, np.ndarray]


def kept_near(first: Box, face: Box) -> Box:
    """The crop of one face for another of its clip, moved after it as far as that goes beyond the limits."""
    octaves = float(np.log2(face.width / first.width))
    side = first.width * 2.0 ** (octaves - np.clip(octaves, -LARGER, LARGER))
    offset = np.subtract(face.centre, first.centre)
    stray = max(1.0, float(np.hypot(*offset)) / (STRAY * side))
    return Box.square(*(first.centre + offset * (1 - 1 / stray)), side)


def around(points: np.ndarray, size: float, resolution: int, face_weight: float) -> np.ndarray:
    """Loss weights of what surrounds a face: 1, in its inside `face_weight`. (R, R) float32"""
    face = polygon(points, FACE_OVAL, size, resolution)
    reach = max(3, resolution // 16) | 1
    inside = cv2.blur(cv2.erode(face, np.ones((reach, reach), np.uint8)), (reach, reach)).astype(np.float32) / 255
    return 1 - (1 - face_weight) * inside


# --- samples -------------------------------------------------------------------------------------------------------


class Sampler:
    """Endless training samples. Every worker needs its own seed.

    With `codes_only` a sample has only what codes are learnt from. Else it is a dict of arrays (R = resolution of the
    pictures, F = FLOW_SIZE):
      source, target, driving: (3, R, R) uint8: S, T and D of the module's docstring;
      source_code, driving_code: (20,) float32 motion coordinates of S and D;
      exp_flow, pose_flow: (2, F, F) float32 sampling positions in [-1, 1] (pixel centres): T from S, D from T;
      exp_valid, pose_valid: (F, F) float32, where the flows are known; weight: (R, R) of T; pose_weight: (R, R) of D;
      seen: (F, F) float32 in [0, 1], 0 inside of a mouth of T that is shut in S: no flow finds it there;
      bright: (F, F) float32 in [0, 1], T's light between that of an open mouth's dark and that of teeth.

    eye_share: of the pairs, those chosen by how far lids and gaze are apart. eye_weight: how much more the eyes' flow
    counts: lids move by a pixel or two of the flow where lips move by ten, and errors count by their square.
    open_share: those in which a mouth opens; turn_share: those in which the head turns. virtual_share: of all pairs,
    those whose D is T turned by its landmarks' depth: any head at any angle, but only what T shows of the face counts.
    face_weight: below 1, pose_weight is this in the face and 1 around it: hair, neck and background learn.
    still_camera: D is framed as S is, and not by its own face: heads move in the crop, what stands still stays.
    """

    def __init__(
        self, clips: list[Clip], mesh: Mesh, seed: int, augment: bool = True, codes_only: bool = False,
        eye_share: float = 0.0, eye_weight: float = 1.0, open_share: float = 0.0, turn_share: float = 0.0,
        virtual_share: float = 0.0, face_weight: float = 1.0, still_camera: bool = False,
    ):  # fmt: skip
        self.mesh = mesh
        self.random = np.random.default_rng(seed)
        self.augment, self.codes_only = augment, codes_only
        self.eye_share, self.eye_weight = eye_share, eye_weight
        self.open_share, self.turn_share, self.virtual_share = open_share, turn_share, virtual_share
        self.face_weight, self.still_camera = face_weight, still_camera
        self.mirror = mirror_permutation(mesh.template)
        people: dict[str, list[Clip]] = {}
        for clip in clips:
            people.setdefault(clip.identity, []).append(clip)
        self.people = list(people.values())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield self.sample()

    def pick(self) -> tuple[Clip, int, int]:
        """A clip and two of its frames: likely far apart in expression, and not too far in pose."""
        person = self.people[self.random.integers(len(self.people))]
        clip = person[self.random.integers(len(person))]
        s = int(self.random.integers(len(clip)))
        if self.random.random() < 0.1:
            return clip, s, s
        what = self.random.random() - self.eye_share
        if what < 0:
            apart = np.linalg.norm((clip.expression - clip.expression[s])[:, LIDS_AND_GAZE], axis=1)
            return clip, s, int((2 * apart + self.random.gumbel(0, 1.0, len(clip))).argmax())
        if what < self.open_share:
            s = int((self.random.gumbel(0, 0.3, len(clip)) - clip.opening).argmax())
            return clip, s, self.opened(clip, s)
        if what < self.open_share + self.turn_share:
            turned = np.minimum(turns(clip, s), 30) / 6
            return clip, s, int((turned + self.random.gumbel(0, 1.0, len(clip))).argmax())
        others = self.random.integers(0, len(clip), 6)
        difference = np.linalg.norm(clip.expression[others] - clip.expression[s], axis=1)
        score = difference - 0.15 * np.maximum(turns(clip, s)[others] - 6, 0) + self.random.gumbel(0, 1.0, len(others))
        return clip, s, int(others[score.argmax()])

    def opened(self, clip: Clip, s: int) -> int:
        """A frame of the clip whose mouth is likely open further, the head nearly as in frame s."""
        score = 4 * (clip.opening - clip.opening[s]) - 0.1 * np.maximum(turns(clip, s) - 6, 0)
        return int((score + self.random.gumbel(0, 0.7, len(clip))).argmax())

    def sample(self) -> dict[str, np.ndarray]:
        """One sample, framed as the tool frames faces; mirror and colour are alike in all three pictures."""
        clip, s, d = self.pick()
        virtual = self.random.random() < self.virtual_share
        d = s if virtual else d
        size = float(CROP)
        source, driving = np.asarray(clip.frames[s]), np.asarray(clip.frames[d])
        here, there = clip.head(s), clip.head(d)
        if virtual:
            there = replace(there, rotation=self._turned(there.rotation))
        source_points, driving_points = clip.points[s], there.pose(clip.shapes[d]) if virtual else clip.points[d]
        # L_T: the driving expression's shape, posed as the source (reference: pseudo-pairs inside one clip).
        target_points = here.pose(clip.shapes[d])
        flip = self.augment and self.random.random() < 0.5
        one = self._framing(source_points)
        two = self._framed_alike(one, driving_points) if self.still_camera else self._framing(driving_points)
        source, source_points, source_pose = self._move(source, source_points, here, one, flip)
        _, target_points, _ = self._move(None, target_points, here, one, flip)
        driving, driving_points, driving_pose = self._move(driving, driving_points, there, two, flip)
        if self.codes_only:
            source, driving = self._spoil(*self._colour(source)), self._spoil(*self._colour(driving))
        else:
            source, driving = self._colour(source, driving)
        codes = clip.mirrored if flip else clip.expression
        learnt = {
            "source": _planes(source),
            "driving": _planes(driving),
            "source_code": np.concatenate([source_pose, codes[s]]).astype(np.float32),
            "driving_code": np.concatenate([driving_pose, codes[d]]).astype(np.float32),
            "source_points": self._ordered(source_points, flip),
            "driving_points": self._ordered(driving_points, flip),
        }
        if self.codes_only:
            return learnt

        place = self.mesh.locate(target_points, size)
        from_source = dense_map(place, target_points, source_points, size)
        if virtual or turns(clip, s)[d] > TURNED:
            target = warp(source, from_source, size)
        else:
            from_driving = dense_map(place, target_points, driving_points, size)
            target = self._compose(source, driving, from_source, from_driving, target_points, size)
        place = self.mesh.locate(driving_points, size)
        pose_flow = dense_map(place, driving_points, target_points, size)
        resolution = source.shape[0]
        pose_valid = _valid(driving_points, size, 0.0)
        if self.face_weight < 1:
            pose_weight = around(driving_points, size, resolution, self.face_weight)
        else:
            pose_weight = region_weights(driving_points, size, resolution)
        if virtual:
            learnt["driving"] = _planes(warp(target, pose_flow, size))
            shown = self.mesh.facing(place, driving_points, target_points)
            pose_valid *= shown
            pose_weight *= cv2.resize(shown, (resolution, resolution), interpolation=cv2.INTER_LINEAR)
        return learnt | {
            "target": _planes(target),
            "exp_flow": _positions(from_source, size), "pose_flow": _positions(pose_flow, size),
            "exp_valid": _valid(target_points, size, 0.3, self.eye_weight),
            "pose_valid": pose_valid,
            "weight": region_weights(target_points, size, resolution),
            "pose_weight": pose_weight,
            "seen": _seen(target_points, clip.opening[s], clip.opening[d], size),
            "bright": _brightness(target),
        }  # fmt: skip

    def _turned(self, rotation: np.ndarray) -> np.ndarray:
        """A head turned further, by angles as heads have them in videos. (3, 3) -> (3, 3)"""
        for _ in range(10):
            angles = np.clip(self.random.normal(0, VIRTUAL), -2 * VIRTUAL, 2 * VIRTUAL)
            other = Rotation.from_euler("yxz", angles, degrees=True).as_matrix() @ rotation
            if (np.abs(head_angles(other)) < VIRTUAL_LIMIT).all():
                return other
        return rotation

    def _framing(self, points: np.ndarray) -> Framing:
        """The crop that the tool would cut around this face, a little off at random."""
        box = crop_box(face_at(points))
        scale, centre = CROP / box.width, np.array(box.centre)
        if not self.augment:
            return 0.0, scale, np.zeros(2), centre
        angle = np.radians(np.clip(self.random.normal(0, 4), -10, 10))
        scale *= float(np.exp(np.clip(self.random.normal(0, 0.06), -0.15, 0.15)))
        return angle, scale, np.clip(self.random.normal(0, 0.02, 2), -0.06, 0.06) * CROP, centre

    @staticmethod
    def _framed_alike(framing: Framing, points: np.ndarray) -> Framing:
        """The crop of one face for another of its clip: see `kept_near`."""
        angle, scale, shift, about = framing
        box = kept_near(Box.square(*about, CROP / scale), crop_box(face_at(points)))
        return angle, CROP / box.width, shift, np.array(box.centre)

    def _move(
        self, image: np.ndarray | None, points: np.ndarray, head: Head, framing: Framing, flip: bool
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """Applies mirror and framing to a picture, its points and its pose coordinates."""
        angle, scale, shift, about = framing
        size = float(CROP)
        mirror = np.diag([-1.0, 1, 1]) if flip else np.eye(3)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        middle = np.array([size / 2, size / 2, 0])
        linear = scale * turn @ mirror
        offset = middle + np.append(shift, 0) - linear @ np.append(about, 0)
        moved = points @ linear.T + offset
        rotation = turn @ mirror @ head.rotation @ mirror
        centre = (linear @ head.translation + offset)[:2]
        pose = MotionSpace.pose(np.array([head.scale * scale]), rotation[None], centre[None], size)[0]
        if image is not None:
            ratio = image.shape[0] / size
            # A pixel's centre is at +0.5 in the points' coordinates, at +0 in OpenCV's.
            half = np.array([0.5, 0.5])
            affine = np.c_[linear[:2, :2], offset[:2] * ratio + linear[:2, :2] @ half - half]
            image = cv2.warpAffine(
                image, affine, image.shape[:2], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
        return image, moved, pose

    def _colour(self, *images: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same gain, gamma and tint for all pictures."""
        if not self.augment or self.random.random() < 0.3:
            return images
        gain = np.exp(self.random.normal(0, 0.1)) * np.exp(self.random.normal(0, 0.04, 3))
        gamma = np.exp(self.random.normal(0, 0.12))
        levels = np.arange(256)[:, None] / 255
        table = np.clip(levels**gamma * gain * 255, 0, 255).astype(np.uint8)[None]
        return tuple(cv2.LUT(image, table) for image in images)

    def _ordered(self, points: np.ndarray, flip: bool) -> np.ndarray:
        """Landmarks as they are learnt: (956,) float32, x, y in [-1, 1] of the crop, left and right by the picture."""
        if flip:
            points = points[self.mirror]
        return (points[:, :2] / CROP * 2 - 1).astype(np.float32).ravel()

    def _spoil(self, image: np.ndarray) -> np.ndarray:
        """What cameras and codecs do: lost detail, block edges, grain, no colour, a covered patch. (R, R, 3) uint8"""
        if not self.augment:
            return image
        random, size = self.random, image.shape[0]
        if random.random() < 0.3:
            small = max(16, int(size / random.uniform(1.2, 2.5)))
            image = cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size))
        if random.random() < 0.3:
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(25, 90))]
            image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
        if random.random() < 0.3:
            grain = random.normal(0, random.uniform(2, 10), image.shape)
            image = np.clip(image + grain, 0, 255).astype(np.uint8)
        if random.random() < 0.1:
            image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
        if random.random() < 0.2:
            side = int(size * random.uniform(0.08, 0.2))
            top, left = random.integers(0, size - side, 2)
            image = image.copy()
            image[top : top + side, left : left + side] = random.integers(0, 256, 3)
        return image

    @staticmethod
    def _compose(
        source: np.ndarray, driving: np.ndarray, from_source: np.ndarray, from_driving: np.ndarray,
        points: np.ndarray, size: float,
    ) -> np.ndarray:  # fmt: skip
        """T: the driving face warped into the source's pose, over the source bent to the new jaw line."""
        resolution = source.shape[0]
        under, face = warp(source, from_source, size), warp(driving, from_driving, size)
        mask = polygon(points, FACE_OVAL, size, resolution)
        reach = max(3, resolution // 24) | 1
        mask = cv2.erode(mask, np.ones((reach, reach), np.uint8))
        mask = cv2.GaussianBlur(mask, (2 * reach + 1, 2 * reach + 1), 0).astype(np.float32)[..., None] / 255
        return np.round(face * mask + under * (1 - mask)).astype(np.uint8)


def _planes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _positions(where: np.ndarray, size: float) -> np.ndarray:
    """Pixels of a crop to [-1, 1] with -1 and 1 at its edges (grid_sample's align_corners=False)."""
    return np.ascontiguousarray((where / size * 2 - 1).transpose(2, 0, 1))


def turns(clip: Clip, index: int) -> np.ndarray:
    """By how many degrees the head is turned in each frame of a clip against one of them. (N,)"""
    return rotation_between(clip.rotation, clip.rotation[index])


def _seen(target: np.ndarray, before: float, after: float, size: float) -> np.ndarray:
    """What the source shows of the target's face: less inside of a mouth that was shut, by its `Clip.opening`."""
    seen = np.ones((FLOW_SIZE, FLOW_SIZE), np.float32)
    if after > 0.2:
        share = np.clip((before / after - HIDDEN) / (SHOWN - HIDDEN), 0, 1)
        seen[polygon(target, LIPS_INNER, size, FLOW_SIZE) > 0] = share
    return seen


def _brightness(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (F, F): how far each pixel is from DARK to BRIGHT, in [0, 1]"""
    small = cv2.resize(image, (FLOW_SIZE, FLOW_SIZE), interpolation=cv2.INTER_AREA).mean(-1, dtype=np.float32)
    return np.clip((small - DARK) / (BRIGHT - DARK), 0, 1)


def _valid(target: np.ndarray, size: float, outside: float, eye_weight: float = 1.0) -> np.ndarray:
    """Weights of the flow: the loss's on the face, `outside` elsewhere, 0 in an open mouth (it comes from nowhere)."""
    face = polygon(target, FACE_OVAL, size, FLOW_SIZE).astype(np.float32) / 255
    mouth = polygon(target, LIPS_INNER, size, FLOW_SIZE) > 0
    weight = np.maximum(face, outside) * region_weights(target, size, FLOW_SIZE)
    if eye_weight != 1:
        eyes = np.maximum(*(polygon(target, eye, size, FLOW_SIZE) for eye in EYES))
        reach = (
            cv2.dilate(eyes, np.ones((9, 9), np.uint8)).astype(np.float32) / 255
        )  # lids and the skin they draw along
        weight = weight * (1 + (eye_weight - 1) * reach)
    return np.where(mouth, 0, weight).astype(np.float32)
