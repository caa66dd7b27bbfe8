import json
import math
import os
import signal

import pytest
import torch
from conftest import in_ranks, refused
from drill import differing
from torch import nn
from torch.utils.data import DataLoader

import utils
from engine import loop
from engine.checkpoint import load_last
from engine.config import Config
from engine.distributed import prepare_cpu
from engine.loop import Progress, Task, Training, fit, position
from engine.run import Run
from models.losses import global_count, rank_share
from models.tensors import all_gather_with_grad

CPU = torch.device("cpu")
BATCH, ENTRIES = 4, 24


class Entries(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ENTRIES, 5, generator=generator)
        self.y = torch.randn(ENTRIES, 2, generator=generator)

    def __len__(self):
        return ENTRIES

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index], "paths": f"{index}.png"}


class Loader:
    """What fit asks of a loader, over torch's DataLoader; every process gets its rows of a global batch."""

    def __init__(self, batch_size=BATCH):
        self.dataset, self.batch_size = Entries(), batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch, start_batch=0):
        self.epoch, self.start = epoch, start_batch

    def __len__(self):
        return ENTRIES // (self.batch_size * utils.world_size())

    def __iter__(self):
        order = torch.randperm(ENTRIES, generator=torch.Generator().manual_seed(self.epoch))
        rows = order.view(len(self), utils.world_size(), self.batch_size)[self.start :, utils.rank()]
        return iter(DataLoader(self.dataset, batch_sampler=rows.tolist()))


class Schedule:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, n, done):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + n)


class Trained(Task):
    """One call of fit on a small network; `stop_at` sends this process a signal within that step."""

    def __init__(
        self, folder, dropout=0.5, loader=None, resume=False, stop_at=None, loss_fn=None, count_fn=None, **settings
    ):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0)
        self.schedule = Schedule(self.optimizer)
        self.epochs_ended, self.steps_seen = [], []
        self.stop_at, self.loss_fn, self.count = stop_at, loss_fn or mean_squared_error, count_fn
        defaults = {"epochs": 2, "batch_size": BATCH, "accumulation": 1, "clip_grad": 1.0, "precision": "fp32"}
        cfg = Config(
            defaults | {"log_every": 2, "checkpoint_every": 0, "keep_checkpoints": 2, "tracker": "none"} | settings
        )
        self.run = Run(folder, Config(seed=0, train=cfg))
        self.checkpoint = self.run.dir / "checkpoint_last.pth"
        torch.manual_seed(1)
        self.loader, self.cfg, self.resume = loader or Loader(), cfg, resume

    def go(self):
        resume_from = load_last(self.run.dir, 2) if self.resume else None
        self.run.step = resume_from["progress"]["step"] if resume_from else -1
        self.progress = position(self.model, self.optimizer, len(self.loader), self.cfg, CPU, resume_from)
        self.run.open()
        training = Training(self.model, self.loader, self.optimizer, self.schedule, self.progress, CPU)
        fit(training, self, self.run)
        return self.progress

    def loss(self, model, batch, progress):
        if progress.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.loss_fn(model, batch, progress)

    def after_step(self, progress):
        self.steps_seen.append(progress.step)

    def after_epoch(self, progress):
        self.epochs_ended.append(progress.epoch)

    def state(self):
        return {"note": "kept"}

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def logged(self):
        return [json.loads(line) for line in (self.run.dir / "log.jsonl").read_text().splitlines()]


def mean_squared_error(model, batch, progress):
    loss = (model(batch["x"]) - batch["y"]).square().mean()
    return loss, {"mse": loss, "debug/constant": 2.0}


def tokens(batch):
    """A number of tokens for each row, 1 to 20."""
    return 1 + (batch["x"][:, 0] * 1000).abs().long() % 20


def mean_over_tokens(model, batch, progress):
    errors = (model(batch["x"]) - batch["y"]).square().mean(1)
    loss = rank_share((errors * tokens(batch)).sum(), global_count(tokens(batch).sum())) * batch.get("share", 1.0)
    return loss, {"share": batch.get("share", torch.tensor(1.0))}


