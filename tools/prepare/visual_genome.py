"""Visual Genome: region descriptions for pre-training, questions for VQA.

ALBEF keeps about 769K of the 5.4M descriptions (821K are in the file that BLIP published). Its authors name four
filters (github.com/salesforce/ALBEF/issues/2): images of COCO's and RefCOCO+'s evaluation sets, sentences repeated at
an image, small regions, short sentences. The two thresholds are not published with the code; here the shortest sentence
is an option, and the smallest region is the one at which --captions sentences are left.
"""

import argparse
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dataset.official import needed as needed
from dataset.official import tidy
from dataset.text import clean_caption, clean_question
from tools.prepare.common import Job, find_official, read_list
from tools.prepare.held_out import HeldOut, read_coco_ids
from utils import UserError

GENOME_URL = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
REFCOCO_URL = "https://github.com/lichengunc/refer: refcoco+.zip"
IMAGES, REGIONS, QUESTIONS = "image_data.json", "region_descriptions.json", "question_answers.json"
REFS = "refs(unc).p"
VG_QA = "vqa/vg_qa.json"  # below OUTPUT
ALBEF_CAPTIONS = 769_000
BROKEN_IMAGE = "image that is not as Visual Genome's, left out"
BROKEN_ENTRY = "entry that is not as Visual Genome's, left out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--all-regions", action="store_true", help="keep all 5.4M descriptions but those of held-out images")
    add("--min-words", type=int, default=3, help="shortest sentence in words (default: %(default)s; ours)")
    add("--min-area", type=float, help="smallest region, a share of the image (default: so that --captions are left)")
    add("--captions", type=int, default=ALBEF_CAPTIONS, help="sentences to keep (default: %(default)s, ALBEF's number)")
    add("--refcoco", type=Path, help=f"RefCOCO+'s {REFS}, or a list of its evaluation images (default: in SOURCE)")


def prepare(job: Job) -> None:
    options = job.options
    if options.min_area is not None and not 0 <= options.min_area <= 1:
        raise UserError(f"--min-area {options.min_area}: is a share of the image, from 0 to 1")
    if options.captions < 1 or options.min_words < 0:
        raise UserError("--captions must be at least 1 and --min-words at least 0")
    if options.refcoco and not options.refcoco.is_file():
        raise UserError(f"--refcoco {options.refcoco}: no such file")
    needed_files = dict.fromkeys((IMAGES, REGIONS), GENOME_URL)
    found = find_official(job.source, needed_files, {QUESTIONS: GENOME_URL, REFS: REFCOCO_URL})
    images = read_images(job, found[IMAGES])
    present = {number: image for number, image in images.items() if job.has(image["image"])}
    held_out = held_out_images(job, options.refcoco or found.get(REFS))
    held_out.find_copies(image["image"] for image in present.values())
    keys = ("image", "coco_id", "flickr_id")
    usable = {n: image for n, image in present.items() if held_out.allows(*(image[key] for key in keys))}
    held_out.report()
    write_regions(job, usable, images, found[REGIONS])
    if QUESTIONS in found:  # VQA validates on Karpathy's val, if its own preparation was given no other list
        asked = {n: image for n, image in present.items() if held_out.coco.get(image["coco_id"]) != "coco val"}
        write_questions(job, asked, images, found[QUESTIONS])
    else:
        job.warn(f"{QUESTIONS} is not in SOURCE: {VG_QA} is not written")


def held_out_images(job: Job, refs: Path | None) -> HeldOut:
    """COCO's, Flickr30K's and RefCOCO+'s evaluation images: the first of ALBEF's filters."""
    held_out = HeldOut(job, "coco", "flickr30k")
    if not held_out.coco:
        raise UserError(
            f"COCO's test images are not known: run tools.prepare coco with --output {job.output} first "
            "(about half of Visual Genome's images are COCO's)"
        )
    evaluated = read_coco_ids(refs, lambda entry: entry.get("split", "val") != "train") if refs else set()
    if not refs:
        job.warn(f"{REFS} of RefCOCO+ is not there ({REFCOCO_URL}): its evaluation images stay in")
    held_out.coco = dict.fromkeys(evaluated, "RefCOCO+ evaluation") | held_out.coco
    return held_out


