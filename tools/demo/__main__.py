"""Writes the built-in demo data: images and the annotation files of all four tasks.

    python -m tools.demo --output output/demo/data --train 4000 --val 300 --test 600 --size 64

The images go to images/<split>/<scene>.png. Beside images/ lie, with paths relative to their own folder:
pretrain.json, retrieval_<split>.json, caption_<split>.json, vqa_<split>.json, answer_list.json and boxes.json
(image -> [{"label", "box": [x0, y0, x1, y1]}] in pixels, x1 and y1 the first column and row outside).
meta.json records the arguments: a folder whose meta.json matches is left alone, and any other that is not empty is
refused. The folder is in place only when it is whole.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tools.demo import scenes
from tools.prepare.common import check_output, whole_folder
from utils import UserError, in_processes, run_main

META = "meta.json"
Job = tuple[str, int, int, int, int, str]  # split, seed, index, size, questions, output folder


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Writes the built-in demo data.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=int, default=4000, help="images in the training split")
    parser.add_argument("--val", type=int, default=300, help="images in the validation split")
    parser.add_argument("--test", type=int, default=600, help="images in the test split")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--questions-per-scene", type=int, default=4, help="questions asked about an image")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; the result is the same")
    args = parser.parse_args(argv)
    limits = {
        "train": (1, None),
        "val": (1, None),
        "test": (1, None),
        "size": (32, 4096),
        "workers": (1, None),
    }
    for name, (low, high) in {**limits, "questions_per_scene": (1, 12)}.items():
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            wanted = f"from {low} to {high}" if high else f"{low} or more"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        make_demo_data(args)
    except OSError as error:
        raise UserError(f"cannot write demo data to {args.output}: {error.strerror or error}") from error


def make_demo_data(args: argparse.Namespace) -> None:
    """Writes everything that `args` asks for, or nothing where it is there already."""
    meta = describe(args)
    if is_complete(args.output, meta):
        print(f"demo data is already in {args.output}")
        return
    check_output(args.output)
    chosen = scenes.plan(args.seed, meta["counts"])
    with whole_folder(args.output) as folder:
        for split in scenes.SPLITS:
            (folder / "images" / split).mkdir(parents=True)
        jobs = [
            (split, args.seed, index, args.size, args.questions_per_scene, str(folder))
            for split in scenes.SPLITS
            for index in chosen[split]
        ]
        records = list(with_progress(draw_all(jobs, args.workers), len(jobs)))
        assert len(records) == len(jobs)
        for name, content in annotations(records).items():
            write_json(folder / name, content)
        write_json(folder / META, meta)
    print(f"{len(jobs)} images and their annotations are in {args.output}")


# ---------------------------------------------------------------- what is there already


def describe(args: argparse.Namespace) -> dict:
    """All that the result depends on but this code."""
    return {
        "counts": {split: getattr(args, split) for split in scenes.SPLITS},
        "size": args.size,
        "seed": args.seed,
        "questions_per_scene": args.questions_per_scene,
    }


def is_complete(folder: Path, meta: dict) -> bool:
    """Whether the folder holds these very data, with no image or annotation file missing."""
    try:
        if json.loads((folder / META).read_text()) != meta:
            return False
        counts = {split: len(os.listdir(folder / "images" / split)) for split in scenes.SPLITS}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return counts == meta["counts"] and all((folder / name).exists() for name in annotations([]))


# ---------------------------------------------------------------- drawing


def draw(job: Job) -> dict:
    """Draws and saves one scene; returns what the annotation files say about it."""
    split, seed, index, size, questions, folder = job
    scene = scenes.make_scene(seed, index)
    image = f"images/{split}/{index:07d}.png"
    scenes.render(scene, size).save(Path(folder) / image)
    return {
        "split": split,
        "index": index,
        "image": image,
        "captions": scenes.captions(scene),
        "object_label": scenes.object_label(scene),
        "ocr": scenes.ocr_tokens(scene, size),
        "questions": scenes.questions(scene, questions),
        "boxes": scenes.object_boxes(scene, size),
    }


def draw_all(jobs: list[Job], workers: int) -> Iterator[dict]:
    """The records in the jobs' order, whatever the number of processes."""
    yield from in_processes(draw, jobs, min(workers, len(jobs)))


def with_progress(records: Iterator[dict], total: int) -> Iterator[dict]:
    """Passes the records on and reports rate and remaining time, on a terminal in place."""
    terminal = sys.stderr.isatty()
    start = shown = time.monotonic()
    for done, record in enumerate(records, 1):
        yield record
        now = time.monotonic()
        if now - shown >= (0.2 if terminal else 10) or done == total:
            rate = done / max(now - start, 1e-6)
            line = f"demo data: {done}/{total} images, {rate:.0f}/s, ETA {(total - done) / rate:.0f} s"
            end = "\r" if terminal and done < total else "\n"
            print(f"{line:<70}" if terminal else line, end=end, file=sys.stderr, flush=True)
            shown = now


# ---------------------------------------------------------------- annotation files


def annotations(records: list[dict]) -> dict[str, list | dict]:
    """{file name: content} in the formats that ALBEF and mPLUG published."""
    by_split = {split: [r for r in records if r["split"] == split] for split in scenes.SPLITS}
    files: dict[str, list | dict] = {
        "pretrain.json": [{"image": r["image"], "caption": r["captions"]} for r in by_split["train"]],
        "answer_list.json": scenes.answer_list(),
        "boxes.json": {r["image"]: r["boxes"] for r in records},
    }
    for split, rows in by_split.items():
        files[f"retrieval_{split}.json"] = [
            {"image": r["image"], "caption": r["captions"], "image_id": r["index"]} for r in rows
        ]
        files[f"caption_{split}.json"] = [
            {
                "image": r["image"],
                "caption": r["captions"],
                "image_id": r["index"],
                "object_label": r["object_label"],
            }
            for r in rows
        ]
        files[f"vqa_{split}.json"] = [
            question_entry(r, k, asked) for r in rows for k, asked in enumerate(r["questions"])
        ]
    files["retrieval_train.json"] = [  # training entries name one caption each
        {"image": r["image"], "caption": caption, "image_id": r["index"]}
        for r in by_split["train"]
        for caption in r["captions"]
    ]
    return files


def question_entry(record: dict, number: int, asked: dict) -> dict:
    return {
        "question_id": record["index"] * 100 + number,
        "question": asked["question"],
        "image": record["image"],
        "dataset": "vqa",
        "answer": asked["answer"],
        "object_label": record["object_label"],
        "ocr": record["ocr"],
        "question_type": asked["kind"],
        "answer_type": asked["answer_type"],
    }


def write_json(path: Path, content: list | dict) -> None:
    """One entry a line, in place only when it is whole."""
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(entry) for entry in content) + "\n]\n"
    else:
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop request also ends the drawing processes
    run_main(main)
