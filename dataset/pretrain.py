"""Image-text pairs for pre-training: two random views of an image and one of its captions."""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dataset.annotations import Source
from dataset.cache import load_pairs
from dataset.common import CaptionedDataset, Collate, caption_id, usable_caption
from dataset.text import LOWER_CASE, Language, Tokenizer, clean_caption
from dataset.transforms import PretrainViews, stack_pixels


class PairDataset(CaptionedDataset):
    """Pairs of an image and a caption, for pre-training and retrieval.

    views: (image, rng, allow_flip) -> the tensors made of an image, by name; columns: see CaptionedDataset; max_words:
    of a caption; options: `seed`, `cache_images`.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: the views, caption (cleaned), cut (whether
    words of it are missing), image_id (index of the image's path), path, and bad: one line for each image or caption
    that could not be used and was replaced by another entry.
    """

    def __init__(self, views: Callable, *columns, max_words: int = 30, language: Language = LOWER_CASE, **options):
        self.views, self.max_words, self.language = views, max_words, language
        super().__init__(*columns, **options)

    def _sample(self, index: int, rng: random.Random) -> dict:
        number = self.draw_caption(index, rng)
        image_id = int(self.image_of_caption[number])
        path = self.paths[image_id]
        caption = usable_caption(self.captions[number], self.max_words, path, self.language.lower)
        cut = len(clean_caption(self.captions[number], None, self.language.lower)) > len(caption)
        views = self.views(self.read_image(image_id), rng, allow_flip=self.language.may_flip(caption))
        return {**views, "caption": caption, "cut": cut, "image_id": image_id, "path": path}


class PretrainDataset(PairDataset):
    """Pairs of the pre-training files; an epoch visits every entry once, a list of captions gives one per visit."""

    def __init__(self, source: Source, views: PretrainViews, **options):
        pairs = load_pairs(source)
        image_of_caption = np.repeat(pairs.image_id, np.diff(pairs.caption_start))
        super().__init__(views, pairs.paths, pairs.captions, image_of_caption, pairs.caption_start, **options)


class PretrainCollate(Collate):
    """List of samples -> batch dict: every image key stacked to [B,3,...] (uint8: `normalized` follows on the device),
    input_ids and attention_mask [B,L], padded (whether that mask has a 0), image_id [B] int64, caption_id [B] int64
    (equal for equal captions), caption_cut [B] bool (whether its end is missing), paths and bad (lists of str)."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def batch(self, samples: list[dict]) -> dict:
        images = [key for key, value in samples[0].items() if isinstance(value, Tensor)]
        batch = {key: stack_pixels([sample[key] for sample in samples]) for key in images}
        captions = [sample["caption"] for sample in samples]
        pieces = self.tokenizer.word_pieces(captions)
        batch["input_ids"], batch["attention_mask"] = self.tokenizer.encode_pieces(pieces, self.max_tokens)
        room = self.tokenizer.room(self.max_tokens)
        cut = [sample["cut"] or len(ids) > room for sample, ids in zip(samples, pieces, strict=True)]
        batch["caption_cut"] = torch.tensor(cut)
        batch["padded"] = not batch["attention_mask"].all().item()  # asked here: a GPU would be waited for
        batch["image_id"] = torch.tensor([sample["image_id"] for sample in samples], dtype=torch.int64)
        batch["caption_id"] = torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64)
        return batch
