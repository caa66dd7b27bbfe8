"""What each run reached and its files, as text: the summary on the console and the numbers of a run's page."""

from __future__ import annotations

from pathlib import Path

from evaluation.caption import caption_table
from evaluation.retrieval import retrieval_table
from evaluation.vqa import vqa_table
from tools.report.runs import Run, read_log

FILES = ("checkpoint_last.pth", "checkpoint_best.pth", "images", "tensorboard", "log.jsonl", "metrics.json")
FILES += ("retrieval_result.json", "vqa_result.json", "caption_result.json")
# The validation scores that choose the best epoch; that by ITC is pre-training's, and one of retrieval's two.
SCORES = {"itm_r_mean": "val recall", "itc_r_mean": "val by ITC", "cider": "val CIDEr", "accuracy": "val accuracy"}
TEACHER = {
    "teacher/cls_batch_entropy": "entropy of the teacher's batch-mean distribution, [CLS]",
    "teacher/patch_batch_entropy": "the same over the masked patches",
    "teacher/patterns_in_use": "patterns in use by the patches of a batch",
}
TABLES = {"cider": caption_table, "accuracy": vqa_table, "itc_tr_r1": retrieval_table}  # by a number of theirs


def summaries(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        found = [*numbers(run), *(str(run.folder / name) for name in files(run.folder))]
        lines += ["", str(run.folder), *("  " + line for line in found)]
    return "\n".join(lines)


def numbers(run: Run) -> list[str]:
    """What was measured while a run trained, and each split's table: recalls, captioning's scores or accuracies."""
    tables = [
        table(split, values)
        for split, values in run.metrics.items()
        for key, table in TABLES.items()
        if isinstance(values, dict) and key in values
    ]
    return sum(tables, training_lines(run.folder))


def training_lines(folder: Path) -> list[str]:
    """First and last logged value of every loss, validations, and whether the teacher still uses its patterns."""
    entries = read_log(folder)
    steps = [entry for entry in entries if entry["split"] == "train"]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    result = [f"step {last['step']}, {last['pairs_per_second']:.0f} pairs/s"]
    for key in [key for key in last if key in ("loss", "reward") or key.startswith("loss/")]:
        result.append(f"{key:12} {first[key]:8.3f} -> {last[key]:8.3f}")
    for key, name in SCORES.items():
        # step 0 is the evaluation at the end
        validated = [entry for entry in entries if entry["split"] == "val" and key in entry and entry["step"]]
        if validated:
            result.append(f"{name:12} " + ", ".join(f"{e[key]:.1f} (step {e['step']})" for e in validated))
    return result + [f"{last[key]:8.2f}  {meaning}" for key, meaning in TEACHER.items() if last.get(key) is not None]


def files(folder: Path) -> list[str]:
    """The names of the files that a user looks for and the folder holds."""
    return [name for name in FILES if (folder / name).exists()]
