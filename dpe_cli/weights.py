"""Which checkpoints there are, and how one becomes a state of our networks.

A checkpoint is told by its content, not by its name, and nothing in it is ever run. Ours are safetensors files that
carry the configuration of their networks; the released ones are read through the table in `models/checkpoint.py`.
"""

import argparse
import contextlib
import hashlib
import importlib.resources
import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpe_cli.errors import OutputError, WeightsError
from dpe_cli.limits import write_at_once

if TYPE_CHECKING:
    from torch import Tensor

    from dpe_cli.models.checkpoint import Config

# in the metadata of our files
FORMAT, LANDMARK_FORMAT, SPEECH_FORMAT = "dpe-weights/1", "dpe-landmarks/1", "dpe-speech/1"
READER_FORMAT, RETOUCH_FORMAT, MATTE_FORMAT = "dpe-reader/2", "dpe-retouch/1", "dpe-matte/1"
DEFAULT, LANDMARKS, READER, RETOUCH, MATTE, SPEECH = "compact", "landmarks", "reader", "retouch", "matte", "speech"
BESIDE = (LANDMARKS, READER, RETOUCH, MATTE, SPEECH)  # networks that come with the tool, beside the default weights
# formats of any version
FAMILIES = ("dpe-weights/", "dpe-landmarks/", "dpe-reader/", "dpe-retouch/", "dpe-matte/", "dpe-speech/")
OTHERS = {  # formats of networks of ours that are not DPE's, and what is said of such a file
    LANDMARK_FORMAT: "is a landmark network, which measures faces and cannot edit them",
    READER_FORMAT: "measures eyes and mouths and cannot edit faces",
    RETOUCH_FORMAT: "retouches what other networks draw and cannot edit",
    MATTE_FORMAT: "tells persons from what is behind them and cannot edit",
    SPEECH_FORMAT: "hears speech and cannot edit faces",
}
PACKS = Path("~/.insightface/models")  # where insightface looks for its packs, and its downloader puts them
RESEARCH_ONLY = "non-commercial research only (see its page)"


@dataclass(frozen=True)
class Checkpoint:
    """A file, or a folder of models, that the tool knows by a name."""

    name: str
    file: str
    sha256: str | None  # None: not known, so any file that loads is taken
    url: str | None  # None: it comes with the tool, or its host or licence wants a person to click
    page: str  # where to read about it, and get it by hand
    licence: str
    purpose: str


# After new weights: write the output of `sha256sum weights/*.safetensors` here.
COMPACT_SHA256: str | None = "f2b8ebac2975f6473cd556df19d3d05072c64c85d9bd28b1950363b63e0aa4ec"
LANDMARKS_SHA256: str | None = "8e65d1aeb1a8ad8a75f31791f7d0e3835b83c0778bcd0778a111bb256e0b0453"
READER_SHA256: str | None = "26ea5b2b5430b82694677092d98a84370c40a5c38bafa1347e4126cebfc1d82d"
RETOUCH_SHA256: str | None = "8d113852950d07d3a8449256c22e30d08543fe344985a8d8979900619467019d"
MATTE_SHA256: str | None = "c2cbc696948915c907601296d54d349cda935cfb6bcde9696a1d712865edd0b3"
SPEECH_SHA256: str | None = "4895e6c1d302678635fec810ab67b99e5a0a5df4315421f0dc5aec6a5635542d"


def known(*checkpoints: Checkpoint) -> dict[str, Checkpoint]:
    """Checkpoints by name."""
    return {checkpoint.name: checkpoint for checkpoint in checkpoints}


def insightface_pack(name: str, purpose: str) -> Checkpoint:
    """A pack of face models that insightface's own downloader gets."""
    url = f"https://github.com/deepinsight/insightface/releases/download/model-zoo/{name}.zip"
    page = "https://github.com/deepinsight/insightface/tree/master/model_zoo"
    return Checkpoint(name, name, None, url, page, RESEARCH_ONLY, purpose)


