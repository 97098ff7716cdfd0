"""The networks in other runtimes: written as ONNX or OpenVINO graphs, in float32 or with 8-bit convolutions, and run.

An exported folder holds five graphs and networks.json, which says what they were made of:

    encoder      picture -> latent, features_8, features_16, ...
    motion       latent -> code
    shifts       code -> expression_shift, pose_shift
    expression   latent (with its shift), features -> picture
    pose         the same

Pictures are (B, 3, size, size) float32 in [-1, 1]; B is free.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpe_cli.errors import DeviceError, OutputError, WeightsError
from dpe_cli.models import DPEConfig, Encoded, InferenceDPE
from dpe_cli.weights import Loaded

FORMATS = ("onnx", "openvino")
PRECISIONS = ("fp32", "int8")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
SCHEMA = "dpe-networks/3"  # a new number when graphs of before must not be used any more
ABOUT = "networks.json"
OPSET = 18
OPENVINO_REMEDY = "pip install 'dpe-cli[openvino]', or use --backend onnx"
# 8 bits: convolutions of a picture's colours stay in float32, and so do the encoder's shortcuts, which colours take
# too, blurs, flows and masks.
COLOURS = 3
# So many of a narrow encoder's convolutions read its two finest maps and gain little by 8 bits. They stay in float32,
# and with them the maps, which are drawn from and may each hold a small constant (`show_inside`, `show_teeth`).
NARROW, FINEST = 16, 3
# Drawn pictures that show how large the values become, and their contrasts from first to last.
CALIBRATION, CONTRASTS, SEED = 12, (0.55, 2.0), 0


@dataclass(frozen=True)
class About:
    """What exported graphs are: the contents of networks.json."""

    format: str
    precision: str
    sha256: str  # of the weights
    config: dict[str, Any]
    schema: str = SCHEMA


# Writing


def export(loaded: Loaded, folder: Path, format: str, precision: str = "fp32", overwrite: bool = False) -> None:
    """Writes the graphs of a checkpoint into a new folder, which appears when it is whole.

    Raises OutputError if the folder exists or cannot be made, DeviceError if the format's package is missing.
    """
    check_format(format)
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder} exists", "choose another folder or add --overwrite")
    if folder.exists() and not (folder / ABOUT).is_file():
        raise OutputError(f"{folder} holds something else than exported networks", "choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}", "choose another folder") from error
    try:
        write_graphs(loaded, draft, precision)
        if format == "openvino":
            convert(draft)
        about = About(format, precision, loaded.sha256, loaded.config.to_dict())
        (draft / ABOUT).write_text(json.dumps(asdict(about), indent=1), encoding="utf-8")
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class Encode(nn.Module):
    """The graph `encoder`."""

    def __init__(self, networks: InferenceDPE):
        super().__init__()
        self.networks = networks

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        encoded = self.networks.encode(picture)
        return encoded.latent, *encoded.features


class Shifts(nn.Module):
    """The graph `shifts`."""

    def __init__(self, networks: InferenceDPE):
        super().__init__()
        self.expression, self.pose = networks.expression_shift, networks.pose_shift

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor]:
        return self.expression(code), self.pose(code)


class Render(nn.Module):
    """The graphs `expression` and `pose`."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, *features: Tensor) -> tuple[Tensor, Tensor]:
        return self.generator(latent, list(features))


