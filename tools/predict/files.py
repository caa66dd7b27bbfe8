"""What the commands of tools/predict read and write: images in folders, lines, rows, features, the search sheet."""

import csv
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import utils
from dataset.files import IMAGE_ENDINGS, folder_images, text_lines
from dataset.transforms import open_image
from semmim import SemMIM
from semmim.model import Hit
from tools import pages

THUMBNAIL = 256  # pixels of the longer side
SCORES = {"itm": "match", "itm+itc": "match + cosine", "itm+itc/t": "match + cosine / temperature"}
Item = Path | str
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a formula in a spreadsheet


def find_images(names: Sequence[str]) -> list[Path]:
    """The files named, and those in the folders named, each once."""
    found: list[Path] = []
    for name in names:
        path = utils.find_file(name, "image")
        inside = images_in(path) if path.is_dir() else [path]
        if not inside:
            raise utils.UserError(f"{path}: no image in this folder ({', '.join(IMAGE_ENDINGS)})")
        found += inside
    return list(dict.fromkeys(found))


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, in order of name."""
    return sorted(Path(image) for image, _ in folder_images(folder))


def read_lines(name: str) -> list[str]:
    """The lines of a text file that hold something."""
    return [line.strip() for _, line in text_lines(utils.find_file(name)) if line.strip()]


def output_path(name: str | None, endings: Sequence[str]) -> Path | None:
    """--output as a path, before the work; UserError if it cannot be written or its ending says nothing."""
    if name is None:
        return None
    path = utils.new_file(name, "--output")
    if path.suffix not in endings:
        raise utils.UserError(f"--output {name}: the name must end in {' or '.join(endings)}")
    utils.make_folder(path.parent)
    return path


def write_rows(rows: Iterable[dict], path: Path | None) -> None:
    """Write rows into a file of JSON lines or CSV, or print them; one by one, so that an interrupted command leaves
    what it has found. The file is opened when there is a first row."""
    if path is None:
        for row in rows:
            tqdm.write("\t".join("-" if x is None else utils.one_line(x, 1000) for x in row.values()))
        return
    rows = iter(rows)
    first = next(rows, {})
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:  # names may be no UTF-8
        table = csv.DictWriter(file, list(first)) if path.suffix == ".csv" else None
        if table:
            table.writeheader()
        for row in itertools.chain([first], rows):
            if table:
                texts = {key: str(x) for key, x in row.items() if isinstance(x, str | Path)}
                table.writerow(row | {key: f"'{x}" for key, x in texts.items() if x.startswith(FORMULA)})
            else:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    note(f"wrote {path}")


def write_features(path: Path, features: dict[str, np.ndarray], names: dict[str, Sequence]) -> None:
    """Arrays and what their rows are; no pickle, so that any program may read them."""
    with utils.replacing(path) as temporary, open(temporary, "wb") as file:  # given a name, NumPy adds an extension
        np.savez(file, **features, **{key: np.array(values, dtype=str) for key, values in names.items()})


def note(line: object) -> None:
    """A line that is no result, on stderr."""
    tqdm.write(utils.one_line(line, 1000), file=sys.stderr)


def write_sheet(
    args: Namespace, model: SemMIM, queries: Sequence[Item], items: Sequence[Item], found: Sequence[Sequence[Hit]]
) -> None:
    """What was searched and how, then a section a query with its first items, which the hits' numbers count."""
    pages.write(
        args.output,
        "predict/sheet.html",
        title="Search results",
        checkpoint=args.checkpoint,
        stage=model.stage,
        items="images" if isinstance(items[0], Path) else "sentences",
        asked=len(found[0]),
        left_out=len(items) - len(found[0]),
        k=sum(hit.score is not None for hit in found[0]),
        by=SCORES[model.order()[0]],
        queries=[
            (shown(query, args.output), [(hit, shown(items[hit.number], args.output)) for hit in hits[: args.top]])
            for query, hits in zip(queries, found, strict=True)
        ],
    )


def shown(item: Item, page: Path) -> dict[str, str]:
    """What the template needs of a sentence or an image; the image is a link, by its place relative to the page."""
    if isinstance(item, str):
        return {"name": item, "thumbnail": ""}
    image = open_image(item)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return {"name": item.name, "thumbnail": pages.data_uri(image), "address": pages.relative(item, page)}
