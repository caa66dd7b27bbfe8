"""COCO and Flickr30K from Karpathy's split files, and COCO's own captions_*.json for pre-training."""

import argparse
import re
from collections import Counter
from pathlib import Path

from dataset.official import (
    FLICKR30K_FOLDER,
    KARPATHY_TRAIN,
    coco_number,
    coco_pairs,
    coco_path,
    flickr_photo,
    karpathy_candidates,
    karpathy_captions,
    karpathy_folder,
    karpathy_pairs,
    karpathy_path,
)
from tools.prepare.files import find_official, stream_entries
from tools.prepare.held_out import HeldOut, write_held_out
from tools.prepare.job import Job
from utils import UserError

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_NAMES = ("captions_train2014.json", "captions_val2014.json", "captions_train2017.json", "captions_val2017.json")
COCO_SPLIT = re.compile(r"captions_(\w+)\.json$")

# (split: images) and captions of the training split, as Karpathy and Fei-Fei (2015) and ALBEF's Table 8 count them
PUBLISHED = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000, "captions": 566_747},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000, "captions": 145_000},
}
BROKEN, FEW = "entry that is not as Karpathy's, left out", "image with fewer than 5 captions, kept"
SPLIT_OF = {"restval": "train", "train": "train", "val": "val", "test": "test"}


def sources(options: argparse.Namespace) -> dict[str, Path]:
    """The official files to read: {name: path}."""
    name = f"dataset_{options.set}.json"
    if options.set == "flickr30k":
        return find_official(options.source, {name: KARPATHY_URL})
    own = {file: COCO_URL for file in COCO_NAMES}
    found = find_official(options.source, {}, {name: KARPATHY_URL, **own})
    if name not in found and not any(file.startswith("captions_train") for file in found):
        return find_official(options.source, {name: f"{KARPATHY_URL}; for pre-training alone COCO's own {COCO_URL} do"})
    return found


def prepare(job: Job, found: dict[str, Path]) -> None:
    """Retrieval, captioning and pre-training files from Karpathy's; from COCO's own ones pre-training alone."""
    karpathy = f"dataset_{job.name}.json"
    if karpathy not in found:
        from_coco_captions(job, found)
        return
    photos = flickr_photos(found) if job.name == "coco" else {}
    entries = SplitFile(job, found[karpathy]).read()
    held_out = [held_out_entry(job, entry, photos) for entry in entries if SPLIT_OF[entry["split"]] != "train"]
    path = job.output / "prepared" / f"held_out_{job.name}.json"
    write_held_out(job.written, path, job.name, job.images, held_out)
    write_retrieval(job, entries)
    if job.name == "coco":
        write_captioning(job, entries, found[karpathy])
        write_pretraining(job, entries, photos)


# ------------------------------------------------------------------------------------------------ reading


