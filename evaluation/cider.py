"""CIDEr-D (Vedantam et al. 2015), as a metric and as the reward of self-critical training: in Python, without Java.

The numbers are coco-caption's (whose CIDEr is CIDEr-D) for the same words and document frequencies.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.text import IDEOGRAPH, Tokenizer
from evaluation.written import Rewrite

END = "<eos>"  # ends a sentence if that counts as a word; no caption has it, since < and > are words themselves
NOT_WORDS = frozenset("'' ' `` ` \" -lcb- -rcb- “ ” . ? ! , : - -- ... ;".split())  # what pycocoevalcap does not count
BRACKETS = str.maketrans({"(": " -lrb- ", ")": " -rrb- ", "{": " ", "}": " "})  # PTB's names of them do count
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)|(?<=\bcan)(not)\b")
WORD = re.compile(
    r"n't|'(?:s|m|d|re|ve|ll)(?!\w)|-[lr]rb-|(?:\b[a-z]\.){2,}|\b(?:st|mr|mrs|ms|dr|jr|sr)\.|\d+(?:[.,:]\d+)+"
    r"|\w+(?:[-/’]\w+)*|[^\w\s]"
)
WITHOUT_SPACES = re.compile(f"{IDEOGRAPH}|[\u0e00-\u0eff]")  # and Thai, Lao
ORDERS = 4  # n-grams of one to four words
SIGMA = 6.0  # of the Gaussian penalty on a difference in length


def apart(text: str) -> str:
    """The text composed (NFC), with spaces around characters that are written without: each counts as a word."""
    return WITHOUT_SPACES.sub(r" \g<0> ", unicodedata.normalize("NFC", text))


def caption_words(text: str) -> str:
    """The words of a caption, separated by spaces, nearly as the PTB tokenizer and pycocoevalcap give them.

    Lower case; clitics are words (`do n't`, `man 's`), hyphens stay within words, punctuation is dropped except
    brackets. Ideographs and kana are words.
    """
    words = WORD.findall(CLITIC.sub(r" \1\2", apart(text).lower().translate(BRACKETS)))
    return " ".join(word for word in words if word not in NOT_WORDS)


def ngrams(sentence: str) -> list[Counter[str]]:
    """How often each sequence of n words occurs in a sentence, for n from 1 to ORDERS."""
    words = sentence.split()
    return [
        Counter(" ".join(words[start : start + n]) for start in range(len(words) - n + 1)) for n in range(1, ORDERS + 1)
    ]


@dataclass
class Weighted:
    """A sentence as CIDEr-D compares it; entry n - 1 of a list is of n-grams of n words."""

    weights: list[dict[str, float]]  # TF-IDF of each n-gram: its count times log(images / document frequency)
    norms: list[float]
    bigrams: int  # their number, which coco-caption takes for the length


class CiderD:
    """CIDEr-D with the document frequencies of `references`: the captions of each image, as words separated by spaces.

    document_frequency: the number of images in whose captions an n-gram occurs, if two or more; of the others, none
    weighs as much as one.
    """

    def __init__(self, references: Iterable[Sequence[str]]):
        self.images, counts = 0, Counter()
        for captions in references:
            self.images += 1
            counts.update({gram for caption in captions for grams in ngrams(caption) for gram in grams})
        self.document_frequency = {gram: count for gram, count in counts.items() if count > 1}

    def scores(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
        """Several candidates of each image against its references -> the scores of all candidates, up to 10.

        candidates, references: per image, captions as words separated by spaces.
        """
        found = []
        for group, captions in zip(candidates, references, strict=True):
            truths = [self.weigh(caption) for caption in captions]
            for candidate in map(self.weigh, group):
                found.append(10 * sum(similarity(candidate, truth) for truth in truths) / len(truths))
        return found

    def weigh(self, sentence: str) -> Weighted:
        images, frequency = math.log(self.images), self.document_frequency
        counts = ngrams(sentence)
        weights = [{g: count * (images - math.log(frequency.get(g, 1))) for g, count in n.items()} for n in counts]
        norms = [math.sqrt(sum(weight**2 for weight in n.values())) for n in weights]
        return Weighted(weights, norms, counts[1].total())


def similarity(candidate: Weighted, reference: Weighted) -> float:
    """The mean over n of the cosine of the weights, the candidate's clipped to the reference's, from 0 to 1, less the
    longer one is than the other.
    """
    total = 0.0
    for n in range(ORDERS):
        own, truth, norm = candidate.weights[n], reference.weights[n], candidate.norms[n] * reference.norms[n]
        if norm > 0:
            total += sum(min(own[gram], truth[gram]) * truth[gram] for gram in own if gram in truth) / norm
    return total / ORDERS * math.exp(-((candidate.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))


def cider(references: Mapping[str | int, Sequence[str]], results: Mapping[str | int, str]) -> float:
    """CIDEr-D times 100 of the captions `results`, by image: their mean; quick, to choose checkpoints by."""
    words = [[caption_words(text) for text in texts] for texts in references.values()]
    scores = CiderD(words).scores([[caption_words(results[image])] for image in references], words)
    return 100 * sum(scores) / len(scores)


class CiderReward:
    """CIDEr-D of generated sentences, for models.caption.SelfCritical, with the training set's document frequencies.

    references: the captions of every training image; eos: whether END follows the words of every sentence; rewrite: of
    references, see `written.rewriting`.
    Without END a sentence that breaks off ("... on a bed with a") has n-grams of whole ones only, and is paid for its
    length. With it the n-grams at its end must be those that end a reference. OSCAR, whom the paper follows in
    captioning, ends every sentence so, whether the model ended it or not.
    """

    def __init__(
        self, tokenizer: Tokenizer, references: Iterable[Sequence[str]], eos: bool = True, rewrite: Rewrite = list
    ):
        self.tokenizer, self.eos, self.rewrite = tokenizer, eos, rewrite
        self.cider = CiderD(self.words(rewrite(captions)) for captions in references)

    def __call__(self, sequences: Tensor, references: Sequence[Sequence[str]]) -> Tensor:
        """[R, T] token ids, an image's R / B sentences side by side; the captions of B images -> [R] rewards to 10"""
        texts = [self.tokenizer.decode_caption(row) for row in sequences.tolist()]
        each = len(texts) // len(references)
        candidates = [self.words(texts[start : start + each]) for start in range(0, len(texts), each)]
        truths = [self.words(self.rewrite(captions)) for captions in references]
        return torch.tensor(self.cider.scores(candidates, truths), dtype=torch.float64)

    def words(self, texts: Sequence[str]) -> list[str]:
        """The texts as words separated by spaces."""
        words = map(caption_words, texts)
        return [f"{sentence} {END}".strip() for sentence in words] if self.eos else list(words)
