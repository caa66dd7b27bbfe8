"""tools/benchmark against counts made by hand."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.semmim import build_backbone
from tools.benchmark import loader as benchmark_loader
from tools.benchmark import retrieval as benchmark_retrieval
from tools.benchmark.pretrain import random_config

ROOT = Path(__file__).resolve().parents[1]


def params(*overrides):
    command = [
        sys.executable,
        "-m",
        "tools.benchmark",
        "params",
        "--config",
        "configs/Pretrain.yaml",
        "--override",
    ]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["trainable_parameters"]


def test_base_size_has_the_parameters_computed_from_the_shapes():
    counts = params("data.train=[]")
    dim, ffn, vocab = 768, 3072, 30522
    linear = dim * dim + dim
    layer = 4 * linear + 2 * dim * ffn + ffn + dim + 2 * 2 * dim  # attention, feed-forward, two norms
    cross = 4 * linear + 2 * dim
    embeddings = (vocab + 512 + 2) * dim + 2 * dim
    lm_head = linear + 2 * dim + vocab  # tied: its matrix is counted with the embeddings
    vit = 3 * 16 * 16 * dim + dim + 197 * dim + 12 * layer + 2 * 2 * dim  # no patch bias; [CLS]; positions; outer norms
    vit += dim  # [MASK]
    assert counts["image_encoder"] == vit
    assert counts["text_encoder"] == embeddings + 6 * layer
    assert counts["fusion_encoder"] == 6 * (layer + cross)
    assert counts["decoder"] == embeddings + 12 * (layer + cross) + lm_head
    assert counts["heads"] == 2 * (dim * 256 + 256) + 2 * dim + 2 + lm_head + 1  # 1: the temperature
    assert counts["encoding_head"] == dim * ffn + ffn + ffn * 1024
    assert counts["total"] == sum(value for key, value in counts.items() if key != "total")
    assert counts["total"] / 1e6 == pytest.approx(353.3, abs=0.05)
    assert counts["encoding_head"] / 1e6 == pytest.approx(5.5, abs=0.05)


def test_without_image_modelling_there_is_no_encoding_head_and_no_mask_token():
    full, none = params(), params("mim.target=none")
    assert none["encoding_head"] == 0
    assert full["image_encoder"] - none["image_encoder"] == 768


def test_wrong_key_is_a_one_line_error():
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark", "params", "--override", "model.bert.layers=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_captions_are_timed_against_transformers_with_equal_sentences():
    command = [sys.executable, "-m", "tools.benchmark", "caption", "--device", "cpu", "--override", *TINY]
    command += "--images 2 --beams 2 --max_tokens 4 --repeats 1 --scst_steps 1".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["beam_search"]["equal_tokens"] == 1.0 and found["beam_search"]["tokens"] == 4
    assert found["beam_search"]["ratio"] > 0 and 0 < found["scst"]["reward_share"] < 1


def test_reranking_is_timed_against_the_loop_over_queries_with_equal_scores():
    command = [sys.executable, "-m", "tools.benchmark", "retrieval", "--device", "cpu", "--override", *TINY]
    command += "train.precision=fp32 --images 12 --k 5 --queries 12 --repeats 2".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # nothing else is on standard output
    assert found["texts"] == 60 and found["pairs"] == 12 * 5 + 60 * 5
    assert found["ratio"] > 0 and found["ratio_padded_to_longest"] > 0 and len(found["ratio_of_each_round"]) == 2
    assert found["largest_score_difference"] <= 1e-3 and found["score_spread"] > 0


def test_different_scores_stop_the_comparison(monkeypatch):
    monkeypatch.setattr(benchmark_retrieval, "rerank_by_query", lambda *args: torch.full((12 * 5,), 9.0))
    args = argparse.Namespace(images=12, k=5, queries=12, repeats=1, batch_size=64)
    with pytest.raises(RuntimeError, match="differ"):
        benchmark_retrieval.compare(tiny_config(), args, torch.device("cpu"), "fp32")


def test_operations_are_those_that_torch_counts(monkeypatch):
    monkeypatch.setattr(benchmark_retrieval, "BASE", ("configs/demo/Pretrain.yaml", ()))  # runs within a second
    monkeypatch.setattr(benchmark_retrieval, "IMAGE_LAYERS", 6)
    monkeypatch.setattr(benchmark_retrieval, "PATCH", 12)
    net = build_backbone(random_config("configs/demo/Pretrain.yaml"), decoder=False, mlm_head=False)[0].eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        image_embeds = net.image_encoder(torch.randn(2, 3, 72, 72))
        net.text_encoder(torch.zeros(3, 13, dtype=torch.long))
        encoding = counter.get_total_flops()
        memory = net.fusion_encoder.project_memory(image_embeds)
        rows = torch.zeros(2 * (2 + 3), dtype=torch.long)
        net.fuse(torch.randn(len(rows), 13, 192), None, memory, rows=rows)
        reranking = counter.get_total_flops() - encoding
    found = benchmark_retrieval.count_operations(images=2, texts=3, k=2, tokens=13)
    assert (found["encoding"], found["reranking"]) == (encoding, reranking)


def test_a_count_of_nothing_is_a_one_line_error():
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark", "retrieval", "--repeats", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr == "error: --repeats is 0; it must be at least 1\n"


def test_the_loader_is_measured_with_equal_views():
    args = argparse.Namespace(
        images=8, width=80, height=60, image_size=32, pairs=16, batch_size=4, workers=1, repeats=1
    )
    found = benchmark_loader.run_loader(args)
    assert found["pairs"] == 16 and found["largest_difference"] == 0
    assert found["ms_of_cpu_per_pair"] > 0 and found["ms_of_cpu_per_pair_float32"] > 0 and found["ms_of_decoding"] > 0
