"""How tools.ablate runs its stages: some side by side, each with its share of cores and GPUs; a second call resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dataset.files import read_json
from engine.config import differences
from engine.distributed import stop_signals
from tools.ablate.plan import STAGES, AblationRun, Stage
from utils import ROOT, UserError, clock, make_folder, one_line, write_json

# Settings that change no number: finished stages stay finished when one of them differs.
HARMLESS = ("data.num_workers", "data.cache_images", "train.log_every", "train.checkpoint_every", "seed")
Gpus = tuple[str, ...]


def divide_gpus(jobs: int, device: str) -> list[Gpus]:
    """The GPUs (none on a CPU) of each of `jobs` runs side by side.

    Each gets equally many: rows that are trained with other global batches cannot be compared.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = 0 if device == "cpu" else torch.cuda.device_count()
    gpus = named.split(",")[:count] if named else [str(number) for number in range(count)]
    most, what = (count, "GPUs") if gpus else (cores(), "CPU cores")
    if jobs > most:
        raise UserError(f"--jobs {jobs}: there are only {most} {what}; use at most as many runs side by side")
    share = count // jobs
    return [tuple(gpus[job * share : (job + 1) * share]) for job in range(jobs)]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_stages(run: AblationRun) -> dict[str, dict]:
    """{stage: its settings, seconds and metrics} of the finished stages, as result.json keeps them.

    UserError if one was run with other settings: a table must not mix them.
    """
    path = run.folder / "result.json"
    finished = read_json(path)["stages"] if path.is_file() else {}
    for stage in (stage for stage in run.stages if stage.name in finished):
        now = json.loads(json.dumps(stage.settings))
        for key, (before, value) in differences(finished[stage.name]["settings"], now).items():
            if key not in HARMLESS:
                raise UserError(
                    f"{path}: {stage.name} was run with {key} {before!r}, now it is {value!r}; use another --output"
                )
    return finished


def run_all(runs: Sequence[AblationRun], slots: Sequence[Gpus], device: str) -> list[str]:
    """Work on all runs, as many side by side as there are slots; -> a line per failed run.

    Raises utils.Stopped after a stop signal, when the running stages have written their checkpoints and ended.
    """
    waiting, failed = list(runs), []
    workers = [work(waiting, failed, gpus, max(1, cores() // len(slots)), device) for gpus in slots]
    processes: dict[int, subprocess.Popen | None] = {}
    with stop_signals() as stopping:
        try:
            while not stopping():
                for number, worker in enumerate(workers):
                    processes[number] = next(worker, None)  # None: nothing is left to start
                if not any(processes.values()):
                    return failed
                time.sleep(0.2)
            say("stopping: the runs write their checkpoints; the same command resumes them")
        finally:
            for process in filter(None, processes.values()):
                process.terminate()
            for process in filter(None, processes.values()):
                process.wait()


def work(
    waiting: list[AblationRun], failed: list[str], gpus: Gpus, threads: int, device: str
) -> Iterator[subprocess.Popen]:
    """Take runs from `waiting` and start their unfinished stages one after another; gives a stage's process as long as
    it runs. Each stage is recorded in result.json as it ends; a run that fails leaves a line in `failed`, and there."""
    while waiting:
        run = waiting.pop(0)
        notes = {"row": run.row, "seed": run.seed, "switches": run.switches}
        try:
            make_folder(run.folder)
            finished = read_stages(run)
        except UserError as error:  # the other rows go on
            failed.append(f"{run.name}: {one_line(error)}")
            continue
        for stage in (stage for stage in run.stages if stage.name not in finished):
            start = time.monotonic()
            process = start_stage(run, stage, gpus, threads, device)
            while process.poll() is None:
                yield process
            seconds, metrics = round(time.monotonic() - start, 1), run.folder / stage.name / "metrics.json"
            if process.returncode or not metrics.is_file():
                why = f"{stage.name} ended with {process.returncode} ({last_line(run.folder / f'{stage.name}.log')})"
                failed.append(f"{run.name}: {why}")
                unfinished = [stage.name for stage in run.stages if stage.name not in finished]
                reasons = dict.fromkeys(unfinished, f"failed: {why}")  # which tools.report shows
                write_json(run.folder / "result.json", {**notes, "stages": finished, "failed": reasons})
                break
            finished[stage.name] = {"settings": stage.settings, "seconds": seconds, "metrics": read_json(metrics)}
            write_json(run.folder / "result.json", {**notes, "stages": finished})
            where = f"{len(gpus)} GPUs" if gpus else f"{threads} cores"
            say(f"{run.name}: {stage.name} took {clock(seconds)} on {where}")


def start_stage(run: AblationRun, stage: Stage, gpus: Gpus, threads: int, device: str) -> subprocess.Popen:
    """A stage's process, of a session of its own, so that only this program passes signals on.

    Its console goes to SEED_FOLDER/STAGE.log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with open(run.folder / f"{stage.name}.log", "a", encoding="utf-8") as console:
        return subprocess.Popen(
            command(run, stage, len(gpus), device),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def command(run: AblationRun, stage: Stage, gpus: int, device: str) -> list[str]:
    """The command line of a stage, which resumes if its folder holds a checkpoint and otherwise starts."""
    program, output = [sys.executable], run.folder / stage.name
    if gpus > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    arguments = ["--config", stage.config, "--output_dir", str(output), "--seed", str(run.seed), "--device", device]
    arguments += ["--evaluate" if stage.name == "zeroshot" else "--resume"]
    if stage.name != "pretrain":
        arguments += ["--checkpoint", str(run.folder / "pretrain" / "checkpoint_last.pth")]
    overrides = ["--override", *stage.overrides] if stage.overrides else []
    return [*program, str(ROOT / STAGES[stage.name]), *arguments, *overrides]


def last_line(log: Path) -> str:
    """The last line of a console log, cut to a line's length."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{one_line(lines[-1])}; all of it in {log}" if lines else f"{log} is empty"


def say(*lines: str) -> None:
    for line in lines:
        print(time.strftime("%H:%M:%S"), line, flush=True)
