"""Decoded pictures in memory, for data sets that fit there."""

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from dataset.annotations import StringTable
from dataset.transforms import ImageError, open_image
from utils import UserError

log = logging.getLogger("semmim")

CACHE_SHARE_OF_MEMORY = 0.25


class ImageCache:
    """Decoded RGB pictures in a few large blocks of memory, indexed like `paths`; a broken picture raises its
    ImageError again at every visit.

    Large blocks, so that forked workers share them. Raises UserError where the pictures, estimated from 200
    of them, would take more than a quarter of the machine's memory (divided among the processes on this
    machine).
    """

    BLOCK = 1000  # pictures

    def __init__(self, paths: StringTable, threads: int | None = None):
        limit = _memory_bytes() * CACHE_SHARE_OF_MEMORY / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        _check_fits(_estimate_bytes(paths), limit, len(paths))
        self._errors: dict[int, tuple[str, str]] = {}
        self._blocks: list[np.ndarray] = []
        self._sizes = np.zeros((len(paths), 2), dtype=np.int64)  # height, width
        self._starts = np.zeros(len(paths), dtype=np.int64)  # in the picture's block
        total, started, told = 0, time.monotonic(), time.monotonic()
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(paths), self.BLOCK):
                numbers = range(first, min(first + self.BLOCK, len(paths)))
                total += self._add_block(first, pool.map(_decode, [paths[i] for i in numbers]))
                _check_fits(total, limit, len(paths))
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    log.info("decoded %d of %d pictures (%.0f MB)", numbers.stop, len(paths), total / 1e6)
        usable, seconds = len(paths) - len(self._errors), time.monotonic() - started
        log.info("cached %d pictures (%.0f MB) in %.1f s", usable, total / 1e6, seconds)

    def _add_block(self, first: int, pictures: Iterable["np.ndarray | ImageError"]) -> int:
        arrays, size = [], 0
        for i, picture in enumerate(pictures, first):
            if isinstance(picture, ImageError):
                self._errors[i] = (picture.path, picture.reason)
                continue
            self._sizes[i], self._starts[i] = picture.shape[:2], size
            arrays.append(picture.reshape(-1))
            size += picture.size
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
    """Expected size of all decoded pictures, from the headers of evenly spaced ones."""
    step = max(1, len(paths) // probes)
    sizes = []
    for i in range(0, len(paths), step):
        try:
            with Image.open(paths[i]) as image:
                sizes.append(image.width * image.height * 3)
        except Exception:  # a broken picture takes no memory; decoding reports it
            sizes.append(0)
    return float(np.mean(sizes)) * len(paths)


def _check_fits(size: float, limit: float, count: int) -> None:
    if size > limit:
        raise UserError(
            f"data.cache_images: {count} decoded pictures need {size / 1e9:.2f} GB, this process may take "
            f"{limit / 1e9:.2f} (a quarter of the memory, over all processes here); set it to false"
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
