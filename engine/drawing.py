"""Drawing for figures: images side by side with headings and captions, patches in colors, heat maps, legends.

Everything takes and gives Pillow images. Small images are enlarged so that a figure reads at arm's length, and the text
is Pillow's own font, so that nothing beside Pillow is needed and no font is looked for on the machine.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, GRAY, RULE, PAPER = (25, 28, 34), (105, 110, 120), (216, 219, 224), (255, 255, 255)
ACCENT, HIDDEN = (214, 39, 40), (128, 128, 128)
GAP, MARGIN = 10, 18
TITLE, HEADING, TEXT = 28, 20, 18  # font sizes in pixels
# A color scale that is readable in print and by the color-blind, from low (dark) to high (light): viridis' anchors.
HEAT = np.array([(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)], float)
GOLDEN = 0.61803398875  # steps of hue that never come near an earlier one


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font."""
    return ImageFont.load_default(size)


# ------------------------------------------------------------------------------------------------------------ layout


def beside(images: Sequence[Image.Image], gap: int = GAP, align: float = 0.0) -> Image.Image:
    """Images from left to right; align: 0 at the top, 1 at the bottom."""
    height = max(image.height for image in images)
    canvas = Image.new("RGB", (sum(image.width for image in images) + gap * (len(images) - 1), height), PAPER)
    x = 0
    for image in images:
        canvas.paste(image, (x, round((height - image.height) * align)))
        x += image.width + gap
    return canvas


def below(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Images from top to bottom, flush left."""
    width = max(image.width for image in images)
    canvas = Image.new("RGB", (width, sum(image.height for image in images) + gap * (len(images) - 1)), PAPER)
    y = 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height + gap
    return canvas


def text(line: str, width: int, size: int = TEXT, color: tuple = INK) -> Image.Image:
    """A paragraph, wrapped at `width` pixels."""
    lines = wrap(line, width, size)
    step = round(size * 1.3)
    canvas = Image.new("RGB", (width, step * len(lines) + 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, part in enumerate(lines):
        draw.text((0, number * step), part, font=font(size), fill=color)
    return canvas


def wrap(line: str, width: int, size: int) -> list[str]:
    """The words of a line in lines of at most `width` pixels (a longer word gets a line of its own)."""
    lines = [""]
    for word in line.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def sheet(title: str, explanation: str, parts: Sequence[Image.Image]) -> Image.Image:
    """A whole figure: its title, what it shows, and its parts below each other on a margin."""
    width = max(*(part.width for part in parts), 640)
    head = [text(title, width, TITLE), text(explanation, width, TEXT, GRAY)]
    body = below([below(head, 4), *parts], 2 * GAP)
    canvas = Image.new("RGB", (body.width + 2 * MARGIN, body.height + 2 * MARGIN), PAPER)
    canvas.paste(body, (MARGIN, MARGIN))
    return canvas


def table(rows: Sequence[Sequence[Image.Image]], headings: Sequence[str], captions: Sequence[str] = ()) -> Image.Image:
    """Rows of images of one size below column headings; captions: a paragraph under each row."""
    side = rows[0][0].width
    top = max(len(wrap(heading, side, HEADING)) for heading in headings)
    parts = [beside([pad(text(heading, side, HEADING), round(HEADING * 1.3) * top + 2) for heading in headings])]
    for number, row in enumerate(rows):
        images = beside(row)
        caption = [text(captions[number], images.width)] if captions else []
        parts.append(below([images, *caption], 4))
    return below(parts, GAP + 4 if captions else 6)


def key(entries: Sequence[tuple[Image.Image, str]], width: int) -> Image.Image:
    """A legend: samples and what they mean, as many side by side as fit into `width`."""
    rows: list[list[Image.Image]] = [[]]
    for sample, meaning in entries:
        words = text(meaning, min(width - sample.width - 8, round(font(TEXT).getlength(meaning)) + 2))
        entry = beside([sample, words], 8, align=0.5)
        if rows[-1] and sum(part.width + 2 * GAP for part in rows[-1]) + entry.width > width:
            rows.append([])
        rows[-1].append(entry)
    return below([beside(row, 2 * GAP, align=0.5) for row in rows], 6)


def pad(image: Image.Image, height: int) -> Image.Image:
    """White above the image up to `height`."""
    canvas = Image.new("RGB", (image.width, max(height, image.height)), PAPER)
    canvas.paste(image, (0, canvas.height - image.height))
    return canvas


def widen(image: Image.Image, width: int) -> Image.Image:
    """White to the right of the image up to `width`."""
    canvas = Image.new("RGB", (max(width, image.width), image.height), PAPER)
    canvas.paste(image, (0, 0))
    return canvas


# ------------------------------------------------------------------------------------------------ images and patches


def to_image(pixels: torch.Tensor, side: int | None = None) -> Image.Image:
    """[3, H, W] in [0, 1] -> an image, enlarged or reduced to `side` pixels."""
    values = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(values)
    return image if side is None else image.resize((side, side), Image.Resampling.BICUBIC)


def paint(image: Image.Image, colors: np.ndarray, strength: float | np.ndarray = 1.0) -> Image.Image:
    """Patches in their colors over the image.

    colors: [g, g, 3] in 0..255, a color per patch from left to right, top to bottom; strength: 1 hides the image, 0
    leaves it; a number, or one per patch [g, g].
    """
    grid = colors.shape[0]
    share = np.broadcast_to(np.asarray(strength, float), (grid, grid))
    layer = enlarge(np.asarray(colors, float), image.size)
    share = enlarge(share[..., None], image.size)
    mixed = np.asarray(image, float) * (1 - share) + layer * share
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[g, g, C] -> [H, W, C], each value a rectangle."""
    columns = np.arange(size[0]) * values.shape[1] // size[0]
    rows = np.arange(size[1]) * values.shape[0] // size[1]
    return values[rows[:, None], columns[None]]


def hide(image: Image.Image, mask: np.ndarray, color: tuple = HIDDEN) -> Image.Image:
    """The image with the patches of mask [g, g] (True: hidden) in one color and thin lines between patches."""
    mask = np.asarray(mask, bool)
    colors = np.broadcast_to(np.array(color, float), (*mask.shape, 3))
    return lines(paint(image, colors, mask.astype(float)), mask.shape[0])


def heat(image: Image.Image, values: np.ndarray, strength: float = 0.72) -> Image.Image:
    """values [g, g] as colors from low to high over the image in gray; the range is that of the values."""
    low, high = float(values.min()), float(values.max())
    relative = (values - low) / max(high - low, 1e-9)
    return lines(paint(image.convert("L").convert("RGB"), heat_color(relative), strength), values.shape[0])


def heat_color(values: np.ndarray) -> np.ndarray:
    """[...] in [0, 1] -> [..., 3] in 0..255."""
    places = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, places, HEAT[:, channel]) for channel in range(3)], -1)


