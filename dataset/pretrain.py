"""Image-text pairs for pre-training: two random views of a picture and one of its captions.

A sample is a pure function of (seed, epoch, index): number of workers, ranks and resumes do not change it.
"""

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import StringTable, load_annotations
from dataset.text import Tokenizer, clean_caption
from dataset.transforms import ImageError, PretrainViews, open_image
from utils import UserError

log = logging.getLogger("semmim")

DIRECTION = re.compile(r"\b(left|right)(most|wards?|hand(ed)?)?\b")
REPLACEMENT_TRIES = 20
CACHE_SHARE_OF_MEMORY = 0.25


class EmptyCaption(Exception):
    """A caption with no word left after cleaning."""


class PretrainDataset(Dataset):
    """Pairs of the pre-training files; an epoch visits every entry once, a list of captions gives one a
    visit.

    files: annotation files (see `load_annotations`); image_size: side S of the views; two_views: False leaves
    image2 out (`mim.target: none`); codebook_size: side C of codebook_image (`mim.target: dvae`), else None;
    cache_images: keep the decoded pictures in memory.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image1, image2 [3,S,S],
    codebook_image [3,C,C], caption (cleaned), image_id (index of the picture's path), path, and bad: one line
    for each picture or caption that could not be used and was replaced by another entry. Where no replacement
    was found either, the dict holds `bad` alone.
    """

    takes_epoch = True  # the loader asks for (epoch, index)

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        seed: int = 0,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        max_words: int = 30,
        cache_images: bool = False,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        ops: int = 2,
        magnitude: float = 7,
        two_views: bool = True,
        codebook_size: int | None = None,
    ):
        entries = load_annotations(files, "pretrain", image_root, image_prefix_map)
        captions = [[e["caption"]] if isinstance(e["caption"], str) else e["caption"] for e in entries]
        image_ids = {path: i for i, path in enumerate(dict.fromkeys(e["image"] for e in entries))}
        self.paths = StringTable(image_ids)
        self.image_id = np.array([image_ids[e["image"]] for e in entries], dtype=np.int64)  # [entries]
        self.captions = StringTable(text for group in captions for text in group)
        self.caption_start = np.cumsum([0] + [len(group) for group in captions], dtype=np.int64)  # [entries+1]
        self.seed = seed
        self.max_words = max_words
        self.views = PretrainViews(image_size, crop_scale, flip, ops, magnitude, codebook_size, two_views)
        self.cache = ImageCache(self.paths) if cache_images else None

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        return first_usable(self._sample, index, len(self), sample_rng(self.seed, epoch, index))

    def caption_length(self, epoch: int, index: int) -> int:
        """Characters of the caption that this visit draws, for sorting by length."""
        return len(self._draw_caption(index, sample_rng(self.seed, epoch, index)))

    def _draw_caption(self, index: int, rng: random.Random) -> str:
        return self.captions[rng.randrange(self.caption_start[index], self.caption_start[index + 1])]

    def _sample(self, index: int, rng: random.Random) -> dict:
        image_id = int(self.image_id[index])
        path = self.paths[image_id]
        raw = self._draw_caption(index, rng)  # first, so that `caption_length` draws the same one
        caption = usable_caption(raw, self.max_words, path)
        image = open_image(path) if self.cache is None else self.cache[image_id]
        views = self.views(image, rng, allow_flip=may_flip(caption))
        return {**views, "caption": caption, "image_id": image_id, "path": path}


class PretrainCollate:
    """List of samples -> batch dict: every picture key stacked to [B,3,...], input_ids and attention_mask
    [B,L], image_id [B] int64, caption_id [B] int64 (equal for equal captions), paths and bad (lists of str).

    Samples that hold `bad` alone are left out; the loader stops the run when such a batch arrives.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, samples: list[dict]) -> dict:
        bad = [line for sample in samples for line in sample["bad"]]
        usable = [sample for sample in samples if "path" in sample]
        if len(usable) < len(samples):
            return {"bad": bad, "paths": [sample["path"] for sample in usable], "unusable": True}
        batch: dict[str, Tensor | list[str]] = {
            key: torch.stack([sample[key] for sample in samples])
            for key, value in samples[0].items()
            if isinstance(value, Tensor)
        }
        captions = [sample["caption"] for sample in samples]
        batch["input_ids"], batch["attention_mask"] = self.tokenizer.encode(captions, self.max_tokens)
        batch["image_id"] = torch.tensor([sample["image_id"] for sample in samples], dtype=torch.int64)
        batch["caption_id"] = torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64)
        batch["paths"] = [sample["path"] for sample in samples]
        batch["bad"] = bad
        return batch


# ---------------------------------------------------------------------------- what training data sets share


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random source of one visit; text seeds are hashed (SHA-512), so near seeds give unrelated draws."""
    return random.Random(f"{seed} {epoch} {index}")


def first_usable(sample: Callable[[int, random.Random], dict], index: int, size: int, rng: random.Random) -> dict:
    """`sample(index, rng)`, or that of another index drawn from `rng` while pictures or captions are
    unusable."""
    bad: list[str] = []
    for _ in range(1 + REPLACEMENT_TRIES):
        try:
            return {**sample(index, rng), "bad": bad}
        except (ImageError, EmptyCaption) as error:
            bad.append(str(error))
            index = rng.randrange(size)
    return {"bad": bad}


def usable_caption(raw: str, max_words: int, path: str) -> str:
    caption = clean_caption(raw, max_words)
    if not caption:
        raise EmptyCaption(f"{path}: nothing is left of the caption {raw!r} after cleaning")
    return caption


def may_flip(caption: str) -> bool:
    """A mirrored picture would make a caption with left or right wrong."""
    return DIRECTION.search(caption) is None


def caption_id(caption: str) -> int:
    """A stable 63-bit number that is equal for equal captions, in every process and run."""
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
