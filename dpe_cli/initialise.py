"""Where training begins: initial values, growth by a level, and the separation of the two heads."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.models import DPE, DPEConfig
from dpe_cli.models.layers import GAIN
from dpe_cli.motion_space import POSE_DIM

INSIDE = (-0.6, -0.8, -0.8)  # of an open mouth; darker than the median of prepared clips, which is too red in dim light
TEETH = (0.57, 0.25, 0.2)  # the brightest fifth of open mouths of prepared clips
USUAL = 0.94  # of the second finest mask where nothing opens: no teeth there
SHOWN = 3.0  # logit of a finest mask: show the warped source


def to_image(batch: Tensor) -> Tensor:
    """(B, 3, R, R) uint8 -> float32 in [-1, 1], channels last."""
    return batch.to(memory_format=torch.channels_last).float().div_(127.5).sub_(1)


def separate(model: DPE) -> None:
    """Makes the two heads blind to each other's coordinates: pose to the expression ones, expression to the pose ones.

    The motion path is affine, so blindness is exact: the first layer of each head loses its component along the other's
    rows of the motion basis.
    """
    with torch.no_grad():
        basis = model.motion_basis.basis()  # (L, 20), orthonormal
        for head, banned in ((model.expression_head, basis[:, :POSE_DIM]), (model.pose_head, basis[:, POSE_DIM:])):
            weight = next(p for n, p in head.named_parameters() if n.endswith("weight"))
            weight -= weight @ banned @ banned.T


def initialise(model: DPE, copy: bool = True) -> None:
    """Starts the flows near zero (the standard start throws every pixel somewhere else) and the shifts large enough.

    copy: see `see_through`.
    """
    with torch.no_grad():
        for generator in (model.expression_generator, model.pose_generator):
            for to_flow in generator.to_flows:
                to_flow.conv.weight.mul_(0.01)
        for head in (model.expression_head, model.pose_head):
            [p for n, p in head.named_parameters() if n.endswith("weight")][-1].mul_(3)
    if copy:
        see_through(model)
    model.motion_basis.weight.requires_grad_(False)
    separate(model)


def see_through(model: DPE) -> None:
    """Sets the finest level so that a picture passes through it unchanged where the flow is zero.

    Six of the encoder's first channels hold lrelu(x) and lrelu(-x) of the colours; the last colour layer takes
    lrelu(x) - lrelu(-x) = 1.2 x of their warped values; the levels below start with no colour. Training then begins
    with a sharp copy of the source and has to learn where pixels go, not how to paint them.
    """
    first, colours = model.encoder.convs[0], torch.arange(3)
    shift = 1.3  # keeps the colour layer's leaky relu on its straight side
    with torch.no_grad():
        first.weight[:6] = 0
        first.bias[:6] = 0
        first.weight[colours, colours] = 1 / first.scale
        first.weight[colours + 3, colours] = -1 / first.scale
        for generator in (model.expression_generator, model.pose_generator):
            for to_rgb in generator.to_rgbs:
                for part in to_rgb.parameters():
                    part.zero_()
            top = generator.to_rgbs[-1]
            gain = 1 / (1.2 * top.scale * torch.sigmoid(torch.tensor(SHOWN)))
            top.weight[colours, colours] = gain
            top.weight[colours, colours + 3] = -gain
            top.activation_bias += shift / 2**0.5
            top.bias -= shift
            generator.to_flows[-1].bias[2] = SHOWN


def show_inside(model: DPE) -> None:
    """Gives the finest level of the expression generator a colour, a mouth's inside, to show where its mask is shut.

    Else a shut mask shows mid-grey, and no mask learns to shut where a mouth opens. The rest of the picture stays as
    it is: a channel that hardly answers to colours is made a constant, which carries the colour with the mask.
    """
    first, generator = model.encoder.convs[0], model.expression_generator
    top, mask = generator.to_rgbs[-1], torch.sigmoid(torch.tensor(SHOWN))
    with torch.no_grad():
        answer = first.weight.flatten(1).norm(dim=1)
        answer[:6] = torch.inf  # the colours of `see_through`
        channel = int(answer.argmin())
        first.weight[channel] = 0
        if first.bias[channel].abs() < 0.01:
            first.bias[channel] = 0.01
        constant = F.leaky_relu(first.bias[channel] * first.gain, 0.2)
        colour = torch.tensor(INSIDE)
        top.weight[:, channel, 0, 0] = -colour / (top.scale * mask * constant)
        top.bias += colour


def show_teeth(model: DPE, pictures: Tensor) -> None:
    """Gives open mouths a second colour: where the mask of the second finest level is shut too, teeth and not the dark.

    As with `show_inside` a channel becomes a constant: the one that varies least over some pictures (B, 3, S, S) in
    [-1, 1]. Without `show_inside`, the teeth would be a change of grey.
    """
    first, block = model.encoder.convs[:2]
    layer = model.expression_generator.to_rgbs[-2]
    with torch.no_grad():
        maps = block(first(pictures)).float()
        channel = int(maps.std((0, 2, 3)).argmin())
        constant = max(float(maps[:, channel].mean()), 0.02)  # above 0 the leaky relu and its gain leave it as it is
        block.conv2.weight[channel] = 0
        block.skip.weight[channel] = 0
        block.conv2.bias[channel] = constant
        lighter = torch.tensor(TEETH) - torch.tensor(INSIDE)
        layer.weight[:, channel, 0, 0] = -lighter / (layer.scale * constant)
        layer.activation_bias += USUAL * lighter / GAIN


def dim_teeth(model: DPE, shares: Tensor) -> None:
    """Takes the colour of `show_teeth` down to these shares of it (3,), R, G, B.

    Learnt masks hold a mean over many mouths, without a row of teeth in it: as bright as the mean it looks like grey
    skin. Raises ValueError where `show_teeth` was not done.
    """
    block, layer = model.encoder.convs[1], model.expression_generator.to_rgbs[-2]
    with torch.no_grad():
        constants = (block.conv2.weight.flatten(1).abs().sum(1) + block.skip.weight.flatten(1).abs().sum(1)) == 0
        if constants.sum() != 1:
            raise ValueError("there are no teeth to dim")
        channel = int(constants.int().argmax())
        taken = layer.weight[:, channel, 0, 0] * (1 - shares)
        layer.weight[:, channel, 0, 0] -= taken
        layer.activation_bias += taken * layer.scale * block.conv2.bias[channel] * USUAL / GAIN


@contextlib.contextmanager
def colours_kept(model: DPE, keep: bool = True) -> Iterator[None]:
    """What happens inside leaves the channels that `see_through` set as they are."""
    parts = list(model.encoder.convs[0].parameters()) if keep else []
    colours = [part[:6].detach().clone() for part in parts]
    yield
    with torch.no_grad():
        for part, fixed in zip(parts, colours, strict=True):
            part[:6] = fixed


def reading(model: DPE) -> tuple[Tensor, Tensor]:
    """The affine motion path: a latent's own code is M latent + c. -> M (20, L), c (20,)"""
    own = model.motion_mlp(torch.zeros(1, model.config.latent_dim))
    return (model.motion_mlp(torch.eye(model.config.latent_dim)) - own).T, own[0]


