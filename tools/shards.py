"""Pack pre-training's images and captions into tar shards (webdataset's layout), the images' files as they stand.

    python -m tools.shards --data data/pretrain/cc3m.json --output data/shards/cc3m
    python -m tools.shards --data downloads/data/train-*.parquet --output data/shards/part

The folder is then a line of `data.train`. A few large files are read faster than millions of small ones, above all over
a network. Order is kept. Of annotation files, the entries of an image become one sample, in the place of the first.
The shards are written into OUTPUT.partial, which becomes OUTPUT at the end; that of an interrupted try is replaced.

Of parquet files a row is a sample, and neighboring rows with the same image are one. They are packed and not trained
from as they are, since a row cannot be read alone. Their columns:

    image                    the file's bytes, or a struct with them: {bytes, path}        Hugging Face's data sets
    jpg, jpeg, png, webp     the file's bytes, null if the download failed                 img2dataset
    caption, text, captions, txt, TEXT                    a text or a list of texts
    status                   "success", else the download failed                           img2dataset
"""

import argparse
import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from pyarrow.parquet import ParquetFile

from dataset.annotations import Source, strings
from dataset.cache import Pairs, load_pairs
from dataset.shards import open_member
from dataset.text import clean_caption
from dataset.transforms import ImageError, opened
from models.weights import check_value
from tools.prepare.common import progress, whole_folder
from utils import UserError, find_file, open_file, reason, run_main

EXAMPLES = 3  # of what is left out
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "TEXT")
STATUS, SUCCESS = "status", "success"  # img2dataset's
BATCH_ROWS = 16  # decoded at a time; beside them memory holds the page of the file that they are in
READ_BYTES = 1 << 20  # of the file at a time; pyarrow would read the images of a whole row group


class Sample(NamedTuple):
    """An image's file as it stands, the ending that names its format (one of dataset.files.IMAGES), and the captions
    of its entries, each a text or a list of texts."""

    image: bytes
    ending: str
    captions: list[str | list[str]]


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
    samples, total = find_samples(args)
    with whole_folder(args.output) as folder:
        written, failed, left_out = pack(progress(samples, "packing images", "images", total), folder, args.per_shard)
        report = f"{len(left_out)} unreadable or without caption left out, {failed} failed downloads"
        report = "; ".join([report, *left_out[:EXAMPLES]])
        if not written or len(left_out) > args.max_bad_share * (total - failed):
            raise UserError(f"{report}; of {total}, --max_bad_share allows {args.max_bad_share:g}")
    print(f"{written} images in {args.output}; {report}")


def find_samples(args: argparse.Namespace) -> tuple[Iterable[Sample | str | None], int]:
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


def read_pairs(pairs: Pairs) -> Iterator[Sample | str]:
    """A sample of every image with the captions of its entries, or why it cannot be read."""
    order = np.argsort(pairs.image_id, kind="stable")  # the entries of an image stand together in it
    first = np.searchsorted(pairs.image_id[order], np.arange(len(pairs.paths) + 1))
    for image in range(len(pairs.paths)):
        path = pairs.paths[image]
        try:
            with opened(path) as picture:
                ending = format_ending(picture)
        except ImageError as error:
            yield str(error)
            continue
        captions = [_caption(pairs, entry) for entry in order[first[image] : first[image + 1]]]
        with open_member(os.fspath(path)) as file:
            yield Sample(file.read(), ending, captions)


def _caption(pairs: Pairs, entry: int) -> str | list[str]:
    texts = [pairs.captions[i] for i in range(pairs.caption_start[entry], pairs.caption_start[entry + 1])]
    return texts[0] if len(texts) == 1 else texts


