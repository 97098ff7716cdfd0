"""The list of all faces of a video, track by track, and a sheet of their pictures: what `dpe faces` shows."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np

from dpe_cli.crop import cut
from dpe_cli.errors import FaceError
from dpe_cli.face import Detection, FaceDetector, crop_box
from dpe_cli.identity import Identity
from dpe_cli.people import TRACK
from dpe_cli.tracking import Seen, track_all
from dpe_cli.video import Frame

FEWEST = 3  # frames, where there are so many: shorter tracks are mostly no faces
THUMBNAIL, CAPTION, COLUMNS = 160, 44, 6  # of the sheet: side and height of text in pixels; pictures in a row
PAPER, INK = (250, 250, 250), (30, 30, 30)


@dataclass(frozen=True)
class TrackSummary:
    """One face in one shot. The fields are those of the JSON."""

    track: int  # its number, for --face track:NUMBER
    person: int  # tracks that look like one person have one number
    shot: int  # from 1
    start: float  # seconds, of its first and last frame
    end: float
    frames: int  # in which it was seen
    size: float  # pixels: mean long side of the detector's box
    confidence: float  # mean score of the detector


@dataclass
class Roster:
    """The faces of a video."""

    frames: int
    cuts: list[float]  # seconds at which new shots begin
    recognised: bool  # by a network; else persons are told apart by colours
    tracks: list[TrackSummary]
    thumbnails: dict[int, np.ndarray]  # (THUMBNAIL, THUMBNAIL, 3) uint8 RGB, by track
    left_out: int  # tracks of fewer than FEWEST frames

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, ready for JSON."""
        listed = {"frames": self.frames, "cuts": self.cuts, "recognition_network": self.recognised}
        return {**listed, "tracks": [asdict(track) for track in self.tracks], "short_tracks_left_out": self.left_out}

    def sheet(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB: each track's best picture with number, person and times. Raises FaceError for none."""
        if not self.tracks:
            raise FaceError("there is no face to show on a sheet", "leave -o out, or use another --detector")
        cells = [self.cell(track) for track in self.tracks]
        columns = min(COLUMNS, len(cells))
        cells += [np.full_like(cells[0], PAPER)] * (-len(cells) % columns)
        return np.vstack([np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)])

    def cell(self, track: TrackSummary) -> np.ndarray:
        """One picture and its caption."""
        caption = np.full((CAPTION, THUMBNAIL, 3), PAPER, np.uint8)
        lines = [f"{TRACK}{track.track}  person {track.person}", f"{clock(track.start)} - {clock(track.end)}"]
        for row, line in enumerate(lines):
            cv2.putText(caption, line, (4, 17 + 18 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
        return np.vstack([self.thumbnails[track.track], caption])


@dataclass
class Entry:
    """A track while it is read."""

    shot: int
    start: float
    signatures: list[np.ndarray]
    end: float = 0.0
    frames: int = 0
    size: float = 0.0  # sums
    score: float = 0.0
    best: float = 0.0  # size times score of the picture kept
    thumbnail: np.ndarray | None = None
    beside: set[int] = field(default_factory=set)  # tracks seen in the same frame

    def add(self, face: Detection, seen: Seen) -> None:
        """One more frame with this face."""
        size = max(face.box.width, face.box.height)
        self.end, self.frames = float(seen.frame.time), self.frames + 1
        self.size, self.score = self.size + size, self.score + face.score
        self.beside |= {other.track for other in seen.faces if other is not face}
        if size * face.score > 1.1 * self.best:  # a new picture for a hair more would cost time at every frame
            self.best = size * face.score
            self.thumbnail = cut(seen.frame.rgb, crop_box(face), THUMBNAIL)[0]


def list_faces(frames: Iterable[Frame], detector: FaceDetector) -> Roster:
    """Tracks all faces; holds a small picture and at most a few signatures of each track, however long the video."""
    identity, entries = Identity(detector), {}
    count, cuts = 0, []
    for seen in track_all(frames, detector, identity):
        count += 1
        if seen.new_shot:
            cuts.append(round(float(seen.frame.time), 6))
        for face in seen.faces:
            if face.track not in entries:
                signatures = seen.signatures[face.track]
                entries[face.track] = Entry(len(cuts) + 1, float(seen.frame.time), signatures)
            entries[face.track].add(face, seen)
    lasting = {number: entry for number, entry in entries.items() if entry.frames >= min(FEWEST, count)}
    persons = tell_persons(lasting, identity)
    tracks = [summary(number, persons[number], entry) for number, entry in lasting.items()]
    thumbnails = {number: entry.thumbnail for number, entry in lasting.items()}
    return Roster(count, cuts, identity.network, tracks, thumbnails, len(entries) - len(lasting))


def summary(number: int, person: int, entry: Entry) -> TrackSummary:
    """The line of one track."""
    times = round(entry.start, 6), round(entry.end, 6)
    means = round(entry.size / entry.frames, 1), round(entry.score / entry.frames, 3)
    return TrackSummary(number, person, entry.shot, *times, entry.frames, *means)


def tell_persons(entries: dict[int, Entry], identity: Identity) -> dict[int, int]:
    """The number of a person, from 1, for each track: that of an earlier track that looks the same and was never seen
    beside it, else a new one.
    """
    persons: list[list[int]] = []  # tracks
    for number, entry in entries.items():
        best, likest = None, 1.0
        for tracks in persons:
            known = [signature for track in tracks for signature in entries[track].signatures]
            if known and entry.signatures and not entry.beside.intersection(tracks):
                likeness = identity.likeness(np.mean(entry.signatures, axis=0), known)
                if likeness >= likest:
                    best, likest = tracks, likeness
        if best is None:
            persons.append([number])
        else:
            best.append(number)
    return {number: person for person, tracks in enumerate(persons, 1) for number in tracks}


def clock(seconds: float) -> str:
    """1:02.5"""
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"