def subtract_own(model: DPE, part: str = "expression") -> None:
    """Sets a head so that its shift lowers the latent's own reading by the driving's. part: expression or pose.

    The motion path is affine: code = M latent + c. With shift(code) = -M^+ code on the part's coordinates, the shifted
    latent reads as the source's motion minus the driving's, which is what a flow has to follow. The styles of the flow
    layers start as that very reading, a coordinate a channel: no difference, no flow. For an encoder that knows its
    codes; the head is trained on from there.
    """
    head = getattr(model, f"{part}_head")
    generator = getattr(model, f"{part}_generator")
    coordinates = torch.arange(model.config.motion_dim)
    coordinates = coordinates[:POSE_DIM] if part == "pose" else coordinates[POSE_DIM:]
    with torch.no_grad():
        dim = model.config.latent_dim
        read, own = reading(model)
        back = torch.zeros(dim, model.config.motion_dim)
        back[:, coordinates] = -torch.linalg.pinv(read)[:, coordinates]
        whole = back @ model.motion_basis.basis().T  # (L, L), acts on the direction that the basis gives
        turns = [torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(2)]
        for layer, matrix in zip(head, (*turns, whole @ turns[0].T @ turns[1].T), strict=True):
            layer.weight.copy_(matrix / layer.scale)
            layer.bias.zero_()
        for to_flow in generator.to_flows:
            style = to_flow.conv.modulation
            number = coordinates[torch.arange(len(style.bias)) % len(coordinates)]
            style.weight.copy_(read[number] / style.scale)
            style.bias.copy_(own[number])
            to_flow.conv.weight.copy_(0.05 * torch.randn_like(to_flow.conv.weight))
            to_flow.bias[:2] = 0
    separate(model)


