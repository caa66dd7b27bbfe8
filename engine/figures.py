"""The figures of a pre-training model, drawn from arrays; Pretrain.py and tools/visualize share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from engine import drawing

SIDE = 208  # of an image in a figure, in pixels
KEY = 22  # of a color in a legend
NAMED = 6  # patterns in the legend of the masking figure


def masking_figure(
    views: Sequence[Image.Image],
    masks: dict[str, torch.Tensor],
    captions: Sequence[str],
    similarity: torch.Tensor | None = None,
    patterns: torch.Tensor | None = None,
    clean: Sequence[Image.Image] | None = None,
    title: str = "What is masked",
) -> Image.Image:
    """A row per pair, its caption below: the images, each kind of mask, the similarity map, the pattern layout.

    views: B images that are masked; masks: {heading: [B, N] bool, True = masked}; similarity: [B, N] of each patch with
    the caption; patterns: [B, N] pattern of each patch; clean: the B views that stay whole.
    """
    headings = ["clean view (view 1)", "masked view (view 2)"] if clean else ["image"]
    columns = [[enlarged(image) for image in group] for group in (clean, views) if group]
    images = columns[-1]
    for heading, mask in masks.items():
        headings.append(heading)
        columns.append([drawing.hide(image, square(row)) for image, row in zip(images, mask, strict=True)])
    samples, named = [(drawing.swatch(drawing.HIDDEN, KEY), "masked")], []
    if similarity is not None:
        headings.append("similarity with the caption")
        columns.append([drawing.heat(image, square(row)) for image, row in zip(images, similarity, strict=True)])
        samples.append((drawing.scale(height=KEY), "similarity, from each image's lowest to its highest"))
    explanation = "The caption below each row is the one that the model read."
    if patterns is not None:
        headings.append("the teacher's patterns")
        order = by_frequency(patterns)
        colors = drawing.colors_of(order)
        columns.append([layout(image, row, colors) for image, row in zip(images, patterns, strict=True)])
        shares = {pattern: f"{(patterns == pattern).float().mean():.0%}" for pattern in order[:NAMED]}
        named = [(drawing.swatch(colors[p], KEY), f"pattern {p} ({share})") for p, share in shares.items()]
        more = f", the {NAMED} most frequent of {len(order)} named" if len(order) > NAMED else ""
        explanation += f" Patches of one color have the same pattern, in all rows (share of the patches{more})."
    body = drawing.table(list(zip(*columns, strict=True)), headings, captions)
    keys = [drawing.key(part, max(body.width, 640)) for part in (samples, named) if part]
    return drawing.sheet(title, explanation, [drawing.below(keys, 6), body])


def layout(image: Image.Image, patterns: torch.Tensor, colors: dict[int, tuple], strength: float = 0.62) -> Image.Image:
    """Patches in the color of their pattern over the image in gray, so that colors stay those of the legend. [N]"""
    grid, image = square(patterns), image.convert("L").convert("RGB")
    values = np.array([[colors[int(pattern)] for pattern in row] for row in grid], float)
    return drawing.lines(drawing.paint(image, values, strength), len(grid))


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def by_frequency(patterns: torch.Tensor) -> list[int]:
    """The patterns that occur, the most frequent first."""
    values, counts = patterns.flatten().unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return values[order].tolist()


def square(values: torch.Tensor) -> np.ndarray:
    """[N] -> [g, g] on the CPU"""
    side = round(values.numel() ** 0.5)
    return values.detach().cpu().float().view(side, side).numpy()


@dataclass
class Cluster:
    """A pattern, or a cluster of another kind, with the patches that show it best."""

    name: str
    examples: list[tuple[int, int]]  # (image, place) of patches, the best first
    heading: str = ""  # what the patches have in common, where that is known


def pattern_figure(
    title: str, explanation: str, clusters: Sequence[Cluster], images: Sequence[Image.Image], grid: int, context: int
) -> Image.Image:
    """Figure 2: for each cluster its best patches, outlined, as crops in their context."""
    side, across = 120, 4
    panels = []
    for cluster in clusters:
        crops = [drawing.crop_patch(images[number], place, grid, context, side) for number, place in cluster.examples]
        rows = [drawing.beside(crops[start : start + across], 6) for start in range(0, len(crops), across)]
        width = across * (side + 6) - 6
        head = [drawing.text(cluster.name, width, drawing.HEADING)]
        if cluster.heading:
            head.append(drawing.text(cluster.heading, width, drawing.TEXT, drawing.GRAY))
        panels.append(drawing.below([drawing.below(head, 0), *rows], 6))
    rows = [drawing.beside(panels[start : start + 2], 3 * drawing.GAP) for start in range(0, len(panels), 2)]
    return drawing.sheet(title, explanation, rows)


def layout_figure(
    images: Sequence[Image.Image],
    layouts: dict[str, torch.Tensor],
    captions: Sequence[str],
    legends: dict[str, Sequence[Cluster]],
    gallery: Sequence[Image.Image],
    title: str,
) -> Image.Image:
    """Figure 3: each patch in the color of its pattern over the image, and example patches of the frequent patterns.

    layouts: {heading: patterns [B, N]}; legends: {heading: clusters that are named by their number}; gallery: the
    images in which the legends' examples lie.
    """
    columns, parts = [[enlarged(image) for image in images]], []
    for heading, patterns in layouts.items():
        colors = drawing.colors_of(by_frequency(patterns))
        columns.append([layout(image, row, colors) for image, row in zip(columns[0], patterns, strict=True)])
        if legends.get(heading):
            grid = round(patterns.shape[1] ** 0.5)
            shown = [cluster for cluster in legends[heading] if int(cluster.name) in colors]
            parts.append(legend(f"Legend: {heading}", shown, colors, gallery, grid))
    body = drawing.table(list(zip(*columns, strict=True)), ["image", *layouts], captions)
    explanation = (
        "Each patch has the color of its pattern; one color is one pattern in all images of a column. Below, for the "
        "most frequent patterns, their numbers and the patches that have them most clearly (outlined)."
    )
    return drawing.sheet(title, explanation, [body, *parts])


def legend(
    title: str, clusters: Sequence[Cluster], colors: dict[int, tuple], gallery: Sequence[Image.Image], grid: int
) -> Image.Image:
    """A color with its number and some example patches for each cluster, three side by side."""
    side, cells = 68, []
    for cluster in clusters:
        examples = [drawing.crop_patch(gallery[n], place, grid, 1, side) for n, place in cluster.examples[:4]]
        swatch = drawing.swatch(colors[int(cluster.name)], side, cluster.name)
        cells.append(drawing.beside([swatch, *examples], 3))
    if not cells:
        return drawing.text(title, SIDE, drawing.HEADING)
    width = max(cell.width for cell in cells)
    cells = [drawing.widen(cell, width) for cell in cells]
    rows = [drawing.beside(cells[start : start + 3], 2 * drawing.GAP) for start in range(0, len(cells), 3)]
    return drawing.below([drawing.text(title, max(640, rows[0].width), drawing.HEADING), *rows], 6)


def attention_figure(
    images: Sequence[Image.Image],
    words: Sequence[Sequence[tuple[str, torch.Tensor]]],
    captions: Sequence[str],
    title: str,
) -> Image.Image:
    """A row per image: the image, then for each word of its caption the patches that speak for it. maps: [N]"""
    rows = []
    for image, maps, caption in zip(images, words, captions, strict=True):
        cells = [titled(enlarged(image), "image")]
        cells += [titled(drawing.heat(enlarged(image), square(values)), word) for word, values in maps]
        row = drawing.beside(cells)
        rows.append(drawing.below([row, drawing.text(caption, row.width)], 4))
    explanation = (
        "Cross-attention of a word of the caption, weighted by how much it speaks for the pair to match (Grad-CAM, as "
        "ALBEF shows it). The matching head decides, so the maps are as good as matching is."
    )
    width = max(row.width for row in rows)
    key = drawing.key([(drawing.scale(height=KEY), "weight, from each map's lowest to its highest")], width)
    return drawing.sheet(title, explanation, [key, *rows])


def prediction_figure(
    images: Sequence[Image.Image],
    masks: torch.Tensor,
    shown: dict[str, Sequence[Image.Image]],
    captions: Sequence[str],
    legends: Sequence[Image.Image],
    title: str,
    explanation: str,
) -> Image.Image:
    """A row per image: the image, what the student sees of it, and `shown`: {heading: B images of SIDE pixels}."""
    whole = [enlarged(image) for image in images]
    hidden = [drawing.hide(image, square(mask)) for image, mask in zip(whole, masks, strict=True)]
    rows = list(zip(whole, hidden, *shown.values(), strict=True))
    body = drawing.table(rows, ["image", "what the student sees", *shown], captions)
    return drawing.sheet(title, explanation, [body, *legends])


def partial_layout(image: Image.Image, patterns: dict[int, int], grid: int, colors: dict[int, tuple]) -> Image.Image:
    """Some patches (place -> pattern) in their color, the others as the image, faded."""
    values, strength = np.full((grid, grid, 3), 255.0), np.full((grid, grid), 0.55)
    for place, pattern in patterns.items():
        values[divmod(place, grid)], strength[divmod(place, grid)] = colors[pattern], 1.0
    return drawing.lines(drawing.paint(enlarged(image), values, strength), grid)


def titled(image: Image.Image, heading: str) -> Image.Image:
    return drawing.below([drawing.text(heading, image.width, drawing.HEADING), image], 2)
