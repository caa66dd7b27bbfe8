"""The page of one run: its samples are right where the data say so, its settings are those that were changed."""

import json
import re

import pytest
from PIL import Image

from engine.config import CAPTION, PRETRAIN, RETRIEVAL, VQA, load_config, save_config
from tools.report import __main__ as report
from tools.report import samples as report_samples
from tools.report import tables as report_tables
from utils import UserError

COLORS = ("red", "green", "blue", "yellow")
LOG = [{"step": step, "split": "train", "seconds": step, "loss": 9.0 / step, "loss/itc": 1.0} for step in (1, 5, 9)]


def make_run(folder, stage, metrics, overrides=(), **results):
    """A run's folder as its script leaves it."""
    folder.mkdir(parents=True)
    save_config(load_config(stage.schema, list(overrides), stage), folder / "config.yaml")
    for name, content in {"metrics": metrics, **results}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    return folder


def make_data(folder):
    """Four images of one color each, and lists for retrieval, captioning and VQA."""
    folder.mkdir()
    for color in COLORS:
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
    captions = [{"image": f"{c}.png", "caption": [f"all {c}", f"a {c} <i>"], "image_id": c} for c in COLORS]
    questions = [
        {"image": f"{c}.png", "question": "what color?", "question_id": n, "dataset": "vqa", "answer": [c] * 10}
        | {"question_type": "what", "answer_type": "other"}
        for n, c in enumerate(COLORS)
    ]
    for name, entries in (("retrieval", captions), ("caption", captions), ("vqa", questions)):
        (folder / f"{name}_test.json").write_text(json.dumps(entries))


def files(tmp_path, name):
    path = json.dumps([str(tmp_path / "data" / f"{name}_test.json")])
    return [f"data.test={path}", f"data.val={path}", "data.image_root=none"]


def recalls(value):
    row = {f"{side}_r{k}": value for side in ("tr", "ir") for k in (1, 5, 10)} | {"r_mean": value}
    return {"test": {f"{order}_{key}": x for order in ("itm", "itc", "chance") for key, x in row.items()}}


def ranked(query, items):
    return {"query": query, "ranked": items, "scores": [float(len(items) - n) for n in range(len(items))]}


def retrieval_run(tmp_path):
    """Image retrieval is right at first for all but the captions of yellow; text retrieval for red alone."""
    paths = [f"/elsewhere/{color}.png" for color in COLORS]
    others = {"red": paths, "green": paths[1:] + paths[:1], "blue": paths[2:] + paths[:2], "yellow": paths}
    by_text = [ranked(text, others[c]) for c in COLORS for text in (f"all {c}", f"a {c} <i>")]
    by_image = [ranked(path, ["all red", "a blue <i>", "all green"]) for path in paths]
    results = {"test": {"image_retrieval": by_text, "text_retrieval": by_image}}
    overrides = [*files(tmp_path, "retrieval"), "train.lr=0.5"]
    return make_run(tmp_path / "runs/retrieval", RETRIEVAL, recalls(50.0), overrides, retrieval_result=results)


def caption_run(tmp_path):
    written = [{"image_id": c, "caption": "all red" if c == "red" else "nothing of it"} for c in COLORS]
    metrics = {"test": {"cider": 80.0, "bleu4": 3.0, "spice": "not computed: no Java"}}
    overrides = [*files(tmp_path, "caption"), "eval.splits=[test]"]
    return make_run(tmp_path / "runs/caption", CAPTION, metrics, overrides, caption_result=written)


def vqa_run(tmp_path):
    answers = [{"question_id": n, "answer": "red" if n < 2 else c} for n, c in enumerate(COLORS)]
    metrics = {"test": {"questions": 4, "accuracy": 75.0, "constant": 25.0, "by_question_type": {"what": 75.0}}}
    return make_run(tmp_path / "runs/vqa", VQA, metrics, files(tmp_path, "vqa"), vqa_result=answers)


def pretrain_run(tmp_path):
    folder = make_run(tmp_path / "runs/pretrain", PRETRAIN, {"loss": 1.0})
    (folder / "images").mkdir()
    for step in (5, 9):
        Image.new("RGB", (900, 500), "gray").save(folder / f"images/masking_{step:07}.png")
    return folder


@pytest.fixture
def runs(tmp_path):
    make_data(tmp_path / "data")
    return {make(tmp_path).name: tmp_path / "runs" for make in (pretrain_run, retrieval_run, caption_run, vqa_run)}


