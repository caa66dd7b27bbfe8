"""The search sheet of `tools.predict retrieve --output sheet.html`: one page for all queries, thumbnails in it."""

from collections.abc import Sequence
from pathlib import Path

from dataset.transforms import open_image
from semmim import SemMIM
from semmim.search import Hit
from tools import pages

THUMBNAIL = 256  # pixels of the longer side
SCORES = {"itm": "match", "itm+itc": "match + cosine", "itm+itc/t": "match + cosine / temperature"}
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
        queries=[
            (shown(query, path), [(hit, shown(items[hit.number], path)) for hit in hits[:top]])
            for query, hits in zip(queries, found, strict=True)
        ],
    )


def shown(item: Item, page: Path) -> dict[str, str]:
    """What the template needs of a sentence or an image."""
    if isinstance(item, str):
        return {"name": item, "thumbnail": ""}
    image = open_image(item)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return {"name": item.name, "thumbnail": pages.data_uri(image, "JPEG"), "address": pages.relative(item, page)}
