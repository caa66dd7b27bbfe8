"""COCO and Flickr30K from Karpathy's split files, and COCO's own captions_*.json for pre-training."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dataset.official import (
    KARPATHY_TRAIN,
    coco_number,
    karpathy_captions,
    karpathy_image,
    karpathy_pairs,
    karpathy_path,
    needed,
    tidy,
)
from tools.prepare.common import Job, find_official
from tools.prepare.held_out import HeldOut, flickr_photo, held_out_file
from utils import UserError, write_json

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_SPLITS = ("train2014", "val2014", "train2017", "val2017")
COCO_FILE = re.compile(r"COCO_([a-z]+\d{4})_\d+\.\w+$")

# (split: images) and captions of the training split, as Karpathy and Fei-Fei (2015) and ALBEF's Table 8 count them
PUBLISHED = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000, "captions": 566_747},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000, "captions": 145_000},
}
COCO_PUBLISHED = {"train2014": (82_783, 414_113), "val2014": (40_504, 202_654)}  # images, captions
SPLIT_OF = {"restval": "train", "train": "train", "val": "val", "test": "test"}


def prepare(job: Job) -> None:
    """Retrieval, captioning and pre-training files from Karpathy's; from COCO's own ones pre-training alone."""
    name, is_coco = f"dataset_{job.name}.json", job.name == "coco"
    own = {f"captions_{split}.json": COCO_URL for split in COCO_SPLITS} if is_coco else {}
    found = find_official(job.source, {}, {name: KARPATHY_URL, **own})
    files = {split: found[own] for split in COCO_SPLITS if (own := f"captions_{split}.json") in found}
    if name not in found and any(split.startswith("train") for split in files):
        from_coco_captions(job, files)
        return
    path = find_official(job.source, {name: KARPATHY_URL})[name]
    photos = {}  # {COCO id: Flickr photo}, from the addresses in COCO's own files
    for file in files.values():
        addresses = job.read(file, "images", lambda image: (image["id"], flickr_photo(image.get("flickr_url"))))
        photos.update(pair for _, pair in addresses)
    entries = read_entries(job, path)
    held_out = [photo_of(job, entry, photos) for entry in entries if entry["split"] not in KARPATHY_TRAIN]
    content = {"name": job.name, "folder": str(job.images.resolve()), "images": held_out}
    write_json(held_out_file(job, job.name), content)
    if is_coco:  # Karpathy's layout under its own name, where configs/Caption_coco.yaml looks for it
        job.write("coco/dataset_coco.json", ({"dataset": "coco", **entry} for entry in entries))
    write_retrieval(job, entries)
    if is_coco:
        held_out = HeldOut(job)
        train = (entry for entry in entries if entry["split"] in KARPATHY_TRAIN)
        allowed = held_out.spare({**photo_of(job, entry, photos), "entry": entry} for entry in train)
        pairs = (pair for photo in allowed for pair in karpathy_pairs(photo["entry"], job.name))
        held_out.write_pairs((pair["image"], pair["caption"]) for pair in pairs)


# ------------------------------------------------------------------------------------------------ reading


def read_entries(job: Job, path: Path) -> list[dict]:
    """The entries of Karpathy's file that can be used, in its order, without tokens and blank captions."""
    entries: list[dict] = []
    images, captions = Counter(), Counter()  # by split
    for where, entry in job.read(path, "images", partial(karpathy_entry, job.name)):
        split, sentences = SPLIT_OF[entry["split"]], entry["sentences"]
        captions[split] += len(sentences)
        entry["sentences"] = [sentence for sentence in sentences if tidy(sentence["raw"])]
        for _ in range(len(sentences) - len(entry["sentences"])):
            job.leave_out("blank caption", where)
        if entry["sentences"]:
            images[split] += 1
            if job.has(karpathy_path(entry, job.name)):
                entries.append(entry)
        else:
            job.leave_out("image without a caption", where)
    for split in ("train", "val", "test"):
        job.count(f"images, {split}", images[split], PUBLISHED[job.name][split])
    job.count("captions, train", captions["train"], PUBLISHED[job.name]["captions"])
    return entries


