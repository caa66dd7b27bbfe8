"""HTML pages that need no other file: one style for all of them, on a desk and on a phone, and images as data."""

from __future__ import annotations

import base64
import html
import io
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

import utils
from dataset.transforms import ImageError, open_image

# Nothing may be wider than a phone: tables scroll within their own box, cards stand in as many columns as there is room
# for, names break anywhere.
STYLE = """
:root { color-scheme: light; --ink: #191c22; --gray: #5b616c; --rule: #dfe2e8; --soft: #f3f4f7; --blue: #1f77b4;
  --orange: #c75a0c; --right: #1d7a3d; --wrong: #b3262d; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
  margin: 0 auto; max-width: 1240px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .8rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.4rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
a { color: #1a5d96; } p { max-width: 75ch; } .note { color: var(--gray); margin: .3rem 0; max-width: 75ch; }
.note, small, figcaption { color: var(--gray); } small { font-size: .85rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .8rem 0; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dl.facts dt { color: var(--gray); } dl.facts dd { margin: 0; min-width: 0; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { border-bottom: 2px solid var(--ink); white-space: normal; min-width: 3.6rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr { background: #fff; } th:first-child, td:first-child { position: sticky; left: 0; background: inherit; }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; }
table.words td:last-child { min-width: 12rem; }
tr.paper { background: var(--soft); } tr.ours { background: #e8f2fb; font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; } figure img { max-width: 100%; height: auto; display: block; }
figure.large img { min-width: min(640px, 100vw * 2); max-width: 100%; }
.charts { display: flex; flex-wrap: wrap; gap: .8rem; } .charts img { max-width: 100%; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 46%), 1fr)); gap: .8rem;
  list-style: none; margin: .6rem 0; padding: 0; }
.cards.broad { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.card { border: 1px solid var(--rule); border-radius: .5rem; padding: .5rem; min-width: 0; background: #fff; }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--soft); border-radius: .3rem;
  display: block; }
.card.right { border-color: var(--right); box-shadow: inset 0 0 0 2px var(--right); }
.card.wrong { border-color: var(--wrong); box-shadow: inset 0 0 0 2px var(--wrong); }
.name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  font-size: .85rem; line-height: 1.3; margin: .35rem 0; } .place { font-weight: 700; margin-right: .3rem; }
.right b, b.right { color: var(--right); } .wrong b, b.wrong { color: var(--wrong); }
@media (max-width: 600px) { dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: .4rem; }
  body { padding: .7rem; } h1 { font-size: 1.35rem; } }
"""


def page(title: str, body: str, style: str = "") -> str:
    """An HTML document in this project's style. title: plain text; body: HTML; style: further CSS."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def write_page(path: Path, title: str, body: str, style: str = "") -> None:
    """`page` into a file, whole or not at all. Raises utils.UserError where it cannot be written."""
    with utils.replacing(path) as temporary:
        temporary.write_text(page(title, body, style), encoding="utf-8")


def save_png(image: Image.Image, path: Path) -> None:
    """An image as PNG, whole or not at all. Raises utils.UserError where it cannot be written."""
    with utils.replacing(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are. rows: (plain text, HTML)"""
    return "<dl class=facts>" + "".join(f"<dt>{html.escape(name)}</dt><dd>{what}</dd>" for name, what in rows) + "</dl>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of plain text that scrolls sideways where it is wider than the page. kind: its CSS class"""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"<div class=wide>{opening}<thead>{line(headings, 'th')}</thead><tbody>{body}</tbody></table></div>"


# -------------------------------------------------------------------------------------------------------- images


def inline(image: Image.Image, description: str, scale: int = 1) -> str:
    """An <img> that carries its own data; scale: pixels of the image for one of the page."""
    size = f'width="{image.width // scale}" height="{image.height // scale}"'
    return f'<img alt="{html.escape(description, quote=True)}" {size} src="{data_uri(image)}">'


def thumbnail(path: str | Path, side: int, description: str = "") -> str:
    """An <img> of an image file, `side` pixels on its longer side; words in its place where it cannot be read."""
    try:
        image = open_image(str(path))
    except ImageError:
        return "<p class=note>(the image cannot be read)</p>"
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return f'<img alt="{html.escape(description, quote=True)}" loading="lazy" src="{data_uri(image, "JPEG")}">'


def data_uri(image: Image.Image, format: str = "PNG") -> str:
    """The image's bytes as an address."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 82} if format == "JPEG" else {"optimize": True}))
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------- names


def link(path: Path, page_folder: Path, text: str) -> str:
    """<a> to a file, by its address relative to the page's folder. text: HTML"""
    address = urllib.parse.quote(os.fsencode(os.path.relpath(path, page_folder)))
    return f'<a href="{address}">{text}</a>'


def slug(name: str) -> str:
    """A file name of letters, digits and underscores."""
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split()).lower()


def size_of(path: Path) -> str:
    """A file's size: "82 kB", "1.4 MB"."""
    count = path.stat().st_size
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def shortened(name: str, length: int = 44) -> str:
    """A long name without its middle: the ends are what tells it from others."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
