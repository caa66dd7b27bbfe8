"""Captioning (the paper, Table 2): fine-tune by cross-entropy, then by CIDEr, and caption the test pictures.

    python Caption.py --config configs/demo/Caption.yaml --output_dir output/demo/caption \
        --checkpoint output/demo/pretrain/checkpoint_last.pth
    python Caption.py --config configs/demo/Caption_scst.yaml --output_dir output/demo/caption_scst \
        --checkpoint output/demo/caption/checkpoint_best.pth
    torchrun --nproc_per_node=8 Caption.py --config configs/Caption_coco.yaml --output_dir output/caption \
        --checkpoint output/pretrain/checkpoint_last.pth
    torchrun --nproc_per_node=8 Caption.py --config configs/Caption_nocaps.yaml --output_dir output/nocaps \
        --checkpoint output/caption/checkpoint_best.pth --evaluate

Every epoch the validation pictures are captioned; checkpoint_best.pth is the epoch with the best CIDEr there, and
captions the splits of `eval.splits` at the end. `--evaluate` captions them with the checkpoint as it is, also one of
pre-training. Writes caption_result.json ([{"image_id", "caption"}] of the last split, each picture once),
caption_result_SPLIT.json of the others, and metrics.json (percent; a column that needs a missing Java or SPICE's
parser says so).
"""

import argparse
import time

import torch
from torch.utils.data import DataLoader

import metrics
import utils
from dataset import create_dataset
from dataset.caption import CaptionCollate
from dataset.cider import CiderD, caption_words, cider
from dataset.text import checkpoint_tokenizer
from engine.config import CAPTION, Config, add_arguments, load_config
from engine.finetune import finetune, start_stage
from engine.run import Run
from models.caption import CaptionModel, CrossEntropy, SelfCritical
from utils import UserError, init_distributed, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, config=CAPTION.schema, output_dir="output/caption")
    args = parser.parse_args(argv)
    device = init_distributed(args.device)
    cfg = load_config(args.config, args.override, CAPTION)
    backbone, description, run, resume_from = start_stage(args, cfg, CAPTION, decoder=True)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, description)
    model = CaptionModel(backbone, tokenizer).to(device)
    captioner = Captioner(cfg, tokenizer, device, run)
    if args.evaluate:
        run.open(evaluate=True)
    else:
        train(model, captioner, cfg, device, run, resume_from)
    run.write_metrics({split: captioner.evaluate(model, split) for split in cfg.eval.splits})
    run.close()


def train(
    model: CaptionModel, captioner: "Captioner", cfg: Config, device: torch.device, run: Run, resume_from: dict | None
) -> None:
    """Fine-tune; the model ends with the weights of the epoch with the best validation CIDEr."""
    dataset = create_dataset("caption_train", cfg)
    if not any(captioner.datasets["val"].references):
        raise UserError("data.val has no captions to choose the best epoch by")
    objective = create_objective(cfg, dataset, captioner.tokenizer, run)
    reward_clock = RewardClock(objective)

    def validate(step: int) -> float:
        found = captioner.validate(model)
        run.log(step, {"cider": found}, "val")
        run.info(f"val at step {step}: CIDEr {found:.2f}")
        reward_clock.restart()
        return found

    finetune(
        model,
        dataset,
        CaptionCollate(captioner.tokenizer, cfg.text.max_tokens, cfg.text.max_prompt_tokens),
        stage=CAPTION,
        score="cider",
        cfg=cfg,
        run=run,
        device=device,
        loss_fn=lambda wrapped, batch, progress: wrapped(batch, objective),
        validate=validate,
        validate_first=cfg.train.objective == "scst",  # its gain is measured against what it starts from
        log_fn=lambda progress, means: reward_clock.share(),
        resume_from=resume_from,
    )


def create_objective(cfg, dataset, tokenizer, run):
    """What `train.objective` names; for scst the reward's document frequencies are counted, or read, here."""
    if cfg.train.objective == "cross_entropy":
        return CrossEntropy(cfg.train.label_smoothing)
    start = time.perf_counter()
    reward = CiderReward(tokenizer, load_document_frequencies(cfg, dataset, run))
    count, images = len(reward.cider.keys), reward.cider.images
    run.info(f"CIDEr-D: {count} n-grams of {images} training pictures in {time.perf_counter() - start:.1f} s")
    return SelfCritical(
        reward,
        **{key: cfg.scst[key] for key in ("mode", "samples", "baseline", "cross_entropy")},
        min_tokens=cfg.generation.min_tokens,
        max_tokens=cfg.generation.max_tokens,
    )


def load_document_frequencies(cfg, dataset, run) -> CiderD:
    """Of all training references, kept beside the first annotation file; in the run's folder if that is read-only."""
    first = utils.find_file(cfg.data.train[0], "data.train")
    path = first.with_name(f"{first.stem}_cider.npz")
    references = [dataset.references(image) for image in range(len(dataset.paths))]
    if utils.is_main():
        try:
            CiderD.cached(path, references)
        except utils.UserError:
            path = run.dir / path.name
            CiderD.cached(path, references)
    path = utils.gather_objects(path)[0]
    return CiderD.cached(path, references)


