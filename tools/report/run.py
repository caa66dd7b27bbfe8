"""The page of one run: what it reached, its curves, samples with what was right and wrong, and its settings."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping
from pathlib import Path

from engine.config import differences
from engine.yaml_files import read_yaml
from evaluation.caption import CAPTION_COLUMNS
from tools import pages
from tools.report import samples as report_samples
from tools.report.charts import in_a_row, run_charts
from tools.report.tables import RECALLS, Run, name_recall, read_log
from utils import ROOT, clock

ORDERS = {"itm": "re-ranked", "itc": "contrast alone", "chance": "a random order"}
FILES = ("log.jsonl", "metrics.json", "config.yaml", "retrieval_result.json", "vqa_result.json", "caption_result.json")
FILES += ("checkpoint_best.pth", "checkpoint_last.pth", "tensorboard", "images", "figures/index.html")


def write_page(path: Path, run: Run, links: Mapping[Path, str] | None = None) -> None:
    """One HTML file. links: pages of other runs in the same folder, and what they are called."""
    elsewhere = [
        f"<b>{html.escape(name)}</b>" if other.name == path.name else pages.link(other, other.parent, html.escape(name))
        for other, name in (links or {}).items()
    ]
    parts = [f"<nav>{''.join(elsewhere)}</nav>"] if elsewhere else []
    parts += [f"<h1>{html.escape(str(run.folder))}</h1>", facts(run, path.parent), *numbers(run)]
    if panels := run_charts(run.folder):
        parts += ["<h2 id=curves>Curves over optimizer steps</h2>", in_a_row(panels)]
    parts += [*report_samples.samples(run), *settings(run)]
    pages.write_page(path, str(run.folder), "\n".join(parts), report_samples.STYLE)


def facts(run: Run, page_folder: Path) -> str:
    steps = [entry for entry in read_log(run.folder) if entry.get("split") == "train"]
    rows = [("stage", html.escape(", ".join(filter(None, [run.stage, kind_of(run)]))))]
    rows += [("data", html.escape(run.data)), ("seed", str(run.seed)), ("result", html.escape(headline(run)))]
    if steps:
        last = steps[-1]
        speed = f", {last['pairs_per_second']:.0f} pairs/s at the end" if last.get("pairs_per_second") else ""
        hours = clock(last["seconds"]) if isinstance(last.get("seconds"), int | float) else "unknown time"
        rows.append(("training", f"{last['step']:,} steps, {hours} (h:mm:ss){speed}"))
    there = [name for name in FILES if (run.folder / name).exists()]
    files = " &nbsp; ".join(pages.link(run.folder / name, page_folder, html.escape(name)) for name in there)
    rows += [("files", files), ("written", time.strftime("%F %H:%M"))]
    return pages.facts(rows)


def kind_of(run: Run) -> str:
    """fine-tuned, zero-shot, ...; nothing of pre-training."""
    return "" if run.stage == "pretrain" else run.kind


def headline(run: Run) -> str:
    """The number that a run is known by."""
    split, name = run.split, next((name for name in ("test", "val") if isinstance(run.metrics.get(name), dict)), "")
    if run.stage == "retrieval" and "itm_r_mean" in split:
        best = max(("itm", "itc"), key=lambda order: split[f"{order}_r_mean"])
        chance = f" (chance {split['chance_r_mean']:.1f})" if "chance_r_mean" in split else ""
        return f"{name}: mean recall {split[f'{best}_r_mean']:.1f}{chance}, {ORDERS[best]}"
    if "itc_r_mean" in split:  # a pre-training's validation
        return f"{name}: mean recall {split['itc_r_mean']:.1f}, {ORDERS['itc']}"
    if "accuracy" in split:
        return f"{name}: accuracy {split['accuracy']:.1f} (constant answers {split['constant']:.1f})"
    if isinstance(split.get("cider"), float):
        return f"{name}: CIDEr {split['cider']:.1f}, B@4 {split['bleu4']:.1f}"
    if isinstance(run.metrics.get("loss"), float):
        return f"loss {run.metrics['loss']:.3f} at the end"
    return "no numbers yet" if not run.metrics else "see below"


# --------------------------------------------------------------------------------------------------------- numbers


def numbers(run: Run) -> list[str]:
    """Tables of the evaluated splits; of a pre-training its last values, too."""
    splits = {name: found for name, found in run.metrics.items() if isinstance(found, dict)}
    if run.stage == "pretrain":
        rows = [[key, f"{value:.4g}"] for key, value in run.metrics.items() if isinstance(value, int | float)]
        table = f"<details><summary>last values of the log</summary>{pages.table(['value', ''], rows)}</details>"
        return ["<h2 id=numbers>Numbers</h2>", recall_table(splits), table] if splits else [table]
    if not splits:
        return []
    made = {"retrieval": recall_table, "caption": caption_table, "vqa": answer_table}[run.stage](splits)
    return ["<h2 id=numbers>Numbers</h2>", made]


def recall_table(splits: Mapping[str, dict]) -> str:
    rows = [
        [f"{split}, {name}", *(cell(found.get(f"{order}_{key}")) for key in (*RECALLS, "r_mean"))]
        for split, found in splits.items()
        for order, name in ORDERS.items()
        if f"{order}_r_mean" in found
    ]
    return pages.table(["recall, percent", *(name_recall(key) for key in RECALLS), "mean"], rows)


def caption_table(splits: Mapping[str, dict]) -> str:
    rows, missing = [], {}
    for split, found in splits.items():
        domains = {f"{split}, {name} domain": x for name, x in found.items() if isinstance(x, dict)}
        for name, values in {split: found, **domains}.items():
            rows.append([name, *(cell(values.get(column)) for column in CAPTION_COLUMNS)])
            missing |= {column: values[column] for column in CAPTION_COLUMNS if isinstance(values.get(column), str)}
    notes = [f"<p class=note>{html.escape(f'{column}: {why}')}</p>" for column, why in missing.items()]
    return pages.table(["split", *CAPTION_COLUMNS], rows) + "".join(notes)


def answer_table(splits: Mapping[str, dict]) -> str:
    """A row for all questions, then for each type of answer and of question; of each split the accuracy and what the
    best constant answers reach."""
    splits = {split: found for split, found in splits.items() if "accuracy" in found}
    constant = "constant_by_question_type"
    names = {("accuracy", "constant", None): "all questions"}
    for found in splits.values():
        names |= {("by_answer_type", None, name): f"answer type: {name}" for name in found.get("by_answer_type", {})}
    for found in splits.values():
        kinds = found.get("by_question_type", {})
        names |= {("by_question_type", constant, name): f"question type: {name}" for name in kinds}
    rows = []
    for (mine, best, name), title in names.items():
        pairs = [(found.get(mine), found.get(best) if best else None) for found in splits.values()]
        pairs = [pair if name is None else tuple((x or {}).get(name) for x in pair) for pair in pairs]
        rows.append([title, *(cell(x) for pair in pairs for x in pair)])
    counts = [f"{split} ({found.get('questions', 0):,})" for split, found in splits.items()]
    return pages.table(["VQA accuracy, percent", *(x for count in counts for x in (count, "constant answers"))], rows)


def cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "-"


# -------------------------------------------------------------------------------------------------------- settings


def settings(run: Run) -> list[str]:
    """What differs from the stage's first configuration file, the paper's, and the whole configuration."""
    schema = report_samples.STAGES[run.stage].schema
    own = {key: value for key, value in read_yaml(ROOT / schema).items() if key != "base"}
    changed = differences(own, run.config)
    rows = [[key, shown(before), shown(now)] for key, (before, now) in changed.items()]
    whole = html.escape((run.folder / "config.yaml").read_text(encoding="utf-8"))
    return [
        "<h2 id=settings>Settings</h2>",
        f"<p class=note>{len(rows)} settings differ from {html.escape(str(schema))}, the paper's.</p>",
        pages.table(["key", "paper", "this run"], rows, "words settings"),
        f"<details><summary>all settings (config.yaml)</summary><pre class=wide>{whole}</pre></details>",
    ]


def shown(value: object) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
