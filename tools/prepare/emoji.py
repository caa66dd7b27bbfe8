"""Emoji of two artists with their English names, from three packages of npm, and of two more if they are there.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    npm pack emojione@2.2.7 @lobehub/fluent-emoji-3d@1.1.0  # the two more
    python -m tools.prepare emoji --source . --output data/emoji

SOURCE is the folder of these .tgz files; without npm, curl -O the addresses that the tool names. Writes images/noto and
images/twemoji (7,572 images of 64 x 64), pretrain.json, retrieval_train.json, retrieval_{val,test}.json and
caption_{val,test}.json. Training has all of Noto's images and 85% of Twemoji's; validation (226) and test (353) are
Twemoji's images of the other names, which were drawn once: tools/prepare/emoji_held_out.txt lists them.

Of EmojiOne it writes pretrain_emojione.json (1,800 images), of Fluent Emoji retrieval_fluent.json (3,374): a third
artist to train on, and one to test on whom no training has seen. Their files are emojione-2.2.7.tgz and
lobehub-fluent-emoji-3d-1.1.0.tgz, as `npm pack` names them. Licenses: docs/data.md.
"""

import json
import os
import tarfile
from pathlib import Path

from tools.prepare.common import Job, find_official, whole_folder

REGISTRY = "https://registry.npmjs.org"
ARTISTS = {  # name here: (package, its folder of images)
    "noto": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64"),
    "twemoji": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64"),
}
MORE = {  # the same of artists that may be missing, and where their images go
    "emojione": ("emojione-2.2.7.tgz", "package/assets/png", "pretrain"),
    "fluent": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets", "retrieval"),
}
NAMES = ("emojibase-data-17.0.0.tgz", "package/en/data.json")
HELD_OUT = Path(__file__).with_name("emoji_held_out.txt")
TAGS = 3  # keywords of an image, at most
COUNTS = {"noto": 3786, "twemoji": 3786, "emojione": 1800, "fluent": 3374}  # images of these packages
COUNTS |= {"train": 6993, "pairs": 30_345, "val": 226, "test": 353}
NO_TEXT_STYLE = "-fe0f"  # a selector that the packages write in different places


def prepare(job: Job) -> None:
    """Unpack the images and write the lists that configs/emoji name."""
    packages = [NAMES[0], *(package for package, _ in ARTISTS.values())]
    addresses = {file: f"{REGISTRY}/{file.rpartition('-')[0]}/-/{file}" for file in packages}
    found = find_official(job.source, addresses, {package: REGISTRY for package, _, _ in MORE.values()})
    captions = read_captions(found[NAMES[0]])
    splits: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    held_out = HELD_OUT.read_text(encoding="utf-8").split()  # val or test, name of one of Twemoji's images, ...
    split_of = dict(zip(held_out[1::2], held_out[::2], strict=True))
    for artist, (package, folder) in ARTISTS.items():
        names = unpack(job, artist, found[package], folder, captions)
        job.count(f"images, {artist}", len(names), COUNTS[artist])
        for name in names:
            stem = name.removesuffix(".png")
            split = split_of.get(stem, "train") if artist == "twemoji" else "train"
            splits[split].append(entry_of(artist, name, captions))
    train = splits["train"]
    job.write("pretrain.json", ({"image": entry["image"], "caption": entry["caption"]} for entry in train))
    pairs = ({**entry, "caption": caption} for entry in train for caption in entry["caption"])
    job.count("pairs, train", job.write("retrieval_train.json", pairs), COUNTS["pairs"])
    for split, entries in splits.items():
        job.count(f"images, {split}", len(entries), COUNTS[split])
        if split != "train":
            job.write(f"retrieval_{split}.json", ({**entry, "caption": entry["caption"][:1]} for entry in entries))
            job.write(f"caption_{split}.json", entries)
    for artist, (package, folder, task) in MORE.items():
        if package not in found:
            job.lines.append(f"{artist}: left out, as --source has no {package}")
        else:
            names = unpack(job, artist, found[package], folder, captions)
            entries, asked = [entry_of(artist, name, captions) for name in names], 1 if task == "retrieval" else None
            job.count(f"images, {artist}", len(names), COUNTS[artist])
            job.write(f"{task}_{artist}.json", ({**entry, "caption": entry["caption"][:asked]} for entry in entries))


def entry_of(artist: str, name: str, captions: dict[str, list[str]]) -> dict:
    """An image with all captions of its emoji."""
    stem = Path(name).stem
    return {"image": f"images/{artist}/{name}", "image_id": f"{artist}/{stem}", "caption": captions[key_of(stem)]}


def key_of(name: str) -> str:
    """The code points that name an emoji, the same in all packages."""
    return name.lower().replace(NO_TEXT_STYLE, "")


def read_captions(package: Path) -> dict[str, list[str]]:
    """{code points: captions} of all emoji and their skin tones: the name in a sentence, the name alone, and with
    keywords that it does not hold."""
    with tarfile.open(package) as tar:
        content = json.load(tar.extractfile(NAMES[1]))
    captions = {}
    for emoji in content:
        for one in (emoji, *emoji.get("skins", ())):
            name = one["label"]
            tags = [tag for tag in one.get("tags") or emoji.get("tags") or () if tag not in name]
            captions[key_of(one["hexcode"])] = [f"an emoji of {name}", name, *(f"{name}, {tag}" for tag in tags[:TAGS])]
    return captions


def unpack(job: Job, artist: str, package: Path, folder: str, captions: dict) -> list[str]:
    """Write an artist's images whose names are known, or leave those of an earlier preparation; their files' names."""
    output = job.images / artist
    if not output.is_dir():
        with tarfile.open(package) as tar, whole_folder(output) as partial:
            for member in tar:
                path = Path(member.name)
                if str(path.parent) != folder or path.suffix not in (".png", ".webp"):
                    continue
                if key_of(path.stem) in captions:
                    (partial / path.name).write_bytes(tar.extractfile(member).read())
                else:
                    job.leave_out("image whose name is not known", f"{artist}/{path.name}")
    return sorted(os.listdir(output))
