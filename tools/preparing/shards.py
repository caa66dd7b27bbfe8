"""Writing tar shards in webdataset's layout, which dataset.shards reads; whatever the samples come from."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dataset.common import EmptyCaption
from dataset.transforms import ImageError
from tools.preparing.files import progress
from utils import UserError, replacing

EXAMPLES = 3  # of what is left out, in the error


class Sample(NamedTuple):
    """An image's file as it stands, the ending that names its format (one of dataset.shards.IMAGES), and what its .json
    says: {"caption": text | [texts]} or, of several entries, {"captions": [...]}."""

    image: bytes
    ending: str
    texts: dict


LeftOut = ImageError | EmptyCaption  # in the place of a sample that cannot be used: it names the place and the reason


def write_shards(
    samples: Iterable[Sample | LeftOut], total: int, output: Path, per_shard: int, max_bad_share: float
) -> tuple[int, int]:
    """(samples written, samples left out); each shard is whole or not there, and SHARD_stats.json tells its samples.

    samples: `total` of them, taken one at a time, so that memory holds one; a shard has the place of `per_shard`,
    and those left out leave a gap in its keys. Raises UserError after the shard with which more than `max_bad_share`
    of `total` are left out.
    """
    written, left_out, examples = 0, 0, []
    remaining, line = iter(samples), progress("packing images", "images", total)
    for shard in range(-(-total // per_shard)):
        path, count = output / f"{shard:05d}.tar", 0
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for number, sample in enumerate(itertools.islice(remaining, per_shard)):
                line.advance(1)
                if isinstance(sample, LeftOut):
                    left_out += 1
                    if len(examples) < EXAMPLES:
                        examples.append(str(sample))
                    continue
                key = f"{shard:05d}{number:0{len(str(per_shard - 1))}d}"
                _add(tar, f"{key}.{sample.ending}", sample.image)
                _add(tar, f"{key}.json", json.dumps(sample.texts).encode())
                count += 1
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": count}), encoding="utf-8")
        written += count
        if left_out > max_bad_share * total:
            raise UserError(
                f"{left_out} of {total} images cannot be read or have no caption, --max_bad_share allows "
                f"{max_bad_share:g}: {'; '.join(examples)}"
            )
    return written, left_out


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
