"""How fast this machine edits: each stage alone, the networks against what the machine can do, and whole runs.

Clips are drawn, so that results from different machines compare and nothing has to be there. Every time is wall time;
of repeated measurements the best counts, since other programs only ever add.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dpe_cli.crop import cut
from dpe_cli.drawn import FPS, DrawnFaces, draw_clip, drawn
from dpe_cli.edit import edit_video
from dpe_cli.engine import Engine, to_tensor
from dpe_cli.face import FaceDetector, make_detector
from dpe_cli.landmarks import BLENDSHAPES, FaceShape
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.motion_space import MOTION_DIM, POSE_DIM
from dpe_cli.paste import make_paster
from dpe_cli.people import track_faces
from dpe_cli.report import peak_memory
from dpe_cli.request import Driving, Edit, Edits, EditSettings
from dpe_cli.roofline import best, measure_machine, measure_networks, measure_straightforward, with_sums
from dpe_cli.video import Frame, VideoInfo, probe, read_frames
from dpe_cli.weights import save
from dpe_cli.writer import write_image, write_video

SIZES = {"360p": (640, 360), "1080p": (1920, 1080), "2160p": (3840, 2160)}  # width, height
SOURCES = ("video", "still")
HELD = 8  # different frames that are kept in memory for a stage
GROWTH = (100, 1000, 5000)  # frames
GROWTH_LENGTHS = (40, 120)  # frames of the two runs that tell what a further frame takes
FACES = (1, 2, 4)  # that are edited in a frame
# What may run the networks on a CPU, the one that the others are compared with first.
RUNTIMES = (("torch", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("onnx", "int8"), ("openvino", "int8"))
PEAK = 255.0  # of the pictures whose PSNR is taken


@dataclass(frozen=True)
class Choice:
    """What edits: options of `Engine` and of `make_detector`; `faces`: how many are drawn in a frame, and edited."""

    weights: str | None = None
    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    batch_size: int | None = None
    detector: str = "auto"
    face_models: Path | None = None
    faces: int = 1

    def engine(self) -> Engine:
        chosen = {"device": self.device, "precision": self.precision, "backend": self.backend}
        return Engine(self.weights, batch_size=self.batch_size, **chosen)

    def finder(self) -> "DrawnFaces":
        return DrawnFaces(make_detector(self.detector, self.face_models))


def benchmark(
    choice: Choice,
    sizes: Iterable[str] = tuple(SIZES),
    modes: Iterable[str] = ("exp",),
    sources: Iterable[str] = ("video",),
    frames: int = 50,
    say: Callable[[str], None] = lambda message: None,
    compare: bool = False,
    growth: bool = False,
    full: bool = False,
) -> dict[str, Any]:
    """Measures all of it; ready for JSON. `frames`: of each clip. `compare`: also the other runtimes; `growth`: also
    clips of GROWTH frames, of all SIZES, of FACES faces; `full`: also networks at the paper's width. Raises what
    `Engine` and `make_detector` do.
    """
    engine, detector = choice.engine(), choice.finder()
    say("the machine and the networks")
    machine = measure_machine(engine)
    result: dict[str, Any] = {
        "machine": machine,
        "engine": engine.description,
        "detector": detector.name,
        "frames": frames,
        "networks": measure_networks(engine, machine),
        "stages": [],
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="dpe-benchmark-") as name:
        folder = Path(name)
        driving = draw_clip(folder / "driving.mp4", SIZES["360p"], frames, phase=0.3)
        for size in sizes:
            source = draw_clip(folder / f"{size}.mp4", SIZES[size], frames)
            still = folder / f"{size}.png"
            write_image(still, next(read_frames(source)).rgb)
            say(f"the stages at {size}")
            result["stages"].append({"size": size, **measure_stages(source, engine, detector)})
            for kind in sources:
                for mode in modes:
                    say(f"whole runs at {size}: {kind}, {mode}")
                    file = still if kind == "still" else source
                    run = measure_run(choice, file, driving, mode)
                    largest = largest_share(result["networks"], result["stages"][-1], kind, mode)
                    result["runs"].append({"size": size, "source": kind, "mode": mode, **run, "largest_share": largest})
        say("the start")
        result["start"] = measure_start(choice, folder)
        if compare:
            say("other runtimes")
            result["runtimes"] = measure_runtimes(choice)
        if full:
            say("networks at the paper's width")
            result["full_networks"] = measure_full(choice, folder, machine)
        if growth:
            result["growth"] = measure_growth(choice, folder, driving, say)
    return result


def largest_share(networks: list[dict[str, Any]], stages: dict[str, Any], kind: str, mode: str) -> str:
    """What a run spends the most time of a frame with, and that time: for instance "encode-driving, 24 ms"."""
    ms = {row["use"]: row["ms"] for row in networks}
    done = {name: value for name, value in stages.items() if name != "size"}
    done |= {use: ms[use] for use in ("encode-driving", f"generate {mode}")}
    if kind == "video":
        done["encode-source"] = ms["encode-source"]
    name = max(done, key=done.get)
    return f"{name}, {done[name]:.0f} ms"


def measure_start(choice: Choice, folder: Path) -> dict[str, float]:
    """Seconds of `dpe --help`, and of an edit of a clip of two frames by a picture, each in a new process."""

    def ask() -> None:
        subprocess.run([sys.executable, "-m", "dpe_cli", "--help"], capture_output=True, check=True)

    picture = folder / "start.png"
    write_image(picture, drawn(SIZES["360p"], 0.0))
    clip = draw_clip(folder / "start.mp4", SIZES["360p"], 2)
    started = time.perf_counter()
    measure_run(choice, clip, picture, "exp")
    return {"two_frames_s": round(time.perf_counter() - started, 2), "help_s": round(best(ask, 3), 2)}


def measure_runtimes(choice: Choice) -> list[dict[str, Any]]:
    """Milliseconds a frame of `exp` in each runtime that is here, and how near its pictures come to float32."""
    rows: list[dict[str, Any]] = []
    exact = None
    for backend, precision in RUNTIMES:
        if backend == "openvino" and find_spec("openvino") is None:
            continue
        engine = replace(choice, device="cpu", backend=backend, precision=precision, batch_size=1).engine()
        crops = np.stack([drawn((engine.size, engine.size), n / HELD) for n in range(HELD)])
        codes = engine.motion_codes(crops)
        pictures = engine.edit(crops, codes[::-1], None).astype(float)
        exact = pictures if exact is None else exact
        error = float(np.square(pictures - exact).mean())
        networks, picture = engine.networks, to_tensor(crops[:1], engine.device)
        with torch.inference_mode():
            source, code = networks.encode(picture), engine.to_device(codes[1:2])
            encoding = best(lambda networks=networks, picture=picture: networks.encode(picture))
            drawing = best(lambda networks=networks, got=(source, code): networks.transfer_expression(*got))
        psnr = round(float(10 * np.log10(PEAK**2 / error)), 1) if error else None
        row = {"backend": backend, "precision": precision, "encode_ms": round(1000 * encoding, 1)}
        row |= {"generate_ms": round(1000 * drawing, 1), "moving_source_ms": round(1000 * (2 * encoding + drawing), 1)}
        rows.append(row | {"psnr_db": psnr})
    return rows


def measure_growth(choice: Choice, folder: Path, driving: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Whole runs of longer clips at 360p, of larger pictures, and of more faces; what one more of each takes.

    Time is that of a further frame, without what a run takes once; memory is the whole run's peak.
    """

    def run(size: str, faces: int, frames: int) -> dict[str, Any]:
        say(f"a run of {frames} frames at {size}, {faces} edited in each")
        source = draw_clip(folder / "growth.mp4", SIZES[size], frames, faces=faces)
        try:
            return measure_run(replace(choice, faces=faces), source, driving, "exp")
        finally:
            source.unlink()

    longer = [run("360p", 1, frames) for frames in GROWTH]
    larger = []
    for size, faces in [(size, 1) for size in SIZES] + [("360p", faces) for faces in FACES[1:]]:
        runs = [run(size, faces, frames) for frames in GROWTH_LENGTHS]
        seconds = [one["seconds"] for one in runs]
        row = {"size": size, "megapixels": round(np.prod(SIZES[size]) / 1e6, 2), "faces": faces}
        row["ms_a_frame"] = round(1000 * per_unit(GROWTH_LENGTHS, seconds), 1)
        larger.append(row | {"peak_mib": runs[-1]["peak_mib"]})
    series = {
        "frame": ("frames", [(1000 * row["seconds"], row) for row in longer]),
        "megapixel of a frame": ("megapixels", [(row["ms_a_frame"], row) for row in larger if row["faces"] == 1]),
        "face in a frame": ("faces", [(row["ms_a_frame"], row) for row in larger if row["size"] == "360p"]),
    }
    constants = []
    for what, (unit, rows) in series.items():
        units = [row[unit] for _, row in rows]
        ms = per_unit(units, [value for value, _ in rows])
        mib = per_unit(units, [row["peak_mib"] or 0 for _, row in rows])
        constants.append({"one_more": what, "ms": round(ms, 2), "kib": round(1024 * mib, 2)})
    return {"frames": longer, "sizes_and_faces": larger, "constants": constants}


