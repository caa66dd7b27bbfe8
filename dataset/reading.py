"""Images of one's own, outside any data set: finding the files in folders, and reading them in batches."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.files import IMAGE_ENDINGS
from dataset.transforms import ImageError, open_image, to_rgb
from utils import UserError, find_file, reason

READERS = min(8, os.cpu_count() or 1)  # threads: decoding and resizing leave Python's lock

AnyImage = str | Path | Image.Image | np.ndarray | Tensor


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """The files named, and those in the folders named in order of name, each once."""
    found: list[Path] = []
    for name in names:
        path = find_file(name, "image")
        inside = images_in(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: no image in this folder ({', '.join(IMAGE_ENDINGS)})")
        found += inside
    return list(dict.fromkeys(found))


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, in order of name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())


class Preprocessed(Tensor):
    """An image as the model takes it, float32 [3, S, S], or a stack of them: what `read_image` returns, and known by
    its type, so that no other tensor, whatever its scale, is taken for one. torch.stack and indexing keep the type."""


def read_image(image: AnyImage, transform: Callable[[Image.Image], Tensor]) -> Preprocessed:
    """One image as the model takes it, [3, S, S]: a file, a PIL image or an array [H, W, 3] of bytes goes through
    `transform`; what has been through it already stays as it is.

    Raises ImageError for an image that cannot be read, UserError for anything else that is no image.
    """
    if isinstance(image, Preprocessed) and image.ndim == 3:
        return image
    if isinstance(image, str | Path):
        return transform(open_image(str(image))).as_subclass(Preprocessed)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return _transformed(lambda: Image.fromarray(image), "an array", transform)
    if isinstance(image, Image.Image):  # opened and not yet read, it may turn out broken here
        return _transformed(lambda: to_rgb(image), getattr(image, "filename", "") or "a PIL image", transform)
    kind = type(image).__name__
    shape = f" of {image.dtype}, {tuple(image.shape)}" if isinstance(image, Tensor | np.ndarray) else ""
    raise UserError(
        f"a {kind}{shape} is no image: give a path, a PIL image, an array [H, W, 3] of bytes, or what "
        "model.preprocess(image) returned"
    )


def _transformed(
    read: Callable[[], Image.Image], name: str, transform: Callable[[Image.Image], Tensor]
) -> Preprocessed:
    try:
        image = read()
        if not all(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels")
        return transform(image).as_subclass(Preprocessed)
    except Exception as error:  # decoders raise nearly anything on broken files
        raise ImageError(name, f"cannot be used ({reason(error)})") from None


def read_batches(
    images: Iterable[AnyImage],
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    left_out: Callable[[Any, ImageError], object] | None = None,
) -> Iterator[tuple[Preprocessed, list[int]]]:
    """Yield (images [n, 3, S, S], their places [n] in `images`); the next batch is read while one is in use.

    left_out: called with each image that cannot be read, and why, which then has no place in any batch; None: a
    UserError instead. Raises UserError at the end if there are images and none can be read.
    """

    def read(image: AnyImage) -> Preprocessed | ImageError:
        try:
            return read_image(image, transform)
        except ImageError as error:
            return error

    source, start, usable = iter(images), 0, 0
    with ThreadPoolExecutor(READERS) as pool:

        def submit() -> tuple[list[AnyImage], Iterator[Preprocessed | ImageError]]:
            some = list(islice(source, batch_size))
            return some, pool.map(read, some)

        following = submit()
        while following[0]:
            (some, results), following = following, submit()
            batch, places = [], []
            for place, (image, result) in enumerate(zip(some, results, strict=True), start):
                if not isinstance(result, ImageError):
                    batch.append(result)
                    places.append(place)
                elif left_out is None:
                    raise UserError(str(result))
                else:
                    left_out(image, result)
            if len({image.shape for image in batch}) > 1:
                raise UserError("preprocessed images are of different sizes; give those of one model")
            start += len(some)
            usable += len(batch)
            if batch:
                yield torch.stack(batch), places
    if start and not usable:
        raise UserError(f"none of the {start} images can be read")
