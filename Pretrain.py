"""Pre-train SemMIM on image-text pairs (the paper, Section 3).

    python Pretrain.py --config configs/demo/Pretrain.yaml --output_dir output/demo/pretrain
    torchrun --nproc_per_node=8 Pretrain.py --config configs/Pretrain.yaml --output_dir output/pretrain

`--resume` continues an interrupted run at the very step it stopped; `--checkpoint FILE` starts a new run from the
weights of an earlier one. Writes checkpoint_last.pth, config.yaml, log.jsonl, TensorBoard's events and, every epoch, a
picture of what is masked.
"""

import argparse

import torch
import torch.nn.functional as F

from dataset import create_dataset, create_train_loader
from dataset.pretrain import PretrainCollate
from dataset.text import Tokenizer
from dataset.transforms import CLIP_MEAN, CLIP_STD
from models.alignment import MatchingWatch
from models.pretrain import PretrainModel, build_pretrain_model, start_from
from optim import create_optimization
from utils import (
    Progress,
    Run,
    UserError,
    add_arguments,
    all_reduce_sum,
    begin,
    fit,
    init_distributed,
    is_main,
    load_checkpoint,
    load_config,
    run_main,
    seed_everything,
    to_device,
    unwrap,
    wrap_ddp,
)

SCHEMA = "configs/Pretrain.yaml"
OPTIONAL = ("mim.inject_from",)  # keys that may be `none`
PICTURES = 8  # pairs in the picture of an epoch
MAY_CHANGE = (  # by a resumed run, beside utils.MAY_CHANGE
    "train.pictures",
    *(f"model.{key}" for key in ("image_encoder.weights", "image_encoder.checkpointing", "bert.weights")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    device = init_distributed(args.device)
    cfg = load_config(args.config, args.override, schema=SCHEMA, optional=OPTIONAL)
    if args.evaluate:
        raise UserError("--evaluate: Pretrain.py only trains; evaluate its checkpoint with Retrieval.py --evaluate")
    resume_from, differences = begin(args, cfg, MAY_CHANGE)
    seed_everything(cfg.seed, per_rank=False)  # every process builds the same model
    run = Run(args.output_dir, cfg, resume_from=resume_from)

    tokenizer = Tokenizer(cfg.text.vocab, sep=cfg.text.sep)
    model, lines = build_pretrain_model(cfg, tokenizer, initial_weights=not (args.resume or args.checkpoint))
    if args.checkpoint and not args.resume:
        lines += start_from(model, load_checkpoint(args.checkpoint)["model"], args.checkpoint)
    for line in differences + lines:
        run.info(line)
    model.to(device)

    grid = model.backbone.image_encoder.grid
    dataset = create_dataset("pretrain", cfg, codebook_size=8 * grid if cfg.mim.target == "dvae" else None)
    loader = create_train_loader(dataset, cfg, PretrainCollate(tokenizer, cfg.text.max_tokens), device)
    if len(dataset.paths) < 2:
        raise UserError(f"data.train: all {len(dataset)} entries name one image, which leaves matching no negative")
    pretrained_vit = cfg.model.image_encoder.weights != "random" or args.checkpoint is not None
    optimizer, schedule = create_optimization(model, cfg, len(loader), run, pretrained_vit)
    seed_everything(cfg.seed)  # from here on every process draws its own noise

    def loss_fn(wrapped, batch: dict, progress: Progress):
        # The soft targets of ITC come in over the first epoch, while the twins are still worth little (ALBEF).
        ramp = min(1.0, progress.step / max(1, progress.steps_per_epoch))
        return wrapped(batch, cfg.itc.alpha * ramp, done=progress.step / progress.total_steps)

    def on_epoch_end(wrapped, progress: Progress) -> None:
        if cfg.train.pictures and is_main() and cfg.mim.target != "none":
            picture = masking_picture(unwrap(wrapped), dataset, tokenizer, cfg.text.max_tokens, device)
            run.image(progress.step, "masking", picture)

    latest: dict[str, float] = {}
    watch = MatchingWatch(cfg.train)

    def log_fn(progress: Progress, means: dict) -> dict:
        latest.update(means)
        if line := watch.line(progress, means):
            run.info(line)
        return {"data/unusable": float(all_reduce_sum(torch.tensor(loader.bad)))}

    fit(
        wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=loss_fn,
        after_step=lambda progress: model.after_step(),
        on_epoch_end=on_epoch_end,
        extra_state=lambda: {"description": model.backbone.description, "stage": "pretrain"},
        resume_from=resume_from,
        log_fn=log_fn,
    )
    if latest:  # empty where --resume found nothing left to do
        run.write_metrics(latest)
    run.info(f"done: {run.dir / 'checkpoint_last.pth'}")
    run.close()


@torch.no_grad()
def masking_picture(model: PretrainModel, dataset, tokenizer, max_tokens: int, device) -> torch.Tensor:
    """[3, H, W] in [0, 1]; a row a pair: view 1, view 2, masked view 2, patch-text similarity, patterns."""
    count = min(PICTURES, len(dataset))
    samples = [dataset[(0, index * len(dataset) // count)] for index in range(count)]
    batch = to_device(PretrainCollate(tokenizer, max_tokens)(samples), device)
    training = model.training
    model.eval()
    shown = model.inspect(batch)
    model.train(training)

    views = [denormalise(batch[name]) for name in ("image1", "image2")]
    size, grid = views[0].shape[-1], model.backbone.image_encoder.grid

    def as_picture(values: torch.Tensor) -> torch.Tensor:  # [B, N, 3] -> [B, 3, S, S]
        squares = values.float().transpose(1, 2).unflatten(2, (grid, grid))
        return F.interpolate(squares, size=(size, size), mode="nearest")

    columns = [*views, views[1] * as_picture(1 - shown["mask"].float()[..., None].expand(-1, -1, 3))]
    if shown["similarity"] is not None:
        low, high = shown["similarity"].amin(1, keepdim=True), shown["similarity"].amax(1, keepdim=True)
        relative = (shown["similarity"] - low) / (high - low).clamp(min=1e-6)
        columns.append(as_picture(relative[..., None].expand(-1, -1, 3)))
    if shown["patterns"] is not None:
        colours = torch.rand(int(shown["patterns"].max()) + 1, 3, generator=torch.Generator().manual_seed(0))
        columns.append(as_picture(colours.to(device)[shown["patterns"]]))
    rows = torch.cat(columns, 3)  # [B, 3, S, columns * S]
    return rows.transpose(0, 1).flatten(1, 2).clamp(0, 1).cpu()


def denormalise(images: torch.Tensor) -> torch.Tensor:
    """Back from CLIP's normalisation to [0, 1]. [B, 3, S, S]"""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return images * std + mean


if __name__ == "__main__":
    run_main(main)
