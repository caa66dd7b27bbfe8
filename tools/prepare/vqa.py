"""VQA v2: official questions and annotations, with object labels and OCR tokens of a detector, if given."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dataset.files import read_json
from dataset.official import ANNOTATORS, coco_number, vqa_entry
from dataset.text import clean_question
from evaluation.vqa import leave_one_out, normalize_answer
from tools.prepare import visual_genome
from tools.prepare.common import Job, find_official, read_list
from tools.prepare.held_out import held_out_file, read_coco_ids
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
    add("--minival", type=Path, help="list of the validation images (default: minival.json in SOURCE, else Karpathy's)")
    add("--objects", help="JSON of objects: image -> labels, or entries with object_label (mPLUG's)", **files)
    add("--ocr", help="JSON of read words: image -> [[box, word], ...], or entries with ocr (mPLUG's)", **files)


def prepare(job: Job) -> None:
    genome = dict.fromkeys((visual_genome.IMAGES, visual_genome.QUESTIONS), visual_genome.GENOME_URL)
    found = find_official(job.source, OFFICIAL, {TEST_DEV: VQA_URL, MINIVAL: MINIVAL_URL, **genome})
    minival = minival_images(job, job.options.minival or found.get(MINIVAL))
    extras = Extras(job)
    answers = Counter()  # the most frequent answer of each question
    write_train(job, found, extras, answers)
    validation = write_val(job, found, extras, answers, minival)
    write_tests(job, found, extras)
    write_minival_scores(job, validation, minival)
    write_answer_list(job, answers)
    extras.report()
    if genome.keys() <= found.keys():
        images = visual_genome.read_images(job, found[visual_genome.IMAGES])
        allowed = {n: image for n, image in images.items() if image["coco_id"] not in minival}
        visual_genome.write_questions(job, allowed, images, found[visual_genome.QUESTIONS])
    elif (job.output / visual_genome.VG_QA).is_file():
        # tools.prepare vg left out the images of Karpathy's val, which a minival's need not be
        visual_genome.leave_out_questions(job, job.output / visual_genome.VG_QA, minival)


def minival_images(job: Job, path: Path | None) -> set[int]:
    """COCO ids of the 5,000 images of val2014 that validation uses; path: their list, else Karpathy's val is taken."""
    karpathy = held_out_file(job.output, "coco")
    if path is not None:
        images = read_coco_ids(path)
        job.note(f"validation images: {path}")
    elif karpathy.is_file():
        images = {image["coco_id"] for image in read_json(karpathy)["images"] if image["split"] == "val"}
        job.note("validation images: Karpathy's val")
    else:
        raise UserError(
            f"the 5,000 validation images are not known: put {MINIVAL} ({MINIVAL_URL}) into --source {job.source}, "
            f"or run tools.prepare coco with --output {job.output} first (then Karpathy's val is taken)"
        )
    job.count("images, minival", len(images), MINIVAL_IMAGES)
    return images


# ------------------------------------------------------------------------------------------------ questions


def write_train(job: Job, found: dict[str, Path], extras: "Extras", answers: Counter) -> None:
    with job.writing(PART.format("train")) as write:
        for entry in annotated(job, found, "train2014", answers):
            if job.has(entry["image"]) and usable(job, entry, training=True):
                write(extras.added(entry))
    count_written(job, "train")


def write_val(
    job: Job, found: dict[str, Path], extras: "Extras", answers: Counter, minival: set[int]
) -> dict[int, tuple[int, list[str]]]:
    """val2014's questions, those of the minival's images apart, which are returned: {question: (COCO id, answers)}."""
    validation = {}
    with job.writing(PART.format("nominival")) as write_rest, job.writing(PART.format("minival")) as write_minival:
        for entry in annotated(job, found, "val2014", answers):
            number = coco_number(entry["image"])
            if not job.has(entry["image"]) or not usable(job, entry, training=number not in minival):
                continue
            (write_minival if number in minival else write_rest)(extras.added(entry))
            if number in minival:
                validation[entry["question_id"]] = number, entry["answer"]
    count_written(job, "nominival")
    count_written(job, "minival")
    return validation


def count_written(job: Job, part: str) -> None:
    job.count(f"questions written, {part}", job.files[job.output / PART.format(part)])


def write_tests(job: Job, found: dict[str, Path], extras: "Extras") -> None:
    for split, name in (("test2015", "test"), ("test-dev2015", "testdev")):
        if QUESTIONS.format(split) not in found:
            continue
        with job.writing(PART.format(name)) as write:
            for entry in read_questions(job, found[QUESTIONS.format(split)], split, None):
                if job.has(entry["image"]) and usable(job, entry, training=False):
                    write(extras.added(entry))


def annotated(job: Job, found: dict[str, Path], split: str, answers: Counter) -> Iterator[dict]:
    """Questions with their ten answers; `answers` counts each question's most frequent one."""
    path, annotations = found[ANNOTATIONS.format(split)], {}
    shared: dict[str, dict] = {}  # equal answers are one object, or 443,757 x 10 of them fill the memory
    for index, annotation in enumerate(read_list(path, "annotations")):
        try:
            given = [item["answer"] for item in annotation["answers"]]
            slim = {key: annotation[key] for key in ("image_id", "answer_type", "question_type") if key in annotation}
            slim["answers"] = [shared.setdefault(answer, {"answer": answer}) for answer in given]
            annotations[annotation["question_id"]] = slim
            answers[normalize_answer(annotation["multiple_choice_answer"]).replace(",", "")] += 1
        except (KeyError, TypeError, AttributeError) as error:
            job.odd("annotation that is not as VQA's", f"{path.name} annotation {index} ({error!r})")
    yield from read_questions(job, found[QUESTIONS.format(split)], split, annotations)
    for number in annotations:  # those that questions took are gone
        job.odd("annotation without a question", f"{path.name} question {number}")


