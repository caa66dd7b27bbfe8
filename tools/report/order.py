"""Whether the rows of Tables 4 to 7 stand in the paper's order, all together, and those of Tables 5 to 7 alone.

Where each effect drowns in the noise of small runs, their order may still say something. It does not depend on the
paper's model, from which all effects of a seed are measured: were it lucky, all of them would fall alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.report.ablation import mean_recall, of_stage, published_recall_effect, retrieval_kind, where_ours
from tools.report.statistics import ORDERS, Stat, chance, rank_correlation
from tools.report.tables import DASH, Run, Table, paired_difference

FEWEST = 4  # rows: of three, one order in six is the paper's by chance
GROUPS = {"4 to 7": "4567", "5 to 7": "567"}  # Table 4's effects are the largest, and decide the order of all
Effects = list[tuple[float, dict[int, float]]]  # of each row: the paper's, and ours by seed


def order_table(papers: dict[str, dict], rows_found: dict[str, list[Run]]) -> list[Table]:
    """The rank correlation of our effects with the paper's, on val and test; [] where too few rows were run.

    papers: {number: table of paper_tables.json}. Rows that share their runs count once, and not at all where the runs
    are those of the paper's model. Of the seeds, those that all rows have.
    """
    everything = [run for runs in rows_found.values() for run in runs]
    kind = retrieval_kind(everything)
    rows = []
    for split in ("val", "test"):
        for name, numbers in GROUPS.items():
            effects = effects_of([papers[number] for number in numbers], rows_found, kind, split)
            if len(effects) >= FEWEST:
                rows.append([split, name, str(len(effects)), *agreement(effects)])
    if not rows:
        return []
    note = (
        "Spearman's rank correlation between the effects of the rows: the paper's (mean of its two R@1) and ours "
        f"({where_ours(everything, kind)}, re-ranked, mean of six recalls, mean over the seeds that all rows have). p: "
        f"how often one of {ORDERS:,} random orders of our effects reaches it (one-sided). By seed: the correlation of "
        "each seed's own effects, mean ± standard deviation (number of seeds)."
    )
    columns = ["split", "tables", "rows", "rank correlation", "p", "by seed"]
    return [Table("Tables 4 to 7: do the rows stand in the paper's order?", columns, rows, [note])]


def effects_of(papers: Sequence[dict], rows_found: dict[str, list[Run]], kind: str, split: str) -> Effects:
    """The effects of all rows that have runs of their own."""
    base = of_stage(rows_found, "semmim", "retrieval", kind)
    counted, effects = {run.folder for run in base}, []
    for paper in papers:
        for row in paper["rows"]:
            runs = of_stage(rows_found, row["config"], "retrieval", kind)
            ours = effects_by_seed(runs, base, split)
            if ours and counted.isdisjoint(run.folder for run in runs):
                effects.append((published_recall_effect(paper, row), ours))
                counted.update(run.folder for run in runs)
    return effects


def effects_by_seed(runs: Sequence[Run], base: Sequence[Run], split: str) -> dict[int, float]:
    """{seed: the re-ranked mean of six recalls less that of the paper's model}"""
    value = mean_recall("itm", split)
    differences = ((run.seed, paired_difference([run], base, value)) for run in runs)
    return {seed: difference.mean for seed, difference in differences if difference is not None}


def agreement(effects: Effects) -> list[str]:
    """The cells (correlation, p, by seed) of some rows."""
    published = [paper for paper, _ in effects]
    seeds = sorted(set.intersection(*(set(ours) for _, ours in effects)))
    means = [statistics.fmean(ours[seed] for seed in seeds) for _, ours in effects] if seeds else []
    correlation = rank_correlation(published, means) if seeds else None
    if correlation is None:
        return [DASH] * 3
    each = (rank_correlation(published, [ours[seed] for _, ours in effects]) for seed in seeds)
    by_seed = Stat.of(value for value in each if value is not None)
    p = chance(published, means)
    return [
        f"{correlation:+.2f}",
        f"{p:.3f}" if p >= 0.001 else "<0.001",
        DASH if by_seed is None else by_seed.show(2, signed=True),
    ]