def karpathy_entry(name: str, entry: dict) -> dict:
    """An entry without tokens, which are most of the file, and with COCO's id. Raises ValueError."""
    karpathy_captions(entry)
    path = karpathy_path(entry, name)
    if entry.get("split") not in SPLIT_OF:
        raise ValueError(f"has the split {entry.get('split')!r}")
    if name == "coco":
        entry.setdefault("cocoid", coco_number(path))
    sentences = [{key: value for key, value in one.items() if key != "tokens"} for one in entry["sentences"]]
    return {**entry, "sentences": sentences}


def photo_of(job: Job, entry: dict, photos: dict[int, int]) -> dict:
    """{"image", "split", "coco_id", "flickr_id"}; Flickr30K's files are named by the photo."""
    image = {"image": karpathy_path(entry, job.name), "split": entry["split"]}
    if job.name == "coco":
        return {**image, "coco_id": entry["cocoid"], "flickr_id": photos.get(entry["cocoid"])}
    stem = Path(entry["filename"]).stem
    return {**image, "flickr_id": int(stem) if stem.isdecimal() else None}


# ------------------------------------------------------------------------------------------------ writing


def write_retrieval(job: Job, entries: list[dict]) -> None:
    for split in ("train", "val", "test"):
        part = [entry for entry in entries if SPLIT_OF[entry["split"]] == split]
        if not part:
            job.warn(f"no image of the split {split}: {job.name}_{split}.json is not written")
            continue
        if split == "train":
            pairs = (pair for entry in part for pair in karpathy_pairs(entry, job.name))
        else:
            pairs = (karpathy_image(entry, job.name) for entry in part)
        job.write(f"{job.name}/annotations/{job.name}_{split}.json", pairs)


# ------------------------------------------------------------------------------------------------ COCO's own files


def from_coco_captions(job: Job, files: dict[str, Path]) -> None:
    """Pre-training from captions_*.json alone. Karpathy's val and test are in val2014, so that it and the files of
    2017 need OUTPUT/prepared/held_out_coco.json; train2014 has none of them."""
    held_out = HeldOut(job)
    if not held_out.coco and files.keys() != {"train2014"}:
        job.warn("without Karpathy's dataset_coco.json its test images are not known: only train2014 is used")
        files = {split: path for split, path in files.items() if split == "train2014"}
    if not files:
        raise UserError(f"--source {job.source}: files of 2017 need dataset_coco.json ({KARPATHY_URL})")
    job.lines.append("retrieval and captioning files need dataset_coco.json: only pre-training is written")
    pairs = (pair for item in files.items() for pair in coco_captions(job, held_out, *item))
    held_out.write_pairs(pairs)


def coco_captions(job: Job, held_out: HeldOut, split: str, path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of one of COCO's files, with the captions in its order."""

    def photo(image: dict) -> dict:
        name, number = needed(image, "file_name", str), needed(image, "id", int)
        found = COCO_FILE.search(name)  # names of 2017 do not say the split
        ids = {"coco_id": number, "flickr_id": flickr_photo(image.get("flickr_url"))}
        return {"image": f"{found[1] if found else split}/{name}", **ids}

    def caption(annotation: dict) -> tuple[int, str]:
        number, text = needed(annotation, "image_id", int), tidy(needed(annotation, "caption", str))
        if number not in images:
            raise ValueError(f"image_id {number} is not among the file's images")
        return number, text

    photos = [found for _, found in job.read(path, "images", photo)]
    images = {found["coco_id"]: found["image"] for found in photos}
    allowed = {found["coco_id"] for found in held_out.spare(found for found in photos if job.has(found["image"]))}
    captions = 0
    for where, (number, text) in job.read(path, "annotations", caption):
        captions += 1
        if not text:
            job.leave_out("blank caption", where)
        elif number in allowed:
            yield images[number], text
    published = COCO_PUBLISHED.get(split, (None, None))
    job.count(f"images, {split}", len(images), published[0])
    job.count(f"captions, {split}", captions, published[1])
