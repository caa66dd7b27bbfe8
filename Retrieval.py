"""Image-text retrieval (the paper, Table 1): fine-tune a pre-trained checkpoint, and rank the test pictures and texts.

    python Retrieval.py --config configs/demo/Retrieval.yaml --output_dir output/demo/retrieval \
        --checkpoint output/demo/pretrain/checkpoint_last.pth
    torchrun --nproc_per_node=8 Retrieval.py --config configs/Retrieval_coco.yaml --output_dir output/retrieval \
        --checkpoint output/pretrain/checkpoint_last.pth

Every epoch the validation split is ranked; checkpoint_best.pth is the epoch with the best mean recall there, and ranks
the splits of `eval.splits` at the end. `--evaluate` ranks them with the checkpoint as it is, also one of pre-training.

Two stages: contrastive ranking (`itc_*`), then the first k of every query re-ranked by the fusion encoder (`itm_*`).
Writes metrics.json (percent; `chance_*`: what a random order reaches; `test_folds`: the mean over equal parts of the
test split, MSCOCO's 1K) and retrieval_result.json (the first ranked items of every query) into --output_dir.
"""

import argparse
import time

import torch
from torch.utils.data import DataLoader

import metrics
import utils
from dataset import create_dataset, create_train_loader
from dataset.pretrain import PretrainCollate
from dataset.text import checkpoint_tokenizer
from models import ranking
from models.alignment import MatchingWatch, check_itm
from models.retrieval import RetrievalModel
from models.semmim import start_stage
from optim import create_optimization

SCHEMA = "configs/Retrieval_coco.yaml"
OPTIONAL = ("data.image_root",)
CHOICES = {
    "data.per": ("caption", "image"),
    "itc.negatives": ("queue", "batch"),
    "rerank.score": ranking.SCORES,
}
POSITIVE = (
    *("rerank.k", "rerank.batch_size", "eval.batch_size", "eval.text_batch_size", "text.max_tokens"),
    *("train.batch_size", "train.accumulation", "train.epochs"),
)
# By a resumed run, beside utils.MAY_CHANGE.
MAY_CHANGE = (
    *("data.test", "checkpointing", "rerank.batch_size"),
    *(f"eval.{key}" for key in ("splits", "batch_size", "text_batch_size", "folds", "save_top")),
)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_arguments(parser, config=SCHEMA, output_dir="output/retrieval")
    args = parser.parse_args(argv)
    device = utils.init_distributed(args.device)
    cfg = utils.load_config(args.config, args.override, schema=SCHEMA, optional=OPTIONAL)
    check_config(cfg)
    backbone, description, run, resume_from = start_stage(args, cfg, MAY_CHANGE, decoder=False)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
    backbone.to(device)
    ranker = Ranker(cfg, tokenizer, device, run)
    if not args.evaluate:
        train(RetrievalModel(backbone, cfg).to(device), ranker, cfg, device, run, resume_from)
    ranker.evaluate_all(backbone)
    run.close()


def check_config(cfg) -> None:
    """Raise UserError for a setting that makes no sense, naming its key."""
    utils.check_choices(cfg, CHOICES)
    utils.check_positive(cfg, POSITIVE)
    check_itm(cfg.itm)
    splits = cfg.eval.splits
    if not splits or not set(splits) <= {"val", "test"}:
        raise utils.UserError(f"eval.splits: {splits} must name val, test or both")
    if not isinstance(cfg.eval.folds, int) or cfg.eval.folds < 0:
        raise utils.UserError(f"eval.folds: {cfg.eval.folds} must be a whole number, 0 for none")
    if cfg.train.batch_size < 2:
        raise utils.UserError(
            "train.batch_size: 1 image on a rank leaves image-text matching no negative; use 2 or more"
        )


