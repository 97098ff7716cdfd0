"""Motion files: what a driving does, without its pictures, as safetensors; nothing in one is ever run.

Schema dpe-motion/1, for a video of M frames, N of them with a face, K motion coefficients, latents of L numbers:

    ticks       (M,) int64      time of every frame in the video, in units of `time_base`
    faces       (N,) int64      numbers of the frames with a face, rising; the tensors below go with these
    codes       (N, K) float32  motion coefficients, as the networks give them: not smoothed
    expression  (N, L) float32  what the expression of each code adds to a source's latent (paper section 3.2)
    pose        (N, L) float32  what its pose adds
    boxes       (N, 4) float64  crop boxes x0, y0, x1, y1 in pixels of the video, may reach outside it

Metadata, all text: `schema`, `time_base` (seconds, for instance "1/12800"), `weights` (sha256 of the checkpoint),
`source` and `engine` (JSON: the video; device and precision). An edit reads ticks, faces and codes; expression and pose
follow from codes by the weights and are there for other programs.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dpe_cli.container import bytes_of
from dpe_cli.errors import InputError, OutputError, WeightsError
from dpe_cli.limits import check_file, write_at_once
from dpe_cli.motion import MotionTrack
from dpe_cli.video import VideoInfo, probe

SUFFIX = ".safetensors"
SCHEMA = "dpe-motion/1"


@dataclass(frozen=True)
class Driver:
    """A driving file, read: its pixels are gone, its motion stays."""

    info: VideoInfo
    times: list[Fraction]  # of all its frames, seconds
    track: MotionTrack  # of its frames with a face
    boxes: np.ndarray | None = None  # (N, 4) float64, the crops that gave the track's codes; None: not known
    neutral: int | None = None  # number of the code that relative motion is told against; None: absolute motion

    @property
    def neutral_code(self) -> np.ndarray | None:
        """(K,) or None."""
        return None if self.neutral is None else self.track.codes[self.neutral]


def is_motion_file(path: Path) -> bool:
    """Whether a driving is a motion file, by its name."""
    return path.suffix.lower() == SUFFIX


def probe_driving(path: Path, fps: Fraction | None = None) -> VideoInfo:
    """What a driving says of itself; a motion file says it of its video, less the sound. Raises InputError.

    fps: the rate of an image sequence.
    """
    if not is_motion_file(path):
        return probe(path, fps)
    with reading(path) as file:
        return described(path, checked(path, file.metadata()))


def write_motion(
    path: Path, driver: Driver, expression: np.ndarray, pose: np.ndarray, engine: Mapping[str, Any]
) -> None:
    """Writes a motion file; it appears when it is whole. `engine` is what made the codes. Raises OutputError."""
    base = Fraction(1, math.lcm(*(moment.denominator for moment in driver.times)))
    moments = [float(moment - driver.times[0]) for moment in driver.times]
    tensors = {
        "ticks": np.array([int(moment / base) for moment in driver.times], np.int64),
        "faces": np.searchsorted(moments, driver.track.times).astype(np.int64),
        "codes": driver.track.codes,
        "expression": expression,
        "pose": pose,
        "boxes": driver.boxes,
    }
    info = driver.info
    source = {
        "name": info.path.name,
        "bytes": bytes_of(info.path),
        "width": info.width,
        "height": info.height,
        "fps": str(info.fps),
        "frames": info.n_frames,
        "duration": info.duration,
        "time_base": str(info.time_base),
        "is_image": info.is_image,
    }
    metadata = {
        "schema": SCHEMA,
        "time_base": str(base),
        "weights": str(engine["sha256"]),
        "source": json.dumps(source),
        "engine": json.dumps({**engine, "weights": Path(engine["weights"]).name}),
    }
    try:
        write_at_once(path, save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata))
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path} cannot be written ({error})", "check the folder and the space on the disk"
        ) from error


def read_motion(path: Path, weights: str, length: int | None = None) -> Driver:
    """The driving that a motion file holds, for the weights with this sha256, whose codes have `length` numbers.

    Raises InputError for a file that is damaged or of another schema, WeightsError for one made with other weights.
    """
    with reading(path) as file:
        metadata = checked(path, file.metadata())
        info = described(path, metadata)
        if metadata["weights"] != weights:
            problem = f"{path} was made with other weights (sha256 {metadata['weights'][:12]}, here {weights[:12]})"
            raise WeightsError(problem, "name those with --weights, or extract the motion anew with these")
        try:
            base = fraction(metadata["time_base"])
            ticks, faces, codes, boxes = (file.get_tensor(name) for name in ("ticks", "faces", "codes", "boxes"))
            if ticks.ndim != 1 or (np.diff(ticks) <= 0).any() or faces.min() < 0 or not np.isfinite(codes).all():
                raise ValueError("times do not rise, frame numbers are negative, or codes are not finite")
            if ticks.dtype != np.int64 or faces.dtype != np.int64 or boxes.shape != (len(faces), 4):
                raise ValueError("tensors do not fit together")
            if length is not None and codes.shape[1:] != (length,):
                raise ValueError(f"codes of these weights have {length} numbers")
            if not np.isfinite(boxes).all() or (boxes[:, 2:] <= boxes[:, :2]).any():
                raise ValueError("a box has no area")
            if info.is_image and len(ticks) > 1:
                raise ValueError("a picture has more than one frame")
            times = [int(tick) * base for tick in ticks]
            moments = [float(times[face] - times[0]) for face in faces]
            track = MotionTrack(np.array(moments), codes, float(times[-1] - times[0]))
        except (SafetensorError, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise damaged(path, error) from error
    return Driver(info, times, track, boxes)


def reading(path: Path) -> Any:
    """The open file, a context. Raises InputError."""
    check_file(path)
    try:
        return safe_open(str(path), framework="np")
    except (OSError, SafetensorError) as error:
        if not path.is_file():
            raise InputError(f"{path} is not there", "check the name") from error
        raise damaged(path, error) from error


def checked(path: Path, metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """The metadata of a motion file that we can read. Raises InputError."""
    schema = (metadata or {}).get("schema", "")
    if schema == SCHEMA:
        return metadata
    if schema.startswith("dpe-motion/"):
        remedy = "extract the motion anew, or use the dpe that wrote it"
        raise InputError(f"{path} has the schema {schema}, this dpe reads {SCHEMA}", remedy)
    raise InputError(f"{path} is no motion file", "make one with: dpe extract VIDEO -o motion.safetensors")


def described(path: Path, metadata: Mapping[str, str]) -> VideoInfo:
    """The video that a motion file was made of, under the path of the file. Raises InputError."""
    try:
        source = json.loads(metadata["source"])
        metadata["weights"], metadata["time_base"]
        info = VideoInfo(
            path,
            int(source["width"]),
            int(source["height"]),
            fraction(source["fps"]),
            int(source["frames"]),
            duration=float(source["duration"]),
            time_base=fraction(source["time_base"]),
            is_image=bool(source["is_image"]),
        )
        if not (info.is_image or (info.fps > 0 and info.time_base > 0)):
            raise ValueError("its frame rate is not positive")
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise damaged(path, error) from error
    return info


def fraction(text: str) -> Fraction:
    """Of "30000/1001" or "25", and of nothing else: Fraction would spend hours on "1e999999999". Raises ValueError."""
    numerator, _, denominator = str(text).partition("/")
    return Fraction(int(numerator), int(denominator or 1))


def damaged(path: Path, error: BaseException) -> InputError:
    """In one line."""
    what = (str(error).splitlines() or [""])[0][:120]
    return InputError(f"{path} is damaged or no motion file ({what})", "extract the motion anew")
