"""The chosen people of a video, followed through crossings, gaps and cuts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dpe_cli.errors import FaceError, InputError, UsageError
from dpe_cli.face import Detection, FaceDetector, FaceRecogniser
from dpe_cli.identity import Identity
from dpe_cli.tracking import Seen, track_all
from dpe_cli.video import Frame, read_image

CHOICES = "largest, left, right, center, a number from 0, track:NUMBER of `dpe faces`, or a picture of the person"
TRACK = "track:"
SETTLED = 12  # frames: a first choice that lasted shorter was perhaps no face, and is made again

Choice = Callable[[Seen], Detection | None]
Picked = tuple[Seen, list[Detection | None]]


def track_faces(
    frames: Iterable[Frame], detector: FaceDetector, choose: str = "largest"
) -> Iterator[tuple[Frame, Detection | None]]:
    """Each frame with the chosen person's face, None where it is not seen: `follow` for one person."""
    followed = follow(frames, detector, [choose])
    return ((seen.frame, face) for seen, (face,) in followed)


def follow(
    frames: Iterable[Frame],
    detector: FaceDetector,
    chosen: Sequence[str],
    remark: Callable[[str], None] = lambda message: None,
) -> Iterator[Picked]:
    """Each frame with the face of each chosen person, None where it is not seen.

    A choice is one of CHOICES. It is made at the first frame that has such a face and then stands for that person:
    after a gap or a cut the face must look the same to be taken up again, by the recognition network or, without one,
    by colours; `remark` is told once when colours had to do.

    Raises at once InputError for a choice that means nothing, FaceError if it needs a face pack that is not there;
    at the end FaceError if faces were seen and none was ever the chosen one.
    """
    identity = Identity(detector)
    people = [Person(choose, detector, identity) for choose in chosen]
    return follow_people(track_all(frames, detector, identity), people, detector, remark)


def follow_people(
    tracked: Iterable[Seen], people: list["Person"], detector: FaceDetector, remark: Callable[[str], None]
) -> Iterator[Picked]:
    """One for one, in order."""
    most, warned = 0, False
    for seen in tracked:
        most = max(most, len(seen.faces))
        yield seen, [person.find(seen) for person in people]
        if not warned and any(person.guessed for person in people):
            remark(
                f"people are told apart by place and colours alone, as {detector.name} has no recognition network: "
                "check who is edited after cuts; an insightface pack (--face-models) would know"
            )
            warned = True
    lost = next((person for person in people if most and not person.found), None)
    if lost:
        raise FaceError(
            f"none of the faces seen, at most {most} in a frame, is the one chosen by {lost.choose}",
            "choose by largest, left, right, center, a number from 0, a track of `dpe faces`, or a clearer picture",
        )


class Person:
    """One chosen person: how it was chosen, what is known of its looks and in which track it is now."""

    def __init__(self, choose: str, detector: FaceDetector, identity: Identity):
        self.choose, self.identity = choose, identity
        self.choice, picture = make_choice(choose, detector)
        self.looks = [] if picture is None else [[picture]]  # signatures: of the picture and the tracks it was in
        self.certain = picture is not None  # who is meant
        self.track: int | None = None
        self.others: set[int] = set()  # tracks seen beside it, so of other people
        self.frames = 0  # in which it was seen
        self.found = self.guessed = False

    def find(self, seen: Seen) -> Detection | None:
        """The person's face in the next frame."""
        face = next((face for face in seen.faces if face.track == self.track), None)
        if face is None and seen.faces:
            face = self.recognise(seen)
            over = self.track not in seen.signatures  # or none yet
            if face is None and over and not self.certain and self.frames < SETTLED:
                face = self.choice(seen)
                self.looks, self.others, self.frames = [], set(), 0
            if face is not None:
                self.track = face.track
                self.looks = [*self.looks, seen.signatures[face.track]]
        if face is not None:
            self.frames += 1
            self.found = True
            self.certain |= self.choose.startswith(TRACK)
            self.others |= {other.track for other in seen.faces if other is not face}
        return face

    def recognise(self, seen: Seen) -> Detection | None:
        """The face that looks like the person, if one does."""
        known = [signature for looks in self.looks for signature in looks]
        candidates = [face for face in seen.faces if face.track not in self.others and seen.signatures[face.track]]
        if not known or not candidates:
            return None
        self.guessed |= not self.identity.network
        likeness = [self.identity.likeness(np.mean(seen.signatures[face.track], axis=0), known) for face in candidates]
        best = int(np.argmax(likeness))
        return candidates[best] if likeness[best] >= 1 else None


def make_choice(choose: str, detector: FaceDetector) -> tuple[Choice, np.ndarray | None]:
    """What picks a face of a frame the first time, and, for a choice by picture, the signature of who is wanted."""
    places: dict[str, Choice] = {
        "largest": lambda seen: max(seen.faces, key=lambda face: face.box.width * face.box.height),
        "left": lambda seen: seen.faces[0],
        "right": lambda seen: seen.faces[-1],
        "center": lambda seen: min(seen.faces, key=lambda face: abs(face.box.centre[0] - seen.frame.rgb.shape[1] / 2)),
    }
    if choose in places:
        return places[choose], None
    if choose.isdecimal():
        number = int(choose)
        return (lambda seen: seen.faces[number] if number < len(seen.faces) else None), None
    if track := track_number(choose):
        return (lambda seen: next((face for face in seen.faces if face.track == track), None)), None
    return (lambda seen: None), sign_picture(Path(choose), detector)


def track_number(choose: str) -> int | None:
    """The number in `track:3`, None where another choice is meant. Raises InputError."""
    if not choose.startswith(TRACK):
        return None
    number = choose.removeprefix(TRACK)
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(
            f"no face can be chosen by {choose}", "name a track as `dpe faces` lists them, such as track:3"
        )
    return int(number)


def sign_picture(reference: Path, detector: FaceDetector) -> np.ndarray:
    """The signature of the largest face in a picture. Raises InputError, FaceError."""
    if not reference.is_file():
        wrong = InputError if reference.suffix else UsageError  # a picture that is not there, or no choice at all
        raise wrong(f"no face can be chosen by {reference}", f"use {CHOICES}")
    if not isinstance(detector, FaceRecogniser):
        raise FaceError(
            f"{detector.name} cannot tell whether a face is the one in {reference}",
            "name an insightface pack with --face-models, or choose by largest, left, right, center or a number",
        )
    picture = read_image(reference)
    faces = detector.detect(picture)
    if not faces:
        raise FaceError(f"no face was found in {reference}", "use a picture that shows the person's face")
    return detector.embed(picture, max(faces, key=lambda face: face.box.width * face.box.height))
