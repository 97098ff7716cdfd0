"""The user's ONNX networks, with tiny ones made here."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from dpe_cli.errors import WeightsError
from dpe_cli.plugs import Enhancer, FaceParser


def save_network(path: Path, nodes: list, constants: dict[str, np.ndarray], channels: int, side: int | str, more=()):
    """An ONNX file: `picture` (1, 3, side, side) in, `out` (1, channels, side, side) out."""
    inputs = [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, side, side]), *more]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, channels, side, side])]
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, values)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def blue_is_in_front(path: Path, side: int | str = 64, classes: int = 19) -> Path:
    """A face parser that calls blue background (0) and all else skin (1)."""
    weights, bias = np.zeros((classes, 3, 1, 1), np.float32), np.full(classes, -100, np.float32)
    weights[0, 2], weights[0, 0] = 1, -1  # blue less red, in the units of ImageNet's mean and deviation
    bias[:2] = 0, 1
    node = helper.make_node("Conv", ["picture", "w", "b"], ["out"])
    return save_network(path, [node], {"w": weights, "b": bias}, classes, side)


def brighten(path: Path, side: int = 64, fidelity: bool = False) -> Path:
    """An enhancer that adds 0.1 of [-1, 1]; with a second input it adds a tenth of that."""
    more, nodes = [], [helper.make_node("Add", ["picture", "c"], ["out"])]
    if fidelity:
        more = [helper.make_tensor_value_info("weight", TensorProto.DOUBLE, [1])]
        cast = helper.make_node("Cast", ["weight"], ["w"], to=TensorProto.FLOAT)
        nodes = [cast, helper.make_node("Mul", ["w", "c"], ["d"]), helper.make_node("Add", ["picture", "d"], ["out"])]
    return save_network(path, nodes, {"c": np.array([0.1], np.float32)}, 3, side, more)


@pytest.mark.parametrize("side", [64, "side"])
def test_a_parser_labels_the_crop(tmp_path: Path, side: int | str):
    crop = np.full((128, 128, 3), (200, 150, 120), np.uint8)
    crop[40:80] = (0, 0, 255)
    labels = FaceParser(blue_is_in_front(tmp_path / "p.onnx", side))(crop)
    assert labels.shape == (128, 128) and labels.dtype == np.uint8
    assert (labels[42:78] == 0).all() and (labels[:38] == 1).all() and (labels[82:] == 1).all()


def test_an_enhancer_gets_and_gives_pictures_in_minus_one_to_one(tmp_path: Path):
    enhancer = Enhancer(brighten(tmp_path / "e.onnx"))
    face = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    better = enhancer(face)
    assert enhancer.size == 64 and better.dtype == np.uint8
    assert np.abs(better.astype(int) - np.minimum(face + 12.75, 255)).max() <= 0.76


def test_a_second_input_is_fidelity(tmp_path: Path):
    face = np.full((64, 64, 3), 100, np.uint8)
    assert (Enhancer(brighten(tmp_path / "e.onnx", fidelity=True))(face) == 109).all()  # 0.7 of 12.75


def test_files_that_will_not_do_are_told_in_one_line(tmp_path: Path):
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(WeightsError, match=r"no such file; name an ONNX file with --parsing"):
        FaceParser(tmp_path / "missing.onnx")
    with pytest.raises(WeightsError, match=r"cannot be read .* with --enhancer"):
        Enhancer(tmp_path / "text.onnx")
    with pytest.raises(WeightsError, match=r"gives 7 scores a pixel, not 19"):
        FaceParser(blue_is_in_front(tmp_path / "few.onnx", classes=7))(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(WeightsError, match=r"not a picture of 64 by 64"):
        Enhancer(blue_is_in_front(tmp_path / "labels.onnx"))(np.zeros((64, 64, 3), np.uint8))
