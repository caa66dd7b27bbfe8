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
from pathlib import Path

from engine.run import lock
from models.weights import check_value
from tools.ablate.plan import STAGES, plan
from tools.ablate.running import divide_gpus, run_all, say
from utils import UserError, own_folder, run_main

TABLES = ("4", "5", "6", "7")


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


if __name__ == "__main__":
    run_main(main)
