"""What is kept of a run, and what a restart continues from; drill.py kills and stops real runs."""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys

import pytest
import torch
from conftest import contents, refused
from torch import nn

from engine.checkpoint import BestCheckpoint, last_path, load_last, random_state, save_last
from engine.config import Config
from engine.run import Run, begin, check_folder, check_same_run, code_version
from utils import UserError, as_config, load_checkpoint


def config(**values) -> Config:
    data = {"image_root": {"vg": "a"}}
    train = {"tracker": "none", "keep_checkpoints": 2, "lr": 1.0}
    return as_config({"seed": 3, "momentum": 0.5, "data": data, "train": train, **values})


def checkpoint(step: int) -> dict:
    """A small checkpoint of one process that can be resumed."""
    return {
        "model": {"weight": torch.full((1000,), float(step))},
        "optimizer": {"state": {}, "param_groups": []},
        "progress": {"step": step},
        "rng": [random_state()],
        "config": config().to_dict(),
    }


def start(folder, seed=3, evaluate=False, resume=False, step=-1):
    """A run whose folder is open."""
    check_folder(folder, evaluate or resume, config())
    run = Run(folder, config(seed=seed), step)
    run.open(evaluate)
    return run


def asked(folder, **changes):
    """What a script was called with."""
    values = {"output_dir": str(folder), "resume": True, "evaluate": False, "seed": None, "other_ranks": False}
    return argparse.Namespace(**{**values, **changes})


def flip(path):
    """Turn bytes in the middle of the weights around."""
    content = bytearray(path.read_bytes())
    start = content.index(torch.full((4,), 2.0).numpy().tobytes())
    content[start : start + 64] = bytes(byte ^ 0xFF for byte in content[start : start + 64])
    path.write_bytes(bytes(content))


def steps_kept(folder) -> list[int]:
    """The steps of all files of a folder, which are checkpoints, newest first."""
    paths = [last_path(folder, number) for number in range(len(list(folder.iterdir())))]
    return [load_checkpoint(path)["progress"]["step"] for path in paths]


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_are_kept_newest_first(tmp_path, keep):
    for step in range(1, 6):
        save_last(tmp_path, checkpoint(step), keep)
    assert steps_kept(tmp_path) == [5, 4, 3][:keep]


def test_a_write_that_fails_leaves_all_that_was_kept(tmp_path, monkeypatch):
    save_last(tmp_path, checkpoint(1), 2), save_last(tmp_path, checkpoint(2), 2)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    refused(lambda: save_last(tmp_path, checkpoint(3), 2), "No space left")
    assert steps_kept(tmp_path) == [2, 1]


def test_flipped_bytes_are_found_and_the_checkpoint_before_is_taken(tmp_path, caplog):
    save_last(tmp_path, checkpoint(1), 2), save_last(tmp_path, checkpoint(2), 2)
    flip(tmp_path / "checkpoint_last.pth")
    refused(lambda: load_checkpoint(tmp_path / "checkpoint_last.pth"), "damaged: the checksum of its record")
    before = contents(tmp_path)
    with caplog.at_level("INFO", "semmim"):
        assert load_last(tmp_path, 2)["progress"]["step"] == 1
    assert "the one before is tried" in caplog.text and contents(tmp_path) == before
    refused(lambda: load_last(tmp_path, 1), "no whole checkpoint is left")
    assert load_last(tmp_path / "empty", 2) is None


def test_a_resumed_run_has_the_best_score_that_the_kept_weights_have(tmp_path):
    best, model = BestCheckpoint(tmp_path, "cider", {}), nn.Linear(2, 2)
    best.offer(model, {"cider": 60.0, "beams": 3}, step=20, epoch=2)
    resumed = BestCheckpoint(tmp_path, "cider", {}, resumed=True)
    resumed.offer(model, {"cider": 55.0}, step=20, epoch=2)  # with another learning rate
    kept = load_checkpoint(tmp_path / "checkpoint_best.pth")["best"]
    assert resumed.best == kept == {"cider": 60.0, "beams": 3, "epoch": 2}
    (tmp_path / "checkpoint_best.pth").unlink()
    resumed = BestCheckpoint(tmp_path, "cider", {}, resumed=True)
    resumed.restore(model)  # keeps the last weights
    resumed.offer(model, {"cider": 40.0}, step=20, epoch=2)
    assert load_checkpoint(tmp_path / "checkpoint_best.pth")["best"] == {"cider": 40.0, "epoch": 2}


# ----------------------------------------------------------------------------------------------------- the beginning


def test_a_resumed_run_keeps_its_seed_and_says_what_changed(tmp_path, caplog):
    start(tmp_path).close()
    save_last(tmp_path, checkpoint(4), 2)
    cfg = config(seed=9, data={"image_root": {"vg": "b"}})
    cfg.train.lr = 0.5
    with caplog.at_level("INFO", "semmim"):
        run, found = begin(asked(tmp_path), cfg)
    assert run.step == found["progress"]["step"] == 4 and cfg.seed == 3
    assert caplog.messages[1:] == [
        "resumed with data.image_root.vg 'b' instead of 'a'",
        "resumed with train.lr 0.5 instead of 1.0",
    ]
    cfg.momentum = 0.6
    refused(lambda: begin(asked(tmp_path), cfg), "--resume: momentum is 0.6, but the checkpoint was trained with 0.5")


