"""CIDEr-D as a metric and as the reward of self-critical training: in Python, without Java, in milliseconds.

The numbers are pycocoevalcap's (whose CIDEr is CIDEr-D) for the same words and document frequencies; these come
from the training references, are counted once and kept in a file.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.caption import CaptionTrainDataset
from dataset.text import Tokenizer
from utils import UserError, find_file, gather_objects, is_main, make_folder, replacing

END = "<eos>"  # what ends a sentence where that counts as a word; no caption has it, since < and > are words themselves
NOT_WORDS = frozenset("'' ' `` ` \" -lcb- -rcb- “ ” . ? ! , : - -- ... ;".split())  # what pycocoevalcap does not count
BRACKETS = str.maketrans({"(": " -lrb- ", ")": " -rrb- ", "{": " ", "}": " "})  # PTB's names of them do count
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)|(?<=\bcan)(not)\b")
WORD = re.compile(
    r"n't|'(?:s|m|d|re|ve|ll)(?!\w)|-[lr]rb-|(?:\b[a-z]\.){2,}|\b(?:st|mr|mrs|ms|dr|jr|sr)\.|\d+(?:[.,:]\d+)+"
    r"|\w+(?:[-/’]\w+)*|[^\w\s]"
)


def cider(references: Mapping[str | int, Sequence[str]], results: Mapping[str | int, str]) -> float:
    """CIDEr times 100 of a split, tokenised in Python: quick, without Java, for choosing among checkpoints."""
    ids = list(references)
    words = [[caption_words(text) for text in references[i]] for i in ids]
    scores = CiderD.from_references(words).scores([[caption_words(results[i])] for i in ids], words)
    return 100 * float(scores.mean())


def caption_words(text: str) -> str:
    """The words of a caption, separated by spaces, nearly as the PTB tokenizer and pycocoevalcap give them.

    Lower case; clitics are words (`do n't`, `man 's`), hyphens stay within words, punctuation is dropped but
    for brackets.
    """
    return " ".join(
        word for word in WORD.findall(CLITIC.sub(r" \1\2", text.lower().translate(BRACKETS))) if word not in NOT_WORDS
    )


def reward_words(text: str, eos: bool) -> str:
    """`caption_words` as the reward compares them; eos: END follows them.

    Without it a sentence that breaks off ("... on a bed with a") has n-grams of whole ones only, and is paid for its
    length. With it the n-grams at its end must be those that end a reference. OSCAR, whom the paper follows in
    captioning, ends every sentence so, whether the model ended it or not.
    """
    words = caption_words(text)
    return f"{words} {END}".strip() if eos else words


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) with fixed document frequencies, for n-grams of one to four words.

    An n-gram is known by a 64-bit hash of its words: two of COCO's three million n-grams coincide with a
    probability of 3e-7, and there is no vocabulary to keep.

    keys: [K] uint64, sorted, the n-grams of the references; counts: [K] in how many of the `images` each occurs.
    """

    ORDERS, SIGMA = 4, 6.0
    MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing

    def __init__(self, keys: np.ndarray, counts: np.ndarray, images: int):
        self.keys, self.counts, self.images = keys, counts, images

    @classmethod
    def from_references(cls, references: Iterable[Sequence[str]], chunk: int = 20000) -> "CiderD":
        """references: the captions of each image, as words separated by spaces."""
        parts, images, group = [], 0, []
        for captions in references:
            group.append(captions)
            images += 1
            if len(group) == chunk:
                parts.append(cls._document_counts(group))
                group = []
        if group or not parts:
            parts.append(cls._document_counts(group))
        keys, place = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
        counts = np.bincount(place.reshape(-1), np.concatenate([counts for _, counts in parts]), len(keys))
        return cls(keys, counts.astype(np.int32), images)

    @classmethod
    def cached(cls, path: Path, references: Sequence[Sequence[str]], eos: bool = False) -> "CiderD":
        """The same from the file `path` if it is of these references (raw captions), else computed and written.

        eos: as in `reward_words`; a file without END is known by its content, and made anew.
        """
        digest = hashlib.blake2b(END.encode() if eos else b"", digest_size=16)
        for captions in references:
            digest.update("\n".join([*captions, ""]).encode("utf-8", "surrogatepass") + b"\0")
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["digest"]) == digest.hexdigest():
                    return cls(file["keys"], file["counts"], int(file["images"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # absent or unreadable: computed again
        made = cls.from_references([reward_words(text, eos) for text in captions] for captions in references)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, digest=digest.hexdigest(), keys=made.keys, counts=made.counts, images=made.images)
        return made

    def scores(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Several candidates per image against the image's references -> [all candidates] float64, up to 10.

        candidates, references: per image, captions as words separated by spaces.
        """
        owners = [
            np.repeat(np.arange(len(group)), [len(texts) for texts in group]) for group in (candidates, references)
        ]
        hypotheses, truths = ([text for texts in group for text in texts] for group in (candidates, references))
        count = len(hypotheses)
        sentence, order, key, frequency, lengths = self._ngrams([*hypotheses, *truths])
        weight = frequency * (np.log(float(self.images)) - np.log(np.maximum(1.0, self._document_frequency(key))))
        norm = np.bincount(sentence * 4 + order, weight**2, len(lengths) * 4).reshape(-1, 4) ** 0.5

        # every candidate with every reference of its image
        per_image = np.array([len(texts) for texts in references])
        first = np.cumsum(per_image) - per_image  # [images] the first reference of each
        pairs = per_image[owners[0]]  # [candidates]
        left = np.repeat(np.arange(count), pairs)  # [P]
        first_pair = np.cumsum(pairs) - pairs
        right = (
            count + first[owners[0]][left] + np.arange(len(left)) - first_pair[left]
        )  # [P] sentence of the reference

        # n-grams that both sides of a pair have: those of the candidate looked up among (reference, n-gram)
        mine, theirs = np.flatnonzero(sentence < count), np.flatnonzero(sentence >= count)
        table = self._pair_key(sentence[theirs], key[theirs])
        sort = np.argsort(table)
        table, theirs = table[sort], theirs[sort]
        repeats = pairs[sentence[mine]]
        entry = np.repeat(mine, repeats)
        pair = first_pair[sentence[entry]] + np.arange(len(entry)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        wanted = self._pair_key(right[pair], key[entry])
        at = np.minimum(np.searchsorted(table, wanted), max(len(table) - 1, 0))
        same = np.flatnonzero(table[at] == wanted) if len(table) else np.zeros(0, dtype=np.int64)
        entry, pair, partner = entry[same], pair[same], theirs[at[same]]
        shared = np.minimum(weight[entry], weight[partner]) * weight[partner]  # clipped as CIDEr-D demands
        value = np.bincount(pair * 4 + order[entry], shared, len(left) * 4).reshape(-1, 4)
        scale = norm[left] * norm[right]
        value = value / np.where(scale > 0, scale, 1.0)
        bigrams = np.maximum(lengths - 1, 0)  # pycocoevalcap measures lengths so
        value *= np.exp(-((bigrams[left] - bigrams[right])[:, None] ** 2) / (2 * self.SIGMA**2))
        return 10.0 * np.bincount(left, value.mean(1), count) / pairs

    def _document_frequency(self, key: np.ndarray) -> np.ndarray:
        if not len(self.keys):
            return np.zeros(len(key))
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.where(self.keys[at] == key, self.counts[at], 0)

    @classmethod
    def _document_counts(cls, group: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of some images' captions and in how many of the images each occurs."""
        owner = np.repeat(np.arange(len(group)), [len(captions) for captions in group])
        sentence, _, key, _, _ = cls._ngrams([text for captions in group for text in captions])
        image = owner[sentence]
        sort = np.lexsort((image, key))
        key, image = key[sort], image[sort]
        new = np.ones(len(key), dtype=bool)
        new[1:] = (key[1:] != key[:-1]) | (image[1:] != image[:-1])
        return np.unique(key[new], return_counts=True)

    @classmethod
    def _ngrams(cls, sentences: Sequence[str]) -> tuple[np.ndarray, ...]:
        """(sentence, order 0..3, key, how often) of every distinct n-gram, and the sentences' lengths in words."""
        words = [sentence.split() for sentence in sentences]
        lengths = np.array([len(group) for group in words], dtype=np.int64)
        flat = np.array([word_hash(word) for group in words for word in group], dtype=np.uint64)
        owner = np.repeat(np.arange(len(words)), lengths)
        left = np.cumsum(lengths)[owner] - np.arange(len(flat))  # words from here to the sentence's end
        keys, orders, owners, key = [], [], [], flat
        for n in range(min(cls.ORDERS, len(flat))):
            if n:
                key = key[:-1] * cls.MIX + flat[n:]
            whole = left[: len(key)] > n
            keys.append(key[whole])
            owners.append(owner[: len(key)][whole])
            orders.append(np.full(len(keys[-1]), n))
        if not keys:
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty, flat, empty, lengths
        key, sentence, order = np.concatenate(keys), np.concatenate(owners), np.concatenate(orders)
        sort = np.lexsort((key, sentence))
        key, sentence, order = key[sort], sentence[sort], order[sort]
        new = np.ones(len(key), dtype=bool)
        new[1:] = (key[1:] != key[:-1]) | (sentence[1:] != sentence[:-1])
        start = np.flatnonzero(new)
        return sentence[start], order[start], key[start], np.diff(np.append(start, len(key))), lengths

    @classmethod
    def _pair_key(cls, sentence: np.ndarray, key: np.ndarray) -> np.ndarray:
        mixed = (key ^ (key >> np.uint64(31))) * cls.MIX + sentence.astype(np.uint64)
        return (mixed ^ (mixed >> np.uint64(29))) * cls.MIX


@lru_cache(maxsize=200_000)
def word_hash(word: str) -> int:
    """A 64-bit number for a word, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


# ------------------------------------------------------------------------------------------------------------
# The reward


class CiderReward:
    """CIDEr-D of generated sentences, for models.caption.SelfCritical.

    cider: holds the document frequencies; eos: as in `reward_words`, and as these were counted.
    """

    def __init__(self, tokenizer: Tokenizer, cider: CiderD, eos: bool = True):
        self.tokenizer, self.cider, self.eos = tokenizer, cider, eos

    def __call__(self, sequences: Tensor, references: Sequence[Sequence[str]]) -> Tensor:
        """[R, T] token ids, an image's R / B sentences side by side; the captions of B images -> [R] rewards to 10"""
        words = [reward_words(self.tokenizer.decode_caption(row), self.eos) for row in sequences.tolist()]
        each = len(words) // len(references)
        candidates = [words[i * each : (i + 1) * each] for i in range(len(references))]
        truths = [[reward_words(text, self.eos) for text in texts] for texts in references]
        return torch.from_numpy(self.cider.scores(candidates, truths))


def load_document_frequencies(
    annotations: str | Path, dataset: CaptionTrainDataset, folder: Path, eos: bool = True
) -> CiderD:
    """Of all training references; counted once, and kept beside the file `annotations`, or in `folder` if that fails.

    Called in all processes: the main one counts and writes, the others read.
    """
    first = find_file(annotations, "data.train")
    path = first.with_name(f"{first.stem}_cider.npz")
    references = [dataset.references(image) for image in range(len(dataset.paths))]
    if is_main():
        try:
            CiderD.cached(path, references, eos)
        except UserError:
            make_folder(folder)  # the run is not open yet
            path = folder / path.name
            CiderD.cached(path, references, eos)
    path = gather_objects(path)[0]
    return CiderD.cached(path, references, eos)
