"""Figures of a pre-training checkpoint, and how well its patterns agree with what is in the images.

    python -m tools.visualize --checkpoint output/demo/pretrain/checkpoint_last.pth
    python -m tools.visualize --checkpoint FILE --data data/coco/annotations/coco_val.json --image_root data/coco/images
    python -m tools.visualize --checkpoint FILE --codebook data/flava-image-codebook

Writes PNG files into --output (default: `figures` beside the checkpoint):
figure2_*.png (the clearest patches of some patterns in their context) and figure3.png (each patch in its pattern's
color) for the encoding head, for k-means of pixels and, with --codebook, for DALL-E's dVAE; masking.png (random and
text-guided masks, the similarity map, the caption).

Without --data the demo's scenes are drawn, those that no training has seen, and each patch's object is known; then
numbers.json holds, and the console shows, the adjusted mutual information between patterns and object class, color and
background (0 by chance, 1 if they are the same), and the share of masked patches on objects that the caption names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate

from dataset.annotations import Source, load_annotations
from dataset.common import EmptyCaption, usable_caption
from dataset.text import Tokenizer
from dataset.transforms import ImageError, open_image, to_tensor
from models.mim import CodebookTarget
from models.pretrain import PretrainModel, build_pretrain_model
from models.weights import check_value, load_exactly
from tools.demo import scenes
from tools.visualize import encodings
from tools.visualize.scenes import Labels, patch_labels, scene_numbers
from utils import UserError, as_config, choose_device, load_checkpoint, own_folder, run_main, write_json

OURS, PIXELS, DVAE = "encoding head", "k-means of pixels", "dvae"


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from tools.visualize import figures  # here: matplotlib takes half a second to import

    model, tokenizer, max_tokens, max_words = load_model(args.checkpoint, torch.device(choose_device(args.device)))
    output = own_folder(args.output or args.checkpoint.parent / "figures", "tools.visualize")  # before the work
    encoder, mim = model.backbone.image_encoder, model.mim
    samples = read_samples if args.data else draw_scenes
    images, captions, known = samples(args, encoder.image_size, encoder.grid, max_words)
    inputs = torch.stack([to_tensor(image) for image in images]), *tokenizer.encode(captions, max_tokens)
    similarity, ours = encodings.encode(model, *inputs)
    count = max(2, len(ours.assignment.unique())) if ours else 64  # of k-means, as many clusters as we use patterns
    clusterings = {OURS: ours} if ours else {}
    clusterings[PIXELS] = encodings.kmeans_of_pixels(images, encoder.patch_size, count, args.seed)
    if args.codebook:
        clusterings[DVAE] = encodings.dvae_codes(CodebookTarget(args.codebook), images, encoder.grid)

    shown = slice(args.show)
    uniform = torch.rand(similarity[shown].shape, generator=torch.Generator().manual_seed(args.seed))
    masks = {
        heading: encodings.draw_masks(similarity[shown], mim.mask_ratio, mim.mask_temperature, uniform, by_text)
        for heading, by_text in (("masked at random", False), ("masked by the text", True))
    }
    drawn = {
        f"figure2_{name.replace(' ', '_')}": figures.pattern_figure(images, name, clustering, encoder.grid)
        for name, clustering in clusterings.items()
    }
    drawn["figure3"] = figures.layouts(images[shown], captions[shown], clusterings)
    drawn["masking"] = figures.masking_figure(images[shown], captions[shown], masks, similarity[shown])
    for name, figure in drawn.items():
        figure.savefig(output / f"{name}.png")
    if known:
        assignments = {name: clustering.assignment for name, clustering in clusterings.items()}
        numbers = scene_numbers(known, similarity, assignments, (mim.mask_ratio, mim.mask_temperature), args.seed)
        write_json(output / "numbers.json", numbers)
        print(f"{numbers['images']} scenes, {numbers['patches']} patches")
        for title, key in (("adjusted mutual information", "agreement"), ("share of patches", "masked")):
            rows = [{title: name, **values} for name, values in numbers[key].items()]
            print(f"\n{tabulate(rows, 'keys', floatfmt='.3f')}")
    print(output)


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
    check_value("--images", args.images, int)
    check_value("--show", args.show, int)
    return args


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


def draw_scenes(
    args: argparse.Namespace, size: int, grid: int, max_words: int
) -> tuple[list[Image.Image], list[str], Labels]:
    """Scenes of the test split, which no training shows, each with one of its captions, and what its patches show."""
    chosen = [scenes.make_scene(args.seed, index) for index in scenes.plan(args.seed, {"test": args.images})["test"]]
    captions = [usable_caption(scenes.captions(scene)[0], max_words, "scene") for scene in chosen]
    return [scenes.render(s, size) for s in chosen], captions, patch_labels(chosen, captions, size, grid)


def read_samples(
    args: argparse.Namespace, size: int, grid: int, max_words: int
) -> tuple[list[Image.Image], list[str], Labels]:
    """Every n-th entry of --data, so that --images of them cover the files; unreadable images are left out.

    Nothing is known of what their patches show.
    """
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
    return images, captions, {}


if __name__ == "__main__":
    run_main(main)
