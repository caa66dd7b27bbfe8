"""What img2dataset made of a list of addresses (github.com/rom1504/img2dataset): folders or tar shards of
key.jpg + key.json, beside each a SHARD_stats.json and a SHARD.parquet with the status of every address.
"""

import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tools.prepare.files import progress, read_json, whole_folder
from tools.prepare.parquet import opened_parquet
from tools.prepare.report import Report
from utils import UserError

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


def unpack_shards(folder: Path, report: Report) -> None:
    """SHARD.tar -> SHARD/, each whole or not at all; what is unpacked already is left alone."""
    packed = [name for name in shard_names(folder) if not (folder / name).is_dir()]
    line = progress("unpacking tar shards", "shards", len(packed))
    for name in packed:
        try:
            with whole_folder(folder / name) as partial:
                _unpack(folder / f"{name}.tar", partial, report)
        except OSError as error:
            raise UserError(f"{folder / name}.tar: cannot be unpacked ({error.strerror or error})") from None
        line.advance(1)


def _unpack(path: Path, folder: Path, report: Report) -> None:
    """Of a tar file without compression, which cannot hold more than its own size, the plain files of its top."""
    if not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{path}: cannot be unpacked (not a regular file)")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # Python before 3.13.6 would read it for ever
                    raise tarfile.ReadError("a file of negative size")
                if not member.isreg() or member.issparse() or os.path.basename(member.name) != member.name:
                    report.odd("member of a tar shard that is no plain file in it, left out", f"{path}: {member.name}")
                elif member.name.endswith(KEPT_ENDINGS):
                    with open(folder / member.name, "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
    except (tarfile.TarError, EOFError) as error:
        report.odd("damaged tar shard, read up to the damage", f"{path.name} ({error})")


def samples(folder: Path, report: Report) -> Iterator[dict]:
    """{"image": path in `folder`, "caption", "url", "sha256"} of every image of the unpacked shards; sha256 is that of
    the file at its address, from before it was resized."""
    shards = shard_names(folder)
    line = progress("reading shards", "shards", len(shards))
    for shard in shards:
        names = set(os.listdir(folder / shard))
        for name in sorted(name for name in names if name.endswith(".json")):
            sample = _sample(folder, shard, name, names, report)
            if sample is not None:
                yield sample
        line.advance(1)


def _sample(folder: Path, shard: str, name: str, names: set[str], report: Report) -> dict | None:
    where, stem = f"{shard}/{name}", name.removesuffix(".json")
    try:
        content = json.loads(_text(folder / shard / name))
        caption, url = content.get("caption"), content.get("url") or ""
        if not isinstance(caption, str | None):
            raise ValueError("its caption is no text")
    except (OSError, ValueError, AttributeError, RecursionError):
        report.odd("sample whose .json cannot be read, left out", where)
        return None
    if content.get("status", "success") != "success":
        return None
    image = next((stem + ending for ending in IMAGE_ENDINGS if stem + ending in names), None)
    if image is None or not os.path.getsize(folder / shard / image):
        report.odd("sample whose image is missing or empty, left out", where)
        return None
    if caption is None and f"{stem}.txt" in names:
        try:
            caption = _text(folder / shard / f"{stem}.txt")
        except (OSError, ValueError) as error:
            report.odd("sample whose .txt cannot be read, left out", f"{shard}/{stem}.txt ({error})")
            return None
    return {
        "image": f"{shard}/{image}",
        "caption": caption or "",
        "url": str(url),
        "sha256": content.get("sha256"),
    }


def _text(path: Path) -> str:
    """Raises OSError for what is no regular file, such as a pipe or a device that never ends."""
    if not path.is_file():
        raise OSError("not a regular file")
    return path.read_text(encoding="utf-8")


def failures(folder: Path, report: Report) -> Counter:
    """{reason: addresses} of what could not be downloaded, from SHARD_stats.json, else from SHARD.parquet."""
    reasons: Counter = Counter()
    for shard in shard_names(folder):
        stats, table = folder / f"{shard}_stats.json", folder / f"{shard}.parquet"
        if stats.is_file():
            reasons.update(_stats_reasons(stats, report))
        elif table.is_file():
            reasons.update(_parquet_reasons(table, report))
    reasons.pop("success", None)
    return reasons


def _stats_reasons(path: Path, report: Report) -> Counter:
    try:
        return Counter({str(reason): int(count) for reason, count in read_json(path).get("status_dict", {}).items()})
    except (UserError, AttributeError, TypeError, ValueError) as error:
        report.odd("shard whose statistics cannot be read", f"{path.name} ({error})")
        return Counter()


def _parquet_reasons(path: Path, report: Report) -> Counter:
    try:
        with opened_parquet(path) as file:
            columns = file.read(columns=["status", "error_message"]).to_pydict()
        pairs = list(zip(columns["status"], columns["error_message"], strict=True))
    except (UserError, KeyError) as error:  # KeyError: a column is missing
        report.odd("parquet file that cannot be read, its statuses not counted", f"{path.name} ({error})")
        return Counter()
    return Counter("success" if status == "success" else message or status for status, message in pairs)
