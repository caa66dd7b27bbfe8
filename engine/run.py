"""A run's folder: what a start finds there, its lock, logs, images and metrics."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import torch

import utils
from engine.checkpoint import last_path, load_last, random_state_kept
from engine.config import MAY_CHANGE, Config, differences, read_yaml, save_config
from models.weights import check_value
from utils import ROOT, UserError, is_main, logger, on_main, one_line, open_file, replacing, world_size, write_json

LOCK, MARK = "run.lock", "SemMIM run: "  # a run's lock file, and how it begins
# What a kill left of the files that a run writes as a whole.
UNFINISHED = re.compile(
    r"(checkpoint_\w+\.pth|config\w*\.yaml|log\.jsonl|(metrics|nonfinite|\w+_result\w*)\.json)\.tmp\d+"
)


def begin(args: argparse.Namespace, cfg: Config) -> tuple[Run, dict | None]:
    """The run that a script's arguments ask for, not yet open, and the checkpoint that it continues from or None.

    --resume resumes if a checkpoint exists, otherwise starts, so that one command serves the first start and every
    restart. A resumed run keeps its seed, which is put into `cfg` here; only keys of MAY_CHANGE may differ from the
    checkpoint's configuration. Evaluation resumes nothing. Raises UserError if the folder is not a run's.
    """
    folder = Path(args.output_dir).expanduser()
    on_main(lambda: check_folder(folder, args.resume or args.evaluate, cfg))
    resume = args.resume and not args.evaluate
    resume_from = load_last(folder, cfg.train.keep_checkpoints) if resume else None
    step = resume_from["progress"]["step"] if resume_from else -1
    if args.seed is not None:
        check_value("--seed", args.seed, int, 0, 2**62)
        cfg.seed = args.seed
    elif resume_from:
        cfg.seed = resume_from["config"]["seed"]
    if resume_from:
        logger.info("--resume: continuing from step %d", step)
        check_same_run(cfg, resume_from, args.other_ranks)
    elif resume:
        logger.info("--resume: no checkpoint in %s, starting", folder)
    return Run(folder, cfg, step), resume_from


def check_same_run(config: dict, resume_from: dict, other_ranks: bool) -> None:
    """Log how a run differs from the checkpoint it continues: in keys of MAY_CHANGE and, if `other_ranks` allows
    another number of processes, in batches. Any other difference is a UserError: it would silently be another run.
    """
    before, may_change = len(resume_from["rng"]), MAY_CHANGE
    if before != world_size():
        if not other_ranks:
            problem = f"the checkpoint is of {before} processes, this run has {world_size()}"
            raise UserError(f"--resume: {problem}; start as many, or add --other_ranks for another order of the data")
        logger.info("%d processes instead of %d: order of the data and random draws are new", world_size(), before)
        may_change = MAY_CHANGE | {"train.batch_size", "train.accumulation"}
    for key, (before, now) in differences(resume_from["config"], config).items():
        if not any(f"{key}.".startswith(f"{known}.") for known in may_change):
            problem = f"{key} is {now!r}, but the checkpoint was trained with {before!r}"
            raise UserError(f"--resume: {problem}; use that, or start a new run with --checkpoint")
        logger.info("resumed with %s %r instead of %r", key, now, before)


def check_folder(folder: Path, used: bool, config: dict) -> None:
    """Raise UserError if a run may not write into a folder; touches nothing.

    A folder that is not empty must have the lock file of a run of this project and, unless `used`, nothing else. A
    config.yaml in it must be of the same stage, that is have the keys of `config`.
    """
    names, path = sorted(os.listdir(folder)) if folder.is_dir() else [], folder / LOCK
    if names and not (path.is_file() and path.read_bytes().startswith(MARK.encode())):
        found = f"it holds {one_line(names[0])} and no run's {LOCK}"
        raise UserError(f"--output_dir {folder}: {found}, so no run touches it; name a new or an empty folder")
    if not used and names not in ([], [LOCK]):
        raise UserError(f"--output_dir {folder}: it holds an earlier run; add --resume, or name another folder")
    if (known := folder / "config.yaml").exists() and read_yaml(known).keys() != config.keys():
        raise UserError(f"--output_dir {folder}: it holds a run of another stage; name another folder")


def lock(path: Path):
    """Open the lock file `path` and lock it for this process until it is closed or the process ends.

    A lock that its process left behind counts for nothing. Raises UserError, which names host and process, if
    another process holds it.
    """
    file = open(os.open(path, os.O_RDWR | os.O_CREAT), "r+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        owner = file.read().removeprefix(MARK).strip() or "another process"
        file.close()
        raise UserError(f"--output_dir {path.parent}: in use by {owner}; wait for it, or take another folder") from None
    except OSError:  # a file system without locks
        logger.info("warning: %s: this file system has no locks; do not start two runs in this folder", path.parent)
    text = f"{MARK}process {os.getpid()} on {socket.gethostname()}\n".encode()
    os.pwrite(file.fileno(), text, 0)  # over the former one, so that the mark is there at any moment
    file.truncate(len(text))
    return file


class Run(contextlib.AbstractContextManager):
    """A run's folder: config.yaml, log.jsonl, metrics.json, images, TensorBoard's events; only rank 0 writes.

    `with run:` closes it, whatever ends the block. Nothing is touched before `open`, so that a start that fails on what
    can be checked leaves an earlier run alone.

    step: the one that training continues from, -1 without a checkpoint.
    """

    def __init__(self, output_dir: str | os.PathLike, config: Config, step: int = -1):
        self.dir, self.config, self.step = Path(output_dir).expanduser(), config, step
        self.start, self.about = time.time(), {}
        self._lock = self._log = None

    def __exit__(self, *_) -> None:
        self.close()

    def open(self, evaluate: bool = False) -> None:
        """Take the folder for this process, called in all processes; UserError if it cannot be had. Training removes
        the log's lines after the step that it continues from; an evaluation continues the log.
        """
        on_main(lambda: self._open(evaluate))

    def _open(self, evaluate: bool) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.dir / LOCK)
            for path in self.dir.iterdir():
                if UNFINISHED.fullmatch(path.name):
                    path.unlink()
            if not evaluate:
                forget_steps_after(self.step, self.dir / "log.jsonl")
            self._log = open(self.dir / "log.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output_dir {self.dir}: {error.strerror or error}") from None
        of_training = evaluate and last_path(self.dir).exists()
        save_config(self.config, self.dir / ("config_evaluate.yaml" if of_training else "config.yaml"))
        if not evaluate and self.config.train.tracker == "wandb":
            import wandb

            with random_state_kept():
                options = {"name": self.dir.name, "dir": str(self.dir), "config": self.config.to_dict()}
                wandb.init(project="semmim", resume="auto", sync_tensorboard=True, **options)

    def log(self, step: int, values: dict[str, float], split: str = "train", final: bool = False) -> None:
        """A line of log.jsonl (values that are not finite as null) and TensorBoard points `split/name`.

        final: of an evaluation after training, or without it, whose numbers are no points of a curve.
        """
        if self._log is None:
            return
        values = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"step": step, "split": split, "seconds": round(time.time() - self.start, 1), **finite}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        for key, value in () if final else values.items():
            self.board.add_scalar(f"{split}/{key}", value, step)

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """An image [3, H, W], float in [0, 1], for TensorBoard and as images/NAME_STEP.png."""
        if self._log is None:
            return
        from torchvision.utils import save_image  # here: torchvision takes a second to import

        self.board.add_image(name, image, step)
        (self.dir / "images").mkdir(exist_ok=True)
        save_image(image, self.dir / "images" / f"{name}_{step:07}.png")

    def describe(self, device: torch.device, model: dict) -> None:
        """Note for metrics.json what numbers depend on beside data and weights; called in all processes, which agree on
        the precision. model: its description."""
        setting = self.config.train.precision
        precision = utils.resolve_precision(setting, device)
        self.info(f"precision {precision} (train.precision: {setting}), on {device.type}")
        self.about = {
            "precision": precision,
            "batch_size": self.config.eval.batch_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "version": code_version() if is_main() else "",  # asks git
            "model": model,
        }

    def write_metrics(self, metrics: dict) -> None:
        """metrics.json: the numbers of the last evaluation, and under `run` what `describe` has noted."""
        if is_main():
            write_json(self.dir / "metrics.json", {**metrics, "run": self.about})

    def info(self, message: str) -> None:
        """A line for the console (rank 0)."""
        logger.info(message)

    def close(self) -> None:
        """Close the logs and give the folder back."""
        if self._log is None:
            return
        for file in (self._log, self.__dict__.pop("board", None), self._lock):
            if file is not None:
                file.close()
        self._log = None

    @functools.cached_property
    def board(self):
        """TensorBoard's writer, made at its first use."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        return SummaryWriter(str(self.dir / "tensorboard"), purge_step=self.step + 1)


def code_version() -> str:
    """The commit of the code, with a + if files differ from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return "unknown"
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def forget_steps_after(step: int, log: Path) -> None:
    """Drop the lines after `step` from log.jsonl: a killed run logged steps, and epochs, that it did not save."""
    if not log.exists():
        return
    kept = []
    with open_file(log) as file:
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a kill or a full disk cut off
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    with replacing(log) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
