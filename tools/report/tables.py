"""The paper's tables with this code's numbers beside the published ones.

MSCOCO, Flickr30K, NoCaps and VQA v2 fill the paper's columns; other data and zero-shot runs have tables of their own.
Runs that differ in nothing but their seed are one row, with mean and spread.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools.report.runs import Run, Stat, groups, run_name, stat

NOT_RUN, DASH = "not run", "-"
RECALLS = tuple(f"{side}_r{k}" for side in ("tr", "ir") for k in (1, 5, 10))
ORDERS = {"itm": "re-ranked", "itc": "contrast alone", "chance": "a random order"}
CAPTIONS, EPOCHS = 5.1e6, 20  # of the paper's pre-training (Sections 4.1 and 4.2)
SECONDS_A_DAY = 86400
PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))["tables"]
Value = Callable[[Run], float | None]


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)  # rows with this code's numbers
    paper: set[int] = field(default_factory=set)  # rows with the paper's own


def show(value: Stat | None, decimals: int) -> str:
    return NOT_RUN if value is None else value.show(decimals)


def printed(value: float | str | None, decimals: int) -> str:
    """A published value as the paper prints it."""
    if value is None:
        return DASH
    return f"{value:.{decimals}f}" if isinstance(value, int | float) else str(value)


def printed_row(paper: dict, row: dict) -> list[str]:
    """The values of a published row."""
    return [printed(value, decimals) for value, (_, _, decimals) in zip(row["values"], paper["columns"], strict=True)]


def paper_values(paper: dict) -> list:
    """The published values of the paper's own model."""
    return next(row["values"] for row in paper["rows"] if row.get("paper"))


def paper_rows(paper: dict) -> set[int]:
    """The places of the rows that are the paper's own model."""
    return {place for place, row in enumerate(paper["rows"]) if row.get("paper")}


def metric(name: str, split: str | None = None) -> Value:
    """A run's number of that name on a split (None: on test or else on val); None if it was not evaluated."""

    def value(run: Run) -> float | None:
        numbers = run.metrics.get(split) if split else run.split
        return numbers.get(name) if isinstance(numbers, dict) else None

    return value


def vqa_accuracy(run: Run) -> float | None:
    """The server's test-dev if it is known, else the test (or val) accuracy of the run."""
    return run.server.get("test_dev", run.split.get("accuracy"))


# --------------------------------------------------------------------------------------------------- Tables 1 to 3


def retrieval_tables(runs: list[Run]) -> list[Table]:
    kinds = {"coco": "fine-tuned", "flickr": "fine-tuned"}
    table = published("1", runs, "retrieval", kinds, lambda column: metric(f"itm_{column.split('_', 1)[1]}"))
    table.notes.append("Two-stage ranking: the first candidates by contrast, re-ranked by the fusion encoder.")
    names = [f"{side.upper()} R@{k}" for side, k in (key.split("_r") for key in RECALLS)]
    rows = []
    for group in groups(runs, "retrieval"):
        if group[0].data in kinds and group[0].kind == "fine-tuned":
            continue
        lead = [f"{run_name(group)} {ORDERS['itm']}", group[0].data, group[0].kind]
        for order, name in ORDERS.items():
            cells = [show(stat(group, metric(f"{order}_{key}")), 1) for key in (*RECALLS, "r_mean")]
            rows.append([*(lead if order == "itm" else [name, "", ""]), *cells])
    columns = ["run", "data", "kind", *names, "mean"]
    return [table, *other_data("Table 1 on other data, and zero-shot", columns, rows)]


def caption_tables(runs: list[Run]) -> list[Table]:
    kinds = {"ce": "CE", "scst": "CIDEr opt.", "nocaps": "zero-shot"}
    table = published("2", runs, "caption", kinds, lambda column: metric(column.split("_", 1)[1]))
    columns = {"bleu4": "B@4", "meteor": "M", "cider": "C", "spice": "S"}
    rows = [
        [run_name(group), group[0].data, group[0].kind, *(show(stat(group, metric(key)), 1) for key in columns)]
        for group in groups(runs, "caption")
        if group[0].data not in ("coco", "nocaps") or (group[0].kind == "zero-shot") != (group[0].data == "nocaps")
    ]
    return [table, *other_data("Table 2 on other data", ["run", "data", "kind", *columns.values()], rows)]


def vqa_tables(runs: list[Run]) -> list[Table]:
    def server(column: str) -> Value:
        return lambda run: run.server.get(column.removeprefix("vqa_"))

    table = published("3", runs, "vqa", {"vqa": "fine-tuned"}, server)
    table.notes.append(
        "test-dev and test-std are scored by the evaluation server: upload vqa_result.json, and write its answer "
        'beside it as server.json, {"test_dev": ..., "test_std": ...}.'
    )
    rows = []
    for group in groups(runs, "vqa"):
        for split in ("val", "test"):
            numbers = [stat(group, metric(key, split)) for key in ("accuracy", "constant")]
            if numbers[0] is not None:
                cells = [show(number, 2) for number in numbers]
                rows.append([run_name(group), group[0].data, group[0].kind, split, *cells])
    columns = ["run", "data", "kind", "split", "accuracy", "best constant answers"]
    return [table, *other_data("Table 3: validation, and other data", columns, rows)]


