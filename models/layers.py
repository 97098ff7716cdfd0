"""The building blocks of StyleGAN2 that DPE's networks are made of: equalised, modulated, blurred.

All tensors (B, C, H, W). Written for one convolution a batch: styles scale activations, never a copy of the weights per
picture, which is the same arithmetic (StyleGAN2, section 2.2). sqrt(2), the gain of the fused leaky relu, is folded into
the layer before it: leaky_relu is positively homogeneous, so sqrt(2) * act(x + b) = act(sqrt(2) x + sqrt(2) b).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = math.sqrt(2)
BLUR = (1.0, 3.0, 3.0, 1.0)


def blur_kernel(total: float = 1.0) -> Tensor:
    """The [4, 4] binomial kernel, with this sum."""
    line = torch.tensor(BLUR)
    kernel = torch.outer(line, line)
    return kernel / kernel.sum() * total


class EqualConv2d(nn.Module):
    """Convolution with N(0, 1) weights scaled at run time by 1/sqrt(fan in), no bias. (B, in, H, W) -> (B, out, H', W')"""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.scale = gain / math.sqrt(in_channels * kernel**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """Affine map with equalised learning rate and no activation. (B, in) -> (B, out)"""

    def __init__(self, in_features: int, out_features: int, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.full((out_features,), float(bias)))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class Activation(nn.Module):
    """Bias and leaky relu of what comes already scaled by GAIN. `shape` is that of the bias: (1, C, 1, 1) or (C,)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + (self.bias * GAIN).to(x.dtype), 0.2)


class ActivatedLinear(EqualLinear):
    """Affine map, then leaky relu times sqrt(2). (B, in) -> (B, out)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.linear(x, self.weight * self.scale * GAIN, self.bias * GAIN), 0.2)


class Blur(nn.Module):
    """Binomial low-pass, each channel alone. Pads `before` and `after` with zeros on both axes."""

    def __init__(self, channels: int, before: int, after: int, total: float = 1.0):
        super().__init__()
        self.pads = before, after
        self.register_buffer("kernel", blur_kernel(total).repeat(channels, 1, 1, 1), persistent=False)  # (C, 1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.pads
        kernel = self.kernel.to(x.dtype)
        if before == after:
            return F.conv2d(x, kernel, padding=before, groups=x.shape[1])
        return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


class Upsample(nn.Module):
    """Doubles height and width with the binomial kernel. (B, C, H, W) -> (B, C, 2H, 2W)"""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.register_buffer("kernel", blur_kernel(4.0).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])


class ConvLayer(nn.Sequential):
    """Convolution with activation; with `down`, blurred and halved. (B, in, H, W) -> (B, out, H or H/2, W or W/2)"""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, down: bool = False, activate: bool = True):
        gain = GAIN if activate else 1.0
        if down:
            pad = kernel + 1  # kernel taps of the blur, less the stride, plus those of the convolution
            layers = [Blur(in_channels, (pad + 1) // 2, pad // 2), EqualConv2d(in_channels, out_channels, kernel, 2, 0, gain)]
        else:
            layers = [EqualConv2d(in_channels, out_channels, kernel, 1, kernel // 2, gain)]
        if activate:
            layers.append(Activation(1, out_channels, 1, 1))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """Residual block that halves the resolution. (B, in, H, W) -> (B, out, H/2, W/2)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = ConvLayer(in_channels, in_channels, 3)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, down=True)
        self.skip = ConvLayer(in_channels, out_channels, 1, down=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / GAIN


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels a style scales; `demodulate` brings each output channel back to unit weight norm.

    x (B, in, H, W), style (B, latent) -> (B, out, H, W), or twice the size with `up` (transposed convolution, then blur).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, latent_dim: int,
        up: bool = False, demodulate: bool = True, gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel, kernel))
        self.modulation = EqualLinear(latent_dim, in_channels, bias=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel**2)
        self.padding, self.demodulate, self.gain = kernel // 2, demodulate, gain
        self.blur = Blur(out_channels, 1, 1, total=4.0) if up else None

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        style = self.modulation(style).float()  # (B, in)
        weight = self.weight[0] * self.scale
        x = x * style[:, :, None, None].to(x.dtype)
        if self.blur is None:
            x = F.conv2d(x, weight, padding=self.padding)
        else:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        if not self.demodulate:
            return x
        with torch.autocast(x.device.type, enabled=False):
            energy = style.square() @ weight.float().square().sum((2, 3)).T  # (B, out)
            factor = torch.rsqrt(energy + 1e-8) * self.gain
        return x * factor[:, :, None, None].to(x.dtype)


class StyledConv(nn.Module):
    """Modulated convolution with activation. The release's noise layers are never fed there, so there are none here."""

    def __init__(self, in_channels: int, out_channels: int, latent_dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, latent_dim, up, gain=GAIN)
        self.activate = Activation(1, out_channels, 1, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.activate(self.conv(x, style))


class ToRGB(nn.Module):
    """Features to a picture, added to the enlarged picture of the level below. (B, C, H, W) -> (B, 3, H, W)"""

    def __init__(self, in_channels: int, upsample: bool = True):
        super().__init__()
        self.conv = ConvLayer(in_channels, 3, 1)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.upsample = Upsample() if upsample else None

    def forward(self, x: Tensor, below: Tensor | None = None) -> Tensor:
        image = self.conv(x) + self.bias
        return image if below is None else image + self.upsample(below)


class ToFlow(nn.Module):
    """One level of the multi-scale flow: warps the source's feature map and blends it in (paper, section 3.2).

    x, feature (B, C, n, n), style (B, latent), below: the raw flow of the level below (B, 3, n/2, n/2) or None.
    Returns the masked warped feature, its blend with x, and the raw flow (B, 3, n, n): x and y before tanh, mask before
    sigmoid. The grid has its ends on -1 and 1 while sampling takes those as the picture's edges (align_corners differs):
    a zero flow is not quite the identity. The released weights were trained so; it stays.
    """

    def __init__(self, channels: int, latent_dim: int, size: int, upsample: bool = True):
        super().__init__()
        self.conv = ModulatedConv2d(channels, 3, 1, latent_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.upsample = Upsample() if upsample else None
        line = torch.linspace(-1, 1, size, dtype=torch.float64).float()
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]  # (1, n, n, 2)
        self.register_buffer("grid", grid, persistent=False)

    def forward(
        self, x: Tensor, style: Tensor, feature: Tensor, below: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.conv(x, style) + self.bias
        if below is not None:
            raw = raw + self.upsample(below)
        flow = torch.tanh(raw[:, :2].float()).permute(0, 2, 3, 1) + self.grid  # (B, n, n, 2)
        mask = torch.sigmoid(raw[:, 2:].float()).to(feature.dtype)
        warped = F.grid_sample(feature.float(), flow, mode="bilinear", padding_mode="zeros", align_corners=False)
        warped = warped.to(feature.dtype) * mask
        return warped, warped + x * (1 - mask), raw
