"""`tools.benchmark pretrain`, `roofline` and `checkpoint`: pre-training steps, measured and predicted, and how long
training waits for its checkpoint."""

import argparse
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset.text import Tokenizer
from dataset.transforms import normalized
from engine.checkpoint import save_last
from engine.config import Config
from engine.distributed import Transfer, compile_model, prepare_cpu
from engine.loop import peak_tflops
from models.pretrain import PretrainModel, build_pretrain_model, operations
from optim import create_optimizer
from tools.benchmark.model import by_turns, meta_model, random_config, tokenizer_of
from tools.benchmark.roofline import BANDWIDTH, Operation, Trace, fused, predict, pretending
from utils import autocast, resolve_precision

# Mean and deviation of ln(word pieces), [CLS] included: 12.8 on average, as COCO's and the web's captions
LENGTHS = (2.45, 0.45)
BATCHES = (128, 64, 16)  # pairs of a GPU


def run_pretrain(args: argparse.Namespace, device: torch.device) -> dict:
    """Steps of training without the loader. Figures are means over batches, whose lengths differ."""
    case = Case(args.config, args.override, args.batches, device)
    times = by_turns({number: partial(case.step, number) for number in range(args.batches)}, args.repeats, device)
    seconds, cpu = map(statistics.mean, zip(*times.values(), strict=True))
    pairs, lengths = case.cfg.train.batch_size, [batch["input_ids"].shape[1] for batch in case.batches]
    counted = statistics.mean(operations(case.model, pairs, length) for length in lengths)  # of a step
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_tflops(name, case.precision)
    result = {
        "precision": case.precision,
        "pairs_of_a_step": pairs,
        "tokens_of_a_row": round(statistics.mean(lengths), 2),
        "seconds_of_a_step": round(seconds, 4),
        "cpu_seconds_of_a_step": round(cpu, 4),
        "pairs_per_second": round(pairs / seconds, 2),
        "gflop_of_a_pair": round(counted / pairs / 1e9, 2),
        "mfu": round(counted / seconds / peak / 1e12, 4) if peak else None,
    }
    if device.type == "cuda":
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        kernels = trace_step(args.config, args.override)
        result["predicted"] = predict(fused(kernels) if case.cfg.train.compile else kernels, pairs, name)
    with torch.profiler.profile() as profile:
        case.step(args.batches // 2)
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table = profile.key_averages().table(by, row_limit=20, max_name_column_width=40)
    return {**result, "operations_by_time": table.splitlines()}


class Case:
    """A model with its optimizer and batches."""

    def __init__(self, config: str, overrides: list[str], batches: int, device: torch.device):
        if device.type == "cpu":
            prepare_cpu()  # as training does
        self.cfg = random_config(config, overrides)
        self.precision = resolve_precision(self.cfg.train.precision, device)
        tokenizer = tokenizer_of(self.cfg)
        torch.manual_seed(0)
        self.model = build_pretrain_model(self.cfg, tokenizer)[0].to(device).train()
        self.optimizer = make_optimizer(self.model, self.cfg)
        if self.cfg.train.compile:
            compile_model(self.model)
        self.batches, self.transfer = make_batches(self.cfg, tokenizer, batches), Transfer(device)

    def step(self, number: int) -> None:
        """One step on batch `number`, with the same draws each time."""
        torch.manual_seed(number)
        batch = self.transfer(self.model.prepare(self.batches[number]))
        train_step(self.model, self.optimizer, batch, self.cfg, self.precision)


def run_roofline(args: argparse.Namespace, device: torch.device) -> dict:
    """{GPU: {pairs of a step: prediction, kernel by kernel (eager) and fused by a perfect compiler}}"""
    traced = {pairs: trace_step(args.config, [*args.override, f"train.batch_size={pairs}"]) for pairs in BATCHES}
    return {
        name: {
            pairs: {"eager": predict(kernels, pairs, name), "compiled": predict(fused(kernels), pairs, name)}
            for pairs, kernels in traced.items()
        }
        for name in BANDWIDTH
    }


def trace_step(config: str, overrides: list[str]) -> list[Operation]:
    """The kernels of one whole optimizer step in bf16 on a GPU, without one."""
    torch.manual_seed(0)
    model, cfg = meta_model(config, overrides)
    batches = make_batches(cfg, tokenizer_of(cfg), cfg.data.bucket_batches or 1)
    batch = model.prepare(batches[len(batches) // 2])  # of middle length
    with pretending() as fake:
        model.to_empty(device="cpu").train()
        optimizer = make_optimizer(model, cfg)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its moments
        optimizer.zero_grad()
        batch = {key: fake.from_tensor(x) if isinstance(x, Tensor) else x for key, x in batch.items()}
        with Trace() as trace:
            train_step(model, optimizer, normalized(batch), cfg, "bf16")
    return trace.operations


def make_optimizer(model: PretrainModel, cfg: Config) -> torch.optim.Optimizer:
    return create_optimizer(model, **{key: cfg.train[key] for key in ("lr", "lr_vit", "weight_decay", "betas")})


def train_step(
    model: PretrainModel, optimizer: torch.optim.Optimizer, batch: dict, cfg: Config, precision: str
) -> None:
    """Forward, backward, clipping, AdamW, teacher and queue, as engine.loop has them."""
    with autocast(batch["input_ids"].device, precision):
        loss, _ = model(batch, cfg.itc.alpha)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_grad or math.inf, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    model.after_step()


def make_batches(cfg: Config, tokenizer: Tokenizer, count: int) -> list[dict]:
    """`count` batches of noise with captions of real lengths, sorted by length within `data.bucket_batches`."""
    generator = torch.Generator().manual_seed(0)
    size, side = cfg.train.batch_size, cfg.model.image_encoder.image_size
    lengths = caption_lengths(count * size, cfg.text.max_tokens, generator)
    if cfg.data.bucket_batches:
        window = size * cfg.data.bucket_batches
        lengths = torch.cat([part.sort().values for part in lengths.split(window)])
    images = torch.randint(0, 256, (2, size, side, side, 3), generator=generator, dtype=torch.uint8)
    views = dict(zip(("image1", "image2"), images.permute(0, 1, 4, 2, 3), strict=True))  # as workers stack them
    batches = []
    for number, rows in zip(torch.arange(count * size).split(size), lengths.split(size), strict=True):
        mask = (torch.arange(int(rows.max())) < rows[:, None]).long()
        ids = torch.randint(tokenizer.mask_id + 1, tokenizer.vocab_size, mask.shape, generator=generator)
        ids = ids.masked_fill(mask == 0, tokenizer.pad_id)
        ids[:, 0] = tokenizer.cls_id
        batch = {**views, "input_ids": ids, "attention_mask": mask, "image_id": number, "caption_id": number}
        batches.append(batch | {"padded": not mask.all().item()})
    return batches


def caption_lengths(count: int, longest: int, generator: torch.Generator) -> Tensor:
    """Tokens of captions as they are on the web, [CLS] included: [count] in 3..longest"""
    mean, deviation = LENGTHS
    return (torch.randn(count, generator=generator) * deviation + mean).exp().round().long().clamp(3, longest)


def run_checkpoint(args: argparse.Namespace, device: torch.device) -> dict:
    """Weights, AdamW's moments and queues, written as training does; into $TMPDIR, so name a folder on the disk."""
    case = Case(args.config, [*args.override, "train.batch_size=2"], 1, device)
    case.step(0)  # makes the moments
    state = {"model": case.model.state_dict(), "optimizer": case.optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        save = partial(save_last, Path(folder), state, keep=1)
        seconds, cpu = by_turns({"save": save}, args.repeats, device)["save"]
        gigabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9
    return {
        "gigabytes": round(gigabytes, 3),
        "seconds_per_gigabyte": round(seconds / gigabytes, 3),
        "cpu_seconds_per_gigabyte": round(cpu / gigabytes, 3),
        "predicted": {"seconds_per_gigabyte": 0.56},  # as on another machine (docs/speed.md)
    }
