"""Pre-train SemMIM on image-text pairs (the paper, Section 3).

    python Pretrain.py --config configs/demo/Pretrain.yaml --output_dir output/demo/pretrain
    torchrun --nproc_per_node=8 Pretrain.py --config configs/Pretrain.yaml --output_dir output/pretrain

`--resume` continues an interrupted run at the very step it stopped, or begins where there is none; `--checkpoint
FILE` starts a new run from the weights of an earlier one. Writes checkpoint_last.pth, config.yaml, log.jsonl,
TensorBoard's events and, every epoch, an image of what is masked. With `data.val` every epoch, and the end, is
validated (retrieval by ITC); with `train.best: val` checkpoint_best.pth is the best of them.
"""

import argparse

import torch
from torchvision.transforms.functional import to_pil_image

from dataset import create_dataset, create_train_loader
from dataset.pretrain import PretrainCollate
from dataset.text import Tokenizer
from dataset.transforms import CLIP_MEAN, CLIP_STD, normalised
from engine.checkpoint import DIVERGED, BestCheckpoint, begin, random_state_kept
from engine.config import PRETRAIN, Config, add_arguments, differences, load_config
from engine.distributed import compile_layers, distributed, wrap_ddp
from engine.length import create_optimization
from engine.loop import Progress, fit, position
from engine.run import Run
from evaluation.retrieval import SCORE, Validation
from evaluation.sharded import evaluating
from models.alignment import MatchingWatch, alpha_at
from models.pretrain import PretrainModel, build_pretrain_model, operations, start_from
from utils import (
    UserError,
    all_reduce_sum,
    is_main,
    load_checkpoint,
    logger,
    run_main,
    seed_everything,
    to_device,
    unwrap,
    world_size,
)

SHOWN = 4  # pairs in the image of an epoch, which fits on a screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    with distributed(args.device) as device:
        cfg = load_config(args.config, args.override, PRETRAIN)
        if args.evaluate:
            raise UserError("--evaluate: Pretrain.py only trains; evaluate its checkpoint with Retrieval.py --evaluate")
        resume_from, found, lines = begin(args, cfg, PRETRAIN)
        seed_everything(cfg.seed, per_rank=False)  # every process builds the same model
        tokenizer = Tokenizer(cfg.text.vocab, sep=cfg.text.sep)
        start = None if resume_from else args.checkpoint
        model, built = build_pretrain_model(cfg, tokenizer, initial_weights=not (resume_from or start))
        lines += built
        if start:
            lines += start_from(model, load_checkpoint(start), start)
        for line in lines:
            logger.info(line)
        pretrained_vit = cfg.model.image_encoder.weights != "random" or args.checkpoint is not None
        with Run(args.output_dir, cfg, found) as run:
            train(model.to(device), tokenizer, cfg, device, run, resume_from, pretrained_vit)


