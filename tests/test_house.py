"""Rules of the house that a machine keeps: who imports whom, who prints, what --help loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted((ROOT / "dpe_cli/commands").glob("*.py"))  # they parse, call and print
PROJECT = sorted((ROOT / "dpe_cli").glob("*.py")) + sorted((ROOT / "models").glob("*.py"))
EVERYTHING = {path.stem for path in PROJECT} | {"models"}

# The right-hand side is all that a module may import from the project.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"commands"},
    "errors": set(),
    "limits": {"errors"},
    "pipeline": set(),
    "container": {"limits", "errors"},
    "planes": set(),
    "tracks": {"container", "limits", "errors"},
    "encoding": {"container", "planes", "errors"},
    "marks": set(),
    "video": {"container", "encoding", "limits", "planes", "tracks", "errors"},
    "muxer": {"container", "encoding", "planes", "tracks", "video", "errors"},
    "writer": {"container", "encoding", "limits", "marks", "muxer", "planes", "tracks", "video", "errors"},
    "face": {"video", "detectors"},
    "shots": {"video"},
    "identity": {"face", "crop"},
    "tracking": {"face", "identity", "shots", "video"},
    "people": {"face", "identity", "tracking", "video", "errors"},
    "roster": {"face", "identity", "tracking", "people", "crop", "video", "errors"},
    "detectors": {"face", "video", "errors"},
    "crop": {"face", "errors"},
    "weights": {
        "models",
        "errors",
        "limits",
    },
    "runtimes": {"models", "weights", "errors"},
    "measured": {"factors", "landmark_net", "landmarks", "motion_space", "reader", "weights", "errors"},
    "lending": {
        "motion_space",
        "regions",
        "landmarks",
    },
    "mesh": {"landmarks"},
    "parts": {"landmarks", "motion_space"},
    "reader": {"models", "motion_space", "parts", "weights"},
    "matte": {"mesh", "mesh_warp", "models", "reader", "weights"},
    "retouch": {
        "landmarks",
        "motion_space",
        "parts",
        "weights",
        "lending",
    },
    "mesh_warp": {
        "face",
        "landmarks",
        "lending",
        "mesh",
        "motion_space",
        "parts",
        "retouch",
    },
    "engine": {
        "detail",
        "landmarks",
        "lending",
        "factors",
        "matte",
        "measured",
        "mesh",
        "mesh_warp",
        "models",
        "motion_space",
        "retouch",
        "runtimes",
        "weights",
        "errors",
        "device",
    },
    "train_matte": {
        "crop",
        "dataset",
        "landmark_net",
        "models",
        "motion_space",
        "pipeline",
        "reader",
        "train_landmarks",
        "trainer",
        "weights",
        "errors",
    },
    "train_reader": {
        "crop",
        "dataset",
        "landmark_net",
        "measured",
        "models",
        "motion_space",
        "parts",
        "pipeline",
        "reader",
        "train_landmarks",
        "trainer",
        "weights",
        "errors",
    },
    "train_retouch": {
        "extractors",
        "errors",
        "dataset",
        "engine",
        "mesh",
        "models",
        "motion_space",
        "parts",
        "retouch",
        "trainer",
        "weights",
    },
    "speech": {"tracks"},
    "speech_motion": {"models", "motion_space", "speech", "tracks", "weights", "errors"},
    "dub": {
        "container",
        "jobs",
        "crop",
        "edit",
        "face",
        "factors",
        "limits",
        "landmark_net",
        "masks",
        "models",
        "motion_file",
        "motion_space",
        "paste",
        "people",
        "pipeline",
        "report",
        "speech",
        "speech_motion",
        "tracks",
        "video",
        "weights",
        "errors",
        "writer",
        "drivings",
        "request",
    },
    "train_speech": {
        "dataset",
        "landmarks",
        "models",
        "motion_space",
        "speech",
        "trainer",
        "weights",
        "errors",
    },
    "evaluate_dub": {
        "jobs",
        "crop",
        "landmark_net",
        "landmarks",
        "metrics",
        "models",
        "motion_space",
        "speech",
        "speech_motion",
        "train_speech",
    },
    "motion": {"limits", "motion_space", "video", "errors"},
    "motion_file": {"container", "limits", "motion", "video", "errors"},
    "report": {"limits", "errors"},
    "masks": {"crop", "face", "errors"},
    "plugs": {"detectors", "errors"},
    "detail": {"crop", "face", "mesh"},
    "paste": {
        "crop",
        "detail",
        "masks",
        "plugs",
        "face",
        "landmarks",
        "errors",
        "colours",
        "grain",
    },
    "regions": {
        "landmark_net",
        "landmarks",
        "masks",
        "colours",
    },
    "page": {"crop", "face", "limits", "report", "video", "errors"},
    "preview": {"video", "motion", "errors", "writer"},
    "jobs": {
        "control",
        "crop",
        "face",
        "lending",
        "motion",
        "paste",
        "pipeline",
        "report",
        "video",
    },
    "edit": {
        "jobs",
        "container",
        "video",
        "face",
        "people",
        "control",
        "paste",
        "regions",
        "motion_file",
        "pipeline",
        "preview",
        "report",
        "errors",
        "writer",
        "drivings",
        "request",
        "tracks",
    },
    "manifest": {"limits", "errors"},
    "ledger": {"container", "limits", "report", "weights", "errors"},
    "provenance": {"container", "ledger", "weights", "errors"},
    "signing": {"marks", "errors"},
    "batch": {"report", "errors"},
    "ray_pool": {"batch"},
    "segment_plan": {
        "container",
        "control",
        "dub",
        "edit",
        "errors",
        "face",
        "jobs",
        "limits",
        "motion",
        "motion_file",
        "paste",
        "report",
        "speech",
        "speech_motion",
        "video",
        "request",
    },
    "planner": {
        "container",
        "dub",
        "edit",
        "errors",
        "face",
        "jobs",
        "report",
        "segment_plan",
        "video",
        "drivings",
        "pipeline",
        "request",
    },
    "segments": {
        "dub",
        "edit",
        "errors",
        "face",
        "jobs",
        "lending",
        "paste",
        "pipeline",
        "report",
        "segment_plan",
        "video",
        "writer",
        "request",
    },
    "resume": {
        "container",
        "dub",
        "edit",
        "errors",
        "face",
        "jobs",
        "muxer",
        "planner",
        "report",
        "segment_plan",
        "segments",
        "pipeline",
        "request",
    },
    "plan": {
        "jobs",
        "container",
        "crop",
        "dub",
        "edit",
        "face",
        "limits",
        "motion",
        "motion_file",
        "paste",
        "people",
        "pipeline",
        "report",
        "video",
        "errors",
        "writer",
        "drivings",
        "request",
    },
    "benchmark": {
        "edit",
        "engine",
        "landmarks",
        "models",
        "motion_space",
        "face",
        "people",
        "crop",
        "paste",
        "report",
        "video",
        "weights",
        "writer",
        "request",
        "drawn",
        "roofline",
    },
    "doctor": EVERYTHING - {"edit", "benchmark", "main", "commands"},
    "landmarks": {"errors"},
    "landmark_net": {"crop", "dataset", "face", "landmarks", "models", "weights", "errors"},
    "motion_space": {"landmarks", "errors"},
    "factors": {"motion_space", "weights", "errors"},
    "control": {"limits", "factors", "measures", "motion", "errors"},
    "inspection": {
        "jobs",
        "crop",
        "edit",
        "extractors",
        "face",
        "factors",
        "landmarks",
        "measures",
        "page",
        "people",
        "report",
        "video",
        "errors",
        "pipeline",
    },
    "control_protocol": {
        "jobs",
        "control",
        "dataset",
        "edit",
        "extractors",
        "factors",
        "landmarks",
        "measures",
        "protocols",
        "errors",
        "pipeline",
    },
    "measures": {"landmarks", "motion_space"},
    "train_factors": {
        "crop",
        "dataset",
        "engine",
        "face",
        "factors",
        "landmark_net",
        "landmarks",
        "measures",
        "motion_space",
        "regions",
        "train_banks",
        "errors",
    },
    "train_banks": {"landmarks", "speech", "train_speech"},
    "dataset": {"face", "landmarks", "mesh", "motion_space", "errors"},
    "prepare": {
        "video",
        "face",
        "people",
        "shots",
        "crop",
        "detectors",
        "dataset",
        "landmark_net",
        "landmarks",
        "limits",
        "motion_space",
        "speech",
        "errors",
        "journal",
        "listing",
    },
    "initialise": {"models", "motion_space"},
    "recipe": {"motion_space", "errors"},
    "trainer": {"initialise", "matte", "mesh", "models", "motion_space", "recipe", "errors"},
    "train": {
        "dataset",
        "initialise",
        "matte",
        "mesh",
        "models",
        "weights",
        "motion_space",
        "recipe",
        "trainer",
        "errors",
        "device",
        "processes",
        "samples",
    },
    "metrics": {"landmarks"},
    "extractors": {
        "engine",
        "landmarks",
        "models",
        "errors",
        "device",
    },
    "protocols": {"jobs", "dataset", "video", "face", "crop", "motion_space", "errors"},
    "evaluate": {"jobs", "protocols", "metrics", "extractors", "dataset", "landmarks", "errors"},
    "scoreboard": {"evaluate", "report", "errors"},
    "train_landmarks": {
        "crop",
        "dataset",
        "engine",
        "face",
        "trainer",
        "pipeline",
        "landmark_net",
        "landmarks",
        "models",
        "motion_space",
        "weights",
        "errors",
        "device",
    },
    "drivings": {
        "crop",
        "errors",
        "face",
        "jobs",
        "motion",
        "motion_file",
        "people",
        "pipeline",
        "request",
        "video",
    },
    "request": {
        "container",
        "control",
        "encoding",
        "errors",
        "jobs",
        "motion",
        "motion_file",
        "tracks",
        "video",
        "writer",
    },
    "device": {
        "errors",
        "models",
        "runtimes",
    },
    "journal": {
        "dataset",
        "errors",
    },
    "listing": {
        "dataset",
        "errors",
        "video",
    },
    "drawn": {
        "face",
        "video",
        "writer",
    },
    "processes": {
        "device",
        "models",
    },
    "roofline": {
        "device",
        "drawn",
        "engine",
        "models",
    },
    "samples": {
        "dataset",
        "errors",
        "mesh",
        "recipe",
    },
    "colours": set(),
    "grain": {"crop"},
    "main": {"commands"},
}
KNOW_FFMPEG = {"video", "muxer", "writer", "container", "planes", "tracks", "doctor"}  # doctor looks at every package


def imported(path: Path) -> list[str]:
    """Full names of everything a file imports; relative imports keep their dots."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
            if node.module == "dpe_cli":
                names += [f"dpe_cli.{alias.name}" for alias in node.names if f"{alias.name}" in EVERYTHING]
    return names


