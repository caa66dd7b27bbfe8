"""Figures of a pre-training checkpoint, and how well its patterns agree with what is in the images.

    python -m tools.visualize --checkpoint output/demo/pretrain/checkpoint_last.pth
    python -m tools.visualize --checkpoint FILE --data data/coco/annotations/coco_val.json --image_root data/coco/images
    python -m tools.visualize --checkpoint FILE --codebook data/flava-image-codebook

Writes into --output (default: `figures` beside the checkpoint) PNG files and index.html, which holds all of them:
figure2_*.png (patches of the purest patterns in their context) and figure3.png (each patch in its pattern's
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
from pathlib import Path

import torch
from PIL import Image
from sklearn.cluster import KMeans
from tabulate import tabulate

from dataset.annotations import Source, load_annotations
from dataset.common import EmptyCaption, usable_caption
from dataset.text import Tokenizer
from dataset.transforms import ImageError, open_image, to_pixels, to_tensor, to_unit
from models.mim import CodebookTarget
from models.pretrain import PretrainModel, build_pretrain_model
from models.weights import load_exactly
from tools import pages
from tools.demo import scenes
from tools.visualize import encodings, views
from tools.visualize.scenes import DRAWS, Samples, number_tables, patch_labels, scene_numbers
from tools.visualize.views import Clustering, View
from utils import UserError, as_config, choose_device, load_checkpoint, own_folder, run_main, write_json

BATCH = 50
OURS, PIXELS, TOKENS, DVAE = "encoding head", "k-means of pixels", "k-means of encoder tokens", "dVAE"
FIGURE_2 = {OURS: "figure2_encoding_head", PIXELS: "figure2_kmeans_of_pixels", DVAE: "figure2_dvae"}
FIGURE_2 = {OURS: "figure2_encoding_head", PIXELS: "figure2_kmeans_of_pixels", DVAE: "figure2_dvae"}


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
    pixels = torch.stack([to_tensor(image) for image in images])
    view = View(model, tokenizer, images, captions, pixels, *text, similarity, args.seed)
    drawn = {
        FIGURE_2[name]: views.pattern_figure(samples, name, clustering, known, grid)
        for name, clustering in clusterings.items()
        if name in FIGURE_2
    }
    drawn |= {"figure3": views.layouts(view, clusterings, OURS), "masking": views.masking(view)}
    drawn["attention"] = views.attention(view)
    if OURS in clusterings:
        drawn["predictions"] = views.predictions(view, clusterings[OURS])
    files = {name: output / f"{name}.png" for name in drawn}
    for name, path in files.items():
        pages.save_figure(drawn[name], path)
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
    values = {"figures": files, "numbers": numbers, "tables": tables, "draws": DRAWS}
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


if __name__ == "__main__":
    run_main(main)
