"""ITC and ITM, which pre-training and retrieval share, against slow, obvious oracles."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from models.alignment import (
    Features,
    hard_negatives,
    itc_loss,
    itm_loss,
    legal_negatives,
    matching_rows,
    sample_hard_negatives,
)


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_itc(query, query_m, candidates, ids, candidate_ids, temperature, alpha):
    """One row and one candidate at a time; empty slots are not candidates at all."""
    total = 0.0
    filled = [c for c in range(len(candidates)) if candidate_ids[c] >= 0]
    for b in range(len(query)):
        scores = [float(query[b] @ candidates[c]) / temperature for c in filled]
        soft = [float(query_m[b] @ candidates[c]) / temperature for c in filled]
        norm, soft_norm = sum(map(math.exp, scores)), sum(map(math.exp, soft))
        positives = [c for c in filled if candidate_ids[c] == ids[b]]
        for c, score, s in zip(filled, scores, soft, strict=True):
            hard = 1 / len(positives) if c in positives else 0.0
            target = alpha * math.exp(s) / soft_norm + (1 - alpha) * hard
            total -= target * (score - math.log(norm))
    return total / len(query)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_itc_equals_slow_oracle_with_queue_empty_slots_and_several_positives(alpha):
    image, text, image_m, text_m = (features(4, 8, seed) for seed in range(4))
    queue_image, queue_text = features(5, 8, 4), features(5, 8, 5)
    ids = torch.tensor([1, 2, 1, 7])
    candidate_ids = torch.cat([ids, torch.tensor([2, 9, -1, -1, 7])])
    images, texts = torch.cat([image_m, queue_image]), torch.cat([text_m, queue_text])
    loss = itc_loss(image, text, images, texts, ids, candidate_ids, torch.tensor(0.07), alpha, image_m, text_m)
    expected = slow_itc(image, image_m, texts, ids, candidate_ids, 0.07, alpha)
    expected += slow_itc(text, text_m, images, ids, candidate_ids, 0.07, alpha)
    assert loss.item() == pytest.approx(expected / 2, abs=1e-5)


def test_itc_gradient_is_finite_with_empty_slots():
    image = features(3, 4, 0).requires_grad_()
    candidates = torch.cat([features(3, 4, 1), torch.zeros(2, 4)])
    ids = torch.arange(3)
    loss = itc_loss(image, image, candidates, candidates, ids, torch.tensor([0, 1, 2, -1, -1]), torch.tensor(0.07))
    loss.backward()
    assert image.grad.isfinite().all()


def test_itc_ignores_autocast():
    image, text = features(4, 8, 0), features(4, 8, 1)
    arguments = (image, text, image, text, torch.arange(4), torch.arange(4), torch.tensor(0.07))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = itc_loss(*arguments)
    assert loss.dtype == torch.float32 and torch.equal(loss, itc_loss(*arguments))


def test_hard_negatives_follow_softmax_over_legal_entries():
    similarity = torch.tensor([[2.0, 0.5, 9.0, -1.0]])
    legal = torch.tensor([[True, True, False, True]])
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    index, valid = sample_hard_negatives(similarity.expand(20000, -1), legal.expand(20000, -1), draws)
    weights = similarity[0].masked_fill(~legal[0], -torch.inf).softmax(0)
    counts = torch.bincount(index, minlength=4)
    assert valid.all() and counts[2] == 0
    kept = [0, 1, 3]
    assert chisquare(counts[kept], 20000 * weights[kept].double() / weights[kept].double().sum()).pvalue > 0.001


def test_hard_negatives_survive_overflow_and_rows_without_candidates():
    similarity = torch.tensor([[math.nan, math.inf, 1.0], [-math.inf] * 3, [1.0, 2.0, 3.0]])
    legal = torch.tensor([[False, True, True], [True, False, True], [False, False, False]])
    for draw in (0.0, 0.5, 1 - 2**-24):
        index, valid = sample_hard_negatives(similarity, legal, torch.full((3,), draw))
        assert valid.tolist() == [True, True, False]
        assert all(legal[row, index[row]] for row in range(2))


def test_itm_loss_is_sum_of_two_class_cross_entropy_over_valid_rows():
    logits = torch.tensor([[0.2, 1.0], [3.0, -1.0], [0.0, 5.0]])
    match, valid = torch.tensor([1, 0, 0]), torch.tensor([True, True, False])
    expected = -math.log(math.exp(1) / (math.exp(0.2) + math.exp(1))) - math.log(
        math.exp(3) / (math.exp(3) + math.exp(-1))
    )
    assert itm_loss(logits, match, valid).item() == pytest.approx(expected, abs=1e-6)


def test_legal_negatives_are_all_others_of_another_image_and_another_caption():
    legal = legal_negatives(torch.tensor([0, 1, 0, 2]), torch.tensor([5, 5, 6, 7]))
    assert legal.tolist() == [
        [False, False, False, True],
        [False, False, True, True],
        [False, True, False, True],
        [True, True, True, False],
    ]


def test_rows_without_a_legal_negative_are_marked_in_the_order_of_match():
    """Rows 0 and 1 share an image; row 2 has the caption of row 0, so that row 0 alone has no negative."""
    image_id, caption_id = torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5])
    feat = torch.eye(3)
    negatives = hard_negatives(
        Features(feat, feat, feat, feat, image_id, caption_id), torch.ones(()), *torch.rand(2, 3)
    )
    own_and_text = [True, False, True, True, True, True]  # a pair itself always counts, then its wrong text
    assert negatives.valid.tolist() == own_and_text + [False, True, True]
    assert matching_rows(image_id, caption_id) == negatives.valid.sum()  # known before there are features
    assert negatives.image[1:].tolist() == negatives.text[1:].tolist() == [2, 1]
