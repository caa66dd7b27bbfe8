"""The figures that tools.visualize draws of a checkpoint: patterns, layouts, masks, attention, predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

from dataset.text import Tokenizer
from models.pretrain import PretrainModel
from tools.visualize import encodings, figures
from tools.visualize.scenes import PatchLabels, Samples, describe

MOST_CLUSTERS, EXAMPLES = 8, 8  # in Figure 2; patches of a cluster, which it must have to be chosen


@dataclass
class Clustering:
    """A cluster for each patch, [B, N], and how clearly the patch belongs to it (higher is clearer)."""

    assignment: Tensor
    score: Tensor


@dataclass
class View:
    """The samples that are shown, as the model reads them, with the random masks of the figures."""

    model: PretrainModel
    tokenizer: Tokenizer
    images: list[Image.Image]
    captions: list[str]
    pixels: Tensor  # [B, 3, S, S]
    input_ids: Tensor
    attention_mask: Tensor
    similarity: Tensor  # [B, N]
    seed: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        device = next(self.model.parameters()).device
        return tuple(part.to(device) for part in (self.pixels, self.input_ids, self.attention_mask))

    def masks(self, guided: bool) -> Tensor:
        uniform = torch.rand(self.similarity.shape, generator=torch.Generator().manual_seed(self.seed))
        mim = self.model.mim
        return encodings.draw_masks(self.similarity, mim.mask_ratio, mim.mask_temperature, uniform, guided)


def examples(clustering: Clustering, cluster: int, count: int) -> list[tuple[int, int]]:
    """(image, place) of the patches that belong to a cluster most clearly, at most two of an image."""
    numbers, places = (clustering.assignment == cluster).nonzero().T
    order = clustering.score[numbers, places].argsort(descending=True, stable=True)
    chosen: list[tuple[int, int]] = []
    for number, place in zip(numbers[order].tolist(), places[order].tolist(), strict=True):
        if sum(number == other for other, _ in chosen) < 2:
            chosen.append((number, place))
        if len(chosen) == count:
            break
    return chosen


def pattern_figure(samples: Samples, name: str, clustering: Clustering, known: PatchLabels | None, grid: int) -> Figure:
    """Figure 2: for each cluster its clearest patches, outlined, in their surroundings."""
    headings = describe(clustering.assignment.flatten().numpy(), known) if known else {}
    chosen = choose_clusters(clustering, headings)
    rows = [
        [("", figures.crop(samples.images[number], place, grid)) for number, place in examples(clustering, c, EXAMPLES)]
        for c in chosen
    ]
    captions = [
        f"pattern {c} ({int((clustering.assignment == c).sum())} patches) {headings[c][0] if headings else ''}"
        for c in chosen
    ]
    explanation = (
        f"Each row is one of the {len(clustering.assignment.unique())} clusters in use: its clearest patches, "
        "outlined, with the patches around them, at most two of an image. Shown: the "
        f"{'purest' if known else 'clearest'} ones."
    )
    return figures.sheet(f"Figure 2: patches that have the same pattern ({name})", explanation, rows, captions)


def choose_clusters(clustering: Clustering, headings: dict) -> list[int]:
    """The clusters that agree best with a label; without labels, those of the clearest patches.

    No more than two of them have the same most frequent label.
    """
    in_use = clustering.assignment.unique().tolist()
    large = [cluster for cluster in in_use if len(examples(clustering, cluster, EXAMPLES)) == EXAMPLES] or in_use
    clearness = {c: float(clustering.score[clustering.assignment == c].mean()) for c in large}
    quality = {c: headings[c][1] if headings else clearness[c] for c in large}
    chosen: list[int] = []
    for cluster in sorted(large, key=lambda c: -quality[c]):
        same = sum(headings[other][2] == headings[cluster][2] for other in chosen) if headings else 0
        if same < 2 and len(chosen) < MOST_CLUSTERS:
            chosen.append(cluster)
    return chosen


def layouts(view: View, clusterings: dict[str, Clustering], named: str) -> Figure:
    """Figure 3: each patch in the color of its pattern; the legend is that of the clustering `named`."""
    rows, legend = [[("image", figures.picture(image))] for image in view.images], {}
    for name, clustering in clusterings.items():
        patterns = clustering.assignment[: len(view.images)]
        colors = figures.colors_of(figures.by_frequency(patterns))
        for row, image, of_image in zip(rows, view.images, patterns, strict=True):
            row.append((name, figures.layout(image, of_image, colors)))
        if name == named:
            legend = figures.legend_of(patterns, colors)
    explanation = "Each patch has the color of its pattern; one color is one pattern in all images of a column."
    return figures.sheet("Figure 3: pattern layout of whole images", explanation, rows, view.captions, legend)


def masking(view: View) -> Figure:
    masks = {"masked at random": view.masks(False), "masked by the text": view.masks(True)}
    title = f"Which {view.model.mim.mask_ratio:.0%} of the patches are masked"
    return figures.masking_figure(view.images, masks, view.captions, view.similarity, title=title)


def attention(view: View) -> Figure:
    """Where a word of the caption looks: the image, then a map for each of up to five words."""
    maps = encodings.word_attention(view.model.backbone, *view.inputs())  # [B, L, N]
    rows = []
    for of_words, image, caption in zip(maps, view.images, view.captions, strict=True):
        spans = word_spans(view.tokenizer, caption, view.input_ids.shape[1])
        wanted = [word for word in spans if word not in ENGLISH_STOP_WORDS][:5]
        cells = [(word, figures.heat(image, of_words[slice(*spans[word])].mean(0))) for word in wanted]
        rows.append([("image", figures.picture(image)), *cells])
    explanation = (
        "Cross-attention of a word of the caption, weighted by how much it speaks for the pair to match (Grad-CAM, as "
        "ALBEF shows it), from each map's lowest (dark) to its highest (light). The matching head decides, so the maps "
        "are as good as matching is."
    )
    return figures.sheet("Where a word of the caption looks", explanation, rows, view.captions)


def word_spans(tokenizer: Tokenizer, caption: str, length: int) -> dict[str, tuple[int, int]]:
    """{word: (first, after last) of its tokens} at its first place; words that were cut off are absent."""
    spans, start = {}, 1  # after [CLS]
    words = caption.split()
    for word, pieces in zip(words, tokenizer.word_pieces(words), strict=True):
        end = start + len(pieces)
        if pieces and end <= length:
            spans.setdefault(word, (start, end))
        start = end
    return spans


def predictions(view: View, ours: Clustering) -> Figure:
    """What the student predicts at masked patches, beside the teacher's patterns."""
    masks = view.masks(view.model.mim.masking == "text_guided")
    inputs = view.inputs()
    predicted = encodings.predict_masked(view.model, *inputs, masks.to(inputs[0].device)).cpu()
    places = encodings.masked_places(masks)
    rows = [
        [("image", figures.picture(image)), ("what the student sees", figures.hidden(image, mask))]
        for image, mask in zip(view.images, masks, strict=True)
    ]
    targets = ours.assignment[: len(rows)].gather(1, places)
    choices = predicted.argmax(-1)
    colors = figures.colors_of(figures.by_frequency(torch.cat([targets, choices])))
    for heading, patterns in (("the teacher's patterns", targets), ("the student's predictions", choices)):
        shown = torch.full(masks.shape, -1).scatter(1, places, patterns)
        for row, image, of_image in zip(rows, view.images, shown, strict=True):
            row.append((heading, figures.layout(image, of_image, colors)))
    same = (targets == choices).sum(1).tolist()
    captions = [f"{caption} ({n} of {places.shape[1]} agree)" for caption, n in zip(view.captions, same, strict=True)]
    explanation = (
        "The student sees the image without the gray patches, and the caption; the teacher sees all of it. A color is "
        f"a pattern; {sum(same) / targets.numel():.0%} of these {targets.numel()} predictions equal the teacher's."
    )
    title = "Predictions at masked patches beside their targets"
    return figures.sheet(title, explanation, rows, captions, figures.legend_of(targets, colors))
