import pytest
import torch
from tiny import TOKENIZER
from torch.utils.data import Dataset

from dataset.advice import Texts
from dataset.loader import BatchIndices, Loader
from utils import UserError


class Pairs(Dataset):
    """Returns what it is asked for."""

    def __init__(self, size):
        self.size, self.paths = size, range(size)

    def __len__(self):
        return self.size

    def __getitem__(self, item):
        return item

    def caption_lengths(self, epoch, visits):
        return (visits * 7 + epoch) % 10


class Collate:
    """Passes on what was asked for."""

    tokenizer = TOKENIZER

    def texts(self, dataset):
        return [Texts("captions", ["a dog"], 5)]

    def __call__(self, items):
        return {"paths": items, "bad": []}


collate = Collate()


def make_loader(size=20, batch_size=3, workers=0, **options):
    return Loader(BatchIndices(Pairs(size), batch_size, **options), collate, num_workers=workers)


def batches(size=20, batch_size=3, epoch=0, start_batch=0, **options):
    """Lists of (epoch, index)"""
    loader = make_loader(size, batch_size, **options)
    loader.set_epoch(epoch, start_batch)
    return [batch["paths"] for batch in loader]


def indices(epoch_batches):
    return [index for batch in epoch_batches for _, index in batch]


def test_an_epoch_visits_every_entry_once_in_an_order_of_seed_and_epoch():
    one = indices(batches(21, epoch=1))
    assert sorted(one) == list(range(21)) and one != list(range(21))
    assert one == indices(batches(21, epoch=1))
    assert one != indices(batches(21, epoch=2)) and one != indices(batches(21, epoch=1, seed=1))


def test_data_sets_are_told_the_epoch_also_by_persistent_workers():
    loader = make_loader(6, 3, workers=1)
    for epoch in (0, 7):
        loader.set_epoch(epoch)
        assert {e for batch in loader for e, _ in batch["paths"]} == {epoch}


def test_ranks_split_the_global_batches_of_one_process():
    alone = batches(20, 6, epoch=2)
    ranks = [batches(20, 3, epoch=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert alone == [first + second for first, second in zip(*ranks, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_continues_at_any_batch_with_its_length_unchanged(workers):
    whole = batches(epoch=4)
    loader = make_loader(20, 3, workers=workers)
    loader.set_epoch(4, start_batch=2)
    assert [batch["paths"] for batch in loader] == whole[2:]
    assert len(loader) == len(whole) == 6
    loader.set_epoch(4)
    assert [batch["paths"] for batch in loader] == whole


def test_a_set_smaller_than_the_global_batch_is_an_error():
    with pytest.raises(UserError, match="has 5 entries, fewer than one batch of 3 on each of 2 process"):
        BatchIndices(Pairs(5), 3, world_size=2)


def test_bucketing_keeps_ranks_and_resumes_consistent():
    alone = batches(103, 6, epoch=2, bucket_batches=4)
    ranks = [batches(103, 3, epoch=2, rank=rank, world_size=2, bucket_batches=4) for rank in (0, 1)]
    assert alone == [first + second for first, second in zip(*ranks, strict=True)]
    for start in (1, 4, 6, 16, 17):
        assert batches(103, 6, epoch=2, start_batch=start, bucket_batches=4) == alone[start:]


def windows_at_once(size, step, bucket, epoch, seed):
    """The order of an epoch whose windows are all sorted at its start, written out."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order, parts = torch.randperm(size, generator=generator), []
    for window in order[: size // step * step].split(bucket * step):
        lengths = torch.tensor([(index * 7 + epoch) % 10 for index in window.tolist()])
        rows = window[lengths.argsort(stable=True)].view(-1, step)
        within = torch.rand(rows.shape, generator=generator).argsort(1)
        parts.append(rows.gather(1, within)[torch.randperm(len(rows), generator=generator)].flatten())
    return torch.cat(parts).tolist()


@pytest.mark.parametrize("bucket", [1, 3, 50])
def test_windows_are_sorted_when_reached_without_a_draw_of_the_trainings_generator(bucket):
    for epoch, seed in ((0, 0), (3, 5)):
        order = BatchIndices(Pairs(103), 6, seed=seed, bucket_batches=bucket)
        order.epoch, before = epoch, torch.get_rng_state()
        assert indices(order) == windows_at_once(103, 6, bucket, epoch, seed)
        assert torch.equal(torch.get_rng_state(), before)
