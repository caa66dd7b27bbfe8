"""Write a checkpoint of any stage as a folder for use, or for the hub: safetensors, settings, vocabulary, model card.

    python -m tools.export output/retrieval/checkpoint_best.pth exported/retrieval
    python -m tools.export output/caption exported/caption --push NAME/REPOSITORY

The folder is what `semmim.SemMIM.from_pretrained` and tools/predict load, without any pickle. It holds what using the
model needs: no optimizer, momentum model or queue, and neither the heads of pre-training nor paths of this disk.
"""

import argparse

from semmim import SemMIM
from utils import UserError, one_line, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="file, or a run's folder: its best checkpoint, else its last")
    parser.add_argument("folder", help="new or empty folder, or one that was exported before")
    parser.add_argument(
        "--push", metavar="NAME/REPOSITORY", help="also upload it to the hub (log in with `hf auth login`)"
    )
    parser.add_argument("--private", action="store_true", help="for --push: only for yourself")
    args = parser.parse_args(argv)
    model = SemMIM.from_pretrained(args.checkpoint)
    folder = model.save_pretrained(args.folder)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{folder}: {model.stage}: {names}")
    if args.push:
        try:
            print(model.push_to_hub(args.push, private=args.private))
        except Exception as error:  # the hub's client has errors of its own for names, rights and network
            why = one_line(error)
            raise UserError(f"--push {args.push}: the hub did not take it ({why}); the folder is written") from None


if __name__ == "__main__":
    run_main(main)
