"""What there is to prepare: files, folders, listings and the LMDB of VoxCeleb, and their frames."""

import contextlib
import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dpe_cli.dataset import CROP
from dpe_cli.errors import InputError
from dpe_cli.video import Frame, decode_image, read_frames

LMDB_RATE = Fraction(25)  # frames a second of VoxCeleb, which that layout does not say
LMDB_FRAMES = 500  # of a video, at most; as the official loader
VIDEOS = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".m4v", ".ts", ".wmv", ".flv"}
OFFSET_RATE = 25  # frames a second in which a listing counts how late a sound is


@dataclass(frozen=True)
class Source:
    """One video, or one video of an LMDB."""

    path: Path  # absolute
    name: str  # begins the names of its clips
    identity: str | None = None  # None: not known
    split: str | None = None  # "train" or "test"; None: not given
    cropped: bool = False  # a square crop of one face already, if it is square
    key: str | None = None  # of a video in an LMDB
    sound_late: float = 0.0  # seconds by which the sound lags behind the picture

    @property
    def id(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}:{self.key}"


def find_sources(inputs: Iterable[Path]) -> list[Source]:
    """All videos that the inputs hold, each once. Raises InputError for an input that is missing or holds none."""
    found: dict[str, Source] = {}
    for path in inputs:
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path} does not exist", "check the name")
        sources = list(sources_in(path.resolve()))
        if not sources:
            raise InputError(f"{path} holds no videos", f"give files or folders of {', '.join(sorted(VIDEOS))}")
        for source in sources:
            found.setdefault(source.id, source)
    return list(found.values())


def sources_in(path: Path) -> Iterator[Source]:
    """The videos of one input."""
    if path.suffix.lower() == ".csv":
        yield from read_listing(path)
    elif path.is_file():
        yield Source(path, path.stem)
    elif (path / "data.mdb").is_file():
        yield from lmdb_sources(path, path.parent)
    elif (path / str(CROP) / "data.mdb").is_file():
        yield from lmdb_sources(path / str(CROP), path)
    elif (path / "index.csv").is_file() and "clip" in columns(path / "index.csv"):
        yield from read_listing(path / "index.csv")
    else:
        for video in sorted(path.rglob("*")):
            if video.suffix.lower() in VIDEOS and video.is_file():
                yield Source(video, flat_name(video.relative_to(path)))


def flat_name(path: Path) -> str:
    return path.with_suffix("").as_posix().replace("/", "_")


@contextlib.contextmanager
def opened_listing(path: Path) -> Iterator[TextIO]:
    """A CSV file to read, with or without the mark that spreadsheets begin theirs with. Raises InputError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}", "save it as CSV in UTF-8") from error


def columns(path: Path) -> list[str]:
    """The first line of a CSV file. Raises InputError."""
    with opened_listing(path) as file:
        return next(csv.reader(file), [])


def read_listing(path: Path) -> Iterator[Source]:
    """Clips that a CSV file lists. Raises InputError if it has no column `clip`, or a row says no clip or no number."""
    if "clip" not in columns(path):
        raise InputError(f"{path} has no column clip", "name the column with the videos' paths so")
    with opened_listing(path) as file:
        reader = csv.DictReader(file)
        rows = [(reader.line_num, row) for row in reader]
    for line, row in rows:
        if not row["clip"]:
            raise InputError(f"{path}, line {line}: no clip is named", "name one, or remove the line")
        late = row.get("av_offset_frames") or "0"
        try:
            seconds = float(late) / OFFSET_RATE
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds):
            raise InputError(f"{path}, line {line}: av_offset_frames {late} is no number", "write for instance -2")
        name, identity = flat_name(Path(row["clip"].lstrip("/"))), row.get("identity_cluster") or None
        yield Source(path.parent / row["clip"], name, identity, cropped=True, sound_late=seconds)


def lmdb_sources(path: Path, root: Path) -> Iterator[Source]:
    """Videos of an LMDB: those of train_list.txt and test_list.txt in `root`, else all."""
    lists = {split: root / f"{split}_list.txt" for split in ("train", "test")}
    names = {
        name: split
        for split, file in lists.items()
        if file.is_file()
        for name in file.read_text(encoding="utf-8").split()
    }
    if not names:
        with opened_lmdb(path) as database, database.begin() as transaction:
            keys = (bytes(key).decode() for key in transaction.cursor().iternext(values=False))
            names = dict.fromkeys(key.removesuffix("-length") for key in keys if key.endswith("-length"))
    for name, split in names.items():
        yield Source(path, name.replace("/", "_"), name.split("#")[0], split, cropped=True, key=name)


def opened_lmdb(path: Path) -> Any:
    """An LMDB environment, to be closed. Raises InputError."""
    try:
        import lmdb
    except ImportError as error:
        raise InputError(f"{path} is an LMDB and the package lmdb is missing", "pip install 'dpe-cli[lmdb]'") from error
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path} cannot be opened as an LMDB: {error}", "check that it is whole") from error


def frames_of(source: Source, step: int) -> Iterator[Frame]:
    """Each step-th frame of a source. Raises InputError."""
    frames = read_frames(source.path) if source.key is None else read_lmdb(source, step)
    return (frame for frame in frames if frame.index % step == 0)


def read_lmdb_start(source: Source) -> tuple[np.ndarray, int]:
    """The first frame, (H, W, 3) uint8 RGB, of a video in an LMDB, and how many it has."""
    with opened_lmdb(source.path) as database, database.begin() as transaction:
        length = transaction.get(f"{source.key}-length".encode())
        if length is None:
            raise InputError(f"{source.key} is not in the LMDB", "check the lists beside it")
    return next(read_lmdb(source, 1)).rgb, min(int(length), LMDB_FRAMES)


def read_lmdb(source: Source, step: int) -> Iterator[Frame]:
    """Each step-th frame of a video in an LMDB."""
    with opened_lmdb(source.path) as database, database.begin() as transaction:
        length = min(int(transaction.get(f"{source.key}-length".encode())), LMDB_FRAMES)
        for index in range(0, length, step):
            data = transaction.get(f"{source.key}-{index:07}".encode())
            if data is None:
                raise InputError(f"frame {index} is missing", "make the LMDB anew")
            rgb = decode_image(np.frombuffer(data, np.uint8), f"frame {index} of {source.key}")
            yield Frame(index, index / LMDB_RATE, rgb)
