"""Which images are the same: by the bytes of their files, and by what they show, whatever their size and compression.

Web images are resized and compressed anew by every download tool, so that equal bytes find few of the copies. A
difference hash finds them: of the image as a small gray one, whether each pixel is brighter than its left neighbor.
The 64-bit hash finds candidates (at most 3 bits apart, so that one of its four 16-bit parts is equal), the 256-bit
hash decides. Unlike imagehash.dhash it ignores differences that are only the noise of compression in even areas.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.shards import read_member
from dataset.transforms import ImageError, opened, to_rgb
from utils import in_processes

MARGIN = 3  # gray levels: smaller differences are noise
SHORT_BITS, LONG_BITS = 3, 16  # of 64 and of 256: how far copies may be apart
MIN_EDGES = 24  # bits that must be set among the 256: a nearly even image looks like every other
NO_FILE = "no such file"
COPY, LOOK_ALIKE = "a copy", "a look-alike"  # the same bytes; the same image in other bytes


class Fingerprint(NamedTuple):
    """sha256 of the file; the 64-bit and the 256-bit difference hash, or None if the image is nearly even."""

    sha256: str
    short: int | None
    long: int | None


def fingerprint(path: str | Path) -> Fingerprint:
    """Of an image file or an image in a shard. Raises ImageError if it is missing or no image."""
    with opened(path) as image:
        image.draft("RGB", (128, 128))  # a JPEG decoder then skips most of its work
        gray = to_rgb(image).convert("L")
    sha256, long = hashlib.sha256(image_bytes(path)).hexdigest(), _differences(gray, 16)
    even = long.bit_count() < MIN_EDGES
    return Fingerprint(sha256, None if even else _differences(gray, 8), None if even else long)


def image_bytes(path: str | Path) -> bytes:
    """The bytes of an image's file, or of an image in a shard. Raises ImageError if they cannot be read."""
    try:
        content = read_member(os.fspath(path))
        return Path(path).read_bytes() if content is None else content
    except (OSError, EOFError) as error:
        raise ImageError(path, str(error)) from None


def _differences(gray: Image.Image, side: int) -> int:
    """Bits of a side x side table: is a pixel of the shrunk image brighter than its left neighbor?"""
    small = np.asarray(gray.resize((side + 1, side), Image.Resampling.BILINEAR), dtype=np.int16)  # [side, side + 1]
    bits = small[:, 1:] > small[:, :-1] + MARGIN
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def fingerprints(paths: Sequence[str], workers: int) -> Iterator[tuple[str, Fingerprint | ImageError]]:
    """(path, its fingerprint or why there is none) in the paths' order, computed by `workers` processes."""
    return in_processes(_try_fingerprint, paths, workers)


def _try_fingerprint(path: str) -> tuple[str, Fingerprint | ImageError]:
    try:
        return path, fingerprint(path)
    except ImageError as error:
        return path, error


class KnownImages:
    """Images to be found again: `find` names those that another image is a copy of."""

    def __init__(self):
        self._by_bytes: dict[str, str] = {}  # sha256 -> name
        self._by_part: dict[tuple[int, int], list[tuple[Fingerprint, str]]] = {}  # (place, 16 bits) -> images

    def __len__(self) -> int:
        return len(self._by_bytes)

    def add(self, mark: Fingerprint, name: str) -> None:
        self._by_bytes.setdefault(mark.sha256, name)
        for part in _parts(mark):
            self._by_part.setdefault(part, []).append((mark, name))

    def find(self, mark: Fingerprint) -> dict[str, str]:
        """{name: COPY or LOOK_ALIKE} of all that show the same; of those with the same bytes only the first added."""
        same = self.find_bytes(mark.sha256)
        found = {} if same is None else {same: COPY}
        for part in _parts(mark):
            for other, name in self._by_part.get(part, ()):
                if _alike(mark, other):
                    found.setdefault(name, LOOK_ALIKE)
        return found

    def find_bytes(self, sha256: str | None) -> str | None:
        """The name of the image with this sum, for a file of which only the sum is known (img2dataset keeps that of
        the original)."""
        return self._by_bytes.get(sha256)


def _alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Few bits apart, also for the number of edges that the images have: skies over horizons are no copies."""
    if (one.short ^ other.short).bit_count() > SHORT_BITS:
        return False
    edges = min(one.long.bit_count(), other.long.bit_count())
    return (one.long ^ other.long).bit_count() <= min(LONG_BITS, edges // 4)


def _parts(mark: Fingerprint) -> list[tuple[int, int]]:
    """(place, 16 bits) of the four parts of the short hash; none of a nearly even image."""
    return [] if mark.short is None else [(place, mark.short >> (16 * place) & 0xFFFF) for place in range(4)]
