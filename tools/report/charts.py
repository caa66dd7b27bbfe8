"""The charts of a report: the curves of a run, and the effect of each ablation."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from tools.report.ablation import BY_CHANCE, NUMBERS, Ablations, published_recall_effect
from tools.report.runs import read_log
from tools.report.tables import DASH, NOT_RUN, PAPER, metric
from utils import UserError

WIDTH, COLUMNS = 3.9, 3  # inches of a chart, and how many stand side by side


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


def draw_overview(found: Ablations) -> Figure:
    """Tables 4 to 7 in one image: each row's effect on the mean recall, beside the paper's on its R@1.

    Raises UserError if no ablation's row was judged by retrieval.
    """
    panels = [(title, rows) for title, rows in (bars(number, found) for number in NUMBERS) if any(x[2] for x in rows)]
    if not panels:
        raise UserError("no two rows of an ablation with retrieval (tools.ablate makes them)")
    heights = [len(rows) + 0.8 for _, rows in panels]
    figure = Figure((7.4, 0.52 * sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, rows) in zip(axes, panels, strict=True):
        part.set_title(title, fontsize="medium", loc="left")
        draw_bars(part, rows)
    axes[-1].set_xlabel("points")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize="small")
    note = (
        "0: the paper's model. Paper: difference of the published R@1 on MSCOCO, fine-tuned, mean of both directions. "
        f"This code: {found.where()}, test split, mean of six recalls, re-ranked; bar and "
        "whisker: mean ± standard deviation of the differences paired by seed (number of seeds). * differs from 0 by a "
        f"paired t test at 5%: {BY_CHANCE}."
    )
    figure.supxlabel(textwrap.fill(note, 125), fontsize="x-small", x=0.01, ha="left")
    return figure


def bars(number: str, found: Ablations) -> tuple[str, list[tuple]]:
    """A table's title, and of each row but the paper's model: name, the paper's effect, ours (a Stat or None), text."""
    paper, rows = PAPER[number], []
    for row in (row for row in paper["rows"] if not row.get("paper")):
        effect = found.effect(row["config"], "retrieval", metric("itm_r_mean", "test"))
        missing = DASH if found.of(row["config"], "retrieval") else NOT_RUN
        text = effect.show(1, effect=True) if effect else missing
        rows.append((row["name"], published_recall_effect(paper, row), effect, text))
    return f"Table {number}: {paper['name']}", rows


def draw_bars(axes, rows: list[tuple]) -> None:
    """Two bars a row from 0, the paper's above ours with its whisker, and their numbers at the right."""
    names, published, ours, texts = zip(*rows, strict=True)
    places = range(len(rows))
    means = [effect.mean if effect else 0.0 for effect in ours]
    spreads = [effect.spread if effect else 0.0 for effect in ours]
    axes.barh([place - 0.2 for place in places], published, 0.36, label="paper, mean R@1")
    axes.barh([place + 0.2 for place in places], means, 0.36, xerr=spreads, capsize=2, label="this code, mean recall")
    for place in places:
        for offset, text in ((-0.2, f"{published[place]:+.1f}"), (0.2, texts[place])):
            where = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": "small"}
            axes.annotate(text, (1.01, place + offset), **where)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
