"""The search sheet of `tools.predict retrieve --output sheet.html`: one page for all queries, thumbnails in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset.transforms import ImageError, open_image
from semmim import SemMIM
from semmim.search import Hit
from tools import pages

THUMBNAIL = 256  # pixels of the longer side
SUMS = {"itm+itc": "match + contrast", "itm+itc/t": "match + contrast / temperature"}  # scores that are sums
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
    (score, default), best = model.order(), model.content.best.get("order")
    if k is not None:
        why = f"as asked by --k {k}"
    elif best is None:
        why = "the default, since the checkpoint does not say which order was better on validation images"
    else:
        why = f"the better order on the checkpoint's validation images ({best})"
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
        by=SUMS.get(score, "match"),
        unit="log-odds" if score == "itm+itc/t" else "logit",
        is_sum=score in SUMS,
        why=why,
        queries=[section(path, *one, items, top) for one in zip(queries, found, strict=True)],
    )


def section(page: Path, query: Item, hits: Sequence[Hit], items: Sequence[Item], top: int) -> dict:
    """What the template needs of one query. Places count among all hits, bars go over those that are shown."""
    by_cosine = sorted(range(len(hits)), key=lambda i: -hits[i].cosine)
    by_match = sorted((i for i in range(len(hits)) if hits[i].match is not None), key=lambda i: -hits[i].match)
    shown = hits[:top]
    cosines, matches = [hit.cosine for hit in shown], [hit.match for hit in shown if hit.match is not None]
    rows = []
    for i, hit in enumerate(shown):
        item = items[hit.number]
        row = {"hit": hit, "name": str(item), "address": None, "cosine_place": 1 + by_cosine.index(i)}
        row["cosine_bar"] = bar(hit.cosine, cosines)
        if hit.match is not None:
            row |= {"match_place": 1 + by_match.index(i), "match_bar": bar(hit.match, matches)}
        if isinstance(item, Path):
            address, image = pages.relative(item, page), thumbnail(item, THUMBNAIL)
            row |= {"address": address, "short": item.name, "thumbnail": image}
        rows.append(row)
    is_image = isinstance(query, Path)
    image = thumbnail(query, 2 * THUMBNAIL) if is_image else None
    return {"title": query.name if is_image else f"“{query}”", "thumbnail": image, "rows": rows}


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
