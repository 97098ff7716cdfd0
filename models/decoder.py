"""The generator of one kind of motion: warps the source's features and renders them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import DPEConfig
from .layers import StyledConv, ToFlow, ToRGB


class Rendered(NamedTuple):
    """image (B, 3, S, S), about [-1, 1] but not clamped; flows: each level's raw (B, 3, r, r), from 8x8 up."""

    image: Tensor
    flows: list[Tensor]


class Input(nn.Module):
    """The learnt constant that synthesis starts from. -> (1, C, 4, 4)"""

    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class Generator(nn.Module):
    """Latent code and the source's feature maps to a picture (paper, section 3.2).

    latent (B, latent_dim): the source's code plus a shift; features: the source's, from `Encoder`. -> Rendered.
    Only the warped features are rendered; their blend with the synthesis goes on to the next level.
    """

    def __init__(self, config: DPEConfig):
        super().__init__()
        latent, rising = config.latent_dim, config.resolutions
        channels = [config.channels[r] for r in rising]
        self.input = Input(channels[0])
        self.conv1 = StyledConv(channels[0], channels[0], latent)
        self.convs, self.to_flows, self.to_rgbs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for size, below, here in zip(rising[1:], channels, channels[1:], strict=False):
            self.convs += [StyledConv(below, here, latent, up=True), StyledConv(here, here, latent)]
            self.to_flows.append(ToFlow(here, latent, size, upsample=size > 8))
            self.to_rgbs.append(ToRGB(here, upsample=size > 8))

    def forward(self, latent: Tensor, features: list[Tensor]) -> Rendered:
        start = self.input.input.expand(len(latent), -1, -1, -1)
        x = self.conv1(start.contiguous(memory_format=torch.channels_last), latent)
        image = flow = None
        flows = []
        for level, feature in enumerate(features):
            x = self.convs[2 * level + 1](self.convs[2 * level](x, latent), latent)
            warped, x, flow = self.to_flows[level](x, latent, feature, flow)
            image = self.to_rgbs[level](warped, image)
            flows.append(flow)
        return Rendered(image, flows)
