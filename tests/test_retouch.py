"""Mouth and eyes painted over: patches that follow the head, outlines that follow the codes, nothing else touched."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.spatial.transform import Rotation
from simulated_gpu import computed, simulated_gpu

from dpe_cli import weights
from dpe_cli.crop import cut
from dpe_cli.engine import Engine
from dpe_cli.errors import DeviceError, InputError, WeightsError
from dpe_cli.face import crop_box, make_detector
from dpe_cli.landmarks import LIPS_INNER, LIPS_OUTER, FaceShape
from dpe_cli.main import cli
from dpe_cli.measured import read_codes
from dpe_cli.mesh_warp import MeshWarp, likelier, lit_as, posed_as, through, without_background
from dpe_cli.models import PatchDiscriminator, Retouch, RetouchConfig, RetouchNet
from dpe_cli.motion_space import COORDINATES, POSE_DIM, MotionSpace
from dpe_cli.parts import EYE, MOUTH, OTHER_EYE, PARTS, UNIT, Patch, cut_patch, of_centres, posed, put_back, to_patch
from dpe_cli.retouch import FAR, MOST, QUIET, Retoucher, asked_for
from dpe_cli.train_retouch import (
    CHANNELS,
    RetouchTrainer,
    RetouchTraining,
    blended,
    evaluate,
    paint,
    shape_basis,
    split,
    tensors,
    train_retouch,
    unpainted,
)

SPACE = MotionSpace.load(weights.folder() / "motion-space.json")
TEMPLATE = SPACE.template
SIZE = 256
LIDS, LIPS = (
    slice(COORDINATES[name].start - POSE_DIM, COORDINATES[name].stop - POSE_DIM) for name in ("lids", "mouth")
)


def face(scale: float = 90.0, roll: float = 0.0, at: tuple[float, float] = (128.0, 120.0)) -> np.ndarray:
    """The mean face in a crop: (478, 3) pixels."""
    turn = cv2.Rodrigues(np.array([0, 0, np.radians(roll)]))[0]
    return (TEMPLATE @ turn.T * scale + [*at, 0]).astype(np.float32)


def shape(points: np.ndarray) -> FaceShape:
    return FaceShape(points, np.zeros(52, np.float32))


def photograph(seed: int = 0) -> np.ndarray:
    """Smooth noise: something to cut and to put back."""
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    return cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("roll", [0.0, 25.0])
@pytest.mark.parametrize("scale", [60.0, 90.0])
def test_a_patch_is_level_and_of_one_size_however_the_head_is(roll: float, scale: float):
    points = face(scale, roll)
    for part, sign in ((EYE, 1), (OTHER_EYE, -1)):
        matrix = to_patch(posed(points, TEMPLATE), part)
        outer, inner = (points[list(part.inner)][[0, 8], :2] if sign > 0 else points[[263, 362], :2]) @ matrix[:, :2].T
        across, down = inner - outer
        assert across == pytest.approx(UNIT * 0.3, abs=1.0) and abs(down) < 1  # the inner corner lies on the right
    matrix = to_patch(posed(points, TEMPLATE), MOUTH)
    middle = points[list(MOUTH.outer), :2].mean(0) @ matrix[:, :2].T + matrix[:, 2]
    assert np.abs(middle - [MOUTH.width / 2, MOUTH.height / 2]).max() < 10


@pytest.mark.parametrize("part", PARTS, ids=["mouth", "eye", "other eye"])
def test_what_is_cut_and_put_back_lands_where_it_was(part):
    crop = photograph()
    matrix = to_patch(posed(face(roll=12), TEMPLATE), part)
    grey = np.full_like(crop, 128)
    change = cut_patch(crop, matrix, part).astype(np.float32) - 128
    back = put_back(grey, change, matrix)
    inside = cv2.warpAffine(
        np.pad(np.ones((part.height - 8, part.width - 8), np.float32), 4),
        of_centres(cv2.invertAffineTransform(matrix)), (SIZE, SIZE),
    )  # fmt: skip
    assert (inside == 1).sum() > 1000
    assert np.abs(back.astype(float) - crop)[inside == 1].mean() < 2
    assert (back[inside == 0] == 128).mean() > 0.9


def test_outlines_open_with_the_face_and_the_share_holds_them_and_no_border():
    points = face()
    opened = points.copy()
    opened[list(MOUTH.inner), 1] += np.where(opened[list(MOUTH.inner), 1] > points[13, 1] + 0.1, 20, 0)
    patch = Patch.cut((photograph(),), posed(points, TEMPLATE), posed(opened, TEMPLATE), MOUTH)
    assert patch.after[0].sum() > 2 * patch.before[0].sum()
    share = patch.share
    assert share[patch.after[0] == 255].min() > 0.99
    assert max(share[0].max(), share[-1].max(), share[:, 0].max(), share[:, -1].max()) == 0
    assert (share == 0).any()


def test_networks_begin_as_no_change():
    source, drawn = torch.rand(2, 3, 48, 64), torch.rand(2, 3, 48, 64)
    assert not RetouchNet()(source, drawn, torch.rand(2, 4, 48, 64)).any()
    judged, maps = PatchDiscriminator()(drawn, source, torch.rand(2, 4, 48, 64))
    assert judged.shape == (2, 1, 6, 8) and len(maps) == 3


@pytest.mark.parametrize("text", ["{}", '{"channels": [8, 8]}', '{"channels": [8, 8, 0]}', '{"wide": 1}', "null", "7"])
def test_a_configuration_is_itself_or_an_error(text: str):
    if text == "{}":
        assert RetouchConfig.from_json(RetouchConfig().to_json()) == RetouchConfig.from_json(text)
    else:
        with pytest.raises(ValueError):
            RetouchConfig.from_json(text)


@pytest.fixture
def brightening(tmp_path: Path) -> Retoucher:
    """Networks that add 32 levels wherever they paint, and codes that move lids and lower lip."""
    config = RetouchConfig((8, 8, 8), (1, 1, 1))
    nets = Retouch(config)
    for net in (nets.mouth, nets.eyes):
        torch.nn.init.constant_(net.leave[1].bias, 32 / 127.5)
    weights.save(tmp_path / "retouch.safetensors", nets.state_dict(), config)
    return Retoucher(SPACE, tmp_path / "retouch.safetensors")


def test_only_parts_that_are_to_change_are_painted_over(brightening: Retoucher):
    crops, drawn = photograph(1)[None] // 2, photograph(2)[None] // 2
    points = face()
    own = SPACE.expression(TEMPLATE[None], np.zeros((1, 52)))
    none = brightening(crops, drawn, [shape(points)], own, own)
    np.testing.assert_array_equal(none, drawn)
    change = np.zeros((1, 14))
    change[0, LIDS] = 2
    added = brightening(crops, drawn, [shape(points)], own, own + change)[0].astype(int) - drawn[0]
    lips, eye = points[13, :2].astype(int), points[468, :2].astype(int)
    assert (added[lips[1], lips[0]] == 0).all() and np.abs(added[eye[1], eye[0]] - 32).max() <= 1
    change[0, LIPS] = -2  # opens
    added = brightening(crops, drawn, [shape(points)], own, own + change)[0].astype(int) - drawn[0]
    assert np.abs(added[lips[1], lips[0]] - 32).max() <= 1
    assert (added[:40] == 0).all() and (added[:, :20] == 0).all()


def test_teeth_of_a_mouth_that_does_not_open_are_the_sources(brightening: Retoucher):
    crops, drawn, points = photograph(1)[None] // 2, photograph(2)[None] // 2, face()
    below = [index for index in {*LIPS_INNER, *LIPS_OUTER} if points[index, 1] > points[13, 1] + 2]
    points[below, 1] += 12  # open
    own, change = SPACE.expression(TEMPLATE[None], np.zeros((1, 52))), np.zeros((1, 14))
    within, lip = points[[13, 14], :2].mean(0).astype(int), points[0, :2].astype(int)
    found = []
    for closing in (0.5, -1, 1):  # a little, then it opens, then it shuts
        change[0, LIPS] = closing
        added = brightening(crops, drawn, [shape(points)], own, own + change)[0].astype(int) - drawn[0]
        found.append(int(added[within[1], within[0], 0]))
        assert added[lip[1], lip[0], 0] > 25
    assert found[0] < 5 and min(found[1:]) > 25


def test_without_a_face_a_picture_stays_as_it_was_drawn(brightening: Retoucher):
    crops, drawn = np.stack([photograph(1)] * 2), np.stack([photograph(2)] * 2)
    found = brightening(crops, drawn, [None, shape(face())], np.zeros((2, 14)), np.full((2, 14), 2.0))
    np.testing.assert_array_equal(found[0], drawn[0])
    assert (found[1] != drawn[1]).any()


def test_what_painted_eyes_miss_is_asked_for_once_more(brightening: Retoucher, monkeypatch: pytest.MonkeyPatch):
    crops, drawn = np.stack([photograph(1)] * 3), np.stack([photograph(2)] * 3)
    faces, own, asked = [shape(face())] * 2 + [None], np.zeros((3, 14)), np.zeros((3, 14))
    asked[0, LIPS], asked[1:, LIDS] = 1, 2  # a mouth alone; eyes; nobody
    passes, plain = [], Retoucher.__call__

    def recorded(self: Retoucher, *given: np.ndarray) -> np.ndarray:
        passes.append(given)
        return plain(self, *given)

    def look(pictures: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        assert len(pictures) == 1 and (pictures[0] != drawn[1]).any()
        np.testing.assert_array_equal(wanted, asked[1:2])
        return wanted - 0.5 - 9 * (np.arange(14) == LIDS.start)

    monkeypatch.setattr(Retoucher, "__call__", recorded)
    found = brightening.looked_at(crops, drawn, faces, own, asked, look)
    first = [plain(brightening, crops, drawn, faces, own, asked)]
    np.testing.assert_array_equal(found[[0, 2]], first[0][[0, 2]])
    change = passes[-1][4] - asked[1:2]
    assert len(passes) == 3 and (change[0, LIPS] == 0).all()
    np.testing.assert_allclose(change[0, LIDS], [MOST, 0.5 - QUIET])


def test_painting_sets_in_smoothly():
    far = np.array([asked_for(np.full(4, x)) for x in np.linspace(0, 2 * FAR, 41)])
    assert far[0] == 0 and far[-1] == 1 and (np.diff(far) >= 0).all() and np.diff(far).max() < 0.1


def test_files_of_other_networks_are_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="no retouching network"):
        weights.load_retouch("landmarks")
    config = RetouchConfig((8, 8, 8), (1, 1, 1))
    weights.save(tmp_path / "own.safetensors", Retouch(config).state_dict(), config)
    assert weights.load_retouch(tmp_path / "own.safetensors").config == config
    with pytest.raises(WeightsError, match="cannot edit"):
        weights.load(tmp_path / "own.safetensors")


# The source's own pixels, carried by the mesh


def turned(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """The mean face, turned: (478, 3) pixels of a crop."""
    rotation = Rotation.from_euler("YXZ", [yaw, pitch, roll], degrees=True).as_matrix()
    return (TEMPLATE @ rotation.T * 90 + [128, 120, 0]).astype(np.float32)


def code_of(points: np.ndarray) -> np.ndarray:
    """(20,) as landmarks tell it."""
    return read_codes([shape(points)], SIZE, SPACE)[0]


def test_a_face_is_posed_as_a_code_says():
    wanted = turned(25, -10, 8)
    found = posed_as(posed(turned(-15, 5, 0), TEMPLATE), code_of(wanted)[:POSE_DIM], SIZE)
    np.testing.assert_allclose(found[:, :2], wanted[:, :2], atol=0.1)


MESH = MeshWarp(SPACE, np.zeros((14, 478, 3)))


def test_a_head_that_stays_is_carried_to_where_it_is():
    picture, points = photograph(), turned(10)
    found, share, _ = MESH.carried(picture, points, points)
    inside = share > 0.99
    assert 0.05 < inside.mean() < 0.5 and share.max() <= 1 and share[0].max() == 0
    assert np.abs(found.astype(int) - picture)[inside].mean() < 2


@pytest.mark.parametrize(("yaw", "near", "far"), [(40, 50, 280), (-40, 280, 50)])
def test_a_hidden_cheek_is_the_near_one_mirrored(yaw: float, near: int, far: int):
    points, front = turned(yaw), turned(0)
    if points[near, 2] > points[far, 2]:  # nearer to the camera is less deep
        near, far = far, near
    nose = points[4, 0]
    lit = (np.arange(SIZE) < nose) == (points[near, 0] < nose)  # the near side
    picture = np.tile(np.where(lit, 250, 40).astype(np.uint8)[None, :, None], (SIZE, 1, 3))
    found, _, _ = MESH.carried(picture, points, front)
    side, height = np.sign(front[far, 0] - 128), int(front[far, 1])
    across = found[height, :, 0] if side > 0 else found[height, ::-1, 0]
    edge = int(abs(front[234 if side < 0 else 454, 0] - 128))
    assert across[128 + edge - 6] > 200  # the far cheek's edge
    whole, _, _ = MESH.carried(picture, front, front)  # where nothing is hidden
    np.testing.assert_allclose(whole[height], picture[height], atol=12)


@pytest.mark.parametrize("shades", [(200, 130), (130, 200)])
def test_a_mirrored_cheek_is_in_the_light_of_the_side_it_stands_for(shades: tuple[int, int]):
    points, front = turned(40), turned(0)
    far = 50 if points[50, 2] > points[280, 2] else 280
    left = np.arange(SIZE) < points[4, 0]
    picture = np.tile(np.where(left, *shades).astype(np.uint8)[None, :, None], (SIZE, 1, 3))
    found, _, _ = MESH.carried(picture, points, front, yaw=0.0)
    side, height = np.sign(front[far, 0] - 128), int(front[far, 1])
    across = found[height, :, 0] if side > 0 else found[height, ::-1, 0]
    edge = int(abs(front[234 if side < 0 else 454, 0] - 128))
    wanted = shades[0] if points[far, 0] < points[4, 0] else shades[1]
    assert int(across[128 + edge - 6]) == pytest.approx(wanted, abs=25)


@pytest.mark.parametrize("yaw", [40, -40])
def test_background_beside_the_outline_does_not_come_into_a_turned_face(yaw: float):
    points, front = turned(yaw), turned(0)
    far = 454 if points[454, 2] > points[234, 2] else 234  # deeper
    outline, side = points[:, 0].max() if points[far, 0] > 128 else points[:, 0].min(), np.sign(points[far, 0] - 128)
    beyond = (np.arange(SIZE) - outline) * side > -7  # landmarks lie a little outside of the face
    picture = np.tile(np.where(beyond, 0, 250).astype(np.uint8)[None, :, None], (SIZE, 1, 3))
    dark = []
    for aside in (None, 0.0):
        found, share, _ = MESH.carried(picture, points, front, yaw=aside)
        dark.append((found[share > 0.9] < 125).mean())
    assert dark[1] < 0.3 * dark[0] and dark[0] > 0.01


def test_few_places_that_both_sides_show_tell_little_of_the_light():
    face, mirrored = np.full((SIZE, SIZE, 3), 220, np.uint8), np.full((SIZE, SIZE, 3), 110, np.uint8)
    for width, wanted in ((0, 110), (8, 110), (60, 215)):
        both = np.zeros((128, 128), bool)
        both[60 : 60 + width, 60 : 60 + width] = True
        found = lit_as(face, mirrored, both)
        assert int(found[..., 0].max()) == pytest.approx(wanted, abs=15)
        assert int(found[0, 0, 0]) == pytest.approx(110, abs=2)  # far from there


def test_of_a_rim_that_is_hidden_what_looks_like_the_skin_around_is_shown():
    seen = np.zeros((128, 128), bool)
    seen[32:96, 32:96] = True
    skin, hair = np.full((SIZE, SIZE, 3), 180, np.uint8), np.full((SIZE, SIZE, 3), 180, np.uint8)
    hair[:, 192:] = 30  # beside what is seen
    rim = np.s_[50:75, 98:102]  # as `seen`, at half the size
    assert likelier(hair, skin, seen)[rim].min() > 0.9 and likelier(skin, hair, seen)[rim].max() < 0.1
    assert likelier(skin, skin, seen)[rim].max() < 0.1


def test_the_person_goes_on_where_the_background_was():
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[:, :100] = (200, 150, 120)
    matte = (np.arange(128) < 50).astype(np.float32)[None].repeat(128, 0)
    found = without_background(picture, matte)
    np.testing.assert_allclose(found, picture[:1, :1].repeat(SIZE, 0).repeat(SIZE, 1), atol=3)
    np.testing.assert_array_equal(without_background(picture, np.zeros((128, 128), np.float32)), picture)


@pytest.mark.parametrize("yaw", [60, -60])
def test_a_profile_that_turns_back_shows_nothing_of_what_lies_behind(yaw: float):
    points, front = turned(yaw), turned(0)
    side = np.sign(points[4, 0] - 128)  # where the nose points
    edge = (side * points[:, 0]).max() - 12  # landmarks of profiles stray past their outline
    behind = np.arange(SIZE) * side > edge
    picture = np.tile(np.where(behind, 0, 250).astype(np.uint8)[None, :, None], (SIZE, 1, 3))
    matte = cv2.resize((~behind).astype(np.float32)[None].repeat(SIZE, 0), (128, 128), interpolation=cv2.INTER_AREA)
    dark = []
    for known in (None, matte):
        found, share, _ = MESH.carried(picture, points, front, yaw=0.0, matte=known)
        dark.append((found[share > 0.9] < 125).mean())
    assert dark[0] > 0.01 and dark[1] < 0.1 * dark[0]


def test_a_face_that_leaves_the_crop_is_not_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, share, _ = MESH.carried(photograph(), turned(10), turned(10) + [600, 0, 0], yaw=0.0)
    assert not share.any()


@pytest.mark.parametrize("yaw", [40, -40])
def test_past_a_hidden_cheek_the_near_side_goes_on_mirrored(yaw: float):
    """Ear and hair: a head that faces the camera again has them on both sides."""
    points, front = turned(yaw), turned(0)
    near = 234 if points[454, 2] > points[234, 2] else 454
    side = np.sign(points[near, 0] - 128)
    hair = (np.arange(SIZE) - points[near, 0]) * side > 0
    picture = np.tile(np.where(hair, 130, 250).astype(np.uint8)[None, :, None], (SIZE, 1, 3))
    height, far = int(front[454, 1]), int(abs(front[454, 0] - 128))
    shown = []
    for aside in (None, 0.0):
        found, share, _ = MESH.carried(picture, points, front, yaw=aside)
        outwards = np.s_[height, ::1] if side < 0 else np.s_[height, ::-1]  # from the near side to the far one
        beyond = slice(128 + far + 9, 128 + far + 18)
        shown.append(share[outwards][beyond].mean())
        assert share[outwards][128 - far - 18 : 128 - far - 6].max() < 0.1  # the near side is the generator's
    assert shown[0] < 0.05 and shown[1] > 0.9
    np.testing.assert_allclose(found[outwards][beyond, 0], 130, atol=5)


@pytest.mark.parametrize("yaw", [40, -40])
def test_a_head_that_turns_away_from_the_front_borrows_nothing_past_its_outline(yaw: float):
    picture, points, front = photograph(), turned(yaw), turned(0)
    plain, wide = (MESH.carried(picture, front, points, yaw=aside)[1] for aside in (None, 0.0))
    outside = cv2.dilate((plain > 0).astype(np.uint8), np.ones((9, 9))) == 0
    assert outside.mean() > 0.5 and wide[outside].max() < 0.05


def test_only_turned_heads_are_put_right():
    pictures, drawn = np.stack([photograph(1)] * 3), np.full((3, SIZE, SIZE, 3), 100, np.uint8)
    faces = [shape(turned(0))] * 2 + [None]
    own = np.stack([code_of(turned(0))] * 3)
    asked = own.copy()
    asked[1:, :POSE_DIM] = code_of(turned(20))[:POSE_DIM]
    asked[0, POSE_DIM:] += 1
    found, maps = MESH.turned(pictures, drawn, faces, own, asked)
    np.testing.assert_array_equal(found[[0, 2]], drawn[[0, 2]])
    assert maps[0] is None and maps[1].shape == (128, 128, 3) and maps[2] is None
    lips = turned(20)[13, :2].astype(int)
    changed = np.abs(found[1].astype(int) - 100).max(-1)
    assert changed[lips[1] - 4 : lips[1] + 4, lips[0] - 4 : lips[0] + 4].mean() > 20
    assert not changed[:, :40].any() and not changed[-20:].any()  # no background


def test_turned_heads_are_looked_at_and_turned_on():
    pictures, drawn = np.stack([photograph(1)] * 2), np.full((2, SIZE, SIZE, 3), 100, np.uint8)
    faces, own = [shape(turned(0))] * 2, np.stack([code_of(turned(0))] * 2)
    pose = own.copy()
    pose[1, :POSE_DIM] = code_of(turned(15, 5, 5))[:POSE_DIM]
    further, seen = pose.copy(), []
    further[1, :2] += [0.3, -1]

    def look(shown: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        seen.append(shown)
        return otherwise - np.array([0.4, -2, 3] + [0] * 17, np.float32)  # too much pitch, and roll counts for nothing

    found, maps = MESH.looked_at(pictures, drawn, faces, own, pose, None, look)
    wanted, theirs = MESH.turned(pictures, drawn, faces, own, further)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(maps[1], theirs[1])
    np.testing.assert_array_equal(seen, [MESH.turned(pictures, drawn, faces, own, pose)[0][1:]])  # the one that turned
    np.testing.assert_array_equal(found[0], drawn[0])


def test_heads_that_look_far_aside_are_not_looked_at():
    """Landmarks of near profiles are not to be relied on: what they miss would tear noses off."""
    pictures, drawn = np.stack([photograph(1)] * 3), np.full((3, SIZE, SIZE, 3), 100, np.uint8)
    faces, own = [shape(turned(0))] * 3, np.stack([code_of(turned(0))] * 3)
    pose = own.copy()
    for row, yaw in enumerate((25, -37.5, 50)):
        pose[row, :POSE_DIM] = code_of(turned(yaw))[:POSE_DIM]
    further, seen = pose.copy(), []
    further[:2, 0] += [0.3, 0.15]

    def look(shown: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        seen.append(len(shown))
        return otherwise - np.array([0.4] + [0] * 19, np.float32)

    found, _ = MESH.looked_at(pictures, drawn, faces, own, pose, None, look)
    assert seen == [2]
    wanted = MESH.turned(pictures, drawn, faces, own, further)[0]
    np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])
    assert np.abs(found[1].astype(int) - wanted[1]).mean() < 0.5  # half of it, but for the code's own rounding


def test_a_new_expression_carries_the_skin_along():
    basis = np.zeros((14, 478, 3))
    basis[LIPS.start, :, 1] = 0.1 * (np.linalg.norm((TEMPLATE - TEMPLATE[50])[:, :2], axis=1) < 0.2)  # a cheek sinks
    crops, drawn = np.stack([photograph(1)] * 2), np.full((2, SIZE, SIZE, 3), 100, np.uint8)
    points = turned(0)
    own = np.stack([code_of(points)] * 2)
    asked = own.copy()
    asked[1, POSE_DIM + LIPS.start] += 1
    found, maps = MeshWarp(SPACE, basis).expressed(crops, drawn, [shape(points)] * 2, own, asked)
    np.testing.assert_array_equal(found[0], drawn[0])
    x, y = points[50, :2].astype(int)
    assert maps[0] is None
    come_from = cv2.resize(maps[1], (SIZE, SIZE))[y + 9, x]
    np.testing.assert_allclose(come_from, [x + 0.5, y + 0.5, 1], atol=1.5)
    assert not maps[1][:10, :, 2].any()  # of the background nothing is carried
    assert np.abs(found[1, y + 9, x].astype(int) - crops[1, y, x]).max() < 25  # 0.1 of 90 pixels further down
    x, y = points[280, :2].astype(int)
    assert np.abs(found[1, y, x].astype(int) - crops[1, y, x]).max() < 10  # the other cheek is where it was


def test_wide_mouths_and_lids_that_move_far_are_left_to_the_generators():
    points, own = turned(0), code_of(turned(0))

    def left(change: dict[int, float]) -> np.ndarray:
        asked = own.copy()
        for place, step in change.items():
            asked[place] += step
        return MESH.left(points, points, own, asked, SIZE)

    mouth, lid = COORDINATES["mouth"].start, COORDINATES["lids"].start
    lips, eye, nose = (tuple(points[place, 1::-1].astype(int)) for place in (13, 159, 4))
    assert not left({}).any() and not left({mouth: 1, lid: 0.3}).any()  # a mouth that shuts
    opened, blinking = left({mouth: -2}), left({lid: -1})
    assert opened[lips] > 0.95 and max(opened[eye], opened[nose]) < 0.01
    assert blinking[eye] > 0.95 and max(blinking[lips], blinking[nose]) < 0.01
    assert 0 < left({lid: -0.6})[eye] < 0.6 and left({COORDINATES["gaze"].start: 1})[eye] > 0.95


def stored(count: int = 24) -> np.ndarray:
    """Patches that are to become the mean of source and drawn, in the middle of an eye's patch."""
    random = np.random.default_rng(0)
    patches = cv2.resize(
        random.integers(0, 256, (6 * count, 8, 6), np.uint8), (64, 48 * count), interpolation=cv2.INTER_CUBIC
    ).reshape(count, 48, 64, 6)
    wanted = patches.reshape(count, 48, 64, 2, 3).mean(3).astype(np.uint8)
    masks = np.zeros((count, 48, 64, 5), np.uint8)
    masks[:, 12:36, 16:48] = 255
    result = np.concatenate([patches, wanted, masks], -1)
    assert result.shape[-1] == CHANNELS
    return result


