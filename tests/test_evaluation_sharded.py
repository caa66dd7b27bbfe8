"""A shared evaluation: every item once, the same in every process, checked; in one to three processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import utils
from evaluation import sharded
from evaluation.sharded import Gathered, eval_batches, eval_loader, evaluating, run_sharded


class World:
    """`size` threads that exchange objects as processes do; the tests of ranking and VQA use real ones."""

    def __init__(self, size: int, monkeypatch):
        self.size, self.here = size, threading.local()
        self.barrier, self.items = threading.Barrier(size, timeout=30), [None] * size
        monkeypatch.setattr(utils, "rank", lambda: self.here.rank)
        monkeypatch.setattr(utils, "world_size", lambda: size)
        monkeypatch.setattr(utils, "gather_objects", self.gather_objects)
        monkeypatch.setattr(utils, "all_reduce_sum", lambda tensor: sum(self.gather_objects(tensor)))

    def gather_objects(self, item):
        self.items[self.here.rank] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found

    def run(self, work) -> list:
        """work()'s results, or its RuntimeErrors' messages, in rank order."""

        def process(rank):
            self.here.rank = rank
            try:
                return work()
            except RuntimeError as error:
                return str(error)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(process, range(self.size)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_is_in_exactly_one_batch_of_one_process_and_batches_are_cut_as_for_one(monkeypatch, world):
    order = list(range(49, -1, -1))
    shares = World(world, monkeypatch).run(lambda: eval_batches(50, 7, order))
    expected = [order[start : start + 7] for start in range(0, 50, 7)]
    assert [shares[number % world][number // world] for number in range(8)] == expected
    for batch_size in (2, None):  # None: the items are batches
        items = [torch.tensor([2 * i, 2 * i + 1]) for i in range(7)] if batch_size is None else list(range(14))
        work = lambda: list(eval_loader(items, batch_size, num_workers=0, device=torch.device("cpu")))  # noqa: B023, E731
        found = [batch.tolist() for share in World(world, monkeypatch).run(work) for batch in share]
        assert sorted(found) == [[2 * i, 2 * i + 1] for i in range(7)]


def squares(total: int | None, batches: list[list[int]], kind: str = "list"):
    """run_sharded of i -> i * i as text, or as rows of a tensor."""

    def compute(batch):
        if kind == "list":
            return batch, [str(i * i) for i in batch]
        return torch.tensor(batch), torch.tensor([[i * i, -i] for i in batch], dtype=getattr(torch, kind))

    return run_sharded(batches, compute, total, label="squaring", unit="numbers")


# 11 items are 4 batches of 3; 5 are 2 batches: of three processes one has none
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("total", [11, 5])
@pytest.mark.parametrize("told", [True, False])
def test_every_process_gets_all_results_in_the_items_order(monkeypatch, world, total, told):
    world, order = World(world, monkeypatch), [*range(1, total), 0]
    for kind in ("list", "float32", "bfloat16", "int64"):
        found = world.run(lambda kind=kind: squares(total if told else None, eval_batches(total, 3, order), kind))
        for one in found:
            if kind == "list":
                assert one == [str(i * i) for i in range(total)]
            else:
                expected = torch.tensor([[i * i, -i] for i in range(total)], dtype=getattr(torch, kind))
                torch.testing.assert_close(one, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["list", "float32"])
@pytest.mark.parametrize(
    "total, batches, found",
    [
        (5, [[0, 1], [4]], "2 are missing, 0 were computed more than once and 0 are unknown"),
        (5, [[0, 1], [2, 3, 4], [3]], "0 are missing, 1 were computed more than once and 0 are unknown"),
        (5, [[0, 1], [1, 4, 4]], "2 are missing, 2 were computed more than once and 0 are unknown"),
        (5, [[0, 1], [2, 3, 4, 5, 9]], "0 are missing, 0 were computed more than once and 2 are unknown"),
        (5, [], "5 are missing, 0 were computed more than once and 0 are unknown"),
        (None, [[0], [2]], "1 are missing, 0 were computed more than once and 1 are unknown"),  # a gap
    ],
)
def test_missing_doubled_and_unknown_items_are_counted(total, kind, batches, found):
    with pytest.raises(RuntimeError, match=f"squaring: of {total or 2} items {found}"):
        squares(total, batches, kind)


@pytest.mark.parametrize("kind", ["list", "float32"])
@pytest.mark.parametrize("world, missing", [(2, 5), (3, 3)])  # the last has batches 1 and 3 (3 + 2), or batch 2 (3)
def test_what_one_process_leaves_out_or_does_again_is_an_error_in_all(monkeypatch, world, missing, kind):
    world = World(world, monkeypatch)

    def work(last: list[list[int]]):
        return squares(11, last if utils.rank() == world.size - 1 else eval_batches(11, 3), kind)

    lost = f"squaring: of 11 items {missing} are missing, 0 were computed more than once and 0 are unknown"
    assert world.run(lambda: work([])) == [lost] * world.size
    last = [[3, 4, 5], [9, 10]] if world.size == 2 else [[6, 7, 8]]
    twice = "squaring: of 11 items 0 are missing, 2 were computed more than once and 0 are unknown"
    assert world.run(lambda: work([*last, [0, 1]])) == [twice] * world.size


def test_several_columns_stay_together(monkeypatch):
    def work():
        found = Gathered("a table")
        for batch in eval_batches(5, 3, [4, 0, 2, 1, 3]):
            found.put(batch, torch.tensor(batch), [{i} for i in batch])
        return found.collect(5)

    for numbers, sets in World(3, monkeypatch).run(work):
        assert numbers.tolist() == [0, 1, 2, 3, 4] and sets == [{0}, {1}, {2}, {3}, {4}]


def test_progress_is_a_line_every_few_seconds(monkeypatch, caplog):
    monkeypatch.setattr(sharded, "QUIET", 0.0)
    with caplog.at_level("INFO", "semmim"):
        squares(3, [[0, 1], [2]])
    assert [line.split(",")[0] for line in caplog.messages] == ["squaring: 2/3 numbers", "squaring: 3/3 numbers"]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_gets_its_mode_back_also_after_an_error(training):
    model = nn.Dropout().train(training)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training == training
