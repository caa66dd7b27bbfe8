"""VQA v2: official questions and annotations, with object labels and OCR tokens where somebody has detected them."""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dataset.official import ANNOTATORS, coco_number, vqa_entry
from dataset.text import clean_question
from evaluation.vqa import leave_one_out, normalize_answer
from tools.prepare import visual_genome
from tools.prepare.files import find_official, read_json, stream_entries
from tools.prepare.held_out import held_out_files, read_coco_ids
from tools.prepare.job import Job
from utils import UserError

VQA_URL = "https://visualqa.org/download.html"
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
PART = "vqa/vqa_{}_ocr.json"  # mPLUG's names
VG_QA = "vqa/vg_qa.json"  # below OUTPUT
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


def sources(options: argparse.Namespace) -> dict[str, Path]:
    genome = {name: visual_genome.GENOME_URL for name in ("image_data.json", visual_genome.QUESTIONS)}
    found = find_official(options.source, OFFICIAL, {TEST_DEV: VQA_URL, MINIVAL: MINIVAL_URL, **genome})
    own = {"minival": [options.minival] if options.minival else [], "objects": options.objects, "ocr": options.ocr}
    for name, paths in own.items():
        for number, path in enumerate(paths):
            if not path.is_file():
                raise UserError(f"--{name} {path}: no such file")
            found[MINIVAL if name == "minival" else f"--{name} {number}"] = path
    if MINIVAL not in found:
        found["held_out_coco.json"] = _karpathy_val(options)
    earlier = options.output / VG_QA
    if not found.keys() >= genome.keys() and earlier.is_file():  # a source: when it changes, it is looked at again
        found[VG_QA] = earlier
    return found


def _karpathy_val(options: argparse.Namespace) -> Path:
    path = next((path for path in held_out_files(options.output) if path.name == "held_out_coco.json"), None)
    if path is None:
        raise UserError(
            f"the 5,000 validation images are not known: put {MINIVAL} ({MINIVAL_URL}) into --source {options.source}, "
            f"or run tools.prepare coco with --output {options.output} first (then Karpathy's val is taken)"
        )
    return path


def prepare(job: Job, found: dict[str, Path]) -> None:
    minival = minival_images(job, found)
    extras = Extras(job, found)
    answers: Counter = Counter()
    validation: dict[int, tuple[int, list[str]]] = {}  # question id -> COCO id, answers
    write_train(job, found, extras, answers)
    write_val(job, found, extras, answers, minival, validation)
    write_tests(job, found, extras)
    write_minival_scores(job, validation, minival)
    write_answer_list(job, answers)
    extras.report()
    if visual_genome.QUESTIONS in found and "image_data.json" in found:
        images = visual_genome.read_images(job, found["image_data.json"])
        allowed = {n: image for n, image in images.items() if image["coco_id"] not in minival}
        visual_genome.write_questions(job, allowed, images, found[visual_genome.QUESTIONS])
    elif VG_QA in found:  # tools.prepare vg left out the images of Karpathy's val, which a minival's need not be
        visual_genome.leave_out_questions(job, found[VG_QA], minival)


# ------------------------------------------------------------------------------------------------ questions


def write_train(job: Job, found: dict[str, Path], extras: "Extras", answers: Counter) -> None:
    with job.writing(PART.format("train")) as write:
        for entry in annotated(job, found, "train2014", answers):
            if job.has(entry["image"]) and usable(job, entry, training=True):
                write(extras.added(entry))
    job.report.count("questions written, train", write.count)


