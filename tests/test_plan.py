"""What `dpe plan` says before an edit, and that it fails as the edit would."""

import json
import threading
from pathlib import Path

import pytest
from test_cli import clips, edit, run
from test_edit import clip, picture

from dpe_cli.errors import OutputError
from dpe_cli.video import frame_times, read_frames
from dpe_cli.writer import write_image

__all__ = ["clips"]  # a fixture


def plan(folder: Path, *more: str | Path, driving: str = "smile.mp4") -> dict:
    done = run("plan", "-s", folder / "talk.mp4", "-d", folder / driving, "-o", folder / "o.mp4", "--json", *more)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "options",
    [[], ["--start", "0.05"], ["--end", "0.1"], ["--driving-end", "trim"], ["--driving-end", "trim", "--start", "0.1"]],
    ids=" ".join,
)
def test_the_frames_are_those_of_the_edit(clips: Path, options: list[str]):
    looked = plan(clips, *options)
    assert not (clips / "o.mp4").exists()
    assert edit(clips, "-o", clips / "o.mp4", *options).exit_code == 0
    assert looked["frames"] == len(list(read_frames(clips / "o.mp4")))
    assert looked["driving_frames"] == 2 and looked["seconds"] > 0 and looked["memory_mib"] > 20


def test_a_portrait_has_the_frames_of_its_driving(clips: Path):
    write_image(clips / "talk.png", picture())
    done = run("plan", "-s", clips / "talk.png", "-d", clips / "smile.mp4", "-o", clips / "o.mp4", "--json")
    assert json.loads(done.stdout)["frames"] == 2, done.stderr
    done = run("plan", "-s", clips / "talk.png", "-d", clips / "talk.png", "-o", clips / "o.png", "--json")
    assert json.loads(done.stdout)["frames"] == 1, done.stderr


def test_people_get_a_table(clips: Path):
    done = run("plan", "-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "--mode", "pose")
    assert done.exit_code == 0 and "160x120" in done.stdout and "output bytes" in done.stdout


def test_it_fails_as_the_edit_would(clips: Path):
    clip(clips / "empty.mp4", [False] * 3)
    (clips / "o.mp4").touch()
    cases = [
        (["-s", clips / "none.mp4", "-d", clips / "smile.mp4"], 3),
        (["-s", clips / "talk.mp4", "-d", clips / "none.mp4"], 3),
        (["-s", clips / "empty.mp4", "-d", clips / "smile.mp4"], 4),
        (["-s", clips / "talk.mp4", "-d", clips / "empty.mp4"], 4),
        (["-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "--on-no-face", "fail"], 4),
        (["-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "-o", clips / "o.mp4"], 7),
        (["-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "-o", clips / "x.avi"], 7),
        (["-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "--mode", "pose", "--fail-if", "seam>1"], 2),
        (["-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "--motion", "relative", "--neutral-frame", "9"], 3),
        (["-s", clips / "talk.mp4", "-d", clips / "smile.mp4", "--curve", clips / "none.csv"], 3),
    ]
    for options, code in cases:
        assert run("plan", *options).exit_code == code, options
        assert run("edit", *options).exit_code == code, options
    assert run("plan", "-s", clips / "talk.mp4").exit_code == 2


def test_a_mouth_that_is_set_without_sound_is_an_edit(clips: Path):
    done = run("plan", "-s", clips / "talk.mp4", "--mouth", "audio", "--audio", "none")
    assert done.exit_code == 2 and "speech drives the mouth in dpe dub" in done.stderr  # what dpe edit says


def test_7_where_the_disk_is_too_small(clips: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpe_cli.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    done = run("plan", "-s", clips / "talk.mp4", "-d", clips / "smile.mp4")
    assert done.exit_code == 7 and "free some space" in done.stderr


def test_a_trial_that_cannot_be_written_leaves_no_thread(clips: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(frames, *_, **__):
        next(iter(frames))
        raise OutputError("the disk is full", "free some space")

    monkeypatch.setattr("dpe_cli.plan.write_video", full_disk)
    monkeypatch.setattr("dpe_cli.plan.TRIAL", 4)
    before = threading.active_count()
    done = run("plan", "-s", clips / "talk.mp4", "-d", clips / "smile.mp4")
    assert done.exit_code == 7 and done.exc_info and threading.active_count() == before


@pytest.mark.parametrize("options", [{}, {"vfr": True}, {"start": 0.5}, {"name": "c.mpg", "video_codec": "mpeg2video"}])
def test_times_of_packets_are_those_of_frames(make_clip, options: dict):
    path = make_clip(**({"audio": False, "fps": 25} if "name" in options else {}), **options)
    assert frame_times(path) == [frame.time for frame in read_frames(path)]
