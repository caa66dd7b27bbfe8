"""Try a model on one's own images: checkpoints of any stage, exported folders, hub names (semmim.SemMIM).

    python -m tools.predict caption FOLDER --checkpoint output/caption/checkpoint_best.pth --output captions.jsonl
    python -m tools.predict vqa IMAGE --question "what is it catching?" --checkpoint output/vqa/checkpoint_best.pth \
        --objects "dog&&frisbee" --ocr "stop"
    python -m tools.predict retrieve FOLDER --text "a red bus" --output sheet.html \
        --checkpoint output/retrieval/checkpoint_best.pth
    python -m tools.predict retrieve IMAGE --texts sentences.txt --checkpoint output/retrieval/checkpoint_best.pth
    python -m tools.predict embed FOLDER --output features.npz --checkpoint output/retrieval/checkpoint_best.pth
    python -m tools.predict classify FOLDER --classes dog bus "fire truck" --checkpoint output/retrieval
    python -m tools.predict evaluate zero-shot FOLDER_OF_CLASS_FOLDERS --checkpoint output/retrieval

Every command takes image files and folders (with their sub-folders). Results are rows: printed with tabs between the
cells or, with --output, written as JSON lines (.jsonl) or CSV (.csv). Progress and images that cannot be read are shown
on stderr.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import utils
from dataset.files import read_json
from models.generation import MODES
from models.weights import check_value
from semmim import SemMIM
from semmim.model import TEMPLATES, K
from tools.predict.files import (
    find_images,
    images_in,
    note,
    output_path,
    read_lines,
    write_features,
    write_rows,
    write_sheet,
)
from tools.prepare.common import progress

ROWS = (".jsonl", ".csv")  # files of rows
NUMBER = re.compile(r"n?\d+[-._ ]+(?=.*[^\W\d_])")  # 001.Black_footed_Albatross, n02085620-Chihuahua
WRITING = ("mode", "beams", "min_tokens", "max_tokens", "length_penalty", "top_k", "top_p", "temperature")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if "top" in args:
        check_value("--top", args.top, int)
    args.output = output_path(args.output, args.endings)
    write_rows(args.run(args), args.output if args.output and args.output.suffix in ROWS else None)


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.predict", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, about: str, output: str, *, endings=ROWS, precision="fp32", images="+"):
        one = commands.add_parser(run.__name__, help=about, description=about)
        one.set_defaults(run=run, endings=endings)
        add = one.add_argument
        if images:
            add("images", nargs=images, help="image files and folders")
        add("--checkpoint", required=True, help="file, run's folder, exported folder or hub name")
        add("--output", required=run is embed, help=f"{output} ({', '.join(endings)})")
        add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
        add("--precision", choices=("auto", "bf16", "fp32"), default=precision, help="(default: %(default)s)")
        add("--batch_size", type=int, default=64, help="images of one forward (default: %(default)s)")
        return add

    add = command(caption, "caption images", "rows image, caption", precision="auto")
    add("--prompt", help="what the text encoder reads before (default: the checkpoint's)")
    add("--objects", default="", help='object labels, such as "dog&&frisbee"')
    add("--mode", choices=MODES, help="of generation; its defaults are the checkpoint's own, else Caption_coco.yaml's")
    for name in WRITING[1:]:
        add(f"--{name}", type=float if name in ("length_penalty", "top_p", "temperature") else int)
    add("--seed", type=int, default=0, help="of sampling")

    add = command(vqa, "answer questions about images", "rows image, question, answer", precision="auto")
    several(add, "--question", "--questions")
    add("--objects", default="", help='object labels, such as "dog&&frisbee"')
    add("--ocr", default="", help='words that are written in the image, such as "stop"')
    add("--answers", type=read_lines, help="file with an answer a line: choose from them instead of writing one")

    about = "rank images for each sentence; of several sentences and one image file, the sentences for the image"
    output = "rows query, place, item, score, cosine, or a contact sheet"
    add = command(retrieve, about, output, endings=(*ROWS, ".html"))
    several(add, "--text", "--texts")
    add("--k", type=int, help=f"candidates to re-rank by fusion, 0: none (default: {K}, or what was best on val)")
    add("--top", type=int, default=20, help="results to show (default: %(default)s)")
    add = command(embed, "write features of images and sentences", "arrays", endings=(".npz",), images="*")
    several(add, "--text", "--texts")

    templates = ", ".join(f'"{template}"' for template in TEMPLATES)
    template = {"action": "append", "help": f"sentence with {{}} for the class; averaged (default: {templates})"}
    add = command(classify, "zero-shot classification of images", "rows image, place, class, probability")
    add("--classes", nargs="+", default=[], help="names of classes")
    add("--class_file", dest="classes", type=read_lines, help="file with the name of a class a line")
    add("--top", type=int, default=1, help="classes to show of each image (default: %(default)s)")
    add("--template", **template)
    about = "zero-shot accuracy on a folder of class folders"
    add = command(evaluate, about, "rows name, value", images="")
    add("task", choices=("zero-shot",))
    add("folder", help="a folder a class, named as the class (_ for a space), with its images")
    add("--names", help='JSON file {"folder": "name of the class"} if folders have other names')
    add("--template", **template)
    return parser


def several(add, option: str, of_file: str) -> None:
    """An option that may be given several times, and one for a file with a value a line; both fill one list."""
    add(option, action="append", default=[], help="may be given several times")
    add(of_file, dest=option[2:], action="extend", type=read_lines, help="file with one a line")


def load(args: argparse.Namespace) -> SemMIM:
    options = {"device": args.device, "precision": args.precision, "batch_size": args.batch_size}
    return SemMIM.from_pretrained(args.checkpoint, **options)


def batches(model: SemMIM, paths: list[Path], label: str) -> Iterator[tuple[torch.Tensor, list[Path]]]:
    """(preprocessed images [n, 3, S, S], their paths), with progress; those that cannot be read are left out."""
    for images, places in model.batches(progress(paths, label, "images"), left_out):
        yield images, [paths[place] for place in places]


def left_out(error: Exception) -> None:
    note(f"left out: {error}")


# ------------------------------------------------------------------------------- the commands, each giving its rows


def caption(args: argparse.Namespace) -> Iterator[dict]:
    """A caption of every image."""
    paths, model = find_images(args.images), load(args)
    options = {key: getattr(args, key) for key in WRITING if getattr(args, key) is not None}
    torch.manual_seed(args.seed)
    for images, names in batches(model, paths, "captioning"):
        texts = model.caption(images, prompt=args.prompt, labels=args.objects, **options)
        yield from ({"image": path, "caption": text} for path, text in zip(names, texts, strict=True))


def vqa(args: argparse.Namespace) -> Iterator[dict]:
    """An answer to every question about every image."""
    if not args.question:
        raise utils.UserError("no question: give --question QUESTION or --questions FILE")
    paths, model = find_images(args.images), load(args)
    options = {"labels": args.objects, "ocr": args.ocr, "answers": args.answers}
    for images, names in batches(model, paths, "answering"):
        for path, texts in zip(names, model.answer(images, args.question, **options), strict=True):
            for question, text in zip(args.question, texts, strict=True):
                yield {"image": path, "question": question, "answer": text}


def retrieve(args: argparse.Namespace) -> Iterator[dict]:
    """The best items of every query; score is null (CSV: empty) for candidates that were not re-ranked."""
    paths, texts = find_images(args.images), args.text
    if not texts:
        raise utils.UserError("no sentence: give --text SENTENCE or --texts FILE")
    # What was named decides, not what can be read: a folder of one image is still ranked for each sentence.
    images_ask = len(texts) > 1 and len(args.images) == 1 and not utils.find_file(args.images[0]).is_dir()
    model, images = load(args), progress(paths, "encoding", "images")
    found = model.search(images, texts, images_ask=images_ask, k=args.k, left_out=left_out)
    queries, items = (paths, texts) if images_ask else (texts, paths)
    if args.output and args.output.suffix == ".html":
        write_sheet(args, model, queries, items, found)
        note(f"wrote {args.output}")
    for query, hits in zip(queries, found, strict=True):
        for place, hit in enumerate(hits[: args.top], 1):
            score = None if hit.score is None else round(hit.score, 6)
            row = {"query": query, "place": place, "item": items[hit.number]}
            yield {**row, "score": score, "cosine": round(hit.cosine, 6)}


def embed(args: argparse.Namespace) -> Iterable[dict]:
    """[N, E] float32 features, L2-normalized: products are cosines. Arrays image_features and text_features, and what
    their rows are: images and texts."""
    texts, paths = args.text, find_images(args.images)
    if not texts and not paths:
        raise utils.UserError("nothing to embed: give images, --text SENTENCE or --texts FILE")
    model, features, names = load(args), {}, {}
    if paths:
        found = [(model.encode_image(images), usable) for images, usable in batches(model, paths, "encoding")]
        features["image_features"] = torch.cat([rows for rows, _ in found]).numpy()
        names["images"] = [path for _, usable in found for path in usable]
    if texts:
        features["text_features"], names["texts"] = model.encode_text(texts).numpy(), texts
    write_features(args.output, features, names)
    return [{"array": key, "shape": list(value.shape)} for key, value in features.items()]


def classify(args: argparse.Namespace) -> Iterator[dict]:
    """The most probable classes of every image."""
    paths, classes = find_images(args.images), args.classes
    for path, row in probabilities(load(args), paths, classes, args.template):
        for place, number in enumerate(row.argsort(descending=True, stable=True)[: args.top].tolist(), 1):
            yield {"image": path, "place": place, "class": classes[number], "probability": round(row[number].item(), 6)}


def probabilities(
    model: SemMIM, paths: list[Path], classes: list[str], templates: list[str] | None
) -> Iterator[tuple[Path, torch.Tensor]]:
    """(path, probabilities [C]) of every image that can be read."""
    features = model.class_features(classes, templates or TEMPLATES)
    pieces = model.tokenizer.word_pieces(model.clean(classes))
    if unknown := [name for name, ids in zip(classes, pieces, strict=True) if model.tokenizer.unk_id in ids]:
        note(f"note: {len(unknown)} of {len(classes)} names have parts that the vocabulary lacks, such as {unknown[0]}")
    for images, names in batches(model, paths, "classifying"):
        yield from zip(names, model.classify(images, features), strict=True)


def evaluate(args: argparse.Namespace) -> list[dict]:
    """How many images and classes there are, and accuracies in percent over all classes and of each."""
    folders = sorted(path for path in utils.find_file(args.folder, "folder").glob("[!.]*") if path.is_dir())
    images = {path.name: found for path in folders if (found := images_in(path))}
    if len(images) < 2:
        raise utils.UserError(f"{args.folder}: holds no folder of images for each of two or more classes")
    classes = class_names(list(images), args.names)
    labels = {path: number for number, paths in enumerate(images.values()) for path in paths}
    paths, table = zip(*probabilities(load(args), list(labels), classes, args.template), strict=True)
    found, own = accuracies(torch.stack(table), torch.tensor([labels[path] for path in paths]))
    rows = [("images", len(paths)), ("classes", len(classes))]
    rows += [(name, f"{value:.2f}") for name, value in [*found.items(), *zip(classes, own, strict=True)]]
    return [{"name": name, "value": value} for name, value in rows]


def accuracies(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, float], list[float]]:
    """How often the true class is among the most probable ones, in percent. [N, C], [N] the classes' numbers

    -> top1, top5 (of more than 5 classes), mean_per_class (the mean of the classes' own top-1 accuracies), chance (of
    top-1), and the classes' own; NaN for one without images. Equal probabilities count against the model.
    """
    count = probabilities.shape[1]
    rank = (probabilities >= probabilities.gather(1, labels[:, None])).sum(1) - 1  # [N]
    found = {f"top{k}": 100 * (rank < k).double().mean().item() for k in (1, 5) if k == 1 or k < count}
    own = torch.stack([100 * (rank[labels == number] < 1).double().mean() for number in range(count)])  # [C]
    return found | {"mean_per_class": own.nanmean().item(), "chance": 100 / count}, own.tolist()


def class_names(folders: list[str], file: str | None) -> list[str]:
    """What the classes of the folders are called: as the file says, else as the folders without what numbers them."""
    if file is not None:
        names = read_json(utils.find_file(file, "--names"))
        if missing := [name for name in folders if name not in names]:
            raise utils.UserError(f"--names {file}: has no name for the folder {missing[0]}")
        return [names[name] for name in folders]
    if len({re.sub(r"\d+", "", name) for name in folders}) < len(folders):  # n01440764, n02102040, or 0, 1, 10
        raise utils.UserError("folders differ in their numbers alone, a class is found by its words; give --names FILE")
    if all(map(NUMBER.match, folders)):
        folders = [NUMBER.sub("", name, count=1) for name in folders]
    return [name.replace("_", " ") for name in folders]


if __name__ == "__main__":
    utils.run_main(main)
