"""ITC and ITM as pre-training and retrieval share them: what may be a negative, and the ramp of the soft targets."""

import pytest
import torch
import torch.nn.functional as F

from models.alignment import Features, alpha_at, hard_negatives, legal_negatives


def test_itm_negatives_never_share_image_or_caption():
    image_id, caption_id = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), torch.arange(8) // 2
    feat = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = Features(feat, feat, feat, feat, image_id, caption_id)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        negatives = hard_negatives(features, torch.tensor(0.07), *torch.rand(2, 8, generator=generator))
        for row in range(8):
            for other in (int(negatives.image[row]), int(negatives.text[row])):
                assert image_id[other] != image_id[row] and caption_id[other] != caption_id[row]
        assert negatives.valid.all() and negatives.valid.shape == (24,)


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
    assert negatives.image[1:].tolist() == negatives.text[1:].tolist() == [2, 1]


def test_soft_targets_come_in_over_the_first_epoch():
    assert [alpha_at(step, 4, 0.4) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
