"""What the fine-tuning scripts share: start from a checkpoint, validate every epoch, end with the best epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.data import Dataset

from dataset import create_train_loader
from dataset.text import checkpoint_tokenizer
from engine.checkpoint import BestCheckpoint, last_path
from engine.config import Config, Stage, arguments, load_config
from engine.distributed import distributed
from engine.loop import Progress, Task, fit, start_training
from engine.run import Run, begin
from models.semmim import load_backbone
from utils import UserError, logger, seed_everything


def run_stage(
    about: str, argv: list[str] | None, stage: Stage, build: Callable, train: Callable, decoder: bool = True
) -> None:
    """A fine-tuning script: --checkpoint, or with --resume the run's own last one, is trained and then evaluated.

    build: (backbone, tokenizer, cfg, device, run) -> (model, what evaluates it by `evaluate_all(model)`); train: (these
    two, cfg, device, run, the checkpoint to resume from or None); decoder: whether the stage writes text.
    """
    args = arguments(about, argv, stage.schema, f"output/{stage.name}")
    with distributed(args.device) as device:
        cfg = load_config(args.config, args.override, stage)
        run, resume_from = begin(args, cfg)
        source = last_path(run.dir) if resume_from else args.checkpoint
        if source is None:
            raise UserError("--checkpoint is missing: name a pre-trained checkpoint, e.g. one that Pretrain.py wrote")
        seed_everything(cfg.seed, per_rank=False)  # every process builds the same model
        backbone, rest, lines = load_backbone(source, cfg.image_size, decoder=decoder, loaded=resume_from)
        backbone.set_checkpointing(cfg.checkpointing, cfg.text_checkpointing)
        for line in lines:
            logger.info(line)
        run.describe(device, backbone.description)
        tokenizer = checkpoint_tokenizer(cfg.text.vocab, rest["description"])
        model, evaluator = build(backbone.to(device), tokenizer, cfg, device, run)
        with run:
            if args.evaluate:
                run.open(evaluate=True)
            else:
                train(model, evaluator, cfg, device, run, resume_from)
            evaluator.evaluate_all(model)


class Finetuning(Task):
    """A fine-tuning stage: validated after every epoch, of which the best is kept."""

    stage: Stage
    score: str  # which of `validate`'s values chooses the best epoch; higher is better
    validate_first = False  # whether a new run validates before its first epoch, too
    best: BestCheckpoint

    def __init__(self, model: nn.Module):
        self.model = model

    def validate(self, step: int) -> dict | None:
        """What checkpoint_best.pth says of the epoch as its entry `best`; None if there is nothing to choose by."""
        raise NotImplementedError

    def after_epoch(self, progress: Progress) -> None:
        found = self.validate(progress.step)
        if found is not None:
            self.best.offer(self.model, found, progress.step, progress.epoch + 1)

    def state(self) -> dict:
        return self.best.state()


def finetune(
    task: Finetuning,
    dataset: Dataset,
    collate: Callable[[list], dict],
    cfg: Config,
    run: Run,
    device: torch.device,
    resume_from: dict | None = None,
    held_out: Mapping[str, Dataset] | None = None,
) -> None:
    """Train for the configured length; the model ends with the weights of the best epoch by validation.

    held_out: {split: data set} of the evaluation, whose images training should not have. The run is opened here, when
    everything that can be checked has been.
    """
    model = task.model
    loader = create_train_loader(dataset, cfg, collate, device, held_out)
    notes = {"description": model.backbone.description, "stage": task.stage.name, "config": cfg.to_dict()}
    task.best = BestCheckpoint(run.dir, task.score, notes, resume_from)
    fresh = resume_from is None
    training = start_training(model, loader, cfg, device, resume_from)
    run.open()
    if task.validate_first and fresh:
        task.validate(0)
    fit(training, task, run)
    task.best.restore(model)
