"""Annotation files: every layout that the stages read, checked entry by entry and resolved to the images' paths.

    {"image", "caption": str | [str]}                                                 pre-training
    {"filepath", "filename", "sentences": [{"raw"}], "cocoid" | "imgid", "split"}     Karpathy's files: retrieval and
                                                                                      captioning
    {"image", "caption", "image_id"}  and  {"image", "caption": [str]}                retrieval: train, and val and test
    {"image", "caption": str | [str], "image_id"}                                     captioning: plain lists (ALBEF,
    {"image", "caption": [str], "img_id", "domain"}                                   BLIP) and NoCaps
    {"image", "question", "question_id", "dataset": "vqa" | "vg" | ..., "answer": [str x 10] | str,
     "object_label": "dog&&frisbee", "ocr": [[position, token], ...]}                 VQA (ALBEF, mPLUG)
    {"question_id", "question", "image_id"}                                           VQA's official question files

They stand in JSON lists or in what dataset.tables reads. Without an `image_id`, an image's path is its id.

Of Karpathy's files only the entries of the asked `split` are taken (train: restval too), as of captioning's other
entries where they name one; these may carry `object_label` too. Official questions take their answers from the
annotation file beside them (v2_OpenEnded_mscoco_val2014_questions.json: v2_mscoco_val2014_annotations.json). VQA's
references may also lie in further official annotation files and in LXMERT's and mPLUG's minival file
({"question_id", "label": {answer: score}}).
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.entries import (
    IDENTIFIER,
    TEXT,
    Files,
    Place,
    Source,
    check_encodable,
    check_kind,
    file_list,
    located_entries,
    read_json,
    strings,
)
from dataset.official import (
    ANNOTATORS,
    KARPATHY_SPLITS,
    is_karpathy,
    is_vqa_question,
    karpathy_candidates,
    karpathy_captions,
    karpathy_folder,
    karpathy_pairs,
    karpathy_path,
    karpathy_set,
    vqa_annotation_name,
    vqa_entry,
    vqa_split,
)
from dataset.text import clean_question, has_word
from utils import UserError, find_file, shown

DOMAINS = ("in", "near", "out")  # of NoCaps; its files say "near-domain"
COCO_NAME = re.compile(r"COCO_\w+_0*(\d{1,18})\.\w+$")


def load_annotations(source: Source, kind: str) -> list[dict]:
    """The entries of a kind of file (a key of KINDS), `image` replaced by the path to open.

    Raises UserError naming the file, the entry's index and the key.
    """
    return [entry for _, entry in located_entries(source, kind)]


def _official(function: Callable, where: Place, *arguments):
    """`function` of dataset/official.py, whose ValueErrors say in a few words what an entry lacks."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise UserError(f"{where}{':' if str(error).startswith(chr(39)) else ''} {error}") from None


def _check_karpathy_kinds(entry: dict, where: Place) -> None:
    for name in ("filename", "filepath", "dataset"):
        if entry.get(name) is not None:
            check_kind(entry[name], name, TEXT, where)


def _in_split(entry: dict, split: str) -> bool:
    """Whether an entry is of a split ("train", "val" or "test"); one that names none is."""
    return "split" not in entry or entry["split"] in KARPATHY_SPLITS[split]


def _some(entries: list[dict], source: Source, split: str) -> list[dict]:
    """The entries, where there are any."""
    if not entries:
        raise UserError(f"{source.files}: no entry has the split {' or '.join(KARPATHY_SPLITS[split])}")
    return entries


def _one_image_per_id(located: Iterable[tuple[Place, dict]], one_id_per_image: bool = False) -> list[dict]:
    """The entries, after checking that no `image_id` stands for two images (and, if asked, no image for two ids)."""
    entries, image_of, id_of = [], {}, {}
    for where, entry in located:
        identifier, image = entry["image_id"], os.path.normpath(entry["image"])
        first, known = image_of.setdefault(identifier, (where, image))
        if known != image:
            raise UserError(
                f"{where}: image_id {shown(identifier)} names {image}, but {known} in {first}; over all files, "
                "an id must stand for one image (have two files counted from 0?)"
            )
        if one_id_per_image:
            first, other = id_of.setdefault(image, (where, identifier))
            if other != identifier:
                raise UserError(
                    f"{where}: {image} has the image_id {shown(identifier)}, but {shown(other)} in {first}; "
                    "an image needs one id, or it would be its own negative"
                )
        entries.append(entry)
    return entries