def test_training_lowers_the_error_and_its_adversary_takes_part():
    torch.manual_seed(0)
    patches = stored()
    trainer = RetouchTrainer(
        RetouchNet(RetouchConfig((8, 8, 8), (1, 1, 1))), RetouchTraining(lr=3e-3, ema=0.9, plain=0.5)
    )
    before, _ = evaluate(trainer.averaged(), patches)
    for step in range(60):
        terms = trainer.step(tensors(patches), step / 60)
    assert {"picture", "features", "adversary", "judge"} <= terms.keys()
    after, grid = evaluate(trainer.averaged(), patches)
    assert before["drawn"] == before["retouched"] == after["drawn"]
    assert after["retouched"] < 0.8 * after["drawn"]
    assert grid.shape[1] == 4 * 4 * 64
    batch = tensors(patches)
    outside = batch["share"].expand(-1, 3, -1, -1) == 0
    assert torch.equal(paint(trainer.net, batch)[outside], batch["drawn"][outside])


def test_what_lies_between_the_lips_counts_less_where_it_may_differ():
    torch.manual_seed(0)
    net = RetouchNet(RetouchConfig((8, 8, 8), (1, 1, 1)))
    batch = tensors(stored(4))
    whole, half, none = (
        RetouchTrainer(net, RetouchTraining(inside_share=share, lr=0.0)).step(batch, 0)["picture"]
        for share in (1.0, 0.5, 0.0)
    )
    assert abs(none) < 1e-6 < whole  # these masks hold all that is painted
    assert half == pytest.approx(whole / 2, rel=1e-4)


