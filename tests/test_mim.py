"""Masking and targets of masked image modeling, against lightly, MAE's formula and enumerated probabilities."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from models.losses import distillation_loss, teacher_distribution
from models.mim import (
    EncodingHead,
    TeacherCentre,
    as_mask,
    normalised_patch_pixels,
    patch_similarity,
    patterns_in_use,
    relevant_share,
    sample_patches,
)

dino_loss = pytest.importorskip("lightly.loss.dino_loss")
ibot_loss = pytest.importorskip("lightly.loss.ibot_loss")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cls_loss_and_centre_equal_lightly_dino():
    oracle = dino_loss.DINOLoss(output_dim=16, center_momentum=0.9)
    centre = TeacherCentre(16, 0.9)
    for step in range(3):
        teacher, student, other = (random(8, 16, seed=10 * step + i) for i in range(3))
        # lightly leaves out the pair (teacher view 0, student view 0): the student's view comes second.
        expected = oracle([teacher], [other, student])
        probs = teacher_distribution(teacher, centre.value, 0.04)
        assert torch.allclose(distillation_loss(student, probs, 0.1).mean(), expected, atol=1e-5)
        centre.add(teacher)
        centre.update()
        assert torch.allclose(centre.value, oracle.center.flatten(), atol=1e-6)


def test_patch_loss_and_centre_equal_lightly_ibot():
    oracle = ibot_loss.IBOTPatchLoss(output_dim=16, center_momentum=0.9)
    centre = TeacherCentre(16, 0.9)
    mask = as_mask(torch.stack([torch.randperm(9)[:3] for _ in range(4)]), 9).unflatten(1, (3, 3))
    for step in range(3):
        teacher, student = random(12, 16, seed=step), random(12, 16, seed=100 + step)
        expected = oracle(teacher, student, mask)
        probs = teacher_distribution(teacher, centre.value, 0.04)
        assert torch.allclose(distillation_loss(student, probs, 0.1).mean(), expected, atol=1e-5)
        centre.add(teacher)
        centre.update()
        assert torch.allclose(centre.value, oracle.center.value.flatten(), atol=1e-6)


def test_centre_of_two_micro_batches_equals_centre_of_one_batch():
    logits = random(10, 4, 6)
    whole, parts = TeacherCentre(6, 0.9), TeacherCentre(6, 0.9)
    whole.add(logits)
    parts.add(logits[:3])
    parts.add(logits[3:])
    whole.update()
    parts.update()
    assert torch.allclose(whole.value, parts.value, atol=1e-6)


def test_exactly_the_requested_number_of_distinct_patches_is_drawn():
    indices = sample_patches(random(50, 16), 5, 0.07, torch.rand(50, 16))
    assert (as_mask(indices, 16).sum(1) == 5).all()


def test_one_patch_is_drawn_with_the_softmax_probabilities():
    similarity = torch.tensor([0.3, -0.1, 0.25, 0.0])
    uniform = torch.rand(40000, 4, generator=torch.Generator().manual_seed(1))
    indices = sample_patches(similarity.expand(40000, -1), 1, 0.2, uniform)
    expected = (similarity.double() / 0.2).softmax(0)
    assert chisquare(torch.bincount(indices[:, 0], minlength=4), 40000 * expected).pvalue > 0.001


def test_two_patches_follow_the_probabilities_of_drawing_one_after_another():
    similarity = torch.tensor([0.3, -0.1, 0.25, 0.0])
    p = (similarity.double() / 0.2).softmax(0)
    uniform = torch.rand(40000, 4, generator=torch.Generator().manual_seed(2))
    indices = sample_patches(similarity.expand(40000, -1), 2, 0.2, uniform)
    pairs = list(itertools.combinations(range(4), 2))
    expected = [float(p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])) for a, b in pairs]
    drawn = [tuple(sorted(row)) for row in indices.tolist()]
    assert sum(expected) == pytest.approx(1)
    assert chisquare([drawn.count(pair) for pair in pairs], [40000 * e for e in expected]).pvalue > 0.001


def test_equal_similarities_give_uniform_random_masking():
    uniform = torch.rand(30000, 6, generator=torch.Generator().manual_seed(3))
    indices = sample_patches(torch.zeros(30000, 6), 2, 0.07, uniform)
    assert chisquare(torch.bincount(indices.flatten(), minlength=6)).pvalue > 0.001


def test_extreme_draws_give_finite_noise():
    uniform = torch.tensor([[0.0, 1 - 2**-24, 0.5]])
    assert sorted(sample_patches(torch.zeros(1, 3), 3, 0.07, uniform)[0].tolist()) == [0, 1, 2]


def test_patch_similarity_is_the_cosine():
    patches, text = random(2, 3, 5), random(2, 5, seed=1)
    for b, n in itertools.product(range(2), range(3)):
        cosine = patches[b, n] @ text[b] / (patches[b, n].norm() * text[b].norm())
        assert patch_similarity(patches, text)[b, n].item() == pytest.approx(cosine.item(), abs=1e-6)


def test_relevant_share_counts_masked_patches_on_the_top_quarter():
    similarity = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])  # the top quarter: patches 0 and 1
    assert relevant_share(similarity, torch.tensor([[1, 5]])).item() == 0.5


def test_normalised_pixels_equal_maes_formula_patch_by_patch():
    images = random(2, 3, 8, 8)
    target = normalised_patch_pixels(images, 4)
    for b, row, column in itertools.product(range(2), range(2), range(2)):
        patch = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        expected = (patch - patch.mean()) / (patch.var() + 1e-6) ** 0.5
        assert torch.allclose(target[b, 2 * row + column], expected, atol=1e-5)


def test_encoding_head_gives_cosines_and_has_the_papers_size():
    head = EncodingHead(768, 3072, 1024)
    assert sum(p.numel() for p in head.parameters()) == 5_508_096  # the paper: under 6M
    assert head(random(4, 768)).abs().max() <= 1 + 1e-5


def test_patterns_in_use_counts_distinct_first_choices():
    logits = torch.eye(5)[torch.tensor([[0, 1, 1], [4, 0, 1]])]
    assert patterns_in_use(logits, torch.zeros(5)).item() == 3
