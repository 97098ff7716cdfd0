"""DPE: disentangled pose and expression (CVPR 2023), the whole of the method.

    picture --encoder--> latent, features          latent --motion_mlp--> motion code
    motion code --motion_basis--> direction --expression_head--> expression shift
                                            --pose_head--------> pose shift
    latent + expression shift, features --expression_generator--> the source with the driving expression
    latent + pose shift,       features --pose_generator--------> the source in the driving pose

The edit is absolute: the driving picture's shift is added to the source's latent (paper section 3.2), without any
reference frame.
"""

import torch
from torch import Tensor, nn

from .config import DPEConfig
from .decoder import Generator, Rendered
from .encoder import Encoded, Encoder
from .layers import EqualLinear, in_float32


class MotionBasis(nn.Module):
    """Motion codes to latent directions over an orthonormal basis. (B, motion_dim) -> (B, latent_dim)"""

    def __init__(self, latent_dim: int = 512, motion_dim: int = 20):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(latent_dim, motion_dim))

    def basis(self) -> Tensor:
        """(latent_dim, motion_dim) float32, orthonormal columns: Q of the QR decomposition, its signs as they come."""
        with in_float32(self.weight):
            return torch.linalg.qr(self.weight.float() + 1e-8)[0]

    def forward(self, code: Tensor) -> Tensor:
        with in_float32(code):
            return code.float() @ self.basis().T


class DPE(nn.Module):
    """The networks and the two edits. Pictures: (B, 3, size, size) in [-1, 1]; results float32 and not clamped.

    Latents are (B, latent_dim), motion codes (B, motion_dim); both carry pose and expression, only the heads differ.
    """

    def __init__(self, config: DPEConfig):
        super().__init__()
        self.config = config
        dim = config.latent_dim
        self.encoder = Encoder(config)
        self.motion_mlp = nn.Sequential(*[EqualLinear(dim, dim) for _ in range(4)], EqualLinear(dim, config.motion_dim))
        self.motion_basis = MotionBasis(dim, config.motion_dim)
        self.expression_head = nn.Sequential(*[EqualLinear(dim, dim) for _ in range(3)])
        self.pose_head = nn.Sequential(*[EqualLinear(dim, dim) for _ in range(3)])
        self.expression_generator = Generator(config)
        self.pose_generator = Generator(config)

    def encode(self, image: Tensor) -> Encoded:
        """Latent and feature maps of pictures in [-1, 1]."""
        return self.encoder(image)

    def motion_code(self, latent: Tensor) -> Tensor:
        """Pose and expression of a picture as a few numbers. (B, latent_dim) -> (B, motion_dim)"""
        return self.motion_mlp(latent)

    def expression_shift(self, code: Tensor) -> Tensor:
        """What the expression of a motion code adds to a latent. (B, motion_dim) -> (B, latent_dim)"""
        return self.expression_head(self.motion_basis(code))

    def pose_shift(self, code: Tensor) -> Tensor:
        """What the pose of a motion code adds to a latent. (B, motion_dim) -> (B, latent_dim)"""
        return self.pose_head(self.motion_basis(code))

    def render_expression(self, latent: Tensor, features: list[Tensor]) -> Rendered:
        """The expression generator on a latent that already has its shift."""
        return self.expression_generator(latent, features)

    def render_pose(self, latent: Tensor, features: list[Tensor]) -> Rendered:
        """The pose generator on a latent that already has its shift."""
        return self.pose_generator(latent, features)

    def transfer_expression(self, source: Encoded, code: Tensor) -> Tensor:
        """The source with the expression of a motion code, its own pose kept. -> (B, 3, size, size)"""
        return self.render_expression(source.latent + self.expression_shift(code), source.features).image

    def transfer_pose(self, source: Encoded, code: Tensor) -> Tensor:
        """The source in the pose of a motion code, its own expression kept. -> (B, 3, size, size)"""
        return self.render_pose(source.latent + self.pose_shift(code), source.features).image

    def transfer_both(self, source: Encoded, expression_code: Tensor, pose_code: Tensor) -> Tensor:
        """Expression first, then pose, the unclamped picture in between encoded anew. -> (B, 3, size, size)"""
        between = self.transfer_expression(source, expression_code)
        return self.transfer_pose(self.encode(between), pose_code)
