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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from dataset.annotations import Source, load_annotations
from dataset.common import EmptyCaption, usable_caption
from dataset.text import Tokenizer
from dataset.transforms import ImageError, open_image, to_tensor
from models.mim import CodebookTarget
from models.pretrain import PretrainModel, build_pretrain_model
from models.weights import check_value, load_exactly
from tools.demo import scenes
from tools.visualize import encodings
from utils import UserError, as_config, choose_device, load_checkpoint, own_folder, run_main, write_json

SHOWN = 6  # images of Figure 3 and of the masks
SEED = 0  # of scenes, masks and k-means
DRAWS = 20  # masks per image behind the share of masked patches on named objects
KINDS = ("named", "unnamed", "background")  # of a patch: an object that the caption names, another one, none
LABELS = ("object", "class", "color", "background")
# {labelling, or "kind": the name of each of B * N patches, "" if the labelling is not about it}
Labels = dict[str, np.ndarray]
OURS, PIXELS, DVAE = "encoding head", "k-means of pixels", "dvae"


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from tools.visualize import figures  # here: matplotlib takes half a second to import

    model, tokenizer, max_tokens, max_words = load_model(args.checkpoint, torch.device(choose_device(args.device)))
    output = own_folder(args.output or args.checkpoint.parent / "figures", "tools.visualize")  # before the work
    encoder, mim = model.backbone.image_encoder, model.mim
    known: Labels = {}  # what the patches show
    if args.data:
        images, captions = read_samples(Source(args.data, args.image_root), args.images, encoder.image_size, max_words)
    else:
        images, captions, known = draw_scenes(args.images, encoder.image_size, encoder.grid, max_words)
    inputs = torch.stack([to_tensor(image) for image in images]), *tokenizer.encode(captions, max_tokens)
    similarity, ours = encodings.encode(model, *inputs)
    count = max(2, len(ours.assignment.unique())) if ours else 64  # of k-means, as many clusters as we use patterns
    clusterings = {OURS: ours} if ours else {}
    clusterings[PIXELS] = encodings.kmeans_of_pixels(images, encoder.patch_size, count, SEED)
    if args.codebook:
        clusterings[DVAE] = encodings.dvae_codes(CodebookTarget(args.codebook), images, encoder.grid)

    shown = slice(SHOWN)
    uniform = torch.rand(similarity[shown].shape, generator=torch.Generator().manual_seed(SEED))
    masks = {
        heading: encodings.draw_masks(similarity[shown], mim.mask_ratio, mim.mask_temperature, uniform, by_text)
        for heading, by_text in (("masked at random", False), ("masked by the text", True))
    }
    drawn = {
        f"figure2_{name.replace(' ', '_')}": figures.pattern_figure(images, name, clustering, encoder.grid)
        for name, clustering in clusterings.items()
    }
    drawn["figure3"] = figures.layout_figure(images[shown], captions[shown], clusterings)
    drawn["masking"] = figures.masking_figure(images[shown], captions[shown], masks, similarity[shown])
    for name, figure in drawn.items():
        figure.savefig(output / f"{name}.png")
    if known:
        assignments = {name: clustering.assignment for name, clustering in clusterings.items()}
        numbers = scene_numbers(known, similarity, assignments, (mim.mask_ratio, mim.mask_temperature), SEED)
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
    add("--codebook", help="folder of a FlavaImageCodebook: the dVAE beside ours")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    check_value("--images", args.images, int)
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


def draw_scenes(count: int, size: int, grid: int, max_words: int) -> tuple[list[Image.Image], list[str], Labels]:
    """Scenes of the test split, which no training shows, each with one of its captions, and what its patches show."""
    chosen = [scenes.make_scene(SEED, index) for index in scenes.plan(SEED, {"test": count})["test"]]
    captions = [usable_caption(scenes.captions(scene)[0], max_words, "scene") for scene in chosen]
    return [scenes.render(s, size) for s in chosen], captions, patch_labels(chosen, captions, size, grid)


def read_samples(source: Source, count: int, size: int, max_words: int) -> tuple[list[Image.Image], list[str]]:
    """Every n-th image with its first caption, so that they cover the files; unreadable images are left out."""
    entries, images, captions = load_annotations(source, "pretrain"), [], []
    for entry in entries[:: max(1, len(entries) // count)][:count]:
        caption = entry["caption"] if isinstance(entry["caption"], str) else entry["caption"][0]
        try:
            caption = usable_caption(caption, max_words, entry["image"])
            images.append(open_image(entry["image"]).resize((size, size), Image.Resampling.BICUBIC))
            captions.append(caption)
        except (ImageError, EmptyCaption) as error:
            print(f"left out: {error}", file=sys.stderr)
    if not images:
        raise UserError("--data: no entry has a readable image and a caption (see --image_root)")
    return images, captions


def patch_labels(shown: Sequence[scenes.Scene], captions: Sequence[str], size: int, grid: int) -> Labels:
    rows = []
    for scene, caption in zip(shown, captions, strict=True):
        named = scenes.named_objects(scene, caption)
        for place in scenes.patch_objects(scene, size, grid):
            if place < 0:
                rows.append(("background", "", "", scene.background, "background"))
            else:
                o = scene.objects[place]
                rows.append(("object", o.shape, o.color, "", "named" if named[place] else "unnamed"))
    return dict(zip((*LABELS, "kind"), np.array(rows).T, strict=True))


def agreement(clusters: np.ndarray, known: Labels) -> dict[str, float]:
    """Adjusted mutual information (0 by chance, 1 if equal) with each labelling; the number of clusters, [B * N]."""
    from sklearn.metrics import adjusted_mutual_info_score  # here: scikit-learn takes two seconds to import

    found: dict[str, float] = {"clusters": len(np.unique(clusters))}
    for name in LABELS:
        counts = known[name] != ""
        found[name] = float(adjusted_mutual_info_score(known[name][counts], clusters[counts]))
    return found


def scene_numbers(
    known: Labels, similarity: Tensor, clusterings: dict[str, Tensor], masking: tuple[float, float], seed: int
) -> dict:
    """Agreement of each clustering with the labels; where masked patches lie.

    similarity: [B, N] of each patch with the caption; clusterings: {name: [B, N]}; masking: ratio and temperature of
    the draw.
    """
    rows = {name: agreement(clusters.flatten().numpy(), known) for name, clusters in clusterings.items()}
    kinds = known["kind"].reshape(similarity.shape)
    shares = {"all patches": kind_shares(kinds)}
    uniform = torch.rand((DRAWS, *similarity.shape), generator=torch.Generator().manual_seed(seed))
    for name, guided in (("masked at random", False), ("masked by the text", True)):
        masks = [encodings.draw_masks(similarity, *masking, draw, guided).numpy() for draw in uniform]
        shares[name] = kind_shares(np.concatenate([kinds[mask] for mask in masks]))
    return {"images": len(kinds), "patches": kinds.size, "agreement": rows, "masked": shares}


def kind_shares(kinds: np.ndarray) -> dict[str, float]:
    return {kind: float((kinds == kind).mean()) for kind in KINDS}


if __name__ == "__main__":
    run_main(main)
