"""Figures of a pre-training checkpoint, and how well its patterns agree with what is in the images.

    python -m tools.visualize --checkpoint output/demo/pretrain/checkpoint_last.pth
    python -m tools.visualize --checkpoint FILE --data data/coco/annotations/coco_val.json --image_root data/coco/images
    python -m tools.visualize --checkpoint FILE --codebook data/flava-image-codebook --patterns 3 17 902 --words star

Writes into --output (default: `figures` beside the checkpoint) PNG files and index.html, which holds all of them:
figure2_*.png (patches of the purest, or given, patterns in their context) and figure3.png (each patch in its pattern's
color) for the encoding head, for k-means of pixels and, with --codebook, for DALL-E's dVAE; masking.png (random and
text-guided masks, the similarity map, the caption); attention.png (where a word of the caption looks); predictions.png
(predictions at masked patches beside their targets).

Without --data the demo's scenes are drawn, those that no training has seen, and each patch's object is known; then
numbers.json and the page also hold normalized mutual information and purity between patterns and object class, color
and background, and the share of masked patches on objects that the caption names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.cluster import KMeans
from tabulate import tabulate
from torch import Tensor

from dataset.annotations import Source, load_annotations
from dataset.common import EmptyCaption, usable_caption
from dataset.text import Tokenizer
from dataset.transforms import ImageError, open_image, to_pixels, to_tensor, to_unit
from models.mim import CodebookTarget
from models.pretrain import PretrainModel, build_pretrain_model
from models.weights import load_exactly
from tools import pages
from tools.demo import scenes
from tools.visualize import encodings, figures
from tools.visualize.scenes import DRAWS, Samples, describe, number_tables, patch_labels, scene_numbers
from utils import UserError, as_config, choose_device, load_checkpoint, own_folder, run_main, write_json

BATCH = 50
OURS, PIXELS, TOKENS, DVAE = "encoding head", "k-means of pixels", "k-means of encoder tokens", "dVAE"
FIGURE_2 = {OURS: "figure2_encoding_head", PIXELS: "figure2_kmeans_of_pixels", DVAE: "figure2_dvae"}
MOST_CLUSTERS, EXAMPLES = 8, 8  # in Figure 2; patches of a cluster, which it must have to be chosen
FUNCTION_WORDS = frozenset(
    "a an the of in on at to and is are it its with there this that these two three four we see picture image photo "
    "shows showing next by for from as or be was has have his her their background objects".split()
)


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


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model, tokenizer, max_tokens, max_words = load_model(args.checkpoint, torch.device(choose_device(args.device)))
    output = own_folder(args.output or args.checkpoint.parent / "figures", "tools.visualize")  # before the work
    size, grid = model.backbone.image_encoder.image_size, model.backbone.image_encoder.grid
    samples = read_samples(args, size, max_words) if args.data else draw_scenes(args.images, args.seed, size, max_words)
    found = encode_all(model, tokenizer, samples, max_tokens)
    clusterings = cluster_all(args, model, samples, found)
    known = patch_labels(samples, grid) if samples.scenes else None
    images, captions = samples.images[: args.show], samples.captions[: args.show]
    text, similarity = tokenizer.encode(captions, max_tokens), found.similarity[: args.show]
    view = View(
        model, tokenizer, images, captions, torch.stack(list(map(to_tensor, images))), *text, similarity, args.seed
    )
    drawn = {
        f"figure2_{name.replace('-', '').replace(' ', '_').lower()}": pattern_figure(
            args, samples, name, of, known, grid
        )
        for name, of in clusterings.items()
        if name != TOKENS
    }
    drawn |= {"figure3": layouts(view, clusterings), "masking": masking(view), "attention": attention(args, view)}
    if OURS in clusterings:
        drawn["predictions"] = predictions(view, clusterings[OURS])
    for name, figure in drawn.items():
        pages.save_figure(figure, output / f"{name}.png")
    numbers, tables = None, ()
    if known:
        assignments = {name: clustering.assignment for name, clustering in clusterings.items()}
        drawing = model.mim.mask_ratio, model.mim.mask_temperature
        numbers = scene_numbers(known, found.similarity, assignments, drawing, args.seed)
        tables = number_tables(numbers)
        write_json(output / "numbers.json", numbers)
        print(f"{numbers['images']} scenes, {numbers['patches']} patches")
        print(*(tabulate(table, "firstrow", disable_numparse=True) + "\n" for table in tables), sep="\n")
    title = f"Figures of {args.checkpoint}"
    values = {"figures": drawn, "numbers": numbers, "tables": tables, "draws": DRAWS}
    pages.write(output / "index.html", "visualize/index.html", title=title, **values)
    print(output / "index.html")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of Pretrain.py")
    add("--output", type=Path, help="folder (default: `figures` beside the checkpoint)")
    add("--data", nargs="+", help="JSON lists of {image, caption} instead of the demo's scenes")
    add("--image_root", help="folder of the images in --data (default: the JSON file's folder)")
    add("--images", type=int, default=300, help="images whose patches are clustered (default: %(default)s)")
    add("--show", type=int, default=6, help="of them, images in the figures (default: %(default)s)")
    add("--patterns", type=int, nargs="+", help="patterns in Figure 2 (default: the purest)")
    add("--words", nargs="+", help="words in the attention figure (default: each caption's own)")
    add("--codebook", help="folder of a FlavaImageCodebook: the dVAE beside ours")
    add("--seed", type=int, default=0, help="of scenes, masks and k-means")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    for name in ("images", "show"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


# ------------------------------------------------------------------------------------------------- model and images


def load_model(path: Path, device: torch.device) -> tuple[PretrainModel, Tokenizer, int, int]:
    """-> (the model, its tokenizer, tokens and words that a caption may have)."""
    checkpoint = load_checkpoint(path, required=("model", "config"))
    if checkpoint.get("stage") != "pretrain":
        raise UserError(f"{path}: a checkpoint of {checkpoint.get('stage')}; the figures need one of Pretrain.py")
    config = as_config(checkpoint["config"])
    tokenizer = Tokenizer(config.text.vocab, sep=config.text.sep)
    model, _ = build_pretrain_model(config, tokenizer, initial_weights=False)
    load_exactly(model, checkpoint["model"], path, "it is of another version of this code")
    return model.to(device).eval(), tokenizer, config.text.max_tokens, config.data.max_words


def draw_scenes(count: int, seed: int, size: int, max_words: int) -> Samples:
    """Scenes of the test split, which no training shows, each with one of its captions."""
    chosen = [scenes.make_scene(seed, index) for index in scenes.plan(seed, {"test": count})["test"]]
    captions = [usable_caption(scenes.captions(scene)[0], max_words, "scene") for scene in chosen]
    return Samples([scenes.render(scene, size) for scene in chosen], captions, chosen)


def read_samples(args: argparse.Namespace, size: int, max_words: int) -> Samples:
    """Every n-th entry of --data, so that --images of them cover the files; unreadable images are left out."""
    entries = load_annotations(Source(args.data, args.image_root), "pretrain")
    step = max(1, len(entries) // args.images)
    images, captions = [], []
    for entry in entries[::step][: args.images]:
        caption = entry["caption"] if isinstance(entry["caption"], str) else entry["caption"][0]
        try:
            caption = usable_caption(caption, max_words, entry["image"])
            images.append(open_image(entry["image"]).resize((size, size), Image.Resampling.BICUBIC))
            captions.append(caption)
        except (ImageError, EmptyCaption) as error:
            print(f"left out: {error}", file=sys.stderr)
    if not images:
        raise UserError(f"--data {args.data[0]}: no entry has a readable image and a caption (see --image_root)")
    return Samples(images, captions)


def encode_all(model: PretrainModel, tokenizer: Tokenizer, samples: Samples, max_tokens: int) -> encodings.Encodings:
    """`encodings.encode` of all samples, in batches."""
    parts, device = [], next(model.parameters()).device
    for start in range(0, len(samples.images), BATCH):
        images = torch.stack([to_tensor(image) for image in samples.images[start : start + BATCH]])
        ids, mask = tokenizer.encode(samples.captions[start : start + BATCH], max_tokens)
        parts.append(encodings.encode(model, images.to(device), ids.to(device), mask.to(device)))
    patterns = None if parts[0].probabilities is None else torch.cat([part.probabilities for part in parts])
    similarity, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("similarity", "tokens"))
    return encodings.Encodings(similarity, tokens, patterns)


# ------------------------------------------------------------------------------------------------------- clusterings


def cluster_all(
    args: argparse.Namespace, model: PretrainModel, samples: Samples, found: encodings.Encodings
) -> dict[str, Clustering]:
    """Ours, and as many clusters as we use patterns by k-means of pixels and of encoder tokens; the dVAE's codes."""
    encoder, result, count = model.backbone.image_encoder, {}, 64
    if found.probabilities is not None:
        best = found.probabilities.max(-1)
        result[OURS] = Clustering(best.indices, best.values)
        count = max(2, len(best.indices.unique()))
    unit = torch.stack([to_unit(to_pixels(image)) for image in samples.images])
    tokens = torch.nn.functional.normalize(found.tokens, dim=-1)
    for name, points in ((PIXELS, encodings.patch_pixels(unit, encoder.patch_size)), (TOKENS, tokens)):
        flat = points.flatten(0, 1).numpy()
        kmeans = KMeans(min(count, len(flat)), n_init=1, random_state=args.seed).fit(flat)
        distance = torch.from_numpy(kmeans.transform(flat)).min(1).values
        clusters = torch.from_numpy(kmeans.labels_).long()
        result[name] = Clustering(clusters.view(points.shape[:2]), -distance.view(points.shape[:2]))
    if args.codebook:
        result[DVAE] = dvae_codes(CodebookTarget(args.codebook), samples.images, encoder.grid)
    return result


