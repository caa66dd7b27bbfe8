"""The report as HTML: a page with the paper's tables, ablations and curves, and beside it a page for every run."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from tools import pages
from tools.report import run as report_run
from tools.report.ablation import effect_note, retrieval_kind
from tools.report.charts import Panels, ablation_charts, figure, row_charts, run_charts
from tools.report.formats import as_html
from tools.report.tables import Run, Table
from utils import make_folder

INDEX, OF_RUN = "index.html", "report.html"


def write_run(run: Run, output: Path) -> Path:
    """OUTPUT/report.html of a single run; -> its path."""
    path = make_folder(output) / OF_RUN
    report_run.write_page(path, run)
    return path


def write_pages(folder: Path, runs: Sequence[Run], tables: Sequence[Table], output: Path) -> Path:
    """OUTPUT/index.html of the finished ones among all `runs` below a folder, its charts as PNG, and a page for every
    run; -> the first page's path. No page needs another file, so that each can be sent alone.
    """
    make_folder(output)
    of_run = run_pages(folder, runs, output)
    for path, run in of_run.items():
        beside = {name: run_title(folder, other) for name, other in of_run.items() if near(run, other)}
        report_run.write_page(path, run, {Path(INDEX): "all runs", **beside})
    parts = head(folder, runs, of_run)
    parts += ["<div id=tables>", *(as_html(table) for table in tables), "</div>"]
    parts += ablations(folder, runs, output) + curves(folder, runs, output)
    path = output / INDEX
    pages.write_page(path, f"Report: {folder}", "\n".join(parts))
    return path


def run_pages(folder: Path, runs: Sequence[Run], output: Path) -> dict[Path, Run]:
    """The page of every run, in the order of the runs; two never share one."""
    found: dict[Path, Run] = {}
    for run in runs:
        name = pages.slug(run_title(folder, run)) or "run"
        names = [name, *(f"{name}_{number}" for number in range(2, len(runs) + 2))]
        path = next(path for name in names if (path := output / f"{name}.html") not in found and name != "index")
        found[path] = run
    return found


def near(run: Run, other: Run) -> bool:
    """Whether a run's page links to another: those of the same folder, and all that are no ablation."""
    return other.folder.parent == run.folder.parent or other.row is None


def run_title(folder: Path, run: Run) -> str:
    """A run's folder relative to the report's."""
    relative = run.folder.relative_to(folder)
    return str(relative) if relative.parts else run.stage


def head(folder: Path, runs: Sequence[Run], of_run: dict[Path, Run]) -> list[str]:
    finished = sum(bool(run.metrics) for run in runs)
    unfinished = f", {len(runs) - finished} more without numbers yet" if finished < len(runs) else ""
    counted = "run with numbers" if finished == 1 else "runs with numbers"
    rows = "\n".join(run_row(path, folder, run) for path, run in of_run.items())
    headings = "".join(f"<th>{name}</th>" for name in ("run", "stage", "kind", "data", "seed", "result"))
    table = f'<table class="words"><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>'
    return [
        f"<h1>Report: {html.escape(str(folder))}</h1>",
        f"<p class=note>{finished} {counted}{unfinished}; {time.strftime('%F')}.</p>",
        "<nav><a href=#runs>Runs</a><a href=#tables>The paper's tables</a><a href=#ablations>Ablations</a>"
        "<a href=#curves>Curves</a></nav>",
        f"<h2 id=runs>Runs</h2><div class=wide>{table}</div>",
        "<h2>The paper's tables</h2><p class=note>Shaded gray: the paper's own row; blue: this code.</p>",
    ]


def run_row(path: Path, folder: Path, run: Run) -> str:
    name = pages.link(path, path.parent, html.escape(run_title(folder, run)))
    cells = [run.stage, report_run.kind_of(run), run.data, str(run.seed), report_run.headline(run)]
    return f"<tr><td>{name}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def ablations(folder: Path, runs: Sequence[Run], output: Path) -> list[str]:
    of_rows = [run for run in runs if run.row is not None]
    note = effect_note(of_rows, retrieval_kind(of_rows))
    charts = ablation_charts(folder, finished(runs))
    parts = ["<h2 id=ablations>Effect of each ablation, in points</h2>", f"<p class=note>{html.escape(note)}</p>"]
    return parts + [figure(output / f"{pages.slug(name)}.png", name, panels) for name, panels in charts.items()]


def curves(folder: Path, runs: Sequence[Run], output: Path) -> list[str]:
    charts: dict[str, Panels] = row_charts(folder, finished(runs))
    charts |= {run_title(folder, run): run_charts(run.folder) for run in runs if run.row is None}
    parts = ["<h2 id=curves>Training curves</h2>"]
    for name, panels in charts.items():
        if panels:
            parts.append(f"<h3>{html.escape(name)}</h3>")
            parts.append(figure(output / f"curves_{pages.slug(name)}.png", "over optimizer steps", panels))
    return parts


def finished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.metrics]
