"""Run the ablations of the paper (Tables 4 to 7): every row pre-trained, then judged by retrieval and VQA.

    python tools/ablate.py all --base configs/demo/Pretrain.yaml --output output/demo/ablation --seeds 3 --jobs 2
    python tools/ablate.py 4 5 --base configs/Pretrain.yaml --seeds 1
    python tools/report.py output/demo/ablation --format text

The rows are those of configs/ablation/: a row is --base with the row's four switches (target, masking, mask ratio,
start layer) in the place of the base's own. Start layers are the paper's of 12 and scale with the depth of the base's
image encoder (1, 6, 9, 12 become 1, 3, 5, 6 of 6). The paper's model is a row of all four tables and is run once, as
are rows that scaling makes equal. Seeds are the base's own and the following; a seed's rows come before the next seed.

OUTPUT/ROW/seed_N/ holds a folder and a console log per stage, and result.json with the numbers of the finished stages.
What is finished is skipped, what was interrupted goes on from its checkpoint; Ctrl-C stops all runs with a checkpoint.
--jobs N divides this process's CPU cores, and the GPUs, among N runs; a run with several GPUs is started by torchrun,
and a global batch is train.batch_size (per process) x train.accumulation x GPUs, so set accumulation: --override
changes pre-training alone, --retrieval_override and --vqa_override the others. The batches are printed at the start.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import config as settings  # noqa: E402
from utils import UserError, clock, find_file, make_folder, run_main, write_json  # noqa: E402

TABLES = ("4", "5", "6", "7")
PAPER_DEPTH = 12  # layers of the image encoder whose numbers Table 7 names
SWITCHES = ("mim.target", "mim.masking", "mim.mask_ratio", "mim.inject_from")
KINDS = {"Pretrain.py": settings.PRETRAIN, "Retrieval.py": settings.RETRIEVAL, "VQA.py": settings.VQA}
STAGES = {"pretrain": "Pretrain.py", "zeroshot": "Retrieval.py", "retrieval": "Retrieval.py", "vqa": "VQA.py"}
# Settings that change no number: finished stages stay finished when one of them differs.
HARMLESS = ("data.num_workers", "data.cache_images", "train.log_every", "train.checkpoint_every")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs, rows, left_out = plan(args)
    if not runs:
        raise UserError("; ".join(left_out) or "no row is left to run")
    slots = make_slots(args.jobs, args.device)
    make_folder(args.output)
    with lock(args.output) as lock_file:
        write_rows(args, rows)
        for run in runs:
            check_same(run)
        for line in left_out:
            say(line)
        done = sum(stage.name in read_result(run.folder)["stages"] for run in runs for stage in run.stages)
        names = ", ".join(stage.name for stage in runs[0].stages)
        say(f"{len(runs)} runs of {names}, {len(slots)} side by side; {done} stages are done already")
        for line in batch_lines(runs[0].stages, slots):
            say(line)
        failed = run_all(runs, slots, Launcher(args.device, lock_file))
    if failed:  # everything else is done
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}; the same command tries them again")
    say(f"done; python tools/report.py {args.output} --format text shows the tables")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tables", nargs="+", choices=(*TABLES, "all"), metavar="TABLE", help="4, 5, 6, 7 or all")
    add("--base", default="configs/Pretrain.yaml", help="pre-training YAML that the rows change (default: %(default)s)")
    add("--output", type=Path, default=Path("output/ablation"), help="folder for all runs (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs per row (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    stages = [name for name in STAGES if name != "pretrain"]
    add("--stages", nargs="+", choices=stages, default=["retrieval", "vqa"], help="after pre-training (default: both)")
    add("--retrieval", help="YAML of retrieval (default: Retrieval.yaml or Retrieval_coco.yaml beside --base)")
    add("--vqa", help="YAML of question answering (default: VQA.yaml beside --base)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for name in ("override", "retrieval_override", "vqa_override"):
        add(f"--{name}", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    args.tables = list(TABLES) if "all" in args.tables else sorted(set(args.tables))
    args.stages = [name for name in STAGES if name in args.stages]
    return args


# ------------------------------------------------------------------------------------------------- what is to be run


@dataclass
class Stage:
    """One script's run: its name in STAGES, configuration file, overrides and the configuration that they give."""

    name: str
    config: str
    overrides: list[str]
    settings: dict  # dotted key -> value


@dataclass
class AblationRun:
    """A row with a seed: everything that happens in one folder, in order."""

    row: str
    seed: int
    folder: Path
    stages: list[Stage]
    notes: dict = field(default_factory=dict)  # for result.json

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"


