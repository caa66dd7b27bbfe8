"""What the values of a configuration may be: each rule takes a dotted key and its value, and raises UserError."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from utils import UserError, one_line, shown


def whole(low: int, high: float = math.inf) -> Callable[[str, object], None]:
    """A whole number of at least `low` (and at most `high`)."""

    def check(key: str, value) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{key}: {shown(value)} must be a whole number {limits}")

    return check


def number(low: float = 0.0, high: float = math.inf, above: bool = False) -> Callable[[str, object], None]:
    """A finite number from `low` (with `above`: above it) to `high`."""

    def check(key: str, value) -> None:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        real = real and abs(value) <= sys.float_info.max  # a whole number of 309 digits is beyond every float
        if not real or not (low < value if above else low <= value) or value > high:
            limits = [f"{'above' if above else 'of at least'} {low:g}"] if low > -math.inf else []
            limits += [f"of at most {high:g}"] if high < math.inf else []
            raise UserError(f"{key}: {shown(value)} must be a finite number {' and '.join(limits)}".rstrip())

    return check


def or_none(rule: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """What `rule` accepts, or null."""

    def check(key: str, value) -> None:
        if value is not None:
            rule(key, value)

    return check


def choice(*known: str) -> Callable[[str, object], None]:
    """One of these words."""

    def check(key: str, value) -> None:
        if value not in known:
            raise UserError(f"{key}: {shown(value)} is none of {', '.join(known)}")

    return check


def text(key: str, value) -> None:
    """Text, such as a path."""
    if not isinstance(value, str):
        raise UserError(f"{key}: {shown(value)} must be text")


def texts_by_name(key: str, value) -> None:
    """A map of text to text."""
    if wrong := [(name, item) for name, item in value.items() if not isinstance(item, str)]:
        raise UserError(f"{key}.{one_line(wrong[0][0])}: {shown(wrong[0][1])} must be text")


def crop_scale(key: str, value) -> None:
    """The smallest and the largest share of the image's area that a random crop takes."""
    if not (_numbers(value, 2) and 0 < value[0] <= value[1] <= 1):
        raise UserError(
            f"{key}: {shown(value)} must be [smallest, largest], shares of the area with 0 < smallest <= largest <= 1"
        )


def betas(key: str, value) -> None:
    """AdamW's two decay rates."""
    if not (_numbers(value, 2) and all(0 <= rate < 1 for rate in value)):
        raise UserError(f"{key}: {shown(value)} must be two numbers of at least 0 and below 1")


def folders(key: str, value) -> None:
    """One folder, or {data set: folder}."""
    paths = value if isinstance(value, dict) else {"": value}
    if not paths or not all(isinstance(text, str) for text in [*paths, *paths.values()]) or "" in paths.values():
        raise UserError(f"{key}: {shown(value)} must be a folder, or a map from the entries' `dataset` to folders")


def files(key: str, value) -> None:
    """The paths of files, or of none."""
    if not all(isinstance(path, str) and path for path in value):
        raise UserError(f"{key}: {shown(value)} must be a list of files")


def weights(key: str, value) -> None:
    """{data set: weight of its answers}"""
    for name, weight in value.items():
        number(0)(f"{key}.{name}", weight)


def splits(key: str, value) -> None:
    """Which splits are evaluated at the end."""
    if not value or not all(isinstance(name, str) and name in ("val", "test") for name in value):
        raise UserError(f"{key}: {shown(value)} must name val, test or both")
    if len(set(value)) < len(value):
        raise UserError(f"{key}: {shown(value)} names a split twice")


def _numbers(value, count: int) -> bool:
    return len(value) == count and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
