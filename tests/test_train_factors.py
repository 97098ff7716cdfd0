"""The fit of factors: on made-up codes whose factors are known, and whole, on a small network and made-up clips."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import synthetic_face, write_clips

from dpe_cli import train_factors
from dpe_cli.dataset import is_held_out
from dpe_cli.errors import WeightsError
from dpe_cli.factors import NAMES, SPACE, Factors, follows_space, read_fit
from dpe_cli.landmarks import CORNERS, FaceShape
from dpe_cli.main import cli
from dpe_cli.measures import EYE_RADIUS, MEASURES, TABLE, measures_of
from dpe_cli.speech import RATE
from dpe_cli.train_banks import PARTS, Transplants
from dpe_cli.train_factors import (
    ANGLES,
    Judge,
    Samples,
    answers,
    calibrated,
    explained,
    fit_coordinates,
    fit_parts,
    fit_projectors,
    measured_parts,
    put_right,
    read_banks,
    slider_axis,
    solve,
    told_one,
    tried,
)
from dpe_cli.weights import folder

random = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same numbers, whichever ran before it."""
    random.bit_generator.state = np.random.default_rng(0).bit_generator.state


COUNT, K = 400, 20


def test_a_slider_moves_its_measure_and_none_of_the_others():
    codes = random.normal(0, 1, (COUNT, 6)) * [1, 2, 3, 1, 0.5, 1]
    truth = random.normal(0, 1, (3, 6))
    read, axis = solve(codes, codes @ truth.T)
    assert np.allclose(read, truth, atol=0.05)
    assert np.allclose(read @ axis, np.eye(3), atol=1e-6)


def test_projectors_sum_to_the_identity_and_tell_factors_apart():
    head = random.normal(0, 1, (64, K))
    codes = random.normal(0, 1, (COUNT, K))
    reads = random.normal(0, 1, (len(TABLE), K))
    fitted = fit_projectors(codes, codes @ reads.T, head)
    assert np.allclose(sum(fitted.projectors.values()), np.eye(K), atol=1e-9)
    own = {name: [n for n, measure in enumerate(MEASURES) if measure.factor == name] for name in NAMES[:-1]}
    for name in NAMES[:-1]:
        matrix = fitted.projectors[name]
        assert np.allclose(matrix @ matrix, matrix, atol=1e-6)
        for other, rows in own.items():
            told = fitted.read[rows] @ matrix
            wanted = fitted.read[rows] if other == name else 0
            assert np.allclose(told, wanted, atol=1e-6)
    assert np.allclose(fitted.read[: len(MEASURES)] @ fitted.projectors["rest"], 0, atol=1e-6)
    mixed = Factors(fitted.projectors).mix(codes.astype(np.float32)[:5], {n: (codes[5:10], np.ones(5)) for n in NAMES})
    assert np.allclose(mixed, codes[5:10], atol=1e-6)


def test_what_the_head_ignores_is_not_read():
    head = random.normal(0, 1, (64, K))
    head[:, 0] = 0
    codes = random.normal(0, 1, (COUNT, K))
    measures = np.repeat(codes[:, :1], len(TABLE), 1) + random.normal(0, 0.01, (COUNT, len(TABLE)))
    fitted = fit_projectors(codes, measures, head)
    assert np.abs(fitted.read[:, 0]).max() < 1e-6


def test_coordinates_of_a_factor_alone_are_read():
    codes = random.normal(0, 1, (COUNT, K))
    measures = random.normal(0, 1, (COUNT, len(TABLE)))
    measures[:, 0] = codes[:, 6] + codes[:, 15]  # a mouth that the lids tell too
    read = fit_coordinates(codes, measures).read
    assert abs(read[0, 6] - 1) < 0.15 and read[0, 15] == 0
    assert not read[:, 16:18][[0, 1, 2, 3, 6, 7]].any()  # gaze tells nothing but gaze


def made_answer(scale: float = 1.0, people: int = 3) -> np.ndarray:
    """Of people who are all alike."""
    return np.repeat(scale * random.normal(0, 3, (1, len(TABLE) + ANGLES, K)), people, axis=0)


