"""Whether the rows of Tables 4 to 7 stand in the paper's order, all tables together.

A single effect of a point drowns in small runs' noise; that nine rows come in nearly the same order as nine others does
not. The paper's model, from which all effects are measured, has no part in it: were it lucky, or not, all effects would
move together and their order would stay.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.report_ablation import mean_recall, of_stage, published_recall_effect, retrieval_kind, where_ours
from tools.report_statistics import ORDERS, Stat, chance, rank_correlation
from tools.report_tables import DASH, Run, Table, paired_difference, show

FEWEST = 4  # rows: of three, one order in six is the paper's by chance


def order_table(papers: dict[str, dict], rows_found: dict[str, list[Run]]) -> list[Table]:
    """The rank correlation of our effects with the paper's, on val and test; [] where too few rows were run.

    papers: {number: table of tools/paper_tables.json}.
    """
    everything = [run for runs in rows_found.values() for run in runs]
    kind = retrieval_kind(everything)
    base = of_stage(rows_found, "semmim", "retrieval", kind)
    rows = []
    for split in ("val", "test"):
        published, ours = [], []
        for paper in papers.values():
            for row in (row for row in paper["rows"] if not row.get("paper")):
                runs = of_stage(rows_found, row["config"], "retrieval", kind)
                effects = effects_by_seed(runs, base, split)
                if effects:
                    published.append(published_recall_effect(paper, row))
                    ours.append(effects)
        if len(ours) >= FEWEST:
            rows.append([split, str(len(ours)), *agreement(published, ours)])
    if not rows:
        return []
    note = (
        "Spearman's rank correlation between the effects of all rows: the paper's (mean of its two R@1) and ours "
        f"({where_ours(everything, kind)}, re-ranked, mean of six recalls, mean over the seeds). p: how often one of "
        f"{ORDERS:,} random orders of our effects reaches it (one-sided). By seed: the correlation of each seed's own "
        "effects, mean ± standard deviation (number of seeds)."
    )
    columns = ["split", "rows", "rank correlation", "p", "by seed"]
    return [Table("Tables 4 to 7: do the rows stand in the paper's order?", columns, rows, [note])]


def effects_by_seed(runs: Sequence[Run], base: Sequence[Run], split: str) -> dict[int, float]:
    """{seed: the re-ranked mean of six recalls less that of the paper's model}"""
    value = mean_recall("itm", split)
    differences = ((run.seed, paired_difference([run], base, value)) for run in runs)
    return {seed: difference.mean for seed, difference in differences if difference is not None}


def agreement(published: Sequence[float], ours: Sequence[dict[int, float]]) -> list[str]:
    """The cells (correlation, p, by seed) of a split; ours: a row's effects by seed."""
    means = [statistics.fmean(effects.values()) for effects in ours]
    correlation = rank_correlation(published, means)
    if correlation is None:
        return [DASH] * 3
    seeds = set.intersection(*(set(effects) for effects in ours))
    each = (rank_correlation(published, [effects[seed] for effects in ours]) for seed in sorted(seeds))
    by_seed = Stat.of(value for value in each if value is not None)
    return [f"{correlation:+.2f}", f"{chance(published, means):.3f}", show(by_seed, 2)]
