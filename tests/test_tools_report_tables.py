"""The paper's tables beside this code's numbers: which run fills which cell, the arithmetic, every format, the page."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_1samp  # of scikit-learn

from tools import charts
from tools.charts import Bar
from tools.report import __main__ as report
from tools.report import ablation as report_ablation
from tools.report import charts as report_charts
from tools.report import formats as report_formats
from tools.report import tables as report_tables
from tools.report.tables import Stat, Table
from utils import UserError

PAPER = report_tables.read_paper()["tables"]
PARAMETERS = {"image_encoder": 80_000_000, "encoding_head": 5_000_000, "total": 85_000_000}
RETRIEVAL = {"rerank": {"k": 4}, "seed": 42}
COCO, FLICKR = "data/coco/annotations/coco_test.json", "data/flickr30k/annotations/flickr30k_test.json"


def make_run(folder: Path, test_file: str, metrics: dict, config: dict | None = None, trained: bool = True, **files):
    """A run's folder as the scripts leave it."""
    folder.mkdir(parents=True)
    settings = {**(RETRIEVAL if config is None else config), "data": {"test": [test_file]}}
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "metrics.json").write_text(json.dumps(metrics))
    entries = [{"step": 5, "split": "train", "loss": 3.5, "loss/cls": 1.0, "pairs_per_second": 40.0}] if trained else []
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def recalls(value: float) -> dict:
    """metrics.json of retrieval: r1 = value, r5 = value + 1, r10 = value + 2; image retrieval 10 lower."""
    row = {
        f"{side}_r{k}": value + place - 10 * (side == "ir")
        for side in ("tr", "ir")
        for place, k in enumerate((1, 5, 10))
    }
    row["r_mean"] = statistics.fmean(row.values())
    stages = {f"{stage}_{key}": x for stage in ("itm", "itc", "chance") for key, x in row.items()}
    return {"test": {**stages, "images": 10, "texts": 50, "seconds": 2.0}}


def tables(folder: Path, **options) -> list[Table]:
    return report.all_tables(folder, report_tables.find_runs(folder), PARAMETERS, **options)


def row(table: Table, name: str) -> dict[str, str]:
    found = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows if cells[0] == name]
    assert len(found) == 1, [cells[0] for cells in table.rows]
    return found[0]


def ablation(folder: Path, name: str, seed: int, tr: float, vqa: float) -> None:
    run = folder / name / f"seed_{seed}"
    make_run(run / "retrieval", "x/demo/data/retrieval_test.json", recalls(tr), {**RETRIEVAL, "seed": seed})
    answers = {"test": {"accuracy": vqa, "constant": 30.0}}
    make_run(run / "vqa", "x/demo/data/vqa_test.json", answers, {"answer": {}, "seed": seed})
    result = {"row": name, "seed": seed, "stages": {"retrieval": {}, "vqa": {}}}
    (run / "result.json").write_text(json.dumps(result))


# ------------------------------------------------------------------------------------------------- which run is what


@pytest.mark.parametrize(
    "path, name",
    [
        (COCO, "coco"),
        (FLICKR, "flickr"),
        ("/disk/karpathy/dataset_coco.json", "coco"),
        ("/disk/karpathy/dataset_flickr30k.json", "flickr"),
        ("data/nocaps/nocaps_val.json", "nocaps"),
        ("data/vqa/vqa_test_ocr.json", "vqa"),
        ("output/demo/data/retrieval_test.json", "demo"),
        ("output/demo/data/vqa_test.json", "demo"),
        ("data/easyvqa/vqa_test.json", "easyvqa"),
        ("test.json", "test"),
    ],
)
def test_the_data_set_is_told_by_the_test_files_folder_or_name(path, name):
    assert report_tables.data_name({"data": {"train": ["a/b.json"], "test": [path]}}) == name


def test_an_unfinished_run_gives_no_number(tmp_path):
    make_run(tmp_path / "a", COCO, recalls(80.0))
    (tmp_path / "a/metrics.json").unlink()
    ablation(tmp_path, "semmim", 1, 50.0, 60.0)
    (tmp_path / "semmim/seed_1/result.json").write_text(json.dumps({"row": "semmim", "stages": {"vqa": {}}}))
    assert [run.stage for run in report_tables.find_runs(tmp_path)] == ["vqa"]


