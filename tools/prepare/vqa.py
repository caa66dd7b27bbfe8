"""VQA v2: official questions and annotations, with object labels and OCR tokens of a detector, if given, and Visual
Genome's questions, if image_data.json and question_answers.json are in SOURCE too."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.files import json_list, read_json
from dataset.official import coco_number, vqa_entry
from dataset.text import clean_question
from evaluation.vqa import leave_one_out, normalize_answer
from tools.prepare import visual_genome
from tools.prepare.common import Job, find_official
from tools.prepare.held_out import held_out_file
from utils import UserError

VQA_URL = "https://visualqa.org/download.html"
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
PART = "vqa/vqa_{}_ocr.json"  # mPLUG's names
TEST_DEV = QUESTIONS.format("test-dev2015")
ANSWERED = ("train2014", "val2014")
OFFICIAL = {
    **{QUESTIONS.format(split): VQA_URL for split in (*ANSWERED, "test2015")},
    **{ANNOTATIONS.format(split): VQA_URL for split in ANSWERED},
}
GENOME = dict.fromkeys((visual_genome.IMAGES, visual_genome.QUESTIONS), visual_genome.GENOME_URL)
MINIVAL = "minival.json"
MINIVAL_URL = "https://nlp.cs.unc.edu/data/lxmert_data/vqa/minival.json"
PUBLISHED = {"train2014": 443_757, "val2014": 214_354, "test2015": 447_793, "test-dev2015": 107_394}  # questions
ANSWERS, MIN_OCCURRENCES = 3_129, 9  # the list of Anderson et al. 2018: answers of nine questions and more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, files = parser.add_argument, {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    add("--objects", help="JSON of objects: image -> [label, ...], or mPLUG's entries with object_label", **files)
    add("--ocr", help="JSON of read words: image -> [[box, word], ...], or mPLUG's entries with ocr", **files)


def prepare(job: Job) -> None:
    found = find_official(job.source, OFFICIAL, {TEST_DEV: VQA_URL, MINIVAL: MINIVAL_URL, **GENOME})
    minival = minival_images(job, found.get(MINIVAL))
    options = {"object_label": job.options.objects, "ocr": job.options.ocr}
    extras = {key: read_extras(files, key) for key, files in options.items() if files}
    answers = Counter()  # the most frequent answer of each question
    write_part(job, "train", trainable(job, annotated(job, found, "train2014", answers)), extras)
    parts: dict[bool, list[dict]] = {True: [], False: []}  # of the minival's images?
    for entry in annotated(job, found, "val2014", answers):
        parts[coco_number(entry["image"]) in minival].append(entry)
    write_part(job, "nominival", trainable(job, parts[False]), extras)
    write_part(job, "minival", parts[True], extras)
    for split, name in (("test2015", "test"), ("test-dev2015", "testdev")):
        if (file := QUESTIONS.format(split)) in found:
            write_part(job, name, read_questions(job, found[file], split, None), extras)
    write_minival_scores(job, parts[True])
    common = [answer for answer, count in answers.most_common() if answer and count >= MIN_OCCURRENCES]
    job.count("answers in the list", len(common), ANSWERS)
    job.write("vqa/answer_list.json", common)
    if GENOME.keys() <= found.keys():
        images = visual_genome.read_images(job, found[visual_genome.IMAGES])
        visual_genome.write_questions(job, images, minival, found[visual_genome.QUESTIONS])
    else:
        job.warn(f"{' or '.join(GENOME)} is not in SOURCE: {visual_genome.VG_QA} is not written")


def minival_images(job: Job, path: Path | None) -> set[int]:
    """COCO ids of the 5,000 images of val2014 that validation uses; path: their list, else Karpathy's val is taken."""
    karpathy = held_out_file(job, "coco")
    if path is not None:
        images = {int(entry["img_id"].rpartition("_")[2]) for entry in json_list(path)}  # COCO_val2014_000000522418
    elif karpathy.is_file():
        images = {image["coco_id"] for image in read_json(karpathy)["images"] if image["split"] == "val"}
    else:
        raise UserError(
            f"the 5,000 validation images are not known: put {MINIVAL} ({MINIVAL_URL}) into --source {job.source}, "
            f"or run tools.prepare coco with --output {job.output} first (then Karpathy's val is taken)"
        )
    job.count(f"images, minival ({path or karpathy})", len(images), 5_000)
    return images


def annotated(job: Job, found: dict[str, Path], split: str, answers: Counter) -> Iterator[dict]:
    """Questions with their ten answers; `answers` counts each question's most frequent one."""
    annotations = {}
    for annotation in json_list(found[ANNOTATIONS.format(split)], "annotations"):
        annotations[annotation["question_id"]] = annotation
        answers[normalize_answer(annotation["multiple_choice_answer"]).replace(",", "")] += 1
    yield from read_questions(job, found[QUESTIONS.format(split)], split, annotations)


def read_questions(job: Job, path: Path, split: str, annotations: dict | None) -> Iterator[dict]:
    """The entries of a question file; annotations: {question id: annotation}, None of test."""
    questions = json_list(path, "questions")
    job.count(f"questions, {split}", len(questions), PUBLISHED[split])
    for question in questions:
        entry = vqa_entry(question, annotations and annotations[question["question_id"]], split)
        if job.has(entry["image"]):
            yield entry


def trainable(job: Job, entries: Iterable[dict]) -> Iterator[dict]:
    """Those with a word in question and answers. Validation and the test server want an answer to every question."""
    for entry in entries:
        if clean_question(entry["question"]) and any(answer.strip() for answer in entry["answer"]):
            yield entry
        else:
            job.leave_out("question of training without a word in it or its answers", str(entry["question_id"]))


def write_part(job: Job, part: str, entries: Iterable[dict], extras: dict[str, dict]) -> None:
    """vqa/vqa_PART_ocr.json; extras: {key: {COCO's id: what to write under the key}}"""

    def joined() -> Iterator[dict]:
        for entry in entries:
            number = coco_number(entry["image"])
            yield entry | {key: known[number] for key, known in extras.items() if known.get(number)}

    job.count(f"questions written, {part}", job.write(PART.format(part), joined()))


def read_extras(files: list[Path], key: str) -> dict[int, str | list]:
    """{COCO's id: object labels as mPLUG's "dog&&frisbee", or [[box, word], ...]} of --objects or --ocr."""
    extras = {}
    for path in files:
        content = read_json(path)
        if isinstance(content, list):  # mPLUG's
            content = {entry["image"]: entry.get(key) for entry in content}
        for image, value in content.items():
            if (number := coco_number(image)) is None:
                raise UserError(f"{path}: {image} names no image of COCO's (COCO_val2014_000000391895.jpg)")
            is_list = key == "object_label" and isinstance(value, list)
            extras[number] = "&&".join(value) if is_list else value
    return extras


def write_minival_scores(job: Job, validation: list[dict]) -> None:
    """vqa/minival.json, {"question_id", "label": {answer: score}}, as LXMERT and mPLUG publish it; a score is the
    official accuracy that saying the answer would have: 0.3, 0.6, 0.9, then 1."""
    scores = []
    for entry in validation:
        label = {answer: round(leave_one_out(count), 6) for answer, count in Counter(entry["answer"]).items()}
        scores.append({"question_id": entry["question_id"], "label": label})
    job.write("vqa/minival.json", scores)
