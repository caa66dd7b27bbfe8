"""What img2dataset made of a list of addresses (github.com/rom1504/img2dataset): folders or tar shards of
key.jpg + key.json, beside each a SHARD_stats.json with the status of every address.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset.files import read_json
from dataset.shards import shard_members
from tools.prepare.common import Job, progress, whole_folder
from utils import UserError, open_file

SHARD = re.compile(r"\d{5,}")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
KEPT_ENDINGS = (*IMAGE_ENDINGS, ".json", ".txt")
SHARD_SIZE = 10_000  # img2dataset's default


def predicted_path(row: int, shard_size: int = SHARD_SIZE) -> str:
    """Where img2dataset puts the image of a list's row: 00001/000010005.jpg for row 10,005."""
    digits = len(str(shard_size - 1))
    shard, index = divmod(row, shard_size)
    return f"{shard:05d}/{shard * 10**digits + index:0{5 + digits}d}.jpg"


def shard_names(folder: Path) -> list[str]:
    """Names of the shards in a folder, whether unpacked or tar files."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {Path(name).stem for name in names if name.endswith(".tar") or (folder / name).is_dir()}
    return sorted(name for name in found if SHARD.fullmatch(name))


def unpack_shards(job: Job) -> None:
    """SHARD.tar -> SHARD/ in the images' folder, each whole or not at all; what is unpacked already is left alone."""
    packed = [name for name in shard_names(job.images) if not (job.images / name).is_dir()]
    for name in progress(packed, "unpacking tar shards", "shards"):
        path = job.images / f"{name}.tar"
        try:
            with open_file(path) as file, whole_folder(job.images / name) as partial:
                _unpack(job, path, file, partial)
        except OSError as error:
            raise UserError(f"{path}: cannot be unpacked ({error.strerror or error})") from None


def _unpack(job: Job, path: Path, file: BinaryIO, folder: Path) -> None:
    """The plain files at the top of a tar file without compression, which cannot hold more than its own size."""
    try:
        for name, start, size in shard_members(file):
            if os.path.basename(name) != name:
                job.odd("file of a tar shard that is not at its top, left out", f"{path.name}: {name}")
            elif name.endswith(KEPT_ENDINGS):
                file.seek(start)
                (folder / name).write_bytes(file.read(size))
    except (EOFError, ValueError) as error:
        job.odd("damaged tar shard, read up to the damage", f"{path.name} ({error})")


def samples(job: Job) -> Iterator[dict]:
    """{"image": path in the images' folder, "caption", "url", "sha256"} of every image of the unpacked shards; sha256
    is that of the file at its address, from before it was resized."""
    for shard in progress(shard_names(job.images), "reading shards", "shards"):
        names = set(os.listdir(job.images / shard))
        for name in sorted(name for name in names if name.endswith(".json")):
            sample = _sample(job, shard, name.removesuffix(".json"), names)
            if sample is not None:
                yield sample


def _sample(job: Job, shard: str, key: str, names: set[str]) -> dict | None:
    where, folder = f"{shard}/{key}.json", job.images / shard
    try:
        content = read_json(folder / f"{key}.json")
        caption, url = content.get("caption"), content.get("url") or ""
        if not isinstance(caption, str | None):
            raise AttributeError("its caption is no text")
    except (UserError, AttributeError):
        job.odd("sample whose .json cannot be read, left out", where)
        return None
    if content.get("status", "success") != "success":
        return None
    image = next((key + ending for ending in IMAGE_ENDINGS if key + ending in names), None)
    if image is None or not os.path.getsize(folder / image):
        job.odd("sample whose image is missing or empty, left out", where)
        return None
    if caption is None and f"{key}.txt" in names:
        try:
            with open_file(folder / f"{key}.txt") as file:
                caption = file.read().decode("utf-8")
        except (UserError, UnicodeDecodeError) as error:
            job.odd("sample whose .txt cannot be read, left out", f"{shard}/{key}.txt ({error})")
            return None
    sha256 = content.get("sha256")
    return {"image": f"{shard}/{image}", "caption": caption or "", "url": str(url), "sha256": sha256}


def failures(job: Job) -> Counter:
    """{reason: addresses} of what could not be downloaded, from the shards' statistics."""
    reasons: Counter = Counter()
    for path in (job.images / f"{name}_stats.json" for name in shard_names(job.images)):
        if not path.is_file():
            continue
        try:
            counts = read_json(path).get("status_dict", {}).items()
            reasons.update({str(reason): int(count) for reason, count in counts})
        except (UserError, AttributeError, TypeError, ValueError) as error:
            job.odd("shard whose statistics cannot be read", f"{path.name} ({error})")
    reasons.pop("success", None)
    return reasons
