"""What an edit did: each frame's fate, how good the network is on this face, time and memory; as JSON."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dpe_cli
from dpe_cli.errors import OutputError
from dpe_cli.limits import write_at_once

PSNR_CEILING = 99.0  # dB; stands for "identical", for which JSON has no number
FAR_TURN = 30.0  # degrees; heads that are turned further do not look real (weights/README.md)


class PixelHash:
    """Of the frames of an edit as they were before encoding: the sha256 of the sha256 of each, in order.

    So that parts can be joined: the digests of all frames are those of the parts, one after the other.
    """

    def __init__(self, digests: bytes = b""):
        self.digests = bytearray(digests)  # 32 bytes a frame

    def passing(self, edited: Iterable[Any]) -> Iterator[Any]:
        """Passes on pairs of a job and its edited frame, whose pixels are taken down."""
        for job, frame in edited:
            rgb = frame.rgb if frame.rgb.flags.c_contiguous else frame.rgb.copy()
            self.digests += hashlib.sha256(rgb).digest()
            yield job, frame

    def hexdigest(self) -> str:
        """64 digits."""
        return hashlib.sha256(self.digests).hexdigest()


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
    jitter: float | None = None  # change since the frame before, of 255, where nothing should change: `motion.Jitter`
    track: int | None = None  # number of the face's track, as `dpe faces` lists it; None where the face was not seen
    edit: int = 0  # which of the edits of this pass: each has its own line for a frame
    seam: float | None = None  # colour_step + gradient_step; None where nothing was pasted back
    colour_step: float | None = None  # these three: see `paste.Seam`
    gradient_step: float | None = None
    sharpness: float | None = None
    turn: float | None = None  # degrees that the head is asked to turn by; None where that is not known


@dataclass
class Report:
    """The record of one edit; grows while the edit runs (about 200 bytes a frame)."""

    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)  # weights, their sha256, device, precision
    detector: str = ""
    output: dict[str, Any] = field(default_factory=dict)
    frames: list[FrameFate] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)  # seconds at which a new shot begins, the first one left out
    self_reconstruction: list[tuple[int, float]] = field(default_factory=list)  # sampled frames: index, PSNR in dB
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def remarking(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """What says a remark and keeps it."""

        def remark(message: str) -> None:
            self.notes.append(message)
            say(message)

        return remark

    def counts(self) -> dict[str, Any]:
        """How many frames were edited and passed, and why they were passed.

        A frame with several edits is edited if one of them was done; its reasons are counted for each, and `edits` says
        how many frames each edit changed.
        """
        frames = {frame.index for frame in self.frames}
        edited = {frame.index for frame in self.frames if frame.fate == "edited"}
        reasons = Counter(frame.reason for frame in self.frames if frame.reason)
        counts = {
            "frames": len(frames),
            "edited": len(edited),
            "passed": len(frames - edited),
            "reasons": dict(reasons),
        }
        edits = Counter({frame.edit: 0 for frame in self.frames})
        edits.update(frame.edit for frame in self.frames if frame.fate == "edited")
        return {**counts, "edits": [edits[number] for number in sorted(edits)]} if len(edits) > 1 else counts

    def findings(self) -> list[str]:
        """What a user should know of a result that is there, a line each."""
        found = [] if self.counts()["edited"] else ["no frame was edited"]
        far = [frame for frame in self.frames if frame.turn is not None and frame.turn > FAR_TURN]
        if far:
            most = max(far, key=lambda frame: frame.turn)
            found.append(
                f"heads turned by more than {FAR_TURN:g} degrees do not look real: {len(far)} frames, the most "
                f"{most.turn:g} degrees in frame {most.index}; motion that is relative, or weaker, turns them less"
            )
        return found

    def sort_frames(self, written: int) -> None:
        """Brings the lines of several edits into the order of frames; drops what lies past the last frame written."""
        self.frames = sorted(
            (frame for frame in self.frames if frame.index < written), key=lambda frame: (frame.index, frame.edit)
        )

    def summary(self) -> dict[str, Any]:
        """All but the list of frames, ready for JSON."""
        return {
            "dpe": dpe_cli.__version__,
            "output": self.output,
            "counts": self.counts(),
            "cuts": self.cuts,
            "seconds": round(self.seconds, 3),
            "frames_per_second": round(self.counts()["frames"] / self.seconds, 3) if self.seconds else None,
            "peak_memory_mib": peak_memory(),
            "self_reconstruction": self._self_reconstruction(),
            "jitter": self._jitter(),
            "seam": self._seam(),
            "settings": self.settings,
            "inputs": self.inputs,
            "engine": self.engine,
            "detector": self.detector,
            "notes": self.notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, each frame included."""
        return {**self.summary(), "frames": [asdict(frame) for frame in self.frames]}

    def to_json(self) -> str:
        """Everything as JSON, each frame on a line of its own."""
        head = json.dumps(self.summary(), indent=1, default=str, allow_nan=False).removesuffix("\n}")
        frames = ",\n  ".join(json.dumps(asdict(frame), default=str, allow_nan=False) for frame in self.frames)
        return f'{head},\n "frames": [\n  {frames}\n ]\n}}\n'

    def write(self, path: Path) -> None:
        """Writes the whole report as JSON: to a temporary name, then renamed. Raises OutputError."""
        try:
            write_text(path, self.to_json())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}", "choose another place for --report") from error

    def _self_reconstruction(self) -> dict[str, Any] | None:
        """How near e(S,S), which strength 0 gives, comes to the source crop: PSNR in dB over the sampled frames."""
        values = [value for _, value in self.self_reconstruction]
        if not values:
            return None
        mean = sum(values) / len(values)
        return {"psnr_db": round(mean, 2), "lowest_psnr_db": round(min(values), 2), "samples": len(values)}

    def _jitter(self) -> dict[str, Any] | None:
        """Mean absolute change of the face between frames where nothing should change it, in 1/255: `motion.Jitter`."""
        values = [frame.jitter for frame in self.frames if frame.jitter is not None]
        if not values:
            return None
        return {"mean": round(sum(values) / len(values), 3), "largest": max(values), "frames": len(values)}

    def worst_seam(self) -> FrameFate | None:
        """The frame with the highest seam score; None where nothing was pasted back."""
        return max((frame for frame in self.frames if frame.seam is not None), key=lambda f: f.seam, default=None)

    def _seam(self) -> dict[str, Any] | None:
        """Seam scores and sharpness over all frames that were pasted back."""
        worst, pasted = self.worst_seam(), [frame for frame in self.frames if frame.seam is not None]
        if worst is None:
            return None
        means = {name: sum(getattr(frame, name) for frame in pasted) / len(pasted) for name in ("seam", "sharpness")}
        return {
            "mean": round(means["seam"], 3),
            "worst": worst.seam,
            "worst_frame": worst.index,
            "sharpness": round(means["sharpness"], 3),
        }


def write_text(path: Path, text: str) -> None:
    """Writes `text` so that `path` never exists half-written. Raises OSError."""
    write_at_once(path, text.encode())


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
