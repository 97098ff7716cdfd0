"""The worker of a batch: edits, one after the other in one process, with networks that stay loaded."""

import contextlib
import io
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpe_cli.commands.command import OUT_OF_MEMORY
from dpe_cli.commands.dub import dub
from dpe_cli.commands.edit import Host, edit
from dpe_cli.commands.provenance import ingredients
from dpe_cli.errors import DPEError

if TYPE_CHECKING:
    from dpe_cli.batch import Item, Outcome, Tell

COMMANDS = {command.name: command for command in (edit, dub)}


@dataclass(frozen=True)
class Work:
    """What a worker needs to do one clip."""

    command: str  # of COMMANDS
    arguments: list[str]
    defaults: dict[str, Any]  # what files of settings say
    folder: str  # that file names start from
    output: Path
    skip: bool  # a matching sidecar is enough
    mark: str | None  # of the sidecar when the batch began: another one means that another machine did it since
    timeout: float  # of claims


class Lost(Exception):
    """Our claim was taken over."""


class WorkerHost(Host):
    """Keeps the networks, and passes the progress of the edit in hand on."""

    needs_sidecar = True  # it says that a clip is done

    def __init__(self) -> None:
        super().__init__()
        self.tell: Tell = lambda done, total, what: None
        self.claim: Any = None

    def progress(self, quiet: bool) -> Callable[[Iterable, int | None, str], Iterator]:
        def passed_on(items: Iterable, total: int | None, what: str) -> Iterator:
            for count, item in enumerate(items, 1):
                if self.claim.lost.is_set():
                    raise Lost
                self.tell(count, total, what)
                yield item

        return passed_on


class EditWorker:
    """Does one edit after the other in this process; `device` is in place of what the edits ask for."""

    def __init__(self, device: str | None = None, host: WorkerHost | None = None):
        self.device, self.host = device, host or WorkerHost()

    def __call__(self, item: "Item", tell: "Tell") -> "Outcome":
        """Never raises but for KeyboardInterrupt."""
        from dpe_cli.batch import Outcome

        started, work = time.monotonic(), item.payload
        self.host.tell = tell
        known = {"id": item.id, "output": str(work.output), "worker": self.device or f"process {os.getpid()}"}
        try:
            status, facts = self.attempt(work)
            code, reason = 0, facts.pop("reason", None)
        except Lost:
            status, code, reason, facts = "busy", 0, "another machine took it over", {}
        except click.ClickException as error:
            status, code, reason, facts = "failed", error.exit_code, error.format_message(), {}
            if isinstance(error.__cause__, Lost):
                status, code = "busy", 0
        except click.exceptions.Exit as error:  # it has answered a signal to this process
            status, code, reason, facts = "stopped", error.exit_code, "stopped", {}
        except DPEError as error:
            status, code, reason, facts = "failed", error.exit_code, str(error), {}
        except MemoryError:
            status, code, reason, facts = "failed", OUT_OF_MEMORY, "the memory is used up", {}
        except Exception as error:
            if "--verbose" in work.arguments:
                traceback.print_exc()
            status, code, reason, facts = "failed", 1, f"unexpected {type(error).__name__}: {error}", {}
        seconds = time.monotonic() - started
        return Outcome(status=status, exit_code=code, reason=reason, seconds=seconds, **{**known, **facts})

    def attempt(self, work: Work) -> tuple[str, dict[str, Any]]:
        """Status and facts for the outcome. Raises what the edit raises."""
        from dpe_cli.ledger import claimed

        os.chdir(work.folder)
        arguments = [*work.arguments, *([f"--device={self.device}"] if self.device else [])]
        made_of = ingredients(self.context(arguments, work))
        if done := self.made(work, made_of["key"]):
            return "skipped", done
        with claimed(work.output, work.timeout) as claim:
            if claim is None:
                return "busy", {"reason": "another machine works on it"}
            if done := self.made(work, made_of["key"]):  # between the look and the claim
                return "skipped", done
            if claim.taken_over:  # whose owner may have died after writing the output
                arguments.append("--overwrite")
            return "done", self.edit(arguments, work, claim)

    def context(self, arguments: list[str], work: Work) -> click.Context:
        """The parsed options of the clip."""
        command = COMMANDS[work.command]
        return command.make_context(work.command, list(arguments), default_map=dict(work.defaults), obj=self.host)

    def made(self, work: Work, key: str) -> dict[str, Any] | None:
        """Facts of an output that is there already, made of the same, if that is enough."""
        from dpe_cli.ledger import read_marker

        marker = read_marker(work.output, exactly=True)
        if not marker or marker.get("key") != key or not (work.skip or marker.get("mark") != work.mark):
            return None
        return {"frames": marker.get("frames"), "reason": "it is there, made of the same inputs, settings and weights"}

    def edit(self, arguments: list[str], work: Work, claim: Any) -> dict[str, Any]:
        """Runs the edit, whose sidecar marks its output as done."""
        self.host.claim = claim
        unheard = io.StringIO()  # what an edit says has its place in the results
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(unheard))
            if "--verbose" not in arguments:
                stack.enter_context(contextlib.redirect_stderr(unheard))
            context = stack.enter_context(self.context(arguments, work))
            report = COMMANDS[work.command].invoke(context)
        return {"frames": report.counts()["frames"]}


def make_worker(devices: list[str], slot: int) -> EditWorker:
    """The worker of a slot, made in its own process."""
    return EditWorker(devices[slot] if devices else None)
