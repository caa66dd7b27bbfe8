"""Visual Genome's region descriptions for pre-training (its questions are prepared with VQA's).

ALBEF keeps about 769K of the 5.4M descriptions (821K are in the file that BLIP published). Its authors name four
filters (github.com/salesforce/ALBEF/issues/2): images of COCO's and RefCOCO+'s evaluation sets, sentences repeated at
an image, small regions, short sentences. The two thresholds are not published with the code; here the shortest sentence
is an option, and the smallest region is the one at which --captions sentences are left.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.files import json_list
from dataset.official import tidy
from dataset.text import clean_caption, clean_question
from models.weights import check_value
from tools.prepare.common import Job, find_official
from tools.prepare.held_out import HeldOut, read_refs
from utils import UserError

GENOME_URL = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
REFCOCO_URL = "https://github.com/lichengunc/refer: refcoco+.zip"
IMAGES, REGIONS, QUESTIONS = "image_data.json", "region_descriptions.json", "question_answers.json"
REFS = "refs(unc).p"
VG_QA = "vqa/vg_qa.json"  # below OUTPUT
ALBEF_CAPTIONS = 769_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--min_words", type=int, default=3, help="shortest sentence in words (default: %(default)s; ours)")
    add("--captions", type=int, default=ALBEF_CAPTIONS, help="of the largest regions (default: %(default)s, as ALBEF)")


def prepare(job: Job) -> None:
    check_value("--captions", job.options.captions, int)
    found = find_official(job.source, dict.fromkeys((IMAGES, REGIONS), GENOME_URL), {REFS: REFCOCO_URL})
    images = read_images(job, found[IMAGES])
    held_out = HeldOut(job)
    if not held_out.coco:  # about half of the images are COCO's
        raise UserError(f"COCO's test images are not known: run tools.prepare coco with --output {job.output} first")
    if REFS in found:
        evaluated = (number for number, split in read_refs(found[REFS]) if split != "train")
        held_out.coco = dict.fromkeys(evaluated, "RefCOCO+ evaluation") | held_out.coco
    else:
        job.warn(f"{REFS} of RefCOCO+ is not there ({REFCOCO_URL}): its evaluation images stay in")
    allowed = held_out.spare(image for image in images.values() if job.has(image["image"]))
    write_regions(job, {image["image_id"]: image for image in allowed}, held_out, found[REGIONS])


def read_images(job: Job, path: Path) -> dict[int, dict]:
    """{image_id: {image_id, image, coco_id, flickr_id, pixels}} of image_data.json; coco_id and flickr_id may be None.
    The image's path is the end of its address: .../VG_100K_2/1.jpg -> VG_100K_2/1.jpg."""
    images = {}
    for entry in json_list(path):
        number = image_number(entry)
        ids = {"image_id": number, "coco_id": entry["coco_id"], "flickr_id": entry["flickr_id"]}
        image = "/".join(entry["url"].split("/")[-2:])
        images[number] = {**ids, "image": image, "pixels": entry["width"] * entry["height"]}
    job.count("images", len(images), 108_077)
    return images


def image_number(entry: dict) -> int:
    """The image that an element of one of the files is about: their versions call it differently."""
    return entry["image_id"] if "image_id" in entry else entry["id"]


def write_regions(job: Job, images: dict[int, dict], held_out: HeldOut, path: Path) -> None:
    """pretrain/vg.json: the sentences of `images` that pass the filters."""
    options, counts = job.options, Counter()
    kept: list[tuple[int, str, float]] = []  # (image, sentence, share of the image that its region covers)
    for entry in json_list(path):
        number, regions = image_number(entry), entry["regions"]
        counts["listed"] += len(regions)
        if number not in images:
            counts["left out"] += len(regions)
            continue
        for phrase, area in sentences(job, regions, counts):
            kept.append((number, phrase, min(area / images[number]["pixels"], 1.0)))
    smallest, place = 0.0, len(kept) - options.captions
    if place >= 0:
        shares = np.array([share for *_, share in kept], dtype=np.float32)
        smallest = float(np.partition(shares, place)[place])
    large = ((images[number]["image"], phrase) for number, phrase, share in kept if share >= smallest)
    written = held_out.write_pairs(large)
    job.count("region descriptions", counts["listed"])
    job.count("  filter: of images left out", counts["left out"])
    job.count(f"  filter: fewer than {options.min_words} words", counts["short"])
    job.count("  filter: repeated at the same image", counts["repeated"])
    job.count(f"  filter: region below {smallest:.4f} of the image", len(kept) - written)


def sentences(job: Job, regions: list[dict], counts: Counter) -> list[tuple[str, float]]:
    """(phrase, pixels of its largest region) of an image's sentences that are neither short nor repeated, which are
    counted."""
    kept: dict[str, tuple[str, float]] = {}
    for region in regions:
        phrase, area = tidy(region["phrase"]), region["width"] * region["height"]
        words = clean_caption(phrase, 10_000)
        if not words:
            job.leave_out("region without a word", f"region {region['region_id']}")
        elif len(words.split()) < job.options.min_words:
            counts["short"] += 1
        elif words in kept:
            counts["repeated"] += 1
            kept[words] = kept[words][0], max(kept[words][1], area)
        else:
            kept[words] = phrase, area
    return list(kept.values())


def write_questions(job: Job, images: dict[int, dict], held_out: set[int], path: Path) -> None:
    """vqa/vg_qa.json: the questions of `images` that are not of COCO's images `held_out`; answers lose their final
    period."""
    counts = Counter()

    def entries() -> Iterator[dict]:
        for element in json_list(path):
            image, pairs = images[image_number(element)], element["qas"]
            counts["listed"] += len(pairs)
            if image["coco_id"] in held_out:
                counts["left out"] += len(pairs)
                continue
            for pair in pairs:
                question, answer = tidy(pair["question"]), tidy(pair["answer"]).lower().removesuffix(".").strip()
                entry = {"question_id": pair["qa_id"], "question": question, "dataset": "vg", "answer": answer}
                if answer and clean_question(question):
                    yield {**entry, "image": image["image"], "coco_id": image["coco_id"]}
                else:
                    job.leave_out("question or answer without a word", f"question {pair['qa_id']}")

    written = job.write(VG_QA, entries())
    job.count("Visual Genome's questions", counts["listed"])
    job.count("Visual Genome's questions of validation images, left out", counts["left out"])
    job.count("Visual Genome's questions written", written)
