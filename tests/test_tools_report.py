"""tools.report: which run fills which cell, the arithmetic, formats and pages."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refused
from PIL import Image
from scipy import stats

from engine.config import PRETRAIN, load_config, save_config
from models.semmim import describe
from tools.report import __main__ as report
from tools.report import ablation, runs
from tools.report.ablation import Ablations
from tools.report.tables import PAPER, Table
from utils import UserError

PARAMETERS = {"image_encoder": 80_000_000, "encoding_head": 5_000_000, "total": 85_000_000}
RETRIEVAL, QUESTIONS = {"rerank": {"k": 4}, "seed": 42}, {"answer": {}, "seed": 42}
COCO, FLICKR = "data/coco/annotations/coco_test.json", "data/flickr30k/annotations/flickr30k_test.json"
DEMO = "output/demo/data/retrieval_test.json"
MODEL = json.loads(json.dumps(describe(load_config(PRETRAIN.schema, (), PRETRAIN))))  # the paper's
STUDIES = sorted((Path(__file__).parent.parent / "docs/study").glob("ablation*.jsonl"))


@pytest.fixture(autouse=True)
def parameters(monkeypatch):
    monkeypatch.setattr(report, "trainable_parameters", lambda config: PARAMETERS)


def make_run(folder: Path, test_file: str, metrics: dict, config: dict | None = None, trained: bool = True, **files):
    """A run's folder as the scripts leave it, of the paper's model if the metrics name no other."""
    folder.mkdir(parents=True)
    settings = {**(RETRIEVAL if config is None else config), "data": {"test": [test_file]}}
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "metrics.json").write_text(json.dumps(metrics and {"run": {"model": MODEL}, **metrics}))
    entries = [{"step": 5, "split": "train", "loss": 3.5, "loss/cls": 1.0, "pairs_per_second": 40.0}] if trained else []
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def recalls(value: float, images: int = 5000) -> dict:
    """metrics.json of retrieval: r1 = value, r5 = value + 1, r10 = value + 2; image retrieval 10 lower."""
    row = {
        f"{side}_r{k}": value + place - 10 * (side == "ir")
        for side in ("tr", "ir")
        for place, k in enumerate((1, 5, 10))
    }
    row["r_mean"] = statistics.fmean(row.values())
    stages = {f"{stage}_{key}": x for stage in ("itm", "itc", "chance") for key, x in row.items()}
    return {"test": {**stages, "images": images, "texts": 50, "seconds": 2.0}}


def make_ablation(folder: Path, name: str, seed: int, tr: float, vqa: float) -> None:
    run = folder / name / f"seed_{seed}"
    make_run(run / "retrieval", "x/demo/data/retrieval_test.json", recalls(tr), {**RETRIEVAL, "seed": seed})
    kinds = dict.fromkeys(("by_answer_type", "by_question_type", "constant_by_question_type"), {})
    answers = {"test": {"accuracy": vqa, "constant": 30.0, "questions": 3, **kinds}}
    make_run(run / "vqa", "x/demo/data/vqa_test.json", answers, {"answer": {}, "seed": seed})
    result = {"row": name, "seed": seed, "stages": {"retrieval": {}, "vqa": {}}}
    (run / "result.json").write_text(json.dumps(result))


def all_tables(folder: Path, **options) -> list[Table]:
    return report.all_tables(runs.find_runs(folder), SimpleNamespace(**{"pairs_per_second": None, "gpus": 1} | options))


def row(table: Table, name: str) -> dict[str, str]:
    (found,) = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows if cells[0] == name]
    return found


# ------------------------------------------------------------------------------------------------- which run is what


@pytest.mark.parametrize(
    "path, name",
    [
        (COCO, "coco"),
        (FLICKR, "flickr"),
        ("/disk/VQAv2/annotations/test.json", "vqa"),
        (DEMO, "demo"),
        ("data/mine/vqa_test.json", "mine"),
        ("test.json", "test"),
    ],
)
def test_the_data_set_is_recognized_by_the_test_files_folder(path, name):
    assert runs.data_name({"train": ["a/b.json"], "test": [path]}) == name


def test_runs_without_numbers_and_folders_of_other_programs_are_left_out(tmp_path):
    make_run(tmp_path / "a", COCO, recalls(80.0))
    make_run(tmp_path / "b", COCO, {})
    make_run(tmp_path / "other", COCO, recalls(80.0), {"seed": 1})
    assert [run.folder.name for run in runs.find_runs(tmp_path)] == ["a"]
    (tmp_path / "empty").mkdir()
    refused(lambda: report.main([str(tmp_path / "empty")]), "no run in it")


def test_a_studys_table_gives_the_tables_of_its_folder(tmp_path, capsys):
    for name in ("semmim", "table4_none", "table6_15"):
        for seed in (1, 2):
            make_ablation(tmp_path / "study", name, seed, 50.0 + seed * len(name), 70.0)
    report.main([str(tmp_path / "study"), "--format", "jsonl", "--output", str(tmp_path / "study.jsonl")])
    printed = []
    for source in ("study.jsonl", "study"):
        report.main([str(tmp_path / source), "--format", "text"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "59.0 ± 4.2 (2)" in printed[0]
    (tmp_path / "bad.jsonl").write_text('{"folder": "a"}\n')
    refused(lambda: report.main([str(tmp_path / "bad.jsonl")]), "bad.jsonl: no table of runs")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_the_studies_have_three_seeds_of_ten_rows(study):
    found = Ablations(runs.find_runs(study), "zero-shot")
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


# ---------------------------------------------------------------------------------------------------------- the tables


def test_table_1_shows_all_published_rows_ours_and_the_difference(tmp_path):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    table = all_tables(tmp_path)[0]
    assert [cells[0] for cells in table.rows[:13]] == [entry["name"] for entry in PAPER["1"]["rows"]]
    assert row(table, "OSCAR (Li et al., 2020)")["Flickr30K TR R@1"] == "-"
    assert row(table, "SemMIM (the paper)")["COCO TR R@1"] == "81.5"
    ours, difference = row(table, "this code"), row(table, "difference to the paper")
    assert ours["COCO TR R@1"] == "80.5" and ours["COCO IR R@10"] == "72.5"
    assert difference["COCO TR R@1"] == "-1.0" and difference["COCO IR R@10"] == "-19.1"
    assert ours["Flickr30K TR R@1"] == "not run" and difference["Flickr30K TR R@1"] == "-"


def test_seeds_share_a_row_and_other_settings_and_repeated_seeds_get_their_own(tmp_path):
    for seed, value in ((1, 80.0), (2, 81.0)):
        make_run(tmp_path / f"a{seed}", COCO, recalls(value), {**RETRIEVAL, "seed": seed})
    make_run(tmp_path / "again", COCO, recalls(99.0), {**RETRIEVAL, "seed": 2})
    make_run(tmp_path / "b", COCO, recalls(70.0), {"rerank": {"k": 9}, "seed": 1})
    make_run(tmp_path / "f", FLICKR, recalls(90.0, 1000))
    ours = [cells for cells in all_tables(tmp_path)[0].rows if cells[0].startswith("this code")]
    assert [cells[2] for cells in ours] == ["80.5 ± 0.7 (2)", "99.0", "70.0"]
    assert [cells[8] for cells in ours] == ["90.0", "not run", "not run"]
    assert "a1 and" in ours[0][0] and ours[2][0].endswith("/b")


def test_other_kinds_and_models_are_no_seeds_of_one_experiment(tmp_path):
    other = {**recalls(50.0), "run": {"model": {**MODEL, "text_layers": 2}}}
    for seed, (metrics, trained) in enumerate([(recalls(80.0), True), (recalls(60.0), False), (other, True)]):
        make_run(tmp_path / f"{seed}", DEMO, metrics, {**RETRIEVAL, "seed": seed}, trained)
    assert [cells[3] for cells in all_tables(tmp_path)[1].rows[::3]] == ["80.0", "60.0", "50.0"]


SCORES = {"bleu4": 39.0, "meteor": 30.0, "cider": 131.0, "spice": "not computed: it needs Java"}
ANSWERS = {"val": {"accuracy": 75.0, "constant": 40.0}, "test": {"questions": 9}}
VQA = "data/vqa/vqa_test_ocr.json"


def test_captioning_and_question_answering_fill_their_columns(tmp_path):
    for name, objective in (("ce", "xe"), ("scst", "scst")):
        scores = {"test": {**SCORES, "images": 5000}}
        make_run(tmp_path / name, COCO, scores, {"scst": {}, "seed": 1, "train": {"objective": objective}})
    nocaps = {"val": {**SCORES, "cider": 98.0, "images": 4500}}
    make_run(tmp_path / "nocaps", "data/nocaps/nocaps_val.json", nocaps, {"scst": {}, "seed": 1}, trained=False)
    server = {"test_dev": 78.0, "test_std": 78.5}
    make_run(tmp_path / "vqa", VQA, ANSWERS, QUESTIONS, server=server)
    by_title = {table.title[:7]: table for table in reversed(all_tables(tmp_path))}
    captions, questions = row(by_title["Table 2"], "this code"), row(by_title["Table 3"], "this code")
    assert [captions[name] for name in ("CE C", "CIDEr opt. C", "NoCaps C")] == ["131.0", "131.0", "98.0"]
    assert captions["CE S"] == "not computed"
    assert [questions["test-dev"], questions["test-std"]] == ["78.00", "78.50"]
    difference = row(by_title["Table 3"], "difference to the paper")
    assert [difference["test-dev"], difference["test-std"]] == ["-0.12", "+0.32"]


def test_zero_shot_and_other_data_stand_apart_from_the_papers_columns(tmp_path):
    make_run(tmp_path / "zero", COCO, recalls(60.0), trained=False)
    make_run(tmp_path / "demo", DEMO, recalls(20.0))
    make_run(tmp_path / "own", FLICKR, {"test": {**SCORES, "images": 1000}}, {"scst": {}, "seed": 1, "train": {}})
    first, other, *further = all_tables(tmp_path)
    assert row(first, "this code")["COCO TR R@1"] == "not run"
    shown = [cells[1:4] for cells in other.rows if cells[1]]
    assert shown == [["demo", "fine-tuned", "20.0"], ["coco", "zero-shot", "60.0"]]
    captions = next(table for table in further if table.title == "Table 2 on other data")
    assert row(captions, f"{tmp_path.name}/own")["C"] == "131.0"


def test_answers_of_a_model_that_was_only_evaluated_stand_apart_with_every_split_that_has_an_accuracy(tmp_path):
    server = {"test_dev": 77.5, "test_std": 77.25}
    make_run(tmp_path / "vqa", VQA, ANSWERS, QUESTIONS, trained=False, server=server)
    first, other = (table for table in all_tables(tmp_path) if table.title.startswith("Table 3"))
    assert row(first, "this code")["test-dev"] == "not run"
    expected = [["val", "75.00", "40.00"], ["test-dev", "77.50", "-"], ["test-std", "77.25", "-"]]
    assert [cells[3:] for cells in other.rows] == expected


def test_zero_shot_recalls_of_an_ablation_stand_beside_the_fine_tuned_ones(tmp_path):
    for name, value in (("semmim", 50.0), ("table4_none", 45.0)):
        make_ablation(tmp_path, name, 1, value, 70.0)
        folder = tmp_path / name / "seed_1"
        make_run(folder / "zeroshot", DEMO, recalls(value - 20), {**RETRIEVAL, "seed": 1}, trained=False)
        stages = dict.fromkeys(("zeroshot", "retrieval", "vqa"), {})
        (folder / "result.json").write_text(json.dumps({"row": name, "seed": 1, "stages": stages}))
    found = {table.title: table for table in all_tables(tmp_path)}
    titles = [f"Table 4: this code by the mean of six recalls, {kind}" for kind in ("fine-tuned", "zero-shot")]
    assert [row(found[title], "w/o MIM")["test re-ranked"] for title in titles] == ["41.0", "21.0"]


@pytest.mark.parametrize(
    "metrics, why",
    [
        (recalls(80.5, 10), "10 images"),
        ({"val": recalls(80.5)["test"]}, "no test"),
        ({**recalls(80.5), "run": {"model": {**MODEL, "text_layers": 2}}}, "another model"),
        ({**recalls(80.5), "run": {}}, "unknown model"),
    ],
)
def test_other_images_and_other_models_stand_apart_from_the_papers_columns(tmp_path, metrics, why):
    make_run(tmp_path / "coco", COCO, metrics)
    make_run(tmp_path / "vqa", VQA, {**metrics, **ANSWERS}, QUESTIONS, server={"test_dev": 78.0})
    found = all_tables(tmp_path)
    costs = next(table for table in found if table.title.startswith("Table 8."))
    assert row(found[0], "this code")["COCO TR R@1"] == row(costs, "this code")["COCO TR R@1"] == "not run"
    assert found[1].rows[0][1:4] == [f"coco, {why}", "fine-tuned", "80.5"]
    if "model" in why:
        table = next(table for table in found if table.title.startswith("Table 3:"))
        assert [cells[1:5] for cells in table.rows] == [
            [f"vqa, {why}", "fine-tuned", "val", "75.00"],
            [f"vqa, {why}", "fine-tuned", "test-dev", "78.00"],
        ]


def test_an_ablation_without_answers_of_the_test_set_shows_vals_accuracy_and_says_so(tmp_path):
    make_ablation(tmp_path, "semmim", 1, 50.0, 70.0)
    (tmp_path / "semmim/seed_1/vqa/metrics.json").write_text(json.dumps(ANSWERS))
    config = {**QUESTIONS, "data": {"test": [VQA]}, "seed": 1}
    (tmp_path / "semmim/seed_1/vqa/config.yaml").write_text(json.dumps(config))
    table = next(table for table in all_tables(tmp_path) if table.title.startswith("Table 4."))
    assert row(table, "encoding (the paper)")["ours"] == "75.00" and row(table, "w/o MIM")["ours"] == "not run"
    assert "vqa on vqa, unknown model" in table.notes[0]


def test_table_8_counts_parameters_and_days(tmp_path):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    costs, parameters = all_tables(tmp_path, pairs_per_second=800.0, gpus=8)[-2:]  # 5.1M x 20 / 100 / 86,400 days
    ours = row(costs, "this code")
    assert ours["parameters"] == "85.0M" and ours["GPU days"] == "11.8" and ours["COCO TR R@1"] == "80.5"
    assert row(parameters, "total without the encoding head")["parameters"] == "80,000,000"
    assert "36.9 pairs/s per GPU" in costs.notes[0]
    assert row(all_tables(tmp_path)[-2], "this code")["GPU days"] == "not run"


# ------------------------------------------------------------------------------------------------------- the ablations


def test_ablation_effects_are_paired_by_seed_and_mean_recalls_stand_apart(tmp_path):
    for seed, best in ((1, 50.0), (2, 60.0), (3, 10.0)):
        make_ablation(tmp_path, "semmim", seed, best, 70.0)
        make_ablation(tmp_path, "table4_none", seed, best - 2 - seed, 70.0)  # differences of -3, -4, -5: t = 6.9
    for seed, value in ((1, 48.0), (2, 59.0)):
        make_ablation(tmp_path, "table5_random", seed, value, 69.0 + seed)
    found = {table.title.partition(".")[0]: table for table in all_tables(tmp_path)}
    random, guided = found["Table 5"].rows
    assert random[0] == "random" and random[1:3] == ["81.0", "-0.5"]
    assert random[3] == "53.5 ± 7.8 (2)" and random[4] == "-1.5 ± 0.7 (2)"  # -2 and -1, not against all three
    assert random[-2:] == ["70.50 ± 0.71 (2)", "+0.50 ± 0.71 (2)"]
    assert guided[3].endswith("(3)") and [guided[place] for place in (2, 4, 6, 8, 10, 12)] == ["-"] * 6
    assert next(cells for cells in found["Table 7"].rows if cells[0] == "6")[3:5] == ["not run", "-"]
    (note,) = found["Table 5"].notes
    assert note.startswith("Ours: retrieval on demo, fine-tuned; vqa on demo, fine-tuned; re-ranked; of test")
    means = found["Table 4: this code by the mean of six recalls, fine-tuned"]
    assert row(means, "encoding (the paper)")["test effect"] == "-"
    none = row(means, "w/o MIM")
    assert none["test effect"] == "-4.0* ± 1.0 (3)" and none["val effect"] == "-"
    assert none["test re-ranked"] == none["test by ITC"] == f"32.0 ± {statistics.stdev([43, 52, 1]):.1f} (3)"


# ----------------------------------------------------------------------------------------------------- the summary


def test_the_summary_shows_losses_recalls_and_accuracies(tmp_path, capsys):
    make_ablation(tmp_path, "a", 1, 50.0, 66.67)
    folder = tmp_path / "pretrain"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\nmim: {}\ndata: {train: [a/b.json]}\n")
    steps = [
        {"step": step, "split": "train", "loss/itc": loss, "pairs_per_second": 9} for step, loss in ((1, 6.5), (9, 2.5))
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 10, "cut')
    report.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "step 9, 9 pairs/s" in out and "6.500 ->    2.500" in out
    assert all(out.count(f" {value}") >= 3 for value in ("50.00", "41.00")) and " 66.67 " in out


# ------------------------------------------------------------------------------------------------- formats and pages


def test_latex_is_escaped_and_title_and_notes_are_comments():
    text = report.draw(Table("Table X. 50% & more", ["name", "R@1"], [["a_b", "1.0"]], ["a note"]), "latex")
    assert r"a\_b" in text and text.startswith("% Table X. 50% & more\n") and "\n% a note\n" in text
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text) == ["tabular"]


@pytest.mark.parametrize("kind", report.FORMATS)
def test_every_format_shows_all_tables_and_can_go_to_a_file(tmp_path, capsys, kind):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    report.main([str(tmp_path), "--format", kind])
    shown = capsys.readouterr().out
    assert [number for number in range(1, 9) if f"Table {number}." in shown] == list(range(1, 9))
    output = tmp_path / "new/folder/tables"
    report.main([str(tmp_path), "--format", kind, "--output", str(output)])
    assert output.read_text() == shown and [path.name for path in output.parent.iterdir()] == ["tables"]


def test_a_page_is_written_to_a_new_file_alone(tmp_path):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    (tmp_path / "mine.html").write_text("the user's")
    with pytest.raises(UserError, match="exists already"):
        report.main([str(tmp_path), "--format", "html", "--output", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "the user's"
    refused(lambda: report.main([str(tmp_path), "--format", "html"]), "needs --output")


def test_the_page_holds_all_tables_curves_and_settings_and_needs_no_other_file(tmp_path):
    make_ablation(tmp_path, "semmim", 1, 50.0, 70.0)
    make_ablation(tmp_path, "table4_none", 1, 45.0, 70.0)
    make_run(tmp_path / "<i>zero", DEMO, recalls(20.0))
    folder = tmp_path / "pretrain"
    (folder / "images").mkdir(parents=True)
    save_config(load_config(PRETRAIN.schema, ["train.lr=0.5"], PRETRAIN), folder / "config.yaml")
    (folder / "log.jsonl").write_text(
        "".join(f'{{"step": {n}, "split": "train", "pairs_per_second": 9, "loss": {n}}}\n' for n in (1, 2))
    )
    Image.new("RGB", (90, 50), "gray").save(folder / "images/masking_0000009.png")
    for runs_of, count, images in ((tmp_path, 8, 2 + 1), (folder, 0, 2)):  # curves; the image
        report.main([str(runs_of), "--format", "html", "--output", str(tmp_path / f"{count}.html")])
        text = (tmp_path / f"{count}.html").read_text()
        assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "<i>" not in text
        assert text.startswith("<!doctype html>") and 'name="viewport" content="width=device-width' in text
        assert all(f'id="{name}"' in text for name in re.findall(r'href="#(\w+)', text))
        assert [number for number in range(1, 9) if f"Table {number}." in text] == list(range(1, count + 1))
        assert text.count("data:image/png") == images and "masking_0000009" in text
        assert "lr: 0.5" in text
