"""The commands through CliRunner: exit codes, what goes to stdout and what to stderr, and edits with real networks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_edit import ColourDetector, ColourEngine, clip, picture

import dpe_cli
from dpe_cli import muxer
from dpe_cli.commands import ends, progress
from dpe_cli.commands.edit import parse_edit
from dpe_cli.container import PIPE
from dpe_cli.errors import DeviceError, InputError, OutputError, UsageError, WeightsError
from dpe_cli.main import cli
from dpe_cli.people import track_faces
from dpe_cli.video import probe, read_frames
from dpe_cli.writer import write_image, write_video


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with talk.mp4 and smile.mp4, and stand-ins in place of the networks and the detector."""
    clip(tmp_path / "talk.mp4", [True, True, False, True, True])
    clip(tmp_path / "smile.mp4", [True, True])
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda weights, **options: ColourEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda name, models: ColourDetector())
    return tmp_path


def edit(folder: Path, *more: str | Path, source: str = "talk.mp4", driving: str = "smile.mp4") -> Result:
    return run("edit", "--source", folder / source, "--driving", folder / driving, *more)


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes the networks raise `error` at their first edit."""

    def edit(*_: object) -> None:
        raise error

    monkeypatch.setattr(ColourEngine, "edit", edit)


# What is said, and where


def test_stdout_is_the_results_path_and_nothing_else(clips: Path):
    done = edit(clips, "-o", clips / "out.mp4")
    assert (done.exit_code, done.stdout) == (0, f"{clips / 'out.mp4'}\n")
    assert "editing talk.mp4: 5 of 5 frames" in done.stderr
    assert "4 frames edited, 1 passed, 1 x no face" in done.stderr


@pytest.mark.parametrize("mode", ["exp", "pose", "both"])
def test_the_default_output_lies_beside_the_source(clips: Path, mode: str):
    done = edit(clips, "--mode", mode)
    assert done.stdout == f"{clips / f'talk_{mode}.mp4'}\n"
    assert len(list(read_frames(clips / f"talk_{mode}.mp4"))) == 5


def test_quiet_is_quiet(clips: Path):
    assert edit(clips, "-q", "--mode", "pose", "--paste").stderr == ""


def test_verbose_names_the_networks_and_the_detector(clips: Path):
    assert "stand-in" in edit(clips, "-v").stderr


def test_nobody_who_reads_on_is_no_bug():
    """As with `| head -2`; the help of click itself takes care of that."""
    command = [sys.executable, "-m", "dpe_cli", "config", "--show"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        told = running.stderr.read()
    assert (running.returncode, told) == (1, b"")


@pytest.mark.parametrize("kind", ["y4m", "nut"])
def test_a_video_that_nobody_reads_to_its_end_is_told(clips: Path, kind: str):
    frames = read_frames(clip(clips / "long.mp4", [True] * 200))
    unread, written = os.pipe()
    os.close(unread)
    kept = os.dup(1)
    try:
        os.dup2(written, 1)  # ffmpeg writes there itself
        with pytest.raises(OutputError, match="standard output was closed before the end of the video"):
            write_video(frames, probe(clips / "long.mp4"), PIPE, pipe=kind)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(written)


def test_a_pipe_comes_in_and_goes_out(clips: Path):
    """The commands in a process of their own, as the video goes to the real standard output."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_edit import ColourDetector, ColourEngine
