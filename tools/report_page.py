"""The report as one HTML page with its charts, which also lie beside it as PNG files."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from engine.drawing import below, beside
from tools.charts import bar_chart, line_chart
from tools.report_formats import as_html
from tools.report_tables import (
    Run,
    Table,
    ablation_effects,
    ablation_runs,
    effect_note,
    read_log,
    read_paper,
    retrieval_kind,
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #191c22; margin: 0 auto; max-width: 1200px; padding: 1.5rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; } .note { color: #5b616c; margin: .3rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e2e5ea; }
th { border-bottom: 2px solid #191c22; } th:first-child, td:first-child { text-align: left; }
tr.paper { background: #f3f4f7; } tr.ours { background: #e8f2fb; font-weight: 600; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #5b616c; }
nav a { margin-right: 1rem; }
"""
# Panels of a run's curves: heading -> the keys of log.jsonl that it shows, with their names.
TRAINING = {
    "all losses together": {"loss": "loss"},
    "masked image modeling": {"loss/cls": "L_cls", "loss/patch": "L_patch"},
    "image-text contrast and matching": {"loss/itc": "ITC", "loss/itm": "ITM"},
    "language modeling": {"loss/mlm": "MLM", "loss/plm": "PLM"},
    "matching accuracy": {"itm/accuracy": "accuracy"},
    "masked on the most relevant quarter": {
        "mim/masked_on_relevant_quarter": "text-guided",
        "mim/masked_on_relevant_quarter_if_random": "random",
    },
    "entropy of the teacher's batch mean": {
        "teacher/cls_batch_entropy": "[CLS]",
        "teacher/patch_batch_entropy": "patches",
    },
    "patterns in use": {"teacher/patterns_in_use": "patterns"},
    "reward": {"reward": "reward"},
    "pairs per second": {"pairs_per_second": "pairs/s"},
}
VALIDATION = {
    "validation: mean recall": {"itm_r_mean": "re-ranked", "itc_r_mean": "contrast"},
    "validation: accuracy": {"accuracy": "accuracy", "constant": "constant answers"},
    "validation: CIDEr": {"cider": "CIDEr"},
}
COMPARED = {
    "loss/itc": "image-text contrast",
    "loss/itm": "image-text matching",
    "loss/mlm": "masked language modeling",
}
COLUMNS = 3  # panels side by side


def write_page(folder: Path, runs: Sequence[Run], tables: Sequence[Table], output: Path) -> Path:
    """Write OUTPUT/index.html and its charts as PNG; -> the page's path. The page needs no other file."""
    output.mkdir(parents=True, exist_ok=True)
    ablations, everything = ablation_charts(folder, runs), [run for run in runs if run.row is not None]
    note = effect_note(everything, retrieval_kind(everything))
    curves = row_charts(folder, runs)
    curves |= {title(folder, run): chart for run in runs if run.row is None and (chart := curve_chart(run)) is not None}
    parts = [
        f"<h1>{html.escape(str(folder))}</h1>",
        f"<p class=note>{len(runs)} finished runs, {time.strftime('%F')}; ",
    ]
    parts += ["shaded gray: the paper's own row; blue: this code.</p>", "<nav><a href=#tables>Tables</a>"]
    parts += ["<a href=#ablations>Ablations</a><a href=#curves>Curves</a></nav><div id=tables>"]
    parts += [as_html(table) for table in tables]
    parts += ["</div><h2 id=ablations>Effect of each ablation, in points</h2>"]
    for name, chart in ablations.items():
        parts.append(figure(output / f"{slug(name)}.png", f"{name}. {note}", chart))
    parts += ["<h2 id=curves>Training curves</h2>"]
    for name, chart in curves.items():
        parts.append(figure(output / f"curves_{slug(name)}.png", name, chart))
    path = output / "index.html"
    path.write_text(page(f"Report: {folder}", "\n".join(parts)), encoding="utf-8")
    return path


def page(title: str, body: str) -> str:
    """An HTML document in this project's style. title: plain text; body: HTML."""
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def figure(path: Path, caption: str, image: Image.Image) -> str:
    """Save an image and return it as part of the page."""
    image.save(path)
    return f"<figure>{inline(image, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def inline(image: Image.Image, description: str) -> str:
    """An <img> that carries its own data."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description, quote=True)}" src="data:image/png;base64,{data}">'


def slug(name: str) -> str:
    """A file name of letters, digits and underscores."""
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split()).lower()


def title(folder: Path, run: Run) -> str:
    """A run's folder relative to the report's, and its stage."""
    relative = run.folder.relative_to(folder)
    return str(relative) if relative.parts else run.stage


def ablation_charts(folder: Path, runs: Sequence[Run]) -> dict[str, Image.Image]:
    """{"Table 4: ...": bars of each row's effect, a panel per column}; the paper's alone where nothing was run."""
    found = ablation_runs(folder, list(runs))
    charts = {}
    for number in "4567":
        table = read_paper()["tables"][number]
        panels = [bar_chart(label, rows, "points") for label, rows in ablation_effects(table, found).items()]
        charts[f"Table {number}. {table['title']}"] = beside(panels)
    return charts


def row_charts(folder: Path, runs: Sequence[Run]) -> dict[str, Image.Image]:
    """{"Table 4: curves of its rows": pre-training of each row's first seed in one chart per value}."""
    found = ablation_runs(folder, list(runs))
    charts = {}
    for number in "4567":
        logs = {}
        for row in read_paper()["tables"][number]["rows"]:
            first = next((run for run in found.get(row["config"], []) if run.stage == "pretrain"), None)
            if first is not None:
                logs[row["name"]] = [entry for entry in read_log(first.folder) if entry.get("split") == "train"]
        panels = []
        for key, heading in COMPARED.items():
            series = {name: points for name, entries in logs.items() if (points := curve(entries, key))}
            if len(series) > 1:
                panels.append(line_chart(heading, series, width=390))
        if panels:
            charts[f"Table {number}: pre-training of its rows, first seed"] = beside(panels)
    return charts


def curve_chart(run: Run) -> Image.Image | None:
    """The curves of a run's training and validation; None where it logged nothing of them."""
    entries = read_log(run.folder)
    panels = []
    for split, wanted in (("train", TRAINING), ("val", VALIDATION)):
        lines = [entry for entry in entries if entry.get("split") == split and (split == "train" or entry["step"])]
        for title, keys in wanted.items():
            series = {name: points for key, name in keys.items() if (points := curve(lines, key))}
            if series:
                panels.append(line_chart(title, series, width=390))
    rows = [beside(panels[start : start + COLUMNS]) for start in range(0, len(panels), COLUMNS)]
    return below(rows) if rows else None


def curve(entries: Sequence[dict], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
