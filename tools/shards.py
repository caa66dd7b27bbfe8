"""Pack pre-training's images and captions into tar shards (webdataset's layout), the images' files as they stand.

    python -m tools.shards --data data/pretrain/cc3m.json --output data/shards/cc3m
    python -m tools.shards --data downloads/data/train-*.parquet --output data/shards/part

The folder is then a line of `data.train`. A few large files are read faster than millions of small ones, above all over
a network. Order is kept. Of annotation files, the entries of an image become one sample, in the place of the first.
The shards are written into OUTPUT.partial, which becomes OUTPUT at the end; that of an interrupted try is replaced.

Of parquet files (Hugging Face's data sets, img2dataset) a row is a sample, and neighboring rows
with the same image are one. They are packed and not trained from as they are, since a row cannot be read alone.
"""

import argparse
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dataset.annotations import Source
from dataset.cache import Pairs, load_pairs
from dataset.shards import open_member
from dataset.transforms import ImageError, opened
from models.weights import check_value
from tools.prepare.common import progress, whole_folder
from tools.prepare.parquet import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LeftOut,
    Sample,
    format_ending,
    parquet_columns,
    read_tables,
)
from utils import UserError, find_file, run_main

EXAMPLES = 3  # of what is left out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="annotation files and shards, or parquet files")
    add("--image_root", help="folder of relative image paths (default: the annotation file's)")
    add("--image_column", metavar="NAME", help=f"parquet's (default: {', '.join(IMAGE_COLUMNS)})")
    add("--caption_column", metavar="NAME", help=f"parquet's (default: {', '.join(CAPTION_COLUMNS)})")
    add("--output", type=Path, required=True, help="folder to make")
    add("--per_shard", type=int, default=10_000, help="images in a shard (default: %(default)s)")
    add("--max_bad_share", type=float, default=0.01, help="of images left out (default: %(default)s)")
    args = parser.parse_args(argv)
    check_value("--per_shard", args.per_shard, int)
    check_value("--max_bad_share", args.max_bad_share, float, 0, 1)
    samples, total = find_samples(args)
    counts, examples = Counter(), []
    with whole_folder(args.output) as folder:
        written = write_shards(folder, usable(samples, total, counts, examples), args.per_shard)
        failed = f", {counts['failed']} failed downloads" * bool(counts["failed"])
        left_out = f"{counts['left out']} unreadable or without caption left out{failed}"
        if examples:
            left_out += f"; first: {'; '.join(examples)}"
        if not written or counts["left out"] > args.max_bad_share * (total - counts["failed"]):
            raise UserError(f"{left_out}; of {total}, --max_bad_share allows {args.max_bad_share:g}")
    print(f"{written} images in {args.output}, {left_out}")


# ------------------------------------------------------------------------------------------------ reading


def find_samples(args: argparse.Namespace) -> tuple[Iterable[Sample | LeftOut | None], int]:
    """The samples of parquet files, or of the images of anything else that `--data` names; how many rows or images."""
    paths = [find_file(name, "--data") for name in args.data]
    packed = [path for path in paths if path.suffix.lower() == ".parquet"]
    if not packed:
        pairs = load_pairs(Source(args.data, args.image_root, max_bad_share=args.max_bad_share))
        return read_pairs(pairs), len(pairs.paths)
    if len(packed) < len(paths):
        raise UserError(f"--data {packed[0]}, ...: pack parquet files and others into a folder each")
    found = {path: parquet_columns(path, args.image_column, args.caption_column) for path in paths}
    return read_tables({path: columns for path, (_, columns) in found.items()}), sum(rows for rows, _ in found.values())


def read_pairs(pairs: Pairs) -> Iterator[Sample | LeftOut]:
    """A sample of every image with the captions of its entries, or why it cannot be read."""
    order = np.argsort(pairs.image_id, kind="stable")  # the entries of an image stand together in it
    first = np.searchsorted(pairs.image_id[order], np.arange(len(pairs.paths) + 1))
    for image in range(len(pairs.paths)):
        path = pairs.paths[image]
        try:
            with opened(path) as picture:
                ending = format_ending(picture)
        except ImageError as error:
            yield error
            continue
        captions = [_caption(pairs, entry) for entry in order[first[image] : first[image + 1]]]
        with open_member(os.fspath(path)) as file:
            yield Sample(file.read(), ending, captions)


def _caption(pairs: Pairs, entry: int) -> str | list[str]:
    texts = [pairs.captions[i] for i in range(pairs.caption_start[entry], pairs.caption_start[entry + 1])]
    return texts[0] if len(texts) == 1 else texts


# ------------------------------------------------------------------------------------------------ writing


def usable(
    samples: Iterable[Sample | LeftOut | None], total: int, counts: Counter, examples: list[str]
) -> Iterator[Sample]:
    """The samples that can be written, one at a time, so that memory holds one; the others are counted."""
    for sample in progress(samples, "packing images", "images", total):
        if isinstance(sample, Sample):
            yield sample
        elif sample is None:
            counts["failed"] += 1
        else:
            counts["left out"] += 1
            if len(examples) < EXAMPLES:
                examples.append(str(sample))


def write_shards(folder: Path, samples: Iterable[Sample], per_shard: int) -> int:
    """Shards of `per_shard` images, 00000.tar and so on; how many images."""
    written = 0
    for shard, numbered in itertools.groupby(enumerate(samples), lambda item: item[0] // per_shard):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number, sample in numbered:
                key = f"{shard:05d}{number % per_shard:0{len(str(per_shard - 1))}d}"
                captions = sample.captions
                text = {"caption": captions[0]} if len(captions) == 1 else {"captions": captions}
                _add(tar, f"{key}.{sample.ending}", sample.image)
                _add(tar, f"{key}.json", json.dumps(text).encode())
                written += 1
    return written


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_main(main)
