"""The page of a report: looked at as a browser would, by its elements."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from test_edit import ColourDetector, ColourEngine, clip, picture

from dpe_cli.edit import edit_video
from dpe_cli.errors import InputError, OutputError
from dpe_cli.main import cli
from dpe_cli.page import COLUMNS, jitter, page, plot, polylines, write_page
from dpe_cli.request import Driving, EditSettings
from dpe_cli.writer import write_image


class Elements(HTMLParser):
    """All elements of a page: (tag, attributes); and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """A folder with talk.mp4, its edit and report.json; a second and a bit, two frames without a face."""
    faces = [True] * 8 + [False] * 2 + [True] * 20
    source, driving = clip(tmp_path / "talk.mp4", faces), clip(tmp_path / "<smile> & co.mp4", [True])
    report = edit_video(source, Driving(driving), tmp_path / "out.mp4", ColourEngine(), ColourDetector())
    report.write(tmp_path / "report.json")
    return tmp_path


def made(folder: Path) -> tuple[str, Elements]:
    write_page(folder / "report.json", folder / "page.html", overwrite=True)
    html = (folder / "page.html").read_text(encoding="utf-8")
    return html, Elements(html)


def test_the_report_has_a_line_of_json_for_each_frame(reported: Path):
    lines = (reported / "report.json").read_text().splitlines()
    frames = [json.loads(line.rstrip(",")) for line in lines if line.startswith("  {")]
    assert [frame["index"] for frame in frames] == list(range(30))
    assert frames == json.loads((reported / "report.json").read_text())["frames"]
    assert frames[0]["fate"] == "edited" and frames[0]["track"] == 1 and frames[0]["seam"] > 0
    assert frames[0]["seam"] == pytest.approx(frames[0]["colour_step"] + frames[0]["gradient_step"], abs=0.002)
    assert (frames[8]["fate"], frames[8]["reason"], frames[8]["seam"]) == ("passed", "no face", None)


def test_the_page_shows_plots_and_the_worst_frames_and_asks_no_network(reported: Path):
    html, elements = made(reported)
    assert (
        len(elements.all("svg")) == 3 and len(elements.all("polyline")) == 2 * 3
    )  # broken by the frames without a face
    assert "30: 28 edited, 2 passed, 2 x no face" in elements.text
    images = elements.all("img")
    times = sorted(float(time) for time in re.findall(r"frame \d+, ([\d.]+) s", elements.text))
    assert len(images) == 2 * len(times) >= 4 and min(np.diff(times)) >= 0.5
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    outside = [
        value
        for _, attributes in elements.found
        for value in attributes.values()
        if re.match(r"\w+://|//", value or "")
    ]
    assert not outside and not elements.all("script") and not elements.all("link") and "@import" not in html
    report = json.loads((reported / "report.json").read_text())
    worst = report["frames"][report["seam"]["worst_frame"]]
    assert elements.text.index(f"frame {worst['index']},") < len(elements.text)
    assert f"seam {worst['seam']}" in elements.text


def test_names_are_shown_and_not_obeyed(reported: Path):
    html, elements = made(reported)
    assert "<smile> & co.mp4" in elements.text and "<smile>" not in html


def test_pictures_that_are_gone_are_noted(reported: Path):
    (reported / "out.mp4").unlink()
    (reported / "talk.mp4").write_text("not a video any more")
    _, elements = made(reported)
    assert not elements.all("img") and elements.text.count("no picture: ") >= 4 and len(elements.all("svg")) == 3


def test_the_pictures_are_those_of_the_frame(reported: Path):
    """The room gets lighter through five frames: the picture tells which frame it is."""
    _, elements = made(reported)
    captions = re.findall(r"frame (\d+),", elements.text)
    for index, image in zip(captions, elements.all("img")[::2], strict=True):
        data = np.frombuffer(base64.b64decode(image["src"].partition(",")[2]), np.uint8)
        shade = cv2.imdecode(data, cv2.IMREAD_COLOR)[:10].mean()
        assert shade == pytest.approx(60 + 10 * (int(index) % 5), abs=4)


def test_a_cut_out_part_of_the_source_has_its_own_times(reported: Path):
    settings = EditSettings(start=0.6, end=1.0)
    driving = Driving(reported / "<smile> & co.mp4")
    report = edit_video(
        reported / "talk.mp4", driving, reported / "part.mp4", ColourEngine(), ColourDetector(), settings
    )
    report.write(reported / "report.json")
    _, elements = made(reported)
    assert "0.60 s" in elements.text and len(elements.all("img")) == 2


def test_an_edit_without_paste_back_has_no_seam_to_plot(reported: Path):
    driving = Driving(pose=reported / "talk.mp4")
    edit_video(reported / "talk.mp4", driving, reported / "pose.mp4", ColourEngine(), ColourDetector()).write(
        reported / "report.json"
    )
    _, elements = made(reported)
    assert "not measured in this edit" in elements.text and len(elements.all("svg")) == 2 and elements.all("img")


