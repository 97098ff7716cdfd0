"""Mutated inputs for everything that reads a file: `python tests/fuzz.py KIND,... COUNT [SEED]`.

Prints a line of JSON for each kind: the inputs tried, how they ended, and the findings. A finding is an error that is
none of ours, a memory that grows without bound, a hang (its stack is shown, and the process ends), or something left in
the folder. The input in hand lies in the folder named at the start, so that what crashes can be tried again.
"""

import collections
import contextlib
import faulthandler
import io
import json
import pickle
import random
import resource
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from conftest import run_ffmpeg
from test_edit import ColourDetector, ColourEngine, clip, picture

from dpe_cli import engine, face
from dpe_cli.errors import DPEError
from dpe_cli.main import cli
from dpe_cli.manifest import read_manifest
from dpe_cli.motion import read_curve
from dpe_cli.motion_file import probe_driving, read_motion
from dpe_cli.page import write_page
from dpe_cli.segment_plan import read_plan
from dpe_cli.video import probe
from dpe_cli.weights import load_any, save
from dpe_cli.writer import write_image

HANG = 60  # seconds
MEMORY = 12 << 30  # bytes of address space
KNOWN = {0, 2, 3, 4, 5, 6, 7, 8, 10}
EDGES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1", b"\xff\xff\xff\x7f"]
WORDS = [b"null", b"-1", b"1e999", b"1e-400", b"NaN", b"[]", b"{}", b'""', b"true", b"[" * 9000, b"9" * 5000, b"1/0"]
WORDS += [b"\xff\xfe", b"\0", b"\n", b'"', b",", b"{", b"}", b"\\ud800", b"0" * 30, b"%s%n", b"../../x", b"-"]


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to six changes: bits, edge values, words, cuts, repeats, and parts of other files."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        near = chance.random() < 0.6  # heads and indices lie at the ends
        span = min(len(data), 2048)
        at = chance.randrange(span + 1) if near else chance.randrange(len(data) + 1)
        at = len(data) - at if near and chance.random() < 0.4 else at
        length = chance.choice([1, 2, 4, 8, 64, 512])
        way = chance.randrange(8)
        if way == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif way == 1 and data:
            data[at % len(data)] = chance.randrange(256)
        elif way == 2:
            data[at : at + 4] = chance.choice(EDGES)
        elif way == 3:
            data[at : at + chance.choice([0, 1, 4])] = chance.choice(WORDS)
        elif way == 4:
            del data[at : at + length]
        elif way == 5:
            data[at:at] = data[at : at + length] * chance.choice([1, 2, 50])
        elif way == 6:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + length]
        elif chance.random() < 0.3:
            del data[at:]
    return bytes(data)


