"""Conceptual Captions 3M and SBU Captions: lists of addresses with captions, and what was downloaded of them."""

import argparse
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dataset.official import flickr_photo, tidy
from dataset.text import clean_caption
from tools.prepare import img2dataset
from tools.prepare.files import find_official, progress, read_json
from tools.prepare.job import Job
from tools.prepare.karpathy import LeakFilter
from utils import UserError

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


def sources(options: argparse.Namespace) -> dict[str, Path]:
    if options.shard_size < 1:
        raise UserError(f"--shard-size {options.shard_size}: must be at least 1")
    if options.set == "cc3m":
        return find_official(options.source, {CC3M_NAME: CC3M_URL})
    found = find_official(options.source, {}, {name: SBU_URL for name in (SBU_NAME, *SBU_LINES)})
    if SBU_NAME in found or all(name in found for name in SBU_LINES):
        return found
    return find_official(options.source, {SBU_NAME: f"{SBU_URL}sbu-captions-all.tar.gz; or {' and '.join(SBU_LINES)}"})


def prepare(job: Job, found: dict[str, Path]) -> None:
    listing = Listing(job, found)
    predicted = False
    if img2dataset.shard_names(job.images):
        pairs = downloaded_pairs(job)
    elif job.options.require_images or any_file(job.images):
        pairs = pairs_by_file_name(job, listing)
    else:
        job.report.note(f"no image in {job.images}: paths are those that img2dataset will give")
        pairs, predicted = predicted_pairs(job, listing), True
    read, written = write_pairs(job, pairs, listing)
    total = len(listing.addresses)
    job.report.count("pairs listed", total, PUBLISHED[job.name], first=job.report.first_odd(NO_PAIR, NOT_TEXT))
    job.report.count("pairs written for pre-training", written)
    missing = total if predicted else max(total - read, 0)
    job.report.count("listed pairs without an image", missing)
    job.report.note(f"without an image: {100 * missing / max(total, 1):.1f}% of the list")


# ------------------------------------------------------------------------------------------------ the list


