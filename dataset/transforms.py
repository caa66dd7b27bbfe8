"""Images: opening and conversion to RGB, the two pre-training views, fine-tuning and test transforms.

All randomness comes from the `random.Random` that the caller passes, so a view is a pure function of its
seed. PIL works on the image; training hands on its pixels as they are, a quarter of the memory of float32, and
normalizes them on the device.
"""

import io
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import default_collate

from dataset.shards import open_member
from utils import UserError, one_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_SCALE = np.float32(1 / 255) / np.array(CLIP_STD, dtype=np.float32)[:, None, None]  # [3,1,1]
_SHIFT = (-np.array(CLIP_MEAN) / np.array(CLIP_STD)).astype(np.float32)[:, None, None]  # [3,1,1]

CODEBOOK_IMAGE = "codebook_image"  # its key in samples and batches

BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR

# Raster formats that image data sets come in. PIL would open more, some of them by starting another program
# (PostScript), whatever a file is called. JPEG includes phones' multi-image files (MPO).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(Exception):
    """An image that cannot be used: `path` and the `reason` in one line."""

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = str(path), reason
        super().__init__(self.path, reason)  # both, so that it can be pickled between processes

    def __str__(self) -> str:
        return f"{one_line(self.path, 1000)}: {self.reason}"


# ------------------------------------------------------------------------------------------ reading


def open_image(path: str | Path) -> Image.Image:
    """Reads one image completely, as RGB, or raises ImageError.

    PIL's own limits stay on: truncated files are errors and so are decompression bombs.
    """
    with opened(path) as image:
        image.load()  # the image itself may be what is returned, when its file is closed
        return to_rgb(image)


