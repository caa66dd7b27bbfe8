"""THE training loop of every stage: optimizer steps, the logging window, stop signals, saving and resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable

import torch

from engine.checkpoint import DIVERGED, LastCheckpoints, random_state, set_random_state
from engine.config import Config
from engine.distributed import Transfer, rehearse, stop_signals
from engine.length import Progress, Stopwatch, beginning, check_steps, go_on
from engine.run import Run
from engine.window import Jump, Window, log_window
from models.weights import load_exactly
from utils import (
    Stopped,
    UserError,
    all_reduce_sum,
    autocast,
    gather_objects,
    logger,
    on_main,
    rank,
    resolve_precision,
    save_checkpoint,
    unwrap,
    world_size,
)


def position(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: int,
    train_cfg: Config,
    device: torch.device,
    resume_from: dict | None = None,
) -> Progress:
    """Where training begins, or goes on: the state of `resume_from`, which is emptied, is put in place.

    batches: micro-batches of an epoch. The optimizer's settings (rates, decay) come from the configuration. Raises
    UserError where the checkpoint does not fit.
    """
    progress, precision = beginning(train_cfg, batches), train_cfg.precision
    if resume_from is not None:
        check_steps(train_cfg, resume_from, progress.steps_per_epoch)
        precision = _resume(resume_from, model, optimizer, progress, precision, device)
        logger.info("resumed at %s", progress)
    progress.precision = resolve_precision(precision, device)
    return progress


def fit(
    model: torch.nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    schedule,
    progress: Progress,
    *,
    train_cfg: Config,
    run: Run,
    device: torch.device,
    loss_fn: Callable,
    after_step: Callable[[Progress], object] | None = None,
    on_epoch_end: Callable[[torch.nn.Module, Progress], object] | None = None,
    extra_state: Callable[[], dict] | None = None,
    log_fn: Callable[[Progress, dict], dict | None] | None = None,
    count_fn: Callable[[dict], int | torch.Tensor] | None = None,
    operations_fn: Callable[[dict], float] | None = None,
) -> Jump | None:
    """Train from `progress` to the end, or raise Stopped after a signal. Returns the jump of the loss that lasts at the
    end, if there is one: the last checkpoint is then older than the model.

    `loader` yields dicts of tensors (and lists, e.g. `paths`) and has `set_epoch(epoch, start_batch)`.
    `loss_fn(model, batch, progress) -> (loss, values)` runs under autocast for each of the `accumulation`
    micro-batches; `values` are scalars (tensors or numbers; the same names in all processes), logged as means
    over the interval, on the console too where the name has no "/". `schedule.step(n, done)` sets the rates of step n,
    before which the share `done` of the training is over. `after_step(progress)` follows every optimizer step,
    `on_epoch_end(model, progress)` every epoch and the last step, which may lie within an epoch, while `progress.epoch`
    still is that epoch's number from 0; where it raises Stopped, the resumed run repeats it.
    `log_fn(progress, means)` may return further values to log, `operations_fn(batch)` tells how many floating-point
    operations a micro-batch takes, for the log. All of them are called in all processes.

    Every micro-batch weighs the same in a step, which is the step of one large batch where its loss is a mean over
    equally many items. Where it is a mean over, say, tokens, `count_fn(batch)` tells how many a micro-batch has (before
    it is on the device): all of a step are then read before the first forward pass, and each gets `batch["share"]`, by
    which the loss multiplies that mean: its count over the mean count of the step's, all processes taken together.

    Checkpoints hold model, optimizer, position in the data, random state, configuration and `extra_state()`.
    """
    window, transfer = Window(run, device, operations_fn), Transfer(device)
    saver = _Saver(model, optimizer, progress, run, extra_state, window, train_cfg.keep_checkpoints)
    watch = Stopwatch(progress)
    with stop_signals() as stopping:
        while not (progress.over and progress.followed == progress.step):
            model.train()
            watch.go()
            first = progress.step - progress.epoch * progress.steps_per_epoch
            batches = _batches(loader, progress.epoch, first * train_cfg.accumulation, window)
            ended = progress.over or progress.epoch_over
            while not ended:
                window.done = progress.done
                schedule.step(progress.step, window.done)
                step_batches = _step_batches(batches, train_cfg.accumulation, count_fn)
                _train_step(model, map(transfer, step_batches), optimizer, loss_fn, progress, train_cfg, window)
                progress.step += 1
                if after_step:
                    after_step(progress)
                watch.look()
                ended = progress.over or progress.epoch_over
                if progress.step % train_cfg.log_every == 0 or ended:
                    log_window(run, window, progress, optimizer, log_fn)
                stop = stopping()
                if stop or (not ended and _due(progress.step, train_cfg.checkpoint_every)):
                    saver.save(stop)
            batches.close()
            if on_epoch_end:
                before = random_state()
                try:
                    on_epoch_end(model, progress)
                except Stopped:
                    set_random_state(before)
                    saver.save(stop=True)
            progress.followed = progress.step
            progress.epoch += progress.epoch_over
            saver.save(stop=stopping())  # also after the last epoch: what follows it can be long
            window.restart()
    return window.jump


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Saver:
    """Writes the last checkpoints of `fit`; a state that has diverged never takes the place of a good one."""

    def __init__(self, model, optimizer, progress: Progress, run: Run, extra_state, window, keep: int):
        self.model, self.optimizer, self.progress, self.run = model, optimizer, progress, run
        self.extra_state, self.window = extra_state, window
        self.files = LastCheckpoints(run.dir, keep)
        window.files = self.files

    def save(self, stop: bool = False) -> None:
        """Called in all processes, each of which contributes its random state. With `stop`: raise Stopped after it."""
        progress = self.progress
        self.window.check(progress)
        random_states = gather_objects(random_state())
        extra = self.extra_state() if self.extra_state else {}
        on_main(lambda: self._write(random_states, extra))
        if stop:
            self.run.info(f"stopped at {progress}; continue with --resume")
            raise Stopped

    def _write(self, random_states: list[dict], extra: dict) -> None:
        step, jump, config = self.progress.step, self.window.jump, self.run.config
        state = unwrap(self.model).state_dict()
        if wrong := not_finite(state):
            line = self.files.withdraw(step, self.progress.steps_per_epoch)
            raise UserError(
                f"step {step}: {len(wrong)} weights are not finite ({', '.join(wrong[:3])}); not saved. "
                f"Lower train.lr; --resume goes on from the last checkpoint{f': {line}' if line else ''}"
            )
        if jump is not None:
            self.run.info(
                f"warning: the loss jumped from {jump.usual:.4g} to {jump.loss:.4g} in step {jump.step}: step {step} "
                f"is saved as {DIVERGED}, the last checkpoints stay; to go on from them, lower train.lr and --resume"
            )
        checkpoint = {
            "model": state,
            "optimizer": self.optimizer.state_dict(),
            "progress": {**dataclasses.asdict(self.progress), "device": self.window.device.type},
            "rng": random_states,
            "config": config.to_dict() if isinstance(config, Config) else config,
            **extra,
        }
        self.files.save(checkpoint) if jump is None else save_checkpoint(self.run.dir / DIVERGED, checkpoint)


def not_finite(state: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that hold an infinity or NaN; a GPU is waited for once."""
    names = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()]
    if not names:
        return []
    finite = torch.stack([torch.isfinite(state[name]).all() for name in names])
    return [name for name, good in zip(names, finite.tolist(), strict=True) if not good]


