"""Turn a data set's official files, as downloaded, into the JSON that the configurations name.

    python -m tools.prepare coco      --source downloads/coco      --output data
    python -m tools.prepare flickr30k --source downloads/flickr30k --output data
    python -m tools.prepare vg        --source downloads/vg        --output data
    python -m tools.prepare cc3m      --source downloads/cc3m      --output data
    python -m tools.prepare sbu       --source downloads/sbu       --output data
    python -m tools.prepare nocaps    --source downloads/nocaps    --output data
    python -m tools.prepare vqa       --source downloads/vqa       --output data
    python -m tools.prepare easyvqa   --output data/easyvqa

SOURCE holds the official files under their official names (or in folders directly in it); what is missing is listed
with where it is published. Run coco and flickr30k before the sets for pre-training, which leave out their validation
and test images: by id always, and with --check-leaks by what the image files show. Counts of the files are printed
beside the published ones, and differences are warnings; odd entries are counted and named, not fatal. Files are in
place only when they are whole, and a second run with nothing changed does nothing. docs/reproduce.md has the whole
road, with the addresses.
"""

import argparse
import os
import time
from pathlib import Path

from tools.prepare import easyvqa, emoji, folder, karpathy, nocaps, visual_genome, vqa, web
from tools.prepare.held_out import held_out_files
from tools.prepare.job import Job
from tools.prepare.report import describe_state, is_done, write_record
from utils import ROOT, UserError, make_folder, run_main

SETS = {  # name: (module, folder of the images below OUTPUT, what it is)
    "coco": (karpathy, "coco/images", "MSCOCO: pre-training, retrieval, captioning"),
    "flickr30k": (karpathy, "flickr30k", "Flickr30K: retrieval"),
    "vg": (visual_genome, "visual_genome", "Visual Genome: pre-training, questions for VQA"),
    "cc3m": (web, "cc3m/images", "Conceptual Captions 3M: pre-training"),
    "sbu": (web, "sbu/images", "SBU Captions: pre-training"),
    "nocaps": (nocaps, "nocaps/images", "NoCaps' validation set: captioning"),
    "vqa": (vqa, "coco/images", "VQA v2: questions, answers, object labels, OCR tokens"),
}
ALONE = {  # name: (module, what it is), of sets that have their own arguments
    "easyvqa": (easyvqa, "easy-VQA, a small data set on PyPI"),
    "emoji": (emoji, "emoji of two artists, from npm"),
    "folder": (folder, "images of one's own with captions"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="set", required=True, metavar="SET")
    for name, (module, images, what) in SETS.items():
        command = commands.add_parser(name, help=what, description=module.__doc__)
        add_common(command, images)
        if hasattr(module, "add_arguments"):
            module.add_arguments(command)
    for name, (module, what) in ALONE.items():
        raw = argparse.RawDescriptionHelpFormatter
        module.add_arguments(commands.add_parser(name, help=what, description=module.__doc__, formatter_class=raw))
    return parser.parse_args(argv)


def add_common(parser: argparse.ArgumentParser, images: str) -> None:
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of the official files")
    add("--output", type=Path, required=True, help="folder that the configurations call data/")
    add("--images", type=Path, help=f"folder of the images (default: OUTPUT/{images})")
    add("--require-images", action="store_true", help="write only what has its image on disk")
    add("--check-leaks", action="store_true", help="also find held-out images by the content of their files")
    add("--workers", type=int, default=os.cpu_count(), help="processes that compare images (default: %(default)s)")
    add("--force", action="store_true", help="prepare again although nothing has changed")


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.set in ALONE:
        ALONE[options.set][0].prepare(options)
    else:
        prepare(options)


def prepare(options: argparse.Namespace) -> None:
    """Prepare one data set, or say that it is done."""
    module, folder, _ = SETS[options.set]
    images = options.images or options.output / folder
    check_options(options)
    found = module.sources(options)
    record = options.output / "prepared" / f"{options.set}.json"
    earlier = None if options.force else is_done(record, state_of(options, found, images))
    if earlier:
        print(f"{options.set} is prepared already, nothing has changed ({record}; --force prepares it again)")
        print_files({Path(name): count for name, count in earlier["entries"].items()})
        return
    make_folder(record.parent)
    start = time.monotonic()
    job = Job(options.set, options, images)
    try:
        module.prepare(job, found)
        write_record(record, state_of(options, found, images), job)
    except OSError as error:
        raise UserError(f"{options.set}: {error.filename or options.output}: {error.strerror or error}") from None
    finally:  # what was found explains a failure too
        if job.report.counts or job.report.odd_entries:
            print("\n".join(job.report.lines()), flush=True)
    print_files(job.files)
    print(f"{options.set}: prepared in {time.monotonic() - start:.0f} s; these numbers are also in {record}")


def check_options(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"--images {options.images}: no such folder")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: is a file, name a folder")


def state_of(options: argparse.Namespace, found: dict[str, Path], images: Path) -> dict:
    """What decides whether a second run would write the same."""
    unimportant = ("force", "workers")
    arguments = {key: value for key, value in vars(options).items() if key not in unimportant}
    own = held_out_files(options.output)
    others = [path for path in own if path.name != f"held_out_{options.set}.json"]
    code = [*(ROOT / "tools" / "prepare").glob("*.py"), ROOT / "dataset" / "official.py"]
    watch_images = options.require_images or options.check_leaks or options.set in ("cc3m", "sbu")
    return describe_state(arguments, [*found.values(), *others], [images] if watch_images else [], code)


def print_files(files: dict[Path, int]) -> None:
    for path, count in files.items():
        print(f"{path}: {count:,} entries")


if __name__ == "__main__":
    run_main(main)
