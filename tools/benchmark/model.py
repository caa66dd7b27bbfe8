"""The model that a benchmark measures, with random weights, and its parameters."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

import utils
from dataset.text import Tokenizer
from engine.config import PRETRAIN, Config, load_config
from models.pretrain import build_pretrain_model

# The backbone's parts that are counted by themselves; its other parameters are the heads of ITC, ITM and MLM.
ENCODERS = ("image_encoder", "text_encoder", "fusion_encoder", "decoder")


def random_config(config: str, overrides: Iterable[str] = ()) -> Config:
    """A pre-training configuration whose weights are random, so that none are read or downloaded."""
    random = ("model.image_encoder.weights=random", "model.bert.weights=random")
    return load_config(config, [*overrides, *random], PRETRAIN)


def tokenizer_of(config: Config) -> Tokenizer:
    return Tokenizer(utils.find_file(config.text.vocab, "text.vocab"), config.text.sep)


def run_params(args: argparse.Namespace) -> dict:
    counts = trainable_parameters(args.config, args.override)
    return {"config": str(args.config), "trainable_parameters": counts}


def trainable_parameters(config: str, overrides: Iterable[str] = ()) -> dict[str, int]:
    """Of the pre-training model by module; a tied tensor counts once, in its first module.

    The model is built without memory for its weights (torch's meta device).
    """
    cfg = random_config(config, overrides)
    with torch.device("meta"):
        model, _ = build_pretrain_model(cfg, tokenizer_of(cfg))
    counts = dict.fromkeys((*ENCODERS, "heads", "encoding_head"), 0)
    for name, parameter in model.named_parameters():  # yields a shared tensor once
        if parameter.requires_grad:
            owner, _, rest = name.partition(".")
            part = rest.partition(".")[0] if owner == "backbone" else "encoding_head"
            counts[part if part in counts else "heads"] += parameter.numel()
    counts["total"] = sum(counts.values())
    return counts
