"""The figures of a pre-training model, by matplotlib; Pretrain.py draws one of them after every epoch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

SIDE = 1.5  # inches of an image
NAMED = 6  # patterns in a legend
HIDDEN = (0.5, 0.5, 0.5)
GOLDEN = 0.61803398875  # steps of hue that never come near an earlier one
Cell = tuple[str, Callable]  # heading, and what draws on matplotlib's axes
Color = tuple[float, float, float]


def pixels(figure: Figure) -> Tensor:
    """A figure as an image [3, H, W], float in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1) / 255


def sheet(
    title: str,
    explanation: str,
    rows: Sequence[Sequence[Cell]],
    captions: Sequence[str],
    legend: dict[str, Color] | None = None,
) -> Figure:
    """Rows of images, a caption below each row, headings above the first cells that they are about."""
    columns = max(map(len, rows))
    wide = max(70, round(columns * SIDE * 14))  # characters of a line
    words, legend = textwrap.wrap(explanation, wide), legend or {}
    captions = [textwrap.wrap(caption, wide) for caption in captions]
    top, gap = 0.75 + 0.17 * len(words), 0.3 + 0.16 * max(map(len, captions))  # inches
    bottom = gap + 0.25 * -(-len(legend) // 4)
    width, height = max(columns * SIDE, 5) + 0.3, top + bottom + SIDE * len(rows) + gap * (len(rows) - 1)
    figure = Figure((width, height), dpi=130)
    place = {"left": 0.15 / width, "right": 1 - 0.15 / width, "top": 1 - top / height, "bottom": bottom / height}
    axes = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={**place, "hspace": gap / SIDE, "wspace": 0.06}
    )
    figure.text(place["left"], 1 - 0.08 / height, title, va="top", weight="bold")
    figure.text(place["left"], 1 - 0.36 / height, "\n".join(words), va="top", fontsize="small", color="dimgray")
    above: list[str] = []
    for line, cells, caption in zip(axes, rows, captions, strict=True):
        for part in line:
            part.axis("off")
        for part, (heading, draw) in zip(line, cells, strict=False):
            if heading not in above:
                part.set_title("\n".join(textwrap.wrap(heading, 20)), fontsize="small")
            draw(part)
        above = [heading for heading, _ in cells]
        line[0].text(0, -0.04, "\n".join(caption), transform=line[0].transAxes, va="top", fontsize="small")
    if legend:
        handles = [Patch(color=color, label=name) for name, color in legend.items()]
        figure.legend(handles=handles, loc="lower left", ncols=4, fontsize="small", frameon=False)
    return figure


# ------------------------------------------------------------------------------------- what is drawn in a cell


def picture(image: Image.Image) -> Callable:
    return lambda axes: axes.imshow(image)


def hidden(image: Image.Image, mask: Tensor) -> Callable:
    """The image with the patches of mask [N] (True: hidden) in gray."""

    def draw(axes) -> None:
        axes.imshow(image)
        overlay(axes, image, np.dstack([np.broadcast_to(HIDDEN, (*square(mask).shape, 3)), square(mask)]))

    return draw


def heat(image: Image.Image, values: Tensor) -> Callable:
    """values [N] as colors, from the lowest (dark) to the highest (light), over the image in gray."""

    def draw(axes) -> None:
        axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        overlay(axes, image, square(values), cmap="viridis", alpha=0.72)

    return draw


def layout(image: Image.Image, patterns: Tensor, colors: dict[int, Color]) -> Callable:
    """Patches in the color of their pattern [N] over the image in gray; those of pattern -1 are faded."""
    grid = square(patterns).astype(int)
    values = np.array([[(*colors[p], 0.7) if p >= 0 else (1, 1, 1, 0.6) for p in row] for row in grid.tolist()])

    def draw(axes) -> None:
        axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        overlay(axes, image, values)

    return draw


