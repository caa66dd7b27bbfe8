"""A run's checkpoints: the last ones, the best one, and what `--resume` goes on from."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from engine.config import Config, Stage, differences, gives
from models.weights import load_exactly
from utils import (
    UserError,
    barrier,
    gather_objects,
    is_main,
    load_checkpoint,
    logger,
    on_main,
    one_line,
    save_checkpoint,
    unwrap,
    world_size,
)

LAST, BEST, DIVERGED = "checkpoint_last.pth", "checkpoint_best.pth", "checkpoint_diverged.pth"
UNFINISHED = "checkpoint_new.pth"  # a checkpoint before it takes its place as the last one
ENTRIES = ("model", "optimizer", "progress", "rng", "config")  # of a checkpoint that can be resumed


class LastCheckpoints:
    """checkpoint_last.pth and, counted backwards, the `keep - 1` before it: checkpoint_last_1.pth, ...

    The files are complete at any moment: a new one is written beside the others and takes its place by renaming.
    Methods are called in the main process alone.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, checkpoint: dict) -> None:
        """Write a checkpoint as the last one; the oldest of `keep` goes."""
        save_checkpoint(self.folder / UNFINISHED, checkpoint)
        for number in range(self.keep - 1, 1, -1):
            if (newer := last_path(self.folder, number - 1)).exists():
                os.replace(newer, last_path(self.folder, number))
        last = last_path(self.folder)
        if self.keep > 1 and last.exists():
            with contextlib.suppress(OSError):  # a file system without links: the last one is simply replaced
                last_path(self.folder, 1).unlink(missing_ok=True)
                os.link(last, last_path(self.folder, 1))
        os.replace(self.folder / UNFINISHED, last)
        for path in last_paths(self.folder)[self.keep :]:  # of a run that kept more
            path.unlink()

    def withdraw(self, step: int, steps_per_epoch: int) -> str | None:
        """Put the last checkpoint aside if it is of `step` or later and there is one before it; returns a line.

        Called when the loss that the weights of `step` gave shows that training had diverged by then.
        steps_per_epoch: of the run; a checkpoint that another number of processes wrote may count otherwise.
        """
        steps = [(path, _step_of(path, steps_per_epoch)) for path in last_paths(self.folder)]
        earlier = [at for _, at in steps if at is not None and at < step]
        if not earlier or steps[0][1] is None or steps[0][1] < step:
            return None
        os.replace(steps[0][0], self.folder / DIVERGED)
        for path, at in steps[1:]:  # between them and the one to go on from, where there are more
            if at is None or at >= step:
                path.unlink()
        _close_ranks(self.folder)
        return f"{LAST} is the one of step {earlier[0]} again; that of step {steps[0][1]} is {DIVERGED} now"


def _step_of(path: Path, steps_per_epoch: int) -> int | None:
    """The step of a checkpoint, None where it cannot be read."""
    try:
        return step_at(torch.load(path, map_location="meta", weights_only=True)["progress"], steps_per_epoch)
    except Exception:  # damaged in any way: zipfile, pickle and torch have errors of their own
        return None


def step_at(progress: dict, steps_per_epoch: int) -> int:
    """The step at the same place in the data as `progress`, where an epoch has `steps_per_epoch` steps."""
    before, epoch = progress["steps_per_epoch"], progress["epoch"]
    return epoch * steps_per_epoch + round((progress["step"] - epoch * before) * steps_per_epoch / max(1, before))


def last_path(folder: Path, number: int = 0) -> Path:
    """Where the last checkpoint is kept, or the `number`-th before it."""
    return folder / (f"checkpoint_last_{number}.pth" if number else LAST)


def last_paths(folder: Path) -> list[Path]:
    """The last checkpoints that exist, the newest first."""
    found = [(0, folder / LAST)] if (folder / LAST).exists() else []
    for path in folder.glob("checkpoint_last_*.pth"):
        if (number := path.stem.rsplit("_", 1)[1]).isdigit():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def _close_ranks(folder: Path) -> None:
    """Number the last checkpoints without a gap, so that the newest is checkpoint_last.pth."""
    for number, path in enumerate(last_paths(folder)):
        os.replace(path, last_path(folder, number))