def test_a_run_that_a_later_one_put_aside_is_no_second_seed(tmp_path):
    make_run(tmp_path / "a", COCO, recalls(80.0))
    make_run(tmp_path / "a/earlier_1", COCO, recalls(60.0))
    assert [run.folder for run in report_tables.find_runs(tmp_path)] == [tmp_path / "a"]
    assert len(report_tables.find_runs(tmp_path / "a/earlier_1")) == 1  # asked for by its name


# ------------------------------------------------------------------------------------------------------ the arithmetic


def test_mean_and_sample_deviation_over_seeds():
    values = [80.0, 81.0, 83.0]
    assert Stat.of(values) == Stat(statistics.mean(values), statistics.stdev(values), 3)
    assert Stat.of(values).show(1) == "81.3 ± 1.5 (3)" and Stat.of([2.0]).show(2, effect=True) == "+2.00"
    assert Stat.of([]) is None and report_tables.show(None, 1) == "not run"


@pytest.mark.parametrize("count", [2, 3, 4, 6, 10, 15])
def test_an_effect_is_marked_where_a_t_test_says_so(count):
    draw = np.random.default_rng(count)
    verdicts = set()
    for shift in np.linspace(0, 2, 60):
        differences = draw.normal(shift, 1, count)
        expected = ttest_1samp(differences, 0).pvalue < 0.05
        found = Stat.of(differences)
        if count <= 10:  # beyond, the last quantile of the table is a little strict
            assert found.differs_from_zero() == expected
        assert expected or not found.differs_from_zero()
        assert ("*" in found.show(1, effect=True)) == found.differs_from_zero() and "*" not in found.show(1)
        verdicts.add(found.differs_from_zero())
    assert verdicts == {True, False}
    assert not Stat.of([5.0]).differs_from_zero() and not Stat.of([0.0, 0.0]).differs_from_zero()


def test_gpu_days_follow_the_formula():
    assert report_tables.gpu_days(100.0) == pytest.approx(5.1e6 * 20 / 100 / 86400)
    assert report_tables.gpu_days(800.0, gpus=8) == pytest.approx(report_tables.gpu_days(100.0))
    assert report_tables.implied_pairs_per_second(report_tables.gpu_days(123.0)) == pytest.approx(123)


def test_table_1_shows_all_published_rows_ours_and_the_difference(tmp_path):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    table = tables(tmp_path)[0]
    assert [cells[0] for cells in table.rows[:13]] == [entry["name"] for entry in PAPER["1"]["rows"]]
    assert row(table, "OSCAR (Li et al., 2020)")["Flickr30K TR R@1"] == "-"
    assert row(table, "SemMIM (the paper)")["COCO TR R@1"] == "81.5"
    ours, difference = row(table, "this code"), row(table, "difference to the paper")
    assert ours["COCO TR R@1"] == "80.5" and ours["COCO IR R@10"] == "72.5"
    assert difference["COCO TR R@1"] == "-1.0" and difference["COCO IR R@10"] == "-19.1"
    assert ours["Flickr30K TR R@1"] == "not run" and difference["Flickr30K TR R@1"] == "-"


def test_seeds_share_a_row_and_other_settings_get_their_own(tmp_path):
    for seed, value in ((1, 80.0), (2, 81.0)):
        make_run(tmp_path / f"a{seed}", COCO, recalls(value), {**RETRIEVAL, "seed": seed})
    make_run(tmp_path / "b", COCO, recalls(70.0), {"rerank": {"k": 9}, "seed": 1})
    make_run(tmp_path / "f", FLICKR, recalls(90.0))
    ours = [cells for cells in tables(tmp_path)[0].rows if cells[0].startswith("this code")]
    assert [cells[2] for cells in ours] == ["80.5 ± 0.7 (2)", "70.0"]
    assert [cells[8] for cells in ours] == ["90.0", "not run"]
    assert "a1 and" in ours[0][0] and ours[1][0].endswith("/b")