@contextmanager
def opened(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """A regular file, or one in a shard (see dataset.shards), in one of FORMATS, opened by PIL; whatever is raised on
    it becomes an ImageError.

    content: the file's bytes, if they are read already.
    """
    try:
        file = open_member(os.fspath(path)) if content is None else io.BytesIO(content)
        with file, Image.open(file, formats=FORMATS) as image:
            yield image
    except ImageError:
        raise
    except UserError as error:  # FILE: cannot be read (why)
        raise ImageError(path, str(error).rpartition("cannot be read (")[2].removesuffix(")")) from None
    except UnidentifiedImageError:
        raise ImageError(path, f"not an image in {', '.join(FORMATS[:-1])} or {FORMATS[-1]} format") from None
    except Exception as error:  # decoders raise nearly anything on broken files (struct.error, KeyError, ...)
        reason = " ".join(str(error).split()) or "unreadable"
        raise ImageError(path, f"{type(error).__name__}: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB: transparency on white, 16-bit and float gray scaled, EXIF applied.

    `convert("RGB")` alone shows whatever colors lie under transparent pixels and clips 16-bit gray to white.
    """
    png = image.format == "PNG"  # exif_transpose returns a copy without the format
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _gray_to_8_bit(image, png).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _gray_to_8_bit(image: Image.Image, png: bool) -> Image.Image:
    """16-bit, 32-bit and float gray to L. Full scale is what the mode or, if that is open, the values say: 65535 for
    I;16 and PNG, else the smallest of 1 (floats), 255, 65535 and the maximum that holds all values."""
    values = np.asarray(image).astype(np.float64)  # [H,W]
    top = float(values.max(initial=0.0))
    if not math.isfinite(top):
        raise ValueError("the image has values that are not finite")
    steps = (1.0, 255.0, 65535.0, top) if image.mode == "F" else (255.0, 65535.0, top)
    full = next(step for step in steps if top <= step)
    if image.mode.startswith("I;16") or (png and top <= 65535):
        full = 65535.0
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------ RandAugment
# ALBEF's ten operations with its ranges at magnitude 10. Values: enhancement factor, shear, share of the side, degrees.
# Empty areas are filled with gray 128 as there.

GRAY = (128, 128, 128)
_GRAY = torch.tensor([*GRAY, 255], dtype=torch.uint8).view(torch.int32)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BILINEAR, fillcolor=GRAY)


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    """`_affine(image, 1, x, 0, y, 1, 0)`, x or y being 0, in 0.4 of its time."""
    origins = _shear_origins(image.size, x, y)
    return _between(image, *origins) if origins else _affine(image, 1, x, 0, y, 1, 0)


@lru_cache(maxsize=16)
def _shear_origins(size: tuple[int, int], x: float, y: float) -> tuple[Tensor, np.ndarray] | None:
    """`places` and `share` of `_between`; None if it then makes of noise something else than this machine's Pillow, as
    one compiled to fuse products and sums may do in the last bit."""
    width, height = size
    columns, rows = np.arange(width), np.arange(height)[:, None]
    along, across = (rows, columns) if y else (columns, rows)
    limit, step, start = (height, width, columns) if y else (width, 1, rows * width)
    origin = (along + 0.5) + (x or y) * (across + 0.5)
    first = np.floor(origin - 0.5)
    share = origin - 0.5 - first
    pair = [np.clip(first + i, 0, limit - 1) * step + start for i in (0, 1)]
    places = np.where((origin < 0) | (origin >= limit), width * height, pair)
    places = torch.from_numpy(places.astype(np.int32))
    noise = Image.frombytes("RGB", size, random.Random(0).randbytes(3 * width * height))
    equal = _between(noise, places, share).tobytes() == _affine(noise, 1, x, 0, y, 1, 0).tobytes()
    return (places, share) if equal else None


def _between(image: Image.Image, places: Tensor, share: np.ndarray) -> Image.Image:
    """Colors between two pixels each. places: their numbers [2,H,W] int32, H * W for gray; share: of the second, [H,W].

    Computed as by Pillow, in double precision and cut to integers.
    """
    pixels = torch.cat((_in_memory(image).view(torch.int32).flatten(), _GRAY))  # [H*W+1]
    pair = pixels.index_select(0, places.flatten()).numpy().reshape(places.shape)
    made = pair[0].view(np.uint8).reshape(*share.shape, 4)
    for channel in range(3):
        first, second = pair >> 8 * channel & 255
        values = (second - first) * share
        values += first
        made[..., channel] = values
    return _from_memory(torch.from_numpy(made))


def _sharpen(image: Image.Image, factor: float) -> Image.Image:
    """`ImageEnhance.Sharpness` in half of its time: its filter, a mean of 3 x 3 pixels that counts the middle five
    times and leaves the border, is exact in integers."""
    smooth = _in_memory(image).numpy().copy()  # [H,W,4]
    values = smooth.astype(np.uint16)
    rows = values[:-2] + values[1:-1] + values[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * values[1:-1, 1:-1]
    smooth[1:-1, 1:-1] = (sums + 6) // 13
    return Image.blend(_from_memory(torch.from_numpy(smooth)), image, factor)


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    """By x pixels to the left and y up. Whole pixels are pasted, a hundred times as fast and equal to `_affine`."""
    if x % 1 or y % 1:
        return _affine(image, 1, 0, x, 0, 1, y)
    moved = Image.new("RGB", image.size, GRAY)
    moved.paste(image, (-int(x), -int(y)))
    return moved


PHOTOMETRIC = {  # name: operation(image, value)
    "Identity": lambda image, value: image,
    "AutoContrast": lambda image, value: ImageOps.autocontrast(image),
    "Brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "Sharpness": _sharpen,
    "Equalize": lambda image, value: ImageOps.equalize(image),
}
GEOMETRIC = {
    "ShearX": lambda image, value: _shear(image, value, 0),
    "ShearY": lambda image, value: _shear(image, 0, value),
    "TranslateX": lambda image, value: _translate(image, value * image.width, 0),
    "TranslateY": lambda image, value: _translate(image, 0, value * image.height),
    "Rotate": lambda image, value: image.rotate(value, BILINEAR, fillcolor=GRAY),
}
OPERATIONS = PHOTOMETRIC | GEOMETRIC
LARGEST = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 10, "TranslateY": 10, "Rotate": 30}  # either way; 10 pixels
_NAMES = tuple(OPERATIONS)


def draw_operations(rng: random.Random, ops: int, magnitude: float, side: int) -> list[tuple[str, float]]:
    """`ops` operations drawn with replacement, each kept with probability one half: [(name, value), ...].

    side: of the view. ALBEF shifts views of 256 and of 384 pixels by equally many pixels, so do we from 224 on; smaller
    views, of which it has none, are shifted by the share of the side that its pixels are of 256.
    """
    drawn = []
    for _ in range(ops):
        name = rng.choice(_NAMES)
        if rng.random() < 0.5:
            value = magnitude / 10 * 1.8 + 0.1  # of brightness and sharpness; the others have no value
            if name in LARGEST:
                value = math.copysign(magnitude / 10 * LARGEST[name], rng.random() - 0.5)
                if name.startswith("Translate"):
                    value /= side if side >= 224 else 256
            drawn.append((name, value))
    return drawn


def apply_operations(image: Image.Image, drawn: list[tuple[str, float]]) -> Image.Image:
    """The image after the operations that `draw_operations` gave, in their order."""
    for name, value in drawn:
        image = OPERATIONS[name](image, value)
    return image


# ------------------------------------------------------------------------------------------ views


def random_crop(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (left, upper, right, lower): area share in `scale`, aspect ratio in [3/4, 4/3].

    As torchvision: ten tries, then the largest central box within the aspect limits.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image to uint8 [3,H,W] (pixel by pixel in memory, as the image is): what data workers hand on."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """[3,H,W] each to [B,3,H,W]; in a data worker straight into the memory that it shares with the trainer."""
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def normalize(pixels: Tensor) -> Tensor:
    """Pixels [...,3,H,W] uint8 to float32, normalized with CLIP's mean and standard deviation."""
    scale, shift = _constants(pixels.device)
    # two steps, each rounded: a fused one would differ in the last digit
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """What `normalize` multiplies by and adds, copied to a device once: a GPU would be waited for each time."""
    scale, shift = (torch.from_numpy(values).to(device) for values in (_SCALE, _SHIFT))
    return scale, shift


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels [...,3,H,W] uint8 to float32 in [0,1], not normalized: the dVAE codebook brings its own mapping."""
    divisor = torch.full((1,), 255.0, device=pixels.device)  # by a number, a GPU multiplies with its rounded inverse
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(divisor)


def normalized(batch: dict) -> dict:
    """The batch with its uint8 images as float32, on the device where they are: `codebook_image` in [0,1], the others
    normalized."""
    made = {}
    for key, images in batch.items():
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            made[key] = to_unit(images) if key == CODEBOOK_IMAGE else normalize(images)
    return {**batch, **made}


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 [3,H,W], normalized with CLIP's mean and standard deviation."""
    return normalize(to_pixels(image))


def _in_memory(image: Image.Image) -> Tensor:
    """RGB image to uint8 [H,W,4] (the fourth is padding) in the image's own memory or, if that has more than one block
    (of 16 MiB), a copy."""
    try:
        return torch.from_dlpack(pa.array(image).values).view(image.height, image.width, 4)
    except ValueError:
        return torch.from_numpy(np.array(image.convert("RGBX")))


def _from_memory(pixels: Tensor) -> Image.Image:
    """The reverse of `_in_memory`."""
    height, width, _ = pixels.shape
    values = pa.UInt8Array.from_buffers(pa.uint8(), pixels.numel(), [None, pa.py_buffer(pixels.numpy())])
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(values, 4), "RGB", (width, height))


class Augment:
    """One random view as uint8 pixels: crop and resize, flip, RandAugment. `normalize` follows on the device.

    image_size: side S in pixels; crop_scale: area share of the crop; ops and magnitude (of 10): RandAugment's
    N and M; codebook_size: side C of the extra image for the dVAE target, None for none; resize: what resizes, "torch"
    or "pillow", both bicubic and antialiased. torch takes a fifth of the time. Within a crop its values are Pillow's to
    one level of 255, and 1 in 10,000 to two; along the border they differ by more, since Pillow sees what lies beyond.
    """

    def __init__(
        self,
        image_size: int,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        ops: int = 2,
        magnitude: float = 7,
        codebook_size: int | None = None,
        resize: str = "pillow",
    ):
        self.image_size, self.resize = image_size, resize
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.flip = flip
        self.ops, self.magnitude = ops, magnitude
        self.codebook_size = codebook_size

    def __call__(self, image: Image.Image, rng: random.Random, allow_flip: bool = True) -> Tensor:
        """RGB image to uint8 [3,S,S]."""
        return self.with_codebook(image, rng, allow_flip)[0]

    def with_codebook(
        self, image: Image.Image, rng: random.Random, allow_flip: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The view [3,S,S] and, with a codebook_size, the same crop, flip and geometric operations without
        the photometric ones as [3,C,C], uint8 as well: its codes must belong to the places of the view's
        patches."""
        box = random_crop(*image.size, self.crop_scale, rng)
        flipped = rng.random() < 0.5 and self.flip and allow_flip  # draw always: later draws stay the same
        drawn = draw_operations(rng, self.ops, self.magnitude, self.image_size)
        view = to_pixels(apply_operations(self._crop(image, box, self.image_size, flipped), drawn))
        if self.codebook_size is None:
            return view, None
        geometric = [(name, value) for name, value in drawn if name in GEOMETRIC]
        plain = self._crop(image, box, self.codebook_size, flipped)
        return view, to_pixels(apply_operations(plain, geometric))

    def _crop(self, image: Image.Image, box: tuple[int, int, int, int], size: int, flipped: bool) -> Image.Image:
        if self.resize == "torch":
            # Of a batch with the channels last in memory, for which torch has a fast kernel.
            pixels = _in_memory(image.crop(box))[None].permute(0, 3, 1, 2)  # [1,4,h,w]
            crop = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
            view = _from_memory(crop[0].permute(1, 2, 0))
        else:
            view = image.resize((size, size), BICUBIC, box=box)
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else view


class PretrainViews:
    """Two independent random views of an image (the paper, Section 3.2), or one if no MIM target needs two."""

    def __init__(self, augment: Augment, two_views: bool = True):
        self.augment, self.two_views = augment, two_views

    def __call__(self, image: Image.Image, rng: random.Random, allow_flip: bool = True) -> dict[str, Tensor]:
        """RGB image to uint8 pixels: image1 [3,S,S], image2 [3,S,S] (with two views), codebook_image [3,C,C] (if
        asked)."""
        first = random.Random(rng.getrandbits(64))  # view 1 is the same whether or not view 2 is made
        views = {"image1": self.augment(image, first, allow_flip)}
        if self.two_views:
            views["image2"], codebook = self.augment.with_codebook(image, rng, allow_flip)
            if codebook is not None:
                views[CODEBOOK_IMAGE] = codebook
        return views


def test_transform(image_size: int) -> Callable[[Image.Image], Tensor]:
    """Square bicubic resize without cropping, as ALBEF: RGB image -> float32 [3,S,S]."""
    return partial(_resize_square, image_size=image_size)


def _resize_square(image: Image.Image, image_size: int) -> Tensor:
    return to_tensor(image.resize((image_size, image_size), BICUBIC))