# ------------------------------------------------------------------------------------------------- retrieval


def load_pairs(source: Source) -> list[dict]:
    """The entries to fine-tune retrieval on; each `image_id` (else: path) names one image, and each image has one."""

    def convert(entry: dict, where: Place) -> list[dict]:
        return _karpathy_retrieval(entry, where, "train")

    located = list(located_entries(source, "retrieval_train", convert=convert))
    for _, entry in located:
        if entry.get("image_id") is None:
            entry["image_id"] = os.path.normpath(entry["image"])
    return _some(_one_image_per_id(located, one_id_per_image=True), source, "train")


def load_candidates(source: Source, split: str) -> list[dict]:
    """The entries {image, caption} of retrieval's "val" or "test", whose captions are ranked for the images."""

    def convert(entry: dict, where: Place) -> list[dict]:
        return _karpathy_retrieval(entry, where, split)

    return _some([entry for _, entry in located_entries(source, "retrieval_eval", convert=convert)], source, split)


def _karpathy_retrieval(entry: dict, where: Place, split: str) -> list[dict]:
    """A plain entry as it is; Karpathy's as pairs (train) or as one image with its captions, if it is of the split.

    An image whose captions are all blank is left out, as tools.prepare leaves it out.
    """
    if not is_karpathy(entry):
        return [entry]
    if not _in_split(entry, split):
        return []
    _check_karpathy_kinds(entry, where)
    name = karpathy_set(entry, where.header)
    if split == "train":
        found = _official(karpathy_pairs, where, entry, name, karpathy_folder(name))
    else:
        found = [_official(karpathy_candidates, where, entry, name, karpathy_folder(name))]
    return [item for item in found if item["caption"]]


# ------------------------------------------------------------------------------------------------- captioning


def load_captions(source: Source, split: str, need_ids: bool = False) -> list[dict]:
    """The entries of a split ("train", "val" or "test") as {image, captions, image_id, labels, domain}.

    image: the path to open; captions: list of str, as they stand (empty where a test set publishes none);
    image_id: the entry's, else COCO's number in the file name, else the image as its file names it; labels: list of
    str; domain: one of DOMAINS or missing. need_ids: no two images may have the same `image_id`.
    Raises UserError naming file, entry and key.
    """

    def plain(entry: dict, where: Place) -> list[dict]:
        return [_plain_entry(entry, where)] if _in_split(entry, split) else []

    located = located_entries(source, "caption", convert=plain)
    return _some(_one_image_per_id(located) if need_ids else [entry for _, entry in located], source, split)


def split_labels(object_label: str) -> list[str]:
    """mPLUG's "dog&&frisbee&&dog" -> ["dog", "frisbee"]"""
    return list(dict.fromkeys(label.strip() for label in object_label.split("&&") if label.strip()))


def _plain_entry(entry: dict, where: Place) -> dict:
    """Any of the three kinds of entry in the form that `load_captions` returns; Karpathy's without blank captions."""
    image, captions, dataset = entry.get("image"), entry.get("caption", []), entry.get("dataset")
    if is_karpathy(entry):
        _check_karpathy_kinds(entry, where)
        dataset = karpathy_set(entry, where.header)
        captions = [caption for caption in _official(karpathy_captions, where, entry) if caption]
        image = _official(karpathy_path, where, entry, karpathy_folder(dataset))
    if image is None:
        raise UserError(f"{where} has no 'image', and no 'filename' with 'sentences'; see dataset/annotations.py")
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where}: 'caption' must be a string or a list of strings")
    labels = entry.get("object_label") or ""
    if not isinstance(labels, str):
        raise UserError(f"{where}: 'object_label' must be a string, labels joined by && (mPLUG's format)")
    plain = {"image": image, "dataset": dataset, "captions": captions, "labels": split_labels(labels)}
    plain |= {"image_id": _image_id(entry, image, where), "domain": _domain(entry.get("domain"), where)}
    return {key: value for key, value in plain.items() if value is not None}