class SplitFile:
    """Karpathy's file: entries that can be used, with what is odd in them counted."""

    def __init__(self, job: Job, path: Path):
        self.job, self.path, self.report = job, path, job.report
        self.folder = karpathy_folder(job.name)
        self.numbers: set[int] = set()
        self.captions: Counter = Counter()

    def read(self) -> list[dict]:
        entries = [entry for i, entry in enumerate(stream_entries(self.path, "images")) if self.usable(entry, i)]
        images = Counter(SPLIT_OF[entry["split"]] for entry in entries)
        published = PUBLISHED[self.job.name]
        for split in ("train", "val", "test"):
            what = f"images, {split}{' (with restval)' if split == 'train' and self.job.name == 'coco' else ''}"
            self.report.count(what, images[split], published[split], first=self.first_missing())
        first = self.report.first_odd(FEW) or self.first_missing()
        self.report.count("captions, train", self.captions["train"], published["captions"], first=first)
        return [entry for entry in entries if self.job.has(karpathy_path(entry, self.folder))]

    def usable(self, entry, index: int) -> bool:
        where = f"{self.path.name} entry {index}"
        try:
            captions = karpathy_captions(entry)
            path = karpathy_path(entry, self.folder)
            if entry.get("split") not in SPLIT_OF:
                raise ValueError(f"has the split {entry.get('split')!r}")
            if self.job.name == "coco":
                entry.setdefault("cocoid", coco_number(path))
            self.numbers.add(entry.get("imgid", index))
        except ValueError as error:
            self.report.odd(BROKEN, f"{where} {error}")
            return False
        self.captions[SPLIT_OF[entry["split"]]] += len(captions)
        self.count_odd(entry, captions, f"{where} ({path})")
        entry["sentences"] = [  # without the tokens, which are most of the file
            {key: value for key, value in sentence.items() if key != "tokens"}
            for sentence, caption in zip(entry["sentences"], captions, strict=True)
            if caption
        ]
        if not entry["sentences"]:
            self.report.odd("image without a caption, left out", where)
        return bool(entry["sentences"])

    def count_odd(self, entry: dict, captions: list[str], where: str) -> None:
        for _ in range(captions.count("")):
            self.report.odd("blank caption, left out", where)
        for _ in range(len(captions) - len(set(captions)) - max(captions.count("") - 1, 0)):
            self.report.odd("caption repeated at the same image, kept as published", where)
        if len(captions) < 5:
            self.report.odd(FEW, where)
        if "sentids" in entry and len(entry["sentids"]) != len(captions):
            self.report.odd("image whose sentids are not as many as its sentences, kept", where)

    def first_missing(self) -> str:
        """The first number that is not among the images' (they count from 0), else the first odd entry."""
        total = max(self.numbers, default=-1) + 1
        missing = next((number for number in range(total) if number not in self.numbers), None)
        return self.report.first_odd(BROKEN) if missing is None else f"imgid {missing} is missing"


def flickr_photos(found: dict[str, Path]) -> dict[int, int]:
    """{COCO id: Flickr photo} from the addresses in COCO's own caption files, as far as they are there."""
    photos = {}
    for name in COCO_NAMES:
        for image in stream_entries(found[name], "images") if name in found else ():
            if photo := flickr_photo(image.get("flickr_url")):
                photos[image["id"]] = photo
    return photos


def held_out_entry(job: Job, entry: dict, photos: dict[int, int]) -> dict:
    if job.name == "coco":
        number = entry["cocoid"]
        ids = {"coco_id": number, "flickr_id": photos.get(number)}
        return {"image": karpathy_path(entry), "split": entry["split"], **ids}
    stem = Path(entry["filename"]).stem
    photo = int(stem) if stem.isdigit() else None  # Flickr30K's files are named by the photo
    return {"image": karpathy_path(entry, FLICKR30K_FOLDER), "split": entry["split"], "flickr_id": photo}


# ------------------------------------------------------------------------------------------------ writing


def write_retrieval(job: Job, entries: list[dict]) -> None:
    folder = karpathy_folder(job.name)
    parts = {split: [e for e in entries if SPLIT_OF[e["split"]] == split] for split in ("train", "val", "test")}
    for split, part in parts.items():
        if not part:
            job.report.warn(f"no image of the split {split}: {job.name}_{split}.json is not written")
            continue
        with job.writing(f"{job.name}/annotations/{job.name}_{split}.json") as write:
            for entry in part:
                pairs = karpathy_pairs(entry, job.name, folder)
                for pair in pairs if split == "train" else [karpathy_candidates(entry, job.name, folder)]:
                    write(pair)


def write_captioning(job: Job, entries: list[dict], official: Path) -> None:
    """Karpathy's layout under its own name, where configs/Caption_coco.yaml looks for it."""
    target = job.output / "coco" / "dataset_coco.json"
    if target.exists() and target.samefile(official):
        job.report.note(f"{target} is the official file: captioning reads it as it is")
        return
    with job.writing("coco/dataset_coco.json") as write:  # a list of the entries: readers take both
        for entry in entries:
            write({"dataset": job.name, **entry})


