import numpy as np
import pytest

from dpe_cli.crop import Carried, cut, gaussian_mask, paste_back
from dpe_cli.face import Box


def smooth_picture(height: int, width: int, waves: float = 6.0) -> np.ndarray:
    """(H, W, 3) uint8 without fine detail, so that resampling loses next to nothing."""
    y, x = np.mgrid[:height, :width].astype(float)
    y, x = y / height * waves, x / width * waves
    return np.stack([128 + 100 * np.sin(x + y), 128 + 100 * np.cos(x - 2 * y), 128 + 100 * np.sin(2 * x)], -1).astype(
        "u1"
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inside_only(size: int) -> np.ndarray:
    """A mask that is 1 but for the outermost pixels."""
    mask = np.zeros((size, size), np.float32)
    mask[1:-1, 1:-1] = 1
    return mask


def test_a_box_of_whole_pixels_and_the_same_size_is_cut_bit_for_bit():
    frame = noise(300, 400)
    crop, to_crop = cut(frame, Box(30, 20, 94, 84), 64)
    assert np.array_equal(crop, frame[20:84, 30:94])
    assert np.allclose(to_crop, [[1, 0, -30], [0, 1, -20]])


def test_the_matrix_takes_the_corners_of_the_box_to_the_corners_of_the_crop():
    box = Box(10.25, -7.5, 310.75, 293.0)
    _, to_crop = cut(noise(240, 320), box, 256)
    # box edges lie half a pixel before the pixel centres the matrix speaks of
    corners = to_crop @ np.array([[box.x0 - 0.5, box.y0 - 0.5, 1], [box.x1 - 0.5, box.y1 - 0.5, 1]]).T
    assert np.allclose(corners.T, [[-0.5, -0.5], [255.5, 255.5]])


@pytest.mark.parametrize("side", [40.0, 100.3, 256.0, 300.7, 512.0, 777.7, 1300.2])
def test_a_cut_is_exact_below_the_pixel_at_any_scale(side: float):
    """A wave tells at each crop pixel which place of the frame is seen there: 3 grey levels for each pixel."""
    places = np.arange(1400)
    wave = lambda place: 128 + 100 * np.sin(np.asarray(place) * 2 * np.pi / 200)  # noqa: E731
    frame = np.rint(np.tile(wave(places)[None, :, None], (1400, 1, 3))).astype(np.uint8)
    expected = wave(20.37 - 0.5 + (np.arange(256) + 0.5) * side / 256)
    crop, _ = cut(frame, Box(20.37, 33.81, 20.37 + side, 33.81 + side), 256)
    assert np.abs(crop[..., 0] - expected[None, :]).max() < (1.2 if side <= 512 else 2.0)
    crop, _ = cut(frame.transpose(1, 0, 2), Box(33.81, 20.37, 33.81 + side, 20.37 + side), 256)
    assert np.abs(crop[..., 0] - expected[:, None]).max() < (1.2 if side <= 512 else 2.0)


def test_a_shift_below_the_pixel_shifts_the_crop():
    frame = smooth_picture(300, 300)
    crop, _ = cut(frame, Box(50.5, 50.25, 114.5, 114.25), 64)
    y, x = np.mgrid[50:114, 50:114]
    f = frame.astype(float)
    exact = 0.75 * (f[y, x] + f[y, x + 1]) / 2 + 0.25 * (f[y + 1, x] + f[y + 1, x + 1]) / 2
    assert np.abs(crop - exact).max() < 2


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.3, 7.0])
def test_shrinking_does_not_alias(factor: float):
    """Stripes finer than the crop can show become grey, not coarser stripes."""
    side = round(256 * factor)
    stripes = np.zeros((side + 40, side + 40, 3), np.uint8)
    stripes[:, ::2] = 255
    crop, _ = cut(stripes, Box(20, 20, 20 + side, 20 + side), 256)
    assert crop[8:-8, 8:-8].astype(float).std() < 40  # 127 before
    assert abs(crop.mean() - 127.5) < 2


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("side", [30.4, 64.0, 99.9, 128.0])
def test_cut_and_paste_back_give_the_frame_again(size: int, side: float):
    frame = smooth_picture(200, 220)
    box = Box(40.3, 31.7, 40.3 + side, 31.7 + side)
    crop, to_crop = cut(frame, box, size)
    again = paste_back(frame, crop, inside_only(size), to_crop)
    assert np.abs(again.astype(int) - frame).max() <= (2 if side <= size else 8)


