"""Scenes that can tell where masks should lie: five small objects, of which a caption names one (docs/study.md).

    python -m tools.demo.crowd write --output output/study/crowd_96 --size 96
    python -m tools.demo.crowd measure --checkpoint output/study/masks_96/checkpoint_last.pth

`write` makes images/ and pretrain.json. Objects have the same size in pixels whatever the image's: the larger the grid
of patches, the smaller a part of it is named. `measure` shows a checkpoint other scenes of the same size, prints what
it finds and writes it into crowd.json beside the checkpoint:

recall: of 432 descriptions the best for an image is true, and the best image for a description holds the object (mean
of both, percent), by ITC and re-ranked; color, shape, size, place: how often the true one gets the highest score of
ITC among descriptions that differ in this alone; masked: share of the named object's patches that are masked, and
share of the masked patches that lie on it.
"""

import argparse
import itertools
import random
from pathlib import Path

import torch
from torch import Tensor

from dataset.transforms import to_tensor
from tools.demo import scenes
from tools.prepare.common import progress, whole_folder
from utils import run_main, write_json

OBJECTS = 5
PIXELS = {"small": 18, "large": 24}  # side of an object: one and a half and two patches of the demo's 12 pixels
STARTS = ("", "there is ", "we see ", "this picture shows ", "a picture of ")
ATTRIBUTES = {  # a description has one of each
    "size": tuple(PIXELS),
    "color": tuple(scenes.COLORS),
    "shape": scenes.SHAPES,
    "place": tuple(itertools.chain(*scenes.PLACES)),
}
DESCRIPTIONS = list(itertools.product(*ATTRIBUTES.values()))
LEAST = 0.1  # share of a patch that an object covers to count: small ones lie across four
SEED, TRAIN, SHOWN = 0, 8000, 300  # scenes to train on; those that are shown come after them


# ---------------------------------------------------------------- scenes


def make_scene(seed: int, index: int, size: int) -> scenes.Scene:
    """Five objects in different cells of a 3 x 3 grid, no two alike in shape and color."""
    rng = random.Random(f"{seed}/{index}/crowd")
    kinds = rng.sample(list(itertools.product(scenes.SHAPES, scenes.COLORS)), OBJECTS)
    objects = []
    for (shape, color), cell in zip(kinds, rng.sample(scenes.CELLS, OBJECTS), strict=True):
        extent = rng.choice(list(PIXELS))
        place, box = scenes.place_in(cell, PIXELS[extent] / size, PIXELS[extent] / size)
        objects.append(scenes.SceneObject(shape, color, extent, "", place, box))
    return scenes.Scene(seed, index, rng.choice(list(scenes.BACKGROUNDS)), rng.choice(scenes.FINISHES), tuple(objects))


def description(o: scenes.SceneObject) -> tuple[str, str, str, str]:
    """The object's row of DESCRIPTIONS."""
    return o.size, o.color, o.shape, o.place


def describe(size: str, color: str, shape: str, place: str) -> str:
    return f"a {size} {color} {shape} {scenes.place_words(place)}"


def captions(scene: scenes.Scene) -> list[str]:
    """One for each object, which names no other."""
    rng = scene.rng("captions")
    return [rng.choice(STARTS) + describe(*description(o)) for o in scene.objects]


def write(args: argparse.Namespace) -> None:
    with whole_folder(args.output) as folder:
        (folder / "images").mkdir()
        entries = []
        for index in progress(range(TRAIN), "crowded scenes", "images"):
            scene, image = make_scene(SEED, index, args.size), f"images/{index:07d}.png"
            scenes.render(scene, args.size).save(folder / image)
            entries.append({"image": image, "caption": captions(scene)})
        write_json(folder / "pretrain.json", entries)


# ---------------------------------------------------------------- measures


def true_descriptions(shown: list[scenes.Scene]) -> Tensor:
    """bool [I, 432]: which descriptions are true of each scene."""
    true = [{description(o) for o in scene.objects} for scene in shown]
    return torch.tensor([[row in rows for row in DESCRIPTIONS] for rows in true])


