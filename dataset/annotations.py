"""Annotation files: every layout that the stages read, checked entry by entry and resolved to the images' paths.

    {"image", "caption": str | [str]}                                                 pre-training
    {"image", "caption", "image_id"}  and  {"image", "caption": [str]}                retrieval: train, and val and test
    {"filepath", "filename", "sentences": [{"raw"}], "cocoid" | "imgid", "split"}     captioning: Karpathy's file,
    {"image", "caption": str | [str], "image_id"}                                     plain lists (ALBEF, BLIP)
    {"image", "caption": [str], "img_id", "domain"}                                   and NoCaps
    {"image", "question", "question_id", "dataset": "vqa" | "vg" | ..., "answer": [str x 10] | str,
     "object_label": "dog&&frisbee", "ocr": [[position, token], ...]}                 VQA (ALBEF, mPLUG)

Captioning's entries may carry `object_label` too, and where they name a `split`, only those of the asked one are
taken. VQA's references may also lie in the official annotation files (v2_mscoco_val2014_annotations.json) and in
LXMERT's and mPLUG's minival file ({"question_id", "label": {answer: score}}).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.text import clean_question
from utils import UserError, find_file

Files = str | Path | Sequence[str | Path]

# Required keys of an entry and the kinds of value they may have; other keys are kept as they are.
TEXT = (str,)
TEXT_OR_LIST = (str, list)
IDENTIFIER = (str, int)
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "pretrain": {"image": TEXT, "caption": TEXT_OR_LIST},
    "retrieval_train": {"image": TEXT, "caption": TEXT_OR_LIST, "image_id": IDENTIFIER},
    "retrieval_eval": {"image": TEXT, "caption": TEXT_OR_LIST},
    "vqa_train": {"image": TEXT, "question": TEXT, "answer": TEXT_OR_LIST},
    "vqa_eval": {"image": TEXT, "question": TEXT, "question_id": IDENTIFIER},
    "caption": {"image": TEXT},
}
NAMES = {str: "a string", list: "a list of strings", int: "a whole number"}

# Karpathy's test and val are 5,000 images each; `restval`, the rest of COCO's validation set, is trained on.
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
DOMAINS = ("in", "near", "out")  # of NoCaps; its files say "near-domain"
COCO_NAME = re.compile(r"COCO_\w+_0*(\d+)\.\w+$")

ANNOTATORS = 10  # of a VQA question


@dataclass(frozen=True)
class Source:
    """Annotation files and where their images are.

    files: one path or several, looked up in the working directory, then in the repository. image_root: folder of
    relative `image` paths, or a map to one by the entry's `dataset`; None: the JSON file's own folder.
    image_prefix_map: {old: new}, the longest prefix that an `image` starts with is replaced before that (published
    files say val2014/ where a disk says otherwise).
    """

    files: Files
    image_root: str | Path | Mapping[str, str] | None = None
    image_prefix_map: Mapping[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- every layout


def load_annotations(
    source: Source,
    kind: str,
    check: Callable[[dict], str | None] | None = None,
    convert: Callable[[dict, str], dict | None] | None = None,
) -> list[dict]:
    """Reads JSON lists and returns their entries, `image` replaced by the path to open.

    kind: a key of KINDS: which keys an entry must have.
    check: a further test of every entry; it returns what is wrong, or None.
    convert: for files of other layouts, called first with an entry and its place (for errors): the entry in
        this layout, or None to leave it out.
    Raises UserError naming the file, the entry's index and the key.
    """
    folders = _image_folders(source.image_root)
    entries = []
    for name in [source.files] if isinstance(source.files, str | Path) else source.files:
        path = Path(find_file(name, "annotation file"))
        for index, entry in enumerate(_read_list(path)):
            where = f"{path}: entry {index}"
            if convert is not None and isinstance(entry, dict):
                entry = convert(entry, where)
                if entry is None:
                    continue
            _check_entry(entry, kind, where)
            if problem := check and check(entry):
                raise UserError(f"{where}: {problem}")
            image = _rewrite_prefix(entry["image"], source.image_prefix_map)
            folder = path.parent if folders is None else _choose_folder(entry, folders, where)
            entries.append({**entry, "image": os.path.join(folder, image)})  # an absolute `image` stays as it is
    return entries


def strings(value: str | list[str]) -> list[str]:
    """The value of a key that may be one string or a list of them, as a list."""
    return [value] if isinstance(value, str) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); annotation files are JSON lists of objects") from None


def _read_list(path: Path) -> list:
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("images"), list):  # Karpathy's files
        data = data["images"]
    if not isinstance(data, list):
        raise UserError(f"{path}: holds {type(data).__name__}, not a list; annotation files are JSON lists of objects")
    if not data:
        raise UserError(f"{path}: the list is empty")
    return data


def _check_entry(entry, kind: str, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, not an object with {', '.join(KINDS[kind])}")
    for key, types in KINDS[kind].items():
        if key not in entry:
            raise UserError(f"{where} has no {key!r}; a {kind} entry needs {', '.join(KINDS[kind])}")
        value = entry[key]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join(NAMES[t] for t in types)
            raise UserError(f"{where}: {key!r} is {type(value).__name__}, it must be {expected}")
        if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
            raise UserError(f"{where}: {key!r} must be a list of strings with at least one")
    if not entry["image"]:
        raise UserError(f"{where}: 'image' is empty")


def _rewrite_prefix(image: str, prefixes: Mapping[str, str]) -> str:
    old = max((prefix for prefix in prefixes if image.startswith(prefix)), key=len, default=None)
    return image if old is None else prefixes[old] + image[len(old) :]


def _image_folders(image_root: str | Path | Mapping[str, str] | None) -> Path | dict[str, str | Path] | None:
    if image_root is None:
        return None
    if isinstance(image_root, Mapping):
        return {key: str(path) for key, path in image_root.items()}  # looked for when an entry names them
    return Path(find_file(image_root, "data.image_root"))


def _choose_folder(entry: dict, folders: Path | dict[str, str | Path], where: str) -> Path:
    if isinstance(folders, Path):
        return folders
    name = entry.get("dataset")
    if name not in folders:
        known = ", ".join(folders) or "nothing"
        raise UserError(f"{where} has the dataset {name!r}, but data.image_root names only {known}; add it there")
    if isinstance(folders[name], str):
        folders[name] = find_file(folders[name], f"data.image_root.{name}")
    return folders[name]


# ------------------------------------------------------------------------------------------------- captioning


def load_captions(source: Source, split: str) -> list[dict]:
    """The entries of a split ("train", "val" or "test") as {image, captions, image_id, labels, domain}.

    image: the path to open; captions: list of str, as they stand (empty where a test set publishes none);
    image_id: the entry's, else COCO's number in the file name, else missing; labels: list of str; domain: one of
    DOMAINS or missing. Raises UserError naming file, entry and key.
    """

    def plain(entry: dict, where: str) -> dict | None:
        if "split" in entry and entry["split"] not in KARPATHY_SPLITS[split]:
            return None
        return _plain_entry(entry, where)

    entries = load_annotations(source, "caption", convert=plain)
    if not entries:
        raise UserError(f"{source.files}: no entry has the split {' or '.join(KARPATHY_SPLITS[split])}")
    return entries


def split_labels(object_label: str) -> list[str]:
    """mPLUG's "dog&&frisbee&&dog" -> ["dog", "frisbee"]"""
    return list(dict.fromkeys(label.strip() for label in object_label.split("&&") if label.strip()))


