"""Tables 4 to 7, the ablations: a row's number and its effect, the difference to the paper's model, paired by seed.

The paper's columns are R@1 and VQA; the mean of six recalls, which separates small runs with less noise, has a table
of its own beside each. The last table asks whether the rows stand in the paper's order, all together and those of
Tables 5 to 7 alone: if each effect drowns in the noise of small runs, their order may still say something, and it
does not depend on the luck of the paper's model, from which all effects of a seed are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tools.report.runs import Run, Stat, is_number, paired_difference
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
ORDERS = 100_000  # random ones of a permutation test
FEWEST = 4  # rows of an order: of three, one order in six is the paper's by chance
GROUPS = {"4 to 7": "4567", "5 to 7": "567"}  # Table 4's effects are the largest, and decide the order of all


class Ablations:
    """The runs of the ablations by row; of retrieval the fine-tuned ones, or the zero-shot ones if there are no others.

    `base`, a row's name, is the paper's model.
    """

    base = "semmim"

    def __init__(self, runs: Iterable[Run]):
        self.all = [run for run in runs if run.row]
        kinds = {run.kind for run in self.all if run.stage == "retrieval"}
        self.kind = "zero-shot" if kinds == {"zero-shot"} else "fine-tuned"

    def of(self, row: str, stage: str) -> list[Run]:
        runs = [run for run in self.all if run.row == row and run.stage == stage]
        return [run for run in runs if stage != "retrieval" or run.kind == self.kind]

    def effect(self, row: str, stage: str, value: Callable) -> Stat | None:
        """The difference to the paper's model over the seeds of both."""
        return paired_difference(self.of(row, stage), self.of(self.base, stage), value)

    def where(self) -> str:
        """The data and the kind of the retrieval that was run: `retrieval on demo, zero-shot`."""
        data = sorted({data_label(run) for run in self.all if run.stage == "retrieval"})
        return f"retrieval on {' and '.join(data)}, {self.kind}"


def ablation_tables(found: Ablations) -> list[Table]:
    tables = []
    for number in NUMBERS:
        tables += [ablation_table(number, found), *mean_recall_table(number, found)]
    return tables + order_table(found)


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
            cells += [printed(value, decimals), published, ours, effect_cell(row, found, stage, measure, decimals)]
        rows.append(cells)
    where = [f"{found.where()} and re-ranked"] if any(run.stage == "retrieval" for run in found.all) else []
    where += sorted({f"vqa on {vqa_data(run)}" for run in found.all if run.stage == "vqa"})
    ours = f"{'; '.join(where)}; of the test split, or of val without one" if where else "not run (tools.ablate)"
    note = f"Effect: difference to the paper's model, for ours the mean over the seeds of both. Ours: {ours}. {MARKS}"
    return Table(f"Table {number}. {paper['title']}", columns, rows, [note], paper=paper_rows(paper))


def vqa_data(run: Run) -> str:
    """The data and the split of `vqa_accuracy`."""
    return f"{data_label(run)}, {'test-dev' if 'test_dev' in run.server else run.split_of('accuracy')}"


def effect_cell(row: dict, found: Ablations, stage: str, value: Callable, decimals: int) -> str:
    """The effect of a row of the paper; the paper's model, which it is measured from, has none."""
    effect = None if row.get("paper") else found.effect(row["config"], stage, value)
    return DASH if effect is None else effect.show(decimals, effect=True)


def mean_recall_table(number: str, found: Ablations) -> list[Table]:
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
            cells += [cell(mine, metric(f"{order}_r_mean", split), 1) for order in ("itc", "itm")]
            cells.append(effect_cell(row, found, "retrieval", metric("itm_r_mean", split), 1))
        rows.append(cells)
    note = (
        f"{paper['title']}. Mean of R@1, R@5 and R@10 in both directions, {found.where()}, on val and "
        "test: by ITC alone, and with the first candidates re-ranked by the fusion encoder. Effect: of the re-ranked, "
        f"the difference to the paper's model, over the seeds of both. {MARKS}"
    )
    title = f"Table {number}: this code by the mean of six recalls"
    return [Table(title, columns, rows, [note], paper=paper_rows(paper))]


