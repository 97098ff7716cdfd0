"""What an edit did: each frame's fate, how good the network is on this face, time and memory; as JSON."""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dpe_cli
from dpe_cli.errors import OutputError

PSNR_CEILING = 99.0  # dB; stands for "identical", for which JSON has no number


@dataclass(frozen=True, slots=True)
class FrameFate:
    """What became of one source frame."""

    index: int  # from 0, in the output
    time: float  # seconds, in the source (in the driving for a still source)
    fate: str  # "edited" or "passed"
    reason: str | None  # why it was passed, or how the box came about
    box: tuple[float, float, float, float] | None  # x0, y0, x1, y1 of the crop in pixels of the full frame
    score: float | None  # of the detection
    strength: float | None  # None for a passed frame


@dataclass
class Report:
    """The record of one edit; grows while the edit runs (about 200 bytes a frame)."""

    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)  # weights, their sha256, device, precision
    detector: str = ""
    output: dict[str, Any] = field(default_factory=dict)
    frames: list[FrameFate] = field(default_factory=list)
    self_reconstruction: list[float] = field(default_factory=list)  # PSNR in dB of sampled frames
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def counts(self) -> dict[str, Any]:
        """How many frames were edited and passed, and why they were passed."""
        fates = Counter(frame.fate for frame in self.frames)
        reasons = Counter(frame.reason for frame in self.frames if frame.reason)
        edited, passed = fates["edited"], fates["passed"]
        return {"frames": len(self.frames), "edited": edited, "passed": passed, "reasons": dict(reasons)}

    def summary(self) -> dict[str, Any]:
        """All but the list of frames, ready for JSON."""
        return {
            "dpe": dpe_cli.__version__,
            "output": self.output,
            "counts": self.counts(),
            "seconds": round(self.seconds, 3),
            "frames_per_second": round(len(self.frames) / self.seconds, 3) if self.seconds else None,
            "peak_memory_mib": peak_memory(),
            "self_reconstruction": self._self_reconstruction(),
            "settings": self.settings,
            "inputs": self.inputs,
            "engine": self.engine,
            "detector": self.detector,
            "notes": self.notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, each frame included."""
        return {**self.summary(), "frames": [asdict(frame) for frame in self.frames]}

    def write(self, path: Path) -> None:
        """Writes the whole report as JSON: to a temporary name, then renamed. Raises OutputError."""
        try:
            write_text(path, json.dumps(self.to_dict(), indent=1, default=str, allow_nan=False) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}", "choose another place for --report") from error

    def _self_reconstruction(self) -> dict[str, Any] | None:
        """How near e(S,S), which strength 0 gives, comes to the source crop: PSNR in dB over the sampled frames."""
        values = self.self_reconstruction
        if not values:
            return None
        mean = sum(values) / len(values)
        return {"psnr_db": round(mean, 2), "lowest_psnr_db": round(min(values), 2), "samples": len(values)}


def write_text(path: Path, text: str) -> None:
    """Writes `text` so that `path` never exists half-written. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def peak_memory() -> float | None:
    """Largest resident memory of this process so far, in MiB; None where the system does not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: there getrusage begins with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024 * 1024), 1)  # bytes on macOS, else kilobytes
