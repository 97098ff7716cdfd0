"""Batches: lists of clips, workers that fail and die, several machines, shards, results."""

import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_edit import ColourDetector, ColourEngine, clip
from test_speech import write_wave

from dpe_cli import batch as pool_module
from dpe_cli import dub, ledger, resume
from dpe_cli.batch import Event, Item, Outcome, ProcessPool, run_batch
from dpe_cli.commands import batch as command
from dpe_cli.commands import rows, worker
from dpe_cli.commands.display import Display
from dpe_cli.commands.edit import Host
from dpe_cli.errors import ManifestError
from dpe_cli.main import cli
from dpe_cli.manifest import Shard, divide, parse_shard, shard_of_scheduler
from dpe_cli.report import Report
from dpe_cli.speech import RATE
from dpe_cli.video import probe, read_frames

GATE = "DPE_TEST_GATE"  # a file: edits stand still until it is there


class GatedEngine(ColourEngine):
    """The stand-in for the networks."""

    def edit(self, *arguments: Any) -> np.ndarray:
        while GATE in os.environ and not Path(os.environ[GATE]).exists():
            time.sleep(0.01)
        return super().edit(*arguments)


class StandIns(worker.WorkerHost):
    """What a worker has, without networks."""

    def engine(self, *_: object, **__: object) -> ColourEngine:
        return GatedEngine(1)

    def detector(self, *_: object) -> ColourDetector:
        return ColourDetector()


def stand_in_worker(devices: list[str], slot: int) -> worker.EditWorker:
    return worker.EditWorker(None, StandIns())


