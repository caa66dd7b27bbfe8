"""The learning rate of every optimizer step: linear warm-up, then a cosine (the paper, Section 4.1)."""

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
    floor = min(min_lr, peak)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


class WarmupCosine:
    """Sets every group's rate from its `peak_lr`; without state: a resumed run just asks for its own step."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, min_lr: float):
        self.optimizer = optimizer
        self.shape = {"total_steps": total_steps, "warmup_steps": warmup_steps, "min_lr": min_lr}

    def step(self, n: int) -> None:
        """Set the rates of optimizer step n (counted from 0)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(n, peak=group["peak_lr"], **self.shape)