def dvae_codes(target: CodebookTarget, images: Sequence[Image.Image], grid: int) -> Clustering:
    """The code of each patch, and 0 as score of all: codes are hard."""
    side = 8 * grid  # the dVAE makes one code of 8 x 8 pixels
    pixels = [to_unit(to_pixels(image.resize((side, side), Image.Resampling.BICUBIC))) for image in images]
    codes = torch.cat([target(torch.stack(pixels[i : i + BATCH])) for i in range(0, len(pixels), BATCH)])
    return Clustering(codes, torch.zeros(codes.shape))


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


# ----------------------------------------------------------------------------------------------------------- figures


def pattern_figure(
    args: argparse.Namespace, samples: Samples, name: str, clustering: Clustering, known, grid: int
) -> Figure:
    """Figure 2: for each cluster its clearest patches, outlined, in their surroundings."""
    headings = describe(clustering.assignment.flatten().numpy(), known) if known else {}
    given = args.patterns if name == OURS else None
    chosen = choose_clusters(clustering, headings, given)
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
        f"{'given' if given else 'purest' if known else 'clearest'} ones."
    )
    return figures.sheet(f"Figure 2: patches that have the same pattern ({name})", explanation, rows, captions)


def choose_clusters(clustering: Clustering, headings: dict, given: list[int] | None) -> list[int]:
    """The given clusters, or those that agree best with a label (without labels: those of the clearest patches).

    No more than two of them have the same most frequent label.
    """
    in_use = clustering.assignment.unique().tolist()
    if given is not None:
        if missing := [cluster for cluster in given if cluster not in in_use]:
            raise UserError(f"--patterns {missing[0]}: no patch of these images has it; in use: {in_use[:20]} ...")
        return given
    large = [cluster for cluster in in_use if len(examples(clustering, cluster, EXAMPLES)) == EXAMPLES] or in_use
    clearness = {c: float(clustering.score[clustering.assignment == c].mean()) for c in large}
    quality = {c: headings[c][1] if headings else clearness[c] for c in large}
    chosen: list[int] = []
    for cluster in sorted(large, key=lambda c: -quality[c]):
        same = sum(headings[other][2] == headings[cluster][2] for other in chosen) if headings else 0
        if same < 2 and len(chosen) < MOST_CLUSTERS:
            chosen.append(cluster)
    return chosen


