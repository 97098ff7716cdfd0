"""The reading networks at work: patches of mouth and eyes, where the landmark network found them, to better codes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dpe_cli.models import ReaderNets
from dpe_cli.motion_space import LIMIT
from dpe_cli.parts import BOTH_EYES, MOUTH, Part, Posed, cut_patch, posed, to_patch
from dpe_cli.weights import READER, load_reader


def patches_of(crop: np.ndarray, head: Posed, parts: Sequence[Part]) -> np.ndarray:
    """Parts of one size of a crop (S, S, 3) uint8, some mirrored. -> (P, H, W, 3) uint8"""
    return np.stack([cut_patch(crop, to_patch(head, part), part) for part in parts])


def to_input(patches: torch.Tensor) -> torch.Tensor:
    """uint8 with channels last to the networks' [-1, 1]: (..., H, W, 3) -> (..., 3, H, W)"""
    return patches.movedim(-1, -3).float().div(127.5).sub(1)


def load_nets(weights: str | Path = READER) -> ReaderNets:
    """The reading networks of a file. Raises WeightsError."""
    return load_reader(weights).networks()


class Reader:
    """Mends motion codes that the landmark network read. Raises WeightsError for weights that are none of its."""

    def __init__(self, weights: str | Path = READER, device: str = "cpu"):
        loaded = load_reader(weights)
        nets, self.sha256 = loaded.networks().to(device, memory_format=torch.channels_last), loaded.sha256
        self.nets, self.device = nets.eval().requires_grad_(False), device

    @torch.inference_mode()
    def mend(
        self, crops: Sequence[np.ndarray], points: Sequence[np.ndarray], codes: np.ndarray, template: np.ndarray
    ) -> np.ndarray:
        """Crops (S, S, 3) uint8, their landmarks (478, 3) in pixels, and codes (N, 20) -> (N, 20) float32"""
        heads = [posed(found, template) for found in points]
        mouths = self.stack(crops, heads, [MOUTH])[:, 0] if "mouth" in self.nets.config.groups else None
        eyes = self.stack(crops, heads, BOTH_EYES)
        mended = self.nets(mouths, eyes, torch.from_numpy(codes).to(self.device))
        return np.clip(mended.cpu().numpy(), -LIMIT, LIMIT)

    def stack(self, crops: Sequence[np.ndarray], heads: Sequence[Posed], parts: Sequence[Part]) -> torch.Tensor:
        """Parts of one size of every crop, as the networks want them: (N, P, 3, H, W)"""
        pairs = zip(crops, heads, strict=True)
        cut = [patches_of(crop, head, parts) for crop, head in pairs]
        return to_input(torch.from_numpy(np.array(cut)).to(self.device))
