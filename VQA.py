"""Visual question answering (the paper, Table 3): fine-tune a pre-trained checkpoint, and answer the test questions.

    torchrun --nproc_per_node=8 VQA.py --config configs/VQA.yaml --output_dir output/vqa --checkpoint PRETRAINED.pth
    python VQA.py --config configs/demo/VQA.yaml --output_dir output/demo/vqa \
        --checkpoint output/demo/pretrain/checkpoint_last.pth

Every epoch the validation questions are answered; checkpoint_best.pth is the epoch with the best accuracy, and answers
the test questions at the end. `--evaluate` answers both with the checkpoint as it is. Writes vqa_result.json (the
evaluation server's format, every test question exactly once), vqa_result_val.json, and metrics.json (percent; overall,
by answer type and question type, and what the best constant answer of each question type reaches).
"""

import argparse

import torch
from torch.utils.data import DataLoader, Subset

import metrics
import utils
from dataset import create_dataset
from dataset.text import checkpoint_tokenizer
from dataset.vqa import EvalBatches, VQACollate, encode_answers, read_answer_list
from engine.config import VQA, Config, add_arguments, load_config
from engine.finetune import finetune, start_stage
from engine.run import Run
from models.vqa import VQAModel
from utils import UserError, init_distributed, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, config=VQA.schema, output_dir="output/vqa")
    args = parser.parse_args(argv)
    device = init_distributed(args.device)
    cfg = load_config(args.config, args.override, VQA)
    backbone, description, run, resume_from = start_stage(args, cfg, VQA, decoder=True)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
    model = VQAModel(backbone, tokenizer).to(device)
    answerer = Answerer(cfg, tokenizer, device, run)
    if args.evaluate:
        run.open(evaluate=True)
    else:
        train(model, answerer, cfg, device, run, resume_from)
    run.write_metrics({split: answerer.evaluate(model, split, write=True) for split in answerer.batches})
    run.close()


def question_limits(cfg: Config) -> tuple[int, int, int]:
    """Word pieces of question, OCR and labels."""
    return cfg.text.max_question_tokens, cfg.text.max_ocr_tokens, cfg.text.max_label_tokens


def train(
    model: VQAModel, answerer: "Answerer", cfg: Config, device: torch.device, run: Run, resume_from: dict | None
) -> None:
    """Fine-tune; the model ends with the weights of the best epoch by validation accuracy (of the last without val)."""
    dataset = create_dataset("vqa_train", cfg)
    if dataset.left_out:
        run.info(f"{dataset.left_out} training questions left out: they are in data.val (data.train_on_minival: false)")
    val = answerer.batches.get("val")
    if val is not None and val.dataset.references is None:
        raise UserError("data.val has no answers to choose the best epoch by; name data.official or data.val_scores")

    def validate(step: int) -> float | None:
        return None if val is None else answerer.evaluate(model, "val", step=step)["accuracy"]

    finetune(
        model,
        dataset,
        VQACollate(answerer.tokenizer, question_limits(cfg), cfg.text.max_answer_tokens),
        stage=VQA,
        score="accuracy",
        cfg=cfg,
        run=run,
        device=device,
        loss_fn=lambda wrapped, batch, progress: wrapped(batch),
        validate=validate,
        resume_from=resume_from,
    )


# ------------------------------------------------------------------------------------------------------------
# Answering
# ------------------------------------------------------------------------------------------------------------


class Answerer:
    """Answers and scores the splits of a configuration; `batches`: {split: EvalBatches}, made, and checked, at once."""

    def __init__(self, cfg, tokenizer, device, run):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        datasets = {split: create_dataset("vqa_eval", cfg, split) for split in ("val", "test") if cfg.data[split]}
        self.batches = {
            split: EvalBatches(dataset, tokenizer, question_limits(cfg), cfg.eval.batch_size)
            for split, dataset in datasets.items()
        }
        self.precision = utils.resolve_precision(cfg.train.precision, device)
        self.answers = None
        if cfg.answer.mode == "rank":
            self.answers = read_answer_list(cfg.data.answer_list)
            parts = encode_answers(tokenizer, self.answers, cfg.text.max_answer_tokens)
            self.answer_tensors = [part.to(device) for part in parts]
        for split, dataset in datasets.items():
            run.info(f"{split}: {len(dataset)} questions; answers from: {dataset.source}")

    def evaluate(self, model, split, step=0, write=False):
        """Answer a split in all processes; -> its metrics (percent; without references only the number of questions).

        write: whether to write the answers to vqa_result.json (test) or vqa_result_val.json.
        """
        dataset = self.batches[split].dataset
        answers = self.predict(model, self.batches[split], split)
        if write and utils.is_main():
            write_result(
                dataset.ids, answers, self.run.dir / ("vqa_result.json" if split == "test" else "vqa_result_val.json")
            )
        if dataset.references is None:
            return {"questions": len(answers)}
        numbers = metrics.vqa_metrics(
            answers, dataset.references, dataset.answer_types, dataset.question_types, self.cfg.eval.scoring
        )
        types = {f"accuracy/{key}": value for key, value in numbers["by_answer_type"].items()}
        self.run.log(step, {key: numbers[key] for key in ("accuracy", "constant")} | types, split)
        self.run.info(metrics.vqa_table(split, numbers))
        return numbers

    def predict(self, model, batches, label):
        """The answers of all questions, in the data set's order, in every process."""
        training = model.training
        model.eval()
        loader = DataLoader(
            Subset(batches, range(utils.rank(), len(batches), utils.world_size())),
            batch_size=None,
            num_workers=self.cfg.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        progress = utils.ProgressLine(
            f"answering {label}", "questions", -(-len(batches.dataset) // utils.world_size()), self.run.info
        )
        found = []
        for batch in loader:
            index = batch.pop("index").tolist()
            with utils.autocast(self.device, self.precision):
                found += zip(index, self.answer(model, utils.to_device(batch, self.device)), strict=True)
            progress.advance(len(index))
        progress.close()
        model.train(training)
        found = [pair for part in utils.gather_objects(found) for pair in part]
        places = sorted(place for place, _ in found)
        if places != list(range(len(batches.dataset))):
            raise utils.UserError(
                f"{label}: {len(found)} answers for {len(batches.dataset)} questions: some twice or none"
            )
        return [answer for _, answer in sorted(found)]

    def answer(self, model, batch):
        """Strings, one a question of the batch."""
        settings = self.cfg.answer
        if self.answers is not None:
            best, _ = model.rank(batch, *self.answer_tensors, k=settings.k_test)
            return [self.answers[place] for place in best.tolist()]
        options = {key: settings[key] for key in ("beams", "min_tokens", "max_tokens", "length_penalty")}
        return [self.tokenizer.decode_answer(ids) for ids in model.answer(batch, **options)]


def write_result(ids, answers, path):
    """Write [{"question_id", "answer"}] after checking that every question is answered exactly once, with a string."""
    entries = [{"question_id": key, "answer": answer} for key, answer in zip(ids, answers, strict=True)]
    if len({entry["question_id"] for entry in entries}) != len(ids) or not all(isinstance(a, str) for a in answers):
        raise utils.UserError(f"{path}: not written: a question has no answer or more than one")
    utils.write_json(path, entries)


if __name__ == "__main__":
    run_main(main)
