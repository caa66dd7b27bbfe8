"""The loader of every stage's training set.

Its order is a function of (seed, epoch), and data sets are asked for (epoch, index): what a run sees does not depend
on the number of workers or on where it was resumed.
"""

import logging
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import UserError, child_signals

log = logging.getLogger("semmim")

MIN_BAD = 10  # a share of very few samples says nothing


class BatchIndices(Sampler):
    """The batches of one rank in an epoch, as lists of (epoch, index), in an order drawn from (seed, epoch).

    Batch g of rank r is slice r of the g-th global batch of batch_size * world_size indices, so that N ranks see
    together what one process with the N-fold batch sees; the last incomplete global batch is dropped and every rank
    has the same number of batches.
    bucket_batches: sort the captions by length within this many global batches, so that a batch holds captions of
    similar length and little padding; needs `dataset.caption_lengths(epoch, visits)`. 0: do not sort.
    length_workers: processes that look at the captions of the next window meanwhile, 0 or 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bucket_batches: int = 0,
        length_workers: int = 0,
    ):
        if len(dataset) < batch_size * world_size:
            raise UserError(
                f"the training set has {len(dataset)} entries, fewer than one batch of {batch_size} on each of "
                f"{world_size} process(es); lower train.batch_size"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.step = rank, batch_size * world_size  # step: entries of a global batch
        self.bucket_batches, self.length_workers = bucket_batches, length_workers
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return len(self.dataset) // self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = self.epoch, self.rank * self.batch_size
        # Mixed by multiplication: seed + epoch would give run 43 the orders of run 42, one epoch later.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.dataset), generator=generator)[: len(self) * self.step]
        batches = order.view(-1, self.step)  # [batches, step]
        if self.bucket_batches:
            batches = self._bucketed(batches, epoch, generator)
        else:
            batches = batches[self.start_batch :]
        for batch in batches:
            yield [(epoch, i) for i in batch[first : first + self.batch_size].tolist()]

    def _bucketed(self, batches: torch.Tensor, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Sorted by caption length within windows; the batches of a window and the entries of a batch are shuffled."""
        windows = batches.split(self.bucket_batches)
        skipped = self.start_batch // self.bucket_batches  # windows of which only the random numbers are drawn
        found = DataLoader(
            CaptionLengths(self.dataset),
            batch_size=None,
            sampler=((epoch, window.flatten().numpy()) for window in windows[skipped:]),
            prefetch_factor=1 if self.length_workers else None,
            generator=torch.Generator(),  # else a number would be drawn from the training's
            **worker_options(self.length_workers),
        )
        lengths = iter(found)
        for number, window in enumerate(windows):
            within = torch.rand(window.shape, generator=generator).argsort(1)
            shuffled = torch.randperm(len(window), generator=generator)
            if number >= skipped:
                by_length = window.flatten()[next(lengths).argsort(stable=True)].view(window.shape)
                begin = self.start_batch - number * self.bucket_batches if number == skipped else 0
                yield from by_length.gather(1, within)[shuffled][begin:]


class CaptionLengths(Dataset):
    """`lengths[(epoch, visits [N])]`: how long the captions of these visits are, [N]."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(self.dataset.caption_lengths(*item))


def worker_options(num_workers: int) -> dict:
    """A DataLoader's. Forked workers share annotations and cached images; other start methods copy them."""
    context = "fork" if num_workers and sys.platform == "linux" else None
    return {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": child_signals}


class Loader:
    """Iterates over the batches of one epoch; `set_epoch` chooses which, and where to start in it.

    Counts the unusable samples that the batches report (keys `paths` and `bad` of what `collate` returns), warns of
    the first ten and then of every hundredth, and stops the run with a UserError when more than `max_bad_share` of
    those visited are bad.
    """

    def __init__(
        self, batches: BatchIndices, collate: Callable, *, max_bad_share=0.01, num_workers=0, pin_memory=False
    ):
        self.batches, self.dataset = batches, batches.dataset
        self.max_bad_share = max_bad_share
        self.visited, self.bad = 0, 0
        self.first_bad: list[str] = []  # three lines
        self._loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            **worker_options(num_workers),
        )

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.batches.epoch, self.batches.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        for batch in self._loader:
            self._count(batch)
            yield batch

    def _count(self, batch: dict) -> None:
        self.visited += len(batch["paths"]) + len(batch["bad"])
        for line in batch["bad"]:
            self.bad += 1
            self.first_bad = [*self.first_bad, line][:3]
            if self.bad <= 10 or self.bad % 100 == 0:
                log.warning("unusable sample %d of %d visited, replaced: %s", self.bad, self.visited, line)
        if self.bad >= MIN_BAD and self.bad > self.max_bad_share * self.visited:
            raise UserError(
                f"{self.bad} of {self.visited} visited samples are unusable, data.max_bad_share allows "
                f"{self.max_bad_share:g}; check data.image_root and files: {'; '.join(self.first_bad)}"
            )
