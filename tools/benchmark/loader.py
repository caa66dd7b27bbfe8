"""`tools.benchmark loader`: CPU time that a pair costs, from the JPEG file to the batch at the loader's exit."""

import argparse
import gc
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset import create_dataset, create_train_loader
from dataset.pretrain import PretrainCollate, PretrainDataset
from engine.config import Config
from tools.benchmark.model import random_config, tokenizer_of
from utils import write_json

IMAGES, WIDTH, HEIGHT = 64, 640, 480  # files that are made


def run_loader(args: argparse.Namespace, device: torch.device) -> dict:
    """CPU time is that of the process and its workers together, without normalizing on the device."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_images(Path(folder), args.pairs)
        own = [f"data.train=[{pairs}]", "data.image_root=null", f"data.num_workers={args.workers}"]
        cfg = random_config(args.config, [*args.override, *own])
        collate = PretrainCollate(tokenizer_of(cfg), cfg.text.max_tokens)
        data = create_dataset("pretrain", cfg)
        milliseconds = statistics.median(cpu_of_an_epoch(data, cfg, collate) for _ in range(args.repeats))
    side = cfg.model.image_encoder.image_size
    return {
        "views": f"2 of {side} x {side} from {WIDTH} x {HEIGHT}",
        "resized_by": cfg.augment.resize,
        "ms_of_cpu_per_pair": round(milliseconds, 3),
        "predicted": {"ms_of_cpu_per_pair": 3.4},  # as on another machine (docs/speed.md)
    }


def cpu_of_an_epoch(data: PretrainDataset, cfg: Config, collate: PretrainCollate) -> float:
    """Milliseconds of CPU time per pair, of this process and of its workers, which have ended by then."""
    loader = create_train_loader(data, cfg, collate, torch.device("cpu"))
    gc.collect()
    gc.freeze()  # what the process holds by now: collecting it below would be counted
    before = sum(os.times()[:4])
    count = sum(len(batch["paths"]) for batch in loader)
    del loader
    gc.collect()
    return (sum(os.times()[:4]) - before) / count * 1e3


def write_images(folder: Path, pairs: int) -> Path:
    """JPEG images with large forms and fine grain, about as large as photographs -> pairs.json, which names them."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        forms = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        forms = np.asarray(forms.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.normal(0, 8, forms.shape).astype(np.int16)
        Image.fromarray(np.clip(forms + grain, 0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=85)
    entries = [{"image": f"{i % IMAGES}.jpg", "caption": f"image number {i}"} for i in range(pairs)]
    write_json(folder / "pairs.json", entries)
    return folder / "pairs.json"
