"""The engine with random weights: shapes, batches, precisions, devices, memory."""

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from dpe_cli import engine, weights
from dpe_cli.device import BATCH_SIZES, choose_batch_size, choose_device, choose_precision, fetched, keep_memory, sent
from dpe_cli.engine import Engine, to_pictures, to_tensor
from dpe_cli.errors import DeviceError, WeightsError
from dpe_cli.models import DPE, DPEConfig

SIZE = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a compact model for crops of 64 x 64."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    config = DPEConfig.compact(SIZE)
    torch.manual_seed(0)
    weights.save(path, DPE(config).state_dict(), config)
    return path


@pytest.fixture
def networks(file: Path) -> Engine:
    """An engine on the CPU, three crops at once."""
    return Engine(file, device="cpu", batch_size=3)


def crops(count: int, seed: int = 0) -> np.ndarray:
    """Different smooth pictures: (count, 64, 64, 3) uint8."""
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (count, 3, 8, 8)))
    fine = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")
    return np.ascontiguousarray(fine.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two uint8 arrays."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def count_calls(monkeypatch: pytest.MonkeyPatch, networks: Engine, method: str) -> list[int]:
    """The batch size of each call of a method of the networks from now on."""
    sizes, original = [], getattr(networks.networks, method)

    def counted(batch: torch.Tensor, *more: torch.Tensor) -> object:
        sizes.append(len(more[0] if more else batch))
        return original(batch, *more)

    monkeypatch.setattr(networks.networks, method, counted)
    return sizes


def test_each_edit_is_the_networks_method_of_that_name(networks: Engine):
    pictures, own, driving = crops(2), networks.networks, crops(2, seed=1)
    codes = networks.motion_codes(driving)
    with torch.inference_mode():
        source = own.encode(to_tensor(pictures, CPU))
        code = own.motion_code(own.encode(to_tensor(driving, CPU)).latent)
        expected = {
            "expression": own.transfer_expression(source, code),
            "pose": own.transfer_pose(source, code),
            "both": own.transfer_pose(own.encode(own.transfer_expression(source, code)), code),
        }
    np.testing.assert_allclose(codes, code.numpy(), rtol=1e-4, atol=1e-5)
    found = {
        "expression": networks.edit(pictures, codes, None),
        "pose": networks.edit(pictures, None, codes),
        "both": networks.edit(pictures, codes, codes),
    }
    for name, image in expected.items():
        assert difference(found[name], to_pictures(image)) <= 1, name
    assert difference(found["expression"], found["pose"]) > 20


def test_what_comes_out_has_the_shape_and_type_of_what_went_in(networks: Engine):
    pictures = crops(4)
    codes = networks.motion_codes(pictures)
    edited = networks.edit(pictures, codes, None)
    assert codes.shape == (4, 20) and codes.dtype == np.float32
    assert edited.shape == pictures.shape and edited.dtype == np.uint8 and edited.flags.c_contiguous
    assert networks.size == SIZE


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_results_do_not_depend_on_the_batch_size(file: Path, networks: Engine, batch_size: int):
    other = Engine(file, device="cpu", batch_size=batch_size)
    pictures = crops(7)
    codes = networks.motion_codes(pictures)
    np.testing.assert_allclose(other.motion_codes(pictures), codes, rtol=1e-3, atol=1e-5)
    assert difference(other.edit(pictures, codes[::-1], codes), networks.edit(pictures, codes[::-1], codes)) <= 1


def test_crops_are_taken_in_slices_of_the_batch_size(networks: Engine, monkeypatch: pytest.MonkeyPatch):
    sizes = count_calls(monkeypatch, networks, "encode")
    networks.motion_codes(crops(7))
    assert sizes == [3, 3, 1]


def test_no_crops_give_no_results(networks: Engine):
    assert networks.motion_codes(crops(0)).shape == (0, 20)
    assert networks.edit(crops(0), np.zeros((0, 20), np.float32), None).shape == (0, SIZE, SIZE, 3)


def test_a_still_source_is_encoded_once(networks: Engine, monkeypatch: pytest.MonkeyPatch):
    still, codes = np.repeat(crops(1), 8, 0), networks.motion_codes(crops(8, seed=1))
    one_by_one = np.concatenate([networks.edit(still[:1], codes[i : i + 1], None) for i in range(8)])
    networks.forget()
    sizes = count_calls(monkeypatch, networks, "encode")
    edited = networks.edit(still, codes, None)
    networks.edit(still[:2], codes[:2], None)
    assert sizes == [1]
    assert difference(edited, one_by_one) <= 1


def test_another_source_is_not_taken_for_the_still(networks: Engine):
    codes = networks.motion_codes(crops(1, seed=1))
    first, other = crops(1), crops(1, seed=2)
    before = networks.edit(other, codes, None)
    networks.edit(first, codes, None)
    assert difference(networks.edit(other, codes, None), before) == 0
    first[:] = 0  # the caller's array may be used again
    assert difference(networks.edit(first, codes, None), before) > 10


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0]], ids=str)
def test_a_batch_that_is_needed_twice_is_encoded_once(
    networks: Engine, monkeypatch: pytest.MonkeyPatch, order: list[int]
):
    pictures, codes = crops(3), networks.motion_codes(crops(3, seed=1))
    expected = networks.edit(pictures[order], codes, None)
    networks.forget()
    sizes = count_calls(monkeypatch, networks, "encode")
    networks.motion_codes(pictures)
    assert difference(networks.edit(pictures[order], codes, None), expected) <= 1
    assert sizes == [3]


