"""A run's folder: its lock, logs, images and metrics."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import socket
import time
from fnmatch import fnmatch
from pathlib import Path

import torch

from engine.checkpoint import LOCK, MARK, UNFINISHED, Found, check_folder, last_path, random_state_kept
from engine.config import Config, save_config
from utils import EXIT_STOPPED, Stopped, UserError, is_main, logger, on_main, reason, replacing, write_json

# The files that a run writes as a whole; a kill may leave one of them unfinished, as NAME.tmpPROCESS.
WHOLE = ("config.yaml", "config_evaluate.yaml", "log.jsonl", "metrics.json", "nonfinite.json")
WHOLE += ("checkpoint_*.pth", "*_result.json", "*_result_*.json")


class Run:
    """A run's folder: config.yaml, log.jsonl, metrics.json, images, TensorBoard's events; only rank 0 writes.

    `with run:` closes it, whatever ends the block.

    Nothing is touched before `open`, so that a start that fails on what can be checked leaves an earlier run alone.
    """

    def __init__(self, output_dir: str | os.PathLike, config: Config | None = None, found: Found | None = None):
        self.dir, self.config, self.found = Path(output_dir).expanduser(), config, found
        self.start = time.time()
        self._lock = self._log = None
        self._boards: dict[str, object] = {}  # TensorBoard's writers by folder
        self._purge_step: int | None = None
        self._wandb = None  # its run, which follows TensorBoard's events
        self._told: set[str] = set()  # files whose failure has been logged

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        """Close the run. An error that ends the block is raised as it is, whatever happens here."""
        if error is None:
            self.close()
            return
        try:
            self.close(EXIT_STOPPED if isinstance(error, Stopped | KeyboardInterrupt) else 1)
        except KeyboardInterrupt:  # the one that sent the signals waits no longer
            pass
        except Exception as other:
            logger.warning("%s: not closed (%s)", self.dir, reason(other))

    def open(self, resume_step: int | None = None, evaluate: bool = False) -> None:
        """Take the folder for this process, called in all processes. Raises UserError if it cannot be had: it must be
        new, empty or, for an evaluation or with --resume, a run's (see `check_folder`).

        resume_step: the step that a resumed run continues from; the log's later lines are removed.
        evaluate: the logs are continued.
        """
        on_main(lambda: self._open(resume_step, evaluate))

    def _open(self, resume_step: int | None, evaluate: bool) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            check_folder(self.dir, used=evaluate or self.found is not None)
            self._lock = lock(self.dir / LOCK)
            if self.found is not None:
                self.found.put_damaged_aside(self.dir)
                _forget_steps_after(self.found.step, self.dir / "log.jsonl")
                self._purge_step = 0 if resume_step is None else resume_step + 1
            remove_leftovers(self.dir)
            self._log = open(self.dir / "log.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output_dir {self.dir}: {error.strerror or error}") from None
        if self.config is not None:
            of_training = evaluate and last_path(self.dir).exists()
            save_config(self.config, self.dir / ("config_evaluate.yaml" if of_training else "config.yaml"))
        if not evaluate and (self.config or {}).get("train", {}).get("tracker") == "wandb":
            self._start_wandb()

    def _start_wandb(self) -> None:
        """Let wandb follow TensorBoard's events; nothing that fails in it ends a training."""
        try:
            import wandb

            options = {"project": "semmim", "name": self.dir.name, "dir": str(self.dir), "resume": "auto"}
            with random_state_kept():
                self._wandb = wandb.init(config=self.config.to_dict(), sync_tensorboard=True, **options)
        except Exception as error:
            logger.warning("train.tracker: wandb failed (%s); the run continues without it", reason(error))

    def log(self, step: int, values: dict[str, float], split: str = "train", final: bool = False) -> None:
        """A line of log.jsonl (values that are not finite as null) and TensorBoard points `split/name`.

        final: of an evaluation after training, or without it; repeated, its points take the place of the former ones.
        """
        if self._log is None:
            return
        values = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"step": step, "split": split, "seconds": round(time.time() - self.start, 1), **finite}
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except OSError as error:
            self._tell("log.jsonl", error)
        try:
            board = self._board("tensorboard/final" if final else "tensorboard")
            for key, value in values.items():
                board.add_scalar(f"{split}/{key}", value, step)
        except OSError as error:
            self._tell("tensorboard", error)

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """An image [3, H, W], float in [0, 1], for TensorBoard and as images/NAME_STEP.png."""
        if self._log is None:
            return
        from torchvision.utils import save_image  # here: torchvision takes a second to import

        try:
            board = self._board("tensorboard")
            board.add_image(name, image, step)
            board.flush()
            (self.dir / "images").mkdir(exist_ok=True)
            save_image(image, self.dir / "images" / f"{name}_{step:07}.png")
        except OSError as error:
            self._tell("images", error)

    def write_metrics(self, metrics: dict) -> None:
        """metrics.json: the numbers of the last evaluation."""
        if is_main():
            write_json(self.dir / "metrics.json", metrics)

    def info(self, message: str) -> None:
        """A line for the console (rank 0)."""
        logger.info(message)

    def close(self, exit_code: int = 0) -> None:
        """Close the logs and give the folder back. exit_code: for wandb, not 0 if the run failed or was stopped."""
        if self._log is None:
            return
        for name, file in {"log.jsonl": self._log, **self._boards}.items():
            try:
                file.close()  # which tries once more to write what could not be written
            except OSError as error:
                self._tell(name, error)
        if self._wandb:
            try:
                self._wandb.finish(exit_code=exit_code)
            except Exception as error:
                logger.warning("train.tracker: wandb failed (%s)", reason(error))
        self._lock.close()
        self._log, self._boards, self._wandb = None, {}, None

    def _board(self, folder: str):
        """TensorBoard's writer for a folder of the run, made at its first use."""
        if folder not in self._boards:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            path, purge = self.dir / folder, self._purge_step
            if folder != "tensorboard":
                shutil.rmtree(path, ignore_errors=True)  # the points of a former evaluation; log.jsonl keeps them
                purge = None
            self._boards[folder] = SummaryWriter(str(path), purge_step=purge)
        return self._boards[folder]

    def _tell(self, name: str, error: OSError) -> None:
        """A warning, once for each file: a full disk must not end a training run over a line of its log."""
        if name not in self._told:
            self._told.add(name)
            logger.warning("%s: cannot be written (%s); the run continues", self.dir / name, error.strerror or error)


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


def remove_leftovers(folder: Path) -> None:
    """Remove the run's own files that a kill left unfinished; the folder's lock is held, so nobody writes them now."""
    for path in folder.iterdir():
        name = re.fullmatch(r"(.+)\.tmp\d+", path.name)
        if path.name == UNFINISHED or name and any(fnmatch(name[1], pattern) for pattern in WHOLE):
            path.unlink()


def _forget_steps_after(step: int, log: Path) -> None:
    """Drop the lines after `step` from log.jsonl: a killed run logged steps, and epochs, that it did not save."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # a line that a kill or a full disk cut off
            continue
    with replacing(log) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