def crop(image: Image.Image, place: int, grid: int, context: int = 1) -> Callable:
    """Patch number `place` outlined, with `context` patches around it; at the border the crop moves inwards."""
    unit, count = image.width / grid, min(grid, 2 * context + 1)
    row, column = divmod(place, grid)
    left, top = (min(max(at - context, 0), grid - count) * unit for at in (column, row))

    def draw(axes) -> None:
        axes.imshow(image, extent=(0, image.width, image.height, 0))
        axes.add_patch(Rectangle((column * unit, row * unit), unit, unit, fill=False, edgecolor="red", linewidth=1.5))
        axes.set_xlim(left, left + count * unit)
        axes.set_ylim(top + count * unit, top)

    return draw


def overlay(axes, image: Image.Image, values: np.ndarray, **options) -> None:
    """values [g, g] or [g, g, 4], each a rectangle, over the whole image"""
    axes.imshow(values, extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5), interpolation="nearest", **options)


def square(values: Tensor) -> np.ndarray:
    """[N] -> [g, g] on the CPU"""
    side = round(values.numel() ** 0.5)
    return values.detach().cpu().float().view(side, side).numpy()


# --------------------------------------------------------------------------------------------------- colors


def by_frequency(patterns: Tensor) -> list[int]:
    """The patterns that occur, the most frequent first."""
    values, counts = patterns.flatten().unique(return_counts=True)
    return values[counts.argsort(descending=True, stable=True)].tolist()


def colors_of(patterns: Sequence[int]) -> dict[int, Color]:
    """A color per pattern; neighbors in the list get colors that lie far apart."""
    styles = ((0.75, 1.0), (0.9, 0.8), (0.45, 0.95))  # saturation and value
    return {p: tuple(hsv_to_rgb((i * GOLDEN % 1, *styles[i // 12 % 3]))) for i, p in enumerate(dict.fromkeys(patterns))}


def legend_of(patterns: Tensor, colors: dict[int, Color], prefix: str = "") -> dict[str, Color]:
    """Of the most frequent patterns, {name with its share of the patches: color}"""
    shares = {p: float((patterns == p).float().mean()) for p in by_frequency(patterns)[:NAMED]}
    return {f"{prefix}pattern {p} ({share:.0%})": colors[p] for p, share in shares.items()}


def masking_figure(
    views: Sequence[Image.Image],
    masks: dict[str, Tensor],
    captions: Sequence[str],
    similarity: Tensor | None = None,
    patterns: Tensor | None = None,
    clean: Sequence[Image.Image] | None = None,
    title: str = "What is masked",
) -> Figure:
    """A row per pair, its caption below: the images, each kind of mask, the similarity map, the pattern layout.

    views: B images that are masked; masks: {heading: [B, N] bool, True = masked}; similarity: [B, N] of each patch with
    the caption; patterns: [B, N] pattern of each patch; clean: the B views that stay whole.
    """
    colors = colors_of(by_frequency(patterns)) if patterns is not None else {}
    rows: list[list[Cell]] = []
    for i, view in enumerate(views):
        row = [("clean view (view 1)", picture(clean[i]))] if clean else []
        row.append(("masked view (view 2)" if clean else "image", picture(view)))
        row += [(heading, hidden(view, mask[i])) for heading, mask in masks.items()]
        if similarity is not None:
            row.append(("similarity with the caption", heat(view, similarity[i])))
        if patterns is not None:
            row.append(("the teacher's patterns", layout(view, patterns[i], colors)))
        rows.append(row)
    explanation = "The caption below each row is the one that the model read. Gray: masked."
    legend = {}
    if similarity is not None:
        explanation += " Similarity: from each image's lowest (dark) to its highest (light)."
    if patterns is not None:
        explanation += f" Patches of one color have the same pattern, in all rows; {len(colors)} patterns."
        legend = legend_of(patterns, colors)
    return sheet(title, explanation, rows, captions, legend)
