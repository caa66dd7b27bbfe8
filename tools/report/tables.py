"""The paper's Tables 1 to 3 and 8 with this code's numbers beside the published ones, from the runs below a folder.

A run is a folder with config.yaml and metrics.json. Which columns it fills follows from its stage and from the folder
(or name) of its test file: MSCOCO, Flickr30K, NoCaps and VQA v2 are the paper's data, all else has tables of its own.
Runs that differ in nothing but their seed (and in where they lie) are one row, with mean and spread.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.yaml_files import read_yaml
from tools.report.statistics import Stat
from utils import UserError, one_line

NOT_RUN, DASH = "not run", "-"
STAGE_OF_KEY = {"rerank": "retrieval", "scst": "caption", "answer": "vqa", "mim": "pretrain"}  # a key only it has
# The paper's data sets by the folder or, whatever the folder, the name of their test file.
DATA_FOLDERS = {"coco": "coco", "mscoco": "coco", "flickr": "flickr", "flickr30k": "flickr"}
DATA_FOLDERS |= {"nocaps": "nocaps", "vqa": "vqa", "vqav2": "vqa"}
DATA_FILES = re.compile(
    r"(?:dataset_)?(coco|flickr|nocaps)(?:30k)?(?:_val|_test)?$|(v(?=2_OpenEnded)|vqa(?=_test_ocr))"
)
GENERAL_FOLDERS = ("data", "annotations")  # say nothing about the data set
RECALLS = tuple(f"{side}_r{k}" for side in ("tr", "ir") for k in (1, 5, 10))
CAPTIONS, EPOCHS = 5.1e6, 20  # of the paper's pre-training (Sections 4.1 and 4.2)
SECONDS_A_DAY = 86400


@dataclass
class Run:
    """A finished run and its numbers."""

    folder: Path
    stage: str  # pretrain, retrieval, caption, vqa
    kind: str  # fine-tuned (captioning: CE or CIDEr opt.) or zero-shot
    data: str  # coco, flickr, nocaps, vqa, or another folder's name
    seed: int
    config: dict
    metrics: dict
    row: str | None = None  # of tools/ablate
    server: dict = field(default_factory=dict)  # server.json: test_dev and test_std of the VQA evaluation server

    @property
    def settings(self) -> str:
        """What seeds of one experiment have in common."""
        return json.dumps({key: value for key, value in self.config.items() if key != "seed"}, sort_keys=True)

    @property
    def split(self) -> dict:
        """The numbers of the test split, or of val where test was not evaluated."""
        splits = [self.metrics[name] for name in ("test", "val") if isinstance(self.metrics.get(name), dict)]
        return splits[0] if splits else {}


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)  # rows with this code's numbers
    paper: set[int] = field(default_factory=set)  # rows with the paper's own


def read_paper() -> dict:
    """tools/report/paper_tables.json"""
    return json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------- what was run


def find_runs(folder: Path) -> list[Run]:
    """All finished runs below a folder, in the order of their paths."""
    return [run for path in run_folders(folder) if (run := read_run(path)) is not None]


def run_folders(folder: Path) -> list[Path]:
    """The folders of all runs below a folder; not earlier_1, ..., into which a later run in the same folder put one."""
    paths = [path.parent for path in sorted(folder.rglob("config.yaml"))]
    return [path for path in paths if path == folder or not re.fullmatch(r"earlier_\d+", path.name)]


def read_run(folder: Path, unfinished: bool = False) -> Run | None:
    """The run in a folder; None where it has no numbers yet, unless `unfinished` ones are wanted."""
    metrics = read_json(folder / "metrics.json")
    config = read_yaml(folder / "config.yaml")
    stage = next((stage for key, stage in STAGE_OF_KEY.items() if key in config), None)
    if stage is None or not (metrics or unfinished):
        return None
    result = read_json(folder.parent / "result.json")
    if result and folder.name not in result.get("stages", {}) and not unfinished:
        return None  # a stage of an ablation that was interrupted in its last evaluation
    return Run(
        folder=folder,
        stage=stage,
        kind=kind_of(stage, config, trained(folder)),
        data=data_name(config),
        seed=config.get("seed", 0),
        config=config,
        metrics=metrics,
        row=result.get("row"),
        server=read_json(folder / "server.json"),
    )


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def trained(folder: Path) -> bool:
    """Whether the run trained, rather than only evaluated a checkpoint."""
    return any((folder / f"checkpoint_{name}.pth").exists() for name in ("last", "best")) or any(
        entry.get("split") == "train" for entry in read_log(folder)
    )


def read_log(folder: Path) -> list[dict]:
    """The lines of log.jsonl; one that a kill cut short is left out."""
    log = folder / "log.jsonl"
    if not log.is_file():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def kind_of(stage: str, config: dict, was_trained: bool) -> str:
    if not was_trained:
        return "zero-shot"
    if stage == "caption":
        return "CIDEr opt." if config["train"].get("objective") == "scst" else "CE"
    return "fine-tuned"


def data_name(config: dict) -> str:
    """The data set of a run, from the path of its test (val, train) file."""
    data = config.get("data", {})
    files = next((data[split] for split in ("test", "val", "train") if data.get(split)), [])
    path = Path(str(files[0] if isinstance(files, list) else files))
    folders = [part for part in path.parts[:-1] if part not in (*GENERAL_FOLDERS, "/", ".", "..")]
    if folders and folders[-1].lower() in DATA_FOLDERS:
        return DATA_FOLDERS[folders[-1].lower()]
    if match := DATA_FILES.match(path.stem):
        return match[1] or "vqa"
    return one_line(folders[-1] if folders else path.stem)


def groups(runs: Iterable[Run], stage: str, kind: str | None = None, data: str | None = None) -> list[list[Run]]:
    """Runs of one experiment (equal settings) together, ordered by folder; ablations only where there are no others."""
    chosen = [r for r in runs if r.stage == stage and kind in (None, r.kind) and data in (None, r.data)]
    plain = [run for run in chosen if run.row is None] or [run for run in chosen if run.row == "semmim"]
    found: dict[tuple[str, int], list[Run]] = {}
    repeats: dict[tuple[str, int], int] = {}
    for run in plain:
        again = repeats[run.settings, run.seed] = repeats.get((run.settings, run.seed), -1) + 1
        found.setdefault((run.settings, again), []).append(run)  # a seed counts once per experiment
    return list(found.values())


# --------------------------------------------------------------------------------------------------- the arithmetic


def stat(runs: Sequence[Run], value: Callable[[Run], float | str | None]) -> Stat | None:
    """Over the runs that have a number; a line that says why there is none counts as none."""
    values = (value(run) for run in runs)
    return Stat.of(x for x in values if isinstance(x, int | float) and math.isfinite(x))


def paired_difference(runs: Sequence[Run], others: Sequence[Run], value: Callable) -> Stat | None:
    """value(run) - value(other) over the seeds that both have: what the seeds share cancels."""
    by_seed = {run.seed: value(run) for run in others}
    pairs = [(value(run), by_seed.get(run.seed)) for run in runs]
    return Stat.of(mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None)


def gpu_days(pairs_per_second: float, gpus: int = 1) -> float:
    """GPU days of the paper's schedule: 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400 s."""
    return CAPTIONS * EPOCHS / (pairs_per_second / gpus) / SECONDS_A_DAY


