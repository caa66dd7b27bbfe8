"""COCO and Flickr30K from Karpathy's split files, and COCO's own captions_*.json for pre-training."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from dataset.official import (
    KARPATHY_TRAIN,
    coco_number,
    karpathy_captions,
    karpathy_image,
    karpathy_pairs,
    karpathy_path,
    tidy,
)
from dataset.official import needed as needed
from tools.prepare.common import Job, find_official, read_list
from tools.prepare.held_out import HeldOut, flickr_photo, write_held_out
from utils import UserError

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_NAMES = ("captions_train2014.json", "captions_val2014.json", "captions_train2017.json", "captions_val2017.json")
COCO_SPLIT = re.compile(r"captions_(\w+)\.json$")
COCO_FILE = re.compile(r"COCO_([a-z]+\d{4})_\d+\.\w+$")

# (split: images) and captions of the training split, as Karpathy and Fei-Fei (2015) and ALBEF's Table 8 count them
PUBLISHED = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000, "captions": 566_747},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000, "captions": 145_000},
}
COCO_PUBLISHED = {"train2014": (82_783, 414_113), "val2014": (40_504, 202_654)}  # images, captions
BROKEN, FEW = "entry that is not as Karpathy's, left out", "image with fewer than 5 captions, kept"
SPLIT_OF = {"restval": "train", "train": "train", "val": "val", "test": "test"}


def prepare(job: Job) -> None:
    """Retrieval, captioning and pre-training files from Karpathy's; from COCO's own ones pre-training alone."""
    found = official_files(job)
    karpathy = found.pop(f"dataset_{job.name}.json", None)
    if karpathy is None:
        from_coco_captions(job, found)
        return
    photos = flickr_photos(found.values())
    entries = read_entries(job, karpathy)
    evaluated = [entry for entry in entries if SPLIT_OF[entry["split"]] != "train"]
    write_held_out(job, [held_out_entry(job, entry, photos) for entry in evaluated])
    write_retrieval(job, entries)
    if job.name == "coco":
        write_captioning(job, entries, karpathy)
        write_pretraining(job, entries, photos)


def official_files(job: Job) -> dict[str, Path]:
    """{name: path} of Karpathy's file and of COCO's own ones, one of which must be there."""
    name = f"dataset_{job.name}.json"
    if job.name == "flickr30k":
        return find_official(job.source, {name: KARPATHY_URL})
    found = find_official(job.source, {}, {name: KARPATHY_URL, **dict.fromkeys(COCO_NAMES, COCO_URL)})
    if name not in found and not any(file.startswith("captions_train") for file in found):
        return find_official(job.source, {name: f"{KARPATHY_URL}; for pre-training alone COCO's own {COCO_URL} do"})
    return found


# ------------------------------------------------------------------------------------------------ reading


def read_entries(job: Job, path: Path) -> list[dict]:
    """The entries of Karpathy's file that can be used, in its order, without tokens and blank captions."""
    entries: list[dict] = []
    numbers: set[int] = set()
    images, captions = Counter(), Counter()  # by split
    for index, entry in enumerate(read_list(path, "images")):
        try:
            texts = check_entry(job, entry)
        except ValueError as error:
            job.odd(BROKEN, f"{path.name} entry {index} {error}")
            continue
        numbers.add(entry.get("imgid", index))
        split, where = SPLIT_OF[entry["split"]], f"{path.name} entry {index}"
        captions[split] += len(texts)
        count_odd(job, entry, texts, f"{where} ({karpathy_path(entry, job.name)})")
        entry["sentences"] = [  # without the tokens, which are most of the file
            {key: value for key, value in sentence.items() if key != "tokens"}
            for sentence, text in zip(entry["sentences"], texts, strict=True)
            if text
        ]
        if entry["sentences"]:
            images[split] += 1
            entries.append(entry)
        else:
            job.odd("image without a caption, left out", where)
    total = max(numbers, default=-1) + 1  # images are numbered from 0
    missing = next((f"imgid {n} is missing" for n in range(total) if n not in numbers), job.first_odd(BROKEN))
    for split in ("train", "val", "test"):
        what = f"images, {split}{' (with restval)' if split == 'train' and job.name == 'coco' else ''}"
        job.count(what, images[split], PUBLISHED[job.name][split], first=missing)
    first = job.first_odd(FEW) or missing
    job.count("captions, train", captions["train"], PUBLISHED[job.name]["captions"], first=first)
    return [entry for entry in entries if job.has(karpathy_path(entry, job.name))]


def check_entry(job: Job, entry) -> list[str]:
    """The captions of an entry, which gets COCO's id if it has none. Raises ValueError for what is no such entry."""
    captions, path = karpathy_captions(entry), karpathy_path(entry, job.name)
    if entry.get("split") not in SPLIT_OF:
        raise ValueError(f"has the split {entry.get('split')!r}")
    if job.name == "coco":
        entry.setdefault("cocoid", coco_number(path))
    return captions


def count_odd(job: Job, entry: dict, captions: list[str], where: str) -> None:
    for _ in range(captions.count("")):
        job.odd("blank caption, left out", where)
    for _ in range(len(captions) - len(set(captions)) - max(captions.count("") - 1, 0)):
        job.odd("caption repeated at the same image, kept as published", where)
    if len(captions) < 5:
        job.odd(FEW, where)


