"""Many clips over several workers: who gets which, what becomes of failures, what is written down.

A pool has slots; each works on one clip at a time, and never has a second one waiting. What a clip is and how it is
done is the worker's business: it is made once in each process by a function that can be pickled, and then called with
one item after the other.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from dpe_cli.errors import OutputError
from dpe_cli.report import write_text

RETRIED = (1, 6)  # exit codes after which another try may help: unexpected, and device or memory
BUSY_SECONDS = 2.0  # until a clip that another machine has is looked at again
STOP_SECONDS = 8.0  # that workers get to clean up, of the ten that a stop may take

Tell = Callable[[int, int | None, str], None]  # frames done, of how many, of what


@dataclass(frozen=True)
class Item:
    """A clip to be done; `payload` is for the worker."""

    id: str
    payload: Any
    cost: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of a clip; a line of the results file."""

    id: str
    status: str  # done, skipped, failed, stopped; busy while another machine has it
    exit_code: int = 0
    reason: str | None = None
    frames: int | None = None
    seconds: float = 0.0
    output: str | None = None
    tries: int = 1
    worker: str | None = None

    def line(self) -> str:
        """As JSON."""
        return json.dumps(asdict(replace(self, seconds=round(self.seconds, 3))))


@dataclass(frozen=True)
class Event:
    """Something a slot says: how far it is, or with an `outcome` that its clip is finished, or that it has `died`."""

    slot: int
    done: int = 0
    total: int | None = None
    what: str = ""
    outcome: Outcome | None = None
    died: str | None = None
    exit_code: int = 1


class Pool(Protocol):
    """Workers. A slot that died is started anew with the next item that it gets."""

    slots: int

    def start(self, slot: int, item: Item) -> None:
        """Gives an idle slot something to do."""

    def events(self, seconds: float) -> list[Event]:
        """What happened, after waiting for it for at most this long."""

    def stop(self) -> None:
        """Ends all workers; what they have in hand is abandoned cleanly."""


class Listener(Protocol):
    """Hears of what happens, to show it."""

    def began(self, slot: int, item: Item) -> None: ...
    def heard(self, event: Event) -> None: ...
    def finished(self, slot: int | None, outcome: Outcome) -> None: ...


Make = Callable[[int], Callable[[Item, Tell], Outcome]]  # the worker of a slot


def run_batch(
    items: Iterable[Item], pool: Pool, listener: Listener, retries: int = 1, fail_fast: bool = False
) -> list[Outcome]:
    """Does all items, in their order; gives the outcomes in the order in which they came.

    After a failure it goes on, or with `fail_fast` lets go of everything. A clip that another machine has is put off
    until that one is done with it or dead. Whatever ends this function, the workers end too.
    """
    waiting: deque[tuple[Item, int]] = deque((item, 1) for item in items)
    put_off: list[tuple[float, Item, int]] = []
    working: dict[int, tuple[Item, int]] = {}
    outcomes: list[Outcome] = []

    def settle(slot: int | None, outcome: Outcome) -> None:
        outcomes.append(outcome)
        listener.finished(slot, outcome)

    try:
        while waiting or put_off or working:
            now = time.monotonic()
            waiting.extend((item, tries) for due, item, tries in put_off if due <= now)
            put_off = [one for one in put_off if one[0] > now]
            for slot in range(pool.slots):
                if waiting and slot not in working:
                    working[slot] = waiting.popleft()
                    listener.began(slot, working[slot][0])
                    pool.start(slot, working[slot][0])
            for event in pool.events(0.5):
                if event.slot not in working or (event.outcome is None and event.died is None):
                    listener.heard(event)
                    continue
                item, tries = working.pop(event.slot)
                failed = Outcome(item.id, "failed", event.exit_code, event.died)
                outcome = replace(event.outcome or failed, tries=tries)
                again = outcome.status == "failed" and (event.died or outcome.exit_code in RETRIED)
                if outcome.status == "busy":
                    put_off.append((time.monotonic() + BUSY_SECONDS, item, tries))
                elif again and tries <= retries:
                    waiting.append((item, tries + 1))
                else:
                    settle(event.slot, outcome)
                if outcome.status == "failed" and outcomes and outcomes[-1] is outcome and fail_fast:
                    left = [*working.values(), *waiting, *((item, tries) for _, item, tries in put_off)]
                    pool.stop()
                    for item, _ in left:
                        settle(None, Outcome(item.id, "stopped", 75, f"{outcome.id} failed before it"))
                    return outcomes
    finally:
        pool.stop()
    return outcomes


