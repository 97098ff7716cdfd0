"""Networks as ONNX and OpenVINO graphs: they draw what torch draws, and lie in the cache as wholes."""

import errno
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dpe_cli import engine, runtimes
from dpe_cli.device import choose_backend
from dpe_cli.engine import Engine
from dpe_cli.errors import DeviceError, OutputError, WeightsError
from dpe_cli.main import cli
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.weights import load, save

SIZE = 32
CPU = torch.device("cpu")
NO_OPENVINO = find_spec("openvino") is None
FORMATS = [
    "onnx",
    pytest.param("openvino", marks=pytest.mark.skipif(NO_OPENVINO, reason="the extra openvino is missing")),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with random weights, biases and all."""
    torch.manual_seed(0)
    config = DPEConfig(SIZE, {4: 24, 8: 24, 16: 16, 32: 8}, latent_dim=32)
    model = DPE(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(path, model.state_dict(), config)
    return path


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def crops(count: int) -> np.ndarray:
    """Smooth pictures, (count, SIZE, SIZE, 3) uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 255
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear").permute(0, 2, 3, 1)
    return smooth.to(torch.uint8).numpy()


@pytest.mark.parametrize("backend", FORMATS)
def test_other_runtimes_draw_the_same_pictures(file: Path, backend: str):
    ours, other = (Engine(file, device="cpu", backend=name, batch_size=2) for name in ("torch", backend))
    assert other.description["backend"] == backend
    pictures = crops(3)  # batches of two and of one
    codes = ours.motion_codes(pictures)
    np.testing.assert_allclose(other.motion_codes(pictures), codes, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(ours.shifts(codes), other.shifts(codes), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-5)
    swapped = codes[::-1]
    for expression, pose in ((swapped, None), (None, swapped), (swapped, codes)):
        wanted = ours.edit(pictures, expression, pose).astype(int)
        found = other.edit(pictures, expression, pose).astype(int)
        assert wanted.std() > 10  # something is drawn
        assert np.abs(found - wanted).max() <= 1  # of 255: the rounding


@pytest.mark.parametrize("backend", FORMATS)
@torch.inference_mode()
def test_before_rounding_graphs_differ_by_less_than_the_tolerance(file: Path, backend: str):
    networks, other = (Engine(file, device="cpu", backend=name).networks for name in ("torch", backend))
    picture = engine.to_tensor(crops(2), CPU)
    code = networks.motion_code(networks.encode(picture).latent).flip(0)
    wanted = networks.transfer_expression(networks.encode(picture), code)
    error = (other.transfer_expression(other.encode(picture), code) - wanted).abs()
    assert error.max() <= 5e-4 and error.mean() <= 5e-6


@pytest.mark.parametrize("backend", FORMATS)
def test_eight_bits_come_close(file: Path, backend: str):
    ours = Engine(file, device="cpu")
    other = Engine(file, device="cpu", precision="int8", backend=backend)
    assert other.description["precision"] == "int8"
    pictures = crops(2)
    codes = ours.motion_codes(pictures)
    error = np.abs(other.edit(pictures, codes[::-1], None) - ours.edit(pictures, codes[::-1], None).astype(float))
    assert 0 < error.mean() < 4  # random weights make nothing of small values; trained ones are measured below


@pytest.mark.weights
@pytest.mark.slow
def test_eight_bits_keep_forty_decibels_with_the_default_weights():
    ours, other = Engine(device="cpu"), Engine(device="cpu", precision="int8")
    assert (ours.backend, other.backend) == ("torch", "onnx")
    drawn = runtimes.drawn_pictures(ours.size)[1:8:3]
    pictures = ((drawn + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    codes = ours.motion_codes(pictures)
    error = other.edit(pictures, codes[::-1], None) - ours.edit(pictures, codes[::-1], None).astype(float)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 40


def test_only_convolutions_of_features_are_in_eight_bits(file: Path, tmp_path: Path):
    import onnx

    runtimes.export(load(file), tmp_path / "out", "onnx", "int8")
    nodes = onnx.load(tmp_path / "out/expression.onnx").graph.node
    producers = {name: node.op_type for node in nodes for name in node.output}
    eight = [node for node in nodes if node.op_type == "Conv" and producers.get(node.input[0]) == "DequantizeLinear"]
    blurs = [node for node in nodes if node.op_type == "Conv" and node not in eight]
    assert len(eight) == 7  # one at 4 pixels, two at each of three levels
    assert len(blurs) == 3


# Folders


def test_export_writes_a_whole_folder_and_replaces_only_its_own(file: Path, tmp_path: Path):
    arguments = ["export", "--weights", str(file), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"encoder.onnx", "motion.onnx", "shifts.onnx", "expression.onnx", "pose.onnx", "networks.json"}
    about = json.loads((tmp_path / "out/networks.json").read_text())
    assert (about["format"], about["precision"], about["config"]["size"]) == ("onnx", "fp32", SIZE)
    assert CliRunner().invoke(cli, arguments).exit_code == OutputError.exit_code
    assert CliRunner().invoke(cli, [*arguments, "--overwrite"]).exit_code == 0
    (tmp_path / "photos").mkdir()
    with pytest.raises(OutputError, match="something else"):
        runtimes.export(load(file), tmp_path / "photos", "onnx", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "photos"}  # no drafts


def test_what_fails_half_way_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(runtimes, "write_graphs", fail)
    with pytest.raises(MemoryError):
        runtimes.export(load(file), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_filled_once_for_each_checkpoint(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPE_CACHE", str(tmp_path))
    written = []
    write = runtimes.write_graphs
    monkeypatch.setattr(runtimes, "write_graphs", lambda *given: (written.append(given), write(*given)))
    folders = [runtimes.kept(load(file), "onnx", "fp32") for _ in range(2)]
    assert folders[0] == folders[1] and len(written) == 1
    (folders[0] / "encoder.onnx").write_bytes(b"half")
    with pytest.raises(WeightsError, match="whole exported networks; delete it"):
        runtimes.ExportedDPE(folders[0])


@pytest.mark.parametrize("broken", ["mkdtemp", "write_graphs"])
def test_a_cache_that_cannot_be_written_says_how_to_name_another(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("DPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtimes.tempfile if broken == "mkdtemp" else runtimes, broken, full)
    with pytest.raises(OutputError, match=r"cannot be made: Read-only file system; name another folder .* DPE_CACHE"):
        runtimes.kept(load(file), "onnx", "fp32")


# Choices


@pytest.mark.parametrize(
    ("backend", "device", "precision", "chosen"),
    [("auto", "cpu", "fp32", "torch"), ("auto", "cpu", "int8", "onnx"), ("auto", "cuda", "bf16", "torch"),
     ("onnx", "cpu", "fp32", "onnx"), ("compile", "cuda", "bf16", "compile")],
)  # fmt: skip
def test_auto_takes_what_was_measured_to_be_fast(backend: str, device: str, precision: str, chosen: str):
    assert choose_backend(backend, torch.device(device), precision) == chosen


@pytest.mark.parametrize(
    ("backend", "device", "precision", "words"),
    [("tpu", "cpu", "fp32", "no backend tpu"), ("torch", "cpu", "int8", "torch does not compute in int8"),
     ("onnx", "cuda", "fp32", "onnx runs on CPUs"), ("onnx", "cpu", "bf16", "fp32 and int8, not in bf16")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(backend: str, device: str, precision: str, words: str):
    with pytest.raises(DeviceError, match=words):
        choose_backend(backend, torch.device(device), precision)


def test_openvino_is_optional(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="OpenVINO is not installed; pip install"):
        choose_backend("openvino", CPU, "fp32")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile uses what torch itself deprecates
def test_compile_compiles_the_large_parts(file: Path):
    networks = Engine(file, device="cpu", backend="compile").networks
    parts = networks.encoder, networks.expression_generator, networks.pose_generator
    assert all(part._compiled_call_impl is not None for part in parts)  # compiling takes minutes
