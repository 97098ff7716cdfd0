"""Landmark geometry, the motion space and the samples made of it, on a synthetic face: no model file is needed."""

import os

import numpy as np
import pytest
import torch
from conftest import synthetic_face, turned
from simulated_gpu import simulated_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from dpe_cli.dataset import Sampler, _seen, around, is_held_out, kept_near, load_clips, turns
from dpe_cli.errors import InputError
from dpe_cli.face import Box
from dpe_cli.landmarks import BLENDSHAPES, FACE_OVAL, Landmarker, align, head_angles, mouth_opening
from dpe_cli.mesh import AWAY, FLOW_SIZE, Mesh, dense_map, warp
from dpe_cli.motion_space import (
    LARGER,
    MOTION_DIM,
    POSE_DIM,
    POSE_SCALE,
    STRAY,
    MotionSpace,
    mirror_blendshapes,
    mirror_permutation,
    normalise,
    seen_in,
)
from dpe_cli.trainer import windows
from dpe_cli.weights import folder


def test_align_recovers_scale_rotation_and_translation():
    template = synthetic_face()
    rotation = turned(20, -10, 5)
    scale, found, translation = align(70 * template @ rotation.T + [100, 120, 3], template)
    assert scale == pytest.approx(70, rel=1e-6)
    np.testing.assert_allclose(found, rotation, atol=1e-6)
    np.testing.assert_allclose(translation, [100, 120, 3], atol=1e-4)


@pytest.mark.parametrize(("angles", "position"), [((25, 0, 0), 0), ((0, 15, 0), 1), ((0, 0, -12), 2)])
def test_head_angles_are_those_of_the_rotation(angles, position):
    found = head_angles(turned(*angles))
    expected = np.zeros(3)
    expected[position] = angles[position]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_mouth_opening_does_not_change_with_pose_and_size():
    face = synthetic_face()
    face[14, 1] += 0.2
    moved = 80 * face @ turned(20, 10, 30).T + 5
    assert mouth_opening(moved) == pytest.approx(mouth_opening(face), rel=1e-6)


def test_normalise_takes_the_pose_out():
    template = synthetic_face()
    posed = np.stack([50 * template @ turned(yaw).T + [90, 80, 0] for yaw in (-20, 0, 30)])
    shapes, scale, _, _ = normalise(posed, template)
    np.testing.assert_allclose(shapes, np.broadcast_to(template, shapes.shape), atol=1e-5)
    np.testing.assert_allclose(scale, 50, rtol=1e-6)


def test_mirroring_blendshapes_swaps_left_and_right_and_is_its_own_inverse():
    scores = np.arange(52.0)
    swapped = mirror_blendshapes(scores)
    assert swapped[BLENDSHAPES.index("eyeBlinkLeft")] == BLENDSHAPES.index("eyeBlinkRight")
    np.testing.assert_array_equal(mirror_blendshapes(swapped), scores)


def test_motion_space_survives_json(prepared, tmp_path):
    clips, space = load_clips(prepared, None, held_out=False, size=64)
    (tmp_path / "space.json").write_text(space.to_json())
    again, _ = load_clips(prepared, MotionSpace.load(tmp_path / "space.json"), held_out=False, size=64)
    np.testing.assert_allclose(again[0].expression, clips[0].expression, atol=1e-3)


def test_a_face_is_mirrored_once_for_all_clips(prepared, monkeypatch):
    found = []
    monkeypatch.setattr("dpe_cli.dataset.mirror_permutation", lambda face: found.append(1) or mirror_permutation(face))
    assert len(load_clips(prepared, None, held_out=False, size=64)[0]) > len(found) == 1


def test_more_clips_may_be_open_than_the_system_first_allows(prepared):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 4, before[1]))
        assert len(load_clips(prepared, None, held_out=False, size=256)[0]) > 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_splits_share_no_identity_and_lose_none(prepared):
    names = [f"id{n:04}" for n in range(2000)]
    assert 0.07 < np.mean([is_held_out(name) for name in names]) < 0.13
    clips, _ = load_clips(prepared, None, held_out=False, size=64)
    assert sorted(c.identity for c in clips) == [n for n in names[:12] if not is_held_out(n)]


def test_an_empty_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no prepared clips"):
        load_clips(tmp_path, None, held_out=False, size=64)


