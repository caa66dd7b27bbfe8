"""Validation while pre-training: the numbers against brute force, and what it must not change."""

import json
import os
import signal

import pytest
import torch
from test_cli import call, pretrain, refuse
from tiny import TOKENIZER, Notes, gray_images, gray_level, tiny_config, tiny_model
from torch.utils.tensorboard import SummaryWriter

import Retrieval
from dataset import create_dataset
from engine.config import PRETRAIN, load_config
from evaluation.retrieval import SCORE, Validation, thinned
from tools.demo import __main__ as make_demo_data
from utils import Stopped, UserError, load_checkpoint

CPU = torch.device("cpu")
IMAGES = 11


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 demo scenes a split."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    call(make_demo_data, "--output", folder, "--train", 24, "--val", 12, "--test", 12, "--size", 32, "--workers", 1)
    return folder


def split(folder) -> str:
    """The file of a split of `IMAGES` gray images with one to three captions each."""
    names = gray_images(folder, IMAGES)
    words = ["red", "green", "blue"]
    entries = [
        {"image": name, "caption": [f"number {i} in {' '.join(words[: n + 1])}" for n in range(1 + i % 3)]}
        for i, name in enumerate(names)
    ]
    (folder / "val.json").write_text(json.dumps(entries))
    return str(folder / "val.json")


def validation(folder, *overrides) -> Validation:
    cfg = tiny_config(f"data.val=[{split(folder)}]", "data.num_workers=0", "eval.batch_size=4", *overrides)
    return Validation(create_dataset("pretrain_eval", cfg, "val"), TOKENIZER, cfg, CPU, Notes(folder))


def numbers_of(folder) -> dict:
    """A random model's numbers, in as many processes as there are; the time they took left out."""
    found = validation(folder, "eval.text_batch_size=5")(tiny_model().backbone, 3, "bf16")
    return {key: value for key, value in found.items() if key != "seconds"}


# ---------------------------------------------------------------------------------------------------------- the numbers


@torch.no_grad()
def test_the_numbers_equal_counting_with_one_forward_an_item(tmp_path):
    validate, backbone = validation(tmp_path), tiny_model().backbone
    found = validate(backbone, 7, "fp32")
    backbone.eval()
    data = validate.dataset
    images = torch.cat([backbone.encode_image(data[i][0][None])[1] for i in range(IMAGES)])
    texts = torch.cat([backbone.encode_text(*TOKENIZER.encode([text], 25))[1] for text in data.captions])
    similarity, owner = images @ texts.T, torch.tensor(data.image_of_caption)
    hits = {"tr": [], "ir": []}
    for image, row in enumerate(similarity):
        hits["tr"].append((owner[row.argsort(descending=True)] == image).tolist().index(True))
    for text, column in enumerate(similarity.T):
        hits["ir"].append(column.argsort(descending=True).tolist().index(data.image_of_caption[text]))
    for name, ranks in hits.items():
        for k in (1, 5, 10):
            assert found[f"itc_{name}_r{k}"] == pytest.approx(100 * sum(r < k for r in ranks) / len(ranks))
    six = [found[f"itc_{name}_r{k}"] for name in hits for k in (1, 5, 10)]
    assert found[SCORE] == pytest.approx(sum(six) / 6) and 0 < found[SCORE] < 100
    assert (found["images"], found["texts"]) == (IMAGES, len(texts))
    assert found["chance_ir_r1"] == pytest.approx(100 / IMAGES)
    assert validate.run.logged == [(7, "val", found)] and "chance" in validate.run.lines[-1]


def test_at_most_so_many_images_evenly_spread_with_their_captions(tmp_path):
    whole = validation(tmp_path).dataset
    some = thinned(whole, 4)
    assert gray_level(torch.stack([some[i][0] for i in range(4)])).tolist() == [0, 2, 5, 8]
    pairs = zip(whole.captions, whole.image_of_caption, strict=True)
    expected = [text for text, image in pairs if image in (0, 2, 5, 8)]
    assert some.captions == expected and len(some) == 4
    assert some.image_of_caption == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert thinned(whole, IMAGES) is whole and len(whole) == IMAGES
    assert len(validation(tmp_path, "eval.images=4").dataset) == 4


def test_features_that_are_not_finite_are_an_error(tmp_path):
    validate, backbone = validation(tmp_path), tiny_model().backbone
    torch.nn.init.constant_(backbone.text_proj.weight, torch.nan)
    with pytest.raises(UserError, match="21 of 21 text features are NaN or infinite: training has diverged"):
        validate(backbone, 1, "fp32")


# ---------------------------------------------------------------------------------------------------------- in training


def with_validation(data, *overrides) -> list[str]:
    return [f"data.val=[{data / 'retrieval_val.json'}]", "eval.batch_size=5", *overrides]


def val_lines(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "val"]


