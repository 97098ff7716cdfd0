"""The process of a command: what comes before click runs, and how it ends. It loads nothing that takes time."""

import atexit
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130
INTERRUPTED_WORDS = "Interrupted: nothing was left half-written"
STOPPED = 75  # by SIGTERM; can be resumed
AT_ONCE = (INTERRUPTED, STOPPED)


def run() -> NoReturn:
    """`dpe`: runs the command line and ends the process. Not for others, whose process would end too."""
    code: Any = 0
    try:
        signal.signal(signal.SIGTERM, stop)  # until a command heeds it
        open_streams()

        from dpe_cli.main import cli

        cli(prog_name="dpe")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        tell(INTERRUPTED_WORDS)
        code = INTERRUPTED
    if code in AT_ONCE:
        end_at_once(code)
    sys.exit(code)


def stop(*_: Any) -> NoReturn:
    """For a SIGTERM that comes before a command begins, or when it is over."""
    tell("Stopped")
    raise SystemExit(STOPPED)


def tell(line: str) -> None:
    """Writes a line to stderr, past what Python may be writing there."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def end_at_once(code: int) -> NoReturn:
    """Ends the process without Python's own end, which aborts where a thread is still in torch or OpenCV."""
    try:
        atexit._run_exitfuncs()  # ends the processes that multiprocessing started
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(code)


def open_streams() -> None:
    """Puts the empty file where a standard stream is closed: else the next file that is opened would be taken for it.

    What is said to a closed one is lost, as it was; a closed standard input stays None, and nothing can be written to
    a closed standard output as a file (`-o -`).
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run