class BestCheckpoint:
    """checkpoint_best.pth: the weights of the epoch with the highest validation score.

    score: its name; notes: further entries of the file; resume_from: the checkpoint that a run continues.
    """

    def __init__(self, folder: Path, score: str, notes: dict, resume_from: dict | None = None):
        self.score, self.notes = score, notes
        self.path = folder / BEST
        self.best = dict((resume_from or {}).get("best", {}))
        if self.best and (problem := self._unreadable()):
            logger.info("warning: %s; the best epoch is chosen among those to come", problem)
            self.best = {}

    def _unreadable(self) -> str | None:
        try:
            load_checkpoint(self.path)
        except UserError as error:
            return f"the best epoch so far ({self.best.get('epoch')}) is lost: {error}"
        return None

    def offer(self, model: torch.nn.Module, found: dict, step: int, epoch: int) -> None:
        """Keep the model of `epoch` (from 1) if its score is the best so far; called in all processes.

        found: the score, and what else the file's entry `best` says of that epoch.
        """
        if found[self.score] > self.best.get(self.score, -math.inf):
            self.best = {**found, "epoch": epoch}
            if is_main():
                state = {"model": unwrap(model).state_dict(), "progress": {"step": step}, **self.state()}
                save_checkpoint(self.path, state)
            barrier()  # no process reads the file before it is written

    def state(self) -> dict:
        """`extra_state` of `fit`."""
        return {**self.notes, "best": dict(self.best)}

    def restore(self, model: torch.nn.Module) -> None:
        """Put the best epoch's weights into the model, which keeps its own where none was offered."""
        if self.best:
            found = f"best epoch {self.best['epoch']}: {self.score} {self.best[self.score]:.2f} on val"
            logger.info("%s; %s", found, self.path)
            load_exactly(model, load_checkpoint(self.path)["model"], self.path, "take the run's own configuration")


# -------------------------------------------------------------------------------------------------------- resuming

LOCK, MARK = "run.lock", "SemMIM run: "  # a run's lock file, and how it begins


def check_folder(folder: Path, used: bool) -> None:
    """Raise UserError if a run may not write into a folder; touches nothing.

    A folder that is not empty must have the lock file of a run of this project, and unless `used` nothing else.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    path = folder / LOCK
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    new = names == [LOCK] and text == ""  # of a run that was killed before it could write its mark
    if names and not new and (text is None or not text.startswith(MARK)):
        raise UserError(
            f"--output_dir {folder}: it holds {one_line(names[0])} and no run's {LOCK}: no run wrote it, so none "
            "touches it; name a new or an empty folder"
        )
    if not used and names and names != [LOCK]:
        raise UserError(
            f"--output_dir {folder}: it holds an earlier run; add --resume to continue it, or name another folder"
        )


@dataclasses.dataclass
class Found:
    """The last checkpoints that a start found in a folder which is not its own yet.

    written: when each file was written, in ns; damaged: those to put aside; step: of the one to go on from, -1 if there
    is none.
    """

    written: dict[Path, int]
    damaged: list[Path] = dataclasses.field(default_factory=list)
    step: int = -1

    def put_damaged_aside(self, folder: Path) -> None:
        """Rename the damaged files to *_damaged.pth, now that the folder is locked, and close the ranks.

        Raises UserError where the files are no longer those that were read.
        """
        if self.written != _written(folder):
            raise UserError(f"--output_dir {folder}: another run has written checkpoints just now; start again")
        for path in self.damaged:
            os.replace(path, path.with_name(f"{path.stem}_damaged.pth"))
        if self.damaged:
            _close_ranks(folder)


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in last_paths(folder)}


def begin(args: argparse.Namespace, cfg: Config, stage: Stage) -> tuple[dict | None, Found | None, list[str]]:
    """What --resume and --seed ask for: (the checkpoint to go on from or None, what --resume found, lines to log).

    --resume goes on where there is something to go on from, and else begins, so that one command line serves the
    first start and every restart. A resumed run keeps its seed, which is put into `cfg` here; only keys in
    `stage.may_change` may differ from the checkpoint's configuration. Evaluation resumes nothing.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and not args.resume:
        raise UserError("torchrun restarted this run, which would begin from nothing: add --resume to its command")
    if cfg.train.get("tracker") == "wandb" and not args.evaluate and importlib.util.find_spec("wandb") is None:
        raise UserError("train.tracker: wandb is not installed: pip install wandb")
    resume_from, found, lines = None, None, []
    folder = Path(args.output_dir).expanduser()
    on_main(lambda: check_folder(folder, used=args.resume or args.evaluate))
    if args.resume and not args.evaluate:
        resume_from, found, lines = load_resumable(folder)
        # all processes have read before the main one puts anything aside, and all have read the same
        steps = gather_objects(resume_from and resume_from["progress"]["step"])
        if len(set(steps)) > 1:
            raise UserError(f"--resume: the processes read checkpoints of different steps, {steps}; start once more")
    if args.seed is not None:
        stage.rules["seed"]("--seed", args.seed)
        cfg.seed = args.seed
    elif resume_from:
        cfg.seed = resume_from["config"]["seed"]
    if resume_from:
        lines += check_ranks(len(resume_from["rng"]), args.other_ranks)
        may_change = stage.may_change + (("train.batch_size", "train.accumulation") if args.other_ranks else ())
        lines += check_resumable(cfg, resume_from["config"], may_change)
    return resume_from, found, lines


def source_checkpoint(args: argparse.Namespace) -> str | Path:
    """The file whose model is fine-tuned or evaluated: with --resume the run's last one if it has one, --checkpoint."""
    last = Path(args.output_dir).expanduser() / LAST
    if args.resume and last.exists():
        return last
    if args.checkpoint is None:
        raise UserError("--checkpoint is missing: name a pre-trained checkpoint, e.g. one that Pretrain.py wrote")
    return args.checkpoint


