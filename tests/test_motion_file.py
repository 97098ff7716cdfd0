"""Motion files: what is in them, that an edit by one equals an edit by its video, and what a wrong one says."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from test_cli import astronaut, run, small_weights
from test_edit import ColourDetector, ColourEngine, clip, picture

from dpe_cli import edit, request
from dpe_cli.drivings import extract_motion, motion_of
from dpe_cli.edit import edit_video
from dpe_cli.errors import InputError, OutputError, WeightsError
from dpe_cli.motion import Curve
from dpe_cli.motion_file import probe_driving, read_motion
from dpe_cli.request import Driving, EditSettings
from dpe_cli.video import Frame, VideoInfo, probe, read_frames
from dpe_cli.writer import write_image, write_video

__all__ = ["small_weights"]  # a fixture
WEIGHTS = "ab" * 32


class HashedEngine(ColourEngine):
    """The stand-in, with weights that have a hash."""

    def __init__(self, weights: str = WEIGHTS):
        super().__init__(3)
        self.description = {"weights": "folder/stand-in", "sha256": weights, "precision": "fp32"}

    def shifts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(codes, 2, 1), -np.repeat(codes, 2, 1)


def driving_clip(path: Path, count: int = 12, fps: Fraction = Fraction(30000, 1001)) -> Path:
    """A green face that moves, changes colour and is away in frame 5, from 1/2 s on."""

    def rgb(n: int) -> np.ndarray:
        return np.roll(picture(n != 5, colour=(20 + 5 * n, 220 - 4 * n, 30 + 3 * n)), n, axis=1)

    frames = (Frame(n, Fraction(1, 2) + n / fps, rgb(n)) for n in range(count))
    write_video(frames, VideoInfo(path, 160, 120, fps, count, time_base=1 / (fps * 1000)), path, crf=1)
    return path


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A driving video, and its motion file."""
    video, motion = driving_clip(tmp_path / "d.mp4"), tmp_path / "motion.safetensors"
    extract_motion(video, motion, HashedEngine(), ColourDetector())
    return video, motion


def everything(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def frames_of(monkeypatch: pytest.MonkeyPatch, source: Path, driving: Path, output: Path, **settings: Any) -> list:
    """Times and pixels that go to the encoder."""
    seen, write = [], edit.write_video

    def watched(frames, *arguments, **options):
        def watching():
            for frame in frames:
                seen.append((frame.time, frame.rgb.copy()))
                yield frame

        return write(watching(), *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(edit, "write_video", watched)
        edit_video(source, Driving(driving), output, HashedEngine(), ColourDetector(), EditSettings(**settings))
    return seen


def test_a_motion_file_holds_what_its_schema_says(made: tuple[Path, Path]):
    video, motion = made
    tensors, metadata = everything(motion)
    shapes = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    assert shapes == {
        "ticks": ((12,), "int64"), "faces": ((11,), "int64"), "codes": ((11, 3), "float32"),
        "expression": ((11, 6), "float32"), "pose": ((11, 6), "float32"), "boxes": ((11, 4), "float64"),
    }  # fmt: skip
    assert tensors["faces"].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    times = [Fraction(metadata["time_base"]) * int(tick) for tick in tensors["ticks"]]
    assert times == [frame.time for frame in read_frames(video)]
    assert float(times[0]) == pytest.approx(0.5, abs=1e-6)
    assert (metadata["schema"], metadata["weights"]) == ("dpe-motion/1", WEIGHTS)
    source, engine = json.loads(metadata["source"]), json.loads(metadata["engine"])
    assert (source["name"], source["width"], source["frames"]) == ("d.mp4", 160, 12)
    assert (engine["weights"], engine["precision"]) == ("stand-in", "fp32")  # no folder of the machine
    width = tensors["boxes"][:, 2] - tensors["boxes"][:, 0]
    assert (width > 40).all() and (np.diff(tensors["boxes"][:, 0]) > 0).any()
    assert not [path for path in motion.parent.iterdir() if path.name.startswith(".")]


def test_a_motion_file_may_be_read_by_whoever_may_read_others(made: tuple[Path, Path]):
    video, motion = made
    assert motion.stat().st_mode == video.stat().st_mode


def test_numbered_pictures_have_motion_at_the_rate_that_is_asked(tmp_path: Path):
    for number in range(1, 5):
        write_image(tmp_path / f"p_{number:02}.png", picture(colour=(20 + 5 * number, 220, 30)))
    pictures, motion = tmp_path / "p_%02d.png", tmp_path / "motion.safetensors"
    extract_motion(pictures, motion, HashedEngine(), ColourDetector(), EditSettings(fps="10"))
    assert read_motion(motion, WEIGHTS).times == [Fraction(n, 10) for n in range(4)]
    source = json.loads(everything(motion)[1]["source"])
    assert source["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*.png"))
    done = run("extract", pictures, "-o", tmp_path / "other.safetensors", "--fps", "much")
    assert done.exit_code == 3 and "much is no frame rate" in done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"smooth": 0.0, "driving_end": "loop", "strength": 0.7}, {"smooth": 2.5, "motion": "relative"},
        {"driving_end": "trim", "motion": "relative", "neutral_frame": 0.6},
        {"curve": Curve((0.0, 0.2, 0.3), (0, 0, 1.5)), "driving_end": "hold", "paste": False},
    ],
    ids=str,
)  # fmt: skip
def test_an_edit_by_the_file_equals_the_edit_by_its_video(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
):
    source = clip(tmp_path / "s.mp4", [True] * 20)
    by_video, by_file = (
        frames_of(monkeypatch, source, driving, tmp_path / f"{driving.stem}-out.mp4", **settings) for driving in made
    )
    assert [time for time, _ in by_video] == [time for time, _ in by_file] and len(by_video) >= 10
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(by_video, by_file, strict=True))
    assert len({a.tobytes() for _, a in by_video}) > 5


