"""What was run: the runs below a folder, or those of a study's table, a file with one run a line (JSON lines)."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset.files import json_lines, read_json
from engine.config import read_yaml
from utils import UserError

STAGE_OF_KEY = {"rerank": "retrieval", "scst": "caption", "answer": "vqa", "mim": "pretrain"}  # a key only it has
PAPER_DATA = re.compile(r"(?:ms)?(coco|flickr|nocaps|vqa)(?:30k|v2)?")  # folders of the paper's data sets
GENERAL_FOLDERS = ("data", "annotations", "/", ".", "..")  # say nothing about the data set


@dataclass
class Run:
    """A run and its numbers by split; `metrics` is empty until its first evaluation."""

    folder: Path
    stage: str  # pretrain, retrieval, caption, vqa
    kind: str  # fine-tuned (captioning: CE or CIDEr opt.) or zero-shot
    data: str  # coco, flickr, nocaps, vqa, or another folder's name
    seed: int
    settings: str  # equal for the seeds of one experiment
    metrics: dict
    row: str | None = None  # of the paper's ablations

    def split_of(self, name: str) -> str | None:
        """Which split has a number of that name: test, or val if test has none, as of questions without answers."""
        return next((split for split in ("test", "val") if name in (self.metrics.get(split) or {})), None)

    def number(self, name: str, split: str | None = None) -> float | str | None:
        """A number of a split, by default of `split_of`; a text that says why there is none, or None."""
        return (self.metrics.get(split or self.split_of(name)) or {}).get(name)

    def record(self, root: Path) -> dict:
        """The run as a line of a study's table; its folder is named from the study's own on."""
        values = {**asdict(self), "folder": self.folder.relative_to(root.parent).as_posix()}
        return {key: value for key, value in values.items() if value is not None}


def find_runs(path: Path, unfinished: bool = False) -> list[Run]:
    """The runs of a study's table, or below a folder in the order of their paths; without numbers if `unfinished`."""
    if path.is_file():
        try:
            return [Run(**{**record, "folder": Path(record["folder"])}) for _, record in json_lines(path)]
        except (TypeError, KeyError):
            raise UserError(f"{path}: no table of runs, as --format jsonl writes it") from None
    folders = [file.parent for file in sorted(path.rglob("config.yaml"))]
    if not folders:
        raise UserError(f"{path}: no run in it (a run's folder holds config.yaml); give a script's --output_dir")
    return [run for folder in folders if (run := read_run(folder)) and (run.metrics or unfinished)]


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None for a stage of an ablation that has not ended, and for other programs' folders."""
    config = read_yaml(folder / "config.yaml")
    stage = next((stage for key, stage in STAGE_OF_KEY.items() if key in config), None)
    result = read_if_there(folder.parent / "result.json")  # of tools.ablate
    if stage is None or (result and folder.name not in result["stages"]):
        return None
    metrics = read_if_there(folder / "metrics.json")
    for split, accuracy in read_if_there(folder / "server.json").items():  # of the VQA evaluation server
        metrics[split] = {"server": accuracy}
    kind = "zero-shot"
    if any(entry["split"] == "train" for entry in read_log(folder)):
        kind = "fine-tuned"
        if stage == "caption":
            kind = "CIDEr opt." if config["train"].get("objective") == "scst" else "CE"
    same = json.dumps({key: value for key, value in config.items() if key != "seed"}, sort_keys=True)
    return Run(
        folder=folder,
        stage=stage,
        kind=kind,
        data=data_name(config["data"]),
        seed=config["seed"],
        settings=hashlib.sha1(same.encode()).hexdigest()[:12],
        metrics=metrics,
        row=result.get("row"),
    )


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def read_log(folder: Path) -> list[dict]:
    """The lines of log.jsonl; one that a kill cut short is left out."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def data_name(data: dict) -> str:
    """The data set of a configuration's `data`, by the folder of its test (val, train) file."""
    files = next(data[split] for split in ("test", "val", "train") if data.get(split))
    path = Path(files[0] if isinstance(files, list) else files)
    folders = [part for part in path.parts[:-1] if part not in GENERAL_FOLDERS]
    name = folders[-1] if folders else path.stem
    found = PAPER_DATA.fullmatch(name.lower())
    return found[1] if found else name


def groups(runs: Iterable[Run], stage: str) -> list[list[Run]]:
    """Runs of one experiment together: equal settings, kind and model; of the ablations the paper's model.

    A seed that was run again is an experiment of its own.
    """
    found: dict[tuple, list[Run]] = {}
    repeats: Counter[tuple] = Counter()
    for run in runs:
        if run.stage == stage and run.row in (None, "semmim"):
            experiment = (run.settings, run.kind, json.dumps(run.metrics.get("run", {}).get("model")))
            found.setdefault((*experiment, repeats[experiment, run.seed]), []).append(run)
            repeats[experiment, run.seed] += 1
    return list(found.values())


def run_name(group: Sequence[Run]) -> str:
    """The last parts of a run's folder, of an ablation's with its row; how many more there are."""
    name = "/".join(group[0].folder.parts[-3 if group[0].row else -2 :])  # ROW/seed_N/STAGE
    return name if len(group) < 2 else f"{name} and {len(group) - 1} more"


# ------------------------------------------------------------------------------------------------- seeds together


def numbers(runs: Iterable[Run], value: Callable[[Run], object]) -> list[float]:
    """A value of the runs that have it."""
    return [found for found in map(value, runs) if isinstance(found, int | float)]


def paired_differences(runs: Iterable[Run], others: Iterable[Run], value: Callable) -> list[float]:
    """value(run) - value(other) over the seeds that both have: what the seeds share cancels."""
    theirs = {run.seed: number for run in others for number in numbers([run], value)}
    return [number - theirs[run.seed] for run in runs if run.seed in theirs for number in numbers([run], value)]


def show(values: Sequence[float], decimals: int, effect: bool = False) -> str:
    """mean ± sample standard deviation (count); an effect has its sign, and an asterisk if it differs from 0 by a
    two-sided t test at 5%, which is the paired test of paired differences."""
    mean, count = statistics.fmean(values), len(values)
    text = f"{mean:{'+' if effect else ''}.{decimals}f}"
    if count == 1:
        return text
    from scipy import stats  # takes a second, which most commands need not wait for

    spread = statistics.stdev(values)
    if effect and abs(mean) * count**0.5 > stats.t.ppf(0.975, count - 1) * spread:
        text += "*"
    return f"{text} ± {spread:.{decimals}f} ({count})"
