"""The figures of a pre-training model, drawn from arrays; Pretrain.py and tools/visualize.py share them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from engine import drawing

SIDE = 176  # of an image in a figure, in pixels


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
    columns = [[image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in group] for group in (clean, views)
               if group]  # fmt: skip
    images = columns[-1]
    for heading, mask in masks.items():
        headings.append(heading)
        columns.append([drawing.hide(image, square(row)) for image, row in zip(images, mask, strict=True)])
    notes = []
    if similarity is not None:
        headings.append("similarity with the caption")
        columns.append([drawing.heat(image, square(row)) for image, row in zip(images, similarity, strict=True)])
        notes.append(drawing.scale(SIDE, "similarity, each image's lowest", "highest"))
    if patterns is not None:
        headings.append("the teacher's patterns")
        colors = drawing.colors_of(by_frequency(patterns))
        columns.append([layout(image, row, colors) for image, row in zip(images, patterns, strict=True)])
    body = drawing.table(list(zip(*columns, strict=True)), headings, captions)
    explanation = "Gray patches are masked; the caption below each row is the one that the model read."
    if patterns is not None:
        explanation += f" Patches of one color have the same pattern, in all rows ({len(colors)} patterns here)."
    return drawing.sheet(title, explanation, [*notes, body])


def layout(image: Image.Image, patterns: torch.Tensor, colors: dict[int, tuple], strength: float = 0.62) -> Image.Image:
    """Patches in the color of their pattern over the image. patterns: [N]"""
    grid = square(patterns)
    values = np.array([[colors[int(pattern)] for pattern in row] for row in grid], float)
    return drawing.lines(drawing.paint(image, values, strength), len(grid))


def by_frequency(patterns: torch.Tensor) -> list[int]:
    """The patterns that occur, the most frequent first."""
    values, counts = patterns.flatten().unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return values[order].tolist()


def square(values: torch.Tensor) -> np.ndarray:
    """[N] -> [g, g] on the CPU"""
    side = round(values.numel() ** 0.5)
    return values.detach().cpu().float().view(side, side).numpy()