def test_another_number_of_processes_needs_a_flag(caplog):
    found, config = {"rng": [0, 1, 2], "config": {"train": {"batch_size": 4}}}, {"train": {"batch_size": 12}}
    refused(lambda: check_same_run(config, found, False), "of 3 processes, this run has 1", "--other_ranks")
    with caplog.at_level("INFO", "semmim"):
        check_same_run(config, found, True)
        assert caplog.text.count("order of the data and random draws are new") == 1
        check_same_run({}, {"rng": [0], "config": {}}, True)  # as many as before
    assert caplog.text.count("order of the data and random draws are new") == 1


# ------------------------------------------------------------------------------------------ the folder and its lock


def test_a_used_folder_is_continued_only_on_request(tmp_path):
    start(tmp_path, seed=1).close()
    before = contents(tmp_path)
    refused(lambda: start(tmp_path, seed=2), "it holds an earlier run; add --resume")
    assert contents(tmp_path) == before
    start(tmp_path, seed=2, evaluate=True).close()
    run = start(tmp_path, seed=3, resume=True)  # without a checkpoint: from the beginning
    run.log(1, {"x": 1.0})
    run.close()
    assert (tmp_path / "config.yaml").read_text().startswith("seed: 3\n")
    refused(lambda: check_folder(tmp_path, True, config(mim={})), "it holds a run of another stage")
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    "files",
    [
        ["images/1.png", "config.yaml", "metrics.json"],
        ["notes.tmp7"],
        ["checkpoint_last.pth"],
        ["run.lock"],  # of another program
        ["run.lock", "metrics.json"],
    ],
)
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"evaluate": True}])
def test_a_folder_that_no_run_wrote_is_refused_and_left_as_it_is(tmp_path, files, options):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    refused(lambda: start(tmp_path, **options), "and no run's run.lock, so no run touches it")
    assert contents(tmp_path) == {name: b"mine" for name in files}


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: start(tmp_path / "file"), "--output_dir", "file")


def test_wandb_follows_tensorboard_and_draws_no_random_number_of_the_training(tmp_path, monkeypatch):
    asked_for = []

    class Package:
        def init(self, **options):
            random.random(), torch.rand(1)
            asked_for.append(options)

    monkeypatch.setitem(sys.modules, "wandb", Package())
    before = torch.get_rng_state()
    Run(tmp_path, config(train={"tracker": "wandb"})).open()
    assert asked_for[0]["sync_tensorboard"] and asked_for[0]["dir"] == str(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def _open(folder, queue):
    try:
        Run(folder, config()).open(evaluate=True)
        queue.put("open")
    except UserError as error:
        queue.put(str(error))


def test_a_folder_in_use_is_refused_and_a_lock_left_behind_is_not(tmp_path):
    (tmp_path / "run.lock").write_text("SemMIM run: process 4711 on elsewhere\n")  # of a process that a kill ended
    run, context = start(tmp_path), multiprocessing.get_context("fork")
    queue = context.Queue()
    for expected in (f"in use by process {os.getpid()} on ", "open"):
        other = context.Process(target=_open, args=(tmp_path, queue))
        other.start()
        assert expected in queue.get(timeout=60)
        other.join()
        run.close()


def test_what_a_kill_left_unfinished_goes_at_the_next_start_and_nothing_else(tmp_path):
    start(tmp_path).close()
    mine = ["my.tmpfile", "notes.tmp7", "mine.json.tmp12"]
    for name in ("checkpoint_last.pth.tmp4711", "config.yaml.tmp12", *mine):
        (tmp_path / name).write_text("half")
    start(tmp_path, evaluate=True).close()
    assert set(contents(tmp_path)) == {"config.yaml", "log.jsonl", "run.lock", *mine}


# ------------------------------------------------------------------------------------------------------------ its log


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    run = start(tmp_path)
    for step, split in ((2, "train"), (4, "train"), (4, "val"), (0, "test")):
        run.log(step, {"x": 1.0}, split, final=split == "test")
    run.close()
    start(tmp_path, resume=True, step=2).close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "train"), (0, "test")]


def test_values_that_are_not_finite_are_logged_as_null(tmp_path):
    run = start(tmp_path)
    run.log(1, {"loss": math.nan, "itc": torch.tensor(2.0)})
    run.image(1, "image", torch.zeros(3, 4, 4))
    run.close()
    assert '"loss": null, "itc": 2.0' in (tmp_path / "log.jsonl").read_text()


def test_numbers_name_the_code_with_git_and_without(monkeypatch):
    assert code_version() != "unknown"
    monkeypatch.setenv("PATH", "")
    assert code_version() == "unknown"
