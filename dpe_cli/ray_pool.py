"""The workers of a batch as actors of a Ray cluster: as in processes, the networks stay loaded from clip to clip."""

import contextlib
import os
from typing import Any

import ray
from ray.exceptions import RayError

from dpe_cli.batch import STOP_SECONDS, Event, Item, Make

ERROR = 1


class Actor:
    """A worker in an actor: one thread works, the other one hears that it is to stop."""

    def __init__(self, make: Make, slot: int):
        self.work, self.stopping = make(slot), False

    def do(self, item: Item) -> Any:
        """The outcome of an item."""
        return self.work(item, self.tell)

    def tell(self, done: int, total: int | None, what: str) -> None:
        """Called at every frame."""
        if self.stopping:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Abandons the clip in hand, cleanly."""
        self.stopping = True


class RayPool:
    """An actor for each slot, with a share of a GPU; one that dies is made anew with the next item of its slot.

    It joins the cluster of RAY_ADDRESS, else it starts one on this machine. An actor never has more than one clip, so
    nothing piles up.
    """

    def __init__(self, make: Make, slots: int, gpus: float = 0):
        self.slots, self.make = slots, make
        self.ours = not ray.is_initialized()
        if self.ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # this tool tells nobody anything
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(slots, os.cpu_count() or 1)}
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=40, **here)
        self.actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(Actor)
        self.actors: dict[int, Any] = {}
        self.pending: dict[Any, int] = {}

    def start(self, slot: int, item: Item) -> None:
        if slot not in self.actors:
            self.actors[slot] = self.actor.remote(self.make, slot)
        self.pending[self.actors[slot].do.remote(item)] = slot

    def events(self, seconds: float) -> list[Event]:
        if not self.pending:
            return []
        ready, _ = ray.wait(list(self.pending), timeout=seconds)
        events = []
        for reference in ready:
            slot = self.pending.pop(reference)
            try:
                events.append(Event(slot, outcome=ray.get(reference)))
            except RayError as error:
                with contextlib.suppress(Exception):  # it may be gone
                    ray.kill(self.actors.pop(slot))
                events.append(Event(slot, died=f"its actor died: {str(error).splitlines()[0]}", exit_code=ERROR))
        return events

    def stop(self) -> None:
        if self.pending:
            for actor in self.actors.values():
                actor.stop.remote()
            ray.wait(list(self.pending), num_returns=len(self.pending), timeout=STOP_SECONDS)
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors.clear()
        self.pending.clear()
        if self.ours:
            ray.shutdown()
