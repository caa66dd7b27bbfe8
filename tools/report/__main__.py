"""What the runs below a folder reached: a summary of each, or the paper's tables with this code's numbers.

    python -m tools.report output/demo                              what each run reached, and its files
    python -m tools.report output --format text|markdown|latex      Tables 1 to 8 of the paper, ours beside them
    python -m tools.report output --format html                     output/report/index.html: tables, curves, ablations;
                                                                    and a page for each run, with samples and settings
    python -m tools.report output/ablation --format chart           output/ablation/ablations.png: Tables 4 to 7 in bars
    python -m tools.report output/demo/vqa --format html            output/demo/vqa/report.html, the page of one run

Numbers of MSCOCO, Flickr30K, NoCaps and VQA v2 (told by the folder of a run's test file) stand in the paper's columns,
with the difference to the paper; other data have tables of their own. Where nothing was run, the cell says so. Runs
that differ in nothing but the seed are one row: mean, standard deviation and their number. For Table 8, give a speed
measured at the paper's size by --pairs_per_second X --gpus N. VQA's test-dev and test-std come from server.json beside
metrics.json, {"test_dev": 78.12, "test_std": 78.18}, as the evaluation server answered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from evaluation.caption import caption_table
from evaluation.retrieval import retrieval_table
from evaluation.vqa import vqa_table
from tools.report import ablation as report_ablation
from tools.report import formats as report_formats
from tools.report import tables as report_tables
from tools.report.order import order_table
from utils import UserError, make_folder, one_line, replacing, run_main

FORMATS: dict[str, Callable] = {
    "text": report_formats.as_text,
    "markdown": report_formats.as_markdown,
    "latex": report_formats.as_latex,
}
FILES = {  # what a user looks for, in the order of the report
    "checkpoint": "checkpoint_last.pth",
    "best": "checkpoint_best.pth",
    "images": "images",
    "TensorBoard": "tensorboard",
    "log": "log.jsonl",
    "numbers": "metrics.json",
    "rankings": "retrieval_result.json",
    "answers": "vqa_result.json",
    "captions": "caption_result.json",
}
# the validation scores that choose the best epoch; that by ITC is pre-training's, and one of retrieval's two
SCORES = {"itm_r_mean": "val recall", "itc_r_mean": "val by ITC", "cider": "val CIDEr", "accuracy": "val accuracy"}
TEACHER = {
    "teacher/cls_batch_entropy": "entropy of the teacher's batch-mean distribution, [CLS]",
    "teacher/patch_batch_entropy": "the same over the masked patches",
    "teacher/patterns_in_use": "patterns in use by the patches of a batch",
}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    folder = args.folder
    runs = sorted(report_tables.run_folders(folder), key=lambda run: (run / "config.yaml").stat().st_mtime)
    if not runs:
        raise UserError(f"{folder}: no run in it (a run's folder holds config.yaml); give a script's --output_dir")
    if args.output is not None:  # before the work
        make_folder(args.output if args.format == "html" else args.output.parent)
    if args.format == "summary":
        write_text(summaries(runs), args.output)
        return
    if args.format == "html" and runs == [folder]:
        print(write_run(folder, args.output or folder))
        return
    found = report_tables.find_runs(folder)
    if args.format == "chart":
        from tools.report.charts import write_overview

        print(write_overview(folder, found, args.output or folder / "ablations.png"))
        return
    tables = all_tables(folder, found, count_parameters(), args.pairs_per_second, args.gpus)
    if args.format == "html":
        from tools.report.page import write_pages

        print(write_pages(folder, every_run(runs), tables, args.output or folder / "report"))
        return
    write_text("\n".join(FORMATS[args.format](table) for table in tables), args.output)


def write_text(text: str, output: Path | None) -> None:
    """Into a file, or to the console without one."""
    if output is None:
        print(text)
        return
    with replacing(output) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def all_tables(
    folder: Path,
    runs: list[report_tables.Run],
    parameters: dict[str, int],
    pairs_per_second: float | None = None,
    gpus: int = 1,
) -> list[report_tables.Table]:
    """Tables 1 to 8 of the paper, each followed by this code's further numbers of its kind."""
    paper = report_tables.read_paper()["tables"]
    found = report_ablation.ablation_runs(folder, runs)
    tables = [*report_tables.table1(paper["1"], runs), *report_tables.table2(paper["2"], runs)]
    tables += report_tables.table3(paper["3"], runs)
    for number in report_ablation.NUMBERS:
        tables.append(report_ablation.ablation_table(paper[number], number, found))
        tables += report_ablation.mean_recall_table(paper[number], number, found)
    tables += order_table({number: paper[number] for number in report_ablation.NUMBERS}, found)
    return tables + report_tables.table8(paper["8"], runs, parameters, pairs_per_second, gpus)


