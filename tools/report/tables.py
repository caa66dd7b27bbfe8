"""The paper's tables with this code's numbers beside the published ones.

The paper's model on all images of MSCOCO's, Flickr30K's and NoCaps' splits and on VQA v2 fills the paper's columns; all
else, zero-shot runs too, has tables of its own. Runs that differ in nothing but their seed are one row, with mean and
spread. A cell says "not run" if nothing was run for it, and otherwise why a number is missing.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import PRETRAIN, load_config
from models.semmim import describe
from tools.report.runs import Run, groups, run_name, stat

BASE = "configs/Pretrain.yaml"  # the paper's model
# {stage: {(data set, kind of its runs): the part that it fills, first word of the columns in the paper's table}}
PARTS = {
    "retrieval": {("coco", "fine-tuned"): "coco", ("flickr", "fine-tuned"): "flickr"},
    "caption": {("coco", "CE"): "ce", ("coco", "CIDEr opt."): "scst", ("nocaps", "zero-shot"): "nocaps"},
    "vqa": {("vqa", "fine-tuned"): "vqa"},
}
SPLITS = {"coco": ("test", 5000), "flickr": ("test", 1000), "nocaps": ("val", 4500)}  # that the paper reports: images
NOT_RUN, DASH = "not run", "-"
NOT_SCORED = "not scored: upload vqa_result.json to the evaluation server and write its answer into server.json"
SPLIT = "Of the test split, or of val without one."
VQA_COLUMNS = ("accuracy", "best constant answers")
RECALLS = tuple(f"{side}_r{k}" for side in ("tr", "ir") for k in (1, 5, 10))
ORDERS = {"itm": "re-ranked", "itc": "contrast alone", "chance": "a random order"}
CAPTIONS, EPOCHS = 5.1e6, 20  # of the paper's pre-training (Sections 4.1 and 4.2)
SECONDS_A_DAY = 86400
PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))["tables"]
Value = Callable[[Run], float | str | None]  # a text says why there is no number


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)  # rows with this code's numbers
    paper: set[int] = field(default_factory=set)  # rows with the paper's own


def cell(runs: Sequence[Run], value: Value, decimals: int) -> str:
    """Mean and spread over the runs; without any number, why."""
    if found := stat(runs, value):
        return found.show(decimals)
    return next(iter(reasons(runs, value)), DASH).partition(":")[0] if runs else NOT_RUN


def reasons(runs: Sequence[Run], value: Value) -> list[str]:
    """Why runs have no number, each reason once."""
    return list(dict.fromkeys(why for run in runs if isinstance(why := value(run), str)))


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


def missing(group: Sequence[Run], columns: dict[str, Value]) -> list[str]:
    """A note for each reason why a group of runs lacks numbers; columns: {name: its value}."""
    names: dict[str, list[str]] = {}
    for name, value in columns.items():
        for why in reasons(group, value):
            names.setdefault(why, []).append(name)
    return [f"{', '.join(found)} of {run_name(group)}: {why}" for why, found in names.items()]


def metric(name: str, split: str | None = None) -> Value:
    """`Run.number` of that name."""
    return lambda run: run.number(name, split)


def vqa_accuracy(run: Run) -> float | str | None:
    """The server's test-dev if it is known, else the test (or val) accuracy of the run."""
    return run.server.get("test_dev", run.number("accuracy"))


@functools.cache
def paper_model() -> list:
    """The architecture of the paper's model, as `architecture` gives that of a run."""
    return architecture(describe(load_config(BASE, (), PRETRAIN)))


def architecture(description: dict) -> list:
    """What a model's description says of its layers: not the image size and the like, which change by stage."""
    image = description["image_encoder"]
    parts = ("bert", "text_layers", "fusion_layers", "decoder_layers", "embed_dim")
    return [image["name"], image["args"], *(description[part] for part in parts)]