def test_a_seed_that_was_run_again_is_no_further_seed(tmp_path):
    for name, value in (("a", 80.0), ("again", 90.0)):
        make_run(tmp_path / name, COCO, recalls(value))
    ours = [cells for cells in tables(tmp_path)[0].rows if cells[0].startswith("this code")]
    assert [cells[2] for cells in ours] == ["80.0", "90.0"]


def test_zero_shot_and_other_data_stand_apart_from_the_papers_columns(tmp_path):
    make_run(tmp_path / "zero", COCO, recalls(60.0), trained=False)
    make_run(tmp_path / "demo", "output/demo/data/retrieval_test.json", recalls(20.0))
    first, other = tables(tmp_path)[:2]
    assert row(first, "this code")["COCO TR R@1"] == "not run"
    assert [cells[1:4] for cells in other.rows if cells[1]] == [
        ["demo", "fine-tuned", "20.0"],
        ["coco", "zero-shot", "60.0"],
    ]


def test_a_run_of_an_ablation_is_named_with_its_row(tmp_path):
    for name in ("semmim", "table5_random"):
        for seed in (1, 2):
            ablation(tmp_path, name, seed, 50.0, 70.0)
    found = tables(tmp_path)
    assert found[1].rows[0][0] == "semmim/seed_1/retrieval and 1 more re-ranked"
    names = [cells[0] for cells in found[-1].rows if cells[2] == "two-stage ranking"]
    assert names == [f"{name}/seed_{n}/retrieval" for name in ("semmim", "table5_random") for n in (1, 2)]


def test_captioning_and_question_answering_fill_their_columns(tmp_path):
    scores = {"bleu4": 39.0, "meteor": 30.0, "cider": 131.0, "spice": "not computed: it needs Java"}
    for name, objective in (("ce", "xe"), ("scst", "scst")):
        make_run(tmp_path / name, COCO, {"test": scores}, {"scst": {}, "train": {"objective": objective}})
    nocaps = {"val": {**scores, "cider": 98.0}}
    make_run(tmp_path / "nocaps", "data/nocaps/nocaps_val.json", nocaps, {"scst": {}, "train": {}}, trained=False)
    server = {"test_dev": 78.0, "test_std": 78.5}
    answers = {"val": {"accuracy": 75.0, "constant": 40.0}, "test": {"questions": 9}}
    make_run(tmp_path / "vqa", "data/vqa/vqa_test_ocr.json", answers, {"answer": {}}, server=server)
    by_title = {table.title[:7]: table for table in reversed(tables(tmp_path))}
    captions, questions = row(by_title["Table 2"], "this code"), row(by_title["Table 3"], "this code")
    assert [captions[name] for name in ("CE C", "CIDEr opt. C", "NoCaps C")] == ["131.0", "131.0", "98.0"]
    assert captions["CE S"] == "not run"
    assert [questions["test-dev"], questions["test-std"]] == ["78.00", "78.50"]
    difference = row(by_title["Table 3"], "difference to the paper")
    assert [difference["test-dev"], difference["test-std"]] == ["-0.12", "+0.32"]


def test_ablation_effects_are_paired_by_seed(tmp_path):
    for seed, best in ((1, 50.0), (2, 60.0), (3, 10.0)):
        ablation(tmp_path, "semmim", seed, best, 70.0)
    for seed, value in ((1, 48.0), (2, 59.0)):
        ablation(tmp_path, "table5_random", seed, value, 69.0 + seed)
    (tmp_path / "rows.json").write_text(json.dumps({"rows": {"semmim": "semmim", "table7_9": "semmim"}}))
    found = {table.title[:7]: table for table in tables(tmp_path) if table.title[7:8] == "."}
    random, guided = found["Table 5"].rows
    assert random[0] == "random" and random[1:3] == ["81.0", "-0.5"]
    assert random[3] == "53.5 ± 7.8 (2)" and random[4] == "-1.5 ± 0.7 (2)"  # -2 and -1, not against all three
    assert random[-2:] == ["70.50 ± 0.71 (2)", "+0.50 ± 0.71 (2)"]
    assert guided[3].endswith("(3)") and [guided[place] for place in (2, 4, 6, 8, 10, 12)] == ["-"] * 6
    shared, missing = (next(r for r in found["Table 7"].rows if r[0] == name) for name in ("9", "6"))
    assert shared[3] == guided[3] and missing[3:5] == ["not run", "-"]
    assert shared[4] == "+0.0 ± 0.0 (3)"
    (note,) = found["Table 5"].notes
    assert "Ours: retrieval on demo, fine-tuned and re-ranked; vqa on demo; of the test" in note
    assert "of 20 effects that are 0, one is expected to have an asterisk by chance" in note


