"""Scoring one's own images with texts, in the two stages of evaluation/ranking.py."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation import ranking

if TYPE_CHECKING:
    from semmim.model import SemMIM


@dataclass(frozen=True)
class Hit:
    """What was found for a query: the place of an image (or text) among those given, and its scores.

    score: what the order is by, None below the first k; cosine: of the two encoders' features; match: the fusion
    encoder's part of `score`, None below the first k.
    """

    number: int
    score: float | None
    cosine: float
    match: float | None


Encoded = tuple[ranking.ImageFeatures, ranking.TextFeatures]


def encode(
    model: "SemMIM", batches: Iterable[tuple[Tensor, list[int]]], texts: list[str], tokens: bool
) -> tuple[list[int], Encoded | None]:
    """(the images' places, both sides encoded; None if either is empty).

    model: semmim.SemMIM; batches: (images [n, 3, S, S] on its device, their places, in which images that cannot be read
    leave gaps); texts: cleaned; tokens: whether pairs will be matched.
    """
    places, batches = [], iter(batches)
    first = list(islice(batches, 1))

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:  # without gaps
        for images, some in chain(first, batches):
            places.extend(some)
            yield images, torch.arange(len(places) - len(some), len(places))

    if not first or not texts:
        return [place for _, some in chain(first, batches) for place in some], None
    rows = model.tokenizer.encode(texts, model.settings.retrieval.text.max_tokens)
    options = {"device": model.device, "precision": model.precision, "tokens": tokens}
    return places, ranking.extract_features(model.backbone, numbered(), None, *rows, **options)


def rerank(model: "SemMIM", encoded: Encoded, ids: Tensor, cosines: Tensor, images_ask: bool, score: str) -> Tensor:
    """`ranking.rerank` of one direction: the scores of the items ids [Q, k], with these cosines to the queries."""
    images, texts = encoded
    asked = len(texts.feats if images_ask else images.feats)
    some = ranking.Candidates(ids, cosines, ids[:, 0])
    none = ranking.Candidates(ids.new_zeros(asked, 0), torch.zeros(asked, 0), ids[:0, 0])
    both = (some, none) if images_ask else (none, some)
    return ranking.rerank(model.backbone, images, texts, *both, score=score, precision=model.precision)[not images_ask]


def search(
    model: "SemMIM", batches: Iterable[tuple[Tensor, list[int]]], texts: list[str], images_ask: bool, k: int
) -> list[list[Hit]]:
    """The items of every query, best first: images for each text or, if images ask, texts for each image.

    model, batches, texts: see `encode`; k: candidates to re-rank, 0: none.
    """
    places, encoded = encode(model, batches, texts, tokens=k > 0)
    if encoded is None:
        return [[] for _ in (places if images_ask else texts)]
    images, sentences = (part.feats for part in encoded)
    asking, asked = (images, sentences) if images_ask else (sentences, images)
    cosines, ids = (asking @ asked.T).cpu().sort(dim=1, descending=True, stable=True)  # [Q, C]
    score, _ = model.order()
    scores = rerank(model, encoded, ids[:, :k], cosines[:, :k], images_ask, score) if k else cosines[:, :0]
    weight = {"itm": 0.0, "itm+itc": 1.0, "itm+itc/t": 1 / model.temperature}[score]
    numbers, found = list(range(len(texts))) if images_ask else places, []
    for row, cosine, scored in zip(ids.tolist(), cosines.tolist(), scores.tolist(), strict=True):
        best = [Hit(numbers[i], s, c, s - weight * c) for i, c, s in zip(row[:k], cosine[:k], scored, strict=True)]
        rest = [Hit(numbers[i], None, c, None) for i, c in zip(row[k:], cosine[k:], strict=True)]
        found.append(sorted(best, key=lambda hit: -hit.score) + rest)  # stable: equal scores by cosine
    return found
