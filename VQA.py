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

from torch.utils.data import DataLoader, Subset

import metrics
import utils
from dataset import create_dataset, create_train_loader
from dataset.annotations import read_answer_list
from dataset.text import checkpoint_tokenizer
from dataset.vqa import EvalBatches, VQACollate, encode_answers
from models.generation import check_options
from models.semmim import start_stage
from models.vqa import VQAModel
from optim import create_optimization

SCHEMA = "configs/VQA.yaml"
OPTIONAL = ("data.image_root",)
CHOICES = {"answer.mode": ("generate", "rank"), "eval.scoring": metrics.SCORING}
POSITIVE = (
    *("text.max_question_tokens", "text.max_ocr_words", "text.max_ocr_tokens", "text.max_label_tokens"),
    *("text.max_answer_tokens", "answer.beams", "answer.max_tokens", "answer.k_test", "eval.batch_size"),
)
MAY_CHANGE = (  # by a resumed run, beside utils.MAY_CHANGE
    *(f"data.{key}" for key in ("test", "official", "answer_list")),
    *(f"answer.{key}" for key in ("mode", "beams", "min_tokens", "max_tokens", "length_penalty", "k_test")),
    *("checkpointing", "eval.batch_size"),
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_arguments(parser, config=SCHEMA, output_dir="output/vqa")
    args = parser.parse_args(argv)
    device = utils.init_distributed(args.device)
    cfg = utils.load_config(args.config, args.override, schema=SCHEMA, optional=OPTIONAL)
    check_config(cfg)
    backbone, description, run, resume_from = start_stage(args, cfg, MAY_CHANGE, decoder=True)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
    model = VQAModel(backbone, tokenizer).to(device)
    answerer = Answerer(cfg, tokenizer, device, run)
    if not args.evaluate:
        train(model, answerer, cfg, device, run, resume_from)
    numbers = {split: answerer.evaluate(model, split, write=True) for split in answerer.batches}
    run.write_metrics(numbers)
    run.close()


def check_config(cfg):
    """Raise UserError for a setting that makes no sense, naming its key."""
    utils.check_choices(cfg, CHOICES)
    utils.check_positive(cfg, POSITIVE)
    check_options("beam", cfg.answer.beams, cfg.answer.min_tokens, cfg.answer.max_tokens)


def question_limits(cfg):
    """Word pieces of question, OCR and labels."""
    return cfg.text.max_question_tokens, cfg.text.max_ocr_tokens, cfg.text.max_label_tokens


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def train(model, answerer, cfg, device, run, resume_from):
    """Fine-tune; the model ends with the weights of the best epoch by validation accuracy (of the last without val)."""
    dataset = create_dataset("vqa_train", cfg)
    if dataset.left_out:
        run.info(f"{dataset.left_out} training questions left out: they are in data.val (data.train_on_minival: false)")
    if "val" in answerer.batches and answerer.batches["val"].dataset.references is None:
        raise utils.UserError(
            "data.val has no answers to choose the best epoch by; name data.official or data.val_scores"
        )
    loader = create_train_loader(
        dataset, cfg, VQACollate(answerer.tokenizer, question_limits(cfg), cfg.text.max_answer_tokens), device
    )
    optimizer, schedule = create_optimization(model, cfg, len(loader), run)
    notes = {"description": model.backbone.description, "stage": "vqa", "config": cfg.to_dict()}
    best = utils.BestCheckpoint(run, "accuracy", notes, resume_from)
    utils.seed_everything(cfg.seed)  # from here on every process draws its own noise

    def on_epoch_end(wrapped, progress):
        if "val" in answerer.batches:
            best.offer(model, answerer.evaluate(model, "val", step=progress.step)["accuracy"], progress)

    utils.fit(
        utils.wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=lambda wrapped, batch, progress: wrapped(batch),
        on_epoch_end=on_epoch_end,
        extra_state=best.state,
        resume_from=resume_from,
    )
    best.restore(model)


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
    utils.run_main(main)
