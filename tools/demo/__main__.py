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
from functools import partial
from pathlib import Path

from dataset.files import read_json
from models.weights import check_value
from tools.demo import scenes
from tools.prepare.common import progress, whole_folder
from utils import in_processes, run_main, write_json

META = "meta.json"
RANGES = {  # smallest and largest value of an option
    "train": (0, 10**7),
    "val": (0, 3000),  # evaluation repeats no scene, and some 4,500 for val and 9,000 for test are all that differ
    "test": (0, 6000),
    "size": (16, 4096),
    "texture": (0, 255),
    "questions_per_scene": (0, 100),  # their ids are index * 100 + number
}


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
    add("--texture", type=int, default=0, help="strength of a texture on the backgrounds, in levels of 255")
    add("--questions_per_scene", type=int, default=4, help="questions asked about an image")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the result is the same")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for option, limits in RANGES.items():
        check_value(f"--{option}", getattr(args, option), int, *limits)
    counts = {split: getattr(args, split) for split in scenes.SPLITS}
    meta = {"counts": counts, **{key: getattr(args, key) for key in ("size", "seed", "questions_per_scene")}}
    if args.texture:  # only then, so that folders from before the option still match
        meta["texture"] = args.texture
    if (args.output / META).is_file() and read_json(args.output / META) == meta:
        print(f"demo data is already in {args.output}")
        return
    with whole_folder(args.output) as folder:
        boxes = {}
        for split, indices in scenes.plan(args.seed, counts).items():
            (folder / "images" / split).mkdir(parents=True)
            drawn = in_processes(partial(draw, args=args, folder=folder, split=split), indices, args.workers)
            drawn = list(progress(drawn, f"demo data, {split}", "images", len(indices)))
            captioned = [entry for entry, _, _ in drawn]  # lists in the formats that ALBEF and mPLUG published
            shown = [{key: entry[key] for key in ("image", "caption", "image_id")} for entry in captioned]
            if split == "train":
                write_json(folder / "pretrain.json", [{"image": e["image"], "caption": e["caption"]} for e in shown])
                shown = [{**entry, "caption": text} for entry in shown for text in entry["caption"]]
            write_json(folder / f"retrieval_{split}.json", shown)
            write_json(folder / f"caption_{split}.json", captioned)
            write_json(folder / f"vqa_{split}.json", [question for _, asked, _ in drawn for question in asked])
            boxes |= {entry["image"]: found for entry, _, found in drawn}
        lines = (f"{json.dumps(image)}: {json.dumps(found)}" for image, found in boxes.items())
        (folder / "boxes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        write_json(folder / "answer_list.json", scenes.answer_list())
        write_json(folder / META, meta)
    print(f"{sum(counts.values())} images and their annotations are in {args.output}")


def draw(index: int, args: argparse.Namespace, folder: Path, split: str) -> tuple[dict, list[dict], list[dict]]:
    """Draws and saves one scene -> its entry for captioning, its questions, its boxes."""
    scene, image = scenes.make_scene(args.seed, index), f"images/{split}/{index:07d}.png"
    scenes.render(scene, args.size, args.texture).save(folder / image)
    labels = "&&".join(o.label for o in scene.objects)  # as mPLUG writes a detector's
    captioned = {"image": image, "caption": scenes.captions(scene), "image_id": index, "object_label": labels}
    asked = [
        {
            "question_id": index * 100 + number,
            "question": found["question"],
            "image": image,
            "dataset": "vqa",
            "answer": found["answer"],
            "object_label": labels,
            "ocr": [[o.pixel_box(args.size), o.word] for o in scene.objects if o.word],
            "question_type": found["kind"],
            "answer_type": found["answer_type"],
        }
        for number, found in enumerate(scenes.questions(scene, args.questions_per_scene))
    ]
    return captioned, asked, [{"label": o.label, "box": o.pixel_box(args.size)} for o in scene.objects]


if __name__ == "__main__":
    run_main(main)
