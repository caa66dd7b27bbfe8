"""What people hand to `semmim.SemMIM`, in the one form in which it goes on: each kind is checked here, once."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import utils
from dataset.annotations import split_labels
from dataset.reading import AnyImage
from models.generation import Generation
from utils import UserError, shown

Images = AnyImage | Iterable[AnyImage]
Texts = str | Iterable[str]


def several_images(images: Images) -> Iterable[AnyImage]:
    """One image alone as a list of one; an array [N, H, W, 3] or a tensor [N, 3, S, S] is N images."""
    if isinstance(images, Tensor | np.ndarray) and images.ndim not in (1, 4):
        return [images]
    if isinstance(images, str | bytes | Path | Image.Image | io.IOBase) or not isinstance(images, Iterable):
        return [images]
    return images


def several_texts(texts: Texts, what: str = "text") -> list[str]:
    """One text alone as a list of one; UserError if anything is no text, or no UTF-8. what: its name in the error."""
    if isinstance(texts, np.ndarray):
        texts = texts.tolist()
    texts = [texts] if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{what}: a {type(text).__name__} ({shown(text)}) is no text; give a string or several")
        if utils.HALF_SURROGATE.search(text):
            raise UserError(f"{what} {ascii(text)[:80]}: is not UTF-8")
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
        found = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name}: {utils.reason(error)}; give cpu, cuda, cuda:1 or auto") from None
    if found.type == "meta":
        raise UserError("device meta: holds no numbers; give cpu, cuda, cuda:1 or auto")
    return found
