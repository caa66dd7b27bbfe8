"""Visual Genome: region descriptions for pre-training, questions for VQA.

ALBEF keeps about 769K of the 5.4M descriptions (821K are in the file that BLIP published). Its authors name four
filters (github.com/salesforce/ALBEF/issues/2): images of COCO's and RefCOCO+'s evaluation sets, sentences repeated at
an image, small regions, short sentences. The two thresholds are not published with the code; here the shortest sentence
is an option, and the smallest region is the one at which --captions sentences are left.
"""

import argparse
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.official import genome_id, genome_image, genome_question, genome_region
from dataset.text import clean_caption, clean_question
from tools.prepare.files import find_official, stream_entries
from tools.prepare.held_out import HeldOut, evaluation_refs
from tools.prepare.job import Job
from tools.prepare.karpathy import LeakFilter
from tools.prepare.report import Report
from utils import UserError

GENOME_URL = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
REFCOCO_URL = "https://github.com/lichengunc/refer: refcoco+.zip"
OFFICIAL = {name: GENOME_URL for name in ("image_data.json", "region_descriptions.json")}
QUESTIONS = "question_answers.json"
REFS = "refs(unc).p"
ALBEF_CAPTIONS = 769_000
BROKEN_IMAGE = "image that is not as Visual Genome's, left out"
BROKEN_ENTRY = "entry that is not as Visual Genome's, left out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--all-regions", action="store_true", help="keep all 5.4M descriptions but those of held-out images")
    add(
        "--min-words",
        type=int,
        default=3,
        help="shortest sentence in words (default: %(default)s; ours)",
    )
    add("--min-area", type=float, help="smallest region, a share of the image (default: so that --captions are left)")
    add("--captions", type=int, default=ALBEF_CAPTIONS, help="sentences to keep (default: %(default)s, ALBEF's number)")
    add("--refcoco", type=Path, help=f"RefCOCO+'s {REFS}, or a list of its evaluation images (default: in SOURCE)")


def sources(options: argparse.Namespace) -> dict[str, Path]:
    found = find_official(options.source, OFFICIAL, {QUESTIONS: GENOME_URL, REFS: REFCOCO_URL})
    if options.refcoco:
        if not options.refcoco.is_file():
            raise UserError(f"--refcoco {options.refcoco}: no such file")
        found[REFS] = options.refcoco
    return found


def prepare(job: Job, found: dict[str, Path]) -> None:
    check_options(job.options)
    images = read_images(job, found["image_data.json"])
    present = {number: image for number, image in images.items() if job.has(image["image"])}
    held_out = held_out_images(job, found)
    write_regions(job, usable_images(job, present, held_out), images, found["region_descriptions.json"])
    if QUESTIONS in found:  # VQA validates on Karpathy's val, if its own preparation was given no other list
        asked = {n: image for n, image in present.items() if held_out.coco.get(image["coco_id"]) != "coco val"}
        write_questions(job, asked, images, found[QUESTIONS])
    else:
        job.report.warn(f"{QUESTIONS} is not in SOURCE: vqa/vg_qa.json is not written")


def check_options(options: argparse.Namespace) -> None:
    if options.min_area is not None and not 0 <= options.min_area <= 1:
        raise UserError(f"--min-area {options.min_area}: is a share of the image, from 0 to 1")
    if options.captions < 1 or options.min_words < 0:
        raise UserError("--captions must be at least 1 and --min-words at least 0")


# ------------------------------------------------------------------------------------------------ images


def read_images(job: Job, path: Path) -> dict[int, dict]:
    """{image_id: see `genome_image`}"""
    images = {}
    for index, entry in enumerate(stream_entries(path)):
        try:
            image = genome_image(entry)
        except ValueError as error:
            job.report.odd(BROKEN_IMAGE, f"{path.name} entry {index} {error}")
            continue
        images[image["image_id"]] = image
    without = sum(image["coco_id"] is None for image in images.values())
    job.report.count("images", len(images), 108_077, first=job.report.first_odd(BROKEN_IMAGE))
    job.report.count("images that are also COCO's", len(images) - without)
    return images


