"""The doctor finds what works and what does not, and says how to mend it."""

from pathlib import Path

import pytest

from dpe_cli import doctor, weights
from dpe_cli.doctor import Check
from dpe_cli.errors import WeightsError
from dpe_cli.models import DPE, DPEConfig

OWN = ["landmarks", "reader", "retouch", "matte", "speech"]
NAMES = ["Python", "PyTorch", "ffmpeg", "PyAV", "face detector", "default weights"]
NAMES += [f"{name} weights" for name in OWN] + ["insightface", "mediapipe"]


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in the place of the default ones, beside the other networks of ours."""
    config = DPEConfig.compact(16)
    for name in OWN:
        (tmp_path / f"{name}.safetensors").symlink_to(weights.find(name))
    monkeypatch.setattr(weights, "folder", lambda: tmp_path)
    monkeypatch.setattr(weights, "PACKS", tmp_path / "packs")
    path = tmp_path / "compact.safetensors"
    weights.save(path, DPE(config).state_dict(), config)
    entry = weights.Checkpoint("compact", path.name, weights.digest(path), None, "", "", "")
    monkeypatch.setitem(weights.CHECKPOINTS, "compact", entry)
    return path


def test_a_whole_installation_is_healthy(default: Path):
    checks = doctor.examine()
    assert [check.name for check in checks] == NAMES
    assert [check for check in checks if not check.ok] == []
    assert doctor.healthy(checks)
    details = {check.name: check.detail for check in checks}
    assert "device c" in details["PyTorch"] and "precision" in details["PyTorch"]
    assert details["ffmpeg"].startswith("ffmpeg version") and "centerface" in details["face detector"]
    assert str(default) in details["default weights"]
    assert all("\n" not in detail for detail in details.values())


def test_missing_weights_come_with_a_remedy(default: Path):
    default.unlink()
    check = doctor.attempt("default weights", doctor.default_weights, "?")
    assert not check.ok and str(default) in check.detail and check.remedy.startswith("install dpe-cli anew")
    assert not doctor.healthy([check])


@pytest.mark.parametrize("name", OWN)
def test_every_network_of_ours_that_is_missing_is_noticed(default: Path, name: str):
    default.with_name(f"{name}.safetensors").unlink()
    (ill,) = [check for check in doctor.examine() if not check.ok]
    assert ill.name == f"{name} weights" and f"{name}.safetensors" in ill.detail
    assert ill.remedy == "install dpe-cli anew"


def test_damaged_weights_are_noticed(default: Path):
    default.write_bytes(default.read_bytes()[:-1])
    assert not doctor.attempt("default weights", doctor.default_weights, "?").ok


@pytest.mark.parametrize("name", ["nowhere", "true"])
def test_a_wrong_ffmpeg_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    program = tmp_path / name
    if name == "true":  # a program, but another
        program.write_text("#!/bin/sh\necho not ffmpeg\n")
        program.chmod(0o755)
    monkeypatch.setenv("DPE_FFMPEG", str(program))
    check = doctor.attempt("ffmpeg", doctor.ffmpeg, "name another")
    assert not check.ok and str(program) in check.detail and check.remedy


def test_whatever_a_look_raises_becomes_its_finding():
    def broken() -> str:
        raise ImportError("libfoo.so.1:\n  cannot open shared object file")

    def ours() -> str:
        raise WeightsError("a.pt is empty", "get it anew")

    assert doctor.attempt("x", broken, "reinstall x") == Check(
        "x", False, "ImportError: libfoo.so.1: cannot open shared object file", "reinstall x"
    )
    assert doctor.attempt("x", ours, "reinstall x") == Check("x", False, "a.pt is empty", "get it anew")


def test_what_is_optional_is_no_illness(default: Path, monkeypatch: pytest.MonkeyPatch):
    assert doctor.insightface().ok and "dpe weights fetch buffalo_l" in doctor.insightface().remedy
    (weights.PACKS / "buffalo_s").mkdir(parents=True)
    assert "packs buffalo_s" in doctor.insightface().detail and "research only" in doctor.insightface().detail
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.mediapipe().ok and "dpe-cli[mediapipe]" in doctor.mediapipe().remedy
