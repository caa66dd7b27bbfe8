"""One experiment tracker beside TensorBoard and JSON lines: wandb or trackio, used by what their interfaces share.

The package is imported only where `train.tracker` names it. Nothing that it does, or fails to do, ends a training.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from utils import UserError, logger, reason, write_json

TRACKERS = ("wandb", "trackio")
FILE = "tracker.json"  # of a run's folder: which tracker, and by what name and id it knows the run
PATIENCE = 60  # seconds that a tracker gets at a run's end, which a scheduler may have given little time


def tracker_package(name: str):
    """The package of a tracker, imported. UserError where this Python lacks it."""
    try:
        package = importlib.import_module(name)
        if not hasattr(package, "init"):  # a folder of that name, which wandb for one leaves, passes for a package
            raise ImportError(f"{getattr(package, '__path__', ['it'])[0]} is a folder, no package")
    except ImportError as error:
        raise UserError(f"train.tracker: {name} cannot be imported ({reason(error)}): pip install {name}") from None
    return package


class Tracker:
    """What a run tells a tracker; for the main process alone.

    folder: the run's; its `tracker.json` lets a resumed run go on as the same one. config: the run's configuration.
    """

    def __init__(self, name: str, folder: Path, config: dict):
        self.name = name
        self.package = tracker_package(name)
        self.failed = False
        self._try(lambda: self._start(folder, config))

    def _start(self, folder: Path, config: dict) -> None:
        known = self._identity(folder)
        options = {"name": known["name"], "config": {**config, "output_dir": str(folder)}, "resume": "allow"}
        if self.name == "wandb":
            # its own limit, which also holds for what it does when Python ends; without one it waits for its server
            os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(PATIENCE * 3 // 4))
            project = os.environ.get("WANDB_PROJECT", "semmim")
            self.run = self.package.init(project=project, id=known["id"], dir=str(folder), **options)
            # wandb's own count of steps never goes back, as that of a run resumed from an earlier checkpoint does
            self.run.define_metric("*", step_metric="step")
        else:
            self.run = self.package.init(project="semmim", **options)

    def _identity(self, folder: Path) -> dict:
        """The run's {"tracker", "id", "name"}, made where its folder has none of this tracker."""
        path = folder / FILE
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["tracker"] == self.name and isinstance(known["id"], str) and isinstance(known["name"], str):
                return known
        except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
            pass
        number = uuid.uuid4().hex[:8]  # no random generator of the training's
        name = "-".join([*folder.resolve().parts[-2:], number]).lstrip("/")  # trackio knows a run by its name alone
        known = {"tracker": self.name, "id": number, "name": name}
        write_json(path, known)
        return known

    def log(self, step: int, values: dict[str, float]) -> None:
        """Points {name: value} at an optimizer step."""
        self._send(step, lambda: values)

    def image(self, step: int, name: str, path: Path) -> None:
        """An image file."""
        self._send(step, lambda: {name: self.package.Image(str(path))})

    def _send(self, step: int, values: Callable[[], dict]) -> None:
        if self.name == "wandb":
            self._try(lambda: self.run.log({**values(), "step": step}))
        else:
            self._try(lambda: self.run.log(values(), step=step))

    def close(self, exit_code: int = 0) -> None:
        """Let the tracker send what it still has, for `PATIENCE` seconds. exit_code: where it is not 0, the run failed
        or was stopped; trackio knows no such difference."""
        how = {"exit_code": exit_code} if self.name == "wandb" else {}
        self._try(lambda: _within(PATIENCE, lambda: self.run.finish(**how)))

    def _try(self, action: Callable[[], object]) -> None:
        """Do it; a failure is told, and the tracker is told nothing more."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever another package raises is no reason to lose a training
            self.failed = True
            logger.warning("train.tracker: %s failed (%s); the run goes on without it", self.name, reason(error))


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Do it in a thread that is waited for so long. Raises what it raises, TimeoutError where it goes on."""
    raised: list[Exception] = []

    def work() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)  # one that Python's end does not wait for
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"it did not finish within {seconds} seconds")
    if raised:
        raise raised[0]