def scale(width: int = 160, height: int = 20) -> Image.Image:
    """The color scale of `heat`, from low to high."""
    return Image.fromarray(heat_color(np.tile(np.linspace(0, 1, width), (height, 1))).astype(np.uint8))


def lines(image: Image.Image, grid: int, color: tuple = (255, 255, 255), opacity: float = 0.25) -> Image.Image:
    """Faint lines between the patches of a grid x grid layout."""
    layer = image.copy()
    draw = ImageDraw.Draw(layer)
    for number in range(1, grid):
        x, y = number * image.width // grid, number * image.height // grid
        draw.line([(x, 0), (x, image.height)], fill=color)
        draw.line([(0, y), (image.width, y)], fill=color)
    return Image.blend(image, layer, opacity)


def colors_of(patterns: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """A color per pattern; neighbors in the list get colors that lie far apart."""
    result = {}
    for number, pattern in enumerate(dict.fromkeys(int(pattern) for pattern in patterns)):
        value, saturation = ((1.0, 0.75), (0.8, 0.9), (0.95, 0.45))[number // 12 % 3]
        rgb = colorsys.hsv_to_rgb(number * GOLDEN % 1, saturation, value)
        result[pattern] = tuple(round(255 * channel) for channel in rgb)
    return result


def crop_patch(image: Image.Image, place: int, grid: int, context: int, side: int) -> Image.Image:
    """Patch number `place` with `context` patches around it, the patch itself outlined, `side` pixels large.

    At the border the crop moves inwards, so that it always has its full size.
    """
    unit = image.width / grid
    row, column = divmod(place, grid)
    count = min(grid, 2 * context + 1)
    left, top = (min(max(at - context, 0), grid - count) for at in (column, row))
    box = tuple(round(edge * unit) for edge in (left, top, left + count, top + count))
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    if context:
        step = side / count
        x, y = (column - left) * step, (row - top) * step
        draw, width = ImageDraw.Draw(crop), max(2, side // 40)
        draw.rectangle([x - 1, y - 1, x + step, y + step], outline=PAPER)  # so that it shows on red as well
        draw.rectangle([x, y, x + step - 1, y + step - 1], outline=ACCENT, width=width)
    return crop


def swatch(color: tuple, side: int, label: str = "") -> Image.Image:
    """A square of one color, with a short label in the middle."""
    square = Image.new("RGB", (side, side), tuple(color))
    if label:
        dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 130
        draw = ImageDraw.Draw(square)
        draw.text(
            (side / 2, side / 2), label, font=font(min(TEXT, side // 3)), fill=INK if dark else PAPER, anchor="mm"
        )
    return square
