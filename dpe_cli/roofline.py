"""What the networks take, beside what the machine can do at most: its products of matrices and its memory."""

import os
import platform
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpe_cli.device import AUTOCAST, describe_device
from dpe_cli.drawn import drawn
from dpe_cli.engine import Engine, to_tensor
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.models.layers import GAIN, SLOPE, Blur, StyledConv

MODES = ("exp", "pose", "both")

REPEATS = 5
# Side of the matrices, and numbers of the block, that the machine is measured with: on a GPU so large that starting
# the work counts for nothing.
MATRIX, BLOCK = {"cuda": 8192, "mps": 4096, "cpu": 2048}, {"cuda": 2**28, "mps": 2**26, "cpu": 2**25}
MATRIX_OPERATIONS = ("convolution", "mm", "addmm", "bmm")


def best(function: Callable[[], object], repeats: int | None = None) -> float:
    """Seconds of the fastest of REPEATS calls, or so many, after a first one."""
    function()
    times = []
    for _ in range(repeats or REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


# The machine


def measure_machine(engine: Engine) -> dict[str, Any]:
    """What the device can do at most: products of matrices in the engine's 16 bits or in float32, copies in memory."""
    device, done = engine.device, synchroniser(engine.device)
    precision = engine.precision if engine.precision in AUTOCAST else "fp32"
    side = MATRIX[device.type]
    with torch.inference_mode():
        a, b = torch.randn(2, side, side, device=device).to(AUTOCAST.get(precision, torch.float32))
        seconds = best(lambda: (a @ b, done()))
        block = torch.zeros(BLOCK[device.type], device=device)
        copy = torch.empty_like(block)
        copying = best(lambda: (copy.copy_(block), done()))
        moved = 2 * block.nbytes
    return {
        "device": describe_device(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrix_precision": precision,
        "matrix_gflops": round(2 * side**3 / seconds / 1e9, 1),
        "memory_gb_per_s": round(moved / copying / 1e9, 1),
    }


def synchroniser(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was told."""
    waits = {"cuda": partial(torch.cuda.synchronize, device), "mps": torch.mps.synchronize}
    return waits.get(device.type, lambda: None)


def processor() -> str:
    """Its name, where the system tells it."""
    if (file := Path("/proc/cpuinfo")).exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# The networks


class Traffic(TorchDispatchMode):
    """Counts the bytes that convolutions and products read and write: what must pass the memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in MATRIX_OPERATIONS:
            tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def count_work(config: DPEConfig, batch: int) -> dict[str, tuple[float, float]]:
    """GFLOP (a product and a sum are two) and GB of each use of the networks, for one frame of a batch.

    Counted in the networks as the paper has them, bytes in float32, whatever short cuts are taken in computing them: a
    measure of the task.
    """
    with FakeTensorMode(), torch.no_grad():  # shapes without numbers: nothing is computed
        networks = DPE(config).requires_grad_(False)
        picture = torch.empty(batch, 3, config.size, config.size)
        source = networks.encode(picture)
        code = networks.motion_code(source.latent)
        uses: dict[str, Callable[[], object]] = {
            "encode-source": lambda: networks.encode(picture),
            "encode-driving": lambda: networks.motion_code(networks.encode(picture).latent),
            "generate exp": lambda: networks.transfer_expression(source, code),
            "generate pose": lambda: networks.transfer_pose(source, code),
            "generate both": lambda: networks.transfer_both(source, code, code),
        }
        work = {}
        for name, use in uses.items():
            with FlopCounterMode(display=False) as flops, Traffic() as traffic:
                use()
            work[name] = flops.get_total_flops() / 1e9 / batch, traffic.bytes / 1e9 / batch
    return work


def uses_of(networks: Any, picture: Tensor, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is done with networks in any form; the first comes first."""
    source = []

    def encode() -> Tensor:
        source[:] = [networks.encode(picture)]
        return source[0].latent

    return {
        "encode-source": encode,
        "encode-driving": lambda: networks.motion_code(networks.encode(picture).latent),
        "generate exp": lambda: networks.transfer_expression(source[0], codes),
        "generate pose": lambda: networks.transfer_pose(source[0], codes),
        "generate both": lambda: networks.transfer_pose(
            networks.encode(networks.transfer_expression(source[0], codes)), codes
        ),
    }


def with_sums(values: dict[str, float]) -> dict[str, float]:
    """Also what a frame of each mode takes, where source and driving move."""
    parts = values["encode-source"] + values["encode-driving"]
    return values | {f"all of {mode}": parts + values[f"generate {mode}"] for mode in MODES}


def measure_straightforward(config: DPEConfig, device: torch.device) -> dict[str, float]:
    """Seconds of each use of the straightforward form, with memory as it comes: no large pages, and nothing kept."""
    plain, done = straightforward(DPE(config).eval()).to(device), synchroniser(device)
    picture = to_tensor(drawn((config.size, config.size), 0.0)[None], device).contiguous()
    with torch.inference_mode():
        uses = uses_of(plain, picture, torch.zeros(1, config.motion_dim, device=device))
        return {name: best(lambda use=use: (use(), done()), 2) for name, use in uses.items()}


def straightforward(networks: DPE) -> DPE:
    """A copy that computes as the paper's code does: blurs as convolutions of one channel, and of all pixels; styles in
    the weights of each sample.
    """

    def blur(self: Blur, x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], self.kernel[:1], padding=self.padding)
        return x.view(-1, len(self.kernel), *x.shape[2:])[:, :, :: self.stride, :: self.stride]

    def styled(self: StyledConv, x: Tensor, latent: Tensor) -> Tensor:
        conv, batch = self.conv, len(x)
        weight = conv.weight * conv.style(latent)[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, -1, *x.shape[2:])
        if conv.blur is None:
            x = F.conv2d(x, weight.flatten(0, 1), padding=conv.padding, groups=batch)
        else:
            x = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
        x = x.view(batch, -1, *x.shape[2:])
        x = x if conv.blur is None else conv.blur(x)
        return F.leaky_relu(x + self.bias[:, None, None], SLOPE) * GAIN

    networks = deepcopy(networks)
    for part in networks.modules():
        form = {Blur: blur, StyledConv: styled}.get(type(part))
        if form:
            part.forward = MethodType(form, part)
    return networks


def measure_networks(engine: Engine, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Milliseconds a frame of each use of the networks, and its shares of what the machine can do."""
    batch = engine.batch_size
    crops = np.stack([drawn((engine.size, engine.size), n / batch) for n in range(batch)])
    codes = engine.to_device(engine.motion_codes(crops))
    uses = uses_of(engine.networks, to_tensor(crops, engine.device), codes)
    work = count_work(engine.loaded.config, batch)
    # `compute` waits for the device
    times = with_sums({name: best(lambda use=use: engine.compute(use)) / batch for name, use in uses.items()})
    gflops, sizes = (with_sums({name: counts[i] for name, counts in work.items()}) for i in range(2))
    rows = []
    for name, seconds in times.items():
        gflop, gigabytes = gflops[name], sizes[name] * (0.5 if engine.precision in AUTOCAST else 1)
        matrix, memory = gflop / seconds / machine["matrix_gflops"], gigabytes / seconds / machine["memory_gb_per_s"]
        rows.append(
            {
                "use": name,
                "ms": round(1000 * seconds, 2),
                "fps": round(1 / seconds, 1),
                "gflop": round(gflop, 2),
                "gb": round(gigabytes, 3),
                "of_matrix_rate": float(f"{matrix:.3g}"),
                "of_memory_rate": float(f"{memory:.3g}"),
                "nearer_limit": "arithmetic" if matrix > memory else "memory",
            }
        )
    return rows
