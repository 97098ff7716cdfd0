"""dpe weights."""

import json

import click

from dpe_cli.commands.command import Cli


@click.group(cls=Cli)
def weights() -> None:
    """Checkpoints: which there are, what is in them, whether they are whole.

    \b
    dpe weights list
    """


@weights.command("list")
def list_weights() -> None:
    """List the checkpoints that have a name, with their licences.

    \b
    dpe weights list
    """
    from dpe_cli.weights import list_checkpoints

    for checkpoint, path in list_checkpoints():
        click.echo(f"{checkpoint.name:<10} {path or 'not on this machine'}")
        click.echo(f"{'':<10} {checkpoint.purpose}; licence: {checkpoint.licence}; {checkpoint.page}")


@weights.command("info")
@click.argument("weights", metavar="[NAME|PATH]", required=False)
def weights_info(weights: str | None) -> None:
    """Print what a checkpoint holds, as JSON: sizes, sha256, how it was made.

    \b
    dpe weights info compact
    """
    from dpe_cli.weights import info

    click.echo(json.dumps(info(weights), indent=1, default=str))


@weights.command("verify")
@click.argument("weights", metavar="[NAME|PATH]...", nargs=-1)
def verify_weights(weights: tuple[str, ...]) -> None:
    """Check that checkpoints are whole and what they say they are.

    \b
    dpe weights verify compact
    """
    from dpe_cli.weights import verify

    for name in weights or (None,):
        click.echo(verify(name))


@weights.command("fetch")
@click.argument("name")
def fetch_weights(name: str) -> None:
    """Download a face model pack with insightface's own downloader, after printing its licence.

    \b
    dpe weights fetch buffalo_s
    """
    from dpe_cli.weights import fetch

    click.echo(fetch(name, lambda message: click.echo(message, err=True)))
