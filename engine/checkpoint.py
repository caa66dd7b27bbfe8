"""A run's checkpoints: the last ones, the best one, and what `--resume` continues from."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.config import Config, Stage, differences
from models.weights import load_exactly
from utils import (
    UserError,
    all_reduce_sum,
    clock,
    gather_objects,
    is_main,
    load_checkpoint,
    logger,
    on_main,
    one_line,
    rank,
    resolve_precision,
    save_checkpoint,
    unwrap,
    world_size,
)

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
UNFINISHED = "checkpoint_new.pth"  # a checkpoint before it takes its place as the last one
ENTRIES = ("model", "optimizer", "progress", "rng", "config")  # of a checkpoint that can be resumed


def save_last(folder: Path, checkpoint: dict, keep: int) -> None:
    """Write checkpoint_last.pth; before it, counted backwards, `keep - 1` stay: checkpoint_last_1.pth, ...

    The files are complete at any moment: a new one is written beside the others and takes its place by renaming.
    Called in the main process alone.
    """
    save_checkpoint(folder / UNFINISHED, checkpoint)
    for number in range(keep - 1, 1, -1):
        if (newer := last_path(folder, number - 1)).exists():
            os.replace(newer, last_path(folder, number))
    last = last_path(folder)
    if keep > 1 and last.exists():
        with contextlib.suppress(OSError):  # a file system without links: the last one is simply replaced
            last_path(folder, 1).unlink(missing_ok=True)
            os.link(last, last_path(folder, 1))
    os.replace(folder / UNFINISHED, last)
    for path in last_paths(folder)[keep:]:  # of a run that kept more
        path.unlink()


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
            state = {"model": unwrap(model).state_dict(), "progress": {"step": step}, **self.state()}
            on_main(lambda: save_checkpoint(self.path, state))  # no process reads the file before it is written

    def state(self) -> dict:
        """The entries of a checkpoint that say which epoch is the best."""
        return {**self.notes, "best": dict(self.best)}

    def restore(self, model: torch.nn.Module) -> None:
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
            self.seconds = all_reduce_sum(torch.tensor(used, dtype=torch.float64)).item()
        return now

    def __str__(self) -> str:
        """Epoch, counted from 1, and step."""
        if self.minutes is not None:
            return f"epoch {self.epoch + 1} step {self.step} {clock(self.seconds)}/{clock(60 * self.minutes)}"
        epochs = math.ceil(self.total_steps / max(1, self.steps_per_epoch))
        return f"epoch {self.epoch + 1}/{epochs} step {self.step}/{self.total_steps}"


def step_at(progress: dict, steps_per_epoch: int) -> int:
    """The step at the same place in the data as `progress`, if an epoch has `steps_per_epoch` steps."""
    before, epoch = progress["steps_per_epoch"], progress["epoch"]
    return epoch * steps_per_epoch + round((progress["step"] - epoch * before) * steps_per_epoch / max(1, before))


def position(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: int,
    train: Config,
    device: torch.device,
    resume_from: dict | None = None,
) -> Progress:
    """The beginning of a training, or the position of the checkpoint `resume_from`, whose state is put in place.

    The optimizer's settings (rates, decay) come from the configuration.
    """
    progress, precision = Progress.start(train, batches), train.precision
    if resume_from is not None:
        found = resume_from["progress"]
        same_ranks = len(resume_from["rng"]) == world_size()
        _check_length(progress, resume_from, train, same_ranks)
        load_exactly(unwrap(model), resume_from["model"], "--resume", "the checkpoint is of another model")
        settings = [{key: item for key, item in group.items() if key != "params"} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(resume_from["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: the checkpoint's optimizer has other parameter groups ({error})") from None
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
        _go_on(progress, found)
        if same_ranks:
            set_random_state(resume_from["rng"][rank()])
        if precision == "auto" and found["device"] == device.type:
            precision = found["precision"]
        resume_from.clear()  # both hold the same weights by now; at full size the copy is 5 GB a process
        logger.info("resumed at %s", progress)
    progress.precision = resolve_precision(precision, device)
    return progress


def _check_length(progress: Progress, checkpoint: dict, train: Config, same_ranks: bool) -> None:
    """Raise UserError if the checkpoint's epoch has other steps without other ranks, or its length no meaning here."""
    before, now, steps = checkpoint["progress"]["steps_per_epoch"], progress.steps_per_epoch, train.get("steps")
    if now != before and steps is not None and checkpoint["config"]["train"].get("steps") == steps:
        raise UserError(
            f"--resume: train.steps: {steps} steps were of another size: an epoch has {now} now instead of {before}; "
            f"train.steps={max(1, round(steps * now / max(1, before)))} is the same length"
        )
    if now != before and same_ranks:
        raise UserError(
            f"--resume: the checkpoint's epoch has {before} steps, this run's has {now}: use the same data, batch "
            "size, accumulation and number of processes"
        )
    if progress.minutes is not None and checkpoint["progress"].get("seconds") is None:
        raise UserError(
            "--resume: train.minutes: the checkpoint is of a run by train.epochs or train.steps, which kept no time; "
            "use one of them, or start a new run in another --output_dir with --checkpoint"
        )