def count(batch):
    return tokens(batch).sum()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 2, 4, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, stop_at, accumulation):
    straight = Trained(tmp_path / "straight", accumulation=accumulation, epochs=2 * accumulation)
    straight.go()
    stopped = Trained(tmp_path / "run", accumulation=accumulation, epochs=2 * accumulation, stop_at=stop_at)
    with pytest.raises(utils.Stopped):
        stopped.go()
    resumed = Trained(tmp_path / "run", accumulation=accumulation, epochs=2 * accumulation, resume=True)
    resumed.go()
    assert differing(straight.checkpoint, resumed.checkpoint) == []
    assert not torch.equal(straight.weights(), stopped.weights())
    assert stopped.steps_seen + resumed.steps_seen == straight.steps_seen
    assert stopped.epochs_ended + resumed.epochs_ended == straight.epochs_ended


def test_counted_micro_batches_give_the_step_of_the_whole_batch_whose_loss_is_a_mean_over_tokens(tmp_path):
    settings = {"dropout": 0.0, "loss_fn": mean_over_tokens}
    whole = Trained(tmp_path / "whole", loader=Loader(4), **settings)
    counted = Trained(tmp_path / "counted", loader=Loader(1), accumulation=4, count_fn=count, **settings)
    alike = Trained(tmp_path / "alike", loader=Loader(1), accumulation=4, **settings)
    whole.go(), counted.go(), alike.go()
    torch.testing.assert_close(whole.weights(), counted.weights(), atol=1e-6, rtol=0)
    assert (whole.weights() - alike.weights()).abs().max() > 1e-3
    for one, other in zip(whole.logged(), counted.logged(), strict=True):  # the logged loss is the step's, too
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and other["share"] == pytest.approx(1)


def test_micro_batches_that_fill_no_step_are_left_out(tmp_path):
    trained = Trained(tmp_path, accumulation=4, epochs=2)  # 6 micro-batches an epoch
    assert trained.go().total_steps == 2


def nan_at_step_3(model, batch, progress):
    loss, values = mean_squared_error(model, batch, progress)
    bad = torch.where(torch.tensor(progress.step == 3), math.nan, 1.0) * loss
    return loss + bad, {"good": loss, "bad": bad}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_files(tmp_path):
    trained = Trained(tmp_path, loss_fn=nan_at_step_3, log_every=50, checkpoint_every=3)
    with pytest.raises(utils.UserError) as error:
        trained.go()
    order = torch.randperm(ENTRIES, generator=torch.Generator().manual_seed(0))[12:16]
    files = [f"{index}.png" for index in order.tolist()]
    assert "step 3: not finite: bad, loss" in str(error.value) and ", ".join(files) in str(error.value)
    assert "good" not in str(error.value) and "\n" not in str(error.value)
    assert json.loads((tmp_path / "nonfinite.json").read_text())["files"] == files
    assert trained.weights().isfinite().all()
    saved = utils.load_checkpoint(trained.checkpoint)
    assert saved["progress"]["step"] == 3 and trained.steps_seen == [1, 2, 3]


def test_a_loss_that_doubles_is_a_jump_and_noise_is_none():
    usual = [4.0, 4.4, 3.8, 4.1, 4.2]
    assert loop.usual_if_far(usual, 18.0) == 4.1
    assert loop.usual_if_far(usual, 5.0) is None and loop.usual_if_far(usual[:2], 1e9) is None
    assert loop.usual_if_far([-0.9, 0.8, -0.4, 0.6, 0.1], 1.0) is None  # around 0, as self-critical training has it


