"""Several processes that train the same networks (torchrun): they begin, stop and keep time together."""

import os
import threading

import torch
import torch.distributed as dist

from dpe_cli.device import choose_device
from dpe_cli.models import DPE


def join_processes(device: str) -> str:
    """Joins the other processes that torchrun (or RANK and WORLD_SIZE) speaks of; the device of this one.

    That is the one named (auto: a CUDA GPU, else the CPU), but each process of a machine has a GPU of its own, by
    LOCAL_RANK. Raises DeviceError if it is not there.
    """
    if device == "auto":  # no Apple GPU: nobody has trained on one
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = choose_device(device).type == "cuda"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if on_gpu:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            choose_device(device)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # Gradients go from GPU to GPU; what processes tell each other of clocks and signals lies on the CPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return device


def share_networks(model: DPE) -> None:
    """Gives every process the first one's weights, in place on the CPU: each has begun from its own samples alone."""
    if dist.is_initialized():
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def shared_clock(minutes: float) -> float:
    """The first process's clock, so that all stop at the same step."""
    if not dist.is_initialized():
        return minutes
    clock = torch.tensor([minutes], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return float(clock)


def shared_stop(stop: threading.Event) -> bool:
    """Whether any process was told to stop, so that all stop at the same step."""
    if not dist.is_initialized():
        return stop.is_set()
    flag = torch.tensor([float(stop.is_set())])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
