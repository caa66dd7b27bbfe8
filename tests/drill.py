"""Kills and stops real training runs and compares what they end with.

    python -m tests.drill kill --stage pretrain --ranks 3 --workers 2 --kills 20
    python -m tests.drill stop --signal USR1 --ranks 2 --workers 2
    python -m tests.drill fail --stage retrieval      every kind of error with 0, 1, 4 workers and 1, 2 ranks

`kill`: SIGKILL to the whole run, every other time within a checkpoint's write and else at a random moment, each time
started again with the same command (--resume), until it is done; every tensor of its last checkpoint must be
bit-identical to an undisturbed run's. `stop`: a stop signal to the process group; the run must end with exit code 130
and a checkpoint of the very step it was in. `fail`: an error; every process must end within seconds, with exit code 2.
tests/test_drill.py runs a short form of all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import ROOT

sys.path.insert(0, str(Path(__file__).parent))  # for `python -m tests.drill`

import stages  # noqa: E402
from conftest import free_port  # noqa: E402

FAILURES = ("key", "training image", "evaluation image", "loss", "disk")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": os.environ.get("PATH", "")}


@dataclass
class Setting:
    """What a run is started with."""

    stage: str = "pretrain"
    ranks: int = 1
    workers: int = 0
    epochs: int = 2
    checkpoint_every: int = 7


class Drill:
    """Runs in a folder, on demo scenes and from the checkpoint beside them (see `stages.make_demo`)."""

    def __init__(self, folder: Path, demo: Path | None = None):
        self.folder, self.demo = folder, demo or stages.make_demo(folder / "demo")

    def arguments(self, setting: Setting, out: Path, extra: Sequence[str] = ()) -> list[str]:
        """The arguments of first start and restart."""
        stage, config, flags = setting.stage, None, ["--resume"]
        settings = [f"train.epochs={setting.epochs}", f"data.num_workers={setting.workers}", "train.batch_size=6"]
        settings += ["train.log_every=5", f"train.checkpoint_every={setting.checkpoint_every}"]
        if stage == "pretrain":
            settings.append("itc.negatives=queue")
        else:
            flags += ["--checkpoint", self.demo / "model.pth"]
        if stage == "scst":
            stage, config = "caption", "configs/demo/Caption_scst.yaml"
            settings.append("scst.samples=2")
        return stages.arguments(stage, self.demo, out, *settings, *extra, flags=flags, config=config)

    def run_here(self, setting: Setting, out: Path, extra: Sequence[str] = ()) -> None:
        """A run in this process."""
        script(setting.stage).main(self.arguments(setting, out, extra))

    def command(self, setting: Setting, out: Path, extra: Sequence[str] = ()) -> list[str]:
        """A run in processes of its own, by torchrun if there are several."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setting.ranks}"]
        launcher = [*several, "--max-restarts=9"] if setting.ranks > 1 else []
        return [sys.executable, *launcher, script(setting.stage).__file__, *self.arguments(setting, out, extra)]

    def start(self, setting: Setting, out: Path, extra: Sequence[str] = ()) -> subprocess.Popen:
        """Start a run in a process group of its own; its output goes on at OUT.txt."""
        with open(f"{out}.txt", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                self.command(setting, out, extra),
                cwd=ROOT,
                env={**ENVIRONMENT, "PATH": "" if setting.stage in ("caption", "scst") else ENVIRONMENT["PATH"]},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def undisturbed(self, setting: Setting) -> Path:
        """The last checkpoint of a run that nobody disturbs."""
        out = self.folder / f"straight_{setting.stage}_{setting.ranks}_{setting.workers}_{setting.epochs}"
        if code := self.start(setting, out).wait():
            raise RuntimeError(f"{out}: exit code {code}: {Path(f'{out}.txt').read_text()[-2000:]}")
        return out / "checkpoint_last.pth"

    def kill(self, setting: Setting, kinds: Sequence[str], expected: Path) -> dict:
        """Kill a run once for each of the kinds and let it end; returns how often, and which tensors differ.

        kinds: all processes within a checkpoint's "write" or at any "moment" of the two seconds after the run took its
        folder, or one "rank", after which torchrun starts them again; expected: an undisturbed run's checkpoint.
        """
        out, rng = Path(tempfile.mkdtemp(prefix="killed_", dir=self.folder)) / "run", random.Random(0)
        lock, opened, process, kills = out / "run.lock", None, None, 0
        for kind in kinds:
            process = process or self.start(setting, out)
            wait_for(process, lambda opened=opened: lock.exists() and lock.read_text() != opened, seconds=240)
            if kind == "write":
                wait_for(process, lambda: any(out.glob("checkpoint_last.pth.tmp*")), seconds=240)
            else:
                time.sleep(rng.uniform(0, 2))
            if process.poll() is not None:  # it was quicker
                break
            opened, kills = lock.read_text(), kills + 1
            if kind == "rank":
                os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
            else:
                kill_session(process)
                process.wait()
                process = None
        if code := (process or self.start(setting, out)).wait():
            raise RuntimeError(f"exit code {code}: {Path(f'{out}.txt').read_text()[-2000:]}")
        different = differing(expected, out / "checkpoint_last.pth")
        leftovers = sorted(path.name for path in out.iterdir() if ".tmp" in path.name)
        return {"kills": kills, "different": different, "leftovers": leftovers}

    def stop(self, setting: Setting, number: signal.Signals) -> dict:
        """Stop a run by a signal in its third step or later.

        Returns the exit code, the seconds until all processes had ended, the last steps that were logged before the
        signal and at all, and the saved step.
        """
        out = Path(tempfile.mkdtemp(prefix="stopped_", dir=self.folder)) / "run"
        process = self.start(setting, out, ["train.log_every=1", "train.checkpoint_every=0"])
        wait_for(process, lambda: logged_step(out) >= 3, seconds=240)
        before, processes, start = logged_step(out), [process.pid, *descendants(process.pid)], time.monotonic()
        os.killpg(process.pid, number)
        code = process.wait(timeout=600)
        ended(processes, seconds=30)  # a killed torchrun ends before its processes do
        seconds = round(time.monotonic() - start, 1)
        steps = {"before": before, "last": logged_step(out), "saved": last_step(out)}
        return {"code": code, "seconds": seconds, **steps, "out": str(out)}

    def start_alone(self, setting: Setting, out: Path, extra: Sequence[str] = (), **options) -> tuple[list, list]:
        """Start the ranks of a run without torchrun, which ends all of them when one fails; -> (logs, processes)"""
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = self.command(dataclasses.replace(setting, ranks=1), out, extra)
        logs, ranks = [Path(f"{out}_{rank}.txt") for rank in range(setting.ranks)], []
        for rank, path in enumerate(logs):
            group |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setting.ranks)}
            environment = ENVIRONMENT | (group if setting.ranks > 1 else {})
            with open(path, "w", encoding="utf-8") as log:
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, **options))
        return logs, ranks

    def fail(self, setting: Setting, kind: str) -> dict:
        """Make a run fail; returns its ranks' exit codes, the seconds from the first error line until all processes
        have ended, how many have not after 60, and the line. Without torchrun, which would end the other ranks itself.
        """
        out = Path(tempfile.mkdtemp(prefix="failed_", dir=self.folder)) / "run"
        extra, limit = ["train.log_every=1"], None
        if kind == "key":
            extra.append("train.no_such_key=1")
        elif kind == "loss":
            extra += ["train.lr=1e30", "train.lr_vit=1e30", "train.warmup_steps=0", "train.clip_grad=0"]
        elif kind == "disk":  # a file of at most 300 KB: less than a checkpoint, more than a batch in shared memory
            limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300_000, 300_000))
        else:
            split = "train" if kind == "training image" else "test"
            extra.append(f"data.{split}=[{self.without_images(setting, split)}]")
            extra += ["eval.batch_size=1", "--evaluate"] if split == "test" else []
        logs, ranks = self.start_alone(dataclasses.replace(setting, epochs=100), out, extra, preexec_fn=limit)
        wait_for(ranks[0], lambda: any("error" in log.read_text() for log in logs), seconds=240)
        start = time.monotonic()
        processes = [pid for rank in ranks for pid in (rank.pid, *descendants(rank.pid))]
        alive = ended(processes, seconds=60)
        seconds = round(time.monotonic() - start, 1)
        for rank in ranks:
            kill_session(rank)
        codes = [rank.wait() for rank in ranks]
        line = next(line for log in logs for line in log.read_text().splitlines() if "error" in line)
        return {"codes": codes, "seconds": seconds, "alive": alive, "line": line}

    def without_images(self, setting: Setting, split: str) -> Path:
        """The stage's list of a split in which every other image is missing, in all its entries."""
        name = {"pretrain": "pretrain", "scst": f"caption_{split}"}.get(setting.stage, f"{setting.stage}_{split}")
        entries = json.loads((self.demo / f"data/{name}.json").read_text())
        missing = set(sorted({entry["image"] for entry in entries})[::2])
        for entry in entries:
            entry["image"] = f"missing_{entry['image']}" if entry["image"] in missing else entry["image"]
        path = self.demo / f"data/{name}_without_images.json"
        path.write_text(json.dumps(entries))
        return path


