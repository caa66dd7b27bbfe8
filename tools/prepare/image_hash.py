"""Which images are the same: by the bytes of their files, and by what they show, whatever their size and compression.

Web images are resized and compressed anew by every download tool, so that equal bytes find few of the copies. A
difference hash does: of the image as a small grey one, whether each pixel is brighter than its left neighbour. The
64-bit one finds candidates (at most 3 bits apart, so that one of its four 16-bit parts is equal), the 256-bit one
decides.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.transforms import ImageError, opened, to_rgb
from utils import in_processes

MARGIN = 3  # grey levels: smaller differences are noise of the compression in even areas
SHORT_BITS, LONG_BITS = 3, 16  # of 64 and of 256: how far copies may be apart
MIN_EDGES = 24  # bits that must be set among the 256: a nearly even image looks like every other
PARTS = 4
NO_FILE = "no such file"
COPY, LOOK_ALIKE = "a copy", "a look-alike"  # the same bytes; the same image in other bytes


class Fingerprint(NamedTuple):
    """sha256 of the file; the two difference hashes, or None where the image is nearly even."""

    sha256: str
    short: int | None
    long: int | None


def fingerprint(path: str | Path) -> Fingerprint:
    """Raises ImageError where the file is missing or no image."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError(path, "not a regular file")  # a pipe would be waited for
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(path, NO_FILE) from None
    except OSError as error:
        raise ImageError(path, error.strerror or "cannot be read") from None
    with opened(path, content) as image:
        image.draft("RGB", (128, 128))  # a JPEG decoder then skips most of its work
        grey = to_rgb(image).convert("L")
    long = _differences(grey, 16)
    if long.bit_count() < MIN_EDGES:
        return Fingerprint(hashlib.sha256(content).hexdigest(), None, None)
    return Fingerprint(hashlib.sha256(content).hexdigest(), _differences(grey, 8), long)


def _differences(grey: Image.Image, side: int) -> int:
    """Bits of a side x side table: is a pixel of the shrunk image brighter than its left neighbour?"""
    small = np.asarray(grey.resize((side + 1, side), Image.Resampling.BILINEAR), dtype=np.int16)  # [side, side + 1]
    bits = small[:, 1:] > small[:, :-1] + MARGIN
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class KnownImages:
    """Images to be found again: `find` names the one that another image is a copy of."""

    def __init__(self):
        self._by_bytes: dict[str, str] = {}
        self._by_part: list[dict[int, list[tuple[int, int, str]]]] = [{} for _ in range(PARTS)]

    def __len__(self) -> int:
        return len(self._by_bytes)

    def add(self, mark: Fingerprint, name: str) -> None:
        self._by_bytes.setdefault(mark.sha256, name)
        if mark.short is not None:
            for table, part in zip(self._by_part, _parts(mark.short), strict=True):
                table.setdefault(part, []).append((mark.short, mark.long, name))

    def find(self, mark: Fingerprint) -> tuple[str, str] | None:
        """(name, COPY or LOOK_ALIKE) of the first that shows the same, or None."""
        if mark.sha256 in self._by_bytes:
            return self._by_bytes[mark.sha256], COPY
        name = next(self._look_alikes(mark), None)
        return None if name is None else (name, LOOK_ALIKE)

    def find_all(self, mark: Fingerprint) -> list[str]:
        """The names of all that show the same, of those with the same bytes only the first."""
        same = [self._by_bytes[mark.sha256]] if mark.sha256 in self._by_bytes else []
        return list(dict.fromkeys([*same, *self._look_alikes(mark)]))

    def _look_alikes(self, mark: Fingerprint) -> Iterator[str]:
        for table, part in zip(self._by_part, _parts(mark.short), strict=True) if mark.short is not None else ():
            for short, long, name in table.get(part, ()):
                if (short ^ mark.short).bit_count() <= SHORT_BITS and _alike(long, mark.long):
                    yield name

    def find_bytes(self, sha256: str | None) -> str | None:
        """By the bytes alone, for a file that is known by its sum only (img2dataset keeps that of the original)."""
        return self._by_bytes.get(sha256) if sha256 else None


def _alike(one: int, other: int) -> bool:
    """Few bits apart, also for the number of edges that the images have: skies over horizons are no copies."""
    edges = min(one.bit_count(), other.bit_count())
    return (one ^ other).bit_count() <= min(LONG_BITS, edges // 4)


def _parts(short: int) -> list[int]:
    return [short >> (16 * place) & 0xFFFF for place in range(PARTS)]


def fingerprints(paths: Sequence[str], workers: int) -> Iterator[tuple[str, Fingerprint | ImageError]]:
    """(path, its fingerprint or why there is none) in the paths' order, computed by `workers` processes."""
    yield from in_processes(_try_fingerprint, paths, workers)


def _try_fingerprint(path: str) -> tuple[str, Fingerprint | ImageError]:
    try:
        return path, fingerprint(path)
    except ImageError as error:
        return path, error
