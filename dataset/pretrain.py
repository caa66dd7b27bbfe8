"""Image-text pairs for pre-training: two random views of a picture and one of its captions.

A sample is a pure function of (seed, epoch, index): number of workers, ranks and resumes do not change it.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.annotations import StringTable, load_annotations
from dataset.cache import ImageCache
from dataset.common import TrainDataset, caption_id, may_flip, sample_places, sample_rng, usable_caption
from dataset.text import Tokenizer
from dataset.transforms import PretrainViews, open_image


class PretrainDataset(TrainDataset):
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
        places = sample_places(samples)
        if "unusable" in places:
            return places
        batch: dict[str, Tensor | list[str]] = {
            key: torch.stack([sample[key] for sample in samples])
            for key, value in samples[0].items()
            if isinstance(value, Tensor)
        }
        captions = [sample["caption"] for sample in samples]
        batch["input_ids"], batch["attention_mask"] = self.tokenizer.encode(captions, self.max_tokens)
        batch["image_id"] = torch.tensor([sample["image_id"] for sample in samples], dtype=torch.int64)
        batch["caption_id"] = torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64)
        return {**batch, **places}
