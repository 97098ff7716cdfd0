"""Where an output comes from: what its sidecar says beside the ingredients, consent, and whether a run can be repeated.

A sidecar (schema dpe-sidecar/1) is JSON: `command`; `settings`, all options that decide the frames, files by their full
names; `inputs`, `weights` and `networks` with their sha256; `versions`; `engine`, with the device; `detector`; `seed`;
`consent`; `output` with its sha256 and `pixels_sha256`, the hash of its frames before encoding (`report.PixelHash`);
`key`, for batches.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dpe_cli
from dpe_cli.container import files_of
from dpe_cli.errors import ConsentError, InputError, WeightsError
from dpe_cli.ledger import MARKER, digest_of
from dpe_cli.weights import digest

SCHEMA = "dpe-sidecar/1"
POLICY = "DPE_REQUIRE_CONSENT"
NO = ("", "0", "false", "no", "off")
PACKAGES = ("av", "insightface", "numpy", "onnxruntime", "opencv-python", "openvino", "scipy", "torch")


# Consent


def consent_required() -> bool:
    """Whether the site's policy asks for consent; in doubt it does."""
    return os.environ.get(POLICY, "").strip().lower() not in NO


def read_consent(document: Path | None) -> dict[str, str] | None:
    """Name and sha256 of a document of consent, None where there is none and none is asked for. Raises ConsentError."""
    if document is None:
        if consent_required():
            raise ConsentError(f"no consent is shown, and {POLICY} asks for it", "name the document by --consent FILE")
        return None
    try:
        if not document.is_file():
            raise ConsentError(f"the consent {document} is not a file that exists", "name the document by --consent")
        with document.open("rb") as file:
            empty = not any(block.strip(b"\0 \t\r\n") for block in iter(lambda: file.read(1 << 16), b""))
        if empty:
            raise ConsentError(f"the consent {document} is empty", "name the document that was signed")
        return {"name": document.name, "sha256": digest(document)}
    except OSError as error:
        raise ConsentError(f"the consent {document} cannot be read: {error.strerror}", "check the file") from error


def check_planned_consent(made_of: Mapping[str, Any] | None, plan: Path) -> None:
    """Raises ConsentError where the policy asks for consent and a plan was made without. `made_of`: the plan's."""
    if not (made_of or {}).get("consent") and consent_required():
        raise ConsentError(
            f"{plan} was made without consent, and {POLICY} asks for it", "plan anew with --consent FILE"
        )


# What is said of a run


def versions() -> dict[str, str]:
    """Of the tool, of Python, and of the packages that decide what pixels come out."""
    found = {"dpe": dpe_cli.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Repeating a run


def read_sidecar(path: Path) -> dict[str, Any]:
    """What a sidecar says. Raises InputError for a file that is missing, damaged or no sidecar."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", f"name the sidecar of an output, which ends in {MARKER}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a sidecar", f"name a file that ends in {MARKER}") from error
    if not isinstance(words, dict) or words.get("schema") != SCHEMA:
        raise InputError(f"{path} is no sidecar of this dpe", f"name a file that ends in {MARKER}")
    kinds = {"command": str, "settings": dict, "inputs": dict, "weights": dict, "networks": dict}
    kinds |= {"versions": dict, "output": dict}
    damaged = [name for name, kind in kinds.items() if not isinstance(words.get(name), kind)]
    for facts in (*words["inputs"].values(), *words["networks"].values(), words["weights"]) if not damaged else ():
        if not (
            isinstance(facts, dict) and isinstance(facts.get("sha256"), str) and isinstance(facts.get("path"), str)
        ):
            damaged.append("sha256")
    if not damaged and not isinstance(words["output"].get("name"), str):
        damaged.append("output")
    if damaged:
        raise InputError(f"{path} is damaged: its {damaged[0]} is wrong", "name another sidecar")
    return words


def check_input(role: str, path: Path, sha256: str) -> None:
    """Raises InputError for a file that is not the one that the run had."""
    if not files_of(path):
        raise InputError(f"{path}, the {role} of that run, does not exist", "put it back, or name it where it is")
    try:
        same = digest_of(path) == sha256
    except OSError as error:
        raise InputError(f"{path}, the {role} of that run, cannot be read: {error.strerror}", "put it back") from error
    if not same:
        raise InputError(f"{path} has changed since that run, whose {role} it was", "put the same file back")


def check_weights(path: Path, sha256: str) -> None:
    """Raises WeightsError for other weights than those of the run."""
    try:
        found = digest(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}", "check --weights") from error
    if found != sha256:
        raise WeightsError(
            f"that run had weights with the sha256 {sha256}, {path} has {found}", "name them by --weights"
        )


def changed_versions(then: Mapping[str, str]) -> str:
    """For people, what is of another version now than in the run, "" if nothing is."""
    now = versions()
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'not there')}" for name in names)


def comparison(then: Mapping[str, Any], engine: Mapping[str, Any], pixels: str | None) -> str:
    """What a repeated run says of its frames, against what the sidecar says of those of the first one."""
    if pixels == then["output"].get("pixels_sha256"):
        return "the frames are those of the sidecar's run, bit for bit"
    before = {**(then["engine"] if isinstance(then.get("engine"), dict) else {}), "detector": then.get("detector")}
    ways = ("device", "precision", "backend", "batch_size", "detector")
    names = [name for name in ways if before.get(name) != engine.get(name)]
    told = [f"{name} was {before.get(name)}, is {engine.get(name)}" for name in names]
    changes = [*told, *([others] if (others := changed_versions(then["versions"])) else [])]
    why = ": " + "; ".join(changes) if changes else ", though nothing that is recorded has changed"
    return f"the frames differ from those of the sidecar's run{why}"
