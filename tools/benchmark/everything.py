"""`tools.benchmark all`: every benchmark in a process of its own, and the table of docs/speed.md."""

import argparse
import itertools
import json
import subprocess
import sys

import torch
from tabulate import tabulate

from engine.distributed import distributed
from tools.benchmark.pretrain import BATCHES
from utils import ROOT, own_folder, replacing, write_json

BASE, DEMO = "configs/Pretrain.yaml", "configs/demo/Pretrain.yaml"
HEADLINES = ("pairs_per_second", "captions_per_second", "mfu", "ms_of_cpu_per_pair", "seconds_per_gigabyte")


def commands(device: str) -> dict[str, str]:
    """{name: words}: at the paper's size on a GPU, at the demo's, at which a step takes a second, on a CPU."""
    config, large, settings, batches = DEMO, "", ("",), (32,)
    if device == "cuda":
        config, large, batches = BASE, "--override model.image_encoder.image_size=384", BATCHES
        settings = ("train.compile=false", "train.compile=true")
    found = {"params": "params", "loader": "loader", "checkpoint": f"checkpoint --config {config}"}
    for n, setting in itertools.product(batches, settings):
        name = f"pretrain_{n} {setting}".strip()
        found[name] = f"pretrain --config {config} --override train.batch_size={n} {setting}"
    found["retrieval"] = f"retrieval --config {config} --images 200 {large}"
    found["caption"] = f"caption --config {config} {large}"
    return found


@distributed("cpu")  # a signal is an exception here, at which `subprocess.run` ends its process
def run_all(args: argparse.Namespace, device: torch.device) -> dict:
    """{name: its command, and its figures or the last line of its error}, written to all.json after each."""
    folder, result = own_folder(args.folder.expanduser(), "tools.benchmark"), {}
    for name, words in commands(device.type).items():
        words = [*words.split(), "--device", device.type]
        result[name] = {"command": f"python -m tools.benchmark {' '.join(words)}"}
        print(f"{name}: {result[name]['command']}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "tools.benchmark", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            result[name]["error"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        else:
            result[name]["figures"] = json.loads(done.stdout)
        write_json(folder / "all.json", result)
    with replacing(folder / "summary.md") as file:
        file.write_text(summary(result) + "\n", encoding="utf-8")
    return result


def summary(result: dict) -> str:
    """A Markdown table of all.json; a benchmark that failed shows its error, a figure without a prediction a dash."""
    rows, machine = [], ""
    for name, found in result.items():
        if "error" in found:
            rows.append([name, found["error"], None])
            continue
        figures = found["figures"]
        machine, predicted = figures["machine"], figures.get("predicted", {})
        rows += [[f"{name}: {key}", figures[key], predicted.get(key)] for key in HEADLINES if key in figures]
    return tabulate(rows, [machine, "measured", "predicted"], "pipe", disable_numparse=True, missingval="-")
