"""`tools/benchmark loader`: CPU time that a pair costs, from the JPEG file to the batch at the loader's exit."""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

import utils
from dataset.entries import Source
from dataset.loader import BatchIndices, Loader
from dataset.pretrain import PretrainCollate, PretrainDataset
from dataset.text import Tokenizer
from dataset.transforms import Augment, PretrainViews, normalise, normalised, open_image


def add_loader(commands) -> None:
    parser = commands.add_parser("loader", help="milliseconds of CPU time per pair at the loader's exit")
    parser.add_argument("--images", type=int, default=64, help="files that are made (default: %(default)s)")
    parser.add_argument("--width", type=int, default=640, help="of them (default: %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="of them (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="of a view (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=512, help="of an epoch (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="data workers; 0: the process itself")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each; the median counts")
    parser.set_defaults(run=run_loader)


def run_loader(args: argparse.Namespace) -> dict:
    """Three ways by turns over the same batches: resized by torch, by Pillow, and by Pillow with float32 views.

    CPU time is that of the process and its workers together, without normalising on the device.
    """
    if min(args.images, args.pairs, args.repeats, args.batch_size) < 1 or args.batch_size > args.pairs:
        raise utils.UserError("--images, --pairs, --repeats and --batch_size: at least 1, and a batch at most --pairs")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args)
        source = Source(Path(folder, "pairs.json"))
        data = {
            name: PretrainDataset(source, PretrainViews(Augment(args.image_size, resize=name)))
            for name in ("torch", "pillow")
        }
        collate = PretrainCollate(Tokenizer("configs/bert/vocab.txt"), 25)
        ways = {"torch": (data["torch"], collate), "pillow": (data["pillow"], collate)}
        ways["float32"] = data["pillow"], Float32(collate)
        batches = {
            name: next(iter(Loader(BatchIndices(data, args.batch_size), collate)))
            for name, (data, collate) in ways.items()
        }
        pixels = normalised(batches["pillow"])
        difference = max(float((pixels[key] - batches["float32"][key]).abs().max()) for key in ("image1", "image2"))
        figures: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                figures[name].append(cpu_of_an_epoch(*way, args))
        start = time.process_time()
        for path in Path(folder).glob("*.jpg"):
            open_image(path)
        decoding = (time.process_time() - start) / args.images
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "pairs": args.pairs // args.batch_size * args.batch_size,
        "views": f"2 of {args.image_size} x {args.image_size} from {args.width} x {args.height}",
        "pillow": PIL.__version__,
        "workers": args.workers,
        "ms_of_decoding": round(decoding * 1e3, 3),
        "ms_of_cpu_per_pair": round(medians["torch"], 3),
        "ms_of_cpu_per_pair_resized_by_pillow": round(medians["pillow"], 3),
        "ms_of_cpu_per_pair_float32": round(medians["float32"], 3),
        "ratio_of_pillow": round(medians["pillow"] / medians["torch"], 3),
        "ratio_of_float32": round(medians["float32"] / medians["torch"], 3),
        "pairs_per_second_and_core": round(1e3 / medians["torch"], 1),
        "largest_difference": difference,
    }


class Float32:
    """A batch whose views were normalised one by one in the worker and stacked as float32."""

    def __init__(self, collate: PretrainCollate):
        self.collate = collate

    def __call__(self, samples: list[dict]) -> dict:
        views = {key: [normalise(sample.pop(key)) for sample in samples] for key in ("image1", "image2")}
        return self.collate(samples) | {key: torch.stack(images) for key, images in views.items()}


def cpu_of_an_epoch(data: PretrainDataset, collate, args: argparse.Namespace) -> float:
    """Milliseconds of CPU time per pair, of this process and of its workers, which have ended then."""
    before = sum(os.times()[:4])
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
