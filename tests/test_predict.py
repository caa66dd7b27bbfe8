"""tools/predict.py as a user runs it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOKENIZER, tiny_config

from models.caption import CaptionModel
from models.semmim import build_backbone
from tools import predict
from utils import UserError, load_config, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures, and checkpoints of pre-training (pre.pth) and captioning (caption.pth) with random weights."""
    path = tmp_path_factory.mktemp("predict")
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    torch.manual_seed(0)
    model = CaptionModel(build_backbone(tiny_config(), mlm_head=False)[0], TOKENIZER)
    content = {"model": model.state_dict(), "description": model.backbone.description}
    save_checkpoint(path / "pre.pth", {**content, "stage": "pretrain"})
    cfg = load_config("configs/Caption_coco.yaml", ["generation.min_tokens=2", "generation.max_tokens=3"])
    save_checkpoint(path / "caption.pth", {**content, "stage": "caption", "config": cfg.to_dict()})
    return path


def lines(capsys, folder, checkpoint, *options):
    pictures = [str(folder / f"{name}.png") for name in "ab"]
    predict.main(["caption", *pictures, "--checkpoint", str(folder / checkpoint), *options])
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_every_picture_gets_a_line_with_the_checkpoints_own_lengths(folder, capsys):
    found = lines(capsys, folder, "caption.pth")
    assert [path for path, _ in found] == [str(folder / "a.png"), str(folder / "b.png")]
    assert all(len(TOKENIZER.word_pieces([text])[0]) <= 3 for _, text in found)


def test_a_pre_trained_checkpoint_captions_with_the_options_given(folder, capsys):
    options = ["--mode", "sample", "--min_tokens", "1", "--max_tokens", "4", "--objects", "dog&&cat"]
    first = lines(capsys, folder, "pre.pth", *options, "--seed", "1")
    assert first == lines(capsys, folder, "pre.pth", *options, "--seed", "1")
    assert first != lines(capsys, folder, "pre.pth", *options, "--seed", "2")


def test_a_picture_that_cannot_be_read_is_named(folder):
    with pytest.raises(UserError, match="absent.png"):
        predict.main(["caption", str(folder / "absent.png"), "--checkpoint", str(folder / "pre.pth")])
