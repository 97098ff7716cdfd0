"""Edits in segments: the frames are those of one run, whoever makes them, in whatever order, and after any kill."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import astronaut, run
from test_control import factors  # noqa: F401 - a fixture
from test_edit import SKIN, ColourDetector, ColourEngine, clip
from test_speech import babble, write_wave

from dpe_cli import muxer, resume, segments
from dpe_cli.control import Control
from dpe_cli.dub import DubSettings, dub_video
from dpe_cli.edit import edit_video
from dpe_cli.engine import Engine
from dpe_cli.errors import InputError, OutputError, QualityError, UsageError, WeightsError
from dpe_cli.face import make_detector
from dpe_cli.factors import Factors
from dpe_cli.jobs import UNIT
from dpe_cli.lending import BACK
from dpe_cli.motion import Curve
from dpe_cli.paste import make_paster
from dpe_cli.planner import borders_of, make_dub_plan, make_plan
from dpe_cli.request import Driving, Edit, Edits, EditSettings
from dpe_cli.resume import edit_resumable, work_folder
from dpe_cli.segment_plan import Plan, read_plan
from dpe_cli.segments import edit_segments, first_needed, join_plan, memory_of
from dpe_cli.video import Frame, VideoInfo, probe, read_frames
from dpe_cli.writer import write_image, write_video

FPS = Fraction(25)
LOSSLESS = {"codec": "ffv1"}


class MoodyEngine(ColourEngine):
    """Its results depend on the size of a batch and on what came before, as those of real networks do."""

    def __init__(self, batch_size: int = 3):
        super().__init__(batch_size)
        self.description |= {"sha256": "ab" * 32}
        self.forget()

    def forget(self) -> None:
        self.mood = 0

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        edited = super().edit(crops, expression, pose)
        edited[:, 8:56, 8:56] += np.uint8((self.mood + len(crops)) % 8)
        self.mood = (3 * self.mood + int(crops[-1, 0, 0, 0])) % 64
        return edited


class TwoLanes(MoodyEngine):
    """Edits in two threads."""

    def lanes(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext([MoodyEngine(self.batch_size) for _ in range(2)])


def moving(
    path: Path, count: int, fps: Fraction = FPS, vfr: bool = False, cuts: tuple[int, ...] = (), hidden: range = range(0)
):
    """A green face that wanders and changes its colours; at `cuts` it jumps and the room changes; `hidden`: no face."""
    noise = np.random.default_rng(0)

    def frames():
        for n in range(count):
            shot = sum(n >= cut for cut in cuts)
            rgb = np.full((120, 160, 3), 60 + 60 * shot % 180, np.uint8)
            rgb[::2, 40 * shot : 40 * shot + 30] = 250 - 80 * shot
            x, y = 20 + 50 * (shot % 2) + n % 40 // 4, 30 + 5 * (shot % 3) + n % 7
            if n not in hidden:
                rgb[y : y + 40, x : x + 40] = np.add(SKIN, noise.integers(-15, 15, 3))
            at = Fraction(n) / fps if not vfr else (n + Fraction(n % 3, 4)) / fps
            yield Frame(n, Fraction(1, 2) + at, rgb)

    write_video(
        frames(), VideoInfo(path, 160, 120, fps, count, time_base=1 / (fps * 1000)), path, crf=1, preset="ultrafast"
    )
    return path


def driving(path: Path) -> Path:
    return clip(path, [True] * 9, fps=Fraction(12))


def pixels(path: Path) -> list[tuple[Fraction, bytes]]:
    return [(frame.time, frame.rgb.tobytes()) for frame in read_frames(path, exact=True)]


def in_segments(
    folder: Path, source: Path, drivers: Driving | Edits, count: int, settings: dict[str, Any],
    name: str = "parts.mkv", engine: type[MoodyEngine] = MoodyEngine,
) -> tuple[Path, Any]:  # fmt: skip
    """An edit in `count` segments, each by an engine of its own, the last one first; and its report."""
    plan = make_plan(
        folder / "plan.json", source, drivers, folder / name, engine(), ColourDetector(),
        EditSettings(**settings), count=count,
    )  # fmt: skip
    for segment in reversed(range(plan.segments)):
        edit_segments(read_plan(plan.path), segment, segment, engine(), ColourDetector())
    report = join_plan(read_plan(plan.path), overwrite=True)
    return folder / name, report


CASES = {
    "few frames a second": ({"fps": Fraction(8)}, {}, {}),
    "cuts and gaps": ({"cuts": (37, 70), "hidden": range(50, 60)}, {}, {}),
    "variable rate": ({"vfr": True}, {}, {"strength": 0.7}),
    "held": ({"hidden": range(40, 55)}, {}, {"on_no_face": "hold", "mask": "landmarks"}),
    "curve": ({}, {}, {"curve": Curve((1.0, 2.0, 3.0), (0.0, 1.0, 0.0))}),
    "span": ({"vfr": True}, {}, {"start": 1.1, "end": 3.3}),
    "trim": ({}, {}, {"driving_end": "trim"}),
    "relative": ({}, {}, {"motion": "relative"}),
    "crop": ({"hidden": range(0, 20)}, {"mode": "both"}, {}),
    "large crop": ({}, {"mode": "both"}, {"crop_size": 96}),
}


def test_a_failed_write_ends_the_stages_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, smile = moving(tmp_path / "s.mp4", 60), driving(tmp_path / "d.mp4")
    plan = make_plan(
        tmp_path / "plan.json", source, Driving(smile), tmp_path / "o.mkv", MoodyEngine(), ColourDetector(),
        EditSettings(), count=2,
    )  # fmt: skip

    def full_disk(frames: Any, *_: Any, **__: Any) -> None:
        next(iter(frames))
        raise OutputError("the disk is full", "free some space")

    monkeypatch.setattr(segments, "write_video", full_disk)
    before = threading.active_count()
    with pytest.raises(OutputError, match="disk is full") as raised:
        edit_segments(plan, 0, 1, MoodyEngine(), ColourDetector())
    assert raised.tb and threading.active_count() == before  # while the traceback still holds all of them


@pytest.mark.parametrize("case", CASES)
def test_segments_give_the_frames_and_the_report_of_one_run(tmp_path: Path, case: str):
    clip_options, who, settings = CASES[case]
    source, smile = moving(tmp_path / "s.mp4", 100, **clip_options), driving(tmp_path / "d.mp4")
    drivers = Driving(smile, smile if who.get("mode") == "both" else None)
    settings = {**LOSSLESS, **settings}
    whole = tmp_path / "whole.mkv"
    wanted = edit_video(source, drivers, whole, MoodyEngine(), ColourDetector(), EditSettings(**settings))
    parts, found = in_segments(tmp_path, source, drivers, 5, settings)
    assert pixels(parts) == pixels(whole)
    assert found.frames == wanted.frames and found.cuts == wanted.cuts and found.notes == wanted.notes
    assert sorted(found.self_reconstruction) == wanted.self_reconstruction
    assert found.summary()["counts"] == wanted.summary()["counts"]


def test_segments_of_lanes_give_the_frames_of_one_run(tmp_path: Path):
    source, smile = moving(tmp_path / "s.mp4", 100), driving(tmp_path / "d.mp4")
    whole, settings = tmp_path / "whole.mkv", LOSSLESS
    made = edit_video(source, Driving(smile), whole, TwoLanes(), ColourDetector(), EditSettings(**settings))
    parts, found = in_segments(tmp_path, source, Driving(smile), 5, settings, engine=TwoLanes)
    assert pixels(parts) == pixels(whole) and found.frames == made.frames
    assert sorted(found.self_reconstruction) == made.self_reconstruction


def test_a_control_goes_with_the_plan(tmp_path: Path, factors: Factors):  # noqa: F811
    source, smile = moving(tmp_path / "s.mp4", 70), driving(tmp_path / "d.mp4")
    curve = Curve((0.5, 3.0), (0.1, 0.9))
    control = Control({"mouth": smile, "blink": "source"}, {}, {}, {"blink": 0.2}, {"mouth": curve})
    drivers = Driving(smile, factors=(smile,), controlled=True)
    settings = {**LOSSLESS, "control": control}
    whole = tmp_path / "whole.mkv"
    wanted = edit_video(source, drivers, whole, MoodyEngine(), ColourDetector(), EditSettings(**settings))
    parts, found = in_segments(tmp_path, source, drivers, 3, settings)
    assert read_plan(tmp_path / "plan.json").settings.control == control
    assert pixels(parts) == pixels(whole)
    assert found.notes == wanted.notes


# Borders


def times(count: int, fps: int = 25) -> list[Fraction]:
    return [Fraction(n, fps) for n in range(count)]


def test_borders_lie_at_cuts_that_are_near_and_part_the_time_evenly():
    assert borders_of(times(100), [], 4) == (0, 25, 50, 75, 100)
    assert borders_of(times(100), [30, 60], 4) == (0, 30, 50, 75, 100)
    uneven = [*times(50), *(2 + Fraction(n, 50) for n in range(100))]
    assert borders_of(uneven, [], 2) == (0, 50, 150)


@pytest.mark.parametrize(("frames", "count"), [(1, 3), (2, 2), (5, 9), (9, 4), (40, 39)])
def test_no_segment_is_shorter_than_two_frames_if_there_are_two(frames: int, count: int):
    borders = borders_of(times(frames), [1, 2, 3], count)
    assert borders[0] == 0 and borders[-1] == frames
    assert min(np.diff(borders)) >= min(2, frames)


def test_work_begins_where_nothing_older_counts():
    assert [first_needed(times(400), begin, 1.5) for begin in (0, 1, 60, 150)] == [0, 0, 0, 96]
    assert first_needed(times(400), 150, 2.5) == 64
    assert all(first_needed(times(400), n, 2) % UNIT == 0 for n in range(400))


def test_what_was_lent_to_earlier_faces_counts_too():
    paster = make_paster(64, ColourDetector())
    assert memory_of([None], False) == 0 and memory_of([None], True) == BACK
    assert memory_of([None, paster], False) == paster.memory > 0
    assert memory_of([None, paster], True) == paster.memory + BACK


# Joining


@pytest.mark.parametrize(("name", "codec"), [("o.mp4", "hevc"), ("o.mov", "prores"), ("o.mkv", "ffv1")])
@pytest.mark.parametrize("options", [{}, {"start": 1.1}])
def test_times_sound_and_tags_are_those_of_one_run(tmp_path: Path, make_clip, name: str, codec: str, options: dict):
    titled = ("-metadata", "title=Talk", "-metadata:s:a:0", "language=deu", "-aspect", "16:9")
    source = make_clip("s.mp4", seconds=3, vfr=True, size=(160, 120), start=0.5, tracks=2, more=titled)
    monkeyed = FixedDetector()
    settings = EditSettings(codec=codec, **options)
    smile = driving(tmp_path / "d.mp4")
    whole, parts = tmp_path / f"whole_{name}", tmp_path / name
    edit_video(source, Driving(smile), whole, MoodyEngine(), monkeyed, settings)
    plan = make_plan(tmp_path / "p.json", source, Driving(smile), parts, MoodyEngine(), monkeyed, settings, count=4)
    for segment in range(4):
        edit_segments(plan, segment, segment, MoodyEngine(), monkeyed)
    join_plan(plan)
    assert described(parts) == described(whole) and probe(parts).sample_aspect_ratio == Fraction(4, 3)
    copied = b"".join(b"".join(packets(plan.video_of(segment))) for segment in range(4))
    assert b"".join(packets(parts)) == copied


class FixedDetector(ColourDetector):
    """Sees a face in the middle of anything that is not a small part of a frame."""

    def detect(self, rgb: np.ndarray) -> list:
        height, width = rgb.shape[:2]
        square = np.zeros((height, width, 3), np.uint8)
        side = min(height, width) // 4
        square[height // 2 - side : height // 2 + side, width // 2 - side : width // 2 + side] = SKIN
        return super().detect(square)


def packets(path: Path) -> list[bytes]:
    """Of the pictures."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.pts is not None]