def apart(run: Run) -> str | None:
    """Why a run's numbers do not belong into the paper's columns; None if they do."""
    model = run.metrics.get("run", {}).get("model")
    if run.data in SPLITS:
        split, images = SPLITS[run.data]
        found = run.number("images", split)
        if found != images:
            return f"{found:,} images" if found else f"no {split}"
    if model is None or architecture(model) != paper_model():
        return "another model" if model else "unknown model"
    return None


def part_of(run: Run) -> str | None:
    """The part of the paper's table that a run fills; None: its numbers stand in a table of their own."""
    return None if apart(run) else PARTS[run.stage].get((run.data, run.kind))


def data_label(run: Run) -> str:
    """A run's data set; one of the paper's with what sets the run apart from the paper's."""
    why = apart(run) if run.data in (*SPLITS, "vqa") else None
    return f"{run.data}, {why}" if why else run.data


# --------------------------------------------------------------------------------------------------- Tables 1 to 3


def retrieval_tables(runs: list[Run]) -> list[Table]:
    table, others = published("1", runs, "retrieval", lambda column: metric(f"itm_{column}", "test"))
    table.notes.append("Two-stage ranking: the first candidates by contrast, re-ranked by the fusion encoder.")
    names = [f"{side.upper()} R@{k}" for side, k in (key.split("_r") for key in RECALLS)]
    other = Table("Table 1 on other data, and zero-shot", ["run", "data", "kind", *names, "mean"], [], [SPLIT])
    for group in others:
        lead = [f"{run_name(group)} {ORDERS['itm']}", data_label(group[0]), group[0].kind]
        for order, name in ORDERS.items():
            cells = [cell(group, metric(f"{order}_{key}"), 1) for key in (*RECALLS, "r_mean")]
            other.rows.append([*(lead if order == "itm" else [name, "", ""]), *cells])
    return [table, *if_filled(other)]


def caption_tables(runs: list[Run]) -> list[Table]:
    table, others = published("2", runs, "caption", metric)
    columns = {"B@4": metric("bleu4"), "M": metric("meteor"), "C": metric("cider"), "S": metric("spice")}
    other = Table("Table 2 on other data", ["run", "data", "kind", *columns], [], [SPLIT])
    for group in others:
        cells = [cell(group, value, 1) for value in columns.values()]
        other.rows.append([run_name(group), data_label(group[0]), group[0].kind, *cells])
        other.notes += missing(group, columns)
    return [table, *if_filled(other)]


def vqa_tables(runs: list[Run]) -> list[Table]:
    table, others = published("3", runs, "vqa", lambda column: lambda run: run.server.get(column, NOT_SCORED))
    other = Table("Table 3: validation, and other data", ["run", "data", "kind", "split", *VQA_COLUMNS], [])
    for group in groups(runs, "vqa"):
        lead = [run_name(group), data_label(group[0]), group[0].kind]
        splits = [split for split in ("val", "test") if stat(group, metric("accuracy", split))]
        for split in splits:
            cells = [cell(group, metric(key, split), 2) for key in ("accuracy", "constant")]
            other.rows.append([*lead, split, *cells])
        if group in others and (group[0].server or not splits):
            for key, label in (("test_dev", "test-dev"), ("test_std", "test-std")):
                scored = cell(group, lambda run, key=key: run.server.get(key, NOT_SCORED), 2)
                other.rows.append([*lead, label, scored, DASH])
    return [table, *if_filled(other)]


