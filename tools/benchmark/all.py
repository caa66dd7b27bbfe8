"""`tools/benchmark all`: every benchmark of a machine by one command."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import utils
from engine.distributed import distributed

BASE = "--config configs/Pretrain.yaml"
GPU = {  # at the paper's size; the longest takes a few minutes
    "params": f"params {BASE}",
    "pretrain": f"pretrain {BASE}",
    "pretrain_sorted_by_length": "pretrain --compare data.bucket_batches=0 data.bucket_batches=8",
    "pretrain_compiled": "pretrain --compare train.compile=false train.compile=true",
    "pretrain_fp32": "pretrain --override train.precision=fp32 train.batch_size=64 --rounds 1",
    "pretrain_checkpointing": "pretrain --compare model.image_encoder.checkpointing=false "
    "model.image_encoder.checkpointing=true",
    "pretrain_text_checkpointing": "pretrain --compare model.bert.checkpointing=false model.bert.checkpointing=true",
    "pretrain_batch_256": "pretrain --override train.batch_size=256 model.image_encoder.checkpointing=true "
    "model.bert.checkpointing=true train.compile=true",
    "loader": "loader --workers 8 --pairs 4096",
    "retrieval": "retrieval",
    "caption": f"caption {BASE} --override model.image_encoder.image_size=384",
}
DEMO = "--config configs/demo/Pretrain.yaml"
CPU = {  # at the demo's size, where a step takes a second; what is counted, at the paper's
    "params": f"params {BASE}",
    "predictions": f"pretrain {BASE} --rounds 0 --override train.batch_size=128 --batches 8",
    "pretrain": f"pretrain {DEMO}",
    "pretrain_sorted_by_length": f"pretrain {DEMO} --compare data.bucket_batches=0 data.bucket_batches=8",
    "loader": "loader",
    "retrieval": "retrieval --images 200",
    "caption": f"caption {DEMO} --scst_steps 1",
}
ON_THE_CPU = ("params", "loader")  # whatever the device


def add_all(commands) -> None:
    parser = commands.add_parser("all", help="every benchmark, each in a process of its own, into one file")
    parser.add_argument("--folder", default="output/benchmark", help="for all.json (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="some of them; `--only list` names them")
    parser.set_defaults(run=run_all)


@distributed("cpu")  # by an exception, at which `subprocess.run` ends its process
def run_all(args: argparse.Namespace) -> dict:
    """{name: its command, seconds, and its figures or the last line of its error}, written to all.json after each."""
    device = utils.choose_device(args.device)
    chosen = GPU if device == "cuda" else CPU
    if args.only:
        if unknown := [name for name in args.only if name not in chosen]:
            raise utils.UserError(f"--only: {unknown[0]} is none of {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in args.only}
    folder = utils.make_folder(Path(args.folder).expanduser())
    result = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    for name, words in chosen.items():
        print(f"{name}: python -m tools.benchmark {words}", file=sys.stderr, flush=True)
        command = words.split()
        if command[0] not in ON_THE_CPU:
            command += ["--device", device]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "tools.benchmark", *command], cwd=utils.ROOT, capture_output=True, text=True
        )
        found = {"command": f"python -m tools.benchmark {words}", "seconds": round(time.perf_counter() - start, 1)}
        if done.returncode:
            found["error"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"    {found['error']}", file=sys.stderr, flush=True)
        else:
            found["figures"] = json.loads(done.stdout)
        result[name] = found
        utils.write_json(folder / "all.json", result)
    return result
