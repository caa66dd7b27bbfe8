"""What the start of a training and an evaluation says about their data: texts that are cut, images that are shared."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dataset.caption import target_text
from dataset.text import Tokenizer, clean_caption, evenly
from dataset.vqa import question_limits
from utils import one_line

log = logging.getLogger("semmim")

PROBES = 10_000  # more texts are not looked at


class Texts(NamedTuple):
    """A data set's texts of one kind and their limits: `room` word pieces and, after `clean`, `max_words` words.

    name: what they are and, in brackets, the keys of the limits.
    """

    name: str
    texts: Sequence[str]
    room: int
    clean: Callable[[str], str] = str
    max_words: int | None = None

    def probes(self) -> list[str]:
        """PROBES of the texts, evenly spaced over all, as they are cleaned."""
        return [self.clean(text) for text in evenly(self.texts, PROBES)]

    def share_cut(self, tokenizer: Tokenizer) -> float:
        """The share of the texts that are longer than a limit."""
        texts = self.probes()
        cut = [
            len(ids) > self.room or (self.max_words is not None and len(text.split()) > self.max_words)
            for text, ids in zip(texts, tokenizer.word_pieces(texts), strict=True)
        ]
        return sum(cut) / max(1, len(cut))


def split_texts(dataset: Any, cfg: Any, tokenizer: Tokenizer) -> list[Texts]:
    """The texts of any stage's data set, for training or evaluation, the main ones first."""
    text, room = cfg.text, tokenizer.room
    if hasattr(dataset, "parts"):
        names = ("questions (text.max_question_tokens", "OCR (text.max_ocr_tokens", "labels (text.max_label_tokens")
        trains, limit = hasattr(dataset, "answers"), text.max_answer_tokens
        columns = dataset.parts if trains else zip(*dataset.parts, strict=True)
        rows = zip(names, columns, question_limits(cfg), strict=True)
        found = [Texts(f"{name} {limit})", column, limit) for name, column, limit in rows]
        if trains:  # an answer's end counts as a piece, as a caption's
            found.append(Texts(f"answers (text.max_answer_tokens {limit})", dataset.answers, limit - 1))
        return found
    if hasattr(dataset, "prompts"):
        limit = text.max_prompt_tokens
        prompts = Texts(f"prompts (text.max_prompt_tokens {limit})", dataset.prompts, room(limit))
        if not hasattr(dataset, "captions"):  # references are not cut
            return [Texts("references", list(chain.from_iterable(dataset.references)), sys.maxsize), prompts]
        clean = partial(target_text, lower=tokenizer.lower)
        return [
            Texts(f"captions (text.max_tokens {text.max_tokens})", dataset.captions, text.max_tokens - 1, clean),
            prompts,
        ]
    words, clean = cfg.data.max_words, partial(clean_caption, max_words=None, lower=tokenizer.lower)
    name = f"captions (data.max_words {words}, text.max_tokens {text.max_tokens})"
    return [Texts(name, getattr(dataset, "raw_captions", dataset.captions), room(text.max_tokens), clean, words)]


def report_texts(dataset: Any, cfg: Any, tokenizer: Tokenizer) -> None:
    """Log how many texts of a training set are cut, and how many the vocabulary cannot write."""
    columns = split_texts(dataset, cfg, tokenizer)
    cut = ", ".join(f"{column.share_cut(tokenizer):.1%} of {column.name}" for column in columns)
    log.info("training texts that are longer than their limits and cut: %s", cut)
    shares = [f"{tokenizer.unwritable(column.probes())[0]:.1%} of {column.name.split(' (')[0]}" for column in columns]
    log.info("training texts whose letters this vocabulary cannot write: %s", ", ".join(shares))


def warn_of_cut_texts(datasets: Mapping[str, Any], cfg: Any, tokenizer: Tokenizer) -> None:
    """Log how many texts of the evaluation's `datasets` {split: data set} are cut, if any are."""
    for split, dataset in datasets.items():
        for column in split_texts(dataset, cfg, tokenizer):
            if share := column.share_cut(tokenizer):
                log.warning("warning: %s: %.1f%% of %s are longer than that and cut", split, 100 * share, column.name)


def warn_of_shared_images(dataset: Any, held_out: Mapping[str, Any]) -> None:
    """Log how many images each split of `held_out` {split: data set} shares with the training set `dataset`, and val
    with test: the best epoch would be chosen on test."""
    images = {
        split: set(map(os.fsencode, other.images if hasattr(other, "images") else other.paths))
        for split, other in held_out.items()
    }
    for split, own in images.items():
        is_shared = pc.is_in(dataset.paths.array, value_set=pa.array(list(own), pa.large_binary()))
        if shared := dataset.paths.array.filter(is_shared).to_pylist():
            counts = f"{split}: {len(shared)} of {len(own)} images are in data.train"
            first = one_line(os.fsdecode(shared[0]), 1000)
            log.warning("warning: %s: its numbers are not of new ones (first: %s)", counts, first)
    if both := images.get("val", set()) & images.get("test", set()):
        log.warning("warning: %d images are in data.val and data.test: test helps to choose the epoch", len(both))
