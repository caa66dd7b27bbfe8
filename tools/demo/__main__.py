"""Write the built-in demo data: images and the annotation files of all four tasks.

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
from pathlib import Path

from dataset.files import read_json
from tools.demo import scenes
from tools.prepare.common import check_output, progress, whole_folder
from utils import UserError, in_processes, run_main, write_json

META = "meta.json"
LIMITS = {"train": 1, "val": 1, "test": 1, "size": 32, "workers": 1, "questions_per_scene": 1}  # smallest values
MOST = {"size": 4096, "questions_per_scene": 12}
Job = tuple[str, int, int, int, int, str]  # split, seed, index, size, questions, output folder


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.demo", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write into")
    add("--train", type=int, default=4000, help="images in the training split")
    add("--val", type=int, default=300, help="images in the validation split")
    add("--test", type=int, default=600, help="images in the test split")
    add("--size", type=int, default=64, help="side of an image in pixels")
    add("--seed", type=int, default=0, help="another seed, other scenes")
    add("--questions-per-scene", type=int, default=4, help="questions asked about an image")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the result is the same")
    args = parser.parse_args(argv)
    for name, least in LIMITS.items():
        if not least <= getattr(args, name) <= MOST.get(name, getattr(args, name)):
            most = f" and at most {MOST[name]}" if name in MOST else ""
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}{most}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    counts = {split: getattr(args, split) for split in scenes.SPLITS}
    meta = {"counts": counts, **{key: getattr(args, key) for key in ("size", "seed", "questions_per_scene")}}
    if (args.output / META).is_file() and read_json(args.output / META) == meta:
        print(f"demo data is already in {args.output}")
        return
    check_output(args.output)
    chosen = scenes.plan(args.seed, counts)
    with whole_folder(args.output) as folder:
        for split in scenes.SPLITS:
            (folder / "images" / split).mkdir(parents=True)
        jobs = [
            (split, args.seed, index, args.size, args.questions_per_scene, str(folder))
            for split in scenes.SPLITS
            for index in chosen[split]
        ]
        records = list(progress(in_processes(draw, jobs, args.workers), "demo data", "images", len(jobs)))
        for name, content in annotations(records).items():
            write_json(folder / name, content)
        lines = (f"{json.dumps(record['image'])}: {json.dumps(record['boxes'])}" for record in records)
        (folder / "boxes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        write_json(folder / META, meta)
    print(f"{len(jobs)} images and their annotations are in {args.output}")


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


def annotations(records: list[dict]) -> dict[str, list]:
    """{file name: content} in the formats that ALBEF and mPLUG published."""
    files: dict[str, list] = {"answer_list.json": scenes.answer_list()}
    for split in scenes.SPLITS:
        rows = [record for record in records if record["split"] == split]
        shown = [{"image": r["image"], "caption": r["captions"], "image_id": r["index"]} for r in rows]
        files[f"retrieval_{split}.json"] = shown
        files[f"caption_{split}.json"] = [
            {**entry, "object_label": r["object_label"]} for entry, r in zip(shown, rows, strict=True)
        ]
        files[f"vqa_{split}.json"] = [
            question_entry(r, number, asked) for r in rows for number, asked in enumerate(r["questions"])
        ]
    train = files["retrieval_train.json"]
    files["pretrain.json"] = [{"image": entry["image"], "caption": entry["caption"]} for entry in train]
    # a retrieval entry of training names one caption
    files["retrieval_train.json"] = [{**entry, "caption": text} for entry in train for text in entry["caption"]]
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


if __name__ == "__main__":
    run_main(main)
