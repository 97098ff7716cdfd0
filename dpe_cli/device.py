"""Devices: which one, in what precision, by what runtime, how many crops at once, and memory to and from it."""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dpe_cli.errors import DeviceError
from dpe_cli.models import DPEConfig
from dpe_cli.runtimes import FORMATS, check_format

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("torch", "compile", *FORMATS)
# At most, in all lanes on a GPU, in each of those on a CPU: edits begin a new batch every 32 frames.
BATCH_SIZES = {"cuda": 32, "mps": 8, "cpu": 4}
LANES = {"cuda": 4, "mps": 1, "cpu": 2}
# A crop in the networks is taken to need the memory of this many of their largest feature maps, and the networks may
# have this share of what is free on a GPU.
MAPS, SHARE = 12, 0.5
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
WIDE_BYTES = 2**26  # weights of which a file is larger than this are about as wide as the paper's
# Words of CUDA and MPS, the CPU, and of cuDNN and cuBLAS.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the best there is. Raises DeviceError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise DeviceError(f"there is no device {name}", "use auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("mps is not available: it needs a Mac with an Apple GPU", "use --device auto or cpu")
    if name.startswith("cuda"):
        check_cuda(name)
    return torch.device(name)


def check_cuda(name: str) -> None:
    """Raises DeviceError unless there is such a GPU."""
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA GPU"
        raise DeviceError(f"{name} is not available: {why}", "use --device cpu, or see pytorch.org for a CUDA build")
    count, number = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if number >= count:
        there = "the only GPU is cuda:0" if count == 1 else f"the GPUs are cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"{name} does not exist: {there}", "use --device auto, or one of these")


def choose_precision(name: str, device: torch.device) -> str:
    """fp32, bf16, fp16 or int8. Raises DeviceError for another, and for int8 where there is no CPU to do it."""
    if name == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"  # from Ampere on
    if name == "auto":
        return "fp32"
    if name not in PRECISIONS:
        raise DeviceError(f"there is no precision {name}", f"use auto, {', '.join(PRECISIONS)}")
    if name == "int8" and device.type != "cpu":
        raise DeviceError(f"int8 is for CPUs, not for {device}", "use --device cpu or another --precision")
    return name


def choose_backend(name: str, device: torch.device, precision: str) -> str:
    """torch, compile, onnx or openvino. Raises DeviceError for what does not go together.

    auto is torch, and onnx for int8, which torch does not do. Measured on two cores: at the paper's width torch is the
    fastest in float32. With the compact weights onnx saves a tenth, but has to be built first; openvino and compile
    (minutes to build) were slower.
    """
    if name == "auto":
        return "onnx" if precision == "int8" else "torch"
    if name not in BACKENDS:
        raise DeviceError(f"there is no backend {name}", f"use auto, {', '.join(BACKENDS)}")
    if name not in FORMATS and precision == "int8":
        raise DeviceError(f"{name} does not compute in int8", f"use --backend {' or '.join(FORMATS)}")
    if name in FORMATS and device.type != "cpu":
        raise DeviceError(f"{name} runs on CPUs, not on {device}", "use --device cpu or --backend torch")
    if name in FORMATS and precision in AUTOCAST:
        raise DeviceError(f"{name} computes in fp32 and int8, not in {precision}", "use --backend torch")
    if name in FORMATS:
        check_format(name)
    return name


def choose_batch_size(device: torch.device, config: DPEConfig, lanes: int = 1) -> int:
    """Crops at once, in each lane, that suit the device.

    On a GPU a power of two, such that its free memory, asked after loading, holds those of all lanes.
    """
    most = BATCH_SIZES[device.type]
    if device.type != "cuda":
        return most
    crop = MAPS * max(size**2 * config.channels[size] for size in config.resolutions) * torch.float32.itemsize
    fitting = int(SHARE * torch.cuda.mem_get_info(device)[0] / (crop * lanes))
    return min(most // lanes, 2 ** max(0, fitting.bit_length() - 1))


def describe_device(device: torch.device) -> str:
    """For instance: cuda:0 (NVIDIA H200)."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def keep_memory() -> None:
    """Makes glibc keep what is freed for the next tensors, in large pages; other C libraries are left as they are.

    It gives large blocks back to the system, which then has to fill the next ones with zeros page by page: up to a
    tenth of the encoder's time at the paper's width. Large pages, which PyTorch asks for if this is called before it
    first takes memory, save a twentieth more. Narrow networks gain nothing by either, and would hold 100 MiB more.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch means that the memory is used up."""
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextlib.contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """What the device refuses before there are batches becomes a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise DeviceError(f"{describe_device(device)} cannot be used: {first_line}", "use --device cpu") from error


def refuse_tf32(device: torch.device) -> None:
    """Where 32 bits are asked for, convolutions of 10 are not what a GPU is to compute."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


# To the device and back


def sent(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy on the device, of any array (its strides may be negative, it may be read-only).

    To a GPU from pinned memory, without waiting: PyTorch uses that memory again only when the copy is done.
    """
    held = pinned(array.shape, dtype, device)
    held.numpy()[...] = array
    return held.to(device, non_blocking=device.type == "cuda")


def fetched(tensor: Tensor) -> np.ndarray:
    """A tensor of the device as an array, when it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    held = pinned(tensor.shape, tensor.dtype, tensor.device)
    held.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()  # until then there is something else in `held`
    return held.numpy()


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the CPU; for a GPU such that it is copied at full speed and beside the computing."""
    if device.type != "cuda":
        return torch.empty(shape, dtype=dtype)
    with torch.cuda.device(device):  # else the first GPU is woken too
        return torch.empty(shape, dtype=dtype, pin_memory=True)
