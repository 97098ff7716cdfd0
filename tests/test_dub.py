"""Dubbing with stand-ins for the networks that see and draw; the speech networks are real but know nothing."""

import contextlib
import json
import signal
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import largest_file, run_ffmpeg
from test_cli import run as command
from test_edit import SKIN, ColourDetector, picture
from test_segments import described, pixels, started, wait_for
from test_speech import babble, write_wave

from dpe_cli import dub
from dpe_cli.commands.dub import dub as dub_command
from dpe_cli.dub import DubSettings, Extras, LowerFace, Plan, dub_video, mouth_factors, mouthed, plan_length
from dpe_cli.errors import InputError, OutputError, UsageError, WeightsError
from dpe_cli.factors import FORMAT, NAMES, SPACE, Factors, coordinate_projectors, fit_of, write_fit
from dpe_cli.jobs import NO_MASK
from dpe_cli.landmarks import EYES, FACE_OVAL, LIPS_INNER
from dpe_cli.main import cli
from dpe_cli.models import SpeechConfig, SpeechNets
from dpe_cli.planner import make_dub_plan
from dpe_cli.report import Report
from dpe_cli.request import EditSettings
from dpe_cli.resume import dub_resumable, work_folder
from dpe_cli.segment_plan import read_plan
from dpe_cli.segments import edit_segments, join_plan
from dpe_cli.speech import RATE, Loudness
from dpe_cli.speech_motion import load_nets, read_loudness
from dpe_cli.tracks import read_sound
from dpe_cli.video import Frame, VideoInfo, probe, read_frames, read_image
from dpe_cli.weights import digest, find
from dpe_cli.writer import write_image, write_speech, write_video

SECONDS = 1.2


