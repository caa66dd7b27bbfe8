"""What the commands of tools/predict share: progress on the terminal, files of lines, rows and features."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

import utils
from dataset.files import text_lines

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a formula in a spreadsheet


def output_path(name: str | None, endings: Sequence[str]) -> Path | None:
    """--output as a path; UserError before the work if it cannot be written or its ending says nothing."""
    if name is None:
        return None
    path = utils.new_file(name, "--output")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise utils.UserError(f"--output {name}: give a file in a folder that exists and can be written")
    if path.suffix.lower() not in endings:
        raise utils.UserError(f"--output {name}: the name must end in {' or '.join(endings)}")
    return path


def write_rows(rows: Iterable[dict], path: Path | None) -> None:
    """Write rows into a file of JSON lines or CSV, or print them; one by one, so that an interrupted command leaves
    what it has found. The file is opened when there is a first row."""
    is_csv, table = path is not None and path.suffix.lower() == ".csv", None
    with contextlib.ExitStack() as stack:
        for number, row in enumerate(rows):
            if path is None:
                tqdm.write("\t".join("-" if x is None else utils.printable(str(x)) for x in row.values()))
                continue
            row = {key: utf8(x) if isinstance(x, str | Path) else x for key, x in row.items()}
            if number == 0:
                file = stack.enter_context(open(path, "w", encoding="utf-8", newline=""))
            if is_csv and number == 0:
                table = csv.DictWriter(file, list(row))
                table.writeheader()
            if is_csv:
                formulas = [key for key, x in row.items() if isinstance(x, str) and x.startswith(FORMULA)]
                table.writerow(row | {key: f"'{row[key]}" for key in formulas})
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if path:
        note(f"wrote {path}")


def write_features(path: Path, features: dict[str, np.ndarray], names: dict[str, Sequence]) -> None:
    """Arrays and what their rows are (in .safetensors as JSON in the metadata); no pickle, so that any program may read
    them."""
    texts = {key: [utf8(value) for value in values] for key, values in names.items()}
    with utils.replacing(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            save_file(features, temporary, metadata={key: json.dumps(values) for key, values in texts.items()})
        else:
            with open(temporary, "wb") as file:  # given a name, NumPy would add an extension
                np.savez(file, **features, **{key: np.array(values, dtype=str) for key, values in texts.items()})


def read_lines(option: str, name: str | None) -> list[str]:
    """The lines of a text file that hold something, [] if no file is named."""
    lines = () if name is None else text_lines(utils.find_file(name, option))
    return [line.strip() for _, line in lines if line.strip()]


def progress(paths: Sequence[Path], label: str) -> tqdm:
    """The paths, with a bar on the terminal that goes on as they are read."""
    return tqdm(paths, desc=label, unit=" images", disable=None)


def left_out(image: object, error: Exception) -> None:
    """Say which image cannot be read, and why."""
    note(f"left out: {error}")


def note(line: str) -> None:
    """A line that is no result, on stderr."""
    tqdm.write(utils.printable(line), file=sys.stderr)


def utf8(item: object) -> str:
    """`item` as text that any file takes: a file's name may hold bytes that are not UTF-8."""
    return str(item).encode(errors="replace").decode()