def flickr_photos(paths: Iterable[Path]) -> dict[int, int]:
    """{COCO id: Flickr photo} from the addresses in COCO's own caption files."""
    return {
        image["id"]: photo
        for path in paths
        for image in read_list(path, "images")
        if (photo := flickr_photo(image.get("flickr_url")))
    }


def held_out_entry(job: Job, entry: dict, photos: dict[int, int]) -> dict:
    if job.name == "coco":
        number = entry["cocoid"]
        ids = {"coco_id": number, "flickr_id": photos.get(number)}
        return {"image": karpathy_path(entry, job.name), "split": entry["split"], **ids}
    stem = Path(entry["filename"]).stem
    photo = int(stem) if stem.isdigit() else None  # Flickr30K's files are named by the photo
    return {"image": karpathy_path(entry, job.name), "split": entry["split"], "flickr_id": photo}


# ------------------------------------------------------------------------------------------------ writing


def write_retrieval(job: Job, entries: list[dict]) -> None:
    for split in ("train", "val", "test"):
        part = [entry for entry in entries if SPLIT_OF[entry["split"]] == split]
        if not part:
            job.warn(f"no image of the split {split}: {job.name}_{split}.json is not written")
            continue
        with job.writing(f"{job.name}/annotations/{job.name}_{split}.json") as write:
            for entry in part:
                is_train = split == "train"
                for made in karpathy_pairs(entry, job.name) if is_train else [karpathy_image(entry, job.name)]:
                    write(made)


def write_captioning(job: Job, entries: list[dict], official: Path) -> None:
    """Karpathy's layout under its own name, where configs/Caption_coco.yaml looks for it."""
    target = job.output / "coco" / "dataset_coco.json"
    if target.exists() and target.samefile(official):
        job.note(f"{target} is the official file: captioning reads it as it is")
        return
    with job.writing("coco/dataset_coco.json") as write:  # a list of the entries: readers take both
        for entry in entries:
            write({"dataset": job.name, **entry})


def write_pretraining(job: Job, entries: list[dict], photos: dict[int, int]) -> None:
    """One entry a caption of train and restval, without images that are also Flickr30K's or (by content) held out."""
    held_out = HeldOut(job, "flickr30k")
    train = [entry for entry in entries if entry["split"] in KARPATHY_TRAIN]
    held_out.find_copies(karpathy_path(entry, job.name) for entry in train)
    with job.writing("pretrain/coco.json") as write:
        for entry in train:
            image = karpathy_path(entry, job.name)
            if held_out.allows(image, None, photos.get(entry["cocoid"])):
                for pair in karpathy_pairs(entry, "coco"):
                    write({"image": job.pretrain_path(image), "caption": pair["caption"]})
    held_out.report()
    job.count("pairs written for pre-training", job.files[job.output / "pretrain/coco.json"])


# ------------------------------------------------------------------------------------------------ COCO's own files


def from_coco_captions(job: Job, found: dict[str, Path]) -> None:
    """Pre-training from captions_*.json alone. Karpathy's val and test are in val2014, so that it and the files of
    2017 need OUTPUT/prepared/held_out_coco.json; train2014 has none of them."""
    held_out = HeldOut(job, "flickr30k")
    files = {COCO_SPLIT.search(name)[1]: path for name, path in found.items()}
    if not held_out.coco and any(split != "train2014" for split in files):
        job.warn("without Karpathy's dataset_coco.json its test images are not known: only train2014 is used")
        files = {split: path for split, path in files.items() if split == "train2014"}
    if not files:
        raise UserError(f"--source {job.source}: files of 2017 need dataset_coco.json ({KARPATHY_URL})")
    job.note("retrieval and captioning files need dataset_coco.json: only pre-training is written")
    with job.writing("pretrain/coco.json") as write:
        for split, path in files.items():
            coco_captions(job, held_out, split, path, write)
    held_out.report()
    job.count("pairs written for pre-training", job.files[job.output / "pretrain/coco.json"])


def coco_captions(job: Job, held_out: HeldOut, split: str, path: Path, write: Callable[[dict], None]) -> None:
    """Write the pairs of one of COCO's files, with the captions in its order."""
    images, photos = {}, flickr_photos([path])
    for image in read_list(path, "images"):
        found = COCO_FILE.search(image["file_name"])  # names of 2017 do not say the split
        images[image["id"]] = f"{found[1] if found else split}/{image['file_name']}"
    held_out.find_copies(images.values())
    usable = {n: job.has(name) and held_out.allows(name, n, photos.get(n)) for n, name in images.items()}
    captions = 0
    for captions, annotation in enumerate(read_list(path, "annotations"), 1):
        where = f"{path.name} annotation {captions - 1}"
        try:
            number, caption = needed(annotation, "image_id", int), tidy(needed(annotation, "caption", str))
            if number not in images:
                raise ValueError(f"image_id {number} is not among the file's images")
        except ValueError as error:
            job.odd("annotation that is not as COCO's, left out", f"{where} {error}")
            continue
        if not caption:
            job.odd("blank caption, left out", where)
        elif usable[number]:
            write({"image": job.pretrain_path(images[number]), "caption": caption})
    published = COCO_PUBLISHED.get(split, (None, None))
    job.count(f"images, {split}", len(images), published[0])
    job.count(f"captions, {split}", captions, published[1])
