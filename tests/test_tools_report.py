"""tools.report: which run fills which cell, the arithmetic, formats and pages."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, refused
from PIL import Image
from scipy import stats

from engine.config import PRETRAIN, load_config
from models.semmim import describe
from tools.report import __main__ as report
from tools.report import ablation, runs
from tools.report.ablation import Ablations
from tools.report.runs import Run
from tools.report.tables import PAPER, Table

PARAMETERS = {"image_encoder": 80_000_000, "encoding_head": 5_000_000, "total": 85_000_000}
MODEL = json.loads(json.dumps(describe(load_config(PRETRAIN.schema, (), PRETRAIN))))  # the paper's
OTHER = {**MODEL, "text_layers": 2}
SCORES = {"bleu4": 39.0, "meteor": 30.0, "cider": 131.0, "spice": "not computed: it needs Java"}
ANSWERS = {"accuracy": 75.0, "constant": 40.0}
TYPES = dict.fromkeys(("by_answer_type", "by_question_type", "constant_by_question_type"), {})


@pytest.fixture(autouse=True)
def parameters(monkeypatch):
    monkeypatch.setattr(report, "trainable_parameters", lambda config: PARAMETERS)


def make_run(stage="retrieval", data="demo", metrics=None, kind="fine-tuned", seed=1, model=MODEL, **more) -> Run:
    folder, settings = (more.pop(key, default) for key, default in (("folder", f"x/{data}"), ("settings", "a")))
    metrics = {**(metrics or {}), "run": {"model": model}}
    return Run(Path(folder), stage, kind, data, seed, settings, metrics, **more)


def recalls(value: float, images: int = 5000, split: str = "test") -> dict:
    """metrics.json of retrieval: r1 = value, r5 = value + 1, r10 = value + 2; image retrieval 10 lower."""
    row = {
        f"{side}_r{k}": value + place - 10 * (side == "ir")
        for side in ("tr", "ir")
        for place, k in enumerate((1, 5, 10))
    }
    row["r_mean"] = statistics.fmean(row.values())
    stages = {f"{stage}_{key}": x for stage in ("itm", "itc", "chance") for key, x in row.items()}
    return {split: {**stages, "images": images, "texts": 50, "seconds": 2.0}}


def write_run(folder: Path, config: dict, metrics: dict, log: str = "") -> Path:
    """A run's folder as the scripts leave it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"seed": 1, "data": {"test": ["data/demo/test.json"]}, **config}))
    (folder / "log.jsonl").write_text(log)
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


TRAINED = "".join(
    json.dumps({"step": step, "split": "train", "loss/itc": loss, "pairs_per_second": 9}) + "\n"
    for step, loss in ((1, 6.5), (9, 2.5))
)


def tables(*found: Run, **options) -> dict[str, Table]:
    """{title up to its first point, or whole: table}"""
    options = SimpleNamespace(**{"pairs_per_second": None, "gpus": 1} | options)
    return {table.title.partition(".")[0]: table for table in report.all_tables(list(found), options)}


def row(table: Table, name: str) -> dict[str, str]:
    (found,) = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows if cells[0] == name]
    return found


# ------------------------------------------------------------------------------------------------- which run is what


@pytest.mark.parametrize(
    "path, name",
    [
        ("data/coco/annotations/coco_test.json", "coco"),
        ("data/flickr30k/annotations/flickr30k_test.json", "flickr"),
        ("/disk/VQAv2/annotations/test.json", "vqa"),
        ("output/demo/data/retrieval_test.json", "demo"),
        ("data/mine/vqa_test.json", "mine"),
        ("test.json", "test"),
    ],
)
def test_the_data_set_is_recognized_by_the_test_files_folder(path, name):
    assert runs.data_name({"train": ["a/b.json"], "test": [path]}) == name


