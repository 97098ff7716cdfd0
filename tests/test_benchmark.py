"""The benchmark: that it counts, finds and measures what it says; how fast is the machine's business."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dpe_cli import benchmark, roofline
from dpe_cli.benchmark import Choice
from dpe_cli.drawn import DrawnFaces, drawn
from dpe_cli.engine import Engine
from dpe_cli.main import cli
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.roofline import count_work
from dpe_cli.weights import save


class Blind:
    """A detector that finds nothing."""

    name = "blind"
    seen = 0

    def detect(self, rgb: np.ndarray) -> list:
        self.seen += 1
        return []


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choice:
    """Tiny networks, a blind detector and short measurements."""
    torch.manual_seed(0)
    config = DPEConfig(64, {4: 16, 8: 16, 16: 16, 32: 8, 64: 8}, latent_dim=32)
    save(tmp_path / "small.safetensors", DPE(config).state_dict(), config)
    monkeypatch.setattr(roofline, "REPEATS", 1)
    monkeypatch.setattr(roofline, "MATRIX", {"cpu": 128})
    monkeypatch.setattr(roofline, "BLOCK", {"cpu": 1024})
    monkeypatch.setattr(benchmark, "make_detector", lambda name, models: Blind())
    monkeypatch.setattr(benchmark, "GROWTH", (8, 12))
    monkeypatch.setattr(benchmark, "GROWTH_LENGTHS", (8, 10))
    monkeypatch.setattr(benchmark, "FACES", (1, 3))
    monkeypatch.setattr(benchmark, "SIZES", {"360p": (640, 360), "1080p": (960, 540)})
    monkeypatch.setattr(benchmark, "RUNTIMES", (("torch", "fp32"), ("onnx", "int8")))
    monkeypatch.setenv("DPE_CACHE", str(tmp_path / "cache"))
    # In this process: a new one takes seconds.
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: function(*arguments))
    return Choice(str(tmp_path / "small.safetensors"), device="cpu")


def test_the_work_of_the_papers_networks_is_counted():
    work = {name: gflop for name, (gflop, _) in count_work(DPEConfig.full(), 1).items()}
    assert work["encode-source"] == pytest.approx(31.2, rel=0.02)  # its blurs compute what a stride then drops
    assert work["generate exp"] == pytest.approx(30.1, rel=0.02)
    both = work["encode-source"] + work["encode-driving"] + work["generate both"]
    assert both == pytest.approx(153.9, rel=0.02)


def test_the_work_of_a_frame_does_not_depend_on_the_batch_but_for_the_weights():
    one, four = count_work(DPEConfig.compact(64), 1), count_work(DPEConfig.compact(64), 4)
    for name, (gflop, gigabytes) in one.items():
        assert four[name][0] == pytest.approx(gflop, rel=1e-3)
        assert gigabytes / 4 < four[name][1] < gigabytes  # the weights are read once for four frames


def test_the_drawn_face_is_found_whatever_the_detector_makes_of_it():
    blind = Blind()
    for size in benchmark.SIZES.values():
        (face,) = DrawnFaces(blind).detect(drawn(size, 0.0))
        width, height = size
        assert face.box.centre == pytest.approx((width / 2, height / 2), abs=0.01 * width)
        assert face.box.width == pytest.approx(0.32 * height, rel=0.1)
    assert blind.seen == len(benchmark.SIZES)
    assert DrawnFaces(blind).detect(drawn((640, 360), 0.0)[:, :150]) == []


def test_several_drawn_faces_are_found_each():
    faces = DrawnFaces(Blind()).detect(drawn((640, 360), 0.0, 4))
    centres = [face.box.centre for face in faces]
    np.testing.assert_allclose(centres, [(80, 180), (240, 180), (400, 180), (560, 180)], atol=6)
    assert all(face.box.width == pytest.approx(0.32 * 360, rel=0.1) for face in faces)


@torch.inference_mode()
def test_the_straightforward_form_draws_the_same():
    torch.manual_seed(0)
    networks = DPE(DPEConfig(32, {4: 16, 8: 16, 16: 8, 32: 8}, latent_dim=32)).eval()
    for name, parameter in networks.named_parameters():
        if name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    picture, code = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 20)
    forms = [roofline.uses_of(form, picture, code) for form in (networks, roofline.straightforward(networks))]
    for name in forms[0]:
        torch.testing.assert_close(forms[1][name](), forms[0][name](), rtol=1e-3, atol=1e-4, msg=name)


def test_networks_of_the_papers_width_are_measured(quick: Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = DPEConfig(64, {4: 16, 8: 16, 16: 16, 32: 8, 64: 8}, latent_dim=32)
    monkeypatch.setattr(benchmark.DPEConfig, "full", lambda: small)
    rows = benchmark.measure_full(quick, tmp_path, {"matrix_gflops": 100.0, "memory_gb_per_s": 10.0})
    ms = {row["use"]: row["straightforward_ms"] for row in rows}
    assert ms["all of exp"] == pytest.approx(ms["encode-source"] + ms["encode-driving"] + ms["generate exp"], abs=0.02)
    assert all(row["ms"] > 0 for row in rows)


def test_our_own_networks_are_stages_where_an_engine_has_them(quick: Choice):
    engine = Engine(device="cpu", batch_size=2)
    stages = benchmark.small_networks(engine, np.zeros((3, 256, 256, 3), np.uint8))
    assert [*stages] == ["landmarks", "mesh", "retouch", "matte"]
    for stage in stages.values():
        stage()
    assert not benchmark.small_networks(quick.engine(), np.zeros((1, 64, 64, 3), np.uint8))


def test_everything_is_measured(quick: Choice):
    said = []
    result = benchmark.benchmark(quick, ["360p"], ["exp", "both"], ["video", "still"], 8, said.append, True, True)
    json.dumps(result)
    ms = {row["use"]: row["ms"] for row in result["networks"]}
    assert [*ms][:2] == ["encode-source", "encode-driving"]
    parts = ms["encode-source"] + ms["encode-driving"] + ms["generate exp"]
    assert ms["all of exp"] == pytest.approx(parts, abs=0.02)
    assert all(row["ms"] > 0 and row["of_matrix_rate"] > 0 for row in result["networks"])
    (stages,) = result["stages"]
    assert stages.keys() == {"size", "decode", "detect", "crop", "paste", "encode"}
    assert all(value > 0 for name, value in stages.items() if name != "size")
    runs = [(run["source"], run["mode"], run["frames"]) for run in result["runs"]]
    assert runs == [(source, mode, 8) for source in ("video", "still") for mode in ("exp", "both")]
    assert all(
        run["cpu_s"] > 0 and run["fps"] == pytest.approx(8 / run["seconds"], rel=0.1, abs=0.06)
        for run in result["runs"]
    )
    assert len(said) == 1 + 1 + 4 + 1 + 1 + 2 + 3 * 2
    assert all(run["largest_share"].endswith(" ms") for run in result["runs"])
    assert result["start"].keys() == {"help_s", "two_frames_s"} and all(result["start"].values())
    exact, eight = result["runtimes"]
    assert exact["psnr_db"] is None and 20 < eight["psnr_db"] < 90
    growth = result["growth"]
    assert [run["frames"] for run in growth["frames"]] == [8, 12]
    cases = [(row["size"], row["faces"]) for row in growth["sizes_and_faces"]]
    assert cases == [("360p", 1), ("1080p", 1), ("360p", 3)]
    assert [row["one_more"] for row in growth["constants"]] == ["frame", "megapixel of a frame", "face in a frame"]


def test_constants_of_growth_are_the_slopes(quick: Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "draw_clip", lambda path, size, frames, faces: write(path, size, frames))
    monkeypatch.setattr(benchmark, "measure_run", costs)
    growth = benchmark.measure_growth(quick, tmp_path, tmp_path / "driving.mp4", lambda message: None)
    ms = {row["one_more"]: (row["ms"], row["kib"]) for row in growth["constants"]}
    assert ms["frame"] == pytest.approx((20 + 40 * 0.23, 0), abs=0.05)
    assert ms["megapixel of a frame"][0] == pytest.approx(40, rel=0.05)
    assert ms["face in a frame"] == pytest.approx((20, 5 * 1024), abs=0.05)


def write(path: Path, size: tuple[int, int], frames: int) -> Path:
    path.write_text(f"{size[0] * size[1] / 1e6} {frames}")
    return path


def costs(choice: Choice, source: Path, driving: Path, mode: str) -> dict[str, float]:
    """A run that takes 2 s, and for each frame 20 ms a face and 40 a megapixel; 100 MiB and 5 a face."""
    megapixels, frames = map(float, source.read_text().split())
    seconds = 2 + frames * (0.02 * choice.faces + 0.04 * megapixels)
    return {"frames": int(frames), "seconds": seconds, "peak_mib": 100 + 5 * choice.faces}


def test_what_takes_the_most_time_of_a_run_is_named():
    networks = [
        {"use": use, "ms": ms} for use, ms in (("encode-source", 90), ("encode-driving", 30), ("generate exp", 40))
    ]
    stages = {"size": "360p", "decode": 1.0, "encode": 60.4}
    assert benchmark.largest_share(networks, stages, "video", "exp") == "encode-source, 90 ms"
    assert benchmark.largest_share(networks, stages, "still", "exp") == "encode, 60 ms"


def test_a_run_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "run_whole", peak_here)
    here = np.zeros(2**28, np.uint8) + 1  # 256 MiB that the other process does not have
    there = benchmark.measure_run(Choice(), tmp_path, tmp_path, "exp")
    assert there is None or there < benchmark.peak_memory() - 200
    assert here[0] == 1


def peak_here(*_: object) -> float | None:
    return benchmark.peak_memory()


def test_what_is_waited_for_is_the_device_that_is_measured(monkeypatch: pytest.MonkeyPatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *devices: waited.append(devices))
    roofline.synchroniser(torch.device("cuda:1"))()
    roofline.synchroniser(torch.device("cpu"))()
    assert waited == [(torch.device("cuda:1"),)]


def test_the_command_prints_tables_or_json(quick: Choice):
    arguments = ["benchmark", "--size", "360p", "--frames", "8", "--weights", quick.weights, "--device", "cpu"]
    tables = CliRunner().invoke(cli, arguments)
    assert tables.exit_code == 0, tables.stderr
    for words in ("GFLOP/s in matrix products", "generate both", "decode", "peak mib", "faces: blind", "help s"):
        assert words in tables.stdout
    assert "measuring whole runs at 360p: video, exp" in tables.stderr
    machine = json.loads(CliRunner().invoke(cli, [*arguments, "--json", "-q"]).stdout)["machine"]
    assert machine["matrix_gflops"] > 0 and machine["cores"] >= 1