def described(path: Path) -> list:
    """All that a player goes by, and the packets of the sound."""
    info, found = probe(path), []
    with av.open(str(path)) as container:
        sound = container.streams.audio
        for stream in container.streams:
            rate = stream.average_rate if stream.type == "video" else None
            found.append((stream.type, stream.time_base, rate, stream.metadata.get("language")))
        for packet in container.demux():
            if packet.pts is not None:
                found.append(
                    (packet.stream_index, packet.pts * packet.time_base, packet.stream in sound and bytes(packet))
                )
                # which packet has which is the encoder's choice of B-frames, which begins anew with a segment
                dts = None if packet.dts is None else packet.dts * packet.time_base
                found.append((packet.stream_index, "dts", dts))
        name = container.streams.video[0].codec_context.codec_tag  # Apple's players want hvc1 for HEVC
    rest = (name, info.fps, info.time_base, info.n_frames, info.colour, info.sample_aspect_ratio, info.start)
    return [*rest, *sorted(found, key=str)]


@pytest.mark.slow
def test_the_shipped_weights_give_equal_frames_in_one_and_in_three_segments(tmp_path: Path):
    source = astronaut(tmp_path / "s.mp4", 40)
    detector, settings = make_detector(), EditSettings(**LOSSLESS)
    whole, parts = tmp_path / "whole.mkv", tmp_path / "parts.mkv"
    edit_video(source, Driving(source), whole, Engine(batch_size=3), detector, settings)
    arguments = (source, Driving(source), parts, Engine(batch_size=3), detector, settings)
    plan = make_plan(tmp_path / "p.json", *arguments, count=3)
    for segment in range(3):
        edit_segments(plan, segment, segment, Engine(batch_size=3), detector)
    join_plan(plan)
    assert pixels(parts) == pixels(whole)


