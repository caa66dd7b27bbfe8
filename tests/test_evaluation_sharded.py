"""A shared evaluation: every item once, the same in every process, checked; in one and in three processes."""

import pytest
import torch
from conftest import in_ranks
from torch import nn

from evaluation.sharded import Gathered, eval_batches, eval_loader, evaluating, run_sharded

CPU = torch.device("cpu")
RESULTS = {
    "text": (lambda batch: [str(i * i) for i in batch], lambda n: [str(i * i) for i in range(n)]),
    "float32": (lambda batch: torch.tensor(batch).float()[:, None], lambda n: torch.arange(n).float()[:, None]),
    "bfloat16": (lambda batch: torch.tensor(batch).bfloat16(), lambda n: torch.arange(n).bfloat16()),
    "sets": (lambda batch: [{i} for i in batch], lambda n: [{i} for i in range(n)]),
}


def shares(rank, world):
    order = list(range(49, -1, -1))
    assert eval_batches(50, 7, order) == [order[start : start + 7] for start in range(0, 50, 7)][rank::world]
    pairs = [[2 * i, 2 * i + 1] for i in range(7)][rank::world]
    for batch_size, items in ((2, list(range(14))), (None, [torch.tensor([2 * i, 2 * i + 1]) for i in range(7)])):
        batches = eval_loader(items, batch_size, num_workers=0, device=CPU)
        assert [batch.tolist() for batch in batches] == pairs


def results(rank, world):
    """11 items are 4 batches of 3; 5 are 2 batches: of three processes one has none."""
    for total in (11, 5):
        for compute, expected in RESULTS.values():
            for told in (total, None):
                batches = eval_batches(total, 3, [*range(1, total), 0])
                found = run_sharded(batches, lambda batch, f=compute: (batch, f(batch)), told, label="squaring")
                if isinstance(found, list):
                    assert found == expected(total)
                else:
                    torch.testing.assert_close(found, expected(total), atol=0, rtol=0)
        table = Gathered("a table")
        for batch in eval_batches(total, 3):
            table.put(batch, *(compute(batch) for compute, _ in RESULTS.values()))
        columns = table.collect(total)
        assert [list(column) for column in columns] == [list(every(total)) for _, every in RESULTS.values()]


def faults(rank, world):
    """What the last process leaves out, does again or should not have is an error in all."""
    for total, last, lost in ((11, [], 1), (11, [[3], [3]], 0), (11, [[3], [11]], 0), (None, [[12]], 1)):
        batches = [[i for i in range(11) if i != 3][rank::world], *(last if rank == world - 1 else [])]
        with pytest.raises(RuntimeError, match=rf"squaring: \d+ results for \d+ items, of which {lost} have none"):
            run_sharded(batches, lambda batch: (batch, [str(i) for i in batch]), total, label="squaring")


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("check", [shares, results, faults])
def test_every_item_has_one_result_in_its_place_in_every_process(check, world):
    if world == 1:
        check(0, 1)
    else:
        in_ranks(world, check, world)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_gets_its_mode_back_also_after_an_error(training):
    model = nn.Dropout().train(training)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training == training
