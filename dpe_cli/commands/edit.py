"""dpe edit."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.control import control_options, controlled, take_control
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.inputs import FILE, SECONDS, Finite, check_named, check_stays, from_pipe
from dpe_cli.commands.options import MODES, detector_options, encoding_options, given, report_options, shared_options
from dpe_cli.commands.progress import check_standard_output, closing_words, progress_for, progress_option, speaker
from dpe_cli.commands.provenance import (
    begin_record,
    ingredients,
    is_file,
    provenance_options,
    reads,
    repeated,
    sidecar_of,
)
from dpe_cli.commands.segments import edit_segment, segment_options
from dpe_cli.errors import QualityError

if TYPE_CHECKING:
    from dpe_cli.control import Control
    from dpe_cli.face import FaceDetector
    from dpe_cli.report import Report
    from dpe_cli.request import Driving, Edit, Edits, EditSettings

EDIT_KEYS = ("face", "driving", "exp-driving", "pose-driving", "mode", "strength")


class Host:
    """What a process keeps for the edits that it does: the networks and the face detector, loaded when first needed.

    A batch hands its own to one edit after the other.
    """

    needs_sidecar = False  # even where the options leave it out

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, Any, Any]] = {}  # what -> how it was asked for, the thing, its precision

    def engine(self, *weights: str | None, **options: Any) -> Any:
        """An Engine. One that has fallen back to another precision meanwhile is not used again."""
        from dpe_cli.engine import Engine

        asked, engine, precision = self.kept.get("engine", (None, None, None))
        if asked != (weights, options) or engine.description.get("precision") != precision:
            self.kept.pop("engine", None)  # before the next one: both might not fit into the memory
            engine = Engine(*weights, **options)
            self.kept["engine"] = ((weights, options), engine, engine.description.get("precision"))
        return engine

    def detector(self, name: str, models: Path | None) -> "FaceDetector":
        """A face detector."""
        from dpe_cli.face import make_detector

        asked, detector, _ = self.kept.get("detector", (None, None, None))
        if asked != (name, models):
            detector = make_detector(name, models)
            self.kept["detector"] = ((name, models), detector, None)
        return detector

    def progress(self, quiet: bool) -> Callable[[Iterable, int | None, str], Iterator]:
        """How an edit tells how far it is."""
        return progress_for(quiet)


@click.command(cls=Command)
@click.argument("plan", type=FILE, required=False)
@click.option("-s", "--source", type=FILE, help="Video, or still image, of the person to edit.")
@click.option("-d", "--driving", type=FILE, help="Video, still or motion file whose expression or pose is transferred.")
@click.option("--exp-driving", type=FILE, help="Driving of the expression alone.")
@click.option("--pose-driving", type=FILE, help="Driving of the pose alone; with --exp-driving: two drivers.")
@click.option("-m", "--mode", type=click.Choice(MODES), help="What --driving gives.  [default: exp]")
@click.option("-o", "--output", type=FILE, help="Where to write.  [default: SOURCE_MODE.mp4 beside the source]")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@control_options
@click.option(
    "--motion",
    type=click.Choice(["absolute", "relative"]),
    default="absolute",
    show_default=True,
    help="Take over the driving's motion, or add its change against its neutral frame to the source's.",
)
@click.option(
    "--neutral-frame", **SECONDS, help="Neutral frame of the driving, for relative motion.  [default: found by itself]"
)
@click.option(
    "--sway/--no-sway",
    default=True,
    show_default=True,
    help="Where the pose is taken over, the head moves in the frame as the driving's does, or it only turns.",
)
@click.option(
    "--smooth",
    type=Finite(0, 3),
    default=1.0,
    show_default=True,
    metavar="F",
    help="Smoothing over time of face boxes and driving motion, times the usual; 0 is none.",
)
@click.option(
    "--driving-end",
    type=click.Choice(["hold", "loop", "pingpong", "trim"]),
    default="pingpong",
    show_default=True,
    help="When the driving is shorter than the source.",
)
@click.option(
    "--on-no-face",
    type=click.Choice(["pass", "hold", "fail"]),
    default="pass",
    show_default=True,
    help="A source frame without a face: leave it untouched, edit at the last box, or stop.",
)
@click.option(
    "--paste/--no-paste",
    default=None,
    help="Put the face back into the full frame, or write the crop.  [default: paste for exp, crop for pose and both]",
)
@click.option(
    "--mask",
    type=click.Choice(["gaussian", "ellipse", "landmarks", "parsing"]),
    default="gaussian",
    show_default=True,
    help="What is pasted back: the crop's square, an oval, the face's own oval, or what is face and hair.",
)
@click.option(
    "--feather",
    type=Finite(1, 50),
    metavar="PERCENT",
    help="Width of the mask's soft edge, of the face's height.  [default: 16; parsing 5]",
)
@click.option(
    "--colour-match/--no-colour-match",
    default=True,
    show_default=True,
    help="Take the edit to the source's colours, by what they are along the mask's edge.",
)
@click.option(
    "--detail/--no-detail", default=True, show_default=True, help="Keep the source's detail where nothing moved."
)
@click.option("--parsing", type=FILE, help="ONNX file of a face parsing network (BiSeNet), for --mask parsing.")
@click.option("--landmarker", type=FILE, help="MediaPipe's face_landmarker.task, for --mask landmarks.")
@click.option("--enhancer", type=FILE, help="ONNX file of a face enhancer (GFPGAN, CodeFormer) run on the edited face.")
@click.option(
    "--fail-if",
    "seam_limit",
    callback=lambda ctx, param, value: seam_limit(value),
    metavar="'seam>X'",
    help="Refuse the result, with exit code 10, if a frame's seam score is above X.",
)
@click.option(
    "--face",
    default="largest",
    show_default=True,
    metavar="WHICH",
    help="largest, left, right, center, a number from 0 (left to right), track:NUMBER of `dpe faces`, or a picture.",
)
@click.option(
    "--edit",
    "several",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="One of several edits in one pass; repeat it. Keys: face, driving, mode, strength, exp-driving, pose-driving.",
)
@click.option("--driving-face", default="largest", show_default=True, metavar="WHICH", help="The same for the driving.")
@detector_options
@click.option(
    "--audio",
    default="auto",
    metavar="WHICH",
    help="source, driving, none or a file.  [default: source; driving where the source is a still]",
)
@click.option("--start", **SECONDS, help="Begin at this second of the source.")
@click.option("--end", **SECONDS, help="End at this second of the source.")
@encoding_options
@click.option(
    "--pipe",
    type=click.Choice(["nut", "y4m"]),
    default="nut",
    show_default=True,
    help="What is written to standard output with -o -.",
)
@segment_options
@click.option("--preview", type=FILE, help="Also write source | driving | result side by side.")
@report_options
@provenance_options
@progress_option
@shared_options
def edit(
    plan: Path | None,
    source: Path | None,
    driving: Path | None,
    exp_driving: Path | None,
    pose_driving: Path | None,
    mode: str | None,
    several: tuple[str, ...],
    output: Path | None,
    resume: bool,
    segment: int | None,
    preview: Path | None,
    report: Path | None,
    as_json: bool,
    from_file: Path | None,
    consent: Path | None,
    weights: str | None,
    device: str,
    precision: str,
    backend: str,
    detector: str,
    face_models: Path | None,
    batch_size: int | None,
    quiet: bool,
    verbose: bool,
    **_: Any,
) -> "Report":
    """Give the face in a source the expression, the pose or both of a driving video.

    Strength 0 keeps the source's own motion, 1 takes the driving's. Mouth, eyes, gaze, brows and emotion can each
    follow the source, a driving or a value: `--mouth driving` transfers the mouth and nothing else, `--eyes source` all
    but the eyes.

    \b
    dpe edit --source examples/out/source.mp4 --driving examples/out/driving.mp4 -o edited.mp4
    dpe edit -s talk.mp4 --set mouth_open=0.15 -o open.mp4
    dpe edit -s two.mp4 --edit face=left,driving=smile.mp4 --edit face=right,driving=frown.mp4,strength=0.5
    dpe edit --segment 3 talk.plan.json
    dpe edit --from edited.mp4.dpe.json -o again.mp4
    """
    ctx = click.get_current_context()
    if plan or segment is not None:
        return edit_segment(plan, segment, weights, device, backend, detector, face_models, quiet)
    if from_file:
        return repeated(ctx)
    if resume and (preview or str(source) == "-"):
        raise click.UsageError("--resume cannot go with --preview or with standard input")
    if resume:
        check_stays(ctx, "--resume")
    check_standard_output(ctx)
    drivers, output, chosen = asked_for(ctx)

    from dpe_cli.container import PIPE
    from dpe_cli.edit import edit_video
    from dpe_cli.provenance import read_consent
    from dpe_cli.request import check_request

    read_consent(consent)
    piped, source = source == PIPE, from_pipe(ctx, source, output)
    others = {"reads": [path for _, path in reads(ctx)], "sidecar": sidecar_of(ctx, output)}
    if resume:
        from dpe_cli.resume import edit_resumable, finished

        again = replace(chosen, overwrite=chosen.overwrite or finished(output) is not None)  # it is perhaps our own
        check_request(source, drivers, output, again, preview, report, **others)
    else:
        check_request(source, drivers, output, chosen, preview, report, **others)

    record = begin_record(ctx, output, lambda: ingredients(ctx, source if piped else None))

    from dpe_cli.detectors import RESEARCH_ONLY

    say = speaker(quiet)
    host = ctx.ensure_object(Host)  # torch takes seconds to import, so what can fail has failed before
    engine = host.engine(weights, device=device, precision=precision, backend=backend, batch_size=batch_size)
    finder = host.detector(detector, face_models)
    if finder.name.startswith("insightface"):
        say(f"{finder.name}: {RESEARCH_ONLY}")
    if verbose:
        say(f"networks: {engine.description}; faces: {finder.name}; {drivers}; {chosen}")
    common = {"progress": host.progress(quiet), "say": say}
    try:
        if resume:
            done = edit_resumable(
                source, drivers, output, engine, finder, chosen, report_path=report,
                seal=record.seal, finish=lambda done: record.finish(done, say), **common,
            )  # fmt: skip
        else:
            done = record.keep(
                lambda part: edit_video(source, drivers, part, engine, finder, chosen, preview=preview, **common),
                chosen.overwrite, report, say,
            )  # fmt: skip
    except QualityError as error:
        if report:
            error.report.write(report)
        raise
    say(closing_words(done.summary()))
    if output != PIPE:
        tell_result(json.dumps(done.summary(), indent=1, default=str) if as_json else output, output)
    return done


def drivers_of(params: dict[str, Any], control: "Control | None", strength: float) -> "Driving | Edits":
    """Whose motion the options of an edit ask for. Raises click.UsageError, also where there is nobody to edit."""
    if not params["source"]:
        raise click.UsageError("Missing option '-s' / '--source'.")
    named = params["driving"] or params["exp_driving"] or params["pose_driving"]
    if params["several"]:
        if control:
            raise click.UsageError("--edit takes no factors and sliders: edit one face, or give --edit a strength")
        if named or params["mode"]:
            raise click.UsageError("--edit names its own drivers and mode: leave --driving and --mode out")
        if params["curve"] and any(key == "strength" for text in params["several"] for key, *_ in edit_pairs(text)):
            raise click.UsageError("--curve stands in place of an --edit's strength: give one of them")
        return choose_edits(params["several"], params["face"], strength)
    if control and not named:
        return controlled(control, None)
    driving = choose_driving(*(params[name] for name in ("driving", "exp_driving", "pose_driving", "mode")))
    return controlled(control, driving) if control else driving


def read_request(ctx: click.Context) -> "tuple[Driving | Edits, EditSettings]":
    """Whose motion and the settings that the options of an edit mean together.

    Raises click.UsageError where they contradict each other, and InputError.
    """
    params = dict(ctx.params)
    control = params["control"] = take_control(ctx, params)
    drivers = drivers_of(params, control, params["strength"])
    named = [{key for key, *_ in edit_pairs(text)} for text in params["several"]]
    for name in ("face", "strength"):
        if named and given(ctx, name) and all(name in keys for keys in named):
            raise click.UsageError(f"--{name} is for an --edit that names none, and each names its own: leave it out")
    if params["end"] is not None and params["end"] <= (params["start"] or 0):
        raise click.UsageError("--end must be after --start")
    if params["neutral_frame"] is not None and params["motion"] != "relative":
        raise click.UsageError("--neutral-frame needs --motion relative")

    from dpe_cli.request import EditSettings

    settings = {field.name: params[field.name] for field in fields(EditSettings) if field.name in params}
    return drivers, EditSettings(**settings)


def asked_for(ctx: click.Context) -> "tuple[Driving | Edits, Path, EditSettings]":
    """The same with the output, which may have to be named after them."""
    from dpe_cli.request import default_output

    drivers, settings = read_request(ctx)
    if not ctx.params["output"]:
        check_named(ctx, ctx.params["source"])
    return drivers, ctx.params["output"] or default_output(ctx.params["source"], drivers), settings


def choose_driving(both: Path | None, expression: Path | None, pose: Path | None, mode: str | None) -> "Driving":
    """What the four options mean together. Raises click.UsageError where they contradict each other."""
    if both and (expression or pose):
        raise click.UsageError("--driving cannot go with --exp-driving or --pose-driving")
    if not (both or expression or pose):
        raise click.UsageError("give --driving, --exp-driving or --pose-driving")
    if both:
        mode = mode or "exp"
        expression, pose = (None if mode == "pose" else both), (None if mode == "exp" else both)
    given = "both" if expression and pose else "exp" if expression else "pose"
    if mode and mode != given:
        raise click.UsageError(f"--mode {mode} does not go with the drivers given: they make it {given}")

    from dpe_cli.request import Driving

    return Driving(expression, pose)


def seam_limit(text: str | None) -> float | None:
    """The X of --fail-if 'seam>X'."""
    if text is None:
        return None
    name, _, number = text.replace(" ", "").partition(">")
    try:
        limit = float(number)
    except ValueError:
        limit = -1.0
    if name != "seam" or not limit >= 0:
        raise click.BadParameter("it is 'seam>X', X a number from 0, in quotes: > means something to a shell")
    return limit


def choose_edits(several: Iterable[str], face: str, strength: float) -> "Edits":
    """All of `--edit`; `face` and `strength` are for those that name none. Raises click.UsageError."""
    from dpe_cli.request import Edits

    return Edits(tuple(parse_edit(text, face, strength) for text in several))


def edit_pairs(text: str) -> list[tuple[str, str, str]]:
    """KEY, =, VALUE of what `--edit` was given."""
    return [part.partition("=") for part in re.split(rf",(?=(?:{'|'.join(EDIT_KEYS)})=)", text)]


def with_full_names(text: str) -> str:
    """What `--edit` was given, its drivings, and pictures of faces, by their full names."""

    def full(key: str, value: str) -> str:
        file = "driving" in key or (key == "face" and is_file(key, value))
        return str(Path(value).absolute()) if file else value

    return ",".join(f"{key}={full(key, value)}" for key, _, value in edit_pairs(text))


def parse_edit(text: str, face: str, strength: float) -> "Edit":
    """One `--edit face=REF,driving=FILE,mode=exp,strength=1`; values may hold commas. Raises click.UsageError."""
    pairs = edit_pairs(text)
    given = {key: value for key, _, value in pairs}
    wrong = [key for key, _, value in pairs if key not in EDIT_KEYS or not value]
    if wrong or len(given) < len(pairs):
        what = f"{wrong[0]!r} is not KEY=VALUE" if wrong else "a key comes twice"
        raise click.UsageError(f"--edit {text}: {what}; the keys are {', '.join(EDIT_KEYS)}")
    for value in given.values():
        unknown = re.search(r",([\w-]+)=", value)
        if unknown and not os.path.exists(value):  # a file may be named so
            raise click.UsageError(f"--edit {text}: {unknown[1]} is no key; the keys are {', '.join(EDIT_KEYS)}")
    try:
        strength = Finite(0, 3).convert(given.get("strength", strength), None, None)
        mode = given.get("mode") and click.Choice(MODES).convert(given["mode"], None, None)
        files = [Path(given[key]) if key in given else None for key in ("driving", "exp-driving", "pose-driving")]
        driving = choose_driving(*files, mode)
    except click.UsageError as error:
        raise click.UsageError(f"--edit {text}: {error.message.replace('--', '')}") from None

    from dpe_cli.request import Edit

    return Edit(driving, given.get("face", face), strength)
