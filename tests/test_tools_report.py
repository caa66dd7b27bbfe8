"""tools/report on the folder of a training and of an evaluation, written by hand."""

import json
import sys

import pytest

from evaluation.retrieval import chance_metrics
from evaluation.vqa import vqa_metrics
from tools.report import __main__ as report
from utils import UserError


def run_report(monkeypatch, capsys, folder) -> str:
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    report.main()
    return capsys.readouterr().out


def test_report_shows_losses_teacher_recalls_and_files(tmp_path, monkeypatch, capsys):
    training, evaluation = tmp_path / "pretrain", tmp_path / "zeroshot"
    for folder in (training, evaluation):
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 1\n")
    steps = [
        {"step": 1, "split": "train", "loss": 40.0, "loss/itc": 6.5, "teacher/patterns_in_use": 200.0},
        {"step": 9, "split": "train", "loss": 10.0, "loss/itc": 2.5, "teacher/patterns_in_use": 99.0},
    ]
    steps += [{"step": step, "split": "val", "itc_r_mean": value} for step, value in ((5, 20.04), (9, 31.26))]
    (training / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (training / "checkpoint_last.pth").touch()
    columns = chance_metrics([1])
    numbers = {f"{stage}_{column}": 12.34 for stage in ("chance", "itc", "itm") for column in columns}
    (evaluation / "metrics.json").write_text(json.dumps({"test": numbers}))
    out = run_report(monkeypatch, capsys, tmp_path)
    assert "6.500 ->    2.500" in out and "99.00  patterns in use" in out
    assert "val by ITC   20.0 (step 5), 31.3 (step 9)" in out
    assert "tr_r1" in out and out.count("12.34") == 3 * len(columns)
    assert str(training / "checkpoint_last.pth") in out


def test_report_shows_accuracies_beside_constant_answers(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "vqa_result.json").touch()
    kinds = ["is", "is", "what"]
    numbers = vqa_metrics(["yes", "yes", "red"], ["yes", "no", "red"], ["yes/no", "yes/no", "other"], kinds)
    (tmp_path / "metrics.json").write_text(json.dumps({"test": numbers, "val": {"questions": 3}}))
    out = run_report(monkeypatch, capsys, tmp_path)
    assert [line.split() for line in out.splitlines() if "constant" in line] == [
        ["test", "66.67", "constant", "66.67", "(3", "questions)"],
        ["is", "50.00", "constant", "50.00"],
        ["what", "100.00", "constant", "100.00"],
    ]
    assert "vqa_result.json" in out
    many = {f"kind {number}": 1.0 for number in range(65)}
    numbers |= {"by_question_type": many, "constant_by_question_type": many}
    (tmp_path / "metrics.json").write_text(json.dumps({"test": numbers}))
    assert "yes/no                50.00" in run_report(monkeypatch, capsys, tmp_path)


def test_report_of_a_folder_without_runs_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no run in it"):
        run_report(monkeypatch, capsys, tmp_path)


def test_escape_codes_and_newlines_of_a_folders_name_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a\x1b[31m\nb"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "log.jsonl").touch()
    out = run_report(monkeypatch, capsys, tmp_path)
    assert f"{tmp_path}/a b\n" in out and "a b/log.jsonl" in out and "\x1b" not in out
