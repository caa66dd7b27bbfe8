"""Conceptual Captions 3M and SBU Captions: lists of addresses with captions, and what was downloaded of them.

    python -m tools.prepare cc3m --source downloads/cc3m --output data --addresses
    img2dataset --url_list data/cc3m/addresses.parquet --input_format parquet ... --output_folder data/cc3m/images
    python -m tools.prepare cc3m --source downloads/cc3m --output data --check_leaks

The images are as img2dataset (github.com/rom1504/img2dataset) leaves them: folders or tar shards of key.jpg + key.json.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dataset.files import IMAGE_ENDINGS, read_json
from dataset.official import tidy
from dataset.shards import shard_members
from dataset.text import clean_caption
from tools.prepare.common import Job, find_official, progress, whole_folder
from tools.prepare.held_out import HeldOut, flickr_photo
from utils import UserError, open_file

CC3M_URL = "https://ai.google.com/research/ConceptualCaptions/download"
SBU_URL = "https://www.cs.rice.edu/~vo9/sbucaptions/"
CC3M_NAME = "Train_GCC-training.tsv"
SBU_NAME = "sbu-captions-all.json"
SBU_LINES = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")
PUBLISHED = {"cc3m": 3_318_333, "sbu": 1_000_000}
SHARD = re.compile(r"\d{5,}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--addresses", action="store_true", help="write OUTPUT/SET/addresses.parquet for img2dataset")


def prepare(job: Job) -> None:
    if job.options.addresses:
        write_addresses(job, list(cc3m_rows(job.source) if job.name == "cc3m" else sbu_rows(job.source)))
        return
    if not shard_names(job.images):
        raise UserError(f"{job.images}: holds no shard of img2dataset, which downloads what --addresses lists")
    held_out = HeldOut(job)
    held_out.write_pairs((photo["image"], photo["caption"]) for photo in held_out.spare(downloaded_photos(job)))


def cc3m_rows(source: Path) -> Iterator[tuple[str, str]]:
    """(caption, address) of every line; quotation marks are characters like any other."""
    path = find_official(source, {CC3M_NAME: CC3M_URL})[CC3M_NAME]
    for number, line in enumerate(read_lines(path), 1):
        if line.count("\t") != 1:
            raise UserError(f"{path}: line {number} is no caption and address; an incomplete download?")
        yield tuple(line.split("\t"))


def sbu_rows(source: Path) -> Iterator[tuple[str, str]]:
    """(caption, address) of every pair of one of the two published layouts."""
    found = find_official(source, {}, dict.fromkeys(SBU_LINES, SBU_URL))
    if len(found) == len(SBU_LINES):
        addresses, captions = (read_lines(found[name]) for name in SBU_LINES)
    else:
        content = read_json(find_official(source, {SBU_NAME: SBU_URL})[SBU_NAME])
        addresses, captions = content["image_urls"], content["captions"]
    return zip(captions, addresses, strict=True)


def read_lines(path: Path) -> list[str]:
    """The lines of a file; only a line feed ends one, and captions may hold other separators."""
    with open_file(path) as file:
        lines = [line.rstrip("\r") for line in file.read().decode("utf-8-sig", "replace").split("\n")]
    return lines if lines[-1] else lines[:-1]


def write_addresses(job: Job, rows: list[tuple[str, str]]) -> None:
    """A parquet file with the columns url and caption: of a .tsv img2dataset takes a quotation mark for the start of a
    cell that may hold line ends, and stops."""
    job.count("pairs listed", len(rows), PUBLISHED[job.name])
    captions, addresses = zip(*rows, strict=True)
    with job.replacing(job.output / job.name / "addresses.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table({"url": addresses, "caption": captions}), temporary)


def downloaded_photos(job: Job) -> Iterator[dict]:
    """{"image", "caption", "flickr_id", "sha256"} of the images in img2dataset's shards, without blank captions and
    repeated pairs; the sum is that of the file at the address, from before it was resized."""
    unpack_shards(job)
    downloaded, seen = 0, set()
    for shard in progress(shard_names(job.images), "reading shards", "shards"):
        names = set(os.listdir(job.images / shard))
        for name in sorted(name for name in names if name.endswith(".json")):
            stem = f"{shard}/{name.removesuffix('.json')}"
            image = next((stem + ending for ending in IMAGE_ENDINGS if os.path.basename(stem + ending) in names), None)
            try:
                content = read_json(job.images / shard / name)
            except UserError:  # of a download that was stopped
                content, image = {}, None
            if content.get("status", "success") != "success":
                continue
            if image is None:
                job.leave_out("sample that img2dataset left incomplete", f"{stem}.json")
                continue
            downloaded += 1
            caption, url = tidy(content.get("caption") or ""), content.get("url")
            pair = hash((url, caption))  # of millions 64 bits each
            if not clean_caption(caption, 1):
                job.leave_out("caption without a word", image)
            elif pair in seen:
                job.leave_out("pair that is listed again", image)
            else:
                seen.add(pair)
                found = {"image": image, "caption": caption, "flickr_id": flickr_photo(url)}
                yield {**found, "sha256": content.get("sha256")}
    job.count("pairs downloaded", downloaded)


def shard_names(folder: Path) -> list[str]:
    """Names of the shards in a folder, whether unpacked or tar files."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted({stem for name in names if SHARD.fullmatch(stem := name.removesuffix(".tar"))})


def unpack_shards(job: Job) -> None:
    """SHARD.tar -> SHARD/ in the images' folder, each whole or not at all; what is unpacked already is left alone.

    Only the plain files at the top of a tar without compression, which cannot hold more than its own size.
    """
    packed = [name for name in shard_names(job.images) if not (job.images / name).is_dir()]
    for shard in progress(packed, "unpacking tar shards", "shards"):
        with open_file(job.images / f"{shard}.tar") as file, whole_folder(job.images / shard) as partial:
            try:
                for name, start, size in shard_members(file):
                    if os.path.basename(name) == name and name.endswith((*IMAGE_ENDINGS, ".json")):
                        file.seek(start)
                        (partial / name).write_bytes(file.read(size))
            except (EOFError, ValueError) as error:
                job.leave_out("rest of a damaged tar shard", f"{shard}.tar ({error})")
