"""Signed manifests (C2PA) in outputs, by the Content Authenticity Initiative's own library: the extra `c2pa`."""

import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import c2pa

import dpe_cli
from dpe_cli.errors import InputError, OutputError
from dpe_cli.marks import SOURCE_TYPE, png_chunk

SIGNED = (".mp4", ".mov", ".png", ".jpg", ".jpeg")
ALGORITHMS = ("es256", "es384", "es512", "ps256", "ed25519")  # the library refuses those that a key does not fit


class Signer:
    """Signs files by a certificate chain and its private key, both PEM.

    Asks no time server: a signature is good for as long as its certificate. Raises InputError for a certificate and a
    key that cannot sign, which is tried on a picture of one pixel.
    """

    def __init__(self, certificate: Path, key: Path):
        try:
            chain, secret = certificate.read_bytes(), key.read_bytes()
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}", "check the name") from error
        self.signer, reason = None, ""
        for algorithm in ALGORITHMS:
            try:
                info = c2pa.C2paSignerInfo(algorithm.encode(), chain, secret, None)
                self.signer = c2pa.Signer.from_info(info)
                break
            except c2pa.C2paError as error:
                reason = reason or str(error)
        remedy = "give a chain of certificates that C2PA allows and its private key, both PEM"
        if self.signer is None:
            raise InputError(f"{certificate} and {key} cannot sign: {reason}", remedy)
        try:
            with manifest("trial.png") as builder:
                builder.sign(self.signer, "image/png", BytesIO(one_pixel()), BytesIO())
        except c2pa.C2paError as error:
            raise InputError(f"{certificate} cannot sign: {error}", remedy) from error

    def sign(self, part: Path, title: str) -> None:
        """Signs a whole file that is not yet under its name, `title`. Raises OutputError."""
        signed = part.with_name(f"signed-{part.name}")
        try:
            with manifest(title) as builder:
                builder.sign_file(part, signed, self.signer)
            os.replace(signed, part)
        except (c2pa.C2paError, OSError) as error:
            signed.unlink(missing_ok=True)
            raise OutputError(f"{title} cannot be signed: {error}", "check the disk and the certificate") from error


def check_signable(output: Path) -> None:
    """Raises OutputError for an output that holds no manifest of ours."""
    if output.suffix.lower() not in SIGNED or "%" in output.name:
        raise OutputError(f"{output} cannot be signed", f"name a file that ends in one of {' '.join(SIGNED)}")


def manifest(title: str) -> c2pa.Builder:
    """What is signed: that `title` was made with the help of a trained network, and by which program."""
    program = {"name": "dpe", "version": dpe_cli.__version__}
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": program}
    assertions = [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}]
    return c2pa.Builder(json.dumps({"title": title, "claim_generator_info": [program], "assertions": assertions}))


def one_pixel() -> bytes:
    """The smallest PNG: grey, black."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(b"\0\0")) + png_chunk(b"IEND", b"")
