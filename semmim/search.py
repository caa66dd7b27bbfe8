"""Ranking one's own images for texts, or texts for images, in the two stages of evaluation/ranking.py."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.text import Tokenizer
from evaluation import ranking
from models.semmim import SemMIM


@dataclass(frozen=True)
class Hit:
    """What was found for a query: the place of an image (or text) among those given, and its scores.

    score: what the order is by, None below the first k; cosine: of the two encoders' features; match: the fusion
    encoder's part of `score`, None below the first k. The places by cosine and by match alone count from 1.
    """

    number: int
    score: float | None
    cosine: float
    cosine_place: int
    match: float | None
    match_place: int | None


def search(
    backbone: SemMIM,
    tokenizer: Tokenizer,
    batches: Iterable[tuple[Tensor, list[int]]],
    texts: list[str],
    *,
    images_ask: bool,
    k: int,
    score: str,
    max_tokens: int,
    precision: str,
) -> list[list[Hit]]:
    """The items of every query, best first: images for each text or, if images ask, texts for each image.

    batches: (images [n, 3, S, S] on the backbone's device, their places); k: candidates to re-rank by `score` (of
    ranking.SCORES), 0: none.
    """
    places: list[int] = []

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:  # without gaps, which images that cannot be read leave
        for images, some in batches:
            places.extend(some)
            yield images, torch.arange(len(places) - len(some), len(places))

    device = backbone.log_temperature.device
    tokens = tokenizer.encode(texts, max_tokens)
    images, encoded = ranking.extract_features(backbone, numbered(), None, *tokens, device=device, precision=precision)
    asking, asked = (images.feats, encoded.feats) if images_ask else (encoded.feats, images.feats)
    cosines, ids = (asking @ asked.T).cpu().sort(dim=1, descending=True, stable=True)  # [Q, C]
    scores = cosines[:, :0]
    if k:
        some = ranking.Candidates(ids[:, :k], cosines[:, :k], ids[:, 0])
        none = ranking.Candidates(ids.new_zeros(len(asked), 0), cosines.new_zeros(len(asked), 0), ids[:0, 0])
        both = (some, none) if images_ask else (none, some)
        scores = ranking.rerank(backbone, images, encoded, *both, score=score, precision=precision)[not images_ask]
    weight = {"itm": 0.0, "itm+itc": 1.0, "itm+itc/t": 1 / backbone.temperature().item()}[score]
    numbers = list(range(len(texts))) if images_ask else places
    rows = zip(ids.tolist(), cosines.tolist(), scores.tolist(), strict=True)
    return [_hits([numbers[i] for i in row], cosine, scored, weight) for row, cosine, scored in rows]


def _hits(numbers: list[int], cosines: list[float], scores: list[float], weight: float) -> list[Hit]:
    """One query's. numbers, cosines: [C], best cosine first; scores: [k] of the first, in which the cosine has
    `weight`."""
    matches = [score - weight * cosine for score, cosine in zip(scores, cosines, strict=False)]
    by_match = sorted(range(len(scores)), key=lambda i: -matches[i])
    match_place = {i: place for place, i in enumerate(by_match, 1)}
    found = [
        Hit(number, scores[i], cosine, i + 1, matches[i], match_place[i])
        if i < len(scores)
        else Hit(number, None, cosine, i + 1, None, None)
        for i, (number, cosine) in enumerate(zip(numbers, cosines, strict=True))
    ]
    return sorted(found, key=lambda hit: (hit.score is None, -(hit.score or 0.0)))  # stable: the rest by cosine
