"""NoCaps' validation set, in COCO's layout with `open_images_id` and `domain`."""

from collections import Counter

from dataset.files import read_json
from tools.prepare.common import Job, find_official

NAME = "nocaps_val_4500_captions.json"
URL = "https://nocaps.org/download; https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
DOMAINS = {"in-domain": 648, "near-domain": 2_938, "out-domain": 914}  # images of each, as published


def prepare(job: Job) -> None:
    content = read_json(find_official(job.source, {NAME: URL})[NAME])
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        if caption := annotation["caption"].strip():
            captions.setdefault(annotation["image_id"], []).append(caption)
        else:
            job.leave_out("blank caption", f"image {annotation['image_id']}")
    entries = []
    for image in content["images"]:
        entry = {"image": image["file_name"], "img_id": image["id"], "dataset": "nocaps"}
        entry |= {key: image[key] for key in ("open_images_id", "domain") if key in image}
        entries.append({**entry, "caption": captions[image["id"]]})
    job.count("images", len(entries), 4_500)
    job.count("captions", sum(len(entry["caption"]) for entry in entries), 45_000)
    domains = Counter(entry.get("domain") for entry in entries)
    for domain, published in DOMAINS.items():
        job.count(f"images, {domain}", domains[domain], published)
    job.write("nocaps/nocaps_val.json", (entry for entry in entries if job.has(entry["image"])))