@pytest.mark.slow
def test_the_shipped_weights_dub_equal_frames_in_one_and_in_eight_segments(tmp_path: Path):
    source, audio = astronaut(tmp_path / "s.mp4", 40), write_wave(tmp_path / "a.wav", babble(4.0))
    detector, settings = make_detector(), DubSettings(edit=EditSettings(**LOSSLESS))
    whole, parts = tmp_path / "whole.mkv", tmp_path / "parts.mkv"
    dub_video(source, audio, whole, Engine(batch_size=3), detector, settings)
    plan = make_dub_plan(tmp_path / "p.json", source, audio, parts, Engine(batch_size=3), detector, settings, count=8)
    for segment in range(8):
        edit_segments(plan, segment, segment, Engine(batch_size=3), detector)
    join_plan(plan)
    assert pixels(parts) == pixels(whole)


# What goes wrong


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    """A plan of three segments, of which two are made."""
    source = moving(tmp_path / "s.mp4", 30)
    settings = EditSettings(**LOSSLESS)
    drivers = Driving(driving(tmp_path / "d.mp4"))
    path, output = tmp_path / "p.json", tmp_path / "o.mkv"
    plan = make_plan(path, source, drivers, output, MoodyEngine(), ColourDetector(), settings, count=3)
    edit_segments(plan, 0, 1, MoodyEngine(), ColourDetector())
    return plan


