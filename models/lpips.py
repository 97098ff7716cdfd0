"""LPIPS (Zhang and others, CVPR 2018), version 0.1: distance of pictures in weighted features of a classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .perceptual import PerceptualLoss

# AlexNet's convolutions by torchvision's index: stride, padding, and whether a 3x3 max-pool comes before.
ALEXNET = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}


class AlexNet(nn.Module):
    """The five activations of AlexNet's convolutions. `state`: torchvision's `features.N.weight/bias`."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for number in ALEXNET:
            self.register_buffer(f"weight{number}", state[f"features.{number}.weight"].float(), persistent=False)
            self.register_buffer(f"bias{number}", state[f"features.{number}.bias"].float(), persistent=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def features(self, image: Tensor) -> list[Tensor]:
        """Activations of pictures (B, 3, H, W) in [-1, 1], from fine to coarse."""
        x, tapped = (image / 2 + 0.5 - self.mean) / self.std, []
        for number, (stride, padding, pooled) in ALEXNET.items():
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.relu(F.conv2d(x, getattr(self, f"weight{number}"), getattr(self, f"bias{number}"), stride, padding))
            tapped.append(x)
        return tapped


class LPIPS(nn.Module):
    """(B, 3, H, W) in [-1, 1], twice -> (B,), 0 for equal pictures.

    features: torchvision's `features.N.weight/bias` of AlexNet or VGG16, told apart by their indices.
    lin: the published weights of the five layers, `linN.model.1.weight`, of the same classifier.
    """

    def __init__(self, features: dict[str, Tensor], lin: dict[str, Tensor]):
        super().__init__()
        self.network = PerceptualLoss(features, blocks=5) if "features.28.weight" in features else AlexNet(features)
        for layer in range(5):
            self.register_buffer(f"lin{layer}", lin[f"lin{layer}.model.1.weight"].float(), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.network.features(a), self.network.features(b), strict=True)
        total = torch.zeros(len(a), device=a.device)
        for layer, (one, other) in enumerate(pairs):
            difference = (unit(one) - unit(other)) ** 2
            total = total + F.conv2d(difference, getattr(self, f"lin{layer}")).mean((1, 2, 3))
        return total


def unit(features: Tensor) -> Tensor:
    """Features of length 1 at each pixel."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
