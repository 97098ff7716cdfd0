"""Samples for training, made by processes beside it, and held-out ones."""

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dpe_cli.dataset import Clip, Sampler
from dpe_cli.errors import InputError
from dpe_cli.mesh import Mesh
from dpe_cli.recipe import Phase

MEASURED = 4  # samples of held-out people at once: 8 are slower on a CPU
PREFETCH = 2  # batches that each maker of samples has ready
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps them until they are taken


class _Samples(Dataset):
    """Samples by number."""

    def __init__(self, clips: list[Clip], mesh: Mesh, phase: Phase, codes_only: bool):
        names = ("eye_share", "eye_weight", "open_share", "turn_share", "virtual_share", "face_weight", "still_camera")
        choice = {name: getattr(phase, name) for name in names}
        self.sampler, self.seed = Sampler(clips, mesh, phase.seed, codes_only=codes_only, **choice), phase.seed

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        self.sampler.random = np.random.default_rng([self.seed, number])
        return self.sampler.sample()


class _Numbers:
    """For each step the numbers of the samples that this process takes, from step `start` on."""

    def __init__(self, batch: int, start: int):
        self.batch, self.start = batch, start
        self.rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.share = batch // world

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            first = step * self.batch + self.rank * self.share
            yield list(range(first, first + self.share))
            step += 1


@contextlib.contextmanager
def batches(
    clips: list[Clip], mesh: Mesh, phase: Phase, start: int = 0, codes_only: bool = False, device: str = "cpu"
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Endless batches of a phase, this process's share of each, from step `start` on; their makers end with it.

    device: where they are going.
    Raises InputError where the memory that processes share has no room for what is made ahead.
    """
    samples, numbers = _Samples(clips, mesh, phase, codes_only or phase.stage == "codes"), _Numbers(phase.batch, start)
    if phase.workers and SHARED_MEMORY.exists():
        check_shared_memory(phase.workers * PREFETCH * numbers.share * sum(v.nbytes for v in samples[0].values()))
    loader = iter(
        DataLoader(
            samples,
            batch_sampler=numbers,
            num_workers=phase.workers,
            pin_memory=torch.device(device).type == "cuda",  # that alone takes GPU memory
            prefetch_factor=PREFETCH if phase.workers else None,
            worker_init_fn=_leave_signals,
        )
    )
    try:
        yield loader
    finally:  # after an error its traceback keeps the loader, whose workers heed no signal, so that we never ended
        if phase.workers:
            loader._shutdown_workers()


def check_shared_memory(needed: int) -> None:
    """Raises InputError unless so many bytes are free: what is written beyond ends a process without a word."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        problem = f"samples need {needed >> 20} MiB of {SHARED_MEMORY}, {free >> 20} MiB are free"
        raise InputError(problem, "start docker with --ipc=host, or set fewer workers")


def _leave_signals(number: int) -> None:
    """Schedulers signal every process of a job: the makers of samples leave it to the training, which saves first."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def held_out_batches(clips: list[Clip], mesh: Mesh, count: int, still_camera: bool = False) -> list[dict[str, Tensor]]:
    """Always the same samples of people that training never saw, in batches of MEASURED. still_camera: see Sampler."""
    sampler = Sampler(clips, mesh, seed=7, augment=False, still_camera=still_camera)
    samples = [{name: torch.from_numpy(value) for name, value in sampler.sample().items()} for _ in range(count)]
    return [default_collate(samples[first : first + MEASURED]) for first in range(0, count, MEASURED)]
