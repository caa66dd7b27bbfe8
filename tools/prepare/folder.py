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
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.annotations import COCO_NAME, KINDS, Source, located_entries, strings
from dataset.files import IMAGE_ENDINGS, captions_beside, folder_images
from dataset.official import tidy
from dataset.text import clean_caption
from dataset.transforms import ImageError
from tools.prepare.common import Job
from tools.prepare.image_hash import NO_FILE, fingerprints, group_images
from utils import HALF_SURROGATE, UserError, find_file, shown

ALL_LINES, FIRST_LINE = "all-lines", "first-line"
SHARE, MOST = 0.1, 1000  # of the images for validation and test each, by default
LARGE, FEW = 0.1, 10  # a group of more look-alikes than this share of the images, and than this number, is not believed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of the images, in it or in folders in it")
    add("--output", type=Path, required=True, help="folder to write into; configs/small name data/own")
    add(
        "--captions",
        default=ALL_LINES,
        help=f"{ALL_LINES} or {FIRST_LINE} of the .txt beside each image, or a file that names the images "
        "(default: %(default)s)",
    )
    add("--columns", nargs="*", default=[], metavar="KEY=NAME", help="what image and caption are called in that file")
    what = f"images for %s: a number, or a share below 1 (default: {SHARE}, at most {MOST})"
    add("--val", type=amount, help=what % "validation")
    add("--test", type=amount, help=what % "test")
    add("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that compare images (default: %(default)s)")


def amount(text: str) -> float:
    """A number of images, or a share below 1."""
    number = float(text)
    if not (0 <= number < 1 or number.is_integer() and number > 0):
        raise ValueError(text)
    return number


def prepare(job: Job) -> None:
    options = job.options
    if not options.source.is_dir():
        raise UserError(f"--source {options.source}: no such folder")
    in_file = options.captions not in (ALL_LINES, FIRST_LINE)
    if options.columns and not in_file:
        raise UserError(f"--columns {' '.join(options.columns)}: needs --captions FILE, whose columns they are")
    ids: dict[str, str | int] = {}
    found = captions_of_file(job, ids) if in_file else captions_beside_images(job)
    captions = usable_captions(job, found)
    splits = split(job, same_images(job, captions))
    write_splits(job, captions, image_ids(job, captions) | ids, splits)


# ------------------------------------------------------------------------------------------------ captions


def captions_beside_images(job: Job) -> Iterator[tuple[str, list[str]]]:
    """(path of an image, its captions as they stand), in the images' order, from the .txt beside each."""
    texts = set(job.source.rglob("*.txt"))
    for image, text in folder_images(job.source):
        texts.discard(text)
        try:
            found = [caption for _, caption in captions_beside(text)]
        except UserError as error:
            job.leave_out("image whose .txt cannot be read", str(error))
            continue
        yield image, found[:1] if job.options.captions == FIRST_LINE else found
    for text in sorted(texts):
        job.leave_out(f"caption without an image ({', '.join(IMAGE_ENDINGS)})", str(text))


def captions_of_file(job: Job, ids: dict[str, str | int]) -> Iterator[tuple[str, list[str]]]:
    """(path of an image, its captions as they stand), in the file's order, of a file that names images below SOURCE;
    ids: gets the file's own `image_id`s."""
    path, names = find_file(job.options.captions, "--captions"), {}
    for text in job.options.columns:
        key, _, names[key] = text.partition("=")
        if key not in KINDS["pretrain"] or not names[key]:
            raise UserError(f"--columns {text}: must be image=NAME or caption=NAME")
    captions: dict[str, list[str]] = {}
    for where, entry in located_entries(Source(path, job.source, columns=names), "caption"):
        image = os.path.normpath(entry["image"])
        captions.setdefault(image, []).extend(strings(entry.get("caption") or []))
        if entry.get("image_id") is not None and ids.setdefault(image, entry["image_id"]) != entry["image_id"]:
            raise UserError(f"{where}: {image} has the image_id {entry['image_id']!r}, but {ids[image]!r} before")
    listed = {os.path.abspath(image) for image in captions}
    for image, _ in folder_images(job.source):
        if os.path.abspath(image) not in listed:
            job.leave_out(f"image that {path.name} does not name", image)
    yield from captions.items()