def run(*arguments: object) -> str:
    """A command with stand-ins for the networks; gives its exit code. Raises AssertionError for an unknown one."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code in KNOWN, f"exit code {done.exit_code}: {done.stderr[-300:]}"
    return f"exit {done.exit_code}"


# What is tried: seeds by the name of the file, and a function that reads one


def containers(folder: Path) -> list[Path]:
    talk = clip(folder / "talk.mp4", [True] * 4)
    texts = folder / "texts.srt"
    texts.write_text("1\n00:00:00,000 --> 00:00:00,100\nhello\n")
    made = []
    sound = ["-f", "lavfi", "-t", "0.2", "-i", "sine=frequency=300"]
    for name, options in {
        "a.mp4": ["-c:v", "copy", "-c:s", "mov_text"],
        "b.mkv": ["-c:v", "copy", "-c:s", "srt"],
        "c.mov": ["-c:v", "mpeg4", "-c:a", "pcm_s16le", "-c:s", "mov_text"],
        "d.avi": ["-c:v", "mjpeg", "-c:a", "mp3", "-sn"],
        "e.ts": ["-c:v", "copy", "-sn"],
        "f.webm": ["-c:v", "libvpx", "-c:a", "libopus", "-sn"],
        "g.nut": ["-c:v", "ffv1", "-sn"],
        "h.gif": ["-an", "-sn"],
    }.items():
        maps = ["-map", "0:v", "-map", "1:a", "-map", "2:s"]
        run_ffmpeg("-i", talk, *sound, "-i", texts, *maps, *options, folder / name)
        made.append(folder / name)
    return made


def try_container(file: Path, chance: random.Random) -> str:
    output, good = file.parent / "out.mp4", file.parents[1] / "seeds" / "talk.mp4"
    what = ["-s", good, "-d", file] if chance.random() < 0.3 else ["-s", file, "-d", good]
    what += ["--audio", file] if chance.random() < 0.2 else []
    what += ["--start", "0.04", "--end", "0.1"] if chance.random() < 0.3 else []
    ended = run("edit", *what, "-o", output, "-q", "--no-sidecar")
    assert output.exists() == (ended == "exit 0"), "an output that should not be, or none"
    if output.exists():
        probe(output)  # raises where it is not whole
        output.unlink()
    return ended


def stills(folder: Path) -> list[Path]:
    write_image(folder / "a.png", picture())
    write_image(folder / "b.jpg", picture())
    write_image(folder / "c.png", picture().astype(np.uint16) * 257, np.full((120, 160), 900, np.uint16))
    for name in ("d.bmp", "e.tiff", "f.webp", "g.ppm"):
        run_ffmpeg("-i", folder / "a.png", folder / name)
    clip(folder / "talk.mp4", [True] * 4)
    return sorted(file for file in folder.iterdir() if file.suffix != ".mp4")


def checkpoints(folder: Path) -> list[Path]:
    import torch

    from dpe_cli.models import DPE, DPEConfig

    config = DPEConfig(8, {4: 2, 8: 2}, latent_dim=4, motion_dim=2)
    state = DPE(config).state_dict()
    save(folder / "a.safetensors", state, config)
    torch.save(state, folder / "b.pt")
    torch.save({"gen": state, "options": [1, "two"]}, folder / "c.pt", _use_new_zipfile_serialization=False)
    (folder / "d.pt").write_bytes(pickle.dumps({"gen": [1.0] * 3}))
    return sorted(folder.iterdir())


def try_checkpoint(file: Path, chance: random.Random) -> str:
    load_any(file)
    return "read"


def motions(folder: Path) -> list[Path]:
    from dpe_cli.drivings import extract_motion
    from dpe_cli.request import EditSettings

    stand_in = ColourEngine()
    stand_in.description = {"weights": "stand-in", "sha256": "00"}
    stand_in.shifts = lambda codes: (codes, codes)
    talk = clip(folder / "talk.mp4", [True, True, False, True])
    extract_motion(talk, folder / "a.safetensors", stand_in, ColourDetector(), EditSettings())
    return [folder / "a.safetensors"]


def try_motion(file: Path, chance: random.Random) -> str:
    probe_driving(file)
    driver = read_motion(file, "00")
    driver.track.at(0.1, "pingpong")
    driver.track.at(1e6, "loop")
    return "read"


def texts(folder: Path) -> list[Path]:
    rows = [{"id": "one", "source": "talk.mp4", "driving": "smile.mp4", "mode": "pose", "start": 0.5, "paste": True}]
    rows += [{"id": 2, "source": "talk.mp4", "edit": ["face=left,driving=smile.mp4"], "output": "both.mov", "cost": 3}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "list.csv").write_text("id,source,driving,strength\none,talk.mp4,smile.mp4,0.5\ntwo,a.mp4,b.mp4,\n")
    (folder / "curve.csv").write_text("seconds,strength\n0,1\n2,0.5\n")
    (folder / "curves.csv").write_text("seconds,factor,value\n0,mouth,1\n2,mouth_open,0.5\n")
    (folder / "set.toml").write_text('device = "cpu"\n[edit]\nstrength = 0.8\npaste = false\n')
    talk = clip(folder / "talk.mp4", [True] * 4)
    run("edit", "-s", talk, "-d", talk, "-o", folder / "o.mp4", "--report", folder / "report.json", "-q")
    return [folder / name for name in ("list.jsonl", "list.csv", "curve.csv", "curves.csv", "set.toml", "report.json")]


def try_text(file: Path, chance: random.Random) -> str:
    name = file.stem.lstrip("x")
    if name == "report":
        output = file.with_suffix(".html")
        try:
            write_page(file, output)
        finally:
            output.unlink(missing_ok=True)
    elif name == "curve":
        read_curve(file).at(1.0)
    elif name == "list":
        read_manifest(file)
        return run("batch", file, "--output-template", "{id}.mp4", "--print-commands", "-q")
    elif name == "curves":
        return run("edit", "-s", "missing.mp4", "-d", "missing.mp4", "--curve", file)
    else:
        return run("config", "--config", file, "--show", "edit")
    return "read"


def plans(folder: Path) -> list[Path]:
    talk = clip(folder / "talk.mp4", [True] * 4)
    run("plan", "-s", talk, "-d", talk, "-o", folder / "o.mp4", "--split", 2, "--plan", folder / "p.json", "-q")
    return [folder / "p.json", folder / "p.safetensors"]


def try_plan(file: Path, chance: random.Random) -> str:
    import hashlib
    import shutil

    seeds = file.parents[1] / "seeds"
    here = file.parent / "p.json"
    table = file if file.suffix == ".safetensors" else seeds / "p.safetensors"
    text = file if file.suffix == ".json" else seeds / "p.json"
    beside = here.with_suffix(".safetensors")
    shutil.copy(table, beside)
    old = hashlib.sha256((seeds / "p.safetensors").read_bytes()).hexdigest().encode()
    here.write_bytes(text.read_bytes().replace(old, hashlib.sha256(beside.read_bytes()).hexdigest().encode()))
    try:
        read_plan(here)
    finally:
        here.unlink()
        beside.unlink()
    return "read"


KINDS: dict[str, tuple[Callable, Callable]] = {
    "container": (containers, try_container),
    "still": (stills, try_container),
    "checkpoint": (checkpoints, try_checkpoint),
    "motion": (motions, try_motion),
    "text": (texts, try_text),
    "plan": (plans, try_plan),
}


def recompressed(data: bytes, chance: random.Random) -> bytes:
    """A zip file, as torch writes it, with a changed member: bare changes break its checksums and are seen at once."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    chosen = chance.choice([name for name in source.namelist() if source.read(name)])
    with zipfile.ZipFile(target, "w") as written:
        for name in source.namelist():
            content = source.read(name)
            written.writestr(name, mutated(content, [content], chance) if name == chosen else content)
    return target.getvalue()


