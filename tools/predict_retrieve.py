"""`tools/predict.py retrieve`: rank one's own images for a sentence, or sentences for an image."""

import argparse
import base64
import html
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import utils
from dataset.text import checkpoint_tokenizer, clean_caption
from dataset.transforms import ImageError, open_image, test_transform
from engine.config import RETRIEVAL, checkpoint_config
from evaluation import ranking
from models.semmim import load_backbone

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
THUMBNAIL = 160  # pixels of the longer side
BATCH = 64  # images of one forward
K = 64  # candidates to re-rank


def add_retrieve(commands) -> None:
    parser = commands.add_parser("retrieve", help="rank images for a sentence, or sentences for an image")
    parser.add_argument("pictures", nargs="+", help="image files, and folders whose images are taken")
    parser.add_argument("--text", action="append", default=[], help="a sentence; may be given several times")
    parser.add_argument("--texts", help="file with a sentence a line")
    parser.add_argument("--checkpoint", required=True, help="of Retrieval.py, or of Pretrain.py (zero-shot)")
    parser.add_argument(
        "--k",
        type=int,
        help=f"candidates to re-rank by fusion; 0: none, the order is ITC's (default: {K}, or 0 where the checkpoint's "
        "entry best.order says that ITC alone was better on val)",
    )
    parser.add_argument("--top", type=int, default=20, help="results to show (default: %(default)s)")
    parser.add_argument("--output", help="HTML contact sheet to write")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=retrieve)


def retrieve(args: argparse.Namespace) -> None:
    """Print `query`, and below it a line a result: place, re-ranking score, cosine, item; write the sheet if asked to.

    One image file and several sentences: the image asks. Otherwise every sentence asks for images.
    """
    if args.top < 1 or (args.k is not None and args.k < 0):
        raise utils.UserError("--top must be at least 1, --k at least 0 (0: no re-ranking)")
    if args.output and (Path(args.output).is_dir() or not Path(args.output).parent.is_dir()):
        raise utils.UserError(f"--output {args.output}: give a file in a folder that exists, such as sheet.html")
    texts, paths = read_texts(args), find_pictures(args.pictures)
    # What was named decides, not what can be read: a folder of one image is still ranked for each sentence.
    picture_asks = len(texts) > 1 and len(args.pictures) == 1 and not utils.find_file(args.pictures[0]).is_dir()
    device = utils.init_distributed(args.device)
    backbone, rest, _ = load_backbone(args.checkpoint)
    backbone.to(device)
    cfg = checkpoint_config(rest, RETRIEVAL)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, rest["description"])
    ids, mask = tokenizer.encode([clean_caption(text, cfg.data.max_words) for text in texts], cfg.text.max_tokens)
    pictures: list[Path] = []
    batches = picture_batches(paths, backbone.image_encoder.image_size, pictures)
    images, text_features = ranking.extract_features(
        backbone, batches, len(paths), ids, mask, device=device, exact=False
    )
    score, k = order_of(rest, cfg, args.k)
    results = rank(backbone, images, text_features, picture_asks, k, score)
    queries, items = (pictures, texts) if picture_asks else (texts, pictures)
    for query, found in zip(queries, results, strict=True):
        print(printable(query))
        for place, (item, itm, itc) in enumerate(found[: args.top], 1):
            shown = "      -" if itm is None else f"{itm:7.2f}"
            print(f"{place:5} {shown} {itc:6.3f}  {printable(items[item])}")
    if args.output:
        shown = [
            (query, [(items[i], itm, itc) for i, itm, itc in found[: args.top]])
            for query, found in zip(queries, results, strict=True)
        ]
        write_sheet(Path(args.output), shown)
        print(f"wrote {args.output}")


def order_of(checkpoint: dict, cfg: utils.Config, k: int | None) -> tuple[str, int]:
    """(score, candidates to re-rank by it, 0 for none), from what --k says and what was better on val.

    That is the checkpoint's entry best.order: `itc`, or the name of a re-ranking score; without it the score is the
    configuration's.
    """
    order = checkpoint.get("best", {}).get("order", cfg.rerank.score)
    if k is None:
        k = 0 if order == "itc" else K
    return (cfg.rerank.score if order == "itc" else order), k


def read_texts(args: argparse.Namespace) -> list[str]:
    texts = list(args.text)
    if args.texts:
        try:
            lines = utils.find_file(args.texts, "--texts").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise utils.UserError(f"--texts {args.texts}: not a readable text file ({error})") from None
        texts += [line.strip() for line in lines if line.strip()]
    if empty := [text for text in texts if not clean_caption(text, 30)]:
        raise utils.UserError(f"--text {empty[0]!r}: nothing is left of it after cleaning; use words")
    if not texts:
        raise utils.UserError("no sentence: give --text SENTENCE or --texts FILE")
    return texts


def find_pictures(names: list[str]) -> list[Path]:
    """The files named, and those in the folders named (with their sub-folders), each once."""
    found = []
    for name in names:
        path = utils.find_file(name, "image")
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise utils.UserError(f"{path}: no image in this folder ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def picture_batches(
    paths: list[Path], image_size: int, usable: list[Path]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images [n, 3, S, S], numbers [n]), read only when their turn comes, numbered without gaps.

    Those that can be read are appended to `usable` in the order of their numbers; the others are named on stderr.
    Raises utils.UserError at the end where none can be read.
    """
    transform, images = test_transform(image_size), []
    for place, path in enumerate(paths, 1):
        try:
            images.append(transform(open_image(str(path))))
            usable.append(path)
        except ImageError as error:
            print(f"left out: {printable(error)}", file=sys.stderr)
        if images and (len(images) == BATCH or place == len(paths)):
            yield torch.stack(images), torch.arange(len(usable) - len(images), len(usable))
            images = []
    if not usable:
        raise utils.UserError(f"none of the {len(paths)} images can be read")


def printable(item: object) -> str:
    """`item` as text that any UTF-8 file or terminal takes: a file's name may hold bytes that are not UTF-8."""
    return str(item).encode(errors="replace").decode()


def rank(
    backbone: nn.Module,
    images: ranking.ImageFeatures,
    texts: ranking.TextFeatures,
    picture_asks: bool,
    k: int,
    score: str,
) -> list[list[tuple[int, float | None, float]]]:
    """For every query its items, best first: (number, re-ranking `score` or None below the first k, cosine)."""
    asking, asked = (images.feats, texts.feats) if picture_asks else (texts.feats, images.feats)
    ids = [torch.zeros(len(feats), dtype=torch.int64) for feats in (asking, asked)]
    first = ranking.topk_candidates(asking, asked, *ids, len(asked))  # the whole order of the first stage
    some = ranking.Candidates(first.ids[:, :k], first.scores[:, :k], first.ranks)
    nothing = ranking.Candidates(*(x.new_zeros(len(asked), 0) for x in (first.ids, first.scores)), first.ranks[:0])
    tr, ir = (some, nothing) if picture_asks else (nothing, some)
    if k:
        scores = ranking.rerank(backbone, images, texts, tr, ir, score=score)[0 if picture_asks else 1]
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
