"""JSON lines, tables, token files and folders of images: each against the same data as a JSON list."""

import csv
import io
import json
import logging
import os

import pytest
from conftest import refused
from PIL import Image

from dataset import cache
from dataset.annotations import Source, load_annotations, load_candidates, load_captions, load_pairs
from dataset.questions import load_questions, load_training_questions

CAPTIONS = {
    "a.png": ["A dog, on the left.", 'the "good" dog'],
    "b c.jpg": ["zwei Wörter; a\u2028b"],
    "sub/d.png": ["a cat", "one\u00a0more cat", "x"],
}
ENTRIES = [{"image": image, "caption": text} for image, texts in CAPTIONS.items() for text in texts]
QUESTIONS = [
    {"question_id": 7, "image": "a.png", "question": "Is it, or not?", "answer": "yes", "dataset": "vqa"},
    {"question_id": 8, "image": "a.png", "question": "what?", "answer": ["a dog"] * 9 + ["dog"], "ocr": [[0, "stop"]]},
    {"question_id": 9, "image": "sub/d.png", "question": "what?", "answer": "cat", "object_label": "cat&&dog"},
]
FORMATS = ["json", "jsonl", "csv", "tsv", "semicolons", "token", "folder"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in CAPTIONS:
        Image.new("RGB", (3, 2)).save(folder / name)
    return folder


def table(entries, separator=",", end="\r\n"):
    """What a spreadsheet writes of the entries, lists as JSON."""
    names = list(dict.fromkeys(key for entry in entries for key in entry))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, delimiter=separator, lineterminator=end)
    writer.writeheader()
    for entry in entries:
        writer.writerow({key: json.dumps(x) if isinstance(x, list) else x for key, x in entry.items()})
    return file.getvalue()


def stored(folder, entries, kind):
    """The entries in a file (or the folder itself) of a kind; its path."""
    if kind == "folder":
        for image in dict.fromkeys(entry["image"] for entry in entries):
            texts = [entry["caption"] for entry in entries if entry["image"] == image]
            (folder / image).with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8", newline="\n")
        return folder
    text = {
        "json": lambda: json.dumps(entries),
        "jsonl": lambda: "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries),
        "csv": lambda: table(entries),
        "tsv": lambda: table(entries, "\t", "\n"),
        "semicolons": lambda: "\ufeff" + table(entries, ";"),
        "token": lambda: "".join(f"{e['image']}#{i}\t{e['caption']}\n" for i, e in enumerate(entries)),
    }[kind]()
    path = folder / f"captions.{'csv' if kind == 'semicolons' else kind}"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def entries_of_all_stages(path):
    """What the stages make of a file's captions; the paths of their images below the file's folder."""
    source, root = Source(path), path if path.is_dir() else path.parent
    pairs = cache.load_pairs(source)
    yield [(pairs.paths[i], pairs.captions[n]) for n, i in enumerate(pairs.image_id)]
    yield from (load_pairs(source), load_candidates(source, "val"))
    for entry in load_captions(source, "train"):
        yield entry["image"], entry["captions"], os.path.relpath(root / entry["image_id"], root)


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_the_same_captions_give_the_same_entries(folder, kind):
    expected = list(entries_of_all_stages(stored(folder, ENTRIES, "json")))
    assert expected[0] == [(str(folder / entry["image"]), entry["caption"]) for entry in ENTRIES]
    assert expected[:3] == expected[:1] * 3 and len(expected) == 3 + len(CAPTIONS)
    assert list(entries_of_all_stages(stored(folder, ENTRIES, kind))) == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "semicolons"])
def test_the_same_questions_give_the_same_entries(folder, kind):
    expected, found = (Source(stored(folder, QUESTIONS, name)) for name in ("json", kind))
    assert load_questions(found) == load_questions(expected)
    assert load_training_questions(found) == load_training_questions(expected)
    assert [entry["question_id"] for entry in load_questions(found)] == [7, 8, 9]  # numbers, as the results will have


# ------------------------------------------------------------------------------------------------- tables


def test_cells_hold_a_list_or_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('image,caption,domain,image_id,\na.png,one,,007,\n\n,,,,\nb.png,"[""one"", ""two""]",in,12,\n')
    located = load_captions(Source(path), "val")
    assert [entry["captions"] for entry in located] == [["one"], ["one", "two"]]
    assert [entry["image_id"] for entry in located] == ["007", 12]  # a leading zero is no number's
    assert [entry["domain"] for entry in located] == [None, "in"]


