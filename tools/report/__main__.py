"""What the runs below a folder reached: a summary of each, or the paper's tables with this code's numbers.

    python -m tools.report output/demo                        what each run reached
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

from tabulate import tabulate

from models.weights import check_value
from tools.benchmark.model import trainable_parameters
from tools.report.ablation import ablation_tables
from tools.report.runs import Run, find_runs
from tools.report.summary import summaries
from tools.report.tables import BASE, Table, caption_tables, cost_tables, retrieval_tables, vqa_tables
from utils import UserError, find_file, make_folder, new_file, replacing, run_main

FORMATS = {"text": ("simple", ""), "markdown": ("pipe", "### "), "latex": ("latex_booktabs", "% ")}  # tabulate's, title


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    folder = find_file(args.folder)
    runs = find_runs(folder, unfinished=args.format in ("summary", "html"))
    if args.format == "html":
        if folder.is_file():
            raise UserError(f"{folder}: html needs the folders of the runs")
        from tools.report.pages import write_page  # here: matplotlib and jinja2 take half a second to import

        tables = all_tables([run for run in runs if run.metrics], args) if len(runs) > 1 else []
        write_page(folder, runs, tables, args.output)
        return
    if args.format == "summary":
        text = summaries(runs)
    elif args.format == "jsonl":
        text = "\n".join(json.dumps(run.record(folder)) for run in runs)
    else:
        text = "\n".join(draw(table, args.format) for table in all_tables(runs, args))
    if args.output is None:
        print(text)
        return
    with replacing(args.output) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def all_tables(runs: list[Run], args: argparse.Namespace) -> list[Table]:
    """Tables 1 to 8 of the paper, each followed by this code's further numbers of its kind."""
    tables = [*retrieval_tables(runs), *caption_tables(runs), *vqa_tables(runs), *ablation_tables(runs)]
    return tables + cost_tables(runs, trainable_parameters(BASE), args.pairs_per_second, args.gpus)


def draw(table: Table, form: str) -> str:
    """A table with its title and notes, in LaTeX as comments; LaTeX needs \\usepackage{booktabs}."""
    name, mark = FORMATS[form]
    align = ["left"] + ["right"] * (len(table.columns) - 1)
    body = tabulate(table.rows, table.columns, name, disable_numparse=True, colalign=align)
    notes = [f"% {note}" if form == "latex" else note for note in table.notes]
    return "\n\n".join([mark + table.title, body, *notes]) + "\n"


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
    check_value("--gpus", args.gpus, int)
    check_value("--pairs_per_second", args.pairs_per_second or 1.0, float, 1e-9)
    if args.format == "html" and args.output is None:
        raise UserError("--format html: needs --output")
    if args.output is not None:
        make_folder(new_file(args.output, "--output").parent)  # before the work
    return args


if __name__ == "__main__":
    run_main(main)
