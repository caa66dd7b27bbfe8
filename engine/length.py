"""How long a training lasts, in epochs, optimizer steps or minutes, and how far it is.

A length in minutes counts the time of training: optimizer steps, the reading of their data and the checkpoints between
them, the parts of an interrupted run together. It leaves out what a run does before its first step and what follows an
epoch (validation, images, its checkpoint), so that a validation changes nothing of the training.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from engine.checkpoint import step_at
from optim import create_optimizer
from scheduler import WarmupCosine
from utils import Config, UserError, all_reduce_sum, clock, is_main, logger, world_size


@dataclasses.dataclass
class Progress:
    """How far training is: `step` optimizer steps and `epoch` whole epochs (with what follows one) are done."""

    step: int = 0
    epoch: int = 0
    steps_per_epoch: int = 0
    total_steps: int | None = 0  # of the whole training; None where its length is one of time
    precision: str = "fp32"  # of the forward pass
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last steps, to tell a jump by
    followed: int = 0  # the step after which `on_epoch_end` was last done
    minutes: float | None = None  # the length, where it is one of time
    seconds: float | None = None  # of it that are used, alike in all processes

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

    def __str__(self) -> str:
        """`step 12 of 100`"""
        if self.minutes is not None:
            return f"step {self.step}, after {clock(self.seconds)} of {clock(60 * self.minutes)}"
        return f"step {self.step} of {self.total_steps}"

    def place(self) -> str:
        """Epoch, counted from 1, and step, for the console."""
        if self.minutes is not None:
            return f"epoch {self.epoch + 1} step {self.step} {clock(self.seconds)}/{clock(60 * self.minutes)}"
        epochs = math.ceil(self.total_steps / max(1, self.steps_per_epoch))
        return f"epoch {self.epoch + 1}/{epochs} step {self.step}/{self.total_steps}"


def beginning(train_cfg: Config, batches: int) -> Progress:
    """A training of the configuration's length that has not begun. batches: micro-batches of an epoch."""
    per_epoch = batches // train_cfg.accumulation
    if (minutes := train_cfg.get("minutes")) is not None:
        return Progress(steps_per_epoch=per_epoch, total_steps=None, minutes=minutes, seconds=0.0)
    steps = train_cfg.get("steps")
    return Progress(steps_per_epoch=per_epoch, total_steps=train_cfg.epochs * per_epoch if steps is None else steps)


def create_optimization(
    model: torch.nn.Module, cfg, loader, pretrained_vit: bool = True
) -> tuple[torch.optim.AdamW, WarmupCosine]:
    """-> (optimizer, schedule) of `cfg.train`, an epoch being the loader's batches; logs the effective values.

    pretrained_vit: whether the image encoder starts from trained weights, which `lr_vit` protects; else it
    learns at `lr`. Raises UserError if an epoch has no batch for a single step.
    """
    train, batches = cfg.train, len(loader)
    if batches < train.accumulation:
        raise UserError(
            f"{len(loader.dataset)} training entries are too few for one step: lower train.batch_size "
            f"(now {train.batch_size} per process) or train.accumulation (now {train.accumulation})"
        )
    lr, lr_vit = train.lr, train.lr_vit if pretrained_vit else train.lr
    optimizer = create_optimizer(model, lr=lr, lr_vit=lr_vit, weight_decay=train.weight_decay, betas=train.betas)
    total_steps = beginning(train, batches).total_steps
    if total_steps is not None and train.warmup_steps >= total_steps:
        logger.info(
            "warning: train.warmup_steps %d >= %d steps: lr never reaches its peak", train.warmup_steps, total_steps
        )
    schedule = WarmupCosine(optimizer, total_steps=total_steps, warmup_steps=train.warmup_steps, min_lr=train.min_lr)
    duration = f"{train.minutes:g} minutes" if total_steps is None else f"{total_steps} steps"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"{trainable / 1e6:.1f}M trainable parameters, {batches} batches an epoch, {duration}; "
        f"global batch {train.batch_size * train.accumulation * world_size()}: {train.batch_size} per process, "
        f"{world_size()} processes, accumulation {train.accumulation}; "
        f"learning rates {lr:.2e}, image encoder {lr_vit:.2e}"
    )
    return optimizer, schedule


def check_steps(train_cfg: Config, checkpoint: dict, per_epoch: int) -> None:
    """Raises UserError where a length in steps was meant for steps of another size: an epoch had more or fewer."""
    steps, before = train_cfg.get("steps"), checkpoint["progress"]["steps_per_epoch"]
    if steps is not None and per_epoch != before and checkpoint["config"]["train"].get("steps") == steps:
        raise UserError(
            f"--resume: train.steps: {steps} steps were of another size: an epoch has {per_epoch} now instead of "
            f"{before}; train.steps={max(1, round(steps * per_epoch / max(1, before)))} is the same length"
        )


def go_on(progress: Progress, found: dict) -> None:
    """Put `progress`, of the configuration's length, where a checkpoint's progress `found` is.

    An epoch may have another number of steps than when the checkpoint was written: then the share of it that is done
    stays. Raises UserError where a length in minutes goes on from a run that counted none.
    """
    progress.epoch, progress.losses = found["epoch"], list(found.get("losses", []))
    first, per_epoch = found["epoch"] * found["steps_per_epoch"], progress.steps_per_epoch
    progress.step = step_at(found, per_epoch)
    if per_epoch != found["steps_per_epoch"]:
        moved = found["step"], progress.step, per_epoch, found["steps_per_epoch"]
        logger.info("step %d of the checkpoint counts as step %d: an epoch has %d steps now instead of %d", *moved)
    followed = found.get("followed", first) == found["step"]
    progress.followed = progress.step if followed else progress.epoch * per_epoch
    if progress.minutes is None:
        return
    if found.get("seconds") is None:
        raise UserError(
            "--resume: train.minutes: the checkpoint is of a run by train.epochs or train.steps, which kept no time; "
            "use one of them, or start a new run in another --output_dir with --checkpoint"
        )
    progress.seconds = found["seconds"]


class Stopwatch:
    """Counts the seconds of a length in minutes; the main process's clock is that of all, so that all end alike."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.go()

    def go(self) -> None:
        """Count from now on, after a pause."""
        self.last = time.perf_counter()

    def look(self) -> None:
        """Add the time since the last look; called in all processes."""
        if self.progress.minutes is None:
            return
        now = time.perf_counter()
        used = self.progress.seconds + now - self.last if is_main() else 0.0
        self.last = now
        self.progress.seconds = all_reduce_sum(torch.tensor(used, dtype=torch.float64)).item()
