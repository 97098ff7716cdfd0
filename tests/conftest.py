"""What the tests share."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Path of a shared asset, under DPE_SHARED or beside the repository; skips the test when it is not there.

    With DPE_REQUIRE_SHARED=1 it fails instead, so that a green run has really looked at the assets.
    """
    root = Path(os.environ.get("DPE_SHARED") or Path(__file__).resolve().parents[2] / "shared")

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            give_up = pytest.fail if os.environ.get("DPE_REQUIRE_SHARED") == "1" else pytest.skip
            give_up(f"{path} is not there; set DPE_SHARED to the folder of shared assets")
        return path

    return find


def run_ffmpeg(*arguments: object) -> None:
    """Runs ffmpeg; its complaint fails the test."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def make_clip(tmp_path: Path) -> Callable[..., Path]:
    """Makes small clips in tmp_path.

    `vfr` keeps frames 0 3 6 7 9 12 14 ... of 30 a second; `start` moves all times (seconds); `rotation` is the display
    matrix, degrees counter-clockwise as ffmpeg takes it; `tone` is in Hz, `tracks` of sound lie an octave apart;
    `colour` (R, G, B) gives a flat picture; `matrix` and `levels` are its tags; `filters` come before the conversion to
    `pix_fmt`; `alpha` makes the left half transparent to a third; `more` are further options of ffmpeg.
    Odd sizes want pix_fmt="yuv444p".
    """

    def make(
        name: str = "clip.mp4",
        seconds: float = 1,
        fps: str | int = "30000/1001",
        size: tuple[int, int] = (320, 240),
        audio: bool = True,
        vfr: bool = False,
        rotation: int = 0,
        start: float = 0,
        pix_fmt: str = "yuv420p",
        tone: int = 440,
        tracks: int = 1,
        audio_codec: str = "aac",
        video_codec: str = "libx264",
        colour: tuple[int, int, int] | None = None,
        matrix: str | None = None,
        levels: str = "tv",
        filters: tuple[str, ...] = (),
        alpha: bool = False,
        more: tuple[str, ...] = (),
    ) -> Path:
        path, shape = tmp_path / name, f"{size[0]}x{size[1]}"
        fps = 30 if vfr else fps
        picture = f"color=c=0x{bytes(colour).hex()}:" if colour else "testsrc="
        picture += f"s={shape}:r={fps},format=gbrp"  # here, for else the colour would be made in YUV
        clear = ["format=gbrap", "geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='if(lt(X,W/2),85,255)'"] if alpha else []
        exact = "flags=bicubic+accurate_rnd+full_chroma_int"
        filters = [*filters, *clear, *(["select='not(mod(n,3))+not(mod(n,7))'"] if vfr else [])]
        filters += [f"scale=out_color_matrix={matrix or 'bt601'}:out_range={levels}:{exact}"]
        filters += [f"format={pix_fmt}"]
        if matrix:
            filters += [f"setparams=range={levels}:colorspace={matrix}:color_primaries={matrix}:color_trc={matrix}"]
        else:
            filters += ["setparams=range=unknown:colorspace=unknown"]
        inputs = ["-f", "lavfi", "-t", seconds, "-i", picture]
        maps = ["-map", "0:v"]
        for track in range(tracks if audio else 0):
            inputs += ["-f", "lavfi", "-t", seconds, "-i", f"sine=frequency={tone * 2**track}:sample_rate=44100"]
            maps += ["-map", f"{track + 1}:a"]
        upright = path.with_stem(path.stem + "_upright") if rotation else path
        codecs = ["-c:v", video_codec, "-pix_fmt", pix_fmt, "-fps_mode", "passthrough", "-c:a", audio_codec]
        speed = ["-preset", "ultrafast", "-crf", "12", "-bf", "2"] if video_codec == "libx264" else ["-q:v", "3"]
        filtered = ["-filter:v", ",".join(filters)]
        run_ffmpeg(*inputs, *maps, *filtered, *codecs, *speed, *more, "-output_ts_offset", start, upright)
        if rotation:
            run_ffmpeg("-display_rotation", rotation, "-i", upright, "-map", "0", "-c", "copy", path)
        return path

    return make


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process and its children can grow beyond `size` bytes, as by `ulimit -f`."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def synthetic_face(seed: int = 0) -> np.ndarray:
    """478 points on the front of an ellipsoid, outer eye corners one unit apart: (478, 3)"""
    random = np.random.default_rng(seed)
    x, y = random.uniform(-0.9, 0.9, 478), random.uniform(-1.2, 1.2, 478)
    face = np.stack([x, y, 0.4 * (x**2 + y**2)], -1)
    face[[33, 133, 362, 263], :2] = [[-0.5, -0.3], [-0.2, -0.3], [0.2, -0.3], [0.5, -0.3]]
    face[[13, 14, 61, 291], :2] = [[0, 0.50], [0, 0.52], [-0.25, 0.5], [0.25, 0.5]]
    return face


def turned(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Rotation matrix of a head, degrees."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("YXZ", [yaw, pitch, roll], degrees=True).as_matrix()


def write_clips(folder: Path, identities: list[str], discs: bool = False) -> None:
    """A clip of twelve frames for each: a face that turns and opens its mouth over a picture that grows brighter.

    discs: marks the corners of eyes and mouth and the lower lip, so that there is something to learn from.
    """
    random = np.random.default_rng(1)
    template = synthetic_face()
    for number, identity in enumerate(identities):
        points, frames = [], []
        for step in range(12):
            face = template.copy()
            face[14, 1] += 0.02 * (step % 6)
            face[:, :2] += random.normal(0, 0.003, (478, 2))
            points.append(60 * face @ turned(yaw=3 * step - 15).T + [128, 128, 0])
            frames.append(np.full((256, 256, 3), 20 * step, np.uint8))
            for corner in (33, 263, 61, 291, 14) if discs else ():
                cv2.circle(frames[-1], points[-1][corner, :2].round().astype(int).tolist(), 9, (255, 40, 80), -1)
        np.save(folder / f"{number}.npy", np.stack(frames))
        np.savez(
            folder / f"{number}.npz",
            points=np.stack(points).astype(np.float32),
            blendshapes=random.uniform(0, 0.3, (12, 52)).astype(np.float32),
            identity=identity,
        )


@pytest.fixture
def prepared(tmp_path):
    """Prepared clips of twelve people."""
    write_clips(tmp_path, [f"id{number:04}" for number in range(12)], discs=True)
    return tmp_path
