"""NoCaps' validation set, in COCO's layout with `open_images_id` and `domain`."""

from collections import Counter

from dataset.official import needed
from tools.prepare.common import Job, find_official

NAME = "nocaps_val_4500_captions.json"
URL = "https://nocaps.org/download; https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
IMAGES, CAPTIONS = 4_500, 45_000
DOMAINS = {"in-domain": 648, "near-domain": 2_938, "out-domain": 914}  # images of each, as published


def prepare(job: Job) -> None:
    path = find_official(job.source, {NAME: URL})[NAME]
    captions: dict[int, list[str]] = {}
    annotated = job.read(path, "annotations", lambda found: (found["image_id"], found["caption"].strip()))
    for where, (number, caption) in annotated:
        if caption:
            captions.setdefault(number, []).append(caption)
        else:
            job.leave_out("blank caption", where)
    entries = []
    for where, entry in job.read(path, "images", read_image):
        if own := captions.pop(entry["img_id"], None):
            entries.append({**entry, "caption": own})
        else:
            job.leave_out("image without a caption", where)
    job.count("images", len(entries), IMAGES)
    job.count("captions", sum(len(entry["caption"]) for entry in entries), CAPTIONS)
    domains = Counter(entry.get("domain") for entry in entries)
    for domain, published in DOMAINS.items():
        job.count(f"images, {domain}", domains[domain], published)
    job.write("nocaps/nocaps_val.json", (entry for entry in entries if job.has(entry["image"])))


def read_image(image: dict) -> dict:
    """A captioning entry without its captions; `domain` only if the file has it. Raises ValueError."""
    entry = {"image": needed(image, "file_name", str), "img_id": needed(image, "id", int), "dataset": "nocaps"}
    return entry | {key: image[key] for key in ("open_images_id", "domain") if image.get(key)}
