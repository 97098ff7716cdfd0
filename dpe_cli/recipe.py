"""What a training run is to do: phases, read from a TOML file and changed by NAME=VALUE on the command line.

batch = 32              # a setting outside of a phase is the default of all phases

[[phase]]
name = "codes"
stage = "codes"
size = 64
minutes = 20

[[phase]]
name = "cycle"
stage = "cycle"         # the paper's first stage
size = 128              # twice the size of the phase before: the networks grow by a level
steps = 100000
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dpe_cli.errors import InputError, UsageError
from dpe_cli.motion_space import COORDINATES, MOTION_DIM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = {
    "codes": "encoder and motion codes alone, from landmarks",
    "guided": "everything, from landmarks and the intermediate image they give",
    "flows": "the flows of both generators alone, guided",
    "expression": "the expression head and generator alone, guided",
    "posing": "the pose head and generator alone, guided",
    "cycle": "the paper's stage 1: bidirectional cycle, self-reconstruction, GAN, asymmetric back-propagation",
    "audio": "the networks of ours that hear speech, for the mouth and for its synchrony, a run of its own",
    "pose": "the network of ours that moves heads to speech, a run of its own",
    "landmarks": "the landmark network of ours, a run of its own",
    "reader": "the networks of ours that look closer at eyes and mouth to tell their codes, a run of its own",
    "retouch": "the networks of ours that paint over mouth and eyes once they are drawn, a run of its own",
    "matte": "the network of ours that tells persons from their background, a run of its own",
    "factors": "no network: mouth, eyes, brows and sliders found in the motion codes of --init, a run of its own",
    "banks": "the same by PD-FGC's signals: parts that change hands, sound, what lasts; a run of its own",
    "refine": "the paper's stage 2: the same losses, only the expression generator and the MLPs learn",
}
SIZES = (8, 16, 32, 64, 128, 256, 512)  # of crops, for which the networks have channels
SHARE = (0, 1)
RANGES = {  # the least and the most of a setting, both allowed
    "minutes": (0, math.inf),
    "steps": (0, math.inf),
    "batch": (1, math.inf),
    "lr": (0, math.inf),
    "lr_hold": SHARE,
    "lr_end": SHARE,
    "beta1": (0, 0.999999),
    "beta2": (0, 0.999999),
    "clip": (0, math.inf),
    "ema": SHARE,
    "pose_share": SHARE,
    "eye_share": SHARE,
    "open_share": SHARE,
    "turn_share": SHARE,
    "virtual_share": SHARE,
    "inside_share": SHARE,
    "begun_share": SHARE,
    "perceptual_blocks": (1, 5),
    "perceptual_size": (0, math.inf),
    "warm_up": (0, math.inf),
    "seed": (0, 2**63 - 1),
    "threads": (1, 1024),
    "workers": (0, 1024),
    "save_every": (0, math.inf),
    "save_steps": (0, math.inf),
    "keep": (0, math.inf),
    "samples": (1, math.inf),
}


@dataclass(frozen=True)
class Phase:
    """A part of a run: what learns, from what, for how long. Written beside the weights."""

    name: str = "train"
    stage: str = "guided"  # see STAGES
    size: int = 256  # side of the crops, pixels
    minutes: float = 60.0
    steps: int = 0  # instead of minutes: then the run is the same on every CPU of its kind
    batch: int = 16  # pairs a step, over all processes
    lr: float = 2e-3
    lr_hold: float = 0.6  # share of the phase before the rate begins to fall
    lr_end: float = 0.05  # of the rate, at the end
    beta1: float = 0.5
    beta2: float = 0.99
    clip: float = 5.0  # largest norm of the gradient
    ema: float = 0.998
    # weights of the losses
    image_weight: float = 1.0  # of the guided expression picture
    pose_share: float = 0.34  # share of a guided batch that also trains the pose generator
    flow_weight: float = 2.0
    flow_beta: float = 0.03  # flow errors up to this count by their square, half pictures
    eye_share: float = 0.0  # share of the pairs that are chosen for different lids and gaze
    open_share: float = 0.0  # share of the pairs in which a mouth opens that is shut in the source
    turn_share: float = 0.0  # share of the pairs in which the head turns far
    virtual_share: float = 0.0  # share of the pairs in which the driving is the source, turned by its landmarks' depth
    face_weight: float = 1.0  # in pose pictures, where `mesh_warp.py` shows the source's own; below 1: see Sampler
    still_camera: bool = False  # pairs are framed alike, as an edit draws heads that move: see Sampler
    still_background: bool = False  # of pose pictures only what an edit shows of them counts: see matte.standing
    inside_weight: float = 0.0  # of pose flows that leave the source's crop, where there is nothing to show
    unseen_weight: float = 0.0  # of the expression masks, and of pixels, inside of a mouth that was shut
    unseen_gain: float = 20.0  # how much more the few pixels there count: so much, and masks shut beyond the lips
    teeth_weight: float = 0.0  # of the second finest expression masks, which show teeth: see initialise.show_teeth
    eye_weight: float = 1.0  # of the eyes within the flow loss: they move little, and errors count by their square
    code_weight: float = 15.0  # less, and the pictures' gradients drown it in the shared encoder
    motion_weight: float = 1.0  # of the codes' difference between the two frames of a clip, relative to the codes
    landmark_weight: float = 0.0  # of landmarks read from the latent by a layer that is thrown away: richer latents
    measured: bool = False  # codes go in as with `measured.py`: own + (driving - source); not in stages codes and cycle
    guide: float = 1.0  # of the guided terms inside the cycle
    middle_weight: float = 1.0  # cycle: the intermediate pair S', D'
    self_weight: float = 1.0  # cycle: self-reconstruction
    perceptual_weight: float = 0.0  # the paper's lambda_p, 20 there; in stage retouch of LPIPS
    perceptual_blocks: int = 3
    perceptual_size: int = 96  # side of the window around the face that the perceptual network sees; 0: everything
    expression_weight: float = 0.0  # the paper's lambda_e, 20 there
    gan_weight: float = 0.0
    part: str = ""  # of stage retouch: mouth or eyes, where only that is trained
    inside_share: float = 1.0  # of stage retouch: of the error of a pixel between the lips, of that of one around them
    begun_share: float = 0.0  # of stage retouch: of the weights gone on from, in those that are written
    # at the phase's beginning
    copy_start: bool = False  # pictures pass through unchanged until flows are learnt: see initialise.see_through
    subtract_own: bool = False  # of the expression: see initialise.subtract_own
    subtract_own_pose: bool = False  # the same of the pose
    show_inside: bool = False  # of opening mouths: see initialise.show_inside
    show_teeth: bool = False  # of opening mouths, after show_inside: see initialise.show_teeth
    dim_teeth: str = ""  # 0.5,0.4,0.4: shares of the teeth's R, G, B that are left, see initialise.dim_teeth
    gains: str = ""  # mouth=1.4,lids=2: edits go further in these coordinates, see initialise.amplify
    warm_up: int = 130  # steps for the new bottom of a grown encoder
    # how it runs
    seed: int = 0
    threads: int = 1
    workers: int = 1  # processes that make samples
    compile: bool = False
    save_every: float = 5.0  # minutes between two saves
    save_steps: int = 0  # instead of save_every
    keep: int = 2  # saved states
    samples: int = 64  # of held-out people that are measured at each save

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InputError(f"{self.stage} is no stage of the training", f"use one of {', '.join(STAGES)}")
        self.check_ranges()
        self.gain_values()
        self.teeth_shares()

    def check_ranges(self) -> None:
        """Raises InputError for a number that nothing can be trained with."""
        what = f"phase {self.name}: "
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                remedy = f"give {least} to {most}" if most < math.inf else f"give {least} or more"
                raise InputError(f"{what}{name} = {value} is out of range", remedy)
        if self.size not in SIZES:
            raise InputError(f"{what}size = {self.size} fits no networks", f"use one of {', '.join(map(str, SIZES))}")
        if not (self.minutes or self.steps):
            raise InputError(f"{what}neither minutes nor steps are left to train", "give one of them a number above 0")

    def teeth_shares(self) -> list[float]:
        """`dim_teeth` as numbers, none where it is not set. Raises InputError."""
        try:
            shares = [float(part) for part in self.dim_teeth.split(",") if part]
        except ValueError:
            shares = [0.0]
        if len(shares) not in (0, 3):
            raise InputError(f"dim_teeth = {self.dim_teeth} is not three numbers", "write for instance 0.5,0.4,0.4")
        return shares

    def gain_values(self) -> list[float]:
        """`gains` for each of the 20 coordinates. Raises InputError."""
        values = [1.0] * MOTION_DIM
        for name, _, number in (part.partition("=") for part in self.gains.split(",") if part):
            try:
                place, gain = COORDINATES[name.strip()], float(number)
                if not gain > 0:
                    raise ValueError
            except (KeyError, ValueError) as error:
                what = f"gains = {self.gains} is not NAME=FACTOR,... with factors above 0"
                raise InputError(what, f"the names are {', '.join(COORDINATES)}") from error
            values[place] = [gain] * (place.stop - place.start)
        return values


def read_recipe(file: Path | None, changes: Iterable[str] = (), budget: float | None = None) -> list[Phase]:
    """The phases of a TOML file, or one with the standard settings, changed by NAME=VALUE or PHASE.NAME=VALUE.

    budget: minutes that the phases are to take together, each its share; those that go by steps count for nothing.

    Raises:
        InputError: no such file, not TOML, a name or value that does not fit; UsageError for one of `changes`.
    """
    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{file} does not exist", "name a training recipe") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{file} is no TOML file: {error}", "see README.md, Training") from error
    parts = table.pop("phase", None) or [{}]
    if not (isinstance(parts, list) and all(isinstance(part, dict) for part in parts)):
        raise InputError(f"{file}: phase is no list of phases", "write [[phase]] above the settings of each")
    written = [table | part for part in parts]
    given = [dict(one) for one in written]
    names = [str(one.get("name", Phase.name)) for one in given]
    for change in changes:
        name, _, text = change.partition("=")
        phase, _, setting = name.rpartition(".")
        if phase and phase not in names:
            raise UsageError(f"{change}: there is no phase {phase}", f"the phases are {', '.join(names)}")
        try:
            fitting(setting, text)
        except InputError as error:
            raise UsageError(*error.args) from error
        for one, its_name in zip(given, names, strict=True):
            if phase in ("", its_name):
                one[setting] = text
    try:
        phases = phases_of(given)
    except InputError as error:
        phases_of(written)  # if the file is at fault by itself, it says so
        raise UsageError(*error.args) from error
    if budget is not None:
        total = sum(phase.minutes for phase in phases if not phase.steps)
        phases = [phase if phase.steps else replace(phase, minutes=phase.minutes * budget / total) for phase in phases]
    return phases


def phases_of(tables: Iterable[Mapping[str, Any]]) -> list[Phase]:
    """Phases of tables of settings. Raises InputError."""
    return [Phase(**{name: fitting(name, value) for name, value in one.items()}) for one in tables]


def fitting(name: str, value: Any) -> Any:
    """A setting's value in the type that it has. Raises InputError."""
    kinds = {one.name: type(one.default) for one in fields(Phase)}
    try:
        kind = kinds[name]
        if kind is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if kind is int and int(value) != float(value):
            raise ValueError
        return kind(value)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{name} = {value} is no setting of the training", f"use one of {', '.join(kinds)}") from error


def as_table(phases: Iterable[Phase]) -> list[Mapping[str, Any]]:
    """The phases as plain values."""
    return [asdict(phase) for phase in phases]
