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

import utils

CPU = torch.device("cpu")
QUIET = 10.0  # seconds between lines of progress; work that takes less is not mentioned


def eval_batches(num_items: int, batch_size: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Index lists of this process: the items (in `order`, if given) cut into batches, every world-size-th batch."""
    order = range(num_items) if order is None else order
    batches = [list(order[start : start + batch_size]) for start in range(0, num_items, batch_size)]
    return batches[utils.rank() :: utils.world_size()]


def eval_loader(dataset: Dataset, batch_size: int | None, *, num_workers: int, device: torch.device) -> DataLoader:
    """This process's share of a data set; batch_size None: the data set's items are batches already."""
    options = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "worker_init_fn": utils.child_signals}
    if batch_size is None:
        share = range(utils.rank(), len(dataset), utils.world_size())
        return DataLoader(Subset(dataset, share), batch_size=None, **options)
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
    found, start = Gathered(label, device), time.perf_counter()
    done, mentioned = 0, start  # of this process, and when a line was last written
    for batch in batches:
        if utils.stop_requested():
            break
        places, results = compute(batch)
        found.put(places, results)
        done, now = done + len(places), time.perf_counter()
        if now - mentioned >= QUIET:
            mentioned, share, speed = now, (total or 0) / utils.world_size(), done / (now - start)
            left = utils.clock(max(share - done, 0) / max(speed, 1e-9))
            utils.logger.info(f"{label}: {done:,}/{share:,.0f} {unit}, {speed:,.0f}/s, {left} left")
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
        if any(utils.gather_objects(utils.stop_requested())):
            raise utils.Stopped
        mine = torch.cat([torch.zeros(0, dtype=torch.int64), *self.places])
        total = sum(utils.gather_objects(len(mine))) if total is None else total
        counts = utils.all_reduce_sum(mine.clamp(max=total).bincount(minlength=total + 1))  # the last: beyond all items
        missing, doubled, beyond = (counts[:total] == 0).sum(), (counts[:total] > 1).sum(), counts[total]
        if missing or doubled or beyond:
            raise RuntimeError(
                f"{self.what}: of {total} items {missing} are missing, {doubled} were computed more than once and "
                f"{beyond} are unknown"
            )
        # A process without a batch learns from the others what there is.
        kinds = next((kind for kind in utils.gather_objects([_kind(parts[0]) for parts in self.columns]) if kind), [])
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
        return result if utils.world_size() == 1 else utils.all_reduce_sum(result)

    def _list(self, parts: list[Sequence], total: int) -> list:
        result: list = [None] * total
        mine = [(places.tolist(), list(rows)) for places, rows in zip(self.places, parts, strict=True)]
        for places, rows in (part for parts in utils.gather_objects(mine) for part in parts):
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
