"""Where a command's settings come from: flag, DPE_* environment, --config FILE, dpe.toml in the folder, default.

A TOML file holds settings by the names of the options, `strength = 0.8`, for every command that has such an option, and
tables for single commands, `[edit]`. In the environment these are DPE_STRENGTH and DPE_EDIT_STRENGTH; the second is the
stronger. Click does the rest: a file becomes the `default_map` of its context.
"""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER_FILE = Path("dpe.toml")
META = "dpe.layers"  # the files that were read, weakest first, in the `meta` that all contexts of a run share
NOT_SETTINGS = ("DPE_CACHE", "DPE_FFMPEG", "DPE_SHARED", "DPE_REQUIRE_")  # what such variables begin with
SIMILAR = 0.85  # of 1, equal: names that are farther from all settings are somebody else's
NOT_IN_FILES = ("help", "version", "config", "show", "from", "allow-network")


@dataclass(frozen=True)
class Layer:
    """A TOML file, with the values of its tables and without: option name -> value."""

    file: Path
    everywhere: dict[str, Any]
    tables: dict[str, dict[str, Any]]  # by command

    def values(self, command: click.Command) -> dict[str, Any]:
        """What it says for a command, by the name of the parameter."""
        options, own = settings_of(command), self.tables.get(command.name, {})
        named = {name: value for name, value in self.everywhere.items() if name in options} | own
        return {options[name].name: fitting(options[name], value) for name, value in named.items()}


def settings_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that files and the environment can give, by their long names without the dashes."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    named = {long_name(option): option for option in options}
    return {name: option for name, option in named.items() if name not in NOT_IN_FILES or command.name == "train"}


def long_name(option: click.Option) -> str:
    """`strength` of --strength, `paste` of --paste/--no-paste, `edit` of --edit, whatever the parameter is called."""
    return max(option.opts, key=len).lstrip("-")


def fitting(option: click.Option, value: Any) -> Any:
    """A value as click wants it: a list where the option may be repeated, text where it reads text."""
    return [value] if option.multiple and not isinstance(value, list) else value


def variables(command: str, option: click.Option) -> list[str]:
    """The names of an option in the environment, strongest first."""
    name = long_name(option).replace("-", "_").upper()
    own = f"DPE_{command.replace('-', '_').upper()}_{name}"
    return [own] if name == "CONFIG" else [own, f"DPE_{name}"]  # DPE_CONFIG is the file of settings


def prepare(command: click.Command) -> None:
    """Gives the options of a command their names in the environment, and the command its --config."""
    options = settings_of(command)
    for option in options.values():
        option.envvar = option.envvar or variables(command.name or "", option)
    if options and "config" not in {long_name(option) for option in command.params if isinstance(option, click.Option)}:
        command.params.append(config_option())


def config_option() -> click.Option:
    """--config FILE, whose settings stand above those of dpe.toml."""
    return click.Option(
        ["--config"], type=click.Path(path_type=Path), envvar="DPE_CONFIG", expose_value=False, is_eager=True,
        callback=lambda ctx, param, value: value and add(ctx, value), metavar="FILE",
        help="Settings: a TOML file, in place of flags. See `dpe config`.",
    )  # fmt: skip


def add(ctx: click.Context, file: Path) -> None:
    """Puts a file above those read so far. Raises click.UsageError.

    A command that is run without `dpe` around it, as a batch runs an edit, was given its settings by whom runs it.
    """
    if not isinstance(ctx.find_root().command, click.Group):
        return
    found = files_read(ctx)
    if file not in (layer.file for layer in found):
        found.append(read_layer(file, ctx.find_root().command))
    apply(ctx)


def files_read(ctx: click.Context) -> list[Layer]:
    """The files that count, weakest first: dpe.toml is read when first asked for. Raises click.UsageError."""
    if META not in ctx.meta:
        there = FOLDER_FILE.is_file() and isinstance(ctx.find_root().command, click.Group)
        ctx.meta[META] = [read_layer(FOLDER_FILE, ctx.find_root().command)] if there else []
    return ctx.meta[META]


def apply(ctx: click.Context) -> None:
    """Makes what the files say the defaults of this command. Raises click.UsageError."""
    ctx.default_map = (ctx.default_map or {}) | values_for(ctx, ctx.command)


def values_for(ctx: click.Context, command: click.Command) -> dict[str, Any]:
    """What all files together say for a command, by the name of the parameter."""
    merged: dict[str, Any] = {}
    for layer in files_read(ctx):
        merged |= layer.values(command)
    return merged


