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

import time

import torch
from torch import nn

from dataset import create_dataset
from dataset.caption import CaptionCollate, CaptionTrainDataset
from dataset.text import Tokenizer
from engine.config import CAPTION, Config
from engine.finetune import Finetuning, run_stage
from engine.loop import Progress
from engine.run import Run
from evaluation.caption import Captioner
from evaluation.cider import CiderReward
from evaluation.written import rewriting
from models.caption import CaptionModel, CrossEntropy, SelfCritical, count_tokens
from models.semmim import SemMIM
from utils import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    run_stage(__doc__, argv, CaptionTask)


class CaptionTask(Finetuning):
    """Captions by cross-entropy or, self-critical, by their CIDEr-D."""

    stage, score = CAPTION, "cider"
    count = staticmethod(count_tokens)

    def __init__(self, backbone: SemMIM, tokenizer: Tokenizer, cfg: Config, device: torch.device, run: Run):
        model, captioner = CaptionModel(backbone, tokenizer).to(device), Captioner(cfg, tokenizer, device, run)
        super().__init__(model, captioner, cfg, device, run)
        self.tokenizer = tokenizer
        self.validate_first = cfg.train.objective == "scst"  # its gain is measured against what it starts from

    def begin_training(self):
        cfg, datasets = self.cfg, self.evaluator.datasets
        dataset = create_dataset("caption_train", cfg)
        val = datasets.get("val") or create_dataset("caption_eval", cfg, "val")  # which refuses a missing one
        check_images("data.val", sum(map(bool, val.references)), "by which the best epoch is chosen")
        if cfg.train.objective == "cross_entropy":
            self.objective = CrossEntropy(cfg.train.label_smoothing)
        else:
            self.objective = self.self_critical(dataset)
        collate = CaptionCollate(self.tokenizer, cfg.text.max_tokens, cfg.text.max_prompt_tokens)
        return dataset, collate, datasets

    def self_critical(self, dataset: CaptionTrainDataset) -> SelfCritical:
        """SCST with its reward, whose document frequencies are counted here."""
        start, images, cfg = time.perf_counter(), len(dataset.paths), self.cfg
        check_images("data.train", images, "the reward of train.objective: scst")
        rewrite = rewriting("rewards on data.train", dataset.captions, self.tokenizer, self.run.info)
        reward = CiderReward(self.tokenizer, map(dataset.references, range(images)), cfg.scst.eos, rewrite)
        self.run.info(f"CIDEr-D: n-grams of {images} training images counted in {time.perf_counter() - start:.1f} s")
        options = {key: cfg.scst[key] for key in ("mode", "samples", "baseline", "log_prob")}
        lengths = {"min_tokens": cfg.generation.min_tokens, "max_tokens": cfg.generation.max_tokens}
        return SelfCritical(reward, **options, **lengths)

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        return model(batch, self.objective)

    def validate(self, step: int) -> dict[str, float]:
        found = self.evaluator.validate(self.model)
        self.run.log(step, {"cider": found}, "val")
        self.run.info(f"val at step {step}: CIDEr {found:.2f}")
        return {"cider": found}


def check_images(key: str, count: int, use: str) -> None:
    """UserError if CIDEr, of which each word weighs by how many images have it, is 0 by construction."""
    if count < 2:
        raise UserError(f"{key}: images with captions: {count}; CIDEr, {use}, needs two or more")


if __name__ == "__main__":
    run_main(main)
