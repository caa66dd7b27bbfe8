"""`tools/predict.py retrieve`: rank one's own images for a sentence, or sentences for an image."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import utils
from dataset.reading import find_images
from evaluation import ranking
from semmim import SemMIM
from tools.pages import size_of
from tools.predict_files import ROWS, add_common, check_output, image_batches, load, printable, read_lines, rows_to
from tools.predict_sheet import About, Result, write_sheet

K = 64  # candidates to re-rank


def add_retrieve(commands) -> None:
    parser = commands.add_parser("retrieve", help="rank images for a sentence, or sentences for an image")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--text", action="append", default=[], help="a sentence; may be given several times")
    parser.add_argument("--texts", help="file with a sentence a line")
    add_common(
        parser,
        "of Retrieval.py, or of Pretrain.py (zero-shot)",
        "contact sheet (.html), or rows query, place, item, score, cosine (.jsonl, .csv)",
    )
    parser.add_argument(
        "--k",
        type=int,
        help=f"candidates to re-rank by fusion; 0: none, the order is ITC's (default: {K}, or 0 where the checkpoint's "
        "entry best.order says that ITC alone was better on val)",
    )
    parser.add_argument("--top", type=int, default=20, help="results to show (default: %(default)s)")
    parser.set_defaults(run=retrieve)


def retrieve(args: argparse.Namespace) -> None:
    """Print `query`, and below it a line a result: place, re-ranking score, cosine, item; write the sheet if asked to.

    One image file and several sentences: the image asks. Otherwise every sentence asks for images.
    """
    if args.top < 1 or (args.k is not None and args.k < 0):
        raise utils.UserError("--top must be at least 1, --k at least 0 (0: no re-ranking)")
    output, texts, paths = check_output(args.output, (".html", *ROWS)), read_texts(args), find_images(args.images)
    # What was named decides, not what can be read: a folder of one image is still ranked for each sentence.
    image_asks = len(texts) > 1 and len(args.images) == 1 and not utils.find_file(args.images[0]).is_dir()
    model, images = load(args), []
    ids, mask = model.tokenizer.encode(model.clean(texts), model.settings.retrieval.text.max_tokens)
    precision = utils.resolve_precision(args.precision, model.device)
    features = ranking.extract_features(
        model.backbone,
        numbered_batches(model, paths, images),
        len(paths),
        ids,
        mask,
        device=model.device,
        precision=precision,
        exact=False,
    )
    score, k, why = order_of(model, args.k)
    queries, items = (images, texts) if image_asks else (texts, images)
    rankings = rank(model.backbone, *features, image_asks, k, score, precision)
    weight = {"itm": 0.0, "itm+itc": 1.0, "itm+itc/t": 1 / model.backbone.temperature().item()}[score]
    shown = [
        (query, results_of(items, ranking, weight)[: args.top])
        for query, ranking in zip(queries, rankings, strict=True)
    ]
    show(shown)
    if output and output.suffix.lower() == ".html":
        counts = (len(images), len(paths) - len(images), len(items))
        write_sheet(output, About(args.checkpoint, model.stage, *counts, score, k, why), shown)
        print(f"wrote {output} ({size_of(output)}, thumbnails included)")
    elif output:
        write_rows(output, shown)


def show(results: Sequence[tuple[Path | str, Sequence[Result]]]) -> None:
    """Print the queries and, below each, what was found."""
    for query, found in results:
        print(printable(query))
        for place, result in enumerate(found, 1):
            number = "      -" if result.score is None else f"{result.score:7.2f}"
            print(f"{place:5} {number} {result.contrast:6.3f}  {printable(result.item)}")


def write_rows(path: Path, results: Sequence[tuple[Path | str, Sequence[Result]]]) -> None:
    """The results as rows; score is null (CSV: empty) where a candidate was not re-ranked."""
    with rows_to(path, ("query", "place", "item", "score", "cosine")) as write:
        for query, found in results:
            for place, result in enumerate(found, 1):
                row = {"query": printable(query), "place": place, "item": printable(result.item)}
                score = None if result.score is None else round(result.score, 6)
                write({**row, "score": score, "cosine": round(result.contrast, 6)})


def order_of(model: SemMIM, k: int | None) -> tuple[str, int, str]:
    """(score, candidates to re-rank by it, 0 for none, why so), from what --k says and what was better on val.

    That is the checkpoint's entry best.order: `itc`, or the name of a re-ranking score; without it the score is the
    configuration's.
    """
    own = model.settings.retrieval.rerank.score
    order = model.content.best.get("order")
    if k is not None:
        why = f"as asked by --k {k}"
    elif order is None:
        why = "the default, since the checkpoint does not say which order was better on validation images"
    else:
        why = f"the better order on the checkpoint's validation images ({order})"
    if k is None:
        k = 0 if order == "itc" else K
    return (own if order in (None, "itc") else order), k, why


def read_texts(args: argparse.Namespace) -> list[str]:
    texts = [*args.text, *read_lines("--texts", args.texts)]
    if not texts:
        raise utils.UserError("no sentence: give --text SENTENCE or --texts FILE")
    return texts


def numbered_batches(
    model: SemMIM, paths: list[Path], usable: list[Path]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images [n, 3, S, S], numbers [n]), read only when their turn comes, numbered without gaps.

    Those that can be read are appended to `usable` in the order of their numbers.
    """
    for images, names in image_batches(model, paths, "encoding"):
        usable += names
        yield images, torch.arange(len(usable) - len(names), len(usable))