def train(
    model: PretrainModel,
    tokenizer: Tokenizer,
    cfg: Config,
    device: torch.device,
    run: Run,
    resume_from: dict | None,
    pretrained_vit: bool,
) -> None:
    """Pre-train, with a validation and an image after every epoch; the run is opened when all has been checked.

    pretrained_vit: whether the image encoder starts from trained weights. Raises UserError where the loss ends high
    above its usual range.
    """
    grid = model.backbone.image_encoder.grid
    dataset = create_dataset("pretrain", cfg, codebook_size=8 * grid if cfg.mim.target == "dvae" else None)
    loader = create_train_loader(dataset, cfg, PretrainCollate(tokenizer, cfg.text.max_tokens), device)
    if len(dataset.paths) < 2:
        raise UserError(f"data.train: all {len(dataset)} entries name one image, which leaves matching no negative")
    notes, validation, best = {"description": model.backbone.description, "stage": PRETRAIN.name}, None, None
    if cfg.data.val:
        validation = Validation(create_dataset("pretrain_eval", cfg, "val"), tokenizer, cfg, device, run)
    if cfg.train.best == "val":
        best = best_on_val(run, {**notes, "config": cfg.to_dict()}, cfg, resume_from)
    optimizer, schedule = create_optimization(model, cfg, loader, pretrained_vit)
    seed_everything(cfg.seed)  # from here on every process draws its own noise
    resumed = resume_from is not None
    progress = position(model, optimizer, len(loader), cfg.train, device, resume_from)
    if cfg.train.compile:
        logger.info("train.compile: %d layers, in the first steps", compile_layers(model, device))
    run.open(progress.step if resumed else None)
    latest: dict[str, float | dict] = {}  # for metrics.json
    watch = MatchingWatch(cfg.itm, cfg.train.batch_size * cfg.train.accumulation * world_size())

    def loss_fn(wrapped, batch: dict, progress: Progress):
        alpha = alpha_at(progress.step, progress.steps_per_epoch, cfg.itc.alpha, progress.done)
        return wrapped(batch, alpha, done=progress.done)

    def on_epoch_end(wrapped, progress: Progress) -> None:
        if cfg.train.images and is_main() and cfg.mim.target != "none":
            image = masking_image(unwrap(wrapped), dataset, tokenizer, cfg.text.max_tokens, device)
            if image is not None:
                run.image(progress.step, "masking", image)
            elif progress.epoch == 0:
                run.info("no image of the masking: matplotlib is missing (pip install -r tools/requirements.txt)")
        if validation:
            with random_state_kept():  # with it or without, the training is the same
                latest["val"] = validation(model.backbone, progress.step, progress.precision)
        if best:
            best.offer(wrapped, {SCORE: latest["val"][SCORE]}, progress.step, progress.epoch + 1)

    def log_fn(progress: Progress, means: dict) -> dict:
        latest.update(means)
        if line := watch.line(progress.step, means["loss/itm"]):
            run.info(line)
        return {"data/unusable": float(all_reduce_sum(torch.tensor(loader.bad)))}

    jump = fit(
        wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        progress,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=loss_fn,
        after_step=lambda progress: model.after_step(),
        on_epoch_end=on_epoch_end,
        extra_state=best.state if best else lambda: notes,
        log_fn=log_fn,
        operations_fn=lambda batch: operations(model, *batch["input_ids"].shape),
    )
    if "loss" in latest or not (run.dir / "metrics.json").exists():  # else --resume found no step left to make
        run.write_metrics(latest)
    if jump is not None:
        raise UserError(
            f"{run.dir}: training ended with a loss that jumped from {jump.usual:.4g} to {jump.loss:.4g} in step "
            f"{jump.step}: checkpoint_last.pth is from before, {DIVERGED} from the end; lower train.lr and --resume"
        )
    if best and best.best:
        run.info(f"best epoch {best.best['epoch']}: {SCORE} {best.best[SCORE]:.2f} on val; {best.path}")
    run.info(f"done: {run.dir / 'checkpoint_last.pth'}")


def best_on_val(run: Run, notes: dict, cfg: Config, resume_from: dict | None) -> BestCheckpoint:
    """The keeper of the best epoch by validation; of epochs that were validated on other images nothing is known."""
    if resume_from and "best" in resume_from:
        changed = differences(resume_from["config"], cfg)
        if "data.val" in changed or "eval.images" in changed:
            run.info("data.val or eval.images are new: the best epoch is chosen among those to come")
            del resume_from["best"]
    return BestCheckpoint(run.dir, SCORE, notes, resume_from)


@torch.no_grad()
def masking_image(model: PretrainModel, dataset, tokenizer, max_tokens: int, device) -> torch.Tensor | None:
    """[3, H, W] in [0, 1]: for some pairs both views, the mask, the patch-text similarity and the patterns.

    None without matplotlib (tools/requirements.txt), which draws it.
    """
    count = min(SHOWN, len(dataset))
    samples = [dataset[(0, index * len(dataset) // count)] for index in range(count)]
    batch = normalised(to_device(PretrainCollate(tokenizer, max_tokens)(samples), device))
    with evaluating(model):
        shown = model.inspect(batch)
    try:
        from tools.visualize.figures import masking_figure, pixels
    except ImportError:
        return None
    clean, views = (list(map(to_pil_image, denormalise(batch[name]).cpu())) for name in ("image1", "image2"))
    figure = masking_figure(
        views,
        {"masked by the text" if shown["similarity"] is not None else "masked at random": shown["mask"]},
        [sample["caption"] for sample in samples],
        similarity=shown["similarity"],
        patterns=shown["patterns"],
        clean=clean,
    )
    return pixels(figure)


def denormalise(images: torch.Tensor) -> torch.Tensor:
    """Back from CLIP's normalisation to [0, 1]. [B, 3, S, S]"""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (images * std + mean).clamp(0, 1)


if __name__ == "__main__":
    run_main(main)
