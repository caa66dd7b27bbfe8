"""docs/reproduce.md, the road out: scripts accept its commands, its rows are the paper's, its hours the formula's."""

import re
import shlex
from pathlib import Path

import pytest

from engine.config import STAGES, load_config
from tools.ablate import __main__ as ablate
from tools.report import __main__ as report
from tools.report import tables as report_tables
from tools.visualize import __main__ as visualize
from utils import ROOT

DOCUMENT = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8").partition("\n## The road out\n")[2]
SPEED = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
PAPER = report_tables.PAPER
STAGE_OF_SCRIPT = {"Pretrain": "pretrain", "Retrieval": "retrieval", "Caption": "caption", "VQA": "vqa"}
TOOLS = {"ablate": ablate, "report": report, "visualize": visualize}


def commands() -> list[list[str]]:
    """The lines of the document's code blocks, without comments, as words."""
    blocks = "\n".join(re.findall(r"```\n(.*?)```", DOCUMENT, re.S)).replace("\\\n", " ")
    return [words for line in blocks.splitlines() if (words := shlex.split(line, comments=True))]


def ours(number: str) -> list:
    return next(row["values"] for row in PAPER[number]["rows"] if row.get("paper"))


@pytest.mark.parametrize(
    "page", [Path("README.md"), *sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))], ids=str
)
def test_every_link_to_a_section_leads_to_its_heading(page):
    for file, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        other = ROOT / page.parent / file if file else ROOT / page
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
            file,
            anchor,
        )


def test_every_script_gets_a_configuration_that_it_accepts():
    seen = set()
    for words in commands():
        if words[0] == "$run":
            script, stage = words[1], STAGE_OF_SCRIPT[words[1].removesuffix(".py")]
            assert (ROOT / script).is_file() and load_config(words[words.index("--config") + 1], (), STAGES[stage])
            seen.add(words[words.index("--output_dir") + 1])
    assert len(seen) == 7
    assert {folder for folder in re.findall(r"\| `(output/\w+)` \|", DOCUMENT)} <= seen


def test_the_accumulations_for_fewer_gpus_keep_every_stages_global_batch():
    trained = {Path(words[words.index("--config") + 1]).stem for words in commands() if words[0] == "$run"}
    table = DOCUMENT.partition("| `--config configs/....yaml` |")[2].partition("\n\n")[0].splitlines()
    processes = [int(number) for number in re.findall(r"`NPROC=(\d)`", table[0])]
    rows = [line.strip("| ").split(" | ") for line in table[2:]]
    assert processes == [8, 4, 2, 1] and {row[0].strip("`") for row in rows} == trained - {"Caption_nocaps"}
    for name, batch, *accumulations in rows:
        name, batch = name.strip("`"), int(batch.replace(",", ""))
        train = load_config(f"configs/{name}.yaml", (), STAGES[STAGE_OF_SCRIPT[name.partition("_")[0]]]).train
        assert int(accumulations[0]) == train.accumulation
        assert {train.batch_size * int(n) * p for n, p in zip(accumulations, processes, strict=True)} == {batch}


def test_every_tool_accepts_its_arguments():
    lines = [words for words in commands() if words[0] == "python"]
    lines += [shlex.split(line) for line in re.findall(r"`(python -m tools\.report [^`]*)`", DOCUMENT)]
    assert {words[2] for words in lines} == {f"tools.{name}" for name in TOOLS}
    for words in lines:
        values = ["8" if word in ("X", "N") else word for word in words[3:]]
        TOOLS[words[2].removeprefix("tools.")].parse_arguments(values)


def test_an_ablation_on_one_gpu_a_row_keeps_the_global_batches():
    found = [args for args in (words[3:] for words in commands() if words[2:3] == ["tools.ablate"]) if "8" in args]
    batches = []
    for arguments in ([*found[0][: found[0].index("--jobs")]], found[0]):
        options = ablate.parse_arguments(arguments)
        batches.append(ablate.global_batches(ablate.plan(options)[0][0].stages, 8 // options.jobs))
    assert options.jobs == 8 and batches[1] == batches[0] == {"pretrain": 1024, "retrieval": 256, "vqa": 1024}


def test_the_rows_of_tables_1_to_3_are_the_papers():
    one, two, three = (report_tables.printed_row(PAPER[number], {"values": ours(number)}) for number in "123")
    halves = [", ".join(" / ".join(one[start : start + 3]) for start in (at, at + 3)) for at in (0, 6)]
    for expected in (*halves, ", ".join(two[:4]), ", ".join(two[4:8]), ", ".join(two[8:]), ", ".join(three)):
        assert f"| {expected} |" in DOCUMENT


@pytest.mark.parametrize("number", list("4567"))
def test_the_rows_of_the_ablations_are_the_papers(number):
    line = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| {number}, "))
    found = re.findall(r"[\d.]+ / [\d.]+ / [\d.]+", line)
    assert found == [" / ".join(report_tables.printed_row(PAPER[number], row)) for row in PAPER[number]["rows"]]


def table_row(first: str) -> list[str]:
    return next(cells for cells in map(cells_of, DOCUMENT.splitlines()) if cells[0] == first)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_pre_trainings_cost_is_that_of_the_default_order_as_on_the_page_of_speeds():
    gflop, hours, on_eight = table_row("pre-training, 224 px")[2:5]
    assert load_config("configs/Pretrain.yaml", (), STAGES["pretrain"]).data.bucket_batches == 8
    padded, ordered = re.search(
        r"takes (\d+) GFLOP with .*?, (\d+) with\s+captions of real lengths", SPEED, re.S
    ).groups()
    assert int(padded) > int(ordered) == int(gflop.split()[0])
    rows = {cells[0]: cells for cells in map(cells_of, SPEED.splitlines())}
    predicted = {gpus: rows[gpus][2].split(" / ")[1] for gpus in ("1 A100", "8 A100")}  # at 40%
    assert (predicted["1 A100"], f"{predicted['8 A100']} h") == (hours, on_eight)


def test_the_hours_follow_from_the_formula():
    seconds_per_gflop = 1e9 / (0.4 * 312e12)
    samples = {
        "pre-training, 224 px": report_tables.CAPTIONS * report_tables.EPOCHS,
        "retrieval MSCOCO, 384 px": 566_747 * 5,
        "retrieval Flickr30K": 145_000 * 10,
        "captioning, cross-entropy": 566_747 * 5,
        "VQA v2 with Visual Genome's questions": 2.0e6 * 8,
    }
    hours_of = {}
    for stage, count in samples.items():
        cells = table_row(stage)
        gflop, hours, on_eight = (float(re.match(r"[\d.]+", cell)[0]) for cell in cells[2:5])
        expected = count * gflop * seconds_per_gflop / 3600
        assert hours == pytest.approx(expected, rel=0.03) and on_eight == pytest.approx(expected / 8, abs=0.06)
        hours_of[stage] = expected
    row = sum(hours_of[stage] for stage in samples if stage.startswith(("pre-training", "retrieval MSCOCO", "VQA")))
    hours, on_eight = table_row("one row of Tables 4 to 7")[3:5]
    assert float(hours) == round(row) and on_eight == f"{row / 8:.1f} h"
    hours, days = table_row("all 11 rows, one seed")[3:5]
    assert float(hours.replace(",", "")) == round(11 * row, -1) and days == f"{11 * row / 8 / 24:.1f} days"
    assert f"{report_tables.gpu_days(32):.1f} pairs/s per GPU" in DOCUMENT
