"""Writing tar shards in webdataset's layout, which dataset.shards reads; whatever the samples come from."""

import hashlib
import io
import itertools
import json
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.common import EmptyCaption
from dataset.transforms import ImageError
from tools.prepare.common import progress, whole_folder
from utils import UserError, replacing, write_json

EXAMPLES = 3  # of what is left out, in the error


class Sample(NamedTuple):
    """An image's file as it stands, the ending that names its format (one of dataset.shards.IMAGES), and the captions
    of its entries, each a text or a list of texts; rows: how many of the source's it is made of."""

    image: bytes
    ending: str
    captions: list[str | list[str]]
    rows: int = 1


LeftOut = ImageError | EmptyCaption  # in the place of a sample that cannot be used: it names the place and the reason


class FailedDownload:
    """In the place of a sample whose image could not be downloaded when the data set was made: nothing is wrong now."""


@dataclass
class Packed:
    """What became of the samples so far, in numbers of images written and of rows.

    examples: of those left out, for the error; digests: of the images written, 8 bytes each, in few of which two
    images would be the same by chance.
    """

    written: int = 0
    rows: int = 0
    left_out: int = 0
    failed_downloads: int = 0
    examples: list[str] = field(default_factory=list)
    digests: array = field(default_factory=lambda: array("Q"))

    def count(self, sample: Sample) -> None:
        """One more image that is written."""
        self.written += 1
        self.rows += sample.rows
        self.digests.frombytes(hashlib.blake2b(sample.image, digest_size=self.digests.itemsize).digest())

    def repeats(self) -> int:
        """How many of the images were written before."""
        return self.written - len(np.unique(self.digests))

    def check(self, total: int, max_bad_share: float) -> None:
        """UserError where more than `max_bad_share` of the `total` samples, failed downloads apart, are left out."""
        downloaded = total - self.failed_downloads
        if self.left_out > max_bad_share * downloaded:
            raise UserError(
                f"{self.left_out} of {downloaded} images cannot be read or have no caption, --max_bad_share allows "
                f"{max_bad_share:g}: {'; '.join(self.examples)}"
            )


def write_shards(
    samples: Iterable[Sample | LeftOut | FailedDownload], total: int, output: Path, per_shard: int, max_bad_share: float
) -> Packed:
    """Write a folder of shards of `per_shard` images, whole or not at all; SHARD_stats.json tells a shard's images.

    samples: of `total` rows, taken one at a time, so that memory holds one. Raises UserError where more than
    `max_bad_share` are left out, which is looked at after every `per_shard` samples and at the end, and where none can
    be used.
    """
    packed = Packed()
    with whole_folder(output) as partial:
        _write(_usable(samples, total, per_shard, max_bad_share, packed), partial, per_shard, packed)
        if not packed.written:
            counts = f"{packed.left_out} left out, {packed.failed_downloads} failed downloads"
            raise UserError(f"no image with a caption can be used: {'; '.join([counts, *packed.examples])}")
    return packed


def check_output(output: Path) -> None:
    """UserError where a folder of shards cannot become `output`: anything but an empty folder is there."""
    try:
        if not os.path.lexists(output) or output.is_dir() and not any(output.iterdir()) and not os.path.ismount(output):
            return
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror or error})") from None
    raise UserError(f"--output {output}: must be a new or an empty folder (no mount point); name another")


def _write(usable: Iterator[Sample], folder: Path, per_shard: int, packed: Packed) -> None:
    """The samples as shards; the images are counted in `packed`."""
    for shard in itertools.count():
        first = next(usable, None)
        if first is None:
            return
        path, count = folder / f"{shard:05d}.tar", 0
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in itertools.chain([first], itertools.islice(usable, per_shard - 1)):
                key = f"{shard:05d}{count:0{len(str(per_shard - 1))}d}"
                _add(tar, f"{key}.{sample.ending}", sample.image)
                _add(tar, f"{key}.json", json.dumps(_texts(sample)).encode())
                packed.count(sample)
                count += 1
        write_json(path.with_name(f"{path.stem}_stats.json"), {"successes": count})


def _texts(sample: Sample) -> dict:
    """What a sample's .json says."""
    return {"caption": sample.captions[0]} if len(sample.captions) == 1 else {"captions": sample.captions}


def _usable(
    samples: Iterable[Sample | LeftOut | FailedDownload], total: int, every: int, max_bad_share: float, packed: Packed
) -> Iterator[Sample]:
    """The samples that can be written; the others are counted in `packed`, which is checked after `every` samples."""
    for number, sample in enumerate(progress(samples, "packing images", "images", total), 1):
        if isinstance(sample, FailedDownload):
            packed.failed_downloads += 1
        elif isinstance(sample, LeftOut):
            packed.left_out += 1
            if len(packed.examples) < EXAMPLES:
                packed.examples.append(str(sample))
        else:
            yield sample
        if number % every == 0:
            packed.check(total, max_bad_share)
    packed.check(total, max_bad_share)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