def amplify(model: DPE, part: str, gains: Tensor) -> None:
    """Makes an edit go further: sets a generator and its head so that a driving code acts as own + gains (code - own).

    Flows learnt by least squares from codes with errors fall short of the movement, by a factor that differs from
    coordinate to coordinate. Everything on the way is affine, so the correction is exact and costs nothing at run time.
    part: expression or pose; gains: (20,), not 0; only the part's own coordinates count.
    """
    head, generator = getattr(model, f"{part}_head"), getattr(model, f"{part}_generator")
    with torch.no_grad():
        dim = model.config.latent_dim
        zero, unit = torch.zeros(1, dim), torch.eye(dim)
        read, own = (part.double() for part in reading(model))  # own code = M latent + own
        basis = model.motion_basis.basis().double()
        back = (head(unit) - head(zero)).T.double() @ basis  # H: shift = H code + h
        change = torch.diag(gains.double() - 1)
        # latent + H G code + h - H (G - I) (M latent + own) is a map K of (latent + another shift).
        lead = torch.eye(dim, dtype=torch.float64) - back @ change @ read
        first, last = head[0], head[-1]
        first.weight.copy_((first.weight.double() + first.weight.double() @ basis @ change @ basis.T).float())
        bias = last.bias.double() - back @ change @ own
        last.weight.copy_(torch.linalg.solve(lead, last.weight.double()).float())
        last.bias.copy_(torch.linalg.solve(lead, bias).float())
        for name, layer in generator.named_modules():
            if name.endswith("modulation"):
                layer.weight.copy_((layer.weight.double() @ lead).float())


def grow(small: DPE) -> DPE:
    """The same network one level larger: 128 -> 256.

    The new level takes over from what was the finest: it shows the source through the flow and the mask of the level
    below it, whose colour layer begins anew from nothing. Coarser colour layers keep what they paint.
    """
    config = small.config
    model = DPE(DPEConfig(**{**config.to_dict(), "size": config.size * 2}))
    initialise(model)
    new = model.state_dict()
    last = len(small.expression_generator.to_rgbs) - 1
    for name, value in small.state_dict().items():
        if name.startswith("encoder.convs.0.") or f".to_rgbs.{last}." in name:
            continue  # the encoder's first layer saw other pixels: see `warm_up`
        if name.startswith("encoder.convs."):
            index, rest = name.removeprefix("encoder.convs.").split(".", 1)
            name = f"encoder.convs.{int(index) + 1}.{rest}"
        new[name] = value.clone()
    for name in ("expression_generator", "pose_generator"):
        new[f"{name}.to_flows.{last + 1}.bias"][2] = 0  # the mask of the level below already says it
    model.load_state_dict(new)
    return model


def warm_up(model: DPE, small: DPE, batches: Iterator[dict[str, Tensor]], steps: int = 130) -> float:
    """Teaches the new bottom of a grown encoder to give the features that the levels above it know; last error."""
    bottom, first = model.encoder.convs[:2], small.encoder.convs[0]
    optimiser = torch.optim.Adam(bottom.parameters(), lr=4e-3)
    for _ in range(steps):
        image = to_image(next(batches)["source"])
        with torch.autocast(image.device.type, torch.bfloat16):
            with torch.no_grad():
                wanted = first(F.avg_pool2d(image, 2))
            loss = F.mse_loss(bottom[1](bottom[0](image)).float(), wanted.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with colours_kept(model):
            optimiser.step()
    return float(loss.detach())
