"""easy-VQA (PyPI package easy-vqa, MIT licence, 5,000 images) in this project's formats.

    pip install easy-vqa
    python -m tools.prepare easyvqa --output data/easyvqa

Writes images/<split>/, vqa_train.json, vqa_val.json (the questions of `--val` training images, for the set has no
validation split), vqa_test.json, answer_list.json, and pretrain.json: captions of the training images, made from
their own questions and answers alone. `--source` names the folder of the package's data where it is not installed.
"""

import argparse
import importlib.util
import json
import random
import re
import shutil
from pathlib import Path

from tools.prepare.files import Written
from utils import UserError

SHAPES = ("circle", "rectangle", "triangle")
NEGATION = re.compile(r"\b(no|not)\b")
NAMED = re.compile(r"\b(?:a|the|no) (\w+)\b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--source", type=Path, help="the package's folder `data` (default: the installed package's)")
    parser.add_argument("--val", type=int, default=400, help="training images held out for validation")


def prepare(args: argparse.Namespace) -> None:
    source = args.source or installed_data()
    questions = {split: read_questions(source, split) for split in ("train", "test")}
    pictures = sorted({picture for _, _, picture in questions["train"]})
    if not 1 <= args.val < len(pictures):
        raise UserError(f"--val {args.val}: must be from 1 to {len(pictures) - 1}, some of the training pictures")
    held_out = set(random.Random(0).sample(pictures, args.val))

    written = Written(args.output)
    try:
        for split in questions:
            for image in sorted((source / split / "images").iterdir()):
                with written.replacing(args.output / "images" / split / image.name) as temporary:
                    shutil.copyfile(image, temporary)
        train = entries(questions["train"], "train")
        files = {
            "vqa_train.json": [e for e, q in zip(train, questions["train"], strict=True) if q[2] not in held_out],
            "vqa_val.json": [e for e, q in zip(train, questions["train"], strict=True) if q[2] in held_out],
            "vqa_test.json": entries(questions["test"], "test"),
            "answer_list.json": sorted({answer for _, answer, _ in questions["train"]}),
            "pretrain.json": captioned([q for q in questions["train"] if q[2] not in held_out]),
        }
        for name, content in files.items():
            with written.replacing(args.output / name) as temporary:
                temporary.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
            print(f"{args.output / name}: {len(content)} entries")
    except OSError as error:
        raise UserError(f"cannot write easy-VQA to {args.output}: {error.strerror or error}") from error


def installed_data() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None:
        raise UserError("the package easy-vqa is not installed: pip install easy-vqa, or name its data with --source")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def read_questions(source: Path, split: str) -> list[tuple[str, str, int]]:
    """[(question, answer, number of the picture), ...] as the package holds them."""
    path = source / split / "questions.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(str(question), str(answer), int(picture)) for question, answer, picture in rows]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not easy-VQA's questions ({error}); --source is its folder `data`") from None


def entries(questions: list[tuple[str, str, int]], split: str) -> list[dict]:
    """VQA entries; the ids of a split count from 1, those of the test split from 1,000,001."""
    first = 1 if split == "train" else 1_000_001
    return [
        {
            "question_id": number,
            "question": question,
            "image": f"images/{split}/{picture}.png",
            "dataset": "easyvqa",
            "answer": answer,
            "question_type": question_type(question),
            "answer_type": "yes/no" if answer in ("yes", "no") else "other",
        }
        for number, (question, answer, picture) in enumerate(questions, first)
    ]


def question_type(question: str) -> str:
    """is there, is there not, what color or what shape."""
    if question.startswith("what"):
        return "what color" if "color" in question else "what shape"
    return "is there not" if NEGATION.search(question) else "is there"


def captioned(questions: list[tuple[str, str, int]]) -> list[dict]:
    """Pre-training entries: every picture whose colour or shape its own questions tell, with what they tell."""
    known: dict[int, dict[str, str]] = {}
    absent: dict[int, list[str]] = {}
    for question, answer, picture in questions:
        facts, missing = known.setdefault(picture, {}), absent.setdefault(picture, [])
        kind = question_type(question)
        if kind.startswith("what"):
            facts["colour" if kind == "what color" else "shape"] = answer
            asked = named(question)  # the colour of a "what is the ... shape?", the shape of a "what color is the ...?"
        else:
            asked = named(question)
            if (answer == "yes") == (kind == "is there not"):
                missing += asked.values()
                asked = {}
        facts |= asked
    result = []
    for picture, facts in sorted(known.items()):
        captions = sentences(facts, absent[picture])
        if captions:
            result.append({"image": f"images/train/{picture}.png", "caption": captions})
    return result


def named(question: str) -> dict[str, str]:
    """The colour or shape that a question names: {"colour": ...}, {"shape": ...} or {}."""
    found = re.search(
        r"\b(?:a|the|no) (\w+)(?: shape)?\b", question.replace("the image", "it").replace("the color", "")
    )
    if found is None or found[1] == "shape":
        return {}
    return {"shape" if found[1] in SHAPES else "colour": found[1]}


def sentences(facts: dict[str, str], missing: list[str]) -> list[str]:
    """Captions of one picture; [] where neither colour nor shape is known."""
    if not facts:
        return []
    colour, shape = facts.get("colour", ""), facts.get("shape", "shape")
    name = f"{colour} {shape}".strip()
    captions = [f"a {name}", f"a picture of a {name}", f"there is a {name} in the image"]
    for absent in sorted(set(missing)):
        captions.append(f"a {name} and no {absent if absent in SHAPES else f'{absent} shape'}")
    return captions
