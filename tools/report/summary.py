"""What each run reached and its files, as text: the summary on the console and the numbers of a run's page."""

from __future__ import annotations

from pathlib import Path

from evaluation.caption import caption_table
from evaluation.retrieval import retrieval_table
from evaluation.vqa import vqa_table
from tools.report.runs import Run, read_log
from utils import one_line

FILES = {  # what a user looks for, in the order of the report
    "checkpoint": "checkpoint_last.pth",
    "best": "checkpoint_best.pth",
    "images": "images",
    "TensorBoard": "tensorboard",
    "log": "log.jsonl",
    "numbers": "metrics.json",
    "rankings": "retrieval_result.json",
    "answers": "vqa_result.json",
    "captions": "caption_result.json",
}
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
        found = [*training_lines(run.folder), *evaluation_lines(run)]
        found += [one_line(run.metrics["failed"])] if "failed" in run.metrics else []
        found += [f"{name:12} {one_line(path, 1000)}" for name, path in files(run.folder).items()]
        lines += ["", one_line(run.folder, 1000), *("  " + line for line in found)]
    return "\n".join(lines)


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


def evaluation_lines(run: Run) -> list[str]:
    """Each split's table: recalls with what chance gives, accuracies with what constant answers give, or captioning."""
    result = []
    for split, values in run.metrics.items():
        if not isinstance(values, dict):
            continue
        if "cider" in values:
            result += caption_table(split, values)
        elif "accuracy" in values or "itc_tr_r1" in values:
            table = vqa_table if "accuracy" in values else retrieval_table
            result += table(split, values)
    return result


def files(folder: Path) -> dict[str, Path]:
    """{what it is: path} of the files that a run's folder holds."""
    return {name: folder / file for name, file in FILES.items() if (folder / file).exists()}
