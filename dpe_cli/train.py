"""Training of the DPE networks on prepared clips.

Two kinds of step share the networks, the data and the optimiser:

* guided: landmarks say what each network must do (motion codes, flows, and the intermediate image that the paper has no
  target for). Cheap enough for a CPU; it gives the codes and the flows their meaning.
* cycle: the paper's first stage (section 3.3): S -> S' -> S'' and D -> D' -> D'' through both generators,
  reconstruction of the three pairs, perceptual loss, self-reconstruction, non-saturating GAN on S'' and D'', and
  asymmetric back-propagation: the middle pair (S', D') does not update the pose generator.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dpe_cli.dataset import FLOW_SIZE, Clip, Mesh, Sampler, load_clips
from dpe_cli.errors import InputError
from dpe_cli.initialise import separate, to_image, warm_up
from dpe_cli.models import DPE, Discriminator, Encoded, PerceptualLoss
from dpe_cli.models.layers import in_float32
from dpe_cli.motion_space import POSE_DIM, MotionSpace
from dpe_cli.weights import save

LANDMARKS = 2 * 478  # x and y of MediaPipe's face mesh


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; written beside its weights."""

    minutes: float = 60.0
    batch: int = 16
    expression_only: bool = False  # train the expression head and generator alone: the encoder and pose rest
    image_weight: float = 1.0  # of the expression generator's picture in a guided step
    pose_share: float = 0.34  # share of each guided batch that also trains the pose generator
    lr: float = 2e-3
    cycle: bool = False  # the paper's losses instead of the guided ones
    guide: float = 1.0  # weight of the landmark terms inside a cycle step
    flow_weight: float = 2.0
    code_weight: float = 15.0  # less, and the pictures' gradients drown it in the shared encoder
    landmark_weight: float = 0.0  # of landmarks read from the latent by a layer that is thrown away: richer latents
    motion_weight: float = 1.0  # of the codes' difference between the two frames of a clip, relative to the codes
    code_minutes: float = 0.0  # at first only the motion codes are learnt: fast, for the generators rest
    perceptual_weight: float = 0.0  # the paper's lambda_p is 20 on its own scale of VGG19 features
    perceptual_blocks: int = 3
    perceptual_size: int = 96  # side of the window around the face that the perceptual network sees
    gan_weight: float = 0.0
    ema: float = 0.998
    threads: int = 1
    workers: int = 1
    seed: int = 0
    save_every: float = 5.0  # minutes


def configure(changes: Iterable[str]) -> TrainConfig:
    """The standard configuration with NAME=VALUE changes. Raises InputError for a name or a value that does not fit."""
    kinds = {one.name: type(one.default) for one in fields(TrainConfig)}
    values = {}
    for change in changes:
        name, _, text = change.partition("=")
        try:
            values[name] = text.lower() in ("1", "true", "yes") if kinds[name] is bool else kinds[name](text)
        except (KeyError, ValueError) as error:
            raise InputError(f"{change} is no setting of the training", f"use one of {', '.join(kinds)}") from error
    return TrainConfig(**values)


@dataclass
class Losses:
    """Named scalar terms of one step and their weighted sum."""

    total: Tensor | float = 0.0
    terms: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        self.total = self.total + weight * value
        self.terms[name] = self.terms.get(name, 0.0) + float(value.detach())


class _Stream(IterableDataset):
    def __init__(self, clips: list[Clip], mesh: Mesh, seed: int, codes_only: bool):
        self.clips, self.mesh, self.seed, self.codes_only = clips, mesh, seed, codes_only

    def __iter__(self):
        import cv2

        cv2.setNumThreads(1)
        info = torch.utils.data.get_worker_info()
        return iter(
            Sampler(self.clips, self.mesh, self.seed * 1000 + (info.id if info else 0), codes_only=self.codes_only)
        )


