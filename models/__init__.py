"""The networks of DPE; everything here needs torch and nothing of the tool."""

from .config import DPEConfig
from .decoder import Generator, Rendered
from .discriminator import Discriminator
from .encoder import Encoded, Encoder
from .generator import DPE, MotionBasis
from .landmarks import LandmarkConfig, LandmarkNet, Landmarks
from .perceptual import PerceptualLoss

__all__ = [
    "DPE",
    "DPEConfig",
    "Discriminator",
    "Encoded",
    "Encoder",
    "Generator",
    "LandmarkConfig",
    "LandmarkNet",
    "Landmarks",
    "MotionBasis",
    "PerceptualLoss",
    "Rendered",
]
