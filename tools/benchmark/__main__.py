"""What the model costs, as JSON on standard output.

    python -m tools.benchmark params --config configs/Pretrain.yaml
    python -m tools.benchmark pretrain --compare train.compile=false train.compile=true
    python -m tools.benchmark retrieval
    python -m tools.benchmark caption --override model.image_encoder.image_size=384
    python -m tools.benchmark loader
    python -m tools.benchmark all

params: trainable parameters of the pre-training model per module and in total, and operations of a pair. The model is
built without memory for its weights (torch's meta device): it takes seconds, fits any machine, downloads no weights.

pretrain: pairs per second of whole pre-training steps on noise with captions of real lengths, operations per pair, the
share of the peak that is reached (MFU), peak memory, the operations by time; `--compare A B` alternates two settings in
one process.

retrieval: (image, text) pairs per second of re-ranking as one batched job, beside the loop over queries (ALBEF's way,
every text padded to 30 tokens) on equal weights and candidates, whose scores must agree.

caption: captions per second of beam search (the decoder's part, given the image's tokens) beside transformers'
`generate` on equal random weights.

loader: milliseconds of CPU time per pair of the pre-training loader on JPEG images made for the purpose.

checkpoint: how long training waits for a checkpoint.

roofline: pairs per second that a H200, H100 and A100 would reach with 128, 64 and 16 pairs, kernel by kernel and fused
by a perfect compiler, and the operations by bytes, from a traced step of fake tensors; it needs no GPU.

all: all of them, each in a process of its own, at base size on a GPU (about 10 minutes on an H100) and at the demo's on
a CPU, into FOLDER/all.json after each and FOLDER/summary.md at the end, a table of measured beside predicted figures:
what to run once on a new machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.distributed import distributed
from tools.benchmark.caption import run_caption
from tools.benchmark.checkpoint import run_checkpoint
from tools.benchmark.loader import run_loader
from tools.benchmark.model import run_params
from tools.benchmark.pretrain import run_pretrain
from tools.benchmark.retrieval import run_retrieval
from tools.benchmark.roofline import BATCHES, run_roofline
from tools.benchmark.summary import summary
from utils import ROOT, UserError, choose_device, own_folder, replacing, run_main, write_json

RUN = {
    "params": run_params,
    "pretrain": run_pretrain,
    "retrieval": run_retrieval,
    "caption": run_caption,
    "loader": run_loader,
    "checkpoint": run_checkpoint,
    "roofline": run_roofline,
}
BASE, DEMO = "configs/Pretrain.yaml", "configs/demo/Pretrain.yaml"
COMPARE = "--compare train.compile=false train.compile=true --rounds 2 --batches 8"
GPU = {  # at the paper's size, the quick ones first
    "params": "params",
    "loader": "loader --workers 8 --pairs 4096",
    "checkpoint": "checkpoint",
    "roofline": "roofline",
    **{f"pretrain_{pairs}": f"pretrain --override train.batch_size={pairs} {COMPARE}" for pairs in BATCHES},
    "retrieval": f"retrieval --config {BASE} --images 200 --override model.image_encoder.image_size=384",
    "caption": "caption --override model.image_encoder.image_size=384",
}
CPU = {  # at the demo's size, at which a step takes a second; parameters at the paper's
    "params": "params",
    "loader": "loader",
    "checkpoint": f"checkpoint --config {DEMO}",
    "pretrain": f"pretrain --config {DEMO}",
    "pretrain_sorted_by_length": f"pretrain --config {DEMO} --compare data.bucket_batches=0 data.bucket_batches=8",
    "retrieval": "retrieval --images 200",
    "caption": f"caption --config {DEMO}",
}
ON_THE_CPU = ("params", "loader", "roofline")  # whatever the device


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(stream=sys.stderr)  # standard output holds nothing but the JSON
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (name not in ("rounds", "workers")):
            raise UserError(f"--{name} {value}: must be 1 or more")
    print(json.dumps(RUN[args.command](args) if args.command in RUN else run_all(args), indent=2))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, config: str | None, **numbers: tuple[int, str]):
        """A command with its options: a configuration (None: it builds no model), and numbers with their defaults."""
        options = commands.add_parser(name)
        if config:
            options.add_argument("--config", default=config, help="pre-training YAML (default: %(default)s)")
            options.add_argument("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
        if name not in ON_THE_CPU:
            options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        for key, (default, meaning) in numbers.items():
            options.add_argument(f"--{key}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
        return options

    repeats = (3, "runs of each; the fastest counts")
    command("params", BASE)
    command("roofline", BASE)
    command("checkpoint", BASE, repeats=repeats)
    pretrain = command("pretrain", BASE, rounds=(3, "times that all batches are timed"), batches=(8, "of a round"))
    pretrain.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two settings by turns, overrides in quotes")
    sizes = {"images": (600, "with five captions each"), "k": (64, "candidates of a query")}
    sizes |= {"batch_size": (512, "pairs of one forward of ours"), "queries": (120, "that the loop is timed on")}
    command("retrieval", DEMO, **sizes, repeats=repeats)
    sizes = {"images": (8, "of a batch"), "beams": (5, "of a search"), "max_tokens": (20, "length of the captions")}
    command("caption", BASE, **sizes, repeats=repeats)
    sizes = {"images": (64, "files that are made"), "width": (640, "of them"), "height": (480, "of them")}
    sizes |= {"image_size": (224, "of a view"), "pairs": (512, "of an epoch"), "batch_size": (64, "pairs")}
    sizes |= {"workers": (1, "of the loader; 0: the process itself"), "repeats": (3, "epochs; the median counts")}
    command("loader", None, **sizes).add_argument("--resize", choices=("torch", "pillow"), default="torch")
    everything = command("all", None)
    everything.add_argument("--folder", type=Path, default=Path("output/benchmark"), help="default: %(default)s")
    everything.add_argument("--only", nargs="*", metavar="NAME", help="some of them, by their names in all.json")
    return parser.parse_args(argv)


@distributed("cpu")  # a signal is an exception here, at which `subprocess.run` ends its process
def run_all(args: argparse.Namespace) -> dict:
    """{name: its command, seconds, and its figures or the last line of its error}, written to all.json after each."""
    device = choose_device(args.device)
    chosen = GPU if device == "cuda" else CPU
    for name in args.only or ():
        if name not in chosen:
            raise UserError(f"--only: {name} is none of {', '.join(chosen)}")
    folder = own_folder(args.folder.expanduser(), "tools.benchmark")
    result = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    for name in args.only or chosen:
        words = chosen[name].split()
        words += [] if words[0] in ON_THE_CPU else ["--device", device]
        found = {"command": f"python -m tools.benchmark {' '.join(words)}"}
        print(f"{name}: {found['command']}", file=sys.stderr, flush=True)
        start, command = time.perf_counter(), [sys.executable, "-m", "tools.benchmark", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found["seconds"] = round(time.perf_counter() - start, 1)
        if done.returncode:
            found["error"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"    {found['error']}", file=sys.stderr, flush=True)
        else:
            found["figures"] = json.loads(done.stdout)
        result[name] = found
        write_json(folder / "all.json", result)
    table = summary(result)
    with replacing(folder / "summary.md") as file:
        file.write_text(table + "\n", encoding="utf-8")
    print(table, file=sys.stderr)
    return result


if __name__ == "__main__":
    run_main(main)
