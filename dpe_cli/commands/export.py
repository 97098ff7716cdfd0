"""dpe export."""

from pathlib import Path

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FOLDER
from dpe_cli.commands.options import WEIGHTS


@click.command(cls=Command)
@click.option("--format", type=click.Choice(["onnx", "openvino"]), default="onnx", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "int8"]), default="fp32", show_default=True)
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder to make.")
@click.option("--overwrite", is_flag=True, help="Replace a folder of exported networks.")
@click.option("--weights", **WEIGHTS)
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a bug.")
def export(format: str, precision: str, output: Path, overwrite: bool, weights: str | None, verbose: bool) -> None:
    """Write the networks as ONNX or OpenVINO graphs, for other programs.

    dpe needs no such folder: with --backend onnx or openvino it makes one for itself, once for each checkpoint.

    \b
    dpe export --format onnx -o networks
    """
    from dpe_cli.runtimes import export as write
    from dpe_cli.weights import load

    write(load(weights), output, format, precision, overwrite)
    tell_result(output, output)
