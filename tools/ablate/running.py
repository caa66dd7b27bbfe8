"""A study's runs, and how tools.ablate works on them: some side by side, each with its share of cores and GPUs."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.files import read_json
from engine.config import differences
from engine.distributed import stop_signals
from utils import ROOT, Config, UserError, clock, make_folder, one_line, stop_requests, write_json

STAGES = {"pretrain": "Pretrain.py", "zeroshot": "Retrieval.py", "retrieval": "Retrieval.py", "vqa": "VQA.py"}
# Settings that change no number: finished stages stay finished when one of them differs.
HARMLESS = (
    "data.num_workers",
    "data.cache_images",
    "train.log_every",
    "train.checkpoint_every",
    "seed",
    "mim.codebook",
)
Gpus = list[str]


@dataclass
class Stage:
    """One script's run: its name in STAGES, configuration file, overrides and the configuration that they give."""

    name: str
    config: str
    overrides: list[str]
    settings: Config


@dataclass
class AblationRun:
    """A row with a seed: everything that happens in one folder, in order."""

    row: str
    seed: int
    folder: Path
    stages: list[Stage]


def divide_gpus(jobs: int, device: str) -> list[Gpus]:
    """The GPUs (none on a CPU) of each of `jobs` runs side by side.

    Each gets equally many: rows that are trained with other global batches cannot be compared.
    """
    count = 0 if device == "cpu" else torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(count)]
    if 0 < count < jobs:
        raise UserError(f"--jobs {jobs}: there are only {count} GPUs; use at most as many runs side by side")
    share = count // jobs
    return [gpus[job * share : (job + 1) * share] for job in range(jobs)]


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
    free: queue.SimpleQueue[Gpus] = queue.SimpleQueue()
    for gpus in slots:
        free.put(gpus)

    def work(run: AblationRun) -> str | None:
        gpus = free.get()
        try:
            return run_stages(run, gpus, max(1, torch.get_num_threads() // len(slots)), device)
        except UserError as error:  # the other runs go on
            return f"{run.folder}: {one_line(error)}"
        finally:
            free.put(gpus)

    with stop_signals(), ThreadPoolExecutor(len(slots)) as pool:
        return [line for line in pool.map(work, runs) if line]


def run_stages(run: AblationRun, gpus: Gpus, threads: int, device: str) -> str | None:
    """Run what is unfinished, each stage recorded in result.json as it ends; -> a line if one fails. After a stop
    signal the running stage writes its checkpoint and ends, and no other begins."""
    finished = read_stages(run)
    for stage in run.stages:
        if stage.name in finished:
            continue
        if stop_requests:
            return None
        start = time.monotonic()
        code = wait_for(start_stage(run, stage, gpus, threads, device))
        metrics = run.folder / stage.name / "metrics.json"
        if code or not metrics.is_file():
            lines = (run.folder / f"{stage.name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((one_line(line) for line in reversed(lines) if line.strip()), "")
            return f"{run.folder}: {stage.name} ended with {code} ({last}; more in {stage.name}.log)"
        seconds = round(time.monotonic() - start, 1)
        finished[stage.name] = {"settings": stage.settings, "seconds": seconds, "metrics": read_json(metrics)}
        write_json(run.folder / "result.json", {"row": run.row, "seed": run.seed, "stages": finished})
        say(f"{run.folder}: {stage.name} took {clock(seconds)}")
    return None


def wait_for(process: subprocess.Popen) -> int:
    """Its exit code; a stop signal is passed on."""
    while process.poll() is None and not stop_requests:
        time.sleep(0.2)
    if process.poll() is None:
        process.terminate()
    return process.wait()


def start_stage(run: AblationRun, stage: Stage, gpus: Gpus, threads: int, device: str) -> subprocess.Popen:
    """A stage's process, of a session of its own, so that only this program passes signals on.

    Its console goes to SEED_FOLDER/STAGE.log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with open(make_folder(run.folder) / f"{stage.name}.log", "a", encoding="utf-8") as console:
        words = command(run, stage, len(gpus), device)
        options = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
        return subprocess.Popen(words, stdout=console, stderr=subprocess.STDOUT, **options)


def command(run: AblationRun, stage: Stage, gpus: int, device: str) -> list[str]:
    """The command line of a stage, which resumes if its folder holds a checkpoint and otherwise starts."""
    program, output = [sys.executable], run.folder / stage.name
    if gpus > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    arguments = ["--config", stage.config, "--output_dir", str(output), "--seed", str(run.seed), "--device", device]
    arguments += ["--evaluate" if stage.name == "zeroshot" else "--resume"]
    if stage.name != "pretrain":
        arguments += ["--checkpoint", str(run.folder / "pretrain" / "checkpoint_last.pth")]
    return [*program, str(ROOT / STAGES[stage.name]), *arguments, "--override", *stage.overrides]


def say(*lines: str) -> None:
    for line in lines:
        print(time.strftime("%H:%M:%S"), line, flush=True)