CHECKPOINTS = known(
    Checkpoint(
        "compact", "compact.safetensors", COMPACT_SHA256, None, "weights/README.md", "see weights/README.md",
        "the default: small networks of our own, installed with the tool",
    ),
    Checkpoint(
        LANDMARKS, "landmarks.safetensors", LANDMARKS_SHA256, None, "weights/README.md", "see weights/README.md",
        "landmarks of faces: a small network of our own, installed with the tool; it measures, it does not edit",
    ),
    Checkpoint(
        READER, "reader.safetensors", READER_SHA256, None, "weights/README.md", "see weights/README.md",
        "a closer look at eyes and mouth: small networks of our own, installed with the tool; they measure",
    ),
    Checkpoint(
        RETOUCH, "retouch.safetensors", RETOUCH_SHA256, None, "weights/README.md", "see weights/README.md",
        "small networks of our own that paint over mouth and eyes, installed with the tool",
    ),
    Checkpoint(
        MATTE, "matte.safetensors", MATTE_SHA256, None, "weights/README.md", "see weights/README.md",
        "persons before their background: a small network of our own, installed with the tool; it measures",
    ),
    Checkpoint(
        SPEECH, "speech.safetensors", SPEECH_SHA256, None, "weights/README.md", "see weights/README.md",
        "speech to mouth and head motion: small networks of our own, installed with the tool; for dpe dub",
    ),
    Checkpoint(
        "dpe", "dpe.pt", None, None, "https://github.com/OpenTalker/DPE", "personal, research, non-commercial use",
        "the networks that the authors of the paper released",
    ),
    Checkpoint(
        "lia", "vox.pt", None, None, "https://github.com/wyhsirius/LIA", "see its page",
        "LIA's networks: something to start training from, not to edit with",
    ),
    insightface_pack("buffalo_l", "face detection and recognition, large"),
    insightface_pack("buffalo_s", "face detection and recognition, small"),
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory. `state` fits the network of `config` strictly, DPE or another of `models`.

    Its tensors are finite float32 on the CPU.
    """

    config: "Config"
    state: dict[str, "Tensor"]
    metadata: dict[str, str]  # of our own files, else empty
    path: Path
    sha256: str

    def networks(self) -> Any:
        """The networks of `config`, an nn.Module, with these weights; on the CPU, and their gradients are asked for."""
        from dpe_cli.models.checkpoint import networks_of

        networks = networks_of(self.config)
        networks.load_state_dict(self.state)
        return networks


# Where checkpoints lie


def folder() -> Path:
    """Where the default weights lie, and what a user adds under its known name."""
    return Path(str(importlib.resources.files("dpe_cli.pretrained")))


def is_pack(checkpoint: Checkpoint) -> bool:
    """Whether it is a folder of face models rather than weights of the networks."""
    return checkpoint.url is not None


def place(checkpoint: Checkpoint) -> Path:
    """Where a known checkpoint lies if it is there."""
    return (PACKS.expanduser() if is_pack(checkpoint) else folder()) / checkpoint.file


def list_checkpoints() -> list[tuple[Checkpoint, Path | None]]:
    """All checkpoints known by name, each with its path, None where it is not on this machine."""
    placed = [(checkpoint, place(checkpoint)) for checkpoint in CHECKPOINTS.values()]
    return [(checkpoint, path if path.exists() else None) for checkpoint, path in placed]


def find(name_or_path: str | Path | None = None) -> Path:
    """Path of a checkpoint given by name or path, by default of our own. Raises WeightsError if it is not there."""
    name = str(name_or_path or DEFAULT)
    checkpoint = CHECKPOINTS.get(name)
    path = place(checkpoint) if checkpoint else Path(name).expanduser()
    if path.exists():
        return path
    if checkpoint is None:
        raise WeightsError(f"there are no weights {name}", f"give a path or one of {', '.join(CHECKPOINTS)}")
    raise WeightsError(f"{name} is not on this machine (no {path})", how_to_get(checkpoint))


def how_to_get(checkpoint: Checkpoint | None) -> str:
    """In the imperative; None stands for a file that has no name with us."""
    if checkpoint is None:
        return "get the file anew, or leave --weights away to use the default"
    if checkpoint.name == DEFAULT:
        return "install dpe-cli anew, or name other weights with --weights"
    if checkpoint.name in BESIDE:
        return "install dpe-cli anew"
    if is_pack(checkpoint):
        return f"get it with: dpe weights fetch {checkpoint.name}"
    return f"download {checkpoint.file} by hand from {checkpoint.page} and name it with --weights PATH"


def fetch(name: str, say: Callable[[str], None]) -> Path:
    """Gets an insightface pack with insightface's own downloader; `say` is told the licence before anything else.

    Raises WeightsError for what a person has to download, and when the download fails.
    """
    checkpoint = CHECKPOINTS.get(name)
    if checkpoint is None or not is_pack(checkpoint):
        packs = ", ".join(c.name for c in CHECKPOINTS.values() if is_pack(c))
        ours = checkpoint is None or checkpoint.name in (DEFAULT, *BESIDE)
        remedy = f"fetch one of {packs}" if ours else how_to_get(checkpoint)
        raise WeightsError(f"{name} cannot be fetched", remedy)
    path = place(checkpoint)
    say(f"{name}: {checkpoint.purpose}; licence: {checkpoint.licence}, {checkpoint.page}")
    if any(path.glob("**/*.onnx")):
        say(f"{path} is there already")
        return path
    with contextlib.suppress(OSError):
        path.rmdir()  # an empty folder, left by a failure, would pass for the pack
    say(f"downloading {checkpoint.url}")
    download_pack(checkpoint, path)
    return path


def download_pack(checkpoint: Checkpoint, path: Path) -> None:
    """Runs insightface's downloader, whose talk goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from insightface.utils.storage import download

            download("models", checkpoint.name, root=str(path.parent.parent))
    except (ImportError, OSError, RuntimeError, zipfile.BadZipFile) as error:  # requests' errors are OSErrors
        with contextlib.suppress(OSError):
            path.rmdir()
        problem = f"{checkpoint.name} could not be downloaded ({type(error).__name__})"
        remedy = f"check the connection, or unpack {checkpoint.url} into {path} by hand"
        raise WeightsError(problem, remedy) from error
    path.parent.joinpath(f"{checkpoint.name}.zip").unlink(missing_ok=True)  # it has been unpacked
    if not any(path.glob("**/*.onnx")):
        raise WeightsError(f"{path} holds no models", f"delete it and unpack {checkpoint.url} into it by hand")


# From a file to tensors


def load(name_or_path: str | Path | None = None) -> Loaded:
    """Weights of DPE, ours or the released ones, checked to the last tensor.

    Raises WeightsError for a file that is missing, damaged, of another network, or not what its name says.
    """
    loaded = load_any(name_or_path)
    written = loaded.metadata.get("format")
    if written in OTHERS:
        raise WeightsError(f"{loaded.path} {OTHERS[written]}", how_to_get(None))
    return loaded


def load_own(name_or_path: str | Path, written: str, name: str, kind: str) -> Loaded:
    """Weights of a network of ours beside DPE's, of the format `written`; the tool's own are known by `name`."""
    loaded = load_any(name_or_path)
    if loaded.metadata.get("format") != written:
        raise WeightsError(f"{loaded.path} is no {kind}", f"leave it away to use the {name} of the tool")
    return loaded


def load_landmarks(name_or_path: str | Path = LANDMARKS) -> Loaded:
    """Weights of the landmark network, by default the tool's own. Raises WeightsError as `load` does."""
    return load_own(name_or_path, LANDMARK_FORMAT, LANDMARKS, "landmark network")


def load_reader(name_or_path: str | Path = READER) -> Loaded:
    """Weights of the reading networks, by default the tool's own. Raises WeightsError as `load` does."""
    return load_own(name_or_path, READER_FORMAT, READER, "reading network")


def load_retouch(name_or_path: str | Path = RETOUCH) -> Loaded:
    """Weights of the retouching networks, by default the tool's own. Raises WeightsError as `load` does."""
    return load_own(name_or_path, RETOUCH_FORMAT, RETOUCH, "retouching network")


def load_matte(name_or_path: str | Path = MATTE) -> Loaded:
    """Weights of the matte network, by default the tool's own. Raises WeightsError as `load` does."""
    return load_own(name_or_path, MATTE_FORMAT, MATTE, "matte network")


def load_speech(name_or_path: str | Path = SPEECH) -> Loaded:
    """Weights of the speech networks, by default the tool's own. Raises WeightsError as `load` does."""
    return load_own(name_or_path, SPEECH_FORMAT, SPEECH, "speech network")


def load_any(name_or_path: str | Path | None = None) -> Loaded:
    """Weights of any of our networks. Raises WeightsError as `load` does, but for another network's."""
    import torch

    from dpe_cli.models.checkpoint import check, translate

    path, checkpoint = find(name_or_path), CHECKPOINTS.get(str(name_or_path or DEFAULT))
    content, metadata = read(path, checkpoint)
    try:
        if metadata.get("format", "").startswith(FAMILIES):
            config, state = config_of(metadata), content
            check(state, config)
        else:
            config, state = translate(content)
    except ValueError as error:
        raise WeightsError(f"{path} {error}", how_to_get(checkpoint)) from error
    # Copies: what was read is mapped from the file, and a file that changes would end the process.
    state = {key: value.detach().float().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    wrong = [key for key, value in state.items() if not value.isfinite().all()]
    if wrong:
        problem = f"{path} holds values that are not numbers (in {len(wrong)} tensors, first {wrong[0]})"
        raise WeightsError(problem, how_to_get(checkpoint))
    return Loaded(config, state, metadata, path, check_digest(path, checkpoint))


def config_kinds() -> dict[str, type]:
    """The format of each kind of file of ours -> the class of its configuration."""
    from dpe_cli.models import DPEConfig, LandmarkConfig, MatteConfig, ReaderConfig, RetouchConfig, SpeechConfig

    return {
        FORMAT: DPEConfig, LANDMARK_FORMAT: LandmarkConfig, READER_FORMAT: ReaderConfig, RETOUCH_FORMAT: RetouchConfig,
        MATTE_FORMAT: MatteConfig, SPEECH_FORMAT: SpeechConfig,
    }  # fmt: skip


def config_of(metadata: Mapping[str, str]) -> "Config":
    """The configuration that one of our files carries. Raises ValueError."""
    kinds = config_kinds()
    if metadata["format"] not in kinds:
        reads = ", ".join(kinds)
        raise ValueError(f"has the format {metadata['format']} of another version of dpe, this one reads {reads}")
    return kinds[metadata["format"]].from_json(metadata.get("config", "null"))


def check_digest(path: Path, checkpoint: Checkpoint | None) -> str:
    """The sha256 of a file. Raises WeightsError if it is known and another."""
    found = digest(path)
    if checkpoint is not None and checkpoint.sha256 not in (None, found):
        problem = f"{path} is not {checkpoint.name} as released: its sha256 is {found}, not {checkpoint.sha256}"
        raise WeightsError(problem, how_to_get(checkpoint))
    return found


def digest(path: Path) -> str:
    """The sha256 of a file, in constant memory."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def read(path: Path, checkpoint: Checkpoint | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """What a checkpoint of any network holds, and the metadata of a safetensors file; no code in it is run.

    `checkpoint` is what the file should be, for the remedy. Raises WeightsError if it is no checkpoint or damaged.
    """
    try:
        problem, reader = recognise(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    if reader is None:
        remedy = "name a face model pack with --face-models" if path.is_dir() else how_to_get(checkpoint)
        raise WeightsError(f"{path} {problem}", remedy)
    try:
        return reader(path)
    except WeightsError:
        raise
    except Exception as error:  # torch and safetensors have a dozen for a damaged file, and give no list
        first_line = (str(error).splitlines() or [""])[0][:120]
        problem = f"{path} is damaged or no checkpoint ({type(error).__name__}: {first_line})"
        raise WeightsError(problem, how_to_get(checkpoint)) from error


Reader = Callable[[Path], tuple[dict[str, Any], dict[str, str]]]


def recognise(path: Path) -> tuple[str, Reader | None]:
    """What a file is by its first bytes: a problem, or a function that reads it."""
    if path.is_dir():
        return "is a folder, not a checkpoint", None
    if path.exists() and not path.is_file():
        return "is a pipe or a device, not a checkpoint", None
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty", None
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (git lfs pull gets it)", None
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page, not a checkpoint", None
    if head[8:9] == b"{":
        return "", read_safetensors
    if head.startswith(b"PK\x03\x04"):
        return recognise_zip(path)
    if head.startswith(b"\x80"):  # a bare pickle, as torch wrote it before 1.6
        return "", read_torch
    return "is not a checkpoint", None


def recognise_zip(path: Path) -> tuple[str, Reader | None]:
    """What a zip file is. torch never compresses; what is compressed may unfold to more than the memory holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "is truncated or damaged", None
    return ("is compressed, which no checkpoint is", None) if packed else ("", read_torch)


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def is_ours(path: Path) -> bool:
    """Whether a file holds weights of the DPE networks in our own form. Reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What torch.save wrote: tensors, plain values and the options of a training run (argparse.Namespace) only."""
    import pickle

    import torch

    try:
        # An open file, not a path: torch would choose the reader by the name's ending.
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of pickle's versions, which mean nothing to a user
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = f"{path} is damaged, or holds Python objects besides tensors, which are not loaded"
        raise WeightsError(problem, "get the original checkpoint, or save its tensors alone") from error
    return content, {}


# From tensors to a file


def save(
    path: Path, state: Mapping[str, "Tensor"], config: "Config",
    metadata: Mapping[str, Any] | None = None, half: bool = False,
) -> None:  # fmt: skip
    """Writes the state of the networks of `config`, whole or not at all; `half` stores 16-bit numbers.

    `metadata` goes along; values that are not text become JSON. Raises ValueError for a state that does not fit,
    OutputError if the file cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save as serialised

    from dpe_cli.models.checkpoint import check

    check(state, config)
    kind = torch.float16 if half else torch.float32  # of all but counters, which stay whole numbers
    stored = {
        key: value.detach().to("cpu", kind if value.is_floating_point() else None) for key, value in state.items()
    }
    wrong = [key for key, value in stored.items() if not value.isfinite().all()]
    if wrong:
        raise ValueError(f"values that are not finite{' in 16 bits' if half else ''}: {', '.join(wrong[:3])}")
    extra = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    written = next(written for written, kind in config_kinds().items() if isinstance(config, kind))
    try:
        tensors = {key: value.contiguous() for key, value in stored.items()}
        write_at_once(path, serialised(tensors, {**extra, "format": written, "config": config.to_json()}))
    except (OSError, SafetensorError) as error:
        problem = f"{path} cannot be written ({error})"
        raise OutputError(problem, "check the folder and the space on the disk") from error


# For the commands


def verify(name_or_path: str | Path | None = None) -> str:
    """One line about a checkpoint that is whole. Raises WeightsError for one that is not."""
    checkpoint = CHECKPOINTS.get(str(name_or_path or DEFAULT))
    if checkpoint and is_pack(checkpoint):
        path = find(checkpoint.name)
        models = sorted(path.glob("**/*.onnx"))
        if not models:
            raise WeightsError(f"{path} holds no models", f"delete it, then: dpe weights fetch {checkpoint.name}")
        return f"{path}: {len(models)} models; there is no published sha256 to compare with"
    loaded = load_any(name_or_path)
    known_as = [c.name for c in CHECKPOINTS.values() if c.sha256 == loaded.sha256]
    origin = f"{known_as[0]} as released" if known_as else "there is no published sha256 to compare with"
    return f"{loaded.path}: {len(loaded.state)} tensors, all there and finite; sha256 {loaded.sha256}, {origin}"


def info(name_or_path: str | Path | None = None) -> dict[str, Any]:
    """What there is to know of the weights of a network, ready for JSON. Raises WeightsError."""
    loaded = load_any(name_or_path)
    about = {key: value for key, value in loaded.metadata.items() if key not in ("config", "format")}
    return {
        "path": str(loaded.path),
        "bytes": loaded.path.stat().st_size,
        "sha256": loaded.sha256,
        "parameters": sum(value.numel() for value in loaded.state.values()),
        "config": loaded.config.to_dict(),
        "metadata": about,
    }