def page_of(folder, capsys):
    report.main([str(folder), "--format", "html"])
    path = folder / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)  # nothing is loaded from elsewhere
    return text


def test_retrieval_shows_what_was_right_at_first_and_where_the_right_one_is(runs, capsys):
    text = page_of(runs["retrieval"] / "retrieval", capsys)
    assert "6 of 8 right at the first place" in text and "2 of 8 wrong at the first place" in text
    assert "1 of 4 right at the first place" in text and "3 of 4 wrong at the first place" in text
    assert "“all yellow”" in text and "<b class=right>all green</b>" in text and "its own: a yellow &lt;i&gt;" in text
    # images: four results for each of six sentences, and an image query for each image
    assert text.count("data:image/jpeg") == 6 * 4 + 4
    assert re.search(r"train\.lr</td><td>[\d.e-]+</td><td>0\.5<", text) and "curves" in text


def test_captions_and_answers_are_shown_beside_what_people_said(runs, capsys):
    text = page_of(runs["caption"] / "caption", capsys)
    best = text[text.index("highest CIDEr") : text.index("middle CIDEr")]
    assert best.index("all red") < best.index("nothing of it") and "<li>a red &lt;i&gt;</li>" in best
    assert "spice: not computed: no Java" in text
    text = page_of(runs["vqa"] / "vqa", capsys)
    assert "3 of 4 right (accuracy of at least 50%)" in text and "1 of 4 wrong (accuracy 0)" in text
    assert "people: green (10)" in text and "question type: what" in text


def test_pre_training_shows_its_last_image_and_folds_the_first(runs, capsys):
    text = page_of(runs["pretrain"] / "pretrain", capsys)
    assert text.index("masking_0000009") < text.index("<summary>the same at masking_0000005")


def test_pre_training_is_known_by_its_recall_on_val(tmp_path, capsys):
    val = {key: value for key, value in recalls(33.3)["test"].items() if key.startswith("itc")}
    folder = make_run(tmp_path / "pretrain", PRETRAIN, {"loss": 1.0, "val": val})
    text = page_of(folder, capsys)
    assert "val: mean recall 33.3, " in text and "1.000 at the end" not in text
    assert text.count("33.3") == 1 + 7  # and in a table: six recalls and their mean


def test_the_pages_of_a_folders_runs_link_to_each_other(runs, monkeypatch, capsys):
    folder = runs["vqa"]
    make_run(folder / "retrieval/second", RETRIEVAL, {})  # has no numbers yet
    monkeypatch.setattr(report, "count_parameters", lambda: {"encoding_head": 1, "total": 2})
    report.main([str(folder), "--format", "html"])
    pages = {path.name for path in (folder / "report").glob("*.html")}
    assert pages == {
        "index.html",
        "pretrain.html",
        "retrieval.html",
        "caption.html",
        "vqa.html",
        "retrieval_second.html",
    }
    for name in pages:
        found = set(re.findall(r'href="([^"#]+\.html)"', (folder / "report" / name).read_text()))
        assert found == pages - {name}
    index = (folder / "report/index.html").read_text()
    assert "4 runs with numbers, 1 more without numbers yet" in index and "accuracy 75.0" in index
    assert "no numbers yet" in (folder / "report/retrieval_second.html").read_text()


def test_data_that_are_not_the_runs_any_more_are_told(runs, tmp_path, capsys):
    data = tmp_path / "data/vqa_test.json"
    data.write_text(json.dumps(json.loads(data.read_text())[1:]))
    assert "vqa_result.json: its data have changed since" in page_of(runs["vqa"] / "vqa", capsys)
    data.unlink()
    assert f"No samples: annotation file: {data} does not exist" in page_of(runs["vqa"] / "vqa", capsys)
    for color in COLORS:
        (tmp_path / f"data/{color}.png").unlink()
    assert "(the image cannot be read)" in page_of(runs["caption"] / "caption", capsys)


def test_samples_are_spread_evenly_and_over_all_types():
    assert report_samples.spread(range(100), 4) == [12, 37, 62, 87] and report_samples.spread([7], 4) == [7]
    types = ["a"] * 50 + ["b"] * 2 + [None]
    chosen = report_samples.of_all_types(range(53), types)
    assert {types[place] for place in chosen} == {"a", "b", None} and len(set(chosen)) == len(chosen) <= 12


def test_a_folder_of_another_kind_has_no_page(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="of no stage"):
        report.main([str(tmp_path), "--format", "html"])
    assert report_tables.find_runs(tmp_path) == []
