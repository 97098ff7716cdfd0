"""One step of training: the losses, the optimisers, the moving average.

Two kinds of step share the networks, the data and the optimiser:

* guided: landmarks say what each network must do (motion codes, flows, and the intermediate image that the paper has no
  target for). Cheap enough for a CPU; it gives the codes and the flows their meaning.
* cycle: the paper's first stage (section 3.3): S -> S' -> S'' and D -> D' -> D'' through both generators,
  reconstruction of the three pairs, perceptual loss, expression loss, self-reconstruction, non-saturating GAN on S''
  and D'', and asymmetric back-propagation: the middle pair (S', D') does not update the pose generator.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpe_cli.errors import DPEError
from dpe_cli.initialise import colours_kept, separate, to_image
from dpe_cli.matte import standing
from dpe_cli.mesh import FLOW_SIZE
from dpe_cli.models import DPE, Discriminator, Encoded, Rendered
from dpe_cli.models.decoder import places, sampling_grid
from dpe_cli.models.layers import in_float32
from dpe_cli.motion_space import POSE_DIM
from dpe_cli.recipe import Phase

COARSE = 64  # side of the finest flow that stage `flows` learns
LANDMARKS = 2 * 478  # x and y of MediaPipe's face mesh
SHOWING = 0.95  # of a finest mask where the source shows what is wanted: `see_through` begins there
PATIENCE = 30  # steps without a finite gradient before the run gives up


@dataclass
class Losses:
    """Named scalar terms of one step and their weighted sum."""

    total: Tensor | float = 0.0
    terms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        self.total = self.total + weight * value
        self.terms[name] = self.terms.get(name, 0.0) + value.detach()


def weighted_l1(image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference, pixels weighted, at three scales: coarse agreement first, detail last."""
    difference = image.float() - target
    loss = (difference.abs() * weight[:, None]).mean()
    for _ in range(2):
        difference, weight = F.avg_pool2d(difference, 2), F.avg_pool2d(weight[:, None], 2)[:, 0]
        loss = loss + (difference.abs() * weight[:, None]).mean()
    return loss / 3


@cache
def grid_on(device: torch.device, size: int) -> Tensor:
    """`sampling_grid` on a device, copied there once."""
    return sampling_grid(size).to(device)


