"""The search sheet of `tools.predict retrieve --output sheet.html`: one page for all queries, thumbnails in it."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from dataset.transforms import open_image
from semmim import SemMIM
from semmim.model import Hit
from tools import pages

THUMBNAIL = 256  # pixels of the longer side
SCORES = {"itm": "match", "itm+itc": "match + cosine", "itm+itc/t": "match + cosine / temperature"}
Item = Path | str


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
