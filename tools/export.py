"""Write a checkpoint of any stage as a folder for use, or for the hub: safetensors, settings, vocabulary, model card.

    python -m tools.export output/retrieval/checkpoint_best.pth exported/retrieval
    hf upload NAME/REPOSITORY exported/retrieval  # to the hub

The folder is what `semmim.SemMIM.from_pretrained` and tools/predict load, without any pickle. It holds what using the
model needs: no optimizer, momentum model or queue, and neither the heads of pre-training nor paths of this disk.
"""

import argparse

from semmim import SemMIM
from utils import run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="file, or a run's folder: its best checkpoint, else its last")
    parser.add_argument("folder", help="new or empty folder, or one that was exported before")
    args = parser.parse_args(argv)
    model = SemMIM.from_pretrained(args.checkpoint)
    folder = model.save_pretrained(args.folder)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{folder}: {model.stage}: {names}")


if __name__ == "__main__":
    run_main(main)
