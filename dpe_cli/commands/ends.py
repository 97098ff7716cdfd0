"""How a command ends: with its result, with a failure as one line and an exit code, or stopped by a signal."""

import contextlib
import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from dpe_cli.commands.entry import INTERRUPTED, INTERRUPTED_WORDS, STOPPED
from dpe_cli.errors import OutputError

STOP_SECONDS = 8.0
AGAIN_SECONDS = 0.02  # until a signal that was lost is sent again
STOP_WORDS = "Stopped: nothing was left under the output's name"
STOP_RESUMED = "a run with --resume goes on where it was"
STOP_ANEW = "it ran without --resume, the next run begins anew"
STOP_META = "dpe_cli.stopped"  # what is said in place of that where it is known better


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def nobody_reads() -> bool:
    """Whether who read our standard output has closed it, as `head` does."""
    asked = select.poll()
    try:
        asked.register(sys.stdout, 0)
    except OSError:  # it is no file
        return False
    return bool(asked.poll(0))  # nothing was asked for: errors are always told


def tell_result(words: str | Path, result: Path | str) -> None:
    """Says on standard output what a command has made. Raises OutputError where it cannot, which says it too."""
    try:
        click.echo(words)
    except BrokenPipeError:  # nobody reads: see `Command`
        raise
    except OSError as error:
        problem = f"standard output cannot be written: {error.strerror}"
        raise OutputError(problem, f"all else is done: the result is {result}") from error


class Stopped(BaseException):
    """A SIGTERM came: not an error, so that nobody takes it for one."""


@contextlib.contextmanager
def stopping(ctx: click.Context) -> Iterator[threading.Event]:
    """SIGTERM raises Stopped, once; the event says that it came. What is half-written is then cleared away."""
    came, late = threading.Event(), threading.Timer(STOP_SECONDS, end_now, [ctx])
    late.daemon = True
    if threading.current_thread() is not threading.main_thread():
        yield came  # signals are not for others
        return

    lost = threading.Event()

    def stop(*_: Any) -> None:
        if not came.is_set():
            came.set()
            late.start()
        elif not lost.is_set():
            return
        lost.clear()
        raise Stopped

    before = signal.getsignal(signal.SIGTERM)
    try:  # a signal may come as soon as it is heeded
        signal.signal(signal.SIGTERM, stop)
        with heard_again({Stopped: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}, lost):
            yield came
    finally:
        late.cancel()
        if late.ident is not None:
            late.join()  # a thread that meets the end of Python may abort it
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def heard_again(signals: dict[type[BaseException], int], lost: threading.Event) -> Iterator[None]:
    """Sends a signal again whose exception met a place that cannot pass one on, as PyAV's call of a file's `write`.

    `lost` is set before, for a handler to know it from further signals.
    """
    printed, told, timers = sys.excepthook, sys.unraisablehook, []

    def quiet(kind: type[BaseException], *rest: Any) -> None:  # Cython prints it before it tells us
        if kind not in signals:
            printed(kind, *rest)

    def hook(unraisable: Any) -> None:
        number = signals.get(unraisable.exc_type)
        if number is None:
            told(unraisable)
            return
        lost.set()
        timers.append(threading.Timer(AGAIN_SECONDS, send, [number]))
        timers[-1].daemon = True
        timers[-1].start()

    sys.excepthook, sys.unraisablehook = quiet, hook
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = printed, told
        for timer in timers:
            timer.cancel()
            timer.join()


def send(number: int) -> None:
    """Sends a signal to the main thread of this process."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def stop_words(ctx: click.Context) -> str:
    """What goes on where a SIGTERM came, and where: only what ran with --resume has kept its segments."""
    if "resume" not in ctx.params:
        return ctx.meta.get(STOP_META, STOP_WORDS)
    return ctx.meta.get(STOP_META, f"{STOP_WORDS}; {STOP_RESUMED if ctx.params['resume'] else STOP_ANEW}")


def tell_stopped(ctx: click.Context) -> NoReturn:
    """Says what goes on where a SIGTERM came. Raises Exit."""
    click.echo(stop_words(ctx), err=True)
    gc.freeze()  # else Python looks through all it holds before it ends: seconds on a busy machine
    raise click.exceptions.Exit(STOPPED)


def tell_interrupted() -> NoReturn:
    """Answers Ctrl-C. Raises Exit."""
    click.echo(INTERRUPTED_WORDS, err=True)
    raise click.exceptions.Exit(INTERRUPTED) from None


def end_now(ctx: click.Context) -> None:
    """Ends the process where clearing away takes too long: after ten seconds a scheduler would kill it."""
    click.echo(stop_words(ctx), err=True)
    os._exit(STOPPED)
