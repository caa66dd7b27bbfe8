"""VQA's annotation files: entries of ALBEF's and mPLUG's layout, official question files, and the answers to them.

Official questions take their answers from the annotation file beside them (v2_OpenEnded_mscoco_val2014_questions.json:
v2_mscoco_val2014_annotations.json). Answers to validate with may also lie in further official annotation files and in
LXMERT's and mPLUG's minival file ({"question_id", "label": {answer: score}}).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from dataset.annotations import Files, Place, Source, check_texts, file_list, located_entries, strings, whole_number
from dataset.files import json_list
from dataset.official import ANNOTATORS, vqa_entry, vqa_split
from dataset.text import has_word
from utils import UserError, find_file, one_line, shown


def load_training_questions(source: Source, left_out: Files = (), official: Files = ()) -> tuple[list[dict], int]:
    """(the entries to train on, the number left out): those that are among the questions of the files `left_out`, with
    the same id about the same image.

    official: annotation files for official question files that have none beside them.
    Raises UserError naming file, entry and key; if an id of one data set names different images in `source` and
    `left_out`; and if nothing remains.
    """
    convert = partial(_official_question, annotations=lambda path: {})
    held_out, image_of = set(), {}
    for where, entry in located_entries(replace(source, files=left_out), "vqa_eval", convert=convert):
        held_out.add((entry["question_id"], entry["image"]))
        image_of[entry.get("dataset"), entry["question_id"]] = entry["image"], where
    entries, count = [], 0
    convert = partial(_official_question, annotations=cache(partial(_annotations, official=official)))
    for where, entry in located_entries(source, "vqa_train", convert=convert):
        _check_ocr(entry, where)
        if not any(map(has_word, strings(entry["answer"]))):
            raise UserError(f"{where}: 'answer' is blank")
        number, image = entry.get("question_id"), entry["image"]
        if (number, image) in held_out:
            count += 1
            continue
        other, place = image_of.get((entry.get("dataset"), number), (image, ""))
        if other != image:
            raise UserError(
                f"{where}: question_id {shown(number)} asks about {image}, but about {other} in {place}: a data set's "
                "ids must be unique over data.train and data.val, so that validation is never trained on"
            )
        entries.append(entry)
    if not entries:
        raise UserError("data.train: all questions are those of data.val; set data.train_on_minival, or other files")
    return entries, count


def load_questions(source: Source) -> list[dict]:
    """The entries of an evaluation split, each `question_id` once, with or without answers; those of official question
    files have the answers of the annotation file beside them. A question without a word stays: it needs an answer."""
    entries, first = [], {}
    convert = partial(_official_question, annotations=cache(_annotations))
    for where, entry in located_entries(source, "vqa_eval", convert=convert):
        _check_ocr(entry, where)
        identifier = entry["question_id"]
        if first.setdefault(identifier, where) != where:
            raise UserError(
                f"{where}: question_id {shown(identifier)} occurs more than once, first in {first[identifier]}"
            )
        if problem := _wrong_number(entry.get("answer")):
            raise UserError(f"{where}: {problem}")
        entries.append(entry)
    return entries


def _check_ocr(entry: dict, where: Place) -> None:
    """UserError if an entry's `ocr`, which it may lack, is no list of a position and a text each."""
    try:
        if all(isinstance(token, str) for _, token in entry.get("ocr", [])):
            return
    except (TypeError, ValueError):
        pass
    raise UserError(f"{where}: 'ocr' must be a list of [position, token], not {shown(entry['ocr'])}")


def read_answer_list(path: str | Path) -> list[str]:
    """A JSON list of different answers, for ranking."""
    path = find_file(path, "data.answer_list")
    answers = json_list(path)
    if not answers or len({text for text in answers if isinstance(text, str) and text.strip()}) < len(answers):
        raise UserError(f"{path}: an answer list is a JSON list of different texts, none of them blank")
    return answers


def _official_question(entry: dict, where: Place, annotations: Callable[[Path], Mapping]) -> dict:
    """An entry of an official question file with its answers; one of another layout as it is. annotations: question
    file -> {question id: annotation}."""
    if "image" in entry or "image_id" not in entry:  # by which official questions name their image
        return entry
    annotation = annotations(where.path).get(entry["question_id"])
    return vqa_entry(entry, annotation, vqa_split(where.header, where.path.name))


def _annotations(path: Path, official: Files = ()) -> dict:
    """{question id: annotation} for the question file `path`, of the annotations beside it, else of `official`."""
    pair = path.with_name(path.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
    return _by_id([pair] if pair != path and pair.is_file() else official, "annotations", _official_answers)


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
        "official files": _by_id(official, "annotations", _official_answers),
        "entries": {entry["question_id"]: {**entry, "reference": entry.get("answer")} for entry in entries},
        "score files": _by_id(score_files, None, lambda entry: entry["label"]),
    }
    used: Counter[str] = Counter()
    columns = {"reference": [], "answer_type": [], "question_type": []}
    for identifier in sources["entries"]:
        known = {name: found.get(identifier, {}) for name, found in sources.items()}
        used[next((name for name, found in known.items() if found.get("reference") is not None), "nothing")] += 1
        for key, column in columns.items():
            column.append(next((found[key] for found in known.values() if found.get(key) is not None), None))
    answers = columns["reference"]
    if len(used) > 1 and used["nothing"]:
        missing = entries[answers.index(None)]["question_id"]
        raise UserError(f"{files}: question {shown(missing)} has no answers, others have; all or none must")
    origin = ", ".join(f"{name} ({count} questions)" for name, count in used.items())
    return None if used["nothing"] else answers, columns["answer_type"], columns["question_type"], origin


def _official_answers(entry: dict) -> list[str]:
    answers = [item["answer"] for item in entry["answers"]]
    if problem := _wrong_number(answers):
        raise ValueError(problem)
    return answers


def _wrong_number(answers: str | list[str] | None) -> str | None:
    """What is wrong with the number of answers to judge by."""
    if not isinstance(answers, list) or len(answers) in (1, ANNOTATORS):
        return None
    return (
        f"has {len(answers)} answers: the official accuracy needs those of {ANNOTATORS} annotators, or a single one, "
        "which is compared exactly"
    )


def _by_id(files: Files, key: str | None, answers_of: Callable[[dict], list[str] | dict]) -> dict[str | int, dict]:
    """{question id: its entry with `reference`, which is `answers_of` it} of the files' lists (under `key`, if any)."""
    found = {}
    for path in (find_file(name, "annotation file") for name in file_list(files)):
        for index, entry in enumerate(json_list(path, key)):
            where = f"{path}: entry {index}"
            check_texts(entry, where)
            try:
                found[whole_number(entry["question_id"])] = {**entry, "reference": answers_of(entry)}
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(f"{where} is not as expected ({type(error).__name__}: {one_line(error)})") from None
    return found
