"""The main path with stand-ins for the networks and the detector, simple enough to reckon results by hand."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from painted import GREEN, RED, Acquaintance, paint

from dpe_cli import drivings, edit, preview, request
from dpe_cli.crop import cut
from dpe_cli.edit import Driver, edit_video, plan_jobs
from dpe_cli.errors import FaceError, InputError, OutputError
from dpe_cli.face import Box, Detection, FaceDetector
from dpe_cli.jobs import Job, psnr, run_jobs
from dpe_cli.motion import MotionTrack
from dpe_cli.paste import Paster, make_paster
from dpe_cli.pipeline import silent, unheard
from dpe_cli.report import Report
from dpe_cli.request import Driving, Edit, Edits, EditSettings
from dpe_cli.video import Frame, VideoInfo, probe, read_frames, read_image
from dpe_cli.writer import write_image, write_video

SKIN = (20, 220, 30)  # what the stand-in detector takes for a face


class ColourEngine:
    """Motion code: mean colour of the crop's middle. Expression paints the upper half of a crop, pose the lower."""

    def __init__(self, batch_size: int = 4):
        self.size, self.batch_size = 64, batch_size
        self.description = {"weights": "stand-in", "device": "none"}

    def lanes(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext([self])

    def forget(self) -> None:
        pass

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        return crops[:, 24:40, 24:40].mean((1, 2), dtype=np.float64).astype(np.float32)

    def edit(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        edited = crops.copy()
        for code, rows in ((expression, slice(0, 32)), (pose, slice(32, 64))):
            if code is not None:
                edited[:, rows] = np.rint(code).clip(0, 255).astype(np.uint8)[:, None, None]
        return edited


class ColourDetector:
    """Finds one face: the green square."""

    name = "colour"

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        rows, columns = np.nonzero((rgb[..., 1] > 150) & (rgb[..., 0] < 100) & (rgb[..., 2] < 110))
        if len(rows) < 100:
            return []
        box = Box(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        (x, y), side = box.centre, box.width
        shares = np.array([(-0.2, -0.15), (0.2, -0.15), (0, 0.05), (-0.15, 0.25), (0.15, 0.25)])
        return [Detection(box, shares * side + (x, y), 0.9)]


ENGINE, DETECTOR = ColourEngine(), ColourDetector()


def paster() -> Paster:
    return make_paster(ENGINE.size, DETECTOR)


def picture(face: bool = True, shade: int = 90, colour: tuple[int, int, int] = SKIN) -> np.ndarray:
    """(120, 160, 3) uint8: a grey room, with a green face unless it is empty."""
    rgb = np.full((120, 160, 3), shade, np.uint8)
    if face:
        rgb[40:80, 60:100] = colour
    return rgb


def clip(path: Path, faces: list[bool], fps: Fraction = Fraction(25), first: Fraction = Fraction(0)) -> Path:
    """A video of these frames; the room gets lighter through five frames."""
    frames = (Frame(n, first + n / fps, picture(face, 60 + 10 * (n % 5))) for n, face in enumerate(faces))
    info = VideoInfo(path, 160, 120, fps, len(faces), time_base=1 / (fps * 1000))
    write_video(frames, info, path, crf=1, preset="ultrafast")
    return path


def track(codes: list[list[float]], fps: int = 25) -> MotionTrack:
    return MotionTrack(np.arange(len(codes)) / fps, np.array(codes, np.float32))


def driver(codes: list[list[float]], fps: int = 25) -> Driver:
    """A driving without a file."""
    info = VideoInfo(Path("driver"), 160, 120, Fraction(fps), len(codes))
    return Driver(info, [Fraction(n, fps) for n in range(len(codes))], track(codes, fps))


def boxed(faces: list[bool], fps: int = 25) -> Iterator[tuple[Frame, Box | None]]:
    """Tracked source frames without a file, each with its own noise."""
    noise = np.random.default_rng(0)
    for n, face in enumerate(faces):
        rgb = noise.integers(0, 256, (120, 160, 3), dtype=np.uint8)
        yield Frame(n, Fraction(n, fps) + 3, rgb), Box(50, 30, 110, 90) if face else None


def planned(faces: list[bool], codes: list[list[float]], first_box: Box | None = None, **settings) -> list[Job]:
    drivers, driving = {Path("driver"): driver(codes)}, Driving(expression=Path("driver"))
    return list(plan_jobs(boxed(faces), drivers, driving, EditSettings(**settings), {}, first_box))


# Jobs


def test_frames_without_a_face_pass_bit_for_bit_and_in_order():
    faces = [False, True, True, False, True, False, False]
    jobs, report = planned(faces, [[255, 0, 0]]), Report()
    results = list(run_jobs(jobs, ColourEngine(3), paster(), report))
    assert [frame.index for _, frame in results] == list(range(7))
    for (before, _), (_, after), face in zip(boxed(faces), results, faces, strict=True):
        assert np.array_equal(before.rgb, after.rgb) is not face
        assert before.time == after.time
    assert [fate.fate for fate in report.frames] == ["edited" if face else "passed" for face in faces]
    assert report.counts() == {"frames": 7, "edited": 3, "passed": 4, "reasons": {"no face": 4}}


def test_lanes_end_when_their_threads_are_done_also_where_the_caller_stops_early():
    """The end of lanes changes how many threads torch has, in which those of a lane may be."""
    running, seen = [], []

    class Slow(ColourEngine):
        def edit(self, *arguments: np.ndarray | None) -> np.ndarray:
            running.append(1)
            time.sleep(0.1)
            running.pop()
            return super().edit(*arguments)

    class TwoLanes(ColourEngine):
        @contextlib.contextmanager
        def lanes(self) -> Iterator[list[ColourEngine]]:
            try:
                yield [Slow(2), Slow(2)]
            finally:
                seen.append(len(running))

    jobs = plan_jobs(boxed([True] * 20), {Path("d"): driver([[1, 2, 3]])}, Driving(Path("d")), EditSettings(), {}, None)
    frames = run_jobs(jobs, TwoLanes(2), paster(), Report())
    next(frames)
    frames.close()
    assert seen == [0]


@pytest.mark.parametrize("pasted", [True, False])
def test_threads_that_paste_change_nothing(monkeypatch: pytest.MonkeyPatch, pasted: bool):
    """Colours follow through time, so what goes on in order must not be what the threads do."""
    faces, codes = [True, True, False, True, True, True, False, True], [[255, 0, 0], [0, 90, 0], [60, 60, 200]]
    made = []
    for threads in (1, 3):
        monkeypatch.setattr("dpe_cli.jobs.FINISHERS", threads)
        report, before = Report(), threading.active_count()
        planned_jobs = planned(faces, codes, None if pasted else Box(50, 30, 110, 90))
        done = run_jobs(planned_jobs, ColourEngine(3), paster() if pasted else None, report)
        pixels = [(frame.index, frame.rgb.tobytes()) for _, frame in done]
        made.append((pixels, report.frames, report.self_reconstruction))
        assert threading.active_count() == before
    assert made[0] == made[1] and len({rgb for _, rgb in made[0][0]}) == 8


def test_pixels_outside_the_mask_are_the_sources():
    (job,) = planned([True], [[255, 0, 0]])
    ((_, after),) = run_jobs([job], ENGINE, paster(), Report())
    changed = (after.rgb != job.frame.rgb).any(-1)
    assert changed[45, 80] and not changed[:30].any() and not changed[90:].any()
    assert not changed[:, :50].any() and not changed[:, 110:].any()


@pytest.mark.parametrize(
    ("end", "colours"),
    [
        ("hold", [0, 100, 200, 200, 200, 200, 200]),
        ("loop", [0, 100, 200, 0, 100, 200, 0]),
        ("pingpong", [0, 100, 200, 100, 0, 100, 200]),
        ("trim", [0, 100, 200]),
    ],
)
def test_a_short_driving_goes_on_as_asked(end: str, colours: list[int]):
    jobs = planned([True] * 7, [[0, 0, 0], [100, 0, 0], [200, 0, 0]], driving_end=end)
    assert [round(float(job.expression[0])) for job in jobs] == colours


def test_a_driving_of_half_the_rate_is_matched_by_time():
    drivers, driving = {Path("driver"): driver([[0], [100], [200]], fps=10)}, Driving(expression=Path("driver"))
    jobs = plan_jobs(boxed([True] * 5, fps=20), drivers, driving, EditSettings(), {}, None)
    assert [float(job.expression[0]) for job in jobs] == pytest.approx([0, 50, 100, 150, 200])


def test_two_drivers_give_the_expression_and_the_pose():
    drivers = {Path("a"): driver([[200, 0, 0]]), Path("b"): driver([[0, 0, 200]])}
    driving = Driving(expression=Path("a"), pose=Path("b"))
    jobs = list(plan_jobs(boxed([True]), drivers, driving, EditSettings(), {}, Box(50, 30, 110, 90)))
    ((_, after),) = run_jobs(jobs, ENGINE, None, Report())
    assert driving.mode == "both"
    assert (after.rgb[:32] == (200, 0, 0)).all() and (after.rgb[32:] == (0, 0, 200)).all()


def test_one_driver_for_both_is_read_once():
    assert Driving(Path("a"), Path("a")).paths == [Path("a")]
    assert [Driving(Path("a")).mode, Driving(pose=Path("a")).mode] == ["exp", "pose"]
    with pytest.raises(InputError):
        Driving()


@pytest.mark.parametrize(
    ("driving", "codes", "sway", "moved"),
    [
        (Driving(pose=Path("a")), "landmarks", True, [True]),
        (Driving(Path("a"), Path("b")), "landmarks", True, [False, True]),
        (Driving(Path("a")), "landmarks", True, [False]),
        (Driving(pose=Path("a")), "landmarks", False, [False]),
        (Driving(pose=Path("a")), "encoder", True, [False]),
    ],
)
def test_heads_sway_with_the_drivings_of_the_pose(monkeypatch, driving: Driving, codes: str, sway: bool, moved):
    seen = replace(driver(np.zeros((50, 20)).tolist()), boxes=np.array([[n, 0, n + 60, 60] for n in range(50)]))
    monkeypatch.setattr(drivings, "read_driver", lambda *_: seen)
    engine = ColourEngine()
    engine.description = {**engine.description, "codes": codes}
    asked, settings = Edits((Edit(driving),)), EditSettings(sway=sway)
    drivers = drivings.read_drivers([seen.info] * len(moved), asked, engine, DETECTOR, settings, silent, unheard)
    assert [bool(one.track.codes.any()) for one in drivers] == moved


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_strength_goes_from_the_sources_own_motion_to_the_drivings(strength: float):
    jobs = planned([True, True], [[120, 130, 140]], strength=strength)
    results = run_jobs(jobs, ENGINE, None, Report())
    for job, after in results:
        own = ENGINE.motion_codes(cut(job.frame.rgb, job.box, 64)[0][None])[0]
        wanted = np.rint(own + strength * (np.array([120, 130, 140]) - own))
        assert (after.rgb[:32] == wanted.clip(0, 255)).all()


def test_the_self_reconstruction_is_measured_at_once_and_every_two_seconds():
    drivers, driving, report = {Path("d"): driver([[9, 9, 9]])}, Driving(Path("d")), Report()
    jobs = list(plan_jobs(boxed([True] * 8, fps=2), drivers, driving, EditSettings(), {}, None))
    assert [job.sampled for job in jobs] == [True, False, False, False, True, False, False, False]
    list(run_jobs(jobs, ColourEngine(5), paster(), report))
    crop = cut(jobs[0].frame.rgb, jobs[0].box, 64)[0]
    own = ENGINE.motion_codes(crop[None])
    assert len(report.self_reconstruction) == 2
    expected = psnr(ENGINE.edit(crop[None], own, None)[0], crop)
    assert report.self_reconstruction[0] == (0, pytest.approx(expected))


def test_hold_edits_at_the_last_box_and_says_so():
    jobs = planned([False, True, False], [[255, 0, 0]], on_no_face="hold")
    assert [(job.edited, job.reason) for job in jobs] == [
        (False, "no face"),
        (True, None),
        (True, "no face, last box held"),
    ]
    assert jobs[2].box == jobs[1].box


def test_fail_names_the_frame():
    with pytest.raises(FaceError, match=r"frame 1 \(3.040 s\)"):
        planned([True, False], [[0]], on_no_face="fail")


def test_a_crop_has_a_box_even_where_there_is_no_face():
    first = Box(0, 0, 40, 40)
    jobs = planned([False, True, False], [[255, 0, 0]], first_box=first)
    assert [job.box for job in jobs] == [first, Box(50, 30, 110, 90), Box(50, 30, 110, 90)]
    assert [job.edited for job in jobs] == [False, True, False]
    results = list(run_jobs(jobs, ENGINE, None, Report()))
    assert np.array_equal(results[0][1].rgb, cut(jobs[0].frame.rgb, first, 64)[0])


# Whole edits


def test_a_video_keeps_its_frames_times_and_everything_outside_the_face(tmp_path: Path):
    fps = Fraction(30000, 1001)
    source = clip(tmp_path / "source.mp4", [True, True, False, True, True, True], fps, first=Fraction(1, 2))
    driving = clip(tmp_path / "driving.mp4", [True, False, True])
    output = tmp_path / "out.mp4"
    report = edit_video(source, Driving(driving), output, ENGINE, DETECTOR)
    before, after = list(read_frames(source)), list(read_frames(output))
    assert [frame.time for frame in after] == [frame.time for frame in before]
    assert all(abs(a.rgb[:20].astype(int) - b.rgb[:20]).max() <= 6 for a, b in zip(after, before, strict=True))
    assert report.counts() == {"frames": 6, "edited": 5, "passed": 1, "reasons": {"no face": 1}}
    assert report.output["frames"] == 6 and report.frames[0].score == 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["driving.mp4", "out.mp4", "source.mp4"]


@pytest.mark.parametrize(("mode", "paste", "size"), [("pose", None, 64), ("exp", False, 64), ("both", True, 160)])
def test_a_pose_is_written_as_the_crop_unless_paste_is_asked(tmp_path: Path, mode: str, paste: bool | None, size: int):
    source, driving = clip(tmp_path / "s.mp4", [True] * 3), clip(tmp_path / "d.mp4", [True])
    drivers = Driving(None if mode == "pose" else driving, None if mode == "exp" else driving)
    report = edit_video(source, drivers, tmp_path / "o.mp4", ENGINE, DETECTOR, EditSettings(paste=paste))
    assert next(read_frames(tmp_path / "o.mp4")).rgb.shape[1] == size
    assert any("seam" in note for note in report.notes) is bool(paste)


@pytest.mark.parametrize(
    ("option", "chosen"),
    [
        ("--mask", {"mask": "ellipse"}),
        ("--feather", {"feather": 30.0}),
        ("--no-colour-match", {"colour_match": False}),
        ("--no-detail", {"detail": False, "crop_size": 128}),
        ("--parsing", {"parsing": Path("nope.onnx")}),
        ("--landmarker", {"landmarker": Path("nope.task")}),
        ("--enhancer", {"enhancer": Path("nope.onnx")}),
    ],
)
def test_how_to_paste_is_refused_where_nothing_is_pasted(option: str, chosen: dict):
    posed = Edits((Edit(Driving(pose=Path("d"))),))
    with pytest.raises(InputError, match=f"^{option} has no use for a crop.*add --paste or leave {option} out"):
        request.decide_paste(posed, EditSettings(**chosen), unheard)
    pasted = replace(EditSettings(**chosen), paste=True, crop_size=None)
    assert request.decide_paste(posed, pasted, unheard)


def test_a_region_of_a_moved_head_is_refused():
    settings = EditSettings(region="lips", paste=True)
    still, moved = Edit(Driving(Path("d"))), Edit(Driving(Path("d"), Path("d")))
    assert request.decide_paste(Edits((still,)), settings, unheard)
    for each in ((moved,), (still, moved), (Edit(Driving(pose=Path("d"))),)):
        with pytest.raises(InputError, match="leave --region or the pose out"):
            request.decide_paste(Edits(each), settings, unheard)


@pytest.mark.parametrize("size", [50, 101, 128])
def test_a_crop_is_written_as_large_as_is_asked(tmp_path: Path, size: int):
    source, driving = clip(tmp_path / "s.mp4", [True, False, True]), clip(tmp_path / "d.mp4", [True])
    settings = EditSettings(crop_size=size)
    edit_video(source, Driving(pose=driving), tmp_path / "o.mp4", ENGINE, DETECTOR, settings)
    assert [frame.rgb.shape for frame in read_frames(tmp_path / "o.mp4")] == [(size, size, 3)] * 3
    with pytest.raises(InputError, match="no size of its own; add --no-paste"):
        edit_video(source, Driving(driving), tmp_path / "p.mp4", ENGINE, DETECTOR, settings)


def test_a_still_with_a_driving_video_becomes_a_talking_portrait(tmp_path: Path):
    write_image(tmp_path / "portrait.png", picture())
    driving = clip(tmp_path / "d.mp4", [True, True, False, True], Fraction(30000, 1001))
    report = edit_video(tmp_path / "portrait.png", Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR)
    frames = list(read_frames(tmp_path / "o.mp4"))
    assert [frame.time for frame in frames] == [frame.time for frame in read_frames(driving)]
    assert frames[0].rgb.shape == (120, 160, 3) and report.counts()["edited"] == 4


def test_a_span_of_a_still_is_said_to_mean_nothing(tmp_path: Path):
    write_image(tmp_path / "portrait.png", picture())
    driving, said = clip(tmp_path / "d.mp4", [True] * 3), []
    for number, settings in enumerate((EditSettings(start=1.0), EditSettings(end=2.0), EditSettings())):
        output = tmp_path / f"{number}.mp4"
        edit_video(tmp_path / "portrait.png", Driving(driving), output, ENGINE, DETECTOR, settings, say=said.append)
    assert [("portrait.png is a picture" in line, "mean nothing" in line) for line in said] == [(True, True)] * 2


def test_an_encoding_of_a_picture_and_a_pipe_of_a_file_are_said_to_mean_nothing(tmp_path: Path):
    write_image(tmp_path / "s.png", picture())
    write_image(tmp_path / "d.png", picture(colour=(80, 200, 0)))
    cases = {
        "s.png": (EditSettings(codec="h264", nvenc=False), "videos have --codec, --[no-]nvenc: that means nothing"),
        "d.png": (EditSettings(pipe="y4m"), "is a file: it means nothing"),
        "none": (EditSettings(), None),
    }
    for name, (settings, words) in cases.items():
        said: list[str] = []
        source, output = tmp_path / "s.png", tmp_path / f"o-{name}.png"
        edit_video(source, Driving(tmp_path / "d.png"), output, ENGINE, DETECTOR, settings, say=said.append)
        assert [words in line for line in said] == [True] if words else said == []
    said = []
    video = clip(tmp_path / "v.mp4", [True] * 2)
    chosen = EditSettings(pipe="y4m", codec="h264")
    edit_video(video, Driving(tmp_path / "d.png"), tmp_path / "o.mp4", ENGINE, DETECTOR, chosen, say=said.append)
    assert [line.startswith("--pipe is the format") for line in said] == [True]


def test_a_still_driving_is_a_fixed_expression_whatever_its_end(tmp_path: Path):
    source = clip(tmp_path / "s.mp4", [True] * 5)
    write_image(tmp_path / "smile.png", picture(colour=(80, 200, 0)))
    settings = EditSettings(driving_end="trim")
    report = edit_video(source, Driving(tmp_path / "smile.png"), tmp_path / "o.mp4", ENGINE, DETECTOR, settings)
    assert report.counts()["edited"] == 5


def test_two_stills_make_a_still_and_its_preview(tmp_path: Path):
    write_image(tmp_path / "s.png", picture())
    write_image(tmp_path / "d.png", picture(colour=(90, 160, 0)))
    driving = Driving(tmp_path / "d.png")
    plain = EditSettings(colour_match=False, detail=False)
    edit_video(tmp_path / "s.png", driving, tmp_path / "o.png", ENGINE, DETECTOR, plain, preview=tmp_path / "p.png")
    result = read_image(tmp_path / "o.png")
    assert result.shape == (120, 160, 3) and tuple(result[50, 80]) == (90, 160, 0)
    assert read_image(tmp_path / "p.png").shape == (120, 480, 3)
    assert request.default_output(tmp_path / "s.png", driving) == tmp_path / "s_exp.png"


def test_start_and_end_cut_the_source_and_the_driving_begins_there(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True] * 20), clip(tmp_path / "d.mp4", [True] * 3)
    settings = EditSettings(start=0.2, end=0.4)
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, settings)
    assert [frame.time for frame in read_frames(tmp_path / "o.mp4")] == [Fraction(n, 25) for n in range(5)]
    assert [fate.time for fate in report.frames] == [0.2, 0.24, 0.28, 0.32, 0.36]


def test_trim_ends_with_the_driving(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True] * 9), clip(tmp_path / "d.mp4", [True] * 4)
    settings = EditSettings(driving_end="trim")
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, settings)
    assert report.output["frames"] == len(report.frames) == 4


