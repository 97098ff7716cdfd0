"""Makes the two clips of the demo from the public-domain portrait that scikit-image carries; needs no network.

    python examples/make_demo.py examples/out

source.mp4   640x480, 30000/1001 frames a second, 4 s: a portrait under a slowly moving camera, the head swaying a
             little, one blink, a speech-like sound track.
driving.mp4  512x512, 25 frames a second, 4 s: the same face mirrored, broadened and tinted, talking and blinking.
speech.wav   16 kHz, 4 s: a sentence of vowels, hisses and closures from a formant synthesiser of a few lines; nobody's
             voice. `dpe dub` makes the source say it.
"""

import sys
import tempfile
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from scipy.interpolate import PchipInterpolator
from skimage.data import astronaut

from dpe_cli.video import Frame, VideoInfo
from dpe_cli.writer import write_video

SCALE = 3  # the portrait is enlarged so much before it is warped, so that edges move by fractions of its pixels
SECONDS = 4.0
SAMPLE_RATE = 48000

# Points on the portrait as x, y in its 512 x 512 pixels: MediaPipe's FaceLandmarker was run on it once and these few of
# its 478 points, which outline what moves, were written down. Left and right are the picture's.
LEFT_EYE = {
    "brow": [(190, 91), (196, 89.5), (204, 88.5), (211, 90), (217, 93)],
    "upper": [(194.5, 101), (197.3, 99.1), (202.7, 97.7), (206.2, 98.3), (209.7, 100.1), (213.6, 103.7)],
    "lower": [(194.5, 101), (198.4, 102.9), (200.8, 103.7), (204.2, 104.2), (207.6, 104.2), (213.6, 103.7)],
}
RIGHT_EYE = {
    "brow": [(233, 94), (239, 92), (247, 91), (254, 92.5), (260, 95)],
    "upper": [(236.4, 104.9), (240.8, 101.6), (244.4, 100.2), (248.3, 100.1), (251.6, 100.9), (256, 104)],
    "lower": [(236.4, 104.9), (239.4, 105.5), (242.5, 106), (246.1, 106.6), (249.6, 106.4), (256, 104)],
}
UPPER_LIP = [(203.5, 139.9), (209.4, 140.7), (217.6, 142.4), (223.2, 143.1), (229, 142.8), (237.5, 141.7), (243, 141.2)]
LOWER_LIP = [
    (203.5, 139.9),
    (209.5, 145.1),
    (217.5, 148.6),
    (222.8, 149.4),
    (228.2, 149.1),
    (236.7, 146.2),
    (243, 141.2),
]
MOUTH = (203.5, 243.0)  # columns of its corners
JAW = [(178, 132), (185, 149), (194.8, 163), (205.2, 172.6), (221, 177.8), (237.7, 174.5), (249.4, 165.8), (261, 153),
       (272, 132)]  # fmt: skip
NECK = 206.0  # nothing below this row moves with the jaw
WIDEST = 18.0  # how far the lower lip sinks in the widest opening
PALATE, TONGUE = np.array([38, 10, 12]), np.array([130, 52, 50])  # RGB of the open mouth's inside, top and bottom


def curve(points: list[tuple[float, float]], columns: np.ndarray) -> np.ndarray:
    """Rows of a smooth curve through points at the given columns, all in enlarged pixels; level beyond its ends."""
    x, y = np.array(points).T * SCALE
    return PchipInterpolator(x, y)(np.clip(columns, x[0], x[-1]))


def bump(columns: np.ndarray, left: float, right: float) -> np.ndarray:
    """1 in the middle of left..right, smoothly 0 at both and beyond."""
    across = np.clip((columns / SCALE - left) / (right - left), 0, 1)
    return np.sin(np.pi * across) ** 2


def stretch(
    picture: np.ndarray, columns: np.ndarray, before: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, slice]:
    """Columns of a picture stretched and squeezed up and down.

    before, after: (knots, n) rows that rise with the knot; what lies at `before` comes to `after`, linear between.
    Returns the stretched rows as (height, n, 3) uint8 and which rows of the picture they are.
    """
    rows = np.arange(int(after.min()) - 1, int(after.max()) + 2, dtype=np.float64)
    from_row = np.stack([np.interp(rows, after[:, i], before[:, i]) for i in range(len(columns))], axis=1)
    from_column = np.broadcast_to(columns, from_row.shape)
    stretched = cv2.remap(picture, from_column.astype(np.float32), from_row.astype(np.float32), cv2.INTER_CUBIC)
    return stretched, slice(int(rows[0]), int(rows[-1]) + 1)


