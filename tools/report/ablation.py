"""Tables 4 to 7, the ablations: a row's number and its effect, the difference to the paper's model, paired by seed.

The paper's columns are R@1 and VQA; the mean of six recalls, which separates small runs with less noise, has a table
of its own beside each, zero-shot too if both were run.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.report.runs import Run, paired_differences, show
from tools.report.tables import DASH, PAPER, Table, Value, cell, data_label, metric, paper_values, printed

NUMBERS = ("4", "5", "6", "7")
NOTE = (
    "Effect: the difference to the paper's model over the seeds of both. Shown: mean ± standard deviation (number of "
    "seeds); * differs from 0 by a paired t test over the seeds at 5%: of 20 effects that are 0, one is expected to "
    "have an asterisk by chance."
)


def ablation_tables(runs: Sequence[Run]) -> list[Table]:
    """By the fine-tuned models, or the zero-shot ones if there are no others; mean recalls of both."""
    kinds = sorted({run.kind for run in runs if run.row and run.stage == "retrieval"})
    tables = []
    for number in NUMBERS:
        tables.append(ablation_table(number, Ablations(runs, kinds[0] if kinds else "fine-tuned")))
        tables += [mean_recall_table(number, Ablations(runs, kind)) for kind in kinds]
    return tables


class Ablations:
    """The runs of the ablations, of retrieval those of one kind."""

    def __init__(self, runs: Sequence[Run], kind: str):
        self.kind = kind
        self.all = [run for run in runs if run.row and (run.stage != "retrieval" or run.kind == kind)]

    def of(self, row: str, stage: str) -> list[Run]:
        return [run for run in self.all if run.row == row and run.stage == stage]

    def effect(self, row: dict, stage: str, value: Value, decimals: int) -> str:
        """The difference to the paper's model over the seeds of both; the paper's model itself has none."""
        others = () if row.get("paper") else self.of("semmim", stage)
        found = paired_differences(self.of(row["config"], stage), others, value)
        return show(found, decimals, effect=True) if found else DASH

    def vqa_accuracy(self) -> Value:
        """The server's test-dev if it is known of all runs, else the accuracy on test (or val)."""
        scored = all("test_dev" in run.metrics for run in self.all if run.stage == "vqa")
        return metric("server", "test_dev") if scored else metric("accuracy")

    def data(self) -> str:
        """What was run, and on which data."""
        names = sorted({f"{run.stage} on {data_label(run)}, {run.kind}" for run in self.all})
        return "; ".join(names) or "not run (tools.ablate)"


def ablation_table(number: str, found: Ablations) -> Table:
    """A row per row of the paper: its number and effect (difference to the paper's model) beside ours, per column."""
    paper = PAPER[number]
    columns, rows = [paper["name"]], []
    for _, label, _ in paper["columns"]:
        columns += [f"{label}: paper", "effect", "ours", "effect "]
    for row in paper["rows"]:
        cells = [row["name"]]
        for (key, _, decimals), value, best in zip(paper["columns"], row["values"], paper_values(paper), strict=True):
            stage, measure = ("vqa", found.vqa_accuracy()) if key == "vqa_test_dev" else ("retrieval", recall(key))
            published = DASH if row.get("paper") else f"{value - best:+.{decimals}f}"
            ours = cell(found.of(row["config"], stage), measure, decimals)
            cells += [printed(value, decimals), published, ours, found.effect(row, stage, measure, decimals)]
        rows.append(cells)
    notes = [
        f"Ours: {found.data()}; re-ranked; of test, or of val without one; VQA of test-dev if all runs have it. {NOTE}"
    ]
    return Table(f"Table {number}. {paper['title']}", columns, rows, notes)


def recall(key: str) -> Value:
    """coco_tr_r1 -> the re-ranked recall of a run."""
    return metric(f"itm_{key.removeprefix('coco_')}")


def mean_recall_table(number: str, found: Ablations) -> Table:
    """A row per row of the paper: ours alone, the mean of six recalls by both stages, per split."""
    paper = PAPER[number]
    columns, rows = [paper["name"]], []
    for split in ("val", "test"):
        columns += [f"{split} by ITC", f"{split} re-ranked", f"{split} effect"]
    for row in paper["rows"]:
        mine, cells = found.of(row["config"], "retrieval"), [row["name"]]
        for split in ("val", "test"):
            itc, itm = (metric(f"{order}_r_mean", split) for order in ("itc", "itm"))
            cells += [cell(mine, itc, 1), cell(mine, itm, 1), found.effect(row, "retrieval", itm, 1)]
        rows.append(cells)
    title = f"Table {number}: this code by the mean of six recalls, {found.kind}"
    return Table(title, columns, rows, [f"Ours: {found.data()}, the effect too. {NOTE}"])
