import argparse
import logging
import math
import os
import random
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils

SCHEMA = """
seed: 42
name: small
flag: true
data: {train: [a.json], image_root: null, prefixes: {}}
train: {lr: 1e-4, inject_from: 12}
"""


@pytest.fixture
def write(tmp_path):
    """Write files of a temporary folder by name; the schema is there from the start."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    write("schema.yaml", SCHEMA)
    return write


def load(path, overrides=(), **options):
    return utils.load_config(path, overrides, schema=path.parents[0] / "schema.yaml", **options)


# ------------------------------------------------------------------------------------------- configuration


def test_a_file_changes_its_base_and_overrides_change_the_file(write):
    write("base.yaml", "train: {lr: 2e-4}\nname: base\n")
    path = write("run.yaml", "base: base.yaml\nname: run\n")
    cfg = load(path, ["train.lr=3e-5", "data.train=[b.json, c.json]"])
    assert (cfg.seed, cfg.name, cfg.train.lr, cfg.data.train) == (42, "run", 3e-5, ["b.json", "c.json"])
    assert cfg.train.inject_from == 12


def test_a_base_is_relative_to_its_file(write):
    path = write("run.yaml", "base: sub/a.yaml")
    write("sub/a.yaml", "base: b.yaml\nseed: 7")
    write("sub/b.yaml", "seed: 8\nname: b")
    cfg = load(path)
    assert (cfg.seed, cfg.name) == (7, "b")


def test_numbers_without_a_point_are_numbers(write):
    assert load(write("run.yaml", "train: {lr: 1e-5}")).train.lr == 1e-5
    assert load(write("run.yaml", "seed: 7"), ["train.lr=1e-5"]).train.lr == 1e-5


@pytest.mark.parametrize(
    "text, message",
    [
        ("trian: {lr: 1.0}", "run.yaml: unknown key trian; the nearest known key is train"),
        ("train: {lrr: 1.0}", "run.yaml: unknown key train.lrr; the nearest known key is train.lr"),
        ("train: {lr: fast}", "run.yaml: train.lr is text (fast); a number is expected"),
        ("train: {lr: null}", "run.yaml: train.lr is null"),
        ("train: 3", "run.yaml: train is a number (3); a map is expected"),
        ("flag: 1", "run.yaml: flag is a number (1); true/false is expected"),
        ("seed: true", "run.yaml: seed is true/false (True); a number is expected"),
        ("name: [a]", "run.yaml: name is a list"),
        ("data: {train: a.json}", "run.yaml: data.train is text (a.json); a list is expected"),
        ("- a\n- b", "run.yaml: a configuration is a map"),
        ("seed: [", "run.yaml: not a readable YAML file"),
        ("seed: 1\nseed: 2", "run.yaml: not a readable YAML file"),
        ("base: none.yaml", "run.yaml: base none.yaml does not exist"),
        ("base: run.yaml", "run.yaml: base run.yaml leads back to this file"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(write, text, message):
    path = write("run.yaml", text)
    with pytest.raises(utils.UserError) as error:
        load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lrr=1", "--override train.lrr=1: unknown key train.lrr; the nearest known key is train.lr"),
        ("train.lr", "--override train.lr: write it as key.sub=value"),
        ("train..lr=1", "write it as key.sub=value"),
        ("name=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_names_itself(write, override, message):
    with pytest.raises(utils.UserError, match=message.replace("[", r"\[")):
        load(write("run.yaml", ""), [override])


def test_null_and_an_empty_map_accept_anything(write):
    path = write("run.yaml", "data: {image_root: {vqa: /a}, prefixes: {val2014/: val/}}")
    cfg = load(path, ["data.image_root.vg=/b"])
    assert cfg.data.image_root == {"vqa": "/a", "vg": "/b"} and cfg.data.prefixes == {"val2014/": "val/"}
    assert load(path, ["data.image_root=pictures"]).data.image_root == "pictures"


def test_optional_keys_accept_none(write):
    path = write("run.yaml", "train: {inject_from: none}")
    assert load(path, optional=("train.inject_from",)).train.inject_from is None
    with pytest.raises(utils.UserError, match="train.inject_from is text"):
        load(path)


def test_a_saved_config_reads_back_equal_and_plain(write, tmp_path):
    cfg = load(write("run.yaml", "train: {lr: 1e-5}"))
    utils.save_config(cfg, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == cfg
    assert type(cfg.to_dict()["train"]) is dict and cfg.to_dict() == cfg


def test_loading_leaves_the_schema_alone(write):
    path = write("run.yaml", "")
    load(path).data.train.append("b.json")
    assert load(path).data.train == ["a.json"]


def test_find_file_looks_in_the_working_directory_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert utils.find_file("utils.py").samefile(ROOT / "utils.py")
    (tmp_path / "utils.py").touch()
    assert utils.find_file("utils.py").samefile(tmp_path / "utils.py")
    with pytest.raises(utils.UserError, match=r"data.train: none.json does not exist \(looked in .* and "):
        utils.find_file("none.json", "data.train")


def test_overrides_may_be_repeated_and_grouped():
    parser = argparse.ArgumentParser()
    utils.add_arguments(parser, config="a.yaml", output_dir="out")
    args = parser.parse_args(["--override", "a=1", "b=2", "--resume", "--override", "c=3"])
    assert args.override == ["a=1", "b=2", "c=3"] and args.resume and not args.evaluate
    assert (args.config, args.output_dir, args.device, args.seed) == ("a.yaml", "out", "auto", None)


# ------------------------------------------------------------------------------------- the end of a script


def test_a_user_error_ends_with_code_2_and_one_line(capsys):
    def main():
        raise utils.UserError("a.json: entry 3 has no caption")

    with pytest.raises(SystemExit) as end:
        utils.run_main(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: a.json: entry 3 has no caption\n"


def test_an_error_in_a_worker_is_one_line_too(capsys):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise utils.UserError("a.png: unreadable")

    with pytest.raises(SystemExit):
        utils.run_main(lambda: list(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert capsys.readouterr().err == "error: a.png: unreadable\n"


def test_a_stopped_script_ends_with_code_130_and_a_finished_one_with_0():
    def stopped():
        raise utils.Stopped

    for main, code in ((stopped, 130), (lambda: None, 0)):
        with pytest.raises(SystemExit) as end:
            utils.run_main(main)
        assert end.value.code == code


# -------------------------------------------------------------------------------- random state, precision


def test_random_state_restores_every_generator(tmp_path):
    utils.seed_everything(3)
    random.gauss(0, 1), np.random.randn(1)  # both keep the second number of a pair
    utils.save_checkpoint(tmp_path / "c.pth", {"model": {}, "rng": utils.random_state()})
    draw = lambda: (random.gauss(0, 1), np.random.randn(1)[0], torch.rand(1).item())  # noqa: E731
    first = draw()
    utils.set_random_state(utils.load_checkpoint(tmp_path / "c.pth")["rng"])
    assert draw() == first


def test_auto_precision_on_a_cpu_says_what_it_measured(caplog):
    with caplog.at_level(logging.INFO, "semmim"):
        choice = utils.resolve_precision("auto", torch.device("cpu"))
    assert choice in ("bf16", "fp32") and f"precision {choice} (auto" in caplog.text


def test_measuring_the_precision_leaves_the_random_state_alone():
    torch.manual_seed(0)
    utils.resolve_precision("auto", torch.device("cpu"))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_an_unknown_precision_is_an_error():
    with pytest.raises(utils.UserError, match="precision is fp16; it is one of auto, bf16, fp32"):
        utils.resolve_precision("fp16", torch.device("cpu"))


def test_autocast_computes_in_the_precision_it_is_told():
    x = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with utils.autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPU")
def test_asking_for_a_missing_gpu_is_an_error():
    with pytest.raises(utils.UserError, match="--device cuda: torch sees no GPU"):
        utils.init_distributed("cuda")


def test_one_process_needs_no_group():
    x = torch.ones(2, 3, requires_grad=True)
    assert (utils.rank(), utils.world_size(), utils.is_main()) == (0, 1, True)
    assert utils.all_gather_with_grad(x) is x and utils.gather_objects(1) == [1]
    assert not utils.all_reduce_sum(x).requires_grad and not utils.all_gather(x).requires_grad
    utils.barrier()


# ---------------------------------------------------------------------------- the run's folder, checkpoints


def test_a_new_run_keeps_the_earlier_log_beside_and_a_resumed_one_goes_on(tmp_path):
    for step, append in ((1, False), (2, True), (3, False)):
        run = utils.Run(tmp_path, utils.Config(seed=step), append=append)
        run.log(step, {"loss": 1.0})
        run.close()
    assert [line.split(",")[0] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ['{"step": 3']
    assert len((tmp_path / "log_previous.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "tensorboard_previous").iterdir())) == 2
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"


def test_values_that_are_not_finite_are_logged_as_null(tmp_path):
    run = utils.Run(tmp_path)
    run.log(1, {"loss": math.nan, "itc": torch.tensor(2.0)})
    run.image(1, "picture", torch.zeros(3, 4, 4))
    run.close()
    assert '"loss": null, "itc": 2.0' in (tmp_path / "log.jsonl").read_text()


def test_metrics_are_written_whole(tmp_path):
    run = utils.Run(tmp_path)
    run.write_metrics({"test": {"tr_r1": 50.0}})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "test": {\n    "tr_r1": 50.0\n  }\n}\n'
    assert not list(tmp_path.glob("*tmp*"))


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match="--output_dir .*file"):
        utils.Run(tmp_path / "file")


def test_a_checkpoint_that_fails_to_write_leaves_the_old_one(tmp_path):
    path = tmp_path / "c.pth"
    utils.save_checkpoint(path, {"model": 1})
    with pytest.raises(AttributeError):
        utils.save_checkpoint(path, {"model": lambda: None})  # cannot be pickled
    assert utils.load_checkpoint(path) == {"model": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "checkpoint: .* does not exist"),
        (b"", "not a readable checkpoint"),
        (b"no checkpoint at all", "not a readable checkpoint"),
        ("truncated", "not a readable checkpoint"),
        ({"weights": {}}, "not a checkpoint of this project .*model"),
        ([1, 2], "not a checkpoint of this project"),
        ({"model": subprocess.Popen}, "not a readable checkpoint"),
    ],
)
def test_a_wrong_checkpoint_is_a_one_line_error(tmp_path, content, message):
    path = tmp_path / "c.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        torch.save({"model": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:300])
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(utils.UserError, match=message) as error:
        utils.load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_weights_of_another_shape_are_an_error_that_names_them(tmp_path):
    with pytest.raises(utils.UserError, match="c.pth: the checkpoint is of another model.*weight") as error:
        utils.load_state(torch.nn.Linear(2, 3), torch.nn.Linear(2, 4).state_dict(), "c.pth")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- set-up


# An interpreter whose `-m venv` makes another one like it, and whose pip only notes its arguments.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ "$3" = --version ] || echo "$@" >> pip.log ;;
    "--version ") echo "Python VERSION" ;;
    *) [ VERSION != 3.9.1 ] ;;
esac
"""