def same_training(one, other) -> bool:
    ours, theirs = (load_checkpoint(run / "checkpoint_last.pth") for run in (one, other))
    states = zip(ours["rng"], theirs["rng"], strict=True)
    return (
        all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
        and ours["progress"] == theirs["progress"]
        and all(torch.equal(a["torch"], b["torch"]) and a["python"] == b["python"] for a, b in states)
    )


def test_pretraining_is_the_same_with_validation_and_without_and_the_best_epoch_is_kept(data, tmp_path, monkeypatch):
    points = []
    write = SummaryWriter.add_scalar
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *args: (points.append(args[1:]), write(*args))[1])
    pretrain(data, tmp_path / "without")
    pretrain(data, tmp_path / "with", *with_validation(data, "train.best=val", "data.num_workers=1"))
    assert same_training(tmp_path / "without", tmp_path / "with")

    lines = val_lines(tmp_path / "with")
    assert [line["step"] for line in lines] == [4, 8] and lines[0]["images"] == 12
    assert ("val/itc_r_mean", lines[1][SCORE], 8) in points
    assert json.loads((tmp_path / "with/metrics.json").read_text())["val"][SCORE] == lines[1][SCORE]
    best, last = (load_checkpoint(tmp_path / f"with/checkpoint_{name}.pth") for name in ("best", "last"))
    scores = [line[SCORE] for line in lines]
    assert best["best"] == last["best"] == {SCORE: max(scores), "epoch": 1 + scores.index(max(scores))}
    assert best["progress"]["step"] == 4 * best["best"]["epoch"]
    assert not (tmp_path / "without/checkpoint_best.pth").exists() and not val_lines(tmp_path / "without")

    call(  # ITC's columns of Retrieval.py
        Retrieval,
        *("--config", "configs/demo/Retrieval.yaml", "--output_dir", tmp_path / "zeroshot", "--evaluate"),
        *("--checkpoint", tmp_path / "with/checkpoint_last.pth", "--device", "cpu", "--override", "image_size=32"),
        *(f"data.{split}=[{data / f'retrieval_{split}.json'}]" for split in ("val", "test")),
        *("rerank.k=4", "data.num_workers=0", "text.vocab=configs/bert/vocab.txt", "text.max_tokens=25"),
        *("eval.splits=[val]", "train.precision=fp32"),
    )
    numbers = json.loads((tmp_path / "zeroshot/metrics.json").read_text())["val"]
    for key in (key for key in lines[1] if key.startswith(("itc", "chance"))):
        assert lines[1][key] == pytest.approx(numbers[key]), key


def test_a_stop_within_a_validation_repeats_it_and_the_run_is_that_of_no_stop(data, tmp_path, monkeypatch):
    settings = with_validation(data, "train.best=val", "train.epochs=none", "train.steps=6")
    pretrain(data, tmp_path / "straight", *settings)

    validate = Validation.__call__
    for last in (4, 6):  # in the validation after the epoch, and in that after the last step, within the second epoch

        def stopped(self, backbone, step, precision, last=last):
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return validate(self, backbone, step, precision)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Validation, "__call__", stopped)
            pretrain(data, tmp_path / "run", *settings, flags=["--resume"])
    assert [line["step"] for line in val_lines(tmp_path / "run")] == [4]
    pretrain(data, tmp_path / "run", *settings, flags=["--resume"])
    assert same_training(tmp_path / "straight", tmp_path / "run")
    ours, theirs = ([{**line, "seconds": 0} for line in val_lines(tmp_path / run)] for run in ("straight", "run"))
    assert ours == theirs and [line["step"] for line in ours] == [4, 6]
    ours, theirs = (load_checkpoint(tmp_path / run / "checkpoint_last.pth")["best"] for run in ("straight", "run"))
    assert ours == theirs


def test_a_best_epoch_of_other_images_is_none(data, tmp_path, caplog):
    pretrain(data, tmp_path / "run", *with_validation(data, "train.best=val", "train.epochs=1"))
    with caplog.at_level("INFO", "semmim"):
        changes = with_validation(data, "train.best=val", "eval.images=7")
        pretrain(data, tmp_path / "run", *changes, flags=["--resume"])
    assert "data.val or eval.images are new: the best epoch is chosen among those to come" in caplog.messages
    assert load_checkpoint(tmp_path / "run/checkpoint_best.pth")["best"]["epoch"] == 2


def test_the_best_epoch_needs_images_to_choose_it_on(data, tmp_path, capsys):
    message = refuse(capsys, data, tmp_path / "run", "train.best=val")
    assert "train.best: val chooses the best epoch on data.val, which is empty" in message
    message = refuse(capsys, data, tmp_path / "run", "data.val=[nowhere.json]")
    assert "nowhere.json" in message and not (tmp_path / "run").exists()
    for value in ("val.json", "['']", "[3]"):
        with pytest.raises(UserError, match="data.val"):
            load_config(PRETRAIN.schema, [f"data.val={value}"], PRETRAIN)
