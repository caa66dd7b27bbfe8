"""Visual question answering: questions with OCR tokens and object labels, weighted answers, and their references.

An entry is {"image", "question", "question_id", "dataset": "vqa" | "vg" | ..., "answer": [str x 10] | str,
"object_label": "dog&&frisbee", "ocr": [[position, token], ...]}, as ALBEF and mPLUG published them; `object_label` and
`ocr` may be missing or empty. What an annotator's answers, types and scores may further come from: the official
annotation files (v2_mscoco_val2014_annotations.json) and LXMERT's and mPLUG's minival file (`label`).
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import StringTable, load_annotations, read_json
from dataset.cache import ImageCache
from dataset.common import TrainDataset, may_flip, read_for_evaluation, sample_places
from dataset.text import SPECIAL_TOKENS, Tokenizer, clean_question
from dataset.transforms import open_image, test_transform, train_transform
from utils import UserError, find_file

ANNOTATORS = 10
SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
Parts = tuple[str, str, str]  # question, OCR tokens, object labels; each may be ""


# ------------------------------------------------------------------------------------------------- entries


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
    answers = [entry["answer"]] if isinstance(entry["answer"], str) else entry["answer"]
    return None if any(answer.strip() for answer in answers) else "'answer' is blank"


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


def question_parts(entry: dict, ocr: bool, labels: bool, max_ocr_words: int) -> Parts:
    """The texts that the encoder reads of an entry; without `ocr` or `labels` that part is ""."""
    words = " ".join(token for _, token in entry.get("ocr") or []) if ocr else ""
    names = (entry.get("object_label") or "").split("&&") if labels else []
    return (
        clean_question(entry["question"]),
        clean_question(words, max_ocr_words),
        " ".join(name.strip() for name in names if name.strip()),
    )


def weighted_answers(entry: dict, answer_weight: Mapping[str, float]) -> dict[str, float]:
    """{answer: the share of annotators who gave it, times the weight of the entry's data set (1 if not named)}."""
    answers = [entry["answer"]] if isinstance(entry["answer"], str) else entry["answer"]
    weight = answer_weight.get(entry.get("dataset"), 1.0)
    return {
        answer: weight * count / len(answers) for answer, count in Counter(a.strip() for a in answers).items() if answer
    }


# ------------------------------------------------------------------------------------------------- training


class VQATrainDataset(TrainDataset):
    """Questions for fine-tuning; an epoch visits every entry once.

    files: annotation files; image_size: side S of the pictures; answer_weight: {data set: weight of its answers};
    left_out: files whose questions (same data set, same id) are not trained on; their number is `.left_out`;
    cache_images: keep the decoded pictures in memory. The rest as RetrievalTrainDataset and `question_parts`.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image [3,S,S], parts, answers (list of
    strings), weights (list of numbers), path, bad (as PretrainDataset). VQACollate makes batches.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        seed: int = 0,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        ocr: bool = True,
        labels: bool = True,
        max_ocr_words: int = 30,
        answer_weight: Mapping[str, float] | None = None,
        left_out: Sequence[str | Path] = (),
        cache_images: bool = False,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        ops: int = 2,
        magnitude: float = 7,
    ):
        every = load_annotations(files, "vqa_train", image_root, image_prefix_map, check_training)
        held_out = {_identity(entry) for entry in load_annotations(left_out, "vqa_eval")} if left_out else set()
        entries = [entry for entry in every if _identity(entry) not in held_out]
        if not entries:
            raise UserError(
                "data.train: all questions are those of data.val; set data.train_on_minival, or other files"
            )
        self.left_out = len(every) - len(entries)
        image_ids = {path: i for i, path in enumerate(dict.fromkeys(entry["image"] for entry in entries))}
        self.paths = StringTable(image_ids)
        self.image_id = np.array([image_ids[entry["image"]] for entry in entries], dtype=np.int64)  # [entries]
        parts = [question_parts(entry, ocr, labels, max_ocr_words) for entry in entries]
        self.parts = [StringTable(column) for column in zip(*parts, strict=True)]  # question, OCR, labels
        answers = [weighted_answers(entry, answer_weight or {}) for entry in entries]
        self.answers = StringTable(answer for group in answers for answer in group)
        self.weights = np.array([weight for group in answers for weight in group.values()], dtype=np.float32)
        self.answer_start = np.cumsum([0] + [len(group) for group in answers], dtype=np.int64)  # [entries + 1]
        self.seed = seed
        self.transform = train_transform(image_size, crop_scale, flip, ops, magnitude)
        self.cache = ImageCache(self.paths) if cache_images else None

    def __len__(self) -> int:
        return len(self.image_id)

    def caption_length(self, epoch: int, index: int) -> int:
        """Characters that the encoder reads, for sorting by length."""
        return sum(len(column[index]) for column in self.parts)

    def _sample(self, index: int, rng: random.Random) -> dict:
        image_id = int(self.image_id[index])
        path = self.paths[image_id]
        question, ocr, labels = (column[index] for column in self.parts)
        places = range(self.answer_start[index], self.answer_start[index + 1])
        answers = [self.answers[place] for place in places]
        # a mirror swaps left and right, and spoils what is written in the picture
        allow_flip = not ocr and may_flip(" ".join([question, *answers]).lower())
        image = open_image(path) if self.cache is None else self.cache[image_id]
        return {
            "image": self.transform(image, rng, allow_flip),
            "parts": (question, ocr, labels),
            "answers": answers,
            "weights": [float(self.weights[place]) for place in places],
            "path": path,
        }


def _identity(entry: dict) -> tuple | None:
    """What makes two entries the same question; None for one without an id."""
    return (entry.get("dataset"), entry["question_id"]) if "question_id" in entry else None


class VQACollate:
    """List of samples -> batch dict: image [B,3,S,S], input_ids and attention_mask [B,L]; and of all A answers to the B
    questions answer_ids, answer_target, answer_mask [A,T] (see `encode_answers`), answer_rows [A] (the question of
    each), answer_weights [A]; paths and bad (lists of str).

    limits: see `encode_questions`; max_answer_tokens: see `encode_answers`.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Sequence[int], max_answer_tokens: int):
        self.tokenizer, self.limits, self.max_answer_tokens = tokenizer, limits, max_answer_tokens

    def __call__(self, samples: list[dict]) -> dict:
        places = sample_places(samples)
        if "unusable" in places:
            return places
        ids, mask = encode_questions(self.tokenizer, [sample["parts"] for sample in samples], self.limits)
        answers = [answer for sample in samples for answer in sample["answers"]]
        answer_ids, target, answer_mask = encode_answers(self.tokenizer, answers, self.max_answer_tokens)
        counts = torch.tensor([len(sample["answers"]) for sample in samples])
        return {
            "image": torch.stack([sample["image"] for sample in samples]),
            "input_ids": ids,
            "attention_mask": mask,
            "answer_ids": answer_ids,
            "answer_target": target,
            "answer_mask": answer_mask,
            "answer_rows": torch.arange(len(samples)).repeat_interleave(counts),
            "answer_weights": torch.tensor([weight for sample in samples for weight in sample["weights"]]),
            **places,
        }


