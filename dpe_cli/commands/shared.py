"""What commands have in common: failures as one line and an exit code, options, progress, tables."""

import contextlib
import errno
import functools
import gc
import json
import math
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from dpe_cli.commands import layers
from dpe_cli.commands.entry import INTERRUPTED, INTERRUPTED_WORDS, STOPPED
from dpe_cli.errors import DPEError, InputError, OutputError
from dpe_cli.limits import MAX_PIXELS, limits, set_limits

MODES = ("exp", "pose", "both")
LIMITS = ("allow-network", "max-pixels", "max-seconds", "max-size", "temp")
STOP_SECONDS = 8.0
AGAIN_SECONDS = 0.02  # until a signal that was lost is sent again
STOP_WORDS = "Stopped: nothing was left under the output's name"
STOP_RESUMED = "a run with --resume goes on where it was"
STOP_ANEW = "it ran without --resume, the next run begins anew"
STOP_META = "dpe_cli.stopped"  # what is said in place of that where it is known better
OUT_OF_MEMORY = 6
MEMORY_WORDS = "the memory is used up; use a smaller --batch-size"
NO_MEMORY = ("Insufficient memory", "not enough memory", "Cannot allocate memory")  # of OpenCV, torch, the system
TABLE_WIDTH = 120  # where there is no terminal
LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal
MACHINE_SECONDS = 1.0  # between two lines for a program
PROGRESS = ("auto", "bar", "plain", "json", "openjd", "none")
PROGRESS_META = "dpe.progress"  # the choice, in the `meta` that all contexts of a run share
SPOOLED = "dpe.spooled"  # the file that standard input went to, in the `meta` that all contexts of a run share
FETCHED = "dpe.fetched"  # files that came from the network, in the `meta` that all contexts of a run share
WRITTEN = ("output", "report", "preview", "results", "path")  # parameters that are no inputs
FOLDER = click.Path(path_type=Path, file_okay=False)
FPS = {"metavar": "RATE", "help": "Rate of image sequences like in_%06d.png.  [default: 25]"}
# those of encoding.py, which --help must not load
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
PRESETS += ("p1", "p2", "p3", "p4", "p5", "p6", "p7")
WEIGHTS = {"metavar": "PATH|NAME", "help": "Checkpoint: our .safetensors, an official .pt, or a name."}


class File(click.Path):
    """A file's name. A missing input is our error 3, not click's 2.

    With --allow-network an http address is fetched, once, into a temporary file that goes when the command ends.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        wanted = isinstance(value, str) and value.startswith(("http://", "https://")) and limits().network
        if not wanted or ctx is None or param is None or param.name in WRITTEN:
            return super().convert(value, param, ctx)
        from dpe_cli.container import fetched

        try:
            file = ctx.with_resource(fetched(value))
        except DPEError as error:
            raise Failure(str(error), error.exit_code) from error
        ctx.meta.setdefault(FETCHED, set()).add(file)
        return file


FILE = File()


class Finite(click.FloatRange):
    """A number in a range, which inf and nan are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


SECONDS = {"type": Finite(min=0), "metavar": "SECONDS"}


def check_named(ctx: click.Context, source: Path) -> None:
    """Raises click.UsageError for a source from the network: what is made of it has no place beside it."""
    if source in ctx.meta.get(FETCHED, ()):
        raise click.UsageError("an address gives the output no name: give --output")


def check_standard_output(ctx: click.Context) -> None:
    """Raises click.UsageError for text that would go where the video goes."""
    said = ["--json"] if ctx.params["as_json"] else []
    said += ["--progress openjd"] if ctx.meta.get(PROGRESS_META) == "openjd" else []
    if said and str(ctx.params["output"]) == "-":
        raise click.UsageError(f"{said[0]} and the video cannot both go to standard output")


def check_stays(ctx: click.Context, what: str) -> None:
    """Raises click.UsageError for an input from the network: `what` is for later runs, for which it is not there."""
    if ctx.meta.get(FETCHED):
        raise click.UsageError(f"{what} cannot go with an address, whose file goes when the command ends: download it")


