"""demo.sh: a signal to it ends what it has started, in whichever step, once or twice."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from drill import runs

# Stands in for Python: a step's command is noted, and sleeps where the test wants it to.
STAND_IN = """#!/usr/bin/env bash
[[ $* == *"-m pip"* ]] && exit
echo "$*" >>commands
[[ $* == *"$FAIL_AT"* ]] && echo "error: broken" && exit 2
[[ $* == *"$SLEEP_AT"* ]] || exit 0
echo $$ >>sleeping
exec sleep 60
"""


@pytest.fixture
def demo(tmp_path):
    """A copy of demo.sh whose Python is STAND_IN."""
    for name in ("demo.sh", "tools/setup_venv.sh", "requirements.txt", "tools/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "output/demo").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return tmp_path


def start(folder: Path, sleep_at: str, fail_at: str = "no step", **options) -> subprocess.Popen:
    env = {**os.environ, "SLEEP_AT": sleep_at, "FAIL_AT": fail_at}
    return subprocess.Popen(["bash", "demo.sh"], cwd=folder, env=env, **options)


def test_all_steps_run(demo):
    assert start(demo, "no step").wait(60) == 0
    commands = (demo / "commands").read_text()
    for step in ("tools.demo", "Pretrain.py", "--evaluate", "VQA.yaml", "Retrieval.yaml", "Caption_scst", "report"):
        assert step in commands


@pytest.mark.parametrize(("broken", "others"), [("VQA.yaml", "no step"), ("Caption.yaml", "VQA.yaml")])
def test_a_step_that_fails_says_so_and_ends_what_runs_beside_it(demo, broken, others):
    script = start(demo, others, broken, stdout=subprocess.PIPE, text=True)
    lines = script.communicate(timeout=60)[0].splitlines()
    assert script.returncode != 0 and lines[-1] == "error: broken"
    assert "tools.report" not in (demo / "commands").read_text()
    if (demo / "sleeping").exists():
        assert not any(map(runs, map(int, (demo / "sleeping").read_text().split())))


@pytest.mark.parametrize(
    ("sleep_at", "processes", "signals"),
    [
        ("tools.demo", 1, ("HUP", "TERM")),
        ("--evaluate", 1, ("TERM",)),
        ("checkpoint_last.pth --resume", 2, ("INT", "INT")),
        ("Pretrain.py", 1, ("TERM",)),
    ],
)
def test_a_signal_ends_what_runs_and_nothing_more_starts(demo, sleep_at, processes, signals):
    script, sleeping = start(demo, sleep_at), demo / "sleeping"
    try:
        deadline = time.monotonic() + 60
        while not (sleeping.exists() and len(sleeping.read_text().splitlines()) >= processes):
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.02)
        for name in signals:
            script.send_signal(getattr(signal, f"SIG{name}"))
        assert script.wait(30) == 130
        commands = (demo / "commands").read_text()
        pids = [int(line) for line in sleeping.read_text().split()]
        assert len(pids) == processes and not any(map(runs, pids))
        time.sleep(0.2)
        assert (demo / "commands").read_text() == commands
    finally:
        script.kill()