def test_a_trimmed_sequence_leaves_nothing_of_a_longer_one(tmp_path: Path):
    """Unlike a span that was asked for, beside which the others stay."""
    source, driving, output = clip(tmp_path / "s.mp4", [True] * 9), clip(tmp_path / "d.mp4", [True] * 4), "o_%02d.png"
    for settings, count in ({}, 9), ({"start": 0.1, "end": 0.2}, 9), ({"driving_end": "trim"}, 4):
        chosen = EditSettings(overwrite=True, **settings)
        edit_video(source, Driving(driving), tmp_path / output, ENGINE, DETECTOR, chosen)
        assert len(list(tmp_path.glob("o_*.png"))) == count


def test_the_preview_shows_source_driving_and_result_in_step(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True] * 7), clip(tmp_path / "d.mp4", [True] * 3)
    edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, preview=tmp_path / "p.mp4")
    frames = list(read_frames(tmp_path / "p.mp4"))
    assert [frame.rgb.shape for frame in frames] == [(120, 480, 3)] * 7
    shades = [frame.rgb[5:15, 200:300].mean() for frame in frames]  # the room of the driving: 60, 70, 80, then back
    assert shades == pytest.approx([60, 70, 80, 70, 60, 70, 80], abs=3)


def test_a_failure_midway_leaves_neither_result_nor_preview(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True] * 4 + [False]), clip(tmp_path / "d.mp4", [True])
    settings = EditSettings(on_no_face="fail")
    with pytest.raises(FaceError):
        edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, settings, preview=tmp_path / "p.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.mp4", "s.mp4"]


