"""The discriminator: is a picture real? For training only (paper section 3.4)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .layers import GAIN, ConvLayer, EqualLinear, ResBlock, activate

GROUP = 4  # pictures compared by the minibatch statistic


def append_deviation(x: Tensor) -> Tensor:
    """Adds a channel that says how much the pictures of a batch differ. (B, C, H, W) -> (B, C + 1, H, W)

    B is at most 4 or a multiple of 4; a batch of one differs by the 1e-4 that the formula adds.
    """
    count, _, height, width = x.shape
    group = min(count, GROUP)
    grouped = x.float().reshape(group, count // group, *x.shape[1:])
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (B / group,)
    channel = deviation.repeat(group).to(x.dtype).view(count, 1, 1, 1).expand(-1, 1, height, width)
    return torch.cat([x, channel], 1)


class Discriminator(nn.Module):
    """Pictures to how real they look. (B, 3, size, size) in [-1, 1] -> (B, 1) float32, unbounded, real is positive

    channels: resolution -> channels, as in DPEConfig. Raises ValueError when B is above 4 and no multiple of 4.
    """

    def __init__(self, size: int, channels: dict[int, int]):
        super().__init__()
        plan = [channels[2**power] for power in range(size.bit_length() - 1, 1, -1)]  # large to small, down to 4
        blocks = [ResBlock(large, small) for large, small in pairwise(plan)]
        self.convs = nn.ModuleList([ConvLayer(3, plan[0], 1), *blocks])
        self.final_conv = ConvLayer(plan[-1] + 1, plan[-1], 3)
        self.final_linear = nn.Sequential(EqualLinear(plan[-1] * 16, plan[-1]), EqualLinear(plan[-1], 1))

    def forward(self, image: Tensor) -> Tensor:
        if len(image) > GROUP and len(image) % GROUP:
            raise ValueError(f"a batch of {len(image)} is neither at most {GROUP} nor a multiple of it")
        x = image
        for block in self.convs:
            x = block(x)
        x = self.final_conv(append_deviation(x)).flatten(1)  # (B, C * 16)
        hidden, score = self.final_linear
        return score(activate(hidden(x)) * GAIN)
