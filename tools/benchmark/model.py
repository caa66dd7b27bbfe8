"""What the benchmarks share: a model of random weights, its parameters, and a stopwatch."""

import argparse
import statistics
import time
from collections.abc import Callable, Hashable, Iterable

import torch

from dataset.text import Tokenizer
from engine.config import PRETRAIN, Config, load_config
from models.pretrain import PretrainModel, build_pretrain_model, operations

MEAN_TOKENS = 14  # of a row of captions sorted by length, padding included
# The backbone's parts that are counted by themselves; its other parameters are the heads of ITC, ITM and MLM.
ENCODERS = ("image_encoder", "text_encoder", "fusion_encoder", "decoder")


def random_config(config: str, overrides: Iterable[str] = ()) -> Config:
    """A pre-training configuration whose weights are random, so that none are read or downloaded."""
    random = ("model.image_encoder.weights=random", "model.bert.weights=random")
    return load_config(config, [*overrides, *random], PRETRAIN)


def tokenizer_of(config: Config) -> Tokenizer:
    return Tokenizer(config.text.vocab, config.text.sep)


def meta_model(config: str, overrides: Iterable[str] = ()) -> tuple[PretrainModel, Config]:
    """The pre-training model without memory for its weights (torch's meta device)."""
    cfg = random_config(config, overrides)
    with torch.device("meta"):
        return build_pretrain_model(cfg, tokenizer_of(cfg))[0], cfg


def run_params(args: argparse.Namespace, device: torch.device) -> dict:
    """Trainable parameters, and operations of a pair with captions of MEAN_TOKENS and of the longest."""
    model, config = meta_model(args.config, args.override)
    operations_of = {n: round(operations(model, 1, n) / 1e9, 1) for n in (MEAN_TOKENS, config.text.max_tokens)}
    counts = trainable_parameters(args.config, args.override)
    return {"trainable_parameters": counts, "gflop_of_a_pair_by_tokens": operations_of}


def trainable_parameters(config: str, overrides: Iterable[str] = ()) -> dict[str, int]:
    """Of the pre-training model by module; a tied tensor counts once, in its first module."""
    counts = dict.fromkeys((*ENCODERS, "heads", "encoding_head"), 0)
    for name, parameter in meta_model(config, overrides)[0].named_parameters():  # yields a shared tensor once
        if parameter.requires_grad:
            owner, _, rest = name.partition(".")
            part = rest.partition(".")[0] if owner == "backbone" else "encoding_head"
            counts[part if part in counts else "heads"] += parameter.numel()
    counts["total"] = sum(counts.values())
    return counts


def by_turns(
    sides: dict[Hashable, Callable], repeats: int, device: torch.device
) -> dict[Hashable, tuple[float, float]]:
    """{side: (seconds, seconds of CPU time) of a call, the medians}: in turns, so that all meet the same load of the
    machine, which moves CPU time hardly. The first round warms up."""
    times = {name: [] for name in sides}
    for _ in range(1 + repeats):
        for name, function in sides.items():
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            synchronize(device)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {name: tuple(map(statistics.median, zip(*calls[1:], strict=True))) for name, calls in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
