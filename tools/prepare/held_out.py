"""The images of COCO's and Flickr30K's validation and test sets, which no pre-training file may hold.

`tools.prepare coco` and `tools.prepare flickr30k` write OUTPUT/prepared/held_out_<set>.json. The other sets leave out
what is in there: by COCO's id (Visual Genome names it), by the number of the Flickr photo (in Flickr30K's file names,
and in SBU's and Visual Genome's addresses), and with --check-leaks by what the image files show.
"""

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dataset.official import coco_number
from dataset.tables import text_lines
from dataset.transforms import ImageError
from tools.prepare.files import Written, progress, read_json
from tools.prepare.image_hash import KnownImages, fingerprints
from tools.prepare.report import Report
from utils import UserError, write_json


class HeldOut:
    """Ids and, once `read_images` was called, contents of the images that are held out; values: "coco test" etc."""

    def __init__(self):
        self.coco: dict[int, str] = {}
        self.flickr: dict[int, str] = {}
        self.files: dict[str, str] = {}  # path -> split
        self.known = KnownImages()

    def by_id(self, coco_id: int | None = None, flickr_id: int | None = None) -> str | None:
        """The split that holds the image, or None."""
        return self.coco.get(coco_id) or self.flickr.get(flickr_id)

    def add_file(self, path: Path) -> None:
        """Take in a file that `write_held_out` wrote."""
        content = read_json(path)
        for image in content["images"]:
            split = f"{content['name']} {image['split']}"
            if image.get("coco_id") is not None:
                self.coco[image["coco_id"]] = split
            if image.get("flickr_id") is not None:
                self.flickr[image["flickr_id"]] = split
            self.files[str(Path(content["folder"]) / image["image"])] = split

    def read_images(self, workers: int, report: Report) -> None:
        """Fingerprints of those held-out images that are on disk."""
        line = progress("hashing the held-out images", "images", len(self.files))
        missing = 0
        for path, mark in fingerprints(list(self.files), workers):
            line.advance(1)
            if isinstance(mark, ImageError):
                missing += 1
            else:
                self.known.add(mark, f"{self.files[path]} {Path(path).name}")
        report.count("held-out images compared by content", len(self.known))
        if missing:
            report.warn(f"{missing:,} of {len(self.files):,} held-out images are not on disk or not readable")
        if not len(self.known):
            report.warn("--check-leaks compared nothing: prepare coco and flickr30k first, with their images")


def write_held_out(written: Written, path: Path, name: str, folder: Path, images: list[dict]) -> None:
    """images: {"image": path in `folder`, "split", "coco_id", "flickr_id"} each."""
    with written.replacing(path) as temporary:
        write_json(temporary, {"name": name, "folder": str(folder.resolve()), "images": images})


def held_out_files(output: Path) -> list[Path]:
    return sorted((output / "prepared").glob("held_out_*.json"))


def load_held_out(output: Path, report: Report, needed: Sequence[str] = ("coco", "flickr30k")) -> HeldOut:
    """What earlier preparations in the same OUTPUT left; a warning names each of `needed` that is not there."""
    held_out = HeldOut()
    found = held_out_files(output)
    for path in found:
        held_out.add_file(path)
    for name in needed:
        if not any(path.name == f"held_out_{name}.json" for path in found):
            report.warn(f"{name}'s test images are not known here: run tools.prepare {name} with this --output first")
    return held_out


def leaks_by_content(paths: Iterable[str], held_out: HeldOut, workers: int, report: Report) -> dict[str, str]:
    """{path: what it is a copy of} of the images that show a held-out one; unreadable images are counted."""
    paths = list(paths)
    line = progress("comparing images with the held-out ones", "images", len(paths))
    leaks: dict[str, str] = {}
    for path, mark in fingerprints(paths, workers):
        line.advance(1)
        if isinstance(mark, ImageError):
            report.odd("image that cannot be compared (missing or unreadable)", str(mark))
        elif found := held_out.known.find(mark):
            leaks[path] = f"{found[1]} of {found[0]}"
    return leaks


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
        for key in ("cocoid", "image_id", "img_id", "id", "image", "file_name", "filename"):
            if key in entry:
                return _coco_id(entry[key])
        return None
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
        with open(path, "rb") as file:
            refs = _PlainUnpickler(file, encoding="latin1").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not RefCOCO's references ({error})") from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and "image_id" in ref for ref in refs):
        raise UserError(f"{path}: not RefCOCO's references (a list of objects with image_id)")
    return refs


def evaluation_refs(path: Path) -> set[int]:
    """COCO ids of RefCOCO's (or RefCOCO+'s) validation and test images."""
    return read_coco_ids(path, lambda entry: entry.get("split", "val") != "train")
