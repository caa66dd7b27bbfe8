"""The length of a training in epochs, steps or minutes."""

import math
import time

import pytest
from drill import differing
from test_engine_loop import Loader, Trained

import utils
from engine import checkpoint, loop
from models.alignment import alpha_at
from scheduler import WarmupCosine, lr_by_time

EPOCH = 6  # steps of one, in what `Trained` does
PEAK, WARMUP, LOWEST = 0.01, 3, 0.001


class Watch:
    """Stands in for `time.perf_counter`: a clock that only moves when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(checkpoint, "time", watch)
    monkeypatch.setattr(loop, "time", watch)
    return watch


def timed(folder, watch, per_step=10.0, after_epoch=0.0, **options):
    """A training with the real schedule; each step takes `per_step` seconds, what follows an epoch `after_epoch`."""
    trained = Trained(folder, log_every=1, **options)
    forward, follow = trained.loss_fn, trained.after_epoch
    trained.optimizer.param_groups[0]["peak_lr"] = PEAK
    total = None if "minutes" in options else options.get("steps", 2 * EPOCH)
    trained.schedule = WarmupCosine(trained.optimizer, total_steps=total, warmup_steps=WARMUP, min_lr=LOWEST)
    trained.rates = {}  # by step

    def loss_fn(model, batch, progress):
        if progress.step not in trained.rates:
            trained.rates[progress.step] = trained.optimizer.param_groups[0]["lr"]
            watch.now += per_step
        return forward(model, batch, progress)

    def after_epoch_timed(progress):
        watch.now += after_epoch
        follow(progress)

    trained.loss_fn, trained.after_epoch = loss_fn, after_epoch_timed
    return trained


def test_by_time_the_rate_is_a_cosine_of_the_time_used():
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = 1e-6 + (1e-4 - 1e-6) * math.cos(math.pi / 2 * share) ** 2  # (1 + cos 2x) / 2 = cos^2 x
        found = lr_by_time(1000, share, peak=1e-4, warmup_steps=1000, min_lr=1e-6)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert lr_by_time(0, 0.0, peak=1e-4, warmup_steps=0, min_lr=1e-6) == 1e-4
    assert lr_by_time(5, 1.2, peak=1e-4, warmup_steps=0, min_lr=1e-6) == pytest.approx(1e-6)


def test_alpha_is_ramped_over_the_first_epoch_or_over_a_shorter_training():
    long = [alpha_at(step, 4, 0.4, step / 20) for step in range(7)]
    assert long == [alpha_at(step, 4, 0.4) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert [alpha_at(step, 100, 0.4, step / 4) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_a_training_that_ended_within_an_epoch_can_be_made_longer_with_the_rest_of_the_epoch(tmp_path):
    seen = []

    def loss_fn(model, batch, progress):
        seen.append(batch["paths"])
        return (model(batch["x"]) - batch["y"]).square().mean(), {}

    Trained(tmp_path / "straight", epochs=2, loss_fn=loss_fn).go()
    straight = list(seen)
    seen.clear()
    Trained(tmp_path / "run", steps=EPOCH + 2, loss_fn=loss_fn).go()
    Trained(tmp_path / "run", epochs=2, loss_fn=loss_fn, resume=True).go()
    assert seen == straight


def test_minutes_end_with_the_first_step_after_them_and_leave_out_what_follows_an_epoch(tmp_path, watch):
    trained = timed(tmp_path, watch, after_epoch=1000.0, minutes=1.55)  # 93 seconds: ten steps, the last within them
    progress = trained.go()
    assert progress.step == 10 and progress.seconds == 100 and trained.epochs_ended == [0, 1]
    assert utils.load_checkpoint(trained.checkpoint)["progress"]["seconds"] == 100


def test_the_rates_of_minutes_can_be_retraced_from_the_log(tmp_path, watch):
    trained = timed(tmp_path, watch, minutes=1.5)
    trained.go()
    lines = trained.logged()
    assert [line["lr_0"] for line in lines] == list(trained.rates.values())
    assert [line["done"] for line in lines] == pytest.approx([n / 9 for n in range(9)])
    assert lines[-1]["minutes"] == 1.5 and [line["eta_seconds"] for line in lines] == [80 - 10 * n for n in range(9)]
    shape = {"peak": PEAK, "warmup_steps": WARMUP, "min_lr": LOWEST}
    assert trained.rates == {n: lr_by_time(n, lines[n]["done"], **shape) for n in range(9)}
    assert trained.rates[0] == pytest.approx(PEAK / WARMUP) and trained.rates[8] == pytest.approx(LOWEST, rel=0.4)


@pytest.mark.parametrize("stop_at", [2, EPOCH - 1, EPOCH + 1])
def test_a_resumed_training_by_minutes_counts_the_time_already_used(tmp_path, watch, stop_at):
    """Where its steps take as long as those of the uninterrupted one, it is that one to the bit."""
    straight = timed(tmp_path / "straight", watch, minutes=1.5)
    straight.go()
    stopped = timed(tmp_path / "run", watch, minutes=1.5, stop_at=stop_at)
    with pytest.raises(utils.Stopped):
        stopped.go()
    watch.now += 5000.0  # until somebody starts it again
    resumed = timed(tmp_path / "run", watch, minutes=1.5, resume=True)
    resumed.go()
    assert differing(straight.checkpoint, resumed.checkpoint) == []
    assert stopped.rates | resumed.rates == straight.rates


def test_a_run_continues_by_another_kind_of_length(tmp_path, watch):
    timed(tmp_path, watch, minutes=0.5).go()
    by_steps = timed(tmp_path, watch, steps=5, resume=True)
    by_steps.go()
    by_time = timed(tmp_path, watch, minutes=0.5, resume=True)  # which counts from there
    by_time.go()
    assert (by_steps.steps_seen, by_time.steps_seen) == ([4, 5], [6, 7, 8])


def by_two_clocks(rank, folder):
    """In one of two processes, the second of which has a clock that runs a hundred times as fast: what training did."""
    watch = Watch()
    checkpoint.time = loop.time = watch
    trained = timed(folder, watch, per_step=10.0 if rank == 0 else 1000.0, minutes=1.5, loader=Loader(2))
    progress = trained.go()
    checkpoint.time = loop.time = time
    return {"step": progress.step, "seconds": progress.seconds, "rates": trained.rates}
