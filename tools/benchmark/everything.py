"""`tools.benchmark all`: every benchmark in a process of its own, and the table of docs/speed.md."""

import argparse
import json
import subprocess
import sys

import torch
from tabulate import tabulate

from engine.distributed import distributed
from tools.benchmark.roofline import BATCHES
from utils import ROOT, own_folder, replacing, write_json

BASE, DEMO = "configs/Pretrain.yaml", "configs/demo/Pretrain.yaml"
COMPARE = "--compare train.compile=false train.compile=true"
SHOWN = {  # of a command's figures: the heading, the key, and what other machines gave (docs/speed.md)
    "loader": ("ms of CPU a pair", "ms_of_cpu_per_pair", 3.4),
    "checkpoint": ("seconds a GB", "seconds_per_gigabyte", 0.56),
    "retrieval": ("pairs/s", "pairs_per_second", None),
    "caption": ("captions/s", "captions_per_second", None),
}


def commands(device: str) -> dict[str, str]:
    """{name: words}: at the paper's size on a GPU, at the demo's, at which a step takes a second, on a CPU."""
    config, large = (BASE, "--override model.image_encoder.image_size=384") if device == "cuda" else (DEMO, "")
    found = {"params": "params", "loader": "loader", "checkpoint": f"checkpoint --config {config}"}
    if device == "cuda":
        found["roofline"] = "roofline"
        for pairs in BATCHES:
            found[f"pretrain_{pairs}"] = f"pretrain --override train.batch_size={pairs} {COMPARE}"
    else:
        found["pretrain"] = f"pretrain --config {config}"
    retrieval, caption = f"retrieval --config {config} --images 200 {large}", f"caption --config {config} {large}"
    return found | {"retrieval": retrieval, "caption": caption}


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
    """A Markdown table of all.json; a figure that failed shows its error, one without a prediction a dash."""
    rows, machine = [], ""
    for name, found in result.items():
        if "error" in found:
            rows.append([name, found["error"], None])
            continue
        figures, command = found["figures"], name.partition("_")[0]
        machine = figures["machine"]
        if command in SHOWN:
            what, key, usual = SHOWN[command]
            rows.append([f"{name}: {what}", figures[key], figures.get("predicted") or usual])
        for case in figures.get("cases", ()):
            rows += training_rows(case, machine, result.get("roofline", {}).get("figures", {}))
    return tabulate(rows, [machine, "measured", "predicted"], "pipe", disable_numparse=True, missingval="-")


def training_rows(case: dict, machine: str, roofline: dict) -> list[list]:
    """What a setting of `pretrain` gave, beside the roofline of this machine and number of pairs."""
    pairs, compiled = case["pairs_of_a_step"], "train.compile=true" in case["settings"]
    kind = f"pretrain: {pairs} pairs, {'compiled' if compiled else 'eager'}"
    found = next((sizes[str(pairs)] for name, sizes in roofline.items() if name in machine), {})
    speed = found.get("pairs_per_second_compiled" if compiled else "pairs_per_second")
    mfu = None if compiled else found.get("mfu")
    return [[f"{kind}, pairs/s", case["pairs_per_second"], speed], [f"{kind}, MFU", case["mfu"], mfu]]