def held_out_images(job: Job, found: dict[str, Path]) -> HeldOut:
    """COCO's, Flickr30K's and RefCOCO+'s evaluation images."""
    held_out = job.held_out("coco", "flickr30k")
    if not held_out.coco:
        raise UserError(
            f"COCO's test images are not known: run tools.prepare coco with --output {job.output} first "
            "(about half of Visual Genome's images are COCO's)"
        )
    refs = evaluation_refs(found[REFS]) if REFS in found else set()
    if not refs:
        job.report.warn(f"{REFS} of RefCOCO+ is not there ({REFCOCO_URL}): its evaluation images stay in")
    for number in refs - held_out.coco.keys():
        held_out.coco[number] = "RefCOCO+ evaluation"
    return held_out


def usable_images(job: Job, images: dict[int, dict], held_out: HeldOut) -> dict[int, dict]:
    """Those that belong to no evaluation set: the first of ALBEF's filters."""
    copies = job.leaks(held_out, [image["image"] for image in images.values()])
    allowed = LeakFilter(job, held_out, copies)
    kept = {n: image for n, image in images.items() if allowed(image["image"], image["coco_id"], image["flickr_id"])}
    allowed.report()
    return kept


# ------------------------------------------------------------------------------------------------ regions


class RegionFile:
    """region_descriptions.json as (image, {sentence: share of its largest region}), what is odd in it counted."""

    def __init__(self, path: Path, images: dict[int, dict], min_words: int, everything: bool):
        self.path, self.images, self.min_words, self.everything = path, images, min_words, everything

    def __iter__(self) -> Iterator[tuple[dict, list[tuple[str, float]]]]:
        return self.read(Report("unused"))

    def read(self, report: Report) -> Iterator[tuple[dict, list[tuple[str, float]]]]:
        self.listed = self.of_left_out = self.repeated = self.short = 0
        self.seen: set[int] = set()
        for index, entry in enumerate(stream_entries(self.path)):
            where = f"{self.path.name} entry {index}"
            try:
                number, regions = genome_id(entry), entry["regions"]
            except (ValueError, KeyError, TypeError) as error:
                report.odd(BROKEN_ENTRY, f"{where} {error}")
                continue
            self.listed += len(regions)
            self.seen.add(number)
            if number not in self.images:
                self.of_left_out += len(regions)
                continue
            yield self.images[number], self.sentences(regions, self.images[number]["pixels"], where, report)

    def sentences(self, regions: list, pixels: int, where: str, report: Report) -> list[tuple[str, float]]:
        kept: dict[str, tuple[str, float]] = {}
        for place, region in enumerate(regions):
            try:
                phrase, share = genome_region(region, pixels)
            except ValueError as error:
                report.odd("region that is not as Visual Genome's, left out", f"{where} region {place} {error}")
                continue
            words = clean_caption(phrase, 10_000)
            if not words:
                report.odd("region without a word, left out", f"{where} region {place}")
            elif not self.everything and words.count(" ") + 1 < self.min_words:
                self.short += 1
            elif not self.everything and words in kept:
                self.repeated += 1
                kept[words] = kept[words][0], max(kept[words][1], share)
            else:
                kept[words if not self.everything else str(place)] = phrase, share
        return list(kept.values())


