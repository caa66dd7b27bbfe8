"""`tools.benchmark pretrain`: pairs per second and utilization of pre-training steps, and settings side by side."""

from __future__ import annotations

import argparse
import shlex
import statistics

import torch

import utils
from dataset.text import Tokenizer
from engine.config import Config
from engine.distributed import Transfer, compile_model, keep_freed_memory
from engine.loop import Progress, Task, train_step
from engine.window import Window, peak_tflops
from models.pretrain import PretrainModel, build_pretrain_model, operations
from optim import create_optimizer
from tools.benchmark.model import machine, random_config, timed, tokenizer_of

# Mean and deviation of ln(word pieces), [CLS] included: 12.8 on average, as COCO's and the web's captions
LENGTHS = (2.45, 0.45)


@torch.random.fork_rng()
def run_pretrain(args: argparse.Namespace) -> dict:
    """Steps of the whole training loop but the loader: copy, forward, backward, clipping, AdamW, teacher and queue.

    With `--compare` the steps of both take turns. Every figure is the mean over the batches, whose lengths differ, of
    the median over the rounds; the first round warms up.
    """
    device = torch.device(utils.choose_device(args.device))
    cases = [Case(args, setting, device) for setting in args.compare or [""]]
    for _ in range(args.rounds + 1):
        for number in range(args.batches):
            for case in cases:
                case.step(number)
    found = [case.figures() for case in cases]
    result = {"machine": machine(device), "config": args.config, "override": args.override}
    result |= found[0] if len(found) == 1 else {"A": found[0], "B": found[1], "B_to_A": ratios(*found)}
    result["operations"] = cases[-1].by_time()
    if device.type == "cuda":  # of both, if there are two
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return result


class Case(Task):
    """A model with its optimizer, batches and figures. setting: overrides of its own, in one string."""

    def __init__(self, args: argparse.Namespace, setting: str, device: torch.device):
        self.setting, self.device = setting, device
        if device.type == "cpu":
            keep_freed_memory()  # as training does
        self.cfg = random_config(args.config, [*args.override, *shlex.split(setting)])
        tokenizer, train = tokenizer_of(self.cfg), self.cfg.train
        torch.manual_seed(0)
        self.model = build_pretrain_model(self.cfg, tokenizer)[0].to(device).train()
        rates = {"lr": train.lr, "lr_vit": train.lr_vit, "weight_decay": train.weight_decay, "betas": train.betas}
        self.optimizer = create_optimizer(self.model, **rates)
        if train.compile:
            compile_model(self.model)
        precision = utils.resolve_precision(train.precision, device)
        self.progress = Progress(steps_per_epoch=1000, total_steps=1000, precision=precision)
        self.batches = make_batches(self.cfg, tokenizer, args.batches, pin=device.type == "cuda")
        self.transfer, self.window = Transfer(device), Window(None, device)
        self.times: list[list[tuple[float, float]]] = [[] for _ in self.batches]  # (seconds, of CPU time) of each step
        self.first_loss: float | None = None

    def step(self, number: int) -> None:
        """One optimizer step on batch `number`, of `train.accumulation` equal micro-batches."""

        def step() -> None:
            batches = [self.batches[number]] * self.cfg.train.accumulation
            micro = map(self.transfer, map(self.model.prepare, batches))
            train_step(self.model, micro, self.optimizer, self, self.progress, self.cfg.train, self.window)
            self.model.after_step()

        if self.first_loss is None:
            torch.manual_seed(1)  # the same draws for all cases
        self.times[number].append(timed(step, self.device))
        self.window.restart()

    def loss(self, model: PretrainModel, batch: dict, progress: Progress):
        loss, values = model(batch, self.cfg.itc.alpha)
        if self.first_loss is None:
            self.first_loss = float(loss.detach())
        return loss, values

    def figures(self) -> dict:
        size, lengths = self.cfg.train.batch_size, [batch["input_ids"].shape[1] for batch in self.batches]
        pairs = size * self.cfg.train.accumulation
        counted = statistics.mean(operations(self.model, size, length) for length in lengths) / size  # of a pair
        timed_steps = [zip(*times[1:], strict=True) for times in self.times]  # the first round warms up
        seconds, cpu = (statistics.mean(map(statistics.median, parts)) for parts in zip(*timed_steps, strict=True))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        peak, reached = peak_tflops(name, self.progress.precision), counted * pairs / seconds / 1e12
        return {
            "settings": self.setting,
            "precision": self.progress.precision,
            "pairs_of_a_step": pairs,
            "tokens_of_a_row": round(statistics.mean(lengths), 2),
            "seconds_of_a_step": round(seconds, 4),
            "cpu_seconds_of_a_step": round(cpu, 4),
            "pairs_per_second": round(pairs / seconds, 2),
            "gflop_of_a_pair": round(counted / 1e9, 2),
            "tflops": round(reached, 4),
            "mfu": round(reached / peak, 4) if peak else None,
            "first_loss": self.first_loss,
        }

    def by_time(self, longest: int = 20) -> dict[str, dict]:
        """{operation: its calls, ms, their share} of one more step, the longest: of the GPU's time, or the CPU's."""
        with torch.profiler.profile() as profile:
            self.step(len(self.batches) // 2)
        name = f"self_{self.device.type if self.device.type == 'cpu' else 'device'}_time_total"  # in us
        found = [(row.key, row.count, getattr(row, name)) for row in profile.key_averages()]
        found = sorted((row for row in found if row[0].startswith("aten::")), key=lambda row: -row[2])
        whole = sum(time for *_, time in found)
        return {
            key.removeprefix("aten::"): {"calls": count, "ms": round(time / 1e3, 1), "share": round(time / whole, 3)}
            for key, count, time in found[:longest]
        }


def ratios(a: dict, b: dict) -> dict:
    """How B compares with A; CPU time is hardly moved by a machine's other work."""
    cpu = [case["cpu_seconds_of_a_step"] / case["pairs_of_a_step"] for case in (a, b)]
    return {
        "pairs_per_second": round(b["pairs_per_second"] / a["pairs_per_second"], 3),
        "cpu_seconds_of_a_pair": round(cpu[1] / cpu[0], 3),
        "difference_of_first_loss": float(f"{b['first_loss'] - a['first_loss']:.2g}"),
    }


def caption_lengths(count: int, longest: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens of captions as they are on the web, [CLS] included: [count] in 3..longest"""
    mean, deviation = LENGTHS
    return (torch.randn(count, generator=generator) * deviation + mean).exp().round().long().clamp(3, longest)


def make_batches(cfg: Config, tokenizer: Tokenizer, count: int, pin: bool = False) -> list[dict]:
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
    for rows in lengths.split(size):
        mask = (torch.arange(int(rows.max())) < rows[:, None]).long()
        ids = torch.randint(0, tokenizer.vocab_size, mask.shape, generator=generator)
        special = (ids == tokenizer.cls_id) | (ids == tokenizer.sep_id) | (ids == tokenizer.pad_id)
        ids = ids.masked_fill(special, tokenizer.mask_id).masked_fill(mask == 0, tokenizer.pad_id)
        ids[:, 0] = tokenizer.cls_id
        number = torch.arange(len(batches) * size, (len(batches) + 1) * size)
        batch = {**views, "input_ids": ids, "attention_mask": mask, "image_id": number, "caption_id": number}
        if pin:
            batch = {key: value.pin_memory() for key, value in batch.items()}
        batches.append(batch | {"padded": not mask.all().item()})
    return batches
