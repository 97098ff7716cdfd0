"""The networks of DPE; everything here needs torch and nothing of the tool."""

from .config import DPEConfig
from .decoder import Generator, Rendered
from .discriminator import Discriminator
from .encoder import Encoded, Encoder
from .generator import DPE, MotionBasis
from .inference import InferenceDPE
from .landmarks import LandmarkConfig, LandmarkNet, Landmarks
from .lpips import LPIPS
from .matte import MatteConfig, MatteNet
from .perceptual import PerceptualLoss
from .reader import ReaderConfig, ReaderNets
from .retouch import PatchDiscriminator, Retouch, RetouchConfig, RetouchNet
from .speech import SpeechConfig, SpeechNets

__all__ = [
    "DPE",
    "LPIPS",
    "DPEConfig",
    "Discriminator",
    "Encoded",
    "Encoder",
    "Generator",
    "InferenceDPE",
    "LandmarkConfig",
    "LandmarkNet",
    "Landmarks",
    "MatteConfig",
    "MatteNet",
    "MotionBasis",
    "PatchDiscriminator",
    "PerceptualLoss",
    "ReaderConfig",
    "ReaderNets",
    "Rendered",
    "Retouch",
    "RetouchConfig",
    "RetouchNet",
    "SpeechConfig",
    "SpeechNets",
]