def test_a_failure_of_the_preview_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, driving = clip(tmp_path / "s.mp4", [True] * 30), clip(tmp_path / "d.mp4", [True])

    def full_disk(frames, info, output, **options):
        raise OutputError("the disk is full", "free some space")

    monkeypatch.setattr(preview, "write_video", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, preview=tmp_path / "p.mp4")
    assert not (tmp_path / "o.mp4").exists()


def test_a_failed_write_ends_the_stages_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, driving = clip(tmp_path / "s.mp4", [True] * 30), clip(tmp_path / "d.mp4", [True])

    def full_disk(frames, info, output, **options):
        next(iter(frames))
        raise OutputError("the disk is full", "free some space")

    monkeypatch.setattr(edit, "write_video", full_disk)
    before = threading.active_count()
    with pytest.raises(OutputError, match="disk is full") as raised:
        edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR)
    assert raised.tb and threading.active_count() == before  # while the traceback still holds all of them


@pytest.mark.parametrize("empty", ["source", "driving"])
def test_a_source_or_a_driving_without_any_face_is_refused(tmp_path: Path, empty: str):
    paths = [clip(tmp_path / f"{name}.mp4", [name != empty] * 3) for name in ("source", "driving")]
    with pytest.raises(FaceError, match=f"no face was found in .*{empty}"):
        edit_video(paths[0], Driving(paths[1]), tmp_path / "o.mp4", ENGINE, DETECTOR)
    assert not (tmp_path / "o.mp4").exists()


