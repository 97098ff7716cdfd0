"""Stages side by side: one reads and looks while another computes and a third writes."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import Empty, Full, Queue
from typing import Protocol, TypeVar

T, R = TypeVar("T"), TypeVar("R")

DEPTH = 4  # items that wait between two stages; a 4K frame has 25 MB
PATIENCE = 0.1  # seconds after which a stage looks whether it is still wanted


class Progress(Protocol):
    """Passes `items` on and shows how far they are; `total` is a guess or None, `what` names the work."""

    def __call__(self, items: Iterable[T], total: int | None, what: str) -> Iterator[T]: ...


def silent(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """A library neither prints nor draws: the default progress."""
    yield from items


def unheard(message: str) -> None:
    """The default for remarks, which the report keeps in any case."""


def ahead(items: Iterable[T], depth: int = DEPTH) -> Iterator[T]:
    """The items, in order, made by a thread that may be `depth` of them ahead.

    What the thread raises is raised here, after the items before it. Whoever stops early waits until the thread has
    ended the item it is at; `items`, where it is a generator, is then closed. Nothing runs before the first item is
    asked for.
    """
    waiting: Queue[tuple[str, object]] = Queue(depth)
    unwanted = threading.Event()

    def put(kind: str, value: object = None) -> bool:
        while not unwanted.is_set():
            try:
                waiting.put((kind, value), timeout=PATIENCE)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            else:
                put("end")
        except BaseException as error:  # KeyboardInterrupt too: it is the caller's to handle
            put("error", error)
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()  # here too Ctrl-C may come
        while True:
            try:
                kind, value = waiting.get(timeout=PATIENCE)  # not for ever: Ctrl-C shall be heard on every system
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        unwanted.set()
        # The garbage collector may close this in that very thread.
        if thread.ident is not None and threading.current_thread() is not thread:
            thread.join()


@contextmanager
def ended(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """The items, which where they are a generator are closed when the block ends.

    So the threads before whoever takes them end with it also where that fails, and do not meet the end of the process.
    """
    try:
        yield items
    finally:
        if hasattr(items, "close"):
            items.close()


def abreast(items: Iterable[T], lanes: Sequence[Callable[[T], R]]) -> Iterator[tuple[T, R]]:
    """Each item with what a lane makes of it, in order.

    Lanes take turns, so that each one's items are the same in every run. Several are threads, which run while the
    caller makes further items, one more than there are lanes; one alone is called as any function.
    """
    if len(lanes) == 1:
        yield from ((item, lanes[0](item)) for item in items)
        return
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in lanes]
        stack.callback(lambda: [future.cancel() for _, future in waiting])  # where the caller stops early
        for number, item in enumerate(items):
            turn = number % len(lanes)
            waiting.append((item, threads[turn].submit(lanes[turn], item)))
            if len(waiting) > len(lanes):
                yield given(waiting)
        while waiting:
            yield given(waiting)


def given(waiting: "deque[tuple[T, Future[R]]]") -> tuple[T, R]:
    """The first that waits, when its lane is done with it."""
    item, future = waiting.popleft()
    return item, future.result()
