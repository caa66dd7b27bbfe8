"""The logging window: what the steps since the last log line gave, and whether training still goes well."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoint import Progress
from engine.run import Run
from utils import UserError, all_reduce_sum, clock, gather_objects, is_main, world_size, write_json

USUAL_STEPS = 50  # losses by which a jump is recognized


class Window:
    """What the steps since the last log line gave; scalars stay on the device, so that no step waits."""

    def __init__(self, run: Run | None, device: torch.device):
        self.run, self.device, self.seconds_per_step = run, device, None
        self.jump: tuple[int, float, float] | None = None  # (step, loss, usual loss), while it lasts
        self.rehearsed = False
        self.done = 0.0  # the share of the training that was over before its last step, which rates are set by
        self.restart()

    def restart(self) -> None:
        self.batches, self.norms, self.values = [], [], {}  # batches: (step, paths, {name: scalar})
        self.checked = 0  # steps that `check` has seen
        self.pairs, self.operations, self.waited, self.start = 0, 0.0, 0.0, time.perf_counter()

    def add(self, step: int, batch: dict, loss: Tensor, values: dict, operations: float) -> None:
        """What a micro-batch gave."""
        scalars = {"loss": loss, **values}
        scalars = {key: item.detach() if isinstance(item, Tensor) else item for key, item in scalars.items()}
        for name, item in scalars.items():
            self.values.setdefault(name, []).append(item)
        paths = list(batch.get("paths", ()))
        self.batches.append((step, paths, scalars))
        self.operations += operations
        self.pairs += len(paths) or len(next(item for item in batch.values() if isinstance(item, Tensor)))

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
        if is_main():
            write_json(self.run.dir / "nonfinite.json", {"step": step, "not_finite": terms, "files": files})
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
        columns = {**self.values, "grad_norm": self.norms}
        means = [
            torch.stack([torch.as_tensor(item, device=self.device).float() for item in column]).mean()
            for column in columns.values()
        ]
        means = all_reduce_sum(torch.stack(means)) / world_size()
        values = dict(zip(columns, means.tolist(), strict=True))
        seconds = time.perf_counter() - self.start
        per_step = seconds / len(self.norms)
        self.seconds_per_step = 0.7 * (self.seconds_per_step or per_step) + 0.3 * per_step
        eta = progress.remaining(self.seconds_per_step)
        rates = {f"lr_{group.get('name', index)}": group["lr"] for index, group in enumerate(optimizer.param_groups)}
        values |= rates
        values |= {"pairs_per_second": self.pairs * world_size() / seconds, "data_wait": self.waited / seconds}
        values |= utilization(self.operations / seconds / 1e12, self.device, progress.precision)
        values |= {"memory_gib": peak_memory(self.device), "eta_seconds": eta}
        values["epoch"] = progress.step / progress.steps_per_epoch
        if progress.minutes is not None:
            values |= {"done": self.done, "minutes": progress.seconds / 60}
        values |= more(progress, values)
        self.run.log(progress.step, values)
        shown = " ".join(f"{key} {values[key]:.3g}" for key in [*self.values, "grad_norm", *rates] if "/" not in key)
        speed = f"{values['pairs_per_second']:.1f} pairs/s, data {values['data_wait']:.0%}"
        if "mfu" in values:
            speed += f", MFU {values['mfu']:.0%}"
        self.run.info(f"{progress}  {shown}  | {speed}, {values['memory_gib']:.1f} GiB, ETA {clock(eta)}")
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