def lay(picture: np.ndarray, patch: np.ndarray, rows: slice, columns: np.ndarray, cover: np.ndarray) -> None:
    """Blends a patch into the picture in place, where cover (height, n) is above 0; 1 hides what was there."""
    where = (rows, slice(int(columns[0]), int(columns[-1]) + 1))
    cover = np.clip(cover, 0, 1)[..., None]
    picture[where] = (patch * cover + picture[where] * (1 - cover)).astype(np.uint8)


def close_eye(picture: np.ndarray, eye: dict[str, list[tuple[float, float]]], closed: float) -> None:
    """Draws the upper lid down over an eye, in place. closed: 0 as in the portrait .. 1 shut."""
    columns = np.arange(int(eye["upper"][0][0] * SCALE), int(eye["upper"][-1][0] * SCALE) + 1)
    brow, upper, lower = (curve(eye[name], columns) for name in ("brow", "upper", "lower"))
    edge = upper + SCALE * 0.6  # the lashes go with the lid
    moved = edge + closed * np.maximum(lower + SCALE * 0.8 - edge, 0)
    lid, rows = stretch(picture, columns, np.stack([brow, edge]), np.stack([brow, moved]))
    at = np.arange(rows.start, rows.stop)[:, None]
    lay(picture, lid, rows, columns, np.minimum((moved - at) / SCALE + 0.5, at - brow))


def move_jaw(picture: np.ndarray, opening: float) -> None:
    """Moves lower lip and chin, in place. opening: -1 lips closed .. 0 as in the portrait .. 1 wide open."""
    columns = np.arange(int(JAW[0][0] * SCALE), int(JAW[-1][0] * SCALE) + 1)
    upper, lower, jaw = (curve(points, columns) for points in (UPPER_LIP, LOWER_LIP, JAW))
    jaw = np.maximum(jaw, lower + SCALE)
    if opening < 0:
        sink, chin = opening * (lower - upper), opening * SCALE * 3 * bump(columns, 178, 272)
    else:
        sink = opening * WIDEST * SCALE * bump(columns, *MOUTH) ** 0.35
        chin = opening * WIDEST * SCALE * 0.9 * bump(columns, 178, 272)
    neck = np.full(len(columns), NECK * SCALE)
    skin, rows = stretch(picture, columns, np.stack([lower, jaw, neck]), np.stack([lower + sink, jaw + chin, neck]))
    at = np.arange(rows.start, rows.stop)[:, None]
    depth = np.clip((at - lower) / (WIDEST * SCALE), 0, 1)[..., None] ** 2
    seen = np.minimum((at - lower) / SCALE + 1.5, (lower + sink - at) / SCALE + 0.5)
    seen = np.minimum(seen, (lower - upper) / SCALE)  # nothing beyond the corners
    lay(picture, PALATE + depth * (TONGUE - PALATE), rows, columns, seen)
    lay(picture, skin, rows, columns, (at - lower - sink) / SCALE + 0.5)


def purse(picture: np.ndarray, amount: float) -> None:
    """Draws the corners of the mouth together, in place. amount: 0 as in the portrait .. 1 a quarter narrower."""
    left, right, top, bottom = (side * SCALE for side in (178, 268, 112, 196))
    x, y = np.meshgrid(np.arange(left, right, dtype=np.float64), np.arange(top, bottom, dtype=np.float64))
    weight = np.sqrt(bump(x, 178, 268) * bump(y, 112, 196))
    from_x = x + (x - sum(MOUTH) / 2 * SCALE) * 0.33 * amount * weight
    picture[top:bottom, left:right] = cv2.remap(
        picture, from_x.astype(np.float32), y.astype(np.float32), cv2.INTER_CUBIC
    )


