"""tools.ablate: which rows it runs, that none is run twice, and that it resumes what was stopped."""

import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

from engine.config import arguments as script_arguments
from tools.ablate import __main__ as ablate
from tools.ablate import running
from utils import Stopped, UserError, make_folder

BASE = "configs/demo/Pretrain.yaml"
ROWS = ["semmim", "table4_none", "table4_pixels", "table5_random", "table6_15", "table6_45"]
ROWS += ["table7_none", "table7_1", "table7_6", "table7_9"]


class Stages:
    """Stands in for the scripts: writes metrics.json, or fails if `fails` names row and stage."""

    def __init__(self):
        self.calls, self.fails = [], set()

    def start(self, run, stage, gpus, threads, device):
        self.calls.append((run.row, run.seed, stage.name))
        code = 2 if (run.row, stage.name) in self.fails else 0
        log = make_folder(run.folder) / f"{stage.name}.log"
        log.write_text("error: no luck\n" if code else "")
        if not code:
            metrics = make_folder(run.folder / stage.name) / "metrics.json"
            metrics.write_text(json.dumps({"test": {"itm_tr_r1": 1.0}}))
        return ended(code)


def ended(code):
    """A process that has ended."""
    return SimpleNamespace(poll=lambda: code, returncode=code, terminate=lambda: None, wait=lambda: code)


@pytest.fixture
def fake(monkeypatch):
    stages = Stages()
    monkeypatch.setattr(running, "start_stage", stages.start)
    return stages


def arguments(tmp_path, *more) -> list[str]:
    return [*map(str, more), "--base", BASE, "--output", str(tmp_path / "out"), "--device", "cpu"]


def test_start_layers_scale_with_depth():
    assert [ablate.scaled_layer(layer, 12) for layer in (1, 6, 9, 12)] == [1, 6, 9, 12]
    assert [ablate.scaled_layer(layer, 24) for layer in (1, 6, 9, 12)] == [2, 12, 18, 24]
    assert [ablate.scaled_layer(layer, 2) for layer in (1, 6, 9, 12)] == [1, 1, 2, 2]


def test_every_row_runs_once_a_seed_a_failed_one_is_named_and_tried_again_and_the_others_go_on(tmp_path, fake):
    fake.fails = {("table5_random", "retrieval")}
    with pytest.raises(UserError, match="2 runs failed: .*table5_random/seed_42: retrieval ended with 2 .*no luck"):
        ablate.main(arguments(tmp_path, "all", "--seeds", 2))
    stages = ("pretrain", "retrieval", "vqa")
    expected = [(row, seed, stage) for seed in (42, 43) for row in ROWS for stage in stages]
    missing = [("table5_random", seed, "vqa") for seed in (42, 43)]
    assert fake.calls == [call for call in expected if call not in missing]
    fake.calls, fake.fails = [], set()
    ablate.main(arguments(tmp_path, 5, 6, "--seeds", 2, "--stages", "zeroshot", "retrieval", "vqa"))
    again = [call for call in fake.calls if call[2] != "zeroshot"]
    assert again == [("table5_random", seed, stage) for seed in (42, 43) for stage in ("retrieval", "vqa")]
    result = json.loads((tmp_path / "out/table6_45/seed_43/result.json").read_text())
    assert set(result["stages"]) == {"zeroshot", *stages} and result["row"] == "table6_45"
    assert result["stages"]["pretrain"]["settings"]["mim"]["mask_ratio"] == 0.45


def test_finished_stages_of_other_settings_are_refused(tmp_path, fake):
    ablate.main(arguments(tmp_path, 5, "--seeds", 1))
    ablate.main(arguments(tmp_path, 5, "--seeds", 1, "--override", "data.num_workers=2"))
    with pytest.raises(UserError, match="pretrain was run with train.epochs 5, now it is 1; use another --output"):
        ablate.main(arguments(tmp_path, 5, "--seeds", 1, "--override", "train.epochs=1"))


def test_the_dvae_row_is_left_out_without_its_weights(tmp_path, fake, capsys):
    ablate.main(arguments(tmp_path, 4, "--seeds", 1))
    assert "table4_dvae: left out" in capsys.readouterr().out
    (tmp_path / "codebook").mkdir()
    ablate.main(arguments(tmp_path, 4, "--seeds", 1, "--override", f"mim.codebook={tmp_path / 'codebook'}"))
    assert ("table4_dvae", 42, "pretrain") in fake.calls


