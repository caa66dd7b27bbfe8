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
from PIL import Image
from torch import Tensor

from tools.visualize.encodings import Clustering

SIDE = 1.5  # inches of an image
SHOWN, EXAMPLES = 8, 8  # clusters in Figure 2, and patches of each
GOLDEN = 0.61803398875  # steps of hue that never come near an earlier one


def pixels(figure: Figure) -> Tensor:
    """A figure as an image [3, H, W], float in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1) / 255


def sheet(
    title: str, rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str], headings: Sequence[str] = ()
) -> Figure:
    """Rows of pictures, a caption below each row, headings above the columns."""
    columns = max(map(len, rows))
    width = max(columns * SIDE, 5)
    figure = Figure((width, (SIDE + 0.35) * len(rows) + 0.5), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize="small")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, pictures, caption in zip(parts, rows, captions, strict=True):
        part.supxlabel(textwrap.fill(caption, round(width * 14)), x=0.01, ha="left", fontsize="small")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.axis("off")
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture)
    for axis, heading in zip(parts[0].axes, headings, strict=False):
        axis.set_title(textwrap.fill(heading, 20), fontsize="small")
    return figure


def columns_sheet(title: str, columns: dict[str, Sequence[np.ndarray]], captions: Sequence[str]) -> Figure:
    """columns: {heading: a picture of each image}"""
    return sheet(title, list(zip(*columns.values(), strict=True)), captions, list(columns))


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


def layouts(images: Sequence[Image.Image], patterns: Tensor) -> list[np.ndarray]:
    """Patches in the color of their pattern [B, N] over the images in gray; one color is one pattern in all images,
    and patterns that are about as frequent get colors that lie far apart."""
    colors = {p: hsv_to_rgb((i * GOLDEN % 1, 0.8, 0.95)) for i, p in enumerate(by_frequency(patterns))}
    drawn = []
    for image, row in zip(images, patterns, strict=True):
        tints = np.array([colors[p] for p in row.tolist()])  # [N, 3]
        drawn.append(tinted(picture(image, gray=True), tints.reshape(*square(row).shape, 3), 0.7))
    return drawn


def crop(image: Image.Image, place: int, grid: int) -> np.ndarray:
    """Patch number `place` with its neighbors, which are paler; at the border the crop moves inwards."""
    place, unit, count = divmod(place, grid), image.width // grid, min(grid, 3)
    pale = np.full((grid, grid), 0.6)
    pale[place] = 0
    shown = tinted(picture(image), np.ones((grid, grid, 3)), pale)
    top, left = (min(max(at - 1, 0), grid - count) * unit for at in place)
    return shown[top : top + count * unit, left : left + count * unit]


def square(values: Tensor) -> np.ndarray:
    """[N] -> [g, g] on the CPU"""
    side = round(values.numel() ** 0.5)
    return values.detach().cpu().float().view(side, side).numpy()


def by_frequency(patterns: Tensor) -> list[int]:
    """The patterns that occur, the most frequent first."""
    values, counts = patterns.flatten().unique(return_counts=True)
    return values[counts.argsort(descending=True, stable=True)].tolist()


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
    columns = {"clean view (view 1)": list(map(picture, clean))} if clean else {}
    columns["masked view (view 2)" if clean else "image"] = list(map(picture, views))
    columns |= {heading: list(map(hidden, views, mask)) for heading, mask in masks.items()}
    if similarity is not None:
        columns["similarity with the caption"] = list(map(heat, views, similarity))
    if patterns is not None:
        columns["the teacher's patterns"] = layouts(views, patterns)
    return columns_sheet("What is masked", columns, captions)


def pattern_figure(images: Sequence[Image.Image], name: str, clustering: Clustering, grid: int) -> Figure:
    """Figure 2: for some clusters, from the most to the least frequent, their clearest patches with what is around."""
    rows, captions = [], []
    in_use = by_frequency(clustering.assignment)
    for cluster in in_use[:: -(-len(in_use) // SHOWN)]:
        rows.append([crop(images[number], place, grid) for number, place in clustering.examples(cluster, EXAMPLES)])
        captions.append(f"pattern {cluster} ({int((clustering.assignment == cluster).sum())} patches)")
    return sheet(f"Figure 2: patches that have the same pattern ({name}, {len(in_use)} in use)", rows, captions)


def layout_figure(images: Sequence[Image.Image], captions: Sequence[str], clusterings: dict[str, Clustering]) -> Figure:
    """Figure 3: each patch in the color of its pattern."""
    columns = {"image": list(map(picture, images))}
    columns |= {name: layouts(images, found.assignment[: len(images)]) for name, found in clusterings.items()}
    return columns_sheet("Figure 3: pattern layout of whole images", columns, captions)