def plan(args: argparse.Namespace) -> tuple[list[AblationRun], dict[str, str], list[str]]:
    """-> (the runs in order, {row: the row whose runs it shares}, lines about rows that cannot be run)."""
    base = settings.load_config(args.base, args.override, settings.PRETRAIN)
    depth = image_depth(base)
    rows, first, switches_of, left_out = {}, {}, {}, []
    for row in rows_of(args.tables):
        switches = switches_of[row] = row_switches(row, depth, base.mim.codebook)
        folder = switches.get("mim.codebook")
        if folder is not None and not any(Path(where, folder).expanduser().is_dir() for where in (".", ROOT)):
            left_out.append(
                f"{row}: left out, {folder} does not exist: name the dVAE's folder by --override mim.codebook=FOLDER"
            )
            continue
        rows[row] = first.setdefault(json.dumps(switches, sort_keys=True), row)
    seeds = range(base.seed, base.seed + args.seeds)
    runs = [make_run(args, row, switches_of[row], seed) for seed in seeds for row in dict.fromkeys(rows.values())]
    return runs, rows, left_out


def rows_of(tables: Sequence[str]) -> list[str]:
    """The rows' configurations (names of files in configs/ablation), the paper's model first, each once."""
    paper = json.loads((ROOT / "tools/paper_tables.json").read_text(encoding="utf-8"))["tables"]
    names = dict.fromkeys(row["config"] for number in tables for row in paper[number]["rows"])
    return sorted(names, key=lambda name: name != "semmim")


def row_switches(row: str, depth: int, codebook: str | None = None) -> dict:
    """{dotted key: value} that makes a row of a base whose image encoder has `depth` layers.

    codebook: the base's own folder of dVAE weights, which goes before the row file's.
    """
    values = read_settings(f"configs/ablation/{row}.yaml", (), "Pretrain.py")
    switches = {key: values[key] for key in SWITCHES}
    if switches["mim.inject_from"] is not None:
        switches["mim.inject_from"] = scaled_layer(switches["mim.inject_from"], depth)
    if switches["mim.target"] == "dvae":
        switches["mim.codebook"] = codebook or values["mim.codebook"]
    return switches


