"""The losses on text, MLM and PLM, against slow, obvious oracles."""

import pytest
import torch
from scipy.stats import chisquare

from models.losses import mask_tokens, split_prefix
from utils import IGNORE

CLS, SEP, PAD, MASK = 101, 102, 0, 103


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


def test_a_caption_whose_end_is_missing_is_not_taught_to_end():
    ids = torch.tensor([[CLS, 11, 12, 13]]).expand(2, -1)
    cut = torch.tensor([True, False])
    for k in range(3):
        draws = torch.full((2,), (k + 0.5) / 3)
        given = ids, torch.ones_like(ids), torch.tensor([3, 3]), draws, CLS, SEP
        (prefix, decoder_input, target), expected = split_prefix(*given, cut), split_prefix(*given)
        assert torch.equal(prefix, expected[0]) and torch.equal(decoder_input, expected[1])
        suffix = [11, 12, 13][k:]
        assert target.tolist() == [[*suffix, *[IGNORE] * (k + 1)], [*suffix, SEP, *[IGNORE] * k]]


def test_split_prefix_is_uniform_over_cuts_and_leaves_at_least_one_piece():
    ids = torch.tensor([[CLS, 11, 12, 13, 14, SEP, PAD]]).expand(8000, -1)
    uniform = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    prefix, _, target = split_prefix(ids, (ids != PAD).long(), torch.full((8000,), 4), uniform, CLS, SEP)
    counts = torch.bincount(prefix.sum(1) - 1, minlength=4)
    assert len(counts) == 4 and chisquare(counts).pvalue > 0.001
    assert ((target != IGNORE).sum(1) == 4 - (prefix.sum(1) - 1) + 1).all()
