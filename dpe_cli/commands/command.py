"""What all commands are: settings in layers, failures as one line and the right exit code."""

import errno
import traceback
from typing import Any

import click

from dpe_cli.commands import layers
from dpe_cli.commands.ends import Failure, Stopped, nobody_reads, stopping, tell_interrupted, tell_stopped
from dpe_cli.commands.inputs import as_known
from dpe_cli.commands.progress import PROGRESS_META
from dpe_cli.errors import DPEError, InputError

OUT_OF_MEMORY = 6
MEMORY_WORDS = "the memory is used up; use a smaller --batch-size"
NO_MEMORY = ("Insufficient memory", "not enough memory", "Cannot allocate memory")  # of OpenCV, torch, the system


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