def implied_pairs_per_second(days: float) -> float:
    """Pairs per second of one GPU that `days` GPU days of the paper's schedule mean."""
    return CAPTIONS * EPOCHS / days / SECONDS_A_DAY


# ------------------------------------------------------------------------------------------------- values of a run


def recall(run: Run, column: str, ranking: str = "itm") -> float | None:
    return run.split.get(f"{ranking}_{column}")


def vqa_accuracy(run: Run) -> float | None:
    """The server's test-dev where it is known, else the test (or val) accuracy of the run."""
    return run.server.get("test_dev", run.split.get("accuracy"))


# --------------------------------------------------------------------------------------------------- Tables 1 to 3


def table1(paper: dict, runs: list[Run]) -> list[Table]:
    def cell(key: str) -> Callable[[Run], float | None]:
        return lambda run: recall(run, key.split("_", 1)[1])

    sources = {key: (key.split("_")[0], cell(key)) for key, _, _ in paper["columns"]}
    table = published(paper, "1", runs, "retrieval", sources, {"coco": "fine-tuned", "flickr": "fine-tuned"})
    table.notes.append("Two-stage ranking: the first candidates by contrast, re-ranked by the fusion encoder.")
    rows, columns = [], ["run", "data", "kind", *(name_recall(key) for key in RECALLS), "mean"]
    for group in groups(runs, "retrieval"):
        if group[0].data in ("coco", "flickr") and group[0].kind == "fine-tuned":
            continue
        for stage, name in (("itm", "re-ranked"), ("itc", "contrast alone"), ("chance", "a random order")):
            lead = [run_name(group), group[0].data, group[0].kind] if stage == "itm" else ["", "", ""]
            cells = [show(stat(group, lambda r, k=key, s=stage: recall(r, k, s)), 1) for key in (*RECALLS, "r_mean")]
            rows.append([f"{lead[0]} {name}".strip() if stage == "itm" else name, *lead[1:], *cells])
    return [table, *other_data("Table 1 on other data, and zero-shot", columns, rows)]


