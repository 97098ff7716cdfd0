"""Pasting back: that it does not show, in numbers."""

import contextlib
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_plugs import blue_is_in_front, brighten

from dpe_cli.colours import colour_difference
from dpe_cli.crop import cut, gaussian_mask, paste_back
from dpe_cli.detail import EASED, evened, keep_detail, stretched, with_what_flows, with_what_stays
from dpe_cli.edit import edit_video
from dpe_cli.errors import InputError, QualityError, WeightsError
from dpe_cli.face import Box, Detection
from dpe_cli.masks import MaskMaker
from dpe_cli.mesh import centres, warp
from dpe_cli.paste import Edge, Paster, alone, enlarged, make_paster
from dpe_cli.report import Report
from dpe_cli.request import Driving, EditSettings
from dpe_cli.video import Frame, VideoInfo, read_frames
from dpe_cli.writer import write_video

SIZE = 128
CAST = np.array([[0.85, 1.0, 0.8], [36, -10, 45]])  # gain and shift of three channels; clips next to nothing


def portrait(side: int = 512) -> np.ndarray:
    """The astronaut of scikit-image, (side, side, 3) uint8."""
    picture = pytest.importorskip("skimage.data").astronaut()
    way = cv2.INTER_AREA if side < len(picture) else cv2.INTER_CUBIC
    return picture if side == len(picture) else cv2.resize(picture, (side, side), interpolation=way)


def head(side: int = 512) -> Box:
    """Its face, framed as crops are."""
    return Box.square(224 * side / 512, 117 * side / 512, 160 * side / 512)


def with_cast(crop: np.ndarray, cast: np.ndarray = CAST) -> np.ndarray:
    return np.rint(crop * cast[0] + cast[1]).clip(0, 255).astype(np.uint8)


def paster(**options) -> Paster:
    return Paster(MaskMaker("gaussian", SIZE), **options)


def pasted(make_face, rgb: np.ndarray | None = None, box: Box | None = None, **options):
    """The source frame and what comes of pasting `make_face(crop)` into it."""
    rgb, box = portrait() if rgb is None else rgb, box or head()
    crop, _ = cut(rgb, box, SIZE)
    return rgb, paster(**options).paste(rgb, box, crop, make_face(crop), 0.0)