def read_layer(file: Path, root: click.Group) -> Layer:
    """A file whose names are all options. Raises click.UsageError."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise click.UsageError(f"{file} does not exist: --config names a TOML file") from error
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise click.UsageError(f"{file} is no TOML file: {error}") from error
    commands = root.commands
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    everywhere = renamed(file, "", {name: value for name, value in content.items() if name not in tables})
    known = {name for command in commands.values() for name in settings_of(command)}
    check_names(file, "", everywhere, known)
    check_names(file, "command ", tables, commands)
    tables = {name: renamed(file, f"{name}.", table) for name, table in tables.items()}
    for name, table in tables.items():
        check_names(file, f"{name}.", table, settings_of(commands[name]))
        for key, value in table.items():
            check_value(file, f"{name}.{key}", value)
    for key, value in everywhere.items():
        check_value(file, key, value)
    return Layer(file, everywhere, tables)


def renamed(file: Path, before: str, values: dict[str, Any]) -> dict[str, Any]:
    """`exp_driving` is `exp-driving` too. Raises click.UsageError where both are there."""
    names = {name.replace("_", "-"): value for name, value in values.items()}
    for name in names if len(names) < len(values) else ():
        if sum(name == one.replace("_", "-") for one in values) > 1:
            raise click.UsageError(f"{file}: the setting {before}{name} is there twice")
    return names


def check_names(file: Path, before: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises click.UsageError for a name that nobody would read."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; is it {close[0]}?" if close else "; see `dpe config --show`"
            raise click.UsageError(f"{file}: there is no setting {before}{name}{hint}")


def check_value(file: Path, name: str, value: Any) -> None:
    """Raises click.UsageError for what no option can hold: tables, dates."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | bool | int | float) for one in values):
        raise click.UsageError(f"{file}: {name} must be text, a number, true, false or a list of them")


def origin(ctx: click.Context, param: click.Parameter) -> str:
    """The layer that a parameter of the current command took its value from, for people: `dpe.toml`, `DPE_DEVICE`."""
    return origin_of(ctx, ctx.command, param, ctx.get_parameter_source(param.name))


def origin_of(
    ctx: click.Context, command: click.Command, param: click.Parameter, source: click.core.ParameterSource | None
) -> str:
    """The same for any command."""
    kinds = click.core.ParameterSource
    if source == kinds.ENVIRONMENT:
        names = [param.envvar] if isinstance(param.envvar, str) else param.envvar or []
        return next((name for name in names if value_of(name)), "environment")
    if source == kinds.DEFAULT_MAP:
        files = (layer.file for layer in reversed(files_read(ctx)) if param.name in layer.values(command))
        return str(next(files, "file"))
    return "flag" if source == kinds.COMMANDLINE else "default"


def value_of(variable: str) -> str | None:
    """Of the environment; empty counts for nothing, as click has it."""
    return os.environ.get(variable) or None


def misspelt(root: click.Group) -> Iterator[tuple[str, str]]:
    """Variables of the environment that are no settings, but nearly: each with the setting that it is perhaps."""
    known = set(names_in_environment(root))
    for name in os.environ:
        if name.startswith("DPE_") and name not in known and not name.startswith(NOT_SETTINGS):
            close = difflib.get_close_matches(name, known, 1, SIMILAR)
            yield from ((name, one) for one in close)


def names_in_environment(command: click.Command) -> Iterator[str]:
    """All variables that options of a command, or of those below it, look at."""
    for param in command.params:
        yield from [param.envvar] if isinstance(param.envvar, str) else param.envvar or []
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        yield from names_in_environment(below)


@dataclass(frozen=True)
class Setting:
    """One line of `dpe config --show`."""

    command: str
    name: str
    value: Any
    origin: str


def resolved(ctx: click.Context, names: Iterable[str]) -> Iterator[Setting]:
    """Every setting of these commands as they would find it now. Raises click.UsageError for a value that is wrong."""
    for name in names:
        command = ctx.find_root().command.commands[name]
        inner = click.Context(command, info_name=name, parent=ctx.find_root(), resilient_parsing=True)
        inner.default_map = values_for(ctx, command)
        for key, option in settings_of(command).items():
            value, source = option.consume_value(inner, {})
            try:
                value = None if missing(value) else option.type_cast_value(inner, value)
            except click.BadParameter as error:
                raise click.UsageError(
                    f"{name}.{key}: {error.message} ({origin_of(ctx, command, option, source)})"
                ) from None
            yield Setting(name, key, value, origin_of(ctx, command, option, source))


def missing(value: Any) -> bool:
    """Whether click found no value."""
    return value is None or value == () or type(value).__name__ == "Sentinel"