def read_images(job: Job, path: Path) -> dict[int, dict]:
    """{image_id: see `genome_image`}"""
    images = {}
    for index, entry in enumerate(read_list(path)):
        try:
            image = genome_image(entry)
        except ValueError as error:
            job.odd(BROKEN_IMAGE, f"{path.name} entry {index} {error}")
            continue
        images[image["image_id"]] = image
    job.count("images", len(images), 108_077, first=job.first_odd(BROKEN_IMAGE))
    job.count("images that are also COCO's", sum(image["coco_id"] is not None for image in images.values()))
    return images


def genome_image(entry: Mapping) -> dict:
    """{image_id, image, coco_id, flickr_id, pixels} of one element of image_data.json; the ids may be None. Raises
    ValueError. The image's path is the end of its address: .../VG_100K_2/1.jpg -> VG_100K_2/1.jpg."""
    number = entry["image_id"] if "image_id" in entry else needed(entry, "id", int)
    return {
        "image_id": number,
        "image": "/".join(needed(entry, "url", str).split("/")[-2:]),
        "coco_id": entry.get("coco_id"),
        "flickr_id": entry.get("flickr_id"),
        "pixels": max(needed(entry, "width", int) * needed(entry, "height", int), 1),
    }


def image_lists(job: Job, path: Path, key: str) -> Iterator[tuple[str, int, list]]:
    """(place, image, list) of the elements of region_descriptions.json or question_answers.json; key: of the list."""
    for index, entry in enumerate(read_list(path)):
        where = f"{path.name} entry {index}"
        try:
            yield where, entry["id"] if "id" in entry else needed(entry, "image_id", int), list(entry[key])
        except (ValueError, KeyError, TypeError) as error:
            job.odd(BROKEN_ENTRY, f"{where} {error}")


# ------------------------------------------------------------------------------------------------ regions


def write_regions(job: Job, images: dict[int, dict], every: dict[int, dict], path: Path) -> None:
    """pretrain/vg.json: the sentences of `images` that pass the filters; every: what image_data.json lists."""
    options, counts, seen = job.options, Counter(), set()
    kept: list[tuple[int, str, float]] = []
    shares = array("f")
    for where, number, regions in image_lists(job, path, "regions"):
        seen.add(number)
        counts["listed"] += len(regions)
        if number not in images:
            counts["left out"] += len(regions)
            continue
        for phrase, share in sentences(job, regions, images[number]["pixels"], where, counts):
            kept.append((number, phrase, share))
            shares.append(share)
    smallest = 0.0 if options.all_regions else options.min_area
    if smallest is None:
        smallest = smallest_region(shares, options.captions)
        job.note(f"smallest region for {options.captions:,} captions: {smallest:.4f} of the image")
    with job.writing("pretrain/vg.json") as write:
        for number, phrase, share in kept:
            if share >= smallest:
                write({"image": job.pretrain_path(images[number]["image"]), "caption": phrase})
            else:
                counts["small"] += 1
    without = next((f"image {number} has none" for number in every if number not in seen), "")
    first = job.first_odd(BROKEN_ENTRY) or without
    job.count("region descriptions", counts["listed"], 5_400_000, rounded=100_000, first=first)
    job.count("  filter: of images left out", counts["left out"])
    job.count(f"  filter: fewer than {options.min_words} words", counts["short"])
    job.count("  filter: repeated at the same image", counts["repeated"])
    job.count(f"  filter: region below {smallest:.4f} of the image", counts["small"])
    published = None if options.all_regions else ALBEF_CAPTIONS
    written = job.files[job.output / "pretrain/vg.json"]
    job.count("pairs written for pre-training", written, published, rounded=1_000)


