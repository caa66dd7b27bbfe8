"""The report as one HTML page that needs no other file: the paper's tables, and a section for every run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from engine.config import STAGES, differences, read_yaml
from tools import pages
from tools.report import summary
from tools.report.ablation import Ablations
from tools.report.charts import draw_overview, run_curves
from tools.report.runs import Run
from tools.report.tables import Table
from utils import ROOT, UserError

HEADLINES = {"itm_r_mean": "mean recall, re-ranked,", "itc_r_mean": "mean recall by contrast", "accuracy": "accuracy"}
HEADLINES |= {"cider": "CIDEr"}


def write_page(folder: Path, runs: Sequence[Run], tables: Sequence[Table], path: Path) -> None:
    """Tables, the chart of the ablations if there are some, and each run: its numbers, curves and settings."""
    if not folder.is_dir():
        raise UserError(f"{folder}: html needs the folders of the runs")
    try:
        overview = draw_overview(Ablations(runs))
    except UserError:  # there are no ablations
        overview = None
    sections = [section(run, folder, path) for run in runs if "failed" not in run.metrics]
    values = {"sections": sections, "tables": tables, "overview": overview, "date": time.strftime("%F")}
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
        "result": headline(run),
        "files": {name: pages.relative(file, path) for name, file in summary.files(run.folder).items()},
        "numbers": "\n".join([*summary.training_lines(run.folder), *summary.evaluation_lines(run)]),
        "curves": None if run.row else run_curves(run.folder),
        "image": images[-1] if images else None,
        "schema": schema,
        "changed": [[key, *map(shown, pair)] for key, pair in differences(paper, config).items()],
        "config": (run.folder / "config.yaml").read_text(encoding="utf-8"),
    }


def headline(run: Run) -> str:
    """The number that a run is known by."""
    for name in (name for name in ("test", "val") if isinstance(run.metrics.get(name), dict)):
        for key, meaning in HEADLINES.items():
            if isinstance(value := run.metrics[name].get(key), float):
                return f"{name}: {meaning} {value:.1f}"
    return f"loss {run.metrics['loss']:.3f} at the end" if "loss" in run.metrics else "no numbers yet"


def shown(value: object) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
