"""Image-text retrieval (the paper, Table 1): fine-tune a pre-trained checkpoint, and rank the test images and texts.

    python Retrieval.py --config configs/demo/Retrieval.yaml --output_dir output/demo/retrieval \
        --checkpoint output/demo/pretrain/checkpoint_last.pth
    torchrun --nproc_per_node=8 Retrieval.py --config configs/Retrieval_coco.yaml --output_dir output/retrieval \
        --checkpoint output/pretrain/checkpoint_last.pth

Every epoch the validation split is ranked; checkpoint_best.pth is the epoch with the best mean recall there, and ranks
the splits of `eval.splits` at the end. `--evaluate` ranks them with the checkpoint as it is, also one of pre-training.

Two stages: contrastive ranking (`itc_*`), then the first k of every query re-ranked by the fusion encoder (`itm_*`).
Writes metrics.json (percent; `chance_*`: what a random order reaches; `test_folds`: the mean over equal parts of the
test split, MSCOCO's 1K) and retrieval_result.json (the first ranked items of every query) into --output_dir.
"""

import argparse

import utils
from dataset import create_dataset, create_train_loader
from dataset.pretrain import PretrainCollate
from dataset.text import checkpoint_tokenizer
from evaluation.retrieval import Ranker
from models.retrieval import RetrievalModel
from models.semmim import start_stage
from optim import create_optimization

SCHEMA = "configs/Retrieval_coco.yaml"
OPTIONAL = ("data.image_root",)
CHOICES = {
    "data.per": ("caption", "image"),
    "itc.negatives": ("queue", "batch"),
    "rerank.score": ("itm", "itm+itc"),
}
POSITIVE = (
    *("rerank.k", "rerank.batch_size", "eval.batch_size", "eval.text_batch_size", "text.max_tokens"),
    *("train.batch_size", "train.accumulation", "train.epochs"),
)
# By a resumed run, beside utils.MAY_CHANGE.
MAY_CHANGE = (
    *("data.test", "checkpointing", "rerank.batch_size"),
    *(f"eval.{key}" for key in ("splits", "batch_size", "text_batch_size", "folds", "save_top")),
)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_arguments(parser, config=SCHEMA, output_dir="output/retrieval")
    args = parser.parse_args(argv)
    device = utils.init_distributed(args.device)
    cfg = utils.load_config(args.config, args.override, schema=SCHEMA, optional=OPTIONAL)
    check_config(cfg)
    backbone, description, run, resume_from = start_stage(args, cfg, MAY_CHANGE, decoder=False)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
    backbone.to(device)
    ranker = Ranker(cfg, tokenizer, device, run)
    if not args.evaluate:
        train(RetrievalModel(backbone, cfg).to(device), ranker, cfg, device, run, resume_from)
    ranker.evaluate_all(backbone)
    run.close()


def check_config(cfg) -> None:
    """Raise UserError for a setting that makes no sense, naming its key."""
    utils.check_choices(cfg, CHOICES)
    utils.check_positive(cfg, POSITIVE)
    splits = cfg.eval.splits
    if not splits or not set(splits) <= {"val", "test"}:
        raise utils.UserError(f"eval.splits: {splits} must name val, test or both")
    if not isinstance(cfg.eval.folds, int) or cfg.eval.folds < 0:
        raise utils.UserError(f"eval.folds: {cfg.eval.folds} must be a whole number, 0 for none")
    if cfg.train.batch_size < 2:
        raise utils.UserError(
            "train.batch_size: 1 image on a rank leaves image-text matching no negative; use 2 or more"
        )


def train(model: RetrievalModel, ranker: "Ranker", cfg, device, run, resume_from: dict | None) -> None:
    """Fine-tune; the model ends with the weights of the epoch with the best validation recall (mean of six columns)."""
    dataset = create_dataset("retrieval_train", cfg)
    val = ranker.dataset("val")
    loader = create_train_loader(dataset, cfg, PretrainCollate(ranker.tokenizer, cfg.text.max_tokens), device)
    optimizer, schedule = create_optimization(model, cfg, len(loader), run)
    notes = {"description": model.backbone.description, "stage": "retrieval", "config": cfg.to_dict()}
    best = utils.BestCheckpoint(run, "r_mean", notes, resume_from)
    utils.seed_everything(cfg.seed)  # from here on every process draws its own noise

    def loss_fn(wrapped, batch: dict, progress: utils.Progress):
        # The soft targets of ITC come in over the first epoch (ALBEF).
        return wrapped(batch, cfg.itc.alpha * min(1.0, progress.step / max(1, progress.steps_per_epoch)))

    def on_epoch_end(wrapped, progress: utils.Progress) -> None:
        numbers, _ = ranker.evaluate(model.backbone, val, "val", progress.step)
        best.offer(model, numbers["itm_r_mean"], progress)

    utils.fit(
        utils.wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=loss_fn,
        after_step=lambda progress: model.after_step(),
        on_epoch_end=on_epoch_end,
        extra_state=best.state,
        resume_from=resume_from,
    )
    best.restore(model)


if __name__ == "__main__":
    utils.run_main(main)
