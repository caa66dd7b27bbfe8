"""Captions and questions: cleaning as ALBEF does, and BERT word pieces without a final [SEP]."""

import io
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils import UserError, find_file, open_file

# The Rust tokenizer's own threads would warn about, and may hang in, forked data workers; batches here are small.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
IGNORED = {"Cc", "Cf", "Co", "Cs", "Mn", "Zl", "Zp", "Zs"}  # Unicode's categories that BERT's tokenizer leaves out


def clean_caption(text: str, max_words: int | None) -> str:
    """ALBEF's `pre_caption`: lower case, punctuation out, `-` and `/` to spaces, at most `max_words` words.

    Returns "" if nothing is left (ALBEF raises): the data sets decide what an empty caption means.
    """
    return _truncate(_strip_punctuation(text).replace("<person>", "person"), max_words)


def clean_question(text: str, max_words: int | None = None) -> str:
    """ALBEF's `pre_question`: the same rules as for captions, without the <person> placeholder."""
    return _truncate(_strip_punctuation(text), max_words)


def has_word(text: str) -> bool:
    """Whether a tokenizer makes word pieces of a text: it has more than white space, control characters and accents."""
    return any(character != "\ufffd" and unicodedata.category(character) not in IGNORED for character in text)


def _strip_punctuation(text: str) -> str:
    return PUNCTUATION.sub("", text.lower()).replace("-", " ").replace("/", " ")


def _truncate(text: str, max_words: int | None) -> str:
    # Every run of white space counts as one space (ALBEF's question rule lets double spaces count as words).
    return " ".join(text.split()[:max_words])


class Tokenizer:
    """BERT's uncased word pieces from a local `vocab.txt`, as padded tensors.

    The encoders see `[CLS] X` without a final [SEP], as in ALBEF and mPLUG: transformers' default adds one,
    and checkpoints trained without it lose points silently when they get it. `sep=True` adds it.
    """

    def __init__(self, vocab_file: str | Path, sep: bool = False):
        path = Path(find_file(vocab_file, "vocabulary (text.vocab)"))
        try:
            with io.TextIOWrapper(open_file(path), "utf-8") as file:
                lines = file.read().rstrip("\n").split("\n")  # splitlines() would also cut at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"vocabulary (text.vocab): {path} cannot be read ({error})") from None
        vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing:
            raise UserError(f"vocabulary {path} lacks {', '.join(missing)}; it must be a BERT vocab.txt")
        if len(vocab) < len(lines):
            raise UserError(f"vocabulary {path} has a word piece twice; it must be a BERT vocab.txt")
        self.sep, self.vocab_file = sep, path
        self.vocab_size = len(vocab)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIAL_TOKENS)
        self._backend = _word_pieces(path, vocab)

    def word_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens, unpadded and untruncated; UserError for a text that is none."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]
        except TypeError:  # of a configuration or command line; annotations are checked
            raise UserError("a text holds half of a surrogate pair, which is no character") from None

    def words(self, texts: Sequence[str]) -> list[str]:
        """The words that word pieces are made of, without punctuation: lower case, no accents, ideographs alone."""
        plain = map(self._backend.normalizer.normalize_str, texts)
        words = (word for text in plain for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text))
        return [word for word in words if word.isalnum()]

    def names(self, ids: Sequence[int]) -> list[str]:
        """The word pieces as the vocabulary writes them: dog, ##s."""
        return [self._backend.id_to_token(i) for i in ids]

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Texts to (input_ids [B,L] int64, attention_mask [B,L] int64), L the longest text of the batch.

        `max_tokens` counts the special tokens; longer texts lose their last word pieces, never [CLS] or [SEP].
        """
        return self.encode_pieces(self.word_pieces(texts), max_tokens)

    def encode_pieces(self, pieces: Sequence[Sequence[int]], max_tokens: int) -> tuple[Tensor, Tensor]:
        """`encode` of texts whose word pieces are known."""
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
        """Token ids [L] to text: special tokens dropped, word pieces joined."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_caption(self, ids: Sequence[int] | Tensor) -> str:
        """`decode`, with marks inside words joined again: 10:30 and men's, not 10 : 30 and men ' s."""
        text = self.decode(ids)
        for pattern, replacement in INSIDE_WORDS:
            text = pattern.sub(replacement, text)
        return text.strip()

    def decode_answer(self, ids: Sequence[int] | Tensor) -> str:
        """`decode_caption`, and b&w without spaces."""
        return AMPERSAND.sub("&", self.decode_caption(ids))


# Where word pieces are parts of what is written as one word: (pattern, replacement) in order.
INSIDE_WORDS = (
    (re.compile(r"(?<=\w) ?' ?(?=\w)|(?<=s) '(?= |$)"), "'"),  # men's, o'clock, dogs'
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
    known = description["bert"]["vocab_size"]
    if tokenizer.vocab_size != known:
        raise UserError(
            f"text.vocab: {vocab} has {tokenizer.vocab_size} word pieces, the checkpoint {known}: "
            "use the vocabulary that it was trained with"
        )
    return tokenizer


def _word_pieces(path: Path, vocab: dict[str, int]):
    """The Rust tokenizer inside transformers' BertTokenizer, whose `__call__` costs several times what the Rust call
    costs and pads with its own rules."""
    from transformers import BertTokenizerFast

    backend = BertTokenizerFast(vocab=dict(vocab), do_lower_case=True).backend_tokenizer
    if backend.token_to_id("[MASK]") != vocab["[MASK]"] or backend.get_vocab_size() != len(vocab):
        raise UserError(f"transformers read {path} differently than line by line; use transformers 5.17 or newer")
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # a text that says [SEP] means these five characters
    return backend
