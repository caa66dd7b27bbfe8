"""VQA's annotation files: entries of ALBEF's and mPLUG's layout, official question files, and the answers to them.

Official questions take their answers from the annotation file beside them (v2_OpenEnded_mscoco_val2014_questions.json:
v2_mscoco_val2014_annotations.json). Answers to validate with may also lie in further official annotation files and in
LXMERT's and mPLUG's minival file ({"question_id", "label": {answer: score}}).
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from dataset.annotations import (
    IDENTIFIER,
    TEXT,
    Files,
    Place,
    Source,
    check_kind,
    check_texts,
    file_list,
    located_entries,
    strings,
    whole_number,
)
from dataset.files import json_list
from dataset.official import ANNOTATORS, is_vqa_question, vqa_annotation_name, vqa_entry, vqa_split
from dataset.text import clean_question, has_word
from utils import UserError, find_file, shown


def load_training_questions(source: Source, left_out: Files = (), official: Files = ()) -> tuple[list[dict], int]:
    """(the entries to train on, the number left out): those that are among the questions of the files `left_out`.

    official: annotation files for official question files that have none beside them.

    The same question has the same id and the same image; if a training entry has no id, the same words and the same
    image. Raises UserError naming file, entry and key; if an id of one data set names different images in `source` and
    `left_out`; and if nothing remains.
    """
    held_ids, held_words, image_of = set(), set(), {}
    alone = partial(_official_question, annotations=lambda path: {})
    for where, entry in located_entries(replace(source, files=left_out), "vqa_eval", alone):
        identifier, image = str(entry["question_id"]), entry["image"]
        held_ids.add((identifier, image))
        held_words.add((clean_question(entry["question"]), image))
        image_of[entry.get("dataset"), identifier] = image, where
    entries, count = [], 0
    answers = cache(partial(_training_answers, official=official))
    answered = partial(_official_question, annotations=answers, required=True)
    for where, entry in located_entries(source, "vqa_train", answered):
        problem = ocr_problem(entry)
        if not any(map(has_word, strings(entry["answer"]))):
            problem = "'answer' is blank"
        image, number = entry["image"], entry.get("question_id")
        if number is None:
            held_out = bool(held_words) and (clean_question(entry["question"]), image) in held_words
        else:
            held_out = (str(number), image) in held_ids
            other, place = image_of.get((entry.get("dataset"), str(number)), (image, ""))
            if not held_out and other != image:
                problem = (
                    f"question_id {shown(number)} asks about {image}, but about {other} in {place}: a data set's ids "
                    "must be unique over data.train and data.val, so that validation is never trained on "
                    "(data.train_on_minival: true trains on all)"
                )
        if problem:
            raise UserError(f"{where}: {problem}")
        count += held_out
        if not held_out:
            entries.append(entry)
    if not entries:
        raise UserError("data.train: all questions are those of data.val; set data.train_on_minival, or other files")
    return entries, count


def load_questions(source: Source) -> list[dict]:
    """The entries of an evaluation split, each `question_id` once, with or without answers; those of official question
    files have the answers of the annotation file beside them. A question without a word stays: it needs an answer."""
    entries, first = [], {}
    convert = partial(_official_question, annotations=cache(_answers_beside))
    for where, entry in located_entries(source, "vqa_eval", convert):
        identifier = entry["question_id"]
        problem = _answers_problem(entry.get("answer"), identifier) or ocr_problem(entry)
        if first.setdefault(identifier, where) != where:
            problem = f"question_id {shown(identifier)} occurs more than once, first in {first[identifier]}"
        if problem:
            raise UserError(f"{where}: {problem}")
        entries.append(entry)
    return entries


def ocr_problem(entry: dict) -> str | None:
    """What is wrong with an entry's `ocr`, or None."""
    ocr = entry.get("ocr") or []
    pairs = isinstance(ocr, list) and all(isinstance(item, list) and len(item) == 2 for item in ocr)
    if pairs and all(isinstance(token, str) for _, token in ocr):
        return None
    return f"'ocr' must be a list of [position, token], not {shown(ocr)}"


def read_answer_list(path: str | Path) -> list[str]:
    """A JSON list of different answers, for ranking."""
    path = find_file(path, "data.answer_list")
    answers = json_list(path)
    wrong = [answer for answer in answers if not isinstance(answer, str) or not answer.strip()]
    twice = [] if wrong else [answer for answer, count in Counter(answers).items() if count > 1]
    if not answers or wrong or twice:
        examples = f", not {shown((wrong or twice)[0])}" if answers else ""
        raise UserError(f"{path}: an answer list is a JSON list of different texts with a word{examples}")
    return answers


