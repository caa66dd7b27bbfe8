import json
import math

import pytest
import torch

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
