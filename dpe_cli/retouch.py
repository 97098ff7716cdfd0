"""Mouth and eyes painted over, once the generators have drawn them: see `models/retouch.py`.

The generators bend the source; what it does not show they can only stretch. Here landmarks of the source and the motion
codes of an edit say what outlines a part has and is to have, and small networks paint it between these.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpe_cli.landmarks import FaceShape
from dpe_cli.lending import mouth_of, opens
from dpe_cli.motion_space import POSE_DIM, MotionSpace
from dpe_cli.parts import BOTH_EYES, EYE, MOUTH, PARTS, Part, Patch, Posed, posed, put_back
from dpe_cli.weights import RETOUCH, load_retouch

FAR = 0.3  # change of coordinates (root mean square) from which a part is painted over wholly
# What painted eyes are seen to miss of lids and gaze is asked for on top, in each coordinate less the first and at most
# the second: eyes are read with errors of about 0.2.
QUIET, MOST = 0.15, 1.5
SHUT = 0.03  # of a mouth's opening: below it a mouth is to be shut, wholly from half of that on


def asked_for(change: np.ndarray) -> float:
    """How much a part is painted over, 0 to 1, for the change (K,) of its coordinates; 0 where nothing is to move."""
    far = min(float(np.sqrt(np.mean(change**2))) / FAR, 1.0)
    return far * far * (3 - 2 * far)


def outlined(face: FaceShape, asked: np.ndarray, space: MotionSpace, basis: np.ndarray) -> tuple[Posed, Posed]:
    """A face as its landmarks lie in a crop, and as they are to lie for an expression (14,) that is asked for.

    Its own expression is what these landmarks say, not what may be better known: so the second is right even where they
    are wrong. basis: (14, 478, 3) of `Retouch`.
    """
    before = posed(face.points, space.template)
    own = space.expression(before.shape[None], face.blendshapes[None])[0]
    return before, before.moved(np.einsum("k,kpc->pc", asked - own, basis))


def lacking(own: np.ndarray, asked: np.ndarray) -> float:
    """How much of a mouth's inside is to be painted, 0 to 1. own, asked: (14,) expressions.

    Where it neither opens nor shuts wholly, the mesh carries teeth and tongue, which are the person's.
    """
    own, asked = (np.r_[np.zeros(POSE_DIM), code] for code in (own, asked))
    shuts = np.clip((SHUT - mouth_of(asked)) / SHUT * 2, 0, 1)
    return max(opens(own, asked), float(shuts))


class Retoucher:
    """Retouches drawn crops. space: of the motion codes.

    Raises WeightsError where the weights are missing.
    """

    def __init__(self, space: MotionSpace, weights: str | Path = RETOUCH, device: str = "cpu"):
        loaded = load_retouch(weights)
        self.space, self.device = space, torch.device(device)
        self.nets = loaded.networks()
        self.nets.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.basis = loaded.state["basis"].numpy()
        self.sha256 = loaded.sha256

    def __call__(
        self, crops: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        asked: np.ndarray, parts: Sequence[Part] = PARTS,
    ) -> np.ndarray:  # fmt: skip
        """Drawn crops with mouth and eyes painted over; as they are where there is no face, and parts that are to stay.

        crops, drawn: (N, S, S, 3) uint8, the source's and what the generators made of it; faces: those of the source's
        crops; own, asked: (N, 14), the expression that they have and the one they are to have. -> (N, S, S, 3) uint8
        """
        jobs: list[tuple[int, Patch, float]] = []
        for row, face in enumerate(faces):
            strengths = [asked_for((asked - own)[row, part.codes]) for part in parts]
            if face is None or not any(strengths):
                continue
            before, after = outlined(face, asked[row], self.space, self.basis)
            pictures = (crops[row], drawn[row])
            moved = (pair for pair in zip(parts, strengths, strict=True) if pair[1])
            jobs += [(row, Patch.cut(pictures, before, after, part), strength) for part, strength in moved]
        result = drawn.copy()
        for name in dict.fromkeys(part.name for part in parts):
            ours = [one for one in jobs if one[1].part.name == name]
            changes = self.added(name, [patch for _, patch, _ in ours]) if ours else ()
            for (row, patch, strength), added in zip(ours, changes, strict=True):
                share = strength * patch.share
                if patch.part is MOUTH:
                    share *= 1 - (1 - lacking(own[row], asked[row])) * patch.inside
                result[row] = put_back(result[row], added * share[..., None], patch.matrix)
        return result

    def looked_at(
        self, crops: np.ndarray, drawn: np.ndarray, faces: Sequence[FaceShape | None], own: np.ndarray,
        asked: np.ndarray, look: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """The same, and painted eyes are looked at: what they miss of lids and gaze is asked for on top, once.

        look: tells the expression of pictures (n, S, S, 3) uint8, where it sees no face what they were to have (n, 14).
        """
        spoken = self(crops, drawn, faces, own, asked, [MOUTH])
        painted = self(crops, spoken, faces, own, asked, BOTH_EYES)
        rows = np.flatnonzero((painted != spoken).any((1, 2, 3)))
        if len(rows):
            missed = np.zeros_like(asked)
            missed[rows, EYE.codes] = (asked[rows] - look(painted[rows], asked[rows]))[:, EYE.codes]
            more = asked + np.sign(missed) * np.clip(np.abs(missed) - QUIET, 0, MOST)
            known = [faces[row] for row in rows]
            painted[rows] = self(crops[rows], spoken[rows], known, own[rows], more[rows], BOTH_EYES)
        return painted

    @torch.inference_mode()
    def added(self, name: str, patches: Sequence[Patch]) -> np.ndarray:
        """What a network adds to each drawn patch, in levels. -> (N, height, width, 3) float32"""

        def tensor(arrays: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(self.device).float() / 255

        pictures = zip(*(patch.pictures for patch in patches), strict=True)
        source, drawn = (tensor(one).permute(0, 3, 1, 2) * 2 - 1 for one in pictures)
        added = getattr(self.nets, name)(source, drawn, tensor([patch.outlines for patch in patches]))
        return np.ascontiguousarray((added.float() * 127.5).permute(0, 2, 3, 1).cpu().numpy())