# ------------------------------------------------------------------------------------------------- official questions


def _official_question(
    entry: dict, where: Place, annotations: Callable[[Path], Mapping], required: bool = False
) -> list[dict]:
    """An entry of an official question file with its answers; one of another layout as it is.

    annotations: question file -> {question id: annotation}; required: a question without one is a UserError.
    """
    if not is_vqa_question(entry):
        return [entry]
    check_kind(entry.get("question_id"), "question_id", IDENTIFIER, where)
    annotation = annotations(where.path).get(entry["question_id"])
    if annotation is None and required:
        raise UserError(f"{where}: question_id {shown(entry['question_id'])} has no annotation, thus no answer")
    return [vqa_entry(entry, annotation, vqa_split(where.header, where.path.name))]


def _answers_beside(path: Path) -> dict:
    """{question id: annotation} of the file that belongs to the question file `path`; none if it is not beside it."""
    pair = path.with_name(vqa_annotation_name(path.name))
    return _by_id([pair], "annotations", _annotation) if pair != path and pair.is_file() else {}


def _training_answers(path: Path, official: Files) -> dict:
    """As `_answers_beside`, else the annotations of the files `official`."""
    if not (found := _answers_beside(path)) and not official:
        pair = vqa_annotation_name(path.name)
        raise UserError(f"{path}: its answers are not there; put {pair} beside it, or name that file in data.official")
    return found or _by_id(official, "annotations", _annotation)


def _annotation(entry: dict) -> dict:
    """What an entry takes of an official annotation."""
    answers = _official_reference(entry)["reference"]
    kept = {key: entry[key] for key in ("image_id", "answer_type", "question_type") if key in entry}
    return {**kept, "answers": [{"answer": sys.intern(answer)} for answer in answers]}


# ------------------------------------------------------------------------------------------------- references


def load_references(
    entries: list[dict], files: Files, official: Files = (), score_files: Files = ()
) -> tuple[list[str | list[str] | dict[str, float]] | None, list[str | None], list[str | None], str]:
    """What the questions `entries` (of `files`, for errors) are judged by, in their order: (the annotators' answers or
    {answer: score}, None if no question has any; answer types; question types; where the answers come from, in words).

    Each is from the first of these that has it: official annotation files, the entry's own `answer`, lists of
    {"question_id", "label": {answer: score}}. Raises UserError naming file and entry, and if some questions have
    answers and others none.
    """
    sources = {
        "official files": _by_id(official, "annotations", _official_reference),
        "entries": {entry["question_id"]: _reference(entry, entry.get("answer")) for entry in entries},
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
    return None if used["nothing"] else answers, types["answer_type"], types["question_type"], origin


def _reference(entry: dict, answers) -> dict:
    return {key: entry.get(key) for key in ("answer_type", "question_type")} | {"reference": answers}


def _official_reference(entry: dict) -> dict:
    answers = [item["answer"] for item in entry["answers"]]
    if problem := _answers_problem(answers, entry["question_id"]):
        raise ValueError(problem)
    return _reference(entry, answers)


def _score_reference(entry: dict) -> dict:
    if not all(type(score) in (int, float) and 0 <= score < float("inf") for score in entry["label"].values()):
        raise ValueError("label maps an answer to something that is no score")
    return _reference(entry, entry["label"])


def _answers_problem(answers, identifier: str | int) -> str | None:
    """What is wrong with the answers to judge by: they are ten annotators' or a single one, or missing."""
    if answers is None or isinstance(answers, str):
        return None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "'answer' must be a string or a list of strings"
    if len(answers) not in (1, ANNOTATORS):
        return (
            f"question {shown(identifier)} has {len(answers)} answers: the official accuracy needs those of "
            f"{ANNOTATORS} annotators, or a single one, which is compared exactly"
        )
    return None


def _by_id(files: Files, key: str | None, convert: Callable[[dict], dict]) -> dict:
    """{question id: convert(entry)} of the files' lists (under `key`, if any)."""
    found = {}
    for path in (find_file(name, "annotation file") for name in file_list(files)):
        for index, entry in enumerate(json_list(path, key)):
            where = f"{path}: entry {index}"
            check_texts(entry, where)
            try:
                reference, identifier = convert(entry), whole_number(entry["question_id"])
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(f"{where} is not as expected ({shown(error)})") from None
            check_kind(identifier, "question_id", IDENTIFIER, where)
            for kind in ("answer_type", "question_type"):
                check_kind(entry.get(kind) or "", kind, TEXT, where)
            if found.setdefault(identifier, reference) != reference:
                raise UserError(f"{where}: question_id {shown(identifier)} has other answers in an earlier entry")
    return found
