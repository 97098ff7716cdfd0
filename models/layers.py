"""The layers of StyleGAN2 that the networks are made of: equalised, modulated, blurred; each defined once.

Two identities make them fast and change only the rounding. Modulating the weights of a convolution per sample equals
scaling its input channels by the style and its output channels by the demodulation: a batch stays one convolution. And
leaky_relu(g * x) = g * leaky_relu(x) for g > 0: constant gains move from the pictures into the (smaller) weights.

Weights are stored with unit variance and scaled when used. Under autocast convolutions run in the low precision, and
whatever is small and decides much (latents, styles, flows, colours) in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky relu
GAIN = math.sqrt(2)  # follows every leaky relu, so that variance is kept
BLUR = (1.0, 3.0, 3.0, 1.0)  # one side of the separable blur


def in_float32(x: Tensor) -> torch.autocast:
    """Context in which autocast does nothing; the operands are the caller's to cast."""
    return torch.autocast(x.device.type, enabled=False)


def blur_kernel(total: float = 1.0) -> Tensor:
    """The (4, 4) blur kernel; its values sum up to `total`, 4 where a picture has just been doubled with zeros."""
    side = torch.tensor(BLUR) / sum(BLUR)
    return torch.outer(side, side) * total


def activate(x: Tensor) -> Tensor:
    """Leaky relu without its gain (see the module's docstring), in place: `x` is not to be used again."""
    return F.leaky_relu(x, SLOPE, inplace=True)


class Blur(nn.Module):
    """Convolves every channel with the blur kernel. (B, C, H, W) -> (B, C, (H + 2 padding - 3) / stride, same of W)"""

    def __init__(self, channels: int, padding: int, stride: int = 1, total: float = 1.0):
        super().__init__()
        self.padding, self.stride = padding, stride
        self.register_buffer("kernel", blur_kernel(total).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=self.stride, padding=self.padding, groups=len(self.kernel))


def upsample(x: Tensor) -> Tensor:
    """Doubles a picture: zeros in between, then blur. (B, C, H, W) -> (B, C, 2H, 2W)

    With this kernel that is bilinear interpolation, but for a border of zeros around the picture.
    """
    return F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)[..., 2:-2, 2:-2]


class EqualLinear(nn.Module):
    """Affine map with equalised learning rate, always in float32. (B, in_dim) -> (B, out_dim)"""

    def __init__(self, in_dim: int, out_dim: int, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.full((out_dim,), bias))
        self.scale = 1 / math.sqrt(in_dim)

    def forward(self, x: Tensor) -> Tensor:
        with in_float32(x):
            return F.linear(x.float() * self.scale, self.weight, self.bias)


class ConvLayer(nn.Module):
    """Equalised convolution, then bias and leaky relu unless `linear`. (B, in, H, W) -> (B, out, H, W)

    `down`: blur, then stride 2: (B, out, H/2, W/2). `gain` multiplies the result.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int,
        down: bool = False, linear: bool = False, gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = None if linear else nn.Parameter(torch.zeros(out_channels))
        self.gain = gain if linear else gain * GAIN
        self.scale = self.gain / math.sqrt(in_channels * kernel**2)
        self.padding = 0 if down else kernel // 2
        self.blur, self.stride = None, 1
        if down and kernel == 1:  # blur only what the stride keeps
            self.blur = Blur(in_channels, padding=1, stride=2)
        elif down:
            self.blur, self.stride = Blur(in_channels, padding=(kernel + 1) // 2), 2

    def forward(self, x: Tensor) -> Tensor:
        if self.blur is not None:
            x = self.blur(x)
        weight = self.weight * self.scale
        if self.bias is None:
            return F.conv2d(x, weight, stride=self.stride, padding=self.padding)
        return activate(F.conv2d(x, weight, self.bias * self.gain, self.stride, self.padding))


class ResBlock(nn.Module):
    """Residual block that halves the picture. (B, in, H, W) -> (B, out, H/2, W/2)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = 1 / math.sqrt(2)  # the sum of two branches keeps its variance
        self.conv1 = ConvLayer(in_channels, in_channels, 3)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, down=True, gain=half)
        self.skip = ConvLayer(in_channels, out_channels, 1, down=True, linear=True, gain=half)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.skip(x)


class ModulatedConv2d(nn.Module):
    """Convolution whose weights depend on a latent. (B, in, H, W), (B, latent_dim) -> (B, out, H, W)

    `up` doubles the picture: (B, out, 2H, 2W). `demodulate` normalises the weights of each output channel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, latent_dim: int,
        up: bool = False, demodulate: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.modulation = EqualLinear(latent_dim, in_channels, bias=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel**2)
        self.padding = kernel // 2
        self.demodulate = demodulate
        self.blur = Blur(out_channels, padding=1, total=4.0) if up else None

    def style(self, latent: Tensor) -> Tensor:
        """What multiplies each input channel, the weights' scale included. (B, latent_dim) -> (B, in) float32"""
        return self.modulation(latent) * self.scale

    def demodulation(self, style: Tensor) -> Tensor:
        """What multiplies each output channel. (B, in) -> (B, out) float32"""
        with in_float32(style):
            power = self.weight.float().square().sum((2, 3))  # (out, in)
            return torch.rsqrt(style.square() @ power.T + 1e-8)

    def convolve(self, x: Tensor, style: Tensor) -> Tensor:
        """The convolution without the demodulation."""
        x = x * style.to(x.dtype)[:, :, None, None]
        if self.blur is None:
            return F.conv2d(x, self.weight, padding=self.padding)
        return self.blur(F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2))  # 2H + 1, then 2H

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        style = self.style(latent)
        x = self.convolve(x, style)
        return x * self.demodulation(style).to(x.dtype)[:, :, None, None] if self.demodulate else x


class StyledConv(nn.Module):
    """Modulated convolution, bias, leaky relu. (B, in, H, W), (B, latent_dim) -> (B, out, H, W), doubled if `up`"""

    def __init__(self, in_channels: int, out_channels: int, latent_dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, latent_dim, up)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        style = self.conv.style(latent)
        x = self.conv.convolve(x, style)
        scale = (self.conv.demodulation(style) * GAIN).to(x.dtype)[:, :, None, None]
        return activate((x * scale).add_((self.bias * GAIN).to(x.dtype)[:, None, None]))
