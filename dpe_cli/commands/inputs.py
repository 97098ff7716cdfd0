"""What commands take: kinds of parameters, files that come from the network or by a pipe."""

import math
import sys
from pathlib import Path
from typing import Any

import click

from dpe_cli.commands.ends import Failure
from dpe_cli.errors import DPEError
from dpe_cli.limits import limits

SPOOLED = "dpe.spooled"  # the file that standard input went to, in the `meta` that all contexts of a run share
FETCHED = "dpe.fetched"  # files that came from the network, in the `meta` that all contexts of a run share
WRITTEN = ("output", "report", "preview", "results", "path")  # parameters that are no inputs
FOLDER = click.Path(path_type=Path, file_okay=False)


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
