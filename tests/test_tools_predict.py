"""tools/predict.py as a user runs it."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import TOKENIZER, tiny_config

from dataset import transforms
from engine.config import CAPTION, RETRIEVAL, load_config
from models.caption import CaptionModel
from models.semmim import build_backbone, load_backbone
from semmim.search import Hit
from tools.predict import __main__ as predict
from tools.predict.files import rows_to
from tools.predict.sheet import short_names, write_sheet
from utils import UserError, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images, and checkpoints of pre-training (pre.pth) and captioning (caption.pth) with random weights."""
    path = tmp_path_factory.mktemp("predict")
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    torch.manual_seed(0)
    model = CaptionModel(build_backbone(tiny_config(), mlm_head=False)[0], TOKENIZER)
    content = {"model": model.state_dict(), "description": model.backbone.description}
    save_checkpoint(path / "pre.pth", {**content, "stage": "pretrain"})
    cfg = load_config("configs/Caption_coco.yaml", ["generation.min_tokens=2", "generation.max_tokens=3"], CAPTION)
    save_checkpoint(path / "caption.pth", {**content, "stage": "caption", "config": cfg.to_dict()})
    return path


def read_image(folder, backbone):
    image = transforms.open_image(folder / "a.png")
    return transforms.test_transform(backbone.image_encoder.image_size)(image)[None]


def lines(capsys, folder, checkpoint, *options):
    images = [str(folder / f"{name}.png") for name in "ab"]
    predict.main(["caption", *images, "--checkpoint", str(folder / checkpoint), *options])
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_every_image_gets_a_line_with_the_checkpoints_own_lengths(folder, capsys):
    found = lines(capsys, folder, "caption.pth")
    assert [path for path, _ in found] == [str(folder / "a.png"), str(folder / "b.png")]
    assert all(len(TOKENIZER.word_pieces([text])[0]) <= 3 for _, text in found)


def test_a_pre_trained_checkpoint_captions_with_the_options_given(folder, capsys):
    options = ["--mode", "sample", "--min_tokens", "1", "--max_tokens", "4", "--objects", "dog&&cat"]
    first = lines(capsys, folder, "pre.pth", *options, "--seed", "1")
    assert first == lines(capsys, folder, "pre.pth", *options, "--seed", "1")
    assert first != lines(capsys, folder, "pre.pth", *options, "--seed", "2")


def test_an_image_that_cannot_be_read_is_named(folder):
    with pytest.raises(UserError, match="absent.png"):
        predict.main(["caption", str(folder / "absent.png"), "--checkpoint", str(folder / "pre.pth")])


@pytest.mark.parametrize("command", ["caption", "vqa", "retrieve"])
def test_pipes_and_postscript_are_no_images(folder, tmp_path, capsys, command):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    options = {"caption": [], "vqa": ["is it red?"], "retrieve": ["--text", "a red bus", "--device", "cpu"]}[command]
    for name, words in (("pipe.png", "not a regular file"), ("script.jpg", "not an image in JPEG, PNG, ")):
        with pytest.raises(UserError) as caught:
            predict.main([command, str(tmp_path / name), *options, "--checkpoint", str(folder / "pre.pth")])
        assert f"{name}: {words}" in capsys.readouterr().err + str(caught.value)


def test_images_are_ranked_for_a_sentence_and_shown_on_a_sheet(folder, capsys, tmp_path):
    broken = tmp_path / "images" / "broken <x>.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no image")
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


def test_sentences_are_ranked_for_an_image_as_the_model_scores_them(folder, capsys, tmp_path):
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
        image = read_image(folder, backbone)
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


def test_the_order_that_was_better_on_val_is_taken_and_k_0_is_the_contrast_alone(folder, capsys, tmp_path):
    texts = ["a red bus", "two dogs", "nothing at all"]

    def ranked(best, *options):
        cfg = load_config("configs/Retrieval_coco.yaml", ["rerank.score=itm+itc"], RETRIEVAL).to_dict()
        content = {**load_checkpoint(folder / "pre.pth"), "stage": "retrieval", "config": cfg, "best": best}
        save_checkpoint(tmp_path / "best.pth", content)
        command = ["retrieve", str(folder / "a.png"), "--device", "cpu", "--checkpoint", str(tmp_path / "best.pth")]
        predict.main([*command, *(f"--text={text}" for text in texts), *options])
        found = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
        return [(row[3], None if row[1] == "-" else float(row[1]), float(row[2])) for row in found]

    backbone, _, _ = load_backbone(folder / "pre.pth")
    backbone.eval()
    scores = {}
    with torch.no_grad():
        image = read_image(folder, backbone)
        embeds, feat = backbone.encode_image(image)
        for text in texts:
            ids, mask = TOKENIZER.encode([text], 30)
            text_embeds, text_feat = backbone.encode_text(ids, mask)
            logits = backbone.itm_logits(
                backbone.fuse(text_embeds, mask, backbone.fusion_encoder.project_memory(embeds))
            )
            wrong, right, cosine = *logits[0].tolist(), float(feat @ text_feat.T)
            odds = right - wrong + cosine / float(backbone.temperature())
            scores[text] = {"itc": cosine, "itm": right, "itm+itc": right + cosine, "itm+itc/t": odds}

    def expect(found, order):
        assert [text for text, _, _ in found] == sorted(texts, key=lambda text: -scores[text][order])
        for text, score, cosine in found:
            assert cosine == pytest.approx(scores[text]["itc"], abs=6e-4)
            assert score == (None if order == "itc" else pytest.approx(scores[text][order], abs=6e-3))

    for order in ("itc", "itm", "itm+itc", "itm+itc/t"):
        expect(ranked({"order": order, "r_mean": 1.0, "epoch": 1}), order)
        expect(ranked({"order": order}, "--k", "0"), "itc")
    expect(ranked({}), "itm+itc")  # an earlier checkpoint: the score of its configuration
    expect(ranked({"order": "itc"}, "--k", "3"), "itm+itc")  # asked for


