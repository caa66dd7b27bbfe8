"""Images of one's own, outside any data set: finding the files in folders, and reading them in batches."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.transforms import ImageError, open_image, to_rgb
from utils import UserError, find_file

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
READERS = min(8, os.cpu_count() or 1)  # threads: decoding and resizing leave Python's lock

AnyImage = str | Path | Image.Image | np.ndarray | Tensor


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """The files named, and those in the folders named (with their sub-folders) in order of name, each once."""
    found: list[Path] = []
    for name in names:
        path = find_file(name, "image")
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise UserError(f"{path}: no image in this folder ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def read_image(image: AnyImage, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """One image as the model takes it, [3, S, S]: a file, a PIL image or an array [H, W, 3] of bytes goes through
    `transform`; a float tensor [3, S, S] has been through it already.

    Raises ImageError for a file that cannot be read, UserError for anything else that is no image.
    """
    if isinstance(image, str | Path):
        return transform(open_image(str(image)))
    if isinstance(image, Image.Image):
        return transform(to_rgb(image))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return transform(Image.fromarray(image))
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3:
        return image
    kind = type(image).__name__
    shape = f" of {image.dtype}, {tuple(image.shape)}" if isinstance(image, Tensor | np.ndarray) else ""
    raise UserError(
        f"a {kind}{shape} is no image: give a path, a PIL image, an array [H, W, 3] of bytes, or what "
        "model.preprocess(image) returns"
    )


def read_batches(
    images: Sequence[AnyImage],
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    left_out: Callable[[Any, ImageError], object] | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield (images [n, 3, S, S], their places [n] in `images`); the next batch is read while one is in use.

    left_out: called with each image that cannot be read, and why, which then has no place in any batch; None: a
    UserError instead. Raises UserError at the end where none can be read.
    """

    def read(image: AnyImage) -> Tensor | ImageError:
        try:
            return read_image(image, transform)
        except ImageError as error:
            return error

    usable = 0
    with ThreadPoolExecutor(READERS) as pool:
        starts = range(0, len(images), batch_size)
        reading = [pool.map(read, images[start : start + batch_size]) for start in starts[:1]]
        for start in starts:
            following = start + batch_size
            reading.append(pool.map(read, images[following : following + batch_size]))
            batch, places = [], []
            for place, result in enumerate(reading.pop(0), start):
                if not isinstance(result, ImageError):
                    batch.append(result)
                    places.append(place)
                elif left_out is None:
                    raise UserError(str(result))
                else:
                    left_out(images[place], result)
            if batch:
                usable += len(batch)
                yield torch.stack(batch), places
    if images and not usable:
        raise UserError(f"none of the {len(images)} images can be read")