def _image_id(entry: dict, image: str, where: Place) -> str | int:
    for key in ("image_id", "img_id", "cocoid", "imgid"):
        if entry.get(key) is not None:
            check_kind(entry[key], key, IDENTIFIER, where)
            return entry[key]
    number = COCO_NAME.search(str(image))
    return int(number[1]) if number else image


def _domain(name, where: Place) -> str | None:
    if name is None:
        return None
    short = name.removesuffix("-domain") if isinstance(name, str) else None
    if short not in DOMAINS:
        raise UserError(
            f"{where}: 'domain' is {shown(name)}, it must be one of {', '.join(DOMAINS)} (or in-domain, ...)"
        )
    return short


# ------------------------------------------------------------------------------------------------- VQA


def load_training_questions(source: Source, left_out: Files = (), official: Files = ()) -> tuple[list[dict], int]:
    """(the entries to train on, the number left out): those that are among the questions of the files `left_out`.

    official: annotation files for official question files that have none beside them.

    The same question has the same id and the same image; where a training entry has no id, the same words and the
    same image. Raises UserError naming file, entry and key; where an id of one data set names different images in
    `source` and `left_out`, so that nothing can be said; and where nothing remains.
    """
    held_ids, held_words, image_of = set(), set(), {}
    held_out_questions = located_entries(replace(source, files=left_out), "vqa_eval", convert=_question_alone)
    for where, entry in held_out_questions if left_out else ():
        identifier, image = str(entry["question_id"]), os.path.normpath(entry["image"])
        held_ids.add((identifier, image))
        held_words.add((clean_question(entry["question"]), image))
        image_of[entry.get("dataset"), identifier] = image, where
    entries, count = [], 0
    for where, entry in located_entries(source, "vqa_train", check_training, OfficialAnswers(official, required=True)):
        image = os.path.normpath(entry["image"])
        if entry.get("question_id") is None:
            held_out = bool(held_words) and (clean_question(entry["question"]), image) in held_words
        else:
            identifier = str(entry["question_id"])
            held_out = (identifier, image) in held_ids
            if not held_out and (other := image_of.get((entry.get("dataset"), identifier))):
                raise UserError(
                    f"{where}: question_id {shown(entry['question_id'])} asks about {image}, but about {other[0]} in "
                    f"{other[1]}: a data set's ids must be unique over data.train and data.val, so that validation is "
                    "never trained on (data.train_on_minival: true trains on all and skips this check)"
                )
        count += held_out
        if not held_out:
            entries.append(entry)
    if not entries:
        raise UserError("data.train: all questions are those of data.val; set data.train_on_minival, or other files")
    return entries, count


def load_questions(source: Source, official: Files = ()) -> list[dict]:
    """The entries of an evaluation split, each `question_id` once, with or without answers; those of official question
    files have the answers of the annotation file beside them, unless it is among `official` (see `load_references`).
    """
    entries, first = [], {}
    for where, entry in located_entries(source, "vqa_eval", check_reference, OfficialAnswers(official)):
        identifier = entry["question_id"]
        if first.setdefault(identifier, where) != where:
            raise UserError(
                f"{where}: question_id {shown(identifier)} occurs more than once, first in {first[identifier]}; "
                "each question of a split needs its own"
            )
        entries.append(entry)
    return entries