def from_pipe(ctx: click.Context, source: Path, output: Path) -> Path:
    """`source`, or for `-` a temporary file of what standard input gives, which is called so in all that is said.

    Raises what `container.spooled` does.
    """
    from dpe_cli.container import spooled

    file = ctx.with_resource(spooled(source, getattr(sys.stdin, "buffer", None), output))
    if file != source:
        ctx.meta[SPOOLED] = file
    return file


def as_known(ctx: click.Context | None, words: str) -> str:
    """The same with what the user knows standard input by, see `from_pipe`."""
    file = ctx.meta.get(SPOOLED) if ctx else None
    return words.replace(str(file), "standard input") if file else words


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class Command(click.Command):
    """A command whose failures become one line and the right exit code; -v adds the traceback of a bug.

    Its settings come in layers, see `layers`.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        layers.prepare(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        layers.apply(ctx)
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param and (origin := layers.origin(ctx, error.param)) not in ("flag", "default"):
                error.message += f" (from {origin})"
            raise

    def invoke(self, ctx: click.Context) -> Any:
        root = ctx.find_root().command
        if isinstance(root, click.Group) and not ctx.params.get("quiet"):
            for name, close in layers.misspelt(root):
                click.echo(f"{name} is no setting and means nothing; is it {close}?", err=True)
        try:
            with stopping(ctx) as stopped:
                try:
                    return self.invoke_or_fail(ctx)
                except Stopped:
                    pass
                except click.exceptions.Exit:
                    raise
                except BaseException:  # such as of an ffmpeg that was stopped with us
                    if not stopped.is_set():
                        raise
                tell_stopped(ctx)
        except Stopped:  # it came while we made ready for it
            tell_stopped(ctx)

    def invoke_or_fail(self, ctx: click.Context) -> Any:
        """With failures as click knows them."""
        try:
            return self.attempt(ctx)
        except Failure as failure:
            if ctx.meta.get(PROGRESS_META) == "openjd":
                click.echo(f"openjd_fail: {failure.message}")
            raise

    def attempt(self, ctx: click.Context) -> Any:
        """Invokes the command. Raises Failure for everything that is not click's own."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except DPEError as error:
            raise Failure(as_known(ctx, str(error)), error.exit_code) from error
        except KeyboardInterrupt:
            tell_interrupted()
        except MemoryError as error:
            raise Failure(MEMORY_WORDS, OUT_OF_MEMORY) from error
        except Exception as error:
            if isinstance(error, BrokenPipeError) and nobody_reads():
                raise  # click ends without a word, as other programs do
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                problem = f"{error.filename} is longer than the name of a file may be; name a file that is there"
                raise Failure(problem, InputError.exit_code) from error
            if any(words in str(error) for words in NO_MEMORY):
                raise Failure(MEMORY_WORDS, OUT_OF_MEMORY) from error
            if ctx.params.get("verbose"):
                traceback.print_exc()
            what = f"unexpected {type(error).__name__}: {error}"
            raise Failure(what if ctx.params.get("verbose") else f"{what}; run with -v for the traceback", 1) from error


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


class Cli(click.Group):
    """The group of our commands."""

    command_class = Command
    group_class = type

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt:
            tell_interrupted()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # while options were read, which for click is its code 1
            tell_interrupted()


def shared_options(function: Callable) -> Callable:
    """Options of commands that run one checkpoint: --weights and `machine_options`."""
    return click.option("--weights", **WEIGHTS)(machine_options(function))


def detector_options(function: Callable) -> Callable:
    """Options of every command that looks for faces: --detector, --face-models and `limit_options`."""
    function = limit_options(function)
    function = click.option("--face-models", type=FILE, help="Folder or file of the detector's models.")(function)
    choices = "auto, centerface, insightface, yunet or mediapipe."
    return click.option("--detector", default="auto", show_default=True, help=choices)(function)


