"""Datasets from videos: shots, tracks, squares, files, resuming; with a painted face and stand-ins that find it."""

import csv
import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import synthetic_face

from dpe_cli.dataset import load_clips
from dpe_cli.errors import DeviceError, FaceError, InputError, OutputError
from dpe_cli.face import Box, Detection
from dpe_cli.journal import JOURNAL, Outcome, PrepareSettings, cluster, split_people, write_index
from dpe_cli.landmarks import FaceShape, five_points
from dpe_cli.listing import Source, find_sources
from dpe_cli.main import cli
from dpe_cli.motion_space import MotionSpace, mean_face
from dpe_cli.prepare import Tools, prepare, prepare_source, steady
from dpe_cli.video import Frame, VideoInfo, read_frames
from dpe_cli.writer import write_video

SETTINGS = PrepareSettings(Path("landmarks.task"), min_sharpness=1, min_side=64)
BLUE, BROWN = (40, 60, 160), (150, 110, 60)


def picture(x: float, y: float, side: int = 40, ground: tuple = BLUE, size: tuple = (320, 240)) -> np.ndarray:
    """A green checkered face, `side` pixels wide, around a point on a plain ground."""
    rgb = np.full((size[1], size[0], 3), ground, np.uint8)
    checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((32, 32)))
    face = np.zeros((256, 256, 3), np.uint8)
    face[..., 1] = 170 + 70 * checks
    x0, y0 = round(x - side / 2), round(y - side / 2)
    rgb[y0 : y0 + side, x0 : x0 + side] = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
    return rgb


def film(path: Path, pictures: list[np.ndarray], fps: int = 25) -> Path:
    height, width = pictures[0].shape[:2]
    info = VideoInfo(path, width, height, Fraction(fps), len(pictures))
    frames = (Frame(i, Fraction(i, fps), rgb) for i, rgb in enumerate(pictures))
    write_video(frames, info, path, preset="ultrafast", crf=8)
    return path


