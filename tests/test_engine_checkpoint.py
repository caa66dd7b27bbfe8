"""What is kept of a run, and what a restart goes on from: see also drill.py, which kills and stops real runs."""

import argparse
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from engine.checkpoint import (
    BestCheckpoint,
    begin,
    check_ranks,
    last_paths,
    load_resumable,
    save_last,
)
from engine.checkpoint import random_state as state_of_generators
from engine.config import Config, Stage
from engine.run import Run
from engine.window import usual_if_far
from utils import UserError, load_checkpoint


def checkpoint(step: int, **changes) -> dict:
    """A small checkpoint of one process that can be resumed."""
    progress = {"step": step, "epoch": 0, "steps_per_epoch": 1000, "total_steps": 1000, "precision": "fp32"}
    progress |= {"followed": 0, "minutes": None, "seconds": None}
    return {
        "model": {"weight": torch.full((1000,), float(step))},
        "optimizer": {"state": {}, "param_groups": []},
        "progress": {**progress, "device": "cpu", "losses": []},
        "rng": [state_of_generators()],
        "config": {"seed": 3, "train": {"lr": 1.0}},
        **changes,
    }


def arguments(folder, **changes):
    """What a script was called with."""
    values = {"output_dir": str(folder), "resume": True, "evaluate": False, "seed": None, "other_ranks": False}
    return argparse.Namespace(**{**values, **changes})


def flip(path, count=64):
    """Turn `count` bytes in the middle of a weight file around."""
    content = bytearray(path.read_bytes())
    start = content.index(torch.full((4,), 2.0).numpy().tobytes())
    for place in range(start, start + count):
        content[place] ^= 0xFF
    path.write_bytes(bytes(content))


def marked(folder) -> None:
    """Make it a run's folder."""
    (folder / "run.lock").write_text("SemMIM run: process 1 on a\n")