def recall(scores: Tensor, true: Tensor) -> float:
    """Scores and truth [I, 432] -> percent of images whose best description is true, and the reverse, averaged.

    Descriptions that are true of no image are no queries, only candidates.
    """
    of_images = true.gather(1, scores.argmax(1, keepdim=True)).float().mean()
    asked = true.any(0)
    of_texts = true[:, asked].gather(0, scores[:, asked].argmax(0, keepdim=True)).float().mean()
    return 50 * (of_images + of_texts).item()


def attribute_accuracy(scores: Tensor, true: Tensor) -> dict[str, float]:
    """How often an object's true value of each attribute scores highest, in percent; all else of it is given."""
    shape = [len(values) for values in ATTRIBUTES.values()]
    scores, true = scores.view(-1, *shape), true.view(-1, *shape)
    found = {}
    for axis, name in enumerate(ATTRIBUTES, start=1):
        best = torch.zeros_like(true).scatter_(axis, scores.argmax(axis, keepdim=True), True)
        found[name] = 100 * best[true].float().mean().item()
    return found


def masked_shares(masks: Tensor, named: Tensor) -> dict[str, float]:
    """Masks [D, I, N] of I images, the patches [I, N] of the named object -> both shares in percent."""
    both = (masks & named).sum().float()
    shares = {"of the named": both / named.sum() / len(masks), "on the named": both / masks.sum()}
    return {name: 100 * share.item() for name, share in shares.items()}


def measure(args: argparse.Namespace) -> None:
    from semmim import SemMIM  # here and below: `write` needs neither models nor clusters
    from tools.visualize.__main__ import DRAWS, load_model
    from tools.visualize.encodings import draw_masks, encode

    pretrained, tokenizer, max_tokens, _ = load_model(args.checkpoint, torch.device("cpu"))
    mim, size, grid = (
        pretrained.mim,
        pretrained.backbone.image_encoder.image_size,
        pretrained.backbone.image_encoder.grid,
    )
    shown = [make_scene(SEED, TRAIN + index, size) for index in range(SHOWN)]
    pictures = [scenes.render(scene, size) for scene in shown]
    model = SemMIM.from_pretrained(args.checkpoint)
    texts = [describe(*row) for row in DESCRIPTIONS]
    itc = model.encode_image(pictures) @ model.encode_text(texts).T / model.temperature  # [I, 432]
    odds = model.match(pictures, texts).logit(eps=1e-7)  # near 1 and 0 a float32 cannot tell more
    true = true_descriptions(shown)
    found = {"recall": {"itc": recall(itc, true), "re-ranked": recall(odds + itc, true)}}
    found |= attribute_accuracy(itc, true)

    first = [scene.objects[0] for scene in shown]
    views = torch.stack([to_tensor(picture) for picture in pictures])
    similarity, _ = encode(pretrained, views, *tokenizer.encode([describe(*description(o)) for o in first], max_tokens))
    patches = torch.tensor([scenes.patch_objects(scene, size, grid, LEAST) for scene in shown])  # [I, N]
    uniform = torch.rand((DRAWS, *similarity.shape), generator=torch.Generator().manual_seed(SEED))
    by_text = mim.masking == "text_guided"
    masks = [draw_masks(similarity, mim.mask_ratio, mim.mask_temperature, part, by_text) for part in uniform]
    found["masked"] = masked_shares(torch.stack(masks), patches == 0)
    write_json(args.checkpoint.parent / "crowd.json", found)
    print(found)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.demo.crowd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    writing, measuring = commands.add_parser("write"), commands.add_parser("measure")
    writing.add_argument("--output", type=Path, required=True, help="folder to write into")
    writing.add_argument("--size", type=int, default=96, help="side of an image in pixels")
    measuring.add_argument("--checkpoint", type=Path, required=True, help="of Pretrain.py")
    for command, function in ((writing, write), (measuring, measure)):
        command.set_defaults(function=function)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    run_main(main)
