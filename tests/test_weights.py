"""Checkpoints: what can be loaded, what is refused and in which words, and how one is written."""

import argparse
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpe_cli import weights
from dpe_cli.errors import OutputError, WeightsError
from dpe_cli.models import DPE, DPEConfig
from dpe_cli.models.checkpoint import lia_backbone, to_official

SMALL = DPEConfig(16, {4: 8, 8: 8, 16: 4}, latent_dim=24, motion_dim=6)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Random weights of very small networks."""
    torch.manual_seed(0)
    return DPE(SMALL).state_dict()


@pytest.fixture
def ours(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """These weights as one of our files."""
    path = tmp_path / "ours.safetensors"
    weights.save(path, state, SMALL)
    return path


@pytest.fixture
def official(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """These weights as the released training code would save them."""
    path = tmp_path / "dpe.pt"
    args = argparse.Namespace(iter=800000, lr=0.002, exp_name="DPE")
    torch.save({"gen": to_official(state), "dis": {}, "g_optim": {"state": {}}, "args": args}, path)
    return path


def refusal(path: Path) -> str:
    """What is said of a file that cannot be loaded: one line that names it and a remedy."""
    with pytest.raises(WeightsError) as caught:
        weights.load(path)
    message = str(caught.value)
    assert str(path) in message and "; " in message and "\n" not in message
    return message


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def register(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: str | None) -> None:
    """The default's entry with changes, its folder here."""
    entry = replace(weights.CHECKPOINTS["compact"], **changes)
    monkeypatch.setitem(weights.CHECKPOINTS, "compact", entry)
    monkeypatch.setattr(weights, "folder", lambda: folder)


# Reading and writing


def test_what_is_saved_is_loaded_again(ours: Path, state: dict[str, torch.Tensor]):
    loaded = weights.load(ours)
    assert loaded.config == SMALL and same(loaded.state, state)
    assert loaded.path == ours and loaded.sha256 == weights.digest(ours)
    DPE(loaded.config).load_state_dict(loaded.state)


def test_weights_may_be_read_by_whoever_may_read_other_files(ours: Path):
    other = ours.with_name("other")
    other.touch()
    assert ours.stat().st_mode == other.stat().st_mode


def test_half_precision_halves_the_file_and_is_loaded_as_float32(tmp_path: Path, ours: Path, state: dict):
    weights.save(tmp_path / "half.safetensors", state, SMALL, half=True)
    loaded = weights.load(tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * ours.stat().st_size
    for key, value in loaded.state.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-6)


def test_metadata_goes_along(tmp_path: Path, state: dict):
    weights.save(tmp_path / "a.safetensors", state, SMALL, {"card": "trained for a test", "train": {"minutes": 3}})
    metadata = weights.load(tmp_path / "a.safetensors").metadata
    assert metadata["format"] == "dpe-weights/1" and DPEConfig.from_json(metadata["config"]) == SMALL
    assert metadata["card"] == "trained for a test" and json.loads(metadata["train"]) == {"minutes": 3}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(ours: Path, state: dict, monkeypatch: pytest.MonkeyPatch):
    before = ours.read_bytes()

    def full(source: str, target: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"ours.safetensors cannot be written \(No space left"):
        weights.save(ours, state, SMALL)
    assert ours.read_bytes() == before and list(ours.parent.iterdir()) == [ours]
    with pytest.raises(OutputError, match="check the folder"):
        weights.save(ours.parent / "missing" / "a.safetensors", state, SMALL)


def test_a_state_that_does_not_fit_is_not_saved(tmp_path: Path, state: dict):
    key = next(iter(state))
    for wrong in ({k: v for k, v in state.items() if k != key}, {**state, key: state[key] * torch.inf}):
        with pytest.raises(ValueError):
            weights.save(tmp_path / "a.safetensors", wrong, SMALL)
    with pytest.raises(ValueError, match="in 16 bits"):
        weights.save(tmp_path / "a.safetensors", {**state, key: state[key] * 1e6}, SMALL, half=True)
    assert list(tmp_path.iterdir()) == []


# Checkpoints of others


def test_an_official_training_checkpoint_loads(official: Path, state: dict):
    loaded = weights.load(official)
    assert loaded.config.size == 16 and loaded.metadata == {}
    assert same(loaded.state, state)


