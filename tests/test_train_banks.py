"""Banks from transplanted parts: on made-up codes whose factors are known, and on painted faces."""

import numpy as np
import pytest
from conftest import synthetic_face, turned

from dpe_cli.factors import NAMES, Factors
from dpe_cli.landmarks import EYES, FACE_OVAL, LIPS_OUTER
from dpe_cli.regions import transplant
from dpe_cli.speech import RATE
from dpe_cli.train_banks import (
    PARTS,
    Transplants,
    choose_pair,
    fit_banks,
    half_away,
    has_sound,
    held_still,
    lasts,
    likeliest,
    part_lids,
    read_of_sound,
    sound_about,
    told_by_sound,
)

random = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same numbers, whichever ran before it."""
    random.bit_generator.state = np.random.default_rng(0).bit_generator.state


COUNT, K = 600, 20
OWNER = np.array(["rest"] * 6 + ["mouth"] * 8 + ["eyes"] * 4 + ["brows"] * 2)
MIX = random.normal(0, 1, (K, K))  # what the networks made of the factors: no coordinate is any factor's


def made(noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, dict[str, Transplants]]:
    """Factors (N, K), their codes, and transplants in which exactly one part has changed hands."""
    truth = random.normal(0, 1, (COUNT, K))
    swaps = {}
    for name in PARTS:
        host, donor = truth[: COUNT // 2], truth[COUNT // 2 :]
        mixed = np.where(name == OWNER, donor, host) + random.normal(0, noise, host.shape)
        swaps[name] = Transplants(*(rows @ MIX.T for rows in (host, donor, mixed)))
    return truth, truth @ MIX.T, swaps


def test_banks_find_what_a_transplant_moves():
    truth, codes, swaps = made()
    banks = fit_banks(codes, swaps)
    back = np.linalg.inv(MIX)
    for name, bank in banks.items():
        seen = back @ bank @ MIX
        assert np.allclose(seen, np.diag((name == OWNER).astype(float)), atol=0.15), name
    lids = part_lids(codes @ banks["eyes"].T, truth[:, 14:17], banks["eyes"])
    assert np.allclose(lids["blink"] + lids["gaze"], banks["eyes"])
    opened = back @ lids["blink"] @ MIX
    assert opened[14, 14] > 0.9 and np.abs(np.delete(opened, 14, 0)).max() < 0.2  # the lids' opening and nothing else


def test_irises_that_go_down_with_lids_stay_gaze():
    """In the codes' likeliest change with the lids' opening the irises move too; the bank of blinks leaves them."""
    seen = random.normal(0, 1, (COUNT, 3))
    seen[:, 2] += 2 * seen[:, 0]
    mix = np.linalg.qr(random.normal(0, 1, (3, 3)))[0]
    lids = part_lids(seen @ mix.T, seen, np.eye(3))
    for name, wanted in (("blink", [1, 0, 0]), ("gaze", [0, 1, 1])):
        assert np.allclose(np.linalg.inv(mix) @ lids[name] @ mix, np.diag(wanted), atol=0.15), name


def test_a_bank_keeps_its_size_when_transplants_are_read_badly():
    """Least squares alone shrinks what is noisy. What a bank adds, it reads in full, and the others not at all."""
    _, codes, swaps = made(noise=0.5)
    banks = fit_banks(codes, swaps)
    for name, bank in banks.items():
        assert np.trace(bank) == pytest.approx((name == OWNER).sum())
        for other, another in banks.items():
            assert np.allclose(another @ bank, bank if other == name else 0, atol=1e-8)


def test_what_does_not_come_over_has_no_bank():
    _, codes, swaps = made(noise=0.1)
    dull = np.where(OWNER == "mouth", 0.3, 1.0)  # of a mouth's change, codes see a third
    kept = np.arange(K) < 10  # of the mouth's eight, the first four are told
    host, donor, mixed = (rows @ np.linalg.inv(MIX).T for rows in vars(swaps["mouth"]).values())
    mixed = np.where(kept, mixed, host + dull * (mixed - host))
    swaps["mouth"] = Transplants(*(rows @ MIX.T for rows in (host, donor, mixed)))
    assert np.trace(fit_banks(codes, swaps)["mouth"]) == pytest.approx(4)


def test_strengths_of_one_are_the_full_transfer_and_of_zero_the_own_code():
    truth, codes, swaps = made(noise=0.3)
    banks = fit_banks(codes, swaps)
    eyes = banks.pop("eyes")
    banks |= part_lids(codes @ eyes.T, truth[:, 14:17], eyes)
    banks["mood"] = 0 * eyes
    factors = Factors({**banks, "rest": np.eye(K) - sum(banks.values())})
    own, driving = codes[:5].astype(np.float32), codes[5:10].astype(np.float32)
    for strength, wanted in ((1.0, driving), (0.0, own)):
        mixed = factors.mix(own, {name: (driving, np.full(5, strength)) for name in NAMES})
        assert np.allclose(mixed, wanted, atol=1e-5)


def test_what_the_head_ignores_has_no_part_in_a_bank():
    _, codes, swaps = made()
    alive = np.linalg.qr(random.normal(0, 1, (K, 15)))[0].T
    for bank in fit_banks(codes, swaps, alive).values():
        assert np.allclose(bank, alive.T @ alive @ bank @ alive.T @ alive)


def test_pictures_have_the_last_word():
    """A generator that blinks with the mouth: the mouth's bank makes up for it, and the eyes' shows all of the eyes."""
    _, codes, swaps = made()
    measures = [measure for part in PARTS.values() for measure in part.measures]
    told = dict(zip(measures, np.linalg.inv(MIX)[[6, 7, 8, 14, 15, 16, 18]], strict=True))
    told["blink"] = told["blink"] + 0.5 * told["mouth_open"]
    banks = held_still(fit_banks(codes, swaps), told, MIX @ MIX.T)
    for name, part in PARTS.items():
        for measure, row in told.items():
            wanted = row if measure in part.measures else 0
            assert np.allclose((row @ banks[name] - wanted) @ MIX, 0, atol=0.08), (name, measure)


CLIP = np.repeat(np.arange(40), 20)


def heard(mouth: np.ndarray) -> np.ndarray:
    """Sound (N, 12) that a mouth made, and noise."""
    return mouth @ random.normal(0, 1, (mouth.shape[1], 12)) + random.normal(0, 0.5, (len(mouth), 12))


def test_lips_are_what_sound_tells_at_the_right_moment():
    codes = random.normal(0, 1, (len(CLIP), 6))  # the first two are speech
    mix = random.normal(0, 1, (6, 6))
    sound, mouth = heard(codes[:, :2]), codes @ mix.T
    heads = told_by_sound(mouth, read_of_sound(sound, mouth, CLIP), CLIP)
    assert len(heads) == 2
    lips = np.linalg.inv(mix) @ likeliest(mouth, heads) @ mix
    assert np.allclose(lips, np.diag([1, 1, 0, 0, 0, 0]), atol=0.25)
    late = sound[half_away(CLIP)]  # of the same mouths, at another time
    assert len(told_by_sound(mouth, read_of_sound(late, mouth, CLIP), CLIP)) == 0


def test_what_is_heard_belongs_to_its_moment(tmp_path):
    samples = 0.02 * random.normal(0, 1, 5 * RATE)
    samples[int(2.0 * RATE) : int(2.2 * RATE)] *= 20  # 1.0 to 1.2 s of a clip whose sound begins a second before it
    clip = {"sound": np.round(samples * 8000).astype(np.int16), "sound_start": np.array(-1.0)}
    times = np.array([0.3, 1.1, 1.3, 2.4])
    rows = sound_about(clip, times).reshape(4, 8, 20).mean(2)
    assert rows[1].argmin() in (0, 7) and rows[1, 3:5].min() > rows[[0, 3]].max() + 0.5
    assert rows[2].argmax() <= 1  # there it lies in the past
    np.savez(tmp_path / "talk.npz", **clip, times=times)
    np.savez(tmp_path / "mute.npz", times=times)
    assert has_sound(tmp_path / "talk.npz") and not has_sound(tmp_path / "mute.npz")


def test_what_stays_for_a_window_lasts_and_what_comes_and_goes_does_not():
    window, size = np.repeat(np.arange(160), 5), len(CLIP)
    person, turn = window // 4, random.normal(0, 5, (160, 3))[window]  # heads stay turned, too
    slow = random.normal(0, 1, (160, 1))[window] + random.normal(0, 9, (40, 1))[person]  # people look different
    fast = random.normal(0, 1, (size, 1))
    assert lasts(slow, window, person, turn) == pytest.approx(1)
    assert lasts(fast, window, person, turn) == pytest.approx(0, abs=0.15)
    assert lasts(slow + fast, window, person, turn) == pytest.approx(0.5, abs=0.15)
    assert lasts(turn + random.normal(0, 1, (size, 3)), window, person, turn) == pytest.approx(0, abs=0.15)


def face(shift: float = 0.0) -> np.ndarray:
    """A round face with its mouth, eyes and oval where faces have them, pixels of a 256 crop."""
    points = synthetic_face()
    angles = np.linspace(0, 2 * np.pi, len(FACE_OVAL), endpoint=False)
    points[FACE_OVAL, :2] = np.stack([np.sin(angles), -1.3 * np.cos(angles)], -1)  # from the forehead clockwise
    for place, part in (([0, 0.5], LIPS_OUTER), ([-0.35, -0.3], EYES[0]), ([0.35, -0.3], EYES[1])):
        angles = np.linspace(0, 2 * np.pi, len(part), endpoint=False)
        points[part, :2] = np.array(place) + 0.12 * np.stack([np.sin(angles), np.cos(angles)], -1)
    points[[2, 195, 1], :2] = [[0, 0.2], [0, -0.1], [0, 0.1]]
    return 60 * points + [128 + shift, 128, 0]


def test_a_part_changes_hands_and_the_rest_stays():
    host, donor = np.full((256, 256, 3), 50, np.uint8), np.full((256, 256, 3), 200, np.uint8)
    mouth, eye, forehead = (128, 158), (107, 110), (128, 65)
    for name, inside in (("mouth", mouth), ("eyes", eye), ("brows", forehead)):
        picture = transplant(host, donor, face(), face(8), PARTS[name].region, PARTS[name].spared)
        for x, y in (mouth, eye, forehead):
            level = 200 if (x, y) == inside else 50
            assert np.abs(picture[y, x].astype(int) - level).max() <= 2, (name, x, y)
        assert (picture[:, :20] == 50).all()


def test_the_part_lands_on_the_hosts_place():
    donor = np.zeros((256, 256, 3), np.uint8)
    points = face(8)
    x, y = points[LIPS_OUTER, :2].mean(0).round().astype(int)
    donor[y - 3 : y + 4, x - 3 : x + 4] = 255
    picture = transplant(np.zeros_like(donor), donor, face(), points, PARTS["mouth"].region)
    rows, columns = np.nonzero(picture[..., 0] > 128)
    assert abs(rows.mean() - y) < 1 and abs(columns.mean() - (x - 8)) < 1


def test_pairs_are_far_apart_in_the_part_and_near_in_pose():
    measures = np.array([[0.0], [3.0], [1.0]])
    heads = np.stack([turned(), turned(yaw=30), turned(yaw=2)])
    assert set(choose_pair(measures, heads, np.ones(1))) == {0, 2}
    assert set(choose_pair(measures, np.stack([np.eye(3)] * 3), np.ones(1))) == {0, 1}