def animate(portrait: np.ndarray, opening: float, closed: float, pursed: float = 0.0) -> np.ndarray:
    """The enlarged portrait with another mouth and other eyelids, as a new picture."""
    picture = portrait.copy()
    move_jaw(picture, opening)
    purse(picture, pursed)
    for eye in (LEFT_EYE, RIGHT_EYE):
        close_eye(picture, eye, closed)
    return picture


def view(
    picture: np.ndarray, size: tuple[int, int], centre: tuple[float, float], zoom: float, sway: float
) -> np.ndarray:
    """What a camera sees of an enlarged portrait.

    size: width, height of the view; centre: x, y in portrait pixels that its middle shows; zoom: its pixels per
    portrait pixel; sway: degrees by which the head leans, its surroundings standing still.
    """
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    x, y = (x - width / 2) / zoom + centre[0], (y - height / 2) / zoom + centre[1]
    across, down = x - 224, y - 190  # the head turns about the neck
    away = (across / 105) ** 2 + ((down + 70) / 105) ** 2
    angle = np.radians(sway) * np.clip(1.6 - away, 0, 1) ** 2
    x, y = (
        224 + across * np.cos(angle) + down * np.sin(angle),
        190 - across * np.sin(angle) + down * np.cos(angle),
    )
    maps = ((x + 0.5) * SCALE - 0.5).astype(np.float32), ((y + 0.5) * SCALE - 0.5).astype(np.float32)
    return cv2.remap(picture, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def blink(time: float, moments: dict[float, float]) -> float:
    """How far the lids are closed, 0..1. moments: middle -> length of each blink, seconds."""
    phases = [min(abs(time - middle) / length, 0.5) for middle, length in moments.items()]
    return float(np.clip(1.3 * np.cos(np.pi * min(phases)), 0, 1))


def talk(time: float) -> float:
    """Opening of the mouth, -1..1: syllables of changing strength."""
    syllable = 0.5 - 0.5 * np.cos(2 * np.pi * 1.5 * time)
    return float(-1 + 2 * syllable * (0.75 + 0.25 * np.cos(2 * np.pi * 0.4 * time + 0.5)))


def source_frame(portrait: np.ndarray, time: float) -> np.ndarray:
    """The source clip at a time: camera drifting and closing in, head swaying, one blink, a mouth that hardly moves."""
    turn = 2 * np.pi * time / SECONDS
    picture = animate(portrait, -0.25 + 0.25 * np.sin(turn), blink(time, {2.1: 0.3}))
    centre = (228 + 9 * np.sin(turn), 122 + 4 * np.sin(turn + 1))
    return view(picture, (640, 480), centre, 2.0 + 0.25 * time / SECONDS, 4 * np.sin(turn + 0.7))


def driving_frame(portrait: np.ndarray, time: float) -> np.ndarray:
    """The driving clip at a time: another complexion, mirrored and broadened, talking and blinking."""
    lids = blink(time, {0.6: 0.5, 1.6: 0.3, 2.7: 0.5, 3.45: 0.8})
    picture = animate(portrait, talk(time), lids, pursed=0.9)
    frame = view(picture, (480, 512), (226, 122), 2.4, 1.5 * np.sin(2 * np.pi * time / SECONDS))
    frame = cv2.resize(frame[:, ::-1], (512, 512), interpolation=cv2.INTER_AREA)
    return np.clip(frame * np.array([0.80, 0.72, 0.70]) + np.array([8, 4, 10]), 0, 255).astype(np.uint8)


def enlarged_portrait() -> np.ndarray:
    """The portrait that both clips are drawn from."""
    return cv2.resize(astronaut(), None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)


def frames(rate: Fraction, draw: Callable[[np.ndarray, float], np.ndarray], seconds: float) -> Iterator[Frame]:
    """The frames of a clip, drawn one by one."""
    portrait = enlarged_portrait()
    for index in range(round(seconds * rate)):
        yield Frame(index, index / rate, draw(portrait, float(index / rate)))


def write_voice(path: Path, seconds: float) -> None:
    """A speech-like tone as a wave file: harmonics of a gliding pitch under two formants, in the rhythm of `talk`."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 150 + 25 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    formants = ((600 + 200 * np.sin(2 * np.pi * 1.5 * time), 120), (1600 + 500 * np.sin(2 * np.pi * 0.9 * time), 200))
    sound = np.zeros_like(time)
    for harmonic in range(1, 20):
        strength = sum(np.exp(-(((pitch * harmonic - middle) / width) ** 2) / 2) for middle, width in formants)
        sound += (strength + 0.05) / harmonic**0.5 * np.sin(harmonic * phase)
    loudness = np.clip([(1 + talk(at)) / 2 for at in time[::480]], 0, 1)
    sound *= np.interp(time, time[::480], loudness)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((0.5 * sound / np.abs(sound).max() * 32767).astype("<i2").tobytes())


# What the synthesiser says: formants in Hz, how much is voice and how much hiss, how many seconds.
SOUNDS = {
    "a": (750, 1250, 1.0, 0.0, 0.17), "o": (450, 850, 0.9, 0.0, 0.15), "u": (320, 750, 0.8, 0.0, 0.14),
    "e": (500, 1850, 0.9, 0.0, 0.15), "i": (290, 2250, 0.8, 0.0, 0.13), "m": (250, 1000, 0.25, 0.0, 0.10),
    "n": (280, 1500, 0.25, 0.0, 0.08), "s": (4500, 6000, 0.0, 0.12, 0.11), "f": (1500, 5500, 0.0, 0.06, 0.09),
    "b": (300, 800, 0.06, 0.0, 0.07), "d": (300, 1700, 0.08, 0.0, 0.06), "p": (300, 800, 0.0, 0.0, 0.09),
    "t": (300, 1700, 0.0, 0.0, 0.08), "l": (380, 1300, 0.6, 0.0, 0.08), " ": (450, 1300, 0.0, 0.0, 0.35),
}  # fmt: skip
SENTENCE = " mamaba seto numi pafola  badima ubelo masi nato "


def say(sentence: str, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A sentence of SOUNDS as samples (N,) in [-1, 1]: a buzz and a hiss through two resonances that glide."""
    steps = [np.tile(SOUNDS[letter][:4], (round(SOUNDS[letter][4] * 200), 1)) for letter in sentence]
    track = np.concatenate(steps)  # 200 values a second
    smooth = np.hanning(13)[1:-1] / np.hanning(13).sum()
    track = np.stack([np.convolve(np.pad(column, 5, "edge"), smooth, "valid") for column in track.T], 1)
    time = np.arange(len(track) * rate // 200) / rate
    first, second, voice, hiss = (np.interp(time, np.arange(len(track)) / 200, column) for column in track.T)
    pitch = 115 + 12 * np.sin(2 * np.pi * 0.4 * time) - 4 * time
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    sound = np.zeros_like(time)
    for harmonic in range(1, 45):
        at = harmonic * pitch
        peaks = 1 / (1 + ((at - first) / 90) ** 2) + 0.5 / (1 + ((at - second) / 130) ** 2)
        sound += voice * (peaks + 0.08 / (1 + ((at - 2700) / 300) ** 2)) * np.sin(harmonic * phase) * (at < rate / 2)
    noise = np.random.default_rng(seed).normal(size=len(time))
    sound += hiss * np.diff(noise, prepend=0)  # a difference is mostly high
    return 0.5 * sound / np.abs(sound).max()


def write_speech(path: Path, seconds: float, rate: int = 16000) -> Path:
    """The sentence, cut or filled with silence, as a wave file."""
    sound = say(SENTENCE, rate)[: int(seconds * rate)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.pad(sound, (0, int(seconds * rate) - len(sound))) * 32767).astype("<i2").tobytes())
    return path


def make_clips(folder: Path, seconds: float = SECONDS) -> list[Path]:
    """Writes source.mp4, driving.mp4 and speech.wav into a folder, over older ones; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = (
        ("source.mp4", (640, 480), Fraction(30000, 1001), source_frame),
        ("driving.mp4", (512, 512), Fraction(25), driving_frame),
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        voice = Path(elsewhere) / "voice.wav"
        write_voice(voice, seconds)
        for name, size, rate, draw in clips:
            info = VideoInfo(folder / name, *size, rate, round(seconds * rate))
            write_video(frames(rate, draw, seconds), info, folder / name, audio=voice, overwrite=True)
    return [*(folder / name for name, *_ in clips), write_speech(folder / "speech.wav", seconds)]


if __name__ == "__main__":
    for path in make_clips(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/out")):
        print(path)
