"""Layers of settings: flag > environment > --config > dpe.toml > default, for every command."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dpe_cli.main import cli


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a dpe.toml and a further file of settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpe.toml").write_text(
        'device = "cpu"\n[edit]\nstrength = 0.8\nexp_driving = "smile.mp4"\nfeather = 9\n'
    )
    (tmp_path / "film.toml").write_text("[edit]\nstrength = 0.7\npaste = false\n")
    return tmp_path


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, arguments, env=environment)


def shown(*arguments: str, **environment: str) -> dict[str, tuple[object, str]]:
    """What `dpe config --show edit` tells: name -> value and origin."""
    done = run(*arguments, "config", "--show", "--json", "edit", **environment)
    assert done.exit_code == 0, done.stderr
    return {line["name"]: (line["value"], line["origin"]) for line in json.loads(done.stdout)}


def test_each_layer_covers_the_ones_below(folder: Path):
    assert shown()["strength"] == ("0.8", "dpe.toml")
    assert shown("--config", "film.toml")["strength"] == ("0.7", "film.toml")
    assert shown("--config", "film.toml", DPE_STRENGTH="0.6")["strength"] == ("0.6", "DPE_STRENGTH")
    both = {"DPE_STRENGTH": "0.6", "DPE_EDIT_STRENGTH": "0.5"}
    assert shown("--config", "film.toml", **both)["strength"] == ("0.5", "DPE_EDIT_STRENGTH")
    (folder / "dpe.toml").unlink()
    assert shown()["strength"] == ("1", "default")


def test_values_of_all_kinds_and_names_with_underscores(folder: Path):
    settings = shown("--config", "film.toml", DPE_DETAIL="0", DPE_OVERWRITE="yes")
    assert settings["paste"] == (False, "film.toml") and settings["exp-driving"] == ("smile.mp4", "dpe.toml")
    assert settings["detail"] == (False, "DPE_DETAIL") and settings["overwrite"] == (True, "DPE_OVERWRITE")
    assert settings["device"] == ("cpu", "dpe.toml") and settings["feather"] == (9, "dpe.toml")


def test_a_misspelt_variable_is_remarked(folder: Path):
    done = run("config", DPE_EDIT_STRENGHT="0.5", DPE_HOUSE="1", DPE_SHARED="x", DPE_REQUIRE_SHARED="1")
    assert done.exit_code == 0
    assert done.stderr == "DPE_EDIT_STRENGHT is no setting and means nothing; is it DPE_EDIT_STRENGTH?\n"


def test_a_command_runs_by_its_layers_and_a_flag_stands_above_all(folder: Path):
    """The source is missing, which is told only if a driver is there; a wrong value is told with its origin."""
    assert "s.mp4 does not exist" in run("edit", "-s", "s.mp4", "--config", "film.toml").stderr
    done = run("edit", "-s", "s.mp4", DPE_CRF="99")
    assert done.exit_code == 2 and "--crf" in done.stderr and "(from DPE_CRF)" in done.stderr
    assert run("edit", "-s", "s.mp4", "--crf", "20", DPE_CRF="99").exit_code == 3
    (folder / "dpe.toml").write_text('[edit]\nmask = "square"\n')
    assert "(from dpe.toml)" in run("edit", "-s", "s.mp4", "-d", "d.mp4").stderr


def test_a_flag_may_contradict_a_weaker_layer(folder: Path):
    """--curve stands in place of --strength; the strength of dpe.toml is no reason to refuse it."""
    (folder / "dpe.toml").write_text("[edit]\nstrength = 0.5\n")
    assert "curve.csv" in run("edit", "-s", "s.mp4", "-d", "d.mp4", "--curve", "curve.csv").stderr
    (folder / "c.csv").write_text("0,1\n1,0\n")
    assert run("edit", "-s", "s", "-d", "d", "--curve", "c.csv", "--strength", "1").exit_code == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("strenght = 1", "there is no setting strenght; is it strength?"),
        ("[edit]\nworkers = 2", "there is no setting edit.workers"),
        ("[edti]\ncrf = 2", "there is no setting command edti; is it edit?"),
        ("[edit]\ncrf = 2020-01-01", "edit.crf must be text, a number"),
        ("crf = ", "is no TOML file"),
        ("crop_size = 80\ncrop-size = 90", "the setting crop-size is there twice"),
        ("[edit]\ncrop-size = 80\ncrop_size = 90", "the setting edit.crop-size is there twice"),
    ],
)
def test_2_for_a_file_with_mistakes(folder: Path, content: str, complaint: str):
    (folder / "dpe.toml").write_text(content)
    done = run("edit", "-s", "s.mp4", "-d", "d.mp4")
    assert done.exit_code == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_2_for_a_file_that_is_not_there(folder: Path):
    assert run("--config", "none.toml", "config").exit_code == 2
    assert run("edit", "-s", "s.mp4", "--config", "none.toml").exit_code == 2


def test_the_files_that_are_read_are_told(folder: Path):
    assert run("--config", "film.toml", "config").stdout.split() == ["dpe.toml", "film.toml"]
    assert run("config", DPE_CONFIG="film.toml").stdout.split() == ["dpe.toml", "film.toml"]


def test_trains_config_is_its_recipe(folder: Path):
    """It is no file of settings there: a recipe's names are not ours."""
    (folder / "recipe.toml").write_text("no_setting = 1\n")
    done = run("train", "--config", "recipe.toml", "--data", "d", "-o", "o")
    assert done.exit_code == 3 and "no_setting" in done.stderr
    for wrong in ("no_setting=1", "nowhere.size=64", "size=large"):  # of the command line, not of a file
        assert run("train", "--set", wrong, "--data", "d", "-o", "o").exit_code == 2
    (folder / "dpe.toml").write_text('[train]\nconfig = "recipe.toml"\n')
    assert "no_setting" in run("train", "--data", "d", "-o", "o").stderr
