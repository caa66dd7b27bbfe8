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
import hashlib
import io
import itertools
import json
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dataset.annotations import Source
from dataset.cache import Pairs, load_pairs
from dataset.files import IMAGES
from dataset.transforms import ImageError, opened
from models.weights import check_value
from tools.prepare.common import progress, warn, whole_folder
from tools.prepare.image_hash import image_bytes
from tools.prepare.parquet import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LeftOut,
    Sample,
    open_tables,
    read_tables,
)
from utils import UserError, find_file, run_main, write_json

EXAMPLES = 3  # of what is left out, in the error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="annotation files, shards, or parquet")
    add("--image_root", help="folder of relative image paths (default: the annotation file's)")
    add("--image_column", metavar="NAME", help=f"parquet's (default: {', '.join(IMAGE_COLUMNS)})")
    add("--caption_column", metavar="NAME", help=f"parquet's (default: {', '.join(CAPTION_COLUMNS)})")
    add("--output", type=Path, required=True, help="folder to make")
    add("--per_shard", type=int, default=10_000, help="images in a shard (default: %(default)s)")
    add("--max_bad_share", type=float, default=0.01, help="of images left out (default: %(default)s)")
    args = parser.parse_args(argv)
    check_value("--per_shard", args.per_shard, int)
    check_value("--max_bad_share", args.max_bad_share, float, 0, 1)
    with whole_folder(args.output) as partial:
        total, samples = find_samples(args)
        packing = Packing(samples, total, args.max_bad_share)
        packing.write(partial, args.per_shard)
    count = packing.count
    rows = f" of {count['rows']} rows" if count["rows"] > count["written"] else ""
    failed = f", {count['failed']} failed downloads" if count["failed"] else ""
    left_out = f"{count['left out']} unreadable or without caption left out{failed}"
    print(f"{count['written']} images{rows} ({left_out}) in {args.output}")
    if packing.examples:
        warn(f"left out: {'; '.join(packing.examples)}")
    if repeats := count["written"] - len(np.unique(packing.digests)):
        warn(f"{repeats} of the images come again further on, not side by side, and count as images of their own")


# ------------------------------------------------------------------------------------------------ reading


def find_samples(args: argparse.Namespace) -> tuple[int, Iterator[Sample | LeftOut | None]]:
    """(how many rows `--data` has, their samples): the rows of parquet files, else the images of anything else."""
    paths = [find_file(name, "--data") for name in args.data]
    others = [path for path in paths if path.suffix.lower() != ".parquet"]
    if (args.image_root or others) if len(others) < len(paths) else (args.image_column or args.caption_column):
        raise UserError(
            f"--data {paths[0]}, ...: give parquet files alone, with --image_column and --caption_column, or none of "
            "them, with --image_root; pack both kinds into a folder each"
        )
    if others:
        pairs = load_pairs(Source(args.data, args.image_root, max_bad_share=args.max_bad_share))
        return len(pairs.paths), read_pairs(pairs)
    tables = open_tables(paths, args.image_column, args.caption_column)
    return sum(table.rows for table in tables), read_tables(tables)


def read_pairs(pairs: Pairs) -> Iterator[Sample | LeftOut]:
    """A sample of every image with the captions of its entries, or why it cannot be read."""
    order = np.argsort(pairs.image_id, kind="stable")  # the entries of an image stand together in it
    first = np.searchsorted(pairs.image_id[order], np.arange(len(pairs.paths) + 1))
    for image in range(len(pairs.paths)):
        path = pairs.paths[image]
        try:
            with opened(path):  # an image, or an ImageError
                pass
            content = image_bytes(path)
        except ImageError as error:
            yield error
            continue
        captions = [_caption(pairs, entry) for entry in order[first[image] : first[image + 1]]]
        yield Sample(content, _ending(path), captions)


def _caption(pairs: Pairs, entry: int) -> str | list[str]:
    texts = [pairs.captions[i] for i in range(pairs.caption_start[entry], pairs.caption_start[entry + 1])]
    return texts[0] if len(texts) == 1 else texts


def _ending(path: str) -> str:
    name = path.rpartition("@")[0] if ".tar/" in path else path  # an image in a shard: see dataset.shards
    ending = name.rpartition(".")[2].lower()
    return ending if ending in IMAGES else "jpg"  # readers go by the content


# ------------------------------------------------------------------------------------------------ writing


class Packing:
    """Writes samples as shards and counts what became of them.

    samples: of `total` rows, taken one at a time, so that memory holds one. Raises UserError if more than
    `max_bad_share` of them, failed downloads apart, are left out, which is looked at after every shard's number of
    samples and at the end, and if none can be used.

    count: of the samples "written", "left out" and "failed" (downloads), and of the "rows" that were written.
    """

    def __init__(self, samples: Iterable[Sample | LeftOut | None], total: int, max_bad_share: float):
        self.samples, self.total, self.max_bad_share = samples, total, max_bad_share
        self.count: Counter[str] = Counter()
        self.examples: list[str] = []
        self.digests = array("Q")  # of the images, 64 bits each, in few of which two would be the same by chance

    def write(self, folder: Path, per_shard: int) -> None:
        """Shards of `per_shard` images; SHARD_stats.json has the number of a shard's images."""
        numbered = enumerate(self._usable(per_shard))
        for shard, samples in itertools.groupby(numbered, lambda item: item[0] // per_shard):
            before = self.count["written"]
            with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                for number, sample in samples:
                    key = f"{shard:05d}{number % per_shard:0{len(str(per_shard - 1))}d}"
                    captions = sample.captions
                    text = {"caption": captions[0]} if len(captions) == 1 else {"captions": captions}
                    _add(tar, f"{key}.{sample.ending}", sample.image)
                    _add(tar, f"{key}.json", json.dumps(text).encode())
                    self.count.update(written=1, rows=sample.rows)
                    self.digests.frombytes(hashlib.blake2b(sample.image, digest_size=8).digest())
            write_json(folder / f"{shard:05d}_stats.json", {"successes": self.count["written"] - before})

    def _usable(self, every: int) -> Iterator[Sample]:
        """The samples that can be written; the share of the others is checked after `every` samples."""
        for number, sample in enumerate(progress(self.samples, "packing images", "images", self.total), 1):
            if isinstance(sample, Sample):
                yield sample
            elif sample is None:
                self.count["failed"] += 1
            else:
                self.count["left out"] += 1
                self.examples = [*self.examples, str(sample)][:EXAMPLES]
            if number % every == 0:
                self._check()
        self._check()
        if not self.count["written"]:
            why = f"{self.count['left out']} left out, {self.count['failed']} failed downloads"
            raise UserError(f"no image with a caption can be used: {'; '.join([why, *self.examples])}")

    def _check(self) -> None:
        downloaded = self.total - self.count["failed"]
        if self.count["left out"] > self.max_bad_share * downloaded:
            raise UserError(
                f"{self.count['left out']} of {downloaded} images cannot be read or have no caption, --max_bad_share "
                f"allows {self.max_bad_share:g}: {'; '.join(self.examples)}"
            )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_main(main)