@torch.no_grad()
def write_graphs(loaded: Loaded, folder: Path, precision: str) -> None:
    """All graphs as ONNX."""
    networks = InferenceDPE(loaded.networks(), phased=precision == "int8").eval()
    pictures = drawn_pictures(loaded.config.size)
    encoded = [networks.encode(picture[None]) for picture in pictures]
    codes = [networks.motion_code(one.latent) for one in encoded]
    parts = {
        "encoder": (Encode(networks), [(picture[None],) for picture in pictures]),
        "motion": (networks.to_code, [(one.latent,) for one in encoded]),
        "shifts": (Shifts(networks), [(code,) for code in codes]),
    }
    for name, shift in (("expression", networks.expression_shift), ("pose", networks.pose_shift)):
        others = codes[1:] + codes[:1]
        shifted = [one.latent + shift(code) for one, code in zip(encoded, others, strict=True)]
        inputs = [(latent, *one.features) for latent, one in zip(shifted, encoded, strict=True)]
        parts[name] = Render(getattr(networks, f"{name}_generator")), inputs
    for name, (part, inputs) in parts.items():
        takes, gives = names_of(name, loaded.config)
        path = folder / f"{name}.onnx"
        with quiet():
            torch.onnx.export(
                part, tuple(torch.cat([value, value]) for value in inputs[0]), str(path), dynamo=False,
                opset_version=OPSET, input_names=takes, output_names=gives,
                dynamic_axes={value: {0: "batch"} for value in (*takes, *gives)},
            )  # fmt: skip
            if precision == "int8" and name not in ("motion", "shifts"):
                feeds = [dict(zip(takes, map(as_array, values), strict=True)) for values in inputs]
                finest = loaded.config.channels[loaded.config.size]
                quantise(path, feeds, FINEST if name == "encoder" and finest <= NARROW else 0)


def names_of(graph: str, config: DPEConfig) -> tuple[list[str], list[str]]:
    """Names of what a graph takes and gives."""
    features = [f"features_{size}" for size in config.resolutions]
    return {
        "encoder": (["picture"], ["latent", *features]),
        "motion": (["latent"], ["code"]),
        "shifts": (["code"], ["expression_shift", "pose_shift"]),
    }.get(graph, (["latent", *features], ["picture", "places"]))


def drawn_pictures(size: int) -> Tensor:
    """(CALIBRATION, 3, size, size) in [-1, 1]: random colours on grids from coarse to fine, the same every time.

    They stand for faces: calibrated on frames of real faces, the pictures of `exp` are 1 dB nearer to those of float32.
    """
    chance = torch.Generator().manual_seed(SEED)
    pictures = []
    for number, contrast in enumerate(np.linspace(*CONTRASTS, CALIBRATION)):
        picture = torch.zeros(1, 3, size, size)
        for cells in (2, 4, 8, 16, 32):
            grid = torch.rand(1, 3, cells, cells, generator=chance) * 2 - 1
            picture += F.interpolate(grid, (size, size), mode="bicubic") * cells ** -(0.3 + 0.1 * number)
        pictures.append((picture * float(contrast)).clamp(-1, 1))
    return torch.cat(pictures)


