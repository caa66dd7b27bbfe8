"""tools.benchmark: counts made by hand, equal results of what is compared, and every command that `all` runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import NO_DROPOUT, TINY, TOKENIZER, tiny_config

from engine.config import PRETRAIN, load_config
from models.pretrain import operations
from tools.benchmark import __main__ as benchmark
from tools.benchmark import everything, model, pretrain, retrieval, roofline
from utils import UserError

CPU_ONLY = ["--device", "cpu", "--repeats", 1]


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


def test_steps_are_timed_with_their_operations(capsys):
    words = ["pretrain", *CPU_ONLY, "--batches", 3, "--override", *TINY, *NO_DROPOUT]
    words += ["train.precision=fp32", "train.batch_size=16", "data.bucket_batches=3"]
    a, b = (run(capsys, *words, *more) for more in (["data.bucket_batches=0"], ["train.batch_size=32"]))
    assert a["pairs_of_a_step"] == 16 and b["pairs_of_a_step"] == 32
    assert b["tokens_of_a_row"] < a["tokens_of_a_row"] and b["gflop_of_a_pair"] < a["gflop_of_a_pair"]
    for case in (a, b):
        pairs = case["pairs_per_second"] * case["seconds_of_a_step"]
        assert pairs == pytest.approx(case["pairs_of_a_step"], rel=0.05)
        assert case["mfu"] is None  # of a CPU's peak nothing is known
        assert any("aten::_fused_adamw_" in line for line in case["operations_by_time"])


def test_captions_are_as_long_as_real_ones_and_sorting_spares_padding():
    lengths = pretrain.caption_lengths(20_000, 25, torch.Generator().manual_seed(0))
    assert 12 < lengths.float().mean() < 13.5 and lengths.min() >= 3 and lengths.max() == 25
    tokens = {}
    for window in (0, 8):
        cfg = tiny_config("train.batch_size=128", f"data.bucket_batches={window}")
        tokens[window] = sum(batch["input_ids"].shape[1] for batch in pretrain.make_batches(cfg, TOKENIZER, 8)) / 8
    assert tokens[0] > 24 and tokens[8] < 16


def test_captions_are_timed_against_transformers_with_equal_sentences(capsys):
    found = run(capsys, "caption", *CPU_ONLY, "--images", 2, "--override", *TINY)
    assert found["equal_tokens"] == 1.0 and found["tokens"] == 20 and found["ratio"] > 0


def test_reranking_is_timed_against_the_loop_over_queries_with_equal_scores(capsys, monkeypatch):
    words = ["retrieval", *CPU_ONLY, "--images", 12, "--override", "train.precision=fp32", *TINY]
    found = run(capsys, *words)
    assert found["pairs"] == 12 * 60 + 60 * 12 and found["ratio"] > 0
    assert found["largest_score_difference"] <= 1e-3 and found["score_spread"] > 0
    monkeypatch.setitem(retrieval.TOLERANCE, "fp32", -1)
    with pytest.raises(RuntimeError, match="differ"):
        run(capsys, *words)


def test_the_loader_and_a_checkpoint_are_timed(capsys):
    words = ["loader", *CPU_ONLY, "--pairs", 32, "--override", *TINY, "train.batch_size=8", "augment.resize=pillow"]
    found = run(capsys, *words)
    assert found["ms_of_cpu_per_pair"] > 0 and found["resized_by"] == "pillow"
    found = run(capsys, "checkpoint", *CPU_ONLY, "--override", *TINY)
    assert found["gigabytes"] > 0 and found["seconds_per_gigabyte"] > 0


def test_the_traced_step_has_the_operations_of_the_formula():
    pairs = 256  # so many that draws of words even out
    overrides = [*TINY, "text.max_tokens=8", "data.bucket_batches=0", f"train.batch_size={pairs}"]
    found = pretrain.trace_step("configs/Pretrain.yaml", overrides)
    model_, cfg = model.meta_model("configs/Pretrain.yaml", overrides)
    tokens = pretrain.make_batches(cfg, model.tokenizer_of(cfg), 1)[0]["input_ids"].shape[1]
    assert sum(x.flops for x in found) == pytest.approx(operations(model_, pairs, tokens), rel=0.1)
    assert "_fused_adamw_" in {x.name for x in found}


def kernel(name, flops, reads, writes):
    return roofline.Operation(name, flops, dict.fromkeys(reads, 1e10), dict.fromkeys(writes, 1e10))


def test_the_roofline_adds_operations_traffic_and_launches_and_fuses_what_stands_between_matrix_products():
    #          1 -> mm -> 2 -> relu -> 3 -> exp -> 4 -> mm -> 5; 3 is read again by the last kernel
    found = [kernel("mm", 7e14, [1], [2]), kernel("relu", 0, [2], [3]), kernel("exp", 0, [3], [4])]
    found += [kernel("mm", 7e14, [4], [5]), kernel("add", 0, [3, 5], [6]), kernel("sum", 0, [6], [7])]
    gemm, memory = 14e14 / 312e12 / 0.7, 1e10 / 2.04e12 / 0.85
    eager, compiled = (roofline.predict(x, 100, "NVIDIA A100-SXM4") for x in (found, roofline.fused(found)))
    seconds = gemm + (2 + 2 + 3 + 2) * memory + 6 * 3e-6
    assert eager["pairs_per_second"] == pytest.approx(100 / seconds, abs=0.1)
    assert eager["mfu"] == pytest.approx(0.7 * gemm / seconds, abs=1e-3)
    assert compiled["kernels"] == 4 and compiled["ms"]["memory"] == pytest.approx(1e3 * (1 + 2 + 2) * memory, abs=0.1)
    assert roofline.predict(found, 100, "cpu") == {}


def test_all_runs_every_benchmark_keeps_what_fails_and_shows_measured_beside_predicted(tmp_path, monkeypatch, capsys):
    figures = {"machine": "an H100", "pairs_per_second": 500.0, "mfu": 0.2, "predicted": {"pairs_per_second": 700}}
    commands = {"pretrain_64 train.compile=true": "pretrain", "bad": "params --config no.yaml"}

    def start(command, **_):
        failed = "no.yaml" in command
        return SimpleNamespace(returncode=2 * failed, stdout=json.dumps(figures), stderr="a line\nno such file\n")

    monkeypatch.setattr(everything.subprocess, "run", start)
    monkeypatch.setattr(everything, "commands", lambda device: commands)
    words = ["all", "--device", "cpu", "--folder", tmp_path / "new"]
    found = run(capsys, *words)
    assert found == {"machine": found["machine"], **json.loads((tmp_path / "new/all.json").read_text())}
    assert found["pretrain_64 train.compile=true"]["figures"] == figures and found["bad"]["error"] == "no such file"
    lines = (tmp_path / "new/summary.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["an H100", "measured", "predicted"]
    assert rows[2] == ["pretrain_64 train.compile=true: pairs_per_second", "500.0", "700"]
    assert rows[3:] == [["pretrain_64 train.compile=true: mfu", "0.2", "-"], ["bad", "no such file", "-"]]
    (tmp_path / "own").mkdir()
    (tmp_path / "own/all.json").touch()
    with pytest.raises(UserError, match="own: holds files that tools.benchmark did not write"):
        run(capsys, *words[:-1], tmp_path / "own")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_of_all_is_one_that_the_tool_takes(device):
    for words in everything.commands(device).values():
        args = benchmark.parse_arguments(words.split())
        load_config(args.config, args.override, PRETRAIN)