def test_a_plans_table_may_be_read_by_whoever_may_read_the_plan(planned: Plan):
    assert planned.path.with_suffix(".safetensors").stat().st_mode == planned.path.stat().st_mode


def test_a_missing_or_cut_segment_is_named(planned: Plan):
    with pytest.raises(InputError, match=r"of 3 segments these are not whole: 2; .*--segment 2"):
        join_plan(planned)
    planned.video_of(0).write_bytes(b"")
    with pytest.raises(InputError, match="not whole: 0, 2"):
        join_plan(planned)
    assert not planned.output.exists()


def test_a_segment_of_an_older_plan_is_none(planned: Plan):
    drivers = Driving(planned.edits.paths[0])
    arguments = (planned.path, planned.source, drivers, planned.output, MoodyEngine(), ColourDetector())
    newer = make_plan(*arguments, planned.settings, count=3)
    with pytest.raises(InputError, match="not whole: 0, 1, 2"):
        join_plan(newer)


def test_another_source_other_weights_and_another_number_are_refused(planned: Plan):
    other = MoodyEngine()
    other.description["sha256"] = "cd" * 32
    with pytest.raises(WeightsError, match="other|sha256"):
        edit_segments(planned, 2, 2, other, ColourDetector())
    with pytest.raises(InputError, match="no segment 3"):
        edit_segments(planned, 3, 3, MoodyEngine(), ColourDetector())
    moving(planned.source.with_name("n.mp4"), 20).replace(planned.source)
    with pytest.raises(InputError, match="not the file that was planned"):
        edit_segments(planned, 2, 2, MoodyEngine(), ColourDetector())


@pytest.mark.parametrize("damage", ["{}", "", "[" * 100_000, '{"schema": "dpe-plan/1"}', "null", "\xff"])
def test_a_damaged_plan_is_told_in_one_line(planned: Plan, damage: str):
    planned.path.write_text(damage, encoding="latin-1")
    with pytest.raises(InputError, match=r"p\.json"):
        read_plan(planned.path)


