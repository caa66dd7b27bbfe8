"""The images of COCO's and Flickr30K's validation and test sets, which no pre-training file may hold.

`tools.prepare coco` and `tools.prepare flickr30k` write OUTPUT/prepared/held_out_<set>.json. The other sets leave out
what is in there: by COCO's id (Visual Genome names it), by the number of the Flickr photo (in Flickr30K's file names,
and in SBU's and Visual Genome's addresses), and with --check-leaks by what the image files show.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dataset.files import read_json, text_lines
from dataset.official import coco_number
from dataset.transforms import ImageError
from tools.prepare.common import Job, progress
from tools.prepare.image_hash import KnownImages, fingerprints
from utils import UserError, open_file

FLICKR_URL = re.compile(r"flickr\.com/\d+/(\d+)_")  # static.flickr.com/SERVER/PHOTO_SECRET.jpg, in all its hosts


def flickr_photo(url: str | None) -> int | None:
    """The number of a Flickr photo from the address of its file; None for other addresses."""
    found = FLICKR_URL.search(url or "")
    return int(found[1]) if found else None


def held_out_file(output: Path, name: str) -> Path:
    """Where the preparation of coco or flickr30k leaves its held-out images."""
    return output / "prepared" / f"held_out_{name}.json"


def write_held_out(job: Job, images: list[dict]) -> None:
    """images: {"image": path in the images' folder, "split", "coco_id", "flickr_id"} each."""
    content = {"name": job.name, "folder": str(job.images.resolve()), "images": images}
    job.write_json(f"prepared/held_out_{job.name}.json", content)


class HeldOut:
    """The held-out images that earlier preparations in the same OUTPUT left, and how many images they kept out.

    coco, flickr: {id: split}, splits such as "coco test". With --check-leaks the held-out images that are on disk are
    read, and `find_copies` finds their copies.
    """

    def __init__(self, job: Job, *wanted: str):
        """wanted: preparations whose absence is a warning."""
        self.job = job
        self.coco: dict[int, str] = {}
        self.flickr: dict[int, str] = {}
        self.known = KnownImages()
        self.copies: dict[str, str] = {}  # image -> what it is a copy of
        self.by_id = self.by_content = 0
        files = {}
        for name in ("coco", "flickr30k"):
            if held_out_file(job.output, name).is_file():
                files |= self._read(read_json(held_out_file(job.output, name)))
            elif name in wanted:
                job.warn(f"{name}'s test images are not known here: run tools.prepare {name} with this --output first")
        if job.options.check_leaks:
            self._read_images(files)

    def _read(self, content: Mapping) -> dict[str, str]:
        """Take in the ids of a held-out file; {path: split} of its images."""
        files = {}
        for image in content["images"]:
            split = f"{content['name']} {image['split']}"
            for ids, key in ((self.coco, "coco_id"), (self.flickr, "flickr_id")):
                if image.get(key) is not None:
                    ids[image[key]] = split
            files[str(Path(content["folder"]) / image["image"])] = split
        return files

    def _read_images(self, files: Mapping[str, str]) -> None:
        marks, missing = fingerprints(list(files), self.job.options.workers), 0
        for path, mark in progress(marks, "reading the held-out images", "images", len(files)):
            if isinstance(mark, ImageError):
                missing += 1
            else:
                self.known.add(mark, f"{files[path]} {Path(path).name}")
        self.job.count("held-out images compared by content", len(self.known))
        if missing:
            self.job.warn(f"{missing:,} of {len(files):,} held-out images are not on disk or not readable")
        if not len(self.known):
            self.job.warn("--check-leaks compared nothing: prepare coco and flickr30k first, with their images")

    def find_copies(self, images: Iterable[str]) -> None:
        """Compare images (paths in the images' folder) with the held-out ones, if --check-leaks asks for it."""
        if not len(self.known):
            return
        present = {str(self.job.images / image): image for image in images if self.job.exists(image)}
        marks = fingerprints(list(present), self.job.options.workers)
        for path, mark in progress(marks, "comparing images with the held-out ones", "images", len(present)):
            if isinstance(mark, ImageError):
                self.job.odd("image that cannot be compared (missing or unreadable)", str(mark))
            elif found := self.known.find(mark):
                name, how = next(iter(found.items()))
                self.copies[present[path]] = f"{how} of {name}"

    def allows(
        self, image: str, coco_id: int | None = None, flickr_id: int | None = None, sha256: str | None = None
    ) -> bool:
        """Whether pre-training may see an image; those that it may not are counted."""
        split = self.coco.get(coco_id) or self.flickr.get(flickr_id)
        copy = self.copies.get(image) or self.known.find_bytes(sha256)
        if split:
            self.by_id += 1
            self.job.odd("image of a validation or test set (by id), left out", f"{image} = {split}")
        elif copy:
            self.by_content += 1
            self.job.odd("image of a validation or test set (by content), left out", f"{image}: {copy}")
        return not split and not copy

    def report(self) -> None:
        self.job.count("validation and test images left out, by id", self.by_id)
        if self.job.options.check_leaks:
            self.job.count("validation and test images left out, by content", self.by_content)


# ------------------------------------------------------------------------------------------------ lists of ids


def read_coco_ids(path: Path, wanted: Callable[[dict], bool] = lambda entry: True) -> set[int]:
    """COCO's image ids from whatever names them: a text file (one a line), a JSON list of ids or file names, a list of
    objects (LXMERT's and ALBEF's files), COCO's and Karpathy's layout, or RefCOCO's refs(unc).p.

    wanted: which objects count.
    """
    if path.suffix == ".txt":
        entries = [word for _, line in text_lines(path) for word in line.split()]
    elif path.suffix == ".p":
        entries = read_refs(path)
    else:
        entries = read_json(path)
        if isinstance(entries, dict):
            entries = entries.get("images")
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds no list of images")
    found = {_coco_id(entry) for entry in entries if not isinstance(entry, dict) or wanted(entry)}
    if None in found or not found:
        raise UserError(f"{path}: names no COCO image ids (expected numbers, file names or objects that hold them)")
    return found


def _coco_id(entry) -> int | None:
    if isinstance(entry, dict):
        keys = ("cocoid", "image_id", "img_id", "id", "image", "file_name", "filename")
        return next((_coco_id(entry[key]) for key in keys if key in entry), None)
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry
    text = str(entry)
    return int(text) if text.isdigit() else coco_number(text if "." in text else f"{text}.jpg")


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists and dicts only: a pickle from the internet may otherwise run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not plain data")


def read_refs(path: Path) -> list[dict]:
    """RefCOCO's refs(unc).p: [{"image_id", "split": train | val | testA | testB, ...}]."""
    try:
        with open_file(path) as file:
            refs = _PlainUnpickler(file, encoding="latin1").load()
    except (EOFError, pickle.UnpicklingError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not RefCOCO's references ({error})") from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and "image_id" in ref for ref in refs):
        raise UserError(f"{path}: not RefCOCO's references (a list of objects with image_id)")
    return refs