def test_a_portrait_gets_the_drivings_timing_from_the_file(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_image(tmp_path / "portrait.png", picture())
    by_video, by_file = (
        frames_of(monkeypatch, tmp_path / "portrait.png", driving, tmp_path / f"{driving.stem}-out.mp4")
        for driving in made
    )
    assert [time for time, _ in by_file] == [time for time, _ in by_video] == [f.time for f in read_frames(made[0])]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(by_video, by_file, strict=True))
    assert [frame.time for frame in read_frames(tmp_path / "motion-out.mp4")] == [time for time, _ in by_file]


def test_a_still_makes_a_motion_file_of_one_code(tmp_path: Path):
    write_image(tmp_path / "d.png", picture(colour=(90, 160, 0)))
    write_image(tmp_path / "s.png", picture())
    extract_motion(tmp_path / "d.png", tmp_path / "d.safetensors", HashedEngine(), ColourDetector())
    assert probe_driving(tmp_path / "d.safetensors").is_image
    assert request.default_output(tmp_path / "s.png", Driving(tmp_path / "d.safetensors")) == tmp_path / "s_exp.png"
    driving = Driving(tmp_path / "d.safetensors")
    edit_video(tmp_path / "s.png", driving, tmp_path / "o.png", HashedEngine(), ColourDetector())
    assert (tmp_path / "o.png").exists()


def test_a_preview_shows_source_and_result_for_want_of_the_drivings_pictures(made: tuple[Path, Path], tmp_path: Path):
    source, preview = clip(tmp_path / "s.mp4", [True] * 3), tmp_path / "p.mp4"
    edit_video(source, Driving(made[1]), tmp_path / "o.mp4", HashedEngine(), ColourDetector(), preview=preview)
    assert (probe(preview).width, probe(preview).height) == (320, 120)


# Wrong files


