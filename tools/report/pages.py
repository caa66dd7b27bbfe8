"""The report as HTML: a page with all runs, the paper's tables and curves, and beside it a page for every run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config import STAGES, differences, read_yaml
from tools import pages
from tools.report import summary
from tools.report.ablation import Ablations
from tools.report.charts import draw_overview, run_curves
from tools.report.runs import Run
from tools.report.tables import Table
from utils import ROOT, UserError, own_folder

HEADLINES = {"itm_r_mean": "mean recall, re-ranked,", "itc_r_mean": "mean recall by contrast", "accuracy": "accuracy"}
HEADLINES |= {"cider": "CIDEr"}


def write_run(run: Run, path: Path, beside: Mapping[Path, str] | None = None) -> Path:
    """The page of a single run; -> its path. beside: pages of other runs, and what they are called."""
    images = sorted((run.folder / "images").glob("*.png"))
    schema = STAGES[run.stage].schema
    config = read_yaml(run.folder / "config.yaml")
    paper = {key: value for key, value in read_yaml(ROOT / schema).items() if key != "base"}
    changed = {key: [shown(value) for value in pair] for key, pair in differences(paper, config).items()}
    values = {
        "links": {pages.relative(other, path): name for other, name in (beside or {}).items()},
        "facts": {"stage": run.stage, "kind": run.kind, "data": run.data, "seed": run.seed, "result": headline(run)},
        "files": {name: pages.relative(file, path) for name, file in summary.files(run.folder).items()},
        "numbers": "\n".join([*summary.training_lines(run.folder), *summary.evaluation_lines(run)]),
        "curves": run_curves(run.folder),
        "image": images[-1] if images else None,
        "schema": schema,
        "changed": changed,
        "config": (run.folder / "config.yaml").read_text(encoding="utf-8"),
    }
    pages.write(path, "report/run.html", title=str(run.folder), **values)
    return path


def write_index(folder: Path, runs: Sequence[Run], tables: Sequence[Table], output: Path) -> Path:
    """OUTPUT/index.html, and a page for each of `runs`; -> its path. No page needs another file."""
    own_folder(output, "tools.report")
    index, names = output / "index.html", {}
    for run in runs:
        parts = run.folder.relative_to(folder).parts or (folder.name,)
        stem = "_".join(parts) if parts != ("index",) else "index_"
        names[output / f"{stem}.html"] = " ".join(parts), run
    for path, (_, run) in names.items():
        others = {other: name for other, (name, _) in names.items() if other != path}
        write_run(run, path, {index: "all runs", **others})
    curves = {name: chart for name, run in names.values() if not run.rows and (chart := run_curves(run.folder))}
    try:
        overview = draw_overview(Ablations(runs))
    except UserError:  # there are no ablations
        overview = None
    rows = [(pages.relative(path, index), name, run, headline(run)) for path, (name, run) in names.items()]
    values = {"rows": rows, "tables": tables, "overview": overview, "curves": curves, "date": time.strftime("%F")}
    pages.write(index, "report/index.html", title=f"Report: {folder}", **values)
    return index


def headline(run: Run) -> str:
    """The number that a run is known by."""
    for name in (name for name in ("test", "val") if isinstance(run.metrics.get(name), dict)):
        for key, meaning in HEADLINES.items():
            if isinstance(value := run.metrics[name].get(key), float):
                return f"{name}: {meaning} {value:.1f}"
    return f"loss {run.metrics['loss']:.3f} at the end" if "loss" in run.metrics else "no numbers yet"


def shown(value: object) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
