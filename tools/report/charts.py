"""The charts of a report: curves of a run, of an ablation's rows together, and the effect of each ablation."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from engine.drawing import PAPER, below, beside, text
from tools import pages
from tools.charts import SHARP, bar_chart, bar_charts, line_chart
from tools.report.ablation import (
    BY_CHANCE,
    NUMBERS,
    Bars,
    ablation_effects,
    ablation_runs,
    mean_effects,
    retrieval_kind,
    where_ours,
)
from tools.report.tables import Run, read_log, read_paper
from utils import UserError

Panels = list[tuple[str, Image.Image]]  # (heading, chart), each SHARP times its size on the page
WIDTH = 370  # of a chart of curves: a phone's, and three stand side by side on a desk
COLUMNS = 3
EDGE = 14 * SHARP  # around the note of an overview, where a chart's title begins
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
    paper, found, charts = read_paper()["tables"], ablation_runs(folder, list(runs)), {}
    for number in NUMBERS:
        table = paper[number]
        panels = ablation_effects(table, found)
        if has_ours(means := mean_effects(table, found)):
            panels["mean of six recalls"] = means
        charts[f"Table {number}. {table['title']}"] = [
            (label, bar_chart(label, rows, "points", width=WIDTH)) for label, rows in panels.items()
        ]
    return charts


def has_ours(effects: Bars) -> bool:
    """Whether a row has a bar of this code beside the paper's."""
    return any(sum(bar.value is not None for bar in bars.values()) > 1 for bars in effects.values())


def write_overview(folder: Path, runs: Sequence[Run], path: Path) -> Path:
    """One image of Tables 4 to 7: each row's effect on the mean recall beside the paper's; -> its path.

    Raises UserError where no ablation's row was judged by retrieval.
    """
    paper, found, panels = read_paper()["tables"], ablation_runs(folder, list(runs)), {}
    for number in NUMBERS:
        table = paper[number]
        effects = mean_effects(table, found)
        if has_ours(effects):
            panels[f"Table {number}: {table['name']}"] = effects
    if not panels:
        raise UserError(f"{folder}: holds no two rows of an ablation with retrieval (tools/ablate makes them)")
    charts = bar_charts(panels, "points", WIDTH)
    half = (len(charts) + 1) // 2  # two columns, each read downwards: the panels' heights differ
    body = beside([below(part) for part in (charts[:half], charts[half:]) if part])
    note = text(overview_note([run for of_row in found.values() for run in of_row]), body.width - 2 * EDGE, 12 * SHARP)
    image = Image.new("RGB", (body.width, body.height + note.height + 2 * EDGE), PAPER)
    image.paste(body, (0, 0))
    image.paste(note, (EDGE, body.height + EDGE))
    pages.save_png(image, path)
    return path


def overview_note(runs: Sequence[Run]) -> str:
    """What the bars of the overview are."""
    return (
        "0: the paper's model. Paper: difference of the published R@1 on MSCOCO, fine-tuned, mean of both directions. "
        f"This code: {where_ours(runs, retrieval_kind(runs))}, test split, mean of six recalls, re-ranked; bar and "
        "whisker: mean ± standard deviation of the differences paired by seed (number of seeds). * differs from 0 by a "
        f"paired t test at 5%: {BY_CHANCE}."
    )


def row_charts(folder: Path, runs: Sequence[Run]) -> dict[str, Panels]:
    """{"Table 4: curves of its rows": pre-training of each row's first seed in one chart per value}."""
    paper, found, charts = read_paper()["tables"], ablation_runs(folder, list(runs)), {}
    for number in NUMBERS:
        logs = {}
        for row in paper[number]["rows"]:
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
    rows = [beside(images[start : start + COLUMNS]) for start in range(0, len(images), COLUMNS)]
    pages.save_png(below(rows), path)
    return f"<figure>{in_a_row(panels)}<figcaption>{html.escape(caption)}</figcaption></figure>"