def sound(audio: str, source_still: bool = False, silent: tuple[str, ...] = ()) -> tuple[str | None, list[str]]:
    """Name of the file whose sound is taken, and the remarks."""
    source, expression = (
        VideoInfo(Path(name), 160, 120, Fraction(25), 1, has_audio=name not in silent, is_image=still)
        for name, still in (("source", source_still), ("driving", False))
    )
    remarks: list[str] = []
    chosen = edit.sound_of(source, [Driver(expression, [Fraction(0)], track([[0]]))], audio, remarks.append)
    return chosen and chosen.name, remarks


def test_the_sound_is_the_sources_and_for_a_still_the_drivings():
    assert sound("auto") == ("source", []) and sound("auto", source_still=True, silent=("source",)) == ("driving", [])
    assert sound("driving") == ("driving", []) and sound("song.m4a") == ("song.m4a", []) and sound("none") == (None, [])
    assert sound("auto", silent=("source",)) == (None, [])
    assert sound("source", silent=("source",)) == (None, ["source has no sound: the output is silent"])


def test_sound_from_elsewhere_and_trimmed_sound_end_with_the_pictures(tmp_path: Path):
    source = replace(probe(clip(tmp_path / "s.mp4", [True] * 10, first=Fraction(1, 10))), has_audio=True)
    (tmp_path / "song.wav").write_bytes(b"")
    drivers, first, heard = [driver([[0], [1], [2]])], Fraction(1, 10), []

    def span(**settings) -> tuple[float | None, float | None]:
        target = edit.plan_target(source, drivers, EditSettings(**settings), first, heard.append)
        return tuple(None if moment is None else pytest.approx(float(moment)) for moment in (target.start, target.end))

    assert span() == (None, None)
    assert span(end=0.3) == (None, 0.3)
    assert span(driving_end="trim") == (None, 0.1 + 3 / 25)
    assert span(audio=str(tmp_path / "song.wav")) == (0.1, 0.1 + 10 / 25)
    assert span(audio=str(tmp_path / "song.wav"), start=0.2, end=0.3) == (0.2, 0.3)
    source = replace(source, duration=0.0)  # as of recorders that write into a pipe
    assert span(audio=str(tmp_path / "song.wav")) == (0.1, 0.1 + 10 / 25)
    first = Fraction(1, 5)  # of the span
    assert span(audio=str(tmp_path / "song.wav"), start=0.2) == (0.2, 0.1 + 10 / 25)


