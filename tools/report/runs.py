"""What was run: the runs below a folder, or those of a study's table, a file with one run a line (JSON lines)."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dataset.files import read_json
from engine.config import read_yaml
from utils import UserError, one_line

STAGE_OF_KEY = {"rerank": "retrieval", "scst": "caption", "answer": "vqa", "mim": "pretrain"}  # a key only it has
# The paper's data sets by the folder or, whatever the folder, the name of their test file.
DATA_FOLDERS = {"coco": "coco", "mscoco": "coco", "flickr": "flickr", "flickr30k": "flickr"}
DATA_FOLDERS |= {"nocaps": "nocaps", "vqa": "vqa", "vqav2": "vqa"}
DATA_FILES = re.compile(
    r"(?:dataset_)?(coco|flickr|nocaps)(?:30k)?(?:_val|_test)?$|(v(?=2_OpenEnded)|vqa(?=_test_ocr))"
)
COUNTS = ("images", "texts", "questions")  # of a split's metrics: different ones are different data
NEVER_TEXT = re.compile("|".join((*COUNTS, "accuracy", "constant", "(chance|itc|itm)_.*")))  # as captioning's may be
GENERAL_FOLDERS = ("data", "annotations", "/", ".", "..")  # say nothing about the data set


@dataclass
class Run:
    """A run and its numbers; `metrics` is empty until its first evaluation."""

    folder: Path
    stage: str  # pretrain, retrieval, caption, vqa
    kind: str  # fine-tuned (captioning: CE or CIDEr opt.) or zero-shot
    data: str  # coco, flickr, nocaps, vqa, or another folder's name
    seed: int
    settings: str  # equal for the seeds of one experiment
    metrics: dict
    row: str | None = None  # of the paper's ablations
    server: dict = field(default_factory=dict)  # server.json: test_dev and test_std of the VQA evaluation server

    def split_of(self, name: str) -> str | None:
        """Which split has a number of that name: test, or val if test has none, as of questions without answers."""
        return next((split for split in ("test", "val") if name in (self.metrics.get(split) or {})), None)

    def number(self, name: str, split: str | None = None) -> float | str | None:
        """A number of a split, by default of `split_of`; a text that says why there is none; None if it was not asked
        for."""
        if "failed" in self.metrics:
            return self.metrics["failed"]
        return (self.metrics.get(split or self.split_of(name)) or {}).get(name)

    def record(self, root: Path) -> dict:
        """The run as a line of a study's table; its folder is named from the study's own on."""
        values = {**asdict(self), "folder": self.folder.relative_to(root.parent).as_posix()}
        return {key: value for key, value in values.items() if value not in ({}, None)}


def find_runs(path: Path, unfinished: bool = False) -> list[Run]:
    """The runs of a study's table, or below a folder in the order of their paths; without numbers if `unfinished`.

    Raises UserError if there is no run at all.
    """
    if path.is_file():
        return read_table(path)
    folders = [file.parent for file in sorted(path.rglob("config.yaml"))]
    failed = [run for file in sorted(path.rglob("result.json")) for run in failed_stages(file)]
    if not folders and not failed:
        raise UserError(f"{path}: no run in it (a run's folder holds config.yaml); give a script's --output_dir")
    return failed + [run for folder in folders if (run := read_run(folder)) and (run.metrics or unfinished)]


def failed_stages(file: Path) -> list[Run]:
    """The stages of an ablation that failed, or could not begin because an earlier one failed; metrics: the reason."""
    result = read_result(file)
    return [
        Run(
            folder=file.parent / name,
            stage="retrieval" if name == "zeroshot" else name,
            kind="zero-shot" if name == "zeroshot" else "fine-tuned",
            data="",
            seed=result["seed"],
            settings="",
            metrics={"failed": why},
            row=result["row"],
        )
        for name, why in result.get("failed", {}).items()
    ]


def read_table(path: Path) -> list[Run]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Run(**{**record, "folder": Path(record["folder"])}) for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no table of runs, as --format jsonl writes it ({one_line(error)})") from None


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None for a stage of an ablation that has not ended, and for other programs' folders."""
    config, log = read_yaml(folder / "config.yaml"), read_log(folder)
    stage = next((stage for key, stage in STAGE_OF_KEY.items() if key in config), None)
    metrics, server = (read_if_there(folder / name) for name in ("metrics.json", "server.json"))
    result = read_result(folder.parent / "result.json")
    if stage is None or (result and folder.name not in result.get("stages", {})):
        return None
    trained = any((folder / f"checkpoint_{name}.pth").exists() for name in ("last", "best"))
    trained = trained or any(entry.get("split") == "train" for entry in log)
    same = json.dumps({key: value for key, value in config.items() if key != "seed"}, sort_keys=True)
    return Run(
        folder=folder,
        stage=stage,
        kind=kind_of(stage, config, trained),
        data=data_name(config),
        seed=config.get("seed", 0),
        settings=hashlib.sha1(same.encode()).hexdigest()[:12],
        metrics=metrics,
        row=result.get("row"),
        server=server,
    )