def per_unit(units: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line that fits the values best."""
    return float(np.polyfit(units, values, 1)[0])


def measure_full(choice: Choice, folder: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of networks at the paper's width, with random weights, and the straightforward form's milliseconds."""
    config, file = DPEConfig.full(), folder / "full.safetensors"
    torch.manual_seed(0)
    save(file, DPE(config).state_dict(), config)
    engine = replace(choice, weights=str(file)).engine()
    rows = measure_networks(engine, machine)
    with patch.dict(os.environ, THP_MEM_ALLOC_ENABLE="0"):
        times = with_sums(in_own_process(measure_straightforward, config, engine.device))
    return [row | {"straightforward_ms": round(1000 * times[row["use"]], 2)} for row in rows]


# The stages around them


def measure_stages(source: Path, engine: Engine, detector: FaceDetector) -> dict[str, float]:
    """Milliseconds a frame of each stage of an edit but the paper's networks, each alone."""
    info = probe(source)
    held = list(islice(read_frames(source), HELD))
    count = len(held)
    faces = [detection for _, detection in track_faces(held, detector, "largest")]
    boxes = [face.box for face in faces if face is not None]
    crops = [cut(frame.rgb, box, engine.size) for frame, box in zip(held, boxes, strict=True)]
    pictures = np.stack([crop for crop, _ in crops])
    paster = make_paster(engine.size, detector)

    x, y = np.meshgrid(*[np.arange(1, engine.size, 2, dtype=np.float32)] * 2)
    from_left = np.dstack([x - 2, y, np.ones_like(x)])  # see `Engine.carried`

    def paste() -> None:
        for frame, box, (crop, _) in zip(held, boxes, crops, strict=True):
            paster.paste(frame.rgb, box, crop, np.roll(crop, 2, 1), float(frame.time), 0, from_left)

    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        target = Path(folder) / "out.mp4"
        stages: dict[str, tuple[Callable[[], object], int]] = {
            "decode": (lambda: drain(read_frames(source)), info.n_frames),
            "detect": (lambda: drain(track_faces(held, detector, "largest")), count),
            "crop": (lambda: [cut(frame.rgb, box, engine.size) for frame, box in zip(held, boxes, strict=True)], count),
            **{name: (stage, count) for name, stage in small_networks(engine, pictures).items()},
            "paste": (paste, count),
            "encode": (lambda: write_video(repeated(held, info), info, target, overwrite=True), info.n_frames),
        }
        return {name: round(1000 * best(stage, 2) / frames, 2) for name, (stage, frames) in stages.items()}


def small_networks(engine: Engine, crops: np.ndarray) -> dict[str, Callable[[], object]]:
    """What our own networks do beside the paper's, where an engine has them, to crops."""
    parts = [crops[row : row + engine.batch_size] for row in range(0, len(crops), engine.batch_size)]
    stages: dict[str, Callable[[], object]] = {}
    if engine.measured:
        landmarks = engine.measured.landmarks
        stages["landmarks"] = lambda: [landmarks.detect_batch(part) for part in parts]
    if engine.retoucher:
        still = np.zeros((len(crops), MOTION_DIM))
        middle = [engine.size / 2, engine.size / 2, 0]
        usual = FaceShape(engine.measured.space.template * (0.37 * engine.size) + middle, np.zeros(len(BLENDSHAPES)))

        def retouch(part: np.ndarray) -> None:
            codes = still[: len(part), POSE_DIM:]
            engine.retoucher.looked_at(part, part, [usual] * len(part), codes, 1 + codes, engine.expression_of)

        def carry(part: np.ndarray) -> None:
            codes = still[: len(part)]
            engine.mesh.turned(part, part, [usual] * len(part), codes, 1 + codes)

        stages["mesh"] = lambda: [carry(part) for part in parts]
        stages["retouch"] = lambda: [retouch(part) for part in parts]
        stages["matte"] = lambda: [engine.matte.persons(part) for part in parts]
    return stages


def drain(items: Iterable[object]) -> None:
    """Takes all of them and keeps none."""
    for _ in items:
        pass


def repeated(held: list[Frame], info: VideoInfo) -> Iterator[Frame]:
    """A clip of as many frames as `info` says from a few."""
    for number, frame in enumerate(islice(cycle(held), info.n_frames)):
        yield Frame(number, number / FPS, frame.rgb)


# Whole runs


def measure_run(choice: Choice, source: Path, driving: Path, mode: str) -> dict[str, Any]:
    """A whole edit in a process of its own: seconds, CPU seconds and peak memory belong to it alone."""
    return in_own_process(run_whole, choice, source, driving, mode)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of this module gives in a new process."""
    context = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory and threads
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def run_whole(choice: Choice, source: Path, driving: Path, mode: str) -> dict[str, Any]:
    """Edits, and tells what it took. The CPU time of the encoding program is included, its memory is not."""
    started, used = time.perf_counter(), sum(os.times()[:4])
    engine, detector = choice.engine(), choice.finder()
    ready = time.perf_counter()
    driver = Driving(None if mode == "pose" else driving, None if mode == "exp" else driving)
    output = source.parent / f"out_{mode}.mp4"
    if choice.faces > 1:
        driver = Edits(tuple(Edit(driver, str(number)) for number in range(choice.faces)))
    report = edit_video(source, driver, output, engine, detector, EditSettings(overwrite=True))
    seconds = time.perf_counter() - ready
    output.unlink()
    frames = report.output["frames"]
    return {
        "frames": frames,
        "load_s": round(ready - started, 2),
        "seconds": round(seconds, 2),
        "ms": round(1000 * seconds / frames, 1),
        "fps": round(frames / seconds, 2),
        "cpu_s": round(sum(os.times()[:4]) - used, 2),
        "peak_mib": peak_memory(),
    }
