"""`tools/benchmark.py sharing`: what a pre-training step saves by projecting an image's keys and values once."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

import utils
from dataset import scenes
from dataset.text import Tokenizer
from models.pretrain import Draws, PretrainModel, build_pretrain_model
from models.semmim import SemMIM
from tools.benchmark_pretrain import model_arguments, random_config

TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # of the loss and, relative to their length, of the gradients


def add_sharing(commands) -> None:
    parser = commands.add_parser("sharing", help="a pre-training step with image keys and values projected once")
    model_arguments(parser, "configs/demo/Pretrain.yaml")
    parser.add_argument(
        "--repeats", type=int, default=5, help="steps of each; the fastest counts (default: %(default)s)"
    )
    parser.set_defaults(run=run_sharing)


@torch.random.fork_rng()
def run_sharing(args: argparse.Namespace) -> dict:
    """Seconds of a step's forward and backward pass with and without sharing, on random images, weights as new.

    Dropout is off, so that both give the same numbers. Raises utils.UserError for --repeats below 1, RuntimeError where
    loss or gradients differ.
    """
    if args.repeats < 1:
        raise utils.UserError(f"--repeats is {args.repeats}; it must be at least 1")
    device = utils.init_distributed(args.device)
    cfg = random_config(args.config, args.override)
    if cfg.mim.target == "dvae":
        raise utils.UserError("mim.target: dvae needs a codebook's files; measure encoding, pixels or none")
    precision = utils.resolve_precision(cfg.train.precision, device)
    torch.manual_seed(0)
    tokenizer = Tokenizer(cfg.text.vocab, cfg.text.sep)
    model = build_pretrain_model(cfg, tokenizer)[0].to(device).eval()
    batch = make_batch(cfg, tokenizer, device)
    draws = Draws.sample(
        cfg.train.batch_size, model.backbone.image_encoder.num_patches, *batch["input_ids"].shape[1:], device
    )

    results, seconds, cpu_seconds = {}, {"shared": [], "copied": []}, {"shared": [], "copied": []}
    for turn in range(args.repeats + 1):  # by turns, so that both meet the same load of the machine; the first warms up
        for name, way in (("shared", nullcontext), ("copied", lambda: copying(model.backbone))):
            with way():
                wall, cpu, results[name] = timed_step(model, batch, draws, device, precision)
            if turn:
                seconds[name].append(wall)
                cpu_seconds[name].append(cpu)
    loss, gradient = (difference(results["shared"][i], results["copied"][i]) for i in range(2))
    if not max(loss, gradient) <= TOLERANCE[precision]:
        raise RuntimeError(f"loss and gradients differ by {loss:.2g} and {gradient:.2g} of their size: no comparison")
    shared, copied = min(seconds["shared"]), min(seconds["copied"])
    result = {
        "config": str(args.config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "pairs": cfg.train.batch_size,
        "image_tokens": 1 + model.backbone.image_encoder.num_patches,
        "fusion_rows_per_image": 5,  # three of matching, one of MLM, one of PLM's prefix
        "seconds_of_a_step": round(shared, 4),
        "seconds_of_a_step_copied": round(copied, 4),
        "ratio": round(copied / shared, 3),
        "ratio_of_each_round": [
            round(theirs / ours, 3) for ours, theirs in zip(seconds["shared"], seconds["copied"], strict=True)
        ],
        "share_saved": round(1 - shared / copied, 3),
        "largest_difference_of_loss": float(f"{loss:.2g}"),
        "largest_difference_of_gradients": float(f"{gradient:.2g}"),
    }
    if device.type == "cpu":  # hardly moved by the machine's load
        result["ratio_of_cpu_time"] = round(sum(cpu_seconds["copied"]) / sum(cpu_seconds["shared"]), 3)
    return result


def make_batch(cfg, tokenizer: Tokenizer, device) -> dict:
    """A micro-batch of noise with captions of the demo scenes, as dataset.pretrain collates it."""
    size, side = cfg.train.batch_size, cfg.model.image_encoder.image_size
    ids, mask = tokenizer.encode(
        [scenes.captions(scenes.make_scene(0, i))[0] for i in range(size)], cfg.text.max_tokens
    )
    batch = {"image1": torch.randn(size, 3, side, side), "image2": torch.randn(size, 3, side, side)}
    batch |= {"input_ids": ids, "attention_mask": mask}
    return utils.to_device(batch | {"image_id": torch.arange(size), "caption_id": torch.arange(size)}, device)


def timed_step(model: PretrainModel, batch: dict, draws: Draws, device, precision: str):
    """-> (seconds, seconds of CPU time, (loss [1], gradients of all parameters in one vector)), both float32"""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    with utils.autocast(device, precision):
        loss, _ = model(batch, alpha=0.4, draws=draws)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    gradients = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return wall, cpu, (loss.detach().float()[None], gradients)


@contextmanager
def copying(net: SemMIM) -> Iterator[None]:
    """While it lasts, every fusion row projects keys and values of its own copy of its image's tokens."""
    encoder = net.fusion_encoder
    project = encoder.project_memory

    def fuse(text_embeds, text_mask, image_embeds, rows=None, keep=None):
        if rows is None:  # row r belongs to image r // group
            image_embeds = image_embeds.repeat_interleave(len(text_embeds) // len(image_embeds), dim=0)
        else:
            image_embeds = image_embeds.index_select(0, rows)
        return encoder(text_embeds, text_mask, project(image_embeds), keep=keep)

    net.fuse, encoder.project_memory = fuse, lambda image_embeds: image_embeds  # "memory" is the tokens themselves
    try:
        yield
    finally:
        del net.fuse, encoder.project_memory  # the classes' own methods show again


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of a - b relative to that of b; both [n]."""
    return float((a - b).norm() / b.norm())