def published(number: str, runs: list[Run], stage: str, value: Callable[[str], Value]) -> tuple[Table, list[list[Run]]]:
    """The published rows, and for every experiment a row of this code with its difference to the paper's model.

    value: column, without its part -> the value of a run. -> (the table, groups of runs that fill no part of it)
    """
    paper = PAPER[number]
    rows = [[row["name"], row["data"], *printed_row(paper, row)] for row in paper["rows"]]
    columns = [paper["name"], "data", *(label for _, label, _ in paper["columns"])]
    table = Table(f"Table {number}. {paper['title']}", columns, rows, paper=paper_rows(paper))
    by_part: dict[str | None, list[list[Run]]] = {part: [] for part in (*PARTS[stage].values(), None)}
    for group in groups(runs, stage):
        by_part[part_of(group[0])].append(group)
    others = by_part.pop(None)
    experiments = list(itertools.zip_longest(*by_part.values(), fillvalue=[])) or [()]
    for experiment in experiments:
        found = dict(zip(by_part, experiment, strict=False))
        ours, differences, labels = [], [], {part: {} for part in by_part}
        for (column, label, decimals), theirs in zip(paper["columns"], paper_values(paper), strict=True):
            part, _, key = column.partition("_")
            group, measure = found.get(part, []), value(key)
            mine, labels[part][label] = stat(group, measure), measure
            ours.append(cell(group, measure, decimals))
            differences.append(DASH if mine is None else f"{mine.mean - theirs:+.{decimals}f}")
        for part, group in found.items():
            table.notes += missing(group, labels[part])
        name = "this code" if len(experiments) == 1 else f"this code: {run_name([r for g in experiment for r in g])}"
        table.ours |= {len(rows), len(rows) + 1}
        rows += [[name, "", *ours], ["difference to the paper", "", *differences]]
    return table, others


def if_filled(table: Table) -> list[Table]:
    """A table of this code's rows, if there are any."""
    table.ours = set(range(len(table.rows)))
    return [table] if table.rows else []


# --------------------------------------------------------------------------------------------------------- Table 8


def gpu_days(pairs_per_second: float, gpus: int = 1) -> float:
    """GPU days of the paper's schedule: 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400 s."""
    return CAPTIONS * EPOCHS / (pairs_per_second / gpus) / SECONDS_A_DAY


def cost_tables(runs: list[Run], parameters: dict[str, int], pairs_per_second: float | None, gpus: int) -> list[Table]:
    """Published costs, this code's parameters per module, and what the measured speed means for the paper's schedule.

    parameters: tools.benchmark's count at the paper's size; pairs_per_second: measured there, by `gpus` GPUs in all.
    """
    paper = PAPER["8"]
    rows = [[row["name"], *printed_row(paper, row)] for row in paper["rows"]]
    days = NOT_RUN if pairs_per_second is None else f"{gpu_days(pairs_per_second, gpus):.1f}"
    coco = next((group for group in groups(runs, "retrieval") if part_of(group[0]) == "coco"), [])
    recalls = [cell(coco, metric(f"itm_{side}_r1", "test"), 1) for side in ("tr", "ir")]
    rows.append(["this code", f"{parameters['total'] / 1e6:.1f}M", days, *recalls])
    printed_days = paper_values(paper)[1]
    measured = "Measure pairs/s at the paper's size and give it by --pairs_per_second X --gpus N."
    if pairs_per_second is not None:
        measured = f"From {pairs_per_second:g} pairs/s on {gpus} GPU{'s' if gpus > 1 else ''}."
    notes = [
        "GPU days = 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400; the paper's "
        f"{printed_days} mean {CAPTIONS * EPOCHS / SECONDS_A_DAY / int(printed_days.split()[0]):.1f} pairs/s per GPU.",
        measured,
        "The paper's 360M (354M without the head) come out if the fusion encoder has an embedding layer of its own "
        "(words, positions, types), unused, as in mPLUG's code, and M is 2^20; this code has no such layer.",
    ]
    columns = [paper["name"], *(label for _, label, _ in paper["columns"])]
    costs = Table(f"Table 8. {paper['title']}", columns, rows, notes, {len(rows) - 1}, {len(rows) - 2})
    return [costs, parameter_table(parameters)]


def parameter_table(parameters: dict[str, int]) -> Table:
    """Trainable parameters per module, with and without the encoding head."""
    without = parameters["total"] - parameters["encoding_head"]
    rows = [[name.replace("_", " "), f"{count:,}", f"{count / 1e6:.1f}M"] for name, count in parameters.items()]
    rows.insert(-1, ["total without the encoding head", f"{without:,}", f"{without / 1e6:.1f}M"])
    note = (
        "configs/Pretrain.yaml; a tied tensor counts once. No later stage has the encoding head: inference is the same."
    )
    return Table("Table 8: trainable parameters per module", ["module", "parameters", ""], rows, [note])
