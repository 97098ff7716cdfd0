"""The discriminator of training (StyleGAN2's, with the minibatch standard deviation)."""

import torch
from torch import Tensor, nn

from .layers import ActivatedLinear, ConvLayer, EqualLinear, ResBlock

GROUP = 4


class Discriminator(nn.Module):
    """Realness of face crops. (B, 3, S, S) in [-1, 1] -> (B, 1) logits. B is at most 4, or a multiple of 4."""

    def __init__(self, size: int, channels: dict[int, int]):
        super().__init__()
        falling = [1 << k for k in range(size.bit_length() - 1, 1, -1)]  # S ... 4
        widths = [channels[r] for r in falling]
        blocks = [ResBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        self.convs = nn.Sequential(ConvLayer(3, widths[0], 1), *blocks)
        self.final_conv = ConvLayer(widths[-1] + 1, widths[-1], 3)
        self.final_linear = nn.Sequential(ActivatedLinear(widths[-1] * 16, widths[-1]), EqualLinear(widths[-1], 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.convs(image)
        batch, channels, height, width = x.shape
        group = min(batch, GROUP)
        spread = x.float().view(group, -1, channels, height, width).var(0, unbiased=False).add(1e-8).sqrt()
        spread = spread.mean((1, 2, 3), keepdim=True).repeat(group, 1, height, width)  # (B, 1, 4, 4)
        x = self.final_conv(torch.cat([x, spread.to(x.dtype)], 1))
        return self.final_linear(x.flatten(1))
