"""The momentum teacher (Eq. 1) and the feature queue."""

import pytest
import torch
from torch import nn

from models.momentum import FeatureQueue, MomentumTeacher


def test_the_teacher_follows_equation_1_and_has_no_gradient():
    student = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    teacher = MomentumTeacher({"net": student})
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    teacher.update({"net": student}, 0.995)
    for old, new, theirs in zip(before, teacher.parameters(), student.parameters(), strict=True):
        assert torch.allclose(new, 0.995 * old + 0.005 * theirs, atol=1e-6)
        assert not new.requires_grad


def test_the_teacher_stays_in_eval_mode():
    model = nn.ModuleDict({"teacher": MomentumTeacher({"net": nn.Sequential(nn.Dropout(0.5))})})
    model.train()
    assert not any(module.training for module in model["teacher"].modules())


@pytest.mark.parametrize("size", [0, 1, 3, 7, 10])
def test_queue_of_any_size_keeps_the_last_entries(size):
    queue, fed = FeatureQueue(size, 2), []
    for batch in (4, 1, 12, 3, 5):
        ids = torch.arange(batch) + len(fed)
        fed += ids.tolist()
        features = ids[:, None].float().expand(-1, 2)
        queue.enqueue(features, -features, ids)
        kept = sorted(i for i in queue.image_id.tolist() if i >= 0)
        assert kept == fed[len(fed) - min(size, len(fed)) :]
        filled = queue.image_id >= 0
        assert torch.equal(queue.image_feat[filled, 0], queue.image_id[filled].float())
        assert torch.equal(queue.text_feat[filled, 0], -queue.image_id[filled].float())
