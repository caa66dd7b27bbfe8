"""What the start of a training and an evaluation says about their data: texts that are cut, images that are shared."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dataset.caption import target_text
from dataset.text import Tokenizer, clean_caption
from dataset.vqa import question_limits
from utils import one_line

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
        return [self.clean(self.texts[i]) for i in range(0, len(self.texts), max(1, -(-len(self.texts) // PROBES)))]

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
    text, sep = cfg.text, tokenizer.sep
    if hasattr(dataset, "parts"):
        names = ("questions (text.max_question_tokens", "OCR (text.max_ocr_tokens", "labels (text.max_label_tokens")
        trains, limit = hasattr(dataset, "answers"), text.max_answer_tokens
        columns = dataset.parts if trains else zip(*dataset.parts, strict=True)
        rows = zip(names, columns, question_limits(cfg), strict=True)
        found = [Texts(f"{name} {room})", column, room) for name, column, room in rows]
        if trains:  # an answer's end counts as a piece, as a caption's
            found.append(Texts(f"answers (text.max_answer_tokens {limit})", dataset.answers, limit - 1))
        return found
    if hasattr(dataset, "prompts"):
        room, limit = text.max_prompt_tokens - 1 - sep, text.max_tokens
        prompts = Texts(f"prompts (text.max_prompt_tokens {text.max_prompt_tokens})", dataset.prompts, room)
        if not hasattr(dataset, "captions"):  # references are not cut
            return [Texts("references", list(chain.from_iterable(dataset.references)), sys.maxsize), prompts]
        clean = partial(target_text, lower=tokenizer.lower)
        return [Texts(f"captions (text.max_tokens {limit})", dataset.captions, limit - 1, clean), prompts]
    words, clean = cfg.data.max_words, partial(clean_caption, max_words=None, lower=tokenizer.lower)
    name = f"captions (data.max_words {words}, text.max_tokens {text.max_tokens})"
    raw = getattr(dataset, "raw_captions", dataset.captions)
    return [Texts(name, raw, text.max_tokens - 1 - sep, clean, words)]


def cut_texts(split: str, dataset: Any, cfg: Any, tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each kind of texts of which the evaluation of a split cuts some."""
    for column in split_texts(dataset, cfg, tokenizer):
        if share := column.share_cut(tokenizer):
            yield f"{split}: {share:.1%} of {column.name} are longer than that and cut"


def shared_images(dataset: Any, held_out: Mapping[str, Any]) -> Iterator[str]:
    """A line for each split of `held_out`, {split: data set}, that has images of the training set `dataset`, and one if
    test has images of val."""
    images = {
        split: set(map(os.fsencode, other.images if hasattr(other, "images") else other.paths))
        for split, other in held_out.items()
    }
    for split, own in images.items():
        is_shared = pc.is_in(dataset.paths.array, value_set=pa.array(list(own), pa.large_binary()))
        trained = dataset.paths.array.filter(is_shared).to_pylist()
        chosen_by = sorted(own & images.get("val", set())) if split == "test" else []
        for shared, where in ((trained, "data.train"), (chosen_by, "data.val, which chooses the epoch")):
            if shared:
                yield (
                    f"{split}: {len(shared)} of {len(own)} images are in {where}: its numbers are not of new ones "
                    f"(first: {one_line(os.fsdecode(shared[0]), 1000)})"
                )
