"""THE training loop of every stage.

`Training` is what a step moves: the model, its optimizer and the place in the data. A stage's `Task` says what the loss
is and what follows a step and an epoch. `fit` makes the steps, logs them and writes the checkpoints, from which a
stopped run resumes bit by bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import utils
from engine.checkpoint import Progress, position, random_state, save_last, set_random_state
from engine.distributed import Transfer, compile_model, prepare_cpu, rehearse, stop_signals, wrap_ddp
from engine.run import Run
from models.weights import check_finite
from optim import create_optimizer
from scheduler import WarmupCosine
from utils import Stopped, UserError, all_reduce_sum, gather_objects, logger, world_size

USUAL_STEPS = 50  # losses by which a jump is recognized


class Task:
    """What a stage does with the loop; every method is called in all processes."""

    count: Any = None
    """(batch) -> the items (tokens) that a micro-batch's loss is a mean over, if micro-batches have unequally many.

    Then all of a step's micro-batches are read before its first forward pass, and each gets `batch["share"]`, by which
    the loss multiplies its mean: its count over the mean count of the step's, all processes taken together. Without it
    every micro-batch weighs the same.
    """

    def prepare(self, batch: dict) -> dict:
        """What is added to a micro-batch on the CPU, before it travels to the device."""
        return batch

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[Tensor, dict]:
        """-> (the loss of a micro-batch, scalars to log: tensors or numbers, the same names in all processes).

        model: in DistributedDataParallel if there are several processes; called under autocast. The scalars' means are
        logged, on the console too if the name has no "/".
        """
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """What follows every optimizer step."""

    def after_epoch(self, progress: Progress) -> None:
        """What follows every epoch and the last step, which may lie within an epoch; `progress.epoch` still is that
        epoch's number from 0. After Stopped, the resumed run repeats it."""

    def state(self) -> dict:
        """Further entries of a checkpoint."""
        return {}

    def log(self, progress: Progress, means: dict) -> dict:
        """Further values to log beside the means since the last time."""
        return {}

    def operations(self, batch: dict) -> float:
        """The floating-point operations of a micro-batch's step, for the log; 0 if they are not known."""
        return 0.0


@dataclasses.dataclass
class Training:
    """What a step moves. `loader` yields dicts of tensors (and lists, e.g. `paths`) and has `set_epoch(epoch,
    start_batch)`; `schedule.step(n, done)` sets the rates of step n, before which the share `done` is over; data: the
    data set's fingerprint."""

    model: nn.Module
    loader: Iterable
    optimizer: torch.optim.Optimizer
    schedule: Any
    progress: Progress
    device: torch.device
    data: str = ""


def start_training(
    model: nn.Module,
    loader: Iterable,
    cfg: utils.Config,
    device: torch.device,
    resume_from: dict | None = None,
    pretrained_vit: bool = True,
) -> Training:
    """A training at its beginning, or at the state of `resume_from`, which is emptied; seeds the random generators.

    pretrained_vit: whether the image encoder starts from trained weights, which `train.lr_vit` protects; else it learns
    at `train.lr`. Raises UserError if an epoch has no batch for a single step or the checkpoint does not fit.
    """
    train, batches = cfg.train, len(loader)
    if batches < train.accumulation:
        few = f"{len(loader.dataset)} training entries are too few for one step"
        raise UserError(f"{few}: lower train.batch_size ({train.batch_size}) or train.accumulation")
    if device.type == "cpu":
        prepare_cpu()
    lr, lr_vit = train.lr, train.lr_vit if pretrained_vit else train.lr
    optimizer = create_optimizer(model, lr=lr, lr_vit=lr_vit, weight_decay=train.weight_decay, betas=train.betas)
    steps = Progress.start(train, batches).total_steps
    if steps is not None and train.warmup_steps >= steps:
        logger.info("warning: train.warmup_steps %d >= %d steps: lr never reaches its peak", train.warmup_steps, steps)
    schedule = WarmupCosine(optimizer, total_steps=steps, warmup_steps=train.warmup_steps, min_lr=train.min_lr)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"{trainable / 1e6:.1f}M trainable parameters, {batches} batches an epoch, "
        f"{f'{train.minutes:g} minutes' if steps is None else f'{steps} steps'}; "
        f"global batch {train.batch_size * train.accumulation * world_size()}: {train.batch_size} x {world_size()} "
        f"(processes) x {train.accumulation} (accumulation); "
        f"learning rates {lr:.2e}, image encoder {lr_vit:.2e}"
    )
    data = loader.dataset.fingerprint()
    if resume_from and resume_from.get("data", data) != data:
        problem = "data.train has other entries, or another order of them, than when the run was stopped"
        raise UserError(f"--resume: {problem}; use the same files, or start a new run with --checkpoint")
    before = [group["lr"] for group in resume_from["optimizer"]["param_groups"]] if resume_from else []
    utils.seed_everything(cfg.seed)  # from here on every process draws its own noise
    progress = position(model, optimizer, batches, train, device, resume_from)
    if before and not progress.over:
        schedule.step(progress.step, progress.done)
        rise = max(group["lr"] / max(1e-30, rate) for group, rate in zip(optimizer.param_groups, before, strict=True))
        if rise > 1.01 and progress.step > train.warmup_steps:
            logger.info("warning: --resume: a new length or new rates raise the learning rate %.3g times", rise)
    if train.compile:
        compile_model(model)
    return Training(model, loader, optimizer, schedule, progress, device, data)


