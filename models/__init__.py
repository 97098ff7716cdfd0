"""The networks of DPE. Imported as `dpe_cli.models`; they need torch and nothing of the project."""

from .config import DPEConfig
from .decoder import Generator, Rendered
from .discriminator import Discriminator
from .encoder import Encoded, Encoder
from .generator import DPE
from .perceptual import PerceptualLoss

__all__ = ["DPE", "DPEConfig", "Discriminator", "Encoded", "Encoder", "Generator", "PerceptualLoss", "Rendered"]