def test_the_sound_of_a_talking_portrait_ends_with_its_pictures(tmp_path: Path):
    write_image(tmp_path / "s.png", picture())
    long, short = (driver([[0]] * frames) for frames in (5, 3))
    clocked = replace(long, info=replace(long.info, path=clip(tmp_path / "d.mp4", [True] * 5), has_audio=True))
    (tmp_path / "song.wav").write_bytes(b"")

    def end(*drivers: Driver, **settings) -> float | None:
        portrait = probe(tmp_path / "s.png")
        target = edit.plan_target(portrait, list(drivers), EditSettings(**settings), Fraction(0), unheard)
        assert target.start is None and target.still
        return target.end

    assert end(clocked) is None  # its own sound, as it is
    assert end(clocked, audio=str(tmp_path / "song.wav")) == pytest.approx(5 / 25)
    assert end(clocked, short, driving_end="trim") == pytest.approx(3 / 25)
    assert end(clocked, short, driving_end="trim", audio=str(tmp_path / "song.wav")) == pytest.approx(3 / 25)
    late = replace(clocked, times=[time + Fraction(1, 2) for time in clocked.times])
    assert end(late, audio=str(tmp_path / "song.wav")) == pytest.approx(0.5 + 5 / 25)


def test_outputs_are_checked_before_the_work(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True]), clip(tmp_path / "d.mp4", [True])
    (tmp_path / "there.mp4").write_bytes(b"old")

    def refused(output: Path, **settings) -> str:
        with pytest.raises(OutputError) as caught:
            edit_video(source, Driving(driving), output, ENGINE, DETECTOR, EditSettings(**settings))
        return str(caught.value)

    assert "add --overwrite" in refused(tmp_path / "there.mp4")
    assert "also an input" in refused(source, overwrite=True)
    assert "does not exist" in refused(tmp_path / "no" / "o.mp4")
    assert "a folder" in refused(tmp_path)
    assert ".mp4, .mov or .mkv" in refused(tmp_path / "o.avi")
    assert ".mp4, .mov or .mkv" in refused(tmp_path / "o.png")
    assert (tmp_path / "there.mp4").read_bytes() == b"old"


