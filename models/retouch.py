"""The retouching networks: small U-Nets that paint over a mouth and over eyes once the generators have drawn them.

The paper's generators bend what the source shows; where it shows nothing (teeth behind shut lips, an iris behind shut
lids) they have nothing to bend. These networks see the part as the source has it, as it was drawn, and the outlines
that it has and is to have, and give what has to be added to the drawn picture. Not part of the paper.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Configuration
from .landmarks import POINTS

CODES = 14  # coordinates of the expression
PICTURES, OUTLINES = 2, 4  # of the input: the source's and the drawn patch; outlines as `dpe_cli.parts` draws them
SLOPE = 0.2  # of the leaky rectifiers
START = -1.0  # logit of the guide's share before training


@dataclass(frozen=True)
class RetouchConfig(Configuration):
    """Sizes of both networks: channels at a half, a quarter and an eighth of the patch, residual blocks there.

    Raises ValueError when these do not fit together.
    """

    networks: ClassVar[str] = "the retouching networks"

    channels: tuple[int, ...] = (24, 48, 96)
    blocks: tuple[int, ...] = (1, 1, 2)
    head_channels: tuple[int, ...] = ()  # of the network for turned heads, at a quarter and so on; without: none

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, tuple(getattr(self, field.name)))  # JSON has lists
        sizes = [self.channels, self.blocks, *([self.head_channels] if self.head_channels else [])]
        if any(len(one) != 3 or min(one) < 1 for one in sizes):
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
    """What has to be added to a drawn patch of a face. H, W: multiples of 8 (of 16 with a `fold` of 4).

    source, drawn: (B, 3, H, W) in [-1, 1]; outlines: (B, 4, H, W) in [0, 1] -> (B, 3, H, W), 0 before training
    """

    def __init__(
        self, channels: tuple[int, ...] = RetouchConfig.channels, counts: tuple[int, ...] = RetouchConfig.blocks,
        fold: int = 2, outside: int = 3,
    ):  # fmt: skip
        super().__init__()
        fine, middle, coarse = channels

        def blocks(level: int) -> nn.Sequential:
            return nn.Sequential(*(Block(channels[level]) for _ in range(counts[level])))

        # Squares of pixels become channels: maps of the full size would take most of the time.
        self.enter = nn.Sequential(nn.PixelUnshuffle(fold), convolution((3 * PICTURES + OUTLINES) * fold**2, fine))
        self.fine_down, self.to_middle = blocks(0), convolution(fine, middle, 2)
        self.middle_down, self.to_coarse = blocks(1), convolution(middle, coarse, 2)
        self.coarse = blocks(2)
        self.from_coarse, self.middle_up = nn.Sequential(convolution(coarse, middle * 4), nn.PixelShuffle(2)), blocks(1)
        self.from_middle, self.fine_up = nn.Sequential(convolution(middle, fine * 4), nn.PixelShuffle(2)), blocks(0)
        self.leave = nn.Sequential(nn.LeakyReLU(SLOPE), convolution(fine, outside * fold**2), nn.PixelShuffle(fold))
        nn.init.zeros_(self.leave[1].weight)
        nn.init.zeros_(self.leave[1].bias)

    def forward(self, source: Tensor, drawn: Tensor, outlines: Tensor) -> Tensor:
        x = torch.cat([source, drawn, outlines * 2 - 1], 1).contiguous(memory_format=torch.channels_last)
        fine = self.fine_down(self.enter(x))
        middle = self.middle_down(F.leaky_relu(self.to_middle(fine), SLOPE))
        coarse = self.coarse(F.leaky_relu(self.to_coarse(middle), SLOPE))
        middle = self.middle_up(middle + self.from_coarse(coarse))
        return self.leave(self.fine_up(fine + self.from_middle(middle)))


class HeadNet(RetouchNet):
    """The same for a whole crop whose head is turned, with the guide of `dpe_cli.turned` in the outlines' place.

    Says how much of the guide is to be seen, and what has to be added besides.
    """

    def __init__(self, channels: tuple[int, ...], counts: tuple[int, ...]):
        super().__init__(channels, counts, fold=4, outside=4)

    def forward(self, source: Tensor, drawn: Tensor, outlines: Tensor) -> Tensor:
        share, added = super().forward(source, drawn, outlines).split((1, 3), 1)
        return (share + START).sigmoid() * (outlines[:, :3] * 2 - 1 - drawn) + added


class Retouch(nn.Module):
    """The networks, and how landmarks move with the motion codes: `basis` (14, 478, 3), in the head's frame."""

    def __init__(self, config: RetouchConfig | None = None):
        super().__init__()
        self.config = config = config or RetouchConfig()
        self.mouth, self.eyes = (RetouchNet(config.channels, config.blocks) for _ in range(2))
        self.head = HeadNet(config.head_channels, config.blocks) if config.head_channels else None
        self.register_buffer("basis", torch.zeros(CODES, POINTS, 3))


class PatchDiscriminator(nn.Module):
    """Which patches are real: judged piece by piece, beside their outlines and what the source shows.

    picture, source: (B, 3, H, W); outlines: (B, 4, H, W) -> logits (B, 1, H/8, W/8) and the feature maps on the way
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96)):
        super().__init__()
        levels, inside = [], 3 * PICTURES + OUTLINES
        for outside in channels:
            levels.append(nn.utils.parametrizations.spectral_norm(nn.Conv2d(inside, outside, 4, 2, 1)))
            inside = outside
        self.levels = nn.ModuleList(levels)
        self.judge = nn.utils.parametrizations.spectral_norm(convolution(inside, 1))

    def forward(self, picture: Tensor, source: Tensor, outlines: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([picture, source, outlines * 2 - 1], 1).contiguous(memory_format=torch.channels_last)
        maps = []
        for level in self.levels:
            x = F.leaky_relu(level(x), SLOPE)
            maps.append(x)
        return self.judge(x), maps
