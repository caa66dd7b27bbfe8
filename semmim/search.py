"""Scoring one's own images with texts, in the two stages of evaluation/ranking.py."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation import ranking

if TYPE_CHECKING:
    from semmim.model import SemMIM


@dataclass(frozen=True)
class Hit:
    """What was found for a query: the place of an image (or text) among those given, and its scores.

    score: what the order is by, None below the first k; cosine: of the two encoders' features.
    """

    number: int
    score: float | None
    cosine: float


def search(
    model: "SemMIM", batches: Iterable[tuple[Tensor, list[int]]], texts: list[str], images_ask: bool, k: int, score: str
) -> list[list[Hit]]:
    """The items of every query, best first: images for each text or, if images ask, texts for each image.

    batches: (images [n, 3, S, S] on the model's device, their places, in which images that cannot be read leave gaps);
    texts: cleaned; k: candidates to re-rank, 0: none; score: of evaluation.ranking.SCORES.
    """
    places: list[int] = []

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:  # without gaps
        for images, some in batches:
            places.extend(some)
            yield images, torch.arange(len(places) - len(some), len(places))

    rows = model.tokenizer.encode(texts, model.settings.retrieval.text.max_tokens)
    options = {"device": model.device, "precision": model.precision, "tokens": k > 0}
    encoded = ranking.extract_features(model.backbone, numbered(), None, *rows, **options)
    images, sentences = (part.feats for part in encoded)
    asking, asked = (images, sentences) if images_ask else (sentences, images)
    cosines, ids = (asking @ asked.T).cpu().sort(dim=1, descending=True, stable=True)  # [Q, C]
    scores = cosines[:, :0]
    if k:  # of one direction
        some = ranking.Candidates(ids[:, :k], cosines[:, :k], ids[:, 0])
        none = ranking.Candidates(ids.new_zeros(len(asked), 0), torch.zeros(len(asked), 0), ids[:0, 0])
        both = (some, none) if images_ask else (none, some)
        scores = ranking.rerank(model.backbone, *encoded, *both, score=score, precision=model.precision)[not images_ask]
    numbers, hits = list(range(len(texts))) if images_ask else places, []
    for row, cosine, scored in zip(ids.tolist(), cosines.tolist(), scores.tolist(), strict=True):
        best = [Hit(numbers[i], s, c) for i, c, s in zip(row[:k], cosine[:k], scored, strict=True)]
        rest = [Hit(numbers[i], None, c) for i, c in zip(row[k:], cosine[k:], strict=True)]
        hits.append(sorted(best, key=lambda hit: -hit.score) + rest)  # stable: equal scores by cosine
    return hits