def fuzz(kind: str, count: int, seed: int, folder: Path) -> dict:
    """Tries `count` inputs. Gives the figures."""
    make, attempt = KINDS[kind]
    engine.Engine = lambda *weights, **options: ColourEngine()
    face.make_detector = lambda name, models: ColourDetector()
    (folder / "seeds").mkdir()
    seeds = [(file.suffix, file.stem, file.read_bytes()) for file in make(folder / "seeds")]
    others, chance = [data for _, _, data in seeds], random.Random(seed)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    ended, findings = collections.Counter(), []
    work = folder / "work"
    for number in range(count):
        work.mkdir(exist_ok=True)
        suffix, stem, data = chance.choice(seeds)
        file = work / f"x{stem}{suffix}"
        zipped = data.startswith(b"PK") and chance.random() < 0.7
        file.write_bytes(recompressed(data, chance) if zipped else mutated(data, others, chance))
        faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
        try:
            how = attempt(file, chance)
        except DPEError as error:
            how = type(error).__name__
        except BaseException as error:
            how = "finding"
            lines = traceback.format_exc().splitlines()
            findings.append({"number": number, "file": file.name, "error": f"{type(error).__name__}: {error}"[:300]})
            findings[-1]["where"] = " | ".join(line.strip() for line in lines[-7:])[-500:]
            with contextlib.suppress(OSError):
                file.rename(folder / f"finding-{number}{suffix}")
        faulthandler.cancel_dump_traceback_later()
        file.unlink(missing_ok=True)
        if left := sorted(str(one.relative_to(work)) for one in work.rglob("*")):
            findings.append({"number": number, "file": file.name, "error": f"left behind: {left}"})
            for one in work.rglob("*"):
                one.is_file() and one.unlink()
        ended[how] += 1
    return {"kind": kind, "seed": seed, "tried": count, "ended": dict(ended), "findings": findings}


if __name__ == "__main__":
    kinds, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    for kind in kinds.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"dpe-fuzz-{kind}-"))
        print(f"in {folder}", file=sys.stderr)
        print(json.dumps(fuzz(kind, count, seed, folder)), flush=True)
