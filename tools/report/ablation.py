"""Tables 4 to 7, the ablations: a row's number and its effect, the difference to the paper's model, paired by seed.

The paper's columns are R@1 and VQA; the mean of six recalls, which tells small runs apart with less noise, has a table
of its own beside each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tools.charts import Bar
from tools.report.tables import (
    DASH,
    NOT_RUN,
    Run,
    Table,
    paired_difference,
    paper_rows,
    paper_values,
    printed,
    read_json,
    recall,
    show,
    stat,
    vqa_accuracy,
)

NUMBERS = ("4", "5", "6", "7")
BY_CHANCE = "of 20 effects that are 0, one is expected to have an asterisk by chance"
MARKS = (
    "Shown: mean ± standard deviation (number of seeds); * differs from 0 by a paired t test over the seeds at 5%: "
    f"{BY_CHANCE}."
)
Bars = dict[str, dict[str, Bar]]  # {row: {series: its effect}}
ABLATION_COLUMNS = {  # of tools/report/paper_tables.json -> (stages that fill it, value of a run)
    "coco_tr_r1": ("retrieval", lambda run: recall(run, "tr_r1")),
    "coco_ir_r1": ("retrieval", lambda run: recall(run, "ir_r1")),
    "vqa_test_dev": ("vqa", vqa_accuracy),
}


def ablation_runs(folder: Path, runs: list[Run]) -> dict[str, list[Run]]:
    """{row: its runs}, rows that share their runs included (rows.json of tools/ablate)."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.row is not None:
            found.setdefault(run.row, []).append(run)
    for path in sorted(folder.rglob("rows.json")):
        for row, source in read_json(path).get("rows", {}).items():
            if row != source and source in found:
                found.setdefault(row, found[source])
    return found


def of_stage(rows_found: dict[str, list[Run]], row: str, stage: str, kind: str) -> list[Run]:
    """The runs of a row's stage; kind: of retrieval, fine-tuned or zero-shot."""
    runs = rows_found.get(row, [])
    return [run for run in runs if run.stage == stage and (stage != "retrieval" or run.kind == kind)]


def ablation_table(paper: dict, number: str, rows_found: dict[str, list[Run]]) -> Table:
    """A row per row of the paper: its number and effect (difference to the paper's model) beside ours, per column."""
    everything = [run for runs in rows_found.values() for run in runs]
    kind = retrieval_kind(everything)
    target = paper_values(paper)
    columns, rows = [paper["name"]], []
    for _, label, _ in paper["columns"]:
        columns += [f"{label}: paper", "effect", "ours", "effect "]
    for row in paper["rows"]:
        cells = [row["name"]]
        for (key, _, decimals), value, best in zip(paper["columns"], row["values"], target, strict=True):
            stage, measure = ABLATION_COLUMNS[key]
            mine, base = (of_stage(rows_found, name, stage, kind) for name in (row["config"], "semmim"))
            published = DASH if row.get("paper") else f"{value - best:+.{decimals}f}"
            cells += [printed(value, decimals), published, show(stat(mine, measure), decimals)]
            cells.append(effect_cell(row, mine, base, measure, decimals))
        rows.append(cells)
    table = Table(f"Table {number}. {paper['title']}", columns, rows, [effect_note(everything, kind)])
    table.paper = paper_rows(paper)
    return table


def effect_cell(row: dict, runs: Sequence[Run], base: Sequence[Run], measure: Callable, decimals: int) -> str:
    """The effect of a row of the paper; the paper's model, which it is measured from, has none."""
    effect = None if row.get("paper") else paired_difference(runs, base, measure)
    return DASH if effect is None else effect.show(decimals, effect=True)


def mean_recall(stage: str, split: str) -> Callable[[Run], float | None]:
    """Value of a run: the mean of six recalls of a stage (`itc`, `itm`) on a split; None where it was not evaluated."""

    def value(run: Run) -> float | None:
        numbers = run.metrics.get(split)
        return numbers.get(f"{stage}_r_mean") if isinstance(numbers, dict) else None

    return value


