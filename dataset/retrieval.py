"""Image-text retrieval: pairs for fine-tuning, and the whole candidate set of a split for evaluation."""

import logging
import random
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.annotations import Source, load_candidates, load_pairs, strings
from dataset.cache import StringTable
from dataset.common import EvalDataset, TrainDataset, may_flip, numbered, sample_rng, usable_caption
from dataset.text import clean_caption, has_word
from dataset.transforms import Augment
from utils import UserError

log = logging.getLogger("semmim")


class RetrievalTrainDataset(TrainDataset):
    """(image, caption) pairs; those with the same `image_id` are positives of each other.

    max_words: of a caption; per: "caption", an epoch visits every pair; "image", every `image_id` with one of its
    pairs drawn; cache_images: keep the decoded images in memory.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image [3,S,S], caption (cleaned),
    image_id (number of the entry's `image_id` in order of first appearance), path, bad (as PretrainDataset;
    PretrainCollate makes batches of both).
    """

    def __init__(
        self,
        source: Source,
        transform: Augment,
        *,
        seed: int = 0,
        max_words: int = 30,
        per: str = "caption",
        cache_images: bool = False,
    ):
        entries = load_pairs(source)
        captions = [strings(entry["caption"]) for entry in entries]
        ids, paths = (numbered(entry[key] for entry in entries) for key in ("image_id", "image"))
        if len(ids) < 2:
            raise UserError(f"data.train: all entries have the image_id {next(iter(ids))!r}: matching has no negative")
        each = [len(group) for group in captions]
        self.image_id = np.repeat([ids[entry["image_id"]] for entry in entries], each)  # [pairs]
        self.path_id = np.repeat([paths[entry["image"]] for entry in entries], each)  # [pairs], in `paths`
        self.captions = StringTable(text for group in captions for text in group)
        order = np.argsort(self.image_id, kind="stable")  # the pairs of an image_id stand together in it
        self.pairs_of_image = order, np.searchsorted(self.image_id[order], np.arange(len(ids) + 1))
        self.transform, self.per, self.max_words = transform, per, max_words
        super().__init__(paths, seed, cache_images)

    def __len__(self) -> int:
        return len(self.image_id) if self.per == "caption" else len(self.pairs_of_image[1]) - 1

    def caption_length(self, epoch: int, index: int) -> int:
        """Characters of the caption of this visit, for sorting by length."""
        return len(self.captions[self._draw(index, sample_rng(self.seed, epoch, index))])

    def _draw(self, index: int, rng: random.Random) -> int:
        """The pair of a visit."""
        if self.per == "caption":
            return index
        order, start = self.pairs_of_image
        return int(order[rng.randrange(start[index], start[index + 1])])

    def _sample(self, index: int, rng: random.Random) -> dict:
        pair = self._draw(index, rng)  # first, so that `caption_length` draws the same one
        path_id = int(self.path_id[pair])
        path = self.paths[path_id]
        caption = usable_caption(self.captions[pair], self.max_words, path)
        image = self.transform(self.read_image(path_id), rng, may_flip(caption))
        return {"image": image, "caption": caption, "image_id": int(self.image_id[pair]), "path": path}


class RetrievalEvalDataset(EvalDataset):
    """All images and captions of a split ("val" or "test").

    images: paths, each once (entries that repeat an image are merged); captions: cleaned texts, of at most
    `max_words`; image_of_caption: index of each caption's image. A caption that cleaning leaves empty stays a query.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], split: str, *, max_words: int = 30):
        entries = load_candidates(source, split)
        number = numbered(entry["image"] for entry in entries)
        pairs = [(number[entry["image"]], text) for entry in entries for text in strings(entry["caption"])]
        super().__init__(list(number), transform)
        self.captions = [clean_caption(text, max_words) for _, text in pairs]
        self.image_of_caption = [image for image, _ in pairs]
        if empty := sum(not has_word(caption) for caption in self.captions):
            log.warning("%s: %d captions have no word left after cleaning", source.files, empty)
