"""What several machines know of a clip through the folder of its output: who works on it, and whether it is done.

A claim is a hidden file beside the output, made exclusively and touched while its owner lives. One that is not touched
for `timeout` seconds is stale: whoever exclusively makes the next generation of it has the clip. Nobody ever removes a
claim of somebody else's that might be alive, so two can never hold one clip.

The sidecar, OUTPUT.dpe.json, is the done-marker: it says that the output is whole, and what it was made of.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpe_cli.container import files_of
from dpe_cli.errors import OutputError
from dpe_cli.limits import alive, this_host
from dpe_cli.report import write_text
from dpe_cli.weights import digest

MARKER = ".dpe.json"
BEATS = 6  # heartbeats within the timeout


# Claims


@dataclass
class Claim:
    """A clip that is ours. `lost` is set if somebody took it over, because our heart stood still for too long."""

    output: Path
    timeout: float
    generation: int = 0  # 0: not ours
    taken_over: bool = False  # from an owner who left without a word, perhaps after writing the output
    lost: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    heart: threading.Thread | None = None

    def take(self) -> bool:
        """Whether it is ours now. Raises OutputError if no claim can be made."""
        try:
            newest = max(generations(self.output), default=0)
            if newest and not stale(claim_file(self.output, newest), self.timeout):
                return False
            handle = os.open(claim_file(self.output, newest + 1), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            problem = f"no claim can be made beside {self.output}: {error.strerror}"
            raise OutputError(problem, "name another folder") from error
        self.generation, self.taken_over = newest + 1, newest > 0
        with os.fdopen(handle, "w") as file:
            json.dump({"host": this_host(), "pid": os.getpid()}, file)
        if max(generations(self.output), default=0) != self.generation:  # others went on while we were slow
            claim_file(self.output, self.generation).unlink(missing_ok=True)
            self.generation = 0
            return False
        self.heart = threading.Thread(target=self.beat, daemon=True, name="claim")
        self.heart.start()
        return True

    def beat(self) -> None:
        """Touches the claim until it is released or lost."""
        while not self.stopped.wait(self.timeout / BEATS):
            try:
                os.utime(claim_file(self.output, self.generation))
                if max(generations(self.output), default=0) > self.generation:
                    raise FileNotFoundError
            except FileNotFoundError:
                self.lost.set()
                return
            except OSError:  # a file server that is away for a moment
                continue

    def release(self) -> None:
        """Lets go: our generation last, so that nobody takes an older one for the newest."""
        self.stopped.set()
        if self.heart and self.heart.ident:
            self.heart.join()
        for generation in sorted(generations(self.output) if self.generation else []):
            if generation <= self.generation:
                claim_file(self.output, generation).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(output: Path, timeout: float) -> Iterator[Claim | None]:
    """The claim of an output while it is held, None if somebody has it. Raises OutputError if none can be made."""
    claim = Claim(output, timeout)
    try:
        yield claim if claim.take() else None
    finally:
        claim.release()


def claim_file(output: Path, generation: int) -> Path:
    """Where a claim lies."""
    return output.with_name(f".{output.name}.claim-{generation}")


def generations(output: Path) -> list[int]:
    """The claims of an output that exist."""
    name = re.compile(re.escape(f".{output.name}.claim-") + r"(\d+)")
    return [int(found[1]) for file in os.listdir(output.parent) if (found := name.fullmatch(file))]


def stale(claim: Path, timeout: float) -> bool:
    """Whether its owner is gone: dead, if it ran here, or silent for `timeout` seconds by the clock of the folder."""
    try:
        with claim.open() as file:  # opening asks a file server for what is true now
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return False  # just released: ask again
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(text)
        if owner["host"] == this_host() and not alive(int(owner["pid"])):
            return True
    return now_of(claim.parent) - touched > timeout


def now_of(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder: that of a file server differs from ours."""
    probe = folder / f".dpe-clock-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


# Sidecars


def marker_of(output: Path) -> Path:
    """Where the sidecar of an output lies."""
    return output.with_name(output.name + MARKER)


def can_be_marked(output: Path) -> bool:
    """Whether the name of an output's sidecar is not too long for a file."""
    try:
        marker_of(output).is_dir()
    except OSError:
        return False
    return True


def key_of(settings: Mapping[str, Any], inputs: list[str], weights: str, version: str) -> str:
    """sha256 of all that decides how an output looks: settings, sha256 of inputs and weights, version of the tool."""
    parts = {"settings": settings, "inputs": inputs, "weights": weights, "dpe": version}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """sha256 of a file, of all pictures of a sequence, or of the files of a folder; kept while they do not change."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else files_of(path)
    found = [_digest(file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, changed: int) -> str:
    return digest(file)


def read_marker(output: Path, exactly: bool = False) -> dict[str, Any] | None:
    """What the sidecar says; None if there is none, it is damaged, or the output is not there whole.

    `exactly`: the output is read, and is this very file; else its size is enough.
    """
    try:
        marker = json.loads(marker_of(output).read_text(encoding="utf-8"))
        whole = marker["output"]["bytes"] == size_of(output)
        whole = whole and (not exactly or marker["output"]["sha256"] == digest_of(output))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return marker if whole else None


def write_marker(output: Path, facts: Mapping[str, Any], **of_output: Any) -> None:
    """Writes the sidecar of an output that is whole; `of_output` is what else is said of that. Raises OutputError."""
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    made = {"name": output.name, "bytes": size_of(output), "sha256": digest_of(output), **of_output}
    marker = {**facts, "output": made, "finished": finished}
    marker["mark"] = uuid.uuid4().hex  # tells two makings of the same output apart
    try:
        write_text(marker_of(output), json.dumps(marker, indent=1, default=str) + "\n")
    except OSError as error:
        raise OutputError(f"{marker_of(output)} cannot be written: {error.strerror}", "name another folder") from error


def size_of(output: Path) -> int | None:
    """Bytes of an output, with all pictures of a sequence; None if it is not there."""
    files = files_of(output)
    return sum(file.stat().st_size for file in files) if files else None