def test_an_ablation_has_a_table_of_mean_recalls_and_one_chart_of_all(tmp_path):
    for seed, best in ((1, 50.0), (2, 60.0), (3, 10.0)):
        ablation(tmp_path, "semmim", seed, best, 70.0)
    with pytest.raises(UserError, match="no two rows of an ablation"):
        report.main([str(tmp_path), "--format", "chart"])
    for seed, best in ((1, 50.0), (2, 60.0), (3, 10.0)):
        ablation(tmp_path, "table4_none", seed, best - 2 - seed, 70.0)  # differences of -3, -4, -5: t = 6.9 > 4.303
    found = {table.title: table for table in tables(tmp_path)}
    means = found["Table 4: this code by the mean of six recalls"]
    caption = report_formats.as_latex(means).splitlines()[-2].strip()
    assert caption.startswith(r"\caption{This code by the mean of six recalls. Ablation: what supervises masked image")
    assert "retrieval on demo, fine-tuned, on val and test" in caption and "of 20 effects" in caption
    assert row(means, "encoding (the paper)")["test effect"] == "-"
    none = row(means, "w/o MIM")
    assert none["test effect"] == "-4.0* ± 1.0 (3)" and none["val effect"] == "-"
    assert none["test re-ranked"] == none["test by ITC"] == f"32.0 ± {statistics.stdev([43, 52, 1]):.1f} (3)"
    rows_found = report_ablation.ablation_runs(tmp_path, report_tables.find_runs(tmp_path))
    bars = report_ablation.mean_effects(PAPER["4"], rows_found)
    published, ours = bars["w/o MIM"].values()
    assert published == Bar(pytest.approx((79.0 - 81.5 + 62.3 - 64.2) / 2), text="-2.2")
    assert ours == Bar(pytest.approx(-4), pytest.approx(1), "-4.0* ± 1.0 (3)")
    assert bars["dVAE"]["this code, mean recall"] == Bar(None, text="not run")
    assert len(bars) == 3  # not the paper's model itself
    note = report_charts.overview_note([run for of_row in rows_found.values() for run in of_row])
    assert "retrieval on demo, fine-tuned, test split, mean of six recalls, re-ranked" in note
    assert "standard deviation" in note and "(number of seeds)" in note and "paired t test at 5%: of 20" in note
    report.main([str(tmp_path), "--format", "chart"])
    report.main([str(tmp_path), "--format", "chart", "--output", str(tmp_path / "new/chart.PNG")])
    assert (tmp_path / "new/chart.PNG").read_bytes() == (tmp_path / "ablations.png").read_bytes()
    with Image.open(tmp_path / "ablations.png") as chart:
        assert chart.format == "PNG" and chart.width == charts.SHARP * 370  # of Table 4 alone


def test_table_8_counts_parameters_and_days(tmp_path):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    costs, parameters, speed = tables(tmp_path, pairs_per_second=800.0, gpus=8)[-3:]
    ours = row(costs, "this code")
    assert ours["parameters"] == "85.0M" and ours["GPU days"] == "11.8" and ours["COCO TR R@1"] == "80.5"
    assert row(parameters, "total without the encoding head")["parameters"] == "80,000,000"
    assert "36.9 pairs/s per GPU" in costs.notes[0]
    assert [cells[3] for cells in speed.rows] == ["40.0 pairs/s", "10 images x 50 texts in 2.0 s"]
    assert row(tables(tmp_path)[-3], "this code")["GPU days"] == "not run"
    written = {"val": {"cider": 98.0, "captions_per_second": 85.25}}
    make_run(tmp_path / "nocaps", "data/nocaps/nocaps_val.json", written, {"scst": {}, "train": {}}, trained=False)
    assert [cells[2:] for cells in tables(tmp_path)[-1].rows][-1] == ["captions", "85.25 captions/s"]


