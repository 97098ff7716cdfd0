"""The networks that hear: speech to mouth, speech to head pose, and whether a mouth belongs to a voice.

AudioExpNet stands for SadTalker's ExpNet, PoseVAE for its PoseVAE (arXiv 2211.12194), both on DPE's motion coordinates
in place of a 3DMM's. SyncNet is a pair of towers trained by contrast. All see a limited window of time and pad nothing,
so a sound can be worked through in pieces.

Time: mel columns come 80 a second, motion frames 25; frame i lies at column 3.2 i, so five frames are sixteen columns.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Configuration

BANDS = 80  # mel bands
FRAMES, COLUMNS = 5, 16  # motion frames and mel columns of 0.2 s
LIP_POINTS = 40  # of the outer and the inner lips
LOUD, LOUD_SLOPE = -1.3, 4.0  # mean of a column's bands above which it belongs to a voice, and how sharply
QUIET_WEIGHT = 0.05  # share of loud columns at which a voice's mean counts half
MARGIN = 8  # columns that the front end sees beyond its frames, each way


@dataclass(frozen=True)
class SpeechConfig(Configuration):
    """Sizes of the networks.

    mouth: motion coordinates that speech drives. width, members: of AudioExpNet. dilations: of its convolutions over
    motion frames. around: motion frames each way over which it takes out the voice's mean spectrum. The dilations' sum
    and `around` are multiples of five frames. styles: of PoseVAE. window: its frames. latent: of PoseVAE. sync_width,
    sync_window (frames, odd): of SyncNet. Raises ValueError when these do not fit.
    """

    networks: ClassVar[str] = "the speech networks"

    mouth: int = 8
    width: int = 96
    members: int = 4
    dilations: tuple[int, ...] = (1, 2, 4, 2, 1)
    around: int = 25
    dropout: float = 0.3
    styles: int = 46
    window: int = 32
    latent: int = 64
    sync_width: int = 64
    sync_window: int = 11

    def __post_init__(self):
        object.__setattr__(self, "dilations", tuple(self.dilations))  # JSON has lists
        if sum(self.dilations) % FRAMES or self.around % FRAMES or self.sync_window % 2 == 0:
            raise ValueError("the reach must be a multiple of five frames, the sync window odd")

    @property
    def reach(self) -> int:
        """Motion frames that AudioExpNet sees each way."""
        return sum(self.dilations) + self.around


class FrontEnd(nn.Module):
    """Mel columns to one vector a motion frame: two convolutions over columns, then the means around each frame.

    (B, 80, 3.2 n + 2 * MARGIN) -> (B, width, n), n a multiple of five; the first frame lies at column MARGIN.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(BANDS, width, 5), nn.GELU(), nn.Dropout(dropout), nn.Conv1d(width, width, 5), nn.GELU()
        )  # four columns less on each side

    def forward(self, mel: Tensor) -> Tensor:
        frames = (mel.shape[-1] - 2 * MARGIN) // COLUMNS * FRAMES
        columns = self.layers(mel)  # the first is centred on column 4
        place = torch.arange(frames, device=mel.device) * (COLUMNS / FRAMES) + MARGIN - 4
        distance = (torch.arange(columns.shape[-1], device=mel.device)[:, None] - place).abs()
        # The mean of four neighbours, linear between two such means, is a trapezium. One product of matrices is
        # faster than pooling and indexing, above all backwards.
        return columns @ ((2.5 - distance).clamp(0, 1) / 4).to(columns.dtype)


