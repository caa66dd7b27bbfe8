"""How tools.ablate runs its stages: side by side, each on its own cores and GPUs; a second call resumes them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.files import read_json
from engine.distributed import stop_signals
from tools.ablate.plan import STAGES, AblationRun, Stage
from utils import ROOT, UserError, clock, one_line, write_json


@dataclass(frozen=True)
class Slot:
    """What one of the runs side by side may use: CPU cores, and GPUs if there are any."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()


def make_slots(jobs: int, device: str = "auto") -> list[Slot]:
    """The cores and GPUs that this process may use, divided among `jobs` runs.

    Each gets equally many GPUs: rows that are trained with other global batches cannot be compared.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    gpus = [] if device == "cpu" else visible_gpus()
    scarce, what = (gpus, "GPUs") if gpus else (cores, "CPU cores")
    if jobs > len(scarce):
        raise UserError(f"--jobs {jobs}: there are only {len(scarce)} {what}; use at most as many runs side by side")
    gpus = gpus[: len(gpus) // jobs * jobs]
    return [Slot(*map(tuple, parts)) for parts in zip(divide(cores, jobs), divide(gpus, jobs), strict=True)]


def divide(items: Sequence, parts: int) -> list[list]:
    """Consecutive parts whose lengths differ by at most one."""
    edges = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in zip(edges, edges[1:], strict=False)]


def visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    return named.split(",")[: len(numbers)] if named else numbers


# ------------------------------------------------------------------------------------------------ finished stages


def read_stages(run: AblationRun) -> dict[str, dict]:
    """{stage: its settings, seconds and metrics} of the finished stages, as result.json keeps them."""
    path = run.folder / "result.json"
    return read_json(path)["stages"] if path.is_file() else {}


def check_same(run: AblationRun) -> int:
    """How many of a run's stages are done; UserError if with other settings: a table must not mix them."""
    finished = read_stages(run)
    for stage in (stage for stage in run.stages if stage.name in finished):
        before, now = finished[stage.name]["settings"], json.loads(json.dumps(stage.settings))
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{run.folder / 'result.json'}: {stage.name} was run with {key} {before.get(key)!r}, "
                    f"now it is {now.get(key)!r}; use another --output"
                )
    return sum(stage.name in finished for stage in run.stages)


# ------------------------------------------------------------------------------------------------------- running


class Launcher:
    """Starts a stage as a process of its own session, so that only this program passes signals on."""

    def __init__(self, device: str):
        self.device = device
        self.running: set[subprocess.Popen] = set()
        self.stopping = False
        self.guard = threading.Lock()

    def __call__(self, run: AblationRun, stage: Stage, slot: Slot) -> int:
        """Run a stage to its end; -> its exit code. Its console goes to SEED_FOLDER/STAGE.log."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(slot.cores)), "PYTHONUNBUFFERED": "1"}
        if slot.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        with open(run.folder / f"{stage.name}.log", "a", encoding="utf-8") as console:
            with self.guard:
                if self.stopping:
                    return 130
                process = subprocess.Popen(
                    command(run, stage, slot, self.device),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
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
        with self.guard:
            self.stopping = True
            for process in self.running:
                process.send_signal(signal.SIGTERM)


def command(run: AblationRun, stage: Stage, slot: Slot, device: str) -> list[str]:
    """The command line of a stage, which resumes if its folder holds a checkpoint and otherwise starts."""
    program, output = [sys.executable], run.folder / stage.name
    if len(slot.gpus) > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(slot.gpus)}"]
    arguments = ["--config", stage.config, "--output_dir", str(output), "--seed", str(run.seed), "--device", device]
    arguments += ["--evaluate" if stage.name == "zeroshot" else "--resume"]
    if stage.name != "pretrain":
        arguments += ["--checkpoint", str(run.folder / "pretrain" / "checkpoint_last.pth")]
    overrides = ["--override", *stage.overrides] if stage.overrides else []
    return [*program, str(ROOT / STAGES[stage.name]), *arguments, *overrides]


def run_all(runs: list[AblationRun], slots: list[Slot], launch: Callable) -> list[str]:
    """Work on all runs, as many side by side as there are slots; -> a line per failed run.

    launch(run, stage, slot) -> exit code, and launch.stop() ends all that it runs, now and later. Raises utils.Stopped
    after a stop signal, when everything has ended.
    """
    free: queue.Queue[Slot] = queue.Queue()
    for slot in slots:
        free.put(slot)

    def work(run: AblationRun) -> str | None:
        slot = free.get()
        try:
            return run_stages(run, slot, launch)
        except BrokenPipeError:  # whoever read this program's lines has gone
            raise
        except (UserError, OSError) as error:  # the other rows go on
            return f"{run.name}: {one_line(error)}"
        finally:
            free.put(slot)

    with stop_signals() as stopping:
        pool = ThreadPoolExecutor(len(slots))
        try:
            futures = [pool.submit(work, run) for run in runs]
            while wait(futures, timeout=0.2).not_done and not stopping():
                for future in futures:
                    if future.done():
                        future.result()  # an error that ends all
            if stopping():
                say("stopping: the runs write their checkpoints; the same command resumes them")
        finally:
            launch.stop()
            pool.shutdown(wait=True, cancel_futures=True)
        return [line for future in futures if not future.cancelled() and (line := future.result())]


def run_stages(run: AblationRun, slot: Slot, launch: Callable) -> str | None:
    """The unfinished stages of one run, each recorded in result.json as it ends; -> why it failed, or None."""
    result = {**run.notes, "stages": read_stages(run)}
    for stage in (stage for stage in run.stages if stage.name not in result["stages"]):
        run.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        code = launch(run, stage, slot)
        seconds = round(time.monotonic() - start, 1)
        metrics = run.folder / stage.name / "metrics.json"
        if code or not metrics.is_file():
            return f"{run.name}: {stage.name} ended with {code} ({last_line(run.folder / f'{stage.name}.log')})"
        record = {"settings": stage.settings, "seconds": seconds, "metrics": json.loads(metrics.read_text())}
        result["stages"][stage.name] = record
        write_json(run.folder / "result.json", result)
        where = f"{len(slot.gpus)} GPUs" if slot.gpus else f"{len(slot.cores)} cores"
        say(f"{run.name}: {stage.name} took {clock(seconds)} on {where}")
    return None


def last_line(log: Path) -> str:
    """The last line of a console log, cut to a line's length."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"{one_line(lines[-1])}; all of it in {log}" if lines else f"{log} is empty"


def say(*lines: str) -> None:
    for line in lines:
        print(time.strftime("%H:%M:%S"), line, flush=True)
