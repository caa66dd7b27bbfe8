"""What is said at the start of a training whose data and settings do not fit: one line each, with the remedy.

Everything here is judged by some thousands of texts, or by numbers that are known already, in well under a second.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dataset.text import CUT_PROBES, Tokenizer

MANY_CUT = 0.1  # a share of the texts
MANY_SPELLED = 0.05  # a share of the words; BERT's own vocabulary spells less than 0.1% of English captions'
MANY_PIECES = 1.5  # a word; BERT's own vocabulary needs 1.1 to 1.2 for English captions, 1.6 to 5 for other languages
FEW_WORDS = 100  # say nothing
WORDS = 20_000  # say enough
IDEOGRAPHS = "\u3400-\u9fff\uf900-\ufaff"  # BERT splits text between them
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}]+")
QUEUE_TURNS = 10
MANY_PASSES = 100  # over a training set: one seen so often is known by heart


def cut_advice(shares: Mapping[str, float]) -> list[str]:
    """shares: {what is cut at which limits: its share} of a training set's texts."""
    return [
        f"{share:.0%} of {what} are cut; raise what stands in the brackets"
        for what, share in shares.items()
        if share > MANY_CUT
    ]


def vocabulary_advice(tokenizer: Tokenizer, columns: Sequence[Sequence[str]]) -> list[str]:
    """columns: the texts of a training set. A vocabulary made for other texts, or for another language, spells words
    letter by letter, or knows only [UNK] of them."""
    words = [word for texts in columns for word in _some_words(texts)]
    if len(words) < FEW_WORDS:
        return []
    rows = tokenizer.word_pieces(words)
    lost = [word for word, ids in zip(words, rows, strict=True) if _is_lost(tokenizer, ids)]
    pieces = sum(map(len, rows)) / len(words)
    share = len(lost) / len(words)
    if share <= MANY_SPELLED and pieces <= MANY_PIECES:
        return []
    if not lost:  # then those in most pieces
        lost = [word for word, _ in sorted(zip(words, rows, strict=True), key=lambda pair: -len(pair[1]))]
    examples = ", ".join(list(dict.fromkeys(lost))[:3])
    return [
        f"text.vocab {tokenizer.vocab_file}: {share:.0%} of the words are unknown or spelled letter by letter, and a "
        f"word takes {pieces:.1f} pieces (such as {examples}); it was made for other texts: take the vocab.txt of a "
        "BERT in their language (configs/bert/vocab.txt for English)"
    ]


def _some_words(texts: Sequence[str]) -> list[str]:
    """Words of texts evenly spaced over all, in lower case."""
    words: list[str] = []
    for place in range(0, len(texts), max(1, -(-len(texts) // CUT_PROBES))):
        words += WORD.findall(texts[place].lower())
        if len(words) >= WORDS:
            break
    return words


def _is_lost(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a word is unknown, or three letters or more in as many pieces."""
    if tokenizer.unk_id in ids:
        return True
    first, *rest = tokenizer.names(ids)
    return len(first) == 1 and len(rest) > 1 and all(name.startswith("##") and len(name) == 3 for name in rest)


def size_advice(entries: int, images: int, global_batch: int, cfg: Any) -> list[str]:
    """What a training set's size makes of the batch, of the training's length and, with `cfg.itc`, of the queue.

    entries: of an epoch; global_batch: entries of one optimizer step.
    """
    lines = []
    train, has_val = cfg.get("train") or {}, bool((cfg.get("data") or {}).get("val"))
    passes = train["steps"] * global_batch / entries if train.get("steps") else train.get("epochs") or 0
    if passes > MANY_PASSES and not has_val:
        lines.append(
            f"the {entries} entries are seen {passes:.0f} times each, which teaches them by heart; train less "
            "(train.epochs, train.steps), or name others in data.val, whose recall shows when to stop"
        )
    if global_batch * 2 > images:
        lines.append(
            f"a batch of {global_batch} holds more than half of the {images} images: the same ones meet in every step; "
            "lower train.batch_size or train.accumulation"
        )
    left = entries % global_batch
    if left * 10 > entries:
        lines.append(
            f"{left} of {entries} entries are left out of every epoch (others each time), for only whole batches of "
            f"{global_batch} are made; lower train.batch_size"
        )
    itc = cfg.get("itc") or {}
    size, is_queue = itc.get("queue_size", 0), itc.get("negatives") == "queue"
    if is_queue and size > QUEUE_TURNS * images:
        lines.append(
            f"itc.queue_size {size} holds each of the {images} images {size // images} times, mostly as the teacher "
            "saw it long ago; take itc.negatives: batch, or a smaller queue"
        )
    return lines