def train(model: RetrievalModel, ranker: "Ranker", cfg, device, run, resume_from: dict | None) -> None:
    """Fine-tune; the model ends with the weights of the epoch with the best validation recall (mean of six columns).

    Each epoch counts with the better of its two orders, whose name checkpoint_best.pth holds as best.order.
    """
    dataset = create_dataset("retrieval_train", cfg)
    val = ranker.dataset("val")
    loader = create_train_loader(dataset, cfg, PretrainCollate(ranker.tokenizer, cfg.text.max_tokens), device)
    optimizer, schedule = create_optimization(model, cfg, len(loader), run)
    notes = {"description": model.backbone.description, "stage": "retrieval", "config": cfg.to_dict()}
    best = utils.BestCheckpoint(run, "r_mean", notes, resume_from)
    utils.seed_everything(cfg.seed)  # from here on every process draws its own noise

    def loss_fn(wrapped, batch: dict, progress: utils.Progress):
        # The soft targets of ITC come in over the first epoch (ALBEF).
        ramp = min(1.0, progress.step / max(1, progress.steps_per_epoch))
        return wrapped(batch, cfg.itc.alpha * ramp, done=progress.step / progress.total_steps)

    watch = MatchingWatch(cfg.train)

    def log_fn(progress: utils.Progress, means: dict) -> None:
        if line := watch.line(progress, means):
            run.info(line)

    def on_epoch_end(wrapped, progress: utils.Progress) -> None:
        numbers, _ = ranker.evaluate(model.backbone, val, "val", progress.step)
        order, value = better_order(numbers, cfg.rerank.score)
        best.offer(model, value, progress, order=order)

    utils.fit(
        utils.wrap_ddp(model, device),
        loader,
        optimizer,
        schedule,
        train_cfg=cfg.train,
        run=run,
        device=device,
        loss_fn=loss_fn,
        after_step=lambda progress: model.after_step(),
        on_epoch_end=on_epoch_end,
        extra_state=best.state,
        resume_from=resume_from,
        log_fn=log_fn,
    )
    best.restore(model)