def sentences(job: Job, regions: list, pixels: int, where: str, counts: Counter) -> list[tuple[str, float]]:
    """(phrase, share of the image that its largest region covers) of an image's sentences that are neither short nor
    repeated, which are counted; with --all-regions of all that hold a word."""
    options = job.options
    kept: dict[str, tuple[str, float]] = {}
    for place, region in enumerate(regions):
        try:
            phrase, share = genome_region(region, pixels)
        except ValueError as error:
            job.odd("region that is not as Visual Genome's, left out", f"{where} region {place} {error}")
            continue
        words = clean_caption(phrase, 10_000)
        if not words:
            job.odd("region without a word, left out", f"{where} region {place}")
        elif options.all_regions:
            kept[str(place)] = phrase, share
        elif words.count(" ") + 1 < options.min_words:
            counts["short"] += 1
        elif words in kept:
            counts["repeated"] += 1
            kept[words] = kept[words][0], max(kept[words][1], share)
        else:
            kept[words] = phrase, share
    return list(kept.values())


def genome_region(region: Mapping, pixels: int) -> tuple[str, float]:
    """(phrase, share of the image that its region covers); raises ValueError."""
    area = max(needed(region, "width", (int, float)), 0) * max(needed(region, "height", (int, float)), 0)
    return tidy(needed(region, "phrase", str)), min(area / pixels, 1.0)


def smallest_region(shares: array, captions: int) -> float:
    """The share of the image at which `captions` of the sentences are left; 0 if there are no more than that."""
    if len(shares) <= captions:
        return 0.0
    place = len(shares) - captions
    return float(np.partition(np.frombuffer(shares, dtype=np.float32), place)[place])


# ------------------------------------------------------------------------------------------------ questions


def write_questions(job: Job, images: dict[int, dict], every: dict[int, dict], path: Path) -> None:
    """vqa/vg_qa.json: the questions of `images`; every: what image_data.json lists."""
    listed = left_out = 0
    with job.writing(VG_QA) as write:
        for where, number, pairs in image_lists(job, path, "qas"):
            listed += len(pairs)
            if number not in images:
                left_out += len(pairs)
                if number not in every:
                    job.odd("questions of an image that image_data.json lacks, left out", where)
                continue
            for place, pair in enumerate(pairs):
                try:
                    question = genome_question(pair, images[number]["image"])
                except ValueError as error:
                    job.odd("question that is not as Visual Genome's, left out", f"{where} question {place} {error}")
                    continue
                if not question["answer"] or not clean_question(question["question"]):
                    job.odd("question or answer without a word, left out", f"{where} question {place}")
                else:  # with COCO's id, or VQA's preparation could not know which show a validation image
                    write({**question, "coco_id": images[number]["coco_id"]})
    job.count("questions", listed, 1_400_000, rounded=100_000, first=job.first_odd(BROKEN_ENTRY))
    job.count("questions of images left out", left_out)
    job.count("questions written for VQA", job.files[job.output / VG_QA])


def genome_question(pair: Mapping, image: str) -> dict:
    """A VQA training entry of one element of `qas`; answers lose their final period. Raises ValueError."""
    answer = tidy(needed(pair, "answer", str)).lower()
    return {
        "question_id": needed(pair, "qa_id", int),
        "question": tidy(needed(pair, "question", str)),
        "image": image,
        "dataset": "vg",
        "answer": answer.removesuffix(".").strip(),
    }


def leave_out_questions(job: Job, path: Path, held_out: set[int]) -> None:
    """Take the questions of COCO's images `held_out` out of a list that `write_questions` wrote earlier."""
    entries = list(read_list(path))
    unknown = sum(not isinstance(entry, dict) or "coco_id" not in entry for entry in entries)
    kept = [entry for entry in entries if not isinstance(entry, dict) or entry.get("coco_id") not in held_out]
    if unknown:
        job.warn(
            f"{path}: {unknown:,} questions do not say which of COCO's images they show, and may be of validation "
            f"images: run tools.prepare vg again, or put {IMAGES} and {QUESTIONS} into --source {job.source}"
        )
    if len(kept) < len(entries):
        with job.writing(VG_QA) as write:
            for entry in kept:
                write(entry)
    job.count("Visual Genome's questions of validation images, taken out", len(entries) - len(kept))
