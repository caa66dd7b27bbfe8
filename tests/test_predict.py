"""tools/predict.py as a user runs it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOKENIZER, tiny_config

from models.caption import CaptionModel
from models.semmim import build_backbone, load_backbone
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


def test_pictures_are_ranked_for_a_sentence_and_shown_on_a_sheet(folder, capsys, tmp_path):
    broken = tmp_path / "pictures" / "broken <x>.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    for name in "ab":
        (broken.parent / f"{name} & co.png").write_bytes((folder / f"{name}.png").read_bytes())
    sheet = tmp_path / "sheet.html"
    predict.main(
        ["retrieve", str(broken.parent), "--text", "a <red> bus", "--text", "two dogs", "--k", "1"]
        + ["--checkpoint", str(folder / "pre.pth"), "--output", str(sheet), "--device", "cpu"]
    )
    printed = capsys.readouterr()
    assert "broken <x>.png" in printed.err
    lines = printed.out.splitlines()
    assert lines[0] == "a <red> bus" and lines[3] == "two dogs"
    places = [line.split(maxsplit=3) for line in (*lines[1:3], *lines[4:6])]
    assert [row[0] for row in places] == ["1", "2", "1", "2"] and [row[1] == "-" for row in places] == [False, True] * 2
    assert {row[3] for row in places[:2]} == {str(broken.parent / f"{name} & co.png") for name in "ab"}
    page = sheet.read_text()
    assert "a &lt;red&gt; bus" in page and "a &amp; co.png" in page and page.count("data:image/jpeg") == 4


def test_sentences_are_ranked_for_a_picture_as_the_model_scores_them(folder, capsys, tmp_path):
    texts = ["a red bus", "two dogs", "nothing at all"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n")
    predict.main(
        ["retrieve", str(folder / "a.png"), "--texts", str(tmp_path / "texts.txt"), "--device", "cpu"]
        + ["--checkpoint", str(folder / "pre.pth")]
    )
    found = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    backbone, _, _ = load_backbone(folder / "pre.pth")
    backbone.eval()
    with torch.no_grad():
        image = predict.read_picture(str(folder / "a.png"), backbone.image_encoder.image_size)
        embeds, feat = backbone.encode_image(image)
        expected = {}
        for text in texts:
            ids, mask = TOKENIZER.encode([text], 30)
            text_embeds, text_feat = backbone.encode_text(ids, mask)
            fused = backbone.fuse(text_embeds, mask, backbone.fusion_encoder.project_memory(embeds))
            expected[text] = (float(backbone.itm_logits(fused)[0, 1]), float(feat @ text_feat.T))
    assert [row[3] for row in found] == sorted(texts, key=lambda text: -expected[text][0])
    for _, itm, itc, text in found:
        assert (float(itm), float(itc)) == pytest.approx(expected[text], abs=6e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.png"], "no sentence"),
        (["a.png", "--text", "!?"], "nothing is left"),
        (["absent", "--text", "x"], "absent"),
        (["pre.pth", "--text", "x"], "can be read"),
        (["a.png", "--text", "x", "--k", "0"], "--k"),
    ],
)
def test_wrong_retrieval_input_is_a_one_line_error(folder, arguments, message):
    name, *options = arguments
    with pytest.raises(UserError, match=message):
        predict.main(["retrieve", str(folder / name), *options, "--checkpoint", str(folder / "pre.pth")])
