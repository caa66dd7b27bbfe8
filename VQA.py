"""Visual question answering (the paper, Table 3): fine-tune a pre-trained checkpoint, and answer the test questions.

    torchrun --nproc_per_node=8 VQA.py --config configs/VQA.yaml --output_dir output/vqa --checkpoint PRETRAINED.pth
    python VQA.py --config configs/demo/VQA.yaml --output_dir output/demo/vqa \
        --checkpoint output/demo/pretrain/checkpoint_last.pth

Every epoch the validation questions are answered; checkpoint_best.pth is the epoch with the best accuracy, and answers
the test questions at the end. `--evaluate` answers both with the checkpoint as it is. Writes vqa_result.json (the
evaluation server's format, every test question exactly once), vqa_result_val.json, and metrics.json (percent; overall,
by answer type and question type, and what the best constant answer of each question type reaches).
"""

import torch
from torch import nn

from dataset import create_dataset
from dataset.text import Tokenizer
from dataset.vqa import VQACollate, question_limits
from engine.config import VQA, Config
from engine.finetune import Finetuning, finetune, run_stage
from engine.loop import Progress
from engine.run import Run
from evaluation.vqa import Answerer, is_empty
from models.semmim import SemMIM
from models.vqa import VQAModel
from utils import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    run_stage(__doc__, argv, VQA, build, train)


def build(
    backbone: SemMIM, tokenizer: Tokenizer, cfg: Config, device: torch.device, run: Run
) -> tuple[VQAModel, Answerer]:
    return VQAModel(backbone, tokenizer).to(device), Answerer(cfg, tokenizer, device, run)


class VQATask(Finetuning):
    """The decoder learns to write the answers."""

    stage, score = VQA, "accuracy"

    def __init__(self, model: VQAModel, answerer: Answerer):
        super().__init__(model)
        self.answerer = answerer

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        return model(batch)

    def validate(self, step: int) -> dict[str, float] | None:
        if "val" not in self.answerer.batches:
            return None
        return {"accuracy": self.answerer.evaluate(self.model, "val", step=step)["accuracy"]}


def train(
    model: VQAModel, answerer: Answerer, cfg: Config, device: torch.device, run: Run, resume_from: dict | None
) -> None:
    """Fine-tune; the model ends with the weights of the best epoch by validation accuracy (of the last without val)."""
    dataset = create_dataset("vqa_train", cfg)
    if dataset.left_out:
        run.info(f"{dataset.left_out} training questions left out: they are in data.val (data.train_on_minival: false)")
    val = answerer.batches.get("val")
    if val is not None and val.dataset.references is None:
        raise UserError("data.val has no answers to choose the best epoch by; name data.official or data.val_scores")
    if val is not None and all(map(is_empty, val.dataset.references)):
        raise UserError("data.val: all references are empty, which leaves nothing to choose the best epoch by")
    collate = VQACollate(answerer.tokenizer, question_limits(cfg), cfg.text.max_answer_tokens)
    held_out = {split: batches.dataset for split, batches in answerer.batches.items()}
    finetune(VQATask(model, answerer), dataset, collate, cfg, run, device, resume_from, held_out)


if __name__ == "__main__":
    run_main(main)
