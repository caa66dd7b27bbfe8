"""Pack pre-training's images and captions into tar shards (webdataset's layout), the images' files as they stand.

    python -m tools.shards --data data/pretrain/cc3m.json --output data/shards/cc3m
    python -m tools.shards --data downloads/data/train-*.parquet --output data/shards/part

The folder is then a line of `data.train`. A few large files are read faster than millions of small ones, above all over
a network. Order is kept. Of annotation files, the entries of an image become one sample, where the first of them was.
The shards are written into OUTPUT.partial, which becomes OUTPUT at the end; that of an interrupted try is replaced.

Of parquet files (Hugging Face's data sets, img2dataset), or folders of them, a row is a sample, and neighbouring rows
with the same image are one. They are packed and not trained from as they are, since a row cannot be read alone.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import utils
from dataset.entries import Source
from dataset.index import Pairs, load_pairs
from dataset.shards import IMAGES, read_member
from dataset.transforms import ImageError, image_size
from tools.prepare.common import check_output, warn
from tools.prepare.parquet import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    open_tables,
    parquet_files,
    read_tables,
    splits,
)
from tools.prepare.shards import FailedDownload, LeftOut, Packed, Sample, write_shards


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="annotation files, shards, or parquet")
    parser.add_argument("--image_root", help="folder of relative image paths (default: the annotation file's)")
    parser.add_argument("--image_column", metavar="NAME", help=f"parquet's (default: {', '.join(IMAGE_COLUMNS)})")
    parser.add_argument("--caption_column", metavar="NAME", help=f"parquet's (default: {', '.join(CAPTION_COLUMNS)})")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--per_shard", type=int, default=10_000, help="images in a shard (default: %(default)s)")
    parser.add_argument("--max_bad_share", type=float, default=0.01, help="of images left out (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.per_shard < 1:
        raise utils.UserError(f"--per_shard is {args.per_shard}; it must be at least 1")
    if not 0 <= args.max_bad_share <= 1:
        raise utils.UserError(f"--max_bad_share is {args.max_bad_share:g}; it must be from 0 to 1")
    check_output(args.output)
    utils.make_folder(args.output.resolve().parent)
    total, samples = find_samples(args)
    packed = write_shards(samples, total, args.output, args.per_shard, args.max_bad_share)
    print(report(packed, args.output))
    if repeats := packed.repeats():
        warn(f"{repeats} of the images come again further on, not side by side, and count as images of their own")


def report(packed: Packed, output: Path) -> str:
    """The line that says what is packed and what is not."""
    rows = f" of {packed.rows} rows" if packed.rows > packed.written else ""
    failed = f"; {packed.failed_downloads} failed downloads" if packed.failed_downloads else ""
    left_out = f"{packed.left_out} could not be read or had no caption, and are left out"
    return f"{packed.written} images{rows} in {output}; {left_out}{failed}"


def find_samples(args: argparse.Namespace) -> tuple[int, Iterator[Sample | LeftOut | FailedDownload]]:
    """(how many rows `--data` has, their samples): the rows of parquet files, else the images of anything else.

    Raises UserError where it has both, or where an option is of the other kind.
    """
    paths = [utils.find_file(name, "--data") for name in args.data]
    files = [parquet_files(path) for path in paths]
    if not any(files):
        if args.image_column or args.caption_column:
            raise utils.UserError(f"--image_column and --caption_column are of parquet files, {paths[0]} is none")
        pairs = load_pairs(Source(args.data, args.image_root, max_bad_share=args.max_bad_share))
        return len(pairs.paths), read_pairs(pairs)
    if not all(files):
        other = paths[files.index([])]
        raise utils.UserError(f"--data names parquet files and, with {other}, others; pack them into a folder each")
    if args.image_root:
        raise utils.UserError("--image_root is of annotation files; parquet files hold the images themselves")
    every = list(itertools.chain.from_iterable(files))
    if len(found := splits(every)) > 1:
        warn(f"--data names files of the splits {', '.join(found)}; they are packed together")
    tables = open_tables(every, args.image_column, args.caption_column)
    return sum(table.rows for table in tables), read_tables(tables)


def read_pairs(pairs: Pairs) -> Iterator[Sample | LeftOut]:
    """A sample of every image with the captions of its entries, or why it cannot be read."""
    order = np.argsort(pairs.image_id, kind="stable")  # the entries of an image stand together in it
    first = np.searchsorted(pairs.image_id[order], np.arange(len(pairs.paths) + 1))
    for image in range(len(pairs.paths)):
        path = pairs.paths[image]
        try:
            content = _image_bytes(path)
        except ImageError as error:
            yield error
            continue
        captions = [_caption(pairs, entry) for entry in order[first[image] : first[image + 1]]]
        yield Sample(content, _ending(path), captions)


def _caption(pairs: Pairs, entry: int) -> str | list[str]:
    texts = [pairs.captions[i] for i in range(pairs.caption_start[entry], pairs.caption_start[entry + 1])]
    return texts[0] if len(texts) == 1 else texts


def _image_bytes(path: str) -> bytes:
    """The file as it stands; ImageError where it is no image."""
    image_size(path)
    try:
        content = read_member(path)
        return Path(path).read_bytes() if content is None else content
    except (OSError, EOFError) as error:
        raise ImageError(path, str(error)) from None


def _ending(path: str) -> str:
    ending = path.partition("@")[0].rpartition(".")[2].lower() if ".tar/" in path else Path(path).suffix[1:].lower()
    return ending if ending in IMAGES else "jpg"  # what it is, its content tells


if __name__ == "__main__":
    utils.run_main(main)
