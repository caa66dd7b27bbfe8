"""What the commands of tools/predict.py share: options, images of files and folders, progress, rows of results."""

import argparse
import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import utils
from dataset.reading import read_batches
from evaluation.sharded import ProgressLine
from semmim import SemMIM

ROWS = (".jsonl", ".csv")  # files of rows, by extension


def add_common(parser: argparse.ArgumentParser, checkpoint: str, output: str, precision: str = "fp32") -> None:
    """--checkpoint, --output, --device, --precision and --batch_size; the first two with a command's own help."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=f"file, run's folder, exported folder or hub name, {checkpoint}")
    add("--output", help=output)
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    add("--precision", choices=("auto", "bf16", "fp32"), default=precision, help="(default: %(default)s)")
    add("--batch_size", type=int, default=64, help="images of one forward (default: %(default)s)")


def load(args: argparse.Namespace) -> SemMIM:
    """The model that the options name, where they say."""
    if args.batch_size < 1:
        raise utils.UserError(f"--batch_size {args.batch_size}: give at least 1")
    options = {"device": args.device, "precision": args.precision, "batch_size": args.batch_size}
    return SemMIM.from_pretrained(args.checkpoint, **options)


def check_output(name: str | None, extensions: Sequence[str]) -> Path | None:
    """--output as a path; UserError before the work where it cannot be written or its extension says nothing."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise utils.UserError(
            f"--output {name}: give a file in a folder that exists and can be written, such as result{extensions[0]}"
        )
    if path.suffix.lower() not in extensions:
        raise utils.UserError(f"--output {name}: the name must end in {' or '.join(extensions)}")
    return path


@contextlib.contextmanager
def rows_to(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[dict], object]]:
    """What writes a row (a dict with `columns`) into a file of JSON lines or CSV; nothing where there is no path.

    Row by row, so that an interrupted command leaves what it has found.
    """
    if path is None:
        yield lambda row: None
        return
    try:
        file = open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise utils.UserError(f"--output {path}: cannot be written ({error.strerror})") from None
    with file:
        if path.suffix.lower() == ".csv":
            table = csv.DictWriter(file, columns)
            table.writeheader()
            yield table.writerow
        else:
            yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
    note(f"wrote {path}")


def image_batches(model: SemMIM, paths: Sequence[Path], label: str) -> Iterator[tuple[torch.Tensor, list[Path]]]:
    """Yield (images [n, 3, S, S], their paths), with progress on stderr, where those that cannot be read are named.

    Raises utils.UserError at the end where none can be read.
    """
    progress = ProgressLine(label, "images", len(paths), note)
    for images, places in read_batches(
        paths, model.preprocess, model.batch_size, lambda path, error: note(f"left out: {error}")
    ):
        yield images, [paths[place] for place in places]
        progress.advance(len(places))
    progress.close()


def read_lines(option: str, name: str | None) -> list[str]:
    """The lines of a text file that hold something, [] where no file is named."""
    if name is None:
        return []
    try:
        lines = utils.find_file(name, option).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise utils.UserError(f"{option} {name}: not a readable text file ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def note(line: str) -> None:
    """A line that is no result, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def printable(item: object) -> str:
    """`item` as text that any UTF-8 file or terminal takes: a file's name may hold bytes that are not UTF-8."""
    return str(item).encode(errors="replace").decode()
