"""The paper's tables with this code's numbers beside the published ones.

The paper's model on all images of MSCOCO's, Flickr30K's and NoCaps' splits and on VQA v2 fills the paper's columns; all
else, zero-shot runs too, has tables of its own. Runs that differ in nothing but their seed are one row, with mean and
spread. A cell says "not run" if nothing was run for it.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import PRETRAIN, load_config
from models.semmim import describe
from tools.report.runs import Run, groups, numbers, run_name, show

BASE = "configs/Pretrain.yaml"  # the paper's model
# {stage: {(data set, kind of its runs): the part that it fills, first word of the columns in the paper's table}}
PARTS = {
    "retrieval": {("coco", "fine-tuned"): "coco", ("flickr", "fine-tuned"): "flickr"},
    "caption": {("coco", "CE"): "ce", ("coco", "CIDEr opt."): "scst", ("nocaps", "zero-shot"): "nocaps"},
    "vqa": {("vqa", "fine-tuned"): "vqa"},
}
SPLITS = {"coco": ("test", 5000), "flickr": ("test", 1000), "nocaps": ("val", 4500)}  # that the paper reports: images
NOT_RUN, DASH = "not run", "-"
SPLIT = "Of the test split, or of val without one."
RECALLS = tuple(f"{side}_r{k}" for side in ("tr", "ir") for k in (1, 5, 10))
ORDERS = {"itm": "re-ranked", "itc": "contrast alone", "chance": "a random order"}
SCORES = {"bleu4": "B@4", "meteor": "M", "cider": "C", "spice": "S"}
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


def cell(runs: Sequence[Run], value: Value, decimals: int) -> str:
    """Mean and spread over the runs; without any number, why."""
    if found := numbers(runs, value):
        return show(found, decimals)
    reasons = [why for why in map(value, runs) if why]
    return reasons[0].partition(":")[0] if reasons else DASH if runs else NOT_RUN


def printed(value: float | str | None, decimals: int) -> str:
    """A published value as the paper prints it."""
    if value is None:
        return DASH
    return f"{value:.{decimals}f}" if isinstance(value, int | float) else value


def printed_row(paper: dict, row: dict) -> list[str]:
    """The values of a published row."""
    return [printed(value, decimals) for value, (_, _, decimals) in zip(row["values"], paper["columns"], strict=True)]


def paper_values(paper: dict) -> list:
    """The published values of the paper's own model."""
    return next(row["values"] for row in paper["rows"] if row.get("paper"))


def metric(name: str, split: str | None = None) -> Value:
    """`Run.number` of that name."""
    return lambda run: run.number(name, split)


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
    if run.data in SPLITS:
        split, images = SPLITS[run.data]
        found = run.number("images", split)
        if found != images:
            return f"{found:,} images" if found else f"no {split}"
    model = run.metrics.get("run", {}).get("model")
    if model is None or architecture(model) != paper_model():
        return "another model" if model else "unknown model"
    return None


def part_of(run: Run) -> str | None:
    """The part of the paper's table that a run fills; None: its numbers stand in a table of their own."""
    return None if apart(run) else PARTS[run.stage].get((run.data, run.kind))


def labels(group: Sequence[Run]) -> list[str]:
    """The first cells of a row of other data: run, data (one of the paper's with what sets it apart), kind."""
    return [run_name(group), data_label(group[0]), group[0].kind]


def data_label(run: Run) -> str:
    why = apart(run) if run.data in (*SPLITS, "vqa") else None
    return f"{run.data}, {why}" if why else run.data


# --------------------------------------------------------------------------------------------------- Tables 1 to 3


def retrieval_tables(runs: list[Run]) -> list[Table]:
    table, others = published("1", runs, "retrieval", lambda column: metric(f"itm_{column}", "test"))
    table.notes.append("Two-stage ranking: the first candidates by contrast, re-ranked by the fusion encoder.")
    names = [f"{side.upper()} R@{k}" for side, k in (key.split("_r") for key in RECALLS)]
    rows = []
    for group in others:
        name, data, kind = labels(group)
        leads = [[f"{name} {ORDERS['itm']}", data, kind], [ORDERS["itc"], "", ""], [ORDERS["chance"], "", ""]]
        for order, lead in zip(ORDERS, leads, strict=True):
            rows.append([*lead, *(cell(group, metric(f"{order}_{key}"), 1) for key in (*RECALLS, "r_mean"))])
    other = Table("Table 1 on other data, and zero-shot", ["run", "data", "kind", *names, "mean"], rows, [SPLIT])
    return [table, other] if rows else [table]


def caption_tables(runs: list[Run]) -> list[Table]:
    table, others = published("2", runs, "caption", metric)
    pairs = ((run, key) for run in runs for key in SCORES if run.stage == "caption")
    reasons = {f"{SCORES[key]}: {run.number(key)}" for run, key in pairs if isinstance(run.number(key), str)}
    table.notes += sorted(reasons)
    rows = [[*labels(group), *(cell(group, metric(key), 1) for key in SCORES)] for group in others]
    other = Table("Table 2 on other data", ["run", "data", "kind", *SCORES.values()], rows, [SPLIT])
    return [table, other] if rows else [table]