def write_val(job: Job, found: dict[str, Path], extras: "Extras", answers: Counter, minival: set, kept: dict) -> None:
    """val2014's questions, those of the minival's images apart; `kept` collects {question id: (COCO id, answers)}."""
    with job.writing(PART.format("nominival")) as write_rest, job.writing(PART.format("minival")) as write_minival:
        for entry in annotated(job, found, "val2014", answers):
            held_out = coco_number(entry["image"]) in minival
            if not job.has(entry["image"]) or not usable(job, entry, training=not held_out):
                continue
            (write_minival if held_out else write_rest)(extras.added(entry))
            if held_out:
                kept[entry["question_id"]] = coco_number(entry["image"]), entry["answer"]
    job.report.count("questions written, nominival", write_rest.count)
    job.report.count("questions written, minival", write_minival.count)


def write_tests(job: Job, found: dict[str, Path], extras: "Extras") -> None:
    for split, name in (("test2015", "test"), ("test-dev2015", "testdev")):
        path = found.get(QUESTIONS.format(split))
        if path is None:
            continue
        with job.writing(PART.format(name)) as write:
            for entry in _entries(job, path, split, {}, answered=False):
                if job.has(entry["image"]) and usable(job, entry, training=False):
                    write(extras.added(entry))


def annotated(job: Job, found: dict[str, Path], split: str, answers: Counter) -> Iterator[dict]:
    """Questions with their ten answers; `answers` counts each question's most frequent one."""
    path, shared, annotations = found[ANNOTATIONS.format(split)], {}, {}
    for index, annotation in enumerate(stream_entries(path, "annotations")):
        try:
            annotations[annotation["question_id"]] = _slim(annotation, shared)
            answers[normalize_answer(annotation["multiple_choice_answer"]).replace(",", "")] += 1
        except (KeyError, TypeError, AttributeError) as error:
            job.report.odd("annotation that is not as VQA's", f"{path.name} annotation {index} ({error!r})")
    yield from _entries(job, found[QUESTIONS.format(split)], split, annotations, answered=True)
    for number in annotations:  # those that questions took are gone
        job.report.odd("annotation without a question", f"{path.name} question {number}")


def _slim(annotation: dict, shared: dict[str, dict]) -> dict:
    """The annotation with what entries need; equal answers are one object, or 443,757 x 10 of them fill the memory."""
    given = [item["answer"] for item in annotation["answers"]]
    slim = {key: annotation[key] for key in ("image_id", "answer_type", "question_type") if key in annotation}
    return {**slim, "answers": [shared.setdefault(answer, {"answer": answer}) for answer in given]}


def _entries(job: Job, path: Path, split: str, annotations: dict, answered: bool) -> Iterator[dict]:
    count, images = 0, set()
    for index, question in enumerate(stream_entries(path, "questions")):
        count += 1
        where = f"{path.name} question {index}"
        try:
            annotation = annotations.pop(question["question_id"], None) if answered else None
            entry = vqa_entry(question, annotation, split)
        except (ValueError, KeyError, TypeError) as error:
            job.report.odd("question that is not as VQA's, left out", f"{where} {error}")
            continue
        images.add(question["image_id"])
        if answered and annotation is None:
            job.report.odd("question without an annotation, left out", where)
        else:
            yield entry
    published = PUBLISHED[split]
    first = f"question {next(iter(annotations))} has an annotation only" if annotations else ""
    job.report.count(f"questions, {split}", count, published[0], first=first)
    job.report.count(f"  images, {split}", len(images), published[1], first=first)


def usable(job: Job, entry: dict, training: bool) -> bool:
    where = f"question {entry['question_id']}"
    if not clean_question(entry["question"]):
        job.report.odd("question without a word, left out", where)
        return False
    answers = entry.get("answer")
    if answers is None:
        return True
    if len(answers) != ANNOTATORS:
        job.report.odd(f"question with another number of answers than {ANNOTATORS}", where)
        return training and any(answer.strip() for answer in answers)
    if not any(answer.strip() for answer in answers):
        job.report.odd("question whose answers are all blank, left out of training", where)
        return not training
    return True


# ------------------------------------------------------------------------------------------------ minival, answers