def write_pretraining(job: Job, entries: list[dict], photos: dict[int, int]) -> None:
    """One entry a caption of train and restval, without images that are also Flickr30K's or (by content) held out."""
    held_out = job.held_out("flickr30k")
    train = [entry for entry in entries if entry["split"] in KARPATHY_TRAIN]
    copies = job.leaks(held_out, [karpathy_path(entry) for entry in train])
    kept = LeakFilter(job, held_out, copies)
    with job.writing("pretrain/coco.json") as write:
        for entry in train:
            image = karpathy_path(entry)
            if kept(image, None, photos.get(entry["cocoid"])):
                for pair in karpathy_pairs(entry, "coco"):
                    write({"image": job.pretrain_path(image), "caption": pair["caption"]})
    kept.report()
    job.report.count("pairs written for pre-training", job.files[job.output / "pretrain/coco.json"])


class LeakFilter:
    """Says of an image whether pre-training may see it, and counts those that it may not."""

    def __init__(self, job: Job, held_out: HeldOut, copies: dict[str, str]):
        self.job, self.held_out, self.copies = job, held_out, copies
        self.by_id = self.by_content = 0

    def __call__(self, image: str, coco_id: int | None, flickr_id: int | None, sha256: str | None = None) -> bool:
        split = self.held_out.by_id(coco_id, flickr_id)
        if split:
            self.by_id += 1
            self.job.report.odd("image of a validation or test set (by id), left out", f"{image} = {split}")
            return False
        copy = self.copies.get(image) or self.held_out.known.find_bytes(sha256)
        if copy:
            self.by_content += 1
            self.job.report.odd("image of a validation or test set (by content), left out", f"{image}: {copy}")
            return False
        return True

    def report(self) -> None:
        self.job.report.count("validation and test images left out, by id", self.by_id)
        if self.job.options.check_leaks:
            self.job.report.count("validation and test images left out, by content", self.by_content)


# ------------------------------------------------------------------------------------------------ COCO's own files


def from_coco_captions(job: Job, found: dict[str, Path]) -> None:
    """Pre-training from captions_*.json alone. Karpathy's val and test are in val2014, so that it and the files of
    2017 need OUTPUT/prepared/held_out_coco.json; train2014 has none of them."""
    held_out = job.held_out("flickr30k")
    files = {COCO_SPLIT.search(name)[1]: path for name, path in found.items()}
    if not held_out.coco and any(split != "train2014" for split in files):
        job.report.warn("without Karpathy's dataset_coco.json its test images are not known: only train2014 is used")
        files = {split: path for split, path in files.items() if split == "train2014"}
    if not files:
        raise UserError(f"--source {job.source}: files of 2017 need dataset_coco.json ({KARPATHY_URL})")
    job.report.note("retrieval and captioning files need dataset_coco.json: only pre-training is written")
    with job.writing("pretrain/coco.json") as write:
        for split, path in files.items():
            _coco_captions(job, held_out, split, path, write)
    job.report.count("pairs written for pre-training", job.files[job.output / "pretrain/coco.json"])


def _coco_captions(job: Job, held_out: HeldOut, split: str, path: Path, write) -> None:
    images, photos = {}, {}
    for image in stream_entries(path, "images"):
        images[image["id"]] = coco_path(image["file_name"], split)
        photos[image["id"]] = flickr_photo(image.get("flickr_url"))
    copies = job.leaks(held_out, list(images.values()))
    kept = LeakFilter(job, held_out, copies)
    usable = {number: job.has(name) and kept(name, number, photos[number]) for number, name in images.items()}
    captions = 0
    for index, annotation in enumerate(stream_entries(path, "annotations")):
        captions += 1
        try:
            pair = coco_pairs(images, annotation)
        except ValueError as error:
            job.report.odd("annotation that is not as COCO's, left out", f"{path.name} annotation {index} {error}")
            continue
        if not pair["caption"]:
            job.report.odd("blank caption, left out", f"{path.name} annotation {index}")
        elif usable[annotation["image_id"]]:
            write({"image": job.pretrain_path(pair["image"]), "caption": pair["caption"]})
    published = {"train2014": (82_783, 414_113), "val2014": (40_504, 202_654)}.get(split, (None, None))
    job.report.count(f"images, {split}", len(images), published[0])
    job.report.count(f"captions, {split}", captions, published[1])
    kept.report()