def load_resumable(folder: Path) -> tuple[dict | None, Found, list[str]]:
    """(the newest whole checkpoint of a run's folder or None, what was found, lines for the log); touches no file.

    Where a file is damaged the one before it is taken. Raises UserError where all are damaged.
    """
    found, problems = Found(_written(folder)), []
    if not found.written:
        return None, found, [f"--resume: nothing to go on from in {folder}, beginning"]
    for path in found.written:
        try:
            checkpoint = load_checkpoint(path.resolve(), required=ENTRIES)
            check_entries(checkpoint, path)
        except UserError as error:
            problems.append(str(error))
            found.damaged.append(path)
            continue
        found.step = checkpoint["progress"]["step"]
        lines = [f"warning: {problem}; going on from {path.name}, the one before" for problem in problems]
        return checkpoint, found, [*lines, f"--resume: going on from step {found.step}"]
    raise UserError(f"--resume: no whole checkpoint is left: {'; '.join(problems)}")


def check_entries(checkpoint: dict, path: Path) -> None:
    """Raise UserError where an entry of a checkpoint is not what `fit` wrote, naming it."""
    states, best = checkpoint["rng"], checkpoint.get("best", {})
    tests = {
        "model": isinstance(checkpoint["model"], dict),
        "optimizer": isinstance(checkpoint["optimizer"], dict) and "state" in checkpoint["optimizer"],
        "config": isinstance(checkpoint["config"], dict) and isinstance(checkpoint["config"].get("seed"), int),
        "progress": _is_progress(checkpoint["progress"]),
        "rng": isinstance(states, list) and bool(states) and all(map(_is_random_state, states)),
        "best": isinstance(best, dict) and (not best or isinstance(best.get("epoch"), int)),
    }
    wrong = [name for name, passed in tests.items() if not passed]
    if wrong:
        raise UserError(f"{path}: its entry {wrong[0]} is not what a training run writes; take another checkpoint")


def random_state() -> dict:
    """This process's random generators, as tensors and numbers that `torch.load(weights_only=True)` reads."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(_of_python(state))
    np.random.set_state(_of_numpy(state))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever the block draws, afterwards the random generators are as they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def _of_python(state: dict) -> tuple:
    version, words, gauss = state["python"]
    return version, tuple(words), gauss


def _of_numpy(state: dict) -> tuple:
    name, keys, *rest = state["numpy"]
    return name, np.array(keys, dtype=np.uint32), *rest


def _is_random_state(state) -> bool:
    """Whether `random_state` may have made it: generators of each kind take it."""
    try:
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(_of_python(state))
        np.random.RandomState().set_state(_of_numpy(state))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return "cuda" in state and (state["cuda"] is None or isinstance(state["cuda"], torch.Tensor))


def _is_progress(progress) -> bool:
    """Whether it is a position that `fit` may have been in."""
    counts = ("step", "epoch", "steps_per_epoch")
    if not isinstance(progress, dict) or not all(isinstance(progress.get(key), int) for key in counts):
        return False
    step, epoch, per_epoch = (progress[key] for key in counts)
    words = {"precision": ("bf16", "fp32"), "device": ("cpu", "cuda")}
    losses, followed, seconds = (
        progress.get(key, or_else) for key, or_else in (("losses", []), ("followed", 0), ("seconds", None))
    )
    return (
        epoch >= 0
        and 0 <= epoch * per_epoch <= step <= (epoch + 1) * per_epoch
        and all(progress.get(key) in known for key, known in words.items())
        and isinstance(followed, int)
        and 0 <= followed <= step
        and (seconds is None or isinstance(seconds, float) and 0 <= seconds < math.inf)
        and isinstance(losses, list)
        and all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    )


def check_ranks(before: int, allowed: bool) -> list[str]:
    """A line, or without `allowed` a UserError, where a run goes on with another number of processes than `before`."""
    if before == world_size():
        return []
    if not allowed:
        raise UserError(
            f"--resume: the checkpoint is of {before} processes, this run has {world_size()}: start as many, or add "
            "--other_ranks to go on with another order of the data and other random draws"
        )
    return [f"resumed with {world_size()} processes instead of {before}: order of the data and random draws are new"]


def check_resumable(config: dict, earlier: dict, may_change: tuple[str, ...]) -> list[str]:
    """Compare a run's configuration with that of the checkpoint it continues; returns a line for each difference.

    A difference outside `may_change` (dotted keys) is a UserError: the run would silently become another one.
    """
    lines = []
    for key, (before, now) in differences(earlier, config).items():
        if key not in may_change:
            raise UserError(
                f"--resume: {key} is {now!r}, but the checkpoint was trained with {before!r}; use the same value, or "
                "start a new run in another --output_dir with --checkpoint"
            )
        if gives(earlier, key):  # else the checkpoint is older than the key
            lines.append(f"resumed with {key} {now!r} instead of {before!r}")
    return lines
