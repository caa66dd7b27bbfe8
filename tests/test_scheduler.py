import math

import pytest
import torch

from scheduler import WarmupCosine, lr_at

PAPER = {"total_steps": 99_600, "warmup_steps": 1000, "min_lr": 1e-6}


def test_warm_up_takes_equal_strides_from_zero_to_the_peak():
    assert lr_at(0, peak=1e-4, **PAPER) == pytest.approx(1e-7)
    assert lr_at(499, peak=1e-4, **PAPER) == pytest.approx(0.5e-4)
    assert lr_at(999, peak=1e-4, **PAPER) == pytest.approx(1e-4)


def test_it_equals_torchs_cosine_after_the_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-6)
    for step in range(10, 61):  # from the peak to the minimum
        ours = lr_at(step, peak=1e-4, total_steps=60, warmup_steps=10, min_lr=1e-6)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step(), oracle.step()


@pytest.mark.parametrize("warmup", [0, 5, 50])
def test_short_runs_have_finite_rates(warmup):
    rates = [lr_at(n, peak=1e-4, total_steps=5, warmup_steps=warmup, min_lr=1e-6) for n in range(6)]
    assert all(0 < rate <= 1e-4 and math.isfinite(rate) for rate in rates)


def test_a_peak_below_the_minimum_stays():
    assert lr_at(50, peak=1e-7, total_steps=100, warmup_steps=10, min_lr=1e-6) == pytest.approx(1e-7)


def test_groups_follow_their_own_peaks_and_any_step_can_be_asked_for():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "peak_lr": peak} for p, peak in zip(parameters, (1e-5, 1e-4), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = WarmupCosine(optimizer, **PAPER)
    for step in (500, 3, 60_000):
        schedule.step(step)
        expected = [lr_at(step, peak=peak, **PAPER) for peak in (1e-5, 1e-4)]
        assert [group["lr"] for group in optimizer.param_groups] == expected
