"""The tracker beside TensorBoard and JSON lines: stand-ins of the packages, and those that are installed."""

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import types
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT
from test_cli import pretrain, refuse
from tiny import gray_images

import Caption
import Retrieval
import utils
import VQA
from engine import tracker as tracker_module
from engine.checkpoint import Found
from engine.config import PRETRAIN, Config, load_config
from engine.run import Run
from engine.tracker import FILE, tracker_package

NAMES = ("wandb", "trackio")
LIMIT = "WANDB_FINISH_TIMEOUT"  # seconds that wandb waits for its server at the end
# What a tracker is told at its start, as keywords of its `init`.
ASKED = {
    "wandb": {"project", "name", "config", "resume", "id", "dir"},
    "trackio": {"project", "name", "config", "resume"},
}


class StandIn(types.ModuleType):
    """The part of both packages' interface that is used; `broken` is the function that fails."""

    def __init__(self, name, broken=None):
        super().__init__(name)
        self.name, self.broken = name, broken
        self.started, self.points, self.finished, self.metrics = [], [], [], []
        if name == "wandb":
            self.define_metric = lambda name, step_metric: self.metrics.append((name, step_metric))
            self.finish = lambda exit_code: self._finish(exit_code)
        else:  # whose runs end all alike
            self.finish = lambda: self._finish(None)

    def init(self, **options):
        self._fail("init")
        assert set(options) == ASKED[self.name]
        self.started.append(options)
        return self

    def Image(self, path):  # noqa: N802, the packages' own name
        assert os.path.isfile(path)
        return os.path.basename(path)

    def log(self, values, step=None):
        self._fail("log")
        if self.name == "wandb":  # which refuses a step that is smaller than the last one
            assert step is None
            values, step = {key: value for key, value in values.items() if key != "step"}, values["step"]
        self.points.append((step, values))

    def _finish(self, exit_code):
        self._fail("finish")
        self.finished.append(exit_code)

    def code(self, exit_code):
        """What `finish` was told of a run that ended with `exit_code`."""
        return exit_code if self.name == "wandb" else None

    def _fail(self, what):
        if self.broken == what:
            raise RuntimeError(f"no {what}\nand a traceback")


@pytest.fixture(params=NAMES)
def tracker(request, monkeypatch):
    package = StandIn(request.param)
    monkeypatch.setitem(sys.modules, request.param, package)
    monkeypatch.setenv(LIMIT, "")  # so that it is afterwards as it was
    monkeypatch.delenv(LIMIT)
    return package


def config(tracker) -> Config:
    return utils.as_config({"seed": 3, "train": {"tracker": tracker.name, "lr": 0.1}})


def pairs(folder):
    """`folder` with twelve images and pretrain.json, which `pretrain` trains on in two steps an epoch."""
    folder.mkdir()
    names = gray_images(folder, 12)
    (folder / "pretrain.json").write_text(json.dumps([{"image": n, "caption": f"gray {n}"} for n in names]))
    return folder


def start(folder, tracker, **options) -> Run:
    run = Run(folder, config(tracker))
    run.open(**options)
    return run


def test_a_run_tells_its_tracker_what_tensorboard_is_told(tmp_path, tracker):
    run = start(tmp_path / "output/mine", tracker)
    run.log(5, {"loss": 1.5, "loss/itc": 0.5})
    run.log(5, {"itc_r_mean": 20.0}, "val")
    run.log(0, {"itc_r_mean": 30.0}, "test", final=True)
    run.image(7, "masking", torch.zeros(3, 4, 4))
    run.close()
    assert tracker.points == [
        (5, {"train/loss": 1.5, "train/loss/itc": 0.5}),
        (5, {"val/itc_r_mean": 20.0}),
        (0, {"final/test/itc_r_mean": 30.0}),
        (7, {"masking": "masking_0000007.png"}),
    ]
    started = tracker.started[0]
    known = json.loads((tmp_path / "output/mine" / FILE).read_text())
    assert started["name"] == known["name"] == f"output-mine-{known['id']}" and started["project"] == "semmim"
    assert started["config"]["train"]["lr"] == 0.1 and started["config"]["output_dir"] == str(tmp_path / "output/mine")
    assert type(started["config"]["train"]) is dict and tracker.finished == [tracker.code(0)]
    if tracker.name == "wandb":
        assert started["id"] == known["id"] and started["dir"] == str(tmp_path / "output/mine")
        assert tracker.metrics == [("*", "step")]
        assert 0 < float(os.environ[LIMIT]) < tracker_module.PATIENCE


