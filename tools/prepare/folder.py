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

from dataset.annotations import KINDS, TEXTS, Source, check_kind, located_entries, strings
from dataset.files import IMAGE_ENDINGS, captions_beside, folder_images
from dataset.official import tidy
from dataset.text import clean_caption
from dataset.transforms import ImageError
from tools.prepare.common import Job, progress
from tools.prepare.image_hash import NO_FILE, KnownImages, fingerprints
from utils import HALF_SURROGATE, UserError, find_file, shown

ALL_LINES, FIRST_LINE = "all-lines", "first-line"
PICTURES = (".svg", ".svgz", ".heic", ".heif", ".avif", ".jxl", ".psd", ".eps", ".pdf", ".ai", ".xcf", ".raw", ".dng")
SHARE, MOST = 0.1, 1000  # of the images for validation and test each, by default


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
    add("--val", help=what % "validation")
    add("--test", help=what % "test")
    add("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that compare images (default: %(default)s)")


def prepare(job: Job) -> None:
    options = job.options
    if not options.source.is_dir():
        raise UserError(f"--source {options.source}: no such folder")
    for key in ("val", "test"):
        wanted(key, getattr(options, key), 0)
    names = columns(options.columns)
    if names and options.captions in (ALL_LINES, FIRST_LINE):
        raise UserError(f"--columns {' '.join(options.columns)}: needs --captions FILE, whose columns they are")
    captions = usable_captions(job, read_captions(job, names))
    write_splits(job, captions, split(job, same_images(job, captions)))


def columns(given: list[str]) -> dict[str, str]:
    """{"image": "filepath", ...} of `image=filepath`."""
    names = {}
    for text in given:
        key, _, name = text.partition("=")
        if key not in KINDS["pretrain"] or not name:
            raise UserError(f"--columns {text}: must be image=NAME or caption=NAME")
        names[key] = name
    return names


def wanted(key: str, given: str | None, images: int) -> int:
    """How many of the images a split is to have."""
    if given is None:
        return min(round(SHARE * images), MOST)
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1e9 or (number >= 1 and not number.is_integer()):
        raise UserError(f"--{key} {given}: must be a number of images, or a share from 0 to 1")
    return round(number * images) if number < 1 else int(number)


# ------------------------------------------------------------------------------------------------ captions


