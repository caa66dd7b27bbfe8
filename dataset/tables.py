"""Annotation files other than JSON lists: JSON lines, tables with named columns, token files, folders of images.

    captions.jsonl   one JSON object a line
    captions.csv     a table whose first line names the columns: image, caption, ... (.tsv: separated by TABs)
    captions.txt     `name.jpg<TAB>caption` a line, or `name.jpg#0<TAB>caption` as in Flickr30K's results.token
    images/          a folder of images with a .txt beside each: a caption a line

`numbered_elements` gives the entries of one of them one at a time, with the numbers of their lines. They are the
entries that a JSON list would hold; what is in them, dataset.entries checks.
"""

import contextlib
import csv
import difflib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataset.shards import IMAGES
from utils import UserError, one_line, open_file, shown

log = logging.getLogger("semmim")

JSON_LINES = (".jsonl", ".ndjson")
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}  # the first of these that the line of names holds
TOKEN_FILES = (".txt", ".token")
PARQUET = ".parquet"  # not read here; see `parquet_problem`
IMAGE_ENDINGS = tuple(f".{ending}" for ending in IMAGES)
CAPTION_NUMBER = re.compile(r"#\d+$")  # 1000092795.jpg#0: the first of an image's captions
IDENTIFIERS = ("question_id", "image_id", "img_id", "cocoid", "imgid")  # columns whose whole numbers are numbers
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
LONGEST_CELL = 1 << 22  # characters; Python's own limit is 131,072


def numbered_elements(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, Any]] | None:
    """(line, element) of a file of lines; None where the file's name says that it is of no such kind.

    needed: the columns that a table must have. Raises UserError naming the file, the line and the remedy.
    """
    ending = path.suffix.lower()
    if ending in JSON_LINES:
        return _not_empty(path, _json_lines(path))
    if ending in SEPARATORS:
        return _not_empty(path, _table(path, SEPARATORS[ending], needed))
    if ending in TOKEN_FILES:
        return _not_empty(path, _token_lines(path))
    return None


def _not_empty(path: Path, elements: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    count = 0
    for count, item in enumerate(elements, 1):  # noqa: B007, the last one tells
        yield item
    if not count:
        raise UserError(f"{path}: holds no entry")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, counted from 1; the line with its end) of a text file in UTF-8, with or without a byte order mark."""
    number = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}: line {number}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8 "
            "(iconv -f latin1 -t utf-8, say)"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


# ------------------------------------------------------------------------------------------------- JSON lines


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Blank lines are nothing."""
    decode = json.JSONDecoder().decode
    for number, line in text_lines(path):
        try:
            yield number, decode(line)
        except json.JSONDecodeError as error:
            if line.strip():
                hint = "a list? name the file .json" if number == 1 and line.lstrip().startswith("[") else "one a line"
                raise UserError(f"{path}: line {number} is no JSON object ({error.msg}); {hint}") from None
        except RecursionError:
            raise UserError(f"{path}: line {number} is nested too deeply to be an entry") from None
        except ValueError as error:  # Python reads no number of more than 4,300 digits
            problem = str(error).split(";")[0]
            raise UserError(f"{path}: line {number} holds a number that is too long ({problem})") from None


# ------------------------------------------------------------------------------------------------- tables


