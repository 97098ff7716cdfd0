"""dpe batch."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.command import Command
from dpe_cli.commands.display import display, show_outcomes
from dpe_cli.commands.ends import tell_result
from dpe_cli.commands.entry import INTERRUPTED, STOPPED
from dpe_cli.commands.inputs import FILE, Finite
from dpe_cli.commands.progress import progress_kind, progress_option, speaker
from dpe_cli.commands.rows import Planner, print_all
from dpe_cli.commands.worker import make_worker
from dpe_cli.errors import OutputError

if TYPE_CHECKING:
    from dpe_cli.batch import Outcome
    from dpe_cli.manifest import Shard

SOME_FAILED = 8


class Stopped(BaseException):
    """SIGTERM came."""


@click.command(cls=Command)
@click.argument("manifest", type=FILE)
@click.argument("edit_options", metavar="[-- OPTIONS OF EDIT]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--output-template",
    metavar="TEXT",
    help="Name of the outputs of rows that have none: {id}, {stem}, {parent} of the source, {driving}, {mode}, {line}. "
    "Its folders are made.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Leave out clips whose output was made of the same inputs, settings and weights.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes, each with its own networks.  [default: 1]")
@click.option("--gpus", metavar="N,N,...", help="One process for each of these GPUs, in place of --workers.")
@click.option("--shard", metavar="I/N", help="Only the I-th of N parts.  [default: by SLURM or Kubernetes, else 1/1]")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Further tries of a clip whose worker died or that ended with exit code 1 or 6.",
)
@click.option(
    "--results", type=FILE, help="JSON lines, one for each clip.  [default: MANIFEST.results.jsonl beside it]"
)
@click.option(
    "--claim-timeout",
    type=Finite(min=1),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="After this silence another machine's clip is taken over.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or actors of a Ray cluster (RAY_ADDRESS, else one on this machine).",
)
@click.option("--gpus-per-actor", type=Finite(min=0), default=0, show_default=True, help="For --engine ray.")
@click.option("--print-commands", is_flag=True, help="Run nothing; print one command a line.")
@progress_option
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table, only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Let the edits talk; show tracebacks of bugs.")
@click.pass_context
def batch(
    ctx: click.Context,
    manifest: Path,
    edit_options: tuple[str, ...],
    output_template: str | None,
    overwrite: bool,
    skip_existing: bool,
    workers: int | None,
    gpus: str | None,
    shard: str | None,
    fail_fast: bool,
    retries: int,
    results: Path | None,
    claim_timeout: float,
    engine: str,
    gpus_per_actor: float,
    print_commands: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Edit or dub many clips, listed in a file, with networks that are loaded once for each process.

    MANIFEST is JSON lines or CSV. A row has an id and any options of `dpe edit` by their long names (source, driving,
    mode, output, ...), or, with audio and nothing that drives, of `dpe dub`; what stands after -- holds for all rows.
    Files are named as on the command line, from the current folder. All rows are checked before the first is run.
    Prints the path of the results file. Exit code 8: some clips failed, which are listed there.

    \b
    dpe batch clips.jsonl --output-template 'out/{id}_{mode}.mov' --skip-existing -- --codec prores
    """
    from dpe_cli.batch import Outcome, ProcessPool, counted, raised_by_sigterm, run_batch, write_results
    from dpe_cli.manifest import check_template, parse_shard, read_manifest, shard_of_scheduler

    say = speaker(quiet)
    if workers and gpus:
        raise click.UsageError("--gpus starts one worker for each: leave --workers out")
    if any(option.startswith("--config") for option in edit_options):
        raise click.UsageError("give --config to dpe batch itself: what it says of edit holds for all rows")
    devices = gpu_names(gpus)
    if output_template:
        check_template(output_template)
    part = parse_shard(shard) if shard else shard_of_scheduler(os.environ)
    common = [*(["--overwrite"] if overwrite else []), *edit_options]
    plan = Planner(ctx, manifest, common, output_template, skip_existing)
    clips = plan.clips(read_manifest(manifest), part)
    if part:
        say(f"shard {part} (from {part.origin}): {len(clips)} clips")
    for clip in clips:
        if clip.problem:
            say(f"{clip.row.id}: {clip.problem.message}")
    sound = [clip for clip in clips if clip.problem is None]
    if print_commands:
        print_all(ctx, sound)
        raise click.exceptions.Exit(SOME_FAILED if len(sound) < len(clips) else 0)

    results = results or results_file(manifest, part)
    if results.resolve() in plan.files:
        raise OutputError(f"{results} is the list, or a file that one of its clips reads or writes", "name another")
    talk = ["--verbose"] if verbose else ["--quiet"]
    items = [clip.item(skip_existing, claim_timeout, talk) for clip in sound]
    outcomes = [clip.failure() for clip in clips if clip.problem]
    over = fail_fast and bool(outcomes)
    outcomes += [Outcome(item.id, "stopped", STOPPED, f"{outcomes[0].id} failed before it") for item in items if over]
    write_results(results, outcomes)
    if not over:
        make = functools.partial(make_worker, devices)
        slots = min(len(devices) or workers or 1, max(len(items), 1))
        pool = ray_pool(make, slots, gpus_per_actor) if engine == "ray" else ProcessPool(make, slots)

        def keep(outcome: "Outcome") -> None:
            outcomes.append(outcome)
            write_results(results, outcomes)

        try:
            with raised_by_sigterm(Stopped), display(progress_kind(quiet), items, keep) as listener:
                run_batch(items, pool, listener, retries, fail_fast)
        except (Stopped, KeyboardInterrupt) as error:
            say(f"Stopped after {len(outcomes)} of {len(clips)} clips; to go on, start it again with --skip-existing")
            raise click.exceptions.Exit(STOPPED if isinstance(error, Stopped) else INTERRUPTED) from None
    if not quiet:
        show_outcomes(outcomes)
        say(", ".join(f"{number} {status}" for status, number in counted(outcomes).items()) or "nothing to do")
    tell_result(results, results)
    if any(outcome.status not in ("done", "skipped") for outcome in outcomes):
        raise click.exceptions.Exit(SOME_FAILED)


def gpu_names(text: str | None) -> list[str]:
    """`0,2` -> cuda:0, cuda:2. Raises click.UsageError."""
    numbers = text.split(",") if text else []
    if not all(number.strip().isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise click.UsageError(f"--gpus {text}: give different numbers with commas between them, for instance 0,1")
    return [f"cuda:{number.strip()}" for number in numbers]


def results_file(manifest: Path, shard: "Shard | None") -> Path:
    """`clips.results.jsonl` beside `clips.jsonl`; every shard has its own."""
    part = f".{shard.index}-of-{shard.count}" if shard and shard.count > 1 else ""
    return manifest.with_name(f"{manifest.stem}{part}.results.jsonl")


def ray_pool(make: Callable, slots: int, gpus: float) -> Any:
    """Actors. Raises click.UsageError without the package."""
    try:
        from dpe_cli.ray_pool import RayPool
    except ModuleNotFoundError as error:
        raise click.UsageError("--engine ray needs a package: pip install 'dpe-cli[ray]'") from error
    return RayPool(make, slots, gpus)
