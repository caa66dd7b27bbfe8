"""What people hand to `semmim.SemMIM`, in the one form in which it goes on: each kind is checked here, once."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import utils
from dataset.annotations import split_labels
from dataset.transforms import ImageError, open_image, test_transform, to_rgb
from models.generation import Generation
from utils import UserError, reason, shown

READERS = min(8, os.cpu_count() or 1)  # threads: decoding and resizing leave Python's lock

AnyImage = str | Path | Image.Image | np.ndarray | Tensor
Images = AnyImage | Iterable[AnyImage]
Texts = str | Iterable[str]


def several_images(images: Images) -> Iterable[AnyImage]:
    """One image alone as a list of one; an array [N, H, W, 3] or a tensor [N, 3, S, S] is N images."""
    is_one = isinstance(images, str | Path | Image.Image | io.IOBase) or not isinstance(images, Iterable)
    return [images] if is_one or getattr(images, "ndim", 1) not in (1, 4) else images


class Preprocessed(Tensor):
    """An image as the model takes it, float32 [3, S, S], or a stack of them: what `read_image` returns, and known by
    its type, so that no other tensor, whatever its scale, is taken for one. torch.stack and indexing keep the type."""


def read_image(image: AnyImage, size: int) -> Preprocessed:
    """One image as the model takes it, [3, size, size]: a file, a PIL image or an array [H, W, 3] of bytes is
    resized and normalized; what has been through this already stays as it is.

    Raises ImageError for an image that cannot be read, UserError for anything else that is no image.
    """
    if isinstance(image, Preprocessed) and image.shape == (3, size, size):
        if image.is_floating_point() and image.isfinite().all():
            return image
    transform = test_transform(size)
    if isinstance(image, str | Path):
        return transform(open_image(image)).as_subclass(Preprocessed)
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not is_array and not isinstance(image, Image.Image):
        shape = f" of {image.dtype}, {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise UserError(
            f"a {type(image).__name__}{shape} is no image: give a path, a PIL image, an array [H, W, 3] of bytes, or "
            f"what model.preprocess(image) returned, [3, {size}, {size}] of finite numbers"
        )
    try:  # an image that is opened and not yet read may turn out broken
        picture = to_rgb(Image.fromarray(image) if is_array else image)
        if not all(picture.size):  # a resize would invent pixels
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        return transform(picture).as_subclass(Preprocessed)
    except Exception as error:  # decoders raise nearly anything on broken files
        name = getattr(image, "filename", "") or f"a {type(image).__name__}"
        raise ImageError(name, f"cannot be used ({reason(error)})") from None


def read_batches(
    images: Iterable[AnyImage],
    size: int,
    batch_size: int,
    left_out: Callable[[object, ImageError], object] | None = None,
) -> Iterator[tuple[Preprocessed, list[int]]]:
    """Yield (images [n, 3, size, size], their places [n] in `images`); the next batch is read while one is in use.

    left_out: called with each image that cannot be read, and why, which then has no place in any batch; None: a
    UserError instead. Raises UserError at the end if there are images and none can be read.
    """

    def read(numbered: tuple[int, AnyImage]) -> tuple[int, AnyImage, Preprocessed | ImageError]:
        try:
            return *numbered, read_image(numbered[1], size)
        except ImageError as error:
            return *numbered, error

    source, count, usable = enumerate(images), 0, 0
    with ThreadPoolExecutor(READERS) as pool:
        following = pool.map(read, islice(source, batch_size))
        while results := list(following):
            following = pool.map(read, islice(source, batch_size))  # while this batch is used
            for _, image, result in results:
                if isinstance(result, ImageError):
                    if left_out is None:
                        raise UserError(str(result))
                    left_out(image, result)
            batch = {place: result for place, _, result in results if isinstance(result, Preprocessed)}
            count, usable = count + len(results), usable + len(batch)
            if batch:
                yield torch.stack(list(batch.values())), list(batch)
    if count and not usable:
        raise UserError(f"none of the {count} images can be read")


def several_texts(texts: Texts, what: str = "text") -> list[str]:
    """One text alone as a list of one; UserError if anything is no text. what: its name in the error."""
    texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
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


def generation_options(options: dict, own: dict) -> Generation:
    """`options` over a checkpoint's `own`."""
    if unknown := [name for name in options if name not in own]:
        raise UserError(f"{unknown[0]}: no such option; known are {', '.join(own)}")
    return Generation(**{**own, **options})


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name; "auto": a GPU if there is one. UserError if there is no such device here."""
    name = utils.choose_device(str(device))
    try:
        found = torch.zeros(1, device=name)
        found.cpu()  # meta has no numbers to give
        return found.device
    except Exception as error:  # of each backend's own, which may be no part of this torch
        raise UserError(f"device {name}: {utils.reason(error)}; give cpu, cuda, cuda:1 or auto") from None
