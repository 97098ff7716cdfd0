"""Factors of the motion code: they add up, and each moves alone."""

import json

import numpy as np
import pytest

from dpe_cli.errors import WeightsError
from dpe_cli.factors import FORMAT, NAMES, Factors, coordinate_projectors, fit_of

random = np.random.default_rng(0)
OWN, DRIVING = random.normal(0, 3, (2, 5, 20)).astype(np.float32)
ONE, ZERO = np.ones(5), np.zeros(5)


@pytest.fixture
def factors() -> Factors:
    return Factors(coordinate_projectors())


def test_factors_add_up_to_the_whole_code(factors: Factors):
    assert np.array_equal(sum(factors.projectors.values()), np.eye(20))


def test_all_strengths_one_is_the_driving_and_zero_the_own(factors: Factors):
    assert np.array_equal(factors.mix(OWN, {name: (DRIVING, ONE) for name in NAMES}), DRIVING)
    assert np.array_equal(factors.mix(OWN, {name: (DRIVING, ZERO) for name in NAMES}), OWN)
    assert np.array_equal(factors.mix(OWN, {}), OWN)


def test_a_factor_moves_its_coordinates_alone(factors: Factors):
    mixed = factors.mix(OWN, {"mouth": (DRIVING, ONE)})
    assert np.array_equal(mixed[:, 6:14], DRIVING[:, 6:14])
    assert np.array_equal(np.delete(mixed, range(6, 14), 1), np.delete(OWN, range(6, 14), 1))


def test_eyes_are_blink_and_gaze(factors: Factors):
    both = factors.mix(OWN, {"blink": (DRIVING, ONE), "gaze": (DRIVING, ONE)})
    assert np.array_equal(factors.mix(OWN, {"eyes": (DRIVING, ONE)}), both)


def test_a_name_that_is_no_factor_is_refused(factors: Factors):
    with pytest.raises(ValueError, match="nose is no factor"):
        factors.projector("nose")


def test_the_shipped_weights_have_factors():
    assert Factors.load().dim == 20


def test_weights_of_others_need_a_fit_and_take_only_their_own(tmp_path):
    weights = tmp_path / "dpe.pt"
    weights.write_bytes(b"some")
    with pytest.raises(WeightsError, match="no fitted factors"):
        Factors.load(weights)
    fit = {"format": FORMAT, "weights_sha256": "other", "projectors": None}
    fit_of(weights).write_text(json.dumps(fit))
    with pytest.raises(WeightsError, match="other weights"):
        Factors.load(weights)
    with pytest.raises(WeightsError, match="other weights"):
        Factors.load({"weights": str(weights), "sha256": "another"})
    assert Factors.load({"weights": str(weights), "sha256": "other"}).dim == 20
