"""tools/predict as a user runs it: rows that are the Python interface's results, bad input, the search sheet."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from tiny import TOKENIZER, noise, tiny_config

from engine.config import CAPTION, RETRIEVAL, load_config
from models.caption import CaptionModel
from models.semmim import build_backbone
from semmim import SemMIM
from tools.predict import __main__ as predict
from tools.predict.files import write_rows
from utils import load_checkpoint, save_checkpoint, write_json

TEXTS = ["a red bus", "two dogs", "nothing at all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images, and checkpoints of pre-training (pre.pth) and captioning (caption.pth) with random weights."""
    path = tmp_path_factory.mktemp("predict")
    (path / "images").mkdir()
    for name in "ab":
        noise(30, 40, ord(name)).save(path / "images" / f"{name}.png")
    torch.manual_seed(0)
    model = CaptionModel(build_backbone(tiny_config(), mlm_head=False)[0], TOKENIZER)
    content = {"model": model.state_dict(), "description": model.backbone.description}
    save_checkpoint(path / "pre.pth", {**content, "stage": "pretrain"})
    cfg = load_config("configs/Caption_coco.yaml", ["generation.min_tokens=2", "generation.max_tokens=3"], CAPTION)
    save_checkpoint(path / "caption.pth", {**content, "stage": "caption", "config": cfg.to_dict()})
    return path


@pytest.fixture
def run(folder, capsys):
    """Run a command with a checkpoint; -> (printed rows, the model)."""

    def call(*words, checkpoint="pre.pth"):
        path = folder / checkpoint
        predict.main([*map(str, words), "--checkpoint", str(path), "--device", "cpu", "--precision", "fp32"])
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()], SemMIM.from_pretrained(path)

    return call