def test_every_damaged_value_of_a_plan_is_told(planned: Plan):
    words = json.loads(planned.path.read_text())
    for name in set(words) - {"seconds", "dpe"}:  # those are for people
        for wrong in (None, [], {}, "x", -1, [None], {"x": 1}):
            planned.path.write_text(json.dumps({**words, name: wrong}))
            try:
                plan = read_plan(planned.path)
                plan.written_as()
                list(plan.jobs(0, {}))
            except InputError:
                continue
    planned.path.write_text(json.dumps(words))
    planned.path.with_suffix(".safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="is not the table"):
        read_plan(planned.path)


def test_a_seam_above_the_limit_refuses_the_joined_result(tmp_path: Path):
    source, smile = moving(tmp_path / "s.mp4", 30), driving(tmp_path / "d.mp4")
    with pytest.raises(QualityError) as failure:
        in_segments(tmp_path, source, Driving(smile), 3, {**LOSSLESS, "seam_limit": 0.01})
    assert len(failure.value.report.frames) == 30 and not (tmp_path / "parts.mkv").exists()


def test_what_has_no_segments_is_refused(tmp_path: Path):
    source, smile = moving(tmp_path / "s.mp4", 5), driving(tmp_path / "d.mp4")
    for output in ("o_%03d.png", "-"):
        with pytest.raises(OutputError, match="segments"):
            edit_resumable(source, Driving(smile), Path(output), MoodyEngine(), ColourDetector())


def test_a_still_source_and_two_edits_are_made_in_segments_too(tmp_path: Path):
    smile = moving(tmp_path / "d.mp4", 50)
    still = tmp_path / "still.png"
    write_image(still, next(read_frames(smile)).rgb)
    edits = Edits((Edit(Driving(smile)), Edit(Driving(None, smile), strength=0.5)))
    for source in (still, smile):
        settings = {**LOSSLESS, "paste": True}
        whole = tmp_path / "whole.mkv"
        wanted = edit_video(
            source, edits, whole, MoodyEngine(), ColourDetector(), EditSettings(**settings, overwrite=True)
        )
        parts, found = in_segments(tmp_path, source, edits, 3, {**settings, "overwrite": True})
        assert pixels(parts) == pixels(whole) and found.frames == wanted.frames


# Kills

STAND_INS = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_segments import ColourDetector, MoodyEngine
import dpe_cli.engine, dpe_cli.face, dpe_cli.planner
from dpe_cli.main import cli
class Slow(MoodyEngine):
    def edit(self, *arguments):
        time.sleep(float(sys.argv[1]))
        return super().edit(*arguments)
dpe_cli.planner.SEGMENT_SECONDS = 1.0
dpe_cli.engine.Engine = lambda weights, **options: Slow()
dpe_cli.face.make_detector = lambda name, models: ColourDetector()
cli(sys.argv[2:])
"""


def started(seconds: float, *arguments: str | Path, code: str = STAND_INS) -> subprocess.Popen:
    """dpe with stand-ins, each batch of which takes `seconds`."""
    command = [sys.executable, "-c", code, str(seconds), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, there: Any) -> None:
    """Until it is so, the process has ended or a minute is over."""
    deadline = time.monotonic() + 60
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def request_of(tmp_path: Path) -> tuple[Path, list[str | Path]]:
    """The output, and the options of an edit of four seconds."""
    source, smile = moving(tmp_path / "s.mp4", 100, cuts=(40,)), driving(tmp_path / "d.mp4")
    output = tmp_path / "o.mkv"
    return output, ["-s", source, "-d", smile, "-o", output, "--codec", "ffv1"]


def test_a_killed_run_goes_on_and_gives_the_frames_of_one_run(request_of, tmp_path: Path):
    output, options = request_of
    folder, report = work_folder(output), tmp_path / "r.json"
    records = lambda: len(list(folder.glob("plan.0*.json")))  # noqa: E731
    for wanted in (1, 3):
        process = started(0.05, "edit", *options, "--resume", "--report", report)
        wait_for(process, lambda wanted=wanted: records() >= wanted)
        kill(process)
        assert not output.exists() and not report.exists() and records() == wanted
    process = started(0, "edit", *options, "--resume", "--report", report)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout == f"{output}\n" and "3 of 4 segments are there already" in stderr
    assert not folder.exists()
    whole = tmp_path / "whole.mkv"
    process = started(0, "edit", *options, "-o", whole, "--report", tmp_path / "w.json")
    assert process.communicate(timeout=60)[0] == f"{whole}\n"
    assert pixels(output) == pixels(whole)
    one, two = (json.loads(path.read_text()) for path in (report, tmp_path / "w.json"))
    assert one["frames"] == two["frames"] and one["cuts"] == two["cuts"] and one["seam"] == two["seam"]


@pytest.mark.slow
def test_twenty_kills_at_random_moments(request_of, tmp_path: Path):
    """At each kill nothing has the output's name but the whole; in the end the frames are those of one run."""
    output, options = request_of
    whole, dice, kills, done = tmp_path / "whole.mkv", random.Random(0), 0, 0
    at = time.monotonic()
    started(0.03, "edit", *options, "-o", whole, "-q").communicate(timeout=120)
    seconds, wanted = time.monotonic() - at, pixels(whole)
    while kills < 20 or not done:
        process = started(0.03, "edit", *options, "--resume", "-q")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0.2, 1.2) * seconds if kills < 20 else 120)
        kills += process.poll() is None
        kill(process)
        assert process.returncode in (0, -signal.SIGKILL)
        if output.exists():
            assert pixels(output) == wanted
            if not work_folder(output).exists():  # else a run that was killed at the end of its work has yet to see so
                output.unlink()
                done += 1
    print(f"{kills} kills, {done} outputs")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_sigterm_stops_at_once_with_75(request_of, tmp_path: Path, resume: list[str]):
    output, options = request_of
    before = sorted(tmp_path.iterdir())
    process = started(0.2, "edit", *options, *resume)
    wait_for(process, lambda: list(tmp_path.glob("**/.dpe-*/part.mkv")))  # it encodes
    at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - at < 30  # a tenth of a second, and as long as a busy machine takes to end a Python
    assert (process.returncode, stdout) == (75, ""), stderr
    assert "Stopped" in stderr and "Traceback" not in stderr
    assert sorted(tmp_path.iterdir()) == sorted([*before, *([work_folder(output)] if resume else [])])