# ------------------------------------------------------------------------------------------------- formats and page

SMALL = Table("Table X. 50% & more", ["name", "R@1"], [["a_b", "1.0"], ["ours", "2.0 ± 0.1 (3)"]], ["a note"], {1}, {0})


def test_text_is_aligned_and_marks_whose_row_it_is():
    lines = report_formats.as_text(SMALL).splitlines()
    assert lines[3].startswith("* a_b") and lines[4].startswith("> ours") and lines[3].rindex("0") == len(lines[4]) - 1


def test_markdown_has_one_cell_per_column():
    lines = [line for line in report_formats.as_markdown(SMALL).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {3} and "**2.0 ± 0.1 (3)**" in lines[-1]


def test_latex_is_escaped_and_has_balanced_environments():
    text = report_formats.as_latex(SMALL)
    assert r"a\_b & 1.0 \\" in text and r"50\% \& more" in text and r"2.0 $\pm$ 0.1 (3)" in text
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
    assert text.index(r"\midrule" + "\n  ours") > 0


@pytest.mark.parametrize(
    ("title", "caption"),
    [
        ("Table X. 50% & more", r"50\% \& more. a note"),
        ("Table 8: trainable parameters", "Trainable parameters. a note"),
        ("Speed of the runs", "Speed of the runs. a note"),
    ],
)
def test_latex_numbers_its_tables_itself(title, caption):
    lines = report_formats.as_latex(Table(title, SMALL.columns, SMALL.rows, SMALL.notes)).splitlines()
    assert lines[:2] == [f"% {title}", r"\begin{table}"] and f"  \\caption{{{caption}}}" in lines


def test_html_escapes_what_a_folder_may_be_called():
    page = report_formats.as_html(Table("<b>", ["x"], [["<script>"]]))
    assert "<script>" not in page and "&lt;b&gt;" in page


def test_the_page_holds_all_tables_and_charts_and_its_charts_lie_beside_it(tmp_path, monkeypatch, capsys):
    ablation(tmp_path, "semmim", 1, 50.0, 70.0)
    ablation(tmp_path, "table4_none", 1, 45.0, 70.0)
    for name in ("semmim", "table4_none"):
        folder = tmp_path / name / "seed_1/pretrain"
        make_run(folder, "x.json", {"loss": 1.0}, {"mim": {}, "seed": 1})
        (folder / "log.jsonl").write_text(
            "".join(f'{{"step": {n}, "split": "train", "loss/itc": {n}}}\n' for n in (1, 2))
        )
        result = {"row": name, "seed": 1, "stages": {"pretrain": {}, "retrieval": {}, "vqa": {}}}
        (folder.parent / "result.json").write_text(json.dumps(result))
    make_run(tmp_path / "zeroshot", "x/demo/data/retrieval_test.json", recalls(20.0))
    monkeypatch.setattr(report, "count_parameters", lambda: PARAMETERS)
    report.main([str(tmp_path), "--format", "html"])
    page = tmp_path / "report/index.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert all(f"Table {number}." in text for number in range(1, 9)) and "not run" in text
    images = {path.name for path in page.parent.glob("*.png")}
    assert len([name for name in images if name.startswith("table_")]) == 4
    assert "curves_zeroshot.png" in images and text.count("data:image/png") > len(images) > 5
    assert "curves_table_4_pre_training_of_its_rows_first_seed.png" in images
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)  # nothing is loaded from elsewhere


