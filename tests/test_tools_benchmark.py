"""tools.benchmark: counts made by hand, equal results of what is compared, and every command that `all` runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from tiny import NO_DROPOUT, TINY, TOKENIZER, tiny_config

from engine.config import PRETRAIN, load_config
from models.pretrain import operations
from tools.benchmark import __main__ as benchmark
from tools.benchmark import model, pretrain, retrieval, roofline
from tools.benchmark.summary import summary
from utils import UserError


def run(capsys, *words):
    benchmark.main([str(word) for word in words])
    return json.loads(capsys.readouterr().out)  # nothing else is on standard output


def test_base_size_has_the_parameters_computed_from_the_shapes(capsys):
    found = run(capsys, "params")
    assert found["gflop_of_a_pair_by_tokens"] == {"14": 321.8, "25": 356.4}  # docs/speed.md
    counts = found["trainable_parameters"]
    dim, ffn, vocab = 768, 3072, 30522
    linear = dim * dim + dim
    layer = 4 * linear + 2 * dim * ffn + ffn + dim + 2 * 2 * dim  # attention, feed-forward, two norms
    cross = 4 * linear + 2 * dim
    embeddings = (vocab + 512 + 2) * dim + 2 * dim
    lm_head = linear + 2 * dim + vocab  # tied: its matrix is counted with the embeddings
    vit = 3 * 16 * 16 * dim + dim + 197 * dim + 12 * layer + 2 * 2 * dim  # no patch bias; [CLS]; positions; outer norms
    assert counts["image_encoder"] == vit + dim  # [MASK]
    assert counts["text_encoder"] == embeddings + 6 * layer
    assert counts["fusion_encoder"] == 6 * (layer + cross)
    assert counts["decoder"] == embeddings + 12 * (layer + cross) + lm_head
    assert counts["heads"] == 2 * (dim * 256 + 256) + 2 * dim + 2 + lm_head + 1  # 1: the temperature
    assert counts["encoding_head"] == dim * ffn + ffn + ffn * 1024
    assert counts["total"] == sum(value for key, value in counts.items() if key != "total")
    none = run(capsys, "params", "--override", "mim.target=none")["trainable_parameters"]
    assert none["encoding_head"] == 0 and none["image_encoder"] == vit


def test_two_settings_are_timed_by_turns(capsys):
    words = ["pretrain", "--device", "cpu", "--rounds", 2, "--batches", 3]
    words += ["--override", *TINY, "train.precision=fp32", "train.batch_size=16"]
    words += ["--compare", "data.bucket_batches=0", "data.bucket_batches=3 train.accumulation=2"]
    found = run(capsys, *words)
    a, b = found["A"], found["B"]
    assert a["pairs_of_a_step"] == 16 and b["pairs_of_a_step"] == 32
    assert b["tokens_of_a_row"] < a["tokens_of_a_row"] and b["gflop_of_a_pair"] < a["gflop_of_a_pair"]
    for side in (a, b):
        flops = side["gflop_of_a_pair"] * 1e9 * side["pairs_per_second"]
        assert side["tflops"] == pytest.approx(flops / 1e12, rel=0.02, abs=1e-4)
        assert side["mfu"] is None  # of a CPU's peak nothing is known
    assert found["B_to_A"]["pairs_per_second"] > 0
    assert found["operations"]["_fused_adamw_"]["calls"] == 4 and found["operations"]["mm"]["share"] > 0.05


def test_equal_settings_have_equal_losses(capsys):
    words = ["pretrain", "--device", "cpu", "--rounds", 1, "--batches", 1, "--override"]
    words += [*TINY, *NO_DROPOUT, "train.precision=fp32", "--compare", "", "train.clip_grad=0.5"]
    assert run(capsys, *words)["B_to_A"]["difference_of_first_loss"] == 0


def test_captions_are_as_long_as_real_ones_and_sorting_spares_padding():
    lengths = pretrain.caption_lengths(20_000, 25, torch.Generator().manual_seed(0))
    assert 12 < lengths.float().mean() < 13.5 and lengths.min() >= 3 and lengths.max() == 25
    tokens = {}
    for bucket in (0, 8):
        cfg = tiny_config("train.batch_size=128", f"data.bucket_batches={bucket}")
        batches = pretrain.make_batches(cfg, TOKENIZER, 8)
        assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in batches)
        tokens[bucket] = sum(batch["input_ids"].shape[1] for batch in batches) / 8
    assert tokens[0] > 24 and tokens[8] < 16


def test_captions_are_timed_against_transformers_with_equal_sentences(capsys):
    words = "caption --device cpu --images 2 --beams 2 --max_tokens 4 --repeats 1 --override".split()
    found = run(capsys, *words, *TINY)
    assert found["equal_tokens"] == 1.0 and found["tokens"] == 4 and found["ratio"] > 0


def test_reranking_is_timed_against_the_loop_over_queries_with_equal_scores(capsys, monkeypatch):
    words = "retrieval --device cpu --images 12 --k 5 --queries 12 --repeats 2 --override train.precision=fp32".split()
    found = run(capsys, *words, *TINY)
    assert found["texts"] == 60 and found["pairs"] == 12 * 5 + 60 * 5
    assert found["ratio"] > 0
    assert found["largest_score_difference"] <= 1e-3 and found["score_spread"] > 0
    monkeypatch.setattr(retrieval, "rerank_by_query", lambda *args: torch.full((12 * 5,), 9.0))
    with pytest.raises(RuntimeError, match="differ"):
        run(capsys, *words, *TINY)


@pytest.mark.parametrize("resize", ["torch", "pillow"])
def test_the_loader_is_measured(capsys, resize):
    sizes = "--images 8 --width 80 --height 60 --image_size 32 --pairs 16 --batch_size 4 --repeats 1".split()
    found = run(capsys, "loader", *sizes, "--resize", resize)
    assert found["pairs"] == 16 and found["ms_of_cpu_per_pair"] > 0


def test_counts_below_one_are_an_error():
    refused(lambda: benchmark.main(["retrieval", "--repeats", "0"]), "--repeats 0")


def test_a_checkpoint_is_timed(capsys):
    found = run(capsys, "checkpoint", "--device", "cpu", "--repeats", 1, "--override", *TINY)
    assert found["gigabytes"] > 0 and found["seconds"] > 0


def test_the_traced_step_has_the_operations_of_the_formula_and_no_wait_for_the_host():
    overrides, pairs = (
        [*TINY, "text.max_tokens=8", "data.bucket_batches=0"],
        256,
    )  # so many that draws of words even out
    found = roofline.trace_step("configs/Pretrain.yaml", overrides, pairs)
    model_, cfg = model.meta_model("configs/Pretrain.yaml", [*overrides, f"train.batch_size={pairs}"])
    tokens = pretrain.make_batches(cfg, model.tokenizer_of(cfg), 1)[0]["input_ids"].shape[1]
    counted = operations(model_, pairs, tokens)
    assert sum(x.flops for x in found) == pytest.approx(counted, rel=0.1)
    names = {x.name for x in found}
    assert "_fused_adamw_" in names and not names & {"nonzero", "_local_scalar_dense"}


def kernel(name, flops, reads, writes):
    return roofline.Operation(name, flops, dict.fromkeys(reads, 10), dict.fromkeys(writes, 10))


def test_the_roofline_adds_operations_traffic_and_launches_and_fuses_what_stands_between_matrix_products():
    a100 = 312e12 * 0.7, 2.04e12 * 0.85
    #          1 -> mm -> 2 -> relu -> 3 -> exp -> 4 -> mm -> 5; 3 is read again by the last kernel
    found = [kernel("mm", 7e9, [1], [2]), kernel("relu", 0, [2], [3]), kernel("exp", 0, [3], [4])]
    found += [kernel("mm", 7e9, [4], [5]), kernel("add", 0, [3, 5], [6]), kernel("sum", 0, [6], [7])]
    eager, fused = (roofline.predict(found, "NVIDIA A100-SXM4", way) for way in (False, True))
    assert eager["seconds"] == pytest.approx(14e9 / a100[0] + (2 + 2 + 3 + 2) * 10 / a100[1] + 6 * 3e-6)
    assert fused["memory"] == pytest.approx((1 + 2 + 2) * 10 / a100[1]) and fused["kernels"] == 4
    assert roofline.predict(found, "cpu") is None
    by_bytes = roofline.by_bytes(found)
    assert next(iter(by_bytes)) == "add" and by_bytes["add"] == {"calls": 1, "gb": 0.0, "share": round(3 / 9, 3)}


def test_the_summary_shows_measured_beside_predicted_figures():
    sides = {side: {"pairs_of_a_step": 64, "pairs_per_second": 500.0, "mfu": 0.2} for side in "AB"}
    sides["A"]["settings"], sides["B"]["settings"] = "train.compile=false", "train.compile=true"
    predicted = {"64": {"pairs_per_second": 700, "mfu": 0.25}}
    result = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.14", "caption": {"error": "out of memory"}}
    result |= {"roofline": {"figures": {"config": "", "H100": predicted}}, "pretrain_64": {"figures": sides}}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary(result).splitlines()]
    assert ["pretrain: 64 pairs, eager, pairs/s", "500.0", "700"] in rows
    assert ["pretrain: 64 pairs, compiled, pairs/s", "500.0", "-"] in rows
    assert ["caption", "out of memory", "-"] in rows


def test_all_runs_every_benchmark_and_keeps_what_fails(tmp_path, monkeypatch, capsys):
    good, bad = {"trainable_parameters": {}}, "error: no.yaml does not exist"

    def start(command, **_):
        failed = "no.yaml" in command
        return SimpleNamespace(returncode=2 * failed, stdout=json.dumps(good), stderr=f"a line\n{bad}\n")

    monkeypatch.setattr(benchmark.subprocess, "run", start)
    commands = {"good": "params", "bad": "params --config no.yaml", "other": "caption"}
    monkeypatch.setattr(benchmark, "CPU", commands)
    words = ["all", "--device", "cpu", "--folder", tmp_path / "new", "--only"]
    found = run(capsys, *words, "good", "bad")
    assert found == json.loads((tmp_path / "new/all.json").read_text()) and "other" not in found
    assert found["good"]["figures"] == good and found["bad"]["error"] == bad
    refused(lambda: run(capsys, *words, "none"), "--only: none is none of good, bad, other")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/all.json").touch()
    with pytest.raises(UserError, match="own: holds files that tools.benchmark did not write"):
        run(capsys, *words[:3], "--folder", tmp_path / "own")


@pytest.mark.parametrize("commands", [benchmark.GPU, benchmark.CPU], ids=["GPU", "CPU"])
def test_every_command_of_all_is_one_that_the_tool_takes(commands):
    for words in commands.values():
        args = benchmark.parse_arguments(words.split())
        overrides = [*getattr(args, "override", ()), *" ".join(getattr(args, "compare", None) or []).split()]
        assert not hasattr(args, "config") or load_config(args.config, overrides, PRETRAIN)