def write_results(path: Path, outcomes: Iterable[Outcome]) -> None:
    """One line for each clip; the file is whole at every moment. Raises OutputError."""
    try:
        write_text(path, "".join(outcome.line() + "\n" for outcome in outcomes))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "name another --results") from error


# Workers as processes of this machine


class ProcessPool:
    """A process for each slot, started when it is first needed."""

    def __init__(self, make: Make, slots: int):
        self.make, self.slots = make, slots
        self.context = multiprocessing.get_context("spawn")  # a fork would take CUDA and OpenCV's threads along, broken
        self.processes: dict[int, tuple[Any, Connection]] = {}
        self.working: set[int] = set()

    def start(self, slot: int, item: Item) -> None:
        if slot not in self.processes:
            ours, theirs = self.context.Pipe()
            threads = max(1, (os.cpu_count() or 1) // self.slots)
            process = self.context.Process(target=serve, args=(theirs, self.make, slot, threads), daemon=True)
            process.start()
            theirs.close()
            self.processes[slot] = (process, ours)
        self.working.add(slot)
        with contextlib.suppress(BrokenPipeError):  # it has just died: that is told by the next look at it
            self.processes[slot][1].send(item)

    def events(self, seconds: float) -> list[Event]:
        slots = {connection: slot for slot, (_, connection) in self.processes.items()}
        events = []
        for connection in wait(list(slots), seconds):
            slot = slots[connection]
            try:
                event = connection.recv()
            except (EOFError, OSError):
                process, _ = self.processes.pop(slot)
                process.join()
                connection.close()
                code = process.exitcode or -signal.SIGTERM  # which it answers by ending well
                how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
                died = f"its worker process was ended {how}"
                event = Event(slot, died=died, exit_code=128 - code if code < 0 else 1)
            if event.outcome or event.died:
                self.working.discard(slot)
            events.append(event)
        return events

    def stop(self) -> None:
        for slot, (process, connection) in self.processes.items():
            connection.close()  # which ends the idle ones
            if slot in self.working:
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process, _ in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self.processes.clear()
        self.working.clear()


def serve(connection: Connection, make: Make, slot: int, threads: int) -> None:
    """The life of a worker process: items in, events out, until the other end is closed or SIGTERM comes.

    SIGTERM is answered as Ctrl-C is: what is half done is cleaned away.
    """

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the first one decides
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported: the processes share the cores
    os.dup2(2, 1)  # standard output is for results
    over = (KeyboardInterrupt, EOFError, BrokenPipeError, ConnectionResetError)
    with contextlib.suppress(*over), raised_by_sigterm(KeyboardInterrupt):
        work = make(slot)
        while True:
            item = connection.recv()
            last = 0.0

            def tell(done: int, total: int | None, what: str) -> None:
                nonlocal last
                if time.monotonic() - last >= 0.25:
                    last = time.monotonic()
                    connection.send(Event(slot, done, total, what))  # fails, and so ends the work, if nobody listens

            outcome = work(item, tell)
            if outcome.status == "stopped":  # by our SIGTERM, which the edit has answered
                return
            connection.send(Event(slot, outcome=outcome))


@contextlib.contextmanager
def raised_by_sigterm(error: type[BaseException]) -> Iterator[None]:
    """Within it the first SIGTERM raises `error` in the main thread; more do not disturb the cleaning up."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise error

    if threading.current_thread() is not threading.main_thread():  # there signals are not ours
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def counted(outcomes: Iterable[Outcome]) -> Mapping[str, int]:
    """How many clips have each status."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    return counts