import dpe_cli.engine, dpe_cli.face
from dpe_cli.main import cli
dpe_cli.engine.Engine = lambda weights, **options: ColourEngine()
dpe_cli.face.make_detector = lambda name, models: ColourDetector()
cli(["edit", "-s", "-", "-d", {str(clips / "smile.mp4")!r}, "-o", "-"])
"""
    data = (clips / "talk.mp4").read_bytes()
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
    assert done.returncode == 0 and b"4 frames edited, 1 passed" in done.stderr
    (clips / "piped.nut").write_bytes(done.stdout)
    before, after = list(read_frames(clips / "talk.mp4")), list(read_frames(clips / "piped.nut"))
    assert [frame.time for frame in after] == [frame.time for frame in before]
    changed = [not np.array_equal(one.rgb, two.rgb) for one, two in zip(before, after, strict=True)]
    assert changed == [True, True, False, True, True]


def test_2_and_7_for_a_pipe_that_makes_no_sense(clips: Path):
    assert edit(clips, "-o", "-", "--json").exit_code == 2
    assert code_and_line(run("edit", "-s", "-", "-d", clips / "smile.mp4"))[0] == 7


def test_options_of_the_encoding_reach_it(clips: Path):
    done = edit(clips, "-o", clips / "o.mkv", "--codec", "ffv1")
    assert done.exit_code == 0 and probe(clips / "o.mkv").codec == "ffv1"
    assert code_and_line(edit(clips, "-o", clips / "o.mp4", "--codec", "prores"))[0] == 7
    assert edit(clips, "-o", clips / "h.mov", "--codec", "hevc", "--crf", 30, "--preset", "ultrafast").exit_code == 0
    assert probe(clips / "h.mov").codec == "hevc"
    assert edit(clips, "-o", clips / "o_%03d.png").exit_code == 0 and (clips / "o_005.png").exists()
    assert edit(clips, "--source", clips / "o_%03d.png", "--fps", "50", "-o", clips / "s.mp4").exit_code == 0
    assert [float(frame.time) for frame in read_frames(clips / "s.mp4")] == [0, 0.02, 0.04, 0.06, 0.08]
    listed = run("faces", clips / "o_%03d.png", "--fps", "50", "--json")
    assert max(track["end"] for track in json.loads(listed.stdout)["tracks"]) == pytest.approx(0.08)
    assert code_and_line(edit(clips, "--fps", "quick", "-o", clips / "x.mp4"))[0] == 3


def test_pasting_a_pose_is_warned_of(clips: Path):
    assert "seam" in edit(clips, "--mode", "pose", "--paste").stderr


def test_json_on_stdout_and_the_whole_report_in_a_file(clips: Path):
    done = edit(clips, "--json", "--report", clips / "report.json", "--strength", "0.5")
    printed, written = json.loads(done.stdout), json.loads((clips / "report.json").read_text())
    assert printed["output"]["path"] == str(clips / "talk_exp.mp4")
    assert printed["counts"] == written["counts"] and printed["settings"]["strength"] == 0.5
    assert "frames" not in printed and len(written["frames"]) == 5


def test_version():
    assert run("--version").stdout == f"dpe, version {dpe_cli.__version__}\n"


@pytest.mark.parametrize("command", [[], ["edit"], ["weights"], ["weights", "list"], ["weights", "fetch"]], ids=str)
def test_help_ends_in_an_example_of_the_command(command: list[str]):
    words = " ".join(["dpe", *command])
    assert f"\n  {words}" in run(*command, "--help").stdout


# Exit codes


def code_and_line(done: Result) -> tuple[int, str]:
    """Exit code and the last line of stderr; nothing may be on stdout."""
    assert done.stdout == ""
    return done.exit_code, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--mode", "face", "--driving", "d.mp4"],
        ["--driving", "d.mp4", "--exp-driving", "e.mp4"],
        ["--exp-driving", "e.mp4", "--mode", "both"],
        ["--driving", "d.mp4", "--start", "3", "--end", "2"],
        ["--driving", "d.mp4", "--strength", "-1"],
        ["--driving", "d.mp4", "--batch-size", "0"],
        ["--driving", "d.mp4", "--mask", "square"],
        ["--driving", "d.mp4", "--feather", "0"],
        ["--driving", "d.mp4", "--fail-if", "seam<1"],
        ["--driving", "d.mp4", "--fail-if", "seam>much"],
        ["--driving", "d.mp4", "--preset", "foo"],
        ["--driving", "d.mp4", "--feather", "nan"],
        ["--driving", "d.mp4", "--smooth", "nan"],
        ["--driving", "d.mp4", "--max-seconds", "nan"],
        ["--edit", "driving=d.mp4,strength=nan"],
        ["--driving", "d.mp4", "--start", "nan"],
        ["--driving", "d.mp4", "--start", "inf"],
        ["--driving", "d.mp4", "--end", "inf"],
        ["--driving", "d.mp4", "--device", "abacus"],
    ],
    ids=lambda arguments: " ".join(arguments) or "no driving",
)
def test_2_for_wrong_usage(arguments: list[str]):
    done = run("edit", "--source", "s.mp4", *arguments)
    assert done.exit_code == 2 and "Error: " in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--crop-size", "512"], "no size of its own"),
        (["--mode", "pose", "--region", "lips"], "leave --region or the pose out"),
        (["--mode", "both", "--no-detail"], "leave --no-detail out"),
        (["--mask", "parsing"], "name its ONNX file"),
        (["--parsing", "p.onnx"], "no use with --mask gaussian"),
        (["--codec", "ffv1", "--crf", "3"], "ffv1 has no --crf"),
    ],
)
def test_2_for_options_that_only_the_files_show_to_be_wrong(clips: Path, options: list[str], words: str):
    code, line = code_and_line(edit(clips, "-o", clips / "o.mkv", *options))
    assert code == 2 and words in line and not (clips / "o.mkv").exists()


def test_2_for_a_face_or_a_detector_that_there_is_none_of(tmp_path: Path):
    clip(tmp_path / "talk.mp4", [True] * 2)
    assert run("faces", tmp_path / "talk.mp4", "--detector", "foo").exit_code == 2
    for face, error in (("foo", UsageError), ("track:x", UsageError), ("anna.jpg", InputError)):
        with pytest.raises(InputError) as caught:
            track_faces([], ColourDetector(), face)
        assert type(caught.value) is error


def test_3_for_an_input_that_is_missing_or_no_video(clips: Path):
    (clips / "text.mp4").write_text("no video")
    for driving in ("missing.mp4", "text.mp4"):
        code, line = code_and_line(edit(clips, driving=driving))
        assert code == 3 and line.startswith("Error: ") and driving in line
    assert code_and_line(edit(clips, "--audio", clips / "smile.mp4"))[0] == 3  # it has no sound
    assert code_and_line(edit(clips, "--start", "99"))[0] == 3


def test_4_without_a_usable_face(clips: Path):
    clip(clips / "empty.mp4", [False] * 3)
    assert code_and_line(edit(clips, driving="empty.mp4"))[0] == 4
    assert code_and_line(edit(clips, source="empty.mp4"))[0] == 4
    code, line = code_and_line(edit(clips, "--on-no-face", "fail"))
    assert code == 4 and "frame 2" in line
    assert not list(clips.glob("*_exp.mp4"))


@pytest.mark.parametrize(("error", "code"), [(WeightsError, 5), (DeviceError, 6)])
def test_5_and_6_for_weights_and_device(clips: Path, monkeypatch: pytest.MonkeyPatch, error: type, code: int):
    fails(monkeypatch, error("it is so", "mend it"))
    assert code_and_line(edit(clips)) == (code, "Error: it is so; mend it")


def test_6_when_the_memory_is_used_up(clips: Path, monkeypatch: pytest.MonkeyPatch):
    fails(monkeypatch, MemoryError())
    assert code_and_line(edit(clips))[0] == 6


def test_7_for_an_output_that_exists_or_cannot_be(clips: Path):
    (clips / "there.mp4").write_bytes(b"old")
    for output in ("there.mp4", "no/folder.mp4", "out.txt", "talk.mp4"):
        assert code_and_line(edit(clips, "-o", clips / output))[0] == 7
    assert code_and_line(edit(clips, "--report", clips / "there.mp4"))[0] == 7
    assert code_and_line(edit(clips, "-o", clips / "smile.mp4", "--overwrite"))[0] == 7
    assert (clips / "there.mp4").read_bytes() == b"old"
    assert edit(clips, "-o", clips / "there.mp4", "--overwrite").exit_code == 0
    assert probe(clips / "there.mp4").n_frames == 5


def test_10_for_a_seam_above_the_limit_with_its_report(clips: Path):
    """The stand-in paints half of the crop: the seam could not be worse."""
    before = {path.name for path in clips.iterdir()}
    code, line = code_and_line(
        edit(clips, "--fail-if", "seam > 1", "--report", clips / "r.json", "--preview", clips / "p.mp4")
    )
    assert code == 10 and "the seam of 4 frames is above 1, the worst " in line
    written = json.loads((clips / "r.json").read_text())
    assert len(written["frames"]) == 5 and written["seam"]["worst"] > 1
    assert {path.name for path in clips.iterdir()} == before | {"r.json"}
    assert edit(clips, "--fail-if", "seam>1000").exit_code == 0


def test_5_for_paste_back_models_that_are_not_there(clips: Path):
    code, line = code_and_line(edit(clips, "--mask", "parsing", "--parsing", clips / "none.onnx"))
    assert code == 5 and "none.onnx: no such file" in line
    code, line = code_and_line(edit(clips, "--mask", "parsing"))
    assert code == 2 and "--parsing" in line


@pytest.mark.parametrize("option", ["--face", "--weights"])
def test_3_for_a_name_that_no_file_can_have(clips: Path, option: str):
    code, line = code_and_line(edit(clips, option, "a" * 300))
    assert code == 3 and line.endswith("a is longer than the name of a file may be; name a file that is there")


def test_1_for_a_bug_in_one_line_and_its_traceback_with_v(clips: Path, monkeypatch: pytest.MonkeyPatch):
    fails(monkeypatch, RuntimeError("two\nlines"))
    code, line = code_and_line(edit(clips))
    assert (code, line) == (1, "Error: unexpected RuntimeError: two lines; run with -v for the traceback")
    done = edit(clips, "-v")
    assert done.exit_code == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"), [([], "the next run begins anew"), (["--resume"], "a run with --resume goes on where it was")]
)
def test_75_for_sigterm_says_whether_it_can_go_on(
    clips: Path, monkeypatch: pytest.MonkeyPatch, options: list, words: str
):
    monkeypatch.setattr(ColourEngine, "edit", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, line = code_and_line(edit(clips, *options))
    assert code == 75 and line.endswith(words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_that_pyav_loses_comes_again(clips: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int):
    class Interrupted(muxer.Pipe):
        sent = False

        def write(self, data: bytes) -> int:
            if not self.sent:
                self.sent = True
                signal.raise_signal(number)  # as where it came within C and is heeded before our first word
            return super().write(data)

    clip(clips / "long.mp4", [True] * 40)
    (clips / "p").mkdir()
    monkeypatch.setattr(muxer, "Pipe", Interrupted)
    monkeypatch.setattr(ColourEngine, "motion_codes", lambda engine, crops: np.zeros((len(crops), 3), np.float32))
    monkeypatch.setattr(ColourEngine, "edit", lambda engine, crops, *_: time.sleep(0.1) or crops)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        done = edit(clips, "-o", clips / "p" / "o.mp4", source="long.mp4")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == code and "Traceback" not in done.stderr
    assert list((clips / "p").iterdir()) == []


def test_the_timer_of_a_stop_has_ended_with_it(clips: Path, monkeypatch: pytest.MonkeyPatch):
    """Else it may be killed by the end of Python, which C++ takes for a reason to abort."""

    class Slow(threading.Timer):
        def run(self) -> None:
            super().run()
            time.sleep(0.3)

    monkeypatch.setattr(ends.threading, "Timer", Slow)
    monkeypatch.setattr(ColourEngine, "edit", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert edit(clips).exit_code == 75
    assert not any(isinstance(thread, Slow) for thread in threading.enumerate())


def test_130_for_ctrl_c_and_nothing_is_left(clips: Path, monkeypatch: pytest.MonkeyPatch):
    fails(monkeypatch, KeyboardInterrupt())
    before = sorted(clips.iterdir())
    assert edit(clips, "--preview", clips / "p.mp4", "--report", clips / "r.json").exit_code == 130
    assert sorted(clips.iterdir()) == before


# Progress


def test_lines_of_progress_come_at_a_measured_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    now = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress.progress_lines(range(40), 40, "editing")) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[0].startswith("editing: 4 of 40 frames, ") and lines[0].endswith(" s left")


def test_a_slow_pace_is_told_by_the_minute():
    assert (
        progress.progress_line("preparing", 1, 4, 30, "videos") == "preparing: 1 of 4 videos, 2.0 videos/min, 90 s left"
    )


def test_the_bar_passes_everything_on(capsys: pytest.CaptureFixture):
    assert list(progress.progress_bar(range(5), None, "editing")) == list(range(5))
    assert capsys.readouterr().out == ""


def test_progress_for_programs(clips: Path):
    """JSON on stderr; for Open Job Description on stdout, with the failure."""
    told = edit(clips, "--progress", "json", "-o", clips / "a.mp4")
    lines = [json.loads(line) for line in told.stderr.splitlines() if line.startswith("{")]
    assert [(line["what"], line["done"], line["total"]) for line in lines][-1] == ("editing talk.mp4", 5, 5)
    assert told.stdout == f"{clips / 'a.mp4'}\n"
    spoken = edit(clips, "--progress", "openjd", "-o", clips / "b.mp4").stdout.splitlines()
    assert spoken[-3:] == ["openjd_status: editing talk.mp4", "openjd_progress: 100.0", str(clips / "b.mp4")]
    failed = edit(clips, "--progress", "openjd", "-o", clips / "c.mp4", driving="missing.mp4")
    assert failed.exit_code == 3 and failed.stdout.startswith("openjd_fail: ") and "missing.mp4" in failed.stdout
    silent = edit(clips, "--progress", "none", "-o", clips / "d.mp4").stderr
    assert "editing" not in silent and "4 frames edited" in silent
    assert edit(clips, "--progress", "openjd", "-o", "-").exit_code == 2


# Whole edits with real networks


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a model for crops of 64 pixels."""
    import torch

    from dpe_cli.models import DPE, DPEConfig
    from dpe_cli.weights import save

    torch.manual_seed(0)
    config = DPEConfig(64, {4: 16, 8: 16, 16: 16, 32: 8, 64: 8}, latent_dim=32)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(path, DPE(config).state_dict(), config)
    return path