def flow_loss(flows: list[Tensor], where: Tensor, valid: Tensor, beta: float = 0.03) -> Tensor:
    """Distance (smooth L1) between the tanh of each level's raw flow and the landmark flow.

    Errors up to `beta` count by their square, larger ones by their size: a small value makes rare wide movements, such
    as an open mouth, weigh little.
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
        grid = grid_on(raw.device, size)[0].permute(2, 0, 1)
        # Quadratic where small: an absolute error asks for the median, and most of a face hardly moves.
        flow = torch.tanh(raw[:, :2].float())
        error = F.smooth_l1_loss(flow, (wanted - grid).expand_as(flow), reduction="none", beta=beta)
        total = total + (error * mask).sum() / (mask.sum() * 2 + 1) * 10
        count += 1
    return total / count


def beyond(flows: list[Tensor]) -> Tensor:
    """By how much flows leave the picture that they sample, mean over levels and pixels, in half pictures.

    flows: raw (B, 3, r, r), as in `flow_loss`. Outside there is nothing, and a grey patch is seen.
    """
    total = 0.0
    for raw in flows:
        where = places(raw.float(), grid_on(raw.device, raw.shape[-1]), math.inf)
        total = total + (where.abs() - 1).clamp_min(0).mean()
    return total / len(flows)


class Trainer:
    """One phase of training: networks, optimisers, moving average and the kinds of step.

    perceptual: two pictures to a scalar. expression: pictures (B, 3, S, S) in [-1, 1] to expression features (B, K),
    for the paper's L_E; None leaves the term out. matte: pictures to logits of persons (B, 1, S/2, S/2), for what
    stands still behind heads; None: all of a pose picture counts.
    """

    def __init__(
        self, model: DPE, phase: Phase, perceptual: nn.Module | None = None, expression: nn.Module | None = None,
        device: str = "cpu", matte: nn.Module | None = None,
    ):  # fmt: skip
        self.phase, self.device = phase, torch.device(device)
        self.model = model.to(self.device)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.perceptual = perceptual.to(self.device) if perceptual else None
        self.expression = expression.to(self.device) if expression else None
        self.matte = matte.to(self.device) if matte else None
        self.landmarks = nn.Linear(model.config.latent_dim, LANDMARKS).to(self.device)
        frozen = (model.encoder, model.pose_generator) if phase.stage == "refine" else ()
        model.requires_grad_(True)
        for part in (model.motion_basis, *frozen):
            part.requires_grad_(False)
        self.parameters = [p for p in (*model.parameters(), *self.landmarks.parameters()) if p.requires_grad]
        betas = (phase.beta1, phase.beta2)
        self.optimiser = torch.optim.Adam(self.parameters, lr=phase.lr, betas=betas, fused=self.device.type == "cuda")
        self.discriminator = None
        if phase.gan_weight:
            self.discriminator = Discriminator(model.config.size, model.config.channels).to(self.device)
            self.discriminator_optimiser = torch.optim.Adam(
                self.discriminator.parameters(), lr=phase.lr * 16 / 17, betas=(0.0, 0.99059)
            )
        if phase.compile:
            for part in (model.encoder, model.expression_generator, model.pose_generator):
                part.compile()
        self.step_number = self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the data."""
        parts = {name: getattr(self, name).state_dict() for name in self._parts()}
        return {**parts, "average": self.average, "step_number": self.step_number, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, on this device or another."""
        (group,) = self.optimiser.param_groups
        for saved in state["optimiser"]["param_groups"]:
            saved["fused"] = group["fused"]  # as is fast here: it also says where counts of steps lie
        for name in self._parts():
            getattr(self, name).load_state_dict(state[name])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.step_number, self.skipped = state["step_number"], state["skipped"]

    def _parts(self) -> list[str]:
        adversary = ["discriminator", "discriminator_optimiser"] if self.discriminator is not None else []
        return ["model", "landmarks", "optimiser", *adversary]

    def step(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """One update; gives the terms of the loss. `progress` in [0, 1] is the share of the phase that is gone.

        Raises:
            DPEError: no finite gradient for many steps.
        """
        phase = self.phase
        warm = min(1.0, (self.step_number + 1) / 30)
        past = max(0.0, (progress - phase.lr_hold) / max(1 - phase.lr_hold, 1e-6))
        for group in self.optimiser.param_groups:
            group["lr"] = phase.lr * warm * (1 + past * (phase.lr_end - 1))
        with torch.autocast(self.device.type, torch.bfloat16):
            fakes = reals = None
            if phase.stage == "codes":
                losses = self.codes(batch)
            elif phase.stage == "guided":
                losses = self.guided(batch)
            elif phase.stage == "expression":
                losses = self.alone(batch, "source", self.add_expression)
            elif phase.stage == "posing":
                losses = self.alone(batch, "target", self.add_pose)
            elif phase.stage == "flows":
                losses = self.flows(batch)
            else:
                losses, fakes, reals = self.cycle(batch)
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, phase.clip)
        if finite := bool(torch.isfinite(norm)):
            losses.terms["grad"] = norm
            with colours_kept(self.model, phase.stage == "codes"):
                self.optimiser.step()
            separate(self.model)
            if fakes is not None and self.discriminator is not None:  # of other pictures it would learn nothing but NaN
                losses.terms["d"], finite = self.update_discriminator(fakes.detach(), reals)
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= PATIENCE:
            raise DPEError(f"{PATIENCE} steps without a finite gradient", "start from the last state with less lr")
        self.step_number += 1
        follow(self.average, self.model, phase.ema, self.step_number)
        return losses.terms

    def express(self, source: Encoded, code: Tensor) -> Rendered:
        """The expression generator's answer to a motion code, flows included."""
        return self.model.render_expression(source.latent + self.model.expression_shift(code), source.features)

    def turn(self, source: Encoded, code: Tensor) -> Rendered:
        """The pose generator's answer to a motion code, flows included."""
        return self.model.render_pose(source.latent + self.model.pose_shift(code), source.features)

    def given(self, latent: Tensor, known: Tensor, driving: Tensor) -> Tensor:
        """The code that an edit is given: with measured codes, own + (driving - source), own as the encoder reads it.

        Else the generators would learn to distrust the difference that they see: it has the encoder's error in it.
        latent (B, L) of the source, known (B, K) its measured code, driving (B, K) measured.
        """
        if not self.phase.measured:
            return driving
        return driving + self.model.motion_code(latent).detach().float() - known

    def express_driving(self, source: Encoded, batch: dict[str, Tensor]) -> Rendered:
        """S -> T: the sources with the driving frames' expressions."""
        return self.express(source, self.given(source.latent, batch["source_code"], batch["driving_code"]))

    def turn_to_driving(self, target: Encoded, batch: dict[str, Tensor]) -> Rendered:
        """T -> D: the first targets of a batch, as many as were encoded, in the driving frames' poses."""
        count = len(target.latent)
        return self.turn(target, self.given(target.latent, target_code(batch)[:count], batch["driving_code"][:count]))

    def codes(self, batch: dict[str, Tensor]) -> Losses:
        """Motion codes of source and driving alone: the encoder without the generators."""
        losses = Losses()
        image = torch.cat([to_image(batch["source"]), to_image(batch["driving"])])
        self.add_codes(losses, self.model.encode(image).latent, batch, paired=True)
        return losses

    def add_codes(self, losses: Losses, latent: Tensor, batch: dict[str, Tensor], paired: bool = False) -> None:
        """Terms of the motion codes, and of the landmarks, that the sources' latents hold.

        paired: the driving frames' latents follow; what changes between the two frames of a clip is what a viewer sees
        move, while the rest is mostly the shape of the person's face.
        """
        phase, which = self.phase, ("source", "driving") if paired else ("source",)
        known = torch.cat([batch[f"{one}_code"] for one in which])
        codes = self.model.motion_code(latent).float()
        losses.add("code", F.smooth_l1_loss(codes, known), phase.code_weight)
        if paired and phase.motion_weight:
            change = [one - two for one, two in (codes.chunk(2), known.chunk(2))]
            losses.add("motion", F.smooth_l1_loss(*change), phase.code_weight * phase.motion_weight)
        if phase.landmark_weight:
            points = torch.cat([batch[f"{one}_points"] for one in which])
            with in_float32(latent):
                error = (self.landmarks(latent.float()) - points).abs().mean()
            losses.add("landmarks", error, phase.landmark_weight)

    def guided(self, batch: dict[str, Tensor]) -> Losses:
        """Landmark-supervised step: S -> T by the expression generator, T -> D by the pose generator."""
        model, phase, losses = self.model, self.phase, Losses()
        source, target = (to_image(batch[k]) for k in ("source", "target"))
        size = len(source)
        count = max(1, round(size * phase.pose_share))

        both = torch.cat([source, target[:count]]).contiguous(memory_format=torch.channels_last)
        of_source, of_target = split(model.encode(both), size)
        self.add_codes(losses, of_source.latent, batch)
        codes = model.motion_code(of_target.latent).float()
        losses.add("code_target", F.smooth_l1_loss(codes, target_code(batch)[:count]), phase.code_weight * count / size)

        self.add_expression(losses, of_source, batch)
        self.add_pose(losses, of_target, batch, phase.pose_share * 2)
        return losses

    def alone(self, batch: dict[str, Tensor], name: str, add_terms: Callable[[Losses, Encoded, dict], None]) -> Losses:
        """One half of a guided step, from the pictures of that name; the encoder rests."""
        with torch.no_grad():
            encoded = self.model.encode(to_image(batch[name]))
        losses = Losses()
        add_terms(losses, encoded, batch)
        return losses

    def flow_error(self, which: str, flows: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Flow loss of the first pictures of a batch, as many as there are flows; `which` is exp or pose."""
        count = len(flows[0])
        return flow_loss(flows, batch[f"{which}_flow"][:count], batch[f"{which}_valid"][:count], self.phase.flow_beta)

    def flows(self, batch: dict[str, Tensor]) -> Losses:
        """Flows of both generators alone, no finer than COARSE; the encoder rests, no picture is made."""
        phase, losses = self.phase, Losses()
        size = len(batch["source"])
        count = max(1, round(size * phase.pose_share))
        with torch.no_grad():
            both = torch.cat([to_image(batch["source"]), to_image(batch["target"][:count])])
            encoded = self.model.encode(both.contiguous(memory_format=torch.channels_last))
            coarse = [feature for feature in encoded.features if feature.shape[-1] <= COARSE]
            of_source, of_target = split(Encoded(encoded.latent, coarse), size)
        expressed = self.express_driving(of_source, batch)
        losses.add("exp_flow", self.flow_error("exp", expressed.flows, batch), phase.flow_weight)
        posed = self.turn_to_driving(of_target, batch)
        flows = self.flow_error("pose", posed.flows, batch)
        losses.add("pose_flow", flows, phase.flow_weight * phase.pose_share * 2)
        return losses

    def add_expression(self, losses: Losses, source: Encoded, batch: dict[str, Tensor]) -> None:
        """Terms of S -> T: the expression generator on the measured code of the driving frame."""
        phase, target = self.phase, to_image(batch["target"])
        result, weight = self.express_driving(source, batch), batch["weight"]
        if phase.unseen_weight:
            seen = F.interpolate(batch["seen"][:, None], size=weight.shape[-1], mode="bilinear", align_corners=False)
            mask, unseen = result.flows[-1][:, 2:].float(), 1 - seen
            error = F.binary_cross_entropy_with_logits(mask, SHOWING * seen, reduction="none")
            losses.add("mask", (error * (1 + phase.unseen_gain * unseen)).mean(), phase.unseen_weight)
            if phase.teeth_weight:
                teeth, hidden = result.flows[-2][:, 2:].float(), 1 - batch["seen"][:, None]
                wanted = (SHOWING - hidden * batch["bright"][:, None]).clamp_min(0)
                wanted, hidden = (F.interpolate(x, size=teeth.shape[-1], mode="area") for x in (wanted, hidden))
                error = F.binary_cross_entropy_with_logits(teeth, wanted, reduction="none")
                losses.add("teeth", (error * (1 + phase.unseen_gain * hidden)).mean(), phase.teeth_weight)
            weight = weight + phase.unseen_weight * phase.unseen_gain * unseen[:, 0]
        losses.add("exp", weighted_l1(result.image, target, weight), phase.image_weight)
        losses.add("exp_flow", self.flow_error("exp", result.flows, batch), phase.flow_weight)
        self.add_perceptual(losses, result.image, target, self.looked_at(batch["weight"]))

    def add_pose(self, losses: Losses, target: Encoded, batch: dict[str, Tensor], share: float = 1.0) -> None:
        """Terms of T -> D: the pose generator on the measured code of the driving frame, for the first targets."""
        count = len(target.latent)
        posed, driving = self.turn_to_driving(target, batch), to_image(batch["driving"][:count])
        image = posed.image if self.matte is None else self.before_still(posed, to_image(batch["target"][:count]))
        losses.add("pose", weighted_l1(image, driving, batch["pose_weight"][:count]), share)
        losses.add("pose_flow", self.flow_error("pose", posed.flows, batch), self.phase.flow_weight * share)
        if self.phase.inside_weight:
            losses.add("inside", beyond(posed.flows), self.phase.inside_weight * share)
        if self.phase.stage == "posing":
            self.add_perceptual(losses, image, driving, self.looked_at(batch["pose_weight"]))

    def before_still(self, posed: Rendered, picture: Tensor) -> Tensor:
        """Pose pictures as an edit shows them: what stands still behind a head is as it was, and not learnt."""
        with torch.no_grad():
            matte = self.matte(picture)[:, 0].float().sigmoid()
            where = places(posed.flows[-1].float(), grid_on(picture.device, picture.shape[-1]), 1.0)
            still = F.interpolate(standing(matte, where)[:, None], scale_factor=2, mode="bilinear", align_corners=False)
        return posed.image + still * (picture - posed.image)

    def cycle(self, batch: dict[str, Tensor]) -> tuple[Losses, Tensor, Tensor]:
        """The paper's stage 1 step: the losses, and the final images and the real ones for the discriminator."""
        model, phase, losses = self.model, self.phase, Losses()
        source, target, driving = (to_image(batch[k]) for k in ("source", "target", "driving"))
        size = len(source)
        of_source, of_driving = split(model.encode(torch.cat([source, driving])), size)
        latents = torch.cat([of_source.latent, of_driving.latent])
        self.add_codes(losses, latents, batch, paired=True)
        source_code, driving_code = model.motion_code(latents).split(size)

        expressed, turned = self.express(of_source, driving_code), self.turn(of_driving, source_code)  # S', D'
        of_expressed, of_turned = split(model.encode(torch.cat([expressed.image, turned.image])), size)
        end_source = self.turn(of_expressed, driving_code)  # S'' = D
        end_driving = self.express(of_turned, source_code)  # D'' = S
        self_expression, self_pose = self.express(of_source, source_code), self.turn(of_source, source_code)

        weight, pose_weight = batch["weight"], batch["pose_weight"]
        of_face, of_driven = self.looked_at(weight), self.looked_at(pose_weight)
        losses.add("end", weighted_l1(end_source.image, driving, pose_weight))
        losses.add("end", weighted_l1(end_driving.image, source, weight))
        self.add_perceptual(losses, end_source.image, driving, of_driven)
        self.add_perceptual(losses, end_driving.image, source, of_face)
        if phase.middle_weight:  # asymmetric back-propagation: D' is a constant here
            middle = turned.image.detach().float()
            losses.add("middle", weighted_l1(expressed.image, middle, weight), phase.middle_weight)
            self.add_perceptual(losses, expressed.image, middle, of_face, phase.middle_weight)
        if phase.self_weight:
            for result in (self_expression, self_pose):
                losses.add("self", weighted_l1(result.image, source, weight), phase.self_weight)
                self.add_perceptual(losses, result.image, source, of_face, phase.self_weight)
        if self.expression is not None and phase.expression_weight:
            with torch.no_grad():
                wanted = self.expression(driving)
            for result in (expressed, turned):
                error = (self.expression(result.image) - wanted).abs().mean()
                losses.add("expression", error, phase.expression_weight)
        if phase.guide:
            losses.add("exp", weighted_l1(expressed.image, target, weight), phase.guide)
            guide = phase.guide * phase.flow_weight
            losses.add("exp_flow", self.flow_error("exp", expressed.flows, batch), guide)
            losses.add("pose_flow", self.flow_error("pose", end_source.flows, batch), guide)
        fakes, reals = torch.cat([end_source.image, end_driving.image]), torch.cat([driving, source])
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # its own turn comes in `update_discriminator`
            losses.add("gan", F.softplus(-self.discriminator(fakes).float()).mean(), phase.gan_weight)
        return losses, fakes, reals

    def looked_at(self, weight: Tensor) -> list[tuple[slice, ...]]:
        """Where in pictures with these weights (B, R, R) the perceptual network looks: see `perceptual_size`."""
        side = self.phase.perceptual_size
        if self.perceptual is None or not self.phase.perceptual_weight:
            return []
        return windows(weight, side) if 0 < side < weight.shape[-1] else [()]

    def add_perceptual(
        self, losses: Losses, image: Tensor, target: Tensor, parts: list[tuple[slice, ...]], share: float = 1.0
    ) -> None:
        """Perceptual distance of the parts that `looked_at` tells; nothing where there are none."""
        if parts:
            pictures = (torch.cat([x[part] for part in parts]) for x in (image, target))
            pictures = (x.contiguous(memory_format=torch.channels_last) for x in pictures)
            losses.add("vgg", self.perceptual(*pictures), self.phase.perceptual_weight * share)

    def update_discriminator(self, fakes: Tensor, reals: Tensor) -> tuple[Tensor, bool]:
        """Non-saturating loss of the discriminator on final images; whether its gradient was finite and was used."""
        self.discriminator.requires_grad_(True)
        with torch.autocast(self.device.type, torch.bfloat16):
            fake, real = self.discriminator(fakes).float(), self.discriminator(reals).float()
            loss = (F.softplus(fake) + F.softplus(-real)).mean()
        self.discriminator_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.discriminator.parameters())
        norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), math.inf)  # measured, not clipped
        if finite := bool(torch.isfinite(norm)):
            self.discriminator_optimiser.step()
        return loss.detach(), finite

    def averaged(self) -> DPE:
        """A copy of the networks with the moving average of the weights."""
        model = DPE(self.model.config)
        model.load_state_dict(self.average)
        separate(model)
        return model.to(self.device).eval()


