"""The sizes of one DPE network, stored beside its weights."""

import json
from dataclasses import asdict, dataclass, field

# Channels at each resolution. The paper's release doubles nothing here: its multiplier is 1.
FULL_CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
COMPACT_CHANNELS = {4: 128, 8: 128, 16: 128, 32: 96, 64: 64, 128: 32, 256: 16}


@dataclass(frozen=True)
class DPEConfig:
    """Sizes of the networks.

    size: side of the face crop in pixels, a power of two from 16; channels: resolution -> feature channels, for every
    power of two from 4 to `size`; latent_dim: length of a face's latent code; motion_dim: number of motion coordinates.

    Raises:
        ValueError: the size is no power of two, or a resolution has no channels.
    """

    size: int = 256
    channels: dict[int, int] = field(default_factory=lambda: dict(COMPACT_CHANNELS))
    latent_dim: int = 256
    motion_dim: int = 20

    def __post_init__(self):
        if self.size < 16 or self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two from 16, not {self.size}")
        missing = [r for r in self.resolutions if r not in self.channels]
        if missing:
            raise ValueError(f"no channels given for resolution {missing[0]}")

    @property
    def resolutions(self) -> list[int]:
        """4, 8, ... up to the size."""
        return [1 << k for k in range(2, self.size.bit_length())]

    @classmethod
    def full(cls) -> "DPEConfig":
        """The paper's network as released: 69 million parameters."""
        return cls(256, {r: c for r, c in FULL_CHANNELS.items() if r <= 256}, 512, 20)

    @classmethod
    def compact(cls, size: int = 256) -> "DPEConfig":
        """The same architecture, narrower: our default weights."""
        return cls(size)

    def to_dict(self) -> dict:
        """Plain fields, for a changed copy: DPEConfig(**{**config.to_dict(), "size": 128})."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "DPEConfig":
        """Reads what `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            fields["channels"] = {int(r): int(c) for r, c in fields["channels"].items()}
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a DPE configuration: {error}") from error