def test_only_the_new_pictures_of_a_batch_are_encoded(networks: Engine, monkeypatch: pytest.MonkeyPatch):
    pictures, codes = crops(4), networks.motion_codes(crops(3, seed=1))
    expected = networks.edit(pictures[[3, 1, 2]], codes, None)
    networks.forget()
    sizes = count_calls(monkeypatch, networks, "encode")
    networks.motion_codes(pictures[:3])
    assert difference(networks.edit(pictures[[3, 1, 2]], codes, None), expected) <= 1
    assert sizes == [3, 1]


def test_equal_crops_with_equal_codes_are_drawn_once(networks: Engine, monkeypatch: pytest.MonkeyPatch):
    pictures, codes = crops(2), networks.motion_codes(crops(2, seed=1))
    expected = networks.edit(pictures, codes, None)
    networks.forget()
    sizes = count_calls(monkeypatch, networks, "transfer_expression")
    again = networks.edit(pictures[[0, 0, 1, 1]], codes[[0, 0, 1, 0]], None)
    assert difference(again[[0, 1, 2]], expected[[0, 0, 1]]) <= 1
    assert difference(again[3], expected[1]) > 10  # the same crop with another code is another picture
    assert difference(networks.edit(pictures[[1]], codes[[1]], None), expected[[1]]) <= 1
    assert sizes == [3]


def test_an_expression_that_holds_is_drawn_once_under_a_pose_that_moves(
    networks: Engine, monkeypatch: pytest.MonkeyPatch
):
    still, codes = np.repeat(crops(1), 5, 0), networks.motion_codes(crops(5, seed=1))
    held = np.repeat(codes[:1], 5, 0)
    one_by_one = [networks.edit(still[:1], held[:1], codes[row : row + 1]) for row in range(5)]
    networks.forget()
    sizes = count_calls(monkeypatch, networks, "transfer_expression")
    assert difference(networks.edit(still, held, codes), np.concatenate(one_by_one)) <= 1
    assert sizes == [1]


def test_every_level_of_a_picture_survives_the_way_through_a_tensor():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = to_tensor(levels, CPU)
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_array_equal(to_pictures(tensor), levels)