def test_a_slider_asks_pictures_for_one_unit_and_holds_the_others_and_the_head():
    answer, sigma = made_answer(), random.uniform(0.5, 2, len(TABLE))
    covariance, names = np.diag(random.uniform(0.5, 2, K)), [measure.name for measure in TABLE]
    axes = np.column_stack([slider_axis(place, answer, covariance, sigma) for place in range(len(TABLE))])
    change = answer[0] @ axes
    change[: len(TABLE)] *= sigma / sigma[:, None]  # in sigma, of one sigma asked
    assert np.allclose(np.diag(change), 1, atol=1e-6)
    mouth = change[:, names.index("mouth_open")]
    assert np.abs(np.delete(mouth[: len(MEASURES)], 0)).max() < 0.1
    assert np.abs(mouth[len(TABLE) :]).max() < 0.1
    assert np.abs(change[names.index("gaze_x"), names.index("happy")]) < 0.1


def test_what_stays_in_the_mean_and_moves_in_each_person_is_held_too():
    answer = np.zeros((2, len(TABLE) + ANGLES, K))
    answer[:, 0, :2] = 1  # two directions open the mouth alike
    answer[:, -1, 1] = [3, -3]  # one of them turns a head to the left and another to the right
    axis = slider_axis(0, answer, np.eye(K), np.ones(len(TABLE)))
    assert abs(axis[1]) < 0.05 and axis[0] == pytest.approx(1, abs=0.05)


def test_a_measure_that_pictures_do_not_show_is_not_blown_up():
    answer = made_answer()
    answer[:, 0] *= 1e-4
    assert np.linalg.norm(slider_axis(0, answer, np.eye(K), np.ones(len(TABLE)))) < 1


class PaintingEngine:
    """A picture is its code; what is read there is a matrix times it."""

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        return crops[:, 0, :K, 0].astype(np.float32)

    def edit(self, crops: np.ndarray, expression: np.ndarray, pose: None) -> np.ndarray:
        return expression


class Seeing:
    """A head that never turns; measures do not rise above a limit, and people answer with their gains."""

    def __init__(self, truth: np.ndarray, limit: float = np.inf, gains: np.ndarray | float = 1.0):
        self.truth, self.limit, self.gains = truth, limit, np.reshape(gains, (-1, 1))

    def detect_batch(self, pictures: np.ndarray) -> list[FaceShape]:
        values = np.minimum(self.gains * (pictures.astype(np.float64) @ self.truth.T), self.limit)
        return [FaceShape(row, np.zeros(52), np.eye(3)) for row in values]


@pytest.fixture
def painted(monkeypatch):
    """People whose pictures are their codes, to be looked at with some truth."""
    monkeypatch.setattr(train_factors, "measures_of_faces", lambda faces, template: np.stack([f.points for f in faces]))
    crops = random.integers(0, 2, (3, 1, K, 3)).astype(np.uint8)  # below the limits that tests set
    return lambda truth, **more: Judge(
        crops, PaintingEngine(), Seeing(truth, **more), None, lambda items, total, what: items
    )


FAR = np.full(len(TABLE), -99.0), np.full(len(TABLE), 99.0)
ONE = np.ones(len(TABLE))


def test_the_pictures_answer_is_found_and_sliders_are_tried(painted):
    truth = random.normal(0, 1, (len(TABLE), K))
    judge = painted(truth)
    found = answers(judge, np.diag(random.uniform(0.5, 2, K)))
    assert np.allclose(found[:, : len(TABLE)], truth, atol=1e-4) and np.allclose(found[:, len(TABLE) :], 0, atol=1e-6)
    asked, change = tried(judge, 1, 0.5 * np.linalg.pinv(truth)[:, 1], ONE, FAR)
    assert np.allclose(change[..., 1], 0.5 * asked, atol=1e-4) and np.allclose(change[..., 0], 0, atol=1e-4)
    assert explained(asked.ravel(), change[..., 1].ravel()) == pytest.approx(0.75, abs=1e-3)
    asked, _ = tried(judge, 1, np.zeros(K), ONE, (judge.still[:, 1].min() * ONE, FAR[1]))
    assert asked.min() >= -(np.ptp(judge.still[:, 1])) - 1e-6  # nobody is asked for less than the least


