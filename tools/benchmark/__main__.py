"""What the model costs, as JSON on standard output.

    python -m tools.benchmark params --config configs/Pretrain.yaml
    python -m tools.benchmark pretrain --override train.compile=true
    python -m tools.benchmark retrieval --config configs/demo/Pretrain.yaml
    python -m tools.benchmark caption --override model.image_encoder.image_size=384
    python -m tools.benchmark loader
    python -m tools.benchmark all

params: trainable parameters of the pre-training model per module, and operations of a pair; it takes no memory.
pretrain: pairs per second of whole pre-training steps on noise with captions of real lengths, the share of the peak
    that is reached (MFU), peak memory, the operations by time.
retrieval: pairs per second of re-ranking as one batched job, beside the loop over queries (ALBEF's way, every text
    padded to 30 tokens) on equal weights and candidates, whose scores must agree.
caption: captions per second of beam search (the decoder's part, given the image's tokens) beside transformers'
    `generate` on equal random weights.
loader: milliseconds of CPU time per pair of the pre-training loader on JPEG images made for the purpose.
checkpoint: how long training waits for a checkpoint.
roofline: what H200, H100 and A100 would reach in `pretrain` with 128, 64 and 16 pairs, kernel by kernel and fused by a
    perfect compiler, from a traced step of fake tensors; it needs no GPU.
all: each in a process of its own, at base size on a GPU (about 10 minutes on an H100) and at the demo's on a CPU, into
    FOLDER/all.json and at the end FOLDER/summary.md, measured beside predicted figures: what to run once on a machine.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from models.weights import check_value
from tools.benchmark.caption import run_caption
from tools.benchmark.everything import BASE, run_all
from tools.benchmark.loader import run_loader
from tools.benchmark.model import run_params
from tools.benchmark.pretrain import run_checkpoint, run_pretrain, run_roofline
from tools.benchmark.retrieval import run_retrieval
from utils import choose_device, run_main

RUN = {
    "params": run_params,
    "pretrain": run_pretrain,
    "retrieval": run_retrieval,
    "caption": run_caption,
    "loader": run_loader,
    "checkpoint": run_checkpoint,
    "roofline": run_roofline,
    "all": run_all,
}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for option in {"repeats", "batches", "images", "pairs"} & vars(args).keys():
        check_value(f"--{option}", getattr(args, option), int)
    logging.basicConfig(stream=sys.stderr)  # standard output holds nothing but the JSON
    device = torch.device(choose_device(args.device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    found = {"machine": f"{name}, torch {torch.__version__}", **RUN[args.command](args, device)}
    print(json.dumps(found, indent=2))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = {name: commands.add_parser(name) for name in RUN}
    for options in command.values():
        options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        options.add_argument("--config", default=BASE, help="pre-training YAML (default: %(default)s)")
        options.add_argument("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
        options.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts")
    command["pretrain"].add_argument("--batches", type=int, default=8, help="of different lengths")
    command["retrieval"].add_argument("--images", type=int, default=600, help="with five captions each")
    command["caption"].add_argument("--images", type=int, default=8, help="of a batch")
    command["loader"].add_argument("--pairs", type=int, default=512, help="of an epoch")
    command["loader"].add_argument("--workers", type=int, default=1, help="of the loader; 0: the process itself")
    command["all"].add_argument("--folder", type=Path, default=Path("output/benchmark"), help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
