"""The matte network: which pixels of a crop are the person, so that the rest can stand still when the head moves.

A small U-Net. Not part of the paper, whose flows bend the background along with the head.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .config import Configuration
from .retouch import SLOPE, Block, convolution

SQUARE = 4  # of so many pixels a side, which become channels: maps of the full size would take most of the time


@dataclass(frozen=True)
class MatteConfig(Configuration):
    """Sizes: channels at a quarter of the picture, an eighth and so on, residual blocks there.

    Raises ValueError when these do not fit together.
    """

    networks: ClassVar[str] = "the matte network"

    channels: tuple[int, ...] = (16, 32, 64, 96)
    blocks: tuple[int, ...] = (1, 1, 1, 2)

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.channels) != len(self.blocks) or not self.blocks or min(*self.channels, *self.blocks) < 1:
            raise ValueError("a matte network has channels and blocks for each of its levels")


class MatteNet(nn.Module):
    """Logits of the person's matte. picture (B, 3, S, S) in [-1, 1], S a multiple of 32 -> (B, 1, S/2, S/2)"""

    def __init__(self, config: MatteConfig | None = None):
        super().__init__()
        self.config = config = config or MatteConfig()
        channels = config.channels
        pairs = list(itertools.pairwise(channels))

        def blocks() -> nn.ModuleList:
            levels = zip(channels, config.blocks, strict=True)
            return nn.ModuleList(nn.Sequential(*(Block(width) for _ in range(count))) for width, count in levels)

        self.enter = nn.Sequential(nn.PixelUnshuffle(SQUARE), convolution(3 * SQUARE**2, channels[0]))
        self.down, self.up = blocks(), blocks()[:-1]
        self.coarser = nn.ModuleList(convolution(fine, coarse, 2) for fine, coarse in pairs)
        self.finer = nn.ModuleList(
            nn.Sequential(convolution(coarse, fine * 4), nn.PixelShuffle(2)) for fine, coarse in pairs
        )
        self.leave = nn.Sequential(nn.LeakyReLU(SLOPE), convolution(channels[0], 4), nn.PixelShuffle(2))

    def forward(self, picture: Tensor) -> Tensor:
        x, seen = self.down[0](self.enter(picture)), []
        for coarser, block in zip(self.coarser, self.down[1:], strict=True):
            seen.append(x)
            x = block(F.leaky_relu(coarser(x), SLOPE))
        for finer, block in zip(reversed(self.finer), reversed(self.up), strict=True):
            x = block(seen.pop() + finer(x))
        return self.leave(x)
