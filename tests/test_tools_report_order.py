"""Whether ablations stand in the paper's order: the correlation and its chance against scipy, and which runs count."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats  # of scikit-learn

from tools import report_order, report_statistics
from tools.report_ablation import NUMBERS
from tools.report_tables import Run, read_paper

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
    # published tables of Spearman's coefficient: 0.600 at 5%, 0.783 at 1%, one-sided, for 9 pairs
    order = np.arange(9.0)
    assert report_statistics.chance(order, order) < 1e-4
    swapped = np.array([1, 0, 2, 3, 6, 4, 5, 8, 7.0])
    assert (
        report_statistics.rank_correlation(order, swapped) > 0.783 and report_statistics.chance(order, swapped) < 0.01
    )


def runs_of(effects: dict[str, float], best: float = 50.0, seeds: tuple[int, ...] = (1, 2)) -> dict[str, list[Run]]:
    """Zero-shot runs whose test recall is that of the paper's model plus an effect; val has the opposite effects."""
    found = {}
    for row, effect in {"semmim": 0.0, **effects}.items():
        for seed in seeds:
            metrics = {
                split: {"itm_r_mean": best + seed + sign * effect, "itc_r_mean": 1.0}
                for split, sign in (("test", 1), ("val", -1))
            }
            run = Run(Path(row), "retrieval", "zero-shot", "demo", seed, {}, metrics, row=row)
            found.setdefault(row, []).append(run)
    return found


@pytest.mark.parametrize("best", [50.0, 10.0])  # a lucky or unlucky paper's model moves all effects together
def test_the_papers_own_effects_are_in_its_order_and_their_opposites_are_not(best):
    (table,) = report_order.order_table(PAPERS, runs_of(PAPER_EFFECTS, best))
    val, test = table.rows
    assert test == ["test", "9", "+1.00", "0.000", "1.00 ± 0.00 (2)"]
    assert val == ["val", "9", "-1.00", "1.000", "-1.00 ± 0.00 (2)"]
    assert "retrieval on demo, zero-shot, re-ranked" in table.notes[0]


def test_only_rows_that_were_run_count_and_few_say_nothing():
    some = dict(list(PAPER_EFFECTS.items())[:4])
    (table,) = report_order.order_table(PAPERS, runs_of(some))
    assert [row[1] for row in table.rows] == ["4", "4"]
    assert report_order.order_table(PAPERS, runs_of(dict(list(some.items())[:3]))) == []
    assert report_order.order_table(PAPERS, {}) == []
    without_base = runs_of(PAPER_EFFECTS)
    without_base["semmim"] = []
    assert report_order.order_table(PAPERS, without_base) == []
    equal = runs_of(dict.fromkeys(PAPER_EFFECTS, -1.0))
    assert report_order.order_table(PAPERS, equal)[0].rows[0] == ["val", "9", "-", "-", "-"]


def test_a_seed_without_all_rows_has_no_correlation_of_its_own():
    found = runs_of(PAPER_EFFECTS)
    found["table7_9"] = found["table7_9"][:1]
    (table,) = report_order.order_table(PAPERS, found)
    assert table.rows[1][-1] == "1.00"
