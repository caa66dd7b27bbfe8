"""Checkpoints: the last ones, the best one, what is read of them again, and how far training is."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import utils
from engine.config import Config
from models.weights import load_exactly
from utils import UserError, is_main, load_checkpoint, logger, rank, replacing, world_size

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
ENTRIES = ("model", "optimizer", "progress", "rng", "config")  # of a checkpoint that can be resumed


def save_last(folder: Path, checkpoint: dict, keep: int) -> None:
    """Write checkpoint_last.pth; before it, counted backwards, `keep - 1` stay: checkpoint_last_1.pth, ...

    The files are complete at any moment: a new one is written beside the others and takes its place by renaming.
    Called in the main process alone.
    """
    last = folder / LAST
    with replacing(last) as temporary:
        utils.write_checkpoint(temporary, checkpoint)
        for number in range(keep - 1, 1, -1):
            if (newer := last_path(folder, number - 1)).exists():
                os.replace(newer, last_path(folder, number))
        if keep > 1 and last.exists():
            last_path(folder, 1).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without links: the last one is simply replaced
                os.link(last, last_path(folder, 1))


def last_path(folder: Path, number: int = 0) -> Path:
    """Where the last checkpoint is kept, or the `number`-th before it."""
    return folder / (f"checkpoint_last_{number}.pth" if number else LAST)


def load_last(folder: Path, keep: int) -> dict | None:
    """The newest whole one of the `keep` last checkpoints, None if there is none; UserError if all are damaged."""
    problems = []
    for path in filter(Path.exists, (last_path(folder, number) for number in range(keep))):
        try:
            return load_checkpoint(path, required=ENTRIES)
        except UserError as error:
            problems.append(str(error))
            logger.info("warning: %s; the one before is tried", error)
    if problems:
        raise UserError(f"--resume: no whole checkpoint is left: {'; '.join(problems)}")
    return None


class BestCheckpoint:
    """checkpoint_best.pth: the weights of the epoch with the highest validation score.

    score: its name; notes: further entries of the file; resumed: whether a run continues, with what the file says of
    the best epoch so far (without the file, it is chosen among those to come).
    """

    def __init__(self, folder: Path, score: str, notes: dict, resumed: bool = False):
        self.score, self.notes, self.path = score, notes, folder / BEST
        self.best: dict = {}
        if resumed and self.path.exists():
            self.best = load_checkpoint(self.path, required=("model", "best"))["best"]

    def offer(self, model: nn.Module, found: dict, step: int, epoch: int) -> None:
        """Keep the model of `epoch` (from 1) if its score is the best so far; called in all processes.

        found: the score, and what else the file's entry `best` says of that epoch.
        """
        if found[self.score] > self.best.get(self.score, -math.inf):
            self.best = {**found, "epoch": epoch}
            state = {"model": model.state_dict(), "progress": {"step": step}, **self.state()}
            utils.on_main(lambda: utils.save_checkpoint(self.path, state))  # no process reads the file before

    def state(self) -> dict:
        """The entries of a checkpoint that say which epoch is the best."""
        return {**self.notes, "best": dict(self.best)}

    def restore(self, model: nn.Module) -> None:
        """Put the best epoch's weights into the model, which keeps its own if none was offered."""
        if self.best:
            found = f"best epoch {self.best['epoch']}: {self.score} {self.best[self.score]:.2f} on val"
            logger.info("%s; %s", found, self.path)
            load_exactly(model, load_checkpoint(self.path)["model"], self.path, "take the run's own configuration")


# ------------------------------------------------------------------------------------------------- how far training is


