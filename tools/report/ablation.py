"""Tables 4 to 7, the ablations: a row's number and its effect, the difference to the paper's model, paired by seed.

The paper's columns are R@1 and VQA; the mean of six recalls, which separates small runs with less noise, has a table
of its own beside each, zero-shot too if both were run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from tools.report.runs import Run, Stat, paired_difference, run_name
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
BY_CHANCE = "of 20 effects that are 0, one is expected to have an asterisk by chance"
MARKS = (
    "Shown: mean ± standard deviation (number of seeds); * differs from 0 by a paired t test over the seeds at 5%: "
    f"{BY_CHANCE}."
)
COLUMNS: dict[str, tuple[str, Value]] = {  # of paper_tables.json -> (stage that fills it, value of a run)
    "coco_tr_r1": ("retrieval", metric("itm_tr_r1")),
    "coco_ir_r1": ("retrieval", metric("itm_ir_r1")),
    "vqa_test_dev": ("vqa", vqa_accuracy),
}


class Ablations:
    """The runs of the ablations by row; `base`, a row's name, is the paper's model."""

    base = "semmim"

    def __init__(self, runs: Iterable[Run]):
        self.all = [run for run in runs if run.row]
        finished = [run for run in self.all if "failed" not in run.metrics]
        self.kinds = sorted({run.kind for run in finished if run.stage == "retrieval"}) or ["fine-tuned"]
        self.kind = self.kinds[0]  # that of the paper's columns: zero-shot if no other was run
        self.vqa = sorted({f"vqa on {vqa_data(run)}" for run in finished if run.stage == "vqa"})
        self.retrieval = {
            kind: sorted({data_label(run) for run in finished if run.stage == "retrieval" and run.kind == kind})
            for kind in self.kinds
        }

    def of(self, row: str, stage: str, kind: str | None = None) -> list[Run]:
        """kind: of retrieval."""
        runs = [run for run in self.all if run.row == row and run.stage == stage]
        return [run for run in runs if stage != "retrieval" or run.kind == (kind or self.kind)]

    def effect(self, row: str, stage: str, value: Callable, kind: str | None = None) -> Stat | None:
        """The difference to the paper's model over the seeds of both."""
        return paired_difference(self.of(row, stage, kind), self.of(self.base, stage, kind), value)

    def where(self, kind: str | None = None) -> str:
        """The data and the kind of the retrieval that was run: `retrieval on demo, zero-shot`."""
        kind = kind or self.kind
        return f"retrieval on {' and '.join(self.retrieval[kind])}, {kind}"


def ablation_tables(found: Ablations) -> list[Table]:
    tables = []
    for number in NUMBERS:
        tables.append(ablation_table(number, found))
        tables += [table for kind in found.kinds for table in mean_recall_table(number, found, kind)]
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
            effect = DASH if row.get("paper") else effect_cell(found.effect(row["config"], stage, measure), decimals)
            cells += [printed(value, decimals), published, ours, effect]
        rows.append(cells)
    where = [f"{found.where()} and re-ranked"] if found.retrieval[found.kind] else []
    where += found.vqa
    ours = f"{'; '.join(where)}; of the test split, or of val without one" if where else "not run (tools.ablate)"
    note = f"Effect: difference to the paper's model, for ours the mean over the seeds of both. Ours: {ours}. {MARKS}"
    names = {row["config"] for row in paper["rows"]}
    failed = [run for run in found.all if run.row in names and "failed" in run.metrics]
    notes = [note, *(f"{run_name([run])} {run.metrics['failed']}" for run in failed)]
    return Table(f"Table {number}. {paper['title']}", columns, rows, notes, paper=paper_rows(paper))


def vqa_data(run: Run) -> str:
    """The data and the split of `vqa_accuracy`."""
    return f"{data_label(run)}, {'test-dev' if 'test_dev' in run.server else run.split_of('accuracy')}"


def effect_cell(effect: Stat | None, decimals: int) -> str:
    return DASH if effect is None else effect.show(decimals, effect=True)


def mean_recall_table(number: str, found: Ablations, kind: str) -> list[Table]:
    """A row per row of the paper: ours alone, the mean of six recalls by both stages, per split; [] without any run."""
    paper = PAPER[number]
    if not any(found.of(row["config"], "retrieval", kind) for row in paper["rows"]):
        return []
    columns, rows = [paper["name"]], []
    for split in ("val", "test"):
        columns += [f"{split} by ITC", f"{split} re-ranked", f"{split} effect"]
    for row in paper["rows"]:
        mine, cells = found.of(row["config"], "retrieval", kind), [row["name"]]
        for split in ("val", "test"):
            itc, itm = (metric(f"{order}_r_mean", split) for order in ("itc", "itm"))
            effect = None if row.get("paper") else found.effect(row["config"], "retrieval", itm, kind)
            cells += [cell(mine, itc, 1), cell(mine, itm, 1), effect_cell(effect, 1)]
        rows.append(cells)
    note = (
        f"{paper['title']}. Mean of R@1, R@5 and R@10 in both directions, {found.where(kind)}, on val and "
        "test: by ITC alone, and with the first candidates re-ranked by the fusion encoder. Effect: of the re-ranked, "
        f"the difference to the paper's model, over the seeds of both. {MARKS}"
    )
    title = f"Table {number}: this code by the mean of six recalls" + (", zero-shot" if kind != found.kind else "")
    return [Table(title, columns, rows, [note], paper=paper_rows(paper))]


def published_recall_effect(paper: dict, row: dict) -> float:
    """The paper's effect of a row on its R@1, mean of both directions."""
    places = [place for place, (key, _, _) in enumerate(paper["columns"]) if COLUMNS[key][0] == "retrieval"]
    return statistics.fmean(row["values"][place] - paper_values(paper)[place] for place in places)
