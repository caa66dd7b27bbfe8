"""Official annotation files, as downloaded, to this project's entries: pure functions, entries in, entries out.

Covered: Karpathy's dataset_coco.json and dataset_flickr30k.json, and VQA v2; `python -m tools.prepare` reads further
ones. Each function takes one object of such a file and returns entries in the layouts that dataset/annotations.py
reads.
"""

import html
import re
from collections.abc import Mapping

KARPATHY_TRAIN = ("train", "restval")  # restval: what val and test leave of COCO's validation set
KARPATHY_SPLITS = {"train": KARPATHY_TRAIN, "val": ("val",), "test": ("test",)}
FLICKR30K_FOLDER = "flickr30k-images"  # dataset_flickr30k.json names files only; the download unpacks to this folder
ANNOTATORS = 10  # of a VQA question

VQA_SPLIT = re.compile(r"(train2014|val2014|test2015|test-dev2015)")
COCO_NAME = re.compile(r"(?:COCO_\w+_|(?:^|/)(?=\d{12}\.))0*(\d{1,18})\.\w+$")  # of 2014, and of 2017: twelve digits


def tidy(text: str) -> str:
    """White space runs to one space, HTML entities resolved (SBU has `&amp;amp;`), halves of surrogate pairs to ?."""
    for _ in range(3):
        text = html.unescape(text)
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def coco_number(path: str) -> int | None:
    """COCO's image id from a file name of 2014 (COCO_val2014_000000391895.jpg) or 2017 (000000391895.jpg)."""
    found = COCO_NAME.search(path)
    return int(found[1]) if found else None


def is_karpathy(entry: Mapping) -> bool:
    """Whether an entry is of Karpathy's layout."""
    return "sentences" in entry and "filename" in entry


def karpathy_path(entry: Mapping, name: str) -> str:
    """Path of an image of the data set `name` below the images' root: in its `filepath` (COCO: train2014, val2014),
    else in the folder of that data set's download."""
    folder = entry.get("filepath") or FLICKR30K_FOLDER * (name == "flickr30k")
    return f"{folder}/{entry['filename']}" if folder else entry["filename"]


def karpathy_pairs(entry: Mapping, name: str) -> list[dict]:
    """Retrieval training entries, one a caption that is not blank; image_id as ALBEF's: coco_391895, flickr30k_17."""
    number = entry["imgid"] if entry.get("cocoid") is None else entry["cocoid"]
    pair = {"image": karpathy_path(entry, name), "image_id": f"{name}_{number}", "dataset": name}
    return [{**pair, "caption": text} for sentence in entry["sentences"] if (text := tidy(sentence["raw"]))]


def karpathy_image(entry: Mapping, name: str) -> dict:
    """The image with all captions that are not blank, as they stand but for white space at their ends."""
    captions = [text for sentence in entry["sentences"] if (text := sentence["raw"].strip())]
    return {"image": karpathy_path(entry, name), "caption": captions, "dataset": name}


def vqa_split(header: Mapping, file_name: str) -> str:
    """train2014, val2014, test2015 or test-dev2015 of a question file, by its `data_subtype`, else its name."""
    found = VQA_SPLIT.fullmatch(header.get("data_subtype", "")) or VQA_SPLIT.search(file_name)
    if not found:
        raise ValueError("has no 'image', and neither 'data_subtype' nor the file's name says which split is meant")
    return found[1]


def vqa_entry(question: Mapping, annotation: Mapping | None, split: str) -> dict:
    """A question with its annotation (None for the test sets): the ten answers, answer_type and question_type.

    Its image is train2014/COCO_train2014_000000458752.jpg; test-dev2015's images are test2015's.
    """
    folder = "test2015" if split.startswith("test") else split
    entry = {
        "question_id": question["question_id"],
        "question": tidy(question["question"]),
        "image": f"{folder}/COCO_{folder}_{question['image_id']:012d}.jpg",
        "dataset": "vqa",
    }
    if annotation is not None:
        entry["answer"] = [item["answer"] for item in annotation["answers"]]
        entry |= {key: annotation[key] for key in ("answer_type", "question_type") if annotation.get(key)}
    return entry
