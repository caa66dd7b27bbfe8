"""HTML pages that need no other file, from jinja2 templates below tools/: one style (page.css), images as data."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from utils import replacing

HERE = Path(__file__).parent


def write(path: Path, template: str, **values) -> None:
    """A page into a file, whole or not at all; template: below tools/, extends page.html; values: what it shows."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters["image"] = data_uri
    style = (HERE / "page.css").read_text(encoding="utf-8")
    with replacing(path) as temporary:
        text = environment.get_template(template).render(style=style, **values)
        temporary.write_text(text, encoding="utf-8", errors="replace")  # names may be no UTF-8


def data_uri(image) -> str:
    """A Pillow image (as JPEG), the path of a PNG file or a matplotlib figure as an address that holds its bytes."""
    buffer, kind = io.BytesIO(), "png"
    if isinstance(image, Image.Image):
        kind = "jpeg"
        image.save(buffer, kind, quality=82)
    elif isinstance(image, Path):
        buffer.write(image.read_bytes())
    else:
        image.savefig(buffer, format="png", dpi=150)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def relative(path: Path, page: Path) -> str:
    """The address of a file for a link on a page."""
    return urllib.parse.quote(os.fsencode(os.path.relpath(path, page.parent)))