def _plain_entry(entry: dict, where: str) -> dict:
    """Any of the three kinds of entry in the form that `load_captions` returns."""
    plain = {"image": entry.get("image"), "dataset": entry.get("dataset"), "captions": entry.get("caption", [])}
    identifiers = [entry[key] for key in ("image_id", "img_id", "cocoid", "imgid") if key in entry]
    if "sentences" in entry and "filename" in entry:
        sentences = entry["sentences"]
        if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
            raise UserError(f"{where}: 'sentences' must be a list of {{\"raw\": text}} (Karpathy's format)")
        plain["captions"] = [sentence["raw"] for sentence in sentences]
        plain["image"] = "/".join(part for part in (entry.get("filepath"), entry["filename"]) if part)
    if plain["image"] is None:
        raise UserError(f"{where} has no 'image', and no 'filename' with 'sentences'; see dataset/annotations.py")
    if isinstance(plain["captions"], str):
        plain["captions"] = [plain["captions"]]
    if not isinstance(plain["captions"], list) or not all(isinstance(text, str) for text in plain["captions"]):
        raise UserError(f"{where}: 'caption' must be a string or a list of strings")
    if not isinstance(entry.get("object_label", ""), str):
        raise UserError(f"{where}: 'object_label' must be a string, labels joined by && (mPLUG's format)")
    number = COCO_NAME.search(str(plain["image"]))
    plain["image_id"] = identifiers[0] if identifiers else int(number[1]) if number else None
    plain["labels"] = split_labels(entry.get("object_label", ""))
    plain["domain"] = _domain(entry.get("domain"), where)
    return {key: value for key, value in plain.items() if value is not None}


