"""How processes share an evaluation: each takes every n-th batch, all get all results, each item has exactly one.

Batches are cut before they are shared, so their content, and with it every result to the last digit, does not depend on
the number of processes.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from utils import (
    Stopped,
    all_reduce_sum,
    child_signals,
    clock,
    gather_objects,
    logger,
    rank,
    stop_requested,
    world_size,
)

CPU = torch.device("cpu")
QUIET = 10.0  # seconds between lines of progress; work that takes less is not mentioned


def eval_batches(num_items: int, batch_size: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Index lists of this process: the items (in `order`, if given) cut into batches, every world-size-th batch."""
    order = range(num_items) if order is None else order
    batches = [list(order[start : start + batch_size]) for start in range(0, num_items, batch_size)]
    return batches[rank() :: world_size()]


def eval_loader(dataset: Dataset, batch_size: int | None, *, num_workers: int, device: torch.device) -> DataLoader:
    """This process's share of a data set; batch_size None: the data set's items are batches already."""
    options = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "worker_init_fn": child_signals}
    if batch_size is None:
        return DataLoader(Subset(dataset, range(rank(), len(dataset), world_size())), batch_size=None, **options)
    return DataLoader(dataset, batch_sampler=eval_batches(len(dataset), batch_size), **options)


def run_sharded(
    batches: Iterable,
    compute: Callable[..., tuple[Sequence[int] | Tensor, Tensor | Sequence]],
    total: int | None,
    *,
    label: str,
    unit: str,
    device: torch.device = CPU,
) -> Tensor | list:
    """The results of all items, in their order, in every process; called in all processes.

    Args:
        batches: this process's share, of `eval_batches` or `eval_loader`.
        compute: batch -> (places [n] of its items among all, results: a tensor [n, ...] or n picklable objects).
        total: the number of items, over all processes; None: as many as come, numbered without gaps.
        label, unit: what is done with what, for lines of progress ("answering val", "questions").
        device: where a tensor of results is gathered.

    Returns:
        A tensor [total, ...] or a list of `total` objects, as `compute` gives them.

    Raises:
        RuntimeError: an item has no result, or more than one.
        Stopped: a process was asked to stop meanwhile.
    """
    found, progress = Gathered(label, device), ProgressLine(label, unit, (total or 0) / world_size())
    for batch in batches:
        if stop_requested():
            break
        places, results = compute(batch)
        found.put(places, results)
        progress.advance(len(places))
    return found.collect(total)[0]


class Gathered:
    """Columns of results (a row an item) to which every process adds the rows that it has computed.

    what: names them in an error; device: where tensors are gathered, by the processes' sum over zeros (exact).
    """

    def __init__(self, what: str, device: torch.device = CPU):
        self.what, self.device = what, device
        self.places: list[Tensor] = []
        self.columns: list[list[Tensor | Sequence]] = []  # per column the parts that `put` was given

    def put(self, places: Sequence[int] | Tensor, *columns: Tensor | Sequence) -> None:
        """Add n rows. places: [n] of each among all rows; columns: tensors [n, ...] or n picklable objects each."""
        self.places.append(torch.as_tensor(places, dtype=torch.int64).cpu())
        self.columns = self.columns or [[] for _ in columns]
        for parts, column in zip(self.columns, columns, strict=True):
            parts.append(column)

    def collect(self, total: int | None) -> list[Tensor | list]:
        """Every column with all processes' rows in order, in every process; called in all, and once.

        total: how many rows there must be; None: as many as were put, numbered without gaps.

        Raises:
            Stopped: in all processes alike, if one was asked to stop, which leaves rows out.
            RuntimeError: in all processes alike, naming how many rows are missing or were put more than once.
        """
        if any(gather_objects(stop_requested())):
            raise Stopped
        mine = torch.cat([torch.zeros(0, dtype=torch.int64), *self.places])
        total = sum(gather_objects(len(mine))) if total is None else total
        counts = all_reduce_sum(mine.clamp(max=total).bincount(minlength=total + 1))  # the last: beyond all items
        missing, doubled, beyond = (counts[:total] == 0).sum(), (counts[:total] > 1).sum(), counts[total]
        if missing or doubled or beyond:
            raise RuntimeError(
                f"{self.what}: of {total} items {missing} are missing, {doubled} were computed more than once and "
                f"{beyond} are unknown"
            )
        # A process without a batch learns from the others what there is.
        kinds = next((kind for kind in gather_objects([_kind(parts[0]) for parts in self.columns]) if kind), [])
        columns = self.columns or [[] for _ in kinds]
        return [
            self._list(parts, total) if kind is None else self._tensor(parts, total, *kind)
            for kind, parts in zip(kinds, columns, strict=True)
        ]

    def _tensor(self, parts: list[Tensor], total: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        result = torch.zeros(total, *shape, dtype=dtype, device=self.device)
        for places, rows in zip(self.places, parts, strict=True):
            result[places.to(self.device)] = rows.to(self.device)
        parts.clear()  # before the sum, which takes as much memory again
        return result if world_size() == 1 else all_reduce_sum(result)

    def _list(self, parts: list[Sequence], total: int) -> list:
        result: list = [None] * total
        mine = [(places.tolist(), list(rows)) for places, rows in zip(self.places, parts, strict=True)]
        for places, rows in (part for parts in gather_objects(mine) for part in parts):
            for place, row in zip(places, rows, strict=True):
                result[place] = row
        return result


def _kind(part: Tensor | Sequence) -> tuple | None:
    """(shape of a row, dtype) of a tensor, None of a list."""
    return (tuple(part.shape[1:]), part.dtype) if isinstance(part, Tensor) else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards in the mode that it was in.

    Compiled layers (`train.compile`) run as they are: an evaluation's shapes would be compiled for a few batches each.
    """
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


class ProgressLine:
    """A line with what this process has done of `total`, the speed and the time left, every QUIET seconds."""

    def __init__(self, label: str, unit: str, total: float, log: Callable[[str], object] = logger.info):
        self.label, self.unit, self.total, self.log = label, unit, total, log
        self.done, self.start = 0, time.perf_counter()
        self.last = self.start

    def advance(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if now - self.last >= QUIET:
            self.last, speed = now, self.done / (now - self.start)
            left = clock(max(self.total - self.done, 0) / max(speed, 1e-9))
            self.log(f"{self.label}: {self.done:,}/{self.total:,.0f} {self.unit}, {speed:,.0f}/s, {left} left")

    def close(self) -> None:
        """For the tools."""
