"""NoCaps' validation set, in COCO's layout with `open_images_id` and `domain`."""

from collections import Counter
from pathlib import Path

from dataset.files import read_json
from dataset.official import needed as needed
from tools.prepare.common import Job, find_official
from utils import UserError

NAME = "nocaps_val_4500_captions.json"
URL = "https://nocaps.org/download; https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
IMAGES, CAPTIONS = 4_500, 10  # captions of an image
BLANK, UNEVEN = "blank caption, left out", f"image with another number of captions than {CAPTIONS}, kept"
DOMAINS = {"in": 648, "near": 2_938, "out": 914}  # images of each, as published


def prepare(job: Job) -> None:
    path = find_official(job.source, {NAME: URL})[NAME]
    entries = read_entries(job, path)
    numbers = {entry["img_id"] for entry in entries}
    first = next((f"image {number} is missing" for number in range(IMAGES) if number not in numbers), "")
    job.count("images", len(entries), IMAGES, first=first)
    captions = sum(len(entry["caption"]) for entry in entries)
    job.count("captions", captions, IMAGES * CAPTIONS, first=first or job.first_odd(BLANK, UNEVEN))
    domains = Counter(domain_of(entry) for entry in entries)
    for domain, published in DOMAINS.items():
        job.count(f"images, {domain}-domain", domains[domain], published)
    if set(domains) == {""}:
        job.warn("the file names no domains: in, near and out are not distinguished")
    with job.writing("nocaps/nocaps_val.json") as write:
        for entry in entries:
            if job.has(entry["image"]):
                write(entry)


def domain_of(entry: dict) -> str:
    """in, near, out, or "" without one."""
    return str(entry.get("domain", "")).removesuffix("-domain")


def read_entries(job: Job, path: Path) -> list[dict]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: holds no 'images'; is it the official file?")
    if not isinstance(content.get("annotations"), list):
        raise UserError(f"{path}: holds no 'annotations' (the test set has none; evaluation needs the validation set)")
    captions: dict[int, list[str]] = {}
    for index, annotation in enumerate(content["annotations"]):
        try:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        except (KeyError, TypeError, AttributeError):
            job.odd("annotation that is not as COCO's, left out", f"{path.name} annotation {index}")
    entries = []
    for index, image in enumerate(content["images"]):
        where = f"{path.name} image {index}"
        try:
            own = captions.pop(image["id"], [])
            entry = nocaps_entry(image, own)
        except (ValueError, KeyError, TypeError) as error:
            job.odd("image that is not as NoCaps', left out", f"{where} {error}")
            continue
        if domain_of(entry) not in ("", *DOMAINS):
            job.odd("unknown domain, removed", f"{where}: {entry.pop('domain')!r}")
        for _ in range(len(own) - len(entry["caption"])):
            job.odd(BLANK, where)
        if len(entry["caption"]) != CAPTIONS:
            job.odd(UNEVEN, where)
        if entry["caption"]:
            entries.append(entry)
        else:
            job.odd("image without a caption, left out", where)
    for number in captions:
        job.odd("captions of an image that the file lacks, left out", f"image {number}")
    return entries


def nocaps_entry(image: dict, captions: list[str]) -> dict:
    """A captioning entry of one element of `images`; `domain` only if the file has it. Raises ValueError."""
    entry = {"image": needed(image, "file_name", str), "img_id": needed(image, "id", int), "dataset": "nocaps"}
    if image.get("open_images_id"):
        entry["open_images_id"] = image["open_images_id"]
    entry["caption"] = [caption for caption in captions if caption]
    if image.get("domain"):
        entry["domain"] = image["domain"]
    return entry