class CodeEngine:
    """Motion code: fixed numbers and the crop's brightness. An edit paints the whole crop by the mouth's code."""

    def __init__(self):
        self.size, self.batch_size = 64, 3
        self.description = {"weights": str(find()), "sha256": digest(find())}
        self.asked: list[tuple[np.ndarray, np.ndarray | None]] = []

    def lanes(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext([self])

    def forget(self) -> None:
        pass

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        codes = np.tile(np.linspace(-1, 1, 20, dtype=np.float32), (len(crops), 1))
        codes[:, 19] = crops.mean((1, 2, 3)) / 255
        return codes

    def edit(self, crops: np.ndarray, expression: np.ndarray, pose: np.ndarray | None) -> np.ndarray:
        self.asked += list(zip(expression, [None] * len(crops) if pose is None else pose, strict=True))
        return np.clip(crops + 40 + 10 * np.abs(expression[:, 6:14]).sum(1)[:, None, None, None], 0, 255).astype(
            np.uint8
        )


def face_points(size: int = 64) -> np.ndarray:
    """478 points of a frontal face in a crop: all within the oval, eyes at 0.4 of its height, lips at 0.75."""
    points = np.full((478, 3), size / 2, np.float32)
    turn = np.linspace(0, 2 * np.pi, len(FACE_OVAL), endpoint=False)
    points[FACE_OVAL, 0] = size * (0.5 + 0.3 * np.sin(turn))
    points[FACE_OVAL, 1] = size * (0.5 - 0.4 * np.cos(turn))
    for eye, x in zip(EYES, (0.38, 0.62), strict=True):
        points[eye, :2] = size * x, size * 0.4
    points[LIPS_INNER, 1] = size * 0.75
    return points


class FixedLandmarks:
    """Sees the same face in each crop."""

    def detect(self, crop: np.ndarray):
        return type("Shape", (), {"points": face_points(len(crop))})


def speech_nets() -> SpeechNets:
    """Those that know nothing, always the same."""
    torch.manual_seed(0)
    nets = SpeechNets(SpeechConfig(width=16, dilations=(1, 4), sync_width=16)).eval().requires_grad_(False)
    nets.aperture.fill_(0.02)
    nets.mean_mouth.fill_(0.5)
    nets.blink.fill_(-2.0)
    return nets


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    nets = speech_nets()
    monkeypatch.setattr(dub, "load_nets", lambda: nets)
    monkeypatch.setattr(dub, "NetworkLandmarker", FixedLandmarks)


@pytest.fixture
def clip(tmp_path) -> Path:
    info = VideoInfo(tmp_path / "talk.mkv", 160, 120, Fraction(30), 36, time_base=Fraction(1, 30000))
    frames = (Frame(n, Fraction(n, 30), picture(shade=60 + 10 * (n % 5))) for n in range(36))
    write_video(frames, info, info.path, codec="ffv1")
    return info.path


@pytest.fixture
def speech(tmp_path) -> Path:
    return write_wave(tmp_path / "speech.wav", np.concatenate([babble(0.8), np.zeros(int(0.8 * RATE))]))


def run(
    source: Path, audio: Path, output: Path, engine: CodeEngine | None = None, edit: dict | None = None, **settings
):
    chosen = DubSettings(edit=EditSettings(**{"codec": "ffv1", "smooth": 0.0, **(edit or {})}), **settings)
    return dub_video(source, audio, output, engine or CodeEngine(), ColourDetector(), chosen)


# Codes


class Said:
    """Speech that says one thing: all mouth coordinates 0.7, the gate as given."""

    def __init__(self, opened: float):
        self.value = np.array([0.7] * 8 + [opened], np.float32)

    def at(self, seconds: float) -> np.ndarray:
        return self.value


def test_only_the_mouth_of_a_code_changes_and_a_shut_gate_shuts_it():
    own = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    base, factors = np.arange(8, dtype=np.float32), Factors(coordinate_projectors())
    times, nothing = [0.0, 0.1, 0.2], Extras(None, None)
    spoken = np.stack([code for code, _ in mouthed(own, times, factors, Said(1), base, 2.0, nothing)])
    rest = [i for i in range(20) if not 6 <= i < 14]
    assert np.array_equal(spoken[:, rest], own[:, rest])
    assert np.allclose(spoken[:, 6:14], base + 1.4, atol=1e-6)
    silent = np.stack([code for code, _ in mouthed(own, times, factors, Said(0), base, 2.0, nothing)])
    assert np.allclose(silent[:, 6:14], base, atol=1e-6)


def test_weights_with_other_codes_are_refused(tmp_path, clip, speech):
    engine = CodeEngine()
    engine.description = {"weights": str(tmp_path / "others.safetensors"), "sha256": "0"}
    with pytest.raises(WeightsError):
        run(clip, speech, tmp_path / "out.mkv", engine)


def test_a_fit_of_banks_leaves_speech_its_coordinates(tmp_path):
    weights = tmp_path / "compact.safetensors"
    weights.write_bytes(find().read_bytes())
    (tmp_path / SPACE).write_bytes((find().parent / SPACE).read_bytes())
    banks = {name: np.eye(20) / 5 for name in NAMES[:-1]}
    fit = {"format": FORMAT, "weights_sha256": digest(weights), "neutral": [0.0] * 20, "sliders": {}}
    write_fit(fit_of(weights), fit | {"projectors": {name: bank.tolist() for name, bank in banks.items()}})
    engine = SimpleNamespace(description={"weights": str(weights), "sha256": digest(weights)})
    assert np.allclose(Factors.load(engine.description).projector("mouth"), np.eye(20) / 5)
    assert np.array_equal(mouth_factors(engine).projector("mouth"), coordinate_projectors()["mouth"])


# Masks


def test_the_mask_is_nothing_above_the_cheeks_and_everything_at_the_mouth():
    crop = np.zeros((64, 64, 3), np.uint8)
    mask = LowerFace(lambda picture: face_points(), 64)(crop, crop, 0.0)
    assert (mask[: int(64 * 0.45)] == 0).all()
    assert mask[48, 32] > 0.95
    assert mask[48, 2] == 0
    assert (LowerFace(lambda picture: None, 64)(crop, crop, 0.0) == 0).all()


def test_the_mask_leans_with_the_head():
    points = face_points()
    lean = np.radians(25)
    turn = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]], np.float32)
    points[:, :2] = (points[:, :2] - 32) @ turn.T + 32
    crop = np.zeros((64, 64, 3), np.uint8)
    mask = LowerFace(lambda picture: points, 64)(crop, crop, 0.0)
    eyes = points[[*EYES[0], *EYES[1]], :2].round().astype(int)
    assert (mask[eyes[:, 1], eyes[:, 0]] == 0).all()
    x, y = points[13, :2].round().astype(int)
    assert mask[y, x] > 0.9


# Lengths


@pytest.mark.parametrize(
    "end, spoken, expected",
    [
        ("trim", 3.0, Plan(0.0, 0.0, 3.0)),
        ("trim", 9.0, Plan(0.0, 0.0, 5.0)),
        ("pad", 3.0, Plan(0.0, 0.0, 5.0)),
        ("pad", 9.0, Plan(0.0, 0.0, 9.0, more_frames="hold")),
        ("loop", 3.0, Plan(0.0, 0.0, 5.0, loop_speech=True)),
        ("loop", 9.0, Plan(0.0, 0.0, 9.0, loop_speech=True, more_frames="loop")),
        ("error", 5.02, Plan(0.0, 0.0, 5.02)),
    ],
)
def test_what_happens_where_lengths_differ(end, spoken, expected):
    info = VideoInfo(Path("a.mp4"), 64, 64, Fraction(25), 125, duration=5.0)
    assert plan_length(info, Loudness(spoken, -20), DubSettings(audio_end=end)) == expected