def test_the_adversarys_say_is_that_of_all_else():
    trainer = RetouchTrainer(RetouchNet(RetouchConfig((8, 8, 8), (1, 1, 1))), RetouchTraining())
    last = trainer.net.leave[1].weight
    weak, strong = (last * 0.5).sum(), (last * 2).sum()
    assert trainer.balance(weak, strong) == pytest.approx(4)
    trainer.step_number = 1
    assert trainer.balance(strong, weak) == pytest.approx(4)  # looked at now and then,
    trainer.step_number = 10
    assert trainer.balance(strong, weak) == pytest.approx(0.9 * 4 + 0.1 * 0.25)  # and followed slowly


def test_how_patches_look_may_count():
    torch.manual_seed(0)

    def looks(painted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        assert painted.shape[2:] == (96, 128)  # twice the patch of an eye
        assert painted.abs().max() <= 1
        return (painted - real).square().mean((1, 2, 3))

    batch = tensors(stored(4))
    net = RetouchNet(RetouchConfig((8, 8, 8), (1, 1, 1)))
    config = RetouchTraining(lr=3e-3, picture_weight=0.0, gan_weight=0.0, perceptual_weight=3.0)
    trainer = RetouchTrainer(net, config, looks)
    terms = [trainer.step(batch, step / 100)["perceptual"] for step in range(100)]
    assert terms[-1] < 0.5 * terms[0]


def test_weights_of_lpips_are_asked_for_where_they_count(tmp_path: Path):
    result = CliRunner().invoke(
        cli, ["train", "--data", str(tmp_path), "-o", str(tmp_path / "run"), "--set", "stage=retouch", "--set",
               "perceptual_weight=2"]
    )  # fmt: skip
    assert result.exit_code == 2
    assert "--lpips" in result.output


def test_shapes_follow_from_codes():
    random = np.random.default_rng(0)
    basis = random.normal(0, 0.01, (14, 478, 3))

    class Clip:
        def __init__(self) -> None:
            self.expression = random.normal(0, 1, (200, 14))
            self.shapes = (
                TEMPLATE + random.normal(0, 0.1, (1, 478, 3)) + np.einsum("nk,kpc->npc", self.expression, basis)
            )

    found = shape_basis([Clip(), Clip()])
    assert np.abs(found - basis).max() < 0.002


def test_a_file_holds_both_networks():
    states = split(Retouch().state_dict())
    for name in ("mouth", "eyes"):
        RetouchNet().load_state_dict(states[name])


def test_what_is_written_may_be_a_mean_of_before_and_after():
    before, after = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 4.0])}
    assert blended(before, after, 0.25)["w"].tolist() == [0.75, 3.5]
    assert blended(None, after, 0.0) is after


