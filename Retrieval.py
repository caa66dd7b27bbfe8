"""Image-text retrieval (the paper, Table 1): evaluates a checkpoint on the validation and the test split.

    python Retrieval.py --config configs/demo/Retrieval.yaml --output_dir output/demo/retrieval \
        --checkpoint output/demo/pretrain/checkpoint_last.pth --evaluate
    torchrun --nproc_per_node=8 Retrieval.py --checkpoint ... --output_dir ... --evaluate    # MSCOCO

Two stages: contrastive ranking (`itc_*`), then the first k of every query re-ranked by the fusion encoder
(`itm_*`). Writes metrics.json (percent; `chance_*`: what a random order reaches) and retrieval_result.json
(the first ranked items of every query) into --output_dir.
"""

import argparse
import json
import os
import time

from torch.utils.data import DataLoader

import metrics
import utils
from dataset import create_dataset
from dataset.text import checkpoint_tokenizer
from models import ranking
from models.semmim import load_backbone

SCHEMA = "configs/Retrieval_coco.yaml"
SPLITS = ("val", "test")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_arguments(parser, config=SCHEMA, output_dir="output/retrieval")
    args = parser.parse_args(argv)
    cfg = utils.load_config(args.config, args.override, schema=SCHEMA, optional=("data.image_root",))
    check_config(cfg)
    cfg.seed = cfg.seed if args.seed is None else args.seed
    if args.checkpoint is None:
        raise utils.UserError("--checkpoint is missing: name a pre-trained checkpoint, e.g. one that Pretrain.py wrote")
    device = utils.init_distributed(args.device)
    utils.seed_everything(cfg.seed)
    run = utils.Run(args.output_dir, cfg, append=True)

    backbone, rest, lines = load_backbone(args.checkpoint, image_size=cfg.image_size)
    for line in lines:
        run.info(line)
    backbone.to(device)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, rest["description"])
    if not args.evaluate:
        run.info("the checkpoint is evaluated as it is (as with --evaluate)")
    evaluate_splits(backbone, tokenizer, cfg, device, run)
    run.close()


def check_config(cfg):
    """Raise UserError for a number that makes no sense, naming its key."""
    for key in (
        "rerank.k",
        "rerank.batch_size",
        "eval.batch_size",
        "eval.text_batch_size",
        "text.max_tokens",
    ):
        section, name = key.split(".")
        if not isinstance(cfg[section][name], int) or cfg[section][name] < 1:
            raise utils.UserError(f"{key}: {cfg[section][name]} must be a whole number of at least 1")


def evaluate_splits(backbone, tokenizer, cfg, device, run):
    """Evaluate on val and test; write metrics.json, whose content is returned, and retrieval_result.json."""
    datasets = {split: create_dataset("retrieval_eval", cfg, split) for split in SPLITS}  # errors before any work
    precision = utils.resolve_precision(cfg.precision, device)
    numbers, results = {}, {}
    for split, dataset in datasets.items():
        run.info(f"{split}: {len(dataset.images)} images, {len(dataset.captions)} captions")
        numbers[split], rankings = evaluate_split(backbone, tokenizer, dataset, cfg, device, precision, run.info)
        results[split] = result_entries(dataset, rankings, cfg.eval.save_top)
        run.log(0, numbers[split], split)
        run.info(metrics.retrieval_table(split, numbers[split]))
    run.write_metrics(numbers)
    if utils.is_main():
        write_json(results, run.dir / "retrieval_result.json")
    return numbers


def evaluate_split(backbone, tokenizer, dataset, cfg, device, precision, log):
    """One split: ({"itc_tr_r1": ..., "itm_...", "chance_...", "images", "texts", "seconds"}, rankings)."""
    start = time.perf_counter()
    input_ids, attention_mask = tokenizer.encode(dataset.captions, cfg.text.max_tokens)
    loader = DataLoader(
        dataset,
        batch_sampler=utils.eval_batches(len(dataset.images), cfg.eval.batch_size),
        num_workers=cfg.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    ranks, rankings = ranking.evaluate(
        backbone,
        loader,
        input_ids,
        attention_mask,
        dataset.image_of_caption,
        len(dataset.images),
        device=device,
        precision=precision,
        k=cfg.rerank.k,
        score=cfg.rerank.score,
        text_batch_size=cfg.eval.text_batch_size,
        pair_batch_size=cfg.rerank.batch_size,
        log=log,
    )
    columns = {stage: metrics.retrieval_metrics(found["tr"], found["ir"]) for stage, found in ranks.items()}
    columns["chance"] = metrics.chance_metrics([len(captions) for captions in dataset.captions_of_image])
    numbers = {f"{stage}_{key}": value for stage, row in columns.items() for key, value in row.items()}
    numbers |= {"images": len(dataset.images), "texts": len(dataset.captions)}
    numbers["seconds"] = round(time.perf_counter() - start, 1)
    return numbers, rankings


def result_entries(dataset, rankings, top):
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


def write_json(value, path):
    """Write atomically: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    utils.run_main(main)