def test_a_video_that_does_not_say_how_long_it_is_is_measured(clip):
    info = replace(probe(clip), duration=0.0)
    assert plan_length(info, Loudness(9.0, -20), DubSettings()).end == pytest.approx(36 / 30, abs=0.001)


def test_lengths_that_differ_can_be_an_error():
    info = VideoInfo(Path("a.mp4"), 64, 64, Fraction(25), 125, duration=5.0)
    with pytest.raises(InputError, match=r"3.00 s long, the source 5.00 s"):
        plan_length(info, Loudness(3.0, -20), DubSettings(audio_end="error"))
    with pytest.raises(InputError, match="--start"):
        plan_length(info, Loudness(3.0, -20), DubSettings(edit=EditSettings(start=3.5)))


@pytest.mark.parametrize("end, frames", [("pad", 48), ("loop", 48), ("trim", 36)])
def test_a_speech_that_is_longer_than_the_video(tmp_path, clip, speech, end, frames):
    report = run(clip, speech, tmp_path / "out.mkv", audio_end=end)
    found = list(read_frames(tmp_path / "out.mkv"))
    assert len(found) == report.output["frames"] == frames
    assert [round(30 * float(frame.time)) for frame in found] == list(range(frames))
    first, own = found[36 % frames].rgb, [frame.rgb for frame in read_frames(clip)]
    assert np.array_equal(first[:20], own[0 if end != "pad" else 35][:20])


# The whole


def test_a_failed_write_ends_the_stages_before_it(tmp_path, monkeypatch, clip, speech):
    def full_disk(frames, info, output, **options):
        next(iter(frames))
        raise OutputError("the disk is full", "free some space")

    monkeypatch.setattr("dpe_cli.edit.write_video", full_disk)
    before = threading.active_count()
    with pytest.raises(OutputError, match="disk is full") as raised:
        run(clip, speech, tmp_path / "o.mkv")
    assert raised.tb and threading.active_count() == before  # while the traceback still holds all of them


def test_the_speech_becomes_the_sound_and_nothing_above_the_mouth_changes(tmp_path, clip, speech):
    engine = CodeEngine()
    report = run(clip, speech, tmp_path / "out.mkv", engine)
    info = probe(tmp_path / "out.mkv")
    assert info.has_audio
    assert report.counts()["edited"] == 36
    changed = []
    for own, new in zip(read_frames(clip), read_frames(tmp_path / "out.mkv"), strict=True):
        assert np.array_equal(own.rgb[:55], new.rgb[:55])
        changed.append(np.abs(own.rgb[65:80, 70:90].astype(int) - new.rgb[65:80, 70:90]).mean())
    assert min(changed) > 5
    codes = np.stack([code for code, _ in engine.asked])
    assert codes[:, 6:14].std(0).max() > 0.01
    assert np.ptp(codes[-6:, 6:14], axis=0).max() == 0  # the speech is over: the mouth rests


def test_parts_of_a_video_have_the_codes_of_the_whole(tmp_path, clip, speech):
    whole = CodeEngine()
    run(clip, speech, tmp_path / "whole.mkv", whole)
    parts = CodeEngine()
    for number in range(4):
        span = {"start": number * 0.3, "end": number * 0.3 + 0.3}
        run(clip, speech, tmp_path / f"part{number}.mkv", parts, span)
    assert np.array_equal([code for code, _ in whole.asked], [code for code, _ in parts.asked])
    assert probe(tmp_path / "part2.mkv").has_audio


def test_the_old_sound_is_mixed_in(tmp_path, make_clip, speech):
    from dpe_cli.tracks import read_sound

    source = make_clip("own.mkv", seconds=1, size=(160, 120), colour=SKIN, tone=3000)
    loud = []
    for mix in (None, 0.5):
        output = tmp_path / f"mix{mix}.mkv"
        run(source, speech, output, mix=mix)
        heard = np.concatenate(list(read_sound(output, RATE)))[:RATE]
        spectrum = np.abs(np.fft.rfft(heard))
        loud.append(spectrum[2950:3050].max())
    assert loud[1] > 20 * loud[0]


def test_silence_follows_a_shorter_speech(tmp_path, make_clip):
    source = make_clip("long.mkv", seconds=2, size=(160, 120), colour=SKIN)
    audio = write_wave(tmp_path / "short.wav", babble(0.8))
    run(source, audio, tmp_path / "out.mkv", audio_end="pad")
    heard = np.concatenate(list(read_sound(tmp_path / "out.mkv", RATE)))
    assert len(heard) == pytest.approx(2 * RATE, abs=0.05 * RATE)
    assert np.abs(heard[: int(0.7 * RATE)]).max() > 0.01 > np.abs(heard[int(0.9 * RATE) :]).max()


