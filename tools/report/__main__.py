"""What the runs below a folder reached: a summary of each, or the paper's tables with this code's numbers.

    python -m tools.report output/demo                        what each run reached, and its files
    python -m tools.report output --format text               Tables 1 to 8 of the paper, ours beside them
    python -m tools.report output --format html --output report.html      a page: tables, curves, numbers, settings
    python -m tools.report output/ablation --format jsonl --output study.jsonl     all its numbers in one file,
    python -m tools.report study.jsonl --format text          which stands for the folder

Numbers of MSCOCO, Flickr30K, NoCaps and VQA v2 (recognized by the folder of a run's test file) stand in the paper's
columns, with the difference to the paper; other data have tables of their own. Runs that differ in nothing but the seed
are one row: mean, standard deviation and their number. For Table 8, give a speed measured at the paper's size by
--pairs_per_second X --gpus N. VQA's test-dev and test-std come from server.json beside metrics.json,
{"test_dev": 78.12, "test_std": 78.18}, as the evaluation server answered.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.benchmark.model import trainable_parameters
from tools.report.ablation import ablation_tables
from tools.report.formats import FORMATS
from tools.report.runs import Run, find_runs
from tools.report.summary import summaries
from tools.report.tables import BASE, Table, caption_tables, cost_tables, retrieval_tables, vqa_tables
from utils import UserError, find_file, make_folder, new_file, replacing, run_main


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    folder, kind = find_file(args.folder), args.format
    if args.output is not None:  # before the work
        make_folder(args.output.parent)
    runs = find_runs(folder, unfinished=kind in ("summary", "html"))
    if kind == "html":
        from tools.report.pages import write_page

        tables = all_tables([run for run in runs if run.metrics], args) if len(runs) > 1 else []
        write_page(folder, runs, tables, args.output)
    elif kind == "summary":
        write_text(summaries(runs), args.output)
    elif kind == "jsonl":
        write_text("\n".join(json.dumps(run.record(folder)) for run in runs), args.output)
    else:
        write_text("\n".join(map(FORMATS[kind], all_tables(runs, args))), args.output)


def write_text(text: str, output: Path | None) -> None:
    """Into a file, or to the console without one."""
    if output is None:
        print(text)
        return
    with replacing(output) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def all_tables(runs: list[Run], args: argparse.Namespace) -> list[Table]:
    """Tables 1 to 8 of the paper, each followed by this code's further numbers of its kind."""
    tables = [*retrieval_tables(runs), *caption_tables(runs), *vqa_tables(runs), *ablation_tables(runs)]
    return tables + cost_tables(runs, trainable_parameters(BASE), args.pairs_per_second, args.gpus)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of one run or of several, or a file that --format jsonl has written")
    add("--format", choices=("summary", *FORMATS, "jsonl", "html"), default="summary", help="default: %(default)s")
    add("--output", type=Path, help="new file instead of the console; html needs one")
    add("--pairs_per_second", type=float, help="pre-training speed measured with configs/Pretrain.yaml, of all GPUs")
    add("--gpus", type=int, default=1, help="GPUs that reached it (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.gpus < 1 or (args.pairs_per_second is not None and not args.pairs_per_second > 0):
        raise UserError("--gpus and --pairs_per_second must be above 0")
    if args.format == "html" and args.output is None:
        raise UserError("--format html: needs --output")
    if args.output is not None:
        new_file(args.output, "--output")
    return args


if __name__ == "__main__":
    run_main(main)
