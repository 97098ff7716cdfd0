"""What the networks hear, and what they are taught, on sounds made here."""

import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_clips

from dpe_cli import metrics
from dpe_cli.errors import InputError
from dpe_cli.listing import Source
from dpe_cli.main import cli
from dpe_cli.models import SpeechConfig, SpeechNets
from dpe_cli.models.speech import Voice
from dpe_cli.motion_space import MotionSpace
from dpe_cli.prepare import cut_sound, open_sound
from dpe_cli.speech import COLUMNS, HOP, RATE, WINDOW, Loudness, Samples, gate, measure, mel_columns, mel_filters
from dpe_cli.speech_motion import Person, PoseMotion, SpeechMotion, blink_at, hear, read_loudness
from dpe_cli.tracks import read_sound
from dpe_cli.train_speech import PAD, Sampler, SpeechTraining, contrast, load_talks
from dpe_cli.weights import folder, load_speech


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def babble(seconds: float, rate: int = RATE) -> np.ndarray:
    """Harmonics of 150 Hz in syllables, three a second."""
    time = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 12))
    return 0.2 * tone * (0.5 - 0.5 * np.cos(2 * np.pi * 3 * time))


def blocks_of(samples: np.ndarray, size: int = 700) -> list[np.ndarray]:
    return [samples[i : i + size].astype(np.float32) for i in range(0, len(samples), size)]


# Sound


