"""`tools/predict.py classify` and `evaluate zero-shot`: classes by the sentences that name them."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import utils
from dataset.entries import read_json
from dataset.reading import EXTENSIONS, find_images
from evaluation.zero_shot import accuracies, class_probabilities
from semmim import SemMIM
from semmim.model import TEMPLATES
from tools.predict_files import ROWS, add_common, check_output, image_batches, load, printable, read_lines, rows_to

CHECKPOINT = "of Retrieval.py or Pretrain.py"


def add_classify(commands) -> None:
    parser = commands.add_parser("classify", help="zero-shot classification of images")
    parser.add_argument("images", nargs="+", help="image files and folders")
    add_common(parser, CHECKPOINT, "rows image, place, class, probability (.jsonl, .csv)")
    parser.add_argument("--classes", nargs="+", default=[], help="names of classes")
    parser.add_argument("--class_file", help="file with the name of a class a line")
    add_templates(parser)
    parser.add_argument("--top", type=int, default=1, help="classes to show of each image (default: %(default)s)")
    parser.set_defaults(run=classify)


def add_templates(parser: argparse.ArgumentParser) -> None:
    shown = ", ".join(f'"{template}"' for template in TEMPLATES)
    parser.add_argument(
        "--template",
        action="append",
        help=f"sentence with {{}} for the class; several are averaged (default: {shown})",
    )


def classify(args: argparse.Namespace) -> None:
    """Print a line per image: its path, and its most probable classes with their probabilities; or write rows."""
    output, paths = check_output(args.output, ROWS), find_images(args.images)
    classes = [*args.classes, *read_lines("--class_file", args.class_file)]
    if len(set(classes)) < max(2, len(classes)):
        raise utils.UserError("give two different classes or more, each once: --classes NAME NAME or --class_file FILE")
    if args.top < 1:
        raise utils.UserError(f"--top {args.top}: give at least 1")
    model = load(args)
    with rows_to(output, ("image", "place", "class", "probability")) as write:
        for names, table in probabilities(model, paths, classes, args.template):
            values, places = table.topk(min(args.top, len(classes)), dim=1)
            for path, row, which in zip(names, values.tolist(), places.tolist(), strict=True):
                found = [(classes[number], value) for number, value in zip(which, row, strict=True)]
                for place, (name, value) in enumerate(found, 1):
                    write({"image": printable(path), "place": place, "class": name, "probability": round(value, 6)})
                if output is None:
                    print("\t".join([printable(path), *(f"{name} {value:.3f}" for name, value in found)]))


def probabilities(
    model: SemMIM, paths: list[Path], classes: list[str], templates: list[str] | None
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Yield (paths [n], probabilities [n, C]) in batches."""
    features = model.class_features(classes, templates or TEMPLATES)
    for images, names in image_batches(model, paths, "classifying"):
        yield names, class_probabilities(model.encode_image(images), features, model.temperature)


def add_evaluate(commands) -> None:
    parser = commands.add_parser("evaluate", help="zero-shot accuracy on a folder of class folders")
    parser.add_argument("task", choices=("zero-shot",))
    parser.add_argument("folder", help="a folder a class, named as the class (_ for a space), with its images")
    add_common(parser, CHECKPOINT, "rows image, class, predicted, probability (.jsonl, .csv)")
    parser.add_argument("--names", help='JSON file {"folder": "name of the class"} where folders are named otherwise')
    add_templates(parser)
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Print accuracies over all classes and of each; write a row per image if asked to."""
    output, folders = check_output(args.output, ROWS), class_folders(args.folder)
    classes = class_names(folders, args.names)
    paths, labels = [], {}
    for number, folder in enumerate(folders):
        for path in find_images([folder]):
            paths.append(path)
            labels[path] = number
    model = load(args)
    tables, truth = [], []
    with rows_to(output, ("image", "class", "predicted", "probability")) as write:
        for names, table in probabilities(model, paths, classes, args.template):
            tables.append(table)
            truth += [labels[path] for path in names]
            for path, row in zip(names, table, strict=True):
                value, best = row.max(0)
                found = {"image": printable(path), "class": classes[labels[path]], "predicted": classes[int(best)]}
                write({**found, "probability": round(float(value), 6)})
    for line in accuracy_lines(accuracies(torch.cat(tables), torch.tensor(truth)), classes):
        print(line)


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
        raise utils.UserError(f"--names {names}: the folder {missing[0]} is not in it")
    found = [given.get(folder.name, folder.name.replace("_", " ")) for folder in folders]
    if twice := [name for name in found if found.count(name) > 1]:
        raise utils.UserError(f"two folders are called {twice[0]!r}; name each class once")
    return found


def accuracy_lines(numbers: dict, classes: list[str]) -> list[str]:
    """The accuracies as a small text table."""
    lines = [f"{numbers['images']} images, {numbers['classes']} classes"]
    for key in ("top1", "top5", "mean_per_class", "chance"):
        if key in numbers:
            lines.append(f"{key:16} {numbers[key]:6.2f}")
    shown = zip(classes, numbers["per_class"], strict=True)
    return lines + [f"  {printable(name):20} {'-' if value is None else f'{value:6.2f}'}" for name, value in shown]
