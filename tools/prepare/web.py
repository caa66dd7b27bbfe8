"""Conceptual Captions 3M and SBU Captions: lists of addresses with captions, and what was downloaded of them."""

import argparse
import hashlib
import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.files import read_json
from dataset.official import tidy
from dataset.text import clean_caption
from tools.prepare import img2dataset
from tools.prepare.common import Job, find_official, progress
from tools.prepare.held_out import HeldOut, flickr_photo
from utils import UserError, open_file

CC3M_URL = "https://ai.google.com/research/ConceptualCaptions/download"
SBU_URL = "https://www.cs.rice.edu/~vo9/sbucaptions/"
CC3M_NAME = "Train_GCC-training.tsv"
SBU_NAME = "sbu-captions-all.json"
SBU_LINES = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")
PUBLISHED = {"cc3m": 3_318_333, "sbu": 1_000_000}
REASONS_SHOWN = 5
NO_PAIR = "line that is no caption and address, left out"
NOT_TEXT = "line that is not UTF-8, left out"
BLOCK = 20_000  # pairs whose images are compared with the held-out ones at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size",
        type=int,
        default=img2dataset.SHARD_SIZE,
        help="img2dataset's number_sample_per_shard, for the paths of images that are not there yet (%(default)s)",
    )


def prepare(job: Job) -> None:
    shard_size = job.options.shard_size
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: must be at least 1")
    listed = array("Q")  # hashes of the addresses of the official list
    rows = usable_rows(job, cc3m_rows(job) if job.name == "cc3m" else sbu_rows(job), listed)
    predicted = False
    if img2dataset.shard_names(job.images):
        for _ in rows:
            pass
        pairs = downloaded_pairs(job)
    elif job.options.require_images or job.images.is_dir() and any(path.is_file() for path in job.images.iterdir()):
        # named by the last part of the address, as torchvision's SBU stores them
        named = ((url.rsplit("/", 1)[-1].split("?")[0], caption, url) for _, caption, url in rows)
        pairs = (pair(name, caption, url) for name, caption, url in named if name and job.exists(name))
    else:
        job.note(f"no image in {job.images}: paths are those that img2dataset will give")
        pairs = (pair(img2dataset.predicted_path(row, shard_size), caption, url) for row, caption, url in rows)
        predicted = True
    read = write_pairs(job, pairs)
    unlisted = int((~np.isin(np.frombuffer(read, dtype=np.uint64), np.frombuffer(listed, dtype=np.uint64))).sum())
    if unlisted:
        job.warn(f"{unlisted:,} downloaded images have an address that the list does not name")
    job.count("pairs listed", len(listed), PUBLISHED[job.name], first=job.first_odd(NO_PAIR, NOT_TEXT))
    job.count("pairs written for pre-training", job.files[job.output / f"pretrain/{job.name}.json"])
    missing = len(listed) if predicted else max(len(listed) - len(read), 0)
    job.count("listed pairs without an image", missing)
    job.note(f"without an image: {100 * missing / max(len(listed), 1):.1f}% of the list")


def pair(image: str, caption: str, url: str) -> dict:
    return {"image": image, "caption": caption, "url": url}


# ------------------------------------------------------------------------------------------------ the list


def usable_rows(job: Job, rows: Iterator, listed: array) -> Iterator[tuple[int, str, str]]:
    """(row, caption, address) of the official list; `listed` collects the addresses' hashes. Rows that are not as they
    should be are counted and left out; their number stays free."""
    for row, (caption, url) in enumerate(rows):
        if isinstance(caption, UnicodeDecodeError):
            job.odd(NOT_TEXT, f"row {row} ({caption})")
        elif not isinstance(caption, str) or not isinstance(url, str):
            job.odd(NO_PAIR, f"row {row}")
        else:
            listed.append(short_hash(url))
            yield row, caption, url


def cc3m_rows(job: Job) -> Iterator[tuple[str | UnicodeDecodeError, str | None]]:
    """(caption, address) of every line; of one that is no such pair (it, None), of one that is no text (why, None)."""
    path = find_official(job.source, {CC3M_NAME: CC3M_URL})[CC3M_NAME]
    with open_file(path) as file:
        for number, content in enumerate(progress(file, f"reading {path.name}", "lines")):
            try:
                text = content.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                yield error, None
                continue
            parts = text.rstrip("\r\n").split("\t")
            if number == 0 and parts == ["caption", "url"]:  # as img2dataset's guide puts it on top
                continue
            yield (parts[0], parts[1].strip()) if len(parts) == 2 else (text, None)


def sbu_rows(job: Job) -> Iterator[tuple[str, str]]:
    """(caption, address) of every pair of one of the two published layouts."""
    found = find_official(job.source, {}, dict.fromkeys((SBU_NAME, *SBU_LINES), SBU_URL))
    if SBU_NAME in found:
        content = read_json(found[SBU_NAME])
        columns = [content.get(key) if isinstance(content, dict) else None for key in ("captions", "image_urls")]
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise UserError(f"{found[SBU_NAME]}: lacks the equally long lists captions and image_urls")
        return zip(*columns, strict=True)
    if not found.keys() >= set(SBU_LINES):
        find_official(job.source, {SBU_NAME: f"{SBU_URL}sbu-captions-all.tar.gz; or {' and '.join(SBU_LINES)}"})
    urls, captions = (read_lines(found[name]) for name in SBU_LINES)
    if len(urls) != len(captions):
        raise UserError(
            f"{found[SBU_LINES[0]]} has {len(urls)} lines, {SBU_LINES[1]} {len(captions)}: they do not match"
        )
    return zip(captions, urls, strict=True)


def read_lines(path: Path) -> list[str]:
    """The lines of a file; only a line feed ends one, and captions may hold other separators."""
    with open_file(path) as file:
        lines = [line.rstrip("\r") for line in file.read().decode("utf-8", "replace").split("\n")]
    return lines if lines[-1] else lines[:-1]


# ------------------------------------------------------------------------------------------------ pairs


def downloaded_pairs(job: Job) -> Iterator[dict]:
    """What img2dataset downloaded; captions and addresses are those that it kept beside each image."""
    img2dataset.unpack_shards(job)
    reasons = img2dataset.failures(job)
    if reasons:
        job.count("addresses that failed, by img2dataset", sum(reasons.values()))
        shown = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(REASONS_SHOWN))
        job.note(f"why: {shown}")
    yield from img2dataset.samples(job)


def write_pairs(job: Job, pairs: Iterator[dict]) -> array:
    """pretrain/<set>.json, without blank captions, repeated pairs and held-out images; returns the hashes of the
    addresses of all pairs."""
    held_out = HeldOut(job, "coco", "flickr30k")
    seen: set[int] = set()
    read = array("Q")
    with job.writing(f"pretrain/{job.name}.json") as write:
        while block := list(itertools.islice(pairs, BLOCK)):
            held_out.find_copies(pair["image"] for pair in block)
            for pair in block:
                image, url, caption = pair["image"], pair["url"], tidy(pair["caption"])
                read.append(short_hash(url))
                mark = short_hash(f"{url} {pair['caption']}")
                if not clean_caption(caption, 1):
                    job.odd("caption without a word, left out", image)
                elif mark in seen:
                    job.odd("pair that is listed again, left out", image)
                elif held_out.allows(image, None, flickr_photo(url), pair.get("sha256")):
                    write({"image": job.pretrain_path(image), "caption": caption})
                seen.add(mark)
    held_out.report()
    return read


def short_hash(text: str) -> int:
    """64 bits, which no two of some million texts share but by a rare chance."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
