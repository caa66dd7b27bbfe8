"""Check a configuration's data before hours of training: images, texts, and images that train and test share.

    python -m tools.check_data --config configs/Retrieval_coco.yaml
    python -m tools.check_data --config configs/Pretrain.yaml --against configs/Retrieval_coco.yaml --workers 16

Reads the annotations exactly as training does, opens every image in parallel, and reports for every split: missing and
unreadable images, empty texts, the shares that `max_words` and `max_tokens` cut, words that the vocabulary lacks, and
images of validation and test that are in training too (by path, by the bytes of the file, by what the image shows).
`--against` takes the validation and test images of further configurations into that comparison.
Ends with exit code 1 if training or its evaluation would stop, and names why; 0 otherwise.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from dataset import create_dataset
from dataset.caption import target_text
from dataset.loader import MIN_BAD
from dataset.text import Tokenizer, clean_caption
from dataset.transforms import ImageError
from engine import config
from tools.prepare.common import progress
from tools.prepare.image_hash import COPY, LOOK_ALIKE, NO_FILE, KnownImages, fingerprints
from utils import Config, UserError, one_line, run_main

KINDS = {  # stage: the kind of data set of each split
    "pretrain": {"train": "pretrain", "val": "pretrain_eval"},
    "retrieval": {"train": "retrieval_train", "val": "retrieval_eval", "test": "retrieval_eval"},
    "caption": {"train": "caption_train", "val": "caption_eval", "test": "caption_eval"},
    "vqa": {"train": "vqa_train", "val": "vqa_eval", "test": "vqa_eval"},
}
SHOWN = 3  # examples of each finding
SAME_PATH = "the same path"
BLOCK = 10_000  # texts tokenized at a time


class Findings:
    """The report: lines as they are printed; `stops`: what would end a run; numbers: {split: {what: {count, of,
    first}}}, first: examples."""

    def __init__(self):
        self.stops: list[str] = []
        self.numbers: dict[str, dict] = {}

    def line(self, split: str, what: str, number: int, total: int, first: Iterable[str] = ()) -> None:
        examples = [one_line(text, 1000) for text in islice(first, SHOWN)]
        self.numbers.setdefault(split, {})[what] = {"count": number, "of": total, "first": examples}
        share = f" ({100 * number / total:.2f}% of {total:,})" if total else ""
        shown = f"; first: {', '.join(examples)}" if examples else ""
        print(f"{split:6} {what}: {number:,}{share}{shown}", flush=True)

    def stop(self, split: str, reason: str) -> None:
        self.stops.append(one_line(f"{split}: {reason}", 1000))
        print(f"WOULD STOP: {self.stops[-1]}", flush=True)


def main(argv: list[str] | None = None) -> None:
    findings = check(parse_arguments(argv))
    if findings.stops:
        print(f"{len(findings.stops)} findings would stop a run:\n  " + "\n  ".join(findings.stops))
        sys.exit(1)
    print("nothing would stop a run")


def check(args: argparse.Namespace) -> Findings:
    """Read and report everything that the arguments name."""
    stage, cfg = stage_config(args.config, args.override, args.stage)
    print(f"{args.config}: {stage}")
    findings = Findings()
    datasets = read_datasets(stage, cfg, findings)
    tokenizer = Tokenizer(cfg.text.vocab)
    for split, dataset in datasets.items():
        for texts in text_kinds(stage, cfg, split, dataset):
            check_texts(split, texts, tokenizer, findings)
    check_images(datasets, others(args.against), cfg, args.workers, findings)
    return findings


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.check_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="configuration of any stage")
    add("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE", help="as in training")
    add("--stage", choices=list(KINDS), help="default: the stage whose keys the configuration has")
    add("--against", nargs="*", default=[], metavar="CONFIG", help="further configurations whose val and test to spare")
    add("--workers", type=int, default=os.cpu_count(), help="processes that open images (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    return args


def stage_config(path: str, overrides: list[str], stage: str | None = None) -> tuple[str, Config]:
    """The stage and the resolved configuration; a configuration fits the stage whose schema knows all its keys."""
    fits, errors = {}, {}
    for name in [stage] if stage else KINDS:
        try:
            fits[name] = config.load_config(path, overrides, config.STAGES[name])
        except UserError as error:
            errors[name] = str(error)
    if len(fits) == 1:
        return next(iter(fits.items()))
    if not fits and len(set(errors.values())) == 1:
        raise UserError(next(iter(errors.values())))
    problem = f"its keys fit {' and '.join(fits)}" if fits else "it has keys that no stage knows"
    raise UserError(f"{path}: {problem}; name the stage with --stage ({', '.join(KINDS)})")


# ------------------------------------------------------------------------------------------------ annotations


def read_datasets(stage: str, cfg: Config, findings: Findings) -> dict:
    """{split: data set}, made as training makes them; what it would refuse is a finding."""
    if "cache_images" in cfg.data:
        cfg.data.cache_images = False
    datasets = {}
    for split, kind in KINDS[stage].items():
        if not cfg.data[split]:
            continue
        try:
            datasets[split] = create_dataset(kind, cfg, None if split == "train" else split)
        except UserError as error:
            findings.stop(split, str(error))
            continue
        findings.line(split, "samples of an epoch" if split == "train" else "items", len(datasets[split]), 0)
        findings.line(split, "images", len(set(image_paths(datasets[split]))), 0)
    return datasets


def others(configs: list[str]) -> dict:
    """{"<config> <split>": data set} of the validation and test sets of further configurations."""
    datasets = {}
    for path in configs:
        stage, cfg = stage_config(path, [])
        for split, kind in KINDS[stage].items():
            if split != "train" and cfg.data[split]:
                datasets[f"{Path(path).stem} {split}"] = create_dataset(kind, cfg, split)
    return datasets


def image_paths(dataset) -> Iterator[str]:
    return items(dataset.paths if hasattr(dataset, "paths") else dataset.images)


def items(sequence) -> Iterator:
    return (sequence[i] for i in range(len(sequence)))


def entries_of_image(dataset) -> dict[str, int]:
    """{path: entries with it} of a training set."""
    paths = list(image_paths(dataset))
    names = ("image_of_caption", "image_id")  # the number of each entry's image
    numbers = next((getattr(dataset, name) for name in names if hasattr(dataset, name)), range(len(paths)))
    counts = dict.fromkeys(paths, 0)
    for number in numbers:
        counts[paths[int(number)]] += 1
    return counts


# ------------------------------------------------------------------------------------------------ texts


class Texts(NamedTuple):
    """Texts of one kind: as they stand, how they are cleaned, and what is cut."""

    what: str
    raw: Iterable[str]
    clean: Callable[[str], str]
    max_words: int | None
    max_pieces: int
    optional: bool = False  # may be missing altogether


def text_kinds(stage: str, cfg: Config, split: str, dataset) -> list[Texts]:
    """What a split's texts are and how long they may be, in word pieces besides the special tokens."""
    text, train = cfg.text, split == "train"
    if stage == "vqa":
        questions, ocr, labels = dataset.parts if train else zip(*dataset.parts, strict=True)
        kinds = [
            Texts("questions", items(questions), str, None, text.max_question_tokens),
            Texts("OCR tokens", items(ocr), str, None, text.max_ocr_tokens, optional=True),
            Texts("object labels", items(labels), str, None, text.max_label_tokens, optional=True),
        ]
        answers = [Texts("answers", items(dataset.answers), str, None, text.max_answer_tokens - 1)] if train else []
        return kinds + answers
    if stage == "caption":
        if train:
            return [Texts("captions", items(dataset.captions), target_text, None, text.max_tokens - 1)]
        references = chain.from_iterable(dataset.references)
        return [Texts("references", references, target_text, None, text.max_tokens - 1, optional=True)]
    room = text.max_tokens - 1 - bool(text.get("sep"))
    return [Texts("captions", items(dataset.captions), _clean_whole, cfg.data.max_words, room, optional=not train)]