def test_a_trial_puts_the_answer_right_along_the_slider_alone(painted):
    truth, covariance = random.normal(0, 1, (len(TABLE), K)), np.diag(random.uniform(0.5, 2, K))
    judge, guess = painted(truth), made_answer(0.3)
    axis, other = slider_axis(0, guess, covariance, ONE), random.normal(0, 1, K)
    better = put_right(guess, covariance, axis, *tried(judge, 0, axis, ONE, FAR))
    assert np.allclose(better[:, : len(TABLE)] @ axis, truth @ axis, atol=1e-3)
    other -= axis * (other @ np.linalg.solve(covariance, axis)) / (axis @ np.linalg.solve(covariance, axis))
    assert np.allclose(better @ other, guess @ other)


def test_a_slider_is_made_for_what_pictures_do_on_the_way(painted):
    """What goes no farther than a limit shows less than asked in the mean, and the slider is made longer for it."""
    truth = 3 * np.eye(len(TABLE), K)
    judge = painted(truth, limit=4.5)
    answer = np.repeat(np.vstack([truth, np.zeros((ANGLES, K))])[None], 3, axis=0)
    axis = slider_axis(0, answer, np.eye(K), ONE)
    asked, change = tried(judge, 0, axis, ONE, FAR)
    again = slider_axis(0, put_right(answer, np.eye(K), axis, asked, change), np.eye(K), ONE)
    given = [(tried(judge, 0, one, ONE, FAR)[1][..., 0] * asked).sum() / (asked**2).sum() for one in (axis, again)]
    assert given[0] < given[1] < 1.1


def test_a_slider_gets_the_length_that_brings_all_people_nearest_to_what_is_asked(painted):
    truth = np.eye(len(TABLE), K)
    for gains in ([1, 1, 1], [0, 1, 2]):  # of three people
        judge, best = painted(truth, gains=np.array(gains)), sum(gains) / sum(gain**2 for gain in gains)
        for guess in (0.7, 1.6):
            axis = calibrated(judge, 0, guess * truth[0], ONE, FAR)
            assert axis @ truth[0] == pytest.approx(best, abs=1e-3)
            told = told_one(random.normal(0, 1, K), np.eye(K), axis)
            assert told @ axis == pytest.approx(1)  # so that who asks by `answer` gets the calibrated length


