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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import UserError, one_line, open_file

log = logging.getLogger("semmim")

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")  # endings of images' files
IMAGE_ENDINGS = tuple(f".{ending}" for ending in IMAGES)
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}  # the first of these that the line of names holds
CAPTION_NUMBER = re.compile(r"#\d+$")  # 1000092795.jpg#0: the first of an image's captions
PARQUET_PROBLEM = "parquet is not read here; pack it into tar shards with tools.shards (VQA: write JSON lines)"


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
            problem = f"line {number} is no JSON object ({one_line(error)})"
            raise UserError(f"{path}: {problem}; a list? name the file .json") from None


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


def table_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, entry) of the rows below the line of names.

    A cell holds text, or a JSON list of texts (["a dog", "a black dog"]); an empty one is a missing key. A row is one
    line: a quotation mark that is never closed would take the next rows into its cell.
    """
    columns, separators = None, SEPARATORS[path.suffix.lower()]
    for number, line in text_lines(path):
        if columns is None:
            separator = next((mark for mark in separators if mark in line), separators[0])
        try:
            cells = next(csv.reader([line], delimiter=separator, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{path}: line {number} is no row ({error}); a cell that begins with a quote needs quotes around it, "
                "and two for each in it; texts of several lines need JSON lines"
            ) from None
        if not any(map(str.strip, cells)):  # a blank line
            continue
        if columns is None:
            columns = [name.strip() for name in cells]
            if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
                raise UserError(f"{path}: names the column {twice[0]!r} twice; a caption more is a row more")
        elif len(cells) != len(columns):
            raise UserError(
                f"{path}: line {number} has {len(cells)} cells, but there are {len(columns)} columns; a cell with "
                f"{separator!r} in it needs quotes"
            )
        else:
            yield number, {name: _value(cell) for name, cell in zip(columns, cells, strict=True) if cell}


def _value(cell: str) -> str | list:
    if cell.startswith(('["', "[[")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


LINES = {  # ending: reader(path) -> (line, entry) of a file of lines
    **dict.fromkeys((".jsonl", ".ndjson"), json_lines),
    **dict.fromkeys((".txt", ".token"), token_lines),
    **dict.fromkeys(SEPARATORS, table_rows),
}


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
    without, captions, first = [], 0, {}
    for image, text in folder_images(folder):
        lines = captions_beside(text)
        if lines and first.setdefault(text, image) != image:
            raise UserError(
                f"{text}: captions {first[text]} and {one_line(image)}; is one of them a mask? move it away"
            )
        captions += len(lines)
        without += [] if lines else [image]
        for number, caption in lines:
            yield text, number, {"image": image, "caption": caption}
    if not captions:
        raise UserError(
            f"{folder}: holds no tar shard, and none of its {len(without)} images has a .txt beside it, a caption a "
            f"line; {PARQUET_PROBLEM}"
        )
    if without:
        log.warning(
            "%s: %d images have no caption in a .txt beside them, left out; first: %s",
            *(one_line(folder, 1000), len(without), one_line(without[0])),
        )