@pytest.mark.parametrize(("part", "begun"), [("nose", True), ("mouth", False)])
def test_only_a_part_that_is_there_is_trained_alone(tmp_path: Path, part: str, begun: bool):
    space, start = weights.folder() / "motion-space.json", weights.folder() / "retouch.safetensors" if begun else None
    with pytest.raises(InputError, match=f"{part} alone cannot be trained"):
        train_retouch(tmp_path, tmp_path, RetouchTraining(part=part), space, start=start)


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """The astronaut of scikit-image, framed as the tool frames faces: (1, 256, 256, 3) uint8."""
    picture = pytest.importorskip("skimage.data").astronaut()
    box = crop_box(make_detector().detect(picture)[0])
    return cut(picture, box, SIZE)[0][None]


def test_an_edit_with_the_shipped_weights_is_retouched_where_it_changes_the_face(portrait: np.ndarray):
    whole, bare = Engine(device="cpu"), Engine(device="cpu", retouch=False)
    assert whole.description["retouch"] and bare.description["retouch"] is None
    own = whole.motion_codes(portrait)
    errors = [np.abs(one.edit(portrait, own, None).astype(int) - portrait).mean() for one in (whole, bare)]
    assert errors[0] < 0.75 * errors[1]  # what stays is the source's own
    asked = own.copy()
    asked[:, COORDINATES["mouth"].start] -= 2  # the mouth opens
    (found,), (drawn,) = whole.edit(portrait, asked, None), bare.edit(portrait, asked, None)
    (face,) = whole.faces(portrait)
    changed = (found != drawn).any(-1)
    lips, eye = face.points[13, :2].astype(int), face.points[468, :2].astype(int)
    assert changed[lips[1] : lips[1] + 8, lips[0] - 4 : lips[0] + 4].mean() > 0.5
    around = slice(eye[1] - 8, eye[1] + 8), slice(eye[0] - 8, eye[0] + 8)  # not to change: the source's own
    for place, most in ((around, 12), (slice(30), 3)):
        errors = [np.abs(picture[place].astype(int) - portrait[0][place]).mean() for picture in (found, drawn)]
        assert errors[0] < min(errors[1], most)