def project_modules(path: Path) -> set[str]:
    """The modules of the project that a file imports; `dpe_cli` itself (the version) counts for nothing."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("dpe_cli.")}


@pytest.mark.parametrize("path", sorted((ROOT / "dpe_cli").glob("*.py")), ids=lambda path: path.stem)
def test_imports_flow_one_way(path: Path):
    assert path.stem in MAY_IMPORT, f"{path.name} has no line in the import table"
    extra = project_modules(path) - MAY_IMPORT[path.stem]
    assert not extra, f"{path.name} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda path: path.stem)
def test_networks_import_nothing_of_the_tool(path: Path):
    assert not [name for name in imported(path) if name.split(".")[0] in ("dpe_cli", "models")]


@pytest.mark.parametrize(
    "path", [*PROJECT, *COMMANDS, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.stem
)
def test_the_networks_are_never_imported_by_their_folder(path: Path):
    assert not [name for name in imported(path) if name.split(".")[0] == "models"]


@pytest.mark.parametrize("path", PROJECT, ids=lambda path: path.stem)
def test_a_library_neither_prints_nor_exits(path: Path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    assert not [name for name in names if name in ("print", "exit", "quit", "sys.exit", "os._exit")]


@pytest.mark.parametrize(
    "path", [path for path in [*PROJECT, *COMMANDS] if path.stem not in KNOW_FFMPEG], ids=lambda path: path.stem
)
def test_only_video_knows_ffmpeg(path: Path):
    assert not {name.split(".")[0] for name in imported(path)} & {"av", "ffmpeg", "imageio_ffmpeg"}


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["eval", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]):
    code = (
        "import sys; from click.testing import CliRunner; from dpe_cli.main import cli;"
        f"assert CliRunner().invoke(cli, {arguments!r}).exit_code == 0;"
        "print(*{'torch', 'cv2', 'numpy', 'av', 'onnxruntime', 'scipy', 'insightface'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
