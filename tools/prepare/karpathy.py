"""COCO and Flickr30K from Karpathy's split files, and COCO's own captions_*.json for pre-training."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset.files import json_list, read_json
from dataset.official import (
    KARPATHY_TRAIN,
    karpathy_image,
    karpathy_pairs,
    karpathy_path,
    tidy,
)
from tools.prepare.common import Job, find_official
from tools.prepare.held_out import HeldOut, flickr_photo, held_out_file
from utils import own_folder, write_json

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_SPLITS = ("train2014", "val2014", "train2017", "val2017")

# (split: images) and captions of the training split, as Karpathy and Fei-Fei (2015) and ALBEF's Table 8 count them
PUBLISHED = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000, "captions": 566_747},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000, "captions": 145_000},
}
SPLIT_OF = {"restval": "train", "train": "train", "val": "val", "test": "test"}


def prepare(job: Job) -> None:
    """Retrieval, captioning and pre-training files from Karpathy's; from COCO's own ones pre-training alone."""
    name, is_coco = f"dataset_{job.name}.json", job.name == "coco"
    optional = {f"captions_{split}.json": COCO_URL for split in COCO_SPLITS} if is_coco else {}
    found = find_official(job.source, {}, {name: KARPATHY_URL, **optional})
    files = {split: found[file] for split in COCO_SPLITS if (file := f"captions_{split}.json") in found}
    if files and name not in found:
        from_coco_captions(job, files)
        return
    entries = read_entries(job, find_official(job.source, {name: KARPATHY_URL})[name])
    photos = {}  # {COCO id: Flickr photo}, from the addresses in COCO's own files
    for path in files.values():
        photos |= {image["id"]: flickr_photo(image.get("flickr_url")) for image in json_list(path, "images")}
    held_out = [photo_of(job, entry, photos) for entry in entries if entry["split"] not in KARPATHY_TRAIN]
    content = {"name": job.name, "folder": str(job.images.resolve()), "images": held_out}
    own_folder(job.prepared, "tools.prepare")
    write_json(held_out_file(job, job.name), content)
    for split in ("train", "val", "test"):
        own = (entry for entry in entries if SPLIT_OF[entry["split"]] == split)
        if split == "train":
            listed = (pair for entry in own for pair in karpathy_pairs(entry, job.name))
        else:
            listed = (karpathy_image(entry, job.name) for entry in own)
        job.write(f"{job.name}/annotations/{job.name}_{split}.json", listed)
    if is_coco:  # Karpathy's layout under its own name, where configs/Caption_coco.yaml looks for it
        job.write("coco/dataset_coco.json", ({"dataset": "coco", **entry} for entry in entries))
        held_out = HeldOut(job)
        train = (entry for entry in entries if entry["split"] in KARPATHY_TRAIN)
        allowed = held_out.spare({**photo_of(job, entry, photos), "entry": entry} for entry in train)
        pairs = (pair for photo in allowed for pair in karpathy_pairs(photo["entry"], job.name))
        held_out.write_pairs((pair["image"], pair["caption"]) for pair in pairs)


def read_entries(job: Job, path: Path) -> list[dict]:
    """The entries of Karpathy's file that can be used, in its order, without tokens (most of it) and blank captions."""
    entries: list[dict] = []
    images, captions = Counter(), Counter()  # by split
    for entry in json_list(path, "images"):
        split, image = SPLIT_OF[entry["split"]], karpathy_path(entry, job.name)
        images[split] += 1
        captions[split] += len(entry["sentences"])
        sentences = []
        for sentence in entry["sentences"]:
            if tidy(sentence["raw"]):
                sentences.append({key: value for key, value in sentence.items() if key != "tokens"})
            else:
                job.leave_out("blank caption", image)
        if sentences and job.has(image):
            entries.append({**entry, "sentences": sentences})
    for split in ("train", "val", "test"):
        job.count(f"images, {split}", images[split], PUBLISHED[job.name][split])
    job.count("captions, train", captions["train"], PUBLISHED[job.name]["captions"])
    return entries


def photo_of(job: Job, entry: dict, photos: dict[int, int]) -> dict:
    """{"image", "split", "coco_id", "flickr_id"}; Flickr30K's files are named by the photo."""
    image = {"image": karpathy_path(entry, job.name), "split": entry["split"]}
    if job.name == "coco":
        return {**image, "coco_id": entry["cocoid"], "flickr_id": photos.get(entry["cocoid"])}
    return {**image, "flickr_id": int(Path(entry["filename"]).stem)}


def from_coco_captions(job: Job, files: dict[str, Path]) -> None:
    """Pre-training from captions_*.json alone. Karpathy's val and test are in val2014, so that it and the files of
    2017 need OUTPUT/prepared/held_out_coco.json; train2014 has none of them."""
    held_out = HeldOut(job)
    if not held_out.coco:
        job.warn("without Karpathy's dataset_coco.json its test images are not known: only train2014 is used")
        files = {split: path for split, path in files.items() if split == "train2014"}
    job.warn(f"retrieval and captioning files need dataset_coco.json ({KARPATHY_URL}): only pre-training is written")
    held_out.write_pairs(pair for split, path in files.items() for pair in coco_captions(job, held_out, split, path))


def coco_captions(job: Job, held_out: HeldOut, split: str, path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of one of COCO's files, with the captions in its order."""
    content = read_json(path)
    photos = []
    for image in content["images"]:
        ids = {"coco_id": image["id"], "flickr_id": flickr_photo(image.get("flickr_url"))}
        photos.append({"image": f"{split}/{image['file_name']}", **ids})
    allowed = held_out.spare(photo for photo in photos if job.has(photo["image"]))
    images = {photo["coco_id"]: photo["image"] for photo in allowed}
    for annotation in content["annotations"]:
        number, text = annotation["image_id"], tidy(annotation["caption"])
        if not text:
            job.leave_out("blank caption", f"{path.name} image {number}")
        elif number in images:
            yield images[number], text