def script(stage: str):
    """The module of a stage's script."""
    return sys.modules[stages.STAGES[stage.replace("scst", "caption")][0].__module__]


def wait_for(process: subprocess.Popen, condition, seconds: float) -> None:
    """Wait until `condition()` or the process has ended; RuntimeError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            kill_session(process)
            raise RuntimeError(f"waited {seconds} s in vain for a run: {process.args}")
        time.sleep(0.003)


def kill_session(process: subprocess.Popen) -> None:
    """SIGKILL to all descendants of a run; torchrun's processes have sessions of their own."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """The processes below `pid`."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    try:
        tasks = [task.joinpath("children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has just ended
        return []
    return [int(child) for text in tasks for child in text.split()]


def ended(pids: list[int], seconds: float) -> int:
    """Wait until the processes have ended; how many have not after so many seconds."""
    deadline = time.monotonic() + seconds
    while alive := sum(map(runs, pids)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return alive


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def last_step(out: Path) -> int:
    """The step of checkpoint_last.pth, 0 where there is none."""
    path = out / "checkpoint_last.pth"
    if not path.exists():
        return 0
    return torch.load(path, map_location="meta", weights_only=True)["progress"]["step"]


def logged_step(out: Path) -> int:
    """The last training step in log.jsonl."""
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}") and '"split": "train"' in line]
    return max(steps, default=0)


def differing(expected, found, name: str = "") -> list[str]:
    """The entries of two checkpoints, files or what is in them, that are not bit-identical."""
    if isinstance(expected, Path):
        expected, found = (torch.load(path, weights_only=True) for path in (expected, found))
    if isinstance(expected, list | tuple):
        expected, found = dict(enumerate(expected)), dict(enumerate(found))
    if isinstance(expected, dict) and expected.keys() == found.keys():
        return [entry for key in expected for entry in differing(expected[key], found[key], f"{name}.{key}")]
    if isinstance(expected, torch.Tensor) and expected.shape == found.shape:
        return [] if expected.numpy().tobytes() == found.numpy().tobytes() else [name]
    return [] if type(expected) is type(found) and expected == found else [name]


def trials(drill: Drill, args: argparse.Namespace) -> Iterator[tuple[Setting, dict, bool]]:
    """(setting, result, whether it is as it must be) of what was asked for; `fail` tries ranks and workers itself."""
    setting = Setting(args.stage, args.ranks, args.workers, args.epochs)
    if args.what == "kill":
        result = drill.kill(setting, (["moment", "write"] * args.kills)[: args.kills], drill.undisturbed(setting))
        yield setting, result, not result["different"] and not result["leftovers"]
    elif args.what == "stop":
        result = drill.stop(setting, getattr(signal, f"SIG{args.signal}"))
        yield setting, result, result["before"] <= result["last"] == result["saved"] and result["code"] != 0
    else:
        kinds = [kind for kind in FAILURES if (args.stage, kind) != ("pretrain", "evaluation image")]
        for kind, ranks, workers in itertools.product(kinds, (1, 2), (0, 1, 4)):
            result = {"kind": kind, **drill.fail(setting := Setting(args.stage, ranks, workers), kind)}
            yield setting, result, result["codes"] == [2] * ranks and not result["alive"] and result["seconds"] < 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "stop", "fail"))
    parser.add_argument("--stage", choices=(*stages.STAGES, "scst"), default="pretrain")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=50, help="of 4 / ranks steps each")
    parser.add_argument("--signal", default="TERM")
    parser.add_argument("--folder", type=Path, help="keep data and runs here")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="drill_"))
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for setting, result, passed in trials(Drill(folder), args):
        failed += not passed
        print("ok " if passed else "BAD", args.what, vars(setting), result, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