def astronaut(path: Path, count: int) -> Path:
    """The astronaut of scikit-image, drifting to the right: a clip with one face that every detector finds."""
    from fractions import Fraction

    from skimage.data import astronaut as portrait

    from dpe_cli.video import Frame, VideoInfo
    from dpe_cli.writer import write_video

    wide = np.pad(portrait()[:320, 64:384], ((0, 0), (40, 40), (0, 0)), mode="edge")
    frames = (Frame(n, Fraction(n, 10), np.ascontiguousarray(wide[:, 40 - n : 360 - n])) for n in range(count))
    write_video(frames, VideoInfo(path, 320, 320, Fraction(10), count), path, preset="ultrafast")
    return path


def test_a_video_is_edited_from_end_to_end(tmp_path: Path, small_weights: Path):
    source, driving = astronaut(tmp_path / "source.mp4", 6), astronaut(tmp_path / "driving.mp4", 3)
    done = run(
        *("edit", "--source", source, "--driving", driving, "--weights", small_weights, "--device", "cpu"),
        *("--detector", "centerface", "--preview", tmp_path / "p.mp4", "--json", "-o", tmp_path / "out.mp4"),
    )
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["counts"]["edited"] == 6 and summary["engine"]["weights"] == str(small_weights)
    before, after = list(read_frames(source)), list(read_frames(tmp_path / "out.mp4"))
    assert [frame.time for frame in after] == [frame.time for frame in before]
    x0, y0, x1, y1 = (round(value) for value in (100, 10, 200, 130))  # the face, roughly
    difference = np.abs(after[0].rgb.astype(int) - before[0].rgb).mean(-1)
    assert difference[y0:y1, x0:x1].mean() > 10 and difference[250:].mean() < 2
    assert probe(tmp_path / "p.mp4").width == 960


