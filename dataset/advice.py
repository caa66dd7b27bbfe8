"""What the start of a training says about data and settings that do not fit: one line each, with the remedy.

Everything here is judged by some thousands of texts, or by numbers that are known already, in well under a second.
"""

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

MANY_CUT = 0.1  # a share of the texts
MANY_UNKNOWN = 0.05  # a share of the words
MANY_PIECES = 1.5  # a word; BERT's own vocabulary needs 1.1 to 1.2 for English captions, 1.6 to 5 for other languages
FEW_WORDS, PROBES = 100, 10_000  # fewer words are not judged, more texts not looked at
QUEUE_TURNS = 10
MANY_PASSES = 100  # over a training set: one seen so often is known by heart


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
    """A line for each split of `held_out`, {split: data set}, that has images of the training set `dataset`."""
    for split, other in held_out.items():
        images = set(map(os.fsencode, other.images if hasattr(other, "images") else other.paths))
        is_shared = pc.is_in(dataset.paths.array, value_set=pa.array(list(images), pa.large_binary()))
        if shared := dataset.paths.array.filter(is_shared).to_pylist():
            yield (
                f"{split}: {len(shared)} of {len(images)} images are in data.train: its numbers are not of new ones "
                f"(first: {one_line(os.fsdecode(shared[0]), 1000)})"
            )


def text_advice(columns: Sequence[Texts], shares: Sequence[float], tokenizer: Tokenizer) -> Iterator[str]:
    """columns: a training set's texts, the main ones first; shares: of each that is cut."""
    for column, share in zip(columns, shares, strict=True):
        if share > MANY_CUT:
            yield f"{share:.0%} of {column.name} are cut; raise what stands in the brackets"
    words = tokenizer.words(columns[0].probes()[::5])
    pieces = dict(zip(words, tokenizer.word_pieces(words), strict=True))
    unknown = sum(tokenizer.unk_id in pieces[word] for word in words) / max(1, len(words))
    mean = sum(len(pieces[word]) for word in words) / max(1, len(words))
    if len(words) >= FEW_WORDS and (unknown > MANY_UNKNOWN or mean > MANY_PIECES):
        examples = sorted(pieces, key=lambda word: (tokenizer.unk_id not in pieces[word], -len(pieces[word])))
        yield (
            f"text.vocab {tokenizer.vocab_file}: {unknown:.0%} of the words are unknown, and a word takes {mean:.1f} "
            f"pieces (such as {', '.join(examples[:3])}); it was made for other texts: take the vocab.txt of a BERT in "
            "their language (configs/bert/vocab.txt for English)"
        )


def size_advice(entries: int, images: int, global_batch: int, cfg: Any) -> Iterator[str]:
    """What a training set's size makes of the batch, of the training's length and, with `cfg.itc`, of the queue.

    entries: of an epoch; global_batch: entries of one optimizer step.
    """
    train, itc, has_val = cfg.get("train") or {}, cfg.get("itc") or {}, bool((cfg.get("data") or {}).get("val"))
    passes = train["steps"] * global_batch / entries if train.get("steps") else train.get("epochs") or 0
    if passes > MANY_PASSES and not has_val:
        yield (
            f"the {entries} entries are seen {passes:.0f} times each, which teaches them by heart; train less "
            "(train.epochs, train.steps), or name others in data.val, whose recall shows when to stop"
        )
    if global_batch * 2 > images:
        yield (
            f"a batch of {global_batch} holds more than half of the {images} images: the same ones meet in every step; "
            "lower train.batch_size or train.accumulation"
        )
    if itc.get("negatives") == "queue" and (size := itc["queue_size"]) > QUEUE_TURNS * images:
        yield (
            f"itc.queue_size {size} holds each of the {images} images {size // images} times, mostly as the teacher "
            "saw it long ago; take itc.negatives: batch, or a smaller queue"
        )
