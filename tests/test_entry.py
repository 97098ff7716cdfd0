"""The process of a command: signals before and after the work, and standard streams that are closed."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_edit import clip

STAND_INS = """
from test_edit import ColourDetector, ColourEngine
import dpe_cli.engine, dpe_cli.face
dpe_cli.engine.Engine = lambda weights, **options: ColourEngine()
dpe_cli.face.make_detector = lambda name, models: ColourDetector()
"""
DEFAULT = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background of a shell


def process(
    code: str, *arguments: str | Path, closed: tuple[int, ...] = (), into: str | None = None
) -> subprocess.CompletedProcess:
    """dpe in a process of its own, before which `code` is run.

    `closed` are numbers of standard streams, `into` is the file that standard output is.
    """
    before = f"import os, signal, sys, threading, time\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{DEFAULT}"
    code = f"{before}{code}\nfrom dpe_cli.commands.entry import run\nrun()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        stdout = stack.enter_context(open(into, "wb")) if into else subprocess.PIPE
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60,
            check=False, preexec_fn=lambda: [os.close(number) for number in closed] and None,
        )  # fmt: skip


@pytest.fixture
def talk(tmp_path: Path) -> list[str | Path]:
    """An edit of talk.mp4 to o.mp4 in the same folder."""
    source, driving = clip(tmp_path / "talk.mp4", [True] * 3), clip(tmp_path / "smile.mp4", [True])
    return ["edit", "-s", source, "-d", driving, "-o", tmp_path / "o.mp4"]


# Signals


@pytest.mark.parametrize("name", ["dpe_cli.main", "dpe_cli.commands.layers"])
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "Interrupted: nothing was left half-written"), (signal.SIGTERM, 75, "Stopped")],
)
def test_a_signal_while_the_command_is_loaded(name: str, number: int, code: int, words: str):
    hook = f"""
class Hook:
    def find_spec(self, name, *_):
        if name == {name!r}:
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Hook())
"""
    done = process(hook, "weights", "list")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{words}\n")


def test_ctrl_c_while_options_are_read():
    code = """
from dpe_cli.commands import layers
layers.apply = lambda ctx: signal.raise_signal(signal.SIGINT)
"""
    done = process(code, "weights", "list")
    assert (done.returncode, done.stdout) == (130, "") and done.stderr.startswith("Interrupted")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_process_does_not_wait_for_threads_and_runs_what_was_asked_for_its_end(
    tmp_path: Path, number: int, code: int
):
    """Python's own end aborts where a thread comes back from torch."""
    work = f"""
import atexit, pathlib
from dpe_cli.commands import weights
def stopped(*_):
    threading.Thread(target=time.sleep, args=(100,)).start()
    signal.raise_signal({int(number)})
atexit.register(pathlib.Path({str(tmp_path / "ended")!r}).touch)
import dpe_cli.weights
dpe_cli.weights.find = stopped
"""
    done = process(work, "weights", "verify")
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (tmp_path / "ended").exists()


# Standard streams


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2)], ids=str)
def test_a_closed_stream_is_not_missed(talk: list, closed: tuple[int, ...]):
    done = process(STAND_INS, *talk, closed=closed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if 1 in closed else f"{talk[-1]}\n")
    assert talk[-1].exists()


def test_a_table_for_a_closed_stream_is_not_missed(talk: list):
    assert process(STAND_INS, "plan", *talk[1:], closed=(1,)).returncode == 0


def test_3_and_7_for_a_closed_stream_that_is_wanted(talk: list):
    _, _, source, *rest, output = talk
    done = process(STAND_INS, "edit", "-s", "-", *rest, output, closed=(0,))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        3, "Error: standard input is closed; send the source there, or name a file"
    )  # fmt: skip
    assert process(STAND_INS, "edit", "-s", source, *rest, "-", closed=(1,)).returncode == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_7_where_the_result_is_there_and_cannot_be_told(talk: list):
    done = process(STAND_INS, *talk, into="/dev/full")
    line = "Error: standard output cannot be written: No space left on device; all else is done: the result is "
    assert (done.returncode, done.stderr.splitlines()[-1]) == (7, line + str(talk[-1]))
    assert talk[-1].exists()


def test_standard_input_is_called_so(talk: list):
    _, _, _, *rest = talk
    done = process(STAND_INS, "edit", "-s", "-", *rest)
    assert done.returncode == 3 and "Error: standard input cannot be opened as a video; " in done.stderr
