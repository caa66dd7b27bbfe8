"""The charts of a report: the curves of a run, and the effect of each ablation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools.report.ablation import BY_CHANCE, NUMBERS, Ablations, published_recall_effect
from tools.report.runs import Stat, read_log
from tools.report.tables import DASH, NOT_RUN, PAPER, metric
from utils import UserError

Points = Sequence[tuple[float, float]]
WIDTH, COLUMNS = 3.9, 3  # inches of a chart, and how many stand side by side


def run_curves(folder: Path) -> Figure | None:
    """Every value of a run's log over optimizer steps, of training and validation; None if it logged nothing."""
    panels: dict[str, dict[str, list]] = {}
    for entry in read_log(folder):
        if entry["step"]:  # step 0 is the evaluation at the end
            for key, value in entry.items():
                if isinstance(value, int | float) and key not in ("step", "seconds"):
                    points = panels.setdefault(key, {}).setdefault(entry["split"], [])
                    points.append((entry["step"], value))
    return draw_curves(panels)


def draw_curves(panels: Mapping[str, Mapping[str, Points]]) -> Figure | None:
    """{heading: {series: [(step, value), ...]}} -> a chart per heading; None without any."""
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure = Figure((WIDTH * columns, 2.6 * rows), layout="constrained")
    for number, (heading, series) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(heading, fontsize="medium", loc="left")
        axes.grid(alpha=0.3)
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 12 else None, markersize=3, label=name)
        if len(series) > 1:
            axes.legend(fontsize="small")
    return figure


def draw_overview(found: Ablations) -> Figure:
    """Tables 4 to 7 in one image: each row's effect on the mean recall, beside the paper's on its R@1.

    Raises UserError if no ablation's row was judged by retrieval.
    """
    value, panels = metric("itm_r_mean", "test"), {}
    for number in NUMBERS:
        paper = PAPER[number]
        rows = [row for row in paper["rows"] if not row.get("paper")]
        ours = {row["name"]: found.effect(row["config"], "retrieval", value) for row in rows}
        if any(ours.values()):
            run = {row["name"]: bool(found.of(row["config"], "retrieval")) for row in rows}
            published = {row["name"]: published_recall_effect(paper, row) for row in rows}
            texts = {name: bar_text(effect, run[name]) for name, effect in ours.items()}
            panels[f"Table {number}: {paper['name']}"] = published, ours, texts
    if not panels:
        raise UserError("no two rows of an ablation with retrieval (tools.ablate makes them)")
    heights = [len(published) + 0.8 for published, _, _ in panels.values()]
    figure = Figure((7.4, 0.52 * sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, (published, ours, texts)) in zip(axes, panels.items(), strict=True):
        part.set_title(title, fontsize="medium", loc="left")
        draw_bars(part, published, ours, texts)
    axes[-1].set_xlabel("points")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize="small")
    figure.supxlabel(textwrap.fill(overview_note(found), 125), fontsize="x-small", x=0.01, ha="left")
    return figure


def bar_text(effect: Stat | None, run: bool) -> str:
    if effect is None:
        return DASH if run else NOT_RUN
    return effect.show(1, effect=True)


def draw_bars(axes, published: dict[str, float], ours: dict[str, Stat | None], texts: dict[str, str]) -> None:
    """Two bars a row from 0, the paper's above ours with its whisker, and their numbers at the right."""
    places = range(len(published))
    means = [effect.mean if effect else 0.0 for effect in ours.values()]
    spreads = [effect.spread if effect else 0.0 for effect in ours.values()]
    axes.barh([place - 0.2 for place in places], published.values(), 0.36, label="paper, mean R@1")
    axes.barh([place + 0.2 for place in places], means, 0.36, xerr=spreads, capsize=2, label="this code, mean recall")
    for place, (name, effect) in enumerate(published.items()):
        for offset, text in ((-0.2, f"{effect:+.1f}"), (0.2, texts[name])):
            axes.annotate(
                text, (1.01, place + offset), xycoords=("axes fraction", "data"), va="center", fontsize="small"
            )
    axes.set_yticks(list(places), published)
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)


def overview_note(found: Ablations) -> str:
    """What the bars of the overview are."""
    return (
        "0: the paper's model. Paper: difference of the published R@1 on MSCOCO, fine-tuned, mean of both directions. "
        f"This code: {found.where()}, test split, mean of six recalls, re-ranked; bar and "
        "whisker: mean ± standard deviation of the differences paired by seed (number of seeds). * differs from 0 by a "
        f"paired t test at 5%: {BY_CHANCE}."
    )
