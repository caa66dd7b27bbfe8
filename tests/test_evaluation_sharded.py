"""A shared evaluation: every item once, the same in every process, checked; in one to three processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from evaluation import sharded
from evaluation.sharded import Gathered, eval_batches, eval_loader, evaluating, run_sharded

CPU = torch.device("cpu")


def test_every_item_is_in_exactly_one_batch_of_one_process(monkeypatch):
    monkeypatch.setattr(sharded, "world_size", lambda: 3)
    seen, order = [], list(range(49, -1, -1))
    for rank in range(3):
        monkeypatch.setattr(sharded, "rank", lambda rank=rank: rank)
        seen.append(eval_batches(50, 7, order))
    assert sorted(i for batches in seen for batch in batches for i in batch) == list(range(50))
    whole = [order[start : start + 7] for start in range(0, 50, 7)]  # the cut of a single process
    assert [seen[number % 3][number // 3] for number in range(8)] == whole


@pytest.mark.parametrize("batch_size", [2, None])
def test_loaders_of_all_processes_hold_every_item_once(monkeypatch, batch_size):
    items = [torch.tensor([2 * i, 2 * i + 1]) for i in range(7)] if batch_size is None else list(range(14))
    monkeypatch.setattr(sharded, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(sharded, "rank", lambda rank=rank: rank)
        seen += [batch.tolist() for batch in eval_loader(items, batch_size, num_workers=0, device=CPU)]
    assert sorted(seen) == [[2 * i, 2 * i + 1] for i in range(7)]


def squares(total: int | None, batches: list[list[int]], kind: str = "list"):
    """run_sharded of i -> i * i as text, or as rows of a tensor."""

    def compute(batch):
        if kind == "list":
            return batch, [str(i * i) for i in batch]
        return torch.tensor(batch), torch.tensor([[i * i, -i] for i in batch], dtype=getattr(torch, kind))

    return run_sharded(batches, compute, total, label="squaring", unit="numbers")


@pytest.mark.parametrize("batches", [[[0, 1, 2], [3, 4]], [[4, 2], [3], [1, 0]]])
def test_results_come_in_the_items_order(batches):
    assert squares(5, batches) == ["0", "1", "4", "9", "16"]
    assert squares(5, batches, "bfloat16").tolist() == [[0, 0], [1, -1], [4, -2], [9, -3], [16, -4]]
    assert squares(5, batches, "int64").dtype == torch.int64


@pytest.mark.parametrize("kind", ["list", "float32"])
@pytest.mark.parametrize(
    "batches, found",
    [
        ([[0, 1], [4]], "2 are missing, 0 were computed more than once and 0 are unknown"),
        ([[0, 1], [2, 3, 4], [3]], "0 are missing, 1 were computed more than once and 0 are unknown"),
        ([[0, 1], [1, 4, 4]], "2 are missing, 2 were computed more than once and 0 are unknown"),
        ([[0, 1], [2, 3, 4, 5, 9]], "0 are missing, 0 were computed more than once and 2 are unknown"),
        ([], "5 are missing, 0 were computed more than once and 0 are unknown"),
    ],
)
def test_missing_doubled_and_unknown_items_are_counted(kind, batches, found):
    with pytest.raises(RuntimeError, match=f"squaring: of 5 items {found}"):
        squares(5, batches, kind)


def test_any_number_of_items_may_come_numbered_without_gaps():
    assert squares(None, [[0, 1], [2]]) == ["0", "1", "4"]
    with pytest.raises(RuntimeError, match="1 are missing"):
        squares(None, [[0], [2]])  # numbered with a gap


def test_progress_is_a_line_every_few_seconds(monkeypatch, caplog):
    monkeypatch.setattr(sharded, "QUIET", 0.0)
    with caplog.at_level("INFO", "semmim"):
        run_sharded([[0, 1], [2]], lambda batch: (batch, batch), 3, label="counting", unit="numbers")
    assert [line.split(",")[0] for line in caplog.messages] == ["counting: 2/3 numbers", "counting: 3/3 numbers"]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_gets_its_mode_back_also_after_an_error(training):
    model = nn.Dropout().train(training)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training == training


# ------------------------------------------------------------------------------------------------------------
# Two and three processes. Threads stand for them here; test_evaluation_ranking.py and test_vqa.py use real ones.


class World:
    """`size` threads that exchange objects as processes do."""

    def __init__(self, size: int, monkeypatch):
        self.size, self.here = size, threading.local()
        self.barrier, self.items = threading.Barrier(size, timeout=30), [None] * size
        monkeypatch.setattr(sharded, "rank", lambda: self.here.rank)
        monkeypatch.setattr(sharded, "world_size", lambda: size)
        monkeypatch.setattr(sharded, "gather_objects", self.gather_objects)
        monkeypatch.setattr(sharded, "all_reduce_sum", lambda tensor: sum(self.gather_objects(tensor)))

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


# 11 items are 4 batches of 3; 5 are 2 batches: of three processes one has none
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("total", [11, 5])
@pytest.mark.parametrize("told", [True, False])
def test_every_process_gets_all_results(monkeypatch, world, total, told):
    world = World(world, monkeypatch)
    for found in world.run(lambda: squares(total if told else None, eval_batches(total, 3))):
        assert found == [str(i * i) for i in range(total)]
    for kind in ("float32", "bfloat16", "int64"):
        for found in world.run(lambda kind=kind: squares(total, eval_batches(total, 3), kind)):
            expected = torch.tensor([[i * i, -i] for i in range(total)], dtype=getattr(torch, kind))
            torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_several_columns_stay_together(monkeypatch, world):
    def work():
        found = Gathered("a table")
        for batch in eval_batches(5, 3, [4, 0, 2, 1, 3]):
            found.put(batch, torch.tensor(batch), [{i} for i in batch])
        return found.collect(5)

    for numbers, sets in World(world, monkeypatch).run(work):
        assert numbers.tolist() == [0, 1, 2, 3, 4] and sets == [{0}, {1}, {2}, {3}, {4}]


@pytest.mark.parametrize("kind", ["list", "float32"])
@pytest.mark.parametrize("world, missing", [(2, 5), (3, 3)])  # the last has batches 1 and 3 (3 + 2), or batch 2 (3)
def test_what_one_process_leaves_out_or_does_again_is_an_error_in_all(monkeypatch, world, missing, kind):
    world = World(world, monkeypatch)

    def work(last: list[list[int]]):
        mine = eval_batches(11, 3)
        return squares(11, last if sharded.rank() == world.size - 1 else mine, kind)

    lost = f"squaring: of 11 items {missing} are missing, 0 were computed more than once and 0 are unknown"
    assert world.run(lambda: work([])) == [lost] * world.size
    last = [[3, 4, 5], [9, 10]] if world.size == 2 else [[6, 7, 8]]
    twice = "squaring: of 11 items 0 are missing, 2 were computed more than once and 0 are unknown"
    assert world.run(lambda: work([*last, [0, 1]])) == [twice] * world.size
