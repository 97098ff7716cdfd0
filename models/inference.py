"""The networks as they are used: the same functions as `DPE`, in fewer operations, without gradients.

Made once, from trained networks. The equalised scales lie in the weights; the motion layers, which are affine, are one
matrix a head; all styles of a generator come from one matrix; demodulation has its squares. What is not looked at is
not computed: the last level's warped features are needed only as three colours, so colours are warped there.

On a CPU in float32 two things are done otherwise, since arithmetic is dear there and memory near. Convolutions with
many channels go by Winograd's minimal filtering (Lavin and Gray, CVPR 2016): for a tile of 6x6 pixels 64 products where
there were 324, for one of 4x4 36 where there were 144. And features are warped as weighted sums of rows, which uses all
cores even for one picture.

Pictures are channels last throughout. Against `DPE` only the rounding differs: at most 5e-4 of a picture's 2, in the
mean 5e-6.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DPEConfig
from .decoder import Generator, ToFlow, ToRGB, mix, places, sampling_grid
from .encoder import Encoded, Encoder
from .generator import DPE
from .layers import GAIN, SLOPE, Blur, ConvLayer, EqualLinear, ResBlock, StyledConv, activate, in_float32, upsample

# Where Winograd pays: enough channels to hide the transforms, enough tiles to read the fourfold weights for.
WINOGRAD_CHANNELS, WINOGRAD_SIZES = 64, range(8, 257)
# Where a picture's feature map has this many numbers, each picture of a batch goes through the networks alone, since it
# fills the caches; elsewhere the batch goes together and shares the reading of the weights.
ALONE = 2**21
BAND = 256  # tiles that are transformed at once: few enough for the caches
ROWS = 4096  # pixels that a 1 x 1 kernel takes at once, likewise
# Output pixels of a tile along a side (it reads two more), and where polynomials are evaluated then, beside infinity:
# the points with the least rounding. The second must be 1.
POINTS = {4: (0.0, 1.0, -1.0, 0.5, -2.0), 6: (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0)}
LARGE_TILES = 64  # pictures from this size have them: smaller ones would be mostly margins


# Affine maps


def affine(layers: Iterable[EqualLinear]) -> tuple[Tensor, Tensor]:
    """Layers one after the other as one: weight (out, in), bias (out,), float64."""
    weight, bias = None, None
    for layer in layers:
        own = layer.weight.double() * layer.scale
        weight = own if weight is None else own @ weight
        bias = layer.bias.double() if bias is None else own @ bias + layer.bias.double()
    return weight, bias


class Affine(nn.Module):
    """x @ weight.T + bias, always in float32. (B, in) -> (B, out)"""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.float().contiguous())
        self.register_buffer("bias", bias.float())

    def forward(self, x: Tensor) -> Tensor:
        with in_float32(x):
            return F.linear(x.float(), self.weight, self.bias)


# Convolutions with bias and leaky relu


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(B, C) or (C,) as what multiplies or moves the channels of a picture, in its type."""
    return values.to(x.dtype)[..., None, None]