def weighted_l1(image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference, pixels weighted, at three scales: coarse agreement first, detail last."""
    difference = image.float() - target
    loss = (difference.abs() * weight[:, None]).mean()
    for _ in range(2):
        difference, weight = F.avg_pool2d(difference, 2), F.avg_pool2d(weight[:, None], 2)[:, 0]
        loss = loss + (difference.abs() * weight[:, None]).mean()
    return loss / 3


def flow_loss(flows: list[Tensor], where: Tensor, valid: Tensor) -> Tensor:
    """Distance (smooth L1) between the tanh of each level's raw flow and the landmark flow.

    flows: raw (B, 3, r, r); where: (B, 2, F, F) sampling positions in [-1, 1] at pixel centres; valid: (B, F, F).
    The generators add their flow to a grid whose ends lie ON -1 and 1 while sampling takes these as the picture's edges
    (the official code's quirk): the target is measured from that very grid.
    """
    total, count = 0.0, 0
    for raw in flows:
        size = raw.shape[-1]
        if size < 16 and len(flows) > 2:
            continue
        if size <= FLOW_SIZE:
            wanted, mask = F.adaptive_avg_pool2d(where, size), F.adaptive_avg_pool2d(valid[:, None], size)
        else:
            wanted = F.interpolate(where, size=size, mode="bilinear", align_corners=False)
            mask = F.interpolate(valid[:, None], size=size, mode="bilinear", align_corners=False)
        line = torch.linspace(-1, 1, size, device=raw.device)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"))
        # Quadratic where small: an absolute error asks for the median, and most of a face hardly moves.
        flow = torch.tanh(raw[:, :2].float())
        error = F.smooth_l1_loss(flow, (wanted - grid).expand_as(flow), reduction="none", beta=0.03)
        total = total + (error * mask).sum() / (mask.sum() * 2 + 1) * 10
        count += 1
    return total / count


class Trainer:
    """One training run: networks, optimisers, moving average and the two kinds of step."""

    def __init__(self, model: DPE, config: TrainConfig, perceptual: nn.Module | None, device: str = "cpu"):
        self.config, self.device = config, torch.device(device)
        self.model = model.to(self.device)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.perceptual = perceptual.to(self.device) if perceptual else None
        self.landmarks = nn.Linear(model.config.latent_dim, LANDMARKS).to(self.device)
        self.parameters = [p for p in (*model.parameters(), *self.landmarks.parameters()) if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.lr, betas=(0.5, 0.99))
        self.discriminator = None
        if config.gan_weight:
            self.discriminator = Discriminator(model.config.size, model.config.channels).to(self.device)
            self.discriminator_optimiser = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.lr * 16 / 17, betas=(0.0, 0.99059)
            )
        self.step_number = 0

    def step(self, batch: dict[str, Tensor], progress: float) -> dict[str, float]:
        """One update. `progress` in [0, 1] is the share of the run's time that is gone."""
        config = self.config
        warm = min(1.0, (self.step_number + 1) / 30)
        fall = 1.0 if progress < 0.6 else 0.05 + 0.95 * (1 - (progress - 0.6) / 0.4)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * warm * fall
        with torch.autocast(self.device.type, torch.bfloat16):
            fakes = reals = None
            if progress * config.minutes < config.code_minutes:
                losses = self.codes(batch)
            elif config.cycle:
                losses, fakes, reals = self.cycle(batch)
            else:
                losses = self.guided(batch)
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        average_gradients(self.parameters)
        losses.terms["grad"] = float(nn.utils.clip_grad_norm_(self.parameters, 5.0))
        if np.isfinite(losses.terms["grad"]):
            self.optimiser.step()
        separate(self.model)
        if fakes is not None and self.discriminator is not None:
            losses.terms["d"] = self.update_discriminator(fakes.detach(), reals)
        self.step_number += 1
        decay = min(self.config.ema, (1 + self.step_number) / (10 + self.step_number))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.dtype.is_floating_point:
                    self.average[name].lerp_(value, 1 - decay)
        return losses.terms

    def codes(self, batch: dict[str, Tensor]) -> Losses:
        """Motion codes of source and driving alone: the encoder without the generators."""
        losses = Losses()
        image = torch.cat([to_image(batch["source"]), to_image(batch["driving"])])
        known = torch.cat([batch["source_code"], batch["driving_code"]])
        points = torch.cat([batch["source_points"], batch["driving_points"]])
        self.add_codes(losses, self.model.encode(image).latent, known, points, paired=True)
        return losses

    def add_codes(self, losses: Losses, latent: Tensor, known: Tensor, points: Tensor, paired: bool = False) -> None:
        """Terms of the motion codes, and of the landmarks, that a latent holds.

        paired: the two halves of the batch are two frames of each clip; what changes between them is what a viewer
        sees move, while the rest is mostly the shape of the person's face.
        """
        config = self.config
        codes = self.model.motion_code(latent).float()
        losses.add("code", F.smooth_l1_loss(codes, known), config.code_weight)
        if paired and config.motion_weight:
            change = [one - two for one, two in (codes.chunk(2), known.chunk(2))]
            losses.add("motion", F.smooth_l1_loss(*change), config.code_weight * config.motion_weight)
        if config.landmark_weight:
            with in_float32(latent):
                error = (self.landmarks(latent.float()) - points).abs().mean()
            losses.add("landmarks", error, config.landmark_weight)

    def guided(self, batch: dict[str, Tensor]) -> Losses:
        """Landmark-supervised step: S -> T by the expression generator, T -> D by the pose generator."""
        if self.config.expression_only:
            with torch.no_grad():
                encoded = self.model.encode(to_image(batch["source"]))
            losses = Losses()
            self.add_expression(losses, encoded, batch)
            return losses
        model, config, losses = self.model, self.config, Losses()
        source, target, driving = (to_image(batch[k]) for k in ("source", "target", "driving"))
        source_code, driving_code = batch["source_code"], batch["driving_code"]
        count = max(1, round(len(source) * config.pose_share))
        target_code = torch.cat([source_code[:, :POSE_DIM], driving_code[:, POSE_DIM:]], 1)

        encoded = model.encode(torch.cat([source, target[:count]]).contiguous(memory_format=torch.channels_last))
        size = len(source)
        self.add_codes(losses, encoded.latent[:size], source_code, batch["source_points"])
        codes = model.motion_code(encoded.latent[size:]).float()
        losses.add("code_target", F.smooth_l1_loss(codes, target_code[:count]), config.code_weight * count / size)
        self.add_expression(losses, Encoded(encoded.latent[:size], [f[:size] for f in encoded.features]), batch)
        posed = model.pose_generator(
            encoded.latent[size:] + model.pose_shift(driving_code[:count]), [f[size:] for f in encoded.features]
        )
        share = config.pose_share * 2
        losses.add("pose", weighted_l1(posed.image, driving[:count], batch["pose_weight"][:count]), share)
        flows = flow_loss(posed.flows, batch["pose_flow"][:count], batch["pose_valid"][:count])
        losses.add("pose_flow", flows, config.flow_weight * share)
        return losses

    def add_expression(self, losses: Losses, source: Encoded, batch: dict[str, Tensor]) -> None:
        """Terms of S -> T: the expression generator on the measured code of the driving frame."""
        model, config, target = self.model, self.config, to_image(batch["target"])
        result = model.render_expression(source.latent + model.expression_shift(batch["driving_code"]), source.features)
        losses.add("exp", weighted_l1(result.image, target, batch["weight"]), config.image_weight)
        losses.add("exp_flow", flow_loss(result.flows, batch["exp_flow"], batch["exp_valid"]), config.flow_weight)
        if self.perceptual is not None and config.perceptual_weight:
            losses.add("vgg", self._perceptual(result.image, target, batch["weight"]), config.perceptual_weight)

    def cycle(self, batch: dict[str, Tensor]) -> tuple[Losses, Tensor, Tensor]:
        """The paper's stage 1 step: the losses, and the final images and the real ones for the discriminator."""
        model, config, losses = self.model, self.config, Losses()
        source, target, driving = (to_image(batch[k]) for k in ("source", "target", "driving"))
        size = len(source)
        first = model.encode(torch.cat([source, driving]))
        codes = model.motion_code(first.latent)
        known = torch.cat([batch["source_code"], batch["driving_code"]])
        points = torch.cat([batch["source_points"], batch["driving_points"]])
        self.add_codes(losses, first.latent, known, points, paired=True)
        of_source, of_driving = [f[:size] for f in first.features], [f[size:] for f in first.features]
        source_latent, driving_latent = first.latent.split(size)
        source_code, driving_code = codes.split(size)

        expressed = model.expression_generator(source_latent + model.expression_shift(driving_code), of_source)  # S'
        turned = model.pose_generator(driving_latent + model.pose_shift(source_code), of_driving)  # D'
        middle = model.encode(torch.cat([expressed.image, turned.image]))
        latents = middle.latent.split(size)
        end_source = model.pose_generator(
            latents[0] + model.pose_shift(driving_code), [f[:size] for f in middle.features]
        )  # S'' = D
        end_driving = model.expression_generator(
            latents[1] + model.expression_shift(source_code), [f[size:] for f in middle.features]
        )  # D'' = S
        self_expression = model.expression_generator(source_latent + model.expression_shift(source_code), of_source)
        self_pose = model.pose_generator(source_latent + model.pose_shift(source_code), of_source)

        weight, pose_weight = batch["weight"], batch["pose_weight"]
        losses.add("end", weighted_l1(end_source.image, driving, pose_weight))
        losses.add("end", weighted_l1(end_driving.image, source, weight))
        # Asymmetric back-propagation: D' is a constant here.
        losses.add("middle", weighted_l1(expressed.image, turned.image.detach().float(), weight))
        losses.add("self", weighted_l1(self_expression.image, source, weight), 0.5)
        losses.add("self", weighted_l1(self_pose.image, source, weight), 0.5)
        if config.guide:
            losses.add("exp", weighted_l1(expressed.image, target, weight), config.guide)
            guide = config.guide * config.flow_weight
            losses.add("exp_flow", flow_loss(expressed.flows, batch["exp_flow"], batch["exp_valid"]), guide)
            losses.add("pose_flow", flow_loss(end_source.flows, batch["pose_flow"], batch["pose_valid"]), guide)
        if self.perceptual is not None and config.perceptual_weight:
            pairs = (
                (end_source.image, driving, pose_weight),
                (end_driving.image, source, weight),
                (expressed.image, turned.image.detach(), weight),
                (self_expression.image, source, weight),
            )
            for image, wanted, where in pairs:
                losses.add("vgg", self._perceptual(image, wanted.float(), where), config.perceptual_weight)
        fakes, reals = torch.cat([end_source.image, end_driving.image]), torch.cat([driving, source])
        if self.discriminator is not None:
            losses.add("gan", F.softplus(-self.discriminator(fakes).float()).mean(), config.gan_weight)
        return losses, fakes, reals

    def _perceptual(self, image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Perceptual distance on a window that is centred on what matters most (mouth and eyes)."""
        window = min(self.config.perceptual_size, image.shape[-1])
        line = torch.arange(image.shape[-1], device=image.device, dtype=torch.float32)
        heavy = (weight - 2.5).clamp_min(0) + 1e-6
        parts = []
        for i in range(len(image)):
            x = float((heavy[i].sum(0) * line).sum() / heavy[i].sum())
            y = float((heavy[i].sum(1) * line).sum() / heavy[i].sum())
            left = int(min(max(x - window / 2, 0), image.shape[-1] - window))
            top = int(min(max(y - window / 2, 0), image.shape[-1] - window))
            parts.append((slice(i, i + 1), slice(None), slice(top, top + window), slice(left, left + window)))
        cut = [torch.cat([x[p] for p in parts]).contiguous(memory_format=torch.channels_last) for x in (image, target)]
        return self.perceptual(*cut)

    def update_discriminator(self, fakes: Tensor, reals: Tensor) -> float:
        """Non-saturating loss of the discriminator on the final images."""
        with torch.autocast(self.device.type, torch.bfloat16):
            fake, real = self.discriminator(fakes).float(), self.discriminator(reals).float()
            loss = (F.softplus(fake) + F.softplus(-real)).mean()
        self.discriminator_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.discriminator.parameters())
        self.discriminator_optimiser.step()
        return float(loss.detach())

    def averaged(self) -> DPE:
        """A copy of the networks with the moving average of the weights."""
        model = DPE(self.model.config)
        model.load_state_dict(self.average)
        separate(model)
        return model.eval()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients of all processes, in place; nothing to do where there is one."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def join_processes() -> int:
    """Joins the other processes that torchrun (or RANK and WORLD_SIZE) speaks of; this one's number."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank() if dist.is_initialized() else 0


def shared_clock(minutes: float) -> float:
    """The first process's clock, so that all stop at the same step."""
    if not dist.is_initialized():
        return minutes
    clock = torch.tensor([minutes], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return float(clock)


@torch.inference_mode()
def evaluate(model: DPE, clips: list[Clip], mesh: Mesh, count: int = 64) -> tuple[dict[str, float], np.ndarray]:
    """Numbers and a picture grid on people that training never saw.

    Returns: L1 of the expression and the pose result against their targets, the same for copying the source, and per
    motion coordinate the correlation of the predicted with the measured code; the grid's columns are source, driving,
    expression, its target, pose, both.
    """
    sampler = Sampler(clips, mesh, seed=7, augment=False)
    samples = [sampler.sample() for _ in range(count)]
    rows, errors, codes = [], [], []
    for i, sample in enumerate(samples):
        batch = {k: torch.from_numpy(v)[None] for k, v in sample.items()}
        source, target, driving = (to_image(batch[k]) for k in ("source", "target", "driving"))
        of_source, of_driving = model.encode(source), model.encode(driving)
        code = model.motion_code(of_driving.latent)
        expressed = model.transfer_expression(of_source, code)
        both = model.transfer_both(of_source, code, code)
        pairs = ((expressed, target), (source, target), (both, driving), (source, driving))
        errors.append([float(weighted_l1(a, b, batch["weight"])) for a, b in pairs])
        codes.append(np.stack([code[0].numpy(), sample["driving_code"]]))
        if i < 12:
            strip = [source, driving, expressed, target, model.transfer_pose(of_source, code), both]
            rows.append(torch.cat([x[0] for x in strip], 2))
    codes = np.stack(codes)
    correlation = [float(np.corrcoef(codes[:, 0, k], codes[:, 1, k])[0, 1]) for k in range(codes.shape[2])]
    names = ("exp", "exp_copy", "both", "both_copy")
    numbers = {name: float(v) for name, v in zip(names, np.mean(errors, 0), strict=True)}
    numbers["code_correlation"] = [round(c, 3) for c in correlation]
    grid = torch.cat(rows, 1).clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    return numbers, grid


def train(
    data: Path, output: Path, model: DPE, config: TrainConfig, space: MotionSpace | None = None,
    perceptual: Path | None = None, small: DPE | None = None, device: str = "cpu",
    talk: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Runs for `config.minutes`, saving weights, numbers and a picture grid into `output` every few minutes.

    Returns the path of the weights (moving average, fp16). Raises InputError when there is nothing to train on.
    """
    import cv2

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rank = join_processes()
    alone = rank == 0  # the one that writes and talks
    output.mkdir(parents=True, exist_ok=True)
    clips, space = load_clips(data, space, held_out=False, size=model.config.size)
    held_out, _ = load_clips(data, space, held_out=True, size=model.config.size)
    if alone:
        (output / "motion-space.json").write_text(space.to_json())
    network = None
    if config.perceptual_weight:
        if perceptual is None:
            raise InputError("no perceptual network", "name VGG16 or VGG19 features with --perceptual FILE")
        from safetensors.torch import load_file

        network = PerceptualLoss(load_file(str(perceptual)), config.perceptual_blocks)
    mesh = Mesh(space.template)
    trainer = Trainer(model, config, network, device)
    loader = iter(
        DataLoader(
            _Stream(clips, mesh, config.seed + 1 + rank, config.code_minutes >= config.minutes),
            config.batch,
            num_workers=config.workers,
        )
    )
    if small is not None:
        talk(f"warm-up of the new level: mean square error {warm_up(model, small, loader):.4f}")
    talk(f"{len(clips)} clips of {len({c.identity for c in clips})} people; {len(held_out)} clips held out")
    weights, started, saved, terms = output / "weights.safetensors", time.monotonic(), 0.0, []
    while (gone := shared_clock((time.monotonic() - started) / 60)) < config.minutes:
        batch = {k: v.to(trainer.device) for k, v in next(loader).items()}
        terms.append(trainer.step(batch, gone / config.minutes))
        if alone and trainer.step_number % 20 == 0:
            mean = {k: round(float(np.mean([t[k] for t in terms if k in t])), 4) for k in terms[-1]}
            line = {"step": trainer.step_number, "minutes": round(gone, 2), **mean}
            terms.clear()
            talk(json.dumps(line))
            with (output / "curve.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if alone and gone - saved > config.save_every:
            saved = gone
            report(trainer, held_out, mesh, config, weights, gone, talk)
    if alone:
        report(trainer, held_out, mesh, config, weights, gone, talk)
    cv2.setNumThreads(-1)
    return weights


def report(
    trainer: Trainer,
    held_out: list[Clip],
    mesh: Mesh,
    config: TrainConfig,
    weights: Path,
    minutes: float,
    talk: Callable,
) -> None:
    """Saves the averaged weights, measures them on held-out people and draws the grid."""
    import cv2

    model = trainer.averaged()
    numbers, grid = evaluate(model, held_out, mesh)
    numbers = {"step": trainer.step_number, "minutes": round(minutes, 2), **numbers}
    about = {"trained": asdict(config), "held_out": numbers}
    save(weights, model.state_dict(), model.config, about, half=True)
    cv2.imwrite(str(weights.with_name("grid.png")), grid[..., ::-1])
    with weights.with_name("held_out.jsonl").open("a") as file:
        file.write(json.dumps(numbers) + "\n")
    talk(json.dumps(numbers))