def test_ctrl_c_in_the_middle_leaves_nothing_behind(tmp_path: Path, small_weights: Path):
    source = astronaut(tmp_path / "source.mp4", 40)
    write_image(tmp_path / "smile.png", next(read_frames(source)).rgb)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "dpe_cli", "edit", "--source", str(source), "--batch-size", "1"]
    command += ["--driving", str(tmp_path / "smile.png"), "--weights", str(small_weights), "--detector", "centerface"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
    with subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        deadline = time.monotonic() + 60
        while sorted(tmp_path.iterdir()) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)  # until the working folder of the output appears
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_weights_and_devices_are_told_in_one_line(tmp_path: Path):
    source = clip(tmp_path / "s.mp4", [True])
    (tmp_path / "w.safetensors").write_bytes(b"<html>not found</html>")
    write_image(tmp_path / "d.png", picture())
    for option, value, code in (("--weights", tmp_path / "w.safetensors", 5), ("--device", "cuda:99", 6)):
        done = run("edit", "--source", source, "--driving", tmp_path / "d.png", option, value)
        assert done.exit_code == code and len(done.stderr.splitlines()) == 1


# Several edits, and who there is


def test_several_edits_are_made_in_one_pass(clips: Path):
    one, two = (f"face=left,driving={clips / 'smile.mp4'},mode={mode}" for mode in ("exp", "pose"))
    done = run("edit", "-s", clips / "talk.mp4", "--edit", one, "--edit", f"{two},strength=0.5", "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["counts"]["edits"] == [4, 4] and summary["output"]["path"].endswith("talk_both.mp4")
    assert [(each["mode"], each["strength"]) for each in summary["settings"]["edits"]] == [("exp", 1.0), ("pose", 0.5)]


@pytest.mark.parametrize("option", ["face", "strength"])
def test_what_each_edit_names_for_itself_is_not_said_for_all(clips: Path, option: str):
    one = f"driving={clips / 'smile.mp4'}"
    two, given = f"{one},face=left,strength=0.5", [f"--{option}", {"face": "right", "strength": "1"}[option]]
    done = run("edit", "-s", clips / "talk.mp4", "--edit", two, "--edit", two, *given)
    assert done.exit_code == 2 and f"--{option} is for an --edit that names none" in done.stderr
    assert run("edit", "-s", clips / "talk.mp4", "--edit", one, "--edit", two, *given).exit_code == 0


def test_a_misspelt_key_of_an_edit_is_told(clips: Path):
    done = run("edit", "-s", clips / "talk.mp4", "--edit", f"face=left,driving={clips / 'smile.mp4'},stength=0.5")
    assert done.exit_code == 2 and "stength is no key; the keys are face, driving" in done.stderr


def test_a_rate_that_nothing_asks_for_is_remarked(clips: Path):
    assert "--fps is the rate of image sequences" in edit(clips, "--fps", "50").stderr
    assert edit(clips, "-o", clips / "o_%03d.png").exit_code == 0
    drawn = edit(clips, "--fps", "50", "-o", clips / "a.mp4", driving="o_%03d.png")
    assert drawn.exit_code == 0 and "--fps" not in drawn.stderr


def test_an_edit_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jpg", "c,d=e.mp4"):
        Path(name).touch()
    edit = parse_edit("face=a,b.jpg,driving=c,d=e.mp4,mode=both,strength=2", "largest", 1.0)
    assert (edit.face, edit.strength) == ("a,b.jpg", 2.0)
    assert edit.driving.expression == edit.driving.pose == Path("c,d=e.mp4")
    edit = parse_edit("exp-driving=a.mp4,pose-driving=b.mp4", "left", 0.5)
    assert (edit.face, edit.strength, edit.driving.mode) == ("left", 0.5, "both")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("smile.mp4", "'smile.mp4' is not KEY=VALUE"),
        ("driving=", "'driving' is not KEY=VALUE"),
        ("driving=a.mp4,driving=b.mp4", "a key comes twice"),
        ("face=left", "give driving"),
        ("driving=a.mp4,strength=much", "'much' is not a valid float"),
        ("driving=a.mp4,strength=4", "not in the range"),
        ("driving=a.mp4,mode=hair", "'hair' is not one of"),
        ("driving=a.mp4,pose-driving=b.mp4", "cannot go with"),
    ],
)
def test_an_edit_that_means_nothing_is_wrong_usage(clips: Path, text: str, complaint: str):
    done = run("edit", "-s", clips / "talk.mp4", "--edit", text)
    assert done.exit_code == 2 and complaint in done.stderr


