"""Users' files, read entry by entry: JSON, JSON lines, tables with named columns, token files, folders of images.

The kinds of files: docs/data.md. All errors are UserErrors that name the file, the line or entry, and the remedy. What
is in the entries, dataset.annotations checks.
"""

import contextlib
import csv
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils import UserError, one_line, open_file

log = logging.getLogger("semmim")

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")  # endings of images' files
IMAGE_ENDINGS = tuple(f".{ending}" for ending in IMAGES)
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}  # the first of these that the line of names holds
CAPTION_NUMBER = re.compile(r"#\d+$")  # 1000092795.jpg#0: the first of an image's captions
PARQUET_PROBLEM = "parquet is not read here; pack it into tar shards with tools.shards (VQA: write JSON lines)"
LONGEST_CELL = 1 << 22  # characters; Python's own limit is 131,072


# ------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte order mark."""
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        remedy = "an object a line? name it .jsonl" if error.msg == "Extra data" else "an incomplete download?"
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, numbers of 4,300 digits, lists of lists of ...
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)})") from None


def json_list(path: Path, key: str | None = None) -> list:
    """The list that a JSON file holds or, if it is an object, the one under its `key`."""
    content = read_json(path)
    found = content.get(key) if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise UserError(f"{path}: holds no JSON list{f' {key!r}' if key else ''}; is it the right file?")
    return found


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of a JSON value a line; blank lines are nothing."""
    for number, line in text_lines(path):
        try:
            if line.strip():
                yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
            raise UserError(
                f"{path}: line {number} is no JSON object ({reason}); a list? name the file .json"
            ) from None


# ------------------------------------------------------------------------------------------------- lines and tables


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, counted from 1; the line with its end) of a text file in UTF-8, with or without a byte order mark."""
    number = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: line {number}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def token_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, entry) of `name<TAB>caption` lines, and of `name#3<TAB>caption` with the name alone."""
    for number, line in text_lines(path):
        name, tab, caption = line.partition("\t")
        if tab:
            yield number, {"image": CAPTION_NUMBER.sub("", name.strip()), "caption": caption.strip()}
        elif line.strip():
            raise UserError(
                f"{path}: line {number} has no TAB between the image's name and its caption; a table? name it .csv"
            )


def table_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """(line, entry) of the rows below the line of names, which must hold the columns `needed`.

    A cell holds text, or a JSON list of texts (["a dog", "a black dog"]); an empty one is a missing key. A quotation
    mark that is never closed takes the next rows into its cell: a row of several lines is refused if more than one of
    them has, in the place of the image, the name of one. needed: the image's column first.
    """
    separators = SEPARATORS[path.suffix.lower()]
    names = next((line for _, line in text_lines(path) if line.strip()), "")
    separator = next((mark for mark in separators if mark in names), separators[0])
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    rows, line = csv.reader((line for _, line in text_lines(path)), delimiter=separator, strict=True), 1
    try:
        columns = [name.strip() for name in next((row for row in rows if row), [])]
        found = one_line(", ".join(map(repr, columns))) or "none"
        if missing := [name for name in needed if name not in columns]:
            raise UserError(f"{path}: line 1 must name a column {missing[0]!r}, the columns are {found}")
        if len(set(filter(None, columns))) < len(list(filter(None, columns))):
            raise UserError(f"{path}: line 1 names a column twice ({found}); a caption more is a row more")
        line, place = rows.line_num + 1, columns.index(needed[0])
        for row in rows:
            if any(map(str.strip, row)):  # else a blank line
                if len(row) != len(columns):
                    raise UserError(
                        f"{path}: line {line} has {len(row)} cells, but there are {len(columns)} columns ({found}); "
                        f"a cell with {separator!r} in it needs quotes"
                    )
                if rows.line_num > line and _are_several(row, place, separator):
                    raise UserError(
                        f"{path}: lines {line} to {rows.line_num} are one row by their quotation marks, but look like "
                        'several; write "" for a mark inside a quoted cell, or JSON lines'
                    )
                yield line, {name: _value(cell) for name, cell in zip(columns, row, strict=True) if cell}
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: line {line} is no row ({error}); a cell that begins with a quote needs quotes around it, and "
            "two for each in it"
        ) from None


def _are_several(row: list[str], place: int, separator: str) -> bool:
    """Whether several lines of a row have an image in its place, counted from either end."""

    def ending(cell: str) -> str:
        return os.path.splitext(cell.strip())[1].lower()

    endings = {ending(row[place]), *IMAGE_ENDINGS}
    lines = [line.split(separator) for line in separator.join(row).split("\n")]
    places = [(cells[place], cells[place - len(row)]) for cells in lines if len(cells) >= len(row)]
    return "\n" in row[place] or sum(not endings.isdisjoint(map(ending, cells)) for cells in places) > 1


def _value(cell: str) -> str | list:
    if cell.startswith(('["', "[[")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


LINES = {  # ending: reader(path, needed columns) -> (line, entry) of a file of lines
    **dict.fromkeys((".jsonl", ".ndjson"), lambda path, needed: json_lines(path)),
    **dict.fromkeys((".txt", ".token"), lambda path, needed: token_lines(path)),
    **dict.fromkeys(SEPARATORS, table_rows),
}


# ------------------------------------------------------------------------------------------------- folders


def folder_images(folder: Path) -> Iterator[tuple[str, Path | None]]:
    """(image, text file) of the images in a folder and the folders in it, in order of name, each with the .txt that has
    its name; None without one."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        present = set(names)
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() in IMAGE_ENDINGS:
                text = f"{stem}.txt"
                yield os.path.join(parent, name), Path(parent, text) if text in present else None


def captions_beside(text: Path | None) -> list[tuple[int, str]]:
    """[(line, caption), ...] of an image's text file, none without one. Blank lines are nothing."""
    return [] if text is None else [(number, line.strip()) for number, line in text_lines(text) if line.strip()]


def folder_entries(folder: Path) -> Iterator[tuple[Path, int, dict]]:
    """(text file, line, entry) of a folder of images, an entry a caption; images without one are warned of."""
    without, captions, first, shared = [], 0, {}, []
    for image, text in folder_images(folder):
        lines = captions_beside(text)
        captions += len(lines)
        without += [] if lines else [image]
        shared += [image] if lines and first.setdefault(text, image) != image else []
        for number, caption in lines:
            yield text, number, {"image": image, "caption": caption}
    if not captions:
        raise UserError(
            f"{folder}: holds no tar shard, and none of its {len(without)} images has a .txt beside it, a caption a "
            f"line; {PARQUET_PROBLEM}"
        )
    for images, problem in (
        (without, "have no caption in a .txt beside them, left out"),
        (shared, "share another's .txt (a mask? it would be trained on)"),
    ):
        if images:
            log.warning(
                "%s images %s; first: %s", one_line(f"{folder}: {len(images)}", 1000), problem, one_line(images[0])
            )
