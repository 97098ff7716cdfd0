"""A CUDA GPU that is none: tensors say that they lie on cuda:0 and are computed with on the CPU.

As on a real one, what mixes both devices, or takes an array from the GPU without copying it, is an error; autocast
computes in 16 bits. So it finds code that would stop on a GPU; speed, memory and CUDA's rounding it does not know.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)  # with its number: without it PyTorch asks the driver
MEMORY = 2**37  # bytes
COPIES = ("aten::_to_copy", "aten::copy_")  # may go from device to device


class OnGpu(Tensor):
    """A tensor that says that it lies on the GPU. `held`: where it is."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(held.is_inference()):
            return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=CUDA, **options)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})

    # These ask the driver before they come to `__torch_dispatch__`.

    def __getitem__(self, index: Any) -> "OnGpu":
        return OnGpu(self.held[tree_map(held_of, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[tree_map(held_of, index)] = held_of(value)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> "OnGpu":
        return OnGpu(self.held.contiguous(memory_format=memory_format))

    def new_tensor(self, data: Any) -> "OnGpu":
        return OnGpu(self.held.new_tensor(data))


class Placing(TorchDispatchMode):
    """Makes tensors on the GPU where one is asked for there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})


def held_of(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def computed(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, whose results lie where they should. Raises RuntimeError as PyTorch would."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
    name = function._schema.name
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim()]  # a number may be
    if there and elsewhere and name not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found at least two devices")
    device = torch.device(kwargs.get("device") or (CUDA if there else "cpu"))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(held_of, args), **tree_map(held_of, kwargs))
    if name == "aten::copy_":
        return args[0]
    if device.type == "cpu":
        return result

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return there[id(value)] if id(value) in there else OnGpu(value)  # the same where it was changed in place

    return tree_map(placed, result)


@contextlib.contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """As if there were one GPU, in this thread; gives the device."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "simulated",
        "mem_get_info": (MEMORY, MEMORY),
        "is_bf16_supported": True,
        "current_stream": SimpleNamespace(synchronize=lambda: None),
        "empty_cache": None,
        "_lazy_init": None,
    }
    swapped = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(
            patch("dpe_cli.device.pinned", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
        )
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, swapped)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Placing())
        yield CUDA