def face_in(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest corner of what is green."""
    green = (rgb[..., 1] > 130) & (rgb[..., 0] < 90) & (rgb[..., 2] < 90)
    rows, columns = np.nonzero(green)
    if len(rows) < 40:
        return None
    return np.array([columns.min(), rows.min()]), np.array([columns.max() + 1, rows.max() + 1])


class Finder:
    """Finds the green face; counts the pictures it saw."""

    name = "stand-in"

    def __init__(self):
        self.seen = 0

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        self.seen += 1
        found = face_in(rgb)
        if found is None:
            return []
        points = five_points(points_of(*found))
        return [Detection(Box(*map(float, (*found[0], *found[1]))), points, 1.0)]


def points_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(478, 3) of a face 1.8 wide and 2.4 high in units of its eyes' distance, put into a square."""
    scale = (high - low).max() / 2.4
    return (scale * synthetic_face() + [*(low + high) / 2, 0]).astype(np.float32)


class Marker:
    """Landmarks of the green face."""

    def detect(self, rgb: np.ndarray) -> FaceShape | None:
        found = face_in(rgb)
        if found is None:
            return None
        return FaceShape(points_of(*found), np.full(52, 0.1, np.float32), np.eye(3, dtype=np.float32))

    def close(self) -> None:
        pass


class Recogniser:
    """Knows people by the colour of the ground."""

    def embed(self, rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
        vector = rgb[2, 2].astype(np.float32) - 100
        return vector / np.linalg.norm(vector)


def stand_ins(settings: PrepareSettings) -> Tools:
    return Tools(Finder(), Marker())


def stand_ins_with_identity(settings: PrepareSettings) -> Tools:
    return Tools(Finder(), Marker(), Recogniser())


def make(inputs: list[Path], output: Path, settings: PrepareSettings = SETTINGS, tools=stand_ins, **more):
    said: list[str] = []
    summary = prepare(inputs, output, settings, make_tools=tools, say=said.append, **more)
    return summary, said


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def walk(count: int = 25, ground: tuple = BLUE, side: int = 40) -> list[np.ndarray]:
    """A face that moves by 2 pixels a frame."""
    return [picture(120 + 2 * i, 110, side, ground) for i in range(count)]


def test_two_shots_become_two_clips_of_one_still_square_each(tmp_path):
    video = film(tmp_path / "talk.mp4", walk(25) + walk(30, BROWN))
    summary, _ = make([video], tmp_path / "data")
    assert (summary.clips, summary.people) == (2, 1)
    one, two = table(tmp_path / "data" / "index.csv")
    assert (one["name"], one["frames"], one["start"], one["end"]) == ("talk_000", "13", "0.0", "0.96")
    assert (two["name"], two["frames"], two["start"], two["end"]) == ("talk_001", "13", "1.04", "2.0")
    frames, data = np.load(tmp_path / "data" / "talk_000.npy"), np.load(tmp_path / "data" / "talk_000.npz")
    assert frames.shape == (13, 256, 256, 3) and frames.dtype == np.uint8
    assert {k: data[k].shape[1:] for k in ("points", "blendshapes", "rotation")} == {
        "points": (478, 3), "blendshapes": (52,), "rotation": (3, 3)
    }  # fmt: skip
    np.testing.assert_allclose(data["times"], np.arange(13) * 0.08)
    x0, y0, x1, y1 = data["box"]
    assert x1 - x0 == pytest.approx(y1 - y0) and min(x0, y0) >= 0 and x1 <= 320 and y1 <= 240
    moved = np.diff(data["points"][:, 4, 0])
    assert moved.mean() == pytest.approx(4 * 256 / (x1 - x0), rel=0.05)  # the face walks through the square
    assert data["points"][..., 0].min() > 0 and data["points"][..., 0].max() < 256


def test_a_motion_space_gives_size_and_place_of_the_head(tmp_path):
    face = np.stack([points_of(np.array([0, 0]), np.array([9, 9]))] * 3)
    template = mean_face(face)
    video = film(tmp_path / "talk.mp4", walk())
    make([video], tmp_path / "data", tools=lambda settings: Tools(Finder(), Marker(), template=template))
    data = np.load(tmp_path / "data" / "talk_000.npz")
    assert np.diff(data["translation"][:, 0]).mean() == pytest.approx(np.diff(data["points"][:, 4, 0]).mean(), rel=0.05)
    assert data["scale"].std() < 0.05 * data["scale"].mean()


def test_what_is_left_out_is_told_with_the_reason(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    film(videos / "empty.mp4", [np.full((240, 320, 3), BLUE, np.uint8)] * 12)
    film(videos / "good.mp4", walk())
    film(videos / "short.mp4", walk(12))
    film(videos / "small.mp4", [picture(120, 110, 20)] * 25)
    (videos / "text.mp4").write_text("no video")
    summary, said = make([videos], tmp_path / "data")
    reasons = {Path(row["source"]).stem: row["reason"] for row in table(tmp_path / "data" / "rejected.csv")}
    assert reasons["empty"] == "no face"
    assert reasons["short"] == "too short: 6 frames, least 10"
    assert reasons["small"].startswith("too small: its crop is ")
    assert reasons["text"].startswith("unreadable: ")
    assert (summary.clips, summary.rejected) == (1, 4)
    assert len([line for line in said if "left out" in line]) == 4
    assert any("no identity embeddings" in line for line in said)


def test_a_blurred_face_is_left_out(tmp_path):
    video = film(tmp_path / "talk.mp4", [cv2.GaussianBlur(rgb, (0, 0), 6) for rgb in walk(side=60)])
    with pytest.raises(FaceError, match="not one clip"):
        make([video], tmp_path / "data", replace(SETTINGS, min_sharpness=15))
    (row,) = table(tmp_path / "data" / "rejected.csv")
    assert row["reason"].startswith("too blurred")


def test_an_interrupted_run_goes_on_and_leaves_finished_clips_alone(tmp_path):
    data, videos = tmp_path / "data", [film(tmp_path / f"{name}.mp4", walk()) for name in "abc"]

    class Interrupted(Marker):
        def detect(self, rgb):
            if len(list(data.glob("*.npz"))) == 2:
                raise KeyboardInterrupt
            return super().detect(rgb)

    with pytest.raises(KeyboardInterrupt):
        make(videos, data, tools=lambda settings: Tools(Finder(), Interrupted()))
    assert [row["name"] for row in table(data / "index.csv")] == ["a_000", "b_000"]
    before = {path.name: path.stat().st_mtime_ns for path in data.glob("[ab]_*")}
    (data / ".c_000.npy.part").write_bytes(b"half")
    with (data / JOURNAL).open("ab") as file:
        file.write(b'{"source": "half a li')
    summary, _ = make(videos, data)
    assert (summary.clips, summary.done_before) == (3, 2)
    assert {path.name: path.stat().st_mtime_ns for path in data.glob("[ab]_*")} == before
    assert not list(data.glob(".*.part"))
    finder = Finder()
    make(videos, data, tools=lambda settings: Tools(finder, Marker()))
    assert finder.seen == 0
    assert all(json.loads(line) for line in (data / JOURNAL).read_text().splitlines())


def test_a_folder_of_other_settings_or_of_another_making_is_refused(tmp_path):
    video = film(tmp_path / "talk.mp4", walk())
    make([video], tmp_path / "data")
    with pytest.raises(InputError, match="fps was 12.5, is 25"):
        make([video], tmp_path / "data", replace(SETTINGS, fps=25))
    (tmp_path / "old").mkdir()
    np.savez(tmp_path / "old" / "0.npz", identity="someone")
    with pytest.raises(InputError, match="clips without a journal"):
        make([video], tmp_path / "old")


def test_listed_square_clips_are_taken_whole_with_their_identity(tmp_path):
    (tmp_path / "part").mkdir()
    pictures = [picture(100 + i, 128, 120, size=(256, 256)) for i in range(24)]
    film(tmp_path / "part" / "0.mp4", pictures)
    (tmp_path / "index.csv").write_text("clip,identity_cluster\npart/0.mp4,anna\npart/none.mp4,bert\n")
    finder = Finder()
    make([tmp_path], tmp_path / "data", tools=lambda settings: Tools(finder, Marker()))
    assert finder.seen == 0
    (row,) = table(tmp_path / "data" / "index.csv")
    assert (row["name"], row["identity"], row["side"]) == ("part_0_000", "anna", "256")
    expected = [frame.rgb for frame in read_frames(tmp_path / "part" / "0.mp4") if frame.index % 2 == 0]
    np.testing.assert_array_equal(np.load(tmp_path / "data" / "part_0_000.npy"), expected)
    (lost,) = table(tmp_path / "data" / "rejected.csv")
    assert "none.mp4" in lost["source"] and "does not exist" in lost["reason"]


def test_the_official_lmdb_layout_is_read_with_its_lists(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    root = tmp_path / "vox"
    (root / "256").mkdir(parents=True)
    names = ["id1#a#1", "id1#b#1", "id2#c#1"]
    with lmdb.open(str(root / "256"), map_size=2**26) as database, database.begin(write=True) as transaction:
        for name in names:
            transaction.put(f"{name}-length".encode(), b"24")
            for i in range(24):
                rgb = picture(100 + i, 128, 120, size=(256, 256))
                transaction.put(f"{name}-{i:07}".encode(), cv2.imencode(".png", rgb[..., ::-1])[1].tobytes())
    (root / "train_list.txt").write_text("id1#a#1\nid1#b#1\n")
    (root / "test_list.txt").write_text("id2#c#1\nid3#missing#1\n")
    make([root], tmp_path / "data")
    rows = table(tmp_path / "data" / "index.csv")
    assert [(row["identity"], row["split"]) for row in rows] == [("id1", "train"), ("id1", "train"), ("id2", "test")]
    np.testing.assert_array_equal(
        np.load(tmp_path / "data" / "id2#c#1_000.npy")[1], picture(102, 128, 120, size=(256, 256))
    )
    (lost,) = table(tmp_path / "data" / "rejected.csv")
    assert "id3#missing#1" in lost["source"]
    (root / "train_list.txt").unlink()
    (root / "test_list.txt").unlink()
    assert sorted(source.key for source in find_sources([root / "256"])) == names


def test_several_processes_make_what_one_makes(tmp_path):
    videos = [film(tmp_path / f"{name}.mp4", walk(22, ground)) for name, ground in (("a", BLUE), ("b", BROWN))]
    make(videos, tmp_path / "one", tools=stand_ins_with_identity)
    make(videos, tmp_path / "two", tools=stand_ins_with_identity, workers=2)
    assert (tmp_path / "one" / "index.csv").read_bytes() == (tmp_path / "two" / "index.csv").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "one" / "b_000.npy"), np.load(tmp_path / "two" / "b_000.npy"))


def dead_worker(settings: PrepareSettings) -> Tools:
    if multiprocessing.parent_process() is not None:
        os._exit(1)
    return stand_ins(settings)


def test_a_worker_that_dies_is_told(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_text("not read")
    with pytest.raises(DeviceError, match="fewer --workers"):
        make([tmp_path], tmp_path / "data", tools=dead_worker, workers=2)


def test_a_failure_comes_whole_out_of_a_worker():
    error = pickle.loads(pickle.dumps(OutputError("the disk is full", "free some space")))
    assert str(error) == "the disk is full; free some space" and error.exit_code == 7


def test_people_are_told_by_their_embeddings_and_both_splits_have_some(tmp_path):
    grounds = {"a": BLUE, "b": BROWN, "c": BLUE}
    videos = [film(tmp_path / f"{name}.mp4", walk(ground=ground)) for name, ground in grounds.items()]
    make(videos, tmp_path / "data", tools=stand_ins_with_identity)
    rows = table(tmp_path / "data" / "index.csv")
    assert [row["identity"] for row in rows] == ["a_000", "b_000", "a_000"]
    assert {row["split"] for row in rows} == {"train", "test"}
    assert rows[0]["split"] == rows[2]["split"]


def test_training_reads_the_splits_of_the_index(tmp_path):
    data = tmp_path / "data"
    videos = [film(tmp_path / f"{name}.mp4", walk()) for name in "ab"]
    make(videos, data)
    rows = {row["split"]: row["identity"] for row in table(data / "index.csv")}
    random = np.random.default_rng(0)
    faces = synthetic_face() + random.normal(0, 0.01, (20, 478, 3))
    space = MotionSpace.fit([(faces, random.random((20, 52)))], synthetic_face())
    for held_out, split in ((False, "train"), (True, "test")):
        clips, _ = load_clips(data, space, held_out, 64)
        assert [clip.identity for clip in clips] == [rows[split]]
        assert clips[0].frames.shape == (13, 64, 64, 3)
    (data / "index.csv").unlink()
    with pytest.raises(InputError, match="broken off"):
        load_clips(data, space, False, 64)


def test_the_names_of_clips_from_two_folders_do_not_clash(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        film(tmp_path / folder / "talk.mp4", walk())
    summary, _ = make([tmp_path / "one", tmp_path / "two"], tmp_path / "data")
    assert summary.clips == 2 and len(list(tmp_path.glob("data/talk_*.npy"))) == 2
    make([tmp_path / "one", tmp_path / "two" / "talk.mp4"], tmp_path / "data")
    assert len(list(tmp_path.glob("data/talk_*.npy"))) == 2


def test_a_long_track_is_divided_evenly(tmp_path):
    video = film(tmp_path / "talk.mp4", [picture(150, 110)] * 62)
    settings = replace(SETTINGS, max_frames=15)
    outcome = prepare_source(Source(video, "talk"), tmp_path, settings, stand_ins(settings))
    assert [row["frames"] for row in outcome.clips] == [10, 10, 11]
    assert [row["start"] for row in outcome.clips] == [0.0, 0.8, 1.6]


def test_a_face_that_goes_far_or_away_begins_a_new_clip():
    still = [(i, i / 10, Box.square(100, 100, 50)) for i in range(5)]
    far = [(i, i / 10, Box.square(145, 100, 50)) for i in range(5, 8)]
    later = [(i, 2 + i / 10, Box.square(145, 100, 50)) for i in range(8, 12)]
    assert [[index for index, _, _ in run] for run in steady(still + far + later)] == [
        [0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]
    ]  # fmt: skip
    near = [(i, i / 10, Box.square(100 + 5 * i, 100, 50)) for i in range(7)]
    assert len(list(steady(near))) == 1


def test_clusters_are_people():
    random = np.random.default_rng(0)
    people = np.eye(16)[[0, 1, 0, 2, 1, 0]] + random.normal(0, 0.08, (6, 16))
    labels = cluster(people / np.linalg.norm(people, axis=1, keepdims=True))
    assert labels[0] == labels[2] == labels[5] and labels[1] == labels[4]
    assert len(set(labels)) == 3
    assert cluster(np.eye(3)[:1]) == [1]


def test_an_identity_is_in_one_split_only():
    rows = [
        {"identity": "a", "split": "train"}, {"identity": "a", "split": "test"}, {"identity": "b", "split": "test"},
    ]  # fmt: skip
    assert split_people(rows) == {"a": "train", "b": "test"}
    assert sorted(split_people([{"identity": name, "split": None} for name in "xy"]).values()) == ["test", "train"]
    assert split_people([{"identity": "a", "split": "train"}] * 2) == {"a": "train"}


def test_an_index_of_nothing_has_its_columns(tmp_path):
    write_index(tmp_path, [Outcome("a.mp4")], 0)
    assert (tmp_path / "index.csv").read_text().startswith("name,identity,split,frames,fps")


@pytest.mark.parametrize("given", ["missing.mp4", "."])
def test_an_input_that_is_missing_or_empty_is_one_clear_line(tmp_path, given):
    with pytest.raises(InputError, match="does not exist|holds no videos"):
        find_sources([tmp_path / given])


def test_a_table_without_clips_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("video\na.mp4\n")
    with pytest.raises(InputError, match="no column clip"):
        find_sources([tmp_path / "list.csv"])


@pytest.mark.parametrize(
    "text, said",
    [
        (b"clip,av_offset_frames\na.mp4,1\nb.mp4,abc\n", r"list.csv, line 3: av_offset_frames abc is no number"),
        (b"clip,av_offset_frames\na.mp4,nan\n", r"list.csv, line 2: av_offset_frames nan is no number"),
        (b"identity_cluster,clip\nanna\n", r"list.csv, line 2: no clip is named"),
        ("clip\nrésumé.mp4\n".encode("latin-1"), r"list.csv cannot be read as CSV.*in UTF-8"),
    ],
)
def test_what_is_wrong_in_a_table_is_told_with_its_line(tmp_path, text, said):
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(InputError, match=said):
        find_sources([tmp_path / "list.csv"])


def test_a_table_of_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "list.csv").write_text("clip,av_offset_frames\na.mp4,-2\n", encoding="utf-8-sig")
    (source,) = find_sources([tmp_path / "list.csv"])
    assert (source.path.name, source.sound_late) == ("a.mp4", -0.08)


def test_the_command_prepares_a_real_video(shared, tmp_path):
    """One with a face of 100 pixels; its landmarks, pose and person are stored for every frame."""
    pytest.importorskip("mediapipe")
    models = shared("models/insightface/models/scrfd500m_mbf"), shared("models/mediapipe/face_landmarker.task")
    arguments = ["prepare", shared("videos/v00.mpg"), "-o", tmp_path / "data", "--landmarker", models[1]]
    arguments += ["--identity", models[0], "--detector", "centerface", "--workers", "1"]
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'data' / 'index.csv'}\n"
    (row,) = table(tmp_path / "data" / "index.csv")
    data = dict(np.load(tmp_path / "data" / "v00_000.npz"))
    assert int(row["frames"]) == len(data["points"]) >= 36
    alike = data["embedding"] @ data["embedding"].T
    assert alike.min() > 0.6
    np.testing.assert_allclose(np.linalg.det(data["rotation"]), 1, atol=1e-4)
    nose = data["points"][:, 4, :2]
    assert nose.min() > 90 and nose.max() < 180