@dataclasses.dataclass
class Progress:
    """How far training is: `step` optimizer steps and `epoch` whole epochs (with what follows one) are done.

    A length in minutes counts the time of training: optimizer steps, the reading of their data and the checkpoints
    between them, the parts of an interrupted run together; not what precedes the first step or follows an epoch.
    """

    step: int = 0
    epoch: int = 0
    steps_per_epoch: int = 0
    total_steps: int | None = 0  # of the whole training; None if its length is a time
    precision: str = "fp32"  # of the forward pass
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last steps, by which a jump is recognized
    followed: int = 0  # the step after which `after_epoch` was last done
    minutes: float | None = None  # the length, if it is a time
    seconds: float | None = None  # of it that are used, alike in all processes

    @classmethod
    def start(cls, train: Config, batches: int) -> Progress:
        """The beginning of a training of the configured length; batches: micro-batches of an epoch."""
        per_epoch = batches // train.accumulation
        if (minutes := train.get("minutes")) is not None:
            return cls(steps_per_epoch=per_epoch, total_steps=None, minutes=minutes, seconds=0.0)
        steps = train.get("steps")
        return cls(steps_per_epoch=per_epoch, total_steps=train.epochs * per_epoch if steps is None else steps)

    @property
    def done(self) -> float:
        """The share of the training that is over, from 0 to 1."""
        if self.minutes is not None:
            return min(1.0, self.seconds / (60 * self.minutes))
        return min(1.0, self.step / max(1, self.total_steps))

    @property
    def over(self) -> bool:
        """Whether the last step is made."""
        return self.done >= 1

    @property
    def epoch_over(self) -> bool:
        """Whether the last step of the epoch is made."""
        return self.step >= (self.epoch + 1) * self.steps_per_epoch

    def remaining(self, seconds_per_step: float) -> float:
        """The seconds of training to come."""
        if self.minutes is not None:
            return max(0.0, 60 * self.minutes - self.seconds)
        return (self.total_steps - self.step) * seconds_per_step

    def add_time(self, since: float) -> float:
        """Add the time since `since`, if the length is a time, by the main process's clock; returns now."""
        now = time.perf_counter()
        if self.minutes is not None:
            used = self.seconds + now - since if is_main() else 0.0
            self.seconds = utils.all_reduce_sum(torch.tensor(used, dtype=torch.float64)).item()
        return now

    def __str__(self) -> str:
        """Epoch, counted from 1, and step."""
        if self.minutes is not None:
            used, whole = utils.clock(self.seconds), utils.clock(60 * self.minutes)
            return f"epoch {self.epoch + 1} step {self.step} {used}/{whole}"
        epochs = math.ceil(self.total_steps / max(1, self.steps_per_epoch))
        return f"epoch {min(self.epoch + 1, epochs)}/{epochs} step {self.step}/{self.total_steps}"


def position(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: int,
    train: Config,
    device: torch.device,
    resume_from: dict | None = None,
) -> Progress:
    """The beginning of a training, or the position of the checkpoint `resume_from`, whose state is put in place.

    The optimizer's settings come from the configuration; the schedule sets its rates before every step.
    """
    progress, precision = Progress.start(train, batches), train.precision
    if resume_from is not None:
        found = resume_from["progress"]
        if progress.steps_per_epoch != found["steps_per_epoch"]:
            problem = f"the checkpoint's epoch has {found['steps_per_epoch']} steps, this run's has"
            raise UserError(f"--resume: {problem} {progress.steps_per_epoch}: use the same data and global batch")
        load_exactly(model, resume_from["model"], "--resume", "the checkpoint is of another model")
        own = ("params", "lr")
        settings = [{key: x for key, x in group.items() if key not in own} for group in optimizer.param_groups]
        optimizer.load_state_dict(resume_from["optimizer"])
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
        for name in ("step", "epoch", "losses", "followed"):
            setattr(progress, name, found[name])
        if progress.minutes is not None:
            progress.seconds = found["seconds"] or 0.0  # of a run by epochs or steps, which counted none
        if len(resume_from["rng"]) == world_size():
            set_random_state(resume_from["rng"][rank()])
        if precision == "auto" and found["device"] == device.type:
            precision = found["precision"]
        resume_from.clear()  # at full size a copy of the weights is 5 GB a process
        logger.info("resumed at %s", progress)
    progress.precision = utils.resolve_precision(precision, device)
    return progress


# ----------------------------------------------------------------------------------------------------- random state


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
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever the block draws, afterwards the random generators are as they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
