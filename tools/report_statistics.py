"""Mean and spread of runs that differ in nothing but their seed, for tools/report.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

# Student's t for a two-sided test at 5%, by degrees of freedom from 1; with more of them the last is a little strict
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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

    def show(self, decimals: int, effect: bool = False) -> str:
        """mean ± spread (count); an effect has its sign, and an asterisk where it differs from 0."""
        text = f"{self.mean:{'+' if effect else ''}.{decimals}f}"
        text += "*" if effect and self.differs_from_zero() else ""
        return f"{text} ± {self.spread:.{decimals}f} ({self.count})" if self.count > 1 else text