def test_edits_bring_their_own_drivers(clips: Path):
    done = edit(clips, "--edit", f"driving={clips / 'smile.mp4'}")
    assert done.exit_code == 2 and "names its own drivers" in done.stderr


def test_faces_are_listed_and_one_is_edited_by_its_number(tmp_path: Path, small_weights: Path):
    source, sheet = astronaut(tmp_path / "source.mp4", 6), tmp_path / "faces.png"
    listed = run("faces", source, "--detector", "centerface", "--json", "-o", sheet)
    assert listed.exit_code == 0, listed.stderr
    (track,) = json.loads(listed.stdout)["tracks"]
    assert (track["track"], track["frames"], track["start"], track["end"]) == (1, 6, 0.0, 0.5) and track["size"] > 50
    assert "track:1" in listed.stderr and "colours alone" in listed.stderr
    assert probe(sheet).width == 160
    assert run("faces", source, "-o", sheet).exit_code == 7  # it exists
    done = run(
        *("edit", "-s", source, "-d", sheet, "--weights", small_weights, "--device", "cpu", "--detector", "centerface"),
        *("--face", f"track:{track['track']}", "--json", "-o", tmp_path / "out.mp4"),
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["counts"]["edited"] == 6, done.stderr
    assert run("edit", "-s", source, "-d", sheet, "--face", "track:7", "--weights", small_weights).exit_code == 4


def test_the_list_of_faces_goes_to_stderr_and_the_sheet_to_stdout(clips: Path):
    done = run("faces", clips / "talk.mp4", "-o", clips / "faces.png")
    assert (done.exit_code, done.stdout) == (0, f"{clips / 'faces.png'}\n") and "track:1" in done.stderr
    assert run("faces", clips / "talk.mp4", "-q").stderr == ""
    assert run("faces", clips / "talk.mp4", "-o", clips / "faces.mp4").exit_code == 2


# Weights


def test_weights_are_listed_with_their_licences():
    done = run("weights", "list")
    assert done.exit_code == 0 and "compact" in done.stdout and "licence" in done.stdout


def test_weights_are_verified_and_described(small_weights: Path):
    assert str(small_weights) in run("weights", "verify", small_weights).stdout
    described = json.loads(run("weights", "info", small_weights).stdout)
    assert described["config"]["size"] == 64


def test_5_for_weights_that_are_not_there():
    assert run("weights", "verify", "no-such-weights").exit_code == 5


# Doctor


@pytest.mark.parametrize("well", [True, False])
def test_doctor_says_what_is_wrong_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch, well: bool):
    from dpe_cli.doctor import Check

    checks = [Check("ffmpeg", True, "7.1"), Check("weights", well, "not there", "install dpe-cli anew")]
    monkeypatch.setattr("dpe_cli.doctor.examine", lambda: checks)
    done = run("doctor")
    assert done.exit_code == (0 if well else 1) and "ok     ffmpeg: 7.1" in done.stdout
    assert ("FAILS  weights: not there" in done.stdout) is not well and "-> install dpe-cli anew" in done.stdout


def test_75_where_the_signal_comes_before_the_work(monkeypatch: pytest.MonkeyPatch):
    def early(number: int, handler: Callable) -> None:
        monkeypatch.undo()
        handler(number, None)  # as soon as it is heeded

    monkeypatch.setattr(ends.signal, "signal", early)
    done = run("weights", "list")
    assert (done.exit_code, done.stdout) == (75, "") and "Stopped" in done.stderr
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # else one would end us later
