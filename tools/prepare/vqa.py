"""VQA v2: official questions and annotations, with object labels and OCR tokens of a detector, if given, and Visual
Genome's questions, if image_data.json and question_answers.json are in SOURCE too."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.files import read_json
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
PUBLISHED = {  # questions, images
    "train2014": (443_757, 82_783),
    "val2014": (214_354, 40_504),
    "test2015": (447_793, 81_434),
    "test-dev2015": (107_394, None),
}
MINIVAL_IMAGES = 5_000
ANSWERS, MIN_OCCURRENCES = 3_129, 9  # the list of Anderson et al. 2018: answers of nine questions and more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, files = parser.add_argument, {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    add("--objects", help="JSON of objects: image -> labels, or entries with object_label (mPLUG's)", **files)
    add("--ocr", help="JSON of read words: image -> [[box, word], ...], or entries with ocr (mPLUG's)", **files)


def prepare(job: Job) -> None:
    found = find_official(job.source, OFFICIAL, {TEST_DEV: VQA_URL, MINIVAL: MINIVAL_URL, **GENOME})
    minival = minival_images(job, found.get(MINIVAL))
    extras = Extras(job)
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
    write_answer_list(job, answers)
    for key in extras.known:
        job.count(f"questions with {key}", extras.used[key])
    if GENOME.keys() <= found.keys():
        images = visual_genome.read_images(job, found[visual_genome.IMAGES])
        visual_genome.write_questions(job, images, minival, found[visual_genome.QUESTIONS])
    else:
        job.warn(f"{' or '.join(GENOME)} is not in SOURCE: {visual_genome.VG_QA} is not written")


def minival_images(job: Job, path: Path | None) -> set[int]:
    """COCO ids of the 5,000 images of val2014 that validation uses; path: their list, else Karpathy's val is taken."""
    karpathy = held_out_file(job, "coco")
    if path is not None:
        found = job.read(path, None, lambda entry: int(entry["img_id"].rpartition("_")[2]))  # COCO_val2014_000000522418
        images = {number for _, number in found}
    elif karpathy.is_file():
        images = {image["coco_id"] for image in read_json(karpathy)["images"] if image["split"] == "val"}
    else:
        raise UserError(
            f"the 5,000 validation images are not known: put {MINIVAL} ({MINIVAL_URL}) into --source {job.source}, "
            f"or run tools.prepare coco with --output {job.output} first (then Karpathy's val is taken)"
        )
    job.lines.append(f"validation images: {path or karpathy}")
    job.count("images, minival", len(images), MINIVAL_IMAGES)
    return images


# ------------------------------------------------------------------------------------------------ questions


def annotated(job: Job, found: dict[str, Path], split: str, answers: Counter) -> Iterator[dict]:
    """Questions with their ten answers; `answers` counts each question's most frequent one."""
    shared: dict[str, dict] = {}  # equal answers are one object, or 443,757 x 10 of them fill the memory

    def slim(annotation: dict) -> tuple[int, dict]:
        kept = {key: annotation[key] for key in ("image_id", "answer_type", "question_type") if key in annotation}
        given = [item["answer"] for item in annotation["answers"]]
        kept["answers"] = [shared.setdefault(answer, {"answer": answer}) for answer in given]
        answers[normalize_answer(annotation["multiple_choice_answer"]).replace(",", "")] += 1
        return annotation["question_id"], kept

    annotations = dict(pair for _, pair in job.read(found[ANNOTATIONS.format(split)], "annotations", slim))
    yield from read_questions(job, found[QUESTIONS.format(split)], split, annotations)


def read_questions(job: Job, path: Path, split: str, annotations: dict | None) -> Iterator[dict]:
    """The entries of a question file; annotations: {question id: annotation}, which are taken out, None of test."""

    def convert(question: dict) -> dict:
        if annotations is not None and question["question_id"] not in annotations:
            raise ValueError("has no annotation")
        annotation = None if annotations is None else annotations.pop(question["question_id"])
        return vqa_entry(question, annotation, split)

    images = Counter()  # and their questions
    for _, entry in job.read(path, "questions", convert):
        images[entry["image"]] += 1
        if job.has(entry["image"]):
            yield entry
    job.count(f"questions, {split}", images.total(), PUBLISHED[split][0])
    job.count(f"  images, {split}", len(images), PUBLISHED[split][1])


