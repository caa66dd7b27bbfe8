"""The logging window: what the steps since the last log line gave, and whether training still goes well."""

from __future__ import annotations

import dataclasses
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

from engine.checkpoint import LastCheckpoints
from engine.length import Progress
from engine.run import Run
from utils import UserError, all_reduce_sum, clock, gather_objects, is_main, on_main, world_size, write_json

USUAL_STEPS = 50  # losses that a jump is told by
# Dense peaks in TFLOP/s (NVIDIA's data sheets), the first name that the device's own contains: (bf16, fp32)
PEAKS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
}


class Window:
    """What the steps since the last log line gave; scalars stay on the device, so that no step waits."""

    def __init__(self, run: Run | None, device: torch.device, operations_fn: Callable[[dict], float] | None = None):
        self.run, self.device, self.seconds_per_step = run, device, None
        self.operations_fn = operations_fn
        self.files: LastCheckpoints | None = None
        self.jump: Jump | None = None  # of the loss, while it lasts
        self.rehearsed = False
        self.done = 0.0  # the share of the training that was over before its last step, which rates are set by
        self.restart()

    def restart(self) -> None:
        self.batches, self.norms, self.values = [], [], {}  # batches: (step, paths, {name: scalar})
        self.checked = 0  # steps that `check` has seen
        self.pairs, self.operations, self.waited, self.start = 0, 0.0, 0.0, time.perf_counter()

    def add_batch(self, step: int, batch: dict, loss: torch.Tensor, values: dict) -> None:
        scalars = {"loss": loss, **values}
        scalars = {key: item.detach() if isinstance(item, torch.Tensor) else item for key, item in scalars.items()}
        for name, item in scalars.items():
            self.values.setdefault(name, []).append(item)
        paths = list(batch.get("paths", ()))
        self.batches.append((step, paths, scalars))
        if self.operations_fn:
            self.operations += self.operations_fn(batch)
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

    def check(self, progress: Progress) -> None:
        """Look, in all processes, at the losses and gradients since the last look.

        Raises UserError where one is not finite. A loss that left its usual range sets `jump`; a checkpoint whose
        weights gave it is put aside.
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
            self.jump = find_jump(progress.losses, step, loss, self.jump)
            if self.jump is None:
                progress.losses = [*progress.losses[-USUAL_STEPS + 1 :], loss]
        diverged = first + bad[0] if bad else self.jump and self.jump.step
        files, steps_per_epoch = self.files, progress.steps_per_epoch
        line = on_main(lambda: files.withdraw(diverged, steps_per_epoch)) if diverged and files else None
        if line:
            self.run.info(f"warning: the weights of step {diverged} had diverged: {line}")
        if bad:
            raise self.not_finite(first + bad[0])

    def not_finite(self, step: int) -> UserError:
        """The error of a step with a loss or gradient that is not finite; its batch goes into nonfinite.json."""
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
            write_json(self.run.dir / "nonfinite.json", {"step": step, "not_finite": terms, "files": files})
        return UserError(
            f"step {step}: not finite: {', '.join(terms)}; stopped, this step is not saved. The batch "
            f"(all of it in {self.run.dir / 'nonfinite.json'}): {shown}. "
            "Look at these files, or lower train.lr; --resume goes on from the last checkpoint"
        )


@dataclasses.dataclass
class Jump:
    """A loss that left its usual range: the step that saw it, counted from 0, the loss, and the usual one."""

    step: int
    loss: float
    usual: float


def find_jump(usual: list[float], step: int, loss: float, lasting: Jump | None = None) -> Jump | None:
    """Whether `loss` is far above the losses of the last good steps; `lasting` is the jump that has not ended yet.

    Far: above their median by more than 1, by more than the median itself and by ten times their median deviation, as
    no single bad batch is. With fewer than three losses nothing is known yet.
    """
    if len(usual) < 3:
        return None
    middle = statistics.median(usual)
    spread = statistics.median(abs(value - middle) for value in usual)
    if loss - middle <= max(1.0, abs(middle), 10 * spread):
        return None
    return lasting or Jump(step, loss, middle)


def log_window(
    run: Run, window: Window, progress: Progress, optimizer: torch.optim.Optimizer, log_fn: Callable | None
) -> None:
    """One line of the log and the console for the steps since the last one."""
    window.check(progress)
    values = window.means()
    seconds = time.perf_counter() - window.start
    per_step = seconds / len(window.norms)
    window.seconds_per_step = 0.7 * (window.seconds_per_step or per_step) + 0.3 * per_step
    eta = progress.remaining(window.seconds_per_step)
    rates = {f"lr_{group.get('name', index)}": group["lr"] for index, group in enumerate(optimizer.param_groups)}
    values |= rates
    values |= {
        "pairs_per_second": window.pairs * world_size() / seconds,
        "data_wait": window.waited / seconds,
    }
    values |= _utilisation(window, seconds, progress.precision)
    values |= {"memory_gib": _peak_memory(window.device), "eta_seconds": eta}
    values |= {"epoch": progress.step / progress.steps_per_epoch}
    if progress.minutes is not None:
        values |= {"done": window.done, "minutes": progress.seconds / 60}
    if log_fn:
        values |= log_fn(progress, values) or {}
    run.log(progress.step, values)
    shown = " ".join(f"{key} {values[key]:.3g}" for key in [*window.values, "grad_norm", *rates] if "/" not in key)
    speed = f"{values['pairs_per_second']:.1f} pairs/s, data {values['data_wait']:.0%}"
    if "mfu" in values:
        speed += f", MFU {values['mfu']:.0%}"
    run.info(f"{progress.place()}  {shown}  | {speed}, {values['memory_gib']:.1f} GiB, ETA {clock(eta)}")
    window.restart()


def _utilisation(window: Window, seconds: float, precision: str) -> dict[str, float]:
    """TFLOP/s of this process, and the share of its GPU's peak where that is known: model FLOP utilisation (MFU)."""
    if not window.operations:
        return {}
    tflops = window.operations / seconds / 1e12
    name = torch.cuda.get_device_name(window.device) if window.device.type == "cuda" else "cpu"
    peak = peak_tflops(name, precision)
    return {"tflops": tflops} if peak is None else {"tflops": tflops, "mfu": tflops / peak}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """A GPU's peak of matrix products in `precision` (bf16 | fp32), None if it is not known."""
    for name, (bf16, fp32) in PEAKS.items():
        if name in device_name:
            return bf16 if precision == "bf16" else fp32
    return None


def _peak_memory(device: torch.device) -> float:
    """GiB: the GPU's allocated memory, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
