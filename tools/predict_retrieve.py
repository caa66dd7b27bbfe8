"""`tools/predict.py retrieve`: rank one's own images for a sentence, or sentences for an image."""

import argparse
import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import utils
from dataset.reading import find_images
from dataset.transforms import open_image
from evaluation import ranking
from semmim import SemMIM
from tools.predict_files import ROWS, add_common, check_output, image_batches, load, printable, read_lines, rows_to

THUMBNAIL = 160  # pixels of the longer side
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
    score, k = order_of(model, args.k)
    results = rank(model.backbone, *features, image_asks, k, score, precision)
    queries, items = (images, texts) if image_asks else (texts, images)
    shown = [
        (query, [(items[i], itm, itc) for i, itm, itc in found[: args.top]])
        for query, found in zip(queries, results, strict=True)
    ]
    show(shown)
    if output and output.suffix.lower() == ".html":
        write_sheet(output, shown)
        print(f"wrote {output}")
    elif output:
        write_rows(output, shown)


def show(results: list[tuple[object, list[tuple]]]) -> None:
    """Print the queries and, below each, what was found."""
    for query, found in results:
        print(printable(query))
        for place, (item, itm, itc) in enumerate(found, 1):
            number = "      -" if itm is None else f"{itm:7.2f}"
            print(f"{place:5} {number} {itc:6.3f}  {printable(item)}")


def write_rows(path: Path, results: list[tuple[object, list[tuple]]]) -> None:
    """The results as rows; score is null (CSV: empty) where a candidate was not re-ranked."""
    with rows_to(path, ("query", "place", "item", "score", "cosine")) as write:
        for query, found in results:
            for place, (item, itm, itc) in enumerate(found, 1):
                row = {"query": printable(query), "place": place, "item": printable(item)}
                write({**row, "score": None if itm is None else round(itm, 6), "cosine": round(itc, 6)})


def order_of(model: SemMIM, k: int | None) -> tuple[str, int]:
    """(score, candidates to re-rank by it, 0 for none), from what --k says and what was better on val.

    That is the checkpoint's entry best.order: `itc`, or the name of a re-ranking score; without it the score is the
    configuration's.
    """
    own = model.settings.retrieval.rerank.score
    order = model.content.best.get("order", own)
    if k is None:
        k = 0 if order == "itc" else K
    return (own if order == "itc" else order), k


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


def rank(
    backbone: nn.Module,
    images: ranking.ImageFeatures,
    texts: ranking.TextFeatures,
    image_asks: bool,
    k: int,
    score: str,
    precision: str,
) -> list[list[tuple[int, float | None, float]]]:
    """For every query its items, best first: (number, re-ranking `score` or None below the first k, cosine)."""
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
    order = scores.argsort(dim=1, descending=True, stable=True)
    results = []
    for query, places in enumerate(order.tolist()):
        row = [(int(first.ids[query, i]), float(scores[query, i]), float(first.scores[query, i])) for i in places]
        rest = range(len(places), first.ids.shape[1])
        row += [(int(first.ids[query, i]), None, float(first.scores[query, i])) for i in rest]
        results.append(row)
    return results


def write_sheet(path: Path, results: list[tuple[object, list[tuple]]]) -> None:
    """One HTML file with everything in it: a heading a query, a card a result; images as thumbnails."""

    def show(item) -> str:
        name = html.escape(printable(item))
        return f'<img src="{thumbnail(item)}" alt=""><br><small>{name}</small>' if isinstance(item, Path) else name

    parts = []
    for query, found in results:
        cards = [
            f"<li>{show(item)}<br>{'' if itm is None else f'score {itm:.2f}, '}cosine {itc:.3f}</li>"
            for item, itm, itc in found
        ]
        parts.append(f"<h2>{show(query)}</h2>\n<ol>\n" + "\n".join(cards) + "\n</ol>")
    style = "body{font-family:sans-serif}ol{display:flex;flex-wrap:wrap;gap:1em}li{width:11em;overflow-wrap:anywhere}"
    page = f'<!doctype html>\n<meta charset="utf-8">\n<title>SemMIM</title>\n<style>{style}</style>\n' + "\n".join(
        parts
    )
    with utils.replacing(path) as temporary:
        temporary.write_text(page + "\n", encoding="utf-8")


def thumbnail(path: Path) -> str:
    """The image, small, as a data URI."""
    image = open_image(str(path))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
