"""What the commands of tools/predict share: images with progress, files of lines, rows and features."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

import utils
from semmim import SemMIM

ROWS = (".jsonl", ".csv")  # files of rows, by extension
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a formula in a spreadsheet


def output_path(name: str | None, extensions: Sequence[str]) -> Path | None:
    """--output as a path; UserError before the work if it cannot be written or its extension says nothing."""
    if name is None:
        return None
    path = Path(name).expanduser()
    usable = path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)
    if not usable or (path.exists() and not path.is_file()):  # a folder, a pipe, a device
        raise utils.UserError(
            f"--output {name}: give a file in a folder that exists and can be written, such as result{extensions[0]}"
        )
    if path.suffix.lower() not in extensions:
        raise utils.UserError(f"--output {name}: the name must end in {' or '.join(extensions)}")
    return path


@contextlib.contextmanager
def rows_to(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[dict | None, str | None], None]]:
    """A function (row, line): it writes the row, a dict with `columns`, into a file of JSON lines or CSV; without a
    file it prints the line.

    Row by row, so that an interrupted command leaves what it has found.
    """
    if path is None:
        yield lambda row, line=None: None if line is None else print(line)
        return
    try:
        file = open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise utils.UserError(f"--output {path}: cannot be written ({error.strerror})") from None
    table, is_csv = csv.DictWriter(file, columns), path.suffix.lower() == ".csv"

    def write(row: dict | None, line: str | None = None) -> None:
        cells = {key: utf8(x) if isinstance(x, str | Path) else x for key, x in (row or {}).items()}
        if is_csv:
            cells = {key: f"'{x}" if isinstance(x, str) and x.startswith(FORMULA) else x for key, x in cells.items()}
        if cells:
            table.writerow(cells) if is_csv else file.write(json.dumps(cells, ensure_ascii=False) + "\n")

    with file:
        if is_csv:
            table.writeheader()
        yield write
    note(f"wrote {path}")


def write_features(path: Path, features: dict[str, np.ndarray], names: dict[str, list[str]]) -> None:
    """Arrays and what their rows are; no pickle, so that any program may read them."""
    with utils.replacing(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            save_file(features, temporary, metadata={key: json.dumps(value) for key, value in names.items()})
        else:
            with open(temporary, "wb") as file:  # given a name, NumPy would add an extension
                np.savez(file, **features, **{key: np.array(value, dtype=str) for key, value in names.items()})


def read_lines(option: str, name: str | None) -> list[str]:
    """The lines of a text file that hold something, [] if no file is named."""
    if name is None:
        return []
    with utils.open_file(utils.find_file(name, option)) as file:
        try:
            lines = file.read().decode().splitlines()
        except UnicodeDecodeError as error:
            raise utils.UserError(f"{option} {name}: not a text file in UTF-8 ({error})") from None
    return [line.strip() for line in lines if line.strip()]


# ---------------------------------------------------------------------------------------------- images, the terminal


def progress(paths: Sequence[Path], label: str) -> tqdm:
    """The paths, with a bar on the terminal that goes on as they are read."""
    return tqdm(paths, desc=label, unit=" images", disable=None)


def batches(model: SemMIM, paths: Sequence[Path], label: str) -> Iterator[tuple[torch.Tensor, list[Path]]]:
    """(preprocessed images [n, 3, S, S], their paths), with progress; those that cannot be read are left out."""
    for images, places in model.batches(progress(paths, label), left_out):
        yield images, [paths[place] for place in places]


def left_out(image: object, error: Exception) -> None:
    note(f"left out: {error}")


def note(line: str) -> None:
    """A line that is no result, on stderr."""
    tqdm.write(printable(line), file=sys.stderr)


def printable(item: object) -> str:
    """`item` in one line that a terminal only shows: names of files may hold line breaks and escape codes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(item))


def utf8(item: object) -> str:
    """`item` as text that any file takes: a file's name may hold bytes that are not UTF-8."""
    return str(item).encode(errors="replace").decode()