@pytest.mark.parametrize("name", ["beep.mp3", "beep.m4a"])
def test_a_looped_speech_stays_with_the_lips(tmp_path, name):
    """Of formats whose length ffmpeg and we reckon differently."""
    beep = np.zeros(RATE)
    beep[int(0.3 * RATE) : int(0.4 * RATE)] = 0.5 * np.sin(np.arange(int(0.1 * RATE)))
    run_ffmpeg("-i", write_wave(tmp_path / "beep.wav", beep), tmp_path / name)
    period = read_loudness(tmp_path / name).seconds

    def begins(path: Path) -> np.ndarray:
        loud = np.flatnonzero(np.abs(np.concatenate(list(read_sound(path, RATE)))) > 0.2) / RATE
        return loud[np.diff(loud, prepend=-1) > 0.1]

    (first,) = begins(tmp_path / name)
    write_speech(tmp_path / "loop.wav", tmp_path / name, 0.0, 8.0, period, None)
    heard = begins(tmp_path / "loop.wav")
    assert len(heard) >= 7 and heard == pytest.approx(first + period * np.arange(len(heard)), abs=0.003)


@pytest.mark.parametrize("name", ["late.mkv", "late.ts"])
def test_sound_that_begins_late_in_its_file_is_cut_and_mixed_where_it_is_heard(tmp_path, make_clip, name):
    sound = {"audio_codec": "pcm_s16le"} if name == "late.mkv" else {}
    late = make_clip(name, seconds=1, start=0.5, **sound)
    heard = np.concatenate(list(read_sound(late, RATE)))
    write_speech(tmp_path / "speech.wav", late, 0.0, 1.4, None, None)
    spoken = np.concatenate(list(read_sound(tmp_path / "speech.wav", RATE)))
    first = float(probe(late).start)
    write_speech(tmp_path / "mixed.wav", write_wave(tmp_path / "none.wav", np.zeros(RATE)), 0.0, 0.9, None,
                 (late, first, 1.0))  # fmt: skip
    mixed = np.concatenate(list(read_sound(tmp_path / "mixed.wav", RATE)))
    begins = [np.flatnonzero(np.abs(samples) > 0.05)[0] / RATE for samples in (heard, spoken, mixed)]
    assert begins[1] == pytest.approx(begins[0], abs=0.005)
    assert begins[2] == pytest.approx(max(begins[0] - first, 0), abs=0.005)