def test_a_loss_that_jumps_and_stays_there_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    def loss_fn(model, batch, progress):
        loss, values = mean_squared_error(model, batch, progress)
        return loss + 1000.0 * (progress.step >= 7), values

    trained = Trained(tmp_path, loss_fn=loss_fn, checkpoint_every=3)
    with pytest.raises(utils.UserError, match=r"the loss jumped from [\d.]+ to 100\d in step 7 .* stopped, not saved"):
        trained.go()
    assert utils.load_checkpoint(trained.checkpoint)["progress"]["step"] == 6


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path):
    def loss_fn(model, batch, progress):
        zero = (model(batch["x"]) * 0).sum()
        return zero.sqrt(), {}  # 0 with an infinite slope

    refused(lambda: Trained(tmp_path, loss_fn=loss_fn).go(), "the gradient")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_fused_optimizer_skips_its_update_when_told_of_an_infinity(device):
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for infinite in (0.0, 1.0, 0.0):
        weight.grad = torch.full_like(weight, math.nan if infinite else 1.0)
        before = weight.detach().clone()
        optimizer.found_inf = torch.tensor(infinite, device=device)
        optimizer.step()
        assert torch.equal(weight, before) == bool(infinite)
    assert optimizer.state[weight]["step"] == 2


def test_the_third_ctrl_c_interrupts_at_once(tmp_path):
    trained = Trained(tmp_path)
    presses = []

    def loss_fn(*args):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            presses.append(1)
        return mean_squared_error(*args)

    trained.loss_fn = loss_fn
    with pytest.raises(KeyboardInterrupt):
        trained.go()
    assert len(presses) == 2 and trained.steps_seen == [] and not trained.checkpoint.exists()


@pytest.mark.parametrize("peak", [None, 2.0])
def test_the_log_holds_interval_means_rates_speed_and_the_share_of_a_known_peak(tmp_path, monkeypatch, peak):
    monkeypatch.setattr(loop, "peak_tflops", lambda name, precision: peak)
    losses = []

    def loss_fn(*args):
        losses.append(mean_squared_error(*args)[0].item())
        return mean_squared_error(*args)

    trained = Trained(tmp_path, dropout=0.0, epochs=1, loss_fn=loss_fn)
    trained.operations = lambda batch: 1e9 * len(batch["x"])
    trained.go()
    lines = trained.logged()
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[1]["mse"] == pytest.approx((losses[2] + losses[3]) / 2)
    assert lines[1]["lr_0"] == 0.01 / 4 and lines[1]["debug/constant"] == 2.0 and lines[2]["eta_seconds"] == 0
    assert lines[0]["pairs_per_second"] > 0 and 0 <= lines[0]["data_wait"] <= 1 and lines[0]["grad_norm"] > 0
    assert lines[0]["tflops"] == pytest.approx(1e9 * lines[0]["pairs_per_second"] / 1e12)
    assert lines[0].get("mfu") == (peak and lines[0]["tflops"] / peak)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_rates_and_decay_of_the_configuration_hold_on_resume(tmp_path):
    Trained(tmp_path, epochs=1).go()
    resumed = Trained(tmp_path, epochs=2, resume=True)
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.5
    resumed.go()
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_resume_with_another_batch_size_or_model_is_an_error(tmp_path):
    Trained(tmp_path, epochs=1).go()
    refused(lambda: Trained(tmp_path, loader=Loader(2), resume=True).go(), "6 steps, this run's has 12")
    other = Trained(tmp_path, resume=True)
    other.model[0] = nn.Linear(7, 8)
    refused(other.go, "another model")


# ------------------------------------------------------------------------------------------- several processes


def in_processes(count, function, folder):
    """What function(rank, folder) returns in each of `count` processes."""
    in_ranks(count, _saved, function, folder)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(count)]


def _saved(rank, function, folder):
    torch.save(function(rank, folder), folder / f"result{rank}.pt")


