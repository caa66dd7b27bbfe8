"""easy-VQA (PyPI package easy-vqa, MIT license, 5,000 images) in this project's formats.

    pip install easy-vqa
    python -m tools.prepare easyvqa --output data/easyvqa

Writes images/<split>/, vqa_train.json, vqa_val.json (the questions of `--val` training images, for the set has no
validation split), vqa_test.json, answer_list.json, and pretrain.json: captions of the training images, made from
their own questions and answers alone. `--source` names the folder of the package's data if it is not installed.
"""

import argparse
import importlib.util
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

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
    train, test = (read_questions(job, source, split) for split in ("train", "test"))
    pictures = sorted({entry["image"] for entry in train}, key=lambda image: int(Path(image).stem))
    if not 1 <= val < len(pictures):
        raise UserError(f"--val {val}: must be from 1 to {len(pictures) - 1}, some of the training pictures")
    held_out = set(random.Random(0).sample(pictures, val))
    for split in ("train", "test"):
        for image in sorted((source / split / "images").iterdir()):
            with job.replacing(job.images / split / image.name) as temporary:
                shutil.copyfile(image, temporary)
    asked = [entry for entry in train if entry["image"] not in held_out]
    job.write("vqa_train.json", asked)
    job.write("vqa_val.json", (entry for entry in train if entry["image"] in held_out))
    job.write("vqa_test.json", test)
    job.write("answer_list.json", sorted({entry["answer"] for entry in train}))
    job.write("pretrain.json", captioned(asked))


def installed_data() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None:
        raise UserError("the package easy-vqa is not installed: pip install easy-vqa, or name its data with --source")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def read_questions(job: Job, source: Path, split: str) -> list[dict]:
    """VQA entries of the package's [question, answer, number of the picture]; the ids of a split count from 1, those of
    the test split from 1,000,001."""
    path = source / split / "questions.json"
    first = 1 if split == "train" else 1_000_001

    def asked(item: list) -> tuple[str, str, int]:
        return str(item[0]), str(item[1]), int(item[2])

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
        for number, (_, (question, answer, picture)) in enumerate(job.read(path, None, asked), first)
    ]


def question_type(question: str) -> str:
    """is there, is there not, what color or what shape."""
    if question.startswith("what"):
        return "what color" if "color" in question else "what shape"
    return "is there not" if NEGATION.search(question) else "is there"


def captioned(entries: list[dict]) -> Iterator[dict]:
    """Pre-training entries: every picture whose color or shape its own questions give, with what they give."""
    known: dict[str, dict[str, str]] = {}
    absent: dict[str, set[str]] = {}
    for entry in sorted(entries, key=lambda entry: int(Path(entry["image"]).stem)):
        facts, missing = known.setdefault(entry["image"], {}), absent.setdefault(entry["image"], set())
        kind, asked = entry["question_type"], named(entry["question"])
        if kind.startswith("what"):  # the question names the color of "what is the ... shape?", or the shape
            facts |= {kind.removeprefix("what "): entry["answer"], **asked}
        elif (entry["answer"] == "yes") != (kind == "is there not"):
            facts |= asked
        else:
            missing |= set(asked.values())
    return ({"image": image, "caption": sentences(facts, absent[image])} for image, facts in known.items() if facts)


def named(question: str) -> dict[str, str]:
    """The color or shape that a question names: {"color": ...}, {"shape": ...} or {}."""
    found = NAMED.search(question.replace("the image", "it").replace("the color", ""))
    if found is None or found[1] == "shape":
        return {}
    return {"shape" if found[1] in SHAPES else "color": found[1]}


def sentences(facts: dict[str, str], missing: set[str]) -> list[str]:
    """Captions of one picture."""
    name = f"{facts.get('color', '')} {facts.get('shape', 'shape')}".strip()
    captions = [f"a {name}", f"a picture of a {name}", f"there is a {name} in the image"]
    return captions + [f"a {name} and no {one if one in SHAPES else f'{one} shape'}" for one in sorted(missing)]
