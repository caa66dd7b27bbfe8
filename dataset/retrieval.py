"""Image-text retrieval: pairs for fine-tuning, and the whole candidate set of a split for evaluation."""

import logging
import random
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.annotations import Source, load_candidates, load_pairs, strings
from dataset.cache import StringTable
from dataset.common import CaptionedDataset, EvalDataset, numbered, usable_caption
from dataset.text import LOWER_CASE, Language, clean_caption, has_word
from dataset.transforms import Augment
from utils import UserError

log = logging.getLogger("semmim")


class RetrievalTrainDataset(CaptionedDataset):
    """(image, caption) pairs; those of the same image are positives of each other.

    max_words: of a caption; per: "caption", an epoch visits every pair; "image", every image with one of its captions
    drawn; cache_images: keep the decoded images in memory.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image [3,S,S], caption (cleaned),
    image_id (index of the image's path), path, bad (as PretrainDataset; PretrainCollate makes batches of both).
    """

    def __init__(
        self,
        source: Source,
        transform: Augment,
        *,
        seed: int = 0,
        max_words: int = 30,
        per: str = "caption",
        language: Language = LOWER_CASE,
        cache_images: bool = False,
    ):
        entries = load_pairs(source)
        paths = numbered(entry["image"] for entry in entries)
        if len(paths) < 2:
            raise UserError(f"data.train: all entries have the image {next(iter(paths))}: matching has no negative")
        texts = [(paths[entry["image"]], text) for entry in entries for text in strings(entry["caption"])]
        groups = None
        if per == "image":  # whose captions then stand together
            texts.sort(key=lambda pair: pair[0])
            groups = np.searchsorted([image for image, _ in texts], np.arange(len(paths) + 1))
        image_of_caption = np.array([image for image, _ in texts])
        self.transform, self.max_words, self.language = transform, max_words, language
        captions = StringTable(text for _, text in texts)
        super().__init__(paths, captions, image_of_caption, groups, seed=seed, cache_images=cache_images)

    def _sample(self, index: int, rng: random.Random) -> dict:
        number = self.draw_caption(index, rng)
        image_id = int(self.image_of_caption[number])
        path = self.paths[image_id]
        caption = usable_caption(self.captions[number], self.max_words, path, self.language.lower)
        image = self.transform(self.read_image(image_id), rng, self.language.may_flip(caption))
        return {"image": image, "caption": caption, "image_id": image_id, "path": path}


class RetrievalEvalDataset(EvalDataset):
    """All images and captions of a split ("val" or "test").

    images: paths, each once (entries that repeat an image are merged); raw_captions: as they stand; captions: cleaned
    texts, of at most `max_words`; image_of_caption: index of each caption's image. A caption that cleaning leaves empty
    stays a query.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        split: str,
        *,
        max_words: int = 30,
        language: Language = LOWER_CASE,
    ):
        entries = load_candidates(source, split)
        number = numbered(entry["image"] for entry in entries)
        pairs = [(number[entry["image"]], text) for entry in entries for text in strings(entry["caption"])]
        super().__init__(list(number), transform)
        self.raw_captions = [text for _, text in pairs]
        self.captions = [clean_caption(text, max_words, language.lower) for text in self.raw_captions]
        self.image_of_caption = [image for image, _ in pairs]
        if empty := sum(not has_word(caption) for caption in self.captions):
            log.warning("%s: %d captions have no word left after cleaning", source.files, empty)
