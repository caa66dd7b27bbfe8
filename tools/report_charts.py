"""The charts of a report: curves of a run, of an ablation's rows together, and the effect of each ablation."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from engine.drawing import below, beside
from tools import pages
from tools.charts import SHARP, bar_chart, line_chart
from tools.report_ablation import NUMBERS, Bars, ablation_effects, ablation_runs, mean_effects
from tools.report_tables import Run, read_log, read_paper
from utils import UserError, replacing

Panels = list[tuple[str, Image.Image]]  # (heading, chart), each SHARP times its size on the page
WIDTH = 370  # of a chart of curves: a phone's, and three stand side by side on a desk
COLUMNS = 3
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


def ablation_charts(folder: Path, runs: Sequence[Run]) -> dict[str, Panels]:
    """{"Table 4: ...": bars of each row's effect, a panel per column}; the paper's alone where nothing was run."""
    found, charts = ablation_runs(folder, list(runs)), {}
    for number in NUMBERS:
        table = read_paper()["tables"][number]
        panels = {**ablation_effects(table, found)}
        if has_ours(means := mean_effects(table, found)):
            panels["mean of six recalls"] = means
        charts[f"Table {number}. {table['title']}"] = [
            (label, bar_chart(label, rows, "points", width=WIDTH)) for label, rows in panels.items()
        ]
    return charts


def has_ours(effects: Bars) -> bool:
    """Whether a row has a bar of this code beside the paper's."""
    return any(len(series) > 1 for series in effects.values())


def write_overview(folder: Path, runs: Sequence[Run], path: Path) -> Path:
    """One image of Tables 4 to 7: each row's effect on the mean recall beside the paper's; -> its path.

    Raises UserError where no ablation's row was judged by retrieval.
    """
    found, panels = ablation_runs(folder, list(runs)), []
    for number in NUMBERS:
        table = read_paper()["tables"][number]
        effects = mean_effects(table, found)
        if has_ours(effects):
            panels.append(bar_chart(f"Table {number}: {table['name']}", effects, "points", width=WIDTH))
    if not panels:
        raise UserError(f"{folder}: holds no two rows of an ablation with retrieval (tools/ablate.py makes them)")
    image = below([beside(panels[start : start + 2]) for start in range(0, len(panels), 2)])
    pages.make_folder(path.parent)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def row_charts(folder: Path, runs: Sequence[Run]) -> dict[str, Panels]:
    """{"Table 4: curves of its rows": pre-training of each row's first seed in one chart per value}."""
    found = ablation_runs(folder, list(runs))
    charts = {}
    for number in NUMBERS:
        logs = {}
        for row in read_paper()["tables"][number]["rows"]:
            first = next((run for run in found.get(row["config"], []) if run.stage == "pretrain"), None)
            if first is not None:
                logs[row["name"]] = [entry for entry in read_log(first.folder) if entry.get("split") == "train"]
        panels = []
        for key, heading in COMPARED.items():
            series = {name: points for name, entries in logs.items() if (points := curve(entries, key))}
            if len(series) > 1:
                panels.append((heading, line_chart(heading, series, width=WIDTH)))
        if panels:
            charts[f"Table {number}: pre-training of its rows, first seed"] = panels
    return charts


def run_charts(folder: Path) -> Panels:
    """The curves of a run's training and validation, empty where it logged nothing of them."""
    entries, panels = read_log(folder), []
    for split, wanted in (("train", TRAINING), ("val", VALIDATION)):
        # step 0 is the evaluation at the end
        lines = [entry for entry in entries if entry.get("split") == split and (split == "train" or entry["step"])]
        for heading, keys in wanted.items():
            series = {name: points for key, name in keys.items() if (points := curve(lines, key))}
            if series:
                panels.append((heading, line_chart(heading, series, width=WIDTH)))
    return panels


def curve(entries: Sequence[dict], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]


def in_a_row(panels: Panels) -> str:
    """Panels on a page, as many side by side as there is room for."""
    return f"<div class=charts>{''.join(pages.inline(image, name, SHARP) for name, image in panels)}</div>"


def figure(path: Path, caption: str, panels: Panels) -> str:
    """Save the panels as one PNG, and return them as part of a page."""
    images = [image for _, image in panels]
    below([beside(images[start : start + COLUMNS]) for start in range(0, len(images), COLUMNS)]).save(path)
    return f"<figure>{in_a_row(panels)}<figcaption>{html.escape(caption)}</figcaption></figure>"