class OfficialAnswers:
    """Makes entries of official questions and their annotations; entries of other layouts stay as they are.

    The annotations are those of the file that the pair's names put beside the question file. required: else those of
    the files `official`, and a question without any is a UserError; not required: a pair that is among `official` is
    not read, since `load_references` reads it.
    """

    def __init__(self, official: Files = (), required: bool = False):
        self.official, self.required = file_list(official), required
        self._read: dict[Path | None, dict] = {}  # question file (None: all of `official`) -> {question id: annotation}

    def __call__(self, entry: dict, where: Place) -> list[dict]:
        if not is_vqa_question(entry):
            return [entry]
        check_kind(entry.get("question_id"), "question_id", IDENTIFIER, where)
        annotation = self._annotations(where.path).get(entry["question_id"])
        if annotation is None and self.required:
            raise UserError(f"{where}: question_id {shown(entry['question_id'])} has no annotation, thus no answer")
        return [_question_entry(entry, where, annotation)]

    def _annotations(self, path: Path) -> dict:
        if path not in self._read:
            self._read[path] = self._find(path)
        return self._read[path]

    def _find(self, path: Path) -> dict:
        pair = path.with_name(vqa_annotation_name(path.name))
        if pair != path and pair.is_file():
            read_later = not self.required and any(Path(find_file(name)).samefile(pair) for name in self.official)
            return {} if read_later else _by_id([pair], "annotations", _with_answers)
        if not self.required:
            return {}
        if not self.official:
            raise UserError(
                f"{path}: its answers are not there; put {pair.name} beside it, or name that file in data.official"
            )
        if None not in self._read:
            self._read[None] = _by_id(self.official, "annotations", _with_answers)
        return self._read[None]


def _question_alone(entry: dict, where: Place) -> list[dict]:
    return [_question_entry(entry, where, None) if is_vqa_question(entry) else entry]


def _question_entry(entry: dict, where: Place, annotation: dict | None) -> dict:
    split = _official(vqa_split, where, where.header, where.path.name)
    return _official(vqa_entry, where, entry, annotation, split)


@dataclass(frozen=True)
class References:
    """What a split's questions are judged by, in their order.

    answers: per question the annotators' answers (str or list of str) or {answer: score}; None where no question has
    any. answer_types, question_types: strings, or None where nothing names them. origin: where the answers come from,
    in words.
    """

    answers: list[str | list[str] | dict[str, float]] | None
    answer_types: list[str | None]
    question_types: list[str | None]
    origin: str


def load_references(entries: list[dict], files: Files, official: Files = (), score_files: Files = ()) -> References:
    """The references of the questions `entries` (of `files`, for errors), each from the first of these that has it:
    official annotation files, its own `answer`, lists of {"question_id", "label": {answer: score}}.

    Raises UserError naming file and entry, and where some questions have answers and others none.
    """
    sources = {
        "official files": _by_id(official, "annotations", _official_reference),
        "entries": {entry["question_id"]: _own_reference(entry) for entry in entries},
        "score files": _by_id(score_files, None, _score_reference),
    }
    used: Counter[str] = Counter()
    answers, types = [], {"answer_type": [], "question_type": []}
    for entry in entries:
        known = {name: found[entry["question_id"]] for name, found in sources.items() if entry["question_id"] in found}
        name = next((name for name, found in known.items() if found["reference"] is not None), "nothing")
        used[name] += 1
        answers.append(known[name]["reference"] if name != "nothing" else None)
        for key, column in types.items():
            column.append(next((found[key] for found in known.values() if found[key] is not None), None))
    if len(used) > 1 and used["nothing"]:
        missing = entries[answers.index(None)]["question_id"]
        raise UserError(f"{files}: question {shown(missing)} has no answers, others have; all or none must")
    origin = ", ".join(f"{name} ({count} questions)" for name, count in used.items())
    return References(None if used["nothing"] else answers, types["answer_type"], types["question_type"], origin)


def read_answer_list(path: str | Path) -> list[str]:
    """A JSON list of different answers, for ranking; UserError naming what is wrong."""
    path = find_file(path, "data.answer_list")
    answers = read_json(path)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{path}: an answer list is a JSON list of strings with at least one")
    first: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{path}: entry {number} ({shown(answer)}) is no answer")
        check_encodable({"answer": answer}, ["answer"], f"{path}: entry {number}")
        if answer in first:
            raise UserError(f"{path}: {shown(answer)} stands there twice (entries {first[answer]} and {number})")
        first[answer] = number
    return answers