def test_a_folder_is_ranked_for_each_sentence_even_if_only_one_image_can_be_read(folder, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")  # before and after the good one: numbers must not shift
    (tmp_path / "good.png").write_bytes((folder / "a.png").read_bytes())
    (tmp_path / "worse.png").write_bytes(b"no image")
    predict.main(
        ["retrieve", str(tmp_path), "--text", "a red bus", "--text", "two dogs", "--device", "cpu"]
        + ["--checkpoint", str(folder / "pre.pth")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[2]] == ["a red bus", "two dogs"]
    assert all(line.endswith("good.png") for line in (lines[1], lines[3]))


def test_an_images_scores_do_not_depend_on_the_batch_or_on_unreadable_neighbours(folder, capsys, tmp_path):
    for name, content in (("1", "a"), ("2", None), ("3", "b"), ("4", "a")):
        data = (folder / f"{content}.png").read_bytes() if content else b"no image"
        (tmp_path / f"{name}.png").write_bytes(data)
    found = []
    for batch in (64, 2):
        predict.main(
            ["retrieve", str(tmp_path), "--text", "a red bus", "--device", "cpu", "--batch_size", str(batch)]
            + ["--checkpoint", str(folder / "pre.pth")]
        )
        rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
        found.append({row[3]: (float(row[1]), float(row[2])) for row in rows})
    first, second = found
    assert sorted(first) == sorted(second) == [str(tmp_path / f"{name}.png") for name in "134"]
    assert all(second[path] == pytest.approx(first[path], abs=0.011) for path in first)
    assert first[str(tmp_path / "1.png")] == first[str(tmp_path / "4.png")]


def test_a_file_name_that_is_not_utf8_is_shown_all_the_same(folder, capsys, tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes((folder / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    sheet = tmp_path / "sheet.html"
    predict.main(
        ["retrieve", str(tmp_path), "--text", "x", "--device", "cpu", "--output", str(sheet)]
        + ["--checkpoint", str(folder / "pre.pth")]
    )
    assert "/\\udcff.png" in capsys.readouterr().out and "/\\udcff.png" in sheet.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.png"], "no sentence"),
        (["a.png", "--text", "!?"], "nothing is left"),
        (["absent", "--text", "x"], "absent"),
        (["pre.pth", "--text", "x"], "can be read"),
        (["a.png", "--text", "x", "--k", "-1"], "k: -1"),
        (["a.png", "--text", "x", "--output", "absent/sheet.html"], "--output absent/sheet.html"),
    ],
)
def test_wrong_retrieval_input_is_a_one_line_error(folder, arguments, message):
    name, *options = arguments
    with pytest.raises(UserError, match=message):
        predict.main(["retrieve", str(folder / name), *options, "--checkpoint", str(folder / "pre.pth")])


# ------------------------------------------------------------------------------------------- files, rows, notes


def rows(path):
    """The rows of a file of JSON lines or CSV, numbers as text."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in read]


@pytest.mark.parametrize("extension", [".jsonl", ".csv"])
def test_every_commands_rows_say_what_it_prints(folder, capsys, tmp_path, extension):
    images = tmp_path / "images"
    images.mkdir()
    for name in "ab":
        (images / f"{name}, 1.png").write_bytes((folder / f"{name}.png").read_bytes())
    (images / "broken.png").write_bytes(b"no image")

    def run(*command):
        options = ["--checkpoint", str(folder / "pre.pth"), "--device", "cpu"]
        predict.main([*command, *options])
        printed = capsys.readouterr()
        assert "left out: " in printed.err and "broken.png" in printed.err
        predict.main([*command, *options, "--output", str(tmp_path / f"rows{extension}")])
        capsys.readouterr()
        return [line.split("\t") for line in printed.out.splitlines()], rows(tmp_path / f"rows{extension}")

    printed, found = run("caption", str(images), "--max_tokens", "9")
    assert printed == [[row["image"], row["caption"]] for row in found] and len(found) == 2
    printed, found = run("vqa", str(images), "--question", "what?", "--question", "is it red?")
    assert printed == [[row["image"], row["question"], row["answer"]] for row in found] and len(found) == 4
    printed, found = run("retrieve", str(images), "--text", "a red bus", "--k", "1")
    assert [row["item"] for row in found] == [line[0].split(maxsplit=3)[3] for line in printed[1:]]
    assert found[0]["score"] != "" and found[1]["score"] == ""
    printed, found = run("classify", str(images), "--classes", "dog", "bus", "--top", "2")
    said = [[row["image"], f"{row['class']} {float(row['probability']):.3f}"] for row in found]
    assert said == [[line[0], shown] for line in printed for shown in line[1:]] and len(found) == 4


def test_one_image_and_one_question_print_the_answer_alone_and_a_note(folder, capsys, tmp_path):
    (tmp_path / "answers.txt").write_text("dog\ntwo\n")
    command = ["vqa", str(folder / "a.png"), "is it red?", "--device", "cpu", "--checkpoint", str(folder / "pre.pth")]
    predict.main([*command, "--answers", str(tmp_path / "answers.txt")])
    printed = capsys.readouterr()
    assert printed.out in ("dog\n", "two\n") and "never learned to answer" in printed.err


def test_answers_of_a_folder_are_those_of_single_images(folder, capsys, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("what is it?\nhow many dogs are there?\n")
    options = ["--questions", str(questions), "--device", "cpu", "--checkpoint", str(folder / "pre.pth")]
    predict.main(["vqa", str(folder), *options])
    together = capsys.readouterr().out
    for name in "ab":
        predict.main(["vqa", str(folder / f"{name}.png"), *options])
    assert capsys.readouterr().out == together and len(together.splitlines()) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["caption", "a.png", "--output", "x.txt"], "--output x.txt: the name must end in .jsonl or .csv"),
        (["caption", "a.png", "--batch_size", "0"], "--batch_size: 0"),
        (["caption", "a.png", "--beams", "0"], "beams"),
        (["vqa", "a.png"], "no question"),
        (["vqa", "a.png", "--question", ""], "question"),
        (["classify", "a.png", "--classes", "dog"], "no choice"),
        (["classify", "a.png", "--classes", "dog", "bus", "--template", "a photo"], "{}"),
        (["embed", "a.png"], "--output is missing"),
        (["embed", "--output", "x.npz"], "nothing to embed"),
        (["evaluate", "zero-shot", "a.png"], "not a folder"),
    ],
)
def test_wrong_options_are_a_one_line_error(folder, arguments, message):
    arguments = [str(folder / word) if word == "a.png" else word for word in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        predict.main([*arguments, "--checkpoint", str(folder / "pre.pth"), "--device", "cpu"])


@pytest.mark.parametrize("command", ["retrieve", "embed", "classify"])
def test_a_captioning_checkpoint_refuses_what_its_training_left_behind(folder, tmp_path, command):
    options = {
        "retrieve": ["--text", "x"],
        "embed": ["--output", str(tmp_path / "x.npz")],
        "classify": ["--classes", "dog", "bus"],
    }
    arguments = [command, str(folder), *options[command], "--checkpoint", str(folder / "caption.pth")]
    with pytest.raises(UserError, match="take a checkpoint of Pretrain.py or Retrieval.py"):
        predict.main([*arguments, "--device", "cpu"])


@pytest.mark.parametrize("name", ["pipe.txt", "/dev/zero"])
@pytest.mark.parametrize(
    "option, command",
    [
        ("--questions", ["vqa", "a.png"]),
        ("--answers", ["vqa", "a.png", "what?"]),
        ("--texts", ["retrieve", "a.png"]),
        ("--class_file", ["classify", "a.png"]),
        ("--names", ["evaluate", "zero-shot", "classes"]),
        ("--output", ["caption", "a.png"]),
    ],
)
def test_files_without_an_end_are_refused(folder, tmp_path, option, command, name):
    (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
    for kind in "xy":
        (tmp_path / "classes" / kind).mkdir(parents=True)
        (tmp_path / "classes" / kind / "a.png").symlink_to(folder / "a.png")
    name = {"--output": "pipe.csv"}.get(option, name)
    if not name.startswith("/"):
        os.mkfifo(tmp_path / name)
    words = [str(tmp_path / word) if word in ("a.png", "classes") else word for word in command]
    arguments = [*words, option, str(tmp_path / name), "--checkpoint", str(folder / "pre.pth"), "--device", "cpu"]
    with pytest.raises(UserError, match=f"{option}|{name}"):
        predict.main(arguments)


def test_a_cell_that_would_be_a_formula_is_text(tmp_path):
    for path in (tmp_path / "rows.csv", tmp_path / "rows.jsonl"):
        with rows_to(path, ("image", "score")) as write:
            for name in ("=1+1", "+1", "-1", "@x", "a=1"):
                write({"image": Path(name), "score": -0.5})
    assert [row["image"] for row in rows(tmp_path / "rows.csv")] == ["'=1+1", "'+1", "'-1", "'@x", "a=1"]
    assert [row["image"] for row in rows(tmp_path / "rows.jsonl")] == ["=1+1", "+1", "-1", "@x", "a=1"]
    assert {row["score"] for row in rows(tmp_path / "rows.csv")} == {"-0.5"}


def test_names_of_files_do_not_reach_the_terminal_as_codes(folder, tmp_path, capsys):
    (tmp_path / "a\x1b[31m\nb.png").write_bytes((folder / "a.png").read_bytes())
    (tmp_path / "bad\x1b[31m\n.png").write_bytes(b"no image")
    command = ["retrieve", str(tmp_path), "--text", "x\x1b[2J", "--checkpoint", str(folder / "pre.pth")]
    predict.main([*command, "--device", "cpu"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and "a\\x1b[31m\\nb.png" in printed.out
    assert "bad" in printed.err and len(printed.err.splitlines()) == 1 and "\x1b" not in printed.out + printed.err


def test_arguments_that_are_not_utf8_are_one_line(folder, tmp_path):
    command = [sys.executable, "-m", "tools.predict", "vqa", str(folder / "a.png"), "--device", "cpu"]
    command += ["--checkpoint", str(folder / "pre.pth"), "--output", str(tmp_path / "x.jsonl"), "--question", b"\xff?"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.splitlines()[-1] == r"error: question '\udcff?': is not UTF-8"


# ----------------------------------------------------------------------------------------------------------- sheet

LONG = "a_name_without_a_space_" * 6 + ".png"


def make_sheet(folder: Path) -> Path:
    """Two sentences over three images, one with a name that no line holds."""
    (folder / "shown").mkdir()
    names = [folder / "shown" / name for name in ("a & b.png", LONG, "wide.png")]
    for name, size in zip(names, ((60, 40), (30, 30), (400, 20)), strict=True):
        Image.new("RGB", size, "teal").save(name)
    found = [Hit(1, 5.5, 0.25, 2, 0.5, 1), Hit(0, 5.0, 0.50, 1, -5.0, 2), Hit(2, None, -0.125, 3, None, None)]
    about = {"checkpoint": "output/" + "x" * 90, "stage": "retrieval", "images": 3, "left_out": 1, "asked": 3, "k": 2}
    queries = [("a <red> bus", found), ("x" * 200, found[:2])]
    write_sheet(folder / "sheet.html", queries, names, score="itm+itc/t", why="the default", **about)
    return folder / "sheet.html"


def test_the_sheet_says_what_it_shows_and_both_scores_with_their_places(tmp_path):
    text = make_sheet(tmp_path).read_text()
    head, first, second = re.split(r'<h2 id="q\d">', text)
    words = " ".join(re.sub(r"<[^>]*>", " ", head).split())
    assert "3 images (1 more could not be read); 2 queries, each ranking 3" in words and "the default" in words
    assert "match + contrast / temperature , of the first 2 of 3 by contrast" in words and "log-odds" in words
    assert "a &lt;red&gt; bus" in first and "<red>" not in text
    cards = re.findall(r"<li class=card>.*?</li>", first, re.S)
    assert LONG not in re.sub(r"<[^>]*>", "", cards[0]) and LONG[-20:] in re.sub(r"<[^>]*>", "", cards[0])
    assert f'title="{tmp_path / "shown" / LONG}"' in cards[0] and 'href="shown/a%20%26%20b.png"' in cards[1]
    numbers = [re.sub(r"<[^>]*>", " ", card).split() for card in cards]
    assert numbers[0][2:] == "match 0.50 #1 contrast 0.250 #2 together 5.50".split()
    assert numbers[2][2:] == "match - not re-ranked contrast -0.125 #3".split()
    assert [re.findall(r"width:(\d+)%", card) for card in cards] == [["100", "62"], ["4", "100"], ["4"]]
    assert second.count("<li class=card>") == 2


def test_names_are_shown_without_the_folders_that_all_share(tmp_path):
    assert short_names([tmp_path / "x/a.png", tmp_path / "x/b.png"]) == ["a.png", "b.png"]
    assert short_names([tmp_path / "x/a.png", tmp_path / "y/a.png"]) == ["x/a.png", "y/a.png"]