def test_a_report_is_json_with_a_line_for_each_frame(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True, False, True]), clip(tmp_path / "d.mp4", [True])
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, EditSettings(strength=0))
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert [frame["fate"] for frame in written["frames"]] == ["edited", "passed", "edited"]
    assert written["frames"][1]["reason"] == "no face" and written["frames"][0]["strength"] == 0
    assert written["counts"]["edited"] == 2 and written["self_reconstruction"]["samples"] == 1
    assert written["engine"]["weights"] == "stand-in" and written["settings"]["mode"] == "exp"
    assert "frames" not in report.summary()
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


def test_progress_sees_each_frame_once(tmp_path: Path):
    source, driving = clip(tmp_path / "s.mp4", [True] * 5), clip(tmp_path / "d.mp4", [True] * 2)
    seen = {}

    def progress(items, total, what):
        for count, item in enumerate(items, 1):
            seen[what] = (count, total)
            yield item

    edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, DETECTOR, progress=progress)
    assert seen == {"reading d.mp4": (2, 2), "editing s.mp4": (5, 5)}


# Shots and people


def film(path: Path, frames: list[Frame]) -> Path:
    """A video of painted people."""
    info = VideoInfo(path, 640, 480, Fraction(25), len(frames), time_base=Fraction(1, 25000))
    write_video(frames, info, path, crf=1, preset="ultrafast")
    return path


