"""The search sheet of `tools/predict.py retrieve --output sheet.html`: one page for all queries, thumbnails in it."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import pages
from tools.predict_files import printable

THUMBNAIL = 256  # pixels of the longer side
STYLE = """
.scores { display: grid; grid-template-columns: 1fr 1fr; gap: .1rem .5rem; font-size: .8rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.scores div { min-width: 0; } .scores b { display: block; font-size: .95rem; } .scores .off b { color: var(--gray); }
.bar { height: 5px; border-radius: 3px; background: var(--rule); margin-top: .15rem; }
.bar i { display: block; height: 100%; border-radius: 3px; } .match i { background: var(--orange); }
.match b { color: var(--orange); } .itc i { background: var(--blue); } .itc b { color: var(--blue); }
.texts { list-style: none; padding: 0; margin: .6rem 0; } .texts li { border-bottom: 1px solid var(--rule);
  padding: .5rem 0; display: grid; grid-template-columns: minmax(0, 1fr) minmax(9rem, 16rem); gap: .3rem 1rem; }
.sum { grid-column: 1 / -1; color: var(--gray); }
.query img { width: min(16rem, 100%); border-radius: .3rem; } .texts { max-width: 62rem; } .card a { display: block; }
@media (max-width: 600px) { .texts li { grid-template-columns: 1fr; } }
"""
UNITS = {  # what `match` is in, by the re-ranking score (evaluation.ranking.SCORES)
    "itm": "logit",
    "itm+itc": "logit",
    "itm+itc/t": "log-odds",
}
SUMS = {  # and the score itself, where it is a sum
    "itm+itc": "match + contrast",
    "itm+itc/t": "match + contrast / temperature",
}


@dataclass(frozen=True)
class Result:
    """What was found for a query: an image's path or a sentence, and its scores, each with the place by it alone.

    score: what the order is by, None where the fusion encoder was not asked; match: the fusion encoder's part of it;
    contrast: cosine of the two encoders' features. Places count from 1, among all that have the score.
    """

    item: Path | str
    score: float | None
    contrast: float
    contrast_place: int
    match: float | None
    match_place: int | None


@dataclass(frozen=True)
class About:
    """What the sheet's head says."""

    checkpoint: str
    stage: str
    images: int
    left_out: int  # images that cannot be read
    asked: int  # items that every query ranked: images, or sentences
    score: str  # of re-ranking
    k: int  # candidates that were re-ranked, 0 for none
    why: str  # this order and no other


def write_sheet(path: Path, about: About, results: Sequence[tuple[Path | str, Sequence[Result]]]) -> None:
    """One HTML file: what was searched and how, then a section per query, best first.

    Thumbnails are part of the file; each links to its image, by its place relative to the sheet.
    """
    sections = [section(path.parent, number, *found, about) for number, found in enumerate(results, 1)]
    jumps = [f'<a href="#q{number}">{title(query)}</a>' for number, (query, _) in enumerate(results, 1)]
    body = ["<h1>Search results</h1>", head(about, len(results))]
    body += [f"<nav>{''.join(jumps)}</nav>"] if len(jumps) > 1 else []
    pages.write_page(path, "Search results", "\n".join([*body, *sections]), STYLE)


def head(about: About, queries: int) -> str:
    left_out = f" ({about.left_out:,} more could not be read)" if about.left_out else ""
    order = "by <b>contrast</b> alone"
    if about.k:
        by, few = SUMS.get(about.score, "match"), min(about.k, about.asked)
        order = f"by <b>{by}</b>, of the first {few:,} of {about.asked:,} by contrast"
    images, asked = plural(about.images, "image"), plural(queries, "query")
    rows = [
        ("checkpoint", f"{html.escape(printable(about.checkpoint))} (stage: {html.escape(about.stage)})"),
        ("searched", f"{images}{left_out}; {asked}, each ranking {about.asked:,}"),
        ("order", f"{order}: {html.escape(about.why)}"),
    ]
    if about.k:
        what = f"{UNITS[about.score]} of the fusion encoder, which reads image and sentence together; candidates only"
        rows.append(("match (ITM)", what))
    rows.append(("contrast (ITC)", "cosine of the features of image and sentence, each encoded alone; from -1 to 1"))
    note = (
        "Higher is better. Compare the results of one query, not of different ones: a bar goes from the query's lowest "
        "shown score to its highest. #: the place by that score alone."
    )
    return pages.facts(rows) + f"<p class=note>{note}</p>"


def plural(count: int, noun: str) -> str:
    ending = "" if count == 1 else "s"
    return f"{count:,} " + (noun[:-1] + "ies" if ending and noun.endswith("y") else noun + ending)


def title(query: Path | str) -> str:
    """A query in a heading, as HTML."""
    text = html.escape(printable(query.name if isinstance(query, Path) else query))
    return text if isinstance(query, Path) else f"“{text}”"


def section(folder: Path, number: int, query: Path | str, found: Sequence[Result], about: About) -> str:
    parts = [f'<h2 id="q{number}">{title(query)}</h2>']
    if isinstance(query, Path):
        parts.append(f"<div class=query>{pages.thumbnail(query, 2 * THUMBNAIL, printable(query))}</div>")
    cells = [scores(result, found, about) for result in found]
    if isinstance(query, Path):
        rows = [
            f"<li><div><span class=place>{place}</span>{html.escape(result.item)}</div>{cell}</li>"
            for place, (result, cell) in enumerate(zip(found, cells, strict=True), 1)
        ]
        return "\n".join([*parts, "<ol class=texts>", *rows, "</ol>"])
    names = short_names([result.item for result in found])
    cards = [
        card(folder, place, result.item, name, cell)
        for place, (result, name, cell) in enumerate(zip(found, names, cells, strict=True), 1)
    ]
    return "\n".join([*parts, "<ol class=cards>", *cards, "</ol>"])


def card(folder: Path, place: int, path: Path, name: str, cell: str) -> str:
    whole, shown = (html.escape(printable(text), quote=True) for text in (path, pages.shortened(name)))
    image = pages.link(path, folder, pages.thumbnail(path, THUMBNAIL, printable(path)))
    label = f'<div class=name title="{whole}"><span class=place>{place}</span>{shown}</div>'
    return f"<li class=card>{image}{label}{cell}</li>"


def scores(result: Result, found: Sequence[Result], about: About) -> str:
    """Match and contrast side by side, each with its place and a bar over the range of the results shown."""
    parts = []
    if about.k and result.match is None:
        parts.append('<div class="match off">match<b>-</b>not re-ranked</div>')
    elif about.k:
        matches = [r.match for r in found if r.match is not None]
        parts.append(measure("match", "match", result.match, 2, result.match_place, matches))
    contrasts = [r.contrast for r in found]
    parts.append(measure("itc", "contrast", result.contrast, 3, result.contrast_place, contrasts))
    if about.k and about.score in SUMS and result.score is not None:
        parts.append(f"<div class=sum>together {result.score:.2f}</div>")
    return f"<div class=scores>{''.join(parts)}</div>"


def measure(kind: str, name: str, value: float, decimals: int, place: int, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    share = 100 if high == low else 4 + 96 * (value - low) / (high - low)
    bar = f'<div class=bar><i style="width:{share:.0f}%"></i></div>'
    return f"<div class={kind}>{name}<b>{value:.{decimals}f}</b>#{place}{bar}</div>"


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names without the folders that all have in common."""
    if len({path.parent for path in paths}) == 1:
        return [path.name for path in paths]
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return [os.path.relpath(path.absolute(), common) for path in paths]
