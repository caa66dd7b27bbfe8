"""The search sheet of `tools/predict retrieve --output sheet.html`: one page for all queries, thumbnails in it."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

import utils
from dataset.transforms import ImageError, open_image
from semmim.search import Hit
from tools import pages
from tools.predict.files import printable

THUMBNAIL = 256  # pixels of the longer side
SUMS = {"itm+itc": "match + contrast", "itm+itc/t": "match + contrast / temperature"}  # scores that are sums
Query = Path | str


def write_sheet(
    path: Path, results: Sequence[tuple[Query, Sequence[Hit]]], items: Sequence[Query], *, score: str, **about
) -> None:
    """One HTML file: what was searched and how, then a section a query, best first.

    items: what the hits' numbers count; score: of re-ranking; about: checkpoint, stage, images and left_out (how many
    were read, and were not), asked (what each query ranked), k (candidates that were re-ranked, 0: none) and why.
    Thumbnails are part of the file; each links to its image, by its place relative to the sheet.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["printable"] = printable
    text = environment.get_template("sheet.html").render(
        **about,
        style=pages.STYLE,
        by=SUMS.get(score, "match"),
        unit="log-odds" if score == "itm+itc/t" else "logit",
        is_sum=score in SUMS,
        queries=[query_of(path.parent, query, hits, items) for query, hits in results],
    )
    with utils.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def query_of(folder: Path, query: Query, hits: Sequence[Hit], items: Sequence[Query]) -> dict:
    """What the template needs of one query."""
    found = [items[hit.number] for hit in hits]
    names = short_names(found) if hits and isinstance(found[0], Path) else found
    cosines, matches = [hit.cosine for hit in hits], [hit.match for hit in hits if hit.match is not None]
    rows = [
        {
            "hit": hit,
            "item": item,
            "name": shortened(printable(name)),
            "address": address(item, folder) if isinstance(item, Path) else None,
            "thumbnail": thumbnail(item, THUMBNAIL) if isinstance(item, Path) else None,
            "cosine_bar": bar(hit.cosine, cosines),
            "match_bar": None if hit.match is None else bar(hit.match, matches),
        }
        for hit, item, name in zip(hits, found, names, strict=True)
    ]
    is_image = isinstance(query, Path)
    title = query.name if is_image else f"“{query}”"
    return {"title": title, "thumbnail": thumbnail(query, 2 * THUMBNAIL) if is_image else None, "rows": rows}


def bar(value: float, values: Sequence[float]) -> int:
    """Its width in percent, of the lowest to the highest of the values."""
    low, high = min(values), max(values)
    return 100 if high == low else round(4 + 96 * (value - low) / (high - low))


def thumbnail(path: Path, side: int) -> str | None:
    """The address of an image, `side` pixels on its longer side, with its data; None if it cannot be read."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    image.thumbnail((side, side))
    return pages.data_uri(image, "JPEG")


def address(path: Path, folder: Path) -> str:
    return urllib.parse.quote(os.fsencode(os.path.relpath(path, folder)))


def shortened(name: str, length: int = 44) -> str:
    """A long name without its middle: the ends are what tells it from others."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names without the folders that all have in common."""
    if len({path.parent for path in paths}) == 1:
        return [path.name for path in paths]
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return [os.path.relpath(path.absolute(), common) for path in paths]
