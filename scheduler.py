"""The learning rate of every optimizer step: linear warm-up, and a cosine (the paper, Section 4.2)."""

from __future__ import annotations

import math

import torch


def lr_at(step: int, *, peak: float, total_steps: int, warmup_steps: int, min_lr: float) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Warm-up takes `warmup_steps` equal strides from 0, the last of which reaches `peak`; the cosine falls from
    there and would be at `min_lr` in step `total_steps`, the first one not made. A peak below `min_lr` stays
    as it is.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return _cosine((step - warmup_steps) / max(1, total_steps - warmup_steps), peak, min_lr)


def lr_by_time(step: int, done: float, *, peak: float, warmup_steps: int, min_lr: float) -> float:
    """The rate of optimizer step `step`, counted from 0, before which the share `done` of the training's time is used.

    The cosine falls from `peak` at the beginning to `min_lr` at the end of the time; during the first `warmup_steps`
    the rate is the share of it that the warm-up has reached. The number of steps need not be known: if
    there are fewer than `warmup_steps`, the rate falls all the same.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return rise * _cosine(done, peak, min_lr)


def _cosine(done: float, peak: float, min_lr: float) -> float:
    floor = min(min_lr, peak)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class WarmupCosine:
    """Sets every group's rate from its `peak_lr`; without state: a resumed run just asks for its own step.

    total_steps: None if the length of the training is a time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, total_steps: int | None, warmup_steps: int, min_lr: float):
        self.optimizer, self.total_steps = optimizer, total_steps
        self.shape = {"warmup_steps": warmup_steps, "min_lr": min_lr}

    def step(self, n: int, done: float = 0.0) -> None:
        """Set the rates of optimizer step n (counted from 0); done: the share of the time used."""
        for group in self.optimizer.param_groups:
            shape = {"peak": group["peak_lr"], **self.shape}
            if self.total_steps is None:
                group["lr"] = lr_by_time(n, done, **shape)
            else:
                group["lr"] = lr_at(n, total_steps=self.total_steps, **shape)
