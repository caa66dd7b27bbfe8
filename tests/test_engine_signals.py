"""Stops outside of training steps: at once with exit code 130, and --resume goes on to the same end."""

import json
import os
import signal

import pytest
from drill import Drill, Setting, differing, last_step

import utils
from engine.distributed import distributed
from evaluation import caption as caption_evaluation
from evaluation import cider
from models.caption import CaptionModel


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of this process as they were, and no stop left for the tests that follow."""
    before = {number: signal.getsignal(number) for number in utils.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    utils.stop_requests.clear()


def test_a_second_signal_while_a_stopped_script_ends_changes_nothing(monkeypatch):
    monkeypatch.setattr("engine.distributed.leave_group", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(utils.Stopped), distributed("cpu"):
        raise utils.Stopped


def test_a_hangup_under_nohup_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with distributed("cpu"):
        os.kill(os.getpid(), signal.SIGHUP)
        assert utils.stop_requests == []


@pytest.mark.parametrize("error", [None, RuntimeError("closed by peer")])
def test_a_stopped_script_says_so_and_one_whose_peer_stopped_first_is_no_error(error, capsys, caplog):
    @distributed("cpu")
    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as stop:
            raise error or stop from None

    with pytest.raises(SystemExit) as end:
        utils.run_main(main)
    assert end.value.code == 130 and capsys.readouterr().err == ""
    assert error or "stopped outside of training" in caplog.text


def call(demo, out, code, monkeypatch, patched=None, when=lambda: True):
    """Caption.py by SCST in this process; it is sent SIGTERM in the call of `patched` in which `when` is true first."""
    drill = Drill(out.parent, demo)
    with monkeypatch.context() as patch:
        patch.setattr(caption_evaluation.shutil, "which", lambda name: None)  # no Java: seconds less
        if patched:
            owner, name = patched
            original = getattr(owner, name)

            def stopped(*args, **options):
                if when():
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(*args, **options)

            patch.setattr(owner, name, stopped)
        with pytest.raises(SystemExit) as end:
            utils.run_main(lambda: drill.run_here(Setting("scst", epochs=1), out, ["train.log_every=1"]))
    assert end.value.code == code


def test_stops_before_training_and_after_it_lose_nothing(demo, tmp_path, monkeypatch):
    out, straight = tmp_path / "run", tmp_path / "straight"
    call(demo, out, 130, monkeypatch, (cider, "caption_words"))  # while document frequencies are counted
    assert not out.exists()
    call(demo, out, 130, monkeypatch, (CaptionModel, "generate"))  # in the validation before the first step
    assert last_step(out) == 0
    call(demo, out, 130, monkeypatch, (CaptionModel, "generate"), lambda: last_step(out) == 4)  # the final evaluation
    assert not (out / "metrics.json").exists()
    call(demo, out, 0, monkeypatch)
    call(demo, straight, 0, monkeypatch)
    assert differing(straight / "checkpoint_last.pth", out / "checkpoint_last.pth") == []
    assert differing(straight / "checkpoint_best.pth", out / "checkpoint_best.pth") == []
    for name in ("caption_result.json", "caption_result_val.json"):
        assert (out / name).read_text() == (straight / name).read_text()
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (out, straight))
    for split in ("val", "test"):
        del ours[split]["captions_per_second"], theirs[split]["captions_per_second"]
    assert ours == theirs
