"""The reading networks: a closer look at mouth and eyes, which moves what the landmark network said of them.

The landmark network sees a whole face on a small picture. These see patches of the crop at its full size, cut where it
found the parts. They say the same motion coordinates without having heard it, so that their errors are others, and a
share of the difference counts. Not part of the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Configuration
from .landmarks import Block, LandmarkNet, convolution

# Motion coordinates, in the order of `dpe_cli.motion_space`; lids: the picture's left eye first.
COORDINATES = {"turn": slice(0, 2), "mouth": slice(6, 14), "lids": slice(14, 16), "gaze": slice(16, 18)}
MOTION_DIM = 20
GROUPS = ("mouth", "lids", "gaze")  # that can be read
MOUTH_PATCH, EYE_PATCH = (88, 80), (48, 64)  # height, width: `dpe_cli.parts`


@dataclass(frozen=True)
class ReaderConfig(Configuration):
    """Sizes of the networks, and what they read.

    groups: motion coordinates that are read; the others stay what they were. channels: feature maps at 1/4, 1/8 and
    1/16 of the patch. blocks: residual blocks there. features: length of the vector that is read of a patch. dropout:
    of training. members: networks whose mean counts, each of these sizes. Raises ValueError when these do not fit
    together.
    """

    networks: ClassVar[str] = "the reading networks"

    groups: tuple[str, ...] = ("lids", "gaze")  # of the mouth the landmark network knows more
    channels: tuple[int, ...] = (48, 64, 96)  # as the landmark network has them, from whose trunk training starts
    blocks: tuple[int, ...] = (0, 2, 2)
    features: int = 64
    dropout: float = 0.3
    members: int = 2

    def __post_init__(self):
        for name in ("groups", "channels", "blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if not self.groups or not set(self.groups) <= set(GROUPS):
            raise ValueError(f"reading networks read some of {', '.join(GROUPS)}")
        if len(self.channels) != 3 or len(self.blocks) != 3:
            raise ValueError("a reading network has 3 levels, each with channels and a number of blocks")
        if self.members < 1:
            raise ValueError("there is at least one reading network")


class Trunk(nn.Sequential):
    """Patches of any part to a small map. (B, 3, H, W) in [-1, 1] -> (B, C, H/16, W/16), rounded up

    Its normalisation is fixed: eyes and mouths have other means, and a running mean of both would be that of neither.
    """

    def __init__(self, config: ReaderConfig):
        levels, inside = [nn.PixelUnshuffle(2)], 12  # as in the landmark network
        for channels, blocks in zip(config.channels, config.blocks, strict=True):
            levels += [convolution(inside, channels, 2), nn.ReLU()] + [Block(channels) for _ in range(blocks)]
            inside = channels
        super().__init__(*levels)

    def train(self, mode: bool = True) -> "Trunk":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Gather(nn.Module):
    """A part's small map to a vector: where something is, is what is asked. (B, C, h, w) -> (B, features)"""

    def __init__(self, size: tuple[int, int], config: ReaderConfig):
        super().__init__()
        inside = config.channels[-1]
        height, width = (-(-side // 16) for side in size)
        self.squeeze, self.dropout = nn.Conv2d(inside, inside // 4, 1), nn.Dropout(config.dropout)
        self.gather = nn.Linear(inside // 4 * height * width, config.features)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.gather(self.dropout(F.relu(self.squeeze(maps)).flatten(1))))


class Answer(nn.Module):
    """Coordinates from what was seen. (B, inside), in pieces -> (B, outside)"""

    def __init__(self, inside: int, outside: int, config: ReaderConfig):
        super().__init__()
        self.hidden, self.dropout = nn.Linear(inside, config.features), nn.Dropout(config.dropout)
        self.out = nn.Linear(config.features, outside)

    def forward(self, *seen: Tensor) -> Tensor:
        return self.out(self.dropout(F.relu(self.hidden(torch.cat(seen, -1)))))


class ReaderNet(nn.Module):
    """One of `ReaderNets`: codes (B, 20) with what the patches tell in place of the groups that are read."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        if {"lids", "gaze"} & set(config.groups):
            self.eye, self.eye_answer = Gather(EYE_PATCH, config), Answer(2 * config.features + 2, 3, config)
        if "mouth" in config.groups:
            self.mouth, self.mouth_answer = Gather(MOUTH_PATCH, config), Answer(config.features + 2, 8, config)

    def forward(self, mouths: Tensor | None, eyes: Tensor | None, codes: Tensor) -> Tensor:
        read = codes.clone()
        if {"lids", "gaze"} & set(self.config.groups):
            lids, gaze = self.read_eyes(eyes, codes[:, COORDINATES["turn"]])
            for name, values in (("lids", lids), ("gaze", gaze)):
                if name in self.config.groups:
                    read[:, COORDINATES[name]] = values
        if "mouth" in self.config.groups:
            seen = self.mouth(self.look(mouths))
            read[:, COORDINATES["mouth"]] = self.mouth_answer(seen, codes[:, COORDINATES["turn"]])
        return read

    def look(self, patches: Tensor) -> Tensor:
        return self.trunk(patches.contiguous(memory_format=torch.channels_last))

    def read_eyes(self, eyes: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Lids (B, 2) and gaze (B, 2). Each eye is seen with an eye on the other; the mirrored one turns the other way.

        turn: (B, 2) yaw and pitch.
        """
        sides = turn.new_tensor([1.0, -1.0])
        seen = self.eye(self.look(eyes.flatten(0, 1))).unflatten(0, (-1, 2))  # (B, 2, features)
        turns = torch.stack([turn[:, :1] * sides, turn[:, 1:].expand(-1, 2)], 2)
        said = self.eye_answer(seen, seen.flip(1), turns)  # (B, 2, 3): lid, gaze across and down
        return said[..., 0], torch.stack([(said[..., 1] * sides).mean(1), said[..., 2].mean(1)], 1)


class ReaderNets(nn.Module):
    """Moves motion codes (B, 20) by a share of what patches show otherwise; before training it is nothing.

    mouths: (B, 3, 88, 80), eyes: (B, 2, 3, 48, 64), the second mirrored, in [-1, 1]; what is not read may be None. Of
    the codes only the head's yaw and pitch are an input.
    """

    def __init__(self, config: ReaderConfig | None = None):
        super().__init__()
        self.config = config = config or ReaderConfig()
        self.members = nn.ModuleList(ReaderNet(config) for _ in range(config.members))
        self.register_buffer("share", torch.zeros(MOTION_DIM))

    def forward(self, mouths: Tensor | None, eyes: Tensor | None, codes: Tensor) -> Tensor:
        return codes + self.share * (self.read(mouths, eyes, codes) - codes)

    def read(self, mouths: Tensor | None, eyes: Tensor | None, codes: Tensor) -> Tensor:
        """Codes as the patches alone tell those of the groups that are read: the members' mean. -> (B, 20)"""
        return torch.stack([member(mouths, eyes, codes) for member in self.members]).mean(0)

    def start_from(self, net: LandmarkNet) -> None:
        """Takes over the first levels of the landmark network. Raises ValueError where its sizes are others."""
        known = net.trunk.state_dict()
        for member in self.members:
            wanted = member.trunk.state_dict()
            if any(key not in known or known[key].shape != value.shape for key, value in wanted.items()):
                raise ValueError("the landmark network has other sizes than the reading networks")
            member.trunk.load_state_dict({key: known[key] for key in wanted})
