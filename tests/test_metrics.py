"""Recall and chance levels against counting."""

import itertools

import pytest
import torch

import metrics


def test_columns_equal_counting_query_by_query():
    ranks = {"tr": torch.tensor([0, 4, 5, 9, 10, 0, 3]), "ir": torch.tensor([1, 0, 7, 100, 0])}
    columns = metrics.retrieval_metrics(ranks["tr"], ranks["ir"])
    for name, k in itertools.product(("tr", "ir"), (1, 5, 10)):
        hits = sum(rank in range(k) for rank in ranks[name].tolist())
        assert columns[f"{name}_r{k}"] == pytest.approx(100 * hits / len(ranks[name]))
    six = [value for key, value in columns.items() if key != "r_mean"]
    assert len(six) == 6 and columns["r_mean"] == pytest.approx(sum(six) / 6)


def test_no_query_is_an_error():
    with pytest.raises(ValueError, match="query"):
        metrics.recall_at_k(torch.zeros(0), 1)


def test_chance_equals_enumeration_of_all_orders():
    captions = [1, 2, 3]
    image_of_text = [0, 1, 1, 2, 2, 2]
    chance = metrics.chance_metrics(captions)
    orders = list(itertools.permutations(range(6)))
    for k in (1, 5):
        hits = sum(any(image_of_text[t] == i for t in order[:k]) for order in orders for i in range(3))
        assert chance[f"tr_r{k}"] == pytest.approx(100 * hits / len(orders) / 3)
    assert chance["ir_r1"] == pytest.approx(100 / 3) and chance["ir_r5"] == 100.0
