"""The landmark network: a face crop to dense landmarks, expression measures, visibility and confidence.

Landmarks are not regressed point by point: the network says how a face model is shaped (coefficients on a basis of
principal components, in the head's own frame) and how it is posed (rotation, scale, translation). Both come out, so a
loss can look at expressions without the pose. Everything is differentiable down to the picture's pixels.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Configuration
from .layers import in_float32

POINTS = 478  # MediaPipe's face mesh with the irises
BLENDSHAPES = 52
POSE = 10  # log scale, translation (3), the first two columns of the rotation (6)
USUAL_SCALE = 0.74  # outer eye corners are 0.37 crop sides apart; a side is 2 long


@dataclass(frozen=True)
class LandmarkConfig(Configuration):
    """Sizes of the network.

    size: side of the crop in pixels, a multiple of 32. channels: feature maps at 1/4, 1/8, 1/16, 1/32 of it.
    blocks: residual blocks there. features: length of the vector that is read. components: of the face model.
    Raises ValueError when these do not fit together.
    """

    networks: ClassVar[str] = "the landmark network"

    size: int = 192
    channels: tuple[int, ...] = (48, 64, 96, 128)
    blocks: tuple[int, ...] = (0, 2, 2, 1)
    features: int = 192
    components: int = 96

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.size % 32 or len(self.channels) != 4 or len(self.blocks) != 4:
            raise ValueError("a landmark network has 4 levels, and a size that is a multiple of 32")


class Landmarks(NamedTuple):
    """What the network says of B crops. Coordinates have -1 and 1 at the crop's edges; z, in the same unit, grows away
    from the camera. Points are MediaPipe's, blendshapes in its order."""

    points: Tensor  # (B, 478, 3): scale * shape @ rotation.T + translation
    shape: Tensor  # (B, 478, 3) in the head's frame, the mean face's outer eye corners one unit apart
    scale: Tensor  # (B,)
    rotation: Tensor  # (B, 3, 3)
    translation: Tensor  # (B, 3)
    blendshapes: Tensor  # (B, 52) in [0, 1]
    visibility: Tensor  # (B, 478) in [0, 1]: the point lies inside the crop and nothing covers it
    confidence: Tensor  # (B,) in [0, 1]: there is a face and most of it is visible


def convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, normalisation. Plain, not depthwise: on CPUs less than half the time for twice the sums."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))


class Block(nn.Module):
    """Two convolutions beside the identity. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.one, self.two = convolution(channels, channels), convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(x))))


class LandmarkNet(nn.Module):
    """Face crops, framed as the tool frames them, to landmarks. (B, 3, H, W) in [-1, 1] -> Landmarks

    Crops of another size than the configured one are averaged (or repeated) to it.
    """

    def __init__(self, config: LandmarkConfig | None = None):
        super().__init__()
        self.config = config = config or LandmarkConfig()
        # Squares of 2x2 pixels become channels: maps at half the size would cost a third of the time.
        levels, inside = [nn.PixelUnshuffle(2)], 12
        for channels, blocks in zip(config.channels, config.blocks, strict=True):
            levels += [convolution(inside, channels, 2), nn.ReLU()] + [Block(channels) for _ in range(blocks)]
            inside = channels
        self.trunk = nn.Sequential(*levels)
        # A flattened small map, not its mean: where something is, is what is asked.
        self.squeeze = nn.Conv2d(inside, inside // 2, 1)
        self.gather = nn.Linear(inside // 2 * (config.size // 32) ** 2, config.features)
        self.shape_head = nn.Linear(config.features, config.components)
        self.pose_head = nn.Linear(config.features, POSE)
        self.blendshape_head = nn.Linear(config.features, BLENDSHAPES)
        self.visibility_head = nn.Linear(config.features, POINTS)
        self.confidence_head = nn.Linear(config.features, 1)
        self.register_buffer("mean", torch.zeros(POINTS, 3))
        self.register_buffer("basis", torch.zeros(config.components, POINTS * 3))  # rows scaled to unit variance
        with torch.no_grad():
            for head in (self.shape_head, self.pose_head, self.blendshape_head):
                head.weight.mul_(0.1)  # training starts near the mean face, upright and centred
                head.bias.zero_()
            self.blendshape_head.bias.fill_(-2.0)

    def forward(self, image: Tensor) -> Landmarks:
        if image.shape[-1] != self.config.size or image.shape[-2] != self.config.size:
            image = F.interpolate(image, size=(self.config.size, self.config.size), mode="area")
        maps = self.squeeze(self.trunk(image.contiguous(memory_format=torch.channels_last)))
        with in_float32(maps):
            features = F.relu(self.gather(F.relu(maps.float()).flatten(1)))
            shape = self.mean + (self.shape_head(features) @ self.basis).view(-1, POINTS, 3)
            scale, translation, axes = self.pose_head(features).split((1, 3, 6), 1)
            scale = USUAL_SCALE * scale.clamp(-3, 3).exp()
            rotation = rotation_from(axes)
            points = scale[..., None] * shape @ rotation.transpose(1, 2) + translation[:, None]
            return Landmarks(
                points,
                shape,
                scale[:, 0],
                rotation,
                translation,
                self.blendshape_head(features).sigmoid(),
                self.visibility_head(features).sigmoid(),
                self.confidence_head(features)[:, 0].sigmoid(),
            )


def rotation_from(axes: Tensor) -> Tensor:
    """Rotation matrices from their first two columns less the identity's, made orthonormal. (B, 6) -> (B, 3, 3)"""
    upright = axes.new_tensor([1.0, 0, 0, 0, 1, 0])
    first, second = (axes + upright).split(3, 1)
    first = F.normalize(first, dim=1)
    second = F.normalize(second - (first * second).sum(1, keepdim=True) * first, dim=1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], 2)