def usable_captions(job: Job, found: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """The images with their captions in one line each, every caption once, without images that have none."""
    captions = {}
    for image, texts in found:
        if HALF_SURROGATE.search(image):
            job.leave_out("image whose name is not UTF-8", image)
            continue
        usable = []
        for text in dict.fromkeys(map(tidy, texts)):
            if clean_caption(text, 1):
                usable.append(text)
            else:
                job.leave_out("caption without a word", f"{image}: {shown(text)}")
        if usable:
            captions[image] = usable
        else:
            job.leave_out("image without a caption", image)
    return captions


# ------------------------------------------------------------------------------------------------ splits


def same_images(job: Job, captions: dict[str, list[str]]) -> list[list[str]]:
    """The images that can be read, in order, those that show the same in one group."""
    readable = {}
    for path, mark in fingerprints(list(captions), job.options.workers, "comparing images"):
        if isinstance(mark, ImageError):
            how = "is missing" if mark.reason == NO_FILE else "cannot be read"
            job.leave_out(f"image that {how}", str(mark))
        else:
            readable[path] = mark
    if not readable:
        raise UserError(f"--source {job.source}: no image with a caption that can be used; see the counts above")
    numbers, crowd = group_images(list(readable.values()), max(FEW, int(LARGE * len(readable))))
    groups: dict[int, list[str]] = {}
    for path, number in zip(readable, numbers.tolist(), strict=True):
        groups.setdefault(number, []).append(path)
    if crowd:
        job.warn(
            f"{crowd:,} of {len(readable):,} images look alike, in groups of more than a tenth of all: of these only "
            "files with the same bytes are kept in one split, so that test images may look like training's"
        )
    job.count("images that show what another shows, kept in its split", len(readable) - len(groups))
    return list(groups.values())


def split(job: Job, groups: list[list[str]]) -> dict[str, list[str]]:
    """{"train": images, "val": ..., "test": ...}, each in the images' order: groups drawn one after the other, as long
    as they fit, for test, then for validation; the rest is training's."""
    images = [image for group in groups for image in group]
    room = {}
    for key, given in (("test", job.options.test), ("val", job.options.val)):
        share = min(SHARE, MOST / len(images)) if given is None else given
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


def image_ids(job: Job, images: Iterable[str]) -> dict[str, str | int]:
    """{image: COCO's number in its name, if all have one of their own, else its path below SOURCE}"""
    below = {image: os.path.relpath(image, job.source) for image in images}
    numbers = {image: int(found[1]) for image, name in below.items() if (found := COCO_NAME.search(name))}
    return numbers if len(set(numbers.values())) == len(below) else below


def write_splits(job: Job, captions: dict[str, list[str]], ids: dict, splits: dict[str, list[str]]) -> None:
    """train.json, val.json and test.json. Paths are relative to the lists, or absolute if SOURCE is not below OUTPUT's
    parent folder."""
    source, output = job.source.resolve(), job.output.resolve()
    folder = os.path.relpath(source, output) if source.is_relative_to(output.parent) else str(source)
    for name, images in splits.items():
        if not images:
            job.note(f"no image for {name}: {name}.json is not written")
            if job.owns(job.output / f"{name}.json"):
                (job.output / f"{name}.json").unlink()  # of an earlier run, whose images are training's now
            continue
        entries = []
        for image in images:
            path = os.path.normpath(os.path.join(folder, os.path.relpath(image, job.source)))
            entry = {"image": path, "image_id": ids[image]}
            for texts in captions[image] if name == "train" else [captions[image]]:
                entries.append({**entry, "caption": texts})
        job.write(f"{name}.json", entries)
        job.count(f"images, {name}", len(images))
        job.count(f"captions, {name}", sum(len(captions[image]) for image in images))