def three_shots(path: Path) -> Path:
    """15 frames with red, 10 with nobody, 12 with red and a larger green."""
    one = [paint(n, {RED: (200 + n, 240, 120)}, shade=60) for n in range(15)]
    two = [paint(n, {}, shade=130) for n in range(15, 25)]
    three = [paint(n, {RED: (480, 200, 80), GREEN: (180, 260, 160)}, shade=210) for n in range(25, 37)]
    return film(path, one + two + three)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[np.ndarray]]:
    """The pictures of each video that is written, as they go to the encoder."""
    videos: list[list[np.ndarray]] = []

    def note(frames, info, output, **options):
        videos.append([])

        def noted():
            for frame in frames:
                videos[-1].append(frame.rgb)
                yield frame

        return write_video(noted(), info, output, **{**options, "preset": "ultrafast"})

    monkeypatch.setattr(edit, "write_video", note)
    return videos


def smile(path: Path, colour: tuple[int, int, int]) -> Path:
    """A still driving whose motion code is this colour: a painted person in it would be of that colour."""
    write_image(path, picture(colour=colour))
    return path


class Guests:
    """Painted people, and the green square of the drivings, which is small."""

    name = "guests"

    def __init__(self, people: FaceDetector | None = None):
        self.people, self.driving = people or Acquaintance(), ColourDetector()
        self.embed = Acquaintance().embed

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        return (self.driving if rgb.shape[:2] == (120, 160) else self.people).detect(rgb)


def test_three_shots_are_counted_right_and_passed_frames_are_the_sources(tmp_path: Path, written: list):
    source, driving = three_shots(tmp_path / "s.mp4"), smile(tmp_path / "d.png", (90, 160, 0))
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, Guests())
    assert report.counts() == {"frames": 37, "edited": 27, "passed": 10, "reasons": {"no face": 10}}
    assert report.cuts == [0.6, 1.0]
    tracks = [frame.track for frame in report.frames]
    assert tracks == [1] * 15 + [None] * 10 + [3] * 12  # red, in the last shot to the right of green
    for frame, before, after in zip(report.frames, read_frames(source), written[0], strict=True):
        assert np.array_equal(before.rgb, after) is (frame.fate == "passed")
        assert np.array_equal(before.rgb[:100], after[:100])


def test_a_shot_with_somebody_else_alone_is_passed_and_says_so(tmp_path: Path):
    one = [paint(n, {RED: (200, 240, 120)}, shade=60) for n in range(15)]
    two = [paint(n, {GREEN: (200, 240, 120)}, shade=130) for n in range(15, 25)]
    source, driving = film(tmp_path / "s.mp4", one + two), smile(tmp_path / "d.png", (90, 160, 0))
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, Guests())
    assert report.counts()["reasons"] == {"only other faces": 10} and report.counts()["edited"] == 15


def test_a_box_is_not_held_across_a_cut(tmp_path: Path):
    source, driving = three_shots(tmp_path / "s.mp4"), smile(tmp_path / "d.png", (90, 160, 0))
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, Guests(), EditSettings(on_no_face="hold"))
    assert report.counts()["reasons"] == {"no face": 10}


