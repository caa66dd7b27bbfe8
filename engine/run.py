"""A run's folder: its logs, images and metrics, the best checkpoint, and the checkpoint that `--resume` needs."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from torchvision.utils import save_image

from engine.config import Config, Stage, differences, save_config
from utils import (
    UserError,
    barrier,
    is_main,
    load_checkpoint,
    load_state,
    logger,
    replacing,
    save_checkpoint,
    unwrap,
    write_json,
)

# Files that a new run in the same folder would write over; they are renamed to `*_previous` instead.
EARLIER_RUN = ("log.jsonl", "tensorboard", "config.yaml", "checkpoint_last.pth", "checkpoint_best.pth")


class Run:
    """A run's folder: config.yaml, log.jsonl, metrics.json, TensorBoard's events; only rank 0 writes.

    With `append` (an evaluation) or `resume_from` (the checkpoint of a run that goes on) the logs go on; otherwise the
    files of an earlier run are kept as `*_previous`. What was logged after the checkpoint's step will be logged again
    and goes.
    """

    def __init__(self, output_dir, config: dict | None = None, append: bool = False, resume_from: dict | None = None):
        self.dir, self.config = Path(output_dir), config
        self.start = time.time()
        self.file = self.board = None
        resume_step = resume_from["progress"]["step"] if resume_from else None
        if not is_main():
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            for name in () if append or resume_step is not None else EARLIER_RUN:
                previous = self.dir / f"{Path(name).stem}_previous{Path(name).suffix}"
                if (self.dir / name).exists():
                    shutil.rmtree(previous, ignore_errors=True)  # a folder; os.replace takes care of a file
                    os.replace(self.dir / name, previous)
            if resume_step is not None:
                _forget_steps_after(resume_step, self.dir / "log.jsonl")
            self.file = open(self.dir / "log.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output_dir {self.dir}: {error.strerror or error}") from None
        if config is not None:
            save_config(config, self.dir / "config.yaml")
        purge = None if resume_step is None else resume_step + 1
        self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float], split: str = "train") -> None:
        """A line of log.jsonl (values that are not finite as null) and TensorBoard points `split/name`."""
        if self.file is None:
            return
        values = {key: float(value) for key, value in values.items()}
        for key, value in values.items():
            self.board.add_scalar(f"{split}/{key}", value, step)
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"step": step, "split": split, "seconds": round(time.time() - self.start, 1), **finite}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """A picture [3, H, W], float in [0, 1], for TensorBoard and as pictures/NAME_STEP.png."""
        if self.board is not None:
            self.board.add_image(name, image, step)
            self.board.flush()
            (self.dir / "pictures").mkdir(exist_ok=True)
            save_image(image, self.dir / "pictures" / f"{name}_{step:07}.png")

    def write_metrics(self, metrics: dict) -> None:
        """metrics.json: the numbers of the last evaluation."""
        if is_main():
            write_json(self.dir / "metrics.json", metrics)

    def info(self, message: str) -> None:
        """A line for the console (rank 0)."""
        logger.info(message)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.board.close()
            self.file = self.board = None


def begin(args: argparse.Namespace, cfg: Config, stage: Stage) -> tuple[dict | None, list[str]]:
    """What --resume and --seed ask for: (the checkpoint to go on from or None, lines for the log).

    A resumed run keeps its seed, which is put into `cfg` here; only keys in `stage.may_change` may differ from the
    checkpoint's configuration. Evaluation resumes nothing.
    """
    resume_from = load_resumable(args.output_dir) if args.resume and not args.evaluate else None
    if args.seed is not None:
        cfg.seed = args.seed
    elif resume_from:
        cfg.seed = resume_from["config"]["seed"]
    lines = check_resumable(cfg, resume_from["config"], stage.may_change) if resume_from else []
    return resume_from, lines


def source_checkpoint(args: argparse.Namespace) -> str | Path:
    """The file whose model is fine-tuned or evaluated: --checkpoint, or with --resume the run's last one."""
    if args.resume:
        return Path(args.output_dir).expanduser() / "checkpoint_last.pth"
    if args.checkpoint is None:
        raise UserError("--checkpoint is missing: name a pre-trained checkpoint, e.g. one that Pretrain.py wrote")
    return args.checkpoint


class BestCheckpoint:
    """checkpoint_best.pth: the weights of the epoch with the highest validation score.

    score: its name; notes: further entries of the file; resume_from: the checkpoint that a run continues.
    """

    def __init__(self, run: Run, score: str, notes: dict, resume_from: dict | None = None):
        self.run, self.score, self.notes = run, score, notes
        self.path = run.dir / "checkpoint_best.pth"
        self.best = dict((resume_from or {}).get("best", {}))

    def offer(self, model: torch.nn.Module, value: float, progress) -> None:
        """Keep the model if its score is the best so far (the first of equals); called in all processes."""
        if value > self.best.get(self.score, -math.inf):
            self.best = {self.score: value, "epoch": progress.epoch + 1}
            if is_main():
                state = {"model": unwrap(model).state_dict(), "progress": {"step": progress.step}, **self.state()}
                save_checkpoint(self.path, state)
            barrier()  # no process reads the file before it is written

    def state(self) -> dict:
        """`extra_state` of `fit`."""
        return {**self.notes, "best": dict(self.best)}

    def restore(self, model: torch.nn.Module) -> None:
        """Put the best epoch's weights into the model, which keeps its own where none was offered."""
        if self.best:
            self.run.info(
                f"best epoch {self.best['epoch']}: {self.score} {self.best[self.score]:.2f} on val; {self.path}"
            )
            load_state(model, load_checkpoint(self.path)["model"], str(self.path))


def load_resumable(output_dir) -> dict:
    """The checkpoint that `--resume` continues from: checkpoint_last.pth in this very folder."""
    path = Path(output_dir).expanduser() / "checkpoint_last.pth"
    if not path.is_file():
        raise UserError(f"--resume: {path} does not exist, there is nothing to resume; leave out --resume")
    return load_checkpoint(path.resolve(), required=("model", "optimizer", "progress", "rng", "config"))


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
        lines.append(f"resumed with {key} {now!r} instead of {before!r}")
    return lines


def _forget_steps_after(step: int, log: Path) -> None:
    """Drop the training lines after `step` from log.jsonl: a run that was killed logged steps that it did not save."""
    if not log.exists():
        return
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if (entry := json.loads(line))["split"] != "train" or entry["step"] <= step]
    with replacing(log) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