def trainable(job: Job, entries: Iterator[dict]) -> Iterator[dict]:
    """Those with a word in question and answers. Validation and the test server want an answer to every question."""
    for entry in entries:
        if not clean_question(entry["question"]):
            job.leave_out("question of training without a word", f"question {entry['question_id']}")
        elif not any(answer.strip() for answer in entry["answer"]):
            job.leave_out("question of training whose answers are all blank", f"question {entry['question_id']}")
        else:
            yield entry


def write_part(job: Job, part: str, entries: Iterator[dict], extras: "Extras") -> None:
    job.count(f"questions written, {part}", job.write(PART.format(part), map(extras.added, entries)))


# ------------------------------------------------------------------------------------------------ answers


def write_minival_scores(job: Job, validation: list[dict]) -> None:
    """vqa/minival.json, {"question_id", "label": {answer: score}}, as LXMERT and mPLUG publish it; a score is the
    official accuracy that saying the answer would have: 0.3, 0.6, 0.9, then 1."""
    scores = []
    for entry in validation:
        label = {answer: round(leave_one_out(count), 6) for answer, count in Counter(entry["answer"]).items()}
        scores.append({"question_id": entry["question_id"], "label": label})
    job.write("vqa/minival.json", scores)


def write_answer_list(job: Job, answers: Counter) -> None:
    """The answers that are the most frequent one of at least nine questions of train and val, most common first."""
    common = [answer for answer, count in answers.most_common() if answer and count >= MIN_OCCURRENCES]
    job.count("answers in the list", len(common), ANSWERS)
    if common:
        job.write("vqa/answer_list.json", common)
    else:
        job.warn(f"no answer occurs {MIN_OCCURRENCES} times: vqa/answer_list.json is not written")


# ------------------------------------------------------------------------------------------------ labels and words


class Extras:
    """Object labels and OCR tokens by image; images are recognized by COCO's id, whatever path names them."""

    def __init__(self, job: Job):
        self.job, self.used = job, Counter()
        files = {"object_label": (job.options.objects, read_labels), "ocr": (job.options.ocr, read_words)}
        self.known = {key: dict(self._read(paths, key, convert)) for key, (paths, convert) in files.items() if paths}

    def _read(self, paths: list[Path], key: str, convert) -> Iterator[tuple[int, Any]]:
        """(COCO id, what `convert` makes of the value) of maps of images, or of mPLUG's lists of entries."""
        for path in paths:
            content = read_json(path)
            try:
                values = content if isinstance(content, dict) else {entry["image"]: entry.get(key) for entry in content}
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{path}: is neither a map of images nor a list of entries with 'image'") from None
            for image, value in values.items():
                try:
                    yield int(image) if image.isdecimal() else coco_number(image), convert(value or [])
                except (TypeError, ValueError, AttributeError) as error:
                    self.job.leave_out(f"{key} that cannot be read", f"{path.name}: {image} ({error})")

    def added(self, entry: dict) -> dict:
        """The entry with what is known of its image."""
        number = coco_number(entry["image"])
        for key, known in self.known.items():
            if known.get(number):
                self.used[key] += 1
                entry[key] = known[number]
        return entry


def read_labels(value: str | list[str]) -> str:
    """mPLUG's "dog&&frisbee", from itself or a list of names."""
    names = [value] if isinstance(value, str) else [name.replace("&&", " ").strip() for name in value]
    return "&&".join(filter(None, names))


def read_words(value) -> list:
    """[[box, word], ...]; words alone get no box."""
    pairs = [[None, item] if isinstance(item, str) else list(item) for item in value]
    if not all(len(pair) == 2 and isinstance(pair[1], str) for pair in pairs):
        raise ValueError("not [box, word]")
    return pairs