def _table(path: Path, separators: str, needed: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The rows under the line of names, without their empty cells: a cell that is empty is a key that is missing.

    A cell holds text, or a JSON list of texts (["a dog", "a black dog"]); whole numbers in the columns of ids are
    numbers, as in JSON.
    """
    lines, taken = text_lines(path), [0]

    def texts() -> Iterator[str]:
        for taken[0], line in lines:
            yield line

    names = next((line for _, line in text_lines(path) if line.strip()), "")
    separator = next((mark for mark in separators if mark in names), separators[0])
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    first = 1
    try:
        rows = csv.reader(texts(), delimiter=separator, strict=True)
        columns = _columns(path, next((row for row in rows if row), []), needed)
        first = taken[0] + 1
        for row in rows:
            if any(map(str.strip, row)):  # else a blank line
                if len(row) != len(columns):
                    raise UserError(
                        f"{path}: line {first} has {len(row)} cells, but there are {len(columns)} columns "
                        f"({one_line(', '.join(columns))}); a cell with {_named(separator)} in it needs quotes"
                    )
                yield first, _row_entry(columns, row)
            first = taken[0] + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: line {first} is no row ({error}); a cell that begins with a quote needs quotes around it, and "
            "two for each in it"
        ) from None


def _columns(path: Path, row: list[str], needed: Sequence[str]) -> list[str]:
    """The names of the columns; UserError where one of `needed` is not among them."""
    columns = [name.strip() for name in row]
    for name, count in Counter(columns).items():
        if count > 1 and name:
            raise UserError(f"{path}: line 1 names the column {shown(name)} twice; a caption more is a row more")
    for name in needed:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1, 0.4)
            near = near or [other for other in columns if name in other.lower()]
            hint = f"rename {shown(near[0])} to {name}" if near else "the first line must name the columns"
            found = ", ".join(shown(other) for other in columns[:12]) or "none"
            raise UserError(f"{path}: line 1 has no column {name!r}, the columns are {found}; {hint}")
    return columns


def _row_entry(columns: list[str], row: list[str]) -> dict:
    entry = {}
    for name, cell in zip(columns, row, strict=True):
        if not cell:
            continue
        if cell[0] == "[" and cell.startswith(('["', "[[")):
            with contextlib.suppress(ValueError, RecursionError):
                cell = json.loads(cell)  # noqa: PLW2901
        elif name in IDENTIFIERS and WHOLE_NUMBER.fullmatch(cell):
            cell = int(cell)  # noqa: PLW2901
        entry[name] = cell
    return entry


def _named(separator: str) -> str:
    return "a TAB" if separator == "\t" else f"'{separator}'"


# ------------------------------------------------------------------------------------------------- token files


def _token_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """`name<TAB>caption`, and of `name#3<TAB>caption` the name; blank lines are nothing."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            hint = ""
            if number == 1 and "," in line:
                hint = "; a table? name the file .csv"
            raise UserError(f"{path}: line {number} has no TAB between the image's name and its caption{hint}")
        yield number, {"image": CAPTION_NUMBER.sub("", name.strip()), "caption": caption.strip()}


# ------------------------------------------------------------------------------------------------- folders


def folder_images(folder: Path) -> Iterator[tuple[str, Path | None]]:
    """(image, text file) of the images in a folder and the folders in it, in order of name, each with the .txt that has
    its name; None where there is no such file."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        present = set(names)
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() in IMAGE_ENDINGS:
                text = f"{stem}.txt"
                yield os.path.join(parent, name), Path(parent, text) if text in present else None


def captions_beside(text: Path | None) -> list[tuple[int, str]]:
    """[(line, caption), ...] of an image's text file, none without one. Blank lines are nothing. Raises UserError where
    the file cannot be read."""
    return [] if text is None else [(number, line.strip()) for number, line in text_lines(text) if line.strip()]


def folder_entries(folder: Path, kind: str) -> Iterator[tuple[Path, int, dict]]:
    """(text file, line, entry) of a folder of images, an entry a caption; images without one are warned of.

    kind: of the entries, for the remedy (a key of dataset.entries.KINDS). Raises UserError where no image has a
    caption, and where a text file cannot be read.
    """
    without, captions = [], 0
    for image, text in folder_images(folder):
        lines = captions_beside(text)
        for number, caption in lines:
            yield text, number, {"image": image, "caption": caption}
        captions += len(lines)
        if not lines:
            without.append(image)
    if not captions and not without:
        parquet = next(folder.rglob(f"*{PARQUET}"), None)
        problem = f"; {parquet_problem(parquet, kind)}" if parquet else ""
        raise UserError(f"{folder}: holds neither images ({', '.join(IMAGES)}) nor tar shards{problem}")
    if not captions:
        raise UserError(
            f"{folder}: none of its {len(without)} images has a .txt with captions beside it, a caption a line "
            f"({Path(without[0]).with_suffix('.txt').name} for {without[0]})"
        )
    if without:
        log.warning(
            "%s: %d images without a caption in a .txt beside them, left out; first: %s",
            one_line(folder, 1000),
            len(without),
            one_line(without[0], 1000),
        )


# ------------------------------------------------------------------------------------------------- parquet


def parquet_problem(path: Path, kind: str) -> str:
    """What is said of a parquet file where entries of a kind (a key of dataset.entries.KINDS) are to be read."""
    remedy = "pack its images and captions into tar shards with tools.shards, and name their folder"
    if kind.startswith("vqa"):  # which shards have no questions for
        remedy = "write its questions as JSON lines, and its images as files"
    return f"{path}: parquet is not read here; {remedy}"
