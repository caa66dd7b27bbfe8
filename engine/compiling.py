"""`train.compile`: the layers of the model through torch.compile, one by one and in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block

from models.bert import BertLayer
from utils import Config, UserError, logger

VARIANTS = 64  # of a layer's code: with and without gradient, mask, memory, `rows` and `keep`, at several lengths


def compile_if_asked(model: torch.nn.Module, cfg: Config, device: torch.device) -> None:
    """`compile_layers` where the configuration has `train.compile: true`, with a line that says so."""
    if cfg.train.compile:
        logger.info("train.compile: %d layers, in the first steps", compile_layers(model, device))


def compile_layers(
    model: torch.nn.Module, device: torch.device, backend: str | Callable = "inductor", fullgraph: bool = False
) -> int:
    """Compile every layer of the image encoders and of the text stacks; returns how many there are.

    In place: parameters, their names and checkpoints stay what they are. Each layer is traced as one graph (fullgraph:
    it is an error where it is not), and layers of one kind share their machine code, so that compiling takes minutes
    and not an hour; lengths that vary are traced once as such. Evaluation and generation run uncompiled (see
    `evaluation.sharded.evaluating`). Raises UserError where torch.compile has no compiler.
    """
    if backend == "inductor" and (missing := missing_compiler(device)):
        raise UserError(f"train.compile: torch.compile needs {missing}; install it, or set train.compile: false")
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    layers = [module for module in model.modules() if isinstance(module, Block | BertLayer)]
    for layer in layers:
        layer.compile(backend=backend, fullgraph=fullgraph)
    return len(layers)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs on this device and does not find; None where it is all there."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton and a GPU of compute capability 7.0 or higher"
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return None if any(name and shutil.which(name) for name in names) else "a C++ compiler (g++, clang++ or $CXX)"
