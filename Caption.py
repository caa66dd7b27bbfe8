"""Captioning (the paper, Table 2): fine-tune by cross-entropy, then by CIDEr, and caption the test images.

    python Caption.py --config configs/demo/Caption.yaml --output_dir output/demo/caption \
        --checkpoint output/demo/pretrain/checkpoint_last.pth
    python Caption.py --config configs/demo/Caption_scst.yaml --output_dir output/demo/caption_scst \
        --checkpoint output/demo/caption/checkpoint_best.pth
    torchrun --nproc_per_node=8 Caption.py --config configs/Caption_coco.yaml --output_dir output/caption \
        --checkpoint output/pretrain/checkpoint_last.pth
    torchrun --nproc_per_node=8 Caption.py --config configs/Caption_nocaps.yaml --output_dir output/nocaps \
        --checkpoint output/caption/checkpoint_best.pth --evaluate

Every epoch the validation images are captioned; checkpoint_best.pth is the epoch with the best CIDEr there, and
captions the splits of `eval.splits` at the end. `--evaluate` captions them with the checkpoint as it is, also one of
pre-training. Writes caption_result.json ([{"image_id", "caption"}] of the last split, each image once),
caption_result_SPLIT.json of the others, and metrics.json (percent; a column that needs a missing Java or SPICE's
parser says so).
"""

import argparse
import time

import utils
from dataset import create_dataset, create_train_loader
from dataset.caption import CaptionCollate
from dataset.text import checkpoint_tokenizer
from evaluation.caption import Captioner
from evaluation.cider import CiderReward, load_document_frequencies
from models.caption import CaptionModel, CrossEntropy, SelfCritical
from models.generation import check_options
from models.semmim import start_stage
from optim import create_optimization

SCHEMA = "configs/Caption_coco.yaml"
OPTIONAL = ("data.image_root",)
CHOICES = {
    "data.per": ("caption", "image"),
    "train.objective": ("cross_entropy", "scst"),
    "scst.mode": ("sample", "beam"),
}
POSITIVE = ("text.max_tokens", "text.max_prompt_tokens", "eval.batch_size", "train.batch_size", "train.accumulation")
# By a resumed run, beside utils.MAY_CHANGE.
MAY_CHANGE = ("data.test", "checkpointing", "eval.splits", "eval.batch_size", "eval.spice")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_arguments(parser, config=SCHEMA, output_dir="output/caption")
    args = parser.parse_args(argv)
    device = utils.init_distributed(args.device)
    cfg = utils.load_config(args.config, args.override, schema=SCHEMA, optional=OPTIONAL)
    check_config(cfg)
    backbone, description, run, resume_from = start_stage(args, cfg, MAY_CHANGE, decoder=True)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
    model = CaptionModel(backbone, tokenizer).to(device)
    writer = Captioner(cfg, tokenizer, device, run)
    if not args.evaluate:
        train(model, writer, cfg, device, run, resume_from)
    run.write_metrics({split: writer.evaluate(model, split) for split in cfg.eval.splits})
    run.close()


def check_config(cfg) -> None:
    """Raise UserError for a setting that makes no sense, naming its key."""
    utils.check_choices(cfg, CHOICES)
    utils.check_positive(cfg, POSITIVE)
    splits = cfg.eval.splits
    if not splits or not set(splits) <= {"val", "test"}:
        raise utils.UserError(f"eval.splits: {splits} must name val, test or both")
    check_options(**{key: value for key, value in cfg.generation.items() if key != "length_penalty"})


# -------------------------------------------------------------------------------------------------------- training


def train(model: CaptionModel, writer, cfg, device, run, resume_from: dict | None) -> None:
    """Fine-tune; the model ends with the weights of the epoch with the best validation CIDEr."""
    dataset = create_dataset("caption_train", cfg)
    if not any(writer.datasets["val"].references):
        raise utils.UserError("data.val has no captions to choose the best epoch by")
    loader = create_train_loader(
        dataset, cfg, CaptionCollate(writer.tokenizer, cfg.text.max_tokens, cfg.text.max_prompt_tokens), device
    )
    optimizer, schedule = create_optimization(model, cfg, len(loader), run)
    objective = create_objective(cfg, dataset, writer.tokenizer, run)
    notes = {"description": model.backbone.description, "stage": "caption", "config": cfg.to_dict()}
    best = utils.BestCheckpoint(run, "cider", notes, resume_from)
    utils.seed_everything(cfg.seed)  # from here on every process draws its own noise
    if cfg.train.objective == "scst" and not best.best:
        found = writer.validate(model)
        run.log(0, {"cider": found}, "val")
        run.info(f"val before self-critical training: CIDEr {found:.2f}")
    clock = RewardClock(objective)

    def on_epoch_end(wrapped, progress: utils.Progress) -> None:
        found = writer.validate(model)
        run.log(progress.step, {"cider": found}, "val")
        run.info(f"val after epoch {progress.epoch + 1}: CIDEr {found:.2f}")
        best.offer(model, found, progress)
        clock.restart()

    utils.fit(
        utils.wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=lambda wrapped, batch, progress: wrapped(batch, objective),
        on_epoch_end=on_epoch_end,
        extra_state=best.state,
        resume_from=resume_from,
        log_fn=lambda progress, means: clock.share(),
    )
    best.restore(model)


def create_objective(cfg, dataset, tokenizer, run):
    """What `train.objective` names; for scst the reward's document frequencies are counted, or read, here."""
    if cfg.train.objective == "cross_entropy":
        return CrossEntropy(cfg.train.label_smoothing)
    start = time.perf_counter()
    reward = CiderReward(tokenizer, load_document_frequencies(cfg.data.train[0], dataset, run.dir))
    count, images = len(reward.cider.keys), reward.cider.images
    run.info(f"CIDEr-D: {count} n-grams of {images} training images in {time.perf_counter() - start:.1f} s")
    return SelfCritical(
        reward,
        **{key: cfg.scst[key] for key in ("mode", "samples", "baseline", "cross_entropy")},
        min_tokens=cfg.generation.min_tokens,
        max_tokens=cfg.generation.max_tokens,
    )


class RewardClock:
    """The share of training time since the last log that went into the reward."""

    def __init__(self, objective):
        self.objective = objective
        self.restart()

    def restart(self) -> None:
        self.spent, self.start = getattr(self.objective, "reward_seconds", 0.0), time.perf_counter()

    def share(self) -> dict[str, float]:
        """{} where there is no reward"""
        if not isinstance(self.objective, SelfCritical):
            return {}
        share = (self.objective.reward_seconds - self.spent) / (time.perf_counter() - self.start)
        self.restart()
        return {"reward_time": share}


if __name__ == "__main__":
    utils.run_main(main)
