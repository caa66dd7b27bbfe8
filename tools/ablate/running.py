"""How tools/ablate runs its stages: side by side, each on its own cores and GPUs, to be stopped and gone on with."""

from __future__ import annotations

import collections
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

from engine.distributed import stop_signals
from tools.ablate.plan import STAGES, AblationRun, Stage
from tools.ablate.results import read_result
from utils import ROOT, UserError, clock, one_line, write_json


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
    """The command line of a stage, which resumes if its folder holds a checkpoint and otherwise starts."""
    output = run.folder / stage.name
    program = [sys.executable]
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
    done = Counter([stage.name for run in runs for stage in run.stages], len(slots))

    def work(run: AblationRun) -> str | None:
        slot = free.get()
        try:
            return run_stages(run, slot, launch, done)
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


def run_stages(run: AblationRun, slot: Slot, launch: Callable, done: Counter) -> str | None:
    """The unfinished stages of one run, each recorded in result.json as it ends; -> why it failed, or None."""
    result = {**run.notes, "stages": read_result(run.folder)["stages"]}
    for stage in run.stages:
        if stage.name in result["stages"]:
            done.count(stage.name)
            continue
        output = run.folder / stage.name
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


def describe(slot: Slot) -> str:
    return f"{len(slot.gpus)} GPUs" if slot.gpus else f"{len(slot.cores)} cores"


def last_line(log: Path) -> str:
    """The last line of a console log, cut to a line's length."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"{lines[-1][:200]}; all of it in {log}" if lines else f"{log} is empty"


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)
