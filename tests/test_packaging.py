"""What is installed: the folders under their installed names, the pins, and a wheel that works alone."""

import configparser
import importlib.metadata
import importlib.resources
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import dpe_cli

ROOT = Path(__file__).resolve().parent.parent


def setup_cfg() -> configparser.ConfigParser:
    """setup.cfg, parsed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def required(lines: str) -> set[str]:
    """Names of the packages in a list of requirements."""
    return {re.match(r"[\w-]+", line).group() for line in lines.split("\n") if line.strip()}


def pins() -> dict[str, str]:
    """Package -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(re.match(r"([\w-]+)==([\w.]+)", line).groups() for line in lines if line and not line.startswith("#"))


def test_the_folders_are_importable_under_the_package():
    import dpe_cli.models

    assert Path(dpe_cli.models.__file__).parent.name == "models"
    assert (importlib.resources.files("dpe_cli.pretrained") / "__init__.py").is_file()


def test_the_installed_command_and_version_are_ours():
    assert importlib.metadata.version("dpe-cli") == dpe_cli.__version__
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="dpe")
    assert command.value == "dpe_cli.commands.entry:run"


def test_every_runtime_package_is_pinned():
    assert required(setup_cfg()["options"]["install_requires"]) <= pins().keys()


def test_the_two_builds_of_opencv_have_one_version():
    assert pins()["opencv-python"] == pins()["opencv-contrib-python"]


def test_the_wheel_holds_our_packages_and_the_weights_and_nothing_else(tmp_path: Path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for folder in ("dpe_cli", "models", "weights"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "weights" / "stand-in.safetensors").write_bytes(b"weights")
    (checkout / "weights" / "dpe.pt").write_bytes(b"a user's own")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(checkout)]
    subprocess.run(command, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"dpe_cli/{path.name}" for path in (ROOT / "dpe_cli").glob("*.py")}
    expected |= {f"dpe_cli/commands/{path.name}" for path in (ROOT / "dpe_cli/commands").glob("*.py")}
    expected |= {f"dpe_cli/models/{path.name}" for path in (ROOT / "models").glob("*.py")}
    ours = ("__init__.py", "motion-space.json", "compact.factors.json", "stand-in.safetensors")
    expected |= {f"dpe_cli/pretrained/{name}" for name in ours}
    assert names - {"dpe_cli/pretrained/README.md"} == expected
