"""Whether ablations stand in the paper's order: the correlation and its chance against scipy, and which runs count."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats  # of scikit-learn

from tools.report import order as report_order
from tools.report import statistics as report_statistics
from tools.report.ablation import NUMBERS
from tools.report.tables import Run, read_paper

PAPERS = {number: read_paper()["tables"][number] for number in NUMBERS}
PAPER_EFFECTS = {  # mean of the differences of the two R@1, from the paper's tables, by hand
    "table4_none": -2.2,
    "table4_pixels": -2.45,
    "table5_random": -0.55,
    "table6_15": -0.65,
    "table6_45": -0.85,
    "table7_none": -1.05,
    "table7_1": -1.4,
    "table7_6": -0.6,
    "table7_9": -0.15,
}


@pytest.mark.parametrize("values", [10_000, 3])  # without and with many equal ones
def test_rank_correlation_is_scipys(values):
    rng = np.random.default_rng(values)
    for _ in range(50):
        first, second = rng.integers(values, size=(2, 9)).astype(float)
        assert report_statistics.rank_correlation(first, second) == pytest.approx(
            stats.spearmanr(first, second).statistic
        )
    assert report_statistics.rank_correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) is None


def test_chance_is_the_share_of_all_orders_that_reach_the_correlation():
    rng = np.random.default_rng(1)
    for _ in range(5):
        first, second = rng.normal(size=(2, 6))
        exact = stats.permutation_test(
            (first,),
            lambda x, other=second: stats.spearmanr(x, other).statistic,
            permutation_type="pairings",
            alternative="greater",
            n_resamples=np.inf,
        ).pvalue
        assert report_statistics.chance(first, second) == pytest.approx(exact, abs=0.006)  # 3.8 of its standard errors


def test_chance_at_the_published_critical_value():
    """Tables of Spearman's coefficient say 0.600 for 9 pairs, one-sided 5%; 0.583 is the next value below it."""
    order, reaches, misses = np.arange(9), [0, 5, 1, 4, 6, 2, 7, 3, 8], [4, 1, 3, 0, 2, 8, 7, 6, 5]
    assert report_statistics.rank_correlation(order, reaches) == pytest.approx(0.6)
    assert report_statistics.rank_correlation(order, misses) == pytest.approx(0.583, abs=5e-4)
    assert report_statistics.chance(order, reaches) < 0.05 < report_statistics.chance(order, misses)


def test_values_that_differ_by_rounding_are_equal():
    assert report_statistics.ranks([0.1 + 0.2, 0.3, -1.0]).tolist() == [1.5, 1.5, 0.0]


def runs_of(effects: dict[str, float], seeds: tuple[int, ...] = (1, 2)) -> dict[str, list[Run]]:
    """Zero-shot runs whose test recall is that of the paper's model plus an effect; val has the opposite effects."""
    return {row: [run(row, seed, effect) for seed in seeds] for row, effect in {"semmim": 0.0, **effects}.items()}


def run(row: str, seed: int, effect: float) -> Run:
    metrics = {s: {"itm_r_mean": 50.0 + seed + sign * effect} for s, sign in (("test", 1), ("val", -1))}
    return Run(Path(row, str(seed)), "retrieval", "zero-shot", "demo", seed, {}, metrics, row=row)


@pytest.mark.parametrize("luck", [(0.0, 0.0), (7.0, -3.0)])  # of the paper's model in each seed: all effects move alike
def test_the_papers_own_effects_are_in_its_order_and_their_opposites_are_not(luck):
    found = runs_of(PAPER_EFFECTS)
    found["semmim"] = [run("semmim", seed, extra) for seed, extra in zip((1, 2), luck, strict=True)]
    (table,) = report_order.order_table(PAPERS, found)
    assert table.rows == [
        ["val", "4 to 7", "9", "-1.00", "1.000", "-1.00 ± 0.00 (2)"],
        ["val", "5 to 7", "7", "-1.00", "1.000", "-1.00 ± 0.00 (2)"],
        ["test", "4 to 7", "9", "+1.00", "<0.001", "+1.00 ± 0.00 (2)"],
        ["test", "5 to 7", "7", "+1.00", "<0.001", "+1.00 ± 0.00 (2)"],
    ]
    assert "retrieval on demo, zero-shot, re-ranked" in table.notes[0]


def test_only_rows_that_were_run_count_and_few_say_nothing():
    some = dict(list(PAPER_EFFECTS.items())[:4])
    (table,) = report_order.order_table(PAPERS, runs_of(some))
    assert [row[:3] for row in table.rows] == [["val", "4 to 7", "4"], ["test", "4 to 7", "4"]]
    assert report_order.order_table(PAPERS, runs_of(dict(list(some.items())[:3]))) == []
    assert report_order.order_table(PAPERS, {}) == []
    without_base = runs_of(PAPER_EFFECTS)
    without_base["semmim"] = []
    assert report_order.order_table(PAPERS, without_base) == []
    equal = runs_of(dict.fromkeys(PAPER_EFFECTS, -1.0))
    assert report_order.order_table(PAPERS, equal)[0].rows[0][3:] == ["-", "-", "-"]


def test_the_seeds_are_those_that_all_rows_have():
    """Else the luck of the paper's model in one seed would move some rows and not the others."""
    found = runs_of(PAPER_EFFECTS)
    found["semmim"] = [run("semmim", 1, 0.0), run("semmim", 2, 30.0)]
    for row in ("table4_none", "table6_15", "table7_9"):
        found[row] = found[row][:1]
    (table,) = report_order.order_table(PAPERS, found)
    assert table.rows[2][3:] == ["+1.00", "<0.001", "+1.00"]
    found["table7_9"] = [run("table7_9", 3, -0.15)]
    found["semmim"].append(run("semmim", 3, 0.0))
    assert report_order.order_table(PAPERS, found)[0].rows[2][2:] == ["9", "-", "-", "-"]


def test_rows_that_scaling_makes_equal_count_once_and_the_papers_model_never():
    found = runs_of(PAPER_EFFECTS)
    found["table7_9"], found["table7_6"] = found["semmim"], found["table7_1"]
    (table,) = report_order.order_table(PAPERS, found)
    assert [row[2] for row in table.rows] == ["7", "5", "7", "5"]
