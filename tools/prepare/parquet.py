"""Parquet files of images and captions, as Hugging Face's data sets and img2dataset have them, read row by row.

    image                    the file's bytes, or a struct with them: {bytes, path}        Hugging Face's data sets
    jpg, jpeg, png, webp     the file's bytes, null if the download failed                 img2dataset
    caption, text, captions, txt, TEXT                    a text or a list of texts
    status                   "success", else the download failed                           img2dataset

tools.shards packs them into tar shards, and says why they are not trained from as they are.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from PIL import Image
from pyarrow.parquet import ParquetFile

from dataset.annotations import strings
from dataset.text import clean_caption
from dataset.transforms import ImageError, opened
from utils import UserError, open_file, reason

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
        row = 0
        with opened_parquet(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                for image, caption, *status in zip(*map(batch.column, columns), strict=True):
                    failed = status and status[0].as_py() != SUCCESS
                    yield None if failed else _sample(f"{path}: row {row}", image.as_py(), caption.as_py())
                    row += 1


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
    options = {"buffer_size": READ_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with open_file(path) as content:
        try:
            with ParquetFile(content, **options) as file:
                yield file
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable parquet file ({reason(error)}); an incomplete download?") from None
