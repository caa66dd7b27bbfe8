"""Tar shards of images and captions in webdataset's layout, as img2dataset and tools/shards.py write them.

A shard holds samples, files of one key: `key.jpg` (or another image) and `key.json` or `key.txt`. The JSON is an entry
without `image`: {"caption": text | [texts], ...}, or {"captions": [...]} for an image of several entries; `key.txt` is
a caption. The key ends at the first dot. An image's path becomes

    /data/00012.tar/000120345.jpg@51200+20481      (shard, file in it, where its bytes begin, their number)

and its bytes are read when they are asked for. So the entries of shards are like all others: in any order, for any
number of processes and workers, and resumed anywhere.
"""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from dataset.files import IMAGES
from utils import UserError, one_line, open_file, reason

log = logging.getLogger("semmim")

TEXTS = ("json", "txt")
SHOWN = 3  # examples of samples that are left out
LONGEST_TEXT = 1 << 22  # bytes of a .json or .txt
LONGEST_HEADER = 1 << 14  # bytes of a file's name and attributes; tarfile takes quadratic time over them
MEMBER = re.compile(r"(.+\.tar)/([^/]+)@(\d+)\+(\d+)", re.DOTALL)
KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]+$", re.DOTALL)  # the first dot of a file's name ends it, as in webdataset


def shard_files(path: Path) -> list[Path]:
    """The shards that a line of `data.train` names: a .tar file, or those in a folder; none for anything else."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def open_member(path: str) -> BinaryIO:
    """An image in a shard, or a file, open for reading. Raises UserError, OSError, EOFError."""
    found = MEMBER.fullmatch(path)
    if found is None:
        return open_file(path)
    start, size = int(found[3]), int(found[4])
    with open_file(found[1]) as file:
        if os.fstat(file.fileno()).st_size < start + size:
            raise EOFError("the shard ends within this image")
        file.seek(start)
        return io.BytesIO(file.read(size))


def member_name(path: str) -> str:
    """The path without where its bytes are, that of a file as it is."""
    found = MEMBER.fullmatch(path)
    return f"{found[1]}/{found[2]}" if found else path


def shard_entries(shards: list[Path], max_bad_share: float) -> Iterator[tuple[Path, str, dict]]:
    """(shard, key, entry) of all samples, in the order of the shards and of the files in them; an entry's `image` is
    the path that `open_member` reads.

    A damaged shard gives the samples before the damage; it, and samples without image or caption, are warned of. Raises
    UserError if more than `max_bad_share` of the samples or of the shards are lost.
    """
    found, lost, damaged = 0, 0, 0  # samples, samples, shards
    problems: list[str] = []
    for shard in shards:
        try:
            for key, image, texts, problem in _samples(shard):
                entries = [] if problem else _entries(texts)
                yield from ((shard, key, {**entry, "image": image}) for entry in entries)
                if entries:
                    found += 1
                else:
                    lost += 1
                    problems = [*problems, f"{shard}: sample {key} has {problem or 'no caption'}"][:SHOWN]
        except (OSError, EOFError, ValueError) as error:
            damaged += 1
            problems = [f"{shard}: damaged ({error})", *problems][:SHOWN]
    if not found + lost + damaged:
        raise UserError(f"{shards[0].parent}: {len(shards)} shard(s) hold no sample; is it the right folder?")
    counts = f"{lost} of {found + lost} samples and {damaged} of {len(shards)} shard(s) cannot be used"
    total, examples = f"{shards[0].parent}: {counts}", one_line("; ".join(problems), 1000)
    if not found or max(lost / (found + lost), damaged / len(shards)) > max_bad_share:
        raise UserError(f"{total}, data.max_bad_share allows {max_bad_share:g} ({examples})")
    if lost or damaged:
        log.warning("%s, left out: %s", total, examples)


def _samples(shard: Path) -> Iterator[tuple[str, str, dict[str, bytes], str]]:
    """(key, path of the image, {"json" | "txt": its bytes}, what is wrong with them or "") of a shard's samples.

    Between the key and the ending a name may have a part: 001.image.jpg with 001.caption.txt is one sample.
    """
    with open_file(shard) as file:
        keyed = ((found[1], member) for member in shard_members(file) if (found := KEY.match(member[0])))
        for key, members in groupby(keyed, lambda pair: pair[0]):
            images, texts = [], []
            for _, (name, start, size) in members:
                ending = name.rpartition(".")[2].lower()
                if ending in IMAGES and size:
                    images.append(f"{shard}/{os.path.basename(name)}@{start}+{size}")
                elif ending in TEXTS and size <= LONGEST_TEXT:
                    file.seek(start)
                    texts.append((ending, file.read(size)))
            is_plain = len(images) == 1 and len(dict(texts)) == len(texts)
            problem = "" if is_plain else "two images or texts of one kind" if images else "no image"
            yield key, images[0] if images else "", dict(texts), problem


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
        archive = tarfile.TarFile(fileobj=_Headers(file), encoding="utf-8", errors="surrogateescape")
        while member := archive.next():
            archive.members.clear()  # it would keep them all
            if member.offset_data + member.size > size:
                raise EOFError(f"ends within a file that begins at byte {at}")
            if not at < archive.offset:
                raise ValueError(f"the file at byte {at} has a negative size")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
            at = archive.offset
    except (EOFError, ValueError, OSError):
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise ValueError(reason(error)) from None
    file.seek(at)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything for the end
        raise EOFError(f"ends within or after the file before byte {at}")


@dataclass
class _Headers:
    """A tar archive of which tarfile reads headers alone, none of them longer than LONGEST_HEADER."""

    file: BinaryIO

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise ValueError(f"the header of a file has {size} bytes")
        return self.file.read(size)

    def __getattr__(self, name: str):
        return getattr(self.file, name)
