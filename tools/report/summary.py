"""What each run reached, as text: the summary on the console and the numbers of a run's page."""

from __future__ import annotations

from evaluation.caption import caption_table
from evaluation.retrieval import retrieval_table
from evaluation.vqa import vqa_table
from tools.report.runs import Run, read_log

TABLES = {"cider": caption_table, "accuracy": vqa_table, "itc_tr_r1": retrieval_table}  # by a number of theirs


def summaries(runs: list[Run]) -> str:
    return "\n".join(line for run in runs for line in ["", str(run.folder), *("  " + row for row in numbers(run))])


def numbers(run: Run) -> list[str]:
    """First and last value of every loss, and each split's table: recalls, captioning's scores or accuracies."""
    result = []
    if steps := [entry for entry in read_log(run.folder) if entry["split"] == "train"]:
        first, last = steps[0], steps[-1]
        result.append(f"step {last['step']}, {last['pairs_per_second']:.0f} pairs/s")
        losses = [key for key in last if key in ("loss", "reward") or key.startswith("loss/")]
        result += [f"{key:12} {first[key]:8.3f} -> {last[key]:8.3f}" for key in losses]
    for split, values in run.metrics.items():
        for key, table in TABLES.items():
            if isinstance(values, dict) and key in values:
                result += table(split, values)
    return result
