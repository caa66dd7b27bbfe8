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
from dataset.caption import CaptionCollate
from dataset.text import Tokenizer
from engine.config import CAPTION, Config
from engine.finetune import Finetuning, finetune, run_stage
from engine.loop import Progress
from engine.run import Run
from evaluation.caption import Captioner
from evaluation.cider import CiderReward
from evaluation.written import rewriting
from models.caption import CaptionModel, CrossEntropy, SelfCritical, count_tokens
from models.semmim import SemMIM
from utils import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    run_stage(__doc__, argv, CAPTION, build, train)


def build(
    backbone: SemMIM, tokenizer: Tokenizer, cfg: Config, device: torch.device, run: Run
) -> tuple[CaptionModel, Captioner]:
    return CaptionModel(backbone, tokenizer).to(device), Captioner(cfg, tokenizer, device, run)


class CaptionTask(Finetuning):
    """Captions by cross-entropy or, self-critical, by their CIDEr-D."""

    stage, score = CAPTION, "cider"
    count = staticmethod(count_tokens)

    def __init__(self, model: CaptionModel, captioner: Captioner, objective: CrossEntropy | SelfCritical, run: Run):
        super().__init__(model)
        self.captioner, self.objective, self.run = captioner, objective, run
        self.validate_first = isinstance(objective, SelfCritical)  # its gain is measured against what it starts from

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        return model(batch, self.objective)

    def validate(self, step: int) -> dict[str, float]:
        found = self.captioner.validate(self.model)
        self.run.log(step, {"cider": found}, "val")
        self.run.info(f"val at step {step}: CIDEr {found:.2f}")
        return {"cider": found}


def train(
    model: CaptionModel, captioner: Captioner, cfg: Config, device: torch.device, run: Run, resume_from: dict | None
) -> None:
    """Fine-tune; the model ends with the weights of the epoch with the best validation CIDEr."""
    dataset = create_dataset("caption_train", cfg)
    val = captioner.datasets.get("val") or create_dataset("caption_eval", cfg, "val")  # which refuses a missing one
    if (count := sum(map(bool, val.references))) < 2:
        raise UserError(
            f"data.val: images with captions: {count}; the best epoch is chosen by CIDEr, which weighs words by how "
            "many images have them and needs two or more"
        )
    task = CaptionTask(model, captioner, create_objective(cfg, dataset, captioner.tokenizer, run), run)
    collate = CaptionCollate(captioner.tokenizer, cfg.text.max_tokens, cfg.text.max_prompt_tokens)
    finetune(task, dataset, collate, cfg, run, device, resume_from, captioner.datasets)


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
    rewrite = rewriting("rewards on data.train", dataset.captions, tokenizer, run.info)
    reward = CiderReward(tokenizer, map(dataset.references, range(images)), cfg.scst.eos, rewrite)
    run.info(f"CIDEr-D: n-grams of {images} training images counted in {time.perf_counter() - start:.1f} s")
    return SelfCritical(
        reward,
        **{key: cfg.scst[key] for key in ("mode", "samples", "baseline", "log_prob")},
        min_tokens=cfg.generation.min_tokens,
        max_tokens=cfg.generation.max_tokens,
    )


if __name__ == "__main__":
    run_main(main)