def mean_recall_table(paper: dict, number: str, rows_found: dict[str, list[Run]]) -> list[Table]:
    """A row per row of the paper: ours alone, the mean of six recalls by both stages, per split; [] without any run."""
    everything = [run for runs in rows_found.values() for run in runs]
    kind = retrieval_kind(everything)
    found = {row["config"]: of_stage(rows_found, row["config"], "retrieval", kind) for row in paper["rows"]}
    if not any(found.values()):
        return []
    columns, rows, base = [paper["name"]], [], of_stage(rows_found, "semmim", "retrieval", kind)
    for split in ("val", "test"):
        columns += [f"{split} by ITC", f"{split} re-ranked", f"{split} effect"]
    for row in paper["rows"]:
        mine, cells = found[row["config"]], [row["name"]]
        for split in ("val", "test"):
            cells += [show(stat(mine, mean_recall(stage, split)), 1) for stage in ("itc", "itm")]
            cells.append(effect_cell(row, mine, base, mean_recall("itm", split), 1))
        rows.append(cells)
    note = (
        f"{paper['title']}. Mean of R@1, R@5 and R@10 in both directions, {where_ours(everything, kind)}, on val and "
        "test: by ITC alone, and with the first candidates re-ranked by the fusion encoder. Effect: of the re-ranked, "
        f"the difference to the paper's model, over the seeds of both. {MARKS}"
    )
    table = Table(f"Table {number}: this code by the mean of six recalls", columns, rows, [note])
    table.paper = paper_rows(paper)
    return [table]


def mean_effects(paper: dict, rows_found: dict[str, list[Run]]) -> Bars:
    """For a chart: a row's effect on the re-ranked mean of six recalls (test) beside the paper's on its two R@1."""
    kind = retrieval_kind(run for runs in rows_found.values() for run in runs)
    base = of_stage(rows_found, "semmim", "retrieval", kind)
    bars: Bars = {}
    for row in (row for row in paper["rows"] if not row.get("paper")):
        bars[row["name"]] = {
            "paper, mean R@1": published_bar(published_recall_effect(paper, row), 1),
            "this code, mean recall": our_bar(
                of_stage(rows_found, row["config"], "retrieval", kind), base, mean_recall("itm", "test"), 1
            ),
        }
    return bars


def published_recall_effect(paper: dict, row: dict) -> float:
    """The paper's effect of a row on its R@1, mean of both directions."""
    target = paper_values(paper)
    places = [place for place, (key, _, _) in enumerate(paper["columns"]) if ABLATION_COLUMNS[key][0] == "retrieval"]
    return statistics.fmean(row["values"][place] - target[place] for place in places)


def retrieval_kind(runs: Iterable[Run]) -> str:
    """Fine-tuned where any run is, else zero-shot."""
    kinds = {run.kind for run in runs if run.stage == "retrieval"}
    return "zero-shot" if kinds == {"zero-shot"} else "fine-tuned"


def where_ours(runs: Iterable[Run], kind: str) -> str:
    """The data and the kind of the retrieval that was run: `retrieval on demo, zero-shot`."""
    data = sorted({run.data for run in runs if run.stage == "retrieval"})
    return f"retrieval on {' and '.join(data)}, {kind}"


def effect_note(runs: Sequence[Run], kind: str) -> str:
    """What stands in the columns `ours`."""
    stages = {run.stage for run in runs}
    where = [f"{where_ours(runs, kind)} and re-ranked"] if "retrieval" in stages else []
    where += sorted({f"vqa on {run.data}" for run in runs if run.stage == "vqa"})
    ours = f"{'; '.join(where)}; of the test split, or of val without one" if where else "not run (tools/ablate)"
    return f"Effect: difference to the paper's model, for ours the mean over the seeds of both. Ours: {ours}. {MARKS}"


def ablation_effects(paper: dict, rows_found: dict[str, list[Run]]) -> dict[str, Bars]:
    """For charts: {column label: {row: {"paper": bar, "this code": bar}}}."""
    kind = retrieval_kind(run for runs in rows_found.values() for run in runs)
    target = paper_values(paper)
    charts: dict[str, Bars] = {}
    for place, (key, label, decimals) in enumerate(paper["columns"]):
        stage, measure = ABLATION_COLUMNS[key]
        base = of_stage(rows_found, "semmim", stage, kind)
        for row in (row for row in paper["rows"] if not row.get("paper")):
            mine = of_stage(rows_found, row["config"], stage, kind)
            charts.setdefault(label, {})[row["name"]] = {
                "paper": published_bar(row["values"][place] - target[place], decimals),
                "this code": our_bar(mine, base, measure, decimals),
            }
    return charts


def published_bar(effect: float, decimals: int) -> Bar:
    return Bar(effect, text=f"{effect:+.{decimals}f}")


def our_bar(runs: Sequence[Run], base: Sequence[Run], measure: Callable, decimals: int) -> Bar:
    effect = paired_difference(runs, base, measure)
    if effect is None:
        return Bar(None, text=DASH if runs else NOT_RUN)
    return Bar(effect.mean, effect.spread, effect.show(decimals, effect=True))
