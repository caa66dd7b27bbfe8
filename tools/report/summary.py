"""What each run reached and its files, as text: the summary on the console and the numbers of a run's page."""

from __future__ import annotations

from pathlib import Path

from evaluation.caption import caption_table
from evaluation.retrieval import retrieval_table
from evaluation.vqa import vqa_table
from tools.report.runs import Run, read_log
from utils import one_line

FILES = ("checkpoint_last.pth", "checkpoint_best.pth", "images", "tensorboard", "log.jsonl", "metrics.json")
FILES += ("retrieval_result.json", "vqa_result.json", "caption_result.json")
# The validation scores that choose the best epoch; that by ITC is pre-training's, and one of retrieval's two.
SCORES = {"itm_r_mean": "val recall", "itc_r_mean": "val by ITC", "cider": "val CIDEr", "accuracy": "val accuracy"}
TEACHER = {
    "teacher/cls_batch_entropy": "entropy of the teacher's batch-mean distribution, [CLS]",
    "teacher/patch_batch_entropy": "the same over the masked patches",
    "teacher/patterns_in_use": "patterns in use by the patches of a batch",
}


def summaries(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        found = [*numbers(run), *(one_line(run.folder / name, 1000) for name in files(run.folder))]
        lines += ["", one_line(run.folder, 1000), *("  " + line for line in found)]
    return "\n".join(lines)


def numbers(run: Run) -> list[str]:
    """What was measured while a run trained and when it was evaluated, or why it failed."""
    return [*training_lines(run.folder), *evaluation_lines(run.metrics)]


def training_lines(folder: Path) -> list[str]:
    """First and last logged value of every loss, validations, and whether the teacher still uses its patterns."""
    entries = read_log(folder)
    steps = [entry for entry in entries if entry.get("split") == "train"]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    result = [f"step {last['step']}, {last.get('pairs_per_second') or 0:.0f} pairs/s"]
    for key in [key for key in last if key in ("loss", "reward") or key.startswith("loss/")]:
        result.append(f"{key:12} {first.get(key):8.3f} -> {last[key]:8.3f}")
    for key, name in SCORES.items():
        # step 0 is the evaluation at the end, except for CIDEr alone: there self-critical training began
        started = [x for x in entries if "cider" in x and "bleu4" not in x]
        validated = [x for x in entries if x["split"] == "val" and key in x and (x["step"] or x in started)]
        if validated:
            shown = (f"{entry[key]:.1f} (step {entry['step']})" for entry in validated)
            result.append(f"{name:12} {', '.join(shown)}")
    result += [f"{last[key]:8.2f}  {meaning}" for key, meaning in TEACHER.items() if last.get(key) is not None]
    return result


def evaluation_lines(metrics: dict) -> list[str]:
    """Each split's table: recalls with what chance gives, accuracies with what constant answers give, or captioning."""
    result = [one_line(metrics["failed"])] if "failed" in metrics else []
    tables = {"cider": caption_table, "accuracy": vqa_table, "itc_tr_r1": retrieval_table}  # by a number of theirs
    for split, values in metrics.items():
        for key, table in tables.items():
            if isinstance(values, dict) and key in values:
                result += table(split, values)
    return result


def files(folder: Path) -> list[str]:
    """The names of the files that a user looks for and the folder holds."""
    return [name for name in FILES if (folder / name).exists()]
