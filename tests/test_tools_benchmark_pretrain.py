"""tools/benchmark pretrain, memory and all."""

import json

import pytest
import torch
from tiny import NO_DROPOUT, TINY, TOKENIZER, tiny_config

from engine.config import PRETRAIN, load_config
from engine.window import PEAKS
from tools.benchmark import __main__ as benchmark
from tools.benchmark import all as benchmark_all
from tools.benchmark import pretrain as benchmark_pretrain
from utils import ROOT, UserError

CPU = torch.device("cpu")


def run(capsys, *words):
    benchmark.main([*words])
    return json.loads(capsys.readouterr().out)


def test_no_weights_are_read_whatever_the_configuration_names():
    cfg = benchmark_pretrain.random_config("configs/Pretrain.yaml", ["model.bert.weights=nowhere", "train.lr=0.5"])
    assert cfg.model.image_encoder.weights == cfg.model.bert.weights == "random" and cfg.train.lr == 0.5


def test_two_settings_are_timed_by_turns(capsys):
    words = ["pretrain", "--device", "cpu", "--rounds", "2", "--batches", "3"]
    words += ["--override", *TINY, "train.precision=fp32", "train.batch_size=16"]
    words += ["--compare", "data.bucket_batches=0", "data.bucket_batches=3 train.accumulation=2"]
    found = run(capsys, *words)
    a, b = found["A"], found["B"]
    assert a["pairs_of_a_step"] == 16 and b["pairs_of_a_step"] == 32
    assert b["tokens_of_a_row"] < a["tokens_of_a_row"] and b["gflop_of_a_pair"] < a["gflop_of_a_pair"]
    for side in (a, b):
        operations = side["gflop_of_a_pair"] * 1e9 * side["pairs_per_second"]
        assert side["tflops"] == pytest.approx(operations / 1e12, rel=0.02, abs=1e-4)
        assert side["mfu"] == pytest.approx(side["tflops"] / found["peak_tflops"], rel=0.02, abs=1e-3)
    assert found["B_to_A"]["pairs_per_second"] > 0


def test_equal_settings_have_equal_losses_and_a_file_is_a_setting(capsys, tmp_path):
    (tmp_path / "own.yaml").write_text(f"base: {ROOT / 'configs/Pretrain.yaml'}\ntrain: {{clip_grad: 0.5}}\n")
    words = ["pretrain", "--device", "cpu", "--rounds", "1", "--batches", "1", "--override"]
    words += [*TINY, *NO_DROPOUT, "train.precision=fp32", "--compare", "", f"{tmp_path / 'own.yaml'}"]
    assert run(capsys, *words)["B_to_A"]["difference_of_first_loss"] == 0


def test_predictions_are_those_of_the_formula(capsys):
    found = run(capsys, "pretrain", "--device", "cpu", "--rounds", "0", "--batches", "1", "--override", *TINY)
    found = found["predicted_not_measured"]
    speed = 8 * 0.4 * PEAKS["H100"][0] * 1e12 / (found["gflop_of_a_pair"] * 1e9)
    assert found["8 x H100"]["pairs_per_second"]["40%"] == pytest.approx(speed, rel=0.5)  # GFLOP has one digit here
    speed = found["64 x A100"]["pairs_per_second"]["30%"]
    hours = 5.1e6 * 20 / speed / 3600
    assert found["64 x A100"]["hours_of_5.1M_captions_x_20_epochs"]["30%"] == pytest.approx(hours, abs=0.051)


def test_captions_are_as_long_as_real_ones_and_sorting_spares_padding():
    lengths = benchmark_pretrain.caption_lengths(20_000, 25, torch.Generator().manual_seed(0))
    assert 12 < lengths.float().mean() < 13.5 and lengths.min() >= 3 and lengths.max() == 25
    tokens = {}
    for bucket in (0, 8):
        cfg = tiny_config("train.batch_size=128", f"data.bucket_batches={bucket}")
        batches = benchmark_pretrain.make_batches(cfg, TOKENIZER, 8)
        tokens[bucket] = sum(batch["input_ids"].shape[1] for batch in batches) / 8
        kept = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
        assert len(kept) == 1024 and all(
            batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in batches
        )
    assert tokens[0] > 24 and tokens[8] < 16


def test_counts_below_their_least_are_an_error():
    for words in (["pretrain", "--rounds", "-1"], ["pretrain", "--batches", "0"]):
        with pytest.raises(UserError, match="at least"):
            benchmark.main(words)


def test_all_runs_every_benchmark_and_keeps_what_fails(tmp_path, monkeypatch, capsys):
    quick = {"good": "params --config configs/demo/Pretrain.yaml", "bad": "params --config no.yaml"}
    monkeypatch.setattr(benchmark_all, "CPU", {**quick, "other": "caption"})
    found = run(capsys, "all", "--device", "cpu", "--folder", str(tmp_path), "--only", "good", "bad")
    assert found == json.loads((tmp_path / "all.json").read_text())
    assert found["good"]["figures"]["trainable_parameters"]["total"] > 1e6
    assert "no.yaml" in found["bad"]["error"]
    assert "other" not in found
    with pytest.raises(UserError, match="--only: none is none of good, bad, other"):
        run(capsys, "all", "--device", "cpu", "--folder", str(tmp_path), "--only", "none")


@pytest.mark.parametrize("commands", [benchmark_all.GPU, benchmark_all.CPU], ids=["GPU", "CPU"])
def test_every_command_of_all_is_one_that_the_tool_takes(commands):
    for name, words in commands.items():
        args = benchmark.parse(words.split())
        overrides = [*getattr(args, "override", ()), *" ".join(getattr(args, "compare", None) or []).split()]
        if hasattr(args, "config"):
            assert load_config(args.config, overrides, PRETRAIN), name