def pair(path: Path, apart: int) -> Path:
    """Ten frames of red and green, so far apart."""
    people = lambda n: {RED: (250 + n, 240, 100), GREEN: (250 + apart, 240 - n, 100)}  # noqa: E731
    return film(path, [paint(n, people(n)) for n in range(10)])


def edits_of_two(folder: Path, strength: float = 1.0) -> list[Edit]:
    red, blue = smile(folder / "one.png", (90, 200, 0)), smile(folder / "two.png", (0, 160, 100))
    return [Edit(Driving(red), "left"), Edit(Driving(pose=blue), "right", strength)]


def test_two_edits_in_one_pass_equal_two_single_runs_inside_their_masks(tmp_path: Path, written: list):
    source, (left, right) = pair(tmp_path / "s.mp4", 220), edits_of_two(tmp_path, 0.5)
    report = edit_video(source, Edits((left, right)), tmp_path / "both.mp4", ENGINE, Guests())
    for one, name in ((left, "l.mp4"), (right, "r.mp4")):
        settings = EditSettings(face=one.face, strength=one.strength, paste=True)
        edit_video(source, one.driving, tmp_path / name, ENGINE, Guests(), settings)
    for before, both, first, second in zip(read_frames(source), *written, strict=True):
        masks = [(alone != before.rgb).any(-1) for alone in (first, second)]
        assert masks[0].sum() > 1000 and masks[1].sum() > 1000 and not (masks[0] & masks[1]).any()
        assert np.array_equal(both[masks[0]], first[masks[0]]) and np.array_equal(both[masks[1]], second[masks[1]])
        nobody = ~masks[0] & ~masks[1]
        assert np.array_equal(both[nobody], before.rgb[nobody])
    assert report.counts() == {"frames": 10, "edited": 10, "passed": 0, "reasons": {}, "edits": [10, 10]}
    lines = [(frame.index, frame.edit, frame.track, frame.strength) for frame in report.frames]
    assert lines == [line for n in range(10) for line in ((n, 0, 1, 1.0), (n, 1, 2, 0.5))]


def test_where_edits_overlap_the_later_one_is_on_top(tmp_path: Path, written: list):
    source, (left, right) = pair(tmp_path / "s.mp4", 120), edits_of_two(tmp_path)
    for number, each in enumerate(((left,), (right,), (left, right), (right, left))):
        settings = EditSettings(paste=True, detail=False)  # the frame's detail is that of the edit below
        edit_video(source, Edits(each), tmp_path / f"{number}.mp4", ENGINE, Guests(), settings)
    before, only_left, only_right, right_last, left_last = (video[5] for video in ([f.rgb for f in read_frames(source)], *written))  # fmt: skip  # noqa: E501
    masks = [(alone != before).any(-1) for alone in (only_left, only_right)]
    common = masks[0] & masks[1]
    assert common.any() and (right_last[common] != left_last[common]).any()
    for alone, last in ((only_left, left_last), (only_right, right_last)):
        agree = (alone == last).all(-1)[common]
        assert agree.mean() > 0.5  # all but the soft edge


def test_several_edits_end_with_the_first_driving_that_is_trimmed(tmp_path: Path):
    source, (left, right) = pair(tmp_path / "s.mp4", 220), edits_of_two(tmp_path)
    short = replace(right, driving=Driving(clip(tmp_path / "d.mp4", [True] * 4)))
    for number, each in enumerate(((left, short), (short, left))):
        settings = EditSettings(driving_end="trim")
        report = edit_video(source, Edits(each), tmp_path / f"{number}.mp4", ENGINE, Guests(), settings)
        assert report.output["frames"] == 4 and len(report.frames) == 8


def test_several_edits_do_not_go_into_one_crop(tmp_path: Path):
    source, each = pair(tmp_path / "s.mp4", 220), edits_of_two(tmp_path)
    with pytest.raises(InputError, match="several edits"):
        edit_video(source, Edits(tuple(each)), tmp_path / "o.mp4", ENGINE, Guests(), EditSettings(paste=False))


def test_a_track_has_its_number_from_the_start_of_the_file(tmp_path: Path):
    source, driving = three_shots(tmp_path / "s.mp4"), smile(tmp_path / "d.png", (90, 160, 0))
    settings = EditSettings(face="track:2", start=0.8, end=1.2)
    report = edit_video(source, Driving(driving), tmp_path / "o.mp4", ENGINE, Guests(), settings)
    assert [frame.track for frame in report.frames] == [None] * 5 + [2] * 5  # green
    assert [frame.index for frame in report.frames] == list(range(10))
    assert [frame.time for frame in report.frames] == pytest.approx([0.8 + n / 25 for n in range(10)])
