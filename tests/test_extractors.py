"""The networks of the evaluation: published values where there are any. Most need the shared models."""

import cv2
import numpy as np
import pytest

from dpe_cli.detectors import ArcFace
from dpe_cli.errors import WeightsError
from dpe_cli.extractors import Lpips
from dpe_cli.video import read_image


@pytest.mark.parametrize(("network", "values"), [("alex", (0.7219, 0.1376)), ("vgg", (0.5686, 0.4217))])
def test_lpips_gives_the_values_published_for_its_example(shared, network, values):
    folder = shared("models/lpips")
    reference, *others = (read_image(folder / "example" / f"ex_{name}.png")[None] for name in ("ref", "p0", "p1"))
    lpips = Lpips(folder, network)
    found = [lpips.distance(reference, other)[0] for other in others]
    assert found == pytest.approx(values, abs=2e-4)
    assert lpips.distance(reference, reference) == pytest.approx(0, abs=1e-6)


def test_a_face_keeps_its_identity_in_other_light_and_size(shared):
    pack = shared("models/insightface/models/scrfd500m_mbf")
    model = shared("models/mediapipe/face_landmarker.task")
    rgb = pytest.importorskip("skimage.data").astronaut()
    from dpe_cli.landmarks import Landmarker, five_points

    landmarker = Landmarker(model)
    points = five_points(landmarker.detect(rgb).points)
    landmarker.close()
    network = ArcFace.load(pack)
    original = network.embed(rgb, points)
    smaller = cv2.resize((rgb * 0.7).astype(np.uint8), (320, 320), interpolation=cv2.INTER_AREA)
    assert np.linalg.norm(original) == pytest.approx(1, abs=1e-5)
    assert original @ network.embed(smaller, points * 320 / 512) > 0.9
    assert original @ network.embed(rgb, points + [0, 160]) < 0.5  # no face there
    assert network.name == "mobilefacenet_y1_128d.onnx"


def test_models_that_are_not_there_are_named(tmp_path):
    with pytest.raises(WeightsError, match="alexnet_features"):
        Lpips(tmp_path)
    with pytest.raises(WeightsError, match="no recognition network"):
        ArcFace.load(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="broken.onnx"):
        ArcFace.load(tmp_path)
