"""What people hand to `semmim.SemMIM`, in the one form in which it goes on: each kind is checked here, once."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.annotations import split_labels
from dataset.transforms import ImageError, open_image, test_transform, to_rgb
from utils import UserError, reason, shown

READERS = min(8, os.cpu_count() or 1)  # threads: decoding and resizing leave Python's lock

AnyImage = str | Path | Image.Image | Tensor
Images = AnyImage | Iterable[AnyImage]
Texts = str | Iterable[str]
LeftOut = Callable[[ImageError], object]  # called with each image that cannot be read, by its name, and why


def several_images(images: Images) -> Iterable[AnyImage]:
    """One image alone as a list of one; a tensor [N, 3, S, S] is N images."""
    is_many = isinstance(images, Iterable) and not isinstance(images, str | Path) and getattr(images, "ndim", 4) == 4
    return images if is_many else [images]


class Preprocessed(Tensor):
    """An image as the model takes it, float32 [3, S, S], or a stack of them: what `read_image` returns, and known by
    its type, so that no other tensor, whatever its scale, is taken for one. torch.stack and indexing keep the type."""


def read_image(image: AnyImage, size: int) -> Preprocessed:
    """A file or a PIL image, resized and normalized, [3, size, size]; what has been through this stays as it is.

    Raises ImageError for an image that cannot be read, UserError for anything else that is no image.
    """
    if isinstance(image, Preprocessed) and image.shape == (3, size, size):
        return image
    if isinstance(image, str | Path):
        return test_transform(size)(open_image(image)).as_subclass(Preprocessed)
    if not isinstance(image, Image.Image):
        kind = f"{type(image).__name__} {tuple(image.shape)}" if hasattr(image, "shape") else shown(image)
        what = f"a path, a PIL image, or what model.preprocess(image) returned, [3, {size}, {size}]"
        raise UserError(f"{kind} is no image: give {what}")
    try:
        if not all(image.size):  # a resize would invent pixels
            raise ValueError(f"{image.width} x {image.height} pixels")
        return test_transform(size)(to_rgb(image)).as_subclass(Preprocessed)
    except Exception as error:  # decoders raise nearly anything on broken files, which may have been opened only
        raise ImageError(getattr(image, "filename", "an image"), f"cannot be used ({reason(error)})") from None


def read_batches(
    images: Iterable[AnyImage], size: int, batch_size: int, left_out: LeftOut | None = None
) -> Iterator[tuple[Preprocessed, list[int]]]:
    """Yield (images [n, 3, size, size], their places [n] in `images`); the next batch is read while one is in use.

    left_out: an image that cannot be read has no place in any batch; None: it is a UserError instead. Raises UserError
    at the end if none can be read.
    """

    def read(image: AnyImage) -> Preprocessed | ImageError:
        try:
            return read_image(image, size)
        except ImageError as error:
            if left_out is None:
                raise UserError(str(error)) from None
            return error

    source, count, usable = iter(images), 0, 0
    with ThreadPoolExecutor(READERS) as pool:
        following = pool.map(read, islice(source, batch_size))
        while results := list(following):
            following = pool.map(read, islice(source, batch_size))  # while this batch is used
            batch = {}
            for place, result in enumerate(results, count):
                if isinstance(result, ImageError):
                    left_out(result)
                else:
                    batch[place] = result
            count, usable = count + len(results), usable + len(batch)
            if batch:
                yield torch.stack(list(batch.values())), list(batch)
    if not usable:
        raise UserError(f"none of the {count} images can be read")


def several_texts(texts: Texts, what: str = "text") -> list[str]:
    """One text alone as a list of one; UserError if anything is no text. what: its name in the error."""
    texts = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{what}: {shown(wrong[0])} is no text; give a string or several")
    return texts


def choices(texts: Texts, what: str) -> list[str]:
    """Two texts or more to choose from, each once."""
    texts = several_texts(texts, what)
    if len(set(texts)) < max(2, len(texts)) or not all(text.strip() for text in texts):
        raise UserError(f"{what}: {shown(texts)} are no choice; give a list of two or more, each once and none blank")
    return texts


def object_labels(labels: Texts) -> list[str]:
    """Names of objects: a list, or mPLUG's "dog&&frisbee"."""
    return [label for text in several_texts(labels, "labels") for label in split_labels(text)]
