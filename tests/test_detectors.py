"""The detectors on the astronaut of scikit-image and the group photograph of insightface, both from their wheels."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from dpe_cli.detectors import CenterFace
from dpe_cli.errors import InputError, WeightsError
from dpe_cli.face import Detection, FaceDetector, FaceRecogniser, crop_box, make_detector
from dpe_cli.identity import SAME_NETWORK

# The astronaut's left eye, right eye, nose and corners of the mouth, by eye; the eyes are 45 pixels apart.
ASTRONAUT = np.array([[202, 102], [247, 103], [222, 126], [203, 142], [242, 143]], float)
EYE_DISTANCE = 45
MODELS = {
    "yunet": ["models/yunet/face_detection_yunet_2023mar.onnx", "models/yunet/face_detection_yunet_2026may.onnx"],
    "mediapipe": ["models/mediapipe/face_landmarker.task", "models/mediapipe/blaze_face_short_range.tflite"],
    "insightface": ["models/insightface/models/scrfd2.5g_mbf", "models/insightface/models/scrfd500m_mbf"],
}
OTHERS = [(name, path) for name, paths in MODELS.items() for path in paths]


@pytest.fixture(scope="module")
def centerface() -> CenterFace:
    return CenterFace(threads=1)


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    """(512, 512, 3), one face."""
    return pytest.importorskip("skimage.data").astronaut()


@pytest.fixture(scope="module")
def group() -> np.ndarray:
    """(886, 1280, 3), six faces."""
    path = Path(find_spec("insightface").origin).parent / "data/images/t1.jpg"
    return np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])


@pytest.fixture
def other(request: pytest.FixtureRequest, shared: Callable[[str], Path]) -> FaceDetector:
    """A detector with a model of its own."""
    name, path = request.param
    if name == "mediapipe":
        pytest.importorskip("mediapipe")
    return make_detector(name, shared(path))


each_other = pytest.mark.parametrize("other", OTHERS, indirect=True, ids=lambda item: Path(item[1]).stem)


def off(face: Detection, points: np.ndarray = ASTRONAUT) -> float:
    """The largest error of the five points in eye distances."""
    return float(np.hypot(*(face.points - points).T).max()) / EYE_DISTANCE


def test_centerface_is_there_without_models(centerface: CenterFace, astronaut: np.ndarray):
    (face,) = centerface.detect(astronaut)
    assert off(face) < 0.1
    assert 0.8 < face.score <= 1
    assert face.points.shape == (5, 2)
    assert face.box.x0 < face.points[:, 0].min() and face.box.y1 > face.points[:, 1].max()


def test_centerface_finds_everybody_best_first(centerface: CenterFace, group: np.ndarray):
    faces = centerface.detect(group)
    assert len(faces) == 6
    assert [face.score for face in faces] == sorted((face.score for face in faces), reverse=True)
    assert all(face.points[0, 0] < face.points[1, 0] and face.points[3, 0] < face.points[4, 0] for face in faces)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_centerface_finds_a_face_that_fills_the_picture(centerface: CenterFace, astronaut: np.ndarray, margin: float):
    box = centerface.detect(astronaut)[0].box
    x0, y0 = int(box.x0 - margin * box.width), int(max(box.y0 - margin * box.height, 0))
    x1, y1 = int(box.x1 + margin * box.width), int(box.y1 + margin * box.height)
    tight = cv2.resize(astronaut[y0:y1, x0:x1], None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    faces = centerface.detect(tight)
    assert len(faces) == 1
    assert off(faces[0], (ASTRONAUT - (x0, y0)) * 4) < 4 * 0.25


def test_looking_again_with_a_border_gives_places_in_the_picture(centerface: CenterFace, astronaut: np.ndarray):
    """The second look, forced by a first one that sees nothing."""
    tight = cv2.resize(astronaut[60:180, 170:280], None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
    seen = []

    class Blind(CenterFace):
        def search(self, rgb: np.ndarray, scale: float, border: float) -> list[Detection]:
            seen.append(rgb.shape[:2])
            return super().search(rgb, scale, border) if border else []

    (face,) = Blind(threads=1).detect(tight)
    assert off(face, (ASTRONAUT - (170, 60)) * 8) < 8 * 0.25
    assert len(seen) == 2 and max(seen[1]) <= 320


def test_large_pictures_are_shrunk_and_places_are_those_of_the_picture(centerface: CenterFace, astronaut: np.ndarray):
    large = cv2.resize(astronaut, (2000, 2000), interpolation=cv2.INTER_CUBIC)
    (face,) = centerface.detect(large)
    assert off(face, ASTRONAUT * 2000 / 512) < 0.1 * 2000 / 512


def test_a_still_picture_gives_the_same_face_every_time(centerface: CenterFace, astronaut: np.ndarray):
    first, again = centerface.detect(astronaut)[0], centerface.detect(astronaut)[0]
    assert np.array_equal(first.points, again.points) and first.box == again.box


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (33, 31), (480, 640)])
def test_a_picture_without_a_face_has_none(centerface: CenterFace, shape: tuple[int, int]):
    assert centerface.detect(np.full((*shape, 3), 127, np.uint8)) == []


def test_detectors_say_nothing(capfd: pytest.CaptureFixture[str], astronaut: np.ndarray):
    CenterFace().detect(astronaut)
    assert capfd.readouterr() == ("", "")


@each_other
def test_other_detectors_see_the_same_face_in_silence(
    capfd: pytest.CaptureFixture[str], other: FaceDetector, astronaut: np.ndarray, centerface: CenterFace
):
    (face,) = other.detect(astronaut)
    assert off(face) < 0.2
    assert 0.5 < face.score <= 1
    ours, theirs = crop_box(centerface.detect(astronaut)[0]), crop_box(face)
    assert 0.88 < theirs.width / ours.width < 1.12  # so that another detector does not change the framing much
    assert np.abs(np.subtract(ours.centre, theirs.centre)).max() < 0.04 * ours.width
    said = capfd.readouterr()
    # Where its memory happens to lie badly, MediaPipe says so at some picture: nothing that we could prevent.
    assert said.out == "" and not [line for line in said.err.splitlines() if "memory is not aligned" not in line]


@each_other
def test_other_detectors_find_a_face_that_fills_the_picture(other: FaceDetector, astronaut: np.ndarray):
    tight = cv2.resize(astronaut[55:180, 172:278], None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    (face,) = other.detect(tight)
    assert off(face, (ASTRONAUT - (172, 55)) * 4) < 4 * 0.3


@each_other
def test_other_detectors_see_nobody_on_a_grey_wall(other: FaceDetector):
    assert other.detect(np.full((240, 320, 3), 127, np.uint8)) == []


@pytest.mark.parametrize("other", [item for item in OTHERS if item[0] != "mediapipe"], indirect=True, ids=str)
def test_other_detectors_find_everybody(other: FaceDetector, group: np.ndarray):
    assert len(other.detect(group)) == 6


def test_insightface_tells_people_apart(shared: Callable[[str], Path], group: np.ndarray, astronaut: np.ndarray):
    detector = make_detector("insightface", shared("models/insightface"))
    assert isinstance(detector, FaceRecogniser)
    people = [detector.embed(group, face) for face in detector.detect(group)]
    people.append(detector.embed(astronaut, detector.detect(astronaut)[0]))
    alike = np.array(people) @ np.array(people).T
    assert np.allclose(np.diag(alike), 1, atol=1e-5)
    assert alike[~np.eye(len(people), dtype=bool)].max() < SAME_NETWORK
    blurred = cv2.GaussianBlur(astronaut, (0, 0), 1.5)[:, ::-1]
    assert detector.embed(blurred, detector.detect(blurred)[0]) @ people[-1] > SAME_NETWORK + 0.1


def test_only_a_recogniser_is_one(centerface: CenterFace):
    assert not isinstance(centerface, FaceRecogniser)


def test_auto_is_centerface_on_a_fresh_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert make_detector().name == "centerface"


def test_auto_is_an_insightface_pack_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: Callable[[str], Path]
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / ".insightface/models").mkdir(parents=True)
    (tmp_path / ".insightface/models/mine").symlink_to(shared("models/insightface/models/scrfd500m_mbf"))
    assert make_detector().name == "insightface (mine)"


@pytest.mark.parametrize(("name", "path"), OTHERS, ids=str)
def test_auto_is_what_the_models_are_for(shared: Callable[[str], Path], name: str, path: str):
    if name == "mediapipe":
        pytest.importorskip("mediapipe")
    assert make_detector("auto", shared(path)).name.startswith(name)


@pytest.mark.parametrize("name", ["insightface", "yunet", "mediapipe"])
def test_a_model_is_found_in_a_folder_of_many(shared: Callable[[str], Path], name: str):
    if name == "mediapipe":
        pytest.importorskip("mediapipe")
    assert make_detector(name, shared("models")).name.startswith(name)


def test_an_unknown_detector_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="no face detector haar; use auto, centerface, insightface, yunet, mediapipe"):
        make_detector("haar")


@pytest.mark.parametrize("name", ["yunet", "mediapipe"])
def test_a_detector_without_its_model_says_how_to_name_it(name: str):
    with pytest.raises(WeightsError, match=f"no {name} model .* --face-models"):
        make_detector(name)


@pytest.mark.parametrize("name", ["auto", "insightface", "yunet", "mediapipe"])
def test_a_folder_without_models_says_so(tmp_path: Path, name: str):
    with pytest.raises(WeightsError, match=str(tmp_path)):
        make_detector(name, tmp_path)


def test_models_that_do_not_exist_say_so(tmp_path: Path):
    with pytest.raises(WeightsError, match="no such folder or file"):
        make_detector("auto", tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["det_10g.onnx", "yunet.onnx", "face.task", "blaze_face.tflite"])
def test_a_damaged_model_says_so(tmp_path: Path, file: str, capfd: pytest.CaptureFixture[str]):
    if file.endswith(("task", "tflite")):
        pytest.importorskip("mediapipe")
    (tmp_path / file).write_bytes(b"not a model")
    with pytest.raises(WeightsError, match=file):
        make_detector("auto", tmp_path)
    assert capfd.readouterr() == ("", "")