def test_official_weights_load_from_any_container(tmp_path: Path, state: dict):
    released = to_official(state)
    torch.save(released, tmp_path / "flat.pth")
    torch.save({"gen": released}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file({key: value.contiguous() for key, value in released.items()}, str(tmp_path / "plain.safetensors"))
    (tmp_path / "flat.pth").rename(tmp_path / "renamed.safetensors")
    for name in ("renamed.safetensors", "legacy.pt", "plain.safetensors"):
        assert same(weights.load(tmp_path / name).state, state), name


def test_what_was_loaded_does_not_need_its_file_any_more(official: Path, ours: Path, state: dict):
    for path in (official, ours):
        loaded = weights.load(path)
        path.write_bytes(b"")
        assert same(loaded.state, state)


def lia_file(tmp_path: Path, state: dict) -> Path:
    """A file laid out like LIA's vox.pt, as far as training needs it."""
    released = to_official(state)
    lia = {"dec.direction.weight": released["dir.weight"]}
    lia |= {key: value for key, value in released.items() if key.startswith("enc.net_app.")}
    lia |= {f"enc.fc.{key[4:]}": value for key, value in released.items() if key.startswith("mlp.")}
    torch.save({"gen": lia}, tmp_path / "vox.pt")
    return tmp_path / "vox.pt"


def test_lia_is_no_editing_model_but_can_be_read_to_train_from(tmp_path: Path, state: dict):
    path = lia_file(tmp_path, state)
    assert "is LIA's checkpoint" in refusal(path)
    assert "LIA" in refusal(path.rename(tmp_path / "dpe.pt"))
    content, _ = weights.read(tmp_path / "dpe.pt")
    assert "motion_basis.weight" in lia_backbone(content)


class Payload:
    """Pickles to a call of os.mkdir, as a malicious checkpoint would to worse."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, state: dict, zipped: bool):
    trap, path = tmp_path / "trap", tmp_path / "dpe.pt"
    content = {"gen": to_official(state), "args": Payload(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "Python objects besides tensors" in refusal(path)
    path.write_bytes(pickle.dumps(content["args"]))
    refusal(path)
    assert not trap.exists()


# Files that are not what they should be


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
        (b"hello", "is not a checkpoint"),
        (b"PK\x03\x04" + bytes(600), "is truncated"),
        (b"\x80\x02}q\x00", "is damaged"),
        (b"\x40" + bytes(7) + b"{" + b" " * 200, "is damaged"),
    ],
    ids=["empty", "lfs", "html", "picture", "text", "zip", "pickle", "safetensors"],
)
@pytest.mark.parametrize("name", ["dpe.pt", "our.safetensors"])
def test_a_file_of_another_kind_is_one_clear_line(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_files_are_told(ours: Path, official: Path, share: float):
    for path in (ours, official):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        message = refusal(path)
        assert "truncated" in message or "damaged" in message


def test_tensors_that_are_missing_or_wrong_or_too_many_are_told(tmp_path: Path, ours: Path, state: dict):
    metadata = weights.load(ours).metadata
    key = "pose_generator.convs.0.conv.weight"
    for change, words in (
        ({k: v for k, v in state.items() if not k.startswith("pose_generator.")}, "truncated"),
        ({**state, key: state[key][:, :1]}, "wrong shape"),
        ({**state, "face_parser.weight": torch.zeros(1)}, "face_parser"),
    ):
        for kept in (metadata, None):  # with our configuration, and as a plain file
            path = tmp_path / "wrong.safetensors"
            save_file({k: v.contiguous() for k, v in change.items()}, str(path), kept)
            assert words in refusal(path)


def test_another_network_is_told(tmp_path: Path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    assert "another network" in refusal(tmp_path / "resnet.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refusal(tmp_path / "list.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers_are_told(tmp_path: Path, official: Path, ours: Path, value: float):
    content = torch.load(official, weights_only=False)
    content["gen"]["mlp.2.bias"][1] = value
    torch.save(content, official)
    tensors = load_file(ours)
    tensors["motion_mlp.2.bias"][1] = value
    metadata = weights.load(ours).metadata
    save_file(tensors, str(tmp_path / "nan.safetensors"), metadata)
    for path in (official, tmp_path / "nan.safetensors"):
        assert "not numbers" in refusal(path) and "motion_mlp.2.bias" in refusal(path)


def test_a_format_of_the_future_is_told(tmp_path: Path, state: dict):
    path = tmp_path / "new.safetensors"
    save_file(dict(state), str(path), {"format": "dpe-weights/2", "config": "{}"})
    assert "has the format dpe-weights/2" in refusal(path)
    save_file(dict(state), str(path), {"format": "dpe-weights/1"})
    assert "not a configuration" in refusal(path)


def test_missing_files_and_folders_are_told(tmp_path: Path):
    assert "there are no weights" in refusal(tmp_path / "nowhere.pt")
    assert "is a folder" in refusal(tmp_path)
    with pytest.raises(
        WeightsError, match="one of compact, landmarks, reader, retouch, matte, speech, dpe, lia, buffalo_l, buffalo_s"
    ):
        weights.load("campact")


# Names


def test_a_name_stands_for_a_file(ours: Path, monkeypatch: pytest.MonkeyPatch):
    register(monkeypatch, ours.parent, file=ours.name, sha256=weights.digest(ours))
    assert weights.find() == weights.find("compact") == ours
    assert weights.find(str(ours)) == weights.find(ours) == ours
    assert weights.load().sha256 == weights.CHECKPOINTS["compact"].sha256
    assert weights.verify("compact").endswith("compact as released")
    assert weights.verify(ours).endswith("compact as released")


def test_one_flipped_bit_is_noticed(ours: Path, monkeypatch: pytest.MonkeyPatch):
    register(monkeypatch, ours.parent, file=ours.name, sha256=weights.digest(ours))
    content = bytearray(ours.read_bytes())
    content[-3] ^= 1
    ours.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is not compact as released: its sha256 is .*; install dpe-cli anew"):
        weights.load()
    assert weights.load(ours).sha256 == weights.digest(ours)  # as a file without a name it is a fine checkpoint


def test_names_that_are_not_here_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    register(monkeypatch, tmp_path)
    monkeypatch.setattr(weights, "PACKS", tmp_path / "packs")
    remedies = {
        "compact": "install dpe-cli anew",
        "landmarks": "install dpe-cli anew",
        "reader": "install dpe-cli anew",
        "retouch": "install dpe-cli anew",
        "matte": "install dpe-cli anew",
        "speech": "install dpe-cli anew",
        "dpe": "download dpe.pt by hand from https://github.com/OpenTalker/DPE",
        "lia": "download vox.pt by hand",
        "buffalo_l": "dpe weights fetch buffalo_l",
    }
    for name, remedy in remedies.items():
        with pytest.raises(WeightsError, match=f"{name} is not on this machine.*{remedy}"):
            weights.find(name)
    assert [(entry.name, path) for entry, path in weights.list_checkpoints()] == [
        (name, None)
        for name in (
            "compact",
            "landmarks",
            "reader",
            "retouch",
            "matte",
            "speech",
            "dpe",
            "lia",
            "buffalo_l",
            "buffalo_s",
        )
    ]


def test_the_list_shows_what_is_here(ours: Path, monkeypatch: pytest.MonkeyPatch):
    register(monkeypatch, ours.parent, file=ours.name)
    assert weights.list_checkpoints()[0][1] == ours


def test_info_is_ready_for_json(ours: Path, state: dict):
    about = json.loads(json.dumps(weights.info(ours)))
    assert about["sha256"] == weights.digest(ours) and about["config"]["size"] == 16
    assert about["parameters"] == sum(value.numel() for value in state.values())


def test_verify_says_when_there_is_nothing_to_compare_with(ours: Path):
    assert "no published sha256" in weights.verify(ours)


# Packs of face models


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for insightface's packs."""
    monkeypatch.setattr(weights, "PACKS", tmp_path / "insightface" / "models")
    return tmp_path / "insightface" / "models"


def pretend_download(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[str]:
    """insightface's downloader without the network; gives the names it was asked for."""
    import insightface.utils.storage as storage

    asked = []

    def download(kind: str, name: str, root: str) -> None:
        asked.append(name)
        print("download_path: talkative")
        folder = Path(root) / kind / name
        folder.mkdir(parents=True)
        if error:
            raise error
        (folder / "det_10g.onnx").write_bytes(b"a model")
        folder.with_suffix(".zip").write_bytes(b"a zip")

    monkeypatch.setattr(storage, "download", download)
    return asked


def test_a_pack_is_fetched_after_its_licence_was_said(packs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    asked, said = pretend_download(monkeypatch), []
    assert weights.fetch("buffalo_s", lambda line: said.append(f"{len(asked)} {line}")) == packs / "buffalo_s"
    assert said[0].startswith("0 buffalo_s") and "non-commercial research only" in said[0]
    assert capsys.readouterr().out == ""  # stdout is for results
    assert [path.name for path in packs.iterdir()] == ["buffalo_s"]
    assert weights.find("buffalo_s") == packs / "buffalo_s" and "1 models" in weights.verify("buffalo_s")
    weights.fetch("buffalo_s", said.append)
    assert asked == ["buffalo_s"] and "there already" in said[-1]


def test_a_failed_download_leaves_nothing_that_passes_for_a_pack(packs: Path, monkeypatch: pytest.MonkeyPatch):
    asked = pretend_download(monkeypatch, ConnectionError("no route"))
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"could not be downloaded .*check the connection"):
            weights.fetch("buffalo_l", lambda line: None)
    assert asked == ["buffalo_l", "buffalo_l"] and not (packs / "buffalo_l").exists()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("compact", "fetch one of buffalo_l, buffalo_s"), ("dpe", "by hand from"), ("what", "fetch one of buffalo_l")],
)
def test_only_packs_can_be_fetched(name: str, remedy: str):
    with pytest.raises(WeightsError, match=f"{name} cannot be fetched; .*{remedy}"):
        weights.fetch(name, lambda line: None)


def test_a_pack_is_no_editing_model(packs: Path):
    (packs / "buffalo_l").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"is a folder.*--face-models"):
        weights.load("buffalo_l")


# The weights that come with the tool


def test_default_weights_load_and_match_their_hash():
    path = weights.folder() / "compact.safetensors"
    assert path.is_file(), "the default weights are not there yet"
    assert weights.digest(path) == weights.COMPACT_SHA256, "write its sha256sum into COMPACT_SHA256 of weights.py"
    assert path.stat().st_size < 48 * 2**20
    loaded = weights.load()
    assert loaded.path == path and loaded.metadata["format"] == weights.FORMAT