def rows(path):
    """The rows of a file of JSON lines or CSV, as text."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in read]


# ----------------------------------------------------------------------------------------------------------- results


def test_sampled_captions_depend_on_the_seed(folder, run):
    options = ["--mode", "sample", "--min_tokens", "1", "--max_tokens", "4", "--objects", "dog&&cat"]
    one, again, other = (run("caption", folder / "images", *options, "--seed", seed)[0] for seed in (1, 1, 2))
    assert one == again != other


def test_every_question_is_answered_about_every_image(folder, run, tmp_path):
    (tmp_path / "questions.txt").write_text("what is it?\n\nhow many dogs are there?\n")
    questions = ["what is it?", "how many dogs are there?"]
    found, model = run("vqa", folder / "images", "--questions", tmp_path / "questions.txt")
    paths = [str(folder / "images" / f"{name}.png") for name in "ab"]
    assert found == [[p, q, model.answer(p, q)[0]] for p in paths for q in questions]
    options = [word for question in questions for word in ("--question", question)]
    assert run("vqa", folder / "images", *options)[0] == found
    (tmp_path / "answers.txt").write_text("dog\ntwo\n")
    chosen, _ = run("vqa", folder / "images", *options, "--answers", tmp_path / "answers.txt")
    assert {answer for _, _, answer in chosen} <= {"dog", "two"}


def test_the_order_that_was_better_on_val_is_taken(folder, run, tmp_path):
    """Without one the score of the configuration; --k 0 is the cosine alone."""
    config = load_config("configs/Retrieval_coco.yaml", ["rerank.score=itm+itc"], RETRIEVAL).to_dict()
    content = {**load_checkpoint(folder / "pre.pth"), "stage": "retrieval", "config": config}
    for order, used in ((None, ("itm+itc", 64)), ("itc", ("itm+itc", 0)), ("itm", ("itm", 64))):
        save_checkpoint(tmp_path / "best.pth", {**content, "best": {"order": order} if order else {}})
        arguments = ["retrieve", folder / "images" / "a.png", *(f"--text={text}" for text in TEXTS)]
        found, model = run(*arguments, checkpoint=tmp_path / "best.pth")
        assert model.order() == used and [row[3] == "-" for row in found] == [used[1] == 0] * 3
    assert run(*arguments, "--k", "0", checkpoint=tmp_path / "best.pth")[0][0][3] == "-"


def test_a_folder_is_ranked_for_each_sentence_whatever_can_be_read_in_it(folder, run, tmp_path):
    for name, content in (("1", "a"), ("2", None), ("3", "b"), ("4", "a")):  # numbers must not shift
        data = (folder / "images" / f"{content}.png").read_bytes() if content else b"no image"
        (tmp_path / f"{name}.png").write_bytes(data)
    printed, _ = run("retrieve", tmp_path, "--text", "a red bus", "--text", "x", "--batch_size", "2")
    found = {(query, item): float(score) for query, _, item, score, _ in printed}
    assert {item for _, item in found} == {str(tmp_path / f"{name}.png") for name in "134"} and len(found) == 6
    assert found["x", str(tmp_path / "1.png")] == pytest.approx(found["x", str(tmp_path / "4.png")], abs=1e-4)


def test_zero_shot_accuracy_is_that_of_the_classes_that_are_most_probable(folder, run, tmp_path):
    classes = tmp_path / "classes"
    for name in ("red_ring", "blue_ring"):
        shutil.copytree(folder / "images", classes / name)
    (classes / "empty").mkdir()
    printed, _ = run("evaluate", "zero-shot", classes)
    best = {row[0]: row[2] for row in run("classify", classes, "--classes", "blue ring", "red ring")[0]}
    right = [Path(image).parent.name.replace("_", " ") == name for image, name in best.items()]
    assert printed[:3] == [["images", "4"], ["classes", "2"], ["top1", f"{100 * np.mean(right):.2f}"]]
    assert [line[0] for line in printed[3:]] == ["mean_per_class", "chance", "blue ring", "red ring"]
    write_json(tmp_path / "names.json", {"red_ring": "red ring", "blue_ring": "blue ring"})
    assert run("evaluate", "zero-shot", classes, "--names", tmp_path / "names.json")[0] == printed
    write_json(tmp_path / "names.json", {"red_ring": "x"})
    refused(lambda: run("evaluate", "zero-shot", classes, "--names", tmp_path / "names.json"), "blue_ring")


def test_what_numbers_the_folders_is_no_part_of_the_names_of_classes_and_never_all_of_it():
    for names in (["n01440764", "n01443537", "n02102040"], ["0", "1", "10"], ["class_1", "class_2", "dog"]):
        refused(lambda names=names: predict.class_names(names, None), "differ in their numbers alone", "--names FILE")
    for names in (["boeing 737-200", "A310", "DC-10"], ["7 up", "737 boeing", "dog"], ["3d printer", "4x4 car"]):
        assert predict.class_names(names, None) == names
    birds, dogs = ["001.Black_footed_Albatross", "002.Laysan_Albatross"], ["n02085620-Chihuahua", "n02085782-pug"]
    assert predict.class_names(birds, None) == ["Black footed Albatross", "Laysan Albatross"]
    assert predict.class_names(dogs, None) == ["Chihuahua", "pug"]


def test_classes_with_parts_that_the_vocabulary_lacks_are_named(folder, capsys):
    options = ["--classes", "dog", "🐕", "--checkpoint", str(folder / "pre.pth")]
    predict.main(["classify", str(folder / "images"), *options])
    assert "note: 1 of 2 names have parts that the vocabulary lacks, such as 🐕" in capsys.readouterr().err


def test_accuracies_are_scikits_also_of_many_classes_and_equal_probabilities_are_no_gift():
    probabilities = torch.rand(200, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels = torch.randint(0, 8, (200,), generator=torch.Generator().manual_seed(1))  # none of the last class
    found, own = predict.accuracies(probabilities, labels)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, probabilities, k=k, labels=range(9))
        assert found[f"top{k}"] == pytest.approx(100 * expected)
    expected = balanced_accuracy_score(labels, probabilities.argmax(1).clamp(max=8))
    assert found["mean_per_class"] == pytest.approx(100 * expected) and np.isnan(own[8])
    assert predict.accuracies(torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.int64))[0]["top1"] == 0


def test_embed_writes_the_models_features(folder, run, tmp_path):
    (tmp_path / "texts.txt").write_text("a ring\n\nA square!\n")
    texts = ["--text", "ä triangle", "--texts", tmp_path / "texts.txt"]
    _, model = run("embed", folder / "images", *texts, "--output", tmp_path / "features.npz")
    arrays = np.load(tmp_path / "features.npz", allow_pickle=False)
    images, texts = arrays["images"].tolist(), arrays["texts"].tolist()
    assert texts == ["ä triangle", "a ring", "A square!"] and len(images) == 2
    np.testing.assert_allclose(arrays["image_features"], model.encode_image(images).numpy(), atol=1e-6)
    np.testing.assert_allclose(arrays["text_features"], model.encode_text(texts).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "command",
    [
        ["caption", "--max_tokens", "9"],
        ["vqa", "--question", "what?", "--question", "is it red?"],
        ["retrieve", "--text", "a red bus", "--k", "1"],
        ["classify", "--classes", "dog", "bus", "--top", "2"],
    ],
)
def test_every_commands_rows_are_what_it_prints(folder, run, tmp_path, command):
    name, *options = command
    printed, _ = run(name, folder / "images", *options)
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.csv"):
        assert run(name, folder / "images", *options, "--output", path)[0] == []
        assert [[value or "-" for value in row.values()] for row in rows(path)] == printed
    if name == "classify":
        model = SemMIM.from_pretrained(folder / "pre.pth")
        expected = model.classify(folder / "images" / "a.png", ["dog", "bus"])[0].max().item()
        assert float(printed[0][3]) == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["caption", "a.png", "--output", "x.txt"], "--output x.txt: the name must end in .jsonl or .csv"),
        (["caption", "absent.png"], "absent.png"),
        (["vqa", "a.png"], "no question"),
        (["retrieve", "a.png", "--text", "x", "--top", "-1"], "--top is -1; a whole number of at least 1"),
        (["retrieve", "a.png"], "no sentence"),
        (["retrieve", "pre.pth", "--text", "x"], "none of the 1 images can be read"),
        (["embed", "--output", "x.npz"], "nothing to embed"),
        (["evaluate", "zero-shot", "a.png"], "holds no folder of images for each"),
    ],
)
def test_wrong_options_are_one_line(folder, run, arguments, message):
    places = {"a.png": folder / "images" / "a.png", "pre.pth": folder / "pre.pth"}
    refused(lambda: run(*(places.get(word, word) for word in arguments)), message)


def test_a_cell_that_would_be_a_formula_is_text_and_a_name_that_is_no_utf8_ends_nothing(tmp_path):
    names = ["=1+1", "+1", "@x", "a=1", "\udcff"]
    write_rows(({"image": Path(name), "score": -0.5} for name in names), tmp_path / "rows.csv")
    assert [row["image"] for row in rows(tmp_path / "rows.csv")] == ["'=1+1", "'+1", "'@x", "a=1", "?"]
    assert {row["score"] for row in rows(tmp_path / "rows.csv")} == {"-0.5"}


def test_the_sheet_shows_both_scores_what_was_left_out_and_names_as_plain_text(folder, tmp_path, capsys):
    for name in ("a & b.png", "<c>.png"):
        (tmp_path / name).write_bytes((folder / "images" / "a.png").read_bytes())
    (tmp_path / "bad\x1b[31m.png").write_bytes(b"no image")
    command = ["retrieve", str(tmp_path), "--text", "a <red> bus", "--text", "x", "--k", "1"]
    command += ["--output", str(tmp_path / "sheet.html"), "--checkpoint", str(folder / "pre.pth"), "--device", "cpu"]
    predict.main(command)
    printed, page = capsys.readouterr(), (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "left out: " in printed.err and "bad" in printed.err and "\x1b[31m" not in printed.err
    head, first, _ = re.split(r'<h2 id="q\d">', page)
    assert "(1 more could not be read), by each of 2 queries" in head and "of the first 1 by cosine" in head
    assert "a &lt;red&gt;" in first and "<red>" not in page and "<c>" not in page and 'href="a%20%26%20b.png"' in first
    cards = [re.sub(r"<[^>]*>", " ", card).split() for card in re.findall(r"<li class=card>.*?</li>", first, re.S)]
    rows = [line.split("\t") for line in printed.out.splitlines()][: len(cards)]
    assert cards[0][-4:] == ["score", f"{float(rows[0][3]):.2f}", "cosine", f"{float(rows[0][4]):.3f}"]
    assert cards[1][-2:] == ["cosine", f"{float(rows[1][4]):.3f}"] and rows[1][3] == "-" not in cards[1]
    assert page.count("<li class=card>") == page.count("data:image/jpeg") == 2 * len(cards)