def test_measures_read_their_own_bank():
    codes, measures = random.normal(0, 1, (COUNT, K)), random.normal(0, 1, (COUNT, len(TABLE)))
    measures[:, 0] = codes[:, 3] + codes[:, 9]
    picks = {name: np.diag((np.arange(K) // 4 == place).astype(float)) for place, name in enumerate(NAMES[:-1])}
    fitted = read_banks(codes, measures, picks)
    assert np.allclose(sum(fitted.projectors.values()), np.eye(K))
    assert abs(fitted.read[0, 3] - 1) < 0.15 and np.abs(fitted.read[0, 4:16]).max() < 1e-9  # the mouth's are 0 to 3
    assert np.abs(fitted.read[3, [*range(4), *range(8, K)]]).max() < 1e-9  # blink's are 4 to 7; the mouth's, mood's too


def spoken_faces(clips: int = 60, frames: int = 6, lasting: bool = True) -> tuple[Samples, Samples, np.ndarray]:
    """People whose codes are a mixture of known parts: pose 0 to 5, mouth 6 to 13, eyes 14 to 17, brows 18 and 19. Of
    the mouth, 6 and 7 make the sound, and 13 is a smile that lasts for half a clip; or they last, and it does not."""
    mix = random.normal(0, 1, (K, K))
    owner = np.array(["rest"] * 6 + ["mouth"] * 8 + ["eyes"] * 4 + ["brows"] * 2)

    def people(frames: int) -> tuple[np.ndarray, np.ndarray]:
        truth, clip = random.normal(0, 1, (clips * frames, K)), np.repeat(np.arange(clips), frames)
        slow = [13] if lasting else [6, 7]
        truth[:, slow] = np.repeat(random.normal(0, 1, (2 * clips, len(slow))), frames // 2, axis=0)
        return truth, clip

    def samples(truth: np.ndarray, clip: np.ndarray, swapped: dict, sound: np.ndarray | None) -> Samples:
        measures = np.zeros((len(truth), len(TABLE)))
        measures[:, 3:6] = truth[:, 14:17]  # blink and gaze
        turn, names = random.normal(0, 5, (len(truth), 3)), [f"id{one:04}" for one in range(clips)]
        return Samples(truth @ mix.T, measures, clip, np.zeros((clips, 1, 1, 3)), names, turn, swapped, sound)

    truth, clip = people(frames)
    donor, swapped = truth[random.permutation(len(truth))], {}
    for name in PARTS:
        mixed = np.where(name == owner, donor, truth)
        swapped[name] = Transplants(*(rows @ mix.T for rows in (truth, donor, mixed)))
    spoken, spoken_clip = people(20)
    sound = spoken[:, 6:8] @ random.normal(0, 1, (2, 12)) + random.normal(0, 0.3, (len(spoken), 12))
    return samples(truth, clip, swapped, None), samples(spoken, spoken_clip, {}, sound), mix


def test_lips_go_with_the_sound_and_what_is_left_and_lasts_is_mood():
    train, spoken, mix = spoken_faces()
    told, covariance = np.zeros((len(TABLE), K)), mix @ mix.T  # pictures have nothing to add
    found = fit_parts(train, spoken, np.eye(K), told, covariance)
    seen = {name: np.linalg.inv(mix) @ bank @ mix for name, bank in found.named.items()}
    assert np.allclose(np.diag(seen["mouth"])[[6, 7]], 1, atol=0.1) and np.trace(seen["mouth"]) == pytest.approx(2)
    assert np.diag(seen["mood"])[8:14].min() > 0.8 and np.trace(seen["mood"]) == pytest.approx(6)
    lips, mood = (train.within(train.codes) @ found.banks[name].T for name in ("mouth", "mood"))
    assert np.abs(lips.T @ mood).max() < 1e-6 * np.abs(lips.T @ lips).max()
    holds = measured_parts(found, train, train, spoken, spoken)
    assert holds["lasts"]["mood"] > holds["lasts"]["mouth"]
    assert holds["sound"]["right"] > 0.8 and abs(holds["sound"]["wrong"]) < 0.2 and holds["sound"]["won"] > 0.99
    assert holds["told"]["blink"]["blink"] > 0.9 > 0.1 > holds["told"]["mouth"]["blink"]


def test_what_comes_and_goes_as_lips_do_stays_with_them():
    train, spoken, mix = spoken_faces(lasting=False)
    found = fit_parts(train, spoken, np.eye(K), np.zeros((len(TABLE), K)), mix @ mix.T)
    assert len(found.heads) == 2 and not found.banks["mood"].any()
    assert np.trace(found.banks["mouth"]) == pytest.approx(8)


def test_without_sound_the_mouth_stays_whole():
    train, _, mix = spoken_faces()
    found = fit_parts(train, None, np.eye(K), np.zeros((len(TABLE), K)), mix @ mix.T)
    seen = np.linalg.inv(mix) @ found.banks["mouth"] @ mix
    assert np.diag(seen)[6:14].min() > 0.8 and len(found.heads) == 0 and not found.banks["mood"].any()
    assert measured_parts(found, train, train, None, None)["sound"] is None


def test_r2_is_one_for_the_truth_and_zero_for_the_mean():
    truth = random.normal(0, 1, (50, 2))
    truth -= truth.mean(0)
    assert np.allclose(explained(truth, truth), 1) and np.allclose(explained(truth, 0 * truth), 0)


def test_differences_within_clips_have_no_identity():
    clip = np.array([0, 0, 1, 1, 1])
    samples = Samples(
        np.zeros((5, 1)), np.zeros((5, 1)), clip, np.zeros((2, 1, 1, 3)), ["a", "b"], np.zeros((5, 3)), {}
    )
    assert samples.within(np.array([[1.0], [3], [10], [10], [13]]))[:, 0].tolist() == [-1, 1, -1, -1, 2]


def test_measures_are_in_their_units():
    face = synthetic_face()
    face[[13, 14], 2] = 0
    opened = face.copy()
    opened[14, 1] += 0.2
    first, second = measures_of(np.stack([face, opened]), np.zeros((2, 52)), face)
    names = [measure.name for measure in TABLE]
    assert second[names.index("mouth_open")] - first[names.index("mouth_open")] == pytest.approx(0.2, abs=1e-3)
    before, gaze = first, [names.index("gaze_x"), names.index("gaze_y")]
    turned = face.copy()
    for iris, corners in zip((468, 473), CORNERS, strict=True):
        width = np.linalg.norm(np.subtract(*face[list(corners)]))
        turned[iris, :2] += width * EYE_RADIUS * np.radians([10, -5])  # y grows downwards
    after = measures_of(turned[None], np.zeros((1, 52)), face)[0]
    assert (after - before)[gaze] == pytest.approx([10, 5], abs=0.1)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Untrained small weights of our own beside clips of people of both splits; landmarks are not looked for."""
    import torch

    from dpe_cli.models import DPE, DPEConfig
    from dpe_cli.weights import save

    torch.manual_seed(0)
    names = [f"id{number:04}" for number in range(200)]
    write_clips(
        tmp_path, [name for name in names if not is_held_out(name)][:5] + [n for n in names if is_held_out(n)][:2]
    )
    config = DPEConfig(size=64, channels={4: 16, 8: 16, 16: 16, 32: 16, 64: 16}, latent_dim=32)
    folder = tmp_path / "weights"
    folder.mkdir()
    save(folder / "small.safetensors", DPE(config).state_dict(), config)

    class Random:
        def detect_batch(self, pictures):
            return [FaceShape(synthetic_face(), random.uniform(0, 1, 52), np.eye(3)) for _ in pictures]

        def close(self):
            pass

    monkeypatch.setattr("dpe_cli.landmark_net.NetworkLandmarker", Random)
    return folder / "small.safetensors"


@pytest.mark.parametrize("stage", ["factors", "banks"])
@pytest.mark.parametrize("supervised", [True, False])
def test_the_stage_fits_and_binds_factors_to_their_weights(small, tmp_path, supervised: bool, stage: str):
    if supervised:
        shutil.copy(folder() / SPACE, small.parent)
    assert follows_space(small) is supervised
    spoken = stage == "banks" and not supervised
    for path in tmp_path.glob("*.npz") if spoken else ():
        with np.load(path) as clip:
            kept = dict(clip)
        sound = random.integers(-9999, 9999, 5 * RATE).astype(np.int16)
        np.savez(path, **kept, times=np.linspace(0, 2.44, 12), sound=sound, sound_start=-1.0)
    command = ["train", "--set", f"stage={stage}", "--data", tmp_path, "-o", small.parent, "--init", small]
    done = CliRunner().invoke(cli, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    path = small.parent / "small.factors.json"
    assert done.stdout.strip() == str(path)
    fit = read_fit(path)
    assert (fit["banks"] is None) is (stage == "factors")
    assert ("clips with sound" in done.stderr) is spoken
    assert spoken or ("no clip has sound" in done.stderr) is (stage == "banks")
    assert (fit["projectors"] is None) is (supervised and stage == "factors")
    assert set(fit["sliders"]) == {measure.name for measure in TABLE}
    factors = Factors.load(small)
    assert factors.rest.shape == (20,) and np.allclose(sum(factors.projectors.values()), np.eye(20), atol=1e-5)
    fit["weights_sha256"] = "of others"
    path.write_text(json.dumps(fit))
    if supervised:  # coordinates stay what they are, sliders do not
        with pytest.raises(WeightsError, match="was fitted to other weights"):
            Factors.load(small).slider("smile")
    else:
        with pytest.raises(WeightsError, match="was fitted to other weights"):
            Factors.load(small)