def check_question(entry: dict) -> str | None:
    """What is wrong with an entry beyond missing keys, or None."""
    if not has_word(clean_question(entry["question"])):
        return f"the question {shown(entry['question'])} has no word"
    if not isinstance(entry.get("object_label") or "", str):
        return "'object_label' must be labels joined by &&, such as \"dog&&frisbee\""
    ocr = entry.get("ocr") or []
    if not isinstance(ocr, list):
        return "'ocr' must be a list of [position, token]"
    for item in ocr:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[1], str)):
            return f"'ocr' must hold [position, token] pairs, not {shown(item)}"
    return None


def check_training(entry: dict) -> str | None:
    """As `check_question`; and some annotator must have said something."""
    if problem := check_question(entry):
        return problem
    return None if any(has_word(answer) for answer in strings(entry["answer"])) else "'answer' is blank"


def check_reference(entry: dict) -> str | None:
    """As `check_question`; and answers, where there are some, are ten annotators' or a single one."""
    answers = entry.get("answer")
    if answers is None or isinstance(answers, str):
        return check_question(entry)
    return _answers_problem(answers, entry["question_id"]) or check_question(entry)


def _answers_problem(answers, identifier: str | int) -> str | None:
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "'answer' must be a string or a list of strings"
    if len(answers) not in (1, ANNOTATORS):
        return (
            f"question {shown(identifier)} has {len(answers)} answers: the official accuracy needs those of "
            f"{ANNOTATORS} annotators, or a single one, which is compared exactly"
        )
    return None


def _own_reference(entry: dict) -> dict:
    return {key: entry.get(key) for key in ("answer_type", "question_type")} | {"reference": entry.get("answer")}


def _official_reference(entry: dict) -> dict:
    answers = [item["answer"] for item in entry["answers"]]
    if problem := _answers_problem(answers, entry["question_id"]):
        raise ValueError(problem)
    return _own_reference({**entry, "answer": answers})


def _with_answers(entry: dict) -> dict:
    """What an entry takes of an official annotation."""
    answers = _official_reference(entry)["reference"]
    kept = {key: entry[key] for key in ("image_id", "answer_type", "question_type") if key in entry}
    return {**kept, "answers": [{"answer": sys.intern(answer)} for answer in answers]}


def _score_reference(entry: dict) -> dict:
    label = entry["label"]
    if not isinstance(label, dict):
        raise TypeError("label is no map")
    if not all(type(score) in (int, float) and 0 <= score < float("inf") for score in label.values()):
        raise ValueError("label maps an answer to something that is no score")
    return _own_reference({**entry, "answer": label})


def _by_id(files: Files, key: str | None, convert: Callable[[dict], dict]) -> dict:
    """{question id: convert(entry)} of the files' lists (under `key`, if any)."""
    found, first = {}, {}
    for name in file_list(files):
        path = find_file(name, "annotation file")
        content = read_json(path)
        entries = content.get(key) if key and isinstance(content, dict) else content
        if not isinstance(entries, list):
            raise UserError(f"{path}: holds no list{f' under {key!r}' if key else ''}; is it the right file?")
        for index, entry in enumerate(entries):
            where = f"{path}: entry {index}"
            try:
                reference, identifier = convert(entry), entry["question_id"]
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(f"{where} is not as expected ({shown(error)})") from None
            _check_reference_entry(entry, where)
            if found.setdefault(identifier, reference) != reference:
                raise UserError(
                    f"{where}: question_id {shown(identifier)} occurs more than once with different answers, first in "
                    f"{first[identifier]}"
                )
            first.setdefault(identifier, where)
    return found


def _check_reference_entry(entry: dict, where: str) -> None:
    """UserError where the id, types or texts of an official or score file's entry cannot be used."""
    check_kind(entry["question_id"], "question_id", IDENTIFIER, where)
    for key in ("answer_type", "question_type"):
        if entry.get(key) is not None:
            check_kind(entry[key], key, TEXT, where)
    check_encodable(entry, ("question_id", "answers", "label", "answer_type", "question_type"), where)
