import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused

import utils
from engine.distributed import LOST, init_distributed

# ------------------------------------------------------------------------------------- the end of a script


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "a\n.png"), "[Errno 13] Permission denied: 'a\\n.png'; "),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), None),
    ],
)
def test_a_disk_that_refuses_is_one_line_and_any_other_trouble_of_the_system_a_traceback(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit if line else type(error)) as end:
        utils.run_main(main)
    assert line is None or (end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {line}"))


def test_a_folder_is_made_or_the_error_says_why_not(tmp_path):
    assert utils.make_folder(tmp_path / "a/b") == utils.make_folder(tmp_path / "a/b") and (tmp_path / "a/b").is_dir()
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a/b"]
    (tmp_path / "file").touch()
    refused(lambda: utils.make_folder(tmp_path / "file"), "file: no folder to write into (File exists)")
    refused(lambda: utils.make_folder("/proc" / Path("a")), "/proc/a: no folder to write into")


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise utils.UserError("a.png: unreadable")


def test_the_error_of_a_data_worker_is_its_line(capsys):
    with pytest.raises(SystemExit) as end:
        utils.run_main(lambda: list(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert end.value.code == 2 and capsys.readouterr().err == "error: a.png: unreadable\n"


def test_a_name_is_shown_in_one_line_without_control_characters():
    assert utils.one_line("a\x1b[31m\nb.png") == "a\\x1b[31m b.png" and utils.shown("x" * 99) == f"'{'x' * 79} ..."


TOOL = "import utils; utils.run_main(lambda: [print('a line', i) for i in range(20000)])"
TRAINING = """import utils
from engine.distributed import init_distributed
init_distributed("cpu")
def main():
    for _ in range(2000): utils.logger.info("a line of the log")
    raise utils.UserError("trained to the end")
utils.run_main(main)"""


@pytest.mark.parametrize(
    "script, reader, ends",
    [(TOOL, "| head -1", (141, "")), (TRAINING, ">/dev/full", (2, "error: trained to the end\n"))],
)
def test_a_reader_that_goes_ends_a_tool_in_silence_and_no_training(script, reader, ends):
    command = ["bash", "-c", f'"{sys.executable}" -c "$TEXT" {reader}; exit ${{PIPESTATUS[0]}}']
    done = subprocess.run(command, env={**os.environ, "TEXT": script}, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == ends


# -------------------------------------------------------------------------------- precision, devices


def test_auto_precision_on_a_cpu_is_what_its_hardware_has(monkeypatch):
    for has_bf16, choice in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(utils, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert utils.resolve_precision("auto", torch.device("cpu")) == choice


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPU")
def test_asking_for_a_missing_gpu_is_an_error():
    refused(lambda: init_distributed("cuda"), "--device cuda: torch sees no GPU")


@pytest.mark.parametrize("place", [("0", "1", "x"), ("x", "2", "0"), ("2", "2", "0")])
def test_a_place_in_no_group_is_refused_before_anybody_is_waited_for(monkeypatch, place):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), place, strict=True):
        monkeypatch.setenv(name, value)
    refused(lambda: init_distributed("cpu"), "RANK={} WORLD_SIZE={} LOCAL_RANK={}: ".format(*place))


# ---------------------------------------------------------------------------- the run's folder, checkpoints


@pytest.mark.parametrize("content", [{"weights": {}}, [1, 2]])
def test_a_file_without_a_model_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    refused(lambda: utils.load_checkpoint(tmp_path / "c.pth"), "c.pth: not a checkpoint of this project")


def test_any_damage_to_a_checkpoint_is_found_or_leaves_its_content(tmp_path):
    """Flipped bytes anywhere, also in the archive's own lists, and files cut short."""
    path, rng = tmp_path / "c.pth", random.Random(0)
    content = {"model": {"weight": torch.arange(8.0)}, "progress": {"step": 1}}
    utils.save_checkpoint(path, content)
    whole, found = path.read_bytes(), 0
    for trial in range(300):
        damaged = bytearray(whole if trial % 3 else whole[: rng.randrange(len(whole))])
        for _ in range(rng.choice([1, 4]) if damaged else 0):
            first = max(0, len(damaged) - 700) if trial % 2 else 0  # where the list of records begins, or anywhere
            damaged[rng.randrange(first, len(damaged))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            loaded = utils.load_checkpoint(path)
            assert torch.equal(loaded["model"]["weight"], content["model"]["weight"])
            assert loaded["progress"] == content["progress"]
        except utils.UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
    assert 150 < found < 300


# -------------------------------------------------------------------------------------------------- set-up


# An interpreter whose `-m venv` makes another one like it, and whose pip only notes its arguments.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ "$3" = --version ] || echo "$@" >> pip.log ;;
    "--version ") echo "Python 3.12.1" ;;
esac
"""


@pytest.fixture
def setup_venv(tmp_path):
    """A folder with a space and two lists of requirements, and a function that sets it up."""
    folder = tmp_path / "a folder"
    for name in ("requirements.txt", "tests/requirements-no-deps.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("torch\n")
    python = folder / "fake python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    script = f"source '{ROOT}/tools/setup_venv.sh'; setup_venv requirements.txt tests/requirements-no-deps.txt"
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return folder, lambda: subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_set_up_installs_only_what_changed(setup_venv):
    folder, run = setup_venv
    first, second = run(), run()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "making .venv with Python 3.12.1" in first.stdout and second.stdout == ""
    (folder / "requirements.txt").write_text("torch\ntimm\n")
    third = run()
    assert "installing requirements.txt" in third.stdout and "no-deps" not in third.stdout
    calls = [call.split(" -r ") for call in (folder / "pip.log").read_text().splitlines()]
    files = ["requirements.txt", "tests/requirements-no-deps.txt", "requirements.txt"]
    assert [(file, "--no-deps" in options) for options, file in calls] == [(file, "no-deps" in file) for file in files]


def test_set_up_removes_a_broken_environment_only_if_it_made_it(setup_venv):
    folder, run = setup_venv
    kept = folder / ".venv" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("of uv, without pip")
    result = run()
    assert result.returncode == 1 and "error: .venv has no working pip" in result.stderr and kept.exists()
    kept.with_name(".made-by-setup").touch()  # as after a kill in the middle
    assert run().returncode == 0 and not kept.exists()


def test_only_what_a_lost_process_causes_is_called_one():
    assert LOST.search("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms")
    assert LOST.search("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited\nncclRemoteError: A call failed")
    assert not LOST.search("NCCL error in: ProcessGroupNCCL.cpp:1\nncclInvalidUsage: ... Duplicate GPU detected")