def test_heads_that_turn_the_most_are_shown(reported: Path):
    report = json.loads((reported / "report.json").read_text())
    for each in report["frames"]:
        each["turn"], each["seam"] = (abs(each["index"] - 20) if each["fate"] == "edited" else None), None
    (reported / "report.json").write_text(json.dumps({**report, "seam": None}))
    _, elements = made(reported)
    assert "Turn that is asked of the head (degrees)" in elements.text and len(elements.all("svg")) == 3
    first = re.search(r"frame (\d+), [\d.]+ s, source and output, .*?turn (\d+)", elements.text)
    assert first.groups() == ("0", "20")


def test_each_of_several_edits_has_its_own_lines(reported: Path):
    report = json.loads((reported / "report.json").read_text())
    report["frames"] = [{**each, "edit": edit} for each in report["frames"] for edit in (0, 1)]
    (reported / "report.json").write_text(json.dumps(report))
    _, elements = made(reported)
    for number in (1, 2):
        assert f"Seam score, edit {number}" in elements.text and f"crop box, edit {number}" in elements.text
    assert len(elements.all("svg")) == 2 * 3 and len(elements.all("polyline")) == 2 * 3 * 2  # jitter is among them


def test_numbered_pictures_are_found_at_their_rate(tmp_path: Path):
    for number in range(1, 16):
        write_image(tmp_path / f"p_{number:02}.png", picture(shade=60 + 10 * number))
    source, output = tmp_path / "p_%02d.png", tmp_path / "out_%02d.png"
    settings = EditSettings(fps="5")
    report = edit_video(source, Driving(tmp_path / "p_01.png"), output, ColourEngine(), ColourDetector(), settings)
    report.write(tmp_path / "report.json")
    html, elements = made(tmp_path)
    captions = re.findall(r"frame (\d+),", elements.text)
    assert len(captions) >= 2 and "no picture" not in html
    for index, images in zip(captions, zip(*[iter(elements.all("img"))] * 2, strict=True), strict=True):
        for image in images:
            data = np.frombuffer(base64.b64decode(image["src"].partition(",")[2]), np.uint8)
            shade = cv2.imdecode(data, cv2.IMREAD_COLOR)[:10].mean()
            assert shade == pytest.approx(60 + 10 * (int(index) + 1), abs=4)


def frame(n: int, x: float, track: int = 0) -> dict:
    return {"index": n, "time": n / 25, "fate": "edited", "box": [x, 0, x + 100, 100], "track": track}


def test_jitter_is_the_way_off_an_even_motion():
    even = [frame(n, 5.0 * n) for n in range(5)]
    assert jitter(even) == [None, 0, 0, 0, None]
    shaken = [*even[:2], frame(2, 13.0), *even[3:]]
    assert jitter(shaken) == [None, pytest.approx(1.5), pytest.approx(3), pytest.approx(1.5), None]
    assert jitter([*even[:2], frame(2, 10.0, track=1), *even[3:]]) == [None] * 5
    assert jitter([*even[:2], {**even[2], "box": None}, *even[3:]]) == [None] * 5


def test_a_long_line_keeps_its_peaks():
    count = 10 * COLUMNS
    values = [0.0] * count
    values[1234] = 7.0
    (line,) = polylines([float(n) for n in range(count)], [7 - value for value in values], values)
    assert len(line.split()) == COLUMNS and "1234.0,0.0" in line
    assert len(plot("x", "", [frame(n, 0) for n in range(count)], values)) < 60_000


def test_a_report_of_nothing_edited_makes_a_page_too(reported: Path):
    report = json.loads((reported / "report.json").read_text())
    report["frames"] = [
        {**each, "fate": "passed", "seam": None, "score": None, "box": None} for each in report["frames"]
    ]
    assert "No frame was edited" in page(report)


def test_the_command_writes_beside_the_report_and_spares_what_is_there(reported: Path):
    run = lambda *words: CliRunner().invoke(cli, ["report", *map(str, words)])  # noqa: E731
    done = run(reported / "report.json")
    assert (done.exit_code, done.stdout) == (0, f"{reported / 'report.html'}\n")
    assert run(reported / "report.json").exit_code == 7
    assert run(reported / "report.json", "--overwrite").exit_code == 0
    assert run(reported / "missing.json").exit_code == 3
    assert run(reported / "talk.mp4").exit_code == 3


def test_what_is_no_report_is_refused(tmp_path: Path):
    for text in ("", "[]", "{}", '{"counts": {}, "frames": [1]}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InputError, match="no report"):
            write_page(tmp_path / "r.json", tmp_path / "p.html")
    (tmp_path / "p.html").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        write_page(tmp_path / "r.json", tmp_path / "p.html")


def test_a_page_does_not_replace_its_report(reported: Path):
    before = (reported / "report.json").read_bytes()
    done = CliRunner().invoke(
        cli, ["report", str(reported / "report.json"), "-o", str(reported / "report.json"), "--overwrite"]
    )
    assert done.exit_code == 7 and "is also an input" in done.stderr
    assert (reported / "report.json").read_bytes() == before