def _domain(name, where: str) -> str | None:
    if name is None:
        return None
    short = str(name).removesuffix("-domain")
    if short not in DOMAINS:
        raise UserError(f"{where}: 'domain' is {name!r}, it must be one of {', '.join(DOMAINS)} (or in-domain, ...)")
    return short


# ------------------------------------------------------------------------------------------------- VQA


def load_training_questions(source: Source, left_out: Files = ()) -> tuple[list[dict], int]:
    """(the entries to train on, the number left out): those whose question (same data set, same id) `left_out` lists
    are not trained on. Raises UserError naming file, entry and key, and where nothing remains."""
    every = load_annotations(source, "vqa_train", check_training)
    held_out = {_identity(entry) for entry in load_annotations(Source(left_out), "vqa_eval")} if left_out else set()
    entries = [entry for entry in every if _identity(entry) not in held_out]
    if not entries:
        raise UserError("data.train: all questions are those of data.val; set data.train_on_minival, or other files")
    return entries, len(every) - len(entries)


def load_questions(source: Source) -> list[dict]:
    """The entries of an evaluation split, each `question_id` once, with or without answers."""
    entries = load_annotations(source, "vqa_eval", check_reference)
    repeated = [key for key, count in Counter(entry["question_id"] for entry in entries).items() if count > 1]
    if repeated:
        raise UserError(f"{source.files}: question_id {repeated[0]!r} occurs more than once ({len(repeated)} such ids)")
    return entries


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
        raise UserError(f"{files}: question {missing!r} has no answers, others have; all or none must")
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
            raise UserError(f"{path}: entry {number} ({answer!r}) is no answer")
        if answer in first:
            raise UserError(f"{path}: {answer!r} stands there twice (entries {first[answer]} and {number})")
        first[answer] = number
    return answers


def check_question(entry: dict) -> str | None:
    """What is wrong with an entry beyond missing keys, or None."""
    if not clean_question(entry["question"]):
        return f"the question {entry['question']!r} has no word"
    if not isinstance(entry.get("object_label") or "", str):
        return "'object_label' must be labels joined by &&, such as \"dog&&frisbee\""
    ocr = entry.get("ocr") or []
    if not isinstance(ocr, list):
        return "'ocr' must be a list of [position, token]"
    for item in ocr:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[1], str)):
            return f"'ocr' must hold [position, token] pairs, not {item!r}"
    return None


def check_training(entry: dict) -> str | None:
    """As `check_question`; and some annotator must have said something."""
    if problem := check_question(entry):
        return problem
    return None if any(answer.strip() for answer in strings(entry["answer"])) else "'answer' is blank"


def check_reference(entry: dict) -> str | None:
    """As `check_question`; and answers, where there are some, are ten annotators' or a single one."""
    answers = entry.get("answer")
    if answers is None or isinstance(answers, str):
        return check_question(entry)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "'answer' must be a string or a list of strings"
    if len(answers) not in (1, ANNOTATORS):
        return (
            f"question {entry['question_id']} has {len(answers)} answers: the official accuracy needs those of "
            f"{ANNOTATORS} annotators, or a single one, which is compared exactly"
        )
    return check_question(entry)


def _identity(entry: dict) -> tuple | None:
    """What makes two entries the same question; None for one without an id."""
    return (entry.get("dataset"), entry["question_id"]) if "question_id" in entry else None


def _own_reference(entry: dict) -> dict:
    return {key: entry.get(key) for key in ("answer_type", "question_type")} | {"reference": entry.get("answer")}


def _official_reference(entry: dict) -> dict:
    return _own_reference({**entry, "answer": [item["answer"] for item in entry["answers"]]})


def _score_reference(entry: dict) -> dict:
    if not isinstance(entry["label"], dict):
        raise TypeError("label is no map")
    return _own_reference({**entry, "answer": entry["label"]})


def _by_id(files: Files, key: str | None, convert: Callable[[dict], dict]) -> dict:
    """{question id: convert(entry)} of the files' lists (under `key`, if any)."""
    found = {}
    for name in files:
        path = find_file(name, "annotation file")
        content = read_json(path)
        entries = content.get(key) if key and isinstance(content, dict) else content
        if not isinstance(entries, list):
            raise UserError(f"{path}: holds no list{f' under {key!r}' if key else ''}; is it the right file?")
        for index, entry in enumerate(entries):
            try:
                found[entry["question_id"]] = convert(entry)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: entry {index} is not as expected ({error!r})") from None
    return found