def test_a_resumed_run_is_the_same_one_and_a_new_run_in_the_folder_another(tmp_path, tracker):
    for step, options in ((1, {}), (2, {"resume_step": 1}), (3, {})):
        run = start(tmp_path, tracker, **options)
        run.log(step, {"loss": 1.0})
        run.close()
    first, resumed, new = (options["name"] for options in tracker.started)
    assert first == resumed != new and all(options["resume"] == "allow" for options in tracker.started)
    assert json.loads((tmp_path / "earlier_1" / FILE).read_text())["name"] == first


def test_a_run_whose_steps_are_counted_anew_is_another_one(tmp_path, tracker):
    start(tmp_path, tracker).close()
    run = Run(tmp_path, config(tracker), Found({}, steps_per_epoch=10))
    run.open(resume_step=4, steps_per_epoch=20)
    run.close()
    first, anew = (options["name"] for options in tracker.started)
    assert first != anew and json.loads((tmp_path / "earlier_1" / FILE).read_text())["name"] == first


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tracker": "other", "id": "a", "name": "b"}', '{"tracker": 3}'])
def test_a_damaged_note_or_one_of_another_tracker_begins_another_run(tmp_path, tracker, text):
    (tmp_path / FILE).write_text(text)
    start(tmp_path, tracker, resume_step=1).close()
    assert json.loads((tmp_path / FILE).read_text())["tracker"] == tracker.name


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path, tracker, caplog, broken):
    tracker.broken = broken
    run = start(tmp_path, tracker)
    for step in (1, 2, 3):
        run.log(step, {"loss": 1.0})
    run.image(3, "masking", torch.zeros(3, 4, 4))
    run.close()
    told = [message for message in caplog.messages if "train.tracker" in message]
    assert told == [f"train.tracker: {tracker.name} failed (no {broken}); the run goes on without it"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert len(tracker.points) == (4 if broken == "finish" else 0)


def test_nothing_is_tracked_by_other_processes_in_evaluation_or_by_default(tmp_path, tracker, monkeypatch):
    start(tmp_path, tracker, evaluate=True).close()
    cfg = config(tracker)
    cfg.train.tracker = "none"
    Run(tmp_path, cfg).open()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "is_main", lambda: False)
        start(tmp_path, tracker)
    assert tracker.started == [] and load_config(PRETRAIN.schema, (), PRETRAIN).train.tracker == "none"


def test_the_random_generators_are_left_alone(tmp_path, tracker, monkeypatch):
    begin = tracker.init
    monkeypatch.setattr(tracker, "init", lambda **options: (torch.rand(3), begin(**options))[1])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    start(tmp_path, tracker).close()
    assert torch.equal(before, torch.get_rng_state()) and tracker.started


def test_a_missing_package_is_one_line_with_the_remedy_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refuse(capsys, tmp_path, tmp_path / "run", "train.tracker=wandb")  # whose data does not exist either
    assert "train.tracker: wandb cannot be imported" in message and message.endswith(": pip install wandb")
    assert not (tmp_path / "run").exists()
    message = refuse(capsys, tmp_path, tmp_path / "run", "train.tracker=mlflow")
    assert "train.tracker: 'mlflow' is none of none, wandb, trackio" in message


def test_a_folder_of_the_packages_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(utils.UserError, match="some_tracker is a folder, no package.*pip install some_tracker"):
        tracker_package("some_tracker")


def test_pretraining_is_tracked(tmp_path, tracker):
    pretrain(pairs(tmp_path / "data"), tmp_path / "run", f"train.tracker={tracker.name}", "train.epochs=1")
    assert [step for step, values in tracker.points if "train/loss" in values] == [1, 2]
    assert [values for _, values in tracker.points if "masking" in values] == [{"masking": "masking_0000002.png"}]
    assert tracker.finished == [tracker.code(0)]


# -------------------------------------------------------------------------------------------- stopped and failed runs


@pytest.mark.parametrize(
    "error, code",
    [(utils.Stopped(), 130), (KeyboardInterrupt(), 130), (utils.UserError("no"), 1), (RuntimeError("no"), 1)],
)
def test_whatever_ends_a_run_closes_it_and_goes_on_as_it_is(tmp_path, tracker, error, code):
    with pytest.raises(type(error)) as raised, Run(tmp_path, config(tracker)) as run:
        run.open()
        run.log(1, {"loss": 1.0})
        raise error
    assert raised.value is error and tracker.finished == [tracker.code(code)]
    assert run._log is None and run._boards == {}  # TensorBoard's events are written, too


def test_a_run_that_was_never_opened_is_nothing_to_close(tmp_path, tracker):
    with pytest.raises(utils.UserError), Run(tmp_path / "run", config(tracker)):
        raise utils.UserError("before anything is touched")
    assert tracker.finished == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("problem", [RuntimeError("no"), KeyboardInterrupt("a second signal")])
