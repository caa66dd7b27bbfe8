"""The images of COCO's and Flickr30K's validation and test sets, which no pre-training file may hold.

`tools.prepare coco` and `tools.prepare flickr30k` write OUTPUT/prepared/held_out_<set>.json. The other sets leave out
what is in there: by COCO's id (Visual Genome names it), by the number of the Flickr photo (in Flickr30K's file names,
and in SBU's and Visual Genome's addresses), and with --check_leaks by what the image files show.
"""

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.files import read_json
from dataset.transforms import ImageError
from tools.prepare.common import Job
from tools.prepare.image_hash import KnownImages, fingerprints
from utils import open_file

FLICKR_URL = re.compile(r"flickr\.com/\d+/(\d+)_")  # static.flickr.com/SERVER/PHOTO_SECRET.jpg, in all its hosts


def flickr_photo(url: str | None) -> int | None:
    """The number of a Flickr photo from the address of its file; None for other addresses."""
    found = FLICKR_URL.search(url or "")
    return int(found[1]) if found else None


def held_out_file(job: Job, name: str) -> Path:
    """Where the preparation of coco or flickr30k leaves its held-out images."""
    return job.prepared / f"held_out_{name}.json"


class HeldOut:
    """The held-out images that earlier preparations in the same OUTPUT left.

    coco, flickr: {id: split}, splits such as "coco test". With --check_leaks the held-out images that are on disk are
    read, and `spare` finds their copies.
    """

    def __init__(self, job: Job):
        self.job = job
        self.coco: dict[int, str] = {}
        self.flickr: dict[int, str] = {}
        files: dict[str, str] = {}  # path: split
        for name in ("coco", "flickr30k"):
            if held_out_file(job, name).is_file():
                content = read_json(held_out_file(job, name))
                for image in content["images"]:
                    split = f"{content['name']} {image['split']}"
                    files[str(Path(content["folder"], image["image"]))] = split
                    self.coco[image.get("coco_id")] = self.flickr[image.get("flickr_id")] = split
            elif name != job.name:
                job.warn(f"{name}'s test images are not known here: run tools.prepare {name} with this --output first")
        self.coco.pop(None, None)
        self.flickr.pop(None, None)
        self.known = self._read_images(files) if job.options.check_leaks else KnownImages({})

    def _read_images(self, files: dict[str, str]) -> KnownImages:
        found = dict(fingerprints(list(files), self.job.options.workers, "reading the held-out images"))
        usable = {f"{files[p]} {Path(p).name}": m for p, m in found.items() if not isinstance(m, ImageError)}
        self.job.count("held-out images compared by content", len(usable))
        if missing := len(files) - len(usable):
            self.job.warn(f"{missing:,} of {len(files):,} held-out images are not on disk or not readable")
        return KnownImages(usable)

    def spare(self, photos: Iterable[dict]) -> Iterator[dict]:
        """The photos that pre-training may see; the others are counted.

        photos: {"image": path in the images' folder, and if known "coco_id", "flickr_id" and "sha256", that of the
        file at its address, which a download tool has resized}
        """
        photos = list(photos)
        copies = self._copies(photo["image"] for photo in photos) if self.known.by_bytes else {}
        for photo in photos:
            image, original = photo["image"], self.known.by_bytes.get(photo.get("sha256"))
            split = self.coco.get(photo.get("coco_id")) or self.flickr.get(photo.get("flickr_id"))
            if split:
                self.job.leave_out("image of a validation or test set (by id)", f"{image} = {split}")
            elif copy := copies.get(image) or original:
                self.job.leave_out("image of a validation or test set (by content)", f"{image} = {copy}")
            else:
                yield photo

    def write_pairs(self, pairs: Iterable[tuple[str, str]]) -> int:
        """Write OUTPUT/pretrain/SET.json of (image, caption), whose images `spare` gave; their number."""
        prefix = os.path.relpath(self.job.images, self.job.output / "pretrain")
        entries = ({"image": f"{prefix}/{image}", "caption": caption} for image, caption in pairs)
        written = self.job.write(f"pretrain/{self.job.name}.json", entries)
        self.job.count("pairs written for pre-training", written)
        return written

    def _copies(self, images: Iterable[str]) -> dict[str, str]:
        """{image: the held-out one that it shows}"""
        paths = {str(path): image for image in images if (path := self.job.images / image).is_file()}
        copies = {}
        for path, mark in fingerprints(list(paths), self.job.options.workers, "comparing with held-out images"):
            if isinstance(mark, ImageError):
                self.job.leave_out("comparison of an image that is unreadable", str(mark))
            elif found := self.known.find(mark):
                copies[paths[path]] = f"{found[1]} of {found[0]}"
        return copies


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists and dicts only: a pickle from the internet may otherwise run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not plain data")


def read_refs(path: Path) -> list[tuple[int, str]]:
    """(COCO id, split: train | val | testA | testB) of RefCOCO's refs(unc).p."""
    with open_file(path) as file:
        return [(ref["image_id"], ref["split"]) for ref in _PlainUnpickler(file, encoding="latin1").load()]
