"""easy-VQA's package as this project's entries."""

import json

import official_files as official
import pytest
from conftest import refused
from PIL import Image

from dataset.text import Tokenizer
from tools.prepare import __main__ as prepare
from tools.prepare import easyvqa as prepare_easyvqa


@pytest.fixture
def easyvqa(tmp_path):
    """A folder like the package's, with six training pictures and one for the test."""
    colors = ("red", "blue", "teal", "black", "gray", "brown")
    for split, count in (("train", 6), ("test", 1)):
        folder = tmp_path / "source" / split
        (folder / "images").mkdir(parents=True)
        rows = []
        for number in range(count):
            color = colors[number]
            Image.new("RGB", (8, 8), "white").save(folder / "images" / f"{number}.png")
            rows += [
                [f"what is the {color} shape?", "circle", number],
                ["is there not a yellow shape in the image?", "yes", number],
                ["does the image contain a triangle?", "no", number],
                ["is no green shape present?", "yes", number],
                [f"is there a {color} shape?", "yes", number],
            ]
        (folder / "questions.json").write_text(json.dumps(rows))
    return tmp_path


def pieces(vocab, texts):
    """The word pieces of texts as text."""
    lines = open(vocab, encoding="utf-8").read().splitlines()
    return [[lines[i] for i in ids] for ids in Tokenizer(vocab).word_pieces(texts)]


def test_easyvqa_becomes_entries_with_captions_from_training_questions_alone(easyvqa):
    out = easyvqa / "out"
    prepare.main(["easyvqa", "--output", str(out), "--source", str(easyvqa / "source"), "--val", "2"])
    train, val, test = (official.read(out / f"vqa_{split}.json") for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [20, 10, 5]
    assert not {entry["image"] for entry in train} & {entry["image"] for entry in val}
    ids = [entry["question_id"] for entry in [*train, *val, *test]]
    assert len(set(ids)) == len(ids)
    assert [entry["question_type"] for entry in test] == ["what shape", *["is there not", "is there"] * 2]
    captions = official.read(out / "pretrain.json")
    assert {entry["image"] for entry in captions} == {entry["image"] for entry in train}
    red = [entry for entry in captions if entry["image"] == "images/train/0.png"]
    if red:
        assert red[0]["caption"][0] == "a red circle"
        assert "a red circle and no yellow shape" in red[0]["caption"]
        assert "a red circle and no triangle" in red[0]["caption"]
    assert official.read(out / "answer_list.json") == ["circle", "no", "yes"]
    texts = [entry["question"] for entry in [*train, *val, *test]] + [text for e in captions for text in e["caption"]]
    texts += "black blue brown circle gray green no rectangle red teal triangle yellow yes".split()  # all its answers
    assert pieces("configs/demo/vocab.txt", texts) == pieces("configs/bert/vocab.txt", texts)
    assert all((out / entry["image"]).is_file() for entry in [*train, *val, *test])


@pytest.mark.parametrize(
    "question, expected",
    [
        ("what is the color of the circle?", {"shape": "circle"}),
        ("what color is the shape?", {}),
        ("what is the teal shape?", {"color": "teal"}),
        ("what shape is in the image?", {}),
        ("does the image not contain a gray shape?", {"color": "gray"}),
        ("is no rectangle present?", {"shape": "rectangle"}),
        ("is there not a triangle in the image?", {"shape": "triangle"}),
    ],
)
def test_what_a_question_names(question, expected):
    assert prepare_easyvqa.named(question) == expected


def test_easyvqa_that_is_not_there_is_an_error(easyvqa):
    command = ["easyvqa", "--output", str(easyvqa / "out"), "--source"]
    refused(lambda: prepare.main([*command, str(easyvqa)]), "questions.json")
    refused(lambda: prepare.main([*command, str(easyvqa / "source"), "--val", "6"]), "--val 6")
