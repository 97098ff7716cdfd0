"""What edit, dub, join and batch say of where an output comes from: options, sidecars, consent, repeated runs."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands import layers
from dpe_cli.commands.inputs import FILE, WRITTEN
from dpe_cli.commands.options import given
from dpe_cli.errors import InputError, OutputError, WeightsError

if TYPE_CHECKING:
    from dpe_cli.report import Report
    from dpe_cli.signing import Signer

REPEATED = "dpe.repeated"  # the sidecar whose run is repeated, in the `meta` that all contexts of a run share
NOT_IN_SETTINGS = (  # what makes no other frames, and the run's own
    "output", "overwrite", "preview", "report", "as_json", "quiet", "verbose", "resume", "plan", "segment",
    "from_file", "sidecar", "consent", "c2pa_cert", "c2pa_key",
)  # fmt: skip
OF_THE_MACHINE = ("device", "batch_size", "weights")  # settings that are not in the key; weights are, by their hash
# those of edit.py, people.py and dub.py, which --help must not load
PLACES = ("largest", "left", "right", "center")
WORDS = {"audio": ("auto", "source", "driving", "none"), "face": PLACES, "driving_face": PLACES,
         "pose": ("keep", "generate"), "blink": ("auto", "off")}  # fmt: skip
FREE = (*NOT_IN_SETTINGS, *OF_THE_MACHINE)  # what may be given beside --from


def signing_options(function: Callable) -> Callable:
    """--sidecar, --c2pa-cert, --c2pa-key."""
    options = [
        click.option(
            "--sidecar/--no-sidecar", default=True, show_default=True,
            help="Write OUTPUT.dpe.json: what the output was made of.",
        ),
        click.option("--c2pa-cert", type=FILE, help="Sign the output (C2PA) by this chain of certificates, PEM."),
        click.option("--c2pa-key", type=FILE, help="Its private key, PEM."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def provenance_options(function: Callable) -> Callable:
    """The same, --from and --consent."""
    function = click.option(
        "--consent", type=FILE,
        help="Document of the consent of the person edited; its name and sha256 go into the sidecar.",
    )(signing_options(function))  # fmt: skip
    return click.option(
        "--from", "from_file", type=FILE, metavar="FILE.dpe.json",
        help="Repeat the run of this sidecar, and tell whether the frames are the same.",
    )(function)  # fmt: skip


# What an output is made of


def inputs_of(context: click.Context) -> dict[str, Path]:
    """The files that an edit or a dub reads, weights left out, by what they are to it."""
    from dpe_cli.commands.edit import choose_edits

    params = context.params
    inputs = {name: value for name, value in params.items() if isinstance(value, Path) and name not in FREE}
    inputs |= {name: Path(params[name]) for name in WORDS if is_file(name, params.get(name))}
    if params.get("several"):
        for number, path in enumerate(choose_edits(params["several"], "largest", 1.0).paths):
            inputs[f"driving {number}"] = path
    return inputs


def is_file(option: str, word: Any) -> bool:
    """Whether an option that takes words or files (WORDS) was given a file."""
    if not isinstance(word, str) or word in WORDS[option]:
        return False
    number = "face" in option and word.removeprefix("track:").isdecimal()
    return not number and Path(word).is_file()


def reads(context: click.Context) -> Iterator[tuple[str, Path]]:
    """All files that a command was given to read, by what they are to it, for no output may take the place of one.

    Weights, files of settings, the sidecar of --from and each model in a folder of them are among them.
    """
    from dpe_cli.weights import find

    params, above = context.params, context.parent.params if context.parent else {}
    found = list(inputs_of(context).items())
    found += [(name, value) for name, value in params.items() if isinstance(value, Path) and name not in WRITTEN]
    if above.get("from_file"):
        found.append(("sidecar", above["from_file"]))
    if "weights" in params:
        with contextlib.suppress(WeightsError):  # which is told when they are loaded
            found.append(("weights", find(params["weights"])))
    found += [("settings", layer.file) for layer in layers.files_read(context)]
    if models := params.get("face_models"):
        found += [("model", Path(folder, file)) for folder, _, files in os.walk(models) for file in files]
    yield from dict.fromkeys(found)


def sidecar_of(context: click.Context, output: Path) -> Path | None:
    """Where the sidecar of an output goes, or is removed from; None where that is no harm.

    A run that is repeated may take its own sidecar's place.
    """
    from dpe_cli.container import PIPE
    from dpe_cli.ledger import can_be_marked, marker_of

    if output == PIPE or not can_be_marked(output):
        return None
    again = context.parent.params.get("from_file") if context.parent else None
    marker = marker_of(output)
    return None if again and again.resolve() == marker.resolve() else marker


def networks_of(context: click.Context, weights: Path) -> dict[str, Path]:
    """What else was learnt and decides the frames: the tool's own networks, and the fit of the weights' factors."""
    from dpe_cli.factors import fit_of
    from dpe_cli.weights import LANDMARKS, SPEECH, find

    if context.command.name == "dub":
        names = [LANDMARKS, SPEECH]
    else:
        names = [LANDMARKS] if context.params["region"] != "all" else []
    fit = fit_of(weights)
    return {**{name: find(name) for name in names}, **({"factors": fit} if fit.is_file() else {})}


def ingredients(context: click.Context, spooled: Path | None = None) -> dict[str, Any]:
    """What an output is made of, and the key of it all. `spooled` holds the source that came by a pipe.

    Raises DPEError for a file that is not there, ConsentError.
    """
    import dpe_cli
    from dpe_cli.ledger import digest_of, key_of
    from dpe_cli.provenance import SCHEMA, read_consent, versions
    from dpe_cli.weights import find

    params, command = context.params, context.command.name
    consent, weights, files = read_consent(params["consent"]), find(params["weights"]), inputs_of(context)
    try:
        inputs = {}
        for role, path in files.items():
            there = spooled if role == "source" and spooled else path
            inputs[role] = {"path": str(path.absolute()), "sha256": digest_of(there)}
        networks = {
            name: {"path": str(path.absolute()), "sha256": digest_of(path)}
            for name, path in networks_of(context, weights).items()
        }
        weights_hash, certificate = digest_of(weights), params.get("c2pa_cert")
        signed = [f"c2pa {digest_of(certificate)}"] if certificate else []
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", "check the name") from error
    decisive = {name: value for name, value in params.items() if name not in FREE and name not in inputs}
    hashes = [f"{role} {facts['sha256']}" for role, facts in sorted((inputs | networks).items())]
    hashes += signed + ([f"consent {consent['sha256']}"] if consent else [])
    return {
        "schema": SCHEMA,
        "dpe": dpe_cli.__version__,
        "command": command,
        "key": key_of(decisive, hashes, weights_hash, dpe_cli.__version__),
        "inputs": inputs,
        "weights": {"path": str(weights.absolute()), "sha256": weights_hash},
        "networks": networks,
        "settings": settings_of(context, set(files)),
        "seed": params.get("seed"),
        "consent": consent,
        "versions": versions(),
    }


def settings_of(context: click.Context, files: set[str]) -> dict[str, Any]:
    """The options by the names of their parameters, as they may be given again anywhere: files by their full names."""
    from dpe_cli.commands.edit import with_full_names

    settings = {name: value for name, value in context.params.items() if name not in NOT_IN_SETTINGS}
    for name, value in settings.items():
        if isinstance(value, Path) or name in files:
            settings[name] = str(Path(value).absolute())
    if settings.get("several"):
        settings["several"] = [with_full_names(text) for text in settings["several"]]
    if settings.get("seam_limit") is not None:
        settings["seam_limit"] = f"seam>{settings['seam_limit']!r}"
    return settings


# An output on its way


@dataclass
class Record:
    """What is known of an output before it is made: files may change meanwhile.

    made_of: as `ingredients` gives it; None where no sidecar is wanted.
    """

    output: Path
    made_of: dict[str, Any] | None
    signer: "Signer | None"
    repeated: dict[str, Any] | None  # the sidecar of the run that is repeated

    def seal(self, part: Path) -> None:
        """For what is whole and not yet under its name."""
        if self.signer:
            self.signer.sign(part, self.output.name)

    def keep(
        self, work: Callable[[Path], "Report"], overwrite: bool, report: Path | None, say: Callable[[str], None]
    ) -> "Report":
        """Has the output made in one piece by `work`, which is told where, seals it and writes what is to be kept."""
        from dpe_cli.writer import sealed

        with sealed(self.output, self.signer and self.seal, overwrite) as part:
            done = work(part)
        done.output["path"] = str(self.output)
        self.finish(done, say)
        if report:
            done.write(report)
        return done

    def finish(self, done: "Report", say: Callable[[str], None]) -> None:
        """For an output that is there: compares, writes the sidecar. Raises OutputError."""
        from dpe_cli.container import PIPE
        from dpe_cli.ledger import can_be_marked, marker_of, write_marker
        from dpe_cli.provenance import comparison

        pixels = done.output.get("pixels_sha256")
        facts = {"engine": done.engine, "detector": done.detector, "frames": done.counts()["frames"]}
        if self.repeated:
            note = comparison(self.repeated, {**done.engine, "detector": done.detector}, pixels)
            done.notes.append(note)
            facts["repeats"] = {"mark": self.repeated.get("mark"), "result": note}
            say(note)
        if self.made_of:
            write_marker(self.output, {**self.made_of, **facts, "seconds": done.seconds}, pixels_sha256=pixels)
        elif self.output != PIPE and can_be_marked(self.output):
            marker_of(self.output).unlink(missing_ok=True)  # of an output that was replaced


def begin_record(ctx: click.Context, output: Path, made_of: Callable[[], dict[str, Any] | None]) -> Record:
    """Before the work. Raises click.UsageError, DPEError for what would fail when it is done."""
    from dpe_cli.container import PIPE
    from dpe_cli.ledger import can_be_marked

    params = ctx.params
    needed = getattr(ctx.obj, "needs_sidecar", False)
    wanted = output != PIPE and (params["sidecar"] or needed)
    if wanted and not can_be_marked(output):
        remedy = "give the output a shorter name, or add --no-sidecar"
        raise OutputError(f"the name of {output} is too long for its sidecar's", remedy)
    signer = make_signer(params["c2pa_cert"], params["c2pa_key"], output)
    return Record(output, made_of() if wanted else None, signer, ctx.meta.get(REPEATED))


def make_signer(certificate: Path | None, key: Path | None, output: Path) -> "Signer | None":
    """None where nothing is to be signed. Raises click.UsageError, InputError, OutputError."""
    if not (certificate or key):
        return None
    if not (certificate and key):
        raise click.UsageError("--c2pa-cert and --c2pa-key go together")
    try:
        from dpe_cli.signing import Signer, check_signable
    except ModuleNotFoundError as error:
        raise click.UsageError("--c2pa-cert needs a package: pip install 'dpe-cli[c2pa]'") from error
    check_signable(output)
    return Signer(certificate, key)


# Repeating a run


def repeated(ctx: click.Context) -> Any:
    """Runs the command of `ctx` as the sidecar of its --from says; gives what it returns.

    The sidecar decides; files may be named anew where they lie elsewhere now, for they are checked by their hashes.
    Raises click.UsageError for an option that the sidecar decides, InputError and WeightsError for what has changed.
    """
    from dpe_cli.ledger import MARKER
    from dpe_cli.provenance import changed_versions, check_input, check_weights, read_consent, read_sidecar
    from dpe_cli.weights import find

    path, command = ctx.params["from_file"], ctx.command
    then = read_sidecar(path)
    if then["command"] != command.name:
        raise InputError(f"{path} is of a dpe {then['command']}", f"repeat it with: dpe {then['command']} --from")
    anew = {name for name in ctx.params if given(ctx, name)}
    decided = sorted(anew - {*FREE, *then["inputs"]})
    if decided:
        option = next(param for param in command.params if param.name == decided[0])
        raise click.UsageError(f"{path.name} has decided {max(option.opts, key=len)}: leave it out")
    read_consent(ctx.params["consent"])  # fails before files are read
    values = {**then["settings"], **{name: ctx.params[name] for name in anew if name not in FREE}}
    values |= {name: ctx.params[name] for name in NOT_IN_SETTINGS if name in ctx.params}
    values |= {name: ctx.params[name] for name in OF_THE_MACHINE if name in anew}
    values |= {"from_file": None, "output": values["output"] or path.with_name(then["output"]["name"])}
    if not path.name.endswith(MARKER) and not ctx.params["output"]:
        raise click.UsageError(f"{path.name} was renamed: name the output")
    again = click.Context(command, info_name=ctx.info_name, parent=ctx)
    again.meta[REPEATED] = then
    for param in command.params:
        if param.expose_value:
            free = param.name in NOT_IN_SETTINGS
            value = values.get(param.name)
            again.params[param.name] = value if free else taken(param, again, value, path)
    inputs = inputs_of(again)
    for role, facts in then["inputs"].items():
        check_input(role, inputs.get(role, Path(facts["path"])), facts["sha256"])
    weights = find(again.params["weights"])
    check_weights(weights, then["weights"]["sha256"])
    own = networks_of(again, weights)
    for name, facts in then["networks"].items():
        check_weights(own.get(name, Path(facts["path"])), facts["sha256"])
    if (changes := changed_versions(then["versions"])) and not ctx.params["quiet"]:
        click.echo(f"the frames may differ: {changes}", err=True)
    return again.invoke(command.callback, **again.params)


def taken(param: click.Parameter, context: click.Context, value: Any, sidecar: Path) -> Any:
    """A setting of a sidecar as the command line would give it. Raises InputError for one that cannot be."""
    try:
        return param.process_value(context, value)
    except (click.UsageError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{sidecar} is damaged: its setting {param.name} is wrong", "name another sidecar") from error