def setup_venv(folder, version="3.12.1"):
    folder.mkdir(exist_ok=True)
    python = folder / "fake python3"
    python.write_text(FAKE_PYTHON.replace("VERSION", version))
    python.chmod(0o755)
    script = f"source '{ROOT}/tools/setup_venv.sh'; setup_venv requirements.txt tests/requirements-no-deps.txt"
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_set_up_works_in_a_folder_with_spaces_and_installs_only_what_changed(tmp_path):
    folder = tmp_path / "a folder"
    (folder / "tests").mkdir(parents=True)
    files = folder / "requirements.txt", folder / "tests" / "requirements-no-deps.txt"
    for file in files:
        file.write_text("torch\n")
    first, second = setup_venv(folder), setup_venv(folder)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "making .venv with Python 3.12.1" in first.stdout and second.stdout == ""
    files[0].write_text("torch\ntimm\n")
    third = setup_venv(folder)
    assert "installing requirements.txt" in third.stdout and "no-deps" not in third.stdout
    calls = (folder / "pip.log").read_text().splitlines()
    assert [call.split(" -r ")[1] for call in calls] == [
        *("requirements.txt", "tests/requirements-no-deps.txt", "requirements.txt"),
    ]
    assert ["--no-deps" in call for call in calls] == [False, True, False]


def test_set_up_names_an_interpreter_that_is_too_old(tmp_path):
    result = setup_venv(tmp_path, version="3.9.1")
    assert result.returncode == 1 and "error: Python 3.9.1 is too old: Python 3.10 or newer" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_checkpoint_of_another_stage_gives_its_vocabulary_alone():
    own = utils.load_config("configs/demo/Pretrain.yaml", schema="configs/Pretrain.yaml").to_dict()
    assert utils.checkpoint_config({"stage": "pretrain", "config": own}, "pretrain", "nowhere.yaml") == own
    paper = utils.load_config("configs/VQA.yaml")
    found = utils.checkpoint_config({"stage": "pretrain", "config": own}, "vqa", "configs/VQA.yaml")
    assert found.text.vocab == "configs/demo/vocab.txt" != paper.text.vocab
    assert {**found, "text": paper.text} == paper
    assert utils.checkpoint_config({"stage": "pretrain"}, "vqa", "configs/VQA.yaml") == paper  # ALBEF's, converted
