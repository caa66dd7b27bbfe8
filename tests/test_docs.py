"""The documents: every command is accepted, every link leads somewhere, keys, rows and hours are the code's own."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from dataset import annotations, files
from engine.config import STAGES, load_config
from tools import shards
from tools.ablate import __main__ as ablate
from tools.report import tables as report_tables
from utils import ROOT

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
ROAD_OUT = PAGES["reproduce.md"].partition("\n## Training and results\n")[2]
STAGE_OF_SCRIPT = {"Pretrain": "pretrain", "Retrieval": "retrieval", "Caption": "caption", "VQA": "vqa"}
PAPER = report_tables.PAPER
# A value of each variable of a loop.
LOOPS = {"config": "VQA", "seed": "42", "size": "96", "masking": "random", "target": "pixels", "texture": "80"}


def commands(text: str) -> list[str]:
    """The command lines of this project in a text's code blocks, as they stand after `python`, torchrun's or `$run`;
    and those of the report and the benchmark inside sentences."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S)).replace("\\\n", " ")
    found = re.findall(r"^.*?((?:-m tools\.\w+ |\b[A-Z]\w+\.py (?=--config)).*?)(?:; done)?$", blocks, re.M)
    return found + re.findall(r"`python (-m tools\.(?:report|benchmark) [^`]*)`", text.replace("\n", " "))


class Accepted(Exception):
    """The arguments are such that the tool would begin its work."""


@pytest.mark.parametrize("line", sorted({line for text in PAGES.values() for line in commands(text)}))
def test_every_command_is_accepted(line, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None):
        parse(parser, arguments)
        raise Accepted

    line = re.sub(r"\$(\w+)", lambda name: LOOPS.get(name[1], name[0]), re.sub(r" [XN]\b", " 8", line))
    words = shlex.split(line, comments=True)
    if words[0] == "-m":
        name = words[1].removeprefix("tools.")
        module = f"tools.{name}.__main__" if (ROOT / "tools" / name).is_dir() else f"tools.{name}"
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Accepted):
            importlib.import_module(module).main(words[2:])
    else:
        given = words[words.index("--override") + 1 :] if "--override" in words else []
        stage = STAGES[STAGE_OF_SCRIPT[words[0].removesuffix(".py")]]
        assert load_config(words[words.index("--config") + 1], [word for word in given if "=" in word], stage)


def test_every_link_to_a_section_leads_to_its_heading():
    for name, text in PAGES.items():
        for file, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", text):
            headings = re.findall(r"^#+ (.*)$", PAGES[Path(file).name if file else name], re.M)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, (name, file, anchor)


def test_the_keys_columns_and_endings_of_the_data_are_the_readers():
    text = PAGES["data.md"]
    sections = {
        name: text.partition(f"\n{name}")[2].partition("\n## ")[0] for name in ("## Keys", "Parquet", "## Files")
    }
    cells = [line.split("|")[1] for line in sections["## Keys"].splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`(\w+)`", "".join(cells)))
    known = {key for keys in (*annotations.KINDS.values(), *annotations.OPTIONAL.values()) for key in keys}
    assert known <= listed and listed - known == {"split", "ocr"}
    assert all(f"`{name}`" in sections["Parquet"] for name in (*shards.IMAGE_COLUMNS, *shards.CAPTION_COLUMNS))
    assert all(f"`{ending}`" in sections["## Files"] for ending in (*files.LINES, ".json", ".tar"))


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_row(first: str) -> list[str]:
    return next(cells for cells in map(cells_of, ROAD_OUT.splitlines()) if cells[0] == first)


def test_the_accumulations_for_fewer_gpus_keep_every_stages_global_batch():
    trained = set(re.findall(r"\$run .*configs/(\w+)\.yaml", ROAD_OUT))
    table = ROAD_OUT.partition("| `--config configs/....yaml` |")[2].partition("\n\n")[0].splitlines()
    processes = [int(number) for number in re.findall(r"`NPROC=(\d)`", table[0])]
    rows = [cells_of(line) for line in table[2:]]
    assert processes == [8, 4, 2, 1] and {row[0].strip("`") for row in rows} == trained - {"Caption_nocaps"}
    for name, batch, *accumulations in rows:
        name, batch = name.strip("`"), int(batch.replace(",", ""))
        train = load_config(f"configs/{name}.yaml", (), STAGES[STAGE_OF_SCRIPT[name.partition("_")[0]]]).train
        assert int(accumulations[0]) == train.accumulation
        assert {train.batch_size * int(n) * p for n, p in zip(accumulations, processes, strict=True)} == {batch}


def test_an_ablation_on_one_gpu_a_row_keeps_the_global_batches():
    words = next(shlex.split(line)[2:] for line in commands(ROAD_OUT) if "--jobs 8" in line)
    batches = []
    for arguments in (words[: words.index("--jobs")], words):
        options = ablate.parse_arguments(arguments)
        stages = {stage.name: stage.settings.train for stage in ablate.plan(options)[0][0].stages}
        gpus = 8 // options.jobs
        batches.append({name: train.batch_size * train.accumulation * gpus for name, train in stages.items()})
    assert options.jobs == 8 and batches[1] == batches[0] == {"pretrain": 1024, "retrieval": 256, "vqa": 1024}


def test_the_rows_of_the_tables_are_the_papers():
    tables = [PAPER[number] for number in "123"]
    one, two, three = (
        report_tables.printed_row(table, {"values": report_tables.paper_values(table)}) for table in tables
    )
    halves = [", ".join(" / ".join(one[start : start + 3]) for start in (at, at + 3)) for at in (0, 6)]
    for expected in (*halves, ", ".join(two[:4]), ", ".join(two[4:8]), ", ".join(two[8:]), ", ".join(three)):
        assert f"| {expected} |" in ROAD_OUT


def test_pre_trainings_cost_is_that_of_the_default_order_as_on_the_page_of_speeds():
    gflop, hours, on_eight = table_row("pre-training, 224 px")[2:5]
    assert load_config("configs/Pretrain.yaml", (), STAGES["pretrain"]).data.bucket_batches == 8
    counted = re.search(r"takes (\d+) GFLOP with .*?, (\d+) with\s+captions of real lengths", PAGES["speed.md"], re.S)
    assert int(counted[1]) > int(counted[2]) == int(gflop.split()[0])
    rows = {cells[0]: cells for cells in map(cells_of, PAGES["speed.md"].splitlines())}
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
        gflop, hours, on_eight = (float(re.match(r"[\d.]+", cell)[0]) for cell in table_row(stage)[2:5])
        expected = count * gflop * seconds_per_gflop / 3600
        assert hours == pytest.approx(expected, rel=0.03) and on_eight == pytest.approx(expected / 8, abs=0.06)
        hours_of[stage] = expected
    row = sum(hours_of[stage] for stage in samples if stage.startswith(("pre-training", "retrieval MSCOCO", "VQA")))
    hours, on_eight = table_row("one row of Tables 4 to 7")[3:5]
    assert float(hours) == round(row) and on_eight == f"{row / 8:.1f} h"
    hours, days = table_row("all 11 rows, one seed")[3:5]
    assert float(hours.replace(",", "")) == round(11 * row, -1) and days == f"{11 * row / 8 / 24:.1f} days"
    assert f"{5.1e6 * 20 / 86400 / 32:.1f} pairs/s per GPU" in ROAD_OUT
