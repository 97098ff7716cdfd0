"""Sizes of the networks: everything that decides the shape of a checkpoint."""

import json
from dataclasses import asdict, dataclass, field
from typing import ClassVar

# Resolution -> channels of the feature maps there. Wider where pictures are small, as in the paper's base networks.
FULL_CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
COMPACT_CHANNELS = {4: 128, 8: 128, 16: 128, 32: 96, 64: 64, 128: 32, 256: 16, 512: 8}

BORDERS = ("zeros", "edge")
LARGEST = 4096  # number of channels, pixels or layers that is believed of a file


def bounded(digits: str) -> int:
    """A number of a file. Raises ValueError above LARGEST."""
    if len(digits) > 8 or int(digits) > LARGEST:
        raise ValueError(f"networks of that size are not built: {digits[:20]}")
    return int(digits)


class Configuration:
    """What the configurations of all networks have in common: a frozen dataclass of plain fields, kept as JSON."""

    networks: ClassVar[str]  # whose sizes these are, for messages

    def to_dict(self) -> dict:
        """Plain fields; `type(config)(**config.to_dict())` is the same configuration."""
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Configuration":
        """Raises ValueError for text that is not a configuration, or one of networks that nobody could build."""
        try:
            return cls(**json.loads(text, parse_int=bounded))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a configuration of {cls.networks}: {error}") from error


@dataclass(frozen=True)
class DPEConfig(Configuration):
    """Sizes of the networks.

    size: side of the square crop in pixels, a power of two from 8.
    channels: resolution -> channels, at least for 4, 8, ... size; entries beyond `size` are allowed and unused.
    latent_dim: length of a latent; motion_dim: length of a motion code.
    border: what the finest level shows where a flow leaves the source's picture: zeros, a flat grey, as in the paper's
    networks, or edge, its nearest pixels. No weight depends on it.
    Raises ValueError when these do not fit together.
    """

    networks: ClassVar[str] = "the networks"

    size: int = 256
    channels: dict[int, int] = field(default_factory=lambda: dict(FULL_CHANNELS))
    latent_dim: int = 512
    motion_dim: int = 20
    border: str = "zeros"

    def __post_init__(self):
        if self.size < 8 or self.size & (self.size - 1):
            raise ValueError(f"size {self.size} is not a power of two from 8")
        channels = {int(resolution): int(count) for resolution, count in self.channels.items()}  # JSON has string keys
        object.__setattr__(self, "channels", channels)
        missing = [resolution for resolution in (4, *self.resolutions) if channels.get(resolution, 0) < 1]
        if missing:
            raise ValueError(f"no channels for resolution {', '.join(map(str, missing))}")
        if not 1 <= self.motion_dim <= self.latent_dim:
            raise ValueError(f"motion_dim {self.motion_dim} is not between 1 and latent_dim {self.latent_dim}")
        if self.border not in BORDERS:
            raise ValueError(f"border {self.border} is not one of {', '.join(BORDERS)}")

    @property
    def resolutions(self) -> list[int]:
        """8, 16, ... size: those of the feature maps, the flows and the images of a generator."""
        return [2**power for power in range(3, self.size.bit_length())]

    @classmethod
    def full(cls, size: int = 256) -> "DPEConfig":
        """The paper's networks: the released checkpoint at 256."""
        return cls(size)

    @classmethod
    def compact(cls, size: int = 256) -> "DPEConfig":
        """A thirteenth of the parameters: fast on a CPU, and small enough to travel with the tool."""
        return cls(size, dict(COMPACT_CHANNELS), latent_dim=256, border="edge")
