"""What the fine-tuning scripts share: start from a checkpoint, validate every epoch, end with the best epoch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import Dataset

from dataset import create_train_loader
from engine.checkpoint import BestCheckpoint, begin, source_checkpoint
from engine.config import Config, Stage
from engine.distributed import compile_layers, wrap_ddp
from engine.length import create_optimization
from engine.loop import Progress, fit, position
from engine.run import Run
from models.semmim import SemMIM, load_backbone
from utils import logger, seed_everything


def start_stage(
    args: argparse.Namespace, cfg: Config, stage: Stage, decoder: bool
) -> tuple[SemMIM, dict, Run, dict | None]:
    """How a fine-tuning script begins: from --checkpoint, or with --resume from its own last checkpoint.

    args: of `add_arguments`; decoder: whether the stage writes text. Returns (backbone, its description, the run,
    whose folder nothing has touched yet, the checkpoint to resume from or None).
    """
    resume_from, found, lines = begin(args, cfg, stage)
    seed_everything(cfg.seed, per_rank=False)  # every process builds the same model
    backbone, rest, loaded = load_backbone(
        source_checkpoint(args),
        image_size=cfg.image_size,
        decoder=decoder,
        checkpointing=cfg.checkpointing,
        text_checkpointing=cfg.text_checkpointing,
        loaded=resume_from,
    )
    for line in lines + loaded:
        logger.info(line)
    return backbone, rest["description"], Run(args.output_dir, cfg, found), resume_from


def finetune(
    model: nn.Module,
    dataset: Dataset,
    collate: Callable,
    *,
    stage: Stage,
    score: str,
    cfg: Config,
    run: Run,
    device: torch.device,
    loss_fn: Callable,
    validate: Callable[[int], dict | None],
    validate_first: bool = False,
    after_step: Callable[[Progress], object] | None = None,
    log_fn: Callable[[Progress, dict], dict | None] | None = None,
    count_fn: Callable[[dict], int | torch.Tensor] | None = None,
    resume_from: dict | None = None,
) -> None:
    """Train for the configuration's length; the model ends with the weights of the best epoch by validation.

    The run is opened here, when everything that can be checked has been.

    validate(step): called in all processes after every epoch and at the end, and with `validate_first` before a fresh
    run's first epoch; returns what checkpoint_best.pth says of the epoch as its entry `best` (None: nothing to choose
    by, the last epoch stays). score: which of these decides (higher is better).
    loss_fn, after_step, log_fn, count_fn, resume_from: see `engine.loop.fit`.
    """
    loader = create_train_loader(dataset, cfg, collate, device)
    optimizer, schedule = create_optimization(model, cfg, loader)
    notes = {"description": model.backbone.description, "stage": stage.name, "config": cfg.to_dict()}
    best = BestCheckpoint(run.dir, score, notes, resume_from)
    seed_everything(cfg.seed)  # from here on every process draws its own noise
    fresh = resume_from is None
    progress = position(model, optimizer, len(loader), cfg.train, device, resume_from)
    if cfg.train.compile:
        logger.info("train.compile: %d layers, in the first steps", compile_layers(model, device))
    run.open(None if fresh else progress.step)
    if validate_first and fresh:
        validate(0)

    def on_epoch_end(wrapped: nn.Module, progress: Progress) -> None:
        found = validate(progress.step)
        if found is not None:
            best.offer(model, found, progress.step, progress.epoch + 1)

    fit(
        wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        progress,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=loss_fn,
        after_step=after_step,
        on_epoch_end=on_epoch_end,
        extra_state=best.state,
        log_fn=log_fn,
        count_fn=count_fn,
    )
    best.restore(model)