def test_an_interrupt_within_a_write_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted:
        def write(self, data: bytes) -> None:
            raise KeyboardInterrupt

    real = muxer.Pipe
    monkeypatch.setattr(muxer, "Pipe", lambda file: real(Interrupted()))
    info = VideoInfo(tmp_path / "s", 160, 120, FPS, 3)
    frames = (Frame(n, n / FPS, np.zeros((120, 160, 3), np.uint8)) for n in range(3))
    with pytest.raises(KeyboardInterrupt):
        write_video(frames, info, tmp_path / "o.mp4")
    assert not list(tmp_path.iterdir())


def test_a_stop_that_takes_too_long_is_cut_short(request_of):
    output, options = request_of
    code = STAND_INS.replace("cli(sys", "import dpe_cli.commands.ends as ends; ends.STOP_SECONDS = 0.5\ncli(sys")
    command = [sys.executable, "-c", code, "30", "edit", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: list(output.parent.glob(".dpe-*")))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (75, "") and "Stopped" in stderr and not output.exists()


def resumed(tmp_path: Path, said: list[str], engine: MoodyEngine | None = None, **settings: Any):
    """A run that can be resumed, in segments of a second."""
    chosen = EditSettings(**LOSSLESS, **settings)
    drivers, output = Driving(tmp_path / "d.mp4"), tmp_path / "o.mkv"
    return edit_resumable(
        tmp_path / "s.mp4", drivers, output, engine or MoodyEngine(), ColourDetector(), chosen,
        report_path=tmp_path / "r.json", seconds=1, say=said.append,
    )  # fmt: skip


