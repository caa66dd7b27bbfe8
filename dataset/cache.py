"""What data sets keep in memory, in large blocks that forked workers share: strings, and decoded images."""

import logging
import os
import time
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from dataset.transforms import ImageError, image_size, open_image
from utils import UserError

log = logging.getLogger("semmim")

CACHE_SHARE_OF_MEMORY = 0.25


class StringTable:
    """A read-only list of strings in one block of memory.

    Millions of Python strings cost ten times their text, and forked data workers copy them page by page
    because counting references writes to them; one array of bytes is shared as it is.
    """

    def __init__(self, strings: Iterable[str] = ()):
        builder = StringBuilder()
        for string in strings:
            builder.append(string)
        self.ends, self.bytes = builder.arrays()

    @classmethod
    def of_arrays(cls, ends: np.ndarray, text: np.ndarray) -> "StringTable":
        """The table of the arrays `ends` [n + 1] int64 and `bytes` [total] uint8 of another, which may be mapped from
        a file."""
        table = cls.__new__(cls)
        table.ends, table.bytes = ends, text
        return table

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = self.bytes[self.ends[index] : self.ends[index + 1]]
        return piece.tobytes().decode("utf-8", "surrogatepass")


class StringBuilder:
    """A StringTable in the making: strings are appended, and can be read at once."""

    def __init__(self):
        self._ends, self._text = array("q", [0]), bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, string: str) -> None:
        text = self._text
        text += string.encode() if string.isascii() else string.encode("utf-8", "surrogatepass")
        self._ends.append(len(text))

    def __getitem__(self, index: int) -> str:
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(ends [n + 1] int64, bytes [total] uint8) of the table, without a copy; nothing can be appended then."""
        return np.frombuffer(self._ends, dtype=np.int64), np.frombuffer(self._text, dtype=np.uint8)


class Numbering:
    """Numbers strings in order of first appearance: `numbering(string)` is the string's number, the same each time.

    An open hash table in arrays: a dictionary of millions of strings, or of their hashes, takes ten times its memory.
    """

    def __init__(self):
        self.strings = StringBuilder()  # by their numbers
        self._hashes = array("q")  # of each
        self._slots = array("i", [-1]) * 1024  # numbers, each at the first free place from its hash on; -1: free

    def __call__(self, string: str) -> int:
        key, slots, last = hash(string), self._slots, len(self._slots) - 1
        slot = key & last
        while (number := slots[slot]) >= 0:
            if self._hashes[number] == key and self.strings[number] == string:
                return number
            slot = (slot + 1) & last
        slots[slot] = number = len(self._hashes)
        self._hashes.append(key)
        self.strings.append(string)
        if 2 * number > last:
            self._grow()
        return number

    def _grow(self) -> None:
        slots = array("i", [-1]) * (4 * len(self._slots))
        last = len(slots) - 1
        for number, key in enumerate(self._hashes):
            slot = key & last
            while slots[slot] >= 0:
                slot = (slot + 1) & last
            slots[slot] = number
        self._slots = slots


class ImageCache:
    """Decoded RGB images in a few large blocks of memory, indexed like `paths`; a broken image raises its
    ImageError again at every visit.

    Large blocks, so that forked workers share them. Raises UserError where the images, estimated from 200
    of them, would take more than a quarter of the machine's memory (divided among the processes on this
    machine).
    """

    BLOCK = 1000  # images

    def __init__(self, paths: StringTable, threads: int | None = None):
        limit = _memory_bytes() * CACHE_SHARE_OF_MEMORY / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        _check_fits(_estimate_bytes(paths), limit, len(paths))
        self._errors: dict[int, tuple[str, str]] = {}
        self._blocks: list[np.ndarray] = []
        self._sizes = np.zeros((len(paths), 2), dtype=np.int64)  # height, width
        self._starts = np.zeros(len(paths), dtype=np.int64)  # in the image's block
        total, started, told = 0, time.monotonic(), time.monotonic()
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(paths), self.BLOCK):
                numbers = range(first, min(first + self.BLOCK, len(paths)))
                total += self._add_block(first, pool.map(_decode, [paths[i] for i in numbers]))
                _check_fits(total, limit, len(paths))
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    log.info("decoded %d of %d images (%.0f MB)", numbers.stop, len(paths), total / 1e6)
        usable, seconds = len(paths) - len(self._errors), time.monotonic() - started
        log.info("cached %d images (%.0f MB) in %.1f s", usable, total / 1e6, seconds)

    def _add_block(self, first: int, images: Iterable["np.ndarray | ImageError"]) -> int:
        arrays, size = [], 0
        for i, image in enumerate(images, first):
            if isinstance(image, ImageError):
                self._errors[i] = (image.path, image.reason)
                continue
            self._sizes[i], self._starts[i] = image.shape[:2], size
            arrays.append(image.reshape(-1))
            size += image.size
        self._blocks.append(np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint8))
        return size

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self._errors:
            raise ImageError(*self._errors[index])
        height, width = (int(n) for n in self._sizes[index])
        start = self._starts[index]
        pixels = self._blocks[index // self.BLOCK][start : start + height * width * 3]
        return Image.frombytes("RGB", (width, height), pixels)


def _decode(path: str) -> np.ndarray | ImageError:
    try:
        return np.asarray(open_image(path))  # [H,W,3] uint8
    except ImageError as error:
        return error


def _estimate_bytes(paths: StringTable, probes: int = 200) -> float:
    """Expected size of all decoded images, from the headers of evenly spaced ones."""
    step = max(1, len(paths) // probes)
    sizes = []
    for i in range(0, len(paths), step):
        try:
            width, height = image_size(paths[i])
            sizes.append(width * height * 3)
        except ImageError:  # a broken image takes no memory; decoding reports it
            sizes.append(0)
    return float(np.mean(sizes)) * len(paths)


def _check_fits(size: float, limit: float, count: int) -> None:
    if size > limit:
        raise UserError(
            f"data.cache_images: {count} decoded images need {size / 1e9:.2f} GB, this process may take "
            f"{limit / 1e9:.2f} (a quarter of the memory, over all processes here); set it to false"
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
