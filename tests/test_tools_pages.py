"""The pages that people look at; in Chromium, where it is there, nothing of them sticks out of a phone's screen."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from test_tools_predict import make_sheet
from test_tools_report_run import make_data, make_run, pretrain_run, retrieval_run, vqa_run

from engine import drawing
from engine.config import PRETRAIN
from tools import pages
from tools.report import __main__ as report
from tools.visualize import __main__ as visualize

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: page} of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    make_data(folder / "data")
    runs = [make(folder) for make in (pretrain_run, retrieval_run, vqa_run)]
    make_run(folder / "runs" / ("long" * 20), PRETRAIN, {"loss": 1.0})
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "count_parameters", lambda: {"encoding_head": 1, "total": 2})
    report.main([str(folder / "runs"), "--format", "html"])
    patch.undo()
    figure = drawing.sheet("t" * 30, "what it shows", [Image.new("RGB", (1100, 300), "navy")])
    visualize.write_page(folder / "figures.html", Path("output/checkpoint.pth"), {"figure3": figure}, None)
    names = {run.name: folder / f"runs/report/{run.name}.html" for run in runs}
    names |= {"index": folder / "runs/report/index.html", "figures": folder / "figures.html"}
    return {"sheet": make_sheet(folder), **names}


def browse(arguments: list[str], folder: Path) -> str:
    """What Chromium prints for a page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)})
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")
def test_no_page_is_wider_than_a_phone_and_each_shows_something(made, tmp_path):
    report_size = "<script>addEventListener('load', () => parent.postMessage([%s, document.documentElement.scrollWidth,"
    report_size += " innerWidth, document.images.length, [...document.images].every(i => i.naturalWidth > 0)], '*'))"
    frames = []
    for name, path in made.items():
        text = path.read_text().replace('loading="lazy"', "")
        (tmp_path / f"{name}.html").write_text(
            text.replace("</body>", report_size % json.dumps(name) + "</script></body>")
        )
        frames.append(f'<iframe src="{name}.html" style="width:390px;height:800px;border:0"></iframe>')
    listen = "<script>let found = []; onmessage = e => "
    listen += "{ found.push(e.data); document.title = JSON.stringify(found) }</script>"
    around = tmp_path / "around.html"
    around.write_text(f"<title></title>{listen}{''.join(frames)}")
    printed = browse(["--dump-dom", around.as_uri()], tmp_path)
    sizes = {name: rest for name, *rest in json.loads(re.search(r"<title>(.*?)</title>", printed)[1])}
    assert sizes.keys() == made.keys()
    for name, (scroll, inner, images, complete) in sizes.items():
        assert inner == 390 and scroll <= inner and images > 0 and complete, (name, scroll, inner, images, complete)
    browse([f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,900", made["sheet"].as_uri()], tmp_path)
    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    box = ImageChops.difference(shot, Image.new("RGB", shot.size, "white")).getbbox()
    assert shot.size == (1280, 900) and box[2] - box[0] > 600 and box[3] - box[1] > 400


def test_every_page_says_its_language_and_is_as_wide_as_the_screen(made):
    for path in made.values():
        text = path.read_text()
        assert text.startswith("<!doctype html>") and 'name="viewport" content="width=device-width' in text
        assert '<html lang="en">' in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
        assert all(f'id="{name}"' in text or f"id={name}" in text for name in re.findall(r'href="?#([\w]+)', text))


def test_long_names_lose_their_middle():
    name = "the_first_half_of_a_name_" + "x" * 40 + "_its_end_0123.png"
    short = pages.shortened(name)
    assert len(short) <= 44 and name.startswith(short.split("…")[0]) and name.endswith(short.split("…")[1])
    assert pages.shortened("a.png") == "a.png"


@pytest.mark.parametrize("count, text", [(900, "1 kB"), (81_600, "82 kB"), (1_440_000, "1.4 MB")])
def test_a_files_size_is_told_in_its_unit(tmp_path, count, text):
    (tmp_path / "file").write_bytes(b"x" * count)
    assert pages.size_of(tmp_path / "file") == text


def test_tables_and_names_are_escaped():
    assert "<b>" not in pages.table(["<b>"], [["<b>"]]) and pages.slug("Table 4: a-b/ü") == "table_4_a_b_ü"
    assert "&lt;i&gt;" in pages.page("<i>", "")