def layouts(view: View, clusterings: dict[str, Clustering]) -> Figure:
    """Figure 3: each patch in the color of its pattern."""
    rows, legend = [[("image", figures.picture(image))] for image in view.images], {}
    for name, clustering in clusterings.items():
        patterns = clustering.assignment[: len(view.images)]
        colors = figures.colors_of(figures.by_frequency(patterns))
        for row, image, of_image in zip(rows, view.images, patterns, strict=True):
            row.append((name, figures.layout(image, of_image, colors)))
        if name == OURS:
            legend = figures.legend_of(patterns, colors)
    explanation = "Each patch has the color of its pattern; one color is one pattern in all images of a column."
    return figures.sheet("Figure 3: pattern layout of whole images", explanation, rows, view.captions, legend)


def masking(view: View) -> Figure:
    masks = {"masked at random": view.masks(False), "masked by the text": view.masks(True)}
    title = f"Which {view.model.mim.mask_ratio:.0%} of the patches are masked"
    return figures.masking_figure(view.images, masks, view.captions, view.similarity, title=title)


def attention(args: argparse.Namespace, view: View) -> Figure:
    """Where a word of the caption looks: the image, then a map for each of up to five words."""
    maps = encodings.word_attention(view.model.backbone, *view.inputs())  # [B, L, N]
    rows = []
    for of_words, image, caption in zip(maps, view.images, view.captions, strict=True):
        spans = word_spans(view.tokenizer, caption, view.input_ids.shape[1])
        wanted = [word for word in args.words or content_words(caption) if word in spans][:5]
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


def content_words(caption: str) -> list[str]:
    """The words of a caption that say something of the image, each once; nouns of scenes before adjectives."""
    words = [word for word in dict.fromkeys(caption.split()) if word not in FUNCTION_WORDS]
    return sorted(words, key=lambda word: word not in (*scenes.SHAPES, "sign"))


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


if __name__ == "__main__":
    run_main(main)
