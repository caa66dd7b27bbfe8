"""Which images are the same: by the bytes of their files, and by what they show, whatever their size and compression.

Web images are resized and compressed anew by every download tool, so that equal bytes find few of the copies. What an
image shows is the low frequencies (DCT) of a small gray one, without its mean and of length 1. These are the numbers of
which imagehash.phash keeps only whether each is above their median; that many smooth images, such as X-rays, have in
common. Copies (resized, JPEG at quality 40 to 80, brighter by 5%) are at most 0.03 apart, different X-rays and
overlapping parts of a photo at least 0.13.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from dataset.shards import open_member
from dataset.transforms import ImageError, opened, to_rgb
from tools.prepare.common import progress
from utils import in_processes

SIDE, LOW = 32, 8  # pixels of the small image, frequencies that are kept of each axis
RADIUS = 0.05  # how far copies may be apart
MIN_CONTRAST = 4  # gray levels (standard deviation): a nearly even image looks like every other
NEIGHBORS = 8  # look-alikes of an image that are looked at
SAMPLE = 100  # images whose look-alikes are counted among all


class Fingerprint(NamedTuple):
    """sha256 of the file; what the image shows, [63] of length 1, or None if it is nearly even."""

    sha256: str
    look: np.ndarray | None


def fingerprint(path: str | Path) -> Fingerprint | ImageError:
    """Of an image file or an image in a shard; why there is none if it is missing or no image."""
    try:
        with opened(path) as image:
            image.draft("RGB", (128, 128))  # a JPEG decoder then skips most of its work
            gray = to_rgb(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except ImageError as error:
        return error
    waves = dctn(np.asarray(gray, dtype=np.float32), norm="ortho")[:LOW, :LOW].ravel()[1:]
    length = np.linalg.norm(waves)
    look = waves / length if length >= MIN_CONTRAST * SIDE else None
    with open_member(os.fspath(path)) as file:
        return Fingerprint(hashlib.sha256(file.read()).hexdigest(), look)


def fingerprints(paths: Sequence[str], workers: int, label: str) -> Iterator[tuple[str, Fingerprint | ImageError]]:
    """(path, its fingerprint or why it has none) in the paths' order, computed by `workers` processes."""
    return zip(paths, progress(in_processes(fingerprint, paths, workers), label, "images", len(paths)), strict=True)


class KnownImages:
    """Images to be found again; marks: {name: fingerprint}. `by_bytes`: {sha256: name}, of equal ones the first."""

    def __init__(self, marks: Mapping[str, Fingerprint]):
        self.by_bytes = {mark.sha256: name for name, mark in reversed(marks.items())}
        self._names = [name for name, mark in marks.items() if mark.look is not None]
        self._looks = KDTree([marks[name].look for name in self._names]) if self._names else None

    def find(self, mark: Fingerprint) -> tuple[str, str] | None:
        """(name, "a copy" or, in other bytes, "a look-alike") of the known image that shows the same."""
        if mark.sha256 in self.by_bytes:
            return self.by_bytes[mark.sha256], "a copy"
        if mark.look is None or self._looks is None:
            return None
        _, nearest = self._looks.query(mark.look, distance_upper_bound=RADIUS)
        return (self._names[nearest], "a look-alike") if nearest < self._looks.n else None


def group_images(marks: Sequence[Fingerprint], most: int) -> tuple[np.ndarray, int]:
    """([n]: the number of each image's group of the same images, how many images are in groups that are too large).

    Groups of look-alikes with more than `most` images are not believed: in them only equal bytes count.
    """
    _, first, same = np.unique([mark.sha256 for mark in marks], return_index=True, return_inverse=True)
    links = [np.stack([np.arange(len(marks)), first[same]])]  # every image to the first of its bytes
    places = np.array([place for place, mark in enumerate(marks) if mark.look is not None], dtype=int)
    is_crowd = np.zeros(len(marks), dtype=bool)
    if len(places):
        looks = np.stack([marks[place].look for place in places])  # [n, 63]
        near = looks @ looks[:: max(1, len(looks) // SAMPLE)].T > 1 - RADIUS**2 / 2  # cosines: [n, about SAMPLE]
        is_crowd[places] = near[:, near.sum(axis=0) > most].any(axis=1)  # to search these would be quadratic
        looks, places = looks[~is_crowd[places]], places[~is_crowd[places]]
    if len(places):
        _, near = KDTree(looks).query(looks, NEIGHBORS + 1, distance_upper_bound=RADIUS, workers=-1)
        row, column = np.nonzero(near < len(looks))
        links.append(np.stack([places[row], places[near[row, column]]]))
    start, end = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(len(start), dtype=bool), (start, end)), shape=(len(marks), len(marks)))
    _, group = connected_components(graph, directed=False)
    sizes = np.bincount(group)
    is_crowd |= sizes[group] > most
    return np.where(is_crowd, len(sizes) + same, group), int(is_crowd.sum())