def test_a_run_that_cannot_be_closed_ends_as_it_would_have(tmp_path, tracker, monkeypatch, problem):
    def close(*_):
        raise problem

    monkeypatch.setattr(tracker_module.Tracker, "close", close)
    with pytest.raises(utils.Stopped), Run(tmp_path, config(tracker)) as run:
        run.open()
        raise utils.Stopped
    with pytest.raises(type(problem)), Run(tmp_path, config(tracker)) as run:  # a run that is done has no other error
        run.open()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_tracker_that_hangs_at_the_end_is_left_behind(tmp_path, tracker, monkeypatch, caplog, stopped):
    monkeypatch.setattr(tracker_module, "PATIENCE", 0.2)
    server = threading.Event()  # which never answers
    tracker.finish = lambda **_: server.wait(60)
    try:
        with contextlib.suppress(utils.Stopped), Run(tmp_path, config(tracker)) as run:
            run.open()
            if stopped:
                raise utils.Stopped
    finally:
        server.set()
    assert f"train.tracker: {tracker.name} failed (it did not finish within 0.2 seconds)" in caplog.text


def test_a_stopped_pretraining_is_closed_and_ends_with_the_code_of_a_stop(tmp_path, tracker, monkeypatch):
    data = pairs(tmp_path / "data")
    log = Run.log

    def log_and_stop(run, *arguments, **options):
        log(run, *arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log_and_stop)
    with pytest.raises(SystemExit) as end:
        utils.run_main(lambda: pretrain(data, tmp_path / "run", f"train.tracker={tracker.name}"))
    assert end.value.code == utils.EXIT_STOPPED and tracker.finished == [tracker.code(130)]
    assert (tmp_path / "run/checkpoint_last.pth").exists()


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize(
    "script, parts",
    [
        (Retrieval, ("RetrievalModel", "Ranker")),
        (Caption, ("CaptionModel", "Captioner")),
        (VQA, ("VQAModel", "Answerer")),
    ],
)
def test_every_fine_tuning_script_closes_its_run(tmp_path, tracker, monkeypatch, script, parts, evaluate):
    """Stopped within the training, or within the evaluation that follows it or stands alone."""
    run = Run(tmp_path, config(tracker))
    monkeypatch.setattr(script, "start_stage", lambda *_, **__: (MagicMock(), {}, run, None))
    for name in ("checkpoint_tokenizer", *parts):
        monkeypatch.setattr(script, name, MagicMock())
    judge = getattr(script, parts[1]).return_value
    judge.batches = ["test"]
    judge.evaluate.side_effect = judge.evaluate_all.side_effect = utils.Stopped

    def train(*_):
        run.open()
        if not evaluate:
            raise utils.Stopped

    monkeypatch.setattr(script, "train", train)
    with pytest.raises(utils.Stopped):
        script.main(["--checkpoint", "model.pth", "--device", "cpu"])
    assert tracker.finished == [tracker.code(130)]


# --------------------------------------------------------------------------------------------------- the real packages

SESSION = """
import sys
from engine.run import Run
from utils import Stopped, as_config, run_main
folder, name, first, how = sys.argv[1:]
run = Run(folder, as_config({"seed": 3, "train": {"tracker": name}}))
run.open(resume_step=None if first == "1" else 2)
for step in range(int(first), int(first) + 3):
    run.log(step, {"loss": 1.0 / step, "bad": float("nan")})
import torch
run.image(step, "masking", torch.zeros(3, 8, 8))
def stopped():
    with run:
        raise Stopped
if how == "stop":
    run_main(stopped)
if how == "close":
    run.close()
sys.exit(130)  # as after a signal, with or without closing
"""


@pytest.mark.parametrize("name", [name for name in NAMES if importlib.util.find_spec(name)])
def test_the_real_package_offline(tmp_path, name):
    assert ASKED[name] <= set(inspect.signature(importlib.import_module(name).init).parameters)
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    folder = tmp_path / "mine"
    for first, how in (("1", "leave"), ("3", "close"), ("5", "stop")):
        command = [sys.executable, "-c", SESSION, str(folder), name, first, how]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 130 and "failed" not in done.stdout + done.stderr, done.stderr
    known = json.loads((folder / FILE).read_text())
    if name == "wandb":
        files = sorted((folder / "wandb").glob(f"offline-run-*-{known['id']}/run-{known['id']}.wandb"))
        assert len(files) == 3 and all(b"train/loss" in file.read_bytes() for file in files)
    else:
        (path,) = (tmp_path / "trackio").glob("*.db")
        rows = sqlite3.connect(path).execute("select run_name, step, metrics from metrics order by id").fetchall()
        steps = [step for run, step, metrics in rows if run == known["name"] and b"train/loss" in metrics]
        assert steps == [1, 2, 3, 3, 4, 5, 5, 6, 7] and {run for run, _, _ in rows} == {known["name"]}
