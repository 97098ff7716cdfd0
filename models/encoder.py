"""The encoder: a face crop to its latent code and feature maps."""

from typing import NamedTuple

from torch import Tensor, nn

from .config import DPEConfig
from .layers import ConvLayer, EqualConv2d, ResBlock


class Encoded(NamedTuple):
    """What the networks know of a face: latent (B, latent_dim) float32, features from 8x8 up to the picture's size."""

    latent: Tensor
    features: list[Tensor]


class Encoder(nn.Module):
    """Face crop to latent code and feature maps. (B, 3, S, S) in [-1, 1] -> Encoded"""

    def __init__(self, config: DPEConfig):
        super().__init__()
        falling = config.resolutions[::-1]  # S, S/2, ... 4
        channels = [config.channels[r] for r in falling]
        blocks = [ResBlock(a, b) for a, b in zip(channels, channels[1:], strict=False)]
        last = EqualConv2d(channels[-1], config.latent_dim, 4)
        self.convs = nn.ModuleList([ConvLayer(3, channels[0], 1), *blocks, last])

    def forward(self, image: Tensor) -> Encoded:
        maps = []
        for layer in self.convs:
            image = layer(image)
            maps.append(image)
        return Encoded(maps[-1].flatten(1).float(), maps[-3::-1])  # without the 4x4 map