class Listing:
    """The official list: iterating yields (row, caption, address); afterwards `addresses` has a hash of each."""

    def __init__(self, job: Job, found: dict[str, Path]):
        self.report = job.report
        rows = _cc3m_rows if job.name == "cc3m" else _sbu_rows
        self.rows: Callable[[], Iterator] = lambda: rows(found)
        self.paths = found
        self._addresses: np.ndarray | None = None

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        """Rows that are not as they should be are counted and left out; their number stays free."""
        hashes = []
        for row, (caption, url) in enumerate(self.rows()):
            if isinstance(caption, UnicodeDecodeError):
                self.report.odd(NOT_TEXT, f"row {row} ({caption})")
                continue
            if url is None or not isinstance(caption, str) or not isinstance(url, str):
                self.report.odd(NO_PAIR, f"row {row}")
                continue
            hashes.append(_hash(url))
            yield row, caption, url
        self._addresses = np.array(hashes, dtype=np.uint64)

    @property
    def addresses(self) -> np.ndarray:
        if self._addresses is None:
            for _ in self:
                pass
        return self._addresses


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _cc3m_rows(found: dict[str, Path]) -> Iterator[tuple[str | UnicodeDecodeError, str | None]]:
    """(caption, address) of every line; of one that is no such pair (it, None), of one that is no text (why, None)."""
    path = found[CC3M_NAME]
    line = progress(f"reading {path.name}", "MB", max(path.stat().st_size // 1_000_000, 1))
    read = 0
    with open(path, "rb") as file:
        for number, content in enumerate(file):
            read += len(content)
            if read >= 1_000_000:
                line.advance(read // 1_000_000)
                read %= 1_000_000
            try:
                text = content.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                yield error, None
                continue
            parts = text.rstrip("\r\n").split("\t")
            if number == 0 and parts == ["caption", "url"]:  # as img2dataset's guide puts it on top
                continue
            yield (parts[0], parts[1].strip()) if len(parts) == 2 else (text, None)


def _sbu_rows(found: dict[str, Path]) -> Iterator[tuple[str, str | None]]:
    if SBU_NAME in found:
        content = read_json(found[SBU_NAME])
        columns = [content.get(key) if isinstance(content, dict) else None for key in ("captions", "image_urls")]
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise UserError(f"{found[SBU_NAME]}: lacks the equally long lists captions and image_urls")
        yield from zip(*columns, strict=True)
        return
    urls, captions = (found[name].read_text(encoding="utf-8", errors="replace").split("\n") for name in SBU_LINES)
    urls, captions = ([line.rstrip("\r") for line in lines] for lines in (urls, captions))
    for lines in (urls, captions):
        if lines and not lines[-1]:
            lines.pop()
    if len(urls) != len(captions):
        raise UserError(
            f"{found[SBU_LINES[0]]} has {len(urls)} lines, {SBU_LINES[1]} {len(captions)}: they do not match"
        )
    yield from zip(captions, urls, strict=True)


# ------------------------------------------------------------------------------------------------ pairs


def any_file(folder: Path) -> bool:
    """Whether the folder holds a file, other than img2dataset's tables."""
    return folder.is_dir() and any(entry.is_file() for entry in os.scandir(folder))


def downloaded_pairs(job: Job) -> Iterator[dict]:
    """What img2dataset downloaded; captions and addresses are those that it kept beside each image."""
    img2dataset.unpack_shards(job.images, job.report)
    reasons = img2dataset.failures(job.images, job.report)
    if reasons:
        job.report.count("addresses that failed, by img2dataset", sum(reasons.values()))
        shown = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(REASONS_SHOWN))
        job.report.note(f"why: {shown}")
    yield from img2dataset.samples(job.images, job.report)


def pairs_by_file_name(job: Job, listing: Listing) -> Iterator[dict]:
    """Images named by the last part of their address, as torchvision's SBU stores them."""
    for _, caption, url in listing:
        name = url.rsplit("/", 1)[-1].split("?")[0]
        if name and job.exists(name):
            yield {"image": name, "caption": caption, "url": url}


def predicted_pairs(job: Job, listing: Listing) -> Iterator[dict]:
    for row, caption, url in listing:
        image = img2dataset.predicted_path(row, job.options.shard_size)
        yield {"image": image, "caption": caption, "url": url}


def write_pairs(job: Job, pairs: Iterator[dict], listing: Listing) -> tuple[int, int]:
    """pretrain/<set>.json, without blank captions, repeated pairs and held-out images; (pairs read, entries)."""
    kept = LeakFilter(job, job.held_out("coco", "flickr30k"), {})
    seen: set[int] = set()
    urls: list[int] = []
    with job.writing(f"pretrain/{job.name}.json") as write:
        while block := list(itertools.islice(pairs, BLOCK)):
            kept.copies = job.leaks(kept.held_out, [pair["image"] for pair in block])
            for pair in block:
                urls.append(_hash(pair["url"]))
                caption, mark = tidy(pair["caption"]), _hash(f"{pair['url']} {pair['caption']}")
                if not clean_caption(caption, 1):
                    job.report.odd("caption without a word, left out", pair["image"])
                elif mark in seen:
                    job.report.odd("pair that is listed again, left out", pair["image"])
                elif kept(pair["image"], None, flickr_photo(pair["url"]), pair.get("sha256")):
                    write({"image": job.pretrain_path(pair["image"]), "caption": caption})
                seen.add(mark)
    kept.report()
    unlisted = int((~np.isin(np.array(urls, dtype=np.uint64), listing.addresses)).sum())
    if unlisted:
        job.report.warn(f"{unlisted:,} downloaded images have an address that the list does not name")
    return len(urls), job.files[job.output / f"pretrain/{job.name}.json"]
