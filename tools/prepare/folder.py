"""Images of one's own with their captions: lists for training, validation and test.

    python -m tools.prepare folder --source photos --output data/own
    python -m tools.prepare folder --source photos --output data/own --captions photos/captions.csv --val 500 --test 500

The captions are in a .txt beside each image (a caption a line, or with `--captions first-line` the first line alone),
or in one file that names the images: .csv, .tsv, .jsonl, .json, or `name<TAB>caption` lines in a .txt or .token;
`--columns image=filepath caption=title` says what its columns are called.

Writes train.json (an entry a caption), val.json and test.json (an entry an image) of {"image", "image_id", "caption"},
which pre-training, retrieval and captioning all read (configs/small). Images are split, not captions, and images that
show the same (the same bytes, or the same image in another size or compression) are in one split only.
"""

import argparse
import os
import random

from dataset.annotations import Source, located_entries, strings
from dataset.files import IMAGE_ENDINGS, captions_beside, folder_images
from dataset.official import coco_number, tidy
from dataset.text import clean_caption
from dataset.transforms import ImageError
from models.weights import check_value
from tools.prepare.common import Job
from tools.prepare.image_hash import fingerprints, group_images
from utils import UserError

ALL_LINES, FIRST_LINE = "all-lines", "first-line"
SHARE, MOST = 0.1, 1000  # of the images for validation and test each, by default
LARGE, FEW = 0.1, 10  # a group of more look-alikes than this share of the images, and than this number, is not believed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    which = f"{ALL_LINES} or {FIRST_LINE} of the .txt beside each image, or a file that names the images"
    add("--captions", default=ALL_LINES, help=f"{which} (default: %(default)s)")
    add("--columns", nargs="*", default=[], metavar="KEY=NAME", help="what image and caption are called in that file")
    what = f"images for %s: a number, or a share below 1 (default: {SHARE}, at most {MOST})"
    add("--val", type=float, help=what % "validation")
    add("--test", type=float, help=what % "test")
    add("--seed", type=int, default=0, help="of the split (default: %(default)s)")


def prepare(job: Job) -> None:
    if job.options.captions in (ALL_LINES, FIRST_LINE):
        found, ids = captions_beside_images(job), {}
    else:
        found, ids = captions_of_file(job)
    captions = usable_captions(job, found)
    splits = split(job, same_images(job, captions))
    write_splits(job, captions, ids, splits)


def captions_beside_images(job: Job) -> dict[str, list[str]]:
    """{path of an image: its captions as they stand}, in the images' order, from the .txt beside each."""
    captions, texts = {}, set(job.source.rglob("*.txt"))
    for image, text in folder_images(job.source):
        texts.discard(text)
        try:
            lines = [caption for _, caption in captions_beside(text)]
        except UserError as error:
            job.leave_out("image whose .txt cannot be read", str(error))
            continue
        captions[image] = lines[:1] if job.options.captions == FIRST_LINE else lines
    for text in sorted(texts):
        job.leave_out(f"caption without an image ({', '.join(IMAGE_ENDINGS)})", str(text))
    return captions


def captions_of_file(job: Job) -> tuple[dict[str, list[str]], dict[str, str | int]]:
    """{path of an image: its captions as they stand}, in the order of a file that names images below SOURCE, and
    {path: the file's own `image_id`}."""
    columns = {key: name for key, _, name in (text.partition("=") for text in job.options.columns)}
    captions: dict[str, list[str]] = {}
    ids: dict[str, str | int] = {}
    for _, entry in located_entries(Source(job.options.captions, job.source, columns=columns), "caption"):
        image = os.path.normpath(entry["image"])
        captions.setdefault(image, []).extend(strings(entry.get("caption") or []))
        if entry.get("image_id") is not None:
            ids[image] = entry["image_id"]
    return captions, ids


def usable_captions(job: Job, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The images with their captions in one line each, every caption once, without images that have none."""
    captions = {}
    for image, texts in found.items():
        usable = []
        for text in dict.fromkeys(map(tidy, texts)):
            if clean_caption(text, 1):
                usable.append(text)
            else:
                job.leave_out("caption without a word", f"{image}: {text}")
        if usable:
            captions[image] = usable
        else:
            job.leave_out("image without a caption", image)
    return captions


def same_images(job: Job, captions: dict[str, list[str]]) -> list[list[str]]:
    """The images that can be read, in order, those that show the same in one group."""
    readable = {}
    for path, mark in fingerprints(list(captions), job.options.workers, "comparing images"):
        if isinstance(mark, ImageError):
            job.leave_out("image that cannot be read", str(mark))
        else:
            readable[path] = mark
    if not readable:
        raise UserError(f"--source {job.source}: no image with a caption can be used; see what was left out")
    numbers, crowd = group_images(list(readable.values()), max(FEW, int(LARGE * len(readable))))
    groups: dict[int, list[str]] = {}
    for path, number in zip(readable, numbers.tolist(), strict=True):
        groups.setdefault(number, []).append(path)
    if crowd:
        job.warn(f"{crowd:,} images look alike: only files with the same bytes count as copies among them")
    job.count("images that show what another shows, kept in its split", len(readable) - len(groups))
    return list(groups.values())


def split(job: Job, groups: list[list[str]]) -> dict[str, list[str]]:
    """{"train": images, "val": ..., "test": ...}, each in the images' order: groups drawn one after the other, as long
    as they fit, for test, then for validation; the rest is training's."""
    images = [image for group in groups for image in group]
    room = {}
    for key, given in (("test", job.options.test), ("val", job.options.val)):
        share = min(SHARE, MOST / len(images)) if given is None else given
        check_value(f"--{key}", share, float, 0)
        room[key] = round(share * len(images)) if share < 1 else int(share)
    if sum(room.values()) > len(images) - 2:
        raise UserError(
            f"--val {room['val']} and --test {room['test']} leave fewer than two of {len(images)} images for training"
        )
    place = {image: number for number, image in enumerate(images)}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for group in random.Random(job.options.seed).sample(groups, len(groups)):
        name = next((key for key, left in room.items() if len(group) <= left), "train")
        splits[name] += group
        if name != "train":
            room[name] -= len(group)
    return {name: sorted(part, key=place.__getitem__) for name, part in splits.items()}


def write_splits(job: Job, captions: dict[str, list[str]], ids: dict, splits: dict[str, list[str]]) -> None:
    """train.json, val.json and test.json. Paths are relative to the lists, or absolute if SOURCE is not below OUTPUT's
    parent folder. ids: the captions' file's; of others COCO's number in the name, if all names have one of their own,
    else the path below SOURCE."""
    below = {image: os.path.relpath(image, job.source) for image in captions}
    numbers = {image: number for image, name in below.items() if (number := coco_number(name)) is not None}
    ids = (numbers if len(set(numbers.values())) == len(below) else below) | ids
    source, output = job.source.resolve(), job.output.resolve()
    folder = os.path.relpath(source, output) if source.is_relative_to(output.parent) else str(source)
    for name, images in splits.items():
        if not images:
            old = (job.output / f"{name}.json").exists()
            job.warn(f"no image for {name}: {name}.json is not written{'; remove the earlier one' * old}")
            continue
        entries = []
        for image in images:
            entry = {"image": os.path.normpath(os.path.join(folder, below[image])), "image_id": ids[image]}
            for texts in captions[image] if name == "train" else [captions[image]]:
                entries.append({**entry, "caption": texts})
        job.write(f"{name}.json", entries)
        job.count(f"images, {name}", len(images))
        job.count(f"captions, {name}", sum(len(captions[image]) for image in images))