def limit_options(function: Callable) -> Callable:
    """Options of every command that opens media: what files may be, for the whole process."""

    def keep(field: str, unit: int = 1) -> Callable:
        def callback(ctx: click.Context, param: click.Parameter, value: Any) -> None:
            value = value * unit if type(value) is int else value
            if isinstance(value, Path) and not value.is_dir():
                error = OutputError(f"the folder {value} does not exist", "make it or name another")
                raise Failure(str(error), error.exit_code)
            set_limits(replace(limits(), **{field: value}))

        return callback

    options = [
        click.option(
            "--allow-network", is_flag=True, expose_value=False, callback=keep("network"), envvar="DPE_ALLOW_NETWORK",
            is_eager=True, help="Fetch http addresses; open playlists, and what they name, on the network too.",
        ),
        click.option(
            "--max-pixels", type=click.IntRange(1), default=MAX_PIXELS, show_default=True, expose_value=False,
            callback=keep("pixels"), metavar="N", help="Refuse pictures of more pixels.",
        ),
        click.option(
            "--max-seconds", type=Finite(0, min_open=True), expose_value=False, callback=keep("seconds"),
            metavar="S", help="Refuse longer video and sound.",
        ),
        click.option(
            "--max-size", type=click.IntRange(1), expose_value=False, callback=keep("size", 1 << 20), metavar="MB",
            is_eager=True,
            help="Refuse larger files.",
        ),
        click.option(
            "--temp", type=FOLDER, expose_value=False, callback=keep("temp"), is_eager=True,
            help="Folder for temporary files.  [default: beside the output]",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def checked_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The name of a device, there or not. Raises click.BadParameter for what is none."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise click.BadParameter(f"there is no device {value}: use auto, cpu, cuda, cuda:N or mps.")
    return value


def machine_options(function: Callable) -> Callable:
    """Options of every command that runs the networks: --device, --precision, --backend, --batch-size, -q, -v."""
    options = [
        click.option(
            "--device", default="auto", show_default=True, callback=checked_device,
            help="auto, cpu, cuda, cuda:N or mps.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
            default="auto",
            show_default=True,
            help="Number format of the networks; int8 is for CPUs and not exact.",
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "torch", "compile", "onnx", "openvino"]),
            default="auto",
            show_default=True,
            help="What runs the networks.",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), help="Frames at once.  [default: by device]"),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only errors."),
        click.option("-v", "--verbose", is_flag=True, help="Say more; show the traceback of a bug."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def encoding_options(function: Callable) -> Callable:
    """Options of every command that writes a video: how large crops are, encoding, the rate of image sequences."""
    options = [
        click.option(
            "--crop-size", type=click.IntRange(64, 4096), metavar="PIXELS",
            help="Side of a crop that is not pasted back; more than 256 shows finer detail of the source.  "
            "[default: 256]",
        ),
        click.option(
            "--codec", type=click.Choice(["h264", "hevc", "prores", "ffv1", "png"]),
            help="Of the output.  [default: h264; hevc for more than 8 bits; prores, ffv1 for such sources and for "
            "alpha]",
        ),
        click.option(
            "--crf", type=click.IntRange(0, 51), help="Quality of h264 and hevc, less is better.  [default: 17, 18]"
        ),
        click.option(
            "--preset", type=click.Choice(PRESETS), metavar="NAME",
            help="Speed of h264 and hevc, ultrafast to veryslow, or NVENC's p1 to p7.  [default: medium]",
        ),
        click.option(
            "--nvenc/--no-nvenc", default=None, help="Encode on the graphics card.  [default: where it can]"
        ),
        click.option("--fps", **FPS),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def report_options(function: Callable) -> Callable:
    """--report and --json of every command that writes a video."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print the report, less the list of frames, instead of the path."
    )(function)
    return click.option("--report", type=FILE, help="Also write a JSON report with each frame's fate.")(function)


def progress_option(function: Callable) -> Callable:
    """--progress, which `progress_for` looks at."""

    def keep(ctx: click.Context, param: click.Parameter, value: str) -> None:
        ctx.meta[PROGRESS_META] = value

    return click.option(
        "--progress", type=click.Choice(PROGRESS), default="auto", show_default=True, expose_value=False, callback=keep,
        help="How to tell how far it is; auto is a bar on a terminal, else plain lines.",
    )(function)  # fmt: skip


def given(ctx: click.Context, option: str) -> bool:
    """Whether the user named an option on the command line: that is stronger than what files and environment say."""
    source = ctx.get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


def speaker(quiet: bool) -> Callable[[str], None]:
    """What remarks are said with: lines on stderr, or nothing."""
    ctx = click.get_current_context(silent=True)  # here, for it is of this thread
    return (lambda message: None) if quiet else (lambda message: click.echo(as_known(ctx, message), err=True))


def print_table(title: str, rows: list[dict[str, Any]], stderr: bool = False) -> None:
    """Rows of the same keys, on stdout or stderr."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for key, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(key.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    stream = sys.stderr if stderr else sys.stdout
    Console(stderr=stderr, width=None if stream.isatty() else TABLE_WIDTH).print(table)


def progress_kind(quiet: bool) -> str:
    """The --progress of the current command, settled: bar, plain, json, openjd or none."""
    ctx = click.get_current_context(silent=True)
    kind = ctx.meta.get(PROGRESS_META, "auto") if ctx else "auto"
    if quiet:
        return "none"
    return ("bar" if sys.stderr.isatty() else "plain") if kind == "auto" else kind


def progress_for(quiet: bool, unit: str = "frames") -> Callable[[Iterable, int | None, str], Iterator]:
    """The progress that was asked for by --progress or -q; `unit` is what the items are called."""
    kinds = {"bar": progress_bar, "plain": progress_lines, "json": progress_json, "openjd": progress_openjd}
    kind = progress_kind(quiet)
    return functools.partial(kinds[kind], unit=unit) if kind in kinds else lambda items, total, what: iter(items)


def progress_bar(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on under a bar with their number, how many a second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, rate="")
        for count, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=count, rate=pace(count / max(time.monotonic() - started, 1e-6), unit))


def progress_lines(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and writes a line every five seconds and at each tenth of the way."""
    started = last = time.monotonic()
    count = shown = 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS or (total and count - shown >= total / 10 and now - last >= 1):
            click.echo(progress_line(what, count, total, now - started, unit), err=True)
            last, shown = now, count
    click.echo(progress_line(what, count, count, time.monotonic() - started, unit), err=True)


def progress_json(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and writes a JSON object a second, and one at the end, each on a line of stderr."""
    started = time.monotonic()

    def tell(count: int, total: int | None) -> None:
        seconds = time.monotonic() - started
        rate = count / max(seconds, 1e-6)
        line = {"what": what, "unit": unit, "done": count, "total": total}
        click.echo(json.dumps({**line, "seconds": round(seconds, 2), "per_second": round(rate, 3)}), err=True)

    yield from told(items, total, tell)


def progress_openjd(items: Iterable, total: int | None, what: str, unit: str = "frames") -> Iterator:
    """Passes the items on and tells a worker of Open Job Description, which reads standard output, how far they are."""
    click.echo(f"openjd_status: {what}")

    def tell(count: int, total: int | None) -> None:
        if total:
            click.echo(f"openjd_progress: {min(100.0, 100 * count / total):.1f}")

    yield from told(items, total, tell)


def told(items: Iterable, total: int | None, tell: Callable[[int, int | None], None]) -> Iterator:
    """Passes the items on and calls `tell` with their number once a second, and with all of them at the end."""
    last, count = time.monotonic(), 0
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= MACHINE_SECONDS:
            tell(count, total)
            last = time.monotonic()
    tell(count, count)


def progress_line(what: str, count: int, total: int | None, seconds: float, unit: str = "frames") -> str:
    """For instance: editing talk.mp4: 40 of 120 frames, 8.1 frames/s, 10 s left"""
    rate = count / max(seconds, 1e-6)
    done = f"{count} of {total} {unit}" if total else f"{count} {unit}"
    left = f", {max(total - count, 0) / rate:.0f} s left" if total and rate else ""
    return f"{what}: {done}, {pace(rate, unit)}{left}"


def pace(rate: float, unit: str) -> str:
    """A rate in items a second, told by the minute where it is slow."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"


def closing_words(summary: dict[str, Any]) -> str:
    """The last line for a person: what was done, how fast."""
    counts, quality = summary["counts"], summary["self_reconstruction"]
    words = [f"{counts['edited']} frames edited, {counts['passed']} passed"]
    words += [f"{number} x {reason}" for reason, number in counts["reasons"].items()]
    words.append(f"{summary['seconds']:.1f} s ({summary['frames_per_second']} frames/s)")
    if quality:
        words.append(f"self-reconstruction {quality['psnr_db']} dB")
    if seam := summary["seam"]:
        words.append(f"seam {seam['mean']} (worst {seam['worst']} in frame {seam['worst_frame']})")
    return ", ".join(words)