def contents(folder):
    """{name: content} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_are_kept_newest_first(tmp_path, keep):
    for step in range(1, 6):
        save_last(tmp_path, checkpoint(step), keep)
    steps = [load_checkpoint(path)["progress"]["step"] for path in last_paths(tmp_path)]
    assert steps == [5, 4, 3][:keep]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in last_paths(tmp_path))
    save_last(tmp_path, checkpoint(6), 1)
    assert [load_checkpoint(path)["progress"]["step"] for path in last_paths(tmp_path)] == [6]


def test_a_write_that_fails_leaves_all_that_was_kept(tmp_path, monkeypatch):
    save_last(tmp_path, checkpoint(1), 2), save_last(tmp_path, checkpoint(2), 2)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(UserError, match="No space left"):
        save_last(tmp_path, checkpoint(3), 2)
    assert [load_checkpoint(path)["progress"]["step"] for path in last_paths(tmp_path)] == [2, 1]


def test_flipped_bytes_are_found_and_the_checkpoint_before_is_taken(tmp_path):
    save_last(tmp_path, checkpoint(1), 2), save_last(tmp_path, checkpoint(2), 2)
    flip(tmp_path / "checkpoint_last.pth")
    with pytest.raises(UserError, match="checkpoint_last.pth: damaged: the checksum of its record .* is wrong"):
        load_checkpoint(tmp_path / "checkpoint_last.pth")
    before = contents(tmp_path)
    resumable, found, lines = load_resumable(tmp_path)
    assert resumable["progress"]["step"] == 1 and "damaged" in lines[0] and "the one before" in lines[0]
    assert contents(tmp_path) == before  # what fails until the folder is locked leaves it as it was
    marked(tmp_path)
    Run(tmp_path, found=found).open(resume_step=1)
    assert (tmp_path / "checkpoint_last_damaged.pth").exists()
    assert load_checkpoint(tmp_path / "checkpoint_last.pth")["progress"]["step"] == 1
    save_last(tmp_path, checkpoint(3), 2)  # the good one is kept beside it
    assert [load_checkpoint(path)["progress"]["step"] for path in last_paths(tmp_path)] == [3, 1]


def test_nothing_whole_is_an_error_and_nothing_at_all_a_beginning(tmp_path):
    assert load_resumable(tmp_path)[0] is None
    save_last(tmp_path, checkpoint(2), 2)
    flip(tmp_path / "checkpoint_last.pth")
    with pytest.raises(UserError, match="no whole checkpoint is left") as error:
        load_resumable(tmp_path)
    assert "\n" not in str(error.value)


def test_a_loss_that_doubles_is_a_jump_and_noise_is_none():
    usual = [4.0, 4.4, 3.8, 4.1, 4.2]
    assert usual_if_far(usual, 18.0) == 4.1
    assert usual_if_far(usual, 5.0) is None and usual_if_far(usual[:2], 1e9) is None
    assert usual_if_far([-0.9, 0.8, -0.4, 0.6, 0.1], 1.0) is None  # around 0, as self-critical training has it


def test_a_missing_or_damaged_best_checkpoint_is_told_before_training(tmp_path, caplog):
    best = BestCheckpoint(tmp_path, "cider", {})
    model = nn.Linear(2, 2)
    best.offer(model, {"cider": 50.0, "beams": 3}, step=10, epoch=1)
    resumed = BestCheckpoint(tmp_path, "cider", {}, {"best": best.best})
    assert resumed.best == {"cider": 50.0, "beams": 3, "epoch": 1}
    (tmp_path / "checkpoint_best.pth").unlink()
    with caplog.at_level("INFO", "semmim"):
        resumed = BestCheckpoint(tmp_path, "cider", {}, {"best": best.best})
    assert "the best epoch so far (1) is lost" in caplog.text and resumed.best == {}
    resumed.restore(model)  # keeps the last weights
    resumed.offer(model, {"cider": 40.0}, step=20, epoch=2)
    assert load_checkpoint(tmp_path / "checkpoint_best.pth")["best"] == {"cider": 40.0, "epoch": 2}


def test_a_resumed_run_keeps_its_seed_and_says_what_changed(tmp_path):
    save_last(tmp_path, checkpoint(4), 2)
    marked(tmp_path)
    stage = Stage("test", "none", may_change=("train.lr",))
    cfg = Config(seed=9, train=Config(lr=0.5))
    resumable, _, lines = begin(arguments(tmp_path), cfg, stage)
    assert resumable["progress"]["step"] == 4 and cfg.seed == 3
    assert lines == ["--resume: continuing from step 4", "resumed with train.lr 0.5 instead of 1.0"]
    with pytest.raises(UserError, match="--resume: train.lr is 0.5, but the checkpoint was trained with 1.0"):
        begin(arguments(tmp_path), cfg, Stage("test", "none"))


def test_another_number_of_processes_needs_a_flag():
    assert check_ranks(1, allowed=False) == []
    with pytest.raises(UserError, match="of 3 processes, this run has 1.*--other_ranks"):
        check_ranks(3, allowed=False)
    assert "order of the data and random draws are new" in check_ranks(3, allowed=True)[0]


def test_a_restart_by_torchrun_without_resume_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="would begin from nothing: add --resume"):
        begin(arguments(tmp_path, resume=False), Config(seed=1), Stage("test", "none"))


# ------------------------------------------------------------------------------------------ the folder and its lock


def _open(folder, queue):
    run = Run(folder)
    try:
        run.open(evaluate=True)
        queue.put("open")
    except UserError as error:
        queue.put(str(error))


def test_a_folder_in_use_is_refused_and_a_lock_left_behind_is_not(tmp_path):
    (tmp_path / "run.lock").write_text("SemMIM run: process 4711 on elsewhere\n")  # of a process that a kill ended
    run = Run(tmp_path)
    run.open()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for expected in (f"in use by process {os.getpid()} on ", "open"):
        other = context.Process(target=_open, args=(tmp_path, queue))
        other.start()
        assert expected in queue.get(timeout=60)
        other.join()
        run.close()


def test_what_a_kill_left_unfinished_goes_at_the_next_start_and_nothing_else(tmp_path):
    mine = ["my.tmpfile", "notes.tmp7", "mine.json.tmp12"]
    for name in ("checkpoint_last.pth.tmp4711", "checkpoint_new.pth", "checkpoint_new.pth.tmp12", *mine):
        (tmp_path / name).write_text("half")
    marked(tmp_path)
    run = Run(tmp_path)
    run.open(evaluate=True)
    run.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["log.jsonl", "run.lock", *mine])


def test_evaluating_twice_leaves_one_point_a_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        run = Run(tmp_path)
        run.open(evaluate=True)
        run.log(0, {"cider": value}, "test", final=True)
        run.close()
    board = EventAccumulator(str(tmp_path / "tensorboard/final"))
    board.Reload()
    assert [event.value for event in board.Scalars("test/cider")] == [2.0]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_is_told_once_and_ends_no_training(tmp_path, caplog):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    marked(tmp_path)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run = Run(tmp_path)
    run.open(evaluate=True)
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    run.close()
    assert caplog.text.count("cannot be written") == 1 and "No space left" in caplog.text


def test_a_reader_that_goes_ends_a_tool_in_silence_and_no_training():
    script = (
        "import logging, utils\n"
        "from engine.distributed import init_distributed\n"
        "init_distributed('cpu')\n"
        "def main():\n"
        "    for line in range(20000): utils.logger.info('a line of the log %d', line)\n"
        "    open('/dev/stderr', 'w').write('trained to the end')\n"
        "utils.run_main(main)\n"
    )
    tool = "import utils\nutils.run_main(lambda: [print('a line', i) for i in range(20000)])\n"
    full = "warning: the log cannot be written here (No space left on device); continuing without\ntrained to the end"
    for text, reader, code, expected in (
        (script, "| head -1", 0, "trained to the end"),
        (tool, "| head -1", 141, ""),
        (script, ">/dev/full", 0, full),
    ):
        command = f'"{sys.executable}" -c "$TEXT" {reader}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(
            ["bash", "-c", command], env={**os.environ, "TEXT": text}, cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.strip()) == (code, expected)