def read_if_there(path: Path) -> dict:
    """metrics.json or server.json, {} without one. Raises UserError if no script has written it so."""
    found = read_json(path) if path.is_file() else {}
    parts = [found.get(key, {}) for key in ("val", "test", "run")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or any(map(_has_text, parts)):
        raise UserError(f"{path}: not as the scripts write it; remove it")
    return found


def _has_text(numbers: dict) -> bool:
    """Whether something else stands where a number belongs."""
    return any(NEVER_TEXT.fullmatch(key) and not isinstance(value, int | float) for key, value in numbers.items())


def read_result(path: Path) -> dict:
    """tools.ablate's result.json; {} without one and for other programs' files of that name."""
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) and {"row", "seed", "stages"} <= found.keys() else {}


def read_log(folder: Path) -> list[dict]:
    """The lines of log.jsonl; one that a kill cut short is left out."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kind_of(stage: str, config: dict, trained: bool) -> str:
    if not trained:
        return "zero-shot"
    if stage == "caption":
        return "CIDEr opt." if config["train"].get("objective") == "scst" else "CE"
    return "fine-tuned"


def data_name(config: dict) -> str:
    """The data set of a run, from the path of its test (val, train) file."""
    data = config.get("data", {})
    files = next((data[split] for split in ("test", "val", "train") if data.get(split)), [""])
    path = Path(str(files[0] if isinstance(files, list) else files))
    folders = [part for part in path.parts[:-1] if part not in GENERAL_FOLDERS]
    if folders and folders[-1].lower() in DATA_FOLDERS:
        return DATA_FOLDERS[folders[-1].lower()]
    if match := DATA_FILES.match(path.stem):
        return match[1] or "vqa"
    return one_line(folders[-1] if folders else path.stem)


def groups(runs: Iterable[Run], stage: str) -> list[list[Run]]:
    """Runs of one experiment together: equal settings, kind, model and test data; of the ablations the paper's model.

    A seed that was run again is an experiment of its own.
    """
    found: dict[tuple, list[Run]] = {}
    repeats: Counter[tuple] = Counter()
    for run in runs:
        if run.stage == stage and run.row in (None, "semmim") and "failed" not in run.metrics:
            sizes = [(run.metrics.get(split) or {}).get(name) for split in ("val", "test") for name in COUNTS]
            experiment = (run.settings, run.kind, json.dumps([sizes, run.metrics.get("run", {}).get("model")]))
            found.setdefault((*experiment, repeats[experiment, run.seed]), []).append(run)
            repeats[experiment, run.seed] += 1
    return list(found.values())


def run_name(group: Sequence[Run]) -> str:
    """The last parts of a run's folder, of an ablation's with its row; how many more there are."""
    if not group:
        return ""
    name = one_line("/".join(group[0].folder.parts[-3 if group[0].row else -2 :]), 1000)  # ROW/seed_N/STAGE
    return name if len(group) < 2 else f"{name} and {len(group) - 1} more"


# ------------------------------------------------------------------------------------------------- seeds together


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation of `count` values; spread 0 with one value."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat | None:
        """None without any value."""
        values = [float(value) for value in values]
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def differs_from_zero(self) -> bool:
        """By a two-sided t test at 5%; of paired differences it is the paired test. False with one value."""
        from scipy import stats  # takes a second, which most commands need not wait for

        if self.count < 2:
            return False
        return abs(self.mean) * self.count**0.5 > stats.t.ppf(0.975, self.count - 1) * self.spread

    def show(self, decimals: int, effect: bool = False) -> str:
        """mean ± spread (count); an effect has its sign, and an asterisk if it differs from 0."""
        text = f"{self.mean:{'+' if effect else ''}.{decimals}f}"
        text += "*" if effect and self.differs_from_zero() else ""
        return f"{text} ± {self.spread:.{decimals}f} ({self.count})" if self.count > 1 else text


def stat(runs: Sequence[Run], value: Callable[[Run], object]) -> Stat | None:
    """Over the runs that have a number."""
    return Stat.of(x for x in map(value, runs) if is_number(x))


def paired_difference(runs: Sequence[Run], others: Sequence[Run], value: Callable) -> Stat | None:
    """value(run) - value(other) over the seeds that both have: what the seeds share cancels."""
    by_seed = {run.seed: value(run) for run in others}
    pairs = [(value(run), by_seed.get(run.seed)) for run in runs]
    return Stat.of(mine - theirs for mine, theirs in pairs if is_number(mine) and is_number(theirs))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")