def levels_off(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(H, W, 3) absolute difference in 8-bit levels."""
    unit = np.iinfo(a.dtype).max / 255
    return np.abs(a.astype(float) - b) / unit


def deep(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.uint16) * 257


# What does not differ


@pytest.mark.parametrize("side", [300, 512, 1200])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_an_edit_that_changes_nothing_leaves_every_bit(side: int, depth: type):
    """Also where the frame holds what a crop cannot, and values between those of 8 bits."""
    rgb = portrait(side)
    if depth is np.uint16:
        rgb = deep(rgb) ^ np.random.default_rng(0).integers(0, 257, rgb.shape).astype(np.uint16)
    _, done = pasted(lambda crop: crop, rgb, head(side))
    assert done.rgb.dtype == depth and np.array_equal(done.rgb, rgb) and done.rgb is not rgb
    assert (done.seam.score, done.seam.sharpness) == (0, 1)


def test_an_edit_of_the_mouth_alone_is_not_touched_by_the_colour_match():
    def smile(crop: np.ndarray) -> np.ndarray:
        edited = crop.copy()
        edited[80:100, 40:90] = (180, 40, 60)
        return edited

    _, matched = pasted(smile)
    _, plain = pasted(smile, colour_match=False)
    assert np.array_equal(matched.rgb, plain.rgb)
    assert matched.seam.score == 0  # the edge is nowhere near


# Colour


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("side", [300, 900])
def test_a_colour_cast_is_taken_out(side: int, depth: type):
    rgb = portrait(side) if depth is np.uint8 else deep(portrait(side))
    _, before = pasted(with_cast, rgb, head(side), colour_match=False)
    _, after = pasted(with_cast, rgb, head(side))
    assert levels_off(rgb, before.rgb).max() > 20 and before.seam.colour > 4
    assert np.percentile(levels_off(rgb, after.rgb), 99.9) < 3 and after.seam.colour < 0.4
    assert after.seam.score < before.seam.score / 8


def test_the_difference_of_colours_is_found_on_the_edge():
    crop, _ = cut(portrait(), head(), SIZE)
    gentle = np.array([[0.9, 1.0, 0.92], [5, -4, 3]])
    gain, shift = colour_difference(with_cast(crop, gentle), crop, gaussian_mask(SIZE))
    assert np.abs(gain * gentle[0] - 1).max() < 0.02 and np.abs(gain * gentle[1] + shift).max() < 1.5


def test_what_moved_on_the_edge_does_not_count_as_colour():
    """A dark lock of hair that swings over a seventh of the edge."""
    crop, _ = cut(portrait(), head(), SIZE)
    edited = crop.copy()
    edited[:40, 84:] = 20
    gain, shift = colour_difference(edited, crop, gaussian_mask(SIZE))
    middle = np.full(3, 128)
    plain = crop[gaussian_mask(SIZE) % 1 > 0.02].mean(0) - edited[gaussian_mask(SIZE) % 1 > 0.02].mean(0)
    assert np.abs(gain * middle + shift - middle).max() < np.abs(plain).max() / 3


def test_a_wild_difference_is_not_followed():
    crop, _ = cut(portrait(), head(), SIZE)
    gain, shift = colour_difference(np.full_like(crop, 255), crop, gaussian_mask(SIZE))
    assert np.abs(gain * 255 + shift - 255).max() <= 40.1
    gain, _ = colour_difference((crop // 4 + 96).astype(np.uint8), crop, gaussian_mask(SIZE))
    assert gain.max() < 1.41


def paste_cast(one: Paster, n: int, shift: float, box: Box | None = None, track: int = 0) -> float:
    """The seam's colour step of frame n, whose edit is `shift` levels too bright."""
    rgb, box = portrait(), box or head()
    crop, _ = cut(rgb, box, SIZE)
    return one.paste(rgb, box, crop, with_cast(crop, np.array([[1], [shift]])), n / 25, track).seam.colour


def test_the_match_is_steady_through_time_and_keeps_up():
    noise, one = np.random.default_rng(0).normal(0, 4, 30), paster()
    corrections = []
    for n in range(30):
        paste_cast(one, n, 10 + noise[n])
        gain, shift = one.colours.value(0)
        corrections.append((128 * gain + shift - 128).mean())
    assert np.std(np.diff(corrections)[10:]) < 0.35 * np.std(np.diff(noise)[10:])
    assert np.mean(corrections[10:]) == pytest.approx(-10, abs=1.5)
    later = [paste_cast(one, 30 + n, 25) for n in range(25)]
    assert later[-1] < 0.5 < later[0]


def test_a_jump_of_the_box_and_another_track_begin_anew():
    one, elsewhere = paster(), Box.square(310, 117, 160)
    assert [paste_cast(one, n, 20) < 0.5 for n in range(3)] == [True] * 3
    assert paste_cast(one, 3, -20) > 3
    assert paste_cast(one, 4, -20, elsewhere) < 0.5
    assert paste_cast(one, 4, 20, head(), track=1) < 0.5


def test_a_long_run_leaves_a_few_numbers_a_track_behind():
    one = paster()
    for n in range(8):
        paste_cast(one, n, 5, track=n % 2)
    assert len(one.colours.seen) == len(one.boxes) == 2


# Detail


def soft(crop: np.ndarray) -> np.ndarray:
    """As a network leaves what it does not change: blurred."""
    return cv2.GaussianBlur(crop, (0, 0), 0.6)


@pytest.mark.parametrize("side", [512, 1600])
def test_what_the_edit_did_not_move_is_as_sharp_as_the_source(side: int):
    rgb = portrait(side)
    fine = np.random.default_rng(0).normal(0, 6, rgb.shape)  # grain, which no crop holds
    rgb = (rgb + fine).clip(0, 255).astype(np.uint8)
    _, before = pasted(soft, rgb, head(side), detail=False)
    _, after = pasted(soft, rgb, head(side))
    assert before.seam.sharpness < 0.6
    assert 0.9 < after.seam.sharpness < 1.05 and after.seam.gradient < before.seam.gradient / 3


def test_no_ghost_of_the_source_stays_where_the_edit_moved_something():
    """The mouth is painted over: nothing of its detail shines through, and the edit's own edges stay."""

    def painted(crop: np.ndarray) -> np.ndarray:
        edited = crop.copy()
        edited[76:110, 36:92] = 230
        return edited

    rgb = portrait(1024)
    _, done = pasted(painted, rgb, head(1024))
    x0, y0, scale = head(1024).x0, head(1024).y0, head(1024).width / SIZE
    patch = done.rgb[round(y0 + 82 * scale) : round(y0 + 104 * scale), round(x0 + 42 * scale) : round(x0 + 86 * scale)]
    assert np.abs(patch.astype(int) - 230).max() <= 2


def test_all_or_nothing_is_kept_of_detail_by_how_much_moved():
    crop = np.full((SIZE, SIZE, 3), 100, np.uint8)
    face = crop.astype(np.float32)
    face[:, :40] += 2.5
    face[:, 80:] += 40
    _, kept, _ = keep_detail(face, crop)
    assert kept[:, :30].min() == 1 and kept[:, 90:].max() == 0


def bent(shown: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """What `Engine.carried` tells of a face that comes 3 pixels of the crop from the left in its middle.

    And how that falls off. shown: share of the pixels that are carried.
    """
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    share = np.exp(-(((centres - SIZE / 2) / 20) ** 2))
    share = share[:, None] * share
    x, y = np.meshgrid(centres, centres)
    return np.dstack([x - 3 * share, y, np.full_like(x, shown)]), share


def test_detail_goes_along_with_a_bent_face():
    rgb, box, (where, share) = portrait(1024), head(1024), bent()
    crop, _ = cut(rgb, box, SIZE)
    face = warp(crop, where[..., :2], float(SIZE))
    plain, fine = (paster().paste(rgb, box, crop, face, 0.0, 0, given) for given in (None, where))
    wanted = warp(cut(rgb, box, 8 * SIZE)[0], cv2.resize(where[..., :2], (8 * SIZE, 8 * SIZE)), float(SIZE))
    moved = cv2.resize(share, (8 * SIZE, 8 * SIZE)) > 0.3
    missed = [np.abs(cut(one.rgb, box, 8 * SIZE)[0].astype(int) - wanted)[moved].mean() for one in (plain, fine)]
    assert missed[1] < 0.5 * missed[0]
    unseen = paster().paste(rgb, box, crop, face, 0.0, 0, bent(0.0)[0])
    assert np.array_equal(unseen.rgb, plain.rgb)


def test_where_detail_that_stays_ends_nothing_is_drawn():
    rgb, box = np.full((500, 500, 3), 200, np.uint8), Box(30.0, 40.0, 480.0, 490.0)
    crop, to_crop = cut(rgb, box, SIZE)
    kept = np.zeros((SIZE, SIZE), np.float32)
    for radius in (10, 25, 40):  # narrow rings: to zero and back within some pixels
        cv2.circle(kept, (64, 64), radius, 1, 1, cv2.LINE_AA)
    face = crop.astype(np.float32)
    assert np.abs(paste_back(rgb, face, gaussian_mask(SIZE), to_crop, crop, kept).astype(int) - 200).max() <= 1


def test_what_is_painted_over_gets_no_detail_of_what_was_there():
    rgb, box, (where, _) = portrait(1024), head(1024), bent()
    crop, _ = cut(rgb, box, SIZE)
    face = warp(crop, where[..., :2], float(SIZE))
    face[50:80, 50:80] = 255 - face[50:80, 50:80]
    plain, fine = (paster().paste(rgb, box, crop, face, 0.0, 0, given).rgb for given in (None, where))
    x0, y0, scale = box.x0, box.y0, box.width / SIZE
    inside = tuple(slice(round(edge + 56 * scale), round(edge + 74 * scale)) for edge in (y0, x0))
    assert np.array_equal(plain[inside], fine[inside]) and not np.array_equal(plain, fine)


def test_a_crop_may_be_larger_than_it_was_drawn():
    """With all the detail that the frame has of what stays and of what is bent, and as drawn where it is neither."""
    rgb, box, (where, _) = portrait(1024), head(1024), bent()
    crop, _ = cut(rgb, box, SIZE)
    size = 2 * SIZE
    assert np.array_equal(enlarged(rgb, box, crop, crop, None, size), cut(rgb, box, size)[0])
    face = warp(crop, where[..., :2], float(SIZE))
    wanted = warp(cut(rgb, box, size)[0], cv2.resize(where[..., :2], (size, size)), float(SIZE))
    drawn = cv2.resize(face, (size, size), interpolation=cv2.INTER_CUBIC)
    missed = [np.abs(one.astype(int) - wanted).mean() for one in (drawn, enlarged(rgb, box, crop, face, where, size))]
    assert missed[1] < 0.4 * missed[0]
    green = np.full_like(crop, (0, 255, 0))
    assert (enlarged(rgb, box, crop, green, where, size) == (0, 255, 0)).all()


def test_a_crop_that_is_bent_everywhere_comes_to_rest_at_its_border():
    rgb, box = portrait(1024), head(1024)
    crop, _ = cut(rgb, box, SIZE)
    centres = np.stack(np.meshgrid(*[np.arange(SIZE, dtype=np.float32) + 0.5] * 2), -1)
    where = np.dstack([centres - [6, 0], np.ones((SIZE, SIZE))]).astype(np.float32)  # all of it 6 pixels to the right
    face = warp(crop, where[..., :2], float(SIZE))
    hard = paster().paste(rgb, box, crop, face, 0.0)
    done = paster().paste(rgb, box, crop, face, 0.0, 0, where)
    assert done.seam.score < 0.3 * hard.seam.score
    middle, edge, around = np.s_[16:112, 16:112], np.s_[:3], box.width * EASED
    found = cut(done.rgb, box, SIZE)[0].astype(int)
    wide = Box(box.x0 - around, box.y0 - around, box.x1 + around, box.y1 + around)
    then, before = (cut(one, wide, SIZE)[0].astype(int) for one in (done.rgb, rgb))
    assert np.abs(found - face)[middle].mean() < 2 and np.abs(then - before)[edge].mean() < 2
    assert (np.diff(np.flatnonzero((done.rgb != rgb).any((0, 2)))[[0, -1]]) <= wide.width).all()
    inner = np.abs(face.astype(int) - crop)[middle].mean()
    assert inner > 5  # it did move there
    oval = Paster(MaskMaker("ellipse", SIZE))  # ends at the face: nothing to bend between
    assert np.array_equal(oval.masks(crop, face, 0.0), oval.masks.still)
    assert oval.paste(rgb, box, crop, face, 0.0, 0, where).seam.score > done.seam.score
    partly = where.copy()
    partly[0, 0, 2] = 0.5  # an expression, not a head
    assert not np.array_equal(paster().paste(rgb, box, crop, face, 0.0, 0, partly).rgb, done.rgb)


@pytest.mark.parametrize("noise", [0, 10])
def test_what_is_drawn_anew_has_the_grain_of_its_frame(noise: int):
    box, size = Box(100, 100, 356, 356), 256
    rgb = np.clip(140 + noise * np.random.default_rng(0).standard_normal((480, 480, 3)), 0, 255).astype(np.uint8)
    crop, _ = cut(rgb, box, size)
    face = crop.copy()
    face[100:160, 100:160] = (200, 100, 100)  # smooth
    done = Paster(MaskMaker("gaussian", size), colour_match=False).paste(rgb, box, crop, face, 0.0).rgb
    drawn = done[210:250, 210:250].astype(float)
    np.testing.assert_allclose(drawn.mean((0, 1)), (200, 100, 100), atol=1.5)
    assert drawn.std((0, 1)).mean() == pytest.approx(noise, abs=0.3 * noise)
    plain = Paster(MaskMaker("gaussian", size), colour_match=False, detail=False).paste(rgb, box, crop, face, 0.0).rgb
    assert plain[210:250, 210:250].std((0, 1)).mean() < 1


def test_what_a_moved_head_asks_for_outside_of_its_crop_is_the_frames():
    rgb, box = portrait(1024), head(1024)
    crop, _ = cut(rgb, box, SIZE)
    centred = np.stack(np.meshgrid(*[np.arange(SIZE, dtype=np.float32) + 0.5] * 2), -1)
    where = np.dstack([centred - [20, 0], np.ones((SIZE, SIZE))]).astype(np.float32)  # 20 pixels to the right
    aside = 20 * box.width / SIZE
    wanted = cut(rgb, Box(box.x0 - aside, box.y0, box.x1 - aside, box.y1), SIZE)[0].astype(int)
    face = warp(crop, where[..., :2], float(SIZE))  # repeats the crop's border
    assert np.abs(face - wanted)[:, :14].mean() > 8
    for size in (None, 2 * SIZE):
        found = cv2.resize(alone(rgb, box, crop, face, where, size).rgb, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        assert np.abs(found - wanted)[:, :14].mean() < 3
    where[0, 0, 2] = 0  # an expression
    assert alone(rgb, box, crop, face, where, None).rgb is face


def test_high_frequencies_come_from_where_the_picture_comes_from():
    crop, flow = cut(portrait(1024), head(1024), SIZE)[0], bent()[0][..., :2]
    sharp = warp(crop, flow, float(SIZE))
    blurred = cv2.GaussianBlur(sharp, (0, 0), 0.6)
    missed = [np.abs(one.astype(int) - sharp).mean() for one in (blurred, with_what_flows(blurred, crop, flow))]
    assert missed[1] < 0.5 * missed[0]
    green = np.full_like(crop, (0, 255, 0))
    assert np.array_equal(with_what_flows(green, crop, flow), green)  # another picture has none of it


def test_where_a_flow_wavers_its_smooth_part_bends_the_crop():
    crop = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8), (0, 0), 2)
    smooth = centres(128, 256).astype(np.float32) - [6, 3]
    waves = np.zeros((128, 128), np.float32)
    waves[:, :64] = 6 * np.sin(np.arange(128) * 2 * np.pi / 12)[:, None]
    flow = (smooth + np.dstack([waves, 0 * waves])).astype(np.float32)
    drawn = np.zeros_like(crop)
    picture, places = evened(drawn, crop, flow)
    np.testing.assert_allclose(places[10:-10, 10:40], smooth[10:-10, 10:40], atol=0.7)
    np.testing.assert_array_equal(places[:, 96:], flow[:, 96:])
    wanted = warp(crop, smooth.astype(np.float32), 256)
    assert np.abs(picture[40:-40, 40:80].astype(int) - wanted[40:-40, 40:80]).mean() < 4 and not picture[:, 192:].any()
    face = np.zeros((128, 128), np.uint8)
    face[40:80, 20:50] = 255  # in the crop: it is drawn 3 and 2 places further on
    assert not evened(drawn, crop, flow, face)[0][100:140, 64:80].any()
    still, same = evened(drawn, crop, smooth.astype(np.float32))
    assert still is drawn and same.shape == smooth.shape


@pytest.mark.parametrize("turns", range(4))
def test_beside_a_head_that_leaves_the_border_its_surroundings_are_stretched(turns: int):
    """To the right, from where 20 of 128 places pile up at the left edge; and so from each border."""
    crop = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    flow = centres(128, 256).astype(np.float32)
    flow[..., 0] = np.where(np.arange(128) < 40, np.maximum(flow[..., 0] - 40, 3), flow[..., 0] - 40)
    drawn = np.zeros_like(crop)
    for _ in range(turns):
        crop, drawn, flow = np.rot90(crop), np.rot90(drawn), np.rot90(flow)
        flow = np.stack([flow[..., 1], 256 - flow[..., 0]], -1)
    picture, places = stretched(*map(np.ascontiguousarray, (drawn, crop, flow)))
    for _ in range(4 - turns):
        picture, drawn, flow, places = (np.rot90(one) for one in (picture, drawn, flow, places))
        flow, places = (np.stack([one[..., 1], 256 - one[..., 0]], -1) for one in (flow, places))
    across = places[20:108, :, 0]
    np.testing.assert_allclose(across[:, :30], (centres(128, 256)[20:108, :30, 0] - 40), atol=1)  # on past the border
    np.testing.assert_allclose(places[..., 1], flow[..., 1], atol=0.01)
    np.testing.assert_array_equal(places[20:108, 34:], flow[20:108, 34:])
    assert picture[40:216, :40].std() > 20 and not picture[40:216, 68:].any()  # drawn by the crop's own, else as it was


def test_what_hardly_piles_up_at_a_border_is_left_as_it_was_drawn():
    drawn = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    flow = np.maximum(centres(128, 256).astype(np.float32) - [6, 0], 1).astype(np.float32)
    picture, places = stretched(drawn, np.zeros_like(drawn), flow)
    assert picture is drawn and places is flow


def test_high_frequencies_stay_where_nothing_moves():
    crop = cut(portrait(1024), head(1024), SIZE)[0]
    upper, lower = slice(SIZE // 2 - 12), slice(SIZE // 2 + 12, None)
    half = crop.copy()
    half[: SIZE // 2] = cv2.GaussianBlur(crop, (0, 0), 0.6)[: SIZE // 2]
    half[SIZE // 2 :, :, 0] ^= 128
    found = with_what_stays(half, crop)
    missed = [np.abs(one[upper].astype(int) - crop[upper]).mean() for one in (half, found)]
    assert missed[1] < 0.5 * missed[0]
    assert np.array_equal(found[lower], half[lower])


# The seam


def flat(value: int = 100) -> np.ndarray:
    return np.full((300, 300, 3), value, np.uint8)


@pytest.mark.parametrize("value", [1, 20, 80])
def test_the_colour_step_is_in_percent_of_full_scale(value: int):
    rgb, box = flat(), Box(50, 50, 250, 250)
    plain = Paster(MaskMaker("gaussian", SIZE), colour_match=False, detail=False)
    seam = plain.paste(rgb, box, cut(rgb, box, SIZE)[0], flat(100 + value)[:SIZE, :SIZE], 0.0).seam
    # the sides are where the mask has about 0.92 and 0.08: 0.84 of the whole step
    assert seam.colour == pytest.approx(0.86 * value / 2.55, rel=0.07, abs=0.1)


def test_the_sources_own_step_along_the_edge_does_not_count():
    mask = gaussian_mask(SIZE)
    _, to_crop = cut(flat(), Box(0, 0, 300, 300), SIZE)
    framed = cv2.resize((mask * 200).astype(np.uint8), (300, 300))[..., None].repeat(3, 2)
    assert Edge(mask).seam(framed, framed, to_crop).score == 0
    assert Edge(mask).seam(flat(), framed, to_crop).colour > 40


def test_half_of_the_gradient_energy_lost_on_one_side_is_a_step_of_a_logarithm_of_two():
    noise = np.random.default_rng(0).normal(0, 1, (300, 300, 3)) * 20
    mask, (_, to_crop) = gaussian_mask(SIZE), cut(flat(), Box(0, 0, 300, 300), SIZE)
    inside = cv2.resize(mask, (300, 300))[..., None] > 0.5
    source = (128 + noise).clip(0, 255).astype(np.uint8)
    softer = (128 + noise * np.where(inside, np.sqrt(0.5), 1)).clip(0, 255).astype(np.uint8)
    seam = Edge(mask).seam(source, softer, to_crop)
    assert seam.gradient == pytest.approx(np.log(2), abs=0.08)
    assert seam.sharpness == pytest.approx(0.5, abs=0.03)


def test_a_face_at_the_frames_edge_has_the_seam_of_what_is_seen_and_none_outside():
    rgb = portrait()
    _, half = pasted(with_cast, rgb, Box(-80, 20, 80, 180), colour_match=False)
    assert half.seam.colour > 2
    _, out = pasted(with_cast, rgb, Box(-400, 20, -240, 180))
    assert out.seam is None and np.array_equal(out.rgb, rgb)


# Occluders, enhancement, options


class FivePoints:
    """A detector that finds one face in the middle of anything."""

    name = "five points"

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        height, width = rgb.shape[:2]
        shares = np.array([(-0.14, -0.13), (0.14, -0.13), (0, 0.02), (-0.11, 0.14), (0.11, 0.14)])
        return [Detection(head(width), shares * width + (width / 2, height / 2), 0.9)]


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_bar_before_the_face_stays_in_front(tmp_path: Path, depth: type):
    """A blue bar, which the parser calls background, across the mouth: not one bit of it changes."""
    rgb = portrait()
    rgb[140:156] = (10, 20, 250)
    rgb = rgb if depth is np.uint8 else deep(rgb)
    crop, _ = cut(rgb, head(), SIZE)
    edited = 255 - crop
    parsed = make_paster(SIZE, FivePoints(), "parsing", parsing=blue_is_in_front(tmp_path / "p.onnx"))
    done = parsed.paste(rgb, head(), crop, edited, 0.0).rgb
    assert np.array_equal(done[141:155], rgb[141:155])
    assert (levels_off(rgb, done)[100:130, 200:250].mean() > 20) and (levels_off(rgb, done)[164:170].max() > 20)
    plain = paster().paste(rgb, head(), crop, edited, 0.0).rgb
    assert not np.array_equal(plain[141:155], rgb[141:155])


def test_an_enhancer_sees_the_whole_head_and_its_work_is_pasted_back(tmp_path: Path):
    rgb = portrait()
    crop, _ = cut(rgb, head(), SIZE)
    options = {"colour_match": False, "detail": False}
    better = make_paster(SIZE, FivePoints(), enhancer=brighten(tmp_path / "e.onnx", 256), **options)
    seen = []
    network = better.enhancer
    better.enhancer = lambda picture: seen.append(picture) or network(picture)
    better.enhancer.size = 256
    done = better.paste(rgb, head(), crop, crop, 0.0).rgb
    added = done.astype(float) - rgb
    inner = np.s_[80:150, 190:260]
    assert np.median(added[inner]) == pytest.approx(13, abs=1)  # 0.1 of [-1, 1]
    assert np.array_equal(done[:, :140], rgb[:, :140]) and np.array_equal(done[:, 310:], rgb[:, 310:])
    wide, _ = cut(rgb, Box.square(224, 117 - 160 * (0.5 + 0.17) + 160 * 1.15 / 2, 160 * 1.15), 256)
    assert np.abs(seen[0].astype(int) - wide).mean() < 3


@pytest.mark.parametrize("enhanced", [False, True])
def test_what_is_older_than_the_memory_counts_for_nothing(enhanced: bool):
    """Masks that follow points, colours that follow them, and once more after an enhancer."""
    noise, rgb = np.random.default_rng(0), portrait(128)
    crop, _ = cut(rgb, head(128), SIZE)
    faces = [with_cast(crop, CAST + noise.normal(0, [[0.1], [9]], (2, 3))) for _ in range(60)]

    def trembling(picture: np.ndarray) -> np.ndarray:
        return SIZE / 2 + np.array([[-20, -20], [20, -20], [0, 0], [-15, 20], [15, 20]]) + picture.mean() % 9

    def made(first: int) -> list[bytes]:
        one = Paster(MaskMaker("landmarks", SIZE, landmarks=trembling))
        if enhanced:
            one.enhancer = lambda picture: picture // 2 + np.uint8(picture.mean() / 4)
            one.enhancer.size = 64
        whole = (one.paste(rgb, head(128), crop, faces[n], n / 10).rgb.tobytes() for n in range(first, 60))
        assert one.memory == (3.5 if enhanced else 2.0)
        return list(whole)

    late = 10 + round(10 * (3.5 if enhanced else 2.0))
    assert made(0)[late:] == made(10)[late - 10 :]
    assert made(0)[15] != made(10)[5]


def test_an_enhancer_that_does_nothing_changes_nothing(tmp_path: Path):
    """Through the enhancer's frame and back, an unchanged crop still leaves every bit of the frame."""
    import onnx

    path = brighten(tmp_path / "e.onnx", 256)
    model = onnx.load(str(path))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "c"))
    onnx.save(model, str(path))
    rgb = portrait()
    crop, _ = cut(rgb, head(), SIZE)
    done = make_paster(SIZE, FivePoints(), enhancer=path).paste(rgb, head(), crop, crop, 0.0)
    assert np.array_equal(done.rgb, rgb)


def test_landmarks_come_from_the_detector():
    rgb = portrait()
    crop, _ = cut(rgb, head(), SIZE)
    done = make_paster(SIZE, FivePoints(), "landmarks").paste(rgb, head(), crop, 255 - crop, 0.0)
    changed = (done.rgb != rgb).any(-1)
    assert changed[117, 224] and not changed[40:46, 150:156].any() and not changed[:, 150].any()


def test_landmarks_come_from_mediapipe(shared):
    """The oval leaves out the corners of the crop and holds eyes, mouth and chin."""
    pytest.importorskip("mediapipe")
    rgb = portrait()
    crop, _ = cut(rgb, head(), 256)
    model = shared("models/mediapipe/face_landmarker.task")
    mask = make_paster(256, FivePoints(), "landmarks", landmarker=model).masks(crop, crop, 0.0)
    assert mask[95, 95] > 0.95 and mask[95, 160] > 0.95 and mask[155, 125] > 0.95
    assert mask[:30].max() < 0.3 and mask[:, :20].max() == 0 and mask[:, 236:].max() < 0.3 and mask[225, 30] == 0


def test_models_that_are_missing_or_useless_are_refused(tmp_path: Path):
    for options, error, words in (
        ({"mask": "parsing"}, InputError, "--parsing"),
        ({"parsing": tmp_path / "p.onnx"}, InputError, "no use with --mask gaussian"),
        ({"landmarker": tmp_path / "l.task"}, InputError, "no use with --mask gaussian"),
        ({"mask": "parsing", "parsing": tmp_path / "p.onnx"}, WeightsError, "no such file"),
        ({"enhancer": tmp_path / "e.onnx"}, WeightsError, "no such file"),
        ({"mask": "landmarks", "landmarker": tmp_path / "l.task"}, InputError, "landmark"),
    ):
        with pytest.raises(error, match=words):
            make_paster(SIZE, FivePoints(), **options)


# A clip with a colour cast, from end to end


class CastEngine:
    """A network that changes nothing but the colours, a little differently in each frame."""

    size, batch_size = SIZE, 3
    description: dict = {}  # noqa: RUF012

    def __init__(self):
        self.noise = np.random.default_rng(0)

    def lanes(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext([self])

    def forget(self) -> None:
        pass

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        return np.zeros((len(crops), 2), np.float32)

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        return np.stack([with_cast(crop, CAST + [[0], [self.noise.normal(0, 1)]]) for crop in crops])


class OneFace:
    """A detector that sees the astronaut's face where it is."""

    name = "one face"

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        if rgb.shape[:2] != (320, 320):
            return []
        points = np.array([(-0.135, -0.13), (0.135, -0.13), (0, 0.0), (-0.11, 0.14), (0.11, 0.14)]) * 100 + (140, 73)
        return [Detection(Box.square(140, 75, 80), points, 0.9)]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    rgb = portrait(320)
    for name, count in (("talk.mp4", 6), ("smile.mp4", 2)):
        frames = (Frame(n, Fraction(n, 25), rgb) for n in range(count))
        write_video(frames, VideoInfo(Path(name), 320, 320, Fraction(25), count), tmp_path / name, crf=8)
    return tmp_path


def edited(folder: Path, name: str, **settings) -> Report:
    driving = Driving(folder / "smile.mp4")
    return edit_video(
        folder / "talk.mp4", driving, folder / name, CastEngine(), OneFace(), EditSettings(detail=False, **settings)
    )


def test_the_seam_of_a_clip_with_a_cast_before_and_after_the_match(clips: Path):
    before, after = edited(clips, "before.mp4", colour_match=False), edited(clips, "after.mp4")
    seams = [[frame.seam for frame in report.frames] for report in (before, after)]
    assert len(seams[0]) == len(seams[1]) == 6
    assert min(seams[0]) > 4 and max(seams[1]) < 1
    assert after.summary()["seam"]["worst"] == max(seams[1])
    assert after.frames[after.summary()["seam"]["worst_frame"]].seam == max(seams[1])
    source = next(read_frames(clips / "talk.mp4")).rgb
    shown = [levels_off(source, next(read_frames(clips / f"{name}.mp4")).rgb).mean() for name in ("before", "after")]
    assert shown[0] > shown[1] + 0.5  # both with the loss of the codec


def test_a_limit_refuses_the_seam_and_tells_all_frames(clips: Path):
    with pytest.raises(QualityError, match="6 frames is above 2") as caught:
        edited(clips, "out.mp4", colour_match=False, seam_limit=2)
    assert len(caught.value.report.frames) == 6 and caught.value.exit_code == 10
    assert sorted(path.name for path in clips.iterdir()) == ["smile.mp4", "talk.mp4"]
    edited(clips, "out.mp4", seam_limit=2)
    assert (clips / "out.mp4").exists()
    with pytest.raises(InputError, match="no seam"):
        edited(clips, "crop.mp4", paste=False, seam_limit=2)
