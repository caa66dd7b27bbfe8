"""Pre-train SemMIM on image-text pairs (the paper, Section 3).

    python Pretrain.py --config configs/demo/Pretrain.yaml --output_dir output/demo/pretrain
    torchrun --nproc_per_node=8 Pretrain.py --config configs/Pretrain.yaml --output_dir output/pretrain

`--resume` continues an interrupted run at the very step it stopped, or starts if there is none; `--checkpoint
FILE` starts a new run from the weights of an earlier one. Writes checkpoint_last.pth, config.yaml, log.jsonl,
TensorBoard's events and, every epoch, an image of what is masked. With `data.val` every epoch, and the end, is
validated (retrieval by ITC); with `train.best: val` checkpoint_best.pth is the best of them.
"""

import torch
from torch import nn

from dataset import create_dataset, create_train_loader
from dataset.pretrain import PretrainCollate
from dataset.text import Tokenizer, check_vocabulary
from dataset.transforms import normalized
from engine.checkpoint import BestCheckpoint, random_state_kept
from engine.config import PRETRAIN, Config, arguments, load_config
from engine.distributed import distributed
from engine.loop import Progress, Task, fit, start_training
from engine.run import Run, begin
from evaluation.retrieval import SCORE, Validation
from evaluation.sharded import evaluating
from models.alignment import alpha_at
from models.pretrain import PretrainModel, build_pretrain_model, operations, start_from
from utils import UserError, all_reduce_sum, is_main, load_checkpoint, logger, run_main, seed_everything, to_device

SHOWN = 4  # pairs in the image of an epoch, which fits on a screen


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    with distributed(args.device) as device:
        cfg = load_config(args.config, args.override, PRETRAIN)
        if args.evaluate:
            raise UserError("--evaluate: Pretrain.py only trains; evaluate its checkpoint with Retrieval.py --evaluate")
        run, resume_from = begin(args, cfg)
        seed_everything(cfg.seed, per_rank=False)  # every process builds the same model
        tokenizer = Tokenizer(cfg.text.vocab, sep=cfg.text.sep)
        start = None if resume_from or not args.checkpoint else load_checkpoint(args.checkpoint)
        check_vocabulary(tokenizer, (resume_from or start or {}).get("description") or {})
        model, lines = build_pretrain_model(cfg, tokenizer, initial_weights=not (resume_from or start))
        if start:
            lines += start_from(model, start, args.checkpoint)
        for line in lines:
            logger.info(line)
        pretrained_vit = cfg.model.image_encoder.weights != "random" or args.checkpoint is not None
        if resume_from:  # as it began, whatever is asked for again
            pretrained_vit = resume_from.get("pretrained_vit", pretrained_vit)
        run.describe(device, model.backbone.description)
        with run:
            PretrainTask(model.to(device), tokenizer, cfg, device, run).train(resume_from, pretrained_vit)


class PretrainTask(Task):
    """All losses of pre-training; after an epoch an image of its masks and, with `data.val`, a validation."""

    best: BestCheckpoint | None = None

    def __init__(self, model: PretrainModel, tokenizer: Tokenizer, cfg: Config, device: torch.device, run: Run):
        self.model, self.cfg, self.device, self.run = model, cfg, device, run
        pixels = 8 * model.backbone.image_encoder.grid if cfg.mim.target == "dvae" else None
        self.dataset = create_dataset("pretrain", cfg, codebook_size=pixels)
        self.collate = PretrainCollate(tokenizer, cfg.text.max_tokens)
        held_out = {"val": create_dataset("pretrain_eval", cfg, "val")} if cfg.data.val else {}
        self.loader = create_train_loader(self.dataset, cfg, self.collate, device, held_out)
        if len(self.dataset.paths) < 2:
            entries = len(self.dataset)
            raise UserError(f"data.train: all {entries} entries name one image, which leaves matching no negative")
        self.validation = Validation(held_out["val"], tokenizer, cfg, device, run) if held_out else None
        self.notes = {"description": model.backbone.description, "stage": PRETRAIN.name}
        self.latest: dict[str, float | dict] = {}  # for metrics.json

    def train(self, resume_from: dict | None, pretrained_vit: bool) -> None:
        """Pre-train; the run is opened when all has been checked.

        pretrained_vit: whether the image encoder starts from trained weights.
        """
        cfg, run = self.cfg, self.run
        self.notes["pretrained_vit"] = pretrained_vit
        if cfg.train.best == "val":
            notes = {**self.notes, "config": cfg.to_dict()}
            self.best = BestCheckpoint(run.dir, SCORE, notes, resumed=resume_from is not None)
        training = start_training(self.model, self.loader, cfg, self.device, resume_from, pretrained_vit)
        run.open()
        run.about["precision"] = training.progress.precision
        fit(training, self, run)
        if "loss" in self.latest or not (run.dir / "metrics.json").exists():  # else --resume found no step left to make
            run.write_metrics(self.latest)
        if self.best and self.best.best:
            best = self.best.best
            run.info(f"best epoch {best['epoch']}: {SCORE} {best[SCORE]:.2f} on val; {self.best.path}")
        run.info(f"done: {run.dir / 'checkpoint_last.pth'}")

    def prepare(self, batch: dict) -> dict:
        return self.model.prepare(batch)

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        alpha = alpha_at(progress.step, progress.steps_per_epoch, self.cfg.itc.alpha, progress.done)
        return model(batch, alpha, done=progress.done)

    def after_step(self, progress: Progress) -> None:
        self.model.after_step()

    def after_epoch(self, progress: Progress) -> None:
        if self.cfg.train.images and is_main() and self.cfg.mim.target != "none":
            try:
                self.run.image(progress.step, "masking", self.masking_image())
            except ImportError as error:
                self.run.info(f"no image of the masking: {error} (pip install -r tools/requirements.txt)")
        if self.validation:
            with random_state_kept():  # with it or without, the training is the same
                self.latest["val"] = self.validation(self.model.backbone, progress.step, progress.precision)
        if self.best:
            self.best.offer(self.model, {SCORE: self.latest["val"][SCORE]}, progress.step, progress.epoch + 1)

    def state(self) -> dict:
        return self.best.state() if self.best else self.notes

    def log(self, progress: Progress, means: dict) -> dict:
        self.latest.update(means)
        return {"data/unusable": float(all_reduce_sum(torch.tensor(self.loader.bad)))}

    def operations(self, batch: dict) -> float:
        return operations(self.model, *batch["input_ids"].shape)

    @torch.no_grad()
    def masking_image(self) -> torch.Tensor:
        """[3, H, W] in [0, 1]: for some pairs both views, the mask, the patch-text similarity and the patterns."""
        from torchvision.transforms.functional import to_pil_image  # here: torchvision takes a second to import

        from tools.visualize.figures import masking_figure, pixels

        count, entries = min(SHOWN, len(self.dataset)), len(self.dataset)
        samples = [self.dataset[(0, index * entries // count)] for index in range(count)]
        batch = self.collate(samples)
        with evaluating(self.model):
            shown = self.model.inspect(normalized(to_device(batch, self.device)))
        clean, views = (list(map(to_pil_image, batch[name])) for name in ("image1", "image2"))
        masks = {"masked at random" if shown["similarity"] is None else "masked by the text": shown.pop("mask")}
        return pixels(masking_figure(views, [sample["caption"] for sample in samples], masks, **shown, clean=clean))


if __name__ == "__main__":
    run_main(main)
