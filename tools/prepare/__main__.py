"""Turn a data set's official files, as downloaded, into the JSON that the configurations name.

    python -m tools.prepare coco --source downloads/coco --output data
    python -m tools.prepare folder --source photos --output data/own

SOURCE holds the official files under their official names (or in folders directly in it); the error for missing files
says where they are published. Run coco and flickr30k before the sets for pre-training, which leave out their validation
and test images: by id always, and with --check_leaks by what the image files show. A count that differs from the
published one is a warning; what is left out is counted and named. Files are in place only when they are whole, and a
file that the tool did not write is never replaced. docs/reproduce.md has every step with its addresses.
"""

import argparse
import os
from pathlib import Path

from tools.prepare import emoji, folder, karpathy, nocaps, visual_genome, vqa, web
from tools.prepare.common import Job
from utils import run_main

SETS = {  # name: (module, folder of the images below OUTPUT, what it is)
    "coco": (karpathy, "coco/images", "MSCOCO: pre-training, retrieval, captioning"),
    "flickr30k": (karpathy, "flickr30k", "Flickr30K: retrieval"),
    "vg": (visual_genome, "visual_genome", "Visual Genome: pre-training, questions for VQA"),
    "cc3m": (web, "cc3m/images", "Conceptual Captions 3M: pre-training"),
    "sbu": (web, "sbu/images", "SBU Captions: pre-training"),
    "nocaps": (nocaps, "nocaps/images", "NoCaps' validation set: captioning"),
    "vqa": (vqa, "coco/images", "VQA v2: questions, answers, object labels, OCR tokens"),
    "emoji": (emoji, "images", "emoji of two artists, from npm"),
    "folder": (folder, "", "images of one's own with captions"),
}
WITHOUT_LEAKS = ("emoji", "folder")  # sets that share no image with the paper's test sets


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.prepare", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="set", required=True, metavar="SET", prog=parser.prog)
    for name, (module, images, what) in SETS.items():
        command = commands.add_parser(name, help=what, description=module.__doc__, formatter_class=raw)
        add = command.add_argument
        add("--source", type=Path, required=True, help="folder of the files as downloaded")
        add("--output", type=Path, required=True, help=f"what configurations call data/; images: OUTPUT/{images}")
        add("--workers", type=int, default=os.cpu_count(), help="that compare images (default: %(default)s)")
        if name not in WITHOUT_LEAKS:
            add("--require_images", action="store_true", help="write only what has its image on disk")
            add("--check_leaks", action="store_true", help="also find held-out images by the content of their files")
        if hasattr(module, "add_arguments"):
            module.add_arguments(command)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    module, images, _ = SETS[options.set]
    job = Job(options, options.output / images)
    try:
        module.prepare(job)
    finally:  # what was found explains a failure too
        print(*job.report(), sep="\n", flush=True)


if __name__ == "__main__":
    run_main(main)
