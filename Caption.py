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

import torch

from dataset import create_dataset
from dataset.caption import CaptionCollate
from dataset.text import checkpoint_tokenizer
from engine.config import CAPTION, Config, add_arguments, load_config
from engine.distributed import distributed
from engine.finetune import finetune, start_stage
from engine.loop import Progress
from engine.run import Run
from evaluation.caption import Captioner, references_with_words
from evaluation.cider import CiderReward
from models.caption import CaptionModel, CrossEntropy, SelfCritical, count_tokens
from utils import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, config=CAPTION.schema, output_dir="output/caption")
    args = parser.parse_args(argv)
    with distributed(args.device) as device:
        cfg = load_config(args.config, args.override, CAPTION)
        backbone, description, run, resume_from = start_stage(args, cfg, CAPTION, decoder=True)
        tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
        model = CaptionModel(backbone, tokenizer).to(device)
        captioner = Captioner(cfg, tokenizer, device, run)
        with run:
            if args.evaluate:
                run.open(evaluate=True)
            else:
                train(model, captioner, cfg, device, run, resume_from)
            captioner.evaluate_all(model)


def train(
    model: CaptionModel, captioner: Captioner, cfg: Config, device: torch.device, run: Run, resume_from: dict | None
) -> None:
    """Fine-tune; the model ends with the weights of the epoch with the best validation CIDEr."""
    dataset = create_dataset("caption_train", cfg)
    if (count := len(references_with_words(captioner.datasets["val"]))) < 2:
        raise UserError(
            f"data.val: images with captions: {count}; the best epoch is chosen by CIDEr, which weighs words by how "
            "many images have them and needs two or more"
        )
    objective = create_objective(cfg, dataset, captioner.tokenizer, run)
    reward_clock = RewardClock(objective)

    def validate(step: int) -> dict[str, float]:
        found = captioner.validate(model)
        run.log(step, {"cider": found}, "val")
        run.info(f"val at step {step}: CIDEr {found:.2f}")
        reward_clock.stop()
        return {"cider": found}

    def loss_fn(wrapped, batch: dict, progress: Progress):
        if wrapped.training:  # not in DDP's rehearsal
            reward_clock.start()
        return wrapped(batch, objective)

    finetune(
        model,
        dataset,
        CaptionCollate(captioner.tokenizer, cfg.text.max_tokens, cfg.text.max_prompt_tokens),
        stage=CAPTION,
        score="cider",
        cfg=cfg,
        run=run,
        device=device,
        loss_fn=loss_fn,
        validate=validate,
        validate_first=cfg.train.objective == "scst",  # its gain is measured against what it starts from
        log_fn=lambda progress, means: reward_clock.share(),
        count_fn=count_tokens,
        resume_from=resume_from,
    )


def create_objective(cfg, dataset, tokenizer, run):
    """What `train.objective` names; for scst the reward's document frequencies are counted here."""
    if cfg.train.objective == "cross_entropy":
        return CrossEntropy(cfg.train.label_smoothing)
    start = time.perf_counter()
    images = len(dataset.paths)
    if images < 2:
        raise UserError(
            "data.train: one image; CIDEr, the reward of train.objective: scst, weighs words by how many images have "
            "them and needs two or more"
        )
    reward = CiderReward(tokenizer, map(dataset.references, range(images)), cfg.scst.eos)
    run.info(f"CIDEr-D: n-grams of {images} training images counted in {time.perf_counter() - start:.1f} s")
    return SelfCritical(
        reward,
        **{key: cfg.scst[key] for key in ("mode", "samples", "baseline")},
        min_tokens=cfg.generation.min_tokens,
        max_tokens=cfg.generation.max_tokens,
    )


class RewardClock:
    """The share of training time since the last log that went into the reward."""

    def __init__(self, objective):
        self.objective = objective
        self.stop()

    def stop(self) -> None:
        """Wait for the next training step."""
        self.since = None

    def start(self) -> None:
        if self.since is None:
            self.spent, self.since = getattr(self.objective, "reward_seconds", 0.0), time.perf_counter()

    def share(self) -> dict[str, float]:
        """{} where there is no reward"""
        if not isinstance(self.objective, SelfCritical):
            return {}
        share = (self.objective.reward_seconds - self.spent) / (time.perf_counter() - self.since)
        self.stop(), self.start()
        return {"reward_time": share}


if __name__ == "__main__":
    run_main(main)
