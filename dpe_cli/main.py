"""The command line: `dpe` and its commands.

The result's path (or JSON) goes to stdout, all talk to stderr. Exit codes: 0 done, 2 usage, 3 input, 4 no usable face,
5 weights, 6 device or memory, 7 output, 8 some clips of a batch failed, 9 consent, 10 quality, 75 stopped by SIGTERM,
130 interrupted, 1 unexpected.
"""

import click

from dpe_cli import __version__
from dpe_cli.commands import (
    analysis,
    batch,
    config,
    dub,
    edit,
    evaluating,
    export,
    inspect,
    layers,
    plan,
    segments,
    training,
    weights,
)
from dpe_cli.commands.command import Cli


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dpe")
def cli() -> None:
    """Edit the expression and the pose of a person in a video.

    \b
    dpe edit --source talk.mp4 --driving smile.mp4 -o talk-smiling.mp4
    """


for command in (
    edit.edit, dub.dub, batch.batch, plan.plan, segments.join, analysis.extract, inspect.inspect, analysis.faces,
    analysis.report, analysis.doctor, weights.weights, config.config, training.prepare, training.train,
    evaluating.evaluate_command, analysis.benchmark, export.export,
):  # fmt: skip
    cli.add_command(command)
cli.params.append(layers.config_option())
