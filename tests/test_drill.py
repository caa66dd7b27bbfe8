"""The short form of drill.py, whose commands are the long one: real runs are killed, stopped and restarted."""

import os
import signal

import pytest
from conftest import in_ranks
from drill import Drill, Setting, differing, last_step, logged_step, wait_for

from evaluation import ranking
from utils import Stopped


@pytest.fixture(scope="module")
def drill(tmp_path_factory, demo):
    return Drill(tmp_path_factory.mktemp("drill"), demo)


def run_in_rank(_rank, drill, *options):
    drill.run_here(*options)


def test_killed_and_restarted_runs_end_bit_identical(drill):
    setting = Setting(ranks=2, workers=1, epochs=6, checkpoint_every=3)
    in_ranks(2, run_in_rank, drill, setting, drill.folder / "straight")
    result = drill.kill(setting, ["rank", "write"], drill.folder / "straight/checkpoint_last.pth")
    assert result["kills"] >= 1 and result["different"] == [] and result["leftovers"] == []


@pytest.mark.parametrize("name, ranks, workers", [("SIGTERM", 1, 2), ("SIGUSR1", 2, 0)])
def test_a_stop_signal_leaves_a_checkpoint_of_the_last_step(drill, name, ranks, workers):
    result = drill.stop(Setting(ranks=ranks, workers=workers, epochs=100), getattr(signal, name))
    assert result["before"] <= result["last"] == result["saved"] < 200
    assert result["code"] == (130 if ranks == 1 else -getattr(signal, name))  # torchrun itself dies of SIGUSR1
    assert "continue with --resume" in open(result["out"] + ".txt").read()


@pytest.mark.parametrize(
    "stage, kind, ranks, workers",
    [("vqa", "evaluation image", 2, 4), ("pretrain", "training image", 2, 4), ("pretrain", "disk", 1, 0)],
)
def test_an_error_ends_all_processes_within_seconds(drill, stage, kind, ranks, workers):
    result = drill.fail(Setting(stage, ranks, workers), kind)
    assert result["codes"] == [2] * ranks and result["alive"] == 0 and result["seconds"] < 30, result


def test_a_lost_process_is_named_by_the_others(drill, tmp_path):
    logs, ranks = drill.start_alone(Setting(ranks=2, epochs=100), tmp_path / "lost")
    wait_for(ranks[0], lambda: logged_step(tmp_path / "lost") >= 3, seconds=240)
    ranks[1].kill()
    assert ranks[0].wait(timeout=60) == 2 and ranks[1].wait() == -signal.SIGKILL
    assert "another process is gone" in logs[0].read_text().splitlines()[-1]


def test_a_stop_within_a_validation_is_a_stop_and_the_validation_is_repeated(drill, tmp_path, monkeypatch):
    setting, run, straight = Setting("retrieval", epochs=2), tmp_path / "run", tmp_path / "straight"
    rerank = ranking.rerank

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        return rerank(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ranking, "rerank", stopped)
        drill.run_here(setting, run)
    assert last_step(run) == 4  # the last one of the first epoch
    for out in (run, straight):
        drill.run_here(setting, out)
    assert differing(straight / "checkpoint_last.pth", run / "checkpoint_last.pth") == []
