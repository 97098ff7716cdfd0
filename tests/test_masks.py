import numpy as np
import pytest

from dpe_cli.crop import gaussian_mask
from dpe_cli.errors import InputError
from dpe_cli.face import CROP_SCALE, CROP_SHIFT, face_size
from dpe_cli.masks import FACE_HEIGHT, MASKS, MaskMaker, Steady

CROP = np.full((128, 128, 3), 90, np.uint8)


def five_points(size: int = 128, roll: float = 0.0, shift: tuple[float, float] = (0, 0)) -> np.ndarray:
    """Points that a crop of their own would frame as they are: eyes, nose, mouth of an upright face, then rolled."""
    points = np.array([(-0.5, 0), (0.5, 0), (0, 0.5), (-0.4, 1), (0.4, 1)])
    points *= size / CROP_SCALE / face_size(points)
    points[:, 1] -= CROP_SHIFT * size
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    return points @ np.array([[c, s], [-s, c]]) + (size - 1) / 2 + shift


def ring_of_points(size: int = 128, radius: float = 40.0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 100)
    return np.column_stack([np.cos(angles), np.sin(angles), np.zeros(100)]) * radius + (size - 1) / 2


def maker(way: str, size: int = 128, **options) -> MaskMaker:
    return MaskMaker(
        way, size, **{"landmarks": lambda crop: five_points(size), "parser": lambda crop: crop[..., 0], **options}
    )


@pytest.mark.parametrize("feather", [None, 1, 20, 50])
@pytest.mark.parametrize("way", MASKS)
def test_every_mask_is_soft_and_nothing_at_the_border(way: str, feather: float | None):
    crop = np.zeros((128, 128, 3), np.uint8)
    crop[20:110, 20:110] = 1  # skin, for the parser
    mask = maker(way, feather=feather)(crop, crop, 0.0)
    assert mask.shape == (128, 128) and mask.dtype == np.float32
    assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0
    assert mask.min() == 0 and mask.max() <= 1
    if feather != 50:
        assert mask[64, 64] > 0.99
    assert ((mask > 0) & (mask < 1)).any()


def test_the_default_is_the_gaussian_square_as_it_always_was():
    assert np.array_equal(MaskMaker()(np.zeros((256, 256, 3), np.uint8), CROP, 0.0), gaussian_mask(256))


@pytest.mark.parametrize("percent", [5, 10, 15])
@pytest.mark.parametrize("way", ["gaussian", "ellipse", "landmarks"])
def test_feather_is_the_width_of_the_edge_in_percent_of_the_face(way: str, percent: float):
    """From 2.3 % to 97.7 %, four sigmas, a blurred step takes that much."""
    column = maker(way, 256, feather=percent)(np.zeros((256, 256, 3), np.uint8), CROP, 0.0)[:128, 128]
    width = np.searchsorted(column, 0.977) - np.searchsorted(column, 0.023)
    assert width == pytest.approx(percent / 100 * FACE_HEIGHT * 256, rel=0.15, abs=2.5)


def test_five_points_make_the_ellipse_that_rolls_and_goes_with_the_face():
    upright, ellipse = maker("landmarks")(CROP, CROP, 0.0), maker("ellipse")(CROP, CROP, 0.0)
    assert np.abs(upright - ellipse).max() < 0.15  # it is drawn on whole pixels
    rolled = maker("landmarks", landmarks=lambda crop: five_points(roll=90))(CROP, CROP, 0.0)
    assert np.abs(rolled - ellipse.T).max() < 0.15 and np.abs(rolled - ellipse).max() > 0.5
    moved = maker("landmarks", landmarks=lambda crop: five_points(shift=(8, 0)))(CROP, CROP, 0.0)
    assert np.abs(moved[:, 48:80] - np.roll(ellipse, 8, 1)[:, 48:80]).max() < 0.15


def test_many_points_make_their_hull():
    mask = maker("landmarks", landmarks=lambda crop: ring_of_points(), feather=2)(CROP, CROP, 0.0)
    y, x = np.mgrid[:128, :128] - 63.5
    distance = np.hypot(x, y)
    assert mask[distance < 37].min() > 0.98 and mask[distance > 43].max() < 0.02


def test_a_chin_that_drops_stays_whole():
    """The mask covers the face of the source and that of the edit."""
    edit = CROP + np.uint8(1)
    points = lambda picture: ring_of_points(radius=45 if picture[0, 0, 0] == 91 else 30)  # noqa: E731
    mask = maker("landmarks", landmarks=points, feather=2)(CROP, edit, 0.0)
    assert mask[64, 64 - 40] > 0.9 and mask[64, 64 - 49] == 0
    other = maker("landmarks", landmarks=points, feather=2)(edit, CROP, 0.0)
    assert np.array_equal(mask, other)


def test_without_landmarks_in_a_frame_there_is_an_oval():
    blind = maker("landmarks", landmarks=lambda crop: None)
    assert np.array_equal(blind(CROP, CROP, 0.0), maker("ellipse")(CROP, CROP, 0.0))


def test_what_the_parser_calls_no_face_keeps_its_pixels():
    """Not a trace of the edit on a bar of background before the face, nor on a hat."""
    crop = np.full((128, 128, 3), 1, np.uint8)
    crop[60:70] = 0
    crop[:30] = 18
    mask = maker("parsing")(crop, crop, 0.0)
    assert mask[60:70].max() == 0 and mask[:30].max() == 0
    assert mask[85, 64] > 0.99 and mask[45, 64] > 0.99


def test_masks_without_their_means_are_refused():
    with pytest.raises(InputError, match="--mask ellipse"):
        MaskMaker("landmarks")
    with pytest.raises(InputError, match="--parsing"):
        MaskMaker("parsing")


def test_points_that_tremble_are_steadied_and_followed():
    noise = np.random.default_rng(0)
    steady, shown = Steady(0.1), []
    for n in range(100):
        shown.append(steady(0, n / 25, np.float32(noise.normal(0, 1, 500))))
    assert np.std(shown[50:]) < 0.5
    for n in range(100, 125):
        last = steady(0, n / 25, np.full(500, 10, np.float32))
    assert np.allclose(last, 10, atol=0.01)


def test_steady_values_begin_anew_after_a_gap_and_keep_tracks_apart():
    steady = Steady(1.0)
    one = np.ones(2, np.float32)
    assert np.array_equal(steady("a", 0.0, one), one)
    assert 1 < steady("a", 0.1, 2 * one)[0] < 1.2
    assert np.array_equal(steady("b", 0.1, 5 * one), 5 * one)
    assert np.array_equal(steady("a", 2.0, 3 * one), 3 * one)
    assert np.array_equal(steady("a", 2.1, np.ones(3, np.float32)), np.ones(3))
    steady.forget("a")
    assert np.array_equal(steady("a", 2.2, 9 * one), 9 * one)


def test_a_steady_value_knows_nothing_older_than_its_reach():
    noise = np.random.default_rng(0).normal(0, 1, (60, 5)).astype(np.float32)
    whole, part = Steady(0.1), Steady(0.1)
    wanted = [whole(0, n / 25, noise[n]) for n in range(60)]
    found = [part(0, n / 25, noise[n]) for n in range(20, 60)]  # 0.5 s are 13 frames
    assert not np.array_equal(found[1], wanted[21])
    assert all(np.array_equal(one, two) for one, two in zip(found[13:], wanted[33:], strict=True))
    assert len(whole.seen[0]) == 13