@pytest.mark.parametrize(("side", "least"), [(120.3, 38), (250.6, 36)])
def test_a_photograph_survives_an_enlarged_round_trip(side: float, least: float):
    """Peak signal-to-noise ratio in dB within the mask."""
    frame = pytest.importorskip("skimage.data").astronaut()
    box = Box(130.3, 40.6, 130.3 + side, 40.6 + side)
    crop, to_crop = cut(frame, box, 256)
    again = paste_back(frame, crop, inside_only(256), to_crop)
    inner = np.s_[round(box.y0) + 4 : round(box.y1) - 4, round(box.x0) + 4 : round(box.x1) - 4]
    error = np.mean((again[inner].astype(float) - frame[inner]) ** 2)
    assert 10 * np.log10(255**2 / error) > least


@pytest.mark.parametrize(
    "box",
    [Box(60.3, 50.2, 160.8, 150.7), Box(-40.5, -30.2, 120.1, 130.4), Box(150, 100, 330, 280), Box(-50, -80, 300, 270)],
)
def test_where_the_mask_is_nothing_every_bit_is_kept(box: Box):
    frame = noise(180, 240)
    mask = gaussian_mask(256)
    _, to_crop = cut(frame, box, 256)
    result = paste_back(frame, np.full((256, 256, 3), 90, np.uint8), mask, to_crop)
    changed = np.argwhere((result != frame).any(-1))
    assert len(changed)
    assert (changed[:, 1] + 1 > box.x0).all() and (changed[:, 1] < box.x1).all()
    assert (changed[:, 0] + 1 > box.y0).all() and (changed[:, 0] < box.y1).all()
    assert result.shape == frame.shape and result.dtype == np.uint8 and result is not frame


def test_an_empty_mask_changes_no_value_there_is():
    frame = np.arange(100 * 100 * 3).reshape(100, 100, 3).astype(np.uint8)  # 0 to 255 again and again
    _, to_crop = cut(frame, Box(10, 10, 70, 70), 64)
    assert np.array_equal(paste_back(frame, noise(64, 64), np.zeros((64, 64), np.float32), to_crop), frame)


def test_the_middle_of_a_mask_shows_the_face_alone():
    frame = np.zeros((400, 400, 3), np.uint8)
    _, to_crop = cut(frame, Box(100, 100, 300, 300), 256)
    result = paste_back(frame, np.full((256, 256, 3), 200, np.uint8), gaussian_mask(256), to_crop)
    assert (result[160:240, 160:240] == 200).all()
    assert (result[:100] == 0).all()


def test_the_seam_has_no_step():
    """Blending white into black climbs from nothing by small steps, also where the face is much enlarged."""
    frame = np.zeros((900, 900, 3), np.uint8)
    _, to_crop = cut(frame, Box(50, 50, 850, 850), 256)
    row = paste_back(frame, np.full((256, 256, 3), 255, np.uint8), gaussian_mask(256), to_crop)[450, :, 0].astype(int)
    assert row[51] <= 1 and row.max() == 255
    assert np.abs(np.diff(row)).max() <= 6


def test_a_box_outside_the_frame_is_cut_from_its_edge_and_pasted_nowhere():
    frame = noise(50, 60)
    crop, to_crop = cut(frame, Box(100, 10, 140, 50), 32)
    assert crop.shape == (32, 32, 3)
    assert np.array_equal(paste_back(frame, crop, gaussian_mask(32), to_crop), frame)


def test_outside_the_frame_a_crop_repeats_its_edge():
    crop, _ = cut(noise(64, 64), Box(-64, 0, 0, 64), 64)
    assert (crop == crop[:, -1:]).all()


# 16 bits, and detail finer than the crop


def as_16_bits(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.uint16) * 257


@pytest.mark.parametrize("side", [90.0, 100.3, 400.7])
def test_16_bits_are_cut_and_pasted_as_8_bits_are(side: float):
    frame = smooth_picture(430, 450)
    box = Box(10.2, 12.9, 10.2 + side, 12.9 + side)
    crop, to_crop = cut(frame, box, 128)
    deep, _ = cut(as_16_bits(frame), box, 128)
    assert deep.dtype == np.uint8 and np.abs(crop.astype(int) - deep).max() <= 1
    face = 255 - crop
    shallow = paste_back(frame, face, gaussian_mask(128), to_crop)
    deep = paste_back(as_16_bits(frame), face, gaussian_mask(128), to_crop)
    assert deep.dtype == np.uint16 and np.abs(deep / 257 - shallow).max() <= 0.51