class InlinePool:
    """One slot, in this process."""

    slots = 1

    def __init__(self, make: Any, slots: int = 1):
        self.work, self.ready = make(0), []

    def start(self, slot: int, item: Item) -> None:
        self.ready.append(Event(slot, outcome=self.work(item, lambda *_: None)))

    def events(self, seconds: float) -> list[Event]:
        ready, self.ready = self.ready, []
        return ready

    def stop(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with clips and an empty folder `out`; workers have stand-ins and run in this process."""
    clip(tmp_path / "talk.mp4", [True, True, False, True, True])
    clip(tmp_path / "long.mp4", [True] * 8)
    clip(tmp_path / "empty.mp4", [False] * 3)
    clip(tmp_path / "smile.mp4", [True, True])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "make_worker", stand_in_worker)
    monkeypatch.setattr(pool_module, "ProcessPool", InlinePool)
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def manifest(*rows: dict[str, Any] | str, name: str = "m.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps({"driving": "smile.mp4", **row}) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def run(*arguments: str, **environment: str) -> Result:
    """`dpe batch`, with outputs in `out`."""
    template = [] if "--output-template" in arguments else ["--output-template", "out/{id}.mp4"]
    return CliRunner().invoke(cli, ["batch", *template, *arguments], env=environment)


@pytest.fixture
def dubbing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """Dubs write what they were asked for in place of a video; gives the sources and speeches."""
    write_wave(folder / "speech.wav", np.zeros(RATE, np.float32))
    asked: list[tuple[Path, Path]] = []

    def stand_in(source: Path, audio: Path, output: Path, *_: object, **__: object) -> Report:
        asked.append((source, audio))
        output.write_text("dubbed")
        return Report(engine={}, detector="none")

    monkeypatch.setattr(dub, "dub_video", stand_in)
    return asked


def test_a_row_with_speech_and_nothing_that_drives_is_dubbed(folder: Path, dubbing: list):
    speech = json.dumps({"id": "a", "source": "talk.mp4", "audio": "speech.wav", "expression_scale": 1.5})
    silent = json.dumps({"id": "c", "source": "talk.mp4", "audio": "smile.mp4"})
    edited = {"id": "b", "source": "talk.mp4", "audio": "speech.wav"}
    listed = manifest(speech, edited, silent)
    done = run(listed, "--output-template", "out/{id}_{mode}_{driving}.mp4")
    assert done.exit_code == 8, done.stderr
    assert dubbing == [(Path("talk.mp4"), Path("speech.wav"))]
    assert {path.name for path in Path("out").glob("*.mp4")} == {"a_dub_speech.mp4", "b_exp_smile.mp4"}
    assert results()["c"]["exit_code"] == 3 and "holds no sound" in results()["c"]["reason"]
    again = run(listed, "--skip-existing", "--output-template", "out/{id}_{mode}_{driving}.mp4")
    assert again.exit_code == 8 and results()["a"]["status"] == "skipped" and len(dubbing) == 1


@pytest.mark.parametrize(
    "options", [{"mouth": "neutral"}, {"gaze": "10:-5"}, {"emotion": "happy:0.5"}, {"curve": "c.csv"}]
)
def test_a_row_that_changes_the_face_is_an_edit_whatever_its_sound(options: dict[str, str]):
    assert rows.command_of({"source", "audio", *options}) is rows.edit
    common = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert rows.command_of({"audio", *rows.named_in(common)}) is rows.edit


def test_a_dub_s_report_takes_nothing_s_place(folder: Path, dubbing: list):
    row = json.dumps({"id": "a", "source": "talk.mp4", "audio": "speech.wav", "report": "smile.mp4"})
    assert run(manifest(row)).exit_code == 8
    assert "smile.mp4 exists" in results()["a"]["reason"] and not dubbing


def test_short_names_after_the_list_are_known(folder: Path, dubbing: list):
    assert list(rows.named_in(["-d", "a.png", "-sb.mp4", "--audio=source", "--emotion", "driving"])) == [
        "driving", "source", "audio", "emotion",
    ]  # fmt: skip
    listed = manifest(json.dumps({"id": "a", "source": "talk.mp4", "audio": "none"}))
    done = run(listed, "--output-template", "out/{id}_{mode}.mp4", "--", "-d", "smile.mp4")
    assert done.exit_code == 0, done.stderr
    spoken = manifest(json.dumps({"id": "b", "source": "talk.mp4"}), name="n.jsonl")
    assert run(spoken, "--output-template", "out/{id}_{mode}.mp4", "--", "-a", "speech.wav").exit_code == 0
    assert {path.name for path in Path("out").glob("*.mp4")} == {"a_exp.mp4", "b_dub.mp4"}


def test_a_row_with_speech_can_be_resumed(folder: Path, dubbing: list, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def stand_in(source: Path, audio: Path, output: Path, *_: object, finish: Callable, **__: object) -> Report:
        asked.append((source, audio))
        output.write_text("dubbed")
        report = Report(engine={}, detector="none")
        finish(report)
        return report

    monkeypatch.setattr(resume, "dub_resumable", stand_in)
    listed = manifest(json.dumps({"id": "a", "source": "talk.mp4", "audio": "speech.wav", "resume": True}))
    assert run(listed).exit_code == 0 and run(listed, "--skip-existing").exit_code == 0
    assert asked == [(Path("talk.mp4"), Path("speech.wav"))] and not dubbing
    assert results()["a"]["status"] == "skipped"


def results(name: str = "m.results.jsonl") -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def left_behind(folder: Path) -> list[str]:
    """Hidden files, which only unfinished work has."""
    return [path.name for path in folder.rglob(".*")]


TALK, LONG = {"id": "talk", "source": "talk.mp4"}, {"id": "long", "source": "long.mp4"}


@pytest.mark.parametrize("name", ["m.jsonl", "talk.mp4", "smile.mp4", "out/talk.mp4", "r.json"])
def test_results_take_no_file_of_the_batch_s_place(folder: Path, name: str):
    listed, before = manifest({**TALK, "report": "r.json"}), Path("talk.mp4").read_bytes()
    done = run(listed, "--results", name)
    assert done.exit_code == 7 and f"{name} is the list, or a file" in done.stderr, done.stderr
    assert Path("talk.mp4").read_bytes() == before and "talk.mp4" in Path(listed).read_text()
    assert not list(Path("out").iterdir())


# Going on, stopping


def test_a_batch_goes_on_past_failures_and_tells_each_clip(folder: Path):
    rows = {"id": "broken", "source": "text.mp4"}, {"id": "empty", "source": "empty.mp4"}, TALK, LONG
    done = run(manifest(*rows))
    assert (done.exit_code, done.stdout) == (8, "m.results.jsonl\n"), done.stderr
    found = results()
    codes = {name: (line["status"], line["exit_code"], line["frames"]) for name, line in found.items()}
    assert codes == {
        "broken": ("failed", 3, None), "empty": ("failed", 4, None), "talk": ("done", 0, 5), "long": ("done", 0, 8)
    }  # fmt: skip
    assert list(found) == ["broken", "long", "talk", "empty"]  # known at once, then the longest first
    assert "text.mp4" in found["broken"]["reason"] and "face" in found["empty"]["reason"]
    assert sorted(path.name for path in (folder / "out").glob("*.mp4")) == ["long.mp4", "talk.mp4"]
    assert left_behind(folder) == []


def test_an_output_is_what_edit_makes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda *_, **__: ColourEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda *_: ColourDetector())
    assert run(manifest({**TALK, "strength": 0.5, "codec": "ffv1", "output": "out/a.mkv"})).exit_code == 0
    arguments = ["edit", "-s", "talk.mp4", "-d", "smile.mp4", "--strength", "0.5", "--codec", "ffv1", "-o", "b.mkv"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    pairs = zip(read_frames(Path("out/a.mkv")), read_frames(Path("b.mkv")), strict=True)
    assert all(np.array_equal(one.rgb, two.rgb) for one, two in pairs)


def test_fail_fast_stops(folder: Path):
    assert run(manifest({"id": "broken", "source": "text.mp4"}, TALK), "--fail-fast").exit_code == 8
    assert [(line["id"], line["status"], line["exit_code"]) for line in results().values()] == [
        ("broken", "failed", 3), ("talk", "stopped", 75)
    ]  # fmt: skip
    assert results()["talk"]["reason"] == "broken failed before it" and not (folder / "out/talk.mp4").exists()
    (folder / "out/late.mp4").touch()
    clip(folder / "late.mp4", [False] * 9)
    done = run(manifest({"id": "no-face", "source": "late.mp4"}, TALK), "--fail-fast")
    assert done.exit_code == 8
    assert [line["status"] for line in results().values()] == ["failed", "stopped"]


def test_options_for_all_rows_and_those_of_dpe_toml(folder: Path):
    (folder / "dpe.toml").write_text("[edit]\nstrength = 0.25\nsmooth = 0\n")
    done = run(manifest(TALK, {**LONG, "strength": 0.5}), "--", "--crf", "30", "--smooth=2")
    assert done.exit_code == 0, done.stderr
    settings = {name: json.loads(Path(f"out/{name}.mp4.dpe.json").read_text())["settings"] for name in ("talk", "long")}
    assert [settings[name]["strength"] for name in ("talk", "long")] == ["0.25", "0.5"]
    assert settings["talk"]["smooth"] == 2 and settings["long"]["crf"] == 30


def test_a_csv_is_a_list_too(folder: Path):
    Path("m.csv").write_text(
        "id,source,driving,mode,paste,strength\na,talk.mp4,smile.mp4,pose,yes,\nb,talk.mp4,smile.mp4,,,0.5\n"
    )
    assert run("m.csv", "--output-template", "out/{line}_{id}_{stem}_{driving}_{mode}.mp4").exit_code == 0
    assert {path.name for path in (folder / "out").glob("*.mp4")} == {
        "2_a_talk_smile_pose.mp4", "3_b_talk_smile_exp.mp4"
    }  # fmt: skip
    assert probe(Path("out/2_a_talk_smile_pose.mp4")).width == 160


def test_the_mode_of_a_name_is_that_of_the_edit(folder: Path):
    rows = [{"id": "a", "source": "talk.mp4", "driving": None, "exp-driving": "smile.mp4", "pose_driving": "long.mp4"}]
    rows += [{"id": "b", "source": "talk.mp4", "driving": None, "edit": ["driving=smile.mp4,mode=pose"]}]
    assert run(manifest(*rows), "--output-template", "out/{id}_{driving}_{mode}.mp4").exit_code == 0
    assert {path.name for path in (folder / "out").glob("*.mp4")} == {"a_smile_both.mp4", "b_smile_pose.mp4"}


def test_the_folders_of_a_template_are_made(folder: Path):
    """But none for a list that is refused, nor that of a source that is not there."""
    made = "new/{mode}/{parent}/{id}.mov"
    assert run(manifest({**TALK, "start": -1}), "--output-template", made).exit_code == 2
    assert not Path("new").exists()
    done = run(manifest(TALK, {"id": "gone", "source": "gone/a.mp4"}), "--output-template", made, "--", "--crf", "30")
    assert done.exit_code == 8 and results()["gone"]["exit_code"] == 3
    assert Path("new/exp/talk.mov").exists() and not Path("new/exp/gone").exists()


def test_an_id_may_have_folders_of_its_own(folder: Path):
    assert run(manifest({**TALK, "id": "a/b"}), "--output-template", "z/{id}.mp4").exit_code == 0
    assert Path("z/a/b.mp4").exists()
    assert run(manifest({**TALK, "id": "../c"}), "--output-template", "out/{stem}.mp4").exit_code == 0  # not in it


@pytest.mark.parametrize("name", ["m.jsonl", "s.toml", "out/talk.mp4.dpe.json"])
def test_a_report_takes_no_file_of_the_batch_s_place(folder: Path, name: str):
    Path("s.toml").write_text("")
    listed = manifest({**TALK, "report": name})
    done = run(listed, "--config", "s.toml", "--overwrite")
    assert done.exit_code == 8 and results()["talk"]["exit_code"] == 7, results()
    assert Path("s.toml").read_text() == "" and "talk.mp4" in Path(listed).read_text()


# What is wrong is told before anything is started, all of it together


@pytest.mark.parametrize(
    ("rows", "complaints"),
    [
        (["{", "[1]"], ["line 1: no JSON", "line 2: no JSON object"]),
        (
            [{**TALK, "drivng": "x"}, {**LONG, "strength": 9}],
            ["no option drivng; is it driving?", "line 2", "between 0 and 3"],
        ),
        ([TALK, TALK], ["line 2: the id talk is that of line 1"]),
        ([{"id": "a"}], ["line 1: Missing option", "--source"]),
        ([{**TALK, "mode": "both", "exp_driving": "b.mp4"}], ["--driving cannot go with"]),
        ([{**TALK, "detail": "perhaps"}], ["detail must be true or false"]),
        ([{**TALK, "source": {"a": 1}}], ["source must be text"]),
        ([{**TALK, "source": ["a", "b"]}], ["source takes one value"]),
        ([{**TALK, "source": "-"}], ["--source cannot be a pipe"]),
        ([{**TALK, "quiet": True}], ["a list may not set quiet"]),
        ([{**TALK, "cost": -1}], ["cost must be a number from 0"]),
        ([{**TALK, "output": "o.mp4"}, {**LONG, "output": "o.mp4"}], ["line 2: o.mp4 is also written by line 1"]),
        ([TALK, {**LONG, "source": "out/talk.mp4"}], ["out/talk.mp4"]),
        ([{**TALK, "crop_size": 80, "crop-size": 90}], ["line 1: crop-size is there twice"]),
        ([TALK, {**LONG, "report": "out/talk.mp4.dpe.json"}], ["out/talk.mp4.dpe.json is also written by line 1"]),
        ([{**LONG, "report": "out/talk.mp4.dpe.json"}, TALK], ["out/talk.mp4.dpe.json is also written by line 1"]),
        ([{**TALK, "id": "../c"}], ["line 1: the id ../c leads out"]),
        ([{**TALK, "consent": "r.json"}, {**LONG, "report": "r.json"}], ["r.json, its consent, is written by line 2"]),
        (["# nothing"], ["lists no clip"]),
    ],
)
def test_2_for_a_list_with_mistakes(folder: Path, rows: list, complaints: list[str]):
    done = run(manifest(*rows))
    assert done.exit_code == 2 and all(text in done.stderr for text in complaints), done.stderr
    assert "Traceback" not in done.stderr and not Path("m.results.jsonl").exists() and not list(Path("out").iterdir())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("id,source\na\n", "line 2: not as many cells"),
        ("id,source\na,b,c\n", "line 2: not as many cells"),
        ("id,id\na,b\n", "line 1: every column needs a name"),
        ('id,source\n"a,b\n', "no CSV"),
        ("", "lists no clip"),
        ("id,source,driving\n,talk.mp4,smile.mp4\nb,talk.mp4,smile.mp4\nb,talk.mp4,smile.mp4\n", "line 4: the id b"),
    ],
)
def test_2_for_a_csv_with_mistakes(folder: Path, text: str, complaint: str):
    Path("m.csv").write_text(text)
    done = run("m.csv")
    assert done.exit_code == 2 and complaint in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "template", ["out.mp4", "{id", "{0}.mp4", "{id.__class__}.mp4", "{name}.mp4", "{line:x!}.mp4", "{line:/>4}.mp4"]
)
def test_2_for_a_template_that_names_nothing(folder: Path, template: str):
    assert run(manifest(TALK), "--output-template", template).exit_code == 2


def test_2_and_3_for_wrong_calls(folder: Path):
    assert run("none.jsonl").exit_code == 3
    for wrong in (["--gpus", "0,x"], ["--gpus", "0,0"], ["--gpus", "0", "--workers", "2"], ["--shard", "3/2"]):
        assert run(manifest(TALK), *wrong).exit_code == 2
    assert run(manifest(TALK), "--", "--config", "x.toml").exit_code == 2
    assert run(manifest(TALK), "--", "--nonsense").exit_code == 2


def test_7_within_the_results_for_an_output_that_exists(folder: Path):
    (folder / "out/talk.mp4").write_bytes(b"old")
    assert run(manifest(TALK)).exit_code == 8 and results()["talk"]["exit_code"] == 7
    assert (folder / "out/talk.mp4").read_bytes() == b"old"
    assert run(manifest(TALK), "--overwrite").exit_code == 0


# Done-markers


def test_skip_existing_goes_by_what_the_output_was_made_of(folder: Path):
    assert run(manifest(TALK)).exit_code == 0
    made = (folder / "out/talk.mp4").stat().st_mtime_ns
    assert run(manifest(TALK), "--skip-existing").exit_code == 0
    assert results()["talk"]["status"] == "skipped" and results()["talk"]["frames"] == 5
    assert (folder / "out/talk.mp4").stat().st_mtime_ns == made

    other = manifest({**TALK, "strength": 0.5})
    assert run(other, "--skip-existing").exit_code == 8 and results()["talk"]["exit_code"] == 7
    assert run(other, "--skip-existing", "--overwrite").exit_code == 0 and results()["talk"]["status"] == "done"
    assert run(other, "--skip-existing", "--overwrite", "-q").exit_code == 0
    assert results()["talk"]["status"] == "skipped"

    (folder / "smile.mp4").unlink()
    clip(folder / "smile.mp4", [True] * 3)  # the same name, another driving
    assert run(other, "--skip-existing", "--overwrite").exit_code == 0 and results()["talk"]["status"] == "done"
    with (folder / "out/talk.mp4").open("ab") as file:
        file.write(b"more")  # not what was made
    assert run(other, "--skip-existing").exit_code == 8


def test_another_name_for_the_same_thing_is_the_same(folder: Path):
    assert run(manifest(TALK)).exit_code == 0
    (folder / "talk.mp4").rename(folder / "moved.mp4")
    assert run(manifest({**TALK, "source": "moved.mp4"}), "--skip-existing").exit_code == 0
    assert results()["talk"]["status"] == "skipped"


# Claims


def test_a_claim_is_had_by_one_only(tmp_path: Path):
    """Also a stale one, by many who see at the same time that it is."""
    output = tmp_path / "a%d [1].mp4"
    for silent in (False, True):
        if silent:
            dead = ledger.claim_file(output, 3)
            dead.write_text('{"host": ["elsewhere", "", ""], "pid": 1}')
            assert not ledger.Claim(output, 60).take()
            os.utime(dead, (time.time() - 61, time.time() - 61))
        had, gate = [], threading.Barrier(12)

        def grasp(had: list = had, gate: threading.Barrier = gate) -> None:
            claim = ledger.Claim(output, 60)
            gate.wait()
            if claim.take():
                had.append(claim)

        threads = [threading.Thread(target=grasp) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (claim,) = had
        assert claim.taken_over is silent and not ledger.Claim(output, 60).take()
        claim.release()
        assert list(tmp_path.iterdir()) == []


def test_a_claim_lives_as_long_as_its_owner_and_is_lost_to_a_newer_one(tmp_path: Path):
    output = tmp_path / "a.mp4"
    with ledger.claimed(output, 0.6) as claim:
        ledger.claim_file(output, 1).write_text('{"host": ["elsewhere"], "pid": 1}')
        time.sleep(0.9)
        assert not ledger.Claim(output, 0.6).take() and not claim.lost.is_set()
        ledger.claim_file(output, 2).touch()
        assert claim.lost.wait(5)
    assert [path.name for path in tmp_path.iterdir()] == [".a.mp4.claim-2"]  # the newer one is not ours to remove


def test_the_claim_of_a_dead_process_of_this_machine_is_stale_at_once(tmp_path: Path):
    output = tmp_path / "a.mp4"
    code = (
        f"from pathlib import Path; from dpe_cli.ledger import Claim; assert Claim(Path({str(output)!r}), 1000).take()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ledger.claim_file(output, 1).exists()
    with ledger.claimed(output, 1000) as claim:
        assert claim.taken_over


def test_an_edit_whose_claim_is_lost_is_given_up(folder: Path):
    """And found done by the other machine, for which it waits."""
    hand = stand_in_worker([], 0)
    calls = iter(range(100))

    def tell(*_: object) -> None:
        if next(calls) == 1:
            hand.host.claim.lost.set()

    work = worker.Work("edit", ["--source=talk.mp4", "--driving=smile.mp4", "--output=out/a.mp4"], {}, os.getcwd(),
                        Path("out/a.mp4"), False, None, 60)  # fmt: skip
    assert hand(Item("a", work), tell).status == "busy"
    assert not Path("out/a.mp4").exists() and left_behind(folder) == []


# The order of work, with a pool that does as it is told


class Script:
    """A pool whose items end as `ends` says, one end for each try."""

    def __init__(self, ends: dict[str, list[Outcome | str]], slots: int = 1):
        self.ends, self.slots, self.running, self.begun = ends, slots, {}, []

    def start(self, slot: int, item: Item) -> None:
        assert slot not in self.running  # never a second one
        self.running[slot] = item
        self.begun.append(item.id)

    def events(self, seconds: float) -> list[Event]:
        running, self.running = self.running, {}
        ends = [(slot, self.ends[item.id].pop(0)) for slot, item in running.items()]
        return [Event(slot, died=end, exit_code=137) if isinstance(end, str) else Event(slot, outcome=end)
                for slot, end in ends]  # fmt: skip

    def stop(self) -> None:
        self.running = {}


def end(name: str, code: int = 0, status: str = "") -> Outcome:
    return Outcome(name, status or ("failed" if code else "done"), code)


def played(ends: dict[str, list], slots: int = 1, **options: Any) -> tuple[list[tuple], list[str]]:
    """Outcomes as (id, status, code, tries), and the order in which items were begun."""
    pool = Script(ends, slots)
    items = [Item(name, None) for name in ends]
    outcomes = run_batch(items, pool, Display(items, lambda outcome: None), **options)
    return [(one.id, one.status, one.exit_code, one.tries) for one in outcomes], pool.begun


def test_what_may_pass_is_tried_again_and_what_will_not_is_not():
    ends = {"a": ["killed", end("a")], "b": [end("b", 4)], "c": [end("c", 6), end("c", 6)], "d": [end("d")]}
    assert played(ends) == (
        [("b", "failed", 4, 1), ("d", "done", 0, 1), ("a", "done", 0, 2), ("c", "failed", 6, 2)],
        ["a", "b", "c", "d", "a", "c"],
    )
    assert played({"a": ["killed"]}, retries=0)[0] == [("a", "failed", 137, 1)]


def test_a_clip_of_another_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "BUSY_SECONDS", 0.01)
    ends = {"a": [end("a", status="busy")] * 2 + [end("a", status="skipped")], "b": [end("b")]}
    assert played(ends)[0] == [("b", "done", 0, 1), ("a", "skipped", 0, 1)]


def test_fail_fast_settles_everything():
    ends = {"a": [end("a")], "b": [end("b", 3)], "c": [end("c")], "d": []}
    outcomes, begun = played(ends, slots=3, fail_fast=True)
    assert outcomes == [("a", "done", 0, 1), ("b", "failed", 3, 1), ("c", "stopped", 75, 1), ("d", "stopped", 75, 1)]
    assert begun == ["a", "b", "c"]


# Real processes


@functools.cache
def script() -> str:
    """`dpe` with stand-ins in the workers."""
    return f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
if __name__ == "__main__":
    import test_batch
    from dpe_cli.commands import batch
    batch.make_worker = test_batch.stand_in_worker
    from dpe_cli.main import cli
    cli()
"""


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a `dpe batch` in a session of its own; whatever becomes of the test, none of them stays."""
    processes: list[subprocess.Popen] = []

    def begin(*arguments: str) -> subprocess.Popen:
        processes.append(started(folder, *arguments))
        return processes[-1]

    yield begin
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def started(folder: Path, *arguments: str) -> subprocess.Popen:
    """The process, whose edits wait for the file `gate`."""
    (folder / "dpe_stand_in.py").write_text(script())
    command = [sys.executable, "dpe_stand_in.py", "batch", "--output-template", "out/{id}.mp4", *arguments]
    environment = {**os.environ, GATE: "gate"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # ignored where the tests run in the background of a shell
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(what: Any, seconds: float = 60) -> Any:
    """The first true value of a function."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def claims(folder: Path) -> list[dict[str, Any]]:
    """Whose work is in hand."""
    found = []
    for path in (folder / "out").glob(".*.claim-*"):
        with contextlib.suppress(OSError, ValueError):  # it comes or goes just now
            found.append(json.loads(path.read_text()))
    return found


def test_two_batches_at_once_do_every_clip_once_and_one_is_killed_on_the_way(folder: Path, start: Callable):
    """The other one takes its clips over; nothing is lost, nothing half-written under a final name."""
    rows = [{"id": f"clip{n}", "source": "long.mp4", "strength": 0.5 + n / 10} for n in range(4)]
    assert run(manifest(rows[0])).exit_code == 0
    manifest(*rows)
    one = start("m.jsonl", "--skip-existing", "--results", "one.jsonl")
    wait_for(lambda: len(claims(folder)) == 1)
    two = start("m.jsonl", "--skip-existing", "--results", "two.jsonl")
    wait_for(lambda: len(claims(folder)) == 2)
    os.killpg(one.pid, signal.SIGKILL)
    one.wait()
    assert [path.name for path in (folder / "out").glob("*.mp4")] == ["clip0.mp4"]
    (folder / "gate").touch()
    _, errors = two.communicate(timeout=60)
    assert two.returncode == 0, errors
    statuses = {name: line["status"] for name, line in results("two.jsonl").items()}
    assert statuses == {"clip0": "skipped", "clip1": "done", "clip2": "done", "clip3": "done"}
    assert {probe(folder / f"out/{row['id']}.mp4").n_frames for row in rows} == {8}
    assert not list((folder / "out").glob(".*.claim-*"))


def test_two_batches_at_once_do_every_clip_once(folder: Path, start: Callable):
    """Without --skip-existing too: what the other one did meanwhile counts as done."""
    manifest(*({"id": f"clip{n}", "source": "long.mp4", "strength": 0.5 + n / 10} for n in range(4)))
    both = [start("m.jsonl", "--results", f"{name}.jsonl") for name in ("one", "two")]
    wait_for(lambda: len(claims(folder)) == 2)
    (folder / "gate").touch()
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    one, two = results("one.jsonl"), results("two.jsonl")
    for name in (f"clip{n}" for n in range(4)):
        assert sorted([one[name]["status"], two[name]["status"]]) == ["done", "skipped"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_is_replaced_and_its_clip_done_again(folder: Path, start: Callable, number: int):
    manifest(LONG)
    process = start("m.jsonl")
    (claim,) = wait_for(lambda: claims(folder))
    os.kill(claim["pid"], number)
    (folder / "gate").touch()
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "m.results.jsonl\n"), errors
    assert (results()["long"]["status"], results()["long"]["tries"]) == ("done", 2)
    assert probe(folder / "out/long.mp4").n_frames == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_75_and_130_when_it_is_stopped_and_nothing_is_left(folder: Path, start: Callable, number: int, code: int):
    manifest(LONG)
    process = start("m.jsonl")
    wait_for(lambda: claims(folder))
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=90)
    assert (process.returncode, output) == (code, ""), errors
    assert time.monotonic() - began < 10 and "Traceback" not in errors and "--skip-existing" in errors
    assert left_behind(folder) == [] and not (folder / "out/long.mp4").exists()


