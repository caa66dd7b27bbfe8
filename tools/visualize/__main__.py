"""Figures of a pre-training checkpoint, and how well its patterns agree with what is in the images.

    python -m tools.visualize --checkpoint output/demo/pretrain/checkpoint_last.pth
    python -m tools.visualize --checkpoint FILE --data data/coco/annotations/coco_val.json --image_root data/coco/images
    python -m tools.visualize --checkpoint FILE --codebook data/flava-image-codebook --patterns 3 17 902 --words star

Writes into --output (default: `figures` beside the checkpoint) PNG files and index.html, which holds all of them:
figure2_*.png (patches of the purest, or given, patterns in their context) and figure3.png (each patch in its pattern's
color) for the encoding head, for k-means of pixels and, with --codebook, for DALL-E's dVAE; masking.png (random and
text-guided masks, the similarity map, the caption); attention.png (where a word of the caption looks); predictions.png
(predictions at masked patches beside their targets).

Without --data the built-in scenes are drawn, those that no training has seen, and each patch's object is known; then
numbers.json and the page also hold normalized mutual information and purity between patterns and object class, color
and background, and the share of masked patches on objects that the caption names.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.annotations import Source, load_annotations
from dataset.common import EmptyCaption, usable_caption
from dataset.text import Tokenizer
from dataset.transforms import ImageError, open_image, to_tensor, to_unit_tensor
from engine import drawing, figures
from engine.figures import Cluster
from evaluation import clusters, encodings
from models.mim import CodebookTarget
from models.pretrain import PretrainModel, build_pretrain_model
from models.weights import load_exactly
from tools.demo import scenes
from tools.visualize import pages
from tools.visualize.scenes import (
    Clustering,
    PatchLabels,
    Samples,
    describe,
    numbers_html,
    numbers_text,
    patch_labels,
    scene_numbers,
)
from utils import UserError, as_config, load_checkpoint, make_folder, run_main, write_json

BATCH = 50
OURS, PIXELS, TOKENS, DVAE = "encoding head", "k-means of pixels", "k-means of encoder tokens", "dVAE"
MOST_CLUSTERS, EXAMPLES = 8, 8  # in Figure 2; patches of a cluster, which it must have to be chosen
FUNCTION_WORDS = frozenset(
    "a an the of in on at to and is are it its with there this that these two three four we see picture image photo "
    "shows showing next by for from as or be was has have his her their background objects".split()
)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = torch.device(
        "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    )
    model, tokenizer, max_tokens, max_words = load_model(args.checkpoint, device)
    output = make_folder(args.output or args.checkpoint.parent / "figures")  # before the work
    size, grid = model.backbone.image_encoder.image_size, model.backbone.image_encoder.grid
    samples = read_samples(args, size, max_words) if args.data else draw_scenes(args.images, args.seed, size, max_words)
    shown = list(range(min(args.show, len(samples.images))))
    found = encode_all(model, tokenizer, samples, max_tokens, device)
    clusterings = cluster_all(args, model, samples, found)
    text = tokenizer.encode([samples.captions[i] for i in shown], max_tokens)
    view = View(model, tokenizer, samples, shown, torch.stack([to_tensor(samples.images[i]) for i in shown]), *text)
    drawn = {
        **pattern_figures(args, samples, clusterings, grid),
        "figure3": layouts(samples, clusterings, shown, grid),
        "masking": masking(args, view, found),
        "attention": attention(args, view),
    }
    if model.mim.target in ("encoding", "pixels"):
        drawn["predictions"] = predictions(args, view, found, clusterings.get(OURS))
    for name, image in drawn.items():
        pages.save_png(image, output / f"{name}.png")
    numbers = None
    if samples.scenes:
        settings = {"ratio": model.mim.mask_ratio, "temperature": model.mim.mask_temperature}
        numbers = scene_numbers(samples, found.similarity, clusterings, grid, settings, args.seed)
        write_json(output / "numbers.json", numbers)
        print(numbers_text(numbers))
    write_page(output / "index.html", args.checkpoint, drawn, numbers)
    print(output / "index.html")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of Pretrain.py")
    add("--output", type=Path, help="folder (default: `figures` beside the checkpoint)")
    add("--data", nargs="+", help="JSON lists of {image, caption} instead of the built-in scenes")
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
            captions.append(usable_caption(caption, max_words, entry["image"]))
            images.append(open_image(entry["image"]).resize((size, size), Image.Resampling.BICUBIC))
        except (ImageError, EmptyCaption) as error:
            print(f"left out: {error}", file=sys.stderr)
            del captions[len(images) :]
    if not images:
        raise UserError(f"--data {args.data[0]}: no entry has a readable image and a caption (see --image_root)")
    return Samples(images, captions)


def encode_all(
    model: PretrainModel, tokenizer: Tokenizer, samples: Samples, max_tokens: int, device: torch.device
) -> encodings.Encodings:
    """`encodings.encode` of all samples, in batches."""
    parts = []
    for start in range(0, len(samples.images), BATCH):
        images = torch.stack([to_tensor(image) for image in samples.images[start : start + BATCH]])
        ids, mask = tokenizer.encode(samples.captions[start : start + BATCH], max_tokens)
        parts.append(encodings.encode(model, images.to(device), ids.to(device), mask.to(device)))
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return encodings.Encodings(
        torch.cat([part.similarity for part in parts]),
        torch.cat([part.tokens for part in parts]),
        torch.cat(probabilities) if probabilities else None,
    )


# ------------------------------------------------------------------------------------------------------- clusterings


def cluster_all(
    args: argparse.Namespace, model: PretrainModel, samples: Samples, found: encodings.Encodings
) -> dict[str, Clustering]:
    """Ours, and as many clusters as we use patterns by k-means of pixels and of encoder tokens; the dVAE's codes."""
    encoder, result = model.backbone.image_encoder, {}
    if found.probabilities is not None:
        best = found.probabilities.max(-1)
        result[OURS] = Clustering(best.indices, best.values)
    patches = len(samples.images) * encoder.num_patches
    count = len(result[OURS].assignment.unique()) if result else 64
    count = min(max(count, 2), patches)
    unit = torch.stack([to_unit_tensor(image) for image in samples.images])
    tokens = torch.nn.functional.normalize(found.tokens, dim=-1)
    for name, points in ((PIXELS, encodings.patch_pixels(unit, encoder.patch_size)), (TOKENS, tokens)):
        generator = torch.Generator().manual_seed(args.seed)
        flat = points.flatten(0, 1)
        assignment, centers = clusters.kmeans(flat, count, generator)
        distance = (flat - centers[assignment]).square().sum(1)
        result[name] = Clustering(assignment.view(points.shape[:2]), -distance.view(points.shape[:2]))
    if args.codebook:
        result[DVAE] = dvae_codes(CodebookTarget(args.codebook), samples.images, encoder.grid)
    return result