def test_training_sees_what_the_mesh_shows_unpainted(portrait: np.ndarray):
    engine, whole, bare = Engine(device="cpu"), Engine(device="cpu"), Engine(device="cpu", retouch=False)
    found = unpainted(engine, whole.retoucher.basis)
    asked = whole.motion_codes(portrait)
    asked[:, COORDINATES["mouth"].start] -= 1
    (picture,), (painted,), (drawn,) = (one.edit(portrait, asked, None).astype(int) for one in (found, whole, bare))
    lips = whole.faces(portrait)[0].points[13, :2].astype(int)
    mouth, brow = (np.s_[y - 8 : y + 12, lips[0] - 12 : lips[0] + 12] for y in (lips[1], lips[1] - 90))
    assert np.abs(picture - painted)[mouth].mean() > 1 and np.abs(picture - painted)[brow].max() == 0
    assert np.abs(picture - drawn)[brow].mean() > 0  # the source's own pixels


def test_an_edit_with_the_shipped_weights_turns_the_face_itself(portrait: np.ndarray, monkeypatch):
    for name in ("evened", "stretched"):
        monkeypatch.setattr(f"dpe_cli.engine.{name}", lambda drawn, crop, flow, *_: (drawn, flow))
    whole, bare = Engine(device="cpu"), Engine(device="cpu", retouch=False)
    own = whole.motion_codes(portrait)
    turned = own.copy()
    turned[:, COORDINATES["turn"].start] += 1  # 15 degrees
    whole.matte.persons = lambda crops: np.ones((len(crops), 128, 128), np.float32)  # the face alone is looked at here
    (found,), (drawn,) = whole.edit(portrait, None, turned), bare.edit(portrait, None, turned)
    changed = np.abs(cv2.GaussianBlur(found, (0, 0), 4).astype(int) - cv2.GaussianBlur(drawn, (0, 0), 4)).max(-1) > 3
    assert 0.05 < changed.mean() < 0.4 and not changed[:, :8].any() and not changed[-8:].any()  # the face
    hair = slice(90)
    energies = [np.square(cv2.Laplacian(picture[hair], cv2.CV_32F)).mean() for picture in (drawn, found)]
    assert 1.05 * energies[0] < energies[1]
    expression, fresh = own.copy(), Engine(device="cpu")
    expression[:, COORDINATES["mouth"].start] -= 2
    fresh.matte = whole.matte
    whole.edit(portrait, expression, own)  # what it leaves for the next batch changes nothing
    np.testing.assert_array_equal(whole.edit(portrait, expression, turned), fresh.edit(portrait, expression, turned))