# ------------------------------------------------------------------------------------------------------- the loop


def fit(training: Training, task: Task, run: Run) -> None:
    """Train from `training.progress` to the end, or raise Stopped after a signal; the run is open.

    Raises UserError, with nothing saved, if a loss, gradient or weight is not finite, or if the loss left its usual
    range and has not returned by the next checkpoint: the last good checkpoint stays.
    """
    train, progress, loader = run.config.train, training.progress, training.loader
    model = wrap_ddp(training.model, training.device)
    window, transfer = Window(run, training.device), Transfer(training.device)
    with stop_signals() as stopping:
        while not (progress.over and progress.followed == progress.step):
            model.train()
            last = time.perf_counter()
            first = progress.step - progress.epoch * progress.steps_per_epoch
            batches = read_batches(loader, progress.epoch, first * train.accumulation, window)
            ended = progress.over or progress.epoch_over
            while not ended:
                window.done = progress.done
                training.schedule.step(progress.step, window.done)
                micro_batches = map(transfer, map(task.prepare, step_batches(batches, train.accumulation, task.count)))
                train_step(model, micro_batches, training, task, window)
                progress.step += 1
                task.after_step(progress)
                last = progress.add_time(last)
                ended = progress.over or progress.epoch_over
                if progress.step % train.log_every == 0 or ended:
                    window.log(progress, training.optimizer, task.log)
                stop, every = stopping(), train.checkpoint_every
                if stop or (not ended and every > 0 and progress.step % every == 0):
                    save(training, task, run, window, stop)
            batches.close()
            before = random_state()
            try:
                task.after_epoch(progress)
            except Stopped:
                set_random_state(before)
                save(training, task, run, window, stop=True)
            progress.followed = progress.step
            progress.epoch += progress.epoch_over
            save(training, task, run, window, stop=stopping())  # also after the last epoch: what follows it can be long
            window.restart()