def table2(paper: dict, runs: list[Run]) -> list[Table]:
    columns = {"bleu4": "B@4", "meteor": "M", "cider": "C", "spice": "S"}

    def cell(key: str) -> Callable[[Run], float | None]:
        return lambda run: run.split.get(key.split("_", 1)[1])

    sources = {key: (key.split("_")[0], cell(key)) for key, _, _ in paper["columns"]}
    table = published(paper, "2", runs, "caption", sources, {"ce": "CE", "scst": "CIDEr opt.", "nocaps": "zero-shot"})
    rows = []
    for group in groups(runs, "caption"):
        if group[0].data in ("coco", "nocaps") and (group[0].kind == "zero-shot") == (group[0].data == "nocaps"):
            continue
        cells = [show(stat(group, lambda run, k=key: run.split.get(k)), 1) for key in columns]
        rows.append([run_name(group), group[0].data, group[0].kind, *cells])
    return [table, *other_data("Table 2 on other data", ["run", "data", "kind", *columns.values()], rows)]


def table3(paper: dict, runs: list[Run]) -> list[Table]:
    def cell(key: str) -> Callable[[Run], float | None]:
        return lambda run: run.server.get(key.removeprefix("vqa_"))

    sources = {key: ("vqa", cell(key)) for key, _, _ in paper["columns"]}
    table = published(paper, "3", runs, "vqa", sources, {"vqa": "fine-tuned"})
    table.notes.append(
        "test-dev and test-std are scored by the evaluation server: upload vqa_result.json, and write its answer "
        'beside it as server.json, {"test_dev": ..., "test_std": ...}.'
    )
    rows = []
    for group in groups(runs, "vqa"):
        for split in ("val", "test"):
            numbers = [[run.metrics.get(split, {}).get(key) for run in group] for key in ("accuracy", "constant")]
            found = [show(Stat.of(x for x in values if x is not None), 2) for values in numbers]
            if found[0] != NOT_RUN:
                rows.append([run_name(group), group[0].data, group[0].kind, split, *found])
    columns = ["run", "data", "kind", "split", "accuracy", "best constant answers"]
    return [table, *other_data("Table 3: validation, and other data", columns, rows)]


def published(
    paper: dict, number: str, runs: list[Run], stage: str, sources: dict[str, tuple], kinds: dict[str, str]
) -> Table:
    """The published rows, and for every experiment a row of this code with its difference to the paper's model.

    sources: {column: (part, value of a run)}, parts being columns that one run fills; kinds: {part: kind of such runs}.
    """
    keys = [key for key, _, _ in paper["columns"]]
    decimals = {key: count for key, _, count in paper["columns"]}
    columns = [paper["name"], "data", *(label for _, label, _ in paper["columns"])]
    rows = [[row["name"], row["data"], *printed_row(paper, row)] for row in paper["rows"]]
    table = Table(f"Table {number}. {paper['title']}", columns, rows)
    table.paper = paper_rows(paper)
    target = paper_values(paper)
    by_part = {part: groups(runs, stage, kind, data_of(part)) for part, kind in kinds.items()}
    experiments = list(itertools.zip_longest(*by_part.values(), fillvalue=[])) or [()]
    for experiment in experiments:
        found = dict(zip(by_part, experiment, strict=False))
        stats = [stat(found.get(sources[key][0], []), sources[key][1]) for key in keys]
        name = "this code" if len(experiments) == 1 else f"this code: {run_name([r for g in experiment for r in g])}"
        table.ours |= {len(rows), len(rows) + 1}
        rows.append([name, "", *(show(value, decimals[key]) for key, value in zip(keys, stats, strict=True))])
        differences = [
            DASH if value is None else f"{value.mean - theirs:+.{decimals[key]}f}"
            for key, value, theirs in zip(keys, stats, target, strict=True)
        ]
        rows.append(["difference to the paper", "", *differences])
    return table


def data_of(part: str) -> str:
    """Of Table 2, `ce` and `scst` are both on MSCOCO."""
    return "coco" if part in ("ce", "scst") else part


def other_data(title: str, columns: list[str], rows: list[list[str]]) -> list[Table]:
    return [Table(title, columns, rows, ours=set(range(len(rows))))] if rows else []


def show(value: Stat | None, decimals: int) -> str:
    return NOT_RUN if value is None else value.show(decimals)


def paper_values(paper: dict) -> list:
    """The published values of the paper's own model."""
    return next(row["values"] for row in paper["rows"] if row.get("paper"))


def paper_rows(paper: dict) -> set[int]:
    """The places of the rows that are the paper's own model."""
    return {place for place, row in enumerate(paper["rows"]) if row.get("paper")}


def printed_row(paper: dict, row: dict) -> list[str]:
    """The values of a published row."""
    return [printed(value, decimals) for value, (_, _, decimals) in zip(row["values"], paper["columns"], strict=True)]


