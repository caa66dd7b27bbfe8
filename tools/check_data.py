"""Check a configuration's data before hours of training: its files, its images, and images that train and test share.

    python -m tools.check_data --config configs/Retrieval_coco.yaml
    python -m tools.check_data --config configs/Pretrain.yaml --against configs/Retrieval_coco.yaml --workers 16

Reads the annotations exactly as training does, opens every image in parallel, and reports for every split: missing and
unreadable images, and images of validation and test that are in training too (by path, by the bytes of the file, by
what the image shows). `--against` takes the validation and test images of further configurations into that comparison.
Ends with exit code 1, and the reasons, if training or its evaluation would stop, or if more than 1% of a split's images
are in training too; with 0 otherwise.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from dataset import create_dataset
from dataset.loader import MIN_BAD
from dataset.transforms import ImageError
from engine.config import STAGES, load_config
from tools.prepare.image_hash import KnownImages, fingerprints
from utils import Config, UserError, one_line, run_main

SHOWN = 3  # examples of each finding
MANY_SHARED = 0.01  # of a split's images: its numbers are then those of memory


def main(argv: list[str] | None = None) -> None:
    faults = [f"{split}: {one_line(reason, 1000)}" for split, reason in check(parse_arguments(argv))]
    if faults:
        print(f"{len(faults)} faults to mend before a run:\n  " + "\n  ".join(faults))
        sys.exit(1)
    print("no fault found")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.check_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="configuration of any stage")
    add("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE", help="as in training")
    add("--against", nargs="*", default=[], metavar="CONFIG", help="further configurations whose val and test to spare")
    add("--workers", type=int, default=os.cpu_count(), help="processes that open images (default: %(default)s)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Read and report everything that the arguments name -> (split, reason) of each fault."""
    stage, cfg = stage_config(args.config, args.override)
    print(f"{args.config}: {stage}")
    if "cache_images" in cfg.data:
        cfg.data.cache_images = False
    datasets = {}
    for split, make in splits(stage, cfg):  # made as training makes them; what it would refuse is a fault
        try:
            datasets[split] = make()
        except UserError as error:
            yield split, str(error)
            continue
        line(split, "samples of an epoch" if split == "train" else "items", len(datasets[split]))
        line(split, "images", len(image_paths(datasets[split])))
    held_out = {split: image_paths(dataset) for split, dataset in datasets.items() if split != "train"}
    own = list(held_out)
    for path in args.against:
        for split, make in splits(*stage_config(path, [])):
            if split != "train":
                held_out[f"{Path(path).stem} {split}"] = image_paths(make())
    # evaluation's images first, so that training's are compared with them as they come
    every = list(dict.fromkeys(chain.from_iterable(held_out.values())))
    marks = dict(fingerprints(every, args.workers, "opening validation and test images"))
    bad = {path: mark.reason for path, mark in marks.items() if isinstance(mark, ImageError)}
    for split, paths in held_out.items():
        first = report_bad(split, paths, bad)
        if first and split in own:
            yield split, f"evaluation needs every image: {first} (check data.image_root)"
    if "train" in datasets:
        known = KnownImages({path: mark for path, mark in marks.items() if path not in bad})
        yield from check_training_images(datasets["train"], held_out, known, cfg, args.workers)


def stage_config(path: str, overrides: list[str]) -> tuple[str, Config]:
    """The stage whose schema knows all keys of a configuration, and the resolved configuration."""
    errors = []
    for name, stage in STAGES.items():
        try:
            return name, load_config(path, overrides, stage)
        except UserError as error:
            errors.append(f"as {name}: {error}")
    raise UserError(f"{path}: fits no stage; {'; '.join(errors)}")


def splits(stage: str, cfg: Config) -> Iterator[tuple[str, Callable]]:
    """(split, how to make its data set) of the splits that have data."""
    for split in ("train", "val", "test"):
        if cfg.data.get(split):
            yield split, partial(create_dataset, f"{stage}_{'train' if split == 'train' else 'eval'}", cfg, split)


def image_paths(dataset) -> list[str]:
    """Of a data set's images, each once."""
    return list(dict.fromkeys(dataset.paths if hasattr(dataset, "paths") else dataset.images))


def check_training_images(
    dataset, held_out: dict[str, list[str]], known: KnownImages, cfg: Config, workers: int
) -> Iterator[tuple[str, str]]:
    """held_out: {split: images of evaluation}; known: what they show. -> faults as of `check`"""
    paths, bad, copies = list(dataset.paths), {}, {}
    for path, mark in fingerprints(paths, workers, "opening training images"):
        if isinstance(mark, ImageError):
            bad[path] = mark.reason
        elif found := known.find(mark):
            copy, how = found
            copies.setdefault(copy, "the same path" if path == copy else f"{how} of it: {path}")
    report_bad("train", paths, bad)
    image_of_entry = getattr(dataset, "image_of_caption", None)  # VQA's entries are questions
    image_of_entry = dataset.image_id if image_of_entry is None else image_of_entry
    unusable = int(np.isin(image_of_entry, [number for number, path in enumerate(paths) if path in bad]).sum())
    total, allowed = len(image_of_entry), cfg.data.max_bad_share
    if unusable == total or unusable >= MIN_BAD and unusable > allowed * total:
        share = f"{unusable / total:.2%} of the entries have no usable image"
        yield "train", f"{share}, data.max_bad_share allows {allowed:.2%}"
    for split, paths in held_out.items():
        shared = [f"{path} ({copies[path]})" for path in paths if path in copies]
        line(split, "images that training has too", len(shared), len(paths), shared)
        wanted = split == "val" and cfg.data.get("train_on_minival")
        if len(shared) > MANY_SHARED * len(paths) and not wanted:
            yield split, f"{len(shared)} of its {len(paths)} images are in training too: they measure memory"


def line(split: str, what: str, number: int, total: int = 0, examples: list[str] = ()) -> None:
    share = f" ({100 * number / total:.2f}% of {total:,})" if total else ""
    first = f"; first: {', '.join(map(one_line, examples[:SHOWN]))}" if examples else ""
    print(f"{split:6} {what}: {number:,}{share}{first}", flush=True)


def report_bad(split: str, paths: list[str], bad: dict[str, str]) -> str | None:
    """bad: {path: reason} of images that are missing or unreadable; the first of them, if there is one."""
    broken = [f"{path}: {bad[path]}" for path in paths if path in bad]
    line(split, "images missing or unreadable", len(broken), len(paths), broken)
    return broken[0] if broken else None


if __name__ == "__main__":
    run_main(main)
