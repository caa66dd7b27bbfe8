import math

import pytest
import torch

from engine.config import Config
from engine.run import Run
from utils import UserError


def test_a_new_run_keeps_the_earlier_log_beside_and_a_resumed_one_goes_on(tmp_path):
    for step, append in ((1, False), (2, True), (3, False)):
        run = Run(tmp_path, Config(seed=step), append=append)
        run.log(step, {"loss": 1.0})
        run.close()
    assert [line.split(",")[0] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ['{"step": 3']
    assert len((tmp_path / "log_previous.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "tensorboard_previous").iterdir())) == 2
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"


def test_values_that_are_not_finite_are_logged_as_null(tmp_path):
    run = Run(tmp_path)
    run.log(1, {"loss": math.nan, "itc": torch.tensor(2.0)})
    run.image(1, "picture", torch.zeros(3, 4, 4))
    run.close()
    assert '"loss": null, "itc": 2.0' in (tmp_path / "log.jsonl").read_text()


def test_metrics_are_written_whole(tmp_path):
    run = Run(tmp_path)
    run.write_metrics({"test": {"tr_r1": 50.0}})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "test": {\n    "tr_r1": 50.0\n  }\n}\n'
    assert not list(tmp_path.glob("*tmp*"))


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir .*file"):
        Run(tmp_path / "file")
