"""Mean and spread of runs that differ in nothing but their seed, and whether two orders agree, for tools/report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Student's t for a two-sided test at 5%, by degrees of freedom from 1; with more of them the last is a little strict
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
ORDERS = 100_000  # random ones of a permutation test


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation of `count` values; spread 0 with one value."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat | None:
        """None without any value."""
        values = [float(value) for value in values]
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def differs_from_zero(self) -> bool:
        """By a t test at 5%; of paired differences it is the paired test. False with one value."""
        if self.count < 2:
            return False
        quantile = T_QUANTILES[min(self.count - 1, len(T_QUANTILES)) - 1]
        return abs(self.mean) * math.sqrt(self.count) > quantile * self.spread

    def show(self, decimals: int, effect: bool = False, signed: bool = False) -> str:
        """mean ± spread (count); an effect has its sign, and an asterisk where it differs from 0."""
        text = f"{self.mean:{'+' if effect or signed else ''}.{decimals}f}"
        text += "*" if effect and self.differs_from_zero() else ""
        return f"{text} ± {self.spread:.{decimals}f} ({self.count})" if self.count > 1 else text


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank; None where all of one are equal."""
    centered = [ranks(values) - (len(values) - 1) / 2 for values in (first, second)]
    length = float(np.linalg.norm(centered[0]) * np.linalg.norm(centered[1]))
    return float(centered[0] @ centered[1]) / length if length else None


def ranks(values: Sequence[float]) -> np.ndarray:
    """0 for the smallest; values that are equal but for rounding share the mean of their ranks."""
    values = np.round(np.asarray(values, dtype=float), 9)
    below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return below + (same - 1) / 2


def chance(first: Sequence[float], second: Sequence[float]) -> float:
    """How often a random order of `second` has at least its rank correlation with `first`; the given one counts too."""
    fixed, moving = ranks(first), ranks(second)
    orders = np.random.default_rng(0).permuted(np.tile(moving, (ORDERS, 1)), axis=1)
    return float((1 + (orders @ fixed >= moving @ fixed - 1e-9).sum()) / (1 + ORDERS))