def _go_on(progress: Progress, found: dict) -> None:
    """Move `progress`, of the configured length, to the place of a checkpoint's progress `found`.

    An epoch may have another number of steps than when the checkpoint was written: the share of it that is done stays.
    """
    progress.epoch, progress.losses = found["epoch"], list(found.get("losses", []))
    first, per_epoch = found["epoch"] * found["steps_per_epoch"], progress.steps_per_epoch
    progress.step = step_at(found, per_epoch)
    if per_epoch != found["steps_per_epoch"]:
        moved = found["step"], progress.step, per_epoch, found["steps_per_epoch"]
        logger.info("step %d of the checkpoint counts as step %d: an epoch has %d steps now instead of %d", *moved)
    followed = found.get("followed", first) == found["step"]
    progress.followed = progress.step if followed else progress.epoch * per_epoch
    if progress.minutes is not None:
        progress.seconds = found["seconds"]


# -------------------------------------------------------------------------------------------- what a start looks for

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
    """What --resume found in a run's folder: the step to continue from (-1: none), and damaged checkpoints."""

    step: int = -1
    damaged: list[Path] = dataclasses.field(default_factory=list)

    def put_damaged_aside(self, folder: Path) -> None:
        """Rename the damaged files to *_damaged.pth, now that the folder is locked, and close the gaps."""
        for path in self.damaged:
            os.replace(path, path.with_name(f"{path.stem}_damaged.pth"))
        for number, path in enumerate(last_paths(folder) if self.damaged else ()):
            os.replace(path, last_path(folder, number))


def begin(args: argparse.Namespace, cfg: Config, stage: Stage) -> tuple[dict | None, Found | None, list[str]]:
    """What --resume and --seed ask for: (the checkpoint to continue from or None, what --resume found, lines to log).

    --resume resumes if a checkpoint exists, otherwise starts, so that one command serves the first start and every
    restart. A resumed run keeps its seed, which is put into `cfg` here; only keys in `stage.may_change` may differ from
    the checkpoint's configuration. Evaluation resumes nothing.
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

    If a file is damaged, the one before it is taken. Raises UserError if all are damaged.
    """
    found, problems, paths = Found(), [], last_paths(folder)
    if not paths:
        return None, found, [f"--resume: no checkpoint in {folder}, starting"]
    for path in paths:
        try:
            checkpoint = load_checkpoint(path.resolve(), required=ENTRIES)
        except UserError as error:
            problems.append(str(error))
            found.damaged.append(path)
            continue
        found.step = checkpoint["progress"]["step"]
        lines = [f"warning: {problem}; continuing from {path.name}, the one before" for problem in problems]
        return checkpoint, found, [*lines, f"--resume: continuing from step {found.step}"]
    raise UserError(f"--resume: no whole checkpoint is left: {'; '.join(problems)}")


def check_ranks(before: int, allowed: bool) -> list[str]:
    """A line, or without `allowed` a UserError, if a run continues with another number of processes than `before`."""
    if before == world_size():
        return []
    if not allowed:
        raise UserError(
            f"--resume: the checkpoint is of {before} processes, this run has {world_size()}: start as many, or add "
            "--other_ranks to continue with another order of the data and other random draws"
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
        lines.append(f"resumed with {key} {now!r} instead of {before!r}")
    return lines


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
