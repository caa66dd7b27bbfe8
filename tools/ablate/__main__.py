"""Run the ablations of the paper (Tables 4 to 7): every row pre-trained, then judged by retrieval and VQA.

    python -m tools.ablate all --base configs/demo/Pretrain.yaml --output output/demo/ablation --seeds 3 --jobs 2
    python -m tools.ablate 4 5 --base configs/Pretrain.yaml --seeds 1
    python -m tools.report output/demo/ablation --format text

The rows are those of configs/ablation/: a row is --base with the row's four switches (target, masking, mask ratio,
start layer) in the place of the base's own; fine-tuning is by the files beside it (Retrieval.yaml or
Retrieval_coco.yaml, VQA.yaml). Start layers are the paper's of 12 and scale with the depth of the base's
image encoder (1, 6, 9, 12 become 1, 3, 5, 6 of 6). The paper's model is a row of all four tables and is run once.
Seeds are the base's own and the following; a seed's rows come before the next seed.

OUTPUT/ROW/seed_N/ holds a folder and a console log per stage, and result.json with the numbers of the finished stages.
Finished stages are skipped, interrupted ones resume from their checkpoints; Ctrl-C stops all runs with a checkpoint.
--jobs N divides this process's CPU cores, and the GPUs, among N runs; a run with several GPUs is started by torchrun,
and a global batch is train.batch_size (per process) x train.accumulation x GPUs, so set accumulation: --override
changes pre-training alone, --retrieval_override and --vqa_override the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from engine import config as settings
from engine.run import lock
from models.weights import check_value
from tools.ablate.running import STAGES, AblationRun, Stage, divide_gpus, run_all, say
from utils import ROOT, Config, UserError, find_file, own_folder, run_main

TABLES = ("4", "5", "6", "7")
PAPER_DEPTH = 12  # layers of the image encoder whose numbers Table 7 names
SWITCHES = ("target", "masking", "mask_ratio", "inject_from")  # of mim: what a row is
CONFIGS = {"retrieval": ("Retrieval.yaml", "Retrieval_coco.yaml"), "vqa": ("VQA.yaml",)}  # beside the base
CONFIGS["zeroshot"] = CONFIGS["retrieval"]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs, left_out = plan(args)
    slots = divide_gpus(args.jobs, args.device)
    with lock(own_folder(args.output, "tools.ablate") / ".tools.ablate"):
        say(*left_out, f"{len(runs)} runs, {len(slots)} side by side")
        failed = run_all(runs, slots, args.device)
    if failed:  # everything else is done
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}; the same command tries them again")
    say(f"done; python -m tools.report {args.output} --format text shows the tables")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tables", nargs="+", choices=(*TABLES, "all"), metavar="TABLE", help="4, 5, 6, 7 or all")
    add("--base", default="configs/Pretrain.yaml", help="pre-training YAML that the rows change (default: %(default)s)")
    add("--output", type=Path, default=Path("output/ablation"), help="folder for all runs (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs per row (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    stages = [name for name in STAGES if name != "pretrain"]
    add("--stages", nargs="+", choices=stages, default=["retrieval", "vqa"], help="after pre-training (default: both)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for name in ("override", "retrieval_override", "vqa_override"):
        add(f"--{name}", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    args = parser.parse_args(argv)
    check_value("--seeds", args.seeds, int)
    check_value("--jobs", args.jobs, int)
    args.tables = list(TABLES) if "all" in args.tables else sorted(set(args.tables))
    args.stages = [name for name in STAGES if name in args.stages]
    return args


def plan(args: argparse.Namespace) -> tuple[list[AblationRun], list[str]]:
    """-> (the runs, a seed's before the next seed's; rows that are left out, for they need a codebook)."""
    base = settings.load_config(args.base, args.override, settings.PRETRAIN)
    fine_tuning, rows, left_out = [], {}, []
    for name in args.stages:
        overrides = args.vqa_override if name == "vqa" else args.retrieval_override
        fine_tuning.append(make_stage(name, beside(args.base, CONFIGS[name]), overrides))
    for row in rows_of(args.tables):
        switches = row_switches(row, base)
        codebook = switches.get("mim.codebook")
        if codebook and not any(Path(folder, codebook).is_dir() for folder in (".", ROOT)):
            left_out.append(f"{row}: left out, {codebook} does not exist: give it by --override mim.codebook=FOLDER")
            continue
        changed = [f"{key}={'none' if value is None else json.dumps(value)}" for key, value in switches.items()]
        rows[row] = [make_stage("pretrain", args.base, [*args.override, *changed]), *fine_tuning]
    runs = [
        AblationRun(row, seed, args.output / row / f"seed_{seed}", stages)
        for seed in range(base.seed, base.seed + args.seeds)
        for row, stages in rows.items()
    ]
    return runs, left_out


def make_stage(name: str, config: str, overrides: list[str]) -> Stage:
    stage = settings.STAGES[STAGES[name].removesuffix(".py").lower()]
    return Stage(name, config, overrides, settings.load_config(config, overrides, stage))


def beside(base: str, names: Sequence[str]) -> str:
    """The configuration of fine-tuning that lies beside the base's, under one of these names."""
    folder = find_file(base, "--base").parent
    found = [str(folder / name) for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"--base {base}: beside it is no {' or '.join(names)}")
    return found[0]


def rows_of(tables: Sequence[str]) -> list[str]:
    """The rows' configurations (names of files in configs/ablation), the paper's model first, each once."""
    paper = json.loads((ROOT / "tools/report/paper_tables.json").read_text(encoding="utf-8"))["tables"]
    names = dict.fromkeys(row["config"] for number in tables for row in paper[number]["rows"])
    return sorted(names, key=lambda name: name != "semmim")


def row_switches(row: str, base: Config) -> dict:
    """{dotted key: value} that makes a row of a base. The base's own codebook goes before the row file's."""
    mim = settings.load_config(f"configs/ablation/{row}.yaml", (), settings.PRETRAIN).mim
    switches = {f"mim.{key}": mim[key] for key in SWITCHES}
    if mim.inject_from is not None:
        switches["mim.inject_from"] = scaled_layer(mim.inject_from, image_depth(base))
    if mim.target == "dvae":
        switches["mim.codebook"] = base.mim.codebook or mim.codebook
    return switches


def scaled_layer(layer: int, depth: int) -> int:
    """The layer of `depth` that is as deep as `layer` of the paper's 12, rounded half up, at least 1."""
    return max(1, (2 * layer * depth + PAPER_DEPTH) // (2 * PAPER_DEPTH))


def image_depth(config: Config) -> int:
    """Number of layers of a configuration's image encoder; built without memory for its weights."""
    from models.vit import ImageEncoder  # here: timm takes two seconds to import

    encoder = config.model.image_encoder
    with torch.device("meta"):
        return ImageEncoder(encoder.name, encoder.image_size, dict(encoder.args)).depth


if __name__ == "__main__":
    run_main(main)