def printed(value, decimals: int) -> str:
    """A published value as the paper prints it."""
    if value is None:
        return DASH
    return f"{value:.{decimals}f}" if isinstance(value, int | float) else str(value)


def name_recall(key: str) -> str:
    side, _, k = key.partition("_r")
    return f"{side.upper()} R@{k}"


def run_name(group: Sequence[Run]) -> str:
    """The last parts of a run's folder, of an ablation's with its row; how many more there are."""
    if not group:
        return ""
    name = one_line("/".join(group[0].folder.parts[-2 if group[0].row is None else -3 :]), 1000)  # ROW/seed_N/STAGE
    return name if len(group) < 2 else f"{name} and {len(group) - 1} more"


# ---------------------------------------------------------------------------------------------------------- Table 8


def table8(paper: dict, runs: list[Run], parameters: dict[str, int], pairs_per_second: float | None, gpus: int):
    """Published costs, this code's parameters per module, and what the measured speed means for the paper's schedule.

    parameters: tools/benchmark's count at the paper's size; pairs_per_second: measured there, by `gpus` GPUs in all.
    """
    rows = [[row["name"], *printed_row(paper, row)] for row in paper["rows"]]
    days = NOT_RUN if pairs_per_second is None else f"{gpu_days(pairs_per_second, gpus):.1f}"
    coco = [group for group in groups(runs, "retrieval", "fine-tuned", "coco")][:1]
    recalls = [show(stat(coco[0] if coco else [], lambda run, k=key: recall(run, k)), 1) for key in ("tr_r1", "ir_r1")]
    rows.append(["this code", f"{parameters['total'] / 1e6:.1f}M", days, *recalls])
    costs = Table(f"Table 8. {paper['title']}", [paper["name"], *(label for _, label, _ in paper["columns"])], rows)
    costs.paper, costs.ours = {len(rows) - 2}, {len(rows) - 1}
    costs.notes = cost_notes(paper, pairs_per_second, gpus)
    return [costs, parameter_table(parameters), *speed_table(runs)]


def cost_notes(paper: dict, pairs_per_second: float | None, gpus: int) -> list[str]:
    printed_days = paper_values(paper)[1]
    implied = implied_pairs_per_second(float(printed_days.split()[0]))
    formula = (
        "GPU days = 5.1M captions x 20 epochs / (pairs/s per GPU) / 86,400; the paper's "
        f"{printed_days} mean {implied:.1f} pairs/s per GPU."
    )
    if pairs_per_second is None:
        measured = "Measure pairs/s at the paper's size and give it by --pairs_per_second X --gpus N."
    else:
        measured = f"From {pairs_per_second:g} pairs/s on {gpus} GPU{'s' if gpus > 1 else ''}."
    return [
        formula,
        measured,
        "The paper's 360M (354M without the head) come out if the fusion encoder has a word-embedding table of its "
        "own, unused, as mPLUG's code does, and M is 2^20; this code has no such table.",
    ]


def parameter_table(parameters: dict[str, int]) -> Table:
    """Trainable parameters per module, with and without the encoding head."""
    without = parameters["total"] - parameters["encoding_head"]
    rows = [[name.replace("_", " "), f"{count:,}", f"{count / 1e6:.1f}M"] for name, count in parameters.items()]
    rows.insert(-1, ["total without the encoding head", f"{without:,}", f"{without / 1e6:.1f}M"])
    note = (
        "configs/Pretrain.yaml; a tied tensor counts once. No later stage has the encoding head: inference is the same."
    )
    return Table("Table 8: trainable parameters per module", ["module", "parameters", ""], rows, [note])


def speed_table(runs: list[Run]) -> list[Table]:
    """What the runs themselves measured: training pairs and captions per second, and the time of a ranking."""
    rows = []
    for run in runs:
        speeds = [e["pairs_per_second"] for e in read_log(run.folder) if e.get("pairs_per_second")]
        if speeds:
            rows.append([run_name([run]), run.stage, "training", f"{statistics.median(speeds):.1f} pairs/s"])
        if run.split.get("captions_per_second"):
            rows.append([run_name([run]), run.stage, "captions", f"{run.split['captions_per_second']:,} captions/s"])
        if run.stage == "retrieval" and run.split.get("seconds"):
            numbers = run.split
            what = f"{numbers['images']:,} images x {numbers['texts']:,} texts in {numbers['seconds']:,} s"
            rows.append([run_name([run]), run.stage, "two-stage ranking", what])
    note = "On the machine and with the model of each run: medians of the log, beside whatever else ran there."
    return [Table("Speed of the runs", ["run", "stage", "what", "speed"], rows, [note])] if rows else []
