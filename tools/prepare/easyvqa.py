"""easy-VQA (PyPI package easy-vqa, MIT license, 5,000 images) in this project's formats.

    pip install easy-vqa
    python -m tools.prepare easyvqa --output data/easyvqa

Writes images/<split>/, vqa_train.json, vqa_val.json (the questions of `--val` training images, for the set has no
validation split), vqa_test.json, answer_list.json, and pretrain.json: captions of the training images, made from
their own questions and answers alone. `--source` names the folder of the package's data if it is not installed.
"""

import argparse
import importlib.util
import json
import random
import re
import shutil
from pathlib import Path

from dataset.files import read_json
from tools.prepare.common import Job
from utils import UserError

SHAPES = ("circle", "rectangle", "triangle")
NEGATION = re.compile(r"\b(no|not)\b")
NAMED = re.compile(r"\b(?:a|the|no) (\w+)(?: shape)?\b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--source", type=Path, help="the package's folder `data` (default: the installed package's)")
    parser.add_argument("--val", type=int, default=400, help="training images held out for validation")


def prepare(job: Job) -> None:
    source, val = job.source or installed_data(), job.options.val
    train, test = read_questions(source, "train"), read_questions(source, "test")
    pictures = sorted({picture for _, _, picture in train})
    if not 1 <= val < len(pictures):
        raise UserError(f"--val {val}: must be from 1 to {len(pictures) - 1}, some of the training pictures")
    held_out = set(random.Random(0).sample(pictures, val))

    for split in ("train", "test"):
        for image in sorted((source / split / "images").iterdir()):
            with job.replacing(job.images / split / image.name) as temporary:
                shutil.copyfile(image, temporary)
    asked = list(zip(entries(train, "train"), train, strict=True))
    files = {
        "vqa_train.json": [entry for entry, question in asked if question[2] not in held_out],
        "vqa_val.json": [entry for entry, question in asked if question[2] in held_out],
        "vqa_test.json": entries(test, "test"),
        "answer_list.json": sorted({answer for _, answer, _ in train}),
        "pretrain.json": captioned([question for question in train if question[2] not in held_out]),
    }
    for name, content in files.items():
        with job.replacing(job.output / name) as temporary:
            temporary.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
        job.files[job.output / name] = len(content)


def installed_data() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None:
        raise UserError("the package easy-vqa is not installed: pip install easy-vqa, or name its data with --source")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def read_questions(source: Path, split: str) -> list[tuple[str, str, int]]:
    """[(question, answer, number of the picture), ...] as the package holds them."""
    path = source / split / "questions.json"
    try:
        return [(str(question), str(answer), int(picture)) for question, answer, picture in read_json(path)]
    except (ValueError, TypeError) as error:
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
    """Pre-training entries: every picture whose color or shape its own questions give, with what they give."""
    known: dict[int, dict[str, str]] = {}
    absent: dict[int, set[str]] = {}
    for question, answer, picture in questions:
        facts, missing = known.setdefault(picture, {}), absent.setdefault(picture, set())
        kind, asked = question_type(question), named(question)
        if kind.startswith("what"):  # the question names the color of "what is the ... shape?", or the shape
            facts |= {kind.removeprefix("what "): answer, **asked}
        elif (answer == "yes") != (kind == "is there not"):
            facts |= asked
        else:
            missing |= set(asked.values())
    written = ((picture, sentences(facts, absent[picture])) for picture, facts in sorted(known.items()))
    return [{"image": f"images/train/{picture}.png", "caption": captions} for picture, captions in written if captions]


def named(question: str) -> dict[str, str]:
    """The color or shape that a question names: {"color": ...}, {"shape": ...} or {}."""
    found = NAMED.search(question.replace("the image", "it").replace("the color", ""))
    if found is None or found[1] == "shape":
        return {}
    return {"shape" if found[1] in SHAPES else "color": found[1]}


def sentences(facts: dict[str, str], missing: set[str]) -> list[str]:
    """Captions of one picture; [] if neither its color nor its shape is known."""
    if not facts:
        return []
    name = f"{facts.get('color', '')} {facts.get('shape', 'shape')}".strip()
    captions = [f"a {name}", f"a picture of a {name}", f"there is a {name} in the image"]
    return captions + [f"a {name} and no {one if one in SHAPES else f'{one} shape'}" for one in sorted(missing)]