class CiderReward:
    """CIDEr-D of generated sentences, for `SelfCritical`."""

    def __init__(self, tokenizer, cider: CiderD):
        self.tokenizer, self.cider = tokenizer, cider

    def __call__(self, sequences: torch.Tensor, references: list[list[str]]) -> torch.Tensor:
        """[R, T] token ids, the captions of B images -> [R]"""
        words = [caption_words(self.tokenizer.decode_caption(row)) for row in sequences.tolist()]
        each = len(words) // len(references)
        candidates = [words[i * each : (i + 1) * each] for i in range(len(references))]
        return torch.from_numpy(
            self.cider.scores(candidates, [[caption_words(text) for text in texts] for texts in references])
        )


class RewardClock:
    """The share of training time since the last log that went into the reward."""

    def __init__(self, objective):
        self.objective = objective
        self.restart()

    def restart(self) -> None:
        self.spent, self.start = getattr(self.objective, "reward_seconds", 0.0), time.perf_counter()

    def share(self) -> dict[str, float]:
        """{} where there is no reward"""
        if not isinstance(self.objective, SelfCritical):
            return {}
        share = (self.objective.reward_seconds - self.spent) / (time.perf_counter() - self.start)
        self.restart()
        return {"reward_time": share}


# ------------------------------------------------------------------------------------------------------- captioning


class Captioner:
    """Captions the splits of a configuration and judges them; `datasets` are read, and checked, at once."""

    def __init__(self, cfg, tokenizer, device, run):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        splits = dict.fromkeys([*cfg.eval.splits, "val"] if cfg.data.val else cfg.eval.splits)
        self.datasets = {split: create_dataset("caption_eval", cfg, split) for split in splits}
        self.precision = utils.resolve_precision(cfg.train.precision, device)

    def caption(self, model: CaptionModel, split: str) -> list[str]:
        """The captions of a split's pictures, in the data set's order, in every process."""
        dataset, training = self.datasets[split], model.training
        model.eval()
        loader = DataLoader(
            dataset,
            batch_sampler=utils.eval_batches(len(dataset), self.cfg.eval.batch_size),
            num_workers=self.cfg.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        progress = utils.ProgressLine(
            f"captioning {split}", "pictures", -(-len(dataset) // utils.world_size()), self.run.info
        )
        found = []
        for images, indices in loader:
            prompts = [dataset.prompts[i] for i in indices.tolist()]
            ids, mask = (x.to(self.device) for x in self.tokenizer.encode(prompts, self.cfg.text.max_prompt_tokens))
            with utils.autocast(self.device, self.precision):
                sequences, _ = model.generate(images.to(self.device), ids, mask, **self.cfg.generation)
            texts = [self.tokenizer.decode_caption(row) for row in sequences.tolist()]
            found += zip(indices.tolist(), texts, strict=True)
            progress.advance(len(texts))
        progress.close()
        model.train(training)
        captions = dict(pair for part in utils.gather_objects(found) for pair in part)
        return [captions[index] for index in range(len(dataset))]

    def validate(self, model: CaptionModel) -> float:
        """CIDEr (times 100) on the validation split with the Python tokeniser, the same in every process."""
        dataset = self.datasets["val"]
        return cider(*judged(dataset, self.caption(model, "val")))

    def evaluate(self, model: CaptionModel, split: str) -> dict:
        """Caption a split, write the result file and -> its metrics (in the main process), NoCaps' by domain too."""
        dataset, start = self.datasets[split], time.perf_counter()
        captions = self.caption(model, split)
        seconds = time.perf_counter() - start
        if not utils.is_main():
            return {}
        last = split == self.cfg.eval.splits[-1]
        write_result(
            dataset.ids, captions, self.run.dir / ("caption_result.json" if last else f"caption_result_{split}.json")
        )
        numbers = {"images": len(captions), "captions_per_second": round(len(captions) / seconds, 2)}
        numbers["words"] = sum(len(caption.split()) for caption in captions) / len(captions)
        if any(dataset.references):
            self.run.info(f"{split}: judging {len(captions)} captions")
            numbers |= metrics.caption_metrics(*judged(dataset, captions), spice=self.cfg.eval.spice)
            domains = [domain for domain in metrics.DOMAINS if domain in dataset.domains]
            for domain in domains:
                subset = judged(dataset, captions, domain)
                numbers[domain] = {"images": len(subset[1])}
                numbers[domain] |= metrics.caption_metrics(*subset, spice=self.cfg.eval.spice)
            self.run.log(0, {key: x for key, x in numbers.items() if isinstance(x, int | float)}, split)
            for line in metrics.caption_table(split, numbers, domains):
                self.run.info(line)
        for index in range(min(3, len(captions))):
            self.run.info(f"{split} {dataset.images[index]}: {captions[index]}")
        return numbers


def judged(dataset, captions: list[str], domain: str | None = None) -> tuple[dict, dict]:
    """(references, results) by image id, of the pictures that have references and, if given, are of `domain`."""
    chosen = [i for i, texts in enumerate(dataset.references) if texts and domain in (None, dataset.domains[i])]
    return (
        {dataset.ids[i]: dataset.references[i] for i in chosen},
        {dataset.ids[i]: captions[i] for i in chosen},
    )


def write_result(ids: list, captions: list[str], path) -> None:
    """COCO's submission format, which is NoCaps' too: [{"image_id", "caption"}], each picture once."""
    utils.write_json(path, [{"image_id": key, "caption": caption} for key, caption in zip(ids, captions, strict=True)])


if __name__ == "__main__":
    run_main(main)