def target_code(batch: dict[str, Tensor]) -> Tensor:
    """Motion codes of T: the source's pose, the driving's expression. (B, K)"""
    return torch.cat([batch["source_code"][:, :POSE_DIM], batch["driving_code"][:, POSE_DIM:]], 1)


def split(encoded: Encoded, size: int) -> tuple[Encoded, Encoded]:
    """The first `size` pictures' part and the rest's."""
    return tuple(
        Encoded(encoded.latent[part], [feature[part] for feature in encoded.features])
        for part in (slice(size), slice(size, None))
    )


def windows(weight: Tensor, side: int) -> list[tuple[slice, ...]]:
    """For each picture of a batch the square of `side` pixels about the middle of its heaviest weights (B, R, R).

    Anywhere at all where nothing weighs more than a face does: these pictures are about what surrounds it.
    """
    line = torch.arange(weight.shape[-1], device=weight.device, dtype=torch.float32)
    heavy = (weight - 2.5).clamp_min(0)
    total = heavy.sum((1, 2))
    middles = [(heavy.sum(axis) * line).sum(1) / total for axis in (2, 1)]
    parts = []
    for i, (weighs, *middle) in enumerate(torch.stack([total, *middles], 1).cpu().tolist()):  # the only wait for a GPU
        if not weighs:
            middle = (torch.rand(2) * weight.shape[-1]).tolist()
        top, left = (int(min(max(m - side / 2, 0), weight.shape[-1] - side)) for m in middle)
        parts.append((slice(i, i + 1), slice(None), slice(top, top + side), slice(left, left + side)))
    return parts