class Voice(nn.Module):
    """Takes the mean spectrum of what is loud nearby out of mel columns: voices and microphones differ by little else.

    (B, 80, C + 2 * reach) -> (B, 80, C), C a multiple of four; `reach` columns each way are heard.
    """

    def __init__(self, reach: int):
        super().__init__()
        self.reach = reach

    def forward(self, mel: Tensor) -> Tensor:
        if not self.reach:
            return mel
        weight = torch.sigmoid(LOUD_SLOPE * (mel.mean(1, keepdim=True) - LOUD))
        pooled = F.avg_pool1d(torch.cat([mel * weight, weight], 1), 4)
        sums = F.avg_pool1d(pooled, self.reach // 2, 1)  # between each two fours of columns
        # Where nothing is loud, the mean is that of no voice at all: silence stays silent.
        knots = (sums[:, :-1] + QUIET_WEIGHT * LOUD) / (sums[:, -1:] + QUIET_WEIGHT)
        share = (torch.arange(4, device=mel.device) + 0.5) / 4
        mean = knots[..., :-1, None] * (1 - share) + knots[..., 1:, None] * share
        return mel[..., self.reach : -self.reach] - mean.flatten(-2)


class AudioExpNet(nn.Module):
    """Speech and person to the mouth's motion coordinates, as what they differ by from the person's closed mouth.

    mel (B, 80, 3.2 (n + 2 reach) + 2 MARGIN), closed mouth (B, mouth), usual mouth while speaking, from the closed one,
    (B, mouth), and how far the coordinates spread about it (B, mouth) -> (B, n, mouth), n a multiple of five. The mean
    of several networks that differ by chance: little was learnt from, and their errors are not the same.
    """

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.voice = Voice(config.around * COLUMNS // FRAMES)
        self.members = nn.ModuleList(MouthNet(config) for _ in range(config.members))

    def each(self, mel: Tensor, closed: Tensor, usual: Tensor, spread: Tensor) -> Tensor:
        """What every network says, (members, B, n, mouth)."""
        heard, person = self.voice(mel), torch.cat([closed, usual, spread], 1)
        return torch.stack([member(heard, person) for member in self.members])

    def forward(self, mel: Tensor, closed: Tensor, usual: Tensor, spread: Tensor) -> Tensor:
        return self.each(mel, closed, usual, spread).mean(0)


class MouthNet(nn.Module):
    """One of the networks of AudioExpNet: mel without its voice, (B, 3 * mouth) of the person -> (B, n, mouth)."""

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.front = FrontEnd(config.width, config.dropout)
        self.person = nn.Sequential(nn.Linear(3 * config.mouth, 32), nn.GELU(), nn.Dropout(config.dropout))
        self.manner, self.rest = nn.Linear(32, config.width), nn.Linear(3 * config.mouth, config.mouth)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(config.width, config.width, 3, dilation=dilation), nn.GELU(), nn.Dropout(config.dropout),
                nn.Conv1d(config.width, config.width, 1),
            ) for dilation in config.dilations
        )  # fmt: skip
        self.head = nn.Linear(config.width, config.mouth)
        self.dilations = config.dilations

    def forward(self, mel: Tensor, person: Tensor) -> Tensor:
        features = self.front(mel) + self.manner(self.person(person))[..., None]
        for layer, dilation in zip(self.layers, self.dilations, strict=True):
            features = features[..., dilation:-dilation] + layer(features)
        return self.head(F.gelu(features).transpose(1, 2)) + self.rest(person)[:, None]


