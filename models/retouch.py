"""The retouching networks: small U-Nets that paint over a mouth and over eyes once the generators have drawn them.

The paper's generators bend what the source shows; where it shows nothing (teeth behind shut lips, an iris behind shut
lids) they have nothing to bend. These networks see the part as the source has it, as it was drawn, and the outlines
that it has and is to have, and give what has to be added to the drawn picture. Not part of the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Configuration
from .landmarks import POINTS

CODES = 14  # coordinates of the expression
PICTURES, OUTLINES = 2, 4  # of the input: the source's and the drawn patch; outlines as `dpe_cli.parts` draws them
SLOPE = 0.2  # of the leaky rectifiers


@dataclass(frozen=True)
class RetouchConfig(Configuration):
    """Sizes of both networks: channels at a half, a quarter and an eighth of the patch, residual blocks there.

    Raises ValueError when these do not fit together.
    """

    networks: ClassVar[str] = "the retouching networks"

    channels: tuple[int, ...] = (24, 48, 96)
    blocks: tuple[int, ...] = (1, 1, 2)

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.channels) != 3 or len(self.blocks) != 3 or min(*self.channels, *self.blocks) < 1:
            raise ValueError("a retouching network has 3 levels, each with channels and blocks")


def convolution(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1)


class Block(nn.Module):
    """Two convolutions beside the identity, which begin as nothing. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.one, self.two = convolution(channels, channels), convolution(channels, channels)
        nn.init.zeros_(self.two.weight)
        nn.init.zeros_(self.two.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.leaky_relu(self.one(F.leaky_relu(x, SLOPE)), SLOPE))


class RetouchNet(nn.Module):
    """What has to be added to a drawn patch of a face. H, W: multiples of 8.

    source, drawn: (B, 3, H, W) in [-1, 1]; outlines: (B, 4, H, W) in [0, 1] -> (B, 3, H, W), 0 before training
    """

    def __init__(self, config: RetouchConfig | None = None):
        super().__init__()
        self.config = config = config or RetouchConfig()
        fine, middle, coarse = config.channels

        def blocks(level: int) -> nn.Sequential:
            return nn.Sequential(*(Block(config.channels[level]) for _ in range(config.blocks[level])))

        # Squares of 2x2 pixels become channels: maps of the full size would take most of the time.
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), convolution((3 * PICTURES + OUTLINES) * 4, fine))
        self.fine_down, self.to_middle = blocks(0), convolution(fine, middle, 2)
        self.middle_down, self.to_coarse = blocks(1), convolution(middle, coarse, 2)
        self.coarse = blocks(2)
        self.from_coarse, self.middle_up = nn.Sequential(convolution(coarse, middle * 4), nn.PixelShuffle(2)), blocks(1)
        self.from_middle, self.fine_up = nn.Sequential(convolution(middle, fine * 4), nn.PixelShuffle(2)), blocks(0)
        self.leave = nn.Sequential(nn.LeakyReLU(SLOPE), convolution(fine, 12), nn.PixelShuffle(2))
        nn.init.zeros_(self.leave[1].weight)
        nn.init.zeros_(self.leave[1].bias)

    def forward(self, source: Tensor, drawn: Tensor, outlines: Tensor) -> Tensor:
        x = torch.cat([source, drawn, outlines * 2 - 1], 1).contiguous(memory_format=torch.channels_last)
        fine = self.fine_down(self.enter(x))
        middle = self.middle_down(F.leaky_relu(self.to_middle(fine), SLOPE))
        coarse = self.coarse(F.leaky_relu(self.to_coarse(middle), SLOPE))
        middle = self.middle_up(middle + self.from_coarse(coarse))
        return self.leave(self.fine_up(fine + self.from_middle(middle)))


class Retouch(nn.Module):
    """Both networks, and how landmarks move with the motion codes: `basis` (14, 478, 3), in the head's frame."""

    def __init__(self, config: RetouchConfig | None = None):
        super().__init__()
        self.config = config = config or RetouchConfig()
        self.mouth, self.eyes = RetouchNet(config), RetouchNet(config)
        self.register_buffer("basis", torch.zeros(CODES, POINTS, 3))


class PatchDiscriminator(nn.Module):
    """Which patches are real: judged piece by piece, beside their outlines and what the source shows.

    Without normalisation: under spectral normalisation it told painted mouths from real ones in 52 of 100 places.
    picture, source: (B, 3, H, W); outlines: (B, 4, H, W) -> logits (B, 1, H/8, W/8) and the feature maps on the way
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96)):
        super().__init__()
        levels, inside = [], 3 * PICTURES + OUTLINES
        for outside in channels:
            levels.append(nn.Conv2d(inside, outside, 4, 2, 1))
            inside = outside
        self.levels = nn.ModuleList(levels)
        self.judge = convolution(inside, 1)
        for layer in (*self.levels, self.judge):
            nn.init.kaiming_normal_(layer.weight, SLOPE)
            nn.init.zeros_(layer.bias)

    def forward(self, picture: Tensor, source: Tensor, outlines: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([picture, source, outlines * 2 - 1], 1).contiguous(memory_format=torch.channels_last)
        maps = []
        for level in self.levels:
            x = F.leaky_relu(level(x), SLOPE)
            maps.append(x)
        return self.judge(x), maps
