"""Tar shards of images and captions in webdataset's layout, as img2dataset and tools/make_shards.py write them.

A shard holds samples, files of one key: `key.jpg` (or another image) and `key.json` or `key.txt`. The JSON is an entry
without `image`: {"caption": text | [texts], ...}, or {"captions": [...]} for an image of several entries; `key.txt` is
a caption. Shards are no stream here: their headers are read once, an image's path becomes

    /data/00012.tar/000120345.jpg@51200+20481      (shard, file in it, where its bytes begin, their number)

and its bytes are read when it is asked for. So entries of shards are entries like all others: in any order, by any
number of processes and workers, and resumed anywhere.
"""

import json
import logging
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils import UserError

log = logging.getLogger("semmim")

BLOCK = 512  # tar's unit
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("json", "txt")
MEMBER = re.compile(r"(.+\.tar)/([^/]+)@(\d+)\+(\d+)", re.DOTALL)
LONGEST_TEXT = 1 << 22  # bytes of a .json or .txt


def shard_files(path: Path) -> list[Path]:
    """The shards that a line of `data.train` names: a .tar file, or the ones in a folder; none for what else it is."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def read_member(path: str) -> bytes | None:
    """The bytes of an image in a shard; None where `path` is that of a file. Raises OSError, EOFError."""
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
    UserError where more than `max_bad_share` of the samples are lost. How many a damaged shard has had is told by its
    SHARD_stats.json (img2dataset), else by the other shards.
    """
    counts: list[int] = []  # samples of whole shards
    lost, found, damaged = 0, 0, []
    for path in shards:
        shard = _Shard(path.absolute())
        yield from shard.entries()
        found += shard.samples
        lost += shard.unusable
        if shard.damage is None:
            counts.append(shard.samples)
        else:
            damaged.append(shard)
    expected = statistics.median(counts) if counts else max((shard.samples for shard in damaged), default=0) + 1
    for shard in damaged:
        missing = max(1, (shard.promised() or round(expected)) - shard.samples)
        lost += missing
        log.warning("%s: damaged (%s), about %d samples are lost", shard.path, shard.damage, missing)
    if lost > max_bad_share * (found + lost) or not found:
        first = "; ".join(f"{shard.path}: {shard.damage}" for shard in damaged[:3])
        raise UserError(
            f"{shards[0].parent}: {lost} of {found + lost} samples of {len(shards)} shard(s) cannot be read, "
            f"data.max_bad_share allows {max_bad_share:g}{f' ({first})' if first else ''}; get the shards again"
        )


@dataclass
class _Shard:
    path: Path
    samples: int = 0  # with image and caption
    unusable: int = 0  # others
    damage: str | None = None

    def entries(self) -> Iterator[tuple[Path, str, dict]]:
        """The entries up to the end or the damage; counts on the way."""
        key, files = None, {}
        try:
            with open(self.path, "rb") as file:
                for name, start, size in _members(file):
                    base = name.rpartition("/")[2]
                    stem, _, ending = base.partition(".")
                    if not stem:  # .DS_Store and the like
                        continue
                    this = name[: len(name) - len(base)] + stem
                    if this != key:
                        yield from self._sample(key, files)
                        key, files = this, {}
                    ending = ending.lower()
                    if ending in IMAGES and size:
                        files["image"] = f"{self.path}/{base}@{start}+{size}"
                    elif ending in TEXTS and size <= LONGEST_TEXT:
                        file.seek(start)
                        files[ending] = file.read(size)
        except (OSError, EOFError, ValueError, IndexError) as error:
            self.damage = " ".join(str(error).split()) or type(error).__name__
            return
        yield from self._sample(key, files)

    def _sample(self, key: str | None, files: dict) -> Iterator[tuple[Path, str, dict]]:
        if not files:
            return
        where = f"{self.path}: sample {key}"
        entries = _entries(files)
        if not entries or "image" not in files:
            self.unusable += 1
            if self.unusable <= 3:
                log.warning("%s has no %s", where, "image" if "image" not in files else "caption")
            return
        self.samples += 1
        for entry in entries:
            yield self.path, key, {**entry, "image": files["image"]}

    def promised(self) -> int | None:
        """Samples that img2dataset says it wrote."""
        try:
            stats = json.loads(self.path.with_name(f"{self.path.stem}_stats.json").read_text(encoding="utf-8"))
            return int(stats["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _entries(files: dict) -> list[dict]:
    """The entries, without `image`, that a sample's texts tell; none where they tell no caption."""
    try:
        content = json.loads(files["json"]) if "json" in files else {}
        text = files["txt"].decode("utf-8") if "txt" in files else None
    except (ValueError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    if isinstance(content.get("captions"), list):
        rest = {key: value for key, value in content.items() if key != "captions"}
        return [{**rest, "caption": caption} for caption in content["captions"]]
    caption = content.get("caption")
    caption = text if caption is None else caption
    return [] if caption is None else [{**content, "caption": caption}]


# ------------------------------------------------------------------------------------------------- tar


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, where its bytes begin, their number) of the regular files of a tar archive, uncompressed: ustar, GNU's and
    pax's long names. Raises EOFError where the archive ends too early, ValueError where it is none."""
    at, end = 0, file.seek(0, 2)
    long_name = None
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:
            raise EOFError(f"ends after {at} of its bytes")
        if _checksum(header) != _number(header[148:156]):
            raise ValueError("not a tar archive" if at == 0 else f"no file begins at byte {at}")
        kind, size, start = header[156:157], _number(header[124:136]), at + BLOCK
        if start + size > end:
            raise EOFError(f"ends within a file that begins at byte {at}")
        if kind in b"Lx":
            content = file.read(size)
            long_name = _text(content) if kind == b"L" else _pax_path(content) or long_name
        elif kind in (b"0", b"\0"):
            prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
            name = long_name or "/".join(part for part in (prefix, _text(header[:100])) if part)
            yield name, start, size
        if kind not in b"Lx":
            long_name = None
        at = start + -(-size // BLOCK) * BLOCK


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * 32


def _number(digits: bytes) -> int:
    if digits[0] & 0x80:  # GNU's numbers of more than 8 GiB
        return int.from_bytes(digits, "big") & ~(0xFF << 8 * (len(digits) - 1))
    return int(digits.strip(b" \0") or b"0", 8)


def _text(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_path(content: bytes) -> str | None:
    at = 0
    while at < len(content):
        length = int(content[at:].split(b" ", 1)[0])
        key, _, value = content[at:][:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        at += max(length, 1)
    return None
