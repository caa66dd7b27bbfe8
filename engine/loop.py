"""THE training loop of every stage: optimizer steps, the logging window, stop signals, saving and resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch

from engine.config import Config
from engine.run import Run
from utils import (
    Stopped,
    UserError,
    all_reduce_sum,
    autocast,
    barrier,
    clock,
    gather_objects,
    is_main,
    load_state,
    logger,
    random_state,
    rank,
    resolve_precision,
    save_checkpoint,
    set_random_state,
    to_device,
    unwrap,
    world_size,
)


@dataclasses.dataclass
class Progress:
    """How far training is: `step` optimizer steps and `epoch` epochs (with what follows one) are done."""

    step: int = 0
    epoch: int = 0
    steps_per_epoch: int = 0
    total_steps: int = 0


def fit(
    model: torch.nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    schedule,
    *,
    train_cfg: Config,
    run: Run,
    device: torch.device,
    loss_fn: Callable,
    after_step: Callable[[Progress], object] | None = None,
    on_epoch_end: Callable[[torch.nn.Module, Progress], object] | None = None,
    extra_state: Callable[[], dict] | None = None,
    resume_from: dict | None = None,
    log_fn: Callable[[Progress, dict], dict | None] | None = None,
) -> Progress:
    """Train until `train_cfg.epochs` are done, or raise Stopped after a signal.

    `loader` yields dicts of tensors (and lists, e.g. `paths`) and has `set_epoch(epoch, start_batch)`.
    `loss_fn(model, batch, progress) -> (loss, values)` runs under autocast for each of the `accumulation`
    micro-batches; `values` are scalars (tensors or numbers; the same names in all processes), logged as means
    over the interval, on the console too where the name has no "/". `schedule.step(n)` sets the rates of step
    n. `after_step(progress)` follows every optimizer step, `on_epoch_end(model, progress)` every epoch, while
    `progress.epoch` still is that epoch's number from 0. `log_fn(progress, means)` may return further values
    to log. All of them are called in all processes. Checkpoints hold model, optimizer, position in the data,
    random state, configuration and `extra_state()`; `resume_from`, such a checkpoint, continues with the next batch and
    is emptied once it is in place. The optimizer's settings (rates, decay) come from the configuration.
    """
    accumulation, steps_per_epoch = train_cfg.accumulation, len(loader) // train_cfg.accumulation
    if steps_per_epoch == 0:
        raise UserError(
            f"{len(loader.dataset)} training entries are too few for one step: lower train.batch_size "
            f"(now {train_cfg.batch_size} per process) or train.accumulation (now {accumulation})"
        )
    progress = Progress(steps_per_epoch=steps_per_epoch, total_steps=train_cfg.epochs * steps_per_epoch)
    precision = train_cfg.precision
    if resume_from is not None:
        precision = _resume(resume_from, model, optimizer, progress, precision, device)
        run.info(f"resumed at step {progress.step} of {progress.total_steps}")
    precision = resolve_precision(precision, device)
    window = _Window(run, device)

    def save(stop: bool = False) -> None:
        window.check()
        _save(model, optimizer, progress, run, extra_state, precision=precision, device=device.type)
        if stop:
            run.info(f"stopped at step {progress.step} of {progress.total_steps}; continue with --resume")
            raise Stopped

    with _stop_signals() as stopping:
        while progress.epoch < train_cfg.epochs:
            model.train()
            first = progress.step - progress.epoch * steps_per_epoch
            batches = _batches(loader, progress.epoch, first * accumulation, device, window)
            for index in range(first, steps_per_epoch):
                schedule.step(progress.step)
                _train_step(model, batches, optimizer, loss_fn, progress, train_cfg, precision, window)
                progress.step += 1
                if after_step:
                    after_step(progress)
                last = index == steps_per_epoch - 1
                if progress.step % train_cfg.log_every == 0 or last:
                    _log(run, window, progress, optimizer, train_cfg, log_fn)
                stop = stopping()
                if stop or (not last and _due(progress.step, train_cfg.checkpoint_every)):
                    save(stop)
            batches.close()
            if on_epoch_end:
                on_epoch_end(model, progress)
            progress.epoch += 1
            save(stop=stopping() and progress.epoch < train_cfg.epochs)
            window.restart()
    return progress


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(model, optimizer, progress: Progress, run: Run, extra_state, **notes) -> None:
    """Write checkpoint_last.pth; every process contributes its random state."""
    random_states = gather_objects(random_state())
    extra = extra_state() if extra_state else {}
    if is_main():
        checkpoint = {
            "model": unwrap(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": {**dataclasses.asdict(progress), **notes},
            "rng": random_states,
            "config": run.config.to_dict() if isinstance(run.config, Config) else run.config,
            **extra,
        }
        save_checkpoint(run.dir / "checkpoint_last.pth", checkpoint)
    barrier()  # no process ends, or reads the file, before it is written


def _resume(checkpoint: dict, model, optimizer, progress: Progress, precision: str, device: torch.device) -> str:
    """Put a checkpoint's state in place; return the precision to go on with."""
    missing = [key for key in ("model", "optimizer", "progress", "rng") if key not in checkpoint]
    if missing:
        raise UserError(f"--resume: the checkpoint has no {', '.join(missing)}: it is no training checkpoint")
    position = checkpoint["progress"]
    if position["steps_per_epoch"] != progress.steps_per_epoch:
        raise UserError(
            f"--resume: the checkpoint's epoch has {position['steps_per_epoch']} steps, this run's has "
            f"{progress.steps_per_epoch}: use the same data, batch size, accumulation and number of processes"
        )
    load_state(unwrap(model), checkpoint["model"], "--resume")
    settings = [{key: item for key, item in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError as error:
        raise UserError(f"--resume: the checkpoint's optimizer has other parameter groups ({error})") from None
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    progress.step, progress.epoch = position["step"], position["epoch"]
    if len(checkpoint["rng"]) == world_size():
        set_random_state(checkpoint["rng"][rank()])
    else:
        logger.info("random state not restored: it is of %d processes", len(checkpoint["rng"]))
    same_device = position["device"] == device.type
    checkpoint.clear()  # both hold the same weights by now; at full size the copy is 5 GB a process
    return position["precision"] if precision == "auto" and same_device else precision


def _batches(loader, epoch: int, start_batch: int, device: torch.device, window: _Window):
    """The epoch's batches from `start_batch`, on the device.

    Loading leaves torch's random state as it was: DataLoader draws a seed from it when an epoch starts, and a
    run resumed within the epoch would draw it at another time.
    """
    loader.set_epoch(epoch, start_batch)
    iterator = None
    while True:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            iterator = iter(loader) if iterator is None else iterator
            batch = next(iterator, None)
        if batch is None:
            return
        window.waited += time.perf_counter() - start
        yield to_device(batch, device)


def _train_step(model, batches, optimizer, loss_fn, progress, train_cfg, precision: str, window: _Window) -> None:
    """One optimizer step. A gradient that is not finite changes no weight; `window.check` reports it."""
    for micro in range(train_cfg.accumulation):
        batch = next(batches)
        sync = micro == train_cfg.accumulation - 1 or model is unwrap(model)
        with contextlib.nullcontext() if sync else model.no_sync():
            with autocast(window.device, precision):
                loss, values = loss_fn(model, batch, progress)
            (loss / train_cfg.accumulation).backward()
        window.add_batch(progress.step, batch, loss, values)
    # the norm is the same in all processes, since they share their gradients
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_cfg.clip_grad or math.inf)
    window.norms.append(norm.detach())
    if norm.is_cuda and optimizer.defaults.get("fused"):
        # GradScaler's hook: where it is 1 the kernel skips its update, and nothing waits for the GPU
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()
    else:
        window.check()
    optimizer.zero_grad(set_to_none=True)


class _Window:
    """What the steps since the last log line gave; scalars stay on the device, so that no step waits."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device, self.seconds_per_step = run, device, None
        self.restart()

    def restart(self) -> None:
        self.batches, self.norms, self.values = [], [], {}  # batches: (step, paths, {name: scalar})
        self.pairs, self.waited, self.start = 0, 0.0, time.perf_counter()

    def add_batch(self, step: int, batch: dict, loss: torch.Tensor, values: dict) -> None:
        scalars = {"loss": loss, **values}
        scalars = {key: item.detach() if isinstance(item, torch.Tensor) else item for key, item in scalars.items()}
        for name, item in scalars.items():
            self.values.setdefault(name, []).append(item)
        paths = list(batch.get("paths", ()))
        self.batches.append((step, paths, scalars))
        self.pairs += len(paths) or len(next(item for item in batch.values() if isinstance(item, torch.Tensor)))

    def means(self) -> dict[str, float]:
        """The means over the interval and all processes; here the device is waited for."""
        columns = {**self.values, "grad_norm": self.norms}
        means = [
            torch.stack([torch.as_tensor(item, device=self.device).float() for item in column]).mean()
            for column in columns.values()
        ]
        means = all_reduce_sum(torch.stack(means)) / world_size()
        return dict(zip(columns, means.tolist(), strict=True))

    def check(self) -> None:
        """Raise a UserError, in all processes, if a loss or gradient since the last log was not finite."""
        if not self.norms:
            return
        losses = torch.stack([scalars["loss"].float() for _, _, scalars in self.batches])
        losses = losses.view(len(self.norms), -1)  # [steps, accumulation]
        finite = torch.isfinite(losses).all(1) & torch.isfinite(torch.stack(self.norms))
        bad = all_reduce_sum((~finite).float()).nonzero().flatten().tolist()
        if not bad:
            return
        step = self.batches[0][0] + bad[0]
        mine = []  # this process's micro-batches of that step: (files, names of what is not finite)
        for at, paths, scalars in self.batches:
            if at == step:
                mine.append((paths, [key for key, item in scalars.items() if not math.isfinite(float(item))]))
        batches = [item for items in gather_objects(mine) for item in items]
        batches = [item for item in batches if item[1]] or batches
        terms = sorted({name for _, names in batches for name in names}) or ["the gradient (but no loss)"]
        files = [path for paths, _ in batches for path in paths]
        shown = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        if is_main():
            record = json.dumps({"step": step, "not_finite": terms, "files": files}, indent=1)
            (self.run.dir / "nonfinite.json").write_text(record, encoding="utf-8")
        raise UserError(
            f"step {step}: not finite: {', '.join(terms)}; stopped, this step is not saved. The batch "
            f"(all of it in {self.run.dir / 'nonfinite.json'}): {shown}. "
            "Look at these files, or lower train.lr; --resume goes on from the last checkpoint"
        )


def _log(run: Run, window: _Window, progress: Progress, optimizer, train_cfg: Config, log_fn) -> None:
    """One line of the log and the console for the steps since the last one."""
    window.check()
    values = window.means()
    seconds = time.perf_counter() - window.start
    per_step = seconds / len(window.norms)
    window.seconds_per_step = 0.7 * (window.seconds_per_step or per_step) + 0.3 * per_step
    eta = (progress.total_steps - progress.step) * window.seconds_per_step
    rates = {f"lr_{group.get('name', index)}": group["lr"] for index, group in enumerate(optimizer.param_groups)}
    values |= rates
    values |= {
        "pairs_per_second": window.pairs * world_size() / seconds,
        "data_wait": window.waited / seconds,
    }
    values |= {"memory_gib": _peak_memory(window.device), "eta_seconds": eta}
    values |= {"epoch": progress.step / progress.steps_per_epoch}
    if log_fn:
        values |= log_fn(progress, values) or {}
    run.log(progress.step, values)
    shown = " ".join(f"{key} {values[key]:.3g}" for key in [*window.values, "grad_norm", *rates] if "/" not in key)
    place = f"epoch {progress.epoch + 1}/{train_cfg.epochs} step {progress.step}/{progress.total_steps}"
    speed = f"{values['pairs_per_second']:.1f} pairs/s, data {values['data_wait']:.0%}"
    run.info(f"{place}  {shown}  | {speed}, {values['memory_gib']:.1f} GiB, ETA {clock(eta)}")
    window.restart()


def _peak_memory(device: torch.device) -> float:
    """GiB: the GPU's allocated memory, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextlib.contextmanager
def _stop_signals():
    """Give a function that tells, alike in all processes, whether one of them got SIGINT or SIGTERM.

    The third signal interrupts at once; the second does not, for torchrun passes on the Ctrl-C that the
    terminal has sent to every process already.
    """
    received = []

    def handler(number, _frame):
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt

    def stopping() -> bool:
        # by gloo, so that the GPU's queue is not waited for
        return bool(received) if world_size() == 1 else bool(all_reduce_sum(torch.tensor(len(received))))

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, old in previous.items():
            signal.signal(number, old or signal.SIG_DFL)
