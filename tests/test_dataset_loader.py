import pytest
from conftest import refused
from torch.utils.data import Dataset

from dataset.loader import BatchIndices, Loader


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


def collate(items):
    """Passes on what was asked for."""
    return {"paths": items, "bad": []}


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


@pytest.mark.parametrize("bucket, workers", [(0, 0), (4, 0), (4, 1)])
def test_ranks_split_the_global_batches_of_one_process_and_continue_at_any(bucket, workers):
    alone = batches(103, 6, epoch=2, bucket_batches=bucket)
    ranks = [batches(103, 3, epoch=2, rank=rank, world_size=2, bucket_batches=bucket) for rank in (0, 1)]
    assert alone == [first + second for first, second in zip(*ranks, strict=True)]
    for start in (1, 4, 6, 17):
        again = batches(103, 6, epoch=2, start_batch=start, bucket_batches=bucket, length_workers=workers)
        assert again == alone[start:]


def test_workers_go_on_with_the_next_epoch_and_its_length_is_unchanged():
    loader = make_loader(20, 3, workers=1)
    for epoch, start in ((4, 2), (4, 0), (7, 0)):
        loader.set_epoch(epoch, start_batch=start)
        assert [batch["paths"] for batch in loader] == batches(epoch=epoch)[start:]
        assert len(loader) == 6


def test_a_set_smaller_than_the_global_batch_is_an_error():
    words = "has 5 entries, fewer than one batch of 3 on each of 2 process"
    refused(lambda: BatchIndices(Pairs(5), 3, world_size=2), words)
