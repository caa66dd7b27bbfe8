"""Image-text retrieval: pairs for fine-tuning, and the whole candidate set of a split for evaluation."""

import random
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.annotations import Source, load_candidates, load_pairs
from dataset.cache import StringTable
from dataset.common import EvalDataset, Transform, numbered
from dataset.pretrain import PairDataset
from dataset.text import LOWER_CASE, Language, clean_caption
from dataset.transforms import Augment
from utils import UserError


class RetrievalTrainDataset(PairDataset):
    """(image, caption) pairs; those of the same image are positives of each other.

    per: "caption", an epoch visits every pair; "image", every image with one of its captions drawn. The view of a
    sample is its `image`; PretrainCollate makes the batches.
    """

    def __init__(self, source: Source, transform: Augment, *, per: str = "caption", **options):
        pairs = load_pairs(source)
        paths = numbered(image for image, _ in pairs)
        if len(paths) < 2:
            raise UserError(f"data.train: all entries have the image {next(iter(paths))}: matching has no negative")
        texts = [(paths[image], text) for image, text in pairs]
        groups = None
        if per == "image":  # whose captions then stand together
            texts.sort(key=lambda pair: pair[0])
            groups = np.searchsorted([image for image, _ in texts], np.arange(len(paths) + 1))
        captions = StringTable(text for _, text in texts)
        images = np.array([image for image, _ in texts])
        super().__init__(partial(_view, transform), paths, captions, images, groups, **options)


def _view(transform: Augment, image: Image.Image, rng: random.Random, allow_flip: bool) -> dict[str, Tensor]:
    return {"image": transform(image, rng, allow_flip)}


class RetrievalEvalDataset(EvalDataset):
    """All images and captions of a split ("val" or "test").

    images: paths, each once (entries that repeat an image are merged); raw_captions: as they stand; captions: cleaned
    texts, of at most `max_words`; image_of_caption: index of each caption's image. A caption that cleaning leaves empty
    stays a query.
    """

    def __init__(
        self, source: Source, transform: Transform, split: str, max_words: int = 30, language: Language = LOWER_CASE
    ):
        pairs = load_candidates(source, split)
        number = numbered(image for image, _ in pairs)
        super().__init__(list(number), transform)
        self.raw_captions = [text for _, text in pairs]
        self.captions = [clean_caption(text, max_words, language.lower) for text in self.raw_captions]
        self.image_of_caption = [number[image] for image, _ in pairs]
