"""Pretrain.py as a user runs it: on demo scenes, with a resume, with every MIM switch, and with wrong input."""

import functools
import json

import pytest
import torch
from conftest import contents, refused
from stages import log_lines, read, run
from tiny import save_codebook

from utils import load_checkpoint

pretrain = functools.partial(run, "pretrain")


def test_pretraining_writes_what_a_run_promises_and_retrieval_evaluates_it(demo, tmp_path):
    pretrain(demo, tmp_path / "run", "train.images=true")
    assert {"checkpoint_last.pth", "config.yaml", "log.jsonl", "metrics.json", "tensorboard", "images"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss/cls", "loss/patch", "loss/itc", "loss/itm", "loss/mlm", "loss/plm"} <= set(lines[0])
    flags = ["--evaluate", "--checkpoint", tmp_path / "run/checkpoint_last.pth"]
    numbers = read(run("retrieval", demo, tmp_path / "zeroshot", flags=flags) / "metrics.json")
    of_training = read(tmp_path / "run/metrics.json")
    for metrics, batch_size in ((numbers, 4), (of_training, 64)):
        about = metrics["run"]
        assert (about["precision"], about["device"], about["batch_size"]) == ("fp32", "cpu", batch_size)
        assert about["version"] and about["model"]["embed_dim"] == 16
    assert numbers["test"]["images"] == 7 and 0 <= numbers["test"]["itm_tr_r1"] <= 100


def test_the_dvaes_codes_are_a_target_from_the_command_line(demo, tmp_path):
    codebook = f"mim.codebook={save_codebook(tmp_path / 'codebook')}"
    pretrain(demo, tmp_path / "run", "mim.target=dvae", "train.epochs=1", codebook)
    assert (tmp_path / "run/checkpoint_last.pth").exists()


def test_a_new_run_starts_from_the_weights_of_a_checkpoint(demo, tmp_path):
    pretrain(demo, tmp_path / "first", "train.epochs=1")
    still = ("train.epochs=1", "train.lr=0.0", "train.lr_vit=0.0", "train.min_lr=0.0")
    flags = ["--checkpoint", tmp_path / "first/checkpoint_last.pth"]
    pretrain(demo, tmp_path / "second", *still, flags=flags)
    first, second = (load_checkpoint(tmp_path / name / "checkpoint_last.pth")["model"] for name in ("first", "second"))
    trained = [name for name in first if name.startswith("backbone.")]
    assert all(torch.allclose(first[name], second[name]) for name in trained)
    # and continued, without naming that checkpoint again, the image encoder still learns at its own rate
    pretrain(demo, tmp_path / "second", "train.epochs=2", "train.lr=1e-4", "train.lr_vit=1e-5", flags=["--resume"])
    groups = load_checkpoint(tmp_path / "second/checkpoint_last.pth")["optimizer"]["param_groups"]
    assert {(group["name"], group["peak_lr"]) for group in groups} == {("vit", 1e-5), ("rest", 1e-4)}


def test_one_image_in_all_entries_is_refused(demo, tmp_path):
    file = tmp_path / "pairs.json"
    image = str(next((demo / "data/images/train").glob("*.png")))
    file.write_text(json.dumps([{"image": image, "caption": f"number {i}"} for i in range(12)]))
    refused(lambda: pretrain(demo, tmp_path / "run", f"data.train=[{file}]"), "name one image")


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pretrain(demo, folder, "train.epochs=1")
    return folder


@pytest.mark.parametrize(
    "overrides, flags",
    [
        (["data.train=[absent.json]"], []),
        (["mim.maskratio=0.3"], []),
        (["model.image_encoder.image_size=36"], []),
        (["train.batch_size=30"], []),  # the data has 24 entries
        (["model.image_encoder.weights=absent.pth"], []),
        ([], ["--checkpoint", "absent.pth"]),
        (["mim.mask_ratio=0.6"], ["--resume"]),
        ([], []),  # a second training in the folder
    ],
)
def test_a_start_that_fails_touches_nothing_of_an_earlier_run(demo, trained, overrides, flags):
    before = contents(trained, "run.lock")
    refused(lambda: pretrain(demo, trained, *overrides, flags=flags))
    assert contents(trained, "run.lock") == before


def test_a_resumed_run_warns_that_a_rate_rises(demo, trained, tmp_path, caplog):
    train = functools.partial(pretrain, demo, tmp_path / "run", "train.lr_vit=1e-5")
    train("train.epochs=1", flags=["--checkpoint", trained / "checkpoint_last.pth"])
    with caplog.at_level("INFO", "semmim"):
        train("train.epochs=1", flags=["--resume"])
        assert "raise the learning rate" not in caplog.text
        train("train.epochs=2", flags=["--resume"])  # the cosine at (3 - 2) / (4 - 2) and (4 - 2) / (8 - 2) of its way
    assert caplog.text.count("raise the learning rate 1.49 times") == 1


def test_other_entries_or_another_order_of_them_are_refused_on_resume(demo, tmp_path):
    entries = read(demo / "data/pretrain.json")
    for entry in entries:
        entry["image"] = str(demo / "data" / entry["image"])
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(entries))
    own = f"data.train=[{file}]"
    pretrain(demo, tmp_path / "run", own, "train.epochs=1")
    file.write_text(json.dumps(entries[::-1]))
    resume = functools.partial(pretrain, demo, tmp_path / "run", own, flags=["--resume"])
    refused(resume, "--resume: data.train has other entries, or another order of them")
    file.write_text(json.dumps(entries, indent=1))  # the same entries, in other words
    resume()
