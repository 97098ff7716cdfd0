"""The recipes in examples/cluster, without a cluster: stand-ins for dpe and for the scheduler's programs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parent.parent / "examples" / "cluster"
TEMPLATE = "out/{id} x.mp4"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, first on PATH, with programs that write what they were called with into `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dpe", "scontrol", "parallel"):
        program = folder / name
        program.write_text(f"""#!/usr/bin/env bash
{{ printf '%s' {name}; printf '|%s' "$@"; printf '|%s\\n' "${{SLURM_ARRAY_TASK_ID:-}}"; }} >> "$CALLS"
if [ {name} = dpe ]; then
    echo "openjd_progress: 50"
    if [ -n "${{HOLD:-}}" ]; then
        trap 'exit 75' TERM
        touch "$CALLS.waits"
        for _ in $(seq 600); do sleep 0.05; done
    fi
    exit "${{CODE:-0}}"
fi
""")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    return tmp_path


def calls(folder: Path) -> list[list[str]]:
    return [line.split("|")[:-1] for line in (folder / "calls").read_text().splitlines()]


BATCH = ["dpe", "batch", "a b.jsonl", "--output-template", TEMPLATE, "--skip-existing", "--progress", "plain"]


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_shell(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("code", [0, 8])
def test_slurm_runs_the_batch_and_gives_its_exit_code_on(programs: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    monkeypatch.setenv("CODE", str(code))
    command = ["bash", CLUSTER / "slurm.sh", "a b.jsonl", TEMPLATE, "--", "--crf", "20"]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == code
    assert calls(programs) == [[*BATCH, "--", "--crf", "20"]]


def test_slurm_passes_sigterm_on_and_queues_the_task_again(programs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOLD", "1")
    command = ["bash", CLUSTER / "slurm.sh", "a b.jsonl", TEMPLATE]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not (programs / "calls.waits").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
    assert calls(programs) == [BATCH, ["scontrol", "requeue", "77_3"]]


def test_kubernetes_has_a_rule_for_every_exit_code_and_tells_the_count():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else there may be no podFailurePolicy
    assert {one["name"]: one["value"] for one in container["env"]} == {"JOB_COMPLETIONS": str(spec["completions"])}
    rules = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in spec["podFailurePolicy"]["rules"] if
             "onExitCodes" in rule}  # fmt: skip
    assert rules == {"FailIndex": {2, 3, 4, 5, 7, 8, 9, 10}, "Ignore": {75}}
    assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"][:2]} == {
        container["name"]
    }
    assert {rule["onExitCodes"]["operator"] for rule in spec["podFailurePolicy"]["rules"][:2]} == {"In"}


def test_the_commands_of_the_recipes_are_ours():
    """What they call dpe with is parsed as the command line parses it."""
    yaml = pytest.importorskip("yaml")
    from dpe_cli.commands.batch import batch

    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    inside = job["spec"]["template"]["spec"]["containers"][0]["command"]
    for arguments in (inside[2:], BATCH[2:], ["m", "--shard", "1/2", "--progress", "openjd", "--print-commands"]):
        assert batch.make_context("batch", list(arguments), default_map={}).params["manifest"]


def test_open_job_description_checks_and_runs_the_template(programs: Path):
    pytest.importorskip("openjd.cli", reason="openjd-cli is not installed")
    template = CLUSTER / "openjd.yaml"
    openjd = Path(sys.executable).with_name("openjd")
    subprocess.run([openjd, "check", template], check=True, capture_output=True)
    (programs / "clips.jsonl").write_text("{}\n")
    done = subprocess.run(
        [openjd, "run", template, "--step", "Edit", "-p", f"Manifest={programs / 'clips.jsonl'}", "-p",
         f"Folder={programs}", "-p", f"OutputTemplate={TEMPLATE}", "-p", "Shards=2"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    same = ["dpe", "batch", str(programs / "clips.jsonl"), "--output-template", TEMPLATE]
    assert calls(programs) == [
        [*same, "--shard", f"{shard}/2", "--skip-existing", "--progress", "openjd"] for shard in (1, 2)
    ]
    assert "openjd_progress: 50" in done.stdout


def test_gnu_parallel_gets_the_list_of_commands(programs: Path):
    subprocess.run(["bash", CLUSTER / "parallel.sh", "m.jsonl", TEMPLATE, "--jobs", "2"], check=True, cwd=programs)
    assert calls(programs) == [
        ["dpe", "batch", "m.jsonl", "--output-template", TEMPLATE, "--print-commands"],
        ["parallel", "--joblog", "dpe.joblog", "--resume-failed", "--jobs", "2"],
    ]
    assert (programs / "commands.txt").read_text() == "openjd_progress: 50\n"  # what the stand-in printed