def test_a_file_is_mixed_with_itself(tmp_path):
    tone = 0.2 * np.sin(2 * np.pi * 440 / RATE * np.arange(RATE))
    sound = write_wave(tmp_path / "tone.wav", tone)
    write_speech(tmp_path / "mixed.wav", sound, 0.0, 1.0, None, (sound, 0.0, 1.0))
    heard = np.concatenate(list(read_sound(tmp_path / "mixed.wav", RATE)))
    assert np.abs(heard[RATE // 4 : RATE // 2]).max() == pytest.approx(0.4, abs=0.02)


def test_of_several_sound_tracks_it_is_said_which_is_spoken(tmp_path, clip, speech):
    run_ffmpeg("-i", speech, "-i", speech, "-map", "0", "-map", "1", tmp_path / "two.mka")
    said = "two.mka has 2 sound tracks: the face says what is in the first"
    assert said in run(clip, tmp_path / "two.mka", tmp_path / "out.mkv").notes
    assert not any("tracks" in note for note in run(clip, speech, tmp_path / "one.mkv").notes)


def test_an_empty_sound_file_is_told_as_sound(tmp_path, clip):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(InputError, match=r"empty.wav cannot be opened as sound; .* can play it"):
        run(clip, tmp_path / "empty.wav", tmp_path / "out.mkv")


@pytest.mark.parametrize("still, size", [(True, (160, 120)), (False, (64, 64))])
def test_a_picture_talks(tmp_path, speech, still, size):
    write_image(tmp_path / "portrait.png", picture())
    engine = CodeEngine()
    run(tmp_path / "portrait.png", speech, tmp_path / "out.mkv", engine, still=still)
    info = probe(tmp_path / "out.mkv")
    assert (info.width, info.height) == size
    assert info.fps == 25
    assert len(list(read_frames(info.path))) == 40
    assert all((pose is None) == still for _, pose in engine.asked)
    lids = np.stack([code for code, _ in engine.asked])[:, 14:16]
    assert np.isclose(np.ptp(lids[:, 0]), 2, atol=0.2)  # one blink, by the seed


def test_a_head_follows_a_video(tmp_path, clip, speech):
    write_image(tmp_path / "portrait.png", picture())
    engine = CodeEngine()
    run(tmp_path / "portrait.png", speech, tmp_path / "out.mkv", engine, pose=str(clip), blink="off")
    own = engine.motion_codes(np.stack([read_image(tmp_path / "portrait.png")]))[0]
    assert all(np.allclose(pose[:6], own[:6], atol=1e-5) for _, pose in engine.asked)  # its codes' pose stands still


def test_a_talking_head_is_as_large_as_is_asked(tmp_path, clip, speech):
    write_image(tmp_path / "portrait.png", picture())
    run(tmp_path / "portrait.png", speech, tmp_path / "out.mkv", edit={"crop_size": 90})
    assert next(read_frames(tmp_path / "out.mkv")).rgb.shape == (90, 90, 3)
    for source, settings in ((clip, {}), (tmp_path / "portrait.png", {"still": True})):
        with pytest.raises(InputError, match="no size of its own"):
            run(source, speech, tmp_path / "no.mkv", edit={"crop_size": 90}, **settings)


def test_requests_that_make_no_sense_are_refused(tmp_path, clip, speech):
    with pytest.raises(InputError, match="whose own head"):
        run(clip, speech, tmp_path / "out.mkv", pose="generate")
    with pytest.raises(InputError, match="no sound to mix"):
        run(clip, speech, tmp_path / "out.mkv", mix=0.5)
    with pytest.raises(InputError, match="holds no sound"):
        run(clip, clip, tmp_path / "out.mkv")
    done = CliRunner().invoke(cli, ["dub", "-s", str(clip), "-a", str(tmp_path / "none.wav"), "-o", "x.mp4"])
    assert done.exit_code == 3
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["o.mkv", "speech.wav", "talk.mkv", "notes.json"])
def test_a_report_takes_nothing_s_place(tmp_path, clip, speech, name):
    (tmp_path / "notes.json").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = command("dub", "-s", clip, "-a", speech, "-o", tmp_path / "o.mkv", "--report", tmp_path / name)
    assert done.exit_code == 7 and name in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options, words", [(("--pose", "off"), "keep, generate"), (("--blink", "keep"), "auto, off")])
def test_a_word_of_the_other_option_is_no_word_of_this_one(tmp_path, speech, options, words):
    write_image(tmp_path / "portrait.png", picture())
    done = command("dub", "-s", tmp_path / "portrait.png", "-a", speech, "-o", tmp_path / "o.mkv", *options)
    assert done.exit_code == 3 and f"{options[1]} does not exist" in done.stderr and words in done.stderr


def test_a_frame_whose_face_has_no_landmarks_is_passed_and_not_edited(tmp_path, monkeypatch, clip, speech):
    class Blind:
        def detect(self, crop: np.ndarray) -> None:
            return None

    monkeypatch.setattr(dub, "NetworkLandmarker", Blind)
    report = run(clip, speech, tmp_path / "o.mkv")
    assert report.counts()["edited"] == 0 and "no frame was edited" in report.notes
    assert report.counts()["reasons"] == {NO_MASK: 36}
    assert pixels(tmp_path / "o.mkv") == pixels(clip)


def test_options_that_would_do_nothing_are_refused(tmp_path, clip, speech):
    portrait = tmp_path / "portrait.png"
    write_image(portrait, picture())
    for span in ({"start": 1.0}, {"end": 2.0}):
        with pytest.raises(UsageError, match=r"portrait.png is a picture.*leave --start and --end out"):
            run(portrait, speech, tmp_path / "no.mkv", edit=span)
    for source, settings in ((clip, {}), (portrait, {"still": True}), (portrait, {"pose": "keep"})):
        with pytest.raises(UsageError, match="leave --no-paste out"):
            run(source, speech, tmp_path / "no.mkv", edit={"paste": False}, **settings)
    for settings in ({"pose_style": 3}, {"seed": 3}):
        with pytest.raises(UsageError, match="leave --pose-style and --seed to pictures"):
            run(clip, speech, tmp_path / "no.mkv", **settings)
    with pytest.raises(UsageError, match="there is no pose style 46"):
        run(portrait, speech, tmp_path / "no.mkv", pose_style=46)


def test_a_report_replaces_no_input(tmp_path, clip, speech):
    (tmp_path / "consent.txt").write_text("I agree.")
    (tmp_path / "s.toml").write_text("")
    options = ["dub", "-s", clip, "-a", speech, "-o", tmp_path / "o.mkv", "--overwrite"]
    options += ["--consent", tmp_path / "consent.txt", "--config", tmp_path / "s.toml"]
    for name in ("consent.txt", "s.toml", "o.mkv.dpe.json"):
        done = command(*options, "--report", tmp_path / name)
        assert done.exit_code == 7 and name in done.stderr, done.stderr
    assert (tmp_path / "consent.txt").read_text() == "I agree." and not list(tmp_path.glob("o.*"))


def test_a_source_that_gives_no_name_needs_one(tmp_path, speech):
    for number in range(3):
        write_image(tmp_path / f"in_{number}.png", picture())
    for begin in (["dub"], ["plan"]):
        done = command(*begin, "-s", tmp_path / "in_%d.png", "-a", speech)
        assert done.exit_code == 7 and "gives the output no name; name it with --output" in done.stderr, done.stderr
    assert not list(tmp_path.glob("*dub*"))


@pytest.mark.parametrize("more", [[], ["-q"]])
def test_nothing_is_said_where_the_video_goes(monkeypatch, commands, clip, speech, more):
    monkeypatch.setattr(dub, "dub_video", lambda *_, **__: Report())
    done = command("dub", "-s", clip, "-a", speech, "-o", "-", *more)
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    for said in (["--json"], ["--progress", "openjd"]):
        done = command("dub", "-s", clip, "-a", speech, "-o", "-", *said)
        assert done.exit_code == 2 and "cannot both go to standard output" in done.stderr


def test_help_knows_the_pose_styles():
    option = next(param for param in dub_command.params if param.name == "pose_style")
    assert (option.type.min, option.type.max) == (0, load_nets().config.styles - 1)


# Segments


class MoodyEngine(CodeEngine):
    """Its results depend on the size of a batch and on what came before, as those of real networks do."""

    def __init__(self):
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.mood = 0

    def edit(self, crops: np.ndarray, expression: np.ndarray, pose: np.ndarray | None) -> np.ndarray:
        edited = super().edit(crops, expression, pose) // 2
        edited[:, 20:60, 8:56] += np.uint8((self.mood + len(crops)) % 8)
        self.mood = (3 * self.mood + int(crops[-1, 0, 0, 0]) + int(1000 * np.abs(expression).sum())) % 64
        return edited + np.uint8(0 if pose is None else int(1000 * np.abs(pose).sum()) % 16)


class TremblingLandmarks:
    """Sees a face that moves with what the crop holds."""

    def detect(self, crop: np.ndarray):
        moved = int(crop[::4, ::4].astype(int).sum()) % 7 - 3
        return type("Shape", (), {"points": face_points(len(crop)) + np.float32(moved)})


def talking(path: Path, frames: int, fps: Fraction, start: float = 0.0) -> Path:
    """A face that changes its colours, half a second in another room, with a hole of a few frames."""
    noise = np.random.default_rng(0)
    info = VideoInfo(path, 160, 120, fps, frames, time_base=Fraction(1, 30000))

    def pictures():
        for n in range(frames):
            rgb = picture(shade=60 + 5 * (n % 5)).astype(int)
            rgb[40:100, 50:110] += noise.integers(-20, 20, 3)
            yield Frame(n, Fraction(start) + n / fps, np.clip(rgb, 0, 255).astype(np.uint8))

    write_video(pictures(), info, path, codec="ffv1")
    return path


PARTS = {
    "as long": (60, 7.5, {}, {}),
    "trim": (60, 6.1, {}, {}),
    "pad the speech": (60, 4.0, {"audio_end": "pad"}, {}),
    "hold the last frame": (40, 7.0, {"audio_end": "pad"}, {}),
    "loop the speech": (60, 3.3, {"audio_end": "loop"}, {}),
    "loop the video": (21, 7.3, {"audio_end": "loop"}, {}),
    "loop a span": (40, 7.3, {"audio_end": "loop"}, {"start": 1.3, "smooth": 1.0}),
    "span": (60, 7.5, {}, {"start": 1.3, "end": 6.9, "smooth": 1.0}),
    "still, generated": (0, 3.5, {"seed": 3, "pose_style": 2}, {}),
    "still, whole picture": (0, 2.0, {"still": True}, {}),
    "still, a head to follow": (0, 2.0, {"pose": "head.mkv", "blink": "head.mkv"}, {"paste": True}),
}


@pytest.mark.parametrize("case", PARTS)
def test_eight_segments_give_the_frames_the_sound_and_the_report_of_one_run(tmp_path, monkeypatch, case):
    frames, seconds, settings, edit = PARTS[case]
    monkeypatch.setattr(dub, "NetworkLandmarker", TremblingLandmarks)
    if frames:
        source = talking(tmp_path / "talk.mkv", frames, Fraction(8))
    else:
        source = tmp_path / "talk.png"
        write_image(source, picture())
    head = str(talking(tmp_path / "head.mkv", 20, Fraction(8)))
    settings = {name: head if value == "head.mkv" else value for name, value in settings.items()}
    audio = write_wave(tmp_path / "speech.wav", babble(seconds))
    chosen = DubSettings(edit=EditSettings(**{"codec": "ffv1", "smooth": 0.0, **edit}), **settings)
    whole, parts = tmp_path / "whole.mkv", tmp_path / "parts.mkv"
    wanted = dub_video(source, audio, whole, MoodyEngine(), ColourDetector(), chosen)
    plan = make_dub_plan(tmp_path / "plan.json", source, audio, parts, MoodyEngine(), ColourDetector(), chosen, count=8)
    assert plan.segments == 8
    for segment in reversed(range(8)):
        edit_segments(read_plan(plan.path), segment, segment, MoodyEngine(), ColourDetector())
    found = join_plan(read_plan(plan.path))
    assert pixels(parts) == pixels(whole)
    assert np.array_equal(*(np.concatenate(list(read_sound(path, RATE))) for path in (parts, whole)))
    assert found.frames == wanted.frames and found.notes == wanted.notes and found.cuts == wanted.cuts
    assert found.output["pixels_sha256"] == wanted.output["pixels_sha256"]
    assert found.settings == wanted.settings and found.inputs == wanted.inputs


@pytest.mark.parametrize("name", ["o.mp4", "o.mov"])
@pytest.mark.parametrize(
    "vfr, settings, span", [(True, {"mix": 0.5}, {"start": 0.7}), (False, {"audio_end": "pad"}, {})]
)
def test_joined_times_sound_and_tags_are_those_of_one_run(tmp_path, make_clip, name, vfr, settings, span):
    source = make_clip("own.mp4", seconds=2, fps=25, vfr=vfr, size=(160, 120), colour=SKIN, tone=3000, start=0.5)
    audio = write_wave(tmp_path / "speech.wav", babble(2.9))
    chosen = DubSettings(edit=EditSettings(smooth=0.0, **span), **settings)
    whole, parts = tmp_path / f"whole_{name}", tmp_path / name
    dub_video(source, audio, whole, MoodyEngine(), ColourDetector(), chosen)
    plan = make_dub_plan(tmp_path / "p.json", source, audio, parts, MoodyEngine(), ColourDetector(), chosen, count=3)
    for segment in range(3):
        edit_segments(plan, segment, segment, MoodyEngine(), ColourDetector())
    join_plan(plan)
    found, wanted = described(parts), described(whole)
    assert len(found) > 50 and found == wanted


def test_a_full_disk_is_not_the_fault_of_the_speech(tmp_path, speech, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho 'Error writing trailer: No space left on device' >&2; exit 1\n")
    program.chmod(0o700)
    monkeypatch.setenv("DPE_FFMPEG", str(program))
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_speech(tmp_path / "cut.wav", speech, 0.2, 1.0, None, None)


def test_a_limit_of_a_files_size_is_not_the_fault_of_the_speech(tmp_path, speech):
    with largest_file(4096), pytest.raises(OutputError, match="File too large; allow larger files"):
        write_speech(tmp_path / "cut.wav", speech, 0.2, 1.0, None, None)


def test_a_speech_or_networks_that_changed_since_the_plan_are_refused(tmp_path, monkeypatch, clip, speech):
    arguments = (clip, speech, tmp_path / "o.mkv", CodeEngine(), ColourDetector(), DubSettings())
    plan = make_dub_plan(tmp_path / "p.json", *arguments, count=2)
    with monkeypatch.context() as patch:
        patch.setattr("dpe_cli.segments.networks_used", lambda: {"speech": "0"})
        with pytest.raises(WeightsError, match="other networks"):
            edit_segments(plan, 0, 0, CodeEngine(), ColourDetector())
    write_wave(speech, babble(0.5))
    with pytest.raises(InputError, match="speech.wav is not the file that was planned"):
        edit_segments(plan, 0, 0, CodeEngine(), ColourDetector())


def test_every_damaged_value_of_a_dub_s_plan_is_told(tmp_path, clip, speech):
    arguments = (clip, speech, tmp_path / "o.mkv", CodeEngine(), ColourDetector(), DubSettings())
    plan = make_dub_plan(tmp_path / "p.json", *arguments, count=2)
    words = json.loads(plan.path.read_text())
    for name in words["dub"]:
        for wrong in (None, [], {}, "x", [None], {"x": 1}):
            plan.path.write_text(json.dumps({**words, "dub": {**words["dub"], name: wrong}}))
            try:
                read_plan(plan.path).written_as()
            except InputError:
                continue
            assert name in ("networks", "audio")  # which were not found to be the same
    for wrong in ([], 3, "x", {}):
        plan.path.write_text(json.dumps({**words, "dub": wrong}))
        with pytest.raises(InputError, match=r"p\.json"):
            read_plan(plan.path)


# The commands

STAND_INS = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_dub
import dpe_cli.dub, dpe_cli.engine, dpe_cli.face, dpe_cli.planner
from dpe_cli.main import cli
class Slow(test_dub.MoodyEngine):
    def edit(self, *arguments):
        time.sleep(float(sys.argv[1]))
        return super().edit(*arguments)
dpe_cli.planner.SEGMENT_SECONDS = 0.4
dpe_cli.dub.load_nets, dpe_cli.dub.NetworkLandmarker = test_dub.speech_nets, test_dub.FixedLandmarks
dpe_cli.engine.Engine = lambda weights, **options: Slow()
dpe_cli.face.make_detector = lambda name, models: test_dub.ColourDetector()
cli(sys.argv[2:])
"""


@pytest.fixture
def commands(monkeypatch) -> None:
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda weights, **options: MoodyEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda name, models: ColourDetector())


@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_dub_that_was_stopped_goes_on(tmp_path, commands, clip, speech, how, code):
    output = tmp_path / "o.mkv"
    options = ["dub", "-s", clip, "-a", speech, "-o", output, "--codec", "ffv1", "--smooth", 0, "--resume"]
    process = started(0.2, *options, code=STAND_INS)
    records = lambda: len(list(work_folder(output).glob("plan.0*.json")))  # noqa: E731
    wait_for(process, lambda: records() >= 1)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and not output.exists(), stderr
    assert 1 <= records() <= 2
    done = command(*options)
    assert done.exit_code == 0 and "of 3 segments are there already" in done.stderr, done.stderr
    assert not work_folder(output).exists() and Path(f"{output}.dpe.json").exists()
    run(clip, speech, tmp_path / "whole.mkv", MoodyEngine())
    assert pixels(output) == pixels(tmp_path / "whole.mkv")
    assert command(*options).exit_code == 7


def test_another_speech_begins_anew(tmp_path, clip, speech):
    class Failing(MoodyEngine):
        def edit(self, *arguments):
            if len(self.asked) > 20:
                raise RuntimeError("killed")
            return super().edit(*arguments)

    output, said, settings = tmp_path / "o.mkv", [], DubSettings()
    with pytest.raises(RuntimeError, match="killed"):
        dub_resumable(clip, speech, output, Failing(), ColourDetector(), settings, seconds=0.4)
    write_wave(speech, babble(1.0))
    dub_resumable(clip, speech, output, MoodyEngine(), ColourDetector(), settings, seconds=0.4, say=said.append)
    assert any("begins anew" in line for line in said) and not any("already" in line for line in said)


def test_plan_dub_and_join_by_command(tmp_path, commands, clip, speech):
    output, plan = tmp_path / "o.mkv", tmp_path / "o.plan.json"
    options = ["-s", clip, "-a", speech, "-o", output, "--codec", "ffv1", "--smooth", 0]
    looked = command("plan", *options, "--json")
    assert json.loads(looked.stdout)["frames"] == 36, looked.stderr
    done = command("plan", *options, "--split", 3)
    assert (done.exit_code, done.stdout) == (0, f"{plan}\n"), done.stderr
    assert f"dpe dub --segment 0 {plan}" in done.stderr
    wrong = command("edit", "--segment", 0, plan)
    assert wrong.exit_code == 3 and "dpe dub --segment" in wrong.stderr
    assert "dpe dub --segment 0" in command("join", plan).stderr
    assert command("dub", "--segment", 0, plan, "--seed", 3).exit_code == 2
    for segment in (2, 0, 1):
        done = command("dub", "--segment", segment, plan)
        assert (done.exit_code, done.stdout) == (0, f"{tmp_path / f'o.plan.000{segment}.mkv'}\n"), done.stderr
    done = command("join", plan, "--report", tmp_path / "r.json")
    assert (done.exit_code, done.stdout) == (0, f"{output}\n"), done.stderr
    run(clip, speech, tmp_path / "whole.mkv", MoodyEngine())
    assert pixels(output) == pixels(tmp_path / "whole.mkv") and probe(output).has_audio
    report, sidecar = (json.loads(path.read_text()) for path in (tmp_path / "r.json", Path(f"{output}.dpe.json")))
    assert report["settings"]["mode"] == "dub" and report["counts"]["edited"] == 36
    assert sidecar["command"] == "dub" and {"source", "audio"} == sidecar["inputs"].keys()


def test_plans_of_dubs_that_make_no_sense(tmp_path, commands, clip, speech):
    write_image(tmp_path / "portrait.png", picture())
    cases = [
        (["-s", clip, "-a", speech, "--strength", 0.5], 2),
        (["-s", clip, "-d", clip, "--seed", 3], 2),
        (["-s", clip, "-a", speech, "--end", 1, "--start", 2], 2),
        (["-s", clip, "-a", tmp_path / "none.wav"], 3),
        (["-s", clip, "-a", clip], 3),
        (["-s", clip, "-a", speech, "--pose", "generate"], 2),
        (["-s", clip, "-a", speech, "-o", clip], 7),
        (["-s", tmp_path / "portrait.png", "-a", speech], 0),
        (["-s", tmp_path / "portrait.png", "-a", speech, "--pose-style", 99], 2),
        (["-s", clip, "-a", speech, "-o", "o_%03d.png", "--split", 2], 7),
    ]
    for options, code in cases:
        done = command("plan", *options)
        assert done.exit_code == code, (options, done.stderr)
    still = command("plan", "-s", tmp_path / "portrait.png", "-a", speech, "--json")
    assert json.loads(still.stdout)["frames"] == 40
