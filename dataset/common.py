"""What the data sets of all stages share: draws, replacement of unusable samples, images for evaluation."""

import hashlib
import random
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.cache import StringTable, decoded_images
from dataset.text import clean_caption, has_word
from dataset.transforms import ImageError, open_image
from utils import UserError, one_line, shown

REPLACEMENT_TRIES = 20
Transform = Callable[[Image.Image], Tensor]  # of an image to evaluate: [3,S,S] float32


class EmptyCaption(Exception):
    """A caption with no word left after cleaning."""


class TrainDataset(Dataset):
    """`dataset[(epoch, index)]` (or `dataset[index]` for epoch 0): a sample, a pure function of (seed, epoch, index):
    number of workers, ranks and resumes do not change it.

    A subclass has `__len__`, `caption_lengths(epoch, visits [N]) -> [N]` (to sort by) and `_sample(index, rng) -> dict`
    with the key `path`. If that raises ImageError or EmptyCaption, another index is drawn; `bad` has a line for each
    that was replaced. UserError if no replacement can be used either.

    paths: of the images, each once; cache_images: keep the decoded images in memory.
    """

    def __init__(self, paths: Iterable[str], seed: int = 0, cache_images: bool = False):
        self.paths = paths if isinstance(paths, StringTable) else StringTable(paths)
        self.seed = seed
        self.decoded = decoded_images(self.paths) if cache_images else None

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = sample_rng(self.seed, epoch, index)
        bad: list[str] = []
        for _ in range(1 + REPLACEMENT_TRIES):
            try:
                return {**self._sample(index, rng), "bad": bad}
            except (ImageError, EmptyCaption) as error:
                bad.append(str(error))
                index = rng.randrange(len(self))
        raise UserError(
            f"{len(bad)} samples drawn one after another are unusable; check data.image_root and files: "
            f"{'; '.join(bad[:3])}"
        )

    def fingerprint(self) -> str:
        """Of all texts and numbers in the order of the entries, which a resumed run must find as they were; not of the
        images' paths, which may have moved."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(vars(self).items()):
            if name in ("paths", "decoded"):
                continue
            for column in value if isinstance(value, list) else [value]:
                if isinstance(column, StringTable):
                    digest.update(column.ends), digest.update(column.bytes)
                elif isinstance(column, np.ndarray):
                    digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()

    def read_image(self, number: int) -> Image.Image:
        """The image with this number in `paths`, as RGB. Raises ImageError."""
        if self.decoded is None or self.decoded[number] is None:
            return open_image(self.paths[number])
        return Image.fromarray(self.decoded[number])


class CaptionedDataset(TrainDataset):
    """Images with captions, for pre-training, retrieval and captioning.

    captions, image_of_caption [captions]: the texts as they stand, and the number of each one's image in `paths`.
    groups [visits + 1]: a visit draws a caption from a group, which begins there among the captions; None: a visit is
    of one caption. options: of TrainDataset.
    """

    def __init__(
        self,
        paths: Iterable[str],
        captions: StringTable,
        image_of_caption: np.ndarray,
        groups: np.ndarray | None,
        **options,
    ):
        self.captions, self.image_of_caption, self.groups = captions, image_of_caption, groups
        super().__init__(paths, **options)

    def __len__(self) -> int:
        return len(self.captions) if self.groups is None else len(self.groups) - 1

    def caption_lengths(self, epoch: int, visits: np.ndarray) -> np.ndarray:
        """Characters of the captions of these visits [N], for sorting by length: [N]"""
        captions = visits
        if self.groups is not None:
            captions, ends = self.groups[visits], self.groups[visits + 1]
            for place in np.flatnonzero(ends - captions > 1):
                rng = sample_rng(self.seed, epoch, visits[place])
                captions[place] = self.draw_caption(visits[place], rng)
        return self.captions.lengths[captions]

    def draw_caption(self, index: int, rng: random.Random) -> int:
        """The caption of a visit, to be drawn before anything else: `caption_lengths` draws the same one."""
        if self.groups is None:
            return index
        return rng.randrange(self.groups[index], self.groups[index + 1])


class EvalDataset(Dataset):
    """The images of a split: `dataset[i]` is (image i as float32 [3,S,S], i); none is replaced, so that results stay
    comparable: one that cannot be read is a UserError."""

    def __init__(self, images: list[str], transform: Transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_for_evaluation(self.images[index], self.transform), index


class Collate:
    """List of samples -> batch dict, with `paths` and `bad` (lists of str). A subclass has `tokenizer` and
    `batch(samples) -> dict`."""

    def __call__(self, samples: list[dict]) -> dict:
        bad = [line for sample in samples for line in sample["bad"]]
        return {**self.batch(samples), "paths": [sample["path"] for sample in samples], "bad": bad}


def read_for_evaluation(path: str, transform: Transform) -> Tensor:
    """`transform` of an image, [3, S, S]; UserError if it cannot be read."""
    try:
        return transform(open_image(path))
    except ImageError as error:
        raise UserError(f"{error}; evaluation needs every image (check data.image_root)") from None


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random source of one visit; text seeds are hashed (SHA-512), so near seeds give unrelated draws."""
    return random.Random(f"{seed} {epoch} {index}")


def numbered(keys: Iterable[Hashable]) -> dict:
    """{key: its number in order of first appearance}"""
    return {key: number for number, key in enumerate(dict.fromkeys(keys))}


def starts(groups: Sequence[Sequence]) -> np.ndarray:
    """Where each group begins in their concatenation, and where the last one ends: [groups + 1] int64."""
    return np.cumsum([0, *map(len, groups)], dtype=np.int64)


def usable_caption(raw: str, max_words: int, path: str, lower: bool = True) -> str:
    """The cleaned caption; EmptyCaption naming the image's `path` if no word is left."""
    caption = clean_caption(raw, max_words, lower)
    if not has_word(caption):
        raise EmptyCaption(f"{one_line(path, 1000)}: nothing is left of the caption {shown(raw)} after cleaning")
    return caption


def caption_id(caption: str) -> int:
    """A stable 63-bit number that is equal for equal captions, in every process and run."""
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
