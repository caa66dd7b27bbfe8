"""Captions and questions: cleaning as ALBEF does, and BERT word pieces without a final [SEP]."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from dataset.files import read_json, text_lines
from utils import UserError, find_file

# The Rust tokenizer's own threads would warn about, and may hang in, forked data workers; batches here are small.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Han and kana, which are written without spaces
IDEOGRAPH = "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
WORD = re.compile(r"\w+")
UNKNOWN = "zzunknownzz"  # stands for [UNK] in what `rewritten` gives: no sentence has this word
PROBES = 4_000  # texts that a share is measured on
IGNORED = {"Cc", "Cf", "Co", "Cs", "Mn", "Zl", "Zp", "Zs"}  # Unicode's categories that BERT's tokenizer leaves out


def clean_caption(text: str, max_words: int | None, lower: bool = True) -> str:
    """ALBEF's `pre_caption`: lower case, punctuation out, `-` and `/` to spaces, at most `max_words` words.

    Returns "" if nothing is left (ALBEF raises): the data sets decide what an empty caption means. lower: false for a
    vocabulary that has capital letters.
    """
    return clean_question(text, max_words, lower).replace("<person>", "person")


def clean_question(text: str, max_words: int | None = None, lower: bool = True) -> str:
    """ALBEF's `pre_question`: the same rules as for captions, without the <person> placeholder.

    Every run of white space counts as one space (ALBEF's question rule lets double spaces count as words).
    """
    text = PUNCTUATION.sub("", text.lower() if lower else text).replace("-", " ").replace("/", " ")
    return " ".join(text.split()[:max_words])


# Words that say left or right: ar de en es fr hi it nl pl pt ru tr vi, and of scripts without spaces ja ko th zh.
DIRECTIONS = """
    left right leftmost rightmost leftward leftwards rightward rightwards lefthand righthand lefthanded righthanded
    links rechts linke linken linker linkes linkem rechte rechten rechter rechtes rechtem linkse rechtse
    izquierda izquierdo izquierdas izquierdos derecha derecho derechas derechos
    gauche gauches droite droites droit droits sinistra sinistro destra destro
    esquerda esquerdo esquerdas esquerdos direita direito direitas direitos trái phải
    слева справа налево направо влево вправо левый левая левое левые левой левом левую левого
    правый правая правое правые правой правом правую правого
    lewej prawej lewo prawo lewa prawa lewy prawy lewym prawym solda sağda soldaki sağdaki solunda sağında
    يسار يمين اليسار اليمين बाएं बाईं बायें दाएं दाईं दायें 左 右 왼쪽 오른쪽 왼손 오른손 좌측 우측 ซ้าย ขวา
""".split()
# Scripts in which words stand together, or have something appended
WITHIN_WORDS = re.compile(f"{IDEOGRAPH}|[\u0600-\u06ff\u0900-\u097f\u0e00-\u0eff\uac00-\ud7a3]")


@dataclass(frozen=True)
class Language:
    """How a data set reads its texts. lower: in lower case; directions: words for left and right beside DIRECTIONS."""

    lower: bool = True
    directions: tuple[str, ...] = ()

    @cached_property
    def _directions(self) -> tuple[set[str], list[str]]:
        """(whole words, parts of words)"""
        words = [unicodedata.normalize("NFC", word.lower()) for word in (*DIRECTIONS, *self.directions)]
        parts = [word for word in words if WITHIN_WORDS.match(word)]
        return {*words} - {*parts}, parts

    def may_flip(self, text: str) -> bool:
        """Whether a mirrored image fits the text, which says neither left nor right."""
        text, (words, parts) = unicodedata.normalize("NFC", text.lower()), self._directions
        return words.isdisjoint(WORD.findall(text)) and not any(part in text for part in parts)


LOWER_CASE = Language()


def has_word(text: str) -> bool:
    """Whether a tokenizer makes word pieces of a text: it has more than white space, control characters and accents."""
    return any(character != "\ufffd" and unicodedata.category(character) not in IGNORED for character in text)


def evenly(texts: Sequence[str], most: int) -> list[str]:
    """At most so many of the texts, evenly spaced over all."""
    return [texts[i] for i in range(0, len(texts), max(1, -(-len(texts) // most)))]


class Tokenizer:
    """BERT's word pieces from a local `vocab.txt`, as padded tensors; case and accents: see `vocabulary_case`.

    The encoders see `[CLS] X` without a final [SEP], as in ALBEF and mPLUG: transformers' default adds one,
    and checkpoints trained without it lose points silently when they get it. `sep=True` adds it.
    """

    def __init__(self, vocab_file: str | Path, sep: bool = False):
        path = Path(find_file(vocab_file, "vocabulary (text.vocab)"))
        vocab = {line.rstrip("\r\n"): number - 1 for number, line in text_lines(path)}
        if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
            raise UserError(f"vocabulary {path} lacks {', '.join(missing)}; it must be a BERT vocab.txt")
        self.sep, self.vocab_file = sep, path
        self.vocab_size = len(vocab)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIAL_TOKENS)
        self.case = vocabulary_case(path, vocab)
        self.lower = self.case["do_lower_case"]
        # of the pieces and their case: what a checkpoint is compared by
        self.digest = hashlib.blake2b(repr([*vocab, self.case]).encode(), digest_size=8).hexdigest()
        # The Rust tokenizer alone: BertTokenizer's `__call__` costs several times as much and pads by its own rules.
        from transformers import BertTokenizerFast

        self._backend = BertTokenizerFast(vocab=vocab, **self.case).backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # a text that says [SEP] means these five characters

    def word_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens, unpadded and untruncated; UserError for a text that is none."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]
        except TypeError:  # of a configuration or command line; annotations are checked
            raise UserError("a text holds half of a surrogate pair, which is no character") from None

    def names(self, ids: Sequence[int]) -> list[str]:
        """The word pieces as the vocabulary writes them: dog, ##s."""
        return [self._backend.id_to_token(i) for i in ids]

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Texts to (input_ids [B,L] int64, attention_mask [B,L] int64), L the longest text of the batch.

        `max_tokens` counts the special tokens; longer texts lose their last word pieces, never [CLS] or [SEP].
        """
        return self.encode_pieces(self.word_pieces(texts), max_tokens)

    def encode_pieces(self, pieces: Sequence[Sequence[int]], max_tokens: int) -> tuple[Tensor, Tensor]:
        tail = [self.sep_id] if self.sep else []
        return self.pad([[self.cls_id, *ids[: self.room(max_tokens)], *tail] for ids in pieces])

    def room(self, max_tokens: int) -> int:
        """The word pieces of a text that `max_tokens` leave room for."""
        return max_tokens - 1 - self.sep

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids to (ids [B,L] int64, padded to the longest; mask [B,L] int64, 1 = token)."""
        length = max((len(row) for row in rows), default=0)
        ids = torch.tensor([[*row, *[self.pad_id] * (length - len(row))] for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        mask = (torch.arange(length) < lengths[:, None]).long()  # [B,L]
        return ids.view(len(rows), length), mask

    @staticmethod
    def padding(mask: Tensor) -> Tensor | None:
        """The mask, on the CPU, if it has a 0, else None: attention has faster kernels without one."""
        return None if mask.all() else mask

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Token ids [L] to text: special tokens dropped, word pieces joined, composed characters (NFC)."""
        return unicodedata.normalize("NFC", self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def decode_caption(self, ids: Sequence[int] | Tensor) -> str:
        """`decode`, with marks inside words joined again: 10:30 and men's, not 10 : 30 and men ' s."""
        text = self.decode(ids)
        for pattern, replacement in INSIDE_WORDS:
            text = pattern.sub(replacement, text)
        return text.strip()

    def decode_answer(self, ids: Sequence[int] | Tensor) -> str:
        """`decode_caption`, and b&w without spaces."""
        return AMPERSAND.sub("&", self.decode_caption(ids))

    def rewritten(self, texts: Sequence[str], answers: bool = False) -> list[str]:
        """The captions, or answers, as a model writes them that makes no mistake; UNKNOWN for what it has no piece."""
        decode = self.decode_answer if answers else self.decode_caption
        runs = (
            [(known, list(run)) for known, run in groupby(ids, lambda i: i != self.unk_id)]
            for ids in self.word_pieces(texts)
        )
        return [" ".join(decode(run) if known else UNKNOWN for known, run in row) for row in runs]

    def unwritable(self, texts: Sequence[str]) -> tuple[float, str]:
        """(the share of the texts whose letters and digits change as word pieces, "" or an example); case apart."""
        probes = evenly(texts, PROBES)
        plain = self._backend.normalizer.normalize_str
        changed = [
            text
            for text, ids in zip(probes, self.word_pieces(probes), strict=True)
            if self.unk_id in ids or (not text.isascii() and _letters(plain(text)) != _letters(text))
        ]
        return len(changed) / max(1, len(probes)), next(iter(changed), "")


# Where word pieces are parts of what is written as one word: (pattern, replacement) in order.
INSIDE_WORDS = (
    (re.compile(f"(?<={IDEOGRAPH}) | (?={IDEOGRAPH})"), ""),  # they are pieces by themselves and written without spaces
    (re.compile(r"(?<=\w) ?' ?(?=\w)|(?<=s) '(?= |$)"), "'"),  # men's, o'clock, dogs'
    (re.compile(r"(?<=\w) ?’ ?(?=\w)"), "’"),  # l’été
    (re.compile(r"(?<=\d) ?([:.,/]) ?(?=\d)"), r"\1"),  # 10:30, 3.5, 1,000, 1/2
    (re.compile(r"(?<=\w) ?([-/]) ?(?=\w)"), r"\1"),  # t-shirt, and/or
    (re.compile(r"(?<=\w) ?\. (?=\w ?\.)"), "."),  # u.s.a.
    (re.compile(r" (?=[.,:;!?%])|(?<=[$#]) "), ""),  # yes! 50% $5 #1
)
AMPERSAND = re.compile(r"(?<=\w) ?& ?(?=\w)")  # b&w, in answers; in captions it stands for the word


def checkpoint_tokenizer(vocab: str | Path, description: dict) -> Tokenizer:
    """The tokenizer of the config's vocabulary, with a final [SEP] if the checkpoint was trained with one.

    description: a checkpoint's architecture.
    """
    tokenizer = Tokenizer(vocab, sep=description["sep"])
    check_vocabulary(tokenizer, description)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, description: dict) -> None:
    """UserError if a checkpoint was trained with other word pieces, or in another case: of the same size they load, and
    every text is gibberish.
    """
    size = description.get("bert", {}).get("vocab_size", tokenizer.vocab_size)
    if size != tokenizer.vocab_size or description.get("vocab", tokenizer.digest) != tokenizer.digest:
        raise UserError(
            f"text.vocab: {tokenizer.vocab_file}: not the {size} word pieces, or not the case (tokenizer_config.json), "
            "that the checkpoint was trained with; use its own vocabulary"
        )


def vocabulary_case(path: Path, pieces: Iterable[str]) -> dict[str, bool]:
    """What the tokenizer_config.json beside a vocab.txt says of case, accents and ideographs, as BertTokenizer's keys;
    without one, what the pieces show: capitals are kept if one has a capital; accents, and what else BERT's stripping
    of them takes apart (Hangul) or leaves out (the vowels of Hindi), if one has such a character.
    """
    pieces = [piece for piece in pieces if not re.fullmatch(r"\[.+\]", piece)]  # not [CLS], [unused1]
    lower = all(piece == piece.lower() for piece in pieces)
    plain = (unicodedata.normalize("NFD", piece) for piece in pieces)
    accents = any(a != b or "Mn" in map(unicodedata.category, a) for a, b in zip(plain, pieces, strict=True))
    case = {"do_lower_case": lower, "strip_accents": lower and not accents, "tokenize_chinese_chars": True}
    file = path.with_name("tokenizer_config.json")
    if not file.is_file():
        return case
    values = read_json(file)
    if values.get("tokenizer_class") == "BertJapaneseTokenizer":
        raise UserError(f"{file}: its words are found by a dictionary, which is not supported; take another vocabulary")
    lower, accents = values.get("do_lower_case", True), values.get("strip_accents")
    case = {"do_lower_case": lower, "strip_accents": lower if accents is None else accents}
    return {**case, "tokenize_chinese_chars": values.get("tokenize_chinese_chars", True)}


def _letters(text: str) -> str:
    """Letters, their marks and digits in lower case."""
    text = unicodedata.normalize("NFC", text.lower())
    return "".join(character for character in text if unicodedata.category(character)[0] in "LMN")
