"""What files may be and do: every input is taken for hostile. One setting for the process, which commands make.

A file is opened for itself alone: ffmpeg may read that file and nothing that it names, so playlists and addresses are
refused. Temporary files lie in a hidden folder beside the output, or in the folder of `--temp`; its name says whose it
is, so that the next run there removes what a killed one left.
"""

import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpe_cli.errors import InputError, OutputError

MAX_PIXELS = 8192 * 8192
REMOVALS = 20  # tries, a tenth of a second apart
TEXT_BYTES = 256 << 20  # of a list, a plan, a report, a curve: hours of video have less
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path makes one slash of two
LOCAL = "file,pipe"
ANYWHERE = "file,pipe,crypto,data,http,https,httpproxy,tcp,tls"
# Formats that name other files, and those that read no file at all.
REFERRING = {"hls", "applehttp", "dash", "concat", "sdp", "rtsp", "rtp", "imf", "webm_dash_manifest", "vobsub"}
DEVICES = {"lavfi", "fbdev", "kmsgrab", "video4linux2", "v4l2", "x11grab", "avfoundation", "dshow", "gdigrab", "alsa"}
PLAYLIST = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0", b"[playlist]", b"# VobSub")


@dataclass(frozen=True)
class Limits:
    """What is allowed. None: without limit."""

    network: bool = False  # playlists, and the network for what they name
    pixels: int = MAX_PIXELS  # of one picture
    seconds: float | None = None  # of video or sound
    size: int | None = None  # bytes of an input
    temp: Path | None = None  # folder for temporary files; None: beside the output


_current = Limits()


def limits() -> Limits:
    """Those of this process."""
    return _current


def set_limits(new: Limits) -> None:
    """Makes them those of this process."""
    global _current
    _current = new


def check_file(path: Path, most: int | None = None) -> None:
    """Raises InputError unless `path` is a plain file within the limits: a pipe, or a device, may never end.

    most: bytes that a file of its kind never has. A file that is missing is left to who opens it.
    """
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long for any file
        raise InputError(f"{path} cannot be looked at: {error.strerror}", "check the name") from error
    if not there:
        if ADDRESS.match(str(path)):
            raise InputError(f"{path} is an address, and dpe reads files", "download it, or add --allow-network")
        return
    if not path.is_file():
        raise InputError(f"{path} is not a file", "name a file")
    size, allowed = path.stat().st_size, limits().size
    if allowed is not None and size > allowed:
        raise InputError(f"{path} has {size >> 20} MB, more than the {allowed >> 20} of --max-size", "raise the limit")
    if most is not None and size > most:
        raise InputError(f"{path} has {size >> 20} MB, too many for what it should be", "check the name")


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raises InputError for a picture that is larger than allowed."""
    if width * height > limits().pixels:
        raise InputError(
            f"{path} has pictures of {width} x {height}, more than {limits().pixels} pixels", "raise --max-pixels"
        )


def check_seconds(path: Path, seconds: float) -> None:
    """Raises InputError for a file that lasts longer than allowed."""
    most = limits().seconds
    if most is not None and seconds > most:
        raise InputError(
            f"{path} lasts longer than the {most:g} s of --max-seconds", "raise the limit, or cut the file"
        )


def is_playlist(path: Path) -> bool:
    """Whether a file looks like one that names others; for the words of a refusal alone."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(PLAYLIST)
    return False


@contextlib.contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A hidden folder for temporary files of the making of `output`, removed whatever happens. Raises OutputError.

    In --temp, else beside the output; that of a pipe is the system's.
    """
    where = limits().temp or (None if str(output) == "-" else output.parent)
    with hidden_folder(where) as folder:
        yield folder


@contextlib.contextmanager
def hidden_folder(where: Path | None) -> Iterator[Path]:
    """A hidden folder in `where`, removed whatever happens; None: the system's place for such. Raises OutputError.

    Those that killed processes of this machine left there are removed.
    """
    host = f"{zlib.crc32(repr(this_host()).encode()):08x}"
    parent = Path(where or tempfile.gettempdir())
    remove_orphans(parent, host)
    folder = parent / f".dpe-{host}-{os.getpid()}-{uuid.uuid4().hex}"
    try:  # from before it is there: Ctrl-C may come as soon as it is
        make_folder(folder)
        yield folder
    finally:
        # A program that was just started may still put a file there: emptied once is not always gone.
        for _ in range(REMOVALS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def write_at_once(path: Path, data: bytes) -> None:
    """Writes a file that is never there half-written. Raises OSError.

    Its first name, beside it, is short, as that may be at its limit. Who may read it is as for other files, which is
    not so of those that safetensors writes by itself.
    """
    partial = path.with_name(f".dpe-{uuid.uuid4().hex}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder that is this user's alone. Raises OutputError."""
    try:
        folder.mkdir(mode=0o700)
    except FileNotFoundError as error:
        raise OutputError(f"the folder {folder.parent} does not exist", "make it or name another") from error
    except OSError as error:
        problem = f"nothing can be written in {folder.parent}: {error.strerror}"
        raise OutputError(problem, "name another folder") from error


def remove_orphans(where: Path, host: str) -> None:
    """Removes the hidden folders whose process ran on `host`, which is this machine, and is gone."""
    with contextlib.suppress(OSError):
        for folder in where.glob(f".dpe-{host}-*"):
            owner = folder.name.split("-")[2]
            if owner.isdecimal() and not alive(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


def this_host() -> list[str]:
    """What tells this machine since its start, and this container of it, apart from all others."""
    boot, names = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    started = boot.read_text().strip() if boot.exists() else ""
    return [socket.gethostname(), started, os.readlink(names) if os.path.islink(names) else ""]


def alive(pid: int) -> bool:
    """Whether a process of this machine exists; on Windows, where nobody can be asked without harm, always."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
