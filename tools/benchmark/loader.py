"""`tools.benchmark loader`: CPU time that a pair costs, from the JPEG file to the batch at the loader's exit."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.annotations import Source
from dataset.loader import BatchIndices, Loader
from dataset.pretrain import PretrainCollate, PretrainDataset
from dataset.text import Tokenizer
from dataset.transforms import Augment, PretrainViews


def run_loader(args: argparse.Namespace) -> dict:
    """CPU time is that of the process and its workers together, without normalizing on the device."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args)
        views = PretrainViews(Augment(args.image_size, resize=args.resize))
        data = PretrainDataset(Source(Path(folder, "pairs.json")), views)
        milliseconds = statistics.median(cpu_of_an_epoch(data, args) for _ in range(args.repeats))
    return {
        "pairs": args.pairs // args.batch_size * args.batch_size,
        "views": f"2 of {args.image_size} x {args.image_size} from {args.width} x {args.height}",
        "resized_by": args.resize,
        "workers": args.workers,
        "ms_of_cpu_per_pair": round(milliseconds, 3),
        "pairs_per_second_and_core": round(1e3 / milliseconds, 1),
    }


def cpu_of_an_epoch(data: PretrainDataset, args: argparse.Namespace) -> float:
    """Milliseconds of CPU time per pair, of this process and of its workers, which have ended by then."""
    gc.collect()
    gc.freeze()  # what the process holds by now: collecting it below would be counted
    before = sum(os.times()[:4])
    collate = PretrainCollate(Tokenizer("configs/bert/vocab.txt"), 25)
    loader = Loader(BatchIndices(data, args.batch_size), collate, num_workers=args.workers)
    count = sum(len(batch["paths"]) for batch in loader)
    del loader
    gc.collect()
    return (sum(os.times()[:4]) - before) / count * 1e3


def write_images(folder: Path, args: argparse.Namespace) -> None:
    """JPEG images with large forms and fine grain, about as large as photographs, and pairs.json of args.pairs."""
    rng = np.random.default_rng(0)
    for i in range(args.images):
        forms = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        forms = np.asarray(forms.resize((args.width, args.height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.normal(0, 8, forms.shape).astype(np.int16)
        Image.fromarray(np.clip(forms + grain, 0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=85)
    pairs = [{"image": f"{i % args.images}.jpg", "caption": f"image number {i}"} for i in range(args.pairs)]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
