"""Print what the runs below a folder reached: losses and teacher of a training, numbers of an evaluation, files.

python tools/report.py output/demo
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.caption import caption_table  # noqa: E402
from evaluation.retrieval import retrieval_table  # noqa: E402
from evaluation.vqa import vqa_table  # noqa: E402
from utils import UserError, run_main  # noqa: E402

FILES = {  # what a user looks for, in the order of the report
    "checkpoint": "checkpoint_last.pth",
    "best": "checkpoint_best.pth",
    "pictures": "pictures",
    "TensorBoard": "tensorboard",
    "log": "log.jsonl",
    "numbers": "metrics.json",
    "rankings": "retrieval_result.json",
    "answers": "vqa_result.json",
    "captions": "caption_result.json",
}
# the validation scores that choose the best epoch
SCORES = {"itm_r_mean": "val recall", "cider": "val CIDEr", "accuracy": "val accuracy"}
TEACHER = {
    "teacher/cls_batch_entropy": "entropy of the teacher's batch-mean distribution, [CLS]",
    "teacher/patch_batch_entropy": "the same over the masked patches",
    "teacher/patterns_in_use": "patterns in use by the patches of a batch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of one run, or of several")
    folder = parser.parse_args().folder
    runs = [path.parent for path in sorted(folder.rglob("config.yaml"), key=lambda path: path.stat().st_mtime)]
    if not runs:
        raise UserError(f"{folder}: no run in it (a run's folder holds config.yaml); give a script's --output_dir")
    for run in runs:
        print(f"\n{run}")
        for line in [*training_lines(run), *evaluation_lines(run), *file_lines(run)]:
            print("  " + line)


def training_lines(run: Path) -> list[str]:
    """First and last logged value of every loss, validations, and whether the teacher still uses its patterns."""
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    entries = [json.loads(line) for line in lines]
    steps = [entry for entry in entries if entry.get("split") == "train"]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    result = [f"step {last['step']}, {last.get('pairs_per_second') or 0:.0f} pairs/s"]
    for key in [key for key in last if key == "loss" or key.startswith("loss/")]:
        result.append(f"{key:12} {first.get(key):8.3f} -> {last[key]:8.3f}")
    if "reward" in last:
        result.append(f"{'reward':12} {first['reward']:8.3f} -> {last['reward']:8.3f}")
    for key, name in SCORES.items():
        # step 0 is the evaluation at the end, except for CIDEr alone: there self-critical training began
        started = [x for x in entries if "cider" in x and "bleu4" not in x]
        validated = [x for x in entries if x["split"] == "val" and key in x and (x["step"] or x in started)]
        if validated:
            shown = (f"{entry[key]:.1f} (step {entry['step']})" for entry in validated)
            result.append(f"{name:12} {', '.join(shown)}")
    result += [f"{last[key]:8.2f}  {meaning}" for key, meaning in TEACHER.items() if last.get(key) is not None]
    return result


def evaluation_lines(run: Path) -> list[str]:
    """Each split's table: recalls with what chance gives, accuracies with what constant answers give, or captioning."""
    path = run / "metrics.json"
    numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result = []
    for split, values in numbers.items():
        if not isinstance(values, dict):
            continue
        if "cider" in values:
            result += caption_table(split, values)
        elif "accuracy" in values or "itc_tr_r1" in values:
            table = vqa_table if "accuracy" in values else retrieval_table
            result += table(split, values).splitlines()
    return result


def file_lines(run: Path) -> list[str]:
    return [f"{name:12} {run / file}" for name, file in FILES.items() if (run / file).exists()]


if __name__ == "__main__":
    run_main(main)