def test_folders_are_read_as_the_scripts_leave_them_without_those_of_other_programs(tmp_path):
    write_run(tmp_path / "a", {"rerank": {}}, recalls(80.0))
    write_run(tmp_path / "b", {"rerank": {}, "seed": 2}, recalls(80.0), TRAINED + '{"step": 10, "cut')
    write_run(tmp_path / "c", {"scst": {}, "train": {"objective": "xe"}}, {"test": SCORES}, TRAINED)
    write_run(tmp_path / "d", {"scst": {}, "train": {"objective": "scst"}}, {"test": SCORES}, TRAINED)
    vqa = write_run(tmp_path / "e/vqa", {"answer": {}}, {"val": ANSWERS}, TRAINED)
    (vqa / "server.json").write_text('{"test_dev": 78.0}')
    (vqa.parent / "result.json").write_text('{"row": "semmim", "stages": {"vqa": {}}}')
    write_run(vqa.parent / "retrieval", {"rerank": {}}, recalls(50.0))  # whose evaluation has not ended
    write_run(tmp_path / "unfinished", {"mim": {}}, {})
    write_run(tmp_path / "other", {}, recalls(80.0))
    found = runs.find_runs(tmp_path)
    assert [(run.stage, run.kind, run.seed) for run in found] == [
        ("retrieval", "zero-shot", 1),
        ("retrieval", "fine-tuned", 2),
        ("caption", "CE", 1),
        ("caption", "CIDEr opt.", 1),
        ("vqa", "fine-tuned", 1),
    ]
    assert (
        found[4].row == "semmim"
        and found[4].number("server", "test_dev") == 78.0
        and found[0].settings == found[1].settings
    )
    (tmp_path / "empty").mkdir()
    refused(lambda: runs.find_runs(tmp_path / "empty"), "no run in it")