def test_16_bits_keep_every_bit_outside_the_mask():
    frame = np.random.default_rng(1).integers(0, 65536, (300, 320, 3), dtype=np.uint16)
    mask = np.zeros((64, 64), np.float32)
    mask[20:40, 20:40] = 1
    box = Box(50, 40, 250, 240)
    result = paste_back(frame, np.zeros((64, 64, 3), np.uint8), mask, cut(frame, box, 64)[1])
    rows, columns = np.nonzero((result != frame).any(-1))
    low, high = 19 * 200 / 64, 41 * 200 / 64  # the mask, and a pixel of the crop around it
    assert 40 + low <= rows.min() < 40 + high + 1 and rows.max() <= 40 + high
    assert 50 + low <= columns.min() and columns.max() <= 50 + high
    assert (result[120:150, 130:160] == 0).all()


@pytest.mark.parametrize("make", [noise, lambda h, w: as_16_bits(noise(h, w))], ids=["uint8", "uint16"])
@pytest.mark.parametrize("side", [50.3, 64.0, 260.7])
def test_an_unchanged_crop_with_all_detail_kept_gives_every_bit_of_the_frame(make, side: float):
    """Of noise, which a crop of 64 pixels cannot hold."""
    frame = make(300, 300)
    box = Box(20.4, 10.1, 20.4 + side, 10.1 + side)
    crop, to_crop = cut(frame, box, 64)
    kept = np.ones((64, 64), np.float32)
    assert np.array_equal(paste_back(frame, crop, gaussian_mask(64), to_crop, crop, kept), frame)
    assert not np.array_equal(paste_back(frame, crop, gaussian_mask(64), to_crop), frame)


def test_bands_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch):
    frame, box = noise(300, 320), Box(20.4, 10.1, 280.3, 270.0)
    crop, to_crop = cut(frame, box, 64)
    kept = np.linspace(0, 1, 64, dtype=np.float32) * np.ones((64, 1), np.float32)
    in_bands = paste_back(frame, 255 - crop, gaussian_mask(64), to_crop, crop, kept)
    monkeypatch.setattr("dpe_cli.crop.BAND", 1000)
    at_once = paste_back(frame, 255 - crop, gaussian_mask(64), to_crop, crop, kept)
    assert np.abs(in_bands.astype(int) - at_once).max() <= 1


@pytest.mark.parametrize("make", [noise, lambda h, w: as_16_bits(noise(h, w))], ids=["uint8", "uint16"])
def test_carried_detail_goes_where_the_face_goes(make):
    """Noise, which a crop of 64 pixels cannot hold, moved by three of its pixels to the right and one up."""
    frame, box = make(300, 320), Box(30, 20, 286, 276)
    moved = np.roll(frame, (-4, 12), (0, 1))
    (crop, to_crop), (face, _) = cut(frame, box, 64), cut(moved, box, 64)
    where = np.stack(np.meshgrid(*[np.arange(64, dtype=np.float32)] * 2), -1) + np.float32([-3, 1])
    share = np.zeros((64, 64), np.float32)
    share[:, 20:50] = 1
    done = paste_back(frame, face, inside_only(64), to_crop, crop, np.zeros_like(share), Carried(share, where))
    unit = np.iinfo(frame.dtype).max / 255
    off = np.abs(done.astype(float) - moved)[:, :, 0] / unit
    assert off[60:240, 30 + 4 * 21 : 30 + 4 * 49].max() <= 2  # rounding of the two crops
    assert off[60:240, 60:100].mean() > 20  # a share of nothing: as soft as the crop


def test_an_enlarged_edge_rings_little():
    """A step of 200 levels in the crop, four times as large in the frame."""
    frame = np.full((300, 300, 3), 20, np.uint8)
    face = np.full((64, 64, 3), 20, np.uint8)
    face[:, 32:] = 220
    row = paste_back(frame, face, inside_only(64), cut(frame, Box(10, 10, 266, 266), 64)[1])[150, 30:240, 0].astype(int)
    assert row.max() - 220 <= 22 and row.min() == 0  # 11 % of the step, the cubic's own
    assert np.abs(row[:90] - 20).max() == 0 and np.abs(row[-60:] - 220).max() == 0  # and only once


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_mask_is_one_in_the_middle_and_nothing_at_the_border(size: int):
    mask = gaussian_mask(size)
    assert mask.shape == (size, size) and mask.dtype == np.float32
    assert mask[size // 2, size // 2] == 1 and mask.max() == 1
    assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0
    assert np.allclose(mask, mask.T) and np.allclose(mask, mask[::-1])
    assert (np.diff(mask[size // 2, : size // 2]) >= 0).all()


def test_the_mask_of_the_paper_is_half_at_50_of_256():
    mask = gaussian_mask(256, 15.5 / 256, 50 / 256)
    assert abs((mask[128, 49] + mask[128, 50]) / 2 - 0.5) < 0.01
    assert mask[0].max() == 0 and mask[128, 128] == 1
