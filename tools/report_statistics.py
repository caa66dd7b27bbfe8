"""Mean and spread of runs that differ in nothing but their seed, for tools/report.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


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

    def show(self, decimals: int, sign: bool = False) -> str:
        text = f"{self.mean:{'+' if sign else ''}.{decimals}f}"
        return f"{text} ± {self.spread:.{decimals}f} ({self.count})" if self.count > 1 else text
