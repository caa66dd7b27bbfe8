"""Ranking one's own images for texts, or texts for images, in the two stages of evaluation/ranking.py."""

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


def search(
    model: "SemMIM", batches: Iterable[tuple[Tensor, list[int]]], texts: list[str], images_ask: bool, k: int
) -> list[list[Hit]]:
    """The items of every query, best first: images for each text or, if images ask, texts for each image.

    model: semmim.SemMIM; batches: (images [n, 3, S, S] on its device, their places); texts: cleaned; k: candidates to
    re-rank, 0: none.
    """
    backbone, (score, _) = model.backbone, model.order()
    batches = iter(batches)
    first = list(islice(batches, 1))
    if not first or not texts:
        return [[] for _, some in chain(first, batches) for _ in some] if images_ask else [[] for _ in texts]
    places: list[int] = []

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:  # without gaps, which images that cannot be read leave
        for images, some in chain(first, batches):
            places.extend(some)
            yield images, torch.arange(len(places) - len(some), len(places))

    tokens = model.tokenizer.encode(texts, model.settings.retrieval.text.max_tokens)
    options = {"device": model.device, "precision": model.precision, "tokens": k > 0}
    images, encoded = ranking.extract_features(backbone, numbered(), None, *tokens, **options)
    asking, asked = (images.feats, encoded.feats) if images_ask else (encoded.feats, images.feats)
    cosines, ids = (asking @ asked.T).cpu().sort(dim=1, descending=True, stable=True)  # [Q, C]
    scores = cosines[:, :0]
    if k:
        some = ranking.Candidates(ids[:, :k], cosines[:, :k], ids[:, 0])
        none = ranking.Candidates(ids.new_zeros(len(asked), 0), cosines.new_zeros(len(asked), 0), ids[:0, 0])
        both = (some, none) if images_ask else (none, some)
        scores = ranking.rerank(backbone, images, encoded, *both, score=score, precision=model.precision)[
            not images_ask
        ]
    weight = {"itm": 0.0, "itm+itc": 1.0, "itm+itc/t": 1 / backbone.temperature().item()}[score]
    numbers = list(range(len(texts))) if images_ask else places
    found = []
    for row, cosine, scored in zip(ids.tolist(), cosines.tolist(), scores.tolist(), strict=True):
        best = [Hit(numbers[i], s, c, s - weight * c) for i, c, s in zip(row[:k], cosine[:k], scored, strict=True)]
        rest = [Hit(numbers[i], None, c, None) for i, c in zip(row[k:], cosine[k:], strict=True)]
        found.append(sorted(best, key=lambda hit: -hit.score) + rest)  # stable: equal scores by cosine
    return found