def test_a_studys_table_gives_the_tables_of_its_folder(tmp_path, capsys):
    for name in ("semmim", "table4_none", "table6_15"):
        for seed in (1, 2):
            folder = tmp_path / "study" / name / f"seed_{seed}"
            write_run(folder / "retrieval", {"rerank": {}, "seed": seed}, recalls(50.0 + seed * len(name)), TRAINED)
            (folder / "result.json").write_text(json.dumps({"row": name, "stages": {"retrieval": {}}}))
    report.main([str(tmp_path / "study"), "--format", "jsonl", "--output", str(tmp_path / "study.jsonl")])
    printed = []
    for source in ("study.jsonl", "study"):
        report.main([str(tmp_path / source), "--format", "text"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "59.0 ± 4.2 (2)" in printed[0]
    (tmp_path / "bad.jsonl").write_text('{"folder": "a"}\n')
    refused(lambda: report.main([str(tmp_path / "bad.jsonl")]), "bad.jsonl: no table of runs")


def test_the_study_has_three_seeds_of_ten_rows():
    found = Ablations(runs.find_runs(ROOT / "docs/study/ablation.jsonl"), "zero-shot")
    rows = {row["config"] for number in ablation.NUMBERS for row in PAPER[number]["rows"]} - {"table4_dvae"}
    assert {name: len(found.of(name, "retrieval")) for name in rows} == dict.fromkeys(rows, 3)


# ------------------------------------------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize("count", [2, 3, 10, 15])
def test_an_effect_is_marked_if_a_t_test_says_so(count):
    draw = np.random.default_rng(count)
    verdicts = set()
    for shift in np.linspace(0, 2, 60):
        differences = draw.normal(shift, 1, count).tolist()
        marked = "*" in runs.show(differences, 1, effect=True)
        assert marked == (stats.ttest_1samp(differences, 0).pvalue < 0.05) and "*" not in runs.show(differences, 1)
        verdicts.add(marked)
    assert verdicts == {True, False}
    assert runs.show([5.0], 1, effect=True) == "+5.0" and runs.show([0.0, 0.0], 1, effect=True) == "+0.0 ± 0.0 (2)"


def test_only_seeds_of_equal_settings_kind_and_model_are_one_experiment_and_a_repeated_seed_is_another():
    one = [make_run(seed=1), make_run(seed=2)]
    apart = [make_run(seed=2), make_run(settings="b"), make_run(kind="zero-shot"), make_run(model=OTHER)]
    ablations = [make_run(row="semmim", settings="c"), make_run(row="table4_none", settings="d")]
    found = runs.groups([*one, *apart, *ablations, make_run("vqa")], "retrieval")
    assert found == [one, *([run] for run in apart), [ablations[0]]]


# ---------------------------------------------------------------------------------------------------------- the tables


def test_table_1_shows_all_published_rows_ours_and_the_difference():
    table = tables(make_run(data="coco", metrics=recalls(80.5)))["Table 1"]
    assert [cells[0] for cells in table.rows[:13]] == [entry["name"] for entry in PAPER["1"]["rows"]]
    assert row(table, "OSCAR (Li et al., 2020)")["Flickr30K TR R@1"] == "-"
    assert row(table, "SemMIM (the paper)")["COCO TR R@1"] == "81.5"
    ours, difference = row(table, "this code"), row(table, "difference to the paper")
    assert ours["COCO TR R@1"] == "80.5" and ours["COCO IR R@10"] == "72.5"
    assert difference["COCO TR R@1"] == "-1.0" and difference["COCO IR R@10"] == "-19.1"
    assert ours["Flickr30K TR R@1"] == "not run" and difference["Flickr30K TR R@1"] == "-"


def test_every_experiment_has_a_row_with_the_spread_of_its_seeds():
    found = [make_run(data="coco", metrics=recalls(value), seed=seed) for seed, value in ((1, 80.0), (2, 81.0))]
    found += [make_run(data="coco", metrics=recalls(70.0), settings="b", folder="x/b")]
    found += [make_run(data="flickr", metrics=recalls(90.0, 1000), settings="f")]
    ours = [cells for cells in tables(*found)["Table 1"].rows if cells[0].startswith("this code")]
    assert [cells[2] for cells in ours] == ["80.5 ± 0.7 (2)", "70.0"]
    assert [cells[8] for cells in ours] == ["90.0", "not run"]
    assert "x/coco and 2 more" in ours[0][0] and ours[1][0].endswith("x/b")


def test_captioning_and_question_answering_fill_their_columns():
    scores = {"test": {**SCORES, "images": 5000}}
    found = [make_run("caption", "coco", scores, kind) for kind in ("CE", "CIDEr opt.")]
    nocaps = {"val": {**SCORES, "cider": 98.0, "images": 4500}}
    found.append(make_run("caption", "nocaps", nocaps, "zero-shot"))
    found.append(make_run("vqa", "vqa", {"test_dev": {"server": 78.0}, "test_std": {"server": 78.5}}))
    shown = tables(*found)
    captions, questions = row(shown["Table 2"], "this code"), row(shown["Table 3"], "this code")
    assert [captions[name] for name in ("CE C", "CIDEr opt. C", "NoCaps C")] == ["131.0", "131.0", "98.0"]
    assert captions["CE S"] == "not computed" and shown["Table 2"].notes == ["S: not computed: it needs Java"]
    assert [questions["test-dev"], questions["test-std"]] == ["78.00", "78.50"]
    difference = row(shown["Table 3"], "difference to the paper")
    assert [difference["test-dev"], difference["test-std"]] == ["-0.12", "+0.32"]


@pytest.mark.parametrize(
    "data, changes, label",
    [
        ("demo", {}, "demo"),
        ("coco", {"kind": "zero-shot"}, "coco"),
        ("coco", {"metrics": recalls(80.5, 10)}, "coco, 10 images"),
        ("coco", {"metrics": recalls(80.5, split="val")}, "coco, no test"),
        ("coco", {"model": OTHER}, "coco, another model"),
        ("coco", {"model": None}, "coco, unknown model"),
    ],
)
def test_other_data_images_kinds_and_models_stand_apart_from_the_papers_columns(data, changes, label):
    found = tables(make_run(**{"data": data, "metrics": recalls(80.5), **changes}))
    assert row(found["Table 1"], "this code")["COCO TR R@1"] == "not run"
    assert row(found["Table 8"], "this code")["COCO TR R@1"] == "not run"
    kind = changes.get("kind", "fine-tuned")
    assert found["Table 1 on other data, and zero-shot"].rows[0][1:4] == [label, kind, "80.5"]


def test_scores_of_other_captions_and_every_split_of_questions_have_tables():
    metrics = {"val": ANSWERS, "test": {"questions": 9}, "test_dev": {"server": 77.5}}
    found = tables(make_run("caption", "flickr", {"test": SCORES}, "CE"), make_run("vqa", "vqa", metrics, "zero-shot"))
    assert row(found["Table 2 on other data"], "x/flickr")["C"] == "131.0"
    assert row(found["Table 3"], "this code")["test-dev"] == "not run"
    splits = found["Table 3: all splits, and other data"].rows
    assert [cells[3:] for cells in splits] == [["val", "75.00", "40.00"], ["test-dev", "77.50", "-"]]


def test_table_8_counts_parameters_and_days():
    coco = make_run(data="coco", metrics=recalls(80.5))
    found = tables(coco, pairs_per_second=800.0, gpus=8)  # 5.1M x 20 / 100 / 86,400 days
    ours = row(found["Table 8"], "this code")
    assert ours["parameters"] == "85.0M" and ours["GPU days"] == "11.8" and ours["COCO TR R@1"] == "80.5"
    modules = found["Table 8: trainable parameters per module"]
    assert row(modules, "total without the encoding head")["parameters"] == "80,000,000"
    assert "36.9 pairs/s per GPU" in found["Table 8"].notes[0]
    assert row(tables(coco)["Table 8"], "this code")["GPU days"] == "not run"


def ablations(name: str, seed: int, recall: float, vqa: float, kind: str = "fine-tuned") -> list[Run]:
    more = {"seed": seed, "row": name, "folder": f"{name}/seed_{seed}/stage"}
    answers = {"test": {**ANSWERS, "accuracy": vqa}}
    return [make_run(metrics=recalls(recall), kind=kind, **more), make_run("vqa", metrics=answers, **more)]


def test_ablation_effects_are_paired_by_seed_and_mean_recalls_stand_apart():
    found = []
    for seed, best in ((1, 50.0), (2, 60.0), (3, 10.0)):
        found += ablations("semmim", seed, best, 70.0)
        found += ablations("table4_none", seed, best - 2 - seed, 70.0)  # differences of -3, -4, -5: t = 6.9
    for seed, value in ((1, 48.0), (2, 59.0)):
        found += ablations("table5_random", seed, value, 69.0 + seed)
    shown = tables(*found)
    random, guided = shown["Table 5"].rows
    assert random[0] == "random" and random[1:3] == ["81.0", "-0.5"]
    assert random[3] == "53.5 ± 7.8 (2)" and random[4] == "-1.5 ± 0.7 (2)"  # -2 and -1, not against all three
    assert random[-2:] == ["70.50 ± 0.71 (2)", "+0.50 ± 0.71 (2)"]
    assert guided[3].endswith("(3)") and [guided[place] for place in (2, 4, 6, 8, 10, 12)] == ["-"] * 6
    assert next(cells for cells in shown["Table 7"].rows if cells[0] == "6")[3:5] == ["not run", "-"]
    (note,) = shown["Table 5"].notes
    assert note.startswith("Ours: retrieval on demo, fine-tuned; vqa on demo, fine-tuned;")
    means = shown["Table 4: this code by the mean of six recalls, fine-tuned"]
    assert row(means, "encoding (the paper)")["test effect"] == "-"
    none = row(means, "w/o MIM")
    assert none["test effect"] == "-4.0* ± 1.0 (3)" and none["val effect"] == "-"
    assert none["test re-ranked"] == none["test by ITC"] == f"32.0 ± {statistics.stdev([43, 52, 1]):.1f} (3)"


def test_test_dev_is_taken_only_if_all_runs_of_an_ablation_have_it():
    found = [run for name in ("semmim", "table4_none") for run in ablations(name, 1, 50.0, 70.0)]
    for run, shown in ((found[1], ["70.00", "70.00"]), (found[3], ["78.00", "78.00"])):
        run.metrics["test_dev"] = {"server": 78.0}
        table = tables(*found)["Table 4"]
        assert [row(table, name)["ours"] for name in ("encoding (the paper)", "w/o MIM")] == shown


def test_zero_shot_recalls_of_an_ablation_stand_beside_the_fine_tuned_ones():
    found = []
    for name, value in (("semmim", 50.0), ("table4_none", 45.0)):
        found += ablations(name, 1, value, 70.0) + ablations(name, 1, value - 20, 70.0, "zero-shot")
    titles = [f"Table 4: this code by the mean of six recalls, {kind}" for kind in ("fine-tuned", "zero-shot")]
    assert [row(tables(*found)[title], "w/o MIM")["test re-ranked"] for title in titles] == ["41.0", "21.0"]


# ------------------------------------------------------------------------------------------ summary, formats and pages


def test_the_summary_shows_losses_recalls_and_accuracies(tmp_path, capsys):
    write_run(tmp_path / "pretrain", {"mim": {}}, {}, TRAINED)
    write_run(tmp_path / "retrieval", {"rerank": {}}, recalls(50.0))
    write_run(tmp_path / "vqa", {"answer": {}}, {"test": {**ANSWERS, "questions": 3, **TYPES}})
    report.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "step 9, 9 pairs/s" in out and "6.500 ->    2.500" in out
    assert all(out.count(f" {value}") >= 3 for value in ("50.00", "41.00")) and " 75.00 " in out


def test_latex_is_escaped_and_title_and_notes_are_comments():
    text = report.draw(Table("Table X. 50% & more", ["name", "R@1"], [["a_b", "1.0"]], ["a note"]), "latex")
    assert r"a\_b" in text and text.startswith("% Table X. 50% & more\n") and "\n% a note\n" in text
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text) == ["tabular"]


@pytest.mark.parametrize("kind", report.FORMATS)
def test_every_format_shows_all_tables_and_can_go_to_a_new_file(tmp_path, capsys, kind):
    write_run(tmp_path / "run", {"rerank": {}}, recalls(80.5))
    report.main([str(tmp_path), "--format", kind])
    shown, output = capsys.readouterr().out, tmp_path / "new/folder/tables"
    assert [number for number in range(1, 9) if f"Table {number}." in shown] == list(range(1, 9))
    arguments = [str(tmp_path), "--format", kind, "--output", str(output)]
    report.main(arguments)
    assert output.read_text() == shown and [path.name for path in output.parent.iterdir()] == ["tables"]
    refused(lambda: report.main(arguments), "exists already")


def test_the_page_holds_tables_curves_and_settings_and_needs_no_other_file(tmp_path):
    write_run(tmp_path / "<i>zero", {"rerank": {}}, recalls(20.0))
    folder = write_run(tmp_path / "pretrain", {"mim": {}, "lr": 0.5}, {}, TRAINED)
    (folder / "images").mkdir()
    Image.new("RGB", (90, 50), "gray").save(folder / "images/masking_0000009.png")
    for runs_of, count in ((tmp_path, 8), (folder, 0)):
        report.main([str(runs_of), "--format", "html", "--output", str(tmp_path / f"{count}.html")])
        text = (tmp_path / f"{count}.html").read_text()
        assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "<i>" not in text
        assert text.startswith("<!doctype html>") and 'name="viewport" content="width=device-width' in text
        assert all(f'id="{name}"' in text for name in re.findall(r'href="#(\w+)', text))
        assert [number for number in range(1, 9) if f"Table {number}." in text] == list(range(1, count + 1))
        assert text.count("data:image/png") == 2 and "masking_0000009" in text  # curves, the image
        assert "&#34;lr&#34;: 0.5" in text
    refused(lambda: report.main([str(tmp_path), "--format", "html"]), "needs --output")
