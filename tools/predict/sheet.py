"""The search sheet of `tools.predict retrieve --output sheet.html`: one page for all queries, thumbnails in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset.transforms import ImageError, open_image
from semmim import SemMIM
from semmim.search import Hit
from tools import pages

THUMBNAIL = 256  # pixels of the longer side
SCORES = {"itm": "match", "itm+itc": "match + contrast", "itm+itc/t": "match + contrast / temperature"}
Item = Path | str


def write_sheet(
    path: Path,
    checkpoint: str,
    model: SemMIM,
    k: int | None,
    queries: Sequence[Item],
    items: Sequence[Item],
    found: Sequence[Sequence[Hit]],
    top: int,
) -> None:
    """One HTML file: what was searched and how, then a section a query with its `top` items.

    k: as it was asked for; items: what the hits' numbers count; found: of `SemMIM.search`. Thumbnails are part of the
    file; each links to its image, by its place relative to the sheet.
    """
    score, default = model.order()
    pages.write(
        path,
        "predict/sheet.html",
        title="Search results",
        checkpoint=checkpoint,
        stage=model.stage,
        items="images" if isinstance(items[0], Path) else "sentences",
        asked=len(found[0]),
        left_out=len(items) - len(found[0]),
        k=min(default if k is None else k, len(found[0])),
        by=SCORES[score],
        is_sum=score != "itm",
        queries=[section(path, query, hits[:top], items) for query, hits in zip(queries, found, strict=True)],
    )


def section(page: Path, query: Item, hits: Sequence[Hit], items: Sequence[Item]) -> dict:
    """What the template needs of one query: title, thumbnail, and a row for each item that is shown."""
    rows = []
    for hit in hits:
        item = items[hit.number]
        row = {"hit": hit, "name": str(item), "address": None}
        if isinstance(item, Path):
            row |= {"address": pages.relative(item, page), "short": item.name, "thumbnail": thumbnail(item, THUMBNAIL)}
        rows.append(row)
    if isinstance(query, Path):
        return {"title": query.name, "thumbnail": thumbnail(query, 2 * THUMBNAIL), "rows": rows}
    return {"title": f"“{query}”", "thumbnail": None, "rows": rows}


def thumbnail(path: Path, side: int) -> str | None:
    """The address of an image, `side` pixels on its longer side, with its data; None if it cannot be read."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    image.thumbnail((side, side))
    return pages.data_uri(image, "JPEG")