def scaled_layer(layer: int, depth: int) -> int:
    """The layer of `depth` that is as deep as `layer` of the paper's 12, rounded half up, at least 1."""
    return max(1, (2 * layer * depth + PAPER_DEPTH) // (2 * PAPER_DEPTH))


def image_depth(config) -> int:
    """Number of layers of a configuration's image encoder; built without memory for its weights."""
    import torch

    from models.vit import ImageEncoder

    encoder = config.model.image_encoder
    with torch.device("meta"):
        return ImageEncoder(encoder.name, encoder.image_size, dict(encoder.args)).depth


def make_run(args: argparse.Namespace, row: str, switches: dict, seed: int) -> AblationRun:
    overrides = [f"{key}={'none' if value is None else json.dumps(value)}" for key, value in switches.items()]
    stages = [make_stage("pretrain", args.base, [*args.override, *overrides])]
    for name in args.stages:
        script = STAGES[name]
        chosen, changes = {"VQA.py": (args.vqa, args.vqa_override)}.get(
            script, (args.retrieval, args.retrieval_override)
        )
        stages.append(make_stage(name, chosen or beside(args.base, script), changes))
    notes = {"row": row, "seed": seed, "base": str(args.base), "switches": switches}
    return AblationRun(row, seed, args.output / row / f"seed_{seed}", stages, notes)


def make_stage(name: str, config: str, overrides: list[str]) -> Stage:
    values = dict(read_settings(str(config), tuple(overrides), STAGES[name]))
    if values.get("mim.target") != "dvae":
        values.pop("mim.codebook", None)  # read by that target alone
    return Stage(name, str(config), list(overrides), values)


@functools.cache  # seeds and rows ask for the same files again and again
def read_settings(config: str, overrides: tuple[str, ...], script: str) -> dict:
    return flatten(settings.load_config(config, overrides, KINDS[script]))


def beside(base: str, script: str) -> str:
    """The configuration of a fine-tuning script that lies beside the base's, under one of the project's names."""
    names = {"Retrieval.py": ("Retrieval.yaml", "Retrieval_coco.yaml"), "VQA.py": ("VQA.yaml",)}[script]
    folder = find_file(base, "--base").parent
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    option = "--vqa" if script == "VQA.py" else "--retrieval"
    raise UserError(f"{option} is missing: {folder} holds no {' or '.join(names)}")


def flatten(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, without what changes no number and without the seed."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{name}.")
        elif name not in (*HARMLESS, "seed"):
            found[name] = value
    return found


# ---------------------------------------------------------------------------------------- what was done, and may go on


def read_result(folder: Path) -> dict:
    """result.json of a run's folder: its notes and {"stages": {name: {"settings", "seconds", "metrics"}}}."""
    path = folder / "result.json"
    if not path.is_file():
        return {"stages": {}}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable ({error}); remove it to run this row again") from None


def check_same(run: AblationRun) -> None:
    """Raise UserError where the folder holds stages of other settings: a table must not mix them."""
    for stage in run.stages:
        done = read_result(run.folder)["stages"].get(stage.name)
        if done is None:
            continue
        now = json.loads(json.dumps(stage.settings))
        for key in {**done["settings"], **now}:
            before, wanted = done["settings"].get(key), now.get(key)
            if before != wanted:
                raise UserError(
                    f"{run.folder / 'result.json'}: {stage.name} was run with {key} {before!r}, now it is {wanted!r}; "
                    "use another --output"
                )


def write_rows(args: argparse.Namespace, rows: dict[str, str]) -> None:
    """OUTPUT/rows.json: which folder serves each row, added to those of earlier calls."""
    path = args.output / "rows.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {"base": str(args.base), "rows": {**known.get("rows", {}), **rows}})


@contextlib.contextmanager
def lock(folder: Path):
    """While open, no other process can work in the folder; its stages hold it too, should this process be killed."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another tools/ablate.py, or a run that it started, works here") from None
        yield file


# ----------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Slot:
    """What one of the runs side by side may use: CPU cores, and GPUs where there are any."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()


def make_slots(jobs: int, device: str = "auto") -> list[Slot]:
    """The cores and GPUs that this process may use, divided among `jobs` runs as evenly as possible."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    gpus = [] if device == "cpu" else visible_gpus()
    scarce, what = (gpus, "GPUs") if gpus else (cores, "CPU cores")
    if jobs > len(scarce):
        raise UserError(f"--jobs {jobs}: there are only {len(scarce)} {what}; use at most as many runs side by side")
    return [Slot(*map(tuple, parts)) for parts in zip(divide(cores, jobs), divide(gpus, jobs), strict=True)]


def divide(items: Sequence, parts: int) -> list[list]:
    """Consecutive parts whose lengths differ by at most one."""
    edges = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in zip(edges, edges[1:], strict=False)]


def visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    return named.split(",")[: len(numbers)] if named else numbers


class Launcher:
    """Starts a stage as a process of its own session, so that only this program passes signals on."""

    def __init__(self, device: str, lock_file):
        self.device, self.lock_file = device, lock_file
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()
        self.guard = threading.Lock()

    def __call__(self, run: AblationRun, stage: Stage, slot: Slot) -> int:
        """Run a stage to its end; -> its exit code. Its console goes to SEED_FOLDER/STAGE.log."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(slot.cores)), "PYTHONUNBUFFERED": "1"}
        if slot.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        with open(run.folder / f"{stage.name}.log", "a", encoding="utf-8") as console:
            with self.guard:
                if self.stopping.is_set():
                    return 130
                process = subprocess.Popen(
                    command(run, stage, slot, self.device),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(self.lock_file.fileno(),),
                )
                self.running.add(process)
            if hasattr(os, "sched_setaffinity"):
                try:  # threads that it starts later stay on the same cores
                    os.sched_setaffinity(process.pid, slot.cores)
                except ProcessLookupError:  # it has ended already
                    pass
            code = process.wait()
            with self.guard:
                self.running.discard(process)
        return code

    def stop(self) -> None:
        """Ask all running stages to write their checkpoints and end; start no more."""
        self.stopping.set()
        with self.guard:
            for process in self.running:
                process.send_signal(signal.SIGTERM)


def command(run: AblationRun, stage: Stage, slot: Slot, device: str) -> list[str]:
    """The command line of a stage; it goes on from its own checkpoint where there is one."""
    output = run.folder / stage.name
    program = [sys.executable]
    if len(slot.gpus) > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(slot.gpus)}"]
    arguments = ["--config", stage.config, "--output_dir", str(output), "--seed", str(run.seed), "--device", device]
    if stage.name == "zeroshot":
        arguments += ["--evaluate"]
    elif (output / "checkpoint_last.pth").is_file():
        arguments += ["--resume"]
    if stage.name != "pretrain" and "--resume" not in arguments:
        arguments += ["--checkpoint", str(run.folder / "pretrain" / "checkpoint_last.pth")]
    overrides = ["--override", *stage.overrides] if stage.overrides else []
    return [*program, str(ROOT / STAGES[stage.name]), *arguments, *overrides]


