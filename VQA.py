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

import utils
from dataset import create_dataset, create_train_loader
from dataset.text import checkpoint_tokenizer
from dataset.vqa import VQACollate, question_limits
from evaluation.vqa import SCORING, Answerer
from models.generation import check_options
from models.semmim import start_stage
from models.vqa import VQAModel
from optim import create_optimization

SCHEMA = "configs/VQA.yaml"
OPTIONAL = ("data.image_root",)
CHOICES = {"answer.mode": ("generate", "rank"), "eval.scoring": SCORING}
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


if __name__ == "__main__":
    utils.run_main(main)
