"""Masking, losses and targets of masked image modeling, against lightly and enumerated probabilities."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from models.mim import (
    EncodingHead,
    TeacherCenter,
    as_mask,
    cls_loss,
    collapse_monitors,
    draw_patches,
    masked_count,
    patch_loss,
    patterns_in_use,
    random_mask,
    relevant_share,
    text_guided_mask,
)
from models.tensors import take


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_cls_loss_and_center_equal_lightly_dino():
    dino_loss = pytest.importorskip("lightly.loss.dino_loss")
    oracle = dino_loss.DINOLoss(output_dim=16, center_momentum=0.9)
    center = TeacherCenter(16, 0.9)
    for step in range(3):
        teacher, student, other = (random(8, 16, seed=10 * step + i) for i in range(3))
        # lightly leaves out the pair (teacher view 0, student view 0): the student's view comes second.
        expected = oracle([teacher], [other, student])
        assert torch.allclose(cls_loss(student, teacher, center.value, 0.1, 0.04)[0], expected, atol=1e-5)
        center.add(teacher)
        center.update()
        assert torch.allclose(center.value, oracle.center.flatten(), atol=1e-6)


def test_patch_loss_and_center_equal_lightly_ibot():
    ibot_loss = pytest.importorskip("lightly.loss.ibot_loss")
    oracle = ibot_loss.IBOTPatchLoss(output_dim=16, center_momentum=0.9)
    center = TeacherCenter(16, 0.9)
    masked = torch.stack([torch.randperm(9)[:3] for _ in range(4)])
    for step in range(3):
        teacher, student = random(4, 9, 16, seed=step), random(4, 3, 16, seed=100 + step)
        rows = take(teacher, masked)
        expected = oracle(rows.flatten(0, 1), student.flatten(0, 1), as_mask(masked, 9).unflatten(1, (3, 3)))
        assert torch.allclose(patch_loss(student, teacher, masked, center.value, 0.1, 0.04)[0], expected, atol=1e-5)
        center.add(rows)
        center.update()
        assert torch.allclose(center.value, oracle.center.value.flatten(), atol=1e-6)


def test_center_is_the_moving_average_of_the_mean_logits_however_the_batch_is_cut():
    logits = random(10, 4, 6)
    whole, parts = TeacherCenter(6, 0.9), TeacherCenter(6, 0.9)
    for _ in range(2):
        whole.add(logits)
        parts.add(logits[:3])
        parts.add(logits[3:])
        whole.update()
        parts.update()
    assert torch.allclose(whole.value, (1 - 0.9**2) * logits.mean((0, 1)), atol=1e-6)
    assert torch.allclose(whole.value, parts.value, atol=1e-6)


def drawn_with_similarities(similarity: torch.Tensor, rows: int, ratio: float, seed: int) -> torch.Tensor:
    """Masks of `rows` images whose patches all have these cosines [N] with the text, at temperature 0.2."""
    count = len(similarity)
    patches = torch.stack([similarity, (1 - similarity**2).sqrt()], 1)  # unit vectors; the text is the first axis
    feats, text = 3 * patches.expand(rows, -1, -1), torch.tensor([[2.0, 0.0]]).expand(rows, -1)  # lengths do not matter
    indices, found = text_guided_mask(feats, text, ratio, 0.2, uniform(rows, count, seed=seed))
    assert torch.allclose(found[0], similarity, atol=1e-6)
    return indices


@pytest.mark.parametrize(("ratio", "count"), [(0.3, 5), (0.01, 1), (0.5, 8), (1, 16)])
def test_the_requested_share_of_distinct_patches_is_drawn(ratio, count):
    assert masked_count(16, ratio) == count
    guided, _ = text_guided_mask(random(50, 16, 8), random(50, 8, seed=1), ratio, 0.07, uniform(50, 16))
    for indices in (guided, random_mask(ratio, uniform(50, 16))):
        assert (as_mask(indices, 16).sum(1) == count).all()


def test_two_patches_follow_the_probabilities_of_drawing_one_after_another():
    similarity = torch.tensor([0.3, -0.1, 0.25, 0.0])
    p = (similarity.double() / 0.2).softmax(0)
    indices = drawn_with_similarities(similarity, 40000, 0.5, seed=2)
    pairs = list(itertools.combinations(range(4), 2))
    expected = [float(p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])) for a, b in pairs]
    drawn = [tuple(sorted(row)) for row in indices.tolist()]
    assert sum(expected) == pytest.approx(1)
    assert chisquare([drawn.count(pair) for pair in pairs], [40000 * e for e in expected]).pvalue > 0.001


def test_random_masking_takes_all_patches_equally_often():
    indices = random_mask(1 / 3, uniform(30000, 6, seed=3))
    assert chisquare(torch.bincount(indices.flatten(), minlength=6)).pvalue > 0.001


def test_extreme_draws_give_finite_noise():
    draws = torch.tensor([[0.0, 1 - 2**-24, 0.5]])
    assert sorted(draw_patches(torch.zeros(1, 3), 3, draws)[0].tolist()) == [0, 1, 2]


def test_encoding_head_gives_cosines_and_has_the_papers_size():
    head = EncodingHead(768, 3072, 1024)
    assert sum(p.numel() for p in head.parameters()) == 5_508_096  # the paper: under 6M
    assert head(random(4, 768)).abs().max() <= 1 + 1e-5


def monitors(probs: torch.Tensor, student: torch.Tensor) -> list[float]:
    """Entropy, KL and batch entropy, for the student's distributions `student`."""
    found = collapse_monitors("cls", probs, -(probs * student.log()).sum(-1).mean())
    return [found[f"teacher/cls_{name}"].item() for name in ("entropy", "kl", "batch_entropy")]


def test_monitors_of_a_one_hot_teacher_tell_one_pattern_for_all_from_one_for_each():
    uniform_student = torch.full((6, 4), 0.25)
    collapsed = torch.eye(4)[torch.zeros(6, dtype=torch.long)]
    assert monitors(collapsed, uniform_student) == pytest.approx([0, math.log(4), 0], abs=1e-6)
    spread = torch.eye(4)[torch.tensor([0, 1, 2, 0, 1, 2])]
    assert monitors(spread, uniform_student) == pytest.approx([0, math.log(4), math.log(3)], abs=1e-6)


def test_relevant_share_counts_masked_patches_on_the_top_quarter():
    similarity = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])  # the top quarter: patches 0 and 1
    assert relevant_share(similarity, torch.tensor([[1, 5]])).item() == 0.5


def test_patterns_in_use_counts_distinct_first_choices():
    logits = torch.eye(5)[torch.tensor([[0, 1, 1], [4, 0, 1]])]
    assert patterns_in_use(logits, torch.zeros(5)).item() == 3