class Failing(MoodyEngine):
    """Fails after so many batches."""

    def __init__(self, batches: int):
        super().__init__()
        self.batches = batches

    def edit(self, *arguments: Any) -> np.ndarray:
        self.batches -= 1
        if self.batches < 0:
            raise RuntimeError("killed")
        return super().edit(*arguments)


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run of four segments that ended in its third."""
    moving(tmp_path / "s.mp4", 100)
    driving(tmp_path / "d.mp4")
    with pytest.raises(RuntimeError, match="killed"):
        resumed(tmp_path, [], Failing(22))
    return tmp_path


def test_a_changed_request_begins_anew_and_says_so(interrupted: Path):
    said: list[str] = []
    report = resumed(interrupted, said, strength=0.5)
    assert any("begins anew" in line for line in said) and not any("already" in line for line in said)
    assert report.frames[0].strength == 0.5
    assert not work_folder(interrupted / "o.mkv").exists()


def test_a_changed_source_begins_anew(interrupted: Path):
    os.utime(interrupted / "s.mp4")
    said: list[str] = []
    resumed(interrupted, said)
    assert any("begins anew" in line for line in said)


def test_a_run_killed_after_its_output_appeared_is_found_done(interrupted: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "clear_away", lambda folder: None)
        wanted = resumed(interrupted, [])
    assert (interrupted / "o.mkv").exists() and work_folder(interrupted / "o.mkv").exists()
    found = resumed(interrupted, [], Failing(0))
    assert found.frames == wanted.frames and not work_folder(interrupted / "o.mkv").exists()
    with pytest.raises(OutputError, match="exists"):
        resumed(interrupted, [])


def test_two_runs_do_not_share_an_output(interrupted: Path):
    fcntl = pytest.importorskip("fcntl")
    with (work_folder(interrupted / "o.mkv") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is at work"):
            resumed(interrupted, [])


# The commands


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda weights, **options: MoodyEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda name, models: ColourDetector())


def test_plan_edit_and_join_by_command(request_of, tmp_path: Path, stand_ins: None):
    output, options = request_of
    done = run("plan", *options, "--split", 3)
    plan = tmp_path / "o.plan.json"
    assert (done.exit_code, done.stdout) == (0, f"{plan}\n"), done.stderr
    assert f"dpe join {plan}" in done.stderr
    assert run("plan", *options, "--split", 3).exit_code == 7  # it is there
    told = json.loads(run("plan", *options, "--split", 3, "--overwrite", "--json").stdout)
    assert [one["frames"] for one in told["segments"]] == [40, 26, 34] and told["segments"][1]["start"] == 2.1
    assert run("join", plan).exit_code == 3
    for segment in (2, 0, 1):
        done = run("edit", "--segment", segment, plan)
        assert (done.exit_code, done.stdout) == (0, f"{tmp_path / f'o.plan.000{segment}.mkv'}\n"), done.stderr
    done = run("join", plan, "--report", tmp_path / "r.json")
    assert (done.exit_code, done.stdout) == (0, f"{output}\n"), done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["frames"] == 100
    assert run("join", plan).exit_code == 7
    assert run("join", plan, "-o", tmp_path / "other.mp4").exit_code == 2
    assert run("join", plan, "-o", tmp_path / "other.mkv").exit_code == 0
    assert pixels(tmp_path / "other.mkv") == pixels(output)


def test_2_for_segments_that_make_no_sense(request_of, tmp_path: Path, stand_ins: None):
    _, options = request_of
    wrong = (
        ["edit", "--segment", 1],
        ["edit", tmp_path / "p.json"],
        ["edit", "--segment", 1, tmp_path / "p.json", "--strength", 0.5],
        ["edit", *options, "--resume", "--preview", tmp_path / "v.mp4"],
        ["edit", "-d", tmp_path / "d.mp4"],
        ["plan", *options, "--plan", tmp_path / "p.json"],
        ["plan", *options, "--split", 2, "--every", 3],
    )
    assert [run(*arguments).exit_code for arguments in wrong] == [2] * len(wrong)
    assert run("edit", "--segment", 1, tmp_path / "p.json").exit_code == 3


def test_a_plan_takes_no_file_s_place(request_of, tmp_path: Path, stand_ins: None):
    """Its table lies beside its JSON, and its segments do."""
    output, options = request_of
    smile = tmp_path / "smile.safetensors"
    save_file({"codes": np.zeros(3, np.float32)}, smile)
    for wanted in (["-d", smile], ["-d", tmp_path / "d.mp4", "--weights", smile]):
        for more in ([], ["--overwrite"]):
            request = ["-s", tmp_path / "s.mp4", *wanted, "-o", output, *more]
            done = run("plan", *request, "--split", 2, "--plan", tmp_path / "smile.json")
            assert done.exit_code == 7 and "smile.safetensors is also an input" in done.stderr, done.stderr
    (tmp_path / "other.safetensors").write_text("somebody's")
    assert run("plan", *options, "--split", 2, "--plan", tmp_path / "other.json").exit_code == 7
    sidecar = run("plan", *options, "--split", 2, "--plan", f"{output}.dpe.json")
    assert sidecar.exit_code == 7 and "where the sidecar of" in sidecar.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "d.mp4", "other.safetensors", "s.mp4", "smile.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("linked", [False, True])
def test_a_plan_whose_segments_have_the_name_of_an_input_is_refused(
    request_of, tmp_path: Path, stand_ins: None, linked: bool
):
    source = (tmp_path / "s.mp4").rename(tmp_path / "clip.0000.mp4")
    if linked:
        (tmp_path / "s.mp4").symlink_to(source)
    named = ["-s", tmp_path / "s.mp4" if linked else source, "-d", tmp_path / "d.mp4"]
    for more in (["-o", tmp_path / "o.mp4"], ["-o", tmp_path / "o.mp4", "--overwrite"]):
        done = run("plan", *named, *more, "--split", 1, "--plan", tmp_path / "clip.json")
        assert done.exit_code == 7 and "has the name of a segment" in done.stderr, done.stderr
    done = run("plan", *named, "-o", tmp_path / "p.0000.mp4", "--split", 1, "--plan", tmp_path / "p.json")
    assert done.exit_code == 7 and "has the name of a segment" in done.stderr, done.stderr
    done = run("plan", *named, "-o", tmp_path / "o.mkv", "--split", 1, "--plan", tmp_path / "clip.json")
    assert done.exit_code == 0, done.stderr  # its segment is clip.0000.mkv


@pytest.mark.parametrize("name", ["p.0002.mkv", "p.0002.json"])
def test_a_segment_takes_no_other_file_s_place(planned: Plan, name: str):
    there = planned.path.with_name(name)
    for mine in ("mine", '{"output": {"path": "elsewhere.mkv", "plan": "x", "bytes": 4}}'):
        there.write_text(mine)
        with pytest.raises(OutputError, match=f"{name} is no segment of .*p.json; move it away"):
            edit_segments(planned, 2, 2, MoodyEngine(), ColourDetector())
        assert there.read_text() == mine


def stopped(part: Path, file: Path) -> None:
    """`os.replace` that never gets to a segment's pictures."""
    if file.suffix == ".mkv" and not file.parent.name.startswith("."):
        raise OSError
    os.rename(part, file)


