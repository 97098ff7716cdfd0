"""Checkpoints of others, by other names: the released DPE ones and LIA's become states of our networks.

The released code calls its sub-modules by the opposite of what they do (its expression stage runs `mlp_pose` and
`dec_pose`, its pose stage `mlp_exp` and `dec_exp`): OFFICIAL_PREFIXES undoes it, here and nowhere else. Tensors that no
computation reads (`to_rgb1`, the noise strengths) are dropped, and so are the blur kernels once their values have been
checked: our layers make their own. Everything else has to be there, in its shape, and nothing besides.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import COMPACT_CHANNELS, FULL_CHANNELS, DPEConfig
from .landmarks import LandmarkConfig, LandmarkNet
from .layers import blur_kernel
from .matte import MatteConfig, MatteNet
from .reader import ReaderConfig, ReaderNets
from .retouch import Retouch, RetouchConfig
from .speech import SpeechConfig, SpeechNets

# Released name -> ours.
OFFICIAL_PREFIXES = {
    "enc.net_app": "encoder",
    "mlp": "motion_mlp",
    "dir": "motion_basis",
    "mlp_pose": "expression_head",
    "dec_pose": "expression_generator",
    "mlp_exp": "pose_head",
    "dec_exp": "pose_generator",
}
# LIA, which DPE grew out of, shares these; it has one generator, `dec`, and knows no difference of pose and expression.
LIA_PREFIXES = {"enc.net_app": "encoder", "enc.fc": "motion_mlp", "dec.direction": "motion_basis"}

OURS, OFFICIAL, LIA = "ours", "official", "lia"
# One key of each layout that no other has.
MARKS = {OURS: "motion_basis.weight", OFFICIAL: "dir.weight", LIA: "dec.direction.weight"}

UNUSED = None  # a tensor that no computation reads
Target = str | float | None  # name of ours, or the sum of a blur kernel, or UNUSED

CONV = {"0.weight": "weight", "1.bias": "bias"}
DOWN_CONV = {"0.kernel": 1.0, "1.weight": "weight", "2.bias": "bias"}
DOWN_SKIP = {"0.kernel": 1.0, "1.weight": "weight"}
MODULATED = {name: name for name in ("conv.weight", "conv.modulation.weight", "conv.modulation.bias")}
STYLED = {**MODULATED, "noise.weight": UNUSED, "activate.bias": "bias"}
STYLED_UP = {**STYLED, "conv.blur.kernel": 4.0}
TO_FLOW = {**MODULATED, "bias": "bias", "upsample.kernel": 4.0}
TO_RGB = {"conv.0.weight": "weight", "conv.1.bias": "activation_bias", "bias": "bias", "upsample.kernel": 4.0}
TO_RGB1 = {"conv.0.weight": UNUSED, "conv.1.bias": UNUSED, "bias": UNUSED}


def named(name: str, table: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    """A layer's table with the layer's name in front, on both sides."""
    for theirs, ours in table.items():
        yield f"{name}.{theirs}", f"{name}.{ours}" if isinstance(ours, str) else ours


def backbone_table(blocks: int) -> dict[str, Target]:
    """Names inside an encoder or discriminator: a convolution and `blocks` residual blocks."""
    table = dict(named("convs.0", CONV))
    for block in range(1, blocks + 1):
        for part, names in (("conv1", CONV), ("conv2", DOWN_CONV), ("skip", DOWN_SKIP)):
            table |= named(f"convs.{block}.{part}", names)
    return table


def encoder_table(levels: int) -> dict[str, Target]:
    """Names inside an encoder whose generator has `levels` resolutions."""
    last = f"convs.{levels + 1}.weight"
    return {**backbone_table(levels), last: last}


def generator_table(levels: int) -> dict[str, Target]:
    """Names inside a generator of `levels` resolutions."""
    table: dict[str, Target] = {"input.input": "input"}
    table |= named("conv1", STYLED)
    table |= named("to_rgb1", TO_RGB1)
    for level in range(levels):
        table |= named(f"convs.{2 * level}", STYLED_UP)
        table |= named(f"convs.{2 * level + 1}", STYLED)
        table |= named(f"to_flows.{level}", TO_FLOW)
        table |= named(f"to_rgbs.{level}", TO_RGB)
    return table


def linear_table(layers: int) -> dict[str, Target]:
    """Names inside a sequence of linear layers."""
    return {f"{layer}.{part}": f"{layer}.{part}" for layer in range(layers) for part in ("weight", "bias")}


def key_table(levels: int, prefixes: Mapping[str, str] = OFFICIAL_PREFIXES) -> dict[str, Target]:
    """Every key of another's checkpoint -> ours, a blur kernel's sum, or UNUSED. `levels`: resolutions from 8 up."""
    inside = {
        "encoder": encoder_table(levels),
        "motion_mlp": linear_table(5),
        "motion_basis": {"weight": "weight"},
        "expression_head": linear_table(3),
        "pose_head": linear_table(3),
        "expression_generator": generator_table(levels),
        "pose_generator": generator_table(levels),
    }
    return {
        f"{theirs}.{key}": f"{ours}.{target}" if isinstance(target, str) else target
        for theirs, ours in prefixes.items()
        for key, target in inside[ours].items()
    }


def discriminator_table(levels: int) -> dict[str, Target]:
    """The same for the discriminator, whose names differ inside the layers only."""
    linear = {f"final_linear.{key}": f"final_linear.{key}" for key in linear_table(2)}
    return {**backbone_table(levels), **dict(named("final_conv", CONV)), **linear}


def unwrap(checkpoint: Mapping[str, Any], part: str = "gen") -> dict[str, Tensor]:
    """The flat state inside a checkpoint: under `part` or `state_dict`, or the whole; a `module.` prefix is removed.

    Raises ValueError when it holds no named tensors.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"holds a {type(checkpoint).__name__}, not named tensors")
    for key in (part, "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    state = {str(key).removeprefix("module."): value for key, value in checkpoint.items()}
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise ValueError(f"holds no networks ({few(others)} is not a tensor)" if others else "is empty")
    return state


def detect_layout(state: Mapping[str, Tensor]) -> str:
    """OURS, OFFICIAL or LIA, of a flat state. Raises ValueError for another network's."""
    for layout, mark in MARKS.items():
        if mark in state:
            return layout
    known = tuple(f"{prefix}." for prefix in (*OFFICIAL_PREFIXES, *OFFICIAL_PREFIXES.values()))
    if any(key.startswith(known) for key in state):
        raise ValueError(f"is truncated: it has {len(state)} tensors of a DPE checkpoint and not the motion basis")
    raise ValueError(f"is another network's checkpoint: its tensors are {few(state)}")


def count_levels(state: Mapping[str, Tensor], prefix: str) -> int:
    """Resolutions from 8 to size, counted by the encoder's residual blocks. `prefix`: of the encoder's keys."""
    convs = f"{prefix}.convs."
    blocks = {key.removeprefix(convs).split(".")[0] for key in state if key.startswith(convs) and ".conv2." in key}
    if not blocks or not all(block.isdigit() for block in blocks):
        raise ValueError("is truncated or wrong: it has no encoder")
    return max(map(int, blocks))


def config_from_state(state: Mapping[str, Tensor]) -> DPEConfig:
    """The configuration that a flat state in our names was made with. Raises ValueError when it cannot be told."""
    levels = count_levels(state, "encoder")
    try:
        skips = [state[f"encoder.convs.{index}.skip.weight"] for index in range(1, levels + 1)]  # large to small
        latent_dim, smallest = state[f"encoder.convs.{levels + 1}.weight"].shape[:2]
        motion_dim = state["motion_basis.weight"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"is truncated or wrong: its sizes cannot be told ({error})") from error
    size = 2 ** (levels + 2)
    found = {size >> index: width for index, width in enumerate([*(skip.shape[1] for skip in skips), smallest])}
    presets = (preset for preset in (FULL_CHANNELS, COMPACT_CHANNELS) if preset.items() >= found.items())
    return DPEConfig(size, dict(next(presets, found)), latent_dim, motion_dim)


def translate(checkpoint: Mapping[str, Any]) -> tuple[DPEConfig, dict[str, Tensor]]:
    """Configuration and state of `DPE` from a checkpoint of ours or a released one, in any wrapping.

    The state loads with strict=True. Raises ValueError for LIA's (see `lia_backbone`), truncated and foreign ones; its
    text ends a sentence that begins with the file's name.
    """
    state = unwrap(checkpoint)
    layout = detect_layout(state)
    if layout == LIA:
        raise ValueError("is LIA's checkpoint: without the generators of DPE, it is only something to train from")
    if layout == OFFICIAL:
        state = renamed(state, key_table(count_levels(state, "enc.net_app")))
    config = config_from_state(state)
    check(state, config)
    return config, state


class Unfilled(TorchFunctionMode):
    """Networks that are made inside of it get no random weights, which take time: theirs are to be loaded."""

    def __torch_function__(
        self, function: Callable, types: tuple, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        if function in (Tensor.normal_, Tensor.uniform_):
            return arguments[0]
        return (torch.empty if function is torch.randn else function)(*arguments, **(options or {}))


Config = DPEConfig | LandmarkConfig | MatteConfig | ReaderConfig | RetouchConfig | SpeechConfig


def networks_of(config: Config) -> nn.Module:
    """New networks of the kind and the sizes that a configuration describes."""
    from .generator import DPE

    others = {
        LandmarkConfig: LandmarkNet,
        MatteConfig: MatteNet,
        ReaderConfig: ReaderNets,
        RetouchConfig: Retouch,
        SpeechConfig: SpeechNets,
    }
    return others.get(type(config), DPE)(config)


def check(state: Mapping[str, Tensor], config: Config) -> None:
    """Raises ValueError unless the state, in our names, is exactly that of the networks that `config` describes."""
    try:
        with Unfilled():  # and not on the device "meta": there PyTorch would import its compiler, which takes a second
            wanted = {key: value.shape for key, value in networks_of(config).state_dict().items()}
    except RuntimeError as error:
        raise ValueError("describes networks that do not fit into the memory") from error
    complain(wanted.keys() - state.keys(), state.keys() - wanted.keys())
    wrong = [f"{key} {tuple(state[key].shape)}" for key, shape in wanted.items() if state[key].shape != shape]
    if wrong:
        raise ValueError(f"has tensors of the wrong shape: {few(wrong)}")


def lia_backbone(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encoder, motion MLP and motion basis of LIA's checkpoint, to start training from (load with strict=False)."""
    state = unwrap(checkpoint)
    if detect_layout(state) != LIA:
        raise ValueError("is not LIA's checkpoint")
    shared = {key: value for key, value in state.items() if key.startswith(tuple(f"{p}." for p in LIA_PREFIXES))}
    return renamed(shared, key_table(count_levels(state, "enc.net_app"), LIA_PREFIXES))


def discriminator_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """State of `Discriminator` from the `dis` part of a released training checkpoint."""
    state = unwrap(checkpoint, "dis")
    blocks = {key.split(".")[1] for key in state if key.startswith("convs.")}
    return renamed(state, discriminator_table(len(blocks) - 1))


def renamed(state: Mapping[str, Tensor], table: Mapping[str, Target]) -> dict[str, Tensor]:
    """The state in our names and shapes. Raises ValueError for missing and unexpected tensors and altered blur kernels.

    What would be dropped may be absent.
    """
    wanted = {key: target for key, target in table.items() if isinstance(target, str)}
    complain(wanted.keys() - state.keys(), state.keys() - table.keys())
    for key, value in state.items():
        if isinstance(total := table[key], float) and not is_blur(value, total):
            raise ValueError(f"was made with another blur: {key} is not the kernel (1, 3, 3, 1)")
    return {target: reshaped(target, state[key]) for key, target in wanted.items()}


def is_blur(kernel: Tensor, total: float) -> bool:
    """Whether a stored kernel is the one that our layers make."""
    return kernel.shape == (4, 4) and torch.allclose(kernel.float().cpu(), blur_kernel(total), atol=1e-6)


def reshaped(name: str, value: Tensor) -> Tensor:
    """Without the axes of length one that the released weights carry: (1, out, in, k, k) and (1, C, 1, 1)."""
    if name.endswith("bias"):
        return value.flatten()
    return value[0] if value.ndim == 5 else value


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of ours in the released names and shapes, with its kernels and the unused tensors as zeros.

    The released code loads it with strict=True.
    """
    config = config_from_state(state)
    official = {}
    for key, target in key_table(len(config.resolutions)).items():
        if isinstance(target, float):
            official[key] = blur_kernel(target)
        elif target is UNUSED:
            official[key] = unused_tensor(key, config)
        else:
            official[key] = as_official(key, state[target])
    return official


def unused_tensor(key: str, config: DPEConfig) -> Tensor:
    """Zeros in the shape of a tensor that nothing reads."""
    if key.endswith("noise.weight"):
        return torch.zeros(1)
    return torch.zeros(3, config.channels[4], 1, 1) if key.endswith("weight") else torch.zeros(1, 3, 1, 1)


def as_official(key: str, value: Tensor) -> Tensor:
    """The opposite of `reshaped`: which axes of length one a released key has."""
    if ".modulation." in key or key.split(".")[0] in ("mlp", "mlp_pose", "mlp_exp", "dir"):
        return value
    if key.endswith("bias"):
        return value.view(1, -1, 1, 1)
    return value[None] if key.endswith(".conv.weight") else value


def complain(missing: set[str], unexpected: set[str]) -> None:
    """Raises ValueError when one of the two is not empty."""
    if missing:
        raise ValueError(f"is truncated: {len(missing)} tensors are missing ({few(sorted(missing))})")
    if unexpected:
        raise ValueError(f"has {len(unexpected)} tensors that the network does not know ({few(sorted(unexpected))})")


def few(names: Any) -> str:
    """The first three names, for one line of text."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
