"""Try a model on one's own images: checkpoints of any stage, exported folders, hub names (semmim.SemMIM).

    python -m tools.predict caption FOLDER --checkpoint output/caption/checkpoint_best.pth --output captions.jsonl
    python -m tools.predict vqa IMAGE "what is it catching?" --checkpoint output/vqa/checkpoint_best.pth \
        --objects "dog&&frisbee" --ocr "stop"
    python -m tools.predict retrieve FOLDER --text "a red bus" --output sheet.html \
        --checkpoint output/retrieval/checkpoint_best.pth
    python -m tools.predict retrieve IMAGE --texts sentences.txt --checkpoint output/retrieval/checkpoint_best.pth
    python -m tools.predict embed FOLDER --output features.npz --checkpoint output/retrieval/checkpoint_best.pth
    python -m tools.predict classify FOLDER --classes dog bus "fire truck" --checkpoint output/retrieval
    python -m tools.predict evaluate zero-shot FOLDER_OF_CLASS_FOLDERS --checkpoint output/retrieval

Every command takes image files and folders (with their sub-folders). Results are printed, or with --output written row
by row as JSON lines (.jsonl) or CSV (.csv; a cell that a spreadsheet would run as a formula begins with a quote mark).
Progress and images that cannot be read are shown on stderr.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import utils
from dataset.entries import read_json
from dataset.reading import EXTENSIONS, find_images
from engine.config import whole
from models.generation import MODES
from semmim import SemMIM
from semmim.inputs import choices
from semmim.model import TEMPLATES, K
from tools.predict.files import (
    ROWS,
    batches,
    left_out,
    note,
    output_path,
    printable,
    progress,
    read_lines,
    rows_to,
    utf8,
    write_features,
)
from tools.predict.sheet import write_sheet

WRITING = ("mode", "beams", "min_tokens", "max_tokens", "length_penalty", "top_k", "top_p", "temperature")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_caption, add_vqa, add_retrieve, add_embed, add_classify, add_evaluate):
        add(commands)
    args = parser.parse_args(argv)
    args.run(args)


def add_command(
    commands, run: Callable, name: str, about: str, output: str, *, images: str = "+", precision: str = "fp32"
) -> argparse.ArgumentParser:
    """A command with the options that all have in common."""
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(run=run)
    add = parser.add_argument
    if images:
        add("images", nargs=images, help="image files and folders")
    add("--checkpoint", required=True, help="file, run's folder, exported folder or hub name")
    add("--output", help=output)
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    add("--precision", choices=("auto", "bf16", "fp32"), default=precision, help="(default: %(default)s)")
    add("--batch_size", type=int, default=64, help="images of one forward (default: %(default)s)")
    return parser


def load(args: argparse.Namespace, task: str) -> SemMIM:
    """The model that the options name, if it can do `task`."""
    whole(1)("--batch_size", args.batch_size)
    options = {"device": args.device, "precision": args.precision, "batch_size": args.batch_size}
    model = SemMIM.from_pretrained(args.checkpoint, **options)
    if line := model.unlearned(task):
        note(f"note: {line}")
    return model


# -------------------------------------------------------------------------------------------------------- captions


def add_caption(commands) -> None:
    parser = add_command(commands, caption, "caption", "caption images", "rows image, caption", precision="auto")
    parser.add_argument("--prompt", help="what the text encoder reads before (default: the checkpoint's)")
    parser.add_argument("--objects", default="", help='object labels, such as "dog&&frisbee"')
    options = parser.add_argument_group("generation; the default is the checkpoint's own setting, else the paper's")
    options.add_argument("--mode", choices=MODES)
    for name in ("beams", "min_tokens", "max_tokens", "top_k"):
        options.add_argument(f"--{name}", type=int)
    for name in ("length_penalty", "top_p", "temperature"):
        options.add_argument(f"--{name}", type=float)
    options.add_argument("--seed", type=int, default=0, help="of sampling")


def caption(args: argparse.Namespace) -> None:
    """A line per image, its path and its caption."""
    output, paths = output_path(args.output, ROWS), find_images(args.images)
    model = load(args, "caption")
    options = {key: getattr(args, key) for key in WRITING if getattr(args, key) is not None}
    torch.manual_seed(args.seed)
    with rows_to(output, ("image", "caption")) as write:
        for images, names in batches(model, paths, "captioning"):
            texts = model.caption(images, prompt=args.prompt, labels=args.objects, **options)
            for path, text in zip(names, texts, strict=True):
                write({"image": path, "caption": text}, f"{printable(path)}\t{text}")


# --------------------------------------------------------------------------------------------------------- answers


def add_vqa(commands) -> None:
    about = "answer questions about images; the last argument may be the question"
    parser = add_command(commands, vqa, "vqa", about, "rows image, question, answer", precision="auto")
    parser.add_argument("--question", action="append", default=[], help="may be given several times")
    parser.add_argument("--questions", help="file with a question a line")
    parser.add_argument("--objects", default="", help='object labels, such as "dog&&frisbee"')
    parser.add_argument("--ocr", default="", help='words that are written in the image, such as "stop"')
    parser.add_argument("--answers", help="file with an answer a line: choose from them instead of writing one")


def vqa(args: argparse.Namespace) -> None:
    """Every question about every image: the answer (of several images or questions all three)."""
    output = output_path(args.output, ROWS)
    questions = [*args.question, *read_lines("--questions", args.questions)]
    if not questions and len(args.images) > 1:
        questions = [args.images.pop()]
    if not questions:
        raise utils.UserError("no question: give it after the image, or --question QUESTION, or --questions FILE")
    paths, answers = find_images(args.images), read_lines("--answers", args.answers)
    model = load(args, "answer")
    used = model.settings.vqa.data
    for given, option, trained in ((args.objects, "--objects", used.labels), (args.ocr, "--ocr", used.ocr)):
        if given and model.stage == "vqa" and not trained:
            note(f"note: {option}: this checkpoint was trained without")
    options = {"labels": args.objects, "ocr": args.ocr, "answers": answers or None}
    alone = len(paths) == len(questions) == 1
    with rows_to(output, ("image", "question", "answer")) as write:
        for images, names in batches(model, paths, "answering"):
            if len(questions) == 1:
                found = [model.answer(images, questions, **options)]
            else:  # an image is encoded once for all of its questions
                found = zip(*(model.answer(image, questions, **options) for image in images), strict=True)
            by_image = zip(*found, strict=True)
            for path, texts in zip(names, by_image, strict=True):
                for question, text in zip(questions, texts, strict=True):
                    line = text if alone else f"{printable(path)}\t{printable(question)}\t{text}"
                    write({"image": path, "question": question, "answer": text}, line)


# ---------------------------------------------------------------------------------------------------------- search


def add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", action="append", default=[], help="a sentence; may be given several times")
    parser.add_argument("--texts", help="file with a sentence a line")


def add_retrieve(commands) -> None:
    about = "rank images for a sentence, or sentences for an image"
    output = "contact sheet (.html), or rows query, place, item, score, cosine (.jsonl, .csv)"
    parser = add_command(commands, retrieve, "retrieve", about, output)
    add_texts(parser)
    parser.add_argument(
        "--k",
        type=int,
        help=f"candidates to re-rank by fusion; 0: none, the order is ITC's (default: {K}, or 0 if the checkpoint's "
        "entry best.order says that ITC alone was better on val)",
    )
    parser.add_argument("--top", type=int, default=20, help="results to show (default: %(default)s)")


def retrieve(args: argparse.Namespace) -> None:
    """`query`, and below it a line a result: place, re-ranking score, cosine, item.

    One image file and several sentences: the image asks. Otherwise every sentence asks for images.
    """
    whole(1)("--top", args.top)
    output, paths = output_path(args.output, (".html", *ROWS)), find_images(args.images)
    texts = [*args.text, *read_lines("--texts", args.texts)]
    if not texts:
        raise utils.UserError("no sentence: give --text SENTENCE or --texts FILE")
    # What was named decides, not what can be read: a folder of one image is still ranked for each sentence.
    image_asks = len(texts) > 1 and len(args.images) == 1 and not utils.find_file(args.images[0]).is_dir()
    model, skipped = load(args, "match"), []

    def skip(image: object, error: Exception) -> None:
        skipped.append(image)
        left_out(image, error)

    found = model.search(progress(paths, "encoding"), texts, images_ask=image_asks, k=args.k, left_out=skip)
    queries, items = (paths, texts) if image_asks else (texts, paths)
    shown = [(query, hits[: args.top]) for query, hits in zip(queries, found, strict=True)]
    if output and output.suffix.lower() == ".html":
        about = about_order(model, args.k) | {"images": len(paths) - len(skipped), "left_out": len(skipped)}
        about["asked"] = len(items) - len(skipped) if items is paths else len(items)
        write_sheet(output, shown, items, checkpoint=args.checkpoint, stage=model.stage, **about)
        note(f"wrote {output}")
        output = None  # the results are printed, too
    with rows_to(output, ("query", "place", "item", "score", "cosine")) as write:
        for query, hits in shown:
            write(None, printable(query))
            for place, hit in enumerate(hits, 1):
                item = items[hit.number]
                score = None if hit.score is None else round(hit.score, 6)
                row = {"query": query, "place": place, "item": item, "score": score, "cosine": round(hit.cosine, 6)}
                number = "      -" if score is None else f"{score:7.2f}"
                write(row, f"{place:5} {number} {hit.cosine:6.3f}  {printable(item)}")


def about_order(model: SemMIM, k: int | None) -> dict:
    """The score that re-ranks, how many candidates, and why so, for the sheet."""
    (score, default), best = model.order(), model.content.best.get("order")
    if k is not None:
        why = f"as asked by --k {k}"
    elif best is None:
        why = "the default, since the checkpoint does not say which order was better on validation images"
    else:
        why = f"the better order on the checkpoint's validation images ({best})"
    return {"score": score, "k": default if k is None else k, "why": why}


def add_embed(commands) -> None:
    output = (
        "file to write, .npz (arrays image_features, images, text_features, texts) or .safetensors (the names are in "
        "its metadata, as JSON)"
    )
    add_texts(add_command(commands, embed, "embed", "write features of images and sentences", output, images="*"))


def embed(args: argparse.Namespace) -> None:
    """Write [N, E] float32 features, L2-normalized: products are cosines."""
    output = output_path(args.output, (".npz", ".safetensors"))
    if output is None:
        raise utils.UserError("--output is missing: name a file that ends in .npz or .safetensors")
    texts, paths = [*args.text, *read_lines("--texts", args.texts)], find_images(args.images)
    if not texts and not paths:
        raise utils.UserError("nothing to embed: give images, --text SENTENCE or --texts FILE")
    model = load(args, "match")
    features, names = {}, {}
    if paths:
        found, names["images"] = [], []
        for images, usable in batches(model, paths, "encoding"):
            found.append(model.encode_image(images))
            names["images"] += map(utf8, usable)
        features["image_features"] = torch.cat(found).numpy()
    if texts:
        features["text_features"], names["texts"] = model.encode_text(texts).numpy(), texts
    write_features(output, features, names)
    print(f"wrote {output}: " + ", ".join(f"{key} {list(value.shape)}" for key, value in features.items()))


# -------------------------------------------------------------------------------------------------- classification


def add_templates(parser: argparse.ArgumentParser) -> None:
    shown = ", ".join(f'"{template}"' for template in TEMPLATES)
    about = f"sentence with {{}} for the class; several are averaged (default: {shown})"
    parser.add_argument("--template", action="append", help=about)


def add_classify(commands) -> None:
    about, output = "zero-shot classification of images", "rows image, place, class, probability"
    parser = add_command(commands, classify, "classify", about, output)
    parser.add_argument("--classes", nargs="+", default=[], help="names of classes")
    parser.add_argument("--class_file", help="file with the name of a class a line")
    add_templates(parser)
    parser.add_argument("--top", type=int, default=1, help="classes to show of each image (default: %(default)s)")


def classify(args: argparse.Namespace) -> None:
    """A line per image: its path, and its most probable classes with their probabilities."""
    whole(1)("--top", args.top)
    output, paths = output_path(args.output, ROWS), find_images(args.images)
    classes = choices([*args.classes, *read_lines("--class_file", args.class_file)], "--classes")
    model = load(args, "match")
    with rows_to(output, ("image", "place", "class", "probability")) as write:
        for path, row in probabilities(model, paths, classes, args.template):
            values, places = row.topk(min(args.top, len(classes)))
            found = [(classes[i], round(value, 6)) for i, value in zip(places.tolist(), values.tolist(), strict=True)]
            for place, (name, value) in enumerate(found, 1):
                write({"image": path, "place": place, "class": name, "probability": value})
            write(None, "\t".join([printable(path), *(f"{printable(name)} {value:.3f}" for name, value in found)]))


def probabilities(
    model: SemMIM, paths: list[Path], classes: list[str], templates: list[str] | None
) -> Iterator[tuple[Path, torch.Tensor]]:
    """(path, probabilities [C]) of every image that can be read."""
    features = model.class_features(classes, templates or TEMPLATES)
    for images, names in batches(model, paths, "classifying"):
        yield from zip(names, model.classify(images, features), strict=True)


def add_evaluate(commands) -> None:
    about, output = "zero-shot accuracy on a folder of class folders", "rows image, class, predicted, probability"
    parser = add_command(commands, evaluate, "evaluate", about, output, images="")
    parser.add_argument("task", choices=("zero-shot",))
    parser.add_argument("folder", help="a folder a class, named as the class (_ for a space), with its images")
    parser.add_argument("--names", help='JSON file {"folder": "name of the class"} if folders have other names')
    add_templates(parser)


def evaluate(args: argparse.Namespace) -> None:
    """Accuracies over all classes and of each."""
    output, folders = output_path(args.output, ROWS), class_folders(args.folder)
    classes = class_names(folders, args.names)
    labels = {path: number for number, folder in enumerate(folders) for path in find_images([folder])}
    model, table, truth = load(args, "match"), [], []
    with rows_to(output, ("image", "class", "predicted", "probability")) as write:
        for path, row in probabilities(model, list(labels), classes, args.template):
            table.append(row)
            truth.append(labels[path])
            value, best = row.max(0)
            found = {"image": path, "class": classes[labels[path]], "predicted": classes[int(best)]}
            write({**found, "probability": round(float(value), 6)})
    found = accuracies(torch.stack(table), torch.tensor(truth))
    print(f"{found['images']} images, {found['classes']} classes")
    for key in ("top1", "top5", "mean_per_class", "chance"):
        if key in found:
            print(f"{key:16} {found[key]:6.2f}")
    for name, value in zip(classes, found["per_class"], strict=True):
        print(f"  {printable(name):20} {'-' if value is None else f'{value:6.2f}'}")


def accuracies(probabilities: torch.Tensor, labels: torch.Tensor) -> dict:
    """How often the true class is among the most probable ones, in percent.

    probabilities: [N, C]; labels: [N] the classes' numbers; N and every probability row nonempty.

    Returns {"images", "classes", "top1", "top5" (of more than 5 classes), "mean_per_class" (the mean over
    the classes of their own top-1 accuracies), "chance" (of top-1), "per_class": [C], None for a class of no image}.
    Equal probabilities count against the model: the rank is the number of classes that are as probable or more.
    """
    if len(labels) == 0:
        raise ValueError("accuracies needs at least one image")
    count = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None])  # [N, 1]
    rank = (probabilities >= own).sum(1) - 1  # [N]
    found: dict = {"images": len(labels), "classes": count}
    found |= {f"top{k}": 100 * (rank < k).double().mean().item() for k in (1, 5) if k == 1 or k < count}
    right = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, (rank < 1).double())
    images = labels.bincount(minlength=count)
    per_class = [100 * float(hit) / int(n) if n else None for hit, n in zip(right, images, strict=True)]
    known = [value for value in per_class if value is not None]
    return found | {"mean_per_class": sum(known) / len(known), "chance": 100 / count, "per_class": per_class}


def class_folders(name: str) -> list[Path]:
    """The sub-folders of a folder that hold images, at least two, by name."""
    folder = utils.find_file(name, "folder")
    if not folder.is_dir():
        raise utils.UserError(f"{folder}: not a folder; give one that holds a folder a class")
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = [path for path in inside if any(file.suffix.lower() in EXTENSIONS for file in path.rglob("*"))]
    if len(found) < 2:
        raise utils.UserError(f"{folder}: holds {len(found)} folders with images; at least two classes are needed")
    return found


def class_names(folders: list[Path], names: str | None) -> list[str]:
    """What the classes of the folders are called."""
    given = {} if names is None else read_json(utils.find_file(names, "--names"))
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise utils.UserError(f'--names {names}: must be a JSON map {{"folder": "name of the class"}}')
    if names is not None and (missing := [folder.name for folder in folders if folder.name not in given]):
        raise utils.UserError(f"--names {names}: the folder {printable(missing[0])} is not in it")
    return choices([given.get(folder.name, folder.name.replace("_", " ")) for folder in folders], "names of folders")


if __name__ == "__main__":
    utils.run_main(main)