def read_batches(loader, epoch: int, start_batch: int, window: Window) -> Iterator[dict]:
    """The epoch's batches from `start_batch`, as they come from the loader.

    Loading leaves torch's random state as it was: DataLoader draws a seed from it when an epoch starts, and a run
    resumed within the epoch would draw it at another time.
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


def step_batches(batches: Iterator[dict], accumulation: int, count) -> Iterable[dict]:
    """The micro-batches of a step; if they are counted and there are several, with their `share` (see `Task.count`)."""
    if count is None or accumulation == 1:
        return itertools.islice(batches, accumulation)
    step = list(itertools.islice(batches, accumulation))
    counts = all_reduce_sum(torch.tensor([float(count(batch)) for batch in step], dtype=torch.float64))
    shares = counts / counts.mean().clamp(min=1e-9)
    return [{**batch, "share": share} for batch, share in zip(step, shares.float(), strict=True)]


def train_step(model: nn.Module, batches: Iterable[dict], training: Training, task: Task, window: Window) -> None:
    """One optimizer step. A gradient that is not finite changes no weight; `window.check` reports it.

    model: the training's, in DistributedDataParallel if there are several processes.
    """
    optimizer, progress, train = training.optimizer, training.progress, window.run.config.train
    distributed = model is not training.model

    def forward(batch: dict) -> tuple[Tensor, dict]:
        with utils.autocast(training.device, progress.precision):
            return task.loss(model, batch, progress)

    for micro, batch in enumerate(batches):
        if distributed and not window.rehearsed:
            rehearse(model, forward, batch)
            window.rehearsed = True
        sync = not distributed or micro == train.accumulation - 1
        with contextlib.nullcontext() if sync else model.no_sync():
            loss, values = forward(batch)
            (loss / train.accumulation).backward()
        window.add(progress.step, batch, loss, values, task.operations(batch))
    # the norm is the same in all processes, since they share their gradients
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad or math.inf)
    window.norms.append(norm.detach())
    if norm.is_cuda and optimizer.defaults.get("fused"):
        # GradScaler's hook: if it is 1 the kernel skips its update, and nothing waits for the GPU
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()
    else:
        window.check(progress)
    optimizer.zero_grad(set_to_none=True)


def save(training: Training, task: Task, run: Run, window: Window, stop: bool = False) -> None:
    """Write the last checkpoint; called in all processes, each of which adds its random state. stop: raise Stopped."""
    progress = training.progress
    window.check(progress)
    if window.jump:
        step, loss, usual = window.jump
        jump = f"the loss jumped from {usual:.4g} to {loss:.4g} in step {step} and stayed there"
        raise UserError(f"{jump}: stopped, not saved. Lower train.lr; --resume continues from the last checkpoint")
    state, advice = training.model.state_dict(), "Lower train.lr; --resume continues from the last checkpoint"
    check_finite(state, f"step {progress.step}", f"not saved. {advice}")
    checkpoint = {
        "model": state,
        "optimizer": training.optimizer.state_dict(),
        "progress": {**dataclasses.asdict(progress), "device": training.device.type},
        "rng": gather_objects(random_state()),
        "config": run.config.to_dict(),
        "data": training.data,
        **task.state(),
    }
    utils.on_main(lambda: save_last(run.dir, checkpoint, run.config.train.keep_checkpoints))
    if stop:
        run.info(f"stopped at {progress}; continue with --resume")
        raise Stopped


# ---------------------------------------------------------------------------------------------- the logging window


class Window:
    """What the steps since the last log line gave; scalars stay on the device, so that no step waits."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device = run, device
        self.jump: tuple[int, float, float] | None = None  # (step, loss, usual loss), while it lasts
        self.rehearsed = False
        self.done = 0.0  # the share of the training that was over before its last step, which rates are set by
        self.restart()

    def restart(self) -> None:
        self.batches, self.norms = [], []  # batches: (step, paths, {name: scalar})
        self.checked = 0  # steps that `check` has seen
        self.operations, self.waited, self.start = 0.0, 0.0, time.perf_counter()

    def add(self, step: int, batch: dict, loss: Tensor, values: dict, operations: float) -> None:
        """What a micro-batch gave."""
        scalars = {"loss": loss, **values}
        scalars = {key: item.detach() if isinstance(item, Tensor) else item for key, item in scalars.items()}
        self.batches.append((step, list(batch["paths"]), scalars))
        self.operations += operations

    def check(self, progress: Progress) -> None:
        """Look, in all processes, at the losses and gradients since the last look.

        Raises UserError if one is not finite. A loss that left its usual range sets `jump`, until one is back in it.
        """
        norms = self.norms[self.checked :]
        if not norms:
            return
        batches = self.batches[self.checked * len(self.batches) // len(self.norms) :]
        losses = torch.stack([scalars["loss"].float() for _, _, scalars in batches]).view(len(norms), -1).mean(1)
        total = all_reduce_sum(torch.stack([losses, torch.stack(norms).float()])) / world_size()  # [2, steps]
        losses, bad = total[0].tolist(), (~torch.isfinite(total).all(0)).nonzero().flatten().tolist()
        self.checked = len(self.norms)
        first = batches[0][0]
        for step, loss in enumerate(losses[: bad[0] if bad else None], first):
            if (usual := usual_if_far(progress.losses, loss)) is not None:
                self.jump = self.jump or (step, loss, usual)
            else:
                self.jump, progress.losses = None, [*progress.losses[-USUAL_STEPS + 1 :], loss]
        if bad:
            raise self._not_finite(first + bad[0])

    def _not_finite(self, step: int) -> UserError:
        """The error of a step with a loss or gradient that is not finite; its batch goes into nonfinite.json."""
        mine = [  # this process's micro-batches of that step: (files, names of what is not finite)
            (paths, [key for key, item in scalars.items() if not math.isfinite(float(item))])
            for at, paths, scalars in self.batches
            if at == step
        ]
        batches = [item for items in gather_objects(mine) for item in items]
        batches = [item for item in batches if item[1]] or batches
        terms = sorted({name for _, names in batches for name in names}) or ["the gradient (but no loss)"]
        files = [path for paths, _ in batches for path in paths]
        if utils.is_main():
            utils.write_json(self.run.dir / "nonfinite.json", {"step": step, "not_finite": terms, "files": files})
        return UserError(
            f"step {step}: not finite: {', '.join(terms)}; stopped, this step is not saved. Look at the batch's files "
            f"({', '.join(files[:8])}; all in {self.run.dir / 'nonfinite.json'}), or lower train.lr; --resume "
            "continues from the last checkpoint"
        )

    def log(self, progress: Progress, optimizer: torch.optim.Optimizer, more: Callable[[Progress, dict], dict]) -> None:
        """One line of the log and the console for the steps since the last one; here the device is waited for.

        more: adds values, given the progress and the means.
        """
        self.check(progress)
        names = self.batches[0][2]
        columns = {name: [scalars[name] for _, _, scalars in self.batches] for name in names}
        columns["grad_norm"] = self.norms
        means = [
            torch.stack([torch.as_tensor(item, device=self.device).float() for item in column]).mean()
            for column in columns.values()
        ]
        means = all_reduce_sum(torch.stack(means)) / world_size()
        values = dict(zip(columns, means.tolist(), strict=True))
        seconds, pairs = time.perf_counter() - self.start, sum(len(paths) for _, paths, _ in self.batches)
        eta = progress.remaining(seconds / len(self.norms))
        rates = {f"lr_{group.get('name', index)}": group["lr"] for index, group in enumerate(optimizer.param_groups)}
        values |= rates
        values |= {"pairs_per_second": pairs * world_size() / seconds, "data_wait": self.waited / seconds}
        values |= utilization(self.operations / seconds / 1e12, self.device, progress.precision)
        values |= {"memory_gib": peak_memory(self.device), "eta_seconds": eta}
        values["epoch"] = progress.step / progress.steps_per_epoch
        if progress.minutes is not None:
            values |= {"done": self.done, "minutes": progress.seconds / 60}
        values |= more(progress, values)
        self.run.log(progress.step, values)
        shown = " ".join(f"{key} {values[key]:.3g}" for key in [*columns, *rates] if "/" not in key)
        speed = f"{values['pairs_per_second']:.1f} pairs/s, data {values['data_wait']:.0%}"
        if "mfu" in values:
            speed += f", MFU {values['mfu']:.0%}"
        self.run.info(f"{progress}  {shown}  | {speed}, {values['memory_gib']:.1f} GiB, ETA {utils.clock(eta)}")
        self.restart()


def usual_if_far(losses: list[float], loss: float) -> float | None:
    """The median of the last good losses if `loss` is far above it, else None.

    Far: by more than 1, by more than the median itself and by ten times their median deviation, as no single bad batch
    is. With fewer than three losses nothing is known yet.
    """
    if len(losses) < 3:
        return None
    middle = statistics.median(losses)
    spread = statistics.median(abs(value - middle) for value in losses)
    return middle if loss - middle > max(1.0, abs(middle), 10 * spread) else None


# Peak TFLOP/s of dense matrix products (bf16, fp32), from NVIDIA's data sheets.
PEAKS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
}


def utilization(tflops: float, device: torch.device, precision: str) -> dict[str, float]:
    """TFLOP/s of this process, and their share of its GPU's peak if that is known (MFU); {} for 0."""
    peak = peak_tflops(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", precision)
    return {} if not tflops else {"tflops": tflops} if peak is None else {"tflops": tflops, "mfu": tflops / peak}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """A GPU's peak of matrix products in `precision` (bf16 | fp32), None if it is not known."""
    return next((peak[precision != "bf16"] for name, peak in PEAKS.items() if name in device_name), None)


def peak_memory(device: torch.device) -> float:
    """GiB: the GPU's allocated memory, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
