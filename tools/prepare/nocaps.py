"""NoCaps' validation set, in COCO's layout with `open_images_id` and `domain`."""

import argparse
from collections import Counter
from pathlib import Path

from dataset.official import nocaps_entry
from tools.prepare.files import find_official, read_json
from tools.prepare.job import Job
from utils import UserError

NAME = "nocaps_val_4500_captions.json"
URL = "https://nocaps.org/download; https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
IMAGES, CAPTIONS = 4_500, 10  # captions of an image
BLANK, UNEVEN = "blank caption, left out", f"image with another number of captions than {CAPTIONS}, kept"
DOMAINS = {"in": 648, "near": 2_938, "out": 914}  # images of each, as published


def sources(options: argparse.Namespace) -> dict[str, Path]:
    return find_official(options.source, {NAME: URL})


def prepare(job: Job, found: dict[str, Path]) -> None:
    path, report = found[NAME], job.report
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: holds no 'images'; is it the official file?")
    if not isinstance(content.get("annotations"), list):
        raise UserError(f"{path}: holds no 'annotations' (the test set has none; evaluation needs the validation set)")
    entries = read_entries(job, path, content)
    numbers = {entry["img_id"] for entry in entries}
    first = next((f"image {number} is missing" for number in range(IMAGES) if number not in numbers), "")
    report.count("images", len(entries), IMAGES, first=first)
    captions = sum(len(entry["caption"]) for entry in entries)
    report.count("captions", captions, IMAGES * CAPTIONS, first=first or report.first_odd(BLANK, UNEVEN))
    domains = Counter(str(entry.get("domain", "")).removesuffix("-domain") for entry in entries)
    for domain in DOMAINS:
        report.count(f"images, {domain}-domain", domains[domain], DOMAINS[domain])
    if len(domains) == 1 and "" in domains:
        report.warn("the file names no domains: in, near and out are not told apart")
    with job.writing("nocaps/nocaps_val.json") as write:
        for entry in entries:
            if job.has(entry["image"]):
                write(entry)


def read_entries(job: Job, path: Path, content: dict) -> list[dict]:
    captions: dict[int, list[str]] = {}
    for index, annotation in enumerate(content["annotations"]):
        try:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        except (KeyError, TypeError, AttributeError):
            job.report.odd("annotation that is not as COCO's, left out", f"{path.name} annotation {index}")
    entries = []
    for index, image in enumerate(content["images"]):
        where = f"{path.name} image {index}"
        try:
            own = captions.pop(image["id"], [])
            entry = nocaps_entry(image, own)
        except (ValueError, KeyError, TypeError) as error:
            job.report.odd("image that is not as NoCaps', left out", f"{where} {error}")
            continue
        domain = str(entry.get("domain", "")).removesuffix("-domain")
        if domain and domain not in DOMAINS:
            job.report.odd("unknown domain, removed", f"{where}: {entry.pop('domain')!r}")
        for _ in range(len(own) - len(entry["caption"])):
            job.report.odd(BLANK, where)
        if len(entry["caption"]) != CAPTIONS:
            job.report.odd(UNEVEN, where)
        if not entry["caption"]:
            job.report.odd("image without a caption, left out", where)
        else:
            entries.append(entry)
    for number in captions:
        job.report.odd("captions of an image that the file lacks, left out", f"image {number}")
    return entries