def every_run(folders: list[Path]) -> list[report_tables.Run]:
    """The runs in the folders, also those that have no numbers yet."""
    found = (report_tables.read_run(folder, unfinished=True) for folder in folders)
    return [run for run in found if run is not None]


def write_run(folder: Path, output: Path) -> Path:
    from tools.report import page as report_page

    if not (found := every_run([folder])):
        raise UserError(f"{folder}/config.yaml: of no stage of this code")
    return report_page.write_run(found[0], output)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="folder of one run, or of several")
    add("--format", choices=("summary", *FORMATS, "html", "chart"), default="summary", help="default: %(default)s")
    where = "file instead of the console; of chart, the .png file (default: FOLDER/ablations.png); of html, the folder "
    add("--output", type=Path, help=f"{where}(default: FOLDER/report, of a single run FOLDER)")
    add("--pairs_per_second", type=float, help="pre-training speed measured with configs/Pretrain.yaml, of all GPUs")
    add("--gpus", type=int, default=1, help="GPUs that reached it (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.gpus < 1 or (args.pairs_per_second is not None and not args.pairs_per_second > 0):
        raise UserError("--gpus and --pairs_per_second must be above 0")
    if args.output is not None:
        check_output(args.output, args.format)
    return args


def check_output(output: Path, kind: str) -> None:
    """UserError, before the work, where --output names a folder instead of a file, or a chart without .png."""
    if kind == "html":
        return
    ending = ".png" if kind == "chart" else ""
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; name a file{' that ends in ' if ending else ''}{ending}")
    if ending and output.suffix.lower() != ending:
        raise UserError(f"--output {output}: the name of a chart's file must end in {ending}")


def count_parameters() -> dict[str, int]:
    """Trainable parameters per module at the paper's size (tools/benchmark)."""
    from tools.benchmark import __main__ as benchmark

    arguments = argparse.Namespace(config="configs/Pretrain.yaml", override=[])
    return benchmark.run_params(arguments)["trainable_parameters"]


def summaries(runs: list[Path]) -> str:
    """What each run reached, and its files."""
    lines = []
    for run in runs:
        found = [*training_lines(run), *evaluation_lines(run), *file_lines(run)]
        lines += ["", one_line(run, 1000), *("  " + line for line in found)]
    return "\n".join(lines)


def training_lines(run: Path) -> list[str]:
    """First and last logged value of every loss, validations, and whether the teacher still uses its patterns."""
    entries = report_tables.read_log(run)
    steps = [entry for entry in entries if entry.get("split") == "train"]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    result = [f"step {last['step']}, {last.get('pairs_per_second') or 0:.0f} pairs/s"]
    for key in [key for key in last if key == "loss" or key.startswith("loss/")]:
        result.append(f"{key:12} {first.get(key):8.3f} -> {last[key]:8.3f}")
    if "reward" in last:
        result.append(f"{'reward':12} {first['reward']:8.3f} -> {last['reward']:8.3f}")
    for key, name in SCORES.items():
        # step 0 is the evaluation at the end, except for CIDEr alone: there self-critical training began
        started = [x for x in entries if "cider" in x and "bleu4" not in x]
        validated = [x for x in entries if x["split"] == "val" and key in x and (x["step"] or x in started)]
        if validated:
            shown = (f"{entry[key]:.1f} (step {entry['step']})" for entry in validated)
            result.append(f"{name:12} {', '.join(shown)}")
    result += [f"{last[key]:8.2f}  {meaning}" for key, meaning in TEACHER.items() if last.get(key) is not None]
    return result


def evaluation_lines(run: Path) -> list[str]:
    """Each split's table: recalls with what chance gives, accuracies with what constant answers give, or captioning."""
    path = run / "metrics.json"
    numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result = []
    for split, values in numbers.items():
        if not isinstance(values, dict):
            continue
        if "cider" in values:
            result += caption_table(split, values)
        elif "accuracy" in values or "itc_tr_r1" in values:
            table = vqa_table if "accuracy" in values else retrieval_table
            result += table(split, values).splitlines()
    return result


def file_lines(run: Path) -> list[str]:
    return [f"{name:12} {one_line(run / file, 1000)}" for name, file in FILES.items() if (run / file).exists()]


if __name__ == "__main__":
    run_main(main)