def _resume(checkpoint: dict, model, optimizer, progress: Progress, precision: str, device: torch.device) -> str:
    """Put a checkpoint's state in place; return the precision to go on with."""
    found = checkpoint["progress"]
    same_ranks = len(checkpoint["rng"]) == world_size()
    if found["steps_per_epoch"] != progress.steps_per_epoch and same_ranks:
        raise UserError(
            f"--resume: the checkpoint's epoch has {found['steps_per_epoch']} steps, this run's has "
            f"{progress.steps_per_epoch}: use the same data, batch size, accumulation and number of processes"
        )
    load_exactly(unwrap(model), checkpoint["model"], "--resume", "the checkpoint is of another model")
    settings = [{key: item for key, item in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: the checkpoint's optimizer has other parameter groups ({error})") from None
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    go_on(progress, found)
    if same_ranks:
        set_random_state(checkpoint["rng"][rank()])
    same_device = found["device"] == device.type
    checkpoint.clear()  # both hold the same weights by now; at full size the copy is 5 GB a process
    return found["precision"] if precision == "auto" and same_device else precision


def _batches(loader, epoch: int, start_batch: int, window: Window):
    """The epoch's batches from `start_batch`, as they come from the loader.

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
        yield batch


def _step_batches(batches, accumulation: int, count_fn: Callable | None):
    """The micro-batches of a step; where they are counted and there are several, with their `share` (see `fit`)."""
    if count_fn is None or accumulation == 1:
        return itertools.islice(batches, accumulation)
    step = list(itertools.islice(batches, accumulation))
    counts = all_reduce_sum(torch.tensor([float(count_fn(batch)) for batch in step], dtype=torch.float64))
    shares = counts / counts.mean().clamp(min=1e-9)
    return [{**batch, "share": share} for batch, share in zip(step, shares.float(), strict=True)]


def _train_step(model, batches, optimizer, loss_fn, progress: Progress, train_cfg, window: Window) -> None:
    """One optimizer step. A gradient that is not finite changes no weight; `window.check` reports it."""
    for micro, batch in enumerate(batches):

        def forward(batch: dict = batch) -> tuple[torch.Tensor, dict]:
            with autocast(window.device, progress.precision):
                return loss_fn(model, batch, progress)

        distributed = model is not unwrap(model)
        if distributed and not window.rehearsed:
            rehearse(model, lambda forward=forward: forward()[0])
            window.rehearsed = True
        sync = not distributed or micro == train_cfg.accumulation - 1
        with contextlib.nullcontext() if sync else model.no_sync():
            loss, values = forward()
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
        window.check(progress)
    optimizer.zero_grad(set_to_none=True)
