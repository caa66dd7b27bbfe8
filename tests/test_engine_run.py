import json
import math
import random
import sys

import pytest
import torch

from engine.checkpoint import Found
from engine.config import Config
from engine.run import Run
from utils import UserError, as_config


def start(folder, config=None, **options):
    """A run whose folder is open."""
    run = Run(folder, config)
    run.open(**options)
    return run


def contents(folder) -> dict[str, bytes | str]:
    """{file: its bytes} below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_used_folder_is_continued_only_on_request(tmp_path):
    start(tmp_path, Config(seed=1)).close()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="it holds an earlier run; add --resume to continue it"):
        start(tmp_path, Config(seed=2))
    assert contents(tmp_path) == before
    start(tmp_path, Config(seed=2), evaluate=True).close()
    run = Run(tmp_path, Config(seed=3), Found())  # --resume, without a checkpoint: from the beginning
    run.open()
    run.log(1, {"x": 1.0})
    run.close()
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"
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
@pytest.mark.parametrize("options", [{}, {"resume_step": 3}, {"evaluate": True}])
def test_a_folder_that_no_run_wrote_is_refused_and_left_as_it_is(tmp_path, files, options):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    run = Run(tmp_path, Config(seed=1), Found() if "resume_step" in options else None)
    with pytest.raises(UserError, match="and no run's run.lock: no run wrote it"):
        run.open(**options)
    assert contents(tmp_path) == {name: b"mine" for name in files}


def resume(folder, step, config=None):
    """A run that goes on from a checkpoint of `step`, open."""
    run = Run(folder, config, Found(step=step))
    run.open(resume_step=step)
    return run


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    run = start(tmp_path)
    for step, split in ((2, "train"), (4, "train"), (4, "val"), (0, "test")):
        run.log(step, {"x": 1.0}, split, final=split == "test")
    run.close()
    resume(tmp_path, 2).close()
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


def test_wandb_follows_tensorboard_and_its_failures_end_no_training(tmp_path, monkeypatch, caplog):
    told = []

    class Package:
        def init(self, **options):
            random.random(), torch.rand(1)
            told.append(options)
            return self

        def finish(self, exit_code):
            raise RuntimeError("no server")

    monkeypatch.setitem(sys.modules, "wandb", Package())
    before = torch.get_rng_state()
    run = start(tmp_path, as_config({"train": {"tracker": "wandb"}}))
    run.log(1, {"x": 1.0})
    run.close()
    assert told[0]["sync_tensorboard"] and told[0]["dir"] == str(tmp_path) and "no server" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
