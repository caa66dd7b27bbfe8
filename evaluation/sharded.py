"""How processes share an evaluation: each takes every n-th batch, all get all results, each item has exactly one.

Batches are cut before they are shared, so their content, and with it every result to the last digit, does not depend on
the number of processes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import utils

CPU = torch.device("cpu")


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
    device: torch.device = CPU,
) -> Tensor | list:
    """The results of all items, in their order, in every process: a tensor [total, ...] or a list; called in all.

    batches: this process's share, of `eval_batches` or `eval_loader`.
    compute: batch -> (places [n] of its items among all, results: a tensor [n, ...] or n picklable objects).
    label: what is done, for the progress of work that takes longer than ten seconds ("answering val").
    total, device, and what is raised: see `Gathered`.
    """
    found = Gathered(label, device)
    for batch in tqdm(batches, label, unit="batch", delay=10, mininterval=10, disable=not utils.is_main()):
        if utils.stop_requests:
            break
        found.put(*compute(batch))
    return found.collect(total)[0]


class Gathered:
    """Columns of results (a row an item) to which every process adds the rows that it has computed.

    what: names them in an error; device: where tensors are collected.
    """

    def __init__(self, what: str, device: torch.device = CPU):
        self.what, self.device = what, device
        self.parts: list[tuple] = []  # of (places, *columns), as `put` was given them

    def put(self, places: Sequence[int] | Tensor, *columns: Tensor | Sequence) -> None:
        """Add n rows. places: [n] of each among all rows; columns: tensors [n, ...] or n picklable objects each."""
        # Copies: a view is kept, and pickled, with all that it is a view of.
        self.parts.append(tuple(x.cpu().clone() if isinstance(x, Tensor) else x for x in (places, *columns)))

    def collect(self, total: int | None) -> list[Tensor | list]:
        """Every column with all processes' rows in order, in every process; called in all, and once.

        total: how many rows there must be, over all processes; None: as many as were put, numbered without gaps.
        Raises, in all processes alike, Stopped if one was asked to stop, which leaves rows out, and RuntimeError if a
        row is missing or was put more than once.
        """
        if any(utils.gather_objects(bool(utils.stop_requests))):
            raise utils.Stopped
        parts = [part for one in utils.gather_objects(self.parts) for part in one]
        self.parts = []
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.as_tensor(part[0]) for part in parts)])
        total = len(places) if total is None else total
        found, order = places.sort()
        if not torch.equal(found, torch.arange(total)):
            lost = total - len(found[(0 <= found) & (found < total)].unique())
            raise RuntimeError(f"{self.what}: {len(found)} results for {total} items, of which {lost} have none")
        joined = []
        for column in list(zip(*parts, strict=True))[1:]:
            if isinstance(column[0], Tensor):
                joined.append(torch.cat(column)[order].to(self.device))
            else:
                rows = [row for part in column for row in part]
                joined.append([rows[place] for place in order.tolist()])
        return joined


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
