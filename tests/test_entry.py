"""The process of a command: signals before and after the work, and standard streams that are closed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEFAULT = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background of a shell


def process(code: str, *arguments: str | Path, closed: tuple[int, ...] = ()) -> subprocess.CompletedProcess:
    """dpe in a process of its own, before which `code` is run; `closed` are numbers of standard streams."""
    before = f"import os, signal, sys, threading, time\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{DEFAULT}"
    code = f"{before}{code}\nfrom dpe_cli.commands.entry import run\nrun()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: [os.close(number) for number in closed] and None,
    )  # fmt: skip


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