class PoseVAE(nn.Module):
    """Conditional variational autoencoder of head poses over a window, given its speech and a style.

    Poses are residuals to the person's usual one. Mean and log variance have heads of their own (SadTalker's code
    shares one, a slip).
    """

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.window, self.latent = config.window, config.latent
        self.front = FrontEnd(32, config.dropout)
        self.audio = nn.Linear(32, 6)
        self.styles = nn.Embedding(config.styles, 16)
        size = 6 * config.window
        self.encoder = nn.Sequential(nn.Linear(2 * size + 16, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU())
        self.mean, self.log_variance = nn.Linear(128, config.latent), nn.Linear(128, config.latent)
        self.decoder = nn.Sequential(
            nn.Linear(config.latent + size + 16, 128), nn.GELU(), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, size)
        )

    def hear(self, mel: Tensor) -> Tensor:
        """(B, 80, columns of at least a window, front end's margins included) -> (B, 6 * window)"""
        return self.audio(self.front(mel)[..., : self.window].transpose(1, 2)).flatten(1)

    def encode(self, pose: Tensor, heard: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """(B, window, 6), (B, 6 * window), (B,) -> mean and log variance (B, latent)"""
        hidden = self.encoder(torch.cat([pose.flatten(1), heard, self.styles(style)], 1))
        return self.mean(hidden), self.log_variance(hidden).clamp(-8, 4)

    def decode(self, latent: Tensor, heard: Tensor, style: Tensor) -> Tensor:
        """(B, latent), (B, 6 * window), (B,) -> (B, window, 6)"""
        return self.decoder(torch.cat([latent, heard, self.styles(style)], 1)).view(-1, self.window, 6)


class SyncNet(nn.Module):
    """Unit vectors of speech and of a mouth's motion that are near each other where the two belong together.

    They are of every window of `sync_window` frames. What a mouth looks like at rest is taken out first.
    """

    def __init__(self, config: SpeechConfig):
        super().__init__()
        width, window = config.sync_width, config.sync_window
        self.front = FrontEnd(width, config.dropout)
        self.sound = self.tower(width, width, window)
        self.motion = self.tower(2 * config.mouth, width, window)
        self.scale = nn.Parameter(torch.tensor(2.3))  # logarithm of what cosines are multiplied by

    @staticmethod
    def tower(inside: int, width: int, window: int) -> nn.Sequential:
        """(B, inside, n) -> (B, 64, n - window + 1)"""
        return nn.Sequential(
            nn.Conv1d(inside, width, 5), nn.GELU(), nn.Dropout(0.2), nn.Conv1d(width, width, window - 4), nn.GELU(),
            nn.Conv1d(width, 64, 1),
        )  # fmt: skip

    def hear(self, mel: Tensor) -> Tensor:
        """(B, 80, 3.2 n + 2 MARGIN) -> (B, n - sync_window + 1, 64)"""
        return F.normalize(self.sound(self.front(mel)).transpose(1, 2), dim=-1)

    def watch(self, mouth: Tensor) -> Tensor:
        """Mouth coordinates (B, n, mouth) -> (B, n - sync_window + 1, 64)"""
        velocity = F.pad(mouth.diff(dim=1), (0, 0, 1, 0))
        motion = torch.cat([mouth - mouth.mean(1, keepdim=True), velocity], -1)
        return F.normalize(self.motion(motion.transpose(1, 2)).transpose(1, 2), dim=-1)


class SpeechNets(nn.Module):
    """All three, and what was measured on the training clips beside them."""

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config = config
        self.expression = AudioExpNet(config)
        self.pose = PoseVAE(config)
        self.sync = SyncNet(config)
        self.register_buffer("aperture", torch.zeros(config.mouth))  # change of the mouth's opening by coordinate
        self.register_buffer(
            "closed", torch.zeros(2)
        )  # opening where all coordinates are 0, and that of a closed mouth
        self.register_buffer("mean_mouth", torch.zeros(config.mouth))  # of people who speak, from the closed mouth
        self.register_buffer("mean_spread", torch.ones(config.mouth))  # within a clip
        self.register_buffer("lips", torch.zeros(config.mouth, LIP_POINTS, 3))  # change of lip points by coordinate
        self.register_buffer("blink", torch.zeros(2))  # change of the lids' coordinates from open to shut
        self.register_buffer("pose_scale", torch.ones(6))  # spread of the pose coordinates within a clip

    def opening(self, mouth: Tensor) -> Tensor:
        """The mouth's opening over the distance of the outer eye corners, by its coordinates (..., mouth) -> (...)"""
        return mouth @ self.aperture + self.closed[0]