def test_an_edit_tells_where_its_faces_come_from(portrait: np.ndarray):
    engine = Engine(device="cpu")
    own = engine.motion_codes(portrait)
    asked, turned = own.copy(), own.copy()
    asked[:, COORDINATES["mouth"].start] -= 2
    turned[:, 0] += 1
    crops, codes, poses = portrait.repeat(2, 0), np.concatenate([own, asked]), np.concatenate([turned, own])
    for _ in range(2):  # the second time from memory
        engine.edit(crops, codes, None)
        still, moved = engine.carried(crops, codes, None)
        assert still is None and moved.shape == (128, 128, 3)
    here = np.stack(np.meshgrid(*[np.arange(128) * 2 + 1] * 2), -1)
    shift = np.abs(moved[..., :2] - here)[moved[..., 2] > 0.5]
    assert 1 < shift.max() < 40
    engine.edit(crops, codes, poses)
    away, opened = engine.carried(crops, codes, poses)  # the one is turned only, the other only speaks
    inside, middle = moved[..., 2] > 0.99, np.s_[16:-16, 16:-16]
    assert inside.mean() > 0.05 and np.abs(opened - moved)[inside].max() < 4
    assert np.abs(opened[..., :2] - here)[moved[..., 2] == 0][:1000].mean() < 4  # what stays
    engine.edit(crops, None, poses)
    alone, standing = engine.carried(crops, None, poses)  # the pose generator's flow, where nothing is carried
    assert np.abs(standing[..., :2] - here)[middle].max() < 6
    assert np.abs(away - alone)[middle].mean() < 0.2
    assert np.abs(alone[..., :2] - here)[middle].max() > 10
    assert (alone[..., 2] == 1).all()
    engine.edit(crops, np.concatenate([asked, asked]), poses)
    both, _ = engine.carried(crops, np.concatenate([asked, asked]), poses)
    assert 0.5 < np.abs(both - alone)[inside].max() < 40
    engine.forget()
    assert engine.carried(crops, codes, None) == [None] * 2