def test_a_segment_of_this_plan_or_an_older_one_is_made_again(planned: Plan, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(segments.os, "replace", stopped)  # at the last moment
        edit_segments(planned, 1, 1, MoodyEngine(), ColourDetector())
    assert not planned.video_of(1).exists() and planned.record_of(1).exists()
    edit_segments(planned, 1, 1, MoodyEngine(), ColourDetector())
    drivers = Driving(planned.edits.paths[0])
    arguments = (planned.path, planned.source, drivers, planned.output, MoodyEngine(), ColourDetector())
    newer = make_plan(*arguments, planned.settings, count=3)
    edit_segments(newer, 0, 2, MoodyEngine(), ColourDetector())
    assert join_plan(newer).counts()["frames"] == 30


def test_what_is_joined_replaces_nothing_that_belongs_to_it(tmp_path: Path, stand_ins: None):
    source, smile = moving(tmp_path / "s.mp4", 20), driving(tmp_path / "d.mp4")
    (tmp_path / "c.csv").write_text("0,1\n9,1\n")
    plan, settings = tmp_path / "p.json", tmp_path / "x.toml"
    settings.write_text("")
    options = ["-s", source, "-d", smile, "--curve", tmp_path / "c.csv", "-o", tmp_path / "o.mp4"]
    assert run("plan", *options, "--split", 2, "--plan", plan).exit_code == 0
    assert [run("edit", "--segment", segment, plan).exit_code for segment in (0, 1)] == [0, 0]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("s.mp4", "d.mp4", "p.0000.mp4"):
        done = run("join", plan, "-o", tmp_path / name, "--overwrite")
        assert done.exit_code == 7 and f"{name} is also an input" in done.stderr, done.stderr
    for name in ("d.mp4", "c.csv", "p.json", "p.safetensors", "p.0001.json", "x.toml"):
        done = run("join", plan, "--config", settings, "--report", tmp_path / name, "--overwrite")
        assert done.exit_code == 7 and f"{name} is also an input" in done.stderr, done.stderr
    done = run("join", plan, "--report", tmp_path / "o.mp4.dpe.json")
    assert done.exit_code == 7 and "where the sidecar" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run("join", plan).exit_code == 0


@pytest.mark.parametrize("option", [["--json"], ["--set", "blink=1"], ["--edit", "x"], ["--fail-if", "seam>1"]])
def test_what_a_plan_has_decided_is_named_as_it_is_given(tmp_path: Path, option: list[str]):
    done = run("edit", "--segment", 1, tmp_path / "p.json", *option)
    assert done.exit_code == 2 and f"the plan has decided {option[0]}: leave it out" in done.stderr


def test_a_resumed_run_has_the_limit_of_seams_that_is_asked_for_now(interrupted: Path):
    with pytest.raises(QualityError, match=r"above 0\.01"):
        resumed(interrupted, [], seam_limit=0.01)  # the run that was killed had none
    with pytest.raises(QualityError, match=r"above 0\.02"):
        resumed(interrupted, [], seam_limit=0.02)
    assert not (interrupted / "o.mkv").exists()
    said: list[str] = []
    report = resumed(interrupted, said, seam_limit=1000.0)
    assert "4 of 4 segments are there already" in said and report.settings["seam_limit"] == 1000.0
    assert (interrupted / "o.mkv").exists()


def test_a_limit_of_seams_is_looked_at_where_all_is_done(interrupted: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "clear_away", lambda folder: None)
        resumed(interrupted, [])
    with pytest.raises(QualityError, match=r"above 0\.01"):
        resumed(interrupted, [], seam_limit=0.01)
    resumed(interrupted, [])


def test_a_resumed_crop_has_no_seam(tmp_path: Path):
    moving(tmp_path / "s.mp4", 30)
    driving(tmp_path / "d.mp4")
    with pytest.raises(RuntimeError, match="killed"):
        resumed(tmp_path, [], Failing(2), paste=False)
    with pytest.raises(UsageError, match="no seam to fail for"):
        resumed(tmp_path, [], paste=False, seam_limit=1.0)
