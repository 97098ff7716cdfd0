"""Options that commands share, a decorator for each group."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dpe_cli.commands.ends import Failure
from dpe_cli.commands.inputs import FILE, FOLDER, Finite
from dpe_cli.errors import OutputError
from dpe_cli.limits import MAX_PIXELS, limits, set_limits

MODES = ("exp", "pose", "both")
LIMITS = ("allow-network", "max-pixels", "max-seconds", "max-size", "temp")
FPS = {"metavar": "RATE", "help": "Rate of image sequences like in_%06d.png.  [default: 25]"}
# those of encoding.py, which --help must not load
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
PRESETS += ("p1", "p2", "p3", "p4", "p5", "p6", "p7")
WEIGHTS = {"metavar": "PATH|NAME", "help": "Checkpoint: our .safetensors, an official .pt, or a name."}


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


def given(ctx: click.Context, option: str) -> bool:
    """Whether the user named an option on the command line: that is stronger than what files and environment say."""
    source = ctx.get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE
