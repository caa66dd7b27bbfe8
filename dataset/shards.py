"""Tar shards of images and captions in webdataset's layout, as img2dataset and tools/shards.py write them.

A shard holds samples, files of one key: `key.jpg` (or another image) and `key.json` or `key.txt`. The JSON is an entry
without `image`: {"caption": text | [texts], ...}, or {"captions": [...]} for an image of several entries; `key.txt` is
a caption. The headers of a shard are read once. An image's path becomes

    /data/00012.tar/000120345.jpg@51200+20481      (shard, file in it, where its bytes begin, their number)

and its bytes are read when they are asked for. So the entries of shards are like all others: in any order, for any
number of processes and workers, and resumed anywhere.
"""

import json
import logging
import re
import statistics
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset.files import IMAGES
from utils import UserError, one_line, open_file

log = logging.getLogger("semmim")

TEXTS = ("json", "txt")
MEMBER = re.compile(r"(.+\.tar)/([^/]+)@(\d+)\+(\d+)", re.DOTALL)


def shard_files(path: Path) -> list[Path]:
    """The shards that a line of `data.train` names: a .tar file, or those in a folder; none for anything else."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def read_member(path: str) -> bytes | None:
    """The bytes of an image in a shard; None if `path` is that of a file. Raises OSError, EOFError."""
    found = MEMBER.fullmatch(path)
    if found is None:
        return None
    start, size = int(found[3]), int(found[4])
    with open(found[1], "rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise EOFError("the shard ends within this image")
    return content


def shard_entries(shards: list[Path], max_bad_share: float) -> Iterator[tuple[Path, str, dict]]:
    """(shard, key, entry) of all samples, in the order of the shards and of the files in them; an entry's `image` is
    the path that `read_member` reads.

    A damaged shard gives the samples before the damage; it, and samples without image or caption, are warned of. Raises
    UserError if more than `max_bad_share` of the samples are lost; a damaged shard is taken to have had as many as the
    median of the whole ones.
    """
    found, lost = 0, 0  # samples
    whole: list[int] = []  # samples of each whole shard
    damaged: list[tuple[Path, int, str]] = []  # shard, samples before the damage, what it is
    for shard in shards:
        usable = unusable = 0
        try:
            for key, files in _samples(shard):
                entries = _entries(files)
                if entries and "image" in files:
                    usable += 1
                    yield from ((shard, key, {**entry, "image": files["image"]}) for entry in entries)
                    continue
                unusable += 1
                if unusable <= 3:
                    missing = "image" if "image" not in files else "caption"
                    log.warning("%s has no %s", one_line(f"{shard}: sample {key}", 1000), missing)
            whole.append(usable)
        except (OSError, EOFError, ValueError) as error:
            damaged.append((shard, usable, one_line(error)))
        found += usable
        lost += unusable
    expected = round(statistics.median(whole)) if whole else max((count for _, count, _ in damaged), default=0) + 1
    for shard, count, damage in damaged:
        missing = max(1, expected - count)
        lost += missing
        log.warning("%s: damaged (%s), about %d samples are lost", one_line(shard, 1000), damage, missing)
    if lost > max_bad_share * (found + lost) or not found:
        first = "".join(f" ({shard}: {damage})" for shard, _, damage in damaged[:1])
        raise UserError(
            f"{shards[0].parent}: {lost} of {found + lost} samples of {len(shards)} shard(s) cannot be read, "
            f"data.max_bad_share allows {max_bad_share:g}{first}; get the shards again"
        )


def _samples(shard: Path) -> Iterator[tuple[str, dict]]:
    """(key, files) of a shard's samples: `image` (its path), `json` and `txt` (their bytes)."""
    key, files = None, {}
    with open_file(shard) as file:
        for name, start, size in shard_members(file):
            folder, slash, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            if not stem:  # .DS_Store and the like
                continue
            if folder + slash + stem != key:
                if files:
                    yield key, files
                key, files = folder + slash + stem, {}
            ending = ending.lower()
            if ending in IMAGES and size:
                files["image"] = f"{shard}/{base}@{start}+{size}"
            elif ending in TEXTS:
                file.seek(start)
                files[ending] = file.read(size)
    if files:
        yield key, files


def _entries(files: dict) -> list[dict]:
    """The entries, without `image`, of a sample's texts; none without a caption."""
    try:
        content = json.loads(files.get("json", b"{}"))
        text = files["txt"].decode("utf-8") if "txt" in files else None
    except (ValueError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    if isinstance(captions := content.pop("captions", None), list):
        return [{**content, "caption": caption} for caption in captions]
    caption = text if content.get("caption") is None else content["caption"]
    return [] if caption is None else [{**content, "caption": caption}]


def shard_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, where its bytes begin, their number) of the regular files of an uncompressed tar archive.

    Raises EOFError if the archive ends too early, ValueError if it is none or is damaged.
    """
    size, at = file.seek(0, 2), file.seek(0)
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while member := archive.next():
            archive.members.clear()  # it would keep them all
            if member.offset_data + member.size > size:
                raise EOFError(f"ends within a file that begins at byte {at}")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
            at = archive.offset
    except tarfile.TarError as error:
        raise ValueError(one_line(error)) from None
    file.seek(at)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything for the end
        raise EOFError(f"ends within or after the file before byte {at}")