@pytest.mark.parametrize("kind", ["text", "markdown", "latex"])
def test_every_format_shows_all_tables_and_can_go_to_a_file(tmp_path, monkeypatch, capsys, kind):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    monkeypatch.setattr(report, "count_parameters", lambda: PARAMETERS)
    report.main([str(tmp_path), "--format", kind])
    shown = capsys.readouterr().out
    assert [number for number in range(1, 9) if f"Table {number}." in shown] == list(range(1, 9))
    output = tmp_path / "new/folder/tables"
    report.main([str(tmp_path), "--format", kind, "--output", str(output)])
    assert output.read_text() == shown and [path.name for path in output.parent.iterdir()] == ["tables"]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("chart", "", r"a folder; name a file that ends in \.png$"),
        ("chart", "chart.jpg", r"must end in \.png$"),
        ("text", "", "a folder; name a file$"),
        ("text", "a.txt/tables", r"a\.txt: this folder cannot be made \(File exists\)"),
        ("summary", "a.txt/b/tables", r"a\.txt/b: this folder cannot be made \(Not a directory\)"),
        ("html", "a.txt", r"a\.txt: this folder cannot be made \(File exists\)"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, kind, name, message):
    make_run(tmp_path / "coco", COCO, recalls(80.5))
    (tmp_path / "a.txt").touch()
    monkeypatch.setattr(report, "count_parameters", lambda: PARAMETERS)
    with pytest.raises(UserError, match=message):
        report.main([str(tmp_path), "--format", kind, "--output", str(tmp_path / name)])


def test_parameters_of_table_8_are_those_of_the_papers_size():
    counts = report.count_parameters()
    assert counts["total"] / 1e6 == pytest.approx(353.3, abs=0.1)
    assert counts["encoding_head"] / 1e6 == pytest.approx(5.5, abs=0.05)


# ------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 9.7), (12000, 99000), (0.0011, 0.0018), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 7 and all(low <= value <= high for value in found)
    steps = {round((b - a) / max(abs(high), 1e-9), 9) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) <= 1


def test_charts_are_drawn_also_from_one_point_and_equal_values():
    line = charts.line_chart("loss", {"a": [(1, 2.0)], "b": [(1, 3.0), (9, float("nan"))]})
    rows = {"none": {"paper": Bar(-2.5), "ours": Bar(0.0, 0.4)}, "x": {"paper": Bar(0.0), "ours": Bar(None)}}
    bars = charts.bar_chart("TR", rows, "points")
    for image in (line, bars):
        assert isinstance(image, Image.Image) and len(image.getcolors(1 << 20)) > 10


def test_a_bar_ends_at_its_value():
    image = charts.bar_chart("t", {"row": {"paper": Bar(2.0)}, "half": {"paper": Bar(1.0)}}, "points")
    assert max(lengths(image)) / min(lengths(image)) == pytest.approx(2, rel=0.05)


def test_bars_of_several_panels_have_one_scale():
    panels = {"t": {"row": {"a": Bar(2.0, 0.5, "+2.0 ± 0.5")}}, "u": {"a longer row": {"a": Bar(1.0), "b": Bar(-9.0)}}}
    first, second = (max(lengths(image)) for image in charts.bar_charts(panels, "points"))
    assert first / second == pytest.approx(2, rel=0.05)


def test_the_text_of_a_bar_stands_beside_it_also_without_a_value():
    def ink(bar: Bar) -> int:
        """Dark pixels in the right margin beside the first row."""
        rows = {"row": {"a": Bar(1.0), "b": bar}, "x": {"a": Bar(1.0, text="+1.0 ± 2.5")}}
        image = charts.bar_chart("t", rows, "points")
        part = np.asarray(image.crop((image.width - 130, 0, image.width, 160)))
        return int((part < 128).all(-1).sum())

    assert ink(Bar(None, text="not run")) > ink(Bar(None)) == 0


def lengths(image: Image.Image) -> list[int]:
    """Of the rows of pixels that bars of the first series cross, above the legend, how many each fills."""
    pixels = (np.asarray(image)[: image.height - 46] == charts.COLORS[0]).all(-1).sum(1)
    return [int(count) for count in pixels if count > 20]
