"""Files that mean harm: what they may name, how large they may be, what they may run, and how every failure ends."""

import contextlib
import functools
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import run_ffmpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_edit import ColourDetector, ColourEngine, clip, picture

from dpe_cli.commands.options import LIMITS
from dpe_cli.container import files_of
from dpe_cli.control import Control
from dpe_cli.edit import edit_video
from dpe_cli.errors import DPEError, InputError, OutputError, WeightsError
from dpe_cli.limits import Limits, limits, scratch, set_limits
from dpe_cli.main import cli
from dpe_cli.manifest import check_template, parse_shard, read_manifest
from dpe_cli.models import DPEConfig, LandmarkConfig, SpeechConfig
from dpe_cli.motion import read_curve
from dpe_cli.motion_file import probe_driving, read_motion
from dpe_cli.page import read_report
from dpe_cli.request import Driving, EditSettings
from dpe_cli.segment_plan import read_plan
from dpe_cli.tracks import read_sound
from dpe_cli.video import Frame, VideoInfo, frame_times, probe, read_frames, read_image
from dpe_cli.weights import load, load_any
from dpe_cli.writer import write_image, write_video

MANY = int(os.environ.get("DPE_FUZZ", "1"))  # times the usual number of inputs
EXAMPLES = settings(
    max_examples=40 * MANY, deadline=None, derandomize=MANY == 1, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(autouse=True)
def usual_limits():
    """Every test begins and ends with the limits that nobody has set."""
    set_limits(Limits())
    yield
    set_limits(Limits())


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with talk.mp4 and smile.mp4; stand-ins take the place of the networks and the detector."""
    clip(tmp_path / "talk.mp4", [True] * 4)
    clip(tmp_path / "smile.mp4", [True] * 2)
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda weights, **options: ColourEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda name, models: ColourDetector())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def edit(*more: object, source: object = "talk.mp4", driving: object = "smile.mp4", output: object = "out.mp4"):
    return run("edit", "-s", source, "-d", driving, "-o", output, "-q", *more)


# What a file may name


def playlist(folder: Path, name: str) -> Path:
    """A playlist that names a whole video beside it."""
    run_ffmpeg("-i", folder / "talk.mp4", "-c", "copy", folder / "part.ts")
    text = "ffconcat version 1.0\nfile part.ts\n"
    if name.startswith("hls"):
        text = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n"
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["hls.m3u8", "concat.txt", "concat.mp4"])
def test_playlists_are_refused(clips: Path, name: str):
    listed = playlist(clips, name)
    for done in (edit(source=listed), edit(driving=listed), edit("--audio", listed), run("faces", listed)):
        assert done.exit_code == 3 and "names other files" in done.stderr and "--allow-network" in done.stderr
    assert not (clips / "out.mp4").exists()


def test_a_playlist_that_is_trusted_is_opened(clips: Path):
    assert run("faces", playlist(clips, "hls.m3u8"), "--allow-network", "--json", "-q").exit_code == 0
    assert run("faces", clips / "hls.m3u8", "-q").exit_code == 3  # of one run alone


def test_a_container_that_names_a_file_gets_nothing_of_it(clips: Path):
    """A track of QuickTime may lie in another file, by its name."""
    data = (clips / "talk.mp4").read_bytes()
    at = data.index(b"url \0\0\0\1")
    (clips / "other.mp4").write_bytes(data[:at] + b"url \0\0\0\0" + data[at + 8 :])
    assert edit(source="other.mp4").exit_code in (0, 3)  # and no crash: there is no name in it


@pytest.mark.parametrize("address", ["https://example.com/a.mp4", "rtsp://example.com/a", "concat:a.mp4|b.mp4"])
def test_addresses_are_refused(clips: Path, address: str):
    done = edit(source=address)
    assert done.exit_code == 3 and ("is an address" in done.stderr or "does not exist" in done.stderr)


def test_a_list_of_clips_does_not_raise_its_own_limits(clips: Path):
    for name in LIMITS:
        (clips / "list.jsonl").write_text(json.dumps({"source": "talk.mp4", "driving": "smile.mp4", name: "1"}))
        done = run("batch", "list.jsonl", "--output-template", "{id}.mp4")
        assert done.exit_code == 2 and f"a list may not set {name}" in done.stderr
    (clips / "dpe.toml").write_text("allow-network = true\n")
    assert run("faces", "talk.mp4").exit_code == 2


@pytest.mark.parametrize(
    "name", ["-talk.mp4", "a%03d.mp4", "a:b.mp4", "file:a.mp4", "a\nb.mp4", "100%.mp4", "a b'\".mp4"]
)
def test_any_name_is_a_name(clips: Path, name: str):
    (clips / "talk.mp4").rename(name)
    done = edit("--preview", f"p{name}", source=name, driving=name, output=f"-o{name}")
    assert done.exit_code == 0, done.stderr
    assert [frame.index for frame in read_frames(Path(f"-o{name}"))] == [0, 1, 2, 3]
    assert probe(Path(f"p{name}")).width > 160


@pytest.mark.parametrize("name", ["a*.png", "a[1].png", "a%03d.png", "-.png", "a\n.png"])
def test_the_name_of_a_picture_is_no_pattern(clips: Path, name: str):
    write_image(clips / "a1.png", picture(shade=10))
    write_image(clips / name, picture(shade=200))
    assert read_image(Path(name))[0, 0, 0] == 200
    assert edit(source=name, driving=name, output="out.png").exit_code == 0


def test_a_name_that_is_no_text_is_written_and_told(clips: Path):
    name = os.fsdecode(b"\xff.mp4")
    code = f"from test_hostile import alone; alone({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=clips, env=child_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\xff.mp4\n" and probe(clips / name).n_frames == 4


@pytest.mark.parametrize("output", ["{}/o.mp4", "{}_%d.png"])
def test_a_source_whose_name_is_no_text_keeps_its_sound(clips: Path, output: str):
    name = os.fsdecode(b"caf\xe9")
    (clips / name).mkdir()
    run_ffmpeg("-i", "talk.mp4", "-f", "lavfi", "-i", "sine=d=0.16", "-c:v", "copy", "sound.mp4")
    os.rename("sound.mp4", f"{name}.mp4")
    source, output = Path(f"{name}.mp4"), Path(output.format(name))
    edit_video(source, Driving(source), output, ColourEngine(), ColourDetector(), EditSettings(start=0.04))
    assert len(files_of(output)) == (3 if output.suffix == ".png" else 1)
    assert output.suffix == ".png" or probe(output).has_audio


def test_a_name_too_long_for_any_file_is_told(clips: Path):
    name = "y" * 300
    tried = [edit(source=f"{name}.mp4"), edit(driving=f"{name}.mp4"), edit("--audio", f"{name}.wav")]
    tried += [edit(source=f"{name}.png"), edit(source=f"{name}_%d.png"), run("faces", f"{name}.mp4")]
    tried += [edit(driving=f"{name}.safetensors"), edit("--curve", f"{name}.csv")]
    tried += [run("dub", "-s", "talk.mp4", "-a", f"{name}.wav", "-o", "o.mp4"), run("edit", "--segment", 0, name)]
    assert [(done.exit_code, done.stderr) for done in tried if done.exit_code != 3] == []
    tried = [edit(output=f"{name}.mp4"), edit(output=f"{name}_%d.png"), edit("--preview", f"{name}.mp4")]
    assert [(done.exit_code, done.stderr) for done in tried if done.exit_code != 7] == []


def test_a_name_as_long_as_can_be_is_no_trouble_after_the_work(clips: Path, monkeypatch: pytest.MonkeyPatch):
    longest, report = f"{'ü' * 121}.mp4", f"{'ü' * 125}.json"  # 246 and 255 bytes
    done = edit("--report", report, output=longest)
    assert done.exit_code == 0 and Path(report).exists() and Path(f"{longest}.dpe.json").exists(), done.stderr
    longer = f"{'ü' * 125}.mp4"
    assert edit("--no-sidecar", output=longer).exit_code == 0
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda *_, **__: pytest.fail("it began"))
    done = edit("--overwrite", output=longer)
    assert done.exit_code == 7 and "--no-sidecar" in done.stderr, done.stderr


def child_environment() -> dict[str, str]:
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "LC_ALL": "C.UTF-8"}


def alone(output: str, *more: str) -> None:
    """An edit with stand-ins, in a process of its own."""
    from dpe_cli import engine, face

    engine.Engine = lambda weights, **options: ColourEngine()
    face.make_detector = lambda name, models: ColourDetector()
    cli(["edit", "-s", "talk.mp4", "-d", "smile.mp4", "-o", output, "-q", *more])


def test_pipes_and_devices_are_no_files(clips: Path):
    os.mkfifo(clips / "pipe.mp4")
    for name in ("pipe.json", "pipe.csv", "pipe.safetensors", "pipe.pt"):
        os.mkfifo(clips / name)
    assert edit(source="pipe.mp4").exit_code == edit(driving="pipe.safetensors").exit_code == 3
    assert run("batch", "/dev/zero", "--output-template", "{id}.mp4").exit_code == 3
    assert run("report", "pipe.json").exit_code == run("join", "pipe.json").exit_code == 3
    assert edit("--curve", "pipe.csv").exit_code == 3
    assert run("weights", "verify", "pipe.pt").exit_code == 5
    assert edit("--face", "pipe.mp4").exit_code in (2, 3)


# How large it may be


def test_pixels_are_counted_before_there_is_room_for_them(clips: Path):
    write_image(clips / "large.png", np.zeros((400, 500, 3), np.uint8))
    for done in (edit("--max-pixels", 19_000), edit("--max-pixels", 19_000, driving="large.png")):
        assert done.exit_code == 3 and "pixels" in done.stderr and "--max-pixels" in done.stderr
    assert edit("--max-pixels", 19_200).exit_code == 0
    set_limits(Limits(pixels=199_999))
    with pytest.raises(InputError, match="500 x 400, more than 199999 pixels"):
        read_image(clips / "large.png")


def test_a_picture_that_says_a_huge_size_takes_no_memory(clips: Path):
    """60000 x 60000 would be 10 GB."""
    write_image(clips / "bomb.png", picture())
    data = bytearray((clips / "bomb.png").read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (clips / "bomb.png").write_bytes(data)
    assert edit(source="bomb.png").exit_code == 3


def test_longer_and_larger_files_are_refused(clips: Path):
    for option, value in (("--max-seconds", "0.1"), ("--max-size", "1")):
        if option == "--max-size":
            with (clips / "talk.mp4").open("ab") as file:
                file.write(bytes(2 << 20))
        done = edit(option, value)
        assert done.exit_code == 3 and option in done.stderr
    assert edit("--max-size", 3, "--max-seconds", 1).exit_code == 0


def test_what_a_file_says_of_its_length_is_not_believed(clips: Path):
    """A transport stream has no length in its head."""
    run_ffmpeg("-f", "lavfi", "-t", 3, "-i", "testsrc=s=160x120:r=25", clips / "long.ts")
    set_limits(Limits(seconds=1))
    with pytest.raises(InputError, match="max-seconds"):
        sum(1 for _ in read_frames(clips / "long.ts"))


def test_standard_input_is_limited_too(clips: Path):
    arguments = ["edit", "-s", "-", "-d", "smile.mp4", "-o", "out.mp4", "-q", "--max-size", "1"]
    done = CliRunner().invoke(cli, arguments, input=bytes(3 << 20))
    assert done.exit_code == 3 and "--max-size" in done.stderr
    assert sorted(file.name for file in clips.iterdir()) == ["smile.mp4", "talk.mp4"]


# Temporary files


@pytest.mark.parametrize("temp", [True, False])
def test_temporary_files_lie_in_temp_or_beside_the_output(clips: Path, temp: bool, monkeypatch: pytest.MonkeyPatch):
    made: list[Path] = []
    mkdir = os.mkdir

    def watched(path: str, mode: int) -> None:
        mkdir(path, mode)
        made.append(Path(path))

    (clips / "temp").mkdir()
    (clips / "out").mkdir()
    monkeypatch.setattr(os, "mkdir", watched)
    monkeypatch.setenv("TMPDIR", str(clips / "nowhere"))
    more = ["--temp", clips / "temp"] if temp else []
    arguments = ["edit", "-s", "-", "-d", "smile.mp4", "-o", "out/a.mp4", "-q", "--start", "0.04", *map(str, more)]
    done = CliRunner().invoke(cli, arguments, input=(clips / "talk.mp4").read_bytes())
    assert done.exit_code == 0, done.stderr
    assert {folder.parent.name for folder in made} == ({"temp", "out"} if temp else {"out"})
    assert {file.name for file in (clips / "out").iterdir()} == {"a.mp4", "a.mp4.dpe.json"}
    assert not list((clips / "temp").iterdir())


def test_a_folder_for_temporary_files_has_to_be_there(clips: Path):
    done = CliRunner().invoke(cli, ["edit", "-s", "-", "-d", "smile.mp4", "-o", "o.mp4", "--temp", "no"], input=b"")
    assert done.exit_code == 7 and "does not exist" in done.stderr
    assert edit("--temp", "no").exit_code == 7 and not (clips / "out.mp4").exists()  # which needs none
    assert run("faces", "talk.mp4", "--temp", "no").exit_code == 7


# Nothing in a file is run


class Bomb:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_checkpoint_is_not_run(clips: Path, new: bool):
    import torch

    torch.save({"gen": Bomb()}, "bomb.pt", _use_new_zipfile_serialization=new)
    assert run("weights", "verify", "bomb.pt").exit_code == 5
    (clips / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert run("weights", "verify", "bomb.safetensors").exit_code == 5
    assert edit(driving="bomb.safetensors").exit_code == 3
    assert not Path("exploded").exists()


def test_a_tensor_that_is_larger_than_its_file_is_not_made(clips: Path):
    import torch

    from dpe_cli.models import DPE

    state = DPE(DPEConfig(8, {4: 2, 8: 2}, latent_dim=4, motion_dim=2)).state_dict()
    huge = {name: torch.as_strided(torch.zeros(1), (1 << 20, 1 << 20), (0, 0)) for name in state}
    for name in ("motion_basis.weight", *state):
        torch.save({**state, name: huge[name]}, "huge.pt")
        with pytest.raises(WeightsError):
            load("huge.pt")


def test_a_compressed_checkpoint_does_not_unfold(clips: Path):
    """torch.save never compresses; a member of zeros would grow a thousandfold."""
    import zipfile

    import torch

    torch.save({"gen": {"a": torch.zeros(1 << 16)}}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile("zip.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(WeightsError, match="compressed"):
        load("zip.pt")


# Every failure has its exit code, and leaves nothing


def the_networks(what: object):
    def act(*_: object) -> None:
        raise what if isinstance(what, BaseException) else AssertionError

    return act


def sends(number: int):
    def act(*_: object) -> None:
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 1)  # the handler runs in the main thread

    return act


FAILURES = {
    "missing file": (3, {"source": "missing.mp4"}, None),
    "no video": (3, {"source": "text.mp4"}, None),
    "no face": (4, {"driving": "empty.mp4"}, None),
    "bad weights": (5, {}, the_networks(WeightsError("they are damaged", "get others"))),
    "out of memory": (6, {}, the_networks(MemoryError())),
    "output exists": (7, {"output": "smile2.mp4"}, None),
    "no folder": (7, {"output": "no/out.mp4"}, None),
    "SIGTERM": (75, {}, sends(signal.SIGTERM)),
    "Ctrl-C": (130, {}, sends(signal.SIGINT)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_exit_codes(clips: Path, failure: str, monkeypatch: pytest.MonkeyPatch):
    code, names, act = FAILURES[failure]
    (clips / "text.mp4").write_text("no video")
    (clips / "smile2.mp4").write_bytes(b"mine")
    clip(clips / "empty.mp4", [False] * 2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    if act:
        monkeypatch.setattr(ColourEngine, "edit", act)
    there = sorted(clips.iterdir())
    try:
        done = edit(**names)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert sorted(clips.iterdir()) == there and (clips / "smile2.mp4").read_bytes() == b"mine"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(clips: Path, small_disk: Path):
    frames = (Frame(n, Fraction(n, 25), noise(n)) for n in range(20))
    write_video(frames, VideoInfo(clips / "noise.mp4", 160, 120, Fraction(25), 20), clips / "noise.mp4", crf=10)
    write_image(clips / "noise.png", noise(0))
    done = edit("--crf", 1, source="noise.mp4", output=small_disk / "out.mp4")
    assert done.exit_code == 7 and "space" in done.stderr, done.stderr
    assert not list(small_disk.iterdir())
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    for done in (
        edit(source="noise.png", driving="noise.png", output=small_disk / "out.png"),
        edit("--report", small_disk / "report.json"),
    ):
        assert done.exit_code == 7, done.stderr
        assert [file.name for file in small_disk.iterdir()] == ["filler"]


def noise(seed: int) -> np.ndarray:
    rgb = np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    rgb[40:80, 60:100] = picture()[60, 80]
    return rgb


# Rubbish


TEXT = st.text(max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OPTIONS = st.sampled_from(["id", "source", "driving", "mode", "start", "edit", "cost", "output", "audio", "strength"])
ROWS = st.lists(st.dictionaries(OPTIONS | TEXT, JSON, max_size=5), max_size=4)


def ours_alone(function, *arguments: object) -> None:
    """Calls it; only errors of ours may come."""
    try:
        function(*arguments)
    except DPEError as error:
        assert error.exit_code != 1 and "\n" not in error.args[1]


@EXAMPLES
@given(st.one_of(ROWS.map(lambda rows: "\n".join(map(json.dumps, rows))), st.text(), JSON.map(json.dumps)))
def test_any_list_of_clips(tmp_path: Path, text: str):
    for name in ("list.jsonl", "list.csv"):
        (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
        ours_alone(read_manifest, tmp_path / name)
        done = run("batch", tmp_path / name, "--output-template", "{id}.mp4", "--print-commands")
        assert done.exit_code in (0, 2, 3, 8), done.stderr


@EXAMPLES
@given(TEXT)
def test_any_words(text: str):
    ours_alone(check_template, text)
    ours_alone(parse_shard, text)


@EXAMPLES
@given(st.binary(max_size=300) | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(tmp_path: Path, data: bytes):
    (tmp_path / "any").write_bytes(data)
    for function in (read_curve, read_report, read_plan, load_any, probe, read_image, probe_driving):
        ours_alone(function, tmp_path / "any")
    for suffix in (".safetensors", ".mp4", ".png", ".m3u8"):
        (tmp_path / f"any{suffix}").write_bytes(data)
        ours_alone(probe_driving, tmp_path / f"any{suffix}")
    ours_alone(lambda: read_motion(tmp_path / "any.safetensors", ""))
    ours_alone(lambda: [*read_sound(tmp_path / "any.mp4", 16000)])
    ours_alone(frame_times, tmp_path / "any.mp4")


NUMBERS = st.sampled_from([0, 1, 2, -1, 2**31, 2**62, -(2**63)])
ARRAYS = st.builds(
    lambda shape, kind, fill: np.full(shape, fill if kind[0] == "i" else float(fill), kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["int64", "float32", "float64", "int32"]),
    NUMBERS.filter(lambda number: abs(number) < 2**31),
)
GOOD = {
    "ticks": np.array([0, 1, 2]), "faces": np.array([0, 2]), "codes": np.zeros((2, 3), np.float32),
    "expression": np.zeros((2, 3), np.float32), "pose": np.zeros((2, 3), np.float32),
    "boxes": np.array([[0.0, 0, 4, 4]] * 2),
}  # fmt: skip
ABOUT = {"width": 8, "height": 8, "fps": "25", "frames": 3, "duration": 0.1, "time_base": "1/25", "is_image": False}


@EXAMPLES
@given(
    st.dictionaries(st.sampled_from(sorted(GOOD)), ARRAYS | st.none(), max_size=3),
    st.dictionaries(st.sampled_from(["time_base", "weights", "source"]), TEXT | JSON.map(json.dumps), max_size=2),
    st.dictionaries(st.sampled_from(sorted(ABOUT)), JSON | NUMBERS | NUMBERS.map(str), max_size=3),
)
def test_any_motion_file(tmp_path: Path, tensors: dict, metadata: dict, about: dict):
    kept = {name: value for name, value in {**GOOD, **tensors}.items() if value is not None}
    words = {"schema": "dpe-motion/1", "time_base": "1/25", "weights": "00", "source": json.dumps({**ABOUT, **about})}
    words = {key: value.encode(errors="replace").decode() for key, value in {**words, **metadata}.items()}
    save_file(kept, tmp_path / "any.safetensors", words)

    def used() -> None:
        probe_driving(tmp_path / "any.safetensors")
        driver = read_motion(tmp_path / "any.safetensors", "00")
        for end in ("hold", "loop", "pingpong"):
            driver.track.at(0.5, end)

    ours_alone(used)


@EXAMPLES
@given(
    JSON | st.dictionaries(st.sampled_from(["size", "channels", "latent_dim", "motion_dim", "blocks"]), NUMBERS | JSON)
)
def test_any_configuration_of_networks(value: object):
    for kind in (DPEConfig, LandmarkConfig, SpeechConfig):
        with contextlib.suppress(ValueError):
            kind.from_json(json.dumps(value))


@pytest.mark.parametrize("number", ["4097", "9" * 400])
def test_networks_that_nobody_could_build_are_refused(number: str):
    with pytest.raises(ValueError, match=f"networks of that size are not built: {number[:20]}$"):
        DPEConfig.from_json(f'{{"size": {number}}}')


@EXAMPLES
@given(st.dictionaries(st.sampled_from(["size", "channels", "latent_dim", "motion_dim"]), NUMBERS | JSON))
def test_any_configuration_in_a_checkpoint(tmp_path: Path, value: dict):
    config = json.dumps({"size": 8, "channels": {"4": 2, "8": 2}, "latent_dim": 4, "motion_dim": 2, **value})
    for form in ("dpe-weights/1", "dpe-landmarks/1", "dpe-speech/1", "dpe-weights/9"):
        save_file({"a": np.zeros(3, np.float32)}, tmp_path / "any.safetensors", {"format": form, "config": config})
        with pytest.raises(WeightsError):
            load_any(tmp_path / "any.safetensors")


@EXAMPLES
@given(JSON)
def test_any_control(value: object):
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, InputError):  # as in `read_plan`
        Control.from_dict(value)


@pytest.mark.parametrize(("kinds", "count"), [("container,still", 8), ("checkpoint,motion,text,plan", 40)])
def test_mutated_files(tmp_path: Path, kinds: str, count: int):
    """In a process of its own: a crash of a library, or a hang, is a finding too. `python tests/fuzz.py` for more."""
    program = [sys.executable, Path(__file__).with_name("fuzz.py"), kinds, str(count * MANY), "7"]
    environment = {**child_environment(), "TMPDIR": str(tmp_path)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300 * MANY, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["kind"] for line in lines] == kinds.split(",")
    for line in lines:
        assert line["tried"] == count * MANY and line["findings"] == []
        assert len(line["ended"]) > 1  # not all were refused at the same door


def test_limits_are_those_of_the_process():
    set_limits(replace(limits(), seconds=3))
    assert limits() == Limits(seconds=3)
    with pytest.raises(OutputError), scratch(Path("/no/such/folder/out.mp4")):
        pass


@pytest.fixture
def served(clips: Path):
    """An http server of the folder with the clips; its address."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Silent, directory=str(clips))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_fetched_where_that_is_allowed(clips: Path, served: str):
    source = f"{served}/talk.mp4"
    assert edit(source=source).exit_code == 3
    done = edit("--allow-network", source=source, driving=f"{served}/smile.mp4")
    assert done.exit_code == 0, done.stderr
    assert (clips / "out.mp4").exists() and not list(clips.glob(".dpe-*"))
    missing = edit("--allow-network", "--overwrite", source=f"{served}/none.mp4")
    assert missing.exit_code == 3 and "404" in missing.stderr and len(missing.stderr.splitlines()) == 1
    unnamed = CliRunner().invoke(cli, ["edit", "--allow-network", "-s", source, "-d", "smile.mp4"])
    assert unnamed.exit_code == 2 and "--output" in unnamed.stderr
    for command in ("dub", "plan"):
        unnamed = CliRunner().invoke(cli, [command, "--allow-network", "-s", source, "-a", "talk.mp4"])
        assert unnamed.exit_code == 2 and "--output" in unnamed.stderr, unnamed.stderr


def test_an_address_is_for_one_run_alone(clips: Path, served: str):
    source, wanted = f"{served}/talk.mp4", ["--allow-network", "-o", str(clips / "o.mp4")]
    (clips / "p.json").write_text("{}")
    for command in (
        ["edit", "-s", source, "-d", str(clips / "smile.mp4"), "--resume"],
        ["dub", "-s", str(clips / "talk.mp4"), "-a", f"{served}/smile.mp4", "--resume"],
        ["plan", "-s", source, "-d", str(clips / "smile.mp4"), "--split", "2"],
    ):
        done = CliRunner().invoke(cli, [*command, *wanted])
        assert done.exit_code == 2 and "download it" in done.stderr, done.stderr
    segment = CliRunner().invoke(cli, ["edit", "--segment", "0", f"{served}/p.json", "--allow-network"])
    assert segment.exit_code == 2 and "download it" in segment.stderr, segment.stderr
    assert not list(clips.glob("o.*"))


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path):
    output = tmp_path / "out.mp4"
    program = (
        "import os, pathlib, sys, dpe_cli.limits as one\n"
        "with one.scratch(pathlib.Path(sys.argv[1])) as folder: (folder / 'part').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, output], env=child_environment(), check=False)
    (left,) = tmp_path.iterdir()
    other = tmp_path / f".dpe-0badcafe-{left.name.split('-')[2]}-x"  # of another machine
    other.mkdir()
    with scratch(output) as folder, scratch(output) as second:
        assert sorted(tmp_path.iterdir()) == sorted([other, folder, second])


def test_a_folder_goes_when_ctrl_c_comes_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mkdir, made = os.mkdir, []

    def interrupted(path: str, mode: int) -> None:
        mkdir(path, mode)
        made.append(Path(path).exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path / "out.mp4"):
        pass
    assert made == [True] and not list(tmp_path.iterdir())


def test_a_folder_goes_though_a_program_still_writes_into_it(tmp_path: Path):
    with scratch(tmp_path / "out.mp4") as folder:
        command = f"import pathlib; p = pathlib.Path({str(folder)!r})\nfor n in range(2000): (p / str(n)).touch()"
        writer = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
        while len(list(folder.iterdir())) < 100:
            pass
    writer.wait()
    assert not list(tmp_path.iterdir())