def quantise(path: Path, feeds: list[dict[str, np.ndarray]], spared: int = 0) -> None:
    """Rewrites an ONNX graph with 8-bit convolutions: weights by output channel, values by the range that they take.

    spared: how many of the first ones stay as they are.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Feeds(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    graph = onnx.load(str(prepared)).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    kept, others = [], []
    for node in graph.node:
        if node.op_type == "Conv":
            *channels, height, _ = shapes[node.input[1]]
            colours = min(channels) <= COLOURS or height == 1  # a blur has one channel of weights for each
            (kept if colours else others).append(node.name)
    kept += others[:spared]
    quantize_static(
        str(prepared), str(path), Feeds(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
        nodes_to_exclude=kept, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    prepared.unlink()


def convert(folder: Path) -> None:
    """ONNX graphs to OpenVINO's, in place of them."""
    openvino = import_openvino()
    core = openvino.Core()
    for path in sorted(folder.glob("*.onnx")):
        openvino.save_model(core.read_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
        path.unlink()


@contextmanager
def quiet() -> Iterator[None]:
    """The tracing exporter warns that it traces and that it is the older one, the quantisation that it quantises."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# Where they are kept


def kept(loaded: Loaded, format: str, precision: str) -> Path:
    """The exported folder of a checkpoint among the user's caches, made if it is not there."""
    folder = cache() / f"{loaded.sha256[:16]}-{format}-{precision}-{SCHEMA.rpartition('/')[2]}"
    if not (folder / ABOUT).is_file():
        try:
            export(loaded, folder, format, precision)
        except (OutputError, OSError) as error:
            if not (folder / ABOUT).is_file():  # else another process was faster
                known = isinstance(error, OutputError)
                problem = error.args[0] if known else f"{folder} cannot be made: {error.strerror or error}"
                raise OutputError(problem, "name another folder for such networks by DPE_CACHE") from error
    return folder


def cache() -> Path:
    """$DPE_CACHE, else dpe in the system's folder of a user's caches."""
    if named := os.environ.get("DPE_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "dpe"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/dpe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpe"


# Running

Run = Callable[[str, list[np.ndarray]], list[np.ndarray]]  # name of a graph, what it takes -> what it gives


class ExportedDPE:
    """Exported networks on the CPU, with the methods of `InferenceDPE`. Raises WeightsError for a damaged folder."""

    def __init__(self, folder: Path):
        try:
            about = About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
            self.config = DPEConfig(**about.config)
            if about.schema != SCHEMA:
                raise ValueError(about.schema)
            check_format(about.format)
            self.run: Run = {"onnx": OnnxGraphs, "openvino": OpenVinoGraphs}[about.format](folder).run
        except DeviceError:
            raise
        except Exception as error:  # onnxruntime and OpenVINO have a dozen for it
            raise WeightsError(f"{folder} does not hold whole exported networks", "delete it") from error

    def encode(self, image: Tensor) -> Encoded:
        latent, *features = self("encoder", image)
        return Encoded(latent, features)

    def motion_code(self, latent: Tensor) -> Tensor:
        return self("motion", latent)[0]

    def expression_shift(self, code: Tensor) -> Tensor:
        return self("shifts", code)[0]

    def pose_shift(self, code: Tensor) -> Tensor:
        return self("shifts", code)[1]

    def transfer_expression(self, source: Encoded, code: Tensor) -> Tensor:
        return self("expression", source.latent + self.expression_shift(code), *source.features)[0]

    def transfer_pose(self, source: Encoded, code: Tensor) -> Tensor:
        return self.bend_pose(source, code)[0]

    def bend_pose(self, source: Encoded, code: Tensor) -> tuple[Tensor, Tensor]:
        picture, places = self("pose", source.latent + self.pose_shift(code), *source.features)
        return picture, places

    def __call__(self, graph: str, *values: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in self.run(graph, [as_array(value) for value in values])]


class OnnxGraphs:
    """Graphs in onnxruntime."""

    def __init__(self, folder: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3  # errors
        self.sessions = {
            path.stem: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def run(self, graph: str, values: list[np.ndarray]) -> list[np.ndarray]:
        session = self.sessions[graph]
        return session.run(None, {given.name: value for given, value in zip(session.get_inputs(), values, strict=True)})


class OpenVinoGraphs:
    """Graphs in OpenVINO, compiled for each size of a batch: with a free size it is up to a third slower."""

    def __init__(self, folder: Path):
        self.core = import_openvino().Core()
        self.folder = folder
        self.compiled: dict[tuple[str, int], Any] = {}

    def run(self, graph: str, values: list[np.ndarray]) -> list[np.ndarray]:
        batch = len(values[0])
        if (graph, batch) not in self.compiled:
            model = self.core.read_model(self.folder / f"{graph}.xml")
            model.reshape({given.any_name: value.shape for given, value in zip(model.inputs, values, strict=True)})
            settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
            self.compiled[graph, batch] = self.core.compile_model(model, "CPU", settings)
        return [np.array(value) for value in self.compiled[graph, batch](values).values()]


def as_array(value: Tensor) -> np.ndarray:
    """As the runtimes want it: channels first, one after the other."""
    return value.detach().contiguous().numpy()


def check_format(format: str) -> None:
    """Raises DeviceError unless there is such a format and what it needs."""
    if format not in FORMATS:
        raise DeviceError(f"there is no format {format}", f"use {' or '.join(FORMATS)}")
    if format == "openvino":
        import_openvino()


def import_openvino() -> Any:
    """The package. Raises DeviceError."""
    if find_spec("openvino") is None:
        raise DeviceError("OpenVINO is not installed", OPENVINO_REMEDY)
    import openvino

    return openvino
