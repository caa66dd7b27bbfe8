"""`tools.benchmark checkpoint`: how long training waits for its checkpoint."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import utils
from engine.checkpoint import save_last
from tools.benchmark.model import by_turns, machine
from tools.benchmark.pretrain import Case


@torch.random.fork_rng()
def run_checkpoint(args: argparse.Namespace) -> dict:
    """Weights, AdamW's moments and queues, written as training does; into $TMPDIR, so name a folder on the disk."""
    device = torch.device(utils.choose_device(args.device))
    args.batches = 1
    case = Case(args, "train.batch_size=2", device)
    case.step(0)  # makes the moments
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            state = {"model": case.model.state_dict(), "optimizer": case.optimizer.state_dict()}
            save_last(Path(folder), state, keep=1)

        seconds, cpu = by_turns({"save": save}, args.repeats, device)["save"]
        gigabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9
    return {
        "config": args.config,
        "machine": machine(device),
        "gigabytes": round(gigabytes, 3),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "seconds_per_gigabyte": round(seconds / gigabytes, 3),
    }
