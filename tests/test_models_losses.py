"""Each loss against a slow, obvious oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from models.losses import (
    IGNORE,
    itc_loss,
    itm_loss,
    mask_tokens,
    sample_hard_negatives,
    split_prefix,
    token_loss,
)

CLS, SEP, PAD, MASK = 101, 102, 0, 103


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


def masked(rows: int, probability: float = 0.15, length: int = 12, pieces: int = 8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 2000, (rows, length), generator=generator)
    ids[:, 0], ids[:, pieces + 1 :] = CLS, PAD
    maskable = torch.zeros(rows, length, dtype=torch.bool)
    maskable[:, 1 : pieces + 1] = True
    select, replace = torch.rand(2, rows, length, generator=generator)
    random_ids = torch.randint(5000, 6000, (rows, length), generator=generator)
    return ids, maskable, *mask_tokens(ids, maskable, probability, select, replace, random_ids, MASK)


def test_mask_tokens_never_touches_special_tokens_and_chooses_at_least_one():
    ids, maskable, changed, chosen = masked(500, probability=0.01)
    assert not (chosen & ~maskable).any()
    assert torch.equal(changed[~chosen], ids[~chosen])
    assert chosen.any(1).all()


def test_mask_tokens_masks_15_percent_of_which_80_10_10():
    ids, maskable, changed, chosen = masked(20000)
    # A caption of 8 tokens without any chosen one gets one: 0.15 + 0.85^8 / 8 of the tokens.
    share = chosen[maskable].float().mean().item()
    assert share == pytest.approx(0.15 + 0.85**8 / 8, abs=0.003)
    kinds = [(changed == MASK), (changed >= 5000), (changed == ids)]
    for kind, expected in zip(kinds, (0.8, 0.1, 0.1), strict=True):
        assert kind[chosen].float().mean().item() == pytest.approx(expected, abs=0.01)


def test_split_prefix_on_every_cut_of_a_caption():
    ids = torch.tensor([[CLS, 11, 12, 13, PAD]])
    attention = (ids != PAD).long()
    for k in range(3):
        prefix, decoder_input, target = split_prefix(
            ids, attention, torch.tensor([3]), torch.tensor([(k + 0.5) / 3]), CLS, SEP
        )
        pieces = [11, 12, 13]
        assert ids[0][prefix[0].bool()].tolist() == [CLS, *pieces[:k]]
        length = 3 - k + 1
        assert decoder_input[0, :length].tolist() == [CLS, *pieces[k:]]
        assert target[0].tolist() == [*pieces[k:], SEP] + [IGNORE] * (5 - length)


def test_split_prefix_is_uniform_over_cuts_and_leaves_at_least_one_piece():
    ids = torch.tensor([[CLS, 11, 12, 13, 14, SEP, PAD]]).expand(8000, -1)
    uniform = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    prefix, _, target = split_prefix(ids, (ids != PAD).long(), torch.full((8000,), 4), uniform, CLS, SEP)
    counts = torch.bincount(prefix.sum(1) - 1, minlength=4)
    assert len(counts) == 4 and chisquare(counts).pvalue > 0.001
    assert ((target != IGNORE).sum(1) == 4 - (prefix.sum(1) - 1) + 1).all()


def test_token_loss_equals_sum_of_negative_log_probabilities():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([1, 0, IGNORE, 6, 3])
    expected = -sum(
        math.log(float(logits[r].exp()[t] / logits[r].exp().sum())) for r, t in enumerate(target.tolist()) if t >= 0
    )
    assert token_loss(logits, target).item() == pytest.approx(expected, abs=1e-5)
