"""What an edit did, measured with a landmark model that neither training target nor tool shares at run time."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dpe_cli.errors import FaceError
from dpe_cli.landmarks import Landmarker, align, eye_openings, mouth_opening
from dpe_cli.motion import MotionTrack
from dpe_cli.motion_space import MotionSpace
from dpe_cli.video import read_frames


@dataclass(frozen=True)
class Track:
    """Measures of one video, NaN where no face was found."""

    times: np.ndarray  # (N,) seconds from the first frame
    mouth: np.ndarray  # (N,) inner-lip gap over the distance of the outer eye corners
    eyes: np.ndarray  # (N,) mean lid gap over eye width
    rotation: np.ndarray  # (N, 3, 3) head rotation


def measure(video: Path, landmarker: Landmarker, space: MotionSpace) -> Track:
    """Mouth, eyes and head rotation of every frame.

    Raises:
        FaceError: no face in any frame.
    """
    times, mouth, eyes, rotation = [], [], [], []
    for frame in read_frames(video):
        face = landmarker.detect(frame.rgb)
        times.append(float(frame.time))
        mouth.append(np.nan if face is None else mouth_opening(face.points))
        eyes.append(np.nan if face is None else eye_openings(face.points).mean())
        rotation.append(np.full((3, 3), np.nan) if face is None else align(face.points, space.template)[1])
    if not np.isfinite(mouth).any():
        raise FaceError(f"{video}: no face that landmarks can be measured on", "use a video with a visible face")
    times = np.array(times) - times[0]
    return Track(times, np.array(mouth), np.array(eyes), np.array(rotation))


@dataclass(frozen=True)
class Transfer:
    """How far an expression edit followed its driver and left the head alone."""

    frames: int
    mouth_correlation: float  # of the output's mouth opening with the driver's
    eye_correlation: float
    mouth_correlation_unedited: float  # the source's own: the baseline
    eye_correlation_unedited: float
    mouth_range: float  # spread (standard deviation) of the output's opening over the driver's
    eye_range: float
    head_drift_mean: float  # degrees between the output's and the source's head rotation
    head_drift_95: float


def compare(source: Track, driving: Track, output: Track) -> Transfer:
    """Measures an output that has the source's frames, driven in step with a driver played back and forth."""
    track = MotionTrack(driving.times, np.stack([driving.mouth, driving.eyes], -1))
    count = min(len(source.times), len(output.times))
    mouth, eyes = np.stack([track.at(t, "pingpong") for t in source.times[:count]], -1)
    turn = np.einsum("nij,nij->n", source.rotation[:count], output.rotation[:count])
    drift = np.degrees(np.arccos(np.clip((turn - 1) / 2, -1, 1)))

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        known = np.isfinite(a) & np.isfinite(b)
        return float(np.corrcoef(a[known], b[known])[0, 1]) if known.sum() > 2 else float("nan")

    return Transfer(
        count,
        correlation(output.mouth[:count], mouth),
        correlation(output.eyes[:count], eyes),
        correlation(source.mouth[:count], mouth),
        correlation(source.eyes[:count], eyes),
        float(np.nanstd(output.mouth) / np.nanstd(mouth)),
        float(np.nanstd(output.eyes) / np.nanstd(eyes)),
        float(np.nanmean(drift)),
        float(np.nanpercentile(drift, 95)),
    )


def table(rows: dict[str, Transfer]) -> str:
    """Rows of a Markdown table, one edit a line."""
    names = list(asdict(next(iter(rows.values()))))
    lines = ["| edit | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in asdict(row).values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