def vqa_tables(runs: list[Run]) -> list[Table]:
    """test-dev and test-std as the evaluation server scored them; val, test and other data by this code."""
    table, _ = published("3", runs, "vqa", lambda column: metric("server", column))
    rows = []
    for group in groups(runs, "vqa"):
        for name, split in (("accuracy", "val"), ("accuracy", "test"), ("server", "test_dev"), ("server", "test_std")):
            if numbers(group, metric(name, split)):
                cells = [cell(group, metric(key, split), 2) for key in (name, "constant")]
                rows.append([*labels(group), split.replace("_", "-"), *cells])
    columns = ["run", "data", "kind", "split", "accuracy", "best constant answers"]
    other = Table("Table 3: all splits, and other data", columns, rows)
    return [table, other] if rows else [table]


def published(number: str, runs: list[Run], stage: str, value: Callable[[str], Value]) -> tuple[Table, list[list[Run]]]:
    """The published rows, and for every experiment a row of this code with its difference to the paper's model.

    value: column, without its part -> the value of a run. -> (the table, groups of runs that fill no part of it)
    """
    paper = PAPER[number]
    rows = [[row["name"], row["data"], *printed_row(paper, row)] for row in paper["rows"]]
    by_part: dict[str | None, list[list[Run]]] = {part: [] for part in (*PARTS[stage].values(), None)}
    for group in groups(runs, stage):
        by_part[part_of(group[0])].append(group)
    others = by_part.pop(None)
    experiments = list(itertools.zip_longest(*by_part.values(), fillvalue=())) or [((),) * len(by_part)]
    for experiment in experiments:
        found = dict(zip(by_part, experiment, strict=True))
        ours, differences = [], []
        for (column, _, decimals), theirs in zip(paper["columns"], paper_values(paper), strict=True):
            part, _, key = column.partition("_")
            ours.append(cell(found[part], value(key), decimals))
            mine = numbers(found[part], value(key))
            differences.append(f"{statistics.fmean(mine) - theirs:+.{decimals}f}" if mine else DASH)
        name = "this code"
        if len(experiments) > 1:
            name += f": {run_name([run for group in experiment for run in group])}"
        rows += [[name, "", *ours], ["difference to the paper", "", *differences]]
    columns = [paper["name"], "data", *(label for _, label, _ in paper["columns"])]
    return Table(f"Table {number}. {paper['title']}", columns, rows), others


# --------------------------------------------------------------------------------------------------------- Table 8


def cost_tables(runs: list[Run], parameters: dict[str, int], pairs_per_second: float | None, gpus: int) -> list[Table]:
    """Published costs, this code's parameters per module, and what the measured speed means for the paper's schedule.

    parameters: tools.benchmark's count at the paper's size; pairs_per_second: measured there, by `gpus` GPUs in all.
    """
    paper = PAPER["8"]
    gpu_seconds = CAPTIONS * EPOCHS * gpus / pairs_per_second if pairs_per_second else None
    days = f"{gpu_seconds / SECONDS_A_DAY:.1f}" if gpu_seconds else NOT_RUN
    coco = next((group for group in groups(runs, "retrieval") if part_of(group[0]) == "coco"), ())
    recalls = [cell(coco, metric(f"itm_{side}_r1", "test"), 1) for side in ("tr", "ir")]
    rows = [[row["name"], *printed_row(paper, row)] for row in paper["rows"]]
    rows.append(["this code", f"{parameters['total'] / 1e6:.1f}M", days, *recalls])
    printed_days = paper_values(paper)[1]
    speed = CAPTIONS * EPOCHS / SECONDS_A_DAY / int(printed_days.split()[0])
    note = (
        "GPU days = 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400, from --pairs_per_second X --gpus N; the "
        f"paper's {printed_days} mean {speed:.1f} pairs/s per GPU."
    )
    columns = [paper["name"], *(label for _, label, _ in paper["columns"])]
    return [Table(f"Table 8. {paper['title']}", columns, rows, [note]), parameter_table(parameters)]


def parameter_table(parameters: dict[str, int]) -> Table:
    """Trainable parameters per module, with and without the encoding head."""
    without = parameters["total"] - parameters["encoding_head"]
    rows = [[name.replace("_", " "), f"{count:,}", f"{count / 1e6:.1f}M"] for name, count in parameters.items()]
    rows.insert(-1, ["total without the encoding head", f"{without:,}", f"{without / 1e6:.1f}M"])
    note = f"{BASE}; a tied tensor counts once. No later stage has the encoding head: inference is the same."
    return Table("Table 8: trainable parameters per module", ["module", "parameters", ""], rows, [note])