class Convolution(nn.Module):
    """Convolution, bias, leaky relu without its gain. (B, in, H, W) -> (B, out, H', W')

    `style` (B, in) multiplies the input's channels and `demodulation` (B, out) the result's, before the bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach().clone())

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)

    def forward(self, x: Tensor, style: Tensor | None = None, demodulation: Tensor | None = None) -> Tensor:
        if style is None:
            return activate(F.conv2d(x, self.weight, self.bias, self.stride, self.padding))
        x = self.convolve(x * per_channel(style, x))
        return activate(torch.addcmul(per_channel(self.bias, x), x, per_channel(demodulation, x)))


class PixelConvolution(Convolution):
    """The same with a 1 x 1 kernel in float32: a product, band by band, each activated while the caches have it."""

    def forward(self, x: Tensor) -> Tensor:
        pixels, weight = x.permute(0, 2, 3, 1), self.weight.flatten(1).T
        result = x.new_empty(*pixels.shape[:3], weight.shape[1])
        bands = pixels.flatten(0, 2).split(ROWS), result.flatten(0, 2).split(ROWS)
        for band, place in zip(*bands, strict=True):
            activate(torch.addmm(self.bias, band, weight, out=place))
        return result.permute(0, 3, 1, 2)


class UpConvolution(Convolution):
    """The same after doubling the picture: (B, in, H, W) -> (B, out, 2H, 2W)"""

    def __init__(self, weight: Tensor, bias: Tensor, blur: Blur):
        super().__init__(weight.transpose(0, 1), bias)
        self.blur = deepcopy(blur)

    def forward(self, x: Tensor, style: Tensor, demodulation: Tensor) -> Tensor:
        x = F.conv_transpose2d(x * per_channel(style, x), self.weight, stride=2)
        if len(x) > 1:
            x = self.blur(x)
            return activate(torch.addcmul(per_channel(self.bias, x), x, per_channel(demodulation, x)))
        kernel = self.blur.kernel * demodulation[0, :, None, None, None]
        return activate(F.conv2d(x, kernel, self.bias, padding=self.blur.padding, groups=len(kernel)))


class PhasedUpConvolution(Convolution):
    """The same with a 2 x 2 convolution to four times the channels, which are laid out as 2 x 2 pixels.

    More arithmetic, but of a kind that runtimes also do in 8 bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor, blur: Blur):
        out_channels, in_channels = weight.shape[:2]
        taps = F.pad(weight, (0, 1, 0, 1)).view(out_channels, in_channels, 2, 2, 2, 2).flip(2, 4)
        super().__init__(taps.permute(0, 3, 5, 1, 2, 4).reshape(-1, in_channels, 2, 2), bias, padding=1)
        self.blur = deepcopy(blur)

    def convolve(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(super().convolve(x), 2)  # its last row and column are zeros
        return self.blur(x)[..., :-1, :-1]


def fills_caches(config: DPEConfig, size: int) -> bool:
    """Whether the feature map of one picture does, at this size."""
    return size**2 * config.channels[size] >= ALONE


def one_by_one(x: Tensor) -> bool:
    """Whether a batch may be taken apart: not while it is compiled, which would write each picture out."""
    return len(x) > 1 and not torch.compiler.is_compiling()


def winograd_matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one dimension, float64: B^T (r, r) for pictures, G (r, 3) for kernels, A^T (tile, r) for results. r: tile + 2

    result = A^T [(G kernel) * (B^T picture)]: Toom-Cook's multiplication of polynomials, transposed.
    """
    points = torch.tensor(POINTS[tile], dtype=torch.float64)

    def evaluate(length: int) -> Tensor:
        powers = points[:, None] ** torch.arange(length)
        infinity = torch.zeros(1, length, dtype=torch.float64)
        infinity[0, -1] = 1
        return torch.cat([powers, infinity])

    return torch.linalg.inv(evaluate(tile + 2)).T, evaluate(3), evaluate(tile).T


def pieces(length: int, tile: int, first: int, count: int) -> Iterator[tuple[slice, int, int]]:
    """Of `count` tiles from `first` on those of one length: which they are, where they begin, how long each is.

    The last tile of a side ends where the side does.
    """
    whole = min(count, length // tile - first)
    if whole:
        yield slice(0, whole), first * tile, tile
    if whole < count:
        yield slice(whole, count), (first + whole) * tile, length % tile


class WinogradConvolution(nn.Module):
    """What `Convolution` with a 3 x 3 kernel and padding 1 does, float32 only."""

    def __init__(self, weight: Tensor, bias: Tensor, tile: int = 4):
        super().__init__()
        self.tile = tile
        picture, kernel, result = winograd_matrices(tile)
        out_channels, in_channels = weight.shape[:2]
        taps = weight.detach().permute(3, 2, 1, 0).reshape(9, -1).double()  # across, down, as the points below
        transformed = torch.kron(kernel, kernel) @ taps
        self.register_buffer("weight", transformed.float().view(-1, in_channels, out_channels))  # (points, in, out)
        self.register_buffer("bias", bias.detach().clone())
        self.register_buffer("to_points", picture.float().contiguous())  # (tile + 2, tile + 2), of one dimension
        self.register_buffer("from_points", result.float().contiguous())  # (tile, tile + 2)

    def forward(self, x: Tensor, style: Tensor | None = None, demodulation: Tensor | None = None) -> Tensor:
        (batch, channels, height, width), out_channels = x.shape, self.weight.shape[2]
        tile, reach = self.tile, self.tile + 2
        rows, columns = -(-height // tile), -(-width // tile)
        padded = x.new_empty(batch, rows * tile + 2, columns * tile + 2, channels)
        inside = padded[:, 1 : height + 1, 1 : width + 1]
        for border in (padded[:, :1], padded[:, height + 1 :], padded[:, :, :1], padded[:, :, width + 1 :]):
            border.zero_()
        if style is None:
            inside.copy_(x.permute(0, 2, 3, 1))
        else:
            torch.mul(x.permute(0, 2, 3, 1), style[:, None, None], out=inside)
        # Demodulation is positive: it may come after the leaky relu if the bias is divided by it.
        bias = self.bias if demodulation is None else (self.bias / demodulation)[:, None]
        sample, line, pixel, _ = padded.stride()
        strips = padded.as_strided((batch, rows, reach, line), (sample, tile * line, line, 1))
        result = x.new_empty(batch, height, width, out_channels)
        step = max(1, BAND // (batch * columns))
        for row in range(0, rows, step):
            down = self.to_points @ strips[:, row : row + step]  # (batch, strips, reach, line)
            sample, strip, *_ = down.stride()
            tiles = down.as_strided(
                (reach, reach, batch, down.shape[1], columns, channels), (pixel, line, sample, strip, tile * pixel, 1)
            )
            points = (self.to_points @ tiles.reshape(reach, -1)).view(reach**2, -1, channels)
            products = torch.bmm(points, self.weight)
            products[reach + 1].view(batch, -1, out_channels).add_(bias)  # what is added at (1, 1) is in all pixels
            across = self.from_points @ products.view(reach, -1)
            pixels = self.from_points @ across.view(tile, reach, -1)  # (across, down, the rest)
            pixels = pixels.view(tile, tile, batch, -1, columns, out_channels).permute(2, 3, 1, 4, 0, 5)
            if demodulation is not None:
                activate(pixels)
            for strip, top, lines in pieces(height, tile, row, down.shape[1]):
                for column, left, wide in pieces(width, tile, 0, columns):
                    part = pixels[:, strip, :lines, column, :wide]
                    place = result[:, top : top + part.shape[1] * lines, left : left + part.shape[3] * wide]
                    place = place.unflatten(1, (-1, lines)).unflatten(3, (-1, wide))
                    if demodulation is None:
                        torch.ops.aten.leaky_relu.out(part, SLOPE, out=place)
                    else:
                        torch.mul(part, demodulation[:, None, None, None, None], out=place)
        return result.permute(0, 3, 1, 2)


def convolution(weight: Tensor, bias: Tensor, size: int, winograd: bool) -> nn.Module:
    """The 3 x 3 convolution that is the fastest for pictures of this size."""
    if winograd and min(weight.shape[:2]) >= WINOGRAD_CHANNELS and size in WINOGRAD_SIZES:
        return WinogradConvolution(weight, bias, 6 if size >= LARGE_TILES else 4)
    return Convolution(weight, bias, padding=1)


# Encoder


def folded(layer: ConvLayer, kind: type[Convolution] = Convolution) -> Convolution:
    """A layer of the encoder without its blur."""
    return kind(layer.weight * layer.scale, layer.bias * layer.gain, layer.stride, layer.padding)


class HalvingBlock(nn.Module):
    """A residual block. (B, in, size, size) -> (B, out, size / 2, size / 2)"""

    def __init__(self, block: ResBlock, size: int, winograd: bool):
        super().__init__()
        first = block.conv1
        self.conv1 = convolution(first.weight * first.scale, first.bias * first.gain, size, winograd)
        self.blur, self.skip_blur = deepcopy(block.conv2.blur), deepcopy(block.skip.blur)
        self.conv2 = folded(block.conv2)
        skip = (block.skip.weight * block.skip.scale).detach()
        self.register_buffer("skip", skip.contiguous(memory_format=torch.channels_last))
        self.as_product = winograd

    def forward(self, x: Tensor) -> Tensor:
        result, skipped = self.conv2(self.blur(self.conv1(x))), self.skip_blur(x)
        if not self.as_product:
            return result.add_(F.conv2d(skipped, self.skip))
        rows = result.permute(0, 2, 3, 1).view(-1, result.shape[1])
        rows.addmm_(skipped.permute(0, 2, 3, 1).flatten(0, 2), self.skip.flatten(1).T)
        return result


class InferenceEncoder(nn.Module):
    """Picture to latent and feature maps. (B, 3, size, size) in [-1, 1] -> Encoded"""

    def __init__(self, encoder: Encoder, config: DPEConfig, winograd: bool):
        super().__init__()
        first, *blocks, last = encoder.convs
        sizes = config.resolutions[::-1]
        self.alone = sum(fills_caches(config, size) for size in sizes) if winograd else 0
        self.first = folded(first, PixelConvolution if winograd else Convolution)
        self.blocks = nn.ModuleList(
            HalvingBlock(block, size, winograd) for block, size in zip(blocks, sizes, strict=True)
        )
        weight = last.weight.double() * last.scale
        self.to_latent = Affine(weight.flatten(1), torch.zeros(len(weight), device=weight.device))

    def forward(self, image: Tensor) -> Encoded:
        x, features = self.first(image), []
        for number, block in enumerate(self.blocks):
            features.append(x)
            apart = number < self.alone and one_by_one(x)
            x = torch.cat([block(one) for one in x.split(1)]) if apart else block(x)
        return Encoded(self.to_latent(x.flatten(1)), features[::-1])


# Generator


def sample_rows(features: Tensor, where: Tensor, weight: Tensor) -> Tensor:
    """Bilinear samples of float32 feature maps, each times its weight; zeros outside.

    features: (B, C, H, W) channels last; where: (B, H', W', 2), x then y in [-1, 1], which are the outer edges; weight:
    (B, 1, H', W'). -> (B, C, H', W') channels last. A sum over four pixels' rows of channels for each result.
    """
    batch, channels, height, width = features.shape
    ends, shares = [], []
    for axis, length in enumerate((width, height)):
        place = ((where[..., axis] + 1) * length - 1) / 2
        low = place.floor()
        upper = place - low
        low = low.int()
        high = low + 1
        lower = torch.where((low >= 0) & (low < length), 1 - upper, 0)
        upper = torch.where((high >= 0) & (high < length), upper, 0)
        ends.append((low.clamp_(0, length - 1), high.clamp_(0, length - 1)))
        shares.append((lower, upper))
    (left, right), (top, bottom) = ends
    start = torch.arange(batch, device=left.device, dtype=left.dtype)[:, None, None] * (height * width)
    top, bottom = top * width + start, bottom * width + start
    (at_left, at_right), (at_top, at_bottom) = shares
    at_top, at_bottom = at_top * weight[:, 0], at_bottom * weight[:, 0]
    pixels = torch.stack([top + left, top + right, bottom + left, bottom + right], -1)
    parts = torch.stack([at_top * at_left, at_top * at_right, at_bottom * at_left, at_bottom * at_right], -1)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = F.embedding_bag(pixels.view(-1, 4), table, mode="sum", per_sample_weights=parts.view(-1, 4))
    return rows.view(*where.shape[:3], channels).permute(0, 3, 1, 2)


def sample_grid(features: Tensor, where: Tensor, weight: Tensor) -> Tensor:
    """What `sample_rows` does, as GPUs like it."""
    return F.grid_sample(features, where, padding_mode="zeros", align_corners=False) * weight


def by_rows(x: Tensor) -> bool:
    """Whether a pixel's channels are dealt with as a row: on a CPU. GPUs and other runtimes like maps better."""
    return x.device.type == "cpu" and not torch.jit.is_tracing()


def mix_rows(x: Tensor, weight: Tensor) -> Tensor:
    """What `mix` does; the result is contiguous."""
    rows = x.float().permute(0, 2, 3, 1).flatten(1, 2)
    mixed = torch.bmm(rows, weight.transpose(1, 2)).view(x.shape[0], *x.shape[2:], -1)
    return mixed.permute(0, 3, 1, 2).contiguous()


class FlowLevel(nn.Module):
    """The raw flow and mask of a level, and the picture that goes up from it."""

    def __init__(self, to_flow: ToFlow, to_rgb: ToRGB):
        super().__init__()
        self.register_buffer("weight", to_flow.conv.weight.detach().flatten(1).clone())  # (3, C)
        self.register_buffer("bias", to_flow.bias.detach()[:, None, None].clone())
        self.register_buffer("grid", sampling_grid(to_flow.grid.shape[1]))
        self.reach = to_flow.reach
        self.register_buffer("colours", (to_rgb.weight * to_rgb.scale).detach().flatten(1)[None].clone())  # (1, 3, C)
        self.register_buffer("activation_bias", (to_rgb.activation_bias * GAIN).detach()[:, None, None])
        self.register_buffer("colour_bias", to_rgb.bias.detach()[:, None, None].clone())

    def flow(self, x: Tensor, style: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """raw (B, 3, r, r); where each pixel looks (B, r, r, 2); mask (B, 1, r, r). float32"""
        raw = (mix_rows if by_rows(x) else mix)(x, self.weight * style[:, None]) + self.bias
        raw = raw if previous is None else raw.add_(upsample(previous))
        return raw, places(raw, self.grid, self.reach), torch.sigmoid(raw[:, 2:])

    def colour(self, features: Tensor) -> Tensor:
        """(B, C, r, r) -> (B, 3, r, r), linear"""
        colours = self.colours.expand(features.shape[0], -1, -1)
        return (mix_rows if by_rows(features) else mix)(features, colours)

    def picture(self, colours: Tensor, previous: Tensor | None) -> Tensor:
        """The picture with this level's contribution."""
        rgb = activate(colours + self.activation_bias).add_(self.colour_bias)
        return rgb if previous is None else rgb.add_(upsample(previous))


class InferenceGenerator(nn.Module):
    """Latent and the source's feature maps to a picture, (B, 3, size, size) float32, and where its finest level looks.

    The second, (B, size, size, 2) float32, says of each pixel from where in the source's finest feature map it comes, x
    then y in [-1, 1], which are the outer edges: the paper's flow, by which detail may go along.
    """

    def __init__(self, generator: Generator, config: DPEConfig, winograd: bool, phased: bool):
        super().__init__()
        self.register_buffer("input", generator.input.detach().clone(memory_format=torch.channels_last))
        self.together = sum(not (winograd and fills_caches(config, size)) for size in config.resolutions)
        sizes = [4, *[size for size in config.resolutions for _ in range(2)]]
        convs = [generator.conv1, *generator.convs]
        self.convs = nn.ModuleList(
            folded_styled(conv, size, winograd, phased) for conv, size in zip(convs, sizes, strict=True)
        )
        self.levels = nn.ModuleList(map(FlowLevel, generator.to_flows, generator.to_rgbs))
        modulated = [conv.conv for conv in convs] + [to_flow.conv for to_flow in generator.to_flows]
        self.widths = [conv.weight.shape[1] for conv in modulated]
        weight = [conv.modulation.weight.double() * (conv.modulation.scale * conv.scale) for conv in modulated]
        bias = [conv.modulation.bias.double() * conv.scale for conv in modulated]
        self.styles = Affine(torch.cat(weight), torch.cat(bias))
        powers = [conv.conv.weight.detach().double().square().sum((2, 3)).T for conv in convs]
        for number, power in enumerate(powers):  # (in, out)
            self.register_buffer(f"power{number}", power.float().contiguous())

    def forward(self, latent: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        styles = self.styles(latent).split(self.widths, 1)
        with in_float32(latent):
            demodulations = [
                GAIN * torch.rsqrt(style.square() @ self.get_buffer(f"power{number}") + 1e-8)
                for number, style in enumerate(styles[: len(self.convs)])
            ]
        x = self.convs[0](self.input.expand(latent.shape[0], -1, -1, -1), styles[0], demodulations[0])
        *state, places = self.through(range(self.together), styles, demodulations, features, x, None, None)
        rest = range(self.together, len(self.levels))
        if not rest:
            return state[-1], places
        if not one_by_one(x):
            return self.through(rest, styles, demodulations, features, *state)[-2:]
        drawn = []
        for number in range(len(x)):
            one = slice(number, number + 1)
            own = ([part[one] for part in parts] for parts in (styles, demodulations, features))
            drawn.append(self.through(rest, *own, *[part[one] for part in state])[-2:])
        pictures, places = zip(*drawn, strict=True)
        return torch.cat(pictures), torch.cat(places)

    def through(
        self, numbers: range, styles: Sequence[Tensor], demodulations: list[Tensor], features: list[Tensor],
        x: Tensor, raw: Tensor | None, image: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """The levels of these numbers: state, raw flow and picture of the level below to those of the last.

        The fourth is where that level looks.
        """
        where = None
        for number in numbers:
            for conv in (2 * number + 1, 2 * number + 2):
                x = self.convs[conv](x, styles[conv], demodulations[conv])
            level, feature = self.levels[number], features[number]
            with in_float32(x):
                raw, where, mask = level.flow(x, styles[len(self.convs) + number], raw)
                if number == len(self.levels) - 1:
                    image = level.picture(sample_grid(level.colour(feature), where, mask), image)
                    break
                warped = (sample_rows if by_rows(x) else sample_grid)(feature.float(), where, mask)
                image = level.picture(level.colour(warped), image)
                x = torch.addcmul(warped.to(x.dtype), x, (1 - mask).to(x.dtype))
        return x, raw, image, where


def folded_styled(layer: StyledConv, size: int, winograd: bool, phased: bool) -> nn.Module:
    """A layer of the generator that gives pictures of this size."""
    if layer.conv.blur is not None:
        kind = PhasedUpConvolution if phased else UpConvolution
        return kind(layer.conv.weight, layer.bias * GAIN, layer.conv.blur)
    return convolution(layer.conv.weight, layer.bias * GAIN, size, winograd)


# The whole


class InferenceDPE(nn.Module):
    """`DPE` for use: the same methods, shapes and values. The networks it is made from are not changed.

    winograd: whether convolutions may go by minimal filtering, which is for CPUs and float32. phased: whether pictures
    grow without transposed convolutions, which is for export in 8 bits.
    """

    @torch.no_grad()
    def __init__(self, networks: DPE, winograd: bool = False, phased: bool = False):
        super().__init__()
        self.config = networks.config
        self.encoder = InferenceEncoder(networks.encoder, self.config, winograd)
        self.to_code = Affine(*affine(networks.motion_mlp))
        basis = networks.motion_basis.basis().double()
        shifts = [affine(head) for head in (networks.expression_head, networks.pose_head)]
        self.expression_shift, self.pose_shift = (Affine(weight @ basis, bias) for weight, bias in shifts)
        self.expression_generator = InferenceGenerator(networks.expression_generator, self.config, winograd, phased)
        self.pose_generator = InferenceGenerator(networks.pose_generator, self.config, winograd, phased)

    def encode(self, image: Tensor) -> Encoded:
        """Latent and feature maps of pictures in [-1, 1]."""
        return self.encoder(image)

    def motion_code(self, latent: Tensor) -> Tensor:
        """Pose and expression of a picture as a few numbers. (B, latent_dim) -> (B, motion_dim)"""
        return self.to_code(latent)

    def transfer_expression(self, source: Encoded, code: Tensor) -> Tensor:
        """The source with the expression of a motion code, its own pose kept. -> (B, 3, size, size)"""
        return self.expression_generator(source.latent + self.expression_shift(code), source.features)[0]

    def transfer_pose(self, source: Encoded, code: Tensor) -> Tensor:
        """The source in the pose of a motion code, its own expression kept. -> (B, 3, size, size)"""
        return self.bend_pose(source, code)[0]

    def bend_pose(self, source: Encoded, code: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and from where in the source each pixel comes: see `InferenceGenerator`."""
        return self.pose_generator(source.latent + self.pose_shift(code), source.features)