def test_pictures_are_clamped_and_rounded():
    values = torch.tensor([-3.0, 3, 0.499 / 127.5, 0.501 / 127.5]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    np.testing.assert_array_equal(to_pictures(values)[0, ..., 0], [[0, 255], [128, 128]])
    assert to_pictures(torch.full((1, 3, 1, 1), -1 + 0.6 / 127.5)).max() == 1


def test_arguments_that_do_not_fit_are_refused(networks: Engine):
    codes = np.zeros((2, 20), np.float32)
    with pytest.raises(ValueError, match="neither"):
        networks.edit(crops(2), None, None)
    with pytest.raises(ValueError, match="do not go with"):
        networks.edit(crops(3), codes, None)
    with pytest.raises(ValueError, match=r"\(N, 64, 64, 3\)"):
        networks.motion_codes(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        networks.edit(crops(2).astype(np.float32), codes, None)


def test_read_only_and_strided_arrays_are_taken(networks: Engine):
    pictures = crops(4)
    codes = networks.motion_codes(pictures)
    pictures.flags.writeable = False
    np.testing.assert_allclose(networks.motion_codes(pictures[::-1]), codes[::-1], rtol=1e-3, atol=1e-5)


def test_the_description_is_ready_for_json(networks: Engine, file: Path):
    assert networks.description == {
        "weights": str(file), "sha256": weights.digest(file), "size": SIZE, "codes": "encoder",
        "reader": None, "retouch": None, "matte": None, "device": "cpu", "precision": "fp32", "backend": "torch",
        "batch_size": 3,
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_come_close_to_thirty_two(file: Path, networks: Engine, precision: str):
    other = Engine(file, device="cpu", precision=precision)
    pictures = crops(2)
    codes = networks.motion_codes(pictures)
    np.testing.assert_allclose(other.motion_codes(pictures), codes, atol=0.1 * np.abs(codes).max())
    exact = networks.edit(pictures, codes, None).astype(float)
    assert np.abs(other.edit(pictures, codes, None) - exact).mean() < 3
    assert other.description["precision"] == precision


def test_where_sixteen_bits_overflow_the_rest_is_done_in_thirty_two(file: Path, networks: Engine):
    other = Engine(file, device="cpu", precision="fp16")
    with torch.no_grad():
        for one in (networks, other):
            one.networks.encoder.first.weight.mul_(1e6)  # far beyond 65504, the largest half
    expected = networks.motion_codes(crops(2))
    np.testing.assert_allclose(other.motion_codes(crops(2)), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert other.description["precision"] == "fp32"


def test_weights_that_compute_nonsense_are_reported(networks: Engine):
    with torch.no_grad():
        networks.networks.encoder.first.weight.fill_(3e38)
    with pytest.raises(WeightsError, match="not numbers"):
        networks.motion_codes(crops(1))


# Memory, with a stand-in for a GPU's: what is larger than `limit` does not fit


def small_memory(networks: Engine, monkeypatch: pytest.MonkeyPatch, limit: int, error: Exception) -> list[int]:
    """Batches above `limit` crops raise `error`; gives the sizes that were tried."""
    sizes, original = [], networks.networks.encode

    def encode(batch: torch.Tensor) -> object:
        sizes.append(len(batch))
        if len(batch) > limit:
            raise error
        return original(batch)

    monkeypatch.setattr(networks.networks, "encode", encode)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
    ids=["cuda", "mps", "cpu", "cudnn", "python"],
)
def test_a_batch_too_large_for_the_memory_is_halved(file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    networks = Engine(file, device="cpu", batch_size=8)
    expected = networks.motion_codes(crops(10))
    networks.forget()
    sizes = small_memory(networks, monkeypatch, 3, error)
    read = [told.code for told in networks.read(crops(10))]  # as jobs do, outside of an edit
    np.testing.assert_allclose(np.stack(read), expected, rtol=1e-3, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert networks.description["batch_size"] == 2  # and it stays so


def test_a_single_crop_too_large_for_the_memory_is_a_device_error(networks: Engine, monkeypatch: pytest.MonkeyPatch):
    small_memory(networks, monkeypatch, 0, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceError, match="too small for a single 64 x 64 crop; close other programs"):
        networks.motion_codes(crops(3))


def test_other_errors_of_torch_are_not_taken_for_memory(networks: Engine, monkeypatch: pytest.MonkeyPatch):
    small_memory(networks, monkeypatch, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        networks.motion_codes(crops(1))


# Devices and precisions


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    """As if there were this many CUDA GPUs, and no Apple one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_cuda_before_mps_before_the_cpu(monkeypatch: pytest.MonkeyPatch):
    pretend_gpus(monkeypatch, 1)
    assert str(choose_device("auto")) == "cuda"
    pretend_gpus(monkeypatch, 0)
    assert str(choose_device("auto")) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(choose_device("auto")) == "mps"


def test_a_gpu_can_be_chosen_by_number(monkeypatch: pytest.MonkeyPatch):
    pretend_gpus(monkeypatch, 2)
    assert str(choose_device("cuda:1")) == "cuda:1"


@pytest.mark.parametrize(
    ("name", "gpus", "words"),
    [
        ("cuda", 0, "cuda is not available.*use --device cpu"),
        ("cuda:0", 0, "cuda:0 is not available.*use --device cpu"),
        ("cuda:3", 1, "cuda:3 does not exist: the only GPU is cuda:0"),
        ("cuda:2", 2, "cuda:2 does not exist: the GPUs are cuda:0 to cuda:1"),
        ("mps", 0, "mps is not available.*--device auto"),
        ("tpu", 0, "there is no device tpu; use auto, cpu"),
        ("cuda:x", 1, "there is no device cuda:x"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, words: str
):
    pretend_gpus(monkeypatch, gpus)
    with pytest.raises(DeviceError, match=words):
        choose_device(name)


def test_auto_precision_suits_the_device(monkeypatch: pytest.MonkeyPatch):
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    pretend_gpus(monkeypatch, 1)
    assert choose_precision("auto", torch.device("cuda")) == "bf16"
    pretend_gpus(monkeypatch, 1, capability=(7, 5))
    assert choose_precision("auto", torch.device("cuda")) == "fp16"
    assert choose_precision("fp32", torch.device("cuda")) == "fp32"
    with pytest.raises(DeviceError, match="there is no precision int4"):
        choose_precision("int4", CPU)
    with pytest.raises(DeviceError, match="int8 is for CPUs"):
        choose_precision("int8", torch.device("cuda"))


def test_minimal_filtering_is_for_float32(file: Path):
    filters = [
        {type(part).__name__ for part in Engine(file, device="cpu", precision=precision).networks.modules()}
        for precision in ("fp32", "bf16")
    ]
    assert ["WinogradConvolution" in kinds for kinds in filters] == [True, False]


def test_what_a_device_refuses_at_the_start_is_a_device_error(file: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(engine, "build", refuse)
    with pytest.raises(DeviceError, match=r"cpu cannot be used: CUDA error: no kernel .* device; use --device cpu"):
        Engine(file, device="cpu")


@pytest.mark.parametrize(
    ("config", "free_gib", "size"),
    [
        (DPEConfig.full(), 139, 32),
        (DPEConfig.full(), 2, 4),
        (DPEConfig.full(), 0.01, 1),
        (DPEConfig.compact(), 2, 16),
        (DPEConfig.compact(), 8, 32),
    ],
    ids=str,
)
def test_a_gpus_free_memory_decides_how_many_crops_go_at_once(
    monkeypatch: pytest.MonkeyPatch, config: DPEConfig, free_gib: float, size: int
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 2**40))
    assert choose_batch_size(torch.device("cuda"), config) == size
    assert choose_batch_size(torch.device("cuda"), config, lanes=4) == max(1, size // 4)
    assert choose_batch_size(CPU, config) == choose_batch_size(CPU, config, lanes=2) == BATCH_SIZES["cpu"]


def test_arrays_come_back_from_the_device_as_they_went():
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)[::-1, :, ::2]
    array.flags.writeable = False
    there = sent(array, torch.float32, CPU)
    assert there.dtype == torch.float32 and there.is_contiguous()
    np.testing.assert_array_equal(fetched(there), array)


# What needs a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@on_gpu
@pytest.mark.parametrize(("precision", "mean"), [("fp32", 0.05), ("auto", 3), ("fp16", 3)])
def test_a_gpu_draws_the_same_pictures(file: Path, networks: Engine, precision: str, mean: float):
    gpu = Engine(file, device="cuda", precision=precision)
    pictures = crops(5)
    codes = networks.motion_codes(pictures)
    exact = networks.edit(pictures, codes, codes).astype(float)
    assert np.abs(gpu.edit(pictures, codes, codes) - exact).mean() < mean
    assert gpu.description["device"].startswith("cuda")


@on_gpu
def test_batches_in_quick_succession_do_not_mix(file: Path):
    gpu = Engine(file, device="cuda", precision="fp32", batch_size=2)
    pictures = crops(40)
    at_once = gpu.motion_codes(pictures)
    one_by_one = np.concatenate([gpu.motion_codes(pictures[n : n + 2]) for n in range(0, 40, 2)])
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-3, atol=1e-5)
    sent_back = [fetched(sent(picture, torch.uint8, gpu.device)) for picture in pictures]
    np.testing.assert_array_equal(np.stack(sent_back), pictures)


@on_gpu
def test_a_batch_too_large_for_a_gpu_is_halved(file: Path, networks: Engine):
    gpu = Engine(file, device="cuda", precision="fp32", batch_size=1024)
    pictures = np.concatenate([crops(64)] * 16)
    total = torch.cuda.get_device_properties(gpu.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        codes = gpu.motion_codes(pictures + np.arange(16, dtype=np.uint8).repeat(64)[:, None, None, None])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert gpu.batch_size < 1024 and len(codes) == 1024
    np.testing.assert_allclose(codes[:4], networks.motion_codes(pictures[:4]), rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept():
    import resource

    def fresh_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        len(b"x" * 2**26)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_memory()
    fresh_pages()
    assert fresh_pages() < 1000  # of 16384
