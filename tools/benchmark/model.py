"""What the benchmarks share: a model of random weights, its parameters, and a stopwatch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable

import torch

import utils
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
    return Tokenizer(utils.find_file(config.text.vocab, "text.vocab"), config.text.sep)


def run_params(args: argparse.Namespace) -> dict:
    """Trainable parameters, and operations of a pair with captions of MEAN_TOKENS and of the longest."""
    model, config = meta_model(args.config, args.override)
    operations_of = {n: round(operations(model, 1, n) / 1e9, 1) for n in (MEAN_TOKENS, config.text.max_tokens)}
    return {
        "config": args.config,
        "trainable_parameters": trainable_parameters(args.config, args.override),
        "gflop_of_a_pair_by_tokens": operations_of,
    }


def meta_model(config: str, overrides: Iterable[str] = ()) -> tuple[PretrainModel, Config]:
    """The pre-training model without memory for its weights (torch's meta device)."""
    cfg = random_config(config, overrides)
    with torch.device("meta"):
        return build_pretrain_model(cfg, tokenizer_of(cfg))[0], cfg


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


def timed(function: Callable, device: torch.device) -> tuple[float, float]:
    """(seconds, seconds of CPU time) of a call; CPU time is hardly moved by a machine's other work."""
    synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - cpu_start


def by_turns(sides: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """{side: (seconds, of CPU time) of its fastest call}: in turns, so that all meet the same load of the machine."""
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            times[name].append(timed(function, device))
    return {name: tuple(map(min, zip(*calls, strict=True))) for name, calls in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"device": name, "torch": torch.__version__}
