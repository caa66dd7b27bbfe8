"""What the runs below a folder reached: a summary of each, or the paper's tables with this code's numbers.

    python -m tools.report output/demo                        what each run reached, and its files
    python -m tools.report output --format text               Tables 1 to 8 of the paper, ours beside them
    python -m tools.report output --format html               output/report/index.html: tables, curves, ablations;
                                                              and a page for each run, with its settings
    python -m tools.report output/ablation --format chart     output/ablation/ablations.png: Tables 4 to 7 in bars
    python -m tools.report output/demo/vqa --format html      output/demo/vqa/report.html, the page of one run
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
from tools.report.ablation import Ablations, ablation_tables
from tools.report.formats import FORMATS
from tools.report.runs import Run, find_runs
from tools.report.summary import summaries
from tools.report.tables import Table, caption_tables, cost_tables, retrieval_tables, vqa_tables
from utils import UserError, find_file, make_folder, new_file, one_line, replacing, run_main

BASE = "configs/Pretrain.yaml"  # the paper's size


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    folder, kind = find_file(args.folder), args.format
    if args.output is not None:  # before the work
        make_folder(args.output if kind == "html" else args.output.parent)
    runs = find_runs(folder, unfinished=kind in ("summary", "html"))
    if kind == "html":
        write_text(one_line(write_pages(folder, runs, args), 1000))
    elif kind == "chart":
        from tools import pages
        from tools.report.charts import draw_overview

        output = args.output or (folder if folder.is_dir() else folder.parent) / "ablations.png"
        pages.save_figure(draw_overview(Ablations(runs)), output)
        write_text(one_line(output, 1000))
    elif kind == "summary":
        in_time = (
            sorted(runs, key=lambda run: (run.folder / "config.yaml").stat().st_mtime) if folder.is_dir() else runs
        )
        write_text(summaries(in_time), args.output)
    elif kind == "jsonl":
        write_text("\n".join(json.dumps(run.record(folder)) for run in runs), args.output)
    else:
        write_text("\n".join(map(FORMATS[kind], all_tables(runs, args.pairs_per_second, args.gpus))), args.output)


def write_pages(folder: Path, runs: list[Run], args: argparse.Namespace) -> Path:
    """The page of a single run, or an index with a page for each; -> the path of the first."""
    from tools.report import pages

    if not folder.is_dir():
        raise UserError(f"{folder}: html needs the folders of the runs")
    if [run.folder for run in runs] == [folder]:
        return pages.write_run(runs[0], (args.output or folder) / "report.html")
    tables = all_tables([run for run in runs if run.metrics], args.pairs_per_second, args.gpus)
    return pages.write_index(folder, runs, tables, args.output or folder / "report")


def write_text(text: str, output: Path | None = None) -> None:
    """Into a file, or to the console without one."""
    if output is None:
        print(text)
        return
    with replacing(output) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def all_tables(runs: list[Run], pairs_per_second: float | None = None, gpus: int = 1) -> list[Table]:
    """Tables 1 to 8 of the paper, each followed by this code's further numbers of its kind."""
    tables = [*retrieval_tables(runs), *caption_tables(runs), *vqa_tables(runs), *ablation_tables(Ablations(runs))]
    return tables + cost_tables(runs, trainable_parameters(BASE), pairs_per_second, gpus)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of one run or of several, or a file that --format jsonl has written")
    kinds = ("summary", *FORMATS, "jsonl", "html", "chart")
    add("--format", choices=kinds, default="summary", help="default: %(default)s")
    where = "file instead of the console; of chart, the .png file (default: FOLDER/ablations.png); of html, the folder "
    add("--output", type=Path, help=f"{where}(default: FOLDER/report, of a single run FOLDER)")
    add("--pairs_per_second", type=float, help="pre-training speed measured with configs/Pretrain.yaml, of all GPUs")
    add("--gpus", type=int, default=1, help="GPUs that reached it (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.gpus < 1 or (args.pairs_per_second is not None and not args.pairs_per_second > 0):
        raise UserError("--gpus and --pairs_per_second must be above 0")
    if args.output is not None and args.format != "html":
        new_file(args.output, "--output")
        if args.format == "chart" and args.output.suffix.lower() != ".png":
            raise UserError(f"--output {args.output}: the name of a chart's file must end in .png")
    return args


if __name__ == "__main__":
    run_main(main)