def run_all(runs: list[AblationRun], slots: list[Slot], launch: Callable) -> list[str]:
    """Work on all runs, as many side by side as there are slots; -> a line per failed run.

    launch(run, stage, slot) -> exit code, and launch.stop() ends all that it runs. Raises KeyboardInterrupt after a
    signal, when everything has ended.
    """
    free: queue.Queue[Slot] = queue.Queue()
    for slot in slots:
        free.put(slot)
    done = Counter([stage.name for run in runs for stage in run.stages], len(slots))

    def work(run: AblationRun) -> str | None:
        slot = free.get()
        try:
            return run_stages(run, slot, launch, done)
        finally:
            free.put(slot)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    pool = ThreadPoolExecutor(len(slots))
    futures = [pool.submit(work, run) for run in runs]
    try:
        return [line for line in (future.result() for future in futures) if line]
    except KeyboardInterrupt:
        say("stopping: the runs write their checkpoints; the same command goes on from there")
        for future in futures:
            future.cancel()
        launch.stop()
        raise
    finally:
        pool.shutdown(wait=True)
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupt(_number, _frame) -> None:
    raise KeyboardInterrupt


def run_stages(run: AblationRun, slot: Slot, launch: Callable, done: Counter) -> str | None:
    """The unfinished stages of one run, each recorded in result.json as it ends; -> why it failed, or None."""
    result = {**run.notes, "stages": read_result(run.folder)["stages"]}
    for stage in run.stages:
        if stage.name in result["stages"]:
            done.count(stage.name)
            continue
        output = run.folder / stage.name
        if output.exists() and not (output / "checkpoint_last.pth").is_file():
            shutil.rmtree(output)  # ours, and interrupted before there was anything to go on from
        run.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        code = launch(run, stage, slot)
        seconds = round(time.monotonic() - start, 1)
        metrics = output / "metrics.json"
        if code or not metrics.is_file():
            return f"{run.name}: {stage.name} ended with {code} ({last_line(run.folder / f'{stage.name}.log')})"
        record = {"settings": stage.settings, "seconds": seconds, "metrics": json.loads(metrics.read_text())}
        result["stages"][stage.name] = record
        write_json(run.folder / "result.json", result)
        done.count(stage.name, seconds)
        say(f"{done} {run.name}: {stage.name} took {clock(seconds)} on {describe(slot)}; {done.left()} left")
    return None


class Counter:
    """Counts finished stages, and guesses the time left from those that this program saw."""

    def __init__(self, names: Sequence[str], slots: int):
        self.waiting, self.total, self.slots = collections.Counter(names), len(names), slots
        self.seconds: dict[str, list[float]] = {}
        self.guard = threading.Lock()

    def count(self, name: str, seconds: float | None = None) -> None:
        """A stage has ended, after so many seconds where it ran now."""
        with self.guard:
            self.waiting[name] -= 1
            if seconds is not None:
                self.seconds.setdefault(name, []).append(seconds)

    def left(self) -> str:
        """Mean seconds of each stage's kind x how many wait / runs side by side; kinds not seen yet are not counted."""
        means = {name: sum(seen) / len(seen) for name, seen in self.seconds.items()}
        known = sum(count * means[name] for name, count in self.waiting.items() if name in means)
        more = any(count and name not in means for name, count in self.waiting.items())
        return f"{'more than' if more else 'about'} {clock(known / self.slots)}"

    def __str__(self) -> str:
        return f"[{self.total - self.waiting.total()}/{self.total}]"


def global_batches(stages: Sequence[Stage], processes: int) -> dict[str, int]:
    """{stage: samples of an optimizer step}, without the zero-shot stage, which trains nothing."""
    return {
        stage.name: stage.settings["train.batch_size"] * stage.settings["train.accumulation"] * processes
        for stage in stages
        if stage.name != "zeroshot"
    }


def batch_lines(stages: Sequence[Stage], slots: Sequence[Slot]) -> list[str]:
    """A line for every number of processes that a run may get: rows trained with other batches compare nothing."""
    lines = []
    for processes in sorted({max(1, len(slot.gpus)) for slot in slots}):
        batches = global_batches(stages, processes)
        named = ", ".join(f"{name} {batch:,}" for name, batch in batches.items())
        lines.append(f"global batch with {processes} process{'es' if processes > 1 else ''} a run: {named}")
    return lines


def describe(slot: Slot) -> str:
    return f"{len(slot.gpus)} GPUs" if slot.gpus else f"{len(slot.cores)} cores"


def last_line(log: Path) -> str:
    """The last line of a console log, cut to a line's length."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"{lines[-1][:200]}; all of it in {log}" if lines else f"{log} is empty"


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    run_main(main)