def question_limits(cfg: Any) -> tuple[int, int, int]:
    """Word pieces of question, OCR tokens and labels that a configuration allows, for `encode_questions`."""
    return cfg.text.max_question_tokens, cfg.text.max_ocr_tokens, cfg.text.max_label_tokens


def encode_questions(tokenizer: Tokenizer, parts: Sequence[Parts], limits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[CLS] question [SEP] OCR [SEP] labels -> (input_ids [B,L], attention_mask [B,L]).

    limits: word pieces of the three parts, each cut by itself: no label costs a question its end. An empty part has
    no [SEP] either, as in mPLUG.
    """
    pieces = [tokenizer.word_pieces([plain(text) for text in column]) for column in zip(*parts, strict=True)]
    rows = []
    for three in zip(*pieces, strict=True):
        row = [tokenizer.cls_id]
        for number, (part, limit) in enumerate(zip(three, limits, strict=True)):
            row += [tokenizer.sep_id] * bool(number and part) + part[:limit]
        rows.append(row + [tokenizer.sep_id] * tokenizer.sep)
    return tokenizer.pad(rows)


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Answers -> decoder input [A,T] = [CLS] answer, target [A,T] = answer [SEP], mask [A,T] of the target (1 = token).

    max_tokens: of the target; a longer answer is cut, and then does not end in [SEP].
    """
    targets = [[*ids, tokenizer.sep_id][:max_tokens] for ids in tokenizer.word_pieces([plain(a) for a in answers])]
    inputs, mask = tokenizer.pad([[tokenizer.cls_id, *row[:-1]] for row in targets])
    return inputs, tokenizer.pad(targets)[0], mask


def plain(text: str) -> str:
    """The text without what the tokenizer cannot take: halves of surrogate pairs, and the names of special tokens."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return SPECIAL.sub(lambda found: f"[ {found[0][1:-1]} ]", text)


# ------------------------------------------------------------------------------------------------- evaluation


class VQAEvalDataset(Dataset):
    """All questions of a split. Nothing is replaced here: an unreadable picture is a UserError.

    official: official annotation files; score_files: lists of {"question_id", "label": {answer: score}}. A question's
    reference comes from the first of these that has it: official files, its own `answer`, score files. Either all
    questions have one or none.

    ids: question ids; paths: images; parts: see `question_parts`; references: list of evaluation.vqa.Reference, or
    None; answer_types, question_types: strings or None; source: where the references come from, for the log.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        ocr: bool = True,
        labels: bool = True,
        max_ocr_words: int = 30,
        official: Sequence[str | Path] = (),
        score_files: Sequence[str | Path] = (),
    ):
        entries = load_annotations(files, "vqa_eval", image_root, image_prefix_map, check_reference)
        self.ids = [entry["question_id"] for entry in entries]
        if repeated := [key for key, count in Counter(self.ids).items() if count > 1]:
            raise UserError(f"{files}: question_id {repeated[0]!r} occurs more than once ({len(repeated)} such ids)")
        self.paths = [entry["image"] for entry in entries]
        self.parts = [question_parts(entry, ocr, labels, max_ocr_words) for entry in entries]
        sources = {
            "official files": _by_id(official, "annotations", _official_reference),
            "entries": {entry["question_id"]: _own_reference(entry) for entry in entries},
            "score files": _by_id(score_files, None, _score_reference),
        }
        used = Counter()
        self.references, self.answer_types, self.question_types = [], [], []
        for key in self.ids:
            known = {name: found[key] for name, found in sources.items() if key in found}
            name = next((name for name, found in known.items() if found["reference"] is not None), "nothing")
            used[name] += 1
            self.references.append(known[name]["reference"] if name != "nothing" else None)
            for column in ("answer_type", "question_type"):
                values = (found[column] for found in known.values())
                getattr(self, column + "s").append(next((value for value in values if value is not None), None))
        if len(used) > 1 and used["nothing"]:
            missing = self.ids[self.references.index(None)]
            raise UserError(f"{files}: question {missing!r} has no answers, others have; all or none must")
        self.source = ", ".join(f"{name} ({count} questions)" for name, count in used.items())
        if used["nothing"]:
            self.references = None
        self.transform = test_transform(image_size)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Parts]:
        return self.image(self.paths[index]), self.parts[index]

    def image(self, path: str) -> Tensor:
        return read_for_evaluation(path, self.transform)


