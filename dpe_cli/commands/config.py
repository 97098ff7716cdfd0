"""dpe config."""

import json
from dataclasses import asdict

import click

from dpe_cli.commands import layers
from dpe_cli.commands.command import Command


@click.command(cls=Command)
@click.argument("commands", metavar="[COMMAND]...", nargs=-1)
@click.option(
    "--show", is_flag=True, help="Print each setting of the commands (of all without a name), with its origin."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def config(ctx: click.Context, commands: tuple[str, ...], show: bool, as_json: bool) -> None:
    """Tell what settings are in force, and where each comes from.

    In falling order: the flag; the environment, DPE_EDIT_STRENGTH or, for every command, DPE_STRENGTH; the TOML file of
    --config; dpe.toml in the current folder; the default. In a file, `strength = 0.8` is for every command that has
    --strength, and below `[edit]` for edit alone. Without --show it prints the files that are read.

    \b
    dpe config --show edit
    """
    if not show:
        for layer in layers.files_read(ctx):
            click.echo(layer.file)
        return
    known = {name: command for name, command in ctx.find_root().command.commands.items() if layers.settings_of(command)}
    for name in commands:
        if name not in known:
            raise click.UsageError(f"{name} has no settings; the commands are {', '.join(known)}")
    settings = list(layers.resolved(ctx, commands or known))
    if as_json:
        click.echo(json.dumps([asdict(setting) for setting in settings], indent=1, default=str))
        return
    width = max(len(f"{setting.command}.{setting.name}") for setting in settings)
    for setting in settings:
        value = json.dumps(setting.value, default=str)
        click.echo(f"{setting.command}.{setting.name}".ljust(width) + f" = {value:<12} {setting.origin}")
