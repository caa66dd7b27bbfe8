"""Visual question answering: questions with OCR tokens and object labels, weighted answers, and their references."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import Files, Source, strings
from dataset.cache import StringTable
from dataset.common import Collate, EmptyCaption, TrainDataset, Transform, numbered, read_for_evaluation, starts
from dataset.questions import load_questions, load_references, load_training_questions
from dataset.text import LOWER_CASE, Language, Tokenizer, clean_question, has_word
from dataset.transforms import Augment, stack_pixels
from utils import one_line

Parts = tuple[str, str, str]  # question, OCR tokens, object labels; each may be ""


def question_parts(
    entry: dict, ocr: bool = True, labels: bool = True, max_ocr_words: int = 30, lower: bool = True
) -> Parts:
    """The texts that the encoder reads of an entry; without `ocr` or `labels` that part is ""."""
    words = " ".join(token for _, token in entry.get("ocr") or []) if ocr else ""
    names = (entry.get("object_label") or "").split("&&") if labels else []
    return (
        clean_question(entry["question"], lower=lower),
        clean_question(words, max_ocr_words, lower),
        " ".join(name.strip() for name in names if name.strip()),
    )


def weighted_answers(entry: dict, answer_weight: Mapping[str, float]) -> dict[str, float]:
    """{answer: the share of annotators who gave it, times the weight of the entry's data set (1 if not named)}."""
    answers = [answer.strip() for answer in strings(entry["answer"])]
    weight = answer_weight.get(entry.get("dataset"), 1.0)
    return {answer: weight * count / len(answers) for answer, count in Counter(answers).items() if answer}


class VQATrainDataset(TrainDataset):
    """Questions for fine-tuning; an epoch visits every entry once. VQACollate makes batches of its samples.

    parts: entry -> the texts that the encoder reads (see `question_parts`); answer_weight: {data set: weight of its
    answers}; left_out, official: see `load_training_questions`; `.left_out` is the number of questions left out;
    options: of TrainDataset.

    A sample is a dict: image [3,S,S], parts, answers (list of strings), weights (list of numbers), path, bad.
    """

    def __init__(
        self,
        source: Source,
        transform: Augment,
        parts: Callable[[dict], Parts] = question_parts,
        *,
        answer_weight: Mapping[str, float] | None = None,
        language: Language = LOWER_CASE,
        left_out: Files = (),
        official: Files = (),
        **options,
    ):
        entries, self.left_out = load_training_questions(source, left_out, official)
        image_ids = numbered(entry["image"] for entry in entries)
        self.image_id = np.array([image_ids[entry["image"]] for entry in entries], dtype=np.int64)  # [entries]
        columns = zip(*map(parts, entries), strict=True)
        self.parts = [StringTable(column) for column in columns]  # question, OCR, labels
        answers = [weighted_answers(entry, answer_weight or {}) for entry in entries]
        self.answers = StringTable(answer for group in answers for answer in group)
        self.weights = np.array([weight for group in answers for weight in group.values()], dtype=np.float32)
        self.answer_start = starts(answers)  # [entries + 1]
        self.transform, self.language = transform, language
        super().__init__(image_ids, **options)

    def __len__(self) -> int:
        return len(self.image_id)

    def caption_lengths(self, epoch: int, visits: np.ndarray) -> np.ndarray:
        """Characters that the encoder reads of these visits [N], for sorting by length: [N]"""
        return sum(column.lengths[visits] for column in self.parts)

    def _sample(self, index: int, rng: random.Random) -> dict:
        image_id = int(self.image_id[index])
        path = self.paths[image_id]
        question, ocr, labels = (column[index] for column in self.parts)
        if not has_word(question):
            raise EmptyCaption(f"{one_line(path, 1000)}: a question without a word")
        first, end = self.answer_start[index], self.answer_start[index + 1]
        answers = [self.answers[place] for place in range(first, end)]
        # a mirror swaps left and right, and spoils what is written in the image
        allow_flip = not ocr and self.language.may_flip(" ".join([question, *answers]))
        return {
            "image": self.transform(self.read_image(image_id), rng, allow_flip),
            "parts": (question, ocr, labels),
            "answers": answers,
            "weights": self.weights[first:end].tolist(),
            "path": path,
        }


class VQACollate(Collate):
    """List of samples -> batch dict: image [B,3,S,S], input_ids [B,L], attention_mask [B,L] (None if nothing is
    padded); and of all A answers to the B questions answer_ids, answer_target, answer_mask [A,T] (see
    `encode_answers`), answer_rows [A] (the question of each), answer_weights [A]; paths and bad (lists of str).

    limits: see `encode_questions`; max_answer_tokens: see `encode_answers`.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Sequence[int], max_answer_tokens: int):
        self.tokenizer, self.limits, self.max_answer_tokens = tokenizer, limits, max_answer_tokens

    def batch(self, samples: list[dict]) -> dict:
        ids, mask = encode_questions(self.tokenizer, [sample["parts"] for sample in samples], self.limits)
        answers = [answer for sample in samples for answer in sample["answers"]]
        answer_ids, target, answer_mask = encode_answers(self.tokenizer, answers, self.max_answer_tokens)
        counts = torch.tensor([len(sample["answers"]) for sample in samples])
        return {
            "image": stack_pixels([sample["image"] for sample in samples]),
            "input_ids": ids,
            "attention_mask": self.tokenizer.padding(mask),
            "answer_ids": answer_ids,
            "answer_target": target,
            "answer_mask": answer_mask,
            "answer_rows": torch.arange(len(samples)).repeat_interleave(counts),
            "answer_weights": torch.tensor([weight for sample in samples for weight in sample["weights"]]),
        }


def question_limits(cfg: Any) -> tuple[int, int, int]:
    """Word pieces of question, OCR tokens and labels that a configuration allows, for `encode_questions`."""
    return cfg.text.max_question_tokens, cfg.text.max_ocr_tokens, cfg.text.max_label_tokens


def encode_questions(tokenizer: Tokenizer, parts: Sequence[Parts], limits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[CLS] question [SEP] OCR [SEP] labels -> (input_ids [B,L], attention_mask [B,L]).

    limits: word pieces of the three parts, each cut by itself: no label costs a question its end. An empty part has
    no [SEP] either, as in mPLUG.
    """
    pieces = map(tokenizer.word_pieces, zip(*parts, strict=True))
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
    targets = [[*ids, tokenizer.sep_id][:max_tokens] for ids in tokenizer.word_pieces(answers)]
    inputs, mask = tokenizer.pad([[tokenizer.cls_id, *row[:-1]] for row in targets])
    return inputs, tokenizer.pad(targets)[0], mask


class VQAEvalDataset(Dataset):
    """All questions of a split. Nothing is replaced here: an unreadable image is a UserError.

    parts: entry -> Parts (see `question_parts`); official, score_files: further files with answers.

    ids: question ids; paths: images; parts: of each question; references, answer_types, question_types, source (where
    the references come from): see `load_references`.
    """

    def __init__(
        self, source: Source, transform: Transform, parts=question_parts, official: Files = (), score_files: Files = ()
    ):
        entries = load_questions(source)
        self.ids = [entry["question_id"] for entry in entries]
        self.paths = [entry["image"] for entry in entries]
        self.parts = [parts(entry) for entry in entries]
        found = load_references(entries, source.files, official, score_files)
        self.references, self.answer_types, self.question_types, self.source = found
        self.transform = transform

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Parts]:
        return read_for_evaluation(self.paths[index], self.transform), self.parts[index]


class EvalBatches(Dataset):
    """The batches of a VQAEvalDataset as items, the same for any number of processes: the questions of an image are
    neighbors, and the image is read and later encoded once per batch.

    `batches[b]` is a dict: image [U,3,S,S], image_rows [B] (the image of each question), input_ids, attention_mask
    [B,L], index [B] (places in the data set).
    """

    def __init__(self, dataset: VQAEvalDataset, tokenizer: Tokenizer, limits: Sequence[int], batch_size: int):
        self.dataset, self.tokenizer, self.limits = dataset, tokenizer, limits
        place = numbered(dataset.paths)
        order = sorted(range(len(dataset)), key=lambda i: place[dataset.paths[i]])
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        index, dataset = self.batches[number], self.dataset
        paths = list(dict.fromkeys(dataset.paths[i] for i in index))
        ids, mask = encode_questions(self.tokenizer, [dataset.parts[i] for i in index], self.limits)
        return {
            "image": torch.stack([read_for_evaluation(path, dataset.transform) for path in paths]),
            "image_rows": torch.tensor([paths.index(dataset.paths[i]) for i in index]),
            "input_ids": ids,
            "attention_mask": self.tokenizer.padding(mask),
            "index": torch.tensor(index),
        }
