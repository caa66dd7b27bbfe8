"""The figures of a pre-training model, by matplotlib; Pretrain.py draws one of them after every epoch.

Images are RGB, S x S pixels, of N = g x g patches; every picture in a figure is an array [H, W, 3] of floats in [0, 1].
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from tools.visualize.encodings import Clustering

SIDE = 1.5  # inches of an image
NAMED = 6  # patterns in a legend
SHOWN, EXAMPLES = 8, 8  # clusters in Figure 2, and patches of each
GOLDEN = 0.61803398875  # steps of hue that never come near an earlier one
Cell = tuple[str, np.ndarray]  # heading, picture
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
    """Rows of pictures, a caption below each row, headings above the first cells that they are about."""
    columns, legend = max(map(len, rows)), legend or {}
    width = max(columns * SIDE, 5) + 0.3
    wide = round(width * 14)  # characters of a line
    words = textwrap.fill(explanation, wide)
    captions = [textwrap.fill(caption, wide) for caption in captions]
    lines = words.count("\n") + sum(caption.count("\n") + 1 for caption in captions) - -len(legend) // min(4, columns)
    figure = Figure((width, 1 + 0.18 * lines + (SIDE + 0.15) * len(rows)), dpi=130, layout="constrained")
    figure.suptitle(f"{title}\n{words}", x=0.01, ha="left", fontsize="small")
    above: list[str] = []
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, cells, caption in zip(parts, rows, captions, strict=True):
        part.supxlabel(caption, x=0.01, ha="left", fontsize="small")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.axis("off")
        for axis, (heading, picture) in zip(axes, cells, strict=False):
            axis.imshow(picture)
            if heading not in above:
                axis.set_title(textwrap.fill(heading, 20), fontsize="small")
        above = [heading for heading, _ in cells]
    if legend:
        handles = [Patch(color=color, label=name) for name, color in legend.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=min(4, columns), fontsize="small", frameon=False)
    return figure


# ------------------------------------------------------------------------------------------------- pictures


def picture(image: Image.Image, gray: bool = False) -> np.ndarray:
    return np.asarray((image.convert("L") if gray else image).convert("RGB"), np.float32) / 255


def tinted(image: np.ndarray, colors: np.ndarray, strength: np.ndarray | float) -> np.ndarray:
    """The image [S, S, 3] with each patch mixed with a color [g, g, 3], by a strength (0 to 1) for all or [g, g]."""
    strength = np.broadcast_to(strength, colors.shape[:2])[..., None]
    at = np.arange(len(image)) * len(colors) // len(image)  # pixel -> patch
    colors, strength = (part[at][:, at] for part in (colors, strength))
    return image * (1 - strength) + colors * strength


def hidden(image: Image.Image, mask: Tensor) -> np.ndarray:
    """The image with the patches of mask [N] (True: hidden) in gray."""
    return tinted(picture(image), np.full((*square(mask).shape, 3), 0.5), square(mask))


def heat(image: Image.Image, values: Tensor) -> np.ndarray:
    """values [N] as colors, from the lowest (dark) to the highest (light), over the image in gray."""
    values = square(values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    return tinted(picture(image, gray=True), colormaps["viridis"](values)[..., :3], 0.72)


def layout(image: Image.Image, patterns: Tensor, colors: dict[int, Color]) -> np.ndarray:
    """Patches in the color of their pattern [N] over the image in gray."""
    return tinted(picture(image, gray=True), np.array([[colors[int(p)] for p in row] for row in square(patterns)]), 0.7)


def crop(image: Image.Image, place: int, grid: int) -> np.ndarray:
    """Patch number `place`, outlined in red, with its neighbors; at the border the crop moves inwards."""
    shown, unit, count = picture(image).copy(), image.width // grid, min(grid, 3)
    row, column = (at * unit for at in divmod(place, grid))
    inner = shown[row + 1 : row + unit - 1, column + 1 : column + unit - 1].copy()
    shown[row : row + unit, column : column + unit] = (1, 0, 0)
    shown[row + 1 : row + unit - 1, column + 1 : column + unit - 1] = inner
    top, left = (min(max(at - 1, 0), grid - count) * unit for at in divmod(place, grid))
    return shown[top : top + count * unit, left : left + count * unit]


def square(values: Tensor) -> np.ndarray:
    """[N] -> [g, g] on the CPU"""
    side = round(values.numel() ** 0.5)
    return values.detach().cpu().float().view(side, side).numpy()


def by_frequency(patterns: Tensor) -> list[int]:
    """The patterns that occur, the most frequent first."""
    values, counts = patterns.flatten().unique(return_counts=True)
    return values[counts.argsort(descending=True, stable=True)].tolist()


def colors_of(patterns: Sequence[int]) -> dict[int, Color]:
    """A color per pattern; neighbors in the list get colors that lie far apart."""
    styles = ((0.75, 1.0), (0.9, 0.8), (0.45, 0.95))  # saturation and value
    return {p: tuple(hsv_to_rgb((i * GOLDEN % 1, *styles[i // 12 % 3]))) for i, p in enumerate(patterns)}


def legend_of(patterns: Tensor, colors: dict[int, Color]) -> dict[str, Color]:
    """Of the most frequent patterns, {name with its share of the patches: color}"""
    shares = {p: float((patterns == p).float().mean()) for p in by_frequency(patterns)[:NAMED]}
    return {f"pattern {p} ({share:.0%})": colors[p] for p, share in shares.items()}


# -------------------------------------------------------------------------------------------------- figures


def masking_figure(
    views: Sequence[Image.Image],
    captions: Sequence[str],
    masks: dict[str, Tensor],
    similarity: Tensor | None = None,
    patterns: Tensor | None = None,
    clean: Sequence[Image.Image] | None = None,
) -> Figure:
    """A row per pair, its caption below: the images, each kind of mask, the similarity map, the pattern layout.

    views: B images that are masked; masks: {heading: [B, N] bool, True = masked}; similarity: [B, N] of each patch with
    the caption; patterns: [B, N] pattern of each patch; clean: the B views that stay whole.
    """
    explanation, legend = "The caption below each row is the one that the model read. Gray: masked.", {}
    columns = {"clean view (view 1)": list(map(picture, clean))} if clean else {}
    columns["masked view (view 2)" if clean else "image"] = list(map(picture, views))
    columns |= {heading: list(map(hidden, views, mask)) for heading, mask in masks.items()}
    if similarity is not None:
        columns["similarity with the caption"] = list(map(heat, views, similarity))
        explanation += " Similarity: from each image's lowest (dark) to its highest (light)."
    if patterns is not None:
        colors = colors_of(by_frequency(patterns))
        columns["the teacher's patterns"] = [layout(*pair, colors) for pair in zip(views, patterns, strict=True)]
        explanation += f" Patches of one color have the same pattern, in all rows; {len(colors)} patterns."
        legend = legend_of(patterns, colors)
    return sheet("What is masked", explanation, rows_of(columns), captions, legend)


def rows_of(columns: dict[str, Sequence[np.ndarray]]) -> list[list[Cell]]:
    """{heading: a picture of each image} -> a row for each image"""
    return [list(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def pattern_figure(images: Sequence[Image.Image], name: str, clustering: Clustering, grid: int) -> Figure:
    """Figure 2: for some clusters, from the most to the least frequent, their clearest patches with what is around."""
    rows, captions = [], []
    in_use = by_frequency(clustering.assignment)
    for cluster in in_use[:: -(-len(in_use) // SHOWN)]:
        places = clustering.examples(cluster, EXAMPLES)
        rows.append([("", crop(images[number], place, grid)) for number, place in places])
        captions.append(f"pattern {cluster} ({int((clustering.assignment == cluster).sum())} patches)")
    explanation = (
        f"Each row is one of the {len(in_use)} clusters in use, from the most to the least frequent: its clearest "
        "patches, outlined, with their surroundings, at most two of an image."
    )
    return sheet(f"Figure 2: patches that have the same pattern ({name})", explanation, rows, captions)


def layouts(images: Sequence[Image.Image], captions: Sequence[str], clusterings: dict[str, Clustering]) -> Figure:
    """Figure 3: each patch in the color of its pattern; the legend is that of the first clustering."""
    columns, legend = {"image": list(map(picture, images))}, None
    for name, clustering in clusterings.items():
        patterns = clustering.assignment[: len(images)]
        colors = colors_of(by_frequency(patterns))
        columns[name] = [layout(*pair, colors) for pair in zip(images, patterns, strict=True)]
        legend = legend or legend_of(patterns, colors)
    explanation = "Each patch has the color of its pattern; one color is one pattern in all images of a column."
    return sheet("Figure 3: pattern layout of whole images", explanation, rows_of(columns), captions, legend)