def dvae_codes(target: CodebookTarget, images: Sequence[Image.Image], grid: int) -> Clustering:
    """The code of each patch, and 0 as score of all: codes are hard."""
    side = 8 * grid  # the dVAE makes one code of 8 x 8 pixels
    pixels = [to_unit_tensor(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
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


@dataclass
class View:
    """The samples that are shown, as the model reads them."""

    model: PretrainModel
    tokenizer: Tokenizer
    samples: Samples
    shown: list[int]
    pixels: Tensor  # [B, 3, S, S]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def images(self) -> list[Image.Image]:
        return [self.samples.images[i] for i in self.shown]

    @property
    def captions(self) -> list[str]:
        return [self.samples.captions[i] for i in self.shown]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        device = next(self.model.parameters()).device
        return tuple(part.to(device) for part in (self.pixels, self.input_ids, self.attention_mask))


def pattern_figures(
    args: argparse.Namespace, samples: Samples, clusterings: dict[str, Clustering], grid: int
) -> dict[str, Image.Image]:
    """Figure 2, one for each clustering but that of tokens."""
    labels = patch_labels(samples, grid) if samples.scenes else None
    drawn, kind = {}, "purest" if labels else "clearest"
    below = "; below the number, what all patches of the cluster show" if labels else ""
    for name, clustering in clusterings.items():
        if name == TOKENS:
            continue
        given = args.patterns if name == OURS else None
        chosen = choose_clusters(clustering, labels, given)
        explanation = (
            f"Each panel is one of the {len(clustering.assignment.unique())} clusters in use: its clearest patches "
            "(outlined) with the patches around them, at most two of an image. Shown: the "
            f"{'given' if given else kind} ones{below}."
        )
        drawn[f"figure2_{name.replace('-', '').replace(' ', '_').lower()}"] = figures.pattern_figure(
            f"Figure 2: patches that have the same pattern ({name})",
            explanation,
            chosen,
            samples.images,
            grid,
            context=1,
        )
    return drawn


def choose_clusters(clustering: Clustering, labels: PatchLabels | None, given: list[int] | None) -> list[Cluster]:
    """The given clusters, or those that agree best with a label (without labels: those of the clearest patches)."""
    flat, score = clustering.assignment.flatten(), clustering.score.flatten()
    kinds, counts = flat.unique(return_counts=True)
    sizes = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
    headings = describe(flat, labels) if labels else {}
    if given is not None:
        if missing := [cluster for cluster in given if cluster not in sizes]:
            raise UserError(f"--patterns {missing[0]}: no patch of these images has it; in use: {list(sizes)[:20]} ...")
        order = given
    else:
        large = [cluster for cluster in sizes if len(examples(clustering, cluster, EXAMPLES)) == EXAMPLES] or list(
            sizes
        )
        if labels:
            order = spread_out(sorted(large, key=lambda cluster: -headings[cluster][1]), headings)
        else:
            order = sorted(large, key=lambda cluster: -float(score[flat == cluster].mean()))[:MOST_CLUSTERS]
    return [
        Cluster(
            f"pattern {cluster} ({sizes[cluster]} patches)",
            examples(clustering, cluster, EXAMPLES),
            headings[cluster][0] if cluster in headings else "",
        )
        for cluster in order
    ]


def spread_out(ordered: list[int], headings: dict) -> list[int]:
    """The first clusters of a list, no more than two with the same most frequent label; objects before backgrounds."""
    chosen: list[int] = []
    for wanted in ("on objects", "background"):
        for cluster in ordered:
            same = sum(headings[other][2] == headings[cluster][2] for other in chosen)
            if wanted in headings[cluster][0] and same < 2 and len(chosen) < MOST_CLUSTERS:
                chosen.append(cluster)
    return chosen


def layouts(samples: Samples, clusterings: dict[str, Clustering], shown: list[int], grid: int) -> Image.Image:
    """Figure 3."""
    columns = {name: clustering.assignment[shown] for name, clustering in clusterings.items()}
    legends = {}
    for name, patterns in columns.items():
        frequent = figures.by_frequency(patterns)[: 12 if name == OURS else 6]
        legends[name] = [Cluster(str(cluster), examples(clusterings[name], cluster, 4)) for cluster in frequent]
    images, captions = ([group[i] for i in shown] for group in (samples.images, samples.captions))
    title = "Figure 3: pattern layout of whole images"
    return figures.layout_figure(images, columns, captions, legends, samples.images, title)


def masking(args: argparse.Namespace, view: View, found: encodings.Encodings) -> Image.Image:
    similarity, settings = found.similarity[view.shown], view.model.mim
    uniform = torch.rand(similarity.shape, generator=torch.Generator().manual_seed(args.seed))
    masks = {
        heading: encodings.draw_masks(similarity, settings.mask_ratio, settings.mask_temperature, uniform, guided)
        for heading, guided in (("masked at random", False), ("masked by the text", True))
    }
    title = f"Which {settings.mask_ratio:.0%} of the patches are masked"
    return figures.masking_figure(view.images, masks, view.captions, similarity, title=title)


def attention(args: argparse.Namespace, view: View) -> Image.Image:
    maps = encodings.word_attention(view.model.backbone, *view.inputs())  # [B, L, N]
    rows = []
    for row, caption in zip(maps, view.captions, strict=True):
        spans = word_spans(view.tokenizer, caption, view.input_ids.shape[1])
        wanted = args.words or content_words(caption)
        places = {word: spans[word] for word in wanted if word in spans}
        rows.append([(word, row[start:end].mean(0)) for word, (start, end) in list(places.items())[:5]])
    return figures.attention_figure(view.images, rows, view.captions, "Where a word of the caption looks")


def word_spans(tokenizer: Tokenizer, caption: str, length: int) -> dict[str, tuple[int, int]]:
    """{word: (first, after last) of its tokens} where it stands first; words that were cut off are absent."""
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


def predictions(
    args: argparse.Namespace, view: View, found: encodings.Encodings, ours: Clustering | None
) -> Image.Image:
    """What the student predicts at masked patches, beside the teacher's patterns or the patches' own pixels."""
    settings, encoder = view.model.mim, view.model.backbone.image_encoder
    similarity = found.similarity[view.shown]
    uniform = torch.rand(similarity.shape, generator=torch.Generator().manual_seed(args.seed))
    guided = settings.masking == "text_guided"
    masks = encodings.draw_masks(similarity, settings.mask_ratio, settings.mask_temperature, uniform, guided)
    predicted = encodings.predict_masked(view.model, *view.inputs(), masks.to(view.inputs()[0].device)).cpu()
    places = encodings.masked_places(masks)
    if settings.target == "pixels":
        return pixel_predictions(view, masks, places, predicted, encoder.patch_size)
    targets = ours.assignment[view.shown].gather(1, places)
    choices = predicted.argmax(-1)
    colors = drawing.colors_of(figures.by_frequency(torch.cat([targets, choices])))
    columns: dict[str, list[Image.Image]] = {"the teacher's patterns": [], "the student's predictions": []}
    for image, place, *values in zip(view.images, places, targets, choices, strict=True):
        for column, patterns in zip(columns.values(), values, strict=True):
            pairs = dict(zip(place.tolist(), patterns.tolist(), strict=True))
            column.append(figures.partial_layout(image, pairs, encoder.grid, colors))
    same = (targets == choices).sum(1).tolist()
    captions = [f"{caption} ({n} of {places.shape[1]} agree)" for caption, n in zip(view.captions, same, strict=True)]
    frequent = figures.by_frequency(targets)[:12]
    kinds = [Cluster(str(cluster), examples(ours, cluster, 4)) for cluster in frequent]
    legend = figures.legend(
        "Legend: patterns and patches that have them", kinds, colors, view.samples.images, encoder.grid
    )
    explanation = (
        "The student sees the image without the gray patches, and the caption; the teacher sees all of it. A color is "
        f"a pattern; {sum(same) / targets.numel():.0%} of these {targets.numel()} predictions equal the teacher's."
    )
    title = "Predictions at masked patches beside their targets"
    return figures.prediction_figure(view.images, masks, columns, captions, [legend], title, explanation)


def pixel_predictions(view: View, masks: Tensor, places: Tensor, predicted: Tensor, patch_size: int) -> Image.Image:
    """Predicted pixels in the place of the masked patches. predicted: [B, M, 3 p p], normalized per patch"""
    column = []
    for image, pixels, place, values in zip(view.images, view.pixels, places, predicted, strict=True):
        patches = encodings.patch_pixels(to_unit_tensor(image)[None], patch_size)[0]
        normalized = encodings.patch_pixels(pixels[None], patch_size)[0]  # CLIP's, in which the model predicts
        scale = patches[place].std() / normalized[place].std()
        restored = encodings.denormalized_prediction(values, normalized[place])
        patches[place] = (restored - normalized[place].mean()) * scale + patches[place].mean()
        column.append(drawing.to_image(encodings.pixels_to_image(patches, patch_size), figures.SIDE))
    explanation = (
        "The student predicts each gray patch's pixels up to brightness and contrast, which are the true ones here."
    )
    title = "Predictions at masked patches beside their targets"
    return figures.prediction_figure(
        view.images, masks, {"its prediction": column}, view.captions, [], title, explanation
    )


# ---------------------------------------------------------------------------------------------------------- the page


def write_page(path: Path, checkpoint: Path, drawn: dict[str, Image.Image], numbers: dict | None) -> None:
    """All figures, and the numbers where there are any, in one file."""
    links = [f'<a href="#{name}">{name.replace("_", " ")}</a>' for name in [*(["numbers"] if numbers else []), *drawn]]
    parts = [f"<h1>Figures of {html.escape(str(checkpoint))}</h1>", f"<nav>{''.join(links)}</nav>"]
    parts += [numbers_html(numbers)] if numbers else []
    parts += [f'<figure class=large id="{name}">{pages.inline(image, name)}</figure>' for name, image in drawn.items()]
    pages.write_page(path, f"Figures of {checkpoint}", "\n".join(parts))


if __name__ == "__main__":
    run_main(main)