def read_captions(job: Job, names: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """(path of an image, its captions as they stand), in the images' order; names: of the columns."""
    how = job.options.captions
    if how not in (ALL_LINES, FIRST_LINE):
        yield from captions_of_file(job, find_file(how, "--captions"), names).items()
        return
    count_unread(job)
    for image, text in folder_images(job.source):
        try:
            texts = [caption for _, caption in captions_beside(text)]
        except UserError as error:
            job.odd("image whose .txt cannot be read, left out", str(error))
            continue
        yield image, texts[:1] if how == FIRST_LINE else texts


def count_unread(job: Job) -> None:
    """Counts captions whose image is none that can be read, such as a drawing in SVG."""
    for parent, names in walk(job.source):
        endings: dict[str, set[str]] = {}
        for name in names:
            stem, ending = os.path.splitext(name)
            endings.setdefault(stem, set()).add(ending.lower())
        for stem, found in endings.items():
            if ".txt" not in found or not found.isdisjoint(IMAGE_ENDINGS):
                continue
            picture = next((ending for ending in PICTURES if ending in found), None)
            kind = f"image in a format that is not read ({picture}), left out"
            job.odd(kind if picture else "caption without an image", os.path.join(parent, stem + (picture or ".txt")))


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of a folder and those in it, in order of name."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield parent, sorted(names)


def captions_of_file(job: Job, path: Path, names: dict[str, str]) -> dict[str, list[str]]:
    """{path of an image: its captions} of a file that names images below SOURCE."""
    captions: dict[str, list[str]] = {}
    for where, entry in located_entries(Source(path, job.source, columns=names), "caption"):
        texts = entry.get("caption") or []  # without one the image is counted, not an end
        if texts:
            check_kind(texts, "caption", TEXTS, where)
        captions.setdefault(os.path.normpath(entry["image"]), []).extend(strings(texts))
    listed = {os.path.abspath(image) for image in captions}
    for image in (os.path.join(parent, name) for parent, names in walk(job.source) for name in names):
        if image.lower().endswith(IMAGE_ENDINGS) and os.path.abspath(image) not in listed:
            job.odd(f"image that {path.name} does not name, left out", image)
    return captions


def usable_captions(job: Job, found: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """The images with their captions in one line each, every caption once, without images that have none."""
    captions = {}
    for image, texts in found:
        if HALF_SURROGATE.search(image):
            job.odd("image whose name is not UTF-8, left out", image)
            continue
        tidied = list(dict.fromkeys(map(tidy, texts)))
        usable = [text for text in tidied if clean_caption(text, 1)]
        for text in tidied:
            if text not in usable:
                job.odd("caption without a word, left out", f"{image}: {shown(text)}")
        if usable:
            captions[image] = usable
        else:
            job.odd("image without a caption, left out", image)
    return captions


# ------------------------------------------------------------------------------------------------ splits


def same_images(job: Job, captions: dict[str, list[str]]) -> list[list[str]]:
    """The images that can be read, in order, those that show the same in one group."""
    known, group_of = KnownImages(), {}
    marks = fingerprints(list(captions), job.options.workers)
    for path, mark in progress(marks, "comparing images", "images", len(captions)):
        if isinstance(mark, ImageError):
            how = "is missing" if mark.reason == NO_FILE else "cannot be read"
            job.odd(f"image that {how}, left out", str(mark))
            continue
        group_of[path] = [path]
        for other in known.find(mark):
            if group_of[other] is not group_of[path]:
                group_of[other] += group_of[path]
                group_of.update(dict.fromkeys(group_of[path], group_of[other]))
        if len(group_of[path]) > 1:
            first = next(other for other in group_of[path] if other != path)
            job.odd("image that shows what others show, kept in their split", f"{path} = {first}")
        known.add(mark, path)
    if not group_of:
        raise UserError(f"--source {job.source}: no image with a caption that can be used; see the counts above")
    job.count("images with captions", len(group_of))
    job.count("captions", sum(len(captions[image]) for image in group_of))
    return list({id(group): group for group in group_of.values()}.values())


def split(job: Job, groups: list[list[str]]) -> dict[str, list[str]]:
    """{"train": images, "val": ..., "test": ...}, each in the images' order: groups drawn one after the other, as long
    as they fit, for test, then for validation; the rest is training's."""
    images = [image for group in groups for image in group]
    room = {key: wanted(key, getattr(job.options, key), len(images)) for key in ("test", "val")}
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


def path_in_list(job: Job, image: str) -> str:
    """An image's path relative to the lists, or absolute if SOURCE is not below OUTPUT's parent folder."""
    source, output = job.source.resolve(), job.output.resolve()
    path = source / os.path.relpath(image, job.source)
    return os.path.relpath(path, output) if source.is_relative_to(output.parent) else str(path)


def write_splits(job: Job, captions: dict[str, list[str]], splits: dict[str, list[str]]) -> None:
    """train.json, val.json and test.json; an image's id is its path below SOURCE."""
    for name, images in splits.items():
        if not images:
            job.note(f"no image for {name}: {name}.json is not written")
            if job.owns(job.output / f"{name}.json"):
                (job.output / f"{name}.json").unlink()  # of an earlier run, whose images are training's now
            continue
        with job.writing(f"{name}.json") as write:
            for image in images:
                entry = {"image": path_in_list(job, image), "image_id": os.path.relpath(image, job.source)}
                for texts in captions[image] if name == "train" else [captions[image]]:
                    write({**entry, "caption": texts})
        job.count(f"images, {name}", len(images))
        job.count(f"captions, {name}", sum(len(captions[image]) for image in images))
