"""HTML pages that need no other file, from jinja2 templates below tools/: one style (page.css), images as data."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import utils

HERE = Path(__file__).parent
STYLE = (HERE / "page.css").read_text(encoding="utf-8")
DPI = 150  # of a figure


def write(path: Path, template: str, **values) -> None:
    """A page into a file, whole or not at all; template: below tools/, extends page.html; values: what it shows."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"image": data_uri, "printable": utils.printable}
    text = environment.get_template(template).render(style=STYLE, **values)
    with utils.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure, path: Path) -> None:
    """A matplotlib figure as PNG, whole or not at all."""
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def data_uri(image, kind: str = "PNG") -> str:
    """A Pillow image, a matplotlib figure or the path of a PNG file as an address that holds its bytes.

    kind: PNG or JPEG, of a Pillow image
    """
    buffer = io.BytesIO()
    if isinstance(image, Path):
        buffer.write(image.read_bytes())
    elif isinstance(image, Image.Image):
        image.save(buffer, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    else:
        image.savefig(buffer, format="png", dpi=DPI)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def relative(path: Path, page: Path) -> str:
    """The address of a file for a link on a page."""
    return urllib.parse.quote(os.fsencode(os.path.relpath(path, page.parent)))