def test_sound_is_read_as_one_channel_at_the_rate_asked_for(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    heard = np.concatenate(list(read_sound(write_wave(tmp_path / "a.wav", 0.5 * tone, 48000), RATE)))
    assert abs(len(heard) - RATE) < 50
    spectrum = np.abs(np.fft.rfft(heard[:RATE] if len(heard) >= RATE else heard))
    assert abs(int(spectrum.argmax()) * RATE / len(heard) - 440) < 3
    assert np.isclose(heard[1000:-1000].std(), 0.5 / np.sqrt(2), rtol=0.02)


def test_sound_that_begins_late_begins_with_silence(make_clip):
    clip = make_clip("late.mkv", seconds=1, start=0.5, audio_codec="pcm_s16le")
    heard = np.concatenate(list(read_sound(clip, RATE)))
    assert not heard[: int(0.48 * RATE)].any()
    assert heard[int(0.52 * RATE) :].std() > 0.05


def test_a_file_without_sound_is_refused(make_clip):
    with pytest.raises(InputError, match="holds no sound"):
        next(read_sound(make_clip(audio=False), RATE))


def test_samples_are_silent_outside_the_sound_and_kept_only_while_needed():
    sound = np.arange(1, 10001, dtype=np.float32)
    samples = Samples(iter(blocks_of(sound)))
    assert samples.window(-3, 4).tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert samples.window(5000, 5003).tolist() == [5001, 5002, 5003]
    assert len(samples.kept) < 1500
    assert samples.window(9999, 10002).tolist() == [10000, 0, 0]
    assert samples.window(20000, 20002).tolist() == [0, 0]


# Mel columns


def test_columns_show_a_tone_at_its_band_and_silence_at_the_floor():
    time = np.arange(8000) / RATE
    columns = mel_columns(np.sin(2 * np.pi * 1000 * time).astype(np.float32))
    centres = mel_filters() @ np.fft.rfftfreq(WINDOW, 1 / RATE) / mel_filters().sum(1)
    assert abs(centres[columns.mean(0).argmax()] - 1000) < 60
    assert (mel_columns(np.zeros(2000, np.float32)) == -4).all()
    assert columns.max() <= 4


def test_a_part_of_a_sound_has_exactly_the_columns_of_the_whole():
    sound = babble(1).astype(np.float32)
    whole, part = mel_columns(sound), mel_columns(sound[10 * HOP :])
    assert np.array_equal(whole[10:], part)
    assert COLUMNS == 80


# Loudness and gate


def test_loudness_is_of_the_speech_whatever_silence_surrounds_it():
    speech = babble(3)
    alone = measure(blocks_of(speech))
    padded = measure(blocks_of(np.concatenate([np.zeros(5 * RATE), speech, np.zeros(5 * RATE)])))
    assert padded.seconds == 13.0
    assert abs(alone.level - padded.level) < 1
    assert abs(measure(blocks_of(speech / 10)).level - alone.level + 20) < 1
    assert measure(blocks_of(np.zeros(RATE))).gain == 100  # the most there is


def test_the_gate_opens_for_speech_and_not_for_noise_far_below_it():
    levels = np.full(100, -60.0)
    levels[40:60] = -20
    opened = gate(levels, -20.0)  # frames 6 to 93
    assert (opened[36:52] == 1).all()
    assert (opened[:25] == 0).all()
    assert (opened[62:] == 0).all()
    assert 0 < opened[54] < 1  # softly


# Networks


@pytest.fixture(scope="module")
def nets() -> SpeechNets:
    torch.manual_seed(0)
    nets = SpeechNets(SpeechConfig(width=16, dilations=(1, 4), sync_width=16))
    nets.aperture.copy_(torch.linspace(0.01, 0.05, 8))
    nets.closed.copy_(torch.tensor([0.1, 0.02]))
    return nets.eval().requires_grad_(False)


PERSON = Person(*(np.full(8, value, np.float32) for value in (0, 0.5, 0.6)))


def test_networks_give_a_frame_for_a_frame_and_refuse_sizes_that_do_not_fit(nets):
    mel = torch.randn(2, 80, (20 + 10) * 16 // 5 + 16)
    longer = torch.randn(2, 80, (20 + 2 * nets.config.reach) * 16 // 5 + 16)
    assert nets.expression(longer, *torch.zeros(3, 2, 8)).shape == (2, 20, 8)
    assert nets.sync.hear(mel).shape == nets.sync.watch(torch.randn(2, 30, 8)).shape == (2, 20, 64)
    pose, style = torch.randn(2, 32, 6), torch.tensor([0, 3])
    heard = nets.pose.hear(torch.randn(2, 80, 35 * 16 // 5 + 16))
    mean, _ = nets.pose.encode(pose, heard, style)
    assert nets.pose.decode(mean, heard, style).shape == pose.shape
    with pytest.raises(ValueError, match="multiple of five"):
        SpeechConfig(dilations=(1, 2))
    with pytest.raises(ValueError, match="multiple of five"):
        SpeechConfig(around=4)


def test_a_frame_hears_what_is_around_it_and_nothing_else(nets):
    frames, reach = 40, nets.config.reach
    mel = torch.zeros(1, 80, (frames + 2 * reach) * 16 // 5 + 16)
    quiet = nets.expression(mel, *torch.zeros(3, 1, 8))[0]
    mel[..., 8 + (20 + reach) * 16 // 5] = 3.0  # at the time of frame 20
    moved = (nets.expression(mel, *torch.zeros(3, 1, 8))[0] - quiet).abs().sum(1).nonzero()[:, 0]
    assert 20 in moved
    assert moved.min() >= 20 - reach - 2
    assert moved.max() <= 20 + reach + 2


def test_a_microphone_is_taken_out_of_speech_and_silence_stays_silent():
    torch.manual_seed(0)
    voice = Voice(40)
    columns = torch.randn(1, 80, 160)
    tone = torch.linspace(-1, 1, 80)[:, None]
    assert torch.allclose(voice(columns + 1 + tone), voice(columns + 1 - tone), atol=0.15)
    assert voice(columns + 1).mean().abs() < 0.2
    assert voice(torch.full((1, 80, 160), -4.0)).max() < -2


def test_parts_give_exactly_the_motion_of_the_whole(nets, tmp_path):
    path = write_wave(tmp_path / "speech.wav", babble(12))
    loudness = read_loudness(path)
    times = np.arange(0, 12, 1 / 29.97)
    whole = SpeechMotion(path, nets, loudness, PERSON)
    head = PoseMotion(hear(path, loudness), nets, 1)
    everything = np.stack([np.concatenate([whole.at(t), head.at(t)]) for t in times])
    assert everything.std(0).min() > 0
    for first in range(0, len(times), len(times) // 8 + 1):
        part = SpeechMotion(path, nets, loudness, PERSON)
        again = PoseMotion(hear(path, loudness), nets, 1)
        for number in range(first, min(first + len(times) // 8 + 1, len(times))):
            found = np.concatenate([part.at(times[number]), again.at(times[number])])
            assert np.array_equal(found, everything[number])


def test_silence_closes_the_gate_and_speech_opens_it(nets, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.0005, 4 * RATE)
    path = write_wave(tmp_path / "speech.wav", np.concatenate([noise, babble(4), noise]))
    motion = SpeechMotion(path, nets, read_loudness(path), PERSON)
    opened = np.array([motion.at(t)[8] for t in np.arange(0, 12, 0.04)])
    assert (opened[:90] == 0).all()
    assert opened[110:190].mean() > 0.9
    assert (opened[215:] == 0).all()


def test_a_loop_speaks_again(nets, tmp_path):
    path = write_wave(tmp_path / "speech.wav", babble(2))
    loudness = Loudness(2.0, read_loudness(path).level)
    motion = SpeechMotion(path, nets, loudness, PERSON, loop=True)
    once = [motion.at(t) for t in (0.4, 1.0)]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(once, [motion.at(t) for t in (2.4, 3.0)], strict=True))
    assert SpeechMotion(path, nets, loudness, PERSON).at(3.0)[8] == 0


def test_blinks_come_about_as_often_as_people_blink():
    lids = np.array([blink_at(t, seed=4) for t in np.arange(0, 64, 0.01)])
    assert np.isclose(lids.max(), 1, atol=0.01)
    assert ((lids[1:] > 0.5) & (lids[:-1] <= 0.5)).sum() == 20


def test_a_mouth_that_is_never_closed_is_closed_by_the_way_it_opens(nets):
    codes = np.zeros((20, 20), np.float32)
    codes[:, 6:14] = np.linspace(0.5, 1.5, 20)[:, None]
    person = Person.of(codes, nets)
    assert np.isclose(float(nets.opening(torch.from_numpy(person.closed))), 0.02, atol=1e-4)
    assert float(nets.opening(torch.from_numpy(person.closed + person.usual))) > 0.1
    still = Person.of(codes[:1], nets)
    assert np.array_equal(still.usual, nets.mean_mouth.numpy())
    assert np.array_equal(still.spread, nets.mean_spread.numpy())


# Prepared sound and training


def test_a_prepared_clip_keeps_its_sound_and_a_late_one_is_moved(tmp_path, make_clip):
    video = make_clip("talk.mp4", audio=False)
    samples = np.zeros(3 * RATE)
    samples[int(1.2 * RATE)] = 0.9
    assert open_sound(Source(video, "talk")) is None
    write_wave(video.with_suffix(".wav"), samples)
    found = cut_sound(open_sound(Source(video, "talk")), np.array([0.5, 1.5]), late=0.2)
    at = np.abs(found["sound"].astype(int)).argmax() / RATE + found["sound_start"]
    assert found["sound_start"] == -0.5
    assert len(found["sound"]) == 3 * RATE
    assert abs(at - 1.0) < 0.001


@pytest.fixture
def talking(tmp_path):
    """Prepared clips of twelve people with sound, the last two held out."""
    data = tmp_path / "data"
    data.mkdir()
    write_clips(data, [*(f"id{number:04}" for number in range(10)), "id0020", "id0040"])
    for path in data.glob("*.npz"):
        with np.load(path) as old:
            kept = dict(old)
        sound = (babble(5) * 32767).astype(np.int16)
        np.savez(path, **kept, times=np.linspace(0, 2.44, 12), sound=sound, sound_start=-1.0)
    return data


@pytest.mark.parametrize("stage", ["audio", "pose"])
def test_training_writes_networks_that_load(talking, tmp_path, stage):
    steps = ["--set", f"stage={stage}", "--set", "steps=2", "--set", "batch=2"]
    done = CliRunner().invoke(cli, ["train", "--data", str(talking), "-o", str(tmp_path / "run"), *steps])
    assert done.exit_code == 0, done.output
    loaded = load_speech(tmp_path / "run" / "speech.safetensors")
    assert json.loads(loaded.metadata["training"])["steps"] == 2
    assert loaded.state["aperture"].abs().sum() > 0


def test_clips_without_sound_are_refused(prepared, tmp_path):
    done = CliRunner().invoke(
        cli, ["train", "--data", str(prepared), "-o", str(tmp_path / "r"), "--set", "stage=audio"]
    )
    assert done.exit_code == 3
    assert "with sound" in done.output


def test_contrast_is_least_where_the_same_moments_agree():
    vectors = torch.nn.functional.normalize(torch.randn(3, 12, 64), dim=-1)
    assert contrast(vectors, vectors, torch.tensor(20.0)) < 0.1
    assert contrast(vectors, vectors.flip(0), torch.tensor(20.0)) > 3


def test_talks_lie_on_the_grid(talking):
    talks = load_talks(talking, MotionSpace.load(folder() / "motion-space.json"), held_out=False)
    assert {len(talk) for talk in talks} == {60}
    assert all(talk.mel.shape == (60 * 16 // 5 + 2 * PAD, 80) for talk in talks)
    assert SpeechTraining().frames % 5 == 0


def test_what_tells_the_usual_mouth_is_never_what_is_sought(talking):
    talks = load_talks(talking, MotionSpace.load(folder() / "motion-space.json"), held_out=False)[:1]
    numbers = np.arange(60, dtype=np.float32)[:, None].repeat(8, 1)
    sampler = Sampler([replace(talks[0], mouth=numbers)], SpeechConfig(), SpeechTraining())
    for start, allowed in ((0, range(20, 60)), (40, range(40))):
        told = sampler.reference(sampler.talks[0], start, start + 20)[:, 0]
        assert len(told) >= 20
        assert set(told) <= set(allowed)
    assert len(sampler.reference(sampler.talks[0], 5, 55)) < 20


def test_a_stretch_at_another_tempo_keeps_sound_and_mouth_together(talking):
    talk = load_talks(talking, MotionSpace.load(folder() / "motion-space.json"), held_out=False)[0]
    moments = np.arange(len(talk.mel), dtype=np.float32)[:, None].repeat(80, 1)  # each column tells when it was
    talk = replace(talk, mel=moments, mouth=np.arange(60, dtype=np.float32)[:, None].repeat(8, 1))
    sampler = Sampler([talk], SpeechConfig(), SpeechTraining())
    tempos = set()
    for _ in range(5):
        mel, mouth, _ = sampler.at_tempo(talk, 20, 20, 10)
        heard = mel[0, 8 + (10 + 5 * np.arange(4)) * 16 // 5]
        assert np.allclose((heard - PAD) / 3.2, mouth[::5, 0], atol=0.01)
        tempos.add(round(float(mouth[1, 0] - mouth[0, 0]), 3))
    assert len(tempos) == 5
    assert np.array_equal(sampler.at_tempo(talk, 0, 20, 10)[1], talk.mouth[:20])  # nothing to hear before the clip


# Measures


def test_lag_and_offset_find_a_shift():
    series = np.random.default_rng(1).normal(size=120)
    late = np.roll(series, 3)
    assert metrics.best_lag(late, series) == 3
    assert metrics.best_lag(series, late) == -3
    for count in range(10):  # shorter than the reach
        assert abs(metrics.best_lag(late[:count], series[:count])) <= max(10 * (count < 3), count - 3)
    vectors = np.random.default_rng(2).normal(size=(60, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    offset, confidence = metrics.sync_offset(vectors, np.roll(vectors, 2, 0))
    assert offset == 2
    assert confidence > 0.8


def test_beats_on_the_sound_align_and_others_do_not():
    series = np.zeros(100)
    series[[10, 40, 70]] = 1.0
    found = metrics.beats(series)
    assert found.tolist() == [10, 40, 70]
    assert metrics.beat_alignment(found, found) == 1
    assert metrics.beat_alignment(found, found + 12) < 0.01


def test_true_motion_is_nearer_to_the_truth_than_a_constant_mouth(talking):
    from dpe_cli.evaluate_dub import SYSTEMS, evaluate_dub
    from dpe_cli.train_speech import measure_people

    random = np.random.default_rng(0)
    aperture, lips = random.uniform(0.01, 0.05, 8), random.normal(0, 0.02, (8, 40, 3))

    def clear(talk):  # lips that follow the coordinates exactly
        mouth = np.abs(random.normal(0, 1, (len(talk), 8))).astype(np.float32)
        return replace(talk, mouth=mouth, opening=mouth @ aperture, lips=np.tensordot(mouth, lips, 1))

    space = MotionSpace.load(folder() / "motion-space.json")
    nets = SpeechNets(SpeechConfig(width=16, dilations=(1, 4), sync_width=16)).eval().requires_grad_(False)
    measure_people(nets, [clear(talk) for talk in load_talks(talking, space, held_out=False)])
    assert np.allclose(nets.aperture.numpy(), aperture, atol=1e-3)
    summary = evaluate_dub(nets, [clear(talk) for talk in load_talks(talking, space, held_out=True)])
    assert tuple(summary["mouth"]) == SYSTEMS
    assert summary["mouth"]["true motion"]["lmd"] < 0.8 * summary["mouth"]["constant mean"]["lmd"]
    assert summary["mouth"]["true motion"]["within_one"] == 1
    assert set(summary["heads"]["beat_alignment"]) == {"generated", "true", "generated, shuffled speech"}