def test_other_weights_are_refused(made: tuple[Path, Path], tmp_path: Path):
    source = clip(tmp_path / "s.mp4", [True] * 3)
    with pytest.raises(WeightsError, match=r"other weights \(sha256 abababababab, here cdcdcdcdcdcd\); name those"):
        edit_video(source, Driving(made[1]), tmp_path / "o.mp4", HashedEngine("cd" * 32), ColourDetector())
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": "dpe-motion/2"}, "has the schema dpe-motion/2, this dpe reads dpe-motion/1"),
        ({"schema": ""}, "no motion file; make one with: dpe extract"),
        ({"source": "[]"}, "damaged"), ({"source": "{"}, "damaged"), ({"time_base": "1/0"}, "damaged"),
        ({"time_base": "1e999999999"}, "damaged"), ({"weights": None}, "damaged"),
        ({"codes": np.full((11, 3), np.nan, np.float32)}, "damaged"),
        ({"codes": np.zeros((4, 3), np.float32)}, "damaged"),
        ({"ticks": np.zeros(12, np.int64)}, "damaged"), ({"ticks": np.zeros(12)}, "damaged"),
        ({"boxes": np.zeros((11, 4))}, "damaged"), ({"boxes": np.full((11, 4), np.nan)}, "damaged"),
        ({"codes": np.zeros((11, 2), np.float32)}, "damaged.*have 3 numbers"), ({"is_image": True}, "damaged"),
        ({"faces": np.arange(11) + 9}, "damaged"), ({"faces": np.arange(0)}, "damaged"), ({"boxes": None}, "damaged"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_in_one_line(made: tuple[Path, Path], change: dict, why: str):
    tensors, metadata = everything(made[1])
    if "is_image" in change:
        change = {"source": json.dumps({**json.loads(metadata["source"]), **change})}
    parts = {**tensors, **metadata, **change}
    save_file(
        {name: part for name, part in parts.items() if isinstance(part, np.ndarray)}, made[1],
        {name: part for name, part in parts.items() if isinstance(part, str)},
    )  # fmt: skip
    with pytest.raises(InputError, match=why) as caught:
        probe_driving(made[1])
        motion_of(made[1], HashedEngine())
    assert "\n" not in str(caught.value)


def test_no_damage_does_more_than_refuse(made: tuple[Path, Path], tmp_path: Path):
    whole, random = made[1].read_bytes(), np.random.default_rng(0)
    broken = tmp_path / "broken.safetensors"
    for attempt in range(300):
        content = bytearray(whole[: random.integers(0, len(whole))] if attempt % 3 == 0 else whole)
        for place in random.integers(0, min(len(content), 1600) or 1, 3):
            if attempt % 3 and content:
                content[place] = random.integers(0, 256)
        broken.write_bytes(content)
        try:
            probe_driving(broken)
            read_motion(broken, WEIGHTS)
        except (InputError, WeightsError) as error:
            assert "\n" not in str(error)


def test_outputs_of_extract_are_checked_first(tmp_path: Path):
    video = clip(tmp_path / "d.mp4", [True])
    (tmp_path / "there.safetensors").write_bytes(b"old")
    for name, why in (("there.safetensors", "overwrite"), ("d.mp4", "also an input"), ("m.mp4", "cannot hold motion")):
        with pytest.raises(OutputError, match=why):
            extract_motion(video, tmp_path / name, HashedEngine(), ColourDetector())
    assert (tmp_path / "there.safetensors").read_bytes() == b"old"
    replaced = EditSettings(overwrite=True)
    extract_motion(video, tmp_path / "there.safetensors", HashedEngine(), ColourDetector(), replaced)
    assert len(read_motion(tmp_path / "there.safetensors", WEIGHTS).times) == 1


# The commands, with real networks


def test_extract_and_edit_equal_a_direct_edit(tmp_path: Path, small_weights: Path):
    source, driving = astronaut(tmp_path / "s.mp4", 4), astronaut(tmp_path / "d.mp4", 3)
    motion = tmp_path / "motion.safetensors"
    shared = ("--weights", small_weights, "--device", "cpu", "--detector", "centerface", "-q")
    done = run("extract", driving, "-o", motion, *shared)
    assert (done.exit_code, done.stdout) == (0, f"{motion}\n"), done.stderr
    tensors, _ = everything(motion)
    assert tensors["codes"].shape == (3, 20) and tensors["expression"].shape == tensors["pose"].shape == (3, 32)
    assert not np.allclose(tensors["expression"], tensors["pose"])
    for name in (driving, motion):
        options = ("--motion", "relative", "-o", tmp_path / f"{name.stem}-out.mp4")
        assert run("edit", "-s", source, "-d", name, *options, *shared).exit_code == 0
    direct, by_file = (list(read_frames(tmp_path / f"{name}-out.mp4")) for name in ("d", "motion"))
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(direct, by_file, strict=True)) and len(direct) == 4
    done = run("edit", "-s", source, "-d", motion, "--device", "cpu", "--detector", "centerface")
    assert done.exit_code == 5 and "other weights" in done.stderr and done.stdout == ""


def test_a_wrong_motion_file_is_3_and_wrong_usage_2(tmp_path: Path):
    source = clip(tmp_path / "s.mp4", [True])
    (tmp_path / "m.safetensors").write_text("no motion")
    (tmp_path / "c.csv").write_text("0,9")
    for more in (("-d", tmp_path / "m.safetensors"), ("-d", source, "--curve", tmp_path / "c.csv")):
        done = run("edit", "-s", source, *more)
        assert done.exit_code == 3 and len(done.stderr.splitlines()) == 1
    (tmp_path / "c.csv").write_text("0,1\n1,0\n")
    for more in (("--curve", tmp_path / "c.csv", "--strength", "1"), ("--neutral-frame", "1"), ("--smooth", "-1")):
        assert run("edit", "-s", source, "-d", source, *more).exit_code == 2