def published(number: str, runs: list[Run], stage: str, kinds: dict[str, str], value: Callable[[str], Value]) -> Table:
    """The published rows, and for every experiment a row of this code with its difference to the paper's model.

    kinds: {part: kind of the runs that fill it}, parts being columns that one run fills, with the same first word.
    value: column -> the value of a run.
    """
    paper = PAPER[number]
    rows = [[row["name"], row["data"], *printed_row(paper, row)] for row in paper["rows"]]
    columns = [paper["name"], "data", *(label for _, label, _ in paper["columns"])]
    table = Table(f"Table {number}. {paper['title']}", columns, rows, paper=paper_rows(paper))
    data = {"ce": "coco", "scst": "coco"}  # of a part, if not its own name
    by_part = {part: groups(runs, stage, kind, data.get(part, part)) for part, kind in kinds.items()}
    experiments = list(itertools.zip_longest(*by_part.values(), fillvalue=[])) or [()]
    for experiment in experiments:
        found = dict(zip(by_part, experiment, strict=False))
        ours, differences = [], []
        for (column, _, decimals), theirs in zip(paper["columns"], paper_values(paper), strict=True):
            mine = stat(found.get(column.split("_")[0], []), value(column))
            ours.append(show(mine, decimals))
            differences.append(DASH if mine is None else f"{mine.mean - theirs:+.{decimals}f}")
        name = "this code" if len(experiments) == 1 else f"this code: {run_name([r for g in experiment for r in g])}"
        table.ours |= {len(rows), len(rows) + 1}
        rows += [[name, "", *ours], ["difference to the paper", "", *differences]]
    return table


def other_data(title: str, columns: list[str], rows: list[list[str]]) -> list[Table]:
    return [Table(title, columns, rows, ours=set(range(len(rows))))] if rows else []


# --------------------------------------------------------------------------------------------------------- Table 8


def gpu_days(pairs_per_second: float, gpus: int = 1) -> float:
    """GPU days of the paper's schedule: 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400 s."""
    return CAPTIONS * EPOCHS / (pairs_per_second / gpus) / SECONDS_A_DAY


def implied_pairs_per_second(days: float) -> float:
    """Pairs per second of one GPU that `days` GPU days of the paper's schedule mean."""
    return CAPTIONS * EPOCHS / days / SECONDS_A_DAY


def cost_tables(runs: list[Run], parameters: dict[str, int], pairs_per_second: float | None, gpus: int) -> list[Table]:
    """Published costs, this code's parameters per module, and what the measured speed means for the paper's schedule.

    parameters: tools.benchmark's count at the paper's size; pairs_per_second: measured there, by `gpus` GPUs in all.
    """
    paper = PAPER["8"]
    rows = [[row["name"], *printed_row(paper, row)] for row in paper["rows"]]
    days = NOT_RUN if pairs_per_second is None else f"{gpu_days(pairs_per_second, gpus):.1f}"
    coco = next(iter(groups(runs, "retrieval", "fine-tuned", "coco")), [])
    recalls = [show(stat(coco, metric(f"itm_{side}_r1")), 1) for side in ("tr", "ir")]
    rows.append(["this code", f"{parameters['total'] / 1e6:.1f}M", days, *recalls])
    printed_days = paper_values(paper)[1]
    measured = "Measure pairs/s at the paper's size and give it by --pairs_per_second X --gpus N."
    if pairs_per_second is not None:
        measured = f"From {pairs_per_second:g} pairs/s on {gpus} GPU{'s' if gpus > 1 else ''}."
    notes = [
        "GPU days = 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400; the paper's "
        f"{printed_days} mean {implied_pairs_per_second(float(printed_days.split()[0])):.1f} pairs/s per GPU.",
        measured,
        "The paper's 360M (354M without the head) come out if the fusion encoder has a word-embedding table of its "
        "own, unused, as mPLUG's code does, and M is 2^20; this code has no such table.",
    ]
    columns = [paper["name"], *(label for _, label, _ in paper["columns"])]
    costs = Table(f"Table 8. {paper['title']}", columns, rows, notes, {len(rows) - 1}, {len(rows) - 2})
    return [costs, parameter_table(parameters), *speed_table(runs)]


def parameter_table(parameters: dict[str, int]) -> Table:
    """Trainable parameters per module, with and without the encoding head."""
    without = parameters["total"] - parameters["encoding_head"]
    rows = [[name.replace("_", " "), f"{count:,}", f"{count / 1e6:.1f}M"] for name, count in parameters.items()]
    rows.insert(-1, ["total without the encoding head", f"{without:,}", f"{without / 1e6:.1f}M"])
    note = (
        "configs/Pretrain.yaml; a tied tensor counts once. No later stage has the encoding head: inference is the same."
    )
    return Table("Table 8: trainable parameters per module", ["module", "parameters", ""], rows, [note])


def speed_table(runs: list[Run]) -> list[Table]:
    """What the runs themselves measured: training pairs and captions per second, and the time of a ranking."""
    rows = []
    for run in runs:
        numbers, lead = run.split, [run_name([run]), run.stage]
        if run.pairs_per_second:
            rows.append([*lead, "training", f"{run.pairs_per_second:.1f} pairs/s"])
        if numbers.get("captions_per_second"):
            rows.append([*lead, "captions", f"{numbers['captions_per_second']:,} captions/s"])
        if run.stage == "retrieval" and numbers.get("seconds"):
            what = f"{numbers['images']:,} images x {numbers['texts']:,} texts in {numbers['seconds']:,} s"
            rows.append([*lead, "two-stage ranking", what])
    note = "On the machine and with the model of each run: medians of the log, beside whatever else ran there."
    return [Table("Speed of the runs", ["run", "stage", "what", "speed"], rows, [note])] if rows else []