def _clean_whole(text: str) -> str:
    return clean_caption(text, sys.maxsize)


def check_texts(split: str, texts: Texts, tokenizer: Tokenizer, findings: Findings) -> None:
    total = empty = long = cut = pieces = unknown = 0
    examples: list[str] = []
    raw = iter(texts.raw)
    while block := list(islice(raw, BLOCK)):
        cleaned = [texts.clean(text.encode("utf-8", "replace").decode("utf-8")) for text in block]
        total += len(block)
        empty += sum(not text.strip() for text in cleaned)
        if texts.max_words is not None:
            long += sum(len(text.split()) > texts.max_words for text in cleaned)
            cleaned = [" ".join(text.split()[: texts.max_words]) for text in cleaned]
        for text, ids in zip(cleaned, tokenizer.word_pieces(cleaned), strict=True):
            if len(ids) > texts.max_pieces:
                cut += 1
                examples = [*examples, repr(text[:60])][:SHOWN]
            pieces += len(ids)
            unknown += ids.count(tokenizer.unk_id)
    if not total or (empty == total and texts.optional):
        return
    findings.line(split, f"{texts.what}, empty", empty, total)
    if texts.max_words is not None:
        findings.line(split, f"{texts.what} of more than {texts.max_words} words, cut", long, total)
    findings.line(split, f"{texts.what} of more than {texts.max_pieces} word pieces, cut", cut, total, examples)
    findings.line(split, f"{texts.what}: word pieces that the vocabulary lacks", unknown, pieces)