def read_questions(job: Job, path: Path, split: str, annotations: dict | None) -> Iterator[dict]:
    """The entries of a question file; annotations: {question id: annotation}, which are taken out, None of test."""
    count, images = 0, set()
    for count, question in enumerate(read_list(path, "questions"), 1):
        where = f"{path.name} question {count - 1}"
        try:
            annotation = None if annotations is None else annotations.pop(question["question_id"], None)
            entry = vqa_entry(question, annotation, split)
        except (ValueError, KeyError, TypeError) as error:
            job.odd("question that is not as VQA's, left out", f"{where} {error}")
            continue
        images.add(question["image_id"])
        if annotations is not None and annotation is None:
            job.odd("question without an annotation, left out", where)
        else:
            yield entry
    first = f"question {next(iter(annotations))} has an annotation only" if annotations else ""
    job.count(f"questions, {split}", count, PUBLISHED[split][0], first=first)
    job.count(f"  images, {split}", len(images), PUBLISHED[split][1], first=first)


def usable(job: Job, entry: dict, training: bool) -> bool:
    where = f"question {entry['question_id']}"
    if not clean_question(entry["question"]):
        job.odd("question without a word, left out", where)
        return False
    answers = entry.get("answer")
    if answers is None:
        return True
    answered = any(answer.strip() for answer in answers)
    if len(answers) != ANNOTATORS:
        job.odd(f"question with another number of answers than {ANNOTATORS}", where)
        return training and answered
    if not answered:
        job.odd("question whose answers are all blank, left out of training", where)
    return answered or not training


# ------------------------------------------------------------------------------------------------ answers


def soft_scores(answers: Iterable[str]) -> dict[str, float]:
    """{answer: the official accuracy that saying it would have}, of ten annotators: 0.3, 0.6, 0.9, then 1."""
    return {answer: round(leave_one_out(count), 6) for answer, count in Counter(answers).items()}


def write_minival_scores(job: Job, validation: dict[int, tuple[int, list[str]]], minival: set[int]) -> None:
    """vqa/minival.json, {"question_id", "label": {answer: score}}, as LXMERT and mPLUG publish it."""
    absent = sorted(minival - {image for image, _ in validation.values()})
    if absent:
        job.warn(f"{len(absent):,} images of the minival have no question in val2014; first: {absent[0]}")
    with job.writing("vqa/minival.json") as write:
        for number, (_, answers) in validation.items():
            write({"question_id": number, "label": soft_scores(answers)})


def write_answer_list(job: Job, answers: Counter) -> None:
    """The answers that are the most frequent one of at least nine questions of train and val, most common first."""
    common = [answer for answer, count in answers.most_common() if answer and count >= MIN_OCCURRENCES]
    job.count("answers in the list", len(common), ANSWERS)
    if not common:
        job.warn(f"no answer occurs {MIN_OCCURRENCES} times: vqa/answer_list.json is not written")
        return
    with job.writing("vqa/answer_list.json") as write:
        for answer in common:
            write(answer)


# ------------------------------------------------------------------------------------------------ labels and words


class Extras:
    """Object labels and OCR tokens by image; images are recognized by COCO's id, whatever path names them."""

    def __init__(self, job: Job):
        self.job = job
        self.labels = self._read(job.options.objects, "object_label", _labels)
        self.words = self._read(job.options.ocr, "ocr", _words)
        self.used = Counter()

    def _read(self, paths: list[Path], key: str, convert: Callable) -> dict:
        """{COCO id: what `convert` makes of the value}"""
        result = {}
        for path in paths:
            content = read_json(path)
            if isinstance(content, list):
                content = {str(entry.get("image")): entry.get(key) for entry in content if isinstance(entry, dict)}
            if not isinstance(content, dict):
                raise UserError(f"{path}: is neither a map of images nor a list of entries")
            for image, value in content.items():
                number = int(image) if image.isdecimal() else coco_number(image)
                try:
                    result[number] = convert(value)
                except (TypeError, ValueError) as error:
                    self.job.odd(f"image whose {key} cannot be read", f"{path.name}: {image} ({error})")
        return result

    def added(self, entry: dict) -> dict:
        """The entry with what is known of its image."""
        number = coco_number(entry["image"])
        for key, known in (("object_label", self.labels), ("ocr", self.words)):
            if known.get(number):
                self.used[key] += 1
                entry[key] = known[number]
        return entry

    def report(self) -> None:
        for name, key, known in (("object labels", "object_label", self.labels), ("OCR tokens", "ocr", self.words)):
            if known:
                self.job.count(f"questions with {name}", self.used[key])
                if not self.used[key]:
                    self.job.warn(f"no question's image is among those with {name}: are they named as COCO's files?")


def _labels(value) -> str:
    """mPLUG's "dog&&frisbee" from itself, a list of names, or a detector's list of {"label"} or {"class"}."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise TypeError("neither a string nor a list")
    names = [item.get("label", item.get("class")) if isinstance(item, dict) else item for item in value]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a label that is no string")
    return "&&".join(name.replace("&&", " ").strip() for name in names if name.strip())


def _words(value) -> list:
    """[[box, word], ...]; words alone get no box."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError("no list")
    result = [[None, item] if isinstance(item, str) else list(item) for item in value]
    for item in result:
        if len(item) != 2 or not isinstance(item[1], str):
            raise ValueError("not [box, word]")
    return result
