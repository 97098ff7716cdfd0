"""The encoder: one picture to its latent and feature maps (paper section 3.1)."""

from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .config import DPEConfig
from .layers import ConvLayer, ResBlock, in_float32


class Encoded(NamedTuple):
    """What the encoder knows of a picture.

    latent: (B, latent_dim) float32; features: (B, C(r), r, r) for r = 8, 16, ... size, small to large.
    """

    latent: Tensor
    features: list[Tensor]


class Encoder(nn.Module):
    """Picture to latent and feature maps. (B, 3, size, size) in [-1, 1] -> Encoded"""

    def __init__(self, config: DPEConfig):
        super().__init__()
        channels = [config.channels[resolution] for resolution in (4, *config.resolutions)][::-1]  # large to small
        blocks = [ResBlock(large, small) for large, small in pairwise(channels)]
        to_latent = ConvLayer(channels[-1], config.latent_dim, 4, linear=True)
        self.convs = nn.ModuleList([ConvLayer(3, channels[0], 1), *blocks, to_latent])

    def forward(self, image: Tensor) -> Encoded:
        x, features = image, []
        for block in self.convs[:-1]:
            x = block(x)
            features.append(x)
        smallest = features.pop()  # (B, C, 4, 4)
        to_latent = self.convs[-1]
        with in_float32(x):
            latent = F.conv2d(smallest.float(), to_latent.weight * to_latent.scale).flatten(1)
        return Encoded(latent, features[::-1])