def results_of(items: Sequence[Path | str], ranking: list[tuple], weight: float) -> list[Result]:
    """What one query found, best first, with the place by each of the two scores alone.

    ranking: of `rank`; weight: of the cosine in its re-ranking score.
    """
    matches = [None if score is None else score - weight * cosine for _, score, cosine, _ in ranking]
    order = sorted((i for i, match in enumerate(matches) if match is not None), key=lambda i: -matches[i])
    places = {i: place for place, i in enumerate(order, 1)}
    return [
        Result(items[number], score, cosine, place, matches[i], places.get(i))
        for i, (number, score, cosine, place) in enumerate(ranking)
    ]


def rank(
    backbone: nn.Module,
    images: ranking.ImageFeatures,
    texts: ranking.TextFeatures,
    image_asks: bool,
    k: int,
    score: str,
    precision: str,
) -> list[list[tuple[int, float | None, float, int]]]:
    """For every query its items, best first: (number, re-ranking `score` or None below the first k, cosine, place by
    the cosine alone, from 1)."""
    asking, asked = (images.feats, texts.feats) if image_asks else (texts.feats, images.feats)
    ids = [torch.zeros(len(feats), dtype=torch.int64) for feats in (asking, asked)]
    first = ranking.topk_candidates(asking, asked, *ids, len(asked))  # the whole order of the first stage
    some = ranking.Candidates(first.ids[:, :k], first.scores[:, :k], first.ranks)
    nothing = ranking.Candidates(*(x.new_zeros(len(asked), 0) for x in (first.ids, first.scores)), first.ranks[:0])
    tr, ir = (some, nothing) if image_asks else (nothing, some)
    if k:
        of_images, of_texts = ranking.rerank(backbone, images, texts, tr, ir, score=score, precision=precision)
        scores = of_images if image_asks else of_texts
    else:
        scores = some.scores  # of nothing
    results = []
    for query, order in enumerate(scores.argsort(dim=1, descending=True, stable=True).tolist()):
        places = [*order, *range(len(order), first.ids.shape[1])]
        matches = [*scores[query, order].tolist(), *[None] * (len(places) - len(order))]
        numbers, cosines = (column[query, places].tolist() for column in (first.ids, first.scores))
        results.append(list(zip(numbers, matches, cosines, (place + 1 for place in places), strict=True)))
    return results