def test_ray_does_the_same_and_an_actor_that_is_killed_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    rows = [{"id": f"clip{n}", "source": "long.mp4"} for n in range(3)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(GATE, "gate")

    def kill_one() -> None:
        try:
            one, _ = wait_for(lambda: (found := claims(folder)) and len(found) == 2 and found)
            os.kill(one["pid"], signal.SIGKILL)
        finally:  # else a machine that is too slow would wait for ever
            (folder / "gate").touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    done = run(manifest(*rows, {"id": "empty", "source": "empty.mp4"}), "--engine", "ray", "--workers", "2")
    killer.join()
    assert done.exit_code == 8, done.stderr
    found = results()
    assert {name: line["status"] for name, line in found.items()} == {
        "clip0": "done", "clip1": "done", "clip2": "done", "empty": "failed"
    }  # fmt: skip
    assert sorted(line["tries"] for line in found.values()) == [1, 1, 1, 2]
    assert not list((folder / "out").glob(".*.claim-*"))


# Shards


def test_shards_cover_the_list_evenly_and_do_not_depend_on_its_order():
    costs = [float(cost) for cost in (50, 3, 20, 20, 9, 1, 1, 7, 30, 11)]
    ids = [f"c{n}" for n in range(10)]
    parts = divide(ids, costs, ids, 3)
    assert sorted(one for part in parts for one in part) == ids
    loads = [sum(costs[ids.index(one)] for one in part) for part in parts]
    assert loads == [51, 51, 50] and [costs[ids.index(one)] for one in parts[0]] == [50, 1]
    backwards = divide(ids[::-1], costs[::-1], ids[::-1], 3)
    assert backwards == parts
    assert divide(ids[:1], costs[:1], ids[:1], 3) == [["c0"], [], []]


def test_the_numbers_of_schedulers_become_shards():
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}
    assert str(shard_of_scheduler(slurm)) == "3/4"
    assert str(shard_of_scheduler({**slurm, "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "2"})) == "3/4"
    assert str(shard_of_scheduler({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "3"})) == "1/3"
    assert shard_of_scheduler({}) is None
    for wrong in ({"JOB_COMPLETION_INDEX": "0"}, {**slurm, "SLURM_ARRAY_TASK_ID": "99"},
                  {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "3"}):  # fmt: skip
        with pytest.raises(ManifestError):
            shard_of_scheduler(wrong)
    assert parse_shard("2/8") == Shard(2, 8, "--shard")
    for wrong in ("0/2", "3/2", "1", "a/b", "-1/2"):
        with pytest.raises(ManifestError):
            parse_shard(wrong)


def test_the_shards_of_a_list_do_each_clip_once(folder: Path):
    rows = manifest(TALK, LONG, {"id": "empty", "source": "empty.mp4"})
    first = run(rows, "--shard", "1/2")
    second = run(rows, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="2", SLURM_ARRAY_TASK_MIN="1")
    assert (first.exit_code, second.exit_code) == (0, 8) and "shard 2/2 (from SLURM_ARRAY_TASK_ID)" in second.stderr
    assert list(results("m.1-of-2.results.jsonl")) == ["long"]
    assert list(results("m.2-of-2.results.jsonl")) == ["talk", "empty"]


def test_given_costs_spare_looking_at_the_others_clips(folder: Path):
    rows = manifest({**TALK, "cost": 1}, {"id": "other", "source": "missing.mp4", "cost": 5})
    assert run(rows, "--shard", "2/2").exit_code == 0
    assert list(results("m.2-of-2.results.jsonl")) == ["talk"]


# How it tells


def test_progress_in_all_its_forms(folder: Path):
    rows = manifest(TALK, {"id": "broken", "source": "empty.mp4"})
    plain = run(rows, "--overwrite")
    assert "1 of 2: talk done: 5 frames" in plain.stderr and "2 of 2: broken failed (4): " in plain.stderr
    lines = [line for line in run(rows, "--overwrite", "--progress", "json").stderr.splitlines() if line[:1] == "{"]
    assert [json.loads(line)["clip"]["id"] for line in lines] == ["talk", "broken"]
    assert json.loads(lines[-1])["percent"] == 100
    spoken = run(rows, "--overwrite", "--progress", "openjd").stdout.splitlines()
    assert spoken[0] == "openjd_status: editing talk" and "openjd_progress: 100.0" in spoken
    assert run(rows, "--overwrite", "--progress", "bar").exit_code == 8
    assert run(rows, "--overwrite", "-q").stderr == ""


def test_commands_are_printed_one_a_line_and_do_the_same(folder: Path):
    done = run(manifest({**TALK, "source": "a b.mp4", "detail": False}, LONG), "--print-commands")
    assert done.exit_code == 8 and done.stdout.count("\n") == 1  # `a b.mp4` is not there
    (folder / "talk.mp4").rename(folder / "a b.mp4")
    done = run("m.jsonl", "--print-commands", "--overwrite")
    assert [shlex.split(line) for line in done.stdout.splitlines()] == [
        ["dpe", "edit", "--overwrite", "--driving=smile.mp4", "--source=long.mp4", "--output=out/long.mp4"],
        ["dpe", "edit", "--overwrite", "--driving=smile.mp4", "--source=a b.mp4", "--no-detail",
         "--output=out/talk.mp4"],
    ]  # fmt: skip
    assert not list((folder / "out").iterdir()) and not Path("m.results.jsonl").exists()
    (folder / "a b.mp4").rename(folder / "a\nb.mp4")
    assert run(manifest({**TALK, "source": "a\nb.mp4"}), "--print-commands").exit_code == 2


# Networks that are kept


def test_networks_are_loaded_once_and_again_if_others_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    loads: list[tuple] = []

    class Counted:
        def __init__(self, *arguments: Any, **options: Any):
            loads.append((arguments, options))
            self.description = {"precision": "fp16"}

    monkeypatch.setattr("dpe_cli.engine.Engine", Counted)
    host = Host()
    first = host.engine(None, device="cpu")
    assert host.engine(None, device="cpu") is first and len(loads) == 1
    assert host.engine("other", device="cpu") is not first and len(loads) == 2
    first = host.engine("other", device="cpu")
    first.description["precision"] = "fp32"  # it fell back: the next clip begins as asked
    assert host.engine("other", device="cpu") is not first and len(loads) == 3


def test_the_pool_of_processes_keeps_its_processes():
    pool = ProcessPool(functools.partial(pids), 1)
    items = [Item(str(number), None) for number in range(3)]
    outcomes = run_batch(items, pool, Display(items, lambda outcome: None))
    assert len({outcome.worker for outcome in outcomes}) == 1 and outcomes[0].worker != str(os.getpid())


def pids(slot: int) -> Any:
    """A worker that tells where it is."""
    return lambda item, tell: Outcome(item.id, "done", worker=str(os.getpid()))
