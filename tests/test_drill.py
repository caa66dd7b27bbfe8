"""The short form of drill.py: real runs are killed, stopped and restarted; `python tests/drill.py` is the long one."""

import os
import signal
import socket
import subprocess

import pytest
from drill import ENVIRONMENT, ROOT, Drill, Setting, descendants, differing, last_step, logged_step, wait_for


@pytest.fixture(scope="module")
def drill(tmp_path_factory):
    return Drill(tmp_path_factory.mktemp("drill"), scenes=24)


def test_killed_and_restarted_runs_end_bit_identical(drill):
    result = drill.kill(Setting(ranks=2, workers=1, epochs=6, checkpoint_every=3), kills=2)
    assert result["kills"] >= 1 and result["different"] == [] and result["leftovers"] == []


@pytest.mark.parametrize(
    "name, ranks, workers", [("SIGTERM", 1, 2), ("SIGHUP", 1, 0), ("SIGUSR1", 2, 0), ("SIGUSR2", 1, 0)]
)
def test_a_stop_signal_leaves_a_checkpoint_of_the_next_step(drill, name, ranks, workers):
    setting = Setting(ranks=ranks, workers=workers, epochs=100)
    result = drill.stop(setting, getattr(signal, name))
    assert result["saved"] in (result["step"], result["step"] + 1)
    assert result["code"] == (130 if ranks == 1 else -getattr(signal, name))  # torchrun itself dies of SIGUSR1
    assert "continue with --resume" in open(result["out"] + ".txt").read()


def test_a_stop_within_a_validation_is_a_stop_and_the_validation_is_repeated(drill):
    setting = Setting("retrieval", epochs=2)
    out = drill.folder / "stopped_in_validation"
    # one image and one text at a time, so that the validation lasts
    slow = ["eval.batch_size=1", "eval.text_batch_size=1", "rerank.batch_size=1", "train.log_every=1"]
    process = drill.start(setting, out, slow)
    wait_for(process, lambda: logged_step(out) >= 4, seconds=120)  # the last step of the first epoch
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130 and last_step(out) == 4
    assert drill.start(setting, out, slow).wait(timeout=120) == 0
    straight = drill.folder / "validation_undisturbed"
    assert drill.start(setting, straight, slow).wait(timeout=120) == 0
    assert differing(straight / "checkpoint_last.pth", out / "checkpoint_last.pth") == []


@pytest.mark.parametrize(
    "stage, kind, ranks, workers",
    [
        ("retrieval", "evaluation image", 1, 4),
        ("vqa", "evaluation image", 2, 1),
        ("pretrain", "training image", 2, 4),
        ("caption", "loss", 1, 1),
        ("pretrain", "disk", 2, 0),
    ],
)
def test_an_error_ends_all_processes_within_seconds(drill, stage, kind, ranks, workers):
    result = drill.fail(Setting(stage, ranks, workers), kind)
    assert result["codes"] == [2] * ranks and result["alive"] == 0 and result["seconds"] < 30, result


@pytest.mark.parametrize("stage", ["pretrain", "retrieval"])
def test_a_data_folder_as_output_dir_is_refused_and_left_as_it_is(drill, stage):
    (drill.data / "notes.tmp7").write_text("mine")
    before = {path: path.read_bytes() for path in drill.data.rglob("*") if path.is_file()}
    for change in ([], ["--resume"], ["--evaluate"]) if stage == "retrieval" else ([], ["--resume"]):
        command = [word for word in drill.command(Setting(stage), drill.data) if word != "--resume"]
        done = subprocess.run([*command, *change], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 2 and "no run wrote it, so none touches it" in done.stderr.splitlines()[-1]
        assert {path: path.read_bytes() for path in drill.data.rglob("*") if path.is_file()} == before


def test_a_lost_process_is_one_line_of_the_others(drill, tmp_path):
    out = tmp_path / "lost"
    command = drill.command(Setting(epochs=100), out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []  # without torchrun, which would end the other one itself
    for rank in ("0", "1"):
        environment = {**ENVIRONMENT, **address, "RANK": rank, "LOCAL_RANK": rank}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, **streams))
    wait_for(ranks[0], lambda: logged_step(out) >= 3, seconds=240)
    ranks[1].kill()
    _, errors = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 2 and "another process is gone" in errors.splitlines()[-1]
    ranks[1].communicate()


def test_a_restart_by_torchrun_goes_on_from_the_last_checkpoint(drill):
    setting = Setting(ranks=2, epochs=6, checkpoint_every=2)
    expected = drill.undisturbed(setting)
    out = drill.folder / "restarted"
    command = drill.command(setting, out)
    command.insert(command.index("--standalone"), "--max_restarts=3")
    with open(f"{out}.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=os.path.dirname(os.path.dirname(__file__)), stdout=log, stderr=log, start_new_session=True
        )
    wait_for(process, lambda: last_step(out) >= 2, seconds=120)
    ranks = [pid for pid in descendants(process.pid) if b"Pretrain.py" in open(f"/proc/{pid}/cmdline", "rb").read()]
    os.kill(ranks[0], signal.SIGKILL)
    assert process.wait(timeout=180) == 0
    assert differing(expected, out / "checkpoint_last.pth") == []