def published_recall_effect(paper: dict, row: dict) -> float:
    """The paper's effect of a row on its R@1, mean of both directions."""
    places = [place for place, (key, _, _) in enumerate(paper["columns"]) if COLUMNS[key][0] == "retrieval"]
    return statistics.fmean(row["values"][place] - paper_values(paper)[place] for place in places)


# ------------------------------------------------------------------------------------------------- the rows' order


def order_table(found: Ablations) -> list[Table]:
    """The rank correlation of our effects with the paper's, on val and test; [] if too few rows were run."""
    rows = []
    for split in ("val", "test"):
        for name, numbers in GROUPS.items():
            published, ours = effects(numbers, found, split)
            if len(published) >= FEWEST:
                rows.append([split, name, str(len(published)), *agreement(published, ours)])
    if not rows:
        return []
    note = (
        "Spearman's rank correlation between the effects of the rows: the paper's (mean of its two R@1) and ours "
        f"({found.where()}, re-ranked, mean of six recalls, mean over the seeds that all rows have). p: "
        f"how often one of {ORDERS:,} random orders of our effects reaches it (one-sided). By seed: the correlation of "
        "each seed's own effects, mean ± standard deviation (number of seeds)."
    )
    columns = ["split", "tables", "rows", "rank correlation", "p", "by seed"]
    return [Table("Tables 4 to 7: do the rows stand in the paper's order?", columns, rows, [note])]


def effects(numbers: str, found: Ablations, split: str) -> tuple[list[float], list[dict[int, float]]]:
    """Of the rows that were run, but the paper's model: the paper's effects, and ours by seed."""
    value = metric("itm_r_mean", split)
    of_base = {run.seed: value(run) for run in found.of(found.base, "retrieval")}
    published, ours = [], []
    for paper, row in ((PAPER[number], row) for number in numbers for row in PAPER[number]["rows"]):
        if row.get("paper"):
            continue
        by_seed = {
            run.seed: value(run) - of_base[run.seed]
            for run in found.of(row["config"], "retrieval")
            if is_number(value(run)) and is_number(of_base.get(run.seed))
        }
        if by_seed:
            published.append(published_recall_effect(paper, row))
            ours.append(by_seed)
    return published, ours


def agreement(published: list[float], ours: list[dict[int, float]]) -> list[str]:
    """The cells (correlation, p, by seed) of some rows, over the seeds that all of them have."""
    seeds = sorted(set.intersection(*map(set, ours)))
    means = [statistics.fmean(of_row[seed] for seed in seeds) for of_row in ours] if seeds else []
    correlation = rank_correlation(published, means) if seeds else None
    if correlation is None:
        return [DASH] * 3
    each = (rank_correlation(published, [of_row[seed] for of_row in ours]) for seed in seeds)
    by_seed = Stat.of(value for value in each if value is not None)
    p = chance(published, means)
    shown = f"{p:.3f}" if p >= 0.001 else "<0.001"
    return [f"{correlation:+.2f}", shown, DASH if by_seed is None else by_seed.show(2, signed=True)]


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; values that are equal but for rounding share the mean of their ranks."""
    from scipy.stats import rankdata

    return rankdata(np.round(np.asarray(values, dtype=float), 9))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None if all values of one are equal."""
    from scipy.stats import spearmanr

    first, second = ranks(first), ranks(second)
    return float(spearmanr(first, second).statistic) if np.ptp(first) and np.ptp(second) else None


def chance(first: Sequence[float], second: Sequence[float]) -> float:
    """How often a random order of `second` has at least its rank correlation with `first`; the given one counts too."""
    fixed, moving = ranks(first), ranks(second)
    orders = np.random.default_rng(0).permuted(np.tile(moving, (ORDERS, 1)), axis=1)
    return float((1 + (orders @ fixed >= moving @ fixed - 1e-9).sum()) / (1 + ORDERS))