def minival_images(job: Job, found: dict[str, Path]) -> set[int]:
    """COCO ids of the 5,000 images of val2014 that validation uses."""
    if MINIVAL in found:
        images = read_coco_ids(found[MINIVAL])
        job.report.note(f"validation images: {found[MINIVAL]}")
    else:
        held_out = read_json(found["held_out_coco.json"])["images"]
        images = {image["coco_id"] for image in held_out if image["split"] == "val"}
        job.report.note("validation images: Karpathy's val")
    job.report.count("images, minival", len(images), MINIVAL_IMAGES)
    return images


def write_minival_scores(job: Job, validation: dict[int, tuple[int, list[str]]], minival: set[int]) -> None:
    """vqa/minival.json, {"question_id", "label": {answer: score}}, as LXMERT and mPLUG publish it."""
    absent = sorted(minival - {image for image, _ in validation.values()})
    if absent:
        job.report.warn(f"{len(absent):,} images of the minival have no question in val2014; first: {absent[0]}")
    with job.writing("vqa/minival.json") as write:
        for number, (_, answers) in validation.items():
            write({"question_id": number, "label": soft_scores(answers)})


def write_answer_list(job: Job, answers: Counter) -> None:
    """The answers that are the most frequent one of at least nine questions of train and val, most common first."""
    common = [answer for answer, count in answers.most_common() if answer and count >= MIN_OCCURRENCES]
    job.report.count("answers in the list", len(common), ANSWERS)
    if not common:
        job.report.warn(f"no answer occurs {MIN_OCCURRENCES} times: vqa/answer_list.json is not written")
        return
    with job.writing("vqa/answer_list.json") as write:
        for answer in common:
            write(answer)


# ------------------------------------------------------------------------------------------------ labels and words


class Extras:
    """Object labels and OCR tokens by image; images are recognised by COCO's id, whatever path names them."""

    def __init__(self, job: Job, found: dict[str, Path]):
        self.job = job
        self.labels, self.words = {}, {}
        for name, path in found.items():
            if name.startswith("--objects"):
                self.labels |= self._read(path, "object_label", _labels)
            elif name.startswith("--ocr"):
                self.words |= self._read(path, "ocr", _words)
        self.with_labels = self.with_words = 0

    def _read(self, path: Path, key: str, convert: Callable) -> dict:
        content, result = read_json(path), {}
        if isinstance(content, list):
            content = {entry.get("image", ""): entry.get(key) for entry in content if isinstance(entry, dict)}
        if not isinstance(content, dict):
            raise UserError(f"{path}: is neither a map of images nor a list of entries")
        for image, value in content.items():
            number = int(image) if re.fullmatch(r"\d+", image) else coco_number(image if "." in image else f"{image}.")
            try:
                result[self._identity(image, number)] = convert(value)
            except (TypeError, ValueError) as error:
                self.job.report.odd(f"image whose {key} cannot be read", f"{path.name}: {image} ({error})")
        return result

    @staticmethod
    def _identity(image: str, number: int | None):
        return image if number is None else number

    def added(self, entry: dict) -> dict:
        number = coco_number(entry["image"])
        if self.labels.get(number):
            self.with_labels += 1
            entry["object_label"] = self.labels[number]
        if self.words.get(number):
            self.with_words += 1
            entry["ocr"] = self.words[number]
        return entry

    def report(self) -> None:
        for name, known, used in (
            ("object labels", self.labels, self.with_labels),
            ("OCR tokens", self.words, self.with_words),
        ):
            if known:
                self.job.report.count(f"questions with {name}", used)
            if known and not used:
                self.job.report.warn(f"no question's image is among those with {name}: are they named as COCO's files?")


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


def soft_scores(answers: Iterable[str]) -> dict[str, float]:
    """{answer: the official accuracy of giving it}, of ten annotators: 0.3, 0.6, 0.9, then 1."""
    return {answer: round(leave_one_out(count), 6) for answer, count in Counter(answers).items()}