def test_the_gpus_are_divided_evenly_among_the_runs(monkeypatch):
    assert running.divide_gpus(2, "cpu") == [[], []]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,4,5,6")
    assert running.divide_gpus(2, "auto") == [["7", "3"], ["4", "5"]]
    refused(lambda: running.divide_gpus(6, "auto"), "--jobs 6: there are only 5 GPUs")


def test_as_many_runs_as_slots_go_side_by_side(tmp_path, monkeypatch, fake):
    monkeypatch.setattr(ablate, "divide_gpus", lambda jobs, device: [[]] * jobs)
    started, both = [], {"semmim", "table5_random"}

    def start(run, stage, *args):  # pre-training ends when both rows are at it
        process = fake.start(run, stage, *args)
        if stage.name == "pretrain":
            started.append(run.row)
            process.poll = lambda: 0 if set(started) == both else None
        return process

    monkeypatch.setattr(running, "start_stage", start)
    ablate.main(arguments(tmp_path, 5, "--seeds", 1, "--jobs", 2))
    assert set(started) == both and len(fake.calls) == 6


def test_a_stage_uses_its_gpus_and_resumes_from_its_checkpoint(tmp_path):
    parsed = ablate.parse_arguments(arguments(tmp_path, 5, "--seeds", 1, "--stages", "zeroshot", "retrieval"))
    run = ablate.plan(parsed)[0][1]
    pretrain, zeroshot, retrieval = (running.command(run, stage, 2, "auto") for stage in run.stages)
    for words in (pretrain, zeroshot, retrieval):
        script_arguments("", words[words.index("--config") :])  # which the scripts accept
    assert run.row == "table5_random" and 'mim.masking="random"' in pretrain
    assert "--nproc_per_node=2" in pretrain and "--checkpoint" not in pretrain and "--resume" in pretrain
    checkpoint = str(run.folder / "pretrain/checkpoint_last.pth")
    assert checkpoint in zeroshot and "--evaluate" in zeroshot and "--resume" not in zeroshot
    assert checkpoint in retrieval and "--resume" in retrieval and "--evaluate" not in retrieval


PROGRAM = """
import json, os, pathlib, signal, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
output.mkdir(exist_ok=True)
print(os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if output.name == "pretrain" and not (output / "checkpoint_last.pth").exists():
    def stop(*_):
        time.sleep(0.5)
        (output / "checkpoint_last.pth").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (output / "started").touch()
    time.sleep(60)
(output / "metrics.json").write_text("{}")
"""


def test_a_signal_ends_the_running_stage_starts_no_other_and_the_next_call_resumes(tmp_path, monkeypatch):
    real = running.command
    monkeypatch.setattr(running, "command", lambda *a: [sys.executable, "-c", PROGRAM, *real(*a)[2:]])
    monkeypatch.setattr(ablate, "divide_gpus", lambda jobs, device: [["4"]])
    started = [tmp_path / f"out/{row}/seed_42/pretrain/started" for row in ("semmim", "table5_random")]
    stop_when(started[0].exists)
    with pytest.raises(Stopped):
        ablate.main(arguments(tmp_path, 5, "--seeds", 1))
    assert not started[1].exists() and not (tmp_path / "out/semmim/seed_42/result.json").exists()
    assert (tmp_path / "out/semmim/seed_42/pretrain/checkpoint_last.pth").exists()  # its process was waited for
    monkeypatch.setattr(ablate, "rows_of", lambda tables: ["semmim"])
    ablate.main(arguments(tmp_path, 5, "--seeds", 1))
    lines = (tmp_path / "out/semmim/seed_42/pretrain.log").read_text().splitlines()
    assert lines == [f"{torch.get_num_threads()} 4"] * 2
    assert len(json.loads((tmp_path / "out/semmim/seed_42/result.json").read_text())["stages"]) == 3


def stop_when(ready) -> None:
    """Send this process a SIGTERM once `ready()` is true, from another thread."""

    def watch():
        while not ready():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
