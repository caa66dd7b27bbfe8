"""The report as one HTML page that needs no other file: the paper's tables, and a section for every run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools import pages
from tools.report.runs import Run, read_log
from tools.report.summary import numbers
from tools.report.tables import Table

COLUMNS = 3  # charts that stand side by side


def write_page(folder: Path, runs: Sequence[Run], tables: Sequence[Table], path: Path) -> None:
    """The tables, and each run's numbers, curves, last image and settings; ablations, of many runs, have no curves."""
    sections = [
        {
            "name": str(run.folder),
            "run": run,
            "numbers": "\n".join(numbers(run)),
            "curves": None if run.row else run_curves(run.folder),
            "images": sorted((run.folder / "images").glob("*.png"))[-1:],
            "config": (run.folder / "config.yaml").read_text(encoding="utf-8"),
        }
        for run in runs
    ]
    pages.write(path, "report/report.html", title=f"Report: {folder}", sections=sections, tables=tables)


def run_curves(folder: Path) -> Figure | None:
    """Every value of a run's log over optimizer steps, of training and validation; None if it logged nothing."""
    panels = defaultdict(lambda: defaultdict(list))  # {value: {split: [(step, number), ...]}}
    for entry in read_log(folder):
        for key, value in entry.items():
            if entry["step"] and isinstance(value, int | float) and key not in ("step", "seconds"):
                panels[key][entry["split"]].append((entry["step"], value))  # step 0 is the evaluation at the end
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure = Figure((4 * COLUMNS, 2.6 * rows), layout="constrained")
    for number, (key, splits) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, number, title=key)
        for split, points in splits.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=split)
        axes.legend(fontsize="small")
    return figure