def write_regions(job: Job, images: dict[int, dict], every: dict[int, dict], path: Path) -> None:
    options, report = job.options, job.report
    regions = RegionFile(path, images, options.min_words, options.all_regions)
    smallest = 0.0 if options.all_regions else options.min_area
    if smallest is None:
        smallest = smallest_region(regions, options.captions)
        report.note(f"smallest region for {options.captions:,} captions: {smallest:.4f} of the image")
    small = 0
    with job.writing("pretrain/vg.json") as write:
        for image, sentences in regions.read(report):
            for phrase, share in sentences:
                if share >= smallest:
                    write({"image": job.pretrain_path(image["image"]), "caption": phrase})
                else:
                    small += 1
    without = next((f"image {number} has none" for number in every if number not in regions.seen), "")
    first = report.first_odd(BROKEN_ENTRY) or without
    report.count("region descriptions", regions.listed, 5_400_000, rounded=100_000, first=first)
    report.count("  filter: of images left out", regions.of_left_out)
    report.count(f"  filter: fewer than {options.min_words} words", regions.short)
    report.count("  filter: repeated at the same image", regions.repeated)
    report.count(f"  filter: region below {smallest:.4f} of the image", small)
    published = None if options.all_regions else ALBEF_CAPTIONS
    written = job.files[job.output / "pretrain/vg.json"]
    report.count("pairs written for pre-training", written, published, rounded=1_000)


def smallest_region(regions: RegionFile, captions: int) -> float:
    """The share of the image at which `captions` sentences are left; 0 where there are no more than that."""
    shares = array("f")
    for _, sentences in regions:
        shares.extend(share for _, share in sentences)
    if len(shares) <= captions:
        return 0.0
    values = np.frombuffer(shares, dtype=np.float32)
    return float(np.partition(values, len(values) - captions)[len(values) - captions])


# ------------------------------------------------------------------------------------------------ questions


def write_questions(job: Job, images: dict[int, dict], every: dict[int, dict], path: Path) -> None:
    """vqa/vg_qa.json: the questions of `images`; every: what image_data.json lists."""
    report, listed, left_out = job.report, 0, 0
    with job.writing("vqa/vg_qa.json") as write:
        for index, entry in enumerate(stream_entries(path)):
            where = f"{path.name} entry {index}"
            try:
                number, pairs = genome_id(entry), entry["qas"]
            except (ValueError, KeyError, TypeError) as error:
                report.odd(BROKEN_ENTRY, f"{where} {error}")
                continue
            listed += len(pairs)
            if number not in images:
                left_out += len(pairs)
                if number not in every:
                    report.odd("questions of an image that image_data.json lacks, left out", where)
                continue
            for place, pair in enumerate(pairs):
                question = usable_question(job, pair, images[number]["image"], f"{where} question {place}")
                if question:  # with COCO's id, or VQA's preparation could not tell which show a validation image
                    write({**question, "coco_id": images[number]["coco_id"]})
    report.count("questions", listed, 1_400_000, rounded=100_000, first=report.first_odd(BROKEN_ENTRY))
    report.count("questions of images left out", left_out)
    report.count("questions written for VQA", job.files[job.output / "vqa/vg_qa.json"])


def leave_out_questions(job: Job, path: Path, held_out: set[int]) -> None:
    """Take the questions of COCO's images `held_out` out of a list that `write_questions` wrote earlier."""
    leaking = unknown = 0
    for entry in stream_entries(path):
        if not isinstance(entry, dict) or "coco_id" not in entry:
            unknown += 1
        elif entry["coco_id"] in held_out:
            leaking += 1
    if unknown:
        job.report.warn(
            f"{path}: {unknown:,} questions do not say which of COCO's images they show, and may be of validation "
            f"images: run tools.prepare vg again, or put image_data.json and {QUESTIONS} into --source {job.source}"
        )
    if leaking:
        with job.writing("vqa/vg_qa.json") as write:
            for entry in stream_entries(path):
                if not isinstance(entry, dict) or entry.get("coco_id") not in held_out:
                    write(entry)
    job.report.count("Visual Genome's questions of validation images, taken out", leaking)


def usable_question(job: Job, pair: dict, image: str, where: str) -> dict | None:
    try:
        question = genome_question(pair, image)
    except ValueError as error:
        job.report.odd("question that is not as Visual Genome's, left out", f"{where} {error}")
        return None
    if not question["answer"] or not clean_question(question["question"]):
        job.report.odd("question or answer without a word, left out", where)
        return None
    return question
