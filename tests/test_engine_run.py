import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.checkpoint import Found
from engine.config import Config
from engine.run import Run
from utils import UserError


def start(folder, config=None, **options):
    """A run whose folder is open."""
    run = Run(folder, config)
    run.open(**options)
    return run


def test_a_new_run_keeps_the_earlier_one_and_a_resumed_one_goes_on(tmp_path):
    for step, options in ((1, {}), (2, {"resume_step": 1}), (3, {}), (4, {})):
        run = start(tmp_path, Config(seed=step), **options)
        run.log(step, {"loss": 1.0})
        run.close()
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        for folder in ("earlier_1", "earlier_2", ".")
    ]
    assert steps == [[1, 2], [3], [4]]
    assert len(list((tmp_path / "earlier_1/tensorboard").iterdir())) == 2
    assert (tmp_path / "config.yaml").read_text() == "seed: 4\n"
    assert (tmp_path / "earlier_1/config.yaml").read_text() == "seed: 2\n"


def test_a_new_run_moves_what_a_run_wrote_and_nothing_else(tmp_path):
    own = ["metrics.json", "caption_result.json", "caption_result_val.json", "vqa_result.json", "checkpoint_last.pth"]
    for name in (*own, "retrieval_train.json", "config_of_mine.yaml"):
        (tmp_path / name).write_text("{}")
    start(tmp_path).close()
    assert sorted(path.name for path in (tmp_path / "earlier_1").iterdir()) == sorted(own)
    assert (tmp_path / "retrieval_train.json").exists() and (tmp_path / "config_of_mine.yaml").exists()


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    run = start(tmp_path)
    for step, split in ((2, "train"), (4, "train"), (4, "val"), (0, "test")):
        run.log(step, {"x": 1.0}, split, final=split == "test")
    run.close()
    start(tmp_path, resume_step=2).close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "train"), (0, "test")]


def test_a_resumed_run_whose_epochs_have_another_number_of_steps_begins_logs_of_its_own(tmp_path):
    """With --other_ranks: the steps of one count would hide, double or cut off those of the other."""
    run = start(tmp_path, Config(seed=1))
    for step in (6, 12, 18):  # 8 steps an epoch; the checkpoint is of step 12
        run.log(step, {"x": 1.0})
        run.image(step, "masking", torch.zeros(3, 4, 4))
    run.close()
    found = Found(written={}, steps_per_epoch=8)
    run = Run(tmp_path, Config(seed=1), found)
    run.open(resume_step=6, steps_per_epoch=4)
    run.log(12, {"x": 2.0})
    run.image(12, "masking", torch.ones(3, 4, 4))
    run.close()
    for folder, steps in ((tmp_path / "earlier_1", [6, 12, 18]), (tmp_path, [12])):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        board = EventAccumulator(str(folder / "tensorboard"))
        board.Reload()
        points = [event.step for event in board.Scalars("train/x")]
        images = sorted(path.name for path in (folder / "images").iterdir())
        assert [line["step"] for line in lines] == points == steps
        assert images == [f"masking_{step:07}.png" for step in steps]
    same = Run(tmp_path, Config(seed=1), Found(written={}, steps_per_epoch=4))
    same.open(resume_step=6, steps_per_epoch=4)  # as ever
    same.close()
    assert not (tmp_path / "earlier_2").exists() and (tmp_path / "log.jsonl").read_text() == ""


def test_values_that_are_not_finite_are_logged_as_null(tmp_path):
    run = start(tmp_path)
    run.log(1, {"loss": math.nan, "itc": torch.tensor(2.0)})
    run.image(1, "image", torch.zeros(3, 4, 4))
    run.close()
    assert '"loss": null, "itc": 2.0' in (tmp_path / "log.jsonl").read_text()


def test_metrics_are_written_whole(tmp_path):
    run = start(tmp_path)
    run.write_metrics({"test": {"tr_r1": 50.0}})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "test": {\n    "tr_r1": 50.0\n  }\n}\n'
    assert not list(tmp_path.glob("*tmp*"))


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir .*file"):
        start(tmp_path / "file")
