"""DPE: one latent space, two kinds of motion (Pang et al., CVPR 2023, section 3)."""

import torch
from torch import Tensor, nn

from .config import DPEConfig
from .decoder import Generator, Rendered
from .encoder import Encoded, Encoder
from .layers import EqualLinear


class MotionBasis(nn.Module):
    """Motion codes to latent directions over an orthonormal basis. (B, motion_dim) -> (B, latent_dim)"""

    def __init__(self, latent_dim: int, motion_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(latent_dim, motion_dim))

    def basis(self) -> Tensor:
        """(latent_dim, motion_dim), orthonormal columns."""
        return torch.linalg.qr(self.weight.float() + 1e-8)[0]

    def forward(self, code: Tensor) -> Tensor:
        return code @ self.basis().T


class DPE(nn.Module):
    """Transfers expression, pose or both from a driving face to a source face.

    Pictures are (B, 3, S, S) float in [-1, 1]; results are not clamped. `channels_last` input is fastest.
    The motion path has no activation between its layers, so the shifts are affine in the motion code.
    """

    def __init__(self, config: DPEConfig):
        super().__init__()
        self.config, latent = config, config.latent_dim
        self.encoder = Encoder(config)
        self.motion_mlp = nn.Sequential(
            *[EqualLinear(latent, latent) for _ in range(4)], EqualLinear(latent, config.motion_dim)
        )
        self.motion_basis = MotionBasis(latent, config.motion_dim)
        self.expression_head = nn.Sequential(*[EqualLinear(latent, latent) for _ in range(3)])
        self.pose_head = nn.Sequential(*[EqualLinear(latent, latent) for _ in range(3)])
        self.expression_generator = Generator(config)
        self.pose_generator = Generator(config)

    def encode(self, image: Tensor) -> Encoded:
        """Latent code and feature maps of faces. (B, 3, S, S) in [-1, 1] -> Encoded"""
        return self.encoder(image)

    def motion_code(self, latent: Tensor) -> Tensor:
        """Motion coordinates of latent codes. (B, latent_dim) -> (B, motion_dim)"""
        return self._exact(self.motion_mlp, latent)

    def expression_shift(self, code: Tensor) -> Tensor:
        """What the expression of a motion code adds to a source's latent. (B, motion_dim) -> (B, latent_dim)"""
        return self._exact(self.expression_head, self._exact(self.motion_basis, code))

    def pose_shift(self, code: Tensor) -> Tensor:
        """What the pose of a motion code adds to a source's latent. (B, motion_dim) -> (B, latent_dim)"""
        return self._exact(self.pose_head, self._exact(self.motion_basis, code))

    def render_expression(self, source: Encoded, code: Tensor) -> Rendered:
        """The source with the expression of the code: picture and flows (section 3.2, the expression generator)."""
        return self.expression_generator(source.latent + self.expression_shift(code), source.features)

    def render_pose(self, source: Encoded, code: Tensor) -> Rendered:
        """The source with the head pose of the code: picture and flows (the pose generator)."""
        return self.pose_generator(source.latent + self.pose_shift(code), source.features)

    def transfer_expression(self, source: Encoded, code: Tensor) -> Tensor:
        """The source with the expression of the code, its pose kept. Encoded, (B, motion_dim) -> (B, 3, S, S)"""
        return self.render_expression(source, code).image

    def transfer_pose(self, source: Encoded, code: Tensor) -> Tensor:
        """The source with the head pose of the code, its expression kept. -> (B, 3, S, S)"""
        return self.render_pose(source, code).image

    def transfer_both(self, source: Encoded, expression_code: Tensor, pose_code: Tensor) -> Tensor:
        """Expression first, then pose through a second encoding of the (unclamped) picture between. -> (B, 3, S, S)"""
        return self.transfer_pose(self.encode(self.transfer_expression(source, expression_code)), pose_code)

    @staticmethod
    def _exact(layers: nn.Module, x: Tensor) -> Tensor:
        """The motion path is tiny and decides everything: float32 under any autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return layers(x.float())