def _own_reference(entry: dict) -> dict:
    return {key: entry.get(key) for key in ("answer_type", "question_type")} | {"reference": entry.get("answer")}


def _official_reference(entry: dict) -> dict:
    return _own_reference({**entry, "answer": [item["answer"] for item in entry["answers"]]})


def _score_reference(entry: dict) -> dict:
    if not isinstance(entry["label"], dict):
        raise TypeError("label is no map")
    return _own_reference({**entry, "answer": entry["label"]})


def _by_id(files: Sequence[str | Path], key: str | None, convert) -> dict:
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


class EvalBatches(Dataset):
    """The batches of a VQAEvalDataset as items, the same for any number of processes: the questions of a picture are
    neighbours, and the picture is read and later encoded once a batch.

    `batches[b]` is a dict: image [U,3,S,S], image_rows [B] (the picture of each question), input_ids, attention_mask
    [B,L], index [B] (places in the data set).
    """

    def __init__(self, dataset: VQAEvalDataset, tokenizer: Tokenizer, limits: Sequence[int], batch_size: int):
        self.dataset, self.tokenizer, self.limits = dataset, tokenizer, limits
        place = {path: number for number, path in enumerate(dict.fromkeys(dataset.paths))}
        order = sorted(range(len(dataset)), key=lambda i: place[dataset.paths[i]])
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        index, dataset = self.batches[number], self.dataset
        paths = [path for path, _ in groupby(index, key=lambda i: dataset.paths[i])]
        ids, mask = encode_questions(self.tokenizer, [dataset.parts[i] for i in index], self.limits)
        return {
            "image": torch.stack([dataset.image(path) for path in paths]),
            "image_rows": torch.tensor([paths.index(dataset.paths[i]) for i in index]),
            "input_ids": ids,
            "attention_mask": mask,
            "index": torch.tensor(index),
        }


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
