"""The matte network at work: which pixels of a crop are the person, and a background that stands still behind it.

The generators' flows are smooth, so what is behind a head that moves is drawn along with it. A camera sees it stand
still. Not part of the paper.
"""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dpe_cli.mesh import centres
from dpe_cli.mesh_warp import mixed
from dpe_cli.models import MatteNet
from dpe_cli.models.layers import in_float32
from dpe_cli.reader import to_input
from dpe_cli.weights import MATTE, load_matte

CROP = 256  # pixels: for crops of that side
UNSURE = 0.2, 0.8  # of a matte: below is background, above a person
# Pixels of the matte of a crop of 256, before the flow and after it: what is that near to the person counts as it (what
# the matte misses of hair would stay behind as a line), and the sigma of the edge.
GROWN, SOFT = (2, 1), (1.0, 0.75)


def load_net(weights: str | Path = MATTE) -> MatteNet:
    """The matte network of a file. Raises WeightsError."""
    return load_matte(weights).networks()


class Matte:
    """Tells persons from what is behind them. Raises WeightsError for weights that are none of its."""

    def __init__(self, weights: str | Path = MATTE, device: str = "cpu"):
        loaded = load_matte(weights)
        net, self.sha256 = loaded.networks(), loaded.sha256
        self.net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.device = device

    @torch.inference_mode()
    def persons(self, crops: np.ndarray) -> np.ndarray:
        """How much of each place is the person. (N, S, S, 3) uint8 -> (N, S/2, S/2) float32 in [0, 1]"""
        return self.net(to_input(torch.from_numpy(crops).to(self.device))).sigmoid()[:, 0].cpu().numpy()


def standing(matte: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """How much of each place is background before and after what a flow moves, and so is as it was.

    matte: (B, R, R) in [0, 1], of persons in the pictures that are bent; where: (B, S, S, 2), from where in them each
    pixel comes, in [-1, 1] as the generators tell it, S not below R. -> (B, R, R) in [0, 1]
    """
    share, (low, high) = 2 * matte.shape[-1] / CROP, UNSURE
    with in_float32(matte):
        sure = ((matte.float() - low) / (high - low)).clamp(0, 1)[:, None]
        before, after = (grown(sure, *(side * share for side in both)) for both in zip(GROWN, SOFT, strict=True))
        places = F.adaptive_avg_pool2d(where.float().permute(0, 3, 1, 2), matte.shape[1:]).permute(0, 2, 3, 1)
        after = F.grid_sample(after, places, padding_mode="border", align_corners=False)
    return ((1 - before) * (1 - after))[:, 0]


def grown(matte: torch.Tensor, reach: float, sigma: float) -> torch.Tensor:
    """A matte (B, 1, S, S) that reaches further, rounded to pixels, with a soft edge. -> the same shape, in [0, 1]"""
    reach, radius = round(reach), math.ceil(3 * sigma)
    line = torch.arange(-radius, radius + 1, device=matte.device, dtype=torch.float32)
    blur = torch.softmax(-((line / sigma) ** 2) / 2, 0)
    for _ in range(2):  # down, then across: what is turned twice is as it was
        matte = F.max_pool2d(matte, (2 * reach + 1, 1), 1, (reach, 0))
        matte = F.conv2d(F.pad(matte, (0, 0, radius, radius), mode="replicate"), blur.view(1, 1, -1, 1)).mT
    return matte.clamp(0, 1)


def with_still(drawn: np.ndarray, crop: np.ndarray, still: np.ndarray) -> np.ndarray:
    """A drawn picture with its crop where that stands still. (S, S, 3) uint8 twice, (R, R) of `standing` -> uint8"""
    return mixed(drawn, crop, cv2.resize(still, crop.shape[1::-1]), 1.0)


def flow_with_still(flow: np.ndarray, still: np.ndarray, size: int) -> np.ndarray:
    """A flow (R, R, 2), pixels of a `size` crop, that moves nothing where things stand still, (R', R')."""
    here = centres(len(flow), size).astype(np.float32)
    return flow + cv2.resize(still, flow.shape[1::-1], interpolation=cv2.INTER_AREA)[..., None] * (here - flow)
