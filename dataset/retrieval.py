"""Image-text retrieval: pairs for fine-tuning, and the whole candidate set of a split for evaluation."""

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import StringTable, load_annotations
from dataset.pretrain import first_usable, may_flip, sample_rng, usable_caption
from dataset.text import clean_caption
from dataset.transforms import ImageError, open_image, test_transform, train_transform
from utils import UserError

log = logging.getLogger("semmim")


class RetrievalTrainDataset(Dataset):
    """One (picture, caption) pair per entry; pairs with the same `image_id` are positives of each other.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image [3,S,S], caption (cleaned),
    image_id (number of the entry's `image_id` in order of first appearance), path, bad (as PretrainDataset;
    PretrainCollate makes batches of both).
    """

    takes_epoch = True

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        seed: int = 0,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        max_words: int = 30,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        ops: int = 2,
        magnitude: float = 7,
    ):
        entries = load_annotations(files, "retrieval_train", image_root, image_prefix_map)
        numbers = {key: i for i, key in enumerate(dict.fromkeys(entry["image_id"] for entry in entries))}
        self.image_id = np.array([numbers[entry["image_id"]] for entry in entries], dtype=np.int64)  # [entries]
        self.paths = StringTable(entry["image"] for entry in entries)
        self.captions = StringTable(entry["caption"] for entry in entries)
        self.seed = seed
        self.max_words = max_words
        self.transform = train_transform(image_size, crop_scale, flip, ops, magnitude)

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        return first_usable(self._sample, index, len(self), sample_rng(self.seed, epoch, index))

    def _sample(self, index: int, rng: random.Random) -> dict:
        path = self.paths[index]
        caption = usable_caption(self.captions[index], self.max_words, path)
        image = self.transform(open_image(path), rng, may_flip(caption))
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
        try:
            return self.transform(open_image(self.images[index])), index
        except ImageError as error:
            raise UserError(f"{error}; evaluation needs every picture (check data.image_root)") from None
