"""The clips of the demo: made from a picture in a wheel, and moving the way a landmark detector sees."""

import importlib.util
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """examples/make_demo.py, which is a script and not installed."""
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "examples" / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def portrait(demo: ModuleType) -> np.ndarray:
    return demo.enlarged_portrait()


def test_the_clips_have_their_odd_rates_their_sizes_and_sound(demo: ModuleType, tmp_path: Path):
    from dpe_cli.video import probe, read_frames

    source, driving, speech = demo.make_clips(tmp_path / "out", seconds=0.4)
    for path, size, rate in ((source, (640, 480), Fraction(30000, 1001)), (driving, (512, 512), Fraction(25))):
        info, times = probe(path), [frame.time for frame in read_frames(path)]
        assert ((info.width, info.height), info.fps, info.has_audio) == (size, rate, True)
        assert times == [index / rate for index in range(round(rate * Fraction(2, 5)))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["driving.mp4", "source.mp4", "speech.wav"]
    with demo.wave.open(str(speech)) as file:
        assert file.getnframes() == 6400


def test_the_synthesiser_says_vowels_hisses_and_nothing(demo: ModuleType):
    loud = {letter: np.abs(demo.say("a" + letter * 5 + "a")[5000:7000]).mean() for letter in "asp"}
    assert loud["a"] > 3 * loud["s"] > 30 * loud["p"]
    high = np.abs(np.fft.rfft(demo.say("sssss")))
    assert high[len(high) // 2 :].sum() > high[: len(high) // 4].sum()


def test_a_resting_face_is_the_portrait_itself(demo: ModuleType, portrait: np.ndarray):
    moved = demo.animate(portrait, opening=0.0, closed=0.0)
    assert np.abs(moved.astype(int) - portrait).mean() < 0.2


def test_mouth_and_lids_move_and_nothing_else(demo: ModuleType, portrait: np.ndarray):
    changed = (demo.animate(portrait, opening=1.0, closed=1.0) != portrait).any(axis=-1)
    rows, columns = np.nonzero(changed)
    inside = np.array([rows.min(), rows.max(), columns.min(), columns.max()]) / demo.SCALE
    assert inside[0] > 85 and inside[1] <= demo.NECK + 1 and inside[2] > 175 and inside[3] < 275
    assert not changed[110 * demo.SCALE : 130 * demo.SCALE, 200 * demo.SCALE : 250 * demo.SCALE].any()  # the nose


def test_the_head_sways_while_the_surroundings_stand_still(demo: ModuleType, portrait: np.ndarray):
    upright, leaning = (demo.view(portrait, (640, 480), (228, 122), 2.0, sway) for sway in (0, 4))
    assert np.array_equal(upright[:, -40:], leaning[:, -40:])
    assert not np.array_equal(upright[100:300, 200:400], leaning[100:300, 200:400])


def test_the_default_detector_finds_both_faces_throughout(demo: ModuleType, portrait: np.ndarray):
    from dpe_cli.face import make_detector

    detector = make_detector("centerface")
    for draw in (demo.source_frame, demo.driving_frame):
        for time in np.arange(0, demo.SECONDS, 0.5):
            assert detector.detect(draw(portrait, time)), f"{draw.__name__} at {time} s"


def test_a_landmark_detector_sees_the_driving_talk_and_blink(demo: ModuleType, portrait: np.ndarray, shared):
    pytest.importorskip("mediapipe")
    from dpe_cli.landmarks import BLENDSHAPES, Landmarker, eye_openings, mouth_opening

    landmarker = Landmarker(shared("models/mediapipe/face_landmarker.task"))
    times = np.arange(0, demo.SECONDS, 0.12)
    shapes = [landmarker.detect(demo.driving_frame(portrait, time)) for time in times]
    landmarker.close()
    points = np.stack([shape.points for shape in shapes])
    blendshapes = dict(zip(BLENDSHAPES, np.stack([shape.blendshapes for shape in shapes]).T, strict=True))
    mouth, eyes = mouth_opening(points), eye_openings(points).mean(-1)
    assert np.corrcoef(mouth, [demo.talk(time) for time in times])[0, 1] > 0.9
    assert mouth.min() < 0.05 and mouth.max() > 0.3 and eyes.min() < 0.15 and eyes.max() > 0.28
    assert np.ptp(blendshapes["jawOpen"]) > 0.2 and np.ptp(blendshapes["eyeBlinkLeft"]) > 0.3
