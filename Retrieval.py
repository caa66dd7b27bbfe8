"""Image-text retrieval (the paper, Table 1): fine-tune a pre-trained checkpoint, and rank the test images and texts.

    python Retrieval.py --config configs/demo/Retrieval.yaml --output_dir output/demo/retrieval \
        --checkpoint output/demo/pretrain/checkpoint_last.pth
    torchrun --nproc_per_node=8 Retrieval.py --config configs/Retrieval_coco.yaml --output_dir output/retrieval \
        --checkpoint output/pretrain/checkpoint_last.pth

Every epoch the validation split is ranked; checkpoint_best.pth is the epoch with the best mean recall there, in the
better of its two orders (the file's entry best.order), and ranks the splits of `eval.splits` at the end. `--evaluate`
ranks them with the checkpoint as it is, also one of pre-training.

Two stages: contrastive ranking (`itc_*`), then the first k of every query re-ranked by the fusion encoder (`itm_*`).
Writes metrics.json (percent; `chance_*`: what a random order reaches; `test_folds`: the mean over equal parts of the
test split, MSCOCO's 1K) and retrieval_result.json (the first ranked items of every query) into --output_dir.
"""

import torch
from torch import nn

from dataset import create_dataset
from dataset.pretrain import PretrainCollate
from dataset.text import Tokenizer
from engine.config import RETRIEVAL, Config
from engine.finetune import Finetuning, run_stage
from engine.loop import Progress
from engine.run import Run
from evaluation.retrieval import Ranker, better_order
from models.alignment import alpha_at
from models.retrieval import RetrievalModel
from models.semmim import SemMIM
from utils import run_main


def main(argv: list[str] | None = None) -> None:
    run_stage(__doc__, argv, RetrievalTask)


class RetrievalTask(Finetuning):
    """ITC and ITM; an epoch counts with the better of its two orders, whose name checkpoint_best.pth holds."""

    stage, score, decoder = RETRIEVAL, "r_mean", False

    def __init__(self, backbone: SemMIM, tokenizer: Tokenizer, cfg: Config, device: torch.device, run: Run):
        super().__init__(backbone, Ranker(cfg, tokenizer, device, run), cfg, device, run)
        self.backbone = backbone

    def begin_training(self):
        self.model = RetrievalModel(self.backbone, self.cfg).to(self.device)
        self.evaluator.dataset("val")  # read, and checked, before the first step
        dataset = create_dataset("retrieval_train", self.cfg)
        collate = PretrainCollate(self.evaluator.tokenizer, self.cfg.text.max_tokens)
        return dataset, collate, self.evaluator.datasets

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        alpha = alpha_at(progress.step, progress.steps_per_epoch, self.cfg.itc.alpha, progress.done)
        return model(batch, alpha, done=progress.done)

    def after_step(self, progress: Progress) -> None:
        self.model.after_step()

    def validate(self, step: int) -> dict[str, float | str]:
        numbers = self.evaluator.evaluate(self.backbone, "val", step)[0]
        order, value = better_order(numbers, self.cfg.rerank.score)
        return {"r_mean": value, "order": order}

    def evaluate(self) -> None:
        self.evaluator.evaluate_all(self.backbone)


if __name__ == "__main__":
    run_main(main)
