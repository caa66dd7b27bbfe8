"""Write a checkpoint of any stage as a folder for use, or for the hub: safetensors, settings, vocabulary, model card.

    python tools/export.py output/retrieval/checkpoint_best.pth exported/retrieval
    python tools/export.py output/caption exported/caption --push NAME/REPOSITORY

The folder is what `semmim.SemMIM.from_pretrained` and tools/predict.py load, without any pickle. It holds what using
the model needs: no optimizer, momentum model or queue, and neither the heads of pre-training nor paths of this disk.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from semmim import SemMIM  # noqa: E402
from utils import UserError, make_folder, run_main  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file, or a run's folder: its best checkpoint, else its last")
    parser.add_argument("folder", help="new or empty folder, or one that was exported before")
    parser.add_argument(
        "--push", metavar="NAME/REPOSITORY", help="also upload it to the hub (log in with `hf auth login`)"
    )
    parser.add_argument("--private", action="store_true", help="for --push: only for yourself")
    args = parser.parse_args(argv)
    folder = Path(args.folder).expanduser()
    check_folder(folder)
    model = SemMIM.from_pretrained(args.checkpoint)
    try:
        (folder / "README.md").unlink(missing_ok=True)  # of an earlier export
        model.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from None
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{folder}: {model.stage}, {model.parameter_count() / 1e6:.1f}M parameters: {names}")
    if args.push:
        print(push(model, args.push, args.private))


def check_folder(folder: Path) -> None:
    """Make the folder, and refuse to mix the export with something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds something else than an exported model; name a new folder")
    make_folder(folder)


def push(model: SemMIM, name: str, private: bool) -> str:
    """Upload to the hub; -> the address of the commit."""
    try:
        return str(model.push_to_hub(name, private=private))
    except Exception as error:  # the hub's client has errors of its own for names, rights and network
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push {name}: the hub did not take it ({reason}); the folder is written") from None


if __name__ == "__main__":
    run_main(main)