def parquet_columns(path: Path, image_column: str | None, caption_column: str | None) -> tuple[int, list[str]]:
    """A file's number of rows and the columns to read: of images, of captions, and img2dataset's status if it is there.

    image_column, caption_column: names to look for in place of those known. Raises UserError naming a file that cannot
    be read or has no such column.
    """
    with opened_parquet(path) as file:
        present, rows = file.schema_arrow.names, file.metadata.num_rows
    columns = []
    for what, given, known in (("image", image_column, IMAGE_COLUMNS), ("caption", caption_column, CAPTION_COLUMNS)):
        names = [given] if given else known
        column = next((name for name in names if name in present), None)
        if column is None:
            raise UserError(
                f"{path}: has no column {' or '.join(names)}, its columns are {', '.join(present)}; "
                f"--{what}_column names the one to read"
            )
        columns.append(column)
    return rows, columns + [STATUS] * (STATUS in present)


def read_tables(tables: Mapping[Path, list[str]]) -> Iterator[Sample | str | None]:
    """A sample of every image in parquet files {path: its columns}, in order, or why a row is none: "FILE: row 3: ...",
    counted from 0 in each file; None of an image that could not be downloaded when the data set was made.

    Neighboring rows with the same image, as data sets with a row a caption have them, are one sample: else the captions
    of an image would be each other's negatives. Memory holds BATCH_ROWS rows and the page that they are in. Raises
    UserError naming a file that is damaged.
    """
    held = None
    for sample in _read_rows(tables):
        if not isinstance(sample, Sample):
            yield sample
        elif held and sample.image == held.image:
            held.captions.extend(sample.captions)
        else:
            if held:
                yield held
            held = sample
    if held:
        yield held


def _read_rows(tables: Mapping[Path, list[str]]) -> Iterator[Sample | str | None]:
    """A sample of every row, or why it is none."""
    for path, columns in tables.items():
        with opened_parquet(path) as file:
            batches = file.iter_batches(BATCH_ROWS, columns=columns)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
                image, caption, *status = (row[column] for column in columns)
                yield None if status and status[0] != SUCCESS else _sample(f"{path}: row {number}", image, caption)


def _sample(where: str, image: Any, caption: Any) -> Sample | str:
    """image, caption: a row's values; where: the row, as errors name it."""
    content = image["bytes"] if isinstance(image, dict) else image
    if not content:
        return f"{where}: holds no image"
    try:
        with opened(where, content) as picture:
            ending = format_ending(picture)
    except ImageError as error:
        return str(error)
    texts = [text for text in strings(caption or []) if text and clean_caption(text, 1)]
    if not texts:
        return f"{where}: holds no caption with a word in it"
    return Sample(content, ending, [texts[0] if len(texts) == 1 else texts])


def format_ending(picture: Image.Image) -> str:
    """The ending of an image's file by its format (MPO: a JPEG with a second picture)."""
    return {"JPEG": "jpg", "MPO": "jpg"}.get(picture.format, picture.format.lower())


@contextlib.contextmanager
def opened_parquet(path: Path) -> Iterator[ParquetFile]:
    """What pyarrow raises on the file becomes a UserError."""
    with open_file(path) as content:
        try:
            with ParquetFile(content, buffer_size=READ_BYTES, pre_buffer=False) as file:
                yield file
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable parquet file ({reason(error)}); an incomplete download?") from None


def pack(samples: Iterable[Sample | str | None], folder: Path, per_shard: int) -> tuple[int, int, list[str]]:
    """Write shards of `per_shard` images, 00000.tar and so on -> how many images; how many failed downloads; why others
    are left out. Samples are taken one at a time, so that memory holds one."""
    written, failed, left_out, tar = 0, 0, [], None
    for sample in samples:
        if sample is None:
            failed += 1
        elif isinstance(sample, str):
            left_out.append(sample)
        else:
            shard, number = divmod(written, per_shard)
            if number == 0:
                if tar:
                    tar.close()
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT)
            key = f"{shard:05d}{number:0{len(str(per_shard - 1))}d}"
            captions = sample.captions
            text = {"caption": captions[0]} if len(captions) == 1 else {"captions": captions}
            _add(tar, f"{key}.{sample.ending}", sample.image)
            _add(tar, f"{key}.json", json.dumps(text).encode())
            written += 1
    if tar:
        tar.close()
    return written, failed, left_out


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_main(main)
