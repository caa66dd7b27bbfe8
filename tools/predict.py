"""Try a model on images of one's own: checkpoints of any stage, exported folders, hub names (semmim.SemMIM).

    python tools/predict.py caption FOLDER --checkpoint output/caption/checkpoint_best.pth --output captions.jsonl
    python tools/predict.py vqa IMAGE "what is it catching?" --checkpoint output/vqa/checkpoint_best.pth \
        --objects "dog&&frisbee" --ocr "stop"
    python tools/predict.py retrieve FOLDER --text "a red bus" --output sheet.html \
        --checkpoint output/retrieval/checkpoint_best.pth
    python tools/predict.py retrieve IMAGE --texts sentences.txt --checkpoint output/retrieval/checkpoint_best.pth
    python tools/predict.py embed FOLDER --output features.npz --checkpoint output/retrieval/checkpoint_best.pth
    python tools/predict.py classify FOLDER --classes dog bus "fire truck" --checkpoint output/retrieval
    python tools/predict.py evaluate zero-shot FOLDER_OF_CLASS_FOLDERS --checkpoint output/retrieval

Every command takes image files and folders (with their sub-folders). Results are printed, or with --output written row
by row as JSON lines (.jsonl) or CSV (.csv); progress and images that cannot be read are told on stderr.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.annotations import split_labels  # noqa: E402
from dataset.reading import find_images  # noqa: E402
from models.generation import MODES  # noqa: E402
from tools.predict_classify import add_classify, add_evaluate  # noqa: E402
from tools.predict_embed import add_embed  # noqa: E402
from tools.predict_files import (  # noqa: E402
    ROWS,
    add_common,
    check_output,
    image_batches,
    load,
    note,
    printable,
    read_lines,
    rows_to,
)
from tools.predict_retrieve import add_retrieve  # noqa: E402
from utils import UserError, run_main  # noqa: E402

WRITING = ("mode", "beams", "min_tokens", "max_tokens", "length_penalty", "top_k", "top_p", "temperature")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_caption, add_vqa, add_retrieve, add_embed, add_classify, add_evaluate):
        add(commands)
    args = parser.parse_args(argv)
    args.run(args)


def add_caption(commands) -> None:
    parser = commands.add_parser("caption", help="caption images")
    parser.add_argument("images", nargs="+", help="image files and folders")
    add_common(parser, "of Caption.py, or of Pretrain.py (zero-shot)", "rows image, caption (.jsonl, .csv)", "auto")
    parser.add_argument("--prompt", help="what the text encoder reads before (default: the checkpoint's)")
    parser.add_argument("--objects", default="", help='object labels, such as "dog&&frisbee"')
    options = parser.add_argument_group("generation; the default is the checkpoint's own setting, else the paper's")
    options.add_argument("--mode", choices=MODES)
    for name in ("beams", "min_tokens", "max_tokens", "top_k"):
        options.add_argument(f"--{name}", type=int)
    for name in ("length_penalty", "top_p", "temperature"):
        options.add_argument(f"--{name}", type=float)
    options.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.set_defaults(run=caption)


def caption(args: argparse.Namespace) -> None:
    """Print a line per image, its path and its caption, or write them as rows."""
    output, paths = check_output(args.output, ROWS), find_images(args.images)
    model = load(args)
    tell(model.unlearned("caption"))
    options = {key: getattr(args, key) for key in WRITING if getattr(args, key) is not None}
    options |= {"prompt": args.prompt, "labels": split_labels(args.objects)}
    torch.manual_seed(args.seed)
    with rows_to(output, ("image", "caption")) as write:
        for images, names in image_batches(model, paths, "captioning"):
            for path, text in zip(names, model.caption(images, **options), strict=True):
                write({"image": printable(path), "caption": text})
                if output is None:
                    print(f"{printable(path)}\t{text}")


def add_vqa(commands) -> None:
    parser = commands.add_parser("vqa", help="answer questions about images")
    parser.add_argument("images", nargs="+", help="image files and folders; the last may be the question")
    add_common(parser, "of VQA.py", "rows image, question, answer (.jsonl, .csv)", "auto")
    parser.add_argument("--question", action="append", default=[], help="may be given several times")
    parser.add_argument("--questions", help="file with a question a line")
    parser.add_argument("--objects", default="", help='object labels, such as "dog&&frisbee"')
    parser.add_argument("--ocr", default="", help='words that are written in the image, such as "stop"')
    parser.add_argument("--answers", help="file with an answer a line: choose from them instead of writing one")
    parser.set_defaults(run=vqa)


def vqa(args: argparse.Namespace) -> None:
    """Every question about every image: print the answer (of several images or questions all three), or write rows."""
    output = check_output(args.output, ROWS)
    questions = [*args.question, *read_lines("--questions", args.questions)]
    if not questions and len(args.images) > 1:
        questions = [args.images.pop()]
    if not questions:
        raise UserError("no question: give it after the image, or --question QUESTION, or --questions FILE")
    paths, answers = find_images(args.images), read_lines("--answers", args.answers)
    model = load(args)
    tell(model.unlearned("vqa"))
    used = model.settings.vqa.data
    for given, option, trained in ((args.objects, "--objects", used.labels), (args.ocr, "--ocr", used.ocr)):
        if given and model.stage == "vqa" and not trained:
            note(f"note: {option}: this checkpoint was trained without")
    options = {"labels": args.objects, "ocr": args.ocr, "answers": answers or None}
    alone = len(paths) == len(questions) == 1
    with rows_to(output, ("image", "question", "answer")) as write:
        for images, names in image_batches(model, paths, "answering"):
            for path, question, answer in answered(model, images, names, questions, options):
                write({"image": printable(path), "question": question, "answer": answer})
                if output is None:
                    print(answer if alone else f"{printable(path)}\t{question}\t{answer}")


def answered(model, images: torch.Tensor, names: list[Path], questions: list[str], options: dict):
    """Yield (path, question, answer) of all images and questions; an image is encoded once for its questions."""
    if len(questions) == 1:
        for path, answer in zip(names, model.answer(images, questions, **options), strict=True):
            yield path, questions[0], answer
        return
    for image, path in zip(images, names, strict=True):
        for question, answer in zip(questions, model.answer(image, questions, **options), strict=True):
            yield path, question, answer


def tell(line: str | None) -> None:
    if line:
        note(f"note: {line}")


if __name__ == "__main__":
    run_main(main)
