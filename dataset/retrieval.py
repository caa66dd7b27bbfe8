"""Image-text retrieval: pairs for fine-tuning, and the whole candidate set of a split for evaluation."""

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import StringTable, load_annotations
from dataset.cache import ImageCache
from dataset.common import TrainDataset, may_flip, read_for_evaluation, sample_rng, usable_caption
from dataset.text import clean_caption
from dataset.transforms import open_image, test_transform, train_transform
from utils import UserError

log = logging.getLogger("semmim")


class RetrievalTrainDataset(TrainDataset):
    """(picture, caption) pairs; those with the same `image_id` are positives of each other.

    per: "caption", an epoch visits every pair; "image", every `image_id` with one of its pairs drawn. cache_images:
    keep the decoded pictures in memory.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image [3,S,S], caption (cleaned),
    image_id (number of the entry's `image_id` in order of first appearance), path, bad (as PretrainDataset;
    PretrainCollate makes batches of both).
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
        per: str = "caption",
        cache_images: bool = False,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        ops: int = 2,
        magnitude: float = 7,
    ):
        entries = load_annotations(files, "retrieval_train", image_root, image_prefix_map)
        captions = [[e["caption"]] if isinstance(e["caption"], str) else e["caption"] for e in entries]
        each = [len(group) for group in captions]
        ids, paths = (
            {key: i for i, key in enumerate(dict.fromkeys(entry[name] for entry in entries))}
            for name in ("image_id", "image")
        )
        if len(ids) < 2:
            raise UserError(f"data.train: all entries have the image_id {next(iter(ids))!r}: matching has no negative")
        self.image_id = np.repeat([ids[entry["image_id"]] for entry in entries], each)  # [pairs]
        self.path_id = np.repeat([paths[entry["image"]] for entry in entries], each)  # [pairs], in `paths`
        self.paths = StringTable(paths)
        self.captions = StringTable(text for group in captions for text in group)
        order = np.argsort(self.image_id, kind="stable")  # the pairs of an image_id stand together in it
        self.pairs_of_image = order, np.searchsorted(self.image_id[order], np.arange(len(ids) + 1))
        self.per, self.seed = per, seed
        self.max_words = max_words
        self.transform = train_transform(image_size, crop_scale, flip, ops, magnitude)
        self.cache = ImageCache(self.paths) if cache_images else None

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
        index = self._draw(index, rng)  # first, so that `caption_length` draws the same one
        path_id = int(self.path_id[index])
        path = self.paths[path_id]
        caption = usable_caption(self.captions[index], self.max_words, path)
        picture = open_image(path) if self.cache is None else self.cache[path_id]
        image = self.transform(picture, rng, may_flip(caption))
        return {"image": image, "caption": caption, "image_id": int(self.image_id[index]), "path": path}


class RetrievalEvalDataset(Dataset):
    """All pictures and captions of a split: `dataset[i]` is (picture i as float32 [3,S,S], i).

    images: paths, each once (entries that repeat a picture are merged); captions: cleaned texts;
    image_of_caption: index of each caption's picture; captions_of_image: indices of each picture's captions.
    Nothing is replaced here: an unreadable picture is a UserError, and a caption that cleaning leaves empty
    stays a query, so that results stay comparable.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        max_words: int = 30,
    ):
        index_of: dict[str, int] = {}
        self.captions: list[str] = []
        self.image_of_caption: list[int] = []
        self.captions_of_image: list[list[int]] = []
        for entry in load_annotations(files, "retrieval_eval", image_root, image_prefix_map):
            image = index_of.setdefault(entry["image"], len(index_of))
            if image == len(self.captions_of_image):
                self.captions_of_image.append([])
            texts = [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"]
            for text in texts:
                self.captions_of_image[image].append(len(self.captions))
                self.image_of_caption.append(image)
                self.captions.append(clean_caption(text, max_words))
        self.images = list(index_of)
        self.transform = test_transform(image_size)
        if empty := self.captions.count(""):
            log.warning("%s: %d captions have no word left after cleaning", files, empty)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_for_evaluation(self.images[index], self.transform), index
