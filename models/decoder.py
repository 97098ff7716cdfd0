"""The generator network: latent and feature maps to a picture, by warping the features (paper section 3.1).

Called decoder here, generator in the paper; DPE has two of them, one for expression and one for pose.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DPEConfig
from .layers import GAIN, ModulatedConv2d, StyledConv, activate, in_float32, upsample


class Rendered(NamedTuple):
    """A generator's result.

    image: (B, 3, size, size) float32, about [-1, 1] and not clamped; flows: raw (B, 3, r, r) float32 for r = 8, 16, ...
    size, small to large: horizontal flow, vertical flow (before tanh), mask (before sigmoid).
    """

    image: Tensor
    flows: list[Tensor]


def sampling_grid(size: int) -> Tensor:
    """Where each pixel looks with no flow: (1, size, size, 2), x then y.

    Its ends lie on -1 and 1, while the sampling takes -1 and 1 as the outer edges of the picture: no flow magnifies by
    size / (size - 1), and the border mixes with zeros. The released weights were trained so.
    """
    line = torch.linspace(-1, 1, size, dtype=torch.float64).float()
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution with weights for each sample, float32. (B, C, H, W), (B, out, C) -> (B, out, H, W)"""
    return torch.bmm(weight, x.float().flatten(2)).view(
        x.shape[0], weight.shape[1], *x.shape[2:]
    )  # as export traces it


def places(raw: Tensor, grid: Tensor, reach: float) -> Tensor:
    """Where each pixel looks, x then y, at most `reach` from the middle. (B, 3, r, r), (1, r, r, 2) -> (B, r, r, 2)"""
    where = torch.tanh(raw[:, :2]).permute(0, 2, 3, 1) + grid
    return where if math.isinf(reach) else where.clamp(-reach, reach)


class ToFlow(nn.Module):
    """Flow and mask from the generator's state; warps a feature map of the source with them.

    edge: flows that leave the feature map show its edge, else zeros (`DPEConfig.border`).
    x, feature: (B, C, r, r); latent: (B, latent_dim); previous: the raw (B, 3, r/2, r/2) of the level below.
    Returns warped (B, C, r, r) float32, masked; blend (B, C, r, r), that plus the rest of x; raw (B, 3, r, r).
    """

    def __init__(self, channels: int, latent_dim: int, size: int, edge: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(channels, 3, 1, latent_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("grid", sampling_grid(size), persistent=False)
        self.reach = 1 - 1 / size if edge else math.inf  # the middle of the outermost pixels

    def raw(self, x: Tensor, latent: Tensor, previous: Tensor | None) -> Tensor:
        """Flow and mask before tanh and sigmoid, float32: a thousandth of the flow is a tenth of a pixel."""
        weight = self.conv.weight.flatten(1) * self.conv.style(latent)[:, None]  # (B, 3, C)
        raw = mix(x, weight) + self.bias[:, None, None]
        return raw if previous is None else raw + upsample(previous)

    def forward(
        self, x: Tensor, latent: Tensor, feature: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with in_float32(x):
            raw = self.raw(x, latent, previous)
            where = places(raw, self.grid, self.reach)
            mask = torch.sigmoid(raw[:, 2:])
            warped = F.grid_sample(feature.float(), where, padding_mode="zeros", align_corners=False) * mask
            blend = x * (1 - mask).to(x.dtype) + warped.to(x.dtype)
        return warped, blend, raw


class ToRGB(nn.Module):
    """Picture from a warped feature map, float32; not modulated. (B, C, r, r) -> (B, 3, r, r)

    previous: the (B, 3, r/2, r/2) picture of the level below, which this one refines.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, channels, 1, 1))
        self.activation_bias = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(3))
        self.scale = GAIN / channels**0.5

    def forward(self, warped: Tensor, previous: Tensor | None = None) -> Tensor:
        with in_float32(warped):
            rgb = mix(warped, (self.weight * self.scale).flatten(1).expand(len(warped), -1, -1))
            rgb = activate(rgb + self.activation_bias[:, None, None] * GAIN) + self.bias[:, None, None]
            return rgb if previous is None else rgb + upsample(previous)


class Generator(nn.Module):
    """Latent and the source's feature maps to a picture. (B, latent_dim), small to large (B, C(r), r, r) -> Rendered"""

    def __init__(self, config: DPEConfig):
        super().__init__()
        levels = [(resolution, config.channels[resolution]) for resolution in config.resolutions]
        latent_dim, below = config.latent_dim, config.channels[4]
        self.input = nn.Parameter(torch.randn(1, below, 4, 4))
        self.conv1 = StyledConv(below, below, latent_dim)
        self.convs = nn.ModuleList()  # two for each level
        for _, channels in levels:
            self.convs += [StyledConv(below, channels, latent_dim, up=True), StyledConv(channels, channels, latent_dim)]
            below = channels
        self.to_flows = nn.ModuleList(
            ToFlow(channels, latent_dim, resolution, config.border == "edge" and resolution == config.size)
            for resolution, channels in levels
        )
        self.to_rgbs = nn.ModuleList(ToRGB(channels) for _, channels in levels)

    def forward(self, latent: Tensor, features: list[Tensor]) -> Rendered:
        x = self.conv1(self.input.expand(len(latent), -1, -1, -1), latent)
        image, flow, flows = None, None, []
        for level, feature in enumerate(features):
            x = self.convs[2 * level](x, latent)
            x = self.convs[2 * level + 1](x, latent)
            warped, x, flow = self.to_flows[level](x, latent, feature, flow)
            image = self.to_rgbs[level](warped, image)  # sees the warped features only; the blend goes up
            flows.append(flow)
        return Rendered(image, flows)