@torch.no_grad()
def follow(average: dict[str, Tensor], model: nn.Module, ema: float, step: int) -> None:
    """Takes a moving average of weights along, in place: faster in the first steps than `ema` says, counts copied."""
    decay, state = min(ema, (1 + step) / (10 + step)), model.state_dict()
    learnt = [name for name, value in state.items() if value.dtype.is_floating_point]
    torch._foreach_lerp_([average[name] for name in learnt], [state[name] for name in learnt], 1 - decay)  # all at once
    for name in state.keys() - learnt:
        average[name].copy_(state[name])


def take_steps(trainer: Any, batches: Iterable[Any], curve: Path, talk: Callable[[str], None]) -> None:
    """The steps of a small run that keeps no state: as many, or for as many minutes, as `trainer.config` says.

    trainer: has `config`, `step_number` and `step(batch, progress)`, which gives terms by name. The mean of each over
    50 steps is told, and a line of the file `curve`.
    """
    config, terms, started = trainer.config, [], time.monotonic()
    for batch in batches:
        gone = (time.monotonic() - started) / 60
        progress = trainer.step_number / config.steps if config.steps else gone / config.minutes
        if progress >= 1:
            break
        terms.append(trainer.step(batch, progress))
        if trainer.step_number % 50 == 0:
            means = {key: round(sum(term[key] for term in terms) / len(terms), 5) for key in terms[0]}
            terms.clear()
            line = json.dumps({"step": trainer.step_number, "minutes": round(gone, 2), **means})
            talk(line)
            with curve.open("a") as file:
                file.write(line + "\n")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients of all processes, in place; nothing to do where there is one."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
