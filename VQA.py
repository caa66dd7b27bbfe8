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
from engine.finetune import Finetuning, run_stage
from engine.loop import Progress
from engine.run import Run
from evaluation.vqa import Answerer, is_empty
from models.semmim import SemMIM
from models.vqa import VQAModel
from utils import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    run_stage(__doc__, argv, VQATask)


class VQATask(Finetuning):
    """The decoder learns to write the answers; without data.val the last epoch is kept."""

    stage, score = VQA, "accuracy"

    def __init__(self, backbone: SemMIM, tokenizer: Tokenizer, cfg: Config, device: torch.device, run: Run):
        answerer = Answerer(cfg, tokenizer, device, run)
        super().__init__(VQAModel(backbone, tokenizer).to(device), answerer, cfg, device, run)
        self.tokenizer = tokenizer
        self.held_out = {split: batches.dataset for split, batches in answerer.batches.items()}

    def begin_training(self):
        dataset = create_dataset("vqa_train", self.cfg)
        if dataset.left_out:
            which = "they are in data.val (data.train_on_minival: false)"
            self.run.info(f"{dataset.left_out} training questions left out: {which}")
        if val := self.held_out.get("val"):
            if val.references is None:
                raise UserError("data.val has no answers, which choose the best epoch; set data.official or val_scores")
            if all(map(is_empty, val.references)):
                raise UserError("data.val: all references are empty, which leaves nothing to choose the best epoch by")
        collate = VQACollate(self.tokenizer, question_limits(self.cfg), self.cfg.text.max_answer_tokens)
        return dataset, collate, self.held_out

    def loss(self, model: nn.Module, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        return model(batch)

    def validate(self, step: int) -> dict[str, float] | None:
        if "val" not in self.held_out:
            return None
        return {"accuracy": self.evaluator.evaluate(self.model, "val", step=step)["accuracy"]}


if __name__ == "__main__":
    run_main(main)