def test_a_face_that_does_not_move_maps_to_itself():
    points = 60 * synthetic_face() + [128, 128, 0]
    where = dense_map(Mesh(synthetic_face()).locate(points, 256), points, points, 256)
    centres = (np.arange(FLOW_SIZE) + 0.5) * 256 / FLOW_SIZE
    np.testing.assert_allclose(where, np.stack(np.meshgrid(centres, centres), -1), atol=1e-3)


def test_a_shifted_face_is_looked_up_where_it_came_from():
    origin = 60 * synthetic_face() + [128, 128, 0]
    target = origin + [6, -4, 0]
    where = dense_map(Mesh(synthetic_face()).locate(target, 256), target, origin, 256)
    middle, border = where[FLOW_SIZE // 2, FLOW_SIZE // 2], where[0, 0]
    centre = (FLOW_SIZE // 2 + 0.5) * 256 / FLOW_SIZE
    np.testing.assert_allclose(middle, [centre - 6, centre + 4], atol=0.3)
    np.testing.assert_allclose(border, [1, 1], atol=0.6)


def test_a_blink_is_in_the_flow():
    template = MotionSpace.load(folder() / "motion-space.json").template
    opened = 85 * template + [128, 128, 0]
    closed = opened.copy()
    upper, lower = [160, 159, 158], [144, 145, 153]
    closed[upper] = opened[lower] + 0.1 * (opened[upper] - opened[lower])
    moved = dense_map(Mesh(template).locate(closed, 256), closed, opened, 256)[..., 1]
    still = (np.arange(FLOW_SIZE) + 0.5)[:, None] * 256 / FLOW_SIZE
    x, y = np.round(closed[159, :2] * FLOW_SIZE / 256 - 0.5).astype(int)
    travel = closed[159, 1] - opened[159, 1]
    assert travel > 4
    assert (still - moved)[y - 1 : y + 2, x].max() > 0.6 * travel


def test_warp_by_the_identity_gives_the_picture_back():
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    centres = (np.arange(FLOW_SIZE) + 0.5) * 256 / FLOW_SIZE
    where = np.stack(np.meshgrid(centres, centres), -1).astype(np.float32)
    np.testing.assert_array_equal(warp(picture, where, 256), picture)


def test_samples_have_the_stated_shapes_and_ranges(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=64)
    sample = Sampler(clips, Mesh(space.template), seed=0).sample()
    assert sample["source"].shape == sample["target"].shape == sample["driving"].shape == (3, 64, 64)
    assert sample["driving_code"].shape == (MOTION_DIM,)
    assert sample["exp_flow"].shape == (2, FLOW_SIZE, FLOW_SIZE)
    assert sample["weight"].min() >= 1
    assert all(np.isfinite(v).all() for v in sample.values())


def test_what_opens_is_unseen_and_what_was_open_is_seen():
    points = 85 * MotionSpace.load(folder() / "motion-space.json").template + [128, 128, 0]
    points[14, 1] += 20  # the lower lip, so that the mouth has an inside
    mouth = tuple(np.round(points[[13, 14], :2].mean(0) * FLOW_SIZE / 256).astype(int)[::-1])
    assert _seen(points, 0.05, 1, 256)[mouth] == 0
    assert 0.2 < _seen(points, 0.45, 1, 256)[mouth] < 0.7
    assert _seen(points, 1, 1, 256).min() == _seen(points, 1, 0.05, 256).min() == 1
    assert _seen(points, 0.05, 1, 256).mean() > 0.95


def test_pairs_are_chosen_for_what_opens_or_turns(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=64)
    for clip in clips:
        clip.rotation = np.repeat(np.eye(3)[None], len(clip), 0)
        clip.opening = np.linspace(0, 1, len(clip))

    def picked(**settings):
        sampler = Sampler(clips, Mesh(space.template), 0, **settings)
        return [sampler.pick() for _ in range(100)]

    def opened(pairs):
        return np.mean([clip.opening[d] - clip.opening[s] for clip, s, d in pairs])

    assert opened(picked(open_share=1.0)) > opened(picked()) + 0.4
    for clip in clips:
        angle = np.radians(np.linspace(0, 30, len(clip)))
        clip.rotation[:, 0, 0] = clip.rotation[:, 1, 1] = np.cos(angle)
        clip.rotation[:, 1, 0], clip.rotation[:, 0, 1] = np.sin(angle), -np.sin(angle)

    def turned(pairs):
        return np.mean([turns(clip, s)[d] for clip, s, d in pairs])

    assert turned(picked(turn_share=1.0)) > turned(picked()) + 3


def test_a_virtual_pair_turns_the_head_and_nothing_else(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=256)
    sampler, turned_by = Sampler(clips, Mesh(space.template), 0, augment=False, virtual_share=1.0), []
    for _ in range(6):
        sample = sampler.sample()
        code, other = sample["source_code"], sample["driving_code"]
        np.testing.assert_array_equal(code[POSE_DIM:], other[POSE_DIM:])
        turned_by.append(np.abs(code - other)[:3].max())
        # The driving picture is the target, bent by the flow that is to be learnt; no flow is asked for off the face.
        target, driving = (sample[name].transpose(1, 2, 0) for name in ("target", "driving"))
        where = (sample["pose_flow"].transpose(1, 2, 0) + 1) * 128
        np.testing.assert_array_equal(driving, warp(target, where, 256))
        assert sample["pose_weight"][0, 0] == sample["pose_valid"][0, 0] == 0
        assert sample["pose_weight"].max() > 1
    assert max(turned_by) > 0.5


def test_what_is_turned_away_in_the_other_picture_does_not_face_it():
    space = MotionSpace.load(folder() / "motion-space.json")
    mesh, size = Mesh(space.template), 256.0
    front, aside = (85 * space.template @ turned(yaw).T + [128, 128, 0] for yaw in (0, 50))
    place = mesh.locate(front, size)
    assert mesh.facing(place, front, front).mean() == mesh.facing(place, front, front * [2, 2, 1]).mean() > 0.1
    hidden = mesh.facing(place, front, aside) == AWAY
    assert 0.005 < hidden.mean() < 0.15
    sides = hidden[:, : FLOW_SIZE // 2].sum(), hidden[:, FLOW_SIZE // 2 :].sum()
    assert min(sides) < 0.1 * max(sides)  # one cheek


def test_a_mirrored_face_has_mirrored_pose_coordinates(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=64)
    sampler, clip = Sampler(clips, Mesh(space.template), 0), clips[0]
    still = (0.0, 1.0, np.zeros(2), np.array([128.0, 128.0]))
    _, points, plain = sampler._move(None, clip.points[0], clip.head(0), still, flip=False)
    _, mirrored_points, mirrored = sampler._move(None, clip.points[0], clip.head(0), still, flip=True)
    np.testing.assert_allclose(mirrored[:POSE_DIM] * [-1, 1, -1, 1, -1, 1], plain[:POSE_DIM], atol=1e-5)
    np.testing.assert_allclose(mirrored_points[:, 0], 256 - points[:, 0], atol=1e-6)


def test_landmarks_of_a_photograph_lie_on_its_face(shared):
    model = shared("models/mediapipe/face_landmarker.task")
    skimage = pytest.importorskip("skimage.data")
    landmarker = Landmarker(model)
    face = landmarker.detect(skimage.astronaut())
    landmarker.close()
    assert face is not None
    nose = face.points[4]
    assert 200 < nose[0] < 250 and 90 < nose[1] < 140
    assert face.blendshapes[BLENDSHAPES.index("mouthSmileLeft")] > 0.3


def test_a_missing_landmark_model_is_named(tmp_path):
    pytest.importorskip("mediapipe")
    with pytest.raises(InputError, match="nothing.task"):
        Landmarker(tmp_path / "nothing.task")


def test_landmarks_are_learnt_left_and_right_by_the_picture(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=64)
    sampler = Sampler(clips, Mesh(space.template), 0, codes_only=True)
    for _ in range(8):  # mirrored or not
        points = sampler.sample()["source_points"].reshape(-1, 2)
        assert points[33, 0] < points[263, 0]  # outer eye corners


def test_pose_pictures_can_be_about_what_surrounds_the_face(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=256)
    sampler = Sampler(clips, Mesh(space.template), 0, augment=False, face_weight=0.3)
    assert sampler.sample()["pose_weight"].max() <= 1  # so that perceptual windows are anywhere
    points, turn = np.zeros((478, 2)), np.linspace(0, 2 * np.pi, len(FACE_OVAL), endpoint=False)
    points[FACE_OVAL] = 128 + 64 * np.c_[np.cos(turn), np.sin(turn)]
    weight = around(points, 256, 128, 0.3)
    assert weight[64, 64] == pytest.approx(0.3) and weight[64, 97] == weight[0, 0] == 1
    assert 0.3 < weight[64, 92] < 1  # softly


def test_windows_are_anywhere_where_nothing_is_heavy():
    torch.manual_seed(0)
    light, heavy = torch.ones(8, 64, 64), torch.ones(8, 64, 64)
    heavy[:, 40:50, 20:30] = 6
    places = [{(part[2].start, part[3].start) for part in windows(weight, 16)} for weight in (light, heavy)]
    assert len(places[0]) > 4 and len(places[1]) == 1
    assert all(0 <= place <= 48 for pair in places[0] for place in pair)


def test_windows_lie_about_the_middle_of_what_is_heavy_on_a_gpu_too():
    """Which is asked once: other work of a GPU waits for each answer."""
    waits = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits.extend(["one"] * (function._schema.name in ("aten::_to_copy", "aten::_local_scalar_dense")))
            return function(*args, **kwargs or {})

    weight = torch.nn.functional.avg_pool2d(torch.rand(6, 1, 64, 64) * 6, 5, 1, 2)[:, 0]
    weight[3] = 1
    torch.manual_seed(0)
    found = windows(weight, 16)
    torch.manual_seed(0)
    for number, (one, heavy) in enumerate(zip(found, (weight - 2.5).clamp_min(0), strict=True)):
        middle = (
            torch.rand(2) * 64 if number == 3 else (heavy.nonzero() * heavy[heavy > 0][:, None]).sum(0) / heavy.sum()
        )
        corner = (middle - 8).clamp(0, 48)
        assert one[0] == slice(number, number + 1)
        assert [part.start for part in one[2:]] == pytest.approx((corner - 0.5).tolist(), abs=0.51)
        assert [part.stop - part.start for part in one[2:]] == [16, 16]
    with simulated_gpu() as device:
        there = weight.to(device)
        torch.manual_seed(0)
        with Waits():
            assert windows(there, 16) == found
    assert len(waits) == 1


def test_a_head_is_the_same_in_any_crop():
    boxes = np.array([[30.0, 40, 130, 140], [-20, 10, 140, 170]])
    codes = []
    for x0, y0, x1, _ in boxes:
        pose = MotionSpace.pose(np.array([33.0]), turned(9, 4)[None], np.array([[90 - x0, 80 - y0]]), x1 - x0)
        codes.append(np.pad(pose, ((0, 0), (0, MOTION_DIM - POSE_DIM)), constant_values=0.5))
    np.testing.assert_allclose(seen_in(codes[0], boxes[:1], boxes[1:]), codes[1], atol=1e-5)
    np.testing.assert_allclose(seen_in(codes[1], boxes[1:], boxes[:1]), codes[0], atol=1e-5)


def test_under_a_still_camera_heads_move_and_what_stands_still_stays(prepared):
    clips, space = load_clips(prepared, None, held_out=False, size=256)
    for clip in clips:
        shift = np.linspace(-6, 6, len(clip))[:, None] * [1, 0, 0]
        clip.points, clip.translation = clip.points + shift[:, None], clip.translation + shift
    spread = {}
    for still in (False, True):
        sampler = Sampler(clips, Mesh(space.template), 0, augment=False, still_camera=still)
        samples = [sampler.sample() for _ in range(20)]
        apart = [(one["driving_code"] - one["source_code"])[4] * POSE_SCALE[4] for one in samples]
        spread[still] = np.abs(apart).max()
    assert spread[True] > 2 * spread[False] and spread[True] > 0.02


def test_a_head_that_leaves_the_crop_is_followed_as_far_as_it_must():
    first = Box.square(100, 90, 80)
    assert kept_near(first, Box.square(104, 86, 85)) == first
    beyond = kept_near(first, Box.square(260, 90, 80))
    assert (beyond.centre, beyond.width) == (pytest.approx((260 - STRAY * 80, 90)), 80)
    assert kept_near(first, Box.square(100, 90, 160)).width == pytest.approx(80 * 2 ** (1 - LARGER))
