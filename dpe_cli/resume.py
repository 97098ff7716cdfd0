"""Edits and dubs in segments, one after the other, so that a killed run goes on where it was.

The plan and the segments lie in a hidden folder beside the output, `work_folder`, until that is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import dpe_cli
from dpe_cli.container import files_of
from dpe_cli.dub import DubSettings, check_dub, edits_for, networks_used
from dpe_cli.errors import InputError, OutputError
from dpe_cli.face import FaceDetector
from dpe_cli.jobs import Engine
from dpe_cli.muxer import ffmpeg_exe
from dpe_cli.pipeline import Progress, silent, unheard
from dpe_cli.planner import check_container, make_dub_plan, make_plan
from dpe_cli.report import Report, write_text
from dpe_cli.request import Driving, Edits, EditSettings, check_request, decide_paste, edits_of, files_read
from dpe_cli.segment_plan import SCHEMA, Plan, read_plan, report_from
from dpe_cli.segments import check_seams, edit_segments, join_plan, read_record

FINISHED = "finished.json"
LOCK = "lock"


def edit_resumable(
    source: Path,
    driving: Driving | Edits,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: EditSettings | None = None,
    *,
    report_path: Path | None = None,
    seconds: float | None = None,
    seal: Callable[[Path], None] = lambda part: None,
    finish: Callable[[Report], None] = lambda report: None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Report:
    """`edit_video` that goes on where an earlier run of the same request was killed; the frames are the same.

    What a kill costs is at most a segment of `seconds`, by default SEGMENT_SECONDS, and what came before the first one.
    A run of another request (other files, settings, weights) beside the same output is given up, which `say` is told.
    The report is written before the output appears. `seal` may change the whole file before that takes its name,
    `finish` is called when it has it, also in the run after the one that was killed in between.
    Raises OutputError if another run is at work on this output.
    """
    settings = settings or EditSettings()
    edits = edits_of(driving, settings)
    request = (source, edits, output)
    inputs, words = files_read(source, edits, settings), [asdict(edits), chosen(settings), seconds]
    return resumed(
        output, inputs, words, partial(check_request, *request, settings),
        lambda path, key: make_plan(
            path, *request, engine, detector, settings, seconds=seconds, key=key, progress=progress, say=say
        ),
        engine, detector, overwrite=settings.overwrite, seam_limit=settings.seam_limit, report_path=report_path,
        seal=seal, finish=finish, progress=progress, say=say,
    )  # fmt: skip


def dub_resumable(
    source: Path,
    audio: Path,
    output: Path,
    engine: Engine,
    detector: FaceDetector,
    settings: DubSettings | None = None,
    *,
    report_path: Path | None = None,
    seconds: float | None = None,
    seal: Callable[[Path], None] = lambda part: None,
    finish: Callable[[Report], None] = lambda report: None,
    progress: Progress = silent,
    say: Callable[[str], None] = unheard,
) -> Report:
    """`dub_video` that goes on where an earlier run was killed, as `edit_resumable` does."""
    settings = settings or DubSettings()
    edit, edits, request = settings.edit, edits_for(source, settings.edit), (source, audio, output)
    inputs = [*files_read(source, edits, edit), audio, *settings.files]
    words = [{**asdict(settings), "edit": None}, networks_used(), asdict(edits), chosen(edit), seconds]
    return resumed(
        output, inputs, words, partial(check_dub, *request, settings),
        lambda path, key: make_dub_plan(
            path, *request, engine, detector, settings, seconds=seconds, key=key, progress=progress, say=say
        ),
        engine, detector, overwrite=edit.overwrite, seam_limit=edit.seam_limit, report_path=report_path,
        seal=seal, finish=finish, progress=progress, say=say,
    )  # fmt: skip


def resumed(
    output: Path, inputs: list[Path], words: list[Any], check: Callable[[], object],
    make: Callable[[Path, str], Plan], engine: Engine, detector: FaceDetector, *, overwrite: bool,
    seam_limit: float | None, report_path: Path | None, seal: Callable[[Path], None], finish: Callable[[Report], None],
    progress: Progress, say: Callable[[str], None],
) -> Report:  # fmt: skip
    """Makes what is still to be made of a request, which `inputs` and `words` tell from others, in segments.

    `check` fails early, `make` writes the plan with this key to this path.
    """
    started, folder = time.monotonic(), work_folder(output)
    check_container(output)
    check_folder(output)
    with locked(folder, output):
        key = request_key(inputs, [*words, str(output.absolute()), engine.description, detector.name])
        if done := finished(output, key):
            check_seams(done, seam_limit)  # nobody has asked for this limit before
            finish(done)
            clear_away(folder)
            return done
        check()
        plan = resumed_plan(folder, key, say) or make(folder / "plan.json", key)
        plan = with_limit(plan, seam_limit)  # which may be another than that of the run that was killed
        todo = next((number for number in range(plan.segments) if read_record(plan, number) is None), plan.segments)
        if todo:
            say(f"{todo} of {plan.segments} segments are there already")
        if todo < plan.segments:
            edit_segments(plan, todo, plan.segments - 1, engine, detector, progress)

        def ready(part: Path, report: Report) -> None:
            seal(part)
            report.seconds = time.monotonic() - started
            if report_path:
                report.write(report_path)
            write_text(folder / FINISHED, json.dumps({**identity_of(part), "key": key, "report": asdict(report)}))

        (folder / ".join").mkdir()
        report = join_plan(plan, overwrite=overwrite, folder=folder / ".join", ready=ready, say=say)
        finish(report)
        clear_away(folder)
    return report


def clear_away(folder: Path) -> None:
    """Removes the work folder; what says that all is done goes last, as this can be killed too."""
    for left in folder.iterdir():
        if left.name not in (LOCK, FINISHED):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(folder)


def work_folder(output: Path) -> Path:
    """Where a run that can be resumed keeps what it has done."""
    return output.absolute().with_name(f".{output.name}.dpe")


def identity_of(path: Path) -> dict[str, int]:
    """What a file keeps when it is renamed."""
    status = path.stat()
    return {"inode": status.st_ino, "bytes": status.st_size, "changed": status.st_mtime_ns}


def finished(output: Path, key: str | None = None) -> Report | None:
    """The report of a run that was killed after its output got its name. `key`: of this request only."""
    try:
        words = json.loads((work_folder(output) / FINISHED).read_text(encoding="utf-8"))
        same = key in (None, words["key"]) and all(words[name] == is_ for name, is_ in identity_of(output).items())
        return report_from(words["report"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resumed_plan(folder: Path, key: str, say: Callable[[str], None]) -> Plan | None:
    """The plan of the run that was killed, if it was for the same request; else the folder is emptied."""
    for left in folder.glob(".*"):  # half-written
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    (folder / FINISHED).unlink(missing_ok=True)
    there = folder / "plan.json"
    if there.exists():
        with contextlib.suppress(InputError):
            plan = read_plan(there)
            if plan.key == key:
                return plan
        say("the files, the settings or the weights have changed since the run that is to be resumed: it begins anew")
    for left in folder.iterdir():
        if left.name != LOCK:
            left.unlink()
    return None


def with_limit(plan: Plan, limit: float | None) -> Plan:
    """A plan with the limit of seams that is asked for now. Raises UsageError where there are none."""
    if limit is not None:
        decide_paste(plan.edits, replace(plan.settings, seam_limit=limit), unheard)
    if "seam_limit" in plan.report.settings:
        plan.report.settings["seam_limit"] = limit
    return replace(plan, settings=replace(plan.settings, seam_limit=limit))


def chosen(settings: EditSettings) -> dict[str, Any]:
    """The settings that the frames depend on."""
    return {name: value for name, value in asdict(settings).items() if name not in ("overwrite", "seam_limit")}


def request_key(inputs: Iterable[Path], words: Iterable[Any]) -> str:
    """A hash of all that the frames depend on. Files count by name, size and time of change."""
    files = [
        (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for i in inputs for file in files_of(i)
    ]
    words = [dpe_cli.__version__, files, *words, ffmpeg_exe(), SCHEMA]
    return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()


def check_folder(output: Path) -> None:
    """Raises OutputError where no folder can be made beside the output."""
    if not output.parent.is_dir():
        raise OutputError(f"the folder {output.parent} does not exist", "make it or name another")


@contextlib.contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """The folder, made and held by this process alone; a lock ends with its process. Raises OutputError."""
    try:
        import fcntl
    except ImportError:  # Windows: there nobody prevents two runs
        folder.mkdir(exist_ok=True)
        yield
        return
    while True:
        try:
            folder.mkdir(exist_ok=True)
            file = (folder / LOCK).open("w")
        except FileNotFoundError:
            continue  # another run has just ended and removed it
        except OSError as error:
            raise OutputError(f"{folder} cannot be made: {error.strerror}", "name another output") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another run is at work on {output}", "wait for it, or name another") from None
            if (folder / LOCK).exists() and (folder / LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # nothing was done yet
                        if [left.name for left in folder.iterdir()] == [LOCK]:
                            shutil.rmtree(folder)
                return
