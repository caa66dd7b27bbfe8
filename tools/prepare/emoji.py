"""Emoji of two artists with their English names, from three packages of npm.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    python -m tools.prepare emoji --source . --output data/emoji

SOURCE is the folder of these .tgz files; without npm, curl -O the addresses that the tool names. Writes images/noto and
images/twemoji (7,572 images of 64 x 64), pretrain.json, retrieval_train.json, retrieval_{val,test}.json and
caption_{val,test}.json. Training has all of Noto's images and 85% of Twemoji's; validation (226) and test (353) are
Twemoji's images of the other names, which were drawn once: tools/prepare/emoji_held_out.txt lists them.

Noto Emoji is under the Apache license 2.0; Twemoji under CC-BY 4.0, copyright Twitter, Inc. and other contributors; the
names are emojibase's (MIT) from Unicode's CLDR.
"""

import argparse
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tools.prepare.common import Job, find_official
from utils import UserError, one_line

REGISTRY = "https://registry.npmjs.org"
ARTISTS = {  # name here: (package, its folder of images)
    "noto": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/"),
}
NAMES = ("emojibase-data-17.0.0.tgz", "package/en/data.json")
HELD_OUT = Path(__file__).with_name("emoji_held_out.txt")
TAGS = 3  # keywords of an image, at most
COUNTS = {"noto": 3786, "twemoji": 3786, "train": 6993, "pairs": 30_345, "val": 226, "test": 353}  # of these packages
NO_TEXT_STYLE = "-fe0f"  # a selector that the packages write in different places
LARGEST = 1 << 26  # bytes of a file in a package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="folder of the three .tgz files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; configs/emoji name data/emoji")


def prepare(job: Job) -> None:
    """Unpack the images and write the lists that configs/emoji name."""
    packages = [NAMES[0], *(package for package, _ in ARTISTS.values())]
    found = find_official(job.source, {file: f"{REGISTRY}/{file.rpartition('-')[0]}/-/{file}" for file in packages})
    captions = read_captions(found[NAMES[0]])
    images = [image for name in ARTISTS for image in unpack(job, name, found[ARTISTS[name][0]], captions)]
    splits: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    split_of = held_out()
    for image in sorted(images):
        artist, stem = image.removeprefix("images/").removesuffix(".png").split("/")
        split = split_of.get(stem, "train") if artist == "twemoji" else "train"
        entry = {"image": image, "image_id": f"{artist}/{stem}", "caption": captions[key_of(stem)]}
        splits[split].append(entry)
    train = splits["train"]
    write_list(job, "pretrain", [{"image": entry["image"], "caption": entry["caption"]} for entry in train])
    pairs = [{**entry, "caption": caption} for entry in train for caption in entry["caption"]]
    write_list(job, "retrieval_train", pairs)
    for split in ("val", "test"):
        first = [{**entry, "caption": entry["caption"][:1]} for entry in splits[split]]
        write_list(job, f"retrieval_{split}", first)
        write_list(job, f"caption_{split}", splits[split])
    for split, entries in splits.items():
        job.count(f"images, {split}", len(entries), COUNTS[split])
    job.count("pairs, train", len(pairs), COUNTS["pairs"])


def write_list(job: Job, name: str, entries: list[dict]) -> None:
    with job.writing(f"{name}.json") as write:
        for entry in entries:
            write(entry)


def key_of(name: str) -> str:
    """The code points that name an emoji, the same in all packages."""
    return name.lower().replace(NO_TEXT_STYLE, "")


def members(package: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in a folder of a package, or of one file."""
    try:
        with tarfile.open(package) as tar:
            for member in tar:
                name = member.name.removeprefix(folder)
                if member.isfile() and member.name.startswith(folder) and "/" not in name:
                    if not 0 <= member.size <= LARGEST:
                        raise UserError(f"{package}: {one_line(member.name)} has {member.size:,} bytes; get it again")
                    yield name, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{package}: not a whole .tgz ({error}); get it again") from None


def read_captions(package: Path) -> dict[str, list[str]]:
    """{code points: captions} of all emoji and their skin tones: the name in a sentence, the name alone, and with
    keywords that it does not hold."""
    content = next((content for _, content in members(package, NAMES[1])), None)
    if content is None:
        raise UserError(f"{package}: has no {NAMES[1]}; is it {NAMES[0]}?")
    captions = {}
    for emoji in json.loads(content):
        for one in (emoji, *emoji.get("skins", ())):
            name = one["label"]
            tags = [tag for tag in one.get("tags") or emoji.get("tags") or () if tag not in name]
            captions[key_of(one["hexcode"])] = [f"an emoji of {name}", name, *(f"{name}, {tag}" for tag in tags[:TAGS])]
    return captions


def unpack(job: Job, artist: str, package: Path, captions: dict[str, list[str]]) -> list[str]:
    """Writes an artist's images whose names are known; their paths below OUTPUT."""
    images = []
    for name, content in members(package, ARTISTS[artist][1]):
        stem, _, ending = name.rpartition(".")
        if ending != "png":
            continue
        if key_of(stem) not in captions:
            job.odd("image whose name is not known, left out", f"{artist}/{name}")
            continue
        with job.replacing(job.images / artist / name) as temporary:
            temporary.write_bytes(content)
        images.append(f"images/{artist}/{name}")
    job.count(f"images, {artist}", len(images), COUNTS[artist])
    return images


def held_out() -> dict[str, str]:
    """{name of one of Twemoji's images: val or test}"""
    lines = HELD_OUT.read_text(encoding="utf-8").split()
    return dict(zip(lines[1::2], lines[::2], strict=True))
