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


class Finetuning(Task):
    """A fine-tuning stage: validated after every epoch, of which the best is kept.

    A script's own class is made of (backbone, tokenizer, cfg, device, run), for an evaluation as for a training.
    """

    stage: Stage
    score: str  # which of `validate`'s values chooses the best epoch; higher is better
    decoder = True  # whether the stage writes text
    validate_first = False  # whether a new run validates before its first epoch, too
    best: BestCheckpoint

    def __init__(self, model: nn.Module, evaluator, cfg: Config, device: torch.device, run: Run):
        """evaluator: evaluates the model, by `evaluate_all(model)`, on what `eval.splits` names."""
        self.model, self.evaluator = model, evaluator
        self.cfg, self.device, self.run = cfg, device, run

    def begin_training(self) -> tuple[Dataset, Callable[[list], dict], Mapping[str, Dataset]]:
        """Add what only training needs; -> (data set, what collates its samples, {split: data set} of the evaluation,
        whose images training should not have)."""
        raise NotImplementedError

    def validate(self, step: int) -> dict | None:
        """What checkpoint_best.pth says of the epoch as its entry `best`; None if there is nothing to choose by."""
        raise NotImplementedError

    def evaluate(self) -> None:
        self.evaluator.evaluate_all(self.model)

    def after_epoch(self, progress: Progress) -> None:
        found = self.validate(progress.step)
        if found is not None:
            self.best.offer(self.model, found, progress.step, progress.epoch + 1)

    def state(self) -> dict:
        return self.best.state()

    def train(self, resume_from: dict | None = None) -> None:
        """Train for the configured length; the model ends with the weights of the best epoch by validation.

        The run is opened when everything that can be checked has been.
        """
        cfg, fresh = self.cfg, resume_from is None
        dataset, collate, held_out = self.begin_training()
        loader = create_train_loader(dataset, cfg, collate, self.device, held_out)
        description = self.model.backbone.description
        notes = {"description": description, "stage": self.stage.name, "config": cfg.to_dict()}
        self.best = BestCheckpoint(self.run.dir, self.score, notes, not fresh)
        training = start_training(self.model, loader, cfg, self.device, resume_from)
        self.run.open()
        if self.validate_first and fresh:
            self.validate(0)
        fit(training, self, self.run)
        self.best.restore(self.model)


def run_stage(about: str, argv: list[str] | None, kind: type[Finetuning]) -> None:
    """A fine-tuning script: --checkpoint, or with --resume the run's own last one, is trained and then evaluated."""
    stage = kind.stage
    args = arguments(about, argv, stage.schema, f"output/{stage.name}")
    with distributed(args.device) as device:
        cfg = load_config(args.config, args.override, stage)
        run, resume_from = begin(args, cfg)
        source = last_path(run.dir) if resume_from else args.checkpoint
        if source is None:
            raise UserError("--checkpoint is missing: name a pre-trained checkpoint, e.g. one that Pretrain.py wrote")
        seed_everything(cfg.seed, per_rank=False)  # every process builds the same model
        backbone, rest, lines = load_backbone(source, cfg.image_size, decoder=kind.decoder, loaded=resume_from)
        backbone.set_checkpointing(cfg.checkpointing, cfg.text_checkpointing)
        for line in lines:
            logger.info(line)
        run.describe(device, backbone.description)
        tokenizer = checkpoint_tokenizer(cfg.text.vocab, rest["description"])
        task = kind(backbone.to(device), tokenizer, cfg, device, run)
        with run:
            if args.evaluate:
                run.open(evaluate=True)
            else:
                task.train(resume_from)
            task.evaluate()