GOOD_LINE, PAIR = "a.png,x\n", '{"image": "a.png", "caption": "x"}\n'
BAD = [
    ("t.csv", "Image,title\na.png,x\n", "line 2 has no 'image'"),
    ("t.csv", "image,caption,caption\na.png,x,y\n", "names the column 'caption' twice"),
    ("t.csv", "image,caption\na.png,x, y\n", "line 2 has 3 cells, but there are 2 columns"),
    ("t.csv", f'image,caption\n{GOOD_LINE}b.png,"Hi\nc.png,said "\n', "line 3 is no row (unexpected end of data);"),
    ("t.csv", 'image,caption\na.png,"x" y\n', "line 2 is no row ("),
    ("t.csv", "image,caption\na.png,[not a list\nb.png,\n", "line 3 has no 'caption'"),
    ("t.csv", f"image,caption\n{GOOD_LINE}b.png,Caf".encode() + b"\xe9\n", "line 3: byte 0xe9 is not UTF-8 text"),
    ("t.jsonl", PAIR + '\n{"image"\n', "line 3 is no JSON object ("),
    ("t.jsonl", '[\n{"image": "a.png"}]\n', "a list? name the file .json"),
    ("t.json", PAIR + PAIR, "an object a line? name it .jsonl"),
    ("t.txt", "a.png\tx\na.png x\n", "line 2 has no TAB between the image's name and its caption; a table?"),
    ("t.token", "\tx\n", "line 1: 'image' is empty"),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_what_cannot_be_used_is_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: cache.read_pairs(Source(tmp_path / name)), f"{tmp_path / name}: ", message)


def test_images_without_captions_are_reported_and_a_folder_without_any_is_refused(folder, caplog):
    refused(lambda: load_annotations(Source(folder), "pretrain"), "none of its 3 images has a .txt beside it")
    (folder / "b c.txt").write_text("\n a caption \r\n\n")
    with caplog.at_level(logging.WARNING, "semmim"):
        entries = load_annotations(Source(folder), "pretrain")
    assert [(entry["image"], entry["caption"]) for entry in entries] == [(str(folder / "b c.jpg"), "a caption")]
    assert "2 images have no caption in a .txt beside them" in caplog.text
    (folder / "b c.png").write_bytes((folder / "a.png").read_bytes())
    refused(lambda: load_annotations(Source(folder), "pretrain"), "b c.txt: captions ", "is one of them a mask?")
    (folder / "b c.txt").write_bytes(b"good\n\xff\n")
    refused(lambda: load_annotations(Source(folder), "pretrain"), "b c.txt: line 2: byte 0xff is not UTF-8")


# ------------------------------------------------------------------------------------------------- paths


PLAIN = {"image": "a.png", "caption": "a dog"}


def listed(folder, entries, image_root=None, prefixes=None):
    """The paths of a list's images, in a folder of the folder."""
    (folder / "lists").mkdir(exist_ok=True)
    path = folder / "lists/pairs.json"
    path.write_text(json.dumps(entries))
    return [entry["image"] for entry in load_annotations(Source(path, image_root, prefixes or {}), "pretrain")]


def test_relative_paths_start_at_image_root_or_at_the_list_s_folder(folder):
    roots = {name: str(folder / name) for name in ("vqa", "vg")}
    for root in roots.values():
        os.mkdir(root)
    entries = [{**PLAIN, "dataset": "vqa"}, {**PLAIN, "dataset": "vg"}]
    assert listed(folder, [PLAIN, {**PLAIN, "image": "/abs/b.png"}]) == [str(folder / "lists/a.png"), "/abs/b.png"]
    assert listed(folder, entries, folder / "vqa") == [str(folder / "vqa/a.png")] * 2
    assert listed(folder, entries, roots) == [str(folder / "vqa/a.png"), str(folder / "vg/a.png")]


def test_the_longest_matching_prefix_is_rewritten(folder):
    entries = [{**PLAIN, "image": f"{name}/x.jpg"} for name in ("val2014", "val", "other")]
    found = listed(folder, entries, folder, {"val": "V", "val2014/": "images/val/"})
    assert found == [str(folder / name) for name in ("images/val/x.jpg", "V/x.jpg", "other/x.jpg")]