def test_the_engine_tells_how_far_heads_are_to_turn(portrait: np.ndarray):
    engine = Engine(device="cpu")
    told, turned = engine.read(portrait.repeat(3, 0)), engine.motion_codes(portrait).repeat(3, 0)
    turned[1, 0] += 2  # 30 degrees
    turned[2, 3:] += 1  # larger, elsewhere, and with another expression
    np.testing.assert_allclose(engine.turns(told, turned), [0, 30, 0], atol=0.05)
    assert engine.turns(told, None) == [None] * 3


def test_maps_follow_each_other():
    places = np.stack(np.meshgrid(*[np.arange(8) * 4.0 + 2] * 2), -1)
    right, half = (np.dstack([places + step, np.full((8, 8), share)]).astype(np.float32) for step, share in
                   (([4, 0], 1.0), ([0, -8], 0.5)))  # fmt: skip
    found = through(right, half, 32)[2:, :-1]
    np.testing.assert_allclose(found[..., :2], (places + [4, -8])[2:, :-1], atol=1e-4)
    assert (found[..., 2] == 0.5).all()
    assert through(None, half, 32) is half and through(right, None, 32) is right and through(None, None, 32) is None


def test_lanes_of_the_shipped_weights_edit_as_the_engine_does(portrait: np.ndarray):
    engine, threads = Engine(device="cpu"), torch.get_num_threads()
    crops, other = portrait.repeat(2, 0), portrait[:, :, ::-1].copy()
    asked = engine.motion_codes(crops)
    asked[:, COORDINATES["mouth"].start] -= [2, 1]
    wanted, told = engine.edit(crops, asked, None), engine.read(crops)
    with engine.lanes() as lanes:
        assert len(lanes) == 2 and engine not in lanes
        one, two = (lane.edit(crops, asked, None, told) for lane in lanes)
        lanes[0].edit(other, asked[:1], None)
        assert len(lanes[0].drawn) == 1 and len(lanes[1].drawn) == len(engine.drawn) == 2  # memories of their own
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(one, two)
    assert np.abs(one.astype(int) - wanted).max() <= 2  # convolutions of one thread round otherwise
    bare = Engine(device="cpu", measure=False)
    with bare.lanes() as lanes:
        assert lanes == [bare]


