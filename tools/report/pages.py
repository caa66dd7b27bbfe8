"""The report as one HTML page that needs no other file: the paper's tables, and a section for every run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from engine.config import STAGES, differences, read_yaml
from tools import pages
from tools.report import summary
from tools.report.runs import Run, read_log
from tools.report.tables import Table
from utils import ROOT, UserError

WIDTH, COLUMNS = 3.9, 3  # inches of a chart, and how many stand side by side


def write_page(folder: Path, runs: Sequence[Run], tables: Sequence[Table], path: Path) -> None:
    """The tables, and each run: its numbers, curves and settings."""
    if not folder.is_dir():
        raise UserError(f"{folder}: html needs the folders of the runs")
    values = {"sections": [section(run, folder, path) for run in runs], "tables": tables, "date": time.strftime("%F")}
    pages.write(path, "report/report.html", title=f"Report: {folder}", **values)


def section(run: Run, folder: Path, path: Path) -> dict:
    """What the template shows of a run; the many runs of ablations go without curves."""
    images = sorted((run.folder / "images").glob("*.png"))
    schema = STAGES[run.stage].schema
    config = read_yaml(run.folder / "config.yaml")
    paper = {key: value for key, value in read_yaml(ROOT / schema).items() if key != "base"}
    return {
        "name": " ".join(run.folder.relative_to(folder).parts) or folder.name,
        "run": run,
        "files": {name: pages.relative(run.folder / name, path) for name in summary.files(run.folder)},
        "numbers": "\n".join(summary.numbers(run)),
        "curves": None if run.row else run_curves(run.folder),
        "image": images[-1] if images else None,
        "schema": schema,
        "changed": [[key, *map(json.dumps, pair)] for key, pair in differences(paper, config).items()],
        "config": (run.folder / "config.yaml").read_text(encoding="utf-8"),
    }


def run_curves(folder: Path) -> Figure | None:
    """Every value of a run's log over optimizer steps, of training and validation; None if it logged nothing."""
    panels: dict[str, dict[str, list]] = {}  # value: {split: [(step, number), ...]}
    for entry in read_log(folder):
        if entry["step"]:  # step 0 is the evaluation at the end
            for key, value in entry.items():
                if isinstance(value, int | float) and key not in ("step", "seconds"):
                    panels.setdefault(key, {}).setdefault(entry["split"], []).append((entry["step"], value))
    if not panels:
        return None
    rows, columns = -(-len(panels) // COLUMNS), min(COLUMNS, len(panels))
    figure = Figure((WIDTH * columns, 2.6 * rows), layout="constrained")
    for number, key in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(key, fontsize="medium", loc="left")
        axes.grid(alpha=0.3)
        for split, points in panels[key].items():
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 12 else None, markersize=3, label=split)
        axes.legend(fontsize="small")
    return figure
