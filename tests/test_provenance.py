"""Where outputs come from: the mark in them, sidecars, repeated runs, consent, signatures."""

import datetime
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import run_ffmpeg
from test_edit import ColourDetector, ColourEngine, clip, picture

from dpe_cli.errors import ConsentError
from dpe_cli.ledger import digest_of, read_marker
from dpe_cli.main import cli
from dpe_cli.marks import SOURCE_TYPE, WORDS, marked_picture
from dpe_cli.provenance import read_consent, read_sidecar
from dpe_cli.report import PixelHash, Report
from dpe_cli.video import Frame, probe, read_frames, read_image
from dpe_cli.writer import join_video, write_image, write_video

XMP_READ = {"export_xmp": "1"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with clips; edits have stand-ins for the networks and the detector."""
    clip(tmp_path / "talk.mp4", [True, True, False, True])
    clip(tmp_path / "smile.mp4", [True, True])
    write_image(tmp_path / "still.png", picture())
    (tmp_path / "signed.txt").write_text("I agree.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpe_cli.engine.Engine", lambda *_, **__: ColourEngine())
    monkeypatch.setattr("dpe_cli.face.make_detector", lambda *_: ColourDetector())
    monkeypatch.delenv("DPE_REQUIRE_CONSENT", raising=False)
    return tmp_path


def edit(*arguments: str, code: int = 0, command: str = "edit", **environment: str) -> Result:
    done = CliRunner().invoke(cli, [command, *arguments], env=environment)
    assert done.exit_code == code, done.output
    return done


def made(output: str = "o.mp4", *arguments: str) -> dict:
    """A usual edit's sidecar."""
    edit("-s", "talk.mp4", "-d", "smile.mp4", "-o", output, *arguments)
    return json.loads(Path(f"{output}.dpe.json").read_text())


def tags(path: Path | str) -> dict[str, str]:
    with av.open(str(path), options=XMP_READ) as container:
        return {key.lower(): value for key, value in container.metadata.items()}


# The mark


@pytest.mark.parametrize("name", ["o.mp4", "o.mov", "o.mkv"])
@pytest.mark.parametrize("comment", [None, "shot on a Monday"])
def test_an_edit_is_marked_and_keeps_the_sources_tags(folder: Path, make_clip, name: str, comment: str | None):
    own = ["-metadata", "title=Talk", *(["-metadata", f"comment={comment}"] if comment else [])]
    run_ffmpeg("-i", "talk.mp4", "-c", "copy", *own, folder / f"own_{name}")
    edit("-s", f"own_{name}", "-d", "smile.mp4", "-o", name)
    found = tags(name)
    assert found["title"] == "Talk" and found["comment"] == (comment or WORDS)
    assert SOURCE_TYPE in (found["digital_source_type"] if name == "o.mkv" else found["xmp"])
    assert len(list(read_frames(Path(name)))) == 4


def test_an_edit_of_an_edit_is_marked_once(folder: Path):
    made("a.mkv")
    edit("-s", "a.mkv", "-d", "smile.mp4", "-o", "b.mkv")
    assert tags("b.mkv")["digital_source_type"] == SOURCE_TYPE and tags("b.mkv")["comment"] == WORDS


@pytest.mark.parametrize("name", ["o.png", "o.jpg"])
def test_pictures_are_marked_and_stay_whole(folder: Path, name: str):
    edit("-s", "still.png", "-d", "still.png", "-o", name)
    data = Path(name).read_bytes()
    assert SOURCE_TYPE.encode() in data and read_image(Path(name)).shape == picture().shape
    with av.open(name) as container:
        next(container.decode(video=0))
    at = 33 if name == "o.png" else 20  # after IHDR, and after JFIF
    assert data[at + 4 : at + 8] == b"iTXt" if name == "o.png" else data[at : at + 2] == b"\xff\xe1"


def test_a_picture_keeps_its_pixels_in_the_marking(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    write_image(tmp_path / "a.png", noise)
    (tmp_path / "b.png").write_bytes(marked_picture((tmp_path / "a.png").read_bytes()))
    assert np.array_equal(read_image(tmp_path / "b.png"), noise)


def test_every_picture_of_a_sequence_is_marked_and_there_is_one_sidecar(folder: Path):
    made("f_%03d.png")
    pictures = sorted(folder.glob("f_*.png"))
    assert len(pictures) == 4 and all(SOURCE_TYPE.encode() in path.read_bytes() for path in pictures)
    assert [path.name for path in folder.glob("*.dpe.json")] == ["f_%03d.png.dpe.json"]
    assert read_marker(Path("f_%03d.png"), exactly=True)


def test_what_is_no_edit_is_not_marked(folder: Path):
    info = probe(Path("talk.mp4"))
    write_video(read_frames(Path("talk.mp4")), info, Path("copy.mp4"))
    assert "xmp" not in tags("copy.mp4") and "comment" not in tags("copy.mp4")


def test_a_joined_video_is_marked(folder: Path):
    info, frames = probe(Path("talk.mp4")), list(read_frames(Path("talk.mp4")))
    for number, part in enumerate((frames[:2], frames[2:])):
        write_video(part, info, Path(f"{number}.mp4"), start=0.0)
    (folder / "work").mkdir()
    parts = [Path("0.mp4"), Path("1.mp4")]
    join_video(parts, [frame.time for frame in frames], info, Path("o.mp4"), folder / "work")
    assert SOURCE_TYPE in tags("o.mp4")["xmp"] and tags("o.mp4")["comment"] == WORDS


# The sidecar


def test_a_sidecar_says_what_an_output_was_made_of(folder: Path):
    told = made("o.mp4", "--strength", "0.5", "--fail-if", "seam>1000", "--consent", "signed.txt")
    assert told["inputs"]["source"] == {"path": str(folder / "talk.mp4"), "sha256": digest_of(Path("talk.mp4"))}
    assert told["inputs"]["driving"]["sha256"] == digest_of(Path("smile.mp4"))
    assert told["settings"]["strength"] == "0.5" and told["settings"]["seam_limit"] == "seam>1000.0"
    assert len(told["weights"]["sha256"]) == 64 and told["versions"]["torch"] and told["versions"]["dpe"]
    assert told["consent"] == {"name": "signed.txt", "sha256": digest_of(Path("signed.txt"))}
    assert "I agree" not in json.dumps(told)
    assert told["output"]["sha256"] == digest_of(Path("o.mp4")) and told["frames"] == 4
    assert told == read_sidecar(Path("o.mp4.dpe.json"))


def test_a_sound_file_is_an_input_whatever_its_name(folder: Path, make_clip):
    make_clip("narration.mkv", audio_codec="pcm_s16le").rename("narration")
    Path("narration").with_name("source").write_text("a word of --audio")
    told = made("o.mp4", "--audio", "narration")
    assert told["inputs"]["audio"]["sha256"] == digest_of(Path("narration"))
    make_clip("narration.mkv", audio_codec="pcm_s16le", tone=880).rename("narration")
    assert made("o.mp4", "--audio", "narration", "--overwrite")["key"] != told["key"]
    assert "audio" not in made("o.mp4", "--audio", "source", "--overwrite")["inputs"]


def test_pixels_are_hashed_before_encoding(folder: Path):
    runs = {"a.mkv": ["--codec", "ffv1"], "b.mp4": [], "c.mp4": ["--crf", "40"], "d.mkv": ["--resume"]}
    hashes = {made(name, *more)["output"]["pixels_sha256"] for name, more in runs.items()}
    assert len(hashes) == 1
    assert made("e.mp4", "--no-paste")["output"]["pixels_sha256"] not in hashes


def test_a_pixel_that_differs_changes_the_hash_and_parts_make_the_whole():
    frames = [Frame(n, Fraction(n), np.full((4, 4, 3), n, np.uint8)) for n in range(4)]

    def hashed(frames: list[Frame]) -> PixelHash:
        digest = PixelHash()
        assert [frame for _, frame in digest.passing((None, frame) for frame in frames)] == frames
        return digest

    whole = hashed(frames)
    assert PixelHash(bytes(hashed(frames[:1]).digests + hashed(frames[1:]).digests)).hexdigest() == whole.hexdigest()
    assert hashed(frames[::-1]).hexdigest() != whole.hexdigest()
    frames[2].rgb[0, 0, 0] += 1
    assert hashed(frames).hexdigest() != whole.hexdigest()


def test_a_sidecar_can_be_left_out_and_a_pipe_has_none(folder: Path):
    edit("-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4", "--no-sidecar")
    edit("-s", "talk.mp4", "-d", "smile.mp4", "-o", "-", "--pipe", "y4m")
    assert not list(folder.glob("*.dpe.json")) and not list(folder.glob(".dpe*"))
    made("p.mp4")
    edit("-s", "talk.mp4", "-d", "smile.mp4", "-o", "p.mp4", "--no-sidecar", "--overwrite")
    assert not list(folder.glob("*.dpe.json"))  # that of the older output is gone


def test_a_failed_edit_has_no_sidecar(folder: Path):
    edit("-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4", "--on-no-face", "fail", code=4)
    assert not list(folder.glob("o.mp4*"))


# Repeating a run


def test_a_run_is_repeated_with_the_same_frames(folder: Path, monkeypatch: pytest.MonkeyPatch):
    Path("dpe.toml").write_text("[edit]\nsmooth = 0.5\n")
    first = made("o.mp4", "--strength", "0.7", "--fail-if", "seam>1000")
    Path("dpe.toml").write_text("[edit]\nsmooth = 0\n")  # the sidecar decides
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    done = edit("--from", "../o.mp4.dpe.json", "-o", "again.mp4", DPE_EDIT_STRENGTH="0.1")
    assert done.stdout == "again.mp4\n" and "bit for bit" in done.stderr
    second = json.loads(Path("again.mp4.dpe.json").read_text())
    assert second["settings"] == first["settings"] and second["key"] == first["key"]
    assert second["output"]["pixels_sha256"] == first["output"]["pixels_sha256"]
    assert second["repeats"]["mark"] == first["mark"]


def test_several_edits_and_a_curve_are_repeated_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch):
    Path("c.csv").write_text("0,1\n1,0.5\n")
    several = ["--edit", "face=left,driving=smile.mp4", "--edit", "face=right,driving=talk.mp4,mode=pose"]
    edit("-s", "talk.mp4", *several, "--curve", "c.csv", "-o", "o.mp4")
    monkeypatch.chdir("/")
    done = edit("--from", str(folder / "o.mp4.dpe.json"), "-o", str(folder / "again.mp4"))
    assert "bit for bit" in done.stderr


def test_a_dub_is_repeated_with_its_settings(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", "speech.wav")
    asked = []

    def stand_in(source: Path, audio: Path, output: Path, engine, detector, settings, **_: object) -> Report:
        asked.append((source.name, audio.name, settings))
        output.write_bytes(b"dubbed")
        return Report(output={"pixels_sha256": str(settings.seed)})

    monkeypatch.setattr("dpe_cli.dub.dub_video", stand_in)
    wanted = ["-s", "still.png", "-a", "speech.wav", "--seed", "7", "--blink", "smile.mp4", "--audio-end", "pad"]
    edit(*wanted, "-o", "o.mp4", command="dub")
    told = read_sidecar(Path("o.mp4.dpe.json"))
    assert told["seed"] == 7 and {"source", "audio", "blink"} == told["inputs"].keys()
    assert {"speech", "landmarks"} <= told["networks"].keys()
    assert "bit for bit" in edit("--from", "o.mp4.dpe.json", "-o", "again.mp4", command="dub").stderr
    first, second = ({**vars(settings), "blink": Path(settings.blink).absolute()} for *_, settings in asked)
    assert first == second and asked[0][:2] == asked[1][:2]
    edit("--from", "o.mp4.dpe.json", "-o", "c.mp4", "--seed", "8", code=2, command="dub")
    edit("-s", "still.png", "-o", "c.mp4", code=2, command="dub")


def test_without_a_name_the_output_is_that_of_the_sidecar(folder: Path):
    first = made()
    edit("--from", "o.mp4.dpe.json", code=7)
    edit("--from", "o.mp4.dpe.json", "--overwrite")
    assert json.loads(Path("o.mp4.dpe.json").read_text())["repeats"]["mark"] == first["mark"]


def test_frames_that_differ_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    made()

    class Other(ColourEngine):
        def edit(self, *arguments) -> np.ndarray:
            return super().edit(*arguments) // 2

    monkeypatch.setattr("dpe_cli.engine.Engine", lambda *_, **__: Other())
    assert "the frames differ" in edit("--from", "o.mp4.dpe.json", "-o", "a.mp4").stderr


def test_frames_that_differ_by_the_batch_size_are_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Sized(ColourEngine):
        def __init__(self, *_, batch_size: int | None, **__):
            super().__init__(batch_size or 4)
            self.description = {**self.description, "batch_size": self.batch_size}

        def edit(self, *arguments) -> np.ndarray:
            return super().edit(*arguments) // self.batch_size

    monkeypatch.setattr("dpe_cli.engine.Engine", Sized)
    made()
    done = edit("--from", "o.mp4.dpe.json", "--batch-size", "1", "-o", "a.mp4")
    assert "the frames differ from those of the sidecar's run: batch_size was 4, is 1\n" in done.stderr


def test_what_has_changed_is_named(folder: Path):
    sidecar = made()
    edit("--from", "o.mp4.dpe.json", "-o", "a.mp4", "--strength", "0.5", code=2)
    edit("--from", "o.mp4.dpe.json", "-o", "a.mp4", "--pose-driving", "smile.mp4", code=2)
    sidecar["weights"]["sha256"] = "0" * 64
    Path("w.mp4.dpe.json").write_text(json.dumps(sidecar))
    edit("--from", "w.mp4.dpe.json", "-o", "a.mp4", code=5)
    changed = {"landmarks": {**sidecar["weights"], "path": "landmarks.safetensors"}}
    Path("n.mp4.dpe.json").write_text(json.dumps({**made("r.mp4"), "networks": changed}))
    edit("--from", "n.mp4.dpe.json", "-o", "a.mp4", code=5)
    Path("smile.mp4").rename("moved.mp4")
    edit("--from", "o.mp4.dpe.json", "-o", "a.mp4", code=3)
    edit("--from", "o.mp4.dpe.json", "-o", "b.mp4", "-d", "moved.mp4")
    clip(folder / "smile.mp4", [True] * 3)
    done = edit("--from", "o.mp4.dpe.json", "-o", "a.mp4", code=3)
    assert "smile.mp4 has changed" in done.stderr and not Path("a.mp4").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": "dpe-sidecar/1"}', None])
def test_a_damaged_sidecar_is_told_in_one_line(folder: Path, damage: str | None):
    if damage is not None:
        Path("x.dpe.json").write_text(damage)
    assert edit("--from", "x.dpe.json", code=3).stderr.count("\n") == 1


def test_every_damaged_value_of_a_sidecar_is_told(folder: Path):
    words = made()
    for name in ("settings", "inputs", "weights", "networks", "versions", "output", "command"):
        for value in (None, 3, [], {"source": 3}, {"strength": []}):
            Path("x.mp4.dpe.json").write_text(json.dumps({**words, name: value}))
            done = CliRunner().invoke(cli, ["edit", "--from", "x.mp4.dpe.json", "-o", "a.mp4", "--overwrite"])
            assert done.exit_code in (0, 2, 3, 5) and "unexpected" not in done.stderr, (name, value, done.stderr)
    edit("--from", "o.mp4.dpe.json", code=3, command="dub")


# What an output replaces


def written(*arguments: str, command: str = "edit") -> dict[str, bytes]:
    """Runs what must be refused; gives the files that are there then."""
    done = edit(*arguments, code=7, command=command)
    assert "is also an input" in done.stderr or "is where the sidecar" in done.stderr, done.stderr
    return {path.name: path.read_bytes() for path in Path().iterdir()}


INPUTS = {
    "curve": "0,1\n1,1\n", "config": "", "consent": "I agree.", "parsing": "p", "landmarker": "l", "enhancer": "e",
    "face-models": "m", "weights": "w", "c2pa-cert": "c", "c2pa-key": "k",
}  # fmt: skip


@pytest.mark.parametrize("option", INPUTS)
def test_a_report_replaces_no_input(folder: Path, option: str):
    (folder / "input").write_text(INPUTS[option])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = ["-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4", f"--{option}", "input", "--overwrite"]
    assert written(*options, "--report", "input") == before
    assert written(*options, "--preview", "input") == before


@pytest.mark.parametrize("option", ["face", "driving-face", "audio", "emotion-driving"])
def test_no_output_replaces_a_picture_or_a_sound(folder: Path, option: str, make_clip):
    make_clip("input.mp4", 0.2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = ["-s", "talk.mp4", "-d", "smile.mp4", f"--{option}", "input.mp4", "--overwrite"]
    assert written(*options, "-o", "input.mp4") == before
    assert written(*options, "-o", "o.mp4", "--report", "input.mp4") == before


def test_a_report_replaces_no_settings_and_no_model_in_a_folder(folder: Path):
    (folder / "dpe.toml").write_text("")
    (folder / "models").mkdir()
    (folder / "models/net.onnx").write_text("n")
    options = ["-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4", "--face-models", "models", "--overwrite"]
    for name in ("dpe.toml", "models/net.onnx"):
        assert f"{name} is also an input" in edit(*options, "--report", name, code=7).stderr


def test_a_motion_file_replaces_no_weights(folder: Path):
    (folder / "w.safetensors").write_text("w")
    options = ["smile.mp4", "--weights", "w.safetensors", "-o", "w.safetensors", "--overwrite"]
    edit(*options, code=7, command="extract")


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"], ["--no-sidecar"]])
def test_a_report_is_not_where_the_sidecar_goes(folder: Path, more: list[str]):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    request = ["-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4", *more]
    assert written(*request, "--report", "o.mp4.dpe.json") == before
    (folder / "o.mp4.dpe.json").write_text("I agree.")
    edit(*request, "--consent", "o.mp4.dpe.json", code=7)
    assert (folder / "o.mp4.dpe.json").read_text() == "I agree."


def test_a_repeated_run_replaces_its_sidecar_only_with_its_own(folder: Path):
    first = made()
    edit("--from", "o.mp4.dpe.json", "-o", "again.mp4", "--report", "o.mp4.dpe.json", "--overwrite", code=7)
    assert json.loads(Path("o.mp4.dpe.json").read_text()) == first
    edit("--from", "o.mp4.dpe.json", "--overwrite")
    assert json.loads(Path("o.mp4.dpe.json").read_text())["repeats"]


# Consent


def test_a_policy_refuses_what_has_no_consent(folder: Path):
    policy = {"DPE_REQUIRE_CONSENT": "1"}
    wanted = ["-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4"]
    for name, content in (("empty", b""), ("blank", b" \n\0"), ("missing", None), ("folder", None)):
        if content is not None:
            Path(name).write_bytes(content)
    Path("folder").mkdir()
    for bad in ([], *(["--consent", name] for name in ("empty", "blank", "missing", "folder", "/dev/null"))):
        done = edit(*wanted, *bad, code=9, **policy)
        assert done.stderr.count("\n") == 1 and not Path("o.mp4").exists()
    edit("-s", "talk.mp4", "-a", "smile.mp4", code=9, command="dub", **policy)
    edit(*wanted, code=9, command="plan", **policy)
    edit(*wanted, "--consent", "empty", code=9)  # what is shown is looked at in any case
    edit(*wanted, "--consent", "signed.txt", **policy)
    edit("--from", "o.mp4.dpe.json", "-o", "b.mp4", code=9, **policy)
    edit("--from", "o.mp4.dpe.json", "-o", "b.mp4", "--consent", "signed.txt", **policy)
    edit(*wanted, "--overwrite", DPE_REQUIRE_CONSENT="0")


def test_rows_of_a_batch_without_consent_fail(folder: Path):
    rows = [{"id": "a", "consent": "signed.txt"}, {"id": "b"}]
    rows = [{"source": "talk.mp4", "driving": "smile.mp4", "output": f"{row['id']}.mp4", **row} for row in rows]
    Path("m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = edit("m.jsonl", "--print-commands", command="batch", code=8, DPE_REQUIRE_CONSENT="1")
    assert "--consent=signed.txt" in done.stdout and done.stdout.count("\n") == 1 and "b: no consent" in done.stderr


def test_a_plan_carries_its_consent(folder: Path):
    clip(folder / "long.mp4", [True] * 8)
    wanted = ["-s", "long.mp4", "-d", "smile.mp4", "-o", "o.mp4", "--split", "2"]
    edit(*wanted, "--plan", "p.json", command="plan")
    edit("--segment", "0", "p.json", code=9, DPE_REQUIRE_CONSENT="1")
    edit(*wanted, "--plan", "q.json", "--consent", "signed.txt", command="plan")
    for segment in ("0", "1"):
        edit("--segment", segment, "q.json", DPE_REQUIRE_CONSENT="1")
    edit("q.json", command="join", DPE_REQUIRE_CONSENT="1")
    joined = read_sidecar(Path("o.mp4.dpe.json"))
    edit("-s", "long.mp4", "-d", "smile.mp4", "-o", "whole.mp4", "--consent", "signed.txt")
    whole = read_sidecar(Path("whole.mp4.dpe.json"))
    assert joined["consent"] == whole["consent"] and joined["key"] == whole["key"]
    assert joined["output"]["pixels_sha256"] == whole["output"]["pixels_sha256"]
    assert "bit for bit" in edit("--from", "o.mp4.dpe.json", "-o", "again.mp4").stderr


def test_consent_of_a_file_that_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "c").write_text("yes")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConsentError, match="Permission denied"):
        read_consent(tmp_path / "c")


# Signatures


SIGNING = ["--c2pa-cert", "cert.pem", "--c2pa-key", "key.pem"]


def credentials(folder: Path) -> list[str]:
    """SIGNING, with a chain of a made-up authority and a key in the folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now, keys = datetime.datetime.now(datetime.timezone.utc), [ec.generate_private_key(ec.SECP256R1()) for _ in "ab"]

    def certificate(subject: str, key: ec.EllipticCurvePrivateKey, authority: bool) -> bytes:
        names = [
            x509.Name(
                [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "T")]
            )
            for name in (subject, "root")
        ]
        usage = {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
        usage |= dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        made = x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        made = made.add_extension(x509.BasicConstraints(authority, None), True)
        made = made.add_extension(x509.KeyUsage(**usage), True)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), False)
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        return made.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = certificate("signer", keys[1], False) + certificate("root", keys[0], True)
    (folder / "cert.pem").write_bytes(chain)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(keys[1].private_bytes(*form))
    return SIGNING


@pytest.fixture
def signature() -> Callable[[str], dict]:
    """Reads the manifest of a file, whose signature is valid; skips without the package."""
    c2pa = pytest.importorskip("c2pa")

    def read(name: str) -> dict:
        with c2pa.Reader(name) as reader:
            assert reader.get_validation_state() == "Valid"
            return reader.get_active_manifest()

    return read


@pytest.mark.parametrize(
    ("source", "name", "more"),
    [
        ("talk.mp4", "o.mp4", []),
        ("talk.mp4", "o.mov", ["--resume"]),
        ("still.png", "o.png", []),
        ("still.png", "o.jpg", []),
    ],
)
def test_an_output_is_signed(folder: Path, signature: Callable, source: str, name: str, more: list[str]):
    driving = "smile.mp4" if source == "talk.mp4" else "still.png"
    edit("-s", source, "-d", driving, "-o", name, *credentials(folder), *more)
    manifest = signature(name)
    assert manifest["title"] == name and SOURCE_TYPE in json.dumps(manifest["assertions"])
    assert read_marker(Path(name), exactly=True) and not list(folder.glob(".*"))
    assert len(list(read_frames(Path(name)))) == (4 if source == "talk.mp4" else 1)
    data = bytearray(Path(name).read_bytes())
    data[data.rindex(b"CreatorTool")] ^= 1
    Path(name).write_bytes(data)
    with pytest.raises(AssertionError):
        signature(name)
    assert "key.pem" not in Path(f"{name}.dpe.json").read_text()


def test_what_cannot_sign_is_told_before_the_work(folder: Path):
    pytest.importorskip("c2pa")
    wanted = ["-s", "talk.mp4", "-d", "smile.mp4"]
    good = credentials(folder)
    edit(*wanted, "-o", "o.mkv", *good, code=7)
    edit(*wanted, "-o", "-", *good, code=7)
    edit(*wanted, "-o", "o.mp4", *good[:2], code=2)
    edit(*wanted, "-o", "o.mp4", *good[:3], "signed.txt", code=3)
    edit(*wanted, "-o", "o.mp4", *good[:3], "nothing.pem", code=3)
    Path("cert.pem").write_bytes(Path("cert.pem").read_bytes()[:200])
    edit(*wanted, "-o", "o.mp4", *good, code=3)
    assert not list(folder.glob("o.*"))


def test_2_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.delitem(sys.modules, "dpe_cli.signing", raising=False)
    done = edit("-s", "talk.mp4", "-d", "smile.mp4", "-o", "o.mp4", *SIGNING, code=2)
    assert "dpe-cli[c2pa]" in done.stderr
