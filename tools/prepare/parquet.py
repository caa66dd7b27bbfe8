"""Parquet files of images and captions, as Hugging Face's data sets and img2dataset have them, read row by row.

    image                    the file's bytes, or a struct with them: {bytes, path}        Hugging Face's data sets
    jpg, jpeg, png, webp     the file's bytes, null if the download failed                 img2dataset
    caption, text, captions, txt, TEXT                    a text or a list of texts
    status                   "success", else the download failed                           img2dataset

tools.shards packs them into tar shards, and says why they are not trained from as they are.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow.parquet import ParquetFile

from dataset.annotations import strings
from dataset.common import EmptyCaption
from dataset.text import clean_caption
from dataset.transforms import ImageError, opened
from utils import UserError, one_line, open_file, reason, shown

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "TEXT")
STATUS, SUCCESS = "status", "success"  # img2dataset's
BYTES = re.compile(r"(struct<.*\bbytes: )?(dictionary<values=)?(large_)?binary")  # beginnings of Arrow's types
TEXTS = re.compile(r"((large_)?list<\w+: )?(dictionary<values=)?(large_)?string")
BATCH_ROWS = 16  # decoded at a time; beside them memory holds the page of the file that they are in
READ_BYTES = 1 << 20  # of the file at a time; pyarrow would read the images of a whole row group
ENDINGS = {"JPEG": "jpg", "MPO": "jpg"}  # of PIL's formats; the others' are their names


class Sample(NamedTuple):
    """An image's file as it stands, the ending that names its format (one of dataset.shards.IMAGES), and the captions
    of its entries, each a text or a list of texts; rows: how many of the source's it is made of."""

    image: bytes
    ending: str
    captions: list[str | list[str]]
    rows: int = 1


LeftOut = ImageError | EmptyCaption  # in the place of a sample that cannot be used: it names the place and the reason


class Table(NamedTuple):
    """A parquet file with `rows` rows and the names of the columns that are read: of images, of captions, and
    img2dataset's status if there is one."""

    path: Path
    rows: int
    columns: list[str]


def open_tables(files: Sequence[Path], image_column: str | None, caption_column: str | None) -> list[Table]:
    """The files with their numbers of rows and their columns, of which only the descriptions are read.

    image_column, caption_column: names to look for in place of those known. Raises UserError naming the file that
    cannot be read or has no such column, and if there is no row in any.
    """
    tables = []
    for path in files:
        with opened_parquet(path) as file:
            kinds = {field.name: str(field.type) for field in file.schema_arrow}
            rows = file.metadata.num_rows
        image = _column(path, kinds, "image", BYTES, [image_column] if image_column else IMAGE_COLUMNS)
        caption = _column(path, kinds, "caption", TEXTS, [caption_column] if caption_column else CAPTION_COLUMNS)
        tables.append(Table(path, rows, [image, caption, *([STATUS] if TEXTS.match(kinds.get(STATUS, "")) else [])]))
    if not any(table.rows for table in tables):
        raise UserError(f"{files[0]}: has no row{', nor have the others' if len(files) > 1 else ''}")
    return tables


def _column(path: Path, kinds: dict[str, str], what: str, holds: re.Pattern, names: Sequence[str]) -> str:
    """The first of the columns `names` whose type matches `holds`. UserError if none does."""
    if found := next((name for name in names if holds.match(kinds.get(name, ""))), None):
        return found
    columns = one_line(", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none", 600)
    raise UserError(
        f"{path}: no column {' or '.join(names)} holds {what}s, its columns are {columns}; "
        f"--{what}_column names the one to read"
    )


def read_tables(tables: Sequence[Table]) -> Iterator[Sample | LeftOut | None]:
    """A sample of every image, in order, or why a row is none: "FILE: row 3: ...", counted from 0 in each file;
    None of an image that could not be downloaded when the data set was made.

    Neighboring rows with the same image, as data sets with a row a caption have them, are one sample: else the captions
    of an image would be each other's negatives. Memory holds BATCH_ROWS rows and the page that they are in. Raises
    UserError naming a file that is damaged.
    """
    held = None
    for sample in _read_rows(tables):
        if not isinstance(sample, Sample):
            yield sample
        elif held and sample.image == held.image:
            held = held._replace(captions=held.captions + sample.captions, rows=held.rows + 1)
        else:
            if held:
                yield held
            held = sample
    if held:
        yield held


def _read_rows(tables: Sequence[Table]) -> Iterator[Sample | LeftOut | None]:
    """A sample of every row, or why it is none."""
    for table in tables:
        row = 0
        with opened_parquet(table.path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=table.columns):
                for image, caption, *status in zip(*map(batch.column, table.columns), strict=True):
                    failed = status and status[0].as_py() != SUCCESS
                    yield None if failed else _sample(f"{table.path}: row {row}", image, caption)
                    row += 1


def _sample(where: str, image: Any, caption: Any) -> Sample | LeftOut:
    """image, caption: a row's values as Arrow holds them; where: the row, as errors name it."""
    content = image.as_py()
    try:
        if isinstance(content, dict):
            if content["bytes"] is None and content.get("path"):
                raise ImageError(where, f"holds no image but the path of one, {shown(content['path'])}")
            content = content["bytes"]
        if not content:
            raise ImageError(where, "holds no image")
        with opened(where, content) as picture:
            ending = ENDINGS.get(picture.format, picture.format.lower())
        texts = [text for text in strings(caption.as_py() or []) if text and clean_caption(text, 1)]
        if not texts:
            raise EmptyCaption(f"{where}: holds no caption with a word in it")
    except (ImageError, EmptyCaption) as error:
        return error
    except UnicodeDecodeError:  # pyarrow takes a file's word for it that its texts are UTF-8
        return EmptyCaption(f"{where}: the caption is not UTF-8 text")
    return Sample(content, ending, [texts[0] if len(texts) == 1 else texts])


@contextlib.contextmanager
def opened_parquet(path: Path) -> Iterator[ParquetFile]:
    """What pyarrow raises on the file becomes a UserError."""
    options = {"buffer_size": READ_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with open_file(path) as content:
        try:
            with ParquetFile(content, **options) as file:
                yield file
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:  # the second of a column's name
            raise UserError(f"{path}: not a readable parquet file ({reason(error)}); an incomplete download?") from None
