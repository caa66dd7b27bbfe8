"""Tables 4 to 7, the ablations: a row's number and its effect, the difference to the paper's model, paired by seed.

The paper's columns are R@1 and VQA; the mean of six recalls, which separates small runs with less noise, has a table
of its own beside each, zero-shot too if both were run.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.report.runs import Run, paired_difference, run_name
from tools.report.tables import (
    DASH,
    PAPER,
    Table,
    Value,
    cell,
    data_label,
    metric,
    paper_rows,
    paper_values,
    printed,
    vqa_accuracy,
)

NUMBERS = ("4", "5", "6", "7")
MARKS = (
    "Shown: mean ± standard deviation (number of seeds); * differs from 0 by a paired t test over the seeds at 5%: "
    "of 20 effects that are 0, one is expected to have an asterisk by chance."
)
COLUMNS: dict[str, tuple[str, Value]] = {  # of paper_tables.json -> (stage that fills it, value of a run)
    "coco_tr_r1": ("retrieval", metric("itm_tr_r1")),
    "coco_ir_r1": ("retrieval", metric("itm_ir_r1")),
    "vqa_test_dev": ("vqa", vqa_accuracy),
}


class Ablations:
    """The runs of the ablations, of retrieval those of one kind; `base`, a row's name, is the paper's model."""

    base = "semmim"

    def __init__(self, runs: Sequence[Run], kind: str):
        self.kind = kind
        self.all = [run for run in runs if run.row and (run.stage != "retrieval" or run.kind == kind)]

    def of(self, row: str, stage: str) -> list[Run]:
        return [run for run in self.all if run.row == row and run.stage == stage]

    def effect(self, row: dict, stage: str, value: Value, decimals: int) -> str:
        """The difference to the paper's model over the seeds of both; the paper's model itself has none."""
        runs, others = self.of(row["config"], stage), self.of(self.base, stage)
        effect = None if row.get("paper") else paired_difference(runs, others, value)
        return DASH if effect is None else effect.show(decimals, effect=True)

    def data(self, stage: str) -> str:
        """The data, with the split of `vqa_accuracy`; "" if the stage was not run."""
        finished = [run for run in self.all if run.stage == stage and "failed" not in run.metrics]
        names = {data_label(run) + (f", {vqa_split(run)}" if stage == "vqa" else "") for run in finished}
        return " and ".join(sorted(names))


def ablation_tables(runs: Sequence[Run]) -> list[Table]:
    """By the fine-tuned models, or the zero-shot ones if there are no others; mean recalls of both."""
    kinds = sorted({run.kind for run in runs if run.row and run.stage == "retrieval" and "failed" not in run.metrics})
    first, *others = [Ablations(runs, kind) for kind in kinds or ["fine-tuned"]]
    tables = []
    for number in NUMBERS:
        tables += [ablation_table(number, first), *mean_recall_table(number, first)]
        tables += [table for found in others for table in mean_recall_table(number, found, f", {found.kind}")]
    return tables


def ablation_table(number: str, found: Ablations) -> Table:
    """A row per row of the paper: its number and effect (difference to the paper's model) beside ours, per column."""
    paper = PAPER[number]
    columns, rows = [paper["name"]], []
    for _, label, _ in paper["columns"]:
        columns += [f"{label}: paper", "effect", "ours", "effect "]
    for row in paper["rows"]:
        cells = [row["name"]]
        for (key, _, decimals), value, best in zip(paper["columns"], row["values"], paper_values(paper), strict=True):
            stage, measure = COLUMNS[key]
            published = DASH if row.get("paper") else f"{value - best:+.{decimals}f}"
            ours = cell(found.of(row["config"], stage), measure, decimals)
            effect = found.effect(row, stage, measure, decimals)
            cells += [printed(value, decimals), published, ours, effect]
        rows.append(cells)
    retrieval, vqa = found.data("retrieval"), found.data("vqa")
    where = [f"retrieval on {retrieval}, {found.kind} and re-ranked"] if retrieval else []
    where += [f"vqa on {vqa}"] if vqa else []
    ours = f"{'; '.join(where)}; of the test split, or of val without one" if where else "not run (tools.ablate)"
    note = f"Effect: difference to the paper's model, for ours the mean over the seeds of both. Ours: {ours}. {MARKS}"
    names = {row["config"] for row in paper["rows"]}
    failed = [run for run in found.all if run.row in names and "failed" in run.metrics]
    notes = [note, *(f"{run_name([run])} {run.metrics['failed']}" for run in failed)]
    return Table(f"Table {number}. {paper['title']}", columns, rows, notes, paper=paper_rows(paper))


def vqa_split(run: Run) -> str | None:
    """The split of `vqa_accuracy`."""
    return "test-dev" if "test_dev" in run.server else run.split_of("accuracy")


def mean_recall_table(number: str, found: Ablations, ending: str = "") -> list[Table]:
    """A row per row of the paper: ours alone, the mean of six recalls by both stages, per split; [] without any run."""
    paper = PAPER[number]
    if not any(found.of(row["config"], "retrieval") for row in paper["rows"]):
        return []
    columns, rows = [paper["name"]], []
    for split in ("val", "test"):
        columns += [f"{split} by ITC", f"{split} re-ranked", f"{split} effect"]
    for row in paper["rows"]:
        mine, cells = found.of(row["config"], "retrieval"), [row["name"]]
        for split in ("val", "test"):
            itc, itm = (metric(f"{order}_r_mean", split) for order in ("itc", "itm"))
            cells += [cell(mine, itc, 1), cell(mine, itm, 1), found.effect(row, "retrieval", itm, 1)]
        rows.append(cells)
    note = (
        f"{paper['title']}. Mean of R@1, R@5 and R@10 in both directions, retrieval on {found.data('retrieval')}, "
        f"{found.kind}, on val and test: by ITC alone, and with the first candidates re-ranked by the fusion encoder. "
        f"Effect: of the re-ranked, the difference to the paper's model, over the seeds of both. {MARKS}"
    )
    title = f"Table {number}: this code by the mean of six recalls{ending}"
    return [Table(title, columns, rows, [note], paper=paper_rows(paper))]
