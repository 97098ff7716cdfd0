"""Options of fine-grained control (PD-FGC): they are parsed here, `dpe_cli.control` knows what they mean."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.inputs import FILE
from dpe_cli.commands.options import given

if TYPE_CHECKING:
    from dpe_cli.control import Control
    from dpe_cli.request import Driving

CHOICES = ("eyes", "emotion", "mouth", "gaze", "brows")  # joint ones first: gaze has the last word over eyes
DRIVEN = ("eyes", "emotion", "mouth")  # factors that may have a driving of their own
REGIONS = ("all", "lips", "eyes", "upper", "lower")


def control_options(function: Callable) -> Callable:
    """--strength, --curve and all that controls single factors of the expression."""
    options = [
        click.option(
            "--strength", default="1", show_default=True, metavar="F|FACTOR=F,...",
            help="0 keeps the source's motion, 1 takes the driving's, up to 3. Also of single factors: mouth, eyes "
            "(blink, gaze), emotion (brows, mood, rest), all; and pose.",
        ),
        click.option(
            "--curve", type=FILE,
            help="CSV of keyframes: seconds,strength; or seconds,factor,value for factors' strengths and for sliders; "
            "blink is the slider where the eyes follow nothing.",
        ),
        click.option("--mouth", metavar="WHICH", help="source, driving, neutral, or a value of mouth_open."),
        click.option("--eyes", metavar="WHICH", help="source, driving, neutral, or a value of blink."),
        click.option("--gaze", metavar="WHICH", help="source, driving, neutral, or degrees to the right and up: X:Y."),
        click.option("--brows", metavar="WHICH", help="source, driving, neutral, or a value of brow_raise."),
        click.option("--emotion", metavar="WHICH", help="source, driving, neutral, or an emotion: happy:0.6."),
        click.option("--mouth-driving", type=FILE, help="Driving of the mouth alone."),
        click.option("--eyes-driving", type=FILE, help="Driving of blink and gaze alone."),
        click.option("--emotion-driving", type=FILE, help="Driving of brows and the rest alone."),
        click.option(
            "--set", "sliders", multiple=True, metavar="NAME=VALUE,...",
            help="Set measures of the face: mouth_open=0.3,happy=0.5,blink=1,gaze=10:-5, or add to them: blink+=0.2; "
            "`dpe inspect` lists them.",
        ),
        click.option("--neutralize", is_flag=True, help="Take mouth, eyes and brows to a face at rest, by --strength."),
        click.option(
            "--region", type=click.Choice(REGIONS), default="all", show_default=True,
            help="Paste only this part of the face back.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def take_control(ctx: click.Context, settings: dict[str, Any]) -> "Control | None":
    """The control that the options of a command ask for, None where they ask for none.

    Takes its options out of `settings`; there `strength` becomes a number and `curve` keyframes of it, or None. Raises
    click.UsageError for options that contradict each other or cannot be read, InputError for a bad curve.
    """
    chosen = {name: settings.pop(name) for name in CHOICES}
    own = {name: settings.pop(f"{name}_driving") for name in DRIVEN}
    sliders, neutralize, curve = settings.pop("sliders"), settings.pop("neutralize"), settings["curve"]

    from dpe_cli.control import (
        DRIVING,
        NEUTRAL,
        SOURCE,
        Control,
        parse_choice,
        parse_sliders,
        parse_strength,
        read_curves,
    )
    from dpe_cli.factors import NAMES, parts
    from dpe_cli.motion import Curve

    def parsed(option: str, parse: Callable, *arguments: str) -> Any:
        try:
            return parse(*arguments)
        except ValueError as error:
            raise click.UsageError(f"--{option}: {error}") from None

    plain, strengths = parsed("strength", parse_strength, settings["strength"])
    settings["strength"] = 1.0 if plain is None else plain
    origins: dict[str, Any] = dict.fromkeys(NAMES[:-1], NEUTRAL) | {"rest": SOURCE} if neutralize else {}
    values: dict[str, float] = {}
    for name, text in chosen.items():
        if text is None:
            continue
        if own.get(name):
            raise click.UsageError(f"--{name} and --{name}-driving say two things: give one of them")
        origin, numbers = parsed(name, parse_choice, name, text)
        values |= numbers
        origins |= dict.fromkeys(parts(name), origin) if origin else {}
    for name, path in own.items():
        origins |= dict.fromkeys(parts(name), path) if path else {}
    if DRIVING in origins.values():  # who names what follows the driving wants the rest left alone
        origins = dict.fromkeys(NAMES, SOURCE) | origins
    led = settings["exp_driving"] or (settings["driving"] and settings["mode"] != "pose")
    lids = origins.get("blink", DRIVING if led else SOURCE)
    keyframes = read_curves(curve, lids_follow=lids != SOURCE) if curve else None
    settings["curve"] = keyframes if isinstance(keyframes, Curve) else None
    if settings["curve"] and plain is not None and given(ctx, "strength"):
        raise click.UsageError("--curve stands in place of --strength: give one of them")
    steps: dict[str, float] = {}
    for text in sliders:
        some, added = parsed("set", parse_sliders, text)
        values, steps = values | some, steps | added
    curves = keyframes if isinstance(keyframes, tuple) else ({}, {})
    twice = (strengths.keys() & curves[0].keys()) | (values.keys() & curves[1].keys())
    if twice:
        raise click.UsageError(f"{min(twice)} has keyframes in --curve and a constant: give one of them")
    if both := steps.keys() & (values.keys() | curves[1].keys()):  # half of each would come of it
        raise click.UsageError(f"{min(both)} is both set and added to: give one of them")
    control = Control(origins, strengths, values, steps, *curves)
    return None if control == Control() else control


def controlled(control: "Control | None", driving: "Driving | None") -> "Driving":
    """Whose motion is transferred where there is a control; `driving` is None if no option names any.

    Raises click.UsageError where that is nothing.
    """
    from dpe_cli.control import DRIVING
    from dpe_cli.request import Driving

    if control is None:
        raise click.UsageError("give --driving, --exp-driving or --pose-driving, or something to --set")
    whole = driving is not None and driving.expression is not None
    if DRIVING in control.origins.values() and not whole:
        raise click.UsageError("a factor is to follow the driving: give --driving or --exp-driving")
    if not whole and (idle := idle_factors(control)):
        raise click.UsageError(f"{idle[0]} has a strength but nothing to follow: give --driving")
    posed = driving is not None and driving.pose is not None
    if not posed and "pose" in (*control.strengths, *control.strength_curves):
        raise click.UsageError("the pose has a strength but nothing to follow: give --pose-driving or --mode both")
    return replace(driving or Driving(controlled=True), factors=control.paths, controlled=True)


def idle_factors(control: "Control") -> list[str]:
    """The factors with a strength that nothing moves where there is no driving of the whole expression.

    Those of a joint name, `emotion=0.5`, are at work where one of them is.
    """
    from dpe_cli.control import SOURCE
    from dpe_cli.factors import JOINT

    asked = {name: how for name, how in (control.strengths | control.strength_curves).items() if name != "pose"}
    at_work = {name for name in asked if control.origins.get(name, SOURCE) != SOURCE}
    for names in JOINT.values():
        if at_work.intersection(names) and all(name in asked and asked[name] == asked[names[0]] for name in names):
            at_work = at_work.union(names)
    return [name for name in asked if name not in at_work]
