"""The perceptual distance of training: features of a fixed image classifier (the paper's L_per, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Convolutions of each VGG up to its third and fourth block, by torchvision's index; "M" is a 2x2 max-pool.
PLANS = {
    "vgg16": (0, 2, "M", 5, 7, "M", 10, 12, 14, "M", 17, 19, 21, "M", 24, 26, 28),
    "vgg19": (0, 2, "M", 5, 7, "M", 10, 12, 14, 16, "M", 19, 21, 23, 25, "M", 28, 30, 32, 34),
}


class PerceptualLoss(nn.Module):
    """L1 between VGG features of two pictures, summed over blocks. (B, 3, H, W) in [-1, 1], twice -> scalar

    The target's features carry no gradient. `state` holds torchvision's `features.N.weight/bias`; VGG16 and VGG19 are
    told apart by their indices. `blocks` is how deep it looks (1 to 5); each block's last activation counts.
    """

    def __init__(self, state: dict[str, Tensor], blocks: int = 3):
        super().__init__()
        plan = PLANS["vgg19" if "features.34.weight" in state else "vgg16"]
        self.steps: list[int | str] = []
        self.taps: list[int] = []
        for position, step in enumerate(plan):
            last = position + 1 == len(plan) or plan[position + 1] == "M"
            self.steps.append(step)
            if step != "M":
                self.register_buffer(f"weight{step}", state[f"features.{step}.weight"].float(), persistent=False)
                self.register_buffer(f"bias{step}", state[f"features.{step}.bias"].float(), persistent=False)
                if last:
                    self.taps.append(step)
                    if len(self.taps) == blocks:
                        break
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def features(self, image: Tensor) -> list[Tensor]:
        """Tapped activations of pictures in [-1, 1]."""
        x = (image.clamp(-1, 1) / 2 + 0.5 - self.mean) / self.std
        tapped = []
        for step in self.steps:
            if step == "M":
                x = F.max_pool2d(x, 2)
                continue
            x = F.relu(F.conv2d(x, getattr(self, f"weight{step}"), getattr(self, f"bias{step}"), padding=1))
            if step in self.taps:
                tapped.append(x)
        return tapped

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(image), wanted, strict=True)
        return sum((a.float() - b.float()).abs().mean() for a, b in pairs)