class Ranker:
    """Ranks the splits of a configuration; `datasets`, those of `eval.splits`, are read, and checked, at once."""

    def __init__(self, cfg, tokenizer, device: torch.device, run: utils.Run):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        self.precision = utils.resolve_precision(cfg.train.precision, device)
        self.datasets = {split: create_dataset("retrieval_eval", cfg, split) for split in cfg.eval.splits}
        for split, dataset in self.datasets.items():
            run.info(f"{split}: {len(dataset.images)} images, {len(dataset.captions)} captions")

    def dataset(self, split: str):
        return self.datasets.get(split) or create_dataset("retrieval_eval", self.cfg, split)

    def evaluate_all(self, backbone) -> None:
        """Rank all splits; write metrics.json and retrieval_result.json."""
        numbers, results = {}, {}
        for split, dataset in self.datasets.items():
            folds = self.cfg.eval.folds if split == "test" else 0
            numbers[split], found = self.evaluate(backbone, dataset, split, folds=folds)
            if folds:
                numbers["test_folds"] = found["folds"]
            results[split] = result_entries(dataset, found["rankings"], self.cfg.eval.save_top)
        self.run.write_metrics(numbers)
        if utils.is_main():
            utils.write_json(self.run.dir / "retrieval_result.json", results)

    def evaluate(self, backbone, dataset, split: str, step: int = 0, folds: int = 0) -> tuple[dict, dict]:
        """Rank one split in all processes.

        Returns ({"itc_tr_r1": ..., "itm_...", "chance_...", "images", "texts", "seconds"}, {"rankings": see
        ranking.two_stage, "folds": the mean of the columns over `folds` equal parts}).
        """
        cfg, start, training = self.cfg, time.perf_counter(), backbone.training
        input_ids, attention_mask = self.tokenizer.encode(dataset.captions, cfg.text.max_tokens)
        loader = DataLoader(
            dataset,
            batch_sampler=utils.eval_batches(len(dataset.images), cfg.eval.batch_size),
            num_workers=cfg.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        images, texts = ranking.extract_features(
            backbone,
            loader,
            len(dataset.images),
            input_ids,
            attention_mask,
            cfg.eval.text_batch_size,
            device=self.device,
            precision=self.precision,
            log=self.run.info,
        )
        image_of_text = torch.tensor(dataset.image_of_caption)
        ranks, rankings = self.rank(backbone, images, texts, image_of_text)
        columns = stage_columns(ranks, image_of_text)
        numbers = {**columns, "images": len(images.feats), "texts": len(texts.feats)}
        found = {"rankings": rankings}
        if folds:
            found["folds"] = self.evaluate_folds(backbone, images, texts, image_of_text, folds)
        numbers["seconds"] = round(time.perf_counter() - start, 1)
        backbone.train(training)
        self.run.log(step, numbers, split)
        self.run.info(metrics.retrieval_table(split, numbers))
        if split == "val" and (warning := not_worth_it(numbers, cfg.rerank.score)):
            self.run.info(warning)
        if folds:
            self.run.info(metrics.retrieval_table(f"{folds} folds", found["folds"]))
        return numbers, found

    def rank(self, backbone, images, texts, image_of_text):
        """`ranking.two_stage` with the configuration's settings."""
        rerank = self.cfg.rerank
        return ranking.two_stage(
            backbone,
            images,
            texts,
            image_of_text,
            k=rerank.k,
            score=rerank.score,
            batch_size=rerank.batch_size,
            precision=self.precision,
            log=self.run.info,
        )

    def evaluate_folds(self, backbone, images, texts, image_of_text, folds: int) -> dict[str, float]:
        """The columns' mean over equal runs of consecutive images, each with its texts (MSCOCO 1K: five of 1,000)."""
        size, rest = divmod(len(images.feats), folds)
        if rest or not size:
            raise utils.UserError(f"eval.folds: {len(images.feats)} images cannot be cut into {folds} equal parts")
        every = []
        for number in range(folds):
            self.run.info(f"fold {number + 1} of {folds}")
            part = ranking.fold(images, texts, image_of_text, number * size, (number + 1) * size)
            ranks, _ = self.rank(backbone, *part)
            every.append(stage_columns(ranks, part[2]))
        return {key: sum(columns[key] for columns in every) / folds for key in every[0]}


def better_order(numbers: dict, score: str) -> tuple[str, float]:
    """(`itc` or the name of the re-ranking score, its mean recall): which of the two is better; re-ranked if equal."""
    by = {score: numbers["itm_r_mean"], "itc": numbers["itc_r_mean"]}
    order = max(by, key=by.get)
    return order, by[order]


def not_worth_it(numbers: dict, score: str) -> str | None:
    """A line of warning where re-ranking lowers the mean recall, with the remedy."""
    order, value = better_order(numbers, score)
    if order != "itc":
        return None
    other = "" if score == "itm+itc/t" else ", or try rerank.score=itm+itc/t"
    return (
        f"warning: re-ranking by {score} is not worth its cost here, it lowers the mean recall on val from "
        f"{value:.2f} to {numbers['itm_r_mean']:.2f}: take the order by ITC (itc_*){other}"
    )


def stage_columns(ranks: dict, image_of_text: torch.Tensor) -> dict[str, float]:
    """{"itc_tr_r1": percent, ...} of both stages, and of a random order (`chance_`)."""
    columns = {stage: metrics.retrieval_metrics(found["tr"], found["ir"]) for stage, found in ranks.items()}
    columns["chance"] = metrics.chance_metrics(image_of_text.bincount(minlength=len(ranks["itc"]["tr"])))
    return {f"{stage}_{key}": value for stage, row in columns.items() for key, value in row.items()}


def result_entries(dataset, rankings: dict, top: int) -> dict[str, list[dict]]:
    """The first `top` items of every query, as lists of {query, ranked, scores}; pictures by their paths."""
    images, captions = [str(path) for path in dataset.images], dataset.captions
    entries = {}
    for key, name, queries, items in (
        ("tr", "text_retrieval", images, captions),
        ("ir", "image_retrieval", captions, images),
    ):
        ids, scores = (part[:, :top].tolist() for part in rankings[key])
        entries[name] = [
            {
                "query": query,
                "ranked": [items[i] for i in row],
                "scores": [round(value, 4) for value in values],
            }
            for query, row, values in zip(queries, ids, scores, strict=True)
        ]
    return entries


if __name__ == "__main__":
    utils.run_main(main)