# ------------------------------------------------------------------------------------------------ images


def check_images(datasets: dict, spared: dict, cfg: Config, workers: int, findings: Findings) -> None:
    """Opens every image once; evaluation's first, so that training's are compared with them as they come.

    spared: data sets of other configurations whose images training should not have.
    """
    marks, bad = {}, {}
    own = {split: dataset for split, dataset in datasets.items() if split != "train"}
    held_out = {split: list(dict.fromkeys(image_paths(dataset))) for split, dataset in {**own, **spared}.items()}
    every = list(dict.fromkeys(chain.from_iterable(held_out.values())))
    found = fingerprints(every, workers)
    for path, mark in progress(found, "opening validation and test images", "images", len(every)):
        if isinstance(mark, ImageError):
            bad[path] = mark.reason
        else:
            marks[path] = mark
    for split, paths in held_out.items():
        report_bad(split, paths, bad, findings)
        first = next((path for path in paths if path in bad), None)
        if first and split in own:
            findings.stop(split, f"evaluation needs every image: {first}: {bad[first]} (check data.image_root)")
    if "train" not in datasets:
        return
    copies = check_training_images(datasets["train"], KnownImages(marks), cfg.data.max_bad_share, workers, findings)
    for split, paths in held_out.items():
        shared = [(path, copies[path]) for path in paths if path in copies]
        for what in (SAME_PATH, COPY, LOOK_ALIKE):
            found = [f"{path} = {copy}" for path, (copy, how) in shared if how == what]
            findings.line(split, f"images that training has too ({what})", len(found), len(paths), found)


def check_training_images(
    dataset, known: KnownImages, allowed: float, workers: int, findings: Findings
) -> dict[str, tuple[str, str]]:
    """{path of evaluation: (path of training, how)} of the images that both have; training's own are reported.

    allowed: the share of entries without a usable image at which training stops.
    """
    counts, bad, copies = entries_of_image(dataset), {}, {}
    marks = fingerprints(list(counts), workers)
    for path, found in known.find(progress(marks, "opening training images", "images", len(counts))):
        if isinstance(found, ImageError):
            bad[path] = found.reason
        elif found:
            copy, how = found
            same = os.path.abspath(path) == os.path.abspath(copy)
            copies.setdefault(copy, (path, SAME_PATH if same else how))
    report_bad("train", list(counts), bad, findings)
    total, unusable = sum(counts.values()), sum(counts[path] for path in bad)
    if unusable == total or unusable >= MIN_BAD and unusable > allowed * total:
        share = f"{unusable / max(total, 1):.2%} of the entries have no usable image"
        findings.stop("train", f"{share}, data.max_bad_share allows {allowed:.2%}")
    return copies


def report_bad(split: str, paths: list[str], bad: dict[str, str], findings: Findings) -> None:
    missing = [path for path in paths if bad.get(path) == NO_FILE]
    broken = [f"{path} ({bad[path]})" for path in paths if bad.get(path, NO_FILE) != NO_FILE]
    findings.line(split, "images missing", len(missing), len(paths), missing)
    findings.line(split, "images unreadable", len(broken), len(paths), broken)


if __name__ == "__main__":
    run_main(main)
