"""NoCaps' validation set, in COCO's layout with `open_images_id` and `domain`."""

from dataset.files import read_json
from tools.prepare.common import Job, find_official

NAME = "nocaps_val_4500_captions.json"
URL = "https://nocaps.org/download; https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"


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
    job.write("nocaps/nocaps_val.json", (entry for entry in entries if job.has(entry["image"])))