def test_a_lane_does_not_read_again_what_it_is_told(portrait: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(device="cpu")
    own, told = engine.motion_codes(portrait), engine.read(portrait)
    with engine.lanes() as lanes:
        monkeypatch.setattr(engine.measured, "measure", None)
        assert lanes[0].edit(portrait, own, None, told).shape == portrait.shape


def once(monkeypatch: pytest.MonkeyPatch, owner: object, method: str, fault: object, at: int) -> list[int]:
    """Gives a method a fault in its call of that number, an error or a change of the result; the count of its calls."""
    calls, original = [0], getattr(owner, method)

    def faulty(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] != at:
            return original(*arguments)
        if isinstance(fault, Exception):
            raise fault
        return fault(original(*arguments))

    monkeypatch.setattr(owner, method, faulty)
    return calls


@pytest.mark.parametrize(("precision", "mean"), [("fp32", 0.01), ("auto", 1), ("fp16", 1)])
def test_the_shipped_weights_edit_alike_on_a_gpu_that_is_simulated(portrait: np.ndarray, precision: str, mean: float):
    nearer = cv2.resize(portrait[0, 20:236, 20:236], (SIZE, SIZE))
    crops, engine = np.stack([portrait[0], nearer]), Engine(device="cpu")
    own = engine.motion_codes(crops)
    asked = own + np.float32(0.7) * np.where(np.arange(own.shape[1]) % 2, -1, 1).astype(np.float32)
    with simulated_gpu() as device:
        gpu = Engine(device=str(device), precision=precision)
        np.testing.assert_allclose(gpu.motion_codes(crops), own, atol=1e-4)
        with gpu.lanes() as lanes:
            assert len(lanes) == 4 and gpu not in lanes
            for lane, roles in zip(lanes, [(asked, None), (None, asked), (asked, asked)], strict=False):
                found, wanted = lane.edit(crops, *roles, gpu.read(crops)), engine.edit(crops, *roles)
                assert np.abs(wanted.astype(int) - crops).mean() > 2  # something was done
                assert np.abs(found.astype(int) - wanted).mean() < mean
        for found, wanted in zip(gpu.shifts(own), engine.shifts(own), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert gpu.precision == {"auto": "bf16"}.get(precision, precision)  # nothing overflowed


def test_what_overflows_in_one_lane_is_done_in_thirty_two_bits_in_all(
    portrait: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with simulated_gpu() as device:
        gpu = Engine(device=str(device), precision="fp16")
        once(monkeypatch, gpu.networks, "motion_code", lambda code: code * torch.inf, 1)
        with gpu.lanes() as lanes:
            lanes[1].encoded_codes(portrait)
            assert {one.precision for one in (gpu, *lanes)} == {gpu.description["precision"]} == {"fp32"}
    assert not torch.backends.cudnn.allow_tf32


def test_a_gpu_without_kernels_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch):
    def refuse(function: object, *arguments: object) -> object:
        if function._schema.name in ("aten::add", "aten::convolution"):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return computed(function, *arguments)

    monkeypatch.setattr("simulated_gpu.computed", refuse)
    with simulated_gpu() as device, pytest.raises(DeviceError, match=r"simulated.* cannot be used: .*no kernel image"):
        Engine(device=str(device))


def test_a_simulated_gpu_notices_what_a_real_one_would():
    with simulated_gpu() as device:
        here, there = torch.ones(2), torch.ones(2, device=device)
        assert there.device == (there * 2).device == there[:1].device == device
        assert (there + 1).cpu().numpy().tolist() == [2, 2]
        for mistake in (lambda: here + there, lambda: there.numpy(), lambda: torch.stack([here, there])):
            with pytest.raises(RuntimeError, match=r"same device|numpy"):
                mistake()
        with torch.autocast("cuda", torch.bfloat16):
            assert (there[None] @ there[:, None]).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def six(portrait: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crops of which two are equal, with the codes that are asked of them."""
    crops = np.stack(
        [cv2.resize(portrait[0, n : SIZE - n, n : SIZE - n], (SIZE, SIZE)) for n in (0, 6, 12, 12, 18, 24)]
    )
    return crops, Engine(device="cpu").motion_codes(crops) + np.float32(0.7) * np.where(np.arange(20) % 2, -1, 1)


@pytest.mark.parametrize("place", ["encode", "transfer_expression", "bend_pose", "looked_at"])
def test_what_was_done_stays_where_the_memory_ends(six, monkeypatch: pytest.MonkeyPatch, place: str):
    """In the second part of a batch, some of whose crops were edited in the batch before."""
    crops, asked = six
    engine, whole = Engine(device="cpu", batch_size=2), Engine(device="cpu", batch_size=1)
    wanted, maps = whole.edit(crops, asked, asked), whole.carried(crops, asked, asked)
    engine.edit(crops[:1], asked[:1], asked[:1])
    told = engine.read(crops)
    known = once(monkeypatch, engine.measured, "measure", lambda result: result, 0)
    owner = engine.mesh if place == "looked_at" else engine.networks
    calls = once(monkeypatch, owner, place, torch.OutOfMemoryError("CUDA out of memory"), 2)
    found = engine.edit(crops, asked, asked, told)
    assert engine.batch_size == 1 and calls[0] > 3
    assert np.abs(found.astype(int) - wanted).mean() < 0.01
    for one, two in zip(engine.carried(crops, asked, asked), maps, strict=True):
        assert np.abs(one - two).mean() < 0.001
    assert known[0] < 12  # looks at what is drawn; what was told is not read again


@pytest.mark.parametrize("place", ["transfer_expression", "bend_pose"])
def test_what_was_done_stays_where_sixteen_bits_overflow(six, monkeypatch: pytest.MonkeyPatch, place: str):
    crops, asked = six
    wanted = []
    for precision in ("bf16", "fp32"):
        engine = Engine(device="cpu", batch_size=2, precision=precision)
        engine.edit(crops[:1], asked[:1], asked[:1])
        wanted.append([engine.edit(crops, asked, asked), *engine.carried(crops, asked, asked)])
    engine = Engine(device="cpu", batch_size=2, precision="bf16")
    engine.edit(crops[:1], asked[:1], asked[:1])

    def overflown(drawn: object) -> object:
        picture = drawn[0] if isinstance(drawn, tuple) else drawn
        picture[-1, 0, 0, 0] = torch.inf
        return drawn

    once(monkeypatch, engine.networks, place, overflown, 2)
    found = engine.edit(crops, asked, asked)
    maps = engine.carried(crops, asked, asked)
    assert engine.description["precision"] == "fp32"
    done = slice(4)  # the first was edited before, two come in the first part, one is the equal of one of these
    np.testing.assert_array_equal(found[done], wanted[0][0][done])
    assert np.abs(found[4:].astype(int) - wanted[1][0][4:]).mean() < 0.4  # its own codes were read in 16 bits
    for row, where in enumerate(maps):
        assert np.abs(where - wanted[row > 3][1 + row]).mean() < (0.3 if row > 3 else 1e-9)


def test_what_was_read_stays_where_the_encoder_overflows(six, monkeypatch: pytest.MonkeyPatch):
    crops, _ = six
    engine = Engine(device="cpu", precision="bf16")
    monkeypatch.setattr(engine.measured, "measure", lambda crops, encoder: (encoder(range(len(crops))), crops[:, 0]))
    before = engine.read(crops[:2])
    once(monkeypatch, engine.networks, "motion_code", lambda code: code * torch.inf, 1)
    told = engine.read(crops)
    assert engine.precision == "fp32" and told[:2] == before and len({id(one) for one in told}) == 5


def test_a_pair_of_expressions_is_remembered_under_the_poses_of_one(six, monkeypatch: pytest.MonkeyPatch):
    crops, asked = six[0][:2], six[1][:2]
    engine = Engine(device="cpu")
    monkeypatch.setattr(engine, "encoded_codes", lambda crops: np.zeros((len(crops), 20), np.float32))  # to the bit
    engine.edit(crops, asked, asked)
    engine.edit(crops[:1], asked[:1], asked[:1] + 1)
    drawn = once(monkeypatch, engine.networks, "transfer_expression", lambda drawn: drawn, 0)
    found = engine.edit(crops, asked, asked - 1)
    assert drawn == [0] and found.shape == crops.shape