def _two_processes(rank, folder):
    from test_engine_length import by_two_clocks  # here, since it imports from this module

    results = {"by_time": by_two_clocks(rank, folder / "by_time")}
    trained = Trained(folder / "run", dropout=0.0, loader=Loader(1), accumulation=2)
    trained.go()
    results["weights"] = trained.weights()

    options = {"dropout": 0.0, "loss_fn": mean_over_tokens, "count_fn": count}
    counted = Trained(folder / "counted", loader=Loader(1), accumulation=2, **options)
    counted.go()
    results["counted"] = counted.weights()

    # one process's infinity and one process's signal stop both, in the same step and with the same words
    def loss_fn(model, batch, progress):
        return nan_at_step_3(model, batch, progress if rank == 1 else Progress())

    try:
        Trained(folder / "nan", loader=Loader(2), loss_fn=loss_fn).go()
    except utils.UserError as error:
        results["error"] = str(error)
    stopped = Trained(folder / "stop", loader=Loader(2), stop_at=2 if rank == 1 else None)
    try:
        stopped.go()
    except utils.Stopped:
        results["stopped"] = stopped.steps_seen[-1]
    results["random_states"] = len(utils.load_checkpoint(folder / "stop" / "checkpoint_last.pth")["rng"])

    x = torch.full((2, 3), float(rank + 1), requires_grad=True)
    (all_gather_with_grad(x) * torch.arange(4.0)[:, None] * (rank + 1)).sum().backward()
    results["grad"] = x.grad
    utils.gather_objects(None)  # wait for the other
    return results


def test_two_processes(tmp_path):
    """Starting processes is slow, so one pair checks all: training, stops, a gather's gradient."""
    whole = Trained(tmp_path / "whole", dropout=0.0, loader=Loader(4))
    whole.go()
    over_tokens = Trained(tmp_path / "over_tokens", dropout=0.0, loader=Loader(4), loss_fn=mean_over_tokens)
    over_tokens.go()
    both = in_processes(2, _two_processes, tmp_path)
    by_time = [results["by_time"] for results in both]  # the main process's clock counts
    assert by_time[0] == by_time[1] and by_time[0]["step"] == 9 and by_time[0]["seconds"] == 90
    for rank, results in enumerate(both):
        torch.testing.assert_close(results["weights"], whole.weights(), atol=1e-6, rtol=0)
        torch.testing.assert_close(results["counted"], over_tokens.weights(), atol=1e-6, rtol=0)
        order = torch.randperm(ENTRIES, generator=torch.Generator().manual_seed(0))[14:16].tolist()
        assert "step 3: not finite: bad, loss;" in results["error"]
        assert f"({order[0]}.png, {order[1]}.png; all in" in results["error"]
        assert results["stopped"] == 3 and results["random_states"] == 2
        # losses 1 * sum(k * row k) and 2 * sum(k * row k): row k gets 3 k
        assert results["grad"].tolist() == [[3.0 * (2 * rank + row)] * 3 for row in range(2)]


def _stopped_and_resumed(rank, folder):
    """Weights of a run that nothing stops, and of one that a signal stops and --resume continues."""

    def trained(name, **options):
        run = Trained(folder / name, loader=Loader(2), **options)
        torch.manual_seed(0)
        run.model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        run.optimizer = torch.optim.AdamW(run.model.parameters())
        torch.manual_seed(1 + rank)
        return run

    straight = trained("straight")
    straight.go()
    stopped = trained("run", stop_at=1 if rank == 1 else None)
    with pytest.raises(utils.Stopped):
        stopped.go()
    resumed = trained("run", resume=True)
    resumed.go()
    return {"straight": straight.weights(), "resumed": resumed.weights(), "steps": resumed.steps_seen}


@pytest.mark.parametrize("count, steps", [(3, [3, 4, 5, 6, 7, 8]), (4, [3, 4, 5, 6])])
def test_three_and_four_processes_resume_bit_by_bit(tmp_path, count, steps):
    """Three numbers add up to another sum in another order, and DDP chooses the order: see `rehearse`."""
    for results in in_processes(count, _stopped_and_resumed, tmp_path):
        assert torch.equal(results["straight"], results["resumed"])
        assert results["steps"] == steps


def test_several_threads_of_a_cpu_add_up_gradients_in_one_order():
    prepare_cpu()
    torch.manual_seed(0)
    rows, once = torch.randint(0, 3, (4000,)), torch.randn(4000, 64)  # each row is used a thousand times
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(20):
            table = torch.zeros(3, 64, requires_grad=True)
            table[rows].backward(once)
            gradients.append(table.grad)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
